"""Winograd convolution against torch's: exact in float64, similar rounding in float32."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.speed import winograd
from minidiff.speed.winograd import GROWN, SAME, Form

SHAPES = [(1, 5, 8, 8), (2, 6, 9, 14), (3, 4, 7, 7), (2, 3, 1, 1), (1, 4, 2, 31)]
FORMS = pytest.mark.parametrize("form", [SAME, GROWN])


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, form: Form) -> Tensor:
    """torch's convolution."""
    x = F.interpolate(x, scale_factor=2, mode="nearest") if form is GROWN else x
    return F.conv2d(x, weight, bias, padding=1)


@FORMS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("numbers", [1, 2000, 10**6])  # one row of tiles at a time, several, all
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_the_convolution(
    form: Form,
    shape: tuple[int, ...],
    bias: bool,
    numbers: int,
    layout: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(winograd, "_NUMBERS", numbers)
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout)
    weight = torch.randn(7, shape[1], 3, 3, dtype=torch.float64)
    offset = torch.randn(7, dtype=torch.float64) if bias else None
    found = winograd.convolve(x, weight, offset, F.linear, form)
    torch.testing.assert_close(found, plain(x, weight, offset, form), rtol=1e-11, atol=1e-11)
    assert found.is_contiguous(memory_format=torch.channels_last)


@FORMS
@pytest.mark.parametrize("back", [True, False])
@pytest.mark.parametrize(("kept", "part"), [(0, 200), (0, 10**6), (10**6, 200)])  # parts of the weights, all, kept
def test_weights_in_parts(form: Form, back: bool, kept: int, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_NUMBERS", 800)  # several parts of the input, too
    monkeypatch.setattr(winograd, "_KEPT", kept)
    monkeypatch.setattr(winograd, "_PART", part)
    monkeypatch.setattr(winograd, "_BLOCK", 2)
    x, weight = torch.randn(2, 5, 9, 6, dtype=torch.float64), torch.randn(5, 5, 3, 3, dtype=torch.float64)
    expected = plain(x, weight.flip(2, 3).transpose(0, 1) if back else weight, None, form)
    for given in (weight, winograd.transform(weight, F.linear, form, back)):
        found = winograd.convolve(x, given, None, F.linear, form, back)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("form", "bound"), [(SAME, 4e-6), (GROWN, 1e-6)])
@pytest.mark.parametrize("mean", [0, 3])
def test_in_float32_it_rounds_as_a_convolution_does(form: Form, bound: float, mean: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 320, 24, 24) + mean, torch.randn(320, 320, 3, 3) / 54
    truth = plain(x.double(), weight.double(), None, form)
    error = (winograd.convolve(x, weight, None, F.linear, form) - truth).abs().max()
    assert error < bound * truth.abs().max()  # torch's 2e-7, packed in channels_last 2e-6


@pytest.mark.parametrize(
    ("input_shape", "out", "form", "keeps"),
    [
        ((2, 320, 64, 64), 320, SAME, False),
        ((2, 640, 32, 32), 640, SAME, True),
        ((2, 1280, 32, 32), 640, SAME, False),  # 118 MB
        ((2, 640, 16, 16), 1280, None, None),  # too few cells
        ((2, 640, 31, 33), 640, None, None),
        ((1, 512, 128, 128), 512, SAME, False),
        ((8, 640, 8, 8), 1280, None, None),  # too few cells, for one image or many
        ((1, 128, 512, 512), 128, SAME, False),
        ((1, 64, 512, 512), 128, None, None),  # too few channels
        ((1, 128, 64, 64), 128, None, None),
        ((2, 320, 64, 64), 4, None, None),
    ],
)
def test_where_it_pays(input_shape: tuple[int, ...], out: int, form: Form | None, keeps: bool | None) -> None:
    shape, weight = torch.Size(input_shape), torch.Size((out, input_shape[1], 3, 3))
    assert winograd.form(shape, weight) == form
    if form is SAME:
        assert winograd.keeps(shape, weight) == keeps
    assert winograd.form(shape, torch.Size((out, shape[1], 1, 1))) is None
    half = torch.Size((*shape[:2], shape[2] // 2, shape[3] // 2))
    smaller = shape[2] >= 16 and min(out, shape[1]) >= 256  # what is grown can be
    assert winograd.form(half, weight, grown=True) == (GROWN if form or smaller else None)
