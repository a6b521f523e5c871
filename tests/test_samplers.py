"""minidiff.sampling.samplers against diffusers 0.42.1: timesteps, sigmas and whole trajectories in float32.

Where diffusers has no counterpart (custom timesteps except in Euler and DPM++, Karras sigmas for Euler ancestral) the
formula is tested instead. No combination below makes diffusers crash; one step of linspace or leading starts at t = 0
or 1 and gives noise, which is reproduced, with a warning (test_schedule.py).
"""

from __future__ import annotations

import ast
import copy
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.reference import THEIRS
from minidiff.sampling import (
    DDIM,
    LMS,
    PNDM,
    SD15_SCHEDULER_CONFIG,
    DPMpp2M,
    Euler,
    EulerAncestral,
    NoiseSchedule,
    Sampler,
    Schedule,
    choose_sampler,
    sample,
    sampler_by_name,
    sampler_fields,
)
from minidiff.sampling.samplers.ddpm import DDPM
from minidiff.sampling.samplers.deis import DEIS, log_integrals
from minidiff.sampling.samplers.lcm import LCM
from minidiff.sampling.samplers.lms import lagrange_integrals
from minidiff.sampling.samplers.tcd import TCD
from minidiff.sampling.samplers.uni_pc import UniPC
from minidiff.sampling.spacing import timesteps_at
from minidiff.vocabulary import SAMPLERS

pytestmark = [
    pytest.mark.filterwarnings("ignore:one step with"),
    pytest.mark.filterwarnings("ignore:__array_.* :DeprecationWarning"),  # diffusers with numpy 2
]

SHAPE = (2, 4, 6, 5)
SD15 = NoiseSchedule.from_config(SD15_SCHEDULER_CONFIG)
AYS = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]  # Align Your Steps' timesteps for SD 1.5


def network(x: Tensor, t: Tensor) -> Tensor:
    """Replaces the UNet: analytic, nonlinear, timestep-dependent. Its output is used as eps or v."""
    return torch.tanh(0.7 * x + t / 800) + 0.2 * torch.cos(3 * x - t / 300)


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def fresh_noise() -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(5)
    return lambda: torch.randn(SHAPE, generator=generator)


def config(prediction_type: str = "epsilon", spacing: str | None = None, **changes: Any) -> dict[str, object]:
    given = {"prediction_type": prediction_type, **({} if spacing is None else {"timestep_spacing": spacing})}
    return {**SD15_SCHEDULER_CONFIG, **given, **changes}


def reference(name: str, settings: dict[str, object], steps: int | None, **custom: object) -> Any:
    """diffusers' scheduler, created as users would: from_config with the folder's config."""
    scheduler = copy.copy(_made(name, repr(settings)))
    scheduler.set_timesteps(**(custom or {"num_inference_steps": steps}))
    return scheduler


@cache
def _made(name: str, settings: str) -> Any:
    """Made once: diffusers' DPM2 takes half a second, and set_timesteps makes it new."""
    kind, own = THEIRS[name]
    return kind.from_config({**ast.literal_eval(settings), **own})


def trajectory(scheduler: Any, **step_args: object) -> list[Tensor]:
    """Latents after each of diffusers' calls, with the noise that ours draws.

    Its coefficients are taken in float64: logarithms of float32 sigmas cancel. With two calls a step (order 2) so are
    the latents: diffusers' (x - (x - sigma * eps)) / sigma cancels at small sigmas.
    """
    dtype = torch.float64 if scheduler.order == 2 else torch.float32
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    x, out = start().to(dtype) * scheduler.init_noise_sigma, []
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # it looks for the first timestep and takes the second of two equal ones
    takes = inspect.signature(scheduler.step).parameters
    if "generator" in takes:
        step_args["generator"] = torch.Generator().manual_seed(5)
    if "eta" in takes:
        step_args.setdefault("eta", 0.0)  # as pipelines do; TCD's own is 0.3
    module = sys.modules[type(scheduler).__module__]
    with patch.object(
        module, "randn_tensor", lambda shape, generator, **_: torch.randn(shape, generator=generator), create=True
    ):
        for t in scheduler.timesteps:
            output = network(scheduler.scale_model_input(x, t), t.float())
            x = scheduler.step(output, t, x, **step_args).prev_sample
            out.append(x)
    return out


def at_the_ends(path: list[Tensor], sampler: Sampler, schedule: Schedule) -> list[Tensor]:
    """Select the latents after each step from those after each call."""
    calls: list[int] = []

    def ask(x: Tensor, call: int) -> tuple[Tensor, Tensor]:
        calls.append(call)
        return x, x

    return [path[calls[-1]] for _ in sampler.run(ask, start(), schedule, start)]


def ours(sampler: Sampler, schedule: Schedule) -> list[Tensor]:
    steps = sample(lambda x, t, sigma, index: (network(x, t), {}), start(), schedule, sampler, noise=fresh_noise())
    return [step.latents for step in steps]


def assert_same_run(schedule: Schedule, scheduler: Any, rtol: float = 1e-6) -> None:
    """Equal timesteps, including dtype, and equal sigmas; for DDIM and PNDM from diffusers' alphas_cumprod.

    Where a step has two calls (order 2), diffusers has float64 timesteps, or interpolates in float32, and keeps the
    sigmas of the first calls only.
    """
    if scheduler.order == 1:
        assert schedule.timesteps.dtype == scheduler.timesteps.dtype
        assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
    torch.testing.assert_close(schedule.timesteps.double(), scheduler.timesteps.double(), rtol=1e-6, atol=2e-4)
    if hasattr(scheduler, "sigmas"):
        sigmas = torch.tensor([*schedule.sigmas.tolist(), schedule.spans[-1][1]], dtype=torch.float32)
        expected = scheduler.sigmas[: len(sigmas) : scheduler.order]
        torch.testing.assert_close(sigmas[:: scheduler.order], expected, rtol=rtol, atol=1e-6)
        torch.testing.assert_close(schedule.init_scale, float(scheduler.init_noise_sigma), rtol=rtol, atol=0)
    else:
        abar = scheduler.alphas_cumprod[scheduler.timesteps]
        torch.testing.assert_close(schedule.sigmas.float(), ((1 - abar) / abar) ** 0.5, rtol=rtol, atol=0)
        assert schedule.init_scale == scheduler.init_noise_sigma


def assert_same_path(mine: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    """Every step within the tolerance, as max |difference| / max |expected|."""
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() <= tolerance * b.abs().max()


EPS_AND_V = [("epsilon", None), ("epsilon", "leading"), ("epsilon", "trailing"), ("v_prediction", None)]


@pytest.mark.parametrize(("prediction_type", "spacing"), EPS_AND_V)
@pytest.mark.parametrize("steps", [1, 2, 10, *(pytest.param(n, marks=pytest.mark.slow) for n in (20, 50))])
@pytest.mark.parametrize("name", list(THEIRS))
def test_every_step_equals_diffusers(name: str, prediction_type: str, steps: int, spacing: str | None) -> None:
    if name == "dpm2_ancestral" and steps == 2 and spacing is None:
        pytest.skip("from 14.6 to 0.03 diffusers' difference of squares cancels; k-diffusion's formula is below")
    settings = config(prediction_type, spacing)
    scheduler = reference(name, settings, steps)
    sampler = sampler_by_name(name)
    schedule = sampler.schedule(NoiseSchedule.from_config(settings), steps)
    assert_same_run(schedule, scheduler)
    assert_same_path(ours(sampler, schedule), at_the_ends(trajectory(scheduler), sampler, schedule))


LEVELLED = sorted(set(THEIRS) - {"ddim", "pndm", "euler_ancestral", "ddpm", "lcm", "tcd"})


@pytest.mark.parametrize("levels", ["karras", "exponential", "beta"])
@pytest.mark.parametrize(
    ("steps", "prediction_type", "spacing"),
    [
        *((steps, "epsilon", None) for steps in (1, 2, 10)),
        *(pytest.param(steps, "epsilon", None, marks=pytest.mark.slow) for steps in (20, 50)),
        *(pytest.param(10, *one, marks=pytest.mark.slow) for one in EPS_AND_V[1:]),
    ],
)
@pytest.mark.parametrize("name", LEVELLED)
def test_noise_levels_equal_diffusers(
    name: str, prediction_type: str, steps: int, spacing: str | None, levels: str
) -> None:
    if name == "dpm2_ancestral" and steps == 2:
        pytest.skip("as above")
    settings = config(prediction_type, spacing, **{f"use_{levels}_sigmas": True})
    scheduler = reference(name, settings, steps)
    sampler = sampler_by_name(f"{name} {levels}")
    schedule = sampler.schedule(NoiseSchedule.from_config(settings), steps)
    assert_same_run(schedule, scheduler, rtol=1e-5 if levels == "beta" else 1e-6)
    assert_same_path(ours(sampler, schedule), at_the_ends(trajectory(scheduler), sampler, schedule))


@pytest.mark.parametrize("name", [name for name in SAMPLERS if hasattr(sampler_by_name(name), "levels")])
def test_sgm_uniform_is_k_diffusions(name: str) -> None:
    """As in A1111: sigmas of n + 1 even timesteps, log-linear between those trained on, without the last; then 0."""
    sampler = sampler_by_name(name, "SGM Uniform", spacing="leading")
    schedule = sampler.schedule(SD15, 7)
    logs = SD15.training_sigmas().astype(float)
    expected = []
    for time in np.linspace(999, 0, 8)[:-1]:
        low, share = int(time), time - int(time)
        expected.append(math.exp((1 - share) * math.log(logs[low]) + share * math.log(logs[min(low + 1, 999)])))
    calls = len(schedule.spans)
    firsts = schedule.sigmas[:: 2 if calls == 13 else 1]
    assert firsts.tolist() == pytest.approx(expected, rel=1e-6)
    times = schedule.timesteps.double()[:: 2 if calls == 13 else 1]
    assert (times - torch.linspace(999, 0, 8, dtype=torch.float64)[:-1]).abs().max() <= (
        0.5 if schedule.space == "vp" else 1e-3
    )
    assert schedule.spans[-1][1] == pytest.approx(logs[0] if name == "deis" else 0)
    if schedule.space == "ve":
        assert schedule.init_scale == pytest.approx(expected[0], rel=1e-6)


def test_a_sampler_without_noise_levels_of_its_own() -> None:
    with pytest.raises(ValueError, match="schedule is 'beta' with sampler 'ddim'; expected one with it: deis, dpm2"):
        sampler_by_name("ddim beta")
    assert sampler_by_name("DDIM Uniform") == DDIM()
    with pytest.raises(ValueError, match="levels is 'odd'; expected one of uniform, karras"):
        Euler(levels="odd")


@pytest.mark.parametrize("name", list(THEIRS))
@pytest.mark.parametrize(
    "changes",
    [
        {"set_alpha_to_one": True},
        {"set_alpha_to_one": None},  # null is left out below: each scheduler's own default
        {"beta_schedule": "linear", "num_train_timesteps": 300, "beta_end": 0.05, "steps_offset": 0},
        {"trained_betas": np.linspace(0.002, 0.1, 120).tolist(), "num_train_timesteps": 120},
    ],
)
def test_other_configs_equal_diffusers(name: str, changes: dict[str, Any]) -> None:
    settings = {key: value for key, value in config(**changes).items() if value is not None}
    scheduler, sampler = reference(name, settings, 12), sampler_by_name(name)
    schedule = sampler.schedule(NoiseSchedule.from_config(settings), 12)
    assert_same_run(schedule, scheduler)
    assert_same_path(ours(sampler, schedule), at_the_ends(trajectory(scheduler), sampler, schedule))


@pytest.mark.parametrize("karras", [False, True])
def test_dpmpp_with_cosine_betas_equals_diffusers(karras: bool) -> None:
    """Cosine betas end at sigma 20000; with Karras sigmas diffusers truncates timesteps instead of rounding."""
    settings = config(beta_schedule="squaredcos_cap_v2", use_karras_sigmas=karras)
    sampler = DPMpp2M(levels="karras" if karras else "uniform")
    scheduler = reference("dpmpp_2m", settings, 15)
    schedule = sampler.schedule(NoiseSchedule.from_config(settings), 15)
    assert_same_run(schedule, scheduler)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 20])
def test_ddim_eta_equals_diffusers(eta: float, prediction_type: str, spacing: str, steps: int) -> None:
    settings = config(prediction_type, spacing)
    sampler = DDIM(eta=eta)
    schedule = sampler.schedule(NoiseSchedule.from_config(settings), steps)
    theirs = trajectory(reference("ddim", settings, steps), eta=eta)
    assert_same_path(ours(sampler, schedule), theirs)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", [None, "leading"])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("timesteps", [AYS, [999, 500, 1], [700]])
def test_custom_timesteps_equal_diffusers(name: str, timesteps: list[int], prediction_type: str, spacing: str) -> None:
    settings = config(prediction_type, spacing)
    scheduler, sampler = reference(name, settings, None, timesteps=timesteps), sampler_by_name(name)
    schedule = sampler.schedule(NoiseSchedule.from_config(settings), timesteps=timesteps)
    assert_same_run(schedule, scheduler)
    assert_same_path(ours(sampler, schedule), trajectory(scheduler))


@pytest.mark.parametrize("spacing", [None, "leading"])
@pytest.mark.parametrize("sigmas", [[14.615, 6.475, 2.697, 0.963, 0.029, 0.0], [9.0, 1.0, 0.2], (3.0, 0.0)])
def test_euler_custom_sigmas_equal_diffusers(sigmas: list[float], spacing: str | None) -> None:
    settings = config(spacing=spacing)
    scheduler, sampler = reference("euler", settings, None, sigmas=list(sigmas)), Euler()
    schedule = sampler.schedule(NoiseSchedule.from_config(settings), sigmas=sigmas)
    assert_same_run(schedule, scheduler)
    assert_same_path(ours(sampler, schedule), trajectory(scheduler))


def test_euler_takes_fractional_timesteps_like_diffusers() -> None:
    timesteps = [998.5, 400.25, 3.75]
    scheduler, sampler = reference("euler", config(), None, timesteps=timesteps), Euler()
    schedule = sampler.schedule(SD15, timesteps=torch.tensor(timesteps))
    assert_same_run(schedule, scheduler)
    assert_same_path(ours(sampler, schedule), trajectory(scheduler))


@pytest.mark.parametrize("sampler", [LMS(), EulerAncestral()])
@pytest.mark.parametrize("custom", [{"timesteps": AYS}, {"sigmas": [9.0, 3.0, 1.0, 0.2, 0.0]}])
def test_custom_runs_of_the_euler_family_are_eulers(sampler: Sampler, custom: dict[str, Any]) -> None:
    """Ours only: diffusers' LMS and Euler ancestral take none. Their steps on Euler's sigmas equal diffusers'."""
    schedule, euler = sampler.schedule(SD15, **custom), Euler().schedule(SD15, **custom)
    assert schedule.timesteps.tolist() == euler.timesteps.tolist()
    assert (schedule.spans, schedule.init_scale) == (euler.spans, euler.init_scale)
    scheduler = reference(sampler.name, config(), len(euler.timesteps))
    scheduler.timesteps = euler.timesteps
    scheduler.sigmas = torch.tensor([*euler.sigmas.tolist(), 0.0], dtype=torch.float32)
    assert_same_path(ours(sampler, schedule), trajectory(scheduler))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("custom", [{"timesteps": AYS}, {"sigmas": [9.0, 3.0, 1.0, 0.2, 0.0]}])
def test_custom_ddim_is_euler_in_other_units(prediction_type: str, custom: dict[str, Any]) -> None:
    """Ours only. Without fresh noise a DDIM step is Euler's in x / sqrt(abar) (Song et al. 2021, eq. 13)."""
    noise = replace(SD15, prediction_type=prediction_type, set_alpha_to_one=True)
    schedule, euler = DDIM().schedule(noise, **custom), Euler().schedule(noise, **custom)
    torch.testing.assert_close(schedule.timesteps.float(), euler.timesteps, rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.sigmas, euler.sigmas, rtol=1e-6, atol=0)
    given = replace(schedule, init_scale=euler.init_scale * math.sqrt(schedule.abar(0)))
    ends = [1 / math.sqrt(1 + end**2) for _, end in schedule.spans]
    theirs = [x * end for x, end in zip(ours(Euler(), euler), ends, strict=True)]
    assert_same_path(ours(DDIM(), given), theirs)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_custom_ddim_timesteps_end_where_the_config_says(set_alpha_to_one: bool) -> None:
    noise = replace(SD15, set_alpha_to_one=set_alpha_to_one)
    final = 0.0 if set_alpha_to_one else pytest.approx(0.0291675, abs=5e-8)
    assert DDIM().schedule(noise, timesteps=[900, 10]).spans[-1][1] == final
    same, plain = DDIM().schedule(noise, timesteps=range(981, 0, -20)), DDIM().schedule(noise, 50)
    assert same.spans == plain.spans


@pytest.mark.parametrize("levels", ["uniform", "karras"])
def test_custom_dpmpp_sigmas_step_as_the_same_sigmas_do(levels: str) -> None:
    """Ours only: diffusers' DPM++ takes no sigmas. Timesteps are rounded, as with Karras sigmas."""
    plain = DPMpp2M(levels=levels).schedule(SD15, 12)
    schedule = DPMpp2M().schedule(SD15, sigmas=[*plain.sigmas.tolist(), 0.0])
    assert schedule.spans == plain.spans
    assert schedule.timesteps.tolist() == plain.timesteps.tolist()
    assert DPMpp2M().schedule(SD15, sigmas=[5.0, 1.0, 0.25]).spans == ((5.0, 1.0), (1.0, 0.25))


def test_euler_ancestral_karras_is_eulers_run_with_ancestral_steps() -> None:
    """Ours only. Each step adds back the variance removed beyond its target: down^2 + up^2 = end^2."""
    sampler, euler = EulerAncestral(levels="karras"), Euler(levels="karras").schedule(SD15, 10)
    schedule = sampler.schedule(SD15, 10)
    assert schedule.spans == euler.spans
    x, eps, unit = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (2.0, 0.3, 1.0))
    run = sampler.run(lambda x, call: (x, eps), x, schedule, lambda: unit)
    for moved, (begin, end) in zip(run, schedule.spans, strict=True):
        up = math.sqrt(end**2 * (begin**2 - end**2) / begin**2)
        down = math.sqrt(end**2 - up**2)
        torch.testing.assert_close(moved, x + (down - begin) * eps + up * unit)
        x = moved


def k_diffusion(name: str, schedule: Schedule, firsts: list[int]) -> list[Tensor]:
    """sample_dpm_2_ancestral and sample_dpmpp_2s_ancestral of k-diffusion, eta 1, in float64; eps and v alike."""

    def denoised(x: Tensor, sigma: float, t: float) -> Tensor:
        output = network(x / math.sqrt(sigma**2 + 1), torch.tensor(t))
        if schedule.prediction_type == "epsilon":
            return x - sigma * output
        return x / (sigma**2 + 1) - sigma / math.sqrt(sigma**2 + 1) * output

    x, out, noise = start().double() * schedule.init_scale, [], fresh_noise()
    levels = [*schedule.sigmas[firsts].tolist(), schedule.spans[-1][1]]
    for call, sigma, to in zip(firsts, levels, levels[1:], strict=False):
        up = math.sqrt(to**2 * (sigma**2 - to**2) / sigma**2)
        down = math.sqrt(to**2 - up**2)
        clean = denoised(x, sigma, schedule.timesteps[call].item())
        if down == 0:
            x = x + (x - clean) / sigma * (down - sigma)
        else:
            middle = math.exp((math.log(sigma) + math.log(down)) / 2)
            t = timesteps_at(SD15, np.array([middle])).item()
            if name == "dpm2_ancestral":
                half = x + (x - clean) / sigma * (middle - sigma)
                x = x + (half - denoised(half, middle, t)) / middle * (down - sigma)
            else:
                h = math.log(sigma) - math.log(down)
                half = middle / sigma * x - math.expm1(-h / 2) * clean
                x = down / sigma * x - math.expm1(-h) * denoised(half, middle, t)
        if to > 0:
            x = x + noise() * up
        out.append(x)
    return out


@pytest.mark.parametrize("levels", ["uniform", "karras"])
@pytest.mark.parametrize("steps", [1, 2, 10, *(pytest.param(n, marks=pytest.mark.slow) for n in (20, 50))])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["dpm2_ancestral", "dpmpp_2s_ancestral"])
def test_ancestral_steps_of_two_calls_equal_k_diffusions(
    name: str, prediction_type: str, steps: int, levels: str
) -> None:
    sampler, noise = sampler_by_name(name, levels), replace(SD15, prediction_type=prediction_type)
    schedule = sampler.schedule(noise, steps)
    firsts = [2 * step for step in range(steps)]
    assert_same_path(ours(sampler, schedule), k_diffusion(name, schedule, firsts), 2e-5)


@pytest.mark.parametrize("name", ["heun", "dpm2", "dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"])
def test_two_calls_a_step(name: str) -> None:
    """The last step to 0 has one; one that a caller's sigmas end above 0 has two, as the others."""
    sampler = sampler_by_name(name)
    assert len(sampler.schedule(SD15, 10).spans) == 19
    schedule = sampler.schedule(SD15, sigmas=[9.0, 3.0, 1.0])
    middles = [math.sqrt(27), math.sqrt(3)] if name in ("dpm2", "dpmpp_sde") else [3.0, 1.0]
    assert schedule.sigmas.tolist() == [9.0, middles[0], 3.0, middles[1]]
    assert schedule.spans == ((9.0, middles[0]), (middles[0], 3.0), (3.0, middles[1]), (middles[1], 1.0))
    assert all(x.isfinite().all() for x in ours(sampler, schedule))


def test_dpmpp_sde_draws_one_brownian_motion() -> None:
    """Over a step the noise of the middle and that of the end have the covariance of W at two times."""
    sampler, draws = sampler_by_name("dpmpp_sde"), iter(np.eye(2))
    schedule = sampler.schedule(SD15, sigmas=[4.0, 1.0])
    seen: list[Tensor] = []

    def ask(x: Tensor, call: int) -> tuple[Tensor, Tensor]:
        seen.append(x)
        return x, torch.zeros_like(x)  # eps 0: x is clean, and only noise moves it

    x = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    (end,) = sampler.run(ask, x, schedule, lambda: torch.from_numpy(next(draws)).reshape(1, 1, 1, 2))
    half = torch.tensor([math.sqrt(4 - 1), 0], dtype=torch.float64)  # the middle is 2, down from there 1
    torch.testing.assert_close(seen[1].flatten(), half)
    walked = torch.tensor([math.sqrt(2), 1], dtype=torch.float64)  # W(4) - W(2), W(2) - W(1), together of variance 3
    down, up = 1 / 4, math.sqrt(1 - 1 / 16)
    torch.testing.assert_close(end.flatten(), half * (1 - down / 4) + up / math.sqrt(3) * walked)


def test_pndm_timesteps_of_the_facts() -> None:
    """51 calls at 50 steps, 21 at 20, the second timestep twice."""
    fifty, twenty = PNDM().schedule(SD15, 50), PNDM().schedule(SD15, 20)
    assert fifty.timesteps.tolist() == [981, 961, *range(961, 0, -20)]
    assert twenty.timesteps.tolist() == [951, 901, *range(901, 0, -50)]
    assert (fifty.steps, twenty.steps) == (50, 20)
    assert DDIM().schedule(SD15, 50).timesteps.tolist() == [*range(981, 0, -20)]
    assert len(PNDM(spacing="trailing").schedule(SD15, 1).spans) == 1


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_coefficients_integrate_the_lagrange_basis(order: int) -> None:
    nodes = [14.6, 9.1, 5.0, 2.7][-order:]
    for i, weight in enumerate(lagrange_integrals(nodes, 2.7, 1.1)):
        others = [node for j, node in enumerate(nodes) if j != i]
        basis = np.polynomial.Polynomial.fromroots(others) if others else np.polynomial.Polynomial([1.0])
        integral = basis.integ()
        assert weight == pytest.approx((integral(1.1) - integral(2.7)) / basis(nodes[i]), rel=1e-9)


@pytest.mark.parametrize("end", [1.1, 0.0])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_weights_integrate_the_lagrange_basis_in_log_sigma(order: int, end: float) -> None:
    nodes = [2.7, 5.0, 9.1][:order]
    grid = np.linspace(max(end, 1e-9) ** 0.25, 2.7**0.25, 20_001) ** 4  # dense near 0
    for i, weight in enumerate(log_integrals(nodes, 2.7, end)):
        basis = np.ones_like(grid)
        for other in nodes[:i] + nodes[i + 1 :]:
            basis *= np.log(grid / other) / math.log(nodes[i] / other)
        assert weight == pytest.approx(-np.trapezoid(basis, grid), rel=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_lms_order_equals_diffusers(order: int) -> None:
    sampler = LMS(order=order)
    theirs = trajectory(reference("lms", config(), 10), order=order)
    assert_same_path(ours(sampler, sampler.schedule(SD15, 10)), theirs)


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("steps", [2, 10, 20])
@pytest.mark.parametrize(
    ("sampler", "changes"),
    [
        (DEIS(order=1), {"solver_order": 1}),
        (DEIS(order=3), {"solver_order": 3}),
        (UniPC(order=1), {"solver_order": 1}),
        (UniPC(order=3), {"solver_order": 3}),
        (UniPC(order=3, solver="bh1"), {"solver_order": 3, "solver_type": "bh1"}),
    ],
)
def test_solvers_of_other_orders_equal_diffusers(
    sampler: Any, changes: dict[str, object], steps: int, karras: bool
) -> None:
    kind, _ = THEIRS[sampler.name]
    settings = config(_class_name=kind.__name__, use_karras_sigmas=karras, **changes)
    scheduler = reference(sampler.name, settings, steps)
    sampler = replace(sampler, levels="karras" if karras else "uniform")
    noise = NoiseSchedule.from_config(settings)
    assert noise.sampler == sampler
    mine, theirs = ours(sampler, sampler.schedule(noise, steps)), trajectory(scheduler)
    last = steps - 1 if getattr(sampler, "solver", "") == "bh1" else steps  # where diffusers multiplies 0 by infinity
    assert_same_path(mine[:last], theirs[:last])
    assert mine[-1].isfinite().all()


@pytest.mark.parametrize("steps", [1, 2, 4, 8, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_tcd_eta_equals_diffusers(eta: float, steps: int) -> None:
    schedule = TCD(eta=eta).schedule(SD15, steps)
    scheduler = reference("tcd", config(), steps)
    assert_same_path(ours(TCD(eta=eta), schedule), trajectory(scheduler, eta=eta))


@pytest.mark.parametrize("kind", [LCM, TCD])
@pytest.mark.parametrize("changes", [{"original_inference_steps": 100}, {"timestep_scaling": 0.01}])
def test_settings_of_distilled_models_equal_diffusers(kind: Any, changes: dict[str, object]) -> None:
    """A small scaling lets LCM's boundary condition be seen."""
    settings = config(_class_name=THEIRS[kind.name][0].__name__, **changes)
    noise, scheduler = NoiseSchedule.from_config(settings), reference(kind.name, settings, 4)
    assert isinstance(noise.sampler, kind)
    schedule = noise.sampler.schedule(noise, 4)
    assert_same_run(schedule, scheduler)
    assert_same_path(ours(noise.sampler, schedule), trajectory(scheduler))


@pytest.mark.parametrize("sampler", [LCM(), TCD(), TCD(eta=0.5), DDPM()])
def test_custom_timesteps_of_those_that_step_exactly_equal_diffusers(sampler: Sampler) -> None:
    timesteps = [999, 779, 259, 19]
    scheduler = reference(sampler.name, config(), None, timesteps=timesteps)
    schedule = sampler.schedule(SD15, timesteps=timesteps)
    assert_same_run(schedule, scheduler)
    given = {"eta": sampler.eta} if isinstance(sampler, TCD) else {}
    assert_same_path(ours(sampler, schedule), trajectory(scheduler, **given))


def test_distilled_timesteps() -> None:
    """4 of 50; or spaced as asked, whatever the model's config says."""
    leading = replace(SD15, timestep_spacing="leading")
    assert LCM().schedule(leading, 4).timesteps.tolist() == [999, 759, 499, 259]
    assert TCD(spacing="trailing").schedule(leading, 4).timesteps.tolist() == [999, 749, 499, 249]
    for sampler in (LCM(), TCD()):
        with pytest.raises(ValueError, match="60 steps with original_steps 50 and 1000 .* expected at most"):
            sampler.schedule(SD15, 60)
        assert len(replace(sampler, original_steps=100).schedule(SD15, 60).spans) == 60
    with pytest.raises(ValueError, match=r"tcd takes no sigmas.* pass timesteps"):
        TCD().schedule(SD15, sigmas=[9.0, 1.0, 0.0])
    assert LCM().schedule(SD15, sigmas=[9.0, 1.0, 0.0]).spans == ((9.0, 1.0), (1.0, 0.0))


def test_ddpm_is_ddim_with_eta_1() -> None:
    mine = ours(DDPM(), DDPM().schedule(SD15, sigmas=[9.0, 3.0, 1.0, 0.2, 0.0]))
    assert_same_path(mine, ours(DDIM(eta=1), DDIM().schedule(SD15, sigmas=[9.0, 3.0, 1.0, 0.2, 0.0])))


def test_dpmpp_3m_sde_equals_k_diffusions() -> None:
    """sample_dpmpp_3m_sde of k-diffusion, eta 1, in float64."""
    sampler = sampler_by_name("dpmpp_3m_sde")
    schedule = sampler.schedule(SD15, 12)
    noise, out = fresh_noise(), []
    x = start().double() * math.sqrt(schedule.spans[0][0] ** 2 + 1)  # k-diffusion's x is variance exploding
    clean_1, clean_2, h_1, h_2 = x, x, 0.0, 0.0
    for i, (sigma, to) in enumerate(schedule.spans):
        clean = x - sigma * network(x / math.sqrt(sigma**2 + 1), schedule.timesteps[i].float())
        if to == 0:
            x = clean
        else:
            h = math.log(sigma / to)
            x = math.exp(-2 * h) * x - math.expm1(-2 * h) * clean
            phi_2 = math.expm1(-2 * h) / (2 * h) + 1
            if i > 1:
                r0, r1 = h_1 / h, h_2 / h
                d1_0, d1_1 = (clean - clean_1) / r0, (clean_1 - clean_2) / r1
                d1, d2 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1), (d1_0 - d1_1) / (r0 + r1)
                x = x + phi_2 * d1 - (phi_2 / (2 * h) - 0.5) * d2
            elif i > 0:
                x = x + phi_2 * (clean - clean_1) / (h_1 / h)
            x = x + noise() * to * math.sqrt(-math.expm1(-2 * h))
            h_1, h_2 = h, h_1
        clean_1, clean_2 = clean, clean_1
        out.append(x / math.sqrt(to**2 + 1))
    assert_same_path(ours(sampler, schedule), out)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if not sampler_by_name(name).stochastic])
def test_guidance_at_any_step_reaches_the_result(name: str) -> None:
    """With a network that predicts nothing, a displacement goes on as it is, about so where a solver extrapolates."""
    sampler = sampler_by_name(name)
    schedule, push = sampler.schedule(SD15, 20), 0.1 * torch.cos(start())

    def last(moved: int) -> tuple[Tensor, float]:
        at = {}

        def refine(x: Tensor, t: Tensor, abar: float, index: int) -> Tensor:
            if index != moved or index in at:
                return x
            at[index] = abar
            return x + push

        def nothing(x: Tensor, t: Tensor, sigma: float, index: int) -> tuple[Tensor, Any]:
            return torch.zeros_like(x), {}

        run = list(sample(nothing, start(), schedule, sampler, refine))
        return run[-1].latents, at.get(moved, 1.0)

    plain, _ = last(-1)
    for moved in (1, 2, 5, 6):
        found, abar = last(moved)
        expected = push / math.sqrt(abar)
        share = ((found - plain) * expected).sum() / (expected**2).sum()
        assert 0.7 < share < 1.6, (moved, share)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_keeps_nothing(name: str) -> None:
    """Two interleaved runs with one object: each is bit-equal to the run alone."""
    sampler = sampler_by_name(name)
    long, short = sampler.schedule(SD15, 9), sampler.schedule(SD15, 6)
    alone = ours(sampler, long), ours(sampler, short)
    runs = [
        sample(lambda x, t, sigma, index: (network(x, t), {}), start(), schedule, sampler, noise=fresh_noise())
        for schedule in (long, short)
    ]
    turns: tuple[list[Tensor], list[Tensor]] = ([], [])
    for i in range(9):
        for run, out in zip(runs, turns, strict=True):
            out.extend(step.latents for step in ([next(run)] if i < 6 or run is runs[0] else []))
    for one, other in zip(alone, turns, strict=True):
        assert len(one) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_changes_nothing_in_place(name: str) -> None:
    sampler = sampler_by_name(name)
    schedule, x, given = sampler.schedule(SD15, 6), start(), []

    def ask(x: Tensor, call: int) -> tuple[Tensor, Tensor]:
        output = network(x, schedule.timesteps[call].float())
        given.extend((value, value.clone()) for value in (x, output))
        return x, output

    after = [(x, x.clone()) for x in sampler.run(ask, x, schedule, fresh_noise())]
    assert torch.equal(x, start())
    assert all(torch.equal(value, before) for value, before in given + after)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_is_called_as_its_file(name: str) -> None:
    assert sampler_by_name(name).name == name


def test_names() -> None:
    assert sampler_by_name("ddim") == DDIM()
    assert sampler_by_name("lms_karras") == sampler_by_name("LMS", schedule="karras") == LMS(levels="karras")
    assert sampler_by_name("Euler a", schedule="karras") == EulerAncestral(levels="karras")
    assert sampler_by_name("DPM++ 2M Karras", spacing="leading") == DPMpp2M(levels="karras", spacing="leading")
    with pytest.raises(ValueError, match="sampler 'restart' is Restart, which is not implemented; expected one of"):
        sampler_by_name("restart")
    with pytest.raises(
        ValueError,
        match=r"schedule is 'karras' with sampler 'ddim'; expected .*: deis, dpm2, .*, dpmpp_2m, .*euler, euler_anc",
    ):
        sampler_by_name("ddim_karras")
    with pytest.raises(ValueError, match="schedule is 'uniform' but the sampler is 'dpmpp_2m_karras'"):
        sampler_by_name("dpmpp_2m_karras", schedule="uniform")
    with pytest.raises(ValueError, match=r"schedule is 'odd'; expected one of uniform, karras"):
        sampler_by_name("euler", "odd")


@pytest.mark.parametrize(
    ("changes", "sampler"),
    [
        ({}, PNDM()),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, DPMpp2M(levels="karras")),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, Euler(levels="karras")),
        ({"_class_name": "LMSDiscreteScheduler", "use_karras_sigmas": True}, LMS(levels="karras")),
        ({"_class_name": "EulerAncestralDiscreteScheduler", "use_karras_sigmas": True}, EulerAncestral()),
    ],
)
def test_the_configs_sampler_is_chosen_as_it_is(changes: dict[str, Any], sampler: Sampler) -> None:
    assert choose_sampler(NoiseSchedule.from_config(config(**changes)), None) == sampler


def test_what_is_asked_changes_the_models_own_sampler() -> None:
    noise = NoiseSchedule.from_config(config(_class_name="DPMSolverMultistepScheduler", use_karras_sigmas=True))
    assert choose_sampler(noise, None, spacing="leading") == DPMpp2M(levels="karras", spacing="leading")
    assert choose_sampler(noise, None, schedule="uniform") == DPMpp2M()
    assert choose_sampler(noise, LMS(order=2), schedule="karras") == LMS(order=2, levels="karras")
    assert choose_sampler(noise, DDIM(), eta=np.float32(0.5)) == DDIM(eta=0.5)
    assert choose_sampler(noise, None, "euler") == Euler()
    with pytest.raises(ValueError, match=r"eta is 0.5 with sampler 'dpmpp_2m'; expected one with it: ddim"):
        choose_sampler(noise, None, eta=0.5)


def test_an_object_brings_its_own_settings() -> None:
    assert choose_sampler(SD15, None, LMS(order=2, levels="karras"), "karras") == LMS(order=2, levels="karras")
    with pytest.raises(ValueError, match="got schedule='uniform', spacing=None and eta=0.0 with a sampler object"):
        choose_sampler(SD15, None, Euler(levels="karras"), "uniform")
    for wrong in (Euler, 3):
        with pytest.raises(ValueError, match="sampler is .*; expected a name such as 'ddim', or a sampler object"):
            choose_sampler(SD15, None, wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sampler",
    [
        *(sampler_by_name(name) for name in SAMPLERS),
        *(sampler_by_name(name, schedule="karras", spacing="trailing") for name in ("euler", "lms", "dpmpp_2m")),
        DDIM(eta=0.3, spacing="linspace"),
        LMS(order=2, levels="karras"),
    ],
)
def test_the_fields_of_a_sampler_give_it_again(sampler: Sampler) -> None:
    fields: Any = sampler_fields(sampler)
    assert choose_sampler(SD15, DPMpp2M(levels="karras"), **fields) == sampler
    assert isinstance(fields["sampler"], str) == (sampler != LMS(order=2, levels="karras"))


def test_a_config_whose_sampler_is_not_implemented() -> None:
    noise = NoiseSchedule.from_config(config(_class_name="IPNDMScheduler"))
    with pytest.raises(ValueError, match="config names 'IPNDMScheduler', which is not implemented; name a"):
        choose_sampler(noise, None)
    assert choose_sampler(noise, None, "lms") == LMS()
    with pytest.raises(ValueError, match=r"the scheduler config names no scheduler \(it has no _class_name\)"):
        choose_sampler(NoiseSchedule.from_config({}), None)


def test_thresholding_refuses_the_samplers_that_heed_it() -> None:
    noise = NoiseSchedule.from_config(config(_class_name="DDIMScheduler", thresholding=True))
    with pytest.raises(ValueError, match="config names DDIMScheduler with thresholding True, which is not implemented"):
        choose_sampler(noise, None)
    for name, (kind, _) in THEIRS.items():
        if "thresholding" in kind().config:
            with pytest.raises(ValueError, match=f"sets thresholding, which is not .*affect {name}; use .*lms"):
                choose_sampler(noise, None, name)
    assert choose_sampler(noise, None, "euler") == Euler()


ZERO_SNR = [
    name for name, (kind, _) in THEIRS.items() if "rescale_betas_zero_snr" in inspect.signature(kind).parameters
]


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 10, *(pytest.param(n, marks=pytest.mark.slow) for n in (20, 50))])
@pytest.mark.parametrize("name", ZERO_SNR)
def test_zero_terminal_snr_equals_diffusers(name: str, steps: int, spacing: str) -> None:
    settings = config("v_prediction", spacing, rescale_betas_zero_snr=True)
    noise, scheduler = NoiseSchedule.from_config(settings), reference(name, settings, steps)
    sampler = choose_sampler(noise, None, name)
    schedule = sampler.schedule(noise, steps)
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
    if hasattr(scheduler, "sigmas"):
        torch.testing.assert_close(schedule.sigmas.float(), scheduler.sigmas[:-1], rtol=1e-6, atol=1e-6)
    if spacing == "trailing" or steps > 1:
        assert schedule.abar(0) < 1e-7
    assert torch.equal(noise.up_to_pure_noise(0).alphas_cumprod[:-1], scheduler.alphas_cumprod[:-1])
    # the first step of Euler goes from 4096 to 14 or less: in float32, x is known to 4096 * 2^-24 there
    fine = 1e-5 if schedule.space == "vp" or (steps == 1 and spacing == "linspace") else 1e-3
    assert_same_path(ours(sampler, schedule), trajectory(scheduler), fine)


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_euler_from_zero_terminal_snr_is_exact_but_for_rounding(steps: int) -> None:
    """The formula in float64, where a step from 4096 to 14 cancels nothing."""
    noise = NoiseSchedule.from_config(config("v_prediction", "trailing", rescale_betas_zero_snr=True))
    schedule = Euler().schedule(noise, steps)
    run = sample(lambda x, t, sigma, index: (network(x, t), {}), start().double(), schedule, Euler())
    x = start().double() * schedule.init_scale
    for step, t, (sigma, to) in zip(run, schedule.timesteps, schedule.spans, strict=True):
        clean = x / (sigma**2 + 1) - sigma / math.sqrt(sigma**2 + 1) * network(x / math.sqrt(sigma**2 + 1), t)
        x = clean + to / sigma * (x - clean)
        assert (step.latents - x).abs().max() <= 1e-9 * x.abs().max()


def test_what_zero_terminal_snr_needs() -> None:
    settings = config(_class_name="DDIMScheduler", rescale_betas_zero_snr=True)
    noise = NoiseSchedule.from_config({**settings, "prediction_type": "v_prediction"})
    assert choose_sampler(noise, None) == DDIM()
    for name in {name.removesuffix("_cfg_pp") for name in SAMPLERS} - set(ZERO_SNR):
        with pytest.warns(UserWarning, match=f"trained up to pure noise .*, but {name} starts below it"):
            chosen = choose_sampler(noise, None, name)
        assert chosen.schedule(noise, 5).sigmas.max() < 14.7
    with pytest.raises(ValueError, match=r"rescale_betas_zero_snr with prediction_type 'epsilon'.*v_prediction"):
        choose_sampler(NoiseSchedule.from_config(settings), None)


@pytest.mark.parametrize("eta", [-0.1, 1.5, math.nan, "1", True])
def test_bad_eta(eta: Any) -> None:
    with pytest.raises(ValueError, match="eta is .*; expected a number from 0"):
        DDIM(eta=eta)


@pytest.mark.parametrize("order", [0, 5, True, 2.0, "2"])
def test_bad_order(order: Any) -> None:
    with pytest.raises(ValueError, match="order is .*; expected 1, 2, 3 or 4"):
        LMS(order=order)


@pytest.mark.parametrize("make", [DDIM, PNDM, Euler, EulerAncestral, LMS, DPMpp2M])
def test_bad_spacing(make: Callable[..., Sampler]) -> None:
    with pytest.raises(ValueError, match="spacing is 'even'; expected one of leading, linspace, trailing"):
        make(spacing="even")


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    assert LMS(order=np.int64(2)) == LMS(order=torch.tensor(2)) == LMS(order=2)  # type: ignore[arg-type]
    assert DDIM(eta=np.float32(0.5)) == DDIM(eta=torch.tensor(0.5)) == DDIM(eta=0.5)  # type: ignore[arg-type]
    for values in (np.array(AYS), torch.tensor(AYS), tuple(AYS), [np.int64(t) for t in AYS]):
        assert (
            Euler().schedule(SD15, np.int64(10), timesteps=values).spans == Euler().schedule(SD15, timesteps=AYS).spans
        )


def test_as_many_linspace_steps_as_timesteps() -> None:
    """diffusers repeats a timestep, divides by zero and continues with NaN; ours skips the step."""
    scheduler, schedule = reference("dpmpp_2m", config(), 1000), DPMpp2M().schedule(SD15, 1000)
    assert_same_run(schedule, scheduler)
    path = ours(DPMpp2M(), schedule)
    first = next(i for i, (begin, end) in enumerate(schedule.spans) if begin == end)
    assert torch.equal(path[first], path[first - 1])
    assert_same_path(path[: first + 1], trajectory(scheduler)[: first + 1])
    assert path[-1].isfinite().all()
    assert (path[-1] - ours(DPMpp2M(), DPMpp2M().schedule(SD15, 999))[-1]).abs().max() <= 2e-3
    assert DDIM(spacing="linspace").schedule(SD15, 1000).timesteps.tolist() == [*range(999, -1, -1)]
