"""Packed layers against torch's own: results, gradients of any order, state, copies; as operators in graphs."""

import contextlib
import copy
import gc
import itertools
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import minidiff.speed.packed
from minidiff.networks.resample import grow_conv
from minidiff.speed.packed import Packed, PackedConv2d, PackedLinear

KINDS = {
    "3x3": (3, 1, 1),
    "1x1": (1, 1, 0),
    "stride 2": (3, 2, 1),
    "stride 2, padded outside": (3, 2, 0),
    "wider padding": (3, 1, 2),
    "5x5": (5, 1, 2),
}
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


LARGE = 256, 264
"""Channels enough for Winograd's way, on grids from 32x32 on."""


def layers(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Packed, Tensor]:
    """torch's layer, a packed one with the same weights, and an input."""
    if kind == "linear":
        linear = nn.Linear(24, 40).to(dtype).requires_grad_(False)
        return linear, PackedLinear(copy.deepcopy(linear)), torch.randn(2, 3, 7, 24).to(dtype)
    if kind == "large":
        return *large(dtype), torch.randn(2, LARGE[0], 32, 33).to(dtype)
    return *pair(kind, dtype), torch.randn(2, 64, 9, 14).to(dtype)


def pair(kind: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[nn.Conv2d, PackedConv2d]:
    """torch's convolution and a packed one with the same weights."""
    kernel, stride, padding = KINDS[kind]
    conv = nn.Conv2d(64, 120, kernel, stride=stride, padding=padding, bias=bias).to(dtype).requires_grad_(False)
    return conv, PackedConv2d(copy.deepcopy(conv))


def close(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding * float(expected.detach().abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edges", [(16, 16), (9, 14), (8, 11)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_convolution_and_its_gradient_equal_torchs(
    kind: str, dtype: torch.dtype, edges: tuple[int, int], bias: bool
) -> None:
    conv, packed = pair(kind, dtype, bias)
    x = torch.randn(2, 64, *edges).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = packed(ours), conv(theirs)
    assert packed.weight.is_mkldnn
    assert packed.weight.shape == conv.weight.shape
    close(found, expected, dtype)
    grad = torch.randn_like(expected)
    (found_grad,), (expected_grad,) = (
        torch.autograd.grad(found, ours, grad),
        torch.autograd.grad(expected, theirs, grad),
    )
    close(found_grad, expected_grad, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_it_serves_inputs_of_other_sizes_and_layouts(kind: str) -> None:
    conv, packed = pair(kind)
    for shape in ((2, 64, 16, 16), (1, 64, 7, 30), (5, 64, 40, 12)):
        x = torch.randn(shape)
        for given in (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
            found = packed(given)
            close(found, conv(x))
            assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_functions_and_of_gradients(kind: str) -> None:
    conv, packed = pair(kind)
    x = torch.randn(1, 64, 9, 12)

    def loss(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: network(x).sin().square().sum()

    close(torch.func.grad(loss(packed))(x), torch.func.grad(loss(conv))(x))

    def steepness(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.func.grad(loss(network))(x).square().sum()

    close(torch.func.grad(steepness(packed))(x), torch.func.grad(steepness(conv))(x))


def test_nothing_is_packed_before_the_first_call_and_no_gradient_before_the_first_gradient() -> None:
    _, packed = pair("3x3")
    assert not packed.weight.is_mkldnn
    y = packed(torch.randn(1, 64, 4, 4).requires_grad_())
    assert not packed.derived
    torch.autograd.grad(y.sum(), y)  # not with respect to the input
    y.sum().backward()
    assert list(packed.derived) == ["turned"]


def test_what_inference_mode_packed_serves_gradients_later() -> None:
    conv, packed = pair("3x3")
    x = torch.randn(1, 64, 6, 6)
    with torch.inference_mode():
        close(packed(x), conv(x))
        torch.func.grad(lambda x: packed(x).sum())(x.clone())
    close(*(torch.autograd.grad(network(x.requires_grad_()).sin().sum(), x)[0] for network in (packed, conv)))
    close(copy.deepcopy(packed)(x), conv(x))


def test_the_state_dict_is_torchs() -> None:
    conv, packed = pair("3x3")
    packed(torch.randn(1, 64, 4, 4))
    state = packed.state_dict()
    assert list(state) == list(conv.state_dict())
    assert all(torch.equal(state[name], value) for name, value in conv.state_dict().items())
    other, _ = pair("3x3")
    packed.load_state_dict(other.state_dict())
    x = torch.randn(1, 64, 6, 6, requires_grad=True)
    close(packed(x), other(x))
    close(torch.autograd.grad(packed(x).sin().sum(), x)[0], torch.autograd.grad(other(x).sin().sum(), x)[0])
    packed.load_state_dict(conv.state_dict(), assign=True)
    packed.requires_grad_(False)
    close(packed(x), conv(x))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_copies_are_independent(again: Callable[[nn.Module], nn.Module]) -> None:
    conv, packed = pair("3x3")
    x = torch.randn(1, 64, 6, 6)
    packed(x)
    copied = again(packed)
    close(copied(x), conv(x))
    assert packed.weight.is_mkldnn


def test_other_dtypes_and_trained_weights_take_torchs_way() -> None:
    conv, packed = pair("3x3")
    x = torch.randn(1, 64, 6, 6)
    packed(x)
    packed.double()
    assert packed.weight.dtype == torch.float64
    torch.testing.assert_close(packed(x.double()), copy.deepcopy(conv).double()(x.double()))
    assert not packed.weight.is_mkldnn
    packed.float()
    packed(x)
    packed.requires_grad_(True)
    packed(x).sum().backward()
    conv.requires_grad_(True)(x).sum().backward()
    close(packed.weight.grad, conv.weight.grad)
    close(packed.bias.grad, conv.bias.grad)


@pytest.mark.parametrize("kind", ["3x3", "large"])
def test_functional_call_uses_the_weights_that_it_is_given(kind: str) -> None:
    conv, packed, x = layers(kind)
    packed(x)
    weights = {"weight": torch.randn_like(conv.weight), "bias": torch.randn_like(conv.bias)}
    close(torch.func.functional_call(packed, weights, (x,)), F.conv2d(x, **weights, padding=1))
    close(packed(x), conv(x))


@pytest.mark.parametrize("kind", ["3x3", "large"])
def test_other_weights_in_its_place_are_used_forward_and_back(kind: str) -> None:
    """Another network's weights for one call (functional_call), and permanently, as in merging a LoRA."""
    conv, packed, x = layers(kind)
    other, _, _ = layers(kind)

    gradient(packed, x)
    given = dict(other.named_parameters())
    close(gradient(lambda x: torch.func.functional_call(packed, given, (x,)), x), gradient(other, x))
    assert given["weight"] is other.weight and not other.weight.is_mkldnn
    close(gradient(packed, x), gradient(conv, x))
    biases = torch.randn(3, len(conv.bias))
    for network in (packed, conv):
        network(x)
    close(
        *(
            torch.func.vmap(lambda b, f=f: torch.func.functional_call(f, {"bias": b}, (x,)))(biases)
            for f in (packed, conv)
        )
    )
    packed.weight = nn.Parameter(other.weight * 2, requires_grad=False)
    conv.weight = packed.weight
    close(packed(x), conv(x))
    close(gradient(packed, x), gradient(conv, x))


@pytest.mark.parametrize("kind", ["3x3", "stride 2", "linear", "large"])
def test_weights_changed_in_place_are_used_forward_and_back(kind: str) -> None:
    plain, packed, x = layers(kind)
    changes: list[Callable[[Tensor], object]] = [lambda weight: weight.mul_(2)]
    if kind == "large":  # the others are opaque and cannot be written to
        changes.append(lambda weight: setattr(weight, "data", weight / 4))
    for change in (lambda weight: None, *changes):
        with torch.no_grad():
            change(packed.weight)
            change(plain.weight)
            close(packed(x), plain(x))
        close(gradient(packed, x), gradient(plain, x))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_at_several_sizes(kind: str) -> None:
    conv, packed = pair(kind)
    for edges in ((16, 16), (7, 30), (9, 5)):
        x = torch.randn(2, 64, *edges)
        close(*(torch.func.grad(lambda x, f=f: f(x).sin().sum())(x) for f in (packed, conv)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("kind", ["stride 2", "linear", "large"])
def test_forward_derivatives_and_batches_of_functions(
    kind: str, mode: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    plain, packed, one = layers(kind)
    x = torch.stack([one, torch.randn_like(one), torch.randn_like(one)])
    tangent = torch.randn_like(one)
    packed(one)
    with mode():
        for found, expected in zip(
            *(torch.func.jvp(lambda x, f=f: f(x).sin(), (one,), (tangent,)) for f in (packed, plain)), strict=True
        ):
            close(found, expected)
        close(*(torch.func.vmap(f)(x) for f in (packed, plain)))
        close(*(torch.func.vmap(torch.func.grad(lambda x, f=f: f(x).sin().sum()))(x) for f in (packed, plain)))
        close(*(torch.func.vmap(f, in_dims=1)(x) for f in (packed, plain)))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(one, tangent)
            close(*(forward_ad.unpack_dual(f(dual)).tangent for f in (packed, plain)))


@pytest.mark.parametrize("kind", ["3x3", "linear", "large"])
def test_threads_share_a_layer_from_its_first_call_on(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, packed, x = layers(kind)
    start, packings = Barrier(4), []

    def slowly(pack: Callable[..., Tensor], *args: Any) -> Tensor:
        packings.append(args)
        time.sleep(0.05)
        return pack(*args)

    for name in ("_pack_conv", "_pack_linear"):
        monkeypatch.setattr(minidiff.speed.packed, name, partial(slowly, getattr(minidiff.speed.packed, name)))

    def call(function: Callable[[], Tensor]) -> Tensor:
        start.wait()
        return function()

    def together(function: Callable[[], Tensor], expected: Tensor) -> None:
        with ThreadPoolExecutor(4) as pool:
            for one in [pool.submit(call, function) for _ in range(4)]:
                close(one.result(), expected)

    together(lambda: packed(x), plain(x))
    assert len(packings) == (kind != "large")
    together(lambda: gradient(packed, x), gradient(plain, x))
    assert packed.weight is packed.made_with[0]
    assert packed.weight.is_mkldnn == (kind != "large")


def test_autocast_is_torchs() -> None:
    conv, packed = pair("3x3")
    x = torch.randn(1, 64, 6, 6)
    packed(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(x), conv(x))
        assert torch.equal(packed(x.bfloat16()), conv(x.bfloat16()))


def test_bfloat16_without_kernels_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidiff.speed.packed._packs", lambda dtype: dtype == torch.float32)
    conv, packed = pair("3x3", torch.bfloat16)
    x = torch.randn(1, 64, 6, 6).bfloat16()
    assert torch.equal(packed(x), conv(x))
    assert not packed.weight.is_mkldnn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(300,), (2, 150), (1, 7), (3, 2, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_linear_layer_and_its_gradient_equal_torchs(
    shape: tuple[int, ...], dtype: torch.dtype, bias: bool
) -> None:
    linear = nn.Linear(96, 40, bias=bias).to(dtype).requires_grad_(False)
    packed = PackedLinear(copy.deepcopy(linear))
    packed(torch.randn(5, 96).to(dtype))  # packed for a different number of rows
    x = torch.randn(*shape, 96).to(dtype)
    for given in (x, x.transpose(0, -2).contiguous().transpose(0, -2)):
        ours, theirs = given.clone().requires_grad_(), given.clone().requires_grad_()
        found, expected = packed(ours), linear(theirs)
        close(found, expected, dtype)
        grad = torch.randn_like(expected)
        close(*(torch.autograd.grad(y, x, grad)[0] for y, x in ((found, ours), (expected, theirs))), dtype)
    assert packed.weight.is_mkldnn
    assert torch.equal(packed.state_dict()["weight"], linear.weight)


# ---- large 3x3 convolutions, with fewer multiplications

TILED = (32, 34), (64, 65)
"""Grids large enough; for the second the transformed weights are not kept."""


def large(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[nn.Conv2d, PackedConv2d]:
    """torch's convolution and a packed one, with enough channels."""
    conv = nn.Conv2d(*LARGE, 3, padding=1, bias=bias).to(dtype).requires_grad_(False)
    return conv, PackedConv2d(copy.deepcopy(conv))


@pytest.mark.parametrize("edges", TILED)
@pytest.mark.parametrize("bias", [True, False])
def test_a_large_convolution_and_its_gradients_equal_torchs(edges: tuple[int, int], bias: bool) -> None:
    conv, packed = large(bias=bias)
    x = torch.randn(2, 256, *edges)
    found = packed(x)
    close(found, conv(x))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert not packed.weight.is_mkldnn
    assert list(packed.derived) == (["transformed"] if edges == (32, 34) else [])
    close(*(torch.func.grad(lambda x, f=f: f(x).sin().sum())(x) for f in (packed, conv)))
    close(*(torch.autograd.grad(f(x.requires_grad_()).sin().sum(), x)[0] for f in (packed, conv)))
    assert list(packed.derived) == (["transformed", "turned, transformed"] if edges == (32, 34) else [])

    def steepness(network: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.func.grad(lambda x: torch.func.grad(lambda x: network(x).sin().sum())(x).square().sum())(x)

    close(steepness(packed), steepness(conv))


def test_large_and_small_grids_share_a_layer() -> None:
    conv, packed = large()
    for edges in ((32, 32), (8, 8), (32, 32), (64, 64)):
        x = torch.randn(1, 256, *edges)
        close(packed(x), conv(x))
    assert packed.weight.is_mkldnn
    assert torch.equal(packed.state_dict()["weight"], conv.weight)
    packed.load_state_dict({name: 2 * value for name, value in conv.state_dict().items()})
    x = torch.randn(1, 256, 32, 32)
    close(packed(x), 2 * conv(x))
    close(copy.deepcopy(packed)(x), 2 * conv(x))


def test_what_inference_mode_transformed_serves_gradients_later() -> None:
    conv, packed = large()
    x = torch.randn(1, 256, 32, 32)
    with torch.inference_mode():
        close(packed(x), conv(x))
        torch.func.grad(lambda x: packed(x).sum())(x.clone())
    close(*(torch.autograd.grad(network(x.requires_grad_()).sin().sum(), x)[0] for network in (packed, conv)))


def test_kept_weights_serve_larger_grids_too(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, packed = large()
    packed(torch.randn(1, 256, 32, 32))
    monkeypatch.setattr("minidiff.speed.winograd.transform", None)
    x = torch.randn(1, 256, 64, 64)
    close(packed(x), conv(x))


def test_smaller_grids_are_convolved_as_they_are() -> None:
    conv, packed = large()
    x = torch.randn(2, 256, 31, 33)
    close(packed(x), conv(x))
    assert packed.weight.is_mkldnn and not packed.derived


@pytest.mark.parametrize("edges", [(8, 9), (32, 32), (4, 4)])  # the last are too few cells
def test_upsampling_before_a_large_convolution(edges: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    conv, packed = large()
    x = torch.randn(2, 256, *edges)
    upsample = F.interpolate
    expected, seen = conv(upsample(x, scale_factor=2)), list[bool]()
    monkeypatch.setattr(F, "interpolate", None if edges != (4, 4) else upsample)
    with torch.no_grad():
        found = grow_conv(packed, x)
        assert packed.grows(x) == (edges != (4, 4))
        hook = packed.register_forward_hook(lambda *_: None)
        assert not packed.grows(x)  # it wants to be called
        hook.remove()
        torch.vmap(lambda one: seen.append(packed.grows(one)) or one)(x[None])
    assert seen == [False]
    close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(F, "interpolate", upsample)
    double = [torch.autograd.grad(grow_conv(one, x.requires_grad_()).sin().sum(), x)[0] for one in (packed, conv)]
    close(*double)
    assert packed.weight.is_mkldnn == (edges != (32, 32))
    with torch.no_grad():  # unpacking would take longer
        assert packed.grows(x) == (edges == (32, 32))
        close(grow_conv(packed, x), expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not packed.grows(x) and grow_conv(packed, x).dtype == torch.bfloat16
    packed.weight = nn.Parameter(2 * packed.dense())
    with torch.no_grad():
        close(grow_conv(packed, x) - conv.bias[:, None, None], 2 * (expected - conv.bias[:, None, None]))


def test_in_other_dtypes_a_large_convolution_is_packed() -> None:
    conv, packed = large(torch.bfloat16)
    x = torch.randn(1, 256, 32, 32).bfloat16()
    close(packed(x), conv(x), torch.bfloat16)
    assert packed.weight.is_mkldnn


# ---- as operators, for a compiler

NUMBERS = itertools.count(-1, -1)  # no compiled network has them
Numbered = Callable[[Packed], Packed]


@pytest.fixture
def numbered() -> Iterator[Numbered]:
    """Numbers layers, and resets the compiler, which caches graphs by code."""
    torch._dynamo.reset()

    def numbered(layer: Packed) -> Packed:
        layer.take_number(next(NUMBERS))
        return layer

    yield numbered
    torch._dynamo.reset()


def graph(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One graph, without the slow code generation."""
    return torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)


def gradient(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: network(x).sin().sum())(x)


def curvature(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: gradient(network, x).square().sum())(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])  # the last has no packed weights
@pytest.mark.parametrize("kind", [*KINDS, "large", "linear"])
def test_a_graph_calls_the_layer_and_its_gradient(kind: str, dtype: torch.dtype, numbered: Numbered) -> None:
    plain, packed, x = layers(kind, dtype)
    numbered(packed)
    for _ in range(2):
        close(graph(packed)(x), plain(x), dtype)
        close(graph(lambda x: gradient(packed, x))(x), gradient(plain, x), dtype)
        close(graph(lambda x: gradient(lambda x: packed(x.cos()), x))(x), gradient(lambda x: plain(x.cos()), x), dtype)
        packed.load_state_dict({name: 2 * value for name, value in plain.state_dict().items()})
        plain.load_state_dict(packed.state_dict())


@pytest.mark.parametrize("kind", ["3x3", "stride 2", "linear", "large"])
def test_a_graph_has_gradients_of_gradients(kind: str, numbered: Numbered) -> None:
    plain, packed, x = layers(kind)
    numbered(packed)
    close(graph(lambda x: curvature(packed, x))(x), curvature(plain, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the last has no packed weights
@pytest.mark.parametrize("kind", ["3x3", "stride 2", "linear", "large"])
def test_the_operator_tells_the_compiler_what_it_returns(kind: str, dtype: torch.dtype, numbered: Numbered) -> None:
    _, layer, x = layers(kind, dtype)
    number, y = numbered(layer).number, layer(x)
    assert layer.out_size(x.shape) == list(y.shape)
    operator, checks = torch.ops.minidiff.packed_layer.default, ("test_schema", "test_faketensor")
    last = layer.channels_last
    for part in ("all", "product"):
        torch.library.opcheck(operator, (x, number, part, list(y.shape), last), test_utils=checks)
    torch.library.opcheck(operator, (y, number, "gradient", list(x.shape), last), test_utils=checks)


def test_a_graph_takes_no_weights_in_the_place_of_its_layers(numbered: Numbered) -> None:
    """Such weights may no longer exist when the gradient is computed."""
    conv, packed, x = layers("3x3")
    numbered(packed)
    call, slope = graph(packed), graph(lambda x: gradient(packed, x))
    close(call(x), conv(x))
    close(torch.func.functional_call(packed, dict(packed.named_parameters()), (x,)), conv(x))
    given = {"weight": 3 * conv.weight}
    for one in (call, slope):
        with pytest.raises(RuntimeError, match="weights were replaced.*load_state_dict"):
            packed.weight, own = nn.Parameter(given["weight"], requires_grad=False), packed.weight
            one(x)
        packed.weight = own
    packed.load_state_dict(given, strict=False)
    conv.load_state_dict(given, strict=False)
    close(call(x), conv(x))
    close(slope(x), gradient(conv, x))
    assert packed.weight.is_mkldnn


def test_in_a_graph_weights_are_frozen_and_of_one_dtype(numbered: Numbered) -> None:
    _, packed, x = layers("3x3")
    numbered(packed)
    call = graph(packed)
    call(x)
    with pytest.raises(RuntimeError, match=r"got torch.bfloat16, and its weights are torch.float32 and frozen"):
        graph(packed)(x.bfloat16())
    packed.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"are torch.float32 and trained; it needs frozen weights"):
        call(x)


def test_a_copy_has_no_number(numbered: Numbered) -> None:
    conv, packed, x = layers("3x3")
    number = numbered(packed).number
    copied = copy.deepcopy(packed)
    assert (packed.number, copied.number) == (number, None)
    close(graph(copied)(x), conv(x))


def test_a_number_has_one_layer_and_lives_as_long(numbered: Numbered) -> None:
    _, packed, x = layers("linear")
    number, size = numbered(packed).number, packed.out_size(x.shape)
    packed.take_number(number)
    with pytest.raises(ValueError, match=f"number is {number}, which another layer has"):
        layers("linear")[1].take_number(number)
    torch.ops.minidiff.packed_layer(x, number, "all", size, False)
    del packed
    gc.collect()
    with pytest.raises(RuntimeError, match="has lost its network"):
        torch.ops.minidiff.packed_layer(x, number, "all", size, False)
