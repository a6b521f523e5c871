"""Training of the bundled model, with networks small enough to train in seconds."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import minidiff
from minidiff.networks.config import UNetConfig, VAEConfig
from minidiff.networks.sites import Site
from minidiff.networks.unet import UNet
from minidiff.networks.vae import VAE
from minidiff.shapes import autoencoder, folder, latents, optimise, train
from minidiff.shapes.autoencoder import autoencoder_loss, fidelity, normalise, pictures
from minidiff.shapes.denoising import ALPHAS_CUMPROD, GROUNDING, denoising_loss, grounding_loss, token_boxes
from minidiff.shapes.latents import Latents
from minidiff.shapes.optimise import Optimiser
from minidiff.shapes.world import BACKGROUNDS, COLOURS, HELD_OUT, SHAPES, Scene, Thing, caption, random_scene
from minidiff.weights.text import load_tokenizer

VAE_DICT = {**folder.VAE, "block_out_channels": [8, 8, 8]}
BOX = (0.3, 0.3, 0.35, 0.5)  # within one cell, across
UNET_DICT = {**folder.UNET, "block_out_channels": [16, 16, 16], "cross_attention_dim": 16}
TEXT_DICT = {**folder.TEXT, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "projection_dim": 16}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks, two pictures per step, a checkpoint at every step, and a clock that advances at each reading."""
    for name, value in (("VAE", VAE_DICT), ("UNET", UNET_DICT), ("TEXT", TEXT_DICT)):
        monkeypatch.setattr(folder, name, value)
    monkeypatch.setattr(latents, "CHUNK", 4)
    monkeypatch.setattr(latents, "FIRST", 4)
    monkeypatch.setattr(autoencoder, "JUDGED", 8)
    monkeypatch.setattr(autoencoder, "SCALED", 8)
    monkeypatch.setattr(train, "BATCH", 2)
    monkeypatch.setattr(train, "FULL", 0.1)
    monkeypatch.setattr(train, "CHECKPOINT", 0.5)
    monkeypatch.setattr(train, "LINE", 2.5)
    monkeypatch.setattr(train, "PROMPTS", ("a red circle", "a blue square"))
    ticks = itertools.count()
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))


def weights(model: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}/{key}": value
        for file in sorted(model.rglob("*.safetensors"))
        for key, value in load_file(file).items()
    }


@pytest.mark.slow
def test_a_run_writes_a_model_that_loads_and_a_sheet(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = train.train(tmp_path / "run", minutes=0.2)
    assert made == tmp_path / "run" / "model"
    result = minidiff.generate("a red circle", model=made, steps=2, seed=0)
    assert result.images[0].size == (128, 128)
    (drawn,) = (tmp_path / "run" / "sheets").iterdir()
    assert Image.open(drawn).width > 2 * 128
    said = capsys.readouterr().err
    assert "autoencoder: step " in said
    assert "unet: step " in said
    assert " dB, " in said
    # a finished run keeps its checkpoint, so training can continue
    train.train(tmp_path / "run", minutes=0.3, resume=True)


def test_a_short_run_measures_and_draws_little(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    encode = VAE.encode
    monkeypatch.setattr(VAE, "encode", lambda self, images: (seen.append(len(images)), encode(self, images))[1])
    for name, value in (("FULL", 5.0), ("PROMPTS", ("a red circle",) * 12)):
        monkeypatch.setattr(train, name, value)
    for name in ("JUDGED", "SCALED"):
        monkeypatch.setattr(autoencoder, name, 64)
    monkeypatch.setattr(latents, "FIRST", 8)
    monkeypatch.setattr(latents, "PER_STEP", 0)
    made = train.train(tmp_path / "run", minutes=0.05)
    assert sum(seen) == 8 + 8 + 4  # scaled by, measured on, trained on first
    (drawn,) = (made.parent / "sheets").iterdir()
    assert Image.open(drawn).width < 2 * 128


class Cut(BaseException):
    """Like the end of the process: must not be caught."""


@pytest.mark.slow
def test_a_run_that_was_cut_again_and_again_ends_as_if_it_had_not_been(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = weights(train.train(tmp_path / "whole", minutes=0.2))
    step = Optimiser.step
    for number, steps in enumerate((1, 1, 3, 2)):  # twice in each stage
        left = itertools.count(steps, -1)

        def cut(self: Optimiser, *arguments: object, left: Iterator[int] = left) -> None:
            if next(left) == 0:
                raise Cut
            step(self, *arguments)

        with monkeypatch.context() as patch, pytest.raises(Cut):
            patch.setattr(Optimiser, "step", cut)
            train.train(tmp_path / "cut", minutes=0.2, resume=number > 0)
    found = weights(train.train(tmp_path / "cut", minutes=0.2, resume=True))
    assert found.keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0, msg=key)


@pytest.mark.slow
def test_a_run_that_is_cut_while_it_writes_keeps_its_last_checkpoint(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = itertools.count(3, -1)

    def half(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        if next(left) == 0:
            path.write_bytes(b"half of a file")
            raise Cut
        save_file(tensors, path, metadata=metadata)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(train, "save_file", half)
        train.train(tmp_path / "run", minutes=0.2)
    assert minidiff.load(train.train(tmp_path / "run", minutes=0.2, resume=True)).dtype


@pytest.mark.slow
def test_an_autoencoder_can_be_brought_along(small: None, tmp_path: Path) -> None:
    first = train.train(tmp_path / "first", minutes=0.1)
    second = train.train(tmp_path / "second", minutes=0.1, autoencoder=first, seed=1)
    one, two = (load_file(model / "vae" / "diffusion_pytorch_model.safetensors") for model in (first, second))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_what_a_user_can_get_wrong(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        assert train.main(["--out", str(tmp_path / "run"), *arguments]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    assert "holds no run; expected the folder of an interrupted run" in said("--resume")
    assert "minutes is 0.0; expected a number above 0" in said("--minutes", "0")
    (tmp_path / "run").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "run" / "state.safetensors")
    assert "holds a run already; expected a new folder, or --resume" in said()
    assert "was not written by a training run" in said("--resume")


@pytest.mark.slow
def test_the_autoencoder_learns() -> None:
    torch.manual_seed(0)
    vae = VAE(VAEConfig.from_dict(VAE_DICT))
    optimiser = Optimiser({"vae": vae})
    before = autoencoder_loss(vae, 0, 0).detach()
    for step in range(1, 20):
        optimiser.step(autoencoder_loss(vae, 0, step), 100 + step, 0.0)  # after the learning-rate warm-up
    assert autoencoder_loss(vae, 0, 0) < 0.9 * before


def test_normalised_latents_have_unit_variance_and_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder, "SCALED", 64)
    monkeypatch.setattr(autoencoder, "JUDGED", 8)
    torch.manual_seed(0)
    vae = VAE(VAEConfig.from_dict(VAE_DICT)).requires_grad_(False)
    images = pictures(7, 0, 4)
    noise = torch.randn(4, 4, 32, 32)
    before = vae.decode(vae.encode(images, noise)), fidelity(vae)
    normalise(vae, 0)
    torch.testing.assert_close(vae.decode(vae.encode(images, noise)), before[0], rtol=1e-4, atol=1e-4)
    assert fidelity(vae) == pytest.approx(before[1], rel=1e-3)
    latents = torch.cat([vae.encode(pictures(0, i, 8)) for i in range(8)]) * vae.config.scaling_factor
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), rtol=1e-3, atol=0)


def test_fidelity_of_a_perfect_and_of_a_blind_autoencoder(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = VAE(VAEConfig.from_dict(VAE_DICT))
    monkeypatch.setattr(VAE, "encode", lambda self, images: images)
    monkeypatch.setattr(VAE, "decode", lambda self, latents: latents + 0.02)
    psnr, kept = fidelity(vae)
    assert psnr == pytest.approx(-20 * np.log10(0.01), abs=0.3)  # slightly more where the clamp helps
    assert kept == 1
    monkeypatch.setattr(VAE, "decode", lambda self, latents: torch.zeros_like(latents))
    assert fidelity(vae)[1] < 0.4


def test_latents_leave_out_the_held_out_pairs_and_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latents, "CHUNK", 8)
    monkeypatch.setattr(latents, "FIRST", 40)
    monkeypatch.setattr(latents, "PER_STEP", 0)
    vae = VAE(VAEConfig.from_dict(VAE_DICT))
    first = Latents(vae, tmp_path, seed=0)
    values, drawn, captions = first.batch(0, 16)
    assert values.shape == (16, 4, 32, 32)
    assert len(first.scenes) == 40
    assert not any((thing.shape, thing.colour) in HELD_OUT for scene in first.scenes for thing in scene.things)
    monkeypatch.setattr(VAE, "encode", lambda self, images: pytest.fail("encoded again"))
    again = Latents(vae, tmp_path, seed=0)
    same, scenes, words = again.batch(0, 16)
    assert torch.equal(values, same)
    assert (drawn, captions) == (scenes, words)
    assert not torch.equal(again.batch(1, 16)[0], values)


def test_a_batch_holds_the_pictures_of_its_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents, "CHUNK", 8)
    monkeypatch.setattr(latents, "FIRST", 16)
    # an "encoder" that returns the picture's corner, i.e. the background
    monkeypatch.setattr(VAE, "encode", lambda self, images: images[:, :, :1, :1].expand(-1, -1, 32, 32))
    pool = Latents(VAE(VAEConfig.from_dict(VAE_DICT)), tmp_path, seed=0)
    values, scenes, captions = pool.batch(0, 64)
    for value, scene, text in zip(values, scenes, captions, strict=True):
        ground = (value[:, 0, 0] / 0.5 + 1) * 127.5
        torch.testing.assert_close(ground, torch.tensor(BACKGROUNDS[scene.background]).float(), rtol=0, atol=0.2)
        assert [word for word in text.replace(",", "").split() if word in SHAPES] == [t.shape for t in scene.things]


CIRCLE = Scene((Thing("circle", "red", (0.0, 0.25, 0.5, 0.75)),), "white")
Maps = dict[Site, torch.Tensor]


class Oracle(nn.Module):
    """Replaces the UNet: knows the clean latents, and has uniform attention."""

    def __init__(self, clean: torch.Tensor) -> None:
        super().__init__()
        self.clean, self.sites = clean, (Site("mid", 0, 0, "cross"),)
        self.contexts: list[torch.Tensor] = []
        self.timesteps: list[torch.Tensor] = []

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, record: object
    ) -> tuple[torch.Tensor, Maps]:
        abar = ALPHAS_CUMPROD[t][:, None, None, None]
        noise = (x - abar.sqrt() * self.clean) / (1 - abar).sqrt()
        self.contexts.append(context.detach().float())
        self.timesteps.append(t)
        maps = {self.sites[0]: torch.full((len(x), 2, 8, 8, 24), 1 / 24)}
        return abar.sqrt() * noise - (1 - abar).sqrt() * self.clean, maps


def loss_of(oracle: Oracle, tmp_path: Path) -> float:
    folder.write_tokenizer(tmp_path)
    text = CLIPTextModel(CLIPTextConfig.from_dict(dict(folder.TEXT)))
    size = len(oracle.clean)
    scenes, captions = [CIRCLE] * size, ["a red circle"] * size
    tokenizer, rng = load_tokenizer(tmp_path), np.random.default_rng(0)
    return float(denoising_loss(oracle, text, tokenizer, oracle.clean, scenes, captions, rng).detach())


def test_the_loss_is_that_of_the_velocity_and_of_attention_beside_the_box(tmp_path: Path) -> None:
    # with exact velocity only the attention loss remains: of uniform attention, three quarters miss the box
    assert loss_of(Oracle(torch.randn(6, 4, 8, 8)), tmp_path) == pytest.approx(GROUNDING * 0.75**2, rel=1e-4)


def test_end_markers_are_hidden_from_half_and_captions_from_some(tmp_path: Path) -> None:
    oracle = Oracle(torch.zeros(400, 4, 2, 2))
    loss_of(oracle, tmp_path)
    there = oracle.contexts[0].abs().sum(dim=2) > 0  # [400,24]: BOS, a, red, circle, EOS, ...
    assert there[:, 0].all()
    alone = ~there[:, -1]
    assert 0.4 < alone.float().mean() < 0.6
    empty = alone & ~there[:, 1]  # without a caption, the end markers start immediately
    assert 0.02 < empty.float().mean() < 0.09
    assert there[alone & there[:, 1]][:, 1:4].all()
    assert not there[alone][:, 4:].any()


def test_noisy_timesteps_are_the_more_frequent(tmp_path: Path) -> None:
    oracle = Oracle(torch.zeros(1500, 4, 2, 2))
    loss_of(oracle, tmp_path)
    (t,) = oracle.timesteps
    assert t.min() >= 0
    assert t.max() == 999
    assert (t < 500).float().mean() == pytest.approx(0.25, abs=0.04)


def test_the_boxes_of_tokens() -> None:
    star, heart = Thing("star", "blue", (0.1, 0.1, 0.4, 0.4)), Thing("heart", "orange", (0.5, 0.5, 0.9, 0.8))
    scene = Scene((star, heart, star), "white")
    texts = ["a blue star, an orange heart and a star on a white background", ""]
    boxes = token_boxes(texts, [scene, scene], 24)
    named = {2: star, 3: star, 6: heart, 7: heart, 10: star}  # BOS a blue star , an orange heart and a star on ...
    for place in range(24):
        expected = torch.tensor(named[place].box) if place in named else torch.zeros(4)
        assert torch.equal(boxes[0, place], expected), place
    assert not boxes[1].any()


def test_tokens_of_boxes_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    folder.write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = random_scene(rng)
        text = caption(scene, rng)
        boxes = token_boxes([text], [scene], 24)[0]
        words = [tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]]
        for word, box in zip(words, boxes, strict=False):
            assert box.any() == (word in SHAPES or word in COLOURS), (text, word)


def test_the_grounding_loss_by_a_loop() -> None:
    boxes = torch.zeros(2, 5, 4)
    boxes[0, 1], boxes[0, 3], boxes[1, 2] = (torch.tensor(box) for box in ((0.1, 0.2, 0.6, 0.9), (0, 0, 1, 1), BOX))
    maps = {
        Site("mid", 0, 0, "cross"): torch.rand(2, 3, 4, 4, 5, dtype=torch.float64),
        Site("up", 1, 0, "cross"): torch.rand(2, 2, 8, 8, 5, dtype=torch.float64),
    }
    sites = []
    for probs in maps.values():
        side, losses = probs.shape[2], []
        for b, k in ((0, 1), (0, 3), (1, 2)):
            x0, y0, x1, y1 = boxes[b, k].tolist()
            for head in range(probs.shape[1]):
                inside = 0.0
                for y in range(side):
                    for x in range(side):
                        across = max(0.0, min(x1, (x + 1) / side) - max(x0, x / side)) * side
                        down = max(0.0, min(y1, (y + 1) / side) - max(y0, y / side)) * side
                        inside += across * down * float(probs[b, head, y, x, k])
                losses.append((1 - inside / float(probs[b, head, :, :, k].sum())) ** 2)
        sites.append(sum(losses) / len(losses))
    assert float(grounding_loss(maps, boxes.double())) == pytest.approx(sum(sites) / 2, abs=1e-6)
    assert float(grounding_loss(maps, torch.zeros(2, 5, 4).double())) == 0


def test_muon_makes_the_update_of_a_matrix_orthogonal_and_leaves_the_rest_to_adamw() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    before = {key: value.detach().clone() for key, value in network.named_parameters()}
    optimiser = Optimiser({"x": network})
    x = torch.randn(2, 3, 9, 9)
    optimiser.step((network(x) - torch.randn(2, 8, 7, 7)).square().mean(), 99, 0.0)
    change = (network[0].weight.detach() - before["0.weight"]).flatten(1)
    singular = torch.linalg.svdvals(change)
    assert singular.max() / singular.min() < 2  # Newton-Schulz in bfloat16 brings them only near 1
    # AdamW's first step has the same size everywhere: the learning rate
    for key in ("0.bias", "1.weight", "1.bias"):
        moved = (dict(network.named_parameters())[key].detach() - before[key]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, optimise.ADAMW), rtol=0.01, atol=1e-5)


def test_the_average_follows_the_weights() -> None:
    network = nn.Linear(2, 2)
    optimiser = Optimiser({"x": network}, decay=0.5)
    averages = optimiser.averaged("x")
    assert averages.keys() == {"weight", "bias"}
    expected = network.weight.detach().clone()
    for step in range(20):
        optimiser.step(network(torch.ones(1, 2)).square().sum(), step, 0.0)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * network.weight.detach()
    torch.testing.assert_close(averages["weight"], expected)


def test_the_tokenizer_has_one_token_for_each_word(tmp_path: Path) -> None:
    folder.write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer) == folder.TEXT["vocab_size"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        folder.TEXT["bos_token_id"],
        folder.TEXT["eos_token_id"],
    )
    for word in (*folder.WORDS, ","):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word
    assert len(tokenizer("zebra!", add_special_tokens=False)["input_ids"]) > 1


def test_the_longest_caption_fits(tmp_path: Path) -> None:
    folder.write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    rng = np.random.default_rng(0)
    texts = [caption(random_scene(rng), rng) for _ in range(500)]
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert max(lengths) <= folder.POSITIONS
    assert max(lengths) >= 20  # four objects were among them


def test_configs_are_those_of_networks_that_fit_together() -> None:
    unet, vae = UNetConfig.from_dict(folder.UNET), VAEConfig.from_dict(folder.VAE)
    assert unet.in_channels == vae.latent_channels
    assert unet.cross_attention_dim == folder.TEXT["hidden_size"]
    assert unet.sample_size * vae.factor == 128
    grids = {site.place: site for site in UNet(unet).sites}
    assert grids.keys() == {"down", "mid", "up"}
