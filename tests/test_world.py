"""The world of coloured shapes: exact boxes, correct captions, the same pictures for the same seed."""

import math
import re

import numpy as np
import pytest
import torch

from minidiff.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    GAP,
    MAX_ASPECT,
    MAX_EDGE,
    MIN_EDGE,
    SHAPES,
    SIZE,
    Scene,
    Thing,
    caption,
    coverage,
    random_scene,
    render,
)

BOXES = [(0.2, 0.2, 0.7, 0.7), (0.1, 0.3, 0.7, 0.6), (0.41, 0.07, 0.66, 0.57)]
# Fraction of its box that a shape covers, from geometry.
AREAS = {
    "circle": math.pi / 4,
    "square": 1.0,
    "triangle": 0.5,
    "ring": math.pi / 4 * (1 - 0.52**2),
    "diamond": 0.5,
    "cross": 2 * 0.34 - 0.34**2,
    # ten triangles, each from the centre, a point and an adjacent notch; the box is 2 sin 72 by 1 + cos 36 degrees
    "star": 5 * 0.42 * math.sin(math.pi / 5) / (2 * math.sin(2 * math.pi / 5) * (1 + math.cos(math.pi / 5))),
}


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng) for _ in range(count)]


@pytest.mark.parametrize("box", BOXES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_its_box_exactly(shape: str, box: tuple[float, float, float, float]) -> None:
    (cover,) = coverage(SHAPES[shape], torch.tensor([box]))
    rows, columns = (cover > 0.25).any(1).nonzero().flatten(), (cover > 0.25).any(0).nonzero().flatten()
    found = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / SIZE
    # the point of a thin shape fades out over its last pixels
    assert (found - torch.tensor(box)).abs().max() <= 2.6 / SIZE


@pytest.mark.parametrize("box", BOXES, ids=str)
@pytest.mark.parametrize("shape", AREAS)
def test_a_shape_covers_the_area_of_its_geometry(shape: str, box: tuple[float, float, float, float]) -> None:
    (cover,) = coverage(SHAPES[shape], torch.tensor([box]))
    area = (box[2] - box[0]) * (box[3] - box[1]) * SIZE**2
    assert float(cover.sum()) == pytest.approx(AREAS[shape] * area, rel=0.03)


def test_edges_are_smooth() -> None:
    (cover,) = coverage(SHAPES["circle"], torch.tensor([[0.2, 0.2, 0.8, 0.8]]))
    between = ((cover > 0) & (cover < 1)).sum()
    assert 0.5 < float(between) / (math.pi * 0.6 * SIZE) < 2  # one to two pixels wide all around


def test_scenes_keep_their_rules() -> None:
    counts = set()
    for scene in scenes(300):
        counts.add(len(scene.things))
        assert scene.background in BACKGROUNDS
        for i, thing in enumerate(scene.things):
            assert thing.shape in SHAPES
            assert thing.colour in COLOURS
            x0, y0, x1, y1 = thing.box
            w, h = x1 - x0, y1 - y0
            assert min(w, h) >= MIN_EDGE - 1e-9
            assert max(w, h) <= MAX_EDGE
            assert max(w, h) / min(w, h) <= MAX_ASPECT + 1e-9
            assert min(x0, y0, 1 - x1, 1 - y1) >= GAP - 1e-9
            for other in scene.things[:i]:
                apart = max(x0 - other.box[2], other.box[0] - x1, y0 - other.box[3], other.box[1] - y1)
                assert apart >= GAP - 1e-9
    assert counts == {1, 2, 3, 4}


def test_pairs_can_be_held_out() -> None:
    rng = np.random.default_rng(3)
    found = [random_scene(rng, lambda shape, colour: (shape, colour) != ("circle", "red")) for _ in range(300)]
    pairs = {(thing.shape, thing.colour) for scene in found for thing in scene.things}
    assert ("circle", "red") not in pairs
    assert len(pairs) == len(SHAPES) * len(COLOURS) - 1


def test_the_same_seed_gives_the_same_pictures_and_captions() -> None:
    first, second = scenes(20, seed=7), scenes(20, seed=7)
    assert first == second
    assert first != scenes(20, seed=8)
    assert torch.equal(render(first), render(second))
    assert [caption(s, np.random.default_rng(1)) for s in first] == [
        caption(s, np.random.default_rng(1)) for s in first
    ]


def test_pictures_show_the_colours() -> None:
    scene = Scene((Thing("square", "red", (0.1, 0.1, 0.5, 0.5)), Thing("circle", "blue", (0.6, 0.6, 0.9, 0.9))), "navy")
    (picture,) = render([scene])
    assert picture.shape == (3, SIZE, SIZE)
    assert picture.dtype == torch.uint8
    for (x, y), colour in {
        (0.3, 0.3): COLOURS["red"],
        (0.75, 0.75): COLOURS["blue"],
        (0.9, 0.1): BACKGROUNDS["navy"],
    }.items():
        assert tuple(picture[:, int(y * SIZE), int(x * SIZE)].tolist()) == colour


def test_captions_say_what_is_there_and_nothing_else() -> None:
    rng = np.random.default_rng(5)
    colours, shapes = "|".join(COLOURS), "|".join(SHAPES)
    thing = rf"(?:an (?=[aeiou])|a (?![aeiou]))(?:(?:{colours}) )?(?:{shapes})"
    grammar = re.compile(rf"({thing}(?:, {thing})*(?: and {thing})?)(?: on a ({'|'.join(BACKGROUNDS)}) background)?")
    unsaid = grounds = total = 0
    for scene in scenes(500):
        text = caption(scene, rng)
        match = grammar.fullmatch(text)
        assert match, text
        named = re.findall(rf"(?:({colours}) )?({shapes})", match[1])
        assert [shape for _, shape in named] == [thing.shape for thing in scene.things]
        assert all(colour in ("", thing.colour) for (colour, _), thing in zip(named, scene.things, strict=True))
        assert match[2] in (None, scene.background)
        unsaid += sum(colour == "" for colour, _ in named)
        total += len(named)
        grounds += match[2] is not None
    assert 0.05 < unsaid / total < 0.11
    assert 0.42 < grounds / 500 < 0.58
