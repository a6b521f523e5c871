"""The schedule that diffusers' solvers of the DPM-Solver family share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from minidiff.checks import whole
from minidiff.sampling.samplers._sampler import ConfigValues, Sampler
from minidiff.sampling.spacing import Schedule, scheduled_sigmas, sigmas_at, spaced_timesteps, timesteps_at, vp_schedule

if TYPE_CHECKING:
    from minidiff.sampling.schedule import Floats, NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class MultistepSampler(Sampler):
    """Space "vp", one call a step, whole timesteps. A run of n steps is spaced as n + 1 points, the lowest is dropped.

    levels: one of vocabulary.SCHEDULES, over the whole training range. Karras' timesteps are rounded, those of
        "exponential" and "beta" truncated, as in diffusers.
    truncates_cosine: whether diffusers truncates Karras' too with cosine betas.
    """

    truncates_cosine: ClassVar[bool] = False
    settings: ClassVar[ConfigValues] = {
        "final_sigmas_type": ("zero",),
        "use_flow_sigmas": (False,),
        "thresholding": (False,),
    }
    levels: str = "uniform"

    def _schedule(self, noise: NoiseSchedule, steps: int, times: Floats | None, levels: Floats | None) -> Schedule:
        if levels is None and self.levels == "uniform":
            if times is None:
                times = spaced_timesteps(noise, steps, self._spacing(noise), drop_last=True)
            levels = np.append(sigmas_at(noise, times), self._end(float(noise.training_sigmas()[0])))
        else:
            if levels is None:
                levels = scheduled_sigmas(noise, self.levels, steps)
                lowest = noise.training_sigmas() if self.levels == "sgm_uniform" else levels[::-1]
                levels = np.append(levels, self._end(float(lowest[0])))
            times = timesteps_at(noise, levels[:-1])
            truncated = self.levels in ("exponential", "beta")
            truncated |= self.truncates_cosine and noise.beta_schedule == "squaredcos_cap_v2"
            times = np.floor(times) if truncated else times.round()
        levels = levels.astype(np.float32).astype(np.float64)
        return vp_schedule(self.name, noise, times, levels[:-1], levels[1:])

    def _end(self, lowest: float) -> float:
        """Where a run ends; lowest: the smallest sigma of its kind of levels."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class OrderedSampler(MultistepSampler):
    """A solver of order 1 to 3."""

    order: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "order", whole("order", self.order, 1, 3, "1, 2 or 3"))

    @classmethod
    def of_config(cls, config: Mapping[str, object]) -> dict[str, Any]:
        order = config.get("solver_order")
        return super().of_config(config) | ({} if order is None else {"order": order})
