"""Layers whose frozen weights are reordered or transformed for the CPU; same results, forward and backward.

oneDNN reorders the weights of each layer once. The gradient with respect to a linear layer's input is a linear layer
with the weights transposed; for a convolution's input it is a convolution with the weights flipped along both axes and
their channels swapped. 3x3 convolutions of large float32 grids use fewer multiplications instead (winograd.py).
"""

import threading
from collections.abc import Callable
from functools import cache
from typing import Any, TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..networks.norm import is_hooked
from . import winograd
from .operator import laid_out, numbered

T = TypeVar("T")
Network = TypeVar("Network", bound=nn.Module)
ONEDNN = torch.backends.mkldnn.is_available()
_ONES = [1, 1]
_State = tuple[int, int]
_packing = threading.Lock()


class Packed(nn.Module):
    """A linear map with a bias and frozen weights, stored in the CPU's fastest format.

    From the first call on the weights are in oneDNN's own order: `weight` is then an opaque tensor of the same shape,
    and `dense()` returns its values. (If winograd.py does the work, `weight` is unchanged.) Packing is deferred to the
    first call, so that loading stays a memory map. It falls back to torch's own layer when the weights require
    gradients, oneDNN lacks the dtype, or the weights were replaced. To train a network that has run, load it again.

    When traced by a compiler it is an operator that finds the layer by number, so graphs hold no weights. The weights
    must then be frozen and the layer's own: functional_call has no effect inside a compiled function.
    """

    channels_last: bool
    """The memory format of results computed from packed weights."""

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.shape = layer.weight.shape  # for graphs, where using the tensor would make it an input
        self.train(layer.training)
        self.derived: dict[str, tuple[_State, Any]] = {}  # other forms of the weights, made on first use
        self.number: int | None = None
        self._known()

    def forward(self, x: Tensor) -> Tensor:
        """The result of torch's layer; convolutions return channels_last."""
        if self.number is not None and torch.compiler.is_compiling() and x.device.type == "cpu":
            size = self.out_size(x.shape)
            return torch.ops.minidiff.packed_layer(x, self.number, "all", size, self.channels_last)
        weight, bias = self.weight, self.bias
        if not self._fits(x):
            return self.plain(x, self._unpack(), bias)
        if weight.is_mkldnn and not torch.is_grad_enabled() and not transformed():
            return self.run(x, bias)  # fast path: in small networks each microsecond counts
        if not self._may_pack():
            return self.plain(x, self._unpack(), bias)
        return _Apply.apply(x, self, None, bias)

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Torch's own layer."""
        raise NotImplementedError

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The packed layer without autograd; gets plain tensors, whatever transforms the caller uses."""
        raise NotImplementedError

    def run_back(self, grad: Tensor, size: torch.Size) -> Tensor:
        """The gradient with respect to an input of that size, given the output's, without autograd."""
        raise NotImplementedError

    def plain_back(self, grad: Tensor, size: torch.Size) -> Tensor:
        """The same, computed by torch."""
        raise NotImplementedError

    def out_size(self, size: torch.Size) -> list[int]:
        """The size of the result of `plain` for an input of that size."""
        raise NotImplementedError

    def from_graph(self, x: Tensor, part: str, size: torch.Size) -> Tensor:
        """Called by a graph: a part (see operator.py) of the layer, whose result has that size."""
        if self.weight is not self.made_with[0]:
            raise RuntimeError(
                "this compiled layer's weights were replaced. Copy new values in with load_state_dict, make another "
                "network with with_weights, or load without compile=True"
            )
        if x.dtype != self.weight.dtype or not self._is_frozen():
            state = "frozen" if self._is_frozen() else "trained"
            raise RuntimeError(
                f"a compiled layer got {x.dtype}, and its weights are {self.weight.dtype} and {state}; it needs frozen "
                "weights and inputs of their dtype: use no autocast, and load without compile=True for training"
            )
        packs, bias = _packs(x.dtype), self.bias if part == "all" else None
        if part == "gradient":
            found = self.run_back(x, size) if packs else self.plain_back(x, size)
        else:
            found = self.run(x, bias) if packs else self.plain(x, self.weight, bias)
        return laid_out(found, self.channels_last)

    def take_number(self, number: int) -> None:
        """Be an operator in graphs from now on. With the same numbers, processes can share the compiler's cache."""
        if numbered.get(number, self) is not self:
            raise ValueError(f"number is {number}, which another layer has; expected an unused one")
        self.number = number
        numbered[number] = self

    def forget(self) -> None:
        """Detach a copy from its original: drop the derived weights and the number, and accept the current weights."""
        self.derived, self.number = {}, None
        self._known()

    def dense(self) -> Tensor:
        """The weights as a strided tensor."""
        weight = self.weight.detach()
        return weight.to_dense() if weight.is_mkldnn else weight

    def _may_pack(self) -> bool:
        if not self._is_frozen() or torch.compiler.is_compiling():
            return False
        return self.weight.device.type == "cpu" and _packs(self.weight.dtype)

    def _fits(self, x: Tensor) -> bool:
        """Whether the parameters are the layer's own, and x is of their dtype."""
        own = self.weight is self.made_with[0] and self.bias is self.made_with[1]
        return own and x.dtype == self.weight.dtype and not torch.is_autocast_enabled("cpu")

    def _is_frozen(self) -> bool:
        return not (self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad))

    def _known(self) -> None:
        """Note the own parameters; functional_call and code that merges LoRAs replace them."""
        self.made_with = (self.weight, self.bias)

    def _packed(self, pack: Callable[[Tensor], Tensor]) -> Tensor:
        """Pack and return `weight`, opaque from now on."""
        weight = self.weight
        if weight.is_mkldnn:
            return weight
        with _packing:
            if not self.weight.is_mkldnn:
                packed = nn.Parameter(pack(self.weight.detach()), requires_grad=False)
                self.made_with = packed, self.bias  # first: another thread then takes torch's layer once
                self.weight = packed
            return self.weight

    def _derive(self, name: str, make: Callable[[], T]) -> T:
        """Another form of the current weights, or what is derived of them, cached."""
        state = _state(self.weight)
        found = self.derived.get(name)
        if found is None or found[0] != state:
            found = self.derived[name] = state, make()
        return cast(T, found[1])

    def _unpack(self) -> Tensor:
        """Unpack and return `weight`, a strided tensor from now on."""
        self.derived = {}
        weight = self.weight
        if not weight.is_mkldnn:
            return weight
        with _packing:
            if self.weight.is_mkldnn:
                self.weight = nn.Parameter(self.dense(), requires_grad=self.weight.requires_grad)
                self._known()
            return self.weight

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Packed":
        """Called by Module.to() and similar."""
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
        """State for copies: torch cannot copy opaque tensors."""
        weight = nn.Parameter(self.dense(), self.weight.requires_grad)
        parameters = {**self._parameters, "weight": weight}
        return {
            **self.__dict__,
            "_parameters": parameters,
            "made_with": (weight, self.bias),
            "derived": {},
            "number": None,
        }


def _state(weight: Tensor) -> _State:
    """Identifies a tensor's values by version and storage, where it has them."""
    version = 0 if weight.is_inference() else weight._version
    return version, 0 if weight.is_mkldnn else weight.untyped_storage()._cdata


def transformed() -> bool:
    """True if tensors may carry more than their values: a vmap dimension or a tangent."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels for it on this CPU; elsewhere the operators raise, while torch's layers fall back."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedLinear(Packed):
    """nn.Linear, packed."""

    channels_last = False

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[...,C] -> [...,C']."""
        return F.linear(x, weight, bias)

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _linear(x, self._packed(lambda weight: _pack_linear(weight, x)), bias)

    def run_back(self, grad: Tensor, size: torch.Size) -> Tensor:
        turned = self._derive("turned", lambda: _pack_linear(self.dense().T.contiguous(), grad))
        return _linear(grad, turned)

    def plain_back(self, grad: Tensor, size: torch.Size) -> Tensor:
        return grad @ self.dense()

    def out_size(self, size: torch.Size) -> list[int]:
        return [*size[:-1], self.shape[0]]


class PackedConv2d(Packed):
    """nn.Conv2d, packed."""

    channels_last = True
    keeps = True  # transformed weights; not where a layer runs once a picture

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv)
        self.stride, self.padding = ([int(n) for n in value] for value in (conv.stride, conv.padding))

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[B,C,h,w] -> [B,C',h',w']."""
        return F.conv2d(x, weight, bias, self.stride, self.padding)

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        form = self._form(x)
        if form is not None:
            return winograd.convolve(x, self._transformed(x, form), bias, _linear, form)
        weight = self._packed(lambda weight: _pack_conv(weight, self.padding, self.stride, x))
        return _conv(x, weight, bias, self.padding, self.stride)

    def run_back(self, grad: Tensor, size: torch.Size) -> Tensor:
        form = self._form(grad)
        if form is not None:
            return winograd.convolve(grad, self._transformed(grad, form, back=True), None, _linear, form, back=True)
        spread, padding = self._spread(grad, size)
        turned = self._derive("turned", lambda: _pack_conv(_turned(self.dense()), padding, _ONES, spread))
        return _conv(spread, turned, None, padding, _ONES)

    def plain_back(self, grad: Tensor, size: torch.Size) -> Tensor:
        spread, padding = self._spread(grad, size)
        return F.conv2d(spread, _turned(self.dense()), None, 1, padding)

    def out_size(self, size: torch.Size) -> list[int]:
        each = zip(size[2:], self.padding, self.shape[2:], self.stride, strict=True)
        return [size[0], self.shape[0], *((n + 2 * p - k) // s + 1 for n, p, k, s in each)]

    def grow(self, x: Tensor) -> Tensor | None:
        """Nearest-neighbour upsampling by 2, then this layer: [B,C,h,w] -> [B,C',2h,2w]; None if not `grows`."""
        return winograd.convolve(x, self.dense(), self.bias, _linear, winograd.GROWN) if self.grows(x) else None

    def grows(self, x: Tensor) -> bool:
        """Whether `grow` makes no grid of upsampled cells."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or transformed() or is_hooked(self):
            return False  # a graph that reads weights is compiled anew once its first call has packed them
        ready = self._fits(x) and self._may_pack() and not self.weight.is_mkldnn  # unpacking takes what growing saves
        return ready and self._form(x, grown=True) is not None

    def _form(self, x: Tensor, grown: bool = False) -> winograd.Form | None:
        """How winograd.py computes it, or its gradient, whose grid and weights are as large."""
        if x.dtype != torch.float32 or not self.stride == self.padding == _ONES:
            return None
        return winograd.form(x.shape, self.shape, grown)

    def _transformed(self, x: Tensor, form: winograd.Form, back: bool = False) -> Tensor:
        """The weights for winograd.py: transformed where those are kept."""
        name = "turned, transformed" if back else "transformed"
        kept = self.keeps and (name in self.derived or winograd.keeps(x.shape, self.shape))
        if kept:
            return self._derive(name, lambda: winograd.transform(self.dense(), _linear, form, back))
        return self.dense()

    def _spread(self, grad: Tensor, size: torch.Size) -> tuple[Tensor, list[int]]:
        """Input and padding of the stride-1 convolution that computes the gradient for an input of that size."""
        kernel, spread = self.shape[2:], grad
        if self.stride != _ONES:  # zeros at the positions that the stride skipped
            edges = (n + 2 * p - k + 1 for n, p, k in zip(size[2:], self.padding, kernel, strict=True))
            spread = grad.new_zeros(*grad.shape[:2], *edges).contiguous(memory_format=torch.channels_last)
            spread[:, :, :: self.stride[0], :: self.stride[1]] = grad
        return spread, [k - 1 - p for k, p in zip(kernel, self.padding, strict=True)]


class _Apply(torch.autograd.Function):
    """A packed layer and its gradients of any order.

    size: None for the layer; for its gradient, the size of the layer's input. Each is the other's gradient, bias aside,
    since both are linear.
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
        assert dim is not None  # only x can be batched: weights and bias are the layer's own
        out = _Apply.apply(x.movedim(dim, 0).flatten(0, 1), layer, size, bias)
        return out.unflatten(0, (info.batch_size, -1)), 0


def _turned(weight: Tensor) -> Tensor:
    """The weights [C,C',k,k] of the gradient of a convolution with weights [C',C,k,k]."""
    return weight.flip(2, 3).transpose(0, 1)


# The operators that torch's compiler emits for frozen weights. They are private, so a test compares each with torch's.


def _pack_linear(weight: Tensor, x: Tensor) -> Tensor:
    """Weights in oneDNN's order for inputs of x's size; they work for other sizes too, but more slowly."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, x.numel() // x.shape[-1])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _pack_conv(weight: Tensor, padding: list[int], stride: list[int], x: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, _ONES, 1, list(x.shape))


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int], stride: list[int]) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, stride, _ONES, 1, "none", [], "")


# ---- networks


def pack(network: Network, numbers: int) -> Network:
    """Pack, in place, the layers of a network that have at least `numbers` weights."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.numel() >= numbers:
                setattr(parent, name, PackedLinear(child))
            elif is_plain(child) and child.weight.numel() >= numbers:
                setattr(parent, name, PackedConv2d(child))
    return network


def is_plain(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """True for the convolutions that can be packed: no groups, no dilation, zero padding."""
    if type(layer) is not nn.Conv2d or isinstance(layer.padding, str):
        return False
    return layer.groups == 1 and layer.padding_mode == "zeros" and layer.dilation == (1, 1)
