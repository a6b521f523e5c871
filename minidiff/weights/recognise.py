"""Recognise the kind of a weight file from its tensors' names and shapes, to load SD 1.x and refuse other models by
name."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..networks.config import UNetConfig, VAEConfig
from .names import LDM_PREFIX

Shapes = Mapping[str, tuple[int, ...]]

CHECKPOINT = "Stable Diffusion 1.x checkpoint"
WITHOUT_VAE = "Stable Diffusion 1.x checkpoint without an autoencoder"
UNET = "UNet in the folder format"
AUTOENCODER = "autoencoder (VAE)"
TEXT_ENCODER = "CLIP text encoder"
EMBEDDING = "textual inversion embedding"
IMAGE_ADAPTER = "IP-Adapter"
TEXT_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2", 1280: "Stable Diffusion XL"}
"""The model whose text encoder has this width. SDXL also has a second one, 768 wide."""

# (pattern of a key, kind of a file with such a key), tried in this order. These have a UNet in LDM names, or a single
# key distinguishes them from one:
_RELATIVES = (
    (r"time_stack\.|time_mixer", "Stable Video Diffusion checkpoint"),
    (r"^conditioner\.", "Stable Diffusion XL checkpoint"),
    (r"^cond_stage_model\.model\.", "Stable Diffusion 2 checkpoint (OpenCLIP text encoder)"),
    (r"joint_blocks\.", "Stable Diffusion 3 checkpoint"),
    (r"double_blocks\.", "Flux checkpoint"),
    (r"^lora_controlnet|^(control_model\.)?input_blocks\..*\.(up|down)$", "Control-LoRA"),
    (r"^control_model\.|^controlnet_|^(input|zero)_(hint_block|convs)\.", "ControlNet"),
    (r"motion_modules\.", "AnimateDiff motion module"),
    (r"position_net\.|\.fuser\.", "GLIGEN model"),
    (r"time_embed(ding)?\.cond_proj\.", "latent consistency model (LCM)"),
    (r"(^|\.)(scaled_fp8|scale_weight)$", "checkpoint with scaled fp8 weights"),
)
_OTHERS = (
    (r"^(ip_adapter|image_proj)\.", IMAGE_ADAPTER),
    (r"^(unet|text_encoder):\d+:(up|down)$", "LoRA in cloneofsimo's first format"),
    (r"lora|^lycoris_|\.hada_|\.lokr_", "LoRA"),
    (r"^(emb_params|string_to_param)", EMBEDDING),
    (r"^clip_[lg]$", f"{EMBEDDING} of Stable Diffusion XL"),
    (r"^model_ema\.diffusion_model", "checkpoint with averaged weights (EMA) alone"),
    (r"^unet\.(conv_in|down_blocks)\.", "model folder's networks in one file"),
    (r"^(input_blocks|diffusion_model\.input_blocks)\.", "UNet in LDM names alone"),
    (r"^(cond_stage_model|transformer)\.", "text encoder in LDM names alone"),
    (r"\.rdb\d|RRDB_trunk|^model\.1\.sub\.", "ESRGAN upscaler"),
    (r"^(adapter\.)?body\.\d+\.", "T2I-Adapter"),
    (r"^\d+\.\d\.linear", "hypernetwork"),
    (r"^taesd_|^(en|de)coder\.layers\.\d+\.(conv\.\d|weight$)|^\d+\.conv\.\d\.weight$", "tiny autoencoder (TAESD)"),
    (r"^concept_embeds$", "safety checker"),
    (r"^(vision_model|visual)\.", "CLIP image encoder, or a whole CLIP"),
)

CONTEXTS = {1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
"""Width of the text that a UNet reads -> whose it is."""
# (what some key of a LoRA looks like, what it is for or of which kind)
_NO_LORA_OF_OURS = (
    (
        r"lora_te2_|text_encoder_2\.|transformer_blocks[._][1-9]|label_emb|add_embedding",
        "a LoRA for Stable Diffusion XL",
    ),
    (r"(double|single)_(transformer_)?blocks[._]", "a LoRA for Flux"),
    (r"joint_blocks[._]", "a LoRA for Stable Diffusion 3"),
    (r"^(lora_)?transformer[._]", "a LoRA for a transformer, such as Flux or Stable Diffusion 3"),
    (r"motion_modules[._]", "a LoRA for AnimateDiff"),
    (r"\.b?oft_|oft_(blocks|diag|R)", "an OFT, which rotates weights"),
    (r"\.on_input$", "an (IA)3, which scales activations"),
    (r"\.(a|b|bm|c)[12]\.weight$|\.bm[12]\.", "a GLoRA"),
)

_LORA_USE = "--lora FILE=WEIGHT, or loras=[minidiff.LoRA(file, weight)] of minidiff.load"
# How files are used that are put on a model
_USES = {
    "LoRA": _LORA_USE,
    "LoRA in cloneofsimo's first format": _LORA_USE,
    EMBEDDING: "--word WORD=FILE, or words={word: file} of minidiff.load",
    IMAGE_ADAPTER: "--ip-adapter FILE --image-encoder FOLDER, or minidiff.with_image_prompt",
}
_WANTED = {
    "checkpoint with averaged weights (EMA) alone": "use the complete checkpoint, or its non-EMA part",
    "model folder's networks in one file": "load the folder that they belong to",
    "UNet in LDM names alone": "use the complete checkpoint, or load the model folder that it belongs to",
    "text encoder in LDM names alone": "use the complete checkpoint",
    "safety checker": "it checks images; pass its folder as safety=",
    "checkpoint with scaled fp8 weights": "use the float16 or bfloat16 file",
}


@dataclass(frozen=True)
class Kind:
    """The kind of a file. `problem` says why minidiff cannot make images with it alone; None if it can. `use` says how
    it is put on a model, if it can be.
    """

    name: str
    problem: str | None = None
    use: str | None = None


def recognise(shapes: Shapes) -> Kind:
    """The kind of a weight file, from {key in the file: shape of the tensor}."""
    unet = LDM_PREFIX["unet"]
    checkpoint = _has(shapes, f"{unet}input_blocks.")
    name = name_of(shapes, _RELATIVES if checkpoint else _RELATIVES + _OTHERS)
    if name == EMBEDDING:
        return _embedding(shapes)
    if name == IMAGE_ADAPTER:
        return _image_adapter(shapes)
    if name in _USES:
        return _on_a_model(name)
    if name is not None:
        return Kind(name, f"it is {_a(name)}; {_WANTED.get(name, 'minidiff makes images with Stable Diffusion 1.x')}")
    if checkpoint:
        return _refuse_unet(shapes, f"{unet}input_blocks.0.0.weight") or _checkpoint(shapes)
    if "conv_in.weight" in shapes and "time_embedding.linear_1.weight" in shapes:
        return _refuse_unet(shapes, "conv_in.weight") or Kind(UNET, _alone("a UNet"))
    if any(key.endswith("encoder.conv_in.weight") for key in shapes):
        return Kind(AUTOENCODER, _alone("an autoencoder") + ", or pass it as vae=")
    if any(key.endswith("embeddings.token_embedding.weight") for key in shapes):
        return Kind(TEXT_ENCODER, _alone("a text encoder"))
    if len(shapes) == 1 and all(len(shape) in (1, 2) and shape[-1] in TEXT_WIDTHS for shape in shapes.values()):
        return _embedding(shapes)
    some = ", ".join(list(shapes)[:3]) or "none"
    return Kind("unknown", f"its tensors are not those of a Stable Diffusion 1.x checkpoint (the first keys: {some})")


def lora_problem(shapes: Shapes) -> str | None:
    """Why a file is no LoRA for Stable Diffusion 1.x, by its keys alone; None where they do not tell."""
    if not shapes:
        return "it holds no tensors"
    if not is_lora(shapes):
        kind = recognise(shapes)
        return f"it is {_a(kind.name)}, no LoRA" if kind.name != "unknown" else "its tensors are not those of a LoRA"
    what = name_of(shapes, _NO_LORA_OF_OURS)
    return None if what is None else f"it is {what}; minidiff reads LoRA, LoHa, LoKr, DoRA for Stable Diffusion 1.x"


def is_lora(keys: Iterable[str]) -> bool:
    """Whether keys are those of a LoRA or one of its kin, for whatever model."""
    return name_of(keys, [row for row in _OTHERS if row[1].startswith("LoRA")]) is not None


def name_of(keys: Iterable[str], table: Iterable[tuple[str, str]] = _RELATIVES + _OTHERS) -> str | None:
    """The kind of a file with these keys, from the tables above; None if no key matches."""
    lines = "\n".join(keys)
    return next((name for pattern, name in table if re.search(pattern, lines, re.MULTILINE)), None)


def refuse_widths(in_channels: int, context: int) -> Kind | None:
    """The relatives of SD 1.x that differ in the widths of the UNet's inputs only; None for SD 1.x and its inpainting
    model (9 channels).
    """
    if in_channels == 8:
        name, why = (
            "image-conditioned model, such as an InstructPix2Pix model or GeoWizard",
            "its UNet takes 8 channels: latents and an encoded image",
        )
    elif context in CONTEXTS:
        name, why = f"{CONTEXTS[context]} model", f"its text embedding is {context} wide"
    else:
        return None
    return Kind(name, f"it is {_a(name)} ({why}); minidiff makes images with Stable Diffusion 1.x")


def _embedding(shapes: Shapes) -> Kind:
    of = [TEXT_WIDTHS[shape[-1]] for shape in shapes.values() if shape[-1:] in ((1024,), (1280,))]
    if of:
        name = f"{EMBEDDING} of {of[0]}"
        return Kind(name, f"it is a {name}; minidiff makes images with Stable Diffusion 1.x")
    return _on_a_model(EMBEDDING)


def _image_adapter(shapes: Shapes) -> Kind:
    width = next((shape[-1] for key, shape in shapes.items() if key.endswith("_ip.weight") and shape), 768)
    of = {768: "", 1024: " of Stable Diffusion 2", 2048: " of Stable Diffusion XL"}.get(width, " of another model")
    if not of:
        return _on_a_model(IMAGE_ADAPTER)
    return Kind(f"{IMAGE_ADAPTER}{of}", f"it is {_a(IMAGE_ADAPTER)}{of}; minidiff takes those of Stable Diffusion 1.5")


def _on_a_model(name: str) -> Kind:
    return Kind(name, f"it is {_a(name)}, which is put on a model: {_USES[name]}", _USES[name])


def _refuse_unet(shapes: Shapes, conv_in: str) -> Kind | None:
    return refuse_widths(_edge(shapes, conv_in, 1, 4), _context(shapes))


def _checkpoint(shapes: Shapes) -> Kind:
    if not _has(shapes, LDM_PREFIX["text_encoder"]):
        return Kind(f"{CHECKPOINT} without a text encoder", "it holds no text encoder; use the complete checkpoint")
    if not _has(shapes, LDM_PREFIX["vae"]):
        return Kind(WITHOUT_VAE, "it holds no autoencoder; pass one with vae=")
    return Kind(CHECKPOINT)


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "IAEi" else f"a {name}"


def _alone(part: str) -> str:
    return f"it is {part} alone; load the model folder that it belongs to"


def ldm_levels(shapes: Shapes) -> tuple[int, int]:
    """(levels, resnets per level) of a UNet in LDM names without prefix, from where the resolution changes."""
    downs = sorted({int(match[1]) for key in shapes if (match := re.match(r"input_blocks\.(\d{1,2})\.0\.op\.", key))})
    if downs:
        return len(downs) + 1, max(downs[0] - 1, 1)
    return 1, max(_count(shapes, "input_blocks.{}.") - 1, 1)


def ldm_vae_levels(shapes: Shapes) -> tuple[int, int]:
    """(levels, resnets per level) of a VAE in LDM names without prefix; SD 1.x's if the keys do not show them."""
    return _count(shapes, "encoder.down.{}.") or 4, _count(shapes, "encoder.down.0.block.{}.") or 2


def unet_config(shapes: Shapes) -> UNetConfig:
    """The config of a UNet from its shapes in our names. For missing tensors SD 1.x's shape is assumed: the strict
    check names them later.

    The numbers of heads and groups cannot be read from tensors; SD 1.x's 8 and 32 are assumed.
    """
    widths = _widths("UNet", shapes, "down_blocks.{}.")
    levels = len(widths)
    linear = any(key.endswith("proj_in.weight") and len(shape) == 2 for key, shape in shapes.items())
    return UNetConfig(
        in_channels=_edge(shapes, "conv_in.weight", 1, 4),
        out_channels=_edge(shapes, "conv_out.weight", 0, 4),
        block_out_channels=widths,
        down_attention=tuple(_has(shapes, f"down_blocks.{i}.attentions.") for i in range(levels)),
        up_attention=tuple(_has(shapes, f"up_blocks.{i}.attentions.") for i in range(levels)),
        mid_block=_has(shapes, "mid_block."),
        layers_per_block=tuple(_count(shapes, f"down_blocks.{i}.resnets.{{}}.") for i in range(levels)),
        num_heads=(8,) * levels,
        cross_attention_dim=_context(shapes),
        use_linear_projection=linear,
    )


def vae_config(shapes: Shapes) -> VAEConfig:
    """The config of a VAE from its shapes in our names; groups and scaling as in SD 1.x."""
    return VAEConfig(
        in_channels=_edge(shapes, "encoder.conv_in.weight", 1, 3),
        out_channels=_edge(shapes, "decoder.conv_out.weight", 0, 3),
        latent_channels=_edge(shapes, "post_quant_conv.weight", 0, 4),
        block_out_channels=_widths("autoencoder", shapes, "encoder.down_blocks.{}."),
        layers_per_block=_count(shapes, "encoder.down_blocks.0.resnets.{}."),
    )


def text_config(shapes: Shapes) -> dict[str, object]:
    """The config.json of a CLIP text encoder from its shapes in the hub's names. Heads are 64 wide in every CLIP."""
    width = _edge(shapes, "text_model.embeddings.token_embedding.weight", 1, 768)
    if width % 64:
        raise ValueError(
            f"the text encoder is {width} wide; expected a multiple of 64, the width of a CLIP head (768 in SD 1.x)"
        )
    return {
        "vocab_size": _edge(shapes, "text_model.embeddings.token_embedding.weight", 0, 49408),
        "hidden_size": width,
        "intermediate_size": _edge(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", 0, 4 * width),
        "num_hidden_layers": _count(shapes, "text_model.encoder.layers.{}."),
        "num_attention_heads": width // 64,
        "max_position_embeddings": _edge(shapes, "text_model.embeddings.position_embedding.weight", 0, 77),
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }


def _widths(network: str, shapes: Shapes, level: str) -> tuple[int, ...]:
    """Output channels of the first resnet of each level, from the first of several tensors that is present."""
    widths: list[int] = []
    while True:
        resnet = f"{level.format(len(widths))}resnets.0."
        keys = (f"{resnet}{tensor}" for tensor in ("conv1.weight", "conv2.weight", "norm2.weight", "conv1.bias"))
        width = next((_edge(shapes, key, 0, 0) for key in keys if key in shapes), None)
        if width is None:
            break
        widths.append(width)
    if not widths or any(width == 0 or width % 32 for width in widths):
        raise ValueError(
            f"the levels of the {network} are {widths} wide; expected multiples of 32, since tensors do not show the "
            "number of groups (32 in SD 1.x). Load other models from a folder, whose configs state it"
        )
    return tuple(widths)


def _context(shapes: Shapes) -> int:
    """Width of the text embedding that a UNet reads."""
    return next((_edge(shapes, key, 1, 768) for key in shapes if key.endswith("attn2.to_k.weight")), 768)


def _edge(shapes: Shapes, key: str, axis: int, default: int) -> int:
    """One dimension of a tensor; `default` if missing or implausible, since the strict check names it later."""
    shape = shapes.get(key, ())
    return shape[axis] if axis < len(shape) and 0 < shape[axis] < 2**20 else default


def _count(shapes: Shapes, prefix: str) -> int:
    n = 0
    while _has(shapes, prefix.format(n)):
        n += 1
    return n


def _has(shapes: Shapes, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in shapes)
