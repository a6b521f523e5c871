"""UniPC, Zhao et al. 2023 (arXiv 2302.04867), as diffusers' UniPCMultistepScheduler."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from minidiff.checks import choice
from minidiff.sampling.samplers._multistep import MultistepSampler, OrderedSampler
from minidiff.sampling.samplers._sampler import Ask, ConfigValues, Draw, first_order, predict, signal
from minidiff.sampling.spacing import Schedule

Seen = list[tuple[float, Tensor]]
"""lambda = -log sigma and clean latents of the last calls, newest first."""


@dataclass(frozen=True, kw_only=True)
class UniPC(OrderedSampler):
    """Alg. 5 and 6 for clean latents: a predictor of order 1 to 3, corrected with the next call's output.

    solver: B(h), "bh2" (exp(h) - 1) or "bh1" (h). The last steps are of lower order. A1111's UniPC has order 3 and bh1.
    """

    name: ClassVar[str] = "uni_pc"
    settings: ClassVar[ConfigValues] = {
        **MultistepSampler.settings,
        "solver_order": (1, 2, 3),
        "predict_x0": (True,),
        "lower_order_final": (True,),
        "disable_corrector": ([],),
        "solver_p": (),
        "sigma_min": (),
        "sigma_max": (),
    }
    zero_snr: ClassVar[float | None] = 2**-24
    solver: str = "bh2"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("solver", self.solver, ("bh1", "bh2"))

    @classmethod
    def of_config(cls, config: Mapping[str, object]) -> dict[str, Any]:
        return super().of_config(config) | ({"solver": "bh1"} if config.get("solver_type") == "bh1" else {})

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        seen: Seen = []
        last: tuple[Tensor, float] | None = None  # x and sigma where the last step began
        for call, (start, end) in enumerate(schedule.spans):
            there, output = ask(x, call)
            clean, _ = predict(there, output, start, schedule.prediction_type)
            corrected = there
            if last is not None:
                origin, begun = last
                corrected = self._step(origin, seen, begun, start, clean) + (there - x)  # guidance moves it as well
            if end < start:
                seen = [(-math.log(start), clean), *seen][: min(self.order, schedule.steps - call)]
                last = corrected, start
                x = self._step(corrected, seen, start, end)
            else:
                x, last = corrected, None
            yield x

    def _step(self, x: Tensor, seen: Seen, start: float, end: float, arrived: Tensor | None = None) -> Tensor:
        """UniP's step, or UniC's with the clean latents seen where UniP arrived (eq. 3 and 9)."""
        (now, clean), *earlier = seen
        moved = first_order(x, clean, start, end)
        if not earlier and arrived is None:
            return moved
        h = math.log(start / end)
        nodes = [(then - now) / h for then, _ in earlier]
        bends = [(one - clean) / node for (_, one), node in zip(earlier, nodes, strict=True)]
        if arrived is not None:
            nodes, bends = [*nodes, 1.0], [*bends, arrived - clean]
        for weight, bend in zip(self._weights(nodes, h), bends, strict=True):
            moved = moved + signal(end) * weight * bend
        return moved

    def _weights(self, nodes: list[float], h: float) -> list[float]:
        """-B(h) times the solution of eq. 5: the weights with which the terms of an expansion in h cancel.

        One node has weight 1/2 whatever h.
        """
        size = math.expm1(-h) if self.solver == "bh2" else -h
        if len(nodes) == 1:
            return [-size / 2]
        right, phi, factorial = [], math.expm1(-h) / -h - 1, 1
        for power in range(1, len(nodes) + 1):
            right.append(phi * factorial / size)
            factorial *= power + 1
            phi = phi / -h - 1 / factorial
        left = np.vander(nodes, increasing=True).T
        return [-size * float(weight) for weight in np.linalg.solve(left, right)]
