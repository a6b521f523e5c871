"""Replace weights of a network out of place, as LoRAs and other adapters need."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..checks import finite, shown
from .accelerate import compile_network, free_numbers, is_compiled, number_layers, prepare
from .capture import capture_calls, captured
from .packed import Packed

Network = TypeVar("Network", bound=nn.Module)


def with_weights(network: Network, changes: Mapping[str, Tensor]) -> Network:
    """A new network with some weights replaced, by state-dict name; it shares everything else with the old one.

    The old network stays bit-identical. Only modules on the path to a changed weight are new; those that were compiled
    are recompiled, and the old graphs remain valid. Changed packed layers are packed again on their first call.
    changes: tensors of the weights' shapes, of any floating-point dtype and device; they are copied to the weight's.
    ValueError listing every name, shape, dtype and value that does not fit.
    """
    if not isinstance(network, nn.Module):
        raise ValueError(f"network is {shown(network)}; expected one such as model.unet")
    there = dict(network.named_parameters(remove_duplicate=False))
    new = _replaced(network, _parameters(there, changes, copy=True), free_numbers())
    if changes:
        vars(new)["changed_weights"] = frozenset(changed_weights(network)) | set(changes)
    return new


def adapted(network: Network, changes: Mapping[str, Tensor]) -> Network:
    """with_weights for changes that the model's `adapters` tell of: they do not count among changed_weights().

    Tensors of a weight's dtype and device are taken over without a copy.
    """
    there = dict(network.named_parameters(remove_duplicate=False))
    return _replaced(network, _parameters(there, changes, copy=False), free_numbers())


def with_modules(network: Network, modules: Mapping[str, nn.Module]) -> Network:
    """A new network with some modules replaced, by path, and packed like the others; it shares everything else.

    As in with_weights, the old network is unchanged, and a compiled one is recompiled.
    """
    numbers, new = free_numbers(), nn.ModuleList(modules.values())
    if is_compiled(network):
        number_layers(new, numbers)
    else:
        prepare(new)
    return _replaced(network, modules, numbers)


def changed_weights(*networks: nn.Module) -> list[str]:
    """Names of the weights that with_weights changed, so that a picture can record that its model was modified."""
    return [name for network in networks for name in vars(network).get("changed_weights", ())]


def _parameters(there: Mapping[str, Tensor], changes: Mapping[str, Tensor], copy: bool) -> dict[str, nn.Parameter]:
    """The changes as parameters like those in `there`, checked."""
    found, problems = {}, []
    for name, value in changes.items():
        if name not in there:
            problems.append(f"{name} is not a weight of this network")
        elif not _holds_numbers(value) or value.shape != there[name].shape:
            problems.append(
                f"{name} is {shown(value)}; expected a torch tensor of floating-point numbers of shape "
                f"{list(there[name].shape)}"
            )
        else:
            found[name] = _parameter(value, there[name], copy)
            if not finite(found[name]):  # of the copy: float16 overflows above 65504
                problems.append(
                    f"{name} holds values that are not finite (NaN or infinity) in {str(there[name].dtype)[6:]}"
                )
    if problems:
        raise ValueError("the weights do not fit:\n  " + "\n  ".join(problems))
    return found


def _holds_numbers(value: object) -> bool:
    return (
        isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided and not value.is_meta
    )


def _parameter(value: Tensor, old: Tensor, copy: bool) -> nn.Parameter:
    """The values with the old weight's device, dtype, memory format and requires_grad."""
    last = old.ndim == 4 and not old.is_mkldnn and old.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    new = value.detach().to(old.device, old.dtype, copy=copy, memory_format=layout)
    return nn.Parameter(new, requires_grad=old.requires_grad)


def _replaced(module: Network, changes: Mapping[str, nn.Parameter | nn.Module], numbers: Iterator[int]) -> Network:
    """A module with some parameters or modules replaced, by path; the module itself if there are none."""
    if not changes:
        return module
    new = _shell(module)
    below: dict[str, dict[str, nn.Parameter | nn.Module]] = defaultdict(dict)
    for path, value in changes.items():
        head, _, rest = path.partition(".")
        if rest:
            below[head][rest] = value
        elif isinstance(value, nn.Module):
            new._modules[head] = value
        else:
            new._parameters[head] = value
    for name, inner in below.items():
        child = module._modules[name]
        assert child is not None  # the paths lead through it
        new._modules[name] = _replaced(child, inner, numbers)
    if isinstance(new, Packed):
        new.forget()
        if isinstance(module, Packed) and module.number is not None:
            new.take_number(next(numbers))
    if captured(module) is not None:
        return capture_calls(new)
    return compile_network(new) if is_compiled(module) else new


def _shell(module: Network) -> Network:
    """A shallow copy of a module, with its own dicts and sets but the same contents, and without compiled graphs."""
    new = module.__new__(type(module))
    held = vars(module)
    new.__dict__ = {name: value.copy() if isinstance(value, dict | set) else value for name, value in held.items()}
    new.__dict__.pop("_compiled_whole", None)
    new._compiled_call_impl = None
    return new
