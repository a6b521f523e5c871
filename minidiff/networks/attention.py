"""Multi-head attention, and the three ways into it: `Record` keeps its maps, `Edit` changes them, `inputs` feed both.

Shapes: B rows of the batch, H heads, h x w latent grid, N = h * w pixels, L text tokens (L = N in self-attention), D
channels per head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, cat, einsum, nn

from ..checks import choice, returned, shown, whole
from ..vocabulary import own_keywords
from .sites import Grid, Site, Where, picture_name, read_sites

Rows = Literal["cond", "uncond", "all"]
Inputs = Mapping[str, Tensor]
Maps = dict[Site, Tensor]  # what was kept at each site
KeepFunction = Callable[[Site, Tensor, Inputs], Tensor]
FusedKeep = Callable[[Site, Tensor, Tensor, Grid, "Keep", Inputs], Tensor | None] | None
ROWS = ("cond", "uncond", "all")


@own_keywords
@dataclass(frozen=True)
class Keep:
    """What to keep from a recorded site.

    function: pure and module-level: (site, probs [B,H,h,w,L], inputs) -> Tensor.
    heads: True if the result is probs itself, False if it is their mean over heads [B,h,w,L], None for anything else,
        from which phrases cannot be read.
    rows: the dimension of the result that holds the grid's rows, if the function treats each row independently. Large
        sites are then recorded a few rows at a time.
    sums, finish: the same for a function that is `finish` of a sum over rows of `sums(probs, masks [B,O,rows,w])`.
    """

    name: str
    function: KeepFunction
    heads: bool | None = None
    rows: int | None = None
    sums: Callable[[Tensor, Tensor], Tensor] | None = None
    finish: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not callable(self.function):
            raise ValueError(f'got Keep({shown(self.name)}, {shown(self.function)}); expected Keep("name", function)')
        if (self.sums is None) != (self.finish is None):
            raise ValueError(f"{self.name} has one of sums and finish; expected both, or neither")

    def __call__(self, site: Site, probs: Tensor, inputs: Inputs) -> Tensor:
        """What to keep from probs [B,H,h,w,L]."""
        kept = self.function(site, probs, inputs)
        if not isinstance(kept, Tensor):
            raise ValueError(f"{self.name} returned {shown(kept)}; expected a tensor")
        return kept

    def __str__(self) -> str:
        return self.name

    @classmethod
    def read(cls, keep: Keep | KeepFunction) -> Keep:
        """A Keep from a Keep or a plain function."""
        if isinstance(keep, Keep):
            return keep
        if not callable(keep):
            raise ValueError(f"keep is {shown(keep)}; expected a Keep such as minidiff.HEAD_MEAN, or a function")
        return cls(getattr(keep, "__name__", type(keep).__name__), keep)


def _all(site: Site, probs: Tensor, inputs: Inputs) -> Tensor:
    return probs


def _head_mean(site: Site, probs: Tensor, inputs: Inputs) -> Tensor:
    return probs.mean(dim=1)


def _columns(site: Site, probs: Tensor, inputs: Inputs) -> Tensor:
    weights = read_input(inputs, "token_weights").to(probs)
    return (probs.flatten(2, 3) @ weights.mT[:, None]).unflatten(2, probs.shape[2:4])


def _box_mass(site: Site, probs: Tensor, inputs: Inputs) -> Tensor:
    return _share(_box_sums(probs, read_input(inputs, mask_name((probs.shape[2], probs.shape[3])))))


def _box_sums(probs: Tensor, masks: Tensor) -> Tensor:
    """Sums over the pixels in each mask [B,O,h,w], then the sum over all pixels: [B,H,O+1,L]."""
    inside = einsum("bhyxl,boyx->bhol", probs, masks.to(probs))
    return cat([inside, probs.sum(dim=(2, 3))[:, :, None]], dim=2)


def _share(sums: Tensor) -> Tensor:
    return sums[:, :, :-1] / sums[:, :, -1:]


ALL = Keep("ALL", _all, heads=True, rows=2)
"""Keep everything: [B,H,h,w,L]."""
HEAD_MEAN = Keep("HEAD_MEAN", _head_mean, heads=False, rows=1)
"""Keep the mean over heads: [B,h,w,L]."""
COLUMNS = Keep("COLUMNS", _columns, rows=2)
"""Keep one column per object, the probabilities weighted by `inputs["token_weights"]` [B,O,L]: [B,H,h,w,O]."""
BOX_MASS = Keep("BOX_MASS", _box_mass, sums=_box_sums, finish=_share)
"""Keep, for each object and token, the fraction of the token's attention inside the object's mask: [B,H,O,L] in
[0,1]. The masks [B,O,h,w] are `inputs[mask_name((h, w))]`.
"""


def mask_name(grid: Grid) -> str:
    """The key in `inputs` of the objects' masks on a grid: "masks.16x16"."""
    return f"masks.{grid[0]}x{grid[1]}"


GUIDED = "guided"
"""The key in `inputs` that only the passes of guidance have."""


def read_input(inputs: Inputs, name: str, expected: str = 'boxes={"phrase": (x0, y0, x1, y1)}') -> Tensor:
    """One of the inputs of a forward pass. ValueError if it is missing, with the argument that provides it."""
    if name not in inputs:
        raise ValueError(f"{name!r} is not among the inputs; expected {expected}")
    return inputs[name]


@own_keywords
@dataclass(frozen=True)
class Record:
    """What to keep from a forward pass, which returns the maps.

    Static and hashable, so it never recompiles a graph. `sites` is a set or, for functions that know the model
    (generate, sample_steps), a choice such as `cross & at_most(16)`; the UNet itself takes sets only.
    `rows` says which half of a batch [uncond, cond] is recorded; use "all" for a batch of conditional rows only.
    With `stop` the forward pass ends after the last recorded site and returns None for eps.
    `one | other` records both. Each site is recorded once: if the two keep different things from it, everything is
    kept, from which both can be computed. `more` holds the other records; `kinds` what to keep at each site, once the
    sites are resolved.
    """

    sites: frozenset[Site] | Where
    keep: Keep = ALL
    rows: Rows = "cond"
    stop: bool = False
    more: tuple[tuple[frozenset[Site] | Where, Keep], ...] = ()
    kinds: dict[Site, Keep] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", read_sites("sites", self.sites))
        object.__setattr__(self, "keep", Keep.read(self.keep))
        choice("rows", self.rows, ROWS)
        if not isinstance(self.stop, bool):
            raise ValueError(f"stop is {shown(self.stop)}; expected True or False")
        if not isinstance(self.more, tuple):
            raise ValueError(f"more is {shown(self.more)}; expected the value that `record | record` sets")
        for sites, keep in ((self.sites, self.keep), *self.more):
            for site in sites if isinstance(sites, frozenset) else ():
                self.kinds[site] = keep if self.kinds.get(site, keep) == keep else ALL

    def __or__(self, other: Record) -> Record:
        if not isinstance(other, Record):
            raise TypeError(f"got {shown(other)}; expected another Record")
        if (self.rows, self.stop) != (other.rows, other.stop):
            raise ValueError(
                f"rows and stop are {self.rows!r}, {self.stop} in one record and {other.rows!r}, {other.stop} in the "
                "other; expected the same"
            )
        return replace(self, more=(*self.more, (other.sites, other.keep), *other.more))

    def chosen(self, choose: Callable[[frozenset[Site] | Where], frozenset[Site]]) -> Record:
        """The same record with every choice of sites resolved."""
        return replace(self, sites=choose(self.sites), more=tuple((choose(where), keep) for where, keep in self.more))


@own_keywords
@dataclass(frozen=True)
class Edit:
    """How to change the attention of some sites.

    Static and hashable; everything that depends on the prompt or the step comes through `inputs`, which also hold the
    step's number, `step`, its `t` and `sigma` (float32 []).
    `kv(site, k, v, inputs)` returns new keys and values [B,H,L',D], L' >= L.
    `bias(site, (h, w), inputs)` returns a term to add to the logits (q k^T / sqrt(D)), broadcastable to [B,H,h,w,L];
    with only these two, the fused kernel still runs.
    `logits(site, logits [B,H,h,w,L], inputs)` and `probs(site, probs [B,H,h,w,L], inputs)` return replacements of the
    same shape; the site is then computed explicitly.
    Order at a site: keys and values, logits + bias, `logits`, softmax, `probs`, record; several edits apply in the
    order given. `sites` and `rows` as in `Record`.
    `update(maps, inputs)`, in sampling, makes inputs for the next calls of conditional maps {site: [B,h,w,L]}.
    `steps`, for sampling: None is all steps of a run, n the first n, or, in (0,1), the first so large a part of them,
    (start, stop) those from start up to stop - 1.
    """

    sites: frozenset[Site] | Where
    bias: Callable[[Site, Grid, Inputs], Tensor] | None = None
    probs: Callable[[Site, Tensor, Inputs], Tensor] | None = None
    rows: Rows = "cond"
    steps: int | float | tuple[int, int] | None = None
    logits: Callable[[Site, Tensor, Inputs], Tensor] | None = None
    kv: Callable[[Site, Tensor, Tensor, Inputs], tuple[Tensor, Tensor]] | None = None
    update: Callable[[Maps, Inputs], Inputs] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", read_sites("sites", self.sites))
        choice("rows", self.rows, ROWS)
        functions = {name: getattr(self, name) for name in ("bias", "logits", "probs", "kv", "update")}
        for name, function in functions.items():
            if function is not None and not callable(function):
                raise ValueError(f"{name} is {shown(function)}; expected a function")
        if any((self.bias, self.probs, self.logits, self.kv)) == (self.update is not None):
            has = "neither" if self.update is None else "both"
            raise ValueError(f"an Edit has either update, or some of bias, logits, probs and kv; this one has {has}")
        if isinstance(self.steps, tuple | list) and len(self.steps) == 2:
            first = whole("steps", self.steps[0], 0)
            expected = f"(start, stop) with stop at least start, {first}"
            object.__setattr__(self, "steps", (first, whole("steps", self.steps[1], first, expected=expected)))
        elif self.steps is not None and not (isinstance(self.steps, float) and 0 < self.steps < 1):
            expected = "None, a number of first steps, a fraction of all, or (start, stop)"
            object.__setattr__(self, "steps", whole("steps", self.steps, 0, expected=expected))

    def of_run(self, steps: int, choose: Callable[[frozenset[Site] | Where], frozenset[Site]]) -> Edit:
        """The same for a run of so many steps, with its sites chosen: a fraction becomes a number."""
        number = round(self.steps * steps) if isinstance(self.steps, float) else self.steps
        return replace(self, sites=choose(self.sites), steps=number)

    def acts_in(self, step: int) -> bool:
        """Whether the edit applies in a step of a run, counted from 0."""
        first, last = self.steps if isinstance(self.steps, tuple) else (0, self.steps)
        return last is None or first <= step < last


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, fused; q [B,H,N,D], k and v [B,H,L,D], bias broadcastable to [B,H,N,L]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class Hooks(NamedTuple):
    """What one forward pass of the UNet gives its attention layers. stop: the site after which the pass ends."""

    kinds: Mapping[Site, Keep]
    rows: Rows
    edits: tuple[Edit, ...]
    inputs: Inputs
    stop: Site | None = None
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = attention  # where no record and no edit is


def attention_logits(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """q k^T / sqrt(D) + bias, [B,H,N,L] in float32 (or better) for any dtype of q, since losses use it."""
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    return logits if bias is None else logits + bias


def attention_probs(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """The softmax of `attention_logits` over the tokens."""
    return attention_logits(q, k, bias).softmax(dim=-1)


class AttentionLayer(nn.Module):
    """Multi-head attention of pixels to text (`context` given) or to each other.

    Weight names as in the folder format. `to_k_ip` and `to_v_ip` have one layer for each IP-Adapter on the UNet.
    `fused` computes what is kept at the side of the fused kernel, or returns None (speed/keeps.py).
    """

    fused: FusedKeep = None

    def __init__(self, site: Site, channels: int, context_channels: int, num_heads: int) -> None:
        super().__init__()
        self.site, self.num_heads = site, num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.to_k_ip, self.to_v_ip = nn.ModuleList(), nn.ModuleList()

    def forward(self, x: Tensor, context: Tensor, grid: Grid, hooks: Hooks) -> tuple[Tensor, Tensor | None]:
        """x [B,N,C], context [B,L,C'] -> (new x, what the record keeps of this site or None)."""
        out, kept = self.heads(x, context, grid, hooks)
        return self.to_out[0](out), kept

    def heads(self, x: Tensor, context: Tensor, grid: Grid, hooks: Hooks) -> tuple[Tensor, Tensor | None]:
        """The same without the last map: the heads' outputs side by side [B,N,C]."""
        q, k, v = (self.split_heads(y) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        out, kept = hooked_attention(self.site, q, k, v, grid, hooks, self.fused)
        for adapter, layers in enumerate(zip(self.to_k_ip, self.to_v_ip, strict=True)):
            number = 0
            while (name := picture_name(adapter, number)) in hooks.inputs:
                k, v = (self.split_heads(layer(hooks.inputs[name])) for layer in layers)
                share = hooks.inputs[picture_name(adapter, number, grid)].flatten(1)[:, None, :, None]  # [B,1,N,1]
                out = out + share * attention(q, k, v)
                number += 1
        return out.transpose(1, 2).flatten(2), kept  # [B,H,N,D] -> [B,N,C]

    def split_heads(self, y: Tensor) -> Tensor:
        """[B,N,C] -> [B,H,N,D]."""
        return y.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


def hooked_attention(
    site: Site, q: Tensor, k: Tensor, v: Tensor, grid: Grid, hooks: Hooks, fused: FusedKeep = None
) -> tuple[Tensor, Tensor | None]:
    """Attention at any site; without record or edit, and in a half of the batch without, by the fused kernel."""
    keep, rows = hooks.kinds.get(site), hooks.rows
    edits = tuple(edit for edit in hooks.edits if site in edit.sites)  # type: ignore[operator]  # chosen
    if keep is None and not edits:
        return hooks.attend(q, k, v), None
    if keep is not None and not edits and fused is not None:
        part = dict(_halves(len(q), {rows}))[rows]
        found = fused(site, q[part], k[part], grid, keep, hooks.inputs)
        if found is not None:
            return attention(q, k, v), found
    outs: list[Tensor] = []
    kept: list[Tensor] = []
    named = {edit.rows for edit in edits} | (set() if keep is None else {rows})
    for half, part in _halves(len(q), named):
        own = [edit for edit in edits if edit.rows in (half, "all")]
        keep_half = keep if rows in (half, "all") else None
        out, found = _attend(site, q[part], k[part], v[part], grid, own, keep_half, hooks.inputs)
        outs.append(out)
        kept += [] if found is None else [found]
    return cat(outs), cat(kept) if kept else None


def _halves(batch: int, named: set[Rows]) -> list[tuple[str, slice]]:
    if named == {"all"}:
        return [("all", slice(0, batch))]
    if batch % 2:
        raise ValueError(
            f"a record or edit of one half of the batch got {batch} rows; expected [uncond, cond], an even number. "
            'Use rows="all" for a batch without uncond rows'
        )
    return [("uncond", slice(0, batch // 2)), ("cond", slice(batch // 2, batch))]


def _attend(
    site: Site, q: Tensor, k: Tensor, v: Tensor, grid: Grid, edits: Sequence[Edit], keep: Keep | None, inputs: Inputs
) -> tuple[Tensor, Tensor | None]:
    """(output [B,H,N,D], what `keep` keeps)."""
    bias = None
    for edit in edits:
        if edit.kv is not None:
            found = edit.kv(site, k, v, inputs)
            k, v = found if isinstance(found, tuple) and len(found) == 2 else (found, found)
            k = returned(edit.kv, k, *q.shape[:2], None, q.shape[3])
            v = returned(edit.kv, v, *k.shape)
    for edit in edits:
        if edit.bias is not None:
            added = returned(edit.bias, edit.bias(site, grid, inputs), *q.shape[:2], *grid, k.shape[2], broadcast=True)
            added = added[(None,) * (5 - added.ndim)]
            added = added.to(q.dtype).expand(*added.shape[:-3], *grid, -1).flatten(-3, -2)  # [..,h,w,L] -> [..,N,L]
            bias = added if bias is None else bias + added
    if not any(edit.logits or edit.probs for edit in edits):
        if keep is None:
            return attention(q, k, v, bias), None
        return recorded_attention(site, q, k, v, grid, keep, inputs, bias)
    logits = attention_logits(q, k, bias).unflatten(2, grid)
    for edit in edits:
        if edit.logits is not None:
            logits = returned(edit.logits, edit.logits(site, logits, inputs), *logits.shape)
    probs = logits.softmax(dim=-1)
    for edit in edits:
        if edit.probs is not None:
            probs = returned(edit.probs, edit.probs(site, probs, inputs), *probs.shape)
    return probs.flatten(2, 3).to(v.dtype) @ v, None if keep is None else keep(site, probs, inputs)


AT_ONCE = 2**24
"""The maximum number of probabilities of a recorded site in memory at once (64 MB)."""


def recorded_attention(
    site: Site, q: Tensor, k: Tensor, v: Tensor, grid: Grid, keep: Keep, inputs: Inputs, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(output [B,H,N,D], what `keep` keeps); bias broadcastable to [B,H,N,L], but with its full N.

    A large site is computed a few grid rows at a time if `keep` allows it, so that its probabilities are never all in
    memory (64x64 self-attention of SD 1.5: 512 MB per image), unless a gradient needs them.
    """
    height, width = grid
    rows = max(1, AT_ONCE // (q.shape[0] * q.shape[1] * width * k.shape[2]))
    if rows >= height or (keep.rows is None and keep.sums is None):
        probs = attention_probs(q, k, bias)
        return probs.to(v.dtype) @ v, keep(site, probs.unflatten(2, grid), inputs)
    outs, kept = [], []
    for top in range(0, height, rows):
        some = slice(top * width, (top + rows) * width)
        probs = attention_probs(q[:, :, some], k, None if bias is None else bias[..., some, :])
        outs.append(probs.to(v.dtype) @ v)
        probs = probs.unflatten(2, (-1, width))
        if keep.sums is None:
            kept.append(keep(site, probs, inputs))
        else:
            kept.append(keep.sums(probs, read_input(inputs, mask_name(grid))[:, :, top : top + rows]))
    if keep.finish is not None:
        return cat(outs, dim=2), keep.finish(sum(kept[1:], kept[0]))
    return cat(outs, dim=2), cat(kept, dim=keep.rows or 0)
