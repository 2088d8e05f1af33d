"""Averages of the weights, of which one samples."""

import torch
from torch import Tensor


class EMA:
    """Power-function averages of the weights (Karras et al. 2024, "EDM2", sec. 3): after n images the weight of what was
    seen at m is ∝ m^gamma, so the profile scales with the run and has no cold start. `width` = sigma_rel."""

    def __init__(self, net: torch.nn.Module, widths: tuple[float, ...]):
        self.exponents, self.weights = {}, {}
        for width in sorted(widths):                                            # the narrowest first: it is what one samples
            # sigma_rel² = (gamma + 1) / ((gamma + 2)² (gamma + 3)), solved for gamma
            roots = torch.linalg.eigvals(torch.tensor([[-7.0, width ** -2 - 16, width ** -2 - 12], [1, 0, 0], [0, 1, 0]],
                                                      dtype=torch.float64))
            self.exponents[f"{width:.3f}"] = float(roots.real.max()) + 1
            self.weights[f"{width:.3f}"] = {k: v.detach().clone() for k, v in net.named_parameters()}

    def pairs(self, seen: int, batch: int) -> list[tuple[list[Tensor], float]]:
        """(an average's tensors in the order of the parameters, the weight beta of what it holds) for the step to `seen`."""
        return [(list(weights.values()), (1 - batch / seen) ** self.exponents[key]) for key, weights in self.weights.items()]

    @torch.no_grad()
    def update(self, net: torch.nn.Module, seen: int, batch: int) -> None:
        for weights, beta in self.pairs(seen, batch):
            torch._foreach_lerp_(weights, [p.detach() for p in net.parameters()], 1 - beta)
