"""Averages of the weights, of which one samples."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from harness.cli import UserError, flag


@dataclass(frozen=True)
class Averaging:
    """Where the averages lie, and how often they follow the weights."""

    ema_every: int = flag(
        1, "steps from one update of the EMAs to the next", low=1, high=1e6, of="--ema"
    )
    ema_device: Literal["same", "cpu"] = flag(
        "same", "where they lie; cpu = in host memory", of="--ema", beside=True
    )


class EMA:
    """Power-function averages of the weights (Karras et al. 2024, "EDM2", sec. 3).

    After n images the weight of what was seen at m is ∝ m^gamma, so the profile scales with the
    run and has no cold start. `width` = sigma_rel.

    every: steps, of which one update of that many times as many images takes the place; so what
    the average has seen is every `every`-th network. device: "cpu" = host memory.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        widths: tuple[float, ...],
        every: int = 1,
        device: str = "same",
    ):
        self.exponents, self.weights, self.every = {}, {}, every
        # Not in an optimizer's own pass over the weights.
        self.aside = every > 1 or device == "cpu"
        # The narrowest first: it is what one samples.
        for width in sorted(widths):
            key = f"{width:.3f}"
            self.exponents[key] = exponent(width)
            self.weights[key] = {name: widened(p, device) for name, p in net.named_parameters()}

    @classmethod
    def of(cls, net: torch.nn.Module, cfg: Any) -> "EMA":
        """The averages of a run. cfg: train.Optim's flags, and Averaging's if it has them."""
        own = getattr(cfg, "ema_every", 1), getattr(cfg, "ema_device", "same")
        return cls(net, cfg.ema, *own)

    def pairs(self, seen: int, batch: int) -> list[tuple[list[Tensor], float]]:
        """(an average's tensors in the order of the parameters, the weight beta of what it holds)
        for the update at `seen`."""
        step = batch * self.every
        return [
            (list(weights.values()), (1 - step / seen) ** self.exponents[key])
            for key, weights in self.weights.items()
        ]

    @torch.no_grad()
    def update(self, net: torch.nn.Module, seen: int, batch: int) -> None:
        """After the step to `seen` images: whether an update is due follows from that alone, so a
        resumed run goes on with the same ones."""
        if seen // batch % self.every:
            return
        for weights, beta in self.pairs(seen, batch):
            params = [p.detach() for p in net.parameters()]
            if not self.aside:
                torch._foreach_lerp_(weights, params, 1 - beta)
                continue
            for average, p in zip(weights, params):  # one at a time is copied to the host
                torch._foreach_lerp_([average], [p.to(average.device, average.dtype)], 1 - beta)


def widened(p: Tensor, device: str = "same") -> Tensor:
    """A copy in fp32, or wider: a step moves an average by less than bf16 can tell."""
    place = p.device if device == "same" else torch.device(device)
    return p.detach().to(place, torch.promote_types(p.dtype, torch.float32), copy=True)


def exponent(width: float) -> float:
    """sigma_rel² = (gamma + 1) / ((gamma + 2)² (gamma + 3)), solved for gamma; plus 1."""
    companion = [[-7.0, width**-2 - 16, width**-2 - 12], [1, 0, 0], [0, 1, 0]]
    roots = torch.linalg.eigvals(torch.tensor(companion, dtype=torch.float64))
    return float(roots.real.max()) + 1


def check_averages(cfg: Any) -> None:
    """Refuse averages that cannot be told apart, or that would never move."""
    check_widths(cfg.ema)
    every, steps = getattr(cfg, "ema_every", 1), -(-cfg.images // cfg.batch)
    if every > steps:
        raise UserError(
            f"--ema-every {every}: a run of --images {cfg.images:,} takes {steps:,} steps of "
            f"{cfg.batch}, so no average would ever be made",
            do="Lower it.",
        )


def check_widths(widths: tuple[float, ...]) -> None:
    """Refuse widths that are no shares of a run, or that files could not tell apart."""
    shares = all(0.01 <= width <= 0.25 for width in widths)
    if not shares or len({f"{width:.3f}" for width in widths}) < len(widths):
        raise UserError(
            f"--ema {','.join(map(str, widths))}",
            wanted="different widths from 0.01 to 0.25, shares of the run",
            do="The default is --ema 0.05,0.1; --ema '' has none.",
        )
