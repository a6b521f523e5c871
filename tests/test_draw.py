"""Contact sheets."""

import numpy as np
import pytest
from PIL import Image

from minidiff.draw import sheet


def images(count: int, size: tuple[int, int] = (40, 30)) -> list[Image.Image]:
    return [Image.new("RGB", size, (i * 20, 0, 255 - i * 20)) for i in range(count)]


def test_a_sheet_holds_every_image_once_and_whole() -> None:
    made = np.asarray(sheet(images(5), columns=2))
    for i in range(5):
        assert (made == (i * 20, 0, 255 - i * 20)).all(axis=2).sum() == 40 * 30


def test_captions_stand_below_and_long_ones_are_broken() -> None:
    plain, short, long = (sheet(images(2), captions) for captions in ((), ("a", "b"), ("one two three four", "b")))
    assert plain.width == short.width == long.width
    assert plain.height < short.height < long.height
    below = np.asarray(short)[6 + 30 :, :]
    assert (below < 128).any()
    assert not (np.asarray(plain)[6 + 30 :, :] < 128).any()


def test_a_sheet_of_one_row_is_no_wider_than_its_images() -> None:
    assert sheet(images(1), columns=4).width < 2 * 40


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        sheet([])
    with pytest.raises(ValueError, match=r"sizes \[\(40, 30\), \(41, 30\)\]"):
        sheet([*images(1), *images(1, (41, 30))])
    with pytest.raises(ValueError, match="got 1 captions for 2 images"):
        sheet(images(2), ("a",))
