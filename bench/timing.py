"""Comparable timings: variants alternate in one process; medians with spread, and the machine's current speed.

The speed of a shared machine varies by a third within minutes, so only variants of one call to `by_turns` are compared,
and the rate of a matrix product before and after shows how stable it was.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """first: seconds of the first call, including compiling and packing. seconds: those of later calls."""

    name: str
    first: float
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        return min(self.seconds), max(self.seconds)


def by_turns(variants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Time each variant's first call, then `repeats` rounds of one call per variant.

    On CUDA two untimed calls come in between: a graph is captured in the second.
    """
    first = {name: seconds(call) for name, call in variants.items()}
    for call in variants.values():
        for _ in range(2 if torch.cuda.is_available() else 0):
            call()
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, call in variants.items():
            found[name].append(seconds(call))
    return {name: Timing(name, first[name], tuple(values)) for name, values in found.items()}


def seconds(call: Callable[[], object]) -> float:
    """Seconds of one call; on CUDA measured with device events, since calls are asynchronous."""
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def in_a_row(name: str, call: Callable[[], object], count: int, first: float | None = None) -> Timing:
    """Seconds of one call in three rows of `count`, between whose calls a card is not waited for: they overlap as in a
    sampling loop. Without a card one call is timed. first: seconds of the first call, if it was made before.
    """
    first = seconds(call) if first is None else first
    if not torch.cuda.is_available():
        return Timing(name, first, (seconds(call),))
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    found = tuple(seconds(lambda: [call() for _ in range(count)]) / count for _ in range(3))
    return Timing(name, first, found)


def best(call: Callable[[], object], budget: float = 0.5) -> float:
    """Minimum seconds over the calls that fit into `budget` seconds, at least three: for single kernels."""
    call()
    found: list[float] = []
    while len(found) < 3 or sum(found) < budget:
        found.append(seconds(call))
    return min(found)


def gemm_rate(dtype: torch.dtype, device: torch.device, edge: int = 2048) -> float:
    """TFLOP/s of a product of two square matrices, i.e. the machine's current speed."""
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    return 2 * edge**3 / best(lambda: a @ b) / 1e12


def print_timing(timing: Timing, base: float | None = None) -> None:
    """Print one line; base: the seconds that the ratio is relative to."""
    low, high = timing.spread
    ratio = "" if base is None else f"  {timing.median / base:5.2f} x"
    print(
        f"{timing.name:<52} {timing.median:8.3f} s ({low:.3f} to {high:.3f}), first call {timing.first:7.2f} s{ratio}",
        flush=True,
    )
