"""Choice of device and dtype: the fast ones on this machine, measured where CPU feature flags would mislead."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import shown, warn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INT8 = "int8"
_CLEARLY = 1.1  # how much faster bfloat16 must be to justify its rounding


@dataclass(frozen=True)
class Machine:
    """The hardware of this machine.

    rates: TFLOP/s of the CPU by "dtype work", for matrix products and 3x3 convolutions; empty without bfloat16 kernels.
    accelerators: names of CUDA devices, and "mps".
    """

    processor: str
    threads: int
    features: tuple[str, ...]
    rates: Mapping[str, float] = field(default_factory=dict)
    accelerators: tuple[str, ...] = ()

    @property
    def cpu_dtype(self) -> torch.dtype:
        """The CPU's fast dtype: bfloat16 if clearly faster than float32, else float32."""
        return torch.bfloat16 if self.gain > _CLEARLY else torch.float32

    @property
    def gain(self) -> float:
        """The speed of bfloat16 relative to float32, geometric mean over products and convolutions; 0: unknown."""
        if not self.rates:
            return 0.0
        ratios = (self.rates[f"bfloat16 {work}"] / self.rates[f"float32 {work}"] for work in _WORK)
        return math.prod(ratios) ** (1 / len(_WORK))

    def __str__(self) -> str:
        return (
            f"bfloat16 runs at {self.gain:.2f} of float32's rate" if self.rates else "its CPU has no bfloat16 kernels"
        )


@cache
def machine() -> Machine:
    """This machine; measured once per process, in about 50 ms, and only if the CPU has bfloat16 kernels."""
    features = tuple(name for name, there in _FEATURES.items() if there())
    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    accelerators += ["mps"] if torch.backends.mps.is_available() else []
    rates = measured_rates() if {"avx512_bf16", "amx"} & set(features) else {}
    return Machine(_processor(), torch.get_num_threads(), features, rates, tuple(accelerators))


def choose_device(device: torch.device | str | None) -> torch.device:
    """None selects CUDA if available, else the CPU. ValueError for an unavailable device, listing those available."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = [
        "cpu",
        *(["cuda"] if torch.cuda.is_available() else []),
        *(["mps"] if torch.backends.mps.is_available() else []),
    ]
    expected = f"expected one that is available: {', '.join(there)}"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device {shown(device)} cannot be used: there is no such device type; {expected}") from None
    if chosen.type == "meta":
        raise ValueError(f'device "meta" cannot be used: it holds no data; {expected}')
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # depends on the device type
        why = str(error).splitlines()[0] if chosen.type in there else f"there is no {chosen.type} device"
        raise ValueError(f"device {str(chosen)!r} cannot be used: {why}; {expected}") from error
    return chosen


def choose_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """None selects the fast dtype: float16 on CUDA, what `machine` measured on the CPU, float32 elsewhere.

    For int8: float32, for what stays float (but large attention, see int8.py); bfloat16 was no faster there.
    """
    if is_int8(dtype, device):
        return torch.float32
    if dtype is None:
        return (
            machine().cpu_dtype if device.type == "cpu" else torch.float16 if device.type == "cuda" else torch.float32
        )
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is unknown; expected one of {', '.join((*DTYPES, INT8))}")
        dtype = DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype {shown(dtype)} is not supported; expected one of {', '.join((*DTYPES, INT8))}")
    if dtype == torch.float16 and device.type == "cpu" and not _has_fp16():
        # Without kernels a float16 matrix product is a thousand times slower than a float32 one.
        instead = machine().cpu_dtype
        warn(f"this CPU has no float16 kernels; computing in {str(instead).removeprefix('torch.')}")
        return instead
    return dtype


def is_int8(dtype: torch.dtype | str | None, device: torch.device) -> bool:
    """True for int8. ValueError if the device has no fast kernels for it."""
    if dtype not in (INT8, torch.int8):
        return False
    if device.type != "cpu" or not _has_int8():
        what = "this one has none" if device.type == "cpu" else f"the device is {str(device)!r}"
        raise ValueError(
            f'dtype "int8" needs a CPU with AVX-512 VNNI instructions, and {what}; expected one of {", ".join(DTYPES)}'
        )
    return True


def dtype_choice(asked: torch.dtype | str | None, device: torch.device) -> str:
    """The reason for `choose_dtype`'s choice; "" if the caller chose, or off the CPU."""
    return str(machine()) if asked is None and device.type == "cpu" else ""


def _has_fp16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _has_int8() -> bool:
    """Without VNNI, oneDNN's sums of products of int8 saturate at 16 bits: fast, but wrong."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


_FEATURES = {
    "avx2": lambda: torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"),
    "avx512": lambda: torch.backends.cpu.get_cpu_capability() == "AVX512",
    "avx512_bf16": torch.cpu._is_avx512_bf16_supported,
    "avx512_vnni": torch.cpu._is_vnni_supported,
    "amx": torch.cpu._is_amx_tile_supported,
    "float16 kernels": _has_fp16,
}
_WORK = ("product", "convolution")


def measured_rates(repeats: int = 4) -> dict[str, float]:
    """TFLOP/s by "dtype work", best of `repeats`: a matrix product and a 3x3 convolution, a few milliseconds each.

    They alternate, so that other load on the machine affects all of them.
    """
    runs: dict[str, Callable[[], Tensor]] = {}
    for name in ("float32", "bfloat16"):
        one = torch.ones((), dtype=DTYPES[name], device="cpu")
        a, b = one.expand(512, 1024).clone(), one.expand(1024, 1024).clone()
        x, k = one.expand(1, 128, 48, 48).clone(), one.expand(128, 128, 3, 3).clone()
        x = x.contiguous(memory_format=torch.channels_last)
        runs[f"{name} product"] = partial(torch.mm, a, b)
        runs[f"{name} convolution"] = partial(F.conv2d, x, k, padding=1)
    flops = {"product": 2 * 512 * 1024 * 1024, "convolution": 2 * 9 * 128 * 128 * 48 * 48}
    seconds = dict.fromkeys(runs, math.inf)
    with torch.no_grad():
        for _ in range(repeats):
            for name, run in runs.items():
                before = time.perf_counter()
                run()
                seconds[name] = min(seconds[name], time.perf_counter() - before)
    return {name: flops[name.partition(" ")[2]] / taken / 1e12 for name, taken in seconds.items()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
