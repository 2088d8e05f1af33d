"""samplers.py --uncertainty: how sure a network is of each place of what it draws.

    estimator = open_estimator(cfg, gen)        # of samplers.py's Config and Generator; None: off
    drawn = gen.images(seeds)                   # bit for bit as without it
    print(estimator.save(images, folder, 0))    # FOLDER-uncertainty.png, FOLDER-uncertainty.json

The posterior is the exact one of the network's last layer (diffusion/laplace.py). It is fitted to
training pairs, pictures and noise, of the data that the network was trained on.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ckpt.hub import data_from_file
from ckpt.posteriors import load_posterior, save_posterior
from data import heldout
from data.dataset import Dataset, classes_of, latents_of, low_latents_of, open_dataset, rng
from diffusion.guidance import EVERYWHERE
from diffusion.laplace import (
    SUMMED,
    Curvature,
    Layer,
    Posterior,
    check_layer,
    gain_of,
    integrated,
    score,
    shared,
    tangent,
    watching,
    window,
)
from diffusion.sampling import Predict, Sample, sample
from harness.cli import UserError, flag
from harness.files import make_dir, strict_json, write_text
from harness.pictures import beside, save_grid
from harness.ranks import Ranks
from harness.run import Recorded
from harness.typed import check
from mmdit import MMDiT

BATCH = 64  # pairs at a time


@dataclass(frozen=True)
class Uncertain:
    """The flags. None of them changes an image."""

    uncertainty: int | Literal["integrated"] = flag(
        0,
        "K: the spread of K networks, which draw all K times more | integrated: an estimate that "
        "costs no evaluations",
        low=0,
        high=1e4,
        head="how sure the network is of each place",
    )
    tangent: bool = flag(
        False,
        "the spread to first order, along K directions",
        of=("--uncertainty", "not --uncertainty integrated"),
    )
    posterior: str = flag(
        "",
        "FILE of what K are drawn from: read if it is there, else fitted and written",
        of="--uncertainty",
        writes=".safetensors",
    )
    posterior_data: str = flag(
        "", "what it is fitted to; default the network's own data", of="--uncertainty"
    )
    posterior_pairs: int = flag(
        2048, "pictures and noise that it is fitted to", low=1, high=1e9, of="--uncertainty"
    )


# ---- while images are drawn ----------------------------------------------------------------------


class Estimator:
    """In the place of sample(): draws the same, and keeps the variance of each place."""

    def __init__(self, cfg: Any, gen: Any, layer: Layer, posterior: Posterior):
        self.cfg, self.gen, self.layer, self.posterior = cfg, gen, layer, posterior
        self.mode = "integrated"
        if cfg.uncertainty != "integrated":
            self.mode = "tangent" if cfg.tangent else "shared"
        self.found: list[Tensor] = []  # (B, h, w) variances, the mean over channels
        self.more = 0  # evaluations of networks beyond those of the images

    def walk(self, predict: Predict, x: Tensor, **how: Any) -> Sample:
        """sample()'s own result."""
        if self.mode == "integrated":
            s, variance = self.along(predict, x, **how)
            self.found.append(variance.cpu())
            return s
        s, before = sample(predict, x, **how), self.gen.evaluations
        how.pop("callback", None)

        def again() -> Tensor:
            return sample(predict, x, **how).x

        spread = tangent if self.mode == "tangent" else shared
        each = spread(again, self.layer, self.posterior, self.cfg.uncertainty)
        variance = each.square().mean(0) if self.mode == "tangent" else each.var(0)
        self.found.append(variance.mean(1).cpu())
        self.more += self.gen.evaluations - before
        self.gen.evaluations = before
        return s

    def along(self, predict: Predict, x: Tensor, **how: Any) -> tuple[Sample, Tensor]:
        """The sample, and its variance (B, h, w) by features that are summed up beside it."""
        how.pop("seeds", None)  # of noise on the way, which these methods do not add
        guidance = {"cfg": self.cfg.cfg, "interval": self.cfg.cfg_interval or EVERYWHERE}
        gain = gain_of(self.gen.objective.what)
        return integrated(predict, self.layer, self.posterior, x, gain, **guidance, **how)

    def save(self, images: Tensor, folder: Path, seed: int, grid: bool = True) -> str:
        """Write what was found of images (n, 3, H, W), uint8, with seeds from `seed` on: the maps
        over the pictures, and the scores. What was found, in a line."""
        variances = torch.cat(self.found)
        deviations, path = variances.sqrt(), beside(folder, "-uncertainty.json")
        if grid:
            save_grid(mapped(images, deviations), beside(folder, "-uncertainty.png"))
        solver = self.gen.solver
        about = {
            "network": self.gen.meta["fingerprint"],
            "mode": self.mode,
            "networks": None if self.mode == "integrated" else self.cfg.uncertainty,
            "method": solver["method"],
            "steps": solver.get("steps"),
            "prior": self.posterior.prior,
            "places": self.posterior.rows,
            "map": {"none": float(deviations.min()), "red": float(deviations.max())},
        }
        scores = [
            {"seed": i, "score": one, "deviation": deviation}
            for i, (one, deviation) in enumerate(
                zip(score(variances).tolist(), deviations.mean((1, 2)).tolist()), seed
            )
        ]
        make_dir(path.parent)
        write_text(path, strict_json({**about, "images": scores}, indent=1) + "\n")
        more = f"{self.more / len(images):g} network evaluations an image beside its own"
        return f"uncertainty: {self.mode}, {more}  {path}"


def mapped(images: Tensor, deviations: Tensor) -> Tensor:
    """uint8 (2n, 3, H, W): each picture of (n, 3, H, W), and behind it itself in grey, with the
    standard deviation (n, h, w) over it: red is the largest of all, none the smallest."""
    heat = deviations - deviations.min()
    heat = heat / heat.max().clamp(min=torch.finfo(heat.dtype).tiny)  # all alike: no red
    heat = F.interpolate(heat[:, None], images.shape[-2:], mode="bilinear")
    grey = images.float().mean(1, keepdim=True) / 2 + 64
    red = torch.tensor([255.0, 32.0, 0.0]).view(3, 1, 1)
    over = (grey + heat * (red - grey)).round().to(torch.uint8)
    return torch.stack([images, over], 1).flatten(0, 1)


# ---- opening ------------------------------------------------------------------------------------


def open_estimator(cfg: Any, gen: Any) -> Estimator | None:
    """Have a Generator say how sure it is. UserError where that is not known."""
    if not cfg.uncertainty:
        return None
    layer = last_layer(cfg, gen)
    check_flags(cfg, gen)
    path = Path(cfg.posterior)
    if cfg.posterior and path.exists():
        posterior = load_posterior(path, gen.meta["fingerprint"])
        kind = len(posterior.root), posterior.kernel, posterior.padding
        if kind != (layer.weight[0].numel() + 1, *window(layer)):
            raise UserError(f"{path} is of a layer of another form", do="Fit it anew.")
        print(f"uncertainty: takes the posterior of {path}", flush=True)
    else:
        posterior = fitted(cfg, gen, layer)
        if cfg.posterior:
            make_dir(path.parent)
            save_posterior(path, posterior, gen.meta["fingerprint"])
    estimator = Estimator(cfg, gen, layer, posterior)
    gen.walk = estimator.walk
    return estimator


def last_layer(cfg: Any, gen: Any) -> Layer:
    """The convolution that a U-Net ends with, or what makes pixels of a transformer's tokens."""
    if isinstance(gen.net, MMDiT):
        layer = gen.net.final_layer["linear"]
    else:
        out = getattr(gen.net, "out", None)
        layer = out[2] if isinstance(out, nn.Sequential) and len(out) > 2 else None
    try:
        check_layer(layer)
    except ValueError as error:
        raise UserError(
            f"--uncertainty: {cfg.ckpt} does not end as a U-Net or a SiT does: {error}",
            do="Name one of these, or leave it out.",
        ) from None
    return layer


def check_flags(cfg: Any, gen: Any) -> None:
    """Refuse what makes an image of more than noise and one network, as its file has it."""
    wrong, lowres = "", gen.objective.coupling == "lowres"
    if cfg.lora:
        wrong = "--lora changes the network, and the posterior is of the one in its file"
    elif cfg.init and not lowres:
        wrong = "--init: what is known is how sure a network is of all that it draws"
    elif gen.objective.learn_sigma:
        wrong = f"{cfg.ckpt} also says a variance, which is trained by another loss"
    if wrong:
        raise UserError(f"--uncertainty with {wrong}", do="Leave one of them out.")
    if cfg.uncertainty == 1 and not cfg.tangent:
        raise UserError(
            "--uncertainty 1", wanted="2 networks at least, to have a spread", do="Try 8."
        )
    if cfg.uncertainty != "integrated":
        return
    method, eta = gen.solver["method"], gen.solver.get("eta")
    if method not in SUMMED or eta:
        wrong = f"--method {method}{' --eta' if cfg.eta else ''}: wanted one of {', '.join(SUMMED)}"
    elif cfg.cfg_rescale:
        wrong = "--cfg-rescale, which is not linear in what the network says"
    elif cfg.guide_ckpt:
        wrong = "--guide-ckpt, which is another network"
    if wrong:
        raise UserError(
            f"--uncertainty integrated with {wrong}",
            do="Leave one of them out, or give a number of networks, such as 8.",
        )


# ---- the posterior ------------------------------------------------------------------------------


def fitted(cfg: Any, gen: Any, layer: Layer) -> Posterior:
    """The posterior of --posterior-data, or of the network's own data."""
    if gen.told is not None:
        raise UserError(
            f"--uncertainty: {cfg.ckpt} reads text, and no posterior can be fitted to that here",
            do="Leave it out.",
        )
    own = check(gen.meta.get("config", {}), Recorded, f"{gen.path}: its config")
    spec = cfg.posterior_data or data_from_file(own.get("data", ""), "--posterior-data")
    if not spec:
        raise UserError(
            f"{gen.path} does not say what it was trained on", do="Give --posterior-data DATA."
        )
    stage = {}
    if not cfg.posterior_data:
        stage = {key: own[key] for key in ("stage", "exclude_tags", "holdout") if key in own}
    ds = open_dataset(spec, resolution=gen.resolution, **stage)
    print(f"uncertainty: fits a posterior to {cfg.posterior_pairs:,} pairs of {spec}", flush=True)
    try:
        return fit(gen, layer, ds, cfg.posterior_pairs)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{gen.path}: {error}", do="Name a network that was trained.") from None


@torch.no_grad()
def fit(gen: Any, layer: Layer, ds: Dataset, pairs: int) -> Posterior:
    """Of `pairs` images of ds, each at a time of its own; how far off the network is at each time
    is asked of the held-out ones, if there are any."""
    evaluations, kind = gen.evaluations, gen.objective
    # The squared error of what the network says, however much of it training looks at.
    coupling = "none" if kind.coupling == "ot" else kind.coupling
    kind = replace(kind, weight="uniform", loss_type="mse", aligned=False, coupling=coupling)
    net = gen.counted(gen.net)

    def loss(batch: dict[str, Tensor]) -> Any:
        batch = {key: x.to(gen.device) for key, x in batch.items()}
        x0 = latents_of(gen.vae, batch)
        cond = {"y": batch["y"]} if "y" in batch else {}
        if kind.coupling == "lowres":
            cond["low"] = low_latents_of(gen.vae, batch, x0, kind.lowres, kind.upsample)
        return kind.loss(net, x0, eps=batch["eps"], t=batch["t"], **cond)

    one = Ranks(0, 1, gen.device)
    held = ds.heldout if len(ds.heldout) else ds
    noise = heldout.loss_of(loss, held, gen.classes, gen.latent_shape, 0, one)["loss_by_t"]
    labels = torch.from_numpy(classes_of(ds, gen.classes)[1]) if gen.classes else None
    curvature = Curvature(layer, torch.tensor(noise))
    with watching(layer) as seen:
        for numbers in torch.arange(pairs).split(BATCH):
            rows = numbers % len(ds)
            batch = ds.views(rows.tolist())
            batch["t"] = ((numbers * 0.6180339887) % 1).clamp(1e-3, kind.t_max)
            batch["eps"] = noise_of(numbers.tolist(), gen.latent_shape)
            if labels is not None:
                batch["y"] = labels[rows]
            loss(batch)
            curvature.add(seen[-1], batch["t"])
    gen.evaluations = evaluations
    return curvature.posterior()


def noise_of(numbers: list[int], shape: tuple[int, ...]) -> Tensor:
    """Unit noise (B, *shape) of pairs, by their numbers."""
    draws = [rng(0, "uncertainty", i).standard_normal(shape, dtype=np.float32) for i in numbers]
    return torch.from_numpy(np.stack(draws))
