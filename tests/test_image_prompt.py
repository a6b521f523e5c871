"""Image prompts against diffusers' load_ip_adapter on the same small files, and their other properties."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare import relative_error
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import minidiff
from bench.image_prompts import (
    EMBEDDING,
    HIDDEN,
    KINDS,
    SCALE,
    SEED,
    load_pipeline,
    network_errors,
    put_on,
    random_picture as picture,
    their_image,
    write_image_adapter,
    write_image_encoder,
)
from minidiff import ImagePrompt, with_image_prompt
from minidiff.cli.main import main
from minidiff.networks.unet import UNet
from minidiff.png.chunk import plain
from minidiff.png.read import read_metadata
from minidiff.resolve import image_inputs
from minidiff.speed import accelerate
from minidiff.speed.packed import Packed

WIDTH = 64  # of the text
# on cell boundaries of every grid, where diffusers' bicubic masks are exact too
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
CALL: dict[str, Any] = {"steps": 2, "seed": SEED, "guidance_scale": SCALE, "sampler": "ddim", "output": "tensor"}


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_encoder(tmp_path_factory.mktemp("vision") / "image_encoder")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_model: minidiff.Model) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        kind: write_image_adapter(folder / f"{kind}.safetensors", kind, tiny_model, seed)
        for seed, kind in enumerate(KINDS)
    }


@pytest.fixture(scope="module")
def model(tiny_model: minidiff.Model, files: Mapping[str, Path], encoder_folder: Path) -> minidiff.Model:
    return with_image_prompt(tiny_model, files["plain"], encoder_folder)


@pytest.fixture(scope="module")
def two(model: minidiff.Model, files: Mapping[str, Path], encoder_folder: Path) -> minidiff.Model:
    """Both kinds on one model."""
    return with_image_prompt(model, files["plus"], encoder_folder)


def ours(model: minidiff.Model, **more: Any) -> Tensor:
    images = minidiff.generate("a red circle", model=model, **{**CALL, **more}).images
    assert isinstance(images, Tensor)
    return images


@pytest.fixture(scope="module")
def pipeline(tiny_folder: Path, encoder_folder: Path) -> Any:
    return load_pipeline(tiny_folder, encoder_folder)


def mask(*boxes: tuple[float, float, float, float]) -> Tensor:
    """In diffusers' format: [1, pictures, h, w]."""
    found = torch.zeros(1, len(boxes), 64, 64)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        found[0, i, int(64 * y0) : int(64 * y1), int(64 * x0) : int(64 * x1)] = 1
    return found


# ---- the same numbers as diffusers


@pytest.mark.parametrize(("kind", "scale"), [("plain", 1.0), ("plus", 0.6), ("full", 1.0)])
def test_each_kind_equals_diffusers(
    kind: str,
    scale: float,
    tiny_model: minidiff.Model,
    files: Mapping[str, Path],
    encoder_folder: Path,
    pipeline: Any,
) -> None:
    model = with_image_prompt(tiny_model, files[kind], encoder_folder)
    found = ours(model, image_prompt=picture(), image_prompt_scale=scale)
    put_on(pipeline, [files[kind]], scale)
    expected = their_image(pipeline, steps=2, ip_adapter_image=picture())
    assert (found - expected).abs().max() < 0.01 / 255
    assert (found - ours(tiny_model)).abs().max() > 2 / 255


def test_the_networks_alone_equal_diffusers(two: minidiff.Model, files: Mapping[str, Path], pipeline: Any) -> None:
    """Tokens and UNet output, without a sampler that might average out errors."""
    pictures = [picture(0), picture(1)]
    put_on(pipeline, [files["plain"], files["plus"]], [0.5, 0.8])
    assert network_errors(two, pipeline, pictures, [0.5, 0.8]) <= 1e-5
    with torch.no_grad():
        embeds = pipeline.prepare_ip_adapter_image_embeds(pictures, None, "cpu", 1, True)
        theirs = pipeline.unet.encoder_hid_proj(embeds)
        for adapter, image, tokens in zip(two.image_adapters, pictures, theirs, strict=True):
            cond, uncond = adapter.tokens([image])
            assert relative_error(torch.cat([uncond, cond]), tokens[:, 0]) <= 1e-5


def test_two_at_once_with_masks_equal_diffusers(two: minidiff.Model, files: Mapping[str, Path], pipeline: Any) -> None:
    """Two pictures for the first adapter, each with a box of its own, and one for the second, with a mask."""
    top = (0.0, 0.0, 1.0, 0.5)
    prompts = [
        ImagePrompt(picture(0), 0.5, LEFT, adapter=0),
        ImagePrompt(picture(1), 0.5, RIGHT, adapter=0),
        ImagePrompt(picture(2), box={"mask": mask(top)[0, 0]}, adapter=1),
    ]
    found = ours(two, image_prompt=prompts, image_prompt_scale=[1.0, 0.8])
    put_on(pipeline, [files["plain"], files["plus"]], [[0.5, 0.5], [0.8]])
    expected = their_image(
        pipeline,
        steps=2,
        masks=[mask(LEFT, RIGHT), mask(top)],
        ip_adapter_image=[[picture(0), picture(1)], [picture(2)]],
    )
    assert (found - expected).abs().max() < 0.01 / 255


def test_pictures_without_a_place_are_read_together_as_in_diffusers(
    model: minidiff.Model, files: Mapping[str, Path], pipeline: Any
) -> None:
    found = ours(model, image_prompt=[picture(0), picture(1)])
    put_on(pipeline, [files["plain"]], 1.0)
    expected = their_image(pipeline, steps=2, ip_adapter_image=[[picture(0), picture(1)]])
    assert (found - expected).abs().max() < 0.01 / 255


# ---- other properties


def test_nothing_is_changed_where_no_picture_counts(tiny_model: minidiff.Model, two: minidiff.Model) -> None:
    before = ours(tiny_model)
    assert torch.equal(ours(two), before)
    assert torch.equal(ours(two, image_prompt=[picture(0), picture(1)], image_prompt_scale=0), before)
    assert torch.equal(ours(two, image_prompt=ImagePrompt(picture(), 0, adapter=1)), before)
    request = minidiff.Request("x", image_prompt=[picture(0), picture(1)], image_prompt_scale=[0, 1])
    inputs = image_inputs(request, two, two.unet.positions(8, 8), negative=True)
    assert {name.split(".")[1] for name in inputs} == {"1"}
    assert tiny_model.adapters == () and "to_k_ip" not in " ".join(tiny_model.unet.state_dict())


def test_all_else_is_shared(tiny_model: minidiff.Model, two: minidiff.Model) -> None:
    old, new = dict(tiny_model.unet.named_parameters()), dict(two.unet.named_parameters())
    assert all(new[name] is old[name] for name in old)
    added = [name for name in new if name not in old]
    assert added and all("attn2.to_k_ip." in name or "attn2.to_v_ip." in name for name in added)
    assert two.image_adapters[0].encoder is two.image_adapters[1].encoder
    assert repr(two).count("image prompt") == 2


def test_a_picture_governs_its_box_alone(model: minidiff.Model) -> None:
    """One call of the UNet: the share of each cell is exact at every grid, and none outside."""
    prompt = ImagePrompt(picture(), box=(0.25, 0.0, 0.625, 1.0))
    request = minidiff.Request("x", image_prompt=prompt, image_prompt_scale=0.5)
    inputs = image_inputs(request, model, model.unet.positions(8, 8), negative=False)
    row = [0, 0, 0.5, 0.5, 0.5, 0, 0, 0]
    assert torch.equal(inputs["pictures.0.0.8x8"], torch.tensor(row).expand(1, 8, 8))
    assert torch.equal(inputs["pictures.0.0.4x4"][0, 0], torch.tensor([0, 0.5, 0.25, 0]))


def test_images_of_a_batch_equal_each_alone(two: minidiff.Model) -> None:
    prompts = [ImagePrompt(picture(0), box=LEFT, adapter=0), ImagePrompt(picture(1), adapter=1)]
    call = {**CALL, "model": two, "image_prompt": prompts}
    together = minidiff.generate(["a circle", "a blue circle"], **{**call, "seed": [3, 4]}).images
    for i, (prompt, seed) in enumerate([("a circle", 3), ("a blue circle", 4)]):
        alone = minidiff.generate(prompt, **{**call, "seed": seed}).images
        assert (together[i] - alone[0]).abs().max() < 1 / 255


def test_the_maps_are_those_of_the_text(two: minidiff.Model) -> None:
    """In the first layer, before any picture has been added, they are as without one; recording changes no picture."""
    record = minidiff.Record(minidiff.cross, minidiff.ALL)
    call = {**CALL, "model": two, "image_prompt": [picture(0), picture(1)], "steps": 1, "spacing": "trailing"}
    with_pictures = minidiff.generate("a red circle", **call, attention=record)
    without = minidiff.generate("a red circle", **{**call, "image_prompt": None}, attention=record)
    assert relative_error(with_pictures.images, minidiff.generate("a red circle", **call).images) < 1e-5
    first, *others = two.unet.sites[1::2]
    maps, before = with_pictures.attention.maps, without.attention.maps
    assert torch.equal(maps[first], before[first]) and maps[first].shape[-1] == 77
    assert all(relative_error(maps[site], before[site]) > 1e-4 for site in others)


def test_guidance_sees_the_pictures_of_the_conditional_half(two: minidiff.Model) -> None:
    """Its first look equals one at the maps of a pass with the conditional tokens alone."""
    once = minidiff.Guidance(steps=1, iterations=1)
    call = {**CALL, "model": two, "boxes": {"red circle": LEFT}, "guidance": once}
    one = minidiff.generate("a red circle", **call, image_prompt=[picture(0), picture(1)])
    alone = minidiff.generate("a red circle", **{**call, "guidance_scale": 1}, image_prompt=[picture(0), picture(1)])
    none = minidiff.generate("a red circle", **call)
    assert torch.equal(one.reports[0].loss[:1], alone.reports[0].loss[:1])
    assert not torch.allclose(one.reports[0].loss[:1], none.reports[0].loss[:1])


def test_each_text_that_and_joins_sees_the_pictures(two: minidiff.Model) -> None:
    """A text joined to itself, half each, is the text."""
    call = {**CALL, "model": two, "image_prompt": [ImagePrompt(picture(0), box=LEFT), picture(1)], "syntax": "a1111"}
    whole, halves = (minidiff.generate(text, **call).images for text in ("a circle", "a circle :0.5 AND a circle :0.5"))
    assert (whole - halves).abs().max() < 0.1 / 255


def test_edits_act_on_the_text_alone(model: minidiff.Model) -> None:
    """Without text the picture still has an effect."""

    def nothing(site: minidiff.Site, probs: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.zeros_like(probs)

    edit = minidiff.Edit(minidiff.cross, probs=nothing, rows="all")
    found = [ours(model, edits=edit, image_prompt=image) for image in (picture(0), picture(1), None)]
    assert all((found[0] - other).abs().max() > 1 / 255 for other in found[1:])


def test_other_weights_go_on_it(model: minidiff.Model) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k_ip.0.weight"
    new = minidiff.with_weights(model.unet, {name: 2 * model.unet.get_parameter(name).detach()})
    assert (
        ours(replace(model, unet=new), image_prompt=picture()) - ours(model, image_prompt=picture())
    ).abs().max() > 0
    assert torch.equal(ours(replace(model, unet=new)), ours(model))


def test_what_a_picture_may_be(model: minidiff.Model, tmp_path: Path) -> None:
    image = picture()
    image.save(tmp_path / "cat.png")
    expected = ours(model, image_prompt=image)
    for same in (tmp_path / "cat.png", str(tmp_path / "cat.png"), np.asarray(image), {"image": image, "scale": 1}):
        assert torch.equal(ours(model, image_prompt=same), expected)
    assert replace(ImagePrompt(tmp_path / "cat.png"), scale=0.5).name == "cat.png"
    assert ImagePrompt(image).fingerprint == plain(image)


def test_half_precision(tiny_folder: Path, files: Mapping[str, Path], encoder_folder: Path) -> None:
    model = minidiff.load(tiny_folder, dtype="bfloat16", device="cpu")
    two = with_image_prompt(with_image_prompt(model, files["plus"], encoder_folder), files["plain"], encoder_folder)
    assert {parameter.dtype for parameter in two.unet.parameters()} == {torch.bfloat16}
    found = ours(two, image_prompt=[ImagePrompt(picture(), box=LEFT), picture()])
    assert found.isfinite().all() and not torch.equal(found, ours(model))


def test_packed_layers_keep_their_numbers(tiny_folder: Path, files: Mapping[str, Path], encoder_folder: Path) -> None:
    """Those of new layers are their own; old graphs, which know layers by number, remain valid."""

    def numbers(model: minidiff.Model) -> dict[str, int | None]:
        return {name: layer.number for name, layer in model.unet.named_modules() if isinstance(layer, Packed)}

    base = minidiff.load(tiny_folder, dtype="float32", device="cpu", compile=True)
    first = numbers(base)
    one = with_image_prompt(base, files["plain"], encoder_folder)
    second = numbers(one)
    third = numbers(with_image_prompt(one, files["plus"], encoder_folder))
    assert (numbers(base), numbers(one)) == (first, second)
    assert first.items() < second.items() < third.items()
    assert None not in third.values() and len(set(third.values())) == len(third)


@pytest.mark.slow
def test_compiled_in_one_graph_for_all_pictures(
    tiny_folder: Path, files: Mapping[str, Path], encoder_folder: Path, two: minidiff.Model
) -> None:
    """No break, no graph for a new picture, scale or box; the base's graphs stay as they are."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate, "_flags", lambda device: {"fullgraph": True, "dynamic": False, "backend": counter})
        base = minidiff.load(tiny_folder, dtype="float32", device="cpu", compile=True)
        before = ours(base)
        new = with_image_prompt(with_image_prompt(base, files["plain"], encoder_folder), files["plus"], encoder_folder)
    for prompts in ([picture(0), picture(1)], [picture(1), ImagePrompt(picture(2), 0.5, LEFT)]):
        assert (ours(new, image_prompt=prompts) - ours(two, image_prompt=prompts)).abs().max() < 1 / 255
        assert counter.frame_count == 2
    assert torch.equal(ours(base), before)
    assert counter.frame_count == 2


# ---- errors


def changed(path: Path, target: Path, change: Any) -> Path:
    state = load_file(path)
    save_file(change(state), target)
    return target


def _without(name: str) -> Any:
    return lambda state: {key: value for key, value in state.items() if key != name}


def _resized(suffix: str, *shape: int) -> Any:
    return lambda state: {k: torch.zeros(shape) if k.endswith(suffix) else v for k, v in state.items()}


WRONG = {
    "SDXL": (
        "plain",
        _resized("_ip.weight", 32, 2048),
        "Stable Diffusion XL makes tokens 2048 wide, and the model's are 64",
    ),
    "FaceID": (
        "plain",
        lambda s: {
            "image_proj.norm.weight": s["image_proj.norm.weight"],
            "image_proj.proj.0.weight": torch.zeros(2, 2),
        },
        "FaceID",
    ),
    "FaceID plus": ("plain", lambda s: s | {"ip_adapter.0.to_q_lora.down.weight": torch.zeros(4, 4)}, "FaceID"),
    "a LoRA": (
        "plain",
        lambda s: {"lora_unet_x.lora_down.weight": torch.zeros(4, 4)},
        "is not an IP-Adapter; by its tensors, it is: LoRA",
    ),
    "a missing layer": ("plain", _without("ip_adapter.3.to_v_ip.weight"), r"missing ip_adapter\.3\.to_v_ip\.weight"),
    "an unknown key": ("plain", lambda s: s | {"image_proj.more": torch.zeros(1)}, r"unexpected image_proj\.more"),
    "no projection": (
        "plain",
        lambda s: {k: v for k, v in s.items() if "image_proj" not in k},
        "image_proj holds nothing",
    ),
    "half a resampler": ("plus", _without("image_proj.proj_in.weight"), r"image_proj\.proj_in\.weight is missing"),
    "odd heads": ("plus", _resized("to_q.weight", 100, 48), "queries are 100 wide; expected a multiple of 64"),
    "flat latents": ("plus", _resized("latents", 6), "make no sense"),
    "another shape": (
        "plain",
        _resized("ip_adapter.1.to_k_ip.weight", 5, WIDTH),
        r"ip_adapter\.1\.to_k_ip\.weight has shape",
    ),
    "another UNet's layers": ("plain", _without("ip_adapter.1.to_k_ip.weight"), "missing"),
    "NaN": (
        "plain",
        lambda s: s | {"ip_adapter.1.to_k_ip.weight": torch.full((32, WIDTH), float("nan"))},
        "not finite.*ip_adapter.1.to_k_ip",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_named(
    name: str, tmp_path: Path, tiny_model: minidiff.Model, files: Mapping[str, Path], encoder_folder: Path
) -> None:
    kind, change, message = WRONG[name]
    path = changed(files[kind], tmp_path / "adapter.safetensors", change)
    with pytest.raises(ValueError, match=rf"(?s)adapter\.safetensors.*{message}"):
        with_image_prompt(tiny_model, path, encoder_folder)


def test_a_pickle_is_refused_with_a_recipe_that_works(
    tmp_path: Path, tiny_model: minidiff.Model, files: Mapping[str, Path], encoder_folder: Path
) -> None:
    """The older files hold two nested dictionaries."""
    nested: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in load_file(files["plus"]).items():
        part, _, name = key.partition(".")
        nested[part][name] = value
    torch.save(nested, tmp_path / "ip-adapter.bin")
    with pytest.raises(ValueError, match="is a pickle") as caught:
        with_image_prompt(tiny_model, tmp_path / "ip-adapter.bin", encoder_folder)
    exec(str(caught.value).split("in Python: ")[1], {})
    model = with_image_prompt(tiny_model, tmp_path / "ip-adapter.safetensors", encoder_folder)
    expected = with_image_prompt(tiny_model, files["plus"], encoder_folder)
    assert torch.equal(ours(model, image_prompt=picture()), ours(expected, image_prompt=picture()))


def test_files_that_cannot_be_read_are_named(
    tmp_path: Path, tiny_model: minidiff.Model, files: Mapping[str, Path], encoder_folder: Path
) -> None:
    (tmp_path / "cut.safetensors").write_bytes(files["plain"].read_bytes()[:-100])
    for name, message in (
        ("cut.safetensors", "too few"),
        ("none.safetensors", "not there"),
    ):
        with pytest.raises(ValueError, match=message):
            with_image_prompt(tiny_model, tmp_path / name, encoder_folder)
    for wrong in ((None, files["plain"]), (tiny_model, 7)):
        with pytest.raises(ValueError, match="expected"):
            with_image_prompt(*wrong, encoder_folder)


def test_wrong_image_encoders_are_named(
    tmp_path: Path, tiny_model: minidiff.Model, files: Mapping[str, Path], encoder_folder: Path
) -> None:
    config = json.loads((encoder_folder / "config.json").read_text())
    for change, message in (
        ({"hidden_size": 16}, "embeddings.class_embedding has shape"),
        ({"model_type": "siglip_vision_model"}, "model_type is not 'clip_vision_model'"),
        ({"image_size": None}, "image_size is None"),
        ({"num_attention_heads": 5}, "must be a multiple of 5"),
        ({"hidden_act": "tanh"}, "hidden_act"),
        (None, "config.json is not there"),
    ):
        folder = tmp_path / "encoder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(encoder_folder, folder)
        (folder / "config.json").unlink()
        if change is not None:
            (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            with_image_prompt(tiny_model, files["plain"], folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"crop_size": 16, "size": {"shortest_edge": 16}}))
    with pytest.raises(ValueError, match="gives 16 pixels, the image encoder reads 32"):
        with_image_prompt(tiny_model, files["plain"], folder)
    for wrong in (7, "", "no/such/encoder"):
        with pytest.raises(ValueError, match=r"image_encoder is|not in the hub's cache"):
            with_image_prompt(tiny_model, files["plain"], wrong)


@pytest.mark.parametrize(("kind", "size"), [("plain", {"projection_dim": 16}), ("plus", {"hidden_size": 16})])
def test_a_vision_model_of_another_width_is_named(
    kind: str, size: dict[str, int], tmp_path: Path, tiny_model: minidiff.Model, files: Mapping[str, Path]
) -> None:
    sizes = {"hidden_size": HIDDEN, "projection_dim": EMBEDDING} | size
    config = CLIPVisionConfig(**sizes, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=32)
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    (name,) = size
    with pytest.raises(ValueError, match=f"trained with a vision model whose {name} is .* is 16"):
        with_image_prompt(tiny_model, files[kind], tmp_path)


def test_wrong_image_prompts_are_named(tiny_model: minidiff.Model, two: minidiff.Model, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_text("no picture")
    three = [picture(i) for i in range(3)]
    for given, message in (
        ({"image_prompt": tmp_path / "none.png"}, r"image_prompt cannot be read: .*none\.png"),
        ({"image_prompt": tmp_path / "no.png"}, "cannot identify image"),
        ({"image_prompt": 7}, "image_prompt cannot be read: the picture is 7"),
        ({"image_prompt": []}, "image_prompt is an empty list"),
        ({"image_prompt": {"picture": picture()}}, "expected a mapping with image"),
        ({"image_prompt": {"image": picture(), "scale": "much"}}, "image_prompt: scale is 'much'"),
        ({"image_prompt": {"image": picture(), "box": (0, 0, 2, 1)}}, "image_prompt: box .* outside"),
        ({"image_prompt": {"image": picture(), "box": {"boxes": LEFT, "weight": 2}}}, "without a weight"),
        ({"image_prompt": {"image": picture(), "box": {"boxes": None}}}, "expected a box"),
        ({"image_prompt": {"image": picture(), "adapter": -1}}, "image_prompt: adapter is -1"),
        ({"image_prompt": three}, "image_prompt holds 3 pictures for 2 adapters"),
        ({"image_prompt": ImagePrompt(picture(), adapter=2)}, "names adapter 2; the model has 2"),
        ({"image_prompt": three[:2], "image_prompt_scale": [1, 1, 1]}, "holds 3 numbers for 2 adapters"),
        ({"image_prompt": three[:2], "image_prompt_scale": "much"}, "image_prompt_scale is 'much'"),
        ({"image_prompt": three[:2], "image_prompt_scale": [1, float("nan")]}, "image_prompt_scale is nan"),
        ({"image_prompt_scale": 0.5}, "there is no image_prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(two, **given)
    with pytest.raises(ValueError, match="the model has no IP-Adapter; expected one from minidiff.with_image_prompt"):
        ours(tiny_model, image_prompt=picture())


# ---- the command line and a picture's recipe


def test_the_command_line_and_the_recipe(
    tiny_folder: Path,
    files: Mapping[str, Path],
    encoder_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: minidiff.Model,
) -> None:
    picture(0).save(tmp_path / "cat.png")
    picture(1).save(tmp_path / "dog.png")
    adapter = ["--ip-adapter", str(files["plain"]), "--image-encoder", str(encoder_folder)]
    where = ["--model", str(tiny_folder), "--dtype", "float32", "--device", "cpu"]
    cat, dog = (f"{tmp_path / name}.png" for name in ("cat", "dog"))
    shown = ["--image-prompt", f"{cat}=0,0,0.5,1", "--image-prompt", dog, "--image-prompt-scale", "0.5"]
    asked = ["a red circle", "--steps", "2", "--seed", "4", "--sampler", "ddim", "--guidance-scale", "5"]
    out = ["--out", str(tmp_path / "made.png")]
    assert main(["generate", *asked, *where, *adapter, *shown, *out]) == 0
    prompts = [ImagePrompt(picture(0), box=LEFT), picture(1)]
    expected = minidiff.generate(
        "a red circle", model=model, image_prompt=prompts, image_prompt_scale=0.5, **{**CALL, "output": "pil"}
    )
    made = np.asarray(Image.open(tmp_path / "made.png"))
    assert np.array_equal(made, np.asarray(expected.image))

    arguments, info = expected.parameters[0], expected.info
    kept = read_metadata(tmp_path / "made.png")
    assert kept.arguments["image_prompt"][0] == arguments["image_prompt"][0] | {"name": "cat.png"}
    assert kept.arguments["image_prompt"][0]["box"] == [[0, 0, 0.5, 1]]
    assert len(kept.arguments["image_prompt"][1]["image"]["tensor"]["sha256"]) == 64
    assert kept.info["adapters"] == info["adapters"] and not kept.reproducible
    assert info["adapters"][0]["sha256"] == hashlib.sha256(files["plain"].read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="placeholder for a picture"):
        minidiff.Request.from_plain(kept.arguments)

    again = ["--from", str(tmp_path / "made.png"), *where, *adapter, "--out", str(tmp_path / "again.png")]
    capsys.readouterr()
    assert main(["generate", *again]) == 2
    assert "pass --image-prompt cat.png=0.0,0.0,0.5,1.0 (whose pixels have the sha256" in capsys.readouterr().err
    assert main(["generate", *again, *shown[:4]]) == 0
    assert "image will differ" not in (said := capsys.readouterr().err) and "other image prompts" not in said
    assert np.array_equal(made, np.asarray(Image.open(tmp_path / "again.png")))
    assert main(["generate", *again, "--image-prompt", dog]) == 0
    assert "was made with other image prompts than these" in capsys.readouterr().err


def test_info_tells_what_an_adapter_is_for(
    files: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = {
        "plain": ("a picture's embedding, 24 wide", "tokens: 4"),
        "plus": ("a picture's patches, 32 wide", "tokens: 6"),
        "full": ("a picture's patches, 32 wide", "tokens: one per patch"),
    }
    for kind, words in expected.items():
        assert main(["info", str(files[kind])]) == 0
        said = capsys.readouterr().out
        assert all(word in said for word in (*words, "width: 64", "kind: IP-Adapter"))
    sdxl = changed(files["plus"], tmp_path / "sdxl.safetensors", _resized("_ip.weight", 32, 2048))
    assert main(["info", str(sdxl)]) == 0
    assert "kind: IP-Adapter of Stable Diffusion XL" in capsys.readouterr().out
    face = changed(files["plus"], tmp_path / "face.safetensors", WRONG["FaceID plus"][1])
    assert main(["info", str(face)]) == 0
    assert "is a FaceID adapter" in capsys.readouterr().out


def test_wrong_flags_are_named_before_anything_is_loaded(
    files: Mapping[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture().save(tmp_path / "cat.png")
    shown = ["--image-prompt", str(tmp_path / "cat.png")]
    both = ["--image-encoder", "vision"]
    for flags, message in (
        (shown, "--image-prompt needs an IP-Adapter"),
        ([*shown, "--ip-adapter", str(files["plain"])], "expected both"),
        (["--ip-adapter", str(tmp_path / "none.safetensors"), *both], "none.safetensors is not there"),
        (["--image-prompt", str(tmp_path / "none.png")], "--image-prompt cannot be read"),
        ([*shown, "--image-prompt-scale", "much"], "expected numbers"),
    ):
        assert main(["generate", "a cat", "--model", "no/such", *flags]) == 2
        assert message in capsys.readouterr().err


def test_a_step_with_pictures_does_not_go_on_with_a_look(
    model: minidiff.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would do without them."""
    monkeypatch.setattr(accelerate, "_RESUMED", 0)
    finished = list[object]()
    monkeypatch.setattr(UNet, "finish", lambda *given: finished.append(given))
    guidance = minidiff.Guidance(minidiff.layout_loss, threshold=1e9)
    ours(model, boxes={"circle": LEFT}, image_prompt=picture(1), guidance=guidance)
    assert finished == []
