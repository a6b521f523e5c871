"""Fill in a request's defaults from the model and check what needs a model. Nothing is sampled here."""

from __future__ import annotations

import itertools
import os
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import number, warn
from .guidance.guide import Guidance
from .guidance.image_prompt import ImagePrompt
from .guidance.layout import Layout, Region, make_layout, read_regions
from .model import Model
from .networks.attention import picture_name
from .networks.sites import Position, Site
from .networks.text import Phrases
from .prompts.chunks import Marked, encode
from .request import Request, listed
from .sampling import Sampler, choose_sampler, sampler_fields

# A1111's syntax for weights, networks and breaks, which a plain prompt does not have
_MARKS = re.compile(r"\([^()]+:\s*[\d.]+\)|<(?:lora|lyco|hypernet):[^>]*>|\bBREAK\b")


@dataclass(frozen=True, eq=False)
class Texts:
    """The P prompts of a request, or their contexts [P,L,D]; each makes `repeats` adjacent images.

    phrases: finds phrases in the prompts. chunks: with a syntax, of how many each context consists; where the batch
    has longer ones, the rest of the L positions is empty. emphasis: how weights act on them.
    """

    prompts: tuple[str, ...] | None
    negatives: tuple[str, ...]
    context: Tensor | None
    negative_context: Tensor | None
    repeats: int
    phrases: Phrases
    chunks: tuple[int, ...] = ()
    emphasis: str = "a1111"

    @classmethod
    def of(cls, request: Request, model: Model) -> Texts:
        """One text or context per prompt, each with a negative one ("" by default)."""
        width = model.unet.config.cross_attention_dim
        for name, context, count in (
            ("context", request.context, request.prompts),
            ("negative_context", request.negative_context, request.prompts),
        ):
            if context is not None and (len(context) != count or context.shape[2] != width):
                raise ValueError(
                    f"{name} is {list(context.shape)}; expected a tensor [{count}, L, {width}], such as "
                    "model.text.encode gives"
                )
        prompts = None if request.prompt is None else tuple(listed(request.prompt))
        negatives = tuple(listed(request.negative_prompt or ""))
        texts = cls(
            prompts,
            negatives * (request.prompts // len(negatives)),
            request.context,
            request.negative_context,
            request.images_per_prompt,
            Phrases(model.text.tokenizer, model.text.length, added=model.text.added),
        )
        if request.syntax == "a1111":
            return texts._in_chunks(request.emphasis or "a1111")
        marked = next((text for text in (*(prompts or ()), *negatives) if _MARKS.search(text)), None)
        if marked is not None and model.text.words is None:
            warn(
                f"{_MARKS.search(marked)[0]!r} in the prompt is A1111 syntax, which is not interpreted: the model "  # type: ignore[index]
                'reads it as plain text. syntax="a1111" interprets it'
            )
        return texts

    def _in_chunks(self, emphasis: str) -> Texts:
        """The same, read with A1111's syntax. A prompt and its negative one get equally many chunks."""
        size = self.phrases.length
        marked = Marked(self.phrases.tokenizer, size, size, added=self.phrases.added)
        counts = [[len(marked.read(text).starts) for text in texts or ()] for texts in (self.prompts, self.negatives)]
        given = [[context.shape[1] // size] * len(context) for context in (self.context,) if context is not None]
        chunks = tuple(map(max, zip(*(some for some in counts + given if some), strict=True)))
        return replace(self, phrases=replace(marked, length=max(chunks) * size), chunks=chunks, emphasis=emphasis)

    @property
    def images(self) -> int:
        """B, the number of images."""
        return len(self.negatives) * self.repeats

    @property
    def any_negative(self) -> bool:
        """True where the caller gave any negative prompt or context."""
        return self.negative_context is not None or any(self.negatives)

    @torch.no_grad()
    def encode(self, model: Model, clip_skip: int | None, negative: bool) -> Tensor:
        """[B,L,D], or [uncond, cond] [2B,L,D] with `negative`. Repeated texts are encoded once."""
        cond = self._encoded(model, self.prompts, self.context, clip_skip)
        if not negative:
            return cond
        uncond = self._encoded(model, self.negatives, self.negative_context, clip_skip)
        if uncond.shape[1] != cond.shape[1]:
            raise ValueError(
                f"context holds {cond.shape[1]} tokens and the negative one {uncond.shape[1]}; expected equal lengths. "
                "Pass both context and negative_context"
            )
        return torch.cat([uncond, cond])

    def _encoded(
        self, model: Model, texts: tuple[str, ...] | None, context: Tensor | None, clip_skip: int | None
    ) -> Tensor:
        if context is None:
            assert texts is not None  # a request has one of the two
            keys = list(zip(texts, self.chunks or [1] * len(texts), strict=True))
            unique = list(dict.fromkeys(keys))
            alone, counts = [text for text, _ in unique], [count for _, count in unique]
            if isinstance(self.phrases, Marked):
                read = [self.phrases.read(text) for text in alone]
                found = encode(model.text, read, counts, self.emphasis, clip_skip)
                encoded = torch.stack([F.pad(one, (0, 0, 0, self.phrases.length - len(one))) for one in found])
            else:
                encoded = model.text.encode(alone, clip_skip)
            context = encoded[[unique.index(key) for key in keys]]
        return context.to(model.device, model.dtype).repeat_interleave(self.repeats, dim=0)

    @property
    def unread(self) -> Tensor | None:
        """A bias for logits [B,1,1,1,L] that hides the positions an image has no chunk for; None where all are read.

        Hidden tokens get 1e-26 of the attention, not 0: an objective may divide by all that a token gets.
        """
        if len(set(self.chunks)) < 2:
            return None
        chunks = torch.tensor(self.chunks).repeat_interleave(self.repeats)
        size = self.phrases.length // max(self.chunks)
        unread = torch.arange(self.phrases.length) >= chunks[:, None] * size
        return torch.zeros(unread.shape).masked_fill(unread, -60.0)[:, None, None, None]

    def regions(self, request: Request, model: Model) -> tuple[tuple[Region, ...], ...]:
        """Each image's regions, with the tokens of their phrases."""
        found = []
        for i, boxes in enumerate(request.layouts):
            prompt = None if self.prompts is None else self.prompts[i]
            length = self.phrases.length if self.context is None else self.context.shape[1]

            def find(phrase: str, prompt: str | None = prompt) -> tuple[int, ...]:
                if prompt is None:
                    raise ValueError(f"boxes has the key {phrase!r} but there is no prompt; expected token positions")
                return self.phrases.all_spans(prompt, phrase)

            found.append(() if boxes is None else read_regions(boxes, find, length))
        return tuple(own for own in found for _ in range(self.repeats))

    def layout(
        self, model: Model, regions: Sequence[Sequence[Region]], length: int, there: Mapping[Site, Position]
    ) -> Layout:
        """The regions of a batch on every grid of the UNet. length: L of the contexts."""
        if self.prompts is None:
            tokens = [length - 1] * self.images  # all but the start marker: the prompt's length is unknown
        else:
            tokens = [self.phrases.num_tokens(prompt) for prompt in self.prompts for _ in range(self.repeats)]
        layout = make_layout(regions, tokens, length, {at.grid for at in there.values()}, model.device)
        if self.prompts is None or not self.chunks:
            return layout
        words = torch.zeros_like(layout.words)
        for i, prompt in enumerate(self.prompts):
            words[i * self.repeats : (i + 1) * self.repeats, list(self.phrases.read(prompt).places)] = 1
        return layout._replace(words=words)


def resolve(request: Request, model: Model) -> tuple[Request, Sampler, Guidance | None]:
    """The request with its defaults filled in, its sampler, and its guidance.

    ValueError for what does not fit this model.
    """
    if model.unet.config.inpaints and request.mask is None:
        raise ValueError(f"{model.name} is an inpainting model, which paints inside a mask; expected image= and mask=")
    defaults = model.defaults
    sampler = choose_sampler(
        model.noise, defaults.sampler, request.sampler, request.schedule, request.spacing, request.eta
    )
    custom = request.timesteps is not None or request.sigmas is not None
    width, height = _size(request, model)
    _check_memory(model, width, height, request.images)
    guidance = defaults.guidance if request.guidance is None else request.guidance
    how = None if isinstance(guidance, str) and guidance == "none" else Guidance.read(guidance)
    values = {
        "model": model,
        "width": width,
        "height": height,
        "steps": None if custom else defaults.steps if request.steps is None else request.steps,
        "guidance_scale": defaults.guidance_scale if request.guidance_scale is None else request.guidance_scale,
        "seed": _seeds(request),
        **({} if request.image is None else {"strength": _strength(request)}),
        **sampler_fields(sampler),
    }
    return request.filled(values), sampler, how


def _strength(request: Request) -> float:
    """As given, or the pipelines' defaults."""
    if request.strength is not None:
        return request.strength
    return 0.8 if request.mask is None else 1.0


def _seeds(request: Request) -> tuple[int, ...]:
    """One per image: as given, counted up from the first, or drawn."""
    if isinstance(request.seed, tuple):
        return request.seed
    assert not isinstance(request.seed, Sequence)  # Request makes it a tuple
    first = random.SystemRandom().randrange(2**32) if request.seed is None else request.seed
    return tuple(range(first, first + request.images))


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
    step = 2 * images * cells * model.unet.config.block_out_channels[0] * model.dtype.itemsize
    need = max(step, width * height * model.vae.config.block_out_channels[0] * model.dtype.itemsize)
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
    config = model.vae.config
    return config.latent_channels, request.height // config.factor, request.width // config.factor


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


def check_places(how: Guidance, regions: Sequence[Sequence[Region]]) -> None:
    """ValueError if guidance needs boxes and a phrase has none."""
    for region in (region for some in regions for region in some):
        if how.objective.needs_boxes and region.mask is None and not region.boxes:
            raise ValueError(
                f"boxes[{region.name!r}] has no box or mask, which guidance needs; give one, or use an objective that "
                'needs none, such as guidance="attend_and_excite"'
            )
