"""Boxes as editors draw them, each with a label, and as generate() takes them: one to the other and back."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, TypeAlias

from .layout import Box, PlacedObject, plain_boxes

Labelled: TypeAlias = "tuple[str, Box]"
"""A box with its label: a phrase, then "#2" for the second object of that phrase, and "x1.5" for a weight of 1.5."""

_MARKS = re.compile(r"(?P<phrase>.+?)(?: #(?P<which>\d{1,3}))?(?: x(?P<weight>\d+(?:\.\d+)?(?:e[-+]\d+)?))?", re.DOTALL)


def to_labels(objects: Iterable[PlacedObject]) -> list[Labelled]:
    """Each box of objects; those without boxes have none."""
    return [(label, box) for label, _, one in named(objects) for box in one.boxes]


def from_labels(
    drawn: Iterable[Labelled], known: Sequence[PlacedObject] = (), phrases: Iterable[str] = ()
) -> dict[str, Any]:
    """The layout of boxes that were drawn. Boxes of one label are one object.

    known: objects that were there before, whose order stays; those without boxes stay in the layout. phrases: of the
    prompt. The names of both may look like labels, such as "bmw x5".
    """
    there = {label: (which, one) for label, which, one in named(known)}
    names = {*phrases, *(one.name for one in known)}
    found: dict[str, list[Box]] = {}
    for label, box in drawn:
        found.setdefault(label, []).append(box)
    objects = [_read(label, tuple(boxes), names, there.get(label)) for label, boxes in found.items()]
    objects.sort(key=lambda one: one[0])  # by number; those of one number stay in the order of drawing
    layout = plain_boxes([*(one for _, one in objects), *(one for one in known if not one.boxes)])
    for name, value in layout.items():
        if isinstance(value, dict) and value["weight"] == 1 and value.keys() == {"weight", "boxes"}:
            layout[name] = value["boxes"] and list(value["boxes"])
    return layout


def named(objects: Iterable[PlacedObject]) -> Iterator[tuple[str, int, PlacedObject]]:
    """Each object with its label, which no other has, and its number among those of its phrase."""
    objects = tuple(objects)
    taken, counts = {one.name for one in objects}, dict.fromkeys((one.name for one in objects), 0)
    for one in objects:
        weight = f" x{one.weight:g}" if float(f"{one.weight:g}") == one.weight else f" x{one.weight!r}"
        for which in count(counts[one.name] + 1):
            label = f"{one.name}{f' #{which}' if which > 1 else ''}{weight if one.weight != 1 else ''}"
            if label == one.name or label not in taken:
                break
        counts[one.name] = which
        taken.add(label)
        yield label, which, one


def _read(
    label: str, boxes: tuple[Box, ...], names: Container[str], there: tuple[int, PlacedObject] | None
) -> tuple[int, PlacedObject]:
    if there is not None:
        return there[0], replace(there[1], boxes=boxes, mask=None, line=None)
    marks = None if label in names else _MARKS.fullmatch(label)
    phrase, which, weight = (label, None, None) if marks is None else marks.group("phrase", "which", "weight")
    return int(which or 1), PlacedObject(phrase, (), boxes, weight=float(weight or 1))
