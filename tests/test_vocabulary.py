"""minidiff.vocabulary: the known names, and other programs' spellings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

import minidiff
from minidiff.guidance.guide import Guidance
from minidiff.request import FIELDS
from minidiff.vocabulary import KEYWORDS, OBJECTIVES, SAMPLERS, a1111_sampler, read_sampler

LABELS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "deis": "DEIS",
    "dpm2": "DPM2",
    "dpm2_ancestral": "DPM2 a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2m_sde_heun": "DPM++ 2M SDE Heun",
    "dpmpp_2s": "DPM++ 2S",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_sde": "DPM++ SDE",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
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


@pytest.mark.parametrize("karras", [True, False])
@pytest.mark.parametrize(("name", "label"), LABELS.items())
def test_our_names_and_a1111s_come_back(name: str, label: str, karras: bool) -> None:
    text = a1111_sampler(name, karras)
    assert text == label + (" Karras" if karras else "")
    assert read_sampler(text) == read_sampler(text.lower()) == (name, karras or None)
    assert read_sampler(f"{name}_karras" if karras else name) == (name, karras or None)
    assert a1111_sampler("mine") == "mine"


@pytest.mark.parametrize(
    ("text", "name", "karras"),
    [
        ("dpmpp_2m", "dpmpp_2m", None),  # ComfyUI, k-diffusion
        ("k_dpmpp_2m", "dpmpp_2m", None),
        ("k_euler_a", "euler_ancestral", None),
        ("k_lms", "lms", None),
        ("sample_euler_ancestral", "euler_ancestral", None),
        ("sample_dpmpp_2m", "dpmpp_2m", None),
        ("euler_ancestral_karras", "euler_ancestral", True),
        ("euler_a discrete", "euler_ancestral", False),  # stable-diffusion.cpp
        ("dpm++2m karras", "dpmpp_2m", True),
        ("dpm++2m", "dpmpp_2m", None),
        ("dpmpp_2m_karras", "dpmpp_2m", True),  # ComfyUI save nodes
        ("euler_normal", "euler", False),
        ("DPM++ 2M Uniform", "dpmpp_2m", False),
        (" Euler A ", "euler_ancestral", None),
        ("plms", "pndm", None),
        ("k_dpmpp_2s_a", "dpmpp_2s_ancestral", None),
        ("k_dpm_2_a", "dpm2_ancestral", None),
        ("DPM++ SDE Karras", "dpmpp_sde", True),
        ("dpmpp_sde_gpu", "dpmpp_sde", None),
        ("dpmpp_2m_sde_gpu", "dpmpp_2m_sde", None),
    ],
)
def test_other_programs_spellings(text: str, name: str, karras: bool | None) -> None:
    assert read_sampler(text) == (name, karras)


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
    with pytest.raises(
        ValueError, match=rf"sampler .*{named}(, which)? is not implemented; expected one of ddim, ddpm"
    ):
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
        ("DPM++ 2M SGM Uniform", "levels 'sgmuniform' are not implemented"),
        ("Euler exponential", "levels 'exponential' are not implemented"),
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
