"""The command line: `minidiff generate` and `minidiff info`. What was asked for goes to stdout, all else to stderr.

Each command imports what it needs: help and a wrong flag wait for nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

from .flags import GUIDANCE, parser

if TYPE_CHECKING:
    from ..guidance.layout import Boxes
    from ..model import Model
    from ..result import Metadata, Plain
    from ..weights.inspect import Content, Description

EXIT_OUTPUT, EXIT_INPUT, EXIT_INTERRUPTED = 1, 2, 130

# What --from takes over: generate()'s names, the same as the flags', and what a file may hold there.
_NUMBER = (int, float)
_ARGUMENTS: dict[str, type | tuple[type, ...]] = {
    "prompt": str,
    "negative_prompt": str,
    "model": str,
    "width": int,
    "height": int,
    "steps": int,
    "timesteps": list,
    "sigmas": list,
    "guidance_scale": _NUMBER,
    "guidance_rescale": _NUMBER,
    "clip_skip": int,
    "sampler": str,
    "karras": bool,
    "spacing": str,
    "eta": _NUMBER,
    "seed": int,
    "boxes": dict,
    "guidance": (dict, str),
    "attention": bool,
}
_OF_THE_MODEL = ("vae", "tokenizer", "prediction_type", "variant", "revision", "dtype")
# Beside these flags, what the file says of the others would contradict.
_REPLACED = {
    "steps": ("timesteps", "sigmas"),
    "timesteps": ("steps", "sigmas"),
    "sigmas": ("steps", "timesteps"),
    "sampler": ("karras", "spacing", "eta"),
    "layout": ("boxes",),
}
T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 1 nothing could be written, 2 bad input, 130 interrupted."""
    try:
        with _warnings_in_one_line():
            args = parser().parse_args(argv)
            (_generate if args.command == "generate" else _info)(args)
            sys.stdout.flush()  # so that a closed pipe shows here
    except ValueError as error:
        return _fail(str(error), EXIT_INPUT)
    except BrokenPipeError:  # the reader, such as head, has enough; Python must not flush into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OUTPUT
    except OSError as error:
        return _fail(str(error), EXIT_OUTPUT)
    except KeyboardInterrupt:
        _say("minidiff: interrupted")
        return EXIT_INTERRUPTED
    return 0


# ---- generate


def _generate(args: argparse.Namespace) -> None:
    found = None if args.png is None else _take_over(args)
    _check(args)
    from tqdm import tqdm

    from ..generate import ATTENTION, sample_steps
    from ..recorded import MEAN
    from ..speed.accelerate import keep_memory
    from .pictures import write_pictures

    layouts = _layouts(args)
    keep_memory()
    model = _load(args)
    if args.compile:
        _note("--compile: the first step of each kind waits for the compiler, for a large model a minute or more")
    if found is not None:
        _compare(args.png, found, model)
    run = sample_steps(
        args.prompt,
        model=model,
        negative_prompt=args.negative_prompt,
        width=args.width,
        height=args.height,
        steps=args.steps,
        timesteps=args.timesteps,
        sigmas=args.sigmas,
        guidance_scale=args.guidance_scale,
        guidance_rescale=_given(args.guidance_rescale, 0.0),
        clip_skip=args.clip_skip,
        sampler=args.sampler,
        karras=args.karras,
        spacing=args.spacing,
        eta=_given(args.eta, 0.0),
        seed=args.seed,
        images_per_prompt=args.images_per_prompt,
        boxes=layouts,
        guidance=args.guidance,
        record=ATTENTION if args.attention else None,
    )
    kept = None
    # disable=None: off where stderr is no terminal
    for step in tqdm(run, total=_count(args, model), disable=None, unit="step"):
        kept = MEAN(kept, step.maps, step.index) if step.maps else None
    result = step.result("pil", kept)
    written = result.save(args.out, metadata=not args.no_metadata)
    for path in written:
        print(path, flush=True)
    for report in result.reports or ():
        _note(str(report))
    own = [layout or {} for layout in layouts or [None] * len(args.prompt) for _ in range(args.images_per_prompt)]
    for path in write_pictures(result, written, own):
        print(path)


def _check(args: argparse.Namespace) -> None:
    """What can be found wrong without a model, so that none is fetched and read for nothing."""
    if not args.prompt:
        raise ValueError('there is no prompt; expected such as minidiff generate "a red circle"')
    from ..arguments import check_fraction, check_guidance, check_positive, check_scale, check_seeds
    from ..result import check_output_path
    from ..sampling import sampler_by_name
    from ..weights.sources import BUNDLED

    args.model = _given(args.model, BUNDLED)
    check_output_path(args.out)
    check_positive("images", args.images_per_prompt)
    for name in ("width", "height", "steps"):
        if getattr(args, name) is not None:
            check_positive(name, getattr(args, name))
    if sum(value is not None for value in (args.steps, args.timesteps, args.sigmas)) > 1:
        raise ValueError("got several of --steps, --timesteps and --sigmas; expected one of them")
    if args.guidance_scale is not None:
        check_scale(args.guidance_scale)
    if isinstance(args.guidance, str) and args.guidance not in GUIDANCE:
        raise ValueError(f"guidance is {args.guidance!r}; expected one of {', '.join(GUIDANCE)}")
    if args.guidance is not None:
        check_guidance(args.guidance)
    for name in ("guidance_rescale", "eta"):
        check_fraction(name, _given(getattr(args, name), 0.0))
    if args.sampler is not None:
        sampler_by_name(args.sampler, args.karras, args.spacing, _given(args.eta, 0.0))
    check_seeds(args.seed, len(args.prompt) * args.images_per_prompt)


def _layouts(args: argparse.Namespace) -> list[Boxes | None] | None:
    """One for each prompt, of --box or --layout or taken over; checked as far as that needs no model."""
    layouts, source, count = args.boxes, "", len(args.prompt)
    if args.layout is not None:
        if args.boxes is not None:
            raise ValueError("got both --box and --layout; expected one of them")
        path, found = args.layout
        layouts, source = found if isinstance(found, list) else [found] * count, f"{path}: "
        if len(layouts) != count:
            raise ValueError(f"{path} holds {len(layouts)} layouts for {count} prompts; expected one for all, or each")
    elif isinstance(args.boxes, list):
        together: dict[str | int | tuple[int, ...], object] = {}
        for phrase, box in args.boxes:
            together[phrase] = [*together.get(phrase, []), box]  # type: ignore[misc]
        layouts = [together] * count
    elif args.boxes is not None:
        layouts, source = [args.boxes] * count, f"{args.png}: "
    if layouts is not None:
        from ..guidance.layout import read_regions

        try:
            for layout in layouts:
                if layout is not None:
                    read_regions(layout, lambda phrase: (1,), length=1 << 30)  # phrases, positions wait for the model
        except ValueError as error:
            raise ValueError(f"{source}{error}") from error
    return layouts


def _load(args: argparse.Namespace) -> Model:
    from ..weights.load import load

    return load(
        args.model,
        tokenizer=args.tokenizer,
        vae=args.vae,
        prediction_type=args.prediction_type,
        dtype=args.dtype,
        device=args.device,
        variant=args.variant,
        revision=args.revision,
        compile=args.compile,
    )


def _count(args: argparse.Namespace, model: Model) -> int:
    """The steps of the run."""
    if args.timesteps is not None:
        return len(args.timesteps)
    return len(args.sigmas) - 1 if args.sigmas is not None else _given(args.steps, model.defaults.steps)


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


# ---- generate --from


def _take_over(args: argparse.Namespace) -> Metadata:
    """Fill in what the flags leave open from the PNG in args.png, and say what is not taken from there."""
    from ..result import read_metadata

    found = read_metadata(args.png)
    replaced = {name for flag, names in _REPLACED.items() if getattr(args, flag) is not None for name in names}
    left: list[str] = []
    for name, value in found.arguments.items():
        if name not in _ARGUMENTS:
            left.append(name)
        elif name == "model" or value is None or getattr(args, name) not in (None, []):
            continue  # the model is below; a flag that is given stands
        elif name in replaced or (isinstance(value, dict) and not _is_layout(name, value)):
            left += [name] if value else []
        else:
            checked = _checked(args.png, name, value)
            setattr(args, name, [checked] if name in ("prompt", "negative_prompt") else checked)
    left += _take_model(args, found)
    other = found.info.get("other")
    left += list(other) if isinstance(other, dict) else []
    if left:
        _note(f"not taken over from {args.png}: {', '.join(left)}")
    if found.source == "a1111":
        _note(f"{args.png} is not of minidiff: programs differ in noise and prompt syntax, the image will be another")
    elif not found.reproducible:
        _note(f"{args.png} does not hold all that made it, the image will be another")
    return found


def _is_layout(name: str, value: Mapping[str, Plain]) -> bool:
    """Whether a mapping is one of boxes or of guidance; a mask, or an objective of one's own, is not in the file."""
    if name == "boxes":
        return all(isinstance(region, dict) and "boxes" in region for region in value.values())
    return name == "guidance" and isinstance(value.get("objective"), dict)


def _take_model(args: argparse.Namespace, found: Metadata) -> list[str]:
    """The model, where the file says where it is, and how it was loaded, where it is the same; the names not taken."""
    named, options = found.arguments.get("model"), found.info.get("load")
    if args.model is None:
        if not isinstance(named, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", named):  # a hub id
            raise ValueError(f"{args.png} names its model {named!r}, but not where that is; expected it with --model")
        args.model = named
    same = named in (args.model, Path(args.model).stem, Path(args.model).resolve().name)
    values = {**(options if isinstance(options, dict) else {}), "dtype": found.info.get("dtype")}
    left = []
    for name in _OF_THE_MODEL:
        value = values.get(name)
        if value is None or getattr(args, name) is not None:
            continue
        if same and isinstance(value, str) and (name not in ("vae", "tokenizer") or "/" in value):
            setattr(args, name, value)
        else:
            left.append(name)
    return left


def _checked(png: str, name: str, value: Plain) -> Plain:
    """A value of the kind that it should have. Its range is generate()'s to check."""
    kind = _ARGUMENTS[name]
    right = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    if not right or (isinstance(value, list) and not all(isinstance(v, _NUMBER) for v in value)):
        flag = "box" if name == "boxes" else name.replace("_", "-")
        raise ValueError(f"{png}: its {name} is {value!r}; give your own with --{flag}")
    return value


def _compare(png: str, found: Metadata, model: Model) -> None:
    """Say where the model or the programs are not those that made the PNG."""
    named, made, versions = found.arguments.get("model"), found.info.get("model_hash"), found.info.get("versions")
    if isinstance(made, str) and len(made) == 10 and model.sha256 is not None:  # others are A1111's old hash
        if made != model.sha256[:10]:
            _note(f"{png} was made with a model file of sha256 {made}..., this is {model.sha256[:10]}...")
    elif isinstance(named, str) and named != model.name:
        _note(f"{png} was made with the model {named!r}, this is {model.name!r}")
    for name, then in versions.items() if isinstance(versions, dict) else ():
        if name in ("minidiff", "torch", "transformers") and then != version(name):
            _note(f"{png} was made with {name} {then}, this is {version(name)}: the last bits may differ")


# ---- info


def _info(args: argparse.Namespace) -> None:
    from ..result import OTHER_FORMATS, read_metadata

    path = Path(args.source)
    if path.suffix.lower() in (".png", *OTHER_FORMATS) and not path.is_dir():
        found = read_metadata(path)
        values, lines = {"name": path.name, "kind": "PNG", **asdict(found)}, _metadata_lines(found)
    else:
        from ..weights.inspect import describe

        description = describe(args.source, variant=args.variant, revision=args.revision)
        values, lines = asdict(description), _description_lines(description)
    if args.json:
        print(json.dumps(values, indent=2))
    else:
        for line in lines:
            print(_printable(line).replace("\n", "\n  "))


def _metadata_lines(found: Metadata) -> Iterator[str]:
    first = {name: found.arguments.get(name) or "" for name in ("prompt", "negative_prompt")}
    yield from _pairs(first | {name: value for name, value in found.arguments.items() if name not in first})
    yield from _pairs({name: value for name, value in found.info.items() if value})
    yield f"written by: {'minidiff' if found.source == 'minidiff' else 'A1111, or a program that writes as it does'}"
    no = "other programs differ in noise and prompt syntax" if found.source == "a1111" else "it does not hold all"
    yield "reproducible: " + ("yes, with the same model and versions" if found.reproducible else f"no, {no}")


def _description_lines(found: Description) -> Iterator[str]:
    problems = found.all_problems()
    yield f"kind: {found.kind}"
    yield "loads: yes" if found.loads else f"loads: no, because {problems[0]}"
    yield from (f"problem: {problem}" for problem in problems[1:])
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
    dtypes = ", ".join(f"{count} {name}" for name, count in content.dtypes.items())
    return f"{content.tensors} tensors ({dtypes}), {content.parameters:,} parameters, {content.nbytes:,} bytes"


# ---- what is said


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """warnings.warn() as one line on stderr, without the line of code that it came from."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        _say(f"warning: {_one_line(str(message))}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _note(text: str) -> None:
    _say(f"note: {_one_line(text)}")


def _fail(text: str, code: int) -> int:
    _say(f"minidiff: error: {_one_line(text)}")
    return code


def _say(line: str) -> None:
    """To stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)


def _one_line(text: str) -> str:
    """The first lines of a message, joined: a list of keys may have hundreds."""
    head, *rest = text.splitlines() or [""]
    more = [f"and {len(rest) - 5} more (minidiff info --json lists all)"] if len(rest) > 5 else []
    return _printable("; ".join([head, *(line.strip() for line in rest[:5]), *more]))


def _printable(text: str) -> str:
    """Without what a terminal would obey: texts from files are not ours."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
