"""Layers whose frozen weights lie in another order, or are transformed, for the CPU: the same maps, forward and back.

oneDNN reorders the weights of each layer once. The gradient by a linear layer's input is a linear layer with the
weights transposed, and that by a convolution's input is a convolution with the weights flipped in both axes and their
channels exchanged. Of 3x3 convolutions in float32, large grids take fewer multiplications instead (winograd.py).
"""

from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import winograd

ONEDNN = torch.backends.mkldnn.is_available()
_ONES = [1, 1]


class Packed(nn.Module):
    """A linear map, plus a bias, whose frozen weights oneDNN holds in its own order from the first call on.

    `weight` is then an opaque tensor of the same shape, and `dense()` its numbers. Packing waits for the first call, so
    that loading stays a memory map. It is torch's own layer where the weights are not frozen, not for oneDNN, or others
    than those it was made with. To train a network that has run, load it again: its parameters are opaque tensors.

    A compiler that traces it sees an operator, which finds the layer by its number: its graphs hold no weights. There
    the weights have to be frozen.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.train(layer.training)
        self.derived: dict[str, Tensor] = {}  # other forms of the weights, each from its first use on
        self.number: int | None = None
        self._known()

    def forward(self, x: Tensor) -> Tensor:
        """What torch's layer returns; convolutions in channels_last."""
        if self.number is not None and torch.compiler.is_compiling() and x.device.type == "cpu":
            # a view, since the compiler takes the argument of torch.func.grad itself for a constant without a gradient
            return _Numbered.apply(x.view_as(x), self.number)
        weight, bias = self.weight, self.bias
        own = weight is self.made_with[0] and bias is self.made_with[1]
        if not own or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
            self._unpack()
            return self.plain(x)
        if weight.is_mkldnn and not torch.is_grad_enabled():  # the short way: small networks feel each microsecond
            return self.run(x, bias)
        if not self._may_pack():
            self._unpack()
            return self.plain(x)
        return _Apply.apply(x, self, None, bias)

    def plain(self, x: Tensor) -> Tensor:
        """torch's own layer."""
        raise NotImplementedError

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The packed layer, without a graph; called with plain tensors, whatever transforms the caller uses."""
        raise NotImplementedError

    def run_back(self, grad: Tensor, size: torch.Size) -> Tensor:
        """The gradient by an input of that size, from the one by the output, without a graph."""
        raise NotImplementedError

    def plain_back(self, grad: Tensor, size: torch.Size) -> Tensor:
        """The same by torch."""
        raise NotImplementedError

    def called(self, x: Tensor, size: torch.Size | None) -> Tensor:
        """From a graph: the layer; with a size its gradient by an input of that size."""
        if self.weight is not self.made_with[0]:
            self._unpack()
            self._known()
        if x.dtype != self.weight.dtype or not self._is_frozen():
            state = "frozen" if self._is_frozen() else "trained"
            raise RuntimeError(
                f"a compiled layer got {x.dtype}, and its weights are {self.weight.dtype} and {state}; it takes the "
                "dtype of frozen weights: use no autocast, and train what is loaded without compile=True"
            )
        if _packs(x.dtype):
            return self.run(x, self.bias) if size is None else self.run_back(x, size)
        return self.laid_out(self.plain(x) if size is None else self.plain_back(x, size))

    def out_size(self, size: torch.Size) -> list[int]:
        """Of what `plain` returns for an input of that size."""
        raise NotImplementedError

    def laid_out(self, y: Tensor) -> Tensor:
        """A result as it lies in memory where it comes from packed weights."""
        return y.contiguous()

    def take_number(self, number: int) -> None:
        """Be an operator in graphs from now on. Numbers that are alike in each process let them share a cache."""
        self.number = number
        _numbered[number] = self

    def dense(self) -> Tensor:
        """The weights as numbers."""
        weight = self.weight.detach()
        return weight.to_dense() if weight.is_mkldnn else weight

    def _may_pack(self) -> bool:
        if not self._is_frozen() or torch.compiler.is_compiling():
            return False
        return self.weight.device.type == "cpu" and _packs(self.weight.dtype)

    def _is_frozen(self) -> bool:
        return not (self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad))

    def _known(self) -> None:
        """functional_call, and whoever merges a LoRA, puts other tensors in their place."""
        self.made_with = (self.weight, self.bias)

    def _keep(self, packed: Tensor) -> None:
        self.weight = nn.Parameter(packed, requires_grad=False)
        self._known()

    def _derive(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        if name not in self.derived:
            self.derived[name] = make()
        return self.derived[name]

    def _unpack(self) -> None:
        if self.weight.is_mkldnn:
            self.weight = nn.Parameter(self.dense(), requires_grad=self.weight.requires_grad)
            self._known()
        self.derived = {}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Packed":
        """Of Module.to and its kin."""
        self._unpack()
        super()._apply(fn, recurse)
        self._known()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.is_mkldnn:
            destination[f"{prefix}weight"] = self.dense()

    def _load_from_state_dict(self, *args: Any) -> None:
        self._unpack()
        super()._load_from_state_dict(*args)
        self._known()

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which torch cannot make of opaque tensors."""
        weight = nn.Parameter(self.dense(), self.weight.requires_grad)
        parameters = {**self._parameters, "weight": weight}
        return {
            **self.__dict__,
            "_parameters": parameters,
            "made_with": (weight, self.bias),
            "derived": {},
            "number": None,
        }


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels for it on this CPU; asked, it raises where torch's own layers go another way."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedLinear(Packed):
    """nn.Linear, packed."""

    def plain(self, x: Tensor) -> Tensor:
        """[...,C] -> [...,C']."""
        return F.linear(x, self.weight, self.bias)

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not self.weight.is_mkldnn:
            self._keep(_pack_linear(self.weight.detach(), x))
        return _linear(x, self.weight, bias)

    def out_size(self, size: torch.Size) -> list[int]:
        return [*size[:-1], len(self.weight)]

    def run_back(self, grad: Tensor, size: torch.Size) -> Tensor:
        turned = self._derive("turned", lambda: _pack_linear(self.dense().T.contiguous(), grad))
        return _linear(grad, turned, None)

    def plain_back(self, grad: Tensor, size: torch.Size) -> Tensor:
        return grad @ self.dense()


class PackedConv2d(Packed):
    """nn.Conv2d, packed."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv)
        self.stride, self.padding = ([int(n) for n in value] for value in (conv.stride, conv.padding))

    def plain(self, x: Tensor) -> Tensor:
        """[B,C,h,w] -> [B,C',h',w']."""
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if _is_tiled(x, self.weight, self.stride, self.padding):
            return winograd.convolve(x, self._tiled("tiled", x, self.dense), bias, _linear)
        if not self.weight.is_mkldnn:
            self._keep(_pack_conv(self.weight.detach(), self.padding, self.stride, x))
        return _conv(x, self.weight, bias, self.padding, self.stride)

    def out_size(self, size: torch.Size) -> list[int]:
        each = zip(size[2:], self.padding, self.weight.shape[2:], self.stride, strict=True)
        return [size[0], len(self.weight), *((n + 2 * p - k) // s + 1 for n, p, k, s in each)]

    def laid_out(self, y: Tensor) -> Tensor:
        return y.contiguous(memory_format=torch.channels_last)

    def run_back(self, grad: Tensor, size: torch.Size) -> Tensor:
        if _is_tiled(grad, self.weight, self.stride, self.padding):
            tiled = self._tiled("turned, tiled", grad, lambda: _turned(self.dense()))
            return winograd.convolve(grad, tiled, None, _linear)
        spread, padding = _spread(grad, size, self.weight.shape[2:], self.stride, self.padding)
        turned = self._derive("turned", lambda: _pack_conv(_turned(self.dense()), padding, _ONES, spread))
        return _conv(spread, turned, None, padding, _ONES)

    def plain_back(self, grad: Tensor, size: torch.Size) -> Tensor:
        spread, padding = _spread(grad, size, self.weight.shape[2:], self.stride, self.padding)
        return F.conv2d(spread, _turned(self.dense()), None, 1, padding)

    def _tiled(self, name: str, x: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """Weights as winograd.py takes them."""
        if winograd.keeps(x.shape):
            return self._derive(name, lambda: winograd.transform(make()))
        return winograd.transform(make())


class _Apply(torch.autograd.Function):
    """A packed layer and its gradients of any order.

    size: None for the layer; for its gradient the size of the input by which it is taken. Each is the other's gradient,
    but for the bias, since both are linear.
    """

    @staticmethod
    def forward(x: Tensor, layer: Packed, size: torch.Size | None, bias: Tensor | None) -> Tensor:
        return layer.run(x, bias) if size is None else layer.run_back(x, size)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Packed, torch.Size | None, Tensor | None], output: Tensor
    ) -> None:
        x, ctx.layer, ctx.own, _ = inputs
        ctx.size = x.shape if ctx.own is None else None

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Apply.apply(grad, ctx.layer, ctx.size, None), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _Apply.apply(tangent, ctx.layer, ctx.own, None)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        layer: Packed,
        size: torch.Size | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, int]:
        dim = in_dims[0]
        assert dim is not None  # weights and bias, which alone may be batched otherwise, are the layer's own
        out = _Apply.apply(x.movedim(dim, 0).flatten(0, 1), layer, size, bias)
        return out.unflatten(0, (info.batch_size, -1)), 0


_numbered: WeakValueDictionary[int, Packed] = WeakValueDictionary()


class _Numbered(torch.autograd.Function):
    """A packed layer and its gradient, for a compiler."""

    @staticmethod
    def forward(x: Tensor, number: int) -> Tensor:
        return torch.ops.minidiff.packed_layer(x, number, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        x, ctx.number = inputs
        ctx.size = x.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.ops.minidiff.packed_layer(grad, ctx.number, ctx.size), None


torch.library.define("minidiff::packed_layer", "(Tensor x, int number, SymInt[]? size) -> Tensor")


@torch.library.impl("minidiff::packed_layer", "CPU")
def _packed_layer(x: Tensor, number: int, size: list[int] | None) -> Tensor:
    return _numbered[number].called(x, None if size is None else torch.Size(size))


def _packed_layer_shape(x: Tensor, number: int, size: list[int] | None) -> Tensor:
    layer = _numbered[number]
    return layer.laid_out(x.new_empty(layer.out_size(x.shape) if size is None else size))


torch.library.register_fake("minidiff::packed_layer", _packed_layer_shape)


def _is_tiled(x: Tensor, weight: Tensor, stride: list[int], padding: list[int]) -> bool:
    """Whether winograd.py does this convolution, or its gradient, whose grid and weights are as large."""
    return x.dtype == torch.float32 and stride == padding == _ONES and winograd.pays(x.shape, weight.shape)


def _turned(weight: Tensor) -> Tensor:
    """The weights [C,C',k,k] of the gradient of a convolution whose own are [C',C,k,k]."""
    return weight.flip(2, 3).transpose(0, 1)


def _spread(
    grad: Tensor, size: torch.Size, kernel: torch.Size, stride: list[int], padding: list[int]
) -> tuple[Tensor, list[int]]:
    """What a convolution of stride 1 takes to return the gradient by an input of that size, and its padding."""
    spread = grad
    if stride != _ONES:  # what a stride left out is zero
        edges = (n + 2 * p - k + 1 for n, p, k in zip(size[2:], padding, kernel, strict=True))
        spread = grad.new_zeros(*grad.shape[:2], *edges).contiguous(memory_format=torch.channels_last)
        spread[:, :, :: stride[0], :: stride[1]] = grad
    return spread, [k - 1 - p for k, p in zip(kernel, padding, strict=True)]


# The operators that torch's compiler emits for frozen weights. They are private: a test compares each with torch's own.


def _pack_linear(weight: Tensor, x: Tensor) -> Tensor:
    """Weights in the order that oneDNN wants for inputs such as x; another one serves too, but more slowly."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, x.numel() // x.shape[-1])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _pack_conv(weight: Tensor, padding: list[int], stride: list[int], x: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, _ONES, 1, list(x.shape))


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int], stride: list[int]) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, stride, _ONES, 1, "none", [], "")
