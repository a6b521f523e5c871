"""The compiled variants of `bench device`, each in a process of its own: they compile beside each other, then measure
one at a time.
"""

import math
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from threading import BrokenBarrierError
from typing import Any

import torch
from torch import Tensor

from minidiff.networks.attention import HEAD_MEAN, Record
from minidiff.networks.sites import block, choose, cross, place

from .guided import COMPILED, PUBLISHED
from .networks import (
    ALIKE,
    DTYPES,
    SIZES,
    Inputs,
    compiled_unet,
    guided_pass,
    layout_guide,
    our_unet,
    their_compiled_unet,
    unet_weights,
)
from .reference import relative_error
from .table import RELATIVE, Row
from .throughput import OURS_COMPILED, RECORDED, THEIRS_COMPILED, ours, streamed, theirs
from .timing import Timing, in_a_row

CASES = (OURS_COMPILED, THEIRS_COMPILED, COMPILED + ", guided", RECORDED)
GUIDED = CASES[2]
BOUNDS = ((OURS_COMPILED, THEIRS_COMPILED, 1.0), (RECORDED, OURS_COMPILED, 1.03))
RECORD_MS = 10.0
"""Of a step for one image on an H100: stable-fast publishes 9.6."""
STEPS = 20
TFLOP = 1.607
"""Of a step at SD 1.5's size, 64x64 latents, with classifier-free guidance, counted."""


class Compiled:
    """Processes that compile and measure the cases while the block runs; those that are left at its end are ended."""

    def __init__(self, size: str, dtype: str, edge: int, images: int, wanted: bool) -> None:
        self.dtype, self.images, self.full = dtype, images, size == "full"
        context = multiprocessing.get_context("spawn")
        # kept here: they are gone for the processes, too, once nothing refers to them
        self.barrier, self.lock = context.Barrier(len(CASES)), context.Lock()
        self.running: dict[str, tuple[Any, Connection]] = {}
        self.caches = tempfile.TemporaryDirectory()  # the usual one may hold what a cut run half wrote
        for number, name in enumerate(CASES if wanted else ()):
            here, there = context.Pipe(duplex=False)
            cache = os.path.join(self.caches.name, str(number))
            process = context.Process(
                target=_case, args=(name, size, dtype, edge, images, self.barrier, self.lock, there, cache)
            )
            self.running[name] = process, here

    def __enter__(self) -> "Compiled":
        for process, _ in self.running.values():
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process, _ in self.running.values():
            process.terminate()
            process.join()
        self.caches.cleanup()

    def rows(self, seconds: float, rate: float, timings: dict[str, dict[str, Timing]]) -> Iterator[Row]:
        """The rows of those that end within `seconds`, and OUT for others. timings: of the stages so far, where theirs
        are added. rate: TFLOP/s of a matrix product.
        """
        until, where = time.perf_counter() + seconds, f"{self.dtype}, {self.images}"
        found: dict[str, float] = {}
        for name, (process, pipe) in self.running.items():
            if not pipe.poll(max(0.0, until - time.perf_counter())):
                yield Row(name, where, math.nan, 0.0, RELATIVE, "not finished")
                continue
            try:
                timing, apart, graphs, skipped = pipe.recv()
            except EOFError:
                process.join()
                yield Row(name, where, math.nan, 0.0, RELATIVE, f"exit code {process.exitcode}")
                continue
            found[name] = timing.median
            timings.setdefault(f"compiled, {where}", {})[name] = timing
            yield Row(f"{name}: result", where, apart, ALIKE[self.dtype], note=f"first call {timing.first:.0f} s")
            yield Row(f"{name}: compiled anew", f"{STEPS} steps", graphs, 0.0, RELATIVE)
            yield Row(f"{name}: not captured", where, skipped, 0.0, RELATIVE)
            most = RECORD_MS if name == OURS_COMPILED and self.images == 1 else math.inf
            yield Row(f"{name}: a call", where, timing.median * 1e3, most, "ms")
        yield from self._bounds(found, where, rate, timings)

    def _bounds(
        self, found: Mapping[str, float], where: str, rate: float, timings: Mapping[str, Mapping[str, Timing]]
    ) -> Iterator[Row]:
        for name, other, bound in BOUNDS:
            if name in found and other in found:
                note = f"{found[name] * 1e3:.2f} ms and {found[other] * 1e3:.2f} ms"
                yield Row(f"{name} / {other}", where, found[name] / found[other], bound, "of its seconds", note)
        own = found.get(OURS_COMPILED)
        if self.full and own is not None:
            yield floor_row(OURS_COMPILED, where, own, self.images, rate)
        published = timings.get(f"guided, {self.dtype}", {}).get(PUBLISHED)
        if published is not None and GUIDED in found:
            ratio = found[GUIDED] / published.median
            yield Row(GUIDED, where, ratio, 0.25, "of the published way's seconds", f"{found[GUIDED] * 1e3:.2f} ms")


def floor_row(part: str, where: str, seconds: float, images: int, rate: float) -> Row:
    """A step's seconds against those of its arithmetic at a matrix product's rate, TFLOP/s; bound for 16 images."""
    least = TFLOP * images / rate
    bound = 2.0 if images == 16 else math.inf
    return Row(part, where, seconds / least, bound, "of the products' own seconds", f"{least * 1e3:.2f} ms")


def _case(
    name: str, size: str, dtype: str, edge: int, images: int, barrier: Any, lock: Any, pipe: Connection, cache: str
) -> None:
    """Compile, wait for the others, measure alone; send (timing, error, graphs added, graphs skipped). cache: a folder
    for what the compiler writes.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    warnings.simplefilter("ignore")
    torch.set_num_threads(min(4, os.cpu_count() or 1))
    from torch._dynamo.utils import counters

    try:
        call, expected, inputs = _calls(name, size, dtype, edge, images)
        before = time.perf_counter()
        apart = relative_error(call().float().cpu(), expected.float().cpu())
        first = time.perf_counter() - before
        call()
    except BaseException:
        barrier.abort()
        raise
    with suppress(BrokenBarrierError):  # another failed; its row says so
        barrier.wait()
    with lock:
        graphs = counters["stats"]["unique_graphs"]
        for step in range(STEPS if torch.cuda.is_available() else 2):  # the timestep is a tensor that changes
            inputs.t.fill_(981.0 - 50 * step)
            call()
        anew = counters["stats"]["unique_graphs"] - graphs
        timing = in_a_row(name, call, 48 // images + 1, first)
    skipped = counters["inductor"]["cudagraph_skips"] if torch.cuda.is_available() else 0
    pipe.send((timing, apart, anew, skipped))


def _calls(name: str, size: str, dtype: str, edge: int, images: int) -> tuple[Callable[[], Tensor], Tensor, Inputs]:
    """A case's call, what it should return, and its inputs."""
    weights = unet_weights(SIZES[size], DTYPES[dtype])
    inputs = Inputs.random(SIZES[size], DTYPES[dtype], images if name == GUIDED else 2 * images, edge, edge)
    plain = our_unet(SIZES[size], {key: value.clone() for key, value in weights.items()})
    if name == GUIDED:
        expected = guided_pass(layout_guide(plain, inputs), inputs)()[0]
        unet = compiled_unet(SIZES[size], weights)
        look = guided_pass(layout_guide(unet, inputs), inputs)
        return lambda: look()[0], expected, inputs
    expected = ours(plain, inputs)()
    if name == THEIRS_COMPILED:
        return theirs(their_compiled_unet(SIZES[size], weights), inputs), expected, inputs
    unet = compiled_unet(SIZES[size], weights)
    if name == RECORDED:
        sites = choose(cross & (place("mid") | block("up", 1)), unet.positions(edge, edge))
        return streamed(unet, inputs, Record(sites, HEAD_MEAN)), expected, inputs
    return ours(unet, inputs), expected, inputs
