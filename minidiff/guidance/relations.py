"""Relations between phrases of a prompt, such as ("cat", "left of", "ball"), which need no boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..checks import shown
from ..vocabulary import RELATIONS

if TYPE_CHECKING:
    from .layout import Box

_MOST = 256  # relations of a prompt
_FULL, _LARGEST, _SMALLEST = 0.85, 0.45, 0.6
"""A planned box's edge: of its cell's, at most so much of the picture's; that of the smallest of several sizes, of the
largest's."""


class Relation(NamedTuple):
    """`first` is `relation` (a key of RELATIONS) `second`: two phrases of the prompt."""

    first: str
    relation: str
    second: str


def read_relations(value: Any) -> tuple[Relation, ...] | tuple[tuple[Relation, ...], ...]:
    """Parse `relations`: triples or texts in a list for all prompts, or in one list (or None) for each."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"relations is {shown(value)}; {_EXPECTED}")
    if value and all(own is None or (isinstance(own, list | tuple) and not _is_triple(own)) for own in value):
        return tuple(_relations(own or ()) for own in value)
    return _relations(value)


def planned(relations: Sequence[Relation]) -> dict[str, Box]:
    """A box for each phrase, where all relations hold unless they contradict each other.

    Columns and rows hold the ranks of x and y; those of one cell stand side by side along its longer edge.
    """
    names = list(dict.fromkeys(name for first, _, second in relations for name in (first, second)))
    x, y, size = (_ranks(names, relations, quantity) for quantity in range(3))
    cells: dict[tuple[int, int], list[str]] = {}
    for name in names:
        cells.setdefault((x[name], y[name]), []).append(name)
    columns, rows, sizes = (max(ranks.values(), default=0) + 1 for ranks in (x, y, size))
    most = max(map(len, cells.values()), default=1)
    across, down = (most, 1) if rows >= columns else (1, most)
    width, height = 1 / (columns * across), 1 / (rows * down)
    edge = min(_FULL * width, _FULL * height, _LARGEST)
    found: dict[str, Box] = {}
    for (column, row), some in cells.items():
        for i, name in enumerate(some):
            middle = (i + 0.5) * most / len(some)
            at_x = (column * across + (middle if across > 1 else 0.5)) * width
            at_y = (row * down + (middle if down > 1 else 0.5)) * height
            half = edge / 2 * (1 - (1 - _SMALLEST) * (sizes - 1 - size[name]) / max(sizes - 1, 1))
            found[name] = (at_x - half, at_y - half, at_x + half, at_y + half)
    return found


def _ranks(names: Sequence[str], relations: Sequence[Relation], quantity: int) -> dict[str, int]:
    """By one of x, y and size: the length of the longest chain of smaller ones."""
    ranks = dict.fromkeys(names, 0)
    for _ in names:
        for first, relation, second in relations:
            asked, sign = RELATIONS[relation]
            low, high = (second, first) if sign > 0 else (first, second)
            if asked == quantity:
                ranks[high] = min(max(ranks[high], ranks[low] + 1), len(names) - 1)
    return ranks


def relation_tensor(names: Sequence[Sequence[str]], relations: Sequence[Sequence[Relation]]) -> Tensor:
    """[B,O,O,3]: 1 at [b,i,j,k] where object i's x, y or size (k) should exceed j's, -1 for the opposite, else 0."""
    most = max(map(len, names), default=0)
    found = torch.zeros(len(names), most, most, 3, dtype=torch.float32, device="cpu")
    for own, asked, each in zip(names, relations, found, strict=True):
        for first, relation, second in asked:
            quantity, sign = RELATIONS[relation]
            for i in (i for i, name in enumerate(own) if name == first):
                for j in (j for j, name in enumerate(own) if name == second):
                    each[i, j, quantity] = sign
    return found


_EXPECTED = (
    'expected a list such as [("cat", "left of", "ball")] or ["cat left of ball"], with one of the relations '
    f"{', '.join(RELATIONS)}"
)


def _is_triple(value: Sequence[object]) -> bool:
    return len(value) == 3 and value[1] in RELATIONS and all(isinstance(part, str) for part in value)


def _relations(values: Sequence[object]) -> tuple[Relation, ...]:
    if len(values) > _MOST:
        raise ValueError(f"relations holds {len(values):,} for a prompt; expected at most {_MOST}")
    return tuple(map(_relation, values))


def _relation(value: Any) -> Relation:
    if isinstance(value, str):
        parts = [(*value.partition(f" {name} "), name) for name in RELATIONS]
        whole = [(first.strip(), name, second.strip()) for first, there, second, name in parts if there]
        value = whole[0] if len(whole) == 1 else value
    if not isinstance(value, list | tuple) or not _is_triple(value) or not (value[0].strip() and value[2].strip()):
        raise ValueError(f"relations holds {shown(value)}; {_EXPECTED}")
    if value[0] == value[2]:
        raise ValueError(f"relations holds {shown(value)}, of a phrase to itself; expected two phrases of the prompt")
    return Relation(*value)
