"""Image to image and inpainting: sampling that begins on the way from a picture, or keeps a part.

    s = edit(objective, predict, z, noise, time_grid(25, t_start=0.6 * objective.t_max))
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion.sampling import Predict, Sample, sample
from diffusion.solvers import norm64


class Path(Protocol):
    """What editing asks of an objectives.Objective."""

    t_max: float

    def prior(self, noise: Tensor) -> Tensor: ...


def begin(objective: Path, noise: Tensor, t: float) -> Tensor:
    """Unit noise as the state at the time t where plain sampling begins, at or a little below
    objective.t_max."""
    return objective.prior(noise) * (norm64(t) / norm64(objective.t_max))


def edit(
    objective: Path,
    predict: Predict,
    z: Tensor,
    noise: Tensor,
    grid: Tensor,
    *,
    strength: float = 1.0,
    mask: Tensor | None = None,
    cond: dict[str, Tensor] | None = None,
    **how: Any,
) -> Sample:
    """Image to image and inpainting. z (B, C, H, W) is the data to start from, noise unit noise of
    its shape, grid a time_grid() with t_start = strength · objective.t_max; `how` is sample()'s.

    strength 0 returns z itself; 1 forgets it, and is plain sampling. Where the bool mask
    (B or 1, 1 or C, H, W) is False, z is kept: the network is shown z on its own straight way from
    this noise, at whatever time a method asks, and the result is z.
    """
    if not 0 <= strength <= 1:
        raise ValueError(
            f"strength is {strength}: wanted 0 (the input itself) to 1 (nothing of it)."
        )
    if strength == 0:
        return Sample(z.clone(), 0, torch.zeros(len(z), dtype=torch.long))
    t0 = float(grid[0])
    x = begin(objective, noise, t0) if strength == 1 else (1 - t0) * z + t0 * noise
    if mask is None:
        return sample(predict, x, grid=grid, cond=cond, **how)
    mask = mask.expand(len(z), *mask.shape[1:])

    def painted(
        x: Tensor, t: Tensor, *, mask: Tensor, z: Tensor, noise: Tensor, **cond: Tensor
    ) -> tuple:
        w = t.view(-1, 1, 1, 1)
        x0, eps, u, *v = predict(torch.where(mask, x, (1 - w) * z + w * noise), t, **cond)
        kept = torch.where(mask, x0, z), torch.where(mask, eps, noise)
        return (*kept, torch.where(mask, u, noise - z), *v)

    rows = {**(cond or {}), "mask": mask, "z": z, "noise": noise}
    s = sample(painted, x, grid=grid, cond=rows, **how)
    return s._replace(x=torch.where(mask, s.x, z))
