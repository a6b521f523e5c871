"""Packed layers as a torch operator, which compiled graphs call by layer number, so that they hold no weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

if TYPE_CHECKING:
    from .packed import Packed

numbered: WeakValueDictionary[int, Packed] = WeakValueDictionary()


torch.library.define(
    "minidiff::packed_layer", "(Tensor x, int number, str part, SymInt[] size, bool channels_last) -> Tensor"
)
"""A packed layer by its number. part: "all" of it, the "product" without the bias, or its "gradient".

size: that of the result. The compiler must know it without the layer: a process in which the number belongs to a layer
of another size must not reuse this graph.
"""


class _Numbered(_SingleLevelFunction):
    """Its gradient is the same operator. (torch.library.register_autograd does not work with torch.func.)"""

    @staticmethod
    def forward(x: Tensor, number: int, part: str, size: list[int], channels_last: bool) -> Tensor:
        # gradients on, for an outer torch.func.grad around the calling one
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
            return torch.ops.minidiff.packed_layer(x, number, part, size, channels_last)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, str, list[int], bool], output: Tensor) -> None:
        x, ctx.number, ctx.part, _, ctx.channels_last = inputs
        ctx.size = list(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        part = "product" if ctx.part == "gradient" else "gradient"
        back = torch.ops.minidiff.packed_layer(grad, ctx.number, part, ctx.size, ctx.channels_last)
        return back, None, None, None, None


@torch.library.impl("minidiff::packed_layer", "Autograd")
def _differentiable_packed_layer(*args: Any) -> Tensor:
    if not torch.is_grad_enabled():
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.minidiff.packed_layer(*args)
    with enable_single_level_autograd_function():
        return _Numbered.apply(*args)  # type: ignore[attr-defined]  # as in torch.autograd.Function


@torch.library.impl("minidiff::packed_layer", "CPU")
def _packed_layer(x: Tensor, number: int, part: str, size: list[int], channels_last: bool) -> Tensor:
    layer = numbered.get(number)
    if layer is None:
        raise RuntimeError("a compiled graph has lost its network; keep the network as long as its compiled functions")
    return layer.from_graph(x, part, torch.Size(size))


def _packed_layer_shape(x: Tensor, number: int, part: str, size: list[int], channels_last: bool) -> Tensor:
    return laid_out(x.new_empty(size), channels_last)


torch.library.register_fake("minidiff::packed_layer", _packed_layer_shape)


def laid_out(y: Tensor, channels_last: bool) -> Tensor:
    return y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
