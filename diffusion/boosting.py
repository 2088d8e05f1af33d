"""Boosting: small pictures made large by networks of coupling flow matching, one after the other.

    stage = Stage(cfm.source, guided(cfm, net), vae.encode, vae.decode, factor=2)
    boost([stage], small, seeds).pixels                     # (B, 3, h, w) -> (B, 3, 2h, 2w)

Fischer et al. 2023, "Boosting latent diffusion with flow matching". Between two stages pictures
stay fp32 pixels: no rounding to 8 bits.
"""

import time
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffusion.coupling import enlarged
from diffusion.sampling import DETERMINISTIC, Predict, draw, sample


class Stage(NamedTuple):
    """One network that enlarges, with its autoencoder."""

    source: Callable[[Tensor, Tensor], Tensor]  # (low, unit noise) -> where the path starts
    predict: Predict
    encode: Callable[[Tensor], Tensor]  # pixels in [-1, 1] -> latents
    decode: Callable[[Tensor], Tensor]
    factor: int
    upsample: str = "psu"  # as diffusion.coupling.upsampled knows it
    # What the network is told of labels (B,), -1 = none; None: nothing.
    told: Callable[[Tensor], dict[str, Tensor]] | None = None
    t_start: float = 1.0  # the time of source()'s point: where a table ends


class Cost(NamedTuple):
    """What one stage cost, for all images together."""

    nfe_each: Tensor  # (B,) calls of predict that each image took part in
    enlarge: float  # seconds: resize and encode
    network: float
    decode: float


class Boosted(NamedTuple):
    pixels: Tensor  # (B, 3, H, W) in [-1, 1]
    costs: list[Cost]  # of each stage
    lost: Tensor  # (B,) the time at which an image ceased to be finite in any stage; NaN = never
    latents: Tensor  # of the last stage


def boost_generators(seeds: Sequence[int], stage: int) -> list[np.random.Generator]:
    """One generator a sample for the noise of stage 0, 1, …: streams apart from the base's, which
    has the seed itself, and the same in any batch."""
    keys = [np.random.SeedSequence(seed, spawn_key=(stage,)) for seed in seeds]
    return [np.random.default_rng(key) for key in keys]


@torch.no_grad()
def boost(
    stages: Sequence[Stage],
    small: Tensor,
    seeds: Sequence[int],
    labels: Tensor | None = None,
    *,
    method: str = "dopri5",
    **how: Any,
) -> Boosted:
    """Pixels small (B, 3, h, w) in [-1, 1], fp32, through all stages.

    labels (B,), numbers of classes or of texts, go to the stages that know them. method and how:
    sample()'s, an ODE's only (eta 0): a step that adds noise takes the path to begin in unit noise,
    and this one begins in a picture. Raises ValueError for others.
    """
    if method not in (*DETERMINISTIC, "dpmpp_2m", "dopri5") or how.get("eta"):
        raise ValueError(f"boosting wants an ODE solver with eta 0, not {method}.")
    pixels, costs = small.float(), []
    latents = pixels  # where there is no stage
    lost = torch.full((len(small),), torch.nan).double()
    for number, stage in enumerate(stages):
        began = clock(pixels)
        size = pixels.shape[-2] * stage.factor, pixels.shape[-1] * stage.factor
        low = enlarged(pixels, size, stage.encode, stage.upsample)
        noise = draw(boost_generators(seeds, number), low)
        cond = {"concat": low}
        if stage.told:
            none = torch.full((len(low),), -1, device=low.device)
            cond |= stage.told(none if labels is None else labels)
        encoded = clock(low)
        start = stage.source(low, noise)
        s = sample(
            stage.predict, start, method=method, t_start=stage.t_start, cond=cond, **how
        )
        sampled = clock(s.x)
        latents, pixels = s.x, stage.decode(s.x).float()
        seconds = encoded - began, sampled - encoded, clock(pixels) - sampled
        costs.append(Cost(s.nfe_each, *seconds))
        lost = torch.where(lost.isnan(), s.lost, lost)
    return Boosted(pixels, costs, lost, latents)


def clock(x: Tensor) -> float:
    """Seconds, once what x's device was given is done."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()
