"""What metadata of ours says of an autoencoder, checked before anything is built of it."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ckpt.vaes import FAMILIES
from harness.cli import UserError
from harness.files import check_shapes
from harness.typed import Hash, Like, Open, Range, check

Name = Annotated[str, Like(r"[ -~]{0,200}", "up to 200 plain letters")]
Family = Literal[tuple(FAMILIES)]
Latents = Literal["", "unpacked32", "packed128"]
ARRAYS = ("basis", "mean", "std")


@dataclass
class LinearNote(Open):
    """Of a linear autoencoder. Its arrays stand beside, or travel along as base64 of fp32."""

    name: Name
    factor: Annotated[int, Range(1, 99)]
    channels: Annotated[int, Range(1, 65536)] = 1
    basis: str = ""
    mean: str = ""
    std: str = ""


@dataclass
class VaeNote(Open):
    """Where a convolutional one is, which it is, and what it has to be."""

    name: Name
    family: Family
    latents: Latents
    source: str
    fingerprint: Hash
    normalisation: dict[str, Any]


@dataclass
class VaeMeta(Open):
    """Of a file that holds a convolutional one."""

    family: Family
    latents: Latents = ""
    fingerprint: Hash = ""


def check_note(note: Any, what: Any) -> None:
    """Refuse metadata of a network that tells of no autoencoder."""
    if isinstance(note, dict) and "family" in note:
        check(note, VaeNote, what)
    else:
        linear_parts(note, what)


def linear_parts(
    note: Any, what: Any, tensors: Mapping[str, Tensor] | None = None
) -> tuple[str, int, Tensor, Tensor, Tensor]:
    """What vae.LinearVAE is made of: (name, factor, basis, mean, std), from a note and the tensors
    beside it, or from the note alone."""
    check(note, LinearNote, what)
    width = 3 * note["factor"] ** 2
    if tensors is None:
        tensors = {key: from_base64(note, key, what) for key in ARRAYS}
        basis = tensors["basis"]
        tensors["basis"] = basis.view(-1, width) if basis.numel() % width == 0 else basis
    shapes = {key: tuple(x.shape) for key, x in tensors.items()}
    channels = note.get("channels", next(iter(shapes.get("std", ())), 0))
    wanted = {"basis": (channels, width), "mean": (width,), "std": (channels,)}
    check_shapes(wanted, shapes, f"{what}: its linear autoencoder")
    sound = all(x.is_floating_point() and x.isfinite().all() for x in tensors.values())
    if not sound or not (tensors["std"] > 0).all():
        raise UserError(
            f"{what}: its linear autoencoder holds other values than finite numbers, or a standard "
            "deviation that is not above 0",
            do="Copy it again, or use an older one.",
        )
    return note["name"], note["factor"], *(tensors[key] for key in ARRAYS)


def from_base64(note: Mapping[str, Any], key: str, what: Any) -> Tensor:
    try:
        data = base64.b64decode(note.get(key, ""), validate=True)
        return torch.frombuffer(bytearray(data), dtype=torch.float32)
    except ValueError as error:
        raise UserError(
            f"{what}: {key} of its autoencoder is damaged ({error})",
            wanted="base64 of fp32 numbers",
            do="Copy it again, or use an older one.",
        ) from None
