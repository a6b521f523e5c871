"""speed/fused.py without a card: Triton's kernels in its interpreter, and what surrounds them."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from minidiff.networks.attention import AttentionLayer
from minidiff.networks.config import UNetConfig
from minidiff.networks.norm import GroupNorm
from minidiff.networks.unet import UNet
from minidiff.speed import fused
from minidiff.speed.capture import _NoWaits
from minidiff.speed.fused import PointConv2d

CODE = """
import contextlib, torch
from minidiff.speed import fused
torch.cuda.device_of = lambda x: contextlib.nullcontext()
fused._usable = lambda norm, x: True
from minidiff.networks import resample
resample.LEAST = 0
for channels in (16, 32, 40):
    apart = fused._apart(torch.device("cpu"), torch.float32, channels)
    assert 0 < apart < 2e-6, (channels, apart)
    assert 2e-6 < fused._apart(torch.device("cpu"), torch.float16, channels) < 2e-2
norm = fused._fused(fused.GroupNorm(4, 24, 1e-5))
for shape in ((1, 24, 33, 130), (3, 24, 1, 1)):
    x = (torch.randn(shape) + 100).to(memory_format=torch.channels_last)  # a mean that would drown the variance
    with torch.no_grad():
        found, expected = norm(x), fused.GroupNorm.plain(norm.double(), x.double())
        norm.float()
    assert (found - expected).abs().max() < 1e-3, (shape, (found - expected).abs().max())
"""
BLOCKS = """
import contextlib, torch
import torch.nn.functional as F
from minidiff.networks.attention import HEAD_MEAN, Hooks
from minidiff.networks.config import UNetConfig
from minidiff.networks.sites import Site
from minidiff.networks.transformer import Transformer
from minidiff.networks.resample import Upsample
from minidiff.networks import resample
from minidiff.speed import fused, triton_kernels as kernels
torch.cuda.device_of = lambda x: contextlib.nullcontext()
fused._usable = lambda norm, x: True
resample.LEAST = 0
torch.set_grad_enabled(False)

class Seen:
    def __init__(self, kernel):
        self.kernel, self.times = kernel, 0
    def __getitem__(self, grid):
        self.times += 1
        return self.kernel[grid]

def close(found, expected):
    assert (found - expected).abs().max() < 3e-6 * expected.abs().max()

kernels.total, kernels.interleave = Seen(kernels.total), Seen(kernels.interleave)
cross, self_ = Site("mid", 0, 0, "cross"), Site("mid", 0, 0, "self")
for linear in (False, True):
    config = UNetConfig(block_out_channels=(24,), num_heads=(3,), cross_attention_dim=20, norm_num_groups=8,
                        use_linear_projection=linear)
    layer = fused._fused(Transformer(config, "mid", 0, 0, 0).to(memory_format=torch.channels_last))
    x = torch.randn(2, 24, 3, 2).to(memory_format=torch.channels_last)
    context, given = torch.randn(2, 7, 20), x.clone()
    for stop in (None,) if linear else (None, cross, self_):
        hooks = Hooks({cross: HEAD_MEAN, self_: HEAD_MEAN}, "cond", (), {}, stop)
        before = kernels.total.times
        (found, maps), (expected, others) = layer(x, context, hooks), layer.plain(x, context, hooks)
        assert kernels.total.times == before + 1 and torch.equal(x, given) and list(maps) == list(others)
        assert (found is None) == (expected is None) == (stop is not None)
        for one in maps:
            close(maps[one], others[one])
        if stop is None:
            close(found, expected)
            assert found.is_contiguous(memory_format=torch.channels_last)
for channels, size, batch, wide in ((6, (5, 3), 2, 2**12), (5, (1, 3), 2, 8)):
    fused._WIDE, calls = wide, 1 if 4 * channels < wide else 4
    layer = fused._fused(Upsample(channels))
    x = torch.randn(batch, channels, *size)
    for order in (torch.contiguous_format, torch.channels_last):
        before = kernels.interleave.times
        found = layer(x.to(memory_format=order), (2 * size[0], 2 * size[1]))
        assert kernels.interleave.times == before + calls
        close(found, layer.conv(F.interpolate(x, scale_factor=2, mode="nearest")))
    layer(x, (2 * size[0] - 1, 2 * size[1]))  # what is not doubled
    layer.conv.register_forward_hook(lambda *_: None)
    close(layer(x, (2 * size[0], 2 * size[1])), found)
    assert kernels.interleave.times == before + calls
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("code", [CODE, BLOCKS], ids=["layers", "blocks"])
def test_kernels_equal_torchs_layers(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"TRITON_INTERPRET": "1"})


BUILD = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from minidiff.speed import triton_keeps, triton_kernels
SIZES = {"TILE": 32, "DEPTH": 64, "EACH": 8, "OBJECTS": 16, "ROWS": 64, "BLOCK": 128, "STRIPS": 64}
SIZES |= {"WIDTH": 16, "SHIFT": True, "SILU": True, "MORE": True, "LESS": 3, "SHARES": 4}
FLOATS, NUMBERS = ("parts", "scales", "sums", "out", "weights", "masks"), ("scale", "eps")
GIVEN = ("q", "k", "x", "y", "both", "shift", "bias", "weight", "other", "more", *FLOATS)
GIVEN += ("first", "second", "third", "fourth")
built = 0
for kernels in (triton_keeps, triton_kernels):
    for name, kernel in vars(kernels).items():
        if not isinstance(kernel, triton.JITFunction) or name.startswith("_"):
            continue
        types = {
            one: "constexpr" if one in SIZES else "*fp32" if one in FLOATS
            else "*fp16" if one in GIVEN else "fp32" if one in NUMBERS else "i32"
            for one in kernel.arg_names
        }
        sizes = {(i,): SIZES[one] for i, one in enumerate(kernel.arg_names) if one in SIZES}
        source = ASTSource(kernel, types, constexprs=sizes)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).metadata.shared <= 48 * 2**10, name
        built += 1
assert built == 13, built
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_are_built_for_a_card_that_is_not_there(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", BUILD], check=True, env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)})


def test_a_point_convolution_keeps_its_weights_and_result() -> None:
    network = nn.Sequential(nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1, stride=2))
    x = torch.randn(2, 6, 5, 5)
    expected, names = network(x), list(network.state_dict())
    assert [type(layer) for layer in fused.fuse(network)] == [PointConv2d, nn.Conv2d, PointConv2d]
    torch.testing.assert_close(network(x), expected, rtol=0, atol=0)
    assert list(network.state_dict()) == names


def test_a_broken_compiler_is_told_of_and_costs_speed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    fused.works.cache_clear()
    monkeypatch.setattr(fused, "find_spec", lambda name: True)
    monkeypatch.setattr(fused, "_apart", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="Triton's fail here .ZeroDivisionError: division by zero"):
        unet = fused.fuse(UNet(UNetConfig(block_out_channels=(32,) * 4, cross_attention_dim=8)))
    for module in unet.modules():
        assert not isinstance(module, GroupNorm | AttentionLayer) or module.fused is None
    fused.works.cache_clear()
    monkeypatch.setattr(fused, "_apart", lambda *_: 0.5)
    with pytest.warns(UserWarning, match="a small layer's result is 5e-01 off"):
        assert not fused.works(fused._apart, torch.device("cpu"), torch.float32, 16)
    fused.works.cache_clear()


def test_memory_that_is_missing_is_no_broken_compiler() -> None:
    left = [0.0]

    def apart(*_: object) -> float:
        if not left:
            return 0.0
        left.clear()
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        fused.works(apart, torch.device("cpu"), torch.float32, 0)
    assert fused.works(apart, torch.device("cpu"), torch.float32, 0)


def test_kernels_are_tried_where_nothing_may_wait() -> None:
    with _NoWaits():
        assert fused.works(lambda *_: float(torch.zeros(3).sum()), torch.device("cpu"), torch.float32, 0)


def test_layers_with_hooks_are_called() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1)
    assert fused._bare(layer)
    layer.register_forward_hook(lambda *_: None)
    assert not fused._bare(layer)
    assert not fused._bare(nn.Sequential(layer)) and not fused._bare(nn.Conv2d(4, 4, 3, bias=False))
