"""Attention, and the two ways to take part in it from outside: `Record` reads its maps, `Edit` changes them.

Shapes: B rows of the batch, H heads, h x w latent grid, N = h * w pixels, L text tokens (L = N in self-attention), D
channels per head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, cat, einsum, nn

if TYPE_CHECKING:
    from .sites import Where

Place = Literal["down", "mid", "up"]
Rows = Literal["cond", "uncond", "all"]
Inputs = Mapping[str, Tensor]
Grid = tuple[int, int]


@dataclass(frozen=True)
class Site:
    """One attention layer.

    `block` counts within its place and `layer` within its block, both from 0 in the order in which they run.
    """

    place: Place
    block: int
    layer: int
    kind: Literal["cross", "self"]

    @property
    def name(self) -> str:
        """Such as "up.1.0.cross"."""
        return f"{self.place}.{self.block}.{self.layer}.{self.kind}"

    @property
    def key(self) -> str:
        """The path of the module in the UNet and in its weight file."""
        block = "mid_block" if self.place == "mid" else f"{self.place}_blocks.{self.block}"
        return f"{block}.attentions.{self.layer}.transformer_blocks.0.attn{1 if self.kind == 'self' else 2}"

    def __str__(self) -> str:
        return self.name


Keep = Callable[[Site, Tensor, Inputs], Tensor]
"""What to keep of a recorded site: a pure module-level function (site, probs [B,H,h,w,L], inputs) -> Tensor."""


def ALL(site: Site, probs: Tensor, inputs: Inputs) -> Tensor:
    """Keep everything: [B,H,h,w,L]."""
    return probs


def HEAD_MEAN(site: Site, probs: Tensor, inputs: Inputs) -> Tensor:
    """Keep the mean over heads: [B,h,w,L]."""
    return probs.mean(dim=1)


def COLUMNS(site: Site, probs: Tensor, inputs: Inputs) -> Tensor:
    """Keep one column per object, the sum of the probabilities under `inputs["token_weights"]` [B,O,L]: [B,H,h,w,O]."""
    weights = inputs["token_weights"].to(probs)
    return (probs.flatten(2, 3) @ weights.mT[:, None]).unflatten(2, probs.shape[2:4])


def BOX_MASS(site: Site, probs: Tensor, inputs: Inputs) -> Tensor:
    """Keep, for every object and token, the share of the token's attention that lies inside the object's mask:
    [B,H,O,L] in [0,1].

    The masks [B,O,h,w] are `inputs[mask_name((h, w))]`.
    """
    inside, everywhere = _box_sums(probs, inputs[mask_name((probs.shape[2], probs.shape[3]))])
    return inside / everywhere


def _box_sums(probs: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The sums [B,H,O,L] over the pixels of each mask [B,O,h,w], and over all pixels [B,H,1,L]."""
    return einsum("bhyxl,boyx->bhol", probs, masks.to(probs)), probs.sum(dim=(2, 3))[:, :, None]


def mask_name(grid: Grid) -> str:
    """The name among a forward pass's `inputs` of the objects' masks on a grid: "masks.16x16"."""
    return f"masks.{grid[0]}x{grid[1]}"


@dataclass(frozen=True)
class Record:
    """What to keep of a forward pass: a value that goes in; the maps come out.

    Static and hashable, so it never recompiles a graph.

    `sites` is a set of them or, where a model is at hand to choose from (generate, sample_steps), a choice such as
    `cross & at_most(16)`; the UNet itself takes sets.

    `rows` says which half of a batch [uncond, cond] is recorded; a batch that holds conditional rows only needs "all".
    With `stop` the forward pass ends after the last recorded site and returns None for eps.
    """

    sites: frozenset[Site] | Where
    keep: Keep = ALL
    rows: Rows = "cond"
    stop: bool = False


@dataclass(frozen=True)
class Edit:
    """How to change the attention of some sites.

    Static and hashable; whatever depends on the prompt comes in through `inputs`.

    `bias(site, (h, w), inputs)` returns what to add to the logits (q k^T / sqrt(D)), broadcastable to [B,H,h,w,L]; the
    fused kernel still runs.
    `probs(site, probs [B,H,h,w,L], inputs)` returns new probabilities of that shape; the site is then computed
    explicitly.
    Order at a site: logits + bias, softmax, `probs`, record. `sites` and `rows` as in `Record`.
    `steps` is for sampling, which edits the first so many steps of a run (None: all); the UNet itself ignores it.
    """

    sites: frozenset[Site] | Where
    bias: Callable[[Site, Grid, Inputs], Tensor] | None = None
    probs: Callable[[Site, Tensor, Inputs], Tensor] | None = None
    rows: Rows = "cond"
    steps: int | None = None


class Hooks(NamedTuple):
    """What one forward pass of the UNet carries to its attention layers: also the sites that `record` and `edit` name,
    and the one after which it ends.
    """

    record: Record | None
    edit: Edit | None
    inputs: Inputs
    recorded: frozenset[Site] = frozenset()
    edited: frozenset[Site] = frozenset()
    stop: Site | None = None


NO_HOOKS = Hooks(None, None, {})


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v by the fused kernel; q [B,H,N,D], k and v [B,H,L,D], bias broadcastable to
    [B,H,N,L].
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def attention_probs(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) [B,H,N,L], in float32 (or better) whatever the dtype of q: losses are built on
    it.
    """
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    return (logits if bias is None else logits + bias).softmax(dim=-1)


class Attention(nn.Module):
    """Multi-head attention of pixels to text (`context` given) or to each other.

    Weight names as in the folder format.
    """

    def __init__(self, site: Site, channels: int, context_channels: int, num_heads: int) -> None:
        super().__init__()
        self.site, self.num_heads = site, num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor, grid: Grid, hooks: Hooks) -> tuple[Tensor, Tensor | None]:
        """x [B,N,C], context [B,L,C'] -> (new x, what the record keeps of this site or None)."""
        q, k, v = (self.split_heads(y) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        record = hooks.record if self.site in hooks.recorded else None
        edit = hooks.edit if self.site in hooks.edited else None
        if record is None and edit is None:
            out, kept = attention(q, k, v), None
        else:
            out, kept = hooked_attention(self.site, q, k, v, grid, record, edit, hooks.inputs)
        return self.to_out[0](out.transpose(1, 2).flatten(2)), kept  # [B,H,N,D] -> [B,N,C]

    def split_heads(self, y: Tensor) -> Tensor:
        """[B,N,C] -> [B,H,N,D]."""
        return y.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def hooked_attention(
    site: Site, q: Tensor, k: Tensor, v: Tensor, grid: Grid, record: Record | None, edit: Edit | None, inputs: Inputs
) -> tuple[Tensor, Tensor | None]:
    """Attention of a site that is recorded, edited or both; the half of the batch that neither names stays on the fused
    kernel.
    """
    outs: list[Tensor] = []
    kept: list[Tensor] = []
    for half, rows in _halves(len(q), record, edit):
        recorded = record is not None and record.rows in (half, "all")
        edited = edit if edit is not None and edit.rows in (half, "all") else None
        keep = record.keep if record is not None and recorded else None
        out, found = _attend(site, q[rows], k[rows], v[rows], grid, edited, keep, inputs)
        outs.append(out)
        kept += [] if found is None else [found]
    return cat(outs), cat(kept) if kept else None


def _halves(batch: int, record: Record | None, edit: Edit | None) -> list[tuple[str, slice]]:
    if all(hook.rows == "all" for hook in (record, edit) if hook is not None):
        return [("all", slice(0, batch))]
    if batch % 2:
        raise ValueError(
            f"a record or edit of one half of the batch got {batch} rows; expected [uncond, cond], an even number. "
            'Use rows="all" for a batch without uncond rows'
        )
    return [("uncond", slice(0, batch // 2)), ("cond", slice(batch // 2, batch))]


def _attend(
    site: Site, q: Tensor, k: Tensor, v: Tensor, grid: Grid, edit: Edit | None, keep: Keep | None, inputs: Inputs
) -> tuple[Tensor, Tensor | None]:
    """(output [B,H,N,D], what `keep` keeps)."""
    bias = None
    if edit is not None and edit.bias is not None:
        bias = edit.bias(site, grid, inputs).to(q.dtype)
        bias = bias.expand(*bias.shape[:-3], *grid, -1).flatten(-3, -2)  # [..,h,w,L] -> [..,N,L]
    change = None if edit is None else edit.probs
    if change is not None:
        probs = change(site, attention_probs(q, k, bias).unflatten(2, grid), inputs)
        return probs.flatten(2, 3).to(v.dtype) @ v, None if keep is None else keep(site, probs, inputs)
    if keep is None:
        return attention(q, k, v, bias), None
    return recorded_attention(site, q, k, v, grid, keep, inputs, bias)


AT_ONCE = 2**24
"""So many probabilities of a recorded site lie in memory together (64 MB)."""
_ROWS: Mapping[Keep, int] = {ALL: 2, HEAD_MEAN: 1, COLUMNS: 2}
"""Kinds of keep that look at each pixel alone -> where the grid's rows stand in what they return."""


def recorded_attention(
    site: Site,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Grid,
    keep: Keep,
    inputs: Inputs,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(output [B,H,N,D], what `keep` keeps of the probabilities); bias broadcastable to [B,H,N,L], N not broadcast.

    A large site goes by some rows of the grid at a time where `keep` is one of the kinds declared above, so its
    probabilities are never all in memory (64x64 self-attention of SD 1.5: 512 MB an image), unless for a gradient.
    """
    height, width = grid
    rows = max(1, AT_ONCE // (q.shape[0] * q.shape[1] * width * k.shape[2]))
    if keep is not BOX_MASS and keep not in _ROWS:
        rows = height
    outs, kept, sums = [], [], []
    for top in range(0, height, rows):
        some = slice(top * width, (top + rows) * width)
        probs = attention_probs(q[:, :, some], k, None if bias is None else bias[..., some, :])
        outs.append(probs.to(v.dtype) @ v)
        probs = probs.unflatten(2, (-1, width))
        if rows >= height:
            return outs[0], keep(site, probs, inputs)
        if keep is BOX_MASS:
            sums.append(_box_sums(probs, inputs[mask_name(grid)][:, :, top : top + rows]))
        else:
            kept.append(keep(site, probs, inputs))
    if keep is BOX_MASS:
        inside, everywhere = (sum(part[1:], part[0]) for part in zip(*sums, strict=True))
        return cat(outs, dim=2), inside / everywhere
    return cat(outs, dim=2), cat(kept, dim=_ROWS[keep])
