"""Contact sheets, boxes and heat maps."""

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.draw import boxes, heatmap, heatmaps, sheet


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
    mask = np.zeros((8, 8), dtype=bool)
    mask[2:6, 2:6] = True
    for value in (mask, Image.fromarray(mask), {"mask": mask}):
        drawn = np.asarray(boxes(Image.new("RGB", (400, 400), "white"), {"cat": value}, labels=False))
        found = (drawn == RED).all(axis=2)
        assert found[100, 150] and found[299, 150] and not found[200, 200] and not found[50, 50]


def test_a_mask_of_any_kind_is_drawn_alike() -> None:
    mask = torch.zeros(5, 5)
    mask[1:3, 1:3] = 1
    image = Image.new("RGB", (401, 399), "white")
    first, *others = (
        np.asarray(boxes(image, {"cat": value}))
        for value in (mask, mask.bfloat16(), mask.bool(), mask.clone().requires_grad_(), mask.byte() * 255)
    )
    assert all(np.array_equal(first, other) for other in others)


def test_a_line_is_seen_on_its_own_colour_and_one_pixel_wide_it_stands_alone() -> None:
    image = Image.new("RGB", (400, 400), tuple(RED))
    drawn = np.asarray(boxes(image, {"cat": (0.25, 0.5, 0.75, 0.9)}, labels=False))
    assert (drawn[300, 99] == 255).all() and (drawn[300, 100] == RED).all() and (drawn[300, 300] == 255).all()
    small = np.asarray(boxes(Image.new("RGB", (128, 128)), {"cat": (0.25, 0.5, 0.75, 0.9)}, labels=False))
    assert set(map(tuple, small.reshape(-1, 3).tolist())) == {(0, 0, 0), tuple(RED.tolist())}


def test_every_box_has_a_pixel_and_edges_are_inside() -> None:
    image = Image.new("RGB", (101, 67), "white")
    for box in ((0.5, 0.5, 0.5001, 0.5001), (0.999, 0.999, 1, 1), (0, 0, 1e-6, 1e-6)):
        assert (np.asarray(boxes(image, {"cat": box}, labels=False)) == RED).all(axis=2).any()
    drawn = (np.asarray(boxes(image, {"cat": (0, 0, 1, 1)}, labels=False)) == RED).all(axis=2)
    assert drawn[0].all() and drawn[-1].all() and drawn[:, 0].all() and drawn[:, -1].all()


def test_labels_at_one_corner_do_not_cover_each_other() -> None:
    image = Image.new("RGB", (400, 400), "white")
    box = (0.1, 0.1, 0.9, 0.9)
    alone, both = boxes(image, {"cat": box}), boxes(image, {"cat": box, "dog": box})
    label = (slice(40, 55), slice(40, 60))
    assert np.array_equal(np.asarray(alone)[label], np.asarray(both)[label])
    blue = (np.asarray(both) == (42, 111, 240)).all(axis=2)
    assert blue[55:80, 40:65].sum() > 150


def test_a_label_wider_than_the_picture_is_cut() -> None:
    image = Image.new("RGB", (400, 400), "white")
    drawn = np.asarray(boxes(image, {"word " * 60: (0.4, 0.4, 0.5, 0.5)}))
    rows = (drawn == RED).all(axis=2).sum(axis=1)
    assert 350 < rows.max() < 400  # with its margin, so its end is there
    assert drawn.shape == (400, 400, 3)


def test_token_positions_have_a_name() -> None:
    image, box = Image.new("RGB", (400, 400), "white"), (0.1, 0.1, 0.9, 0.9)
    for key, name in (((2, 3), "tokens:2,3"), (4, "tokens:4"), ((4,), "tokens:4")):
        assert np.array_equal(np.asarray(boxes(image, {key: box})), np.asarray(boxes(image, {name: box})))


@pytest.mark.parametrize(
    "value",
    [
        (0, 0, 1),
        "left",
        [],
        [(0, 0, 1, 1), 3],
        ("a", 0, 1, 1),
        (0.5, 0, 0.2, 1),
        (0, 0, 20, 1),
        (0, 0, 1, float("nan")),
        {"weight": 2.0},
        np.full((3, 3), np.nan),
        -np.ones((3, 3)),
        np.ones((3, 3, 3)),
        np.array([["a"]]),
    ],
)
def test_what_is_neither_box_nor_mask_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"'cat'.* expected "):
        boxes(Image.new("RGB", (400, 400)), {"cat": value})


def test_a_layout_is_read_as_generate_reads_it() -> None:
    image, box = Image.new("RGB", (400, 400)), (0.1, 0.1, 0.9, 0.9)
    expected = np.asarray(boxes(image, {"cat": box}))
    for value in (np.array(box), torch.tensor([box], dtype=torch.float64), {"boxes": [np.array(box)]}):
        assert np.array_equal(np.asarray(boxes(image, {"cat": value, "dog": None})), expected)


def test_what_is_no_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="boxes is .* expected a mapping"):
        boxes(Image.new("RGB", (400, 400)), [(0, 0, 1, 1)])  # type: ignore[arg-type]


# ---- heat maps


def test_a_heat_map_is_brightest_where_the_map_is() -> None:
    heat = torch.zeros(8, 4)
    heat[6, 1] = 0.003  # scaled to its own maximum
    drawn = heatmap(Image.new("RGB", (401, 801), (90, 90, 90)), heat)
    assert drawn.size == (401, 801)
    brightness = np.asarray(drawn, dtype=float).sum(axis=2)[:-40]  # without the bar
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
    assert np.ptp(np.asarray(plain)[:-40], axis=(0, 1)).max() == 0
    assert (np.asarray(plain) != np.asarray(named)).any(axis=2)[:30, :80].any()


def test_a_map_of_any_dtype_and_range_is_drawn_alike() -> None:
    image, heat = Image.new("RGB", (385, 401), "white"), torch.tensor([[0, 1], [2, 4]])
    first, *others = (
        np.asarray(heatmap(image, value))[:-40]  # without the colour bar
        for value in (heat, heat.bfloat16() / 1024, heat.double().requires_grad_() * 1e6, heat.numpy(), heat.tolist())
    )
    assert first.shape == (361, 385, 3)
    assert all(np.array_equal(first, other) for other in others)


def test_maps_on_one_scale_can_be_compared() -> None:
    image = Image.new("RGB", (400, 400), "grey")
    bright, half, dim = (np.full((2, 2), value) for value in (0.8, 0.4, 0.01))
    alone = [np.asarray(heatmap(image, heat))[200, 200] for heat in (bright, half)]
    together = [np.asarray(heatmap(image, heat, vmax=0.8), dtype=int)[200, 200].sum() for heat in (bright, half, dim)]
    assert np.array_equal(*alone) and together[0] > together[1] > together[2]
    assert np.array_equal(heatmap(image, 2 * bright, vmax=0.8), heatmap(image, bright, vmax=0.8))  # clipped at vmax
    assert not np.array_equal(heatmap(image, bright), heatmap(image, 10 * bright))  # the bar shows it
    drawn = heatmaps(image, {"a": bright, "b": half})
    tiles = [heatmap(image, heat, name, 0.8) for name, heat in (("a", bright), ("b", half))]
    assert np.array_equal(drawn, sheet(tiles))
    with pytest.raises(ValueError, match="vmax is 0; expected a number above 0"):
        heatmap(image, bright, vmax=0)


@pytest.mark.parametrize("kind", ["array", "float array", "tensor", "float tensor", "bfloat16"])
def test_pictures_may_be_arrays_and_tensors(kind: str) -> None:
    pixels = np.arange(400 * 390 * 3, dtype=np.uint8).reshape(400, 390, 3)
    tensor = torch.tensor(pixels).permute(2, 0, 1)
    half = np.where(pixels > 127, 255, 0).astype(np.uint8)  # which bfloat16 holds exactly
    forms = {
        "array": pixels,
        "float array": pixels / 255,
        "tensor": tensor,
        "float tensor": (tensor / 255).requires_grad_(),
        "bfloat16": torch.tensor(half / 255).permute(2, 0, 1).bfloat16(),
    }
    image = Image.fromarray(half if kind == "bfloat16" else pixels)
    layout, heat = {"cat": (0.1, 0.1, 0.9, 0.9)}, np.eye(3)
    assert np.array_equal(boxes(forms[kind], layout), boxes(image, layout))
    assert np.array_equal(heatmap(forms[kind], heat), heatmap(image, heat))
    assert np.array_equal(sheet([forms[kind]] * 2), sheet([image] * 2))


@pytest.mark.parametrize(
    "picture",
    [np.zeros((1, 8, 8, 3)), torch.zeros(4, 8, 8), np.zeros((8, 8)), "x.png", None, [1], np.full((8, 8, 3), 255.0)],
)
def test_what_is_no_picture_is_refused(picture: object) -> None:
    with pytest.raises(ValueError, match="the picture is .* expected one PIL image, array"):
        boxes(picture, {})  # type: ignore[arg-type]


def test_captions_grow_with_their_pictures() -> None:
    def letters(edge: int) -> int:
        below = np.asarray(sheet(images(1, (edge, edge)), ["H"]).convert("L"))[edge + 7 :]
        return int((below < 128).any(axis=1).sum())

    assert letters(1024) > 2 * letters(384) >= 2 * letters(64) > 10


def test_a_long_narrow_picture_is_not_enlarged_without_end() -> None:
    assert heatmap(Image.new("RGB", (8, 2048)), np.ones((2, 2))).size == (16, 4096)
    assert heatmap(Image.new("RGB", (5000, 100)), np.ones((2, 2))).size == (5000, 100)


@pytest.mark.parametrize(
    "heat",
    [
        np.ones((2, 2, 2)),
        np.ones((0, 3)),
        -np.ones((2, 2)),
        np.full((2, 2), np.nan),
        np.full((2, 2), np.inf),
        np.ones((2, 2), dtype=complex),
        "heat",
    ],
)
def test_a_map_of_another_kind_is_refused(heat: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"heat has shape .* expected \[h,w\]"):
        heatmap(Image.new("RGB", (400, 400)), heat)
