"""One object of two gets another colour: how often each way of editing does that, and leaves the rest where it was."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import minidiff
from minidiff.shapes.measure import iou, matched, measure
from minidiff.shapes.world import COLOURS, Scene, Thing, render
from minidiff.vocabulary import BUNDLED

from .boxes import asked
from .machine import print_header
from .prompts import Prompt
from .share import Share, print_share

SEED = 30_000
NEAR = 0.8  # minimum IoU of an object's box with what it was
STEPS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scenes", type=int, default=24, metavar="N", help="number of scenes (default: 24)")


Edited = Callable[[minidiff.Model, list[str], Tensor, int], Tensor]
"""(model, [prompt, changed prompt], picture [3,H,W] of uint8, seed) -> the picture before and after, [2,3,H,W]."""


def _drawn(model: minidiff.Model, pair: list[str], seed: int, **options: object) -> Tensor:
    shared = {"model": model, "seed": [seed, seed], "output": "tensor"}
    images = minidiff.generate(pair, **shared, **options).images  # type: ignore[call-overload]
    assert isinstance(images, Tensor)
    return images


def _swapped(model: minidiff.Model, pair: list[str], picture: Tensor, seed: int) -> Tensor:
    inputs = {"alignment": model.text.alignment(pair)}
    return _drawn(model, pair, seed, edits=minidiff.prompt_to_prompt(), inputs=inputs)


def _inverted(
    model: minidiff.Model, pair: list[str], picture: Tensor, seed: int, method: str, swap: bool = False
) -> Tensor:
    twice = 1 + swap
    given = minidiff.invert(
        [picture] * twice, pair[:1] * twice, model=model, method=method, steps=STEPS, seed=[seed] * twice
    )
    given["guidance_scale"] = model.defaults.guidance_scale
    if swap:
        given |= {"edits": minidiff.prompt_to_prompt(), "inputs": {"alignment": model.text.alignment(pair)}}
    after = minidiff.generate(pair[-twice:], output="tensor", **given).images
    assert isinstance(after, Tensor)
    return torch.cat([picture[None] / 255, after[-1:]])


def _again(model: minidiff.Model, pair: list[str], picture: Tensor, seed: int) -> Tensor:
    after = minidiff.generate(pair[1], model=model, image=picture, strength=0.6, seed=seed, output="tensor").images
    assert isinstance(after, Tensor)
    return torch.cat([picture[None] / 255, after])


WAYS: Mapping[str, Edited] = {
    "drawn: the other prompt alone": lambda model, pair, _, seed: _drawn(model, pair, seed),
    "drawn: prompt-to-prompt": _swapped,
    "drawn: MasaCtrl": lambda model, pair, _, seed: _drawn(model, pair, seed, edits=minidiff.masactrl()),
    "a picture: strength 0.6": _again,
    "a picture: invert, edit-friendly": lambda *given: _inverted(*given, method="edit_friendly"),
    "a picture: the same, prompt-to-prompt": lambda *given: _inverted(*given, method="edit_friendly", swap=True),
    "a picture: invert, DDIM": lambda *given: _inverted(*given, method="ddim"),
}


def run(args: argparse.Namespace) -> int:
    """Print a row for each way."""
    model = minidiff.load(BUNDLED, dtype="float32", device="cpu")
    print_header(
        "bench swaps", {"scenes": str(args.scenes), "seed": str(SEED), "steps": str(STEPS), "dtype": "float32"}
    )
    print(f"{'':<52} {'share':>6}  {'95 % interval':<16} {'cases':>5}")
    two = [one for one in asked(SEED) if len(one.boxes) == 2][: args.scenes]
    rng = np.random.default_rng(SEED)
    given = []
    for one in two:
        first, second = (Thing(*thing, box) for thing, box in zip(one.prompt.things, one.boxes, strict=True))
        colour = str(rng.choice([name for name in COLOURS if name not in (first.colour, second.colour)]))
        background = "gray" if colour != "gray" else "white"
        changed = Prompt(((first.shape, colour), one.prompt.things[1]), background)
        pair = [replace(changed, things=one.prompt.things).text, changed.text]
        given.append((pair, render([Scene((first, second), background)])[0], first, second, colour))
    for name, way in WAYS.items():
        found = [_judged(way(model, pair, picture, i), *rest) for i, (pair, picture, *rest) in enumerate(given)]
        there = [one for one in found if one is not None]
        for k, what in enumerate(("new colour, same place", "other as it was", "both")):
            print_share(Share(f"{name}: {what}", sum(one[k] for one in there), len(there)))
    return 0


def _judged(images: Tensor, first: Thing, second: Thing, colour: str) -> tuple[bool, bool, bool] | None:
    """Whether the first has the colour where it was, whether the second is what and where it was, and both; None where
    the picture before lacks one of them."""
    before, after = (measure((image * 255).round().to(torch.uint8)).things for image in images)
    old = matched(before, [first, second])
    if old[0] is None or old[1] is None:
        return None
    wanted = [replace(old[0], colour=colour), old[1]]
    new = matched(after, wanted)
    held = [one is not None and iou(one.box, was.box) >= NEAR for one, was in zip(new, wanted, strict=True)]
    return held[0], held[1], all(held)
