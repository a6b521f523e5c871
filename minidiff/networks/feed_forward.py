"""The feed-forward layers of transformers."""

import torch.nn.functional as F
from torch import Tensor, nn

from .norm import Fused

LARGE = 2**23
"""More numbers to gate are computed by `strips`, where a layer has such a function (speed/strips.py)."""


class FeedForward(nn.Module):
    """Linear, GEGLU, linear."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Identity takes the place of the folder format's dropout, which has no weights.
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[B,N,C] -> [B,N,C]."""
        return self.net[2](self.net[0](x))


class GEGLU(nn.Module):
    """Shazeer 2020, "GLU variants improve transformer": value * gelu(gate); the weight's first half is for value."""

    fused: Fused = None
    gated_gelu_strips: Fused = None

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.proj, self.width = nn.Linear(channels, 2 * out), 2 * out

    def forward(self, x: Tensor) -> Tensor:
        """[B,N,C] -> [B,N,C']."""
        if self.gated_gelu_strips is not None and x.shape[:-1].numel() * self.width > LARGE:
            return self.gated_gelu_strips(self, x)
        return self.whole(x)

    def whole(self, x: Tensor) -> Tensor:
        """The same at once."""
        return self.plain(x) if self.fused is None else self.fused(self, x)

    def plain(self, x: Tensor) -> Tensor:
        """The same by torch's own kernels."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)
