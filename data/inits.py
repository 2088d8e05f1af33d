"""What --init and --mask hold: pictures that sampling starts from, as latents.

    init = read_init(cfg, gen)      # of samplers.py's Config and Generator; None: noise
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.images import read_mask, read_picture
from diffusion.coupling import enlarged
from harness.cli import UserError, dashed, field_of


class Init(NamedTuple):
    """What --init and --mask hold, and how far from it to start."""

    z: Tensor  # (k, C, h, w) latents, cycled over the images
    strength: float = 1.0
    pixels: Tensor | None = None  # (k, 3, R, R) uint8
    mask: Tensor | None = None  # (1, 1, R, R) bool: white, which is painted anew
    cells: Tensor | None = None  # (1, 1, h, w) the latent cells with any white


def read_init(cfg: Any, gen: Any) -> Init | None:
    """Read what there is to start from; None: noise."""
    if gen.objective.coupling == "lowres":
        return Init(enlarge(cfg, gen))
    if not cfg.init:
        return None
    if len(set(gen.size)) > 1:
        raise UserError(
            f"--init with --size {cfg.size}", wanted="a square", do="Name its side: --resolution N."
        )
    pixels = torch.stack([read_picture(path, gen.resolution) for path in cfg.init])
    z = gen.vae.encode(pixels.to(gen.device) / 127.5 - 1)
    whole = cfg.mask or cfg.invert or cfg.interpolate
    strength = (1.0 if whole else 0.6) if cfg.strength is None else cfg.strength
    if not cfg.mask:
        return Init(z, strength, pixels)
    mask = read_mask(cfg.mask, cfg.init, gen.resolution)
    cells = F.max_pool2d(mask.float(), gen.vae.factor).bool().to(gen.device)
    return Init(z, strength, pixels, mask, cells)


def enlarge(cfg: Any, gen: Any) -> Tensor:
    """What the small pictures of --init say of large ones to a cfm network, (k, C, h, w)."""
    objective, R = gen.objective, gen.resolution
    side = R // objective.lowres
    if not cfg.init:
        raise UserError(
            f"{cfg.ckpt} was trained to enlarge pictures {objective.lowres} times",
            do=f"Add --init A.png,B.png: they become {side} px.",
        )
    for name in ("strength", "mask", "invert", "interpolate"):
        if getattr(cfg, name) != field_of(type(cfg), name).default:
            raise UserError(
                f"{dashed(name)}: {cfg.ckpt} was trained to enlarge pictures (cfm), which is all "
                "it can do with --init",
                do="Leave it out.",
            )
    if gen.solver.get("eta") or gen.solver["method"] == "ddpm":
        raise UserError(
            f"--method {cfg.method}{' --eta' if cfg.eta else ''} adds noise as if the path began "
            f"in noise, and that of {cfg.ckpt} (cfm) begins in a picture",
            do="Use an ODE solver, such as heun.",
        )
    if R % objective.lowres or (objective.upsample != "psu" and side % gen.vae.factor):
        raise UserError(
            f"--resolution {R} cannot be enlarged from {objective.lowres} times smaller pictures",
            do="Leave it out.",
        )
    small = torch.stack([read_picture(path, side) for path in cfg.init])
    small = small.to(gen.device) / 127.5 - 1
    return enlarged(small, (R, R), gen.vae.encode, objective.upsample)
