"""The noise levels of a run: from a number of steps, or a caller's timesteps or sigmas, to a Schedule.

Two spaces appear. In "vp" (variance preserving) x = sqrt(abar) * x0 + sqrt(1 - abar) * eps; in "ve" (variance
exploding) x = x0 + sigma * eps. They differ by a factor: x_ve = x_vp * sqrt(1 + sigma^2), with abar = 1 / (1 +
sigma^2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minidiff.checks import numbers, shown, warn, whole

if TYPE_CHECKING:
    from minidiff.sampling.schedule import Custom, Floats, NoiseSchedule, Numbers


CLEAN = 0.1
"""Noise over signal that nobody sees: three times that of Stable Diffusion's first timestep."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """The timesteps and noise levels of a run. Stays on the CPU, so that reading a number needs no GPU sync.

    timesteps: [calls], the network's input; int64 or float32, as in diffusers.
    sigmas: float64 [calls], the actual noise level of x at each call, noise over signal: abar = 1 / (1 + sigma^2).
    spans: for each call the sigmas (from, to) between which the sampler's formula steps; the last `to` is the run's
        end. Mostly (sigmas[i], sigmas[i + 1]); DDIM and PNDM count back T // steps timesteps, as in diffusers.
    steps: the number of steps; a sampler may call the network more than once in a step.
    init_scale: the factor for unit-variance latents. space: "vp" or "ve". sampler: the name of the one that made it.
    before: sigmas of the calls that were left out, where a run starts from a picture.
    """

    timesteps: Tensor
    sigmas: Tensor
    spans: tuple[tuple[float, float], ...]
    steps: int
    init_scale: float
    space: str
    prediction_type: str
    sampler: str
    before: tuple[float, ...] = ()

    def abar(self, call: int) -> float:
        """Signal variance at a call, in (0, 1): from the schedule's sigma, never looked up at a rounded timestep."""
        return 1.0 / (1.0 + float(self.sigmas[call]) ** 2)

    @property
    def ends_clean(self) -> bool:
        """Whether the last latents are a picture: a caller's sigmas may end above 0, where noise is left. Some samplers
        end at the first timestep's instead of 0, as their published code does.
        """
        return self.spans[-1][1] < CLEAN


def vp_schedule(
    name: str, noise: NoiseSchedule, times: Floats, starts: Floats, ends: Floats, whole: bool = True
) -> Schedule:
    """The Schedule of a "vp" sampler with one call per step; int64 timesteps if `whole`."""
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


def exact_schedule(name: str, noise: NoiseSchedule, times: Floats | None, levels: Floats | None) -> Schedule:
    """That of a caller's levels, else of whole timesteps at their exact sigmas, down to 0."""
    if levels is not None:
        return vp_schedule(name, noise, timesteps_at(noise, levels[:-1]), levels[:-1], levels[1:], whole=False)
    assert times is not None
    starts = noise.exact_sigmas()[times.astype(int)]
    return vp_schedule(name, noise, times, starts, np.append(starts[1:], 0.0))


def count_steps(noise: NoiseSchedule, steps: int | None, timesteps: Custom, sigmas: Custom) -> int:
    """The number of steps of a run, from steps, timesteps or sigmas."""
    if steps is not None:
        steps = whole("steps", steps, 1, noise.num_train_timesteps)
    if timesteps is not None and sigmas is not None:
        raise ValueError("both timesteps and sigmas were given; pass one of them")
    custom = timesteps if timesteps is not None else sigmas
    if custom is not None:
        name, count = ("timesteps", 0) if timesteps is not None else ("sigmas", -1)
        count += len(numbers(name, custom))
        if steps is not None and steps != count:
            raise ValueError(
                f"steps is {steps} but {name} make {count} steps; leave steps out (None) or make them agree"
            )
        return count
    if steps is None:
        raise ValueError("the number of steps is not given; pass steps, timesteps or sigmas")
    return steps


def spaced_timesteps(
    noise: NoiseSchedule, steps: int, spacing: str, *, fractions: bool = False, drop_last: bool = False
) -> Floats:
    """Timesteps of a run, descending [steps]: Table 2 of Lin et al. 2023 (arXiv 2305.08891), in diffusers' rounding.

    fractions: leave linspace unrounded. drop_last: space one more point and drop the lowest (DPM-Solver++); with
    linspace and as many steps as timesteps, one timestep then appears twice, as in diffusers.
    Two deviations. diffusers' trailing spacing has an extra timestep, -1, for some counts (61, 103, 121, ...) because
    a float step overshoots: it is left out here. If leading timesteps repeat or leave the range (1000 steps with
    offset 1), diffusers crashes or divides by zero: a ValueError here.
    """
    trained, points = noise.num_train_timesteps, steps + 1 if drop_last else steps
    if spacing == "linspace":
        grid = np.linspace(0, trained - 1, points)
        times = (grid.astype(np.float32).astype(np.float64) if fractions else grid.round())[::-1][:steps]
    elif spacing == "leading":
        times = (np.arange(points, dtype=np.float64) * (trained // points))[::-1][:steps] + noise.steps_offset
    else:
        times = np.arange(trained, 0, -trained / steps)[:steps].round() - 1
    if spacing == "leading" and (times[0] > trained - 1 or (np.diff(times) >= 0).any()):
        raise ValueError(
            f"{steps} steps with leading spacing and steps_offset {noise.steps_offset} do not fit into the {trained} "
            "training timesteps; use fewer steps or another spacing"
        )
    if steps == 1 and times[0] < trained / 2:
        warn(
            f"one step with {spacing} spacing starts at timestep {times[0]:g}, where the network expects an almost "
            f"clean image: the result is noise; pass spacing='trailing' (starts at {trained - 1}) or use more steps"
        )
    return times


def custom_timesteps(noise: NoiseSchedule, values: Numbers, fractions: bool) -> Floats:
    """A caller's timesteps, checked: strictly descending in [0, T - 1], whole numbers unless `fractions`."""
    times, last = np.array(numbers("timesteps", values)), noise.num_train_timesteps - 1
    if times.max() > last or times.min() < 0 or (np.diff(times) >= 0).any():
        raise ValueError(f"timesteps are {shown(values)}; expected strictly descending numbers between {last} and 0")
    if not fractions and (times != times.round()).any():
        raise ValueError(f"timesteps are {shown(values)}; this sampler takes whole numbers: round them or use euler")
    return times.astype(np.float32).astype(np.float64)


def custom_sigmas(noise: NoiseSchedule, values: Numbers) -> Floats:
    """A caller's sigmas, one more than steps, checked and rounded to float32: descending, only the last may be 0.

    The first may exceed the training range by 1 % (published lists are rounded up); the model knows no higher levels.
    """
    sigmas, largest = np.array(numbers("sigmas", values)), float(noise.training_sigmas()[-1])
    if sigmas.size < 2:
        raise ValueError(
            f"sigmas are {shown(values)}; expected a list of at least two numbers (the last is where the run ends)"
        )
    if sigmas.min() < 0 or (np.diff(sigmas) >= 0).any():
        raise ValueError(f"sigmas are {shown(values)}; expected strictly descending numbers, ending in 0 or above it")
    if sigmas[0] > 1.01 * largest:
        raise ValueError(f"sigmas start at {sigmas[0]:g}; expected at most {largest:g}, the largest trained on")
    return sigmas.astype(np.float32).astype(np.float64)


def sigmas_at(noise: NoiseSchedule, timesteps: Floats) -> Floats:
    """Sigmas [n] at timesteps [n], linear between the training timesteps."""
    sigmas = noise.training_sigmas()
    return np.interp(timesteps, np.arange(len(sigmas)), sigmas)


def timesteps_at(noise: NoiseSchedule, sigmas: NDArray[np.floating]) -> Floats:
    """Timesteps [n] at sigmas [n], linear in log sigma, clamped to the training range: `sigmas_at` inverted, in logs.

    The logarithm is taken in the dtype given, since diffusers takes a caller's sigmas in float32.
    """
    known, wanted = np.log(noise.training_sigmas()), np.log(np.maximum(sigmas, 1e-10))
    below = np.clip(
        np.searchsorted(known.astype(np.float64), wanted.astype(np.float64), "right") - 1, 0, len(known) - 2
    )
    weight = np.clip((known[below] - wanted) / (known[below] - known[below + 1]), 0, 1)
    times: Floats = ((1 - weight) * below + weight * (below + 1)).astype(np.float64)
    return times


def karras_sigmas(largest: float, smallest: float, steps: int, rho: float = 7.0) -> Floats:
    """Sigmas [steps] from largest to smallest, even in sigma^(1/rho). Karras et al. 2022 (arXiv 2206.00364), eq. 5."""
    ramp = np.linspace(0, 1, steps)
    low, high = smallest ** (1 / rho), largest ** (1 / rho)
    sigmas: Floats = (high + ramp * (low - high)) ** rho
    return sigmas


def _exponential_sigmas(largest: float, smallest: float, steps: int) -> Floats:
    """Sigmas [steps] from largest to smallest, even in log sigma, as k-diffusion's get_sigmas_exponential."""
    sigmas: Floats = np.exp(np.linspace(math.log(largest), math.log(smallest), steps))
    return sigmas


def _beta_sigmas(largest: float, smallest: float, steps: int) -> Floats:
    """Sigmas [steps] from largest to smallest at quantiles of Beta(0.6, 0.6). Lee et al. 2024 (arXiv 2407.12173)."""
    return smallest + (largest - smallest) * beta_quantiles(1 - np.linspace(0, 1, steps))


def beta_quantiles(shares: Floats, a: float = 0.6) -> Floats:
    """Inverse of the distribution function of Beta(a, a): by bisection on [0, 1/2], where its power series is short."""
    count = np.arange(64)
    series = np.cumprod(np.append(1.0, (count[:-1] + 1 - a) / count[1:])) / (a + count)

    def below(x: Floats) -> Floats:  # the integral from 0, not normalised
        found: Floats = x**a * (series * x[..., None] ** count).sum(-1)
        return found

    wanted = np.minimum(shares, 1 - shares) * 2 * below(np.array([0.5]))
    low, high = np.zeros_like(wanted), np.full_like(wanted, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        short = below(middle) < wanted
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    return np.where(shares > 0.5, 1 - low, low)


_BETWEEN = {"karras": karras_sigmas, "exponential": _exponential_sigmas, "beta": _beta_sigmas}


def scheduled_sigmas(noise: NoiseSchedule, schedule: str, steps: int, ends: Floats | None = None) -> Floats:
    """Sigmas [steps] of a schedule other than "uniform", between the largest and the smallest of ends.

    ends: the whole training range if None. "sgm_uniform" always has timesteps of its own, those of n + 1 linspace
    points without the lowest, with log sigma linear between training timesteps, as k-diffusion's t_to_sigma.
    """
    known = noise.training_sigmas()
    if schedule == "sgm_uniform":
        times = np.linspace(len(known) - 1, 0, steps + 1)[:-1]
        sigmas: Floats = np.exp(np.interp(times, np.arange(len(known)), np.log(known)))
        return sigmas
    first, last = (known[-1], known[0]) if ends is None else (ends[0], ends[-1])
    return _BETWEEN[schedule](float(first), float(last), steps)


def final_sigma(noise: NoiseSchedule, *, alpha_to_one: bool) -> float:
    """The last sigma of DDIM or PNDM: 0, or timestep 0's; `alpha_to_one` applies if the config does not say."""
    to_one = alpha_to_one if noise.set_alpha_to_one is None else noise.set_alpha_to_one
    return 0.0 if to_one else float(noise.exact_sigmas()[0])


def levels_back(noise: NoiseSchedule, times: Floats, steps: int, final: float) -> Floats:
    """Sigmas T // steps timesteps before each of `times`; `final` where that is below timestep 0."""
    before = times.astype(int) - noise.num_train_timesteps // steps
    return np.where(before >= 0, noise.exact_sigmas()[np.maximum(before, 0)], final)
