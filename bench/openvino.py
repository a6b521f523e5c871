"""OpenVINO on the same UNet, if installed (the `bench` extra): a step in bfloat16 or float32."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from .networks import Inputs


def comparable() -> bool:
    """True if openvino is installed and the other variants also run on the CPU."""
    return find_spec("openvino") is not None and not torch.cuda.is_available()


def step(unet: Any, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """A step of UNet2DConditionModel, converted and compiled on the first call."""
    import openvino

    compiled: list[Any] = []
    half = inputs.x.dtype == torch.bfloat16
    values = (inputs.x, inputs.t, inputs.context)
    # numpy has no bfloat16: its bits are passed as integers
    arrays = [(value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy() for value in values]

    def call() -> torch.Tensor:
        if not compiled:
            model = openvino.convert_model(_Step(unet), example_input=values)
            kind = openvino.Type.bf16 if half else openvino.Type.f32
            hints = {"INFERENCE_PRECISION_HINT": kind, "PERFORMANCE_HINT": "LATENCY"}
            compiled.append(openvino.compile_model(model, "CPU", hints))
        eps = torch.from_numpy(compiled[0](arrays)[0])
        return eps.view(torch.bfloat16) if half else eps  # numpy labels its bits as float16

    return call


class _Step(torch.nn.Module):
    """Positional arguments and a single output tensor, as the converter requires."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.unet(x, t, encoder_hidden_states=context, return_dict=False)[0]
