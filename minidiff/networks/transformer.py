"""The transformers of the UNet: self-attention, attention to the text and a feed-forward layer (Rombach et al. 2022,
section 3.3).

Module names are those of the folder format. Shapes: x [B,C,h,w], its tokens [B,N,C], context [B,L,D] text.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionLayer, Hooks, Maps
from .config import UNetConfig
from .norm import Fused, GroupNorm, LayerNorm
from .sites import Place, Site

INPUT = Site("down", -1, -1, "self")
"""The key, among a transformer's maps in a pass that ends early, of what it got [B,C,h,w]. No layer has it."""
TOKENS = Site("down", -1, -1, "cross")
"""The same after self-attention [B,N,C]: what comes before it reads the text."""
LARGE = 2**22
"""More numbers to gate are computed by `strips`, where a layer has such a function (speed/strips.py)."""


class Transformer(nn.Module):
    """Pixels as tokens: self-attention, cross-attention to the text and feed-forward, with a residual connection."""

    fused: Callable[..., tuple[Tensor | None, Maps]] | None = None

    def __init__(self, config: UNetConfig, place: Place, block: int, layer: int, level: int) -> None:
        super().__init__()
        channels, heads = config.block_out_channels[level], config.num_heads[level]
        self.linear = config.use_linear_projection
        self.norm = GroupNorm(config.norm_num_groups, channels, 1e-6)
        self.proj_in = nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(place, block, layer, channels, config.cross_attention_dim, heads)]
        )
        self.proj_out = nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor, hooks: Hooks) -> tuple[Tensor | None, Maps]:
        """x [B,C,h,w] -> (x, maps of this layer); x is None when `hooks.stop` ended the pass here."""
        return self.plain(x, context, hooks) if self.fused is None else self.fused(self, x, context, hooks)

    def plain(self, x: Tensor, context: Tensor, hooks: Hooks) -> tuple[Tensor | None, Maps]:
        """The same, layer by layer."""
        grid = (x.shape[2], x.shape[3])
        y = self.norm(x)
        y = y if self.linear else self.proj_in(y)
        y = y.flatten(2).transpose(1, 2)  # [B,C,h,w] -> [B,N,C]
        y = self.proj_in(y) if self.linear else y
        y, maps = self.transformer_blocks[0](y, context, grid, hooks)
        if TOKENS in maps:
            maps[INPUT] = x
        return (None if y is None else self._back(x, y)), maps

    def read(self, x: Tensor, tokens: Tensor, context: Tensor, hooks: Hooks) -> Tensor:
        """The rest of the layer, from what a pass kept as `INPUT` and `TOKENS`: the new x [B,C,h,w]."""
        block = cast(TransformerBlock, self.transformer_blocks[0])
        return self._back(x, block.read(tokens, context, (x.shape[2], x.shape[3]), hooks))

    def _back(self, x: Tensor, y: Tensor) -> Tensor:
        """Tokens [B,N,C], back in x [B,C,h,w] or [B/2,C,h,w]."""
        y = self.proj_out(y) if self.linear else y
        y = y.transpose(1, 2).unflatten(2, (x.shape[2], x.shape[3]))
        return _again(x, y) + (y if self.linear else self.proj_out(y))


class TransformerBlock(nn.Module):
    """attn1 attends to the pixels, attn2 to the text."""

    def __init__(
        self, place: Place, block: int, layer: int, channels: int, context_channels: int, num_heads: int
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(channels)
        self.attn1 = AttentionLayer(Site(place, block, layer, "self"), channels, channels, num_heads)
        self.norm2 = LayerNorm(channels)
        self.attn2 = AttentionLayer(Site(place, block, layer, "cross"), channels, context_channels, num_heads)
        self.norm3 = LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor, grid: tuple[int, int], hooks: Hooks) -> tuple[Tensor | None, Maps]:
        """x [B,N,C] -> (x, maps); x is None when `hooks.stop` ended the pass here."""
        y = self.norm1(x)
        y, kept = self.attn1(y, y, grid, hooks)
        maps: Maps = {} if kept is None else {self.attn1.site: kept}
        x = x + y
        if hooks.stop is not None:
            maps[TOKENS] = x
        if self.attn1.site == hooks.stop:
            return None, maps
        x = _again(x, context)
        y = self.norm2(x)  # frees what self-attention made
        y, kept = self.attn2(y, context, grid, hooks)
        if kept is not None:
            maps[self.attn2.site] = kept
        if self.attn2.site == hooks.stop:
            return None, maps
        x = x + y
        return x + self.ff(self.norm3(x)), maps

    def read(self, x: Tensor, context: Tensor, grid: tuple[int, int], hooks: Hooks) -> Tensor:
        """What is left of it after self-attention: [B,N,C] -> [B,N,C]."""
        y, _ = self.attn2(self.norm2(x), context, grid, hooks)
        x = x + y
        return x + cast(Tensor, self.ff(self.norm3(x)))


class FeedForward(nn.Module):
    """Linear, GEGLU, linear."""

    strips: Fused = None

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Identity takes the place of the folder format's dropout, which has no weights.
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[B,N,C] -> [B,N,C]."""
        if self.strips is not None and x.shape[:-1].numel() * cast(GEGLU, self.net[0]).width > LARGE:
            return self.strips(self, x)
        return self.whole(x)

    def whole(self, x: Tensor) -> Tensor:
        """The same at once."""
        return self.net[2](self.net[0](x))


class GEGLU(nn.Module):
    """Shazeer 2020, "GLU variants improve transformer": value * gelu(gate); the weight's first half is for value."""

    fused: Fused = None

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.proj, self.width = nn.Linear(channels, 2 * out), 2 * out

    def forward(self, x: Tensor) -> Tensor:
        """[B,N,C] -> [B,N,C']."""
        return self.plain(x) if self.fused is None else self.fused(self, x)

    def plain(self, x: Tensor) -> Tensor:
        """The same by torch's own kernels."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


def _again(x: Tensor, other: Tensor) -> Tensor:
    """x, its rows repeated to as many as the other's."""
    return x if len(x) == len(other) else torch.cat([x] * (len(other) // len(x)))
