"""A run: the folder it may use, the log it keeps, the signal that stops it.

log.jsonl is the source; tensorboard and wandb are views of it.
"""

import contextlib
import fcntl
import hashlib
import json
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Callable, Iterator

import torch
from torch import Tensor

from harness.cli import UserError
from harness.files import write_text


# ---- the folder -----------------------------------------------------------------------------------------------------

def read_config(run: Path) -> dict[str, Any]:
    """A run's config.json as a dict."""
    try:
        config = json.loads((run / "config.json").read_text())
        return {**config}
    except (ValueError, TypeError) as error:
        raise UserError(f"{run / 'config.json'} is not the config of a run ({error}).  Restore it, or move the folder away.") from None


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


def checkpoints(run: Path) -> list[Path]:
    """A run's complete checkpoints, oldest first. A folder gets its number only once it is whole."""
    return sorted(p for p in (run / "ckpt").glob("*") if re.fullmatch(r"\d{12}", p.name))




@lru_cache
def versions(*packages: str) -> dict[str, Any]:
    """Python, torch and the commit of this code, with a hash of uncommitted changes ("" = clean, None = no git). Results of
    measurements are not code. Packages that are not installed are None."""
    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-c", "safe.directory=*", "-C", str(Path(__file__).parent.parent), *args], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout

    def installed(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None
    commit, diff = git("rev-parse", "HEAD"), git("diff", "HEAD", "--", ".", ":!benchmarks/results")
    return {"commit": commit and commit.strip(), "dirty": hashlib.sha256(diff.encode()).hexdigest()[:12] if diff else diff and "",
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         **{package: installed(package) for package in ("numpy", "triton", *packages)}}}


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
        sums, counts = tr.ranks.all_reduce(tr.meter.clone()).tolist()
        tr.meter.zero_()
        norm = float(norm) if torch.isfinite(norm) else None                    # JSON has no NaN
        row = {"event": "train", "images": tr.seen, "loss": sum(sums) / sum(counts) if sum(counts) else None,
               "loss_by_t": [s / n if n else None for s, n in zip(sums, counts)], "grad_norm": norm, "lr": lr,
               "images_per_s": clock.rate(tr.seen), "skipped": tr.skipped, **tr.loss.report()}
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
        return bool(ranks.all_reduce(torch.tensor(int(self.received), device=ranks.device)))


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
