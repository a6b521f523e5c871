"""Regions: parts of the image that read a text of their own.

Every pixel's cross-attention reads one long context, the prompt's tokens and then those of each region, and a bias on
the logits says how much each text counts there. So a step with regions is one step, not one per region.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import number, shown
from ..networks.attention import Edit, Inputs
from ..vocabulary import own_keywords
from .layout import PlacedObject, read_place

if TYPE_CHECKING:
    from ..networks.sites import Grid, Site

_MOST = 64  # regions of a prompt; each adds a context's length to every pixel's attention
_WEIGHTS = 1e-3, 1e3
_LEAST = 1e-26  # of a text that does not count: an objective may divide by all that a token gets


@own_keywords
@dataclass(frozen=True, eq=False)
class Region:
    """A part of the image that reads a text of its own instead of the prompt.

    prompt: its text, encoded by itself, with the same `syntax`.
    box: as in `boxes`: (x0, y0, x1, y1) in [0,1] from the upper left, several such boxes, or a mask.
    negative: what to avoid there, instead of the negative prompt. None keeps that one.
    weight: how much it counts where regions overlap, relative to the others.
    """

    prompt: str
    box: object
    negative: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("prompt", "negative"):
            text = getattr(self, name)
            if not isinstance(text, str) and (text is not None or name == "prompt"):
                raise ValueError(f"regions: {name} is {shown(text)}; expected a text")
        object.__setattr__(self, "weight", number("regions: weight", self.weight, *_WEIGHTS))
        self._place()

    def coverage(self, grid: Grid) -> Tensor:
        """The fraction of each cell that is inside, [h,w] in [0,1]; float64, on the CPU."""
        return self._place().coverage(grid)

    def plain(self) -> dict[str, object]:
        """The fields that are not at their defaults."""
        place = self._place()
        found: dict[str, object] = {"prompt": self.prompt, "box": place.boxes if place.mask is None else place.mask}
        found |= {} if self.negative is None else {"negative": self.negative}
        return found | ({} if self.weight == 1 else {"weight": self.weight})

    def _place(self) -> PlacedObject:
        return read_place(f"regions: the box of {self.prompt!r}", self.box)


def read_regions(value: Any) -> tuple[Region, ...] | tuple[tuple[Region, ...], ...]:
    """Parse `regions`: Regions or mappings of their fields, in a list for all prompts or in one list for each."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"regions is {shown(value)}; expected a list such as [Region('a red fox', (0, 0, 0.5, 1))]")
    if any(own is None or isinstance(own, list | tuple) for own in value):
        return tuple(_regions(() if own is None else own) for own in value)
    return _regions(value)


def _regions(values: Any) -> tuple[Region, ...]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"regions holds lists and {shown(values)}; expected one list for all prompts, or one for each")
    if len(values) > _MOST:
        raise ValueError(f"regions holds {len(values)} for a prompt; expected at most {_MOST}")
    return tuple(map(_region, values))


def _region(value: Any) -> Region:
    if isinstance(value, Region):
        return value
    names = [field.name for field in fields(Region)]
    if not isinstance(value, Mapping) or not {"prompt", "box"} <= value.keys() <= set(names):
        raise ValueError(f"regions holds {shown(value)}; expected a Region, or prompt, box and some of {names[2:]}")
    return Region(**value)


def shares(regions: Sequence[Sequence[Region]], grid: Grid, base_weight: float, negative: bool = False) -> Tensor:
    """How much each text counts in each cell: [P,1+R,h,w], the prompt's first; float64.

    A cell of which the fraction c_r is in region r gives it w_r * c_r, and the prompt 1 - u + base_weight * u with
    u = min(1, sum_r c_r). negative: of the unconditional row, where the negative prompt has the part of every region
    without a negative text.
    """
    most = max(map(len, regions), default=0)
    found = torch.zeros(len(regions), 1 + most, *grid, dtype=torch.float64, device="cpu")
    for own, each in zip(regions, found, strict=True):
        inside = torch.zeros(grid, dtype=torch.float64, device="cpu")
        for slot, region in enumerate(own, start=1):
            cover = region.coverage(grid)
            each[0 if negative and region.negative is None else slot] += region.weight * cover
            inside += cover
        inside.clamp_(max=1)
        each[0] += 1 - inside + base_weight * inside
    return found


def share_bias(parts: Tensor, lengths: Sequence[int]) -> Tensor:
    """The shares [P,1+R,h,w] of texts of these lengths as a bias of their tokens' logits, [P,1,h,w,L].

    With ln s_r added to the logits l of text r's tokens, a pixel's output is sum_r s_r Z_r A_r / sum_r s_r Z_r, where
    A_r is what attention to text r alone gives and Z_r = sum exp(l) over its tokens: with one text that counts, exactly
    A_r. Regional prompting by masks on the cross-attention, as in hako-mikan's Regional Prompter ("attention mode") and
    laksjdjf's attention couple; those run attention once per region and mix the A_r with the weights alone, without Z.
    """
    bias = parts.clamp_min(_LEAST).log().movedim(1, -1)
    return bias.repeat_interleave(torch.tensor(lengths, device=bias.device), dim=-1)[:, None]


def share_name(rows: str, grid: Grid) -> str:
    """The key in `inputs` of the bias [B,1,h,w,L] of one half of the batch."""
    return f"shares.{rows}.{grid[0]}x{grid[1]}"


def share_edits(sites: frozenset[Site], negative: bool) -> tuple[Edit, ...]:
    """The edits that add the biases, or, without regions, `inputs["unread"]` [B,1,1,1,L], which hides positions that
    are not used. negative: the batch has unconditional rows."""
    cond = Edit(sites, bias=_Shares("cond"))
    return (cond, Edit(sites, bias=_Shares("uncond"), rows="uncond")) if negative else (cond,)


@dataclass(frozen=True)
class _Shares:
    rows: str

    def __call__(self, site: Site, grid: Grid, inputs: Inputs) -> Tensor:
        return inputs["unread"] if "unread" in inputs else inputs[share_name(self.rows, grid)]
