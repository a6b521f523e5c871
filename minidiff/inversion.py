"""invert(): the noise that makes a given picture, so that another prompt, box or edit changes that picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .canvas import picture_latents
from .checks import choice, number, whole
from .model import Model
from .noise import Noise
from .request import Request
from .resolve import resolve
from .run import sample_steps
from .sampling import DDIM, NoiseSchedule, Schedule
from .sampling.samplers._sampler import Ask, Draw, predict, signal
from .vocabulary import BUNDLED, own_keywords
from .weights.load import load

if TYPE_CHECKING:
    from .draw import Picture


METHODS = ("edit_friendly", "ddim")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Given(DDIM):
    """The mean of DDIM's steps at eta 1 plus what is `added` [S,B,C,h,w], which belongs to steps that start at these
    noise levels; with `inputs` [S,B,C,h,w] each step starts from its own."""

    name: ClassVar[str] = "inverted"
    added: Tensor | None = None
    starts: tuple[float, ...] = ()
    inputs: Tensor | None = None

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        if self.added is not None:
            size, starts = list(self.added.shape[1:]), tuple(start for start, _ in schedule.spans)
            if list(x.shape) != size or starts != self.starts:
                raise ValueError(
                    f"the sampler of an inversion got latents {list(x.shape)} and {len(starts)} steps; expected {size} "
                    f"and the {len(self.starts)} steps of invert(): its latents and timesteps, unchanged"
                )
        for call, (start, end) in enumerate(schedule.spans):
            x, output = ask(x if self.inputs is None else self.inputs[call].to(x), call)
            clean, eps = predict(x, output, start, schedule.prediction_type)
            rest = 1 - signal(end) ** 2
            variance = rest * (1 + start**2) / start**2 * (1 - (1 + end**2) / (1 + start**2))
            x = signal(end) * clean + math.sqrt(max(rest - variance, 0.0)) * eps
            x = x if self.added is None else x + self.added[call].to(x)
            yield x


@dataclass(frozen=True, kw_only=True, eq=False)
class _Backwards(DDIM):
    """From clean latents to noise: DDIM's steps, the last one first, each back with what the network says of where it
    ends."""

    name: ClassVar[str] = "inverted"

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        for call in reversed(range(len(schedule.spans))):
            start, end = schedule.spans[call]
            x, output = ask(x, call)
            _, eps = predict(x, output, start, schedule.prediction_type)
            clean = (x - math.sqrt(1 - signal(end) ** 2) * eps) / signal(end)
            x = signal(start) * clean + math.sqrt(1 - signal(start) ** 2) * eps
            yield x


@own_keywords
def invert(
    image: Picture | str | Path | Sequence[Picture | str | Path],
    prompt: str | Sequence[str],
    *,
    model: Model | str | Path = BUNDLED,
    method: str = "edit_friendly",
    steps: int = 50,
    strength: float | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    seed: int | Sequence[int] = 0,
) -> dict[str, Any]:
    """The arguments of generate() that make a picture again: `generate(prompt, **inverted)`; with another prompt, boxes
    or edits they make that picture changed. Most reliably so with prompt-to-prompt, beside the picture itself:

        pair = ["a red circle and a blue square", "a green circle and a blue square"]
        inverted = minidiff.invert([picture] * 2, pair[:1] * 2, seed=[0, 0])
        inputs = {"alignment": inverted["model"].text.alignment(pair)}
        same, changed = minidiff.generate(pair, edits=minidiff.prompt_to_prompt(), inputs=inputs, **inverted).images

    method: "edit_friendly", DDPM inversion (Huberman-Spiegelglas et al. 2024, arXiv 2304.06140, alg. 1): the picture
        gets independent noise at each timestep, and what the network's step lacks to the next one is kept,
        x_(t-1) - mu(x_t). The paper divides it by sigma_t; it is kept whole here, so that the last step, without a
        sigma, is exact too. With the same prompt and guidance_scale, any, the result is what the autoencoder gives
        back of the picture.
        "ddim": DDIM's steps from the picture to noise (Song et al. 2021, section 4.3). Not exact, and only near at
        scale 1, but nothing of the picture is kept beside its noise. To edit, take a larger scale:
        `generate(prompt, **{**inverted, "guidance_scale": 3})`.
    prompt: what the picture shows; several pictures have several prompts. strength: in (0,1], the share of `steps` that
    run; default: 0.64 (the paper leaves out 36 of 100), for "ddim" 1. guidance_scale: default: the model's, for "ddim"
    1. seed: as in generate(). The dictionary names the model, too.
    """
    choice("method", method, METHODS)
    if image is None:
        raise ValueError("image is None; expected a picture, the path of one, or a list of them")
    loaded = model if isinstance(model, Model) else load(model)
    ddim = method == "ddim"
    strength = (1.0 if ddim else 0.64) if strength is None else strength
    strength = number("strength", strength, 1e-6, 1, "a number above 0, at most 1")
    scale = 1.0 if ddim and guidance_scale is None else guidance_scale
    asked = Request(prompt, model=loaded, image=image, guidance_scale=scale, seed=seed)
    request, _, _ = resolve(asked, loaded)
    every = DDIM().schedule(loaded.noise, whole("steps", steps, 1)).timesteps.tolist()
    times = every[len(every) - max(1, int(steps * strength)) :]
    clean = picture_latents(request, loaded).cpu()
    fields: dict[str, Any] = {
        "model": loaded,
        "timesteps": times,
        "guidance_scale": request.guidance_scale,
        "seed": seed,
        **({} if negative_prompt is None else {"negative_prompt": negative_prompt}),
    }
    if ddim:
        (*_, last) = sample_steps(prompt, sampler=_Backwards(), latents=clean, **fields)
        return {**fields, "latents": last.latents.float().cpu(), "sampler": DDIM()}
    return _edit_friendly(prompt, request, clean, loaded.noise, fields)


def _edit_friendly(
    prompt: str | Sequence[str], request: Request, clean: Tensor, noise: NoiseSchedule, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """The picture with independent noise at each level, and what the network's steps lack from each to the next."""
    draw = Noise.of(request, (clean.shape[1], clean.shape[2], clean.shape[3]))
    schedule = DDIM().schedule(noise, timesteps=fields["timesteps"])
    levels = [signal(float(sigma)) for sigma in schedule.sigmas]
    inputs = torch.stack([level * clean + math.sqrt(1 - level**2) * draw() for level in levels])
    given = {**fields, "latents": inputs[0]}
    wanted = [*inputs[1:], clean]
    found = [
        wanted[step.index] - step.latents.float().cpu()
        for step in sample_steps(prompt, sampler=_Given(inputs=inputs), **given)
    ]
    starts = tuple(start for start, _ in schedule.spans)
    return {**given, "sampler": _Given(added=torch.stack(found), starts=starts)}
