"""CFG++ against its published steps, written in sigma space and in float64, over whole runs; and in generate()."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import minidiff
from minidiff import Region
from minidiff.png.infotext import parse_infotext, to_infotext
from minidiff.sampling import SD15_SCHEDULER_CONFIG, NoiseSchedule, sample, sampler_by_name
from minidiff.vocabulary import SAMPLERS

NAMES = [name for name in SAMPLERS if name.endswith("_cfg_pp")]
SHAPE, SCALE = (2, 4, 6, 5), 0.7
SD15 = NoiseSchedule.from_config(SD15_SCHEDULER_CONFIG)
CALL: dict[str, Any] = {"steps": 3, "output": "tensor", "guidance_scale": 0.8, "seed": 3}


def network(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(unconditional, guided) outputs, used as eps or v."""
    uncond = torch.tanh(0.7 * x + t / 800) + 0.2 * torch.cos(3 * x - t / 300)
    return uncond, uncond + SCALE * torch.sin(2 * x + t / 500)


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def fresh_noise() -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(5)
    return lambda: torch.randn(SHAPE, generator=generator).double()


def published(name: str, schedule: Any, eta: float) -> list[Tensor]:
    """Steps of ComfyUI's samplers, and alg. 2 of the paper for DDIM, with the levels and timesteps of ours."""
    kind, times, noise = schedule.prediction_type, dict(enumerate(schedule.timesteps.tolist())), fresh_noise()

    def clean(x: Tensor, sigma: float, output: Tensor) -> Tensor:
        if kind == "epsilon":
            return x - sigma * output
        return x / (sigma**2 + 1) - sigma / math.sqrt(sigma**2 + 1) * output

    def denoised(x: Tensor, sigma: float, call: int) -> tuple[Tensor, Tensor]:
        """(guided, unconditional)"""
        found = network(x / math.sqrt(sigma**2 + 1), torch.tensor(times[call]).double())
        uncond, guided = (clean(x, sigma, output) for output in found)
        return guided, uncond

    ve = schedule.space == "ve"
    x = start().double() * schedule.init_scale
    x = x if ve else x * math.sqrt(1 + float(schedule.sigmas[0]) ** 2)
    each = 2 if name.startswith("dpmpp_2s") else 1
    old, h_last, out = None, 0.0, []
    for first in range(0, len(schedule.spans), each):
        sigma, to = schedule.spans[first][0], schedule.spans[min(first + each, len(schedule.spans)) - 1][1]
        guided, uncond = denoised(x, sigma, first)
        up = math.sqrt(to**2 * (sigma**2 - to**2) / sigma**2) if "ancestral" in name else 0.0
        down = math.sqrt(to**2 - up**2)
        if name == "ddim_cfg_pp":
            a, b = 1 / (1 + sigma**2), 1 / (1 + to**2)
            spread = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
            eps = (x - uncond) / sigma
            x = math.sqrt(b) * guided + math.sqrt(max(1 - b - spread**2, 0)) * eps
            x = (x + (spread * noise() if spread > 0 else 0)) / math.sqrt(b)
        elif name == "dpmpp_2m_cfg_pp" and old is not None and to > 0:
            h = math.log(sigma / to)
            mix = -math.exp(-h) * uncond - math.expm1(-h) / (2 * h_last / h) * (guided - old)
            x = guided + mix + math.exp(-h) * x
        elif each == 2 and down > 0:
            h = math.log(sigma / down)
            moved = x + guided - uncond
            half = math.exp(-h / 2) * moved - math.expm1(-h / 2) * guided
            second, _ = denoised(half, math.sqrt(sigma * down), first + 1)
            x = math.exp(-h) * moved - math.expm1(-h) * second
        else:
            x = guided + (x - uncond) / sigma * down
        if up > 0:
            x = x + up * noise()
        old, h_last = uncond, math.log(sigma / to) if to > 0 else 0.0
        out.append(x if ve else x / math.sqrt(1 + to**2))
    return out


@pytest.mark.filterwarnings("ignore:one step with")
@pytest.mark.parametrize("steps", [1, 2, 10, *(pytest.param(n, marks=pytest.mark.slow) for n in (20, 50))])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in NAMES),
        ("ddim_cfg_pp", {"eta": 0.6}),
        ("euler_ancestral_cfg_pp", {"schedule": "karras"}),
        ("dpmpp_2m_cfg_pp", {"schedule": "exponential", "spacing": "trailing"}),
    ],
)
def test_every_step_is_the_published_one(name: str, settings: dict[str, Any], prediction_type: str, steps: int) -> None:
    sampler = sampler_by_name(name, **settings)
    schedule = sampler.schedule(replace(SD15, prediction_type=prediction_type), steps)

    def both(x: Tensor, t: Tensor, sigma: float, index: int) -> tuple[Tensor, dict[Any, Tensor]]:
        return torch.cat(network(x, t.double())), {}

    found = [step.latents for step in sample(both, start().double(), schedule, sampler, noise=fresh_noise())]
    expected = published(name, schedule, settings.get("eta", 0.0))
    assert len(found) == len(expected) == steps
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).abs().max() <= 1e-9 * theirs.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_one_output_is_the_plain_sampler(name: str) -> None:
    """As where guidance_interval ends guidance: both halves are the conditional one."""
    sampler, plain = sampler_by_name(name), sampler_by_name(name.removesuffix("_cfg_pp"))
    runs = [
        sample(
            lambda x, t, sigma, index: (network(x, t)[0], {}),
            start(),
            one.schedule(SD15, 6),
            one,
            noise=fresh_noise(),
        )
        for one in (sampler, plain)
    ]
    for mine, theirs in zip(*runs, strict=True):
        if name != "dpmpp_2m_cfg_pp" or mine.index < 5:
            torch.testing.assert_close(mine.latents, theirs.latents, rtol=1e-5, atol=1e-5)


# ---- generate


def test_a_run_takes_both_halves_of_the_network(tiny_model: minidiff.Model) -> None:
    """Euler with CFG++ by hand, with the tiny UNet, over 3 steps; lambda 1 needs the unconditional half too."""
    sampler = sampler_by_name("euler_cfg_pp")
    schedule = sampler.schedule(tiny_model.noise, 3)
    context = tiny_model.text.encode(["blue", "a cat"])
    for scale in (0.0, 0.4, 1.0):
        call = {**CALL, "guidance_scale": scale, "negative_prompt": "blue", "sampler": "Euler CFG++"}
        run = minidiff.sample_steps("a cat", model=tiny_model, **call)
        seen = list(run)
        shape = seen[0].latents.shape
        x = torch.randn(shape[1:], generator=torch.Generator().manual_seed(3))[None] * schedule.init_scale
        for step, t, (sigma, to) in zip(seen, schedule.timesteps, schedule.spans, strict=True):
            x_vp = x / math.sqrt(1 + sigma**2)
            with torch.no_grad():
                output, _ = tiny_model.unet(torch.cat([x_vp, x_vp]), t, context)
            uncond, cond = output.chunk(2)
            x = x - sigma * (uncond + scale * (cond - uncond)) + to * uncond
            torch.testing.assert_close(step.latents, x, rtol=1e-4, atol=1e-4)


BOXES = {"boxes": {"cat": (0.0, 0.0, 0.5, 0.5)}, "guidance": minidiff.Guidance(steps=1, iterations=1, threshold=0.0)}
PICTURE = {"image": torch.linspace(0, 1, 32 * 32).reshape(1, 32, 32).expand(3, -1, -1), "strength": 0.7}
LEFT = torch.arange(32).lt(16).float().expand(32, -1)
BESIDE: list[dict[str, Any]] = [
    {"sampler": "euler_ancestral_cfg_pp", "regions": [Region("a fox", (0, 0, 0.5, 1), negative="a dog")], **PICTURE},
    {"sampler": "dpmpp_2m_cfg_pp", **BOXES, "guidance_rescale": 0.5},
    {"sampler": "ddim_cfg_pp", "syntax": "a1111", "cache_interval": 2},
    {"sampler": "dpmpp_2s_ancestral_cfg_pp", **PICTURE, "mask": LEFT, "attention": True},
    {"sampler": "euler_cfg_pp", "guidance_interval": (1.0, 20.0)},
]


@pytest.mark.parametrize("options", [BESIDE[0], *(pytest.param(one, marks=pytest.mark.slow) for one in BESIDE[1:])])
def test_image_i_of_a_batch_is_image_i_alone(tiny_model: minidiff.Model, options: dict[str, Any]) -> None:
    prompts = ["a cat AND a bird", "a red cat"] if "syntax" in options else ["a cat", "a red cat"]
    shared = {"model": tiny_model, **CALL, **options}
    batch = minidiff.generate(prompts, **{**shared, "seed": [3, 4]})
    alone = minidiff.generate(prompts[1], **{**shared, "seed": 4})
    assert isinstance(batch.images, Tensor) and isinstance(alone.images, Tensor)
    assert (batch.images[1:] - alone.images).abs().max() <= 0.5 / 255
    other = minidiff.generate(prompts[1], **{**shared, "seed": 4, "guidance_scale": 0.0})
    assert isinstance(other.images, Tensor)
    assert (other.images - alone.images).abs().max() > 1 / 255


def test_its_scale_is_from_0_to_1(tiny_model: minidiff.Model) -> None:
    default = minidiff.sample_steps("a cat", model=tiny_model, sampler="DDIM CFG++", steps=2)
    assert default.request.guidance_scale == 0.6
    for sampler in ("euler_cfg_pp", sampler_by_name("euler_cfg_pp")):
        with pytest.raises(ValueError, match=r"guidance_scale is 7.5; expected a number from 0 to 1, since .* CFG\+\+"):
            minidiff.Request("a cat", sampler=sampler, guidance_scale=7.5)
    with pytest.raises(ValueError, match="guidance_scale is 0.6; expected a number of at least 1"):
        minidiff.Request("a cat", sampler="euler", guidance_scale=0.6)


def test_a1111_writes_another_scale() -> None:
    """Its DDIM CFG++ divides by 12.5 what it shows."""
    text = to_infotext({"prompt": "x", "steps": 1, "sampler": "ddim_cfg_pp", "guidance_scale": 0.6})
    assert "Sampler: DDIM CFG++, CFG scale: 7.5" in text
    assert parse_infotext(text)[0]["guidance_scale"] == 0.6
    text = to_infotext({"prompt": "x", "steps": 1, "sampler": "euler_cfg_pp", "guidance_scale": 0.6})
    assert "Sampler: Euler CFG++, CFG scale: 0.6" in text
    assert parse_infotext(text)[0]["guidance_scale"] == 0.6
