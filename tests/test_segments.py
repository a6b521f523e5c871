"""Masks that change between steps: edits with `update`, and Bounded Attention's segments of the self-attention."""

import pytest
import torch
from compare import relative_error
from torch import Tensor

import minidiff
from minidiff import Edit, Model, Record
from minidiff.guidance.segments import kmeans, object_segments
from minidiff.networks.attention import Inputs, Maps

PROMPT = "a cat and a red ball"
BOXES = {"cat": (0.0, 0.0, 0.5, 0.6), "ball": (0.4, 0.5, 1.0, 1.0)}


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def apart(a: list[float], b: list[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def mean_of(points: list[list[float]]) -> list[float]:
    return [sum(values) / len(points) for values in zip(*points, strict=True)]


def slow_kmeans(points: list[list[float]], count: int) -> list[int]:
    centres = [max(points, key=lambda point: apart(point, mean_of(points)))]
    while len(centres) < count:
        centres.append(max(points, key=lambda point: min(apart(point, centre) for centre in centres)))

    def nearest() -> list[int]:
        return [min(range(count), key=lambda i: apart(point, centres[i])) for point in points]

    for _ in range(10):
        labels = nearest()
        own = [[point for point, label in zip(points, labels, strict=True) if label == i] for i in range(count)]
        centres = [mean_of(some) if some else centre for some, centre in zip(own, centres, strict=True)]
    return nearest()


def test_clusters_equal_loops_each_image_with_its_own_number() -> None:
    points = drawn(0, 3, 20, 4).double()
    labels = kmeans(points, torch.tensor([3, 6, 1]), 6)
    for i, count in enumerate((3, 6, 1)):
        assert labels[i].tolist() == slow_kmeans(points[i].tolist(), count)


def slow_segments(rows: Tensor, seen: Tensor, masks: Tensor) -> list[list[float]]:
    """One image: rows [N,N], seen [O,N], masks [O,N]."""
    cells, objects = range(len(rows)), range(len(masks))
    most = [max(float(rows[u, v]) for u in cells) for v in cells]
    scaled = [[float(rows[u, v]) / most[v] for v in cells] for u in cells]
    count = 3 * sum(bool(mask.any()) for mask in masks)
    labels = slow_kmeans(scaled, count)
    heats = []
    for heat, mask in zip(seen, masks, strict=True):
        sharp = (10 * (heat / heat.max() - 0.2)).sigmoid()
        heats.append(((sharp - sharp.min()) / (sharp.max() - sharp.min()) * mask).tolist())
    new = [[0.0 for _ in cells] for _ in objects]
    for cluster in range(count):
        own = [u for u in cells if labels[u] == cluster]
        scores = [
            sum(heat[u] for u in own) / min(sum(heat), len(own)) if own and sum(heat) > 0 else 0.0 for heat in heats
        ]
        if own and max(scores) >= 0.2:
            for u in own:
                new[scores.index(max(scores))][u] = 1.0
    for i in objects:
        if masks[i].any() and not any(new[i]):
            for j in objects:
                new[j] = [0.0 if masks[i][u] > 0 else new[j][u] for u in cells]
            new[i] = masks[i].tolist()
    return new


def test_segments_equal_loops_where_objects_are_lost_or_missing() -> None:
    """Of two images: one whose second object no segment overlaps, one with a single object."""
    height, width = 4, 5
    masks = torch.zeros(2, 2, height, width, dtype=torch.float64)
    masks[0, 0, :3, :3] = masks[1, 0, 1:, 2:] = 1
    masks[0, 1, 3, 4] = 0.5
    rows = drawn(1, 2, 20, 20).double() ** 4
    rows[0, :8, :8] += 1
    seen = drawn(2, 2, 2, height, width).double()
    seen[0, 1] = 0.9  # alike everywhere: its heat is nothing
    found = object_segments(rows, seen, masks)
    for i in range(2):
        expected = slow_segments(rows[i], seen[i].flatten(1), masks[i].flatten(1))
        assert found[i].flatten(1).tolist() == expected
        alone = object_segments(rows[i : i + 1], seen[i : i + 1], masks[i : i + 1])
        assert torch.equal(found[i], alone[0])
    assert torch.equal(found[0, 1], masks[0, 1])  # as it was
    assert 0 < found[0, 0].sum() < 20
    assert found[0, 0, 3, 4] == 0
    assert found[1, 1].sum() == 0


def test_refined_masks_draw_a_batch_as_single_pictures_and_reach_guidance(tiny_model: Model) -> None:
    prompts, layouts = [PROMPT, "two dogs"], [BOXES, {"dogs": (0, 0.3, 1, 1)}]
    guidance = minidiff.Guidance(minidiff.bounded_attention_loss, threshold=0.0, iterations=1, steps=2)
    shared = {"model": tiny_model, "steps": 2, "output": "latents", "guidance": guidance}
    edits = minidiff.bounded_attention(refine=0.9)
    batch = minidiff.generate(prompts, boxes=layouts, seed=1, edits=edits, **shared)
    alone = minidiff.generate(prompts[1], boxes=layouts[1], seed=2, edits=edits, **shared)
    assert relative_error(batch.latents[1], alone.latents[0]) <= 1e-4
    stay = minidiff.generate(prompts, boxes=layouts, seed=1, edits=minidiff.bounded_attention(), **shared)
    assert relative_error(batch.latents, stay.latents) > 1e-3
    never = minidiff.generate(prompts, boxes=layouts, seed=1, edits=minidiff.bounded_attention(refine=0), **shared)
    assert relative_error(never.latents, stay.latents) <= 1e-4


def all_over(maps: Maps, inputs: Inputs) -> Inputs:
    """From step 1 on every object may be anywhere."""
    assert all(site.kind == "cross" and kept.ndim == 4 for site, kept in maps.items())
    assert set(inputs) >= {"t", "sigma", "step"}
    return {name: torch.ones_like(value) for name, value in inputs.items() if name.startswith("masks.")}


@pytest.mark.parametrize("guidance_scale", [1, 7.5])
def test_an_update_replaces_masks_from_the_next_call_on(tiny_model: Model, guidance_scale: float) -> None:
    """Without a place that is outside, regional prompting changes nothing any more."""
    shared = {"model": tiny_model, "steps": 3, "seed": 1, "boxes": BOXES, "guidance": "none", "output": "latents"}
    shared |= {
        "sampler": "ddim",
        "guidance_scale": guidance_scale,
        "attention": Record(minidiff.cross, minidiff.BOX_MASS),
    }
    regional = minidiff.regional_prompting()
    first = minidiff.generate(PROMPT, edits=minidiff.regional_prompting(steps=1), **shared)
    found = minidiff.generate(PROMPT, edits=[regional, Edit(minidiff.cross, update=all_over, steps=1)], **shared)
    assert relative_error(found.latents, first.latents) <= 1e-5
    for step in minidiff.sample_steps(PROMPT, edits=[Edit(minidiff.cross, update=all_over)], **shared):
        assert all((kept > 0.999).all() == (step.index > 0) for kept in step.maps.values())  # all is inside


def test_an_update_is_told_to_guidance(tiny_model: Model) -> None:
    shared = {"model": tiny_model, "steps": 2, "seed": 1, "boxes": BOXES, "output": "latents"}
    guidance = minidiff.Guidance(minidiff.layout_loss, threshold=0.0, iterations=1, steps=2)
    run = minidiff.sample_steps(PROMPT, edits=Edit(minidiff.cross, update=all_over), guidance=guidance, **shared)
    mass = [step.report[0].mass[0] for step in run]
    assert mass[0].max() < 0.9
    assert mass[1].min() > 0.999


def test_an_update_needs_conditional_rows_of_one_text(tiny_model: Model) -> None:
    edit = Edit(minidiff.cross, update=all_over)
    with pytest.raises(ValueError, match=r'no texts joined by AND, and attention.rows "cond"'):
        minidiff.sample_steps(PROMPT, model=tiny_model, edits=edit, attention=Record(minidiff.cross, rows="uncond"))
    with pytest.raises(ValueError, match=r'no texts joined by AND, and attention.rows "cond"'):
        minidiff.sample_steps("a cat AND a ball", model=tiny_model, edits=edit, syntax="a1111")
    with pytest.raises(ValueError, match=r"update is 3; expected a function"):
        Edit(minidiff.cross, update=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="either update, or some of bias.*; this one has both"):
        Edit(minidiff.cross, update=all_over, bias=all_over)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"refine is 2; expected a number from 0 to 1"):
        minidiff.bounded_attention(refine=2)
