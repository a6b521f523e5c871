"""The machine and versions that a benchmark ran on, printed by every benchmark."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "openvino")
UNITS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")
"""CPU flags (Linux names) that determine which kernels torch uses."""


def machine() -> dict[str, str]:
    """CPU, its vector units, available cores, memory and system; and the card, if there is one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = _cpu_field("flags").split() or _cpu_field("Features").split()
    card = {"card": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        **card,
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "units": " ".join(unit for unit in UNITS if unit in flags) or "unknown",
        "cores": str(cores),
        "memory": f"{memory / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def print_header(title: str, facts: dict[str, str]) -> None:
    """Print the first lines of a benchmark; `facts` are its own settings (dtype, shapes, method)."""
    print(f"# {title}")
    for name, values in (("machine", machine()), ("versions", versions()), ("run", facts)):
        print(f"{name + ':':<10}" + ", ".join(f"{key} {value}" for key, value in values.items()))
    print(flush=True)


def _cpu_field(name: str) -> str:
    """The first value of a field in /proc/cpuinfo, or ""."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == name), "")
