"""Samplers: one small frozen class per algorithm, each a pure function of what it is given.

`schedule` turns a model's NoiseSchedule into the Schedule of one run; `step` makes x at one noise level into x at the
next. A sampler never sees the network and keeps nothing: earlier outputs travel in a History value, so one sampler
object may serve many runs at once. Coefficients are Python floats (float64); tensors are only scaled and added.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from minidiff.sampling.schedule import SPACINGS, Custom, NoiseSchedule, Schedule, check_choice
from minidiff.sampling.spacing import (
    check_karras,
    count_steps,
    custom_sigmas,
    custom_timesteps,
    final_sigma,
    levels_back,
    sigmas_at,
    spaced_timesteps,
    timesteps_at,
    training_karras,
    ve_schedule,
    vp_schedule,
)

Draw = Callable[[], Tensor]


@dataclass(frozen=True, eq=False)
class History:
    """What a multistep sampler remembers: its last outputs, newest last, and PNDM's sample before its doubled step."""

    outputs: tuple[Tensor, ...] = ()
    saved: Tensor | None = None


class Sampler(Protocol):
    """What the loop needs. x, output and noise are [B,C,h,w]; x is in the space of the schedule ("vp" or "ve")."""

    name: ClassVar[str]

    @property
    def stochastic(self) -> bool:
        """Whether `step` draws fresh noise."""

    def schedule(
        self, noise: NoiseSchedule, steps: int | None = None, *, timesteps: Custom = None, sigmas: Custom = None
    ) -> Schedule:
        """The run of `steps` steps; or of the timesteps given, or of the sigmas given (one more than steps)."""

    def step(
        self, x: Tensor, output: Tensor, call: int, schedule: Schedule, history: History, noise: Draw | None = None
    ) -> tuple[Tensor, History]:
        """x after model call number `call`, whose raw output (eps or v) is given, and the history for the next call."""


@dataclass(frozen=True)
class DDIM:
    """DDIM, Song et al. 2021 (arXiv 2010.02502), eq. 12 and 16. eta 0 is deterministic, 1 is DDPM's variance.

    Space "vp". spacing None: the model's, else leading. Like diffusers (and unlike the paper) a step counts back T //
    steps timesteps whatever the spacing, so with linspace or trailing the level reached differs a little from the next
    call's. Custom timesteps and sigmas, which diffusers' DDIM does not take, step exactly from one to the next.
    """

    name: ClassVar[str] = "ddim"
    eta: float = 0.0
    spacing: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta!r}; expected a number from 0 (no fresh noise) to 1 (DDPM's)")
        _check_spacing(self.spacing)

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def schedule(
        self, noise: NoiseSchedule, steps: int | None = None, *, timesteps: Custom = None, sigmas: Custom = None
    ) -> Schedule:
        count = count_steps(noise, steps, timesteps, sigmas)
        if sigmas is not None:
            levels = custom_sigmas(noise, sigmas).astype(np.float64)
            return vp_schedule(self.name, noise, timesteps_at(noise, levels[:-1]), levels[:-1], levels[1:], whole=False)
        known, final = noise.exact_sigmas(), final_sigma(noise, alpha_to_one=True)
        if timesteps is not None:
            times = custom_timesteps(noise, timesteps, whole=True)
            ends = np.append(known[times[1:].astype(int)], final)
        else:
            times = spaced_timesteps(noise, count, self.spacing or noise.timestep_spacing or "leading", whole=True)
            ends = levels_back(noise, times, count, final)
        return vp_schedule(self.name, noise, times, known[times.astype(int)], ends)

    def step(
        self, x: Tensor, output: Tensor, call: int, schedule: Schedule, history: History, noise: Draw | None = None
    ) -> tuple[Tensor, History]:
        start, end = schedule.spans[call]
        clean, eps = predict(x, output, start, schedule.prediction_type)
        signal, rest = _signal(end), 1 - _signal(end) ** 2
        # eq. 16: eta * sqrt((1 - abar') / (1 - abar)) * sqrt(1 - abar / abar'), with abar' at the end of the step
        variance = self.eta**2 * rest * (1 + start**2) / start**2 * (1 - (1 + end**2) / (1 + start**2))
        x = signal * clean + math.sqrt(max(rest - variance, 0.0)) * eps
        if variance > 0:
            x = x + math.sqrt(variance) * _fresh(noise, self.name)
        return x, history


@dataclass(frozen=True)
class PNDM:
    """PNDM without its Runge-Kutta steps (PLMS), Liu et al. 2022 (arXiv 2202.09778), eq. 9 and 12: SD 1.5's own.

    Space "vp". spacing None: the model's, else leading. n > 1 steps make n + 1 calls: the first step is taken, the
    network asked again where it arrived, and the step taken anew from the saved sample with the mean of both outputs.
    Two of diffusers' choices are kept: v outputs are combined as they are and turned into eps once, at the sample
    stepped from; and formula (9) counts T // steps timesteps back (in the repeated call: up), whatever the spacing.
    """

    name: ClassVar[str] = "pndm"
    spacing: str | None = None

    def __post_init__(self) -> None:
        _check_spacing(self.spacing)

    @property
    def stochastic(self) -> bool:
        return False

    def schedule(
        self, noise: NoiseSchedule, steps: int | None = None, *, timesteps: Custom = None, sigmas: Custom = None
    ) -> Schedule:
        if timesteps is not None or sigmas is not None:
            raise ValueError(
                "pndm takes no custom timesteps or sigmas, its formula needs even steps; use lms or dpmpp_2m"
            )
        if not noise.skip_prk_steps:
            raise ValueError(
                "the scheduler config has skip_prk_steps false, which pndm has not; use ddim, lms or dpmpp_2m"
            )
        count = count_steps(noise, steps, None, None)
        times = spaced_timesteps(noise, count, self.spacing or noise.timestep_spacing or "leading", whole=True)
        known, ends = noise.exact_sigmas(), levels_back(noise, times, count, final_sigma(noise, alpha_to_one=False))
        levels = known[times.astype(int)]
        run = vp_schedule(self.name, noise, times, levels, ends)
        if count == 1:
            return run
        above = known[int(times[1]) + noise.num_train_timesteps // count]
        return replace(
            run,
            timesteps=torch.cat([run.timesteps[:2], run.timesteps[1:]]),
            sigmas=torch.cat([run.sigmas[:2], run.sigmas[1:]]),
            spans=(run.spans[0], (float(above), float(levels[1])), *run.spans[1:]),
            index=(0, *run.index),
        )

    def step(
        self, x: Tensor, output: Tensor, call: int, schedule: Schedule, history: History, noise: Draw | None = None
    ) -> tuple[Tensor, History]:
        start, end = schedule.spans[call]
        if history.saved is not None:  # the repeated call
            x, mixed, history = history.saved, (output + history.outputs[-1]) / 2, replace(history, saved=None)
        else:
            history = History((*history.outputs[-3:], output), saved=x if call == 0 else None)
            mixed = _adams_bashforth(history.outputs)
        eps = mixed if schedule.prediction_type == "epsilon" else predict(x, mixed, start, "v_prediction")[1]
        # eq. 9 simplified: with x_ve = x / signal it is x_ve + (end - start) * eps
        return _signal(end) / _signal(start) * x + _signal(end) * (end - start) * eps, history


@dataclass(frozen=True)
class Euler:
    """Euler's method on the probability flow ODE, Karras et al. 2022 (arXiv 2206.00364), Alg. 2 without churn or Heun.

    Space "ve". karras: their sigmas (eq. 5) between the first and last sigma of the spacing. spacing None: the model's,
    else linspace. Custom timesteps may be fractions.
    """

    name: ClassVar[str] = "euler"
    karras: bool = False
    spacing: str | None = None

    def __post_init__(self) -> None:
        _check_spacing(self.spacing)

    @property
    def stochastic(self) -> bool:
        return False

    def schedule(
        self, noise: NoiseSchedule, steps: int | None = None, *, timesteps: Custom = None, sigmas: Custom = None
    ) -> Schedule:
        return ve_schedule(self.name, noise, steps, self.spacing, self.karras, timesteps, sigmas)

    def step(
        self, x: Tensor, output: Tensor, call: int, schedule: Schedule, history: History, noise: Draw | None = None
    ) -> tuple[Tensor, History]:
        start, end = schedule.spans[call]
        return x + (end - start) * derivative(x, output, start, schedule.prediction_type), history


@dataclass(frozen=True)
class EulerAncestral:
    """Euler steps with DDPM's fresh noise (Ho et al. 2020, arXiv 2006.11239), as k-diffusion has them.

    Space "ve". Draws noise at every step but one that ends at sigma 0. karras: as Euler's; diffusers has none here.
    """

    name: ClassVar[str] = "euler_ancestral"
    karras: bool = False
    spacing: str | None = None

    def __post_init__(self) -> None:
        _check_spacing(self.spacing)

    @property
    def stochastic(self) -> bool:
        return True

    def schedule(
        self, noise: NoiseSchedule, steps: int | None = None, *, timesteps: Custom = None, sigmas: Custom = None
    ) -> Schedule:
        return ve_schedule(self.name, noise, steps, self.spacing, self.karras, timesteps, sigmas)

    def step(
        self, x: Tensor, output: Tensor, call: int, schedule: Schedule, history: History, noise: Draw | None = None
    ) -> tuple[Tensor, History]:
        start, end = schedule.spans[call]
        down = end**2 / start  # sqrt(end^2 - up^2) with up^2 = end^2 * (1 - end^2 / start^2)
        x = x + (down - start) * derivative(x, output, start, schedule.prediction_type)
        if end > 0:
            x = x + math.sqrt(end**2 - down**2) * _fresh(noise, self.name)
        return x, history


@dataclass(frozen=True)
class LMS:
    """Linear multistep (Adams-Bashforth with uneven steps) on the same ODE, as k-diffusion's sample_lms; order 1 to 4.

    Space "ve". The coefficients are exact, where diffusers integrates numerically. Layout guidance was published with
    it.
    """

    name: ClassVar[str] = "lms"
    karras: bool = False
    order: int = 4
    spacing: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.order, bool) or self.order not in (1, 2, 3, 4):
            raise ValueError(f"order is {self.order!r}; expected 1, 2, 3 or 4")
        _check_spacing(self.spacing)

    @property
    def stochastic(self) -> bool:
        return False

    def schedule(
        self, noise: NoiseSchedule, steps: int | None = None, *, timesteps: Custom = None, sigmas: Custom = None
    ) -> Schedule:
        return ve_schedule(self.name, noise, steps, self.spacing, self.karras, timesteps, sigmas)

    def step(
        self, x: Tensor, output: Tensor, call: int, schedule: Schedule, history: History, noise: Draw | None = None
    ) -> tuple[Tensor, History]:
        start, end = schedule.spans[call]
        slope = derivative(x, output, start, schedule.prediction_type)
        slopes = (*history.outputs, slope)[-self.order :]
        nodes = [schedule.spans[i][0] for i in range(call + 1 - len(slopes), call + 1)]
        for weight, value in zip(lagrange_integrals(nodes, start, end), slopes, strict=True):
            x = x + weight * value
        return x, History(slopes)


@dataclass(frozen=True)
class DPMpp2M:
    """DPM-Solver++ 2M, Lu et al. 2022 (arXiv 2211.01095), Alg. 2, midpoint; first order at the first and last step.

    Space "vp". karras: sigmas (eq. 5 of Karras et al. 2022) over the whole training range, timesteps rounded.
    spacing None: the model's, else linspace; a run of n steps is spaced as n + 1 points without the lowest.
    """

    name: ClassVar[str] = "dpmpp_2m"
    karras: bool = False
    spacing: str | None = None

    def __post_init__(self) -> None:
        _check_spacing(self.spacing)

    @property
    def stochastic(self) -> bool:
        return False

    def schedule(
        self, noise: NoiseSchedule, steps: int | None = None, *, timesteps: Custom = None, sigmas: Custom = None
    ) -> Schedule:
        count = count_steps(noise, steps, timesteps, sigmas)
        check_karras(self.karras, timesteps, sigmas)
        if sigmas is None and not self.karras:
            if timesteps is not None:
                times = custom_timesteps(noise, timesteps, whole=True)
            else:
                spacing = self.spacing or noise.timestep_spacing or "linspace"
                times = spaced_timesteps(noise, count, spacing, whole=True, drop_last=True)
            levels = np.append(sigmas_at(noise, times), 0.0)
        else:
            levels = (
                training_karras(noise, count) if sigmas is None else custom_sigmas(noise, sigmas).astype(np.float64)
            )
            times = timesteps_at(noise, levels[:-1])
            # diffusers rounds, but with cosine betas cuts the fraction off
            times = np.floor(times) if noise.beta_schedule == "squaredcos_cap_v2" else times.round()
        levels = levels.astype(np.float32).astype(np.float64)
        return vp_schedule(self.name, noise, times, levels[:-1], levels[1:])

    def step(
        self, x: Tensor, output: Tensor, call: int, schedule: Schedule, history: History, noise: Draw | None = None
    ) -> tuple[Tensor, History]:
        start, end = schedule.spans[call]
        clean, _ = predict(x, output, start, schedule.prediction_type)
        target = clean
        if history.outputs and call < len(schedule.spans) - 1:
            before = schedule.spans[call - 1][0]
            ratio = math.log(before / start) / math.log(start / end)  # h_0 / h, in lambda = -log sigma
            target = clean + (clean - history.outputs[-1]) / (2 * ratio)
        # alpha' * (1 - exp(-h)) is alpha' * (1 - end / start)
        x = _signal(end) / _signal(start) * end / start * x + _signal(end) * (1 - end / start) * target
        return x, History((clean,))


SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "ddim": DDIM,
    "pndm": PNDM,
    "euler": Euler,
    "euler_karras": partial(Euler, karras=True),
    "euler_ancestral": EulerAncestral,
    "euler_ancestral_karras": partial(EulerAncestral, karras=True),
    "lms": LMS,
    "lms_karras": partial(LMS, karras=True),
    "dpmpp_2m": DPMpp2M,
    "dpmpp_2m_karras": partial(DPMpp2M, karras=True),
}


def sampler_by_name(name: str) -> Sampler:
    """The sampler of that name with its defaults; the names are the keys of SAMPLERS."""
    if name not in SAMPLERS:
        raise ValueError(f"no sampler is called {name!r}; expected one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]()


def default_sampler(noise: NoiseSchedule) -> Sampler:
    """The sampler that the model's scheduler config names."""
    if noise.sampler is None:
        raise ValueError(
            f"the scheduler config asks for {noise.refusal}, which minidiff has not; "
            f"choose a sampler yourself: {', '.join(SAMPLERS)}"
        )
    return sampler_by_name(noise.sampler)


def predict(x: Tensor, output: Tensor, sigma: float, prediction_type: str) -> tuple[Tensor, Tensor]:
    """The clean latents and eps that a network output means, for x in "vp" space. v: Salimans and Ho 2022, app. D."""
    signal, spread = _signal(sigma), sigma * _signal(sigma)
    if prediction_type == "epsilon":
        return (x - spread * output) / signal, output
    return signal * x - spread * output, signal * output + spread * x


def derivative(x: Tensor, output: Tensor, sigma: float, prediction_type: str) -> Tensor:
    """dx / dsigma of the probability flow ODE, for x in "ve" space: eps (Karras et al. 2022, Alg. 1, line 4)."""
    if prediction_type == "epsilon":
        return output
    return _signal(sigma) * output + sigma * _signal(sigma) ** 2 * x


def lagrange_integrals(nodes: list[float], start: float, end: float) -> list[float]:
    """Integral over [start, end] of each Lagrange basis polynomial of at most 4 nodes: exact, by two-point Gauss."""
    middle, half = (start + end) / 2, (end - start) / 2
    points = (middle - half / math.sqrt(3), middle + half / math.sqrt(3))
    return [
        half * sum(math.prod((p - other) / (node - other) for other in nodes if other != node) for p in points)
        for node in nodes
    ]


def _adams_bashforth(outputs: tuple[Tensor, ...]) -> Tensor:
    """The weighted mean of the last 1 to 4 outputs, newest last. PNDM, eq. 12, and its lower orders."""
    weights = ((1.0,), (-1 / 2, 3 / 2), (5 / 12, -16 / 12, 23 / 12), (-9 / 24, 37 / 24, -59 / 24, 55 / 24))
    mixed = torch.zeros_like(outputs[-1])
    for weight, output in zip(weights[len(outputs) - 1], outputs, strict=True):
        mixed = mixed + weight * output
    return mixed


def _signal(sigma: float) -> float:
    """sqrt(abar)."""
    return 1 / math.sqrt(1 + sigma**2)


def _fresh(noise: Draw | None, name: str) -> Tensor:
    if noise is None:
        raise ValueError(
            f"{name} needs fresh noise at each step; pass noise, a function that returns a tensor of x's shape"
        )
    return noise()


def _check_spacing(spacing: str | None) -> None:
    if spacing is not None:
        check_choice("spacing", spacing, SPACINGS)
