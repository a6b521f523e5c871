"""Regions that are pictures of their own in the first steps: against a loop over texts, and in whole runs."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import minidiff
from minidiff import Region
from minidiff.apart import Apart
from minidiff.guidance.regions import shares
from minidiff.networks.sites import choose, cross
from minidiff.shapes.measure import measure

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
FOX, DOG = Region("a red fox", LEFT, negative="blue"), Region("a dog", (0.3, 0.1, 0.9, 0.7), weight=2.0)
CALL: dict[str, Any] = {"steps": 2, "guidance_scale": 5.0, "sampler": "ddim", "seed": 3, "regions_apart": 0.5}


def ours(model: minidiff.Model, prompt: Any = "a cat", **options: Any) -> Tensor:
    found = minidiff.generate(prompt, model=model, **{**CALL, "output": "tensor", **options}).images
    assert isinstance(found, Tensor)
    return found


def first(model: minidiff.Model, **options: Any) -> Tensor:
    """The latents after the first of two steps."""
    return next(minidiff.sample_steps("a cat", model=model, **{**CALL, **options})).latents


def differ(one: Tensor, other: Tensor) -> float:
    """In units of 1/255."""
    return float((one - other).abs().max()) * 255


@pytest.mark.parametrize("base_weight", [0.0, 0.3])
def test_it_is_the_mean_of_each_texts_window(tiny_model: minidiff.Model, base_weight: float) -> None:
    """By shares, in both halves; windows are as large as the regions on the latents, to even cells."""
    areas, grid, t = [[FOX, DOG], [DOG]], (8, 12), torch.tensor(500.0)
    unet = tiny_model.unet
    apart = Apart(1, areas, grid, base_weight, 77, 77, None, choose(cross, unet.positions(*grid)), multiple=2)
    x = torch.randn(2, 4, *grid, generator=torch.Generator().manual_seed(0))
    context = torch.randn(4, 3 * 77, 64, generator=torch.Generator().manual_seed(1))
    parts = shares(areas, grid, base_weight).float()
    windows = {True: (slice(0, 8), slice(0, 6)), False: (slice(0, 6), slice(2, 12))}
    with torch.no_grad():
        found = apart(lambda x, context, edits, inputs: unet(x, t, context, None, edits, inputs)[0], x, context, {})
        for row in range(4):
            own = areas[row % 2]
            mixed, total = torch.zeros(4, *grid), parts[row % 2].sum(dim=0)
            outside = slice(6, 12) if own[0] is FOX and not base_weight else slice(12)  # the left half is the fox's
            for text, region in enumerate([None, *own]):
                rows, columns = (slice(8), outside) if region is None else windows[region is FOX]
                seen = x[row % 2][None, :, rows, columns]
                eps, _ = unet(seen, t, context[row, None, text * 77 : (text + 1) * 77])
                mixed[:, rows, columns] += parts[row % 2, text, rows, columns] * eps[0]
            torch.testing.assert_close(found[row], mixed / total, rtol=1e-4, atol=1e-4)


def test_a_region_is_alone_there(tiny_model: minidiff.Model) -> None:
    """A text or a negative one of one half changes nothing of the other, bit for bit, until they come together."""
    halves = [Region("a fox", LEFT), Region("a dog", RIGHT)]
    base = first(tiny_model, regions=halves)
    for other in ([Region("a bird", LEFT), halves[1]], [Region("a fox", LEFT, negative="red"), halves[1]]):
        moved = first(tiny_model, regions=other)
        middle = base.shape[3] // 2
        assert torch.equal(moved[..., middle:], base[..., middle:])
        assert not torch.equal(moved[..., :middle], base[..., :middle])
        together = first(tiny_model, regions=other, regions_apart=0.0)
        assert not torch.equal(
            together[..., middle:], first(tiny_model, regions=halves, regions_apart=0.0)[..., middle:]
        )


def test_a_region_of_the_whole_image_is_its_prompt(tiny_model: minidiff.Model) -> None:
    alone = ours(tiny_model, "a red fox", negative_prompt="blue", regions_apart=0.0)
    for own, negative in (("blue", None), (None, "blue")):  # without its own, the prompt's negative acts
        whole = [Region("a red fox", (0.0, 0.0, 1.0, 1.0), negative=own)]
        assert differ(ours(tiny_model, regions=whole, negative_prompt=negative, regions_apart=1.0), alone) < 0.1


@pytest.mark.filterwarnings("ignore:.*A1111 syntax")
@pytest.mark.parametrize("syntax", ["a1111", pytest.param("plain", marks=pytest.mark.slow)])
def test_image_i_of_a_batch_is_image_i_alone(tiny_model: minidiff.Model, syntax: str) -> None:
    """Also beside images with more regions, with none, and with longer texts."""
    long = Region("a (bird:1.4) BREAK on a tree", (0.2, 0.5, 0.9, 1.0), negative="blue BREAK red")
    prompts, regions = ["a cat", "a tree", "a lake BREAK at night"], [[FOX, long], None, [DOG]]
    shared = {"syntax": syntax, "width": 48, "negative_prompt": "a (red:1.2) bird"}
    batch = ours(tiny_model, prompts, regions=regions, images_per_prompt=2, **{**shared, "seed": range(6)})
    for i in (0, 3, 4):
        apart = 0.5 if regions[i // 2] else 0.0
        own = {**shared, "seed": i, "regions": regions[i // 2], "regions_apart": apart}
        alone = ours(tiny_model, prompts[i // 2], **own)
        assert differ(batch[i : i + 1], alone) < 0.5
        assert not apart or differ(alone, ours(tiny_model, prompts[i // 2], **{**own, "regions_apart": 0.0})) > 0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the negative prompt has no effect")
def test_recording_guidance_masks_and_cfg_pp(tiny_model: minidiff.Model) -> None:
    regions = [FOX, DOG]
    plain = ours(tiny_model, regions=regions)
    result = minidiff.generate(
        "a cat", model=tiny_model, regions=regions, attention=True, **{**CALL, "output": "tensor"}
    )
    assert differ(result.images, plain) < 0.1
    assert result.attention["red fox"].shape[0] == 1
    guidance = minidiff.Guidance(steps=1, iterations=1, threshold=0.0)
    for options in (
        {"boxes": {"red fox": (0.0, 0.0, 0.4, 0.5)}, "guidance": guidance},
        {"sampler": "dpmpp_2m_cfg_pp", "guidance_scale": 0.6},
        {"image": torch.rand(3, 32, 32), "mask": torch.ones(32, 32), "strength": 1.0},
        {"guidance_scale": 1.0},
    ):
        assert ours(tiny_model, regions=regions, **options).isfinite().all()
        assert differ(ours(tiny_model, regions=regions, **options), plain) > 0.5


def test_what_acts_in_one_half_stays_there(tiny_model: minidiff.Model) -> None:
    """Apart in all steps, bit for bit in the finished latents: also a negative text."""
    base, moved = (
        ours(tiny_model, regions=[Region("a fox", LEFT, negative=negative), Region("a dog", RIGHT)], **shared)
        for shared in [{"output": "latents", "regions_apart": 1.0, "sampler": "euler_ancestral", "width": 64}]
        for negative in ("red", "blue")  # two texts in both: a batch of one is encoded with another rounding
    )
    middle = base.shape[3] // 2
    assert torch.equal(moved[..., middle:], base[..., middle:])
    assert not torch.equal(moved[..., :middle], base[..., :middle])


def test_the_models_default(tiny_model: minidiff.Model) -> None:
    apart = replace(tiny_model, defaults=replace(tiny_model.defaults, regions_apart=0.5))
    shared = {"regions": [[FOX], None], "seed": [3, 4], "regions_apart": None}
    run = minidiff.sample_steps(["a cat", "a tree"], model=apart, **{**CALL, **shared})
    assert run.request.regions_apart == 0.5
    assert len(list(run)) == 2
    result = run.result()
    assert [one.get("regions_apart") for one in result.parameters] == [0.5, None]
    assert minidiff.sample_steps("a cat", model=apart).request.regions_apart is None
    context = {"negative_context": torch.zeros(1, 77, 64), "regions": [FOX]}
    assert minidiff.sample_steps("a cat", model=apart, **context).request.regions_apart == 0.0
    assert minidiff.sample_steps("a cat", model=tiny_model, regions=[FOX]).request.regions_apart == 0.0


def test_it_needs_regions() -> None:
    with pytest.raises(ValueError, match="regions_apart is 0.4 but there are no regions; expected both"):
        minidiff.Request("a cat", regions_apart=0.4)
    with pytest.raises(ValueError, match="got both regions_apart and negative_context"):
        minidiff.Request("a cat", regions=[FOX], regions_apart=0.4, negative_context=torch.zeros(1, 77, 64))


@pytest.mark.slow
def test_each_half_has_its_object() -> None:
    """With the bundled model; over 100 pictures, see bench/RESULTS.md."""
    halves = [Region("a red circle", LEFT), Region("a blue square", RIGHT)]
    call: dict[str, Any] = {"regions": halves, "guidance_scale": 7.5, "steps": 10, "images_per_prompt": 8, "seed": 0}
    found = minidiff.generate("a red circle and a blue square", output="tensor", **call).images
    right = [0, 0]
    for image in found:
        things = measure((image * 255).round().to(torch.uint8)).things
        for side, (colour, shape) in enumerate([("red", "circle"), ("blue", "square")]):
            middles = [(one.box[0] + one.box[2]) / 2 for one in things if (one.colour, one.shape) == (colour, shape)]
            right[side] += any(side <= 2 * middle <= side + 1 for middle in middles)
    assert min(right) >= 7


def test_an_edit_of_the_steps_that_are_apart_is_told_of(tiny_model: minidiff.Model) -> None:
    edit = minidiff.Edit(cross, bias=lambda site, grid, inputs: inputs["t"] * 0, steps=1)
    given: dict[str, Any] = {"regions": [FOX], "edits": [edit]}
    with pytest.warns(UserWarning, match=r"edits\[0\] has no effect: .* of which 0 to 0 have their regions apart"):
        ours(tiny_model, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(tiny_model, **given, regions_apart=0.0)
        ours(tiny_model, **{**given, "edits": [replace(edit, steps=None)]})
