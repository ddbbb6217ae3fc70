"""How much memory a forward pass takes, counted tensor by tensor."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors that operations under it allocate and that are alive at the same time.

    The same on every machine, unlike the resident memory of a process that others share. Scratch space inside one
    operation is not seen.

    Attributes:
        bytes: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {_storage(t)._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor) and _storage(tensor)._cdata not in given | self._known:
                self._track(_storage(tensor))
        return output

    def _track(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage._cdata)
        self._alive += storage.nbytes()
        self.bytes = max(self.bytes, self._alive)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, storage_id: int, size: int) -> None:
        self._known.discard(storage_id)
        self._alive -= size


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    """The memory behind a tensor; views share it."""
    return tensor.untyped_storage()
