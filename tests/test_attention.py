"""Recording and editing attention: results equal slow formulas, and nothing else changes."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from compare import relative_error
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import minidiff
from minidiff.networks.attention import (
    ALL,
    AT_ONCE,
    BOX_MASS,
    COLUMNS,
    HEAD_MEAN,
    ROWS,
    AttentionLayer,
    Edit,
    Inputs,
    Keep,
    Record,
    attention,
    attention_probs,
    mask_name,
    recorded_attention,
)
from minidiff.networks.config import UNetConfig
from minidiff.networks.sites import Site
from minidiff.networks.unet import UNet

CONFIG = UNetConfig(
    block_out_channels=(32, 64),
    down_attention=(True, False),
    up_attention=(False, True),
    layers_per_block=(1, 1),
    num_heads=(2, 4),
    cross_attention_dim=24,
    norm_num_groups=8,
)
GRIDS = {"down.0": (6, 10), "mid.0": (3, 5), "up.1": (6, 10)}


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIG).eval().requires_grad_(False)


@pytest.fixture
def batch() -> tuple[Tensor, float, Tensor]:
    """A batch [uncond, cond] of two images."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 4, 6, 10, generator=generator), 321.0, torch.randn(4, 7, 24, generator=generator)


def by_name(unet: UNet, *names: str) -> frozenset[Site]:
    return frozenset(site for site in unet.sites if site.name in names)


def add_bias(site: Site, grid: tuple[int, int], inputs: Inputs) -> Tensor:
    return inputs["bias"]


def double_first(site: Site, probs: Tensor, inputs: Inputs) -> Tensor:
    return torch.cat([2 * probs[..., :1], probs[..., 1:]], dim=-1)


def test_recording_changes_nothing_and_covers_every_site(unet: UNet, batch: tuple[Tensor, float, Tensor]) -> None:
    plain, _ = unet(*batch)
    eps, maps = unet(*batch, Record(frozenset(unet.sites), ALL, rows="all"))
    assert relative_error(eps, plain) <= 1e-5
    assert set(maps) == set(unet.sites)
    for site, probs in maps.items():
        heads = 4 if site.place == "mid" else 2
        h, w = GRIDS[f"{site.place}.{site.block}"]
        assert probs.shape == (4, heads, h, w, 7 if site.kind == "cross" else h * w)
        torch.testing.assert_close(probs.sum(-1), torch.ones(4, heads, h, w))


def test_maps_equal_a_slow_formula(unet: UNet, batch: tuple[Tensor, float, Tensor]) -> None:
    site = next(iter(by_name(unet, "mid.0.0.cross")))
    module = unet.get_submodule(site.key)
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.extend(args[:2]))
    _, maps = unet(*batch, Record(frozenset([site]), ALL, rows="all"))
    handle.remove()
    x, context = seen
    for b in range(4):
        for head in range(4):
            part = slice(head * 16, head * 16 + 16)
            q, k = x[b] @ module.to_q.weight[part].T, context[b] @ module.to_k.weight[part].T
            for u in range(15):
                weights = [math.exp(float(q[u] @ k[token]) / 4) for token in range(7)]
                expected = torch.tensor(weights) / sum(weights)
                torch.testing.assert_close(maps[site][b, head, u // 5, u % 5], expected, atol=1e-6, rtol=1e-4)


def test_rows_choose_the_half(unet: UNet, batch: tuple[Tensor, float, Tensor]) -> None:
    record = Record(by_name(unet, "mid.0.0.cross", "up.1.1.self"), ALL, rows="all")
    _, every = unet(*batch, record)
    for rows, half in (("uncond", slice(0, 2)), ("cond", slice(2, 4))):
        eps, maps = unet(*batch, replace(record, rows=rows))
        assert relative_error(eps, unet(*batch)[0]) <= 1e-5
        for site, probs in maps.items():
            torch.testing.assert_close(probs, every[site][half])


def test_what_is_kept_beside_the_fused_kernel(unet: UNet, batch: tuple[Tensor, float, Tensor]) -> None:
    """The output is then that without a record, bit for bit. Edited sites, and what is not taken, go the other way."""
    unet, taken = copy.deepcopy(unet), [True]
    sites, edited = by_name(unet, "down.0.0.cross", "up.1.1.self", "mid.0.0.cross"), by_name(unet, "mid.0.0.cross")
    called: list[Site] = []

    def kept(site: Site, q: Tensor, k: Tensor, grid: tuple[int, int], keep: Keep, inputs: Inputs) -> Tensor | None:
        called.append(site)
        return keep(site, attention_probs(q, k).unflatten(2, grid), inputs) if taken[0] else None

    edits = [Edit(edited, bias=add_bias)]
    inputs = {"bias": torch.randn(1, 1, 1, 1, 7)}
    plain, _ = unet(*batch, edits=edits, inputs=inputs)
    expected = {rows: unet(*batch, Record(sites, rows=rows), edits, inputs) for rows in ROWS}
    for layer in unet.modules():
        if isinstance(layer, AttentionLayer):
            layer.fused = kept
    for rows in ROWS:
        eps, maps = unet(*batch, Record(sites, rows=rows), edits, inputs)
        for site in sites:
            torch.testing.assert_close(maps[site], expected[rows][1][site], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(eps, expected[rows][0], rtol=1e-4, atol=1e-5)
    assert set(called) == sites - edited
    unedited, _ = unet(*batch, Record(sites - edited), edits, inputs)
    assert torch.equal(unedited, plain)
    taken[0] = False
    eps, maps = unet(*batch, Record(sites), edits, inputs)
    torch.testing.assert_close((eps, maps), expected["cond"], rtol=0, atol=0)


def test_keeps(unet: UNet, batch: tuple[Tensor, float, Tensor]) -> None:
    sites = by_name(unet, "mid.0.0.cross", "up.1.0.cross")
    _, every = unet(*batch, Record(sites, ALL))
    _, means = unet(*batch, Record(sites, HEAD_MEAN))
    weights = torch.rand(2, 3, 7)
    _, columns = unet(*batch, Record(sites, COLUMNS), inputs={"token_weights": weights})
    for site, probs in every.items():
        torch.testing.assert_close(means[site], probs.mean(1))
        for b in range(2):
            for o in range(3):
                expected = sum(float(weights[b, o, token]) * probs[b, ..., token] for token in range(7))
                torch.testing.assert_close(columns[site][b, ..., o], expected)


@pytest.mark.parametrize("kind", ["cross", "self"])
def test_region_sums_equal_loops(kind: str) -> None:
    probs, masks = torch.rand(2, 3, 2, 4, 8).double(), torch.rand(2, 2, 2, 4).double()
    found = minidiff.REGION_SUMS(Site("mid", 0, 0, kind), probs, {mask_name((2, 4)): masks})
    assert found.shape == (2, 3, 4, 8)
    for b in range(2):
        fields = [*masks[b], 1 - torch.maximum(*masks[b]), torch.ones(2, 4)]
        for o, field in enumerate(fields):
            expected = sum(float(field[y, x]) * probs[b, :, y, x] for y in range(2) for x in range(4))
            torch.testing.assert_close(found[b, :, o], expected)


@pytest.mark.parametrize("keep", [ALL, HEAD_MEAN, COLUMNS, BOX_MASS, minidiff.REGION_SUMS])
@pytest.mark.parametrize("at_once", [1, 250])
def test_a_large_site_goes_by_rows_of_its_grid(
    keep: Keep, at_once: int, unet: UNet, batch: tuple[Tensor, float, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = by_name(unet, "down.0.0.cross", "mid.0.0.cross")
    masks = {mask_name(grid): torch.rand(2, 3, *grid) for grid in GRIDS.values()}
    inputs = {"token_weights": torch.rand(2, 3, 7), "bias": torch.randn(1, 1, 1, 1, 7), **masks}
    edit = Edit(sites, bias=add_bias)
    eps, maps = unet(*batch, Record(sites, keep), [edit], inputs)
    monkeypatch.setattr("minidiff.networks.attention.AT_ONCE", at_once)
    found, by_rows = unet(*batch, Record(sites, keep), [edit], inputs)
    torch.testing.assert_close(found, eps)
    for site in sites:
        torch.testing.assert_close(by_rows[site], maps[site])


@pytest.mark.parametrize("keep", [HEAD_MEAN, BOX_MASS])
def test_the_probabilities_of_a_large_site_are_never_all_there(keep: Keep) -> None:
    grid, largest = (48, 64), [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest[0] = max(largest[0], out.numel() if isinstance(out, Tensor) else 0)
            return out

    q, k, v = (torch.randn(1, 4, 48 * 64, 8) for _ in range(3))
    inputs = {mask_name(grid): torch.ones(1, 1, *grid)}
    site = Site("down", 0, 0, "self")
    with Watch():
        out, _ = recorded_attention(site, q, k, v, grid, keep, inputs)
    torch.testing.assert_close(out, attention(q, k, v))
    assert largest[0] <= AT_ONCE < 4 * (48 * 64) ** 2


@pytest.mark.parametrize("last", ["down.0.0.self", "down.0.0.cross", "mid.0.0.cross", "up.1.0.self", "up.1.1.cross"])
def test_stop_runs_nothing_behind_the_last_site(unet: UNet, batch: tuple[Tensor, float, Tensor], last: str) -> None:
    ran: list[str] = []
    hooks = [m.register_forward_hook(lambda *_, name=n: ran.append(name)) for n, m in unet.named_modules()]
    record = Record(by_name(unet, "down.0.0.self", last), ALL)
    eps, maps = unet(*batch, replace(record, stop=True))
    ran_with_stop = list(ran)
    ran.clear()
    _, expected = unet(*batch, record)
    for hook in hooks:
        hook.remove()
    assert eps is None
    assert set(maps) == set(record.sites)
    for site, probs in maps.items():
        assert torch.equal(probs, expected[site])
    key = next(iter(by_name(unet, last))).key
    # the site's own module is the last leaf that ran; only its parents' hooks follow
    assert ran_with_stop[-1] != "conv_out"
    assert [name for name in ran_with_stop if name and not key.startswith(name)][-1] == f"{key}.to_out.0"


def test_bias_and_probability_edits_equal_a_slow_formula(unet: UNet, batch: tuple[Tensor, float, Tensor]) -> None:
    sites = by_name(unet, "mid.0.0.cross")
    bias = torch.randn(2, 1, 3, 5, 7)
    inputs = {"bias": bias}
    record = Record(sites, ALL)
    _, plain = unet(*batch, record)
    _, biased = unet(*batch, record, [Edit(sites, bias=add_bias)], inputs)
    _, both = unet(*batch, record, [Edit(sites, bias=add_bias, probs=double_first)], inputs)
    (site,) = sites
    weights = plain[site] * bias.exp()
    expected = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(biased[site], expected)
    torch.testing.assert_close(both[site], double_first(site, expected, inputs))


def halve(site: Site, logits: Tensor, inputs: Inputs) -> Tensor:
    return logits / 2


def twice(site: Site, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Repeats every token with twice the value."""
    return torch.cat([k, k], dim=2), torch.cat([v, 2 * v], dim=2)


def square(site: Site, probs: Tensor, inputs: Inputs) -> Tensor:
    return probs**2


def raise_first(site: Site, logits: Tensor, inputs: Inputs) -> Tensor:
    return torch.cat([logits[..., :1] + 1, logits[..., 1:]], dim=-1)


def test_edits_of_a_site_act_in_order(unet: UNet, batch: tuple[Tensor, float, Tensor]) -> None:
    (site,) = sites = by_name(unet, "mid.0.0.cross")
    bias = torch.randn(2, 1, 3, 5, 7)
    record, inputs = Record(sites, ALL), {"bias": bias}
    plain = unet(*batch, record)[1][site].log()  # the logits up to a constant per pixel
    edits = [Edit(sites, logits=halve), Edit(sites, bias=add_bias), Edit(sites, probs=double_first)]
    found = unet(*batch, record, edits, inputs)[1][site]
    torch.testing.assert_close(found, double_first(site, ((plain + bias) / 2).softmax(-1), inputs))
    two = [Edit(sites, bias=add_bias), Edit(sites, bias=add_bias)]
    torch.testing.assert_close(unet(*batch, record, two, inputs)[1][site], (plain + 2 * bias).softmax(-1))
    first, squared = Edit(sites, probs=double_first), Edit(sites, probs=square)
    for pair, expected in (
        ([first, squared], square(site, double_first(site, plain.exp(), inputs), inputs)),
        ([squared, first], double_first(site, square(site, plain.exp(), inputs), inputs)),
    ):
        torch.testing.assert_close(unet(*batch, record, pair, inputs)[1][site], expected)
    halved, raised = Edit(sites, logits=halve), Edit(sites, logits=raise_first)
    found = unet(*batch, record, [halved, raised], inputs)[1][site]
    torch.testing.assert_close(found, raise_first(site, plain / 2, inputs).softmax(-1))


def test_keys_and_values_stay_on_the_fused_kernel(unet: UNet, batch: tuple[Tensor, float, Tensor]) -> None:
    """With every token repeated at twice the value, the output is 1.5 times as large."""
    site = next(site for site in unet.sites if site.name == "mid.0.0.cross")
    attn = unet.get_submodule(site.key)
    seen: list[Tensor] = []
    handle = attn.to_out[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    unet(*batch)
    unet(*batch, edits=[Edit(frozenset([site]), kv=twice)])
    handle.remove()
    torch.testing.assert_close(seen[1][2:], 1.5 * seen[0][2:])
    assert torch.equal(seen[1][:2], seen[0][:2])


def test_records_unite_and_each_site_is_recorded_once(unet: UNet, batch: tuple[Tensor, float, Tensor]) -> None:
    shared, mine, yours = (by_name(unet, name) for name in ("mid.0.0.cross", "up.1.0.cross", "down.0.0.self"))
    inputs = {"token_weights": torch.rand(2, 3, 7)}
    one, two = Record(shared | mine, HEAD_MEAN), Record(shared | yours, COLUMNS)
    kinds = (one | two).kinds
    expected = dict.fromkeys(shared, ALL) | dict.fromkeys(mine, HEAD_MEAN) | dict.fromkeys(yours, COLUMNS)
    assert kinds == expected == (two | one).kinds
    assert (one | one).kinds == one.kinds
    _, maps = unet(*batch, Record(shared | mine, ALL), (), inputs)
    _, both = unet(*batch, one | Record(shared, COLUMNS), (), inputs)
    (site,) = mine
    torch.testing.assert_close(both[site], maps[site].mean(dim=1))
    (site,) = shared
    torch.testing.assert_close(both[site], maps[site])
    with pytest.raises(ValueError, match="rows and stop are 'cond', False in one record and 'all', False in the other"):
        one | replace(two, rows="all")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Record("nowhere"), "site is 'nowhere'; expected a name such as"),
        (lambda: Record(None), "sites is None; expected a choice"),
        (lambda: Record([]), r"sites is \[\]; expected a choice"),
        (lambda: Record({"a": 1}), "sites is"),
        (lambda: Record(minidiff.cross, 3), "keep is 3; expected a Keep such as minidiff.HEAD_MEAN, or a function"),
        (lambda: Record(minidiff.cross, rows="both"), "rows is 'both'; expected one of cond, uncond, all"),
        (lambda: Record(minidiff.cross, stop=1), "stop is 1"),
        (lambda: Edit(minidiff.cross), "some of bias, logits, probs and kv; this one has neither"),
        (lambda: Edit(minidiff.cross, bias=2.0), "bias is 2.0; expected a function"),
        (lambda: Edit(minidiff.cross, bias=add_bias, steps=-1), "steps is -1"),
        (lambda: Edit(minidiff.cross, bias=add_bias, steps=(1, 2, 3)), "steps is .*; expected None, a number"),
        (
            lambda: Edit(minidiff.cross, bias=add_bias, steps=(3, 1)),
            "steps is 1; expected .start, stop. with stop at least start, 3",
        ),
        (lambda: Record(minidiff.cross, more=5), "more is 5"),
        (lambda: Record(torch.ones(())), "sites is 1.0; expected a choice"),
        (lambda: Keep(add_bias, "mine"), r"got Keep\(<function add_bias.*, 'mine'\); expected Keep\("),
        (lambda: Keep("mine", add_bias, sums=add_bias), "mine has one of sums and finish; expected both, or neither"),
    ],
)
def test_records_and_edits_check_themselves(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def nothing(*given: object) -> None:
    return None


def flat(site: Site, probs: Tensor, inputs: Inputs) -> Tensor:
    return probs.flatten(2, 3)


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ({"bias": nothing}, "nothing returned None; expected a tensor broadcastable to"),
        ({"probs": flat}, r"flat returned a Tensor of shape .*; expected a tensor of shape \[2, 4, 3, 5, 7\]"),
        ({"logits": nothing}, "nothing returned None"),
        (
            {"bias": lambda site, grid, inputs: torch.ones(3, 4, 7)},
            r"expected a tensor broadcastable to \[2, 4, 3, 5, 7\]",
        ),
        ({"kv": nothing}, r"nothing returned None; expected a tensor of shape \[2, 4, any, 16\]"),
        ({"kv": lambda site, k, v, inputs: (k[:, :, :3], v)}, r"shape \[2, 4, 7, 16\] .*; expected .* \[2, 4, 3, 16\]"),
        ({"keep": nothing}, "nothing returned None; expected a tensor"),
    ],
)
def test_what_a_callers_function_returns_is_checked(
    unet: UNet, batch: tuple[Tensor, float, Tensor], hooks: dict, message: str
) -> None:
    sites = by_name(unet, "mid.0.0.cross")
    with pytest.raises(ValueError, match=message):
        if "keep" in hooks:
            unet(*batch, Record(sites, hooks["keep"]))
        else:
            unet(*batch, edits=[Edit(sites, **hooks)])


def test_a_bias_is_the_same_fused_and_explicit(unet: UNet, batch: tuple[Tensor, float, Tensor]) -> None:
    sites = by_name(unet, "mid.0.0.cross", "down.0.0.cross")
    inputs = {"bias": torch.tensor([0.0, 3.0, -3.0, 0.0, 1.0, 0.0, 0.0])[None, None, None, None]}
    edit = Edit(sites, bias=add_bias)
    fused, _ = unet(*batch, edits=[edit], inputs=inputs)
    explicit, _ = unet(*batch, Record(sites, ALL), [edit], inputs)
    assert relative_error(explicit, fused) <= 1e-5
    assert relative_error(fused, unet(*batch)[0]) > 1e-3


def test_edits_keep_to_their_half_and_sites(unet: UNet, batch: tuple[Tensor, float, Tensor]) -> None:
    edit = Edit(by_name(unet, "up.1.1.cross"), probs=double_first)
    plain, _ = unet(*batch)
    eps, _ = unet(*batch, edits=[edit])
    assert relative_error(eps[:2], plain[:2]) <= 1e-5
    assert relative_error(eps[2:], plain[2:]) > 1e-3
    uncond, _ = unet(*batch, edits=[replace(edit, rows="uncond")])
    assert relative_error(uncond[2:], plain[2:]) <= 1e-5
    assert relative_error(uncond[:2], plain[:2]) > 1e-3
    # record of one half and edit of the other
    _, maps = unet(*batch, Record(edit.sites, ALL, rows="uncond"), [edit])
    _, expected = unet(*batch, Record(edit.sites, ALL, rows="uncond"))
    for site in edit.sites:
        torch.testing.assert_close(maps[site], expected[site])


def test_wrong_hooks_are_named(unet: UNet, batch: tuple[Tensor, float, Tensor]) -> None:
    strange = frozenset([Site("down", 7, 0, "cross")])
    with pytest.raises(
        ValueError, match=r"record.sites holds \['down.7.0.cross'\]; expected some of \['down.0.0.self'"
    ):
        unet(*batch, Record(strange))
    with pytest.raises(ValueError, match=r"edit.sites holds \['down.7.0.cross'\]"):
        unet(*batch, edits=[Edit(strange, bias=add_bias)])
    x, t, context = batch
    with pytest.raises(ValueError, match=r"one half of the batch got 3 rows; .* Use rows=\"all\""):
        unet(x[:3], t, context[:3], Record(frozenset(unet.sites)))


@pytest.mark.slow
def test_compiles_to_one_graph_for_each_kind_of_record(unet: UNet, batch: tuple[Tensor, float, Tensor]) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(unet, fullgraph=True, backend=counter)
    x, _, context = batch
    sites = by_name(unet, "mid.0.0.cross", "up.1.0.cross")
    kinds = (
        (None, ()),
        (Record(sites, COLUMNS), ()),
        (Record(sites, COLUMNS, stop=True), ()),
        (Record(sites, ALL) | Record(by_name(unet, "down.0.0.self"), HEAD_MEAN), (Edit(sites, bias=add_bias),)),
        (None, (Edit(sites, logits=halve), Edit(sites, kv=twice))),
    )
    for index in range(5):
        t = torch.tensor(900.0 - index)
        inputs = {"token_weights": torch.rand(2, 3, 7), "bias": torch.rand(1, 1, 1, 1, 7)}
        for record, edits in kinds:
            eps, maps = compiled(x, t, context, record, edits, inputs)
            expected, expected_maps = unet(x, t, context, record, edits, inputs)
            if expected is None:
                assert eps is None
            else:
                assert relative_error(eps, expected) <= 1e-5
            assert set(maps) == set(expected_maps)
            assert all(relative_error(maps[site], expected_maps[site]) <= 1e-5 for site in maps)
    assert counter.frame_count == len(kinds)


def test_gradient_reaches_the_latents_through_the_maps(unet: UNet, batch: tuple[Tensor, float, Tensor]) -> None:
    x, t, context = batch
    record = Record(by_name(unet, "mid.0.0.cross"), ALL, rows="all", stop=True)
    x = x.double().requires_grad_()
    double = UNet(CONFIG).double()
    double.load_state_dict(unet.state_dict())

    def loss(latents: Tensor) -> Tensor:
        _, maps = double.requires_grad_(False)(latents, t, context.double(), record)
        return sum(probs[..., 2].square().sum() for probs in maps.values())

    (gradient,) = torch.autograd.grad(loss(x), x)
    direction = torch.randn_like(x)
    step = 1e-5
    slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    assert gradient.abs().max() > 0
    torch.testing.assert_close((gradient * direction).sum(), slope.detach(), rtol=1e-4, atol=1e-9)


def test_fused_and_explicit_attention_agree() -> None:
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    bias = torch.randn(1, 3, 5, 7)
    assert relative_error(attention_probs(q, k, bias) @ v, attention(q, k, v, bias)) <= 1e-5
    assert attention_probs(q.bfloat16(), k.bfloat16()).dtype == torch.float32
