"""diffusers as the reference: its networks with minidiff's weights, its schedulers, its pipeline.

The weights are shared, not copied: both implementations hold the same tensors, to save memory at full size.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

transformers.logging.set_verbosity_error()  # before diffusers, whose import makes transformers warn about torchvision
transformers.logging.disable_progress_bar()
import diffusers  # noqa: E402

import minidiff  # noqa: E402
from minidiff.networks.config import UNetConfig, VAEConfig  # noqa: E402
from minidiff.networks.text import TextEncoder, text_encoder_shapes  # noqa: E402
from minidiff.networks.unet import UNet  # noqa: E402
from minidiff.networks.vae import VAE  # noqa: E402
from minidiff.vocabulary import read_sampler  # noqa: E402
from minidiff.weights.text import load_text_encoder  # noqa: E402

from .models import TOKENIZER, Config, random_weights, unet_shapes, vae_shapes  # noqa: E402

diffusers.utils.logging.set_verbosity_error()  # it logs every truncated prompt and every unused config key
diffusers.utils.logging.disable_progress_bar()

sys.modules.setdefault("torchsde", ModuleType("torchsde"))  # imported by the next line, used for no more than noise
from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler  # noqa: E402


class SeededSDE(DPMSolverSDEScheduler):
    """DPMSolverSDEScheduler with noise of the caller's generator, where it has torchsde's with a seed of its own.

    The noise between two sigmas is a Brownian motion's increment over its standard deviation. Of one step the scheduler
    asks first for start to middle, then for start to end.
    """

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> Any:
        def draw() -> Tensor:
            noise: Tensor = diffusers.utils.torch_utils.randn_tensor(sample.shape, generator, dtype=torch.float32)
            return noise

        self.noise_sampler = self.noise_sampler or _increments(draw)
        return super().step(model_output, timestep, sample, return_dict)


def _increments(draw: Callable[[], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    last: list[Any] = []  # where the last step began and was, and its motion until there

    def increment(start: Tensor, end: Tensor) -> Tensor:
        begun, to = float(start), float(end)
        _, at, walked = last if last and last[0] == begun else (begun, begun, torch.zeros(()))
        walked = walked + (at - to) ** 0.5 * draw()
        last[:] = begun, to, walked
        found: Tensor = walked / (begun - to) ** 0.5
        return found

    return increment


class MendedThirdOrder(diffusers.DPMSolverMultistepScheduler):  # type: ignore[misc]
    """With the second derivative's weight of k-diffusion: diffusers 0.42.1 has the wrong sign before its 1/2."""

    def multistep_dpm_solver_third_order_update(self, outputs: list[Tensor], **given: Any) -> Tensor:
        found: Tensor = super().multistep_dpm_solver_third_order_update(outputs, **given)
        end, *levels = (self.sigmas[self.step_index + 1 - i] for i in range(4))
        h, first, second = (torch.log(a / b) for a, b in zip(levels, (end, *levels), strict=False))
        slopes = (outputs[-1] - outputs[-2]) * h / first, (outputs[-2] - outputs[-3]) * h / second
        curve = (slopes[0] - slopes[1]) * h / (first + second)
        return found + curve / (end**2 + 1) ** 0.5


SDE: Config = {"algorithm_type": "sde-dpmsolver++"}
THEIRS: dict[str, tuple[Any, Config]] = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "lms": (diffusers.LMSDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "dpm2": (diffusers.KDPM2DiscreteScheduler, {}),
    "dpm2_ancestral": (diffusers.KDPM2AncestralDiscreteScheduler, {}),
    "dpmpp_sde": (SeededSDE, {}),
    "dpmpp_2s": (diffusers.DPMSolverSinglestepScheduler, {}),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, SDE),
    "dpmpp_2m_sde_heun": (diffusers.DPMSolverMultistepScheduler, {**SDE, "solver_type": "heun"}),
    "dpmpp_3m_sde": (MendedThirdOrder, {**SDE, "solver_order": 3, "solver_type": "heun", "lower_order_final": False}),
    "deis": (diffusers.DEISMultistepScheduler, {}),
    "uni_pc": (diffusers.UniPCMultistepScheduler, {}),
    "ddpm": (diffusers.DDPMScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
    "tcd": (diffusers.TCDScheduler, {}),
}
"""The samplers that diffusers has too: its class, and the settings that make it this algorithm."""
COMPARED = (*THEIRS, "euler_karras", "lms_karras", "dpmpp_2m_karras", "euler_beta", "dpmpp_2m_sde_exponential")
"""The samplers that diffusers also has. Its Euler ancestral does not support Karras sigmas."""


def relative_error(found: Tensor | NDArray[Any], expected: Tensor | NDArray[Any]) -> float:
    """max |found - expected| / max |expected|; infinite if the shapes differ, NaN if either contains NaN."""
    a, b = (torch.as_tensor(value).detach().double() for value in (found, expected))
    if a.shape != b.shape:
        return float("inf")
    return ((a - b).abs().max() / b.abs().max()).item()


def unet_pair(config: Config, seed: int = 0) -> tuple[UNet, Any]:
    """Our UNet and UNet2DConditionModel with the same random weights."""
    weights = random_weights(unet_shapes(config), seed)
    with torch.device("meta"):
        ours, theirs = UNet(UNetConfig.from_dict(config)), diffusers.UNet2DConditionModel.from_config(dict(config))
    return _filled(ours, weights), _filled(theirs, weights)


def vae_pair(config: Config, seed: int = 0) -> tuple[VAE, Any]:
    """Our autoencoder and AutoencoderKL with the same random weights."""
    weights = random_weights(vae_shapes(config), seed)
    with torch.device("meta"):
        ours, theirs = VAE(VAEConfig.from_dict(config)), diffusers.AutoencoderKL.from_config(dict(config))
    return _filled(ours, weights), _filled(theirs, weights)


def text_pair(config: Config, tokenizer: Path = TOKENIZER, seed: int = 0) -> tuple[TextEncoder, Any]:
    """Our text encoder and a StableDiffusionPipeline with only a text encoder, with the same random weights."""
    weights = random_weights(text_encoder_shapes(config), seed)
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**dict(config)))
    prefix = "" if next(iter(theirs.state_dict())).startswith("text_model.") else "text_model."
    _filled(theirs, {key.removeprefix(prefix): value for key, value in weights.items()})
    pipeline = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=theirs,
        tokenizer=transformers.CLIPTokenizer.from_pretrained(str(tokenizer)),
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    mend_clip_skip(pipeline)
    return load_text_encoder(config, weights, tokenizer), pipeline


def pipeline_pair(folder: Path) -> tuple[minidiff.Model, Any]:
    """The folder loaded by minidiff and by diffusers, in float32 on the CPU."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        str(folder), safety_checker=None, requires_safety_checker=False, dtype=torch.float32, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    mend_clip_skip(pipeline)
    return minidiff.load(folder, dtype="float32", device="cpu"), pipeline


def mend_clip_skip(pipeline: Any) -> None:
    """Let diffusers' own clip_skip code run with transformers >= 5.6, in which CLIPTextModel lost its `text_model`.

    huggingface/diffusers#14124: the code looks for text_encoder.text_model.final_layer_norm and fails with an
    AttributeError; the norm is now one level higher. Set past nn.Module, which would make the encoder its own child.
    """
    if not hasattr(pipeline.text_encoder, "text_model"):
        pipeline.text_encoder.__dict__["text_model"] = pipeline.text_encoder


def reference_context(pipeline: Any, prompts: list[str], clip_skip: int | None) -> Tensor:
    """diffusers' context [B,L,D]. Its pipeline applies clip_skip to prompts only; called this way, to negatives too."""
    context: Tensor = pipeline.encode_prompt(prompts, "cpu", 1, False, clip_skip=clip_skip)[0]
    return context


def reference_scheduler(name: str, config: Config, steps: int | None = None) -> Any:
    """diffusers' scheduler for one of our sampler names, created from a model's scheduler config as users would."""
    name, levels = read_sampler(name)
    kind, own = THEIRS[name]
    scheduler = kind.from_config({**config, **own, f"use_{levels}_sigmas": True})
    if steps is not None:
        scheduler.set_timesteps(steps)
    return scheduler


def _filled(network: Any, weights: Mapping[str, Tensor]) -> Any:
    network.load_state_dict(weights, strict=True, assign=True)
    return network.eval().requires_grad_(False)
