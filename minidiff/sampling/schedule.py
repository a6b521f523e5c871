"""The noise schedule of a model's training: betas -> alphas_cumprod, and the sampling settings of its config."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minidiff.checks import Check, checked, choice, number, shown, whole
from minidiff.sampling.samplers import sampler_class
from minidiff.sampling.samplers._sampler import Sampler
from minidiff.vocabulary import BETA_SCHEDULES, PREDICTION_TYPES, SPACINGS, read_sampler

Floats = NDArray[np.float64]
Numbers = Sequence[float] | Tensor | NDArray[np.float32] | Floats
Custom = Numbers | None  # a caller's own timesteps or sigmas

MOST_TIMESTEPS = 100_000  # 100 times that of any Stable Diffusion; tables and runs grow with it
# Switches that change the noise levels or the latents. They are in the `settings` of samplers whose scheduler in
# diffusers has them; the others ignore them.
_SWITCHES = ("rescale_betas_zero_snr", "thresholding")

# What diffusers' DPMSolverMultistepScheduler is with algorithm_type sde-dpmsolver++, by its other settings.
_SDE = ("dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde")

_TABLE: Mapping[str, Check] = MappingProxyType(
    {
        "beta_schedule": partial(choice, choices=BETA_SCHEDULES),
        "prediction_type": partial(choice, choices=PREDICTION_TYPES),
        "timestep_spacing": partial(choice, choices=SPACINGS),
        "steps_offset": partial(whole, least=0, most=MOST_TIMESTEPS),
        "num_train_timesteps": partial(whole, least=2, most=MOST_TIMESTEPS),
        "beta_start": number,
        "beta_end": number,
    }
)
_DEFAULTS: Mapping[str, object] = MappingProxyType(
    {
        "beta_schedule": "linear",
        "prediction_type": "epsilon",
        "steps_offset": 1,
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
    }
)
_NEVER_NULL = ("beta_schedule", "prediction_type")

# scheduler/scheduler_config.json of stable-diffusion-v1-5, also used for single files, which have no config.
SD15_SCHEDULER_CONFIG: Mapping[str, object] = MappingProxyType(
    {
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "clip_sample": False,
        "trained_betas": None,
    }
)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise levels a model was trained on, and the sampling settings of its scheduler_config.json.

    Change one with dataclasses.replace.

    alphas_cumprod: float32 [T] on the CPU, bit-equal to diffusers'; strictly between 0 and 1, descending.
    timestep_spacing, set_alpha_to_one: None if not in the config: each sampler then uses diffusers' own default.
    steps_offset: added to the timesteps of leading spacing.
    skip_prk_steps: False asks PNDM for Runge-Kutta warm-up steps, which are not implemented: PNDM then raises.
    sampler: the config's own, with its noise levels; None if it is not implemented; `refusal` then gives the reason:
        "names HeunDiscreteScheduler, which ...".
    switches: those of rescale_betas_zero_snr and thresholding that are on. alphas_cumprod is the one before rescaling,
        since some samplers ignore it. Thresholding is not implemented: samplers that it would affect refuse this model.
    """

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 1
    set_alpha_to_one: bool | None = None
    skip_prk_steps: bool = True
    beta_schedule: str = "scaled_linear"
    sampler: Sampler | None = field(default_factory=lambda: sampler_class("pndm")())
    refusal: str = ""
    switches: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        if self.timestep_spacing is not None:
            choice("timestep_spacing", self.timestep_spacing, SPACINGS)
        abar = self.alphas_cumprod
        if abar.ndim != 1 or abar.dtype != torch.float32 or abar.numel() < 2:
            raise ValueError(f"alphas_cumprod is {abar.dtype} {list(abar.shape)}; expected float32 [T], T at least 2")
        if not bool(((abar > 0) & (abar < 1)).all() and (abar.diff() < 0).all()):
            raise ValueError("alphas_cumprod must decrease strictly within (0, 1); the betas must be between 0 and 1")

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> NoiseSchedule:
        """Read a scheduler_config.json. A missing key has diffusers' default; an invalid value is a ValueError.

        Two exceptions, both because StableDiffusionPipeline overrides its scheduler: a missing steps_offset is 1, and
        clip_sample is ignored (latents are never clipped). A missing skip_prk_steps is read as True. Settings of the
        config's own algorithm that are not implemented (e.g. `sde-dpmsolver++`) are no error: `sampler` is then None,
        so that another one can be chosen.
        """
        read = _read(config)
        switches = tuple(key for key in _SWITCHES if _flag(config, key))
        sampler, refusal = _own_sampler(config)
        return cls(
            alphas_cumprod=torch.cumprod(1.0 - _betas(read, config), dim=0),
            prediction_type=read["prediction_type"],
            timestep_spacing=read.get("timestep_spacing"),
            steps_offset=read["steps_offset"],
            set_alpha_to_one=None if config.get("set_alpha_to_one") is None else _flag(config, "set_alpha_to_one"),
            skip_prk_steps=config.get("skip_prk_steps") is None or _flag(config, "skip_prk_steps"),
            beta_schedule=read["beta_schedule"],
            sampler=sampler,
            refusal=refusal,
            switches=switches,
        )

    @property
    def num_train_timesteps(self) -> int:
        return self.alphas_cumprod.numel()

    def up_to_pure_noise(self, last: float) -> NoiseSchedule:
        """With rescale_betas_zero_snr, the schedule of Lin et al. 2023 (arXiv 2305.08891), Alg. 1; else this one.

        last: the last abar, which is 0 in the paper. 2^-60 stands for 0, where the clean latents' part of x is 1e-9, so
        that sigmas are finite.
        """
        if "rescale_betas_zero_snr" not in self.switches:
            return self
        root = self.alphas_cumprod.sqrt()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        alphas = torch.cat([root[:1] ** 2, root[1:] ** 2 / root[:-1] ** 2])
        abar = torch.cumprod(1 - (1 - alphas), dim=0)  # by way of betas, for diffusers' bits
        abar[-1] = max(last, 2**-60)
        return replace(self, alphas_cumprod=abar, switches=())

    def training_sigmas(self) -> NDArray[np.float32]:
        """Sigma of every training timestep, ascending [T], rounded to float32 as diffusers keeps them."""
        sigmas: NDArray[np.float32] = (((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5).numpy()
        return sigmas

    def exact_sigmas(self) -> Floats:
        """The same in float64, so that 1 / (1 + sigma^2) gives alphas_cumprod back. For samplers that use abar."""
        abar = self.alphas_cumprod.double().numpy()
        sigmas: Floats = np.sqrt((1 - abar) / abar)
        return sigmas


def _read(config: Mapping[str, object]) -> dict[str, Any]:
    """The values of _TABLE, or diffusers' defaults. Some files have 1000.0 for 1000."""
    found = {key: config[key] for key in _TABLE if key in config and (config[key] is not None or key in _NEVER_NULL)}
    given = {
        key: int(value) if isinstance(value, float) and value.is_integer() else value
        for key, value in {**_DEFAULTS, **found}.items()
    }
    return checked(given, _TABLE, "scheduler config: ")


def _betas(read: Mapping[str, Any], config: Mapping[str, object]) -> Tensor:
    """Noise variances of the training steps, float32 [T], by the same operations as in diffusers, for equal bits."""
    trained = config.get("trained_betas")
    if trained is not None:
        if not isinstance(trained, list | tuple) or not 2 <= len(trained) <= MOST_TIMESTEPS:
            raise ValueError(f"scheduler config: trained_betas is {shown(trained)}; expected null or a list of numbers")
        steps = len(trained) if config.get("num_train_timesteps") is None else read["num_train_timesteps"]
        if len(trained) != steps:
            raise ValueError(f"scheduler config: {len(trained)} trained_betas, but num_train_timesteps is {steps}")
        betas = [number("scheduler config: trained_betas", beta, 0, 1) for beta in trained]
        return torch.tensor(betas, dtype=torch.float32, device="cpu")
    steps, kind = read["num_train_timesteps"], read["beta_schedule"]
    if kind == "squaredcos_cap_v2":  # Nichol and Dhariwal 2021, eq. 17; the cap 0.999 keeps the last abar above 0
        level = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        betas = [min(1 - b / a, 0.999) for a, b in itertools.pairwise(level)]
        return torch.tensor(betas, dtype=torch.float32, device="cpu")
    start, end = read["beta_start"], read["beta_end"]
    if not 0 < start <= end < 1:
        raise ValueError(f"scheduler config: beta_start {start} and beta_end {end}; expected 0 < start <= end < 1")
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float32, device="cpu")
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32, device="cpu") ** 2


def _own_sampler(config: Mapping[str, object]) -> tuple[Sampler | None, str]:
    """(The config's sampler, "") or (None, what in the config is not implemented)."""
    kind = config.get("_class_name")
    if kind is None:
        return None, "names no scheduler (it has no _class_name)"
    try:
        name = read_sampler(kind)[0] if str(kind).endswith("Scheduler") else None
    except ValueError:
        name = None
    if name is None:
        return None, f"names {shown(kind)}, which is not implemented"
    for levels in ("karras", "exponential", "beta"):
        _flag(config, f"use_{levels}_sigmas")
    refusals = []
    stochastic = name == "dpmpp_2m" and config.get("algorithm_type") == "sde-dpmsolver++"
    for one in _SDE if stochastic else (name,):
        made = sampler_class(one)
        wrong = [key for key, known in made.settings.items() if config.get(key) not in (None, *known)]
        if not wrong:
            return made(**made.of_config(config)), ""
        refusals.append(f"names {kind} with {wrong[0]} {shown(config[wrong[0]])}, which is not implemented")
    return None, refusals[0]


def _flag(config: Mapping[str, object], key: str) -> bool:
    value = config.get(key)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise ValueError(f"scheduler config: {key} is {shown(value)}; expected true or false")
