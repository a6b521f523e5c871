"""Boxes and heat maps drawn over pictures, and contact sheets (Pillow and numpy)."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .checks import number, shown, whole as whole_number
from .guidance.layout import Boxes, read_objects, to_array

Picture: TypeAlias = "Image.Image | NDArray[Any] | Tensor"
Heat: TypeAlias = "Tensor | ArrayLike"
Corners: TypeAlias = tuple[int, int, int, int]  # the leftmost, topmost, rightmost and bottommost pixel

_MARGIN = 6  # pixels
_SMALLEST = 384  # pixels; pictures with a shorter edge are enlarged before drawing
_LARGEST = 4096  # pixels; enlarged pictures are no longer than this
_COLOURS = ("#e6194b", "#2a6ff0", "#1a8a3c", "#d9600a", "#7b2cbf", "#00838f", "#d61fc4", "#6d5200")
# Control colours from 0 to 1, in even steps of lightness, like matplotlib's inferno.
_HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))


def boxes(picture: Picture, layout: Boxes, labels: bool = True) -> Image.Image:
    """A copy of a picture with the boxes of a layout, as generate() takes it, one colour per object.

    Masks are drawn as outlines. Small pictures are enlarged to keep labels readable; without labels the size stays.
    Phrases without a box or mask are skipped. ValueError for an invalid picture, box or mask.
    """
    image = to_image(picture)
    whole = _enlarged(image) if labels else image
    width = max(1, min(whole.size) // 128)
    places: list[tuple[Corners, str, str]] = []
    for i, region in enumerate(read_objects(layout)):
        colour = _COLOURS[i % len(_COLOURS)]
        if region.mask is not None:
            places.append((_outline(whole, _inside(region.mask, whole.size), colour, width), region.name, colour))
        for box in region.boxes:
            corners = _pixels(box, whole.size)
            _rectangle(ImageDraw.Draw(whole), corners, colour, width)
            places.append((corners, region.name, colour))
    taken: list[Corners] = []
    for corners, name, colour in places if labels else ():  # after all lines, so that none crosses a label
        taken.append(_label(whole, corners[0], corners[1], name, colour, taken))
    return whole


def _pixels(box: Sequence[float], size: tuple[int, int]) -> Corners:
    """The outermost pixels of a box: at least one, and inside the picture."""
    x0, y0 = (min(round(edge * pixels), pixels - 1) for edge, pixels in zip(box[:2], size, strict=True))
    x1, y1 = (round(edge * pixels) - 1 for edge, pixels in zip(box[2:], size, strict=True))
    return x0, y0, max(x0, x1), max(y0, y1)


def _rectangle(pen: ImageDraw.ImageDraw, corners: Corners, colour: str, width: int) -> None:
    x0, y0, x1, y1 = corners
    if width > 1:  # to show a blue box on a blue square
        pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline="white", width=width + 2)
    pen.rectangle(corners, outline=colour, width=width)


def _inside(mask: Tensor, size: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask at the picture's size: where it is above half of its largest value."""
    filled = Image.fromarray((mask > mask.max() / 2).numpy().astype(np.uint8))
    return np.asarray(filled.resize(size, Image.Resampling.NEAREST)) > 0


def _outline(whole: Image.Image, filled: NDArray[np.bool_], colour: str, width: int) -> Corners:
    """Draw the edge of a mask, and return the pixels of the box around it."""
    for ink, depth in (("white", width + 1), (colour, width)) if width > 1 else ((colour, width),):
        middle = filled
        for _ in range(depth):
            padded = np.pad(middle, 1)
            middle = middle & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
        whole.paste(ink, mask=Image.fromarray((filled & ~middle).astype(np.uint8) * 255))
    rows, columns = np.flatnonzero(filled.any(axis=1)), np.flatnonzero(filled.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def _label(whole: Image.Image, x: int, y: int, text: str, colour: str, taken: Sequence[Corners] = ()) -> Corners:
    """White on the object's colour, from a corner, but inside of the picture and below what is taken there."""
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(size=_font_size(whole))
    text = " ".join(text.split())
    if font.getlength(text) > whole.width - 8:
        while text and font.getlength(f"{text}...") > whole.width - 8:
            text = text[:-1]
        text = f"{text}..."
    left, top, right, bottom = (round(edge) for edge in pen.textbbox((0, 0), text, font=font))
    width, height = right - left + 6, bottom - top + 6
    x, y = max(0, min(x, whole.width - width)), max(0, min(y, whole.height - height))
    for x0, y0, x1, y1 in sorted(taken, key=lambda corners: corners[1]):
        meets = x <= x1 and x0 < x + width and y <= y1 and y0 < y + height
        if meets and y1 + height < whole.height:
            y = y1 + 1
    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    pen.text((x + 3 - left, y + 3 - top), text, fill="white", font=font)
    return x, y, x + width - 1, y + height - 1


def heatmap(picture: Picture, heat: Heat, caption: str = "", vmax: float | None = None) -> Image.Image:
    """A map [h,w] over a picture: grey at 0, bright at `vmax` and above, with a labelled colour bar.

    heat: nonnegative, such as `result.attention["ball"][0]`. vmax: default: the map's maximum; maps that share one are
    comparable. Small pictures are enlarged, as in boxes(). ValueError for other shapes, values that are negative or not
    finite, and vmax <= 0.
    """
    values = _heat(heat)
    top = max(float(values.max()), 1e-30) if vmax is None else number("vmax", vmax, 1e-30, expected="a number above 0")
    whole = _enlarged(to_image(picture))
    share = (values / top).clip(0, 1)
    smooth = np.asarray(Image.fromarray(share).resize(whole.size, Image.Resampling.BICUBIC)).clip(0, 1)
    grey = np.asarray(whole.convert("L"), dtype=np.float32)[..., None]
    cover = 0.25 + 0.6 * smooth[..., None]
    mixed = Image.fromarray(((1 - cover) * grey + cover * heat_colours(smooth)).round().astype(np.uint8))
    if caption:
        _label(mixed, 0, 0, caption, "black")
    _bar(mixed, top if values.max() > 0 or vmax is not None else 0.0)
    return mixed


def heatmaps(picture: Picture, maps: Mapping[str, Heat], vmax: float | None = None, columns: int = 4) -> Image.Image:
    """A sheet of captioned heat maps over one picture, all on one scale.

    vmax: default: the maximum of all maps.
    """
    largest = max((float(_heat(heat).max()) for heat in maps.values()), default=0.0)
    top = (largest or None) if vmax is None else vmax
    return sheet([heatmap(picture, heat, name, top) for name, heat in maps.items()], columns=columns)


def _heat(heat: Heat) -> NDArray[np.float32]:
    found = np.asarray(to_array("heat", heat))
    values = found.astype(np.float32) if found.dtype.kind in "biuf" else np.full(found.shape, np.nan, np.float32)
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all() or values.min() < 0:
        raise ValueError(
            f"heat has shape {list(found.shape)}, dtype {found.dtype} and values from {values.min(initial=np.inf):g} "
            f"to {values.max(initial=-np.inf):g}; expected [h,w] of finite numbers of at least 0, one map such as "
            'result.attention["ball"][0]'
        )
    return values


def heat_colours(share: NDArray[np.float32]) -> NDArray[np.float64]:
    """[...] in [0,1] -> [...,3] in [0,255]."""
    points = np.linspace(0, 1, len(_HEAT))
    return np.stack([np.interp(share, points, channel) for channel in zip(*_HEAT, strict=True)], axis=-1)


def _bar(whole: Image.Image, top: float) -> None:
    """Draw a colour bar from 0 to `top`, labelled, at the lower right."""
    width, height = whole.width // 4, max(6, min(whole.size) // 40)
    font = ImageFont.load_default(size=_font_size(whole))
    names = [(text, round(font.getlength(text))) for text in ("0", f"{top:.2g}")]
    x, y = whole.width - width - names[1][1] - 8, whole.height - _font_size(whole) - 8
    left = x - names[0][1] - 8
    pen = ImageDraw.Draw(whole)
    pen.rectangle((left, y, whole.width, whole.height), fill="black")
    steps = np.broadcast_to(np.linspace(0, 1, max(width, 1), dtype=np.float32), (height, max(width, 1)))
    middle = (y + whole.height) // 2
    whole.paste(Image.fromarray(heat_colours(steps).round().astype(np.uint8)), (x, middle - height // 2))
    for at, (text, _) in zip((left + 4, x + width + 4), names, strict=True):
        pen.text((at, middle), text, fill="white", font=font, anchor="lm")


def to_image(picture: Picture) -> Image.Image:
    """An RGB copy of a PIL image, an array [H,W,3] or a tensor [3,H,W]: uint8, or floats in [0,1]."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB").copy()
    found = to_array("the picture", picture) if isinstance(picture, Tensor | np.ndarray) else np.zeros(0)
    pixels = found.transpose(1, 2, 0) if isinstance(picture, Tensor) and found.ndim == 3 else found
    floats = pixels.dtype.kind == "f"
    fits = pixels.ndim == 3 and pixels.shape[2] == 3 and 0 not in pixels.shape
    if not fits or not (floats or pixels.dtype == np.uint8) or (floats and np.nanmax(pixels, initial=0) > 2):
        raise ValueError(
            f"the picture is {shown(picture)}; expected one PIL image, array [H,W,3] or tensor [3,H,W], of uint8 or of "
            "floats in [0,1], such as result.images[0]"
        )
    if floats:  # clip values slightly outside [0,1], which would wrap around
        pixels = (np.nan_to_num(pixels).clip(0, 1) * 255).round()
    return Image.fromarray(pixels.astype(np.uint8))


def _enlarged(image: Image.Image) -> Image.Image:
    """Enlarged to a shorter edge of at least `_SMALLEST`, by a whole factor so that pixels stay square."""
    factor = max(1, min(-(-_SMALLEST // min(image.size)), _LARGEST // max(image.size)))
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.BICUBIC) if factor > 1 else image


def _font_size(image: Image.Image) -> int:
    return max(12, min(image.size) // 26)


def sheet(pictures: Sequence[Picture], captions: Sequence[str] = (), columns: int = 4) -> Image.Image:
    """A contact sheet: pictures of one size in rows of `columns`, each with its caption below.

    captions: none, or one per picture; long ones wrap, and the font scales with the pictures.
    ValueError for other counts and mixed sizes.
    """
    columns, images = whole_number("columns", columns, 1), [to_image(picture) for picture in pictures]
    if not images or len({image.size for image in images}) != 1:
        sizes = sorted({image.size for image in images})
        raise ValueError(f"images have sizes {sizes}; expected at least one image, all of one size")
    if captions and len(captions) != len(images):
        raise ValueError(f"got {len(captions)} captions for {len(images)} images; expected one per image, or none")
    width, height = images[0].size
    size = _font_size(images[0])
    font, line = ImageFont.load_default(size=size), round(1.3 * size)
    broken = [_broken(caption, font, width) for caption in captions]
    below = line * max((len(lines) for lines in broken), default=0)
    rows = -(-len(images) // columns)
    across, down = width + _MARGIN, height + below + _MARGIN
    whole = Image.new("RGB", (min(columns, len(images)) * across + _MARGIN, rows * down + _MARGIN), "white")
    pen = ImageDraw.Draw(whole)
    for i, image in enumerate(images):
        x, y = _MARGIN + i % columns * across, _MARGIN + i // columns * down
        whole.paste(image, (x, y))
        for n, text in enumerate(broken[i] if broken else []):
            pen.text((x, y + height + n * line), text, fill="black", font=font)
    return whole


def _broken(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The text wrapped to lines of at most `width` pixels, except for single long words."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
