"""Layers in int8 against slow formulas in float32: results, gradients, replaced weights, graphs; load(dtype="int8")."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minidiff
from minidiff.cli.main import main
from minidiff.networks.attention import attention
from minidiff.networks.config import UNetConfig
from minidiff.networks.resample import grow_conv
from minidiff.networks.transformer import FeedForward
from minidiff.networks.unet import UNet
from minidiff.speed import device as devices, int8
from minidiff.speed.accelerate import compile_unet
from minidiff.speed.int8 import Int8Conv2d, Int8Linear, attend, quantise, quantise_weight, to_int8
from minidiff.speed.packed import Packed
from minidiff.speed.replace import with_weights

pytestmark = pytest.mark.skipif(not devices._has_int8(), reason="this CPU has no VNNI instructions")
KINDS = {"3x3": (3, 1, 1), "1x1": (1, 1, 0), "stride 2": (3, 2, 1), "unpadded": (3, 2, 0)}
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
ALL = pytest.mark.parametrize("kind", ["linear", *KINDS])


def pair(kind: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[nn.Module, Packed]:
    """torch's layer with random weights and the same one in int8."""
    if kind == "linear":
        linear = nn.Linear(96, 72, bias).to(dtype).requires_grad_(False)
        return linear, Int8Linear(copy.deepcopy(linear))
    kernel, stride, padding = KINDS[kind]
    conv = nn.Conv2d(96, 72, kernel, stride, padding, bias=bias).to(dtype).requires_grad_(False)
    return conv, Int8Conv2d(copy.deepcopy(conv))


def given(kind: str, rows: int = 2, height: int = 9, width: int = 14) -> Tensor:
    """An input whose values are not symmetrical, as behind SiLU."""
    return F.silu(torch.randn(rows, height, width, 96) if kind == "linear" else torch.randn(rows, 96, height, width))


def formula(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer on the values that int8 stands for, in float64 and without oneDNN."""
    least, most = min(x.float().min().item(), 0), max(x.float().max().item(), 0)
    scale = (most - least) / 253
    x = (x.double() / scale).round().clamp(least / scale - 0.5, most / scale + 0.5) * scale
    exact = copy.deepcopy(layer).double()
    for weight in exact.weight:  # per output channel
        step = weight.abs().max() / 127
        weight.copy_((weight / step).round() * step)
    return exact(x)


def apart(found: Tensor, expected: Tensor) -> float:
    """Relative RMS difference."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@BOTH
@ALL
def test_a_layer_is_the_formula(kind: str, dtype: torch.dtype) -> None:
    plain, layer = pair(kind, dtype)
    x = given(kind).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and y.shape == plain(x).shape
    rounding = 1e-3 if dtype == torch.float32 else 4e-3  # a value between two integers may go to either
    assert apart(y, formula(plain, x)) < rounding
    assert 1e-3 < apart(y, copy.deepcopy(plain).double()(x.double())) < 0.015


@ALL
def test_any_size_and_sign_after_the_first_call(kind: str) -> None:
    """Weights are packed for the first input; others differ in size, scale and zero point."""
    plain, layer = pair(kind, bias=False)
    layer(given(kind))
    for x in (
        given(kind, 1, 32, 5),
        given(kind, 3, 4, 4) * 100 + 50,
        -given(kind).abs(),
        given(kind).abs(),
        given(kind).transpose(-2, -1) if kind != "linear" else given(kind).transpose(1, 2),
    ):
        assert apart(layer(x), formula(plain, x)) < 1e-3


def test_an_upsampler_is_in_int8_too() -> None:
    """In float32 it would be computed without the grid of upsampled cells."""
    conv = nn.Conv2d(256, 256, 3, padding=1).requires_grad_(False)
    x, own = torch.randn(1, 256, 8, 8), Int8Conv2d(copy.deepcopy(conv))
    with torch.no_grad():
        found = grow_conv(own, x)
        assert torch.equal(found, own(F.interpolate(x, scale_factor=2, mode="nearest")))
        assert (found - grow_conv(conv, x)).abs().max() > 1e-3 and "int8" in own.derived


def test_inputs_without_a_scale() -> None:
    for kind in ("linear", "3x3"):
        plain, layer = pair(kind)
        torch.testing.assert_close(layer(given(kind) * 0), plain(given(kind) * 0))
        assert layer(given(kind, 0)).shape == plain(given(kind, 0)).shape
        x = given(kind)
        x[0] = torch.nan
        y = layer(x)
        assert y[0].isnan().all() and y[1].isfinite().all()  # the other image is not affected


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 1.0), (-0.28, 7.0), (0.0, 3.0), (-2.0, 0.0), (-1e-20, 1e-20), (-1e4, 3e4)]
)
def test_quantised_values(low: float, high: float) -> None:
    """Nearest values, no overflow at the ends, and an exact zero."""
    for seed in range(20):
        x = torch.rand(999, generator=torch.Generator().manual_seed(seed)) * (high - low) + low
        x[0], x[1], x[2] = low, high, 0
        found = quantise(x)
        assert found is not None
        q, scale, zero = found
        assert q.dtype == torch.uint8 and 1 <= zero <= 254 and q[2] == zero
        assert float((scale * (q.double() - zero) - x.double()).abs().max()) <= scale * 0.5001


def test_quantised_weights() -> None:
    weight = torch.randn(5, 7, 3, 3) * torch.tensor([1, 1e-6, 1e3, 0, 1])[:, None, None, None]
    q, scale = quantise_weight(weight)
    assert q.dtype == torch.int8 and scale.shape == (5,)
    assert q.flatten(1).abs().amax(1).tolist() == [127, 127, 127, 0, 127]
    assert ((q * scale[:, None, None, None] - weight).flatten(1).abs().amax(1) <= 0.5001 * scale).all()


@BOTH
@ALL
def test_gradients_are_those_of_the_float_weights(kind: str, dtype: torch.dtype) -> None:
    plain, layer = pair(kind, dtype)
    x = given(kind).to(dtype)
    grad = torch.randn_like(plain(x))
    expected = torch.func.vjp(plain, x)[1](grad)[0]
    found = torch.func.vjp(layer, x)[1](grad)[0]
    assert apart(found, expected) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert apart(torch.func.vjp(layer, x)[0], formula(plain, x)) < 4e-3  # and the values are int8's


def test_a_transformed_input_takes_the_int8_layer_too() -> None:
    _, layer = pair("linear")
    x = given("linear", 3)
    assert apart(torch.vmap(layer)(x), layer(x)) == 0


# ---- attention and feed-forward layers


def heads(tokens: int, channels: int, rows: int = 1) -> list[Tensor]:
    """q, k and v as an attention layer splits them."""
    return [torch.randn(rows, tokens, 2, channels).transpose(1, 2) for _ in range(3)]


@pytest.mark.parametrize(("tokens", "channels"), [(1024, 40), (1100, 24)])
def test_large_attention_in_bfloat16(tokens: int, channels: int) -> None:
    q, k, v = heads(tokens, channels, 2)
    with torch.no_grad():
        found = attend(q, k, v)
    assert found.dtype == torch.float32 and found.shape == q.shape
    exact = (q.double() @ k.double().mT / channels**0.5).softmax(-1) @ v.double()
    assert 1e-3 < apart(found, exact) < 0.02


def test_small_attention_and_gradients_are_torchs_own() -> None:
    q, k, v = heads(1023, 8)
    assert torch.equal(attend(q, k, v), attention(q, k, v))
    q, k, v = (one.requires_grad_() for one in heads(1024, 8))
    found, expected = (torch.autograd.grad(f(q, k, v).square().sum(), (q, k, v)) for f in (attend, attention))
    assert all(map(torch.equal, found, expected))


def test_a_feed_forward_layer_has_scales_for_each_512_rows() -> None:
    layer = FeedForward(64).requires_grad_(False)
    x = torch.randn(2, 400, 64)
    x[0, 7] *= 100  # whose scale is no matter of the rows from 512 on
    expected = layer(x)
    found = to_int8(nn.Sequential(copy.deepcopy(layer)))(x)
    assert found.shape == x.shape
    assert apart(found[1, 112:], expected[1, 112:]) < 0.05 < apart(found[1, :112], expected[1, :112])


def test_where_a_unet_attends_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    for pays in (True, False):
        monkeypatch.setattr(int8, "_halves_pay", lambda pays=pays: pays)
        unet = to_int8(UNet(UNetConfig(block_out_channels=(16,), norm_num_groups=8)))
        assert (unet.attend is attend) == pays


# ---- networks


class Net(nn.Module):
    """The names of a UNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(64, 96, 3, padding=1)
        self.attn1 = nn.ModuleDict({"to_k": nn.Linear(96, 96)})
        self.attn2 = nn.ModuleDict({"to_k": nn.Linear(96, 96), "to_q": nn.Linear(96, 96)})
        self.conv = nn.Conv2d(96, 64, 3, padding=1)
        self.small = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_in(x).movedim(1, -1)
        y = self.attn2["to_q"](self.attn2["to_k"](self.attn1["to_k"](y)))
        return self.conv(y.movedim(-1, 1))


def net() -> Net:
    return Net().eval().requires_grad_(False)


def test_which_layers_are_quantised() -> None:
    network = to_int8(net())
    found = {path for path, layer in network.named_modules() if isinstance(layer, Int8Linear | Int8Conv2d)}
    assert found == {"attn1.to_k", "attn2.to_q", "conv"}


def test_the_weights_stay_the_same_and_can_be_replaced() -> None:
    plain = net()
    network, x = to_int8(copy.deepcopy(plain)), torch.randn(1, 64, 8, 8)
    before = network(x)
    for name, value in network.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name])
    changes = {"conv.weight": plain.conv.weight * -2, "attn1.to_k.weight": plain.attn1["to_k"].weight + 0.1}
    changed = with_weights(network, changes)
    fresh = copy.deepcopy(plain)
    fresh.load_state_dict({**plain.state_dict(), **changes})
    assert torch.equal(changed(x), to_int8(fresh)(x))
    assert torch.equal(network(x), before) and not torch.equal(changed(x), before)
    assert torch.equal(copy.deepcopy(network)(x), before)
    network.load_state_dict(fresh.state_dict())
    assert torch.equal(network(x), changed(x))


@pytest.mark.slow
def test_compiled_layers_are_the_same() -> None:
    network, x = to_int8(net()), torch.randn(1, 64, 8, 8)
    expected = network(x)
    assert apart(compile_unet(copy.deepcopy(network))(x), expected) < 1e-5


# ---- load


def test_load() -> None:
    exact, model = minidiff.load(dtype="float32", device="cpu"), minidiff.load(dtype="int8", device="cpu")
    assert (model.dtype, model.dtype_name, exact.dtype_name) == (torch.float32, "int8", "float32")
    assert "int8 on cpu" in repr(model)
    x, context = torch.randn(2, 4, 32, 32), model.text.encode(["a red circle", ""])
    with torch.no_grad():
        eps, expected = (one.unet(x, 500, context)[0] for one in (model, exact))
    assert 1e-4 < apart(eps, expected) < 0.05


def test_a_picture_says_int8_and_is_replayed(tmp_path: Path) -> None:
    model = minidiff.load(dtype="int8", device="cpu")
    result = minidiff.generate("a red circle", model=model, steps=2, seed=1)
    assert result.info["dtype"] == "int8"
    path = result.save(tmp_path / "first.png")[0]
    again = tmp_path / "again.png"
    assert main(["generate", "--from", str(path), "--device", "cpu", "--out", str(again)]) == 0
    assert minidiff.read_metadata(again).info["dtype"] == "int8"


@pytest.mark.parametrize("dtype", ["int8", torch.int8])
def test_devices_without_kernels(dtype: str | torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for device, said in (("cuda", "the device is 'cuda'"), ("mps", "the device is 'mps'")):
        with pytest.raises(ValueError, match=f'dtype "int8" needs a CPU with .*VNNI.*{said}; expected one of float32'):
            devices.choose_dtype(dtype, torch.device(device))
    monkeypatch.setattr(devices, "_has_int8", lambda: False)
    with pytest.raises(ValueError, match='dtype "int8" needs a CPU with .*VNNI.*this one has none'):
        minidiff.load(dtype=dtype, device="cpu")
