"""A LoRA of rank 32 on a model of full size: errors, seconds and memory against diffusers' fuse_lora (by PEFT)."""

import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import minidiff

from .adapters import BOUND, LINEAR, Case, errors, low_rank, tensors_of
from .models import SD15, write_folder
from .reference import diffusers
from .table import Row
from .timing import seconds

RANK = 32
REPEATS = 5
SHAPE = f"full size, rank {RANK}"


def merge_rows() -> Iterator[Row]:
    """The UNet's output and the context with the LoRA, the time of putting it on, and the memory that it adds."""
    with tempfile.TemporaryDirectory(prefix="minidiff-bench-") as place:
        folder = write_folder(Path(place) / "full", SD15)
        model = minidiff.load(folder, dtype="float32", device="cpu")
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        case = Case(partial(low_rank, rank=RANK, size=0.02), layers=LINEAR)
        path = folder / "file.safetensors"
        save_file(tensors_of(case, model), path)

        fusing: list[float] = []

        def load_and_fuse() -> None:
            pipeline.load_lora_weights(str(folder), weight_name=path.name)
            fusing.append(seconds(pipeline.fuse_lora))

        mine, both = [], []
        for _ in range(REPEATS + 1):
            mine.append(seconds(lambda: minidiff.with_loras(model, path)))
            both.append(seconds(load_and_fuse))
            pipeline.unfuse_lora()
            pipeline.unload_lora_weights()
        changed = minidiff.with_loras(model, path)
        load_and_fuse()
        for part, value in zip(("unet", "context"), errors(changed, pipeline), strict=True):
            yield Row(f"LoRA, {part}", SHAPE, value, BOUND, note="merged by diffusers")
        ours, theirs, alone = (statistics.median(found[1:]) for found in (mine, both, fusing))
        note = (
            f"{ours:.2f} s, best {min(mine):.2f}; theirs {theirs:.2f} s, best {min(both):.2f}; "
            f"fuse_lora alone, which overwrites the base, {alone:.2f} s"
        )
        yield Row("LoRA, seconds", SHAPE, ours / theirs, 1, "of load_lora_weights and fuse_lora", note)
        new, touched = added_bytes(model, changed)
        yield Row("LoRA, new tensors", SHAPE, new / touched, 1, "of the bytes that it changes", f"{new / 1e9:.2f} GB")


def added_bytes(model: minidiff.Model, changed: minidiff.Model) -> tuple[int, int]:
    """Of the tensors that changed does not share with model; of those whose values differ."""
    new = touched = 0
    for before, after in ((model.unet, changed.unet), (model.text.model, changed.text.model)):
        for old, value in zip(before.parameters(), after.parameters(), strict=True):
            new += value.nbytes * (value is not old)
            touched += value.nbytes * (not torch.equal(dense(value), dense(old)))
    return new, touched


def dense(value: Tensor) -> Tensor:
    """A packed layer's weight as others have it."""
    return value.to_dense() if value.is_mkldnn else value
