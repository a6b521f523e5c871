"""invert(): the noise that makes a given picture, so that another prompt, box or edit changes that picture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .canvas import picture_latents
from .checks import number, whole
from .model import Model
from .noise import Noise
from .request import BUNDLED, Request
from .resolve import resolve
from .run import sample_steps
from .sampling import DDIM, Schedule
from .sampling.samplers._sampler import Ask, Draw, predict, signal
from .weights.load import load

if TYPE_CHECKING:
    from .draw import Picture


@dataclass(frozen=True, kw_only=True, eq=False)
class _Given(DDIM):
    """The mean of DDIM's steps at eta 1 plus what is `added` [S,B,C,h,w]; with `inputs` [S,B,C,h,w] each step starts
    from its own."""

    name: ClassVar[str] = "inverted"
    added: Tensor | None = None
    inputs: Tensor | None = None

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        for call, (start, end) in enumerate(schedule.spans):
            x, output = ask(x if self.inputs is None else self.inputs[call].to(x), call)
            clean, eps = predict(x, output, start, schedule.prediction_type)
            rest = 1 - signal(end) ** 2
            variance = rest * (1 + start**2) / start**2 * (1 - (1 + end**2) / (1 + start**2))
            x = signal(end) * clean + math.sqrt(max(rest - variance, 0.0)) * eps
            x = x if self.added is None else x + self.added[call].to(x)
            yield x


def invert(
    image: Picture | str | Path,
    prompt: str,
    *,
    model: Model | str | Path = BUNDLED,
    steps: int = 50,
    strength: float = 0.64,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The arguments of generate() that make a picture again: `generate(prompt, **inverted)`; with another prompt, boxes
    or edits they make that picture changed.

    Edit-friendly DDPM inversion (Huberman-Spiegelglas et al. 2024, arXiv 2304.06140, alg. 1): the picture gets
    independent noise at each timestep, and what the network's step lacks to the next one is kept, x_(t-1) - mu(x_t).
    The paper divides it by sigma_t; it is kept whole here, so that the last step, without a sigma, is exact too. With
    the same prompt and guidance_scale, any, the result is what the autoencoder gives back of the picture.

    prompt: what the picture shows. strength: in (0,1], the share of `steps` that run; the paper leaves out 36 of 100.
    guidance_scale: default: the model's. Pass one picture; the dictionary names the model, too.
    """
    loaded = model if isinstance(model, Model) else load(model)
    strength = number("strength", strength, 0, 1)
    asked = Request(prompt, model=loaded, image=image, guidance_scale=guidance_scale, seed=0)
    request, _, _ = resolve(asked, loaded)
    every = DDIM().schedule(loaded.noise, whole("steps", steps, 1)).timesteps.tolist()
    times = every[len(every) - max(1, int(steps * strength)) :]
    clean = picture_latents(request, loaded).cpu()
    draw = Noise.seeded(whole("seed", seed, 0), (clean.shape[1], clean.shape[2], clean.shape[3]))
    schedule = DDIM().schedule(loaded.noise, timesteps=times)
    levels = [signal(float(sigma)) for sigma in schedule.sigmas]
    inputs = torch.stack([level * clean + math.sqrt(1 - level**2) * draw() for level in levels])
    fields: dict[str, Any] = {
        "model": loaded,
        "timesteps": times,
        "latents": inputs[0],
        "guidance_scale": request.guidance_scale,
        **({} if negative_prompt is None else {"negative_prompt": negative_prompt}),
    }
    wanted = [*inputs[1:], clean]
    found = [
        wanted[step.index] - step.latents.float().cpu()
        for step in sample_steps(prompt, sampler=_Given(inputs=inputs), seed=seed, **fields)
    ]
    return {**fields, "sampler": _Given(added=torch.stack(found)), "seed": seed}
