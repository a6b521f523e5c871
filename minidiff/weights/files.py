"""Safetensors files, header first: what a file holds costs no reading, and tensors are taken straight from the memory map."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_CHUNK = 128 * 2**20  # bytes of a mapped file that may be resident while its tensors are converted

_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


@dataclass(frozen=True)
class Stored:
    """A tensor that lies in a file and has not been read. `key` is its name there, `dtype` as safetensors writes it ("F16")."""

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        """Bytes in the file; for dtypes that no Stable Diffusion file uses, one per element."""
        return self.size * _BYTES.get(self.dtype, 1)


def stored_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a .safetensors file by key, from its header alone.

    ValueError for a pickle (which can run code when it is read), a file that is not there, cut short or not in this format.
    """
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run code when it is read; expected .safetensors. {how_to_convert(path)}"
        )
    if not path.is_file():
        raise ValueError(f"{path} is not there; expected a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            return {
                key: Stored(path, key, tuple(part.get_shape()), str(part.get_dtype())) for key, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as safetensors: {error}. "
            "It was cut short or damaged, or is something else under that name; download it again and compare its sha256 with weights.md"
        ) from error


def how_to_convert(path: Path) -> str:
    """One sentence: the way from a pickle to a safetensors file."""
    target = path.with_suffix(".safetensors").name
    return (
        "If you trust its origin, convert it once: "
        "from safetensors.torch import save_file; import torch; d = torch.load(FILE, weights_only=True); "
        f"save_file({{k: v.contiguous() for k, v in d.get('state_dict', d).items() if hasattr(v, 'shape')}}, {target!r})"
    )


def read_tensors(
    wanted: Mapping[str, Stored], shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """The wanted tensors, floating-point, in `dtype` on `device` and in these shapes (same elements, other 1-sized edges).

    Tensors that need no conversion are the memory map itself: nothing is copied, and pages are read when they are first used.
    Others are converted one by one, and the map is dropped every 128 MiB, so that the file never lies in memory beside its copy.
    """
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name, tensor in wanted.items():
        by_file[tensor.path].append(name)
    found: dict[str, Tensor] = {}
    for path, names in by_file.items():
        for chunk in _chunks(names, wanted):
            with safe_open(path, framework="pt") as file:
                for name in chunk:
                    found[name] = file.get_tensor(wanted[name].key).to(device=device, dtype=dtype).reshape(shapes[name])
    return found


def _chunks(names: list[str], wanted: Mapping[str, Stored]) -> list[list[str]]:
    chunks: list[list[str]] = [[]]
    size = 0
    for name in names:
        size += wanted[name].nbytes
        if size > _CHUNK and chunks[-1]:
            chunks.append([])
            size = wanted[name].nbytes
        chunks[-1].append(name)
    return chunks
