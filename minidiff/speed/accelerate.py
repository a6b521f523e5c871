"""What makes networks quick: packed layers (packed.py), memory formats, compilers. The networks themselves are plain
torch and stay so.

Weights never change here. So on the CPU convolutions and linear layers are packed, and a compiled graph calls them as
operators.
"""

import ctypes
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .packed import ONEDNN, Packed, pack
from .strips import by_strips

T = TypeVar("T")
Network = TypeVar("Network", bound=nn.Module)
_LARGE = 2**16
"""Numbers in a layer that is packed: of smaller ones the detour through Python costs what the packing saves."""
_GRAPHS = 2**12
"""Graphs of one function, all networks together."""
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_compiled = itertools.count()


def prepare(network: Network) -> Network:
    """The same network, quicker without a compiler: on the CPU with packed layers, elsewhere in channels_last.

    It gives the same numbers up to rounding, has the same state dict, and may be moved, converted and copied as before.
    """
    device = next(network.parameters()).device
    by_strips(network)
    if device.type != "cpu" or not ONEDNN:
        return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return pack(network, _LARGE)


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


def compile_unet(unet: Network) -> Network:
    """The same UNet, its forward compiled on first use: one graph for each kind of record and edit, batch and size.

    On the CPU its layers are packed, and the graphs call them by number. They hold no weights, so they cost no memory,
    and the next process, which numbers its layers alike, finds them in the compiler's cache.
    """
    if next(unet.parameters()).device.type != "cpu" or not ONEDNN:
        return compile_network(unet.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    numbers = free_numbers()
    for layer in pack(unet, 0).modules():
        if isinstance(layer, Packed):
            layer.take_number(next(numbers))
    return compile_network(unet)


def free_numbers() -> Iterator[int]:
    """For the layers of one network. Nothing is taken before the first is asked for."""
    yield from itertools.count(next(_compiled) * 2**16)


def compile_network(network: Network) -> Network:
    """Any network, compiled on first use with the flags that all of minidiff uses."""
    device = next(network.parameters()).device
    network.compile(**_flags(device))
    compiled = network._compiled_call_impl
    network._compiled_call_impl = None if compiled is None else _called(compiled, network, device)
    return network


def is_compiled(network: nn.Module) -> bool:
    """True once compile_network() has been applied."""
    return network._compiled_call_impl is not None  # torch has no public question for it


def compile_whole(function: Callable[..., T], network: nn.Module) -> Callable[..., T]:
    """A function of tensors, and of frozen values that choose its graph, as one graph for each choice and shape.

    It is kept with the network that it runs, and made once.
    """
    kept: dict[Callable[..., T], Callable[..., T]] = network.__dict__.setdefault("_compiled_whole", {})
    if function not in kept:
        device = next(network.parameters()).device
        kept[function] = _called(torch.compile(function, **_flags(device)), network, device)
    return kept[function]


def _flags(device: torch.device) -> dict[str, Any]:
    """fullgraph, since a graph break would hide a cost; dynamic shapes off, since attention and convolutions are chosen
    by shape; on CUDA the graph is captured, so that launching it costs nothing.
    """
    flags: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    return flags | ({"mode": "reduce-overhead"} if device.type == "cuda" else {})


def _called(call: Callable[..., T], network: nn.Module, device: torch.device) -> Callable[..., T]:
    """A compiled function with room for many graphs: each size, batch, record and strength of an edit has its own, and
    the compiler would give up at the ninth. Callers with and without torch.no_grad share a graph where there is nothing
    to be differentiated. On CUDA it returns copies: the next run of a captured graph writes over it.
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
