"""On a card: captured graphs, fused kernels, pictures. Skipped without one (tests/test_capture.py and
tests/test_fake_device.py cover what needs none)."""

import gc
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minidiff
from minidiff.guidance.objectives import OBJECTIVES
from minidiff.model import Model
from minidiff.networks import vae
from minidiff.networks.attention import Hooks, attention_probs, mask_name
from minidiff.networks.config import UNetConfig
from minidiff.networks.norm import GroupNorm, GroupNormSiLU, LayerNorm
from minidiff.networks.resample import Upsample
from minidiff.networks.transformer import GEGLU, Transformer
from minidiff.networks.unet import ResBlock
from minidiff.speed import fused, strips
from minidiff.speed.capture import captured
from minidiff.speed.keeps import kept
from minidiff.speed.replace import with_weights

pytestmark = [pytest.mark.card, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA card")]
PROMPT, BOXES = "a red circle", {"red circle": (0.05, 0.1, 0.45, 0.5)}


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 convolutions without TF32's rounding."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def model() -> Model:
    return minidiff.load(device="cuda", dtype="float32")


def picture(model: Model, seed: int = 3, **given: object) -> Tensor:
    images = minidiff.generate(PROMPT, model=model, seed=seed, steps=6, output="tensor", **given).images  # type: ignore[arg-type]
    assert isinstance(images, Tensor)
    return images


def without_graphs(model: Model) -> Model:
    """The same model, whose calls are not captured."""
    other = minidiff.load(device="cuda", dtype=model.dtype)
    other.unet._compiled_call_impl = None
    return other


def test_captured_pictures_are_the_plain_ones(model: Model) -> None:
    graphs = captured(model.unet)
    assert graphs is not None
    torch.testing.assert_close(picture(model), picture(without_graphs(model)), rtol=0, atol=0)
    assert any(graph is not None and graph.parts for graph in graphs.graphs.values())
    guided, plain = (picture(one, boxes=BOXES) for one in (model, without_graphs(model)))
    torch.testing.assert_close(guided, plain, rtol=0, atol=2 / 255)  # attention's gradient is not the same each time


def test_pictures_are_those_of_the_cpu(model: Model) -> None:
    cpu = minidiff.load(device="cpu", dtype="float32")
    for given in ({}, {"boxes": BOXES}, {"attention": True}, {"sampler": "euler_ancestral"}):
        torch.testing.assert_close(picture(model, **given), picture(cpu, **given), rtol=0, atol=2 / 255)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_fused_layers_equal_torchs(dtype: torch.dtype) -> None:
    def layer(made: nn.Module, spread: float = 0.5) -> nn.Module:
        for weight in made.parameters():
            weight.normal_(0, spread)
        found = fused.fuse(made.to("cuda", dtype).requires_grad_(False).to(memory_format=torch.channels_last))
        assert found.fused is not None  # else torch would be compared with torch
        return found

    def close(found: Tensor, expected: Tensor) -> None:
        far = (found.double() - expected).abs().max() / expected.abs().max()
        assert far < (2e-5 if dtype == torch.float32 else 1e-2 if dtype == torch.bfloat16 else 2e-3)

    class Config:
        norm_num_groups, norm_eps, block_out_channels = 8, 1e-5, (16,)

    for channels, height, width, batch in ((64, 9, 7, 2), (320, 64, 64, 2), (128, 200, 120, 1), (40, 1, 1, 3)):
        x = (torch.randn(batch, channels, height, width, device="cuda") + 5).to(dtype)
        x = x.to(memory_format=torch.channels_last)
        for silu in (True, False):
            norm = layer((GroupNormSiLU if silu else GroupNorm)(8, channels, 1e-5))
            close(norm(x), GroupNorm.plain(norm.double(), x.double()))
        for out in (channels, 48):
            block, emb = layer(ResBlock(Config, channels, out)), torch.randn(batch, 64, device="cuda", dtype=dtype)  # type: ignore[arg-type]
            found = block(x, emb)
            assert found.is_contiguous(memory_format=torch.channels_last)
            close(found, ResBlock.plain(block.double(), x.double(), emb.double()))
    for channels in (24, 320, 1280):
        norm, gate = layer(LayerNorm(channels)), layer(GEGLU(16, channels))
        x = torch.randn(3, 50, channels, device="cuda").to(dtype) + 1
        close(norm(x), LayerNorm.plain(norm.double(), x.double()))
        x = torch.randn(3, 50, 16, device="cuda").to(dtype)
        close(gate(x), GEGLU.plain(gate.double(), x.double()))
    for channels, height, width, batch in ((64, 9, 7, 2), (320, 64, 64, 2), (640, 32, 24, 1)):
        config = UNetConfig(block_out_channels=(channels,), num_heads=(8,), cross_attention_dim=48)
        block, hooks = layer(Transformer(config, "mid", 0, 0, 0), channels**-0.5), Hooks({}, "all", (), {})
        x = torch.randn(batch, channels, height, width, device="cuda").to(dtype, memory_format=torch.channels_last)
        context = torch.randn(batch, 77, 48, device="cuda").to(dtype)
        found, expected = block(x, context, hooks)[0], block.double().plain(x.double(), context.double(), hooks)[0]
        close(found, expected)
        grown = Upsample(channels)
        conv = fused.fuse(grown.to("cuda", dtype).requires_grad_(False).to(memory_format=torch.channels_last)).conv
        assert type(conv) is fused.GrowConv2d
        found, double = conv.grow(x), F.interpolate(x.double(), scale_factor=2, mode="nearest")
        assert found.is_contiguous(memory_format=torch.channels_last)
        close(found, conv.double()(double))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("keep", [minidiff.ALL, minidiff.HEAD_MEAN, minidiff.COLUMNS, minidiff.BOX_MASS])
@torch.no_grad()
def test_what_is_kept_is_that_of_all_probabilities(keep: minidiff.Keep, dtype: torch.dtype) -> None:
    for grid, tokens, channels in (((16, 16), 77, 160), ((32, 32), 231, 80), ((15, 17), 255, 40), ((64, 64), 4096, 40)):
        q, k = (torch.randn(2, n, 8, channels, device="cuda").to(dtype) for n in (grid[0] * grid[1], tokens))
        q, k = q.transpose(1, 2)[1:], k.transpose(1, 2)[1:]  # one half of a batch
        inputs = {"token_weights": torch.rand(1, 3, tokens, device="cuda")}
        inputs[mask_name(grid)] = torch.rand(1, 3, *grid, device="cuda")
        if tokens == 4096 and keep is minidiff.ALL:
            continue  # 512 MB
        found = kept(minidiff.Site("up", 1, 0, "cross"), q, k, grid, keep, inputs)
        assert found is not None  # else torch would be compared with torch
        probs = attention_probs(q.float(), k.float()).unflatten(2, grid)
        torch.testing.assert_close(found, keep(minidiff.Site("up", 1, 0, "cross"), probs, inputs), rtol=2e-3, atol=2e-5)


def test_recording_leaves_a_picture_as_it_is() -> None:
    half = minidiff.load(device="cuda", dtype="float16")
    expected = picture(without_graphs(half))
    for record in (
        minidiff.Record(minidiff.cross),
        minidiff.Record(minidiff.cross | minidiff.self_, minidiff.HEAD_MEAN),
    ):
        torch.testing.assert_close(picture(half, attention=record), expected, rtol=0, atol=1 / 255)


@torch.no_grad()
def test_float32_is_decoded_by_strips(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(1, 4, 24, 20, device="cuda")
    expected, seen = model.vae.decode(latents), list[int]()
    monkeypatch.setattr(vae, "LARGE", 2**12)
    monkeypatch.setattr(strips, "AT_ONCE", 2**11)
    by_strips = strips._by_strips
    monkeypatch.setattr(strips, "_by_strips", lambda *given: seen.append(1) or by_strips(*given))
    torch.testing.assert_close(model.vae.decode(latents), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert len(seen) > 4


@minidiff.objective
def waiting(maps: dict[minidiff.Site, Tensor], layout: minidiff.Layout) -> Tensor:
    loss = sum(one.mean(dim=(1, 2, 3, 4)) for one in maps.values())
    assert isinstance(loss, Tensor)
    return loss * (1 + float(loss.sum()) / 1e6)


def test_what_waits_for_the_device_runs_without_a_graph(model: Model) -> None:
    how = minidiff.Guidance(waiting, steps=3, iterations=2, threshold=0.0, scale=1.0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = picture(model, boxes=BOXES, guidance=how)
    assert any("cannot be captured as a CUDA graph" in str(one.message) for one in seen)
    torch.testing.assert_close(found, picture(without_graphs(model), boxes=BOXES, guidance=how), rtol=0, atol=2 / 255)
    torch.randn(3, device="cuda")  # torch's random numbers still work
    assert captured(model.unet) is not None


def test_threads_share_a_model(model: Model) -> None:
    alone = [picture(model, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: picture(model, seed), range(4)))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_replaced_weights_are_seen(model: Model) -> None:
    before = picture(model)
    doubled = replace(model, unet=with_weights(model.unet, {"conv_out.bias": model.unet.conv_out.bias + 0.5}))
    after = picture(doubled)
    assert (after - before).abs().max() > 0.05
    torch.testing.assert_close(picture(model), before, rtol=0, atol=0)
    assert captured(doubled.unet) not in (None, captured(model.unet))
    other = minidiff.load(device="cuda", dtype="float32")
    torch.testing.assert_close(picture(other), before, rtol=0, atol=0)
    other.unet.load_state_dict(doubled.unet.state_dict(), assign=True)  # tensors at other addresses
    torch.testing.assert_close(picture(other), after, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_is_captured(model: Model, name: str) -> None:
    """Its looks wait for the card in the stop test alone, and are the plain ones."""
    given = {"boxes": BOXES, "guidance": minidiff.Guidance(OBJECTIVES[name], threshold=0.0, iterations=3, steps=1)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = picture(model, **given)
    torch.testing.assert_close(found, picture(without_graphs(model), **given), rtol=0, atol=2 / 255)


def test_graphs_are_given_up_where_memory_runs_out() -> None:
    """A call that needs half of their memory gets it, and what comes then is as before."""
    other = minidiff.load(device="cuda", dtype="float32")
    expected, graphs = picture(without_graphs(other)), captured(other.unet)
    assert graphs is not None

    def reserved() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    def stages(x: Tensor, size: int) -> Iterator[Tensor]:
        yield torch.empty(size, dtype=torch.uint8, device=x.device)

    before = reserved()
    picture(other)
    after = reserved()
    assert after > before
    torch.cuda.set_per_process_memory_fraction(after / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.warns(UserWarning, match="memory ran out beside captured graphs"):
            (found,) = graphs.run(stages, torch.zeros(1, device="cuda"), (after - before) // 2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert found.numel() == (after - before) // 2 and graphs.given_up == 1
    torch.testing.assert_close(picture(other), expected, rtol=0, atol=0)


def test_models_in_threads_are_captured_one_by_one() -> None:
    models = [minidiff.load(device="cuda", dtype="float32") for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(picture, models))
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=0, atol=0)


def test_a_dropped_model_leaves_the_card() -> None:
    other = minidiff.load(device="cuda")
    picture(other, boxes=BOXES)
    gone, used = weakref.ref(other.unet), torch.cuda.memory_allocated()
    del other
    gc.collect()
    assert gone() is None and torch.cuda.memory_allocated() < used - 2**20
