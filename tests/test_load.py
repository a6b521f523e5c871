"""weights/load.py: folders, single files, replaced parts, dtypes, and error messages for bad input."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from compare import relative_error
from diffusers import UNet2DConditionModel
from ldm import ldm_tensors, write_single_file
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minidiff
from minidiff.networks.config import VAEConfig
from minidiff.networks.text import text_encoder_shapes
from minidiff.networks.vae import VAE
from minidiff.weights.inspect import describe
from minidiff.weights.names import LDM_PREFIX, VAE_OLD_ATTENTION, invert, rename
from minidiff.weights.state import check_state

UNET_FILE, VAE_FILE, TEXT_FILE = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
linux = pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs /proc")


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny folder whose files may be replaced (with `put`, never written to: they are hard links)."""
    return shutil.copytree(tiny_folder, tmp_path / "copy", copy_function=os.link)


@pytest.fixture(scope="module")
def single(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(tiny_folder, tmp_path_factory.mktemp("single") / "tiny.safetensors")


def put(path: Path, content: dict[str, Tensor] | str | bytes) -> None:
    path.unlink(missing_ok=True)
    if isinstance(content, dict):
        save_file({key: value.contiguous() for key, value in content.items()}, path, metadata={"format": "pt"})
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def change_json(path: Path, **values: object) -> None:
    put(path, json.dumps(json.loads(path.read_text()) | values))


def load(source: str | Path, **arguments: str | Path | torch.dtype | None) -> minidiff.Model:
    return minidiff.load(source, **{"dtype": "float32", "device": "cpu"} | arguments)


def networks(model: minidiff.Model) -> tuple[nn.Module, nn.Module, nn.Module]:
    return model.unet, model.vae, model.text.model


def assert_same_weights(a: minidiff.Model, b: minidiff.Model) -> None:
    for one, other in zip(networks(a), networks(b), strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


# ---- a folder


def test_the_weights_of_the_folder(tiny_folder: Path, tiny_model: minidiff.Model) -> None:
    for file, network in zip((UNET_FILE, VAE_FILE, TEXT_FILE), networks(tiny_model), strict=True):
        stored = {k.removeprefix("text_model."): v for k, v in load_file(tiny_folder / file).items()}
        found = {k.removeprefix("text_model."): v for k, v in network.state_dict().items()}
        stored.pop("embeddings.position_ids", None)
        torch.testing.assert_close(found, stored, rtol=0, atol=0)
    assert (tiny_model.name, tiny_model.origin, tiny_model.sha256, tiny_model.options) == (
        "tiny",
        tiny_folder,
        None,
        {},
    )


def test_diffusers_loads_the_same_weights(tiny_folder: Path, tiny_model: minidiff.Model) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder)
    for ours, theirs in zip(networks(tiny_model), (pipe.unet, pipe.vae, pipe.text_encoder), strict=True):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert torch.equal(tiny_model.noise.alphas_cumprod, pipe.scheduler.alphas_cumprod)


def test_a_whole_clip_is_its_text_encoder(tiny_folder: Path, tiny_model: minidiff.Model, tmp_path: Path) -> None:
    """Its config nests the text encoder's; its file also holds the image encoder and the projections."""
    folder = shutil.copytree(tiny_folder, tmp_path / "tiny")
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps({"text_config": json.loads(config.read_text()), "vision_config": {}}))
    beside = {key: torch.ones(2) for key in ("vision_model.post_layernorm.bias", "logit_scale", "visual_projection.x")}
    save_file(load_file(folder / TEXT_FILE) | beside, folder / TEXT_FILE)
    assert describe(folder).loads
    assert_same_weights(load(folder), tiny_model)


def test_a_folder_that_diffusers_wrote(tiny_folder: Path, tiny_model: minidiff.Model, tmp_path: Path) -> None:
    """Text encoder keys have no prefix since transformers 5.6."""
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.from_pretrained(tiny_folder).save_pretrained(tmp_path / "saved")
    saved = load(tmp_path / "saved")
    assert_same_weights(saved, tiny_model)
    assert (saved.unet.config, saved.vae.config) == (tiny_model.unet.config, tiny_model.vae.config)


def test_old_names_of_the_vae(folder: Path, tiny_model: minidiff.Model) -> None:
    new = load_file(folder / VAE_FILE)
    table = invert(VAE_OLD_ATTENTION, new)
    old = {rename(key, table): value for key, value in new.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in old
    put(folder / VAE_FILE, old)
    assert_same_weights(load(folder), tiny_model)


def test_a_variant(folder: Path, tiny_model: minidiff.Model) -> None:
    for file in (UNET_FILE, VAE_FILE, TEXT_FILE):
        half = {
            key: value.half() if value.is_floating_point() else value for key, value in load_file(folder / file).items()
        }
        put(folder / file.replace(".safetensors", ".fp16.safetensors"), half)
        (folder / file).unlink()
    with pytest.raises(ValueError, match=r'there is \S+\.fp16\.safetensors; variant="fp16" loads'):
        load(folder)
    model = load(folder, variant="fp16")
    assert model.options == {"variant": "fp16"}
    assert model.dtype == torch.float32
    for ours, full in zip(networks(model), networks(tiny_model), strict=True):
        expected = {key: value.half().float() for key, value in full.state_dict().items()}
        torch.testing.assert_close(ours.state_dict(), expected, rtol=0, atol=0)


def test_a_variant_that_one_part_has(folder: Path, tiny_model: minidiff.Model) -> None:
    """Like non_ema in Stable Diffusion 1.5's repository, which only unet/ has. Other parts use the plain files."""
    unet = load_file(folder / UNET_FILE)
    put(folder / UNET_FILE.replace(".safetensors", ".non_ema.safetensors"), {k: v + 1 for k, v in unet.items()})
    model = load(folder, variant="non_ema")
    assert torch.equal(model.unet.conv_in.weight, tiny_model.unet.conv_in.weight + 1)
    torch.testing.assert_close(model.vae.state_dict(), tiny_model.vae.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"model.fp16.safetensors is not there; there is .*; variant="):
        load(folder, variant="fp16")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_weights(variant: str | None, folder: Path, tiny_model: minidiff.Model) -> None:
    from diffusers import UNet2DConditionModel

    whole = (folder / UNET_FILE).stat().st_size
    UNet2DConditionModel.from_pretrained(folder / "unet").save_pretrained(
        folder / "unet", max_shard_size=whole // 3, variant=variant
    )
    (folder / UNET_FILE).unlink(missing_ok=True)
    shards = sorted((folder / "unet").glob("*-of-*"))
    assert len(shards) > 2
    assert_same_weights(load(folder, variant=variant), tiny_model)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"{shards[1].name} is not there"):
        load(folder, variant=variant)
    (index,) = (folder / "unet").glob("*.index*.json")
    put(index, '{"weight_map": {"conv_in.weight": "../../elsewhere.safetensors"}}')
    with pytest.raises(ValueError, match="weight_map must map every tensor to a file in the same folder"):
        load(folder, variant=variant)


def test_corrupt_position_ids_and_a_projection_do_not_matter(folder: Path, tiny_model: minidiff.Model) -> None:
    text = load_file(folder / TEXT_FILE)
    text["text_model.embeddings.position_ids"] = torch.full((1, 77), 3)
    text["text_projection.weight"] = torch.ones(64, 64)
    put(folder / TEXT_FILE, text)
    assert torch.equal(load(folder).text.encode(["a cat"]), tiny_model.text.encode(["a cat"]))


def test_the_scheduler_and_prediction_type(folder: Path) -> None:
    assert load(folder).noise.prediction_type == "epsilon"
    assert load(folder, prediction_type="v_prediction").noise.prediction_type == "v_prediction"
    config = folder / "scheduler/scheduler_config.json"
    change_json(config, prediction_type="v_prediction", steps_offset=0, minidiff_defaults={"steps": 9})
    model = load(folder)
    # StableDiffusionPipeline also raises the offset to 1.
    assert (model.noise.prediction_type, model.noise.steps_offset, model.defaults.steps) == ("v_prediction", 1, 9)
    with pytest.raises(ValueError, match="prediction_type.*'x0'.*epsilon, v_prediction"):
        load(folder, prediction_type="x0")


# ---- a single file


def test_a_single_file_is_the_same_model(single: Path, tiny_folder: Path, tiny_model: minidiff.Model) -> None:
    model = load(single, tokenizer=tiny_folder / "tokenizer")
    assert_same_weights(model, tiny_model)
    # No tensor contains the training size: SD 1.5's is assumed.
    assert model.unet.config == replace(tiny_model.unet.config, sample_size=64)
    assert model.vae.config == tiny_model.vae.config
    text = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "hidden_act", "vocab_size")
    for key in text:
        assert getattr(model.text.model.config, key) == getattr(tiny_model.text.model.config, key)
    assert torch.equal(model.text.encode(["a cat"]), tiny_model.text.encode(["a cat"]))
    ours, theirs = (vars(m.noise) | {"alphas_cumprod": m.noise.alphas_cumprod.tolist()} for m in (model, tiny_model))
    assert ours == theirs
    assert (model.name, model.origin, model.options) == ("tiny", single, {"tokenizer": "tokenizer"})
    assert model.sha256 == hashlib.sha256(single.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "form", [{"text_prefix": ""}, {"flat_vae_attention": True}], ids=["no prefix", "2-D attention"]
)
def test_other_forms_of_a_single_file(
    form: dict[str, bool], tiny_folder: Path, tiny_model: minidiff.Model, tmp_path: Path
) -> None:
    path = write_single_file(tiny_folder, tmp_path / "form.safetensors", **form)
    assert_same_weights(load(path, tokenizer=tiny_folder / "tokenizer"), tiny_model)


def test_a_single_file_in_half_precision(tiny_folder: Path, tiny_model: minidiff.Model, tmp_path: Path) -> None:
    path = write_single_file(tiny_folder, tmp_path / "half.safetensors", dtype=torch.float16)
    for ours, full in zip(networks(load(path, tokenizer=tiny_folder / "tokenizer")), networks(tiny_model), strict=True):
        expected = {key: value.half().float() for key, value in full.state_dict().items()}
        torch.testing.assert_close(ours.state_dict(), expected, rtol=0, atol=0)


def test_averages_are_ignored_and_foreign_keys_named(
    tiny_folder: Path, tiny_model: minidiff.Model, tmp_path: Path
) -> None:
    averages = {
        "model_ema.diffusion_modelinput_blocks00weight": torch.ones(32, 4, 3, 3),
        "global_step": torch.tensor(7),
    }
    path = write_single_file(tiny_folder, tmp_path / "ema.safetensors", more=averages)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same_weights(load(path, tokenizer=tiny_folder / "tokenizer"), tiny_model)
    foreign = {f"lora_unet_{i}.lora_up.weight": torch.ones(2) for i in range(7)}
    path = write_single_file(tiny_folder, tmp_path / "foreign.safetensors", more=averages | foreign)
    with pytest.warns(UserWarning, match=r"foreign.safetensors holds 7 tensors .*: lora_unet_0.* and 2 more") as warned:
        model = minidiff.load(path, tokenizer=tiny_folder / "tokenizer", dtype="float32")
    assert warned[0].filename == __file__
    assert_same_weights(model, tiny_model)


@pytest.mark.parametrize("mark", ["tensor", "metadata", "yaml", "yaml of epsilon"])
def test_what_a_single_file_says_of_its_prediction(mark: str, single: Path, tiny_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(single) | ({"v_pred": torch.zeros(0)} if mark == "tensor" else {})
    path = tmp_path / "v.safetensors"
    save_file(tensors, path, {"modelspec.prediction_type": "v" if mark == "metadata" else "epsilon"})
    if "yaml" in mark:
        kind = "eps" if mark == "yaml of epsilon" else "v"
        path.with_suffix(".yaml").write_text(
            f'model:\n  params:\n    parameterization: "{kind}"\n    linear_end: 0.012'
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = load(path, tokenizer=tiny_folder / "tokenizer")
    assert model.noise.prediction_type == ("epsilon" if mark == "yaml of epsilon" else "v_prediction")
    other = load(path, tokenizer=tiny_folder / "tokenizer", prediction_type="epsilon")
    assert other.noise.prediction_type == "epsilon"


def test_a_single_file_without_an_autoencoder(tiny_folder: Path, tiny_model: minidiff.Model, tmp_path: Path) -> None:
    path = write_single_file(tiny_folder, tmp_path / "bare.safetensors", vae=False)
    with pytest.raises(
        ValueError, match="bare.safetensors cannot be loaded: it holds no autoencoder; pass one with vae="
    ):
        load(path, tokenizer=tiny_folder / "tokenizer")
    model = load(path, tokenizer=tiny_folder / "tokenizer", vae=tiny_folder)
    assert_same_weights(model, tiny_model)


def test_the_tokenizer_of_a_single_file_comes_from_the_hub(
    single: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(repo)
        return str(tiny_folder / "tokenizer")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load(single).text.num_tokens("a cat") == 2
    assert asked == ["openai/clip-vit-large-patch14"]

    def offline(repo: str, **_: object) -> str:
        raise huggingface_hub.utils.LocalEntryNotFoundError("not cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    message = (
        "a single file has no tokenizer, and openai/clip-vit-large-patch14 is not in the hub's cache .* tokenizer="
    )
    with pytest.raises(ValueError, match=message):
        load(single)


@pytest.mark.parametrize("form", ["folder", "single file"])
def test_an_inpainting_model(form: str, folder: Path, tiny_model: minidiff.Model, tmp_path: Path) -> None:
    """Nine channels: latents, mask and the latents of the masked image. The rest is as in any model."""
    change_json(folder / "unet/config.json", in_channels=9)
    reference = UNet2DConditionModel.from_config(json.loads((folder / "unet/config.json").read_text())).eval()
    put(folder / UNET_FILE, reference.state_dict())
    source = folder if form == "folder" else write_single_file(folder, tmp_path / "inpainting.safetensors")
    model = load(source, tokenizer=folder / "tokenizer")
    x, context = torch.randn(1, 9, 8, 8), torch.randn(1, 77, 64)
    with torch.no_grad():
        eps, _ = model.unet(x, torch.tensor([500]), context)
        assert relative_error(eps, reference(x, 500, context).sample) <= 1e-5
        with pytest.raises(ValueError, match=r"latents have shape \[1, 4, 8, 8\]; expected \[B, 9, h, w\]"):
            model.unet(x[:, :4], torch.tensor([500]), context)
    assert minidiff.sites(model, width=32, height=32) == minidiff.sites(tiny_model, width=32, height=32)
    with pytest.raises(
        ValueError, match="is an inpainting model, which paints inside a mask; expected image= and mask="
    ):
        minidiff.generate("a cat", model=model)


# ---- replaced parts


def other_vae(tiny_folder: Path) -> dict[str, Tensor]:
    return {key: value + 1 for key, value in load_file(tiny_folder / VAE_FILE).items()}


@pytest.mark.parametrize(
    "form", ["model folder", "vae folder", "file", "old file", "LDM file", "with loss", "checkpoint"]
)
def test_another_autoencoder(form: str, folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    weights = other_vae(tiny_folder)
    put(folder / VAE_FILE, weights)
    given = tmp_path / "vae.safetensors"
    if "folder" in form:
        given = folder if form == "model folder" else folder / "vae"
    elif form == "checkpoint":
        write_single_file(folder, given)
    elif form == "file":
        put(given, weights)
    elif form == "old file":
        put(given, {rename(key, invert(VAE_OLD_ATTENTION, weights)): value for key, value in weights.items()})
    else:
        prefix = LDM_PREFIX["vae"]
        ldm = {k.removeprefix(prefix): v for k, v in ldm_tensors(folder).items() if k.startswith(prefix)}
        put(given, ldm | ({"loss.logvar": torch.zeros(())} if form == "with loss" else {}))
    link = tmp_path / "link.safetensors"  # as in the hub's cache, where the link target's name has no meaning
    link.symlink_to(given)
    assert load(tiny_folder, vae=link).options == {"vae": "link.safetensors"}
    model = load(tiny_folder, vae=given)
    torch.testing.assert_close(model.vae.state_dict(), weights, rtol=0, atol=0)
    assert model.options == {"vae": given.name}


def test_another_autoencoder_need_not_have_the_variant(folder: Path, tiny_folder: Path) -> None:
    for file in (UNET_FILE, TEXT_FILE):
        (folder / file).rename(folder / file.replace(".safetensors", ".fp16.safetensors"))
    (folder / VAE_FILE).unlink()
    with pytest.raises(
        ValueError, match=r"diffusion_pytorch_model.fp16.safetensors is not there; the folder holds config"
    ):
        load(folder, variant="fp16")
    load(folder, variant="fp16", vae=tiny_folder)


def test_another_tokenizer(folder: Path, tiny_folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ValueError, match="no tokenizer in .*tokenizer: expected vocab.json and merges.txt"):
        load(folder)
    assert load(folder, tokenizer=tiny_folder / "tokenizer").text.num_tokens("a cat") == 2


def test_parts_of_different_models(folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    vae = VAE(VAEConfig(latent_channels=3, block_out_channels=(32,), layers_per_block=1))
    put(tmp_path / "three.safetensors", vae.state_dict())
    with pytest.raises(
        ValueError, match="the UNet works on 4 channels, the autoencoder on 3: they are from different models"
    ):
        load(folder, vae=tmp_path / "three.safetensors")
    change_json(folder / "text_encoder/config.json", hidden_size=96, num_hidden_layers=1)
    shapes = text_encoder_shapes(json.loads((folder / "text_encoder/config.json").read_text()))
    put(folder / TEXT_FILE, {key: torch.zeros(shape, dtype=torch.float16) for key, shape in shapes.items()})
    with pytest.raises(
        ValueError, match="the UNet reads text embeddings 64 wide, the text encoder gives 96: they are from different"
    ):
        load(folder)


def test_an_autoencoder_that_is_none(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="model.safetensors holds no autoencoder; expected keys such as decoder.conv_in"
    ):
        load(tiny_folder, vae=tiny_folder / TEXT_FILE)
    with pytest.raises(ValueError, match="nothing.safetensors is not there"):
        load(tiny_folder, vae="nothing.safetensors")
    with pytest.raises(ValueError, match="vae .*nothing is not there; expected an autoencoder's folder"):
        load(tiny_folder, vae=tmp_path / "nothing")
    with pytest.raises(ValueError, match="nobody/nothing is not in the hub's cache"):
        load(tiny_folder, vae="nobody/nothing")


# ---- frozen, mapped


def test_weights_are_frozen(tiny_model: minidiff.Model) -> None:
    for network in networks(tiny_model):
        assert not any(tensor.requires_grad for tensor in network.parameters())
        assert not any(module.training for module in network.modules())
        assert {tensor.device.type for tensor in (*network.parameters(), *network.buffers())} == {"cpu"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_model.vae = None


@linux
@pytest.mark.parametrize("kind", ["folder", "single"])
def test_weights_are_the_memory_map_unless_converted(kind: str, folder: Path, tmp_path: Path) -> None:
    source, files = folder, [folder / file for file in (UNET_FILE, VAE_FILE, TEXT_FILE)]
    if kind == "single":
        source = write_single_file(folder, tmp_path / "one.safetensors")
        files = [source] * 3
    model = load(source, tokenizer=folder / "tokenizer")
    for file, network in zip(files, networks(model), strict=True):
        spans = mapped(file)
        for name, tensor in network.named_parameters():
            assert any(start <= tensor.data_ptr() < end for start, end in spans), name
    del model, network, tensor
    model = load(source, tokenizer=folder / "tokenizer", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert [mapped(file) for file in files] == [[], [], []]


def mapped(file: Path) -> list[tuple[int, int]]:
    """The address ranges where a file is mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(f" {file}")]
    return [(int(line[0].split("-")[0], 16), int(line[0].split("-")[1], 16)) for line in lines]


# ---- dtype and device


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_on_the_cpu(
    dtype: torch.dtype, tiny_folder: Path, tiny_model: minidiff.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minidiff.speed.device._has_fp16", lambda: True)
    model = load(tiny_folder, dtype=dtype)
    for ours, full in zip(networks(model), networks(tiny_model), strict=True):
        expected = {key: value.to(dtype) for key, value in full.state_dict().items()}
        torch.testing.assert_close(ours.state_dict(), expected, rtol=0, atol=0)
    assert model.dtype == dtype
    context = model.text.encode(["a cat"])
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        eps, _ = model.unet(x.to(dtype), 500, context)
        full, _ = tiny_model.unet(x, 500, tiny_model.text.encode(["a cat"]))
    assert eps.dtype == context.dtype == dtype
    torch.testing.assert_close(eps.float(), full, rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", ["float8", "half", torch.float64, torch.int16, 16])
def test_an_unknown_dtype(dtype: str | torch.dtype, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=f"dtype .*{dtype}.* is (unknown|not supported); expected one of .*bfloat16"):
        load(tiny_folder, dtype=dtype)


# ---- bad input


def test_one_error_names_every_key(folder: Path) -> None:
    unet, vae, text = (load_file(folder / file) for file in (UNET_FILE, VAE_FILE, TEXT_FILE))
    unet.pop("mid_block.resnets.0.norm1.bias")
    unet["conv_out.weight"] = torch.zeros(4, 32, 1, 3)
    unet["conv_in.extra"] = torch.zeros(1)
    unet["down_blocks.0.resnets.0.conv1.weight"] = unet["down_blocks.0.resnets.0.conv1.weight"].to(torch.int8)
    vae.pop("quant_conv.weight")
    text["text_model.final_layer_norm.bias"] = torch.zeros(63)
    for file, weights in zip((UNET_FILE, VAE_FILE, TEXT_FILE), (unet, vae, text), strict=True):
        put(folder / file, weights)
    with pytest.raises(ValueError) as error:
        load(folder)
    assert str(error.value).splitlines() == [
        "the weights do not fit the UNet that its config describes:",
        "  missing mid_block.resnets.0.norm1.bias",
        "  unexpected conv_in.extra",
        "  conv_out.weight has shape [4, 32, 1, 3], expected [4, 32, 3, 3]",
        "  down_blocks.0.resnets.0.conv1.weight has dtype I8, expected floating-point numbers; "
        "quantised weights are not supported",
        "the weights do not fit the autoencoder that its config describes:",
        "  missing quant_conv.weight",
        "the weights do not fit the text encoder that its config describes:",
        "  text_model.final_layer_norm.bias has shape [63], expected [64]",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("first_stage_model.decoder.up.0.block.1.norm1.bias"),
            "missing decoder.up_blocks.2.resnets.1.nor",
        ),
        (
            lambda t: t.pop("model.diffusion_model.input_blocks.3.0.op.bias"),
            "missing down_blocks.0.downsamplers.0.conv.b",
        ),
        (
            lambda t: t.update({"model.diffusion_model.label_emb.0.0.bias": torch.ones(3)}),
            "unexpected label_emb.0.0.bias",
        ),
        (
            lambda t: t.update({"first_stage_model.quant_conv.bias": torch.ones(3)}),
            r"quant_conv.bias has shape \[3\], ex",
        ),
    ],
    ids=["missing", "missing downsampler", "unexpected", "shape"],
)
def test_one_wrong_key_of_a_single_file(
    change: Callable[[dict[str, Tensor]], object], message: str, single: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(single)
    change(tensors)
    put(tmp_path / "wrong.safetensors", tensors)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path / "wrong.safetensors", tokenizer=tiny_folder / "tokenizer")
    assert len(str(error.value).splitlines()) == 2


def test_edges_of_length_one_do_not_count() -> None:
    check_state("UNet", {"w": (4, 2)}, {"w": torch.zeros(4, 2, 1, 1)})
    check_state("UNet", {"w": (4, 2, 1, 1)}, {"w": torch.zeros(4, 2)})
    with pytest.raises(ValueError, match=r"w has shape \[1, 4, 2\], expected \[4, 2\]"):
        check_state("UNet", {"w": (4, 2)}, {"w": torch.zeros(1, 4, 2)})


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "MODEL.PTH", "model.bin"])
def test_a_pickle(name: str, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / name)
    for arguments in ({"source": tmp_path / name}, {"source": str(tmp_path / name)}):
        with pytest.raises(ValueError, match=r"is a pickle, which can run code .*convert it once .*\.safetensors'"):
            load(**arguments)


def test_a_folder_of_pickles(folder: Path) -> None:
    (folder / TEXT_FILE).unlink()
    put(folder / "text_encoder/pytorch_model.bin", b"x")
    with pytest.raises(
        ValueError, match="there is only pytorch_model.bin, a pickle, .*text_encoder/model.safetensors'"
    ):
        load(folder)


@pytest.mark.parametrize("file", [UNET_FILE, VAE_FILE, TEXT_FILE])
@pytest.mark.parametrize("damage", ["truncated", "noise", "empty", "missing"])
def test_a_damaged_file(file: str, damage: str, folder: Path) -> None:
    content = (folder / file).read_bytes()
    put(folder / file, {"truncated": content[:-9], "noise": bytes(range(256)), "empty": b"", "missing": b""}[damage])
    if damage == "missing":
        (folder / file).unlink()
    message = "is not there; the folder holds config.json" if damage == "missing" else "cannot be read as safetensors"
    with pytest.raises(ValueError, match=f"{re.escape(str(folder / file))}.*{message}"):
        load(folder)


@pytest.mark.parametrize("damage", ["truncated", "header"])
def test_a_damaged_single_file(damage: str, single: Path, tmp_path: Path) -> None:
    content = single.read_bytes()
    put(tmp_path / "bad.safetensors", content[:-1] if damage == "truncated" else b"\xff" * 8 + content[8:])
    with pytest.raises(ValueError, match="bad.safetensors .*cut short or damaged"):
        load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    "part", ["unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        ("[1]", "contains a list; expected a JSON object"),
        ("[" * 100_000, "cannot be read as JSON"),
        (None, "(is not there; expected|has no config.json: this model comes without an autoencoder; .*vae=)"),
    ],
    ids=["broken", "encoding", "list", "deep", "missing"],
)
def test_a_bad_config(part: str, content: str | bytes | None, message: str, folder: Path) -> None:
    (folder / part).unlink()
    if content is not None:
        put(folder / part, content)
    with pytest.raises(ValueError, match=f"{Path(part).parent}.*{message}"):
        load(folder)


def test_sizes_that_no_memory_holds(folder: Path) -> None:
    change_json(folder / "unet/config.json", block_out_channels=[32 * 10**9] * 3)
    with pytest.raises(ValueError, match="block_out_channels is 32000000000; expected a whole number from 1 to 65536"):
        load(folder)


@pytest.mark.parametrize("factor", [0, -1, float("nan"), True])
def test_scaling_factors_that_give_no_image(factor: float, folder: Path) -> None:
    change_json(folder / "vae/config.json", scaling_factor=factor)
    with pytest.raises(ValueError, match="vae/config.json: scaling_factor is .*; expected a number from 0.0001"):
        load(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"in_channels": 8}, "InstructPix2Pix model"),
        ({"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20]}, "Stable Diffusion 2 model"),
        ({"cross_attention_dim": 2048, "addition_embed_type": "text_time"}, "Stable Diffusion XL model"),
        ({"class_embed_type": "projection"}, "class_embed_type is 'projection'.* another kind of model"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256.* another kind of model"),
    ],
    ids=["pix2pix", "SD 2", "SDXL", "unCLIP", "LCM"],
)
def test_folders_of_other_models(config: dict[str, object], message: str, folder: Path) -> None:
    change_json(folder / "unet/config.json", **config)
    with pytest.raises(ValueError, match=message):
        load(folder)


CONV_IN, TEXT_IN = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({CONV_IN: (32, 8, 3, 3)}, "it is an image-conditioned model, such as an InstructPix2Pix model"),
        ({TEXT_IN: (32, 1024)}, "it is a Stable Diffusion 2 model"),
        ({"cond_stage_model.model.ln_final.bias": (8,)}, "it is a Stable Diffusion 2 checkpoint"),
        ({TEXT_IN: (32, 2048), "conditioner.embedders.0.x": (8,)}, "it is a Stable Diffusion XL checkpoint"),
        ({"lora_unet_mid_block_x.lora_down.weight": (4, 8)}, "it is a LoRA"),
        ({"<cat>": (2, 768)}, "it is a textual inversion embedding"),
        ({"encoder.conv_in.weight": (8, 3, 3, 3)}, "it is an autoencoder alone; .*pass it as vae="),
        ({"control_model.input_blocks.0.0.weight": (8, 4, 3, 3)}, "it is a ControlNet"),
        ({"fc.weight": (8, 8)}, "not those of a Stable Diffusion 1.x checkpoint .the first keys: fc.weight"),
    ],
)
def test_single_files_of_other_kinds(tensors: dict[str, tuple[int, ...]], message: str, tmp_path: Path) -> None:
    put(tmp_path / "other.safetensors", {key: torch.zeros(shape) for key, shape in tensors.items()})
    with pytest.raises(ValueError, match=f"other.safetensors cannot be loaded: .*{message}"):
        load(tmp_path / "other.safetensors")


def test_a_folder_that_is_no_model(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} has no unet/; expected a Stable Diffusion folder with unet, vae"):
        load(tmp_path)
    with pytest.raises(ValueError, match="has no unet/ .its config.json says 'AutoencoderKL'.; expected a Stable"):
        load(tiny_folder / "vae")
    put(tmp_path / "model_index.json", '{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="has no unet/ .its model_index.json says 'FluxPipeline'.; expected"):
        load(tmp_path)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none is not there; expected a model folder or a .safetensors file"):
        load(tmp_path / "none")
    for path in (tmp_path / "none.safetensors", str(tmp_path / "none.safetensors"), str(tmp_path / "none.ckpt")):
        with pytest.raises(ValueError, match=r"none.\w+ is not there; expected a .safetensors file"):
            load(path)


@pytest.mark.parametrize("source", [None, 3, ["a/b"], ""])
def test_a_source_of_another_type(source: object) -> None:
    with pytest.raises(ValueError, match="source is .*; expected a hub id, a model folder or a .safetensors file"):
        minidiff.load(source)


def test_other_ways_to_name_a_source(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put(folder / "unet/config.json", b"\xef\xbb\xbf" + (folder / "unet/config.json").read_bytes())  # Notepad's BOM
    assert load("~/copy").origin == folder
    with pytest.raises(ValueError, match="source is an address; expected the hub id in it: 'a/b'"):
        load("https://huggingface.co/a/b/tree/main")
    shutil.copytree(folder, tmp_path / "models--a--b/snapshots/123")
    with pytest.raises(ValueError, match="is a repository in the hub's cache; the model is .*snapshots.123"):
        load(tmp_path / "models--a--b")


def test_a_token_that_the_encoder_does_not_have(folder: Path) -> None:
    vocabulary = json.loads((folder / "tokenizer/vocab.json").read_text())
    put(folder / "tokenizer/vocab.json", json.dumps(vocabulary | {"cat</w>": 60_000}))
    with pytest.raises(ValueError, match="has 60001 tokens, the text encoder knows 49408"):
        load(folder)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("revision", 3, "a text: a branch, tag or commit"),
        ("variant", 16, 'a text such as "fp16"'),
        ("tokenizer", 3, "the folder of a tokenizer"),
        ("vae", 3, "a hub id, a folder or a .safetensors file"),
        ("prediction_type", "v", "one of epsilon, v_prediction"),
        ("compile", "yes", "True or False"),
        ("words", ["a"], "a mapping from words to files"),
        ("loras", 3, "a list of files"),
    ],
)
def test_an_option_of_a_wrong_type_is_refused_before_anything_is_fetched(
    option: str, value: object, expected: str
) -> None:
    with pytest.raises(ValueError, match=f"^{option} is {re.escape(repr(value))}; expected {re.escape(expected)}"):
        load("nobody/nothing", **{option: value})


def test_a_revision_of_something_local(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="revision is 'main', but .*tiny is no hub id"):
        load(tiny_folder, revision="main")


def test_a_tokenizer_that_is_not_there(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer in .*none: expected vocab.json and merges.txt"):
        load(tiny_folder, tokenizer=tmp_path / "none")


def test_a_tokenizer_without_room(folder: Path, tiny_folder: Path) -> None:
    change_json(folder / "tokenizer/tokenizer_config.json", model_max_length=2)
    with pytest.raises(ValueError, match="the tokenizer allows 2 tokens, which leaves no room for a word"):
        load(folder)
