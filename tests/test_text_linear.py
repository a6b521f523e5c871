"""Keys and values of a text are computed once for many passes, and never those of another text or of other weights."""

import copy
import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import minidiff
from minidiff.model import Model
from minidiff.networks.attention import Edit, Inputs
from minidiff.networks.sites import Site
from minidiff.speed import accelerate
from minidiff.speed.packed import PackedLinear
from minidiff.speed.replace import with_weights
from minidiff.speed.text_linear import TextLinear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
ROWS, LENGTH, WIDTH, OUT = 4, 7, 24, 40


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each text that a layer computes."""
    found, run = list[int](), PackedLinear.run

    def counted(own: PackedLinear, x: Tensor, bias: Tensor | None) -> Tensor:
        found.extend([len(x)] if isinstance(own, TextLinear) else [])
        return run(own, x, bias)

    monkeypatch.setattr(PackedLinear, "run", counted)
    return found


@pytest.fixture
def pair() -> tuple[nn.Linear, TextLinear]:
    """torch's layer, and one with the same weights that has packed them."""
    linear = nn.Linear(WIDTH, OUT, bias=False).requires_grad_(False)
    layer = TextLinear(copy.deepcopy(linear))
    layer(torch.randn(1, LENGTH, WIDTH))
    return linear, layer


@pytest.mark.parametrize("grads", [True, False])
def test_a_text_and_its_halves_are_computed_once(
    pair: tuple[nn.Linear, TextLinear], rows: list[int], grads: bool
) -> None:
    (linear, layer), text = pair, torch.randn(ROWS, LENGTH, WIDTH)
    with torch.set_grad_enabled(grads):
        halves = text[: ROWS // 2], text[ROWS // 2 :]
        for x in (halves[1], text, *halves, halves[1].view_as(halves[1])):
            torch.testing.assert_close(layer(x), linear(x))
    assert rows == [ROWS]
    others = torch.randn(ROWS, LENGTH, WIDTH), text[:1], text[::2], text[:, 1:], text[..., :WIDTH], text.mT.mT[1:]
    for x in others:  # another text, less than half of it, other rows, positions
        torch.testing.assert_close(layer(x), linear(x))
    shifted = text.flatten()[WIDTH : WIDTH + 2 * LENGTH * WIDTH].view(2, LENGTH, WIDTH)
    torch.testing.assert_close(layer(shifted), linear(shifted))


def test_what_was_written_to_is_computed_anew(pair: tuple[nn.Linear, TextLinear], rows: list[int]) -> None:
    (linear, layer), text = pair, torch.randn(ROWS, LENGTH, WIDTH)
    layer(text)
    text[2] += 1  # the text, half of it seen through a view, a result
    torch.testing.assert_close(layer(text), linear(text))
    half = text[2:]
    half.mul_(2)
    torch.testing.assert_close(layer(half), linear(half))
    layer(half).zero_()
    torch.testing.assert_close(layer(text), linear(text))
    assert rows == [ROWS] * 4
    for one in pair:
        one.load_state_dict({"weight": torch.ones(OUT, WIDTH)})
    torch.testing.assert_close(layer(text), linear(text))
    text.data = torch.randn(ROWS, LENGTH, WIDTH)
    torch.testing.assert_close(layer(text), linear(text))
    torch.testing.assert_close(layer(torch._neg_view(text)), -linear(text))


def test_results_end_with_their_text_and_are_not_copied(pair: tuple[nn.Linear, TextLinear]) -> None:
    (_, layer), text = pair, torch.randn(ROWS, LENGTH, WIDTH)
    layer(torch.randn(1, LENGTH, WIDTH))
    kept = layer.derived["texts"][1]
    assert len(kept) == 0
    other = torch.randn(1, LENGTH, WIDTH)
    layer(other), layer(text)
    assert len(kept) == 1  # the last text's
    assert copy.deepcopy(layer).derived == {}
    del text
    gc.collect()
    assert len(kept) == 0


def test_nothing_is_kept_where_it_is_of_no_use_to_others(pair: tuple[nn.Linear, TextLinear], rows: list[int]) -> None:
    (linear, layer), text = pair, torch.randn(ROWS, LENGTH, WIDTH)
    asked = text.clone().requires_grad_()
    (found,), (expected,) = (torch.autograd.grad(one(asked).square().sum(), asked) for one in (layer, linear))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(grad(lambda x, one=one: one(x).square().sum())(text) for one in (layer, linear)))
    torch.testing.assert_close(*(vmap(one)(text[:, None]) for one in (layer, linear)))
    torch.testing.assert_close(*(jvp(one, (text,), (text,)) for one in (layer, linear)))
    with torch.inference_mode():
        layer(text), layer(text.clone())
    with FlopCounterMode(display=False):
        layer(text)
    done = len(rows)
    x = torch.randn(ROWS, LENGTH, OUT, requires_grad=True)
    (x * layer(text)).sum().backward()  # which results of inference mode would refuse
    torch.testing.assert_close(x.grad, linear(text))
    assert rows[done:] == [ROWS]


@pytest.fixture
def models(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Model, Model]]:
    """A model without packed layers, and the same with all layers packed."""
    plain, packed = (copy.deepcopy(tiny_model.unet) for _ in range(2))
    monkeypatch.setattr(accelerate, "_LARGE", 0)
    yield replace(tiny_model, unet=plain), replace(tiny_model, unet=accelerate.prepare_unet(packed))


def louder(site: Site, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    k *= 1.25  # in place, which no edit should do
    return k, v


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": ["a cat", "a red cat"], "boxes": {"cat": (0.1, 0.1, 0.6, 0.7)}, "negative_prompt": "blurry"},
        {"prompt": "a [red:blue:0.5] cat", "syntax": "a1111", "guidance_interval": (0.5, 5.0)},
        {"prompt": "a cat AND a dog", "syntax": "a1111"},
        {"regions": [minidiff.Region("a dog", (0.0, 0.0, 0.5, 1.0))], "edits": [Edit(minidiff.cross, kv=louder)]},
    ],
    ids=lambda options: "-".join(options),
)
def test_pictures_are_the_same(models: tuple[Model, Model], options: dict[str, object]) -> None:
    given = {"prompt": "a cat and a ball", "steps": 2, "seed": 5, "output": "latents", **options}
    expected, found = (minidiff.generate(**given, model=model).latents for model in models)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_a_run_computes_its_text_once(models: tuple[Model, Model], rows: list[int]) -> None:
    """With guided passes, which read half of it. Afterwards nothing is kept; new weights mean new results."""
    plain, packed = models
    layers = [layer for layer in packed.unet.modules() if isinstance(layer, TextLinear)]
    how = minidiff.Guidance(minidiff.layout_loss, scale=30.0, threshold=0.0, iterations=1, steps=1)
    given = {"boxes": {"cat": (0.1, 0.1, 0.6, 0.7)}, "steps": 2, "seed": 5, "guidance": how, "output": "latents"}
    for layer in layers:
        layer(torch.randn(2, 77, 64))  # packs its weights
    rows.clear()
    latents = minidiff.generate("a cat", **given, model=packed).latents
    assert rows == [2] * len(layers) == [2] * len(packed.unet.sites)  # keys and values at every second site
    assert not any(layer.derived["texts"][1] for layer in layers)
    changes = {name: value * 1.5 for name, value in plain.unet.state_dict().items() if "attn2.to_k" in name}
    changed, expected = (replace(one, unet=with_weights(one.unet, changes)) for one in (packed, plain))
    run = minidiff.sample_steps("a cat", **given, model=packed)
    next(run)  # the other model's layers have nothing of its texts
    pictures = [minidiff.generate("a cat", **given, model=model).latents for model in (changed, expected)]
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-3)
    assert torch.equal([*run][-1].latents, latents) and not torch.allclose(pictures[0], latents, atol=1e-2)
