"""The base classes of samplers, and the formulas they share. Coefficients are Python floats, in float64."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from minidiff.checks import choice
from minidiff.sampling.spacing import (
    Schedule,
    count_steps,
    custom_sigmas,
    custom_timesteps,
    scheduled_sigmas,
    sigmas_at,
    spaced_timesteps,
    timesteps_at,
)
from minidiff.vocabulary import SCHEDULES, SPACINGS

if TYPE_CHECKING:
    from minidiff.sampling.schedule import Custom, Floats, NoiseSchedule

Ask = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(x [B,C,h,w] in the schedule's space, number of the call) -> (x, moved if guidance moves it; the network's output
for it, eps or v; the unconditional and the guided one [2B,C,h,w] for CFG++)."""
ConfigValues = Mapping[str, tuple[object, ...]]
Draw = Callable[[], Tensor]
"""() -> fresh unit noise [B,C,h,w]."""


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """An algorithm with its settings: a value that never sees the network and has no state between runs.

    spacing: the spacing of the timesteps, "leading", "linspace" or "trailing"; None: the model config's, else
        `usual_spacing`.
    fractions: whether it accepts fractional timesteps.
    settings: other settings of this algorithm in diffusers' config, with the values that are implemented here.
    zero_snr: the last abar of a model trained up to pure noise, as in diffusers; None if its scheduler ignores that.
    cfg_pp: whether it steps by CFG++, for which `ask` returns both halves of classifier-free guidance.
    draws: whether it draws fresh noise at any setting.
    keeps_noise: whether it goes on from latents or noise of earlier steps, so that those of x must not be new.
    guided_calls: the number of calls per step before which layout guidance moves x.
    calls_per_step: calls of the network in a step that is neither the first nor the last.
    """

    name: ClassVar[str]
    usual_spacing: ClassVar[str] = "linspace"
    fractions: ClassVar[bool] = False
    settings: ClassVar[ConfigValues] = {}
    zero_snr: ClassVar[float | None] = None
    cfg_pp: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    keeps_noise: ClassVar[bool] = False
    guided_calls: ClassVar[int] = 2
    calls_per_step: ClassVar[int] = 1
    spacing: str | None = None

    def __post_init__(self) -> None:
        if self.spacing is not None:
            choice("spacing", self.spacing, SPACINGS)
        if (levels := getattr(self, "levels", "uniform")) != "uniform":
            choice("levels", levels, tuple(SCHEDULES))

    def __str__(self) -> str:
        """Its name and noise levels as read_sampler reads them: "dpmpp_2m karras"."""
        levels = getattr(self, "levels", "uniform")
        return self.name if levels == "uniform" else f"{self.name} {levels}"

    @property
    def stochastic(self) -> bool:
        """Whether `run` draws fresh noise."""
        return self.draws or getattr(self, "eta", 0.0) > 0

    @classmethod
    def of_config(cls, config: Mapping[str, object]) -> dict[str, Any]:
        """The fields that diffusers' config of this algorithm sets."""
        if "levels" not in {one.name for one in fields(cls)}:
            return {}
        asked = (f"use_{levels}_sigmas" for levels in ("karras", "exponential", "beta"))
        found = [key.split("_")[1] for key in asked if config.get(key) and key not in cls.settings]
        return {"levels": found[0]} if found else {}

    def schedule(
        self, noise: NoiseSchedule, steps: int | None = None, *, timesteps: Custom = None, sigmas: Custom = None
    ) -> Schedule:
        """The Schedule of a run with `steps` steps, or with the given timesteps or sigmas (one more than steps)."""
        if self.zero_snr is not None:
            noise = noise.up_to_pure_noise(self.zero_snr)
        count = count_steps(noise, steps, timesteps, sigmas)
        times = None if timesteps is None else custom_timesteps(noise, timesteps, self.fractions)
        levels = None if sigmas is None else custom_sigmas(noise, sigmas)
        own = getattr(self, "levels", "uniform")
        if own != "uniform" and (timesteps is not None or sigmas is not None):
            raise ValueError(
                f"{'timesteps' if sigmas is None else 'sigmas'} were given to a sampler with {own} noise levels, which "
                'are its own; leave them out or pass schedule="uniform"'
            )
        return self._schedule(noise, count, times, levels)

    @abstractmethod
    def _schedule(self, noise: NoiseSchedule, steps: int, times: Floats | None, levels: Floats | None) -> Schedule:
        """schedule() with checked values: the caller's timesteps [steps] or sigmas [steps + 1], or neither."""

    def rest(self, noise: NoiseSchedule, schedule: Schedule, skip: int) -> Schedule:
        """A schedule less its first `skip` steps, for latents that have the noise of its first call already."""
        first = skip * self.calls_per_step
        return replace(
            schedule,
            timesteps=schedule.timesteps[first:],
            sigmas=schedule.sigmas[first:],
            spans=schedule.spans[first:],
            steps=schedule.steps - skip,
            init_scale=1.0,
            before=tuple(schedule.sigmas[:first].tolist()),
        )

    @abstractmethod
    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        """x after each step. Calls ask(x, call) for each call of the schedule and continues from the x it returns.

        No argument is changed in place.
        """

    def _spacing(self, noise: NoiseSchedule) -> str:
        return self.spacing or noise.timestep_spacing or self.usual_spacing


@dataclass(frozen=True, kw_only=True)
class SigmaSampler(Sampler):
    """A sampler of k-diffusion: space "ve", float32 timesteps (also fractional), sigmas down to 0 or a caller's last.

    levels: one of vocabulary.SCHEDULES; "karras", "exponential" and "beta" lie between the first and last sigma of the
        spacing, "sgm_uniform" has a spacing of its own.
    rounds: whether Karras timesteps are rounded.
    """

    fractions: ClassVar[bool] = True
    rounds: ClassVar[bool] = False
    levels: str = "uniform"

    def _schedule(self, noise: NoiseSchedule, steps: int, times: Floats | None, levels: Floats | None) -> Schedule:
        spacing = "linspace" if self.levels == "sgm_uniform" else self._spacing(noise)
        if levels is not None:
            times = timesteps_at(noise, levels[:-1].astype(np.float32))  # in diffusers' precision
        else:
            if times is None:
                times = spaced_timesteps(noise, steps, spacing, fractions=True)
            exact = sigmas_at(noise, times)
            if self.levels != "uniform":
                exact = scheduled_sigmas(noise, self.levels, steps, exact)
                times = timesteps_at(noise, exact)
                times = times.round() if self.rounds and self.levels == "karras" else times
            levels = np.append(exact, 0.0).astype(np.float32)
        values = [float(level) for level in levels]
        return Schedule(
            timesteps=torch.from_numpy(times.astype(np.float32)),
            sigmas=torch.from_numpy(levels[:-1].astype(np.float64)),
            spans=tuple(itertools.pairwise(values)),
            steps=steps,
            # with leading spacing the run starts below the last timestep, where x still contains some signal
            init_scale=math.sqrt(values[0] ** 2 + 1) if spacing == "leading" else values[0],
            space="ve",
            prediction_type=noise.prediction_type,
            sampler=self.name,
        )


def signal(sigma: float) -> float:
    """sqrt(abar)."""
    return 1 / math.sqrt(1 + sigma**2)


def predict(x: Tensor, output: Tensor, sigma: float, prediction_type: str) -> tuple[Tensor, Tensor]:
    """(clean latents, eps) from a network output, for x in "vp" space. v: Salimans and Ho 2022, app. D."""
    level, spread = signal(sigma), sigma * signal(sigma)
    if prediction_type == "epsilon":
        return (x - spread * output) / level, output
    return level * x - spread * output, level * output + spread * x


def derivative(x: Tensor, output: Tensor, sigma: float, prediction_type: str) -> Tensor:
    """dx / dsigma of the probability flow ODE, for x in "ve" space: eps (Karras et al. 2022, Alg. 1, line 4)."""
    if prediction_type == "epsilon":
        return output
    return signal(sigma) * output + sigma * signal(sigma) ** 2 * x


def cleaned(x: Tensor, output: Tensor, sigma: float, prediction_type: str) -> Tensor:
    """The clean latents from a network output, for x in "ve" space."""
    return x - sigma * derivative(x, output, sigma, prediction_type)


def first_order(x: Tensor, clean: Tensor, start: float, end: float) -> Tensor:
    """DDIM's step as in Lu et al. 2022 (arXiv 2211.01095), eq. 9: 1 - exp(-h) is 1 - end / start."""
    level = signal(end)
    return level / signal(start) * end / start * x + level * (1 - end / start) * clean


def sde_step(x: Tensor, clean: Tensor, bend: Tensor | None, start: float, end: float, fresh: Draw) -> Tensor:
    """SDE-DPM-Solver++'s first-order step, with what higher orders add to the clean latents' part."""
    ratio = (end / start) ** 2  # exp(-2 h)
    target = (1 - ratio) * clean if bend is None else (1 - ratio) * clean + bend
    x = signal(end) / signal(start) * ratio * x + signal(end) * target
    return x + signal(end) * end * math.sqrt(1 - ratio) * fresh() if 0 < end < start else x
