"""A1111's text about an image, which most programs write into the PNG chunk `parameters`, to and from our names.

    PROMPT, any number of lines
    Negative prompt: NEGATIVE PROMPT, any number of lines
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model hash: 6ce0161689, Model: NAME, Clip skip: 2

After modules/infotext_utils.py and create_infotext in modules/processing.py of AUTOMATIC1111/stable-diffusion-webui
1.10.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TypeAlias

from ..checks import number, shown, whole
from ..vocabulary import SCHEDULES, a1111_sampler, read_sampler, read_schedule
from .chunk import Plain

Value: TypeAlias = "bool | int | float | str | list[Plain]"

NEGATIVE = "Negative prompt:"
# One `Key: value` of the settings. Unlike A1111's, a key starts only after a comma: linear time on a hostile line.
PAIR = re.compile(r'(?:^|(?<=,))\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"(?=\s*(?:,|$))|[^,]*)')
# Samplers that A1111 1.9 and later give Karras or exponential levels if no schedule type is written.
_NOT_UNIFORM = (
    *("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"),
    *("dpmpp_sde", "dpmpp_2s_ancestral", "dpm2", "dpm2_ancestral"),
)
_CFG_PP = {"ddim_cfg_pp": 12.5}  # samplers for which A1111 divides the CFG scale that it writes
_LONGEST = 1_000_000  # characters of a text; A1111's hold a few thousand
_NUMBERS: tuple[tuple[str, str, Callable[[str, object, float, float], float], float, float], ...] = (
    ("Steps", "steps", whole, 1, 10_000),
    ("CFG scale", "guidance_scale", number, -math.inf, math.inf),
    ("Seed", "seed", whole, 0, 2**64 - 1),
    ("Variation seed", "vary", whole, 0, 2**64 - 1),
    ("Variation seed strength", "strength of vary", number, 0, 1),
    ("width", "width", whole, 1, 65_536),
    ("height", "height", whole, 1, 65_536),
    ("Clip skip", "clip_skip", whole, 0, 100),
    ("Eta DDIM", "eta", number, -math.inf, math.inf),
)
"""A1111's key, our name, and the range; a value beyond it means a damaged or malicious file."""
_HASHES = {"word": "TI hashes", "lora": "Lora hashes"}
"""A1111's key for the files of each kind of adapter."""
_EMPHASIS: Mapping[object, str] = {"a1111": "Original", "none": "Ignore", "compel": "compel"}
"""Ours to A1111's, which has none for compel's and leaves out its default."""


def to_infotext(
    arguments: Mapping[str, object], *, model_hash: object = None, version: object = None, adapters: object = None
) -> str:
    """generate()'s arguments in A1111's format. Arguments without a key in A1111 are left out, as are values that are
    neither numbers nor text.

    parse_infotext cannot restore one thing: a negative prompt with a line that starts with `Negative prompt:`.
    """
    texts = (arguments.get(name) for name in ("prompt", "negative_prompt"))
    prompt, negative = (text if isinstance(text, str) else "" for text in texts)
    lines = [prompt]
    if negative or any(line.startswith(NEGATIVE) for line in prompt.split("\n")):
        lines.append(f"{NEGATIVE} {negative}")
    settings = _settings(arguments) | {"Model hash": model_hash} | _hashes(adapters) | {"Version": version}
    lines.append(
        ", ".join(f"{key}: {_quote(value)}" for key, value in settings.items() if isinstance(value, int | float | str))
    )
    return "\n".join(lines)


def parse_infotext(text: str) -> tuple[dict[str, Value], dict[str, str]]:
    """A1111's text -> (generate()'s arguments, settings without a name of ours, unchanged).

    The settings are the last line that starts with `Steps:`; lines after it (sd-dynamic-prompts writes its template
    there) are returned as "Template". Of several lines that start with `Negative prompt:`, the last begins the negative
    prompt (in A1111 the first), since a prompt may contain one. Single-line texts are split at the same words.
    ValueError for a text without settings, and for a setting that should be a number but is not.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"the text has {len(text):,} characters; expected at most {_LONGEST:,}")
    lines = text.replace("\r\n", "\n").rstrip().split("\n")
    if len(lines) == 1:
        lines = _broken(lines[0])
    at = max((index for index, line in enumerate(lines) if line.lstrip().startswith("Steps:")), default=None)
    if at is None:
        raise ValueError(f"it has no line such as 'Steps: 20, Sampler: Euler a, Seed: 1'; got {shown(text)}")
    rest = {key.strip(): _unquote(value) for key, value in PAIR.findall(lines[at])}
    if lines[at + 1 :]:
        rest["Template"] = "\n".join(lines[at + 1 :]).removeprefix("Template: ")
    body = lines[:at]
    divide = max((index for index, line in enumerate(body) if line.startswith(NEGATIVE)), default=at)
    negative = "\n".join(body[divide:]).removeprefix(NEGATIVE).removeprefix(" ")
    arguments: dict[str, Value] = {"prompt": "\n".join(body[:divide]), "negative_prompt": negative}
    model: dict[str, Value] = {"model": rest.pop("Model")} if "Model" in rest else {}
    emphases = [ours for ours, theirs in _EMPHASIS.items() if theirs == rest.get("Emphasis")]
    if emphases:
        arguments |= {"syntax": "a1111", "emphasis": str(emphases[0])}
        del rest["Emphasis"]
    arguments |= _take_sampler(rest) | _take_numbers(rest)
    if arguments.get("sampler") in _CFG_PP:
        scale = _scaled(arguments.get("guidance_scale"), 1 / _CFG_PP[str(arguments["sampler"])])
        arguments |= {} if scale is None else {"guidance_scale": scale}
    return arguments | model, rest


def _broken(line: str) -> list[str]:
    """Split a text without line breaks where the negative prompt and the settings begin."""
    body, steps, settings = line.rpartition(" Steps: ")
    if not steps or len(PAIR.findall(settings)) < 2:  # "Steps:" may be part of the prompt
        return [line]
    prompt, negative, after = body.rpartition(f" {NEGATIVE}")
    return [*([prompt, f"{NEGATIVE}{after}"] if negative else [body]), f"Steps: {settings}"]


def _settings(arguments: Mapping[str, object]) -> dict[str, object]:
    get = arguments.get
    sampler, clip_skip, seed, vary = get("sampler"), get("clip_skip"), get("seed"), get("vary")
    varied, share = vary if isinstance(vary, list | tuple) and len(vary) == 2 else (None, None)
    if isinstance(sampler, Mapping):  # an object, as chunk.plain() writes it
        sampler = str(sampler.get("object")).rpartition(".")[2]
    schedule = str(get("schedule") or "uniform")
    return {
        "Steps": get("steps"),
        "Sampler": a1111_sampler(sampler, schedule) if isinstance(sampler, str) and sampler else None,
        "Schedule type": _schedule_type(sampler, schedule),
        "CFG scale": _scaled(get("guidance_scale"), _CFG_PP.get(str(sampler), 1)),
        "Seed": seed,
        "Size": None if get("width") is None or get("height") is None else f"{get('width')}x{get('height')}",
        "Model hash": None,  # its place in the line
        "Model": get("model"),
        "Variation seed": varied,
        "Variation seed strength": share,
        "Clip skip": clip_skip + 1 if isinstance(clip_skip, int) and clip_skip > 0 else None,  # A1111 counts one more
        "Denoising strength": get("strength"),
        "Eta DDIM": (get("eta") or None) if sampler == "ddim" else None,
        "Emphasis": _EMPHASIS.get(get("emphasis") or "a1111") if get("syntax") == "a1111" else None,
        "RNG": None if seed is None else "CPU",  # with this option, A1111 draws the same noise as we do
    }


def _scaled(scale: object, by: float) -> float | None:
    """In the other program's units, without the digits that the division adds."""
    if not isinstance(scale, int | float):
        return None
    return scale if by == 1 else round(scale * by, 6)


def _hashes(adapters: object) -> dict[str, str]:
    """A1111's hashes of the model's adapters, from Result.info: {"TI hashes": "name: hash, name: hash"}."""
    found: dict[str, list[str]] = {}
    for entry in adapters if isinstance(adapters, list) else []:
        if entry["kind"] in _HASHES:
            name = re.sub("[:,]", "", entry["name"])
            found.setdefault(_HASHES[entry["kind"]], []).append(f"{name}: {entry['short_hash']}")
    return {key: ", ".join(hashes) for key, hashes in found.items()}


def _schedule_type(sampler: object, schedule: str) -> str | None:
    """Written where A1111 1.9 and later would not assume it: a sampler's name says Karras, and some imply levels."""
    if schedule == "karras" or (schedule == "uniform" and sampler not in _NOT_UNIFORM):
        return None
    return SCHEDULES.get(schedule)


def take_words(rest: dict[str, str]) -> list[dict[str, str]]:
    """Take A1111's "TI hashes" out of the settings, as Result.info lists adapters."""
    pairs = [pair.partition(":") for pair in rest.pop(_HASHES["word"], "").split(",")]
    return [{"kind": "word", "name": name.strip(), "sha256": digest.strip()} for name, _, digest in pairs if digest]


def _take_sampler(rest: dict[str, str]) -> dict[str, Value]:
    """Read the noise levels from the end of the sampler's name (before A1111 1.9, and ours) or the schedule type.

    An unknown sampler keeps its spelling, so that generate() refuses it by name.
    """
    if "Sampler" not in rest:
        return {}
    label = rest.pop("Sampler")
    schedule = "uniform"
    with suppress(ValueError):
        schedule = read_schedule(rest.get("Schedule type", "Automatic").replace("Automatic", "uniform"))
        rest.pop("Schedule type", None)
    try:
        name, said = read_sampler(label)
    except ValueError:
        return {"sampler": label, "schedule": schedule} if schedule != "uniform" else {"sampler": label}
    return {"sampler": name, "schedule": said or "uniform" if schedule == "uniform" else schedule}


def _take_numbers(rest: dict[str, str]) -> dict[str, Value]:
    if "Size" in rest:
        rest["width"], _, rest["height"] = rest.pop("Size").partition("x")
    known: dict[str, float] = {}
    for key, name, kind, least, most in _NUMBERS:
        if key in rest:
            known[name] = kind(repr(key), _number(rest.pop(key)), least, most)
    clip_skip = int(known.pop("clip_skip", 1)) - 1
    vary: list[Plain] = [known.pop(name) for name in ("vary", "strength of vary") if name in known]
    more: dict[str, Value] = {"vary": vary} if len(vary) == 2 else {}
    return known | more | ({"clip_skip": clip_skip} if clip_skip > 0 else {})  # A1111's 1 is our None


def _number(text: str) -> float | str:
    """The text as a number, if it is one. Some programs write 20 as "20.0"."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(re.sub(r"\.0+$", "", text))
    return text


def _quote(value: object) -> str:
    """Quote a value by A1111's rule (a comma, a colon, a new line), or if it could not be read back otherwise."""
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
