"""Winograd convolution against torch's: exact in float64, similar rounding in float32."""

import pytest
import torch
import torch.nn.functional as F

from minidiff.speed import winograd

SHAPES = [(1, 5, 8, 8), (2, 6, 9, 14), (3, 4, 7, 7), (2, 3, 1, 1), (1, 4, 2, 31)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("numbers", [1, 150, 10**6])  # one row of tiles at a time, several, all
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_the_convolution(
    shape: tuple[int, ...], bias: bool, numbers: int, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "_NUMBERS", numbers)
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout)
    weight = torch.randn(7, shape[1], 3, 3, dtype=torch.float64)
    offset = torch.randn(7, dtype=torch.float64) if bias else None
    found = winograd.convolve(x, winograd.transform(weight), offset, F.linear)
    torch.testing.assert_close(found, F.conv2d(x, weight, offset, padding=1), rtol=1e-12, atol=1e-12)


def test_in_float32_it_rounds_as_a_convolution_does() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 320, 32, 32), torch.randn(320, 320, 3, 3) / 54
    truth = F.conv2d(x.double(), weight.double(), padding=1)
    error = (winograd.convolve(x, winograd.transform(weight), None, F.linear) - truth).abs().max()
    assert error < 8e-7 * truth.abs().max()  # 4e-7; torch's 2e-7, packed in channels_last 2e-6


@pytest.mark.parametrize(
    ("input_shape", "out", "pays", "keeps"),
    [
        ((2, 320, 64, 64), 320, True, False),
        ((2, 640, 32, 32), 640, True, True),
        ((2, 1280, 32, 32), 640, True, True),
        ((2, 1280, 32, 32), 1280, False, True),  # 105 MB
        ((2, 640, 16, 16), 1280, False, True),  # too few cells
        ((8, 640, 16, 16), 1280, False, True),  # for one image or many
        ((1, 512, 128, 128), 512, True, False),
        ((1, 128, 512, 512), 128, False, False),  # too few channels
        ((2, 320, 64, 64), 4, False, False),
    ],
)
def test_where_it_pays(input_shape: tuple[int, ...], out: int, pays: bool, keeps: bool) -> None:
    shape = torch.Size(input_shape)
    assert winograd.pays(shape, torch.Size((out, shape[1], 3, 3))) == pays
    assert winograd.keeps(shape) == keeps
    assert not winograd.pays(shape, torch.Size((out, shape[1], 1, 1)))
