"""Contact sheets, boxes and heat maps."""

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.draw import boxes, heatmap, sheet


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


# ---- boxes


RED = np.array((230, 25, 75))  # the first object's


def test_a_box_is_drawn_where_it_is_and_the_image_stays_as_it_was() -> None:
    image = Image.new("RGB", (400, 600), "white")
    drawn = np.asarray(boxes(image, {"cat": (0.25, 0.5, 0.75, 0.9)}))
    assert drawn.shape == (600, 400, 3)
    rows, columns = np.where((drawn == RED).all(axis=2))
    assert (columns.min(), columns.max()) == (100, 299)
    assert (rows.min(), rows.max()) == (300, 539)
    assert (drawn[450, 150:250] == 255).all()  # the inside is left
    assert (np.asarray(image) == 255).all()


def test_every_object_has_a_colour_and_a_label_and_a_phrase_may_have_several_boxes() -> None:
    image = Image.new("RGB", (400, 400), "white")
    layout = {
        "cat": [(0.1, 0.1, 0.3, 0.3), (0.6, 0.1, 0.9, 0.3)],
        "dog": {"boxes": (0.1, 0.6, 0.9, 0.9), "weight": 2.0},
    }
    drawn, bare = (np.asarray(boxes(image, layout, labels)) for labels in (True, False))
    for x, y in ((40, 100), (240, 100), (40, 300)):
        assert (bare[y, x] != 255).any()
    assert (bare[100, 40] == RED).all() and (bare[100, 240] == RED).all() and (bare[300, 40] != RED).any()
    labels = (drawn != bare).any(axis=2)
    assert labels[40:60, 40:80].any() and labels[40:60, 240:280].any() and labels[240:260, 40:80].any()


def test_a_label_stays_inside_of_the_picture() -> None:
    drawn = boxes(Image.new("RGB", (400, 400), "white"), {"a very long phrase": (0.9, 0.97, 1.0, 1.0)})
    written = (np.asarray(drawn) == RED).all(axis=2)
    assert written[-14:, 250:].sum() > 500


def test_small_images_are_enlarged_for_their_labels() -> None:
    assert boxes(Image.new("RGB", (128, 64)), {"cat": (0, 0, 1, 1)}).size == (768, 384)
    assert boxes(Image.new("RGB", (128, 64)), {"cat": (0, 0, 1, 1)}, labels=False).size == (128, 64)


def test_a_mask_is_drawn_by_its_outline() -> None:
    mask = np.zeros((4, 4), dtype=bool)
    mask[1:3, 1:3] = True
    for value in (mask, Image.fromarray(mask), {"mask": mask}):
        drawn = np.asarray(boxes(Image.new("RGB", (400, 400), "white"), {"cat": value}, labels=False))
        found = (drawn == RED).all(axis=2)
        assert found[100, 150] and found[299, 150] and not found[200, 200] and not found[50, 50]


@pytest.mark.parametrize("value", [(0, 0, 1), "left", np.zeros((3, 3)), None, []])
def test_what_is_neither_box_nor_mask_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="expected .x0, y0, x1, y1., a list of them or a mask"):
        boxes(Image.new("RGB", (400, 400)), {"cat": value})


# ---- heat maps


def test_a_heat_map_is_brightest_where_the_map_is() -> None:
    heat = torch.zeros(8, 4)
    heat[6, 1] = 0.003  # its own largest value counts
    drawn = heatmap(Image.new("RGB", (401, 801), (90, 90, 90)), heat)
    assert drawn.size == (401, 801)
    brightness = np.asarray(drawn, dtype=float).sum(axis=2)
    row, column = np.unravel_index(brightness.argmax(), brightness.shape)
    assert abs(row - 801 * 6.5 / 8) < 20 and abs(column - 401 * 1.5 / 4) < 20
    assert np.ptp(brightness[:300]) == 0  # nothing there


def test_the_image_can_be_seen_beneath() -> None:
    image = Image.new("RGB", (400, 400), "white")
    image.paste("black", (0, 0, 200, 400))
    drawn = np.asarray(heatmap(image, np.ones((2, 2))), dtype=int)
    assert (drawn[200, 300] - drawn[200, 100]).sum() > 60


def test_a_caption_is_written_and_a_map_of_zeros_is_drawn() -> None:
    image = Image.new("RGB", (400, 400), "white")
    plain, named = heatmap(image, np.zeros((2, 2))), heatmap(image, np.zeros((2, 2)), "ball")
    assert np.ptp(np.asarray(plain), axis=(0, 1)).max() == 0
    assert (np.asarray(plain) != np.asarray(named)).any(axis=2)[:30, :80].any()


@pytest.mark.parametrize("heat", [np.ones((2, 2, 2)), np.ones((0, 3)), -np.ones((2, 2)), np.full((2, 2), np.nan)])
def test_a_map_of_another_kind_is_refused(heat: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"heat has shape .* expected \[h,w\]"):
        heatmap(Image.new("RGB", (400, 400)), heat)
