"""Write a model folder with random weights that minidiff and diffusers load, for tests without a download."""

import argparse
from pathlib import Path

import torch

from .models import SD15, TINY, write_folder

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m bench model`."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write; must not exist")
    parser.add_argument("--full", action="store_true", help="SD 1.5's size (4.3 GB in float32) instead of tiny")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Write the folder and print its name. ValueError if it exists."""
    if args.folder.exists():
        raise ValueError(f"{args.folder} already exists; expected the name of a new folder")
    print(write_folder(args.folder, SD15 if args.full else TINY, DTYPES[args.dtype], args.seed))
    return 0
