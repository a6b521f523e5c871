"""One look: an objective's loss on the maps of a forward pass, and its gradient with respect to the latents."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ..networks.attention import Edit, Inputs, Record
from ..networks.sites import Site

if TYPE_CHECKING:
    from .layout import Layout
    from .objectives import Objective

Forward: TypeAlias = Callable[
    [Tensor, Tensor, Tensor, Record | None, Sequence[Edit], Inputs | None], tuple[Tensor | None, dict[Site, Tensor]]
]
"""A UNet's forward: (x, t, context, record, edits, inputs) -> (eps or None, maps)."""
Looked: TypeAlias = tuple[Tensor, tuple[Tensor, Tensor, Tensor]]
Evaluated: TypeAlias = tuple[Tensor | None, tuple[Tensor, Tensor, Tensor]]
FLOAT16_SCALE = 2.0**10
"""What a loss is multiplied by for float16's pass back, in which small gradients vanish otherwise."""


def plainly(stages: Callable[..., Generator[Any]], *args: Any) -> Generator[Any]:
    """Run stages as they are, not as captured graphs."""
    return stages(*args)


def evaluate(
    x: Tensor,
    *look: Any,
    threshold: Tensor | None = None,
    loss: Callable[..., Looked] | None = None,
    run: Callable[..., Generator[Any]] = plainly,
) -> Evaluated:
    """Each image's gradient of its loss with respect to x, and (loss [B], loss per object [B,O], mass inside [B,O]).

    look: the other arguments of `look_loss`. threshold: where no image's loss is above its own ([B], on the
    CPU), the pass back through the network is not run, and the gradient is None. loss: `look_loss`, or the same
    compiled. run: what runs `look_stages`, as they are or as captured graphs. What is found comes on the CPU, in one
    copy: the only wait for the device in a look, but for float16's, whose gradient may be too large.
    """
    with closing(run(look_stages, x, loss or look_loss, look)) as stages:
        packed = next(stages).cpu()
        count = packed.shape[1] // 2
        found = packed[:, 0], packed[:, 1 : 1 + count], packed[:, 1 + count :]
        if threshold is not None and not (found[0] > threshold).any():
            return None, found
        gradient, fits = next(stages)
        return gradient if fits is None or fits else next(stages)[0], found


def look_stages(x: Tensor, loss: Callable[..., Looked], look: tuple[Any, ...]) -> Generator[Any]:
    """The parts of a look: the losses, per object too, and the masses [B,1+2O]; the gradient, and, for float16, whether
    it is finite; where it is not, the gradient of the loss as it is.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        total, (losses, objects, mass) = loss(x, *look)
    if not total.requires_grad:
        raise ValueError("the objective's loss does not depend on the maps: it has no gradient to descend")
    yield torch.cat([losses[:, None], objects, mass], dim=1)
    half = any(isinstance(one, Tensor) and one.dtype == torch.float16 for one in look)
    scale = total.new_full((), FLOAT16_SCALE) if half else None  # not new_tensor, which waits for the device
    (gradient,) = torch.autograd.grad(total, x, scale, retain_graph=half)
    yield (gradient, None) if scale is None else (gradient / scale, gradient.isfinite().all())
    if half:
        yield torch.autograd.grad(total, x)


def look_loss(
    x: Tensor,
    forward: Forward,
    objective: Objective,
    record: Record,
    edits: Sequence[Edit],
    t: Tensor,
    context: Tensor,
    layout: Layout,
    inputs: Inputs,
) -> Looked:
    """The sum of the images' losses, which are independent, and what `evaluate` returns beside their gradients."""
    _, maps = forward(x.to(context.dtype), t, context, record, edits, inputs)
    total, objects, mass = objective.look(maps, layout, inputs)
    return total.sum(), (total.detach(), objects.detach(), mass.detach())
