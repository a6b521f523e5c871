"""The loop: noise to latents, as a generator that yields one Step per step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from minidiff.sampling.samplers._sampler import Draw, Sampler, predict
from minidiff.sampling.spacing import Schedule

if TYPE_CHECKING:
    from minidiff.networks.sites import Site

    # (x, variance preserving, [B,C,h,w]; t, float32 []; sigma; step) -> (network output [B,C,h,w], recorded maps); the
    # output for CFG++ may be [unconditional, guided], [2B,C,h,w]
    Denoise = Callable[[Tensor, Tensor, float, int], tuple[Tensor, dict[Site, Tensor]]]
    # (x, variance preserving, [B,C,h,w]; t, float32 []; abar; step) -> moved x, a new tensor
    Refine = Callable[[Tensor, Tensor, float, int], Tensor]

Hold = Callable[[Tensor, float], Tensor]
"""(x, variance preserving, [B,C,h,w]; sigma) -> x with a part of it replaced, at sigma 0 by clean latents."""


class Predicted(NamedTuple):
    """What a step has predicted: clean latents [B,C,h,w]. sigma: where it began."""

    clean: Tensor
    sigma: float


Renew = Callable[[Tensor, float, int, Predicted], Tensor]
"""(x, variance preserving, [B,C,h,w]; abar; step; the prediction of the step before) -> x, or a new tensor, with other
noise say."""


@dataclass(frozen=True, eq=False)
class SamplerStep:
    """The result of one step.

    index: 0 to steps - 1. t, sigma: where the step began; maps: recorded there (in the first call, if a sampler makes
        two).
    latents: [B,C,h,w] after the step, in diffusers' space for the sampler ("ve" latents shrink from sigma's size).
    denoised: [B,C,h,w], the clean latents predicted in the step's last call (variance preserving; for previews).
    report: None from this loop; a caller that refines may set one with dataclasses.replace.
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
    hold: Hold | None = None,
    renew: Renew | None = None,
) -> Iterator[SamplerStep]:
    """Sample from x, unit-variance latents [B,C,h,w], yielding a SamplerStep per step. Nothing is computed ahead.

    denoise gets x in variance-preserving scale, in the dtype of `x`, and t as a tensor on x's device, so that a
    compiled network sees one kind of argument. refine moves x before each call (if every step has two, before its
    first); returning its argument changes no bit.
    hold replaces a part of x before each call but the first, and of the last and the predicted latents (inpainting).
    renew changes x before a step's first call, of all steps but the first, and before refine.
    noise returns fresh unit noise of x's shape, for `stochastic` samplers. Arithmetic is float32 or better.
    denoise decides whether gradients are recorded: no torch mode is held across a yield.
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
    return _steps(denoise, x, schedule, sampler, refine, noise, hold, renew)


def _steps(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    sampler: Sampler,
    refine: Refine | None,
    noise: Draw | None,
    hold: Hold | None,
    renew: Renew | None,
) -> Iterator[SamplerStep]:
    given, work = x.dtype, torch.promote_types(x.dtype, torch.float32)
    index = 0
    before: Predicted | None = None
    seen: list[tuple[int, Tensor, Tensor, dict[Site, Tensor]]] = []  # this step's calls: number, input, output, maps

    def ask(x: Tensor, call: int) -> tuple[Tensor, Tensor]:
        sigma = float(schedule.sigmas[call])
        # a fill, not a copy, to avoid a GPU sync; a tensor, so that a compiled network does not recompile at each step
        t = torch.full((), float(schedule.timesteps[call]), dtype=torch.float32, device=x.device)
        growth = math.sqrt(1 + sigma**2) if schedule.space == "ve" else 1.0
        if hold is not None and call > 0:  # the first call's x is the caller's
            x = _like(hold(x / growth, sigma), x, "hold") * growth
        x_vp = (x / growth).to(given)
        was = x_vp
        if before is not None and not seen and renew is not None:
            x_vp = _like(renew(x_vp, schedule.abar(call), index, before), was, "renew")
        if refine is not None and len(seen) < sampler.guided_calls:
            x_vp = _like(refine(x_vp, t, schedule.abar(call), index), was, "refine")
        x = x if x_vp is was else x + (x_vp.to(work) - was.to(work)) * growth
        output, maps = denoise(x_vp, t, sigma, index)
        guided = output[len(x) :] if sampler.cfg_pp and len(output) == 2 * len(x) else output
        seen.append((call, x_vp, _like(guided, x_vp, "denoise").to(work), maps))
        return x, output.to(work)

    def fresh() -> Tensor:
        assert noise is not None  # checked by sample()
        return _like(noise(), x, "noise").to(x.device, work)

    def finished(latents: Tensor) -> SamplerStep:  # its own scope, to hold no tensors across the yield
        nonlocal before
        (first, _, _, maps), (last, x_vp, output, _) = seen[0], seen[-1]
        clean, _ = predict(x_vp.to(work), output, float(schedule.sigmas[last]), schedule.prediction_type)
        if renew is not None:
            before = Predicted(clean, float(schedule.sigmas[first]))
        if hold is not None:
            clean = hold(clean, 0.0)
            latents = hold(latents, 0.0) if index == schedule.steps - 1 else latents
        began = float(schedule.timesteps[first]), float(schedule.sigmas[first])
        seen.clear()
        return SamplerStep(index, *began, latents.to(given), clean.to(given), maps)

    for latents in sampler.run(ask, x.to(work) * schedule.init_scale, schedule, fresh):
        yield finished(latents)
        index += 1


def _like(value: Tensor, x: Tensor, name: str) -> Tensor:
    if value.shape != x.shape:
        raise ValueError(
            f"{name} returned a tensor of shape {list(value.shape)}; expected the latents' {list(x.shape)}"
        )
    return value
