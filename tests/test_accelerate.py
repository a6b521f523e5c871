"""Which layers are packed, the C library's memory, and the options of compilation."""

import copy
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_packed import close
from torch import Tensor, nn

from minidiff.networks.attention import ALL, Edit, Inputs, Record
from minidiff.networks.config import UNetConfig, VAEConfig
from minidiff.networks.sites import Site
from minidiff.networks.unet import DEEP, ResBlock, UNet
from minidiff.networks.vae import VAE
from minidiff.speed import accelerate
from minidiff.speed.accelerate import (
    _called,
    _flags,
    compile_network,
    compile_unet,
    compile_whole,
    prepare,
    prepare_unet,
)
from minidiff.speed.packed import PackedConv2d, PackedLinear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def test_large_layers_are_packed_and_small_ones_left_alone() -> None:
    network = prepare(nn.ModuleList([nn.Linear(256, 256), nn.Linear(8, 8), nn.Conv2d(96, 96, 3), nn.Conv2d(4, 8, 3)]))
    assert [type(layer) for layer in network] == [PackedLinear, nn.Linear, PackedConv2d, nn.Conv2d]


def test_convolutions_of_other_kinds_are_left_alone() -> None:
    network = nn.Sequential(
        nn.Conv2d(256, 128, 3, groups=2),
        nn.Conv2d(128, 128, 3, dilation=2),
        nn.Conv2d(128, 128, 3, padding="same"),
        nn.Conv2d(128, 128, 3, padding=1, padding_mode="circular"),
    )
    assert [type(child) for child in prepare(network)] == [nn.Conv2d] * 4


def double(site: Site, probs: Tensor, inputs: Inputs) -> Tensor:
    """An edit's function."""
    return 2 * probs


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("site", [None, 0, 1])  # none, self-attention, cross-attention
@pytest.mark.parametrize("hook", ["record", "edit", "deep"])
@torch.no_grad()
def test_what_both_halves_share_is_computed_once(
    images: int, site: int | None, hook: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerate, "_HALVED", 0)
    torch.manual_seed(0)
    config = UNetConfig(
        block_out_channels=(16, 32),
        layers_per_block=(1, 1),
        down_attention=(True, False),
        up_attention=(False, True),
        num_heads=(2, 2),
        cross_attention_dim=24,
        norm_num_groups=8,
    )
    unet = prepare_unet(UNet(config).requires_grad_(False))
    one, context, rows = torch.randn(images, 4, 6, 5), torch.randn(2 * images, 7, 24), list[int]()
    block, plain = unet.down_blocks[0].resnets[0], ResBlock.plain

    def counted(own: ResBlock, x: Tensor, emb: Tensor) -> Tensor:
        rows.extend([len(x)] if own is block else [])
        return plain(own, x, emb)

    monkeypatch.setattr(ResBlock, "plain", counted)
    sites = frozenset(() if site is None else (unet.sites[site],))
    record = Record(sites, ALL) if hook == "record" and sites else None
    edits = [Edit(sites, probs=double, rows="cond")] if hook == "edit" and sites else []
    deep: Tensor | bool = hook == "deep"
    for x, shared in ((torch.cat([one, one]), site != 0 or hook == "deep"), (torch.cat([one, one + 1]), False)):
        t = torch.full((2 * images,), 300.0)
        found = unet(x, t, context, record, edits, {}, deep)
        monkeypatch.setattr(unet, "distinct", None)
        expected = unet(x, t, context, record, edits, {}, deep)
        if hook == "deep":
            around = unet(x, t, context, None, (), {}, found[1][DEEP])[0]
            monkeypatch.setattr(unet, "distinct", accelerate.distinct)
            torch.testing.assert_close(unet(x, t, context, None, (), {}, found[1][DEEP])[0], around)
        monkeypatch.setattr(unet, "distinct", accelerate.distinct)
        torch.testing.assert_close(found, expected)
        assert rows[0] == (images if shared else 2 * images) and rows[1] == 2 * images
        rows.clear()
        unet(x, torch.arange(2.0 * images), context)
        with torch.enable_grad():
            unet(x, t, context)
        hook_on_it = block.norm2.register_forward_hook(lambda *_: None)  # that expects all rows
        unet(x, t, context)
        hook_on_it.remove()
        assert rows == [2 * images] * 3
        rows.clear()


@torch.no_grad()
def test_a_network_without_attention_has_no_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate, "_HALVED", 0)
    none = UNetConfig(
        block_out_channels=(16,),
        layers_per_block=(1,),
        down_attention=(False,),
        up_attention=(False,),
        num_heads=(2,),
        cross_attention_dim=24,
        norm_num_groups=8,
        mid_block=False,
    )
    eps, _ = prepare_unet(UNet(none).requires_grad_(False))(torch.randn(2, 4, 6, 5), 3.0, torch.randn(2, 7, 24))
    assert eps is not None and eps.shape == (2, 4, 6, 5)


def test_the_autoencoder_keeps_no_second_form_of_its_weights() -> None:
    """It runs once a picture, and they would be 377 MB."""
    vae = VAE(VAEConfig(block_out_channels=(64, 256), layers_per_block=1)).requires_grad_(False)
    layers = [layer for layer in accelerate.prepare(vae).modules() if isinstance(layer, PackedConv2d)]
    assert layers and not any(layer.keeps for layer in layers)
    with torch.no_grad():
        vae.decode(torch.randn(1, 4, 32, 32))
    assert not any("transformed" in layer.derived for layer in layers)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_kept_memory_is_not_paid_for_twice() -> None:
    code = """
import resource, sys, torch
from minidiff.speed.accelerate import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
def faults():
    torch.ones(2**24)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
seen = [faults() for _ in range(10)]
print(min(after - before for before, after in zip(seen, seen[1:])))
"""
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", code, how], check=True, capture_output=True, text=True).stdout)
        for how in ("keep", "not")
    )
    assert kept < 100 < 2**14 <= given_back, (kept, given_back)  # pages of 4 KB


# ---- compilers


def test_what_compiling_asks_for() -> None:
    """One graph without breaks or dynamic shapes, captured on CUDA."""
    asked: list[dict[str, object]] = []
    network = nn.Linear(2, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **flags: asked.append(flags) or function)
        patch.setattr(nn.Module, "compile", lambda self, **flags: asked.append(flags))
        compile_network(network)
        assert compile_whole(gradient, network) is compile_whole(gradient, network)
    assert len(asked) == 2
    asked.append(_flags(torch.device("cuda")))
    assert all(flags["fullgraph"] is True and flags["dynamic"] is False for flags in asked)
    assert [flags.get("mode") for flags in asked] == [None, None, "reduce-overhead"]


def gradient(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of a nonlinear function, so that it depends on the weights and on x."""
    return torch.func.grad(lambda x: forward(x).sin().sum())(x)


class Small(nn.Module):
    """Not one of torch's own modules, which the compiler does not treat as a whole network."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 6, 3, padding=1)
        self.linear = nn.Linear(6, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv_in(x).sin().flatten(2).mT)


@pytest.mark.slow
def test_each_network_is_compiled_with_its_own_weights() -> None:
    """The compiler caches graphs by code, which networks share."""
    x = torch.randn(1, 4, 8, 8)
    for _ in range(2):
        plain = Small().requires_grad_(False)
        network = compile_unet(copy.deepcopy(plain))
        close(compile_whole(gradient, network)(network.forward, x), gradient(plain, x))
        close(network(x), plain(x))


def test_compiled_layers_are_packed_whatever_their_size_and_have_numbers_of_their_own() -> None:
    first, second = (
        [layer.number for layer in compile_unet(Small().requires_grad_(False)).children()] for _ in range(2)
    )
    assert first == [first[0], first[0] + 1]
    assert second == [number + 2**16 for number in first]


@pytest.mark.slow
def test_a_second_process_finds_the_graphs_but_not_those_of_layers_of_other_sizes(tmp_path: Path) -> None:
    code = """
import sys, torch
from test_accelerate import Small, close, compile_unet, compile_whole, copy, gradient
from torch._dynamo.utils import counters
plain = Small(int(sys.argv[1])).requires_grad_(False)
network = compile_unet(copy.deepcopy(plain))
x = torch.randn(1, 4, 8, 8)
close(network(x), plain(x))
close(compile_whole(gradient, network)(network.forward, x), gradient(plain, x))
print(counters["inductor"]["fxgraph_cache_miss"] + counters["aot_autograd"]["autograd_cache_miss"])
"""
    there = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent)}
    misses = []
    for width in ("8", "8", "16"):
        command = [sys.executable, "-c", code, width]
        misses.append(int(subprocess.run(command, check=True, capture_output=True, text=True, env=there).stdout))
    assert misses[0] >= 2
    assert misses[1] == 0
    assert misses[2] == misses[0]


def test_callers_with_and_without_gradients_share_a_graph() -> None:
    torch._dynamo.reset()
    network, x = Small().requires_grad_(False), torch.randn(1, 4, 8, 8)
    compiled: list[object] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        compiled.append(graph)
        return graph.forward

    call = _called(torch.compile(network.forward, backend=count), network, torch.device("cpu"))
    first = call(x)
    with torch.no_grad():
        assert torch.equal(call(x), first)
    assert len(compiled) == 1
    assert not first.requires_grad
    leaf = x.clone().requires_grad_()
    assert call(leaf).requires_grad
    with torch.no_grad():
        assert not call(leaf).requires_grad
    network.linear.weight.requires_grad_()
    assert call(x).requires_grad


@pytest.mark.slow
def test_graphs_hold_no_weights() -> None:
    """With the compiler's own packing, each graph kept a second copy of them for the life of the process."""
    code = """
import gc, torch
from torch import nn
from bench.load_once import resident
from minidiff.speed.accelerate import compile_unet
class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 1)
        self.layers = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(4)))  # 268 MB
    def forward(self, x):
        return self.layers(x).sin()
network, held = compile_unet(Wide().requires_grad_(False)), []
for rows in (8, 9, 10):
    network(torch.ones(rows, 4096))
    gc.collect()
    held.append(resident("VmRSS"))
print(held[2] - held[0])
"""
    there = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=there)
    assert int(done.stdout) < 2**27


def test_a_sweep_of_many_sizes_is_compiled() -> None:
    torch._dynamo.reset()
    sine = torch.compile(torch.sin, backend="eager", fullgraph=True, dynamic=False)
    call = _called(sine, nn.Identity(), torch.device("cpu"))
    for n in range(1, 12):  # torch's own limit is 8
        assert call(torch.ones(n)).shape == (n,)
        call(torch.ones(n + 20, requires_grad=True))


def test_what_a_captured_graph_returns_is_copied() -> None:
    buffer = torch.zeros(3)
    call = _called(lambda: (buffer, {"maps": buffer}, 7), nn.Identity(), torch.device("cuda"))
    eps, maps, number = call()
    buffer += 1
    assert (eps.sum(), maps["maps"].sum(), number) == (0, 0, 7)
