"""generate(): the one file that wires text, UNet, sampler and autoencoder together."""

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .arguments import (
    Texts,
    check_boxes,
    check_choice,
    check_fraction,
    check_guidance,
    check_latents,
    check_scale,
    check_seeds,
    check_size,
    check_texts,
    latent_shape,
    plain_boxes,
)
from .guidance.guide import Guidance, Guide, Report, evaluate, evaluate_whole
from .guidance.layout import Boxes, Layout, Region, make_layout
from .guidance.objectives import Objective
from .model import Model
from .networks.attention import ALL, HEAD_MEAN, Edit, Inputs, Keep, Record, Site
from .networks.sites import Position, choose, cross, level
from .networks.unet import Maps
from .recorded import MEAN, PER_STEP, Attention, Reduce
from .result import Images, Plain, Result, plain, to_numpy, to_pil
from .sampling import Sampler, Schedule, choose_sampler, sample, sampler_fields
from .sampling import Step as SamplerStep
from .speed.accelerate import compile_whole, is_compiled
from .weights.load import load
from .weights.sources import BUNDLED

Output = Literal["pil", "numpy", "tensor", "latents"]
OUTPUTS = ("pil", "numpy", "tensor", "latents")
ATTENTION = Record(cross & level(1), HEAD_MEAN)
"""What `attention=True` keeps."""


@dataclass(frozen=True, eq=False)
class Step(SamplerStep):
    """A step of sample_steps, which can show what it has so far."""

    run: "_Run | None" = field(default=None, repr=False)

    def preview(self) -> Tensor:
        """The network's estimate at this step of the finished images, [B,3,H,W] in [0,1]."""
        assert self.run is not None
        return self.run.pixels(self.denoised)

    def result(self, output: Output = "pil", maps: Maps | None = None, per_step: bool = False) -> Result:
        """The finished images. ValueError before the last step.

        maps: what was kept of the run's, for the result's `attention`; default: this step's. per_step: [S,...].
        """
        assert self.run is not None
        if self.index + 1 < self.run.schedule.steps:
            raise ValueError(
                f"this is step {self.index} of {self.run.schedule.steps}; expected the last one. "
                "Run the loop to its end, or look at preview() and latents"
            )
        return self.run.result(self.latents, output, maps or self.maps or None, per_step)


def generate(
    prompt: str | Sequence[str] | None = None,
    *,
    model: Model | str | Path = BUNDLED,
    negative_prompt: str | Sequence[str] | None = None,
    width: int | None = None,
    height: int | None = None,
    steps: int | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    guidance_scale: float | None = None,
    guidance_rescale: float = 0.0,
    clip_skip: int | None = None,
    sampler: str | Sampler | None = None,
    karras: bool | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
    seed: int | Sequence[int] | None = None,
    images_per_prompt: int = 1,
    latents: Tensor | None = None,
    context: Tensor | None = None,
    negative_context: Tensor | None = None,
    boxes: Boxes | Sequence[Boxes | None] | None = None,
    guidance: Guidance | Objective | str | Mapping[str, object] | None = None,
    edit: Edit | None = None,
    inputs: Inputs | None = None,
    attention: bool | Record = False,
    reduce: Reduce = MEAN,
    output: Output = "pil",
) -> Result:
    """Make images from text.

    prompt: one text or a list; or None with `context`, the encoded text [P,L,D].
    model: a Model from `minidiff.load`, or what load takes (a hub id, folder or .safetensors file), loaded for this
        call alone. Default: the bundled model of coloured shapes, which needs no download.
    negative_prompt: one for all or a list as long; or `negative_context` [P,L,D].
    width, height: pixels, multiples of the autoencoder's factor (8 in SD 1.5); default: what the UNet was trained on.
    steps: of the sampler; or `timesteps` (descending, 0 to 999), or `sigmas` (descending to 0), where it takes them.
    guidance_scale: w in eps_uncond + w * (eps_cond - eps_uncond) (Ho and Salimans 2022, eq. 6), at least 1; 1 runs the
        conditional half alone.
    guidance_rescale: in [0,1], how far the guided prediction is brought back to the spread of the conditional one
        (Lin et al. 2023, eq. 15-16).
    clip_skip: leave out the last n layers of the text encoder, in diffusers' counting (A1111's is one more).
    sampler: "ddim", "pndm", "euler", "euler_ancestral", "lms", "dpmpp_2m" or a sampler object; default: the model's.
        With a name, `karras` takes the noise levels of Karras et al. 2022, `spacing` ("leading", "linspace",
        "trailing") places the timesteps, and `eta` in [0,1] gives DDIM fresh noise.
    seed: of the first image, the next ones count on; or one per image. None draws one; the result names it.
    images_per_prompt: the images of a prompt follow each other. Image i of a batch agrees with image i made alone from
        its own seed.
    latents: start from these instead of noise, [images,4,h,w] of unit variance.
    boxes: where things shall be: {phrase of the prompt: (x0, y0, x1, y1) in [0,1], from the left and the top}, one for
        all prompts or a list with one (or None) for each. A phrase may have a list of boxes, a mask ([H,W] or an image)
        or {"boxes": ..., "weight": 2.0}; token positions may stand for the phrase. The result's `reports` say what
        became of it.
    guidance: how boxes are followed: a Guidance, an objective, the name of a published one ("layout",
        "attend_and_excite", "boxdiff", "refocusing", "rnb"), or "none" (for an edit that follows them by itself);
        default: the model's.
    edit, inputs: changes of the attention, and tensors that they read beside the layout's.
    attention: keep the attention maps, for the result's `attention["phrase"]`: True, or a Record of your own. `reduce`
        over steps: minidiff.MEAN, LAST or PER_STEP.
    output: "pil" images, "numpy" [B,H,W,3] or "tensor" [B,3,H,W] in [0,1], or "latents" (not decoded).

    Noise is drawn on the CPU in float32, so a seed means the same image on every device. Raises ValueError for any
    argument that does not fit, before the network runs.
    """
    check_choice("output", output, OUTPUTS)
    steps_run = sample_steps(
        prompt,
        model=model,
        negative_prompt=negative_prompt,
        width=width,
        height=height,
        steps=steps,
        timesteps=timesteps,
        sigmas=sigmas,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        clip_skip=clip_skip,
        sampler=sampler,
        karras=karras,
        spacing=spacing,
        eta=eta,
        seed=seed,
        images_per_prompt=images_per_prompt,
        latents=latents,
        context=context,
        negative_context=negative_context,
        boxes=boxes,
        guidance=guidance,
        record=ATTENTION if attention is True else attention or None,
        edit=edit,
        inputs=inputs,
    )
    kept: Maps | None = None
    for step in steps_run:
        kept = reduce(kept, step.maps, step.index) if step.maps else None
    return step.result(output, kept, per_step=reduce is PER_STEP)


def sample_steps(
    prompt: str | Sequence[str] | None = None,
    *,
    model: Model | str | Path = BUNDLED,
    negative_prompt: str | Sequence[str] | None = None,
    width: int | None = None,
    height: int | None = None,
    steps: int | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    guidance_scale: float | None = None,
    guidance_rescale: float = 0.0,
    clip_skip: int | None = None,
    sampler: str | Sampler | None = None,
    karras: bool | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
    seed: int | Sequence[int] | None = None,
    images_per_prompt: int = 1,
    latents: Tensor | None = None,
    context: Tensor | None = None,
    negative_context: Tensor | None = None,
    boxes: Boxes | Sequence[Boxes | None] | None = None,
    guidance: Guidance | Objective | str | Mapping[str, object] | None = None,
    record: Record | None = None,
    edit: Edit | None = None,
    inputs: Inputs | None = None,
) -> Iterator[Step]:
    """The steps of `generate`, one at a time: watch, preview, stop early, draw a progress bar.

    The last one's `result()` has the images.
    Arguments as for `generate`, and `record` as the UNet takes it; each Step holds what was recorded in it (`maps`) and
    what guidance saw (`report`, a tuple of Evaluation).
    Arguments are checked and texts encoded at the call; the network runs when a step is asked for.
    """
    started = time.perf_counter()
    if not isinstance(model, Model):
        model = load(model)
    loaded = time.perf_counter()
    texts = check_texts(prompt, negative_prompt, context, negative_context, model, images_per_prompt)
    chosen = choose_sampler(model.noise, model.defaults.sampler, sampler, karras, spacing, eta)
    if steps is None and timesteps is None and sigmas is None:
        steps = model.defaults.steps
    schedule = chosen.schedule(model.noise, steps, timesteps=timesteps, sigmas=sigmas)
    scale = check_scale(model.defaults.guidance_scale if guidance_scale is None else guidance_scale)
    check_fraction("guidance_rescale", guidance_rescale)
    width, height = check_size(model, width, height, latents)
    seeds = check_seeds(seed, texts.images)
    noise = _Noise(tuple(torch.Generator().manual_seed(s) for s in seeds), latent_shape(model, width, height))
    start = noise() if latents is None else check_latents(latents, texts.images, noise.shape)
    if scale == 1 and texts.any_negative:
        warnings.warn("the negative prompt has no effect at guidance_scale 1", stacklevel=2)
    there = model.unet.positions(*noise.shape[1:])
    record = None if record is None else replace(record, sites=choose(record.sites, there))
    edit = None if edit is None else replace(edit, sites=choose(edit.sites, there))
    encoded = texts.encode(model, clip_skip, negative=scale > 1)
    regions = check_boxes(boxes, texts, model)
    how = check_guidance(model.defaults.guidance if guidance is None else guidance)
    guide, given = None, inputs or {}
    if any(regions):
        layout = _layout(model, texts, regions, encoded.shape[1], there)
        given = {**layout.inputs(), **given}
        if how is not None:
            bound = replace(how.of_run(schedule.steps), objective=how.objective.bound(there, how.sites))
            guide = _guide(model, bound, encoded[-texts.images :], layout, regions, edit, inputs)
    denoise = Denoise(model, encoded, scale, guidance_rescale, record, edit, given)
    arguments: dict[str, object] = {
        "model": model.name,
        "width": width,
        "height": height,
        "steps": steps if timesteps is None and sigmas is None else None,
        "timesteps": timesteps,
        "sigmas": sigmas,
        "guidance_scale": scale,
        "guidance_rescale": guidance_rescale,
        "clip_skip": clip_skip,
        **sampler_fields(chosen),
        "latents": latents,
        "guidance": None if guide is None and guidance is None else "none" if how is None else how.plain(),
        "edit": edit,
        "inputs": inputs,
        "attention": _recorded(model, record, there),
    }
    used = [s if latents is None or chosen.stochastic else None for s in seeds]
    timings = {"load": loaded - started, "text": time.perf_counter() - loaded}
    keep = None if record is None else record.keep
    run = _Run(model, schedule, texts, tuple(used), arguments, timings, regions, guide, keep)
    fresh = noise if chosen.stochastic else None
    refine = None if guide is None else guide.refine
    return run.steps(sample(denoise, start.to(model.device), schedule, chosen, refine, fresh))


def _recorded(model: Model, record: Record | None, there: Mapping[Site, Position]) -> bool | Record | None:
    """What a record adds to the arguments that make an image again: in half precision the recorded sites, which leave
    the fused kernel, round otherwise.
    """
    if record is None or model.dtype == torch.float32:
        return None
    own = [site for site, at in there.items() if site.kind == "cross" and at.level == 1]
    return True if record == replace(ATTENTION, sites=frozenset(own)) else record


def _layout(
    model: Model, texts: Texts, regions: Sequence[Sequence[Region]], length: int, there: Mapping[Site, Position]
) -> Layout:
    """Of a batch's regions, on every grid that the UNet has."""
    if texts.prompts is None:
        tokens = [length - 1] * texts.images  # all but the start marker: which are the prompt's own is not known
    else:
        tokens = [model.text.num_tokens(prompt) for prompt in texts.prompts for _ in range(texts.repeats)]
    return make_layout(regions, tokens, length, {at.grid for at in there.values()}, model.device)


def _guide(
    model: Model,
    how: Guidance,
    context: Tensor,
    layout: Layout,
    regions: Sequence[Sequence[Region]],
    edit: Edit | None,
    inputs: Inputs | None,
) -> Guide:
    """Its passes compiled, where the model is."""
    names = [[region.name for region in some] for some in regions]
    compiled = is_compiled(model.unet)
    look = compile_whole(evaluate_whole, model.unet) if compiled else evaluate
    return Guide(how, model.unet.forward, context, layout, names, edit, inputs, compiled, look)


class Denoise:
    """The network as the sampling loop sees it, with classifier-free guidance inside.

    `context` holds the conditional texts [B,L,D], or [uncond, cond] [2B,L,D] where the scale asks for both.
    """

    def __init__(
        self,
        model: Model,
        context: Tensor,
        scale: float,
        rescale: float,
        record: Record | None = None,
        edit: Edit | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        self.model, self.context, self.scale, self.rescale = model, context, scale, rescale
        self.record, self.edit, self.inputs = record, edit, inputs
        if scale == 1:  # there are no unconditional rows to leave out
            self.record = None if record is None else replace(record, rows=_only_rows("record", record.rows))
            self.edit = None if edit is None else replace(edit, rows=_only_rows("edit", edit.rows))
        if record is not None and record.stop:
            raise ValueError(
                "record.stop ends the forward pass before it has a prediction; expected stop=False when sampling"
            )

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, index: int) -> tuple[Tensor, Maps]:
        """Predict from variance-preserving x in step `index`; float32 whatever the networks compute in."""
        halves = x if self.scale == 1 else torch.cat([x, x])
        edit = self.edit
        if edit is not None and edit.steps is not None and index >= edit.steps:
            edit = None
        output, maps = self.model.unet(halves.to(self.model.dtype), t, self.context, self.record, edit, self.inputs)
        assert output is not None  # no stop
        if self.scale == 1:
            return output.float(), maps
        uncond, cond = output.float().chunk(2)
        return guided(uncond, cond, self.scale, self.rescale), maps


def guided(uncond: Tensor, cond: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, eq. 6), with the rescaling of Lin et al. 2023, eq. 15-16.

    All [B,C,h,w]; the spread is taken over each image of its own.
    """
    mixed = uncond + scale * (cond - uncond)
    if rescale == 0:
        return mixed
    spread = cond.std(dim=(1, 2, 3), keepdim=True) / mixed.std(dim=(1, 2, 3), keepdim=True)
    return rescale * (mixed * spread) + (1 - rescale) * mixed


def _only_rows(name: str, rows: str) -> Literal["all"]:
    if rows == "uncond":
        raise ValueError(
            f'{name}.rows is "uncond", but guidance_scale 1 runs no unconditional rows; '
            'expected "cond" or "all", or a larger scale'
        )
    return "all"


@dataclass(frozen=True)
class _Noise:
    """Unit noise [B,C,h,w], each image's from a CPU generator of its own: equal on every device, in every batch."""

    generators: tuple[torch.Generator, ...]
    shape: tuple[int, int, int]

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self.generators])


@dataclass(frozen=True, eq=False)
class _Run:
    """What the steps of one call share, for those that become images."""

    model: Model
    schedule: Schedule
    texts: Texts
    seeds: tuple[int | None, ...]
    arguments: Mapping[str, object]
    timings: Mapping[str, float]
    regions: Sequence[Sequence[Region]]
    guide: Guide | None
    keep: Keep | None

    def steps(self, found: Iterator[SamplerStep]) -> Iterator[Step]:
        """The sampler's steps, with a way to images.

        Time that the caller spends between two steps does not count as sampling.
        """
        seconds = 0.0
        while True:
            before = time.perf_counter()
            step = next(found, None)
            seconds += time.perf_counter() - before
            if step is None:
                return
            run = replace(self, timings={**self.timings, "sampling": seconds})
            looks = () if self.guide is None else tuple(self.guide.seen.get(step.index, ()))
            yield Step(step.index, step.t, step.sigma, step.latents, step.denoised, step.maps, looks, run)

    def pixels(self, latents: Tensor) -> Tensor:
        """Latents [B,4,h,w] -> images [B,3,H,W] in [0,1] on the CPU.

        Decoded one by one, so memory does not grow with the batch.
        """
        images = torch.cat([self.model.decode(one).cpu() for one in torch.split(latents, 1)])
        broken = [i for i, image in enumerate(images) if not image.isfinite().all()]
        if broken:
            warnings.warn(
                f"images {broken} are black where they are not a number: the network overflowed in {self.model.dtype}. "
                'Load the model with dtype="float32" (or "bfloat16")',
                stacklevel=3,
            )
        return (images.nan_to_num(-1, -1, -1) / 2 + 0.5).clamp(0, 1)

    def result(self, latents: Tensor, output: Output, maps: Maps | None, per_step: bool) -> Result:
        """Decode, and write down what was asked."""
        check_choice("output", output, OUTPUTS)
        before = time.perf_counter()
        latents = latents.float().cpu()
        images: Images = latents
        if output != "latents":
            pixels = self.pixels(latents)
            images = pixels if output == "tensor" else to_numpy(pixels) if output == "numpy" else to_pil(pixels)
        return Result(
            images=images,
            latents=latents,
            seeds=self.seeds,
            parameters=tuple(self._parameters(i) for i in range(len(latents))),
            timings={**self.timings, "decode": time.perf_counter() - before},
            info=self._info(),
            attention=None if maps is None else self._attention(maps, per_step),
            reports=self._reports(),
        )

    def _attention(self, maps: Maps, per_step: bool) -> Attention:
        def find(image: int, phrase: str) -> tuple[int, ...]:
            if self.texts.prompts is None:
                raise ValueError(f"there is no prompt to find {phrase!r} in; read the tokens of attention.maps")
            return self.model.text.all_spans(self.texts.prompts[image // self.texts.repeats], phrase)

        on_cpu = {site: kept.detach().float().cpu() for site, kept in maps.items()}
        heads = True if self.keep is ALL else False if self.keep is HEAD_MEAN else None
        return Attention(on_cpu, self.texts.images, find, heads, per_step)

    def _reports(self) -> tuple[Report, ...] | None:
        return None if self.guide is None else tuple(self.guide.report(i) for i in range(self.texts.images))

    def _parameters(self, i: int) -> dict[str, Plain]:
        """The arguments that make image i alone."""
        given: dict[str, object] = {**self.texts.arguments(i), **self.arguments, "seed": self.seeds[i]}
        given["boxes"] = plain_boxes(self.regions[i]) or None
        if isinstance(given["latents"], Tensor):
            given["latents"] = given["latents"][i : i + 1]
        return {name: plain(value) for name, value in given.items() if value is not None}

    def _info(self) -> dict[str, Plain]:
        model = self.model
        return {
            "versions": {name: version(name) for name in ("minidiff", "torch", "transformers")},
            "dtype": plain(model.dtype),
            "device": model.device.type,
            "load": dict(model.options),
            "model_hash": None if model.sha256 is None else model.sha256[:10],
        }
