"""Which sampler a run takes: a value from the config or the caller to the run, never a name in between."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from minidiff.checks import number, shown, warn
from minidiff.sampling.samplers import sampler_class
from minidiff.sampling.samplers._sampler import Sampler
from minidiff.sampling.schedule import NoiseSchedule
from minidiff.vocabulary import SAMPLERS, read_sampler


def sampler_by_name(text: str, karras: bool | None = None, spacing: str | None = None, eta: float = 0.0) -> Sampler:
    """The sampler of a name, in our spelling or another program's ("DPM++ 2M Karras"), with these settings."""
    name, karras = read_sampler(text, karras)
    return _with(sampler_class(name)(), karras, spacing, eta)


def choose_sampler(
    noise: NoiseSchedule,
    default: Sampler | None,
    sampler: str | Sampler | None = None,
    karras: bool | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
) -> Sampler:
    """The sampler of a run of a model: the one asked for, else `default`, else its scheduler config's own.

    karras, spacing and eta change the settings of a named one or the model's own; an object has its own. ValueError
    where the sampler is not implemented or does not fit the model.
    """
    if isinstance(sampler, str):
        chosen = sampler_by_name(sampler, karras, spacing, eta)
    elif sampler is None:
        own = default or noise.sampler
        if own is None:
            raise ValueError(f"the scheduler config {noise.refusal}; name a sampler yourself: {', '.join(SAMPLERS)}")
        chosen = _with(own, karras, spacing, eta)
    elif isinstance(sampler, Sampler):
        chosen = sampler
        if _with(sampler, karras, spacing, eta) != sampler:
            raise ValueError(
                f"got karras={karras}, spacing={shown(spacing)} and eta={shown(eta)} beside a sampler object; "
                f"expected them inside it: {sampler!r}"
            )
    else:
        raise ValueError(f"sampler is {shown(sampler)}; expected a name such as {SAMPLERS[0]!r}, or a sampler object")
    _check_switches(noise, chosen)
    return chosen


def sampler_fields(sampler: Sampler) -> dict[str, object]:
    """What a request holds that gives this sampler again; one that no name gives stands for itself."""
    karras, spacing = getattr(sampler, "karras", False), sampler.spacing
    eta = getattr(sampler, "eta", 0.0)
    if sampler.name not in SAMPLERS or sampler != _with(sampler_class(sampler.name)(), karras, spacing, eta):
        return {"sampler": sampler}
    return {"sampler": sampler.name, "karras": karras, "spacing": spacing, "eta": eta}


def _with(sampler: Sampler, karras: bool | None, spacing: str | None, eta: float) -> Sampler:
    """The sampler with what is asked of it; None and eta 0 ask nothing."""
    if karras is not None and not isinstance(karras, bool):
        raise ValueError(f"karras is {shown(karras)}; expected True, False or None (as the sampler's name says)")
    asked = {"karras": karras, "spacing": spacing, "eta": number("eta", eta, 0, 1) or None}
    changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    for name, value in changes.items():
        if not _has(sampler, name) and value is not False:
            having = [one for one in SAMPLERS if _has(sampler_class(one), name)]
            raise ValueError(
                f"{name} is {shown(value)} with sampler {sampler.name!r}; expected one that has it: {', '.join(having)}"
            )
    return replace(sampler, **{name: value for name, value in changes.items() if _has(sampler, name)})


def _has(sampler: Sampler | type[Sampler], name: str) -> bool:
    return any(field.name == name for field in fields(sampler))


def _check_switches(noise: NoiseSchedule, sampler: Sampler) -> None:
    """Refuse what diffusers would sample otherwise than we do; warn where both sample a model outside its training."""
    for key in noise.switches:
        if key in sampler.settings:
            free = [name for name in SAMPLERS if key not in sampler_class(name).settings]
            raise ValueError(
                f"the scheduler config has {key} true, which is not implemented and {sampler.name} would heed; "
                f"use one that does not know it: {', '.join(free)}"
            )
    if "rescale_betas_zero_snr" in noise.switches:
        warn(
            f"the model was trained down to pure noise (rescale_betas_zero_snr), where {sampler.name} does not start: "
            "very dark and very bright images come out greyer"
        )
