"""Content hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from ptq161.files.hashing import sha256_of_file, sha256_of_sources, sha256_of_tensors


def test_tensor_hash_depends_on_content_alone() -> None:
    a, b = torch.randn(3, 4), torch.arange(5)
    reference = sha256_of_tensors({"a": a, "b": b})
    assert reference == sha256_of_tensors({"b": b.clone(), "a": a.T.contiguous().T.requires_grad_()})
    changed = a.clone()
    changed[2, 3] += 1e-6
    others = [{"a": changed, "b": b}, {"a": a.view(4, 3), "b": b}, {"a": a, "c": b}, {"a": a.view(torch.int32), "b": b}]
    assert len({reference, *map(sha256_of_tensors, others)}) == 5


def test_every_dtype_and_shape_has_a_hash() -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.bool, torch.uint8, torch.int64, torch.float64)
    tensors = [torch.ones(shape).to(dtype) for dtype in dtypes for shape in ((), (0, 3), (2, 2))]
    assert len({sha256_of_tensors({"x": t}) for t in tensors}) == len(tensors)


def test_file_hash(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc" * 100_000)
    assert sha256_of_file(tmp_path / "f") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_source_hash_sees_names_and_contents_of_sources_only(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    source = tmp_path / "pkg" / "a.py"
    source.write_text("x = 1")
    before = sha256_of_sources(tmp_path)
    (tmp_path / "pkg" / "a.pyc").write_text("")
    assert sha256_of_sources(tmp_path) == before
    (tmp_path / "pkg" / "task.yaml").write_text("a: 1")
    with_data = sha256_of_sources(tmp_path)
    assert with_data != before
    source.write_text("x = 2")
    changed = sha256_of_sources(tmp_path)
    source.rename(tmp_path / "a.py")
    assert len({before, changed, sha256_of_sources(tmp_path)}) == 3
    assert len(sha256_of_sources()) == 64


def test_source_hash_leaves_out_what_only_shows(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "methods").mkdir()
    before = sha256_of_sources(tmp_path)
    (tmp_path / "report" / "a.py").write_text("x = 1")
    (tmp_path / "__main__.py").write_text("x = 1")
    assert sha256_of_sources(tmp_path) == before
    (tmp_path / "methods" / "watch.py").write_text("x = 1")
    assert sha256_of_sources(tmp_path) != before
