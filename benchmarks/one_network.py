"""How the error of a network's weights adds up over a sampler's steps, and how it does not:

    python benchmarks/one_network.py

Data N(m, s²), whose velocity is a line: u = w1 · phi(x, t) + w0. Two weights are uncertain. The
spread of a sample is found five ways, by the number of Euler steps:

    one network     Monte Carlo: weights are drawn once, and kept for the whole trajectory
    tangent         diffusion/laplace.py, along both weights: exact to first order
    integrated      diffusion/laplace.py: what an error does to later steps is left out
    anew            Monte Carlo: weights are drawn again at each step
    sum of steps    the recursion of variances that is published (Kou et al. 2024), in closed form
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import harness.interrupt  # noqa: F401

from diffusion.laplace import Posterior, integrated, tangent
from diffusion.sampling import sample
from harness import record

MEAN, DEVIATION, START = 0.7, 0.3, 1.2
SD = torch.tensor([0.02, 0.05], dtype=torch.float64)  # of w1 and w0
STEPS = (10, 50, 400)
DRAWS = 20_000


class Line(nn.Module):
    """predict() of data N(MEAN, DEVIATION²): u = w1 · phi(x, t) + w0, with w = (1, -MEAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(1, 1, 1).double()
        nn.init.ones_(self.last.weight)
        nn.init.constant_(self.last.bias, -MEAN)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w = t.view(-1, 1, 1, 1)
        u = self.last(slope(w) * (x - (1 - w) * MEAN))
        return x - w * u, x + (1 - w) * u, u


class BothWeights(Posterior):
    """In place of draws, a standard deviation along each weight: squares add up exactly."""

    def draws(self, n: int, out: int, seed: int = 0) -> Tensor:
        return SD.diag()[:, None]


def slope(t: Tensor | float) -> Any:
    """d phi / dx: of the exact velocity of a normal distribution."""
    variance = DEVIATION**2
    return (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2)


def drawn(steps: int, anew: bool, n: int = DRAWS) -> float:
    """The standard deviation of n samples, by Monte Carlo."""
    g = torch.Generator().manual_seed(0)
    x = torch.full((n,), START, dtype=torch.float64)
    z = torch.randn(2, n, generator=g, dtype=torch.float64)
    for k in range(steps, 0, -1):
        if anew:
            z = torch.randn(2, n, generator=g, dtype=torch.float64)
        t = k / steps
        phi = slope(t) * (x - (1 - t) * MEAN)
        x = x - ((1 + SD[0] * z[0]) * phi - MEAN + SD[1] * z[1]) / steps
    return float(x.std())


def summed(steps: int) -> float:
    """Var' = Var - 2h Cov(x, u) + h² Var(u) from step to step. Of a line both are known."""
    mean, variance, h = START, 0.0, 1 / steps
    for k in range(steps, 0, -1):
        t = k / steps
        a = slope(t)
        phi = a * (mean - (1 - t) * MEAN)
        squares = phi**2 + a**2 * variance
        of_u = a**2 * variance + float(SD[0]) ** 2 * squares + float(SD[1]) ** 2
        mean = mean - h * (phi - MEAN)
        variance = variance - 2 * h * a * variance + h**2 * of_u
    return math.sqrt(variance)


def first_order(steps: int) -> tuple[float, float]:
    """The standard deviations that `tangent` and `integrated` give."""
    net, x = Line(), torch.full((1, 1, 1, 1), START, dtype=torch.float64)
    posterior = BothWeights((1 / SD).diag(), 1.0, torch.ones(1), 1, (1, 1), (0, 0))

    def walk() -> Tensor:
        return sample(net, x, method="euler", steps=steps).x

    along = tangent(walk, net.last, posterior, 2)
    _, variance = integrated(net, net.last, posterior, x, method="euler", steps=steps)
    return float(along.square().sum().sqrt()), float(variance.sqrt())


def row(steps: int, n: int = DRAWS) -> dict[str, float]:
    """The spread of a sample, five ways."""
    along, cheap = first_order(steps)
    return {
        "one network": drawn(steps, anew=False, n=n),
        "tangent": along,
        "integrated": cheap,
        "anew": drawn(steps, anew=True, n=n),
        "sum of steps": summed(steps),
    }


def main() -> None:
    rows = {str(steps): row(steps) for steps in STEPS}
    for steps, found in rows.items():
        print(steps, "  ".join(f"{key} {value:.4f}" for key, value in found.items()))
    record.write("one_network", {"draws": DRAWS, "seed": 0, "results": rows})


if __name__ == "__main__":
    main()
