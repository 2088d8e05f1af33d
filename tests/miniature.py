"""SDXL in miniature: a U-Net that reads two text encoders and a vector, the encoders as diffusers
lays them out, and pictures of several shapes with captions.

    flags = sdxl(place)      # of train.Config, beside sharded.FLAGS
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from model import PRESETS
from text import TextConfig, TextEncoder, save_encoder

NAME = "nano-sdxl"
FIRST = TextConfig(16, 2, 2, "quick_gelu")
SECOND = TextConfig(32, 2, 2, "gelu", 24, pad=0)
PRESETS[NAME] = replace(
    PRESETS["sdxl"],
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention=(0, 2),
    middle_attention=1,
    num_head_channels=32,
    context_dim=FIRST.width + SECOND.width,
    vector_dim=SECOND.projection + 6 * 256,
)
# (width, height), five buckets of --area 64x64 --step 16.
SHAPES = [(64, 64), (70, 66), (90, 50), (60, 100), (128, 32), (200, 60), (63, 64), (30, 20)]


def write_encoders(root: Path) -> Path:
    """Both encoders, with random weights, in a folder of diffusers'."""
    torch.manual_seed(0)
    index = {"_class_name": "StableDiffusionXLPipeline"}
    for name, cfg in (("text_encoder", FIRST), ("text_encoder_2", SECOND)):
        folder = root / name
        folder.mkdir(parents=True)
        net = TextEncoder(cfg).eval().requires_grad_(False)
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
        save_encoder(folder / "model.safetensors", net)
        words = {"num_attention_heads": cfg.heads, "hidden_act": cfg.act}
        (folder / "config.json").write_text(json.dumps(words))
        index[name] = ["transformers", "CLIPTextModel"]
    (root / "tokenizer_2").mkdir()
    (root / "tokenizer_2/tokenizer_config.json").write_text('{"pad_token": "!"}')
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def write_pictures(root: Path, each: int = 3) -> Path:
    """Pictures of each shape: of three, one has a caption, one tags, one both; the last nothing."""
    root.mkdir(parents=True)
    names = []
    for i, (width, height) in enumerate(each * SHAPES):
        small = np.random.default_rng(i).integers(0, 256, (5, 5, 3), np.uint8)
        picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        names.append(root / f"{i:02d}.png")
        picture.save(names[-1])
    for i, path in enumerate(names[:-1]):
        if i % 3 != 1:
            path.with_suffix(".caption").write_text(f"A picture of {i} things")
        if i % 3 != 0:
            path.with_suffix(".txt").write_text(f"tag_{i % 5}, tag_{i % 7}, solo")
    return root


def sdxl(place: Path) -> dict[str, Any]:
    """The flags of a run of the miniature, whose encoders and pictures are written to `place`."""
    encoders, pictures = write_encoders(place / "encoders"), write_pictures(place / "pictures")
    return {
        "model": NAME, "text": f"sdxl:{encoders}", "data": str(pictures), "resolution": 64,
        "buckets": True, "area": "64x64", "step": 16, "crop": "random", "flip": True,
        "caption_shuffle": True, "shift": "auto", "batch": 4, "images": 80,
    }  # fmt: skip
