"""Averages of the weights, of which one samples."""

import torch
from torch import Tensor

from harness.cli import UserError


class EMA:
    """Power-function averages of the weights (Karras et al. 2024, "EDM2", sec. 3).

    After n images the weight of what was seen at m is ∝ m^gamma, so the profile scales with the
    run and has no cold start. `width` = sigma_rel.
    """

    def __init__(self, net: torch.nn.Module, widths: tuple[float, ...]):
        self.exponents, self.weights = {}, {}
        # The narrowest first: it is what one samples.
        for width in sorted(widths):
            key = f"{width:.3f}"
            self.exponents[key] = exponent(width)
            self.weights[key] = {name: widened(p) for name, p in net.named_parameters()}

    def pairs(self, seen: int, batch: int) -> list[tuple[list[Tensor], float]]:
        """(an average's tensors in the order of the parameters, the weight beta of what it holds)
        for the step to `seen`."""
        return [
            (list(weights.values()), (1 - batch / seen) ** self.exponents[key])
            for key, weights in self.weights.items()
        ]

    @torch.no_grad()
    def update(self, net: torch.nn.Module, seen: int, batch: int) -> None:
        for weights, beta in self.pairs(seen, batch):
            torch._foreach_lerp_(weights, [p.detach() for p in net.parameters()], 1 - beta)


def widened(p: Tensor) -> Tensor:
    """A copy in fp32, or wider: a step moves an average by less than bf16 can tell."""
    return p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)


def exponent(width: float) -> float:
    """sigma_rel² = (gamma + 1) / ((gamma + 2)² (gamma + 3)), solved for gamma; plus 1."""
    companion = [[-7.0, width**-2 - 16, width**-2 - 12], [1, 0, 0], [0, 1, 0]]
    roots = torch.linalg.eigvals(torch.tensor(companion, dtype=torch.float64))
    return float(roots.real.max()) + 1


def check_widths(widths: tuple[float, ...]) -> None:
    """Refuse widths that are no shares of a run, or that files could not tell apart."""
    shares = all(0.01 <= width <= 0.25 for width in widths)
    if not shares or len({f"{width:.3f}" for width in widths}) < len(widths):
        raise UserError(
            f"--ema {','.join(map(str, widths))}",
            wanted="different widths from 0.01 to 0.25, shares of the run",
            do="The default is --ema 0.05,0.1; --ema '' has none.",
        )
