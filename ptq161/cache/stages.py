"""Stages of a run that are found in the store where they were computed before, and computed otherwise.

A stage says what its result depends on (:mod:`ptq161.files.identity`) and how it is computed; where that is kept is out
of its sight.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ptq161.cache.store import Store
from ptq161.files.fingerprints import Fingerprint, KeyedFolder, key_of


@dataclasses.dataclass(frozen=True)
class Stages:
    """The store as the stages of a run see it.

    Attributes:
        store: None (``cache=false``) keeps nothing, and everything is computed.
    """

    store: Store | None

    def value(self, kind: str, fingerprint: Fingerprint, compute: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return JSON values that were computed before from the same, or compute them."""
        return compute() if self.store is None else self.store.remember(kind, fingerprint, compute)

    def tensor(self, kind: str, fingerprint: Fingerprint, compute: Callable[[], Tensor]) -> Tensor:
        """Return a tensor that was computed before from the same, or compute it."""
        if self.store is None:
            return compute()
        with self.store.entry(kind, fingerprint) as entry:
            if entry.finished:
                try:
                    return safetensors.torch.load((entry.folder / "tensor.safetensors").read_bytes())["tensor"]
                except (OSError, SafetensorError, KeyError) as error:
                    entry.restart_damaged(error)
            tensor = compute()
            entry.write("tensor.safetensors", safetensors.torch.save({"tensor": tensor}))
            entry.finish()
        return tensor

    @contextlib.contextmanager
    def folder(self, kind: str, fingerprint: Fingerprint) -> Iterator[KeyedFolder | None]:
        """Lend a folder to a stage that keeps its state there; it is finished when the stage ends well.

        A stage that was cut off finds its files again, and so does one that was finished.
        """
        if self.store is None:
            yield None
            return
        with self.store.entry(kind, fingerprint) as entry:
            yield KeyedFolder(entry.folder, key_of(fingerprint))
            if not entry.finished:
                entry.finish()
