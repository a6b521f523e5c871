"""Samplers that call the network twice per step."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from minidiff.sampling.samplers._sampler import SigmaSampler
from minidiff.sampling.spacing import Schedule, timesteps_at

if TYPE_CHECKING:
    from minidiff.sampling.schedule import Floats, NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class TwoCallSampler(SigmaSampler):
    """Calls the network at the start of a step and at `_middle`, a sigma in between. A step to 0 is an Euler step.

    Space "ve". n steps down to 0 make 2 n - 1 calls. Layout guidance moves x only before the first call of a step.
    """

    guided_calls: ClassVar[int] = 1
    calls_per_step: ClassVar[int] = 2

    @abstractmethod
    def _middle(self, start: float, end: float) -> float:
        """The sigma of a step's second call."""

    def _middle_time(self, noise: NoiseSchedule, middle: float, after: float | None) -> float:
        """The timestep of a step's second call; `after` is the next step's first."""
        return float(timesteps_at(noise, np.array([middle]))[0])

    def _schedule(self, noise: NoiseSchedule, steps: int, times: Floats | None, levels: Floats | None) -> Schedule:
        plain = super()._schedule(noise, steps, times, levels)
        firsts: list[float] = plain.timesteps.tolist()
        calls: list[tuple[float, float]] = []  # timestep and sigma
        for time, after, (start, end) in zip(firsts, [*firsts[1:], None], plain.spans, strict=True):
            calls.append((time, start))
            if end > 0:
                middle = self._middle(start, end)
                calls.append((self._middle_time(noise, middle, after), middle))
        sigmas = [*(sigma for _, sigma in calls), plain.spans[-1][1]]
        return replace(
            plain,
            timesteps=torch.tensor([time for time, _ in calls], dtype=torch.float32, device="cpu"),
            sigmas=torch.tensor(sigmas[:-1], dtype=torch.float64, device="cpu"),
            spans=tuple(itertools.pairwise(sigmas)),
        )
