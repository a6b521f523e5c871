"""One guided pass in a fresh process: python -m bench.guided_once prints its memory and seconds as JSON.

Full SD 1.5 size, random weights, float32, 64x64 latents, the paper's layout guidance with two boxes.
"""

import json
import time
from pathlib import Path

import torch

from minidiff.guidance.guide import Guidance, Guide
from minidiff.guidance.layout import Region, make_layout
from minidiff.guidance.objectives import layout_loss
from minidiff.networks.config import UNetConfig
from minidiff.networks.unet import UNet

from .load_once import resident
from .models import SD15, random_weights, unet_shapes


def main() -> None:
    """Peak of the resident set above the resident model, over one look and one move."""
    unet = full_unet()
    there = unet.positions(64, 64)
    guidance = Guidance(layout_loss.bound(there), iterations=1, threshold=0.0, steps=1)
    regions = (Region("cat", (2,), ((0.1, 0.1, 0.5, 0.6),)), Region("ball", (5,), ((0.5, 0.5, 0.9, 0.9),)))
    layout = make_layout([regions], [6], 77, {at.grid for at in there.values()})
    context = torch.randn(1, 77, unet.config.cross_attention_dim)
    guide = Guide(guidance, unet.forward, context, layout, [["cat", "ball"]])
    x = torch.randn(1, 4, 64, 64)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of the resident set starts anew
    before, started = resident("VmRSS"), time.perf_counter()
    moved = guide.refine(x, torch.tensor(801.0), 0.05, 0)
    seconds, peak = time.perf_counter() - started, resident("VmHWM") - before
    print(json.dumps({"extra": peak, "seconds": seconds, "moved": float((moved - x).abs().max())}))


def full_unet() -> UNet:
    """Frozen, as `load` gives it."""
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict(SD15.unet))
    unet.load_state_dict(random_weights(unet_shapes(SD15.unet)), strict=True, assign=True)
    return unet.requires_grad_(False).eval()


if __name__ == "__main__":
    main()
