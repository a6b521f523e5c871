"""The bundled model: it is installed, follows prompts, and gives the same images in diffusers."""

import json
import tomllib
import warnings
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minidiff
from minidiff.cli.main import main
from minidiff.networks.config import UNetConfig, VAEConfig
from minidiff.networks.text import text_encoder_shapes
from minidiff.sampling import sampler_by_name
from minidiff.shapes import folder
from minidiff.shapes.measure import matched, measure
from minidiff.shapes.world import Thing
from minidiff.vocabulary import BUNDLED
from minidiff.weights.sources import BUNDLED_FOLDER

SINGLE = ("red circle", "blue square", "yellow ring", "lime heart", "orange triangle")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model() -> minidiff.Model:
    return minidiff.load(dtype="float32", device="cpu")


def test_it_is_small_whole_and_packaged() -> None:
    files = [file for file in BUNDLED_FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16e6
    names = {file.relative_to(BUNDLED_FOLDER).as_posix() for file in files}
    assert names >= {
        "MODEL_CARD.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["minidiff.shapes"]
    assert all(any(fnmatch(f"model/{name}", pattern) for pattern in patterns) for name in names)


def test_its_configs_are_those_that_training_writes(tmp_path: Path) -> None:
    folder.write_tokenizer(tmp_path / "tokenizer")
    written, bundled = (
        {file: (at / "tokenizer" / file).read_text() for file in ("vocab.json", "merges.txt", "tokenizer_config.json")}
        for at in (tmp_path, BUNDLED_FOLDER)
    )
    assert written["tokenizer_config.json"] == bundled["tokenizer_config.json"]
    # The tokenizer trainer orders equally frequent pairs arbitrarily.
    assert json.loads(written["vocab.json"]).keys() == json.loads(bundled["vocab.json"]).keys()
    assert sorted(written["merges.txt"].split("\n")) == sorted(bundled["merges.txt"].split("\n"))
    for part, config in (("unet", folder.UNET), ("vae", folder.VAE), ("text_encoder", folder.TEXT)):
        assert json.loads((BUNDLED_FOLDER / part / "config.json").read_text()) == config
    assert UNetConfig.from_dict(folder.UNET).cross_attention_dim == folder.TEXT["hidden_size"]
    assert VAEConfig.from_dict(folder.VAE).latent_channels == UNetConfig.from_dict(folder.UNET).in_channels
    assert text_encoder_shapes(folder.TEXT)


def test_it_is_the_default_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    result = minidiff.generate("a red circle", steps=1, seed=0)
    assert result.images[0].size == (128, 128)
    assert result.parameters[0]["model"] == BUNDLED
    assert main(["generate", "a red circle", "--steps", "1", "--seed", "0", "--out", "one.png"]) == 0
    assert minidiff.read_parameters("one.png")["model"] == BUNDLED
    assert main(["generate", "--from", "one.png", "--out", "two.png"]) == 0  # found again by its name
    assert Image.open("one.png").tobytes() == Image.open("two.png").tobytes()
    assert minidiff.read_parameters("one.png") == minidiff.read_parameters("two.png")
    capsys.readouterr()
    assert main(["info", BUNDLED]) == 0
    assert "loads: yes" in capsys.readouterr().out


def test_a_folder_of_its_name_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / BUNDLED).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert minidiff.load(BUNDLED).origin == BUNDLED_FOLDER
    with pytest.raises(ValueError, match="only the hub keeps revisions"):
        minidiff.load(BUNDLED, revision="main")


def test_its_defaults_are_in_its_folder(model: minidiff.Model) -> None:
    scheduler = json.loads((BUNDLED_FOLDER / "scheduler" / "scheduler_config.json").read_text())
    given = scheduler["minidiff_defaults"]
    for name, value in (given | {"sampler": sampler_by_name(given["sampler"])}).items():
        assert getattr(model.defaults, name) == value
    assert model.defaults.steps < 50


def test_it_draws_what_it_is_told(model: minidiff.Model) -> None:
    """Detects a broken model; `python -m bench layout` measures accuracy."""
    prompts = [f"an {name}" if name[0] == "o" else f"a {name}" for name in SINGLE]
    images = minidiff.generate(prompts, model=model, steps=10, seed=0).images
    right = 0
    for image, name in zip(images, SINGLE, strict=True):
        colour, shape = name.split()
        found = measure(torch.from_numpy(np.asarray(image).copy()).movedim(-1, 0))
        right += matched(found.things, [Thing(shape, colour, (0, 0, 1, 1))]) != [None]
    assert right >= len(SINGLE) - 1


@pytest.mark.parametrize(
    "sampler", ["dpmpp_2m", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddim", "pndm"))]
)
def test_diffusers_loads_it_and_draws_the_same(model: minidiff.Model, sampler: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    kinds = {
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
        "ddim": diffusers.DDIMScheduler,
        "pndm": diffusers.PNDMScheduler,
    }
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(BUNDLED_FOLDER, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    # from the folder's own config: the pipeline's carries settings of earlier schedulers
    config = json.loads((BUNDLED_FOLDER / "scheduler" / "scheduler_config.json").read_text())
    del config["minidiff_defaults"]
    pipeline.scheduler = kinds[sampler].from_config(config, steps_offset=1)
    prompts = ["a red circle and a blue square", "a yellow ring on a black background"]
    made = minidiff.generate(prompts, model=model, sampler=sampler, steps=10, seed=3, output="numpy").images
    theirs = pipeline(
        prompts,
        num_inference_steps=10,
        guidance_scale=model.defaults.guidance_scale,
        generator=[torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)],
        output_type="np",
    ).images
    assert np.abs(np.asarray(made) - theirs).max() <= 1 / 255


def test_words_that_it_does_not_know_are_said(model: minidiff.Model) -> None:
    with pytest.warns(UserWarning) as caught:
        minidiff.generate(["a red zebra!", "a Cat"], model=model, steps=1, seed=0)
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith("this model does not know 'zebra', '!', 'cat'; it knows a an and background ")
    for word in folder.WORDS:
        assert word in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minidiff.generate("A red circle, a blue square", negative_prompt="", model=model, steps=1, seed=0)


def test_the_command_line_says_unknown_words_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a cat", "--steps", "1", "--out", str(tmp_path / "x.png")]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert line.startswith("minidiff: warning: this model does not know 'cat'") or line.startswith("warning: ")


def test_models_without_a_list_know_every_word(tiny_model: minidiff.Model) -> None:
    assert tiny_model.text.words is None
