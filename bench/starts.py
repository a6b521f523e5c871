"""Pictures in: image to image and inpainting (UNets of 4 and 9 channels) against diffusers' pipelines, by sampler."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import minidiff
from minidiff.draw import to_image

from .models import TINY, write_folder
from .reference import COMPARED, diffusers, pipeline_pair, reference_scheduler
from .table import LEVELS, Row

BOUND = 1.0
STRENGTH, STEPS = 0.6, 16
SIZE = (32, 48)
FEW = ("ddim", "pndm", "euler_ancestral", "dpmpp_2m")
MENDED = {"dpm2": "sigmas_interpol", "dpmpp_sde": "mid_point_sigma"}
"""Samplers in the middle of whose steps diffusers keeps the outside of a mask at the noise of the step's end, and where
its scheduler has the noise level that the network is called with there, as ours keeps it."""


def start_rows(samplers: tuple[str, ...] = COMPARED) -> Iterator[Row]:
    """One row per pipeline and sampler; few samplers with 9 channels."""
    with tempfile.TemporaryDirectory(prefix="minidiff-bench-") as folder:
        plain = pipeline_pair(write_folder(Path(folder) / "4", TINY))
        nine = pipeline_pair(write_folder(Path(folder) / "9", replace(TINY, unet={**TINY.unet, "in_channels": 9})))
    for (model, pipeline), part in ((plain, "image to image"), (plain, "inpainting"), (nine, "inpainting")):
        kind = diffusers.StableDiffusionInpaintPipeline
        kind = kind if part == "inpainting" else diffusers.StableDiffusionImg2ImgPipeline
        theirs = kind(**pipeline.components, requires_safety_checker=False)
        theirs.set_progress_bar_config(disable=True)
        channels, config = model.unet.config.in_channels, dict(theirs.scheduler.config)
        for sampler in samplers:
            if channels == 4 or sampler in FEW:
                theirs.scheduler = reference_scheduler(sampler, config)
                mended = part == "inpainting" and sampler in MENDED
                if mended:
                    keep_its_level(theirs.scheduler, MENDED[sampler])
                row = _row(f"{part}, {channels} channels, {sampler}", model, theirs, sampler, part)
                yield replace(row, note=f"{row.note}, diffusers patched") if mended else row


def keep_its_level(scheduler: Any, middle: str) -> None:
    """Let add_noise, which makes the outside of a mask after each call, take the noise level of the next call."""
    given = scheduler.add_noise

    def add_noise(original: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if scheduler.step_index is None:
            return given(original, noise, timesteps)
        level = scheduler.sigmas if scheduler.state_in_first_order else getattr(scheduler, middle)
        return original + noise * (level[scheduler.step_index] if level.ndim else level)

    scheduler.add_noise = add_noise


def _row(name: str, model: minidiff.Model, theirs: Any, sampler: str, part: str) -> Row:
    """Largest difference of a picture, in 1/255."""
    height, width = SIZE
    draw = np.random.default_rng(0).random((6, 8, 3))
    start = to_image(draw).resize((width, height), Image.Resampling.BICUBIC)
    mask = Image.new("L", start.size)
    mask.paste(255, (width // 4, 0, width, height // 2))
    masked = part == "inpainting"
    shared = {"image": start, "strength": STRENGTH, "guidance_scale": 7.5}
    expected = theirs(
        prompt="a red lighthouse",
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(5)],
        output_type="np",
        **shared,
        **({"mask_image": mask, "height": height, "width": width} if masked else {}),
    ).images
    found = minidiff.generate(
        "a red lighthouse",
        model=model,
        sampler=sampler,
        steps=STEPS,
        seed=5,
        output="numpy",
        paste=False,
        mask=mask if masked else None,
        **shared,
    ).images
    error = float(np.abs(np.asarray(found, dtype=np.float64) - expected).max() * 255)
    return Row(name, "x".join(map(str, expected.shape)), error, BOUND, LEVELS, f"strength {STRENGTH} of {STEPS} steps")
