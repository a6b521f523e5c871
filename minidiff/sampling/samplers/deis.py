"""DEIS, Zhang and Chen 2023 (arXiv 2204.13902), as diffusers' DEISMultistepScheduler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import Tensor

from minidiff.sampling.samplers._multistep import OrderedSampler
from minidiff.sampling.samplers._sampler import Ask, ConfigValues, Draw, predict, signal
from minidiff.sampling.spacing import Schedule

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True)
class DEIS(OrderedSampler):
    """Log-rho Adams-Bashforth: eps along a polynomial in log sigma, of order 1 to 3, integrated exactly (eq. 14).

    Ends at the lowest training sigma, not at 0; the last step from levels that reach it, such as Karras', does nothing.
    Below 15 steps the last ones are of lower order.
    """

    name: ClassVar[str] = "deis"
    keeps_noise: ClassVar[bool] = True
    settings: ClassVar[ConfigValues] = {
        "solver_order": (1, 2, 3),
        "use_flow_sigmas": (False,),
        "lower_order_final": (True,),
        "thresholding": (False,),
    }

    def _end(self, lowest: float) -> float:
        return lowest

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        seen: list[tuple[float, Tensor]] = []  # sigma and eps of the last calls, newest first
        for call, (start, end) in enumerate(schedule.spans):
            x, output = ask(x, call)
            _, eps = predict(x, output, start, schedule.prediction_type)
            left = schedule.steps - call if schedule.steps + len(schedule.before) < 15 else self.order
            if end < start:
                seen = [(start, eps), *seen][: self.order]
                used = seen[:left]
                weights = log_integrals([sigma for sigma, _ in used], start, end)
                moved = sum((weight * one for weight, (_, one) in zip(weights, used, strict=True)), x / signal(start))
                x = signal(end) * moved
            yield x


def log_integrals(nodes: list[float], start: float, end: float) -> list[float]:
    """Integral over sigma in [start, end] of each Lagrange basis polynomial in log sigma through the nodes."""

    def moment(sigma: float, power: int) -> float:  # of log(sigma)^power, from 0
        if sigma == 0:
            return 0.0
        return sigma * math.log(sigma) ** power - (power * moment(sigma, power - 1) if power else 0)

    moments = [moment(end, power) - moment(start, power) for power in range(len(nodes))]
    logs = [math.log(node) for node in nodes]
    found = []
    for log in logs:
        others = [other for other in logs if other != log]
        basis = np.polynomial.polynomial.polyfromroots(others) / math.prod(log - other for other in others)
        found.append(float(np.dot(basis, moments)))
    return found
