"""Noise schedules: what a model was trained on, and the discretisation of one run.

betas -> alphas_cumprod (`NoiseSchedule`); timesteps and sigmas (`Schedule`), which the samplers make with spacing.py.
Two spaces appear. In "vp" (variance preserving) x = sqrt(abar) * x0 + sqrt(1 - abar) * eps; in "ve" (variance
exploding) x = x0 + sigma * eps. They differ by a factor: x_ve = x_vp * sqrt(1 + sigma^2), with abar = 1 / (1 +
sigma^2).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Numbers = Sequence[float] | Tensor | NDArray[np.float32] | Floats
Custom = Numbers | None  # a caller's own timesteps or sigmas

PREDICTION_TYPES = ("epsilon", "v_prediction")
SPACINGS = ("leading", "linspace", "trailing")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

# scheduler/scheduler_config.json of stable-diffusion-v1-5; what a single file, which carries no config, was trained on.
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
    """What a model was trained on, and how its scheduler_config.json wants it sampled.

    Change one with dataclasses.replace.

    alphas_cumprod: float32 [T] on the CPU, bit-equal to diffusers'; strictly between 0 and 1, descending.
    timestep_spacing, set_alpha_to_one: None where the config is silent: then each sampler has diffusers' own default.
    steps_offset: added to the timesteps of leading spacing.
    skip_prk_steps: False asks PNDM for Runge-Kutta warm-up steps, which minidiff has not (PNDM then refuses).
    sampler: the name the config's _class_name stands for, None with `refusal` saying why when minidiff has it not.
    """

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 1
    set_alpha_to_one: bool | None = None
    skip_prk_steps: bool = True
    beta_schedule: str = "scaled_linear"
    sampler: str | None = "pndm"
    refusal: str = ""

    def __post_init__(self) -> None:
        check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        if self.timestep_spacing is not None:
            check_choice("timestep_spacing", self.timestep_spacing, SPACINGS)
        abar = self.alphas_cumprod
        if abar.ndim != 1 or abar.dtype != torch.float32 or abar.numel() < 2:
            raise ValueError(f"alphas_cumprod is {abar.dtype} {list(abar.shape)}; expected float32 [T], T at least 2")
        if not bool(((abar > 0) & (abar < 1)).all() and (abar.diff() < 0).all()):
            raise ValueError("alphas_cumprod must fall strictly inside (0, 1): check the betas, each between 0 and 1")

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> NoiseSchedule:
        """Read a scheduler_config.json. A missing key has diffusers' default; what cannot be honoured is a ValueError.

        Two exceptions, both because StableDiffusionPipeline overrides its scheduler: a missing steps_offset is 1, and
        clip_sample is ignored (latents are never clipped). A missing skip_prk_steps is read as True. Settings of the
        config's own algorithm that minidiff has not (`sde-dpmsolver++`, say) do not refuse the model: they leave
        `sampler` None, so that another one can be chosen.
        """
        for key in ("rescale_betas_zero_snr", "thresholding"):
            if _flag(config, key):
                raise ValueError(f"scheduler config: {key} is true, which minidiff does not do; use another model")
        if config.get("timestep_type") == "continuous" or config.get("variance_type") in ("learned", "learned_range"):
            key = "timestep_type" if config.get("timestep_type") == "continuous" else "variance_type"
            raise ValueError(f"scheduler config: {key} {config[key]!r} is not Stable Diffusion's; use another model")
        spacing = config.get("timestep_spacing")
        sampler, refusal = _named_sampler(config)
        return cls(
            alphas_cumprod=torch.cumprod(1.0 - _betas(config), dim=0),
            prediction_type=check_choice("prediction_type", config.get("prediction_type", "epsilon"), PREDICTION_TYPES),
            timestep_spacing=None if spacing is None else check_choice("timestep_spacing", spacing, SPACINGS),
            steps_offset=_integer(config, "steps_offset", 1, minimum=0),
            set_alpha_to_one=None if config.get("set_alpha_to_one") is None else _flag(config, "set_alpha_to_one"),
            skip_prk_steps=config.get("skip_prk_steps") is None or _flag(config, "skip_prk_steps"),
            beta_schedule=check_choice("beta_schedule", config.get("beta_schedule", "linear"), BETA_SCHEDULES),
            sampler=sampler,
            refusal=refusal,
        )

    @property
    def num_train_timesteps(self) -> int:
        return self.alphas_cumprod.numel()

    def training_sigmas(self) -> NDArray[np.float32]:
        """Sigma of every training timestep, ascending [T], rounded to float32 as diffusers keeps them."""
        sigmas: NDArray[np.float32] = (((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5).numpy()
        return sigmas

    def exact_sigmas(self) -> Floats:
        """The same in float64, so that 1 / (1 + sigma^2) gives alphas_cumprod back. For samplers that think in abar."""
        abar = self.alphas_cumprod.double().numpy()
        sigmas: Floats = np.sqrt((1 - abar) / abar)
        return sigmas


@dataclass(frozen=True, eq=False)
class Schedule:
    """The discretisation of one run. It stays on the CPU: the loop never waits for a GPU to read a number of it.

    timesteps: [calls], what the network is told; int64 or float32, as diffusers has it.
    sigmas: float64 [calls], the actual noise level of x at each call, noise over signal: abar = 1 / (1 + sigma^2).
    spans: for each call the sigmas (from, to) between which the sampler's formula steps; the last `to` is the run's
    end.
        Mostly (sigmas[i], sigmas[i + 1]); DDIM and PNDM count back T // steps timesteps instead, as diffusers does.
    index: the step that each call belongs to; PNDM's first two calls are both step 0.
    init_scale: what unit-variance latents are multiplied by. space: "vp" or "ve". sampler: the name of what made it.
    """

    timesteps: Tensor
    sigmas: Tensor
    spans: tuple[tuple[float, float], ...]
    index: tuple[int, ...]
    init_scale: float
    space: str
    prediction_type: str
    sampler: str

    @property
    def steps(self) -> int:
        return self.index[-1] + 1

    def abar(self, call: int) -> float:
        """Signal variance at a call, in (0, 1): of the schedule's own sigma, never a look-up at a rounded timestep."""
        return 1.0 / (1.0 + float(self.sigmas[call]) ** 2)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    """The value as a str when it is one of the choices, else a ValueError that lists them."""
    if isinstance(value, str) and value in choices:
        return value
    raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def _betas(config: Mapping[str, object]) -> Tensor:
    """Noise variances of the training steps, float32 [T], by the operations diffusers uses so that every bit agrees."""
    trained = config.get("trained_betas")
    if trained is not None:
        if not isinstance(trained, Sequence) or isinstance(trained, str) or len(trained) < 2:
            raise ValueError(f"scheduler config: trained_betas is {trained!r}; expected null or a list of numbers")
        if len(trained) != (steps := _integer(config, "num_train_timesteps", len(trained), minimum=2)):
            raise ValueError(f"scheduler config: {len(trained)} trained_betas, but num_train_timesteps is {steps}")
        return torch.tensor([float(beta) for beta in trained], dtype=torch.float32)
    steps = _integer(config, "num_train_timesteps", 1000, minimum=2)
    kind = check_choice("beta_schedule", config.get("beta_schedule", "linear"), BETA_SCHEDULES)
    if kind == "squaredcos_cap_v2":  # Nichol and Dhariwal 2021, eq. 17; the cap 0.999 keeps the last abar above 0
        level = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        return torch.tensor([min(1 - b / a, 0.999) for a, b in itertools.pairwise(level)], dtype=torch.float32)
    start, end = _number(config, "beta_start", 0.0001), _number(config, "beta_end", 0.02)
    if not 0 < start <= end < 1:
        raise ValueError(f"scheduler config: beta_start {start} and beta_end {end}; expected 0 < start <= end < 1")
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float32)
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2


# diffusers' class -> our sampler and the values of its settings that ours has (the first is diffusers' default)
_ONE_GRID: dict[str, tuple[object, ...]] = {"use_exponential_sigmas": (False,), "use_beta_sigmas": (False,)}
_EULER: dict[str, tuple[object, ...]] = {"interpolation_type": ("linear",), "final_sigmas_type": ("zero",)}
_DPMPP: dict[str, tuple[object, ...]] = {
    "algorithm_type": ("dpmsolver++", "deis"),  # diffusers reads deis as dpmsolver++ and bh1, bh2, logrho as midpoint
    "solver_order": (2,),
    "solver_type": ("midpoint", "bh1", "bh2", "logrho"),
    "final_sigmas_type": ("zero",),
    "lambda_min_clipped": (-math.inf,),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
}
_CLASSES: dict[str, tuple[str, dict[str, tuple[object, ...]]]] = {
    "DDIMScheduler": ("ddim", {}),
    "PNDMScheduler": ("pndm", {}),
    "EulerDiscreteScheduler": ("euler", {**_ONE_GRID, **_EULER, "sigma_min": (None,), "sigma_max": (None,)}),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", {}),
    "LMSDiscreteScheduler": ("lms", _ONE_GRID),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", {**_ONE_GRID, **_DPMPP}),
}


def _named_sampler(config: Mapping[str, object]) -> tuple[str | None, str]:
    """Our name of the config's algorithm and "", or None and why we have it not."""
    kind = config.get("_class_name")
    if not isinstance(kind, str) or kind not in _CLASSES:
        return None, f"_class_name {kind!r}"
    name, settings = _CLASSES[kind]
    for key, known in settings.items():
        value = config.get(key)
        if value is not None and value not in known:
            return None, f"{kind} with {key} {value!r}"
    has_karras = kind in ("EulerDiscreteScheduler", "LMSDiscreteScheduler", "DPMSolverMultistepScheduler")
    return name + ("_karras" if has_karras and _flag(config, "use_karras_sigmas") else ""), ""


def _number(config: Mapping[str, object], key: str, default: float) -> float:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"scheduler config: {key} is {value!r}; expected a number")
    return float(value)


def _integer(config: Mapping[str, object], key: str, default: int, minimum: int) -> int:
    value = _number(config, key, default)
    if value != int(value) or value < minimum:
        raise ValueError(f"scheduler config: {key} is {value:g}; expected a whole number, at least {minimum}")
    return int(value)


def _flag(config: Mapping[str, object], key: str) -> bool:
    value = config.get(key)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise ValueError(f"scheduler config: {key} is {value!r}; expected true or false")
