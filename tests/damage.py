"""Damage to files, drawn by hypothesis: bytes flipped, cut, appended, the content of another file, values exchanged."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st


@dataclasses.dataclass(frozen=True)
class Damage:
    """One change of a file, given in shares of its size, so that it fits any.

    Attributes:
        kind: what happens.
        where: share of the file at which it happens, in [0, 1).
        with_: the bytes that are put there, or the share of the other file that is taken.
    """

    kind: str
    where: float
    with_: bytes

    def __call__(self, file: Path, others: Sequence[Path] = ()) -> None:
        """Change ``file``, which then has other bytes than before; ``others`` may be swapped with it."""
        before = file.read_bytes()
        at = int(self.where * len(before))
        match self.kind:
            case "flip":
                after = before[:at] + bytes([before[at] ^ max(1, self.with_[0])]) + before[at + 1 :] if before else b"?"
            case "overwrite":
                after = before[:at] + self.with_ + before[at + len(self.with_) :]
            case "insert":
                after = before[:at] + self.with_ + before[at:]
            case "append":
                after = before + self.with_
            case "cut":
                after = before[:at]
            case "empty":
                after = b""
            case _:
                other = others[int(self.where * len(others))] if others else None
                after = other.read_bytes() if other else b""
        file.unlink()  # it may have a second name elsewhere
        file.write_bytes(after if after != before else before + b"\0")


DAMAGES = st.builds(
    Damage,
    st.sampled_from(["flip", "flip", "overwrite", "insert", "append", "cut", "empty", "swap"]),
    st.floats(0, 1, exclude_max=True),
    # Bytes that mean something to JSON and YAML find more than random ones.
    st.one_of(
        st.binary(min_size=1, max_size=8), st.sampled_from([b"9", b"-1", b"null", b"[]", b'"', b"{", b"}", b"\n"])
    ),
)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A value of a JSON or YAML file that is not what it should be: what is there parses, and means nothing.

    Attributes:
        way: shares that lead from the top to the value.
        value: takes its place.
        gone: the value is left out instead.
    """

    way: tuple[float, ...]
    value: Any
    gone: bool

    def __call__(self, file: Path, others: Sequence[Path] = ()) -> None:
        """Change ``file``; one of its lines where it is ``.jsonl``."""
        lines = file.read_text(encoding="utf-8").splitlines() if file.suffix == ".jsonl" else []
        at = int(self.way[0] * len(lines))
        content = json.loads(lines[at]) if lines else yaml.safe_load(file.read_text(encoding="utf-8"))
        place, keys = content, _keys(content)
        for share in self.way:
            if not keys:
                break
            key = keys[int(share * len(keys))]
            if share == self.way[-1] or not _keys(place[key]):
                if self.gone:
                    del place[key]
                else:
                    place[key] = self.value
                break
            place, keys = place[key], _keys(place[key])
        text = json.dumps(content)
        file.unlink()
        file.write_text("\n".join([*lines[:at], text, *lines[at + 1 :]]) + "\n" if lines else text, encoding="utf-8")


def _keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []


SHARES = st.floats(0, 1, exclude_max=True)
EXCHANGES = st.builds(
    Exchange,
    st.lists(SHARES, min_size=1, max_size=4).map(tuple),
    st.sampled_from(
        [None, True, -1, 0, 1.5, 10**400, float("nan"), "", "x", "a\nb", [], [1], {}, {"a": {}}, {"x": "y"}]
    ),
    st.booleans(),
)
