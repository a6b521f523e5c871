"""Result: its pixels, and files that never overwrite and never lose an image."""

from __future__ import annotations

import errno
import io
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from minidiff.png.chunk import Plain
from minidiff.png.read import read_parameters
from minidiff.png.write import check_output_path
from minidiff.result import Images, Result, to_numpy, to_pil

ARGUMENTS: dict[str, Plain] = {"prompt": "a red circle", "steps": 20, "guidance_scale": 7.5, "seed": 42}


def result(count: int = 1, output: str = "pil", **changes: Plain) -> Result:
    tensor = torch.linspace(0, 1, count * 3 * 8 * 16).reshape(count, 3, 8, 16)
    latents = torch.zeros(count, 4, 1, 2)
    images: dict[str, Images] = {"pil": to_pil(tensor), "numpy": to_numpy(tensor), "tensor": tensor, "latents": latents}
    parameters: tuple[dict[str, Plain], ...] = tuple({**ARGUMENTS, "seed": 42 + i, **changes} for i in range(count))
    return Result(images[output], latents, tuple(range(42, 42 + count)), parameters, {"sampling": 0.5})


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current, home and temporary folders, all inside tmp_path."""
    for name in ("current", "home", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "current")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path


@pytest.fixture
def unwritable(tmp_path: Path) -> Path:
    """A folder that even root cannot create: its parent is a file."""
    (tmp_path / "file").write_bytes(b"")
    return tmp_path / "file" / "out"


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- the value


def test_result_is_frozen_short_in_print_and_counted() -> None:
    made = result(2)
    assert repr(made) == "<Result: 2 images of 16x8, seeds (42, 43), 0.5 s>"
    flagged = replace(result(1, "latents"), flagged=(True,))
    assert repr(flagged) == "<Result: 1 latent of 2x1, seeds (42,), 0.5 s, 1 flagged>"
    with pytest.raises(FrozenInstanceError):
        made.seeds = ()  # type: ignore[misc]
    with pytest.raises(ValueError, match="2 images, 2 latents, 1 seeds and 2 parameters"):
        Result(made.images, made.latents, (1,), made.parameters, {})


def test_a_result_has_a_length_and_its_images_are_results() -> None:
    made = result(3)
    assert len(made) == 3 and [one.seeds for one in made] == [(42,), (43,), (44,)]
    assert isinstance(made.images, list) and made[1].image is made.images[1]
    assert made[-1].parameters == made.parameters[2:] and made[-1].latents.shape == (1, 4, 1, 2)
    for bad in (3, -4):
        with pytest.raises(IndexError, match=f"index {bad} of a Result of 3 images"):
            made[bad]
    with pytest.raises(ValueError, match="holds 3 images; expected one: use result"):
        _ = made.image


@pytest.mark.parametrize("output", ["pil", "numpy", "tensor"])
def test_one_image_whatever_the_output(output: str) -> None:
    assert np.array_equal(np.asarray(result(output=output).image), np.asarray(result().image))


def test_a_png_in_memory_is_the_file(tmp_path: Path) -> None:
    made = result(2)
    files = [path.read_bytes() for path in made.save(tmp_path / "x.png")]
    assert [made.png_bytes(i) for i in (0, 1)] == files
    buffer = io.BytesIO()
    assert made[1].save(buffer) == [] and buffer.getvalue() == files[1]
    with pytest.raises(ValueError, match="holds 2 images; expected one"):
        made.save(io.BytesIO())
    assert b"minidiff" not in made.png_bytes(0, metadata=False)


def test_names_from_a_pattern(tmp_path: Path) -> None:
    result(11).save(tmp_path / "names" / "{index}-{seed}.png")
    assert files(tmp_path / "names") == [f"{i:02}-{42 + i}.png" for i in range(11)]
    (tmp_path / "{old}").mkdir()
    assert result().save(tmp_path / "{old}")[0].parent.name == "{old}"
    for wrong in ("{sed}.png", "{.png", "{seed!r}.png", "{}/a.png", "a}.png"):
        with pytest.raises(ValueError, match=r"expected some of \{index\}, \{seed\}, \{prompt\}, and \{\{ or"):
            result().save(tmp_path / "new" / wrong)
    assert not (tmp_path / "new").exists()


def test_a_result_is_json_without_its_pixels() -> None:
    values = json.loads(json.dumps(result(2).plain()))
    assert values["images"][1] == {"seed": 43, "parameters": {**ARGUMENTS, "seed": 43}, "report": None}
    assert values["timings"] == {"sampling": 0.5} and values["info"] == {}


def test_a_notebook_shows_the_images() -> None:
    def shown(made: Result) -> tuple[int, int]:
        return Image.open(io.BytesIO(made._repr_png_() or b"")).size

    assert shown(result()) == (16, 8) and shown(result(2))[0] > 32
    assert result(output="latents")._repr_png_() is None


# ---- pixels


def test_pixels_are_rounded_as_diffusers_rounds() -> None:
    numpy_to_pil = pytest.importorskip("diffusers.image_processor").VaeImageProcessor.numpy_to_pil
    halves = (torch.arange(256) + 0.5) / 255  # halfway between two values, where rounding rules differ
    tensor = torch.cat([halves, torch.linspace(0, 1, 512)]).clamp(0, 1).reshape(1, 3, 16, 16)
    expected = numpy_to_pil(tensor.permute(0, 2, 3, 1).float().numpy())
    assert np.array_equal(np.asarray(to_pil(tensor)[0]), np.asarray(expected[0]))
    assert to_numpy(tensor.to(torch.bfloat16)).dtype == np.float32
    assert to_numpy(tensor.requires_grad_()).shape == (1, 16, 16, 3)
    assert to_numpy(tensor)[0, 2, 3, 1] == tensor[0, 1, 2, 3]


def test_values_out_of_range_are_clipped_and_shapes_checked() -> None:
    pixels = np.asarray(to_pil(torch.tensor([-0.2, 1.2]).repeat(1, 3, 1, 1))[0])
    assert pixels[0, 0].tolist() == [0, 0, 0] and pixels[0, 1].tolist() == [255, 255, 255]
    with pytest.raises(ValueError, match=r"expected images \[B,3,H,W\], got a tensor of shape \[3, 8, 8\]"):
        to_pil(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"got a tensor of shape \[1, 4, 8, 8\]"):
        to_numpy(torch.zeros(1, 4, 8, 8))


# ---- saving


@pytest.mark.parametrize("output", ["pil", "numpy", "tensor"])
def test_every_output_saves_the_same_pixels(output: str, tmp_path: Path, quiet: None) -> None:
    (path,) = result(output=output).save(tmp_path / "image.png")
    expected = result().images
    assert isinstance(expected, list) and path == tmp_path / "image.png"
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(expected[0]))


@pytest.mark.parametrize("latents", [torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8)])
def test_latents_are_not_saved_as_an_image(latents: Tensor, tmp_path: Path) -> None:
    made = Result(latents, latents, (1,), (ARGUMENTS,), {})
    with pytest.raises(ValueError, match=r"holds latents \[1, ., 8, 8\].*output='pil', 'numpy' or 'tensor'"):
        made.save(tmp_path / "new" / "image.png")
    assert not (tmp_path / "new").exists()


def test_a_folder_is_made_and_names_come_from_prompt_and_seed(tmp_path: Path, quiet: None) -> None:
    paths = result(2).save(tmp_path / "a" / "b.v1")
    assert paths == [tmp_path / "a" / "b.v1" / f"a-red-circle-seed-{seed}.png" for seed in (42, 43)]
    assert all(path.is_file() for path in paths)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("", "image-seed-42.png"),
        (None, "image-seed-42.png"),
        ("日本語", "image-seed-42.png"),
        ("../../etc/passwd\0", "etc-passwd-seed-42.png"),
        ("Ünïcode, CAFÉ!", "unicode-cafe-seed-42.png"),
        ("one two " * 50, "one-two-" * 7 + "one-seed-42.png"),
        ("x" * 500, "x" * 60 + "-seed-42.png"),
    ],
)
def test_names_are_safe_for_any_prompt(prompt: Plain, name: str, tmp_path: Path, quiet: None) -> None:
    assert result(prompt=prompt).save(tmp_path / "out") == [tmp_path / "out" / name]


def test_without_a_seed_the_name_is_the_prompt(tmp_path: Path) -> None:
    made = result()
    seedless = Result(made.images, made.latents, (None,), made.parameters, {})
    assert seedless.save(tmp_path / "out")[0].name == "a-red-circle.png"


def test_nothing_is_overwritten(tmp_path: Path, quiet: None) -> None:
    (tmp_path / "cat.png").write_bytes(b"mine")
    (tmp_path / "cat-1.png").mkdir()
    (tmp_path / "cat-2.png").symlink_to(tmp_path / "nowhere")
    paths = result(2).save(str(tmp_path / "cat.png")) + result().save(tmp_path / "cat.png")
    assert [path.name for path in paths] == ["cat-3.png", "cat-4.png", "cat-5.png"]
    assert (tmp_path / "cat.png").read_bytes() == b"mine"
    assert not (tmp_path / "nowhere").exists()
    assert [path.name for path in result(3).save(tmp_path / "DOG.PNG")] == ["DOG.PNG", "DOG-1.PNG", "DOG-2.PNG"]


def test_an_existing_folder_is_a_folder_whatever_its_name(tmp_path: Path) -> None:
    for name in ("folder.png", "folder.jpg"):
        (tmp_path / name).mkdir()
        assert result().save(tmp_path / name) == [tmp_path / name / "a-red-circle-seed-42.png"]


def test_a_file_that_appears_at_the_last_moment_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def racing(self: Path, mode: str = "r") -> object:
        if self.name == "cat.png" and not self.exists():
            with real(self, "wb") as file:
                file.write(b"theirs")
        return real(self, mode)

    monkeypatch.setattr(Path, "open", racing)
    assert result().save(tmp_path / "cat.png") == [tmp_path / "cat-1.png"]
    monkeypatch.undo()
    assert (tmp_path / "cat.png").read_bytes() == b"theirs"


def test_writers_at_the_same_time_share_no_name(tmp_path: Path) -> None:
    def save(index: int) -> list[Path]:
        return result(4, prompt=f"number {index}").save(tmp_path / "out" / "same.png")

    with ThreadPoolExecutor(8) as pool:
        paths = [path for written in pool.map(save, range(16)) for path in written]
    assert len(set(paths)) == 64 == len(files(tmp_path / "out"))
    prompts = sorted(str(read_parameters(path)["prompt"]) for path in paths)
    assert prompts == sorted(f"number {index}" for index in range(16) for _ in range(4))


def test_other_formats_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for name in ("image.jpg", "image.WEBP", Path("image.jpeg")):
        with pytest.raises(ValueError, match=r"only .png .*result.images\[0\].save\('image"):
            check_output_path(name)
        with pytest.raises(ValueError, match=r"only .png"):
            result().save(tmp_path / name)
    assert files(tmp_path / "current") == []
    for good in ("image.png", "IMAGE.PNG", "folder", "folder.v2", "", Path("x")):
        check_output_path(good)
    with pytest.raises(ValueError, match="path is 3; expected a str or a Path"):
        check_output_path(3)  # type: ignore[arg-type]


# ---- failed writes


def test_an_unwritable_folder_sends_the_image_to_the_current_one(tmp_path: Path, unwritable: Path) -> None:
    with pytest.warns(UserWarning, match=r"file/out/Cat.png .*; the image is in .*current/cat.png") as caught:
        paths = result().save(unwritable / "Cat.png")
    assert paths == [tmp_path / "current" / "cat.png"]
    assert read_parameters(paths[0]) == ARGUMENTS
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="could not write"):
        assert result().save(unwritable) == [tmp_path / "current" / "a-red-circle-seed-42.png"]


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"mine")
    with pytest.warns(UserWarning, match="could not write"):
        assert result().save(tmp_path / "out")[0].parent == tmp_path / "current"
    assert (tmp_path / "out").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["n" * 300 + ".png", "a\0b.png", "\udc80\ud800.png"])
def test_a_name_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="could not write"):
        (path,) = result().save(tmp_path / name)
    assert path.parent == tmp_path / "current" and path.is_file()


def test_home_then_the_temporary_folder(tmp_path: Path, unwritable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> Path:
        raise FileNotFoundError("the current folder was deleted")

    monkeypatch.setattr(Path, "cwd", gone)
    with pytest.warns(UserWarning, match="home"):
        assert result().save(unwritable) == [tmp_path / "home" / "a-red-circle-seed-42.png"]
    monkeypatch.setenv("HOME", str(unwritable))
    with pytest.warns(UserWarning, match="temporary"):
        assert result().save(unwritable) == [tmp_path / "temporary" / "a-red-circle-seed-42.png"]
    monkeypatch.setattr(tempfile, "tempdir", str(unwritable))
    made = result()
    with pytest.raises(
        OSError, match=r"nor a-red-circle-seed-42.png in the current, home or temporary .*still in the Result"
    ):
        made.save(unwritable)
    assert isinstance(made.images, list) and made.images[0].size == (16, 8)


class FullDisk(io.FileIO):
    """A file on a disk that is full after ten bytes."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        super().write(data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def full(self: Path, mode: str = "r") -> object:
        return FullDisk(self, mode) if self.parent.name == "out" else real(self, mode)

    monkeypatch.setattr(Path, "open", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        paths = result(2).save(tmp_path / "out")
    assert files(tmp_path / "out") == []
    assert [path.parent for path in paths] == [tmp_path / "current"] * 2
    assert [read_parameters(path)["seed"] for path in paths] == [42, 43]
