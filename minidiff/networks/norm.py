"""The norms of the networks, with the activation that follows, so that a card can do both at once (speed/fused.py)."""

from collections.abc import Callable
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

Fused: TypeAlias = Callable[..., Tensor] | None
"""(the layer, its input) -> its output."""


def is_hooked(layer: nn.Module) -> bool:
    """Whether calling a layer may do more, or something else, than its class says."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


def are_hooked() -> bool:
    """Whether there are hooks on all layers of all networks."""
    return bool(_global_forward_hooks or _global_forward_pre_hooks)


class GroupNorm(nn.GroupNorm):
    """Group norm alone."""

    fused: Fused = None
    silu = False

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w] -> [B,C,h,w]."""
        return self.plain(x) if self.fused is None else self.fused(self, x)

    def plain(self, x: Tensor) -> Tensor:
        """The same by torch's own kernels."""
        y = super().forward(x)
        return F.silu(y) if self.silu else y


class GroupNormSiLU(GroupNorm):
    """Group norm, then SiLU."""

    silu = True


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last dimension."""

    fused: Fused = None

    def forward(self, x: Tensor) -> Tensor:
        """[B,N,C] -> [B,N,C]."""
        return self.plain(x) if self.fused is None else self.fused(self, x)

    def plain(self, x: Tensor) -> Tensor:
        """The same by torch's own kernel."""
        return super().forward(x)
