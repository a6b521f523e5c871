"""minidiff look: heat maps and masks of a picture, for the words of a prompt or for others."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from ..draw import heatmap
from ..looking import TIMES, look
from ..pictures import opaque, read_picture
from ..png.write import png_bytes, slug, write_png
from ..prompts.named import words
from ..vocabulary import BUNDLED
from ..weights.load import load


def look_at(args: argparse.Namespace) -> Iterator[str]:
    """Write NAME-heat-PHRASE.png and NAME-mask-PHRASE.png for each phrase; yields each's score and box, and the files.

    The heat maps share their scale.
    """
    image = opaque(read_picture("PICTURE", args.picture))
    model = load(args.model or BUNDLED, dtype=args.dtype, device=args.device)
    seeds = 0 if args.seed is None else args.seed
    found = look(image, args.prompt, model=model, times=args.times or TIMES, seeds=seeds, words=args.words or ())
    phrases = list(found.words) or words(args.prompt)
    top = max((float(found.of(0, phrase).max()) for phrase in phrases), default=1.0)
    folder = Path(args.out).expanduser()
    for phrase in phrases:
        mask, box = found.mask(phrase), ", ".join(f"{edge:.2f}" for edge in found.box(phrase))
        yield f"{phrase}: score {found.score(phrase):.3f}, box {box}"
        shown = Image.fromarray((mask * 255).byte().numpy()).resize(image.size, Image.Resampling.NEAREST)
        pictures = {"heat": heatmap(image, found.of(0, phrase), phrase, top), "mask": shown}
        for kind, picture in pictures.items():
            path = folder / f"{Path(args.picture).stem}-{kind}-{slug(phrase)}.png"
            yield str(write_png(png_bytes(picture), path))
