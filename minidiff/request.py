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

from .checks import listed, shown
from .request_checks import check
from .vocabulary import BUNDLED, modernised, own_keywords, unknown

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
_QUIET = (
    "syntax",
    "cache_interval",
    "tries",
    "base_weight",
    "images_per_prompt",
    "fit",
    "paste",
    "image_prompt_scale",
    "edits",
    "attention",
    "reduce",
    "output",
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
        conditional half only. In [0,1] with the samplers of CFG++ (Chung et al. 2024), "ddim_cfg_pp", "euler_cfg_pp",
        "euler_ancestral_cfg_pp", "dpmpp_2m_cfg_pp" and "dpmpp_2s_ancestral_cfg_pp": default 0.6, about a plain 7.5.
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
    tries: of so many start noises, each image takes the one in which guidance's first look finds the least loss; 1
        (default) takes that of its seed. The others are those of its seed + 10,000, + 20,000, ...; the result has the
        seed that was taken, which makes the image again without a search, and its info the number of tries. Each costs
        a third of a step, and with `image` the time to encode it.
    images_per_prompt: images of the same prompt are adjacent. Image i of a batch equals, within 1/255 in float32, the
        image made alone from its seed; a guided one may not, where guidance magnifies how a batch rounds (cli.batch).
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
        image), a Point, Stroke or Curve, or {"boxes": ..., "weight": 2.0, "order": 1}, in front of lower orders;
        [{"box": ...}, {"box": ...}] are two objects of that phrase. Token positions may replace the phrase.
    relations: how things relate, without boxes: [("cat", "left of", "ball"), "ball smaller than cat"], between
        phrases of the prompt; "left of", "right of", "above", "below", "smaller than" or "larger than". One list for
        all prompts, or one (or None) per prompt. With boxes, every phrase needs one; without any, each gets one where
        the relations hold, unless guidance and edits read none (guidance="relation" moves things by relations alone).
    guidance: how to follow boxes: a Guidance, an objective, the name of a published one ("layout",
        "attend_and_excite", "boxdiff", "bounded_attention", "conform", "ilgd", "initno", "refocusing", "rnb",
        "self_cross", "self_refocusing", "tradiffusion", "winwinlay"), or "none" (for edits that follow boxes
        themselves); or "fast", "balanced" or "best": as guidance.presets says for the model. Relations add the
        objective "relation".
    regions: parts of the image that read texts of their own: a list of Region(text, box, negative=..., weight=...) for
        all prompts, or one list (or None) per prompt. The prompt rules where no region is. Phrases of boxes and of
        attention are found in the regions' texts too: a box says where a region's object is, the region what is read.
    base_weight: how much the prompt counts inside regions, beside their weights. 0 leaves it out; a little (0.2)
        carries what the whole image shares, such as style and light, into every region.
    regions_apart: in [0,1], the share of the steps, from the first, in which each region's box is denoised as a picture
        of its own, so that what its text asks for lies inside it; 0 keeps the picture in one piece. Default: the
        model's, 0.4 for the bundled one and 0 for others. Edits and image prompts act after it. Such a step has a pass
        of the boxes' sizes, and a whole one if the prompt counts anywhere.
    image_prompt: a picture that prompts beside the text, for a model with an IP-Adapter (with_image_prompt): a PIL
        image, an array, a path, or an ImagePrompt, which says where it counts and how strongly; or a list of them.
        Those of one adapter, without a box and with the same scale, are read together.
    image_prompt_scale: how strongly they count; one number, or one per adapter. 0 leaves them out.
    edits: one or several changes to the attention. inputs: tensors that your own edits and recorders read.
    attention: keep attention maps for the result's `attention["phrase"]`: True, or your own Record.
    reduce: how to combine maps over steps: "mean", "last", "per_step", or a function such as minidiff.MEAN.
    output: "pil" images, "numpy" [B,H,W,3] or "tensor" [B,3,H,W] in [0,1], or "latents" (not decoded).
    progress: show a progress bar, on stderr or in a notebook's cell; default: in a terminal and in a notebook.

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
    tries: int = 1
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
    regions_apart: float | None = None
    image_prompt: ImagePrompt | Picture | str | Path | Sequence[object] | Mapping[str, object] | None = None
    image_prompt_scale: float | Sequence[float] = 1.0
    edits: Edit | Sequence[Edit] = ()
    inputs: Inputs | None = None
    attention: bool | Record = False
    reduce: Reduce | str = "mean"
    output: Output = "pil"
    progress: bool | None = None

    def __post_init__(self) -> None:
        check(self)

    # ---- derived values

    @property
    def prompts(self) -> int:
        """P, the number of prompts or contexts."""
        if self.prompt is None:
            assert self.context is not None
            return len(self.context)
        return 1 if isinstance(self.prompt, str) else len(self.prompt)

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

    @property
    def guided(self) -> bool:
        """False where nothing is asked for that guidance by an objective could follow, or no such guidance."""
        related = any(self.related)
        unguided = self.guidance in ("none", False) or (self.guidance == "fast" and not related)
        return (any(self.layouts) or related) and not unguided

    def filled(self, values: Mapping[str, object]) -> Request:
        """A copy with some fields replaced by known-valid values, which are not checked again."""
        found = copy.copy(self)
        for name, value in values.items():
            object.__setattr__(found, name, value)
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
            "relations": spread(self.relations, self.related),
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
                "boxes": self.layouts[p] or None,
                "regions": self.areas[p] or None,
                "base_weight": self.base_weight if self.areas[p] else 0.0,
                "regions_apart": self.regions_apart if self.areas[p] else None,
                "relations": self.related[p] or None,
                "tries": self.tries if self.layouts[p] or self.related[p] else 1,
                "guidance": self._guidance(p),
            }
        )

    def _guidance(self, p: int) -> object:
        """That of a prompt: where it has no relations, without the objective that those of others added."""
        if not (self.layouts[p] or self.related[p] or self.guidance == "none"):
            return None
        without = None if self.related[p] else getattr(self.guidance, "without", None)
        return self.guidance if without is None else without("relation_loss")

    # ---- as JSON

    def plain(self) -> dict[str, Plain]:
        """The fields as JSON values, without those at None and `progress`.

        What JSON cannot hold (a tensor, a function) becomes a description, which `from_plain` rejects by name.
        """
        from .png.chunk import plain

        found: dict[str, object] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if (
                value is None
                or field.name == "progress"
                or (field.name in _QUIET and (value is field.default or value == ()))
            ):
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


def _plain_boxes(boxes: Any) -> dict[str, object] | None:
    from .guidance.layout import plain_boxes, read_objects

    return None if boxes is None else plain_boxes(read_objects(boxes))
