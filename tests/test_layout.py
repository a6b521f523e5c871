"""Boxes and masks cover cells exactly, and errors name what is wrong."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import minidiff
from minidiff.guidance.layout import Box, Layout, PlacedObject, box_coverage, make_layout, plain_boxes, read_objects
from minidiff.model import Model
from minidiff.networks.attention import mask_name

GRIDS = [(1, 1), (2, 3), (7, 5), (8, 8), (3, 16)]
BOXES: list[Box] = [
    (0.0, 0.0, 1.0, 1.0),
    (0.1, 0.2, 0.55, 0.7),
    (0.25, 0.5, 0.75, 1.0),
    (0.999, 0.0, 1.0, 0.001),
    (0.501, 0.501, 0.502, 0.503),
]


def part(start: float, end: float, cell: int, cells: int) -> float:
    return max(0.0, min(end, (cell + 1) / cells) - max(start, cell / cells)) * cells


def slow(box: Box, h: int, w: int) -> Tensor:
    """The coverage of one box, cell by cell."""
    x0, y0, x1, y1 = box
    rows = [[part(y0, y1, r, h) * part(x0, x1, c, w) for c in range(w)] for r in range(h)]
    return torch.tensor(rows, dtype=torch.float64)


def sampled(boxes: list[Box], h: int, w: int, fine: int = 40) -> Tensor:
    """The fraction of many sample points in each cell that lie in any of the boxes."""
    found = torch.zeros(h, w, dtype=torch.float64)
    for r in range(h):
        for c in range(w):
            for i in range(fine):
                for j in range(fine):
                    y, x = (r + (i + 0.5) / fine) / h, (c + (j + 0.5) / fine) / w
                    found[r, c] += any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in boxes)
    return found / fine**2


def find(phrase: str) -> tuple[int, ...]:
    return {"ball": (2,), "red ball": (1, 2)}[phrase]


def one(value: object, key: object = "ball") -> PlacedObject:
    (region,) = read_objects({key: value}, find, 8)  # type: ignore[dict-item]
    return region


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("box", BOXES)
def test_a_box_covers_cells_exactly(box: Box, grid: tuple[int, int]) -> None:
    found = PlacedObject("ball", (2,), (box,)).coverage(grid)
    torch.testing.assert_close(found, slow(box, *grid), rtol=0, atol=1e-12)
    torch.testing.assert_close(box_coverage(torch.tensor(box, dtype=torch.float64), *grid), found, rtol=0, atol=1e-12)
    x0, y0, x1, y1 = box
    assert found.sum().item() / (grid[0] * grid[1]) == pytest.approx((x1 - x0) * (y1 - y0), rel=1e-9)


def test_box_coverage_takes_boxes_of_any_number() -> None:
    boxes = torch.tensor(BOXES[:4], dtype=torch.float64).view(2, 2, 4)
    found = box_coverage(boxes, 3, 5)
    assert found.shape == (2, 2, 3, 5)
    for i, box in enumerate(BOXES[:4]):
        torch.testing.assert_close(found[i // 2, i % 2], slow(box, 3, 5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", [(2, 3), (5, 4)])
def test_boxes_that_overlap_count_once(grid: tuple[int, int]) -> None:
    # edges at multiples of 1/120, never at sampled points of either grid
    boxes = [(0.1, 0.2, 0.6, 0.7), (0.4, 0.5, 0.9, 1.0), (0.45, 0.55, 0.5, 0.6), (0.1, 0.2, 0.6, 0.7)]
    found = PlacedObject("ball", (2,), tuple(boxes)).coverage(grid)
    torch.testing.assert_close(found, sampled(boxes, *grid), rtol=0, atol=1e-12)
    # areas by inclusion and exclusion: two of 0.25, 0.04 in common, and the others inside
    assert found.mean().item() == pytest.approx(0.25 + 0.25 - 0.2 * 0.2, rel=1e-12)
    assert found.max() <= 1 + 1e-12


def test_boxes_apart_are_the_sum_of_each() -> None:
    boxes = ((0.0, 0.0, 0.3, 0.4), (0.3, 0.0, 0.5, 0.4), (0.55, 0.6, 0.95, 1.0))  # the first two touch
    found = PlacedObject("ball", (2,), boxes).coverage((7, 5))
    torch.testing.assert_close(found, sum(slow(box, 7, 5) for box in boxes), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1e-3, 1e-6])
@pytest.mark.parametrize("corner", [(0.0, 0.0), (0.5, 0.5), (0.33, 0.87), (1 - 1e-3, 1 - 1e-3)])
def test_a_box_far_smaller_than_a_cell_is_never_empty(size: float, corner: tuple[float, float]) -> None:
    x, y = corner
    region = one((x, y, x + size, y + size))
    for grid in GRIDS:
        mask = make_layout([[region]], [3], 8, [grid]).masks[grid]
        assert mask.sum().item() == pytest.approx(size**2 * grid[0] * grid[1], rel=1e-3)


# ---- masks


def masks() -> dict[str, object]:
    """One mask of 5 x 7 pixels in every accepted form."""
    inside = np.zeros((5, 7), dtype=bool)
    inside[1:4, 2:7] = True
    grey = inside.astype(np.uint8) * 255
    return {
        "bool": inside,
        "uint8 0 and 1": inside.astype(np.uint8),
        "uint8 0 and 255": grey,
        "int64": inside.astype(np.int64),
        "float32": inside.astype(np.float32),
        "float64": inside.astype(np.float64),
        "torch bool": torch.tensor(inside),
        "torch float": torch.tensor(inside).float(),
        "torch half": torch.tensor(inside).half(),
        "torch uint8": torch.tensor(grey),
        "image L": Image.fromarray(grey),
        "image 1": Image.fromarray(grey).convert("1"),
        "image RGB": Image.fromarray(grey).convert("RGB"),
    }


@pytest.mark.parametrize("kind", masks())
def test_masks_of_every_kind_cover_cells_exactly(kind: str) -> None:
    region = one(masks()[kind])
    assert region.boxes == ()
    box = (2 / 7, 1 / 5, 1.0, 4 / 5)  # the values of those pixels
    for grid in [(2, 3), (8, 8), (3, 16), (1, 1), (5, 7)]:  # pixel and cell sizes that do not divide each other
        torch.testing.assert_close(region.coverage(grid), slow(box, *grid), rtol=0, atol=1e-12)
    torch.testing.assert_close(one({"mask": masks()[kind]}).coverage((3, 4)), region.coverage((3, 4)))


def test_a_mask_may_be_soft() -> None:
    values = torch.rand(5, 7, dtype=torch.float64)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for r in range(5):
        for c in range(7):
            expected += values[r, c] * slow((c / 7, r / 5, (c + 1) / 7, (r + 1) / 5), 3, 4)
    torch.testing.assert_close(one(values).coverage((3, 4)), expected, rtol=0, atol=1e-12)
    grey = (values * 255).round().to(torch.uint8).numpy()
    soft = one(Image.fromarray(grey)).coverage((3, 4))
    torch.testing.assert_close(soft, expected, rtol=0, atol=0.5 / 255 + 1e-6)


def test_a_mask_of_ones_is_not_one_of_bytes() -> None:
    torch.testing.assert_close(one(np.ones((2, 2), dtype=np.uint8)).coverage((1, 1)), torch.ones(1, 1).double())
    torch.testing.assert_close(one(np.full((2, 2), 255, np.uint8)).coverage((1, 1)), torch.ones(1, 1).double())


# ---- user input


def test_regions_are_read_from_every_way_to_write_them() -> None:
    box = (0.1, 0.2, 0.5, 0.6)
    assert one(box).boxes == one(list(box)).boxes == (box,)
    assert one([box, (0, 0, 1, 1)]).boxes == (box, (0.0, 0.0, 1.0, 1.0))
    assert one((box, box)).boxes == (box, box)
    weighted = one({"boxes": [box], "weight": 2})
    assert (weighted.boxes, weighted.weight) == ((box,), 2.0)
    assert one({"boxes": box}).weight == 1.0
    assert one({"mask": np.ones((2, 2)), "weight": 0.5}).weight == 0.5
    for key, tokens, name in (
        ("red ball", (1, 2), "red ball"),
        (3, (3,), "tokens:3"),
        ((2, 5), (2, 5), "tokens:2,5"),
        ("tokens:2,5", (2, 5), "tokens:2,5"),
        ("tokens:7", (7,), "tokens:7"),
    ):
        region = one(box, key)
        assert (region.tokens, region.name) == (tokens, name)
    both = read_objects({"ball": box, "red ball": {"boxes": box}}, find, 8)
    assert [region.name for region in both] == ["ball", "red ball"]
    assert read_objects({}, find, 8) == ()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ball", (0.5, 0.1, 0.4, 0.6), r"boxes\['ball'\] holds \(0.5, .*corners out of order \(is it x, y, width, hei"),
        ("ball", (0.1, 0.6, 0.4, 0.5), "has its corners out of order"),
        ("ball", (0.1, 0.2, 0.1, 0.6), "which has no area"),
        ("ball", (0.1, 0.2, 0.3, 0.2), "which has no area"),
        (
            "ball",
            (0.1, 0.2, 1.01, 0.6),
            "extends outside the picture.* Divide pixels by the picture's width and hei",
        ),
        ("ball", (-0.1, 0.2, 0.5, 0.6), "extends outside the picture"),
        ("ball", (10, 20, 300, 400), "Divide pixels"),
        ("ball", (0.1, 0.2, 0.5), r"holds 0.1; expected|holds \(0.1, 0.2, 0.5\); expected \(x0, y0, x1, y1\)"),
        ("ball", [(0, 0, 1, 1), (0, 0, 1)], r"holds \(0, 0, 1\); expected \(x0, y0, x1, y1\)"),
        ("ball", [(0, 0, 1, 1), 3], "holds 3; expected"),
        ("ball", (0.1, math.nan, 0.5, 0.6), "holds .*nan"),
        ("ball", (0.1, "0.2", 0.5, 0.6), "holds .*'0.2'"),
        ("ball", (False, 0.2, True, 0.6), "holds .*False"),
        ("ball", [], r"is \[\]; expected \(x0, y0, x1, y1\) in \[0,1\]"),
        ("ball", "middle", "is 'middle'; expected"),
        ("ball", {"boxes": (0, 0, 1, 1), "mask": np.ones((2, 2))}, r'expected one of "box", "boxes", "mask", '),
        ("ball", {"weight": 2.0}, r'such as \{"box": ...\}, beside it at most "weight", "order"'),
        ("ball", {"bbox": (0, 0, 1, 1)}, 'expected one of "box"'),
        ("ball", {"boxes": (0, 0, 1, 1), "weight": 0}, r"boxes\['ball'\] has the weight 0; expected a number above 0"),
        ("ball", {"boxes": (0, 0, 1, 1), "weight": -1.0}, "has the weight -1.0"),
        ("ball", {"boxes": (0, 0, 1, 1), "weight": math.inf}, "has the weight inf"),
        ("ball", {"boxes": (0, 0, 1, 1), "weight": math.nan}, "has the weight nan"),
        ("ball", {"boxes": (0, 0, 1, 1), "weight": True}, "has the weight True"),
        ("ball", {"boxes": (0, 0, 1, 1), "weight": "2"}, "has the weight '2'"),
        ("ball", np.zeros((4, 5)), "the mask of .*'ball'.* is empty; expected some of it above 0"),
        ("ball", np.zeros((4, 4), dtype=bool), "the mask of .*'ball'.* is empty"),
        ("ball", np.full((4, 5), 1.5), "the mask of .*'ball'.* holds values from 1.5 to 1.5; expected 0 to 1"),
        ("ball", np.full((4, 5), -0.5), "holds values from -0.5 to -0.5"),
        ("ball", np.full((4, 5), math.nan), "holds values from nan"),
        ("ball", np.array([[0, 128], [200, 255]], np.uint8), "holds values from 0 to 255"),
        (
            "ball",
            np.ones((4, 4, 3)),
            r"the mask of boxes\['ball'\] is a ndarray of shape \[4, 4, 3\] .* expected \[H,W\] of num",
        ),
        ("ball", np.ones(5), r"of shape \[5\]"),
        ("ball", np.ones((0, 5)), r"of shape \[0, 5\]"),
        ("ball", torch.ones(2, 2, dtype=torch.complex64), "dtype complex64"),
        ("ball", np.ones(4), r"holds \(1.0, 1.0, 1.0, 1.0\), which has no area"),
        ("ball", np.ones((2, 4)), r'has no area; .* or a mask \(one of shape \[n,4\] as {"mask": ...}\)'),
        ("ball", torch.ones(0, 4), r"is \[\]; expected"),
        ("ball", torch.ones(2, 4) * 1j, "holds .*expected"),
        ("ball", {"mask": None}, r"the mask of boxes\['ball'\] is None; expected"),
        (
            "ball",
            torch.ones(4, device="meta"),
            r"is a Tensor of shape \[4\] .* cannot be read as an array",
        ),
        ("ball", torch.eye(5).to_sparse(), "cannot be read as an array"),
        ("ball", [torch.ones(4, device="meta")], "cannot be read as an array"),
        ("ball", [(0, 0, 1, 1)] * 257, "holds 257 boxes; expected at most 256"),
        ("ball", (0, 0, 1, 10**400), "holds .*expected"),
        ("ball", np.array([["a", "b"]]), "the mask of .*'ball'.*"),
        (
            0,
            (0, 0, 1, 1),
            r"boxes has the key 0; expected .* token positions from 1 to 7 \(position 0 is the start mark",
        ),
        (8, (0, 0, 1, 1), "boxes has the key 8"),
        (-1, (0, 0, 1, 1), "boxes has the key -1"),
        (True, (0, 0, 1, 1), "boxes has the key True"),
        ((), (0, 0, 1, 1), r"boxes has the key \(\)"),
        ((2, 9), (0, 0, 1, 1), r"boxes has the key \(2, 9\)"),
        ((2, "a"), (0, 0, 1, 1), "boxes has the key"),
        (2.5, (0, 0, 1, 1), "boxes has the key 2.5"),
        ("tokens:2,9", (0, 0, 1, 1), r"boxes has the key \(2, 9\)"),
        ("tokens:0", (0, 0, 1, 1), r"boxes has the key \(0,\)"),
    ],
    ids=repr,
)
def test_what_is_wrong_is_named(key: object, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one(value, key)


BOX = (0.125, 0.25, 0.5, 0.75)


@pytest.mark.parametrize(
    "value",
    [
        np.array(BOX),
        np.array(BOX, np.float32),
        torch.tensor(BOX),
        torch.tensor(BOX).bfloat16().requires_grad_(),
        tuple(np.float32(BOX)),
        list(torch.tensor(BOX)),
        np.array([BOX]),
        torch.tensor([BOX]),
        [np.array(BOX)],
        (torch.tensor(BOX),),
        [list(np.float32(BOX))],
    ],
    ids=repr,
)
def test_a_box_is_a_box_whatever_holds_it(value: object) -> None:
    assert one(value).boxes == one({"boxes": value}).boxes == (BOX,)
    assert one([BOX, BOX]).boxes == one(np.array([BOX, BOX])).boxes == one(torch.tensor([BOX, BOX])).boxes == (BOX, BOX)


def test_a_mask_of_four_columns_is_named_as_one() -> None:
    cells = np.array([BOX, BOX])
    assert one(cells).mask is None
    assert torch.equal(one({"mask": cells}).coverage((2, 4)), torch.tensor(cells))
    assert one(cells > 0.2).mask is not None  # booleans are not numbers


def test_a_mask_may_be_a_view_and_read_only() -> None:
    mask = np.eye(5)
    mask.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(one(mask[::-1]).coverage((5, 5)), torch.eye(5).flip(0).double())


def test_token_positions_are_numbers_of_any_kind_and_count_once() -> None:
    for key in (np.int64(3), torch.tensor(3), (np.int32(3),), (3, 3), "tokens:3,3"):
        assert one(BOX, key).tokens == (3,)
        assert one(BOX, key).name == "tokens:3"


def test_a_target_without_a_place_covers_nothing() -> None:
    for value in (None, {"boxes": None}, {"boxes": None, "weight": 2}):
        region = one(value)
        assert region.boxes == () and region.mask is None
        assert torch.equal(region.coverage((3, 5)), torch.zeros(3, 5).double())
        assert one(plain_boxes([region])["ball"]).weight == region.weight


def test_a_layout_has_a_limit() -> None:
    with pytest.raises(ValueError, match="boxes holds 257 phrases; expected at most 256"):
        read_objects({(i,): BOX for i in range(1, 258)})


def test_torchs_defaults_change_no_layout() -> None:
    mask = torch.eye(5)

    def made() -> Layout:
        return make_layout([[one(BOX), one(np.eye(3), 3), one(mask, 4)], []], [3, 4], 8, [(2, 3), (8, 8)])

    expected = made()
    dtype = torch.get_default_dtype()
    try:
        for name in ("float64", "bfloat16"):
            torch.set_default_dtype(getattr(torch, name))
            with torch.device("meta"):
                found = made()
            for mine, theirs in zip(found.inputs().values(), expected.inputs().values(), strict=True):
                assert mine.dtype == theirs.dtype == torch.float32 and torch.equal(mine, theirs)
    finally:
        torch.set_default_dtype(dtype)


@pytest.mark.parametrize("value", ["ball", [("ball", (0, 0, 1, 1))], 3, (0, 0, 1, 1)], ids=str)
def test_layouts_must_be_mappings(value: object) -> None:
    with pytest.raises(ValueError, match="expected a mapping from phrases of the prompt to boxes, such as"):
        read_objects(value, find, 8)  # type: ignore[arg-type]


def test_a_phrase_that_is_not_there_lists_the_prompts_words(tiny_model: Model) -> None:
    def spans(phrase: str) -> tuple[int, ...]:
        return tiny_model.text.all_spans("a red ball, a cat", phrase)

    with pytest.raises(
        ValueError, match="phrase 'dog' is not in the prompt .* The prompt's words: a, red, ball, a, cat"
    ):
        read_objects({"dog": (0, 0, 1, 1)}, spans, 77)
    (twice,) = read_objects({"a": (0, 0, 1, 1)}, spans, 77)
    assert twice.tokens == (1, 5)  # the comma is a token too


# ---- tensors


def test_a_layout_has_zeros_where_an_image_has_fewer_objects() -> None:
    regions = [
        [one((0, 0, 0.5, 1)), one({"boxes": (0.2, 0.2, 1, 1), "weight": 3.0}, "red ball")],
        [],
        [one(np.eye(3), "tokens:2,5,7")],
    ]
    grids = [(2, 3), (5, 4)]
    layout = make_layout(regions, [2, 0, 6], 8, grids)
    assert set(layout.masks) == set(grids)
    for grid in grids:
        assert layout.masks[grid].shape == (3, 2, *grid)
        for i, some in enumerate(regions):
            for o, region in enumerate(some):
                torch.testing.assert_close(layout.masks[grid][i, o], region.coverage(grid).float())
            assert layout.masks[grid][i, len(some) :].count_nonzero() == 0
    assert torch.equal(layout.weights, torch.tensor([[1.0, 3.0], [0, 0], [1.0, 0]]))
    expected = torch.zeros(3, 2, 8)
    expected[0, 0, 2] = 1
    expected[0, 1, [1, 2]] = 0.5
    expected[2, 0, [2, 5, 7]] = 1 / 3
    torch.testing.assert_close(layout.token_weights, expected)
    words = [[0, 1, 1, 0, 0, 0, 0, 0], [0] * 8, [0, 1, 1, 1, 1, 1, 1, 0]]
    assert torch.equal(layout.words, torch.tensor(words).float())
    inputs = layout.inputs()
    names = {mask_name(grid) for grid in grids} | {"token_weights", "words", "object_weights"}
    assert set(inputs) == names
    some = layout.images(torch.tensor([2, 0]))
    assert torch.equal(some.weights, layout.weights[[2, 0]])
    assert torch.equal(some.token_weights, layout.token_weights[[2, 0]])
    assert torch.equal(some.words, layout.words[[2, 0]])
    assert torch.equal(some.masks[2, 3], layout.masks[2, 3][[2, 0]])


def test_a_layout_of_nothing_has_no_objects() -> None:
    layout = make_layout([[], []], [3, 4], 8, [(2, 3)])
    assert layout.masks[2, 3].shape == (2, 0, 2, 3)
    assert layout.weights.shape == (2, 0)


LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def test_a_list_of_mappings_is_several_objects_and_a_list_of_boxes_is_one() -> None:
    assert len(read_objects({"cat": [LEFT, RIGHT]})) == 1  # a union, as in older recipes
    two = read_objects({"cat": [{"box": LEFT}, {"boxes": [RIGHT], "weight": 2.0}], "ball": LEFT})
    assert [(one.name, one.boxes, one.weight) for one in two] == [
        ("cat", (LEFT,), 1.0),
        ("cat", (RIGHT,), 2.0),
        ("ball", (LEFT,), 1.0),
    ]
    again = read_objects(plain_boxes(two))
    assert [vars(one) for one in again] == [vars(one) for one in two]
    with pytest.raises(ValueError, match="holds 257 objects"):
        read_objects({"cat": [{"box": LEFT}] * 257})


def test_objects_of_one_phrase_share_its_attention() -> None:
    grid, site = (2, 4), minidiff.Site("up", 1, 0, "cross")
    boxes = [{"box": LEFT}, {"box": (0.5, 0.0, 1.0, 0.5)}]
    two = make_layout([read_objects({"cat": boxes})], [2], 4, [grid])
    assert torch.equal(two.siblings, torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]))
    probs = torch.full((1, 1, *grid, 4), 0.25)
    probs[..., 1, 2:, 1] = 0  # nothing outside of both
    for objective in (minidiff.layout_loss, minidiff.inside_loss):
        loss = objective({site: objective.keep(site, probs, two.inputs())}, two)
        assert loss.item() == pytest.approx(0, abs=1e-6)
    extent = minidiff.extent_loss({site: probs.mean(dim=1)}, two)
    alone = [
        minidiff.extent_loss({site: (probs * mask[0, :, :, None]).mean(dim=1)}, make_layout([[one]], [2], 4, [grid]))
        for one, mask in zip(read_objects({"cat": boxes}), two.masks[grid].movedim(1, 0), strict=True)
    ]
    torch.testing.assert_close(extent, (alone[0] + alone[1]) / 2)


def test_siblings_are_objects_of_the_same_tokens_alone() -> None:
    some = [
        [PlacedObject("a", (1,)), PlacedObject("b", (1, 2)), PlacedObject("c", (1,)), PlacedObject("d", ())],
        [PlacedObject("a", (1,))],
    ]
    found = make_layout(some, [3, 3], 5, [(2, 2)]).siblings
    assert found.nonzero().tolist() == [[0, 0, 2], [0, 2, 0]]


def test_two_of_a_kind_are_guided_recorded_and_made_again(tiny_model: Model) -> None:
    boxes = {"cat": [{"box": LEFT}, {"box": RIGHT}]}
    found = minidiff.generate("two cat", model=tiny_model, boxes=boxes, steps=2, seed=1, output="latents")
    assert found.reports is not None and found.reports[0].names == ("cat", "cat")
    recipe = json.loads(json.dumps(found.parameters[0]))
    assert [one["boxes"] for one in recipe["boxes"]["cat"]] == [[list(LEFT)], [list(RIGHT)]]
    again = minidiff.generate(minidiff.Request.from_plain(recipe), model=tiny_model, output="latents")
    assert torch.equal(torch.as_tensor(again.latents), found.latents)


def test_where_objects_overlap_only_the_highest_order_is() -> None:
    boxes = {
        "a": {"box": (0.0, 0.0, 0.75, 1.0)},
        "b": {"box": (0.5, 0.0, 1.0, 1.0), "order": 2},
        "c": [{"box": (0.5, 0.0, 1.0, 1.0), "order": 2}, {"mask": np.ones((1, 4)), "order": -1.5}],
    }
    regions = read_objects({"a": boxes["a"], "b": boxes["b"]})
    assert make_layout([regions], [3], 5, [(1, 4)]).masks[1, 4][0, :, 0].tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    regions = read_objects(boxes | {"a": {"box": (0.0, 0.0, 0.25, 1.0)}})
    masks = make_layout([regions], [3], 5, [(1, 4)]).masks[1, 4][0, :, 0]
    assert masks.tolist() == [[1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 0, 0]]  # equal orders share
    assert [one.order for one in read_objects(plain_boxes(regions))] == [0, 2, 2, -1.5]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("1", r"boxes\['b'\]: order is '1'; expected a number"),
        (-1, r"boxes\['b'\] lies wholly behind what has a higher order than -1"),
    ],
)
def test_an_order_that_cannot_be_is_named(order: object, message: str) -> None:
    boxes = {"a": (0.0, 0.0, 1.0, 1.0), "b": {"box": (0.1, 0.1, 0.5, 0.5), "order": order}}
    with pytest.raises(ValueError, match=message):
        make_layout([read_objects(boxes)], [3], 5, [(2, 2)])


@pytest.mark.parametrize("side", [12, 24, 96])
def test_what_is_wholly_covered_is_seen_on_no_grid(side: int) -> None:
    """The fractions of cells that are not powers of two are rounded."""
    front = {"boxes": [(0.07, 0.11, 0.53, 0.97), (0.4, 0.11, 0.93, 0.97)], "order": 1}
    with pytest.raises(ValueError, match="lies wholly behind"):
        make_layout([read_objects({"a": front, "b": (0.31, 0.37, 0.71, 0.61)})], [3], 5, [(side, side)])
    mask = make_layout([read_objects({"a": front, "b": (0, 0, 1, 1)})], [3], 5, [(side, side)]).masks[side, side]
    assert mask.min() == 0


def test_an_edit_reads_the_order(tiny_model: Model) -> None:
    """What is behind is a mask without what is in front."""
    shared = {"model": tiny_model, "steps": 2, "seed": 1, "guidance": "none", "output": "latents", "progress": False}
    shared["edits"] = minidiff.regional_prompting(20.0)
    front = {"box": (0.5, 0.0, 1.0, 1.0), "order": 1}
    boxes = {"cat": (0.0, 0.0, 1.0, 1.0), "ball": front}
    found = minidiff.generate("a cat and a ball", boxes=boxes, **shared)
    same = minidiff.generate("a cat and a ball", boxes={"cat": (0.0, 0.0, 0.5, 1.0), "ball": front["box"]}, **shared)
    torch.testing.assert_close(found.latents, same.latents)
