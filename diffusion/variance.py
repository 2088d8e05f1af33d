"""How large the steps of a diffusion are, and what learning it costs:

    bits = variational_bound(x0_error, sigma, k, "linear")
    small, large, gain = posterior("linear")                    # of every step from row k to k - 1

A network that learns the variance says where it lies between its two bounds (Nichol & Dhariwal
2021).
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from diffusion.schedules import T, alphas_bar


def variational_bound(
    x0_error: Tensor, sigma: Tensor, k: Tensor, table: str, zero_snr: bool = False
) -> Tensor:
    """The variational bound's term in bits per dimension, (B,) float64.

    x0_error: the squared error of x0 (B, C, H, W), detached, so that the mean is not trained by it;
    sigma: the variance output (B, C, H, W) in [-1, 1]; k: (fractional) rows (B,).

    The step from row k to k - 1 has a variance between its posterior's and beta_k; sigma
    interpolates their logarithms. The term is KL(q(x_k-1 | x_k, x0) || p), and at row 0 the
    Gaussian -log p(x0 | x_0): guided-diffusion counts 8-bit pixels there, which latents are not.
    """
    low = k.floor().clamp(max=T - 2).long()
    rows = [
        torch.lerp(row[low], row[low + 1], k - low).view(-1, 1, 1, 1)
        for row in posterior(table, zero_snr, k.device)
    ]
    small, large, gain = rows
    log_var = small + (sigma.double() + 1) / 2 * (large - small)
    precision = (-log_var).exp()
    surplus = log_var - small - 1 + (small - log_var).exp()
    kl = 0.5 * (surplus + gain.square() * x0_error * precision)
    nll = 0.5 * (math.log(2 * math.pi) + log_var + x0_error * precision)
    bits = torch.where(k.view(-1, 1, 1, 1) < 0.5, nll, kl) / math.log(2)
    return bits.flatten(1).mean(1)


@lru_cache
def posterior(
    table: str, zero_snr: bool = False, device: torch.device = torch.device("cpu")
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the steps from row k to k - 1, (1000,) float64 each: the log of the posterior's variance
    (row 0, where it is 0, has row 1's), log beta_k, and how much of an error of x0 reaches the
    posterior's mean (Ho et al. 2020, eq. 7)."""
    ab = alphas_bar(table, zero_snr).to(device)
    before = torch.cat([ab.new_ones(1), ab[:-1]])
    beta = 1 - ab / before
    small = beta * (1 - before) / (1 - ab)
    small[0] = small[1]
    return small.log(), beta.log(), before.sqrt() * beta / (1 - ab)
