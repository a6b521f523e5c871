"""The command line: `minidiff generate`, `look`, `page`, `batch` and `info`. Output goes to stdout, messages to stderr.

Commands import what they need when they need it, so that help and errors in flags are immediate.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from .flags import parser
from .spoken import spoken

if TYPE_CHECKING:
    from ..request import Request
    from ..result import Result
    from ..weights.lora import LoRA
    from .take import Taken
    from .values import LoraFlag

EXIT_OUTPUT, EXIT_INPUT, EXIT_ELSEWHERE, EXIT_INTERRUPTED = 1, 2, 3, 130
LOADING = (
    "tokenizer",
    "vae",
    "prediction_type",
    "dtype",
    "device",
    "variant",
    "revision",
    "compile",
    "safety",
    "words",
    "loras",
)
"""The flags that are arguments of load(); the others are fields of a Request."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    0: success; 1: nothing could be written; 2: bad input; 3: written to another place than asked; 130: interrupted.
    """
    args = None
    try:
        _take_any_character()
        with _warnings_in_one_line():
            args = parser().parse_args(argv)
            if args.command == "generate":
                code = _generate(args)
            elif args.command == "page":
                from .page.start import start

                start(args)
                code = 0
            elif args.command == "batch":
                from .batch import batch

                code = batch(args)
            elif args.command == "look":
                from .look import look_at

                for line in look_at(args):
                    print(printable(line), flush=True)
                code = 0
            else:
                from .info import info

                for line in info(args):
                    print(printable(line).replace("\n", "\n  "))
                code = 0
            if sys.stdout is not None:  # None under pythonw
                sys.stdout.flush()  # to detect a closed pipe here
            return code
    except ValueError as error:
        return _fail(str(error) if args is None else spoken(str(error)), EXIT_INPUT)
    except BrokenPipeError:  # the reader (e.g. head) has closed; keep Python from flushing into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OUTPUT
    except OSError as error:
        return _fail(str(error), EXIT_OUTPUT)
    except KeyboardInterrupt:
        say("minidiff: interrupted")
        return EXIT_INTERRUPTED


def _generate(args: argparse.Namespace) -> int:
    from ..request import Request

    given, loading = given_fields(args), {name: getattr(args, name) for name in LOADING}
    taken: Taken | None = None
    if args.png is not None:
        from .take import take

        taken = take(args.png, given, loading)
        given, loading = {**taken.fields, **given}, taken.loading
        for line in taken.notes:
            note(line)
    if not given.get("prompt"):
        raise ValueError('there is no prompt; expected e.g. minidiff generate "a red circle"')
    try:
        request = Request(**given)  # type: ignore[arg-type]  # checked by Request
    except ValueError as error:
        of_file = args.layout is not None and str(error).startswith("boxes")
        raise ValueError(f"{args.layout[0]}: {error}" if of_file else error) from error
    _note_unquoted(args.prompt)
    check_adapters(args)

    from ..png.write import check_output_path

    check_output_path(args.out)
    from ..run import sample_steps
    from ..speed.accelerate import keep_memory
    from ..weights.image_prompt import with_image_prompt
    from ..weights.load import load

    keep_memory()
    loading["loras"] = lora_values(loading["loras"])
    model = load(request.model, **loading)  # type: ignore[arg-type]
    for file in args.ip_adapter or ():
        model = with_image_prompt(model, file, args.image_encoder)
    if args.compile:
        note("--compile: the first step of each kind waits for the compiler, a minute or more for a large model")
    if taken is not None:
        for line in taken.differences(model):
            note(line)
    from tqdm import tqdm

    def made(request: Request) -> Result:
        run = sample_steps(request)
        for _ in tqdm(run, disable=None, unit="step"):  # None: off where stderr is no terminal
            pass
        return run.result()

    result = made(request.filled({"model": model}))
    return _write(result if args.again is None else made(result.larger(*args.again)), request, args)


def _write(result: Result, request: Request, args: argparse.Namespace) -> int:
    from ..png.write import wanted_path
    from .pictures import blackened, write_pictures

    if any(result.flagged or ()):
        result = blackened(result)
        note(f"{sum(result.flagged or ())} of {len(result)} images are written black: the safety checker flagged them")
    written = result.save(args.out, metadata=not args.no_metadata)
    for path in written:
        print(path, flush=True)
    for report in result.reports or ():
        note(str(report))
    own = [layout or {} for layout in request.layouts for _ in range(request.images_per_prompt)]
    for path in write_pictures(result, written, own):
        print(path)
    asked = zip(result.seeds, result.parameters, strict=True)
    folders = [wanted_path(args.out, i, len(result), *one).parent.resolve() for i, one in enumerate(asked)]
    return 0 if folders == [path.parent.resolve() for path in written] else EXIT_ELSEWHERE


def lora_values(flags: Sequence[LoraFlag] | None) -> list[LoRA]:
    """The arguments of --lora as values."""
    from ..weights.lora import LoRA

    return [LoRA(file, 1.0 if weight is None else weight, text) for file, weight, text in flags or ()]


def given_fields(args: argparse.Namespace) -> dict[str, object]:
    """The fields of a Request given by flags."""
    from ..request import FIELDS

    values = {name: getattr(args, name, None) for name in FIELDS}
    values["boxes"] = _boxes(args) if args.command == "generate" else None
    return {name: value for name, value in values.items() if value is not None and value != []}


def check_adapters(args: argparse.Namespace) -> None:
    """ValueError, before anything is loaded, for pictures without an adapter and adapters that are none."""
    flags = "--ip-adapter FILE --image-encoder FOLDER"
    if getattr(args, "image_prompt", None) and not args.ip_adapter:
        raise ValueError(f"--image-prompt needs an IP-Adapter that reads it; expected {flags} too")
    if bool(args.ip_adapter) != bool(args.image_encoder):
        raise ValueError(f"got one of --ip-adapter and --image-encoder; expected both: {flags}")
    if args.ip_adapter:
        from ..weights.image_prompt import find_image_adapter

        for file in args.ip_adapter:
            find_image_adapter(file)


def _boxes(args: argparse.Namespace) -> object:
    """The boxes of --layout, or of --box, with those of the same phrase in one list."""
    if args.layout is not None and args.boxes is not None:
        raise ValueError("got both --box and --layout; expected one of them")
    if args.boxes is None:
        return None if args.layout is None else args.layout[1]
    together: dict[str, list[list[float]]] = {}
    for phrase, box in args.boxes:
        together.setdefault(phrase, []).append(box)
    return together


def _note_unquoted(prompts: Sequence[str]) -> None:
    if len(prompts) > 2 and all(len(prompt.split()) == 1 for prompt in prompts):
        note(
            f'{len(prompts)} prompts of one word each make {len(prompts)} images; for one, write "{" ".join(prompts)}"'
        )


# ---- messages


def note(text: str) -> None:
    """Print a note on stderr."""
    say(f"note: {_one_line(text)}")


def say(line: str) -> None:
    """Print to stderr, above the progress bar if there is one."""
    if sys.stderr is None:
        return
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr)


def printable(text: str) -> str:
    """Escape control characters: text from files is untrusted."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _fail(text: str, code: int) -> int:
    say(f"minidiff: error: {_one_line(text)}")
    return code


def _one_line(text: str) -> str:
    """The first lines of a message, joined: lists of keys may have hundreds."""
    head, *rest = text.splitlines() or [""]
    more = [f"and {len(rest) - 5} more (minidiff info --json lists all)"] if len(rest) > 5 else []
    return printable("; ".join([head, *(line.strip() for line in rest[:5]), *more]).replace(":; ", ": ", 1))


def _take_any_character() -> None:
    """Escape characters that the console's encoding lacks instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Show warnings as one line on stderr, without the source line."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        say(f"warning: {_one_line(spoken(str(message)))}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
