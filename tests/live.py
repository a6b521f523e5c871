"""Memory by count: the most bytes that tensors hold at one time, the same number on every machine.

With `shapes_only` nothing is computed or allocated, so that a full-size network takes seconds.
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
    """Follows the storages of what operators return, but for packed weights."""

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
    """Within it networks are made and called without numbers. Real tensors may go in as well."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def peak(call: Callable[[], object]) -> int:
    """Bytes beyond what there was before, at the most, while it is called."""
    with _Live() as live:
        call()
    return live.peak
