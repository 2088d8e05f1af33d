"""How much an error counts at a time t, whatever the network predicts:

    per_sample = per_sample * loss_weight(t, "eps", "min_snr", gamma=5.0)

Targets are u, eps, v, x0 and "pi/2 v", the velocity of the gvp path.
"""

import math

import torch
from torch import Tensor


def x0_share(t: Tensor, target: str) -> Tensor:
    """|x0 error|² / |target's error|² at the same point, for t (B,), float64:
    u t², v s², eps (s/a)², x0 1."""
    p, q = ends(t)
    shares = {"u": q, "v": q / (p + q), "eps": q / p, "x0": torch.ones_like(q)}
    shares["pi/2 v"] = shares["v"] / (math.pi / 2) ** 2
    return shares[target]


def ends(t: Tensor) -> tuple[Tensor, Tensor]:
    """((1-t)², t²), float64, whose ratio is the SNR.

    The floor makes 0/0 its limit at both ends.
    """
    t = t.double()
    return (1 - t).square().clamp(min=1e-30), t.square().clamp(min=1e-30)


def loss_weight(t: Tensor, target: str, kind: str, gamma: float = 5.0) -> Tensor:
    """The weight of a target's squared error at t (B,), in t's dtype. Each is defined once, on the
    error of x0; the same error of x0 then counts alike whatever the network predicts.

    uniform        1 on the target's own error: it alone means another thing for every target
    min_snr        min(SNR, gamma)                    Hang et al. 2023, gamma 5
    soft_min_snr   SNR gamma / (SNR + gamma)          Crowson et al. 2024, gamma 4
    debiased       SNR / sqrt(min(SNR, 1000))         Yu et al. 2023: 1 / sqrt(SNR) on eps; the cap
                                                      is kohya-ss's
    cosmap         2 / (pi ((1-t)² + t²)) on u        SD3, Esser et al. 2024
    """
    p, q = ends(t)
    if kind == "uniform":
        return torch.ones_like(t)
    if kind == "min_snr":
        on_u = torch.minimum(p, gamma * q)  # the weight on x0, times t²: finite everywhere
    elif kind == "soft_min_snr":
        on_u = gamma * p * q / (p + gamma * q)
    elif kind == "debiased":
        on_u = torch.maximum((p * q).sqrt(), p / math.sqrt(1000))
    elif kind == "cosmap":
        on_u = 2 / (math.pi * (p + q))
    else:
        kinds = "uniform, min_snr, soft_min_snr, debiased, cosmap"
        raise ValueError(f"weight {kind!r} is not one of {kinds}.")
    return (on_u / q * x0_share(t, target)).to(t.dtype)
