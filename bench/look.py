"""minidiff.look on rendered scenes: do masks, the largest attention and scores of words find the objects?

Each object is asked for by its phrase in the prompt (masks, pointing) and once more as a word besides (scores), beside
phrases of objects that are not there: some of neither a colour nor a shape of the scene, some that share one of both.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import minidiff
from minidiff.looking import TIMES, look
from minidiff.shapes.measure import iou
from minidiff.shapes.world import COLOURS, SHAPES, SIZE, Scene, Thing, coverage, random_scene, render
from minidiff.vocabulary import BUNDLED

from .machine import print_header
from .table import Row, finish, print_head, print_row

ABSENT, ALIKE = 3, 2  # phrases asked for per scene that are not there


@dataclass
class Found:
    """What was measured, one number per object or per pair of scene and absent phrase."""

    masks: list[float] = field(default_factory=list)
    boxes: list[float] = field(default_factory=list)
    missed: list[float] = field(default_factory=list)
    absent: list[float] = field(default_factory=list)
    alike: list[float] = field(default_factory=list)

    def rows(self, note: str) -> Iterator[Row]:
        """1 - IoU, shares of misses; the bounds are what must hold, 1 where nothing must."""
        names = {"masks": ("1 - IoU of masks", 0.4), "boxes": ("1 - IoU of boxes", 1.0)}
        names["missed"] = ("largest attention beside the object", 0.05)
        names["absent"] = ("absent phrase scores above a present one", 0.05)
        names["alike"] = ("the same, sharing colour or shape", 0.05)
        for name, (part, bound) in names.items():
            values = getattr(self, name)
            yield Row(part, f"{len(values)}", float(np.mean(values)), bound, "mean", note)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("--scenes", type=int, default=200, metavar="N", help="default: 200")
    parser.add_argument("--seed", type=int, default=7, metavar="N", help="of the scenes (default: 7)")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    print_header("look", {"scenes": str(args.scenes), "dtype": "float32"})
    model = minidiff.load(BUNDLED, dtype="float32")
    rng, found = np.random.default_rng(args.seed), Found()
    for i in range(args.scenes):
        _measure(model, _scene(rng), rng, i, found)
    print_head()
    rows = list(found.rows(f"{args.scenes} scenes, times {', '.join(map(str, TIMES))}"))
    for row in rows:
        print_row(row)
    return finish(rows, args.json)


def _scene(rng: np.random.Generator) -> Scene:
    """One whose objects have phrases of their own."""
    while True:
        scene = random_scene(rng)
        if len({_phrase(thing) for thing in scene.things}) == len(scene.things):
            return scene


def _phrase(thing: Thing) -> str:
    return f"{thing.colour} {thing.shape}"


def _measure(model: minidiff.Model, scene: Scene, rng: np.random.Generator, seed: int, found: Found) -> None:
    things, there = scene.things, [_phrase(thing) for thing in scene.things]
    absent, alike = _not_there(scene, rng)
    prompt = " and ".join(f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in there)
    again = look(render([scene])[0], prompt, model=model, seeds=seed, words=[*there, *absent, *alike])
    seen = replace(again, words={})  # the prompt's own phrases
    least = min(again.score(name) for name in there)
    for thing, name in zip(things, there, strict=True):
        found.masks.append(1 - _overlap(seen.mask(name), thing))
        found.boxes.append(1 - iou(seen.box(name), thing.box))
        found.missed.append(float(not _points_at(seen.of(0, name), thing)))
    found.absent.extend(float(again.score(name) >= least) for name in absent)
    found.alike.extend(float(again.score(name) >= least) for name in alike)


def _not_there(scene: Scene, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Phrases of objects that share nothing with those of a scene, and some that share either colour or shape."""
    shapes, colours = {thing.shape for thing in scene.things}, {thing.colour for thing in scene.things}
    pairs = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    absent = [f"{c} {s}" for s, c in pairs if s not in shapes and c not in colours]
    alike = [f"{c} {s}" for s, c in pairs if (s in shapes) != (c in colours)]
    return [str(name) for name in rng.choice(absent, ABSENT)], [str(name) for name in rng.choice(alike, ALIKE)]


def _overlap(mask: Tensor, thing: Thing) -> float:
    """The IoU of a mask with the object's own pixels."""
    own = coverage(SHAPES[thing.shape], torch.tensor([thing.box]))[0] > 0.5
    mine = F.interpolate(mask[None, None], size=(SIZE, SIZE))[0, 0] > 0.5
    return float((mine & own).sum() / (mine | own).sum())


def _points_at(heat: Tensor, thing: Thing) -> bool:
    """Whether the middle of the cell with the most attention is inside the object's box."""
    row, column = divmod(int(heat.argmax()), heat.shape[1])
    x, y = (column + 0.5) / heat.shape[1], (row + 0.5) / heat.shape[0]
    x0, y0, x1, y1 = thing.box
    return x0 <= x <= x1 and y0 <= y <= y1
