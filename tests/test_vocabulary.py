"""minidiff.vocabulary: the known names, and other programs' spellings."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest

import minidiff
from minidiff.guidance.guide import Guidance
from minidiff.request import FIELDS
from minidiff.vocabulary import (
    KEYWORDS,
    OBJECTIVES,
    SAMPLERS,
    SCHEDULES,
    a1111_sampler,
    modernised,
    own_keywords,
    read_sampler,
    read_schedule,
)

LABELS = {
    "ddim": "DDIM",
    "ddim_cfg_pp": "DDIM CFG++",
    "ddpm": "DDPM",
    "deis": "DEIS",
    "dpm2": "DPM2",
    "dpm2_ancestral": "DPM2 a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_cfg_pp": "DPM++ 2M CFG++",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2m_sde_heun": "DPM++ 2M SDE Heun",
    "dpmpp_2s": "DPM++ 2S",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_2s_ancestral_cfg_pp": "DPM++ 2S a CFG++",
    "dpmpp_sde": "DPM++ SDE",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "euler_ancestral_cfg_pp": "Euler a CFG++",
    "euler_cfg_pp": "Euler CFG++",
    "heun": "Heun",
    "lcm": "LCM",
    "lms": "LMS",
    "pndm": "PLMS",
    "tcd": "TCD",
    "uni_pc": "UniPC",
}


def test_names_need_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, types; package = types.ModuleType('minidiff'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['minidiff'] = package; import minidiff.vocabulary as v; print(len(v.SAMPLERS))\n"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    root = str(Path(minidiff.__file__).parent)
    found = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, check=True).stdout
    assert found == f"{len(SAMPLERS)}\n[]\n"


def test_samplers_are_the_files() -> None:
    files = (Path(minidiff.__file__).parent / "sampling" / "samplers").glob("[!_]*.py")
    assert sorted(file.stem for file in files) == list(SAMPLERS)


def test_objectives_can_be_read() -> None:
    for name in OBJECTIVES:
        Guidance.read(name)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("name", "label"), LABELS.items())
def test_our_names_and_a1111s_come_back(name: str, label: str, schedule: str) -> None:
    text = a1111_sampler(name, schedule)
    assert text == label + (" Karras" if schedule == "karras" else "")
    said = None if schedule == "uniform" else schedule
    for spelt in (f"{label} {SCHEDULES[schedule]}", f"{name}_{schedule}", f"{name} {schedule}".upper()):
        assert read_sampler(label if said is None else spelt) == read_sampler(label, said) == (name, said)
    assert read_schedule(SCHEDULES[schedule]) == read_schedule(schedule) == schedule
    assert a1111_sampler("mine") == "mine"


def test_spellings_of_noise_levels() -> None:
    assert [read_schedule(text) for text in ("normal", "Polyexponential", "SGM uniform")] == [
        *("uniform", "exponential", "sgm_uniform"),
    ]
    for text, message in (
        ("simple", 'pass spacing="trailing"'),
        ("odd", "expected one of uniform, karras"),
        (3, "is 3"),
    ):
        with pytest.raises(ValueError, match=message):
            read_schedule(text)


def test_old_fields_of_a_request() -> None:
    assert modernised({"karras": True, "steps": 3}) == {"schedule": "karras", "steps": 3}
    assert modernised({"karras": False}) == {"schedule": "uniform"}
    assert modernised({"karras": "yes"}) == {"karras": "yes"}


@pytest.mark.parametrize(
    ("text", "name", "schedule"),
    [
        ("dpmpp_2m", "dpmpp_2m", None),  # ComfyUI, k-diffusion
        ("k_dpmpp_2m", "dpmpp_2m", None),
        ("k_euler_a", "euler_ancestral", None),
        ("k_lms", "lms", None),
        ("sample_euler_ancestral", "euler_ancestral", None),
        ("sample_dpmpp_2m", "dpmpp_2m", None),
        ("euler_ancestral_karras", "euler_ancestral", "karras"),
        ("euler_a discrete", "euler_ancestral", "uniform"),  # stable-diffusion.cpp
        ("dpm++2m karras", "dpmpp_2m", "karras"),
        ("dpm++2m", "dpmpp_2m", None),
        ("dpmpp_2m_karras", "dpmpp_2m", "karras"),  # ComfyUI save nodes
        ("euler_normal", "euler", "uniform"),
        ("DPM++ 2M Uniform", "dpmpp_2m", "uniform"),
        (" Euler A ", "euler_ancestral", None),
        ("plms", "pndm", None),
        ("k_dpmpp_2s_a", "dpmpp_2s_ancestral", None),
        ("k_dpm_2_a", "dpm2_ancestral", None),
        ("DPM++ SDE Karras", "dpmpp_sde", "karras"),
        ("dpmpp_sde_gpu", "dpmpp_sde", None),
        ("dpmpp_2m_sde_gpu", "dpmpp_2m_sde", None),
    ],
)
def test_other_programs_spellings(text: str, name: str, schedule: str | None) -> None:
    assert read_sampler(text) == (name, schedule)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("DDIMScheduler", "ddim"),
        ("PNDMScheduler", "pndm"),
        ("EulerDiscreteScheduler", "euler"),
        ("EulerAncestralDiscreteScheduler", "euler_ancestral"),
        ("LMSDiscreteScheduler", "lms"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("HeunDiscreteScheduler", "heun"),
        ("KDPM2DiscreteScheduler", "dpm2"),
        ("KDPM2AncestralDiscreteScheduler", "dpm2_ancestral"),
        ("DPMSolverSDEScheduler", "dpmpp_sde"),
        ("DPMSolverSinglestepScheduler", "dpmpp_2s"),
        ("DEISMultistepScheduler", "deis"),
        ("DDPMScheduler", "ddpm"),
        ("LCMScheduler", "lcm"),
        ("TCDScheduler", "tcd"),
        ("UniPCMultistepScheduler", "uni_pc"),
    ],
)
def test_diffusers_classes(kind: str, name: str) -> None:
    assert hasattr(diffusers, kind)
    assert read_sampler(kind) == (name, None)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Restart", "Restart"),
        ("dpm_fast", "DPM fast"),
        ("ipndm", "IPNDM"),
    ],
)
def test_what_is_not_implemented_is_named(text: str, label: str) -> None:
    named = label.replace("+", r"\+")
    with pytest.raises(ValueError, match=rf"sampler .*{named}(, which)? is not implemented; expected one of ddim, "):
        read_sampler(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eular", "sampler is 'eular'; expected one of ddim, .* Did you mean 'euler'"),
        ("", "sampler is ''; expected one of ddim"),
        ("karras", "sampler is 'karras'; expected one of ddim"),
        ("EDMEulerScheduler", "expected one of ddim"),
        (7, "sampler is 7; expected one of ddim"),
        ("x" * 1000, r"sampler is 'x+\.\.\.x+'; expected one of ddim"),
        ("ddim_simple", "the noise levels 'simple' are not implemented: pass spacing=\"trailing\""),
    ],
)
def test_what_is_no_name(text: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_sampler(text)


def test_keywords_are_not_ours_and_lead_to_ours() -> None:
    """Mapped to a field, or answered with a sentence."""
    for word, meaning in KEYWORDS.items():
        assert word not in FIELDS
        assert " " in meaning or meaning in FIELDS, word
    with pytest.raises(TypeError, match="no argument 'num_inference_steps'; its name here is 'steps'"):
        minidiff.generate("a cat", num_inference_steps=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: minidiff.load(torch_dtype="float16"),
            r"load\(\): .*'torch_dtype'; pass it to load: load\(model, dtype=",
        ),
        (lambda: minidiff.Request("a", stepz=3), r"Request\(\): there is no argument 'stepz'; did you mean 'steps'"),
        (lambda: minidiff.Request("a", 3), r"Request\(\): too many positional arguments$"),
        (lambda: minidiff.Guidance(num_inference_steps=3), r"Guidance\(\): .*; its name here is 'steps'"),
        (lambda: minidiff.Edit(site=minidiff.cross), r"Edit\(\): .*did you mean 'sites'"),
        (lambda: minidiff.Record(), r"Record\(\): missing a required argument: 'sites'; expected sites, keep, rows"),
        (lambda: minidiff.LoRA("a", scale=1), r"LoRA\(\): there is no argument 'scale'; expected file, weight, text_w"),
        (lambda: minidiff.Region(text="a"), r"Region\(\): .*; its name here is 'prompt'"),
        (lambda: minidiff.with_words(cat="a"), r"with_words\(\): there is no argument 'cat'; expected model, words"),
    ],
)
def test_values_and_functions_know_their_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_a_type_error_from_within_is_kept() -> None:
    @own_keywords
    def add(a: int, b: int) -> int:
        return a + b

    assert add(1, b=2) == 3
    with pytest.raises(TypeError, match="unsupported operand"):
        add(1, "a")  # type: ignore[arg-type]
