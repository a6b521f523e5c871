"""The best of several start noises, by how far guidance got in the first steps of each: successive halving."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from .guidance.report import Report
    from .run import Run

STRIDE = 10_000
"""From the seed of one try to the next: more than a batch holds, so that its images try different noises."""
Seeds: TypeAlias = "tuple[int, ...]"


def nth_seeds(seeds: Seeds, n: int) -> Seeds:
    """The seeds of try n; those given for n = 0."""
    return tuple((seed + n * STRIDE) % 2**64 for seed in seeds)


def best_run(run_of: Callable[[Seeds], Run], seeds: Seeds, tries: int) -> Run:
    """The run of each image's best seed. It goes on where its try stopped, unless images differ in their best one."""
    before = time.perf_counter()
    tried = [nth_seeds(seeds, n) for n in range(tries)]
    runs = [run_of(own) for own in tried]
    best = _chosen(runs, len(seeds))
    found = runs[best[0]] if len(set(best)) == 1 else run_of(tuple(tried[n][i] for i, n in enumerate(best)))
    passes = sum(run.passes for run in runs if run is not found)
    found.was_best({"of": tries, "passes": passes}, time.perf_counter() - before)
    return found


def _chosen(runs: Sequence[Run], images: int) -> Sequence[int]:
    """Each image's best run: all take a step, the better half of them another one, until one is left; the first one of
    equal ones. Successive halving (Jamieson and Talwalkar 2016).
    """
    left, steps = [list(range(len(runs)))] * images, 0
    while len(left[0]) > 1:
        steps += 1
        hopes = {}
        for n in sorted(set().union(*left)):
            runs[n].ahead(steps)
            hopes[n] = [promise(report) for report in runs[n].reports() or [None] * images]
        left = [sorted(own, key=lambda n: -hopes[n][i])[: (len(own) + 1) // 2] for i, own in enumerate(left)]
    return [own[0] for own in left]


def promise(report: Report | None) -> float:
    """How likely all objects are to come out in their boxes; where nothing says so, minus the last loss."""
    placed = None if report is None else report.placed
    if placed is not None and len(placed) and not placed.isnan().any():
        return float(placed.prod())
    loss = math.nan if report is None or not len(report.loss) else -float(report.loss[-1])
    return -math.inf if math.isnan(loss) else loss
