"""Accuracy of the bundled model on 200 fixed prompts, each picture measured without a network."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import minidiff
from minidiff.draw import sheet
from minidiff.networks.sites import Site
from minidiff.result import to_pil
from minidiff.shapes.measure import Measured, check, matched, measure, share_right
from minidiff.shapes.world import HELD_OUT, SIZE, Thing

from .boxes import run as run_boxes
from .machine import machine, print_header, versions
from .prompts import Prompt, prompts
from .share import Share, print_share

BATCH = 20
BOUNDS = {1: 0.95, 2: 0.85, 3: 0.65}  # objects -> minimum fraction of pictures with all of them right
HELD = 0.8  # bound for held-out pairs, relative to the fraction for seen pairs
APART = 0.03  # maximum loss of int8 to float32
COLD = 10.0  # maximum seconds for a picture in a cold process
READABLE = 2.0  # minimum ratio of a word's attention per pixel inside its object's box to that outside


@dataclass(frozen=True)
class Drawn:
    """A prompt, its measured picture, and the object found for each requested one."""

    prompt: Prompt
    picture: Measured
    found: tuple[Thing | None, ...]

    @property
    def all_right(self) -> bool:
        return None not in self.found

    @property
    def facts(self) -> bool:
        """True if every object is present, no other one is, and the background is as requested."""
        alone = len(self.picture.things) == len(self.found)
        return self.all_right and alone and self.prompt.background in (None, self.picture.background)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m bench layout`."""
    parser.add_argument("--model", default="minidiff/shapes", metavar="SOURCE", help="a model of coloured shapes")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="write 24 of the pictures to PNG")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture")
    parser.add_argument("--int8", action="store_true", help="compare int8 with float32 instead")
    parser.add_argument("--boxes", action="store_true", help="give the objects boxes, and compare all guidance methods")
    parser.add_argument("--pareto", type=Path, metavar="PNG", help="with --boxes: plot quality against cost")
    parser.add_argument("--prompts", type=int, metavar="N", help="with --boxes or --int8: use only N of the prompts")


def run(args: argparse.Namespace) -> int:
    """Draw, measure, print. Returns 1 if a bound is violated."""
    if args.boxes:
        return run_boxes(args)
    if args.int8:
        return run_int8(args)
    model, asked = minidiff.load(args.model), prompts()
    facts = {"model": model.name, "dtype": str(model.dtype).removeprefix("torch."), "prompts": str(len(asked))}
    facts |= {"seed": str(args.seed), **{name: str(value) for name, value in asdict(model.defaults).items()}}
    print_header("bench layout", facts)
    true = share_right(*check(100, seed=1))
    print(f"the measurement itself: {true:.1%} of the objects in 100 rendered pictures right, with box IoU >= 0.9")
    images, maps, seconds = _draw(model, asked, args.seed)
    drawn = [_measured(prompt, image) for prompt, image in zip(asked, images, strict=True)]
    shares = [*_shares(drawn), _readable(model, drawn, maps)]
    print(f"\n{'':<52} {'share':>6}  {'95 % interval':<16} {'cases':>5}  bound")
    for share in shares:
        print_share(share)
    cold = _cold(args.model)
    print(f"\nseconds per image, in batches of {BATCH}: {_spread(seconds)}")
    print(f"seconds of `minidiff generate`, a cold process: {_spread(cold)}; bound {COLD:g}")
    if args.json is not None:
        rows = [{**asdict(share), "interval": share.interval, "ok": share.ok} for share in shares]
        times = {"seconds": seconds, "cold": cold}
        found = {"machine": machine(), "versions": versions(), "run": facts, "rows": rows, **times}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.sheet is not None:
        every = range(0, len(asked), max(1, len(asked) // 24))[:24]
        sheet([to_pil(images[i : i + 1])[0] for i in every], [asked[i].text for i in every], 6).save(args.sheet)
    return 0 if all(share.ok for share in shares) and statistics.median(cold) <= COLD else 1


def run_int8(args: argparse.Namespace) -> int:
    """The same pictures in float32 and in int8. Returns 1 if int8 loses more than APART of what is right."""
    asked = prompts()
    asked = asked if args.prompts is None else asked[:: max(1, len(asked) // args.prompts)]
    print_header("bench layout --int8", {"model": args.model, "prompts": str(len(asked)), "seed": str(args.seed)})
    found: dict[str, list[Share]] = {}
    for dtype in ("float32", "int8"):
        images, _, seconds = _draw(minidiff.load(args.model, dtype=dtype, device="cpu"), asked, args.seed)
        drawn = [_measured(prompt, image) for prompt, image in zip(asked, images, strict=True)]
        things = [thing is not None for one in drawn for thing in one.found]
        least = [one.value - APART for one in found.get("float32", [])] or [None, None]
        found[dtype] = [
            Share(f"{dtype}: objects of the right colour and shape", sum(things), len(things), least[0]),
            Share(f"{dtype}: pictures with every fact true", sum(one.facts for one in drawn), len(drawn), least[1]),
        ]
        for share in found[dtype]:
            print_share(share)
        print(f"seconds per image: {_spread(seconds)}", flush=True)
    return 0 if all(share.ok for share in found["int8"]) else 1


def _cold(model: str) -> list[float]:
    """Wall-clock seconds of `minidiff generate` in fresh processes."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(3):
            before = time.perf_counter()
            command = [sys.executable, "-m", "minidiff", "generate", "a red circle", "--model", model, "--out", folder]
            subprocess.run(command, check=True, capture_output=True)
            seconds.append(time.perf_counter() - before)
    return seconds


def _spread(seconds: Sequence[float]) -> str:
    return f"median {statistics.median(seconds):.3f}, {min(seconds):.3f} to {max(seconds):.3f}"


def _draw(model: minidiff.Model, asked: Sequence[Prompt], seed: int) -> tuple[Tensor, dict[Site, Tensor], list[float]]:
    """Images [B,3,128,128] in [0,1]; each site's map [B,h,w,L], mean over heads and steps; seconds per image."""
    sites = frozenset(site for site in model.unet.sites if site.kind == "cross" and site.place in ("mid", "up"))
    record = minidiff.Record(sites, minidiff.HEAD_MEAN)
    images: list[Tensor] = []
    maps: dict[Site, list[Tensor]] = {site: [] for site in sites}
    seconds: list[float] = []
    for start in range(0, len(asked), BATCH):
        before = time.perf_counter()
        batch = asked[start : start + BATCH]
        total: dict[Site, Tensor] = {}
        run = minidiff.sample_steps(
            [p.text for p in batch], model=model, seed=seed + start, attention=record, output="tensor"
        )
        for step in run:
            for site, kept in step.maps.items():
                total[site] = total.get(site, 0) + kept
        image = run.result().images
        assert isinstance(image, Tensor)
        images.append(image)
        for site in sites:
            maps[site].append(total[site] / (step.index + 1))
        seconds.append((time.perf_counter() - before) / len(batch))
    return torch.cat(images), {site: torch.cat(kept) for site, kept in maps.items()}, seconds


def _measured(prompt: Prompt, image: Tensor) -> Drawn:
    picture = measure((image * 255).round().to(torch.uint8))
    wanted = [Thing(shape, colour, (0, 0, 1, 1)) for shape, colour in prompt.things]
    return Drawn(prompt, picture, tuple(matched(picture.things, wanted)))


def _shares(drawn: Sequence[Drawn]) -> Iterator[Share]:
    for count, bound in BOUNDS.items():
        some = [one for one in drawn if len(one.found) == count]
        name = f"{count} object{'s' * (count > 1)}"
        found = [thing is not None for one in some for thing in one.found]
        yield Share(f"{name}: objects of the right colour and shape", sum(found), len(found))
        yield Share(f"{name}: pictures with all of them right", sum(one.all_right for one in some), len(some), bound)
        yield Share(f"{name}: pictures with every fact true", sum(one.facts for one in some), len(some))
    pairs = [pair for one in drawn for pair in zip(one.prompt.things, one.found, strict=True)]
    seen, held = (
        [thing is not None for name, thing in pairs if (name in HELD_OUT) == which] for which in (False, True)
    )
    yield Share("objects right, of colour-shape pairs seen in training", sum(seen), len(seen))
    yield Share("objects right, of pairs held out", sum(held), len(held), HELD * sum(seen) / len(seen))


def _readable(model: minidiff.Model, drawn: Sequence[Drawn], maps: Mapping[Site, Tensor]) -> Share:
    """Fraction of pictures of two objects, both found, in which each word's attention is in its object's box."""
    hits = count = 0
    for i, one in enumerate(drawn):
        if len(one.found) != 2 or not one.all_right:
            continue
        count += 1
        ratios = []
        for phrase, thing in zip(one.prompt.phrases, one.found, strict=True):
            assert thing is not None
            word = model.text.spans(one.prompt.text, phrase)[-1]
            ratios.append(density([kept[i, :, :, word] for kept in maps.values()], thing.box))
        hits += min(ratios) >= READABLE
    return Share(f"2 objects: pictures with attention {READABLE:g} times as dense in the box", hits, count, 0.9)


def density(maps: Sequence[Tensor], box: Sequence[float]) -> float:
    """A word's mean attention per pixel inside the box over that outside, with every site's map [h,w] normalised."""
    centres = (torch.arange(SIZE) + 0.5) / SIZE
    x0, y0, x1, y1 = box
    inside = ((centres > y0) & (centres < y1))[:, None] & ((centres > x0) & (centres < x1))
    whole = sum(F.interpolate(kept[None, None], (SIZE, SIZE), mode="nearest")[0, 0] / kept.mean() for kept in maps)
    assert isinstance(whole, Tensor)
    return float(whole[inside].mean() / whole[~inside].mean())
