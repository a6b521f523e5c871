"""Points, strokes and curves are read, drawn as masks and written, and attention is drawn to them."""

import itertools
import json
import math

import pytest
import torch

import minidiff
from minidiff.guidance.layout import make_layout, plain_boxes, read_objects
from minidiff.guidance.lines import distances, read_line


def slow_distance(x: float, y: float, line: list[tuple[float, float]]) -> float:
    found = math.inf
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        for k in range(2001):
            found = min(found, math.hypot(x0 + (x1 - x0) * k / 2000 - x, y0 + (y1 - y0) * k / 2000 - y))
    return found


def test_distances_equal_a_slow_search() -> None:
    line = [(0.1, 0.2), (0.5, 0.2), (0.4, 0.9)]
    points = torch.rand(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = distances(torch.tensor(line, dtype=torch.float64), points)
    expected = torch.tensor([slow_distance(x, y, line) for x, y in points.tolist()], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert distances(torch.tensor([[0.0, 0.0]]), torch.tensor([0.3, 0.4])).item() == pytest.approx(0.5)


def test_a_curve_goes_through_its_points_and_turns_smoothly() -> None:
    points = ((0.1, 0.5), (0.4, 0.1), (0.6, 0.9), (0.9, 0.5))
    line = minidiff.Curve(points).line()
    assert distances(line, torch.tensor(points, dtype=torch.float64)).max() < 1e-12
    ways = line.diff(dim=0)
    turns = torch.cosine_similarity(ways[1:], ways[:-1], dim=1)
    assert turns.min() > 0.7
    assert torch.equal(minidiff.Curve(points[:2]).line(), minidiff.Stroke(points[:2]).line())


def test_lines_cover_their_width_on_grids_that_are_not_square() -> None:
    regions = read_objects({"cat": minidiff.Stroke([(0.0, 0.5), (1.0, 0.5)], width=0.2), "dog": minidiff.Point(0.5, 0)})
    cat, dog = (one.coverage((5, 3)) for one in regions)
    expected = torch.zeros(5, 3, dtype=torch.float64)
    expected[2] = 1
    torch.testing.assert_close(cat, expected, rtol=0, atol=0.05)
    assert float(dog.sum()) / 15 == pytest.approx(math.pi * 0.1**2 / 2, rel=0.02)
    thin = read_objects({"cat": minidiff.Point(0.31, 0.77, width=0.02)})[0]
    assert all(thin.coverage((n, n)).max() > 0 for n in (1, 7, 16, 64))


@pytest.mark.parametrize("line", [minidiff.Stroke([[0, 0], [1, 1]]), minidiff.Curve([(0, 0), (1, 0), (1, 1)], 0.3)])
def test_lines_come_back_from_json(line: minidiff.Stroke) -> None:
    boxes = {"cat": {"weight": 2.0, **line.plain()}, "dog": [line.plain(), line.plain()], "ball": line}
    regions = read_objects(boxes)
    assert [(one.name, one.line, one.weight) for one in regions] == [
        ("cat", line, 2.0),
        ("dog", line, 1.0),
        ("dog", line, 1.0),
        ("ball", line, 1.0),
    ]
    again = read_objects(json.loads(json.dumps(plain_boxes(regions))))
    assert [one.line for one in again] == [one.line for one in regions]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"stroke": []}, "expected 1 to 256"),
        ({"stroke": [(0, 0, 1)]}, r"expected \(x, y\)"),
        ({"curve": [(0, 2)]}, r"as fractions of the picture"),
        ({"curve": [(0, 1)], "width": 0}, "width of a line"),
        ({"box": (0, 0, 1, 1), "width": 0.1}, "expected"),
    ],
)
def test_wrong_lines_are_named(value: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        read_objects({"cat": value})


def test_tradiffusion_is_least_on_the_curve() -> None:
    grid, site = (6, 9), minidiff.Site("mid", 0, 0, "cross")
    layout = make_layout([read_objects({"cat": minidiff.Stroke([(0.1, 0.1), (0.1, 0.9)], 0.15)})], [1], 3, [grid])
    losses = []
    for column in (0, 3, 8):
        probs = torch.full((1, 2, *grid, 3), 1e-6)
        probs[..., column, 1] = 1
        losses.append(float(minidiff.tradiffusion_loss({site: probs}, layout)))
    assert losses[0] < 1e-6 < losses[1] < losses[2]


def test_a_stroke_guides_an_image_and_is_in_its_recipe(tiny_model: minidiff.Model) -> None:
    stroke = minidiff.Stroke([(0.2, 0.2), (0.8, 0.2)])
    asked = minidiff.Request("a cat", model=tiny_model, boxes={"cat": stroke}, steps=2, seed=1, output="latents")
    found = minidiff.generate(asked, guidance="tradiffusion")
    assert found.reports is not None and sum(found.reports[0].iterations) > 0
    recipe = json.loads(json.dumps(found.parameters[0]))
    assert read_line("stroke", recipe["boxes"]["cat"]["stroke"], 0.1) == stroke
    again = minidiff.generate(minidiff.Request.from_plain(recipe), model=tiny_model, output="latents")
    assert torch.equal(torch.as_tensor(again.latents), torch.as_tensor(found.latents))
