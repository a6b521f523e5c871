"""generate() against diffusers' StableDiffusionPipeline on the same weights, batches, and general behaviour."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from compare import relative_error
from PIL import Image
from torch import Tensor

import minidiff
from bench.reference import THEIRS
from minidiff.denoise import guided
from minidiff.model import Defaults, Model
from minidiff.weights.inspect import describe

PROMPTS = ["a cat playing with a ball", "two dogs", "a red circle and a blue square"]
NEGATIVES = ["blurry", "", "low quality, text"]
SAMPLERS = THEIRS | {
    f"{name}_karras": (THEIRS[name][0], {"use_karras_sigmas": True}) for name in ("euler", "lms", "dpmpp_2m")
}


KARRAS = {"use_karras_sigmas": True}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def pipeline(tiny_folder: Path) -> diffusers.StableDiffusionPipeline:
    found = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder)
    found.set_progress_bar_config(disable=True)
    found.folder_config = dict(found.scheduler.config)  # from_config passes settings of one scheduler on to the next
    return found


def reference(
    pipeline: diffusers.StableDiffusionPipeline, sampler: str, seeds: list[int], **options: object
) -> np.ndarray:
    """[B,H,W,3] uint8 from diffusers, with one generator per image."""
    kind, config = SAMPLERS[sampler]
    pipeline.scheduler = kind.from_config(pipeline.folder_config, **config)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    found = pipeline(generator=generators, output_type="pil", **options).images
    return np.stack([np.asarray(image) for image in found])


def largest_difference(images: list[Image.Image], expected: np.ndarray) -> int:
    """Largest difference in units of 1/255. The reference must not be a single colour."""
    found = np.stack([np.asarray(image) for image in images]).astype(int)
    assert found.shape == expected.shape
    assert expected.std() > 5
    return int(np.abs(found - expected).max())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_equals_diffusers_with_every_sampler(pipeline, tiny_model: Model, sampler: str) -> None:
    expected = reference(
        pipeline,
        sampler,
        [3, 4, 5],
        prompt=PROMPTS,
        negative_prompt=NEGATIVES,
        num_inference_steps=7,
        width=48,
        height=32,
    )
    result = minidiff.generate(
        PROMPTS, model=tiny_model, negative_prompt=NEGATIVES, sampler=sampler, steps=7, seed=3, width=48, height=32
    )
    assert largest_difference(result.images, expected) <= 1


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"guidance_scale": 1}, {"guidance_scale": 1.0}),
        ({"guidance_scale": 12.5}, {"guidance_scale": 12.5}),
        ({"guidance_rescale": 0.7}, {"guidance_rescale": 0.7}),
        ({"eta": 0.6, "sampler": "ddim"}, {"eta": 0.6}),
        ({"images_per_prompt": 2, "seed": [1, 2, 3, 4, 5, 6]}, {"num_images_per_prompt": 2}),
        ({"width": 40, "height": 56}, {"width": 40, "height": 56}),
        ({"timesteps": [900, 600, 300, 40], "sampler": "euler"}, {"timesteps": [900, 600, 300, 40]}),
    ],
    ids=lambda value: ",".join(value),
)
def test_equals_diffusers_with_options(pipeline, tiny_model: Model, options: dict, theirs: dict) -> None:
    sampler = options.get("sampler", "dpmpp_2m")
    seeds = options.get("seed", [1, 2, 3])
    steps = {} if "timesteps" in options else {"steps": 5}
    expected = reference(
        pipeline, sampler, seeds, prompt=PROMPTS, negative_prompt=["blurry"] * 3, num_inference_steps=5, **theirs
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the negative prompt has no effect")
        result = minidiff.generate(
            PROMPTS, model=tiny_model, negative_prompt="blurry", **({"sampler": sampler, "seed": 1} | steps | options)
        )
    assert largest_difference(result.images, expected) <= 1


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip_equals_a_corrected_diffusers(pipeline, tiny_model: Model, clip_skip: int) -> None:
    # diffusers 0.42.1 with transformers 5.23 fails on clip_skip (huggingface/diffusers#14124), so it is given contexts
    def encode(texts: list[str]) -> Tensor:
        ids = pipeline.tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            states = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states
            encoder = getattr(pipeline.text_encoder, "text_model", pipeline.text_encoder)
            return encoder.final_layer_norm(states[-(clip_skip + 1)])

    expected = reference(
        pipeline,
        "ddim",
        [3, 4, 5],
        prompt_embeds=encode(PROMPTS),
        negative_prompt_embeds=encode(NEGATIVES),
        num_inference_steps=4,
    )
    result = minidiff.generate(
        PROMPTS, model=tiny_model, negative_prompt=NEGATIVES, sampler="ddim", steps=4, seed=3, clip_skip=clip_skip
    )
    assert largest_difference(result.images, expected) <= 1
    plain = minidiff.generate(PROMPTS, model=tiny_model, negative_prompt=NEGATIVES, sampler="ddim", steps=4, seed=3)
    assert largest_difference(plain.images, expected) > 1


@pytest.mark.parametrize(
    ("kind", "changes", "ran"),
    [
        ("EulerDiscreteScheduler", KARRAS, ("euler", "karras")),
        ("LMSDiscreteScheduler", KARRAS, ("lms", "karras")),
        ("DPMSolverMultistepScheduler", KARRAS, ("dpmpp_2m", "karras")),
        ("EulerAncestralDiscreteScheduler", KARRAS, ("euler_ancestral", "uniform")),  # diffusers ignores it there
        ("HeunDiscreteScheduler", {"use_beta_sigmas": True}, ("heun", "beta")),
        ("UniPCMultistepScheduler", {"use_exponential_sigmas": True, "solver_order": 3}, ("uni_pc", "exponential")),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, ("dpmpp_2m_sde", "uniform")),
        ("LCMScheduler", {"original_inference_steps": 100}, ("lcm", "uniform")),
        ("DDIMScheduler", ZERO_SNR, ("ddim", "uniform")),
    ],
)
def test_a_folders_scheduler_config_reaches_the_run(
    pipeline, tiny_folder: Path, tmp_path: Path, kind: str, changes: dict[str, object], ran: tuple[str, str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for part in tiny_folder.iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "scheduler").unlink()
    (folder / "scheduler").mkdir()
    config = json.loads((tiny_folder / "scheduler" / "scheduler_config.json").read_text())
    config |= {"_class_name": kind, **changes}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    result = minidiff.generate("a cat", model=minidiff.load(folder, dtype="float32"), steps=6, seed=2, output="latents")
    pipeline.scheduler = getattr(diffusers, kind).from_config(config)
    generator = torch.Generator().manual_seed(2)
    expected = pipeline("a cat", num_inference_steps=6, generator=generator, output_type="latent").images
    assert relative_error(result.latents, expected) <= 1e-5
    if isinstance(result.parameters[0]["sampler"], str):  # settings beside the name make it an object
        assert (result.parameters[0]["sampler"], result.parameters[0]["schedule"]) == ran
    assert describe(folder).scheduler["sampler"] == (ran[0] if ran[1] == "uniform" else " ".join(ran))


@pytest.mark.parametrize("name", ["Euler a", "k_euler_a", "EulerAncestralDiscreteScheduler"])
def test_other_programs_names_of_samplers(tiny_model: Model, name: str) -> None:
    shared = {"model": tiny_model, "steps": 2, "seed": 1, "output": "latents"}
    result = minidiff.generate("a cat", sampler=name, **shared)
    assert torch.equal(result.latents, minidiff.generate("a cat", sampler="euler_ancestral", **shared).latents)
    assert result.parameters[0]["sampler"] == "euler_ancestral"


@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_v_prediction_equals_diffusers(pipeline, tiny_folder: Path, sampler: str) -> None:
    model = minidiff.load(tiny_folder, dtype="float32", device="cpu", prediction_type="v_prediction")
    kind, _ = SAMPLERS[sampler]
    pipeline.scheduler = kind.from_config(pipeline.folder_config, prediction_type="v_prediction")
    generator = torch.Generator().manual_seed(2)
    found = pipeline(PROMPTS[0], generator=generator, num_inference_steps=6).images
    result = minidiff.generate(PROMPTS[0], model=model, sampler=sampler, steps=6, seed=2)
    assert largest_difference(result.images, np.asarray(found[0])[None]) <= 1


def test_given_latents_and_contexts_equal_diffusers(pipeline, tiny_model: Model) -> None:
    latents = torch.randn(2, 4, 8, 12)
    context, negative = torch.randn(2, 77, 64), torch.randn(2, 77, 64)
    expected = reference(
        pipeline,
        "euler",
        [0, 1],
        prompt_embeds=context,
        negative_prompt_embeds=negative,
        latents=latents.clone(),
        num_inference_steps=5,
        width=48,
        height=32,
    )
    result = minidiff.generate(
        model=tiny_model, context=context, negative_context=negative, latents=latents, sampler="euler", steps=5
    )
    assert largest_difference(result.images, expected) <= 1
    assert result.seeds == (None, None)


@pytest.mark.parametrize("sampler", ["euler_ancestral", pytest.param("pndm", marks=pytest.mark.slow)])
def test_an_image_of_a_batch_equals_the_image_alone(tiny_model: Model, sampler: str) -> None:
    shared = {"model": tiny_model, "sampler": sampler, "steps": 6, "output": "tensor", "guidance_rescale": 0.5}
    batch = minidiff.generate(PROMPTS, negative_prompt=NEGATIVES, images_per_prompt=2, seed=40, **shared)
    assert batch.seeds == (40, 41, 42, 43, 44, 45)
    for i in range(6):
        alone = minidiff.generate(PROMPTS[i // 2], negative_prompt=NEGATIVES[i // 2], seed=40 + i, **shared)
        assert (alone.images[0] - batch.images[i]).abs().max() <= 1 / 255
    again = minidiff.generate(PROMPTS, negative_prompt=NEGATIVES, images_per_prompt=2, seed=40, **shared)
    assert torch.equal(again.images, batch.images)


def test_a_result_makes_its_images_again(tiny_model: Model) -> None:
    result = minidiff.generate(
        PROMPTS,
        model=tiny_model,
        negative_prompt="blurry",
        sampler="ddim",
        eta=0.5,
        spacing="trailing",
        steps=4,
        clip_skip=1,
    )
    assert len(set(result.seeds)) == 3
    for i, parameters in enumerate(result.parameters):
        again = minidiff.generate(**(parameters | {"model": tiny_model}))
        assert largest_difference(again.images, np.asarray(result.images[i])[None]) <= 1


def test_parameters_say_everything_and_no_path(tiny_model: Model, tmp_path: Path) -> None:
    result = minidiff.generate("a cat", model=tiny_model, steps=2, sampler=minidiff.LMS(order=2), seed=9)
    (parameters,) = result.parameters
    assert parameters == {
        "prompt": "a cat",
        "negative_prompt": "",
        "model": "tiny",
        "width": 32,
        "height": 32,
        "steps": 2,
        "guidance_scale": 7.5,
        "guidance_rescale": 0.0,
        "eta": 0.0,
        "sampler": {
            "object": "minidiff.sampling.samplers.lms.LMS",
            "fields": {"levels": "uniform", "order": 2, "spacing": None},
        },
        "seed": 9,
    }
    assert result.info["dtype"] == "float32"
    assert result.info["device"] == "cpu"
    assert result.info["model"] == {"kind": "folder", "name": "tiny", "sha256": None}
    assert set(result.info["versions"]) == {"minidiff", "torch", "transformers"}
    (path,) = result.save(tmp_path / "cat.png")
    assert str(tmp_path) not in path.read_bytes().decode("latin-1")
    assert minidiff.read_parameters(path) == parameters
    assert not minidiff.read_metadata(path).reproducible


def test_parameters_keep_custom_timesteps(tiny_model: Model) -> None:
    result = minidiff.generate("a cat", model=tiny_model, sampler="euler", steps=2, timesteps=[800, 300], seed=1)
    (parameters,) = result.parameters
    assert parameters["timesteps"] == [800, 300]
    assert "steps" not in parameters
    again = minidiff.generate(**parameters | {"model": tiny_model})
    assert largest_difference(again.images, np.asarray(result.images[0])[None]) == 0


def test_outputs(tiny_model: Model) -> None:
    shared = {"model": tiny_model, "steps": 2, "seed": 1, "width": 48}
    pil = minidiff.generate("a cat", **shared)
    numpy = minidiff.generate("a cat", output="numpy", **shared)
    tensor = minidiff.generate("a cat", output="tensor", **shared)
    latents = minidiff.generate("a cat", output="latents", **shared)
    assert pil.images[0].size == (48, 32)
    assert numpy.images.shape == (1, 32, 48, 3)
    assert tensor.images.shape == (1, 3, 32, 48)
    assert torch.equal(latents.images, latents.latents)
    assert torch.equal(latents.latents, tensor.latents)
    assert latents.latents.shape == (1, 4, 8, 12)
    np.testing.assert_array_equal(numpy.images[0], tensor.images[0].permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(np.asarray(pil.images[0]), (numpy.images[0] * 255).round().astype("uint8"))
    assert set(pil.timings) == {"load", "text", "sampling", "decode"}


def test_steps_can_be_watched(tiny_model: Model) -> None:
    site = next(site for site in tiny_model.unet.sites if site.name == "mid.0.0.cross")
    record = minidiff.Record(frozenset([site]), minidiff.HEAD_MEAN)
    run = minidiff.sample_steps(PROMPTS[:2], model=tiny_model, steps=4, seed=1, attention=record, output="tensor")
    assert len(run) == 4 and repr(run).startswith("<Run: 0 of 4 steps, ")
    steps = list(run)
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert [step.t for step in steps] == [751, 501, 251, 1]
    assert all(step.maps[site].shape == (2, 2, 2, 77) for step in steps)
    assert steps[0].preview().shape == (2, 3, 32, 32)
    expected = minidiff.generate(PROMPTS[:2], model=tiny_model, steps=4, seed=1, output="tensor")
    # recorded sites use another kernel, so the last bits may differ
    assert (run.result().images - expected.images).abs().max() <= 1 / 255
    assert relative_error(steps[-1].denoised, steps[-1].latents) < 0.5


def test_a_run_can_be_stopped_early(tiny_model: Model) -> None:
    run = minidiff.sample_steps("a cat", model=tiny_model, steps=4, seed=1, output="tensor")
    with pytest.raises(ValueError, match="no step has been taken yet"):
        run.result()
    next(run)
    step = next(run)
    result = run.result()
    assert torch.equal(result.images, step.preview())
    assert result.info["stopped_after"] == 2
    assert len(list(run)) == 2
    assert "stopped_after" not in run.result().info


def test_a_run_says_what_was_resolved(tiny_model: Model) -> None:
    run = minidiff.sample_steps("a cat", model=tiny_model, sampler="DPM++ 2M Karras")
    request = run.request
    assert (request.width, request.height, request.steps, request.guidance_scale) == (32, 32, 50, 7.5)
    assert (request.sampler, request.schedule) == ("dpmpp_2m", "karras")
    assert len(request.seed) == 1
    assert request.model is tiny_model


def test_recording_works_without_guidance(tiny_model: Model) -> None:
    sites = frozenset(site for site in tiny_model.unet.sites if site.kind == "cross")
    record = minidiff.Record(sites)
    (step,) = minidiff.sample_steps(
        "a cat", model=tiny_model, steps=1, sampler="ddim", guidance_scale=1, attention=record
    )
    assert all(maps.shape[0] == 1 for maps in step.maps.values())
    with pytest.raises(ValueError, match='attention.rows is "uncond", but guidance_scale 1'):
        minidiff.sample_steps("a cat", model=tiny_model, guidance_scale=1, attention=replace(record, rows="uncond"))
    with pytest.raises(ValueError, match="attention has stop=True, which ends the forward pass"):
        minidiff.sample_steps("a cat", model=tiny_model, attention=replace(record, stop=True))


def test_guidance_scale_one_runs_one_row_per_image(tiny_model: Model) -> None:
    rows: list[int] = []
    handle = tiny_model.unet.conv_in.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    minidiff.generate(PROMPTS, model=tiny_model, steps=2, sampler="euler", guidance_scale=1)
    minidiff.generate(PROMPTS, model=tiny_model, steps=2, sampler="euler")
    handle.remove()
    assert rows == [3, 3, 6, 6]


def test_gradients_and_modes_are_the_callers(tiny_model: Model) -> None:
    for _ in minidiff.sample_steps("a cat", model=tiny_model, steps=2):
        assert torch.is_grad_enabled()
    assert not any(p.requires_grad for p in tiny_model.unet.parameters())


def test_decoding_that_overflows_is_done_again_in_float32(tiny_folder: Path) -> None:
    model = minidiff.load(tiny_folder, dtype="bfloat16", device="cpu")
    latents = torch.randn(1, 4, 8, 8)
    expected = model.decode(latents)
    model.vae.decoder.conv_in.register_forward_hook(
        lambda _, __, out: out * float("inf") if out.dtype == torch.bfloat16 else out
    )
    with pytest.warns(UserWarning, match="overflowed in bfloat16 and was decoded again in float32"):
        found = model.decode(latents)
    assert relative_error(found, expected) < 0.1
    assert model.vae.decoder.conv_in.weight.dtype == torch.bfloat16


def test_an_image_that_is_no_number_is_black_and_the_others_are_kept(tiny_model: Model) -> None:
    shared = {"model": tiny_model, "steps": 2, "seed": 1, "output": "tensor"}
    expected = minidiff.generate(PROMPTS[:2], **shared)

    def broken(module: object, args: object, out: tuple[Tensor, dict]) -> tuple[Tensor, dict]:
        out[0][::2] = float("nan")  # of [uncond, cond] of two images those of the first
        return out

    handle = tiny_model.unet.register_forward_hook(broken)
    with pytest.warns(UserWarning, match=r"images \[0\] are black"):
        found = minidiff.generate(PROMPTS[:2], **shared)
    handle.remove()
    assert found.images[0].abs().max() == 0
    assert torch.equal(found.images[1], expected.images[1])


def test_decoding_takes_one_image_at_a_time(tiny_model: Model) -> None:
    rows: list[int] = []
    handle = tiny_model.vae.decoder.conv_in.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    minidiff.generate("a cat", model=tiny_model, steps=1, sampler="ddim", images_per_prompt=3)
    handle.remove()
    assert rows == [1, 1, 1]


def test_encode_and_decode_keep_the_scale(tiny_model: Model) -> None:
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = tiny_model.encode(images)
    with torch.no_grad():
        mean = tiny_model.vae.encode(images)
        assert relative_error(latents, mean * 0.18215) <= 1e-6
        assert relative_error(tiny_model.decode(latents), tiny_model.vae.decode(mean)) <= 1e-5
    noise = torch.randn(latents.shape)
    assert relative_error(tiny_model.encode(images, noise), latents) > 0


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 8, 8), np.float32), r"images is a ndarray of shape \[1, 3, 8, 8\] .*; expected a tensor"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "images is a Tensor .* uint8; expected a tensor"),
        (torch.full((1, 3, 8, 8), 255.0), r"from 255 to 255; expected \[-1,1\]: pixels / 127.5 - 1"),
        (torch.zeros(3, 8, 8), r"expected a tensor \[B,3,H,W\]"),
    ],
)
def test_images_to_encode_are_checked(tiny_model: Model, images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model.encode(images)
    with pytest.warns(UserWarning, match="values from 0 to 1, none below 0"):
        tiny_model.encode(torch.linspace(0, 1, 3 * 64).reshape(1, 3, 8, 8))


def test_rescaling_equals_the_formula() -> None:
    uncond, cond = torch.randn(2, 3, 4, 5, 4)[:, :, :, :4], torch.randn(2, 3, 4, 5, 4)[:, :, :, :4]
    uncond, cond = uncond[0], cond[0]
    found = guided(uncond, cond, 5.0, 0.3)
    for i in range(3):
        mixed = uncond[i] + 5 * (cond[i] - uncond[i])
        expected = 0.3 * mixed * (cond[i].std() / mixed.std()) + 0.7 * mixed
        torch.testing.assert_close(found[i], expected)


@pytest.mark.slow
def test_compiled_equals_eager(tiny_folder: Path, tiny_model: Model) -> None:
    compiled = minidiff.load(tiny_folder, dtype="float32", device="cpu", compile=True)
    shared = {"steps": 2, "seed": 1, "sampler": "ddim", "output": "tensor"}
    found = minidiff.generate("a cat", model=compiled, **shared)
    expected = minidiff.generate("a cat", model=tiny_model, **shared)
    assert (found.images - expected.images).abs().max() <= 1 / 255


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 7}, r"prompt is 7 \(int\); expected a text or a list of texts"),
        ({"prompt": ["a", None]}, r"prompt is \['a', None\] \(list\)"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": None}, "got neither prompt nor context"),
        ({"context": torch.zeros(1, 77, 64)}, "got both prompt and context"),
        (
            {"prompt": None, "context": torch.zeros(1, 77, 63)},
            r"context is \[1, 77, 63\]; expected a tensor \[1, L, 64\]",
        ),
        (
            {"prompt": None, "context": torch.full((1, 77, 64), float("nan"))},
            "context holds values that are not finite",
        ),
        ({"prompt": None, "context": torch.zeros(1, 50, 64)}, "context holds 50 tokens and the negative one 77"),
        (
            {"negative_context": torch.zeros(2, 77, 64)},
            r"negative_context is \[2, 77, 64\]; expected a tensor \[1, L, 64\]",
        ),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt holds 2 texts for 1 prompts"),
        (
            {"negative_prompt": "a", "negative_context": torch.zeros(1, 77, 64)},
            "both negative_prompt and negative_context",
        ),
        ({"width": 30}, "width is 30; expected a positive multiple of 4 pixels, such as 32"),
        ({"height": 0}, "height is 0; expected a whole number of at least 1"),
        ({"height": 32.0}, "height is 32.0; expected a whole number"),
        ({"steps": 0}, "steps"),
        ({"steps": 5, "timesteps": [900, 1]}, "steps"),
        ({"sampler": "ipndm"}, "sampler 'ipndm' is"),
        (
            {"sampler": "ddim", "schedule": "karras"},
            "expected one with it: deis, dpm2",
        ),
        (
            {"sampler": minidiff.Euler(), "schedule": "karras"},
            "with a sampler object",
        ),
        ({"sampler": minidiff.Euler(), "spacing": "leading"}, "with a sampler object"),
        ({"sampler": "euler", "spacing": "even"}, "spacing"),
        ({"sampler": "euler", "eta": 0.5}, "eta is 0.5 with sampler 'euler'; expected one with it: ddim"),
        ({"sampler": "ddim", "eta": 1.5}, "eta"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5; expected a number of at least 1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_rescale": 2}, "guidance_rescale is 2; expected a number from 0 to 1"),
        ({"clip_skip": 3}, "clip_skip: got 3, expected 0 to 2"),
        ({"seed": [1, 2]}, "seed holds 2 numbers for 1 images"),
        ({"seed": "one"}, "seed is 'one'; expected a whole number"),
        ({"seed": -1}, r"seed is -1; expected 0 to \d+; omit seed \(None\) to draw one"),
        ({"images_per_prompt": 0}, "images_per_prompt is 0; expected a whole number of at least 1"),
        ({"latents": torch.full((1, 4, 8, 8), float("nan"))}, r"latents holds values that are not finite \(NaN"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, "latents hold 2 for 1 images; expected one per image"),
        ({"latents": torch.zeros(1, 4, 8, 8), "width": 64}, r"expected a tensor \[1, 4, 8, 16\]"),
        ({"output": "jpeg"}, "output is 'jpeg'; expected one of pil, numpy, tensor, latents"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_bad_arguments_are_named_before_the_network_runs(tiny_model: Model, options: dict, message: str) -> None:
    ran: list[object] = []
    handle = tiny_model.unet.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match=message):
        minidiff.generate(**({"prompt": "a cat", "model": tiny_model, "steps": 2} | options))
    handle.remove()
    assert not ran


def test_a_negative_prompt_without_guidance_is_pointed_out(tiny_model: Model) -> None:
    with pytest.warns(UserWarning, match="the negative prompt has no effect at guidance_scale 1"):
        minidiff.generate("a cat", model=tiny_model, negative_prompt="dog", guidance_scale=1, steps=1, sampler="ddim")


def test_a_source_is_loaded_for_the_call(tiny_folder: Path) -> None:
    result = minidiff.generate("a cat", model=tiny_folder, steps=1, sampler="dpmpp_2m", seed=1)
    assert result.parameters[0]["model"] == "tiny"
    assert result.timings["load"] > 0


def test_a_model_brings_its_defaults(tiny_model: Model) -> None:
    defaults = Defaults.from_config(
        {"minidiff_defaults": {"sampler": "dpmpp_2m_karras", "steps": 3, "guidance_scale": 2}}
    )
    result = minidiff.generate("a cat", model=replace(tiny_model, defaults=defaults), seed=1)
    assert {key: result.parameters[0][key] for key in ("sampler", "schedule", "steps", "guidance_scale")} == {
        "sampler": "dpmpp_2m",
        "schedule": "karras",
        "steps": 3,
        "guidance_scale": 2.0,
    }
    assert Defaults.from_config({}) == Defaults(None, 50, 7.5)
    with pytest.raises(ValueError, match="minidiff_defaults: steps is '3'; expected a whole number"):
        Defaults.from_config({"minidiff_defaults": {"steps": "3"}})
    with pytest.raises(ValueError, match="minidiff_defaults is {'cfg': 3}; expected an object of sampler, steps"):
        Defaults.from_config({"minidiff_defaults": {"cfg": 3}})


@pytest.mark.parametrize("text", ["a (cat:1.3)", "a cat BREAK a dog", "a cat <lora:fur:0.8>"])
def test_another_programs_prompt_syntax_is_pointed_out(tiny_model: Model, text: str) -> None:
    shared = {"model": tiny_model, "steps": 2, "sampler": "euler", "output": "latents"}
    with pytest.warns(UserWarning, match="is A1111 syntax, which is not interpreted"):
        minidiff.generate(text, **shared)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minidiff.generate("a cat (small), 1:2", **shared)


@pytest.mark.parametrize("setting", ["float64", "bfloat16", "float16", "meta"])
def test_torchs_defaults_change_no_bit(tiny_model: Model, setting: str) -> None:
    shared = {"model": tiny_model, "steps": 2, "seed": 1, "output": "latents", "sampler": "euler_ancestral"}
    calls: list[dict[str, Any]] = [
        {"prompt": "a cat", "boxes": {"cat": (0, 0, 0.5, 0.5)}},
        {"prompt": ["a (cat:1.2) BREAK sits", "a [cat:dog:1] AND sky"], "syntax": "a1111", "emphasis": "compel"},
        {"prompt": "a cat", "regions": [minidiff.Region("a dog", (0, 0, 0.5, 1))]},
        {"prompt": "a cat", "image": np.zeros((64, 64, 3), dtype=np.uint8), "strength": 0.7},
    ]
    expected = [minidiff.generate(**shared, **call).latents for call in calls]
    try:
        if setting == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, setting))
        found = [minidiff.generate(**shared, **call).latents for call in calls]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(map(torch.equal, found, expected))


def test_threads_share_a_model(tiny_folder: Path) -> None:
    """A model that has not run yet: its layers are packed by the first of them to need them."""

    def picture(model: Model, seed: int) -> Tensor:
        boxes = {"cat": (0.1 * seed, 0.2, 0.6, 0.8)}
        images = minidiff.generate("a cat", model=model, boxes=boxes, seed=seed, steps=2, output="tensor").images
        assert isinstance(images, Tensor)
        return images

    alone = minidiff.load(tiny_folder, dtype="float32", device="cpu")
    shared = minidiff.load(tiny_folder, dtype="float32", device="cpu")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: picture(shared, seed), range(4)))
        left = pool.submit(lambda: next(minidiff.sample_steps("a dog", model=shared, steps=4, seed=7)).index)
        several = list(pool.map(picture, (shared, alone) * 2, range(4)))  # beside a run that is left after a step
    assert left.result() == 0
    for seed, one in enumerate(found):
        torch.testing.assert_close(one, picture(alone, seed), rtol=0, atol=0)
        torch.testing.assert_close(several[seed], one, rtol=0, atol=0)
