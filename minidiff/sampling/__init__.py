"""From noise to latents: the noise schedule, one small sampler per algorithm, and the loop."""

from minidiff.sampling.sample import Step, sample
from minidiff.sampling.samplers import (
    DDIM,
    LMS,
    PNDM,
    SAMPLERS,
    DPMpp2M,
    Euler,
    EulerAncestral,
    History,
    Sampler,
    default_sampler,
    sampler_by_name,
)
from minidiff.sampling.schedule import SD15_SCHEDULER_CONFIG, NoiseSchedule, Schedule

__all__ = [
    "DDIM",
    "LMS",
    "PNDM",
    "SAMPLERS",
    "SD15_SCHEDULER_CONFIG",
    "DPMpp2M",
    "Euler",
    "EulerAncestral",
    "History",
    "NoiseSchedule",
    "Sampler",
    "Schedule",
    "Step",
    "default_sampler",
    "sample",
    "sampler_by_name",
]
