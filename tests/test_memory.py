"""Memory use at SD 1.5's size, computed from shapes and so machine-independent (bench memory measures it)."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from live import peak, shapes_only
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import minidiff
from bench.models import SD15
from bench.networks import Inputs, guided_pass, layout_guide
from minidiff.networks.attention import HEAD_MEAN, Keep, Record
from minidiff.networks.config import UNetConfig, VAEConfig
from minidiff.networks.sites import choose, self_
from minidiff.networks.unet import UNet
from minidiff.networks.vae import VAE
from minidiff.speed.strips import by_strips

Network = TypeVar("Network", bound=nn.Module)


def guided(images: int, edge: int = 64) -> int:
    """Peak of a guided pass."""
    mode, unet = _network(lambda: UNet(UNetConfig()))
    with mode:
        inputs = Inputs.random(SD15, torch.float32, images, edge, edge)
    call = guided_pass(layout_guide(unet, inputs), inputs)
    with mode:
        return peak(call)


def step(images: int, edge: int = 64, keep: Keep | None = None) -> int:
    """Peak of a step with classifier-free guidance."""
    mode, unet = _network(lambda: UNet(UNetConfig()))
    record = None if keep is None else Record(choose(self_, unet.positions(edge, edge)), keep)
    with mode, torch.no_grad():
        inputs = Inputs.random(SD15, torch.float32, 2 * images, edge, edge)
        return peak(lambda: unet(inputs.x, inputs.t, inputs.context, record))


def decode(edge: int) -> int:
    """Peak of decoding latents to an image."""
    mode, vae = _network(lambda: by_strips(VAE(VAEConfig())))
    with mode, torch.no_grad():
        latents = torch.empty(1, 4, edge, edge)
        return peak(lambda: vae.decode(latents))


def _network(make: Callable[[], Network]) -> tuple[FakeTensorMode, Network]:
    with shapes_only() as mode:
        return mode, make().eval().requires_grad_(False)


def test_what_is_counted() -> None:
    def call() -> torch.Tensor:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1  # 8,000
        del a
        c = b.view(10, 100)[3] * 2  # 4,400
        c += 1
        return torch.cat([b, c])  # 8,800

    assert peak(call) == 8800
    x = torch.ones(1000, requires_grad=True)
    assert peak(lambda: torch.autograd.grad(x.exp().exp().sum(), x)) >= 8004  # both are kept for the gradient


@pytest.mark.slow
def test_guided_passes() -> None:
    """The published method takes 5.2 GB for one."""
    one = guided(1)
    assert one <= 0.75e9
    assert guided(4) <= 4.02 * one
    assert guided(1, 128) <= 4.05 * one, "a large image takes more than its pixels"


@pytest.mark.slow
def test_steps() -> None:
    one = step(1)
    assert one <= 0.28e9
    assert step(4) <= 4.02 * one
    assert step(1, 128) <= 4.05 * one
    assert step(1, keep=HEAD_MEAN) <= 2**27 + 5 * 4 * 4096**2 + one  # the maps of five layers, and part of another


@pytest.mark.slow
def test_decoding() -> None:
    whole, large = decode(64), decode(128)
    assert whole <= 0.62e9
    assert large <= 4 * whole


@pytest.mark.slow
def test_nothing_grows_with_the_steps(tiny_folder: Path) -> None:
    model = minidiff.load(tiny_folder)
    every = minidiff.Guidance(threshold=0.0, iterations=1, steps=100)
    boxes = {"cat": (0, 0, 0.5, 1)}

    def run(steps: int) -> int:
        return peak(
            lambda: minidiff.generate(
                "a cat", model=model, steps=steps, boxes=boxes, guidance=every, attention=True, seed=0
            )
        )

    run(2)  # packed on first use
    few, many = run(5), run(11)  # both have the four outputs that PNDM keeps
    assert few > 1e5
    latents = 4 * 4 * 8 * 8
    assert many - few < 6 * latents / 2  # six more steps add numbers to the report, but nothing of image size


@pytest.mark.slow
def test_images_of_a_batch_are_decoded_one_by_one(tiny_folder: Path) -> None:
    model = minidiff.load(tiny_folder)

    def run(images: int, output: str) -> int:
        return peak(
            lambda: minidiff.generate(
                "a cat", model=model, steps=2, width=64, height=64, images_per_prompt=images, output=output, seed=0
            )
        )

    one = run(1, "tensor")
    pixels = 4 * 3 * 64**2
    assert run(8, "tensor") <= max(one + 3 * 8 * pixels, run(8, "latents") + 3 * 8 * pixels)
