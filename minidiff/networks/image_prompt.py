"""IP-Adapter's own networks (Ye et al. 2023, arXiv:2308.06721): from a vision model's features to tokens.

The tokens are as wide as the text's. The UNet attends to them with separate keys and values: `to_k_ip` and `to_v_ip`
of its AttentionLayers. Weights are named as in the files, under `image_proj.`.

Shapes: n pictures, E features from the vision model per picture or per each of its P patches, T tokens, D wide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from .attention import attention

Shapes = Mapping[str, tuple[int, ...]]
_HEAD = 64  # width of a head in every resampler


class Projection(nn.Module):
    """The plain adapter: T tokens from the embedding of the whole picture."""

    kind, reads = "plain", "embedding"

    def __init__(self, shapes: Shapes, width: int) -> None:
        super().__init__()
        out, inputs = shapes["proj.weight"]
        self.inputs, self.tokens = inputs, max(1, out // width)
        self.proj = nn.Linear(inputs, self.tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """[n,E] -> [n,T,D]."""
        return self.norm(self.proj(x).unflatten(1, (self.tokens, -1)))


class FullProjection(nn.Module):
    """The "full face" adapter: one token per patch, including the class token."""

    kind, reads = "full face", "patches"

    def __init__(self, shapes: Shapes, width: int) -> None:
        super().__init__()
        hidden, inputs = shapes["proj.0.weight"]
        self.inputs, self.tokens = inputs, 0  # as many as there are patches
        self.proj = nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, width), nn.LayerNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        """[n,P,E] -> [n,P,D]."""
        return self.proj(x)


class Resampler(nn.Module):
    """The "plus" adapters: T learned queries that read the patches (a Perceiver, Jaegle et al. 2021)."""

    kind, reads = "plus", "patches"

    def __init__(self, shapes: Shapes, width: int) -> None:
        super().__init__()
        _, self.tokens, hidden = shapes["latents"]
        self.inputs = shapes["proj_in.weight"][1]
        depth = len({key.split(".")[1] for key in shapes if key.startswith("layers.")})
        inner, grown = shapes["layers.0.0.to_q.weight"][0], shapes["layers.0.1.1.weight"][0]
        if inner % _HEAD:
            raise ValueError(f"its queries are {inner} wide; expected a multiple of {_HEAD}, the width of a head")
        self.latents = nn.Parameter(torch.empty(1, self.tokens, hidden))
        self.proj_in = nn.Linear(self.inputs, hidden)
        self.layers = nn.ModuleList(
            nn.ModuleList([Reader(hidden, inner), feed_forward(hidden, grown)]) for _ in range(depth)
        )
        self.proj_out = nn.Linear(hidden, width)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """[n,P,E] -> [n,T,D]."""
        x, latents = self.proj_in(x), self.latents.expand(len(x), -1, -1)
        for layer in cast("list[nn.ModuleList]", list(self.layers)):
            latents = latents + layer[0](x, latents)
            latents = latents + layer[1](latents)
        return self.norm_out(self.proj_out(latents))


class Reader(nn.Module):
    """Attention from the queries to the patches and to themselves."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.to_q = nn.Linear(hidden, inner, bias=False)
        self.to_kv = nn.Linear(hidden, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """Patches x [n,P,C], latents [n,T,C] -> [n,T,C]."""
        latents = self.norm2(latents)
        k, v = self.to_kv(torch.cat([self.norm1(x), latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (y.unflatten(2, (-1, _HEAD)).transpose(1, 2) for y in (self.to_q(latents), k, v))  # [n,H,.,64]
        return self.to_out(attention(q, k, v).transpose(1, 2).flatten(2))


def feed_forward(hidden: int, grown: int) -> nn.Sequential:
    """A norm and two linear layers without biases."""
    return nn.Sequential(
        nn.LayerNorm(hidden), nn.Linear(hidden, grown, bias=False), nn.GELU(), nn.Linear(grown, hidden, bias=False)
    )


AnyProjection = Projection | FullProjection | Resampler
_KINDS: tuple[tuple[str, type[AnyProjection]], ...] = (
    ("proj.weight", Projection),
    ("proj.3.weight", FullProjection),
    ("latents", Resampler),
)
"""(A key that is unique to one kind, the network of that kind)."""


def image_projection(shapes: Shapes, width: int) -> AnyProjection | None:
    """The network for these tensors (named without `image_proj.`) and a text this wide; None if no kind matches.

    Its sizes come from the tensors. KeyError if a tensor needed for them is missing, ValueError if they make no sense.
    """
    kind = next((kind for key, kind in _KINDS if key in shapes), None)
    return None if kind is None else kind(shapes, width)
