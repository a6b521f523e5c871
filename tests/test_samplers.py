"""minidiff.sampling.samplers against diffusers 0.42.1: timesteps, sigmas and whole trajectories in float32.

Where diffusers has no counterpart (custom timesteps outside Euler and DPM++, Karras sigmas for Euler ancestral) the
formula is tested instead. No combination below makes diffusers crash; one step of linspace or leading starts at t = 0
or 1 and gives noise, which is reproduced, with a warning (test_schedule.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from minidiff.sampling import (
    DDIM,
    LMS,
    PNDM,
    SAMPLERS,
    SD15_SCHEDULER_CONFIG,
    DPMpp2M,
    Euler,
    EulerAncestral,
    History,
    NoiseSchedule,
    Sampler,
    Schedule,
    default_sampler,
    sample,
    sampler_by_name,
)
from minidiff.sampling.samplers import lagrange_integrals

pytestmark = [
    pytest.mark.filterwarnings("ignore:one step with"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers with numpy 2
]

SHAPE = (2, 4, 6, 5)
SD15 = NoiseSchedule.from_config(SD15_SCHEDULER_CONFIG)
THEIRS: dict[str, Any] = {
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}
AYS = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]  # Align Your Steps' timesteps for SD 1.5


def network(x: Tensor, t: Tensor) -> Tensor:
    """Stands for the UNet: analytic, nonlinear, different at every timestep. Its output is taken as eps or as v."""
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
    """diffusers' scheduler, as a user swaps it in: from_config of the folder's config."""
    scheduler = THEIRS[name].from_config(settings)
    scheduler.set_timesteps(**(custom or {"num_inference_steps": steps}))
    return scheduler


def trajectory(scheduler: Any, **step_args: object) -> list[Tensor]:
    """Latents after each of diffusers' calls."""
    x, out = start() * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t.float())
        x = scheduler.step(output, t, x, **step_args).prev_sample
        out.append(x)
    return out


def ours(sampler: Sampler, schedule: Schedule) -> list[Tensor]:
    steps = sample(lambda x, t: (network(x, t), {}), start(), schedule, sampler, noise=fresh_noise())
    return [step.latents for step in steps]


def assert_same_run(schedule: Schedule, scheduler: Any, rtol: float = 1e-6) -> None:
    """Equal timesteps, dtype included, and equal sigmas; DDIM's and PNDM's are those of diffusers' alphas_cumprod."""
    assert schedule.timesteps.dtype == scheduler.timesteps.dtype
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
    if hasattr(scheduler, "sigmas"):
        sigmas = torch.tensor([*schedule.sigmas.tolist(), schedule.spans[-1][1]], dtype=torch.float32)
        torch.testing.assert_close(sigmas, scheduler.sigmas, rtol=rtol, atol=1e-6)
        torch.testing.assert_close(schedule.init_scale, float(scheduler.init_noise_sigma), rtol=rtol, atol=0)
    else:
        abar = scheduler.alphas_cumprod[scheduler.timesteps]
        torch.testing.assert_close(schedule.sigmas.float(), ((1 - abar) / abar) ** 0.5, rtol=rtol, atol=0)
        assert schedule.init_scale == scheduler.init_noise_sigma


def assert_same_path(mine: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    """Every step within tolerance, largest difference over largest value."""
    assert len(mine) == len(theirs)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("spacing", [None, "leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 10, 20, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", list(THEIRS))
def test_every_step_equals_diffusers(name: str, prediction_type: str, steps: int, spacing: str | None) -> None:
    settings = config(prediction_type, spacing)
    scheduler = reference(name, settings, steps)
    sampler = sampler_by_name(name)
    schedule = sampler.schedule(NoiseSchedule.from_config(settings), steps)
    assert_same_run(schedule, scheduler)
    given = {"generator": torch.Generator().manual_seed(5)} if name == "euler_ancestral" else {}
    theirs = trajectory(scheduler, **given)
    assert_same_path(ours(sampler, schedule), theirs[1:] if name == "pndm" and steps > 1 else theirs)


@pytest.mark.parametrize("spacing", [None, "leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["euler", "lms", "dpmpp_2m"])
def test_karras_equals_diffusers(name: str, prediction_type: str, steps: int, spacing: str | None) -> None:
    settings = config(prediction_type, spacing, use_karras_sigmas=True)
    scheduler = reference(name, settings, steps)
    sampler = sampler_by_name(f"{name}_karras")
    schedule = sampler.schedule(NoiseSchedule.from_config(settings), steps)
    assert_same_run(schedule, scheduler)
    assert_same_path(ours(sampler, schedule), trajectory(scheduler))


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
    given = {"generator": torch.Generator().manual_seed(5)} if name == "euler_ancestral" else {}
    schedule = sampler.schedule(NoiseSchedule.from_config(settings), 12)
    assert_same_run(schedule, scheduler)
    assert_same_path(ours(sampler, schedule), trajectory(scheduler, **given)[1 if name == "pndm" else 0 :])


@pytest.mark.parametrize("karras", [False, True])
def test_dpmpp_with_cosine_betas_equals_diffusers(karras: bool) -> None:
    """Cosine betas end at sigma 20000; with Karras sigmas diffusers cuts the timesteps' fraction off, not rounds."""
    settings = config(beta_schedule="squaredcos_cap_v2", use_karras_sigmas=karras)
    scheduler, sampler = reference("dpmpp_2m", settings, 15), DPMpp2M(karras=karras)
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
    theirs = trajectory(reference("ddim", settings, steps), eta=eta, generator=torch.Generator().manual_seed(5))
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
    """Ours: diffusers' LMS and Euler ancestral take none. Their steps on Euler's sigmas are diffusers' steps."""
    schedule, euler = sampler.schedule(SD15, **custom), Euler().schedule(SD15, **custom)
    assert schedule.timesteps.tolist() == euler.timesteps.tolist()
    assert (schedule.spans, schedule.init_scale) == (euler.spans, euler.init_scale)
    scheduler = reference(sampler.name, config(), len(euler.timesteps))
    scheduler.timesteps = euler.timesteps
    scheduler.sigmas = torch.tensor([*euler.sigmas.tolist(), 0.0], dtype=torch.float32)
    given = {"generator": torch.Generator().manual_seed(5)} if sampler.stochastic else {}
    assert_same_path(ours(sampler, schedule), trajectory(scheduler, **given))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("custom", [{"timesteps": AYS}, {"sigmas": [9.0, 3.0, 1.0, 0.2, 0.0]}])
def test_custom_ddim_is_euler_in_other_units(prediction_type: str, custom: dict[str, Any]) -> None:
    """Ours. Without fresh noise a DDIM step is Euler's in x / sqrt(abar) (Song et al. 2021, eq. 13)."""
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


@pytest.mark.parametrize("karras", [False, True])
def test_custom_dpmpp_sigmas_step_as_the_same_sigmas_do(karras: bool) -> None:
    """Ours: diffusers' DPM++ takes no sigmas. Timesteps are rounded, as with Karras sigmas."""
    plain = DPMpp2M(karras=karras).schedule(SD15, 12)
    schedule = DPMpp2M().schedule(SD15, sigmas=[*plain.sigmas.tolist(), 0.0])
    assert schedule.spans == plain.spans
    assert schedule.timesteps.tolist() == plain.timesteps.tolist()
    assert DPMpp2M().schedule(SD15, sigmas=[5.0, 1.0, 0.25]).spans == ((5.0, 1.0), (1.0, 0.25))


def test_euler_ancestral_karras_is_eulers_run_with_ancestral_steps() -> None:
    """Ours: diffusers has none. Each step adds back the variance it overshot: down^2 + up^2 = end^2."""
    sampler, euler = EulerAncestral(karras=True), Euler(karras=True).schedule(SD15, 10)
    schedule = sampler.schedule(SD15, 10)
    assert schedule.spans == euler.spans
    x, eps, unit = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (2.0, 0.3, 1.0))
    for call, (begin, end) in enumerate(schedule.spans):
        up = math.sqrt(end**2 * (begin**2 - end**2) / begin**2)
        down = math.sqrt(end**2 - up**2)
        moved, _ = sampler.step(x, eps, call, schedule, History(), lambda: unit)
        torch.testing.assert_close(moved, x + (down - begin) * eps + up * unit)


def test_pndm_timesteps_of_the_facts() -> None:
    """facts/sd15.md: 51 calls at 50 steps, 21 at 20, the second timestep twice."""
    fifty, twenty = PNDM().schedule(SD15, 50), PNDM().schedule(SD15, 20)
    assert fifty.timesteps.tolist() == [981, 961, *range(961, 0, -20)]
    assert twenty.timesteps.tolist() == [951, 901, *range(901, 0, -50)]
    assert fifty.index == (0, *range(50))
    assert (fifty.steps, twenty.steps) == (50, 20)
    assert DDIM().schedule(SD15, 50).timesteps.tolist() == [*range(981, 0, -20)]
    assert PNDM(spacing="trailing").schedule(SD15, 1).index == (0,)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_coefficients_integrate_the_lagrange_basis(order: int) -> None:
    nodes = [14.6, 9.1, 5.0, 2.7][-order:]
    for i, weight in enumerate(lagrange_integrals(nodes, 2.7, 1.1)):
        others = [node for j, node in enumerate(nodes) if j != i]
        basis = np.polynomial.Polynomial.fromroots(others) if others else np.polynomial.Polynomial([1.0])
        integral = basis.integ()
        assert weight == pytest.approx((integral(1.1) - integral(2.7)) / basis(nodes[i]), rel=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_lms_order_equals_diffusers(order: int) -> None:
    sampler = LMS(order=order)
    theirs = trajectory(reference("lms", config(), 10), order=order)
    assert_same_path(ours(sampler, sampler.schedule(SD15, 10)), theirs)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_sampler_keeps_nothing(name: str) -> None:
    """One object, two runs taken turn by turn: each equals the run alone, bit for bit."""
    sampler = sampler_by_name(name)
    long, short = sampler.schedule(SD15, 9), sampler.schedule(SD15, 6)
    alone = ours(sampler, long), ours(sampler, short)
    runs = [
        sample(lambda x, t: (network(x, t), {}), start(), schedule, sampler, noise=fresh_noise())
        for schedule in (long, short)
    ]
    turns: tuple[list[Tensor], list[Tensor]] = ([], [])
    for i in range(9):
        for run, out in zip(runs, turns, strict=True):
            out.extend(step.latents for step in ([next(run)] if i < 6 or run is runs[0] else []))
    for one, other in zip(alone, turns, strict=True):
        assert len(one) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_step_mutates_nothing(name: str) -> None:
    sampler = sampler_by_name(name)
    schedule, history, x, output = sampler.schedule(SD15, 6), History(), start(), network(start(), torch.tensor(500.0))
    before = x.clone(), output.clone()
    for call in range(len(schedule.index)):
        kept = [value.clone() for value in history.outputs]
        _, later = sampler.step(x, output, call, schedule, history, fresh_noise())
        assert torch.equal(x, before[0])
        assert torch.equal(output, before[1])
        assert all(torch.equal(a, b) for a, b in zip(kept, history.outputs, strict=True))
        history = later


def test_names() -> None:
    assert sampler_by_name("ddim") == DDIM()
    assert sampler_by_name("lms_karras") == LMS(karras=True)
    assert sampler_by_name("euler_ancestral_karras") == EulerAncestral(karras=True)
    assert {sampler_by_name(name).name for name in SAMPLERS} == set(THEIRS)
    with pytest.raises(
        ValueError, match=r"no sampler is called 'heun'; expected one of ddim, pndm, euler, euler_karras"
    ):
        sampler_by_name("heun")
    with pytest.raises(ValueError, match="no sampler is called 'ddim_karras'"):
        sampler_by_name("ddim_karras")


def test_default_sampler_is_the_configs() -> None:
    assert default_sampler(SD15) == PNDM()
    karras = config(_class_name="DPMSolverMultistepScheduler", use_karras_sigmas=True)
    assert default_sampler(NoiseSchedule.from_config(karras)) == DPMpp2M(karras=True)
    with pytest.raises(
        ValueError, match="asks for _class_name 'HeunDiscreteScheduler', which minidiff has not; choose"
    ):
        default_sampler(NoiseSchedule.from_config(config(_class_name="HeunDiscreteScheduler")))


@pytest.mark.parametrize("eta", [-0.1, 1.5, math.nan])
def test_bad_eta(eta: float) -> None:
    with pytest.raises(ValueError, match="eta is .*; expected a number from 0"):
        DDIM(eta=eta)


@pytest.mark.parametrize("order", [0, 5, True])
def test_bad_order(order: int) -> None:
    with pytest.raises(ValueError, match="order is .*; expected 1, 2, 3 or 4"):
        LMS(order=order)


@pytest.mark.parametrize("make", [DDIM, PNDM, Euler, EulerAncestral, LMS, DPMpp2M])
def test_bad_spacing(make: Callable[..., Sampler]) -> None:
    with pytest.raises(ValueError, match="spacing is 'even'; expected one of leading, linspace, trailing"):
        make(spacing="even")


@pytest.mark.parametrize("sampler", [DDIM(eta=1.0), EulerAncestral()])
def test_a_step_without_the_noise_it_needs(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match=f"{sampler.name} needs fresh noise at each step"):
        sampler.step(start(), start(), 0, sampler.schedule(SD15, 4), History())
