"""A run: the processes that share it, the folder it may use, the log it keeps, the signal that stops it.

log.jsonl is the source; tensorboard and wandb are views of it.
"""

import contextlib
import fcntl
import gc
import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Callable, Iterator, Mapping

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from ckpt import checkpoints, save_unet
from config import UserError, pick_device
from files import fsync, write_tensors, write_text


# ---- processes ------------------------------------------------------------------------------------------------------

@dataclass
class Ranks:
    """The processes that share a step. One process is a world of one: same code."""
    rank: int
    world: int
    device: torch.device

    def sum(self, x: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def share(self, make: Callable[[], Any]) -> Any:
        """make() on rank 0, its (JSON-like) result on every rank; a UserError there is one everywhere."""
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = make()
            except UserError as error:
                box[1] = str(error)
        if self.world > 1:
            dist.broadcast_object_list(box)
        if box[1] is not None:
            raise UserError(box[1])
        return box[0]

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


    def leave(self) -> None:
        """End the process group in step: a rank that exits while another still talks to it can abort in gloo's threads."""
        if dist.is_initialized():
            gc.collect()                                                        # DistributedDataParallel is a cycle that holds the group
            dist.barrier()
            dist.destroy_process_group()


PATIENCE = timedelta(days=30)                # a rank that is done waits for the others; torchrun ends it if one of them dies


def join_ranks(cfg: Any, backend: str = "", patience: timedelta | None = None) -> Ranks:
    """Join the process group torchrun describes in the environment, if it does. `patience`: how long a rank waits for another;
    None = torch's own, ten or thirty minutes."""
    device = pick_device(cfg.device)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend or ("nccl" if device.type == "cuda" else "gloo"), timeout=patience)
        return Ranks(dist.get_rank(), dist.get_world_size(), device)
    return Ranks(0, 1, device)


# ---- the folder -----------------------------------------------------------------------------------------------------

def read_config(run: Path) -> dict[str, Any]:
    """A run's config.json as a dict."""
    try:
        config = json.loads((run / "config.json").read_text())
        return {**config}
    except (ValueError, TypeError) as error:
        raise UserError(f"{run / 'config.json'} is not the config of a run ({error}).  Restore it, or move the folder away.") from None


def fine_run(cfg: Any) -> Path:
    """The run that stage2 starts from: under --out, stage=fine, same data, objective, model and (if given) tags."""
    found = []
    for run in sorted(p.parent for p in Path(cfg.out).glob("*/config.json")):
        other = read_config(run)
        same = all(other.get(k) == getattr(cfg, k) for k in ("data", "objective", "model", "resolution"))
        tags = not cfg.exclude_tags or sorted(other.get("exclude_tags", ())) == sorted(cfg.exclude_tags)
        if same and tags and other.get("stage") == "fine" and checkpoints(run):
            found.append(run)
    if not found:
        tags = f" --exclude-tags {','.join(cfg.exclude_tags)!r}" if cfg.exclude_tags else ""
        raise UserError(f"--stage stage2 starts from a fine run of the same data, objective and model, and {cfg.out}/ has none.  Make it "
                        f"with: python train.py --data {cfg.data} --objective {cfg.objective} --model {cfg.model} --stage fine{tags}")
    if len(found) > 1:
        raise UserError(f"--stage stage2 could start from any of {', '.join(map(str, found))}.  Choose with --init, and give --exclude-tags.")
    return found[0]


def check_config(cfg: Any, run: Path, free: set[str]) -> None:
    """An existing run continues only under the config it was made with, but for the fields in `free`."""
    if not (run / "config.json").exists():
        if checkpoints(run):
            raise UserError(f"{run} has checkpoints but no config.json.  Restore it, or start under another --name.")
        return
    if not cfg.resume:
        raise UserError(f"{run} exists and --no-resume was given.  Start the new run under another --name.")
    flags = json.loads(json.dumps(asdict(type(cfg)())))                          # a flag that is younger than the run had its default
    old, new = {**flags, **read_config(run)}, json.loads(json.dumps(asdict(cfg)))
    differs = [f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in sorted(old.keys() | new.keys())
               if k not in free and old.get(k) != new.get(k)]
    if differs:
        raise UserError(f"{run} was made with another config: {'; '.join(differs)}.  Repeat its flags to resume, or give this run its own --name "
                        f"(and --init {run} to go on from its weights).")


def lock(run: Path) -> IO[str]:
    """Hold a run's folder for this process; the kernel lets go when it ends, however it ends."""
    handle = open(run / ".lock", "a")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another process is writing to {run}.  Wait for it, or give this one its own name.") from None
    return handle


def check_disk(cfg: Any, run: Path, params: int) -> None:
    """Refuse a run whose checkpoints cannot fit. Weights and EMAs are 4 bytes a parameter, AdamW's state 8."""
    each = params * 4 * (1 + len(cfg.ema) + 2)
    count = cfg.keep + 1 + (cfg.images // cfg.keep_every if cfg.keep_every else 0) - len(checkpoints(run))
    existing = next(p for p in (run.absolute(), *run.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if each * count > free:
        raise UserError(f"{run}: {count} checkpoints of {each / 1e9:.2f} GB need {each * count / 1e9:.2f} GB, {free / 1e9:.2f} GB are free.  "
                        "Lower --keep, drop --ema widths, or give another --out.")


# ---- its checkpoints ------------------------------------------------------------------------------------------------

def save_checkpoint(run: Path, images: int, unet: nn.Module, meta: dict[str, Any], emas: Mapping[str, Mapping[str, Tensor]],
                    state: Mapping[str, Tensor], state_meta: dict[str, Any], keep: int, keep_every: int) -> Path:
    """Write a checkpoint under a temporary name, rename it into place, then remove those that are no longer kept."""
    final = run / "ckpt" / f"{images:012d}"
    temporary = final.with_name(final.name + ".tmp")
    sweep(run)
    temporary.mkdir(parents=True)
    save_unet(temporary / "model.safetensors", unet, {**meta, "images": images, "ema": None})
    for width, weights in emas.items():
        save_unet(temporary / f"ema-{width}.safetensors", unet, {**meta, "images": images, "ema": float(width)}, weights)
    write_tensors(temporary / "state.safetensors", state, {**state_meta, "kind": "training state", "images": images})
    os.replace(temporary, final)
    fsync(final.parent)
    done = checkpoints(run)
    for old in done[:-keep]:
        if not (keep_every and int(old.name) % keep_every == 0):
            trash = old.with_name(old.name + ".old")
            os.replace(old, trash)                                              # a kill in rmtree leaves no numbered half
            shutil.rmtree(trash)
    return final


def sweep(run: Path) -> None:
    """Remove what a kill in mid-save left behind: only names that save_checkpoint uses before and after."""
    for leftover in (run / "ckpt").glob("*"):
        if re.fullmatch(r"\d{12}\.(tmp|old)", leftover.name):
            shutil.rmtree(leftover)


# ---- the log --------------------------------------------------------------------------------------------------------

def append(run: Path, row: dict[str, Any]) -> None:
    """One JSON line at the end of a run's log."""
    with open(run / "log.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


class Log:
    """log.jsonl, and tensorboard or wandb if asked for. Rank 0 writes; every rank calls."""

    def __init__(self, run: Path, mirrors: tuple[str, ...], rank: int, seen: int, header: dict[str, Any]):
        self.run, self.rank, self.mirrors = run, rank, []
        if rank:
            return
        path = run / "log.jsonl"
        if path.exists():
            # Lines past the checkpoint describe steps that are about to be repeated, exactly.
            write_text(path, "".join(line + "\n" for line in complete_lines(path) if read_line(path, line)["images"] <= seen))
        append(run, {"command": " ".join(sys.argv), **header})
        for name in mirrors:
            self.mirrors.append(open_mirror(name, run, header, seen))

    def write(self, row: dict[str, Any]) -> None:
        if self.rank == 0:
            append(self.run, row)
            for mirror in self.mirrors:
                mirror({f"{row['event']}/{k}": v for k, v in row.items() if isinstance(v, float)}, row["images"])

    def report(self, tr: Any, norm: Tensor, lr: float, clock: "Speed") -> dict[str, Any]:
        """The training line: loss since the last one, over all ranks, also by t (None = no sample fell in the bin)."""
        sums, counts = tr.ranks.sum(tr.meter.clone()).tolist()
        tr.meter.zero_()
        norm = float(norm) if torch.isfinite(norm) else None                    # JSON has no NaN
        row = {"event": "train", "images": tr.seen, "loss": sum(sums) / sum(counts) if sum(counts) else None,
               "loss_by_t": [s / n if n else None for s, n in zip(sums, counts)], "grad_norm": norm, "lr": lr,
               "images_per_s": clock.rate(tr.seen), "skipped": tr.skipped, **tr.report()}
        self.write(row)
        return row


def complete_lines(path: Path) -> Iterator[str]:
    """The lines of a log, without a last one that a kill cut short."""
    for line in path.read_text().split("\n")[:-1]:
        yield line


def read_line(path: Path, line: str) -> dict[str, Any]:
    try:
        return {"images": 0, **json.loads(line)}
    except (ValueError, TypeError):
        raise UserError(f"{path} has a line that is not a log entry: {line[:60]!r}.  Mend or move it.") from None


def open_mirror(name: str, run: Path, header: dict[str, Any], seen: int) -> Callable[[dict[str, float], int], None]:
    """A function (values, images) -> None for tensorboard or wandb."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(str(run / "tensorboard"), purge_step=seen + 1)
        return lambda values, images: [writer.add_scalar(k, v, images) for k, v in values.items()] and writer.flush()
    import wandb
    wandb.init(project="twinpath", name=run.name, dir=str(run), config=header["config"], id=run.name, resume="allow")
    return lambda values, images: wandb.log(values, step=images)


class Speed:
    """Images per second between reports, without the time spent looking or saving."""

    def __init__(self, seen: int):
        self.seen, self.since = seen, time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def rate(self, seen: int) -> float:
        now = time.perf_counter()
        rate, self.seen, self.since = (seen - self.seen) / (now - self.since), seen, now
        return rate


# ---- trouble --------------------------------------------------------------------------------------------------------

class StopSignal:
    """SIGINT and SIGTERM ask for a stop at the end of the step; a second SIGINT stops at once."""

    def __init__(self):
        self.received = False
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self.handle)

    def handle(self, kind: int, frame: Any) -> None:
        if self.received and kind == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True

    def asked(self, ranks: Any) -> bool:
        """Ranks agree: a signal to one stops all at the same step."""
        if ranks.world == 1:
            return self.received
        return bool(ranks.sum(torch.tensor(int(self.received), device=ranks.device)))


def first_nonfinite(net: torch.nn.Module, run: Callable[[torch.nn.Module], Any]) -> str:
    """Repeat a forward pass and name the first layer with a non-finite output and the t it happened at; "" = none."""
    found: list[str] = []

    def watch(name: str) -> Callable:
        def hook(module: torch.nn.Module, args: tuple, output: Tensor) -> None:
            if not found and not torch.isfinite(output).all():
                found.append(name)
        return hook

    hooks = [m.register_forward_hook(watch(n)) for n, m in net.named_modules() if n and not list(m.children())]
    try:
        with torch.no_grad():
            loss = run(net)
    finally:
        for h in hooks:
            h.remove()
    bad = ~torch.isfinite(loss.per_sample)
    if bad.any():
        times = ", ".join(f"{t:.4f}" for t in loss.t[bad][:4].tolist())
        return f"layer {found[0] if found else 'input'}, t = {times}"
    gradients = [n for n, p in net.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    if gradients:
        return f"gradient of {gradients[-1]} (forward is finite), t from {float(loss.t.min()):.4f} to {float(loss.t.max()):.4f}"
    return ""
