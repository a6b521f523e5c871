"""minidiff batch --tar: every picture is in one shard, also after a kill at any place."""

import io
import json
import multiprocessing
import os
import random
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_batch import SMALL, drawn, parquet, run, write

import minidiff
from minidiff.cli import tars
from minidiff.cli.main import main
from minidiff.cli.manifest import Row
from minidiff.request import Request

__all__ = ["drawn"]


def pairs(out: Path) -> dict[str, tuple[bytes, Row]]:
    """What each key stands for in all shards; each stands once, and nothing else is there."""
    found: dict[str, tuple[bytes, Row]] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            names = tar.getnames()
            for picture, facts in zip(names[::2], names[1::2], strict=True):
                key = picture.removesuffix(".png")
                assert facts == f"{key}.json" and key not in found
                found[key] = tar.extractfile(picture).read(), json.load(tar.extractfile(facts))  # type: ignore[union-attr]
    assert not list(out.glob("*.png")) and not list(out.glob(".*"))
    return found


def test_pictures_are_pairs_in_shards(tmp_path: Path) -> None:
    lines: list[object] = [{"prompt": "a red circle", "seed": i, **SMALL} for i in range(3)]
    lines += ["{", {"prompt": "a blue square", "boxes": {"blue square": [0, 0, 1, 1]}, **SMALL, "steps": 1}]
    out = tmp_path / "out"
    rows = run(write(tmp_path / "r.jsonl", lines), out, "--tar", "2", "--dtype", "float32")
    assert sorted(path.name for path in out.glob("*.tar")) == ["pictures-000000.tar", "pictures-000001.tar"]
    found = pairs(out)
    assert len(found) == 4 and len(rows) == 5
    for row in rows:
        assert (row["tar"] is None) == (row["error"] is not None)
        if row["error"] is None:
            with tarfile.open(out / row["tar"]) as tar:
                assert row["file"] in tar.getnames()
            picture, facts = found[row["file"].removesuffix(".png")]
            assert facts == {
                **{name: row[name] for name in ("line", "image", "seed", "prompt", "flagged")},
                "parameters": json.loads(row["parameters"]),
                "report": None if row["report"] is None else json.loads(row["report"]),
            }
            assert Image.open(io.BytesIO(picture)).size == (8, 8)
    picture, facts = found["0000002"]
    made = minidiff.generate(Request.from_plain(facts["parameters"]), model=minidiff.load(dtype="float32"))
    difference = np.asarray(made.image, dtype=int) - np.asarray(Image.open(io.BytesIO(picture)), dtype=int)
    assert abs(difference).max() <= 1


def test_a_kill_at_any_place_loses_and_repeats_nothing(
    tmp_path: Path, drawn: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, flags = write(tmp_path / "r.jsonl", [{"prompt": f"a {i}", **SMALL} for i in range(9)]), ("--tar", "4")
    whole = run(file, tmp_path / "whole", *flags, "--batch-size", "3")
    expected = pairs(tmp_path / "whole")
    assert len(expected) == 9
    calls: list[str] = []
    last = 0

    def dying(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def called(*given: object, **more: object) -> object:
            calls.append(name)
            if len(calls) == last:
                raise KeyboardInterrupt
            return call(*given, **more)

        return called

    code = 130
    while code == 130:  # each of those calls in its turn is the last one
        out, last = tmp_path / f"out{last}", last + 1
        calls.clear()
        with monkeypatch.context() as patch:
            for owner, name in ((tarfile.TarFile, "addfile"), (os, "fsync"), (os, "replace"), (Path, "unlink")):
                patch.setattr(owner, name, dying(name, getattr(owner, name)))
            code = main(["batch", str(file), "--out", str(out), *flags, "--batch-size", "3"])
        rows = run(file, out, *flags, "--batch-size", "3")
        assert [row | {"tar": None} for row in rows] == [row | {"tar": None} for row in whole]
        for row in rows:
            with tarfile.open(out / row["tar"]) as tar:
                assert row["file"] in tar.getnames()
        again = pairs(out)
        assert again.keys() == expected.keys()
        assert all(again[key][1] == expected[key][1] for key in again)
    assert code == 0 and last > 40 and set(calls) == {"addfile", "fsync", "replace", "unlink"}


def test_shards_of_a_part_have_its_name_and_other_lines_need_another_folder(
    tmp_path: Path, drawn: list[Request], capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[object] = [{"prompt": f"a {i}", **SMALL} for i in range(5)]
    file, out = write(tmp_path / "r.jsonl", lines), tmp_path / "out"
    for part in ("1/2", "2/2"):
        run(file, out, "--tar", "--shard", part)
    assert sorted(path.name for path in out.glob("*.tar")) == [f"pictures-{i}-of-2-000000.tar" for i in (1, 2)]
    assert len(pairs(out)) == 5
    write(file, [*lines, {"prompt": "more", **SMALL}])
    assert main(["batch", str(file), "--out", str(out), "--tar", "--shard", "1/2"]) == 2
    assert "--tar of a file with the digest" in capsys.readouterr().err
    (tmp_path / "pictures-000000.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match="is no shard of minidiff batch"):
        tars.remove_packed(tmp_path, "pictures")
    mine, cat = write(tmp_path / "m.jsonl", lines), tmp_path / "cat.png"
    Image.new("RGB", (8, 8)).save(cat)
    assert [row["tar"] for row in run(mine, tmp_path)] == [None] * 5  # without --tar, no shard is looked at
    with tarfile.open(tmp_path / "pictures-000000.tar", "w") as tar:
        for name in ("cat.png", "0000001.json"):
            tar.add(cat, name)
    tars.remove_packed(tmp_path, "pictures")
    assert cat.exists() and tars.shards(tmp_path, "pictures")({"line": 1, "image": 0, "file": "0000001.png"}) is None


@pytest.mark.slow
def test_five_kills_of_a_process(tmp_path: Path) -> None:
    lines: list[object] = [{"prompt": "a red circle", "steps": 1, "width": 8, "height": 8} for _ in range(200)]
    for i in range(9, 200, 20):
        lines[i] = "{"
    file, out = write(tmp_path / "r.jsonl", lines), tmp_path / "out"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["minidiff.run", "minidiff.cli.batch", "minidiff.weights.load"])
    flags = ["batch", str(file), "--out", str(out), "--batch-size", "8", "--tar", "16"]
    chance = random.Random(0)
    for kills in range(6):
        process = context.Process(target=main, args=(flags,))
        process.start()
        there = 1 + 2 * kills  # shards
        while kills < 5 and process.is_alive() and len(list(out.glob("*.tar"))) < there:
            time.sleep(0.001)
        if kills < 5:
            time.sleep(chance.random() / 100)
            process.kill()
        process.join()
    assert process.exitcode == 0
    rows = parquet.read_table(out / "manifest.parquet").to_pylist()
    assert [row["line"] for row in rows] == list(range(1, 201))
    assert [row["line"] for row in rows if row["error"] is not None] == list(range(10, 201, 20))
    made = pairs(out)
    assert len(made) == 190 and {f"{key}.png" for key in made} | {None} == {row["file"] for row in rows}
    for row in rows:
        if row["tar"] is not None:
            with tarfile.open(out / row["tar"]) as tar:
                assert tar.extractfile(row["file"]).read() == made[row["file"].removesuffix(".png")][0]  # type: ignore[union-attr]
        else:
            assert row["error"] is not None
