"""What people put on a model: files of each format with random numbers, and minidiff with them against the libraries
that made the formats. A further kind of adapter is a function in ROWS."""

import copy
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minidiff
from minidiff.weights.lora import shapes_of
from minidiff.weights.names import invert, rename, unet_ldm

from .image_prompts import image_prompt_rows
from .models import TINY, Size, text_dict, unet_dict, write_folder
from .reference import diffusers, reference_context, relative_error
from .table import Row

BOUND = 1e-5
RANK = 4
Tensors = dict[str, Tensor]
PROMPTS = ["a photo of a cat", "two red circles"]
SMALL = Size(unet_dict([32, 64], [True, False], layers=1, context=32), TINY.vae, text_dict(32, 64, 2, 2))
"""One level with transformers and one without, so that LDM's names of the upsampler differ."""


# ---- changes of one layer: [out,in] or [out,in,h,w] -> its tensors by the end of their key


def _r(*shape: int, size: float = 0.1) -> Tensor:
    return size * torch.randn(shape)


def low_rank(
    shape: torch.Size,
    up: str = "lora_up.weight",
    down: str = "lora_down.weight",
    alpha: float = 3,
    rank: int = RANK,
    size: float = 0.1,
) -> Tensors:
    """LoRA, and LoCon for a convolution. alpha 0: none in the file. size: the numbers' standard deviation."""
    out, rows, *kernel = shape
    ones = [1] * len(kernel)
    found = {up: _r(out, rank, *ones, size=size), down: _r(rank, rows, *kernel, size=size)}
    return found | ({"alpha": torch.tensor(float(alpha))} if alpha else {})


def low_rank_tucker(shape: torch.Size) -> Tensors:
    """LoCon with a middle: of convolutions alone."""
    out, rows, *kernel = shape
    if max(kernel, default=1) == 1:
        return low_rank(shape)
    parts = {"up": (out, RANK, 1, 1), "down": (RANK, rows, 1, 1), "mid": (RANK, RANK, *kernel)}
    return {f"lora_{name}.weight": _r(*size) for name, size in parts.items()} | {"alpha": torch.tensor(2.0)}


def hadamard(shape: torch.Size, tucker: bool = False) -> Tensors:
    """LoHa."""
    out, rows, *kernel = shape
    found = {"alpha": torch.tensor(2.0)}
    for n in (1, 2):
        if tucker and max(kernel, default=1) > 1:
            found[f"hada_w{n}_a"], found[f"hada_w{n}_b"] = _r(RANK, out), _r(RANK, rows)
            found[f"hada_t{n}"] = _r(RANK, RANK, *kernel)
        else:
            found[f"hada_w{n}_a"] = _r(out, RANK)
            found[f"hada_w{n}_b"] = _r(RANK, torch.Size([rows, *kernel]).numel())
    return found


def kronecker(shape: torch.Size, small: bool = False, tucker: bool = False) -> Tensors:
    """LoKr. small: both factors are products themselves. Edges divide as in LyCORIS, whose loader expects that."""
    out, rows, *kernel = shape
    a, c = (max(n for n in range(1, math.isqrt(edge) + 1) if edge % n == 0) for edge in (out, rows))
    b, d = out // a, rows // c
    found = {"alpha": torch.tensor(0.5)}
    found |= {"lokr_w1_a": _r(a, 1), "lokr_w1_b": _r(1, c)} if small else {"lokr_w1": _r(a, c)}
    if tucker and max(kernel, default=1) > 1:
        return found | {"lokr_w2_a": _r(RANK, b), "lokr_w2_b": _r(RANK, d), "lokr_t2": _r(RANK, RANK, *kernel)}
    if small:
        return found | {"lokr_w2_a": _r(b, 1), "lokr_w2_b": _r(1, torch.Size([d, *kernel]).numel())}
    return found | {"lokr_w2": _r(b, d, *kernel)}


def decomposed(make: Callable[[torch.Size], Tensors], rows: bool = True) -> Callable[[torch.Size], Tensors]:
    """DoRA: the lengths of the new weight's rows, or of its columns."""

    def made(shape: torch.Size) -> Tensors:
        edges = [n if (axis == 0) == rows and axis < 2 else 1 for axis, n in enumerate(shape)]
        return make(shape) | {"dora_scale": 0.5 + torch.rand(edges)}

    return made


def difference(shape: torch.Size) -> Tensors:
    """The whole change of a weight, and of its bias."""
    return {"diff": _r(*shape, size=0.05)} | ({"diff_b": _r(shape[0], size=0.05)} if len(shape) == 4 else {})


def norm(shape: torch.Size) -> Tensors:
    """LyCORIS' change of a norm."""
    return {"w_norm": _r(*shape), "b_norm": _r(*shape)}


# ---- names of layers: ours -> those of a file


def kohya(network: str, layer: str) -> str:
    return f"lora_{'unet' if network == 'unet' else 'te'}_{layer.replace('.', '_')}."


def kohya_ldm(network: str, layer: str) -> str:
    if network == "unet":
        table = unet_ldm(levels=2, layers=1)
        layer = rename(f"{layer}.weight", invert(table, UPSAMPLED)).removesuffix(".weight")
    return kohya(network, layer)


def dotted(network: str, layer: str) -> str:
    return f"{network}.{layer}."


def old_diffusers(network: str, layer: str) -> str:
    return dotted(network, re.sub(r"\.to_(q|k|v|out)(\.0)?$", r".processor.to_\1_lora", layer))


def bare_diffusers(network: str, layer: str) -> str:
    return old_diffusers(network, layer).removeprefix("unet.")


UPSAMPLED = ("up_blocks.1.attentions.0.norm.weight",)  # SMALL's other level has no transformers
ATTENTION = r"(attn\d\.to_(q|k|v|out\.0)|self_attn\.\w+_proj)$"
LINEAR = rf"{ATTENTION}|proj_in$|proj_out$|ff\.net\.(0\.proj|2)$|fc[12]$|time_emb_proj$|time_embedding"
ALL = rf"{LINEAR}|resnets\.\d\.(conv\d|conv_shortcut)$|samplers|conv_in$|conv_out$"


@dataclass(frozen=True)
class Case:
    """One format: the tensors of a layer, their names, and which layers it changes.

    by: who merges it for comparison. twin: names under which that one reads the same tensors, where it has others.
    """

    make: Callable[[torch.Size], Tensors]
    name: Callable[[str, str], str] = kohya
    layers: str = ALL
    by: Callable[[Path, Tensors, Mapping[str, str]], Any] = field(default_factory=lambda: merged_by_diffusers)
    twin: Callable[[str, str], str] | None = None
    text: bool = True
    metadata: Mapping[str, str] = field(default_factory=dict)


def _peft(shape: torch.Size) -> Tensors:
    return low_rank(shape, "lora_B.weight", "lora_A.weight", alpha=0)


PEFT_CONFIG = {
    f"{network}.{key}": value
    for network in ("unet", "text_encoder")
    for key, value in {
        "r": RANK,
        "lora_alpha": 6,
        "alpha_pattern": {"attn1.to_q": 2},
        "rank_pattern": {},
        "use_rslora": network == "unet",
        "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"],
    }.items()
}
PEFT_METADATA = {"lora_adapter_metadata": json.dumps(PEFT_CONFIG)}


def _old(shape: torch.Size) -> Tensors:
    return low_rank(shape, "up.weight", "down.weight", alpha=0)


def tensors_of(case: Case, model: minidiff.Model, name: Callable[[str, str], str] | None = None) -> Tensors:
    """A file's tensors, alike for the same case under any names."""
    torch.manual_seed(3)
    found: Tensors = {}
    networks = {"unet": model.unet} | ({"text_encoder": model.text.model} if case.text else {})
    for network, module in networks.items():
        for key, shape in shapes_of(module).items():
            layer = key.removesuffix(".weight")
            if key.endswith(".weight") and re.search(case.layers, layer) and "embeddings" not in layer:
                parts = case.make(shape)
                found |= {(name or case.name)(network, layer) + end: value for end, value in parts.items()}
    return found


# ---- those who merge for comparison


@cache
def _loaded(folder: Path) -> Any:
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def _pipeline(folder: Path, own: Sequence[str] = ("unet", "text_encoder")) -> Any:
    """A pipeline with these parts of its own."""
    loaded = _loaded(folder)
    copies = {name: copy.deepcopy(getattr(loaded, name)) for name in own}
    return diffusers.StableDiffusionPipeline(**(loaded.components | copies), requires_safety_checker=False)


def _modules(pipeline: Any) -> dict[str, torch.nn.Module]:
    """Its layers by Kohya's names."""
    text = {f"text_model.{name.removeprefix('text_model.')}": m for name, m in pipeline.text_encoder.named_modules()}
    found = {kohya("unet", name)[:-1]: module for name, module in pipeline.unet.named_modules()}
    return found | {kohya("text_encoder", name)[:-1]: module for name, module in text.items()}


def _layers(tensors: Tensors) -> dict[str, Tensors]:
    found: dict[str, Tensors] = {}
    for key, value in tensors.items():
        name, _, part = key.partition(".")
        found.setdefault(name, {})[part] = value
    return found


def merged_by_diffusers(folder: Path, tensors: Tensors, metadata: Mapping[str, str], weight: float = 1.0) -> Any:
    """A StableDiffusionPipeline with the file fused, by PEFT."""
    pipeline = _pipeline(folder)
    save_file(tensors, folder / "lora.safetensors", metadata=dict(metadata))
    pipeline.load_lora_weights(str(folder), weight_name="lora.safetensors")
    pipeline.fuse_lora(lora_scale=weight)
    return pipeline


def run_by_lycoris(folder: Path, tensors: Tensors, metadata: Mapping[str, str]) -> Any:
    """A StableDiffusionPipeline that LyCORIS runs as it trains. Its merging multiplies LoHa and LoKr by alpha / rank
    twice, so a merged file of its own would differ from the network that was trained."""
    from lycoris.modules import get_module, make_module

    pipeline = _pipeline(folder)
    layers = _modules(pipeline)
    for name in _layers(tensors):
        make_module(*get_module(tensors, name), name, layers[name]).apply_to()
    return pipeline


@torch.no_grad()
def merged_by_formula(folder: Path, tensors: Tensors, metadata: Mapping[str, str]) -> Any:
    """A StableDiffusionPipeline with weights from the papers' formulas in float64: for what no library reads whole."""
    pipeline = _pipeline(folder)
    layers = _modules(pipeline)
    for name, parts in _layers(tensors).items():
        p = {part: value.double() for part, value in parts.items()}
        weight = layers[name].weight
        if "lokr_w1" in p:
            second = (
                p["lokr_w2"]
                if "lokr_w2" in p
                else torch.einsum("pqhw,pb,qd->bdhw", p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])
                * (p["alpha"] / RANK)
            )
            change = torch.einsum("ac,bd...->abcd...", p["lokr_w1"], second)
        elif "w_norm" in p:
            change = p["w_norm"]
            layers[name].bias += p["b_norm"]
        else:
            change = torch.einsum("or...,ri...->oi...", p["lora_up.weight"].flatten(1), p["lora_down.weight"])
            change = change * (p.get("alpha", torch.tensor(RANK)) / RANK)
        new = weight.double() + change.reshape(weight.shape)
        for column, length in enumerate(p["dora_scale"].flatten()) if "dora_scale" in p else ():
            new[:, column] *= length / new[:, column].square().sum().sqrt()
        weight.copy_(new)
    return pipeline


CASES: Mapping[str, Case] = {
    "LoRA, Kohya's names": Case(low_rank, layers=LINEAR),
    "LoRA, Kohya's, no alpha": Case(lambda s: low_rank(s, alpha=0), layers=ATTENTION),
    "LoRA, Kohya's, LDM's blocks": Case(low_rank, kohya_ldm, by=run_by_lycoris, twin=kohya),
    "LoRA, diffusers' old": Case(_old, old_diffusers, ATTENTION, text=False),
    "LoRA, diffusers' old, bare": Case(_old, bare_diffusers, ATTENTION, text=False, twin=old_diffusers),
    "LoRA, PEFT's": Case(_peft, dotted, ATTENTION),
    "LoRA, PEFT's, alpha in the header": Case(_peft, dotted, ATTENTION, metadata=PEFT_METADATA),
    "LoCon": Case(low_rank, by=run_by_lycoris),
    "LoCon, Tucker": Case(low_rank_tucker, by=run_by_lycoris),
    "LoHa": Case(hadamard, by=run_by_lycoris),
    "LoHa, Tucker": Case(lambda s: hadamard(s, tucker=True), by=run_by_lycoris),
    "LoKr": Case(kronecker, by=run_by_lycoris),
    "LoKr, both factors small": Case(lambda s: kronecker(s, small=True), layers=ATTENTION, by=run_by_lycoris),
    "LoKr, Tucker": Case(lambda s: kronecker(s, tucker=True), by=merged_by_formula),
    "DoRA": Case(decomposed(low_rank), layers=LINEAR, by=run_by_lycoris),
    "DoRA, PEFT's": Case(
        lambda s: _peft(s) | {"lora_magnitude_vector": 0.5 + torch.rand(s[0])}, dotted, ATTENTION, text=False
    ),
    "DoRA, LoCon": Case(decomposed(low_rank), by=run_by_lycoris),
    "DoRA, LoHa": Case(decomposed(hadamard), by=run_by_lycoris),
    "DoRA, LoKr": Case(decomposed(kronecker), by=run_by_lycoris),
    "DoRA, by columns": Case(decomposed(low_rank, rows=False), by=merged_by_formula),
    "full difference": Case(difference, by=run_by_lycoris),
    "LyCORIS' norms": Case(norm, layers=r"norm", by=merged_by_formula),
}
"""Each format that with_loras reads, but the numbered one of cloneofsimo, whose names need a whole file."""


@torch.no_grad()
def errors(model: minidiff.Model, pipeline: Any) -> tuple[float, float]:
    """Of the UNet's output and of the context, against a pipeline with the same adapters."""
    x, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5)), torch.tensor([981, 21])
    context = reference_context(pipeline, PROMPTS, None)
    eps, _ = model.unet(x, t, context)
    expected = pipeline.unet(x, t, encoder_hidden_states=context, return_dict=False)[0]
    assert eps is not None
    return relative_error(eps, expected), relative_error(model.text.encode(PROMPTS), context)


def merged_pair(case: Case, model: minidiff.Model, folder: Path) -> tuple[minidiff.Model, Any]:
    """Our model and the reference with a file of this format. folder: the model's; the file is written there."""
    path = folder / "file.safetensors"
    save_file(tensors_of(case, model), path, metadata=dict(case.metadata))
    return minidiff.with_loras(model, path), case.by(folder, tensors_of(case, model, case.twin), case.metadata)


def lora_rows() -> Iterator[Row]:
    """Each format: the UNet's output and the context of small models."""
    with tempfile.TemporaryDirectory(prefix="minidiff-bench-") as place:
        folder = write_folder(Path(place) / "small", SMALL)
        model, plain = minidiff.load(folder, dtype="float32", device="cpu"), _pipeline(folder)
        for name, case in CASES.items():
            changed, pipeline = merged_pair(case, model, folder)
            found, moved = errors(changed, pipeline), errors(changed, plain)
            by = case.by.__name__.replace("_", " ")
            for part, value, move in list(zip(("unet", "context"), found, moved, strict=True))[: 1 + case.text]:
                yield Row(f"{name}, {part}", "small", value, BOUND, note=f"{by}; it changes {move:.2g}")


def word_rows() -> Iterator[Row]:
    """Textual inversion: the context of prompts with a word of four vectors, in each layout."""
    prompts = ["easyneg", "two red circles, (easyneg), easyneg"]
    with tempfile.TemporaryDirectory(prefix="minidiff-bench-") as place:
        folder = write_folder(Path(place) / "small", SMALL)
        model, path = minidiff.load(folder, dtype="float32", device="cpu"), folder / "word.safetensors"
        for layout, key in {"A1111's": "emb_params", "converted": "*", "diffusers'": "<style>"}.items():
            torch.manual_seed(3)
            save_file({key: torch.randn(4, model.text.width)}, path)
            pipeline = _pipeline(folder, own=("text_encoder", "tokenizer"))
            pipeline.load_textual_inversion(load_file(path), token="easyneg")
            expected = reference_context(pipeline, prompts, None)
            found = minidiff.with_words(model, {"EasyNeg": path}).text.encode(prompts)
            value, move = relative_error(found, expected), relative_error(model.text.encode(prompts), expected)
            yield Row(f"textual inversion, {layout}", "small", value, 1e-6, note=f"diffusers; it changes {move:.2g}")


ROWS: tuple[Callable[[], Iterator[Row]], ...] = (lora_rows, word_rows, image_prompt_rows)
"""A function of rows for each kind of adapter."""


def adapter_rows() -> Iterator[Row]:
    """All of them."""
    for rows in ROWS:
        yield from rows()
