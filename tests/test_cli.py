"""The command line: its output, exit codes and flags, and reproducing an image from a PNG."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from ldm import write_single_file
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import minidiff
from minidiff.cli.main import main
from minidiff.cli.spoken import spoken
from minidiff.png.read import read_metadata
from minidiff.request import Request
from minidiff.resolve import resolve
from minidiff.result import Result
from minidiff.vocabulary import OBJECTIVES, SAMPLERS

A1111 = """a cat, (masterpiece:1.2)
Negative prompt: blurry
Steps: 2, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 9, Size: 16x32, Model hash: 0123456789, \
Model: v1-5-pruned-emaonly, Clip skip: 2, Hires upscale: 2, Version: v1.10.1"""


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str], list[str]]]:
    """Run a command line in this process: its exit code, the lines on stdout and those on stderr."""

    def run(*argv: object) -> tuple[int, list[str], list[str]]:
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as exit:  # --help and --version
            code = int(exit.code or 0)
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


Cli = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def tiny(tiny_folder: Path, tmp_path: Path) -> tuple[object, ...]:
    """Flags of a quick run into tmp_path."""
    return "--model", tiny_folder, "--steps", 2, "--dtype", "float32", "--device", "cpu", "--out", tmp_path


class Asked:
    """The arguments of load() and sample_steps(); nothing runs, the command ends as if interrupted."""

    load: dict[str, object]
    request: Request


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tiny_model: minidiff.Model) -> Asked:
    seen = Asked()

    def load(source: str, **given: object) -> minidiff.Model:
        seen.load = {"source": source, **given}
        return tiny_model

    def sample_steps(request: Request) -> None:
        seen.request = request
        raise KeyboardInterrupt

    monkeypatch.setattr("minidiff.weights.load.load", load)
    monkeypatch.setattr("minidiff.run.sample_steps", sample_steps)
    return seen


@pytest.fixture
def no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(source: str, **given: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("minidiff.weights.load.load", load)


def write_png(path: Path, **chunks: str) -> Path:
    info = PngInfo()
    for name, text in chunks.items():
        info.add_itxt(name, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def ours(path: Path, info: dict[str, object] | None = None, **arguments: object) -> Path:
    chunk = {"format": 1, "arguments": {"prompt": "a cat", "seed": 1, **arguments}, "info": info or {}}
    return write_png(path, minidiff=json.dumps(chunk))


# ---- generate


def test_writes_what_generate_makes_and_prints_the_paths(
    cli: Cli, tiny: tuple[object, ...], tiny_model: minidiff.Model, tmp_path: Path
) -> None:
    code, out, err = cli(
        "generate", "a red circle", "a dog", "--negative-prompt", "blur", "--seed", 7, "--images", 2, *tiny
    )
    names = ["a-red-circle-seed-7", "a-red-circle-seed-8", "a-dog-seed-9", "a-dog-seed-10"]
    assert (code, out, err) == (0, [str(tmp_path / f"{name}.png") for name in names], [])
    made = minidiff.generate(
        ["a red circle", "a dog"], model=tiny_model, negative_prompt="blur", steps=2, seed=7, images_per_prompt=2
    )
    for path, image in zip(out, made.images, strict=True):
        assert Image.open(path).tobytes() == image.tobytes()  # type: ignore[union-attr]
    assert read_metadata(out[3]).arguments == made.parameters[3] | {"model": "tiny"}


def test_never_overwrites_and_leaves_the_metadata_out_on_request(
    cli: Cli, tiny: tuple[object, ...], tmp_path: Path
) -> None:
    for name in ("x.png", "x-1.png"):
        code, out, _ = cli("generate", "a cat", *tiny, "--out", tmp_path / "new" / "x.png", "--no-metadata")
        assert (code, out) == (0, [str(tmp_path / "new" / name)])
        assert Image.open(out[0]).text == {}  # type: ignore[attr-defined]


def test_names_have_a_pattern(cli: Cli, tiny: tuple[object, ...], tmp_path: Path) -> None:
    flags = ("--seed", 5, "--images", 2, "--vary", "7=0.5", "--out", tmp_path / "{prompt}" / "{{{index}}}-{seed}.png")
    for taken in ("", "-1"):
        code, out, _ = cli("generate", "A Cat/../é", *tiny, *flags)
        assert (code, out) == (0, [str(tmp_path / "a-cat-e" / f"{{{i}}}-5{taken}.png") for i in range(2)])
    assert read_metadata(out[1]).arguments["vary"] == [8, 0.5]
    code, (again,), err = cli("generate", "--from", out[1], *tiny)
    assert (code, Image.open(again).tobytes()) == (0, Image.open(out[1]).tobytes()) and "vary" not in "".join(err)


@pytest.mark.slow
def test_a_second_pass_is_made_larger_and_its_png_says_what_it_needs(
    cli: Cli, tiny: tuple[object, ...], tmp_path: Path
) -> None:
    size = ("--width", 24, "--height", 32, "--seed", 5)
    _, (first,), _ = cli("generate", "a cat", *tiny, *size)
    code, (second,), err = cli("generate", "a cat", *tiny, *size, "--again", "1.5=1")
    assert (code, err, Image.open(second).size) == (0, [], (36, 48))
    code, _, err = cli("generate", "--from", second, *tiny)
    assert code == 2 and "was made from a picture that it does not hold: pass --image" in err[0]
    larger = tmp_path / "larger.png"
    Image.open(first).resize((36, 48), Image.Resampling.LANCZOS).save(larger)
    for start in (first, larger):
        code, (again,), _ = cli("generate", "--from", second, *tiny, "--image", start)
        assert (code, Image.open(again).tobytes()) == (0, Image.open(second).tobytes())


def test_an_image_that_cannot_be_written_there_is_saved_elsewhere(
    cli: Cli, tiny: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("generate", "a cat", *tiny, "--seed", 5, "--out", "file/x.png")
    assert (code, out) == (3, [str(tmp_path / "x.png")])
    assert len(err) == 1
    assert err[0].startswith("warning: could not write file/x.png")


def test_exit_code_1_where_nothing_can_be_written(
    cli: Cli, tiny: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(self: Result, path: str, *, metadata: bool) -> list[Path]:
        raise OSError("could not write x, nor y")

    monkeypatch.setattr(Result, "save", save)
    assert cli("generate", "a cat", *tiny) == (1, [], ["minidiff: error: could not write x, nor y"])


def test_every_argument_has_a_flag_that_arrives(cli: Cli, asked: Asked, tmp_path: Path) -> None:
    start = tmp_path / "start.png"
    Image.new("RGB", (4, 2)).save(start)
    flags = (
        "--model=m --negative-prompt=n --width=16 --height=24 --timesteps=900,500.5 --guidance-scale=2 "
        "--guidance-rescale=0.5 --clip-skip=1 --sampler=lms --karras --spacing=trailing --seed=3,4 "
        "--images=2 --variant=fp16 --revision=r --vae=v --tokenizer=t --prediction-type=v_prediction --dtype=bf16 "
        "--device=cuda --compile --safety-from=s --word=w=x --word=v=y --lora=f=0.5 --box=cat=0,0,1,1 "
        "--relation=cat@left@of@hat "
        f"--guidance=boxdiff --attention --image={start} --mask=alpha --strength=0.5 --fit=pad --no-paste"
    )
    cli("generate", "a cat", *(flag.replace("@", " ") for flag in flags.split()))
    assert asked.load == {
        "source": "m",
        "tokenizer": "t",
        "vae": "v",
        "prediction_type": "v_prediction",
        "dtype": "bf16",
        "device": "cuda",
        "variant": "fp16",
        "revision": "r",
        "compile": True,
        "safety": "s",
        "words": {"w": "x", "v": "y"},
        "loras": [minidiff.LoRA("f", 0.5)],
    }
    expected = {
        "prompt": ["a cat"],
        "negative_prompt": ["n"],
        "model": "tiny",
        "width": 16,
        "height": 24,
        "timesteps": [900.0, 500.5],
        "guidance_scale": 2.0,
        "guidance_rescale": 0.5,
        "clip_skip": 1,
        "sampler": "lms",
        "schedule": "karras",
        "spacing": "trailing",
        "eta": 0.0,
        "seed": [3, 4],
        "images_per_prompt": 2,
        "boxes": {"cat": {"weight": 1.0, "boxes": [[0.0, 0.0, 1.0, 1.0]]}},
        "relations": [["cat", "left of", "hat"]],
        "guidance": "boxdiff",
        "attention": True,
        "image": asked.request.plain()["image"],
        "mask": ["alpha"],
        "strength": 0.5,
        "fit": "pad",
        "paste": False,
    }
    assert asked.request.image[0].size == (4, 2)  # type: ignore[index]
    assert asked.request.plain() == expected
    cli("generate", "a", "b", "--model=m", "--sigmas=9,1,0", "--negative-prompt=c", "--negative-prompt=d", "--seed=5")
    assert asked.request.sigmas == (9.0, 1.0, 0.0)
    assert asked.request.negative_prompt == ("c", "d")
    assert asked.request.seed == 5
    cli("generate", "a", "--model=m", "--sampler=ddim", "--eta=0.25", "--steps=7")
    assert (asked.request.eta, asked.request.steps) == (0.25, 7)
    cli("generate", "a", "--model=m", "--cache-interval=2", "--fast")
    assert (asked.request.cache_interval, asked.request.guidance_interval) == (2, (0.28, 5.42))
    cli("generate", "a", "--model=m", "--fast", "--guidance-interval=1,9")
    assert (asked.request.cache_interval, asked.request.guidance_interval) == (3, (1.0, 9.0))
    cli("generate", "a", "--model=m", "--vary=9=0.25")
    assert asked.request.vary == (9, 0.25)


def test_without_flags_the_library_decides(cli: Cli, asked: Asked) -> None:
    assert cli("generate", "a cat", "--model", "m") == (130, [], ["minidiff: interrupted"])
    assert asked.request.plain() == Request("a cat", model="tiny").plain() | {"prompt": ["a cat"]}
    assert [value for value in asked.load.values() if value] == ["m"]


def test_progress_bar_is_for_terminals(
    cli: Cli, tiny: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("generate", "a cat", *tiny)[2] == []
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    code, out, _ = cli("generate", "a cat", *tiny)
    assert (code, len(out)) == (0, 1)
    assert "2/2" in terminal.getvalue()


# ---- errors


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ('no boxes; expected boxes={"a": (0, 0, 1, 1)} too', 'no boxes; expected --box "PHRASE=X0,Y0,X1,Y1" too'),
        ('expected syntax="a1111" too', "expected --syntax a1111 too"),
        ("pass safety='a/b', or safety=True", "pass --safety-from a/b, or --safety"),
        ("pass timesteps=[999, 1]; vae=", "pass --timesteps 999,1; --vae SOURCE"),
        ("images_per_prompt is 0; x.png: images_per_prompt is 0", "--images is 0; x.png: images_per_prompt is 0"),
        ("the seed of 'a seed=4', a model's", "the seed of 'a seed=4', a model's"),
    ],
)
def test_messages_name_flags(message: str, told: str) -> None:
    assert spoken(message) == told


@pytest.mark.usefixtures("no_load")
@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "there is no prompt"),
        (["a", "--model", "m", "--out", "x.jpg"], "cannot save as .jpg"),
        (["a", "--model", "m", "--sampler", "nope"], "'nope'"),
        (["a", "--model", "m", "--steps", "0"], "steps is 0; expected a whole number of at least 1"),
        (["a", "--model", "m", "--steps", "x"], "argument --steps: invalid int value: 'x'"),
        (["a", "--model", "m", "--timesteps", "2", "--sigmas", "2,1,0"], "timesteps and sigmas"),
        (["a", "--model", "m", "--width", "-8"], "width is -8"),
        (["a", "--model", "m", "--images", "0"], "--images is 0"),
        (["a", "--model", "m", "--guidance-scale", "0.5"], "--guidance-scale is 0.5; expected a number of at least 1"),
        (["a", "--model", "m", "--guidance-rescale", "2"], "--guidance-rescale is 2.0; expected a number from 0 to 1"),
        (["a", "--model", "m", "--eta", "2"], "eta is 2.0; expected a number from 0 to 1"),
        (["a", "--model", "m", "--seed", "1,2"], "seed holds 2 numbers for 1 images"),
        (["a", "--model", "m", "--seed", "-1"], "seed is -1; expected 0 to"),
        (["a", "--model", "m", "--seed", "one"], "argument --seed: got 'one'; expected whole numbers"),
        (["a", "--model", "m", "--timesteps", "9;8"], "argument --timesteps: got '9;8'; expected numbers separated by"),
        (["a", "--model", "m", "--again", "2=3"], "argument --again: got '2=3'; expected 1 to 16 times the size"),
        (["a", "--model", "m", "--vary", "9"], "argument --vary: got '9'; expected e.g. 7=0.2"),
        (["a", "--model", "m", "--out", "{sed}.png"], "has '{sed}'; expected some of {index}, {seed}, {prompt}"),
        (["a", "--mod", "m"], "unrecognized arguments: --mod"),
        (["a", "--model", "m", "--from", "gone.png"], "no such file: gone.png"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(flags: list[str], text: str, cli: Cli) -> None:
    code, out, err = cli("generate", *flags)
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].startswith("minidiff: error: ")
    assert text in err[0]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--width", 30], "width is 30; expected a positive multiple of 4 pixels, such as 32"),
        (["--sampler", "euler", "--eta", 0.5], "eta is 0.5"),
        (["--sampler", "pndm", "--karras"], "expected one with it: deis, dpm2, dpm2_ancestral"),
        (["--spacing", "odd"], "odd"),
        (["--clip-skip", 9], "--clip-skip: got 9, expected 0 to 2"),
        (["--dtype", "int4"], "dtype 'int4' is unknown"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--prediction-type", "sample"], "--prediction-type is 'sample'"),
        (["--variant", "fp16"], "--variant fp16"),
        (["--negative-prompt", "a", "--negative-prompt", "b"], "--negative-prompt holds 2 texts for 1 prompts"),
        (["--model", "nobody/nothing"], "is not in the hub's cache and the hub cannot be reached"),
        (["--model", "gone.safetensors"], "gone.safetensors is not there"),
    ],
)
def test_what_the_library_refuses_is_one_line_too(
    flags: list[object], text: str, cli: Cli, tiny: tuple[object, ...]
) -> None:
    code, out, err = cli("generate", "a cat", *tiny, *flags)
    assert (code, out, len(err)) == (2, [], 1)
    assert text in err[0]


def test_a_long_list_of_keys_becomes_a_short_line(cli: Cli, tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_single_file(tiny_folder, path, more={f"model.diffusion_model.new.{i}": torch.zeros(1) for i in range(40)})
    code, _, err = cli("generate", "a cat", "--model", path, "--tokenizer", tiny_folder / "tokenizer")
    assert (code, len(err)) == (2, 1)
    assert "unexpected new.0; " in err[0]
    assert len(err[0]) < 600
    assert err[0].endswith("more (minidiff info --json lists all)")


def test_warnings_are_one_line_without_code(cli: Cli, tiny: tuple[object, ...]) -> None:
    code, out, err = cli("generate", "red " * 100, *tiny, "--guidance-scale", 1, "--negative-prompt", "blur")
    assert (code, len(out), len(err)) == (0, 1, 2)
    assert "warning: the negative prompt has no effect at --guidance-scale 1" in err
    assert any(line.startswith("warning: prompt 'red red") and "has 100 tokens" in line for line in err)


def test_terminals_get_no_control_characters(cli: Cli, tmp_path: Path) -> None:
    path = ours(tmp_path / "x.png", prompt="a\x1b[31m cat\nkind: trap", **{"\x1b[2J": 1})
    code, out, _ = cli("info", path)
    assert code == 0
    assert out[:2] == [r"prompt: a\x1b[31m cat", "  kind: trap"]
    code, _, err = cli("generate", "--from", path, "--model", "gone\x1b[2J.safetensors")
    assert code == 2
    assert not any("\x1b" in line for line in (*out, *err))


# ---- generate --from


def test_from_makes_the_same_image_again(cli: Cli, tiny: tuple[object, ...], tiny_folder: Path, tmp_path: Path) -> None:
    flags = ("--sampler", "euler_ancestral", "--karras", "--guidance-scale", 3, "--clip-skip", 1, "--seed", 11)
    _, (first,), _ = cli("generate", "a cat, 日本", *tiny, *flags, "--width", 24, "--negative-prompt", "blur")
    code, (second,), err = cli("generate", "--from", first, "--model", tiny_folder, "--out", tmp_path / "again.png")
    assert (code, err) == (0, [])
    assert Image.open(first).tobytes() == Image.open(second).tobytes()
    assert Image.open(first).text == Image.open(second).text  # type: ignore[attr-defined]


def test_guidance_of_relations_is_taken_and_that_of_nothing_is_not(cli: Cli, asked: Asked, tmp_path: Path) -> None:
    related = ours(tmp_path / "x.png", relations=[["cat", "left of", "hat"]], guidance="relation")
    cli("generate", "--from", related, "--model=m")
    assert (asked.request.guidance, len(asked.request.relations)) == ("relation", 1)
    cli("generate", "--from", ours(tmp_path / "y.png", guidance="relation"), "--model=m")
    assert asked.request.guidance is None


def test_boxes_of_relations_are_replaced_with_these_and_own_ones_stay(
    cli: Cli, asked: Asked, tiny_model: minidiff.Model, tmp_path: Path
) -> None:
    relations, own = [["cat", "left of", "hat"]], {"cat": (0, 0, 0.4, 1), "hat": (0.5, 0, 1, 1)}
    for boxes in (None, own):
        made, _, _ = resolve(Request("a cat and a hat", relations=relations, boxes=boxes, seed=1), tiny_model)
        path = ours(tmp_path / f"{boxes is None}.png", **made.alone(0).plain())
        cli("generate", "--from", path, "--model=m", "--relation=cat above hat")
        assert (asked.request.boxes is None) == (boxes is None)
        assert asked.request.relations == (("cat", "above", "hat"),)


def test_flags_override_the_file(cli: Cli, asked: Asked, tmp_path: Path) -> None:
    path = ours(
        tmp_path / "x.png",
        steps=9,
        clip_skip=2,
        sampler="ddim",
        eta=0.5,
        schedule="uniform",
        width=8,
        guidance_rescale=0.5,
    )
    cli("generate", "--from", path, "--model=m", "--clip-skip=0", "--seed=0", "--guidance-rescale=0")
    got = asked.request
    assert (got.prompt, got.steps, got.sampler, got.eta, got.width) == ("a cat", 9, "ddim", 0.5, 8)
    assert (got.clip_skip, got.schedule, got.seed, got.guidance_rescale) == (0, "uniform", 0, 0.0)
    _, _, err = cli("generate", "a dog", "--from", path, "--model=m", "--sampler=euler", "--timesteps=9,3")
    got = asked.request
    assert (got.prompt, got.steps, got.timesteps) == (("a dog",), None, (9.0, 3.0))
    assert (got.sampler, got.eta, got.schedule) == ("euler", 0.0, None)
    assert err[0] == f"note: not taken from {path}: steps, eta"


def test_what_is_not_taken_over_is_said(cli: Cli, asked: Asked, tmp_path: Path) -> None:
    tensor = {"tensor": {"shape": [1], "dtype": "float32", "sha256": "0"}}
    info = {"load": {"vae": "kl.safetensors", "variant": "fp16"}, "dtype": "float16", "versions": {"torch": "1.0"}}
    sampler = {"object": "x.Y", "fields": {}}
    path = ours(tmp_path / "x.png", info, latents=tensor, sampler=sampler, model="other")
    _, _, err = cli("generate", "--from", path, "--model", "m")
    assert asked.load["variant"] is asked.load["vae"] is asked.load["dtype"] is None
    assert err == [
        f"note: not taken from {path}: latents, sampler, vae, variant, dtype",
        f"note: {path} does not record everything needed, so the image will differ",
        f"note: {path} was made with the model 'other', this is 'tiny'",
        f"note: {path} was made with torch 1.0, this is {version('torch')}: the last bits may differ",
        "minidiff: interrupted",
    ]


def test_a_picture_does_not_decide_which_model_is_fetched(
    cli: Cli, asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = {"load": {"vae": "a/kl", "variant": "fp16", "revision": "r"}, "dtype": "float16"}
    path = ours(tmp_path / "x.png", info, model="owner/name")
    code, _, err = cli("generate", "--from", path)
    assert (code, len(err)) == (2, 1)
    assert "made with a model named 'owner/name'; a picture cannot choose what is loaded: pass the model" in err[0]
    cli("generate", "--from", path, "--model", "owner/name")
    load = asked.load
    assert (load["source"], load["vae"], load["variant"], load["revision"]) == ("owner/name", None, "fp16", "r")
    # what is already in the cache is not downloaded
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: f"/cache/{name}/{file}")
    cli("generate", "--from", path, "--dtype", "float32")
    assert asked.request.model.name == "tiny"
    load = asked.load
    assert (load["source"], load["vae"], load["variant"], load["revision"]) == ("owner/name", "a/kl", "fp16", "r")
    assert load["dtype"] == "float32"
    path = ours(tmp_path / "y.png", info, model="name")
    cli("generate", "--from", path, "--model", "folder/name")
    assert (asked.load["source"], asked.load["dtype"]) == ("folder/name", "float16")
    cli("generate", "--from", ours(tmp_path / "z.png", model="minidiff/shapes"))
    assert asked.load["source"] == "minidiff/shapes"


def test_another_file_of_the_same_name_is_noticed(
    cli: Cli, tiny: tuple[object, ...], tiny_folder: Path, tmp_path: Path
) -> None:
    model = write_single_file(tiny_folder, tmp_path / "m.safetensors")
    flags = (*tiny, "--model", model, "--tokenizer", tiny_folder / "tokenizer", "--width", 16, "--height", 16)
    _, (png,), _ = cli("generate", "a cat", *flags)
    assert cli("generate", "--from", png, *flags)[2] == []
    _, _, (error,) = cli("generate", "--from", png)
    assert f"{png} was made with a file named '{model.stem}" in error and "of sha256 " in error
    write_single_file(tiny_folder, model, dtype=torch.float16)
    code, _, (note,) = cli("generate", "--from", png, *flags)
    assert code == 0
    assert note.startswith(f"note: {png} was made with a model file of sha256 ")


def test_from_a1111(cli: Cli, asked: Asked, tmp_path: Path) -> None:
    path = write_png(tmp_path / "a.png", parameters=A1111)
    _, _, err = cli("generate", "--from", path, "--model", "m")
    got = asked.request
    assert (got.prompt, got.negative_prompt, got.syntax) == ("a cat, (masterpiece:1.2)", "blurry", "a1111")
    assert (got.steps, got.sampler, got.schedule, got.clip_skip) == (2, "dpmpp_2m", "karras", 1)
    assert (got.guidance_scale, got.seed, got.width, got.height) == (6.5, 9, 16, 32)
    assert err[:2] == [
        f"note: not taken from {path}: Hires upscale",
        f"note: {path} was not made by minidiff; its noise differs, so the image will not match",
    ]


@pytest.mark.usefixtures("no_load")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", "many"),
        ("steps", True),
        ("schedule", 1),
        ("timesteps", [1, "x"]),
        ("clip_skip", 0.5),
        ("sampler", ["ddim"]),
        ("seed", [1, 2]),
        ("prompt", 3),
    ],
)
def test_values_of_another_kind_are_refused(name: str, value: object, cli: Cli, tmp_path: Path) -> None:
    path = ours(tmp_path / "x.png", **{name: value})
    code, _, err = cli("generate", "--from", path, "--model", "m")
    assert (code, len(err)) == (2, 1)
    assert re.search(rf"x.png: {name} (is|holds) ", err[0])


# ---- info


def test_info_of_a_png(cli: Cli, tmp_path: Path) -> None:
    info: dict[str, object] = {
        "versions": {"minidiff": "0.1.0"},
        "model": {"kind": "file", "name": "m", "sha256": "ab"},
    }
    path = ours(tmp_path / "x.png", info, negative_prompt="blur", timesteps=[9, 1], model="m")
    assert cli("info", path) == (
        0,
        [
            "prompt: a cat",
            "negative_prompt: blur",
            "seed: 1",
            "timesteps: 9, 1",
            "model: m (file, sha256 ab)",
            'versions: {"minidiff": "0.1.0"}',
            "written by: minidiff",
            "reproducible: yes, with the same model and versions",
        ],
        [],
    )
    _, out, _ = cli("info", "--json", path)
    found = json.loads("\n".join(out))
    assert (found["kind"], found["source"], found["reproducible"]) == ("picture", "minidiff", True)
    assert found["arguments"] == read_metadata(path).arguments
    _, out, _ = cli("info", write_png(tmp_path / "a.png", parameters=A1111))
    assert out[:2] == ["prompt: a cat, (masterpiece:1.2)", "negative_prompt: blurry"]
    assert "sampler: dpmpp_2m" in out
    assert out[-2].startswith("written by: A1111")
    assert out[-1].startswith("reproducible: no, other programs differ")


def test_info_of_models(cli: Cli, tiny_folder: Path, tmp_path: Path) -> None:
    code, out, err = cli("info", tiny_folder)
    assert (code, err) == (0, [])
    assert out[:2] == ["kind: Stable Diffusion 1.x folder", "loads: yes"]
    assert "  widths: 32, 64, 96" in out
    assert "  sampler: pndm" in out
    assert any(line.startswith("UNet: 496 tensors (496 F32), ") for line in out)
    path = write_single_file(tiny_folder, tmp_path / "x.safetensors", vae=False, more={"odd": torch.zeros(1)})
    code, out, err = cli("info", path)
    assert (code, err) == (0, [])  # it can be described
    assert out[1] == "loads: no, because it holds no autoencoder; pass one with --vae SOURCE"
    assert "  schedule and trainer state: 14" in out
    assert out[-1] == "foreign, left out: 1 tensors: odd"
    _, out, _ = cli("info", "--json", path)
    found = json.loads("\n".join(out))
    assert (found["loads"], found["foreign"], len(found["parts"])) == (False, ["odd"], 2)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("x.ckpt", b"\x80\x02}q\x00.", "is a pickle, which can run code"),
        ("x.safetensors", b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "cut short or damaged"),
        ("x.png", b"no", "is no PNG, JPEG or WebP file"),
        ("x.jpg", b"\xff\xd8\xff", "is no PNG, JPEG or WebP file"),
        ("x.txt", b"hello, world", "cannot be read as safetensors"),
    ],
)
def test_info_of_what_cannot_be_read(name: str, content: bytes, text: str, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    code, out, err = cli("info", tmp_path / name)
    assert (code, out, len(err)) == (2, [], 1)
    assert text in err[0]


def test_info_of_the_machine(cli: Cli) -> None:
    code, out, err = cli("info", "--machine")
    assert (code, err) == (0, [])
    assert [line.partition(":")[0] for line in out] == [
        *("processor", "threads", "features", "rates", "accelerators", "dtype", "why")
    ]
    found = json.loads("\n".join(cli("info", "--machine", "--json")[1]))
    assert found["dtype"] in ("float32", "bfloat16")
    assert cli("info")[0] == cli("info", "--machine", "x.png")[0] == 2


# ---- the program


def test_help_names_every_flag_and_sampler(cli: Cli) -> None:
    code, out, _ = cli("--help")
    assert code == 0
    assert any("generate" in line for line in out)
    _, out, _ = cli("generate", "--help")
    text = " ".join(" ".join(out).split())
    assert all(name in text for name in (*SAMPLERS, *OBJECTIVES))
    assert cli("--version") == (0, [f"minidiff {version('minidiff')}"], [])
    assert cli()[0] == 2


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["generate", "--nope"], ["generate"]])
def test_help_and_bad_flags_need_no_torch(argv: list[str]) -> None:
    code = f"""if True:
        import sys
        from minidiff.cli.main import main
        try:
            main({argv!r})
        finally:
            assert not {{"torch", "PIL", "numpy", "transformers"}} & set(sys.modules), list(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_wrong_value_waits_for_no_torch() -> None:
    code = "import sys; from minidiff.cli.main import main; main(['generate', 'a', '--steps=0']); "
    code += "print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def run_program(*argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minidiff", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_python_m_minidiff(tiny: tuple[object, ...], tmp_path: Path) -> None:
    made = run_program("generate", "a cat", *tiny, "--seed", 1)
    assert (made.returncode, made.stdout, made.stderr) == (0, f"{tmp_path / 'a-cat-seed-1.png'}\n", "")
    (tmp_path / "x.safetensors").write_bytes(bytes(4))
    broken = run_program("info", tmp_path / "x.safetensors")
    assert (broken.returncode, broken.stdout, broken.stderr.count("\n")) == (2, "", 1)
    assert broken.stderr.startswith("minidiff: error: ")


@pytest.mark.slow
def test_a_console_that_lacks_a_character_gets_its_escape(tmp_path: Path) -> None:
    path = ours(tmp_path / "x.png", prompt="a cat, 日本")
    command = [sys.executable, "-m", "minidiff", "info", str(path)]
    for encoding, expected in (
        ("ascii", r"a cat, \u65e5\u672c"),
        ("cp1252", r"a cat, \u65e5\u672c"),
        ("utf-8", "a cat, 日本"),
    ):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        found = subprocess.run(command, capture_output=True, env=environment, check=False)
        assert (found.returncode, found.stderr) == (0, b"")
        assert found.stdout.decode(encoding).splitlines()[0] == f"prompt: {expected}"


@pytest.mark.slow
def test_no_stdout_and_no_stderr_are_no_error(tmp_path: Path) -> None:
    path = ours(tmp_path / "x.png")
    for streams in (">&-", "2>&-", ">&- 2>&-"):
        command = ["sh", "-c", f"'{sys.executable}' -m minidiff info '{path}' {streams}"]
        found = subprocess.run(command, capture_output=True, check=False)
        assert (found.returncode, found.stderr) == (0, b""), streams


def test_an_interrupt_while_torch_is_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "minidiff", "generate", "a red circle"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "minidiff: interrupted\n")


def test_prompts_that_look_unquoted_are_pointed_out(cli: Cli, asked: Asked) -> None:
    _, _, err = cli("generate", "a", "red", "circle")
    assert err[0] == 'note: 3 prompts of one word each make 3 images; for one, write "a red circle"'


def test_interrupt(tiny: tuple[object, ...]) -> None:
    """Once its progress bar is there, in a terminal."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command = [sys.executable, "-m", "minidiff", "generate", "a cat", *map(str, tiny), "--steps", "900"]
    # A shell's background job ignores the signal, and its children would inherit that.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, preexec_fn=heed)
    os.close(theirs)
    seen = b""
    try:
        while b"/900" not in seen:
            seen += os.read(ours, 1000)
        running.send_signal(signal.SIGINT)
        while True:
            seen += os.read(ours, 1000)
    except OSError:  # raised when a terminal closes
        pass
    os.close(ours)
    assert running.communicate(timeout=60)[0] == b""
    assert running.returncode == 130
    assert seen.endswith(b"minidiff: interrupted\r\n")
    assert b"Traceback" not in seen


def test_a_reader_that_has_enough_gets_no_traceback(tiny_folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [
        sys.executable,
        "-m",
        "minidiff",
        "info",
        str(tiny_folder / "unet" / "diffusion_pytorch_model.safetensors"),
    ]
    closed = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (closed.returncode, closed.stderr) == (1, b"")


# ---- boxes and attention

BOX = "cat=0.1,0.1,0.6,0.7"


def test_boxes_and_attention_are_drawn_beside_the_image(cli: Cli, tiny: tuple[object, ...], tmp_path: Path) -> None:
    flags = ("--box", BOX, "--box", "dog=0.6,0,1,1", "--attention", "--seed", 3, *tiny)
    code, out, err = cli("generate", "a cat and a dog", *flags)
    names = ["", "-boxes", "-attention-cat", "-attention-dog"]
    assert (code, out) == (0, [str(tmp_path / f"a-cat-and-a-dog-seed-3{name}.png") for name in names])
    (note,) = err
    assert re.fullmatch(r"note: guidance (moved \d+ times in \d+ steps|did not act).*cat.*dog.*", note)
    assert all(Image.open(path).size in ((32, 32), (384, 384)) for path in out)


def test_an_image_is_kept_when_its_pictures_fail(
    cli: Cli, tiny: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(image: Image.Image, layout: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("minidiff.cli.pictures.boxes", fail)
    code, out, err = cli("generate", "a cat", "--box", BOX, *tiny)
    assert (code, len(out)) == (0, 1)
    assert Path(out[0]).is_file()
    assert any("disk full" in line for line in err)


def test_boxes_reach_generate_as_it_takes_them(cli: Cli, asked: Asked, tmp_path: Path) -> None:
    cli("generate", "a cat", "a cat", "--box", BOX, "--box", "cat=0.5,0.5,1,1", "--box", "tokens:1,2=0,0,1,1")
    one = {"cat": [[0.1, 0.1, 0.6, 0.7], [0.5, 0.5, 1, 1]], "tokens:1,2": [[0, 0, 1, 1]]}
    assert asked.request.boxes == one
    assert asked.request.attention is False and asked.request.guidance is None
    file = tmp_path / "layout.json"
    file.write_text(json.dumps([{"cat": [0, 0, 0.5, 0.5]}, None]))
    cli("generate", "a cat", "a dog", "--layout", file, "--guidance", "rnb", "--attention")
    assert asked.request.boxes == [{"cat": [0, 0, 0.5, 0.5]}, None]
    assert (asked.request.guidance, asked.request.attention) == ("rnb", True)
    file.write_text(json.dumps({"cat": {"boxes": [[0, 0, 0.5, 0.5]], "weight": 2}}))
    cli("generate", "a cat", "a cat", "--layout", file)
    assert asked.request.boxes == {"cat": {"boxes": [[0, 0, 0.5, 0.5]], "weight": 2}}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--box", "cat"], r'got \'cat\'; expected e.g. "ball=0.55,0.4,0.95,0.8"'),
        (["--box", "=0,0,1,1"], "got '=0,0,1,1'"),
        (["--box", "cat=0,0,1,x"], "expected numbers"),
        (["--box", "cat=0,0,1"], r"boxes\['cat'\] holds \[0.0, 0.0, 1.0\]; expected"),
        (["--box", "cat=0.5,0,0.2,1"], "corners out of order"),
        (["--box", "cat=0,0,20,1"], "outside the picture"),
        (["--box", BOX, "--layout", "there.json"], "got both --box and --layout"),
        (["--layout", "nowhere.json"], "cannot read the layout nowhere.json"),
        (["--layout", "broken.json"], r"cannot read the layout broken.json: Expecting .* line 1 column 2"),
        (["--layout", "two.json"], "two.json: boxes holds 2 layouts for 1 prompts"),
        (["--layout", "number.json"], "number.json: boxes is 3; expected a mapping"),
        (["--layout", "wide.json"], r"wide.json: boxes\['cat'\] holds .* outside the picture"),
        (["--layout", "twice.json"], "cannot read the layout twice.json: 'cat' appears twice"),
        (["--layout", "deep.json"], "cannot read the layout deep.json: maximum recursion depth"),
        (["--layout", "."], "cannot read the layout .: .*directory"),
        (["--guidance", "magic"], "(guidance|objective) is 'magic'; expected one of"),
    ],
)
def test_a_wrong_layout_is_found_before_a_model_is_loaded(
    cli: Cli, no_load: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = {
        "there": "{}",
        "broken": "{",
        "two": "[null, null]",
        "number": "3",
        "wide": '{"cat": [0, 0, 20, 1]}',
        "twice": '{"cat": [0, 0, 1, 1], "cat": [0, 0, 1, 1]}',
        "deep": "[" * 100_000,
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.json").write_text(text)
    code, out, err = cli("generate", "a cat", *flags)
    assert (code, out, len(err)) == (2, [], 1)
    assert re.search(message, err[0])


def test_a_phrase_that_is_not_in_the_prompt_is_found_before_sampling(cli: Cli, tiny: tuple[object, ...]) -> None:
    code, out, err = cli("generate", "a cat", "--box", "dog=0,0,1,1", *tiny)
    assert (code, out) == (2, [])
    assert "phrase 'dog' is not in the prompt 'a cat'" in err[-1]


def test_boxes_and_guidance_are_taken_over_from_a_png(
    cli: Cli, tiny: tuple[object, ...], asked: Asked, tmp_path: Path
) -> None:
    boxes = {"cat": {"boxes": [[0.1, 0.1, 0.6, 0.7]], "weight": 1.0}}
    guidance = {"objective": {"layout": 1.0}, "scale": 30.0, "steps": 10}
    png = ours(tmp_path / "x.png", boxes=boxes, guidance=guidance)
    cli("generate", "--from", png, "--model=m")
    assert (asked.request.boxes, asked.request.guidance) == (boxes, guidance)
    cli("generate", "--from", png, "--model=m", "--box", "cat=0,0,1,1", "--guidance", "none")
    assert (asked.request.boxes, asked.request.guidance) == ({"cat": [[0, 0, 1, 1]]}, "none")
    masked = {"cat": {"mask": {"tensor": {"shape": [4, 4], "dtype": "bool", "sha256": "0"}}, "weight": 1.0}}
    png = ours(tmp_path / "y.png", boxes=masked, guidance=guidance)
    _, _, err = cli("generate", "--from", png, "--model=m")
    assert "boxes" in next(line for line in err if "not taken" in line)
    assert (asked.request.boxes, asked.request.guidance) == (None, None)


def test_a_layout_may_begin_with_a_byte_order_mark(cli: Cli, asked: Asked, tmp_path: Path) -> None:
    file = tmp_path / "layout.json"
    file.write_text('{"cat": [0, 0, 0.5, 0.5]}', encoding="utf-8-sig")
    cli("generate", "a cat", "--layout", file)
    assert asked.request.boxes == {"cat": [0, 0, 0.5, 0.5]}


def test_a_layout_stands_instead_of_the_boxes_of_a_png(cli: Cli, asked: Asked, tmp_path: Path) -> None:
    png = ours(tmp_path / "x.png", boxes={"cat": {"boxes": [[0.1, 0.1, 0.6, 0.7]], "weight": 1.0}})
    file = tmp_path / "layout.json"
    file.write_text("{}")
    cli("generate", "a dog", "--from", png, "--layout", file, "--model=m")
    assert asked.request.boxes is None  # an empty layout is none


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"boxes": [1]}, r"x.png: boxes is 1; expected a mapping"),
        ({"boxes": {"cat": {"boxes": [[0, 0, 2, 1]]}}}, r"x.png: boxes\['cat'\] holds .* outside the picture"),
        ({"guidance": 3}, "x.png: guidance is 3"),
        ({"guidance": "magic"}, "x.png: (guidance|objective) is 'magic'; expected one of"),
        ({"guidance": {"objective": {"magic": 1.0}}}, "(guidance|objective) is 'magic'; expected one of"),
        ({"guidance": {"objective": {"layout": "x"}}}, "weight is 'x'"),
        ({"guidance": {"objective": {"layout": 1.0}, "scale": "x"}}, "scale is 'x'; expected a number"),
    ],
)
def test_a_png_whose_layout_makes_no_sense_is_refused_before_a_model_is_loaded(
    cli: Cli, no_load: None, tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    given = {"boxes": {"cat": [0, 0, 1, 1]}, **arguments}
    code, out, err = cli("generate", "--from", ours(tmp_path / "x.png", model="a/b", **given))
    assert (code, out, len(err)) == (2, [], 1)
    assert re.search(message, err[0])


def test_info_shows_the_layout_of_a_png(cli: Cli, tmp_path: Path) -> None:
    boxes = {"cat": {"weight": 1.0, "boxes": [[0.1, 0.1, 0.6, 0.7]]}}
    _, out, _ = cli("info", ours(tmp_path / "x.png", boxes=boxes, guidance={"objective": {"layout": 1.0}}))
    assert 'boxes: {"cat": {"weight": 1.0, "boxes": [[0.1, 0.1, 0.6, 0.7]]}}' in out
    assert 'guidance: {"objective": {"layout": 1.0}}' in out


def test_words_of_the_prompt_have_a_map_each_and_every_image_its_report(
    cli: Cli, tiny: tuple[object, ...], tmp_path: Path
) -> None:
    code, out, err = cli("generate", "A cat, a dog!", "--attention", "--seed", 3, *tiny)
    names = ["", "-attention-a", "-attention-cat", "-attention-dog"]
    assert (code, err) == (0, [])
    assert out == [str(tmp_path / f"a-cat-a-dog-seed-3{name}.png") for name in names]
    code, out, err = cli("generate", "a cat", "--box", BOX, "--images", 2, *tiny)
    assert (code, len(out), len(err)) == (0, 4, 2)
    assert all(line.startswith("note: guidance ") for line in err)


def test_a_guided_image_is_made_again_from_its_png(cli: Cli, tiny: tuple[object, ...], tmp_path: Path) -> None:
    flags = ("--box", BOX, "--seed", 3, *tiny)
    _, out, _ = cli("generate", "a cat", *flags)
    _, again, _ = cli("generate", "--from", out[0], *tiny)
    assert np.array_equal(np.asarray(Image.open(out[0])), np.asarray(Image.open(again[0])))
    assert read_metadata(out[0]).reproducible


def test_recorded_attention_is_an_argument_in_half_precision(cli: Cli, tiny: tuple[object, ...]) -> None:
    """There recorded layers round differently from the fused kernel, so the image differs."""
    flags = ("--box", BOX, "--seed", 3, "--attention", *tiny)
    _, half, _ = cli("generate", "a cat", *flags, "--dtype", "bfloat16")
    _, full, _ = cli("generate", "a cat", *flags)
    assert read_metadata(half[0]).arguments["attention"] is True
    assert "attention" not in read_metadata(full[0]).arguments
    _, again, _ = cli("generate", "--from", half[0], *tiny, "--dtype", "bfloat16")
    assert np.array_equal(np.asarray(Image.open(half[0])), np.asarray(Image.open(again[0])))
    assert len(again) == len(half)
