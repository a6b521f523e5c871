"""Regions with texts of their own: against a loop over pixels and texts, and what must hold of whole runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import minidiff
from minidiff import Region, Request
from minidiff.cli.flags import parser
from minidiff.cli.main import main
from minidiff.guidance.regions import share_bias, share_edits, share_name, shares
from minidiff.networks.attention import Hooks, hooked_attention
from minidiff.networks.sites import Site
from minidiff.speed import accelerate

SITE = Site("mid", 0, 0, "cross")
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
EVERYWHERE = (0.0, 0.0, 1.0, 1.0)
FOX, DOG = Region("a red fox", LEFT, negative="blue"), Region("a dog", (0.3, 0.1, 0.9, 0.7), weight=2.0)
CALL: dict[str, Any] = {"steps": 2, "guidance_scale": 5.0, "sampler": "ddim", "output": "tensor"}


def ours(model: minidiff.Model, prompt: Any = "a cat", **options: Any) -> Tensor:
    found = minidiff.generate(prompt, model=model, **{"seed": 3, **CALL, **options}).images
    assert isinstance(found, Tensor)
    return found


def differ(one: Tensor, other: Tensor) -> float:
    """In units of 1/255."""
    return float((one - other).abs().max()) * 255


# ---- one layer


def covered(box: tuple[float, float, float, float], row: int, column: int, grid: tuple[int, int]) -> float:
    """The fraction of a cell inside a box."""
    height = min(box[3], (row + 1) / grid[0]) - max(box[1], row / grid[0])
    width = min(box[2], (column + 1) / grid[1]) - max(box[0], column / grid[1])
    return max(height, 0) * grid[0] * max(width, 0) * grid[1]


@pytest.mark.parametrize("base_weight", [0.0, 0.3])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_it_equals_attention_to_each_text_mixed_in_each_cell(grid: tuple[int, int], base_weight: float) -> None:
    """A loop over cells: the outputs of attention to each text alone, mixed by share times normaliser."""
    areas, lengths = [[FOX, DOG], [DOG]], [6, 4, 4]
    q = torch.randn(4, 2, grid[0] * grid[1], 8)  # [uncond, cond] of two images, two heads
    k, v = torch.randn(2, 4, 2, sum(lengths), 8)
    inputs = {
        share_name(rows, grid): share_bias(shares(areas, grid, base_weight, rows == "uncond"), lengths)
        for rows in ("cond", "uncond")
    }
    edits = share_edits(frozenset([SITE]), negative=True)
    found, _ = hooked_attention(SITE, q, k, v, grid, Hooks({}, "cond", tuple(edits), inputs))
    texts = [slice(0, 6), slice(6, 10), slice(10, 14)]
    for row in range(4):
        own, negative = areas[row % 2], row < 2
        for cell in range(grid[0] * grid[1]):
            inside = [covered(region.box, cell // grid[1], cell % grid[1], grid) for region in own]
            total = min(1.0, sum(inside))
            part = [1 - total + base_weight * total, *(c * r.weight for c, r in zip(inside, own, strict=True))]
            if negative:  # a dog has no negative text: the prompt's takes its part
                part[0] += sum(p for p, region in zip(part[1:], own, strict=True) if region.negative is None)
                part[1:] = [0 if r.negative is None else p for p, r in zip(part[1:], own, strict=True)]
            for head in range(2):
                logits = (k[row, head] @ q[row, head, cell]) / math.sqrt(8)
                alone = [logits[text].softmax(0) @ v[row, head, text] for text in texts[: len(part)]]
                size = [p * float(logits[text].exp().sum()) for p, text in zip(part, texts, strict=False)]
                expected = sum(s * a for s, a in zip(size, alone, strict=True)) / sum(size)
                torch.testing.assert_close(found[row, head, cell], expected, rtol=1e-5, atol=1e-5)


def test_masks_and_boxes_of_the_same_cells_are_the_same() -> None:
    mask = np.zeros((4, 4), bool)
    mask[:, :2] = True
    boxed, masked, several = (
        shares([[Region("a", box)]], (4, 4), 0.0) for box in (LEFT, mask, [(0, 0, 0.5, 0.6), (0, 0.5, 0.5, 1)])
    )
    torch.testing.assert_close(boxed, masked)
    torch.testing.assert_close(boxed, several)
    assert torch.equal(boxed[0, 0] + boxed[0, 1], torch.ones(4, 4, dtype=torch.float64))


# ---- whole runs


def test_a_region_of_the_whole_image_is_its_prompt(tiny_model: minidiff.Model) -> None:
    alone = ours(tiny_model, "a red fox", negative_prompt="blue")
    for regions in ([Region("a red fox", EVERYWHERE, negative="blue")], [Region("a red fox", EVERYWHERE)]):
        negative = None if regions[0].negative else "blue"  # without its own, the prompt's negative acts
        assert differ(ours(tiny_model, regions=regions, negative_prompt=negative), alone) < 0.1
    assert differ(ours(tiny_model, negative_prompt="blue"), alone) > 0.5
    assert differ(ours(tiny_model, regions=[FOX]), alone) > 0.5


def test_equal_texts_are_one_text(tiny_model: minidiff.Model) -> None:
    """Wherever its parts are, however they overlap and weigh: a mixture of equal outputs."""
    regions = [Region("a cat", LEFT, weight=3.0), Region("a cat", (0.3, 0.1, 0.9, 0.7))]
    assert differ(ours(tiny_model, regions=regions), ours(tiny_model)) < 0.1
    assert differ(ours(tiny_model, regions=regions, base_weight=0.5), ours(tiny_model)) < 0.1


def test_no_regions_change_nothing(tiny_model: minidiff.Model) -> None:
    assert torch.equal(ours(tiny_model, regions=[]), ours(tiny_model))
    assert torch.equal(ours(tiny_model, regions=[None]), ours(tiny_model))


@pytest.mark.filterwarnings("ignore:.*A1111 syntax")
@pytest.mark.parametrize("syntax", ["a1111", pytest.param("plain", marks=pytest.mark.slow)])
def test_image_i_of_a_batch_is_image_i_alone(tiny_model: minidiff.Model, syntax: str) -> None:
    """Also beside images with more regions, with none, and with longer texts."""
    long = Region("a (bird:1.4) BREAK on a tree", (0.2, 0.5, 0.9, 1.0), negative="blue BREAK red")
    prompts, regions = ["a cat", "a tree", "a lake BREAK at night"], [[FOX, long], None, [DOG]]
    batch = ours(tiny_model, prompts, regions=regions, images_per_prompt=2, seed=range(6), width=48, syntax=syntax)
    for i in (0, 1, 3, 4):
        own = regions[i // 2]
        alone = ours(tiny_model, prompts[i // 2], regions=own, seed=i, width=48, syntax=syntax)
        assert differ(batch[i : i + 1], alone) < 0.5
        assert own is None or differ(alone, ours(tiny_model, prompts[i // 2], seed=i, width=48, syntax=syntax)) > 0.5


def test_a_negative_text_acts_in_the_unconditional_row_alone(tiny_model: minidiff.Model) -> None:
    unlike = [Region("a red fox", LEFT), Region("a red fox", LEFT, negative="blue")]
    one, other = (ours(tiny_model, regions=[region]) for region in unlike)
    assert differ(one, other) > 0.5
    with pytest.warns(UserWarning, match="negative prompt has no effect at guidance_scale 1"):
        without = ours(tiny_model, regions=[unlike[1]], guidance_scale=1)
    assert torch.equal(without, ours(tiny_model, regions=[unlike[0]], guidance_scale=1))


def test_texts_that_change_from_step_to_step(tiny_model: minidiff.Model) -> None:
    """In the second step, as with the second text; in the first, as with the first."""
    changing = [Region("a [fox:dog:1] here", LEFT, negative="[red:blue:1]")]
    seen = []
    for regions in (changing, [Region("a fox here", LEFT, negative="red")]):
        run = minidiff.sample_steps("a cat", model=tiny_model, regions=regions, syntax="a1111", seed=3, **CALL)
        seen.append([step.latents for step in run])
    assert torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[0][1], seen[1][1])
    with pytest.raises(ValueError, match="AND joins texts of the whole image, and regions is given"):
        ours(tiny_model, "a cat AND a dog", regions=[FOX], syntax="a1111")


def test_a_context_takes_regions_too(tiny_model: minidiff.Model) -> None:
    context = tiny_model.text.encode(["a cat"])
    assert differ(ours(tiny_model, None, context=context, regions=[FOX]), ours(tiny_model, regions=[FOX])) < 0.1


# ---- recording, guidance, edits, compiling


def test_phrases_of_every_text_are_read(tiny_model: minidiff.Model) -> None:
    record = minidiff.Record(minidiff.cross, minidiff.HEAD_MEAN)
    regions = [Region("a red fox", LEFT), Region("a cat", (0.5, 0.0, 1.0, 0.5))]
    shared = {"model": tiny_model, "regions": regions, "seed": 3, "attention": record, **CALL}
    found = minidiff.generate("a cat", **shared).attention
    fox = found["red fox"][0]
    assert fox[:, 4:].max() < 1e-20 < 1e-6 < fox[:, :4].min()
    base, own = (found.of(0, "cat", occurrence=n) for n in (0, 1))  # of the prompt, then of the regions
    assert base[:, :4].max() < 1e-20 < 1e-6 < base[4:, 4:].min()
    assert own[4:].max() < 1e-20 < 1e-6 < own[:4, 4:].min()
    torch.testing.assert_close(found["cat"][0], (base + own) / 2)
    assert found.text.tokens(found.prompts[0])[77:82] == ("<start>", "a", "red", "fox", "<end>")
    with pytest.raises(ValueError, match="'dog' is not in the prompt"):
        found["dog"]
    with pytest.raises(ValueError, match="'cat a' is not in the prompt"):  # not across texts
        found["cat a"]
    uncond = minidiff.generate("a cat", **{**shared, "attention": minidiff.Record(minidiff.cross, rows="uncond")})
    with pytest.raises(ValueError, match="'fox' is not in"):
        uncond.attention["fox"]
    blue = minidiff.generate(
        "a cat", **{**shared, "regions": [FOX], "attention": minidiff.Record(minidiff.cross, rows="uncond")}
    ).attention["blue"][0]
    assert blue[:, 4:].max() < 1e-20 < 1e-6 < blue[:, :4].min()


def test_recording_changes_nothing(tiny_model: minidiff.Model) -> None:
    regions = [FOX, DOG]
    recorded = ours(tiny_model, regions=regions, attention=minidiff.Record(minidiff.cross))
    assert differ(recorded, ours(tiny_model, regions=regions)) < 0.1


def test_boxes_find_the_phrases_of_regions(tiny_model: minidiff.Model) -> None:
    boxes = {"fox": (0.0, 0.0, 0.4, 0.5), "cat": (0.5, 0.5, 1.0, 1.0)}
    guidance = minidiff.Guidance(steps=1, iterations=2, threshold=0.0)
    shared = {"model": tiny_model, "seed": [3, 4], "boxes": [boxes, {"bird": LEFT}], "regions": [[FOX], None], **CALL}
    batch = minidiff.generate(["a cat", "a bird"], guidance=guidance, **shared)
    for i, report in enumerate(batch.reports):
        assert sum(report.iterations) == 2, report
        alone = minidiff.generate(Request.from_plain({**batch.parameters[i], "model": "x"}), model=tiny_model)
        assert differ(batch.images[i : i + 1], alone.images) < 0.5
    assert batch.reports[0].first_mass[0] < 1  # its region is larger than its box


def test_edits_act_beside_regions(tiny_model: minidiff.Model) -> None:
    placed = {"boxes": {"fox": (0.0, 0.0, 0.4, 0.5)}, "regions": [FOX], "guidance": "none"}
    for edit in (minidiff.regional_prompting(8.0), minidiff.forward_guidance(0.8)):
        assert differ(ours(tiny_model, **placed, edits=edit), ours(tiny_model, **placed)) > 0.1
    weights = tiny_model.text.word_weights("a cat", {"cat": 2.0})
    one = {"regions": [Region("a fox", EVERYWHERE)], "edits": minidiff.reweight(), "inputs": {"word_weights": weights}}
    assert differ(ours(tiny_model, **one), ours(tiny_model, regions=one["regions"])) < 0.1  # nothing reads the prompt


@pytest.mark.slow
def test_new_regions_run_the_same_graph(tiny_folder: Path, tiny_model: minidiff.Model, one_thread: None) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate, "_flags", lambda device: {"fullgraph": True, "dynamic": False, "backend": counter})
        compiled = minidiff.load(tiny_folder, dtype="float32", device="cpu", compile=True)
        for regions in ([FOX, DOG], [Region("a tree", (0.1, 0.1, 0.3, 0.2)), Region("snow", RIGHT, "ice", 0.5)]):
            assert differ(ours(compiled, regions=regions), ours(tiny_model, regions=regions)) < 1
            assert counter.frame_count == 1


# ---- requests


def test_regions_are_json(tiny_model: minidiff.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = [[FOX, {"prompt": "a dog", "box": [[0, 0, 0.5, 0.5]], "weight": 2}], None]
    request = Request(["a cat", "a tree"], regions=lists, base_weight=0.2, seed=3)
    again = Request.from_plain(json.loads(json.dumps(request.plain())))
    assert again.plain() == request.plain()
    assert [[r.prompt for r in some] for some in again.areas] == [["a red fox", "a dog"], []]
    assert Request.from_plain(request.alone(1).plain()).regions is None
    assert "regions" not in Request("a cat").plain() and "base_weight" not in Request("a cat").plain()
    one = Request(["a cat", "a tree"], regions=[FOX])
    assert one.areas == ((FOX,), (FOX,)) and Request(**{**vars(one), "prompt": "a cat"}).areas == ((FOX,),)
    masked = Request("a cat", regions=[Region("a fox", np.eye(4, dtype=bool))]).plain()
    with pytest.raises(ValueError, match=r"x.png: regions: the box of 'a fox'"):
        Request.from_plain(masked, "x.png")


def test_the_command_line_reads_and_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    regions = [{"prompt": "a red circle", "box": LEFT, "negative": "a blue square"}, {"prompt": "a ring", "box": RIGHT}]
    Path("r.json").write_text(json.dumps(regions))
    flags = ["--steps", "2", "--seed", "3", "--regions-apart", "0.5"]
    assert main(["generate", "a circle", "--regions", "r.json", "--base-weight", "0.1", "--out", "a.png", *flags]) == 0
    written = minidiff.read_parameters("a.png")
    assert [one["prompt"] for one in written["regions"]] == ["a red circle", "a ring"]
    assert (written["base_weight"], written["regions_apart"]) == (0.1, 0.5)
    assert main(["generate", "--from", "a.png", "--out", "b.png"]) == 0
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()
    assert minidiff.read_parameters("b.png") == written
    Path("pictures").mkdir()
    Path("masked.json").write_text(json.dumps([[{"prompt": "a ring", "mask": "pictures/left.png"}]]))
    args = ["generate", "a circle", "--regions", "masked.json"]
    assert main(args) == 2
    Image.fromarray(np.uint8([[255, 0]])).save("pictures/left.png")
    region = parser().parse_args(args).regions[0][0]
    assert Request("a circle", regions=[region]).areas[0][0].coverage((2, 2)).tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        (3, r"regions is 3; expected a list such as \[Region"),
        (FOX, "regions is .*; expected a list"),
        (["a fox"], "regions holds 'a fox'; expected a Region, or prompt, box and some of"),
        ([{"prompt": "a fox"}], "regions holds {'prompt': 'a fox'}; expected a Region"),
        ([{"prompt": "a", "box": LEFT, "text": 3}], "expected a Region, or prompt, box and some of"),
        ([FOX, [DOG]], "regions holds lists and .*; expected one list for all prompts, or one for each"),
        ([[FOX], [DOG]], "regions holds 2 lists for 1 prompts; expected one for all, or one per prompt"),
        ([{"prompt": 3, "box": LEFT}], "regions: prompt is 3; expected a text"),
        ([{"prompt": "a", "box": LEFT, "negative": 3}], "regions: negative is 3; expected a text"),
        ([{"prompt": "a", "box": LEFT, "weight": 0}], "regions: weight is 0; expected a number from 0.001 to 1000"),
        ([{"prompt": "a", "box": None}], "the box of 'a' is None; expected a box, several or a mask"),
        ([{"prompt": "a", "box": (0, 0, 2, 1)}], "the box of 'a' holds .* outside the picture"),
        ([{"prompt": "a", "box": {"boxes": LEFT, "weight": 2}}], "a mask, without a weight"),
        ([FOX] * 65, "regions holds 65 for a prompt; expected at most 64"),
    ],
)
def test_what_is_no_region_is_refused(regions: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request("a cat", regions=regions)


def test_a_base_weight_needs_regions() -> None:
    with pytest.raises(ValueError, match="base_weight is 0.2 but there are no regions"):
        Request("a cat", base_weight=0.2)
    with pytest.raises(ValueError, match="base_weight is -1; expected a number from 0"):
        Request("a cat", base_weight=-1, regions=[FOX])
    with pytest.raises(ValueError, match="names a file"):
        Request("a cat", syntax="a1111", regions=[Region("<lora:x:1>", LEFT)])
