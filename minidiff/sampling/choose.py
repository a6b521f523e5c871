"""Choose the sampler of a run. It is passed on as a value, never by name."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from minidiff.checks import shown, warn
from minidiff.sampling.samplers import sampler_class
from minidiff.sampling.samplers._sampler import Sampler
from minidiff.sampling.schedule import NoiseSchedule
from minidiff.vocabulary import SAMPLERS, read_sampler, read_schedule


def sampler_by_name(text: str, schedule: str | None = None, spacing: str | None = None, eta: float = 0.0) -> Sampler:
    """The sampler with this name, in our spelling or another program's ("DPM++ 2M Karras"), and these settings."""
    name, schedule = read_sampler(text, schedule)
    return _with(sampler_class(name)(), schedule, spacing, eta)


def choose_sampler(
    noise: NoiseSchedule,
    default: Sampler | None,
    sampler: str | Sampler | None = None,
    schedule: str | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
) -> Sampler:
    """The sampler for a run: the requested one, else `default`, else that of the model's scheduler config.

    schedule, spacing and eta apply to a named sampler or the model's own; a sampler object has its own settings.
    ValueError if the sampler is not implemented or does not fit the model.
    """
    if isinstance(sampler, str):
        chosen = sampler_by_name(sampler, schedule, spacing, eta)
    elif sampler is None:
        own = default or noise.sampler
        if own is None:
            raise ValueError(f"the scheduler config {noise.refusal}; name a sampler yourself: {', '.join(SAMPLERS)}")
        chosen = _with(own, schedule, spacing, eta)
    elif isinstance(sampler, Sampler):
        chosen = sampler
        if _with(sampler, schedule, spacing, eta) != sampler:
            raise ValueError(
                f"got schedule={shown(schedule)}, spacing={shown(spacing)} and eta={shown(eta)} with a sampler object; "
                f"expected them in the object: {sampler!r}"
            )
    else:
        raise ValueError(f"sampler is {shown(sampler)}; expected a name such as {SAMPLERS[0]!r}, or a sampler object")
    _check_switches(noise, chosen)
    return chosen


def sampler_fields(sampler: Sampler) -> dict[str, object]:
    """The fields of a request that give this sampler: its name and settings, or the object if no name gives it."""
    schedule, spacing = getattr(sampler, "levels", "uniform"), sampler.spacing
    eta = getattr(sampler, "eta", 0.0)
    if sampler.name not in SAMPLERS or sampler != _with(sampler_class(sampler.name)(), schedule, spacing, eta):
        return {"sampler": sampler}
    return {"sampler": sampler.name, "schedule": schedule, "spacing": spacing, "eta": eta}


def _with(sampler: Sampler, schedule: str | None, spacing: str | None, eta: float) -> Sampler:
    """The sampler with these settings; None and eta 0 change nothing."""
    levels = None if schedule is None else read_schedule(schedule)
    asked = {"levels": levels, "spacing": spacing, "eta": eta or None}
    changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    for name, value in changes.items():
        if not _has(sampler, name) and value != "uniform":
            having = [one for one in SAMPLERS if _has(sampler_class(one), name)]
            raise ValueError(
                f"{'schedule' if name == 'levels' else name} is {shown(value)} with sampler {sampler.name!r}; expected "
                f"one with it: {', '.join(having)}"
            )
    changes = {name: value for name, value in changes.items() if _has(sampler, name)}
    return replace(sampler, **changes) if changes else sampler


def _has(sampler: Sampler | type[Sampler], name: str) -> bool:
    return any(field.name == name for field in fields(sampler))


def _check_switches(noise: NoiseSchedule, sampler: Sampler) -> None:
    """Refuse what diffusers would sample differently; warn if both sample the model outside its training range."""
    if "thresholding" in noise.switches and "thresholding" in sampler.settings:
        free = [name for name in SAMPLERS if "thresholding" not in sampler_class(name).settings]
        raise ValueError(
            f"the scheduler config sets thresholding, which is not implemented but would affect {sampler.name}; "
            f"use a sampler that ignores it: {', '.join(free)}"
        )
    if "rescale_betas_zero_snr" not in noise.switches:
        return
    if sampler.zero_snr is None:
        warn(
            f"the model was trained up to pure noise (rescale_betas_zero_snr), but {sampler.name} starts below it: "
            "very dark and very bright images come out greyer"
        )
    elif noise.prediction_type == "epsilon":
        raise ValueError(
            "the scheduler config sets rescale_betas_zero_snr with prediction_type 'epsilon': of pure noise, eps says "
            'nothing about the image; load the model with prediction_type="v_prediction" if it was trained so'
        )
