"""tries: successive halving by what guidance sees, by running every try to its end."""

import math
from dataclasses import replace

import pytest
import torch
from compare import relative_error

import minidiff
from minidiff import Model, Request
from minidiff.guidance.report import Report
from minidiff.tries import STRIDE, nth_seeds, promise

BOXES = {"cat": (0.0, 0.0, 0.5, 0.5), "ball": (0.5, 0.3, 1.0, 0.9)}
TRIES = 4


def request(model: Model, **options: object) -> Request:
    given = {
        "prompt": "a cat and a ball",
        "steps": 2,
        "guidance_scale": 1,
        "seed": 4,
        "boxes": BOXES,
        "output": "latents",
        "guidance": {"objective": "inside", "iterations": 2, "steps": 2, "scale": 0.5},
    }
    return Request(model=model, **{**given, **options})  # type: ignore[arg-type]


def slow_choice(one: Request, seed: int) -> tuple[int, int]:
    """The best seed, and the best after the first step."""
    runs = {seed + n * STRIDE: minidiff.generate(one, seed=seed + n * STRIDE) for n in range(TRIES)}
    losses = {own: run.reports[0].loss.tolist() for own, run in runs.items()}
    assert len({tuple(own) for own in losses.values()}) == TRIES
    better = sorted(losses, key=lambda own: losses[own][0])[: TRIES // 2]
    return min(better, key=lambda own: losses[own][1]), better[0]


PICTURE = torch.linspace(0, 1, 3072).view(3, 32, 32)


def test_the_noise_that_guidance_gets_along_with_is_taken_and_its_seed_makes_the_image_again(tiny_model: Model) -> None:
    one = request(tiny_model, sampler="ddim", image=PICTURE, steps=3)  # of which two are taken
    first = one.seed
    (best, after_one_step), (other, _) = (slow_choice(one, seed) for seed in (first, first + 1))
    assert best != after_one_step and {best - first, other - first - 1} != {0}  # or nothing is chosen
    found = minidiff.generate(one, tries=TRIES, images_per_prompt=2)
    assert found.seeds == (best, other) and found.timings["tries"] > 0
    assert all("tries" not in fields for fields in found.parameters) and found.request.tries == 1
    assert torch.equal(minidiff.generate(found.request).latents, found.latents)
    run = minidiff.sample_steps(one, tries=TRIES, seed=first + 1)
    steps = list(run)
    alone = run.result()  # goes on with the try
    assert [step.index for step in steps] == [0, 1] and all(step.report for step in steps)
    assert alone.seeds == (other,) and relative_error(alone.latents, found.latents[1:]) < 1e-4
    assert torch.equal(minidiff.generate(alone.request).latents, alone.latents)
    own = sum(map(len, (step.report for step in steps)))
    # two looks a step: four tries take a step, and two of them another one, of which one is the best
    assert alone.info["tries"] == {"of": TRIES, "passes": 2 * (4 + 2) - own} and own == 4


def test_promise_is_where_things_are_likely_to_be_then_the_loss() -> None:
    nothing = torch.zeros(0)
    report = Report(("cat", "ball"), (0, 1), (1, 1), torch.tensor([5.0, 3.0]), nothing, nothing, nothing)
    assert promise(report) == -3
    assert promise(replace(report, placed=torch.tensor([0.5, 0.8]))) == pytest.approx(0.4)
    assert promise(replace(report, placed=torch.tensor([0.5, math.nan]))) == -3
    assert promise(replace(report, loss=torch.tensor([math.nan]))) == promise(None) == -math.inf


def test_without_places_the_seed_stays_and_seeds_wrap(tiny_model: Model) -> None:
    found = minidiff.generate(
        request(tiny_model, prompt=["a cat", "a cat"], boxes=[None, {"cat": BOXES["cat"]}], tries=3)
    )
    assert found.seeds[0] == 4
    assert nth_seeds((2**64 - 1, 5), 1) == (STRIDE - 1, STRIDE + 5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tries": 0}, "tries is 0"),
        ({"tries": 2, "boxes": None}, "nothing is guided"),
        ({"tries": 2, "guidance": "none"}, "nothing is guided"),
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
