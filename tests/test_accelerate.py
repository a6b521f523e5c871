"""Packed convolutions against torch's own: numbers, gradients of any order, state, copies; what compiling asks for."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.accelerate import PackedConv2d, prepare

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
    assert packed.turned is None
    torch.autograd.grad(y.sum(), y)  # not by the input
    y.sum().backward()
    assert packed.turned is not None


def test_the_state_dict_is_torchs(tmp_path: object) -> None:
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


def test_convolutions_of_other_kinds_are_left_alone() -> None:
    network = nn.Sequential(
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 3, dilation=2),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
    )
    assert [type(child) for child in prepare(network)] == [nn.Conv2d] * 4
