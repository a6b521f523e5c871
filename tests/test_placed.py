"""How likely objects are to be in their boxes: the numbers by other formulas, and where there are none."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

import minidiff
from bench.__main__ import main
from bench.placed import Objects, area_under_curve, calibration_error, cross_fitted, fit, objects
from minidiff import Model
from minidiff.guidance.layout import Layout, PlacedObject, make_layout
from minidiff.guidance.placed import CALIBRATIONS, OTHER, OWN, SEEN, Calibration, features, look
from minidiff.guidance.report import Report
from minidiff.model import Adapter
from minidiff.networks.unet import UNet
from minidiff.vocabulary import BUNDLED

BOXES = {"cat": (0.0, 0.0, 0.5, 0.25), "ball": (0.1, 0.3, 0.9, 0.9)}
GRID, SITE = (6, 9), next(iter(SEEN.sites))
REGIONS = [
    [
        PlacedObject("red ring", (1, 2), ((0.1, 0.1, 0.5, 0.6),)),
        PlacedObject("cat", (3,), ((0.0, 0.5, 0.4, 1.0),)),
        PlacedObject("cat", (3,), ((0.6, 0.1, 0.95, 0.7),)),
    ],
    [PlacedObject("star cat string", (4,), ((0.2, 0.0, 0.9, 0.9),)), PlacedObject("free", (2,))],
]


def layout(some: list[list[PlacedObject]]) -> Layout:
    return make_layout(some, [5] * len(some), 7, [GRID])


def finer(values: list[list[float]], row: int, column: int) -> float:
    """A map between the centres of its cells, at a point of a grid eight times finer."""
    ways = []
    for at, cells in ((row, GRID[0]), (column, GRID[1])):
        place = min(max((at + 0.5) / 8 - 0.5, 0), cells - 1)
        low = min(int(place), cells - 2)
        ways.append(((low, 1 - (place - low)), (low + 1, place - low)))
    return sum(values[y][x] * wy * wx for y, wy in ways[0] for x, wx in ways[1])


def around(values: list[list[float]], least: float) -> set[tuple[int, int]]:
    """The points of the finer grid in the box around where a map is above a value."""
    points = [(y, x) for y in range(8 * GRID[0]) for x in range(8 * GRID[1]) if finer(values, y, x) > least]
    rows, columns = ([point[axis] for point in points] for axis in (0, 1))
    return {(y, x) for y in range(min(rows), max(rows) + 1) for x in range(min(columns), max(columns) + 1)}


def test_what_is_read_of_a_look() -> None:
    torch.manual_seed(0)
    kept = torch.rand(2, *GRID, 7).pow(4)
    found = features({SITE: kept}, layout(REGIONS), [[one.name for one in some] for some in REGIONS])
    for image, some in enumerate(REGIONS):
        for o, one in enumerate(some):
            cover = one.coverage(GRID).tolist()
            own = kept[image][..., list(one.tokens)].mean(dim=2)
            for other in some:
                if other is not one and other.tokens == one.tokens:
                    own = own * (1 - other.coverage(GRID))  # nothing of it where the other cat is to be
            fit, high, shared, frail = found[image][o].tolist()
            if not one.boxes:
                assert math.isnan(fit)
            else:
                seen, box = around(own.tolist(), 0.3 * float(own.max())), around(cover, 0.5)
                assert fit == pytest.approx(len(seen & box) / len(seen | box), rel=1e-5) and 0 < fit < 1
            assert high == pytest.approx(math.log(float(own.max())), rel=1e-5)
            assert (shared, frail) == (one.name == "cat", one.name == "red ring")
        alone = features({SITE: kept[image : image + 1]}, layout([some]), [[one.name for one in some]])[0]
        torch.testing.assert_close(alone, found[image], rtol=0, atol=0, equal_nan=True)


def test_the_box_is_found_between_cells_and_the_chance_is_a_logistic_function() -> None:
    one = PlacedObject("cat", (1,), ((1 / 3, 0.25, 2 / 3, 0.75),))
    kept = torch.zeros(1, *GRID, 7)
    kept[0, ..., 1] = one.coverage(GRID)
    ((fit, high, *rest),) = features({SITE: kept}, layout([[one]]), [["cat"]])[0].tolist()
    assert 0.6 < fit < 0.8 and (high, *rest) == (0, 0, 0)  # SHARE is of maps that peak in the middle
    kept[0, ..., 1] = one.coverage(GRID).roll(2, dims=1)
    assert features({SITE: kept}, layout([[one]]), [["cat"]])[0][0, 0] == pytest.approx(0.2, abs=0.05)
    kept[0, ..., 1] = 0
    assert not features({SITE: kept}, layout([[one]]), [["cat"]])[0].isnan().any()
    given = torch.tensor([[0.4, -1.0, 1.0, 0.0], [math.nan, 0.0, 0.0, 0.0]])
    chances = Calibration((9.0, 2.0, -1.0, 3.0), 0.5)(given)
    assert chances[0] == pytest.approx(1 / (1 + math.exp(-(3.6 - 2 - 1 + 0.5)))) and chances[1].isnan()


def test_a_fit_finds_the_weights_and_says_what_comes() -> None:
    rng = np.random.default_rng(0)
    given = torch.from_numpy(rng.normal(size=(4000, 2)) * [1, 3] + [0, 5])
    chance = (given @ torch.tensor([1.5, -0.5]).double() + 2).sigmoid()
    hits = (torch.from_numpy(rng.random(4000)) < chance).double()
    some = Objects(given, hits, [("a", i // 4) for i in range(4000)])
    assert (*fit(some).weights, fit(some).bias) == pytest.approx((1.5, -0.5, 2), rel=0.12)
    said = cross_fitted(some).tolist()
    assert calibration_error(said, hits.tolist()) < 0.03 < calibration_error([one**2 for one in said], hits.tolist())
    ranks = mannwhitneyu(np.array(said)[hits.bool()], np.array(said)[~hits.bool()]).statistic
    assert area_under_curve(said, hits.tolist()) == pytest.approx(ranks / float(hits.sum() * (1 - hits).sum()))
    unrelated = Objects(given, hits[torch.randperm(4000, generator=torch.Generator().manual_seed(0))], some.prompts)
    assert area_under_curve(cross_fitted(unrelated).tolist(), unrelated.hits.tolist()) < 0.55


def test_what_is_fitted_is_what_a_report_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = [[0.7, -1.0, 0.0, 1.0], [0.2, -2.0, 1.0, 0.0]]
    row = {"split": "2 objects", "scenes": 1, "number": 0, "ious": [0.6, 0.4], "seen": seen, "method": "layout"}
    found = objects([row])
    assert found.features.tolist() == seen and found.hits.tolist() == [1, 0]
    assert found.prompts == [("2 objects", 1, 0)] * 2
    older = tmp_path / "older"
    older.write_text(json.dumps({name: row[name] for name in row if name != "seen"}))
    assert main(["placed", "--results", str(older)]) == 2
    assert "which older files do not hold" in capsys.readouterr().err


def test_reports_of_the_bundled_model_say_it_and_others_do_not(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def counted(own: UNet, x: Tensor, *rest: object, **more: object) -> object:
        asked.append(x.detach())
        return plain(own, x, *rest, **more)

    plain = UNet.forward
    monkeypatch.setattr(UNet, "forward", counted)

    def report(model: Model, **options: object) -> tuple[Report, Tensor, int]:
        """The report, the latents, and how often the network was asked."""
        asked.clear()
        how = {
            "guidance": {"objective": "inside", "steps": 2, "iterations": 1},
            "steps": 2,
            "guidance_scale": 1,
            "sampler": "ddim",
        }
        given = {
            "prompt": "a cat and a ball",
            "model": model,
            "boxes": BOXES,
            "seed": 0,
            "output": "latents",
            **how,
            **options,
        }
        found = minidiff.generate(**given)
        return found.reports[0], found.latents, len(asked)

    def expected(latents: Tensor) -> Tensor:
        run = minidiff.sample_steps("a cat and a ball", model=tiny_model, boxes=BOXES, guidance="layout")
        _, maps = plain(tiny_model.unet, latents, 250.0, run.guide.context, SEEN)
        return features(maps, run.guide.layout, [list(BOXES)])[0]

    named = replace(tiny_model, name=BUNDLED)
    found, latents, passes = report(named)
    torch.testing.assert_close(found.placed, CALIBRATIONS[OTHER](expected(latents)), rtol=1e-4, atol=1e-6)
    assert torch.equal(asked[-1], latents)
    other, same, fewer = report(tiny_model)
    assert torch.equal(latents, same) and fewer == passes - 1 == 4 and other.placed is None
    bundled = replace(named, defaults=minidiff.load().defaults)
    default, latents, _ = report(bundled, guidance=None)
    torch.testing.assert_close(default.placed, CALIBRATIONS[OWN](expected(latents)), rtol=1e-4, atol=1e-6)
    given, latents, _ = report(bundled, guidance=None, latents=torch.randn(1, 4, 8, 8))
    torch.testing.assert_close(given.placed, CALIBRATIONS[OTHER](expected(latents)), rtol=1e-4, atol=1e-6)
    assert found.plain()["placed"] == found.placed.tolist()
    for name, chance in zip(found.names, found.placed.tolist(), strict=True):
        assert (f"inside, {chance:.0%} likely in its box" in str(found)) and name in str(found)
    least = replace(found, placed=torch.tensor([0.34, 0.5]))
    assert (
        str(least).count("34% likely in its box; try more seeds or a larger box") == str(least).count("try more") == 1
    )
    adapted = replace(named, adapters=(Adapter("lora", "a", "a.safetensors", "0" * 64),))
    bias = named.unet.state_dict()["conv_out.bias"]
    changed = replace(named, unet=minidiff.with_weights(named.unet, {"conv_out.bias": bias}))
    turning = {"prompt": "a cat and a ball [on grass:on sand:1]", "syntax": "a1111"}
    guide = minidiff.sample_steps("a cat", model=named, boxes={"cat": BOXES["cat"]}, guidance="layout").guide
    assert look(named.unet, latents, guide, 3) is not None
    guide.update(guide.inputs)
    assert look(named.unet, latents, guide, 3) is None  # the masks are no longer those that were asked for
    for another, options in ((adapted, {}), (changed, {}), (named, turning)):
        found, _, passes = report(another, **options)
        assert found.placed is None and "likely" not in str(found) and passes == 4


def test_a_report_does_not_depend_on_the_batch(tiny_model: Model) -> None:
    """Beside a longer text, one's context has positions that its passes do not read."""
    named = replace(tiny_model, name=BUNDLED)
    how = {"model": named, "guidance": {"objective": "inside", "steps": 1, "iterations": 1}, "syntax": "a1111"}
    how |= {"steps": 2, "output": "latents"}
    alone = minidiff.generate("a cat", boxes={"cat": BOXES["cat"]}, seed=0, **how)
    texts = ["a cat", "a cat " + "on grass " * 60]
    beside = minidiff.generate(texts, boxes=[{"cat": BOXES["cat"]}] * 2, seed=[0, 1], **how)
    torch.testing.assert_close(beside.latents[:1], alone.latents, rtol=0, atol=1e-4)
    torch.testing.assert_close(beside.reports[0].placed, alone.reports[0].placed, rtol=1e-4, atol=1e-6)


def test_nothing_is_said_of_pictures_that_were_not_guided_or_are_not_finished(tiny_model: Model) -> None:
    named = replace(tiny_model, name=BUNDLED)
    given = {"model": named, "boxes": {"cat": BOXES["cat"]}, "output": "latents", "seed": 0, "sampler": "euler"}
    for scale, end, said in ((1.0, 0.0, True), (0.0, 0.0, False), (1.0, 1.0, False)):
        how = {"objective": "inside", "scale": scale, "steps": 1, "iterations": 1}
        found = minidiff.generate("a cat", guidance=how, sigmas=(10.0, 3.0, end), **given)
        assert (found.reports[0].placed is not None) is said


def test_a_run_that_is_stopped_and_a_preview(tiny_model: Model) -> None:
    how = {"objective": "inside", "steps": 2, "iterations": 1}
    named = replace(tiny_model, name=BUNDLED)
    run = minidiff.sample_steps(["a cat"] * 2, model=named, boxes={"cat": BOXES["cat"]}, guidance=how, steps=3, seed=0)
    next(run)
    early = [report.placed for report in run.result().reports]
    assert run.result(lambda latents: latents[:, :3]).reports[0].placed is None
    for _ in run:
        pass
    late = [report.placed for report in run.result().reports]
    for each, other in zip(early, late, strict=True):
        assert not each.isnan().any() and not torch.equal(each, other)
    assert not torch.equal(*late)
