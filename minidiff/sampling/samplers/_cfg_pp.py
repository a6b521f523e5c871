"""CFG++, Chung et al. 2024 (arXiv 2406.08070): guided clean latents, to which the unconditional noise is added again.

Classifier-free guidance adds the guided noise (alg. 1), CFG++ the unconditional one (alg. 2). So the scale is lambda in
[0,1]: 0 ignores the prompt, 1 takes the conditional clean latents, and 0.6 is about a plain scale of 7.5.
"""

from __future__ import annotations

import math

from torch import Tensor

from minidiff.sampling.samplers._sampler import Ask, predict, signal
from minidiff.sampling.spacing import Schedule


def halves(x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """(unconditional, guided) outputs from what `ask` returned for x; the same one where guidance does not act."""
    uncond, guided = output.chunk(2) if len(output) > len(x) else (output, output)
    return uncond, guided


def renoised(ask: Ask, schedule: Schedule) -> Ask:
    """`ask` with which the step of any sampler is CFG++'s: the clean latents of the (x, output) that it returns are the
    guided ones, the noise is the unconditional one.
    """

    def moved(x: Tensor, call: int) -> tuple[Tensor, Tensor]:
        x, output = ask(x, call)
        if len(output) == len(x):
            return x, output
        uncond, guided = halves(x, output)
        sigma, kind = float(schedule.sigmas[call]), schedule.prediction_type
        level, growth = signal(sigma), math.sqrt(1 + sigma**2) if schedule.space == "ve" else 1.0
        clean, _ = predict(x / growth, guided, sigma, kind)
        _, eps = predict(x / growth, uncond, sigma, kind)
        mixed = level * clean + sigma * level * eps
        return growth * mixed, eps if kind == "epsilon" else level * eps - sigma * level * clean

    return moved
