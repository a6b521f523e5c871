"""Pictures of the bundled model that start from a picture: painted inside a mask, and changed as a whole."""

import argparse
from pathlib import Path

from PIL import Image

import minidiff
from minidiff import draw

PICTURE = Path(__file__).parent / "pictures" / "edited.png"
SEED = 1
COLOURS = 48  # of the file
CIRCLE, OTHER = (0.05, 0.1, 0.45, 0.5), (0.55, 0.5, 0.95, 0.9)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=PICTURE, metavar="FILE", help="default: beside the other pictures")


def run(args: argparse.Namespace) -> int:
    """Write a strip of three pictures."""
    request = minidiff.Request(
        "a red circle and a blue square",
        model=minidiff.load(dtype="float32", device="cpu"),
        boxes={"red circle": CIRCLE, "blue square": OTHER},
        seed=SEED,
    )
    start = minidiff.generate(request).image
    right = Image.new("L", start.size)
    right.paste(255, (start.width // 2, 0, *start.size))
    inside = {"prompt": "a red circle and a green star", "boxes": {"green star": OTHER}}
    whole = {"prompt": "a yellow circle and a purple square", "boxes": None}
    pictures = {
        "a red circle and a blue square": start,
        f"the right half as mask: {inside['prompt']}": minidiff.generate(
            request, image=start, mask=right, **inside
        ).image,
        f"strength 0.6: {whole['prompt']}": minidiff.generate(request, image=start, strength=0.6, **whole).image,
    }
    sheet = draw.sheet([draw.boxes(picture, {}) for picture in pictures.values()], list(pictures))
    sheet.quantize(COLOURS, dither=Image.Dither.NONE).save(args.out, optimize=True)
    print(f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB")
    return 0
