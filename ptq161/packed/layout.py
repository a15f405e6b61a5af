"""What a checkpoint folder holds beside its tensors: names of files, layout, configuration, card, checksums."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptq161.errors import UserError
from ptq161.files.checksums import SUMS, check_sums, sums_of
from ptq161.files.folders import whole_folder
from ptq161.models.settings import PACKED_FORMAT
from ptq161.packed.card import CARD, is_ours, write_card
from ptq161.packed.embedding import embedding_bits, rest_dtype
from ptq161.packed.model import packed_settings

WEIGHTS_FILE = "packed.safetensors"
"""Name of the file of tensors in a checkpoint folder."""
GENERATION_FILE = "generation_config.json"
ADVICE = "choose another folder"
ADVICE_AGAIN = "get the checkpoint again"
TENSOR_METADATA = {"format": "pt"}
"""What the file of tensors says of itself; one key, since safetensors writes several in random order."""
_SCHEMA_VERSION = 1
_PLACES = ("_name_or_path", "name_or_path")
"""Keys of configurations that hold a path of the machine on which the model was loaded."""
_CARD = """The linears of this model are stored packed; everything else is as in a plain Hugging Face folder.

    import ptq161
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER)  # or, with the tokenizer: ptq161.load(FOLDER)
    ptq161.export(FOLDER, OUT)  # a dense folder, for programs that do not know ptq161"""


_EMBEDDINGS = "Embedding and head are stored in codes of {bits} bits."


@contextmanager
def checkpoint_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Write a checkpoint folder so that it is there with all of its files, or is left as it was.

    Args:
        folder: absent or empty.
        overwrite: replace a folder that this project wrote.

    Yields:
        an empty folder, which becomes ``folder``.

    Raises:
        UserError: the folder holds files or cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with checkpoint_folder(f"{place}/model") as scratch:
        ...         write_card(scratch, "packed", "A model.")
        ...     is_ours(Path(place) / "model")
        True
    """
    folder = Path(folder).expanduser()
    try:
        with whole_folder(folder, ADVICE, is_ours if overwrite else None) as scratch:
            yield scratch
    except (OSError, SafetensorError) as error:
        raise UserError(f"the checkpoint cannot be written to {folder}: {error}.") from error


def write_around(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, nominal_bits: float | None
) -> None:
    """Write what a checkpoint holds beside its tensors, the checksums last; the values of the model are not read.

    Args:
        model: its linears are packed.
        tokenizer: None saves none.
        folder: holds the tensors.
        nominal_bits: as for :func:`save`.

    Example:
        >>> import tempfile
        >>> import ptq161, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), ptq161.RTN(bits=2))
        >>> with tempfile.TemporaryDirectory() as place:
        ...     write_around(model, None, Path(place), nominal_bits=2.0)
        ...     sorted(path.name for path in Path(place).iterdir())
        ['README.md', 'SHA256SUMS', 'config.json', 'generation_config.json']
    """
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(rest_dtype(model)).removeprefix("torch.")
    config["quantization_config"] = {
        "quant_method": PACKED_FORMAT,
        "schema_version": _SCHEMA_VERSION,
        "nominal_bits_per_weight": nominal_bits,
        **packed_settings(model),
    }
    write_rest(model, tokenizer, folder)
    content = json.dumps(_without_places(config), indent=1, sort_keys=True) + "\n"
    (folder / "config.json").write_text(content, encoding="utf-8")
    bits = embedding_bits(model)
    write_card(folder, "packed", _CARD if bits is None else f"{_CARD}\n\n{_EMBEDDINGS.format(bits=bits)}")
    (folder / SUMS).write_text(sums_of(folder, leave_out=(CARD,)), encoding="utf-8")


def write_rest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write what a model's folder holds beside weights and config: settings of generation, and the tokenizer.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model.generation_config.eos_token_id = [1, 5]
        >>> with tempfile.TemporaryDirectory() as place:
        ...     write_rest(model, None, Path(place))
        ...     json.loads((Path(place) / GENERATION_FILE).read_text())["eos_token_id"]
        [1, 5]
    """
    generation = getattr(model, "generation_config", None)  # a model without a head has none
    if generation is not None:
        (folder / GENERATION_FILE).write_text(generation.to_json_string(), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def check_layout(folder: Path, version: object) -> None:
    """Check a checkpoint folder's files, and that its layout is the present one.

    Raises:
        UserError: a file is damaged, or the layout is another one.

    Example:
        >>> check_layout(Path("checkpoint"), 0)
        Traceback (most recent call last):
        ptq161.errors.UserError: checkpoint has checkpoint layout 0; this version reads 1.
    """
    check_sums(folder, required=("config.json", WEIGHTS_FILE))
    if version != _SCHEMA_VERSION:
        raise UserError(f"{folder} has checkpoint layout {version}; this version reads {_SCHEMA_VERSION}.")


def stored_nominal_bits(folder: str | Path) -> float | None:
    """Return the nominal bits per weight with which a checkpoint was saved; None where it was saved without.

    Example:
        >>> import tempfile
        >>> import ptq161, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), ptq161.RTN(bits=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = ptq161.save(model, None, folder, nominal_bits=ptq161.RTN(bits=2).nominal_bits())
        ...     stored_nominal_bits(folder)
        2.0
    """
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    bits: float | None = config["quantization_config"].get("nominal_bits_per_weight")
    return bits


def _without_places(value: Any) -> Any:
    """Leave out, of a configuration and those inside it, where the model was loaded from."""
    if not isinstance(value, dict):
        return value
    return {key: _without_places(item) for key, item in value.items() if key not in _PLACES}
