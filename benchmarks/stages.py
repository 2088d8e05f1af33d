"""Does stage2 teach what fine left out?   python benchmarks/stages.py [--out DIR]

Runs the three stages of train.py on toy faces, with their default two excluded characters, then reads the attributes of
samples back: toy faces are drawn from exact attributes, so the closest drawing to a sample (by search over attributes)
says what the sample shows. A character counts when all five attributes of its concept are there.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data.toyfaces as toyfaces
from benchmarks import record
from ckpt.unets import find_checkpoint, load_unet
from data.dataset import open_dataset
from data.images import to_float
from objectives import Objective
from harness.pictures import save_grid, to_uint8
from samplers import draw, generators, guided, sample
from vae import vae_from_meta

N, SIZE = 128, 64
POOLS = {"hair_color": toyfaces.GROUPS["hair color"], "hair_style": toyfaces.GROUPS["hair style"],
         "eye_color": toyfaces.GROUPS["eye color"], "glasses": (True, False), "ornament": ("", *toyfaces.GROUPS["ornament"]),
         "mouth": toyfaces.GROUPS["mouth"], "background": toyfaces.GROUPS["background"], "skin": toyfaces.GROUPS["skin"]}
BANK = [toyfaces.sample_face(10 ** 6 + i) for i in range(3000)]                 # starting points, none of them a training face
PIXELS = np.stack([np.asarray(toyfaces.draw(face, SIZE), np.float32) for face in BANK])


def read_face(image: np.ndarray) -> toyfaces.Face:
    """The face whose drawing is nearest to image (64, 64, 3) in squared error: nearest of a bank, then attribute by
    attribute (and a few shifts), until nothing improves."""
    def error(face: toyfaces.Face) -> float:
        return float(((np.asarray(toyfaces.draw(face, SIZE), np.float32) - image) ** 2).mean())

    starts = np.argsort(((PIXELS - image) ** 2).mean((1, 2, 3)))[:3]
    best, best_error = None, np.inf
    for start in starts:
        face, now, improved = BANK[start], np.inf, True
        while improved:
            improved = False
            moves = [{k: v} for k, pool in POOLS.items() for v in pool]
            moves += [{k: float(v)} for k in ("dx", "dy") for v in (-0.015, -0.005, 0.005, 0.015)]
            for move in moves:
                other = replace(face, **move)
                e = error(other)
                if e < now - 1e-6:
                    face, now, improved = other, e, True
        if now < best_error:
            best, best_error = face, now
    return best


def shows(run: Path, out: Path) -> dict[str, float]:
    """Shares of N samples of a run's newest EMA that show each character."""
    net, meta = load_unet(find_checkpoint(run))
    vae, objective, seeds = vae_from_meta(meta["vae"]), Objective(**meta["objective"]), list(range(10_000, 10_000 + N))
    x = sample(guided(objective, net.eval()), objective.prior(draw(generators(seeds), torch.empty(1, *meta["latent_shape"]))),
               t_start=objective.t_max).x
    images = to_uint8(vae.decode(x))
    save_grid(images[:32], out, columns=8)
    names = [toyfaces.character(read_face(i)) for i in images.permute(0, 2, 3, 1).numpy().astype(np.float32)]
    return {f"character:{name}": names.count(name) / N for name in toyfaces.CHARACTERS}


def reader_accuracy(run: Path) -> float:
    """Share of real, held-out faces, after the autoencoder, of which all concept attributes are read correctly."""
    vae = vae_from_meta(load_unet(find_checkpoint(run))[1]["vae"])
    ds, right = open_dataset("toyfaces", resolution=SIZE).heldout, 0
    images = to_uint8(vae.decode(vae.encode(to_float(ds.images(range(len(ds))))))).permute(0, 2, 3, 1).numpy().astype(np.float32)
    for i, image in enumerate(images):
        face, truth = read_face(image), toyfaces.sample_face(int(ds[i].name.split("-")[1]))
        right += all(getattr(face, k) == getattr(truth, k) for k in toyfaces.CONCEPT)
    return right / len(ds)


if __name__ == "__main__":
    root = Path(sys.argv[sys.argv.index("--out") + 1] if "--out" in sys.argv else "runs/stages").absolute()
    common = [sys.executable, "train.py", "--out", str(root), "--preview-every", "0"]
    for stage, images in (("standard", ()), ("fine", ()), ("stage2", ("--images", "10_000"))):
        subprocess.run([*common, "--stage", stage, *images], check=True, cwd=Path(__file__).parent.parent)
    runs = {stage: root / f"toyfaces-fm-{stage}" for stage in ("standard", "fine", "stage2")}
    result = {"excluded": toyfaces.EXCLUDED, "samples a run": N, "reader accuracy on real faces": reader_accuracy(runs["fine"]),
              "share of samples": {stage: shows(run, root / f"{stage}.png") for stage, run in runs.items()}}
    for stage, shares in result["share of samples"].items():
        print(f"{stage:<9} " + "  ".join(f"{k} {v:6.1%}" for k, v in shares.items()))
    print(f"attributes of real faces read correctly: {result['reader accuracy on real faces']:.1%}")
    record.write("stages", result)
