"""minidiff.sampling.sample: the loop, what it passes to the network and to refine, and what it yields."""

from __future__ import annotations

import ast
import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import minidiff.sampling
from minidiff.networks.sites import Site
from minidiff.sampling import (
    DDIM,
    PNDM,
    SD15_SCHEDULER_CONFIG,
    Euler,
    EulerAncestral,
    NoiseSchedule,
    Sampler,
    SamplerStep,
    sample,
    sampler_by_name,
)
from minidiff.sampling.sample import Predicted
from minidiff.vocabulary import SAMPLERS

SHAPE = (2, 4, 6, 5)
SD15 = NoiseSchedule.from_config(SD15_SCHEDULER_CONFIG)


def network(x: Tensor, t: Tensor, sigma: float = 0.0, index: int = 0) -> tuple[Tensor, dict[Site, Tensor]]:
    return torch.tanh(0.7 * x + t / 800) + 0.2 * torch.cos(3 * x - t / 300), {}


def start(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


def fresh_noise() -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(5)
    return lambda: torch.randn(SHAPE, generator=generator)


def run(
    sampler: Sampler, steps: int, refine: Callable[..., Tensor] | None = None, x: Tensor | None = None
) -> list[SamplerStep]:
    x = start() if x is None else x
    return list(sample(network, x, sampler.schedule(SD15, steps), sampler, refine, fresh_noise()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("name", SAMPLERS)
def test_refine_that_returns_its_argument_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    sampler = sampler_by_name(name)
    plain = run(sampler, 8, x=start(dtype))
    for refine in (lambda x, t, abar, index: x, lambda x, t, abar, index: x.clone()):
        refined = run(sampler, 8, refine, x=start(dtype))
        assert all(torch.equal(a.latents, b.latents) for a, b in zip(plain, refined, strict=True))
    assert all(step.latents.dtype == dtype for step in plain)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_for_each_step(name: str) -> None:
    sampler = sampler_by_name(name)
    schedule, calls = sampler.schedule(SD15, 50), []

    def counted(x: Tensor, t: Tensor, sigma: float, index: int) -> tuple[Tensor, dict[Site, Tensor]]:
        calls.append((x.shape, t.shape, t.dtype, t.item(), index))
        return network(x, t)

    steps = list(sample(counted, start(), schedule, sampler, noise=fresh_noise()))
    assert [step.index for step in steps] == list(range(50))
    assert len(calls) == len(schedule.spans)
    assert {call[:3] for call in calls} == {(SHAPE, torch.Size([]), torch.float32)}
    assert [call[3] for call in calls] == schedule.timesteps.tolist()
    assert [call[4] for call in calls] == sorted(call[4] for call in calls)
    firsts = [[call[4] for call in calls].index(i) for i in range(50)]
    assert [step.t for step in steps] == [schedule.timesteps[call].item() for call in firsts]
    assert [step.sigma for step in steps] == [schedule.sigmas[call].item() for call in firsts]


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_network_sees_variance_preserving_latents(name: str) -> None:
    """With a first sigma of 14.6 the scaled latents have a std of 14.6, the network's input about 1."""
    sampler, seen = sampler_by_name(name), []

    def watched(x: Tensor, t: Tensor, sigma: float, index: int) -> tuple[Tensor, dict[Site, Tensor]]:
        seen.append(x)
        return network(x, t)

    schedule = replace(sampler, spacing="trailing").schedule(SD15, 4)  # type: ignore[type-var]
    next(sample(watched, start(), schedule, sampler, noise=fresh_noise()))
    scale = schedule.init_scale * (math.sqrt(schedule.abar(0)) if schedule.space == "ve" else 1)
    assert scale == pytest.approx(1, abs=0.003)
    torch.testing.assert_close(seen[0], start() * scale)


@pytest.mark.parametrize("name", SAMPLERS)
def test_refine_is_called_before_each_call_with_the_actual_abar(name: str) -> None:
    sampler, seen = sampler_by_name(name), []

    def refine(x: Tensor, t: Tensor, abar: float, index: int) -> Tensor:
        seen.append((x.shape, t.item(), abar, index))
        return x

    run(sampler, 5, refine)
    schedule = sampler.schedule(SD15, 5)
    each = 2 if sampler.guided_calls == 1 and len(schedule.spans) == 9 else 1  # the first call of each step
    assert [shape for shape, *_ in seen] == [SHAPE] * len(schedule.spans[::each])
    assert [t for _, t, _, _ in seen] == schedule.timesteps[::each].tolist()
    assert [abar for _, _, abar, _ in seen] == pytest.approx((1 / (1 + schedule.sigmas[::each] ** 2)).tolist())
    assert sorted({index for *_, index in seen}) == [0, 1, 2, 3, 4]
    if name == "pndm":
        assert [index for *_, index in seen] == [0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", SAMPLERS)
def test_renew_gets_what_the_step_before_predicted_and_changes_what_follows(name: str) -> None:
    """Before each step but the first, of two calls before the first alone; its x comes to refine and the network."""
    sampler, asked, refined = sampler_by_name(name), [], []
    schedule = sampler.schedule(SD15, 5)
    push = 0.1 * torch.cos(start())

    def drawn(changes: float) -> list[SamplerStep]:
        asked.clear(), refined.clear()

        def renew(x: Tensor, abar: float, index: int, before: Predicted) -> Tensor:
            asked.append((index, abar, before))
            return x + changes * push if index == 3 else x

        def refine(x: Tensor, t: Tensor, abar: float, index: int) -> Tensor:
            refined.append((index, x))
            return x

        return list(sample(network, start(), schedule, sampler, refine, fresh_noise(), None, renew))

    plain, found = run(sampler, 5), drawn(0.0)
    own = dict(refined)
    assert all(torch.equal(one.latents, other.latents) for one, other in zip(plain, found, strict=True))
    assert [index for index, *_ in asked] == [1, 2, 3, 4]
    for index, abar, before in asked:
        assert abar == pytest.approx(1 / (1 + found[index].sigma ** 2))
        assert torch.equal(before.clean, found[index - 1].denoised) and before.sigma == found[index - 1].sigma
    moved = drawn(1.0)
    torch.testing.assert_close(dict(refined)[3] - own[3], push, rtol=0, atol=1e-5)
    assert torch.equal(moved[2].latents, plain[2].latents) and not torch.equal(moved[3].latents, plain[3].latents)


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_may_be_renewed_where_none_of_before_is_kept(name: str) -> None:
    """An exact network for clean latents of zero: all of x is noise, of the step's level whatever its draw."""
    sampler, generator, levels = sampler_by_name(name), torch.Generator().manual_seed(3), list[float]()
    schedule = sampler.schedule(SD15, 12)

    def noise() -> Tensor:
        return torch.randn(2, 4, 32, 32, generator=generator)

    def exact(x: Tensor, t: Tensor, sigma: float, index: int) -> tuple[Tensor, dict[Site, Tensor]]:
        return torch.cat([x, x] if sampler.cfg_pp else [x]) * math.sqrt(1 + sigma**2) / sigma, {}

    def renew(x: Tensor, abar: float, index: int, before: Predicted) -> Tensor:
        levels.append(float(x.std()) / math.sqrt(1 - abar))
        return math.sqrt(1 - abar) * noise()

    deque(sample(exact, noise(), schedule, sampler, None, noise, None, renew), maxlen=0)
    assert len(levels) == 11
    if sampler.keeps_noise:
        assert min(levels[1:]) < 0.95
    else:
        assert min(levels[1:]) > 0.97 and max(levels) < 1.03


@pytest.mark.parametrize("name", [name for name in SAMPLERS if len(sampler_by_name(name).schedule(SD15, 6).spans) == 6])
def test_a_displacement_at_the_start_is_another_start(name: str) -> None:
    sampler = sampler_by_name(name)
    schedule = sampler.schedule(SD15, 6)
    push = 0.1 * torch.cos(start())
    growth = math.sqrt(1 + schedule.sigmas[0].item() ** 2) if schedule.space == "ve" else 1.0
    moved = run(sampler, 6, lambda x, t, abar, index: x + push if index == 0 else x)
    other = run(sampler, 6, x=start() + push * growth / schedule.init_scale)
    for a, b in zip(moved, other, strict=True):
        assert (a.latents - b.latents).abs().max() <= 1e-5 * b.latents.abs().max()


def test_pndm_moves_the_saved_sample_too() -> None:
    """Both displacements of step 0 reach its result; the second also reaches the network's second input."""
    first, second = 0.1 * torch.cos(start()), 0.05 * torch.sin(start())
    calls = iter([first, second])
    sampler = PNDM()
    moved = run(sampler, 6, lambda x, t, abar, index: x + next(calls) if index == 0 else x)[0].latents

    schedule, x = sampler.schedule(SD15, 6), start() + first
    (_, arrived), (begin, end) = schedule.spans[0], schedule.spans[1]

    def to(x: Tensor, eps: Tensor, begin: float, end: float) -> Tensor:  # formula (9) in x / sqrt(abar)
        return (x * math.sqrt(1 + begin**2) + (end - begin) * eps) / math.sqrt(1 + end**2)

    eps = network(x, schedule.timesteps[0].float())[0]
    there = to(x, eps, begin, arrived) + second
    mean = (network(there, schedule.timesteps[1].float())[0] + eps) / 2
    torch.testing.assert_close(moved, to(x + second, mean, begin, end))


def test_guidance_moves_every_sampler_alike() -> None:
    """x_vp - scale * (1 - abar) * grad in one space is x - scale * sigma^2 * grad' in the other: tested on Euler."""
    sampler = Euler()
    schedule = sampler.schedule(SD15, 10)
    pull = 0.3 * torch.cos(start())
    moved = run(sampler, 10, lambda x, t, abar, index: x - (1 - abar) * pull if index == 0 else x)[0].latents
    sigma, end = schedule.spans[0]
    x = start() * schedule.init_scale - sigma**2 / math.sqrt(1 + sigma**2) * pull  # grad' = grad / sqrt(1 + sigma^2)
    eps = network(x / math.sqrt(1 + sigma**2), schedule.timesteps[0])[0]
    torch.testing.assert_close(moved, x + (end - sigma) * eps)


def test_nothing_is_computed_ahead_or_after_a_break() -> None:
    calls = []

    def counted(x: Tensor, t: Tensor, sigma: float, index: int) -> tuple[Tensor, dict[Site, Tensor]]:
        calls.append(t)
        return network(x, t)

    for step in sample(counted, start(), DDIM().schedule(SD15, 10), DDIM()):
        assert len(calls) == step.index + 1
        if step.index == 2:
            break
    assert len(calls) == 3


def test_no_torch_mode_leaks_into_the_callers_loop() -> None:
    for step in sample(network, start(), Euler().schedule(SD15, 3), Euler()):
        assert torch.is_grad_enabled()
        assert not step.latents.requires_grad
    with torch.no_grad():
        for _ in sample(network, start(), Euler().schedule(SD15, 3), Euler()):
            assert not torch.is_grad_enabled()


@pytest.mark.parametrize("sampler", [PNDM(), Euler()])
def test_maps_are_those_of_the_call_where_the_step_began(sampler: Sampler) -> None:
    site = Site("up", 1, 0, "cross")

    def recording(x: Tensor, t: Tensor, sigma: float, index: int) -> tuple[Tensor, dict[Site, Tensor]]:
        return network(x, t)[0], {site: t}

    for step in sample(recording, start(), sampler.schedule(SD15, 5), sampler):
        assert step.maps[site].item() == step.t
        assert step.report is None


def test_latents_given_are_left_alone() -> None:
    x, given = start(), start()
    list(sample(network, x, DDIM().schedule(SD15, 3), DDIM(), lambda x, t, abar, index: x + 1))
    assert torch.equal(x, given)


def test_an_image_of_a_batch_equals_the_image_alone() -> None:
    both = run(DDIM(), 5)[-1].latents
    alone = list(sample(network, start()[1:], DDIM().schedule(SD15, 5), DDIM()))[-1].latents
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sampler", [DDIM(eta=0.5), EulerAncestral()])
def test_fresh_noise_is_asked_for_at_once(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match=f"{sampler.name} draws fresh noise but none was given"):
        sample(network, start(), sampler.schedule(SD15, 3), sampler)


def test_noise_is_drawn_only_where_it_is_used() -> None:
    draws = []

    def noise() -> Tensor:
        draws.append(1)
        return start()

    list(sample(network, start(), EulerAncestral().schedule(SD15, 5), EulerAncestral(), noise=noise))
    assert len(draws) == 4  # the last step ends at sigma 0
    list(sample(network, start(), DDIM().schedule(SD15, 5), DDIM(), noise=noise))
    assert len(draws) == 4


def test_a_schedule_of_another_sampler() -> None:
    with pytest.raises(ValueError, match="the schedule was made for euler but the sampler is ddim"):
        sample(network, start(), Euler().schedule(SD15, 3), DDIM())


def test_latents_that_are_no_floats() -> None:
    with pytest.raises(ValueError, match=r"latents are torch.int64; expected a floating-point tensor"):
        sample(network, torch.zeros(SHAPE, dtype=torch.int64), DDIM().schedule(SD15, 3), DDIM())


def test_wrong_shapes_are_named() -> None:
    schedule, wanted = EulerAncestral().schedule(SD15, 3), r"expected the latents' \[2, 4, 6, 5\]"
    with pytest.raises(ValueError, match=r"denoise returned a tensor of shape \[2, 8, 6, 5\]; " + wanted):
        next(
            sample(
                lambda x, t, sigma, index: (torch.cat([x, x], 1), {}), start(), schedule, EulerAncestral(), None, start
            )
        )
    with pytest.raises(ValueError, match=r"refine returned a tensor of shape \[1, 4, 6, 5\]; " + wanted):
        next(sample(network, start(), schedule, EulerAncestral(), lambda x, t, abar, index: x[:1], start))
    with pytest.raises(ValueError, match=r"renew returned a tensor of shape \[1, 4, 6, 5\]; " + wanted):
        list(sample(network, start(), schedule, EulerAncestral(), None, start, None, lambda x, *rest: x[:1]))
    with pytest.raises(ValueError, match=r"noise returned a tensor of shape \[1, 4, 6, 5\]; " + wanted):
        next(sample(network, start(), schedule, EulerAncestral(), None, lambda: start()[:1]))


def test_sampling_imports_nothing_of_the_package_but_names_checks_and_the_type_site() -> None:
    for file in Path(minidiff.sampling.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name == "minidiff.networks.sites":
                    assert [alias.name for alias in node.names] == ["Site"]  # type: ignore[attr-defined]
                elif name is not None and name.startswith("minidiff"):
                    assert name.startswith(("minidiff.sampling", "minidiff.vocabulary", "minidiff.checks"))
                else:
                    assert str(name).split(".")[0] not in ("scipy", "diffusers", "transformers")
