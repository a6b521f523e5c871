"""What generate() was asked, checked: each function takes what the caller gave, returns it in one form or raises."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .guidance.guide import Guidance
from .guidance.layout import Boxes, Region, read_regions
from .guidance.objectives import Objective
from .model import Model

_MAX_SEED = 2**63 - 1  # what torch.Generator and a JSON reader with signed integers both hold


@dataclass(frozen=True, eq=False)
class Texts:
    """The P prompts of a call, or their contexts [P,L,D]; each makes `repeats` images, which follow each other."""

    prompts: tuple[str, ...] | None
    negatives: tuple[str, ...]
    context: Tensor | None
    negative_context: Tensor | None
    repeats: int

    @property
    def images(self) -> int:
        """B, the number of images."""
        return len(self.negatives) * self.repeats

    @property
    def any_negative(self) -> bool:
        """Whether the caller asked to keep something out of an image."""
        return self.negative_context is not None or any(self.negatives)

    @torch.no_grad()
    def encode(self, model: Model, clip_skip: int | None, negative: bool) -> Tensor:
        """[B,L,D], or [uncond, cond] [2B,L,D] with `negative`. A text that stands several times is encoded once."""
        cond = self._encoded(model, self.prompts, self.context, clip_skip)
        if not negative:
            return cond
        uncond = self._encoded(model, self.negatives, self.negative_context, clip_skip)
        if uncond.shape[1] != cond.shape[1]:
            raise ValueError(
                f"context holds {cond.shape[1]} tokens and the negative one {uncond.shape[1]}; expected as many. "
                "Pass both context and negative_context"
            )
        return torch.cat([uncond, cond])

    def _encoded(
        self, model: Model, texts: tuple[str, ...] | None, context: Tensor | None, clip_skip: int | None
    ) -> Tensor:
        if context is None:
            assert texts is not None  # check_texts: either is there
            unique = list(dict.fromkeys(texts))
            context = model.text.encode(unique, clip_skip)[[unique.index(text) for text in texts]]
        return context.to(model.device, model.dtype).repeat_interleave(self.repeats, dim=0)

    def arguments(self, i: int) -> dict[str, object]:
        """What made the text of image i."""
        p = i // self.repeats
        return {
            "prompt": None if self.prompts is None else self.prompts[p],
            "negative_prompt": None if self.negative_context is not None else self.negatives[p],
            "context": None if self.context is None else self.context[p : p + 1],
            "negative_context": None if self.negative_context is None else self.negative_context[p : p + 1],
        }


def check_texts(
    prompt: str | Sequence[str] | None,
    negative: str | Sequence[str] | None,
    context: Tensor | None,
    negative_context: Tensor | None,
    model: Model,
    repeats: int,
) -> Texts:
    """One text or context per prompt, and a negative one for each ("" where none is given)."""
    if (prompt is None) == (context is None):
        raise ValueError(
            f"got {'neither prompt nor' if prompt is None else 'both prompt and'} context; expected one of them"
        )
    if negative is not None and negative_context is not None:
        raise ValueError("got both negative_prompt and negative_context; expected one of them")
    check_positive("images_per_prompt", repeats)
    prompts = None if prompt is None else _texts("prompt", prompt)
    count = len(prompts or ()) if context is None else len(_check_context("context", context, model, None))
    if negative_context is not None:
        _check_context("negative_context", negative_context, model, count)
    negatives = ("",) if negative is None else _texts("negative_prompt", negative)
    if len(negatives) not in (1, count):
        raise ValueError(
            f"negative_prompt holds {len(negatives)} texts for {count} prompts; expected one for all, or one for each"
        )
    return Texts(prompts, negatives * (count // len(negatives)), context, negative_context, repeats)


def _texts(name: str, value: str | Sequence[str]) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} is {value!r} ({type(value).__name__}); expected a text or a list of texts")
    if not texts:
        raise ValueError(f"{name} is an empty list; expected at least one text")
    return tuple(texts)


def _check_context(name: str, context: Tensor, model: Model, count: int | None) -> Tensor:
    width = model.unet.config.cross_attention_dim
    shape = f"[{'P' if count is None else count}, L, {width}]"
    if (
        not isinstance(context, Tensor)
        or context.ndim != 3
        or 0 in context.shape
        or context.shape[2] != width
        or len(context) != (count or len(context))
    ):
        got = list(context.shape) if isinstance(context, Tensor) else type(context).__name__
        raise ValueError(f"{name} is {got}; expected a tensor {shape}, such as model.text.encode gives")
    if not context.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite; expected the output of a text encoder")
    return context


def check_boxes(
    boxes: Boxes | Sequence[Boxes | None] | None, texts: Texts, model: Model
) -> tuple[tuple[Region, ...], ...]:
    """Each image's regions: of one mapping for all prompts, or of a list with one (or None) for each."""
    count = texts.images // texts.repeats
    given = boxes if isinstance(boxes, list | tuple) else [boxes] * count
    if len(given) != count:
        raise ValueError(f"boxes holds {len(given)} layouts for {count} prompts; expected one for all, or one for each")
    regions = []
    for i, one in enumerate(given):
        prompt = None if texts.prompts is None else texts.prompts[i]
        length = model.text.length if texts.context is None else texts.context.shape[1]

        def find(phrase: str, prompt: str | None = prompt) -> tuple[int, ...]:
            if prompt is None:
                raise ValueError(f"boxes has the key {phrase!r} but there is no prompt; expected token positions")
            return model.text.all_spans(prompt, phrase)

        regions.append(() if one is None else read_regions(one, find, length))
    return tuple(own for own in regions for _ in range(texts.repeats))


def check_guidance(guidance: Guidance | Objective | str | Mapping[str, object]) -> Guidance | None:
    """None for "none"."""
    return None if isinstance(guidance, str) and guidance == "none" else Guidance.read(guidance)


def plain_boxes(regions: Sequence[Region]) -> dict[str, object]:
    """Regions as generate() takes them."""
    return {
        region.name: {"weight": region.weight}
        | ({"boxes": region.boxes} if region.mask is None else {"mask": region.mask})
        for region in regions
    }


def check_size(model: Model, width: int | None, height: int | None, latents: Tensor | None) -> tuple[int, int]:
    """(width, height) in pixels. Given latents decide; otherwise the size that the UNet was trained on."""
    factor = model.vae.config.factor
    if isinstance(latents, Tensor) and latents.ndim == 4:
        default_width, default_height = latents.shape[3] * factor, latents.shape[2] * factor
    else:
        default_width = default_height = model.unet.config.sample_size * factor
    for name, size in (("width", width), ("height", height)):
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < factor or size % factor):
            near = max(factor, round(size / factor) * factor) if isinstance(size, int | float) else default_width
            raise ValueError(f"{name} is {size!r}; expected a positive multiple of {factor} pixels, such as {near}")
    return width or default_width, height or default_height


def latent_shape(model: Model, width: int, height: int) -> tuple[int, int, int]:
    """Channels, rows and columns of the latents of an image."""
    config = model.vae.config
    return config.latent_channels, height // config.factor, width // config.factor


def check_latents(latents: Tensor, count: int, shape: tuple[int, int, int]) -> Tensor:
    """Given latents [count, *shape] of unit variance, in float32 on the CPU."""
    if not isinstance(latents, Tensor) or tuple(latents.shape) != (count, *shape):
        got = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(
            f"latents are {got}; expected a tensor {[count, *shape]}: one per image, at the size of the image"
        )
    if not latents.isfinite().all():
        raise ValueError("latents hold values that are not finite (NaN or infinity); expected noise of unit variance")
    return latents.float().cpu()


def check_seeds(seed: int | Sequence[int] | None, count: int) -> tuple[int, ...]:
    """One seed per image: counted on from the first, as given, or drawn."""
    if seed is None:
        first = random.SystemRandom().randrange(2**32)
        return tuple(range(first, first + count))
    seeds = list(range(seed, seed + count)) if isinstance(seed, int) and not isinstance(seed, bool) else seed
    if not isinstance(seeds, list | tuple) or not all(isinstance(s, int) and not isinstance(s, bool) for s in seeds):
        raise ValueError(f"seed is {seed!r}; expected a whole number, a list of them or None")
    if len(seeds) != count:
        raise ValueError(
            f"seed holds {len(seeds)} numbers for {count} images; expected one for each, or one to count on from"
        )
    wrong = [s for s in seeds if not 0 <= s <= _MAX_SEED]
    if wrong:
        raise ValueError(f"seed {wrong[0]} is out of range; expected 0 to {_MAX_SEED}")
    return tuple(seeds)


def check_scale(scale: float) -> float:
    """guidance_scale, at least 1.

    diffusers takes less for 1; read as a formula, less would push the image away from the prompt.
    """
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 1 <= scale < float("inf"):
        raise ValueError(
            f"guidance_scale is {scale!r}; expected a number of at least 1 (1 turns guidance off, 7.5 is usual)"
        )
    return float(scale)


def check_fraction(name: str, value: float) -> None:
    """In [0,1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} is {value!r}; expected a number from 0 to 1")


def check_positive(name: str, value: int) -> None:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least 1")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """One of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
