"""Published runs of layout guidance, replayed with minidiff's parts.

Chen, Laina and Vedaldi's own code ("paper") and the port in diffusers-layout-guidance ("tflcg") do more than the
formula says. Those extras are implemented here and not in the library:

- the stop test uses the last loss across steps, so guidance ends for good at the first evaluation below the threshold;
  it comes before the next evaluation, so that evaluation's update is still made;
- box corners on a grid are truncated by int() (paper) or rounded by round() (tflcg); a cell is either in or out;
- tflcg takes the second half of an assumed batch [uncond, cond], which is in fact the second half of the heads;
- paper finds a token by counting the prompt's words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import minidiff
from minidiff.denoise import Denoise
from minidiff.guidance.evaluate import evaluate
from minidiff.guidance.guide import Guidance, Guide
from minidiff.guidance.layout import Box, Layout, PlacedObject, make_layout
from minidiff.guidance.objectives import Objective
from minidiff.guidance.objectives.layout import layout_loss
from minidiff.guidance.report import Evaluation
from minidiff.model import Model
from minidiff.networks.attention import BOX_MASS, Inputs
from minidiff.networks.sites import Grid, Site
from minidiff.sampling import LMS, Euler, Sampler, sample

GOLDEN = Path(__file__).parent / "golden"


class PaperCase(TypedDict):
    prompt: str
    phrases: str  # separated by semicolons
    boxes: list[list[list[float]]]  # several to a phrase


class PaperConfig(TypedDict):
    loss_scale: float
    loss_threshold: float
    max_iter: int
    max_index_step: int
    timesteps: int
    classifier_free_guidance: float


class TflcgCase(TypedDict):
    prompt: str
    negative: NotRequired[str]
    tokens: list[list[int]]
    boxes: list[list[float]]  # one to an object
    steps: int
    cfg: NotRequired[float]
    scale: float
    guided: int
    iters: int


@dataclass(frozen=True)
class Run:
    """A published run: its arguments, and how its code interprets them.

    tokens, boxes: per object. snap: rounds a box edge in cells to an integer; None for minidiff's own exact coverage.
    guidance: with an objective that uses the same heads as the code. guide: how it stops.
    """

    prompt: str
    negative: str
    tokens: tuple[tuple[int, ...], ...]
    boxes: tuple[tuple[Box, ...], ...]
    sampler: Sampler
    steps: int
    guidance_scale: float
    guidance: Guidance
    snap: Callable[[float], int] | None
    guide: type[Guide]


def replay(reference_file: Path, model_folder: Path, dtype: torch.dtype = torch.float64) -> tuple[list[float], Tensor]:
    """The loss of every evaluation in order, and the latents after every step [S,4,h,w] in the sampler's scaling.

    model_folder: without a tokenizer, that of tests/golden is used. dtype: of the networks and the latents; float64,
    since a run that amplifies rounding errors by thousands leaves no accurate float32 digits to compare.
    """
    noise = load_file(reference_file)["latents0"]
    return rerun(read_run(reference_file), load_model(model_folder, dtype), noise)


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    """A model in any dtype, including float64, which `load` does not offer."""
    tokenizer = None if (folder / "tokenizer").is_dir() else GOLDEN / "tokenizer"
    model = minidiff.load(folder, tokenizer=tokenizer, dtype="float32", device="cpu")
    for network in (model.unet, model.vae, model.text.model):
        network.to(dtype)
    return model


def rerun(
    run: Run, model: Model, noise: Tensor, starts: Tensor | None = None, first: int | None = None
) -> tuple[list[float], Tensor]:
    """As `replay`, from unit-variance noise [1,4,h,w].

    starts: latents [S,4,h,w], e.g. a reference's; every step but the first then starts from those of the step before,
    so that rounding errors do not accumulate. first: stop after this many steps.
    """
    noise = noise.to(model.dtype)
    context = model.text.encode([run.negative, run.prompt])
    there = model.unet.positions(*noise.shape[2:])
    guidance = replace(run.guidance, objective=run.guidance.objective.bound(there))
    layout = published_layout(run, model, {there[site].grid for site in guidance.objective.sites})
    names = [[f"tokens:{tokens}" for tokens in run.tokens]]
    guide = run.guide(guidance, model.unet.forward, context[1:], layout, names)

    def refine(x: Tensor, t: Tensor, abar: float, index: int) -> Tensor:
        if starts is not None and index > 0:
            x = starts[index - 1 : index].to(x) * abar**0.5  # both samplers' latents are scaled by 1 / sqrt(abar)
        return guide.refine(x, t, abar, index)

    denoise = Denoise(model, [context], run.guidance_scale, 0.0, record=None, edits=(), inputs=[{}])
    schedule = run.sampler.schedule(model.noise, run.steps)
    steps = [step.latents for step in islice(sample(denoise, noise, schedule, run.sampler, refine), first)]
    return losses(guide), torch.cat(steps)


def losses(guide: Guide) -> list[float]:
    """The loss of every evaluation in order, for one image."""
    return [float(look.loss) for looks in guide.seen.values() for look in looks]


class Sticky(Guide):
    """Stops for good after the first evaluation below the threshold. For one image."""

    def refine(self, x: Tensor, t: Tensor, abar: float, index: int) -> Tensor:
        scale, threshold, iterations = self.guidance.at(index)
        for _ in range(iterations):
            if any(loss <= threshold for loss in losses(self)):
                break
            gradient, found = evaluate(
                x, self.forward, self.guidance.objective, self.record, (), t, self.context, self.layout, self.inputs
            )
            self.seen.setdefault(index, []).append(Evaluation(*found, moved=torch.ones(1, dtype=torch.bool)))
            x = x - scale * (1 - abar) * gradient
        return x


def published_layout(run: Run, model: Model, grids: set[Grid]) -> Layout:
    regions = [
        PlacedObject(f"tokens:{tokens}", tokens, boxes) for tokens, boxes in zip(run.tokens, run.boxes, strict=True)
    ]
    layout = make_layout([regions], [model.text.num_tokens(run.prompt)], model.text.length, grids)
    if run.snap is None:
        return layout
    return layout._replace(
        masks={grid: torch.stack([snapped(boxes, grid, run.snap) for boxes in run.boxes])[None] for grid in grids}
    )


def snapped(boxes: Sequence[Box], grid: Grid, snap: Callable[[float], int]) -> Tensor:
    """[h,w], 1 in the cells between the snapped edges."""
    mask = torch.zeros(grid)
    for x0, y0, x1, y1 in boxes:
        mask[snap(y0 * grid[0]) : snap(y1 * grid[0]), snap(x0 * grid[1]) : snap(x1 * grid[1])] = 1
    return mask


def half_of_the_heads(site: Site, probs: Tensor, inputs: Inputs) -> Tensor:
    """BOX_MASS of the second half of the heads: [B,H/2,O,L]."""
    return BOX_MASS(site, probs.chunk(2, dim=1)[1], inputs)


def of_half_of_the_heads() -> Objective:
    return replace(
        layout_loss,
        terms=tuple(
            replace(term, keep=minidiff.Keep("half_of_the_heads", half_of_the_heads)) for term in layout_loss.terms
        ),
    )


def read_run(file: Path) -> Run:
    """Read a run from a reference file's metadata."""
    with safe_open(file, "pt") as opened:
        told = {name: json.loads(text) for name, text in opened.metadata().items()}
    return paper_run(told["case"], told["cfg"]) if "cfg" in told else tflcg_run(told["case"])


def paper_run(case: PaperCase, cfg: PaperConfig) -> Run:
    """The paper's code. It counts scheduler calls where minidiff counts steps; with LMS these are the same."""
    words = case["prompt"].strip(".").split(" ")
    return Run(
        prompt=case["prompt"],
        negative="",
        tokens=tuple(
            tuple(words.index(word) + 1 for word in phrase.strip().split(" ")) for phrase in case["phrases"].split(";")
        ),
        boxes=tuple(tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in boxes) for boxes in case["boxes"]),
        sampler=LMS(spacing="linspace"),
        steps=cfg["timesteps"],
        guidance_scale=cfg["classifier_free_guidance"],
        guidance=Guidance(
            scale=cfg["loss_scale"],
            threshold=cfg["loss_threshold"],
            iterations=cfg["max_iter"],
            steps=cfg["max_index_step"],
        ),
        snap=int,
        guide=Sticky,
    )


def tflcg_run(case: TflcgCase) -> Run:
    """diffusers-layout-guidance."""
    return Run(
        prompt=case["prompt"],
        negative=case.get("negative", ""),
        tokens=tuple(map(tuple, case["tokens"])),
        boxes=tuple(((x0, y0, x1, y1),) for x0, y0, x1, y1 in case["boxes"]),
        sampler=Euler(spacing="linspace"),
        steps=case["steps"],
        guidance_scale=case.get("cfg", 7.5),
        guidance=Guidance(
            of_half_of_the_heads(),
            scale=case["scale"],
            threshold=0.2,
            iterations=case["iters"],
            steps=case["guided"],
        ),
        snap=round,
        guide=Sticky,
    )
