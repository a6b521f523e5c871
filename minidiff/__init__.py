"""Stable Diffusion 1.5 in plain PyTorch, with its attention maps and its layout in the caller's hands."""

from .generate import Step, generate, sample_steps
from .model import Model
from .networks.attention import ALL, COLUMNS, HEAD_MEAN, Edit, Record, Site
from .result import Result, read_metadata, read_parameters
from .sampling import DDIM, LMS, PNDM, DPMpp2M, Euler, EulerAncestral
from .weights.load import load

__all__ = [
    "ALL",
    "COLUMNS",
    "DDIM",
    "HEAD_MEAN",
    "LMS",
    "PNDM",
    "DPMpp2M",
    "Edit",
    "Euler",
    "EulerAncestral",
    "Model",
    "Record",
    "Result",
    "Site",
    "Step",
    "generate",
    "load",
    "read_metadata",
    "read_parameters",
    "sample_steps",
]
