"""tries: the start noise with the least loss at guidance's first look, by running every try."""

import pytest
import torch
from compare import relative_error

import minidiff
from minidiff import Model, Request
from minidiff.tries import STRIDE, nth_seeds

BOXES = {"cat": (0.0, 0.0, 0.5, 0.5), "ball": (0.5, 0.3, 1.0, 0.9)}
TRIES = 4


def request(model: Model, **options: object) -> Request:
    given = {
        "prompt": "a cat and a ball",
        "steps": 2,
        "guidance_scale": 1,
        "seed": 3,
        "boxes": BOXES,
        "output": "latents",
        "guidance": {"objective": "inside", "iterations": 1, "steps": 1},
    }
    return Request(model=model, **{**given, **options})  # type: ignore[arg-type]


def first_loss(one: Request, seed: int) -> float:
    step = next(minidiff.sample_steps(one, seed=seed, tries=1))
    return float(step.report[0].loss[0])


def slow_choice(one: Request, seed: int) -> int:
    losses = {first_loss(one, seed + n * STRIDE): seed + n * STRIDE for n in range(TRIES)}
    assert len(losses) == TRIES
    return losses[min(losses)]


PICTURE = torch.linspace(0, 1, 3072).view(3, 32, 32)


@pytest.mark.parametrize("options", [{"sampler": "euler"}, {"sampler": "ddim", "seed": 6, "image": PICTURE}])
def test_the_noise_of_least_loss_is_taken_and_its_seed_makes_the_image_again(
    tiny_model: Model, options: dict[str, object]
) -> None:
    one = request(tiny_model, **options)
    first = one.seed
    expected = tuple(slow_choice(one, seed) for seed in (first, first + 1))
    assert max(expected) > STRIDE  # the first try is not the best of all images
    found = minidiff.generate(one, tries=TRIES, images_per_prompt=2)
    assert found.seeds == expected and found.timings["tries"] > 0
    assert all("tries" not in fields for fields in found.parameters) and found.request.tries == 1
    assert found.info["tries"] == TRIES and "tries" not in minidiff.generate(found.request).info
    assert torch.equal(minidiff.generate(found.request).latents, found.latents)
    alone = minidiff.generate(one, tries=TRIES, seed=first + 1)
    assert alone.seeds == expected[1:] and relative_error(alone.latents, found.latents[1:]) < 1e-4


def test_a_picture_is_encoded_once(tiny_model: Model) -> None:
    calls: list[int] = []
    hook = tiny_model.vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    one = request(tiny_model, sampler="ddim", images_per_prompt=2, prompt=["a cat and a ball"] * 2)
    minidiff.generate(one, tries=TRIES, image=PICTURE)
    assert len(calls) == 1
    minidiff.generate(one, tries=TRIES, image=[PICTURE, PICTURE.flip(2)])
    hook.remove()
    assert len(calls) == 3


def test_without_places_the_seed_stays_and_seeds_wrap(tiny_model: Model) -> None:
    found = minidiff.generate(
        request(tiny_model, prompt=["a cat", "a cat"], boxes=[None, {"cat": BOXES["cat"]}], tries=3)
    )
    assert found.seeds[0] == 3
    assert nth_seeds((2**64 - 1, 5), 1) == (STRIDE - 1, STRIDE + 5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tries": 0}, "tries is 0"),
        ({"tries": 2, "boxes": None}, "nothing is guided"),
        ({"tries": 2, "guidance": "none"}, "nothing is guided"),
        ({"tries": 2, "boxes": [None], "guidance": None}, "nothing is guided"),
        ({"tries": 2, "latents": torch.zeros(1, 4, 8, 8)}, "both tries and latents"),
    ],
)
def test_what_cannot_be_tried(tiny_model: Model, options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        request(tiny_model, **options)


def test_an_image_without_an_object_has_one_try_to_itself() -> None:
    asked = minidiff.Request(["a cat", "a dog"], boxes=[{"cat": (0.1, 0.1, 0.6, 0.7)}, None], tries=3, seed=[1, 2])
    assert (asked.alone(0).tries, asked.alone(1).tries) == (3, 1)
    for image in range(2):
        alone = asked.alone(image)
        assert minidiff.Request.from_plain(alone.plain()).plain() == alone.plain()
    with pytest.raises(ValueError, match="tries is 2 but nothing is guided"):
        minidiff.Request("a cat", boxes={"cat": (0.1, 0.1, 0.6, 0.7)}, guidance=False, tries=2)
