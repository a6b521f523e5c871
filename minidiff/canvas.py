"""The picture that a run starts from: as latents with noise, and what of it stays where a mask says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .model import Model
from .networks.unet import MASKED
from .networks.vae import sampled
from .noise import Noise
from .pictures import fitted, opaque, transparency
from .request import Request
from .resolve import check_latents
from .sampling import Hold, Sampler, Schedule


@dataclass(frozen=True, eq=False)
class Canvas:
    """pixels [B,3,H,W] in [0,1]; mask [B,1,H,W], 1 where to paint and 0 where the picture stays; None: everywhere."""

    pixels: Tensor
    mask: Tensor | None

    def fields(self) -> dict[str, object]:
        """The fields of a request, with one prompt for each image, for these masks: they fit already."""
        masks = () if self.mask is None else self.mask[:, 0]
        return {"mask": tuple(Image.fromarray(one.mul(255).byte().numpy()) for one in masks) or None, "fit": "resize"}

    def pasted(self, images: Tensor) -> Tensor:
        """Finished images with the picture's own pixels outside the mask."""
        return images if self.mask is None else torch.where(self.mask > 0, images, self.pixels)


@dataclass(frozen=True, eq=False)
class Beginning:
    """latents [B,4,h,w] for `sample` with this schedule. hold: what keeps the picture outside a mask. inputs: what an
    inpainting UNet reads besides. canvas: the picture; None without one.
    """

    latents: Tensor
    schedule: Schedule
    hold: Hold | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    canvas: Canvas | None = None


Moments: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images [1,3,H,W] in [-1,1] -> mean and log variance of their latents, as VAE.moments."""


def each_once(model: Model) -> Moments:
    """The autoencoder's moments, which are computed once for equal images: those of a prompt, and those of several
    start noises.
    """
    seen: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []

    @torch.no_grad()
    def moments(image: Tensor) -> tuple[Tensor, Tensor]:
        for known, found in seen:
            if torch.equal(known, image):
                return found
        seen.append((image.clone(), model.vae.moments(image.to(model.device, model.dtype))))
        return seen[-1][1]

    return moments


def begin(
    request: Request, model: Model, sampler: Sampler, schedule: Schedule, noise: Noise, moments: Moments
) -> Beginning:
    """What a resolved request starts from. `noise` draws one unit tensor [B,4,h,w], in diffusers' order: for the
    picture's latents, the start, the masked picture's latents.

    Equal to StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline; at strength 1 a mask starts from noise
    alone, as text to image.
    """
    canvas = _canvas(request)
    if canvas is None:
        return Beginning(noise.start() if request.latents is None else check_latents(request, model), schedule)
    assert request.strength is not None  # resolved
    inpaints, pure = model.unet.config.inpaints, canvas.mask is not None and request.strength == 1
    clean = None if inpaints and pure else _encoded(model, moments, canvas.pixels, noise())
    start = noise.start().to(model.device)
    if not pure:
        if int(schedule.steps * request.strength) < 1:
            raise ValueError(
                f"strength is {request.strength:g}, which leaves none of {schedule.steps} steps; expected at least "
                f"{1 / schedule.steps:g}, or more steps"
            )
        schedule = sampler.rest(model.noise, schedule, schedule.steps - int(schedule.steps * request.strength))
    latents = start
    if clean is not None and not pure:
        latents = _noised(clean, start, float(schedule.sigmas[0]))
        latents = latents * math.sqrt(1 + float(schedule.sigmas[0]) ** 2) if schedule.space == "ve" else latents
    if canvas.mask is None:
        return Beginning(latents, schedule, canvas=canvas)
    hidden = noise()  # drawn by diffusers for any UNet, which shows in the noise of later steps
    cells = F.interpolate(canvas.mask, size=latents.shape[2:]).to(model.device)  # nearest, as in diffusers
    if not inpaints:
        assert clean is not None
        return Beginning(latents, schedule, _holding(clean, start, cells), canvas=canvas)
    seen = _encoded(model, moments, canvas.pixels, hidden, canvas.mask)
    return Beginning(latents, schedule, inputs={MASKED: torch.cat([cells, seen], dim=1)}, canvas=canvas)


def picture_latents(request: Request, model: Model) -> Tensor:
    """The pictures of a resolved request as latents [B,4,h,w], without noise: the means that the autoencoder gives."""
    canvas = _canvas(request)
    assert canvas is not None
    channels, factor = model.vae.config.latent_channels, model.vae.config.factor
    height, width = (edge // factor for edge in canvas.pixels.shape[2:])
    nothing = torch.zeros(len(canvas.pixels), channels, height, width, device="cpu")
    return _encoded(model, each_once(model), canvas.pixels, nothing)


def _canvas(request: Request) -> Canvas | None:
    """The pictures of a request, one per image, at its size."""
    if request.image is None:
        return None
    assert isinstance(request.image, tuple) and request.width is not None and request.height is not None  # resolved
    size = request.width, request.height
    pixels = [_tensor(fitted(opaque(image), *size, request.fit)) for image in request.image]
    masks: list[Tensor] = []
    for i, mask in enumerate(request.mask if isinstance(request.mask, tuple) else ()):
        of = request.image[i % len(request.image)]
        grey = transparency(of) if isinstance(mask, str) else mask  # ALPHA
        if request.fit != "resize" and grey.size != of.size:
            raise ValueError(
                f"mask is {grey.width}x{grey.height} pixels, image {of.width}x{of.height}; expected the same size with "
                f"fit={request.fit!r}"
            )
        masks.append((_tensor(fitted(grey, *size, request.fit, fill=255)) >= 0.5).float())
        if not masks[-1].any():
            raise ValueError("mask has nothing to paint; expected white (1) where to paint and black (0) elsewhere")
    every = [_spread(some, request) for some in (pixels, masks) if some]
    return Canvas(every[0], every[1] if masks else None)


def _spread(found: list[Tensor], request: Request) -> Tensor:
    """[B,C,H,W] of one for all prompts or one per prompt."""
    each = found * request.prompts if len(found) == 1 else found
    return torch.stack(each).repeat_interleave(request.images_per_prompt, dim=0)


def _tensor(image: Image.Image) -> Tensor:
    """[C,H,W] in [0,1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _encoded(model: Model, moments: Moments, pixels: Tensor, noise: Tensor, mask: Tensor | None = None) -> Tensor:
    """Latents [B,4,h,w] of pictures, with what a mask covers in grey; one at a time, so that memory does not grow."""
    images = 2 * pixels - 1
    images = images if mask is None else images * (mask < 0.5)
    found = [
        sampled(*moments(image), drawn.to(model.device, model.dtype)).float()
        for image, drawn in zip(images.split(1), noise.split(1), strict=True)
    ]
    return torch.cat(found) * model.vae.config.scaling_factor


def _noised(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Variance-preserving latents with noise of a level."""
    return (clean + sigma * noise) / math.sqrt(1 + sigma**2)


def _holding(clean: Tensor, noise: Tensor, cells: Tensor) -> Hold:
    """Outside the mask the picture, with the run's own noise at each level."""

    def hold(x: Tensor, sigma: float) -> Tensor:
        return (cells * x + (1 - cells) * _noised(clean, noise, sigma)).to(x.dtype)

    return hold
