"""A1111's text about an image, the PNG chunk `parameters` that most programs write and read, to and from our names.

    PROMPT, of any number of lines
    Negative prompt: NEGATIVE PROMPT, likewise
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model hash: 6ce0161689, Model: NAME, Clip skip: 2

After modules/infotext_utils.py and create_infotext in modules/processing.py of AUTOMATIC1111/stable-diffusion-webui
1.10.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

Value: TypeAlias = bool | int | float | str

SAMPLERS = {  # our name -> A1111's
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "pndm": "PLMS",
    "lms": "LMS",
    "dpmpp_2m": "DPM++ 2M",
}
NEGATIVE = "Negative prompt:"
# One `Key: value` of the last line. Unlike A1111's, a key starts only after a comma: linear time on a hostile line.
PAIR = re.compile(r'(?:^|(?<=,))\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"(?=\s*(?:,|$))|[^,]*)')


def to_infotext(arguments: Mapping[str, object], *, model_hash: object = None, version: object = None) -> str:
    """generate()'s arguments in A1111's grammar; what it has no word for is left out, as is what is no string or
    number.

    One thing does not come back from parse_infotext: a negative prompt with a line that starts with `Negative prompt:`.
    """
    prompt, negative = (_text(arguments.get(name)) for name in ("prompt", "negative_prompt"))
    lines = [prompt]
    if negative or any(line.startswith(NEGATIVE) for line in prompt.split("\n")):
        lines.append(f"{NEGATIVE} {negative}")
    settings = _settings(arguments) | {"Model hash": model_hash, "Version": version}
    lines.append(", ".join(f"{key}: {_quote(value)}" for key, value in settings.items() if _is_value(value)))
    return "\n".join(lines)


def parse_infotext(text: str) -> tuple[dict[str, Value], dict[str, str]]:
    """A1111's text -> (generate()'s arguments, the settings that have no name of ours as they stand).

    Of several lines that start with `Negative prompt:` the last one divides (A1111 takes the first): a prompt may hold
    one.
    ValueError when the last line is no line of settings, or a setting that should be a number is none.
    """
    body, _, line = text.rstrip().rpartition("\n")
    rest = {key.strip(): _unquote(value) for key, value in PAIR.findall(line)}
    if len(rest) < (1 if line.lstrip().startswith("Steps:") else 3):  # three: A1111's own rule
        raise ValueError(f"the last line should be like 'Steps: 20, Sampler: Euler a, Seed: 1', got {line[:80]!r}")
    lines = body.split("\n")
    divide = max((index for index, entry in enumerate(lines) if entry.startswith(NEGATIVE)), default=len(lines))
    negative = "\n".join(lines[divide:]).removeprefix(NEGATIVE).removeprefix(" ")
    arguments: dict[str, Value] = {"prompt": "\n".join(lines[:divide]), "negative_prompt": negative}
    return arguments | _take_sampler(rest) | _take_numbers(rest) | _take(rest, "Model", "model", str), rest


def _settings(arguments: Mapping[str, object]) -> dict[str, object]:
    get = arguments.get
    sampler, clip_skip, seed = get("sampler"), get("clip_skip"), get("seed")
    if isinstance(sampler, Mapping):  # an object, as result.plain() writes it
        sampler = str(sampler.get("object")).rpartition(".")[2]
    label = SAMPLERS.get(sampler, sampler) if isinstance(sampler, str) else None
    karras = get("karras") is True
    return {
        "Steps": get("steps"),
        "Sampler": f"{label} Karras" if label and karras else label,
        # A1111 1.9 and later take a DPM++ 2M that names no schedule for Karras.
        "Schedule type": "Uniform" if sampler == "dpmpp_2m" and not karras else None,
        "CFG scale": get("guidance_scale"),
        "Seed": seed,
        "Size": None if get("width") is None or get("height") is None else f"{get('width')}x{get('height')}",
        "Model hash": None,  # its place in the line
        "Model": get("model"),
        "Clip skip": clip_skip + 1 if isinstance(clip_skip, int) and clip_skip > 0 else None,  # A1111 counts one more
        "Eta DDIM": (get("eta") or None) if sampler == "ddim" else None,
        "RNG": None if seed is None else "CPU",  # our noise is what A1111 draws with this option
    }


def _take_sampler(rest: dict[str, str]) -> dict[str, Value]:
    """Karras as the end of the sampler's name (before A1111 1.9, and ours) or as a schedule type.

    Unknown samplers stay.
    """
    if "Sampler" not in rest:
        return {}
    label = rest.pop("Sampler")
    schedule = rest.get("Schedule type", "Automatic").lower()
    if schedule in ("automatic", "uniform", "normal", "karras"):
        rest.pop("Schedule type", None)
    base = label[: -len(" karras")] if label.lower().endswith(" karras") else label
    names = {theirs.lower(): ours for ours, theirs in SAMPLERS.items()}
    return {"sampler": names.get(base.lower(), base), "karras": base != label or schedule == "karras"}


def _take_numbers(rest: dict[str, str]) -> dict[str, Value]:
    if "Size" in rest:
        rest["width"], _, rest["height"] = rest.pop("Size").partition("x")
    known = _take(rest, "Steps", "steps", int)
    known |= _take(rest, "CFG scale", "guidance_scale", float)
    known |= _take(rest, "Seed", "seed", int)
    known |= _take(rest, "width", "width", int) | _take(rest, "height", "height", int)
    known |= _take(rest, "Eta DDIM", "eta", float)
    clip_skip = _take(rest, "Clip skip", "clip_skip", lambda text: max(int(text) - 1, 0))
    return known | {name: value for name, value in clip_skip.items() if value}  # A1111's 1 is our None


def _take(rest: dict[str, str], key: str, name: str, kind: Callable[[str], Value]) -> dict[str, Value]:
    if key not in rest:
        return {}
    text = rest.pop(key)
    try:
        return {name: kind(text)}
    except ValueError:
        raise ValueError(f"{key!r} should be a {'' if kind is float else 'whole '}number, got {text[:80]!r}") from None


def _quote(value: object) -> str:
    """A1111's rule (a comma, a colon, a new line), and also where the value would not come back otherwise."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else repr(value)
    text = str(value)
    if text and text == text.strip() and text[0] != '"' and not re.search("[,:\n]", text):
        return text
    return json.dumps(text, ensure_ascii=False)


def _unquote(text: str) -> str:
    text = text.strip()
    try:
        return str(json.loads(text)) if text.startswith('"') else text
    except ValueError:
        return text


def _is_value(value: object) -> bool:
    return isinstance(value, (int, float, str))


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
