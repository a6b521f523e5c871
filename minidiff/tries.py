"""The best of several start noises, by what guidance sees in them before it moves anything."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from .guidance.guide import Guide
from .sampling import Schedule

STRIDE = 10_000
"""From the seed of one try to the next: more than a batch holds, so that its images try different noises."""
Seeds: TypeAlias = "tuple[int, ...]"


def nth_seeds(seeds: Seeds, n: int) -> Seeds:
    """The seeds of try n; those given for n = 0."""
    return tuple((seed + n * STRIDE) % 2**64 for seed in seeds)


def best_seeds(seeds: Seeds, tries: int, start: Callable[[Seeds], Tensor], guide: Guide, schedule: Schedule) -> Seeds:
    """Each image's seed among those of its tries whose loss is the least, the first of equal ones.

    start: seeds -> the latents of unit variance [B,4,h,w] where the run would begin. Each try is one forward pass of
    the conditional texts, to the last site that guidance reads, and none back.
    """
    losses = [_first_loss(start(nth_seeds(seeds, n)), guide, schedule) for n in range(tries)]
    best = [min(range(tries), key=lambda n: losses[n][i]) for i in range(len(seeds))]
    return tuple(nth_seeds(seeds, n)[i] for i, n in enumerate(best))


def _first_loss(latents: Tensor, guide: Guide, schedule: Schedule) -> list[float]:
    """Each image's loss at the run's first step; infinite for NaN."""
    size, t = first_step(schedule, latents.device)
    nothing = torch.full((len(latents),), math.inf, device="cpu")  # no loss is above it: no pass back
    _, found = guide.look(latents * size, t, schedule.abar(0), range(len(latents)), 0, nothing)
    loss: list[float] = found[0].nan_to_num(math.inf).tolist()
    return loss


def first_step(schedule: Schedule, device: torch.device) -> tuple[float, Tensor]:
    """What latents of unit variance are multiplied by for the network's first call, and its time []."""
    growth = math.sqrt(1 + float(schedule.sigmas[0]) ** 2) if schedule.space == "ve" else 1.0
    t = torch.full((), float(schedule.timesteps[0]), dtype=torch.float32, device=device)
    return schedule.init_scale / growth, t
