"""Stable Diffusion 1.5 in plain PyTorch, with its attention maps and its layout in the caller's hands."""

from .generate import Step, generate, sample_steps
from .guidance.edits import forward_guidance, regional_prompting, reweight
from .guidance.guide import Guidance, Report
from .guidance.layout import Layout
from .guidance.objectives import (
    Objective,
    Settings,
    attend_and_excite_loss,
    boxdiff_loss,
    extent_loss,
    inside_loss,
    layout_loss,
    objective,
    refocusing_loss,
    rnb_loss,
)
from .model import Model, sites
from .networks.attention import ALL, BOX_MASS, COLUMNS, HEAD_MEAN, Edit, Record, Site
from .networks.sites import at_most, block, cross, level, place, self_
from .recorded import LAST, MEAN, PER_STEP, Attention
from .result import Result, read_metadata, read_parameters
from .sampling import DDIM, LMS, PNDM, DPMpp2M, Euler, EulerAncestral
from .weights.load import load

__all__ = [
    "ALL",
    "BOX_MASS",
    "COLUMNS",
    "DDIM",
    "HEAD_MEAN",
    "LAST",
    "LMS",
    "MEAN",
    "PER_STEP",
    "PNDM",
    "Attention",
    "DPMpp2M",
    "Edit",
    "Euler",
    "EulerAncestral",
    "Guidance",
    "Layout",
    "Model",
    "Objective",
    "Record",
    "Report",
    "Result",
    "Settings",
    "Site",
    "Step",
    "at_most",
    "attend_and_excite_loss",
    "block",
    "boxdiff_loss",
    "cross",
    "extent_loss",
    "forward_guidance",
    "generate",
    "inside_loss",
    "layout_loss",
    "level",
    "load",
    "objective",
    "place",
    "read_metadata",
    "read_parameters",
    "refocusing_loss",
    "regional_prompting",
    "reweight",
    "rnb_loss",
    "sample_steps",
    "self_",
    "sites",
]
