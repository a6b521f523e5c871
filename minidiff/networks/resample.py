"""Changes of resolution. Upsampling by 2 and the convolution after it are one function: a prepared layer does both."""

import torch.nn.functional as F
from torch import Tensor, nn

LEAST = 2**14
"""Numbers of an image from which a layer's own `grow` is asked."""


class Downsample(nn.Module):
    """Halve the grid, rounding up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w] -> [B,C,ceil(h/2),ceil(w/2)]."""
        return self.conv(x)


class Upsample(nn.Module):
    """Enlarge the grid to `size` by nearest neighbours, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """[B,C,h,w] -> [B,C,*size]."""
        if size == (2 * x.shape[2], 2 * x.shape[3]):
            return grow_conv(self.conv, x)
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def grow_conv(conv: nn.Module, x: Tensor) -> Tensor:
    """Double the grid by nearest neighbours, then convolve: [B,C,h,w] -> [B,C',2h,2w].

    By the layer's own `grow`, where it has one that takes x: most of the products are of equal numbers
    (speed/fused.py, speed/winograd.py).
    """
    grow = getattr(conv, "grow", None) if x[:1].numel() >= LEAST else None
    y = None if grow is None else grow(x)
    return conv(F.interpolate(x, scale_factor=2, mode="nearest")) if y is None else y
