"""The noise of a run, and its variations."""

import numpy as np
import pytest
import torch
from compare import relative_error
from torch import Tensor

import minidiff
from minidiff import Model, Request
from minidiff.noise import slerp

SHAPE = (4, 8, 8)


def noise(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def latents(model: Model, **options: object) -> Tensor:
    request = Request("a cat", model=model, steps=2, guidance_scale=1, output="latents", **options)  # type: ignore[arg-type]
    return minidiff.generate(request).latents


def test_a_variation_lies_on_the_arc_between_columns_as_in_a1111() -> None:
    low, high = noise(1), noise(2)
    found = slerp(low[None], high[None], 0.3)[0].double().numpy()
    for channel in range(4):
        for column in range(8):
            a, b = (one[channel, :, column].double().numpy() for one in (low, high))
            angle = np.arccos(a @ b / np.sqrt(a @ a * (b @ b)))
            expected = (np.sin(0.7 * angle) * a + np.sin(0.3 * angle) * b) / np.sin(angle)
            np.testing.assert_allclose(found[channel, :, column], expected, atol=1e-5)


def test_its_ends_are_the_noises_and_parallel_ones_give_no_nan() -> None:
    low, high = noise(1)[None], noise(2)[None]
    assert torch.equal(slerp(low, high, 0.0), low) and torch.allclose(slerp(low, high, 1.0), high, atol=1e-6)
    assert torch.allclose(slerp(low, low, 0.4), low, atol=1e-6)
    assert torch.equal(slerp(low, -low, 0.25), 0.5 * low)


def test_the_start_is_varied_and_the_noise_of_steps_is_not(tiny_model: Model) -> None:
    given = slerp(noise(3)[None], noise(9)[None], 0.3)
    assert torch.equal(latents(tiny_model, seed=3, vary=(9, 0.3)), latents(tiny_model, latents=given))
    for seeds, strength, same in ((3, 0.0, True), (3, 1.0, False)):
        found = latents(tiny_model, seed=seeds, vary=(9, strength), sampler="euler_ancestral")
        assert torch.equal(found, latents(tiny_model, seed=3, sampler="euler_ancestral")) is same


@pytest.mark.parametrize("image", [None, torch.rand(3, 32, 32)])
def test_variations_count_up_and_each_alone_is_that_of_the_batch(tiny_model: Model, image: Tensor | None) -> None:
    request = Request("a cat", model=tiny_model, steps=2, seed=3, vary=(9, 0.3), images_per_prompt=2, image=image)
    both = minidiff.generate(request)
    assert both.seeds == (3, 3) and [one["vary"] for one in both.parameters] == [[9, 0.3], [10, 0.3]]
    for i, made in enumerate(both):
        alone = minidiff.generate(request, images_per_prompt=1, vary=(9 + i, 0.3))
        assert relative_error(made.latents, alone.latents) < 1e-4
    plain = minidiff.generate(request, vary=None, seed=(3, 3))
    assert relative_error(both.latents, plain.latents) > 1e-2
    given = minidiff.generate(request, seed=(3, 4), vary=((9, 5), 0.3))
    assert (given.seeds, given.parameters[1]["vary"]) == ((3, 4), [5, 0.3])
