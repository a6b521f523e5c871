"""Objects of unusual sizes: which they are, where their maps say they lie, the stretch, the noise, and whole runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import relative_error
from torch import Tensor

import minidiff
from minidiff import Guidance, Model, Request, UsualSizes
from minidiff.guidance import stretch as stretch_module
from minidiff.guidance.guide import Guide
from minidiff.guidance.layout import Box, Layout, PlacedObject, make_layout, read_objects
from minidiff.guidance.objectives._maps import centre_and_spread
from minidiff.guidance.stretch import (
    BLUR,
    FAR,
    MARGIN,
    NEAR,
    NORM,
    PEAKED,
    Stretch,
    extents,
    outline,
    stretch_objects,
)
from minidiff.guidance.stretching import Stretching
from minidiff.networks.attention import HEAD_MEAN, Record
from minidiff.networks.sites import Site, cross
from minidiff.networks.unet import UNet
from minidiff.noise import Noise
from minidiff.sampling.sample import Predicted, SamplerStep

AT = Site("up", 1, 0, "cross")
TINY, USUAL = (0.1, 0.2, 0.25, 0.34), (0.5, 0.45, 0.9, 0.9)
HOW = Guidance(
    minidiff.inside_loss + minidiff.extent_loss,
    scale=0.05,
    steps=3,
    iterations=1,
    threshold=0.0,
    usual_sizes=UsualSizes(),
)
BOXES = {"cat": TINY, "ball": USUAL}


def marks(sizes: UsualSizes, places: dict[str, object], grid: tuple[int, int] = (16, 16)) -> list[bool]:
    some = [read_objects(places)]
    return [one.stretched for one in sizes.marked(some, some, grid)[0]]


def test_sizes_that_the_model_has_not_seen_are_unusual() -> None:
    def asked(**places: object) -> list[bool]:
        return marks(UsualSizes(), places)

    assert asked(small=(0, 0, 0.19, 0.3), large=(0, 0, 0.5, 0.67), long=(0, 0, 0.66, 0.29)) == [True] * 3
    assert asked(small=(0, 0, 0.21, 0.3), large=(0, 0, 0.5, 0.65), long=(0, 0, 0.6, 0.28)) == [False] * 3
    small = (0, 0, 0.1, 0.1)
    assert asked(mask=np.eye(5), several=[small, (0.5, 0.5, 0.6, 0.6)], line={"stroke": [(0.1, 0.1), (0.2, 0.2)]}) == (
        [False] * 3
    )
    assert asked(box={"box": small, "weight": 2.0}, nowhere=None) == [True, False]
    assert marks(UsualSizes(least=0.05), {"x": small}) == [False]
    for tenth in range(9):  # whatever the rounding of the difference
        assert asked(x=(tenth / 10, tenth / 10, tenth / 10 + 0.2, tenth / 10 + 0.2)) == [False]


def test_aspects_are_of_pixels() -> None:
    square, bar = {"x": (0.2, 0.2, 0.4, 0.6)}, {"x": (0.2, 0.2, 0.6, 0.4)}
    assert marks(UsualSizes(aspect=1.9), square, (16, 16)) == marks(UsualSizes(aspect=1.9), bar, (16, 16)) == [True]
    assert marks(UsualSizes(aspect=1.9), square, (16, 32)) == [False] and marks(UsualSizes(), bar, (16, 32)) == [True]


def test_it_is_a_value_that_json_can_hold() -> None:
    how = Guidance.read({"objective": "inside", "usual_sizes": {"least": 0.1, "aspect": 3}})
    assert how.usual_sizes == UsualSizes(least=0.1, aspect=3.0) and how.usual_sizes.most == 0.66
    plain = how.plain()
    assert isinstance(plain, dict) and plain["usual_sizes"] == {"least": 0.1, "most": 0.66, "aspect": 3.0}
    assert Guidance.read(plain) == how
    assert "usual_sizes" not in Guidance.read("inside").plain()
    for wrong in ({"lest": 0.1}, "yes", True, 3):
        with pytest.raises(
            ValueError, match=r"usual_sizes is .*; expected a minidiff.UsualSizes or a mapping with least, most, aspect"
        ):
            Guidance.read({"objective": "inside", "usual_sizes": wrong})
    with pytest.raises(ValueError, match=r"usual_sizes: least is 0.8; expected at most `most`, 0.66"):
        UsualSizes(least=0.8)
    for name, value in (("least", 2), ("most", -1), ("aspect", 0.5), ("least", "small")):
        with pytest.raises(ValueError, match=f"usual_sizes: {name} is "):
            UsualSizes(**{name: value})
    with pytest.raises(TypeError, match="lest"):
        UsualSizes(lest=0.1)


# ---- where an object is, and how it is stretched


@pytest.fixture
def stretched(monkeypatch: pytest.MonkeyPatch) -> list[Stretch]:
    """Each stretch that is made; no object is too far away for one."""
    done, call = list[Stretch](), Stretch.__call__

    def counted(own: Stretch, picture: Tensor) -> Tensor:
        done.append(own)
        return call(own, picture)

    monkeypatch.setattr(Stretch, "__call__", counted)
    monkeypatch.setattr(stretch_module, "FAR", math.inf)
    return done


def coordinates(height: int, width: int) -> Tensor:
    """A picture [2,h,w] of where each pixel is, x and y."""
    rows, columns = ((torch.arange(n).double() + 0.5) / n for n in (height, width))
    return torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)])


def slow_source(at: float, now: tuple[float, float], to: tuple[float, float]) -> float | None:
    """Where a coordinate comes from; None where nothing moves."""
    low, high = max(0.0, min(now[0], to[0]) - MARGIN), min(1.0, max(now[1], to[1]) + MARGIN)
    if not low <= at <= high:
        return None
    if at < to[0]:
        return low + (at - low) * (now[0] - low) / (to[0] - low)
    if at > to[1]:
        return high - (high - at) * (high - now[1]) / (high - to[1])
    return now[0] + (at - to[0]) * (now[1] - now[0]) / (to[1] - to[0])


@pytest.mark.parametrize(
    ("now", "to"),
    [((0.4, 0.35, 0.55, 0.5), (0.3, 0.3, 0.7, 0.6)), ((0.2, 0.3, 0.8, 0.7), (0.45, 0.45, 0.55, 0.5))],
    ids=["larger", "smaller"],
)
def test_a_stretch_is_linear_by_parts_and_leaves_the_rest(now: Box, to: Box) -> None:
    picture, other = coordinates(64, 96), (0.3, 0.2, 0.4, 0.9)
    moved = Stretch(now, to, (other,))(picture)
    some = 0
    for row in range(64):
        for column in range(96):
            x, y = picture[:, row, column].tolist()
            source = slow_source(x, now[::2], to[::2]), slow_source(y, now[1::2], to[1::2])
            if None in source or (other[0] <= x <= other[2] and other[1] <= y <= other[3]):
                assert torch.equal(moved[:, row, column], picture[:, row, column])
            else:  # torch's cubic interpolation errs in a linear picture by less than a tenth of a pixel
                assert moved[:, row, column].tolist() == pytest.approx(source, abs=1e-3)
                some += 1
    assert 500 < some < 64 * 96 - 500


def test_an_object_at_the_edge_fills_its_box_there() -> None:
    picture = torch.zeros(1, 100, 100)
    picture[:, 10:60, :30] = 1
    moved = Stretch((0.0, 0.1, 0.3, 0.6), (0.0, 0.0, 0.8, 0.5), ())(picture)
    expected = torch.zeros(1, 100, 100)
    expected[:, :50, :80] = 1
    assert ((moved > 0.5) != (expected > 0.5)).float().mean() < 0.005


def test_extents_are_the_spreads_of_profiles() -> None:
    """Against sums over cells, for two objects of which one has two words, and on a grid that is not square."""
    kept = torch.rand(1, 6, 9, 5).square()
    objects = (PlacedObject("a", (1, 2), (TINY,)), PlacedObject("b", (4,), (USUAL,)))
    layout = make_layout([objects], [4], 5, [(6, 9)])
    found = extents({AT: kept}, layout)
    for o, tokens in enumerate(((1, 2), (4,))):
        own = kept[0, ..., list(tokens)].double().mean(dim=2).numpy()
        for axis, n in ((0, 9), (1, 6)):
            line = (own**NORM).sum(axis=axis) ** (1 / NORM)
            line, at = line / line.sum(), (np.arange(n) + 0.5) / n
            centre = (line * at).sum()
            spread = (line * (at - centre) ** 2).sum() + 1 / (12 * n**2) - (BLUR / n) ** 2
            half = math.sqrt(3) * math.sqrt(spread) / PEAKED
            expected = [max(0.0, centre - half), min(1.0, centre + half)]
            assert found[0, o, axis::2].tolist() == pytest.approx(expected, abs=1e-5)
    point = torch.zeros(1, 6, 9, 5)
    point[0, 2, 3] = 1
    narrow = extents({AT: point}, layout)
    torch.testing.assert_close(narrow[0, 0, 2:] - narrow[0, 0, :2], torch.full((2,), stretch_module.LEAST))


def test_extents_of_two_objects_of_one_phrase_are_apart() -> None:
    """Each sees what is nearer to its box, though boxes are too small to hold what is drawn."""
    left, right = torch.zeros(1, 12, 12, 3), torch.zeros(1, 12, 12, 3)
    left[0, 4:8, 1:5, 1], right[0, 5:9, 7:11, 1] = 1.0, 0.8
    twins = read_objects({"cat": [{"box": (0.2, 0.4, 0.3, 0.5)}, {"box": (0.65, 0.5, 0.75, 0.6)}]})
    objects = [replace(one, tokens=(1,)) for one in twins]
    layout, alone = (make_layout([some], [3], 3, [(12, 12)]) for some in (objects, objects[:1]))
    both = extents({AT: left + right}, layout)[0]
    for found, own in zip(both, (left, right), strict=True):
        torch.testing.assert_close(found, extents({AT: own}, alone)[0, 0])
    large = torch.zeros(1, 12, 12, 3)
    large[0, 1:11, :9, 1] = 1.0  # beyond the middle between both
    pair = read_objects({"cat": [{"box": (0.0, 0.08, 0.76, 0.92)}, {"box": (0.8, 0.4, 0.95, 0.6)}]})
    layout = make_layout([[replace(one, tokens=(1,)) for one in pair]], [3], 3, [(12, 12)])
    torch.testing.assert_close(extents({AT: large}, layout)[0, 0], extents({AT: large}, alone)[0, 0])


def painted(*boxes: tuple[Box, float], ground: float = 0.8) -> Tensor:
    """A grey picture [3,50,100] of boxes."""
    picture = torch.full((3, 50, 100), ground)
    for (x0, y0, x1, y1), grey in boxes:
        picture[:, round(50 * y0) : round(50 * y1), round(100 * x0) : round(100 * x1)] = grey
    return picture


def test_an_outline_is_that_of_the_colour_that_stands_out() -> None:
    own, about = (0.3, 0.4, 0.6, 0.8), (0.34, 0.36, 0.64, 0.72)
    assert outline(painted((own, 0.1)), about) == own
    assert outline(painted((own, 0.1)), own) == own and outline(painted((own, 0.1), ground=0.0), own) == own
    frame = painted((own, 0.1), ((0.38, 0.5, 0.52, 0.7), 0.8))  # a ring: its hole is of the ground
    assert outline(frame, about) == own


def test_an_outline_ends_where_a_neighbour_begins() -> None:
    """One of another colour, one with a gap to it in rows or columns, or one in a box of its own."""
    own, about = (0.3, 0.4, 0.6, 0.8), (0.34, 0.36, 0.64, 0.72)
    touching, right, below = (0.6, 0.3, 0.9, 0.9), (0.62, 0.3, 0.9, 0.9), (0.5, 0.82, 0.9, 0.9)
    assert outline(painted((own, 0.1), (touching, 0.55)), about) == own
    assert outline(painted((own, 0.1), (right, 0.1)), about) == own
    assert outline(painted((own, 0.1), (below, 0.1)), about) == own
    assert outline(painted((own, 0.1), (right, 0.1), ((0.4, 0.82, 0.5, 0.9), 0.1)), about) == own
    beside = painted((own, 0.1), (touching, 0.1))
    assert outline(beside, about) != own and outline(beside, about, [touching]) == own


def test_an_outline_is_the_box_where_the_picture_does_not_tell() -> None:
    about = (0.34, 0.36, 0.64, 0.72)
    plain = painted()
    assert outline(plain, about) == about
    apart = painted(((0.3, 0.4, 0.48, 0.8), 0.1), ((0.5, 0.4, 0.66, 0.8), 0.1))  # nothing in the middle
    assert outline(apart, about) == about
    assert outline(painted(((0.34, 0.36, 0.44, 0.72), 0.1)), about) == about  # much smaller
    assert outline(painted(((0.3, 0.4, 0.6, 0.8), 0.1)), about, [(0.0, 0.0, 1.0, 1.0)]) == about
    everywhere, nowhere = (0.0, 0.0, 1.0, 1.0), (0.501, 0.5, 0.502, 0.6)
    assert outline(torch.rand(3, 50, 100), everywhere) == everywhere and outline(plain, nowhere) == nowhere


def test_what_fits_or_is_elsewhere_is_left(monkeypatch: pytest.MonkeyPatch, stretched: list[Stretch]) -> None:
    monkeypatch.setattr(stretch_module, "FAR", FAR)
    to, edge = (0.4, 0.4, 0.5, 0.5), 0.1
    objects = (PlacedObject("a", (1,), (to,)), PlacedObject("b", (2,), (USUAL, TINY)), PlacedObject("c", (3,)))
    picture = torch.rand(3, 40, 60)

    def todo(now: Box, marked: bool = True) -> list[Box]:
        """Where the one that is seen and drawn at `now` is stretched from."""
        monkeypatch.setattr(stretch_module, "outline", lambda picture, box, others: box)
        stretched.clear()
        moved = stretch_objects(picture, [now] * 4, [replace(objects[0], stretched=marked), *objects[1:]])
        assert all(one.to == to and one.others == (USUAL, TINY) for one in stretched)
        assert (moved is picture) is not bool(stretched)
        return [one.now for one in stretched]

    def around(size: float, off: float = 0.0) -> Box:
        return (0.45 + off - size / 2, 0.4, 0.45 + off + size / 2, 0.5)

    for fits in (around(edge), around(edge * math.exp(0.9 * NEAR)), around(edge, 0.9 * NEAR * edge)):
        assert todo(fits) == []
    for missed in (
        around(edge * math.exp(1.1 * NEAR)),
        around(edge * math.exp(-1.1 * NEAR)),
        around(edge, 1.1 * NEAR * edge),
        around(edge, 0.9 * FAR * edge),
    ):
        assert todo(missed) == [pytest.approx(missed)]
    assert todo(around(edge, 1.1 * FAR * edge)) == []
    assert len(todo(around(2 * edge, 1.5 * FAR * edge))) == 1  # of the larger of both
    assert todo(around(2 * edge), marked=False) == []


def test_two_that_are_close_are_not_torn(monkeypatch: pytest.MonkeyPatch, stretched: list[Stretch]) -> None:
    """Where what one stretch moves holds a part of the other object, as it is drawn: of both if it is of both."""
    monkeypatch.setattr(stretch_module, "outline", lambda picture, box, others: box)
    picture = torch.rand(3, 100, 100)

    def todo(*pairs: tuple[Box, Box]) -> list[Box]:
        objects = [PlacedObject(str(i), (i,), (to,), stretched=True) for i, (_, to) in enumerate(pairs)]
        stretched.clear()
        stretch_objects(picture, [now for now, _ in pairs], objects)
        return [one.now for one in stretched]

    own, far, off = ((0.2, 0.4, 0.4, 0.6), (0.25, 0.45, 0.35, 0.55)), 0.4 + 1.1 * MARGIN, 0.4 + 0.9 * MARGIN
    small = (0.55, 0.45, 0.65, 0.55)
    assert todo(own, ((far, 0.4, 0.7, 0.6), small)) == [own[0], (far, 0.4, 0.7, 0.6)]
    assert todo(own, ((off, 0.4, 0.7, 0.6), small)) == []
    assert todo(own, ((off, 0.6 + 1.1 * MARGIN, 0.7, 0.9), (0.55, 0.7, 0.65, 0.8))) == [
        own[0],
        (off, 0.6 + 1.1 * MARGIN, 0.7, 0.9),
    ]
    wide = (
        (far, 0.4, 0.7, 0.6),
        (0.42, 0.35, 0.8, 0.65),
    )  # moves what the first one has drawn, and goes where it moves
    assert todo(own, wide) == []
    there = (own[0], (0.2, 0.4, 0.45, 0.6)), ((0.7, 0.4, 0.95, 0.6), (0.5, 0.4, 0.95, 0.6))
    assert todo(*there) == []  # each moves what the other has become
    fits = ((off, 0.4, 0.7, 0.6), (off, 0.4, 0.7, 0.6))
    assert todo(own, fits) == []


def test_objects_behind_around_or_drawn_by_masks(monkeypatch: pytest.MonkeyPatch, stretched: list[Stretch]) -> None:
    """An object behind, or one that its box lies in, is stretched with it; others keep their boxes and their masks,
    where no outline is sought, either.
    """
    to, mask = (0.4, 0.4, 0.5, 0.5), torch.zeros(10, 20)
    mask[2:4, 5:9] = 1
    objects = (
        PlacedObject("a", (1,), (to,), stretched=True, order=1),
        PlacedObject("behind", (2,), ((0.3, 0.4, 0.44, 0.6),)),
        PlacedObject("before", (2,), ((0.3, 0.4, 0.43, 0.6),), order=1),
        PlacedObject("around", (2,), ((0.3, 0.3, 0.7, 0.7),), order=1),
        PlacedObject("drawn", (2,), mask=mask, order=2),
    )
    seen, others = (0.35, 0.4, 0.5, 0.55), ((0.3, 0.4, 0.43, 0.6), (0.25, 0.2, 0.45, 0.4))
    sought = list[tuple[object, ...]]()

    def outlined(picture: Tensor, box: Box, others: list[Box]) -> Box:
        sought.append((box, tuple(others)))
        return (0.36, 0.4, 0.5, 0.55)

    monkeypatch.setattr(stretch_module, "outline", outlined)
    stretch_objects(torch.rand(3, 20, 20), [list(seen)] * 5, objects)
    assert stretched == [Stretch((0.36, 0.4, 0.5, 0.55), to, others)] and sought == [(seen, others)]


def test_only_the_centre_of_an_object_to_be_stretched_is_guided() -> None:
    """Two maps with one centre have one loss, whatever their size; not so for an object that is not to be stretched."""
    wide = torch.zeros(1, 8, 8, 4)
    narrow = wide.clone()
    wide[0, 2:6, 2:6, 1:3], narrow[0, 3:5, 3:5, 1:3] = 1, 1
    objects = (PlacedObject("a", (1,), ((0.2, 0.3, 0.3, 0.9),), stretched=True), PlacedObject("b", (2,), (USUAL,)))
    layout = make_layout([objects], [4], 4, [(8, 8)])
    assert layout.stretched.tolist() == [[1, 0]] and layout.images(torch.tensor([0, 0])).stretched.shape == (2, 2)
    losses = [minidiff.extent_loss.function({AT: kept}, layout)[0] for kept in (wide, narrow)]
    assert losses[0][0] == losses[1][0] and abs(losses[0][1] - losses[1][1]) > 0.1
    centres, edges = centre_and_spread(layout.masks[8, 8])
    off = (0.5 - centres[0, 0]) / (math.sqrt(12) * edges[0, 0])
    assert losses[0][0].item() == pytest.approx(3 * off.square().sum().item(), rel=1e-5)


# ---- fresh noise


class ToyGuide:
    """A Guide as `renew` reads it."""

    guidance = replace(HOW, steps=3)


def toy(rows: Sequence[bool], noise: Callable[[], Tensor]) -> Stretching:
    regions = [[PlacedObject("a", (1,), (TINY,), stretched=one)] for one in rows]
    nothing = Stretching.__dataclass_fields__.keys() - {"guide", "regions", "noise"}
    return Stretching(guide=ToyGuide(), regions=regions, noise=noise, **dict.fromkeys(nothing))  # type: ignore[arg-type]


def test_noise_is_renewed_as_an_sde_would_and_only_where_it_is_asked() -> None:
    x, clean, fresh = (torch.randn(3, 4, 5, 6) for _ in range(3))
    sigma, before = 2.0, 3.0
    level = 1 / math.sqrt(1 + sigma**2)
    stretching = toy([True, False, True], lambda: fresh)
    found = stretching.renew(x, level**2, 1, Predicted(clean, before))
    kept = math.exp(-2 * math.log(before / sigma))  # eta 2
    expected = clean + kept * (x / level - clean) + sigma * math.sqrt(1 - kept**2) * fresh
    torch.testing.assert_close(found[::2], (level * expected)[::2])
    assert torch.equal(found[1], x[1]) and found is not x
    assert stretching.renew(x, level**2, 3, Predicted(clean, before)) is x
    own = level * (clean + sigma * torch.randn(3, 4, 5, 6))  # noise of the right strength stays so
    found = stretching.renew(own, level**2, 1, Predicted(clean, before))
    assert (found / level - clean).std().item() == pytest.approx(sigma, rel=0.15)


class ToyMaps:
    """A Guide and its network, whose maps say that an object lies evenly in a part of a grid of 8x8 cells."""

    guidance = ToyGuide.guidance
    whole_batch = False

    def __init__(self, layout: Layout, rows: slice, columns: slice) -> None:
        kept = torch.zeros(1, 8, 8, 3)
        kept[:, rows, columns, 1] = 1
        self.layout, self.maps, self.turned = layout, {AT: kept}, list[int]()

    def turn_to(self, index: int) -> None:
        self.turned.append(index)

    def read(self, t: Tensor, abar: float, rows: Sequence[int], index: int) -> tuple[object, ...]:
        assert self.turned == [3] and len(rows) == 1 and (float(t), abar, index) == (0.0, 1.0, 3)
        return (), t, torch.zeros(1, 3, 5), self.layout, {}

    def forward(self, x: Tensor, *rest: object) -> tuple[None, object]:
        assert len(x) == 1
        return None, self.maps


def decoded(asked: list[str], latents: Tensor) -> Tensor:
    asked.append("decode")
    return latents[:, :3].repeat_interleave(8, dim=2).repeat_interleave(8, dim=3) / 8 + 0.5


def encoded(asked: list[str], pictures: Tensor) -> Tensor:
    asked.append("encode")
    return torch.nn.functional.avg_pool2d(pictures, 8)[:, [0, 1, 2, 0]]


def steps_of(latents: Tensor, number: int) -> Iterator[SamplerStep]:
    for index in range(number):
        yield SamplerStep(index, 500.0 - index, 1.5, latents + (number - 1 - index), latents / 2)


def in_latents(moved: Tensor, picture: Tensor, latents: Tensor) -> Tensor:
    """A changed picture's latents, the given ones where nothing changed."""
    changed = (moved != picture).any(dim=0).unfold(0, 8, 8).unfold(1, 8, 8).flatten(2).any(dim=2)
    return torch.where(changed, encoded([], 2 * moved[None].clamp(0, 1) - 1)[0], latents)


@pytest.mark.parametrize("box", [(0.05, 0.05, 0.9, 0.9), (0.42, 0.45, 0.55, 0.55)], ids=["grows", "shrinks"])
def test_the_finished_picture_is_stretched(box: Box) -> None:
    """That of the last step alone, and nothing beside the object; images without such objects are left alone."""
    one = PlacedObject("a", (1,), (box,), stretched=True)
    layout = make_layout([[one]], [3], 3, [(8, 8)])
    toy, asked = ToyMaps(layout, slice(2, 6), slice(2, 6)), list[str]()
    stretching = Stretching(
        toy,  # type: ignore[arg-type]
        [[], [one]],
        toy.forward,  # type: ignore[arg-type]
        Record(cross, HEAD_MEAN),
        lambda: torch.zeros(0),
        partial(decoded, asked),
        partial(encoded, asked),
    )
    latents = torch.randn(2, 4, 16, 16)
    plain, found = list(steps_of(latents, 4)), list(stretching.finished(steps_of(latents, 4), 4))
    assert asked == ["decode", "encode"] and toy.turned == [3]
    for before, after in zip(plain[:3], found[:3], strict=True):
        assert torch.equal(after.latents, before.latents) and torch.equal(after.denoised, before.denoised)
    (now,) = extents(toy.maps, layout)[:, 0].tolist()
    picture = decoded([], latents[1:])[0]
    expected = in_latents(Stretch(outline(picture, tuple(now)), box)(picture), picture, latents[1])
    there = (expected != latents[1]).any(dim=0)
    assert there.sum() > 4 and (box[0] < 0.1 or there.sum() < 200)
    for last, before in ((found[3].latents, latents), (found[3].denoised, latents / 2)):
        torch.testing.assert_close(last[1], expected, rtol=0, atol=1e-5)
        assert torch.equal(last[0], before[0])
    assert torch.equal(found[3].latents[1][:, ~there], latents[1][:, ~there])


def test_two_objects_of_an_image_are_both_stretched(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one picture: one grows, the other shrinks."""
    boxes = ((0.05, 0.05, 0.4, 0.4), (0.05, 0.05, 0.25, 0.25)), ((0.6, 0.6, 0.9, 0.9), (0.5, 0.5, 0.95, 0.95))
    objects = [PlacedObject(str(i), (i,), (to,), stretched=True) for i, (_, to) in enumerate(boxes)]
    monkeypatch.setattr("minidiff.guidance.stretching.extents", lambda *_: torch.tensor([[now for now, _ in boxes]]))
    monkeypatch.setattr(stretch_module, "outline", lambda picture, box, others: box)
    toy, asked, latents = (
        ToyMaps(make_layout([[]], [3], 3, [(8, 8)]), slice(1), slice(1)),
        [],
        torch.randn(1, 4, 16, 16),
    )
    stretching = Stretching(
        toy,  # type: ignore[arg-type]
        [objects],
        toy.forward,  # type: ignore[arg-type]
        Record(cross, HEAD_MEAN),
        lambda: torch.zeros(0),
        partial(decoded, asked),
        partial(encoded, asked),
    )
    *_, last = stretching.finished(steps_of(latents, 4), 4)
    picture = moved = decoded([], latents)[0]
    for (now, to), other in zip(boxes, reversed(boxes), strict=True):
        moved = Stretch(now, to, (other[1],))(moved)
    torch.testing.assert_close(last.latents[0], in_latents(moved, picture, latents[0]), rtol=0, atol=1e-5)
    assert asked == ["decode", "encode"]
    for part in (slice(0, 7), slice(8, 16)):
        assert relative_error(last.latents[0, :, part, part], latents[0, :, part, part]) > 0.1


def test_its_noise_is_that_of_no_other_draw(tiny_model: Model) -> None:
    request = Request(["x", "x"], model=tiny_model, seed=(3, 2**63 + 5))
    beside, own = Noise.beside(request, (4, 3, 3)), Noise.of(request, (4, 3, 3))
    first = beside()
    assert not any(torch.allclose(one, other) for one in first for other in (*own(), *own(), *own()))
    assert not torch.allclose(first, beside())
    alone = Noise.beside(Request("x", model=tiny_model, seed=(2**63 + 5,)), (4, 3, 3))
    assert torch.equal(alone()[0], first[1])


# ---- whole runs


def drawn(model: Model, boxes: object = None, **options: object) -> minidiff.Result:
    given = {
        "prompt": "a cat and a ball",
        "boxes": BOXES if boxes is None else boxes,
        "seed": 5,
        "steps": 6,
        "guidance": HOW,
        "sampler": "dpmpp_2m",
        "output": "latents",
    }
    return minidiff.generate(model=model, **{**given, **options})


def test_an_image_in_a_batch_is_as_alone_and_others_as_without_a_fit(
    tiny_model: Model, stretched: list[Stretch]
) -> None:
    usual = {"cat": (0.1, 0.1, 0.5, 0.5), "ball": USUAL}
    both = drawn(tiny_model, [BOXES, usual], prompt=["a cat and a ball"] * 2, seed=[5, 6])
    assert [one.to for one in stretched] == [TINY] and stretched[0].others == (USUAL,)
    alone = [drawn(tiny_model), drawn(tiny_model, usual, seed=6)]
    assert len(stretched) == 2
    for i, one in enumerate(alone):
        assert relative_error(both.latents[i], one.latents[0]) < 1e-4
    plain = drawn(tiny_model, usual, seed=6, guidance=replace(HOW, usual_sizes=None))
    assert torch.equal(alone[1].latents, plain.latents)
    assert relative_error(alone[0].latents, drawn(tiny_model, guidance=replace(HOW, usual_sizes=None)).latents) > 1e-2
    assert torch.equal(alone[0].latents, drawn(tiny_model).latents)


def test_one_look_more_and_one_decoding(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, stretched: list[Stretch]
) -> None:
    passes, pictures = list[int](), list[int]()
    forward, decode = UNet.forward, Model.decode

    def counted(own: UNet, x: Tensor, *rest: object) -> object:
        passes.append(len(x))
        return forward(own, x, *rest)  # type: ignore[arg-type]

    def decoded(own: Model, latents: Tensor) -> Tensor:
        pictures.append(len(latents))
        return decode(own, latents)

    monkeypatch.setattr(UNet, "forward", counted)
    monkeypatch.setattr(Model, "decode", decoded)
    drawn(tiny_model)
    assert passes == [1, 2] * 3 + [2] * 3 + [1] and pictures == [1] and len(stretched) == 1
    passes.clear(), pictures.clear()
    drawn(tiny_model, guidance=replace(HOW, usual_sizes=None))
    assert passes == [1, 2] * 3 + [2] * 3 and pictures == []


def test_half_precision_and_a_batch_that_must_keep_its_size(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, stretched: list[Stretch]
) -> None:
    """Compiled looks have one size: then the look before a stretch has it, too."""
    model, passes, forward = minidiff.load(tiny_folder, dtype="bfloat16"), list[int](), UNet.forward
    usual = {"cat": (0.1, 0.1, 0.5, 0.5), "ball": USUAL}

    def counted(
        own: UNet, x: Tensor, t: Tensor, context: Tensor, record: Record | None = None, *rest: object
    ) -> object:
        passes.extend([len(x)] if record is not None and not torch.is_grad_enabled() else [])
        return forward(own, x, t, context, record, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(UNet, "forward", counted)
    asked = {"boxes": [usual, BOXES], "prompt": ["a cat and a ball"] * 2, "seed": [6, 5]}
    found = drawn(model, **asked)
    assert found.latents.isfinite().all() and passes == [1] and [one.to for one in stretched] == [TINY]
    monkeypatch.setattr(Stretching, "__init__", whole(Stretching.__init__))
    again = drawn(model, **asked)
    assert passes == [1, 2] and [one.to for one in stretched] == [TINY] * 2
    torch.testing.assert_close(stretched[1].now, stretched[0].now, rtol=0, atol=0.02)
    assert torch.equal(again.latents[0], found.latents[0])


def whole(init: Callable[..., None]) -> Callable[..., None]:
    """A Stretching whose guide keeps the batch for it alone."""

    def made(own: Stretching, guide: Guide, *rest: object) -> None:
        kept = copy(guide)
        kept.whole_batch = True
        init(own, kept, *rest)

    return made


def test_runs_that_end_in_noise_get_none(tiny_model: Model) -> None:
    """A caller's sigmas may end above 0: what the last step leaves is no picture yet."""
    for sigmas, changes in (((10.0, 4.0, 2.0, 1.0), False), ((10.0, 4.0, 2.0, 0.0), True)):
        found, plain = (
            drawn(tiny_model, sampler="euler", steps=None, sigmas=sigmas, guidance=how)
            for how in (HOW, replace(HOW, usual_sizes=None))
        )
        assert torch.equal(found.latents, plain.latents) is not changes


def test_an_image_that_is_no_number_is_left() -> None:
    """The run says once that it is black, and others of its batch are stretched."""
    latents = torch.randn(2, 4, 8, 8)
    latents[0, 0, 0, 0] = math.nan
    toy = ToyMaps(make_layout([[]], [3], 3, [(8, 8)]), slice(1), slice(1))
    one = PlacedObject("a", (1,), (TINY,), stretched=True)
    maps = {AT: torch.rand(2, 8, 8, 3)}
    toy.read = lambda t, *rest: ((), t, torch.zeros(2, 3, 5), make_layout([[one], [one]], [3, 3], 3, [(8, 8)]), {})  # type: ignore[method-assign, assignment]
    toy.forward = lambda *rest: (None, maps)  # type: ignore[method-assign, assignment]
    stretching = Stretching(
        toy,  # type: ignore[arg-type]
        [[one], [one]],
        toy.forward,  # type: ignore[arg-type]
        Record(cross, HEAD_MEAN),
        lambda: torch.zeros(0),
        partial(decoded, asked := []),
        partial(encoded, asked),
    )
    *_, last = stretching.finished(steps_of(latents, 1), 1)
    assert asked.count("decode") == 1
    torch.testing.assert_close(last.latents[0], latents[0], rtol=0, atol=0, equal_nan=True)


def test_pictures_that_do_not_start_from_noise_alone_get_none(tiny_model: Model) -> None:
    for how in (replace(HOW, scale=0.0), replace(HOW, iterations=0)):  # nothing is placed that could be stretched
        assert torch.equal(drawn(tiny_model, guidance=how).latents, drawn(tiny_model, guidance="none").latents)
    none = replace(HOW, usual_sizes=None)
    for options in ({"image": torch.rand(3, 32, 32), "strength": 0.8}, {"latents": torch.randn(1, 4, 8, 8)}):
        with_fit, without = (drawn(tiny_model, guidance=how, **options) for how in (HOW, none))
        assert torch.equal(with_fit.latents, without.latents)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler", ["dpm2", "heun", "euler_ancestral", "dpmpp_2m_cfg_pp", "uni_pc", "lcm", "deis", "lms"]
)
def test_samplers_of_all_kinds_go_on_from_it(tiny_model: Model, stretched: list[Stretch], sampler: str) -> None:
    scale = {"guidance_scale": 0.6} if sampler.endswith("cfg_pp") else {"guidance_scale": 2.0}
    found = drawn(tiny_model, sampler=sampler, **scale)
    assert found.latents.isfinite().all() and len(stretched) == 1
    again = minidiff.generate(found.request, output="latents")
    assert torch.equal(found.latents, again.latents)


def test_a_text_that_lacks_the_phrase_then_is_guided_as_without(tiny_model: Model, stretched: list[Stretch]) -> None:
    """Not its noise either; while a phrase that comes later is stretched."""
    for text, times in (("a [cat:dog:0.4] and a ball", 0), ("a [dog:cat:0.4] and a ball", 1)):
        found, plain = (
            drawn(tiny_model, prompt=text, syntax="a1111", guidance=how)
            for how in (HOW, replace(HOW, usual_sizes=None))
        )
        assert found.latents.isfinite().all() and len(stretched) == times
        assert torch.equal(found.latents, plain.latents) is not bool(times)


def test_noise_and_masks_of_a_run_are_its_own(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The renewed noise is not the start's; the look before the stretch reads the run's edits."""
    drawn_noise, seen = list[Tensor](), list[tuple[int, int]]()
    draw, forward = Noise.__call__, UNet.forward

    def counted(own: Noise) -> Tensor:
        drawn_noise.append(draw(own))
        return drawn_noise[-1]

    def passed(own: UNet, x: Tensor, t: Tensor, context: Tensor, record: Record | None = None, *rest: object) -> object:
        if record is not None and not torch.is_grad_enabled():
            seen.append((len(x), len(rest[0])))  # type: ignore[arg-type]
        return forward(own, x, t, context, record, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Noise, "__call__", counted)
    monkeypatch.setattr(UNet, "forward", passed)
    boxes = [BOXES, {"ball": USUAL}]
    many = {"prompt": ["a cat and a ball"] * 2, "boxes": boxes, "seed": [5, 6], "edits": minidiff.regional_prompting()}
    drawn(tiny_model, **many)
    start, *renewed = drawn_noise
    assert len(renewed) == 2 and not any(torch.allclose(one, start) for one in renewed)
    assert seen == [(1, 1)]
    drawn_noise.clear()
    drawn(tiny_model, **many, sampler="pndm")  # which goes on from noise of before
    assert len(drawn_noise) == 1 and seen == [(1, 1)] * 2
