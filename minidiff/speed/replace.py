"""Other weights in a network, out of place: what LoRAs and their kin are made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..checks import shown
from .accelerate import compile_unet, is_compiled
from .packed import Packed

Network = TypeVar("Network", bound=nn.Module)


def with_weights(network: Network, changes: Mapping[str, Tensor]) -> Network:
    """A network with other weights under some of the names in its state dict; it shares all else with the old one.

    The old one does not change in any bit. Only modules on the way to a changed weight are new; of a compiled network
    the old graphs stay as they are and the new one has its own. Packed layers are packed anew on their first call.
    changes: tensors of the weights' shapes, of any floating-point dtype and device: a copy in the weight's is taken.
    ValueError that lists every name, shape, dtype or value that does not fit.
    """
    there = dict(network.named_parameters(remove_duplicate=False))
    _check(there, changes)
    new = _replaced(network, {name: _parameter(value, there[name]) for name, value in changes.items()})
    if changes and is_compiled(network):
        new._compiled_call_impl = None
        new.__dict__.pop("_compiled_whole", None)
        compile_unet(new)
    return new


def _check(there: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> None:
    problems = []
    for name, value in changes.items():
        if name not in there:
            problems.append(f"{name} is no weight of this network")
        elif not isinstance(value, Tensor) or not value.is_floating_point() or value.shape != there[name].shape:
            problems.append(
                f"{name} is {shown(value)}; expected floating-point numbers of shape {list(there[name].shape)}"
            )
        elif not value.isfinite().all():
            problems.append(f"{name} holds values that are not finite (NaN or infinity)")
    if problems:
        raise ValueError("the weights do not fit:\n  " + "\n  ".join(problems))


def _parameter(value: Tensor, old: Tensor) -> nn.Parameter:
    """A copy on the old weight's device, in its dtype and memory format, frozen as it is."""
    last = old.ndim == 4 and not old.is_mkldnn and old.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    copy = value.detach().to(old.device, old.dtype, copy=True, memory_format=layout)
    return nn.Parameter(copy, requires_grad=old.requires_grad)


def _replaced(module: Network, changes: Mapping[str, nn.Parameter]) -> Network:
    """The module with some parameters, by their path, replaced; itself where there are none."""
    if not changes:
        return module
    new = _shell(module)
    below: dict[str, dict[str, nn.Parameter]] = defaultdict(dict)
    for path, value in changes.items():
        head, _, rest = path.partition(".")
        if rest:
            below[head][rest] = value
        else:
            new._parameters[head] = value
    for name, inner in below.items():
        child = module._modules[name]
        assert child is not None  # it has these parameters
        new._modules[name] = _replaced(child, inner)
    if isinstance(new, Packed):
        new.forget()
    return new


def _shell(module: Network) -> Network:
    """A module of the same kind that holds the same things in containers of its own."""
    new = module.__new__(type(module))
    held = vars(module)
    new.__dict__ = {name: value.copy() if isinstance(value, dict | set) else value for name, value in held.items()}
    return new
