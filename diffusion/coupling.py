"""Which noise, or which other start, belongs to which data.

    none      each sample its own noise
    ot        minibatch optimal transport (Tong et al. 2024; Pooladian et al. 2023): the batch's
              noises dealt out anew
    lowres    coupling flow matching (Fischer et al. 2023): the path starts at a noised
              low-resolution version of the sample

    eps = eps[ot_permutation(x0, eps, y)]
    low = upsampled(images, z_hi, vae.encode, factor=2)
    make_objective("cfm").loss(net, z_hi, low=low)          # from add_noise(low, noise, 0.5883)
"""

import math
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def ot_permutation(x0: Tensor, eps: Tensor, labels: Tensor | None = None) -> Tensor:
    """The order of eps (B, …) that brings it nearest to x0 (B, …): eps[order] minimises
    sum_i |x0_i - eps_order(i)|².

    With labels (B,) noise moves between samples of equal label only: across labels, a condition
    would come to know which noise it starts from (Cheng & Schwing 2025, "the curse of conditions").
    It is the noise that moves, so labels stay with their data.
    """
    # Here: slow to import, and most never need it.
    from scipy.optimize import linear_sum_assignment

    x = x0.detach().float().flatten(1).cpu()
    e = eps.detach().float().flatten(1).cpu()
    cost = -2 * x.double() @ e.double().T  # |x|² and |e|² add the same to every order
    order = torch.arange(len(x))
    for label in [None] if labels is None else labels.unique().tolist():
        rows = order.clone() if label is None else (labels.cpu() == label).nonzero()[:, 0]
        best = linear_sum_assignment(cost[rows][:, rows].numpy())[1]
        order[rows] = rows[torch.from_numpy(best)]
    return order.to(x0.device)


def resize(x: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """(B, C, H, W) to another size, in fp32: bilinear (antialiased where it shrinks) or nearest."""
    return F.interpolate(x.float(), size, mode=mode, antialias=mode == "bilinear")


def upsampled(
    images: Tensor | None,
    z_hi: Tensor,
    encode: Callable[[Tensor], Tensor],
    factor: int,
    upsample: str = "psu",
) -> Tensor:
    """What a `factor` times smaller picture says of z_hi (B, C, h, w), at z_hi's size.

    psu        pixel-space upsampling: images (B, 3, H, W) in [-1, 1] shrunk and enlarged
               bilinearly, then encoded
    bilinear   z_hi itself shrunk and enlarged bilinearly; needs no images
    nearest    the same, enlarged by repeating
    """
    if upsample == "psu":
        small = resize(images, (images.shape[-2] // factor, images.shape[-1] // factor))
        return enlarged(small, images.shape[-2:], encode, "psu")
    small = resize(z_hi, (z_hi.shape[-2] // factor, z_hi.shape[-1] // factor))
    return resize(small, z_hi.shape[-2:], upsample)


def enlarged(
    small: Tensor,
    size: tuple[int, int],
    encode: Callable[[Tensor], Tensor],
    upsample: str = "psu",
) -> Tensor:
    """The same of pictures that are small already, (B, 3, h, w) in [-1, 1], at `size`."""
    if upsample == "psu":
        return encode(resize(small, size))
    z = encode(small)
    height = z.shape[-2] * size[0] // small.shape[-2]
    width = z.shape[-1] * size[1] // small.shape[-1]
    return resize(z, (height, width), upsample)


def add_noise(z_up: Tensor, noise: Tensor, noise_aug: float) -> Tensor:
    """sqrt(1 - noise_aug²) z_up + noise_aug noise: keeps unit variance, so latents have to be
    normalised. noise_aug is the noise's standard deviation; the authors' "step 400" of their cosine
    schedule is 0.5883."""
    return math.sqrt(1 - noise_aug**2) * z_up + noise_aug * noise
