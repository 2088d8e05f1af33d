"""The processes that share a run, the device each of them computes on, and in what precision."""

import contextlib
import gc
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from harness.cli import UserError, clipped

# How long a rank that is done waits for the others; torchrun ends it if one of them dies.
PATIENCE = timedelta(days=30)
# How long the first rank waits for the last one to come …
MEETING = timedelta(minutes=10)
# … and afterwards, if nobody says, for what the others have to say.
USUAL = timedelta(minutes=30)
# What a network computes on; torch knows more, such as meta, on which nothing has a value.
DEVICES = ("cpu", "cuda", "mps", "xpu")
# What to do where the variables of torchrun make no sense.
ALONE = "start with torchrun, or unset RANK and WORLD_SIZE"


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
    place = place_here()
    device = pick_device(device_name)
    if place is None:
        return Ranks(0, 1, device)
    rank, world = place
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=MEETING))
        store.set_timeout(patience or USUAL)
        dist.init_process_group(backend, timeout=patience, store=store, rank=rank, world_size=world)
    except (dist.DistError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rank {rank} of {world} met no others at {where}: {reason}",
            do=f"Mend what is wrong there, {ALONE}.",
        ) from None
    return Ranks(rank, world, device)


def place_here() -> tuple[int, int] | None:
    """(rank, world) that the environment says, as torchrun sets it; None = one process alone."""
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return None
    world = variable("WORLD_SIZE", 1, 1_000_000)
    rank = variable("RANK", 0, world - 1)
    variable("MASTER_PORT", 1, 65_535)
    if not os.environ.get("MASTER_ADDR"):
        raise UserError("WORLD_SIZE is set and MASTER_ADDR is not", do=f"Set it, {ALONE}.")
    return rank, world


def variable(name: str, low: int, high: int) -> int:
    """A number of the environment that torchrun sets."""
    text = os.environ.get(name)
    if text is None:
        raise UserError(
            f"some of torchrun's variables are set and {name} is not", do=f"Set it, {ALONE}."
        )
    if not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise UserError(
            f"the environment's {name}={clipped(text)!r}",
            wanted=f"{low} to {high}",
            do=f"Mend it, {ALONE}.",
        )
    return int(text)


def check_batch(batch: int, accum: int) -> None:
    """Refuse a batch that cannot be split over ranks and micro-batches; no rank is joined yet."""
    _, world = place_here() or (0, 1)
    unit = world * accum
    if batch % unit:
        raise UserError(
            f"--batch {batch} is not divisible by {world} ranks × {accum} accumulation (= {unit})",
            do=f"Try --batch {max(batch // unit, 1) * unit}.",
        )


def pick_device(name: str) -> torch.device:
    """auto = this process's GPU if there is one, else the CPU; anything else as torch names it, if
    it is here and can compute. A GPU becomes the current one, for Triton launches there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{variable('LOCAL_RANK', 0, 999_999)}"
    elif name == "cuda":
        name = "cuda:0"
    what, do = f"--device {clipped(name)!r}", "Try --device cpu, or auto."
    kind, _, number = name.partition(":")
    if kind not in DEVICES or kind == "cpu" and number not in ("", "0"):
        raise UserError(what, wanted=f"auto, {', '.join(DEVICES)}, or cuda:1", do=do)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # What follows the first sentence is a list of all that torch knows.
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise UserError(f"{what} is not usable here: {reason}", do=do) from None
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
