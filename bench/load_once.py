"""One load in a fresh process: python -m bench.load_once LIBRARY FOLDER DTYPE WARM_UP prints its numbers as JSON.

WARM_UP is a small model that is loaded first, so that late imports count as import, not as load.
"""

import gc
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

STATUS = Path("/proc/self/status")
PAGE = 4096


def main(library: str, folder: str, dtype: str, warm_up: str) -> None:
    """Load, then read every page once; print the seconds and the increase of peak resident memory."""
    started = time.perf_counter()
    load = LIBRARIES[library]
    load(warm_up, dtype)
    imported = time.perf_counter() - started
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak of the resident set
    before, cpu, started = resident("VmRSS"), time.process_time(), time.perf_counter()
    parts = load(folder, dtype)
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    started = time.perf_counter()
    weights = {tensor.data_ptr(): tensor for part in parts for tensor in part.parameters()}.values()
    touch(weights)
    found = {
        "imported": imported,
        "wall": wall,
        "cpu": cpu,
        "touch": time.perf_counter() - started,
        "peak": resident("VmHWM") - before,
        "weights": sum(tensor.nbytes for tensor in weights),
        "dtype": " ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights})),
    }
    print(json.dumps(found))


def touch(weights: "Iterable[Tensor]") -> None:
    """Read one element per page, as the first forward pass would after a load that only mapped the file."""
    for tensor in weights:
        tensor.flatten()[:: PAGE // tensor.element_size()].sum()


def resident(field: str) -> int:
    """VmRSS or VmHWM (its peak) of this process in bytes; resident pages of mapped files count."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def load_minidiff(folder: str, dtype: str) -> list[Any]:
    """The three networks from minidiff.load."""
    import minidiff

    model = minidiff.load(folder, dtype=dtype, device="cpu")
    return [model.unet, model.vae, model.text.model]


def load_diffusers(folder: str, dtype: str) -> list[Any]:
    """The three networks from StableDiffusionPipeline.from_pretrained with its defaults."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
    return [pipeline.unet, pipeline.vae, pipeline.text_encoder]


LIBRARIES: dict[str, Callable[[str, str], list[Any]]] = {"minidiff": load_minidiff, "diffusers": load_diffusers}

if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(*sys.argv[1:])
