"""Runs on a device that holds no values: the meta device stands for a card, so that a tensor left on the CPU, and a
number read from the device where none should be, are errors here as they would be (or cost) there."""

import sys
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import minidiff
from minidiff.guidance.evaluate import evaluate, look_loss
from minidiff.guidance.layout import Layout, PlacedObject, make_layout
from minidiff.guidance.objectives import OBJECTIVES
from minidiff.model import Model
from minidiff.networks import resample
from minidiff.networks.attention import Inputs, mask_name
from minidiff.networks.norm import GroupNorm, LayerNorm
from minidiff.networks.resample import Upsample
from minidiff.networks.sites import Grid, Site
from minidiff.networks.text import TextEncoder
from minidiff.networks.transformer import GEGLU, Transformer
from minidiff.networks.unet import ResBlock, UNet
from minidiff.networks.vae import VAE
from minidiff.speed import fused, keeps

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


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch knows no CUDA")
@pytest.mark.parametrize("keep", [minidiff.ALL, minidiff.HEAD_MEAN, minidiff.COLUMNS, minidiff.BOX_MASS])
def test_a_recorded_step_takes_every_fused_kernel(
    model: Model, keep: minidiff.Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors of a card that is not there; kernels are counted, not run."""
    ran: Counter[str] = Counter()

    class Kernels(ModuleType):
        power_of_2 = staticmethod(lambda n: 1 << (n - 1).bit_length())

        def __getattr__(self, name: str) -> object:
            return defaultdict(lambda: lambda *_, **__: ran.update([name]))

    for name in ("triton_kernels", "triton_keeps"):
        monkeypatch.setitem(sys.modules, f"minidiff.speed.{name}", Kernels(name))
        monkeypatch.setattr(minidiff.speed, name, Kernels(name), raising=False)
    monkeypatch.setattr(resample, "LEAST", 0)
    monkeypatch.setattr(fused, "find_spec", bool)
    monkeypatch.setattr(fused, "works", lambda *_: True)
    monkeypatch.setattr(keeps, "works", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    unet, there = fused.fuse(model.unet), model.unet.positions(8, 8)
    record = minidiff.Record(frozenset(site for site in unet.sites if site.kind == "cross"), keep)
    layers = [one for one in unet.modules() if isinstance(one, GroupNorm | LayerNorm | GEGLU | ResBlock | Transformer)]
    expected = Counter(type(one).__name__ for one in layers)
    with FakeTensorMode(), torch.no_grad():
        for module in unet.modules():
            for name, old in module._parameters.items():
                if old is not None:
                    new = torch.empty(old.shape, device="cuda", dtype=torch.float16)
                    new = new.contiguous(memory_format=torch.channels_last) if new.ndim == 4 else new
                    module._parameters[name] = torch.nn.Parameter(new, requires_grad=False)
        x, text = (torch.empty(n, device="cuda", dtype=torch.float16) for n in ((4, 4, 8, 8), (4, 77, 64)))
        inputs = {mask_name(at.grid): torch.empty(2, 3, *at.grid, device="cuda") for at in there.values()}
        inputs["token_weights"] = torch.empty(2, 3, 77, device="cuda")
        eps, maps = unet(x, torch.empty((), device="cuda"), text, record, (), inputs)
    assert eps is not None and eps.shape == x.shape and eps.is_contiguous(memory_format=torch.channels_last)
    assert ran["moments"] == ran["combine"] == ran["apply"] == expected["GroupNorm"] + expected["GroupNormSiLU"]
    assert (ran["layer_norm"], ran["gated_gelu"]) == (expected["LayerNorm"], expected["GEGLU"])
    assert ran["total"] == expected["Transformer"] and ran["add"] == expected["Transformer"] + expected["ResBlock"]
    assert ran["fold"] == ran["interleave"] == sum(isinstance(one, Upsample) for one in unet.modules()) > 0
    assert ran["log_sums"] == len(maps) == len(record.kinds) == ran["means"] + ran["columns"] + ran["mask_sums"]
    for site, kept in maps.items():
        (height, width), tokens = there[site].grid, 77
        heads = kept.shape[1]
        shapes = {
            "ALL": (2, heads, height, width, tokens),
            "HEAD_MEAN": (2, height, width, tokens),
            "COLUMNS": (2, heads, height, width, 3),
            "BOX_MASS": (2, heads, 3, tokens),
        }
        assert tuple(kept.shape) == shapes[keep.name]


def _on_the_cpu(site: Site, grid: Grid, inputs: Inputs) -> Tensor:
    return torch.zeros(grid).unsqueeze(-1)
