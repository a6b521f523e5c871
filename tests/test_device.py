"""Choice of device and dtype, from given measurements: no test measures time."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import minidiff
from minidiff.speed import device as devices
from minidiff.speed.device import Machine, choose_device, choose_dtype, machine, measured_rates


def rates(product: float, convolution: float) -> Mapping[str, float]:
    """A CPU with 0.1 TFLOP/s in float32."""
    return {
        "float32 product": 0.1,
        "float32 convolution": 0.1,
        "bfloat16 product": 0.1 * product,
        "bfloat16 convolution": 0.1 * convolution,
    }


FAST, SLOW, NONE = rates(2.0, 2.0), rates(0.66, 0.55), {}


@pytest.mark.parametrize(
    ("found", "chosen", "said"),
    [
        (FAST, torch.bfloat16, "bfloat16 runs at 2.00 of float32's rate"),
        (SLOW, torch.float32, "bfloat16 runs at 0.60 of float32's rate"),
        (rates(1.1, 1.09), torch.float32, "bfloat16 runs at 1.09"),  # not worth its rounding
        (rates(4.0, 0.5), torch.bfloat16, "bfloat16 runs at 1.41"),
        (NONE, torch.float32, "its CPU has no bfloat16 kernels"),
    ],
)
def test_what_runs_faster_is_chosen(found: Mapping[str, float], chosen: torch.dtype, said: str) -> None:
    here = Machine("a CPU", 2, (), found)
    assert here.cpu_dtype == chosen
    assert str(here).startswith(said)


@pytest.mark.parametrize(
    ("asked", "device", "found", "fp16", "chosen"),
    [
        (None, "cpu", FAST, False, torch.bfloat16),
        (None, "cpu", SLOW, True, torch.float32),
        (None, "cpu", NONE, True, torch.float32),
        (None, "cuda", NONE, False, torch.float16),
        (None, "mps", FAST, True, torch.float32),
        ("float32", "cuda", FAST, True, torch.float32),
        ("fp32", "cpu", FAST, True, torch.float32),
        ("bf16", "cpu", NONE, False, torch.bfloat16),
        (torch.bfloat16, "cpu", SLOW, False, torch.bfloat16),
        ("float16", "cuda", NONE, False, torch.float16),
        ("float16", "cpu", NONE, True, torch.float16),
    ],
)
def test_choice_of_the_dtype(
    asked: str | torch.dtype | None,
    device: str,
    found: Mapping[str, float],
    fp16: bool,
    chosen: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "machine", lambda: Machine("a CPU", 2, (), found))
    monkeypatch.setattr(devices, "_has_fp16", lambda: fp16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_dtype(asked, torch.device(device)) == chosen


@pytest.mark.parametrize(("found", "instead"), [(FAST, torch.bfloat16), (SLOW, torch.float32)])
def test_float16_on_a_cpu_without_kernels(
    found: Mapping[str, float], instead: torch.dtype, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "machine", lambda: Machine("a CPU", 2, (), found))
    monkeypatch.setattr(devices, "_has_fp16", lambda: False)
    with pytest.warns(UserWarning, match="no float16 kernels; computing in " + str(instead)[6:]) as warned:
        model = minidiff.load(tiny_folder, dtype="float16", device="cpu")
    assert model.dtype == instead
    assert [warning.filename for warning in warned] == [__file__]


@pytest.mark.parametrize("capable", [True, False])
def test_it_is_measured_once_and_only_where_there_is_a_choice(capable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(devices, "measured_rates", lambda: calls.append(1) or FAST)
    monkeypatch.setattr(devices, "_FEATURES", {"avx512_bf16": lambda: capable, "avx2": lambda: True})
    machine.cache_clear()
    try:
        assert machine() is machine()
        assert machine().features == (("avx512_bf16", "avx2") if capable else ("avx2",))
        assert len(calls) == capable
    finally:
        machine.cache_clear()


def test_the_measure_is_of_both_dtypes_and_kinds_of_work() -> None:
    found = measured_rates(repeats=1)
    assert set(found) == set(FAST)
    assert all(rate > 0 for rate in found.values())


def test_a_result_says_why_its_dtype(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "machine", lambda: Machine("a CPU", 2, (), SLOW))
    shared = {"steps": 1, "sampler": "euler", "output": "latents"}
    info = minidiff.generate("a cat", model=minidiff.load(tiny_folder, device="cpu"), **shared).info
    assert (info["dtype"], info["dtype_choice"]) == ("float32", "bfloat16 runs at 0.60 of float32's rate")
    asked = minidiff.load(tiny_folder, device="cpu", dtype="float32")
    assert "dtype_choice" not in minidiff.generate("a cat", model=asked, **shared).info


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", 1.5, "mps"])
def test_a_device_that_is_not_here(device: object) -> None:
    with pytest.raises(ValueError, match=rf"device .*{device}.* cannot be used: .*; expected one .* available: cpu"):
        choose_device(device)  # type: ignore[arg-type]


def test_cuda_is_chosen_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device(None) == torch.device(device)
