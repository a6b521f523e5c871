"""What makes networks fast: packed layers (packed.py), memory formats, compilers. The networks themselves are plain
torch.

Weights are frozen. So on the CPU convolutions and linear layers are packed, and compiled graphs call them as operators.
"""

import ctypes
import itertools
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..networks.unet import UNet
from ..networks.vae import VAE
from .capture import capture_calls, captured
from .fused import fuse
from .packed import ONEDNN, Packed, PackedConv2d, pack, transformed
from .strips import by_strips
from .text_linear import keep_texts

T = TypeVar("T")
Network = TypeVar("Network", bound=nn.Module)
_LARGE = 2**16
"""Weights from which a layer is packed; in smaller layers the Python overhead exceeds the gain."""
_HALVED = 2**22
"""Cells times numbers of emb (4 for each channel) from which it is asked whether the halves of a batch are the same."""
_RESUMED = 2**20
"""The same, from which a pass that a record ended goes on: of SD 1.5 from 256x256 pixels."""
_GRAPHS = 2**12
"""Limit on the graphs of one function, over all networks."""
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from malloc.h
_compiled = itertools.count()


def prepare(network: Network) -> Network:
    """Speed up a network without a compiler: packed layers on the CPU, channels_last elsewhere.

    Results agree up to rounding, the state dict is the same, and it can be moved, converted and copied as before.
    """
    device = next(network.parameters()).device
    by_strips(network)
    if device.type != "cpu" or not ONEDNN:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return fuse(network) if device.type == "cuda" else network
    pack(network, _LARGE)
    for layer in network.modules() if isinstance(network, VAE) else ():
        if isinstance(layer, PackedConv2d):
            layer.keeps = False
    return network


def prepare_unet(unet: Network) -> Network:
    """The same for a UNet, whose calls on a card are captured as graphs."""
    if next(unet.parameters()).device.type == "cuda":
        return capture_calls(prepare(unet))
    setattr(unet, "distinct", distinct)  # noqa: B010  # a function of the instance is no method
    return keep_texts(prepare(unet))


def distinct(x: Tensor, emb: Tensor) -> int:
    """The rows of latents [B,C,h,w] and emb [B,C'] to compute: half, if the others are the same and large enough.

    Not with gradients, which would all be the first half's.
    """
    half = len(x) // 2
    if x[0, 0].numel() * emb.shape[1] < _HALVED or torch.is_grad_enabled() or transformed():
        return len(x)
    same = len(x) % 2 == 0 and all(torch.equal(one[:half], one[half:]) for one in (x, emb))
    return half if same else len(x)


class Looks(NamedTuple, Generic[T]):
    """How guidance looks through a UNet.

    loss: its function, compiled where the network is. whole: whether a batch must keep its size. run: what runs the
    function and its gradient as captured graphs. resumes: whether a step shall go on with a look that moved nothing.
    """

    loss: Callable[..., T]
    whole: bool
    run: Callable[..., Generator[Any]] | None
    resumes: bool


def looks_of(unet: UNet, loss: Callable[..., T], cells: int) -> Looks[T]:
    """For latents of so many cells. To go on with passes pays where layers are large; half precision would round
    images of a batch, which stop at different looks, in other ways than single ones.
    """
    if is_compiled(unet):
        return Looks(compile_whole(loss, unet), True, None, False)
    graphs = captured(unet) if unet.distinct is None else None  # which only a UNet on a CPU has
    large = cells * 4 * unet.config.block_out_channels[0] >= _RESUMED
    resumes = large and unet.distinct is not None and unet.conv_in.weight.dtype == torch.float32 and unet.is_plain()
    return Looks(loss, False, None if graphs is None else graphs.run, resumes)


def keep_memory() -> None:
    """Let the C library keep freed memory for reuse, instead of returning large blocks to the system.

    For programs that own the process: it keeps its peak memory. Fresh pages cost 2 to 10 % of a step (Linux zeroes
    each on first touch). No effect if the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        adjust(_M_MMAP_MAX, 0)
        adjust(_M_TRIM_THRESHOLD, 2**31 - 1)


def compile_unet(unet: Network) -> Network:
    """Compile a UNet's forward on first use: one graph per kind of record and edit, batch size and image size.

    On the CPU its layers are packed, and the graphs call them by number. The graphs hold no weights, so they cost no
    memory, and later processes, which assign the same numbers, find them in the compiler's cache.
    """
    return compile_network(number_layers(unet, free_numbers()))


def number_layers(network: Network, numbers: Iterator[int]) -> Network:
    """Prepare a network for graphs: packed, numbered layers on the CPU, channels_last elsewhere."""
    if next(network.parameters()).device.type != "cpu" or not ONEDNN:
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for layer in pack(network, 0).modules():
        if isinstance(layer, Packed) and layer.number is None:
            layer.take_number(next(numbers))
    return network


def free_numbers() -> Iterator[int]:
    """Unused numbers for the layers of one network, reserved when the first is requested."""
    yield from itertools.count(next(_compiled) * 2**16)


def compile_network(network: Network) -> Network:
    """Compile a network on first use, with minidiff's flags."""
    device = next(network.parameters()).device
    network.compile(**_flags(device))
    compiled = network._compiled_call_impl
    network._compiled_call_impl = None if compiled is None else _called(compiled, network, device)
    return network


def is_compiled(network: nn.Module) -> bool:
    """True once compile_network() has been applied."""
    # torch has no public test for it
    return network._compiled_call_impl is not None and captured(network) is None


def compile_whole(function: Callable[..., T], network: nn.Module) -> Callable[..., T]:
    """Compile a function of tensors and of static (frozen) values: one graph per static value and shape.

    The compiled function is created once and cached on the network that it runs.
    """
    kept: dict[Callable[..., T], Callable[..., T]] = network.__dict__.setdefault("_compiled_whole", {})
    if function not in kept:
        device = next(network.parameters()).device
        kept[function] = _called(torch.compile(function, **_flags(device)), network, device)
    return kept[function]


def _flags(device: torch.device) -> dict[str, Any]:
    """fullgraph, since a graph break would hide a cost; no dynamic shapes, since attention and convolution kernels are
    chosen by shape; on CUDA the graph is captured, which removes the launch overhead.
    """
    flags: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    return flags | ({"mode": "reduce-overhead"} if device.type == "cuda" else {})


def _called(call: Callable[..., T], network: nn.Module, device: torch.device) -> Callable[..., T]:
    """A compiled function that may have many graphs: each size, batch, record and strength of an edit has its own, and
    by default the compiler gives up at the ninth. Callers with and without torch.no_grad share a graph if nothing
    requires a gradient. On CUDA it returns copies, since the next run of a captured graph overwrites its outputs.
    """

    def called(*args: Any, **kwargs: Any) -> T:
        from torch._dynamo import config  # here, since importing the compiler takes a second

        recorded = torch.is_grad_enabled() and (
            any(isinstance(one, Tensor) and one.requires_grad for one in tree_leaves((args, kwargs)))
            or any(parameter.requires_grad for parameter in network.parameters())
        )
        limits = config.patch(recompile_limit=_GRAPHS, accumulated_recompile_limit=_GRAPHS)
        with limits, torch.set_grad_enabled(recorded):
            if device.type != "cuda":
                return call(*args, **kwargs)
            torch.compiler.cudagraph_mark_step_begin()
            return tree_map_only(Tensor, Tensor.clone, call(*args, **kwargs))

    return called
