"""minidiff.sampling.schedule and spacing: the training noise schedule, and the timesteps of a run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch

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
    sampler_by_name,
)
from minidiff.sampling.spacing import beta_quantiles, karras_sigmas, sigmas_at, timesteps_at

their: Any = diffusers  # untyped
SD15 = NoiseSchedule.from_config(SD15_SCHEDULER_CONFIG)
ALL: tuple[Callable[..., Sampler], ...] = (DDIM, PNDM, Euler, EulerAncestral, LMS, DPMpp2M)


SDE = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}


def config(**changes: object) -> dict[str, object]:
    return {**SD15_SCHEDULER_CONFIG, **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50},
        {"num_train_timesteps": 200, "beta_start": 0.001, "beta_end": 0.05},
        {"trained_betas": [0.01, 0.02, 0.05, 0.3], "num_train_timesteps": 4},
    ],
)
def test_alphas_cumprod_is_bit_equal_to_diffusers(changes: dict[str, object]) -> None:
    ours = NoiseSchedule.from_config(config(**changes)).alphas_cumprod
    theirs = their.PNDMScheduler.from_config(config(**changes)).alphas_cumprod
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)


def test_missing_keys_have_diffusers_defaults() -> None:
    noise = NoiseSchedule.from_config({"_class_name": "DDIMScheduler"})
    assert torch.equal(noise.alphas_cumprod, their.DDIMScheduler().alphas_cumprod)
    assert (noise.prediction_type, noise.timestep_spacing, noise.set_alpha_to_one) == ("epsilon", None, None)
    assert noise.steps_offset == 1  # StableDiffusionPipeline's default, not the schedulers' 0
    assert noise.skip_prk_steps


def test_check_numbers_of_sd15() -> None:
    wanted = {0: 0.99914998, 1: 0.99829602, 981: 0.00577550, 999: 0.00466010}
    for timestep, abar in wanted.items():
        assert SD15.alphas_cumprod[timestep].item() == pytest.approx(abar, abs=5e-9)
    assert SD15.training_sigmas()[0] == pytest.approx(0.0291675, abs=5e-8)
    assert SD15.training_sigmas()[-1] == pytest.approx(14.614647, abs=5e-7)
    assert (SD15.num_train_timesteps, SD15.steps_offset, SD15.set_alpha_to_one) == (1000, 1, False)
    assert (SD15.sampler, SD15.timestep_spacing, SD15.prediction_type) == (PNDM(), None, "epsilon")


def test_config_values_are_read() -> None:
    noise = NoiseSchedule.from_config(
        config(steps_offset=0, timestep_spacing="trailing", set_alpha_to_one=True, prediction_type="v_prediction")
    )
    assert (noise.steps_offset, noise.timestep_spacing, noise.set_alpha_to_one) == (0, "trailing", True)
    assert noise.prediction_type == "v_prediction"
    assert replace(noise, prediction_type="epsilon").prediction_type == "epsilon"


def test_clip_sample_is_ignored() -> None:
    assert NoiseSchedule.from_config(config(clip_sample=True)).sampler == PNDM()


@pytest.mark.parametrize(
    ("changes", "sampler"),
    [
        ({"_class_name": "DDIMScheduler"}, DDIM()),
        ({"_class_name": "EulerDiscreteScheduler"}, Euler()),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, Euler(levels="karras")),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, EulerAncestral()),
        ({"_class_name": "LMSDiscreteScheduler", "use_karras_sigmas": True}, LMS(levels="karras")),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++"}, DPMpp2M()),
        ({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -math.inf}, DPMpp2M()),
        ({"use_karras_sigmas": True}, PNDM()),
        ({"_class_name": "HeunDiscreteScheduler", "use_karras_sigmas": True}, sampler_by_name("heun", "karras")),
        ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, Euler(levels="beta")),
        (
            {"_class_name": "UniPCMultistepScheduler", "use_exponential_sigmas": True},
            sampler_by_name("unipc exponential"),
        ),
        ({"_class_name": "EulerAncestralDiscreteScheduler", "use_beta_sigmas": True}, EulerAncestral()),
        ({"_class_name": "DPMSolverSinglestepScheduler"}, sampler_by_name("dpmpp_2s")),
        (SDE, sampler_by_name("dpmpp_2m_sde")),
        ({**SDE, "solver_type": "heun"}, sampler_by_name("dpmpp_2m_sde_heun")),
        ({**SDE, "solver_order": 3, "use_karras_sigmas": True}, sampler_by_name("dpmpp_3m_sde", schedule="karras")),
    ],
)
def test_the_configs_class_names_a_sampler(changes: dict[str, object], sampler: Sampler) -> None:
    noise = NoiseSchedule.from_config(config(**changes))
    assert (noise.sampler, noise.refusal) == (sampler, "")


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"_class_name": "IPNDMScheduler"}, "names 'IPNDMScheduler', which"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_order": 4}, "with solver_order 4"),
        ({"_class_name": None}, "names no scheduler (it has no _class_name)"),
        ({"_class_name": 3}, "names 3, which"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "with thresholding True"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "with timestep_type 'continuous'"),
        (
            {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"},
            "with interpolation_type 'log_linear'",
        ),
        ({"_class_name": "EulerDiscreteScheduler", "sigma_max": 700.0}, "with sigma_max 700.0"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver"}, "sde-dpmsolver"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "with solver_order 3"),
    ],
)
def test_an_algorithm_we_have_not_leaves_the_sampler_open(changes: dict[str, object], refusal: str) -> None:
    noise = NoiseSchedule.from_config(config(**changes))
    assert noise.sampler is None
    assert refusal in noise.refusal


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thresholding": "yes"}, "thresholding is 'yes'; expected true or false"),
        ({"prediction_type": "sample"}, "prediction_type is 'sample'; expected one of epsilon, v_prediction"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'; expected one of linear, scaled_linear"),
        ({"timestep_spacing": "even"}, "timestep_spacing is 'even'; expected one of leading, linspace, trailing"),
        ({"beta_start": math.nan}, "beta_start is nan; expected a number"),
        ({"beta_end": 10**400}, "beta_end is 10+.*; expected a number"),
        (
            {"num_train_timesteps": 10**12},
            "num_train_timesteps is 1000000000000; expected a whole number from 2 to 100000",
        ),
        ({"trained_betas": [0.1, "0.2"], "num_train_timesteps": 2}, "trained_betas is '0.2'; expected a number"),
        ({"beta_start": "low"}, "beta_start is 'low'; expected a number"),
        ({"beta_start": 0.5}, "beta_start 0.5 and beta_end 0.012; expected 0 < start <= end < 1"),
        ({"num_train_timesteps": 10.5}, "num_train_timesteps is 10.5; expected a whole number from 2 to"),
        ({"steps_offset": -1}, "steps_offset is -1; expected a whole number from 0 to"),
        ({"trained_betas": "file.npy"}, "trained_betas is 'file.npy'; expected null or a list"),
        ({"trained_betas": [0.1, 0.2]}, "2 trained_betas, but num_train_timesteps is 1000"),
        ({"trained_betas": [0.1, 0.0, 0.2], "num_train_timesteps": 3}, "alphas_cumprod must decrease strictly"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_config(config(**changes))


def test_replacing_with_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction_type is 'flow'; expected one of epsilon, v_prediction"):
        replace(SD15, prediction_type="flow")
    with pytest.raises(ValueError, match="alphas_cumprod is torch.float64"):
        replace(SD15, alphas_cumprod=SD15.alphas_cumprod.double())


def test_karras_sigmas_follow_the_formula() -> None:
    sigmas = karras_sigmas(14.6, 0.03, 7)
    assert sigmas[0] == pytest.approx(14.6)
    assert sigmas[-1] == pytest.approx(0.03)
    np.testing.assert_allclose(np.diff(sigmas ** (1 / 7), 2), 0, atol=1e-12)  # linear in the seventh root


def test_beta_quantiles_are_scipys() -> None:
    shares = np.concatenate([np.linspace(0, 1, 41), [1e-9, 1e-5, 1 - 1e-5]])
    np.testing.assert_allclose(beta_quantiles(shares), scipy.stats.beta.ppf(shares, 0.6, 0.6), rtol=1e-9, atol=1e-12)


def test_timesteps_at_inverts_sigmas_at() -> None:
    times = np.arange(1000.0)
    np.testing.assert_allclose(timesteps_at(SD15, sigmas_at(SD15, times)), times, atol=2e-3)
    assert timesteps_at(SD15, np.array([1e6, 0.0])).tolist() == [999.0, 0.0]


@pytest.mark.parametrize("make", ALL)
def test_abar_is_of_the_schedules_own_sigma(make: Callable[..., Sampler]) -> None:
    run = make().schedule(SD15, 20)
    assert len(run.timesteps) == len(run.sigmas) == len(run.spans)
    for call, timestep in enumerate(run.timesteps.tolist()):
        assert run.abar(call) == pytest.approx(1 / (1 + run.sigmas[call].item() ** 2), rel=1e-12)
        below, above = SD15.alphas_cumprod[math.ceil(timestep)].item(), SD15.alphas_cumprod[math.floor(timestep)].item()
        assert below * (1 - 1e-5) <= run.abar(call) <= above * (1 + 1e-5)


def test_spacing_given_beats_the_config_which_beats_the_default() -> None:
    trailing = replace(SD15, timestep_spacing="trailing")
    assert Euler().schedule(SD15, 10).timesteps[0] == 999  # linspace
    assert DDIM().schedule(SD15, 10).timesteps[0] == 901  # leading
    assert DDIM().schedule(trailing, 10).timesteps[0] == 999
    assert DDIM(spacing="leading").schedule(trailing, 10).timesteps[0] == 901


@pytest.mark.parametrize("steps", [61, 103, 998])
def test_trailing_has_as_many_timesteps_as_steps(steps: int) -> None:
    """diffusers has an extra one, -1, because its float step overshoots; the others are equal."""
    theirs = their.DDIMScheduler.from_config(config(timestep_spacing="trailing"))
    theirs.set_timesteps(steps)
    assert theirs.timesteps.tolist()[steps:] == [-1]
    for make in ALL:
        run = make(spacing="trailing").schedule(SD15, steps)
        assert run.steps == steps
        assert sorted(set(run.timesteps.tolist()), reverse=True) == theirs.timesteps.tolist()[:steps]


@pytest.mark.parametrize("make", [DDIM, PNDM, Euler, EulerAncestral, LMS])
@pytest.mark.parametrize(("spacing", "start"), [("linspace", 0), ("leading", 1)])
def test_one_step_that_starts_at_the_clean_end_warns(make: Callable[..., Sampler], spacing: str, start: int) -> None:
    with pytest.warns(UserWarning, match=f"starts at timestep {start}.*pass spacing='trailing'"):
        run = make(spacing=spacing).schedule(SD15, 1)
    assert run.timesteps.tolist() == [start]


def test_one_step_that_starts_at_the_noisy_end_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [make(spacing="trailing").schedule(SD15, 1).timesteps.item() for make in ALL] == [999] * 6
        assert DPMpp2M().schedule(SD15, 1).timesteps.item() == 999
        assert DDIM().schedule(SD15, timesteps=[500]).timesteps.item() == 500


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("steps", [0, -3, 1001, 2.0, True, "20"])
def test_a_bad_number_of_steps(make: Callable[..., Sampler], steps: int) -> None:
    with pytest.raises(ValueError, match="steps is .*; expected a whole number from 1 to 1000"):
        make().schedule(SD15, steps)


@pytest.mark.parametrize("make", ALL)
def test_nothing_says_how_many_steps(make: Callable[..., Sampler]) -> None:
    with pytest.raises(ValueError, match="pass steps, timesteps or sigmas"):
        make().schedule(SD15)


@pytest.mark.parametrize("make", ALL)
def test_steps_that_do_not_fit_the_spacing(make: Callable[..., Sampler]) -> None:
    """In diffusers, DDIM and PNDM fail with an index out of range, the others take a step of zero length."""
    with pytest.raises(ValueError, match="1000 steps with leading spacing and steps_offset 1 do not fit"):
        make(spacing="leading").schedule(SD15, 1000)


CUSTOM: tuple[Callable[..., Sampler], ...] = (DDIM, Euler, EulerAncestral, LMS, DPMpp2M)


@pytest.mark.parametrize("make", CUSTOM)
@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([], "expected a list of 1 to 10,000 numbers"),
        (5, "timesteps is 5; expected a list"),
        ("900", "timesteps is '900'; expected a list"),
        (range(10**6), "expected a list of 1 to 10,000 numbers"),
        ([[900, 100]], r"timesteps is \[900, 100\]; expected a number"),
        (np.array([[900, 100]]), r"timesteps is a ndarray of shape \[2\] .*; expected a number"),
        ([900, math.nan, 1], "timesteps is nan; expected a number"),
        ([900, 10**400, 1], "expected a number"),
        ([1000, 1], "strictly descending numbers between 999 and 0"),
        ([900, -1], "strictly descending numbers between 999 and 0"),
        ([900, 900, 1], "strictly descending"),
        ([1, 900], "strictly descending"),
    ],
)
def test_bad_timesteps(make: Callable[..., Sampler], timesteps: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().schedule(SD15, timesteps=timesteps)


@pytest.mark.parametrize("make", [DDIM, DPMpp2M])
def test_fractional_timesteps_where_whole_ones_are_needed(make: Callable[..., Sampler]) -> None:
    with pytest.raises(ValueError, match="this sampler takes whole numbers: round them or use euler"):
        make().schedule(SD15, timesteps=[900.5, 100.0])


@pytest.mark.parametrize("make", CUSTOM)
@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0], "at least two numbers"),
        ([[2.0, 1.0]], "expected a number"),
        ([2.0, math.inf], "sigmas is inf; expected a number"),
        ([2.0, math.nan, 0.0], "sigmas is nan; expected a number"),
        ([2.0, 3.0, 0.0], "strictly descending"),
        ([2.0, 0.0, 0.0], "strictly descending"),
        ([2.0, 0.5, -0.1], "ending in 0 or above it"),
        ([700.0, 1.0, 0.0], "sigmas start at 700; expected at most 14.61"),
    ],
)
def test_bad_sigmas(make: Callable[..., Sampler], sigmas: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().schedule(SD15, sigmas=sigmas)


@pytest.mark.parametrize("make", CUSTOM)
def test_conflicts(make: Callable[..., Sampler]) -> None:
    with pytest.raises(ValueError, match="both timesteps and sigmas were given"):
        make().schedule(SD15, timesteps=[900, 1], sigmas=[2.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="steps is 3 but timesteps make 2 steps"):
        make().schedule(SD15, 3, timesteps=[900, 1])
    with pytest.raises(ValueError, match="steps is 3 but sigmas make 2 steps"):
        make().schedule(SD15, 3, sigmas=[2.0, 1.0, 0.0])
    assert make().schedule(SD15, 2, timesteps=[900, 1]).steps == 2


@pytest.mark.parametrize("make", [Euler, EulerAncestral, LMS, DPMpp2M])
def test_custom_values_conflict_with_karras(make: Callable[..., Sampler]) -> None:
    with pytest.raises(ValueError, match="timesteps were given to a sampler with karras noise levels"):
        make(levels="karras").schedule(SD15, timesteps=[900, 1])
    with pytest.raises(ValueError, match="sigmas were given to a sampler with karras noise levels"):
        make(levels="karras").schedule(SD15, sigmas=[2.0, 1.0, 0.0])


def test_pndm_refuses_what_its_formula_cannot_do() -> None:
    with pytest.raises(ValueError, match="pndm takes no timesteps or sigmas"):
        PNDM().schedule(SD15, timesteps=[900, 1])
    with pytest.raises(ValueError, match="skip_prk_steps false, which pndm does not implement"):
        PNDM().schedule(NoiseSchedule.from_config(config(skip_prk_steps=False)), 20)


@pytest.mark.parametrize("make", ALL)
def test_torchs_defaults_change_no_bit(make: Callable[..., Sampler]) -> None:
    """Tables do not depend on torch's default dtype or device (here "meta", which holds no values)."""
    wanted = make().schedule(SD15, 20)
    kinds = ({}, {"beta_schedule": "squaredcos_cap_v2"}, {"beta_schedule": "linear"}, {"trained_betas": [0.001] * 1000})
    tables = [NoiseSchedule.from_config(config(**kind)).alphas_cumprod for kind in kinds]
    try:
        for dtype, device in ((torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")):
            torch.set_default_dtype(dtype)
            torch.set_default_device(device)
            again = [NoiseSchedule.from_config(config(**kind)).alphas_cumprod for kind in kinds]
            found = make().schedule(NoiseSchedule.from_config(config()), 20)
            torch.set_default_device("cpu")
            assert all(torch.equal(a, b) for a, b in zip(tables, again, strict=True))
            assert torch.equal(found.timesteps, wanted.timesteps)
            assert torch.equal(found.sigmas, wanted.sigmas)
            assert (found.spans, found.init_scale) == (wanted.spans, wanted.init_scale)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
