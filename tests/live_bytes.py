"""Live bytes of tensors while something runs, and their peak: what a device's allocator sees."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, until they die. `peak` is in bytes.

    So too what torch.frombuffer makes of memory of our own, which torch allocates no more than it
    dispatches. What an operator allocates inside itself, and hands to nobody, it does not see.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.where = ""
        self._alive: set[int] = set()

    def __enter__(self) -> LiveBytes:
        """Begin."""
        self._patch = patch.object(torch, "frombuffer", self._frombuffer(torch.frombuffer))
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """End."""
        super().__exit__(*error)
        self._patch.stop()

    def _frombuffer(self, real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def frombuffer(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = real(*args, **kwargs)
            self._count(tensor.untyped_storage(), "frombuffer")
            return tensor

        return frombuffer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and count the storages that come out of it and did not go in."""
        given = {storage._cdata for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage._cdata not in given:
                self._count(storage, str(func))
        return out

    def _count(self, storage: torch.UntypedStorage, where: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        if self.now > self.peak:
            self.peak, self.where = self.now, where
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [v.untyped_storage() for v in tree_iter(values) if isinstance(v, torch.Tensor)]
