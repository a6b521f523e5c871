"""Memory by counting: the peak number of bytes held by tensors, the same on every machine.

With `shapes_only` nothing is computed or allocated, so that a full-size network takes only seconds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Live(TorchDispatchMode):
    """Tracks the storages of operator results, except packed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        known = self.alive.keys() | {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage._cdata not in known:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def _storages(values: object) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and not leaf.is_mkldnn)


def shapes_only() -> FakeTensorMode:
    """In this mode networks are created and called without data. Real tensors are accepted as inputs."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def peak(call: Callable[[], object]) -> int:
    """Peak bytes allocated during the call."""
    with _Live() as live:
        call()
    return live.peak
