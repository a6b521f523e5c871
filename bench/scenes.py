"""The splits of `bench league`: prompts with boxes, strokes or relations, drawn from the bundled model's world."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from minidiff import Stroke
from minidiff.shapes.world import BACKGROUNDS, COLOURS, HELD_OUT, SHAPES, Thing
from minidiff.vocabulary import RELATIONS

from .boxes import ASPECTS, OUTSIDE, SIZES, Box, near, placed, sized
from .prompts import Prompt

SEED = 40_000  # of the scenes that are reported; whatever is fitted takes other seeds
PAIRS = [(shape, colour) for shape in SHAPES for colour in COLOURS if (shape, colour) not in HELD_OUT]


@dataclass(frozen=True)
class Scene:
    """A prompt, and what else is asked for: a box of each object, or a stroke of the only one, or a relation.

    seed, number: which one of its split it is. `things` are the objects to be found, more than those of the prompt
    where the layout contradicts it; their boxes are meaningless without `boxes`.
    """

    split: str
    seed: int
    number: int
    prompt: Prompt
    boxes: tuple[Box, ...] = ()
    stroke: Stroke | None = None
    relation: str | None = None

    @property
    def things(self) -> tuple[Thing, ...]:
        """The objects to be found."""
        pairs = self.prompt.things * (len(self.boxes) if len(self.prompt.things) == 1 and self.boxes else 1)
        boxes = self.boxes or ((0.0, 0.0, 1.0, 1.0),) * len(pairs)
        return tuple(Thing(shape, colour, box) for (shape, colour), box in zip(pairs, boxes, strict=True))

    @property
    def layout(self) -> dict[str, object] | None:
        """The `boxes` argument of generate()."""
        names = self.prompt.phrases
        if self.stroke is not None:
            return {names[0]: self.stroke}
        if len(names) == 1 < len(self.boxes):
            return {names[0]: [{"box": box} for box in self.boxes]}
        return dict(zip(names, self.boxes, strict=True)) if self.boxes else None

    @property
    def relations(self) -> list[tuple[str, str, str]] | None:
        """The `relations` argument."""
        first, *second = self.prompt.phrases
        return None if self.relation is None else [(first, self.relation, second[0])]


def scenes(number: int, seed: int = SEED) -> Iterator[Scene]:
    """The first `number` scenes of each split; the same however many are asked for."""
    for k, (split, make) in enumerate(SPLITS.items()):
        for i in range(number):
            rng = np.random.default_rng([seed, k, i])
            yield make(rng, split, seed, i)


def _counted(rng: Generator, split: str, seed: int, i: int) -> Scene:
    """As many objects as the split says, of different colours and shapes, with boxes as in training."""
    count = int(split.split()[0])
    return Scene(split, seed, i, _prompt(rng, count), _boxes(rng, count))


def _shape_twice(rng: Generator, split: str, seed: int, i: int) -> Scene:
    """Two objects of one shape."""
    return Scene(split, seed, i, _prompt(rng, 2, lambda a, b: a[0] == b[0] and a[1] != b[1]), _boxes(rng, 2))


def _colour_twice(rng: Generator, split: str, seed: int, i: int) -> Scene:
    """Two objects of one colour."""
    return Scene(split, seed, i, _prompt(rng, 2, lambda a, b: a[1] == b[1] and a[0] != b[0]), _boxes(rng, 2))


def _unlike(rng: Generator, split: str, seed: int, i: int) -> Scene:
    """A box that does not occur in training."""
    edges, aspects = OUTSIDE[split]
    return Scene(
        split, seed, i, _prompt(rng, 1), (placed(rng, *sized(rng, edges, aspects, tall=i % 2 == 1), "anywhere"),)
    )


def _related(rng: Generator, split: str, seed: int, i: int) -> Scene:
    """Two objects without boxes, each relation in turn."""
    return Scene(split, seed, i, _prompt(rng, 2), relation=list(RELATIONS)[i % len(RELATIONS)])


def _along(rng: Generator, split: str, seed: int, i: int) -> Scene:
    """An object on a stroke of 0.2 to 0.4 of the edge, in any direction, whose middle is not the picture's."""
    angle, half = rng.uniform(0, np.pi), rng.uniform(0.1, 0.2)
    x = y = 0.5
    while np.hypot(x - 0.5, y - 0.5) < 0.2:
        x, y = rng.uniform(0.22, 0.78, size=2)
    ends = [(x + side * half * np.cos(angle), y + side * half * np.sin(angle)) for side in (-1, 1)]
    return Scene(split, seed, i, _prompt(rng, 1), stroke=Stroke([(float(a), float(b)) for a, b in ends], 0.2))


def _contradicting(rng: Generator, split: str, seed: int, i: int) -> Scene:
    """Two boxes for the prompt's only object, each of which is to hold one."""
    return Scene(split, seed, i, _prompt(rng, 1), _boxes(rng, 2))


SPLITS: dict[str, Callable[[Generator, str, int, int], Scene]] = {
    **dict.fromkeys(("1 object", "2 objects", "3 objects", "4 objects"), _counted),
    "one shape twice": _shape_twice,
    "one colour twice": _colour_twice,
    **dict.fromkeys(OUTSIDE, _unlike),
    "relations": _related,
    "strokes": _along,
    "contradicting": _contradicting,
}
"""Name -> what draws its scenes."""


def _apart(a: tuple[str, str], b: tuple[str, str]) -> bool:
    return a[0] != b[0] and a[1] != b[1]


def _prompt(rng: Generator, count: int, fits: Callable[..., bool] = _apart) -> Prompt:
    """Objects of pairs seen in training, each of which `fits` every other."""
    while True:
        things = [PAIRS[k] for k in rng.integers(len(PAIRS), size=count)]
        if all(fits(a, b) for n, a in enumerate(things) for b in things[:n]):
            return Prompt(tuple(things), str(rng.choice(list(BACKGROUNDS))) if rng.random() < 0.5 else None)


def _boxes(rng: Generator, count: int) -> tuple[Box, ...]:
    """Boxes as in training, at least GAP apart."""
    largest = {1: 3, 2: 2}.get(count, 1)
    while True:
        boxes: list[Box] = []
        for _ in range(count):
            size, aspect = str(rng.choice(list(SIZES)[:largest])), str(rng.choice(list(ASPECTS)))
            edges = SIZES[size] if count < 4 else (SIZES["small"][0], 0.3)
            box = placed(rng, *sized(rng, edges, ASPECTS[aspect], tall=aspect == "tall"), "anywhere")
            if not any(near(box, other) for other in boxes):
                boxes.append(box)
        if len(boxes) == count:
            return tuple(boxes)
