"""Every way of following boxes at equal numbers of guided passes, on splits of many kinds, measured without a network.

Finished pictures are lines of a file; a restart, or the same with more prompts, draws those that are missing.
"""

import argparse
import inspect
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache, lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

import minidiff
from minidiff import Guidance
from minidiff.guidance import edits as edits_module
from minidiff.guidance.lines import distances
from minidiff.guidance.placed import look
from minidiff.guidance.report import Evaluation
from minidiff.shapes.measure import Measured, iou, matched, measure
from minidiff.shapes.world import Thing
from minidiff.vocabulary import OBJECTIVES, RELATIONS

from .machine import machine, print_header, versions
from .scenes import SEED, SPLITS, Scene, scenes
from .scores import Row, print_tables

BATCH = 26
PASSES = (None, 10, 25, 50)
"""Guided passes (forward to the last site read, and backward) an image may take; None: as the method's settings say."""
LOST = 0.5  # the distance to a stroke of an object that is not there
OVERLAPS = 0.3  # minimum IoU of what stands in an object's box
Cell: TypeAlias = tuple[str, int | None, int]  # method, passes, seed


@dataclass(frozen=True)
class Method:
    """A way of following boxes; guidance None is the model's default. Each of the tries counts as a pass."""

    guidance: str | Mapping[str, object] | None
    edits: tuple[minidiff.Edit, ...] = ()
    tries: int = 1

    @property
    def levels(self) -> tuple[int | None, ...]:
        """The numbers of passes at which it is compared."""
        if self.guidance == "none":
            return (None,)
        return PASSES if self.tries == 1 else tuple(n for n in PASSES if n is None or n > 2 * self.tries)


NOT_OF_BOXES = ("relation", "reweight", "prompt_to_prompt", "masactrl")
WITH_EDITS = {"bounded_attention": "bounded_attention", "ilgd": "attention_injection"}
"""Objectives that their papers combine with an edit."""
FIRST = {"forward_guidance": 8, "regional_prompting": 10}
"""Steps of edits that have no default; of 20."""
DEFAULT = "default"


def methods() -> dict[str, Method]:
    """All: nothing, the model's default, each objective, combinations of papers, edits that read boxes."""
    names = {"none": Method("none"), DEFAULT: Method(None)}
    names |= {name: Method(name) for name in OBJECTIVES if name not in NOT_OF_BOXES}
    if {"refocusing", "self_refocusing"} <= set(OBJECTIVES):
        names["refocusing + SAR"] = Method({"objective": {"refocusing": 1.0, "self_refocusing": 1.0}})
    edits = {
        name: Method("none", made if isinstance(made, tuple) else (made,))
        for name, function in inspect.getmembers(edits_module, inspect.isfunction)
        if "Edit" in str(inspect.signature(function).return_annotation) and name[0] != "_" and name not in NOT_OF_BOXES
        for made in [function(steps=FIRST[name]) if name in FIRST else function()]
    }
    for name, edit in WITH_EDITS.items():
        if name in names and edit in edits:
            names[f"{name} + edit"] = replace(names[name], edits=edits[edit].edits)
    edits = {f"{name}, edit" if name in names else name: method for name, method in edits.items()}
    tried = {f"{name}, 8 tries": replace(names[name], tries=8) for name in (DEFAULT, "layout")}
    return {**names, **tried, **edits}


def plays(name: str, scene: Scene) -> bool:
    """Relations are for the default and for nothing; all other scenes are for all."""
    return scene.relation is None or name in ("none", DEFAULT)


# ---- drawing


@cache
def _model(name: str) -> minidiff.Model:
    return minidiff.load(name)


@dataclass(frozen=True, eq=False)
class Drawn:
    """Pictures [B,3,128,128] in [0,1], each one's evaluations by guided step, what `report.placed` is made of, and
    seconds of CPU for each.
    """

    images: Tensor
    looks: dict[int, Sequence[Evaluation]] = field(default_factory=dict)
    seen: Sequence[Tensor] | None = None
    seconds: float = 0.0


def draw(model: minidiff.Model, some: Sequence[Scene], method: Method, passes: int | None, seed: int) -> Drawn:
    """Pictures of scenes that are all with relations or all without."""
    guidance = method.guidance
    if guidance != "none":
        read = Guidance.read(model.defaults.guidance if guidance is None else guidance)  # type: ignore[arg-type]
        most = read.passes if passes is None else passes - (method.tries if method.tries > 1 else 0)
        guidance = replace(read, passes=most)
    before = time.process_time()
    run = minidiff.sample_steps(
        [one.prompt.text for one in some],
        model=model,
        # not a multiple of what tries step by, so that no seed has another's tries
        seed=[seed * 1_000_003 + list(SPLITS).index(one.split) * 100 + one.number for one in some],
        boxes=None if some[0].relation else [one.layout for one in some],
        relations=[one.relations for one in some],
        guidance=guidance,
        edits=method.edits,
        tries=method.tries,
        output="tensor",
    )
    looks = {step.index: step.report for step in run if isinstance(step.report, tuple) and step.report}
    result = run.result()
    assert isinstance(result.images, Tensor)
    seconds = (time.process_time() - before) / len(some)
    seen = None if run.guide is None else look(model.unet, result.latents, run.guide, len(run) - 1)
    return Drawn(result.images, looks, seen, seconds)


@lru_cache(maxsize=4)
def _plain(model: str, some: tuple[Scene, ...], seed: int) -> Drawn:
    bare = tuple(replace(one, boxes=(), stroke=None, relation=None) for one in some)
    return draw(_model(model), bare, Method("none"), None, seed)


def rows(model: str, cell: Cell, some: Sequence[Scene]) -> list[Row]:
    """Draw and measure the scenes of a cell."""
    torch.set_num_threads(1)
    name, passes, seed = cell
    tries, found = methods()[name].tries, []
    boxed = [one for one in some if one.relation is None]
    related = [one for one in some if one.relation is not None]
    for batch in (tuple(boxed), tuple(related)):
        if batch:
            plain = _plain(model, batch, seed)
            drawn = plain if name == "none" else draw(_model(model), batch, methods()[name], passes, seed)
            drift = (drawn.images - plain.images).square().mean(dim=(1, 2, 3)).sqrt().tolist()
            for i, scene in enumerate(batch):
                row: Row = {"method": name, "passes": passes, "seed": seed, "split": scene.split}
                row |= {"scenes": scene.seed, "number": scene.number, "seconds": round(drawn.seconds, 3)}
                row["drift"] = round(drift[i], 4) if tries == 1 else None  # another noise is another picture
                row |= measured(scene, measure((drawn.images[i] * 255).round().to(torch.uint8)))
                row |= looked(drawn.looks, i, len(scene.things))
                row["used"] += tries if tries > 1 else 0
                if drawn.seen is not None:
                    row["seen"] = [_rounded(one) for one in drawn.seen[i]]
                found.append(row)
    return found


# ---- measuring


def measured(scene: Scene, picture: Measured) -> Row:
    """What a picture shows of what was asked for. landed: what stands in each object's box, as `standing` calls it."""
    wanted = scene.things
    found = matched(picture.things, wanted)
    alone = None not in found and len(picture.things) == len(found)
    row: Row = {
        "right": [one is not None for one in found],
        "count": len(picture.things) - len(wanted),
        "facts": alone and scene.prompt.background in (None, picture.background),
    }
    if scene.boxes:
        pairs = zip(found, wanted, strict=True)
        row["ious"] = [0.0 if one is None else round(iou(one.box, thing.box), 4) for one, thing in pairs]
        row["landed"] = [standing(picture.things, wanted, o) for o in range(len(wanted))]
    if scene.stroke is not None:
        row["distance"] = LOST if found[0] is None else round(_distance(found[0], scene.stroke), 4)
    if scene.relation is not None:
        row["true"] = holds(found, scene.relation)
    return row


def standing(things: Sequence[Thing], wanted: Sequence[Thing], o: int) -> str:
    """What overlaps object o's box most: "own", another one asked for ("swap"), its own shape in another's colour
    ("colour"), another's shape in its own colour ("shape"), anything else ("other"), or "nothing"."""
    own = wanted[o]
    best = max(things, key=lambda thing: iou(thing.box, own.box), default=None)
    if best is None or iou(best.box, own.box) < OVERLAPS:
        return "nothing"
    if (best.shape, best.colour) == (own.shape, own.colour):
        return "own"
    others = [thing for thing in wanted if thing != own]
    if any((best.shape, best.colour) == (thing.shape, thing.colour) for thing in others):
        return "swap"
    if best.shape == own.shape and best.colour in {thing.colour for thing in others}:
        return "colour"
    return "shape" if best.colour == own.colour and best.shape in {thing.shape for thing in others} else "other"


def holds(found: Sequence[Thing | None], relation: str) -> bool:
    """Whether both objects are there and the first's x, y or size is as asked beside the second's."""
    if None in found:
        return False
    quantity, sign = RELATIONS[relation]
    first, second = ((*_centre(thing), _area(thing))[quantity] for thing in found if thing is not None)
    return sign * (first - second) > 0


def _centre(thing: Thing) -> tuple[float, float]:
    x0, y0, x1, y1 = thing.box
    return (x0 + x1) / 2, (y0 + y1) / 2


def _area(thing: Thing) -> float:
    x0, y0, x1, y1 = thing.box
    return (x1 - x0) * (y1 - y0)


def _distance(thing: Thing, stroke: minidiff.Stroke) -> float:
    """From the object's centre to the stroke."""
    return float(distances(stroke.line(), torch.tensor(_centre(thing), dtype=torch.float64)))


def looked(looks: Mapping[int, Sequence[Evaluation]], i: int, objects: int) -> Row:
    """The passes of image i, each object's loss and mass inside at the first look and at the last of each step,
    [1+S,O]."""
    own = [[look for look in some if not look.loss[i].isnan()] for some in looks.values()]
    own = [some for some in own if some]
    row: Row = {"used": sum(map(len, own))}
    if own:
        ends = [own[0][0], *(some[-1] for some in own)]
        row |= {name: [_rounded(getattr(one, name)[i, :objects]) for one in ends] for name in ("object_loss", "mass")}
    return row


def _rounded(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else float(f"{value:.4g}") for value in values.tolist()]


# ---- the whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m bench league`."""
    parser.add_argument("--results", type=Path, default=Path("league.jsonl"), metavar="FILE", help="finished pictures")
    parser.add_argument("--model", default="minidiff/shapes", metavar="SOURCE", help="a model of coloured shapes")
    parser.add_argument("--prompts", type=int, default=4, metavar="N", help="of each split (default: 4)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="of each prompt (default: 1)")
    parser.add_argument("--only", nargs="+", metavar="METHOD", help=f"some methods: {', '.join(methods())}")
    parser.add_argument("--passes", nargs="+", type=int, metavar="N", help="some of 10, 25 and 50; 0: own settings")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", choices=list(SPLITS), help="some of the splits")
    parser.add_argument("--scenes", type=int, default=SEED, metavar="SEED", help="of the scenes; to fit on others")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes")
    parser.add_argument("--quick", action="store_true", help="three methods, three splits, one prompt and seed")
    parser.add_argument("--table", action="store_true", help="draw nothing; print the table of what is there")


QUICK = {
    "prompts": 1,
    "seeds": 1,
    "only": ["none", DEFAULT, "regional_prompting"],
    "passes": [10],
    "splits": ["one shape twice", "relations", "strokes"],
}


def run(args: argparse.Namespace) -> int:
    """Draw what is missing, print the tables."""
    for name, value in QUICK.items() if args.quick else ():
        setattr(args, name, value)
    unknown = sorted(set(args.only or ()) - set(methods()))
    if unknown:
        raise ValueError(f"--only names {', '.join(unknown)}; expected some of {', '.join(methods())}")
    model = _model(args.model)
    facts = {"model": model.name, "dtype": model.dtype_name, "prompts": f"{args.prompts} of each split"}
    facts |= {name: str(value) for name, value in asdict(model.defaults).items()}
    facts |= {"seeds": str(args.seeds), "scenes": str(args.scenes), "processes": f"{args.jobs}, of one thread"}
    print_header("bench league", facts)
    before = time.perf_counter()
    if not args.table:
        _draw_missing(args)
    found = [row for row in read(args.results) if wanted(args, row)]
    print_tables(found)
    print(f"\n{len(found)} pictures; {time.perf_counter() - before:.0f} s")
    if args.json is not None:
        whole = {"machine": machine(), "versions": versions(), "run": facts, "rows": found}
        Path(args.json).write_text(json.dumps(whole) + "\n", encoding="utf-8")
    return 0


def _levels(args: argparse.Namespace, method: Method) -> list[int | None]:
    some = PASSES if args.passes is None else [n or None for n in args.passes]
    return list(method.levels) if method.guidance == "none" else [n for n in some if n in method.levels]


def wanted(args: argparse.Namespace, row: Row) -> bool:
    """Whether the arguments ask for a picture of the file."""
    some = args.splits or SPLITS
    method = methods().get(row["method"])
    return (
        method is not None
        and (args.only is None or row["method"] in args.only)
        and row["passes"] in _levels(args, method)
        and row["scenes"] == args.scenes
        and row["split"] in some
        and row["seed"] < args.seeds
        and row["number"] < args.prompts
    )


def read(path: Path) -> list[Row]:
    """The finished pictures; a last line that was cut off is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = []
    for i, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            if i < len(lines) - 1:
                raise ValueError(f"{path}, line {i + 1}: {error}; expected the file of a league") from error
    return found


def _draw_missing(args: argparse.Namespace) -> None:
    """Seed by seed, so that a part of the whole compares all methods."""
    finished = read(args.results)
    there = {_key(row) for row in finished}
    if finished:  # without a line that was cut off
        args.results.write_text("".join(json.dumps(row) + "\n" for row in finished), encoding="utf-8")
    some = [one for one in scenes(args.prompts, args.scenes) if one.split in (args.splits or SPLITS)]
    todo: list[tuple[Cell, list[Scene]]] = []
    for seed in range(args.seeds):
        for name, method in methods().items():
            for passes in _levels(args, method) if name in (args.only or methods()) else ():
                own = [one for one in some if plays(name, one)]
                own = [one for one in own if (name, passes, seed, one.split, one.seed, one.number) not in there]
                todo += [((name, passes, seed), own[at : at + BATCH]) for at in range(0, len(own), BATCH)]
    print(f"{len(todo)} cells to draw, {len(there)} pictures there", flush=True)
    before = time.perf_counter()
    with args.results.open("a", encoding="utf-8") as file:
        for done, ((name, passes, seed), found) in enumerate(_each(args, todo), 1):
            file.writelines(json.dumps(row) + "\n" for row in found)
            file.flush()
            at = "own" if passes is None else passes
            took = time.perf_counter() - before
            print(
                f"{done} of {len(todo)}: {name} at {at}, seed {seed}: {len(found)} pictures; {took:.0f} s", flush=True
            )


def _key(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in ("method", "passes", "seed", "split", "scenes", "number"))


def _each(args: argparse.Namespace, todo: Sequence[tuple[Cell, list[Scene]]]) -> Iterator[tuple[Cell, list[Row]]]:
    """In this process, or in several of one thread each."""
    if args.jobs == 1:
        yield from ((cell, rows(args.model, cell, some)) for cell, some in todo)
        return
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        cells, some = [cell for cell, _ in todo], [own for _, own in todo]
        yield from zip(cells, pool.map(rows, [args.model] * len(todo), cells, some), strict=True)
