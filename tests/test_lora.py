"""weights/lora.py: every format against the libraries that made it, and what is refused."""

import copy
import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import minidiff
from bench.adapters import BOUND, CASES, SMALL, errors, merged_pair, tensors_of
from bench.models import write_folder
from bench.reference import diffusers, relative_error
from minidiff import LoRA, with_loras
from minidiff.cli.main import main
from minidiff.networks.config import UNetConfig
from minidiff.networks.unet import UNet
from minidiff.speed.accelerate import is_compiled
from minidiff.speed.packed import pack
from minidiff.speed.replace import changed_weights
from minidiff.weights.inspect import describe
from minidiff.weights.lora_names import Place, layer_names, split

Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
Q_WEIGHT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("lora") / "small", SMALL)


@pytest.fixture(scope="module")
def model(folder: Path) -> minidiff.Model:
    return minidiff.load(folder, dtype="float32", device="cpu")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "style.safetensors"


@pytest.fixture(scope="module")
def lora(model: minidiff.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kohya's, of both networks."""
    path = tmp_path_factory.mktemp("lora") / "both.safetensors"
    save_file(tensors_of(CASES["LoRA, Kohya's names"], model), path)
    return path


def weights(model: minidiff.Model) -> dict[str, Tensor]:
    """Of the UNet and the text encoder, less what is large and no LoRA of these tests changes."""
    text = {f"text.{key}": value for key, value in model.text.model.state_dict().items() if "embedding" not in key}
    return {**model.unet.state_dict(), **text}


def equal(a: minidiff.Model, b: minidiff.Model) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def one(up: int = 32, down: int = 32, rank: int = 4, name: str = Q) -> dict[str, Tensor]:
    return {f"{name}.lora_up.weight": torch.randn(up, rank), f"{name}.lora_down.weight": torch.randn(rank, down)}


# ---- formats


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CASES)
def test_formats_equal_the_libraries_that_made_them(name: str, model: minidiff.Model, folder: Path) -> None:
    case = CASES[name]
    before = {key: value.clone() for key, value in weights(model).items()}
    changed, pipeline = merged_pair(case, model, folder)
    unet, context = errors(changed, pipeline)
    assert unet <= BOUND
    assert context <= BOUND or not case.text
    assert all(torch.equal(value, before[key]) for key, value in weights(model).items())
    layers = {split(key)[0] for key in tensors_of(case, model)}
    touched = [
        name
        for old, new in ((model.unet, changed.unet), (model.text.model, changed.text.model))
        for (name, value), (_, other) in zip(old.named_parameters(), new.named_parameters(), strict=True)
        if value is not other and name.endswith("weight")
    ]
    assert len(touched) == len(layers)  # all else is shared


def test_the_first_format_counts_as_its_trainer_did(model: minidiff.Model, path: Path) -> None:
    """Linear layers below attention and GEGLU, in the order in which diffusers 0.11 had them: attn1, ff, attn2."""
    unet = diffusers.UNet2DConditionModel.from_config(dict(SMALL.unet))
    blocks = [n for n, m in unet.named_modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert [b.split("_")[0] for b in blocks] == sorted(
        (b.split("_")[0] for b in blocks), key=["down", "up", "mid"].index
    )
    inner = [f"attn1.to_{x}" for x in ("q", "k", "v", "out.0")] + ["ff.net.0.proj"]
    inner += [f"attn2.to_{x}" for x in ("q", "k", "v", "out.0")]
    order = [f"{block}.{name}.weight" for block in blocks for name in inner]
    text = [f"encoder.layers.{n}.self_attn.{x}_proj.weight" for n in range(2) for x in ("k", "v", "q", "out")]
    tensors = {}
    shapes = {key.replace("text.text_model.", "text."): value.shape for key, value in weights(model).items()}
    for front, names in (("unet", order), ("text_encoder", [f"text.{name}" for name in text])):
        for n, name in enumerate(names):
            tensors |= {f"{front}:{n}:up": torch.randn(shapes[name][0], 2)}
            tensors |= {f"{front}:{n}:down": torch.randn(2, shapes[name][1])}
    save_file(tensors, path)
    found, base = weights(with_loras(model, path)), weights(model)
    short = {key.replace("text.text_model.", "text."): key for key in base}
    for front, names in (("unet", order), ("text_encoder", [f"text.{name}" for name in text])):
        for n, name in enumerate(names):
            change = tensors[f"{front}:{n}:up"] @ tensors[f"{front}:{n}:down"]
            assert relative_error(found[short[name]] - base[short[name]], change) <= 1e-5
    del tensors["unet:7:up"], tensors["unet:7:down"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"keys that fit nowhere in the model: .*unet:0:"):
        with_loras(model, path)  # it counts other layers, and numbers do not tell which
    save_file({"<s1>": torch.zeros(64), **one()}, path)
    with pytest.warns(UserWarning, match=r"also holds the words <s1>, which are left out"):
        with_loras(model, path)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (
            "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
            "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        ("lora_unet_input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_input_blocks_4_0_skip_connection", "down_blocks.1.resnets.0.conv_shortcut"),
        ("lora_unet_middle_block_1_proj_in", "mid_block.attentions.0.proj_in"),
        ("lora_unet_middle_block_2_in_layers_2", "mid_block.resnets.1.conv1"),
        ("lora_unet_output_blocks_2_1_conv", "up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_output_blocks_5_2_conv", "up_blocks.1.upsamplers.0.conv"),
        ("lora_unet_output_blocks_11_0_emb_layers_1", "up_blocks.3.resnets.2.time_emb_proj"),
        ("lora_unet_time_embed_0", "time_embedding.linear_1"),
        ("lora_unet_up_blocks_1_upsamplers_0_conv", "up_blocks.1.upsamplers.0.conv"),
        ("lycoris_conv_in", "conv_in"),
        (
            "up_blocks.1.attentions.2.transformer_blocks.0.attn2.processor.to_out_lora",
            "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_out.0",
        ),
        (
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora",
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", "text_model.encoder.layers.0.mlp.fc1"),
        (
            "text_encoder.encoder.layers.3.self_attn.q_proj.lora_linear_layer",
            "text_model.encoder.layers.3.self_attn.q_proj",
        ),
        (
            "text_encoder.text_model.encoder.layers.3.self_attn.to_out_lora",
            "text_model.encoder.layers.3.self_attn.out_proj",
        ),
    ],
)
def test_names_of_sd15(name: str, path: str, sd15_names: dict[str, Place]) -> None:
    assert sd15_names[name] == ("text encoder" if path.startswith("text_model.") else "UNet", path)


@pytest.fixture(scope="module")
def sd15_names() -> dict[str, Place]:
    with torch.device("meta"):
        unet = [name.removesuffix(".weight") for name in UNet(UNetConfig()).state_dict() if name.endswith("weight")]
    text = [f"text_model.encoder.layers.{n}.{x}" for n in range(12) for x in ("mlp.fc1", "self_attn.q_proj")]
    return layer_names(unet, [*text, *(f"text_model.encoder.layers.{n}.self_attn.out_proj" for n in range(12))], 4, 2)


def test_half_precision_files(model: minidiff.Model, path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        tensors = {key: value.to(dtype) for key, value in one().items()}
        save_file(tensors, path)
        change = weights(with_loras(model, path))[Q_WEIGHT] - weights(model)[Q_WEIGHT]
        expected = tensors[f"{Q}.lora_up.weight"].double() @ tensors[f"{Q}.lora_down.weight"].double()
        assert relative_error(change, expected) <= 1e-5


# ---- weights, several files, models of all kinds


def test_weights_add_up(model: minidiff.Model, lora: Path, folder: Path) -> None:
    whole, sum_ = with_loras(model, LoRA(lora, 0.8)), with_loras(model, LoRA(lora, 0.5), LoRA(lora, 0.3))
    for key, value in weights(whole).items():
        assert relative_error(weights(sum_)[key], value) <= 1e-6
    assert relative_error(weights(whole)[Q_WEIGHT], weights(with_loras(model, lora))[Q_WEIGHT]) > 0.01
    for nothing in (LoRA(lora, 0), LoRA(lora, 0, 0.0)):
        assert equal(with_loras(model, nothing), model)
        assert with_loras(model, nothing).unet is model.unet
    assert with_loras(model).unet is model.unet


def test_the_weight_of_the_text_encoder(model: minidiff.Model, lora: Path) -> None:
    unet, text = with_loras(model, LoRA(lora, 0.8, 0)), with_loras(model, LoRA(lora, 0, 0.8))
    both = with_loras(model, LoRA(lora, 0.8))
    assert unet.text.model is model.text.model and text.unet is model.unet
    assert equal(with_loras(unet, LoRA(lora, 0, 0.8)), both)
    assert all(torch.equal(v, both.text.model.state_dict()[k]) for k, v in text.text.model.state_dict().items())


def test_sums_are_rounded_once(folder: Path, path: Path, tmp_path: Path) -> None:
    """In bfloat16, small changes beside a large one, each of which alone would be rounded away."""
    half = minidiff.load(folder, dtype="bfloat16", device="cpu")
    weight, large = weights(half)[Q_WEIGHT].float(), tmp_path / "large.safetensors"
    save_file({f"{Q}.diff": weight * 2**-10}, path)
    save_file({f"{Q}.diff": weight}, large)
    assert equal(with_loras(half, path), half)
    found = weights(with_loras(half, large, *[path] * 16))[Q_WEIGHT]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (weight * (2 + 2**-6)).bfloat16())
    assert not torch.equal(found.float(), weight * 2)


def test_a_decomposed_one_goes_part_of_the_way(model: minidiff.Model, folder: Path) -> None:
    changed, _ = merged_pair(CASES["DoRA, LoKr"], model, folder)
    half = with_loras(model, LoRA(folder / "file.safetensors", 0.5))
    for key, value in weights(half).items():
        assert relative_error(value, (weights(model)[key] + weights(changed)[key]) / 2) <= 1e-6


@pytest.mark.parametrize("kind", ["packed", "packed and run", "channels_last", "bfloat16"])
def test_networks_as_they_run(kind: str, model: minidiff.Model, folder: Path, lora: Path) -> None:
    base = minidiff.load(folder, dtype="bfloat16" if kind == "bfloat16" else "float32", device="cpu")
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 77, 32)
    if "packed" in kind:
        pack(base.unet, 0)
    if kind == "channels_last":
        base.unet.to(memory_format=torch.channels_last)
    inputs = (x.to(base.dtype), t, context.to(base.dtype))
    with torch.no_grad():
        before = base.unet(*inputs)[0] if kind != "packed" else None
        found = with_loras(base, LoRA(lora, 0.5)).unet(*inputs)[0]
        after = base.unet(*inputs)[0]
        expected = with_loras(model, LoRA(lora, 0.5)).unet(x, t, context)[0]
    assert before is None or torch.equal(before, after)
    assert relative_error(found, expected) <= (0.05 if kind == "bfloat16" else 1e-5)
    assert relative_error(after, expected) > 0.2


@pytest.mark.slow
def test_a_compiled_model(model: minidiff.Model, folder: Path, lora: Path) -> None:
    compiled = minidiff.load(folder, dtype="float32", device="cpu", compile=True, loras=[lora])
    assert is_compiled(compiled.unet)
    x = torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 77, 32)
    with torch.no_grad():
        assert relative_error(compiled.unet(*x)[0], with_loras(model, lora).unet(*x)[0]) <= 1e-5


def test_load_takes_them(model: minidiff.Model, folder: Path, lora: Path) -> None:
    loaded = minidiff.load(folder, dtype="float32", device="cpu", loras=[lora, LoRA(lora, -0.2)])
    assert relative_error(weights(loaded)[Q_WEIGHT], weights(with_loras(model, LoRA(lora, 0.8)))[Q_WEIGHT]) <= 1e-6
    assert [str(adapter) for adapter in loaded.adapters] == ["lora both (weight 1)", "lora both (weight -0.2)"]
    for wrong, message in (
        (lora, "loras is .*expected a list of files or LoRA"),
        (str(lora), "loras is .*expected a list of files or LoRA"),
        ([3], "loras holds 3; expected files or LoRA"),
        ([lora.with_name("no.safetensors")], "no.safetensors is not there"),
    ):
        with pytest.raises(ValueError, match=message):
            minidiff.load(folder / "no model", loras=wrong)  # before the model is looked for


# ---- the record


def test_what_is_recorded(model: minidiff.Model, path: Path) -> None:
    save_file(one(), path)
    changed = with_loras(model, LoRA(path, 0.5, 0.25))
    (adapter,) = changed.adapters
    with safe_open(path, framework="pt") as file:
        assert file.metadata() is None
    data = path.read_bytes()
    assert adapter.sha256 == hashlib.sha256(data).hexdigest()
    start = 8 + int.from_bytes(data[:8], "little")
    assert adapter.short_hash == hashlib.sha256(data[start:]).hexdigest()[:12]
    assert (adapter.name, adapter.file) == ("style", "style.safetensors")
    assert adapter.weights == {"weight": 0.5, "text_weight": 0.25}
    assert not changed_weights(changed.unet)
    assert with_loras(changed, path).adapters[0] is adapter
    own = minidiff.with_weights(changed.unet, {Q_WEIGHT: torch.zeros(32, 32)})
    assert changed_weights(own) == [Q_WEIGHT]
    save_file(one(), path, metadata={"sshs_model_hash": "ab12" * 16})
    assert with_loras(model, path).adapters[0].short_hash == "ab12ab12ab12"
    save_file(one(), path, metadata={"sshs_model_hash": "no, a hash: at all"})
    assert re.fullmatch("[0-9a-f]{12}", with_loras(model, path).adapters[0].short_hash)


# ---- minidiff info


SD15_Q = torch.zeros(320, 4), torch.zeros(4, 320)
SD15_TEXT = "lora_te_text_model_encoder_layers_11_self_attn_q_proj"


def test_info_says_what_a_file_changes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = {f"{Q}.lora_up.weight": SD15_Q[0], f"{Q}.lora_down.weight": SD15_Q[1], f"{Q}.alpha": torch.tensor(2.0)}
    file |= {f"{K}.hada_w{n}_a": torch.zeros(320, 8) for n in (1, 2)} | {
        f"{K}.hada_w{n}_b": torch.zeros(8, 768) for n in (1, 2)
    }
    file |= {f"{SD15_TEXT}.diff": torch.zeros(768, 768), f"{SD15_TEXT}.diff_b": torch.zeros(768)}
    save_file(file, path)
    found = describe(path)
    unet, text = found.parts
    assert (found.kind, found.loads) == ("LoRA", False)
    assert (found.use or "").startswith("--lora FILE=WEIGHT") and found.all_problems() == []
    assert unet.config == {
        "layers": 2,
        "format": "1 LoRA, 1 LoHa",
        "rank": "4 to 8",
        "alpha": "2",
        "fits": "Stable Diffusion 1.5",
    }
    assert text.config["layers"] == 1 and text.config["format"] == "full" and text.config["rank"] == "none"
    assert (unet.name, unet.content.tensors, text.name, text.content.tensors) == ("UNet", 7, "text encoder", 2)
    assert main(["info", str(path)]) == 0
    said = capsys.readouterr().out
    assert "\nuse: --lora FILE=WEIGHT" in said and "loads:" not in said and "  rank: 4 to 8\n  alpha: 2\n" in said
    save_file(file | {f"{K}.dora_scale": torch.ones(319, 1)}, path)
    assert "they do not make a change of" in describe(path).all_problems()[0]
    assert main(["info", str(path)]) == 0
    assert "\nuse: none, because " in capsys.readouterr().out
    save_file(one(down=1024, name=K), path)
    assert (
        "cannot be put on Stable Diffusion 1.5: it is a LoRA for Stable Diffusion 2" in describe(path).all_problems()[0]
    )


# ---- the command line, and the picture made again


def cli(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, list[str]]:
    code = main(["generate", *map(str, argv)])
    return code, capsys.readouterr().err.splitlines()


def pixels(path: Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path)))


def test_a_picture_is_made_again(folder: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--model", folder, "--dtype", "float32", "--steps", 2, "--seed", 3, "--width", 32, "--height", 32)
    with_it, again, without = (tmp_path / f"{name}.png" for name in ("a", "b", "c"))
    assert cli(capsys, "a cat", *small, "--lora", f"{lora}=0.5,0.25", "--out", with_it) == (0, [])
    found = minidiff.read_metadata(with_it)
    assert found.reproducible and "changed_weights" not in found.info
    (entry,) = found.info["adapters"]
    assert (entry["kind"], entry["file"]) == ("lora", "both.safetensors")
    assert entry["weights"] == {"weight": 0.5, "text_weight": 0.25}
    text = Image.open(with_it).text["parameters"]
    assert f'Lora hashes: "both: {entry["short_hash"]}"' in text
    code, err = cli(capsys, "--from", with_it, "--model", folder, "--out", again)
    assert code == 2 and "pass lora both (--lora FILE; its file was both.safetensors, of sha256" in err[-1]
    assert cli(capsys, "--from", with_it, "--model", folder, "--lora", lora, "--out", again) == (0, [])
    assert torch.equal(pixels(again), pixels(with_it))
    assert cli(capsys, "--from", with_it, "--model", folder, "--lora", f"{lora}=0", "--out", without) == (0, [])
    assert not torch.equal(pixels(without), pixels(with_it))
    other = tmp_path / "both.safetensors"
    save_file(one(), other)
    code, err = cli(capsys, "--from", with_it, "--model", folder, "--lora", other, "--out", tmp_path / "d.png")
    assert code == 0
    assert any("was made with another file for the lora both, of sha256" in line for line in err)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("no.safetensors", "no.safetensors is not there; expected a .safetensors file"),
        ("x.safetensors=strong", "got 'x.safetensors=strong'; expected e.g. style.safetensors=0.8"),
        ("x.safetensors=1,2,3", "expected one or two weights"),
        ("a=b.safetensors", "a=b.safetensors is not there"),
    ],
)
def test_flags_that_are_wrong(flag: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, err = cli(capsys, "a cat", "--model", folder, "--lora", flag)
    assert code == 2 and message in err[-1]


# ---- what is refused

SHAPED = "they do not make a change of " + re.escape(f"{Q_WEIGHT} [32, 32]")
WRONG: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "empty": (dict, "it holds no tensors"),
    "a checkpoint": (lambda: {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2, 4, 3, 3)}, "no LoRA"),
    "an embedding": (lambda: {"emb_params": torch.zeros(2, 64)}, "it is a textual inversion embedding, no LoRA"),
    "something else": (lambda: {"x": torch.zeros(2)}, "its tensors are not those of a LoRA"),
    "SDXL, second encoder": (lambda: one() | one(name="lora_te2_text_model_x"), "a LoRA for Stable Diffusion XL"),
    "SDXL, deep blocks": (
        lambda: one(name="lora_unet_input_blocks_7_1_transformer_blocks_4_attn1_to_q"),
        "a LoRA for Stable Diffusion XL",
    ),
    "SDXL, width": (
        lambda: one(down=2048, name=K),
        "a LoRA for Stable Diffusion XL .its text is 2048 wide",
    ),
    "SD 2, width": (
        lambda: one(down=1024, name=K),
        "Stable Diffusion 2 .its text is 1024 wide, the model's 32",
    ),
    "SD 1.5, width": (lambda: one(down=768, name=K), "a LoRA for Stable Diffusion 1.x .its text is 768 wide"),
    "SD 2, text encoder": (
        lambda: one(down=1024, name="lora_te_text_model_encoder_layers_0_mlp_fc1"),
        "cannot be put on the model: it is a LoRA for Stable Diffusion 2 .its text is 1024 wide, the model's 32",
    ),
    "Flux, Kohya": (lambda: one(name="lora_unet_double_blocks_0_img_attn_proj"), "a LoRA for Flux"),
    "Flux, PEFT": (
        lambda: {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 8)},
        "a LoRA for Flux",
    ),
    "SD 3": (lambda: one(name="lora_unet_joint_blocks_0_x"), "a LoRA for Stable Diffusion 3"),
    "OFT": (lambda: {f"{Q}.oft_blocks": torch.zeros(4, 8, 8)}, "an OFT, which rotates weights"),
    "GLoRA": (lambda: {f"{Q}.a1.weight": torch.zeros(4, 8)}, "a GLoRA"),
    "IA3": (lambda: {f"{Q}.weight": torch.zeros(4), f"{Q}.on_input": torch.zeros(1)}, "an .IA.3"),
    "NaN": (lambda: one() | {f"{Q}.alpha": torch.tensor(float("nan"))}, f"not finite .* in 1 of 3 tensors: {Q}.alpha"),
    "ranks differ": (lambda: one() | {f"{Q}.lora_up.weight": torch.ones(32, 5)}, SHAPED),
    "no rank": (lambda: one(rank=0) | {f"{Q}.alpha": torch.tensor(1.0)}, SHAPED),
    "another width": (lambda: one(down=64), SHAPED),
    "another height": (lambda: one(up=64), SHAPED),
    "half of one": (lambda: {f"{Q}.lora_up.weight": torch.ones(32, 4)}, "its down is missing"),
    "alpha alone": (lambda: one() | {f"{K}.alpha": torch.tensor(1.0)}, f"{K}.alpha: nothing that changes"),
    "a long alpha": (lambda: one() | {f"{Q}.alpha": torch.ones(2)}, SHAPED),
    "two formats": (lambda: one() | {f"{Q}.diff": torch.ones(32, 32)}, "parts of several formats"),
    "a scale too short": (lambda: one() | {f"{Q}.dora_scale": torch.ones(31, 1)}, SHAPED),
    "no such bias": (lambda: one() | {f"{Q}.diff_b": torch.ones(32)}, r"to_q.bias is no weight of the UNet"),
    "twice": (
        lambda: one() | {f"unet.{Q_WEIGHT.removesuffix('.weight')}.lora_A.weight": torch.ones(4, 32)},
        "changes one layer twice, as ",
    ),
    "keys of nowhere": (
        lambda: one() | one(name="lora_unet_down_blocks_9_x"),
        r"2 of 4 keys that fit nowhere in the model: lora_unet_down_blocks_9_x.lora_down.weight, lora",
    ),
    "unknown parts": (lambda: one() | {f"{Q}.lora_side.weight": torch.ones(1)}, "1 of 3 keys that fit nowhere"),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_files_are_named(what: str, model: minidiff.Model, path: Path) -> None:
    make, message = WRONG[what]
    save_file(make(), path)
    with pytest.raises(ValueError, match=message) as raised:
        with_loras(model, path)
    assert str(path) in str(raised.value)


def test_damaged_files(model: minidiff.Model, path: Path) -> None:
    save_file(one(), path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cannot be read as safetensors.* 8 too few"):
        with_loras(model, path)
    pickled = path.with_suffix(".pt")
    torch.save(one(), pickled)
    with pytest.raises(ValueError, match="is a pickle.*convert it once"):
        with_loras(model, pickled)
    save_file(one(), path, metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(ValueError, match="the lora_adapter_metadata in its header cannot be read"):
        with_loras(model, path)


def test_keys_of_nowhere_may_be_left_out(model: minidiff.Model, path: Path) -> None:
    save_file(one(), path)
    expected = with_loras(model, path)
    save_file(one() | one(name="lora_unet_nowhere"), path)
    assert load_file(path).keys() > one().keys()
    with pytest.warns(UserWarning, match="2 of 4 keys that fit nowhere are left out: lora_unet_nowhere"):
        changed = with_loras(model, path, strict=False)
    assert weights(changed).keys() == weights(expected).keys()
    save_file(one(name="lora_unet_nowhere"), path)
    with pytest.raises(ValueError, match="2 of 2 keys that fit nowhere"):
        with_loras(model, path, strict=False)


def test_half_precision_that_overflows(model: minidiff.Model, path: Path) -> None:
    half = replace(model, unet=copy.deepcopy(model.unet).half())
    save_file({f"{Q}.diff": torch.full((32, 32), 7e4)}, path)
    with pytest.raises(ValueError, match="not finite .NaN or infinity. in float16"):
        with_loras(half, path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRA(3), "file is 3; expected the path"),  # type: ignore[arg-type]
        (lambda: LoRA(""), "file is ''; expected the path"),
        (lambda: LoRA("x", float("nan")), "weight is nan; expected a number"),
        (lambda: LoRA("x", 1, "0.5"), "text_weight is '0.5'; expected a number"),  # type: ignore[arg-type]
        (lambda: with_loras("model"), "model is 'model'; expected one from minidiff.load"),  # type: ignore[arg-type]
    ],
)
def test_wrong_values(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
