"""speed/strips.py: results by strips equal those of the whole grid."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.networks import transformer, vae as networks_vae
from minidiff.networks.config import VAEConfig
from minidiff.networks.norm import GroupNorm, GroupNormSiLU
from minidiff.networks.transformer import FeedForward
from minidiff.networks.vae import VAE
from minidiff.speed import accelerate, strips
from minidiff.speed.packed import PackedLinear
from minidiff.speed.strips import grow_conv, norm_silu_conv


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows of the grid below at a time."""
    monkeypatch.setattr(strips, "AT_ONCE", 3 * 8 * 7)


def layers(dtype: torch.dtype) -> tuple[GroupNorm, nn.Conv2d]:
    norm, conv = GroupNormSiLU(4, 8, 1e-6), nn.Conv2d(8, 6, 3, padding=1)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm.to(dtype), conv.to(dtype)


def grid(height: int, batch: int = 1) -> Tensor:
    """Rows that differ in mean and spread, so that no strip has the grid's statistics."""
    rows = torch.linspace(-3, 5, height, dtype=torch.float64)[:, None]
    return rows + rows.abs() * torch.randn(batch, 8, height, 7, dtype=torch.float64) + 100


@pytest.mark.parametrize("height", [1, 3, 4, 11])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_equals_the_whole(height: int, batch: int, layout: torch.memory_format) -> None:
    norm, conv = layers(torch.float64)
    x = grid(height, batch).contiguous(memory_format=layout)
    given = x.clone()
    torch.testing.assert_close(
        norm_silu_conv(norm, conv, x), conv(F.silu(nn.GroupNorm.forward(norm, x))), rtol=1e-9, atol=1e-9
    )
    square = nn.Conv2d(8, 8, 3, padding=1).double()
    grown = F.interpolate(x, scale_factor=2, mode="nearest")
    torch.testing.assert_close(grow_conv(square, x), square(grown), rtol=1e-12, atol=1e-12)
    assert torch.equal(x, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_feed_forward_layer_in_strips(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = FeedForward(64).to(dtype).requires_grad_(False)
    prepared, x = accelerate.prepare(nn.Sequential(copy.deepcopy(layer)).to(dtype)), torch.randn(2, 50, 64).to(dtype)
    accelerate.pack(prepared, 0)
    expected, counts = layer(x), list[int]()
    run = PackedLinear.run
    monkeypatch.setattr(PackedLinear, "run", lambda own, x, bias: counts.append(len(x)) or run(own, x, bias))
    monkeypatch.setattr(transformer, "LARGE", 99 * 512)
    monkeypatch.setattr(strips, "_GATED", 12 * 512)
    with torch.no_grad():
        prepared(x[:, 1:])
        assert counts == [2, 2]  # a small one at once
        counts.clear()
        torch.testing.assert_close(prepared(x), expected)
    assert sum(counts) == 200 and max(counts) <= 12
    counts.clear()
    (gradient,) = torch.autograd.grad(prepared(x.requires_grad_()).square().sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(layer(x).square().sum(), x)[0])
    assert sum(counts) == 200 and max(counts) <= 12
    counts.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert prepared(x).dtype == torch.bfloat16
    with torch.no_grad():
        hook = prepared[0].net[2].register_forward_hook(lambda *_: None)
        torch.testing.assert_close(prepared(x), expected)
        hook.remove()
    assert counts == [2, 2]  # a hook sees the whole
    for hook in (
        prepared[0].net[2].register_full_backward_hook(lambda *_: None),
        nn.modules.module.register_module_forward_hook(lambda *_: None),
    ):
        counts.clear()
        prepared(x).sum().backward()
        hook.remove()
        assert counts == [2, 2]


@torch.no_grad()
def test_a_card_gets_its_own_order_of_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's operator for the statistics refuses channels_last there; the meta device stands for a card."""
    monkeypatch.setattr(strips, "_can_divide", lambda x: True)
    whole, seen = torch.native_group_norm, list[bool]()
    monkeypatch.setattr(torch, "native_group_norm", lambda x, *_: seen.append(x.is_contiguous()) or whole(x, *_))
    norm, conv = (layer.to("meta") for layer in layers(torch.float32))
    x = grid(11, 2).to("meta", torch.float32, memory_format=torch.channels_last)
    assert norm_silu_conv(norm, conv, x).shape == (2, 6, 11, 7)
    assert len(seen) == 8 and all(seen)


@torch.no_grad()
def test_half_precision_rounds_once_a_layer() -> None:
    """Statistics are in float32: for values around 100, bfloat16 ones give 3 to 20 times the error."""
    norm, conv = layers(torch.bfloat16)
    x = grid(11).bfloat16()
    found = norm_silu_conv(norm, conv, x)
    assert found.dtype == torch.bfloat16
    expected = conv.double()(F.silu(nn.GroupNorm.forward(norm.double(), x.double())))
    assert (found - expected).abs().max() <= 0.006 * expected.abs().max()


def test_what_has_a_gradient_stays_whole() -> None:
    norm, conv = layers(torch.float64)
    x = grid(11).requires_grad_()
    seen = []
    conv.register_forward_hook(lambda layer, given, out: seen.append(given[0].shape[2]))
    norm_silu_conv(norm, conv, x).sum().backward()
    with torch.no_grad():
        norm_silu_conv(norm, conv, x)
    assert seen == [11, 4, 5, 5, 3]
    assert x.grad is not None


@torch.no_grad()
def test_only_large_grids_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, conv = layers(torch.float64)
    square, x = nn.Conv2d(8, 8, 3, padding=1).double(), grid(11)
    heights: list[int] = []
    for layer in (conv, square):
        layer.register_forward_hook(lambda layer, given, out: heights.append(given[0].shape[2]))
    for large, divided in ((4 * x.numel(), (False, False)), (x.numel(), (False, True)), (x.numel() - 1, (True, True))):
        monkeypatch.setattr(networks_vae, "LARGE", large)
        networks_vae.norm_silu_conv(norm, conv, x, norm_silu_conv)
        first = len(heights)
        networks_vae.grow_conv(square, x, grow_conv)
        assert (first > 1, len(heights) - first > 1) == divided
        heights.clear()


@pytest.mark.parametrize("onednn", [True, False])
def test_a_prepared_autoencoder_works_in_strips(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where layers cannot be packed, e.g. on a Mac's CPU."""
    monkeypatch.setattr(accelerate, "ONEDNN", onednn)
    with torch.device("meta"):
        vae = VAE(VAEConfig())
    monkeypatch.setattr(vae, "parameters", lambda: iter([torch.empty(0)]))  # claims to be on the CPU
    layers = [module for module in accelerate.prepare(vae).modules() if hasattr(module, "norm_silu_conv_strips")]
    assert layers
    assert all(layer.norm_silu_conv_strips is norm_silu_conv for layer in layers)
