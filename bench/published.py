"""Layout guidance as published, on current diffusers: the reference for minidiff's guided pass.

As in the paper's code and its ports, a processor at every attention layer computes the probabilities explicitly and
stores them, parameters require gradients, the whole UNet runs, and the loss loops over maps, objects, boxes and
tokens. Reimplemented from the formula (Chen et al. 2024), for diffusers 0.42.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class StoringProcessor:
    """A diffusers attention processor that computes explicit probabilities and puts them in `store` by layer name."""

    def __init__(self, name: str, store: dict[str, Tensor]) -> None:
        self.name, self.store = name, store

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [B,N,C] -> [B,N,C]."""
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(y) for y in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
        )
        probs = attn.get_attention_scores(query, key, attention_mask)  # [B*H,N,L]
        self.store[self.name] = probs
        out = attn.batch_to_head_dim(torch.bmm(probs, value))
        return attn.to_out[1](attn.to_out[0](out))


@dataclass(frozen=True)
class Published:
    """A UNet2DConditionModel with storing processors; `store` holds the maps of its last pass."""

    unet: Any
    store: dict[str, Tensor]

    @classmethod
    def of(cls, unet: Any) -> "Published":
        """Modifies the UNet: sets its processors and makes its parameters require gradients."""
        store: dict[str, Tensor] = {}
        unet.set_attn_processor({name: StoringProcessor(name, store) for name in unet.attn_processors})
        unet.requires_grad_(True)
        return cls(unet, store)

    def loss(self, boxes: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]]) -> Tensor:
        """The loss on cross-attention in the mid block and up_blocks.1, for one image on a square grid."""
        maps = [
            probs
            for name, probs in self.store.items()
            if "attn2" in name and name.startswith(("mid_block", "up_blocks.1."))
        ]
        loss = maps[0].new_zeros(())
        for probs in maps:
            edge = int(probs.shape[1] ** 0.5)
            for box, positions in zip(boxes, tokens, strict=True):
                x0, y0, x1, y1 = (int(value * edge) for value in box)
                mask = probs.new_zeros(edge, edge)
                mask[y0:y1, x0:x1] = 1
                for position in positions:
                    seen = probs[:, :, position].reshape(-1, edge, edge)
                    share = (seen * mask).flatten(1).sum(1) / seen.flatten(1).sum(1)
                    loss = loss + ((1 - share) ** 2).mean() / (len(positions) * len(boxes) * len(maps))
        return loss

    def gradient(
        self, x: Tensor, t: Tensor, context: Tensor, boxes: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """(gradient of the loss with respect to x [1,4,h,w], loss)."""
        x = x.detach().requires_grad_()
        self.unet(x, t, encoder_hidden_states=context, return_dict=False)
        loss = self.loss(boxes, tokens)
        (gradient,) = torch.autograd.grad(loss, x)
        self.store.clear()
        return gradient, loss.detach()
