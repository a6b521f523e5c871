"""minidiff batch: every picture is generate's, a kill at any moment repeats nothing, and a bad line stops nothing."""

import json
import multiprocessing
import os
import random
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minidiff
from minidiff.cli import batch as command
from minidiff.cli.batch import Draw
from minidiff.cli.lines import read_lines
from minidiff.cli.main import main
from minidiff.cli.manifest import COLUMNS, Done, begin, line_digests, only
from minidiff.cli.plan import OWN, WINDOW, Job, batches, jobs, together
from minidiff.request import Request

parquet = pytest.importorskip("pyarrow.parquet", reason="minidiff batch needs pyarrow")
SMALL = {"steps": 2, "width": 8, "height": 8}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """A stub of the model: grey pictures. Returns the requests it got."""
    asked: list[Request] = []

    def draw(batch: list[Job], model: minidiff.Model) -> minidiff.Result:
        asked.append(together(batch))
        images = [Image.new("RGB", (4, 4)) for _ in batch]
        parameters = tuple(job.request.plain() for job in batch)
        seeds = tuple(job.request.seed for job in batch)
        return minidiff.Result(images, torch.zeros(len(batch), 4, 1, 1), seeds, parameters, {})

    monkeypatch.setattr(command, "_generate", draw)
    monkeypatch.setattr(Draw, "_model", lambda self, request: None)
    monkeypatch.setattr(command, "_fitting", lambda request, model: 8)
    return asked


def write(path: Path, lines: list[object]) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def run(file: Path, out: Path, *flags: str) -> list[dict]:
    assert main(["batch", str(file), "--out", str(out), *flags]) == 0
    return [row for name in sorted(out.glob("manifest*.parquet")) for row in parquet.read_table(name).to_pylist()]


def assert_same(out: Path, row: dict, expected: Image.Image) -> None:
    """Equal within the 1/255 of any batch."""
    pixels = np.asarray(Image.open(out / row["file"]), dtype=int)
    assert abs(pixels - np.asarray(expected, dtype=int)).max() <= 1, row


def test_each_picture_is_that_of_generate_whatever_its_batch(tmp_path: Path) -> None:
    start, mask = tmp_path / "start.png", tmp_path / "mask.png"
    Image.effect_noise((12, 8), 90).convert("RGB").save(start)
    Image.linear_gradient("L").resize((12, 8)).save(mask)
    place = {"prompt": "a blue square", "box": [0, 0, 0.5, 1]}
    many = "a red circle, " * 30
    lines: list[object] = [
        {"prompt": "a red circle", "seed": 1},
        {"prompt": "a blue square", "seed": 2, "negative_prompt": "red"},
        {"prompt": ["a red circle", "a green star"], "images_per_prompt": 2, "seed": [4, 3, 2, 1]},
        {"prompt": "a red circle", "regions": [place], "seed": 7},
        {"prompt": "a green star", "regions": [place, place], "seed": 8},
        {"prompt": "a red circle", "image": str(start), "seed": 9, "width": None, "height": None},
        {"prompt": "a blue square", "image": str(start), "mask": str(mask), "seed": 10},
        {"prompt": "a blue square", "image": [str(start)], "mask": [str(mask)], "seed": 11, "output": "latents"},
        {"prompt": "a (red:1.3) circle", "syntax": "a1111", "seed": 12},
        {"prompt": f"a blue square {many}", "syntax": "a1111", "seed": 13},
        {"prompt": "a blue square", "sampler": "Euler a", "seed": 14},
        {"prompt": "a red circle", "seed": 16, "vary": [1, 0.5], "images_per_prompt": 2},
        {"prompt": "a blue square", "seed": 17, "vary": [3, 0.5]},
        {"prompt": "a red circle", "sampler": "Euler a", "seed": 15},
    ]
    check(tmp_path, lines)


@pytest.mark.slow
def test_each_guided_picture_is_that_of_generate(tmp_path: Path) -> None:
    text, box = "a red circle and a blue square", {"red circle": [0.1, 0.1, 0.9, 0.9]}
    guided: list[object] = [
        {"prompt": "a red circle", "boxes": box},
        {"prompt": text, "boxes": {**box, "blue square": [0, 0, 0.4, 0.4]}},
        {"prompt": text, "relations": [["red circle", "left of", "blue square"]]},
        {"prompt": text, "relations": ["blue square above red circle", "red circle smaller than blue square"]},
    ]
    size = {"width": 16, "height": 16, "steps": 1}
    boxes = {"blue square": [0, 0, 0.4, 0.4], "red circle": [0.1, 0.1, 0.9, 0.9]}
    chaotic = [
        {"prompt": text, "boxes": boxes, "seed": seed, "width": 64, "height": 64, "steps": 25} for seed in (6, 2)
    ]
    lines: list[object] = [{"seed": i, **line, **size} for i, line in enumerate(guided)]  # type: ignore[dict-item]
    check(tmp_path, [*lines, *chaotic])


def test_guided_pictures_are_made_alone() -> None:
    model, boxes = minidiff.load(dtype="float32"), {"red circle": (0, 0, 1, 1)}
    sizes = [
        command._fitting(minidiff.Request("a red circle", width=64, height=64, **asked), model)
        for asked in ({}, {"boxes": boxes, "guidance": "none"}, {"boxes": boxes}, {"relations": ["a above b"]})
    ]
    assert sizes[0] == sizes[1] > 1 == sizes[2] == sizes[3]


def check(tmp_path: Path, lines: list[object]) -> None:
    """Run a file of lines, and each line alone."""
    lines = [{**SMALL, **line} for line in lines]  # type: ignore[dict-item]
    rows = run(write(tmp_path / "r.jsonl", lines), tmp_path / "out", "--dtype", "float32")
    assert [row["error"] for row in rows] == [None] * len(rows)
    model = minidiff.load(dtype="float32")
    for i, line in enumerate(lines, start=1):
        one = Request.from_plain({**line, "output": "pil"})  # type: ignore[dict-item]
        result = minidiff.generate(one, model=model)
        for row, alone in zip([row for row in rows if row["line"] == i], result, strict=True):
            assert row["seed"] == alone.seeds[0]
            assert json.loads(row["parameters"]) == alone.parameters[0]
            assert minidiff.read_parameters(tmp_path / "out" / row["file"]) == alone.parameters[0]
            assert_same(tmp_path / "out", row, alone.image)


def test_a_bad_line_is_a_row_with_its_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"prompt": "a red circle", **SMALL}
    bad: list[object] = [
        "{",
        "[1]",
        json.dumps({**good, "prompt": "a rés"}, ensure_ascii=False).encode("latin1").decode(errors="replace"),
        "\ud800".encode(errors="surrogatepass").decode(errors="replace"),
        {**good, "widht": 8},
        {**good, "boxes": {"a hat": [0, 0, 1, 1]}},  # found when it is made, in a batch with others
        {**good, "width": 17},
        {**good, "model": "nowhere.safetensors"},
        {**good, "image": "none.png"},
        {**good, "latents": {"tensor": {}}},
    ]
    box = {**good, "boxes": {"red circle": [0, 0, 1, 1]}}
    rows = run(write(tmp_path / "r.jsonl", [box, *bad, "", box]), tmp_path / "out")
    assert [row["error"] is None for row in rows] == [True, *[False] * len(bad), True]
    assert "is not UTF-8" in rows[3]["error"]
    assert "did you mean 'width'" in rows[5]["error"] and "'a hat'" in rows[6]["error"]
    assert [row["line"] for row in rows] == [*range(1, 12), 13]
    assert "10 of 12 lines have an error" in capsys.readouterr().err


def test_what_is_the_same_but_for_texts_seeds_and_places_is_one_batch(tmp_path: Path, drawn: list[Request]) -> None:
    lines = [{"prompt": f"a {i}", "steps": 2 + i % 2, "width": 8, "height": 8} for i in range(24)]
    run(write(tmp_path / "r.jsonl", lines), tmp_path / "out")
    assert [(one.images, one.steps) for one in drawn] == [(8, 2), (4, 2), (8, 3), (4, 3)]
    drawn.clear()
    run(tmp_path / "r.jsonl", tmp_path / "more", "--batch-size", "5", "--steps", "4")
    assert [(one.images, one.steps) for one in drawn] == [(5, 4)] * 4 + [(4, 4)]


def test_each_field_that_is_an_image_s_own_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new one in Request.alone has to be known to the plan, too."""
    told: set[str] = set()
    monkeypatch.setattr(Request, "filled", lambda self, values: told.update(values))
    Request("a").alone(0)
    of_kind = {
        "guidance",
        "base_weight",
        "regions_apart",
        "tries",
    }  # the same in a batch, all of whose images have boxes or none
    assert told - {"context", "negative_context", "latents"} - of_kind == set(OWN)  # no file holds the first three


def test_a_log_cut_anywhere_is_taken_up_from_its_last_whole_row(tmp_path: Path, drawn: list[Request]) -> None:
    file, out = write(tmp_path / "r.jsonl", [{"prompt": f"a {i}", **SMALL} for i in range(9)] + ["{"]), tmp_path / "out"
    whole = run(file, out)
    log = out / "rows-1-of-1.jsonl"
    text = log.read_bytes()
    for end in (0, 1, text.index(b"\n"), text.index(b"\n") + 1, len(text) // 2, len(text) - 1):
        drawn.clear()
        log.write_bytes(text[:end])
        assert run(file, out) == whole
        kept = text[:end].splitlines(keepends=True)
        whole_ones = [row for row in kept if row.endswith(b"\n") and b'"error"' not in row]
        assert sum(one.images for one in drawn) == 9 - len(whole_ones)
        logged = log.read_bytes().splitlines()
        assert sum(b'"error"' not in row for row in logged) == 9
    assert len(list(out.glob("*.png"))) == 9 and not list(out.glob(".*"))


def test_a_changed_line_is_made_anew_and_other_flags_are_refused(
    tmp_path: Path, drawn: list[Request], capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[object] = [{"prompt": "a", **SMALL}, "{", {"prompt": "b", **SMALL}]
    file, out = tmp_path / "r.jsonl", tmp_path / "out"
    run(write(file, lines), out)
    drawn.clear()
    lines[1] = {"prompt": "mended", **SMALL}
    rows = run(write(file, lines), out)
    assert [one.prompt for one in drawn] == [("mended",)] and [row["error"] for row in rows] == [None] * 3
    capsys.readouterr()
    assert main(["batch", str(file), "--out", str(out), "--steps", "3", "--lora", "a.safetensors=0.5"]) == 2
    assert capsys.readouterr().err == (
        f"minidiff: error: {out} was begun with other flags: --steps not given then, 3 now; --lora not given then, "
        "a.safetensors,0.5 now; expected the same, or another folder\n"
    )
    old = {"loading": {"loras": [{"object": "minidiff.LoRA", "fields": {"file": "a.safetensors"}}]}}
    (out / "batch.json").write_text(json.dumps(old))
    assert main(["batch", str(file), "--out", str(out), "--lora", "a.safetensors"]) == 2
    assert "--lora as an older minidiff noted it then, a.safetensors now; expected" in capsys.readouterr().err
    (out / "batch.json").write_text("[3]")
    assert main(["batch", str(file), "--out", str(out)]) == 2
    assert "batch.json is not minidiff batch's" in capsys.readouterr().err


def test_the_manifest_tells_of_lines_as_they_are(tmp_path: Path, drawn: list[Request]) -> None:
    four, one = {"prompt": "a", "images_per_prompt": 4, **SMALL}, {"prompt": "a", **SMALL}
    file, out = tmp_path / "r.jsonl", tmp_path / "out"
    rows = run(write(file, [four, four, one, one]), out)
    assert [row["line"] for row in rows] == [1] * 4 + [2] * 4 + [3, 4]
    rows = run(write(file, [one, "{", one]), out)  # line 4 is gone, though another has its text
    assert [(row["line"], row["image"]) for row in rows] == [(1, 0), (2, 0), (3, 0)]
    assert [row["error"] is None for row in rows] == [True, False, True] and rows[0]["file"] == "0000001.png"


def test_shards_that_begin_at_once_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, link = {"threads": None}, os.link

    def late(there: Path, path: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        with only(tmp_path / "rows-2-of-2.jsonl"):
            assert begin(tmp_path / "rows-2-of-2.jsonl", asked, {"threads": 2}) == {"threads": 2}
        link(there, path)

    monkeypatch.setattr(os, "link", late)
    with only(tmp_path / "rows-1-of-2.jsonl"):
        assert begin(tmp_path / "rows-1-of-2.jsonl", asked, {"threads": 1}) == {"threads": 2}
    assert not list(tmp_path.glob(".*"))
    monkeypatch.setattr(os, "link", lambda *paths: os.symlink(tmp_path, tmp_path / "nowhere" / "x"))  # an OSError
    with only(tmp_path / "a" / "rows-1-of-1.jsonl"):
        assert begin(tmp_path / "a" / "rows-1-of-1.jsonl", asked, {"threads": 1}) == {"threads": 1}
    assert json.loads((tmp_path / "a" / "batch.json").read_text()) == {"threads": 1}


def test_a_line_with_an_error_is_tried_again(tmp_path: Path, drawn: list[Request]) -> None:
    start = tmp_path / "start.png"
    file = write(tmp_path / "r.jsonl", [{"prompt": "a", **SMALL}, {"prompt": "b", "image": str(start), **SMALL}])
    assert [row["error"] is None for row in run(file, tmp_path / "out")] == [True, False]
    Image.new("RGB", (8, 8)).save(start)
    assert [row["error"] for row in run(file, tmp_path / "out")] == [None, None]
    assert [one.prompt for one in drawn] == [("a",), ("b",)]


def test_the_newest_row_counts_whatever_its_log_is_called(tmp_path: Path, drawn: list[Request]) -> None:
    start, lines = (
        tmp_path / "start.png",
        [(1, json.dumps({"prompt": "a", "image": str(tmp_path / "start.png"), **SMALL}))],
    )
    assert [row["error"] is None for (row,) in Draw(tmp_path, log="9").rows(lines)] == [False]
    Image.new("RGB", (8, 8)).save(start)
    assert [row.get("error") for (row,) in Draw(tmp_path, log="10").rows(lines)] == [None]
    assert [row.get("error") for row in Done.read(tmp_path).rows(line_digests(lines))] == [None]
    assert not list(Draw(tmp_path, log="9").rows(lines)) and len(drawn) == 1


def test_what_is_wrong_with_flags_is_no_line_s_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write(tmp_path / "r.jsonl", [{"prompt": "a red circle", **SMALL}]), tmp_path / "out"
    for flags, said in (
        (["--steps", "0"], "steps is 0"),
        (["--ip-adapter", "a.safetensors"], "expected both"),
        (["--model", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--lora", "nowhere.safetensors"], "nowhere.safetensors"),
    ):
        where = out / flags[0]
        assert main(["batch", str(file), "--out", str(where), *flags]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and said in told
        assert not list(where.glob("*.png"))
    assert len(run(file, where)) == 1  # there, too: a folder without pictures is begun anew


def test_a_full_disk_loses_nothing(
    tmp_path: Path, drawn: list[Request], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write(tmp_path / "r.jsonl", [{"prompt": f"a {i}", **SMALL} for i in range(20)]), tmp_path / "out"
    written = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == ".0000013.png.tmp":
            written(path, data[:9])
            raise OSError(28, "No space left on device")
        return written(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert main(["batch", str(file), "--out", str(out)]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "No space left on device" in told and "the same command goes on" in told
    assert sum(one.images for one in drawn) == 16
    assert len(run(file, out)) == 20 and not list(out.glob(".*"))
    assert sum(one.images for one in drawn) == 16 + 12  # the batch that was not logged, and the rest


def test_two_at_work_in_one_folder_are_told(
    tmp_path: Path, drawn: list[Request], capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write(tmp_path / "r.jsonl", [{"prompt": "a", **SMALL}]), tmp_path / "out"
    out.mkdir()
    with only(out / "rows-1-of-2.jsonl"):
        (out / "batch.json").write_text("{}")
        run(file, out, "--shard", "2/2")
        assert main(["batch", str(file), "--out", str(out), "--shard", "1/2"]) == 2
    assert "another minidiff batch is at work in" in capsys.readouterr().err and not drawn
    run(file, out, "--shard", "1/2")
    assert len(drawn) == 1


def test_a_folder_s_number_of_threads_is_kept(
    tmp_path: Path, drawn: list[Request], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there, counted, draw = torch.get_num_threads(), [], command._generate

    def counting(batch: list[Job], model: minidiff.Model) -> minidiff.Result:
        counted.append(torch.get_num_threads())
        return draw(batch, model)

    monkeypatch.setattr(command, "_generate", counting)
    file = write(tmp_path / "r.jsonl", lines := [{"prompt": "a", **SMALL}])
    run(file, tmp_path / "usual")
    run(file, tmp_path / "told", "--threads", "3")
    run(write(file, [*lines, {"prompt": "b", **SMALL}]), tmp_path / "told")  # goes on as it was begun
    assert counted == [there, 3, 3] and torch.get_num_threads() == there
    assert main(["batch", str(file), "--out", str(tmp_path / "told"), "--threads", "2"]) == 2
    assert "--threads 3 then, 2 now" in capsys.readouterr().err


def test_flags_of_zero_and_of_one_that_has_made_nothing_yet_count(
    tmp_path: Path, drawn: list[Request], capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write(tmp_path / "r.jsonl", [{"prompt": "a", **SMALL}] * 2), tmp_path / "out"
    run(file, out, "--shard", "1/2", "--eta", "0")
    assert main(["batch", str(file), "--out", str(out), "--shard", "2/2"]) == 2
    assert "--eta 0.0 then, not given now" in capsys.readouterr().err
    (out / "rows-1-of-2.jsonl").write_text("")
    with only(out / "rows-1-of-2.jsonl"):
        assert main(["batch", str(file), "--out", str(out), "--shard", "2/2"]) == 2
    run(file, out, "--shard", "2/2")


def test_shards_make_together_what_one_makes(tmp_path: Path, drawn: list[Request]) -> None:
    file = write(tmp_path / "r.jsonl", [{"prompt": f"a {i}", **SMALL} for i in range(7)])
    parts = [row for i in (1, 2, 3) for row in run(file, tmp_path / str(i), "--shard", f"{i}/3")]
    assert sorted(parts, key=lambda row: row["line"]) == run(file, tmp_path / "whole")
    for i in (1, 2, 3):
        rows = run(file, tmp_path / "shared", "--shard", f"{i}/3")
    assert sorted(rows, key=lambda row: row["line"]) == run(file, tmp_path / "whole")


def test_too_little_memory_halves_a_batch(
    tmp_path: Path, drawn: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    enough = command._generate

    def little(batch: list[Job], model: minidiff.Model) -> minidiff.Result:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return enough(batch, model)

    monkeypatch.setattr(command, "_generate", little)
    rows = run(write(tmp_path / "r.jsonl", [{"prompt": f"a {i}", **SMALL} for i in range(8)]), tmp_path / "out")
    assert [one.images for one in drawn] == [2] * 4 and len(rows) == 8


def test_the_formats_hold_the_same_lines(tmp_path: Path) -> None:
    import pyarrow

    rows = [
        {"prompt": "2024", "seed": 5, "boxes": {"ball": [0.5, 0, 1, 1]}, "sampler": "ddim"},
        {"prompt": "[a|b]", "guidance_scale": 2.5},
    ]
    table = pyarrow.Table.from_pylist([{**rows[0], "guidance_scale": None}, rows[1]])
    write(tmp_path / "a.jsonl", rows)  # type: ignore[arg-type]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text(
        'prompt,seed,boxes,sampler,guidance_scale\n2024,5,"{""ball"": [0.5, 0, 1, 1]}",ddim,\n[a|b],,,,2.5\n'
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    for ending in ("jsonl", "json", "csv", "parquet"):
        lines = list(read_lines(tmp_path / f"a.{ending}"))
        assert [(number, json.loads(text)) for number, text in lines] == [(1, rows[0]), (2, rows[1])], ending
    with pytest.raises(ValueError, match=r"a\.txt ends in '\.txt'; expected one of \.jsonl"):
        next(read_lines(tmp_path / "a.txt"))
    for text, said in (
        ("prompt\na rés".encode("latin1"), "expected UTF-8"),
        ("prompt\na".encode("utf-16"), "its text is UTF-16"),
        (b"prompt,seed,prompt\na,1,b", "'prompt' more than once"),
    ):
        (tmp_path / "b.csv").write_bytes(text)
        with pytest.raises(ValueError, match=f"cannot read the requests in .*{said}"):
            list(read_lines(tmp_path / "b.csv"))
    with pytest.raises(ValueError, match="cannot read the requests"):
        next(read_lines(tmp_path / "none.csv"))


def test_planning_holds_one_window() -> None:
    """Of a file without an end."""
    taken = 0

    def lines() -> Iterator[Job]:
        nonlocal taken
        while True:
            taken += 1
            yield from jobs(taken, json.dumps({"prompt": "a", "steps": 1 + taken % 3}), {})

    planned = batches(lines(), 8)
    seen = [next(planned) for _ in range(2 * WINDOW // 8)]
    assert taken <= 3 * WINDOW and max(map(len, seen)) == 8
    assert all(len({job.kind for job in batch}) == 1 for batch in seen)


def test_pictures_to_start_from_end_a_window() -> None:
    picture = Image.new("RGB", (4096, 4096))
    one = Job(1, 0, 0, "", Request("a", image=picture).filled({"image": picture}))
    planned = batches((one for _ in range(100)), 8)
    assert len(next(planned)) == 5  # 80 million pixels


def test_draw_is_a_function_of_columns(tmp_path: Path, drawn: list[Request]) -> None:
    """As ray.data calls it: numpy columns, here with rows of a table and with lines."""
    table = {"prompt": np.array(["a", "b"], dtype=object), "seed": np.array([3, -1]), "steps": np.array([2, 2])}
    made = Draw()(table)
    assert set(made) == {*COLUMNS, "png"} and made["seed"] == [3, None]
    assert "seed is -1" in str(made["error"][1]) and bytes(made["png"][0])[:4] == b"\x89PNG"  # type: ignore[call-overload]
    told = {"line": np.array([4, 5]), "request": np.array(['{"prompt": "a"}', '{"prompt": "b"}'], dtype=object)}
    draw = Draw(tmp_path, fields={"steps": 3})
    assert draw(told)["file"] == ["0000004.png", "0000005.png"] and drawn[-1].steps == 3
    assert Draw(tmp_path)(told)["file"] == [] and len(Done.read(tmp_path).keys) == 2


@pytest.mark.slow
def test_five_kills_lose_and_repeat_nothing(tmp_path: Path) -> None:
    lines: list[object] = [
        {"prompt": ("a red circle", "a blue square", "a green star")[i % 3], "steps": 2, "width": 8, "height": 8}
        for i in range(500)
    ]
    chance = random.Random(0)
    bad = chance.sample(range(500), 10)
    for i in bad:
        lines[i] = '{"prompt": '
    file, out = write(tmp_path / "r.jsonl", lines), tmp_path / "out"
    digests = line_digests(read_lines(file))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["minidiff.run", "minidiff.cli.batch", "minidiff.weights.load"])
    flags = ["batch", str(file), "--out", str(out), "--dtype", "float32", "--batch-size", "16"]

    def go() -> multiprocessing.process.BaseProcess:
        process = context.Process(target=main, args=(flags,))
        process.start()
        return process

    def wait(process: multiprocessing.process.BaseProcess, ready: Callable[[], bool]) -> None:
        while process.is_alive() and not ready():
            time.sleep(0.001)

    for _ in range(5):
        process, before = go(), len(list(out.glob("*.png")))
        there = before + chance.randrange(1, 90)
        wait(process, lambda there=there: len(os.listdir(out)) > there if out.exists() else False)
        process.kill()
        process.join()
        assert process.exitcode == -9
        left = len(list(out.glob("*.png"))) - sum(
            row["file"] is not None for row in ({"file": None, **row} for row in Done.read(out).rows(digests))
        )
        assert 0 <= left <= 16  # the running batch
    process = go()
    process.join()
    assert process.exitcode == 0
    rows = parquet.read_table(out / "manifest.parquet").to_pylist()
    assert [row["line"] for row in rows] == list(range(1, 501))
    assert [row["line"] - 1 for row in rows if row["error"] is not None] == sorted(bad)
    good = [row for row in rows if row["error"] is None]
    assert {path.name for path in out.glob("*.png")} == {row["file"] for row in good} and len(good) == 490
    assert not list(out.glob(".*"))
    logged = [line for log in out.glob("rows-*.jsonl") for line in log.read_bytes().splitlines()]
    assert sum(b'"error"' not in row for row in logged) == 490
    model = minidiff.load(dtype="float32")
    chance.shuffle(good)
    for start in range(0, 490, 35):
        some = good[start : start + 35]
        seeds = [row["seed"] for row in some]
        made = minidiff.generate([row["prompt"] for row in some], seed=seeds, model=model, steps=2, width=8, height=8)
        for row, image in zip(some, made.images, strict=True):
            assert_same(out, row, image)


@pytest.mark.slow
def test_ray_makes_the_same_with_a_worker_killed(tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason="Ray is not installed (the extra [ray])")
    lines: list[object] = [{"prompt": "a red circle", **SMALL} for _ in range(600)]
    lines[5] = "{"
    lines[6] = {"prompt": "a red circle", "boxes": {"red circle": [0, 0, 0.5, 1]}, **SMALL}
    file, flags = write(tmp_path / "r.jsonl", lines), ("--dtype", "float32", "--batch-size", "16")
    alone = run(file, tmp_path / "alone", *flags, "--threads", "1")
    out = tmp_path / "out"
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            for log in out.glob("rows-*.jsonl"):
                killed.append(int(log.stem.rpartition("-")[2]))
                os.kill(killed[0], 9)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    rows = run(file, out, *flags, "--ray", "local", "--workers", "2", "--tar", "100")
    thread.join()
    ray = pytest.importorskip("ray")
    ray.shutdown()
    assert [row | {"tar": None} for row in rows] == alone and len(killed) == 1
    logged = [row for log in out.glob("rows-*.jsonl") for row in log.read_bytes().splitlines()]
    assert sum(b'"error"' not in row for row in logged) == 599
    assert len(list(out.glob("*.tar"))) == 6 and not list(out.glob("*.png"))
    found: list[str] = []
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            names = [name for name in tar.getnames() if name.endswith(".png")]
            assert {row["file"] for row in rows if row["tar"] == path.name} == set(names)
            tar.extractall(out, filter="data")
            found += names
    assert sorted(found) == [row["file"] for row in rows if row["error"] is None]
    assert (out / "0000007.png").read_bytes() == (tmp_path / "alone" / "0000007.png").read_bytes()  # a guided one
    for row in rows[6::100]:
        assert_same(out, row, Image.open(tmp_path / "alone" / row["file"]))
