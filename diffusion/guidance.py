"""Guidance: a prediction led away from a weaker one.

predict = guided(objective, net, cfg=3.0, interval=(0.3, 5.0))
x0, eps, u, v = predict(x, t, y=labels)
"""

import math
from typing import Any, Callable, Protocol

import torch
from torch import Tensor

from diffusion.sampling import Predict

EVERYWHERE = (0.0, math.inf)  # the interval of sigma where guidance acts


class Reader(Protocol):
    """What turns a network's output into a point of the linear path (objectives.Objective)."""

    def predict(
        self, net: Callable[..., Tensor], x: Tensor, t: Tensor, **cond: Any
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def guided(
    objective: Reader,
    net: Callable[..., Tensor],
    cfg: float = 1.0,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] = EVERYWHERE,
    guide: Predict | None = None,
    null: dict[str, Tensor] | None = None,
) -> Predict:
    """predict(x, t, y=None) -> (x0, eps, u, v) with guidance: weak + cfg · (conditional - weak).

    weak is the same network without a label, in the same call (classifier-free guidance, Ho &
    Salimans 2022), or `guide`'s prediction (autoguidance, Karras et al. 2024). cfg = 1 is the
    conditional model itself, 0 the weak one. Only samples with lo < sigma <= hi, sigma = t / (1-t),
    are guided (Kynkäänniemi et al. 2024); for the others nothing weak is evaluated. rescale in
    [0, 1]: see rescaled().
    y (B,) holds labels, -1 = none; what else is given goes to the objective as it is (concat of
    cfm). null: where no label says nothing, one row (1, …) of what does: of texts, context and y.
    v is what a network with twice the channels says of the variance, unguided; else None.
    """

    def predict(x: Tensor, t: Tensor, y: Tensor | None = None, **cond: Tensor) -> tuple:
        cond = cond if y is None else {"y": y, **cond}
        rows = within(t, interval)
        says_nothing = y is None and null is None
        if cfg == 1.0 or (guide is None and says_nothing) or not len(rows):
            return ask(objective, net, x, t, cond)
        if guide is None:
            strong, weak = ask_both(objective, net, x, t, cond, rows, null)
        else:
            strong = ask(objective, net, x, t, cond)
            weak = guide(x[rows], t[rows], **{k: v[rows] for k, v in cond.items()})
        return combine(strong, weak, rows, x, t, cfg, rescale)

    return predict


def within(t: Tensor, interval: tuple[float, float]) -> Tensor:
    """The rows whose time t (B,) lies where guidance acts."""
    rows = torch.arange(len(t), device=t.device)
    if interval == EVERYWHERE:
        return rows
    sigma = t.double() / (1 - t.double())
    return rows[(interval[0] < sigma) & (sigma <= interval[1])]


def ask(
    objective: Reader, net: Callable[..., Tensor], x: Tensor, t: Tensor, cond: dict[str, Tensor]
) -> tuple:
    """(x0, eps, u, v): v is what a network with twice the channels says of the variance."""
    channels, variances = x.shape[1], []

    def mean(x: Tensor, k: Tensor, **cond: Any) -> Tensor:
        out = net(x, k, **cond)
        if out.shape[1] > channels:
            variances.append(out[:, channels:])
        return out[:, :channels]

    x0, eps, u = objective.predict(mean, x, t, **cond)
    v = variances[0].to(x.dtype) if variances else None
    return x0, eps, u, v


def ask_both(
    objective: Reader,
    net: Callable[..., Tensor],
    x: Tensor,
    t: Tensor,
    cond: dict[str, Tensor],
    rows: Tensor,
    null: dict[str, Tensor] | None,
) -> tuple[tuple, tuple]:
    """The predictions with labels or texts, and without for `rows`, from one call."""
    weak = {k: v[rows] for k, v in cond.items()}
    if null is None:
        weak["y"] = torch.full_like(weak["y"], -1)
    else:
        weak |= {k: v.expand(len(rows), *v.shape[1:]) for k, v in null.items()}
    together = {k: torch.cat([cond[k], weak[k]]) for k in cond}
    x, t = torch.cat([x, x[rows]]), torch.cat([t, t[rows]])
    *out, v = ask(objective, net, x, t, together)
    B = len(x) - len(rows)
    strong = [part[:B] for part in out]
    return (*strong, None if v is None else v[:B]), tuple(part[B:] for part in out)


def combine(
    strong: tuple, weak: tuple, rows: Tensor, x: Tensor, t: Tensor, cfg: float, rescale: float
) -> tuple:
    """weak + cfg · (strong - weak) for `rows`, strong elsewhere; the variance is strong's."""
    *strong, v = strong
    mixed = [w + cfg * (s[rows] - w) for s, w in zip(strong, weak)]
    if rescale:
        mixed = rescaled(mixed[0], strong[0][rows], x[rows], t[rows], rescale)
    return (*(s.index_copy(0, rows, m) for s, m in zip(strong, mixed)), v)


def rescaled(
    x0: Tensor, conditional: Tensor, x: Tensor, t: Tensor, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Each sample's standard deviation of x0 drawn back, by `share`, to the conditional one's (Lin
    et al. 2023, eq. 15-16): (x0, eps, u) on the line from x0 through x. An x0 without any spread
    has none to draw back, and stays."""
    ratio = conditional.flatten(1).std(1) / x0.flatten(1).std(1)
    ratio = torch.where(ratio.isfinite(), ratio, torch.ones_like(ratio))
    x0 = share * ratio.view(-1, 1, 1, 1) * x0 + (1 - share) * x0
    u = (x - x0) / t.view(-1, 1, 1, 1).clamp(min=1e-5)
    return x0, x0 + u, u
