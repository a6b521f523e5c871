"""bench league: its scenes, what it measures, that it goes on where it stopped, and its scores by other formulas."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

import bench.league
from bench.__main__ import main
from bench.league import PASSES, Cell, holds, looked, measured, methods, plays, read, standing
from bench.scenes import SEED, SPLITS, Scene, scenes
from bench.scores import PUBLISHED, SCORES, Row, agreement, bootstrap, kendall, mean, print_tables
from minidiff.guidance.report import Evaluation
from minidiff.model import Defaults
from minidiff.shapes.measure import Found, Measured, iou
from minidiff.shapes.world import Thing
from minidiff.vocabulary import OBJECTIVES

pytestmark = pytest.mark.usefixtures("one_thread")


def test_more_prompts_add_to_the_same_scenes() -> None:
    few, many = list(scenes(1)), list(scenes(3))
    assert {one.split for one in few} == set(SPLITS)
    assert few == [one for one in many if one.number == 0] and few != list(scenes(1, seed=1))
    for one in many:
        pairs = one.prompt.things
        if one.split[0].isdigit():
            assert len(one.boxes) == len(pairs) == int(one.split[0])
            assert len({shape for shape, _ in pairs}) == len({colour for _, colour in pairs}) == len(pairs)
        if "twice" in one.split:
            assert len({pair[one.split == "one colour twice"] for pair in pairs}) == 1
            assert len({pair[one.split == "one shape twice"] for pair in pairs}) == 2
        assert (one.relation is None, one.stroke is None) == (one.split != "relations", one.split != "strokes")
        assert (len(one.things) > len(pairs)) == (one.split == "contradicting")
        assert all(iou(a, b) == 0 for n, a in enumerate(one.boxes) for b in one.boxes[:n])


def test_every_objective_and_every_edit_that_reads_boxes_takes_part() -> None:
    names = methods()
    assert set(OBJECTIVES) - set(names) == {"relation"}
    assert {"none", "default", "forward_guidance", "regional_prompting"} <= set(names) and "reweight" not in names
    assert names["layout"].levels == PASSES and names["forward_guidance"].levels == (None,)
    relation = next(one for one in scenes(1) if one.split == "relations")
    assert plays("default", relation) and not plays("layout", relation)


def test_what_stands_in_a_box() -> None:
    left, right = (0.0, 0.0, 0.4, 0.4), (0.6, 0.6, 1.0, 1.0)
    wanted = [Thing("ring", "red", left), Thing("star", "blue", right)]
    cases = {("ring", "red"): "own", ("star", "blue"): "swap", ("ring", "blue"): "colour", ("star", "red"): "shape"}
    for (shape, colour), name in {**cases, ("ring", "pink"): "other"}.items():
        assert standing([Thing(shape, colour, left)], wanted, 0) == name
    assert standing([Thing("ring", "red", right)], wanted, 0) == standing([], wanted, 0) == "nothing"


def test_what_a_picture_shows_is_measured() -> None:
    there = {one.split: one for one in scenes(1)}
    two = there["2 objects"]
    things = tuple(Found(one.shape, one.colour, one.box) for one in two.things)
    ground = two.prompt.background or "white"
    row = measured(two, Measured(things, ground))
    assert row == {"right": [True] * 2, "count": 0, "facts": True, "ious": [1.0] * 2, "landed": ["own"] * 2}
    row = measured(two, Measured(things[:1], ground))
    assert (row["right"], row["count"], row["facts"]) == ([True, False], -1, False) and row["ious"] == [1.0, 0.0]
    stroke = there["strokes"]
    (x, y), _ = stroke.stroke.points
    ((shape, colour),) = stroke.prompt.things
    at = Found(shape, colour, (x - 0.1, y - 0.1, x + 0.1, y + 0.1))
    assert measured(stroke, Measured((at,), ground))["distance"] == pytest.approx(0, abs=1e-4)
    assert measured(stroke, Measured((), ground))["distance"] == bench.league.LOST
    small, large = Thing("ring", "red", (0.6, 0, 0.8, 0.2)), Thing("star", "blue", (0, 0.5, 0.5, 1))
    true = ("right of", "above", "smaller than")
    for relation in bench.league.RELATIONS:
        assert holds([small, large], relation) == (relation in true) and not holds([small, None], relation)


def test_a_stopped_image_takes_no_passes() -> None:
    def look(*losses: float) -> Evaluation:
        loss = torch.tensor(losses)
        return Evaluation(loss, loss[:, None], loss[:, None] / 2, loss > 0)

    looks = {0: [look(4, 2), look(3, math.nan)], 1: [look(1, math.nan)]}
    loss, mass = [[4.0], [3.0], [1.0]], [[2.0], [1.5], [0.5]]
    assert looked(looks, 0, 1) == {"used": 3, "object_loss": loss, "mass": mass}
    assert looked(looks, 1, 1)["object_loss"] == [[2.0], [2.0]] and looked({}, 1, 1) == {"used": 0}


def test_a_restart_draws_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[tuple[Cell, int]] = []

    def rows(model: str, cell: Cell, some: list[Scene]) -> list[Row]:
        drawn.append((cell, len(some)))
        return [_row(cell[0], cell[1], one.split, one.number, 0.6, seed=cell[2]) for one in some]

    named = SimpleNamespace(name="named", dtype_name="float32", defaults=Defaults())
    monkeypatch.setattr(bench.league, "_model", lambda name: named)
    monkeypatch.setattr(bench.league, "rows", rows)
    file = tmp_path / "league.jsonl"
    flags = ["league", "--jobs", "1", "--results", str(file), "--only", "none", "layout", "--splits", "1 object"]
    assert main([*flags, "--prompts", "1", "--seeds", "1"]) == 0
    levels = [("none", None), ("layout", None), ("layout", 10), ("layout", 25), ("layout", 50)]
    assert drawn == [((*level, 0), 1) for level in levels]
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + lines[-1][:20])  # interrupted while the last line was written
    drawn.clear()
    assert main([*flags, "--prompts", "1", "--seeds", "1"]) == 0
    assert drawn == [(("layout", 50, 0), 1)] and len(read(file)) == 5
    drawn.clear()
    assert main([*flags, "--prompts", "2", "--seeds", "1"]) == 0
    assert drawn == [((*level, 0), 1) for level in levels] and len(read(file)) == 10
    capsys.readouterr()
    assert main([*flags, "--table", "--passes", "25", "--prompts", "1"]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"\nlayout +(\w+)", printed) == ["0", "25"] and "\n2 pictures" in printed
    assert "passes 25: 1 pictures" in printed and "passes 50" not in printed
    assert main(["league", "--table", "--results", str(tmp_path / "none")]) == 0
    assert "no pictures" in capsys.readouterr().out
    assert main(["league", "--only", "nobody"]) == 2 and "nobody" in capsys.readouterr().err


def _row(method: str, passes: int | None, split: str, number: int, value: float, seed: int = 0) -> Row:
    row = {
        "method": method,
        "passes": passes,
        "seed": seed,
        "split": split,
        "scenes": SEED,
        "number": number,
        "ious": [value],
    }
    return row | {"count": 0, "landed": ["own"], "facts": True, "drift": 0.1, "used": 3, "seconds": 0.5}


def test_scores_equal_other_formulas() -> None:
    rng = np.random.default_rng(0)
    rows = [_row("a", None, "1 object", i // 4, float(rng.uniform()), i % 4) for i in range(400)]
    values = np.array([row["ious"][0] for row in rows])
    cuts = np.linspace(0, 1, 2001)
    area = np.trapezoid([(values >= cut).mean() for cut in cuts], cuts)
    assert mean(rows, SCORES["area"]) == pytest.approx(area, abs=1e-3)
    low, high = bootstrap(rows, SCORES["area"])
    error = values.reshape(100, 4).mean(axis=1).std() / 10  # of a mean of 100 independent prompts
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=error / 4)
    for _ in range(20):
        a, b = rng.integers(5, size=(2, 6)).tolist()
        assert kendall(a, b) == pytest.approx(kendalltau(a, b).statistic, nan_ok=True)


def test_agreement_is_of_own_settings_and_of_counted_splits() -> None:
    names = ["none", "boxdiff", "layout", "rnb"]
    rows = [
        _row(name, None, "2 objects", i, 0.9 if i < 10 * k + 5 else 0.1)
        for k, name in enumerate(names)
        for i in range(40)
    ]
    misleading = [_row(name, 25, "2 objects", 0, 0.9 - k / 2) for k, name in enumerate(names)]
    misleading += [_row(name, None, "tiny", 0, 0.9 - k / 2) for k, name in enumerate(names)]
    shared, tau, (low, high) = agreement(rows + misleading)
    assert sorted(shared) == sorted(names) and tau == 1 and 0.5 < low <= high == 1
    assert agreement([row | {"ious": [1 - row["ious"][0]]} for row in rows])[1] == -1
    assert all(name in (*methods(), "dense_diffusion", "refocusing + SAR") for name in PUBLISHED)


def test_methods_are_compared_on_the_pictures_that_all_have(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [_row("a", 25, "1 object", i, 1.0) for i in range(4)] + [_row("b", 25, "1 object", i, 0.0) for i in range(2)]
    print_tables([*rows, _row("b", 25, "2 objects", 0, 1.0)])
    printed = capsys.readouterr().out
    assert "passes 25: 2 pictures" in printed and re.search(r"\nb +0\.00 .* 0% 0-0", printed)
    assert "on 2 pictures" in printed and "tau" not in printed


@pytest.mark.slow
def test_the_quick_league(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["league", "--quick", "--jobs", "1", "--results", str(tmp_path / "rows"), "--json", str(tmp_path / "json")]
    assert main(flags) == 0
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "json").read_text())
    assert len(written["rows"]) == 3 + 3 + 2 and written["rows"] == read(tmp_path / "rows")
    assert all(f"\n{name} " in printed for name in ("none", "default", "regional_prompting"))
    boxed = {row["method"]: row for row in written["rows"] if row["split"] == "one shape twice"}
    assert boxed["default"]["used"] == 10 and boxed["none"]["used"] == boxed["none"]["drift"] == 0
    assert mean([boxed["default"]], SCORES["area"]) > mean([boxed["none"]], SCORES["area"])
