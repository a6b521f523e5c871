"""One operation in a fresh process: python -m bench.once CASE LIBRARY prints its memory and seconds as JSON.

It runs twice. loaded, ready: resident bytes before and after the first run (including packed weights and caches).
peak: the maximum resident bytes during the second run. seconds: of the second run. On CUDA the bytes are those
allocated by torch.
"""

import argparse
import ctypes
import gc
import json
from collections.abc import Callable
from pathlib import Path

import torch

from .load_once import resident
from .models import Size
from .networks import (
    DTYPES,
    PLACES,
    SIZES,
    Inputs,
    device,
    guided_pass,
    guided_run,
    layout_guide,
    our_unet,
    our_vae,
    their_unet,
    their_vae,
    tokens,
    unet_weights,
)
from .published import Published
from .throughput import ours, theirs
from .timing import seconds

Call = Callable[[], object]
_M_MMAP_THRESHOLD = -3  # from glibc's malloc.h


def step(library: str, size: Size, dtype: torch.dtype, edge: int, count: int) -> Call:
    """A step for `count` images with classifier-free guidance."""
    weights, inputs = unet_weights(size, dtype), Inputs.random(size, dtype, 2 * count, edge, edge)
    if library == "diffusers":
        return theirs(their_unet(size, weights), inputs)
    return ours(our_unet(size, weights), inputs)


def guided(library: str, size: Size, dtype: torch.dtype, edge: int, count: int) -> Call:
    """A guided pass for `count` images; the published method supports only one."""
    weights, inputs = unet_weights(size, dtype), Inputs.random(size, dtype, count, edge, edge)
    if library == "diffusers":
        published = Published.of(their_unet(size, weights))
        return lambda: published.gradient(inputs.x, inputs.t, inputs.context, PLACES[:2], tokens(2))
    return guided_pass(layout_guide(our_unet(size, weights), inputs), inputs)


def decode(library: str, size: Size, dtype: torch.dtype, edge: int, count: int) -> Call:
    """Decoding of latents to images."""
    latents = Inputs.random(size, dtype, count, edge, edge).x
    if library == "diffusers":
        vae = their_vae(size, dtype)
        return torch.no_grad()(lambda: vae.decode(latents, return_dict=False)[0])
    own = our_vae(size, dtype)
    return torch.no_grad()(lambda: own.decode(latents))


def sampling(library: str, size: Size, dtype: torch.dtype, edge: int, count: int) -> Call:
    """A run of `count` steps."""
    unet = our_unet(size, unet_weights(size, dtype))
    return guided_run(unet, Inputs.random(size, dtype, 2, edge, edge), count)


CASES = {"step": step, "guided": guided, "decode": decode, "sampling": sampling}


def main() -> None:
    """Set up, run twice, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.once", description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("library", choices=("minidiff", "diffusers"))
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("edge", type=int)
    parser.add_argument("count", type=int)
    args = parser.parse_args()
    _map_each_tensor()
    call = CASES[args.case](args.library, SIZES[args.size], DTYPES[args.dtype], args.edge, args.count)
    loaded = _now()
    call()
    ready = _now()
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak of the resident set
    took = seconds(call)
    peak = torch.cuda.max_memory_allocated() if device().type == "cuda" else resident("VmHWM")
    print(json.dumps({"loaded": loaded, "ready": ready, "peak": peak, "seconds": took}))


def _map_each_tensor() -> None:
    """Heap fragmentation varies between processes, by 0.1 GB for a full-size step; separate mappings avoid it."""
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        adjust(_M_MMAP_THRESHOLD, 2**16)  # bytes; by default it grows to 32 MB


def _now() -> int:
    """Bytes in use, after returning freed memory from the C library to the system."""
    gc.collect()
    if device().type == "cuda":
        return torch.cuda.memory_allocated()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
    return resident("VmRSS")


if __name__ == "__main__":
    main()
