"""What the stages of `bench device` share: what is measured of a call, and the rows made of it."""

import gc
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from minidiff.networks.unet import UNet

from .networks import DTYPES, SIZES, Inputs, Weights
from .reference import relative_error
from .table import Row
from .timing import Timing, in_a_row

CUDA = torch.cuda.is_available()
HALF = ("bfloat16", "float16") if CUDA else ("bfloat16",)  # a CPU emulates float16
IMAGES = (1, 4, 16) if CUDA else (1,)


@dataclass
class Check:
    """What the stages share: size and weights of the networks, and what was measured."""

    size: str
    edge: int
    weights: Weights
    timings: dict[str, dict[str, Timing]] = field(default_factory=dict)
    rate: float = math.nan
    """Of the card's own matrix product in bfloat16, TFLOP/s."""
    gradient: Tensor | None = None
    """Of the published way in float32."""

    def cast(self, dtype: str) -> Weights:
        return {name: value.to(DTYPES[dtype]) for name, value in self.weights.items()}

    def inputs(self, dtype: str, rows: int) -> Inputs:
        return Inputs.random(SIZES[self.size], DTYPES[dtype], rows, self.edge, self.edge)

    def time(self, table: str, name: str, call: Callable[[], object], count: int = 20) -> float:
        """Seconds of a call among `count` in a row."""
        timing = in_a_row(name, call, count)
        self.timings.setdefault(table, {})[name] = timing
        return timing.median


def plain_step(unet: UNet, inputs: Inputs) -> Callable[[], Tensor]:
    """A step without graphs."""

    @torch.no_grad()
    def call() -> Tensor:
        eps, _ = unet.forward(inputs.x, inputs.t, inputs.context)
        assert eps is not None
        return eps

    return call


def same_rows(part: str, where: str, call: Callable[[], Tensor], plain: Callable[[], Tensor]) -> Iterator[Row]:
    """Whether a captured call returns the plain call's bits, as far as the plain call itself does each time."""
    first = plain()
    apart = max(relative_error(plain(), first) for _ in range(3))
    for _ in range(2):  # as it is, then captured
        call()
    note = "" if apart == 0 else "the plain call's own spread"
    yield Row(part, where, relative_error(call(), first), 2 * apart, note=note)


def error_of(found: Tensor, expected: Tensor) -> float:
    return relative_error(found.float().cpu(), expected.float().cpu())


def rms_of(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).square().mean().sqrt())


def ratio_row(part: str, where: str, own: float, other: float, bound: float, of: str) -> Row:
    return Row(part, where, own / other, bound, f"of {of} seconds", f"{own * 1e3:.2f} ms and {other * 1e3:.2f} ms")


def memory_rows(part: str, where: str, call: Callable[[], object], reference: Callable[[], object]) -> Iterator[Row]:
    if CUDA:
        own, other = (extra_bytes(one) for one in (call, reference))
        note = f"{own / 1e6:.0f} MB and {other / 1e6:.0f} MB"
        yield Row(f"{part}: extra memory", where, own / other, 1.0, "of the reference's bytes", note)


def extra_bytes(call: Callable[[], object]) -> int:
    """Peak bytes of a call above what is allocated before it."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def as_graph(call: Callable[[], Tensor]) -> Callable[[], object]:
    """The call as a replayed graph, so that its time is the card's; itself without a card."""
    if not CUDA:
        return call
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def waits_in(call: Callable[[], object]) -> list[str]:
    """Where the host waits for the device in a call: "file:line", once per wait."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in seen if "called a synchronizing" in str(one.message)]
    return [f"{Path(one.filename).name}:{one.lineno}" for one in waits]
