"""The processes that share a run, the device each of them computes on, and in what precision."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from harness.cli import UserError

# How long a rank that is done waits for the others; torchrun ends it if one of them dies.
PATIENCE = timedelta(days=30)


@dataclass
class Ranks:
    """The processes that share a step. One process is a world of one: same code."""

    rank: int
    world: int
    device: torch.device

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def broadcast(self, make: Callable[[], Any]) -> Any:
        """make() on rank 0, its (JSON-like) result on every rank; a UserError is one everywhere."""
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = make()
            except UserError as error:
                box[1] = error
        if self.world > 1:
            dist.broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def leave(self) -> None:
        """End the process group in step: a rank that exits while another still talks to it can
        abort in gloo's threads."""
        if dist.is_initialized():
            gc.collect()  # DistributedDataParallel is a cycle that holds the group
            dist.barrier()
            dist.destroy_process_group()


def join_ranks(device_name: str, backend: str = "", patience: timedelta | None = None) -> Ranks:
    """Join the process group that torchrun describes in the environment, if it does.

    patience: how long a rank waits for another; None = torch's own, ten or thirty minutes.
    """
    device = pick_device(device_name)
    if "WORLD_SIZE" not in os.environ:
        return Ranks(0, 1, device)
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    dist.init_process_group(backend, timeout=patience)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def check_batch(batch: int, accum: int) -> None:
    """Refuse a batch that cannot be split over ranks and micro-batches; no rank is joined yet."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    unit = world * accum
    if batch % unit:
        raise UserError(
            f"--batch {batch} is not divisible by {world} ranks × {accum} accumulation (= {unit})",
            do=f"Try --batch {max(batch // unit, 1) * unit}.",
        )


def pick_device(name: str) -> torch.device:
    """auto = this process's GPU if there is one, else the CPU; anything else as torch names it.
    A GPU becomes the current one, for Triton launches there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {name!r} is not usable here: {reason}", do="Try --device cpu, or auto."
        ) from None
    return device


def device_name(device: torch.device) -> str:
    """The word cpu, or the GPU's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def precision(device: torch.device, dtype: str) -> str:
    """ "bf16" or "fp32"; "auto" means bf16 on GPUs that have it in hardware."""
    if dtype != "auto":
        return dtype
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if has_bf16 else "fp32"


def autocast(device: torch.device, dtype: str) -> ContextManager:
    """The network's precision, as precision() tells it."""
    enabled = precision(device, dtype) == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, and no TF32 in convolutions: latents are kept and compared, and TF32 has ten
    bits of mantissa."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
