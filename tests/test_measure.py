"""The measurement: it finds what was drawn, reports doubts, and rejects another picture's ground truth."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from minidiff.shapes.measure import check, iou, main, matched, measure, share_right
from minidiff.shapes.world import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, coverage, render

BIG = (0.2, 0.25, 0.7, 0.8)
SMALL = (0.6, 0.1, 0.82, 0.33)


def picture(*things: Thing, background: str = "white") -> Tensor:
    return render([Scene(things, background)])[0]


def blend(background: Sequence[int], layers: Sequence[tuple[Tensor, Sequence[int]]]) -> Tensor:
    """A picture from layers of any colour, including ones outside the world of shapes."""
    pixels = torch.tensor(background).float()[:, None, None].expand(3, 128, 128)
    for cover, colour in layers:
        pixels = pixels + cover * (torch.tensor(colour).float()[:, None, None] - pixels)
    return pixels.round().to(torch.uint8)


def pairs() -> list[object]:
    """All colours and all backgrounds in the fast suite; all pairs of them in the slow one."""
    found = []
    for i, colour in enumerate(COLOURS):
        for j, background in enumerate(BACKGROUNDS):
            quick = i % len(BACKGROUNDS) == j
            found.append(pytest.param(colour, background, marks=() if quick else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("colour", "background"), pairs())
def test_every_shape_is_found_in_every_colour_on_every_background(colour: str, background: str) -> None:
    shapes = list(SHAPES)
    number = list(COLOURS).index(colour) + list(BACKGROUNDS).index(background)
    wanted = (Thing(shapes[number % 8], colour, BIG), Thing(shapes[(number + 3) % 8], colour, (0.74, 0.3, 0.97, 0.75)))
    found = measure(picture(*wanted, background=background))
    assert found.background == background
    assert found.doubts == ()
    for thing, one in zip(wanted, found.things, strict=True):
        assert (one.shape, one.colour, one.doubts) == (thing.shape, colour, ())
        assert iou(one.box, thing.box) > 0.95


def test_random_pictures_are_read_and_shuffled_ones_are_not() -> None:
    pictures, scenes = check(10, seed=3)
    assert share_right(pictures, scenes) >= 0.99
    assert share_right(pictures, scenes[1:] + scenes[:1]) <= 0.01


def test_objects_that_touch_are_told_apart_by_their_colours() -> None:
    left, right = Thing("square", "red", (0.1, 0.3, 0.5, 0.7)), Thing("square", "blue", (0.5, 0.35, 0.9, 0.65))
    found = measure(picture(left, right)).things
    assert [(one.colour, one.shape) for one in found] == [("red", "square"), ("blue", "square")]
    assert all(iou(one.box, thing.box) > 0.9 for one, thing in zip(found, (left, right), strict=True))


def test_an_outline_that_mixes_to_a_third_colour_is_no_object() -> None:
    # half of red on white is nearer to pink than to either
    (one,) = measure(picture(Thing("ring", "red", BIG))).things
    assert (one.colour, one.shape) == ("red", "ring")


def test_doubts_are_said() -> None:
    cover = coverage(SHAPES["circle"], torch.tensor([BIG]))[0]
    between = [(a + b) // 2 for a, b in zip(COLOURS["yellow"], COLOURS["lime"], strict=True)]
    (one,) = measure(blend(BACKGROUNDS["navy"], [(cover, between)])).things
    assert one.shape == "circle"
    assert len(one.doubts) == 1
    assert {"yellow", "lime"} <= set(one.doubts[0].replace(",", " ").split())

    cream = [(a + b) // 2 for a, b in zip(BACKGROUNDS["white"], BACKGROUNDS["beige"], strict=True)]
    assert "background" in measure(blend(cream, [(cover, COLOURS["blue"])])).doubts[0]


def test_a_shape_between_two_is_doubted() -> None:
    # |u|^4 + |v|^4 < 1 lies between a circle, |u|^2 + |v|^2 < 1, and a square
    u, v = torch.meshgrid(torch.linspace(-1.6, 1.6, 128), torch.linspace(-1.6, 1.6, 128), indexing="xy")
    cover = (u**4 + v**4 < 1).float()
    (one,) = measure(blend(BACKGROUNDS["white"], [(cover, COLOURS["blue"])])).things
    assert one.doubts in (("shape: circle or square",), ("shape: square or circle",))


def test_specks_are_left_out_and_said() -> None:
    cover = torch.zeros(128, 128)
    cover[10:14, 10:14] = 1
    found = measure(blend(BACKGROUNDS["black"], [(cover, COLOURS["red"])]))
    assert found.things == ()
    assert found.doubts == ("1 specks under 80 pixels are ignored",)


def test_an_empty_picture_has_no_objects() -> None:
    found = measure(picture(background="beige"))
    assert (found.things, found.background, found.doubts) == ((), "beige", ())


@pytest.mark.parametrize("wrong", [torch.zeros(3, 128, 128), torch.zeros(3, 64, 64, dtype=torch.uint8)])
def test_other_pictures_are_refused(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[3, 128, 128\]"):
        measure(wrong)


def test_iou_by_hand() -> None:
    assert iou((0, 0, 1, 1), (0, 0, 1, 1)) == 1
    assert iou((0, 0, 0.5, 1), (0.5, 0, 1, 1)) == 0
    assert iou((0, 0, 0.5, 1), (0.25, 0, 0.75, 1)) == pytest.approx(1 / 3)


def test_each_object_is_matched_once_and_to_the_nearest() -> None:
    left, right = Thing("star", "red", (0.1, 0.1, 0.4, 0.4)), Thing("star", "red", (0.6, 0.6, 0.9, 0.9))
    assert matched([left, right], [right, left]) == [right, left]
    assert matched([left], [left, right]) == [left, None]
    assert matched([Thing("star", "blue", left.box), Thing("ring", "red", left.box)], [left]) == [None]


def test_the_command_prints_its_own_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--count", "6"]) == 0
    printed = capsys.readouterr().out
    assert "objects right (colour, shape, box IoU >= 0.9): 100.00%" in printed
    assert "the same against another picture's scene:      0.00%" in printed


def test_a_wrong_measurer_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, scenes = check(6, seed=0)
    rng = np.random.default_rng(0)
    monkeypatch.setattr("minidiff.shapes.measure.check", lambda count, seed: (rng.permutation(pictures), scenes))
    assert main(["--check"]) == 1
