"""What a network sees in a picture: maps without sampling, words besides the prompt, masks and boxes of maps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minidiff
from minidiff import Model, Record
from minidiff.cli.main import main
from minidiff.recorded import Attention, SiteMaps, _largest_piece

PROMPT = "a cat and a red ball"


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.effect_noise((32, 32), 80).convert("RGB")


def test_maps_are_the_mean_of_single_passes(tiny_model: Model, picture: Image.Image) -> None:
    """Against passes made by hand, with the noise of each time and seed."""
    record = Record(minidiff.cross & minidiff.level(1), minidiff.ALL)
    found = minidiff.look(picture, PROMPT, model=tiny_model, times=(100, 700), seeds=(3, 4), record=record)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    clean, context = tiny_model.encode(pixels), tiny_model.text.encode([PROMPT])
    sites, expected = frozenset(minidiff.sites(tiny_model, record.sites)), {}
    for seed in (3, 4):
        generator = torch.Generator().manual_seed(seed)
        for t in (100, 700):
            abar = tiny_model.noise.alphas_cumprod[t]
            x = abar.sqrt() * clean + (1 - abar).sqrt() * torch.randn(clean.shape, generator=generator)
            with torch.no_grad():
                maps = tiny_model.unet(x, t, context, Record(sites, minidiff.ALL, rows="all"))[1]
            expected = {site: expected.get(site, 0) + maps[site] / 4 for site in maps}
    assert found.maps.keys() == expected.keys()
    for site, kept in expected.items():
        torch.testing.assert_close(found.maps[site], kept, atol=1e-5, rtol=1e-3)


def test_words_besides_get_their_share_and_change_nothing(tiny_model: Model, picture: Image.Image) -> None:
    """The share by the formula: exp(logit) of a word's key against the prompt's, from a pass whose context holds it."""
    plain = minidiff.look(picture, PROMPT, model=tiny_model, times=500)
    found = minidiff.look(picture, PROMPT, model=tiny_model, times=500, words=("dog", "cat"))
    torch.testing.assert_close(found["ball"], plain["ball"], atol=1e-6, rtol=1e-4)
    (site,) = found.maps
    layer = tiny_model.unet.get_submodule(site.key)
    seen: list[torch.Tensor] = []
    handle = layer.to_q.register_forward_hook(lambda module, given, out: seen.append(out))
    minidiff.look(picture, PROMPT, model=tiny_model, times=500)
    handle.remove()
    words = tiny_model.text.encode(["dog"])[:, 1:2]
    keys = torch.cat([tiny_model.text.encode([PROMPT]), words], dim=1)
    q, k = layer.split_heads(seen[0]), layer.split_heads(layer.to_k(keys))
    odds = ((q @ k.mT) * q.shape[-1] ** -0.5).exp()
    share = (odds[..., -1] / odds[..., :-1].sum(-1)).mean(1)
    torch.testing.assert_close(found["dog"].flatten(), (share / (1 + share)).flatten(), atol=1e-6, rtol=1e-3)
    assert (found["cat"] - plain["cat"]).abs().max() > 1e-5  # as a word, not as the prompt's


def test_a_batch_is_the_pictures_alone(tiny_model: Model, picture: Image.Image) -> None:
    pictures = [picture, picture.rotate(90)]
    found = minidiff.look(pictures, [PROMPT, "a ball"], model=tiny_model, times=300, seeds=5)
    for i, (image, prompt) in enumerate(zip(pictures, [PROMPT, "a ball"], strict=True)):
        alone = minidiff.look(image, prompt, model=tiny_model, times=300, seeds=5 + i)
        torch.testing.assert_close(found.of(i, "ball"), alone.of(0, "ball"), atol=1e-6, rtol=1e-4)


def hand_made(heat: torch.Tensor) -> Attention:
    site = minidiff.Site.named("mid.0.0.cross")
    return Attention(SiteMaps({site: heat[None, :, :, None]}), {site: minidiff.HEAD_MEAN}, 1, None)  # type: ignore[arg-type]


def test_masks_boxes_and_scores_of_a_map() -> None:
    heat = torch.full((10, 10), 0.1)
    heat[2:6, 3:9] = 0.7
    heat[9, 0] = 0.6  # a speck: in the mask, not in the box
    maps = hand_made(heat)
    maps = Attention(maps.maps, maps.kinds, 1, maps.text, words={"ball": (0,)})
    mask = maps.mask("ball")
    assert mask.shape == (80, 80)
    assert mask[16:48, 24:72].mean() > 0.98
    assert mask[78, 1] == 1
    assert mask[60:70, 30:].max() == 0
    torch.testing.assert_close(torch.tensor(maps.box("ball")), torch.tensor([0.3, 0.2, 0.9, 0.6]), atol=0.02, rtol=0)
    assert maps.score("ball") == 1  # there is no other word


def test_a_score_compares_with_the_other_words_where_the_word_is_seen(tiny_model: Model) -> None:
    """Against loops over the cells of random maps, for a word of the prompt, one besides, and one that is both."""
    length, side = tiny_model.text.length, 10
    kept = torch.rand(1, side, side, length + 2, generator=torch.Generator().manual_seed(2))
    site = minidiff.Site.named("mid.0.0.cross")
    words = {"dog": (length,), "ball": (length + 1,)}
    maps = Attention(SiteMaps({site: kept}), {site: minidiff.HEAD_MEAN}, 1, tiny_model.text, (PROMPT,), words=words)
    prompt = range(1, tiny_model.text.num_tokens(PROMPT) + 1)  # neither markers nor padding
    for phrase in ("red ball", "dog", "ball"):
        named = tiny_model.text.all_spans(PROMPT, phrase) if phrase in PROMPT else ()
        own = words.get(phrase, named)
        others = [i for i in prompt if i not in named] + [
            one for word in words if word != phrase for one in words[word]
        ]
        cells = kept[0].flatten(0, 1).tolist()
        seen = sorted(((sum(cell[i] for i in own) / len(own), cell) for cell in cells), reverse=True)[:5]
        expected = sum(p / (p + max(cell[i] for i in others)) for p, cell in seen) / 5
        assert maps.score(phrase) == pytest.approx(expected, rel=1e-5)


def test_a_mask_of_a_generated_picture_places_an_object(tiny_model: Model) -> None:
    options = {"model": tiny_model, "steps": 2, "seed": 1, "output": "latents"}
    seen = minidiff.generate(PROMPT, attention=True, reduce="per_step", **options).attention
    assert seen.mask("ball").max() == 1
    for place in (seen.mask("ball"), seen.box("ball")):
        minidiff.generate(PROMPT, boxes={"ball": place}, **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"times": 1000}, "times is 1000; expected a whole number from 0 to 999"),
        ({"seeds": ()}, "times or seeds is empty"),
        ({"record": 3}, "record is 3; expected a Record"),
        ({"words": ("",)}, "phrase: got ''"),
        ({"image": "nowhere.png"}, "image cannot be read"),
    ],
)
def test_wrong_arguments_are_named(
    tiny_model: Model, picture: Image.Image, given: dict[str, object], message: str
) -> None:
    options = {"image": picture, "prompt": PROMPT, "model": tiny_model} | given
    with pytest.raises(ValueError, match=message):
        minidiff.look(**options)  # type: ignore[arg-type]


def test_the_command_line_writes_heat_maps_and_masks(
    tmp_path: Path, picture: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    picture.save(tmp_path / "scene.png")
    where = [str(tmp_path / "scene.png"), "a red circle", "--out", str(tmp_path), "--times", "300"]
    assert main(["look", *where, "--word", "blue star", "--word", "circle"]) == 0
    out = capsys.readouterr().out
    assert "blue star: score 0." in out
    names = {path.name for path in tmp_path.iterdir()} - {"scene.png"}
    assert names == {f"scene-{kind}-{word}.png" for kind in ("heat", "mask") for word in ("blue-star", "circle")}
    assert Image.open(tmp_path / "scene-mask-circle.png").size == (32, 32)


@pytest.mark.parametrize("seed", range(6))
def test_the_largest_piece_is_a_flood_fills(seed: int) -> None:
    mask = (torch.rand(9, 13, generator=torch.Generator().manual_seed(seed)) > 0.6).float()
    left, pieces = {(r, c) for r, c in mask.nonzero().tolist()}, []
    while left:
        piece, new = set[tuple[int, int]](), [left.pop()]
        while new:
            r, c = new.pop()
            piece.add((r, c))
            near = {(r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            new += near
        pieces.append(piece)
    found = {(r, c) for r, c in _largest_piece(mask).nonzero().tolist()}
    assert found in pieces and len(found) == max(map(len, pieces))
