"""A1111's text: hand-written examples in the formats of its versions, and round trips of our own output."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, example, given, strategies as st

from minidiff.png.infotext import NEGATIVE, parse_infotext, to_infotext
from minidiff.vocabulary import SAMPLERS, SCHEDULES, a1111_sampler

PIECES = [
    "\n",
    ",",
    ":",
    '"',
    "\\",
    " ",
    "Steps: 20, Sampler: Euler a, Seed: 1",
    "Negative prompt: x",
    "日本語",
    "é",
    "\r",
    "\x85",
]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=8).map("".join)
seeds = st.integers(0, 2**64 - 1)
numbers = st.floats(allow_nan=False, allow_infinity=False)


def test_writes_what_a1111_writes() -> None:
    arguments = {
        "prompt": "a red circle,\nlarge",
        "negative_prompt": "blurry",
        "steps": 20,
        "sampler": "euler_ancestral",
        "schedule": "uniform",
        "guidance_scale": 7.0,
        "seed": 1,
        "width": 512,
        "height": 768,
        "model": "v1-5",
        "clip_skip": 1,
    }
    assert to_infotext(arguments, model_hash="6ce0161689", version="minidiff 0.1.0") == (
        "a red circle,\nlarge\n"
        "Negative prompt: blurry\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x768, Model hash: 6ce0161689, Model: v1-5, "
        "Clip skip: 2, RNG: CPU, Version: minidiff 0.1.0"
    )


def test_variation_seeds() -> None:
    text = to_infotext({"prompt": "x", "steps": 4, "seed": 3, "vary": [9, 0.25]})
    assert text == "x\nSteps: 4, Seed: 3, Variation seed: 9, Variation seed strength: 0.25, RNG: CPU"
    assert parse_infotext(text)[0]["vary"] == [9, 0.25]
    for wrong in (text.replace("0.25", "2"), text.replace("seed: 9", "seed: -9")):
        with pytest.raises(ValueError, match="Variation seed"):
            parse_infotext(wrong)


def test_leaves_out_what_is_unset_or_has_no_plain_value() -> None:
    marked = {"tensor": {"shape": [1], "dtype": "float32", "sha256": "0"}}
    arguments = {
        "prompt": None,
        "steps": 4,
        "seed": None,
        "clip_skip": 0,
        "guidance_scale": marked,
        "eta": 0.0,
        "sampler": "ddim",
    }
    assert to_infotext(arguments) == "\nSteps: 4, Sampler: DDIM"


@pytest.mark.parametrize("model", ["a,b", "a:b", "a\nb", '"a"', " a", ""])
def test_values_are_quoted_as_a1111_does(model: str) -> None:
    assert to_infotext({"prompt": "x", "model": model}) == f"x\nModel: {json.dumps(model)}"
    assert to_infotext({"prompt": "x", "model": 'a "b" \\é'}) == 'x\nModel: a "b" \\é'


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sampler_names(sampler: str, schedule: str) -> None:
    text = to_infotext({"prompt": "x", "steps": 1, "sampler": sampler, "schedule": schedule})
    assert f"Sampler: {a1111_sampler(sampler, schedule)}" in text
    arguments, rest = parse_infotext(text)
    assert (arguments["sampler"], arguments["schedule"], rest) == (sampler, schedule, {})


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("euler_a discrete", {"sampler": "euler_ancestral", "schedule": "uniform"}),  # stable-diffusion.cpp
        ("dpm++2m karras", {"sampler": "dpmpp_2m", "schedule": "karras"}),
        ("k_dpmpp_2m", {"sampler": "dpmpp_2m", "schedule": "uniform"}),  # Horde
        ("dpmpp_2m_karras", {"sampler": "dpmpp_2m", "schedule": "karras"}),  # a saver of ComfyUI
        ("DPM++ 2M, Schedule type: Karras", {"sampler": "dpmpp_2m", "schedule": "karras"}),
        ("no such karras", {"sampler": "no such karras"}),
    ],
)
def test_samplers_as_other_programs_spell_them(theirs: str, ours: dict[str, object]) -> None:
    assert (
        parse_infotext(f"x\nSteps: 1, Sampler: {theirs}")[0]
        == {"prompt": "x", "negative_prompt": "", "steps": 1} | ours
    )


def test_a_plain_schedule_and_a_sampler_object_are_named() -> None:
    assert to_infotext({"sampler": "dpmpp_2m"}) == "\nSampler: DPM++ 2M, Schedule type: Uniform"
    text = to_infotext({"prompt": "x", "steps": 1, "sampler": {"object": "mine.samplers.Heun", "fields": {}}})
    assert text == "x\nSteps: 1, Sampler: Heun"


SETTINGS = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x64"


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        (f"a cat\nNegative prompt: bad\n{SETTINGS}\nTemplate: a {{cat|dog}}", {"Template": "a {cat|dog}"}),
        (f"a cat\nNegative prompt: bad\n{SETTINGS}\nTemplate: style: x, light: y, mood: z", None),
        (f"a cat\r\nNegative prompt: bad\r\n{SETTINGS}\r\n", {}),
        (f"a cat Negative prompt: bad {SETTINGS}", {}),
        (f"a cat\nNegative prompt: bad\n{SETTINGS.replace('20,', '20.0,')}", {}),
    ],
    ids=["template", "template with pairs", "CRLF", "one line", "steps as a float"],
)
def test_texts_in_other_programs_layouts(text: str, rest: dict[str, str] | None) -> None:
    arguments, found = parse_infotext(text)
    assert (arguments["prompt"], arguments["negative_prompt"]) == ("a cat", "bad")
    assert {arguments[name] for name in ("steps", "seed", "width", "height")} == {20, 5, 64}
    assert rest is None or found == rest


def test_words_of_a_prompt_on_one_line_are_no_settings() -> None:
    with pytest.raises(ValueError, match="no line such as 'Steps: 20"):
        parse_infotext("how to dance. Steps: first the left foot, then the right")


def test_reads_an_old_a1111_text() -> None:
    text = (
        "girl with a beret, ((eyeshadow)), [soft:hard:0.5]\nsecond line\n"
        "Negative prompt: ugly, (extra_limb),\nblurry\n"
        "Steps: 28, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 965400086, Size: 512x704, Model hash: 45dee52b, "
        'Model: "odd, name: v1", Clip skip: 2, ENSD: 31337, Lora hashes: "a: 1, b: \\"2\\"", Version: v1.6.0'
    )
    arguments, rest = parse_infotext(text)
    assert arguments == {
        "prompt": "girl with a beret, ((eyeshadow)), [soft:hard:0.5]\nsecond line",
        "negative_prompt": "ugly, (extra_limb),\nblurry",
        "steps": 28,
        "sampler": "dpmpp_2m",
        "schedule": "karras",
        "guidance_scale": 7.5,
        "seed": 965400086,
        "width": 512,
        "height": 704,
        "clip_skip": 1,
        "model": "odd, name: v1",
    }
    assert rest == {"Model hash": "45dee52b", "ENSD": "31337", "Lora hashes": 'a: 1, b: "2"', "Version": "v1.6.0"}
    assert isinstance(arguments["steps"], int) and isinstance(arguments["guidance_scale"], float)


@pytest.mark.parametrize(
    ("settings", "sampler", "schedule", "left"),
    [
        ("Sampler: DPM++ 2M, Schedule type: Karras", "dpmpp_2m", "karras", {}),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "dpmpp_2m", "uniform", {}),
        ("Sampler: Euler a, Schedule type: Uniform", "euler_ancestral", "uniform", {}),
        ("Sampler: Euler, Schedule type: Exponential", "euler", "exponential", {}),
        ("Sampler: DPM fast, Schedule type: Karras", "DPM fast", "karras", {}),
        ("Sampler: Euler, Schedule type: SGM Uniform", "euler", "sgm_uniform", {}),
        ("Sampler: DPM++ 2M SDE Exponential", "dpmpp_2m_sde", "exponential", {}),
        ("Sampler: Euler, Schedule type: KL Optimal", "euler", "uniform", {"Schedule type": "KL Optimal"}),
        ("Sampler: PLMS", "pndm", "uniform", {}),
        ("Sampler: euler A", "euler_ancestral", "uniform", {}),
    ],
)
def test_reads_both_ways_to_name_a_schedule(settings: str, sampler: str, schedule: str, left: dict[str, str]) -> None:
    arguments, rest = parse_infotext(f"x\nSteps: 20, {settings}, Seed: 1")
    assert (arguments["sampler"], arguments["schedule"], rest) == (sampler, schedule, left)


@pytest.mark.parametrize(("theirs", "ours"), [("1", None), ("2", 1), ("3", 2), ("0", None)])
def test_clip_skip_is_counted_as_diffusers_does(theirs: str, ours: int | None) -> None:
    assert parse_infotext(f"x\nSteps: 20, Clip skip: {theirs}")[0].get("clip_skip") == ours


def test_the_last_line_that_looks_like_a_negative_prompt_divides() -> None:
    arguments, _ = parse_infotext("a sign:\nNegative prompt: painted on it\nNegative prompt: blurry\nSteps: 1, Seed: 2")
    assert arguments["prompt"] == "a sign:\nNegative prompt: painted on it"
    assert arguments["negative_prompt"] == "blurry"


def test_texts_without_prompt_or_with_settings_first_named_otherwise() -> None:
    assert parse_infotext("Steps: 1, Seed: 2")[0] == {"prompt": "", "negative_prompt": "", "steps": 1, "seed": 2}
    assert parse_infotext('x\nSteps: 1, Model: "a" b, Seed: 2')[0]["model"] == '"a" b'
    arguments, rest = parse_infotext("x\nSteps: 1, Size: 64x32, Tiling, Seed: 3, Denoising strength: 0.4\n")
    assert (arguments["width"], arguments["height"], rest) == (64, 32, {"Denoising strength": "0.4"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"no line such as 'Steps: 20, .*got ''"),
        ("only a prompt", r"no line such as .*got 'only a prompt'"),
        ("x\nlight: soft, mood: calm, size: big", r"no line such as .*got 'x.nlight: soft, mood: calm, size: big'"),
        ("x\nSteps", r"no line such as"),
        ("x\nSteps: many, Seed: 1", r"'Steps' is 'many'; expected a whole number from 1 to 10000"),
        ("x\nSteps: 10000000", r"'Steps' is 10000000; expected a whole number from 1 to 10000"),
        ("x\nSteps: 20, Seed: 1.5", r"'Seed' is 1.5; expected a whole number"),
        ("x\nSteps: 20, CFG scale: high", r"'CFG scale' is 'high'; expected a number"),
        ("x\nSteps: 20, CFG scale: nan", r"'CFG scale' is nan; expected a number"),
        ("x\nSteps: 20, Size: 512", r"'height' is ''; expected a whole number from 1 to 65536"),
        ("x\nSteps: 20, Clip skip: none", r"'Clip skip' is 'none'; expected a whole number"),
        ("x\nSteps: 20, Seed: 18446744073709551616", r"'Seed' is 1844.*6; expected a whole number from 0 to 1.84"),
        ("x\nSteps: 20, Seed: " + "9" * 5000, r"'Seed' is inf; expected a whole number"),
        ("x" * 1_000_001, "has 1,000,001 characters; expected at most 1,000,000"),
    ],
)
def test_malformed_texts_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_infotext(text)


@given(prompt=texts, negative=texts)
def test_prompts_come_back(prompt: str, negative: str) -> None:
    assume(not any(line.startswith(NEGATIVE) for line in negative.split("\n")))
    arguments = {"prompt": prompt, "negative_prompt": negative, "steps": 20, "seed": 3}
    back = {"prompt": _lines(prompt), "negative_prompt": _lines(negative), "steps": 20, "seed": 3}
    assert parse_infotext(to_infotext(arguments)) == (back, {"RNG": "CPU"})


def _lines(text: str) -> str:
    """Line ends as normalised by reading."""
    return f"{text}\n".replace("\r\n", "\n")[:-1]


@example(model='"x"', model_hash=" x", scale=7.125, eta=1e300, seed=2**64 - 1, clip_skip=1)
@given(
    model=texts,
    model_hash=texts,
    scale=numbers,
    eta=numbers,
    seed=st.integers(0, 2**64 - 1),
    clip_skip=st.integers(1, 9),
)
def test_settings_come_back(model: str, model_hash: str, scale: float, eta: float, seed: int, clip_skip: int) -> None:
    assume(eta != 0)
    sizes = {"width": 64, "height": 32}
    numeric = {"steps": 5, "guidance_scale": scale, "seed": seed, "clip_skip": clip_skip, "eta": eta, **sizes}
    arguments = {
        "prompt": "p",
        "negative_prompt": "",
        "sampler": "ddim",
        "schedule": "uniform",
        "model": model,
        **numeric,
    }
    back, rest = parse_infotext(to_infotext(arguments, model_hash=model_hash))
    assert back == arguments
    assert rest == {"Model hash": model_hash, "RNG": "CPU"}


@pytest.mark.parametrize("unit", ["a", " ", 'a: "', 'ab: "\\",', 'ab: "x" y,', "\\"])
def test_a_hostile_line_costs_linear_time(unit: str) -> None:
    """With quadratic run time, each of these would take minutes."""
    parse_infotext("x\nSteps: 20, " + unit * (200_000 // len(unit)))
