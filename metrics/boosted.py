"""How well networks enlarge pictures whose large ones are known: a part of a metric card.

    loaded = [load_stage("runs/twice")]
    paired_card(cfg, loaded, truth, extractor, device)      # {"metrics", "measured", …}

Held-out images are shrunk, enlarged by the networks, and compared with themselves, one by one
(PSNR, SSIM, latent MSE) and as sets (a Fréchet distance of features, one of patches, sharpness).
Unpaired is the distance to the images that training saw, as a card of samples has it. The floor is
what the last autoencoder alone makes of the true pictures.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.boosts import Before, Enlarger, Loaded, enlarger_of
from data.images import to_float
from diffusion.coupling import resize
from harness.cli import UserError
from harness.pictures import to_uint8
from harness.ranks import precision
from metrics.distances import Statistics, compact, frechet, jackknife
from metrics.features import Extractor, Images, features_in_batches, short, too_few
from metrics.paired import CROPS, SIDE, crops, psnr, roughness, ssim
from metrics.sides import NAMES, Side, name_of

# Parts of the jackknife; a pair is left out as one.
GROUPS = 10
# The distance to images that are not those enlarged, which a card of samples has, too.
UNPAIRED = "unpaired"
# Images measured at once.
AT_ONCE = 64


class Others(NamedTuple):
    """Images that are not those enlarged, and their features."""

    images: Images
    side: Side


def paired_card(
    cfg: Any,
    loaded: list[Loaded],
    truth: Images,
    extractor: Extractor,
    device: torch.device,
    others: Others | None = None,
) -> dict[str, Any]:
    """The parts of a card that differ between cards.

    cfg: eval_fid.py's Config; truth: images that the networks have not seen, at full size; others:
    those that they have seen, if there are any. Raises UserError where their sides cannot be
    divided by what the networks enlarge.
    """
    truth = truth.take(cfg.n, cfg.seed)
    if len(truth) < 2:
        raise too_few(f"what is held out of {truth.spec}", len(truth))
    small = small_size(loaded, truth.size)
    before = Before(small, None, [], False, cfg)
    enlarger = enlarger_of(cfg, loaded, before, device)
    own, alone = Tally(extractor, device), Tally(extractor, device)
    for lo in range(0, len(truth), cfg.batch):
        images = truth.batch(truth.index[lo : lo + cfg.batch])
        pixels = to_float(images).to(device)
        seeds = [cfg.seed + i for i in range(lo, lo + len(images))]
        found, large = enlarger.enlarge(resize(pixels, small), seeds)
        with torch.no_grad():
            latents = enlarger.stages[-1].encode(pixels)
            through = to_uint8(enlarger.stages[-1].decode(latents))
        own.add(found, images, large.latents, latents)
        alone.add(through, images, latents, latents)
    reference = others.side.best() if others else None
    numbers, lowest = own.numbers(reference), alone.numbers(reference)
    kind = name_of(extractor)
    distance = NAMES.get(kind, (f"FD-{kind}",))[0]
    names = {"FD": distance, UNPAIRED: f"{UNPAIRED} {distance}"}
    return {
        "metrics": {
            names.get(name, name) + short(len(truth)): {**numbers[name], "floor": floor["value"]}
            for name, floor in lowest.items()
        },
        "measured": measured_of(truth, small, extractor, others),
        "sampled": sampled_of(cfg, enlarger, device),
        "subject": subject_of(loaded[-1]),
    }


def measured_of(
    truth: Images, small: tuple[int, int], extractor: Extractor, others: Others | None
) -> dict[str, Any]:
    """What was compared with what."""
    about = {
        **extractor.id,
        "task": "held-out images shrunk and enlarged, against themselves",
        "n": len(truth),
        **reference_of(truth),
        "filter": truth.filter,
        "size": list(truth.size),
        "small": list(small[::-1]),
        "crops": [CROPS, SIDE],
    }
    unpaired = reference_of(others.images) if others else {}
    return about | {f"{UNPAIRED} {name}": value for name, value in unpaired.items()}


def reference_of(images: Images) -> dict[str, Any]:
    return {
        "reference": images.spec,
        "reference hash": images.hash,
        "reference images": len(images),
    }


def small_size(loaded: list[Loaded], size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the small pictures; size: (width, height) of the large."""
    factor = math.prod(each.objective.lowres for each in loaded)
    width, height = size
    if width % factor or height % factor:
        raise UserError(
            f"--boost enlarges {factor} times",
            got=f"pictures of {width}x{height}",
            wanted=f"sides that are multiples of {factor}",
            do="Take another --resolution.",
        )
    return height // factor, width // factor


def sampled_of(cfg: Any, enlarger: Enlarger, device: torch.device) -> dict[str, Any]:
    """How the pictures were enlarged; nfe: calls of all networks, an image."""
    calls = [torch.cat([cost.nfe_each for cost in costs]) for costs in zip(*enlarger.costs)]
    how = {"dtype": precision(device, cfg.dtype), "device": device.type}
    nfe = float(sum(calls).double().mean())
    return {**enlarger.sampled(), **how, "seeds": [cfg.seed], "nfe": nfe}


def subject_of(loaded: Loaded) -> dict[str, Any]:
    """Whose the pictures are."""
    meta = {name: loaded.meta.get(name) for name in ("fingerprint", "run", "images", "ema")}
    return {"checkpoint": str(loaded.path), **meta, "vae": loaded.vae.fingerprint}


class Tally:
    """What is measured of pairs of pictures, gathered batch by batch."""

    def __init__(self, extractor: Extractor, device: torch.device):
        self.extractor, self.device = extractor, device
        self.each: dict[str, list[Tensor]] = {"PSNR": [], "SSIM": [], "latent MSE": []}
        self.sets: dict[str, list[tuple[Tensor, Tensor]]] = {"FD": [], "patch FD": []}
        self.rough: list[tuple[float, float]] = []  # of each image
        self.n = 0

    def add(self, found: Tensor, truth: Tensor, z: Tensor, z_true: Tensor) -> None:
        """found, truth: uint8 (B, 3, H, W); z, z_true: latents (B, C, h, w)."""
        found = found.cpu()
        mine, true = found.double() / 255, truth.double() / 255
        self.each["PSNR"].append(psnr(mine, true))
        self.each["SSIM"].append(ssim(mine, true))
        errors = (z.double() - z_true.double()).square().flatten(1).mean(1)
        self.each["latent MSE"].append(errors.cpu())
        features = [self.features(images) for images in (found, truth)]
        self.sets["FD"].append(tuple(features))
        for i in range(len(found)):  # the crops of an image are its own, in any batch
            pair = mine[i : i + 1], true[i : i + 1]
            both = tuple(crops(each, seed=self.n + i) for each in pair)
            self.sets["patch FD"].append(both)
            self.rough.append(tuple(map(roughness, pair)))
        self.n += len(found)

    def features(self, images: Tensor) -> Tensor:
        def load(part: range) -> Tensor:
            return images[part.start : part.stop]

        return features_in_batches(self.extractor, load, range(len(images)), self.device).double()

    def numbers(self, reference: Tensor | Statistics | None = None) -> dict[str, dict[str, float]]:
        """{name: {"value", "error"}}; unpaired: the distance of features to a reference of other
        images, as frechet() takes it."""
        out = {}
        for name, parts in self.each.items():
            values = torch.cat(parts)
            error = float(values.std()) / math.sqrt(self.n)
            out[name] = {"value": float(values.mean()), "error": error}
        for name, pairs in self.sets.items():
            found, truth = (torch.cat(rows) for rows in zip(*pairs))
            image = torch.arange(len(found)) // (len(found) // self.n)
            out[name] = with_error(
                lambda keep, found=found, truth=truth, image=image: frechet(
                    compact(truth[keep[image]]), compact(found[keep[image]])
                ),
                self.n,
            )
        if reference is not None:
            found = torch.cat([own for own, _ in self.sets["FD"]])
            out[UNPAIRED] = with_error(
                lambda keep, found=found: frechet(reference, compact(found[keep])), self.n
            )
        rough = torch.tensor(self.rough).double()
        out["sharpness"] = with_error(
            lambda keep: float(rough[keep, 0].sum() / rough[keep, 1].sum()), self.n
        )
        return out


def with_error(measure: Callable[[Tensor], float], n: int) -> dict[str, float]:
    """measure(mask of the images that count) of all n, and its jackknifed standard error."""
    out = {"value": measure(torch.ones(n, dtype=torch.bool))}
    if n >= 2 * GROUPS:
        group = torch.from_numpy(np.arange(n) % GROUPS)
        out["error"] = jackknife([measure(group != g) for g in range(GROUPS)])
    return out
