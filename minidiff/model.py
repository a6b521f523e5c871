"""A loaded model: its networks, tokenizer and noise schedule in one frozen value."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import Check, checked, number, shown, tensor, warn, whole
from .image_adapter import ImageAdapter
from .networks.sites import Grid, Site, Where, choose
from .networks.text import TextEncoder
from .networks.unet import UNet
from .networks.vae import VAE
from .safety import SafetyChecker
from .sampling import NoiseSchedule, Sampler, sampler_by_name
from .vocabulary import BUNDLED

if TYPE_CHECKING:
    from .png.chunk import Plain

_version = cache(version)  # which reads a file each time, in 10 ms
_NUMBERS: Mapping[str, Check] = {
    "steps": partial(whole, least=1),
    "guidance_scale": partial(number, least=1),
    "regions_apart": partial(number, least=0, most=1),
}


@dataclass(frozen=True)
class Defaults:
    """What `generate` does where the caller says nothing.

    The values here are those of diffusers for Stable Diffusion 1.5.

    A model may bring its own as `minidiff_defaults` in its scheduler_config.json. `sampler` None is the one that the
    config names. `guidance` is what `Guidance.read` takes: how boxes are followed.
    """

    sampler: Sampler | None = None
    steps: int = 50
    guidance_scale: float = 7.5
    guidance: str | Mapping[str, object] = "layout"
    regions_apart: float = 0.0

    @classmethod
    def from_config(cls, scheduler: Mapping[str, object]) -> "Defaults":
        """Read `minidiff_defaults` of a scheduler_config.json; ValueError names what is not understood."""
        given, where = scheduler.get("minidiff_defaults", {}), "scheduler config: minidiff_defaults"
        if not isinstance(given, Mapping) or not given.keys() <= {field.name for field in fields(cls)}:
            raise ValueError(
                f"{where} is {shown(given)}; expected an object of sampler, steps, guidance_scale, guidance and "
                "regions_apart"
            )
        sampler, guidance = given.get("sampler"), given.get("guidance", cls.guidance)
        if not isinstance(guidance, str | Mapping):
            raise ValueError(f"{where}: guidance is {shown(guidance)}; expected a name or an object")
        return cls(
            sampler=None if sampler is None else sampler_by_name(sampler),
            guidance=guidance,
            **checked({name: given[name] for name in _NUMBERS if name in given}, _NUMBERS, f"{where}: "),
        )


@dataclass(frozen=True)
class Adapter:
    """Something that was put on a model, for its repr and the recipe of its pictures.

    kind: "lora", "word" or "image prompt". name: of the file, or the word. file, sha256: where it was read from (its
    name alone), and what it held. weights: what the user chose, by name, such as {"weight": 0.8}. short_hash: A1111's
    own of the file, where it has one.
    """

    kind: str
    name: str
    file: str
    sha256: str
    weights: Mapping[str, float] = field(default_factory=dict)
    short_hash: str = ""

    def __str__(self) -> str:
        chosen = ", ".join(f"{name} {value:g}" for name, value in self.weights.items())
        return f"{self.kind} {self.name}{f' ({chosen})' if chosen else ''}"


@dataclass(frozen=True, eq=False)
class Model:
    """Stable Diffusion 1.x, as `minidiff.load` returns it.

    Weights are frozen (no gradients) and shared by all who hold it.

    `name` is the hub id, or the name of the folder or file; `origin` the folder or file that was read;
    `options` the arguments of `load` that change the images (plain values), for the record; `dtype_choice` why load
    took its dtype, where it was not told; `int8` whether the UNet's layers compute in int8. `adapters`: what was put on
    it since, in that order; `image_adapters`: of those that take pictures, what makes tokens of them. `safety`: the
    checker that looks at finished pictures, where load was asked for it.
    """

    name: str
    origin: Path
    unet: UNet
    vae: VAE
    text: TextEncoder
    noise: NoiseSchedule
    defaults: Defaults = Defaults()
    options: Mapping[str, str] = field(default_factory=dict)
    dtype_choice: str = ""
    int8: bool = False
    adapters: tuple[Adapter, ...] = ()
    safety: SafetyChecker | None = None
    image_adapters: tuple[ImageAdapter, ...] = ()

    def __repr__(self) -> str:
        on = f" with {', '.join(map(str, self.adapters))}" if self.adapters else ""
        return f"<Model {self.name}{on}, {self.dtype_name} on {self.device}>"

    @property
    def dtype(self) -> torch.dtype:
        """What the networks take, give and, but for layers in int8, compute in."""
        return self.unet.conv_in.weight.dtype

    @property
    def dtype_name(self) -> str:
        """The argument of `load` for this dtype: "int8", "float32" or the like."""
        return "int8" if self.int8 else str(self.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.unet.conv_in.weight.device

    @cached_property
    def sha256(self) -> str | None:
        """Of the single file that was loaded, read once when first asked for; None for a folder."""
        if not self.origin.is_file():
            return None
        with self.origin.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def facts(self, changed: int) -> "dict[str, Plain]":
        """What made an image besides the arguments of its call, for its recipe. changed: how many weights were."""
        return {
            "versions": {name: _version(name) for name in ("minidiff", "torch", "transformers")},
            **({"changed_weights": changed} if changed else {}),
            "dtype": self.dtype_name,
            **({"dtype_choice": self.dtype_choice} if self.dtype_choice else {}),
            "device": self.device.type,
            "load": dict(self.options),
            **({"adapters": [asdict(adapter) for adapter in self.adapters]} if self.adapters else {}),
            "model": {"kind": self._kind, "name": self.name, "sha256": self.sha256},
            "model_hash": None if self.sha256 is None else self.sha256[:10],  # A1111's
        }

    @property
    def _kind(self) -> str:
        """Where it is from: "bundled", "hub", "file" or "folder". Only hub ids and the bundled name have a slash."""
        if self.name == BUNDLED:
            return "bundled"
        return "hub" if "/" in self.name else "file" if self.origin.is_file() else "folder"

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """images [B,3,H,W] in [-1,1] -> float32 latents [B,4,h,w] at the UNet's scale.

        Their mean, or with unit `noise` [B,4,h,w] a sample.
        """
        tensor("images", images, 4, "[B,3,H,W] in [-1,1], such as pixels / 127.5 - 1")
        least, most = images.min().item(), images.max().item()
        if max(-least, most) > 10:
            raise ValueError(f"images hold values from {least:g} to {most:g}; expected [-1,1]: pixels / 127.5 - 1")
        if least >= 0:
            warn(f"images hold values from {least:g} to {most:g}, none below 0; [-1,1] was expected: 2 * images - 1")
        return self.latents(images, noise)

    @torch.no_grad()
    def latents(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """The same for images that need no check."""
        noise = None if noise is None else noise.to(self.device, self.dtype)
        return self.vae.encode(images.to(self.device, self.dtype), noise).float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B,4,h,w] at the UNet's scale -> float32 images [B,3,H,W], about [-1,1] and not clamped.

        Where half precision overflows the image is decoded again in float32, so only latents that are not finite give
        one that is not.
        """
        latents = (latents / self.vae.config.scaling_factor).to(self.device)
        images = self.vae.decode(latents.to(self.dtype)).float()
        if self.dtype == torch.float32 or images.isfinite().all() or not latents.isfinite().all():
            return images
        warn(f"an image overflowed in {str(self.dtype).removeprefix('torch.')} and was decoded again in float32")
        weights = {f"vae.{name}": value.float() for name, value in self.vae.state_dict().items()}
        return torch.func.functional_call(_Decode(self.vae), weights, (latents.float(),))


def sites(
    model: Model, where: Where | None = None, *, width: int | None = None, height: int | None = None
) -> dict[Site, Grid]:
    """The attention layers of a model in the order in which they run, each with its grid (h, w).

    where: which (`cross & at_most(16)`); default: all. width, height: of the image in pixels; default: what the UNet
    was trained on. ValueError where there is none, with a list of those there are.
    """
    factor, edge = model.vae.config.factor, model.unet.config.sample_size
    there = model.unet.positions(*(edge if size is None else size // factor for size in (height, width)))
    chosen = there.keys() if where is None else choose(where, there)
    return {site: at.grid for site, at in there.items() if site in chosen}


class _Decode(torch.nn.Module):
    """functional_call reaches a module's forward only."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents)
