"""Which noise, or which other start, belongs to which data.

none      each sample its own noise
ot        minibatch optimal transport (Tong et al. 2024; Pooladian et al. 2023): the batch's noises dealt out anew
lowres    coupling flow matching (Fischer et al. 2023): the path starts at a noised low-resolution version of the sample

eps = eps[ot_permutation(x0, eps, y)]
source, z_up = lowres_coupling(z_hi, z_lo, noise)
objective.loss(net, z_hi, source=source, concat=z_up)
"""

import math
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def ot_permutation(x0: Tensor, eps: Tensor, labels: Tensor | None = None) -> Tensor:
    """The order of eps (B, …) that brings it nearest to x0 (B, …): eps[order] minimises sum_i |x0_i - eps_order(i)|².

    With labels (B,) noise moves between samples of equal label only: across labels, a condition would come to know which
    noise it starts from (Cheng & Schwing 2025, "the curse of conditions"). It is the noise that moves, so labels stay with their data.
    """
    from scipy.optimize import linear_sum_assignment  # here: slow to import, and most never need it

    x, e = x0.detach().float().flatten(1).cpu(), eps.detach().float().flatten(1).cpu()
    cost, order = (
        -2 * x.double() @ e.double().T,
        torch.arange(len(x)),
    )  # |x|² and |e|² add the same to every order
    for label in [None] if labels is None else labels.unique().tolist():
        rows = order.clone() if label is None else (labels.cpu() == label).nonzero()[:, 0]
        order[rows] = rows[torch.from_numpy(linear_sum_assignment(cost[rows][:, rows].numpy())[1])]
    return order.to(x0.device)


def resize(x: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """(B, C, H, W) to another size: bilinear (antialiased where it shrinks) or nearest, in fp32."""
    return F.interpolate(
        x.float(), size, mode=mode, **({"antialias": True} if mode == "bilinear" else {})
    )


def upsampled(
    images: Tensor | None,
    z_hi: Tensor,
    encode: Callable[[Tensor], Tensor],
    factor: int,
    upsample: str = "psu",
) -> Tensor:
    """What a `factor` times smaller picture says of z_hi (B, C, h, w), at z_hi's size.

    psu        pixel-space upsampling: images (B, 3, H, W) in [-1, 1] shrunk and enlarged bilinearly, then encoded
    bilinear   z_hi itself shrunk and enlarged bilinearly; needs no images
    nearest    the same, enlarged by repeating
    """
    if upsample == "psu":
        small = resize(images, (images.shape[-2] // factor, images.shape[-1] // factor))
        return enlarged(small, images.shape[-2:], encode, "psu")
    small = resize(z_hi, (z_hi.shape[-2] // factor, z_hi.shape[-1] // factor))
    return resize(small, z_hi.shape[-2:], upsample)


def enlarged(
    small: Tensor, size: tuple[int, int], encode: Callable[[Tensor], Tensor], upsample: str = "psu"
) -> Tensor:
    """The same of pictures that are small already (B, 3, h, w) in [-1, 1], for pictures of `size`."""
    if upsample == "psu":
        return encode(resize(small, size))
    z = encode(small)
    return resize(
        z,
        (z.shape[-2] * size[0] // small.shape[-2], z.shape[-1] * size[1] // small.shape[-1]),
        upsample,
    )


def add_noise(z_up: Tensor, noise: Tensor, noise_aug: float) -> Tensor:
    """sqrt(1 - noise_aug²) z_up + noise_aug noise: keeps unit variance, so latents have to be normalised. noise_aug is the
    noise's standard deviation; the authors' "step 400" of their cosine schedule is 0.5883."""
    return math.sqrt(1 - noise_aug**2) * z_up + noise_aug * noise


def lowres_coupling(
    z_hi: Tensor, z_lo: Tensor, noise: Tensor, noise_aug: float = 0.5883, upsample: str = "bilinear"
) -> tuple[Tensor, Tensor]:
    """(source, z_up), both in z_hi's shape (B, C, H, W): where the path to z_hi starts, and the clean condition a network is
    given beside it. z_lo (B, C, h, w) is enlarged to z_hi's size (psu's, made by `upsampled`, has it already)."""
    if z_lo.shape[:2] != z_hi.shape[:2] or noise.shape != z_hi.shape:
        raise ValueError(
            f"low resolution {tuple(z_lo.shape)} and noise {tuple(noise.shape)} do not belong to {tuple(z_hi.shape)}: wanted the same "
            "batch and channels, and noise of the full size."
        )
    z_up = z_lo.float() if z_lo.shape == z_hi.shape else resize(z_lo, z_hi.shape[-2:], upsample)
    return add_noise(z_up, noise, noise_aug), z_up
