"""Whole images: `minidiff.generate` against StableDiffusionPipeline with the same seeds, by sampler and option."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import minidiff

from .reference import COMPARED, pipeline_pair, reference_context, reference_scheduler
from .table import LEVELS, Row

Pixels = NDArray[np.float32]
BOUND = 1.0
CONTRAST = 3.0  # minimum change of the image by an option, in 1/255, for its row to be meaningful


@dataclass(frozen=True, eq=False)
class Ask:
    """The arguments of one call, for both implementations."""

    prompts: tuple[str, ...] = ("a red lighthouse on a cliff",)
    negatives: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = (5,)
    sampler: str = "ddim"
    steps: int = 12
    scale: float = 7.5
    rescale: float = 0.0
    clip_skip: int | None = None
    eta: float = 0.0
    repeats: int = 1
    size: tuple[int, int] | None = None
    latents: Tensor | None = None
    timesteps: tuple[int, ...] | None = None


PLAIN = Ask()
THREE = replace(
    PLAIN,
    prompts=("a red lighthouse on a cliff", "two cats", "an old map of İstanbul"),
    negatives=("blurry", "a dog in the rain", ""),
    seeds=(5, 77, 3),
)
LATENTS = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(99))
# name -> (the call, its contrast: the same without the option)
OPTIONS: dict[str, tuple[Ask, Ask]] = {
    "3 prompts, negatives, seeds": (THREE, replace(THREE, negatives=("", "", ""))),
    "3 prompts, euler_ancestral": (replace(THREE, sampler="euler_ancestral"), THREE),
    "2 images per prompt": (replace(PLAIN, repeats=2, seeds=(5, 6)), replace(PLAIN, repeats=2, seeds=(5, 7))),
    "guidance_rescale 0.7": (replace(PLAIN, rescale=0.7), PLAIN),
    "guidance_scale 1": (replace(PLAIN, scale=1.0), PLAIN),
    "clip_skip 1": (replace(THREE, clip_skip=1), THREE),
    "clip_skip 2": (replace(THREE, clip_skip=2), replace(THREE, clip_skip=1)),
    "eta 0.6": (replace(PLAIN, eta=0.6), PLAIN),
    "eta 1, 3 prompts": (replace(THREE, eta=1.0), THREE),
    "non-square": (replace(PLAIN, size=(40, 88)), replace(PLAIN, size=(40, 88), prompts=("two cats",))),
    "given latents": (replace(PLAIN, latents=LATENTS), PLAIN),
    "custom timesteps, euler": (
        replace(PLAIN, sampler="euler", timesteps=(999, 700, 400, 150, 30)),
        replace(PLAIN, sampler="euler"),
    ),
}


def image_rows(
    folder: Path, samplers: tuple[str, ...] = COMPARED, options: tuple[str, ...] = tuple(OPTIONS)
) -> Iterator[Row]:
    """One row per sampler and per option for the model in `folder`. A sampler's contrast uses another prompt."""
    model, pipeline = pipeline_pair(folder)
    config = dict(pipeline.scheduler.config)
    for name in samplers:
        ask = replace(PLAIN, sampler=name, steps=20)
        yield image_row(f"generate, {name}", model, pipeline, config, ask, replace(ask, prompts=("two cats",)))
    for name in options:
        yield image_row(f"generate, {name}", model, pipeline, config, *OPTIONS[name])


def image_row(
    part: str, model: minidiff.Model, pipeline: Any, config: dict[str, object], ask: Ask, contrast: Ask
) -> Row:
    """Largest pixel difference, in 1/255. If the contrast is the same image, the row is meaningless: not ok."""
    found, expected = ours(model, ask), theirs(pipeline, config, ask)
    if found.shape != expected.shape:
        return Row(part, "x".join(map(str, found.shape)), float("inf"), BOUND, LEVELS, f"expected {expected.shape}")
    moved = _levels(found, ours(model, contrast))
    note = f"contrast {moved:.0f}, standard deviation {expected.std() * 255:.0f}"
    error = _levels(found, expected) if moved >= CONTRAST else float("nan")
    return Row(part, "x".join(map(str, found.shape)), error, BOUND, LEVELS, note)


def ours(model: minidiff.Model, ask: Ask, output: Literal["numpy", "latents"] = "numpy") -> Pixels:
    """[B,H,W,3] in [0,1], or the latents [B,4,h,w]."""
    height, width = (None, None) if ask.size is None else ask.size
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the negative prompt has no effect", category=UserWarning)
        result = minidiff.generate(
            list(ask.prompts),
            model=model,
            negative_prompt=None if ask.negatives is None else list(ask.negatives),
            width=width,
            height=height,
            steps=ask.steps if ask.timesteps is None else None,
            timesteps=ask.timesteps,
            guidance_scale=ask.scale,
            guidance_rescale=ask.rescale,
            clip_skip=ask.clip_skip,
            sampler=ask.sampler,
            eta=ask.eta,
            seed=list(ask.seeds),
            images_per_prompt=ask.repeats,
            latents=ask.latents,
            output=output,
        )
    images = result.images
    pixels: Pixels = np.asarray(images.float() if isinstance(images, Tensor) else images)
    return pixels


def theirs(pipeline: Any, config: dict[str, object], ask: Ask, output: Literal["np", "latent"] = "np") -> Pixels:
    """[B,H,W,3] in [0,1], or the latents [B,4,h,w].

    With clip_skip the texts are encoded first, since diffusers applies it only to the prompts, not to the negatives.
    """
    pipeline.scheduler = reference_scheduler(ask.sampler, config)
    height, width = (None, None) if ask.size is None else ask.size
    prompts, negatives = list(ask.prompts), None if ask.negatives is None else list(ask.negatives)
    context = negative_context = None
    if ask.clip_skip is not None:
        context = reference_context(pipeline, prompts, ask.clip_skip)
        negative_context = reference_context(pipeline, negatives or [""] * len(prompts), ask.clip_skip)
    pixels: Pixels = pipeline(
        prompt=prompts if context is None else None,
        negative_prompt=negatives if context is None else None,
        prompt_embeds=context,
        negative_prompt_embeds=negative_context,
        height=height,
        width=width,
        num_inference_steps=ask.steps,
        timesteps=None if ask.timesteps is None else list(ask.timesteps),
        guidance_scale=ask.scale,
        guidance_rescale=ask.rescale,
        eta=ask.eta,
        num_images_per_prompt=ask.repeats,
        generator=[torch.Generator().manual_seed(seed) for seed in ask.seeds],
        latents=ask.latents,
        output_type=output,
    ).images
    return pixels


def _levels(a: Pixels, b: Pixels) -> float:
    """Largest difference in 1/255, before rounding to integer levels; infinite if the shapes differ."""
    return (
        float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max() * 255) if a.shape == b.shape else float("inf")
    )
