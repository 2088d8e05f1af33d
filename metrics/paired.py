"""How near pictures are to those that they should be, image by image, and how sharp they are:

    psnr(found, truth), ssim(found, truth)      # (B,) each, of pictures (B, 3, H, W) in [0, 1]
    sharpness(found, truth)                     # 1 is right, less is blurred, more is grain
    patch_distance(found, truth)                # Fréchet distance of small crops

A network that averages all that could be there wins PSNR and SSIM and loses the other two: none of
them is to be read alone (Blau & Michaeli 2018).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.pictures import decibels
from metrics.distances import frechet_from_features

# Wang et al. 2004: a Gaussian window of standard deviation 1.5, 11 wide; constants (0.01, 0.03)².
SIGMA, RADIUS = 1.5, 5
C1, C2 = 0.01**2, 0.03**2
# Crops of an image, and their side in pixels.
CROPS, SIDE = 4, 8


def psnr(found: Tensor, truth: Tensor) -> Tensor:
    """(B,) decibels of pictures (B, C, H, W) in [0, 1]; infinite where they are equal."""
    error = (found.double() - truth.double()).square().flatten(1).mean(1)
    return decibels(error, peak=1.0)


def ssim(found: Tensor, truth: Tensor) -> Tensor:
    """(B,) the structural similarity of pictures (B, C, H, W) in [0, 1], a mean over channels and
    the places whose window lies inside (Wang et al. 2004, eq. 13)."""
    x, y = found.double(), truth.double()
    mean_x, mean_y = windowed(x), windowed(y)
    var_x = windowed(x * x) - mean_x.square()
    var_y = windowed(y * y) - mean_y.square()
    cov = windowed(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
    structure = (2 * cov + C2) / (var_x + var_y + C2)
    return (light * structure).flatten(1).mean(1)


def windowed(x: Tensor) -> Tensor:
    """The Gaussian mean around each place whose window lies inside, (B, C, H - 10, W - 10)."""
    places = torch.arange(-RADIUS, RADIUS + 1, dtype=x.dtype, device=x.device)
    window = torch.exp(-places.square() / (2 * SIGMA**2))
    window = window / window.sum()
    flat = x.flatten(0, 1)[:, None]
    flat = F.conv2d(F.conv2d(flat, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
    return flat[:, 0].unflatten(0, x.shape[:2])


def sharpness(found: Tensor, truth: Tensor) -> float:
    """Squared differences of neighbouring pixels of all pictures (B, C, H, W), as a share of those
    of the truth."""
    return roughness(found) / roughness(truth)


def roughness(x: Tensor) -> float:
    """Mean squared difference of neighbouring pixels."""
    x = x.double()
    return float(x.diff(dim=-1).square().mean() + x.diff(dim=-2).square().mean())


def patch_distance(found: Tensor, truth: Tensor, seed: int = 0) -> float:
    """The Fréchet distance between crops of pictures (B, C, H, W) and those of the truth at the
    same places, which are the same at every call; of crops less their mean, averaged to half their
    side."""
    return frechet_from_features(crops(found, seed), crops(truth, seed))


def crops(x: Tensor, seed: int = 0) -> Tensor:
    """float64 (CROPS · B, C · SIDE²/4 ) at places that a seed says."""
    B, _, H, W = x.shape
    if min(H, W) < SIDE:
        raise ValueError(f"pictures are {H}×{W}: wanted at least {SIDE}×{SIDE} for crops.")
    r, parts = np.random.default_rng(seed), []
    for i in range(B):
        for _ in range(CROPS):
            top, left = r.integers(H - SIDE + 1), r.integers(W - SIDE + 1)
            parts.append(x[i, :, top : top + SIDE, left : left + SIDE])
    small = F.avg_pool2d(torch.stack(parts).double(), 2)
    return (small - small.mean((2, 3), keepdim=True)).flatten(1)
