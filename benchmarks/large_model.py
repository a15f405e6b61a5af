"""A model of a large shape, quantized out of its folder: memory, time and bytes.

::

    python benchmarks/large_model.py --blocks 2                          # 2 blocks of LLaMA-2-7B's shape, RTN
    python benchmarks/large_model.py --blocks 2 --method ptq161 --epochs 1
    python benchmarks/large_model.py                                     # all 32 blocks: 13.5 GB on the disk

The model is random, in bfloat16, and written shard by shard (one for each block), so that it is never in memory; all
blocks have the same weights, which are drawn once. It is deleted afterwards. The quantization runs in a process of its
own. Peak memory is the most that was resident (``VmHWM``), and how much was anonymous, not mapped from a file
(``RssAnon``, sampled every 50 ms): mapped pages of shards count as resident but are given back when memory is short. A
second process opens the checkpoint with :func:`ptq161.load` and reports the same, a third one generates tokens with it.
``--repeat 32`` makes a checkpoint of 32 blocks, for these two, out of the few that were quantized.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import ptq161
from ptq161.files.checksums import SUMS
from ptq161.methods.base import Method
from ptq161.packed.layout import TENSOR_METADATA, WEIGHTS_FILE
from ptq161.packed.model import measure
from ptq161.packed.tensor_file import write_tensors

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""Shapes of LLaMA-2; all have 32,000 tokens and 4,096 positions."""
MARGIN = 5e9
"""Bytes of the disk that are left free."""


def main() -> None:
    """Make the model, quantize it, load the checkpoint and print what it took as one JSON object."""
    parser = argparse.ArgumentParser(description="Quantize a random model of a large shape out of its folder.")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--blocks", type=int, help="instead of the shape's own number")
    parser.add_argument("--method", choices=("rtn", "gptq", "ptq161"), default="rtn")
    parser.add_argument("--epochs", type=int, default=1, help="of PTQ1.61 for each block (the paper has 20)")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--embedding-bits", type=int, default=16, help="16, 8 or 4")
    parser.add_argument("--generate", type=int, default=0, help="tokens to generate with the packed checkpoint")
    parser.add_argument("--repeat", type=int, help="blocks of the checkpoint that is opened, more than were quantized")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where model and result go")
    options = parser.parse_args()
    settings = {"num_hidden_layers": options.blocks} if options.blocks else {}
    config = LlamaConfig(
        **SHAPES[options.shape] | settings, vocab_size=32000, max_position_embeddings=4096, dtype="bfloat16"
    )
    method: Method = {
        "rtn": ptq161.RTN(bits=2),
        "gptq": ptq161.GPTQ(bits=2),
        "ptq161": ptq161.PTQ161(epochs=options.epochs),
    }[options.method]
    tokens = torch.randint(0, 32000, (options.samples, options.seq_len), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(prefix="large_model.", dir=options.folder) as place:
        model, packed = Path(place) / "model", Path(place) / "packed"
        n_bytes = write_model(config, model)
        quantized = in_a_process(quantize, str(model), tokens, method, str(packed), options.embedding_bits)
        shutil.rmtree(model)
        if options.repeat:
            repeat_blocks(packed, options.repeat)
        loaded = in_a_process(load, str(packed), 0)
        generated = in_a_process(load, str(packed), options.generate) if options.generate else None
    report = {
        "shape": options.shape,
        "blocks": config.num_hidden_layers,
        "method": str(method),
        "tokens": list(tokens.shape),
        "model_bytes": n_bytes,
        "quantize_folder": quantized,
        "blocks_opened": options.repeat or config.num_hidden_layers,
        "load": loaded,
        "generate": generated,
    }
    print(json.dumps(report))


def write_model(config: LlamaConfig, folder: Path) -> int:
    """Write a random model with a shard for each block, one shard in memory at a time; return its bytes.

    Raises:
        SystemExit: the disk has no room for it.
    """
    with init_empty_weights():
        model = LlamaForCausalLM._from_config(config)
    shards: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        shard = f"block-{int(parts[2]):03}" if parts[1] == "layers" else parts[-2]
        shards.setdefault(f"model-{shard}.safetensors", {})[name] = tensor
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    free = shutil.disk_usage(folder.parent).free
    if free < 1.5 * n_bytes + MARGIN:
        raise SystemExit(
            f"{folder.parent} has {free / 1e9:.1f} GB free; {1.5 * n_bytes + MARGIN:.2g} bytes are needed."
        )
    folder.mkdir()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    drawn: dict[str, Tensor] = {}  # by name, without the number of the block
    for file, tensors in shards.items():
        found = {}
        for name, tensor in tensors.items():
            key = name.partition("layers.")[2].partition(".")[2] or name
            if key not in drawn:
                drawn[key] = _random(name, tensor, config, generator)
            found[name] = drawn[key]
        save_file(found, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return n_bytes


def _random(name: str, tensor: Tensor, config: LlamaConfig, generator: torch.Generator) -> Tensor:
    if "norm" in name:
        return torch.ones(tensor.shape, dtype=tensor.dtype)
    return torch.empty(tensor.shape, dtype=tensor.dtype).normal_(0, config.initializer_range, generator=generator)


def quantize(folder: str, tokens: Tensor, method: Method, out: str, embedding_bits: int) -> dict[str, Any]:
    """Quantize a folder; return seconds per block, bytes and bits per weight as stored."""
    seconds: list[float] = []
    linears: dict[str, float] = {}

    def on_metric(name: str, value: float, /, **where: int | str) -> None:
        if name == "seconds":
            seconds.append(round(value, 2))
        if name == "nbytes":
            linears[str(where["linear"])] = value

    began = time.perf_counter()
    file = ptq161.quantize_folder(folder, tokens, method, out, on_metric=on_metric, embedding_bits=embedding_bits)
    total = time.perf_counter() - began
    return {
        "seconds_of_blocks": seconds,
        "seconds": round(total, 1),
        "checkpoint_bytes": file.stat().st_size,
        "linear_bytes": int(sum(linears.values())),
    }


def repeat_blocks(folder: Path, n_blocks: int) -> None:
    """Make a packed checkpoint of ``n_blocks`` blocks out of one of fewer, in place."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    few, stored = config["num_hidden_layers"], config["quantization_config"]
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as opened:
        sources = dict(_repeated(opened.keys(), few, n_blocks))
        layouts = {name: opened.get_tensor(source) for name, source in sources.items()}  # memory-mapped
        write_tensors(folder / "repeated", layouts, layouts.__getitem__, TENSOR_METADATA)
    stored["linears"] = {
        name: stored["linears"][source] for name, source in _repeated(stored["linears"], few, n_blocks)
    }
    config["num_hidden_layers"] = n_blocks
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "repeated").replace(folder / WEIGHTS_FILE)
    (folder / SUMS).unlink()


def _repeated(names: Iterable[str], few: int, n_blocks: int) -> Iterator[tuple[str, str]]:
    """Yield names of ``n_blocks`` blocks, each with the name of ``few`` blocks that it repeats."""
    for name in names:
        parts = name.split(".")
        if "layers" not in parts:
            yield name, name
            continue
        place = parts.index("layers") + 1
        for block in range(int(parts[place]), n_blocks, few):
            yield ".".join([*parts[:place], str(block), *parts[place + 1 :]]), name


def load(folder: str, n_tokens: int) -> dict[str, Any]:
    """Open a checkpoint, and generate tokens; return seconds, and bits per weight over all packed linears."""
    began = time.perf_counter()
    model, _ = ptq161.load(folder)
    report = {"seconds": round(time.perf_counter() - began, 1)}
    report["bits_per_weight"] = round(measure(model).bits_per_weight, 4)
    if n_tokens:
        # One token of a prompt, and the first one of the text, which reads every page of the file, are not timed.
        prompt = torch.tensor([[1]])
        settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        began = time.perf_counter()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, **settings)
        report["seconds_of_the_first_token"] = round(time.perf_counter() - began, 2)
        began = time.perf_counter()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n_tokens, **settings)
        report["tokens_per_second"] = round(n_tokens / (time.perf_counter() - began), 2)
    return report


def in_a_process(work: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """Do work in a fresh process; return what it returns and its memory."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        result: dict[str, Any] = receiver.recv()
    except EOFError as error:
        raise SystemExit(f"{work.__name__} failed") from error
    finally:
        process.join()
    return result


def _measured(sender: Any, work: Callable[..., dict[str, Any]], arguments: tuple[object, ...]) -> None:
    before = _memory()
    anonymous = [before["RssAnon"]]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            anonymous.append(_memory()["RssAnon"])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    result = work(*arguments)
    done.set()
    thread.join()
    sender.send(
        result
        | {
            "peak_resident_bytes": _memory()["VmHWM"],
            "peak_anonymous_bytes": max(anonymous),
            "resident_before_bytes": before["VmRSS"],
        }
    )


def _memory() -> dict[str, int]:
    """Return this process's memory in bytes, by the names of Linux's ``/proc/self/status``."""
    return dict(_lines(Path("/proc/self/status").read_text(encoding="ascii")))


def _lines(status: str) -> Iterator[tuple[str, int]]:
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            yield name, int(value.split()[0]) * 1024


if __name__ == "__main__":
    main()
