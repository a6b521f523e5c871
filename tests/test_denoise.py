"""What runs in a step: guidance in an interval of noise levels, and deep layers that are reused."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import minidiff
from bench.models import SD15
from minidiff.denoise import Denoise
from minidiff.model import Model
from minidiff.networks.config import UNetConfig
from minidiff.networks.unet import DEEP, UNet

BOXES = {"cat": (0.1, 0.1, 0.6, 0.7)}
EVERYWHERE, NOWHERE = (0.0, 1e3), (1e3, 2e3)


def drawn(model: Model, prompt: str = "a cat", steps: int = 6, **options: object) -> minidiff.Result:
    return minidiff.generate(prompt, model=model, steps=steps, sampler="ddim", seed=5, output="latents", **options)


@contextmanager
def counted(unet: UNet) -> Iterator[Counter]:
    """How many rows pass the first, the last and the middle layers."""
    rows: Counter = Counter()

    def add(name: str) -> object:
        return lambda module, inputs, output: rows.update({name: len(inputs[0])})

    layers: dict[str, nn.Module] = {"first": unet.conv_in, "last": unet.conv_out, "middle": unet.mid_block.resnets[0]}
    hooks = [layer.register_forward_hook(add(name)) for name, layer in layers.items()]
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


# --- layers that are reused


def test_what_deep_layers_returned_stands_for_them(tiny_model: Model) -> None:
    """With other latents: the whole network, given the old result where the last layers begin."""
    unet, context = tiny_model.unet, torch.randn(2, 77, tiny_model.text.width)
    x, near, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor(500.0)
    with torch.no_grad():
        plain, _ = unet(x, t, context)
        eps, maps = unet(x, t, context, None, (), {}, True)
        assert torch.equal(eps, plain)
        assert torch.equal(unet(x, t, context, None, (), {}, maps[DEEP])[0], plain)
        found, kept = unet(near, t, context, None, (), {}, maps[DEEP])

        def instead(layer: nn.Module, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            y, emb = inputs
            return torch.cat([maps[DEEP], y[:, maps[DEEP].shape[1] :]], dim=1), emb

        hook = unet.up_blocks[-1].resnets[-2].register_forward_pre_hook(instead)
        try:
            expected, _ = unet(near, t, context)
        finally:
            hook.remove()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert kept == {} and (found - unet(near, t, context)[0]).abs().max() > 1e-3


@pytest.mark.slow
def test_a_reused_step_of_sd_15_is_a_quarter_of_a_step() -> None:
    """In operations, counted on a device that holds no values."""
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict(SD15.unet))
        given = torch.empty(2, 4, 64, 64), torch.empty(()), torch.empty(2, 77, 768)
    counts, deep = [], True
    for _ in range(2):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            _, maps = unet(*given, None, (), {}, deep)
        deep = maps.get(DEEP)
        counts.append(counter.get_total_flops())
    assert counts[1] / counts[0] == pytest.approx(0.224, abs=0.002)


def test_sites_that_run_in_each_step(tiny_model: Model) -> None:
    unet = tiny_model.unet
    record = minidiff.Record(frozenset(unet.sites), minidiff.HEAD_MEAN, rows="all")
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, tiny_model.text.width)
    with torch.no_grad():
        _, maps = unet(x, 500.0, context, record, (), {}, True)
        _, kept = unet(x, 500.0, context, record, (), {}, maps[DEEP])
    assert set(kept) == {site for site in unet.sites if not unet.is_deep(site)}
    assert all(torch.equal(kept[site], maps[site]) for site in kept)


@pytest.mark.parametrize(
    ("options", "middle"),
    [
        ({}, 3),
        ({"guidance_scale": 1.0}, 3),
        ({"attention": True}, 7),  # it reads deep layers
        ({"edits": minidiff.Edit(minidiff.cross, bias=lambda site, grid, inputs: inputs["bias"], steps=1)}, 3),
        ({"prompt": "a [cat:dog:3]", "syntax": "a1111"}, 3),
    ],
    ids=["plain", "one half", "recorded", "edited in the first step", "another text"],
)
def test_deep_layers_run_in_every_third_step(tiny_model: Model, options: dict[str, object], middle: int) -> None:
    if "edits" in options:
        options = {**options, "inputs": {"bias": torch.zeros(1, 1, 1, 1, 77)}}
    both = 1 if options.get("guidance_scale") == 1 else 2
    with counted(tiny_model.unet) as rows:
        drawn(tiny_model, **{"steps": 7, "cache_interval": 3, **options})
    assert rows == {"first": 7 * both, "last": 7 * both, "middle": middle * both}


@pytest.mark.parametrize("weights", [None, torch.tensor([[1.0, 0.5]])], ids=["plain", "AND"])
def test_at_the_same_latents_a_reused_step_is_the_step(tiny_model: Model, weights: Tensor | None) -> None:
    """Each of the texts that AND joins reuses its own."""
    context = torch.randn(2, 77 * (1 if weights is None else 2), tiny_model.text.width)
    denoise = Denoise(tiny_model, [context], 7.5, 0.0, None, (), [{}], weights, every=2)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor(500.0)
    with counted(tiny_model.unet) as rows:
        (first, _), (second, _), (third, _) = (denoise(x, t, 1.0, index) for index in range(3))
    assert torch.equal(first, second) and torch.equal(first, third)
    assert 3 * rows["middle"] == 2 * rows["last"]


def test_guidance_towards_boxes_looks_with_all_layers(tiny_model: Model) -> None:
    how = minidiff.Guidance(minidiff.layout_loss, steps=2, iterations=2, threshold=0.0)
    plain, reused = (drawn(tiny_model, boxes=BOXES, guidance=how, cache_interval=n) for n in (1, 3))
    assert reused.reports[0].iterations == (2, 2)
    torch.testing.assert_close(reused.reports[0].loss[0], plain.reports[0].loss[0], rtol=0, atol=0)


# --- guidance in an interval


def test_the_interval_decides_which_steps_run_both_halves(tiny_model: Model) -> None:
    run = minidiff.sample_steps("a cat", model=tiny_model, steps=6, sampler="ddim", guidance_interval=(0.5, 5))
    inside = sum(0.5 < step.sigma <= 5 for step in run)
    assert 0 < inside < 6
    with counted(tiny_model.unet) as seen:
        drawn(tiny_model, guidance_interval=(0.5, 5))
    assert seen["first"] == 2 * inside + (6 - inside)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention": True},
        {"guidance_rescale": 0.5},
        {"boxes": BOXES, "guidance": "none", "edits": minidiff.regional_prompting(4.0)},
        {"regions": [minidiff.Region("a dog", (0, 0, 0.5, 1))]},
        {"cache_interval": 2},
    ],
    ids=["plain", "attention", "rescaled", "edited", "regions", "cached"],
)
def test_everywhere_is_the_default_and_nowhere_is_scale_1(tiny_model: Model, options: dict[str, object]) -> None:
    plain, everywhere = (drawn(tiny_model, **options, guidance_interval=one) for one in (None, EVERYWHERE))
    assert torch.equal(plain.latents, everywhere.latents)
    nowhere, alone = (
        drawn(tiny_model, **options, guidance_interval=NOWHERE),
        drawn(tiny_model, **options, guidance_scale=1),
    )
    torch.testing.assert_close(nowhere.latents, alone.latents, rtol=0, atol=1e-5)
    assert (nowhere.latents - plain.latents).abs().max() > 1e-3
    if "attention" in options:
        for site, found in nowhere.attention.maps.items():
            torch.testing.assert_close(found, alone.attention.maps[site], rtol=0, atol=1e-5)


def test_texts_joined_by_and_keep_their_unconditional_half(tiny_model: Model) -> None:
    options = {"prompt": "a cat AND a dog", "syntax": "a1111"}
    nowhere, alone = (
        drawn(tiny_model, **options, **one) for one in ({"guidance_interval": NOWHERE}, {"guidance_scale": 1})
    )
    torch.testing.assert_close(nowhere.latents, alone.latents, rtol=0, atol=1e-5)


def test_unconditional_rows_are_not_recorded_outside(tiny_model: Model) -> None:
    record = minidiff.Record(minidiff.cross, minidiff.HEAD_MEAN, rows="uncond")
    with pytest.raises(ValueError, match="outside guidance_interval no unconditional rows run"):
        drawn(tiny_model, attention=record, guidance_interval=(0.28, 5.42))


def test_they_stand_in_the_recipe(tiny_model: Model) -> None:
    result = drawn(tiny_model, steps=2, guidance_interval=(0.28, 5.42), cache_interval=2)
    (parameters,) = result.parameters
    assert (parameters["guidance_interval"], parameters["cache_interval"]) == ([0.28, 5.42], 2)
    again = minidiff.generate(**{**parameters, "model": tiny_model, "output": "latents"})
    assert torch.equal(again.latents, result.latents)


# --- looks that a step's own maps decide


def how(threshold: float | tuple[float, ...], watch: bool) -> minidiff.Guidance:
    return minidiff.Guidance(minidiff.layout_loss, 1e-9, threshold, iterations=2, steps=4, watch=watch)


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1}, {"guidance_interval": (0.5, 5)}], ids=str)
def test_a_step_sees_the_loss_of_a_look(tiny_model: Model, options: dict[str, object]) -> None:
    """Hardly anything moves, so that the look before a step and the step have the same latents. A threshold just above
    the loss of the step before saves a look, one just below does not.
    """
    looked = drawn(tiny_model, **options, steps=4, boxes=BOXES, guidance=how(0.0, False)).reports[0]
    assert looked.steps == (0, 1, 2, 3)
    first, second, third, _ = looked.loss.tolist()
    thresholds = (0.0, first + 1e-5, second - 1e-5, third + 1e-5)
    watched = drawn(tiny_model, **options, steps=4, boxes=BOXES, guidance=how(thresholds, True)).reports[0]
    assert watched.steps == (0, 2)


def test_looks_that_are_needed_are_made(tiny_model: Model) -> None:
    plain, watched = (
        drawn(tiny_model, steps=4, boxes=BOXES, guidance=replace(how(0.0, watch), scale=30.0))
        for watch in (False, True)
    )
    assert watched.reports[0].iterations == plain.reports[0].iterations == (2, 2, 2, 2)
    torch.testing.assert_close(watched.latents, plain.latents, rtol=0, atol=1e-4)
    assert watched.parameters[0]["guidance"]["watch"] and "watch" not in plain.parameters[0]["guidance"]


@pytest.mark.parametrize("options", [{"attention": True}, {"cache_interval": 2}], ids=["recorded", "reused"])
def test_all_looks_are_made_where_a_step_is_not_watched(tiny_model: Model, options: dict[str, object]) -> None:
    given = {**options, "steps": 4, "boxes": BOXES}
    plain, watched = (drawn(tiny_model, **given, guidance=how(1e9, watch)) for watch in (False, True))
    assert watched.reports[0].steps == (0, 1, 2, 3) and torch.equal(watched.latents, plain.latents)
