"""IP-Adapters with random weights: their files, a vision model, and minidiff with them against diffusers."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import minidiff
from minidiff.networks.image_prompt import image_projection
from minidiff.resolve import image_inputs
from minidiff.weights.image_prompt import key_value_layers

from .models import TINY, random_weights, write_folder
from .reference import diffusers, relative_error
from .table import LEVELS, Row

KINDS = ("plain", "plus", "full")
HIDDEN, EMBEDDING = 32, 24  # widths of the vision model: of its layers, and of what it says of a whole picture
SEED, STEPS, SCALE = 4, 4, 5.0


def _shapes(kind: str, width: int) -> dict[str, tuple[int, ...]]:
    """What tells the sizes of a projection."""
    if kind == "plain":
        return {"proj.weight": (4 * width, EMBEDDING)}
    if kind == "full":
        return {"proj.0.weight": (HIDDEN, HIDDEN), "proj.3.weight": (width,)}
    queries = {f"layers.{i}.0.to_q.weight": (128, 48) for i in range(4)}
    return {"latents": (1, 6, 48), "proj_in.weight": (48, HIDDEN), "layers.0.1.1.weight": (192, 48)} | queries


def write_image_adapter(path: Path, kind: str, model: minidiff.Model, seed: int = 0) -> Path:
    """A file as published: `image_proj.*` and `ip_adapter.N.to_k_ip.weight`, N = 1, 3, 5, ..."""
    width = model.unet.config.cross_attention_dim
    with torch.device("meta"):
        projection = image_projection(_shapes(kind, width), width)
        assert projection is not None
        parts = nn.ModuleDict({"image_proj": projection, "ip_adapter": key_value_layers(model.unet)})
    shapes = {key: value.shape for key, value in parts.state_dict().items()}
    # loud, as the cross-attention of the models is: otherwise no picture has an effect on the pixels
    save_file(random_weights(shapes, seed, gains={"_ip.weight": 4.0, "proj.weight": 3.0, "proj_in": 3.0}), path)
    return path


def write_image_encoder(folder: Path) -> Path:
    """A CLIP vision model of 32x32 pixels."""
    config = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=EMBEDDING,
        hidden_act="gelu",
    )
    torch.manual_seed(5)
    model = CLIPVisionModelWithProjection(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def random_picture(seed: int = 0, height: int = 40, width: int = 56) -> Image.Image:
    """Noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def load_pipeline(folder: Path, encoder: Path) -> Any:
    """diffusers' pipeline with DDIM and the vision model."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.image_encoder = CLIPVisionModelWithProjection.from_pretrained(encoder)
    return pipe


def put_on(pipe: Any, files: Sequence[Path], scales: Any) -> None:
    """Adapters on the pipeline, instead of those before; all of one folder."""
    names = [path.name for path in files]
    pipe.load_ip_adapter([str(files[0].parent)] * len(names), [""] * len(names), names)
    pipe.set_ip_adapter_scale(scales)


def our_image(model: minidiff.Model, **more: Any) -> Tensor:
    """[1,3,H,W] in [0,1]."""
    call = {"model": model, "steps": STEPS, "seed": SEED, "guidance_scale": SCALE, "sampler": "ddim"}
    images = minidiff.generate("a red circle", **call, output="tensor", **more).images
    assert isinstance(images, Tensor)
    return images


def their_image(pipe: Any, steps: int = STEPS, masks: Any = None, **more: Any) -> Tensor:
    """The pipeline's, of the same noise."""
    edge = pipe.unet.config.sample_size
    images: Tensor = pipe(
        "a red circle",
        num_inference_steps=steps,
        guidance_scale=SCALE,
        latents=torch.randn((4, edge, edge), generator=torch.Generator().manual_seed(SEED))[None],
        output_type="pt",
        cross_attention_kwargs=None if masks is None else {"ip_adapter_masks": masks},
        **more,
    ).images
    return images


@torch.no_grad()
def network_errors(model: minidiff.Model, pipe: Any, pictures: Sequence[Image.Image], scales: Sequence[float]) -> float:
    """Of the UNet's output for a batch [uncond, cond], each adapter with one picture."""
    generator = torch.Generator().manual_seed(5)
    width, edge = model.unet.config.cross_attention_dim, model.unet.config.sample_size
    x, context = (torch.randn(shape, generator=generator) for shape in ((2, 4, edge, edge), (2, 7, width)))
    embeds = pipe.prepare_ip_adapter_image_embeds(list(pictures), None, "cpu", 1, True)
    expected = pipe.unet(x, 500, context, added_cond_kwargs={"image_embeds": embeds}).sample
    request = minidiff.Request("x", image_prompt=list(pictures), image_prompt_scale=list(scales))
    inputs = image_inputs(request, model, model.unet.positions(edge, edge), negative=True)
    found, _ = model.unet(x, 500, context, inputs=inputs)
    assert found is not None
    return relative_error(found, expected)


def image_prompt_rows() -> Iterator[Row]:
    """Each kind of IP-Adapter, then two at once: the UNet's output, and whole images."""
    with tempfile.TemporaryDirectory(prefix="minidiff-bench-") as place:
        folder, encoder = write_folder(Path(place) / "tiny", TINY), write_image_encoder(Path(place) / "image_encoder")
        base, pipe = minidiff.load(folder, dtype="float32", device="cpu"), load_pipeline(folder, encoder)
        plain = our_image(base)
        files = {kind: write_image_adapter(Path(place) / f"{kind}.safetensors", kind, base) for kind in KINDS}
        for kinds in (*((kind,) for kind in KINDS), ("plain", "plus")):
            model, pictures, scales = base, [random_picture(i) for i in range(len(kinds))], [0.8, 0.6][: len(kinds)]
            for kind in kinds:
                model = minidiff.with_image_prompt(model, files[kind], encoder)
            put_on(pipe, [files[kind] for kind in kinds], scales)
            name = f"IP-Adapter, {' and '.join(kinds)}"
            yield Row(f"{name}, unet", "small", network_errors(model, pipe, pictures, scales), 1e-5)
            found = our_image(model, image_prompt=pictures, image_prompt_scale=scales)
            theirs = their_image(pipe, ip_adapter_image=pictures)
            theirs = their_image(pipe, ip_adapter_image=pictures)
            error, moved = (255 * float((found - other).abs().max()) for other in (theirs, plain))
            yield Row(f"{name}, image", "small", error, 1.0, LEVELS, f"it changes {moved:.3g}")
