"""The linear autoencoder that needs no download, and pixels. vae.py gives it the company of the convolutional ones.

    vae = fit_pca(images)                    # "pca": f8, 32 channels, fitted in seconds
    z = vae.encode(x)                        # x (B, 3, H, W) in [-1, 1]  ->  (B, 32, H/8, W/8), about unit variance
    x = vae.decode(z)

`pixel` is the same class with the identity as its basis: pixels as latents.
"""

import base64
import math
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ckpt.unets import fingerprint
from harness.cli import UserError


def text(tensor: Tensor) -> str:
    return base64.b64encode(tensor.cpu().numpy().tobytes()).decode()


class LinearVAE(nn.Module):
    """Each factor × factor patch, minus the mean patch, in an orthonormal basis, each channel divided by its `std`.

    basis (channels, 3·factor²) has orthonormal rows, so encode(decode(z)) = z always, and decode(encode(x)) = x when the
    basis is square. Patch entries are in pixel_unshuffle order: channel, then row, then column.
    """

    def __init__(self, name: str, factor: int, basis: Tensor, mean: Tensor, std: Tensor):
        super().__init__()
        self.name, self.factor, self.channels = name, factor, len(basis)
        for key, value in (("basis", basis), ("mean", mean), ("std", std)):
            self.register_buffer(key, value.float())

    @property
    def mark(self) -> str:
        """Equal marks, equal latents."""
        return fingerprint(self.state_dict())

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of a square image's latents."""
        if resolution % self.factor:
            raise UserError(f"resolution {resolution} is not divisible by the autoencoder's factor {self.factor}.")
        return self.channels, resolution // self.factor, resolution // self.factor

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> latents (B, C, H/f, W/f)."""
        patches = F.pixel_unshuffle(images.float(), self.factor).movedim(1, -1)             # (B, h, w, 3f²)
        return ((patches - self.mean) @ self.basis.T / self.std).movedim(-1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, h, w) -> images (B, 3, f·h, f·w), about [-1, 1], not clamped."""
        patches = latents.float().movedim(1, -1) * self.std @ self.basis + self.mean
        return F.pixel_shuffle(patches.movedim(-1, 1), self.factor)

    def meta(self) -> dict[str, Any]:
        """What a checkpoint needs to rebuild this autoencoder: its constants are small enough to travel along."""
        return {"name": self.name, "factor": self.factor, "channels": self.channels, **{k: text(v) for k, v in self.state_dict().items()}}


def linear_from_meta(meta: dict[str, Any]) -> LinearVAE:
    """The inverse of LinearVAE.meta()."""
    arrays = {k: torch.from_numpy(np.frombuffer(base64.b64decode(meta[k]), np.float32).copy()) for k in ("basis", "mean", "std")}
    return LinearVAE(meta["name"], meta["factor"], arrays["basis"].view(meta["channels"], -1), arrays["mean"], arrays["std"])


def pixel(factor: int = 1) -> LinearVAE:
    """Pixels as latents, factor × factor of them stacked per position."""
    n = 3 * factor * factor
    return LinearVAE("pixel" if factor == 1 else f"pixel:{factor}", factor, torch.eye(n), torch.zeros(n), torch.ones(n))


def enough(resolution: int) -> int:
    """How many images pca is fitted to: 131,072 patches at least tell 192 dimensions apart, and more would cost gigabytes."""
    return max(2048 * 64 ** 2 // resolution ** 2, 64)


def fit_pca(images: Tensor, channels: int = 32, factor: int = 8) -> LinearVAE:
    """Principal components of the patches of images (N, 3, H, W) in [-1, 1]. Deterministic, signs included.

    Latents have unit variance over all channels; between channels the spread is halved (in log), not removed: the mean
    colour of a patch weighs more in a loss than its faintest texture, without drowning it.
    """
    patches = F.pixel_unshuffle(images.double(), factor).movedim(1, -1).reshape(-1, 3 * factor * factor)
    mean = patches.mean(0)
    centred = patches - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    basis = vectors.flip(1)[:, :channels].T                                     # rows: largest variance first
    basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()  # eigenvectors have no sign of their own
    variance = values.flip(0)[:channels].clamp(min=1e-8)                        # a constant data set has none
    std = variance ** 0.25
    std = std * (variance / std ** 2).mean().sqrt()
    return LinearVAE("pca", factor, basis, mean, std)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two image batches in [-1, 1] (peak to peak 2), over all pixels."""
    mse = float((a.double().clamp(-1, 1) - b.double().clamp(-1, 1)).square().mean())
    return 10 * math.log10(4 / max(mse, 1e-12))
