"""Pictures in: image to image and inpainting against diffusers' pipelines on the same weights, and their manners."""

import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet
from diffusers import UNet2DConditionModel
from PIL import Image

import minidiff
from minidiff.cli.main import main
from minidiff.model import Model
from minidiff.noise import Noise
from minidiff.pictures import fitted, opaque, read_mask, read_picture

SAMPLERS = {
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}
MORE = {
    "heun": diffusers.HeunDiscreteScheduler,
    "dpm2_ancestral": diffusers.KDPM2AncestralDiscreteScheduler,
    "dpmpp_2s": diffusers.DPMSolverSinglestepScheduler,
    "deis": diffusers.DEISMultistepScheduler,
    "uni_pc": diffusers.UniPCMultistepScheduler,
}
SIZE = {"width": 48, "height": 32}


def picture(seed: int = 0, width: int = 48, height: int = 32) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def half(width: int = 48, height: int = 32) -> Image.Image:
    """A mask that paints the left half."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 255
    return Image.fromarray(mask)


@pytest.fixture(scope="module")
def nine(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny folder with the UNet of an inpainting model."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("nine") / "nine")
    config = json.loads((folder / "unet/config.json").read_text()) | {"in_channels": 9}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def nine_model(nine: Path) -> Model:
    return minidiff.load(nine, dtype="float32", device="cpu")


def pipeline(kind: type, folder: Path) -> diffusers.DiffusionPipeline:
    found = kind.from_pretrained(folder)
    found.set_progress_bar_config(disable=True)
    found.folder_config = dict(found.scheduler.config)
    return found


@pytest.fixture(scope="module")
def image_to_image(tiny_folder: Path) -> diffusers.DiffusionPipeline:
    return pipeline(diffusers.StableDiffusionImg2ImgPipeline, tiny_folder)


@pytest.fixture(scope="module")
def inpaint(tiny_folder: Path) -> diffusers.DiffusionPipeline:
    return pipeline(diffusers.StableDiffusionInpaintPipeline, tiny_folder)


@pytest.fixture(scope="module")
def inpaint_nine(nine: Path) -> diffusers.DiffusionPipeline:
    return pipeline(diffusers.StableDiffusionInpaintPipeline, nine)


def reference(found: diffusers.DiffusionPipeline, sampler: str, seeds: list[int], **options: object) -> np.ndarray:
    found.scheduler = (SAMPLERS | MORE)[sampler].from_config(found.folder_config)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return np.stack([np.asarray(image) for image in found(generator=generators, **options).images])


def assert_equal(result: minidiff.Result, expected: np.ndarray) -> None:
    found = np.stack([np.asarray(image) for image in result.images]).astype(int)
    assert found.shape == expected.shape
    assert expected.std() > 5
    assert np.abs(found - expected).max() <= 1


# ---- against diffusers


def slowly(*values: float) -> list[ParameterSet]:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("strength", [0.3, 0.9, *slowly(0.8, 1.0)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_to_image_equals_diffusers(image_to_image, tiny_model: Model, sampler: str, strength: float) -> None:
    options = {"image": picture(), "strength": strength, "guidance_scale": 5.0}
    expected = reference(image_to_image, sampler, [3], prompt="a cat", num_inference_steps=10, **options)
    assert_equal(minidiff.generate("a cat", model=tiny_model, sampler=sampler, steps=10, seed=3, **options), expected)


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sampler", MORE)
def test_further_samplers(sampler: str, masked: bool, tiny_model: Model, request: pytest.FixtureRequest) -> None:
    theirs = request.getfixturevalue("inpaint" if masked else "image_to_image")
    options = {"image": picture(), "strength": 0.55}
    given = {"mask_image": half(), **SIZE} if masked else {}
    expected = reference(theirs, sampler, [3], prompt="a cat", num_inference_steps=16, **options, **given)
    options |= {"mask": half(), "paste": False} if masked else {}
    assert_equal(minidiff.generate("a cat", model=tiny_model, sampler=sampler, steps=16, seed=3, **options), expected)


@pytest.mark.parametrize("strength", [0.9, *slowly(0.5, 1.0)])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting_equals_diffusers(
    channels: int,
    sampler: str,
    strength: float,
    tiny_model: Model,
    nine_model: Model,
    request: pytest.FixtureRequest,
) -> None:
    theirs = request.getfixturevalue("inpaint" if channels == 4 else "inpaint_nine")
    options = {"strength": strength, "guidance_scale": 5.0, **SIZE}
    given = {"image": picture(1), "mask_image": half()}
    expected = reference(theirs, sampler, [4], prompt="a cat", num_inference_steps=10, **options, **given)
    model = tiny_model if channels == 4 else nine_model
    result = minidiff.generate(
        "a cat", model=model, sampler=sampler, steps=10, seed=4, image=picture(1), mask=half(), paste=False, **options
    )
    assert_equal(result, expected)


def test_a_picture_and_a_mask_of_another_size_equal_diffusers(inpaint, tiny_model: Model) -> None:
    given = {"image": picture(1, 100, 60), "mask_image": half(30, 70)}
    expected = reference(inpaint, "ddim", [4], prompt="a cat", num_inference_steps=4, strength=0.8, **SIZE, **given)
    asked = {"image": picture(1, 100, 60), "mask": half(30, 70), "strength": 0.8, "paste": False}
    assert_equal(
        minidiff.generate("a cat", model=tiny_model, sampler="ddim", steps=4, seed=4, **asked, **SIZE), expected
    )


def test_the_size_is_the_pictures_rounded_down(image_to_image, tiny_model: Model) -> None:
    given = {"image": picture(2, 55, 37), "strength": 0.5}
    result = minidiff.generate("a cat", model=tiny_model, sampler="ddim", steps=4, seed=4, **given)
    assert result.images[0].size == (52, 36)  # the tiny model's latents are a quarter as wide
    given["image"] = given["image"].resize((52, 36), Image.Resampling.LANCZOS)
    assert_equal(result, reference(image_to_image, "ddim", [4], prompt="a cat", num_inference_steps=4, **given))


# ---- batches, and what a run does besides


@pytest.mark.parametrize("channels", [4, 9])
def test_image_i_of_a_batch_equals_image_i_alone(channels: int, tiny_model: Model, nine_model: Model) -> None:
    model = tiny_model if channels == 4 else nine_model
    masks = [half(), np.eye(32, 48) > 2]
    masks[1] = np.asarray(half())[:, ::-1] > 0
    shared = {"model": model, "sampler": "euler_ancestral", "steps": 4, "strength": 0.75, "paste": False}
    whole = minidiff.generate(
        ["a cat", "a dog"], image=[picture(1), picture(2)], mask=masks, images_per_prompt=2, seed=5, **shared
    )
    for i in range(4):
        alone = minidiff.generate(
            ["a cat", "a dog"][i // 2], image=picture(1 + i // 2), mask=masks[i // 2], seed=5 + i, **shared
        )
        assert_equal(alone, np.asarray(whole.images[i])[None])
    one = minidiff.generate(["a cat", "a dog"], image=picture(1), mask=half(), seed=[5, 5], **shared)
    assert_equal(one[0], np.asarray(whole.images[0])[None])


@pytest.mark.parametrize("output", ["pil", "numpy", "tensor"])
def test_outside_the_mask_are_the_pictures_own_pixels(output: str, tiny_model: Model) -> None:
    given = {"image": picture(1), "mask": half(), "steps": 2, "seed": 1, "model": tiny_model}
    pasted = minidiff.generate("a cat", output=output, **given)
    kept = np.asarray(pasted.png_bytes() and pasted.image)[:, 24:]
    assert np.array_equal(kept, np.asarray(picture(1))[:, 24:])
    free = np.asarray(minidiff.generate("a cat", paste=False, **given).images[0])
    assert np.array_equal(np.asarray(pasted.image)[:, :24], free[:, :24])
    assert not np.array_equal(kept, free[:, 24:])


def test_a_grey_mask_paints_where_it_is_at_least_half_white(tiny_model: Model) -> None:
    grey = np.full((32, 48), 127, np.uint8)
    grey[:16] = 128
    made = minidiff.generate(
        "a cat", image=picture(1), mask=Image.fromarray(grey), steps=2, seed=1, model=tiny_model, strength=1
    )
    same = (np.asarray(made.image) == np.asarray(picture(1))).all(2)
    assert same[16:].all() and same[:16].mean() < 0.1


def test_guidance_recording_and_early_stops(tiny_model: Model, nine_model: Model) -> None:
    boxes = {"cat": (0.0, 0.0, 0.5, 1.0)}
    for model in (tiny_model, nine_model):
        given = {"model": model, "image": picture(1), "mask": half(), "steps": 4, "strength": 0.5, "seed": 1}
        plain = minidiff.generate("a cat", **given)
        guided = minidiff.generate("a cat", boxes=boxes, attention=True, **given)
        assert guided.reports is not None and sum(guided.reports[0].iterations) > 0
        assert not np.array_equal(np.asarray(plain.images[0]), np.asarray(guided.images[0]))
        assert guided.attention is not None and guided.attention["cat"][0].shape == (4, 6)
        run = minidiff.sample_steps("a cat", **given)
        assert len(run) == 2
        preview = next(run).preview()
        assert preview.shape == (1, 3, 32, 48)
        stopped = run.result()
        assert stopped.info["stopped_after"] == 1
        assert np.array_equal(np.asarray(stopped.image)[:, 24:], np.asarray(picture(1))[:, 24:])


@pytest.mark.slow
def test_a_second_pass_at_a_larger_size(tiny_model: Model) -> None:
    request = minidiff.Request("a cat", model=tiny_model, steps=4, seed=1, boxes={"cat": (0, 0, 0.5, 1)})
    first = minidiff.generate(request)
    second = minidiff.generate(request, image=first.image, width=64, height=64, strength=0.5)
    assert second.image.size == (64, 64)
    assert second.parameters[0]["strength"] == 0.5 and second.parameters[0]["boxes"] == first.parameters[0]["boxes"]


def test_all_of_a_picture_painted_at_strength_1_is_text_to_image(tiny_model: Model) -> None:
    """From the noise that the pipelines draw after that of the picture's latents."""
    shared = {"model": tiny_model, "steps": 3, "output": "tensor"}
    noise = Noise.seeded(3, (4, 8, 12))
    start = [noise(), noise()][1]
    white = Image.new("L", (48, 32), 255)
    painted = minidiff.generate("a cat", image=picture(), mask=white, strength=1, seed=3, **shared).images
    torch.testing.assert_close(painted, minidiff.generate("a cat", latents=start, seed=3, **shared).images)


def test_a_picture_changes_nothing_where_there_is_none(tiny_model: Model) -> None:
    plain = minidiff.generate("a cat", model=tiny_model, steps=2, seed=1)
    assert not plain.parameters[0].keys() & {"image", "mask", "strength", "fit", "paste"}


# ---- pictures as people have them


def test_exif_orientation_and_transparency(tmp_path: Path) -> None:
    image = picture(3, 20, 10)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: 10 wide, 20 high
    image.save(tmp_path / "turned.png", exif=exif)
    turned = read_picture("image", tmp_path / "turned.png")
    assert turned.size == (10, 20)
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))
    assert read_picture("image", Image.open(tmp_path / "turned.png")).size == (10, 20)
    clear = image.copy()
    clear.putalpha(half(20, 10))
    clear.save(tmp_path / "clear.png")
    seen = np.asarray(opaque(read_picture("image", str(tmp_path / "clear.png"))))
    assert np.array_equal(seen[:, :10], np.asarray(image)[:, :10])
    assert (seen[:, 10:] == 255).all()


def test_the_alpha_of_a_picture_as_its_mask(tiny_model: Model) -> None:
    image = picture(1)
    image.putalpha(half())  # its right half is transparent
    given = {"model": tiny_model, "steps": 2, "seed": 1}
    right = Image.fromarray(255 - np.asarray(half()))
    expected = minidiff.generate("a cat", image=opaque(image), mask=right, **given)
    assert_equal(minidiff.generate("a cat", image=image, mask="alpha", **given), np.asarray(expected.images[0])[None])


def test_fits() -> None:
    image = picture(4, 60, 20)
    assert fitted(image, 40, 20, "crop").size == fitted(image, 40, 20, "pad").size == (40, 20)
    assert np.array_equal(np.asarray(fitted(image, 40, 20, "crop")), np.asarray(image)[:, 10:50])
    padded = np.asarray(fitted(image, 60, 40, "pad"))
    assert np.array_equal(padded[10:30], np.asarray(image))
    assert (padded[:10] == padded[10]).all() and (padded[30:] == padded[29]).all()
    mask = np.asarray(fitted(Image.new("L", (60, 20)), 60, 40, "pad", fill=255))
    assert (mask[10:30] == 0).all() and (mask[:10] == 255).all() and (mask[30:] == 255).all()
    for fit in ("crop", "pad"):
        for size in ((7, 90), (61, 21), (1, 1)):
            assert fitted(image, *size, fit).size == size


def test_outpainting(tiny_model: Model) -> None:
    """A mask that paints nothing of the picture, and all around it."""
    image, given = picture(1, 32, 32), {"model": tiny_model, "steps": 2, "seed": 1, "width": 64, "fit": "pad"}
    result = minidiff.generate("a cat", image=image, mask=np.zeros((32, 32)), height=32, **given)
    assert np.array_equal(np.asarray(result.image)[:, 16:48], np.asarray(image))


@pytest.mark.parametrize(
    "given",
    [
        np.asarray(half()),
        np.asarray(half()) > 0,
        torch.from_numpy(np.asarray(half()) / 255),
        half().convert("RGB"),
        half().convert("1"),
    ],
    ids=["uint8 of 0 and 255", "bool", "tensor", "RGB", "1 bit"],
)
def test_masks(given: object, tmp_path: Path) -> None:
    if isinstance(given, np.ndarray) and given.dtype == np.uint8:
        with pytest.raises(
            ValueError, match="mask is .*; expected an image, its path, or .H,W. of numbers from 0 to 1"
        ):
            read_mask("mask", given)
        return
    assert np.array_equal(np.asarray(read_mask("mask", given)), np.asarray(half()))


def test_pictures_are_read_when_the_request_is_made(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), picture(), np.asarray(picture())):
        request = minidiff.Request("a cat", image=given, strength=0.5)
        assert np.array_equal(np.asarray(request.image[0]), np.asarray(picture()))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no file": ({"image": "no/such.png"}, "image cannot be read: .*no/such.png"),
    "no picture": ({"image": __file__}, "image cannot be read: cannot identify image file"),
    "a number": ({"image": 7}, "image cannot be read: the picture is 7; expected one PIL image"),
    "empty": ({"image": np.zeros((0, 4, 3))}, "image cannot be read"),
    "16 bits": ({"image": Image.new("I;16", (32, 32))}, "its pixels have mode I;16; expected 8 bits per channel"),
    "placeholder": ({"image": {"tensor": {}}}, "image is .*, a placeholder for what a file could not hold"),
    "count": ({"image": [picture()] * 3}, "image holds 3 for 1 prompts; expected one for all, or one each"),
    "mask alone": ({"mask": half()}, "mask is given without image"),
    "strength alone": ({"strength": 0.5}, "strength is given without image"),
    "strength 0": ({"image": picture(), "strength": 0}, "strength is 0; expected a number above 0, at most 1"),
    "strength 2": ({"image": picture(), "strength": 2}, "strength is 2; expected a number above 0, at most 1"),
    "strength NaN": ({"image": picture(), "strength": float("nan")}, "strength is nan"),
    "no step": ({"image": picture(), "strength": 0.2, "steps": 4}, "strength is 0.2, which leaves none of 4 steps"),
    "mask range": ({"image": picture(), "mask": np.full((4, 4), 2.0)}, "mask is .*; expected an image, its path"),
    "mask NaN": ({"image": picture(), "mask": np.full((4, 4), np.nan)}, "mask is .*; expected an image, its path"),
    "mask black": ({"image": picture(), "mask": np.zeros((32, 48))}, "mask has nothing to paint; expected white"),
    "mask alpha": ({"image": picture(), "mask": "alpha"}, "mask has nothing to paint"),
    "mask size": (
        {"image": picture(), "mask": half(20, 20), "fit": "crop", "steps": 2},
        "mask is 20x20 pixels, image 48x32; expected the same size with fit='crop'",
    ),
    "fit": ({"image": picture(), "fit": "fill"}, "fit is 'fill'; expected one of resize, crop, pad"),
    "paste": ({"image": picture(), "paste": 1}, "paste is 1; expected True or False"),
    "latents": ({"image": picture(), "latents": torch.zeros(1, 4, 8, 8)}, "got both image and latents"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, tiny_model: Model) -> None:
    given, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        minidiff.generate("a cat", model=tiny_model, **given)


@pytest.mark.parametrize("given", [{}, {"image": picture()}])
def test_an_inpainting_model_needs_a_mask(given: dict[str, object], nine_model: Model) -> None:
    with pytest.raises(
        ValueError, match="is an inpainting model, which paints inside a mask; expected image= and mask="
    ):
        minidiff.generate("a cat", model=nine_model, **given)


def test_other_programs_keywords() -> None:
    for theirs, ours in (("init_image", "image"), ("mask_image", "mask"), ("denoising_strength", "strength")):
        with pytest.raises(TypeError, match=f"its name here is '{ours}'"):
            minidiff.generate("a cat", **{theirs: picture()})  # type: ignore[call-overload]


# ---- the command line


def test_the_recipe_of_a_picture_made_from_a_picture(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*argv: object) -> tuple[int, str, str]:
        code = main(["generate", *map(str, argv), "--dtype", "float32", "--device", "cpu"])
        return code, *capsys.readouterr()

    picture(1).save(tmp_path / "start.png")
    picture(2).save(tmp_path / "other.png")
    half().save(tmp_path / "mask.png")
    model = ("--model", tiny_folder)
    flags = ("--image", tmp_path / "start.png", "--mask", tmp_path / "mask.png")
    settings = ("--strength", "0.5", "--steps", "4", "--seed", "3", "--no-paste")
    assert run("a cat", *model, *flags, *settings, "--out", tmp_path / "made.png")[0] == 0
    made = Image.open(tmp_path / "made.png")
    assert "Denoising strength: 0.5" in made.text["parameters"]  # type: ignore[attr-defined]
    code, _, err = run("--from", tmp_path / "made.png", *model)
    assert (code, err) == (
        2,
        f"minidiff: error: {tmp_path}/made.png was made from a picture that it does not hold: "
        "pass --image and --mask\n",
    )
    code, _, err = run("--from", tmp_path / "made.png", *model, *flags, "--out", tmp_path / "again.png")
    assert (code, err) == (0, "")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again.png")), np.asarray(made))
    flags = ("--image", tmp_path / "other.png", *flags[2:])
    _, _, err = run("--from", tmp_path / "made.png", *model, *flags, "--out", tmp_path / "third.png")
    assert f"made.png was made from another picture than {tmp_path}/other.png" in err


# ---- a second pass


@pytest.mark.slow
def test_a_second_pass_is_image_to_image_of_each_image(tiny_model: Model) -> None:
    request = minidiff.Request(
        ["a cat", "a dog and a cat"],
        model=tiny_model,
        negative_prompt=["blur", ""],
        boxes=[None, {"a dog": (0, 0, 0.5, 1)}],
        guidance="layout",
        regions=[[minidiff.Region("a dog", (0, 0, 1, 0.5))], None],
        images_per_prompt=2,
        sampler="euler_ancestral",
        steps=1,
        spacing="trailing",
        seed=3,
        vary=(9, 0.2),
        **SIZE,
    )
    first = minidiff.generate(request)
    again = first.again(1.5, 1)
    assert again.seeds == first.seeds and all(image.size == (72, 48) for image in again.images)  # type: ignore[union-attr]
    alone = minidiff.generate(
        "a dog and a cat",
        model=tiny_model,
        negative_prompt="",
        boxes={"a dog": (0, 0, 0.5, 1)},
        guidance="layout",
        sampler="euler_ancestral",
        steps=1,
        spacing="trailing",
        seed=3,
        vary=(12, 0.2),
        image=first[3].image,
        strength=1,
        width=72,
        height=48,
    )
    for made in (alone, first[3].again(1.5, 1)):
        assert np.abs(np.asarray(again[3].image, int) - np.asarray(made.image, int)).max() <= 1
    assert again.request is not None and again.request.prompts == 4
    assert again[0].again(1, 1).image.size == (72, 48)


def test_a_second_pass_keeps_the_mask_as_it_fitted(tiny_model: Model) -> None:
    masked = minidiff.generate(
        "a cat",
        model=tiny_model,
        image=picture(width=32),
        mask=half(width=32),
        fit="pad",
        seed=2,
        steps=2,
        images_per_prompt=2,
        output="tensor",
        **SIZE,
    )
    again = masked.again(2, 0.5)
    assert np.abs(np.asarray(again[1].image, int) - np.asarray(masked[1].again(2, 0.5).image, int)).max() <= 1
    larger = np.asarray(masked[0].image.resize((96, 64), Image.Resampling.LANCZOS), int)
    same = (np.abs(np.asarray(again[0].image, int) - larger) <= 1).all(axis=(0, 2))
    # 8 pixels of padding and 16 of mask are painted at the left, and 8 of padding at the right
    assert same[48:80].all() and not same[:48].any() and not same[80:].any()


def test_without_its_request_a_result_lets_go_of_its_model(tiny_model: Model) -> None:
    model = replace(tiny_model)
    there = weakref.ref(model)
    made = minidiff.generate(
        "a cat", model=model, boxes={"cat": (0.1, 0.1, 0.6, 0.6)}, attention=True, steps=2, seed=1, guidance_scale=1
    )
    del model
    gc.collect()
    assert there() is not None
    made = replace(made, request=None)
    gc.collect()
    assert there() is None


def test_what_cannot_be_made_again_is_said(tiny_model: Model) -> None:
    made = minidiff.generate("a cat", model=tiny_model, steps=2, seed=1, guidance_scale=1)
    for values, message in (((0.5,), "scale is 0.5"), ((2, 0), "strength is 0"), ((2, "x"), "strength is 'x'")):
        with pytest.raises(ValueError, match=message):
            made.again(*values)  # type: ignore[arg-type]
    latents = minidiff.generate("a cat", model=tiny_model, steps=2, guidance_scale=1, output="latents")
    with pytest.raises(ValueError, match="holds latents"):
        latents.again()
    with pytest.raises(ValueError, match="was not made by generate"):
        minidiff.Result(made.images, made.latents, made.seeds, made.parameters, {}).again()
