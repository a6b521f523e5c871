"""Pictures about pictures (Pillow only)."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_MARGIN, _LINE = 6, 14  # pixels


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
