"""speed/capture.py without a card: a stand-in for graphs runs the stages again, on the buffers that a graph would read,
into the memory that it would write.
"""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import minidiff
from minidiff.guidance.evaluate import plainly
from minidiff.model import Model
from minidiff.networks.attention import HEAD_MEAN, Record
from minidiff.networks.sites import choose, cross
from minidiff.networks.unet import UNet
from minidiff.speed import capture
from minidiff.speed.accelerate import is_compiled, prepare_unet
from minidiff.speed.capture import Captured, Graph, _NoWaits, capture_calls, captured
from minidiff.speed.replace import with_weights

CAPTURED: list[str] = []
REPLAYED: list[int] = []
SETTINGS, CAPTURE = capture._settings, capture.capture


class Part:
    """One part of a stand-in: reruns the parts up to this one."""

    def __init__(self, stages: Any, args: Any, number: int, found: Any) -> None:
        self.stages, self.args, self.number, self.found = stages, args, number, found

    def replay(self) -> None:
        REPLAYED.append(self.number)
        running = self.stages(*self.args)
        again = [next(running) for _ in range(self.number + 1)][-1]
        with torch.no_grad():
            for old, new in zip(tree_leaves(self.found), tree_leaves(again), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)


def stand_in(stages: Any, leaves: list[Any], spec: Any, pools: Any) -> Graph:
    buffers = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    args = tree_unflatten(buffers, spec)
    CAPTURED.append(stages.__name__)
    found = list(stages(*args))
    parts = [(Part(stages, args, number, one), one) for number, one in enumerate(found)]
    return Graph([one if isinstance(one, Tensor) else None for one in buffers], parts)


@pytest.fixture(autouse=True)
def _card(monkeypatch: pytest.MonkeyPatch) -> None:
    CAPTURED.clear()
    REPLAYED.clear()
    monkeypatch.setattr(capture, "_on_card", bool)
    monkeypatch.setattr(capture, "_settings", lambda: None)
    monkeypatch.setattr(capture, "capture", stand_in)


@pytest.fixture
def model(tiny_model: Model) -> Model:
    """The tiny model with a UNet whose calls are captured."""
    unet = UNet(tiny_model.unet.config)
    unet.load_state_dict(tiny_model.unet.state_dict())
    return replace(tiny_model, unet=capture_calls(unet.eval().requires_grad_(False)))


def inputs(model: Model, seed: int, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(rows, model.text.length, model.text.width, generator=generator)
    return torch.randn(rows, 4, 8, 8, generator=generator), torch.tensor(100.0 * seed), context


@torch.no_grad()
def test_a_call_is_captured_when_it_comes_again_and_replayed_for_new_inputs(model: Model) -> None:
    seen = []
    for seed in range(4):
        given = inputs(model, seed)
        eps, _ = model.unet(*given)
        expected, _ = model.unet.forward(*given)
        assert eps is not None and expected is not None
        torch.testing.assert_close(eps, expected, rtol=0, atol=0)
        seen.append((eps, expected))
        assert len(CAPTURED) == min(seed, 1)
    for eps, expected in seen:  # copies, which later replays leave alone
        torch.testing.assert_close(eps, expected, rtol=0, atol=0)
    assert captured(model.unet) is not None and not is_compiled(model.unet)


@torch.no_grad()
def test_each_size_and_record_has_a_graph_and_the_oldest_is_dropped(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "MOST", 2)
    record = Record(choose(cross, model.unet.positions(8, 8)), HEAD_MEAN)
    calls = [(inputs(model, 1), ()), (inputs(model, 1, 4), ()), (inputs(model, 1), (record,))]
    for given, more in calls:
        for _ in range(2):
            eps, maps = model.unet(*given, *more)
            expected, theirs = model.unet.forward(*given, *more)
            torch.testing.assert_close((eps, maps), (expected, theirs), rtol=0, atol=0)
    assert len(CAPTURED) == 3
    model.unet(*inputs(model, 2), record)  # still there
    assert len(CAPTURED) == 3
    for _ in range(2):
        model.unet(*inputs(model, 2))  # dropped since
    assert len(CAPTURED) == 4


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "captured", "replayed"),
    [("values", 1, 4), ("assigned", 2, 3), ("inner hook", 1, 1), ("hook", 1, 1), ("forward", 1, 1)],
)
def test_a_changed_network_is_not_replayed(model: Model, change: str, captured: int, replayed: int) -> None:
    """New values at the same addresses are read by the graph; else it would be another network's."""
    given = inputs(model, 1)
    for _ in range(2):
        model.unet(*given)
    seen: list[int] = []
    doubled = {name: 1.5 * value for name, value in model.unet.state_dict().items()}
    if "hook" in change:
        module = model.unet.conv_out if change == "inner hook" else model.unet
        module.register_forward_hook(lambda *_: seen.append(1))
    elif change == "forward":
        plain = model.unet.conv_out.forward
        model.unet.conv_out.forward = lambda x: seen.append(1) or plain(x)  # type: ignore[method-assign]
    else:
        model.unet.load_state_dict(doubled, assign=change == "assigned")
    for _ in range(3):
        model.unet(*given)
    assert (len(CAPTURED), len(REPLAYED)) == (captured, replayed)
    assert len(seen) == (0 if change in ("values", "assigned") else 3)
    torch.testing.assert_close(model.unet(*given)[0], UNet.forward(model.unet, *given)[0], rtol=0, atol=0)


@torch.no_grad()
def test_a_network_with_other_weights_has_graphs_of_its_own(model: Model) -> None:
    name = "conv_out.weight"
    other = with_weights(model.unet, {name: 2 * model.unet.state_dict()[name]})
    given = inputs(model, 1)
    for _ in range(3):
        for unet in (model.unet, other):
            torch.testing.assert_close(unet(*given)[0], unet.forward(*given)[0], rtol=0, atol=0)
    assert len(CAPTURED) == 2 and captured(other) is not captured(model.unet)


def test_gradients_are_not_captured(model: Model) -> None:
    x, t, context = inputs(model, 1)
    for _ in range(3):
        for given in ((x.requires_grad_(), t, context), (x.detach(), t, context.requires_grad_())):
            eps, _ = model.unet(given[0], given[1], context=given[2])
            wanted = next(one for one in given if one.requires_grad)
            assert eps is not None and torch.autograd.grad(eps.sum(), wanted)[0].abs().max() > 0
            context = context.detach()
    assert not CAPTURED


@pytest.mark.parametrize("half", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_guided_pictures_are_the_same_bits(model: Model, half: bool) -> None:
    ways = {}
    if half:
        model = replace(model, unet=capture_calls(model.unet.half()))
    for name in ("captured", "plain"):
        if name == "plain":
            model.unet._compiled_call_impl = None
        result = minidiff.generate(
            ["a cat", "a cat and a dog"],
            model=model,
            boxes={"cat": (0.1, 0.1, 0.6, 0.7)},
            guidance=minidiff.Guidance(threshold=0.0, iterations=2, steps=3),
            steps=4,
            seed=1,
            width=64,
            height=64,
            output="latents",
        )
        ways[name] = result
    torch.testing.assert_close(ways["captured"].latents, ways["plain"].latents, rtol=0, atol=0)
    for one, other in zip(ways["captured"].reports, ways["plain"].reports, strict=True):
        torch.testing.assert_close(one.loss, other.loss, rtol=0, atol=0)
    assert sorted(CAPTURED) == ["_call", "look_stages"]


def test_a_look_that_stops_early_frees_the_lock(model: Model) -> None:
    graphs = captured(model.unet)
    assert graphs is not None

    def stages(x: Tensor) -> Iterator[Tensor]:
        yield x + 1
        yield x + 2

    for value in range(3):
        running = graphs.run(stages, torch.full((), float(value)))
        assert next(running) == value + 1
        running.close()
        assert graphs.lock.acquire(blocking=False)
        graphs.lock.release()
    assert [float(one) for one in graphs.run(stages, torch.tensor(5.0))] == [6, 7]
    assert [float(one) for one in plainly(stages, torch.tensor(5.0))] == [6, 7]


def test_what_cannot_be_captured_runs_as_it_is(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "capture", lambda *_: Graph([], []))
    with torch.no_grad():
        for seed in range(3):
            given = inputs(model, seed)
            torch.testing.assert_close(model.unet(*given)[0], model.unet.forward(*given)[0], rtol=0, atol=0)


def test_graphs_do_not_keep_themselves(model: Model) -> None:
    unet = model.unet
    with torch.no_grad():
        for _ in range(2):
            unet(*inputs(model, 1))
    gone = weakref.ref(unet._compiled_call_impl)
    CAPTURED.clear()
    gc.disable()
    try:
        unet._compiled_call_impl = Captured(unet)
        assert gone() is None
    finally:
        gc.enable()


def test_operators_that_wait_are_found() -> None:
    x = torch.arange(4.0)
    with _NoWaits():
        assert x.sum().shape == () and (x * 2).to(torch.float64).dtype == torch.float64
        for wait in (lambda: float(x.sum()), lambda: x[x > 1], lambda: x.nonzero(), lambda: bool(x.sum() > 1)):
            with pytest.raises(RuntimeError, match="waits for the device"):
                wait()
        for copy in (lambda: x.to("meta"), lambda: torch.empty(4, device="meta").copy_(x), lambda: torch.equal(x, x)):
            with pytest.raises(RuntimeError, match="waits"):
                copy()


def test_on_a_cpu_nothing_is_captured(tiny_model: Model) -> None:
    assert captured(prepare_unet(UNet(tiny_model.unet.config))) is None


def test_kinds_that_came_once_push_no_graph_out(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_SEEN", 3)
    graphs = captured(model.unet)
    assert graphs is not None

    def stages(x: Tensor, number: int) -> Iterator[Tensor]:
        yield x + number

    x = torch.tensor(1.0)
    for number in (0, 0, *range(1, 9), 0):
        assert [float(one) for one in graphs.run(stages, x, number)] == [1 + number]
    assert (len(CAPTURED), len(REPLAYED), len(graphs.graphs)) == (1, 2, 4)


@torch.no_grad()
def test_graphs_are_given_up_where_memory_runs_out(model: Model) -> None:
    """The call that found no memory runs again, from where it was; after a few times there are no more graphs."""
    graphs, given = captured(model.unet), inputs(model, 1)
    assert graphs is not None
    expected, calls = model.unet.forward(*given)[0], []

    def full() -> bool:
        return any(graph is not None for graph in graphs.graphs.values())

    def stages(x: Tensor) -> Iterator[Tensor]:
        yield x + 1
        calls.append(full())
        if full() or not x:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield x + 2

    for lost in range(1, 4):
        for _ in range(2):
            assert torch.equal(model.unet(*given)[0], expected)  # type: ignore[arg-type]
        assert full() and len(CAPTURED) == lost
        with pytest.warns(UserWarning, match="memory ran out beside captured graphs"):
            if lost == 2:
                (found,) = capture.spared(model.unet, lambda: [list(stages(torch.ones(())))])
            else:
                found = list(graphs.run(stages, torch.ones(())))
        assert [float(one) for one in found] == [2, 3] and calls == [True, False]
        assert not graphs.graphs and not graphs.pools
        calls.clear()
    for _ in range(3):
        assert torch.equal(model.unet(*given)[0], expected)  # type: ignore[arg-type]
    assert len(CAPTURED) == 3
    for call in (lambda: list(graphs.run(stages, torch.zeros(()))), lambda: capture.spared(model.unet, full_card)):
        with pytest.raises(torch.OutOfMemoryError):  # no graph holds what is missing
            call()


def full_card(*_: object) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_capture_without_memory_is_tried_again_where_other_graphs_had_it(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, x = captured(model.unet), torch.ones(())
    assert graphs is not None

    def stages(x: Tensor, number: int) -> Iterator[Tensor]:
        yield x + number

    def run(number: int, times: int = 1) -> None:
        for _ in range(times):
            assert [float(one) for one in graphs.run(stages, x, number)] == [1 + number]

    def crowded(stages: Any, leaves: list[Any], *more: Any) -> Graph | None:
        if leaves[1] == 3:
            return Graph([], [])
        return None if leaves[1] == 2 and (graphs.any_left() or alone) else stand_in(stages, leaves, *more)

    alone = False
    monkeypatch.setattr(capture, "capture", crowded)
    run(3, 3)  # cannot be captured, which stays known
    run(1, 2)
    run(2)
    with pytest.warns(UserWarning, match="memory ran out beside captured graphs"):
        run(2)
    assert len(graphs.graphs) == 2 and not graphs.any_left() and len(CAPTURED) == 1
    run(2, 2)
    run(3)
    assert graphs.any_left() and len(CAPTURED) == 2
    with pytest.warns(UserWarning, match="memory ran out beside captured graphs"):
        graphs.give_up()
    alone = True
    run(2)
    with pytest.warns(UserWarning, match="no memory for a CUDA graph of this call"):
        run(2)
    run(2, 3)  # is not tried again
    assert len(CAPTURED) == 2


def test_a_capture_tells_missing_memory_from_what_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("current_stream", "graph_pool_handle", "current_device", "stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(capture, "_stream", MagicMock())
    leaves, spec = tree_flatten((torch.ones(()),))
    assert CAPTURE(full_card, leaves, spec, {}) is None
    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph.*waits for the device"):
        graph = CAPTURE(lambda x: iter([float(x)]), leaves, spec, {})
    assert graph is not None and not graph.parts


@torch.no_grad()
def test_a_networks_new_modules_and_weights_are_noticed(model: Model) -> None:
    unet = model.unet
    watched = capture.Watched(unet)
    before = watched.weights(unet)
    assert before == capture.Watched(unet).weights(unet) and watched.holds()
    unet.conv_out.weight.data = unet.conv_out.weight.data.clone()
    assert before != watched.weights(unet) is not None and watched.holds()
    unet.conv_out.register_buffer("more", torch.ones(1))
    assert len(watched.weights(unet) or ()) == len(before or ()) + 1
    unet.conv_out.bias.requires_grad_(True)
    assert watched.weights(unet) is None
    unet.conv_out = torch.nn.Sequential(unet.conv_out.requires_grad_(False))  # type: ignore[assignment]
    assert not watched.holds()
    for leaf in (unet.conv_in, unet):
        watched = capture.Watched(unet)
        leaf.forward = leaf.forward  # type: ignore[method-assign]
        assert watched.weights(unet) is None
        del leaf.forward
        assert watched.holds() and watched.weights(unet) is not None
    unet.conv_in.add_module("inner", torch.nn.Identity())
    assert not watched.holds()


@torch.no_grad()
def test_a_captured_call_walks_no_modules(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        model.unet(*inputs(model, 1))
    monkeypatch.setattr(torch.nn.Module, "named_modules", lambda *_: 1 / 0)
    model.unet(*inputs(model, 2))
    assert len(REPLAYED) == 2


def test_torchs_settings_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("backends.cudnn.benchmark", "are_deterministic_algorithms_enabled", "backends.no.such.setting")
    assert [capture._setting(name) for name in names] == [False, False, None]
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert capture._setting(names[0]) is True
    assert sum(capture._setting(name) is not None for name in capture._SETTINGS) >= 9
    monkeypatch.setattr(torch.cuda, "current_stream", torch.cpu.current_stream)
    monkeypatch.setattr(torch.cpu.Stream, "cuda_stream", 0, raising=False)
    found = []
    for on, dtype in ((True, torch.float16), (True, torch.bfloat16), (False, torch.float16), (False, torch.bfloat16)):
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda _, on=on: on)
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda _, dtype=dtype: dtype)
        found.append(SETTINGS())
    assert len(set(found)) == 3
