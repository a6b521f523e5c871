"""The bundled model's optimiser: Muon for matrices, AdamW for the rest, and a moving average of all weights."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon

MUON, ADAMW = 5e-3, 2e-3  # peak learning rates


class Optimiser:
    """Optimises some networks and keeps an exponential moving average (EMA) of their weights.

    Muon (Jordan et al. 2024) replaces the update of a matrix by the nearest orthogonal one. Here a convolution
    [out,in,h,w] is a matrix [out,in*h*w]. With Muon the autoencoder reached 32 dB in the steps in which AdamW reached
    24 dB. Embeddings, norms and biases use AdamW.
    """

    def __init__(self, networks: Mapping[str, nn.Module], decay: float = 0.999) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {
            f"{name}.{key}": value for name, network in networks.items() for key, value in network.named_parameters()
        }
        matrices = [value for key, value in self.weights.items() if value.ndim > 1 and "embeddings" not in key]
        chosen = {id(value) for value in matrices}
        rest = [value for value in self.weights.values() if id(value) not in chosen]
        # Muon takes only matrices: each is a view of its weight, sharing memory.
        self.views = [(weight, nn.Parameter(weight.detach().flatten(1))) for weight in matrices]
        views = [view for _, view in self.views]
        self.muon = Muon(views, MUON, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        self.adamw = AdamW(rest, ADAMW, betas=(0.9, 0.99), weight_decay=0.0)
        self.ema = {key: value.detach().clone() for key, value in self.weights.items()}

    def step(self, loss: Tensor, index: int, progress: float) -> None:
        """Take optimisation step `index` on `loss`; `progress` in [0,1] is the elapsed fraction of the run.

        The learning rate warms up for 100 steps and follows a cosine to 1 % of its peak at the end of the run.
        """
        loss.backward()
        nn.utils.clip_grad_norm_(list(self.weights.values()), 1.0)
        rate = min(1.0, (index + 1) / 100) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0))))
        for optimiser, highest in ((self.muon, MUON), (self.adamw, ADAMW)):
            for group in optimiser.param_groups:
                group["lr"] = highest * rate
        for weight, view in self.views:
            view.grad = None if weight.grad is None else weight.grad.flatten(1)
        self.muon.step()
        self.adamw.step()
        for weight in self.weights.values():
            weight.grad = None
        # With a constant decay, the random initial weights would persist for a thousand steps.
        decay = min(self.decay, (1 + index) / (10 + index))
        with torch.no_grad():
            for key, average in self.ema.items():
                average.lerp_(self.weights[key], 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """Everything that `load` needs, including weights, as a flat dict."""
        found = {f"weights/{key}": value.detach() for key, value in self.weights.items()}
        found |= {f"ema/{key}": value for key, value in self.ema.items()}
        for name, optimiser in (("muon", self.muon), ("adamw", self.adamw)):
            for i, values in optimiser.state_dict()["state"].items():
                found |= {f"{name}/{i}/{key}": value for key, value in values.items()}
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Resume from what `state` returned."""
        with torch.no_grad():
            for key, value in self.weights.items():
                value.copy_(state[f"weights/{key}"])
                self.ema[key].copy_(state[f"ema/{key}"])
        for name, optimiser in (("muon", self.muon), ("adamw", self.adamw)):
            values: dict[int, dict[str, Tensor]] = {}
            for path, value in state.items():
                kind, *rest = path.split("/")
                if kind == name:
                    values.setdefault(int(rest[0]), {})[rest[1]] = value
            optimiser.load_state_dict({**optimiser.state_dict(), "state": values})

    def averaged(self, name: str) -> dict[str, Tensor]:
        """The moving average of one network's weights, as its state dict."""
        prefix = f"{name}."
        return {key.removeprefix(prefix): value for key, value in self.ema.items() if key.startswith(prefix)}
