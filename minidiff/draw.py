"""Pictures about pictures (Pillow only)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

_MARGIN, _LINE = 6, 14  # pixels
_SMALLEST = 384  # the shorter edge that a picture is brought to before anything is written on it
_COLOURS = ("#e6194b", "#2a6ff0", "#1e9e45", "#f58231", "#911eb4", "#008b9b", "#c2185b", "#7a5c00")
# Dark to bright in even steps of lightness, as matplotlib's inferno: control colours, from 0 to 1.
_HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))


def boxes(image: Image.Image, layout: Mapping[Any, object], labels: bool = True) -> Image.Image:
    """A copy of an image with the boxes of a layout, as generate() takes it, each object in a colour of its own.

    A phrase's mask is drawn by its outline. Small images are enlarged, so that the labels can be read.
    ValueError for what is neither box nor mask.
    """
    whole = _enlarged(image) if labels else image.convert("RGB")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(size=max(12, min(whole.size) // 28))
    width = max(1, min(whole.size) // 128)
    for i, (name, value) in enumerate(layout.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        value = value.get("boxes", value.get("mask")) if isinstance(value, Mapping) else value
        for x0, y0, x1, y1 in _boxes(name, value, whole, colour):
            corners = (x0 * whole.width, y0 * whole.height, x1 * whole.width - 1, y1 * whole.height - 1)
            pen.rectangle(corners, outline=colour, width=width)
            if labels:
                _label(pen, whole.size, corners, str(name), colour, font)
    return whole


def _boxes(name: object, value: object, whole: Image.Image, colour: str) -> list[tuple[float, float, float, float]]:
    """The boxes of one object; of a mask, which is drawn, the box around it."""
    if isinstance(value, list | tuple) and value:
        several = value if isinstance(value[0], list | tuple) else [value]
        if all(len(box) == 4 for box in several):
            return [(float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in several]
    array = np.asarray(value.convert("L") if isinstance(value, Image.Image) else value)
    if array.ndim != 2 or array.dtype == object or not array.any():
        raise ValueError(f"the layout has {value!r} for {name!r}; expected (x0, y0, x1, y1), a list of them or a mask")
    inside = Image.fromarray((array > array.max() / 2).astype(np.uint8) * 255)
    filled = np.asarray(inside.resize(whole.size, Image.Resampling.NEAREST)) > 0
    padded = np.pad(filled, 2)
    middle = padded[4:, 2:-2] & padded[:-4, 2:-2] & padded[2:-2, 4:] & padded[2:-2, :-4]
    whole.paste(colour, mask=Image.fromarray((filled & ~middle).astype(np.uint8) * 255))
    rows, columns = np.flatnonzero(filled.any(axis=1)), np.flatnonzero(filled.any(axis=0))
    return [
        (
            columns[0] / whole.width,
            rows[0] / whole.height,
            (columns[-1] + 1) / whole.width,
            (rows[-1] + 1) / whole.height,
        )
    ]


def _label(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    corners: tuple[float, float, float, float],
    text: str,
    colour: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """White on the object's colour, at the box's upper left corner, and inside of the picture."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 6, bottom - top + 6
    x = max(0, min(corners[0], size[0] - width))
    y = max(0, min(corners[1], size[1] - height))
    pen.rectangle([x, y, x + width - 1, y + height - 1], fill=colour)
    pen.text((x + 3 - left, y + 3 - top), text, fill="white", font=font)


def heatmap(image: Image.Image, heat: ArrayLike, caption: str = "") -> Image.Image:
    """A map [h,w] laid over an image: grey where it is 0, bright where it is largest, whatever that value is.

    heat: not negative, of any range (a tensor on the CPU will do), such as `result.attention["ball"][0]`. Small images
    are enlarged. ValueError for another shape, or values that are negative or not finite.
    """
    values = np.asarray(heat, dtype=np.float32)
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all() or values.min() < 0:
        raise ValueError(
            f"heat has shape {list(values.shape)} and values from {values.min(initial=np.inf):g} to "
            f"{values.max(initial=-np.inf):g}; expected [h,w] of finite numbers of at least 0"
        )
    whole = _enlarged(image)
    share = values / max(float(values.max()), 1e-30)
    smooth = np.asarray(Image.fromarray(share).resize(whole.size, Image.Resampling.BICUBIC)).clip(0, 1)
    points = np.linspace(0, 1, len(_HEAT))
    colours = np.stack([np.interp(smooth, points, channel) for channel in zip(*_HEAT, strict=True)], axis=2)
    grey = np.asarray(whole.convert("L"), dtype=np.float32)[..., None]
    cover = 0.25 + 0.6 * smooth[..., None]
    mixed = Image.fromarray(((1 - cover) * grey + cover * colours).round().astype(np.uint8))
    if caption:
        font = ImageFont.load_default(size=max(12, min(mixed.size) // 28))
        _label(ImageDraw.Draw(mixed), mixed.size, (0, 0, 0, 0), caption, "black", font)
    return mixed


def _enlarged(image: Image.Image) -> Image.Image:
    """A copy in RGB whose shorter edge is at least `_SMALLEST`, by a whole factor so that pixels stay square."""
    factor = -(-_SMALLEST // min(image.size))
    size = (image.width * factor, image.height * factor)
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC) if factor > 1 else image.convert("RGB")


def sheet(images: Sequence[Image.Image], captions: Sequence[str] = (), columns: int = 4) -> Image.Image:
    """A contact sheet: images of one size in rows of `columns`, each with its caption below.

    captions: none, or one per image; a long one is broken over lines. ValueError for other counts and mixed sizes.
    """
    if not images or len({image.size for image in images}) != 1:
        sizes = sorted({image.size for image in images})
        raise ValueError(f"images have sizes {sizes}; expected at least one image, all of one size")
    if captions and len(captions) != len(images):
        raise ValueError(f"got {len(captions)} captions for {len(images)} images; expected one for each, or none")
    font = ImageFont.load_default(size=11)
    width, height = images[0].size
    broken = [_broken(caption, font, width) for caption in captions]
    below = _LINE * max((len(lines) for lines in broken), default=0)
    rows = -(-len(images) // columns)
    across, down = width + _MARGIN, height + below + _MARGIN
    whole = Image.new("RGB", (min(columns, len(images)) * across + _MARGIN, rows * down + _MARGIN), "white")
    pen = ImageDraw.Draw(whole)
    for i, image in enumerate(images):
        x, y = _MARGIN + i % columns * across, _MARGIN + i // columns * down
        whole.paste(image, (x, y))
        for number, line in enumerate(broken[i] if broken else []):
            pen.text((x, y + height + number * _LINE), line, fill="black", font=font)
    return whole


def _broken(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The text in lines of at most `width` pixels; a single word may be wider."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
