"""Steps that go on with looks: the same pictures, and which passes are spared."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minidiff
from minidiff.model import Model
from minidiff.networks.attention import HEAD_MEAN, Edit, Record
from minidiff.networks.config import UNetConfig
from minidiff.networks.transformer import Transformer
from minidiff.networks.unet import Begun, ResBlock, UNet
from minidiff.speed import accelerate

BOXES = {"cat": (0.1, 0.1, 0.6, 0.7), "ball": (0.5, 0.2, 0.9, 0.9)}
MOST, STEPS = 3, 5
HOW = minidiff.Guidance(minidiff.layout_loss, scale=300.0, threshold=0.502, iterations=MOST, steps=STEPS)
EVERYWHERE, NOWHERE = 0, 2**60
"""From how many numbers a pass goes on."""


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each step that goes on with a look."""
    rows, finish = list[int](), UNet.finish

    def counted(unet: UNet, begun: Begun, t: Tensor, context: Tensor) -> Tensor:
        rows.append(len(context))
        return finish(unet, begun, t, context)

    monkeypatch.setattr(UNet, "finish", counted)
    return rows


def drawn(model: Model, least: int, monkeypatch: pytest.MonkeyPatch, **options: object) -> minidiff.Result:
    monkeypatch.setattr(accelerate, "_RESUMED", least)
    given: dict[str, object] = {
        "prompt": "a cat and a ball",
        "boxes": BOXES,
        "steps": 6,
        "sampler": "ddim",
        "seed": 5,
        "guidance": HOW,
        "output": "latents",
        **options,
    }
    return minidiff.generate(**given, model=model)


def settled(result: minidiff.Result) -> int:
    """In how many steps no image's last look moved it."""
    assert result.reports is not None
    assert all(report.steps == tuple(range(STEPS)) for report in result.reports)
    return sum(max(moves) < MOST for moves in zip(*(report.iterations for report in result.reports), strict=True))


@pytest.mark.parametrize("images", [1, 3])
def test_a_step_goes_on_with_looks_that_moved_nothing(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, finished: list[int], images: int
) -> None:
    """Images whose last look was not the same one, too; not where one has moved after its last look."""
    expected = drawn(tiny_model, NOWHERE, monkeypatch, images_per_prompt=images)
    assert finished == []
    rows, plain, first = list[int](), ResBlock.plain, tiny_model.unet.down_blocks[0].resnets[0]

    def counted(own: ResBlock, x: Tensor, emb: Tensor) -> Tensor:
        rows.extend([len(x)] if own is first and not torch.is_grad_enabled() else [])
        return plain(own, x, emb)

    monkeypatch.setattr(ResBlock, "plain", counted)
    found = drawn(tiny_model, EVERYWHERE, monkeypatch, images_per_prompt=images)
    torch.testing.assert_close(found.latents, expected.latents, rtol=0, atol=1e-4)
    assert [report.iterations for report in found.reports] == [report.iterations for report in expected.reports]
    moves = {moved for report in found.reports for moved in report.iterations}
    assert moves >= {0, MOST} and (images == 1 or len(moves) > 2)
    assert finished == [2 * images] * settled(found) and 0 < len(finished) < STEPS
    assert len(rows) == 6 - len(finished)  # the others are whole passes


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"guidance_scale": 1}, {1}),
        ({"guidance_interval": (2, 1e3), "negative_prompt": "blurry"}, {1, 2}),
        ({"sampler": "pndm", "guidance_rescale": 0.5}, {2}),
        ({"sampler": "ddim_cfg_pp", "guidance_scale": 0.8}, {2}),
        ({"prompt": "a [red:blue:0.5] cat and a ball", "syntax": "a1111"}, {2}),
        ({"image": torch.zeros(3, 32, 32), "mask": torch.eye(32), "strength": 1.0}, {2}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_with_all_that_leaves_a_step_one_pass(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, finished: list[int], options: dict[str, object], rows: set[int]
) -> None:
    options = {"steps": 4, "guidance": replace(HOW, steps=4), **options}
    expected, found = (drawn(tiny_model, least, monkeypatch, **options) for least in (NOWHERE, EVERYWHERE))
    torch.testing.assert_close(found.latents, expected.latents, rtol=0, atol=1e-4)
    assert set(finished) == rows


@pytest.mark.parametrize(
    "options",
    [
        {"attention": True},
        {"cache_interval": 2},
        {"prompt": "a cat and a ball AND a dog", "syntax": "a1111"},
        {"guidance": replace(HOW, watch=True)},
        {"edits": [Edit(minidiff.cross, probs=lambda site, probs, inputs: probs * 0.9)]},
        {"regions": [minidiff.Region("a dog", (0.0, 0.0, 0.5, 1.0))]},
        {"inputs": {"mine": torch.zeros(2, 1)}},
    ],
    ids=lambda options: "-".join(options),
)
def test_not_where_a_step_is_something_else(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, finished: list[int], options: dict[str, object]
) -> None:
    found = drawn(tiny_model, EVERYWHERE, monkeypatch, steps=1, **{"guidance": replace(HOW, steps=1), **options})
    assert found.reports[0].iterations == (0,) and finished == []
    drawn(tiny_model, EVERYWHERE, monkeypatch, steps=1, guidance=replace(HOW, steps=1))
    assert finished == [2]


def test_not_below_float32(tiny_model: Model, monkeypatch: pytest.MonkeyPatch, finished: list[int]) -> None:
    """Images that stop at different looks would be rounded in other ways than alone, which would show there."""
    half = replace(tiny_model, unet=deepcopy(tiny_model.unet).bfloat16(), text=deepcopy(tiny_model.text))
    half.text.model.bfloat16()
    for model in (replace(tiny_model, int8=True), half):
        drawn(model, EVERYWHERE, monkeypatch, steps=1, guidance=replace(HOW, steps=1, threshold=1e9))
    assert finished == []


def test_hooks_see_whole_passes(tiny_model: Model, monkeypatch: pytest.MonkeyPatch, finished: list[int]) -> None:
    """Those put on after the run was made, too, and on all networks."""
    rows = list[int]()

    def seen(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows.extend([len(inputs[0])] if module is layer else [])

    model = replace(tiny_model, unet=deepcopy(tiny_model.unet))
    layer = model.unet.down_blocks[1].resnets[0]
    monkeypatch.setattr(accelerate, "_RESUMED", EVERYWHERE)
    for put in (layer.register_forward_hook, torch.nn.modules.module.register_module_forward_hook):
        given = {"boxes": {"cat": BOXES["cat"]}, "steps": 2, "sampler": "ddim", "guidance": replace(HOW, threshold=1e9)}
        run = minidiff.sample_steps("a cat", model=model, **given)
        hook = put(seen)
        list(run)
        hook.remove()
        assert rows.count(2) == 2 and finished == []
        rows.clear()


def test_layers_of_others_are_called(tiny_model: Model, monkeypatch: pytest.MonkeyPatch, finished: list[int]) -> None:
    class Halved(Transformer):
        def plain(self, *given: Any) -> Any:
            found, maps = super().plain(*given)
            return (None if found is None else found / 2), maps

    model = replace(tiny_model, unet=deepcopy(tiny_model.unet))
    model.unet.down_blocks[0].attentions[0].__class__ = Halved
    drawn(model, EVERYWHERE, monkeypatch, steps=1, guidance=replace(HOW, steps=1, threshold=1e9))
    assert finished == [] and not accelerate.looks_of(model.unet, print, 1).resumes


def test_passes_go_on_from_256_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        unet = UNet(UNetConfig())
    assert not accelerate.looks_of(unet, print, 64 * 64).resumes  # a card's
    monkeypatch.setattr(unet, "distinct", accelerate.distinct)
    assert [accelerate.looks_of(unet, print, edge**2).resumes for edge in (28, 32)] == [False, True]


@torch.no_grad()
def test_what_a_pass_leaves_has_a_row_an_image(tiny_model: Model) -> None:
    """Also where the halves of a batch are equal, of which a whole pass computes the first layers once."""
    unet, begun = deepcopy(tiny_model.unet), []
    unet.distinct = lambda x, emb: max(1, len(x) // 2)
    x, t, context = torch.randn(2, 4, 8, 8).repeat(2, 1, 1, 1), torch.tensor(300.0), torch.randn(4, 7, 64)
    record = Record(frozenset([list(unet.positions(8, 8))[-1]]), HEAD_MEAN, stop=True)
    unet(x, t, context, record, at_stop=begun.append)
    assert {len(kept) for kept in begun[0].kept} == {4}
    torch.testing.assert_close(unet.finish(begun[0].row(2), t, context[2:3]), unet(x[2:3], t, context[2:3])[0])
