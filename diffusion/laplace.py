"""How sure a network is of what it says: the exact posterior of its last layer, a convolution or,
of a transformer, the projection of its tokens.

    curvature = Curvature(layer, noise)             # noise: the target's squared error by time
    with watching(layer) as seen:                   # for every batch of training pairs
        objective.loss(net, x0, eps=eps, t=t)
        curvature.add(seen[-1], t)
    posterior = curvature.posterior()
    posterior.variance(features)                    # (B, H, W), of each output channel
    shared(walk, layer, posterior, 8).var(0)        # of whole samples: walk() draws them

Daxberger et al. 2021, "Laplace redux". With squared errors, the last layer out = W * phi + b has a
quadratic loss, so its Laplace approximation is exact: with u (K) the patch of phi at a place, or
the token there, and a 1, each output's weights are N(those of the network, P), all with the same

    P = (A + prior I)^-1,   A = sum over pairs and places of u u^T / noise(t),

the mean of an output is the output, and its variance is u^T P u. No samples are needed.

Of a finished sample they are not to be added up step by step as if the weights were drawn anew at
each: there is one network, and its error has one sign along the way. The sum of steps vanishes with
their number (tests/diffusion/test_laplace.py has the table). Three ways that keep one network:

    shared      K networks drawn, each kept for its whole trajectory: the reference, at K times
                the cost
    tangent     K directions drawn, each pushed along the network's own trajectory (forward mode)
    integrated  the features summed up as the solver sums velocities, then u^T P u: no network call
                more, but what an error does to later steps is left out
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from diffusion.guidance import EVERYWHERE, combine, within
from diffusion.sampling import DETERMINISTIC, Predict, Sample, sample
from diffusion.weights import x0_share

# Methods along which features are summed up: no noise on the way, and no steps that depend on x.
SUMMED = (*DETERMINISTIC, "dpmpp_2m")


# ---- a layer and what reaches it -----------------------------------------------------------------


Layer = nn.Conv2d | nn.Linear  # Linear: of tokens (B, N, C), each of a square of the output
ONE = (1, 1), (0, 0)  # the kernel and the padding of one that sees a token alone


def check_layer(layer: nn.Module) -> None:
    """ValueError, if it is none of those whose patches are known here."""
    if isinstance(layer, nn.Linear) and layer.bias is not None:
        return
    plain = isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.bias is not None
    plain = plain and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if not (plain and layer.stride == (1, 1) and layer.dilation == (1, 1)):
        raise ValueError("the posterior is known of a plain convolution or projection with a bias.")


def window(layer: Layer) -> tuple[tuple[int, int], tuple[int, int]]:
    """The kernel and the padding of its patches."""
    if isinstance(layer, nn.Linear):
        return ONE
    return tuple(layer.kernel_size), tuple(layer.padding)


def spread(phi: Tensor, H: int, W: int) -> Tensor:
    """Features (B, C, N, 1) of tokens, row by row, at the places of their squares: (B, C, H, W).
    Features that have places (B, C, H, W) stay as they are."""
    if phi.shape[2:] == (H, W):
        return phi
    side = math.isqrt(H * W // phi.shape[2])
    phi = phi.unflatten(2, (H // side, W // side)).squeeze(4)
    return phi.repeat_interleave(side, 2).repeat_interleave(side, 3)


@contextmanager
def watching(layer: Layer) -> Iterator[list[Tensor]]:
    """A list that holds, last, what the layer was given (B, C, H, W) in the network's last call;
    of tokens (B, C, N, 1)."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        phi = inputs[0].detach()
        seen[:] = [phi.transpose(1, 2)[..., None] if isinstance(layer, nn.Linear) else phi]

    hook = layer.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def moved(layer: Layer, by: Tensor, scale: Tensor | float = 1.0) -> Iterator[None]:
    """The layer with other weights: by (out, K), times scale, is added. What it holds is not
    touched, so there is nothing to be put back."""
    weight = by[:, :-1].unflatten(1, layer.weight.shape[1:])

    def add(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        # In fp32 also where the network runs in bf16: what is added is small beside the output.
        with torch.autocast(out.device.type, enabled=False):
            phi = inputs[0].float()
            if isinstance(layer, nn.Linear):
                more = F.linear(phi, weight.to(phi), by[:, -1].to(phi))
            else:
                more = F.conv2d(phi, weight.to(phi), by[:, -1].to(phi), padding=layer.padding)
            return out.to(torch.promote_types(out.dtype, torch.float32)) + scale * more

    hook = layer.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def patches(phi: Tensor, layer: Layer) -> Tensor:
    """(B, C, H, W) -> float64 (K, B·H·W): what each output is a weighted sum of; last, the 1."""
    kernel, padding = window(layer)
    columns = F.unfold(phi.double(), kernel, padding=padding)
    flat = columns.transpose(0, 1).flatten(1)
    return torch.cat([flat, flat.new_ones(1, flat.shape[1])])


# ---- the posterior -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Posterior:
    """Of the weights of each output of a layer; equal for all, and independent."""

    root: Tensor  # (K, K) float64, lower: A + prior I = root root^T
    prior: float  # precision of the weights before any data
    noise: Tensor  # (bins,) the target's squared error in equal bins of time
    rows: int  # places that A was summed over
    kernel: tuple[int, int]
    padding: tuple[int, int]

    @cached_property
    def inverse(self) -> Tensor:
        """Of root. It costs K³ operations, so once is enough."""
        eye = torch.eye(len(self.root), dtype=self.root.dtype)
        return torch.linalg.solve_triangular(self.root, eye, upper=False)

    def whiten(self, like: Tensor) -> Tensor:
        """(K, K) M with P = M^T M: the squares of M u add up to u^T P u."""
        return self.inverse.to(like)

    def variance(self, phi: Tensor, ones: Tensor | float = 1.0) -> Tensor:
        """u^T P u at each place, (B, H, W), from features phi (B, C, H, W). ones: what stands in
        the 1's place, (B, 1, H, W), where features are sums."""
        phi = phi.float()
        whiten = self.whiten(phi)
        kernels = whiten[:, :-1].unflatten(1, (phi.shape[1], *self.kernel))
        out = F.conv2d(phi, kernels, padding=self.padding)
        return (out + ones * whiten[:, -1].view(1, -1, 1, 1)).square().sum(1)

    def diagonal(self, phi: Tensor) -> Tensor:
        """The same, (B, H, W), if weights were independent: what is often computed in its place. It
        is another thing, and ranks outliers as certain; it is here to be compared."""
        precision = self.root.square().sum(1)
        v = (1 / precision).to(phi.float())
        kernels = v[:-1].unflatten(0, (1, phi.shape[1], *self.kernel))
        return F.conv2d(phi.float().square(), kernels, v[-1:], padding=self.padding)[:, 0]

    def draws(self, n: int, out: int, seed: int = 0) -> Tensor:
        """n differences (n, out, K) of a network drawn from the posterior to the network; seed
        below 2^32, which is all that torch's generator looks at."""
        if seed >> 32:
            raise ValueError(f"seed is {seed}: wanted one below 2^32.")
        g = torch.Generator().manual_seed(seed)
        z = torch.randn(n, out, len(self.root), generator=g, dtype=self.root.dtype)
        return (z @ self.whiten(z)).float()


class Curvature:
    """A, summed up batch by batch; those of ranks or of halves of the data may be added."""

    def __init__(self, layer: Layer, noise: Tensor):
        check_layer(layer)
        self.layer, self.noise = layer, noise.double().cpu()
        K = layer.weight[0].numel() + 1
        self.A = torch.zeros(K, K, dtype=torch.float64)
        self.rows = 0

    def add(self, phi: Tensor, t: Tensor) -> None:
        """Features (B, C, H, W), as watched, of pairs at times t (B,)."""
        u = patches(phi, self.layer).cpu()
        bins = (t.double().cpu() * len(self.noise)).long().clamp(0, len(self.noise) - 1)
        weight = (1 / self.noise[bins]).repeat_interleave(u.shape[1] // len(t))
        self.A += (u * weight) @ u.T
        self.rows += u.shape[1]

    def posterior(self, prior: float | None = None) -> Posterior:
        """prior: None = the one that makes the network's weights most likely (evidence)."""
        if prior is None:
            prior = self.likeliest()
        eye = torch.eye(len(self.A), dtype=torch.float64)
        root = torch.linalg.cholesky(self.A + prior * eye)
        return Posterior(root, prior, self.noise, self.rows, *window(self.layer))

    def likeliest(self, rounds: int = 100) -> float:
        """The fixed point of prior = gamma / |w|², gamma the number of weights that the data
        determine (MacKay 1992, eq. 4.9)."""
        a = torch.linalg.eigvalsh(self.A).clamp(min=0)
        layer = self.layer
        w = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1).detach().double().cpu()
        if not bool(w.any()):
            raise ValueError("the last layer is all zeros: this network was never trained.")
        prior = w.numel() / float(w.square().sum())
        for _ in range(rounds):
            prior = len(w) * float((a / (a + prior)).sum()) / float(w.square().sum())
        return prior


# ---- from a network's output to the sample -------------------------------------------------------


def shared(
    walk: Callable[[], Tensor], layer: Layer, posterior: Posterior, n: int, seed: int = 0
) -> Tensor:
    """What walk(), which draws samples (B, C, H, W) from a start and noise that stay the same,
    comes to with each of n networks drawn: (n, B, C, H, W). Its variance over n has the relative
    error sqrt(2 / (n - 1))."""
    found = []
    for by in posterior.draws(n, len(layer.weight), seed):
        with moved(layer, by.to(layer.weight.device)):
            found.append(walk())
    return torch.stack(found)


def tangent(
    walk: Callable[[], Tensor], layer: Layer, posterior: Posterior, n: int, seed: int = 0
) -> Tensor:
    """The derivative of walk() along each of n differences drawn, (n, B, C, H, W): the mean of
    their squares is the variance, to first order; the samples stay those of the network."""
    found = []
    for by in posterior.draws(n, len(layer.weight), seed):
        by = by.to(layer.weight.device)
        with forward_ad.dual_level():
            scale = forward_ad.make_dual(by.new_zeros(()), by.new_ones(()))
            with moved(layer, by, scale):
                primal, along = forward_ad.unpack_dual(walk())
            found.append(torch.zeros_like(primal) if along is None else along)
    return torch.stack(found)


@torch.no_grad()
def integrated(
    predict: Predict,
    layer: Layer,
    posterior: Posterior,
    x: Tensor,
    gain: Callable[[Tensor], Tensor] = torch.ones_like,
    *,
    cfg: float = 1.0,
    interval: tuple[float, float] = EVERYWHERE,
    method: str = "heun",
    **how: Any,
) -> tuple[Sample, Tensor]:
    """(the sample of x (B, C, H, W), the variance of each of its channels (B, H, W)).

    The features are carried beside x and summed up by the solver itself. gain(t (B,)): by how much
    the velocity moves with the network's output, 1 if that is the velocity. cfg and interval: those
    that predict is guided with, by the same network. how: as sample() takes it. Raises ValueError
    for methods that add noise or choose their steps by x.
    """
    if method not in SUMMED or how.get("eta"):
        raise ValueError(f"features are summed up along {', '.join(SUMMED)}, not {method}.")
    (channels, *size), features = x.shape[1:], layer.weight.shape[1]
    wide = torch.cat([x, x.new_zeros(len(x), features + 1, *size)], 1)

    with watching(layer) as seen:

        def both(z: Tensor, t: Tensor, **cond: Tensor) -> tuple[Tensor, ...]:
            x0, eps, u, *_ = predict(z[:, :channels].contiguous(), t, **cond)
            phi = spread(mixed(seen[-1].to(z), t, cfg, interval), *size)
            v = gain(t).to(z).view(-1, 1, 1, 1) * F.pad(phi, (0, 0, 0, 0, 0, 1), value=1.0)
            w, sums = t.view(-1, 1, 1, 1), z[:, channels:]
            # The sample's own triple is taken as it is: recomputed, its last bits may be others.
            sides = zip((x0, eps, u), (sums - w * v, sums + (1 - w) * v, v))
            return tuple(torch.cat(side, 1) for side in sides)

        s = sample(both, wide, method=method, **how)
    x, phi, ones = s.x.split([channels, features, 1], 1)
    return s._replace(x=x), posterior.variance(phi, ones)


def mixed(
    phi: Tensor, t: Tensor, cfg: float = 1.0, interval: tuple[float, float] = EVERYWHERE
) -> Tensor:
    """The features (B, C, H, W) that stand for a guided output at times t (B,), of those of its
    call: both halves are of the same weights, so their errors are not independent, and it is
    features that are to be mixed, not variances."""
    if len(phi) == len(t):
        return phi
    strong, weak = phi[: len(t)], phi[len(t) :]
    return combine((strong, None), (weak,), within(t, interval), strong, t, cfg, 0.0)[0]


def gain_of(target: str) -> Callable[[Tensor], Tensor]:
    """By how much the velocity moves with the output of a network that was trained to say `target`
    (diffusion/weights.py), at times t (B,)."""
    return lambda t: (x0_share(t, target) / x0_share(t, "u")).sqrt()


def score(variance: Tensor) -> Tensor:
    """(B,) one number an image: the mean logarithm of its variance (B, …)."""
    return variance.flatten(1).log().mean(1)
