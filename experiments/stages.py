"""Does stage2 teach what fine left out?   python experiments/stages.py [--out DIR]

Runs the three stages of train.py on toy faces, with their default two excluded characters, then
reads the attributes of samples back: toy faces are drawn from exact attributes, so the closest
drawing to a sample (by search over attributes) says what the sample shows. A character counts when
all five attributes of its concept are there.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import harness.interrupt  # noqa: F401

import numpy as np
import torch
from torch import Tensor

import data.toyfaces as toyfaces
from ckpt import find_checkpoint, load_unet
from data.dataset import open_dataset
from data.images import to_float
from harness import record
from harness.cli import cli, flag, parse
from harness.pictures import save_grid, to_uint8
from samplers import Sampling, open_generator
from vae import vae_from_meta

ROOT = Path(__file__).parent.parent
N, SIZE = 128, 64
STAGES = ("standard", "fine", "stage2")
POOLS = {
    "hair_color": toyfaces.GROUPS["hair color"],
    "hair_style": toyfaces.GROUPS["hair style"],
    "eye_color": toyfaces.GROUPS["eye color"],
    "glasses": (True, False),
    "ornament": ("", *toyfaces.GROUPS["ornament"]),
    "mouth": toyfaces.GROUPS["mouth"],
    "background": toyfaces.GROUPS["background"],
    "skin": toyfaces.GROUPS["skin"],
}
SHIFTS = (-0.015, -0.005, 0.005, 0.015)
# Every change of one attribute that the search tries.
MOVES = [{name: value} for name, pool in POOLS.items() for value in pool]
MOVES += [{name: shift} for name in ("dx", "dy") for shift in SHIFTS]


@dataclass(frozen=True)
class Config:
    out: str = flag("runs/stages", "where its runs live", writes="folder")


# ---- reading faces ------------------------------------------------------------------------------


def drawn(face: toyfaces.Face) -> np.ndarray:
    """A face as float32 (64, 64, 3)."""
    return np.asarray(toyfaces.draw(face, SIZE), np.float32)


@lru_cache
def bank() -> tuple[list[toyfaces.Face], np.ndarray]:
    """Faces to start the search from, none of them a training face, and their drawings."""
    faces = [toyfaces.sample_face(10**6 + i) for i in range(3000)]
    return faces, np.stack([drawn(face) for face in faces])


def read_face(image: np.ndarray) -> toyfaces.Face:
    """The face whose drawing is nearest to image (64, 64, 3) in squared error: the nearest of a
    bank, then changed attribute by attribute (and by a few shifts) until nothing improves."""
    faces, pixels = bank()
    starts = np.argsort(((pixels - image) ** 2).mean((1, 2, 3)))[:3]
    found = [improve(faces[start], image) for start in starts]
    return min(found, key=lambda pair: pair[0])[1]


def improve(face: toyfaces.Face, image: np.ndarray) -> tuple[float, toyfaces.Face]:
    """(squared error, face) after a search from `face`, one attribute at a time."""
    error, improved = np.inf, True
    while improved:
        improved = False
        for move in MOVES:
            other = replace(face, **move)
            other_error = float(((drawn(other) - image) ** 2).mean())
            if other_error < error - 1e-6:
                face, error, improved = other, other_error, True
    return error, face


def as_arrays(images: Tensor) -> np.ndarray:
    """uint8 (B, 3, H, W) -> float32 (B, H, W, 3)."""
    return images.permute(0, 2, 3, 1).numpy().astype(np.float32)


# ---- the experiment -----------------------------------------------------------------------------


def shows(run: Path, out: Path) -> dict[str, float]:
    """Shares of N samples of a run's newest EMA that show each character."""
    generator = open_generator(Sampling(str(run)), torch.device("cpu"))
    images = generator.images(list(range(10_000, 10_000 + N))).images
    save_grid(images[:32], out, columns=8)
    names = [toyfaces.character(read_face(image)) for image in as_arrays(images)]
    return {f"character:{name}": names.count(name) / N for name in toyfaces.CHARACTERS}


def reader_accuracy(run: Path) -> float:
    """Share of real, held-out faces, after the autoencoder, of which all concept attributes are
    read correctly."""
    _, meta = load_unet(find_checkpoint(run))
    vae = vae_from_meta(meta["vae"])
    ds = open_dataset("toyfaces", resolution=SIZE).heldout
    images = to_uint8(vae.decode(vae.encode(to_float(ds.images(range(len(ds)))))))
    right = 0
    for i, image in enumerate(as_arrays(images)):
        face = read_face(image)
        truth = toyfaces.sample_face(int(ds[i].name.split("-")[1]))
        right += all(getattr(face, name) == getattr(truth, name) for name in toyfaces.CONCEPT)
    return right / len(ds)


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(json.dumps(asdict(cfg), indent=1))
        return
    root = Path(cfg.out).absolute()
    for stage in STAGES:
        command = [sys.executable, "train.py", "--out", str(root), "--preview-every", "0"]
        command += ["--stage", stage]
        if stage == "stage2":
            command += ["--images", "10_000"]
        subprocess.run(command, check=True, cwd=ROOT)
    runs = {stage: root / f"toyfaces-fm-{stage}" for stage in STAGES}
    accuracy = reader_accuracy(runs["fine"])
    shares = {stage: shows(run, root / f"{stage}.png") for stage, run in runs.items()}
    for stage, row in shares.items():
        print(f"{stage:<9} " + "  ".join(f"{k} {v:6.1%}" for k, v in row.items()))
    print(f"attributes of real faces read correctly: {accuracy:.1%}")
    result = {
        "excluded": toyfaces.EXCLUDED,
        "samples a run": N,
        "reader accuracy on real faces": accuracy,
        "share of samples": shares,
    }
    record.write("stages", result)


if __name__ == "__main__":
    cli(main)
