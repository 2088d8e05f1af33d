"""CLIP score: how well pictures fit their texts.

    python -m metrics.clip_score --images samples/RUN --clip clip-vit-base-patch32
    python -m metrics.clip_score --images DIR --clip FILE --prompts prompts.txt

The text of a picture is the prompt that its PNG says it was drawn from; or NAME.txt beside it; or,
with --prompts, of picture i (by name) line i. In the card stand

    CLIP score       100 · max(cos, 0), a mean over pictures (torchmetrics' number)
    CLIP-S           2.5 · max(cos, 0), with "A photo depicts " before each text (Hessel 2021)
    R-precision      the share of pictures that are nearer to their own text than to those of
                     --rivals other pictures (Park et al. 2021)

Stable Diffusion 1 and XL read their prompts with ViT-L/14's own text encoder, so by its score they
grade themselves: take ViT-B/32 beside it. Only scores of one CLIP compare.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import harness.interrupt  # noqa: F401

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.images import EXTENSIONS
from data.prompts import read_prompts
from harness.cli import UserError, cli, flag, parse
from harness.files import make_dir, safe_name, write_text
from harness.likeness import OWN, read_like
from harness.ranks import pick_device
from harness.reading import read_file
from metrics.cards import Card, card_text, show
from metrics.clip import Clip, open_clip, preprocess
from metrics.features import key_of

PREFIX = "A photo depicts "


@dataclass(frozen=True)
class Config:
    images: str = flag("", "folder of pictures, such as samplers.py's")
    clip: str = flag("", "CLIP of transformers: a file, a folder or hf:org/name")
    prompts: str = flag("", "a text file, a line a picture; default what the pictures say")
    rivals: int = flag(99, "texts of other pictures, for R-precision", low=1, high=1e5)
    seed: int = flag(0, "of which those are", low=0, high=2**63 - 1)
    batch: int = flag(64, "pictures at a time", low=1, high=1e5)
    device: str = flag("auto", "auto | cpu | cuda | cuda:1")
    out: str = flag("", "the card; default cards/<images>-CLIP-….json", writes=".json")


def pictures_of(folder: Path) -> list[Path]:
    """The pictures of a folder, by name."""
    if not folder.is_dir():
        raise UserError(f"--images {folder}: no such folder", do="Name a folder of pictures.")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)
    if not found:
        raise UserError(f"{folder} has no pictures", do="Name a folder of pictures.")
    return found


def texts_of(cfg: Config, pictures: Sequence[Path]) -> list[str]:
    """The text of each picture."""
    if not cfg.prompts:
        return [text_of(path) for path in pictures]
    lines = read_prompts(f"@{cfg.prompts}")
    if len(lines) != len(pictures):
        raise UserError(
            f"--prompts {cfg.prompts} has {len(lines):,} lines, {cfg.images} {len(pictures):,} "
            "pictures",
            do="Write a line for each, in the order of their names.",
        )
    return lines


def text_of(path: Path) -> str:
    """What a PNG of ours was drawn from, or what stands beside a picture."""
    with Image.open(path) as image:
        said = read_like(path) if image.info.get(OWN) else None
    for word in said.flags if said else ():
        name, _, value = word.partition("=")
        if name == "--prompt":
            return value.removeprefix(" ") if value.startswith(" @") else value
    beside, text = path.with_suffix(".txt"), ""
    if beside.is_file():
        try:
            text = " ".join(read_file(beside).decode("utf-8-sig").split())
        except UnicodeDecodeError:
            raise UserError(f"{beside} is not UTF-8", do="Save it as UTF-8.") from None
    if text:
        return text
    raise UserError(
        f"{path} does not say what it was drawn from", do="Add --prompts, or NAME.txt beside each."
    )


def opened(path: Path) -> Image.Image:
    """A picture in memory, its file closed."""
    with Image.open(path) as image:
        return image.convert("RGB")


@torch.no_grad()
def embed(clip: Clip, paths: Sequence[Path], batch: int, device: torch.device) -> Tensor:
    """(n, d) of pictures."""
    side = clip.vision.cfg.side
    parts = []
    for lo in range(0, len(paths), batch):
        pictures = [opened(path) for path in paths[lo : lo + batch]]
        parts.append(clip.images(preprocess(pictures, side).to(device)))
    return torch.cat(parts)


def cosines(clip: Clip, images: Tensor, texts: Sequence[str]) -> Tensor:
    """(n,) of each picture and its text; each distinct text is encoded once."""
    distinct = list(dict.fromkeys(texts))
    rows = {text: row for row, text in enumerate(distinct)}
    index = torch.tensor([rows[text] for text in texts], device=images.device)
    return (images * clip.texts(distinct)[index]).sum(1).double()


def precision(clip: Clip, images: Tensor, texts: Sequence[str], rivals: int, seed: int) -> Tensor:
    """(n,) 1 where a picture is nearer to its own text than to those of `rivals` others, drawn
    without repeats from the texts that differ from its own; all of them, if there are fewer."""
    distinct = list(dict.fromkeys(texts))
    vectors = clip.texts(distinct)
    order = np.random.default_rng(seed)
    hits = []
    for image, text in zip(images, texts):
        own = distinct.index(text)
        others = [row for row in range(len(distinct)) if row != own]
        chosen = order.choice(others, min(rivals, len(others)), replace=False) if others else []
        near = vectors[[own, *chosen]] @ image
        hits.append(float(near[0] > near[1:].max()) if len(near) > 1 else float("nan"))
    return torch.tensor(hits, dtype=torch.float64)


def metric(values: Tensor, scale: float = 1.0) -> dict[str, float | None]:
    """A mean and its standard error over pictures."""
    values = values * scale
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    mean = float(values.mean())
    return {"value": mean if mean == mean else None, "error": error if mean == mean else None}


def score(clip: Clip, images: Tensor, texts: Sequence[str], rivals: int, seed: int) -> dict:
    """The three metrics of a card."""
    plain = cosines(clip, images, texts).clamp(min=0)
    prefixed = cosines(clip, images, [PREFIX + text for text in texts]).clamp(min=0)
    return {
        "CLIP score": metric(plain, 100),
        "CLIP-S": metric(prefixed, 2.5),
        "R-precision": metric(precision(clip, images, texts, rivals, seed)),
    }


def card_of(cfg: Config, clip: Clip, device: torch.device) -> Card:
    """What was measured, of what, with what."""
    paths = pictures_of(Path(cfg.images))
    texts = texts_of(cfg, paths)
    images = embed(clip, paths, cfg.batch, device)
    vision = clip.vision.cfg
    circular = (vision.width, vision.patch) == (1024, 14)
    if circular:
        print(
            "note: the text encoder of this CLIP, ViT-L/14, is Stable Diffusion 1's and XL's own: "
            "their score by it is circular.  Take ViT-B/32, too.",
            file=sys.stderr,
        )
    measured = {
        "n": len(paths),
        "clip": clip.fingerprint,
        "clip kind": f"ViT, {vision.width} wide, patch {vision.patch}, {vision.side} px",
        "preprocessing": "Pillow bicubic on uint8, centre crop",
        "clamped": True,
        "texts": key_of({"texts": texts}),
        "distinct texts": len(set(texts)),
        "rivals": min(cfg.rivals, len(set(texts)) - 1),
        "seed": cfg.seed,
        "circular for SD 1 and XL": circular,
    }
    return {
        "kind": "metric card",
        "metrics": score(clip, images, texts, cfg.rivals, cfg.seed),
        "measured": measured,
        "sampled": {},
        "subject": {"fake": str(cfg.images)},
    }


def clip_card(images: str, clip: str, seed: int, device: torch.device) -> Card:
    """As a part of another card: what was measured stands under "CLIP"."""
    card = card_of(Config(images, clip, seed=seed), open_clip(clip).to(device), device)
    return {"metrics": card["metrics"], "measured": {"CLIP": card["measured"]}}


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    for name in ("images", "clip"):
        if not getattr(cfg, name):
            raise UserError(f"--{name} is missing", do=f"Add --{name}; see --help.")
    if dry_run:
        print(json.dumps(vars(cfg), indent=1))
        return
    device = pick_device(cfg.device)
    card = card_of(cfg, open_clip(cfg.clip).to(device), device)
    name = f"{safe_name(Path(cfg.images).name)}-CLIP-{key_of(card['measured'])[:6]}.json"
    path = Path(cfg.out or f"cards/{name}")
    make_dir(path.parent)
    write_text(path, card_text(card))
    print(show(card))
    print(path)


if __name__ == "__main__":
    cli(main)
