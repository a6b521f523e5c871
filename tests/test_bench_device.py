"""python -m bench device, as a dry run without a card: its stages run, and a cut or failed run keeps what it
measured."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

import bench.device
from bench.__main__ import main
from bench.device_compiled import CASES, Compiled
from bench.device_rows import Check
from bench.guided import PUBLISHED
from bench.models import TINY, Size, unet_dict
from bench.networks import SIZES
from bench.table import RELATIVE, Row
from bench.timing import Timing

pytestmark = pytest.mark.usefixtures("one_thread")


def fails(check: Check) -> Iterator[Row]:
    yield Row("first", "", 1.0, 2.0, RELATIVE)
    raise RuntimeError("no memory left")


def seen(path: Path, check: Check) -> Iterator[Row]:
    """A row of how many rows the file holds by now."""
    yield Row("written", "", len(json.loads(path.read_text())["rows"]), 9.0, RELATIVE)


def test_a_failed_stage_is_a_row_and_the_others_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    monkeypatch.setattr(bench.device, "unet_weights", lambda *_: {})
    monkeypatch.setattr(bench.device, "STAGES", {"steps": fails, "guided": lambda check: seen(file, check)})
    assert main(["device", "--only", "steps", "guided", "--json", str(file)]) == 1
    found = json.loads(file.read_text())["rows"]
    assert [(row["part"], row["value"], row["ok"]) for row in found] == [
        ("first", 1.0, True),
        ("steps", None, False),
        ("written", 2, True),
    ]
    assert found[1]["note"] == "RuntimeError: no memory left"
    assert main(["device", "--only", "steps", "--budget", "0", "--json", str(file)]) == 1  # no time: no rows


def test_bounds_of_speed_are_for_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.device, "unet_weights", lambda *_: {})
    slow = Row("step", "", 3.0, 1.0, "of diffusers' seconds")
    monkeypatch.setattr(bench.device, "STAGES", {"steps": lambda check: iter([slow])})
    assert main(["device", "--only", "steps"]) == 0
    monkeypatch.setattr(bench.device, "CUDA", True)
    monkeypatch.setattr(bench.device.torch.cuda, "empty_cache", lambda: None)
    assert main(["device", "--only", "steps"]) == 1


class Pipe:
    """What a process sent, or nothing."""

    def __init__(self, *sent: object) -> None:
        self.sent = sent

    def poll(self, seconds: float) -> bool:
        return bool(self.sent)

    def recv(self) -> object:
        return self.sent[0]


def test_what_was_compiled_is_compared() -> None:
    step, theirs, look, recorded = CASES
    compiled = Compiled("tiny", "bfloat16", 8, 1, wanted=False)
    ms = {step: 9.0, theirs: 10.0, look: 2.0, recorded: 9.1}
    pipes = {name: Pipe((Timing(name, 60.0, (value / 1e3,)), 0.01, 0, 0)) for name, value in ms.items()}
    compiled.running = {name: (None, pipe) for name, pipe in pipes.items()}
    earlier = {"guided, bfloat16": {PUBLISHED: Timing(PUBLISHED, 1.0, (0.01,))}}
    rows = list(compiled.rows(9.0, 700.0, earlier))
    assert all(row.ok for row in rows), rows
    values = {row.part: row.value for row in rows}
    assert values[f"{step} / {theirs}"] == pytest.approx(0.9) and values[look] == pytest.approx(0.2)
    compiled.running = {
        name: (None, Pipe() if name == theirs else pipe) for name, (_, pipe) in compiled.running.items()
    }
    rows = list(compiled.rows(0.0, 700.0, earlier))
    assert [row.part for row in rows if math.isnan(row.value)] == [theirs]


@pytest.mark.slow
def test_the_dry_run_holds_its_bounds(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.json"
    monkeypatch.setitem(SIZES, "tiny", Size(unet_dict([32, 64], [True, False], layers=1), TINY.vae, TINY.text))
    stages = ["rate", "steps", "recorded", "guided", "attention", "parity", "pictures", "variants"]
    assert main(["device", "--only", *stages, "--json", str(file)]) == 0
    printed, found = capsys.readouterr().out, json.loads(file.read_text())
    assert all(f"  {name}: " in printed for name in stages)
    parts = {row["part"] for row in found["rows"]}
    assert parts >= {
        "unet",
        "step, captured: bits",
        "recorded: 4 sites, box mass",
        "variants, step",
        "variants, decode",
        "guided pass: gradient",
        "picture, boxes",
        "runs: rnb",
        "attention",
    }
    assert set(found["timings"]) >= {"step, bfloat16, 1 images", "guided, float32"}
