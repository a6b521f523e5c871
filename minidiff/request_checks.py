"""The checks of a Request that need no model. Each normalises its fields, or raises a ValueError that names one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .checks import Check, checked, choice, listed, number, numbers, one_or_more, shown, switch, tensor, whole
from .vocabulary import EMPHASES, OBJECTIVES, PRESETS, SPACINGS, SYNTAXES, read_sampler, read_schedule

if TYPE_CHECKING:
    from .request import Request

FITS = ("resize", "crop", "pad")
OUTPUTS = ("pil", "numpy", "tensor", "latents")
REDUCTIONS = ("mean", "last", "per_step")
MOST_IMAGES = 10_000  # per call: the latents alone take 650 MB at 512x512
MOST_TRIES = 1000
_LAST_SEED = 2**64 - 1  # the largest that torch.Generator takes
_TABLE: Mapping[str, Check] = MappingProxyType(
    {
        "images_per_prompt": partial(whole, least=1),
        "syntax": partial(choice, choices=SYNTAXES),
        "emphasis": partial(choice, choices=EMPHASES),
        "base_weight": partial(number, least=0, most=1e3),
        "regions_apart": partial(number, least=0, most=1),
        "width": partial(whole, least=1),
        "height": partial(whole, least=1),
        "steps": partial(whole, least=1),
        "timesteps": numbers,
        "sigmas": numbers,
        "guidance_rescale": partial(number, least=0, most=1),
        "cache_interval": partial(whole, least=1, most=1000),
        "clip_skip": partial(whole, least=0),
        "tries": partial(whole, least=1, most=MOST_TRIES),
        "spacing": partial(choice, choices=SPACINGS),
        "eta": partial(number, least=0, most=1),
        "strength": partial(number, least=1e-6, most=1, expected="a number above 0, at most 1"),
        "image_prompt_scale": one_or_more,
        "fit": partial(choice, choices=FITS),
        "paste": switch,
        "output": partial(choice, choices=OUTPUTS),
        "progress": switch,
    }
)
"""The fields that are checked each by itself."""


def check(request: Request) -> None:
    """All of them, in the order of the fields. For __post_init__: they set fields of a frozen value."""
    given: dict[str, object] = {}
    for field in fields(request):
        value = getattr(request, field.name)
        if isinstance(value, Mapping) and value.keys() & {"tensor", "object"} and field.name != "inputs":
            raise ValueError(
                f"{field.name} is {shown(value)}, a placeholder for what a file could not hold; pass your own"
            )
        if field.name in _TABLE and (value is not None or field.default is not None):
            given[field.name] = value
    for name, read in checked(given, _TABLE).items():
        _set(request, name, read)
    _texts(request)
    _numbers(request)
    _sampler(request)
    _values(request)


def _set(request: Request, name: str, value: object) -> None:
    object.__setattr__(request, name, value)


def _texts(request: Request) -> None:
    if (request.prompt is None) == (request.context is None):
        raise ValueError(
            f"got {'neither prompt nor' if request.prompt is None else 'both prompt and'} context; expected one of "
            'them, e.g. prompt="a red circle"'
        )
    if request.negative_prompt is not None and request.negative_context is not None:
        raise ValueError("got both negative_prompt and negative_context; expected one of them")
    for name in ("prompt", "negative_prompt"):
        _set(request, name, _read_texts(name, getattr(request, name)))
    if request.context is not None:
        tensor("context", request.context, 3, "[P,L,D], such as model.text.encode gives")
    if request.negative_context is not None:
        tensor("negative_context", request.negative_context, 3, "[P,L,D], such as model.text.encode gives")
    negatives = 1 if request.negative_prompt is None else len(listed(request.negative_prompt))
    prompts = request.prompts
    if negatives not in (1, prompts):
        raise ValueError(
            f"negative_prompt holds {negatives} texts for {prompts} prompts; expected one for all, or one per prompt"
        )
    _regions(request)
    _syntax(request)
    if prompts * request.images_per_prompt > MOST_IMAGES:
        raise ValueError(
            f"images_per_prompt is {request.images_per_prompt} for {prompts} prompts; expected at most "
            f"{MOST_IMAGES} images in one call"
        )


def _regions(request: Request) -> None:
    if request.regions is not None:
        from .guidance.regions import read_regions

        _set(request, "regions", read_regions(request.regions) or None)
    areas = () if request.regions is None else request.areas
    for name in ("base_weight", "regions_apart"):
        if getattr(request, name) and not any(areas):
            raise ValueError(f"{name} is {getattr(request, name):g} but there are no regions; expected both")
    if request.regions_apart and request.negative_context is not None:
        raise ValueError("got both regions_apart and negative_context; expected a negative_prompt, which regions share")


def _syntax(request: Request) -> None:
    if request.syntax == "plain":
        if request.emphasis is not None:
            raise ValueError(f'emphasis is {request.emphasis!r} but the syntax is plain; expected syntax="a1111" too')
        return
    from .prompts.parse import check

    own = [text or "" for some in request.areas for region in some for text in (region.prompt, region.negative)]
    for texts in (request.prompt, request.negative_prompt, own):
        for text in listed(texts or ""):
            check(text)


def _numbers(request: Request) -> None:
    if request.timesteps is not None and request.sigmas is not None:
        raise ValueError("got both timesteps and sigmas; expected one of them")
    for name, values, more in (("timesteps", request.timesteps, 0), ("sigmas", request.sigmas, 1)):
        if values is not None and request.steps not in (None, len(values) - more):
            raise ValueError(
                f"steps is {request.steps} but {name} make {len(values) - more} steps; omit steps, or make them agree"
            )
    if request.guidance_scale is not None:
        _scale(request)
    _interval(request)
    if request.seed is not None:
        _set(request, "seed", _read_seeds("seed", request.seed, request.images))
    if request.vary is not None:
        _vary(request)
    if request.tries > 1 and request.latents is not None:
        raise ValueError("got both tries and latents; expected one of them, since tries chooses the noise of a seed")


def _scale(request: Request) -> None:
    sampler = request.sampler
    name = read_sampler(sampler, request.schedule)[0] if isinstance(sampler, str) else ""
    if name.endswith("_cfg_pp") or getattr(sampler, "cfg_pp", False):
        least, most = 0.0, 1.0
        expected = "a number from 0 to 1, since the sampler is CFG++ (0.6 is usual, about 7.5 with other samplers)"
    else:  # diffusers treats less than 1 as 1; by the formula, less would push the image away from the prompt
        least, most, expected = 1.0, math.inf, "a number of at least 1 (1 turns guidance off, 7.5 is usual)"
    _set(request, "guidance_scale", number("guidance_scale", request.guidance_scale, least, most, expected))


def _vary(request: Request) -> None:
    given: Any = request.vary
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise ValueError(f"vary is {shown(given)}; expected (seed, strength), such as (7, 0.2)")
    if request.latents is not None:
        raise ValueError("got both vary and latents; expected one of them, since vary is about the noise of a seed")
    seeds = _read_seeds("vary's seed", given[0], request.images)
    _set(request, "vary", (seeds, number("vary's strength", given[1], 0, 1)))


def _interval(request: Request) -> None:
    if request.guidance_interval is not None:
        levels = numbers("guidance_interval", request.guidance_interval)
        if len(levels) != 2 or not 0 <= levels[0] < levels[1]:
            raise ValueError(
                f"guidance_interval is {shown(request.guidance_interval)}; expected the lowest and the highest noise "
                "level (sigma) to guide at, such as (0.28, 5.42)"
            )
        _set(request, "guidance_interval", levels)


def _sampler(request: Request) -> None:
    if request.schedule is not None:
        _set(request, "schedule", read_schedule(request.schedule))
    if isinstance(request.sampler, str):
        read_sampler(request.sampler, request.schedule)
    elif request.sampler is not None and (
        isinstance(request.sampler, type) or not hasattr(request.sampler, "schedule")
    ):
        raise ValueError(
            f'sampler is {shown(request.sampler)}; expected a name such as "ddim", or an object such as minidiff.DDIM()'
        )


def _values(request: Request) -> None:
    """Fields that hold types of other modules, each imported only when its field is used."""
    if request.latents is not None:
        tensor("latents", request.latents, 4, "[images,4,h,w] of unit variance")
        if len(request.latents) != request.images:
            raise ValueError(f"latents hold {len(request.latents)} for {request.images} images; expected one per image")
    if request.boxes is not None:
        from .guidance.layout import read_objects

        layouts = request.layouts
        for one in layouts:
            if one is not None:
                read_objects(one)
        _set(request, "boxes", request.boxes if any(layouts) else None)
    if request.relations is not None:
        from .guidance.relations import read_relations

        _set(request, "relations", read_relations(request.relations))
        _set(request, "relations", request.relations if any(request.related) else None)
    if request.tries > 1 and not request.guided:
        raise ValueError(
            f"tries is {request.tries} but nothing is guided; expected boxes or relations, and a guidance other than "
            '"none" and "fast", whose first look chooses the noise'
        )
    _guidance(request)
    _image(request)
    _image_prompt(request)
    if (
        not isinstance(request.edits, tuple)
        or request.edits
        or request.attention is not False
        or request.inputs is not None
    ):
        _attention(request)
    if not callable(request.reduce):
        choice("reduce", request.reduce, REDUCTIONS)
    if not isinstance(request.model, str | Path) and not hasattr(request.model, "unet"):
        raise ValueError(
            f"model is {shown(request.model)}; expected a Model from minidiff.load, a hub id, a folder or a "
            ".safetensors file"
        )


def _guidance(request: Request) -> None:
    if isinstance(request.guidance, bool) and not request.guidance:
        _set(request, "guidance", "none")
    if request.guidance is None or request.guidance == "none":
        return
    if isinstance(request.guidance, str):
        choice("guidance", request.guidance, (*OBJECTIVES, *PRESETS, "none"))
    else:
        from .guidance.guide import Guidance

        Guidance.read(request.guidance)
    if not any(request.layouts) and not any(request.related):
        raise ValueError(
            f"guidance is {shown(request.guidance)} but there are no boxes to follow; expected "
            'boxes={"phrase": (x0, y0, x1, y1)} too; None (null) for a box, if the objective needs no position'
        )


def _image(request: Request) -> None:
    if request.image is None:
        for name in ("mask", "strength"):
            if getattr(request, name) is not None:
                raise ValueError(f"{name} is given without image; expected the picture that it is about, too")
        return
    from .pictures import read_each, read_mask, read_picture

    if request.latents is not None:
        raise ValueError("got both image and latents; expected one of them to start from")
    _set(request, "image", read_each("image", request.image, request.prompts, read_picture))
    if request.mask is not None:
        _set(request, "mask", read_each("mask", request.mask, request.prompts, read_mask))


def _image_prompt(request: Request) -> None:
    if request.image_prompt is not None:
        from .guidance.image_prompt import read_image_prompts

        _set(request, "image_prompt", read_image_prompts(request.image_prompt))
    elif request.image_prompt_scale != 1:
        raise ValueError(
            f"image_prompt_scale is {shown(request.image_prompt_scale)} but there is no image_prompt; expected both"
        )


def _attention(request: Request) -> None:
    from torch import Tensor

    from .networks.attention import Edit, Record

    edits = (request.edits,) if isinstance(request.edits, Edit) else request.edits
    if not isinstance(edits, list | tuple) or not all(isinstance(one, Edit) for one in edits):
        raise ValueError(f"edits is {shown(request.edits)}; expected a minidiff.Edit, or a list of them")
    _set(request, "edits", tuple(edits))
    if not isinstance(request.attention, bool | Record):
        raise ValueError(f"attention is {shown(request.attention)}; expected True, False or a minidiff.Record")
    if isinstance(request.attention, Record) and request.attention.stop:
        raise ValueError("attention has stop=True, which ends the forward pass before it makes a prediction")
    if request.inputs is not None and (
        not isinstance(request.inputs, Mapping)
        or not all(isinstance(name, str) and isinstance(one, Tensor) for name, one in request.inputs.items())
    ):
        raise ValueError(f"inputs is {shown(request.inputs)}; expected a mapping of names to tensors")


def _read_texts(name: str, value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{name} is {shown(value)} ({type(value).__name__}); expected a text or a list of texts")
    if not value:
        raise ValueError(f"{name} is an empty list; expected at least one text")
    return tuple(value)


def _read_seeds(name: str, seed: Any, count: int) -> int | tuple[int, ...]:
    """One seed, or one per image, each as torch.Generator takes them."""
    several = hasattr(seed, "__len__") and not isinstance(seed, str | bytes | Mapping) and getattr(seed, "ndim", 1) == 1
    if several and len(seed) != count:
        raise ValueError(
            f"{name} holds {len(seed)} numbers for {count} images; expected one per image, or one to count up from"
        )
    seeds = tuple(seed) if several else (seed,)
    found = tuple(whole(name, one, expected="a whole number, a list of them, or None to draw one") for one in seeds)
    last = _LAST_SEED if several else _LAST_SEED - count + 1
    for one in found:
        if not 0 <= one <= last:
            hint = "; omit seed (None) to draw one" if one == -1 else ""
            raise ValueError(f"{name} is {shown(one)}; expected 0 to {last}{hint}")
    return found if several else found[0]
