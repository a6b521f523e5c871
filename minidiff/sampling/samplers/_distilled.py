"""The timesteps of models that were distilled to few steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from minidiff.checks import whole
from minidiff.sampling.samplers._sampler import ConfigValues, Sampler
from minidiff.sampling.spacing import spaced_timesteps

if TYPE_CHECKING:
    from minidiff.sampling.schedule import Floats, NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class DistilledSampler(Sampler):
    """Space "vp". The timesteps are some of the `original_steps` of the distillation, at most as many.

    spacing: another choice of timesteps; that of the model's config is ignored.
    """

    settings: ClassVar[ConfigValues] = {"thresholding": (False,)}
    zero_snr: ClassVar[float | None] = 0.0
    original_steps: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "original_steps", whole("original_steps", self.original_steps, 1))

    @classmethod
    def of_config(cls, config: Mapping[str, object]) -> dict[str, Any]:
        steps = config.get("original_inference_steps")
        return super().of_config(config) | ({} if steps is None else {"original_steps": steps})

    def _times(self, noise: NoiseSchedule, steps: int) -> Floats:
        """Every (T // original_steps)th timestep counted from 1, thinned to `steps` [steps]."""
        if self.spacing is not None:
            return spaced_timesteps(noise, steps, self.spacing)
        trained, original = noise.num_train_timesteps, self.original_steps
        if not steps <= original <= trained:
            raise ValueError(
                f"{steps} steps with original_steps {original} and {trained} timesteps trained on; expected at most "
                'that many, or pass spacing="trailing"'
            )
        known = np.arange(original, 0, -1) * (trained // original) - 1.0
        picked: Floats = known[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)]
        return picked
