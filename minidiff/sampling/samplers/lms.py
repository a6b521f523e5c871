"""Linear multistep on the probability flow ODE, like k-diffusion's sample_lms."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minidiff.checks import whole
from minidiff.sampling.samplers._sampler import Ask, Draw, SigmaSampler, derivative
from minidiff.sampling.spacing import Schedule


@dataclass(frozen=True, kw_only=True)
class LMS(SigmaSampler):
    """Adams-Bashforth with uneven steps, order 1 to 4. Layout guidance was published with it.

    The coefficients are exact, where diffusers integrates numerically. One of diffusers' choices is kept: a run that
    starts from a picture weighs its first slopes as if it had those of the calls left out.
    """

    name: ClassVar[str] = "lms"
    keeps_noise: ClassVar[bool] = True
    order: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "order", whole("order", self.order, 1, 4, "1, 2, 3 or 4"))

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        slopes: tuple[Tensor, ...] = ()
        for call, (start, end) in enumerate(schedule.spans):
            x, output = ask(x, call)
            slopes = (*slopes, derivative(x, output, start, schedule.prediction_type))[-self.order :]
            nodes = [*schedule.before, *(first for first, _ in schedule.spans[: call + 1])][-self.order :]
            weights = lagrange_integrals(nodes, start, end)[-len(slopes) :]
            for weight, slope in zip(weights, slopes, strict=True):
                x = x + weight * slope
            yield x


def lagrange_integrals(nodes: list[float], start: float, end: float) -> list[float]:
    """Integral over [start, end] of each Lagrange basis polynomial of at most 4 nodes: exact, by two-point Gauss."""
    middle, half = (start + end) / 2, (end - start) / 2
    points = (middle - half / math.sqrt(3), middle + half / math.sqrt(3))
    return [
        half * sum(math.prod((p - other) / (node - other) for other in nodes if other != node) for p in points)
        for node in nodes
    ]
