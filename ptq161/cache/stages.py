"""The cache of a run's stages: a stage is read from the store if it was computed before, else computed and stored.

A stage passes what its result depends on (:mod:`ptq161.files.identity`) and a function that computes it; it does not
know where results are kept.
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
        store: None (``cache=false``) stores nothing, and everything is computed.
    """

    store: Store | None

    def value(self, kind: str, fingerprint: Fingerprint, compute: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the stored JSON values of a fingerprint, else compute and store them."""
        return compute() if self.store is None else self.store.remember(kind, fingerprint, compute)

    def tensor(self, kind: str, fingerprint: Fingerprint, compute: Callable[[], Tensor]) -> Tensor:
        """Return the stored tensor of a fingerprint, else compute and store it."""
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
        """Give a stage a folder of the store for its state, which is marked as finished when the context succeeds.

        The folder has the files of an earlier computation with the same fingerprint, whether that finished or not.
        """
        if self.store is None:
            yield None
            return
        with self.store.entry(kind, fingerprint) as entry:
            yield KeyedFolder(entry.folder, key_of(fingerprint))
            if not entry.finished:
                entry.finish()
