"""Objects of unusual sizes: which they are, where their maps say they lie, the stretch, the noise, and whole runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from minidiff.guidance.stretch import FAR, GROWING, MARGIN, NEAR, SHRINKING, Profile, Stretch, extents, stretches
from minidiff.guidance.stretching import Stretching
from minidiff.networks.attention import HEAD_MEAN, Record
from minidiff.networks.sites import Site, cross
from minidiff.networks.unet import UNet
from minidiff.noise import Noise
from minidiff.sampling.sample import Predicted

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


@pytest.mark.parametrize("profile", [SHRINKING, GROWING])
def test_extents_are_the_spreads_of_profiles(profile: Profile) -> None:
    """Against sums over cells, for two objects of which one has two words, and on a grid that is not square."""
    kept = torch.rand(1, 6, 9, 5).square()
    objects = (PlacedObject("a", (1, 2), (TINY,)), PlacedObject("b", (4,), (USUAL,)))
    found = extents({AT: kept}, make_layout([objects], [4], 5, [(6, 9)]), profile)
    for o, tokens in enumerate(((1, 2), (4,))):
        own = kept[0, ..., list(tokens)].double().mean(dim=2).numpy()
        for axis, n in ((0, 9), (1, 6)):
            line = (own**profile.norm).sum(axis=axis) ** (1 / profile.norm)
            line, at = line / line.sum(), (np.arange(n) + 0.5) / n
            centre = (line * at).sum()
            spread = (line * (at - centre) ** 2).sum() + 1 / (12 * n**2) - (profile.blur / n) ** 2
            half = math.sqrt(3) * math.sqrt(spread) / profile.peaked
            expected = [max(0.0, centre - half), min(1.0, centre + half)]
            assert found[0, o, axis::2].tolist() == pytest.approx(expected, abs=1e-5)
    point = torch.zeros(1, 6, 9, 5)
    point[0, 2, 3] = 1
    narrow = extents({AT: point}, make_layout([objects], [4], 5, [(6, 9)]), GROWING)
    torch.testing.assert_close(narrow[0, 0, 2:] - narrow[0, 0, :2], torch.full((2,), stretch_module.LEAST))


def test_what_fits_or_is_elsewhere_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    to, edge = (0.4, 0.4, 0.5, 0.5), 0.1
    objects = (PlacedObject("a", (1,), (to,)), PlacedObject("b", (2,), (USUAL, TINY)), PlacedObject("c", (3,)))

    def todo(now: Box, stretched: bool = True, other: Box | None = None, shrinks: bool | None = None) -> list[Box]:
        """Where one that a profile sees at `now` is stretched from; other: where the one for what grows sees it."""
        seen = {SHRINKING: now, GROWING: other or now}
        monkeypatch.setattr(
            stretch_module, "extents", lambda maps, layout, how: torch.tensor([[seen[how]] * 3]).double()
        )
        some = (replace(objects[0], stretched=stretched), *objects[1:])
        (found,) = stretches({}, make_layout([some], [4], 5, [(6, 9)]), [some])
        assert all(one.to == to and one.others == (USUAL, TINY) for one in found)
        assert shrinks is None or [one.shrinks for one in found] == [shrinks]
        return [one.now for one in found]

    def around(size: float, off: float = 0.0) -> Box:
        return (0.45 + off - size / 2, 0.4, 0.45 + off + size / 2, 0.5)

    for fits in (around(edge), around(edge * math.exp(0.9 * NEAR)), around(edge, 0.9 * NEAR * edge)):
        assert todo(fits) == []
    for missed in (
        around(edge * math.exp(1.1 * NEAR)),
        around(edge, 1.1 * NEAR * edge),
        around(edge, 0.9 * FAR * edge),
    ):
        assert todo(missed) == [pytest.approx(missed)]
    assert todo(around(edge, 1.1 * FAR * edge)) == []
    assert len(todo(around(2 * edge, 1.5 * FAR * edge))) == 1  # of the larger of both
    assert todo(around(2 * edge), stretched=False) == []
    assert todo(around(2 * edge), other=around(edge)) == [pytest.approx(around(2 * edge))]
    assert todo(around(edge / 2), other=around(edge / 3)) == [pytest.approx(around(edge / 3))]
    assert todo(around(edge / 2), other=around(2 * edge), shrinks=False) == [pytest.approx(around(2 * edge))]


def test_objects_behind_around_or_drawn_by_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """An object behind, or one that its box lies in, is stretched with it; others keep their boxes and their masks."""
    to, mask = (0.4, 0.4, 0.5, 0.5), torch.zeros(10, 20)
    mask[2:4, 5:9] = 1
    objects = (
        PlacedObject("a", (1,), (to,), stretched=True, order=1),
        PlacedObject("behind", (2,), ((0.3, 0.4, 0.44, 0.6),)),
        PlacedObject("before", (2,), ((0.3, 0.4, 0.43, 0.6),), order=1),
        PlacedObject("around", (2,), ((0.3, 0.3, 0.7, 0.7),), order=1),
        PlacedObject("drawn", (2,), mask=mask, order=2),
    )
    monkeypatch.setattr(stretch_module, "extents", lambda *asked: torch.tensor([[[0.35, 0.4, 0.5, 0.55]] * 5]))
    ((stretch,),) = stretches({}, make_layout([objects], [4], 5, [(6, 9)]), [objects])
    assert stretch.others == ((0.3, 0.4, 0.43, 0.6), (0.25, 0.2, 0.45, 0.4)) and stretch.shrinks


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
    """A Guide as `renew` reads it before its last guided step."""

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
    found = stretching.renew(x, torch.tensor(500.0), level**2, 1, Predicted(clean, before))
    kept = math.exp(-2 * math.log(before / sigma))  # eta 2
    expected = clean + kept * (x / level - clean) + sigma * math.sqrt(1 - kept**2) * fresh
    torch.testing.assert_close(found[::2], (level * expected)[::2])
    assert torch.equal(found[1], x[1]) and found is not x
    assert stretching.renew(x, torch.tensor(500.0), level**2, 4, Predicted(clean, before)) is x
    own = level * (clean + sigma * torch.randn(3, 4, 5, 6))  # noise of the right strength stays so
    found = stretching.renew(own, torch.tensor(500.0), level**2, 1, Predicted(clean, before))
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
        assert self.turned == [3] and len(rows) == 1
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


@pytest.mark.parametrize("grows", [True, False])
def test_the_prediction_is_stretched_as_latents_where_it_grows_and_as_a_picture_where_it_shrinks(grows: bool) -> None:
    """With new noise where it is stretched, and nothing elsewhere; images without such objects are left alone."""
    box = (0.05, 0.05, 0.9, 0.9) if grows else (0.42, 0.45, 0.55, 0.55)
    one = PlacedObject("a", (1,), (box,), stretched=True)
    layout = make_layout([[one]], [3], 3, [(8, 8)])
    toy = ToyMaps(layout, slice(2, 6), slice(2, 6))
    asked = list[str]()

    decode, encode = partial(decoded, asked), partial(encoded, asked)
    x, clean, fresh = (torch.randn(2, 4, 16, 16) for _ in range(3))
    stretching = Stretching(toy, [[], [one]], toy.forward, Record(cross, HEAD_MEAN), lambda: fresh, decode, encode)  # type: ignore[arg-type]
    sigma = 1.5
    level = 1 / math.sqrt(1 + sigma**2)
    found = stretching.renew(x, torch.tensor(500.0), level**2, 3, Predicted(clean, 2.0))
    (now,) = extents(toy.maps, layout, GROWING if grows else SHRINKING)[:, 0].tolist()
    stretch = Stretch(tuple(now), box)
    if grows:
        target = stretch(clean[1])
    else:
        picture = decode(clean[1:])[0]
        moved = stretch(picture)
        changed = (moved != picture).any(dim=0).unfold(0, 8, 8).unfold(1, 8, 8).flatten(2).any(dim=2)
        target = torch.where(changed, encode(2 * moved[None].clamp(0, 1) - 1)[0], clean[1])
    there = (target != clean[1]).any(dim=0)
    expected = torch.where(there, level * (target + sigma * fresh[1]), x[1])
    torch.testing.assert_close(found[1], expected, rtol=0, atol=1e-5)
    assert torch.equal(found[1][:, ~there], x[1][:, ~there]) and torch.equal(found[0], x[0])
    assert there.sum() > 4 and (grows or there.sum() < 200)
    assert asked == ([] if grows else ["decode", "encode"] * 2)


def test_two_objects_of_an_image_are_both_stretched(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that shrinks, as a picture, and one that grows, as latents; two that shrink share the picture."""
    one = Stretch((0.05, 0.05, 0.4, 0.4), (0.05, 0.05, 0.25, 0.25), (), True)
    two, three = (
        Stretch((0.6, 0.6, 0.9, 0.9), (0.5, 0.5, 0.95, 0.95)),
        Stretch((0.55, 0.55, 0.9, 0.9), (0.6, 0.6, 0.8, 0.8), (), True),
    )
    x, clean, fresh = (torch.randn(1, 4, 16, 16) for _ in range(3))
    asked = list[str]()

    def found(*todo: Stretch) -> Tensor:
        asked.clear()
        monkeypatch.setattr("minidiff.guidance.stretching.stretches", lambda *_: [todo])
        toy = ToyMaps(make_layout([[]], [3], 3, [(8, 8)]), slice(2, 6), slice(2, 6))
        objects = [PlacedObject("a", (1,), (TINY,), stretched=True)]
        record = Record(cross, HEAD_MEAN)
        run = Stretching(
            toy, [objects], toy.forward, record, lambda: fresh, partial(decoded, asked), partial(encoded, asked)
        )  # type: ignore[arg-type]
        return run.renew(x, torch.tensor(500.0), 0.4, 3, Predicted(clean, 2.0))[0]

    both, upper, lower = found(one, two), slice(0, 7), slice(8, 16)
    torch.testing.assert_close(both[:, upper, upper], found(one)[:, upper, upper])
    torch.testing.assert_close(both[:, lower, lower], found(two)[:, lower, lower])
    pair = found(one, three)
    assert asked == ["decode", "encode"]
    torch.testing.assert_close(pair[:, upper, upper], found(one)[:, upper, upper])
    torch.testing.assert_close(pair[:, lower, lower], found(three)[:, lower, lower])
    for some, part in ((one, upper), (two, lower), (three, lower)):
        assert relative_error(found(some)[:, part, part], x[0, :, part, part]) > 0.1


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
    assert passes == [1, 2] * 3 + [1] + [2] * 3 and pictures == [1] and len(stretched) == 1
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


def test_pictures_that_do_not_start_from_noise_alone_or_have_no_step_left_get_none(tiny_model: Model) -> None:
    for how in (replace(HOW, scale=0.0), replace(HOW, iterations=0)):  # nothing is placed that could be stretched
        assert torch.equal(drawn(tiny_model, guidance=how).latents, drawn(tiny_model, guidance="none").latents)
    none = replace(HOW, usual_sizes=None)
    for options in (
        {"image": torch.rand(3, 32, 32), "strength": 0.8},
        {"latents": torch.randn(1, 4, 8, 8)},
        {"steps": 3},
        {"sampler": "pndm"},
    ):
        with_fit, without = (drawn(tiny_model, guidance=how, **options) for how in (HOW, none))
        assert torch.equal(with_fit.latents, without.latents)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["dpm2", "heun", "euler_ancestral", "dpmpp_2m_cfg_pp", "uni_pc", "lcm"])
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
    assert len(renewed) == 3 and not any(torch.allclose(one, start) for one in renewed)
    assert seen == [(1, 1)]
