"""The loop: noise to latents, as a generator that yields one Step per step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minidiff.sampling.samplers import Draw, History, Sampler, predict
from minidiff.sampling.schedule import Schedule

if TYPE_CHECKING:
    from minidiff.networks.attention import Site

    # (x, variance preserving, [B,C,h,w]; t, float32 []) -> (network output [B,C,h,w], recorded maps)
    Denoise = Callable[[Tensor, Tensor], tuple[Tensor, dict[Site, Tensor]]]
    # (x, variance preserving, [B,C,h,w]; t, float32 []; abar; step) -> moved x, a new tensor
    Refine = Callable[[Tensor, Tensor, float, int], Tensor]


@dataclass(frozen=True, eq=False)
class Step:
    """What one step leaves behind.

    index: 0 to steps - 1. t, sigma: where the step began; maps: recorded there (by the first call, where PNDM makes
    two).
    latents: [B,C,h,w] after the step, in diffusers' space for the sampler ("ve" latents shrink from sigma's size).
    denoised: [B,C,h,w], the clean latents that the network expected at the step's last call (variance preserving; for
    previews).
    report: None from this loop; whoever refines may put one in with dataclasses.replace.
    """

    index: int
    t: float
    sigma: float
    latents: Tensor
    denoised: Tensor
    maps: dict[Site, Tensor] = field(default_factory=dict)
    report: object | None = None


def sample(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    sampler: Sampler,
    refine: Refine | None = None,
    noise: Draw | None = None,
) -> Iterator[Step]:
    """Sample from x, unit-variance latents [B,C,h,w], yielding a Step after each step. Nothing is computed ahead.

    denoise is given x in variance-preserving scale, in the dtype of `x`, and t as a tensor on x's device, so that a
    compiled network sees one kind of argument. refine moves x before each call; returning its argument changes no bit.
    noise returns fresh unit noise of x's shape (for DDIM with eta and Euler ancestral). Arithmetic is float32 or
    better.
    Whether gradients are recorded is the caller's choice inside denoise: no torch mode is held across a yield.
    """
    if not x.is_floating_point():
        raise ValueError(f"latents are {x.dtype}; expected a floating-point tensor of unit-variance noise")
    if schedule.sampler != sampler.name:
        raise ValueError(
            f"the schedule was made for {schedule.sampler} but the sampler is {sampler.name}; "
            "make the schedule with the sampler's own schedule()"
        )
    if sampler.stochastic and noise is None:
        raise ValueError(
            f"{sampler.name} draws fresh noise but none was given; "
            "pass noise, a function that returns unit noise of the latents' shape"
        )
    return _steps(denoise, x, schedule, sampler, refine, noise)


def _steps(
    denoise: Denoise, x: Tensor, schedule: Schedule, sampler: Sampler, refine: Refine | None, noise: Draw | None
) -> Iterator[Step]:
    given, work = x.dtype, torch.promote_types(x.dtype, torch.float32)
    draw = None if noise is None else _drawing(noise, x, work)
    x, history = x.to(work) * schedule.init_scale, History()
    calls = len(schedule.index)
    for call, index in enumerate(schedule.index):
        sigma = float(schedule.sigmas[call])
        # a fill, not a copy: a GPU is not waited for, and a compiled network sees a tensor, not a new number each step
        t = torch.full((), float(schedule.timesteps[call]), dtype=torch.float32, device=x.device)
        growth = math.sqrt(1 + sigma**2) if schedule.space == "ve" else 1.0
        x_vp = (x / growth).to(given)
        if refine is not None:
            moved = refine(x_vp, t, schedule.abar(call), index)
            shift = (_like(moved, x_vp, "refine").to(work) - x_vp.to(work)) * growth
            x, x_vp = x + shift, moved
            if history.saved is not None:  # PNDM steps again from there, so there it must move too
                history = replace(history, saved=history.saved + shift)
        output, found = denoise(x_vp, t)
        output = _like(output, x_vp, "denoise").to(work)
        x, history = sampler.step(x, output, call, schedule, history, draw)
        if call == 0 or index != schedule.index[call - 1]:
            began, maps = (float(schedule.timesteps[call]), sigma), found
        if call == calls - 1 or schedule.index[call + 1] != index:
            clean, _ = predict(x_vp.to(work), output, sigma, schedule.prediction_type)
            yield Step(index, *began, x.to(given), clean.to(given), maps)


def _drawing(noise: Draw, x: Tensor, work: torch.dtype) -> Draw:
    """The caller's noise, moved to where x is and checked for its shape."""
    return lambda: _like(noise(), x, "noise").to(x.device, work)


def _like(value: Tensor, x: Tensor, name: str) -> Tensor:
    if value.shape != x.shape:
        raise ValueError(
            f"{name} returned a tensor of shape {list(value.shape)}; expected the latents' {list(x.shape)}"
        )
    return value
