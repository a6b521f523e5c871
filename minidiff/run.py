"""generate() and sample_steps(): connect text encoder, UNet, sampler and autoencoder."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .apart import Apart
from .asked import asked
from .canvas import Beginning, Canvas, Moments, begin, each_once
from .checks import shown, warn
from .denoise import Denoise, Watch
from .guidance.begins import Begins
from .guidance.evaluate import look_loss
from .guidance.guide import Guidance, Guide
from .guidance.layout import Layout, PlacedObject
from .guidance.placed import with_placed
from .guidance.regions import share_edits
from .guidance.report import Report
from .guidance.stretch import UsualSizes
from .model import Model
from .networks.attention import HEAD_MEAN, Edit, Inputs, Maps, Record
from .networks.sites import SECOND_COARSEST, Position, Site, choose, cross
from .noise import Noise
from .png.chunk import Plain
from .progress import with_progress
from .recorded import LAST, MEAN, PER_STEP, Attention, Reduce, SiteMaps
from .request import Request
from .resolve import as_asked, check_places, image_inputs, latent_shape, resolve, warn_unused
from .result import Images, Result, to_numpy, to_pil
from .sampling import Sampler, SamplerStep, Schedule, sample
from .speed.accelerate import looks_of
from .speed.capture import spared
from .speed.replace import changed_weights
from .texts import Texts
from .tries import Seeds, best_seeds
from .weights.load import load

if TYPE_CHECKING:
    from .guidance.stretching import Stretching

ATTENTION = Record(SECOND_COARSEST, HEAD_MEAN)
"""What `attention=True` records."""
_REDUCTIONS: Mapping[str, Reduce] = {"mean": MEAN, "last": LAST, "per_step": PER_STEP}


@dataclass(frozen=True, eq=False)
class Step(SamplerStep):
    """A step of a Run, with a preview of the images."""

    model: Model | None = field(default=None, repr=False)

    def preview(self) -> Tensor:
        """The network's estimate at this step of the finished images, [B,3,H,W] in [0,1]."""
        assert self.model is not None
        return _pixels(self.model, self.denoised)


@asked(Request)
def generate(request: Request) -> Result:
    """Make images from text."""
    run = sample_steps(request)
    deque(with_progress(run, request.progress), maxlen=0)  # a loop would keep the previous step's maps
    return run.result()


@asked(Request)
def sample_steps(request: Request) -> Run:
    """The steps of `generate`, one at a time: watch, preview, stop early, draw a progress bar.

    The returned Run is an iterator of Steps with a length; its `result()` has the images. Each Step holds what it
    recorded (`maps`, with `attention`) and what guidance evaluated (`report`, a tuple of Evaluation). Texts are encoded
    immediately; the UNet runs when a step is requested.
    """
    started = time.perf_counter()
    model = request.model if isinstance(request.model, Model) else load(request.model)
    return _run(request, model, {"load": time.perf_counter() - started})


def _run(
    given_request: Request,
    model: Model,
    timings: Mapping[str, float],
    info: Mapping[str, Plain] = MappingProxyType({}),
    moments: Moments | None = None,
) -> Run:
    """The run, with its texts encoded; with `tries`, that of each image's best seed."""
    loaded = time.perf_counter()
    request, sampler, how = resolve(given_request, model)
    every_step = sampler.schedule(model.noise, request.steps, timesteps=request.timesteps, sigmas=request.sigmas)
    shape = latent_shape(request, model)
    noise = Noise.of(request, shape)
    moments = each_once(model) if moments is None else moments
    begun = begin(request, model, sampler, every_step, noise, moments)
    schedule, texts = begun.schedule, Texts.of(request, model, begun.schedule.steps)
    there = model.unet.positions(*shape[1:])
    told = _tell(request, model, sampler, how, texts, there, begun)
    if request.tries > 1 and told.guide is not None:

        def start(seeds: Seeds) -> Tensor:
            of_try = Noise.of(request.filled({"seed": seeds}), shape)
            return begin(request, model, sampler, every_step, of_try, moments).latents.to(model.device)

        best = best_seeds(_seeds(request), request.tries, start, told.guide, schedule)
        spent = {**timings, "tries": time.perf_counter() - loaded}
        return _run(given_request.filled({"seed": best, "tries": 1}), model, spent, {"tries": request.tries}, moments)
    warn_unused(given_request, request, schedule.steps, 0 if told.apart is None else told.apart.steps)
    refine, fresh = None if told.guide is None else told.guide.refine, noise if sampler.stochastic else None
    denoise = _denoise(request, model, sampler, told)
    renew = None if told.stretching is None or sampler.keeps_noise else told.stretching.renew
    steps = sample(denoise, begun.latents.to(model.device), schedule, sampler, refine, fresh, begun.hold, renew)
    steps = steps if told.stretching is None else told.stretching.finished(steps, schedule.steps)
    used = {
        "seed": tuple(s if request.latents is None or sampler.stochastic else None for s in _seeds(request)),
        "negative_prompt": None if request.negative_context is not None else texts.negatives,
        "guidance": None if told.guide is None and request.guidance is None else "none" if how is None else how,
        **as_asked(given_request, request),
        "attention": _recorded(model, told.record, there),
    }
    remake = given_request.filled({name: getattr(request, name) for name in ("width", "height", "seed", "vary")}).each()
    remake = remake if begun.canvas is None else remake.filled(begun.canvas.fields())
    timings = {**timings, "text": time.perf_counter() - loaded}
    return Run(request.filled(used), model, texts, schedule, steps, told, timings, begun.canvas, remake, info)


@dataclass(frozen=True, eq=False)
class _Told:
    """What the network gets in a run: contexts and inputs, one for all steps or one each; edits and the record, their
    sites chosen; the guide. weights: of texts that AND joins, [B,T]. apart: what takes regions apart. stretching: what
    stretches objects to their boxes.
    """

    contexts: Sequence[Tensor]
    inputs: Sequence[Inputs]
    edits: tuple[Edit, ...]
    record: Record | None
    guide: Guide | None
    weights: Tensor | None
    apart: Apart | None
    stretching: Stretching | None = None


def _tell(
    request: Request,
    model: Model,
    sampler: Sampler,
    how: Guidance | None,
    texts: Texts,
    there: Mapping[Site, Position],
    begun: Beginning,
) -> _Told:
    """Encode the texts, and find their phrases."""
    weights, scale = texts.weights, request.guidance_scale
    assert scale is not None and isinstance(request.edits, tuple)  # resolved
    both = scale > 1 or sampler.cfg_pp or weights is not None  # uncond and cond
    if texts.any_negative and not both:
        warn("the negative prompt has no effect at guidance_scale 1")
    edits = tuple(edit.of_run(begun.schedule.steps, partial(choose, sites=there)) for edit in request.edits)
    each_step = texts.in_each_step()
    encoded = {one: one.encode(model, request.clip_skip, negative=both) for one in each_step}
    contexts = [encoded[one] for one in each_step]
    given_inputs = {name: value.to(model.device) for name, value in (request.inputs or {}).items()}
    own = image_inputs(request, model, there, negative=both) | begun.inputs | given_inputs
    masks = texts.masks(model, there, both)
    if masks:
        own, edits = own | masks, edits + share_edits(choose(cross, there), both)
    record, placed = _record(request, there), {one: one.regions(request, model) for one in encoded}
    grid = begun.latents.shape[2], begun.latents.shape[3]
    sizes = None if how is None else _usual_sizes(how, request, begun.schedule)
    if sizes is not None:
        placed = {one: sizes.marked(found, placed[each_step[-1]], grid) for one, found in placed.items()}
    regions = placed[each_step[0]]
    apart = texts.apart(request.regions_apart or 0.0, begun.schedule.steps, model, grid)
    if not any(regions):
        return _Told(contexts, [own], edits, record, None, weights, apart)
    length, related = contexts[0].shape[1], request.related
    layouts = {one: one.layout(model, placed[one], length, there, related) for one in encoded}
    inputs = {one: {**layouts[one].inputs(), **own} for one in encoded}
    guide = stretching = None
    if how is not None:
        check_places(how, regions, related)
        seen = [(encoded[one][-len(regions) :], layouts[one], inputs[one]) for one in each_step]
        simple = not (edits or given_inputs or model.image_adapters or model.int8 or how.watch)
        simple = simple and record is None and weights is None and request.cache_interval == 1
        how = how if how.usual_sizes == sizes else replace(how, usual_sizes=sizes)
        how = how.of_run(begun.schedule.steps, there)
        guide = _guide(model, how, seen, regions, edits, simple)
        stretched = any(one.stretched for some in regions for one in some)
        stretching = _stretching(request, model, guide, regions) if stretched and how.acts else None
    return _Told(contexts, [inputs[one] for one in each_step], edits, record, guide, weights, apart, stretching)


def _denoise(request: Request, model: Model, sampler: Sampler, told: _Told) -> Denoise:
    every, scale = request.cache_interval, request.guidance_scale
    assert scale is not None  # resolved
    alone = told.record is None and told.weights is None and every == 1 and len(told.contexts) == 1
    return Denoise(
        model,
        told.contexts,
        scale,
        request.guidance_rescale,
        told.record,
        told.edits,
        told.inputs,
        told.weights,
        request.guidance_interval,
        every,
        _watch(told.guide) if told.guide is not None and alone else None,
        sampler.cfg_pp,
        told.apart,
        told=None if told.guide is None else told.guide.update,
        begins=None if told.guide is None else told.guide.begins,
    )


class Run(Iterator[Step]):
    """The steps of one call, as an iterator with a length.

    `request` is the request with all defaults filled in: size, sampler, scale, and the seeds drawn.
    `result()` has the images: finished ones after the last step, before that the network's current estimate.
    """

    def __init__(
        self,
        request: Request,
        model: Model,
        texts: Texts,
        schedule: Schedule,
        steps: Iterator[SamplerStep],
        told: _Told,
        timings: Mapping[str, float],
        canvas: Canvas | None,
        remake: Request,
        info: Mapping[str, Plain],
    ) -> None:
        self.request, self._model, self._texts, self.schedule = request, model, texts, schedule
        self._steps, self.guide, self._record, self._timings = steps, told.guide, told.record, dict(timings)
        self._canvas, self._remake = canvas if request.paste else None, remake
        self._reduce = request.reduce if callable(request.reduce) else _REDUCTIONS[request.reduce]
        self._own_info = info
        self._last: Step | None = None
        self._kept: Maps | None = None

    def __repr__(self) -> str:
        done, asked = 0 if self._last is None else self._last.index + 1, self.request
        return (
            f"<Run: {done} of {len(self)} steps, {asked.images} image{'' if asked.images == 1 else 's'} of "
            f"{asked.width}x{asked.height}, seeds {shown(asked.seed)}, {self._model!r}>"
        )

    def __len__(self) -> int:
        """The total number of steps, including those already taken."""
        return self.schedule.steps

    def __next__(self) -> Step:
        before = time.perf_counter()
        found = next(self._steps)
        # time the caller spends between steps is not sampling
        self._timings["sampling"] = self._timings.get("sampling", 0.0) + time.perf_counter() - before
        looks = () if self.guide is None else tuple(self.guide.seen.get(found.index, ()))
        maps = SiteMaps(found.maps)
        step = Step(found.index, found.t, found.sigma, found.latents, found.denoised, maps, looks, self._model)
        self._last = replace(step, maps=SiteMaps({}))  # maps are large, and the next step has its own
        self._kept = self._reduce(self._kept, found.maps, found.index) if found.maps else None
        return step

    def result(self, decode: Callable[[Tensor], Tensor] | None = None) -> Result:
        """The decoded images after the last step taken.

        decode: latents [1,4,h,w] to pixels [1,3,H,W] in [-1,1], in place of the autoencoder, for cheap previews, which
        the safety checker does not judge and whose reports have no `placed`.

        Before the end, they are the network's estimate of the finished images, and `info["stopped_after"]` is the
        number of steps taken. ValueError before the first step.
        """
        if self._last is None:
            raise ValueError("no step has been taken yet; loop over the run, or call next(run), before result()")
        done = self._last.index + 1
        before = time.perf_counter()
        latents = (self._last.latents if done == len(self) else self._last.denoised).float().cpu()
        images: Images = latents
        flagged: tuple[bool, ...] | None = None
        if self.request.output != "latents":
            pixels = _pixels(self._model, latents, decode)
            pixels = pixels if self._canvas is None else self._canvas.pasted(pixels)
            output = self.request.output
            images = pixels if output == "tensor" else to_numpy(pixels) if output == "numpy" else to_pil(pixels)
            safety = self._model.safety if decode is None else None
            flagged = None if safety is None else safety(to_pil(pixels))
        changed = len(changed_weights(self._model.unet, self._model.vae, self._model.text.model))
        stopped: dict[str, Plain] = {} if done == len(self) else {"stopped_after": done}
        return Result(
            images=images,
            latents=latents,
            seeds=_seeds(self.request),
            parameters=tuple(self.request.alone(i).plain() for i in range(len(latents))),
            timings={**self._timings, "decode": time.perf_counter() - before},
            info={**self._model.facts(changed), **self._own_info, **stopped},
            attention=None if self._kept is None else self._attention(self._kept),
            reports=None if self.guide is None else self._reports(self.guide, latents, bool(changed or decode)),
            flagged=flagged,
            request=self._remake,
            generate=generate,
        )

    def _reports(self, guide: Guide, latents: Tensor, other: bool) -> tuple[Report, ...]:
        """other: previews, or a model with changed weights: `placed` knows nothing of them, nor of noisy latents."""
        reports = tuple(map(guide.report, range(len(latents))))
        other = other or not self.schedule.ends_clean
        return reports if other else with_placed(reports, self._model, latents, guide, len(self) - 1)

    def _attention(self, kept: Maps) -> Attention:
        texts, record = self._texts, self._record
        assert record is not None
        maps = SiteMaps({site: found.detach().float().cpu() for site, found in kept.items()})
        reader, asked = texts.reading(record.rows == "uncond")
        prompts = None if asked is None else tuple(text for text in asked for _ in range(texts.repeats))
        return Attention(maps, record.kinds, texts.images, reader, prompts, self._reduce is PER_STEP)


def _seeds(request: Request) -> tuple[int, ...]:
    assert isinstance(request.seed, tuple)  # resolved
    return request.seed


def _record(request: Request, there: Mapping[Site, Position]) -> Record | None:
    """What to record, with its sites resolved to the UNet's."""
    record = ATTENTION if request.attention is True else request.attention or None
    return None if record is None else record.chosen(lambda where: choose(where, there))


def _recorded(model: Model, record: Record | None, there: Mapping[Site, Position]) -> bool | Record | None:
    """The record to store among the reproducing arguments: below float32, sites recorded without kernels for it
    (speed/keeps.py) bypass the fused attention and round differently.
    """
    if record is None or model.dtype_name == "float32":
        return None
    return True if record == replace(ATTENTION, sites=choose(ATTENTION.sites, there)) else record


def _guide(
    model: Model,
    how: Guidance,
    told: Sequence[tuple[Tensor, Layout, Inputs]],
    regions: Sequence[Sequence[PlacedObject]],
    edits: Sequence[Edit],
    simple: bool,
) -> Guide:
    """The run's Guide. told: what it reads, once for all steps or in each. simple: whether a step is one pass alone."""
    names = [[region.name for region in some] for some in regions]
    each_step = told if len(told) > 1 else ()
    context, layout, inputs = told[0]
    loss, whole, run, resumes = looks_of(model.unet, look_loss, max((h * w for h, w in layout.masks), default=0))
    begins = Begins(model.unet.forward) if resumes and simple else None
    forward = (begins or model.unet).forward
    return Guide(how, forward, context, layout, names, edits, inputs, whole, loss, each_step, run, begins)


def _usual_sizes(how: Guidance, request: Request, schedule: Schedule) -> UsualSizes | None:
    """Which boxes objects are not stretched to, in guided and finished pictures of noise alone."""
    alone = how.usual_sizes is not None and request.image is None and request.latents is None
    return how.usual_sizes if alone and how.guided(schedule.steps) > 0 and schedule.ends_clean else None


def _stretching(request: Request, model: Model, guide: Guide, regions: Sequence[Sequence[PlacedObject]]) -> Stretching:
    from .guidance.stretching import SEEN, Stretching  # here, since most runs have none

    shape = latent_shape(request, model)
    record = SEEN.chosen(partial(choose, sites=model.unet.positions(*shape[1:])))
    decode, encode = partial(_pixels, model), partial(spared, model.unet, model.latents)
    return Stretching(guide, regions, model.unet, record, Noise.beside(request, shape), decode, encode)


def _watch(guide: Guide) -> Watch | None:
    """What a guide that watches needs of the steps before its last guided one."""
    how = guide.guidance
    if not how.watch or guide.each_step:
        return None
    assert isinstance(how.steps, int)  # of_run
    return Watch(replace(guide.record, rows="cond", stop=False), how.steps - 1, guide.take)


def _pixels(model: Model, latents: Tensor, decode: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Latents [B,4,h,w] -> images [B,3,H,W] in [0,1] on the CPU, one at a time: memory does not grow with the batch."""
    images = torch.cat([spared(model.unet, decode or model.decode, one).cpu() for one in torch.split(latents, 1)])
    broken = [i for i, image in enumerate(images) if not image.isfinite().all()]
    if broken:
        warn(
            f"images {broken} are black where they were NaN: the network overflowed in {model.dtype} (load the "
            'model with dtype="float32"), or an edit, an input or the weights hold NaN'
        )
    return (images.nan_to_num(-1, -1, -1) / 2 + 0.5).clamp(0, 1)
