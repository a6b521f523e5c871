"""What a benchmark ran on: every benchmark prints it, since a number without it means nothing."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "openvino")
UNITS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")
"""CPU flags, as Linux names them, that decide which kernels torch takes."""


def machine() -> dict[str, str]:
    """CPU, its vector units, cores this process may use, memory, system."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = _cpu_field("flags").split() or _cpu_field("Features").split()
    return {
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "units": " ".join(unit for unit in UNITS if unit in flags) or "unknown",
        "cores": str(cores),
        "memory": f"{memory / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def print_header(title: str, facts: dict[str, str]) -> None:
    """The first lines of every benchmark; `facts` are its own (dtype, shapes, how it measures)."""
    print(f"# {title}")
    for name, values in (("machine", machine()), ("versions", versions()), ("run", facts)):
        print(f"{name + ':':<10}" + ", ".join(f"{key} {value}" for key, value in values.items()))
    print(flush=True)


def _cpu_field(name: str) -> str:
    """The first value of a field of /proc/cpuinfo; "" where there is none."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == name), "")
