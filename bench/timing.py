"""Seconds that can be compared: variants by turns in one process, medians with their spread, and what the machine gave.

A shared machine drifts by a third within minutes, so only variants of one call to `by_turns` are compared, and the rate
of a matrix product before and after says how steady it was.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """first: seconds of the first call, with what it compiles or packs. seconds: of the calls after it."""

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
    """Each variant's first call, then `repeats` rounds in which every variant has its turn.

    On CUDA two more between them: a graph is captured at the second.
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
    """Of one call; on CUDA between two events of the device, since calls return before they are done."""
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


def best(call: Callable[[], object], budget: float = 0.5) -> float:
    """Seconds of the quickest of the calls that fit into `budget` seconds, three at least: for single kernels."""
    call()
    found: list[float] = []
    while len(found) < 3 or sum(found) < budget:
        found.append(seconds(call))
    return min(found)


def gemm_rate(dtype: torch.dtype, device: torch.device, edge: int = 2048) -> float:
    """TFLOP/s of a product of two square matrices: what the machine gives at the moment."""
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    return 2 * edge**3 / best(lambda: a @ b) / 1e12


def print_timing(timing: Timing, base: float | None = None) -> None:
    """One line; base: the seconds that the ratio is taken of."""
    low, high = timing.spread
    ratio = "" if base is None else f"  {timing.median / base:5.2f} x"
    print(
        f"{timing.name:<52} {timing.median:8.3f} s ({low:.3f} to {high:.3f}), first call {timing.first:7.2f} s{ratio}",
        flush=True,
    )
