"""The networks and inputs for benchmarks of speed and memory: ours as returned by `load`, and diffusers'."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minidiff.guidance.evaluate import look_loss
from minidiff.guidance.guide import Guidance, Guide
from minidiff.guidance.layout import PlacedObject, make_layout
from minidiff.guidance.objectives.layout import layout_loss
from minidiff.networks.attention import HEAD_MEAN, Maps, Record
from minidiff.networks.config import UNetConfig, VAEConfig
from minidiff.networks.sites import choose, cross, level
from minidiff.networks.unet import UNet
from minidiff.networks.vae import VAE
from minidiff.recorded import MEAN
from minidiff.sampling import SD15_SCHEDULER_CONFIG, Euler, NoiseSchedule, sample
from minidiff.speed.accelerate import compile_network, compile_unet, looks_of, prepare, prepare_unet
from minidiff.speed.int8 import to_int8

from .models import SD15, TINY, Size, random_weights, unet_shapes, vae_shapes

SIZES = {"full": SD15, "tiny": TINY}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PLACES = (
    (0.125, 0.125, 0.5, 0.625),
    (0.5, 0.5, 0.875, 0.875),
    (0, 0, 0.25, 0.25),
    (0.75, 0, 1, 0.5),
    (0, 0.75, 0.5, 1),
    (0.25, 0.25, 0.75, 0.75),
    (0.5, 0, 0.75, 0.25),
    (0, 0.5, 0.25, 0.75),
)  # whole cells of every grid used at 64x64 latents, so that the published code has the same masks
TIMESTEP = 801.0
ALIKE = {"bfloat16": 0.1, "float16": 0.1, "float32": 1e-3}
"""Maximum relative error between equivalent computations, due to rounding."""
Weights = Mapping[str, Tensor]


def device() -> torch.device:
    """CUDA if available, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def judged_dtype() -> str:
    """The dtype that the bounds apply to: bfloat16 on a GPU or a CPU with matrix units, float32 elsewhere."""
    return "bfloat16" if device().type == "cuda" or torch.cpu._is_amx_tile_supported() else "float32"


def add_network_arguments(parser: argparse.ArgumentParser, dtypes: Sequence[str]) -> None:
    """Add --size, --dtype (default: `dtypes`) and --latents."""
    parser.add_argument("--size", choices=SIZES, default="full", help="size of the networks (default: SD 1.5's)")
    add_dtype_argument(parser, dtypes)
    parser.add_argument("--latents", type=int, default=64, metavar="N", help="N x N latents (default 64)")


def add_dtype_argument(parser: argparse.ArgumentParser, dtypes: Sequence[str]) -> None:
    """Add --dtype, one or several."""
    text = f"one table per dtype (default here: {' '.join(dtypes)})"
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(dtypes), help=text)


def unet_weights(size: Size, dtype: torch.dtype) -> Weights:
    """Random weights, the same for both implementations."""
    return {name: value.to(device()) for name, value in random_weights(unet_shapes(size.unet), dtype=dtype).items()}


def our_unet(size: Size, weights: Weights) -> UNet:
    """A UNet as returned by `load`."""
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict(size.unet))
    return prepare_unet(_filled(unet, weights))


def int8_unet(size: Size, weights: Weights) -> UNet:
    """A UNet as returned by `load(dtype="int8")`."""
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict(size.unet))
    return prepare(to_int8(_filled(unet, weights)))


def compiled_unet(size: Size, weights: Weights) -> UNet:
    """A UNet as returned by `load(compile=True)`."""
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict(size.unet))
    return compile_unet(_filled(unet, weights))


def their_unet(size: Size, weights: Weights) -> Any:
    """UNet2DConditionModel as returned by from_pretrained."""
    from .reference import diffusers

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(dict(size.unet))
    return _filled(unet, weights)


def their_compiled_unet(size: Size, weights: Weights) -> Callable[..., Any]:
    """The same, compiled with minidiff's flags, and on the CPU with the compiler's own packing (freezing).

    The compiler reads that setting while tracing, when an option of torch.compile is not yet in effect.
    """
    unet = compile_network(their_unet(size, weights).to(memory_format=torch.channels_last))
    if device().type != "cpu":
        return unet
    from torch._dynamo import config as tracing
    from torch._inductor import config as generating

    def frozen(*args: object, **kwargs: object) -> Any:
        with torch.no_grad(), generating.patch(freezing=True), tracing.patch(prepare_freezing=True):
            return unet(*args, **kwargs)

    return frozen


def our_vae(size: Size, dtype: torch.dtype) -> VAE:
    """A VAE as returned by `load`."""
    with torch.device("meta"):
        vae = VAE(VAEConfig.from_dict(size.vae))
    return prepare(_filled(vae, _vae_weights(size, dtype)))


def their_vae(size: Size, dtype: torch.dtype) -> Any:
    """AutoencoderKL as returned by from_pretrained."""
    from .reference import diffusers

    with torch.device("meta"):
        vae = diffusers.AutoencoderKL.from_config(dict(size.vae))
    return _filled(vae, _vae_weights(size, dtype))


@dataclass(frozen=True)
class Inputs:
    """Inputs of a step: x [B,4,h,w], t and context [B,77,D], in the networks' dtype."""

    x: Tensor
    t: Tensor
    context: Tensor

    @classmethod
    def random(cls, size: Size, dtype: torch.dtype, rows: int, height: int, width: int) -> "Inputs":
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(rows, 4, height, width, generator=generator)
        context = torch.randn(rows, 77, int(str(size.unet["cross_attention_dim"])), generator=generator)
        at = device()
        return cls(x.to(at, dtype), torch.tensor(TIMESTEP, device=at), context.to(at, dtype))


def layout_guide(unet: UNet, inputs: Inputs, objects: int = 2, iterations: int = 1, steps: int = 1) -> Guide:
    """The paper's layout guidance for every image in `inputs`, with 1 to 8 objects of one token each.

    Images never stop early.
    """
    height, width = inputs.x.shape[-2:]
    there = unet.positions(height, width)
    how = Guidance(layout_loss.bound(there), iterations=iterations, threshold=0.0, steps=steps)
    regions = tuple(PlacedObject(str(i), (2 + i,), (place,)) for i, place in enumerate(PLACES[:objects]))
    rows = len(inputs.x)
    layout = make_layout(
        [regions] * rows, [objects + 3] * rows, 77, {at.grid for at in there.values()}, inputs.x.device
    )
    names = [[region.name for region in regions]] * rows
    loss, whole, run, _ = looks_of(unet, look_loss, height * width)
    return Guide(how, unet.forward, inputs.context, layout, names, whole_batch=whole, loss=loss, run=run)


def tokens(objects: int) -> Sequence[Sequence[int]]:
    """The positions of the objects' words in `layout_guide`."""
    return [(2 + i,) for i in range(objects)]


def guided_pass(guide: Guide, inputs: Inputs) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that makes one guided pass and returns (gradient of the latents, loss [B])."""
    rows = torch.arange(len(inputs.x), device=inputs.x.device)

    def look() -> tuple[Tensor, Tensor]:
        gradient, found = guide.look(inputs.x.float(), inputs.t, 0.5, rows, 0, None)
        return gradient, found[0]

    return look


def guided_run(unet: UNet, inputs: Inputs, steps: int) -> Callable[[], Maps | None]:
    """A run of `steps` steps for one image, each guided once, that averages the maps recorded at level 1.

    inputs: two rows, [uncond, cond].
    """
    one = Inputs(inputs.x[:1], inputs.t, inputs.context[1:])
    there = unet.positions(inputs.x.shape[2], inputs.x.shape[3])
    record = Record(choose(cross & level(1), there), HEAD_MEAN)
    noise = NoiseSchedule.from_config(SD15_SCHEDULER_CONFIG)

    @torch.no_grad()
    def denoise(x: Tensor, t: Tensor, sigma: float, index: int) -> tuple[Tensor, Maps]:
        eps, maps = unet(torch.cat([x, x]).to(inputs.x.dtype), t, inputs.context, record)
        assert eps is not None
        return eps.float()[1:], maps

    def call() -> Maps | None:
        kept: Maps | None = None
        guide = layout_guide(unet, one, steps=steps)
        for done in sample(denoise, one.x.float(), Euler().schedule(noise, steps), Euler(), guide.refine):
            kept = MEAN(kept, done.maps, done.index)
        return kept

    return call


def _vae_weights(size: Size, dtype: torch.dtype) -> Weights:
    return {name: value.to(device()) for name, value in random_weights(vae_shapes(size.vae), dtype=dtype).items()}


def _filled(network: Any, weights: Weights) -> Any:
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval().requires_grad_(False)
