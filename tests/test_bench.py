"""python -m bench: what it prints, writes and returns, and that it detects broken parts."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from ldm import write_single_file

import bench.boxes
import bench.images
import bench.layout
import bench.starts
import minidiff
from bench import parity
from bench.__main__ import main
from bench.boxes import OUTSIDE, Asked, Outcome, Placed, asked, drift, facts, in_box
from bench.layout import Drawn, density
from bench.load import Load, case_rows, load_once, python
from bench.models import SD15, TINY, random_weights, unet_dict, unet_shapes, vae_shapes, write_folder
from bench.plot import front, scatter
from bench.prompts import Prompt, prompts
from bench.reference import relative_error
from bench.released import model_rows
from bench.share import Share
from bench.table import Row, finish
from minidiff.networks.text import TextEncoder
from minidiff.networks.unet import UNet
from minidiff.networks.vae import VAE
from minidiff.sampling import Euler, Schedule
from minidiff.sampling.samplers._sampler import Ask
from minidiff.shapes.measure import Found, Measured, check
from minidiff.shapes.world import GAP, HELD_OUT, MAX_ASPECT, MAX_EDGE, MIN_EDGE

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers with numpy 2
]
SMALL = unet_dict([32, 64], [True, False], layers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("models") / "tiny", TINY)


def wrong(rows: Iterator[Row]) -> list[str]:
    return [row.part for row in rows if not row.ok]


# --- parity


def test_parity_prints_every_row_and_writes_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["parity", "--only", "unet", "text", "samplers", "--json", str(tmp_path / "rows.json")]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "rows.json").read_text())
    assert {row["part"].split()[0].rstrip(",") for row in written["rows"]} == {"unet", "text", "sampler"}
    for row in written["rows"]:
        assert row["ok"] and row["value"] <= row["bound"]
        assert f"{row['part']:<38} {row['shape']:<24}" in printed
    count = len(written["rows"])
    for word in (
        "machine:",
        "versions:",
        "cores",
        "diffusers 0.42.1",
        "torch",
        "float32",
        f"{count} of {count} rows within",
    ):
        assert word in printed
    assert written["machine"]["cores"] and written["versions"]["torch"]


def test_parity_of_the_autoencoder() -> None:
    assert wrong(parity.SMALL["vae"]()) == []


@pytest.mark.slow
def test_parity_of_images(folder: Path) -> None:
    """One sampler and the call with the most options; the slow suite covers all."""
    rows = list(bench.images.image_rows(folder, ("lms_karras",), ("3 prompts, negatives, seeds",)))
    assert [row.part for row in rows if not row.ok] == []
    assert [row.part for row in rows] == ["generate, lms_karras", "generate, 3 prompts, negatives, seeds"]


@pytest.mark.slow
def test_parity_of_runs_that_start_from_a_picture() -> None:
    rows = list(bench.starts.start_rows(("dpmpp_2m",)))
    parts = ("image to image, 4 channels", "inpainting, 4 channels", "inpainting, 9 channels")
    assert [row.part for row in rows if row.ok] == [f"{part}, dpmpp_2m" for part in parts]


@pytest.mark.slow
def test_parity_of_every_sampler_and_option() -> None:
    assert main(["parity", "--only", "images"]) == 0  # test_canvas.py has what starts from pictures


def test_a_broken_unet_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = UNet.forward

    def broken(self: UNet, *args: Tensor) -> tuple[Tensor | None, dict]:
        eps, maps = forward(self, *args)
        assert eps is not None
        eps[..., -1, -1] += 1e-3 * eps.abs().max()
        return eps, maps

    monkeypatch.setattr(UNet, "forward", broken)
    assert wrong(parity.unet_rows("small", SMALL, [(8, 8)], 2)) == ["unet, small"]
    assert main(["parity", "--only", "unet"]) == 1


def test_a_broken_autoencoder_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = VAE.encode
    monkeypatch.setattr(VAE, "encode", lambda self, x, noise=None: encode(self, x, None))
    assert wrong(parity.SMALL["vae"]()) == [f"vae encode, sampled, {name}" for name, *_ in parity.SMALL_VAES]


def test_a_broken_text_encoder_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, prompts, clip_skip=None: encode(self, prompts, None))
    assert wrong(parity.SMALL["text"]()) == ["text, small, clip_skip 1", "text, small, clip_skip 2"]


def test_a_broken_sampler_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Euler.schedule

    def late(self: Euler, *args: object) -> Schedule:
        found = schedule(self, *args)
        found.timesteps[3] += 1e-3
        return found

    monkeypatch.setattr(Euler, "schedule", late)
    assert "sampler euler, timesteps" in wrong(parity.sampler_rows("euler"))
    monkeypatch.undo()
    run = Euler.run

    def large(self: Euler, ask: Ask, *rest: object) -> Iterator[Tensor]:
        def louder(x: Tensor, call: int) -> tuple[Tensor, Tensor]:
            x, eps = ask(x, call)
            return x, eps * (1 + 1e-4)

        return run(self, louder, *rest)

    monkeypatch.setattr(Euler, "run", large)
    assert wrong(parity.sampler_rows("euler")) == ["sampler euler, trajectory"]


@pytest.mark.slow
def test_a_broken_image_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = bench.images.ours

    def broken(*args: object) -> np.ndarray:
        pixels = ours(*args)
        pixels[0, 3, 3, 1] += 1.5 / 255
        return pixels

    monkeypatch.setattr(bench.images, "ours", broken)
    assert wrong(bench.images.image_rows(folder, ("ddim",), ())) == ["generate, ddim"]


@pytest.mark.slow
def test_an_option_without_effect_is_not_ok(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = bench.images.PLAIN
    monkeypatch.setitem(bench.images.OPTIONS, "nothing", (plain, plain))
    (row,) = bench.images.image_rows(folder, (), ("nothing",))
    assert not row.ok and "contrast 0," in row.note


@pytest.mark.slow
def test_parity_of_a_model_of_the_callers(folder: Path, tmp_path: Path) -> None:
    """A folder in both precisions, and the same model as a single file."""
    rows = list(model_rows(str(folder), None, 2, ("ddim", "dpmpp_2m_karras"), "bfloat16", edge=8))
    assert [row for row in rows if not row.ok] == []
    parts = {row.part for row in rows}
    for part in (
        "text, clip_skip 1",
        "unet, eps of 8x8 latents",
        "vae encode",
        "vae decode",
        "latents, ddim",
        "image, ddim",
    ):
        assert {part, f"{part}, bfloat16"} <= parts
    file = write_single_file(folder, tmp_path / "one.safetensors")
    assert wrong(model_rows(str(file), str(folder / "tokenizer"), 2, ("ddim",), edge=8)) == []


def test_a_model_that_loads_wrong_is_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A change of 1 % in one of a million weights is detected."""
    load = minidiff.load

    def off(*args: object, **kwargs: object) -> minidiff.Model:
        model = load(*args, **kwargs)
        model.unet.conv_in.weight.data[0, 0, 0, 0] += 0.01
        return model

    monkeypatch.setattr(minidiff, "load", off)
    found = wrong(model_rows(str(folder), None, 1, (), edge=8))
    assert found == ["unet, eps of 8x8 latents", "unet, eps of 4x16 latents"]
    monkeypatch.setattr(parity, "model_rows", lambda *args, **kwargs: iter([Row("unet", "1", 1.0, 1e-4)]))
    assert main(["parity", "--model", str(folder)]) == 1
    assert main(["parity", "--model", str(folder), "--full"]) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["parity", "--full", "--only", "images"], "expected some of unet, vae, text"),
        (["load", "--repeats", "0"], "--repeats is 0; expected at least 1"),
    ],
)
def test_wrong_calls(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_bench_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["speeed"])
    assert "parity" in capsys.readouterr().err


# --- rows


@pytest.mark.parametrize(
    ("value", "ok"), [(0.0, True), (1e-5, True), (1.1e-5, False), (math.inf, False), (math.nan, False)]
)
def test_rows(value: float, ok: bool, tmp_path: Path) -> None:
    row = Row("unet", "1x4x8x8", value, 1e-5)
    assert row.ok == ok
    assert finish([Row("text", "1x77x64", 0.0, 1e-5), row], str(tmp_path / "rows.json")) == (0 if ok else 1)
    written = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert written[1]["ok"] == ok
    assert written[1]["value"] == (value if math.isfinite(value) else None)


def test_no_rows_are_no_success() -> None:
    assert finish([], None) == 1


def test_relative_error() -> None:
    a = torch.tensor([1.0, -4.0])
    assert relative_error(a, a) == 0
    assert relative_error(a + torch.tensor([0.0, 1.0]), a) == 0.25
    assert relative_error(a[:1], a) == math.inf
    assert math.isnan(relative_error(torch.tensor([math.nan, -4.0]), a))


# --- models


def test_full_size_models_have_sd15s_tensors() -> None:
    for shapes, tensors, numbers in (
        (unet_shapes(SD15.unet), 686, 859_520_964),
        (vae_shapes(SD15.vae), 248, 83_653_863),
    ):
        assert (len(shapes), sum(shape.numel() for shape in shapes.values())) == (tensors, numbers)


def test_random_weights_are_like_torchs_own() -> None:
    weights = random_weights(unet_shapes(SMALL))
    again = random_weights(unet_shapes(SMALL))
    assert all(torch.equal(weights[key], again[key]) for key in weights)
    conv = weights["down_blocks.0.resnets.0.conv1.weight"]
    assert conv.abs().max() == pytest.approx(1 / math.sqrt(9 * 32), rel=0.01)
    norm = weights["conv_norm_out.weight"]
    assert norm.mean() == pytest.approx(1, abs=0.05) and norm.std() > 0.03


# --- load


@pytest.mark.slow
def test_one_load_in_a_fresh_process(folder: Path) -> None:
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    for library in ("minidiff", "diffusers"):
        load = load_once(library, folder, "bfloat16", folder)
        assert load.weights == pytest.approx(size / 2, rel=0.01)
        assert load.dtype == "bfloat16"
        assert min(load.wall, load.cpu, load.imported) > 0


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        python("-c", "raise ValueError('nowhere')")


def test_rows_of_a_load(capsys: pytest.CaptureFixture[str]) -> None:
    def loads(wall: float, peak: int) -> list[Load]:
        return [Load(5.0, wall * n, wall, 0.1, peak + n, 1000, "float32") for n in (1, 3, 2)]

    seconds, memory = case_rows("a -> b", {"minidiff": loads(1.0, 1047), "diffusers": loads(2.0, 1800)})
    assert (seconds.value, seconds.ok) == (0.5, True)
    assert (memory.value, memory.ok) == (1.05, True)
    assert "2.00 s (1.00 to 3.00)" in capsys.readouterr().out


# --- layout


def test_the_prompts_are_fixed_and_fair() -> None:
    every = prompts()
    assert every == prompts()
    assert len(every) == 200
    assert {len(one.things) for one in every} == {1, 2, 3}
    assert len({one.text for one in every}) > 150
    held = [one for one in every if any(thing in HELD_OUT for thing in one.things)]
    assert 90 <= len(held) <= 110
    assert 90 <= sum(one.background is not None for one in every) <= 110
    for one in every:
        assert len({shape for shape, _ in one.things}) == len({colour for _, colour in one.things}) == len(one.things)
    assert prompts(1) != every


def test_the_words_of_a_prompt() -> None:
    one = Prompt((("ring", "orange"), ("star", "red"), ("heart", "blue")), "navy")
    assert one.text == "an orange ring, a red star and a blue heart on a navy background"
    assert Prompt((("ring", "red"),), None).text == "a red ring"


def test_a_share_and_its_interval() -> None:
    share = Share("x", 8, 10, 0.8)
    assert (share.value, share.ok, Share("x", 7, 10, 0.8).ok, Share("x", 0, 0, 0.1).ok) == (0.8, True, False, False)
    assert share.interval == pytest.approx((0.490, 0.943), abs=1e-3)  # Wilson's interval, from statsmodels
    assert Share("x", 10, 10).interval == pytest.approx((0.722, 1.0), abs=1e-3)


@pytest.mark.parametrize(("extra", "ground", "facts"), [((), "navy", True), ((), "white", False), ("x", "navy", False)])
def test_facts_are_the_objects_no_others_and_the_background(extra: tuple, ground: str, facts: bool) -> None:
    ring = Found("ring", "red", (0.1, 0.1, 0.4, 0.4))
    others = [Found("star", "blue", (0.6, 0.6, 0.9, 0.9)) for _ in extra]
    one = Drawn(Prompt((("ring", "red"),), "navy"), Measured((ring, *others), ground), (ring,))
    assert one.all_right
    assert one.facts is facts
    assert not Drawn(one.prompt, one.picture, (None,)).facts


def test_how_much_denser_attention_is_in_a_box() -> None:
    even, left = torch.ones(8, 8), torch.ones(16, 16)
    left[:, :8] = 3
    assert density([even], (0, 0, 0.5, 1)) == pytest.approx(1)
    assert density([left], (0, 0, 0.5, 1)) == pytest.approx(3)
    # each site has equal weight, whatever its magnitude: (1 + 1.5) / (1 + 0.5)
    assert density([100 * even, left], (0, 0, 0.5, 1)) == pytest.approx(2.5 / 1.5)


@pytest.mark.slow
def test_layout_prints_measures_and_returns(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [one for one in prompts() if len(one.things) < 3][::20]
    chosen = [*few, *[one for one in prompts() if len(one.things) == 3][:1]]
    monkeypatch.setattr(bench.layout, "prompts", lambda: chosen)
    monkeypatch.setattr(bench.layout, "check", lambda count, seed: check(5, seed))
    code = main(["layout", "--json", str(tmp_path / "rows.json"), "--sheet", str(tmp_path / "sheet.png")])
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "rows.json").read_text())
    assert code == (0 if all(row["ok"] for row in written["rows"]) else 1)
    assert "the measurement itself: 100.0% of the objects" in printed
    assert "seconds per image, in batches of" in printed
    for row in written["rows"]:
        assert row["name"] in printed
    assert sum(row["count"] for row in written["rows"] if "right colour" in row["name"]) == sum(
        len(one.things) for one in chosen
    )
    assert (tmp_path / "sheet.png").is_file()


@pytest.mark.parametrize("lost", [0, 1])
def test_layout_compares_int8_with_float32(
    lost: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four pictures int8 loses none, or one."""
    ring, prompt = Found("ring", "red", (0.1, 0.1, 0.4, 0.4)), Prompt((("ring", "red"),), None)
    right, black = Drawn(prompt, Measured((ring,), "navy"), (ring,)), Drawn(prompt, Measured((), "navy"), (None,))
    made = iter([right] * (8 - lost) + [black] * lost)
    monkeypatch.setattr(minidiff, "load", lambda *_, **__: None)
    monkeypatch.setattr(bench.layout, "prompts", lambda: [prompt] * 4)
    monkeypatch.setattr(bench.layout, "_draw", lambda *_: ([None] * 4, {}, [1.0]))
    monkeypatch.setattr(bench.layout, "_measured", lambda *_: next(made))
    assert main(["layout", "--int8"]) == lost
    printed = capsys.readouterr().out
    assert printed.count(" OUT") == 2 * lost and "int8: pictures with every fact true" in printed


# --- layout --boxes


def test_the_boxes_are_fixed_and_of_every_kind() -> None:
    every = asked()
    assert every == asked() and asked(1) != every
    inside = [one for one in every if one.kind == "inside"]
    assert len(inside) == 200 and len(every) == 230
    boxes = [box for one in inside for box in one.boxes]
    edges = [(x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes]
    assert min(map(min, edges)) >= MIN_EDGE - 1e-9 and max(map(max, edges)) <= MAX_EDGE
    assert max(max(edge) / min(edge) for edge in edges) <= MAX_ASPECT + 1e-9
    single = [one.boxes[0] for one in inside if len(one.boxes) == 1]
    for low, high in ((0.22, 0.32), (0.32, 0.45), (0.45, 0.62)):
        assert sum(low <= max(x1 - x0, y1 - y0) < high for x0, y0, x1, y1 in single) >= 20
    assert sum(x1 - x0 > 1.3 * (y1 - y0) for x0, y0, x1, y1 in single) >= 10
    assert sum(y1 - y0 > 1.3 * (x1 - x0) for x0, y0, x1, y1 in single) >= 10
    assert sum(min(x0, 1 - x1) == min(y0, 1 - y1) == pytest.approx(GAP) for x0, y0, x1, y1 in single) >= 10
    assert sum(abs(x0 + x1 - 1) < 0.2 and abs(y0 + y1 - 1) < 0.2 for x0, y0, x1, y1 in single) >= 10
    for one in inside:
        assert all(box[0] >= GAP - 1e-9 and box[3] <= 1 - GAP + 1e-9 for box in one.boxes)
        assert not any(_overlap(a, b) for i, a in enumerate(one.boxes) for b in one.boxes[:i])
    for kind in OUTSIDE:
        unlike = [one.boxes[0] for one in every if one.kind == kind]
        assert len(unlike) == 10
        for x0, y0, x1, y1 in unlike:
            long, short = max(x1 - x0, y1 - y0), min(x1 - x0, y1 - y0)
            assert short < MIN_EDGE or long > MAX_EDGE or long / short > MAX_ASPECT


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def placed(box: tuple[float, float, float, float], *others: Found) -> Placed:
    """A red ring requested in the left half."""
    ring = Found("ring", "red", box)
    one = Asked(Prompt((("ring", "red"),), None), ((0.0, 0.0, 0.5, 1.0),), "inside")
    return Placed(one, Measured((ring, *others), "white"), (ring,), (bench.boxes.iou(box, one.boxes[0]),))


def test_an_object_counts_where_it_is_in_its_box() -> None:
    there, beside, half = placed((0, 0, 0.5, 1)), placed((0.5, 0, 1, 1)), placed((0, 0, 0.24, 1))
    assert in_box([there, beside, half]).hits == 1
    assert (there.centred, beside.centred, half.centred) == ((True,), (False,), (True,))
    assert facts([there, placed((0, 0, 0.5, 1), Found("star", "blue", (0.6, 0, 0.9, 1)))]).hits == 1
    lost = Placed(there.asked, Measured((), "white"), (None,), (0.0,))
    assert in_box([lost]).hits == facts([lost]).hits == 0 and lost.centred == (False,)


def test_drift_is_the_root_of_the_mean_square() -> None:
    plain, moved = (
        Outcome((), images, 0.0, 0.0) for images in (torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5))
    )
    assert drift(moved, plain) == pytest.approx(0.5)
    assert drift(plain, plain) == 0


def test_the_front_of_a_plot() -> None:
    points = {"a": (1.0, 0.2), "b": (2.0, 0.1), "c": (3.0, 0.9), "d": (3.0, 0.8), "e": (4.0, 0.9)}
    assert front(points) == ["a", "c"]
    image = np.asarray(scatter(points, "seconds", "share"))
    red, blue = (image == (220, 30, 35)).all(axis=2), (image == (35, 75, 225)).all(axis=2)
    assert red.sum() > 200 and blue.sum() > 150


@pytest.mark.slow
def test_layout_with_boxes_prints_every_method_and_writes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [[one for one in asked() if len(one.boxes) == count][i] for count in (1, 2, 3) for i in (0, 1)]
    unlike = [one for one in asked() if one.kind != "inside"][::10]
    monkeypatch.setattr(bench.boxes, "asked", lambda: [*few, *unlike])
    names = ("none", "minidiff's default", "regional prompting")
    monkeypatch.setattr(bench.boxes, "METHODS", {name: bench.boxes.METHODS[name] for name in names})
    monkeypatch.setattr(bench.boxes, "SAMPLERS", {"dpmpp_2m": 20, "ddim": 5})
    files = {name: tmp_path / name for name in ("rows.json", "sheet.png", "pareto.png")}
    flags = ["--json", files["rows.json"], "--sheet", files["sheet.png"], "--pareto", files["pareto.png"]]
    code = main(["layout", "--boxes", *map(str, flags)])
    printed, written = capsys.readouterr().out, json.loads(files["rows.json"].read_text())
    assert all(file.is_file() for file in files.values())
    assert set(written["methods"]) == set(names)
    assert all(f"\n{name}" in printed for name in (*names, "ddim, 5 steps", "apart"))
    assert all(row["name"] in printed for row in written["bounds"])
    assert code == 1 or (all(row["ok"] for row in written["bounds"]) and "OUT" not in printed)
    inside = {name: written["methods"][name]["images"] for name in names}
    mean = {name: np.mean([value for image in inside[name] for value in image["ious"]]) for name in names}
    assert mean["minidiff's default"] > mean["none"] + 0.2
