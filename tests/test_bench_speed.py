"""python -m bench kernels, throughput, guided, memory, scaling, all: what they measure, print and write."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

import bench.all
import bench.guided
import bench.kernels
import bench.memory
from bench import throughput
from bench.__main__ import main
from bench.guided import our_image, passes, their_image
from bench.load import startup_row
from bench.memory import Once, dtype_rows, measure
from bench.models import TINY, Size, unet_dict
from bench.networks import (
    DTYPES,
    PLACES,
    SIZES,
    Inputs,
    compiled_unet,
    guided_pass,
    layout_guide,
    our_unet,
    unet_weights,
)
from bench.plot import lines
from bench.reference import relative_error
from bench.throughput import LAST, LOADED, OPENVINO, OURS
from bench.timing import Timing, best, by_turns

pytestmark = pytest.mark.usefixtures("one_thread")
EDGE = 32  # latents at which the boxes are whole cells of every grid used, as the published code requires


# --- seconds


def test_variants_take_turns() -> None:
    calls: list[str] = []
    found = by_turns({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=3)
    assert "".join(calls) == "ab" + "ababab"
    assert {name: len(timing.seconds) for name, timing in found.items()} == {"a": 3, "b": 3}


def test_a_timing_has_a_median_and_a_spread() -> None:
    timing = Timing("x", 9.0, (3.0, 1.0, 2.0))
    assert (timing.median, timing.spread, timing.first) == (2.0, (1.0, 3.0), 9.0)


def test_the_best_of_several_calls() -> None:
    calls: list[int] = []
    assert best(lambda: calls.append(1), budget=0.0) >= 0
    assert len(calls) == 4  # the first is not counted


# --- the published method


@pytest.mark.slow
def test_the_published_way_computes_what_minidiff_does() -> None:
    weights = unet_weights(TINY, torch.float32)
    found, (loss, gradient) = passes(TINY, weights, EDGE, 1, compiled=False)
    assert loss <= 1e-5 and gradient <= 1e-4
    assert set(found) == {"eager"} and set(found["eager"]) == {bench.guided.PUBLISHED, bench.guided.OURS}


@pytest.mark.slow
def test_another_box_is_another_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.guided, "PLACES", ((0.5, 0.5, 1, 1), *PLACES[1:]))
    _, (loss, gradient) = passes(TINY, unet_weights(TINY, torch.float32), EDGE, 1, compiled=False)
    assert loss > 1e-2 and gradient > 1e-2


@pytest.mark.slow
def test_whole_images_are_the_same_image(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 3, "GUIDED": 1, "ITERATIONS": 2}.items():
        monkeypatch.setattr(bench.guided, name, value)
    weights, inputs = unet_weights(TINY, torch.float32), Inputs.random(TINY, torch.float32, 2, EDGE, EDGE)
    ours, theirs = our_image(TINY, weights, inputs), their_image(TINY, weights, inputs)
    assert relative_error(ours, theirs) <= 1e-3
    monkeypatch.setattr(bench.guided, "GUIDED", 0)
    assert relative_error(ours, our_image(TINY, weights, inputs)) > 1e-3  # guidance has an effect


@pytest.mark.slow
def test_the_guide_of_a_benchmark_stops_for_nothing() -> None:
    unet, inputs = our_unet(TINY, unet_weights(TINY, torch.float32)), Inputs.random(TINY, torch.float32, 1, EDGE, EDGE)
    guide = layout_guide(unet, inputs, objects=3, iterations=4, steps=2)
    for index in range(3):
        guide.refine(inputs.x, inputs.t, 0.1, index)
    report = guide.report(0)
    assert (report.steps, report.iterations, len(report.names)) == ((0, 1), (4, 4), 3)


# --- benchmark output


def rows(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


@pytest.mark.slow
def test_throughput(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--size", "tiny", "--latents", "16", "--repeats", "2", "--eager", "--json", str(tmp_path / "rows.json")]
    code = main(["throughput", "--dtype", "bfloat16", "float32", *flags])
    printed, found = capsys.readouterr().out, rows(tmp_path / "rows.json")
    assert code == (0 if all(row["ok"] for row in found) else 1)
    int8 = 3 * ("int8" in throughput.stages("float32", True))  # a ratio, and two predictions
    assert [row["shape"] for row in found] == ["bfloat16"] * 8 + ["float32"] * (8 + int8)
    assert all(row["ok"] for row in found if row["part"].endswith(": eps"))
    for text in (LOADED, LAST, OURS, "TFLOP/s in a matrix product", "first call"):
        assert text in printed
    seconds = json.loads((tmp_path / "rows.json").read_text())["timings"]["float32, eager"][OURS]["seconds"]
    assert len(seconds) == 2 and min(seconds) > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_openvino_predicts_the_same(dtype: str) -> None:
    pytest.importorskip("openvino", reason="of the bench extra")
    size = SIZES["tiny"]
    weights, inputs = unet_weights(size, DTYPES[dtype]), Inputs.random(size, DTYPES[dtype], 2, 16, 16)
    found = throughput.recorded(size, weights, inputs)[OPENVINO]()
    assert relative_error(found, throughput.eager(size, weights, inputs)[LOADED]()) < throughput.ALIKE[dtype]


def test_throughput_judges_medians() -> None:
    found = {LOADED: Timing(LOADED, 1.0, (2.0, 2.0, 9.0)), OURS: Timing(OURS, 1.0, (1.0, 1.0, 8.0))}
    (row,) = throughput.bounds(found, "float32")
    assert (row.value, row.bound, row.ok) == (0.5, 0.85, True)


@pytest.mark.slow
def test_guided(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench.guided, "measure", lambda case, library, *_: Once(0, 5, 7 if library == "minidiff" else 15, 1)
    )
    flags = [
        "--size",
        "tiny",
        "--latents",
        str(EDGE),
        "--repeats",
        "1",
        "--eager",
        "--json",
        str(tmp_path / "rows.json"),
    ]
    main(["guided", "--dtype", "float32", *flags])
    found = {row["part"]: row for row in rows(tmp_path / "rows.json")}
    assert found["gradient against the published method's"]["ok"]
    assert found["extra memory of a guided pass"]["value"] == pytest.approx(0.2)
    assert "the published method" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "library"), [("guided", "minidiff"), ("guided", "diffusers"), ("sampling", "minidiff")]
)
def test_one_measurement_in_a_fresh_process(case: str, library: str) -> None:
    found = measure(case, library, "float32", "tiny", EDGE, 2 if case == "sampling" else 1)
    assert found.peak >= found.ready > 1e8 and found.loaded > 1e8
    assert found.seconds > 0


@pytest.mark.slow
def test_memory_is_the_same_in_every_process() -> None:
    """With tensors on the C library's heap, these two vary by 10 % between processes."""
    for case in ("step", "decode"):
        one, other = (measure(case, "minidiff", "float32", "tiny", 2 * EDGE).extra for _ in range(2))
        assert one == pytest.approx(other, rel=0.03)


def test_memory_compares_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(case: str, library: str, dtype: str, size: str, edge: int, count: int = 1) -> Once:
        extra = {"minidiff": 10, "diffusers": 40}[library] * edge * (count if case == "step" else 1)
        return Once(1000, 2000, 2000 + extra, 1.0)

    monkeypatch.setattr(bench.memory, "measure", fake)
    found = {row.part: row.value for row in dtype_rows("tiny", "float32", 64)}
    assert found["a step, extra"] == found["a guided pass, extra"] == found["decoding 1024x1024, extra"] == 0.25
    assert found["a step of four images, extra"] == 1
    assert found["a guided pass, in all"] == (2000 + 640) / (2000 + 2560)


@pytest.mark.slow
def test_scaling(tmp_path: Path) -> None:
    flags = ["--size", "tiny", "--latents", "16", "--repeats", "1", "--plots", str(tmp_path / "plots")]
    main(["scaling", *flags, "--json", str(tmp_path / "rows.json")])
    drawn = sorted(path.stem for path in (tmp_path / "plots").iterdir())
    assert drawn == ["batch", "boxes", "resolution", "steps"]
    timings = json.loads((tmp_path / "rows.json").read_text())["timings"]
    assert list(timings["batch"]) == ["1", "2", "4", "8"] and list(timings["resolution"]) == ["64", "96", "128", "160"]
    assert list(timings["batch, diffusers"]) == list(timings["batch"])
    assert list(timings["boxes, the published method"]) == list(timings["boxes"])
    assert [len(timings[what]["1"]["seconds"]) for what in ("batch", "boxes")] == [1, 4]
    assert {row["part"] for row in rows(tmp_path / "rows.json")} == {
        "an image of a batch",
        "a step of a run",
        "the costliest number of boxes",
        "an image of a batch of 8",
        "a guided pass with 8 boxes",
        "a step of 160x160",
    }


@pytest.mark.slow
def test_kernels(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.kernels, "best", lambda call, budget: best(call, 0.0))
    main(["kernels", "--shrink", "16", "--dtype", "float32", "--json", str(tmp_path / "rows.json")])
    printed = capsys.readouterr().out
    parts = [row["part"] for row in rows(tmp_path / "rows.json")]
    for kind in ("convolution", "attention", "columns", "mean of heads"):
        assert any(part.startswith(kind) for part in parts), kind
    assert [part for part in parts if part.startswith("box mass")] == [
        f"box mass of {pixels} to 77 x {channels}" for pixels, channels in ((256, 40), (16, 160), (4, 160))
    ]
    assert "* packed" in printed and "* fused" in printed and "* taken" in printed


@pytest.mark.slow
def test_all_runs_each_and_gathers(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        bench.all, "PARTS", {"throughput": ("--size", "tiny", "--latents", "8", "--repeats", "1", "--eager")}
    )
    code = main(["all", "--json", str(tmp_path / "all.json")])
    found = json.loads((tmp_path / "all.json").read_text())
    assert code == (0 if all(row["ok"] for row in found["benches"]["throughput"]["rows"]) else 1)
    assert OURS in capfd.readouterr().out


def test_lines_are_drawn_from_zero() -> None:
    image = np.asarray(lines({"a": [(1, 1.0), (2, 2.0)], "b": [(1, 2.0), (2, 1.0)]}, "x", "y"))
    for colour in ((35, 75, 225), (220, 30, 35)):
        assert (image == colour).all(axis=2).sum() > 150


@pytest.mark.slow
def test_start_up_is_measured_without_sampling() -> None:
    """Relative to the imports that any program with CLIP needs; only `python -m bench load` checks the bound."""
    row = startup_row(1)
    assert row.value > 0, row  # 1.1 on an idle machine


@pytest.mark.slow
def test_a_compiled_gradient_in_bfloat16_is_right() -> None:
    """torch's compiled convolution_backward was wrong by half here, hence our own gradient of convolutions."""
    small = Size(unet_dict([32, 64], [True, False], layers=1), TINY.vae, TINY.text)
    weights = unet_weights(small, torch.bfloat16)
    inputs = Inputs.random(small, torch.bfloat16, 1, EDGE, EDGE)
    found, _ = guided_pass(layout_guide(compiled_unet(small, weights), inputs), inputs)()
    exact = Inputs(inputs.x.float(), inputs.t, inputs.context.float())
    unet = our_unet(small, {name: value.float() for name, value in weights.items()})
    expected, _ = guided_pass(layout_guide(unet, exact), exact)()
    assert (found - expected).norm() / expected.norm() <= 0.1
