"""Reading an offline ``.wandb`` file: LevelDB's log format with protocol buffers as records."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32 * 1024
FILE_HEADER = struct.Struct("<4sHB")
RECORD_HEADER = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclasses.dataclass
class WandbFile:
    """What one W&B run was sent.

    ``history`` has one dict per logged row, ``summary`` the explicitly set values, ``axes`` metric -> x-axis.
    """

    run: Any
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    axes: dict[str, str]
    files: list[str]
    exit_code: int | None


def read_wandb_file(run_dir: Path) -> WandbFile:
    """Read the only offline run below ``run_dir/wandb``."""
    (path,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    result = WandbFile(None, {}, [], {}, {}, [], None)
    for raw in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(raw)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            result.run = record.run
            result.config.update(_items(record.run.config.update))
        elif kind == "history":
            result.history.append(_items(record.history.item))
        elif kind == "summary":
            result.summary.update(_items(record.summary.update))
        elif kind == "metric" and record.metric.step_metric:
            result.axes[record.metric.name] = record.metric.step_metric
        elif kind == "files":
            result.files += [file.path for file in record.files.files]
        elif kind == "exit":
            result.exit_code = record.exit.exit_code
    return result


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(data: bytes) -> Iterator[bytes]:
    ident, magic, _ = FILE_HEADER.unpack_from(data)
    assert (ident, magic) == (b":W&B", 0xBEE1)
    position, parts = FILE_HEADER.size, b""
    while position + RECORD_HEADER.size <= len(data):
        if BLOCK - position % BLOCK < RECORD_HEADER.size:  # a header never straddles two blocks
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = RECORD_HEADER.unpack_from(data, position)
        position += RECORD_HEADER.size
        piece = data[position : position + length]
        parts = piece if kind in (FULL, FIRST) else parts + piece
        position += length
        if kind in (FULL, LAST):
            yield parts
