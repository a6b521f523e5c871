"""Detect the objects in a picture of coloured shapes by colour and geometry, without a network.

`python -m minidiff.shapes.measure --check` measures the error rate on pictures with known content.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .world import BACKGROUNDS, COLOURS, SHAPES, SIZE, Scene, Thing, coverage, random_scene, render

Box = tuple[float, float, float, float]
SMALLEST = 80  # pixels; the smallest object, a star, has about 240
APART = 40.0  # distance in RGB from the background at which a pixel belongs to an object
SECOND_COLOUR = 0.15  # fraction of a component's pixels from which a second colour is a second object
CLEAR = 0.7  # a colour or shape is certain if its distance is below this fraction of the runner-up's
_COLOURS = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
_BACKGROUNDS = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)


@dataclass(frozen=True)
class Found(Thing):
    """A detected object. `doubts` lists its ambiguities; empty if there are none."""

    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """The content of a picture. `doubts` are those about the picture as a whole."""

    things: tuple[Found, ...]
    background: str
    doubts: tuple[str, ...] = ()


def measure(picture: Tensor) -> Measured:
    """Find the objects in a uint8 picture [3,128,128]: colour, shape and box of each, largest first."""
    if picture.dtype != torch.uint8 or picture.shape != (3, SIZE, SIZE):
        raise ValueError(f"picture is {picture.dtype} {list(picture.shape)}; expected uint8 [3, {SIZE}, {SIZE}]")
    pixels = picture.movedim(0, -1).float()  # [128,128,3]
    edge = torch.cat([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = edge.median(dim=0).values
    background, doubt = _nearest(ground, _BACKGROUNDS, list(BACKGROUNDS))
    doubts = [f"background: {doubt}"] if doubt else []
    masks, specks = _objects(pixels, (pixels - ground).norm(dim=-1) > APART)
    if specks:
        doubts.append(f"{specks} specks under {SMALLEST} pixels are ignored")
    things = [_thing(pixels, ground, mask) for mask in masks]
    return Measured(tuple(things), background, tuple(doubts))


def _nearest(colour: Tensor, palette: Tensor, names: Sequence[str]) -> tuple[str, str]:
    """The name of the nearest colour, and a doubt ("red or pink") if the next one is nearly as near, else ""."""
    distances, order = (palette - colour).norm(dim=-1).sort()
    first, second = (names[int(i)] for i in order[:2])
    return first, f"{first} or {second}" if distances[0] > CLEAR * distances[1] else ""


def _objects(pixels: Tensor, apart: Tensor) -> tuple[list[Tensor], int]:
    """Masks [128,128] of the objects, largest first, and the number of components too small to be one."""
    nearest = torch.cdist(pixels.flatten(0, 1), _COLOURS).argmin(dim=1).unflatten(0, apart.shape)
    masks: list[Tensor] = []
    specks = 0
    for piece in _components(apart):
        if piece.sum() < SMALLEST:
            specks += 1
            continue
        # Outline pixels are mixtures, and a mixture of two colours may look like a third one: use inner pixels.
        inner = _eroded(piece)
        inner = inner if inner.sum() >= SMALLEST / 4 else piece
        votes = nearest[inner].bincount(minlength=len(COLOURS))
        strong = (votes >= max(SECOND_COLOUR * int(votes.sum()), SMALLEST / 4)).nonzero().flatten().tolist()
        if len(strong) < 2:
            masks.append(piece)
        else:  # touching objects: each pixel goes to the nearest inner pixel of a strong colour
            parts = _grown([inner & (nearest == colour) for colour in strong], piece)
            pieces = [one for part in parts for one in _components(part)]
            masks += [one for one in pieces if one.sum() >= SMALLEST]
    return sorted(masks, key=lambda mask: -int(mask.sum())), specks


def _components(mask: Tensor) -> list[Tensor]:
    """The connected components of a mask (8-connectivity)."""
    labels = torch.arange(1, mask.numel() + 1, dtype=torch.float32).reshape(mask.shape) * mask
    while True:
        spread = F.max_pool2d(labels[None, None], 3, 1, 1)[0, 0] * mask
        if torch.equal(spread, labels):
            return [labels == label for label in labels[mask].unique()]
        labels = spread


def _eroded(mask: Tensor) -> Tensor:
    return F.avg_pool2d(mask.float()[None, None], 3, 1, 1)[0, 0] > 0.99


def _grown(seeds: Sequence[Tensor], whole: Tensor) -> list[Tensor]:
    """Parts of `whole`, one per seed, grown pixel by pixel until they meet."""
    owner = torch.zeros(whole.shape)
    for number, seed in enumerate(seeds, 1):
        owner[seed] = number
    while True:
        spread = F.max_pool2d(owner[None, None], 3, 1, 1)[0, 0]
        grown = torch.where((owner == 0) & whole, spread, owner)
        if torch.equal(grown, owner):
            return [owner == number for number in range(1, len(seeds) + 1)]
        owner = grown


def _thing(pixels: Tensor, ground: Tensor, mask: Tensor) -> Found:
    inner = _eroded(mask)
    colour = pixels[inner if inner.any() else mask].median(dim=0).values
    name, doubt = _nearest(colour, _COLOURS, list(COLOURS))
    doubts = [f"colour: {doubt}"] if doubt else []
    # The coverage of a pixel: the position of its colour on the line from the background's colour to the object's.
    way = colour - ground
    cover = (((pixels - ground) @ way) / way.square().sum()).clamp(0, 1)
    cover = cover * F.max_pool2d(mask.float()[None, None], 5, 1, 2)[0, 0]  # dilated by 2 pixels; excludes other objects
    shape, box, doubt = _shape(cover)
    doubts += [f"shape: {doubt}"] if doubt else []
    return Found(shape, name, box, tuple(doubts))


def _shape(cover: Tensor) -> tuple[str, Box, str]:
    """The shape and box that fit the coverage [128,128] best, and a doubt if another shape fits nearly as well."""
    solid = cover > 0.5
    rows, columns = solid.any(dim=1).nonzero().flatten(), solid.any(dim=0).nonzero().flatten()
    start = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float() / SIZE
    fits = {name: _fit(name, start, cover) for name in SHAPES}
    (first, (box, error)), (second, (_, other)) = sorted(fits.items(), key=lambda item: item[1][1])[:2]
    return first, box, f"{first} or {second}" if error > CLEAR * other else ""


def _fit(shape: str, start: Tensor, cover: Tensor) -> tuple[Box, float]:
    """Fit the shape's box to the coverage; returns the box and the squared error per pixel of the object.

    Gauss-Newton, starting at the box of pixels at least half covered, which cuts off thin points.
    """
    best, least, box, step = start, float("inf"), start, 1 / SIZE
    for _ in range(6):
        tried = torch.cat([box[None], box + step * torch.eye(4), box - step * torch.eye(4)])
        covers = coverage(SHAPES[shape], tried).flatten(1)
        error = covers[0] - cover.flatten()
        if float(error.square().sum()) >= least:
            break
        best, least = box, float(error.square().sum())
        slopes = ((covers[1:5] - covers[5:]) / (2 * step)).T  # [pixels,4]
        change = torch.linalg.lstsq(slopes, -error[:, None], driver="gelsd").solution[:, 0]
        box = box + change.clamp(-0.05, 0.05)
        if (box[2:] - box[:2]).min() < 0.02:
            break
    x0, y0, x1, y1 = best.tolist()
    return (x0, y0, x1, y1), least / float(cover.sum())


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1."""
    across, down = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    shared = across * down
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return shared / (areas - shared)


def matched(found: Sequence[Thing], wanted: Sequence[Thing]) -> list[Thing | None]:
    """Assign to each wanted object the found one of its colour and shape that overlaps most; each is used once."""
    left = list(found)
    pairs: list[Thing | None] = []
    for thing in wanted:
        fitting = [one for one in left if (one.colour, one.shape) == (thing.colour, thing.shape)]
        best = max(fitting, key=lambda one: iou(one.box, thing.box), default=None)
        if best is not None:
            left.remove(best)
        pairs.append(best)
    return pairs


def share_right(pictures: Sequence[Measured], scenes: Sequence[Scene], least: float = 0.9) -> float:
    """Fraction of the scenes' objects found with the right colour and shape and a box IoU of at least `least`."""
    right = total = 0
    for picture, scene in zip(pictures, scenes, strict=True):
        for thing, one in zip(scene.things, matched(picture.things, scene.things), strict=True):
            total += 1
            right += one is not None and iou(one.box, thing.box) >= least
    return right / total


def check(count: int, seed: int) -> tuple[list[Measured], list[Scene]]:
    """Measure pictures of random scenes."""
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    return [measure(picture) for picture in render(scenes)], scenes


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, or 1 if the measurement is wrong too often."""
    parser = argparse.ArgumentParser(prog="python -m minidiff.shapes.measure", description=__doc__)
    parser.add_argument("--check", action="store_true", required=True, help="measure pictures with known content")
    parser.add_argument("--count", type=int, default=500, metavar="N", help="pictures (default: 500)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args(argv)
    pictures, scenes = check(args.count, args.seed)
    right, shuffled = share_right(pictures, scenes), share_right(pictures, scenes[1:] + scenes[:1])
    things = [thing for picture in pictures for thing in picture.things]
    print(f"objects right (colour, shape, box IoU >= 0.9): {right:.2%} of {sum(len(s.things) for s in scenes)}")
    print(f"the same against another picture's scene:      {shuffled:.2%}")
    grounds = sum(p.background == s.background for p, s in zip(pictures, scenes, strict=True))
    print(f"backgrounds right: {grounds / len(scenes):.2%} of {len(scenes)}")
    print(f"objects in doubt: {sum(bool(thing.doubts) for thing in things)} of {len(things)}")
    return 0 if right >= 0.99 and shuffled <= 0.01 else 1


if __name__ == "__main__":
    sys.exit(main())
