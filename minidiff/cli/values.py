"""What the texts after command-line flags say, as values. argparse reports what they raise."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias, TypeVar

Number = TypeVar("Number", int, float)

LoraFlag: TypeAlias = "tuple[str, float | None, float | None]"
"""File, weight and text weight of --lora, None where not given."""


def read_box(text: str) -> tuple[str, list[float]]:
    """PHRASE=x0,y0,x1,y1, the corners in [0,1]. A phrase may hold the sign."""
    phrase, sign, numbers = text.rpartition("=")
    if not sign or not phrase.strip():
        raise argparse.ArgumentTypeError(f'got {text!r}; expected e.g. "ball=0.55,0.4,0.95,0.8"')
    return phrase.strip(), read_numbers(numbers)


def read_image_prompt(text: str) -> dict[str, object]:
    """A picture's file, and its box where four numbers follow."""
    file, _, numbers = text.rpartition("=")
    if file and numbers.count(",") == 3:
        return {"image": file, "box": tuple(read_numbers(numbers))}
    return {"image": text}


def read_scales(text: str) -> float | list[float]:
    """One number, or a list of several."""
    scales = read_numbers(text)
    return scales if len(scales) > 1 else scales[0]


def read_lora(text: str) -> LoraFlag:
    """FILE, FILE=WEIGHT or FILE=WEIGHT,TEXT_WEIGHT."""
    file, sign, numbers = text.rpartition("=")
    if not re.fullmatch(r"[-+.,\d\s]+(e[-+]?\d+)?", numbers, re.IGNORECASE) or not sign:
        if file.lower().endswith(".safetensors"):
            raise argparse.ArgumentTypeError(f"got {text!r}; expected e.g. style.safetensors=0.8")
        return text, None, None  # a name may hold the sign
    weight, *more = read_numbers(numbers)
    if len(more) > 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected one or two weights, e.g. style.safetensors=0.8,0.5")
    return file, weight, more[0] if more else None


def read_layout(path: str) -> tuple[str, object]:
    """The name of a JSON file, and its content."""

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice!r} appears twice; expected it once, with a list of boxes")
        return found

    try:
        return path, json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"cannot read the layout {path}: {error}") from error


def read_regions(path: str) -> object:
    """The content of a JSON file, where "mask" may name a picture beside it in the place of a "box"."""

    def read(value: object) -> object:
        if isinstance(value, list):
            return [read(one) for one in value]
        if not isinstance(value, dict) or not isinstance(value.get("mask"), str) or "box" in value:
            return value
        from ..pictures import read_picture

        mask = read_picture(f"the mask {value['mask']}", Path(path).parent / value["mask"])
        return {**{name: one for name, one in value.items() if name != "mask"}, "box": mask}

    try:
        return read(read_layout(path)[1])
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from error


def read_positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number of at least 1")
    return int(text)


def read_shard(text: str) -> tuple[int, int]:
    """I/N, part I of N, counted from 1."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected e.g. 1/4, the first of four parts")
    return int(found[1]), int(found[2])


def read_numbers(text: str) -> list[float]:
    """Numbers separated by commas."""
    return _separated(text, float, "numbers")


def read_again(text: str) -> list[float]:
    """SCALE=STRENGTH of a second pass: 1 to 16 times the size, in (0,1]."""
    numbers = read_numbers(text.replace("=", ",", 1))
    if len(numbers) != 2 or not (1 <= numbers[0] <= 16 and 0 < numbers[1] <= 1):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected 1 to 16 times the size = 0 to 1, e.g. 2=0.5")
    return numbers


def read_wholes(text: str) -> list[int]:
    """Whole numbers separated by commas."""
    return _separated(text, int, "whole numbers")


def read_vary(text: str) -> tuple[int | list[int], float]:
    """SEED=STRENGTH; the seed may be several, separated by commas."""
    seed, sign, strength = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected e.g. 7=0.2")
    return read_seed(seed), *read_numbers(strength)  # type: ignore[return-value]  # checked by Request


def read_seed(text: str) -> int | list[int]:
    """One whole number, or a list of several."""
    seeds = read_wholes(text)
    return seeds if len(seeds) > 1 else seeds[0]


def _separated(text: str, kind: Callable[[str], Number], what: str) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected {what} separated by commas") from None
