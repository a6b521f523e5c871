"""Write the bundled model as a folder in Stable Diffusion's format: configs, tokenizer and weights."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from ..networks.text import PREFIX
from .world import BACKGROUNDS, COLOURS, SHAPES, SIZE

Config = Mapping[str, object]
WORDS = ("a", "an", "and", "on", "background", *SHAPES, *COLOURS, *BACKGROUNDS)
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
POSITIONS = 24  # four objects with colours, a background, BOS and EOS take 21
# The vocabulary: 512 byte tokens (256 inside a word, 256 at its end), the words' merges, BOS and EOS.
TEXT: Config = {
    "architectures": ["CLIPTextModel"],
    "bos_token_id": 603,
    "eos_token_id": 604,
    "hidden_act": "quick_gelu",
    "hidden_size": 128,
    "intermediate_size": 512,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": POSITIONS,
    "model_type": "clip_text_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 604,
    "projection_dim": 128,
    "vocab_size": 605,
}
# Attention at 16x16 and 8x8 only, the grids used for layout guidance in Stable Diffusion at 512 pixels; at 32x32 its
# backward pass would take half of the training time.
UNET: Config = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 2,  # the number of heads
    "block_out_channels": [48, 96, 160],
    "cross_attention_dim": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 16,
    "out_channels": 4,
    "sample_size": SIZE // 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
# Few groups: normalising over few channels loses the absolute colour of a flat picture.
VAE: Config = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": SIZE,
    "scaling_factor": 0.5,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
SCHEDULER: Config = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "minidiff_defaults": {
        "sampler": "dpmpp_2m",
        "steps": 20,
        "guidance_scale": 4.0,
        "guidance": {
            "objective": {"inside": 1.0, "extent": 1.0},
            "scale": 0.03,
            "threshold": 0.1,
            "passes": 25,
            "early": True,
            "steps": 0.6,
            "step_rule": "unit",
            "usual_sizes": {"least": 0.2, "most": 0.66, "aspect": 2.2},
        },
        "regions_apart": 0.4,
    },
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
INDEX: Config = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_folder(folder: Path, states: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype) -> None:
    """Write everything that `minidiff.load` and diffusers read; existing files are replaced.

    states: state dicts of "unet", "vae" and "text".
    """
    write_tokenizer(folder / "tokenizer")
    _write_json(folder / "model_index.json", INDEX)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    # The files have a prefix that transformers has dropped from its CLIPTextModel.
    text = {PREFIX + key.removeprefix(PREFIX): value for key, value in states["text"].items()}
    for name, config, state in (
        ("unet/diffusion_pytorch_model", UNET, states["unet"]),
        ("vae/diffusion_pytorch_model", VAE, states["vae"]),
        ("text_encoder/model", TEXT, text),
    ):
        path = folder / f"{name}.safetensors"
        _write_json(path.parent / "config.json", config)
        weights = {key: value.detach().to(dtype).contiguous() for key, value in state.items()}
        save_file(weights, path, metadata={"format": "pt"})


def write_tokenizer(folder: Path) -> None:
    """Write a CLIP tokenizer whose vocabulary has one token for each word of the captions.

    Other text becomes single-byte tokens, which are untrained. `minidiff_words` in its config lists the trained words.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainer = trainers.BpeTrainer(vocab_size=10_000, end_of_word_suffix="</w>", initial_alphabet=alphabet)
    bpe.train_from_iterator([[word] for word in WORDS], trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), BOS, EOS]
    _write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS, "unk_token": EOS}
    _write_json(folder / "special_tokens_map.json", special)
    config = {**special, "model_max_length": POSITIONS, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    _write_json(folder / "tokenizer_config.json", {**config, "minidiff_words": sorted((",", *WORDS))})


def _write_json(path: Path, value: Config) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(value), indent=1) + "\n", encoding="utf-8")
