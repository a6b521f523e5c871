"""The error measure that every parity test uses."""

from torch import Tensor


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|, in float64."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())
