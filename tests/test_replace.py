"""with_weights: new weights in a network, with the old one unchanged."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from compare import relative_error
from conftest import UNET
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import minidiff
from minidiff.networks.config import UNetConfig
from minidiff.networks.unet import UNet
from minidiff.speed.accelerate import compile_network, compile_unet, is_compiled, prepare
from minidiff.speed.packed import Packed
from minidiff.speed.replace import with_weights

NAMES = (
    "conv_in.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q.weight",
    "mid_block.resnets.0.conv1.weight",
    "mid_block.resnets.0.conv1.bias",
    "up_blocks.1.attentions.1.norm.weight",
    "up_blocks.2.resnets.0.time_emb_proj.weight",
)


def plain(network: UNet) -> UNet:
    return network


@pytest.fixture
def base() -> UNet:
    return UNet(UNetConfig.from_dict(UNET)).eval().requires_grad_(False)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, 8, 8), torch.tensor(500.0), torch.randn(2, 7, 64)


def changes_of(network: nn.Module) -> dict[str, Tensor]:
    state = network.state_dict()
    return {name: state[name] + 0.2 * torch.randn(state[name].shape) for name in NAMES}


def every_layer_packed(network: UNet) -> UNet:
    from minidiff.speed.packed import pack

    return pack(network, 0)


@pytest.mark.parametrize("make", [plain, prepare, every_layer_packed])
@pytest.mark.parametrize("used", [False, True])  # packed layers become opaque on their first call
def test_the_new_network_is_as_loaded_with_them_and_the_old_one_as_before(
    base: UNet, batch: tuple[Tensor, Tensor, Tensor], make: Callable[[UNet], UNet], used: bool
) -> None:
    fresh = make(copy.deepcopy(base))
    network = make(base)
    before = network(*batch)[0] if used else None
    state = {name: value.clone() for name, value in network.state_dict().items()}
    changes = changes_of(network)
    new = with_weights(network, changes)
    fresh.load_state_dict({**state, **changes})
    found = new(*batch)[0]
    assert torch.equal(found, fresh(*batch)[0])
    assert {name for name, value in new.state_dict().items() if not torch.equal(value, state[name])} == set(NAMES)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    after = network(*batch)[0]
    assert relative_error(found, after) > 1e-3
    if before is not None:
        assert torch.equal(after, before)
    again = with_weights(new, {name: state[name] for name in NAMES})
    assert torch.equal(again(*batch)[0], after)


def test_all_else_is_shared(base: UNet) -> None:
    network = every_layer_packed(base)
    changes = changes_of(network)
    new = with_weights(network, changes)
    mine, theirs = (dict(net.named_parameters()) for net in (network, new))
    assert {name for name in mine if mine[name] is not theirs[name]} == set(NAMES)
    assert new.down_blocks[1] is network.down_blocks[1]
    assert new.mid_block is not network.mid_block
    assert new.mid_block.resnets[1] is network.mid_block.resnets[1]
    assert with_weights(network, {}) is network
    name = NAMES[0]
    changes[name].zero_()  # a caller's tensor is copied
    assert theirs[name].abs().max() > 0
    handle = new.register_forward_hook(lambda *_: None)
    assert not network._forward_hooks
    handle.remove()


def test_gradients_copies_and_pickles(base: UNet, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    network = every_layer_packed(copy.deepcopy(base))
    changes = changes_of(network)
    new, expected = with_weights(network, changes), copy.deepcopy(base)
    expected.load_state_dict({**base.state_dict(), **changes})
    x, t, context = batch
    grads = []
    for net in (new, expected, copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        leaf = x.clone().requires_grad_()
        net(leaf, t, context)[0].square().sum().backward()
        grads.append(leaf.grad)
    assert all(relative_error(grad, grads[1]) <= 1e-5 for grad in grads)


@pytest.mark.slow
def test_a_compiled_base_is_not_compiled_again(base: UNet, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    real = torch.nn.Module.compile

    def compile_with_counter(self: nn.Module, **flags: object) -> None:
        real(self, fullgraph=True, dynamic=False, backend=counter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", compile_with_counter)
        network = compile_unet(base)
        before = network(*batch)[0]
        assert counter.frame_count == 1
        new = with_weights(network, changes_of(network))
        found = new(*batch)[0]
    assert is_compiled(new)
    assert counter.frame_count == 2
    assert torch.equal(network(*batch)[0], before)
    assert counter.frame_count == 2
    assert relative_error(found, before) > 1e-3
    numbers = [module.number for net in (network, new) for module in net.modules() if isinstance(module, Packed)]
    assert None not in numbers
    eager = with_weights(copy.deepcopy(base), {name: new.state_dict()[name] for name in NAMES})
    eager._compiled_call_impl = None
    assert relative_error(found, eager(*batch)[0]) <= 1e-5


def test_text_encoders_and_autoencoders(tiny_model: minidiff.Model) -> None:
    for network in (tiny_model.vae, tiny_model.text.model):
        state = network.state_dict()
        name = next(name for name in state if name.endswith("weight") and state[name].is_floating_point())
        new = minidiff.with_weights(network, {name: state[name] * 2})
        assert torch.equal(new.state_dict()[name], state[name] * 2)
        assert torch.equal(network.state_dict()[name], state[name])


def test_what_does_not_fit_is_listed(base: UNet) -> None:
    wrong = {
        "conv_in.wait": torch.zeros(1),
        "conv_in.weight": torch.zeros(3),
        "conv_in.bias": torch.full((32,), torch.nan),
        "conv_out.bias": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(ValueError) as caught:
        with_weights(base, wrong)
    message = str(caught.value)
    assert all(name in message for name in wrong)
    assert all(text in message for text in ("is not a weight of this", "not finite", "expected a torch tensor"))


def test_half_precision_is_cast(base: UNet) -> None:
    new = with_weights(base, {"conv_in.bias": torch.ones(32, dtype=torch.float16)})
    assert new.conv_in.bias.dtype == torch.float32
    assert not new.conv_in.bias.requires_grad


class Two(nn.Module):
    """Two layers. (The compiler skips modules that torch itself defines.)"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Around(nn.Module):
    """A network that holds another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.fixture
def uncompiled_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces graphs without compiling them, which is slow."""
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **flags: real(self, backend="eager", **flags))


@pytest.mark.usefixtures("uncompiled_backend")
@pytest.mark.parametrize("make", [compile_network, compile_unet])
def test_layers_shared_with_a_compiled_base_stay_what_they_are(make: Callable[[nn.Module], nn.Module]) -> None:
    network = make(Two())
    layers, x = list(network.children()), torch.randn(3, 8)
    numbers, before = [getattr(layer, "number", None) for layer in layers], network(x)
    new = with_weights(network, {"a.bias": torch.zeros(8)})
    assert new.b is layers[1]
    assert type(new.a) is type(layers[0])
    assert list(network.children()) == layers
    assert [getattr(layer, "number", None) for layer in layers] == numbers
    assert torch.equal(network(x), before)
    expected = Two()
    expected.load_state_dict(new.state_dict())
    torch.testing.assert_close(new(x), expected(x))
    assert torch.equal(network(x), before)


@pytest.mark.usefixtures("uncompiled_backend")
def test_a_compiled_network_inside_another_takes_the_change() -> None:
    outer, x = Around(compile_unet(Two())), torch.randn(3, 8)
    before = outer(x)
    new = with_weights(outer, {"inner.b.bias": outer.state_dict()["inner.b.bias"] + 3})
    assert is_compiled(new.inner)
    torch.testing.assert_close(new(x), before + 3)
    assert torch.equal(outer(x), before)


@pytest.mark.parametrize(
    ("dtype", "value", "said"),
    [
        (torch.float16, torch.full((2,), 1e6), "not finite .* in float16"),  # finite before the cast
        (torch.float32, torch.ones(2, device="meta"), "expected a torch tensor of floating-point numbers"),
        (torch.float32, torch.ones(2).to_sparse(), "expected a torch tensor of floating-point numbers"),
        (torch.float32, torch.tensor([1.0, torch.inf]), "not finite .* in float32"),
    ],
)
def test_values_that_the_layer_cannot_hold(dtype: torch.dtype, value: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=f"bias .*{said}"):
        with_weights(nn.Linear(2, 2, dtype=dtype), {"bias": value})


def test_eight_bit_floats_are_cast() -> None:
    new = with_weights(nn.Linear(2, 2), {"bias": torch.ones(2).to(torch.float8_e4m3fn)})
    assert torch.equal(new.bias, torch.ones(2))
