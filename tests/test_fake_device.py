"""Runs on a device that holds no values: the meta device stands for a card, so that a tensor left on the CPU, and a
number read from the device where none should be, are errors here as they would be (or cost) there."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import minidiff
from minidiff.guidance.evaluate import evaluate, look_loss
from minidiff.guidance.layout import Layout, PlacedObject, make_layout
from minidiff.guidance.objectives import OBJECTIVES
from minidiff.model import Model
from minidiff.networks.attention import Inputs
from minidiff.networks.sites import Grid, Site
from minidiff.networks.text import TextEncoder
from minidiff.networks.unet import UNet
from minidiff.networks.vae import VAE

CARD = torch.device("meta")


@pytest.fixture
def model(tiny_model: Model) -> Model:
    """The tiny model on that device."""
    text = tiny_model.text
    with CARD:
        networks = UNet(tiny_model.unet.config), VAE(tiny_model.vae.config), type(text.model)(text.model.config)
    unet, vae, encoder = (network.eval().requires_grad_(False) for network in networks)
    return replace(tiny_model, unet=unet, vae=vae, text=TextEncoder(text.tokenizer, text.length, encoder))


def context(model: Model, rows: int) -> Tensor:
    return torch.empty(rows, model.text.length, model.text.width, device=CARD)


def layout_of(model: Model, images: int) -> Layout:
    """Of one box an image."""
    grids = {at.grid for at in model.unet.positions(8, 8).values()}
    region = PlacedObject("cat", (2,), ((0.1, 0.1, 0.6, 0.7),))
    return make_layout([[region]] * images, [3] * images, model.text.length, grids, CARD)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention": True},
        {"attention": minidiff.Record(minidiff.cross, minidiff.BOX_MASS), "guidance": "none"},
        {"edits": minidiff.regional_prompting(4.0), "guidance": "none"},
        {"edits": minidiff.forward_guidance(0.5), "guidance": "none"},
        {"sampler": "euler_ancestral"},
        {"guidance_rescale": 0.5},
        {"cache_interval": 2, "guidance_interval": (0.28, 5.42)},
    ],
    ids=["plain", "attention", "box masses", "regional", "forward", "stochastic", "rescaled", "fast"],
)
def test_a_step_stays_on_the_device(model: Model, options: dict[str, object]) -> None:
    boxes = {"cat": (0.1, 0.1, 0.6, 0.7)} if options.get("guidance") == "none" else None
    run = minidiff.sample_steps(
        "a cat", model=model, steps=3, width=64, height=64, seed=[1, 2], images_per_prompt=2, boxes=boxes, **options
    )
    for step in run:
        assert step.latents.device == step.denoised.device == CARD
        assert all(kept.device == CARD for kept in step.maps.values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_look_and_its_gradient_stay_on_the_device(model: Model, name: str) -> None:
    bound, layout = OBJECTIVES[name].bound(model.unet.positions(8, 8)), layout_of(model, 2)
    x, t = torch.empty(2, 4, 8, 8, device=CARD, requires_grad=True), torch.empty((), device=CARD)
    total, found = look_loss(
        x, model.unet.forward, bound, bound.record, (), t, context(model, 2), layout, layout.inputs()
    )
    (gradient,) = torch.autograd.grad(total, x)
    assert {value.device for value in (total, gradient, *found)} == {CARD}


def test_decoding_and_encoding_stay_on_the_device(model: Model) -> None:
    images = model.vae.decode(torch.empty(1, 4, 8, 8, device=CARD))
    assert images.device == model.vae.encode(images).device == CARD
    assert model.text.encode(["a cat"]).device == CARD


def test_a_look_waits_for_the_device_once(model: Model) -> None:
    """For its losses, which decide whether to go on: whatever else were read before them would raise another error."""
    bound, layout = OBJECTIVES["layout"].bound(model.unet.positions(8, 8)), layout_of(model, 2)
    x, t = torch.empty(2, 4, 8, 8, device=CARD), torch.empty((), device=CARD)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        evaluate(x, model.unet.forward, bound, bound.record, (), t, context(model, 2), layout, layout.inputs())


def test_a_constant_on_the_cpu_is_an_error(model: Model) -> None:
    edit = minidiff.Edit(minidiff.cross, bias=_on_the_cpu)
    with pytest.raises(RuntimeError, match="device"):
        next(minidiff.sample_steps("a cat", model=model, steps=2, width=64, height=64, edits=edit))


def _on_the_cpu(site: Site, grid: Grid, inputs: Inputs) -> Tensor:
    return torch.zeros(grid).unsqueeze(-1)
