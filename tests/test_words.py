"""weights/words.py against diffusers' load_textual_inversion, and how prompts, phrases and pictures take the words."""

import hashlib
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

import minidiff
from minidiff.cli.main import main
from minidiff.png.read import read_metadata
from minidiff.weights.inspect import describe

LAYOUTS: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "a1111": lambda vectors: {"emb_params": vectors},
    "half precision": lambda vectors: {"emb_params": vectors.half()},
    "converted": lambda vectors: {"*": vectors},
    "diffusers": lambda vectors: {"<easy>": vectors},
    "diffusers, one vector": lambda vectors: {"<easy>": vectors[0]},
}
PROMPTS = [
    "easyneg",
    "a cat, EASYNEG.",
    "EasyNeg EasyNeg,a (EasyNeg:1.2) café",
    " ".join(["a tall tree"] * 24) + " EasyNeg",  # cut within the word
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({"emb_params": torch.randn(3, 64)}, tmp_path / "easy.safetensors")
    return tmp_path / "easy.safetensors"


@pytest.fixture
def model(tiny_model: minidiff.Model, file: Path) -> minidiff.Model:
    return minidiff.with_words(tiny_model, {"EasyNeg": file})


def reference(folder: Path, words: dict[str, Path]) -> diffusers.StableDiffusionPipeline:
    pipeline = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for word, path in words.items():
        pipeline.load_textual_inversion(load_file(path), token=word.lower())
    return pipeline


def contexts(pipeline: diffusers.StableDiffusionPipeline, prompts: list[str]) -> Tensor:
    found: Tensor = pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
    return found


# ---- contexts


@pytest.mark.filterwarnings("ignore:.*the text encoder reads")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_contexts_equal_diffusers(layout: str, tiny_model: minidiff.Model, tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file(LAYOUTS[layout](torch.randn(3, 64)), path)
    model = minidiff.with_words(tiny_model, {"EasyNeg": path})
    expected = contexts(reference(tiny_folder, {"EasyNeg": path}), [prompt.lower() for prompt in PROMPTS])
    torch.testing.assert_close(model.text.encode(PROMPTS), expected, rtol=0, atol=1e-6)
    assert (model.text.encode(PROMPTS) - tiny_model.text.encode(PROMPTS)).abs().max() > 0.1


def test_several_words_at_once_or_one_after_another(
    tiny_model: minidiff.Model, tiny_folder: Path, tmp_path: Path
) -> None:
    files = {"bad-hands": tmp_path / "a.safetensors", "<style>": tmp_path / "b.safetensors"}
    for i, path in enumerate(files.values()):
        save_file({"x": torch.randn(2 + i, 64)}, path)
    prompts = ["a cat with bad-hands in <style>", "<style>", "bad-hands, <style>bad-hands"]
    expected = contexts(reference(tiny_folder, files), prompts)
    together = minidiff.with_words(tiny_model, files)
    apart = tiny_model
    for word, path in files.items():
        apart = minidiff.with_words(apart, {word: path})
    torch.testing.assert_close(together.text.encode(prompts), expected, rtol=0, atol=1e-6)
    assert torch.equal(apart.text.encode(prompts), together.text.encode(prompts))
    assert apart.adapters == together.adapters
    assert repr(apart).startswith("<Model tiny with word bad-hands (vectors 2), word <style> (vectors 3), float32")


def test_the_base_model_stays_as_it_is(tiny_model: minidiff.Model, model: minidiff.Model) -> None:
    old, new = (dict(one.text.model.named_parameters()) for one in (tiny_model, model))
    name = next(name for name in old if name.endswith("token_embedding.weight"))
    assert old[name].shape == (49408, 64)
    assert new[name].shape == (49411, 64)
    assert torch.equal(new[name][:49408], old[name])
    assert not new[name].requires_grad
    assert all(new[other] is old[other] for other in old if other != name)
    assert model.unet is tiny_model.unet and model.text.tokenizer is tiny_model.text.tokenizer
    assert len(tiny_model.text.tokenizer) == 49408
    assert not tiny_model.text.added and max(tiny_model.text._ids("easyneg")) < 49408
    plain = ["a cat", "an easy negative"]
    assert torch.equal(model.text.encode(plain), tiny_model.text.encode(plain))
    assert minidiff.with_words(tiny_model, {}).text.encode(plain).equal(tiny_model.text.encode(plain))


# ---- where a word is


@pytest.mark.parametrize(
    ("prompt", "count"),
    [
        ("EasyNeg", 1),
        ("a (EASYNEG), easyneg's", 2),
        ("\neasyneg-easyneg", 2),
        ("EasyNegs", 0),
        ("notEasyNeg", 0),
        ("EasyNeg_v2 easyneg2", 0),
        ("easyneg\u0301", 0),  # an accent on its last letter
        ("猫EasyNeg", 0),
        ("🐱EasyNeg🐱", 1),
    ],
)
def test_it_is_found_as_a_whole_word_in_any_case(prompt: str, count: int, model: minidiff.Model) -> None:
    labels = model.text.tokens(prompt)
    assert sum(label.lower() == "easyneg" for label in labels) == 3 * count
    assert sum(row >= 49408 for row in model.text._ids(prompt)) == 3 * count


def test_of_two_words_the_longer_one(tiny_model: minidiff.Model, file: Path, tmp_path: Path) -> None:
    save_file({"*": torch.randn(2, 64)}, tmp_path / "b.safetensors")
    model = minidiff.with_words(tiny_model, {"bad-hands": file, "bad-hands-5": tmp_path / "b.safetensors"})
    assert model.text.tokens("bad-hands, bad-hands-5 bad-hands-6")[1:8] == (
        *["bad-hands"] * 3, ",", *["bad-hands-5"] * 2, "bad-hands",
    )  # fmt: skip


def test_composed_and_decomposed_letters_are_the_same(tiny_model: minidiff.Model, file: Path) -> None:
    model = minidiff.with_words(tiny_model, {"cafe\u0301qz": file})
    assert model.text.tokens("a CAF\u00c9qz cafe\u0301qz")[2:8] == ("CAF\u00c9qz",) * 3 + ("cafe\u0301qz",) * 3


def test_phrases_count_its_tokens(model: minidiff.Model) -> None:
    prompt, text = "a red EasyNeg, a cat and easyneg", model.text
    assert text.num_tokens(prompt) == 12
    assert text.spans(prompt, "easyneg", 0) == (3, 4, 5)
    assert text.spans(prompt, "red easyneg") == (2, 3, 4, 5)
    assert text.spans(prompt, "EasyNeg, a cat") == (3, 4, 5, 6, 7, 8)
    assert text.all_spans(prompt, "easyneg") == (3, 4, 5, 10, 11, 12)
    assert text.word_weights(prompt, {"easyneg": 2.0})[0, :14].tolist() == [1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 2, 2, 2, 1]
    with pytest.raises(ValueError, match="phrase 'easy' is not in the prompt"):
        text.spans(prompt, "easy")


def test_a_word_that_does_not_fit_is_lost_as_any_other(model: minidiff.Model) -> None:
    prompt = " ".join(["tree"] * 73) + " easyneg"
    with pytest.raises(ValueError, match="phrase 'easyneg' is lost by truncation: .* tokens 74 to 76"):
        model.text.spans(prompt, "easyneg")
    with pytest.warns(UserWarning, match="has 76 tokens, the text encoder reads 75: lost 'easyneg'"):
        model.text.encode([prompt])
    assert model.text.num_tokens(prompt) == 75


def test_a_chunk_does_not_part_its_vectors(model: minidiff.Model) -> None:
    """As in A1111, where it goes to the next chunk whole, and nothing goes with it."""
    trees = {count: "tree " * count + "(easyneg:1.2)" for count in (72, 73)}
    prompts = [*trees.values(), "tree " * 70 + "," + " tree" * 3 + " easyneg", "easyneg " * 26]
    small = {"width": 16, "height": 16, "steps": 2, "guidance_scale": 1, "output": "latents"}
    made = minidiff.generate(prompts, model=model, syntax="a1111", attention=True, **small)
    text = made.attention.text  # type: ignore[union-attr]
    assert text.spans(prompts[0], "easyneg") == (73, 74, 75)
    assert text.spans(prompts[1], "easyneg") == text.spans(prompts[2], "easyneg") == (78, 79, 80)
    assert text.all_spans(prompts[3], "easyneg") == (*range(1, 76), 78, 79, 80)


# ---- pictures


def test_a_word_with_the_vectors_of_others_makes_their_picture(tiny_model: minidiff.Model, tmp_path: Path) -> None:
    """In prompt and negative prompt, with boxes, attention and a Record; bit by bit."""
    ids = tiny_model.text.tokenizer("red ball", add_special_tokens=False)["input_ids"]
    save_file({"*": tiny_model.text.model.get_input_embeddings().weight[ids].clone()}, tmp_path / "x.safetensors")
    model = minidiff.with_words(tiny_model, {"qzx9": tmp_path / "x.safetensors"})

    def made(model: minidiff.Model, word: str) -> minidiff.Result:
        shared = {"model": model, "boxes": {word: (0, 0, 0.5, 0.5)}, "guidance": guidance, "steps": 2, "seed": 1}
        return minidiff.generate(f"a {word} and a cat", negative_prompt=f"no {word}", attention=True, **shared)

    guidance = minidiff.Guidance(minidiff.layout_loss, iterations=1)

    found, expected = made(model, "qzx9"), made(tiny_model, "red ball")
    assert any(found.reports[0].iterations)  # type: ignore[index]
    assert torch.equal(found.latents, expected.latents)
    assert torch.equal(found.attention["qzx9"], expected.attention["red ball"])  # type: ignore[index]
    assert str(found.reports[0]) == str(expected.reports[0]).replace("red ball", "qzx9")  # type: ignore[index]


def test_the_bundled_model_counts_it_as_known(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    save_file({"emb_params": torch.randn(2, minidiff.load().text.width)}, tmp_path / "x.safetensors")
    model = minidiff.load(words={"Shiny-1": tmp_path / "x.safetensors"})
    model.text.encode(["a shiny-1 circle"])
    assert not recwarn.list
    with pytest.warns(UserWarning, match="does not know 'shiny', '-', '2';"):
        model.text.encode(["a shiny-2 circle, shiny-1"])


def test_words_and_loras_go_together(tiny_model: minidiff.Model, tiny_folder: Path, file: Path, tmp_path: Path) -> None:
    down = "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
    tensors = {down: torch.randn(2, 64), down.replace("down", "up"): torch.randn(256, 2)}
    lora, words = write(tmp_path / "style.safetensors", **tensors), {"EasyNeg": file}
    models = (
        minidiff.load(tiny_folder, dtype="float32", device="cpu", words=words, loras=[lora]),
        minidiff.with_words(minidiff.with_loras(tiny_model, lora), words),
        minidiff.with_loras(minidiff.with_words(tiny_model, words), lora),
    )
    first, *others = (model.text.encode(["a cat, easyneg"]) for model in models)
    assert all(torch.equal(first, other) for other in others)
    assert not torch.allclose(first, minidiff.with_words(tiny_model, words).text.encode(["a cat, easyneg"]))
    assert all({adapter.kind for adapter in model.adapters} == {"lora", "word"} for model in models)


# ---- what is refused


def write(path: Path, **tensors: Tensor) -> Path:
    save_file(tensors, path)
    return path


BAD_FILES: dict[str, tuple[dict[str, Tensor], str]] = {
    "Stable Diffusion 2": ({"emb_params": torch.zeros(2, 1024)}, "1024 wide, as in Stable Diffusion 2; .* is 64 wide"),
    "another width": ({"x": torch.zeros(2, 32)}, "holds vectors 32 wide; the text encoder of this model is 64 wide"),
    "XL": (
        {"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)},
        r"of Stable Diffusion XL or a later model, .* each of its text encoders \(clip_g, clip_l\)",
    ),
    "no tensors": ({}, "holds no tensors; expected a textual inversion embedding"),
    "no vectors": ({"x": torch.zeros(0, 64)}, "holds 0 vectors; expected 1 to 75"),
    "too many": ({"x": torch.zeros(76, 64)}, "holds 76 vectors; expected 1 to 75, the tokens that a prompt may have"),
    "NaN": ({"x": torch.full((1, 64), torch.nan)}, r"not finite \(NaN or infinity\) in float32"),
    "several": (
        {"<a>": torch.zeros(2, 64), "<b>": torch.zeros(2, 64)},
        "holds 2 tensors .<a>, <b>., none known as the embedding",
    ),
    "unknown keys": (
        {"emb_params": torch.zeros(2, 64), "more": torch.zeros(2)},
        "has unknown keys besides emb_params .emb_params, more.",
    ),
    "LoRA": ({"lora_unet_x.lora_down.weight": torch.zeros(4, 64)}, "is no textual inversion embedding, .* LoRA"),
    "a picture": ({"x": torch.zeros(2, 2, 64)}, r"holds x of shape \[2, 2, 64\] and dtype F32; expected"),
    "integers": ({"x": torch.zeros(2, 64, dtype=torch.int32)}, r"shape \[2, 64\] and dtype I32; expected"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused(case: str, tiny_model: minidiff.Model, tmp_path: Path) -> None:
    tensors, message = BAD_FILES[case]
    path = write(tmp_path / "bad.safetensors", **tensors)
    with pytest.raises(ValueError, match=f"bad.safetensors .*{message}"):
        minidiff.with_words(tiny_model, {"word-1": path})


def test_half_precision_cannot_hold_it(tiny_model: minidiff.Model, tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", x=torch.full((1, 64), 1e5))
    half = replace(tiny_model, text=replace(tiny_model.text, model=deepcopy(tiny_model.text.model).half()))
    with pytest.raises(ValueError, match="not finite .* in float16"):
        minidiff.with_words(half, {"word-1": path})
    assert minidiff.with_words(tiny_model, {"word-1": path}).text.added == {"word-1": range(49408, 49409)}


def test_a_file_cut_short_a_missing_one_and_no_path(file: Path, tiny_model: minidiff.Model, tiny_folder: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="5 too few"):
        minidiff.with_words(tiny_model, {"word-1": file})
    with pytest.raises(ValueError, match="is not there"):
        minidiff.load("someone/no-such-model", words={"word-1": tiny_folder / "no.safetensors"})
    with pytest.raises(ValueError, match="the file of a word is 3; expected a path"):
        minidiff.with_words(tiny_model, {"word-1": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"words is \['a'\]; expected \{word: file\}"):
        minidiff.with_words(tiny_model, ["a"])  # type: ignore[arg-type]


def test_info_tells_what_an_embedding_is_for(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", emb_params=torch.zeros(8, 768))
    found = describe(path)
    assert not found.loads
    assert found.kind == "textual inversion embedding"
    assert (found.use or "").startswith("--word WORD=FILE") and found.all_problems() == []
    (part,) = found.parts
    fits = "Stable Diffusion 1.x"
    assert (part.name, part.config) == ("embedding", {"key": "emb_params", "vectors": 8, "width": 768, "fits": fits})

    found = describe(write(path, **{"<x>": torch.zeros(1024)}))
    assert found.kind == "textual inversion embedding of Stable Diffusion 2"
    assert found.parts[0].config == {"key": "<x>", "vectors": 1, "width": 1024, "fits": "Stable Diffusion 2"}
    found = describe(write(path, clip_l=torch.zeros(2, 768), clip_g=torch.zeros(2, 1280)))
    assert found.kind == "textual inversion embedding of Stable Diffusion XL"
    assert "vectors for each of its text encoders" in str(found.all_problems()[0])
    found = describe(write(path, emb_params=torch.tensor(3.0)))
    assert "holds emb_params of shape [] and dtype F32" in str(found.all_problems()[0])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("", "word is ''; expected a name without spaces"),
        ("two words", "word is 'two words'; expected a name without spaces"),
        ("a\u00a0b", "expected a name without spaces"),
        ("\ud800", "expected a name without spaces"),
        (7, "word is 7; expected a name"),
        ("Cat", "word 'Cat' is already a token of this model .* such as 'my-Cat'"),
        ("*", r"word '\*' is already a token of this model"),
        ("<|endoftext|>", "is already a token of this model"),
        ("EASYNEG", "this model already has the word 'EASYNEG', as 'EasyNeg'"),
    ],
)
def test_bad_words_are_refused(word: str, message: str, model: minidiff.Model, file: Path) -> None:
    with pytest.raises(ValueError, match=message):
        minidiff.with_words(model, {word: file})


def test_two_words_of_one_name(tiny_model: minidiff.Model, file: Path) -> None:
    with pytest.raises(ValueError, match="this model already has the word 'easyneg', as 'EasyNeg'"):
        minidiff.with_words(tiny_model, {"EasyNeg": file, "easyneg": file})


PICKLES: dict[str, Callable[[Tensor], dict[str, object]]] = {
    "a1111": lambda vectors: {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "x", "step": 9},
    "a1111, a parameter": lambda vectors: {"string_to_param": {"*": torch.nn.Parameter(vectors)}, "step": 9},
    "the original code's": lambda vectors: {
        "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)}),
        "string_to_token": {"*": torch.tensor(265)},
    },
    "diffusers": lambda vectors: {"<birb-style>": vectors[0]},
}


@pytest.mark.parametrize("layout", PICKLES)
def test_a_pickle_is_refused_and_reads_when_converted(layout: str, tiny_model: minidiff.Model, tmp_path: Path) -> None:
    vectors = torch.randn(2, 64)
    torch.save(PICKLES[layout](vectors), tmp_path / "old.pt")
    with pytest.raises(ValueError, match="is a pickle.* convert it once in Python") as error:
        minidiff.with_words(tiny_model, {"old-1": tmp_path / "old.pt"})
    exec(str(error.value).split("in Python: ")[1], {})
    table = minidiff.with_words(tiny_model, {"old-1": tmp_path / "old.safetensors"}).text.model.get_input_embeddings()
    assert torch.equal(table.weight[49408:], vectors[: 1 if layout == "diffusers" else 2])


# ---- the command line and the picture's recipe


Cli = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> tuple[int, list[str], list[str]]:
        code = main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


def test_a_picture_is_made_again_with_the_same_words(cli: Cli, tiny_folder: Path, file: Path, tmp_path: Path) -> None:
    source = ("--model", tiny_folder, "--dtype", "float32", "--device", "cpu")
    words = ("--word", f"EasyNeg={file}", "--word", f"b,1:x={file}")
    first = cli("generate", "a cat, easyneg", *source, *words[:2], "--steps", 2, "--seed", 3, "--out", "first.png")
    assert first == (0, ["first.png"], [])
    again = cli("generate", "--from", "first.png", *source, *words, "--out", "again.png")
    assert again == (0, ["again.png"], [])
    pictures = [Image.open(tmp_path / name) for name in ("first.png", "again.png")]
    assert pictures[0].tobytes() == pictures[1].tobytes()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    texts = [picture.text["parameters"] for picture in pictures]  # type: ignore[attr-defined]
    assert f'TI hashes: "EasyNeg: {digest[:12]}", Version: ' in texts[0]
    assert f'TI hashes: "EasyNeg: {digest[:12]}, b1x: {digest[:12]}", Version: ' in texts[1]
    found = read_metadata("first.png")
    assert found.reproducible
    assert found.info["adapters"] == [
        {
            "kind": "word",
            "name": "EasyNeg",
            "file": file.name,
            "sha256": digest,
            "weights": {"vectors": 3},
            "short_hash": digest[:12],
        }
    ]

    code, out, err = cli("generate", "--from", "first.png", *source)
    assert (code, out) == (2, [])
    assert err == [
        "minidiff: error: first.png was made with what is not on this model, and a picture cannot choose files: pass "
        f"word EasyNeg (--word EasyNeg=FILE; its file was {file.name}, of sha256 {digest[:10]}...)"
    ]
    other = write(tmp_path / "other.safetensors", x=torch.randn(1, 64))
    code, _, err = cli("generate", "--from", "first.png", *source, "--word", f"easyneg={other}")
    assert (code, err) == (
        0,
        [f"note: first.png was made with another file for the word EasyNeg, of sha256 {digest[:10]}..."],
    )


def test_the_words_of_an_a1111_picture_are_named(cli: Cli, tiny_folder: Path, file: Path, tmp_path: Path) -> None:
    png, digest = PngInfo(), hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    png.add_text(
        "parameters", f'a cat, EasyNeg\nSteps: 2, Seed: 1, Size: 32x32, TI hashes: "EasyNeg: {digest}, bad-1: 0123"'
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=png)
    words = ("--word", f"easyneg={file}", "--word", f"bad-1={file}")
    argv = ("generate", "--from", "x.png", "--model", tiny_folder, "--dtype", "float32", "--out", "y.png")
    _, _, err = cli(*argv)
    assert err[1:] == [
        "note: x.png was made with what is not on this model, and a picture cannot choose files: pass word EasyNeg "
        f"(--word EasyNeg=FILE; its file was of sha256 {digest[:10]}...), word bad-1 (--word bad-1=FILE; its file was "
        "of sha256 0123...)"
    ]
    _, _, err = cli(*argv, *words)
    assert err[1:] == ["note: x.png was made with another file for the word bad-1, of sha256 0123..."]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["EasyNeg"], "argument --word: got 'EasyNeg'; expected e.g. EasyNegative=EasyNegative.safetensors"),
        (["=x.safetensors"], "argument --word: got '=x.safetensors'"),
        (["a=x.safetensors", "a=y.safetensors"], "argument --word: the word 'a' appears twice"),
        (["a-1=no.safetensors"], "no.safetensors is not there"),
    ],
)
def test_bad_flags(words: list[str], message: str, cli: Cli) -> None:
    code, _, (err,) = cli("generate", "a cat", *[part for word in words for part in ("--word", word)])
    assert code == 2
    assert err.startswith(f"minidiff: error: {message}")


@pytest.mark.parametrize("adapters", [[3], [{}], [{"kind": "word", "name": 3, "file": "x", "sha256": "y"}]])
def test_a_picture_with_adapters_of_another_kind_is_refused(adapters: list[object], cli: Cli, tmp_path: Path) -> None:
    chunk = {"format": 1, "arguments": {"prompt": "a cat", "model": "minidiff/shapes"}, "info": {"adapters": adapters}}
    png = PngInfo()
    png.add_itxt("minidiff", json.dumps(chunk))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=png)
    code, _, err = cli("generate", "--from", "x.png")
    assert code == 2
    assert "x.png: its adapters are not understood" in err[-1]
