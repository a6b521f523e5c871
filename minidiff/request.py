"""Request: everything that one call can ask for, as a frozen value that can be written as JSON.

Whatever can be checked without a model is checked on construction, so a wrong argument never waits for a load or a
download. Modules of other packages are imported only when a field needs them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from .checks import choice, number, numbers, shown, tensor, whole
from .vocabulary import EMPHASES, SPACINGS, SYNTAXES, modernised, own_keywords, read_sampler, read_schedule, unknown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from .draw import Picture
    from .guidance.guide import Guidance
    from .guidance.image_prompt import ImagePrompt
    from .guidance.layout import Boxes
    from .guidance.objectives import Objective
    from .guidance.regions import Region
    from .guidance.relations import Relation
    from .model import Model
    from .networks.attention import Edit, Inputs, Record
    from .recorded import Reduce
    from .sampling import Sampler

    Numbers: TypeAlias = "Sequence[float] | Tensor | NDArray[np.floating]"

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
Output = Literal["pil", "numpy", "tensor", "latents"]
FITS = ("resize", "crop", "pad")
OUTPUTS = ("pil", "numpy", "tensor", "latents")
REDUCTIONS = ("mean", "last", "per_step")
BUNDLED = "minidiff/shapes"
"""The name of the model that ships inside the package."""
MOST_IMAGES = 10_000  # per call: the latents alone take 650 MB at 512x512
_LAST_SEED = 2**64 - 1  # the largest that torch.Generator takes
_QUIET = (
    "syntax",
    "cache_interval",
    "base_weight",
    "images_per_prompt",
    "fit",
    "paste",
    "image_prompt_scale",
    "edits",
    "attention",
    "reduce",
    "output",
    "progress",
)  # omitted at their default


@own_keywords
@dataclass(frozen=True, eq=False)
class Request:
    """What to make. Only `prompt` (or `context`) is required; None leaves a field to the model.

    prompt: one text or a list; or None with `context`, encoded texts [P,L,D].
    model: a Model from `minidiff.load`, or a hub id, folder or .safetensors file, loaded for this call only. Default:
        the bundled model of coloured shapes, which needs no download.
    negative_prompt: one text for all prompts, or one per prompt; or `negative_context` [P,L,D].
    syntax: "plain" reads prompts as they are, up to the text encoder's length. "a1111" reads AUTOMATIC1111's marks, and
        texts of any length in chunks of that length: (word:1.3), (word), [word], BREAK, [from:to:when], [a|b] and AND
        (prompts/parse.py says what each means); escape brackets as \\( and \\).
        Phrases of boxes and of attention are found in the text without marks.
    emphasis: how weights act, with a syntax: "a1111" (default) multiplies encodings and restores their mean, "compel"
        moves them away from the empty prompt's, or towards those of the prompt without the words, "none" ignores them.
    width, height: in pixels, multiples of the autoencoder's factor (8 in SD 1.5); default: the UNet's training size.
    steps: sampling steps; or `timesteps` (descending, 0 to 999) or `sigmas` (descending to 0, one more than steps).
    guidance_scale: w in eps_uncond + w * (eps_cond - eps_uncond) (Ho and Salimans 2022, eq. 6), at least 1; 1 runs the
        conditional half only.
    guidance_rescale: in [0,1], how far to rescale the guided prediction to the standard deviation of the conditional
        one (Lin et al. 2023, eq. 15-16).
    guidance_interval: (low, high) in noise levels sigma: guidance_scale acts where low < sigma <= high, and elsewhere
        only the conditional half runs, in half the time (Kynkaanniemi et al. 2024). SD's sigmas go from 14.6 to 0; the
        paper takes 0.28 to 5.42 for SDXL. Default: everywhere.
    cache_interval: run the network's deep layers only in every n-th step and reuse their last result in between
        (DeepCache, Ma et al. 2023). 3 halves the time of a step; 1 (default) is exact. Steps that record deep layers
        run them; guidance towards boxes looks with all layers.
    clip_skip: skip the last n layers of the text encoder, counted as in diffusers (A1111's number minus one).
    sampler: its name, ours ("dpmpp_2m"), A1111's ("DPM++ 2M") or diffusers', or a sampler object. With a name,
        `schedule` is its noise levels ("uniform", "karras", "exponential", "beta", "sgm_uniform"), `spacing`
        ("leading", "linspace", "trailing") places the timesteps, and `eta` in [0,1] adds fresh noise in DDIM and TCD.
    seed: of the first image, counting up for the rest; or one per image. None draws one, which the result reports.
    vary: (seed, strength in [0,1]) moves the starting noise towards another seed's, which counts up while `seed` then
        stays: images much alike, as by A1111's variation seed. Or one such seed per image.
    images_per_prompt: images of the same prompt are adjacent. Image i of a batch equals, within 1/255 in float32, the
        image made alone from its seed.
    latents: initial latents instead of noise, [images,4,h,w] of unit variance.
    image: a picture to start from, one for all prompts or one per prompt: a PIL image, an array [H,W,3], a tensor
        [3,H,W] or a path; turned as its EXIF says, white where it is transparent. It sets the default size.
    strength: in (0,1], how much of it is made anew: the last steps * strength steps run, from the picture with noise.
        Default: 0.8, or 1 with a mask, which then starts from noise alone. A second pass at a larger size is
        result.again(scale=2, strength=0.5).
    mask: where to paint in `image` (white, 1), which stays elsewhere: an image, a path, numbers [H,W] in [0,1], or
        "alpha", which paints where the picture is transparent. Inpainting models (9 channels) need both.
    fit: how `image` and `mask` get to width and height: "resize" (stretched), "crop" (the middle), or "pad" (all of
        it; the mask paints around it).
    paste: with a mask, give finished images the picture's own pixels outside it.
    boxes: where to place things: {phrase of the prompt: (x0, y0, x1, y1)}, from the left and top in [0,1]; one mapping
        for all prompts, or a list with one (or None) per prompt. A phrase may have several boxes, a mask ([H,W] or an
        image), a Point, Stroke or Curve, or {"boxes": ..., "weight": 2.0}; [{"box": ...}, {"box": ...}] are two
        objects of that phrase. Token positions may replace the phrase.
    relations: how things relate, without boxes: [("cat", "left of", "ball"), "ball smaller than cat"], between
        phrases of the prompt; "left of", "right of", "above", "below", "smaller than" or "larger than". One list for
        all prompts, or one (or None) per prompt. With boxes, every phrase needs one.
    guidance: how to follow boxes: a Guidance, an objective, the name of a published one ("layout",
        "attend_and_excite", "boxdiff", "refocusing", "rnb", "tradiffusion"), or "none" (for edits that follow boxes
        themselves).
        Relations add the objective "relation".
    regions: parts of the image that read texts of their own: a list of Region(text, box, negative=..., weight=...) for
        all prompts, or one list (or None) per prompt. The prompt rules where no region is. Phrases of boxes and of
        attention are found in the regions' texts too.
    base_weight: how much the prompt counts inside regions, beside their weights. 0 leaves it out; a little (0.2)
        carries what the whole image shares, such as style and light, into every region.
    image_prompt: a picture that prompts beside the text, for a model with an IP-Adapter (with_image_prompt): a PIL
        image, an array, a path, or an ImagePrompt, which says where it counts and how strongly; or a list of them.
        Those of one adapter, without a box and with the same scale, are read together.
    image_prompt_scale: how strongly they count; one number, or one per adapter. 0 leaves them out.
    edits: one or several changes to the attention. inputs: tensors that your own edits and recorders read.
    attention: keep attention maps for the result's `attention["phrase"]`: True, or your own Record.
    reduce: how to combine maps over steps: "mean", "last", "per_step", or a function such as minidiff.MEAN.
    output: "pil" images, "numpy" [B,H,W,3] or "tensor" [B,3,H,W] in [0,1], or "latents" (not decoded).
    progress: show a progress bar on stderr.

    Noise is drawn on the CPU in float32, so a seed gives the same image on every device. Raises ValueError naming the
    field for an invalid value.
    """

    prompt: str | Sequence[str] | None = None
    _: KW_ONLY
    model: Model | str | Path = BUNDLED
    negative_prompt: str | Sequence[str] | None = None
    syntax: str = "plain"
    emphasis: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    timesteps: Numbers | None = None
    sigmas: Numbers | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: Sequence[float] | None = None
    cache_interval: int = 1
    clip_skip: int | None = None
    sampler: str | Sampler | None = None
    schedule: str | None = None
    spacing: str | None = None
    eta: float = 0.0
    seed: int | Sequence[int] | None = None
    vary: tuple[int | Sequence[int], float] | None = None
    images_per_prompt: int = 1
    latents: Tensor | None = None
    image: Picture | str | Path | Sequence[Picture | str | Path] | None = None
    strength: float | None = None
    mask: Picture | NDArray[np.generic] | str | Path | Sequence[object] | None = None
    fit: str = "resize"
    paste: bool = True
    context: Tensor | None = None
    negative_context: Tensor | None = None
    boxes: Boxes | Sequence[Boxes | None] | None = None
    relations: Sequence[Sequence[str] | str | Sequence[Sequence[str] | str] | None] | None = None
    guidance: Guidance | Objective | str | Mapping[str, object] | None = None
    regions: Sequence[Region | Mapping[str, object] | Sequence[Region | Mapping[str, object]] | None] | None = None
    base_weight: float = 0.0
    image_prompt: ImagePrompt | Picture | str | Path | Sequence[object] | Mapping[str, object] | None = None
    image_prompt_scale: float | Sequence[float] = 1.0
    edits: Edit | Sequence[Edit] = ()
    inputs: Inputs | None = None
    attention: bool | Record = False
    reduce: Reduce | str = "mean"
    output: Output = "pil"
    progress: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Mapping) and value.keys() & {"tensor", "object"} and field.name != "inputs":
                raise ValueError(
                    f"{field.name} is {shown(value)}, a placeholder for what a file could not hold; pass your own"
                )
        self._check_texts()
        self._check_numbers()
        self._check_sampler()
        self._check_values()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # only on construction, to normalise fields of a frozen value

    # ---- checks, in the order of the fields

    def _check_texts(self) -> None:
        if (self.prompt is None) == (self.context is None):
            raise ValueError(
                f"got {'neither prompt nor' if self.prompt is None else 'both prompt and'} context; expected one of "
                'them, e.g. prompt="a red circle"'
            )
        if self.negative_prompt is not None and self.negative_context is not None:
            raise ValueError("got both negative_prompt and negative_context; expected one of them")
        for name in ("prompt", "negative_prompt"):
            self._set(name, _texts(name, getattr(self, name)))
        if self.context is not None:
            tensor("context", self.context, 3, "[P,L,D], such as model.text.encode gives")
        if self.negative_context is not None:
            tensor("negative_context", self.negative_context, 3, "[P,L,D], such as model.text.encode gives")
        negatives = 1 if self.negative_prompt is None else len(listed(self.negative_prompt))
        if negatives not in (1, self.prompts):
            raise ValueError(
                f"negative_prompt holds {negatives} texts for {self.prompts} prompts; expected one for all, or one "
                "per prompt"
            )
        self._check_regions()
        self._check_syntax()
        self._set("images_per_prompt", whole("images_per_prompt", self.images_per_prompt, 1))
        if self.images > MOST_IMAGES:
            raise ValueError(
                f"images_per_prompt is {self.images_per_prompt} for {self.prompts} prompts; expected at most "
                f"{MOST_IMAGES} images in one call"
            )

    def _check_regions(self) -> None:
        self._set("base_weight", number("base_weight", self.base_weight, 0, 1e3))
        if self.regions is not None:
            from .guidance.regions import read_regions

            self._set("regions", read_regions(self.regions) or None)
        areas = self.areas
        if self.base_weight != 0 and not any(areas):
            raise ValueError(f"base_weight is {self.base_weight:g} but there are no regions; expected both")

    def _check_syntax(self) -> None:
        choice("syntax", self.syntax, SYNTAXES)
        if self.emphasis is not None:
            choice("emphasis", self.emphasis, EMPHASES)
        if self.syntax == "plain":
            if self.emphasis is not None:
                raise ValueError(f'emphasis is {self.emphasis!r} but the syntax is plain; expected syntax="a1111" too')
            return
        from .prompts.parse import check

        own = [text or "" for some in self.areas for region in some for text in (region.prompt, region.negative)]
        for texts in (self.prompt, self.negative_prompt, own):
            for text in listed(texts or ""):
                check(text)

    def _check_numbers(self) -> None:
        for name in ("width", "height", "steps"):
            if getattr(self, name) is not None:
                self._set(name, whole(name, getattr(self, name), 1))
        for name in ("timesteps", "sigmas"):
            if getattr(self, name) is not None:
                self._set(name, numbers(name, getattr(self, name)))
        if self.timesteps is not None and self.sigmas is not None:
            raise ValueError("got both timesteps and sigmas; expected one of them")
        for name, values, more in (("timesteps", self.timesteps, 0), ("sigmas", self.sigmas, 1)):
            if values is not None and self.steps not in (None, len(values) - more):
                raise ValueError(
                    f"steps is {self.steps} but {name} make {len(values) - more} steps; omit steps, or make them agree"
                )
        if self.guidance_scale is not None:
            # diffusers treats less as 1; by the formula, less would push the image away from the prompt
            expected = "a number of at least 1 (1 turns guidance off, 7.5 is usual)"
            self._set("guidance_scale", number("guidance_scale", self.guidance_scale, 1, expected=expected))
        for name in ("guidance_rescale", "eta"):
            self._set(name, number(name, getattr(self, name), 0, 1))
        self._check_shortcuts()
        if self.clip_skip is not None:
            self._set("clip_skip", whole("clip_skip", self.clip_skip, 0))
        if self.seed is not None:
            self._set("seed", _seeds("seed", self.seed, self.images))
        if self.vary is not None:
            self._check_vary()

    def _check_vary(self) -> None:
        given: Any = self.vary
        if not isinstance(given, list | tuple) or len(given) != 2:
            raise ValueError(f"vary is {shown(given)}; expected (seed, strength), such as (7, 0.2)")
        if self.latents is not None:
            raise ValueError("got both vary and latents; expected one of them, since vary is about the noise of a seed")
        seeds = _seeds("vary's seed", given[0], self.images)
        self._set("vary", (seeds, number("vary's strength", given[1], 0, 1)))

    def _check_shortcuts(self) -> None:
        self._set("cache_interval", whole("cache_interval", self.cache_interval, 1, 1000))
        if self.guidance_interval is not None:
            levels = numbers("guidance_interval", self.guidance_interval)
            if len(levels) != 2 or not 0 <= levels[0] < levels[1]:
                raise ValueError(
                    f"guidance_interval is {shown(self.guidance_interval)}; expected the lowest and the highest noise "
                    "level (sigma) to guide at, such as (0.28, 5.42)"
                )
            self._set("guidance_interval", levels)

    def _check_sampler(self) -> None:
        if self.schedule is not None:
            self._set("schedule", read_schedule(self.schedule))
        if self.spacing is not None:
            choice("spacing", self.spacing, SPACINGS)
        if isinstance(self.sampler, str):
            read_sampler(self.sampler, self.schedule)
        elif self.sampler is not None and (isinstance(self.sampler, type) or not hasattr(self.sampler, "schedule")):
            raise ValueError(
                f'sampler is {shown(self.sampler)}; expected a name such as "ddim", or an object such as '
                "minidiff.DDIM()"
            )

    def _check_values(self) -> None:
        """Fields that hold types of other modules, each imported only when its field is used."""
        if self.latents is not None:
            tensor("latents", self.latents, 4, "[images,4,h,w] of unit variance")
            if len(self.latents) != self.images:
                raise ValueError(f"latents hold {len(self.latents)} for {self.images} images; expected one per image")
        if self.boxes is not None:
            from .guidance.layout import read_objects

            for one in self.layouts:
                if one is not None:
                    read_objects(one)
        if self.relations is not None:
            from .guidance.relations import read_relations

            self._set("relations", read_relations(self.relations))
            self._set("relations", self.relations if any(self.related) else None)
        self._check_guidance()
        self._check_image()
        self._check_image_prompt()
        if not isinstance(self.edits, tuple) or self.edits or self.attention is not False or self.inputs is not None:
            self._check_attention()
        if not callable(self.reduce):
            choice("reduce", self.reduce, REDUCTIONS)
        choice("output", self.output, OUTPUTS)
        if not isinstance(self.progress, bool):
            raise ValueError(f"progress is {shown(self.progress)}; expected True or False")
        if not isinstance(self.model, str | Path) and not hasattr(self.model, "unet"):
            raise ValueError(
                f"model is {shown(self.model)}; expected a Model from minidiff.load, a hub id, a folder or a "
                ".safetensors file"
            )

    def _check_guidance(self) -> None:
        if isinstance(self.guidance, bool) and not self.guidance:
            self._set("guidance", "none")
        if self.guidance is None or self.guidance == "none":
            return
        from .guidance.guide import Guidance

        Guidance.read(self.guidance)
        if not any(self.layouts) and not any(self.related):
            raise ValueError(
                f"guidance is {shown(self.guidance)} but there are no boxes to follow; expected "
                'boxes={"phrase": (x0, y0, x1, y1)} too; None (null) for a box, if the objective needs no position'
            )

    def _check_image(self) -> None:
        choice("fit", self.fit, FITS)
        if not isinstance(self.paste, bool):
            raise ValueError(f"paste is {shown(self.paste)}; expected True or False")
        if self.image is None:
            for name in ("mask", "strength"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is given without image; expected the picture that it is about, too")
            return
        from .pictures import read_each, read_mask, read_picture

        if self.latents is not None:
            raise ValueError("got both image and latents; expected one of them to start from")
        self._set("image", read_each("image", self.image, self.prompts, read_picture))
        if self.mask is not None:
            self._set("mask", read_each("mask", self.mask, self.prompts, read_mask))
        if self.strength is not None:
            self._set("strength", number("strength", self.strength, 1e-6, 1, "a number above 0, at most 1"))

    def _check_image_prompt(self) -> None:
        scale = self.image_prompt_scale
        several = hasattr(scale, "__len__") and not isinstance(scale, str | bytes) and getattr(scale, "ndim", 1) > 0
        self._set("image_prompt_scale", (numbers if several else number)("image_prompt_scale", scale))
        if self.image_prompt is not None:
            from .guidance.image_prompt import read_image_prompts

            self._set("image_prompt", read_image_prompts(self.image_prompt))
        elif self.image_prompt_scale != 1:
            raise ValueError(f"image_prompt_scale is {shown(scale)} but there is no image_prompt; expected both")

    def _check_attention(self) -> None:
        from torch import Tensor

        from .networks.attention import Edit, Record

        edits = (self.edits,) if isinstance(self.edits, Edit) else self.edits
        if not isinstance(edits, list | tuple) or not all(isinstance(one, Edit) for one in edits):
            raise ValueError(f"edits is {shown(self.edits)}; expected a minidiff.Edit, or a list of them")
        self._set("edits", tuple(edits))
        if not isinstance(self.attention, bool | Record):
            raise ValueError(f"attention is {shown(self.attention)}; expected True, False or a minidiff.Record")
        if isinstance(self.attention, Record) and self.attention.stop:
            raise ValueError("attention has stop=True, which ends the forward pass before it makes a prediction")
        if self.inputs is not None and (
            not isinstance(self.inputs, Mapping)
            or not all(isinstance(name, str) and isinstance(one, Tensor) for name, one in self.inputs.items())
        ):
            raise ValueError(f"inputs is {shown(self.inputs)}; expected a mapping of names to tensors")

    # ---- derived values

    @property
    def prompts(self) -> int:
        """P, the number of prompts or contexts."""
        if self.prompt is None:
            assert self.context is not None
            return len(self.context)
        return len(listed(self.prompt))

    @property
    def images(self) -> int:
        """B, the number of images: prompts times images_per_prompt."""
        return self.prompts * self.images_per_prompt

    @property
    def layouts(self) -> Sequence[Boxes | None]:
        """The boxes of each prompt."""
        found: Any = self.boxes if isinstance(self.boxes, list | tuple) else [self.boxes] * self.prompts
        if len(found) != self.prompts:
            raise ValueError(
                f"boxes holds {len(found)} layouts for {self.prompts} prompts; expected one for all, or one per prompt"
            )
        layouts: Sequence[Boxes | None] = found
        return layouts

    @property
    def related(self) -> tuple[tuple[Relation, ...], ...]:
        """The relations of each prompt."""
        found: Any = self.relations or ()
        lists = found if found and not (found[0] and isinstance(found[0][0], str)) else (found,) * self.prompts
        if len(lists) != self.prompts:
            raise ValueError(
                f"relations holds {len(lists)} lists for {self.prompts} prompts; expected one list for all prompts, "
                "or one for each"
            )
        return tuple(lists)

    @property
    def areas(self) -> tuple[tuple[Region, ...], ...]:
        """The regions of each prompt."""
        found: Any = self.regions or ()
        lists = found if found and isinstance(found[0], tuple) else (found,) * self.prompts
        if len(lists) != self.prompts:
            raise ValueError(
                f"regions holds {len(lists)} lists for {self.prompts} prompts; expected one for all, or one per prompt"
            )
        return tuple(lists)

    def filled(self, values: Mapping[str, object]) -> Request:
        """A copy with some fields replaced by known-valid values, which are not checked again."""
        found = copy.copy(self)
        for name, value in values.items():
            found._set(name, value)
        return found

    def each(self) -> Request:
        """The request that makes the same images from one prompt for each."""
        n = self.images_per_prompt

        def spread(values: Any, found: Any) -> Any:
            return values if values is None or len(found) < self.prompts else tuple(v for v in found for _ in range(n))

        def rows(values: Tensor | None) -> Tensor | None:
            return values if values is None or len(values) < self.prompts else values.repeat_interleave(n, dim=0)

        values: dict[str, Any] = {
            "prompt": spread(self.prompt, listed(self.prompt or "")),
            "negative_prompt": spread(self.negative_prompt, listed(self.negative_prompt or "")),
            "context": rows(self.context),
            "negative_context": rows(self.negative_context),
            "image": spread(self.image, self.image),
            "mask": spread(self.mask, self.mask),
            "boxes": spread(self.boxes, self.layouts),
            "regions": spread(self.regions, self.areas),
        }
        return self if n == 1 else self.filled({**values, "images_per_prompt": 1})

    def alone(self, i: int) -> Request:
        """The request that makes image i alone."""
        p = i // self.images_per_prompt

        def of(values: Any) -> Any:
            return values[p if len(values) > 1 else 0] if isinstance(values, list | tuple) else values

        def own(values: Any) -> Any:
            return values[i] if isinstance(values, list | tuple) else values

        def row(values: Tensor | None, at: int) -> Tensor | None:
            return None if values is None else values[at : at + 1]

        return self.filled(
            {
                "prompt": of(self.prompt),
                "negative_prompt": of(self.negative_prompt),
                "context": row(self.context, p),
                "negative_context": row(self.negative_context, p),
                "seed": own(self.seed),
                "vary": None if self.vary is None else (own(self.vary[0]), self.vary[1]),
                "images_per_prompt": 1,
                "latents": row(self.latents, i),
                "image": of(self.image),
                "mask": of(self.mask),
                "boxes": self.layouts[p],
                "regions": self.areas[p] or None,
                "relations": self.related[p] or None,
                "guidance": self.guidance if self.layouts[p] or self.related[p] or self.guidance == "none" else None,
            }
        )

    # ---- as JSON

    def plain(self) -> dict[str, Plain]:
        """The fields as JSON values, without those at None.

        What JSON cannot hold (a tensor, a function) becomes a description, which `from_plain` rejects by name.
        """
        from .png.chunk import plain

        found: dict[str, object] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or (field.name in _QUIET and (value is field.default or value == ())):
                continue
            if field.name == "model":
                value = value if isinstance(value, str) else str(value) if isinstance(value, Path) else value.name
            elif field.name == "guidance" and hasattr(value, "plain"):
                value = value.plain()
            elif field.name == "image_prompt":
                value = [one.plain() for one in value]
            elif field.name == "regions":
                value = [[one.plain() for one in own] if isinstance(own, tuple) else own.plain() for own in value]
            elif field.name == "boxes":
                value = [_plain_boxes(one) for one in value] if isinstance(value, list | tuple) else _plain_boxes(value)
            found[field.name] = value
        if self.sampler is not None and not isinstance(self.sampler, str):
            from .sampling import sampler_fields

            named = sampler_fields(self.sampler)  # by name where possible
            found |= {name: value for name, value in named.items() if value is not None}
        model = found.pop("model")
        written = plain(found)
        assert isinstance(written, dict)
        return {**written, "model": str(model)}  # unchanged: plain() strips folders from a path

    @classmethod
    def from_plain(cls, values: Mapping[str, object], origin: str = "") -> Request:
        """The request that `plain` wrote. ValueError, prefixed with `origin`, for unknown or invalid fields."""
        where = f"{origin}: " if origin else ""
        if not isinstance(values, Mapping):
            raise ValueError(f"{where}got {shown(values)}; expected an object with the fields of a request")
        values = modernised(values)
        for name in values:
            if name not in FIELDS:
                raise ValueError(f"{where}{unknown(str(name), FIELDS)}")
        try:
            return cls(**values)  # type: ignore[arg-type]  # each is checked in there
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error


FIELDS = tuple(field.name for field in fields(Request))


def listed(texts: str | Sequence[str]) -> Sequence[str]:
    """One text as a list of one."""
    return (texts,) if isinstance(texts, str) else texts


def _plain_boxes(boxes: Any) -> dict[str, object] | None:
    from .guidance.layout import plain_boxes, read_objects

    return None if boxes is None else plain_boxes(read_objects(boxes))


def _texts(name: str, value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{name} is {shown(value)} ({type(value).__name__}); expected a text or a list of texts")
    if not value:
        raise ValueError(f"{name} is an empty list; expected at least one text")
    return tuple(value)


def _seeds(name: str, seed: Any, count: int) -> int | tuple[int, ...]:
    """One seed, or one per image, each as torch.Generator takes them."""
    several = hasattr(seed, "__len__") and not isinstance(seed, str | bytes | Mapping) and getattr(seed, "ndim", 1) == 1
    if several and len(seed) != count:
        raise ValueError(
            f"{name} holds {len(seed)} numbers for {count} images; expected one per image, or one to count up from"
        )
    seeds = tuple(seed) if several else (seed,)
    found = tuple(whole(name, one, expected="a whole number, a list of them, or None to draw one") for one in seeds)
    last = _LAST_SEED if several else _LAST_SEED - count + 1
    for one in found:
        if not 0 <= one <= last:
            hint = "; omit seed (None) to draw one" if one == -1 else ""
            raise ValueError(f"{name} is {shown(one)}; expected 0 to {last}{hint}")
    return found if several else found[0]
