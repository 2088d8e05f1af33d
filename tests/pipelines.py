"""Stable Diffusion 1, 2 and XL in miniature, with random weights, as diffusers writes them and as
one file in the layout of LDM and sgm.

The encoders are as wide as CLIP's, since a file says no more of them than their width, and have two
layers (the second half of ViT-H's three is what Stable Diffusion 2 reads).
"""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ckpt import load_unet
from ckpt.texts import foreign_text
from text import BOS, EOS, open_texts, vocabulary
from vae import load_vae

SIDES = {"sd1": 64, "sd2": 64, "sdxl": 64}
BETAS = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}  # fmt: skip


def tokenizer(pad: str):
    from transformers import CLIPTokenizer

    ranks, ids = vocabulary()
    special = {"<|startoftext|>": BOS, "<|endoftext|>": EOS}
    return CLIPTokenizer(
        vocab=ids | special, merges=[*ranks], pad_token=pad, model_max_length=77
    )


def encoder(width: int, act: str, projection: int = 0):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    cfg = CLIPTextConfig(
        vocab_size=EOS + 1,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        hidden_act=act,
        projection_dim=projection or width,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(cfg).eval()


def unet(family: str):
    from diffusers import UNet2DConditionModel

    common = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 32}
    if family == "sdxl":
        return UNet2DConditionModel(
            **common,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            attention_head_dim=(1, 1),
            use_linear_projection=True,
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    two = {"attention_head_dim": (1, 1), "use_linear_projection": True}
    one = {"attention_head_dim": 8}
    return UNet2DConditionModel(
        **common,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim={"sd1": 768, "sd2": 1024}[family],
        **(two if family == "sd2" else one),
    )


def autoencoder(family: str):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
    )


def pipeline(family: str, **scheduler):
    """A pipeline of diffusers. scheduler: settings of its DDIM, beside Stable Diffusion's betas."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    torch.manual_seed(0)
    how = {"clip_sample": False, "set_alpha_to_one": True, **scheduler}
    how.setdefault("timestep_spacing", "trailing")
    ddim = DDIMScheduler(**BETAS, **how)
    parts = {"vae": autoencoder(family), "unet": unet(family), "scheduler": ddim}
    first = (1024, "gelu") if family == "sd2" else (768, "quick_gelu")
    parts["text_encoder"] = encoder(*first)
    parts["tokenizer"] = tokenizer("!" if family == "sd2" else "<|endoftext|>")
    for net in (parts["unet"], parts["vae"]):
        for p in net.parameters():  # far from their small first values, so that all of it counts
            p.data += 0.02 * torch.randn_like(p)
    if family == "sdxl":
        return StableDiffusionXLPipeline(
            **parts,
            text_encoder_2=encoder(1280, "gelu", 1280),
            tokenizer_2=tokenizer("!"),
            add_watermarker=False,
        )
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


ENCODERS = {
    "sd1": [("cond_stage_model.transformer.", "hf")],
    "sd2": [("cond_stage_model.model.", "open_clip")],
    "sdxl": [
        ("conditioner.embedders.0.transformer.", "hf"),
        ("conditioner.embedders.1.model.", "open_clip"),
    ],
}
# What no tensor of a miniature shows.
HEADS = {"sd1": 8, "sd2": 1, "sdxl": 1}


@cache
def single_file(family: str) -> Path:
    """A pipeline as one file of LDM's (sgm's) names, made once."""
    folder = made(family)[1]
    path = folder.with_name(f"{family}.safetensors")
    net, _ = load_unet(folder)
    vae = load_vae(f"{'sdxl' if family == 'sdxl' else 'sd'}:{folder / 'vae'}")
    parts = {"model.diffusion_model.": net.state_dict(), "first_stage_model.": vae.state_dict()}
    encoders = open_texts(folder).encoders
    for encoder, (prefix, layout) in zip(encoders, ENCODERS[family]):
        parts[prefix] = foreign_text(encoder.state_dict(), layout)
    tensors = {}
    for prefix, part in parts.items():
        tensors |= {prefix + name: tensor.contiguous() for name, tensor in part.items()}
    save_file(tensors, path)
    return path


@cache
def made(family: str) -> tuple[Any, Path]:
    """(a pipeline of diffusers, its folder), made once for all files of tests."""
    home = Path(tempfile.mkdtemp(prefix="pipelines-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    pipe = pipeline(family)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(home / family)
    return pipe, home / family
