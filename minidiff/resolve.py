"""Fill in a request's defaults from the model and check what needs a model. Nothing is sampled here."""

from __future__ import annotations

import itertools
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .checks import number, shown, warn
from .guidance.edits import reads_boxes
from .guidance.guide import Guidance
from .guidance.image_prompt import ImagePrompt
from .guidance.layout import PlacedObject, read_objects
from .guidance.objectives import OBJECTIVES
from .guidance.presets import preset
from .guidance.relations import planned
from .model import Model
from .networks.attention import Edit
from .networks.sites import Position, Site, picture_name
from .request import Request
from .sampling import Sampler, choose_sampler, sampler_fields
from .vocabulary import PRESETS

CFG_PP_SCALE = 0.6
"""The default of CFG++, which Chung et al. 2024 compare with a plain scale of 7.5."""


def resolve(request: Request, model: Model) -> tuple[Request, Sampler, Guidance | None]:
    """The request with its defaults filled in, its sampler, and its guidance.

    ValueError for what does not fit this model.
    """
    if model.unet.config.inpaints and request.mask is None:
        raise ValueError(f"{model.name} is an inpainting model, which paints inside a mask; expected image= and mask=")
    request, defaults = request.filled(_preset(request, model)), model.defaults
    guidance, request = _guidance(request, model)
    sampler = choose_sampler(
        model.noise, defaults.sampler, request.sampler, request.schedule, request.spacing, request.eta
    )
    custom = request.timesteps is not None or request.sigmas is not None
    width, height = _size(request, model)
    _check_memory(model, width, height, request.images)
    scale = CFG_PP_SCALE if sampler.cfg_pp else defaults.guidance_scale
    values = {
        "model": model,
        "width": width,
        "height": height,
        "steps": None if custom else defaults.steps if request.steps is None else request.steps,
        "guidance_scale": scale if request.guidance_scale is None else request.guidance_scale,
        **counted_seeds(request),
        **({} if request.image is None else {"strength": _strength(request)}),
        **({} if not any(request.areas) else {"regions_apart": _apart(request, model)}),
        **sampler_fields(sampler),
    }
    return request.filled(values), sampler, guidance


def _preset(request: Request, model: Model) -> Mapping[str, object]:
    """The fields that a preset stands for, beside own ones; "fast" follows no relations: there it is "balanced"."""
    if not isinstance(request.guidance, str) or request.guidance not in PRESETS:
        return {}
    related = set(map(bool, request.related))
    if request.guidance == "fast" and len(related) > 1:
        raise ValueError(
            'guidance is "fast", which is "balanced" where relations are, but some prompts only have any; expected '
            'relations for all prompts or for none, or guidance="balanced"'
        )
    own = preset("balanced" if True in related and request.guidance == "fast" else request.guidance, model.name)
    places = (one for boxes in request.layouts for one in read_objects(boxes or {}))
    if own.edits and not any(one.boxes or one.mask is not None for one in places):
        raise ValueError(
            f'guidance is "{request.guidance}", but no phrase of boxes has a box or mask, which it needs; give one, or '
            'use an objective that needs none, such as guidance="attend_and_excite"'
        )
    assert isinstance(request.edits, tuple)
    apart = _apart(request, model) if any(request.areas) else 0.0
    return {"guidance": own.guidance, "edits": (*request.edits, *(_after(edit, apart) for edit in own.edits))}


def _after(edit: Edit, apart: float) -> Edit:
    """A preset's edit, for as many steps behind the part of them that has its regions apart, which no edit reaches."""
    assert isinstance(edit.steps, float)
    last = apart + edit.steps
    return replace(edit, steps=last if last < 1 else None) if apart else edit


def _takes_from_first(edits: Sequence[Edit]) -> bool:
    from .guidance.pairs import takes_from_first  # here, since most runs have no edits

    return any(map(takes_from_first, edits))


def as_asked(given: Request, request: Request) -> dict[str, object]:
    """A preset that stands for edits: the file of a picture has its name, since it cannot have those."""
    assert isinstance(given.edits, tuple) and isinstance(request.edits, tuple)
    return {} if len(given.edits) == len(request.edits) else {"guidance": given.guidance, "edits": given.edits}


def _guidance(request: Request, model: Model) -> tuple[Guidance | None, Request]:
    """As given or the model's, and the request. Relations add their objective; a prompt that has them but no boxes
    gets some if guidance or one of minidiff's edits reads any.

    For images without relations the objective is 0, and they stay as alone; the mass in their reports is also of its
    sites, which all published objectives on cross-attention read, too.
    """
    guidance = model.defaults.guidance if request.guidance is None else request.guidance
    how = None if isinstance(guidance, str) and guidance == "none" else Guidance.read(guidance)
    if not any(request.related):
        return how, request
    assert isinstance(request.edits, tuple)
    if any(map(reads_boxes, request.edits)) or (how is not None and how.objective.needs_boxes):
        pairs = zip(request.layouts, request.related, strict=True)
        request = request.filled({"boxes": tuple(boxes or planned(own) or None for boxes, own in pairs)})
    if how is None:
        return how, request
    relation = OBJECTIVES["relation"]
    has = relation.terms[0].name in {term.name for term in how.objective.terms}
    return (how if has else replace(how, objective=how.objective + relation)), request


def _apart(request: Request, model: Model) -> float:
    """As given, or the model's, which needs texts."""
    if request.regions_apart is not None:
        return request.regions_apart
    return 0.0 if request.negative_context is not None else model.defaults.regions_apart


def _strength(request: Request) -> float:
    """As given, or the pipelines' defaults."""
    if request.strength is not None:
        return request.strength
    return 0.8 if request.mask is None else 1.0


def counted_seeds(request: Request) -> dict[str, object]:
    """seed and vary with one seed per image: as given, counted up from the first, or drawn. Variations are of one
    seed.
    """
    seed = random.SystemRandom().randrange(2**32) if request.seed is None else request.seed
    return {
        "seed": _counted(seed, request.images, by=1 if request.vary is None else 0),
        "vary": None if request.vary is None else (_counted(request.vary[0], request.images), request.vary[1]),
    }


def _counted(seed: int | Sequence[int], images: int, by: int = 1) -> tuple[int, ...]:
    """One per image: as given, or counted up from the first."""
    return tuple(seed + by * i for i in range(images)) if isinstance(seed, int) else tuple(seed)


def _size(request: Request, model: Model) -> tuple[int, int]:
    """(width, height) in pixels; default: that of the latents or (rounded down) the picture given, else the UNet's
    training size.
    """
    factor = model.vae.config.factor
    width = height = model.unet.config.sample_size * factor
    if request.latents is not None:
        width, height = request.latents.shape[3] * factor, request.latents.shape[2] * factor
    if isinstance(request.image, tuple):
        width, height = (max(factor, edge // factor * factor) for edge in request.image[0].size)
    for name, size in (("width", request.width), ("height", request.height)):
        if size is not None and size % factor:
            near = max(factor, round(size / factor) * factor)
            raise ValueError(f"{name} is {size}; expected a positive multiple of {factor} pixels, such as {near}")
    return request.width or width, request.height or height


def _check_memory(model: Model, width: int, height: int, images: int) -> None:
    """ValueError if even the largest single tensor of a step or of decoding does not fit."""
    cells = width * height // model.vae.config.factor**2
    step = 2 * images * cells * model.unet.config.block_out_channels[0]
    need = max(step, width * height * model.vae.config.block_out_channels[0]) * model.dtype.itemsize
    if model.device.type == "cuda":
        there = torch.cuda.mem_get_info(model.device)[1]
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if need > there:
        raise ValueError(
            f"{images} images of {width}x{height} pixels would take at least {need / 2**30:,.0f} GiB, and "
            f"{model.device.type} has {there / 2**30:,.0f} GiB; expected a smaller width and height, or fewer images"
        )


def latent_shape(request: Request, model: Model) -> tuple[int, int, int]:
    """[C,h,w] of an image's latents, for a request with its size."""
    assert request.width is not None and request.height is not None
    channels, factor = model.vae.config.latent_channels, model.vae.config.factor
    return channels, request.height // factor, request.width // factor


def check_latents(request: Request, model: Model) -> Tensor:
    """The latents given, in float32 on the CPU. ValueError unless there is one per image, at its size."""
    assert request.latents is not None
    shape = latent_shape(request, model)
    if tuple(request.latents.shape) != (request.images, *shape):
        raise ValueError(
            f"latents are {list(request.latents.shape)}; expected a tensor {[request.images, *shape]}: one per image, "
            "at the size of the image"
        )
    return request.latents.detach().float().cpu()


@torch.no_grad()
def image_inputs(request: Request, model: Model, there: Mapping[Site, Position], negative: bool) -> dict[str, Tensor]:
    """What a UNet's forward reads of the image prompts: tokens [B,T,D], or [uncond, cond] with `negative`, and how much
    they count in the cells of each grid, [1,h,w]. Without pictures, and at scale 0, nothing."""
    groups: dict[tuple[int, float, int | None], list[ImagePrompt]] = {}
    for i, (adapter, scale, prompt) in enumerate(_image_prompts(request, model)):
        if scale != 0:
            groups.setdefault((adapter, scale, None if prompt.box is None else i), []).append(prompt)
    found: dict[str, Tensor] = {}
    counts: Counter[int] = Counter()
    for (adapter, scale, _), prompts in groups.items():
        cond, uncond = model.image_adapters[adapter].tokens([prompt.picture for prompt in prompts])
        halves = [uncond.expand_as(cond), cond] if negative else [cond]  # [n,T,D]
        tokens = torch.cat([half.flatten(0, 1).expand(request.images, -1, -1) for half in halves])
        own = counts[adapter]
        counts[adapter] += 1
        found[picture_name(adapter, own)] = tokens
        for grid in {at.grid for at in there.values()}:
            share = scale * prompts[0].share(grid)
            found[picture_name(adapter, own, grid)] = share[None].to(model.device, model.dtype)
    return found


def _image_prompts(request: Request, model: Model) -> list[tuple[int, float, ImagePrompt]]:
    """The image prompts, each with its adapter and its whole scale. ValueError where the model has not so many."""
    prompts = request.image_prompt
    if prompts is None:
        return []
    assert isinstance(prompts, tuple)  # normalised by Request
    there = len(model.image_adapters)
    if not there:
        raise ValueError(
            "image_prompt is given but the model has no IP-Adapter; expected one from "
            "minidiff.with_image_prompt(model, file, image_encoder)"
        )
    given = request.image_prompt_scale
    scales = given if isinstance(given, tuple) else (number("image_prompt_scale", given),) * there
    if len(scales) != there:
        raise ValueError(f"image_prompt_scale holds {len(scales)} numbers for {there} adapters; expected one for each")
    unnamed = [prompt for prompt in prompts if prompt.adapter is None]
    if there > 1 and unnamed and len(unnamed) != there:
        raise ValueError(
            f"image_prompt holds {len(unnamed)} pictures for {there} adapters; expected one for each, in their order, "
            "or ImagePrompt(picture, adapter=0) to say which reads it"
        )
    found, order = [], itertools.count() if there > 1 else itertools.repeat(0)
    for prompt in prompts:
        adapter = next(order) if prompt.adapter is None else prompt.adapter
        if adapter >= there:
            raise ValueError(f"image_prompt names adapter {adapter}; the model has {there}, counted from 0")
        found.append((adapter, prompt.scale * scales[adapter], prompt))
    return found


def warn_unused(given: Request, request: Request, steps: int, apart: int) -> None:
    """Warn of edits that act in none of the run's steps, and of relations and inputs that nothing reads.

    given: the request before it was resolved. apart: in so many first steps regions are pictures of their own, which no
    edit reaches.
    """
    assert isinstance(given.edits, tuple) and isinstance(request.edits, tuple)  # normalised by Request
    for i, edit in enumerate(request.edits):
        own = (
            steps if edit.steps is None else round(edit.steps * steps) if isinstance(edit.steps, float) else edit.steps
        )
        first, last = own if isinstance(own, tuple) else (0, own)
        none = isinstance(edit.steps, float) and last == 0
        if none or steps <= first < last or first < last <= apart:
            there = f"the run's are 0 to {steps - 1}"
            there += f", of which 0 to {apart - 1} have their regions apart (regions_apart)" if apart else ""
            name = f"edits[{i}]" if i < len(given.edits) else f'guidance="{given.guidance}"'
            when = f"{edit.steps} of the run's, which rounds to none" if none else f"{first} to {last - 1}"
            warn(f"{name} has no effect: its steps are {when}, and {there}")
    if any(request.related) and given.guidance == "none" and request.layouts == given.layouts:  # none were planned
        warn('relations have no effect with guidance="none"; expected another, such as guidance="relation"')
    if request.edits and _takes_from_first(request.edits):
        what = "prompt_to_prompt and masactrl take from a call's first picture"
        if request.images == 1:
            warn(f"{what}, and there is one only: they change nothing; expected two prompts or more")
        elif request.latents is None and isinstance(request.seed, tuple) and len(set(request.seed)) > 1:
            warn(f"{what}, which begins with other noise: seeds {shown(request.seed)}; expected equal ones")
    own = request.edits or request.attention not in (True, False) or request.guidance not in (None, "none")
    if request.inputs and not own:
        names = ", ".join(map(repr, request.inputs))
        warn(f"inputs hold {names}, which nothing reads; expected an edit, a Record or an objective that does")


_BETWEEN = ("conform_loss", "self_cross_loss")
"""Objectives that one phrase gives nothing to do."""


def check_places(how: Guidance, regions: Sequence[Sequence[PlacedObject]], related: Sequence[object]) -> None:
    """ValueError if guidance needs boxes and a phrase has none; a warning if it has nothing to do."""
    for region in (region for some in regions for region in some):
        if how.objective.needs_boxes and region.mask is None and not region.boxes:
            raise ValueError(
                f"boxes[{region.name!r}] has no box or mask, which guidance needs; give one, or use an objective that "
                'needs none, such as guidance="attend_and_excite"'
            )
    for name in sorted({term.name for term in how.objective.terms}):
        if name in _BETWEEN and all(len(some) < 2 for some in regions):
            warn(f"{name} acts between phrases, and boxes hold one only: it changes nothing; expected two or more")
        if name == "relation_loss" and not any(related):
            warn('relation_loss has no relations, so it changes nothing; expected relations=["cat left of ball"]')
