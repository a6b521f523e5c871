"""speed/keeps.py without a card: Triton's kernels in its interpreter, against the explicit way."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from minidiff.networks.attention import ALL, HEAD_MEAN, Keep
from minidiff.speed import keeps

CODE = """
import contextlib, torch
from minidiff.networks.attention import attention_probs, mask_name
from minidiff.speed import keeps
from triton.runtime import interpreter
torch.cuda.device_of = lambda x: contextlib.nullcontext()
patch = interpreter._patch_lang_tensor


def patched(tensor, *scope):
    patch(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())  # from numpy 2.4 on, not of an array of one element


interpreter._patch_lang_tensor = patched
cpu = torch.device("cpu")
for keep, channels in zip(keeps._KEPT, (160, 40, 80, 40), strict=True):
    apart = keeps._apart(cpu, torch.float16, (keep, channels))
    assert 1e-6 < apart < 2e-3, (keep.name, channels, apart)
for (h, w), tokens, channels in (((5, 7), 81, 72), ((30, 21), 5, 16), ((1, 1), 1, 8)):  # ragged; more than a strip
    q, k = torch.randn(2, h * w, 3, channels).transpose(1, 2), torch.randn(2, tokens, 3, channels).transpose(1, 2)
    q[0] *= 30  # one token has it all
    inputs = {"token_weights": torch.rand(1, 17, tokens), mask_name((h, w)): torch.rand(1, 17, h, w)}  # of all images
    probs = attention_probs(q, k).unflatten(2, (h, w))
    for keep, function in keeps._KEPT.items():
        found, expected = keeps._kept(function, q, k, (h, w), inputs), keep(keeps._SITE, probs, inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    many = {name: value.repeat(1, 4, *[1] * (value.ndim - 2)) for name, value in inputs.items()}
    for keep in (keeps.COLUMNS, keeps.BOX_MASS):
        assert keeps._fits(keep, tokens, (h, w), inputs) and not keeps._fits(keep, tokens, (h, w), many)
        wrong = {"token_weights": torch.rand(1, 3, tokens + 2), mask_name((h, w)): torch.rand(1, 3, h, w + 2)}
        assert not keeps._fits(keep, tokens, (h, w), wrong)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_keep_what_the_explicit_way_keeps() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True, env=os.environ | {"TRITON_INTERPRET": "1"})


def test_strips_are_longer_where_their_sums_would_fill_the_memory() -> None:
    assert keeps._strips(64, 64, 77 * 8 * 4) == (8, 8) and keeps._strips(3, 64, 1) == (3, 1)
    for each in (2 * 8 * 4 * 2**14, 2 * 8 * 64 * 2**14, 2**25):
        steps, strips = keeps._strips(256, 64, each)
        assert steps * strips >= 256 and steps > 8 and strips <= max(1, keeps.AT_ONCE // each)


def test_what_the_kernels_do_not_take_goes_the_explicit_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeps, "usable", lambda x: not torch.is_grad_enabled())
    monkeypatch.setattr(keeps, "works", lambda *_: True)
    monkeypatch.setattr(keeps, "_kept", lambda *_: torch.ones(()))
    q, k = (torch.zeros(1, 2, 4, 8, dtype=torch.float16) for _ in range(2))

    def taken(q: torch.Tensor = q, k: torch.Tensor = k, keep: Keep = HEAD_MEAN) -> bool:
        return keeps.kept(keeps._SITE, q, k, (2, 2), keep, {}) is not None

    assert not taken()  # a gradient may be wanted
    with torch.no_grad():
        assert taken() and taken(keep=ALL)
        assert not taken(keep=Keep("mine", lambda site, probs, inputs: probs))
        assert not taken(q.float(), k.float()) and not taken(q, k.bfloat16())
        assert not taken(q.mT, k.mT) and not taken(q.repeat(1, 1, 1, 40), k.repeat(1, 1, 1, 40))
        monkeypatch.setattr(keeps, "works", lambda *_: False)
        assert not taken()
        monkeypatch.setattr(keeps, "works", lambda *_: 1 / 0)  # nothing is tried for what does not fit
        for shape in ((1, 65, 4), (1, 3, 5)):
            given = {"token_weights": torch.zeros(shape)}
            assert keeps.kept(keeps._SITE, q, k, (2, 2), keeps.COLUMNS, given) is None
