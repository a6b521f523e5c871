"""From noise to latents: the noise schedule, one small sampler per algorithm, and the loop."""

from minidiff.sampling.choose import choose_sampler, sampler_by_name, sampler_fields
from minidiff.sampling.sample import Hold, SamplerStep, sample
from minidiff.sampling.samplers._sampler import Sampler
from minidiff.sampling.samplers.ddim import DDIM
from minidiff.sampling.samplers.deis import DEIS
from minidiff.sampling.samplers.dpmpp_2m import DPMpp2M
from minidiff.sampling.samplers.euler import Euler
from minidiff.sampling.samplers.euler_ancestral import EulerAncestral
from minidiff.sampling.samplers.lcm import LCM
from minidiff.sampling.samplers.lms import LMS
from minidiff.sampling.samplers.pndm import PNDM
from minidiff.sampling.samplers.tcd import TCD
from minidiff.sampling.samplers.uni_pc import UniPC
from minidiff.sampling.schedule import SD15_SCHEDULER_CONFIG, NoiseSchedule
from minidiff.sampling.spacing import Schedule

__all__ = [
    "DDIM",
    "DEIS",
    "LCM",
    "LMS",
    "PNDM",
    "SD15_SCHEDULER_CONFIG",
    "TCD",
    "DPMpp2M",
    "Euler",
    "EulerAncestral",
    "Hold",
    "NoiseSchedule",
    "Sampler",
    "SamplerStep",
    "Schedule",
    "UniPC",
    "choose_sampler",
    "sample",
    "sampler_by_name",
    "sampler_fields",
]
