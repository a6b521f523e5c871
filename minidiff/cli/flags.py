"""Command-line flags, named after the fields of Request and the arguments of load()."""

import argparse
from importlib.metadata import version
from typing import NoReturn

from ..vocabulary import EMPHASES, OBJECTIVES, PRESETS, RELATIONS, SAMPLERS, SCHEDULES, SYNTAXES
from .values import (
    read_again,
    read_box,
    read_image_prompt,
    read_layout,
    read_lora,
    read_numbers,
    read_positive,
    read_regions,
    read_scales,
    read_seed,
    read_shard,
    read_vary,
    read_wholes,
)


class _Parser(argparse.ArgumentParser):
    """Raises ValueError for a wrong flag, to be reported in one line like any bad argument."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


class _Words(argparse.Action):
    """Collects WORD=FILE as {word: file}."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        word, sign, file = str(values).partition("=")
        there = getattr(namespace, self.dest) or {}
        if not (word and sign and file):
            raise argparse.ArgumentError(self, f"got {values!r}; expected e.g. EasyNegative=EasyNegative.safetensors")
        if word in there:
            raise argparse.ArgumentError(self, f"the word {word!r} appears twice; expected one file for it")
        setattr(namespace, self.dest, {**there, word: file})


FAST: dict[str, object] = {"guidance_interval": [0.28, 5.42], "cache_interval": 3}
"""What --fast stands for; bench/RESULTS.md has what each costs."""


class _Fast(argparse.Action):
    """Sets those of FAST that no flag has set; flags after it set them anew."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        for name, value in FAST.items():
            if getattr(namespace, name) is None:
                setattr(namespace, name, value)


def parser() -> argparse.ArgumentParser:
    """The parser. Its namespace has `command` and the flags, None (PROMPT: []) if not given, to let generate() decide.

    parse_args raises ValueError for a wrong flag.
    """
    top = _Parser(prog="minidiff", description="Stable Diffusion 1.5 in plain PyTorch.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"minidiff {version('minidiff')}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    text = "make images from text"
    generate = commands.add_parser(
        "generate", help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
    )
    add_generate_flags(generate)
    text = "write heat maps and masks of what the network sees in a picture, for each word"
    look = commands.add_parser("look", help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    _add_look_flags(look)
    text = "open a page in the browser: draw boxes, watch pictures being made, see heat maps"
    page = commands.add_parser("page", help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    _add_page_flags(page)
    _add_model_flags(page, "append")
    text = "make the pictures of a file of requests, and go on with it after a kill"
    batch = commands.add_parser("batch", help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    _add_batch_flags(batch)
    _add_sampling_flags(batch)
    _add_model_flags(batch)
    text = "show what made a picture, or what a weight file or model folder holds and whether it loads"
    info = commands.add_parser("info", help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    info.add_argument(
        "source",
        nargs="?",
        metavar="FILE_OR_MODEL",
        help="a PNG, JPEG or WebP, a .safetensors file, a model folder or a hub id",
    )
    info.add_argument("--check", action="store_true", help="read all weights, and list tensors that are not finite")
    info.add_argument("--machine", action="store_true", help="show this machine's devices, dtypes and speed")
    info.add_argument("--variant", help="variant of the weight files in a folder or on the hub, such as fp16")
    info.add_argument("--revision", help="branch, tag or commit on the hub")
    info.add_argument("--json", action="store_true", help="print JSON, with all missing or misshapen keys")
    return top


def _add_batch_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "requests",
        metavar="FILE",
        help='a line for each request, {"prompt": ..., "seed": ...}, with the fields of minidiff.Request: .jsonl, '
        ".json, .csv or .parquet. Flags replace what lines say. A line without a seed gets one of its number",
    )
    add("--out", metavar="FOLDER", required=True, help="where pictures (by number of line), logs and the manifest go")
    add(
        "--batch-size",
        type=read_positive,
        metavar="N",
        help="images at a time (default: at most 32, as memory allows, and guided ones alone: guidance magnifies how a "
        "batch rounds, so that some would differ from generate's)",
    )
    add(
        "--tar",
        type=read_positive,
        nargs="?",
        const=1000,
        metavar="N",
        help="put pictures into shards of webdataset, pictures-000000.tar with N pairs KEY.png and KEY.json (default: "
        "1000), instead of files. A changed file of requests then needs another folder",
    )
    add("--ray", metavar="ADDRESS", help="on the machines of a Ray cluster that see the folder; local begins one here")
    add("--workers", type=read_positive, metavar="N", help="of --ray (default: one per GPU, or else one per machine)")
    add(
        "--threads",
        type=read_positive,
        metavar="N",
        help="of each worker (default: those of the folder, or else all of the CPU's): another number rounds otherwise",
    )
    add("--shard", type=read_shard, metavar="I/N", help="make part I of N, counted from 1: for schedulers")
    add("--width", type=int, metavar="PIXELS", help="a multiple of 8 in SD 1.5 (default: the model's training size)")
    add("--height", type=int, metavar="PIXELS", help="see --width")


def add_generate_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `minidiff generate`."""
    for add in (_add_image_flags, _add_picture_flags, _add_layout_flags, _add_sampling_flags, _add_model_flags):
        add(parser)


def _add_image_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", nargs="*", metavar="PROMPT", help="text that describes the image; several prompts make a batch")
    add(
        "--negative-prompt",
        action="append",
        metavar="TEXT",
        help="what to avoid; give one for all prompts, or one per prompt",
    )
    add(
        "--syntax",
        metavar="NAME",
        help=f"{' or '.join(SYNTAXES)}: how prompts are read; a1111 knows (word:1.3), [word], BREAK, [a:b:5], [a|b], "
        "AND and prompts of any length (default: plain)",
    )
    add(
        "--emphasis",
        metavar="NAME",
        help=f"{', '.join(EMPHASES[:-1])} or {EMPHASES[-1]}: how the weights of --syntax a1111 act (default: a1111)",
    )
    add("--width", type=int, metavar="PIXELS", help="a multiple of 8 in SD 1.5 (default: the model's training size)")
    add("--height", type=int, metavar="PIXELS", help="see --width")
    add(
        "--seed",
        type=read_seed,
        metavar="N[,N...]",
        help="seed of the first image, counting up for the rest; or one per image (default: random)",
    )
    add(
        "--vary",
        type=read_vary,
        metavar="SEED=STRENGTH",
        help="move the noise of --seed towards another seed's, by 0 to 1; that seed counts up and --seed stays",
    )
    add(
        "--tries",
        type=read_positive,
        metavar="N",
        help="of N start noises, take the one that suits the boxes or relations best before guidance (default: 1)",
    )
    add("--images", dest="images_per_prompt", type=int, metavar="N", help="images per prompt (default: 1)")
    add(
        "--out",
        metavar="PATH",
        default=".",
        help="a .png file or a folder (default: the current one), with {index}, {seed} and {prompt} in it if you like; "
        "existing files are kept, a taken name gets a number",
    )
    add("--no-metadata", action="store_true", help="do not write parameters into the PNG")
    add(
        "--from",
        dest="png",
        metavar="PICTURE",
        help="read the settings from a picture made by minidiff or A1111; other flags override them",
    )


def _add_picture_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("starting from a picture").add_argument
    add(
        "--image",
        action="append",
        metavar="PICTURE",
        help="start from a picture; give one for all prompts, or one per prompt",
    )
    add("--strength", type=float, metavar="S", help="0 to 1, how much of it changes (default: 0.8; with --mask, 1)")
    add(
        "--mask",
        action="append",
        metavar="PICTURE",
        help='paint where it is white and keep the rest; "alpha" paints where the image is transparent',
    )
    add(
        "--again",
        type=read_again,
        metavar="SCALE=STRENGTH",
        help="make the images again from themselves, larger: 2=0.5 for twice the size, half made anew",
    )
    add("--fit", metavar="NAME", help="how it gets to --width and --height: resize (default), crop or pad")
    add(
        "--paste",
        action=argparse.BooleanOptionalAction,
        help="outside the mask, give the result the picture's own pixels (default: yes)",
    )


def _add_layout_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("layout and attention").add_argument
    add(
        "--box",
        dest="boxes",
        action="append",
        type=read_box,
        metavar='"PHRASE=X0,Y0,X1,Y1"',
        help="the box for a phrase of the prompt: left, top, right, bottom, as fractions of the picture; repeatable",
    )
    add(
        "--layout",
        metavar="JSON",
        type=read_layout,
        help='a file with {"phrase": [x0, y0, x1, y1], ...}, or a list with one such object or null per prompt',
    )
    add(
        "--regions",
        metavar="JSON",
        type=read_regions,
        help='a file with [{"prompt": "a red fox", "box": [x0, y0, x1, y1], "negative": "...", "weight": 1}, ...]: '
        'parts of the image with texts of their own; "mask": a picture\'s file, white inside, may replace "box"; or a '
        "list with one such list or null per prompt",
    )
    add("--base-weight", type=float, metavar="W", help="how much PROMPT counts inside the regions (default: 0)")
    add(
        "--regions-apart",
        type=float,
        metavar="S",
        help="the share of the first steps in which regions are pictures of their own (default: the model's)",
    )
    add(
        "--image-prompt",
        action="append",
        type=read_image_prompt,
        metavar='"FILE[=X0,Y0,X1,Y1]"',
        help="a picture that prompts beside the text, with a box where it alone counts; repeatable; needs --ip-adapter",
    )
    add(
        "--image-prompt-scale",
        type=read_scales,
        metavar="S[,S...]",
        help="how strongly the pictures count; one number, or one per adapter (default: 1)",
    )
    add(
        "--relation",
        dest="relations",
        action="append",
        metavar='"PHRASE RELATION PHRASE"',
        help=f'such as "cat left of ball", without boxes: {", ".join(RELATIONS)}; repeatable',
    )
    add("--guidance", metavar="NAME", help=f"{', '.join((*PRESETS, *OBJECTIVES))} or none (default: the model's)")
    add(
        "--attention",
        action="store_true",
        default=None,
        help="also write a heat map of the attention to each phrase; in half precision, recording can change the "
        "image slightly",
    )


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("sampling").add_argument
    add("--steps", type=int, metavar="N", help="default: the model's")
    add("--timesteps", type=read_numbers, metavar="T,T,...", help="descending from 999, instead of --steps")
    add(
        "--sigmas",
        type=read_numbers,
        metavar="S,S,...",
        help="descending to 0, one more than steps, instead of --steps",
    )
    add(
        "--guidance-scale",
        type=float,
        metavar="W",
        help="how strongly to follow the prompt; 1 turns guidance off; 0 to 1 with CFG++ (default: the model's)",
    )
    add("--guidance-rescale", type=float, metavar="R", help="0 to 1, reduces overexposure at large scales (default: 0)")
    add(
        "--guidance-interval",
        type=read_numbers,
        metavar="LOW,HIGH",
        help="guide only at noise levels sigma above LOW, up to HIGH, and run half of the network's work elsewhere",
    )
    add("--cache-interval", type=int, metavar="N", help="run the network's deep layers only in every N-th step")
    add(
        "--fast",
        action=_Fast,
        nargs=0,
        default=argparse.SUPPRESS,
        help="--guidance-interval 0.28,5.42 --cache-interval 3: about half the time, other images in detail",
    )
    add(
        "--clip-skip",
        type=int,
        metavar="N",
        help="skip the last N layers of the text encoder (A1111's number minus one)",
    )
    add("--sampler", metavar="NAME", help=f"{', '.join(SAMPLERS)}, or A1111's name (default: the model's)")
    add("--schedule", metavar="NAME", help=f"noise levels: {', '.join(SCHEDULES)} (default: the sampler's)")
    add("--karras", dest="schedule", action="store_const", const="karras", help="--schedule karras")
    add(
        "--spacing",
        metavar="NAME",
        help="spacing of the timesteps: leading, linspace or trailing (default: the sampler's)",
    )
    add("--eta", type=float, metavar="E", help="0 to 1, fresh noise in each step of ddim or tcd (default: 0)")


def _add_look_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("picture", metavar="PICTURE", help="the file of a picture")
    add("prompt", metavar="PROMPT", help="what it shows, in words")
    add("--word", dest="words", action="append", metavar="PHRASE", help="ask for this phrase instead; repeatable")
    add(
        "--times", type=read_wholes, metavar="T[,T...]", help="noise of these training timesteps (default: 250,350,450)"
    )
    add("--seed", type=read_seed, metavar="N[,N...]", help="of the noise; the mean over several (default: 0)")
    add("--out", metavar="FOLDER", default=".", help="where pictures are written (default: the current folder)")
    add("--model", metavar="SOURCE", help="a hub id, a model folder or a .safetensors file (default: the bundled one)")
    add("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: the fastest on this device)")
    add("--device", metavar="NAME", help="cpu or cuda (default: cuda if available)")


def _add_page_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1", metavar="NAME", help="0.0.0.0 serves other machines, too (default: 127.0.0.1)")
    add("--port", type=int, metavar="N", help="default: the first free one from 7860")
    add("--out", metavar="FOLDER", help="where pictures are written (default: a new temporary folder)")


def _add_model_flags(parser: argparse.ArgumentParser, each: str = "store") -> None:
    """each: "append" takes several models."""
    add = parser.add_argument_group("model").add_argument
    text = "a hub id, a model folder or a .safetensors file (default: the bundled one)"
    add(
        "--model",
        action=each,
        metavar="SOURCE",
        help=text if each == "store" else f"{text}; repeatable, to choose from",
    )
    add("--variant", metavar="NAME", help="variant of the weight files in a folder or on the hub, such as fp16")
    add("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    add("--vae", metavar="SOURCE", help="another autoencoder: a hub id, a folder or a .safetensors file")
    add("--tokenizer", metavar="FOLDER", help="CLIP's tokenizer, for a single file if the hub's cache has none")
    add("--prediction-type", metavar="NAME", help="epsilon or v_prediction, if the model does not say")
    add("--dtype", metavar="NAME", help="float32, bfloat16, float16 or int8 (default: the fastest on this device)")
    add("--device", metavar="NAME", help="cpu or cuda (default: cuda if available)")
    add("--safety", action="store_true", help="write images black that the model folder's safety checker flags")
    add("--safety-from", dest="safety", metavar="SOURCE", help="--safety with the checker of another folder or hub id")
    add(
        "--word",
        dest="words",
        action=_Words,
        metavar="WORD=FILE",
        help="a word for prompts, from the .safetensors file of a textual inversion embedding; repeatable",
    )
    add(
        "--lora",
        dest="loras",
        action="append",
        type=read_lora,
        metavar="FILE[=WEIGHT[,TEXT_WEIGHT]]",
        help="a LoRA, LoCon, LoHa, LoKr or DoRA for the model, and how strongly it counts (default: 1); repeatable",
    )
    add("--ip-adapter", action="append", metavar="FILE", help="the .safetensors file of an IP-Adapter; repeatable")
    add("--image-encoder", metavar="SOURCE", help="a folder or hub id: the CLIP vision model that reads the pictures")
    add("--compile", action="store_true", help="use torch.compile: the first step is slow, later ones faster")
