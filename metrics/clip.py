"""CLIP (Radford et al. 2021): pictures and texts as vectors of one space.

    clip = open_clip("clip-vit-base-patch32/model.safetensors")     # of transformers
    a, b = clip.images(preprocess([picture])), clip.texts(["a cat"])     # (1, 512) each, length 1
    100 * (a @ b.T)

A file holds both encoders, under transformers' names. The text side is text.TextEncoder; the
picture side is here. Both are loaded strictly.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ckpt.containers import open_weights
from ckpt.hub import resolve

from ckpt.texts import encoders, own_file
from harness.cli import UserError
from harness.files import Container, check_fits, fingerprint, listed, load_strict
from harness.reading import read_file
from text import Layer, TextConfig, TextEncoder, load_encoder, pieces_of

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# Of OpenAI's picture encoders: width -> heads.
HEADS = {768: 12, 1024: 16, 1280: 16}
BESIDE = re.compile(r"(vision_model\.)?embeddings\.position_ids|logit_scale|logit_bias")


@dataclass(frozen=True)
class VisionConfig:
    width: int
    layers: int
    heads: int
    patch: int
    side: int  # pixels of a picture
    projection: int
    hidden: int
    act: Literal["quick_gelu", "gelu"]


class VisionEncoder(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) as CLIP has it. Names are transformers'
    without "vision_model."; theirs is the spelling of pre_layrnorm."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.cfg = cfg
        D, places = cfg.width, 1 + (cfg.side // cfg.patch) ** 2
        patches = nn.Conv2d(3, D, cfg.patch, stride=cfg.patch, bias=False)
        table = {"patch_embedding": patches, "position_embedding": nn.Embedding(places, D)}
        self.embeddings = nn.ModuleDict(table)
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(D))
        self.pre_layrnorm, self.post_layernorm = nn.LayerNorm(D), nn.LayerNorm(D)
        like = TextConfig(D, cfg.layers, cfg.heads, cfg.act, hidden=cfg.hidden)
        layers = nn.ModuleList([Layer(like, causal=False) for _ in range(cfg.layers)])
        self.encoder = nn.ModuleDict({"layers": layers})
        self.visual_projection = nn.Linear(D, cfg.projection, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Preprocessed pictures (B, 3, side, side) -> (B, projection)."""
        tokens = self.embeddings["patch_embedding"](x).flatten(2).transpose(1, 2)
        first = self.embeddings.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([first, tokens], 1) + self.embeddings["position_embedding"].weight
        x = self.pre_layrnorm(x)
        for layer in self.encoder["layers"]:
            x = layer(x)
        return self.visual_projection(self.post_layernorm(x[:, 0]))


class Clip(NamedTuple):
    vision: VisionEncoder
    text: TextEncoder
    fingerprint: str

    @torch.no_grad()
    def images(self, x: Tensor) -> Tensor:
        """Preprocessed pictures -> (B, d) of length 1."""
        return F.normalize(self.vision(x), dim=-1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str], batch: int = 64) -> Tensor:
        """(n, d) of length 1. Of a long text the first 75 tokens are read; its end token stays."""
        ids = torch.cat([pieces_of(text, self.text.cfg.pad)[0] for text in texts])
        ids = ids.to(self.text.final_layer_norm.weight.device)
        parts = [self.text(ids[lo : lo + batch]).pooled for lo in range(0, len(ids), batch)]
        return F.normalize(torch.cat(parts), dim=-1)

    def to(self, device: torch.device) -> "Clip":
        return self._replace(vision=self.vision.to(device), text=self.text.to(device))


def preprocess(pictures: Sequence[Image.Image], side: int = 224) -> Tensor:
    """Pictures as OpenAI's CLIP is shown them, (B, 3, side, side): Pillow's bicubic on 8 bits, the
    shorter side to `side`, the middle, and the training set's mean and deviation."""
    rows = []
    for picture in pictures:
        picture = picture.convert("RGB")
        short, long = sorted(picture.size)
        far = int(side * long / short)
        size = (side, far) if picture.width <= picture.height else (far, side)
        picture = picture.resize(size, Image.Resampling.BICUBIC)
        left, top = (round((n - side) / 2) for n in picture.size)
        picture = picture.crop((left, top, left + side, top + side))
        rows.append(torch.from_numpy(np.array(picture)))
    x = torch.stack(rows).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (x - mean) / std


# ---- loading ------------------------------------------------------------------------------------


def open_clip(name: str) -> Clip:
    """Both encoders of a file, a folder or hf:org/name, in fp32 on the CPU."""
    path = resolve(name) if name.startswith("hf:") else own_file(Path(name))
    box = open_weights(path)
    vision = {name: full for full in box if (name := vision_name(full))}
    found = encoders(box)
    if not vision or len(found) != 1:
        raise UserError(
            f"{path} holds {'no' if not vision else 'a'} picture encoder and {len(found)} text "
            "encoders",
            wanted="one of each, as transformers' CLIPModel",
            do="Name model.safetensors of openai/clip-vit-base-patch32 or -large-patch14.",
        )
    text = load_encoder(box, found[0])
    net = load_vision(box.over({k: box.table[full] for k, full in vision.items()}), text)
    if not text.cfg.projection or text.cfg.projection != net.cfg.projection:
        raise UserError(
            f"{path}: texts become {text.cfg.projection} numbers, pictures {net.cfg.projection}",
            do="Name a whole CLIP.",
        )
    states = text.state_dict(prefix="text.") | net.state_dict(prefix="vision.")
    return Clip(net, text, fingerprint(states))


def vision_name(full: str) -> str:
    """A tensor's name in VisionEncoder; "" if it is no part of one."""
    if BESIDE.fullmatch(full):
        return ""
    if full.startswith("visual_projection."):
        return full
    return full.removeprefix("vision_model.") if full.startswith("vision_model.") else ""


def load_vision(view: Container, text: TextEncoder) -> VisionEncoder:
    """The picture encoder of native names. Where no config.json stands beside it, its heads are
    those of its width and its activation is the text encoder's, as in all of OpenAI's."""
    what = f"{view.path}, picture encoder"
    needed = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight")
    needed += ("encoder.layers.0.mlp.fc1.weight", "visual_projection.weight")
    if missing := [name for name in needed if name not in view]:
        raise UserError(f"{what} lacks {listed(missing)}", do="Copy it again.")
    patches, places, hidden, projection = (view.shape(name) for name in needed)
    width, patch = patches[0], patches[-1]
    numbers = [re.match(r"encoder\.layers\.(\d+)\.", name) for name in view]
    said = said_beside(view.path) or {"heads": HEADS.get(width, 0), "act": text.cfg.act}
    heads = said["heads"]
    if not heads or width % heads:
        raise UserError(
            f"{what} is {width} wide: no tensor shows its heads",
            do="Put transformers' config.json beside it.",
        )
    cfg = VisionConfig(
        width=width,
        layers=1 + max(int(match[1]) for match in numbers if match),
        heads=heads,
        patch=patch,
        side=patch * round((places[0] - 1) ** 0.5),
        projection=projection[0],
        hidden=hidden[0],
        act=said["act"],
    )
    with torch.device("meta"):
        net = VisionEncoder(cfg)
    check_fits(net, view.header(), what)
    load_strict(net, dict(view), what, assign=True)
    return net.float().eval().requires_grad_(False)


def said_beside(path: Path) -> dict[str, Any]:
    """What a config.json of transformers says of the picture encoder: heads, act. {}: there is
    none."""
    file = path.absolute().parent / "config.json"
    try:
        config = json.loads(read_file(file))
        config = config["vision_config"]
        heads, act = config["num_attention_heads"], config.get("hidden_act", "quick_gelu")
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"{file} does not say what its picture encoder is", do="Restore it, or take it away."
        ) from None
    if type(heads) is not int or heads < 1 or act not in ("quick_gelu", "gelu"):
        raise UserError(
            f"{file}: heads {brief(heads)}, activation {brief(act)}",
            wanted="whole heads, quick_gelu or gelu",
            do="Use it in transformers.",
        )
    return {"heads": heads, "act": act}
