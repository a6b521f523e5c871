"""The safety checker: loading from folders, its decisions against diffusers', and the handling of flagged images."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
from ldm import write_single_file
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear
from transformers import CLIPConfig, CLIPImageProcessor

import minidiff
from minidiff.cli.main import main
from minidiff.pictures import clip_pixels
from minidiff.png.read import read_metadata

EDGE = 32
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": EDGE, "patch_size": 8}
WEIGHTS = "safety_checker/model.safetensors"
CONFIG = "safety_checker/config.json"
READING = "feature_extractor/preprocessor_config.json"


def pictures(count: int) -> list[Image.Image]:
    """Random pictures of random sizes: coarse, so that they differ after resizing."""
    found = []
    for _ in range(count):
        small = torch.randint(0, 256, (3, 3, 3), dtype=torch.uint8).numpy()
        width, height = torch.randint(20, 90, (2,)).tolist()
        found.append(Image.fromarray(small).resize((width, height)))
    return found


@pytest.fixture(scope="session")
def reference() -> StableDiffusionSafetyChecker:
    """diffusers' checker with random weights, which flags about half of random pictures."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=VISION, projection_dim=16)).eval()
        for value in checker.parameters():
            value.data = torch.randn(value.shape) * (0.5 if value.ndim > 1 else 0.1)
        with torch.no_grad():
            embeddings = checker.visual_projection(checker.vision_model(read(pictures(50))).pooler_output)
        for name, often in (("concept_embeds", 0.95), ("special_care_embeds", 0.9)):
            close = cosine_distance(embeddings, getattr(checker, name))
            getattr(checker, f"{name}_weights").data = close.quantile(often, dim=0)
    return checker


def read(images: list[Image.Image]) -> Tensor:
    processor = CLIPImageProcessor(size={"shortest_edge": EDGE}, crop_size={"height": EDGE, "width": EDGE})
    return processor(images, return_tensors="pt").pixel_values


def decide(reference: StableDiffusionSafetyChecker, images: list[Image.Image]) -> tuple[bool, ...]:
    return tuple(reference(read(images), np.zeros((len(images), 2, 2, 3)))[1])


@pytest.fixture
def folder(tiny_folder: Path, reference: StableDiffusionSafetyChecker, tmp_path: Path) -> Path:
    target = tmp_path / "tiny"
    shutil.copytree(tiny_folder, target)
    save_checker(reference, target)
    return target


def save_checker(reference: StableDiffusionSafetyChecker, target: Path) -> None:
    """In the layout of Stable Diffusion 1.5's repository: the keys of transformers before 5.6, a config that is silent
    where CLIP's defaults hold."""
    (target / "safety_checker").mkdir()
    (target / "feature_extractor").mkdir()
    inner, outer = "vision_model.vision_model.", "vision_model."
    old = {
        inner + k.removeprefix(inner).removeprefix(outer): v for k, v in reference.state_dict().items() if outer in k
    }
    own = {key: value for key, value in reference.state_dict().items() if outer not in key}
    position = {f"{inner}embeddings.position_ids": torch.arange((EDGE // 8) ** 2 + 1)[None]}
    save_file({k: v.contiguous() for k, v in (old | own | position).items()}, target / WEIGHTS)
    (target / CONFIG).write_text(json.dumps({"projection_dim": 16, "vision_config": VISION}))
    (target / READING).write_text(json.dumps({"size": EDGE, "crop_size": EDGE, "resample": 3}))


def load(source: Path, safety: bool | str | Path = True, **arguments: str) -> minidiff.Model:
    return minidiff.load(source, safety=safety, dtype="float32", device="cpu", **arguments)


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---- decisions


def test_pixels_are_those_of_clip() -> None:
    images = pictures(8)
    torch.testing.assert_close(clip_pixels(images, EDGE), read(images), rtol=0, atol=2e-6)


def test_decisions_are_those_of_diffusers(folder: Path, reference: StableDiffusionSafetyChecker) -> None:
    checker, images = load(folder).safety, pictures(50)
    assert checker is not None
    expected = decide(reference, images)
    assert 10 < sum(expected) < 40
    assert checker(images) == expected
    careful = replace(checker, special_thresholds=torch.ones(3))
    assert sum(careful(images)) < sum(expected)  # the special concepts had an effect


@pytest.mark.parametrize("special", ["off", "on", "near"])
def test_decisions_close_to_the_thresholds(special: str, folder: Path, reference: StableDiffusionSafetyChecker) -> None:
    checker, (image,) = load(folder).safety, pictures(1)
    assert checker is not None
    with torch.no_grad():
        embedding = reference.visual_projection(reference.vision_model(read([image])).pooler_output)
        nearest = cosine_distance(embedding, reference.concept_embeds)[0]
        careful = cosine_distance(embedding, reference.special_care_embeds)[0]
    theirs = StableDiffusionSafetyChecker(reference.config).eval()
    theirs.load_state_dict(reference.state_dict())
    found, expected = [], []
    for above in (-0.0016, -0.0006, -0.0004, 0.0004, 0.0006, 0.0016, 0.0094, 0.0096, 0.0104, 0.0106):
        # near: only a special concept that counts brings the others, 0.005 below their thresholds, above them
        thresholds = nearest + (0.005 if special == "near" else above)
        close = careful + above if special == "near" else torch.full((3,), -1.0 if special == "on" else 1.0)
        theirs.concept_embeds_weights.data, theirs.special_care_embeds_weights.data = thresholds, close
        found.append(replace(checker, thresholds=thresholds, special_thresholds=close)([image]))
        expected.append(decide(theirs, [image]))
    assert found == expected
    assert len(set(expected)) == 2


def test_half_precision_keeps_the_thresholds(folder: Path) -> None:
    full, half = load(folder).safety, minidiff.load(folder, safety=True, dtype="bfloat16", device="cpu").safety
    assert full is not None and half is not None
    assert half.vision.dtype == half.projection.dtype == torch.bfloat16
    assert torch.equal(half.thresholds, full.thresholds)
    images = pictures(12)
    assert sum(a != b for a, b in zip(full(images), half(images), strict=True)) <= 2


# ---- a run


def flagging(model: minidiff.Model, always: bool) -> minidiff.Model:
    assert model.safety is not None
    return replace(model, safety=replace(model.safety, thresholds=torch.full((17,), -2.0 if always else 2.0)))


@pytest.mark.parametrize("output", ["pil", "numpy", "tensor", "latents"])
def test_a_result_says_what_was_flagged_and_keeps_the_images(output: str, folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    asked = {"seed": 3, "steps": 1, "spacing": "trailing", "images_per_prompt": 2, "output": output}
    plain = minidiff.generate("a", model=load(folder, safety=False), **asked)
    result = minidiff.generate("a", model=flagging(model, True), **asked)
    assert plain.flagged is None
    assert np.array_equal(np.stack(plain.images), np.stack(result.images))
    if output == "latents":
        assert result.flagged is None
        return
    assert result.flagged == (True, True) and result[1].flagged == (True,)
    assert minidiff.generate("a", model=flagging(model, False), **asked).flagged == (False, False)
    mixed = replace(result, flagged=(False, True))
    assert [entry["flagged"] for entry in mixed.plain()["images"]] == [False, True]
    first, second = mixed.save(tmp_path / "out")
    assert [read_metadata(path).info.get("flagged") for path in (first, second)] == [None, True]


def test_the_checker_sees_the_pixels_of_the_image(folder: Path) -> None:
    model = load(folder)
    assert model.safety is not None
    result = minidiff.generate("a", model=model, seed=3, steps=1, spacing="trailing", images_per_prompt=6)
    assert result.flagged == model.safety(result.images)


def test_the_command_line_writes_flagged_images_black(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["generate", "a cat", "--images", "4", "--seed", "0", "--steps", "1", "--spacing", "trailing"]
    line += ["--dtype", "float32", "--device", "cpu", "--model", str(folder)]
    model, asked = load(folder), {"images_per_prompt": 4, "seed": 0, "steps": 1, "spacing": "trailing"}
    images = minidiff.generate("a cat", model=model, **asked).images
    assert model.safety is not None
    with torch.no_grad():
        embeddings = linear(model.safety.vision(clip_pixels(images, EDGE)).pooler_output, model.safety.projection)
    close = cosine_distance(embeddings, model.safety.concepts[:1])[:, 0]
    thresholds = torch.full((17,), 2.0)
    thresholds[0] = close.sort().values[1] + 0.0002
    own = {"concept_embeds_weights": thresholds, "special_care_embeds_weights": 2 * torch.ones(3)}
    save_file(load_file(folder / WEIGHTS) | own, folder / WEIGHTS)
    expected = load(folder).safety(images)  # type: ignore[misc]
    assert 0 < sum(expected) < 4
    assert main([*line, "--out", str(tmp_path / "checked"), "--safety"]) == 0
    out, err = capsys.readouterr()
    assert f"note: {sum(expected)} of 4 images are written black: the safety checker flagged them" in err
    for path, image, black in zip(out.split(), images, expected, strict=True):
        written = np.asarray(Image.open(path))
        assert np.array_equal(written, np.zeros_like(written) if black else np.asarray(image))
        assert main(["info", path]) == 0
        assert ("flagged: true" in capsys.readouterr().out) == black
    assert main([*line, "--out", str(tmp_path / "plain")]) == 0
    out, err = capsys.readouterr()
    assert "black" not in err
    for path, image in zip(out.split(), images, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(image))


# ---- sources


def test_no_checker_unless_asked_for(folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    (folder / CONFIG).write_text("broken")
    assert load(folder, safety=False).safety is None
    assert minidiff.load(folder, dtype="float32").safety is None


def test_the_keys_of_newer_files_and_the_checker_of_another_folder(
    folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    weights, images = load_file(folder / WEIGHTS), pictures(10)
    expected = load(folder).safety
    assert expected is not None
    newer = {key.replace("vision_model.vision_model.", "vision_model."): value for key, value in weights.items()}
    alone = tmp_path / "checker"  # as CompVis/stable-diffusion-safety-checker lies on the hub
    shutil.copytree(folder / "safety_checker", alone)
    shutil.copy(folder / READING, alone)
    save_file(newer, alone / "model.safetensors")
    single = write_single_file(tiny_folder, tmp_path / "model.safetensors")
    for source, safety in ((tiny_folder, folder), (tiny_folder, str(alone)), (single, folder)):
        arguments = {} if source == tiny_folder else {"tokenizer": str(tiny_folder / "tokenizer")}
        checker = load(source, safety, **arguments).safety
        assert checker is not None and checker(images) == expected(images)


def test_a_variant_that_the_checker_may_have(folder: Path) -> None:
    for part in ("unet", "vae", "text_encoder"):
        for path in (folder / part).glob("*.safetensors"):
            shutil.copy(path, path.with_suffix(".fp16.safetensors"))
    plain = load(folder, variant="fp16").safety
    half = {
        key: value.half() if value.is_floating_point() else value for key, value in load_file(folder / WEIGHTS).items()
    }
    save_file(
        half | {"concept_embeds_weights": torch.zeros(17).half()}, folder / "safety_checker/model.fp16.safetensors"
    )
    variant = load(folder, variant="fp16").safety
    assert plain is not None and plain.thresholds.all()
    assert variant is not None and not variant.thresholds.any()


def test_from_the_hub(folder: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend(f"{repo}@{revision}/{name}" for name in allow_patterns if "safety_checker" in name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    minidiff.load("a/model", dtype="float32", device="cpu")
    assert not asked
    assert minidiff.load("a/model", safety=True, revision="v2", dtype="float32", device="cpu").safety is not None
    assert asked == [f"a/model@v2/{CONFIG}", f"a/model@v2/{WEIGHTS}"]
    asked.clear()
    assert minidiff.load(tiny_folder, safety="b/model", dtype="float32", device="cpu").safety is not None
    assert asked == [f"b/model@None/{CONFIG}", f"b/model@None/{WEIGHTS}"]


# ---- errors


def test_a_single_file_and_the_bundled_model_have_none(tiny_folder: Path, tmp_path: Path) -> None:
    single = write_single_file(tiny_folder, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is a single file, which has no safety checker; pass a folder or a hub id"):
        minidiff.load(single, tokenizer=tiny_folder / "tokenizer", safety=True)
    for source in (tiny_folder, "minidiff/shapes"):
        with pytest.raises(ValueError, match=r"has no safety checker: .*safety_checker/config.json is not there; pass"):
            minidiff.load(source, safety=True)
    with pytest.raises(ValueError, match="has no safety checker"):
        load(tiny_folder, tiny_folder)


@pytest.mark.parametrize("safety", [None, "", 1, 0, ["a"]])
def test_a_wrong_argument(safety: object, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="safety is .*; expected True, a folder or a hub id"):
        load(tiny_folder, safety)  # type: ignore[arg-type]


def test_a_pickle_is_refused_with_the_recipe(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "safety_checker/pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"only pytorch_model.bin, a pickle, .*convert it once .*safety_checker/model.saf"
    ):
        load(folder)


def drop(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: weights.pop(key)


def put(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: weights.update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("concept_embeds"), "do not fit the safety checker .*\n  missing concept_embeds"),
        (put("concept_embeds", torch.zeros(16, 16)), r"concept_embeds has shape \[16, 16\], expected \[17, 16\]"),
        (put("extra", torch.zeros(1)), "unexpected extra"),
        (
            drop("vision_model.vision_model.pre_layrnorm.bias"),
            "image encoder .*\n  missing vision_model.pre_layrnorm.bias",
        ),
        (put("special_care_embeds_weights", torch.full((3,), torch.nan)), "not finite .*special_care_embeds_weights"),
        (put("vision_model.vision_model.pre_layrnorm.bias", torch.full((32,), torch.inf)), "not finite .*pre_layrnorm"),
    ],
    ids=["missing", "shape", "unexpected", "vision", "NaN threshold", "inf in the encoder"],
)
def test_weights_that_do_not_fit(change: Callable[[dict[str, Tensor]], object], message: str, folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_truncated_file(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut short or damaged"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (CONFIG, {"vision_config": None}, "vision_config is None; expected an object"),
        (CONFIG, {"vision_config": VISION | {"hidden_act": "relu"}}, "hidden_act is 'relu'; expected one of"),
        (CONFIG, {"vision_config": VISION | {"num_attention_heads": 5}}, "hidden_size 32 must be a multiple of 5"),
        (CONFIG, {"vision_config": VISION | {"num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000; expected"),
        (CONFIG, {"vision_config": VISION | {"image_size": 64}}, "do not fit the image encoder .*position_embedding"),
        (READING, {"size": 64, "crop_size": 64}, "image encoder reads 32 pixels, its feature extractor gives 64"),
        (READING, {"crop_size": 16}, "size 32, crop_size 16, .*expected CLIP's"),
        (READING, {"do_center_crop": False}, "expected CLIP's"),
        (READING, {"resample": 2}, "resample 2; expected CLIP's"),
        (READING, {"size": {"height": 32, "width": 32}}, "expected CLIP's"),
        (READING, {"image_std": [0.2, 0.2]}, "expected three numbers each"),
        (READING, {"image_mean": "none"}, "image_mean is 'none'"),
    ],
)
def test_configs_of_something_else(file: str, values: dict[str, object], message: str, folder: Path) -> None:
    change_json(folder / file, **values)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load(folder)


def test_a_folder_without_its_feature_extractor(folder: Path) -> None:
    (folder / READING).unlink()
    with pytest.raises(ValueError, match=r"feature_extractor/preprocessor_config.json is not there"):
        load(folder)


def test_the_file_of_a_checker_is_no_model(folder: Path) -> None:
    with pytest.raises(ValueError, match="it is a safety checker; it checks images; pass its folder as safety="):
        minidiff.load(folder / WEIGHTS)
