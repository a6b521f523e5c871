"""The names of samplers, schedules and objectives, and how other programs spell them. Needs no torch.

A sampler or an objective exists if its file does: sampling/samplers/NAME.py, guidance/objectives/NAME.py.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Any, TypeVar

from .checks import choice, shown

_Value = TypeVar("_Value")
_Made = TypeVar("_Made", bound=Callable[..., object])
_HERE = Path(__file__).parent


def _stems(folder: Path) -> tuple[str, ...]:
    """The modules of a folder that do not start with an underscore, sorted."""
    return tuple(sorted(name for _, name, _ in iter_modules([str(folder)]) if not name.startswith("_")))


BUNDLED = "minidiff/shapes"
"""The name of the model that ships inside the package."""
SAMPLERS = _stems(_HERE / "sampling" / "samplers")
OBJECTIVES = _stems(_HERE / "guidance" / "objectives") or (
    *(
        "inside",
        "extent",
        "layout",
        "attend_and_excite",
        "bounded_attention",
        "boxdiff",
        "conform",
        "ilgd",
        "initno",
        "refocusing",
        "relation",
        "rnb",
        "self_cross",
        "self_refocusing",
        "tradiffusion",
        "winwinlay",
    ),
)
PRESETS = ("fast", "balanced", "best")
"""Names that `guidance` takes besides those of objectives: guidance/presets.py."""
RELATIONS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "left of": (0, -1),
        "right of": (0, 1),
        "above": (1, -1),
        "below": (1, 1),
        "smaller than": (2, -1),
        "larger than": (2, 1),
    }
)
"""A relation -> which of x, y (down) and size it compares, and whether the first is more (1) or less (-1)."""
SPACINGS = ("leading", "linspace", "trailing")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SYNTAXES = ("plain", "a1111")
EMPHASES = ("a1111", "compel", "none")
PREDICTION_TYPES = ("epsilon", "v_prediction")

# Known samplers under the name they have or would have here, and A1111's spelling (ComfyUI's if A1111 has none).
# SAMPLERS says which of them are implemented.
_FIELD: Mapping[str, str] = MappingProxyType(
    {
        "ddim": "DDIM",
        "pndm": "PLMS",
        "euler": "Euler",
        "euler_ancestral": "Euler a",
        "lms": "LMS",
        "dpmpp_2m": "DPM++ 2M",
        "heun": "Heun",
        "heunpp2": "Heun++ 2",
        "dpm2": "DPM2",
        "dpm2_ancestral": "DPM2 a",
        "dpm_fast": "DPM fast",
        "dpm_adaptive": "DPM adaptive",
        "dpmpp_2s": "DPM++ 2S",
        "dpmpp_2s_ancestral": "DPM++ 2S a",
        "dpmpp_sde": "DPM++ SDE",
        "dpmpp_2m_sde": "DPM++ 2M SDE",
        "dpmpp_2m_sde_heun": "DPM++ 2M SDE Heun",
        "dpmpp_3m_sde": "DPM++ 3M SDE",
        "restart": "Restart",
        "uni_pc": "UniPC",
        "uni_pc_bh2": "uni_pc_bh2",
        "deis": "DEIS",
        "ipndm": "IPNDM",
        "ipndm_v": "ipndm_v",
        "ddpm": "DDPM",
        "lcm": "LCM",
        "tcd": "TCD",
        "er_sde": "er_sde",
        "res_multistep": "res_multistep",
        "euler_cfg_pp": "Euler CFG++",
        "euler_ancestral_cfg_pp": "Euler a CFG++",
        "dpmpp_2m_cfg_pp": "DPM++ 2M CFG++",
        "dpmpp_2s_ancestral_cfg_pp": "DPM++ 2S a CFG++",
        "ddim_cfg_pp": "DDIM CFG++",
    }
)
# Names that the rules below miss: diffusers' classes without Discrete and Scheduler, and ComfyUI's own names.
_ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "dpmsolvermultistep": "dpmpp_2m",
        "dpmsolversinglestep": "dpmpp_2s",
        "dpmsolversde": "dpmpp_sde",
        "kdpm2": "dpm2",
        "kdpm2ancestral": "dpm2_ancestral",
        "unipcmultistep": "uni_pc",
        "deismultistep": "deis",
        "dpmppsdegpu": "dpmpp_sde",
        "dpmpp2msdegpu": "dpmpp_2m_sde",
        "dpmpp3msdegpu": "dpmpp_3m_sde",
    }
)
SCHEDULES: Mapping[str, str] = MappingProxyType(
    {
        "uniform": "Uniform",
        "karras": "Karras",
        "exponential": "Exponential",
        "beta": "Beta",
        "sgm_uniform": "SGM Uniform",
    }
)
"""Noise levels, and A1111's names for them. "uniform" are those of the timesteps, as they are spaced."""
# Their spellings, squashed, which may end a sampler's name, the longest first; and what to do instead of others.
_LEVELS: Mapping[str, str] = MappingProxyType(
    {
        "karras": "karras",
        "discrete": "uniform",
        "normal": "uniform",
        "sgmuniform": "sgm_uniform",
        "uniform": "uniform",
        "polyexponential": "exponential",  # with k-diffusion's rho of 1
        "exponential": "exponential",
        "beta": "beta",
    }
)
_INSTEAD: Mapping[str, str] = MappingProxyType(
    {
        "simple": 'pass spacing="trailing", which is the same',
        "ays": "pass timesteps=[999, 850, 736, 645, 545, 455, 343, 233, 124, 24]",
        "alignyoursteps": "pass timesteps=[999, 850, 736, 645, 545, 455, 343, 233, 124, 24]",
    }
)


def _squashed(text: str) -> str:
    """Lower-case letters and digits only, without diffusers' endings: "DPM++ 2M" and "dpmpp_2m" become dpmpp2m."""
    plain = re.sub(r"[^a-z0-9]", "", text.lower().replace("++", "pp"))
    if plain.endswith("scheduler"):
        plain = plain.removesuffix("scheduler").removesuffix("discrete")
    return plain


_NAMES: Mapping[str, str] = MappingProxyType(
    {
        **{_squashed(text): name for name, label in _FIELD.items() for text in (label, name)},
        **{_squashed(name): name for name in SAMPLERS},
        **_ALIASES,
    }
)


def read_schedule(text: object) -> str:
    """Our name for noise levels in any spelling ("SGM Uniform", "normal"). ValueError for others."""
    plain = _squashed(text) if isinstance(text, str) else ""
    if plain in _INSTEAD:
        raise ValueError(f"schedule is {shown(text)}, which is not implemented: {_INSTEAD[plain]}")
    return _LEVELS[plain] if plain in _LEVELS else choice("schedule", text, tuple(SCHEDULES))


def read_sampler(text: object, schedule: str | None = None) -> tuple[str, str | None]:
    """Our names for a sampler in any spelling and for its noise levels: one of SCHEDULES, or None if it does not say.

    Ours, A1111's ("DPM++ 2M Karras", "Euler a", "PLMS"), ComfyUI's and k-diffusion's ("dpmpp_2m", "k_euler_a",
    "sample_lms"), stable-diffusion.cpp's ("euler_a discrete") and diffusers' ("EulerAncestralDiscreteScheduler").
    schedule: the separate setting, if any. ValueError if it contradicts the name, for a sampler that is not implemented
    (with its usual name), and for an unknown name.
    """
    if not isinstance(text, str):
        raise ValueError(f"sampler is {shown(text)}; expected one of {', '.join(SAMPLERS)}")
    plain = _squashed(text)
    levels = "" if _known(plain) else next((word for word in (*_LEVELS, *_INSTEAD) if plain.endswith(word)), "")
    name = _known(plain.removesuffix(levels))
    if name is None:
        return choice("sampler", text, SAMPLERS), None  # raises
    if name not in SAMPLERS:
        label = _FIELD.get(name, name)
        spelt = label if text == label else f"{shown(text)} is {label}, which"
        raise ValueError(f"sampler {spelt} is not implemented; expected one of {', '.join(SAMPLERS)}")
    if levels in _INSTEAD:
        raise ValueError(
            f"sampler is {shown(text)}; the noise levels {levels!r} are not implemented: {_INSTEAD[levels]}"
        )
    said = _LEVELS.get(levels)
    if said is not None and schedule is not None and said != schedule:
        raise ValueError(
            f"schedule is {schedule!r} but the sampler is {shown(text)}; leave schedule out, or name it {name!r}"
        )
    return name, said if schedule is None else schedule


def a1111_sampler(name: str, schedule: str = "uniform") -> str:
    """A1111's spelling of one of our names: ("dpmpp_2m", "karras") -> "DPM++ 2M Karras". Unknown names are kept.

    Only Karras is part of the name; A1111 writes the others beside it.
    """
    return f"{_FIELD.get(name, name)}{' Karras' if schedule == 'karras' else ''}"


def modernised(fields: Mapping[str, _Value]) -> dict[str, _Value | str]:
    """The fields of a request as they are called today: `karras`, true or false, became `schedule`."""
    found: dict[str, _Value | str] = dict(fields)
    if isinstance(found.get("karras"), bool):
        found["schedule"] = "karras" if found.pop("karras") else "uniform"
    return found


def _known(plain: str) -> str | None:
    """Our name for squashed text, with or without k-diffusion's prefixes."""
    candidates = (plain, plain.removeprefix("sample"), plain.removeprefix("k"))
    return next((_NAMES[one] for one in candidates if one in _NAMES), None)


KEYWORDS: Mapping[str, str] = MappingProxyType(
    {
        # another name
        "num_inference_steps": "steps",
        "sampling_steps": "steps",
        "num_steps": "steps",
        "ddim_steps": "steps",
        "cfg": "guidance_scale",
        "cfg_scale": "guidance_scale",
        "scale": "guidance_scale",
        "guidance_rescale_factor": "guidance_rescale",
        "num_images_per_prompt": "images_per_prompt",
        "num_images": "images_per_prompt",
        "batch_size": "images_per_prompt",
        "images": "images_per_prompt",
        "n_samples": "images_per_prompt",
        "n_iter": "images_per_prompt",
        "prompt_embeds": "context",
        "negative_prompt_embeds": "negative_context",
        "prompts": "prompt",
        "init_image": "image",
        "input_image": "image",
        "mask_image": "mask",
        "denoising_strength": "strength",
        "resize_mode": "fit",
        "text": "prompt",
        "negative": "negative_prompt",
        "uncond_prompt": "negative_prompt",
        "sampler_name": "sampler",
        "sampler_index": "sampler",
        "scheduler": "sampler",
        "sample_method": "sampler",
        "schedule_type": "schedule",
        "timestep_spacing": "spacing",
        "ddim_eta": "eta",
        "seeds": "seed",
        "output_type": "output",
        "bboxes": "boxes",
        "gligen_boxes": "boxes",
        "edit": "edits",
        "ip_adapter_image": "image_prompt",
        "ip_adapter_scale": "image_prompt_scale",
        "record": "attention",
        "pipe": "model",
        "checkpoint": "model",
        "model_id": "model",
        "show_progress": "progress",
        # another way
        "karras": 'pass schedule="karras"',
        "use_karras_sigmas": 'pass schedule="karras"',
        "use_exponential_sigmas": 'pass schedule="exponential"',
        "use_beta_sigmas": 'pass schedule="beta"',
        "size": "pass width= and height=, in pixels",
        "resolution": "pass width= and height=, in pixels",
        "H": "pass height=, in pixels",
        "W": "pass width=, in pixels",
        "generator": "pass seed=: a whole number, or one per image",
        "token_indices": 'pass boxes={"phrase": box}, or boxes={3: box} where 3 is the token\'s position',
        "phrases": 'pass boxes={"phrase": box}: the phrases are its keys',
        "gligen_phrases": 'pass boxes={"phrase": box}: the phrases are its keys',
        "loss_scale": "pass guidance=Guidance(scale=...)",
        "max_iter_to_alter": "pass guidance=Guidance(steps=...)",
        "callback": "loop over sample_steps(...), which yields every step",
        "callback_steps": "loop over sample_steps(...), which yields every step",
        "callback_on_step_end": "loop over sample_steps(...), which yields every step",
        "callback_on_step_end_tensor_inputs": "loop over sample_steps(...); a step holds latents, denoised and maps",
        "return_dict": "leave it out: generate returns a Result, with .images",
        "device": 'pass it to load: load(model, device="cuda")',
        "dtype": 'pass it to load: load(model, dtype="float16")',
        "torch_dtype": 'pass it to load: load(model, dtype="float16")',
        "vae": "pass it to load: load(model, vae=...)",
        "variant": "pass it to load: load(model, variant=...)",
        "revision": "pass it to load: load(model, revision=...)",
        "safety_checker": "pass it to load: load(model, safety=True)",
        "compile": "pass it to load: load(model, compile=True)",
        "tokenizer": "pass it to load: load(model, tokenizer=...)",
        "loras": "pass it to load: load(model, loras=...)",
        "words": "pass it to load: load(model, words=...)",
        "cross_attention_kwargs": "pass edits= or attention=",
        # no counterpart
        "control_image": "minidiff has no ControlNet",
        "controlnet_conditioning_scale": "minidiff has no ControlNet",
        "enable_hr": "make a second pass: generate(request, image=result.image, width=..., height=..., strength=0.5)",
        "hires_fix": "make a second pass: generate(request, image=result.image, width=..., height=..., strength=0.5)",
        "restore_faces": "minidiff does not post-process images",
        "tiling": "minidiff cannot make seamless tiles",
    }
)
"""Keywords of other programs -> our field, or a sentence that says what to do."""


def unknown(name: str, names: Sequence[str]) -> str:
    """The message for a keyword that is none of `names`: ours for another program's, or the closest, or all."""
    hint = KEYWORDS.get(name, "")
    near = difflib.get_close_matches(name, names, n=1)
    if hint in names:
        advice = f"; its name here is {hint!r}"
    elif hint and not hint.isidentifier():
        advice = f"; {hint}"
    elif near:
        advice = f"; did you mean {near[0]!r}?"
    else:
        advice = _all(names)
    return f"there is no argument {name!r}{advice}"


def _all(names: Sequence[str]) -> str:
    return f"; expected {', '.join(names)}" if len(names) < 20 else ""


def own_keywords(made: _Made) -> _Made:
    """Let a class or a function answer a wrong call with a TypeError that names our arguments."""
    plain: Any = made.__init__ if isinstance(made, type) else made  # type: ignore[misc]  # the class's own
    signature = inspect.signature(plain)
    names = [name for name in signature.parameters if name != "self"]

    @wraps(plain)
    def call(*args: Any, **given: Any) -> Any:
        try:
            return plain(*args, **given)
        except TypeError:
            for name in given:
                if name not in names:
                    raise TypeError(f"{made.__name__}(): {unknown(name, names)}") from None
            try:
                signature.bind(*args, **given)
            except TypeError as wrong:
                raise TypeError(f"{made.__name__}(): {wrong}{_all(names)}") from None
            raise

    if not isinstance(made, type):
        return call  # type: ignore[return-value]  # of the same signature
    made.__init__ = call  # type: ignore[misc]
    return made
