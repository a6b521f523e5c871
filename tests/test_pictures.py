"""The pictures beside an image: which are written, where, and what happens on failure."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minidiff
import minidiff.cli.pictures
import minidiff.draw
from minidiff.cli.pictures import write_pictures

PROMPT = "a cat playing with a ball"
LAYOUT = {"ball": (0.5, 0.5, 1.0, 1.0)}


def made(model: minidiff.Model, attention: bool = True) -> minidiff.Result:
    return minidiff.generate(
        [PROMPT, "two dogs"],
        model=model,
        boxes=[LAYOUT, None],
        steps=1,
        sampler="ddim",
        spacing="trailing",
        seed=1,
        attention=attention,
    )


def test_each_image_has_its_boxes_and_the_maps_of_its_phrases_or_words(
    tiny_model: minidiff.Model, tmp_path: Path
) -> None:
    result = made(tiny_model)
    written = write_pictures(result, result.save(tmp_path / "x.png"), [LAYOUT, {}])
    names = ["x-boxes", "x-attention-ball", "x-1-attention-two", "x-1-attention-dogs"]
    assert [path.name for path in written] == [f"{name}.png" for name in names]
    pictures = [np.asarray(Image.open(path)) for path in written]
    assert all(picture.shape == (384, 384, 3) for picture in pictures)
    assert not np.array_equal(pictures[2], pictures[3])


def test_the_maps_of_an_image_share_a_scale(tiny_model: minidiff.Model, tmp_path: Path) -> None:
    result = made(tiny_model)
    *_, two, dogs = write_pictures(result, result.save(tmp_path / "x.png"), [LAYOUT, {}])
    assert result.attention is not None and isinstance(result.images, list)
    maps = {word: result.attention.of(1, word) for word in ("two", "dogs")}
    top = max(float(heat.max()) for heat in maps.values())
    for path, (word, heat) in zip((two, dogs), maps.items(), strict=True):
        assert np.array_equal(Image.open(path), minidiff.draw.heatmap(result.images[1], heat, word, top))


def test_an_image_of_a_result_keeps_its_maps_and_a_result_can_be_pickled(tiny_model: minidiff.Model) -> None:
    result = made(tiny_model)
    for whole in (result, pickle.loads(pickle.dumps(result))):
        one = whole[1]
        assert one.attention is not None and result.attention is not None
        assert torch.equal(one.attention["dogs"][0], result.attention.of(1, "dogs"))
        assert len(one.attention["dogs"]) == len(one) == 1


def test_without_attention_there_are_boxes_alone(tiny_model: minidiff.Model, tmp_path: Path) -> None:
    result = made(tiny_model, attention=False)
    (written,) = write_pictures(result, result.save(tmp_path / "x.png"), [LAYOUT, {}])
    assert written.name == "x-boxes.png"


def test_nothing_is_overwritten(tiny_model: minidiff.Model, tmp_path: Path) -> None:
    (tmp_path / "x-boxes.png").write_text("mine")
    result = made(tiny_model, attention=False)
    (written,) = write_pictures(result, result.save(tmp_path / "x.png"), [LAYOUT, {}])
    assert written.name == "x-boxes-1.png"
    assert (tmp_path / "x-boxes.png").read_text() == "mine"


def test_token_positions_have_a_map_too(tiny_model: minidiff.Model, tmp_path: Path) -> None:
    layout = {"cat": (0.0, 0.0, 0.5, 0.5), "tokens:2": (0.5, 0.5, 1.0, 1.0)}
    result = minidiff.generate(
        "a cat", model=tiny_model, boxes=layout, steps=1, sampler="ddim", spacing="trailing", seed=1, attention=True
    )
    _, word, position = write_pictures(result, result.save(tmp_path / "x.png"), [layout])
    assert (word.name, position.name) == ("x-attention-cat.png", "x-attention-tokens-2.png")
    below = (slice(40, None), slice(None))  # the caption
    assert tiny_model.text.spans("a cat", "cat") == (2,)
    assert np.array_equal(np.asarray(Image.open(word))[below], np.asarray(Image.open(position))[below])


def test_pictures_go_elsewhere_with_their_image(
    tiny_model: minidiff.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    result = made(tiny_model, attention=False)
    with pytest.warns(UserWarning, match=r"could not write file/x-boxes.png .* the image is in .*x-boxes.png"):
        (written,) = write_pictures(result, [Path("file/x.png"), Path("file/y.png")], [LAYOUT, {}])
    assert written == tmp_path / "x-boxes.png"


@pytest.mark.parametrize(
    "error", [OSError("disk full"), ValueError("no font"), RuntimeError("no home"), TypeError("odd"), MemoryError("x")]
)
def test_a_picture_that_fails_is_a_warning_and_the_others_are_written(
    error: Exception, tiny_model: minidiff.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(image: Image.Image, layout: object) -> None:
        raise error

    result = made(tiny_model)
    files = result.save(tmp_path / "x.png")
    monkeypatch.setattr(minidiff.cli.pictures, "boxes", fail)
    with pytest.warns(UserWarning, match=rf"x.png was written, but not its picture boxes: {error}"):
        written = write_pictures(result, files, [LAYOUT, {}])
    assert written[0].name == "x-attention-ball.png"
    assert all(path.is_file() for path in files)
