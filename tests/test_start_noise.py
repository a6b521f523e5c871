"""initno: a start noise in which phrases find their places, and which is still noise."""

import math

import pytest
import torch
from compare import relative_error
from torch import Tensor

import minidiff
from minidiff import Model, Request, start_noise
from minidiff.noise import slerp
from minidiff.start_noise import MOST_KL, divergence, improved
from minidiff.tries import STRIDE

PAIR = {"prompt": "a cat and a ball", "boxes": {"cat": None, "ball": None}, "seed": 4, "steps": 3}


def losses(model: Model, **given: object) -> list[float]:
    """The first look at each image."""
    how = minidiff.Guidance(minidiff.initno_loss, threshold=9, iterations=1, steps=1)
    run = minidiff.sample_steps(model=model, **{**PAIR, "guidance": how, **given})
    return next(run).report[0].loss.tolist()


def test_the_loss_of_the_noise_falls_and_seed_and_batch_decide_alone(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, fewer in (("ROUNDS", 2), ("STEPS", 1), ("LAST_STEPS", 4)):
        monkeypatch.setattr(start_noise, name, fewer)
    pictures = {**PAIR, "seed": (4, 9), "images_per_prompt": 2}
    better = minidiff.initno(model=tiny_model, **pictures)
    assert isinstance(better, Request) and better.latents.shape == (2, 4, 8, 8)
    before = losses(tiny_model, seed=(4, 9), images_per_prompt=2)
    after = losses(tiny_model, latents=better.latents, images_per_prompt=2)
    assert all(new < old for old, new in zip(before, after, strict=True))
    alone = minidiff.initno(model=tiny_model, **{**PAIR, "seed": 9})
    assert relative_error(better.latents[1:], alone.latents) < 1e-3
    assert torch.equal(minidiff.initno(model=tiny_model, **{**PAIR, "seed": 9}).latents, alone.latents)
    minidiff.generate(better, guidance="none", output="latents", steps=2)


def test_the_noise_stays_near_the_unit_normal_distribution() -> None:
    """Against the formula in loops, for a loss that would carry it away: the mean of everything."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []

    def look(found: Tensor) -> tuple[Tensor, float]:
        seen.append(found)
        return torch.ones_like(found), float(found.sum())

    found, last = improved(noise, look, 200, -math.inf)
    assert len(seen) == 200 and last == float(seen[-1].sum()) < float(noise.sum())
    shift = (found - noise).mean()
    assert -math.sqrt(2 * MOST_KL) * 1.2 < shift < -0.5 * math.sqrt(2 * MOST_KL)
    assert abs(float(found.std() / noise.std()) - 1) < 0.05
    log_var, mu = (torch.rand(5, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    each = [-0.5 * (1 + v - m * m - math.exp(v)) for v, m in zip(log_var.tolist(), mu.tolist(), strict=True)]
    assert float(divergence(log_var, mu)) == pytest.approx(sum(each) / 5, rel=1e-5)


def test_a_noise_that_is_good_enough_stays_and_later_rounds_take_other_noises(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = minidiff.Guidance(minidiff.attend_and_excite_loss, threshold=9)
    same = minidiff.initno(model=tiny_model, guidance=how, **PAIR)
    drawn = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(4))
    assert torch.equal(same.latents[0], drawn)
    assert same.guidance == how
    second = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4 + STRIDE))

    def look(noise: Tensor) -> tuple[Tensor, float]:
        return torch.ones_like(noise), float(not torch.equal(noise, second))

    monkeypatch.setattr(start_noise, "_look", lambda run, image: look)
    assert torch.equal(minidiff.initno(model=tiny_model, **PAIR).latents, second)


def test_what_else_chooses_a_noise_is_done_with(tiny_model: Model) -> None:
    """And a sampler that adds noise adds none that is there already."""
    how = minidiff.Guidance(minidiff.attend_and_excite_loss, threshold=9)
    given = {**PAIR, "model": tiny_model, "guidance": how, "vary": (7, 0.5), "sampler": "euler_ancestral"}
    found = minidiff.initno(tries=2, **given)
    assert found.tries == 1 and found.vary is None
    low, high = (torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (4, 7))
    assert torch.equal(found.latents, slerp(low, high, 0.5))
    added = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(found.seed[0]))
    assert abs(float((added * found.latents[0]).mean())) < 0.2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"boxes": None}, "there are no phrases to improve a noise for"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, "got an image or latents; expected neither"),
        ({"guidance": "layout"}, "has no box or mask, which guidance needs"),
        ({"boxes": {"dog": None}}, "dog"),
        ({"boxes": {"cat": (0, 0, 1, 1)}, "guidance": "fast"}, "guidance is 'fast', which has no loss"),
    ],
)
def test_wrong_requests_are_named(tiny_model: Model, given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        minidiff.initno(model=tiny_model, **{**PAIR, **given})
