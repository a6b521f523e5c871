"""The one room that knows compilers, memory formats and packed weights. The networks are plain torch and stay so.

Weights never change here. So on the CPU each convolution and each linear layer runs on weights that oneDNN has
reordered once, forward and back: the gradient by a linear layer's input is a linear layer with the weights transposed,
and that by a convolution's input is a convolution with the weights flipped in both axes and their channels exchanged.
Of 3x3 convolutions in float32, large grids take fewer multiplications instead (winograd.py), in both directions too.
"""

import ctypes
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from types import FunctionType
from typing import Any, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from . import winograd
from .networks.unet import UNet

T = TypeVar("T")
Network = TypeVar("Network", bound=nn.Module)
_LARGE = 2**16
"""Numbers in a layer that is packed: of smaller ones the detour through Python costs what the packing saves."""
_ONES = [1, 1]
_ONEDNN = torch.backends.mkldnn.is_available()  # here, since the compiler cannot ask
_GRAPHS = 2**12
"""Graphs of one function, all networks together."""
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def prepare(network: Network) -> Network:
    """The same network, quicker without a compiler: on the CPU with packed layers, elsewhere in channels_last.

    It gives the same numbers up to rounding, has the same state dict, and may be moved, converted and copied as before.
    """
    device = next(network.parameters()).device
    if device.type != "cpu" or not _ONEDNN:
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def packed(layer: nn.Module) -> nn.Module | None:
        if type(layer) is nn.Linear and layer.weight.numel() >= _LARGE:
            return PackedLinear(layer)
        return PackedConv2d(layer) if _is_plain(layer) and layer.weight.numel() >= _LARGE else None

    return _replace(network, packed)


def _replace(network: Network, by: Callable[[nn.Module], nn.Module | None]) -> Network:
    """The network with some of its layers replaced; None leaves one as it is."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            other = by(child)
            if other is not None:
                setattr(parent, name, other)
    return network


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a convolution of the kind that is replaced: no groups, no dilation, zeros around."""
    if type(layer) is not nn.Conv2d or isinstance(layer.padding, str):
        return False
    return layer.groups == 1 and layer.padding_mode == "zeros" and layer.dilation == (1, 1)


class Packed(nn.Module):
    """A linear map, plus a bias, whose frozen weights oneDNN holds in its own order from the first call on.

    `weight` is then an opaque tensor of the same shape, and `dense()` its numbers. Packing waits for the first call, so
    that loading stays a memory map. It is torch's own layer where the weights are not frozen, not for oneDNN, or others
    than those it was made with. To train a network that has run, load it again: its parameters are opaque tensors.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.train(layer.training)
        self.derived: dict[str, Tensor] = {}  # other forms of the weights, each from its first use on
        self._known()

    def forward(self, x: Tensor) -> Tensor:
        """What torch's layer returns; convolutions in channels_last."""
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

    def dense(self) -> Tensor:
        """The weights as numbers."""
        weight = self.weight.detach()
        return weight.to_dense() if weight.is_mkldnn else weight

    def _may_pack(self) -> bool:
        weight, bias = self.weight, self.bias
        if weight.requires_grad or (bias is not None and bias.requires_grad) or torch.compiler.is_compiling():
            return False
        return weight.device.type == "cpu" and _packs(weight.dtype)

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
        return {**self.__dict__, "_parameters": parameters, "made_with": (weight, self.bias), "derived": {}}


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

    def run_back(self, grad: Tensor, size: torch.Size) -> Tensor:
        turned = self._derive("turned", lambda: _pack_linear(self.dense().T.contiguous(), grad))
        return _linear(grad, turned, None)


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

    def run_back(self, grad: Tensor, size: torch.Size) -> Tensor:
        if _is_tiled(grad, self.weight, self.stride, self.padding):
            tiled = self._tiled("turned, tiled", grad, lambda: _turned(self.dense()))
            return winograd.convolve(grad, tiled, None, _linear)
        spread, padding = _spread(grad, size, self.weight.shape[2:], self.stride, self.padding)
        turned = self._derive("turned", lambda: _pack_conv(_turned(self.dense()), padding, _ONES, spread))
        return _conv(spread, turned, None, padding, _ONES)

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


def keep_memory() -> None:
    """Let the C library keep what is freed for what comes next, instead of giving large pieces back to the system.

    For a program that has the process to itself: it holds on to its peak. Fresh pages cost 2 to 10 % of a step (Linux
    fills each with zeros at its first touch). Without effect where the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        adjust(_M_MMAP_MAX, 0)
        adjust(_M_TRIM_THRESHOLD, 2**31 - 1)


class CompiledConv2d(nn.Module):
    """nn.Conv2d for a compiler: its gradient by the input is a convolution too, whose weights are constants to pack.

    torch's own gradient is not packed, and compiled in bfloat16 it was half off (torch 2.13, CPU without matrix units).
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding = ([int(n) for n in value] for value in (conv.stride, conv.padding))
        self.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w] -> [B,C',h',w']."""
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        # a view, since the compiler takes the argument of torch.func.grad itself for a constant, and traces no gradient
        return _Convolve.apply(x.view_as(x), self.weight, self.bias, self.stride, self.padding)


class _Convolve(torch.autograd.Function):
    """A convolution with a gradient by its input alone."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]) -> Tensor:
        return _convolve(x, weight, bias, stride, padding)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, list[int], list[int]], output: Tensor
    ) -> None:
        x, weight, _, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(weight)
        ctx.size = x.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (weight,) = ctx.saved_tensors
        spread, padding = _spread(grad, ctx.size, weight.shape[2:], ctx.stride, ctx.padding)
        return _convolve(spread, _turned(weight), None, _ONES, padding), None, None, None, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]) -> Tensor:
    """F.conv2d; where winograd.py does it, as one operator of which the compiler sees no more than the shapes."""
    if _ONEDNN and not torch.is_autocast_enabled("cpu") and _is_tiled(x, weight, stride, padding):
        made = winograd.transform(weight) if winograd.keeps(x.shape) else weight
        return torch.ops.minidiff.tiled_convolution(x, made, bias)
    return F.conv2d(x, weight, bias, stride, padding)


torch.library.define("minidiff::tiled_convolution", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl("minidiff::tiled_convolution", "CPU")
def _tiled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """With the weights [C',C,3,3], or transformed already, [16,C,C']."""
    return winograd.convolve(x, winograd.transform(weight) if weight.dim() == 4 else weight, bias, _linear)


def _tiled_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    channels = weight.shape[0 if weight.dim() == 4 else 2]
    return x.new_empty(len(x), channels, *x.shape[2:]).contiguous(memory_format=torch.channels_last)


torch.library.register_fake("minidiff::tiled_convolution", _tiled_shape)


def compile_unet(unet: UNet) -> UNet:
    """The same UNet, its forward compiled on first use: one graph for each kind of record and edit, batch and size.

    On the CPU the weights become constants of each graph: a change after its first use is not seen.
    """
    if unet.conv_in.weight.device.type == "cpu":
        _replace(unet, lambda layer: CompiledConv2d(layer) if _is_plain(layer) else None)
    return compile_network(unet)


def compile_network(network: Network) -> Network:
    """Any network, compiled on first use with the flags that all of minidiff uses."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    device = next(network.parameters()).device
    network.compile(**_flags(device))
    compiled = network._compiled_call_impl
    network._compiled_call_impl = None if compiled is None else _called(compiled, device)
    return network


def is_compiled(network: nn.Module) -> bool:
    """Whether `compile_network` had it."""
    return network._compiled_call_impl is not None  # torch has no public question for it


def compile_whole(function: Callable[..., T], network: nn.Module) -> Callable[..., T]:
    """A function of tensors, and of frozen values that choose its graph, as one graph for each choice and shape.

    It is kept with the network that it runs, and made once: the compiler knows graphs by their code alone, and does not
    ask whose weights are the constants of one.
    """
    kept: dict[Callable[..., T], Callable[..., T]] = network.__dict__.setdefault("_compiled_whole", {})
    if function not in kept:
        assert isinstance(function, FunctionType)
        own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        device = next(network.parameters()).device
        kept[function] = _called(torch.compile(own, **_flags(device)), device)
    return kept[function]


def _flags(device: torch.device) -> dict[str, Any]:
    """fullgraph, since a graph break would hide a cost; dynamic shapes off, since attention and convolutions are chosen
    by shape; on CUDA the graph is captured, so that launching it costs nothing.
    """
    flags: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    return flags | ({"mode": "reduce-overhead"} if device.type == "cuda" else {})


def _called(call: Callable[..., T], device: torch.device) -> Callable[..., T]:
    """A compiled function as it has to be called.

    On the CPU with constant weights, which the compiler then packs: it asks for that when it traces, so an option of
    torch.compile comes too late, and within torch.func.grad it has to be told twice. On CUDA with copies of what a
    captured graph returns: its next run writes over it.
    """
    if device.type == "cuda":

        def owned(*args: Any, **kwargs: Any) -> T:
            torch.compiler.cudagraph_mark_step_begin()
            with _many_graphs():
                return tree_map_only(Tensor, Tensor.clone, call(*args, **kwargs))

        return owned

    def frozen(*args: Any, **kwargs: Any) -> T:
        leaves = tree_leaves((args, kwargs)) if torch.is_grad_enabled() else []
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            with _many_graphs():  # the caller's own gradient: torch makes constants for inference only
                return call(*args, **kwargs)
        from torch._inductor import config as generating  # here, since importing the compiler takes a second

        with torch.no_grad(), generating.patch(freezing=True), _many_graphs(prepare_freezing=True):
            return call(*args, **kwargs)

    return frozen


def _many_graphs(**options: Any) -> AbstractContextManager[object]:
    """Each size, batch, record and strength of an edit has its own graph; the compiler would give up at the ninth."""
    from torch._dynamo import config as tracing

    return tracing.patch(recompile_limit=_GRAPHS, accumulated_recompile_limit=_GRAPHS, **options)
