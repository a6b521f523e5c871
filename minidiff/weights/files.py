"""Safetensors files, header first: what a file holds costs no reading, and its tensors are the memory map itself."""

import io
import json
import pickletools
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .recognise import name_of

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_CHUNK = 128 * 2**20  # bytes of a mapped file that may at most be resident while its tensors are converted
_MOST_PICKLE = 16 * 2**20  # bytes of a pickle that are looked at; SD 1.5's names take less than one
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, not yet read. `key` is its name there, `dtype` as safetensors writes it ("F16")."""

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

    ValueError for a file that is not there, a pickle (which can run code when it is read), one cut short or damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there; expected a .safetensors file")
    if path.suffix.lower() in PICKLES:
        raise ValueError(_pickle(path))
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118, it is no dict
            return {
                key: Stored(path, key, tuple(part.get_shape()), str(part.get_dtype())) for key, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(_damage(path, error)) from error


def file_metadata(path: Path) -> dict[str, str]:
    """What the header of a .safetensors file says besides its tensors."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _pickle(path: Path) -> str:
    kind = _pickled(path)
    return (
        f"{path} is a pickle{'' if kind is None else f' (by its names: {kind})'}, which can run code when it is read; "
        f"expected .safetensors. {how_to_convert(path)}"
    )


def _pickled(path: Path) -> str | None:
    """What a pickle holds, told by the texts in it. Its instructions are listed, none is carried out."""
    texts: list[str] = []
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                    content = archive.open(name).read(_MOST_PICKLE)
            else:
                content = file.read(_MOST_PICKLE)
        stream = io.BytesIO(content)
        while stream.tell() < len(content):  # torch's old format: several pickles, then the numbers
            texts += [value for _, value, _ in pickletools.genops(stream) if isinstance(value, str)]
    except Exception:  # cut short, or no pickle at all: what was read before it tells
        pass
    return name_of(texts) or (
        "checkpoint" if any(text.startswith("model.diffusion_model.") for text in texts) else None
    )


# (first bytes, what a file that begins with them is)
_FORMATS = (
    (b"GGUF", "a GGUF file, whose quantised weights are not read"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
)


def _damage(path: Path, error: Exception) -> str:
    """Why safetensors cannot read a file, by the first bytes of what people store under that name by mistake."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(64)
    except OSError:
        return f"{path} cannot be read: {error}"
    kind = next((kind for magic, kind in _FORMATS if head.startswith(magic)), None)
    # A safetensors file begins with the length of its header in 8 bytes, of which the last four are 0 in any real one.
    if kind is None and len(head) > 8 and any(head[4:8]):
        if head.startswith(b"PK") and not _holds_pickle(path):
            kind = "a zip archive; unpack it first"
        elif head.startswith(b"PK") or head[0] == 0x80:
            return _pickle(path)
        elif head.lstrip()[:1] == b"<":
            kind = "a web page, not a .safetensors file; the download needs another address or an account"
        elif head.lstrip()[:1] in (b"{", b"["):
            kind = "JSON text, such as an error message of the server, not a .safetensors file; download it again"
    if kind is not None:
        return f"{path} is {kind}"
    return (
        f"{path} ({size:,} bytes) cannot be read as safetensors: {error}. {_length(path, size)}It was cut short or "
        "damaged, or is something else under that name; download it again and compare its sha256 with weights.md"
    )


def _holds_pickle(path: Path) -> bool:
    try:
        return any(name.endswith(".pkl") for name in zipfile.ZipFile(path).namelist())
    except (zipfile.BadZipFile, OSError):
        return True


def _length(path: Path, size: int) -> str:
    """How the file's length differs from what its header says; nothing where it has none."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < 10**8 else {}
        need = 8 + length + max(value["data_offsets"][1] for key, value in header.items() if key != "__metadata__")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return ""
    return f"Its header asks for {need:,} bytes: {abs(size - need):,} too {'few' if size < need else 'many'}. "


def how_to_convert(path: Path, target: str | None = None) -> str:
    """One sentence: the way from a pickle to a safetensors file, named `target` or as the pickle is."""
    save = str(path.with_suffix(".safetensors") if target is None else path.with_name(target))
    return (
        "If you trust its origin, convert it once in Python: from safetensors.torch import save_file; import torch; "
        f"d = torch.load({str(path)!r}, map_location='cpu', weights_only=True); "
        "d = d.get('state_dict') or d.get('string_to_param') or d; "
        "t = {str(k): v.detach().contiguous() for k, v in d.items() if hasattr(v, 'shape')}; "
        f"assert t, 'no tensors'; save_file(t, {save!r})"
    )


def read_tensors(
    wanted: Mapping[str, Stored], shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """The wanted tensors in `dtype` on `device` and in these shapes (same elements, other 1-sized edges).

    Tensors that need no conversion are the memory map itself: nothing is copied, and pages are read when they are first
    used. Others are converted one by one, and the map is dropped after every 16th part of them, so that the file never
    lies in memory beside its copy.
    """
    found: dict[str, Tensor] = {}
    for part in _parts(wanted, dtype, device):
        with safe_open(wanted[part[0]].path, framework="pt") as file:
            for name in part:
                found[name] = file.get_tensor(wanted[name].key).to(device=device, dtype=dtype).reshape(shapes[name])
    return found


def not_finite(tensors: Iterable[Stored], every: bool = False) -> list[str]:
    """Keys in the file of the tensors that hold NaN or infinity: of `every` one, or of vectors (norms and biases)."""
    files: dict[Path, list[str]] = defaultdict(list)
    for stored in tensors:
        if every or len(stored.shape) <= 1:
            files[stored.path].append(stored.key)
    found = []
    for path, keys in files.items():
        with safe_open(path, framework="pt") as file:
            found += [key for key in keys if not file.get_tensor(key).float().isfinite().all()]
    return found


def check_finite(state: Mapping[str, Tensor]) -> None:
    """ValueError that names the vectors (norms and biases) with NaN or infinity; to look at all would read the file."""
    bad = [key for key, tensor in state.items() if tensor.ndim <= 1 and not tensor.isfinite().all()]
    if bad:
        raise ValueError(
            f"weights are not finite (NaN or infinity): {', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}; such a "
            "model makes black images. Take another file of it; `minidiff info --check` names all its bad tensors"
        )


def _parts(wanted: Mapping[str, Stored], dtype: torch.dtype, device: torch.device) -> list[list[str]]:
    """Names that share one opening of their file: all that are used as they are, the others by the chunk."""
    parts: dict[object, list[str]] = defaultdict(list)
    chunk = min(_CHUNK, 1 + sum(tensor.nbytes for tensor in wanted.values()) // 16)
    size = 0
    for name, tensor in wanted.items():
        if _DTYPES.get(tensor.dtype) == dtype and device.type == "cpu":
            parts[tensor.path].append(name)
        else:
            parts[tensor.path, size // chunk].append(name)
            size += tensor.nbytes
    return list(parts.values())
