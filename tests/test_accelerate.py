"""Packed convolutions against torch's own: numbers, gradients of any order, state, copies; what compiling asks for."""

import copy
import pickle
import platform
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import config as tracing
from torch._inductor import config as generating

from minidiff import winograd
from minidiff.accelerate import (
    CompiledConv2d,
    PackedConv2d,
    PackedLinear,
    _called,
    _flags,
    compile_network,
    compile_whole,
    prepare,
)

KINDS = {
    "3x3": (3, 1, 1),
    "1x1": (1, 1, 0),
    "stride 2": (3, 2, 1),
    "stride 2, padded outside": (3, 2, 0),
    "wider padding": (3, 1, 2),
    "5x5": (5, 1, 2),
}
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
pytestmark = needs_onednn


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
    torch.autograd.grad(y.sum(), y)  # not by the input
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


def test_functional_call_uses_the_weights_that_it_is_given() -> None:
    conv, packed = pair("3x3")
    x = torch.randn(1, 64, 6, 6)
    packed(x)
    weights = {"weight": torch.randn_like(conv.weight), "bias": torch.randn_like(conv.bias)}
    close(torch.func.functional_call(packed, weights, (x,)), F.conv2d(x, **weights, padding=1))
    close(packed(x), conv(x))


def test_other_weights_in_its_place_are_used_forward_and_back() -> None:
    """Those of another network for one call, and new ones for good, as who merges a LoRA sets them."""
    conv, packed = pair("3x3")
    other, _ = pair("3x3")
    x = torch.randn(1, 64, 6, 6)

    def slope(network: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.func.grad(lambda x: network(x).sin().sum())(x)

    slope(packed)
    given = dict(other.named_parameters())
    close(slope(lambda x: torch.func.functional_call(packed, given, (x,))), slope(other))
    assert given["weight"] is other.weight and not other.weight.is_mkldnn
    close(slope(packed), slope(conv))
    biases = torch.randn(3, 120)
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
    close(slope(packed), slope(conv))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_at_several_sizes(kind: str) -> None:
    conv, packed = pair(kind)
    for edges in ((16, 16), (7, 30), (9, 5)):
        x = torch.randn(2, 64, *edges)
        close(*(torch.func.grad(lambda x, f=f: f(x).sin().sum())(x) for f in (packed, conv)))


@pytest.mark.parametrize("layer", ["convolution", "linear"])
def test_forward_derivatives_and_batches_of_functions(layer: str) -> None:
    if layer == "linear":
        plain: nn.Module = nn.Linear(64, 80).requires_grad_(False)
        packed: nn.Module = PackedLinear(copy.deepcopy(plain))
        x = torch.randn(3, 2, 64)
    else:
        plain, packed = pair("stride 2")
        x = torch.randn(3, 2, 64, 6, 7)
    tangent = torch.randn_like(x[0])
    for found, expected in zip(
        *(torch.func.jvp(lambda x, f=f: f(x).sin(), (x[0],), (tangent,)) for f in (packed, plain)), strict=True
    ):
        close(found, expected)
    close(*(torch.func.vmap(f)(x) for f in (packed, plain)))
    close(*(torch.func.vmap(torch.func.grad(lambda x, f=f: f(x).sin().sum()))(x) for f in (packed, plain)))
    close(*(torch.func.vmap(f, in_dims=1)(x) for f in (packed, plain)))


def test_autocast_is_torchs() -> None:
    conv, packed = pair("3x3")
    x = torch.randn(1, 64, 6, 6)
    packed(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(x), conv(x))
        assert torch.equal(packed(x.bfloat16()), conv(x.bfloat16()))


def test_bfloat16_without_kernels_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minidiff.accelerate._packs", lambda dtype: dtype == torch.float32)
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
    packed(torch.randn(5, 96).to(dtype))  # packed for another number of rows
    x = torch.randn(*shape, 96).to(dtype)
    for given in (x, x.transpose(0, -2).contiguous().transpose(0, -2)):
        ours, theirs = given.clone().requires_grad_(), given.clone().requires_grad_()
        found, expected = packed(ours), linear(theirs)
        close(found, expected, dtype)
        grad = torch.randn_like(expected)
        close(*(torch.autograd.grad(y, x, grad)[0] for y, x in ((found, ours), (expected, theirs))), dtype)
    assert packed.weight.is_mkldnn
    assert torch.equal(packed.state_dict()["weight"], linear.weight)


def test_large_layers_are_packed_and_small_ones_left_alone() -> None:
    network = prepare(nn.ModuleList([nn.Linear(256, 256), nn.Linear(8, 8), nn.Conv2d(96, 96, 3), nn.Conv2d(4, 8, 3)]))
    assert [type(layer) for layer in network] == [PackedLinear, nn.Linear, PackedConv2d, nn.Conv2d]


def test_convolutions_of_other_kinds_are_left_alone() -> None:
    network = nn.Sequential(
        nn.Conv2d(256, 128, 3, groups=2),
        nn.Conv2d(128, 128, 3, dilation=2),
        nn.Conv2d(128, 128, 3, padding="same"),
        nn.Conv2d(128, 128, 3, padding=1, padding_mode="circular"),
    )
    assert [type(child) for child in prepare(network)] == [nn.Conv2d] * 4


# ---- large 3x3 convolutions, with fewer multiplications

TILED = (32, 34), (64, 65)
"""Grids large enough; for the second the transformed weights are not kept."""


def large(dtype: torch.dtype = torch.float32) -> tuple[nn.Conv2d, PackedConv2d]:
    """torch's convolution and a packed one, with channels enough."""
    conv = nn.Conv2d(256, 264, 3, padding=1).to(dtype).requires_grad_(False)
    return conv, PackedConv2d(copy.deepcopy(conv))


@pytest.mark.parametrize("edges", TILED)
def test_a_large_convolution_and_its_gradients_equal_torchs(edges: tuple[int, int]) -> None:
    conv, packed = large()
    x = torch.randn(2, 256, *edges)
    found = packed(x)
    close(found, conv(x))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert not packed.weight.is_mkldnn
    assert list(packed.derived) == (["tiled"] if edges == (32, 34) else [])
    close(*(torch.func.grad(lambda x, f=f: f(x).sin().sum())(x) for f in (packed, conv)))
    close(*(torch.autograd.grad(f(x.requires_grad_()).sin().sum(), x)[0] for f in (packed, conv)))
    assert list(packed.derived) == (["tiled", "turned, tiled"] if edges == (32, 34) else [])

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


def test_in_other_dtypes_a_large_convolution_is_packed() -> None:
    conv, packed = large(torch.bfloat16)
    x = torch.randn(1, 256, 32, 32).bfloat16()
    close(packed(x), conv(x), torch.bfloat16)
    assert packed.weight.is_mkldnn


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_kept_memory_is_not_paid_for_twice() -> None:
    code = """
import resource, sys, torch
from minidiff.accelerate import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
def faults():
    torch.ones(2**24)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
faults()
before = faults()
for _ in range(5):
    after = faults()
print(after - before)
"""
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", code, how], check=True, capture_output=True, text=True).stdout)
        for how in ("keep", "not")
    )
    assert kept < given_back / 2, (kept, given_back)


# ---- compilers


def test_what_compiling_asks_for() -> None:
    """One graph without breaks or new shapes; constants that the compiler packs, or a captured graph on CUDA."""
    asked: list[dict[str, object]] = []
    network = nn.Linear(2, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **flags: asked.append(flags) or function)
        patch.setattr(nn.Module, "compile", lambda self, **flags: asked.append(flags))
        compile_network(network)
        assert compile_whole(gradient, network) is compile_whole(gradient, network)
    assert len(asked) == 2
    asked.append(_flags(torch.device("cuda")))
    assert all(flags["fullgraph"] is True and flags["dynamic"] is False for flags in asked)
    assert [flags.get("mode") for flags in asked] == [None, None, "reduce-overhead"]


def gradient(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of something that is not linear, so that it depends on the weights and on x."""
    return torch.func.grad(lambda x: forward(x).sin().sum())(x)


class Small(nn.Module):
    """The compiler does not take torch's own modules for a whole network."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_each_network_is_compiled_with_its_own_weights() -> None:
    """Constants of a graph are no part of what the compiler knows it by."""
    x = torch.randn(3, 8)
    for _ in range(2):
        network = Small().requires_grad_(False)
        close(compile_whole(gradient, network)(network.forward, x), gradient(network.forward, x))
        close(compile_network(copy.deepcopy(network))(x), network(x))


def test_a_sweep_of_many_sizes_is_compiled() -> None:
    torch._dynamo.reset()
    call = _called(torch.compile(torch.sin, backend="eager", fullgraph=True, dynamic=False), torch.device("cpu"))
    for n in range(1, 12):  # torch's own limit is 8
        assert call(torch.ones(n)).shape == (n,)
        call(torch.ones(n + 20, requires_grad=True))


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_trained_convolutions_have_gradients_for_compilers_too(what: str) -> None:
    own = CompiledConv2d(nn.Conv2d(4, 4, 3).requires_grad_(False))
    getattr(own, what).requires_grad_(True)
    own(torch.randn(1, 4, 5, 5)).sum().backward()
    assert getattr(own, what).grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_convolution_for_compilers_and_its_gradient_equal_torchs(kind: str) -> None:
    conv, _ = pair(kind)
    own, x = CompiledConv2d(conv), torch.randn(2, 64, 9, 14)
    close(own(x), conv(x))
    own.requires_grad_(True)
    own(x).sum().backward()
    assert own.weight.grad is not None
    own.requires_grad_(False)
    close(*(torch.func.grad(lambda x, f=f: f(x).sin().sum())(x) for f in (own, conv)))
    close(*(torch.autograd.grad(f(x.requires_grad_()).sin().sum(), x)[0] for f in (own, conv)))


class Large(nn.Module):
    """Of both kinds of grids."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(256, 256, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(self.conv(x).sin(), scale_factor=2.0))


def test_large_convolutions_are_compiled_as_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Large().requires_grad_(False)
    network = copy.deepcopy(plain)
    network.conv = CompiledConv2d(network.conv)
    x = torch.randn(1, 256, 32, 32)
    found, slope = compile_whole(forward, network)(network, x), compile_whole(gradient, network)(network.forward, x)
    close(found, plain(x))
    close(slope, gradient(plain, x))
    calls = []
    convolve = winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda *args: calls.append(len(args)) or convolve(*args))
    assert torch.equal(compile_whole(forward, network)(network, x), found)
    assert len(calls) == 2
    compile_whole(gradient, network)(network.forward, x)
    assert len(calls) == 6
    with torch.autocast("cpu", torch.bfloat16):
        assert network.conv(x).dtype == torch.bfloat16


def forward(network: nn.Module, x: Tensor) -> Tensor:
    return network(x)


def test_a_compiled_function_sees_constants_unless_gradients_are_asked_of_it() -> None:
    seen = []

    def look(x: Tensor | None = None) -> None:
        seen.append((generating.freezing, tracing.prepare_freezing, torch.is_grad_enabled()))

    _called(look, torch.device("cpu"))()
    _called(look, torch.device("cpu"))(torch.ones(1, requires_grad=True))
    look()
    assert seen == [(True, True, False), (False, False, True), (False, False, True)]


def test_what_a_captured_graph_returns_is_copied() -> None:
    buffer = torch.zeros(3)
    call = _called(lambda: (buffer, {"maps": buffer}, 7), torch.device("cuda"))
    eps, maps, number = call()
    buffer += 1
    assert (eps.sum(), maps["maps"].sum(), number) == (0, 0, 7)
