"""The one room that knows torch.compile."""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

from .networks.unet import UNet

T = TypeVar("T")


def compile_unet(unet: UNet) -> UNet:
    """The same UNet, its forward compiled on first use: one graph for each kind of record and edit, batch and size.

    fullgraph, since a graph break would hide a cost; dynamic shapes off, since attention and convolutions are chosen by
    shape.
    """
    unet.compile(fullgraph=True, dynamic=False)
    return unet


def is_compiled(unet: UNet) -> bool:
    """Whether `compile_unet` had it."""
    return unet._compiled_call_impl is not None  # torch has no public question for it


@cache
def compile_whole(function: Callable[..., T]) -> Callable[..., T]:
    """A function of tensors, and of frozen values that choose its graph, as one graph for each choice and shape."""
    return torch.compile(function, fullgraph=True, dynamic=False)
