"""Checks of user input: what counts as a number, and how messages show wrong values."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

import minidiff
from minidiff.checks import choice, finite, number, shown, whole


@pytest.mark.parametrize("value", [7, np.int64(7), np.uint8(7), torch.tensor(7), np.array(7)])
def test_whole_numbers_of_every_library(value: object) -> None:
    found = whole("steps", value, 1, 7)
    assert found == 7 and type(found) is int


@pytest.mark.parametrize(
    "value", [True, np.True_, torch.tensor(True), "7", 7.0, math.nan, None, [7], np.array([7]), torch.tensor([7]), 8, 0]
)
def test_what_is_no_whole_number_is_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match="^steps is .*; expected a whole number from 1 to 7$"):
        whole("steps", value, 1, 7)


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int32(2), torch.tensor(2.0), Decimal(2), Fraction(4, 2)])
def test_numbers_of_every_library(value: object) -> None:
    found = number("scale", value)
    assert found == 2.0 and type(found) is float


@pytest.mark.parametrize(
    "value", [True, "2", math.nan, math.inf, 10**400, None, 1j, [2.0], torch.zeros(2), np.bool_(1)]
)
def test_what_is_no_number_is_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match=r"^scale is .*; expected a number of at least 0$"):
        number("scale", value, 0)


def test_choices_name_the_near_one() -> None:
    assert choice("sampler", "ddim", ("ddim", "euler")) == "ddim"
    with pytest.raises(ValueError, match="sampler is 'Eular'; expected one of ddim, euler. Did you mean 'euler'?"):
        choice("sampler", "Eular", ("ddim", "euler"))


@pytest.mark.parametrize(
    "value", [torch.zeros(1000), list(range(10**6)), "x" * 1000, dict.fromkeys(range(50), "y" * 99)]
)
def test_a_message_shows_a_value_in_one_line(value: object) -> None:
    text = shown(value)
    assert len(text) <= 120 and "\n" not in text
    assert shown(torch.zeros(2, 3)) == "a Tensor of shape [2, 3] and dtype float32"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("values", "expected"),
    [([1, -2], True), ([], True), ([math.nan, 1], False), ([1, math.inf, -math.inf], False), ([-math.inf], False)],
)
def test_finite(values: list[float], expected: bool, dtype: torch.dtype) -> None:
    assert finite(torch.tensor(values, dtype=dtype)) is expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finite_where_the_sum_overflows(dtype: torch.dtype) -> None:
    assert finite(torch.full((3,), torch.finfo(dtype).max, dtype=dtype))


def test_a_warning_points_to_the_callers_line(tiny_model: minidiff.Model) -> None:
    with pytest.warns(UserWarning, match="has no effect") as caught:
        minidiff.generate("a", model=tiny_model, negative_prompt="b", guidance_scale=1, steps=2, sampler="euler")
    assert caught[0].filename == __file__
