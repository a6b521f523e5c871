"""Parity: every part of minidiff against diffusers with the same weights and inputs: random weights in float32, or
(--model) those of your own model, also in half precision.

Only total times are printed; other benchmarks measure the cost of each implementation.
"""

import argparse
import gc
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidiff.networks.unet import UNet
from minidiff.sampling import SD15_SCHEDULER_CONFIG, NoiseSchedule, Schedule, sample, sampler_by_name

from .adapters import adapter_rows
from .emphasis import emphasis_rows
from .images import image_rows
from .machine import print_header
from .merge import merge_rows
from .models import SD15, TINY, Config, text_dict, unet_dict, vae_dict, write_folder
from .reference import (
    COMPARED,
    reference_context,
    reference_scheduler,
    relative_error,
    text_pair,
    unet_pair,
    vae_pair,
)
from .released import model_rows
from .starts import start_rows
from .table import Row, finish, print_head, print_row

BOUND = 1e-5
SIGMA_BOUND = 1e-6
MIDDLE_BOUND = 1e-3  # of 1000: diffusers interpolates the middles of these samplers' steps in float32
MIDDLES = ("dpm2", "dpm2_ancestral", "dpmpp_sde")
SIGMA_UNIT = "max |diff| / (1 + |ref|)"
STEPS = 20
HALF = ("bfloat16", "float16", "float32")
Grid = tuple[int, int]
GRIDS = ((64, 64), (48, 80))
"""Latent grids of the full-size rows: 512 x 512 pixels, and 640 wide x 384 high."""

SMALL_UNETS: tuple[tuple[str, Config, Grid], ...] = (
    ("square", TINY.unet, (16, 16)),
    (
        "odd grid, layers 1 2 1",
        unet_dict([32, 48, 64], [True, True, False], heads=4, groups=16, layers=[1, 2, 1]),
        (9, 14),
    ),
    (
        "plain first, linear, heads 2 4 6",
        unet_dict([32, 64, 96], [False, True, True], heads=[2, 4, 6], context=48, groups=8, linear=True),
        (12, 20),
    ),
)
SMALL_VAES: tuple[tuple[str, Config, Grid], ...] = (
    ("square", TINY.vae, (8, 8)),
    ("non-square", vae_dict([32, 48, 64, 64], groups=16), (5, 9)),
    ("2 levels, 1 layer", vae_dict([16, 24], layers=1, groups=8), (12, 7)),
)
PROMPTS = [
    "",
    "a photo of a cat",
    "Café  au\nlait, 2024 (highly detailed)!",
    "a 🐱 in İstanbul",
    "An old lighthouse, " * 30,
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `python -m bench parity`."""
    parser.add_argument(
        "--full", action="store_true", help="UNet, VAE, text encoder and a LoRA at SD 1.5's size instead of small ones"
    )
    parser.add_argument(
        "--model",
        metavar="SOURCE",
        help="instead: a folder, a .safetensors file, or a hub id that is in the cache",
    )
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="with --model FILE: CLIP's tokenizer, if it is not cached"
    )
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="with --model: steps per sampler (default 8)")
    parser.add_argument("--dtype", choices=HALF, default="bfloat16", help="with --model: a second dtype to compare")
    parser.add_argument("--only", nargs="+", choices=[*SMALL, *FULL], metavar="PART", help=f"from {', '.join(SMALL)}")


def run(args: argparse.Namespace) -> int:
    """Print one row per part. Returns 1 if a bound is violated."""
    if args.model is not None:
        return _run_model(args)
    parts = FULL if args.full else SMALL
    only = list(parts) if args.only is None else args.only
    if not set(only) <= set(parts):
        raise ValueError(f"--only {' '.join(only)}; with --full expected some of {', '.join(FULL)}")
    threads = torch.get_num_threads()
    if not args.full:
        torch.set_num_threads(1)  # on two busy cores, two threads wait for each other: small networks run 10x slower
    try:
        return finish(_printed({name: parts[name] for name in only}, args.full), args.json)
    finally:
        torch.set_num_threads(threads)


def _run_model(args: argparse.Namespace) -> int:
    if args.full or args.only is not None or args.steps < 1:
        raise ValueError("--model goes with neither --full nor --only, and with --steps of at least 1")
    half = None if args.dtype == "float32" else args.dtype
    facts = {"model": args.model, "dtype": "float32" if half is None else f"float32, {half}", "steps": str(args.steps)}
    print_header("parity with diffusers, both loaded from the same model", facts)
    print_head()
    rows = []
    for row in model_rows(args.model, args.tokenizer, args.steps, half=half):
        print_row(row)
        rows.append(row)
    return finish(rows, args.json)


def _printed(parts: dict[str, Callable[[], Iterator[Row]]], full: bool) -> list[Row]:
    facts = {"dtype": "float32", "weights": "random, the same in both", "threads": str(torch.get_num_threads())}
    print_header(f"parity with diffusers, {'full SD 1.5 size' if full else 'small models'}", facts)
    print("Seconds include creating the weights and both implementations: this compares results, not speed.")
    if "images" in parts:
        print("contrast: difference, in 1/255, from an image without the option (for samplers: from another prompt).")
    print_head()
    started, rows = time.perf_counter(), []
    for name, part in parts.items():
        before = time.perf_counter()
        for row in part():
            print_row(row)
            rows.append(row)
        gc.collect()  # free one part's weights before the next part's are created
        print(f"  {name}: {time.perf_counter() - before:.1f} s")
    print(f"all: {time.perf_counter() - started:.1f} s")
    return rows


@torch.no_grad()
def unet_rows(name: str, config: Config, grids: Sequence[Grid], batch: int) -> Iterator[Row]:
    """eps of one UNet on each latent grid, with a different timestep for each image of the batch."""
    ours, theirs = unet_pair(config)
    for grid in grids:
        x, context, t = unet_inputs(ours, grid, batch)
        expected = theirs(x, t, encoder_hidden_states=context, return_dict=False)[0]
        yield Row(f"unet, {name}", shape(x), relative_error(unet_output(ours, x, t, context), expected), BOUND)


def unet_inputs(unet: UNet, grid: Grid, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, context and timesteps from a fixed seed."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch, unet.config.in_channels, *grid, generator=generator)
    context = torch.randn(batch, 77, unet.config.cross_attention_dim, generator=generator)
    return x, context, torch.tensor([981, 21, 500, 1][:batch])


def unet_output(unet: UNet, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """eps; never None, since nothing stops the UNet early."""
    eps, _ = unet(x, t, context)
    assert eps is not None
    return eps


@torch.no_grad()
def vae_rows(name: str, config: Config, grids: Sequence[Grid], batch: int) -> Iterator[Row]:
    """Encoding to the mean and to a sample with the same noise, and decoding, for one autoencoder."""
    ours, theirs = vae_pair(config)
    for grid in grids:
        generator = torch.Generator().manual_seed(7)
        images = torch.rand(batch, 3, *(n * ours.config.factor for n in grid), generator=generator) * 2 - 1
        z, noise = (torch.randn(batch, 4, *grid, generator=torch.Generator().manual_seed(seed)) for seed in (5, 3))
        expected = theirs.encode(images).latent_dist
        yield Row(f"vae encode, mean, {name}", shape(images), relative_error(ours.encode(images), expected.mean), BOUND)
        sampled = expected.sample(torch.Generator().manual_seed(3))  # draws our noise
        error = relative_error(ours.encode(images, noise), sampled)
        yield Row(f"vae encode, sampled, {name}", shape(images), error, BOUND)
        decoded = theirs.decode(z, return_dict=False)[0]
        yield Row(f"vae decode, {name}", shape(z), relative_error(ours.decode(z), decoded), BOUND)


@torch.no_grad()
def text_rows(name: str, config: Config) -> Iterator[Row]:
    """Contexts of short, unusual and overlong prompts, with and without clip_skip."""
    ours, pipeline = text_pair(config)
    for clip_skip in (None, 1, 2):
        expected = reference_context(pipeline, PROMPTS, clip_skip)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*the text encoder reads", category=UserWarning)
            found = ours.encode(PROMPTS, clip_skip)
        mended = "" if clip_skip is None else "diffusers patched, #14124"
        yield Row(
            f"text, {name}, clip_skip {clip_skip}", shape(found), relative_error(found, expected), BOUND, note=mended
        )


def sampler_rows(name: str, steps: int = STEPS) -> Iterator[Row]:
    """Timesteps, sigmas and the latents after every step of one sampler, with an analytic network."""
    noise, sampler = NoiseSchedule.from_config(SD15_SCHEDULER_CONFIG), sampler_by_name(name)
    schedule, scheduler = sampler.schedule(noise, steps), reference_scheduler(name, SD15_SCHEDULER_CONFIG, steps)
    size = f"{steps} steps, {len(schedule.spans)} calls"
    late = (schedule.timesteps.double() - scheduler.timesteps.double()).abs().max().item()
    bound = MIDDLE_BOUND if name in MIDDLES else 0.0
    yield Row(f"sampler {name}, timesteps", size, late, bound, "max|diff|")
    yield Row(f"sampler {name}, sigmas", size, _sigma_error(schedule, scheduler), SIGMA_BOUND, SIGMA_UNIT)
    start = torch.randn(2, 4, 9, 16, generator=torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(5)
    calls: list[int] = []

    def network(x: Tensor, t: Tensor, sigma: float, index: int) -> tuple[Tensor, dict[Any, Tensor]]:
        calls.append(index)
        return analytic(x, t), {}

    run = sample(network, start, schedule, sampler, noise=lambda: torch.randn(start.shape, generator=draws))
    found = {len(calls) - 1: step.latents for step in run}  # by the call that ends a step
    path = list(_path(scheduler, start))
    worst = max(relative_error(latents, path[call]) for call, latents in found.items())
    yield Row(f"sampler {name}, trajectory", f"{shape(start)} x {len(found)}", worst, BOUND)


def analytic(x: Tensor, t: Tensor) -> Tensor:
    """Replaces the UNet in the sampler rows: nonlinear and timestep-dependent."""
    return torch.tanh(0.7 * x + t / 800) + 0.2 * torch.cos(3 * x - t / 300)


def _path(scheduler: Any, start: Tensor) -> Iterator[Tensor]:
    """Latents after each of diffusers' calls."""
    x, given = start * scheduler.init_noise_sigma, {"generator": torch.Generator().manual_seed(5), "eta": 0.0}
    given = {name: value for name, value in given.items() if name in signature(scheduler.step).parameters}
    for t in scheduler.timesteps:
        x = scheduler.step(analytic(scheduler.scale_model_input(x, t), t.float()), t, x, **given).prev_sample
        yield x


def _sigma_error(schedule: Schedule, scheduler: Any) -> float:
    """max |diff| / (1 + |ref|): relative for large sigmas, absolute for small ones.

    DDIM and PNDM in diffusers have no sigmas; they are computed from alphas_cumprod. With two calls a step (order 2)
    the first one's are compared.
    """
    sigmas = schedule.sigmas
    if hasattr(scheduler, "sigmas"):
        sigmas = torch.tensor([*sigmas.tolist(), schedule.spans[-1][1]])[:: scheduler.order]
        expected = scheduler.sigmas[: len(schedule.sigmas) + 1 : scheduler.order]
    else:
        abar = scheduler.alphas_cumprod[scheduler.timesteps]
        expected = ((1 - abar) / abar) ** 0.5
    return ((sigmas.double() - expected.double()).abs() / (1 + expected.double().abs())).max().item()


def shape(x: Tensor) -> str:
    """E.g. "2x4x64x64"."""
    return "x".join(map(str, x.shape))


def _small_images() -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="minidiff-bench-") as folder:
        yield from image_rows(write_folder(Path(folder) / "tiny", TINY))


def _each(parts: Callable[[], Iterator[Iterator[Row]]]) -> Callable[[], Iterator[Row]]:
    return lambda: (row for rows in parts() for row in rows)


SMALL: dict[str, Callable[[], Iterator[Row]]] = {
    "unet": _each(lambda: (unet_rows(name, config, [grid], 2) for name, config, grid in SMALL_UNETS)),
    "vae": _each(lambda: (vae_rows(name, config, [grid], 2) for name, config, grid in SMALL_VAES)),
    "text": lambda: text_rows("small", text_dict(64, 256, 3, 4)),
    "samplers": _each(lambda: (sampler_rows(name) for name in COMPARED)),
    "emphasis": emphasis_rows,
    "images": _small_images,
    "starts": start_rows,
    "adapters": adapter_rows,
}
FULL: dict[str, Callable[[], Iterator[Row]]] = {
    "unet": lambda: unet_rows("SD 1.5", SD15.unet, GRIDS, 1),
    "vae": lambda: vae_rows("SD 1.5", SD15.vae, GRIDS, 1),
    "text": lambda: text_rows("SD 1.5", SD15.text),
    "adapters": merge_rows,
}
"""Part -> its rows, computed on demand."""
