"""describe(): its results for intact, broken and unsupported folders and files, consistent with load()."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from ldm import ldm_tensors, sd15_shapes, write_single_file
from safetensors.torch import load_file, save_file
from torch import Tensor

import minidiff
from minidiff.weights.inspect import Description, Part, describe
from minidiff.weights.load import load
from minidiff.weights.names import LDM_PREFIX
from minidiff.weights.open import FOLDER
from minidiff.weights.recognise import CHECKPOINT
from minidiff.weights.state import Problem

TOKENIZER = Path(__file__).parent / "golden" / "tokenizer"


@pytest.fixture(scope="module")
def tiny_file(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(tiny_folder, tmp_path_factory.mktemp("file") / "tiny.safetensors")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may modify."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    return path


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def part(found: Description, name: str) -> Part:
    return next(part for part in found.parts if part.name == name)


def size(tensors: dict[str, Tensor]) -> int:
    return sum(value.numel() for value in tensors.values())


# ---- what loads


def test_folder(tiny_folder: Path) -> None:
    found = describe(tiny_folder)
    assert (found.name, found.kind, found.loads, found.all_problems()) == ("tiny", FOLDER, True, [])
    assert [p.name for p in found.parts] == ["UNet", "autoencoder", "text encoder"]
    for name, file in (("UNet", "unet/diffusion_pytorch_model"), ("autoencoder", "vae/diffusion_pytorch_model")):
        stored = load_file(tiny_folder / f"{file}.safetensors")
        one = part(found, name)
        assert one.file == f"{file}.safetensors"
        assert (one.content.tensors, one.content.parameters) == (len(stored), size(stored))
        assert (one.content.nbytes, one.content.dtypes) == (4 * size(stored), {"F32": len(stored)})
    assert part(found, "UNet").config["widths"] == (32, 64, 96)
    assert part(found, "UNet").config["context_width"] == 64
    assert part(found, "autoencoder").config["latent_channels"] == 4
    assert part(found, "text encoder").config["layers"] == 3
    assert found.content.tensors == sum(p.content.tensors for p in found.parts)
    assert found.scheduler["sampler"] == "pndm"
    assert found.scheduler["prediction_type"] == "epsilon"
    assert found.tokenizer["length"] == 77
    assert "vocab.json" in found.tokenizer["files"]  # type: ignore[operator]


def test_single_file(tiny_folder: Path, tiny_file: Path) -> None:
    found, whole = describe(tiny_file), describe(tiny_folder)
    assert (found.name, found.kind, found.loads) == ("tiny.safetensors", CHECKPOINT, True)
    assert [p.content.parameters for p in found.parts] == [p.content.parameters for p in whole.parts]
    assert [p.config for p in found.parts][1:] == [p.config for p in whole.parts][1:]
    stored = load_file(tiny_file)
    assert (found.content.tensors, found.content.parameters) == (len(stored), size(stored))
    assert found.content.dtypes == {"F32": len(stored) - 2, "I64": 2}
    assert found.ignored == {"schedule and trainer state": 14, "of CLIP, no weights of its text encoder": 1}
    assert found.foreign == ()


def test_half_precision_averages_and_foreign_keys_are_counted(tiny_folder: Path, tmp_path: Path) -> None:
    more = {f"model_ema.diffusion_model{i}weight": torch.zeros(2) for i in range(7)}
    more |= {"something.else": torch.zeros(3), "another": torch.zeros(1)}
    found = describe(write_single_file(tiny_folder, tmp_path / "x.safetensors", dtype=torch.float16, more=more))
    assert found.loads
    assert part(found, "UNet").content.dtypes == {"F16": part(found, "UNet").content.tensors}
    assert found.ignored["averaged copies (EMA) of the UNet"] == 7
    assert sorted(found.foreign) == ["another", "something.else"]


@pytest.mark.slow
def test_full_size_file_is_described_without_reading_it(tmp_path: Path) -> None:
    """7.7 GB with EMA weights, as a sparse file of which only the header is on disk."""
    shapes = sd15_shapes()
    unet = {key: shape for key, shape in shapes.items() if key.startswith(LDM_PREFIX["unet"])}
    shapes |= {f"model_ema.{key.replace('.', '')}": shape for key, shape in unet.items()}
    header, end = {}, 0
    for key, shape in shapes.items():
        header[key] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [end, end := end + 4 * torch.Size(shape).numel()],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "v1-5-pruned.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    found = describe(path)
    assert found.loads
    assert [p.content.tensors for p in found.parts] == [686, 248, 196]
    assert [p.content.parameters for p in found.parts] == [859_520_964, 83_653_863, 123_060_480]
    assert found.content.nbytes == end > 7e9
    assert found.ignored["averaged copies (EMA) of the UNet"] == 686


def test_inpainting_models(folder: Path, tmp_path: Path) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    edit(path, lambda tensors: tensors.update({"conv_in.weight": torch.zeros(32, 9, 3, 3)}))
    edit_json(folder / "unet/config.json", in_channels=9)
    whole, single = describe(folder), describe(write_single_file(folder, tmp_path / "x.safetensors"))
    assert (whole.kind, whole.loads) == ("Stable Diffusion 1.x inpainting folder", True)
    assert (single.kind, single.loads) == ("Stable Diffusion 1.x inpainting checkpoint", True)
    assert part(whole, "UNet").config["in_channels"] == part(single, "UNet").config["in_channels"] == 9
    without = describe(write_single_file(folder, tmp_path / "y.safetensors", vae=False))
    assert without.kind == "Stable Diffusion 1.x inpainting checkpoint without an autoencoder"
    assert without.all_problems() == ["it holds no autoencoder; pass one with vae="]


def test_variant_and_scheduler(folder: Path) -> None:
    for base in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        (folder / f"{base}.safetensors").rename(folder / f"{base}.fp16.safetensors")
    edit_json(
        folder / "scheduler" / "scheduler_config.json",
        _class_name="IPNDMScheduler",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    found = describe(folder, variant="fp16")
    assert found.loads
    assert part(found, "UNet").file == "unet/diffusion_pytorch_model.fp16.safetensors"
    assert "names 'IPNDMScheduler', which is not implemented" in str(found.scheduler["sampler"])
    assert (found.scheduler["prediction_type"], found.scheduler["spacing"]) == ("v_prediction", "trailing")
    plain = describe(folder)
    assert not plain.loads
    assert len(plain.all_problems()) == 3
    assert all('variant="fp16"' in problem for problem in plain.all_problems())


def test_networks_in_files_of_their_own(tiny_folder: Path, tmp_path: Path) -> None:
    found = describe(tiny_folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert not found.loads
    assert [p.name for p in found.parts] == ["UNet"]
    assert found.all_problems() == ["it is a UNet alone; load the model folder that it belongs to"]
    vae = {
        key.removeprefix(LDM_PREFIX["vae"]): value
        for key, value in ldm_tensors(tiny_folder).items()
        if key.startswith(LDM_PREFIX["vae"])
    }
    save_file({"loss.logvar": torch.zeros(1), **vae}, tmp_path / "vae.safetensors")
    for path in (tiny_folder / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "vae.safetensors"):
        found = describe(path)
        assert found.parts[0].content.parameters == describe(tiny_folder).parts[1].content.parameters
        assert found.parts[0].problems == ()
        assert "vae=" in found.all_problems()[0]
    found = describe(tiny_folder / "text_encoder" / "model.safetensors")
    assert found.parts[0].config["width"] == 64
    assert found.parts[0].problems == ()
    broken = edit(tmp_path / "vae.safetensors", lambda tensors: tensors.pop("decoder.conv_in.weight"))
    assert describe(broken).parts[0].problems == (Problem("missing keys", ("decoder.conv_in.weight",)),)


# ---- what does not load


def zeros(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {key.replace("__", "."): torch.zeros(shape) for key, shape in shapes.items()}


UNET = "model__diffusion_model__input_blocks__"
OTHERS = {
    "Stable Diffusion XL": zeros(conditioner__embedders__0__weight=(2,), model__diffusion_model__x=(3,)),
    "Stable Diffusion 2": zeros(cond_stage_model__model__ln_final__weight=(4,)),
    "InstructPix2Pix": zeros(**{f"{UNET}0__0__weight": (32, 8, 3, 3)}),
    "LoRA": zeros(
        lora_unet_mid_block_attentions_0_proj_in__lora_up__weight=(1280, 2),
        lora_unet_mid_block_attentions_0_proj_in__lora_down__weight=(2, 1280),
    ),
    "ControlNet": zeros(control_model__x=(1,)),
    "textual inversion": zeros(emb_params=(2, 768)),
    "without a text encoder": zeros(**{f"{UNET}0__0__weight": (32, 4, 3, 3)}, first_stage_model__x=(5,)),
    "unknown": zeros(first=(2,), second=(2,)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_are_named_and_counted(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(OTHERS[kind], path)
    found = describe(path)
    assert kind in found.kind
    assert not found.loads
    assert found.content.tensors == len(OTHERS[kind]) == sum(p.content.tensors for p in found.parts)
    with pytest.raises(ValueError) as error:
        load(path, tokenizer=TOKENIZER)
    assert (found.use or found.all_problems()[0]) in str(error.value)


def test_checkpoint_without_autoencoder_still_shows_the_rest(tiny_folder: Path, tmp_path: Path) -> None:
    path = write_single_file(tiny_folder, tmp_path / "x.safetensors", vae=False)
    edit(path, lambda tensors: tensors.pop("model.diffusion_model.out.2.bias"))
    found = describe(path)
    assert [p.name for p in found.parts] == ["UNet", "text encoder"]
    assert found.all_problems() == [
        "it holds no autoencoder; pass one with vae=",
        "UNet: 1 missing keys: conv_out.bias",
    ]


def break_file(tensors: dict[str, Tensor]) -> None:
    unet, text = LDM_PREFIX["unet"], f"{LDM_PREFIX['text_encoder']}text_model."
    for n in range(3):
        del tensors[f"{unet}input_blocks.{n + 1}.0.in_layers.0.weight".replace("3.0.in_layers.0", "3.0.op")]
    tensors[f"{unet}time_embed.0.bias"] = torch.zeros(5)
    tensors[f"{text}final_layer_norm.bias"] = torch.zeros(64, dtype=torch.int8)
    tensors[f"{text}extra.weight"] = torch.zeros(1)


def test_every_wrong_key_is_listed_by_group(tiny_file: Path, tmp_path: Path) -> None:
    path = edit(Path(shutil.copy(tiny_file, tmp_path)), break_file)
    found = describe(path)
    assert not found.loads
    unet, text = part(found, "UNet").problems, part(found, "text encoder").problems
    assert [problem.what for problem in unet] == ["missing keys", "keys of another shape or dtype"]
    assert unet[0].items == tuple(
        f"down_blocks.0.{m}.weight" for m in ("resnets.0.norm1", "resnets.1.norm1", "downsamplers.0.conv")
    )
    assert unet[1].items == ("time_embedding.linear_1.bias has shape [5], expected [128]",)
    assert text[0] == Problem("unexpected keys", ("text_model.extra.weight",))
    assert "expected floating-point" in text[1].items[0]
    with pytest.raises(ValueError) as error:
        load(path, tokenizer=TOKENIZER)
    for problem in (*unet, *text):
        assert all(item in str(error.value) for item in problem.items)
    plain = json.loads(json.dumps(asdict(found)))
    assert plain["parts"][0]["problems"][0]["items"] == list(unet[0].items)


def test_problem_in_words() -> None:
    assert str(Problem("no such thing")) == "no such thing"
    assert str(Problem("missing keys", tuple("abcdefg"))) == "7 missing keys: a, b, c, d, e and 2 more"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


UNET_FILE, VAE_FILE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
BREAK: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no vae": (lambda f: shutil.rmtree(f / "vae"), "autoencoder", "without an autoencoder"),
    "no text encoder": (lambda f: shutil.rmtree(f / "text_encoder"), "text encoder", "config.json is not there"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "", "no tokenizer in"),
    "broken tokenizer": (lambda f: (f / "tokenizer" / "vocab.json").write_text("{"), "", "cannot be read"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "", "scheduler_config.json is not there"),
    "scheduler": (
        lambda f: edit_json(f / "scheduler" / "scheduler_config.json", prediction_type="sample"),
        "",
        "prediction_type is 'sample'",
    ),
    "config": (lambda f: edit_json(f / "unet" / "config.json", act_fn="gelu"), "UNet", "act_fn is 'gelu'"),
    "no json": (lambda f: (f / "vae" / "config.json").write_text("<"), "autoencoder", "cannot be read as JSON"),
    "cut short": (lambda f: cut(f / UNET_FILE), "UNet", "cut short or damaged"),
    "only a pickle": (
        lambda f: (f / UNET_FILE).rename((f / UNET_FILE).with_suffix(".bin")),
        "UNet",
        "a pickle, which can run code when it is read. If you trust its origin, convert it",
    ),
    "missing key": (lambda f: edit(f / VAE_FILE, lambda t: t.pop("quant_conv.bias")), "autoencoder", "quant_conv.bias"),
    "wrong shape": (
        lambda f: edit(f / UNET_FILE, lambda t: t.update({"conv_in.bias": torch.zeros(7)})),
        "UNet",
        "conv_in.bias has shape [7], expected [32]",
    ),
    "vocabulary": (
        lambda f: (
            edit_json(f / "text_encoder" / "config.json", vocab_size=100),
            edit(
                f / "text_encoder" / "model.safetensors",
                lambda t: t.update({"text_model.embeddings.token_embedding.weight": torch.zeros(100, 64)}),
            ),
        ),
        "",
        "the text encoder knows 100",
    ),
    "SDXL": (lambda f: edit_json(f / "unet" / "config.json", cross_attention_dim=2048), "", "Stable Diffusion XL"),
}


@pytest.mark.parametrize("name", BREAK)
def test_broken_folder_is_described_with_the_problem_that_load_has(name: str, folder: Path) -> None:
    change, where, text = BREAK[name]
    change(folder)
    found = describe(folder)
    assert not found.loads
    assert text in found.all_problems()[0]
    assert [p.name for p in found.parts if p.problems] == ([where] if where else [] if name != "SDXL" else ["UNet"])
    assert (found.kind != FOLDER) == (name == "SDXL")
    with pytest.raises(ValueError) as error:
        load(folder, dtype="float32", device="cpu")
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("file", "changes", "loads"),
    [
        ("unet/config.json", {"dropout": 0.1, "upcast_attention": True, "decay": 0.9999}, True),
        ("unet/config.json", {"only_cross_attention": [False] * 4, "own_note": "mine"}, True),
        ("unet/config.json", {"mid_block_type": None}, False),  # the file has one
        ("unet/config.json", {"norm_eps": float("nan")}, False),
        ("unet/config.json", {"layers_per_block": 10**8}, False),
        ("vae/config.json", {"scaling_factor": 0}, False),
        ("text_encoder/config.json", {"layer_norm_eps": -1}, False),
        ("text_encoder/config.json", {"num_hidden_layers": 10**8}, False),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, True),
        ("scheduler/scheduler_config.json", {"prediction_type": "other"}, False),
    ],
)
def test_info_says_what_load_does(file: str, changes: dict[str, object], loads: bool, folder: Path) -> None:
    edit_json(folder / file, **changes)
    try:
        found = describe(folder).loads
    except ValueError:
        found = False
    try:
        minidiff.load(folder, dtype="float32", device="cpu")
        loaded = True
    except ValueError:
        loaded = False
    assert (found, loaded) == (loads, loads)


def test_parts_that_do_not_fit(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", cross_attention_dim=48)

    def narrow(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if ".attn2.to_k." in key or ".attn2.to_v." in key]:
            tensors[key] = tensors[key][:, :48].contiguous()

    edit(folder / UNET_FILE, narrow)
    (problem,) = describe(folder).all_problems()
    with pytest.raises(ValueError) as error:
        load(folder)
    assert problem == str(error.value)
    assert "the UNet reads text embeddings 48 wide, the text encoder gives 64" in problem


@pytest.mark.parametrize(("key", "loads"), [("mid_block.resnets.0.norm1.bias", False), ("conv_in.weight", True)])
def test_weights_that_are_not_finite(key: str, loads: bool, folder: Path) -> None:
    """Vectors are always checked, other tensors on request."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[key].view(-1)[0] = torch.nan

    edit(folder / UNET_FILE, spoil)
    found = describe(folder)
    assert (found.loads, found.finite) == (loads, None)
    assert describe(folder, check=True).finite is False
    assert describe(folder, check=True).all_problems() == [f"1 tensors hold NaN or infinity: {key}"]
    if loads:
        load(folder, dtype="float32", device="cpu")
    else:
        with pytest.raises(ValueError, match=f"weights are not finite .*: {key}; .*--check"):
            load(folder, dtype="float32", device="cpu")


# ---- what cannot be described


def corrupt(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 20) + b"{not json at all    }" + bytes(40))


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("cut.safetensors", cut, "cut short or damaged"),
        ("header.safetensors", corrupt, "cut short or damaged"),
        ("empty.safetensors", lambda p: p.write_bytes(b""), "cut short or damaged"),
        ("old.ckpt", lambda p: None, "If you trust its origin, convert it once"),
        ("web.safetensors", lambda p: p.write_text("<!DOCTYPE html><html>"), "is a web page"),
        ("gone.safetensors", lambda p: p.unlink(), "is not there"),
    ],
)
def test_unreadable_files(
    name: str, change: Callable[[Path], object], text: str, tiny_file: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(tiny_file, tmp_path / name))
    change(path)
    with pytest.raises(ValueError, match=text) as error:
        describe(path)
    with pytest.raises(ValueError) as other:
        load(path, tokenizer=TOKENIZER)
    assert str(error.value) == str(other.value)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    path = tmp_path / "evil.safetensors"  # under the wrong name, too
    torch.save({"x": Evil(str(ran))}, path)
    with pytest.raises(ValueError, match="pickle"):
        describe(path)
    assert not ran.exists()


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path(self.path).touch, ()


def test_sources_that_are_not_there(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="is not there; expected a model folder"):
        describe(tmp_path / "nothing")
    with pytest.raises(ValueError, match="has no unet/"):
        describe(tmp_path)
    with pytest.raises(ValueError, match="is not in the hub's cache and the hub cannot be reached"):
        describe("nobody/nothing")
    with pytest.raises(ValueError, match="only the hub keeps revisions"):
        describe(tiny_folder, revision="main")


def test_hub_id_is_described_as_the_folder_that_it_becomes(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(repo: str, revision: str | None, variant: str | None, **_: bool) -> Path:
        asked.append((repo, revision, variant))
        return tiny_folder

    monkeypatch.setattr("minidiff.weights.open.fetch_model", fetch)
    found = describe("owner/name", revision="v1")
    assert (found.name, found.loads, asked) == ("owner/name", True, [("owner/name", "v1", None)])
