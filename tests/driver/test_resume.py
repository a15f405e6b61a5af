"""A quantization that was cut off goes on from its finished windows and ends in the same bytes."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ptq161.driver.quantization import quantize
from ptq161.errors import UserError
from ptq161.files.hashing import sha256_of_tensors
from ptq161.methods.awq import AWQ
from ptq161.methods.base import Method
from ptq161.methods.billm import BiLLM
from ptq161.methods.gptq import GPTQ
from ptq161.methods.gse import GSE
from ptq161.methods.nf4 import NF4
from ptq161.methods.omniquant import OmniQuant
from ptq161.methods.pb_llm import PBLLM
from ptq161.methods.ptq161 import PTQ161
from ptq161.methods.qdrop import QDrop
from ptq161.methods.quant_dllm import QuantDLLM
from ptq161.methods.quip import QuIP
from ptq161.methods.rtn import RTN
from ptq161.methods.vptq import VPTQ
from ptq161.methods.waterfill import Waterfill
from ptq161.packed.linear import PackedLinear

TinyModel = Callable[..., PreTrainedModel]
TOKENS = torch.randint(3, 256, (3, 16), generator=torch.Generator().manual_seed(4))
N_BLOCKS = 3
METHODS = {
    "rtn": RTN(bits=2),
    "gptq": GPTQ(bits=2, batch_size=2),
    "awq": AWQ(bits=4, group_size=32, batch_size=2),
    "quip": QuIP(bits=2, batch_size=2),
    "gse": GSE(),
    "nf4": NF4(),
    "omniquant": OmniQuant(bits=2, epochs=1, batch_size=2),
    "qdrop": QDrop(steps=4, batch_size=2),
    "qdrop with activations": QDrop(steps=4, batch_size=2, activation_bits=4),
    "input drop": OmniQuant(bits=2, epochs=1, batch_size=2, input_drop=0.5),
    "vptq": VPTQ(vector_length=4, centroids=16, residual_centroids=4, batch_size=2),
    "vptq, shared codebooks": VPTQ(vector_length=4, centroids=16, codebook_per="block", batch_size=2, refit_steps=2),
    "waterfill": Waterfill(epochs=1, batch_size=2),
    "pb_llm": PBLLM(batch_size=2),
    "billm": BiLLM(batch_size=2),
    "quant_dllm": QuantDLLM(order=1, batch_size=2),
    "ptq161": PTQ161(epochs=1, batch_size=2, compute_dtype="bfloat16"),
    "windows of 2": PTQ161(epochs=1, batch_size=2, block_size=2),
    "learned codes": PTQ161(codes="learned", epochs=1, batch_size=2),
}
QUICK = METHODS["ptq161"]
Numbers = list[tuple[str, float, dict[str, int | str]]]


class Cut(Exception):
    """Ends a quantization."""


class MetricLog:
    """Keeps every metric, and interrupts the quantization at the one with number ``until``."""

    def __init__(self, until: int | None = None) -> None:
        self.emitted: Numbers = []
        self.until = until

    def __call__(self, name: str, value: float, /, **where: int | str) -> None:
        self.emitted.append((name, value, where))
        if len(self.emitted) == self.until:
            raise Cut

    @property
    def results(self) -> Numbers:
        """All but the times, which differ from run to run."""
        return [entry for entry in self.emitted if entry[0] != "seconds"]


def run(
    tiny_model: TinyModel, folder: Path | None, method: Method = QUICK, until: int | None = None, **arguments: Any
) -> tuple[str, MetricLog]:
    """Quantize the tiny model; return the hash of all its bytes, and the metrics."""
    model, metrics = tiny_model("llama", n_blocks=N_BLOCKS), MetricLog(until)
    quantize(model, arguments.pop("tokens", TOKENS), method, on_metric=metrics, resume=folder, **arguments)
    return sha256_of_tensors(model.state_dict()), metrics


def cut(tiny_model: TinyModel, folder: Path, until: int, method: Method = QUICK) -> None:
    with pytest.raises(Cut):
        run(tiny_model, folder, method, until)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_bytes_and_numbers_of_a_run_that_was_never_cut_off(
    method: Method, tiny_model: TinyModel, tmp_path: Path
) -> None:
    expected, whole = run(tiny_model, None, method)
    per_window = [i for i, (name, _, _) in enumerate(whole.emitted, start=1) if name == "seconds"]
    assert len(per_window) == -(-N_BLOCKS // method.block_size)
    # In the second window, with the first one finished.
    cut(tiny_model, tmp_path, per_window[0] + 1, method)
    found, metrics = run(tiny_model, tmp_path, method)
    assert found == expected
    assert metrics.results == whole.results
    assert len(metrics.emitted) == len(whole.emitted)


def test_cut_off_again_and_again(tiny_model: TinyModel, tmp_path: Path) -> None:
    expected, whole = run(tiny_model, None)
    ends = [i for i, (name, _, _) in enumerate(whole.emitted, start=1) if name == "seconds"]
    for finished, end in enumerate(ends):
        for until in (end - 1, end):  # within a window, and after its last number, before it is written
            cut(tiny_model, tmp_path, until)
            assert len(list(tmp_path.glob("block_*"))) == finished
        if end < ends[-1]:
            cut(tiny_model, tmp_path, end + 1)  # a window further
    assert run(tiny_model, tmp_path)[0] == expected


def test_finished_windows_are_not_quantized_again(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized: list[int] = []
    original = PTQ161.quantize_window

    def watch(self: PTQ161, window: Any) -> Any:
        quantized.append(window.first_block)
        return original(self, window)

    monkeypatch.setattr(PTQ161, "quantize_window", watch)
    expected, whole = run(tiny_model, tmp_path)
    assert quantized == [0, 1, 2]
    (tmp_path / "block_00001.safetensors").unlink()
    assert run(tiny_model, tmp_path)[0] == expected
    assert quantized == [0, 1, 2, 1]
    # With everything finished not even the chains are computed.
    monkeypatch.setattr("ptq161.driver.quantization.capture_inputs", lambda *_: pytest.fail("the model was run"))
    found, metrics = run(tiny_model, tmp_path)
    assert found == expected and len(quantized) == 4
    assert [entry for entry in metrics.emitted if entry[0] != "seconds"] == whole.results


def test_a_model_in_half_precision_and_other_architectures(tiny_model: TinyModel, tmp_path: Path) -> None:
    for architecture in ("opt", "gemma3_text"):
        found = []
        for folder in (None, tmp_path / architecture, tmp_path / architecture):
            model = tiny_model(architecture, n_blocks=N_BLOCKS).bfloat16()
            if folder is not None and folder.exists():
                (folder / "block_00002.safetensors").unlink()
            quantize(model, TOKENS, QUICK, resume=folder)
            assert len([m for m in model.modules() if isinstance(m, PackedLinear)]) >= 6 * N_BLOCKS
            found.append(sha256_of_tensors(model.state_dict()))
        assert len(set(found)) == 1


@pytest.mark.parametrize(
    ("arguments", "different"),
    [
        ({"method": PTQ161(epochs=2, batch_size=2, compute_dtype="bfloat16")}, "method.epochs is 2 here and 1 there"),
        ({"method": RTN(bits=2)}, "method.class is ptq161.methods.rtn.RTN here and ptq161.methods.ptq161"),
        ({"seed": 1}, "seed is 1 here and 0 there"),
        ({"tokens": TOKENS[:2]}, "calibration is "),
    ],
)
def test_another_quantization_is_refused_with_what_differs(
    tiny_model: TinyModel, tmp_path: Path, arguments: dict[str, Any], different: str
) -> None:
    cut(tiny_model, tmp_path, 40)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError) as caught:
        run(tiny_model, tmp_path, **arguments)
    assert different in str(caught.value) and str(tmp_path) in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_weights_masks_and_threads_are_refused(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_model, tmp_path)
    model = tiny_model("llama", n_blocks=N_BLOCKS)
    with torch.no_grad():
        model.lm_head.weight[3, 4] += 1
    with pytest.raises(UserError, match=r"\(weights is \w{8}\.\.\. here and \w{8}\.\.\. there\)"):
        quantize(model, TOKENS, QUICK, resume=tmp_path)
    model = tiny_model("llama", n_blocks=N_BLOCKS)
    model.config.rms_norm_eps *= 2
    with pytest.raises(UserError, match=r"\(config is "):
        quantize(model, TOKENS, QUICK, resume=tmp_path)
    from ptq161.packed.masks import salient_masks

    model = tiny_model("llama", n_blocks=N_BLOCKS)
    masks = salient_masks(quantize(model, TOKENS, QUICK))
    with pytest.raises(UserError, match=r"\(salient_masks is \w{8}\.\.\. here and None there\)"):
        run(tiny_model, tmp_path, salient_masks=masks)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.raises(UserError, match=r"threads is 7 here and \d there"):
        run(tiny_model, tmp_path)


@pytest.mark.parametrize(
    "damage", ["truncated", "foreign", "empty", "without metadata", "a tensor", "a metric", "a setting", "a neighbor"]
)
def test_a_damaged_window_is_quantized_again(
    damage: str, tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = run(tiny_model, tmp_path / "folder")
    file = tmp_path / "folder" / "block_00001.safetensors"
    if damage == "foreign":
        run(tiny_model, tmp_path / "other", PTQ161(epochs=0, batch_size=2))
        shutil.copy(tmp_path / "other" / file.name, file)
    elif damage == "without metadata":
        save_file(load_file(file), file)
    elif damage == "a tensor":
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    elif damage in ("a metric", "a setting"):
        pattern = rb"(output_error[^\d]*\d\.)\d" if damage == "a metric" else rb"(salient_bits[^\d]*)4"
        changed, n = re.subn(pattern, lambda found: found[1] + b"9", file.read_bytes(), count=1)
        assert n == 1
        file.write_bytes(changed)
    elif damage == "a neighbor":
        shutil.copy(file.with_name("block_00000.safetensors"), file)
    else:
        file.write_bytes(file.read_bytes()[:-100] if damage == "truncated" else b"")
    assert run(tiny_model, tmp_path / "folder")[0] == expected
    assert "quantized again" in caplog.text and str(file) in caplog.text


def test_a_full_disk_keeps_what_is_finished(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = run(tiny_model, None)
    synced, fsync = [], os.fsync

    def full(handle: int) -> None:
        synced.append(handle)
        if len(synced) > 4:  # fingerprint and first window, each a file and its folder
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"block_00001\.safetensors cannot be written because the disk is full"):
        run(tiny_model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block_00000.safetensors", "fingerprint.json"]
    monkeypatch.undo()
    assert run(tiny_model, tmp_path)[0] == expected


def test_a_folder_that_vanishes_is_one_sentence(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tmp_path / "folder"

    def vanish(name: str, value: float, /, **where: int | str) -> None:
        if name == "seconds":
            shutil.rmtree(folder)

    model = tiny_model("llama", n_blocks=N_BLOCKS)
    with pytest.raises(UserError, match=r"block_00000\.safetensors cannot be written \(No such file or directory\)"):
        quantize(model, TOKENS, QUICK, on_metric=vanish, resume=folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)"):
        run(tiny_model, tmp_path / "file" / "folder")
