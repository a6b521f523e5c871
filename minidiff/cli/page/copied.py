"""The Python and the command line that make a picture of the page again."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...vocabulary import BUNDLED
from ..flags import parser
from ..values import LoraFlag
from .form import PICTURES, Values

if TYPE_CHECKING:
    from .studio import Source


def python(values: Values, source: Source) -> str:
    """A program that makes it."""
    given = [repr(values["prompt"])] + [f"{name}={value!r}" for name, value in values.items() if name != "prompt"]
    loras = ", ".join(f"minidiff.LoRA({', '.join(map(repr, _known(lora)))})" for lora in source.loras)
    options = [f"{name}={value!r}" for name, value in source.loading.items() if value not in (None, False)]
    options += [f"loras=[{loras}]"] if loras else []
    lines = ["import minidiff", ""]
    if options or source.adapters or source.name != BUNDLED:
        lines.append(f"model = minidiff.load({', '.join([repr(source.name), *options])})")
        given.append("model=model")
    lines += [f"model = minidiff.with_image_prompt(model, {one!r}, {source.encoder!r})" for one in source.adapters]
    return "\n".join([*lines, f'minidiff.generate({", ".join(given)}).save("picture.png")'])


def command(values: Values, source: Source, picture: str) -> str:
    """A command line that makes it. picture: a file of it, whose settings are taken where no flag can say them."""
    loras = [f"{file}={','.join(map(repr, numbers))}" for file, *numbers in map(_known, source.loras)]
    model = {"model": None if source.name == BUNDLED else source.name, **source.loading, "loras": loras}
    model |= {"ip_adapter": list(source.adapters), "image_encoder": source.encoder}
    try:
        words = [*_flags(values), *_flags(model)]
    except _NoFlagError:
        own = {name: values[name] for name in PICTURES if name in values}
        words = ["--from", picture, *_flags(own), *_flags(model)]
    return shlex.join(["minidiff", "generate", *words, "--out", "picture.png"])


class _NoFlagError(Exception):
    """No flag can say a value."""


def _flags(values: Mapping[str, Any]) -> Iterator[str]:
    """The words of a command line that give fields their values; those that are unset have none."""
    commands = next(one for one in parser()._actions if isinstance(one, argparse._SubParsersAction))
    actions = commands.choices["generate"]._actions
    for name, value in values.items():
        if value is None or value == [] or (value is False and name != "paste"):
            continue
        fitting = [one for one in actions if one.dest == name and (one.nargs == 0) == isinstance(value, bool)]
        if not fitting:
            raise _NoFlagError
        yield from _words(fitting[0], value)


def _words(flag: argparse.Action, value: Any) -> Iterator[str]:
    option = max(flag.option_strings, key=len, default="")
    if isinstance(value, bool):
        yield flag.option_strings[0 if value else -1]
    elif flag.dest == "boxes" and isinstance(value, dict):
        for phrase, boxes in value.items():
            for box in boxes if isinstance(boxes, list) and isinstance(boxes[0], list) else [boxes]:
                if not isinstance(box, list):  # with a weight, or without a place
                    raise _NoFlagError
                yield from _pair(option, f"{phrase}={_numbers(box)}")
    elif flag.dest == "words":
        for word, file in value.items():
            yield from _pair(option, f"{word}={file}")
    elif flag.dest == "vary":
        yield from _pair(option, "=".join(_numbers(one if isinstance(one, list) else [one]) for one in value))
    elif isinstance(value, dict):
        raise _NoFlagError
    elif isinstance(value, list) and isinstance(flag, argparse._AppendAction):
        for one in value:
            yield from _pair(option, one)
    else:
        yield from _pair(option, _numbers(value) if isinstance(value, list) else value)


def _pair(option: str, value: object) -> Sequence[str]:
    """An option and its value. A value that starts with a minus is joined to it; a prompt, which has none, cannot."""
    text = str(value)
    if not text.startswith("-"):
        return [option, text] if option else [text]
    if not option or isinstance(value, dict | list):
        raise _NoFlagError
    return [f"{option}={text}"]


def _numbers(values: Sequence[object]) -> str:
    if not all(isinstance(value, int | float) for value in values):
        raise _NoFlagError
    return ",".join(map(repr, values))


def _known(lora: LoraFlag) -> tuple[Any, ...]:
    file, weight, text = lora
    return (file, 1.0 if weight is None else weight, *([] if text is None else [text]))
