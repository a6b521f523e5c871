"""`bench layout --boxes`: how well each method places objects in given boxes."""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image
from torch import Tensor

import minidiff
from minidiff.draw import boxes, sheet
from minidiff.result import to_pil
from minidiff.shapes.measure import Measured, iou, matched, measure
from minidiff.shapes.world import GAP, Thing

from .machine import machine, print_header, versions
from .plot import scatter
from .prompts import SEED, Prompt, prompts
from .share import Share, print_share

Box = tuple[float, float, float, float]
SIZES = {"small": (0.22, 0.32), "medium": (0.32, 0.45), "large": (0.45, 0.62)}  # of the longer edge
ASPECTS = {"square": (1.0, 1.2), "wide": (1.4, 2.0), "tall": (1.4, 2.0)}
OUTSIDE = {  # the bundled model's training range: (edges, aspects)
    "tiny": ((0.12, 0.18), (1.0, 1.2)),
    "huge": ((0.7, 0.9), (1.0, 1.2)),
    "long": ((0.5, 0.75), (2.6, 3.4)),
}
IN_BOX = 0.5  # minimum IoU for an object to be in its box
BATCH = 20


@dataclass(frozen=True)
class Asked:
    """A prompt, one box per object, and whether such boxes occurred in training."""

    prompt: Prompt
    boxes: tuple[Box, ...]
    kind: str  # "inside", or a name of OUTSIDE

    @property
    def layout(self) -> dict[str, Box]:
        """The `boxes` argument of generate()."""
        return dict(zip(self.prompt.phrases, self.boxes, strict=True))


def asked(seed: int = SEED) -> list[Asked]:
    """200 prompts of one to three objects, with boxes of all sizes, aspect ratios and positions that occur in training,
    and 30 of one object with boxes that do not. Determined by the seed.
    """
    rng = np.random.default_rng(seed + 1)
    every = prompts(seed)
    found = [Asked(prompt, _boxes(rng, len(prompt.things), i), "inside") for i, prompt in enumerate(every)]
    single = [prompt for prompt in every if len(prompt.things) == 1]
    for number, (kind, (edges, aspects)) in enumerate(OUTSIDE.items()):
        for i in range(10):
            box = placed(rng, *sized(rng, edges, aspects, tall=i % 2 == 1), "anywhere")
            found.append(Asked(single[number * 10 + i], (box,), kind))
    return found


def _boxes(rng: Generator, count: int, i: int) -> tuple[Box, ...]:
    """Boxes at least GAP apart; the first one cycles through sizes, aspect ratios and positions."""
    sizes = list(SIZES)[: 3 if count == 1 else 2 if count == 2 else 1]
    while True:
        boxes: list[Box] = []
        for o in range(count):
            turn = i + o if o == 0 else int(rng.integers(1000))
            size, aspect = sizes[turn % len(sizes)], list(ASPECTS)[turn // 3 % 3]
            place = ("corner", "centre", "anywhere")[turn // 9 % 3] if o == 0 else "anywhere"
            box = placed(rng, *sized(rng, SIZES[size], ASPECTS[aspect], tall=aspect == "tall"), place)
            if not any(near(box, other) for other in boxes):
                boxes.append(box)
        if len(boxes) == count:
            return tuple(boxes)


def sized(rng: Generator, edges: tuple[float, float], aspects: tuple[float, float], tall: bool) -> tuple[float, float]:
    """Random width and height."""
    long = rng.uniform(*edges)
    short = long / rng.uniform(*aspects)
    if edges[0] >= SIZES["small"][0] and edges[1] <= SIZES["large"][1]:
        short = max(short, SIZES["small"][0])  # the shortest edge in training
    return (short, long) if tall else (long, short)


def placed(rng: Generator, width: float, height: float, place: str) -> Box:
    left, top = 1 - 2 * GAP - width, 1 - 2 * GAP - height  # room to move in
    if place == "corner":
        x, y = rng.choice([0.0, left]), rng.choice([0.0, top])
    elif place == "centre":
        x, y = left * rng.uniform(0.4, 0.6), top * rng.uniform(0.4, 0.6)
    else:
        x, y = left * rng.uniform(), top * rng.uniform()
    return (float(GAP + x), float(GAP + y), float(GAP + x + width), float(GAP + y + height))


def near(a: Box, b: Box) -> bool:
    return a[0] < b[2] + GAP and b[0] < a[2] + GAP and a[1] < b[3] + GAP and b[1] < a[3] + GAP


# ---- one method


@dataclass(frozen=True)
class Placed:
    """The result for one prompt: for each object, the one found and its IoU with the box (0 if none was found)."""

    asked: Asked
    picture: Measured
    found: tuple[Thing | None, ...]
    ious: tuple[float, ...]

    @property
    def centred(self) -> tuple[bool, ...]:
        """Whether each object was found with its centre in its box."""
        return tuple(
            thing is not None
            and box[0] < (thing.box[0] + thing.box[2]) / 2 < box[2]
            and box[1] < (thing.box[1] + thing.box[3]) / 2 < box[3]
            for thing, box in zip(self.found, self.asked.boxes, strict=True)
        )

    @property
    def facts(self) -> bool:
        """True if every object is present (anywhere), no other one is, and the background is as requested."""
        alone = None not in self.found and len(self.picture.things) == len(self.found)
        return alone and self.asked.prompt.background in (None, self.picture.background)


@dataclass(frozen=True, eq=False)
class Outcome:
    """A method's images [B,3,128,128] in [0,1] and their measurement; looks: guided passes per image."""

    placed: tuple[Placed, ...]
    images: Tensor
    looks: float
    seconds: float

    def some(self, count: int, kind: str = "inside") -> list[Placed]:
        """Results with `count` objects (0: any number)."""
        return [
            one for one in self.placed if one.asked.kind == kind and len(one.found) in (count, count or len(one.found))
        ]


def draw(
    model: minidiff.Model,
    every: Sequence[Asked],
    seed: int,
    guidance: object,
    edit: minidiff.Edit | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    cache: int = 1,
    interval: tuple[float, float] | None = None,
) -> Outcome:
    """Generate and measure a picture for every prompt and its boxes with one method."""
    images: list[Tensor] = []
    looks: list[int] = []
    seconds: list[float] = []
    for start in range(0, len(every), BATCH):
        batch = every[start : start + BATCH]
        before = time.perf_counter()
        run = minidiff.sample_steps(
            [one.prompt.text for one in batch],
            model=model,
            seed=seed + start,
            boxes=[one.layout for one in batch],
            guidance=guidance,  # type: ignore[arg-type]
            edits=() if edit is None else edit,
            sampler=sampler,
            steps=steps,
            cache_interval=cache,
            guidance_interval=interval,
            output="tensor",
        )
        for step in run:
            seen = step.report if isinstance(step.report, tuple) else ()
            looks += [int((~look.loss.isnan()).sum()) for look in seen]
        image = run.result().images
        assert isinstance(image, Tensor)
        images.append(image)
        seconds.append((time.perf_counter() - before) / len(batch))
    whole = torch.cat(images)
    placed = tuple(_measured(one, image) for one, image in zip(every, whole, strict=True))
    return Outcome(placed, whole, sum(looks) / len(every), statistics.median(seconds))


def _measured(one: Asked, image: Tensor) -> Placed:
    picture = measure((image * 255).round().to(torch.uint8))
    wanted = [Thing(shape, colour, box) for (shape, colour), box in zip(one.prompt.things, one.boxes, strict=True)]
    found = tuple(matched(picture.things, wanted))
    ious = tuple(0.0 if thing is None else iou(thing.box, want.box) for thing, want in zip(found, wanted, strict=True))
    return Placed(one, picture, found, ious)


def drift(outcome: Outcome, plain: Outcome) -> float:
    """RMS difference of the images from those without guidance, for pixels in [0,1]."""
    return math.sqrt(float((outcome.images - plain.images).square().mean()))


def in_box(some: Sequence[Placed], name: str = "", bound: float | None = None) -> Share:
    """Fraction of objects that are right and in their boxes."""
    hits = [value >= IN_BOX for one in some for value in one.ious]
    return Share(name, sum(hits), len(hits), bound)


def facts(some: Sequence[Placed], name: str = "", bound: float | None = None) -> Share:
    """Fraction of pictures that show exactly what the prompt says."""
    return Share(name, sum(one.facts for one in some), len(some), bound)


# ---- all methods


@dataclass(frozen=True)
class Method:
    """A method of following boxes; guidance None is the model's default."""

    guidance: str | minidiff.Guidance | None
    edit: minidiff.Edit | None = None
    cache: int = 1
    interval: tuple[float, float] | None = None


METHODS = {
    "none": Method("none"),
    "none, cached": Method("none", cache=3),
    "none, in an interval": Method("none", interval=(0.28, 5.42)),
    "minidiff's default": Method(None),
    "default, watching": Method(minidiff.Guidance(minidiff.inside_loss + minidiff.extent_loss, watch=True)),
    "default, cached": Method(None, cache=3),
    "default, --fast": Method(None, cache=3, interval=(0.28, 5.42)),
    "layout guidance": Method("layout"),
    "Attend-and-Excite": Method("attend_and_excite"),
    "BoxDiff": Method("boxdiff"),
    "refocusing (CAR)": Method("refocusing"),
    "R&B": Method("rnb"),
    "forward guidance": Method("none", minidiff.forward_guidance(0.8, steps=8)),
    "regional prompting": Method("none", minidiff.regional_prompting(8.0, steps=10)),
}
"""The published methods use their papers' settings, which are meant for about 50 steps."""
DEFAULT = "minidiff's default"
FASTER = {"none, cached": "none", "default, cached": DEFAULT, "default, watching": DEFAULT}
"""Methods that may lose few true facts: -> what they are compared with."""
SAMPLERS = {"dpmpp_2m": 20, "ddim": 20, "euler": 20, "pndm": 50}
"""Name -> steps. PNDM needs more: with 20, its pictures without guidance lack a quarter of their objects."""
BOUNDS = {1: 0.85, 2: 0.7}  # objects -> minimum fraction in their boxes, with the default guidance
SPREAD = 0.05  # maximum difference between samplers, and maximum loss of true facts due to guidance


def run(args: argparse.Namespace) -> int:
    """Run every method on the same prompts, boxes and seeds. Returns 1 if the default violates a bound."""
    model, every = minidiff.load(args.model), asked()
    if args.prompts is not None:
        every = every[:: max(1, len(every) // args.prompts)]
    header = {"model": model.name, "dtype": str(model.dtype).removeprefix("torch."), "prompts": str(len(every))}
    header |= {"seed": str(args.seed), **{name: str(value) for name, value in asdict(model.defaults).items()}}
    print_header("bench layout --boxes", header)
    print(f"objects right and in their box (IoU >= {IN_BOX:g}); intervals of 95 %\n{HEAD}")
    outcomes: dict[str, Outcome] = {}
    for name, method in METHODS.items():
        outcomes[name] = draw(
            model, every, args.seed, method.guidance, method.edit, cache=method.cache, interval=method.interval
        )
        print(line(name, outcomes[name], outcomes["none"]), flush=True)
    shares = list(_bounds(outcomes))
    apart = _samplers(model, every, args.seed)
    print("\nboxes unlike those of training (one object): right and in the box")
    for name, outcome in outcomes.items():
        outside = (f"{kind} {_percent(in_box(outcome.some(0, kind)))}" for kind in OUTSIDE)
        print(f"{name:<20} {', '.join(outside)}")
    print(f"\n{'':<52} {'share':>6}  {'95 % interval':<16} {'cases':>5}  bound")
    for share in shares:
        print_share(share)
    _write(args, header, outcomes, shares)
    return 0 if all(share.ok for share in shares) and apart <= SPREAD else 1


def _samplers(model: minidiff.Model, every: Sequence[Asked], seed: int) -> float:
    """Run the default with each sampler on prompts of one and two objects; returns the largest difference."""
    some = [one for one in every if one.kind == "inside" and len(one.boxes) < 3]
    print("\nthe default with each sampler, prompts of one and two objects")
    found = []
    for sampler, steps in SAMPLERS.items():
        outcome = draw(model, some, seed, None, None, sampler, steps)
        found.append(in_box(outcome.some(0)).value)
        counts = ", ".join(f"{count}: {_percent(in_box(outcome.some(count)))}" for count in (1, 2))
        print(f"{sampler}, {steps} steps: {found[-1]:.1%} in the box; {counts}; passes {outcome.looks:.1f}", flush=True)
    apart = max(found) - min(found)
    print(f"apart: {apart:.1%}; bound {SPREAD:.0%} {'ok' if apart <= SPREAD else 'OUT'}")
    return apart


HEAD = (
    f"{'':<20} {'1 object':<22} {'2 objects':<22} {'3 objects':<22} {'centre':>6} {'mIoU':>11} "
    f"{'facts 1':>8} {'2':>6} {'3':>6} {'drift':>6} {'passes':>6} {'s/image':>7}"
)


def line(name: str, outcome: Outcome, plain: Outcome) -> str:
    """A method's row. passes: guided passes (forward to the last site read, and backward) per image, in addition to
    the 40 passes of 20 steps.
    """
    counts = " ".join(f"{_percent(in_box(outcome.some(count))):<22}" for count in (1, 2, 3))
    some = outcome.some(0)
    centred = [value for one in some for value in one.centred]
    ious = [value for one in some for value in one.ious]
    error = 1.96 * statistics.pstdev(ious) / math.sqrt(len(ious))
    truth = " ".join(f"{facts(outcome.some(count)).value:>{8 if count == 1 else 6}.0%}" for count in (1, 2, 3))
    return (
        f"{name:<20} {counts} {sum(centred) / len(centred):>6.0%} {f'{statistics.mean(ious):.2f} ± {error:.2f}':>11} "
        f"{truth} {drift(outcome, plain):>6.3f} {outcome.looks:>6.1f} {outcome.seconds:>7.2f}"
    )


def _percent(share: Share) -> str:
    low, high = share.interval
    return f"{share.value:.0%} ({low:.0%} to {high:.0%})"


def _bounds(outcomes: Mapping[str, Outcome]) -> Iterator[Share]:
    default, plain = outcomes[DEFAULT], outcomes["none"]
    for count in (1, 2, 3):
        name = f"{count} object{'s' * (count > 1)}"
        yield in_box(default.some(count), f"{name}: right and in the box", BOUNDS.get(count))
        yield in_box(plain.some(count), f"{name}: the same without guidance")
        least = facts(plain.some(count)).value - SPREAD
        yield facts(default.some(count), f"{name}: pictures with every fact true", least)
    for faster, exact in FASTER.items():
        if faster in outcomes:
            least = facts(outcomes[exact].some(0)).value - SPREAD
            yield facts(outcomes[faster].some(0), f"{faster}: pictures with every fact true", least)


def _write(
    args: argparse.Namespace, header: dict[str, str], outcomes: Mapping[str, Outcome], shares: Sequence[Share]
) -> None:
    """Write the requested files."""
    if args.json is not None:
        rows = {
            name: {
                "images": [
                    {"prompt": one.asked.prompt.text, "kind": one.asked.kind, "ious": one.ious, "facts": one.facts}
                    for one in outcome.placed
                ],
                "passes": outcome.looks,
                "seconds": outcome.seconds,
            }
            for name, outcome in outcomes.items()
        }
        bounds = [{**asdict(share), "interval": share.interval, "ok": share.ok} for share in shares]
        found = {"machine": machine(), "versions": versions(), "run": header, "methods": rows, "bounds": bounds}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.pareto is not None:
        points = {name: (outcome.seconds, in_box(outcome.some(0)).value) for name, outcome in outcomes.items()}
        scatter(points, "seconds per image", "objects right and in their box").save(args.pareto)
    if args.sheet is not None:
        examples(outcomes).save(args.sheet)


def examples(outcomes: Mapping[str, Outcome]) -> Image.Image:
    """Six prompts in rows, the methods in columns, each picture with its boxes."""
    inside = [i for i, one in enumerate(outcomes["none"].placed) if one.asked.kind == "inside"]
    step = max(1, len(inside) // 7)
    chosen = inside[step::step][:6]
    pictures, captions = [], []
    for i in chosen:
        for name, outcome in outcomes.items():
            one = outcome.placed[i].asked
            pictures.append(boxes(to_pil(outcome.images[i : i + 1])[0], one.layout, labels=False))
            captions.append(name if i == chosen[0] else "")
    return sheet(pictures, captions, len(outcomes))
