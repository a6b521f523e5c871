"""weights/files.py: headers, damage, pickles, and what reading costs in memory."""

import json
import os
import random
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minidiff.weights.files import Stored, how_to_convert, read_tensors, stored_tensors

CPU = torch.device("cpu")
linux = pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs /proc")


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {
        "a.weight": torch.randn(3, 4),
        "a.bias": torch.randn(3, dtype=torch.float64).half(),
        "conv": torch.randn(4, 2, 1, 1),
        "ids": torch.arange(7),
    }


@pytest.fixture
def file(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, tmp_path / "some.safetensors")
    return tmp_path / "some.safetensors"


def read(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    stored = stored_tensors(path)
    return read_tensors(stored, {key: torch.Size(tensor.shape) for key, tensor in stored.items()}, dtype, CPU)


# ---- headers


def test_a_header_tells_shape_dtype_and_size(file: Path) -> None:
    stored = stored_tensors(file)
    assert stored["a.weight"] == Stored(file, "a.weight", (3, 4), "F32")
    assert (stored["a.weight"].size, stored["a.weight"].nbytes) == (12, 48)
    assert (stored["a.bias"].dtype, stored["a.bias"].nbytes) == ("F16", 6)
    assert (stored["ids"].dtype, stored["ids"].nbytes) == ("I64", 56)
    assert set(stored) == {"a.weight", "a.bias", "conv", "ids"}


def test_a_full_size_header_needs_no_weights(tmp_path: Path) -> None:
    """A sparse file of 4 GB: only the header is written."""
    path, size = tmp_path / "sparse.safetensors", 4 * 2**30
    write_header(path, {"x": {"dtype": "F32", "shape": [2**30], "data_offsets": [0, size]}})
    os.truncate(path, path.stat().st_size + size)
    assert stored_tensors(path)["x"].nbytes == size


def write_header(path: Path, header: dict, padding: int = 0) -> None:
    text = json.dumps(header).encode() + b" " * padding
    path.write_bytes(struct.pack("<Q", len(text)) + text)


# ---- bad files


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    for name in ("none.safetensors", "none.ckpt"):
        with pytest.raises(ValueError, match=f"{name} is not there; expected a .safetensors file"):
            stored_tensors(tmp_path / name)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.pth", "model.bin", "MODEL.CKPT", "x.safetensors"])
@pytest.mark.parametrize("old", [False, True], ids=["zip", "old format"])
def test_a_pickle_is_refused_under_any_name(tmp_path: Path, name: str, old: bool) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / name, _use_new_zipfile_serialization=not old)
    with pytest.raises(ValueError, match=r"is a pickle, which can run code .* convert it once"):
        stored_tensors(tmp_path / name)


def test_the_recipe_for_a_pickle_works(tmp_path: Path) -> None:
    state = {"w": torch.randn(4, 2), "transposed": torch.randn(2, 3).T}
    torch.save({"state_dict": {**state, "step": 3}, "epoch": 1}, tmp_path / "old.ckpt")
    for target in (None, "other.safetensors"):
        exec(how_to_convert(tmp_path / "old.ckpt", target).split("in Python: ")[1], {})
        path = tmp_path / (target or "old.safetensors")
        torch.testing.assert_close(load_file(path), state, rtol=0, atol=0)


def test_a_pickle_is_named_by_the_texts_in_it_and_converts(tmp_path: Path) -> None:
    vectors = torch.nn.Parameter(torch.randn(4, 768))  # A1111's format of a textual inversion
    path = tmp_path / "bad-hands.pt"
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "x"}, path)
    with pytest.raises(ValueError, match=r"is a pickle \(by its names: textual inversion embedding\)") as error:
        stored_tensors(path)
    exec(str(error.value).split("in Python: ")[1], {})
    assert torch.equal(load_file(tmp_path / "bad-hands.safetensors")["*"], vectors)
    torch.save({"nothing": {"deeper": vectors}}, path)
    (tmp_path / "bad-hands.safetensors").unlink()
    with pytest.raises(AssertionError, match="no tensors"):
        exec(how_to_convert(path).split("in Python: ")[1], {})
    assert not (tmp_path / "bad-hands.safetensors").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html><body>Sign in", "is a web page"),
        (b'{"error": "Invalid credentials"}', "is JSON text, such as a server's error message"),
        (b"GGUF\x03\x00\x00\x00" + bytes(100), "is a GGUF file, whose quantised weights"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00" + bytes(100), "is a gzip archive"),
        (b"Rar!\x1a\x07\x01\x00" + bytes(100), "is a RAR archive"),
        (b"PAR1" + bytes(100), "is a Parquet table, such as the manifest of minidiff batch"),
        (b"0000001.png".ljust(257, b"\0") + b"ustar" + bytes(250), "is a tar archive, such as a shard of pictures"),
        (b"", r"\(0 bytes\) cannot be read as safetensors"),
        (b"\x08\x00", "cannot be read as safetensors"),
        (struct.pack("<Q", 2**62) + b"{}" * 40, "cannot be read as safetensors"),
        (struct.pack("<Q", 10**8 + 1) + b"{}" * 40, "cannot be read as safetensors"),
        (struct.pack("<Q", 20) + b"{not JSON at all....", "cannot be read as safetensors"),
        (struct.pack("<Q", 2) + b"[]", "cannot be read as safetensors"),
        (bytes(range(256)) * 8, "cannot be read as safetensors"),
        (bytes(1000), "cannot be read as safetensors"),
    ],
    ids=[
        "LFS",
        "HTML",
        "JSON",
        "GGUF",
        "gzip",
        "rar",
        "Parquet",
        "tar",
        "empty",
        "two bytes",
        "huge header",
        "long header",
        "no JSON",
        "a list",
        "noise",
        "zeros",
    ],
)
def test_damage_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.safetensors.*{message}"):
        stored_tensors(path)


@pytest.mark.parametrize("cut", [1, 50, 200])
def test_a_truncated_file(file: Path, cut: int) -> None:
    size = file.stat().st_size
    os.truncate(file, size - cut)
    with pytest.raises(ValueError, match=rf"\({size - cut:,} bytes\) cannot be read .* cut short or damaged"):
        stored_tensors(file)


def test_a_truncated_file_whose_first_byte_is_that_of_a_pickle(tmp_path: Path) -> None:
    path, header = tmp_path / "x.safetensors", {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    write_header(path, header, padding=0x180 - len(json.dumps(header)))
    assert path.read_bytes()[0] == 0x80
    with pytest.raises(ValueError, match="cut short or damaged"):
        stored_tensors(path)


def test_a_longer_file(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(ValueError, match="bytes: 1 too many. It was cut short or damaged"):
        stored_tensors(file)


def test_a_zip_that_holds_no_pickle(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.safetensors", "w") as archive:
        archive.writestr("model.safetensors", "x")
    with pytest.raises(ValueError, match="is a zip archive; unpack it first"):
        stored_tensors(tmp_path / "x.safetensors")


def test_a_header_of_random_changes_raises_nothing_but_value_errors(file: Path) -> None:
    good, rng = file.read_bytes(), random.Random(0)
    (header,) = struct.unpack("<Q", good[:8])
    refused = 0
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(rng.choice([1, 2, 5])):
            bad[rng.randrange(8 + header)] = rng.randrange(256)
        file.write_bytes(bad)
        try:
            read(file, torch.float32)
        except ValueError:
            refused += 1
    assert refused > 200


# ---- reading


def test_conversion_and_shape(file: Path, tensors: dict[str, Tensor]) -> None:
    stored = stored_tensors(file)
    wanted = {"w": stored["a.weight"], "b": stored["a.bias"], "linear": stored["conv"]}
    shapes = {"w": torch.Size([3, 4]), "b": torch.Size([3]), "linear": torch.Size([4, 2])}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = read_tensors(wanted, shapes, dtype, CPU)
        expected = {"w": tensors["a.weight"], "b": tensors["a.bias"], "linear": tensors["conv"].flatten(1)}
        torch.testing.assert_close(found, {k: v.to(dtype) for k, v in expected.items()}, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_floating_dtype_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.randn(8).to(dtype)
    save_file({"x": value}, tmp_path / "x.safetensors")
    assert torch.equal(read(tmp_path / "x.safetensors", torch.float32)["x"], value.float())


@pytest.mark.parametrize("padding", range(8))
def test_a_header_of_any_length(tmp_path: Path, padding: int) -> None:
    """Files of 2022 do not align tensors: offsets of SD 1.5's text encoder are 2 bytes off a multiple of 4."""
    path, weight, x = tmp_path / "x.safetensors", torch.randn(64, 32), torch.randn(5, 32)
    write_header(path, {"w": {"dtype": "F32", "shape": [64, 32], "data_offsets": [0, 8192]}}, padding)
    path.write_bytes(path.read_bytes() + weight.numpy().tobytes())
    found = read(path, torch.float32)["w"]
    assert torch.equal(found, weight)
    torch.testing.assert_close(x @ found.T, x @ weight.T)


@linux
def test_tensors_that_need_no_conversion_are_the_memory_map(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({f"{i}": torch.randn(1000, 10) for i in range(20)}, path)
    found = read(path, torch.float32)
    assert {mapped_file(tensor) for tensor in found.values()} == {str(path)}
    assert count_maps(path) == 1


@linux
def test_conversion_keeps_no_map(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({f"{i}": torch.randn(1000, 10) for i in range(20)}, path)
    found = read(path, torch.bfloat16)
    assert {mapped_file(tensor) for tensor in found.values()} <= {"", "[heap]"}
    assert count_maps(path) == 0


def count_maps(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(f"{path}\n")


def mapped_file(tensor: Tensor) -> str:
    """The file whose memory map holds a tensor, or ""."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *name = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= tensor.data_ptr() < end:
            return "".join(name)
    raise AssertionError("a tensor outside the process's memory")


PEAK = """
import sys, torch
from pathlib import Path
from minidiff.weights.files import read_tensors, stored_tensors

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

def peak(path, dtype):
    stored = stored_tensors(path)
    shapes = {key: torch.Size(tensor.shape) for key, tensor in stored.items()}
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    found = read_tensors(stored, shapes, getattr(torch, dtype), torch.device("cpu"))
    for tensor in found.values():
        tensor.sum()  # touches every page
    return (status("VmHWM") - before) / sum(tensor.nbytes for tensor in found.values())

torch.ones(10).to(torch.bfloat16).float().sum()
for path, dtype in zip(sys.argv[1::2], sys.argv[2::2]):
    print(peak(Path(path), dtype))
"""


@pytest.mark.slow
@linux
def test_peak_memory_stays_near_the_weights(tmp_path: Path) -> None:
    """100 and 200 MB in 25 tensors: at most 1.3 times the size of the result, also while converting."""
    half, single = tmp_path / "half.safetensors", tmp_path / "single.safetensors"
    save_file({f"{i}": torch.ones(2_000_000, dtype=torch.float16) for i in range(25)}, half)
    save_file({f"{i}": torch.ones(2_000_000) for i in range(25)}, single)
    runs = [(single, "float32"), (single, "float16"), (half, "float32"), (half, "float16"), (half, "bfloat16")]
    command = [sys.executable, "-c", PEAK, *(str(part) for run in runs for part in run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for path in (half, single):
        path.unlink()  # pytest keeps temporary folders for a while
    assert done.returncode == 0, done.stderr
    peaks = {f"{path.stem} to {dtype}": float(x) for (path, dtype), x in zip(runs, done.stdout.split(), strict=True)}
    assert all(0.9 < peak < 1.3 for peak in peaks.values()), peaks
