"""minidiff info: describe a picture, a weight file, a model folder, or this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from .spoken import spoken

if TYPE_CHECKING:
    from ..png.read import Metadata
    from ..weights.inspect import Content, Description


def info(args: argparse.Namespace) -> Iterator[str]:
    """What `minidiff info` prints."""
    from ..png.read import read_metadata
    from ..png.write import OTHER_FORMATS

    if args.machine or args.source is None:
        if not args.machine or args.source is not None:
            raise ValueError(
                "expected a picture, a weight file or a model, or --machine alone; see minidiff info --help"
            )
        yield from _machine(args.json)
        return
    path = Path(args.source)
    if path.suffix.lower() in (".png", *OTHER_FORMATS) and not path.is_dir():
        found = read_metadata(path)
        values, lines = {"name": path.name, "kind": "picture", **asdict(found)}, _metadata(found)
    else:
        from ..weights.inspect import describe

        description = describe(args.source, variant=args.variant, revision=args.revision, check=args.check)
        values, lines = asdict(description), _description(description)
    if args.json:
        yield from json.dumps(values, indent=2).splitlines()
    else:
        yield from lines


def _machine(as_json: bool) -> Iterator[str]:
    from ..speed.device import machine

    found = machine()
    values = {**asdict(found), "dtype": str(found.cpu_dtype).removeprefix("torch."), "why": str(found)}
    if as_json:
        yield from json.dumps(values, indent=2).splitlines()
        return
    values["rates"] = ", ".join(f"{name} {rate:.2f} TFLOP/s" for name, rate in found.rates.items()) or "not measured"
    values["accelerators"] = list(found.accelerators) or "none"
    yield from _pairs(values)


def _metadata(found: Metadata) -> Iterator[str]:
    first = {name: found.arguments.get(name) or "" for name in ("prompt", "negative_prompt")}
    values = first | {name: value for name, value in found.arguments.items() if name not in first}
    info = {name: value for name, value in found.info.items() if value}
    about = info.get("model")
    if isinstance(about, dict) and about.get("name") == values.get("model"):  # one line for both
        more = [str(about.get("kind")), *([f"sha256 {about['sha256']}"] if about.get("sha256") else [])]
        values["model"] = f"{values['model']} ({', '.join(more)})"
        del info["model"]
    yield from _pairs(values)
    yield from _pairs(info)
    yield f"written by: {'minidiff' if found.source == 'minidiff' else 'A1111, or a program that uses its format'}"
    no = "other programs differ in noise and prompt syntax" if found.source == "a1111" else "its record is incomplete"
    yield "reproducible: " + ("yes, with the same model and versions" if found.reproducible else f"no, {no}")


def _description(found: Description) -> Iterator[str]:
    problems = [spoken(problem) for problem in found.all_problems()]
    yield f"kind: {found.kind}"
    if found.use is not None and not problems:
        yield f"use: {found.use}"
    elif found.use is not None:
        yield f"use: none, because {problems[0]}"
    else:
        yield "loads: yes" if found.loads else f"loads: no, because {problems[0]}"
    yield from (f"problem: {problem}" for problem in problems[1:])
    if found.finite:
        yield "finite: yes, every weight was read"
    yield f"content: {_counts(found.content)}"
    for part in found.parts:
        yield f"{part.name}: {_counts(part.content)}{'' if part.file is None else f', {part.file}'}"
        yield from (f"  {line}" for line in _pairs(part.config))
    for title, values in (("scheduler", found.scheduler), ("tokenizer", found.tokenizer), ("ignored", found.ignored)):
        yield from [f"{title}:"] if values else []
        yield from (f"  {line}" for line in _pairs(values))
    if found.foreign:
        yield f"foreign, left out: {len(found.foreign)} tensors: {', '.join(found.foreign[:5])}"


def _pairs(values: Mapping[str, object]) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, list | tuple) and all(isinstance(item, str | int | float) for item in value):
            value = ", ".join(map(str, value))
        yield f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"


def _counts(content: Content) -> str:
    if not content.tensors:
        return "nothing"
    dtypes = ", ".join(f"{count} {name}" for name, count in content.dtypes.items())
    count = f"{content.tensors} tensor{'s' if content.tensors > 1 else ''}"
    return f"{count} ({dtypes}), {content.parameters:,} parameters, {content.nbytes:,} bytes"
