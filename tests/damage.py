"""Damage to files, drawn by hypothesis: bytes flipped, cut, appended, and the content of another file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

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
