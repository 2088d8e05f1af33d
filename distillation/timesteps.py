"""Timesteps drawn where an assessor finds the teacher hard to read.

A reconstruction: of the sampler in AbstractPhil's sd15-flow-matching trainer only the settings are
public (bins, reliability threshold 0.15, profile of 2,500, shift, jitter 5, "adaptive chaos"), not
the order of its operations or its formulas. Here:

    raw_k  = 1 + gain · (1 - accuracy_k)    of bins whose accuracy reaches the threshold; the
             others have no say: the mean of those (neutral), or 0 (drop: never drawn)
    p_k    ∝ raw_k · density of the shift at the bin's centre
    row    = centre_k + a uniform whole number in ± round(jitter · (1 + entropy_k)), turned back
             at the schedule's ends

If no bin is reliable, rows are uniform. 1 / (K p_k) is the weight that would undo the choice of
bins.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.schedules import T


def bins_of(rows: Tensor, bins: int) -> Tensor:
    """Rows in [0, 1000], fractional too -> bins (B,) long.

    In integers: fp32's floor(t / 1000 · 100) is wrong at 530 and 590.
    """
    return (rows.long() * bins // T).clamp(0, bins - 1)


def shift_density(u: Tensor, shift: float) -> Tensor:
    """Density at u of shift_time(uniform, shift): s / (s - (s - 1) u)².

    For shift 3 it is 1/3 at data and 3 at noise.
    """
    return shift / (shift - (shift - 1) * u).square()


@dataclass(frozen=True)
class TimestepSampler:
    """From a uniform q to a row of the teacher's schedule and its importance weight."""

    p: Tensor  # (K,) float64, sum 1
    jitter: Tensor  # (K,) long: rows around the centre
    reliable: Tensor  # (K,) bool

    def draw(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """q (B,) uniform in [0, 1) -> rows (B,) long in [0, 999], weights 1 / (K p) (B,) fp32.

        What is left of q inside its bin is the jitter.
        """
        q = q.double()
        if not self.reliable.any():
            return (q * T).long().clamp(max=T - 1), torch.ones_like(q, dtype=torch.float32)
        K = len(self.p)
        edges = self.p.cumsum(0)
        k = torch.searchsorted(edges, q, right=True).clamp(max=int(self.p.nonzero().max()))
        rest = ((q - edges[k] + self.p[k]) / self.p[k]).clamp(0, 1 - 1e-9)
        centre = (2 * k + 1) * T // (2 * K)
        row = centre + (rest * (2 * self.jitter[k] + 1)).long() - self.jitter[k]
        # Turned back at both ends: clamping would pile rows up there.
        row = torch.where(row < 0, -1 - row, row)
        row = torch.where(row > T - 1, 2 * T - 1 - row, row)
        return row, (1 / (K * self.p[k])).float()


def make_sampler(
    accuracy: Tensor,
    entropy: Tensor,
    *,
    shift: float = 1.0,
    base_jitter: int = 5,
    chaos: bool = True,
    threshold: float = 0.15,
    unreliable: str = "neutral",
    gain: float = 1.0,
) -> TimestepSampler:
    """A sampler from an assessor's profile: accuracy and entropy (K,) in [0, 1] of its bins.

    shift > 1 moves towards noise, as everywhere in this project (the source's comment says the
    opposite of its formula).
    """
    accuracy, entropy = accuracy.double().cpu(), entropy.double().cpu()
    K = len(accuracy)
    reliable = accuracy >= threshold
    spread = 1 + entropy if chaos else torch.ones_like(entropy)
    jitter = (base_jitter * spread).round().long()
    if not reliable.any():
        return TimestepSampler(torch.full((K,), 1 / K, dtype=torch.float64), jitter, reliable)
    raw = 1 + gain * (1 - accuracy)
    other = raw[reliable].mean() if unreliable == "neutral" else torch.zeros_like(raw)
    centres = (torch.arange(K, dtype=torch.float64) + 0.5) / K
    p = torch.where(reliable, raw, other) * shift_density(centres, shift)
    return TimestepSampler(p / p.sum(), jitter, reliable)
