"""predict(x, t) -> (x0, eps, u) of data whose every conditional mean is known.

On the linear path, at the state's own precision.
"""

import math

import torch

from diffusion.solvers import time_grid


def triple(x, t, x0):
    """What predict returns on the linear path for a given x0."""
    w = t.view(-1, 1, 1, 1)
    eps = (x - (1 - w) * x0) / w
    return x0, eps, eps - x0


def delta(c):
    """Data is one point."""
    return lambda x, t: triple(x, t, c.expand_as(x))


def gaussian(mu=0.7, sd=0.3):
    """Data is N(mu, sd²): the exact conditional means.

    The exact map takes noise z to data mu + sd z.
    """

    def predict(x, t):
        w = t.view(-1, 1, 1, 1)
        var = (1 - w) ** 2 * sd**2 + w**2
        x0, eps = mu + (1 - w) * sd**2 * (x - (1 - w) * mu) / var, w * (x - (1 - w) * mu) / var
        return x0, eps, eps - x0

    return predict


def mixture(means=(-1.5, 1.0), sds=(0.3, 0.5), weights=(0.3, 0.7)):
    def predict(x, t):
        w, parts = t.view(-1, 1, 1, 1), []
        for m, s, p in zip(means, sds, weights):
            var = (1 - w) ** 2 * s**2 + w**2
            mean = (1 - w) * m
            log_p = math.log(p) - 0.5 * (x - mean) ** 2 / var - 0.5 * var.log()
            parts.append((log_p, m + (1 - w) * s**2 * (x - mean) / var))
        r = torch.softmax(torch.stack([a for a, _ in parts]), 0)
        return triple(x, t, (r * torch.stack([b for _, b in parts])).sum(0))

    return predict


def noise(n=64, dtype=torch.float64, seed=0):
    return torch.randn(n, 1, 2, 2, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def exact(x, t):
    """A velocity of + - · and / alone.

    exp() and its like differ by an ulp between SIMD widths, so with the batch.
    """
    w = t.view(-1, 1, 1, 1)
    u = 2 * x / (1 + x * x) - 3 / (1 + 60 * (w - 0.5 - 0.1 * x) * (w - 0.5 - 0.1 * x))
    return x - w * u, x + (1 - w) * u, u


def rows_grid(objective, steps, spacing="trailing"):
    """Times of `steps` rows of an objective's own VP table, then 0."""
    table = objective.table
    return time_grid(steps, 1.0, objective.t_max, spacing, table, objective.zero_snr)
