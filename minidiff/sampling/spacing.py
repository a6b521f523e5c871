"""Where the steps of a run lie: from a number of steps, or a caller's timesteps or sigmas, to a Schedule."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import torch
from numpy.typing import NDArray

from minidiff.sampling.schedule import Custom, Floats, NoiseSchedule, Numbers, Schedule


def count_steps(noise: NoiseSchedule, steps: int | None, timesteps: Custom, sigmas: Custom) -> int:
    """The number of steps of a run from whichever of the three was given."""
    if timesteps is not None and sigmas is not None:
        raise ValueError("both timesteps and sigmas were given; pass one of them")
    custom = timesteps if timesteps is not None else sigmas
    if custom is not None:
        name, count = ("timesteps", len(custom)) if timesteps is not None else ("sigmas", len(custom) - 1)
        if steps is not None and steps != count:
            raise ValueError(
                f"steps is {steps} but {name} make {count} steps; leave steps out (None) or make them agree"
            )
        return count
    if steps is None:
        raise ValueError("nothing says how many steps to take; pass steps, timesteps or sigmas")
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= noise.num_train_timesteps:
        raise ValueError(f"steps is {steps!r}; expected a whole number from 1 to {noise.num_train_timesteps}")
    return steps


def spaced_timesteps(noise: NoiseSchedule, steps: int, spacing: str, *, whole: bool, drop_last: bool = False) -> Floats:
    """Timesteps of a run, descending [steps]: Table 2 of Lin et al. 2023 (arXiv 2305.08891), in diffusers' rounding.

    whole: round linspace to integers. drop_last: place one point more and leave the lowest out (DPM-Solver++).
    Two deviations. diffusers' trailing spacing has a timestep too many, -1, for some counts (61, 103, 121, ...) because
    a float step overshoots: it is left out here. And where rounding makes timesteps repeat or leave the range (1000
    leading steps with offset 1) diffusers crashes or divides by zero: a ValueError here.
    """
    trained, points = noise.num_train_timesteps, steps + 1 if drop_last else steps
    if spacing == "linspace":
        grid = np.linspace(0, trained - 1, points)
        times = (grid.round() if whole else grid.astype(np.float32).astype(np.float64))[::-1][:steps]
    elif spacing == "leading":
        times = (np.arange(points, dtype=np.float64) * (trained // points))[::-1][:steps] + noise.steps_offset
    else:
        times = np.arange(trained, 0, -trained / steps)[:steps].round() - 1
    if times[0] > trained - 1 or (np.diff(times) >= 0).any():
        raise ValueError(
            f"{steps} steps with {spacing} spacing and steps_offset {noise.steps_offset} do not fit into the {trained} "
            "timesteps trained on; take fewer steps or another spacing"
        )
    if steps == 1 and times[0] < trained / 2:
        warnings.warn(
            f"one step with {spacing} spacing starts at timestep {times[0]:g}, where the network expects an almost "
            f"clean image: the result is noise; pass spacing='trailing' (starts at {trained - 1}) or take more steps",
            stacklevel=4,
        )
    return times


def custom_timesteps(noise: NoiseSchedule, values: Numbers, *, whole: bool) -> Floats:
    """A caller's timesteps, checked: strictly descending inside [0, T - 1], whole where the sampler needs it."""
    times, last = np.asarray(values, dtype=np.float64), noise.num_train_timesteps - 1
    if times.ndim != 1 or times.size == 0 or not np.isfinite(times).all():
        raise ValueError(f"timesteps are {values!r}; expected a list of at least one number, all finite")
    if times.max() > last or times.min() < 0 or (np.diff(times) >= 0).any():
        raise ValueError(f"timesteps are {values!r}; expected strictly descending numbers between {last} and 0")
    if whole and (times != times.round()).any():
        raise ValueError(f"timesteps are {values!r}; this sampler takes whole numbers: round them or use euler")
    return times.astype(np.float32).astype(np.float64)


def custom_sigmas(noise: NoiseSchedule, values: Numbers) -> NDArray[np.float32]:
    """A caller's sigmas, one more than steps, checked: strictly descending, only the last may be 0.

    The first may exceed the training range by 1 % (published lists are rounded up); beyond it the model knows nothing.
    """
    sigmas, largest = np.asarray(values, dtype=np.float64), float(noise.training_sigmas()[-1])
    if sigmas.ndim != 1 or sigmas.size < 2 or not np.isfinite(sigmas).all():
        raise ValueError(
            f"sigmas are {values!r}; expected a list of at least two numbers (the last is where the run ends)"
        )
    if sigmas.min() < 0 or (np.diff(sigmas) >= 0).any():
        raise ValueError(f"sigmas are {values!r}; expected strictly descending numbers, ending in 0 or above it")
    if sigmas[0] > 1.01 * largest:
        raise ValueError(f"sigmas start at {sigmas[0]:g}; expected at most {largest:g}, the largest trained on")
    return sigmas.astype(np.float32)


def sigmas_at(noise: NoiseSchedule, timesteps: Floats) -> Floats:
    """Sigmas [n] at timesteps [n], linear between the training timesteps."""
    sigmas = noise.training_sigmas()
    return np.interp(timesteps, np.arange(len(sigmas)), sigmas)


def timesteps_at(noise: NoiseSchedule, sigmas: NDArray[np.floating]) -> Floats:
    """Timesteps [n] at sigmas [n], linear in log sigma and clamped to the training range. Inverse of a log `sigmas_at`.

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


def ve_schedule(
    name: str,
    noise: NoiseSchedule,
    steps: int | None,
    spacing: str | None,
    karras: bool,
    timesteps: Custom,
    sigmas: Custom,
) -> Schedule:
    """The run of the Euler family: float32 timesteps, fractions too, and sigmas down to 0 or to the caller's last."""
    count = count_steps(noise, steps, timesteps, sigmas)
    check_karras(karras, timesteps, sigmas)
    spacing = spacing or noise.timestep_spacing or "linspace"
    if sigmas is not None:
        levels = custom_sigmas(noise, sigmas)
        times = timesteps_at(noise, levels[:-1])
    else:
        if timesteps is not None:
            times = custom_timesteps(noise, timesteps, whole=False)
        else:
            times = spaced_timesteps(noise, count, spacing, whole=False)
        exact = sigmas_at(noise, times)
        if karras:
            exact = karras_sigmas(float(exact[0]), float(exact[-1]), count)
            times = timesteps_at(noise, exact)
        levels = np.append(exact, 0.0).astype(np.float32)
    values = [float(level) for level in levels]
    return Schedule(
        timesteps=torch.from_numpy(times.astype(np.float32)),
        sigmas=torch.tensor(values[:-1], dtype=torch.float64),
        spans=tuple(itertools.pairwise(values)),
        index=tuple(range(count)),
        # with leading spacing the run starts below the last timestep, where x still holds some signal
        init_scale=math.sqrt(values[0] ** 2 + 1) if spacing == "leading" else values[0],
        space="ve",
        prediction_type=noise.prediction_type,
        sampler=name,
    )


def vp_schedule(
    name: str, noise: NoiseSchedule, times: Floats, starts: Floats, ends: Floats, whole: bool = True
) -> Schedule:
    """The run of DDIM, PNDM and DPM-Solver++, a call a step; int64 timesteps when whole."""
    return Schedule(
        timesteps=torch.from_numpy(times.astype(np.int64 if whole else np.float32)),
        sigmas=torch.tensor(starts, dtype=torch.float64),
        spans=tuple((float(start), float(end)) for start, end in zip(starts, ends, strict=True)),
        index=tuple(range(len(starts))),
        init_scale=1.0,
        space="vp",
        prediction_type=noise.prediction_type,
        sampler=name,
    )


def final_sigma(noise: NoiseSchedule, *, alpha_to_one: bool) -> float:
    """Where a run of DDIM or PNDM ends: at 0, or at timestep 0's sigma; alpha_to_one is for a silent config."""
    to_one = alpha_to_one if noise.set_alpha_to_one is None else noise.set_alpha_to_one
    return 0.0 if to_one else float(noise.exact_sigmas()[0])


def levels_back(noise: NoiseSchedule, times: Floats, steps: int, final: float) -> Floats:
    """Sigmas at T // steps timesteps before each of times; `final` where that is below 0."""
    before = times.astype(int) - noise.num_train_timesteps // steps
    return np.where(before >= 0, noise.exact_sigmas()[np.maximum(before, 0)], final)


def training_karras(noise: NoiseSchedule, steps: int) -> Floats:
    """Karras sigmas over the whole training range, then 0: [steps + 1]."""
    known = noise.training_sigmas()
    return np.append(karras_sigmas(float(known[-1]), float(known[0]), steps), 0.0)


def check_karras(karras: bool, timesteps: Custom, sigmas: Custom) -> None:
    """ValueError where Karras sigmas are asked for beside custom timesteps or sigmas, which they would replace."""
    if karras and (timesteps is not None or sigmas is not None):
        given = "timesteps" if timesteps is not None else "sigmas"
        raise ValueError(
            f"{given} were given to a Karras sampler, which chooses its own; drop them or use karras=False"
        )
