"""Dense models as plain Hugging Face folders, which need nothing of this project to be opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ptq161.errors import UserError
from ptq161.files.checksums import SUMS, sums_of
from ptq161.files.folders import whole_folder
from ptq161.packed.card import CARD, is_ours, write_card
from ptq161.packed.checkpoint import load
from ptq161.packed.layout import ADVICE, write_rest
from ptq161.packed.model import dequantize


def export(folder: str | Path, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write a packed checkpoint as a plain dense Hugging Face folder.

    The dense weights are what the packed bytes dequantize to, in the dtype of the model's other tensors.

    Args:
        folder: a checkpoint written by :func:`ptq161.save`.
        out: the folder to write: absent or empty, and there with all of its files or left as it was.
        overwrite: replace a folder that this project wrote.

    Returns:
        ``out`` as a path.

    Raises:
        UserError: ``folder`` is not a packed checkpoint, or ``out`` holds files or cannot be written.

    Example:
        >>> import tempfile
        >>> import ptq161, torch
        >>> from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> model = ptq161.quantize(model, torch.zeros(1, 2, dtype=torch.long), ptq161.RTN(bits=2))
        >>> from tokenizers import Tokenizer, models
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
        >>> with tempfile.TemporaryDirectory() as place:
        ...     file = ptq161.save(model, tokenizer, Path(place) / "packed")
        ...     dense = AutoModelForCausalLM.from_pretrained(export(file.parent, Path(place) / "dense"))
        >>> torch.equal(dense.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.dequantize())
        True
    """
    model, tokenizer = load(folder)
    dequantize(model)
    save_dense(model, tokenizer, out, overwrite=overwrite)
    return Path(out).expanduser()


def save_dense(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: str | Path, *, overwrite: bool = False
) -> None:
    """Write a dense model and its tokenizer as a plain Hugging Face folder.

    Args:
        model: a model without packed linears.
        tokenizer: its tokenizer.
        out: as in :func:`export`.
        overwrite: replace a folder that this project wrote.

    Raises:
        UserError: ``out`` holds files or cannot be written.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> from tokenizers import Tokenizer, models
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_dense(model, tokenizer, folder)
        ...     (Path(folder) / "model.safetensors").exists()
        True
    """
    generation: Any = getattr(model, "generation_config", None)
    try:
        with whole_folder(Path(out), ADVICE, is_ours if overwrite else None) as scratch:
            # transformers refuses to save settings of sampling that contradict each other; ours are copied as they are.
            model.generation_config = GenerationConfig()
            model.save_pretrained(scratch)
            model.generation_config = generation
            write_rest(model, tokenizer, scratch)
            write_card(scratch, "dense", "Dense weights, written by `ptq161.export` from a packed checkpoint.")
            (scratch / SUMS).write_text(sums_of(scratch, leave_out=(CARD,)), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"the dense model cannot be written to {out}: {error}.") from error
    finally:
        model.generation_config = generation
