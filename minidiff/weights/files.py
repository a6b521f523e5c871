"""Safetensors files. The header alone lists a file's tensors; tensors are used from the memory map, without a copy."""

import hashlib
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

from ..checks import finite
from .recognise import name_of

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_CHUNK = 128 * 2**20  # most bytes of a mapped file to keep resident while its tensors are converted
_MOST_PICKLE = 16 * 2**20  # most bytes of a pickle to scan; SD 1.5's names take less than 1 MB
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

    ValueError for a missing file, a pickle (which can run code when it is read), a truncated or damaged file.
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
    """The metadata in the header of a .safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def sha256(path: Path, header: bool = True) -> str:
    """Of a file; without the header, of a .safetensors file's tensors alone, as Kohya's trainer and A1111 count it."""
    with path.open("rb") as file:
        file.seek(0 if header else 8 + int.from_bytes(file.read(8), "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pickle(path: Path) -> str:
    kind = _pickled(path)
    return (
        f"{path} is a pickle{'' if kind is None else f' (by its names: {kind})'}, which can run code when it is read; "
        f"expected .safetensors. {how_to_convert(path)}"
    )


def _pickled(path: Path) -> str | None:
    """What a pickle contains, from the strings in it. Its opcodes are listed, none is executed."""
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
        while stream.tell() < len(content):  # torch's old format: several pickles, then the raw data
            texts += [value for _, value, _ in pickletools.genops(stream) if isinstance(value, str)]
    except Exception:  # truncated, or no pickle at all: use the strings found so far
        pass
    return name_of(texts) or (
        "checkpoint" if any(text.startswith("model.diffusion_model.") for text in texts) else None
    )


# (first bytes, what such a file is)
_FORMATS = (
    (b"GGUF", "a GGUF file, whose quantised weights are not supported"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (
        b"PAR1",
        "a Parquet table, such as the manifest of minidiff batch, and holds no weights; pandas.read_parquet reads it",
    ),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
)


def _damage(path: Path, error: Exception) -> str:
    """Why safetensors cannot read a file, from the first bytes of other formats often saved under that name."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
    except OSError:
        return f"{path} cannot be read: {error}"
    kind = next((kind for magic, kind in _FORMATS if head.startswith(magic)), None)
    # A safetensors file begins with the length of its header in 8 bytes; the last four are 0 in any real file.
    if kind is None and len(head) > 8 and any(head[4:8]):
        if head[257:262] == b"ustar":
            kind = "a tar archive, such as a shard of pictures of minidiff batch; unpack it first (tar -xf)"
        elif head.startswith(b"PK") and not _holds_pickle(path):
            kind = "a zip archive; unpack it first"
        elif head.startswith(b"PK") or head[0] == 0x80:
            return _pickle(path)
        elif head.lstrip()[:1] == b"<":
            kind = "a web page, not a .safetensors file; the download needs another URL or a login"
        elif head.lstrip()[:1] in (b"{", b"["):
            kind = "JSON text, such as a server's error message, not a .safetensors file; download it again"
    if kind is not None:
        return f"{path} is {kind}"
    return (
        f"{path} ({size:,} bytes) cannot be read as safetensors: {error}. {_length(path, size)}It was cut short or "
        "damaged, or is another kind of file; download it again and compare its sha256 with weights.md"
    )


def _holds_pickle(path: Path) -> bool:
    try:
        return any(name.endswith(".pkl") for name in zipfile.ZipFile(path).namelist())
    except (zipfile.BadZipFile, OSError):
        return True


def _length(path: Path, size: int) -> str:
    """How the file's length differs from what its header says; empty if the header cannot be read."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < 10**8 else {}
        need = 8 + length + max(value["data_offsets"][1] for key, value in header.items() if key != "__metadata__")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return ""
    return f"Its header implies {need:,} bytes: {abs(size - need):,} too {'few' if size < need else 'many'}. "


def how_to_convert(path: Path, target: str | None = None) -> str:
    """One sentence that says how to convert a pickle to safetensors, named `target` or like the pickle."""
    save = str(path.with_suffix(".safetensors") if target is None else path.with_name(target))
    return (
        "If you trust its origin, convert it once in Python: from safetensors.torch import save_file; import torch; "
        "torch.serialization.add_safe_globals([torch.nn.ParameterDict]); "  # in early textual inversions
        f"d = torch.load({str(path)!r}, map_location='cpu', weights_only=True); "
        "d = d.get('state_dict') or d.get('string_to_param') or d; "
        "d = {f'{k}.{n}': v for k, p in d.items() for n, v in p.items()} if 'ip_adapter' in d else d; "
        "t = {str(k): v.detach().contiguous() for k, v in d.items() if hasattr(v, 'shape')}; "
        f"assert t, 'no tensors'; save_file(t, {save!r})"
    )


def read_tensors(
    wanted: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """The wanted tensors in `dtype` on `device`, reshaped to `shapes` (which may differ in dimensions of length 1).

    Tensors that need no conversion are views of the memory map: nothing is copied, and pages are read on first use.
    Others are converted one by one, and the map is closed after each 16th of their bytes, so that the file and its copy
    are never in memory together.
    """
    found: dict[str, Tensor] = {}
    for part in _parts(wanted, dtype, device):
        with safe_open(wanted[part[0]].path, framework="pt") as file:
            for name in part:
                found[name] = file.get_tensor(wanted[name].key).to(device=device, dtype=dtype).reshape(shapes[name])
    return found


def read_weights(
    wanted: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """read_tensors; ValueError naming the vectors (norms and biases) with NaN or infinity.

    Checking all would read the whole file.
    """
    state = read_tensors(wanted, shapes, dtype, device)
    bad = [key for key, tensor in state.items() if tensor.ndim <= 1 and not tensor.isfinite().all()]
    if bad:
        raise ValueError(
            f"weights are not finite (NaN or infinity): {', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}; such a "
            "model makes black images. Use another file of the model; `minidiff info --check` lists all bad tensors"
        )
    return state


def stored_not_finite(tensors: Iterable[Stored], every: bool = False) -> list[str]:
    """The file's keys of tensors with NaN or infinity, among `every` tensor or only vectors (norms and biases)."""
    files: dict[Path, list[str]] = defaultdict(list)
    for stored in tensors:
        if every or len(stored.shape) <= 1:
            files[stored.path].append(stored.key)
    found = []
    for path, keys in files.items():
        with safe_open(path, framework="pt") as file:
            found += [key for key in keys if not finite(file.get_tensor(key).float())]
    return found


def _parts(wanted: Mapping[str, Stored], dtype: torch.dtype, device: torch.device) -> list[list[str]]:
    """Names grouped by opening of their file: all tensors used as they are, and the others in chunks."""
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
