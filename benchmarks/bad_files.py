"""The files that ``bad_cases.py`` names: models, checkpoints, records and texts, most of them damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import warm


def make_bad_inputs(folder: Path, arguments: list[str]) -> None:
    """Make models, checkpoints, records and texts, most of them damaged, beside ``tiny/`` and ``tiny.txt``."""
    (folder / "short.txt").write_text("Only twenty letters.")
    (folder / "empty.txt").write_text("")
    (folder / "no_text.txt").write_bytes(b"\x1f\x8b\x08\x00\xff\xfe\x00\x81" * 500)
    (folder / "spaces").mkdir()
    (folder / "spaces" / "word.yaml").write_text("mask_ratio: many\n")
    (folder / "spaces" / "turned.yaml").write_text("mask_ratio: {low: 0.5, high: 0.1}\n")
    assert warm.program("run", *arguments, "method=rtn", f"hydra.run.dir={folder / 'run'}", "cache=false")() == 0
    shutil.copytree(folder / "run" / "checkpoint", folder / "checkpoint")
    _make_models(folder)
    _make_checkpoints(folder)
    _make_records(folder)


def _make_models(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    def copy(name: str, **config: Any) -> Path:
        target = Path(shutil.copytree(folder / "tiny", folder / "models" / name))
        if config:
            _edit(target / "config.json", **config)
        return target

    def change(target: Path, **changes: torch.Tensor | None) -> None:
        tensors = load_file(target / "model.safetensors") | changes
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, target / "model.safetensors", metadata={"format": "pt"})

    copy("gpt2", model_type="gpt2", architectures=["GPT2LMHeadModel"])
    copy("gptq", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 64})
    copy("other_sizes", intermediate_size=128)
    copy("no_type", model_type=None)
    name = "model.layers.1.mlp.up_proj.weight"
    nan = load_file(folder / "tiny" / "model.safetensors")[name]
    nan[3, 4] = torch.nan
    change(copy("nan"), **{name: nan})
    change(copy("lacks_a_tensor"), **{"model.norm.weight": None})
    (copy("no_weights") / "model.safetensors").unlink()
    _cut(copy("cut_weights") / "model.safetensors")
    for file in copy("no_tokenizer").glob("tokenizer*"):
        file.unlink()
    _cut(copy("cut_tokenizer") / "tokenizer.json")
    _cut(copy("cut_config") / "config.json")
    (copy("list_config") / "config.json").write_text("[]")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (copy("lfs") / "model.safetensors").write_text(pointer)


def _make_checkpoints(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    def copy(name: str, *without: str) -> Path:
        ignore = shutil.ignore_patterns(*without)
        return Path(shutil.copytree(folder / "checkpoint", folder / "checkpoints" / name, ignore=ignore))

    weights, sums = "packed.safetensors", "SHA256SUMS"
    flipped = copy("flipped") / weights
    content = bytearray(flipped.read_bytes())
    content[-100] ^= 1
    flipped.write_bytes(content)
    _cut(copy("cut") / weights)
    copy("no_weights", weights)
    _edit(copy("config_edited") / "config.json", rms_norm_eps=1.0)
    _cut(copy("tokenizer_cut") / "tokenizer.json")
    (copy("sums_empty") / sums).write_text("")
    (copy("sums_foreign") / sums).write_text(f"{'0' * 64}  ../../tiny.txt\n")
    _cut(copy("without_sums_cut", sums) / weights)
    quantization = json.loads((folder / "checkpoint" / "config.json").read_text())["quantization_config"]
    layout = {**quantization, "schema_version": 9}
    _edit(copy("layout", sums) / "config.json", quantization_config=layout)
    linears = {name: {**linear, "format": "nonsense"} for name, linear in quantization["linears"].items()}
    _edit(copy("format", sums) / "config.json", quantization_config={**quantization, "linears": linears})
    lacking = copy("lacks_a_tensor", sums) / weights
    tensors = load_file(lacking)
    del tensors["model.norm.weight"]
    save_file(tensors, lacking)


def _make_records(folder: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder / "run", folder / "runs" / name))

    _edit(copy("running") / "manifest.json", exit_state="running")
    _cut(copy("manifest_cut") / "manifest.json")
    _edit(copy("version") / "manifest.json", schema_version=9)
    _cut(copy("results_cut") / "results.json")
    (copy("config_cut") / "config.yaml").write_text("method: {name: rtn")
    (copy("config_list") / "config.yaml").write_text("[]")
    _cut(copy("metrics_cut") / "metrics.jsonl")


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
