"""A user's model against diffusers, both loaded from the same source: networks, samplers, whole images.

In float32 every output is compared with diffusers'. In half precision both are compared with diffusers' float32
output: minidiff's error may exceed that of diffusers in the same precision by at most a factor.
"""

import gc
import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

import minidiff
from minidiff.sampling import SD15_SCHEDULER_CONFIG, sampler_by_name
from minidiff.shapes.folder import INDEX

from .images import PLAIN, Ask, ours, theirs
from .reference import COMPARED, mend_clip_skip, reference_context, relative_error
from .table import LEVELS, Row

BOUNDS = {"network": 1e-4, "latents": 1e-3, "image": 1.0}
"""Bounds of float32 rows by kind. They are loose, since it is unknown here how trained networks amplify rounding;
a wrong part exceeds them by far."""
HALF_BOUND = 2.0
PROMPTS = ["a red circle and a blue square", "An old lighthouse on a cliff, " * 20]


Grid = tuple[int, int]


class Look(NamedTuple):
    """One output of both implementations. kind: a key of BOUNDS; images are [B,H,W,3] in [0,1]."""

    part: str
    kind: str
    found: Tensor
    expected: Tensor


@torch.no_grad()
def model_rows(
    source: str,
    tokenizer: str | None,
    steps: int,
    samplers: Sequence[str] = COMPARED,
    half: str | None = None,
    edge: int | None = None,
) -> Iterator[Row]:
    """All rows for a source in float32, then in `half`, without samplers that draw their noise in that precision.

    edge: of the latents; None is the UNet's training size.
    """
    exact: dict[str, Tensor] = {}
    for look in _looks(*load_pair(source, tokenizer, "float32"), steps, samplers, edge):
        exact[look.part] = look.expected
        yield _exact_row(look)
    if half is None:
        return
    gc.collect()  # free the float32 pair before loading the other
    samplers = [name for name in samplers if not sampler_by_name(name).stochastic]
    for look in _looks(*load_pair(source, tokenizer, half), steps, samplers, edge):
        yield _half_row(look, exact[look.part], half)


def load_pair(source: str, tokenizer: str | None, dtype: str) -> tuple[minidiff.Model, Any]:
    """The source loaded by minidiff and by diffusers, on the CPU; nothing is downloaded."""
    model = minidiff.load(source, tokenizer=tokenizer, dtype=dtype, device="cpu")
    settings = {"safety_checker": None, "dtype": model.dtype, "local_files_only": True}
    if model.origin.is_dir():
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
            str(model.origin), requires_safety_checker=False, **settings
        )
    else:
        with tempfile.TemporaryDirectory(prefix="minidiff-bench-") as configs:
            _write_configs(Path(configs), model)
            pipeline = diffusers.StableDiffusionPipeline.from_single_file(str(model.origin), config=configs, **settings)
    pipeline.set_progress_bar_config(disable=True)
    mend_clip_skip(pipeline)
    return model, pipeline


def _looks(
    model: minidiff.Model, pipeline: Any, steps: int, samplers: Sequence[str], edge: int | None
) -> Iterator[Look]:
    grid = (edge or model.unet.config.sample_size,) * 2
    yield from _text_looks(model, pipeline)
    yield from _unet_looks(model, pipeline, grid)
    yield from _vae_looks(model, pipeline, grid)
    config = {key: value for key, value in pipeline.scheduler.config.items() if key != "minidiff_defaults"}
    config["clip_sample"] = False  # SD does not clip; a PNDM config may omit it, and DDIM clips by default
    noise, size = _noise(1, model.unet.config.in_channels, *grid, seed=5).to(model.dtype), _pixels(model, grid)
    for name in samplers:
        ask = Ask((PROMPTS[0],), sampler=name, steps=steps, scale=PLAIN.scale, size=size, latents=noise)
        latents = [
            torch.as_tensor(run) for run in (ours(model, ask, "latents"), theirs(pipeline, config, ask, "latent"))
        ]
        yield Look(f"latents, {name}", "latents", latents[0].float(), latents[1].float())
        images = [
            model.decode(latents[0]),
            pipeline.vae.decode(latents[1] / pipeline.vae.config.scaling_factor, return_dict=False)[0].float(),
        ]
        yield Look(f"image, {name}", "image", *((x / 2 + 0.5).clamp(0, 1).movedim(1, -1) for x in images))


def _text_looks(model: minidiff.Model, pipeline: Any) -> Iterator[Look]:
    prompts = PROMPTS if model.text.words is None else PROMPTS[:1]
    for clip_skip in (None, 1):
        if clip_skip is None or clip_skip < model.text.model.config.num_hidden_layers:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*the text encoder reads", category=UserWarning)
                found = model.text.encode(prompts, clip_skip)
            yield Look(
                f"text, clip_skip {clip_skip}", "network", found, reference_context(pipeline, prompts, clip_skip)
            )


def _unet_looks(model: minidiff.Model, pipeline: Any, grid: Grid) -> Iterator[Look]:
    height, width = grid
    context = reference_context(pipeline, [PROMPTS[0]] * 2, None)
    t = torch.tensor([981, 21])
    for h, w in ((height, width), (height // 2, width + 8)):
        x = _noise(2, model.unet.config.in_channels, h, w, seed=7).to(model.dtype)
        expected = pipeline.unet(x, t, encoder_hidden_states=context, return_dict=False)[0]
        yield Look(f"unet, eps of {h}x{w} latents", "network", model.unet(x, t, context)[0], expected)


def _vae_looks(model: minidiff.Model, pipeline: Any, grid: Grid) -> Iterator[Look]:
    images = torch.rand(1, 3, *_pixels(model, grid), generator=torch.Generator().manual_seed(7)) * 2 - 1
    images = images.to(model.dtype)
    expected = pipeline.vae.encode(images).latent_dist.mean
    yield Look("vae encode", "network", model.vae.encode(images), expected)
    yield Look("vae decode", "network", model.vae.decode(expected), pipeline.vae.decode(expected, return_dict=False)[0])


def _exact_row(look: Look) -> Row:
    where, bound = "x".join(map(str, look.found.shape)), BOUNDS[look.kind]
    if look.kind == "image":
        note = f"standard deviation {float(look.expected.std()) * 255:.0f}"
        return Row(look.part, where, float((look.found - look.expected).abs().max()) * 255, bound, LEVELS, note)
    return Row(look.part, where, relative_error(look.found, look.expected), bound)


def _half_row(look: Look, exact: Tensor, dtype: str) -> Row:
    """Compares RMS errors, since the maximum of many rounding errors is too random."""
    found, expected = (float((x.double() - exact.double()).square().mean().sqrt()) for x in (look.found, look.expected))
    size = float(exact.double().square().mean().sqrt())
    note = f"relative: {found / size:.1e} and {expected / size:.1e}"
    ratio = found / expected if expected > 0 else float(found > 0)
    shape = "x".join(map(str, look.found.shape))
    return Row(f"{look.part}, {dtype}", shape, ratio, HALF_BOUND, f"of diffusers' {dtype} error", note)


def _pixels(model: minidiff.Model, grid: Grid) -> Grid:
    return grid[0] * model.vae.config.factor, grid[1] * model.vae.config.factor


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


OUR_NAMES = ("num_heads", "down_attention", "up_attention", "mid_block")
"""Fields of UNetConfig that the folder format encodes differently."""


def _write_configs(folder: Path, model: minidiff.Model) -> None:
    """Write the folder of configs and tokenizer that diffusers needs with a single file, which holds only weights."""
    unet, vae = model.unet.config, model.vae.config
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    levels = len(vae.block_out_channels)
    configs: dict[str, dict[str, object]] = {
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            **{key: value for key, value in asdict(unet).items() if key not in OUR_NAMES},
            "mid_block_type": "UNetMidBlock2DCrossAttn" if unet.mid_block else None,
            "attention_head_dim": unet.num_heads,
            "layers_per_block": unet.layers_per_block[0],  # in single files it is the same at each level
            "down_block_types": [down[not has] for has in unet.down_attention],
            "up_block_types": [up[not has] for has in unet.up_attention],
        },
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
            **asdict(vae),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        },
        "text_encoder/config.json": {**model.text.model.config.to_dict(), "architectures": ["CLIPTextModel"]},
        "scheduler/scheduler_config.json": dict(SD15_SCHEDULER_CONFIG),
        "model_index.json": dict(INDEX),
    }
    for name, config in configs.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(config))
    model.text.tokenizer.save_pretrained(folder / "tokenizer")
