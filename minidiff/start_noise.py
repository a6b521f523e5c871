"""initno(): a start noise that is improved before anything is sampled."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .asked import asked
from .model import Model
from .noise import Noise
from .request import Request
from .resolve import latent_shape
from .run import Run, sample_steps
from .tries import first_step, nth_seeds
from .weights.load import load

ROUNDS, STEPS, LAST_STEPS = 5, 10, 50
RATE, EPS = 1e-2, 1e-3  # Adam's
ENOUGH = 0.5
"""The loss that is good enough for initno_loss: 0.2 of response and 0.3 of conflict."""
MOST_KL = 1e-3
"""The most that a noise's distribution may be from a unit normal one."""
Look = Callable[[Tensor], tuple[Tensor, float]]
"""Start noise [1,C,h,w] -> the gradient of the loss with respect to it, and the loss."""


@asked(Request)
def initno(request: Request) -> Request:
    """The request with `latents`: a noise in which every phrase of `boxes` finds its place before anything is sampled.

        pair = minidiff.Request("a cat and a dog", boxes={"cat": None, "dog": None}, seed=1)
        minidiff.generate(minidiff.initno(pair), guidance="none")

    Guo et al. 2024 ("InitNO: Boosting text-to-image diffusion models via initial noise optimization"), alg. 1, with its
    code's numbers: mean and log-variance of the noise go down the loss of the first step by Adam, and straight back
    where their divergence from the unit normal distribution exceeds 0.001 (its code: by more of Adam's steps). Ten
    passes, from up to five noises (the seed's and those of `tries`), until one is good enough; if none is, fifty from
    the best of them: 1 to 100 passes an image.
    The loss: `minidiff.initno_loss` until 0.5 (deviation: of the sum, where the code asks 0.2 and 0.3 of its parts), or
    that of `guidance` until its threshold, which may ask for boxes. The request has other seeds: with its own,
    samplers that add noise would first add the one it starts from. `tries` and `vary` are done with.
    """
    if request.image is not None or request.latents is not None:
        raise ValueError("got an image or latents; expected neither, since initno improves the noise of a seed")
    if not any(request.layouts):
        raise ValueError('there are no phrases to improve a noise for; expected e.g. boxes={"cat": None, "dog": None}')
    model = request.model if isinstance(request.model, Model) else load(request.model)
    own = request.guidance in (None, "none")
    run = sample_steps(replace(request, model=model, tries=1, guidance="initno" if own else request.guidance))
    if run.guide is None:
        raise ValueError(f"guidance is {request.guidance!r}, which has no loss; expected an objective, or None")
    enough = ENOUGH if own else run.guide.guidance.at(0)[1]
    seeds, shape = run.request.seed, latent_shape(run.request, model)
    assert isinstance(seeds, tuple)  # resolved
    noises = [Noise.of(run.request.filled({"seed": nth_seeds(seeds, n)}), shape).start() for n in range(ROUNDS)]
    found = [_best([one[i : i + 1] for one in noises], _look(run, i), enough) for i in range(len(seeds))]
    after = nth_seeds(seeds, ROUNDS)
    return replace(request, model=model, latents=torch.cat(found), seed=after, tries=1, vary=None)


def _look(run: Run, image: int) -> Look:
    """What guidance sees of an image's noise in the run's first step."""
    guide, schedule = run.guide, run.schedule
    assert guide is not None
    device = guide.context.device
    size, t = first_step(schedule, device)

    def look(noise: Tensor) -> tuple[Tensor, float]:
        gradient, found = guide.look((noise * size).to(device), t, schedule.abar(0), [image], 0, None)
        assert gradient is not None  # without limits
        return size * gradient.float().cpu(), float(found[0])

    return look


def _best(noises: list[Tensor], look: Look, enough: float) -> Tensor:
    """The first noise whose improvement is good enough; else that of the best one, improved for longer."""
    tried: list[float] = []
    for noise in noises:
        better, loss = improved(noise, look, STEPS, enough)
        if loss <= enough:
            return better
        tried.append(math.inf if math.isnan(loss) else loss)
    return improved(noises[tried.index(min(tried))], look, LAST_STEPS, enough)[0]


def improved(noise: Tensor, look: Look, steps: int, enough: float) -> tuple[Tensor, float]:
    """noise * exp(log_var / 2) + mu, and the last loss seen, after so many steps or once that is good enough."""
    log_var, mu = (torch.zeros_like(noise, requires_grad=True) for _ in range(2))
    adam = torch.optim.Adam([log_var, mu], lr=RATE, eps=EPS)
    loss = math.inf
    for _ in range(steps):
        with torch.enable_grad():
            found = noise * (log_var / 2).exp() + mu
        gradient, loss = look(found.detach())
        if loss <= enough or not gradient.isfinite().all():
            break
        adam.zero_grad()
        found.backward(gradient)
        adam.step()
        _return_to_normal(log_var, mu)
    return (noise * (log_var / 2).exp() + mu).detach(), loss


@torch.no_grad()
def _return_to_normal(log_var: Tensor, mu: Tensor) -> None:
    """Pull both towards 0, in place, until their divergence is small enough; it grows with the square at least."""
    while (far := float(divergence(log_var, mu))) > MOST_KL:
        for one in (log_var, mu):
            one *= 0.99 * math.sqrt(MOST_KL / far)


def divergence(log_var: Tensor, mu: Tensor) -> Tensor:
    """KL(N(mu, exp(log_var)) || N(0, 1)), the mean over elements: [] (eq. 6)."""
    return -0.5 * (1 + log_var - mu.square() - log_var.exp()).mean()
