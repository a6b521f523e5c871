"""CUDA graphs without a compiler: a network's calls are captured once, and replayed for new inputs.

A step launches some 650 kernels, and a card runs them faster than one thread launches them. A replayed graph is one
launch of the same kernels, so its results are the same bits as the plain call's without gradients.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Iterator
from contextlib import suppress
from functools import cache
from itertools import chain, islice
from operator import attrgetter
from types import MethodType
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import PyTree, tree_flatten, tree_map_only, tree_unflatten

from ..checks import warn

T = TypeVar("T")
Network = TypeVar("Network", bound=nn.Module)
Stages: TypeAlias = Callable[..., Generator[Any]]
"""A generator function of tensors and static (hashable) values, whose every `yield` ends a part that needs nothing from
the host: each part is a graph. Between two parts the caller may read what the first one yielded.
"""
MOST = 16
"""Graphs kept for one network: each size, batch, record and step's edits has its own. They share their memory."""
_SEEN = 256
"""Kinds of calls remembered that came once."""
_GIVEN_UP = 3
"""How often the card's memory may run out before a network has no more graphs."""
_CAPTURING = threading.Lock()
"""torch captures one graph at a time."""


def capture_calls(network: Network) -> Network:
    """Make a network on a card run as graphs, in place: its own calls, and stages that run it (`captured`)."""
    network._compiled_call_impl = Captured(network)
    return network


def spared(network: nn.Module, call: Callable[..., T], *args: Any) -> T:
    """call(*args), and once more without the graphs of a network where the card has no memory beside them."""
    graphs = captured(network)
    try:
        return call(*args)
    except torch.OutOfMemoryError:
        if graphs is None or not graphs.any_left():
            raise
    graphs.give_up()  # here, where nothing holds what the first call had allocated
    return call(*args)


def captured(network: nn.Module) -> Captured | None:
    """What runs stages of this network as graphs, if anything does."""
    found = network._compiled_call_impl
    return found if isinstance(found, Captured) else None


class Captured:
    """The graphs of one network.

    The first call of a kind runs as it is; the second is captured, so that what is called once costs nothing more.
    What cannot be a graph runs as it is: calls on other devices, for gradients, inside a compiler or another capture,
    of networks with hooks, and functions that wait for the device, of which a warning tells. Graphs keep their memory:
    where it is missing elsewhere they are dropped, and the call that needed it runs again as it is.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = weakref.ref(network)  # no cycle, which would keep a dropped model in the card's memory
        self.graphs: OrderedDict[Hashable, Graph | None] = OrderedDict()
        self.pools: dict[int, Any] = {}
        self.lock = threading.RLock()
        self.watched: tuple[int, Watched | None] = (0, None)
        self.given_up = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's own call, with its hooks."""
        network = self.network()
        assert network is not None  # it is the caller
        (found,) = self.run(_call, network._call_impl, args, kwargs)
        return found

    def run(self, stages: Stages, *args: Any) -> Generator[Any]:
        """Run stages, as graphs where that is possible. What they yield are copies."""
        count = 0
        try:
            for part in self._parts(stages, args):
                yield part
                count += 1
                del part
            return
        except torch.OutOfMemoryError:
            if not self.any_left():
                raise
        self.give_up()  # here, where nothing holds what the first try had allocated
        yield from islice(stages(*args), count, None)

    def any_left(self) -> bool:
        """Whether there are graphs to give up."""
        with self.lock:
            return any(graph is not None and graph.parts for graph in self.graphs.values())

    def give_up(self) -> None:
        """Drop all graphs and free their memory. What cannot be captured stays known."""
        with self.lock:
            if not self.any_left():  # another thread was first
                return
            for key in [key for key, graph in self.graphs.items() if graph is None or graph.parts]:
                del self.graphs[key]
            self.pools.clear()
            self.given_up += 1
        torch.cuda.empty_cache()
        warn("the card's memory ran out beside captured graphs; they were dropped, and calls take longer without")

    def _parts(self, stages: Stages, args: Any) -> Generator[Any]:
        leaves, spec = tree_flatten(args)
        key = self._key(stages, leaves, spec)
        if key is None:
            yield from stages(*args)
            return
        with self.lock:
            if key not in self.graphs or (graph := self._graph(key, stages, leaves, spec)) is None:
                self.graphs.setdefault(key, None)
                self._forget()
                yield from stages(*args)
                return
            for part in graph.replay(leaves):
                yield tree_map_only(Tensor, Tensor.clone, part)

    def _graph(self, key: Hashable, stages: Stages, leaves: list[Any], spec: Any) -> Graph | None:
        """The graph of a call that was made before, captured now if it was not; None if it cannot be."""
        self.graphs.move_to_end(key)
        graph = self.graphs[key]
        if graph is None:
            if not self.any_left():
                self.pools.clear()  # memory that no graph uses any more is gone
            with _CAPTURING:
                graph = capture(stages, leaves, spec, self.pools)
            if graph is None and self.given_up < _GIVEN_UP - 1 and self.any_left():
                self.give_up()  # the next call of this kind tries again
                return None
            if graph is None:
                warn("the card has no memory for a CUDA graph of this call, which takes up to 3 times as long without")
            self.graphs[key] = graph = graph or Graph([], [])
            self._forget()
        return graph if graph.parts else None

    def _forget(self) -> None:
        """Drop the oldest graphs, and the oldest kinds of calls without one."""
        real = [key for key, graph in self.graphs.items() if graph is not None and graph.parts]
        rest = [key for key, graph in self.graphs.items() if graph is None or not graph.parts]
        for key in (*real[:-MOST], *rest[:-_SEEN]):
            del self.graphs[key]

    def _key(self, stages: Stages, leaves: list[Any], spec: Any) -> Hashable | None:
        """What a graph depends on beside the tensors' values; None if there can be none."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        plain = all(type(one) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(one) for one in tensors)
        network, trained = self.network(), torch.is_grad_enabled() and any(one.requires_grad for one in tensors)
        # a compiler, a tracer or a counter of operators would see copies alone
        watched = torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None
        if torch.compiler.is_compiling() or watched or trained or not plain or not _on_card(tensors) or network is None:
            return None
        weights = self._weights(network) if self.given_up < _GIVEN_UP else None
        if weights is None:
            return None
        statics = tuple(_static(leaf, network) for leaf in leaves)
        key = (stages, statics, str(spec), weights, _settings())
        try:
            hash(key)
        except TypeError:
            return None
        return key

    def _weights(self, network: nn.Module) -> Hashable | None:
        """What a graph has frozen of the network; None if a graph would do something else than the network."""
        number, watched = self.watched
        if watched is None or not watched.holds():
            number, watched = self.watched = number + 1, Watched(network)
        found = watched.weights(network)
        return None if found is None else (number, found)


class Graph:
    """Captured parts. Without any, the call cannot be captured."""

    def __init__(self, buffers: list[Any], parts: list[tuple[Any, PyTree]]) -> None:
        self.buffers, self.parts = buffers, parts

    def replay(self, leaves: list[Any]) -> Iterator[PyTree]:
        """What each part returns, in memory that the next replay overwrites."""
        with torch.no_grad():
            for buffer, leaf in zip(self.buffers, leaves, strict=True):
                if isinstance(leaf, Tensor):
                    buffer.copy_(leaf)
        for graph, found in self.parts:
            graph.replay()
            yield found


def capture(stages: Stages, leaves: list[Any], spec: Any, pools: dict[int, Any]) -> Graph | None:
    """Capture stages for inputs of these shapes. A Graph without parts, and a warning, if that is impossible; None if
    the card's memory ran out.

    pools: the memory that a stream's graphs share, since one replays at a time.
    """
    pool = pools.setdefault(torch.cuda.current_stream().cuda_stream, torch.cuda.graph_pool_handle())
    with torch.inference_mode(False), torch.no_grad():
        buffers = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args = tree_unflatten(buffers, spec)
        buffers = [one if isinstance(one, Tensor) else None for one in buffers]
        stream = _stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        parts: list[tuple[Any, PyTree]] = []
        full = False
        try:
            with torch.cuda.stream(stream):
                with _NoWaits():  # a wait during the capture would break more than the capture
                    count = sum(1 for _ in stages(*args))
                torch.cuda.synchronize()
                torch.cuda.empty_cache()  # a capture cannot free what torch keeps for reuse
                torch._C._cuda_clearCublasWorkspaces()  # the graph gets its own, which nobody else frees
                running = stages(*args)
                parts += [_part(running, pool) for _ in range(count)]
                torch._C._cuda_clearCublasWorkspaces()
        except torch.OutOfMemoryError:
            full = True
        except RuntimeError as problem:
            parts = []
            why = str(problem).strip().splitlines()[0]
            warn(f"this call cannot be captured as a CUDA graph, and takes up to 3 times as long without: {why}")
        torch.cuda.current_stream().wait_stream(stream)
    return None if full else Graph(buffers if parts else [], parts)


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """One to capture on for each card, since cuBLAS keeps 32 MB for every stream that it has run on."""
    return torch.cuda.Stream(device)


def _part(running: Iterator[Any], pool: Any) -> tuple[Any, PyTree]:
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool, capture_error_mode="thread_local")
    try:
        found = next(running)
    except BaseException:
        with suppress(RuntimeError):  # of a capture that is no longer valid; the first error says why
            graph.capture_end()
        raise
    graph.capture_end()
    return graph, found


def _call(network: Callable[..., Any], args: Any, kwargs: Any) -> Generator[Any]:
    yield network(*args, **kwargs)


class Watched:
    """The modules of a network, and where they keep what a graph has frozen: read again at each call, without a walk
    over the modules, which takes 1.3 ms for a UNet where this takes 0.3.
    """

    def __init__(self, network: nn.Module) -> None:
        modules = [*network.modules()]
        self.children = [one._modules for one in modules]
        self.tensors: list[Any] = [kept for one in modules for kept in (one._parameters, one._buffers)]
        self.hooks = [
            hooks
            for one in modules
            for hooks in (one._forward_hooks, one._forward_pre_hooks, one._backward_hooks, one._backward_pre_hooks)
        ]
        self.own = [vars(one) for one in modules[1:]]  # the network's own holds its graphs: no cycle
        self.modules = self._modules()

    def _modules(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self.children))]

    def holds(self) -> bool:
        """Whether the network still has these modules."""
        return self.modules == self._modules()

    def weights(self, network: nn.Module) -> tuple[int, ...] | None:
        """Where the weights are. None if a graph would do something else than the network: hooks and replaced forwards
        are called by modules, and trained weights need their gradients.
        """
        if any(self.hooks) or nn.modules.module._has_any_global_hook() or "forward" in vars(network):
            return None
        if any("forward" in own for own in self.own):
            return None
        tensors = [one for one in chain.from_iterable(map(dict.values, self.tensors)) if one is not None]
        return None if any(map(_TRAINED, tensors)) else tuple(map(Tensor.data_ptr, tensors))


_TRAINED = attrgetter("requires_grad")


def _on_card(tensors: list[Tensor]) -> bool:
    """Whether all are on one CUDA device, where nothing is being captured."""
    if not tensors or any(one.device != tensors[0].device for one in tensors) or tensors[0].device.type != "cuda":
        return False
    return tensors[0].device.index == torch.cuda.current_device() and not torch.cuda.is_current_stream_capturing()


def _static(leaf: object, network: nn.Module | None) -> Hashable:
    """A leaf's part of a key. Methods of the network are named, since the key must not keep the network alive."""
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.stride(), leaf.dtype)
    if isinstance(leaf, MethodType) and leaf.__self__ is network:
        return leaf.__func__
    return (type(leaf), leaf)


def _settings() -> Hashable:
    """Settings of torch that choose kernels."""
    found = (_setting(name) for name in _SETTINGS)
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return (torch.cuda.current_stream().cuda_stream, autocast, *found)


def _setting(name: str) -> Hashable:
    """A setting by its name below torch, or what a function there returns; None where this torch has none, or refuses
    to tell since its newer form was set.
    """
    value: Any = torch
    try:
        for part in name.split("."):
            value = getattr(value, part)
        return value() if callable(value) else value
    except (AttributeError, RuntimeError):
        return None


_SETTINGS = (
    "are_deterministic_algorithms_enabled",
    "backends.fp32_precision",
    "backends.cudnn.enabled",
    "backends.cudnn.benchmark",
    "backends.cudnn.deterministic",
    "backends.cudnn.allow_tf32",
    "backends.cudnn.conv.fp32_precision",
    "backends.cuda.matmul.allow_tf32",
    "backends.cuda.matmul.fp32_precision",
    "backends.cuda.matmul.allow_fp16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_bf16_reduced_precision_reduction",
    "backends.cuda.matmul.allow_fp16_accumulation",
    "backends.cuda.preferred_blas_library",
    "backends.cuda.flash_sdp_enabled",
    "backends.cuda.mem_efficient_sdp_enabled",
    "backends.cuda.math_sdp_enabled",
    "backends.cuda.cudnn_sdp_enabled",
)


class _NoWaits(TorchDispatchMode):
    """RuntimeError for operators that wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        masks = func in _CHOICES and _has_mask(args[1])
        moves = (func is _aten._to_copy.default and found.device != args[0].device) or (
            func is _aten.copy_.default and args[0].device != args[1].device
        )
        made = func is _aten.lift_fresh.default and found.is_cuda  # torch.tensor(number, device="cuda")
        if func in _WAITS or masks or moves or made:
            raise RuntimeError(f"{func} waits for the device: a value is read from a tensor, or copied to one")
        return found


def _has_mask(indices: Any) -> bool:
    return any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in indices)


_aten = torch.ops.aten
_CHOICES = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_WAITS = {
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_consecutive.default,
    _aten.equal.default,
    _aten.bincount.default,
    _aten.repeat_interleave.Tensor,
}
