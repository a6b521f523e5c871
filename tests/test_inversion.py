"""The noise that makes a given picture: it comes back at any scale, and an edit changes what was asked."""

from dataclasses import replace

import pytest
import torch

import minidiff
from minidiff.checks import shown
from minidiff.shapes.measure import iou, measure
from minidiff.shapes.world import Scene, Thing, render

SCENE = Scene((Thing("circle", "red", (0.1, 0.1, 0.45, 0.45)), Thing("square", "blue", (0.55, 0.5, 0.9, 0.85))), "gray")
PROMPT = "a red circle and a blue square on a gray background"


@pytest.fixture(scope="module")
def model() -> minidiff.Model:
    return minidiff.load("minidiff/shapes", dtype="float32", device="cpu")


@pytest.mark.parametrize(("scale", "strength"), [(1.0, 1.0), (7.5, 0.6)])
def test_the_picture_comes_back_at_any_scale(model: minidiff.Model, scale: float, strength: float) -> None:
    picture = render([SCENE])
    back = (model.decode(model.encode(picture / 127.5 - 1)) / 2 + 0.5).clamp(0, 1)
    inverted = minidiff.invert(picture[0], PROMPT, model=model, steps=5, strength=strength, guidance_scale=scale)
    found = minidiff.generate(PROMPT, output="tensor", **inverted).images
    assert (found - back).abs().max() < 1 / 255
    other = minidiff.generate("a star", output="tensor", **inverted).images
    assert (other - back).abs().max() > 10 / 255
    assert len(shown(inverted["sampler"])) <= 120


def test_ddims_inversion_comes_near_and_several_pictures_are_those_alone(model: minidiff.Model) -> None:
    pictures = render([SCENE, replace(SCENE, background="white")])
    prompts = [PROMPT, PROMPT.replace("gray", "white")]
    back = (model.decode(model.encode(pictures[:1] / 127.5 - 1)) / 2 + 0.5).clamp(0, 1)
    for method, steps, bound in (("ddim", 8, 4 / 255), ("edit_friendly", 2, 1 / 255)):
        inverted = minidiff.invert(list(pictures), prompts, model=model, method=method, steps=steps)
        found = minidiff.generate(prompts, output="tensor", **inverted).images
        assert (found[:1] - back).square().mean().sqrt() < bound
        alone = minidiff.invert(pictures[1], prompts[1], model=model, method=method, steps=steps, seed=1)
        torch.testing.assert_close(alone["latents"][0], inverted["latents"][1], rtol=1e-4, atol=1e-4)


def test_with_prompt_to_prompt_the_picture_stands_beside_its_change(model: minidiff.Model) -> None:
    pair, picture = [PROMPT, PROMPT.replace("red", "green")], render([SCENE])
    back = (model.decode(model.encode(picture / 127.5 - 1)) / 2 + 0.5).clamp(0, 1)
    inverted = minidiff.invert([picture[0]] * 2, pair[:1] * 2, model=model, steps=4, strength=1.0, seed=[0, 0])
    inputs = {"alignment": inverted["model"].text.alignment(pair)}
    edits = minidiff.prompt_to_prompt(self_steps=None)
    same, changed = minidiff.generate(pair, edits=edits, inputs=inputs, output="tensor", **inverted).images
    assert (same - back[0]).abs().max() < 1 / 255
    assert (changed - back[0]).abs().max() > 10 / 255


@pytest.mark.slow
@pytest.mark.parametrize("method", ["edit_friendly", "ddim"])
def test_an_edit_changes_the_colour_asked_for_and_leaves_the_other_object(model: minidiff.Model, method: str) -> None:
    scale = {"guidance_scale": 7.5} if method == "edit_friendly" else {}
    inverted = minidiff.invert(render([SCENE])[0], PROMPT, model=model, method=method, steps=20, **scale)
    inverted |= {"guidance_scale": 4.0} if method == "ddim" else {}
    picture = minidiff.generate(PROMPT.replace("red", "green"), output="tensor", **inverted).images[0]
    found = {(one.colour, one.shape): one.box for one in measure((picture * 255).round().to(torch.uint8)).things}
    assert set(found) == {("green", "circle"), ("blue", "square")}
    for wanted, thing in zip((("green", "circle"), ("blue", "square")), SCENE.things, strict=True):
        assert iou(found[wanted], thing.box) > (0.9 if method == "edit_friendly" else 0.7)


def test_wrong_arguments_are_named(model: minidiff.Model) -> None:
    for given, message in (
        ({"strength": 1.5}, "strength is 1.5; expected a number above 0, at most 1"),
        ({"steps": 0}, "steps is 0"),
        ({"method": "null-text"}, "method is 'null-text'; expected one of edit_friendly, ddim"),
        ({"image": "nowhere.png"}, "image cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            minidiff.invert(**{"image": render([SCENE])[0], "prompt": PROMPT, "model": model} | given)  # type: ignore[arg-type]


def test_what_an_inversion_kept_is_for_its_own_steps_and_size(tiny_model: minidiff.Model) -> None:
    picture = torch.rand(32, 32, 3).mul(255).byte().numpy()
    inverted = minidiff.invert(picture, "a cat", model=tiny_model, steps=4)
    minidiff.generate("a cat", **inverted)
    for changed in ({"timesteps": [900, 500]}, {"latents": torch.zeros(1, 4, 8, 12)}):
        with pytest.raises(ValueError, match="sampler of an inversion got"):
            minidiff.generate("a cat", **inverted | changed)
    with pytest.raises(ValueError, match="image is None; expected a picture"):
        minidiff.invert(None, "a cat", model=tiny_model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="strength is 0"):
        minidiff.invert(picture, "a cat", model=tiny_model, strength=0)
    with pytest.raises(TypeError, match="steps"):
        minidiff.invert(picture, "a cat", model=tiny_model, num_inference_steps=3)  # type: ignore[call-arg]
