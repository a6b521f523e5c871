"""Latent consistency models, Luo et al. 2023 (arXiv 2310.04378)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from minidiff.checks import number
from minidiff.sampling.samplers._distilled import DistilledSampler
from minidiff.sampling.samplers._sampler import Ask, Draw, predict, signal
from minidiff.sampling.spacing import Schedule, exact_schedule

if TYPE_CHECKING:
    from minidiff.sampling.schedule import Floats, NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class LCM(DistilledSampler):
    """Alg. 3: to the clean latents in one step, then fresh noise for the next. For LCM models and LCM-LoRA, 1 to 8
    steps and a guidance_scale of 1 to 2.

    timestep_scaling: of the boundary condition's c_skip and c_out (eq. 9), which matter at the lowest timesteps alone.
    """

    name: ClassVar[str] = "lcm"
    draws: ClassVar[bool] = True
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "timestep_scaling", number("timestep_scaling", self.timestep_scaling, 0, math.inf))

    @classmethod
    def of_config(cls, config: Mapping[str, object]) -> dict[str, Any]:
        scaling = config.get("timestep_scaling")
        return super().of_config(config) | ({} if scaling is None else {"timestep_scaling": scaling})

    def _schedule(self, noise: NoiseSchedule, steps: int, times: Floats | None, levels: Floats | None) -> Schedule:
        if times is None and levels is None:
            times = self._times(noise, steps)
        return exact_schedule(self.name, noise, times, levels)

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        for call, (start, end) in enumerate(schedule.spans):
            x, output = ask(x, call)
            clean, _ = predict(x, output, start, schedule.prediction_type)
            scaled, data = float(schedule.timesteps[call]) * self.timestep_scaling, 0.5  # sigma_data
            x = scaled / math.hypot(scaled, data) * clean + data**2 / (scaled**2 + data**2) * x
            if end > 0:
                x = signal(end) * x + end * signal(end) * fresh()
            yield x
