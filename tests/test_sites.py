"""Choosing sites: the sites chosen for a size are those that the UNet then runs."""

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import minidiff
from minidiff.model import Model
from minidiff.networks.attention import Edit, Inputs, Record
from minidiff.networks.sites import Site, Where, at_most, block, choose, cross, level, place, self_


def shape(site: Site, probs: Tensor, inputs: Inputs) -> Tensor:
    """Keep the actual sizes in the UNet: h, w, L."""
    return torch.tensor([list(probs.shape[2:])])


def names(model: Model, where: Where, **size: int) -> set[str]:
    return {site.name for site in minidiff.sites(model, where, **size)}


def every(model: Model) -> set[str]:
    return {site.name for site in model.unet.sites}


@pytest.mark.parametrize(
    ("where", "test"),
    [
        (cross, lambda site: site.kind == "cross"),
        (self_, lambda site: site.kind == "self"),
        (place("mid"), lambda site: site.place == "mid"),
        (place("down", "up"), lambda site: site.place in ("down", "up")),
        (block("up", 1), lambda site: site.place == "up" and site.block == 1),
        (block("mid", 0), lambda site: site.place == "mid"),
        (cross & place("down"), lambda site: site.kind == "cross" and site.place == "down"),
        (cross | place("down"), lambda site: site.kind == "cross" or site.place == "down"),
        (~cross, lambda site: site.kind == "self"),
        (~(cross & place("down")), lambda site: not (site.kind == "cross" and site.place == "down")),
        (
            cross & (place("mid") | block("up", 2)),
            lambda site: site.kind == "cross" and (site.place, site.block) in (("mid", 0), ("up", 2)),
        ),
        (
            cross & place("mid") | block("up", 2),
            lambda site: (site.kind == "cross" and site.place == "mid") or (site.place, site.block) == ("up", 2),
        ),
        (cross & ~place("mid") & ~place("up"), lambda site: site.kind == "cross" and site.place == "down"),
    ],
    ids=lambda value: str(value) if isinstance(value, Where) else "",
)
def test_choices_combine(tiny_model: Model, where: Where, test: Callable[[Site], bool]) -> None:
    expected = {site.name for site in tiny_model.unet.sites if test(site)}
    assert 0 < len(expected) < len(tiny_model.unet.sites)
    assert names(tiny_model, where) == expected


def test_levels_count_up_from_the_mid_block_at_any_size(tiny_model: Model) -> None:
    # attention of the tiny model: latents of 8x8 in down.0 and up.2, 4x4 in down.1 and up.1, 2x2 in mid
    expected = {0: {"mid.0"}, 1: {"down.1", "up.1"}, 2: {"down.0", "up.2"}}
    for size in ({}, {"width": 48, "height": 96}, {"width": 36, "height": 20}):
        for number, blocks in expected.items():
            assert {name.rsplit(".", 2)[0] for name in names(tiny_model, level(number), **size)} == blocks


def test_at_most_depends_on_the_size(tiny_model: Model) -> None:
    assert names(tiny_model, at_most(4)) == names(tiny_model, level(0) | level(1))
    assert names(tiny_model, at_most(8)) == every(tiny_model)
    assert names(tiny_model, at_most(4), width=48) == names(tiny_model, level(0))  # 2x3, 4x6, 8x12: the longer edge
    assert names(tiny_model, at_most(4), width=48, height=16) == names(tiny_model, level(0))
    assert names(tiny_model, at_most(6), width=48, height=16) == names(tiny_model, level(0) | level(1))
    with pytest.raises(ValueError, match=r"no attention site matches at_most\(1\)"):
        minidiff.sites(tiny_model, at_most(1))


@pytest.mark.parametrize(("width", "height"), [(None, None), (48, 32), (32, 48), (36, 20), (12, 28), (60, 4)])
def test_sites_have_the_grids_that_the_unet_sees(tiny_model: Model, width: int | None, height: int | None) -> None:
    found = minidiff.sites(tiny_model, width=width, height=height)
    assert tuple(found) == tiny_model.unet.sites  # all, in execution order
    h, w = (8 if size is None else size // 4 for size in (height, width))
    record = Record(frozenset(found), shape, rows="all")
    _, maps = tiny_model.unet(torch.randn(1, 4, h, w), 500.0, torch.randn(1, 77, 64), record)
    for site, grid in found.items():
        real = maps[site][0].tolist()
        assert tuple(real[:2]) == grid
        assert real[2] == (77 if site.kind == "cross" else grid[0] * grid[1])
    assert minidiff.sites(tiny_model, cross, width=width, height=height) == {
        site: grid for site, grid in found.items() if site.kind == "cross"
    }


def test_no_match_lists_the_sites_there_are(tiny_model: Model) -> None:
    message = (
        r"no attention site matches \(cross & block\('up', 0\)\); expected a choice from down.0.0.self \(8x12\), "
        r"down.0.0.cross \(8x12\), .*mid.0.0.cross \(2x3\), .*up.2.2.cross \(8x12\)"
    )
    with pytest.raises(ValueError, match=message):
        minidiff.sites(tiny_model, cross & block("up", 0), width=48)
    for options in ({"attention": Record(level(5))}, {"edits": Edit(level(5), probs=shape)}):
        with pytest.raises(ValueError, match=r"no attention site matches level\(5\); expected a choice from down.0"):
            minidiff.generate("a cat", model=tiny_model, steps=2, **options)


@pytest.mark.parametrize("places", [(), ("middle",), ("up", "left")])
def test_places_are_checked(places: tuple[str, ...]) -> None:
    got = f"{places[-1]!r}; expected one of down, mid, up" if places else 'empty; expected some of "down"'
    with pytest.raises(ValueError, match=f"place is {got}"):
        place(*places)  # type: ignore[arg-type]
    if places:
        with pytest.raises(ValueError, match="place is"):
            block(places[-1], 0)  # type: ignore[arg-type]


def test_a_set_is_taken_as_it_is(tiny_model: Model) -> None:
    some = tiny_model.unet.sites[:3]
    assert choose(some, tiny_model.unet.positions(8, 8)) == frozenset(some)
    assert choose(frozenset(), tiny_model.unet.positions(8, 8)) == frozenset()


def test_choices_are_equal_when_their_texts_are() -> None:
    assert cross & level(1) == cross & level(1)
    assert hash(cross & level(1)) == hash(cross & level(1))
    assert cross & level(1) != cross & level(2)
    assert cross & level(1) != cross | level(1)
    assert str(cross & (place("mid") | ~block("up", 1))) == "(cross & (place('mid') | ~block('up', 1)))"
    assert Record(cross & level(1)) == Record(cross & level(1))


def test_the_unet_takes_sets_alone(tiny_model: Model) -> None:
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 64)
    with pytest.raises(ValueError, match=r"record.sites is \(cross & level\(1\)\); the UNet expects a set: frozenset"):
        tiny_model.unet(x, 500.0, context, Record(cross & level(1), rows="all"))
    with pytest.raises(ValueError, match="edit.sites is cross; the UNet expects a set"):
        tiny_model.unet(x, 500.0, context, edits=[Edit(cross, probs=shape, rows="all")])
    resolved = Record(frozenset(minidiff.sites(tiny_model, cross & level(1))), rows="all")
    assert set(tiny_model.unet(x, 500.0, context, resolved)[1]) == set(resolved.sites)


def test_sampling_resolves_a_choice_at_its_own_size(tiny_model: Model) -> None:
    record = Record(cross & at_most(4), minidiff.HEAD_MEAN)
    for width, blocks in ((32, {"mid", "down", "up"}), (64, {"mid"})):
        step = next(minidiff.sample_steps("a cat", model=tiny_model, steps=2, seed=1, width=width, attention=record))
        assert {site.place for site in step.maps} == blocks
        assert {tuple(kept.shape[1:3]) for kept in step.maps.values()} <= {(2, 2), (4, 4), (2, 4)}


def test_choices_combine_with_operators_alone() -> None:
    with pytest.raises(TypeError, match=r"combine with &, \| and ~"):
        cross and place("up")
    for other in ("up", Site("up", 1, 0, "cross"), None):
        with pytest.raises(TypeError, match="expected another choice of sites"):
            cross | other  # type: ignore[operator]


@pytest.mark.parametrize("where", [cross & (place("mid") | block("up", 1)), ~self_ & at_most(16), level(1)])
def test_a_choice_travels_to_another_process(tiny_model: Model, where: Where) -> None:
    again = pickle.loads(pickle.dumps(where))
    assert again == where and hash(again) == hash(where)
    assert minidiff.sites(tiny_model, again) == minidiff.sites(tiny_model, where)


def test_a_site_has_a_name_and_back() -> None:
    for name in ("up.1.0.cross", "mid.0.0.self", "down.12.3.cross"):
        assert Site.named(name).name == name
    for name in ("up.1.cross", "left.1.0.cross", "", 3):
        with pytest.raises(ValueError, match="expected a name such as"):
            Site.named(name)  # type: ignore[arg-type]
