"""The discretisation of one run: what the network is told at each of its calls, and between which levels x steps.

Two spaces appear. In "vp" (variance preserving) x = sqrt(abar) * x0 + sqrt(1 - abar) * eps; in "ve" (variance
exploding) x = x0 + sigma * eps. They differ by a factor: x_ve = x_vp * sqrt(1 + sigma^2), with abar = 1 / (1 +
sigma^2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from minidiff.sampling.noise import Floats, NoiseSchedule


@dataclass(frozen=True, eq=False)
class Schedule:
    """It stays on the CPU: the loop never waits for a GPU to read a number of it.

    timesteps: [calls], what the network is told; int64 or float32, as diffusers has it.
    sigmas: float64 [calls], the actual noise level of x at each call, noise over signal: abar = 1 / (1 + sigma^2).
    spans: for each call the sigmas (from, to) between which the sampler's formula steps; the last `to` is the run's
        end. Mostly (sigmas[i], sigmas[i + 1]); DDIM and PNDM count back T // steps timesteps, as diffusers.
    steps: how many; a sampler may call the network more than once in a step.
    init_scale: what unit-variance latents are multiplied by. space: "vp" or "ve". sampler: the name of what made it.
    """

    timesteps: Tensor
    sigmas: Tensor
    spans: tuple[tuple[float, float], ...]
    steps: int
    init_scale: float
    space: str
    prediction_type: str
    sampler: str

    def abar(self, call: int) -> float:
        """Signal variance at a call, in (0, 1): of the schedule's own sigma, never a look-up at a rounded timestep."""
        return 1.0 / (1.0 + float(self.sigmas[call]) ** 2)


def vp_schedule(
    name: str, noise: NoiseSchedule, times: Floats, starts: Floats, ends: Floats, whole: bool = True
) -> Schedule:
    """The run of a "vp" sampler with a call a step; int64 timesteps when whole."""
    return Schedule(
        timesteps=torch.from_numpy(times.astype(np.int64 if whole else np.float32)),
        sigmas=torch.from_numpy(starts.astype(np.float64)),
        spans=tuple((float(start), float(end)) for start, end in zip(starts, ends, strict=True)),
        steps=len(starts),
        init_scale=1.0,
        space="vp",
        prediction_type=noise.prediction_type,
        sampler=name,
    )
