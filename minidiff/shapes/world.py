"""The bundled model's synthetic data: pictures of coloured shapes, and captions without positions or sizes.

A scene has 1 to 4 objects on a plain background, 128x128 pixels. Everything is determined by a seed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from numpy.random import Generator
from torch import Tensor

SIZE = 128  # pixels along an edge
MIN_EDGE, MAX_EDGE = 0.22, 0.62  # of an object's box, as a fraction of the picture's edge
MAX_ASPECT = 2.0  # ratio of a box's longer edge to its shorter one
GAP = 0.03  # between boxes, and to the picture's border

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 40),
    "green": (30, 150, 50),
    "cyan": (60, 210, 225),
    "blue": (35, 75, 225),
    "purple": (130, 45, 175),
    "pink": (250, 130, 190),
    "brown": (120, 70, 30),
    "lime": (165, 240, 60),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "gray": (140, 140, 140),
    "black": (15, 15, 15),
    "navy": (20, 25, 90),
    "beige": (240, 220, 185),
}


def _circle(u: Tensor, v: Tensor) -> Tensor:
    return torch.hypot(u, v) - 1


def _square(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(u.abs(), v.abs()) - 1


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(2 * u.abs() - (v + 1), v - 1)


def _star(u: Tensor, v: Tensor) -> Tensor:
    # A five-pointed star's box is not centred on it: points at -1 and cos 36 degrees, arms at +-sin 72 degrees.
    tall, wide, inner = 1 + math.cos(math.pi / 5), math.sin(2 * math.pi / 5), 0.42
    x, y = u * wide, (v + 1) / 2 * tall - 1
    turn = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    fold = (angle - turn * (angle / turn).round()).abs()  # from the nearest point's axis, 0 to 36 degrees
    r = torch.hypot(x, y)
    notch_x, notch_y = inner * math.cos(turn / 2), inner * math.sin(turn / 2)
    # Positive beyond the line from the point (1, 0) to the adjacent notch, both in the folded frame.
    return (r * fold.cos() - 1) * notch_y + r * fold.sin() * (1 - notch_x)


def _heart(u: Tensor, v: Tensor) -> Tensor:
    # (x^2 + y^2 - 1)^3 = x^2 y^3, whose box is +-1.139 by -1 to 1.2285; the cube root keeps the slope at the edge.
    x, y = u * 1.139, (1 - v) / 2 * 2.2285 - 1
    return x**2 + y**2 - 1 - torch.sign(y) * (x**2).pow(1 / 3) * y.abs()


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return (torch.hypot(u, v) - 0.76).abs() - 0.24


def _diamond(u: Tensor, v: Tensor) -> Tensor:
    return u.abs() + v.abs() - 1


def _cross(u: Tensor, v: Tensor) -> Tensor:
    a, b = u.abs(), v.abs()
    return torch.minimum(torch.maximum(a - 0.34, b - 1), torch.maximum(a - 1, b - 0.34))


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "ring": _ring,
    "diamond": _diamond,
    "cross": _cross,
}
"""Name -> f(u, v) on the object's box [-1,1]^2 (v down), negative inside, zero on the outline."""

HELD_OUT = frozenset((shape, list(COLOURS)[3 * i % len(COLOURS)]) for i, shape in enumerate(SHAPES))
"""Pairs (shape, colour) absent from training, one per shape, to test whether shape and colour are learnt separately."""


@dataclass(frozen=True)
class Thing:
    """One object. `box` is x0, y0, x1, y1 in [0,1], the outline's exact bounds."""

    shape: str
    colour: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn."""

    things: tuple[Thing, ...]
    background: str


def random_scene(rng: Generator, allowed: Callable[[str, str], bool] = lambda shape, colour: True) -> Scene:
    """A scene of 1 to 4 objects; `allowed(shape, colour)` decides which pairs may appear."""
    count = int(rng.choice([1, 2, 3, 4], p=[0.3, 0.35, 0.25, 0.1]))
    boxes: list[tuple[float, float, float, float]] = []
    while len(boxes) < count:
        boxes = random_boxes(rng, count)
    things = []
    for box in boxes:
        while True:
            shape, colour = str(rng.choice(list(SHAPES))), str(rng.choice(list(COLOURS)))
            if allowed(shape, colour):
                break
        things.append(Thing(shape, colour, box))
    return Scene(tuple(things), str(rng.choice(list(BACKGROUNDS))))


def random_boxes(rng: Generator, count: int) -> list[tuple[float, float, float, float]]:
    """Boxes for `count` objects, at least GAP apart; fewer if no placement is found after 60 tries."""
    largest = MAX_EDGE if count < 3 else 0.45 if count == 3 else 0.38
    boxes: list[tuple[float, float, float, float]] = []
    for _ in range(60):
        if len(boxes) == count:
            break
        long = rng.uniform(MIN_EDGE, largest)
        short = max(MIN_EDGE, long / rng.uniform(1, MAX_ASPECT)) if rng.random() < 0.7 else long
        w, h = (long, short) if rng.random() < 0.5 else (short, long)
        x, y = rng.uniform(GAP, 1 - GAP - w), rng.uniform(GAP, 1 - GAP - h)
        box = (float(x), float(y), float(x + w), float(y + h))
        if not any(_near(box, other) for other in boxes):
            boxes.append(box)
    return boxes


def _near(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] + GAP and b[0] < a[2] + GAP and a[1] < b[3] + GAP and b[1] < a[3] + GAP


def render(scenes: Sequence[Scene]) -> Tensor:
    """uint8 [B,3,128,128], anti-aliased: coverage falls linearly over one pixel across the outline."""
    pictures = torch.stack([torch.tensor(BACKGROUNDS[scene.background], dtype=torch.float32) for scene in scenes])
    pictures = pictures[:, :, None, None].expand(-1, -1, SIZE, SIZE).clone()
    places = [(i, thing) for i, scene in enumerate(scenes) for thing in scene.things]
    for name, outline in SHAPES.items():
        group = [(i, thing) for i, thing in places if thing.shape == name]
        if group:
            covers = coverage(outline, torch.tensor([thing.box for _, thing in group]))
            for (i, thing), cover in zip(group, covers, strict=True):
                colour = torch.tensor(COLOURS[thing.colour], dtype=torch.float32)[:, None, None]
                pictures[i] += cover * (colour - pictures[i])  # objects never overlap, so their order does not matter
    return pictures.round().clamp(0, 255).to(torch.uint8)


def coverage(outline: Callable[[Tensor, Tensor], Tensor], boxes: Tensor) -> Tensor:
    """Boxes [N,4] in [0,1] -> the fraction of each pixel that the shape covers, [N,128,128] in [0,1]."""
    centres = (torch.arange(SIZE) + 0.5) / SIZE
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)  # each [N,1]
    u = (2 * (centres - x0) / (x1 - x0) - 1)[:, None, :].expand(-1, SIZE, -1)
    v = (2 * (centres - y0) / (y1 - y0) - 1)[:, :, None].expand(-1, -1, SIZE)
    level = outline(u, v)
    down, across = torch.gradient(level, dim=(1, 2))  # per pixel, so level / slope is the distance in pixels
    return (0.5 - level / torch.hypot(down, across).clamp_min(1e-6)).clamp(0, 1)


def caption(scene: Scene, rng: Generator) -> str:
    """E.g. "a red circle and a blue square on a gray background", without positions or sizes.

    The colour is omitted for 8 % of the objects, the background in half of the pictures.
    """
    things = []
    for thing in scene.things:
        words = thing.shape if rng.random() < 0.08 else f"{thing.colour} {thing.shape}"
        things.append(f"an {words}" if words[0] in "aeiou" else f"a {words}")
    text = things[0] if len(things) == 1 else f"{', '.join(things[:-1])} and {things[-1]}"
    return text if rng.random() < 0.5 else f"{text} on a {scene.background} background"
