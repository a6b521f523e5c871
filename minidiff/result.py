"""What generate() returns: images, seeds, attention maps and reports, and how to save them.

A saved PNG has two text chunks: `parameters`, in A1111's format, which most programs read (png/infotext.py), and
`minidiff`, with the exact arguments of generate() (png/chunk.py).
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .checks import number, shown, whole
from .draw import boxes, sheet, to_image
from .png.chunk import Plain, plain
from .png.write import check_output_path, png_bytes, wanted_path, write_png

if TYPE_CHECKING:
    from .guidance.report import Report
    from .recorded import Attention
    from .request import Request

Images: TypeAlias = "list[Image.Image] | NDArray[np.float32] | Tensor"


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """The images of one generate() call and what is needed to reproduce each. Notebooks display them.

    `images` follows generate's `output`: "pil" a list, "numpy" [B,H,W,3] float32 in [0,1], "tensor" [B,3,H,W] in [0,1],
    "latents" [B,4,h,w]. `latents` [B,4,h,w] float32 on the CPU are the last step's, for any output.
    `parameters[i]` are the arguments of generate() that make image i alone, as plain() writes them; `info` holds facts
    that are not arguments: {"versions": {"minidiff": "0.1.0", ...}, "model": {"kind", "name", "sha256"}, ...}.
    `timings` are seconds per phase. `attention` holds the requested maps, `reports` what guidance did to each image
    with boxes. `flagged[i]`: the safety checker flagged image i, which stays as it is here and is marked in its PNG;
    None where no checker looked (see `load(safety=)`; it does not look at latents). ValueError if the counts differ.
    `request` asks for the same images, with one prompt for each, and `generate` is the function that it is for; None
    where something else made the Result. `request` keeps a loaded Model that it was made with in memory, for again();
    dataclasses.replace(result, request=None) lets go of it.

    len(result) is the number of images; result[i], and each item of a loop, is the Result of image i alone.
    """

    images: Images
    latents: Tensor
    seeds: tuple[int | None, ...]
    parameters: tuple[dict[str, Plain], ...]
    timings: dict[str, float]
    info: dict[str, Plain] = field(default_factory=dict)
    attention: Attention | None = None
    reports: tuple[Report, ...] | None = None
    flagged: tuple[bool, ...] | None = None
    request: Request | None = None
    generate: Callable[[Request], Result] | None = None

    def __post_init__(self) -> None:
        counts = (len(self.images), len(self.latents), len(self.seeds), len(self.parameters))
        if len(set(counts)) != 1:
            raise ValueError(
                f"a Result needs one of each per image; got {counts[0]} images, {counts[1]} latents, "
                f"{counts[2]} seeds and {counts[3]} parameters"
            )

    def __getstate__(self) -> dict[str, object]:
        """For pickle: without a loaded model, so that what comes out cannot be made again()."""
        loaded = self.request is not None and not isinstance(self.request.model, str | Path)
        return vars(self) | ({"request": None} if loaded else {})

    def __repr__(self) -> str:
        kind, several = "latent" if self._holds_latents() else "image", "" if len(self) == 1 else "s"
        images = self.images
        height, width = images.shape[-2:] if isinstance(images, Tensor) else np.asarray(images[0]).shape[:2]
        found = [f"{len(self)} {kind}{several} of {width}x{height}", f"seeds {shown(self.seeds)}"]
        found += [f"{sum(self.timings.values()):.1f} s"] if self.timings else []
        found += [name for name in ("attention", "reports") if getattr(self, name) is not None]
        found += [f"{sum(self.flagged)} flagged"] if self.flagged is not None else []
        return f"<Result: {', '.join(found)}>"

    def __len__(self) -> int:
        """B, the number of images."""
        return len(self.seeds)

    def __getitem__(self, i: int) -> Result:
        """The Result of image i alone."""
        i = whole("index", i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"index {i} of a Result of {len(self)} images")
        i %= len(self)
        one = slice(i, i + 1)
        return replace(
            self,
            images=self.images[one],
            latents=self.latents[one],
            seeds=self.seeds[one],
            parameters=self.parameters[one],
            attention=None if self.attention is None else self.attention.alone(i),
            reports=None if self.reports is None else self.reports[one],
            flagged=None if self.flagged is None else self.flagged[one],
            request=None if self.request is None else self.request.alone(i),
        )

    def __iter__(self) -> Iterator[Result]:
        return (self[i] for i in range(len(self)))

    @property
    def image(self) -> Image.Image:
        """The single image, for any output but latents. ValueError for latents or several images."""
        if len(self) != 1:
            raise ValueError(f"this Result holds {len(self)} images; expected one: use result[i].image")
        return self._pil()[0]

    def again(self, scale: float = 2.0, strength: float = 0.5) -> Result:
        """A second pass at a larger size ("hires fix"): from these images, enlarged, with all else as asked for first.

        scale: of width and height, 1 to 16. strength: in (0,1], how much is made anew, as for generate(image=...). The
        PNGs name no file to start from: `--from` needs --image with the first picture. ValueError as for larger().
        """
        larger = self.larger(scale, strength)
        assert self.generate is not None  # larger() has asked
        return self.generate(larger)

    def larger(self, scale: float = 2.0, strength: float = 0.5) -> Request:
        """The request of again(), to change more of it: generate(result.larger(2), steps=40).

        ValueError for latents, for a Result that generate() did not make, and for numbers out of their range.
        """
        request = self.request
        if request is None or self.generate is None or request.width is None or request.height is None:
            raise ValueError(
                "this Result was not made by generate(), so it cannot be made again; expected one that was"
            )
        scale, factor = number("scale", scale, 1, 16), request.width // self.latents.shape[3]
        width, height = (round(edge * scale / factor) * factor for edge in (request.width, request.height))
        values = {"width": width, "height": height, "strength": strength, "image": self._pil(), "latents": None}
        return replace(request, **values)  # type: ignore[arg-type]  # which checks them

    def png_bytes(self, i: int = 0, *, metadata: bool = True) -> bytes:
        """The PNG file of image i, as save() writes it."""
        one = self[i]
        return png_bytes(one.image, one.parameters[0] if metadata else None, one._facts(0))

    def save(self, path: str | Path | BinaryIO, *, metadata: bool = True) -> list[Path]:
        """Write every image as PNG and return the paths, in order. Never overwrites.

        A path ending in .png names the file; anything else, and any existing folder, is a folder, with file names from
        prompt and seed (a-red-circle-seed-42.png). Either may have {index} (from 0), {seed} and {prompt} (made safe and
        cut), as in "{seed}/{index}-{prompt}.png"; {{ is a brace. Missing folders are created. A taken name gets the
        next free number, so three images saved as cat.png are cat.png, cat-1.png, cat-2.png, also across processes. A
        file that cannot be written goes to the current, home or temporary folder, with a warning. An open binary file
        or a BytesIO takes one image. metadata=False writes no text chunks.
        ValueError: a format other than PNG, latents, or several images for an open file. OSError: no folder is
        writable; the images are still in the Result.
        """
        if hasattr(path, "write"):
            image = self.image
            path.write(png_bytes(image, self.parameters[0] if metadata else None, self._facts(0)))
            return []
        check_output_path(path)
        images = self._pil()
        written: list[Path] = []
        for i, (image, seed, arguments) in enumerate(zip(images, self.seeds, self.parameters, strict=True)):
            wanted = wanted_path(path, i, len(self), seed, arguments)
            try:
                written.append(write_png(png_bytes(image, arguments if metadata else None, self._facts(i)), wanted))
            except OSError as error:
                raise OSError(f"{error}. Written before: {', '.join(map(str, written)) or 'none'}") from error
        return written

    def plain(self) -> dict[str, Plain]:
        """Everything but pixels and maps, as JSON values: {"images": [{"seed", "parameters", "report"}, ...],
        "timings", "info"}.
        """
        reports = self.reports or (None,) * len(self)
        images: list[Plain] = [
            {"seed": seed, "parameters": arguments, "report": None if report is None else plain(report.plain())}
            | ({} if self.flagged is None else {"flagged": self.flagged[i]})
            for i, (seed, arguments, report) in enumerate(zip(self.seeds, self.parameters, reports, strict=True))
        ]
        return {"images": images, "timings": plain(self.timings), "info": self.info}

    def _facts(self, i: int) -> dict[str, Plain]:
        """What the PNG of image i says beside its arguments."""
        return self.info | ({"flagged": True} if self.flagged is not None and self.flagged[i] else {})

    def _repr_png_(self) -> bytes | None:
        """For a notebook: the image, or a sheet of several."""
        if not len(self) or self._holds_latents():
            return None
        images = self._pil()
        return png_bytes(images[0] if len(images) == 1 else sheet(images))

    def _repr_html_(self) -> str | None:
        """For a notebook, with reports: each image with its boxes, and what guidance did to it. Else the PNG shows."""
        if self.reports is None or self._holds_latents():
            return None
        parts = []
        for image, arguments, report in zip(self._pil(), self.parameters, self.reports, strict=True):
            layout, drawn = arguments.get("boxes"), image
            if isinstance(layout, dict) and layout:
                with suppress(ValueError):  # a mask, of which the parameters hold a fingerprint only
                    drawn = boxes(image, layout)
            data = base64.b64encode(png_bytes(drawn)).decode()
            style = 'style="display: inline-block; vertical-align: top; margin: 4px; max-width: 400px"'
            parts.append(f'<div {style}><img src="data:image/png;base64,{data}"><br>{report._repr_html_()}</div>')
        return "".join(parts)

    def _pil(self) -> list[Image.Image]:
        if self._holds_latents():
            raise ValueError(
                f"this Result holds latents {list(self.latents.shape)}, not images; generate with "
                "output='pil', 'numpy' or 'tensor' to save PNGs, or torch.save(result.latents, ...)"
            )
        if isinstance(self.images, Tensor):
            return to_pil(self.images)
        return _array_to_pil(self.images) if isinstance(self.images, np.ndarray) else self.images

    def _holds_latents(self) -> bool:
        return isinstance(self.images, Tensor) and (
            self.images.shape[1] != 3 or self.images.shape == self.latents.shape
        )


# ---- pixels


def to_numpy(images: Tensor) -> NDArray[np.float32]:
    """[B,3,H,W] in [0,1], any float dtype and device -> [B,H,W,3] float32. ValueError for other shapes."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images [B,3,H,W], got a tensor of shape {list(images.shape)}")
    array: NDArray[np.float32] = images.detach().cpu().permute(0, 2, 3, 1).float().numpy()
    return array


def to_pil(images: Tensor) -> list[Image.Image]:
    """[B,3,H,W] in [0,1] -> RGB images, rounded half to even as diffusers does; values outside [0,1] are clipped."""
    return _array_to_pil(to_numpy(images))


def _array_to_pil(array: NDArray[np.float32]) -> list[Image.Image]:
    if array.ndim != 4 or array.shape[3] != 3:
        raise ValueError(f"expected images [B,H,W,3], got an array of shape {list(array.shape)}")
    return [to_image(pixels) for pixels in array]
