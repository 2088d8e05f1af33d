"""The posterior of a network's last layer (diffusion/laplace.py) in a file of its own:

    save_posterior(path, posterior, meta["fingerprint"])
    posterior = load_posterior(path, meta["fingerprint"])       # refused for another network
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from diffusion.laplace import Posterior
from harness.cli import UserError
from harness.files import open_safetensors, read_meta, write_tensors
from harness.typed import Count, Hash, Length, Open, Range, check

AGAIN = "Name another file: samplers.py --uncertainty 8 --posterior NEW fits one, and writes it."
Side = Annotated[int, Range(0, 64)]


@dataclass
class About(Open):
    """What the file says beside its two tensors."""

    fingerprint: Hash
    prior: Annotated[float, Range(above=0, high=1e30)]
    rows: Count
    kernel: Annotated[list[Side], Length(2, 2)]
    padding: Annotated[list[Side], Length(2, 2)]


def save_posterior(path: Path, posterior: Posterior, fingerprint: str) -> None:
    """Write a posterior; fingerprint: of the network whose last layer it is of."""
    meta = {
        "posterior": {
            "fingerprint": fingerprint,
            "prior": posterior.prior,
            "rows": posterior.rows,
            "kernel": list(posterior.kernel),
            "padding": list(posterior.padding),
        }
    }
    tensors = {"root": posterior.root.contiguous(), "noise": posterior.noise.contiguous()}
    write_tensors(path, tensors, meta)


def load_posterior(path: Path, fingerprint: str) -> Posterior:
    """Read a posterior. UserError, if the file is none, or is of another network than the one with
    this fingerprint."""
    box = open_safetensors(path)
    about = read_meta(box).get("posterior") if {"root", "noise"} == set(box) else None
    if about is None:
        raise UserError(f"{path} holds no posterior of a last layer", do=AGAIN)
    about = check(about, About, f"{path}: the metadata", AGAIN)
    if about["fingerprint"] != fingerprint:
        raise UserError(
            f"{path} is of the network {about['fingerprint'][:12]}",
            got=f"one with the weights {fingerprint[:12]}",
            wanted="the network that it was made of",
            do=AGAIN,
        )
    root, noise = box["root"], box["noise"]
    square = root.ndim == 2 and root.shape[0] == root.shape[1] and noise.ndim == 1
    double = root.dtype == noise.dtype == torch.float64
    sound = square and double and bool(root.isfinite().all())
    if not sound or bool((root.diagonal() <= 0).any()):
        raise UserError(f"{path}: its tensors are no posterior's", do=AGAIN)
    kernel, padding = tuple(about["kernel"]), tuple(about["padding"])
    return Posterior(root, about["prior"], noise, about["rows"], kernel, padding)
