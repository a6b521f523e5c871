"""PNG metadata: writing and reading, other programs' files, damaged files; and arguments as plain values."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import math
import struct
import tempfile
import zlib
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import minidiff
from minidiff.png.chunk import Plain, plain, reproducible
from minidiff.png.infotext import NEGATIVE, parse_infotext
from minidiff.png.read import read_metadata, read_parameters
from minidiff.result import Result

ARGUMENTS: dict[str, Plain] = {
    "prompt": "a red circle",
    "negative_prompt": "blurry, 日本語",
    "model": "shapes",
    "width": 16,
    "height": 8,
    "steps": 20,
    "guidance_scale": 7.5,
    "guidance_rescale": 0.0,
    "clip_skip": None,
    "eta": 0.0,
    "seed": 42,
    "sampler": "dpmpp_2m",
    "schedule": "karras",
    "timesteps": None,
    "dtype": "float32",
}
INFO: dict[str, Plain] = {"versions": {"minidiff": "0.1.0", "torch": "2.13.0"}, "model_hash": "6ce0161689"}
TENSOR = torch.arange(12, dtype=torch.float32).reshape(3, 4)


def result(count: int = 1, **changes: Plain) -> Result:
    parameters: tuple[dict[str, Plain], ...] = tuple({**ARGUMENTS, "seed": 42 + i, **changes} for i in range(count))
    images, seeds = torch.zeros(count, 3, 8, 16), tuple(range(42, 42 + count))
    return Result(images, torch.zeros(count, 4, 1, 2), seeds, parameters, {}, INFO)


@pytest.mark.parametrize("bad", [object(), "\ud800", {1: 2, "a": 3}, b"bytes"])
def test_metadata_that_cannot_be_written_costs_only_itself(bad: object, tmp_path: Path) -> None:
    made = result(sampler=bad)  # type: ignore[arg-type]
    if isinstance(bad, dict):
        bad["self"] = bad  # without end
    with pytest.warns(UserWarning, match="saved without metadata, its parameters cannot be written") as caught:
        (path,) = made.save(tmp_path / "image.png")
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match="no text chunk"):
        read_parameters(path)


# ---- metadata: ours


def text_chunks(path: Path) -> dict[str, tuple[str, bytes]]:
    """keyword -> (chunk type, the rest), read without Pillow, checking each checksum."""
    data, found, at = path.read_bytes(), {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        if kind in (b"tEXt", b"iTXt", b"zTXt"):
            key, _, rest = body.partition(b"\0")
            found[key.decode()] = (kind.decode(), rest)
        at += 12 + length
    return found


def test_a_png_holds_a1111s_text_and_our_json(tmp_path: Path) -> None:
    (path,) = result(negative_prompt="café").save(tmp_path / "latin.png")
    kind, body = text_chunks(path)["parameters"]
    assert kind == "tEXt"
    assert body.decode("latin-1") == (
        "a red circle\nNegative prompt: café\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 42, "
        "Size: 16x8, Model hash: 6ce0161689, Model: shapes, RNG: CPU, Version: minidiff 0.1.0"
    )
    kind, body = text_chunks(path)["minidiff"]
    assert kind == "iTXt" and body.startswith(b"\0\0\0\0") and "café".encode() in body
    chunk = json.loads(body[4:].decode("utf-8"))
    assert chunk == {
        "format": 1,
        "arguments": {**ARGUMENTS, "negative_prompt": "café"},
        "info": INFO,
        "reproducible": True,
    }
    (path,) = result().save(tmp_path / "wide.png")
    assert text_chunks(path)["parameters"][0] == "iTXt"


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    for index, path in enumerate(result(3).save(tmp_path / "out")):
        back = read_metadata(path)
        assert back.arguments == read_parameters(str(path)) == {**ARGUMENTS, "seed": 42 + index}
        assert (back.info, back.reproducible, back.source) == (INFO, True, "minidiff")


def test_metadata_can_be_switched_off(tmp_path: Path) -> None:
    (path,) = result().save(tmp_path / "image.png", metadata=False)
    assert text_chunks(path) == {}
    with pytest.raises(ValueError, match=r"image.png has no parameters .*no text chunk; it was saved without metadata"):
        read_parameters(path)


def test_floats_that_json_lacks_survive(tmp_path: Path) -> None:
    (path,) = result(sigmas=[math.inf, 1.0, -math.inf, math.nan]).save(tmp_path / "image.png")
    assert b"NaN" not in path.read_bytes() and b"Infinity" not in path.read_bytes()
    sigmas = read_parameters(path)["sigmas"]
    assert isinstance(sigmas, list) and sigmas[:3] == [math.inf, 1.0, -math.inf]
    assert isinstance(sigmas[3], float) and math.isnan(sigmas[3])


def test_marked_arguments_are_told(tmp_path: Path) -> None:
    (path,) = result(latents=plain(TENSOR)).save(tmp_path / "image.png")
    back = read_metadata(path)
    assert not back.reproducible and back.arguments["latents"] == plain(TENSOR)
    assert json.loads(text_chunks(path)["minidiff"][1][4:])["reproducible"] is False


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(), negative=st.text(), arguments=st.dictionaries(st.text(max_size=8), json_values, max_size=4))
def test_any_arguments_come_back_exactly(prompt: str, negative: str, arguments: dict[str, Plain]) -> None:
    arguments = {**arguments, "prompt": prompt, "negative_prompt": f"{negative}\nNegative prompt: x\nSteps: 3"}
    made = Result(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 1, 1), (1,), (arguments,), {})
    with tempfile.TemporaryDirectory() as folder:
        (path,) = made.save(folder)
        back = read_parameters(path)
    assert back == arguments and json.dumps(back) == json.dumps(arguments)  # True is not 1, 1 is not 1.0


# ---- metadata: other programs', and damage


def png_with(path: Path, **chunks: str) -> Path:
    info = PngInfo()
    for key, text in chunks.items():
        info.add_text(key, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_an_a1111_file_is_read_into_our_names(tmp_path: Path) -> None:
    text = (
        "a cat, 日本語\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x768, "
        "Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Clip skip: 2, ENSD: 31337, Version: v1.10.1"
    )
    path = png_with(tmp_path / "a1111.png", parameters=text, prompt="{}")
    back = read_metadata(path)
    assert (
        back.arguments
        == read_parameters(path)
        == {
            "prompt": "a cat, 日本語",
            "negative_prompt": "dog",
            "steps": 20,
            "sampler": "euler_ancestral",
            "schedule": "uniform",
            "guidance_scale": 7.0,
            "seed": 1,
            "width": 512,
            "height": 768,
            "clip_skip": 1,
            "model": "v1-5-pruned-emaonly",
            "syntax": "a1111",
        }
    )
    assert back.info == {"model_hash": "6ce0161689", "version": "v1.10.1", "other": {"ENSD": "31337"}}
    assert (back.source, back.reproducible) == ("a1111", False)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ({"parameters": "only words"}, "metadata cannot be read: it has no line such as 'Steps: 20"),
        ({"parameters": "x\nSteps: many"}, "'Steps' is 'many'; expected a whole number"),
        ({"prompt": '{"3": {}}', "workflow": '{"nodes": []}'}, "written by ComfyUI, .* open it there"),
        ({"prompt": '{"3": {}}'}, "written by ComfyUI"),
        ({f"key {n:03}": "x" for n in range(300)}, "it has text chunks key 000, .*key 007, which are not ours"),
        ({"Software": "gimp", "Comment": "x"}, "it has text chunks Comment, Software, which are not ours"),
        ({"minidiff": "{"}, "metadata cannot be read"),
        ({"minidiff": "[1]"}, "should be an object with 'format' 1"),
        ({"minidiff": '{"format": 2, "arguments": {}, "info": {}}'}, "'format' 1 .*a newer minidiff may read it"),
        ({"minidiff": '{"format": 1, "arguments": [], "info": {}}'}, "objects 'arguments' and 'info'"),
        ({"minidiff": '{"format": 1, "arguments": {"a": NaN}, "info": {}}'}, "NaN is not JSON"),
        ({"minidiff": "[" * 100_000}, "metadata cannot be read: the chunk is nested too deep"),
        ({"minidiff": '{"format": 1, "info": {"a": ' + "[" * 300 + "]" * 300 + "}}"}, "the chunk is nested too deep"),
        ({"minidiff": '{"a": [' + "1," * 600_000 + "1]}"}, "has 1,200,0.. characters; expected at most"),
        ({"minidiff": '{"format": 1, "arguments": {"eta": 1e999}, "info": {}}'}, "1e999 is too large"),
    ],
)
def test_metadata_that_cannot_be_read(chunks: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_parameters(png_with(tmp_path / "image.png", **chunks))
    assert "image.png" in str(caught.value)


def test_files_that_are_no_png(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file: .*none.png"):
        read_parameters(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("words")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("text.png", "empty.png"):
        with pytest.raises(ValueError, match=f"{name} is no PNG, JPEG or WebP file"):
            read_parameters(tmp_path / name)
    with pytest.raises(ValueError, match=r"cannot read .* as a picture: .*directory"):
        read_parameters(tmp_path)


def test_a_text_bomb_is_refused(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("parameters", "x" * 50_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "bomb.png", pnginfo=info)
    with pytest.raises(ValueError, match=r"cannot read .*bomb.png as a picture: Decompressed data too large"):
        read_parameters(tmp_path / "bomb.png")


def test_files_that_pillow_refuses_in_its_own_ways(tmp_path: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    data = result().save(tmp_path / "good.png", metadata=False)[0].read_bytes()
    huge = data[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)) + data[33:]
    odd = data[:-12] + chunk(b"zTXt", b"key\0\5text") + data[-12:]
    for name, content, message in [("huge", huge, "decompression bomb"), ("odd", odd, "Unknown compression method 5")]:
        (tmp_path / f"{name}.png").write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read .*{name}.png as a picture: .*{message}"):
            read_parameters(tmp_path / f"{name}.png")


def test_truncated_and_damaged_files_raise_only_value_errors(tmp_path: Path) -> None:
    (path,) = result().save(tmp_path / "whole.png")
    data, broken = path.read_bytes(), tmp_path / "broken.png"
    end = data.index(b"IDAT") + 10  # inside the pixel data: the text before it is intact, but the file is refused
    for length in [*range(0, end, 7), end]:
        broken.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"broken.png"):
            read_parameters(broken)
    for index in range(0, len(data), 3):
        broken.write_bytes(data[:index] + bytes([data[index] ^ 0xFF]) + data[index + 1 :])
        try:
            read_parameters(broken)
        except ValueError:
            continue


# ---- other programs'


def fooocus(**values: object) -> str:
    return json.dumps({"prompt": "a cat", "steps": 30, **values})


@pytest.mark.parametrize(
    ("chunks", "program"),
    [
        ({"parameters": fooocus(full_negative_prompt=["(bad:1.4), (dull:1.3), (big:1.1)"])}, "Fooocus"),
        ({"parameters": json.dumps({"Prompt": "a cat", "Performance": "Speed"})}, "Fooocus"),
        ({"parameters": json.dumps({"sui_image_params": {"prompt": "a cat"}}, indent=2)}, "SwarmUI"),
        ({"parameters": '{"any": "thing", "b: 1, c: 2": 3}'}, "a program that minidiff does not know"),
        ({"parameters": "[1]"}, "a program that minidiff does not know"),
        ({"invokeai_metadata": "{}"}, "InvokeAI"),
        ({"Dream": '"a cat" -s 20', "sd-metadata": "{}"}, "InvokeAI"),
        ({"Dream": '"a cat" -s 20'}, "InvokeAI"),
        ({"Software": "NovelAI", "Description": "a cat", "Comment": "{}"}, "NovelAI"),
        ({"prompt": "a cat", "use_stable_diffusion_model": "x"}, "Easy Diffusion"),
    ],
    ids=repr,
)
def test_other_programs_are_named(chunks: dict[str, str], program: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"image.png was written by {program}, in a format that minidiff does not"):
        read_metadata(png_with(tmp_path / "image.png", **chunks))


A1111 = "a cat, 日本\nNegative prompt: bad\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x64"


def comment(data: bytes) -> bytes:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = data
    return exif.tobytes()


@pytest.mark.parametrize("ending", ["jpg", "webp", "png"])
@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-16-le", "utf-8"])
def test_a1111s_text_is_read_from_exif(ending: str, encoding: str, tmp_path: Path) -> None:
    kind = b"ASCII\0\0\0" if encoding == "utf-8" else b"UNICODE\0"
    Image.new("RGB", (8, 8)).save(tmp_path / f"x.{ending}", exif=comment(kind + A1111.encode(encoding)))
    arguments = read_parameters(tmp_path / f"x.{ending}")
    assert (arguments["prompt"], arguments["negative_prompt"], arguments["seed"]) == ("a cat, 日本", "bad", 5)


def test_pictures_without_parameters_in_exif(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg", exif=comment(b"ASCII\0\0\0Screenshot"))
    with pytest.raises(ValueError, match="x.jpg has no parameters .* it has no text"):
        read_metadata(tmp_path / "x.jpg")
    exif = Image.Exif()
    exif[0x010F], exif[0x0110] = 'prompt:{"3": {}}', 'workflow:{"nodes": []}'
    Image.new("RGB", (8, 8)).save(tmp_path / "x.webp", exif=exif)
    with pytest.raises(ValueError, match="written by ComfyUI"):
        read_metadata(tmp_path / "x.webp")


@pytest.mark.parametrize("mark", ["stealth_pnginfo", "stealth_pngcomp", "stealth_rgbinfo", "stealth_rgbcomp"])
def test_text_hidden_in_pixels_is_read(mark: str, tmp_path: Path) -> None:
    """Written bit by bit and pixel by pixel, like the other programs."""

    def hide(text: str) -> Path:
        data = gzip.compress(text.encode()) if mark.endswith("comp") else text.encode()
        bits = "".join(f"{byte:08b}" for byte in mark.encode()) + f"{len(data) * 8:032b}"
        left = list(bits + "".join(f"{byte:08b}" for byte in data))
        image = Image.new(
            "RGBA" if "png" in mark else "RGB", (61, 43), (100, 100, 100, 254)[: 4 if "png" in mark else 3]
        )
        for x, y in itertools.product(range(61), range(43)):
            pixel = list(image.getpixel((x, y)))  # type: ignore[arg-type]
            for channel in [3] if "png" in mark else [0, 1, 2]:
                if left:
                    pixel[channel] = pixel[channel] & 254 | int(left.pop(0))
            image.putpixel((x, y), tuple(pixel))
        image.save(tmp_path / "hidden.png")
        return tmp_path / "hidden.png"

    assert read_parameters(hide(A1111))["prompt"] == "a cat, 日本"
    with pytest.raises(ValueError, match="written by NovelAI"):
        read_parameters(hide(json.dumps({"Software": "NovelAI", "Comment": "{}"})))


def test_large_and_moving_pictures_are_refused_unread(tmp_path: Path) -> None:
    Image.new("1", (8200, 8200)).save(tmp_path / "large.png")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    for name, message in (("large", "1 frames of 8200x8200; expected one image"), ("moving", "2 frames of 8x8")):
        with pytest.raises(ValueError, match=message):
            read_metadata(tmp_path / f"{name}.png")


# ---- arbitrary file content


def read(data: bytes) -> None:
    """Metadata or a one-line ValueError, and never an empty prompt instead of the real one."""
    try:
        found = read_metadata(io.BytesIO(data))  # type: ignore[arg-type]
    except ValueError as error:
        assert len(str(error)) < 1000
    else:
        assert isinstance(found.arguments, dict) and isinstance(found.info, dict)


FUZZ = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
WORDS = ["Steps: 20", "Negative prompt:", "\n", "\r\n", ", Seed: 1", "Size: 8", "{", '"', "[", ":", "Sampler: x", "1e9"]
pieces = st.lists(st.sampled_from(WORDS) | st.text(max_size=4), max_size=12).map("".join)


@FUZZ
@given(text=pieces, keyword=st.sampled_from(["parameters", "minidiff", "prompt", "Comment"]))
def test_any_text_is_read_or_refused(text: str, keyword: str) -> None:
    info = PngInfo()
    info.add_itxt(keyword, text)
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG", pnginfo=info)
    read(buffer.getvalue())
    try:
        arguments, _ = parse_infotext(text)
    except ValueError:
        return
    before = text.replace("\r\n", "\n").rpartition("Steps:")[0].strip()
    assert arguments["prompt"] or arguments["negative_prompt"] or before in ("", NEGATIVE) or "\n" in before


@FUZZ
@given(data=st.binary(max_size=64), at=st.integers(0, 300), kind=st.sampled_from(["PNG", "JPEG", "WEBP", "none"]))
def test_any_bytes_are_read_or_refused(data: bytes, at: int, kind: str) -> None:
    read(data if kind == "none" else FILES[kind][:at] + data + FILES[kind][at + len(data) :])


def _file(kind: str) -> bytes:
    buffer, info = io.BytesIO(), PngInfo()
    info.add_text("parameters", A1111)
    Image.new("RGB", (8, 8)).save(buffer, kind, exif=comment(b"UNICODE\0" + A1111.encode("utf-16-be")), pnginfo=info)
    return buffer.getvalue()


FILES = {kind: _file(kind) for kind in ("PNG", "JPEG", "WEBP")}


# ---- plain values


class Colour(Enum):
    RED = 1


@dataclass(frozen=True)
class Box:
    left: float
    mask: Tensor


class Opaque:
    pass


def test_plain_values_stay() -> None:
    value = {"a": [1, 2.5, True, None, "text/with/slash"], "b": {"c": "/no/such/path"}}
    assert plain(value) == value
    assert plain((1, (2,))) == [1, [2]]
    assert plain(set("fbdaec")) == plain(frozenset("abcdef")) == list("abcdef")
    assert plain({1: "a", Path("/x/y"): "b"}) == {"1": "a", "y": "b"}
    scalars = plain([np.float64(0.5), np.int64(3), np.bool_(True), np.str_("s"), torch.tensor(7.5), np.array(2)])
    assert scalars == [0.5, 3, True, "s", 7.5, 2]
    assert isinstance(scalars, list) and [type(item) for item in scalars] == [float, int, bool, str, float, int]
    assert plain([torch.float16, torch.device("cpu")]) == ["float16", "cpu"]


def test_no_absolute_path_gets_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "model.safetensors").write_bytes(b"")
    values = [
        secret / "model.safetensors",
        str(secret / "model.safetensors"),
        {"x": [str(secret)]},
        {str(secret): 1},
        secret / "none",
    ]
    assert plain(values) == ["model.safetensors", "model.safetensors", {"x": ["secret"]}, {"secret": 1}, "none"]
    assert plain("secret/model.safetensors") == "secret/model.safetensors"  # relative: not a secret
    assert plain(["/", "p" * 5000, "/nul\0"]) == ["/", "p" * 5000, "/nul\0"]


def test_tensors_arrays_and_images_are_fingerprints() -> None:
    mark = plain(TENSOR)
    assert mark == {"tensor": {"shape": [3, 4], "dtype": "float32", "sha256": mark["tensor"]["sha256"]}}  # type: ignore
    assert mark == plain(TENSOR.numpy()) == plain(TENSOR.t().contiguous().t()) == plain(TENSOR.clone().requires_grad_())
    assert plain(TENSOR.flatten()[::2]) == plain(TENSOR.flatten()[::2].numpy())
    changed = TENSOR.clone()
    changed[2, 3] += 1e-6 * 11
    others = [
        changed,
        TENSOR.reshape(4, 3),
        TENSOR.double(),
        TENSOR.bfloat16(),
        torch.zeros(0, 4),
        TENSOR.t(),
        TENSOR > 3,
    ]
    marks = [json.dumps(plain(value)) for value in [TENSOR, *others]]
    assert len(set(marks)) == len(marks)
    pixels = np.zeros((2, 3, 3), np.uint8)
    assert plain(Image.fromarray(pixels)) == plain(pixels)


def test_objects_go_by_their_names() -> None:
    here = __name__
    assert plain(test_plain_values_stay) == {"object": f"{here}.test_plain_values_stay"}
    assert plain(Opaque()) == plain(Opaque) == {"object": f"{here}.Opaque"}
    assert plain(Colour.RED) == {"object": f"{here}.Colour.RED"}
    assert plain(Box(0.5, TENSOR)) == {"object": f"{here}.Box", "fields": {"left": 0.5, "mask": plain(TENSOR)}}
    assert plain(partial(print)) == {"object": "functools.partial"}
    assert plain(torch.nn.functional.relu) == {"object": "torch.nn.functional.relu"}
    assert "0x" not in json.dumps(plain([Opaque(), torch.Generator(), lambda: 0, b"x", 1j]))


@pytest.mark.parametrize("value", [TENSOR, TENSOR.numpy(), print, Opaque(), Box(1, TENSOR), [1, {"a": [TENSOR]}]])
def test_what_the_file_does_not_hold_is_not_reproducible(value: object) -> None:
    assert not reproducible({**ARGUMENTS, "extra": plain(value)})


def test_plain_arguments_are_reproducible() -> None:
    assert reproducible(ARGUMENTS)
    assert reproducible({"objects": {"object": {"box": [0, 0, 1, 1]}, "tensor": "a phrase"}})


def test_what_was_stopped_or_made_with_other_weights_is_not_reproducible(
    tiny_model: minidiff.Model, tmp_path: Path
) -> None:
    shared = {"steps": 3, "seed": 1, "sampler": "euler"}
    bias = tiny_model.unet.conv_out.bias
    other = replace(tiny_model, unet=minidiff.with_weights(tiny_model.unet, {"conv_out.bias": bias + 0.5}))
    run = minidiff.sample_steps("a cat", model=tiny_model, **shared)
    next(run)
    results = (
        (minidiff.generate("a cat", model=tiny_model, **shared), True),
        (minidiff.generate("a cat", model=other, **shared), False),
        (run.result(), False),
    )
    for result, expected in results:
        (path,) = result.save(tmp_path / "x.png")
        assert minidiff.read_metadata(path).reproducible is expected
