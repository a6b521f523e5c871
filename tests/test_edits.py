"""Attention edits equal slow loops over their formulas, and change nothing else."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from compare import relative_error
from torch import Tensor

import minidiff
from minidiff.guidance.layout import Layout, PlacedObject, make_layout
from minidiff.model import Model
from minidiff.networks.attention import Edit, Hooks, Record, hooked_attention
from minidiff.networks.sites import Site

SITE = Site("mid", 0, 0, "cross")
LENGTH = 7
REGIONS = [
    [
        PlacedObject("a", (1,), ((0.1, 0.2, 0.6, 0.8),)),
        PlacedObject("b", (3, 4), ((0.5, 0.0, 1.0, 0.5),)),
        PlacedObject("c", (4,), ((0.0, 0.6, 0.3, 1.0),)),  # shares token 4 with b
    ],
    [PlacedObject("a", (2,), ((0.0, 0.0, 0.4, 1.0),))],
    [],
]
BOXES = {"cat": (0.0, 0.0, 0.5, 0.6), "red ball": (0.5, 0.4, 1.0, 0.9)}
PROMPT = "a cat and a red ball"
EDITS = {
    "forward": minidiff.forward_guidance(0.8),
    "regional": minidiff.regional_prompting(8.0),
}


def layout_on(h: int, w: int) -> Layout:
    return make_layout(REGIONS, [5, 5, 5], LENGTH, [(h, w)])


def random_probs(h: int, w: int) -> Tensor:
    return (2 * torch.randn(3, 2, h, w, LENGTH)).softmax(dim=-1)


# ---- forward guidance


def smooth_box(mask: list[list[float]]) -> list[list[float]]:
    """(1 2 1) / 4 along both axes with replicate padding, normalised to a sum of 1."""
    h, w = len(mask), len(mask[0])
    kernel = {-1: 0.25, 0: 0.5, 1: 0.25}
    found = [
        [
            sum(
                kernel[i] * kernel[j] * mask[min(max(r + i, 0), h - 1)][min(max(c + j, 0), w - 1)]
                for i in kernel
                for j in kernel
            )
            for c in range(w)
        ]
        for r in range(h)
    ]
    total = sum(map(sum, found))
    return [[value / total for value in row] for row in found]


@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 4), (1, 1)])
@pytest.mark.parametrize("strength", [0.3, 1])
def test_forward_guidance_equals_a_slow_formula(grid: tuple[int, int], strength: float) -> None:
    h, w = grid
    layout, probs = layout_on(h, w), random_probs(h, w)
    edit = minidiff.forward_guidance(strength)
    found = edit.probs(SITE, probs, layout.inputs())
    expected = probs.clone()
    for b, some in enumerate(REGIONS):
        for token in range(LENGTH):
            boxes = [smooth_box(r.coverage(grid).tolist()) for r in some if token in r.tokens]
            if not boxes:
                continue
            for head in range(2):
                mass = sum(float(probs[b, head, r, c, token]) for r in range(h) for c in range(w))
                for r in range(h):
                    for c in range(w):
                        wanted = sum(box[r][c] for box in boxes) / len(boxes) * mass
                        expected[b, head, r, c, token] = (1 - strength) * probs[
                            b, head, r, c, token
                        ] + strength * wanted
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # tokens that no object owns are unchanged
    assert torch.equal(found[2], probs[2])
    assert torch.equal(found[1][..., [0, 1, 3, 4, 5, 6]], probs[1][..., [0, 1, 3, 4, 5, 6]])


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_forward_guidance_keeps_each_tokens_mass(strength: float) -> None:
    layout, probs = layout_on(5, 6), random_probs(5, 6)
    found = minidiff.forward_guidance(strength).probs(SITE, probs, layout.inputs())
    torch.testing.assert_close(found.sum(dim=(2, 3)), probs.sum(dim=(2, 3)), rtol=1e-5, atol=1e-5)
    if strength:
        assert (found[0] - probs[0]).abs().max() > 1e-2
    else:
        torch.testing.assert_close(found, probs)


def test_forward_guidance_at_full_strength_leaves_the_far_outside_dark() -> None:
    layout, probs = layout_on(8, 8), random_probs(8, 8)
    found = minidiff.forward_guidance(1.0).probs(SITE, probs, layout.inputs())
    assert found[1, :, :, 5:, 2].abs().max() == 0  # its box ends at 0.4 of the width, its smooth edge in column 4
    assert found[1, :, :, :3, 2].min() > 0


# ---- regional prompting


@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 1)])
def test_the_bias_of_regional_prompting_equals_a_slow_formula(grid: tuple[int, int]) -> None:
    layout = layout_on(*grid)
    found = minidiff.regional_prompting(6.0).bias(SITE, grid, layout.inputs())
    assert found.shape == (3, 1, *grid, LENGTH)
    expected = torch.zeros(3, 1, *grid, LENGTH)
    for b, some in enumerate(REGIONS):
        for token in range(LENGTH):
            owners = [region.coverage(grid) for region in some if token in region.tokens]
            for r in range(grid[0]):
                for c in range(grid[1]):
                    if owners:  # with several boxes, the one that covers most
                        expected[b, 0, r, c, token] = -6.0 * (1 - max(float(mask[r, c]) for mask in owners))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found.max() <= 0
    assert found[2].abs().max() == 0


def test_a_strong_bias_shuts_the_outside_out(tiny_model: Model) -> None:
    record = Record(minidiff.cross & minidiff.level(1), minidiff.HEAD_MEAN)
    shared = {"model": tiny_model, "steps": 2, "seed": 1, "boxes": BOXES, "guidance": "none", "output": "latents"}
    outside = {}
    for strength in (0.0, 4.0, 20.0):
        result = minidiff.generate(PROMPT, edits=minidiff.regional_prompting(strength), attention=record, **shared)
        outside[strength] = result.attention["cat"][0, :, 2:].max()  # the box ends in the middle of 4 columns
    assert outside[20.0] < 1e-8
    assert outside[20.0] < outside[4.0] < 0.1 * outside[0.0]


# ---- published edits of logits


GRID = (4, 6)
PIXELS = [(r, c) for r in range(4) for c in range(6)]


def cells_of(place: PlacedObject) -> set[tuple[int, int]]:
    mask = place.coverage(GRID)
    return {(r, c) for r, c in PIXELS if float(mask[r, c]) >= float(mask.max()) / 2}


def given(kind: str, t: float) -> tuple[Site, Tensor, dict[str, Tensor]]:
    """A site, logits at it, and what an edit reads in a step."""
    site, length = replace(SITE, kind=kind), LENGTH if kind == "cross" else len(PIXELS)
    logits = 2 * torch.randn(3, 2, *GRID, length)
    return site, logits, {"t": torch.tensor(t), "sigma": torch.tensor(3.5), **layout_on(*GRID).inputs()}


@pytest.mark.parametrize("kind", ["cross", "self"])
def test_dense_diffusion_equals_a_slow_formula(kind: str) -> None:
    site, logits, inputs = given(kind, 900.0)
    found = minidiff.dense_diffusion().logits(site, logits, inputs)
    weight, expected = (1.0 if kind == "cross" else 0.3) * 0.9**5, logits.clone()
    for b, some in enumerate(REGIONS):
        masks = [cells_of(one) for one in some]
        named = {k for one in some for k in one.tokens}
        for r, c in PIXELS:
            own = [o for o, mask in enumerate(masks) if (r, c) in mask]
            if kind == "cross":
                near = {k for o in own for k in some[o].tokens}
                every = set(range(LENGTH)) if own else named
            else:
                near = {PIXELS.index(at) for o in own for at in masks[o]}
                every = set(range(len(PIXELS))) if own else set()
            free = 1 - sum(len(masks[o]) for o in own) / len(PIXELS)
            for head in range(2):
                row = logits[b, head, r, c]
                for k in every:
                    up = row.max() - row[k] if k in near else row.min() - row[k]
                    expected[b, head, r, c, k] += weight * free * up
    torch.testing.assert_close(found, expected)


def test_attention_injection_equals_a_slow_formula() -> None:
    site, logits, inputs = given("cross", 900.0)
    found, expected = minidiff.attention_injection(0.5).logits(site, logits, inputs), logits.clone()
    for b, some in enumerate(REGIONS):
        most = float(logits[b].max())
        for r, c in PIXELS:
            for k in range(LENGTH):
                mask = max((float(one.coverage(GRID)[r, c]) for one in some if k in one.tokens), default=0.0)
                expected[b, :, r, c, k] += 0.5 * math.log(4.5) * most * mask
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kind", ["cross", "self"])
def test_bounded_attention_equals_a_slow_formula(kind: str, guided: bool) -> None:
    site, _, inputs = given(kind, 900.0)
    inputs |= {"guided": torch.ones(())} if guided else {}
    found = minidiff.bounded_attention()[0].bias(site, GRID, inputs).expand(3, 1, *GRID, -1)
    for b, some in enumerate(REGIONS):
        masks = [cells_of(one) for one in some]
        for r, c in PIXELS:
            inside = [mask for mask in masks if (r, c) in mask]
            for k in range(found.shape[-1]):
                if kind == "self":
                    there = any(PIXELS[k] in mask for mask in masks)
                    seen = not inside or not there or any(PIXELS[k] in mask for mask in inside)
                elif k == 6:  # the end marker
                    seen = guided or bool(inside)
                else:
                    owners = [mask for one, mask in zip(some, masks, strict=True) if k in one.tokens]
                    seen = not owners or any((r, c) in mask for mask in owners) or (guided and not inside)
                assert float(found[b, 0, r, c, k]) == (0 if seen else -1e4)


PUBLISHED = {
    "dense": (minidiff.dense_diffusion(),),
    "injection": (minidiff.attention_injection(2.0, steps=None),),
    "bounded": minidiff.bounded_attention(),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_edits_draw_a_batch_as_single_pictures_and_go_with_guidance(tiny_model: Model, name: str) -> None:
    prompts, layouts = [PROMPT, "two dogs"], [BOXES, {"dogs": (0, 0.3, 1, 1)}]
    guidance = minidiff.Guidance(minidiff.bounded_attention_loss, threshold=0.0, iterations=1, steps=1)
    shared = {"model": tiny_model, "steps": 2, "spacing": "trailing", "output": "latents", "edits": PUBLISHED[name]}
    for how in ("none", guidance):
        batch = minidiff.generate(prompts, boxes=layouts, seed=1, guidance=how, **shared)
        plain = minidiff.generate(prompts, boxes=layouts, seed=1, guidance=how, **{**shared, "edits": ()})
        assert relative_error(batch.latents, plain.latents) > 1e-4
        alone = minidiff.generate(prompts[1], boxes=layouts[1], seed=2, guidance=how, **shared)
        assert relative_error(batch.latents[1], alone.latents[0]) <= 1e-4


# ---- word weights


def test_reweighting_multiplies_each_tokens_attention(tiny_model: Model) -> None:
    weights = tiny_model.text.word_weights(PROMPT, {"red ball": 2.5, "cat": 0.0})
    assert weights.shape == (1, 77)
    balls, cats = (tiny_model.text.all_spans(PROMPT, phrase) for phrase in ("red ball", "cat"))
    probs = torch.rand(3, 2, 4, 5, 77)
    found = minidiff.reweight().probs(SITE, probs, {"word_weights": weights})
    for token in range(77):
        factor = 2.5 if token in balls else 0.0 if token in cats else 1.0
        torch.testing.assert_close(found[..., token], factor * probs[..., token])
    rows = torch.rand(3, 77)
    found = minidiff.reweight().probs(SITE, probs, {"word_weights": rows})
    for b in range(3):
        torch.testing.assert_close(found[b], rows[b] * probs[b])


def test_reweighting_needs_no_boxes_and_changes_the_image(tiny_model: Model) -> None:
    shared = {"model": tiny_model, "steps": 3, "seed": 1, "output": "latents"}
    plain = minidiff.generate(PROMPT, **shared)
    same = tiny_model.text.word_weights(PROMPT, {})
    more = tiny_model.text.word_weights(PROMPT, {"ball": 3.0})
    kept = minidiff.generate(PROMPT, edits=minidiff.reweight(), inputs={"word_weights": same}, **shared)
    assert relative_error(kept.latents, plain.latents) <= 1e-4
    changed = minidiff.generate(PROMPT, edits=minidiff.reweight(), inputs={"word_weights": more}, **shared)
    assert relative_error(changed.latents, plain.latents) > 1e-3


# ---- all


@pytest.mark.parametrize(
    "edit", [minidiff.forward_guidance(0), minidiff.regional_prompting(0.0)], ids=["forward", "regional"]
)
def test_a_strength_of_zero_changes_nothing(tiny_model: Model, edit: Edit) -> None:
    shared = {"model": tiny_model, "steps": 3, "seed": 1, "boxes": BOXES, "guidance": "none", "output": "latents"}
    plain = minidiff.generate(PROMPT, **shared)
    found = minidiff.generate(PROMPT, edits=edit, **shared)
    assert relative_error(found.latents, plain.latents) <= 1e-4


@pytest.mark.parametrize(
    ("make", "value", "message"),
    [
        (minidiff.forward_guidance, 1.1, "strength is 1.1; expected a number from 0 to 1"),
        (minidiff.forward_guidance, -0.1, "strength is -0.1"),
        (minidiff.forward_guidance, True, "strength is True"),
        (minidiff.forward_guidance, "1", "strength is '1'"),
        (minidiff.forward_guidance, float("nan"), "strength is nan"),
        (minidiff.regional_prompting, -1, "strength is -1; expected a number from 0 to 10000"),
        (minidiff.regional_prompting, float("inf"), "strength is inf"),
    ],
)
def test_bad_strengths_are_named(make: Callable[[float], Edit], value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(value)


def test_edits_are_values() -> None:
    for make in (minidiff.forward_guidance, minidiff.regional_prompting):
        assert make(0.5) == make(0.5)
        assert hash(make(0.5)) == hash(make(0.5))
        assert make(0.5) != make(0.25)
    assert minidiff.reweight() == minidiff.reweight()
    chosen = minidiff.forward_guidance(0.5, sites=minidiff.cross & minidiff.level(0), steps=3)
    assert (str(chosen.sites), chosen.steps, chosen.rows) == ("(cross & level(0))", 3, "cond")


@pytest.mark.parametrize("name", EDITS)
def test_edited_attention_is_what_the_sites_compute_with(name: str) -> None:
    """One layer by hand: logits + bias, softmax, probabilities, values."""
    layout = layout_on(4, 6)
    q, k, v = torch.randn(3, 2, 24, 8), torch.randn(3, 2, LENGTH, 8), torch.randn(3, 2, LENGTH, 8)
    edit = replace(EDITS[name], sites=frozenset([SITE]), rows="all")
    found, _ = hooked_attention(SITE, q, k, v, (4, 6), Hooks({}, "cond", (edit,), layout.inputs()))
    logits = q @ k.mT / 8**0.5
    if name == "regional":
        logits = logits + edit.bias(SITE, (4, 6), layout.inputs()).flatten(2, 3)
    probs = logits.softmax(dim=-1)
    if name == "forward":
        probs = edit.probs(SITE, probs.unflatten(2, (4, 6)), layout.inputs()).flatten(2, 3)
    torch.testing.assert_close(found, probs @ v, rtol=1e-4, atol=1e-5)


def test_an_edit_after_the_last_step_and_inputs_that_nothing_reads_are_warned_of(tiny_model: Model) -> None:
    late, never = (minidiff.reweight(steps=steps) for steps in ((2, 9), (2, 2)))
    shared = {"model": tiny_model, "steps": 2, "inputs": {"word_weights": torch.ones(1, 7)}}
    with pytest.warns(UserWarning, match=r"edits\[1\] has no effect: its steps are 2 to 8, and the run's are 0 to 1"):
        minidiff.sample_steps(PROMPT, edits=[never, late], **shared)
    with pytest.warns(
        UserWarning, match=r"edits\[0\] has no effect: its steps are 0.2 of the run's, which rounds to none"
    ):
        minidiff.sample_steps(PROMPT, edits=minidiff.reweight(steps=0.2), **shared)
    with pytest.warns(UserWarning, match="inputs hold 'word_weights', which nothing reads"):
        minidiff.sample_steps(PROMPT, **shared)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minidiff.sample_steps(PROMPT, edits=minidiff.reweight(steps=(1, 9)), **shared)
        minidiff.sample_steps(PROMPT, attention=Record(minidiff.cross), **shared)


def test_a_fraction_of_the_steps_is_of_the_runs() -> None:
    for steps, fraction, expected in ((20, 0.3, 6), (50, 0.3, 15), (4, 0.1, 0), (4, 3, 3)):
        found = minidiff.reweight(steps=fraction).of_run(steps, lambda where: frozenset([SITE]))
        assert (found.steps, found.sites) == (expected, {SITE})
    with pytest.raises(ValueError, match=r"steps is 1.5; expected None, a number of first steps, a fraction of all"):
        minidiff.reweight(steps=1.5)


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "euler"])
@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_for_the_first_steps_it_names(tiny_model: Model, name: str, sampler: str) -> None:
    shared = {"model": tiny_model, "steps": 4, "sampler": sampler, "seed": 1, "boxes": BOXES, "guidance": "none"}
    record = Record(minidiff.cross & minidiff.level(0), minidiff.HEAD_MEAN)
    plain = [step.latents for step in minidiff.sample_steps(PROMPT, **shared)]
    edit = EDITS[name]
    everywhere = [step.latents for step in minidiff.sample_steps(PROMPT, edits=edit, **shared)]
    for steps in (0, 1, 2, 4, 9):
        found = list(minidiff.sample_steps(PROMPT, edits=replace(edit, steps=steps), attention=record, **shared))
        for index in range(4):
            if steps == 0:
                assert relative_error(found[index].latents, plain[index]) <= 1e-4
            elif index < steps:
                assert relative_error(found[index].latents, everywhere[index]) <= 1e-4
            else:
                assert relative_error(found[index].latents, everywhere[index]) > 1e-4
                assert relative_error(found[index].latents, plain[index]) > 1e-4
        if 0 < steps < 4 and name == "forward":
            # from there on the edit is off: a pixel's attention sums to 1 again
            sums = [next(iter(step.maps.values())).sum(dim=-1) for step in found]
            for index, one in enumerate(sums):
                assert ((one - 1).abs().max() < 1e-5) == (index >= steps)


@pytest.mark.parametrize("name", EDITS)
def test_a_batch_of_edits_equals_single_ones(tiny_model: Model, name: str) -> None:
    prompts = [PROMPT, "two dogs", "a house", "a bird in a tree"]
    layouts = [BOXES, {"dogs": (0, 0.3, 1, 1)}, None, {"bird": (0.5, 0, 1, 0.4), "tree": (0, 0.1, 0.6, 1)}]
    shared = {"model": tiny_model, "steps": 3, "guidance": "none", "output": "latents", "edits": EDITS[name]}
    batch = minidiff.generate(prompts, boxes=layouts, seed=1, **shared)
    plain = minidiff.generate(prompts, seed=1, **{**shared, "edits": ()})
    for i in range(4):
        if layouts[i] is None:
            assert relative_error(batch.latents[i], plain.latents[i]) <= 1e-4
            continue
        alone = minidiff.generate(prompts[i], boxes=layouts[i], seed=1 + i, **shared)
        assert relative_error(batch.latents[i], alone.latents[0]) <= 1e-4
        assert relative_error(batch.latents[i], plain.latents[i]) > 1e-3


@pytest.mark.parametrize("guidance_scale", [1, 7.5])
@pytest.mark.parametrize("name", EDITS)
def test_edits_go_with_guidance_by_the_gradient(tiny_model: Model, name: str, guidance_scale: float) -> None:
    guidance = minidiff.Guidance(scale=1000.0, threshold=0.0, iterations=2, steps=2)
    shared = {"model": tiny_model, "steps": 3, "sampler": "ddim", "seed": 1, "boxes": BOXES, "output": "latents"}
    shared["guidance_scale"] = guidance_scale
    both = minidiff.generate(PROMPT, edits=EDITS[name], guidance=guidance, **shared)
    edited = minidiff.generate(PROMPT, edits=EDITS[name], guidance="none", **shared)
    guided = minidiff.generate(PROMPT, guidance=guidance, **shared)
    assert both.latents.isfinite().all()
    assert relative_error(both.latents, edited.latents) > 1e-3
    assert relative_error(both.latents, guided.latents) > 1e-3
    # the guided pass uses the edited attention, so more is inside from the start
    assert (both.reports[0].first_mass > guided.reports[0].first_mass + 0.1).all()
    # edits of the unconditional half do not affect the guided pass
    if guidance_scale > 1:
        other = minidiff.generate(PROMPT, edits=replace(EDITS[name], rows="uncond"), guidance=guidance, **shared)
        torch.testing.assert_close(other.reports[0].first_mass, guided.reports[0].first_mass)


def test_an_edit_of_the_first_steps_leaves_the_guided_pass_after_them(tiny_model: Model) -> None:
    guidance = minidiff.Guidance(scale=1.0, threshold=0.0, iterations=1, steps=3)
    shared = {"model": tiny_model, "steps": 4, "sampler": "ddim", "seed": 1, "boxes": BOXES, "guidance": guidance}
    edited = list(minidiff.sample_steps(PROMPT, edits=minidiff.forward_guidance(1.0, steps=2), **shared))
    plain = list(minidiff.sample_steps(PROMPT, **shared))
    for index, (one, other) in enumerate(zip(edited[:3], plain[:3], strict=True)):
        more = one.report[0].mass - other.report[0].mass
        assert (more > 0.1).all() if index < 2 else (more.abs() < 0.05).all()


def test_inputs_go_along_with_the_images_that_are_left(tiny_model: Model) -> None:
    """Word weights, one row per image, with guidance that stops the images at different evaluations."""
    prompts = [PROMPT, "a red ball", "a cat"]
    boxes = [BOXES, {"ball": (0, 0, 1, 0.9)}, {"cat": (0.1, 0.1, 0.7, 0.6)}]
    rows = torch.cat(
        [
            tiny_model.text.word_weights(p, {w: 2.0 + i})
            for i, (p, w) in enumerate(zip(prompts, ("cat", "ball", "cat"), strict=True))
        ]
    )
    guidance = minidiff.Guidance(scale=1000.0, threshold=0.3, iterations=2, steps=2)
    shared = {"model": tiny_model, "steps": 3, "sampler": "ddim", "guidance": guidance, "output": "latents"}
    batch = minidiff.generate(
        prompts, seed=1, boxes=boxes, edits=minidiff.reweight(), inputs={"word_weights": rows}, **shared
    )
    counts = [report.iterations for report in batch.reports]
    assert counts[1] != counts[0]
    for i in range(3):
        one = {"word_weights": rows[i : i + 1]}
        alone = minidiff.generate(
            prompts[i], seed=1 + i, boxes=boxes[i], edits=minidiff.reweight(), inputs=one, **shared
        )
        assert relative_error(batch.latents[i], alone.latents[0]) <= 1e-4
        assert alone.reports[0].iterations == counts[i]


@pytest.mark.parametrize("name", EDITS)
def test_a_phrase_without_a_place_is_left_as_it_is(tiny_model: Model, name: str) -> None:
    shared = {
        "model": tiny_model,
        "steps": 1,
        "spacing": "trailing",
        "seed": 1,
        "guidance": "none",
        "output": "latents",
    }
    placed, mixed, none = (
        minidiff.generate(PROMPT, boxes=boxes, edits=EDITS[name], **shared).latents
        for boxes in (BOXES, {**BOXES, "and": None}, {"cat": None})
    )
    assert relative_error(mixed, placed) < 1e-5
    assert relative_error(none, minidiff.generate(PROMPT, **shared).latents) < 1e-5
    assert relative_error(none, placed) > 1e-4


def test_an_edit_that_needs_boxes_says_so(tiny_model: Model) -> None:
    for edit in EDITS.values():
        with pytest.raises(ValueError, match="boxes"):
            minidiff.generate(PROMPT, model=tiny_model, steps=1, sampler="ddim", spacing="trailing", edits=edit)
