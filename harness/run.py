"""A run: the folder it may use, the log it keeps, the signal that stops it.

log.jsonl is the source; tensorboard and wandb are views of it.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from harness.cli import UserError, flag
from harness.files import HALF_FILE, atomic, check_place, naming, open_safetensors, read_meta
from harness.files import remove, safe_name, strict_json, write_text
from harness.ranks import Ranks, device_name
from harness.rows import read_log, set_aside
from harness.typed import Count, Open, Range, check, read_json

# Of the loss by time in the log.
TIME_BINS = 10
# In a run's folder: the pictures that it ends with.
FINAL = "samples/final.png"
# Names that a kill may leave behind.
HALF_FOLDER = re.compile(r"\d{12}\.tmp")
# What flock says on file systems that have none: NFS without a lock daemon, FUSE.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

# ---- flags ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Where a run lives, and what it writes how often. What is `every` counts images; 0 = never."""

    out: str = flag("runs", "where runs live", writes="folder", head="the run")
    name: str = flag("", "default <data>-<objective>-<stage>")
    resume: bool = flag(True, "--no-resume = refuse to continue an existing run")
    log: tuple[str, ...] = flag((), "tensorboard,wandb beside log.jsonl")
    log_every: int = flag(1_280, "images, like the next four; 0 = never", low=0, high=1e12)
    eval_every: int = flag(10_000, "held-out loss", low=0, high=1e12)
    preview_every: int = flag(10_000, "sample previews, raw and EMA", low=0, high=1e12)
    save_every: int = flag(10_000, "checkpoints", low=0, high=1e12)
    fid_every: int = flag(0, "FID of 2,048 samples to the training images", low=0, high=1e12)
    fid_features: Literal["inception", "pca"] = flag(
        "inception", "FD-pca is instant, needs no weights"
    )
    keep: int = flag(2, "newest checkpoints kept", low=1, high=1e6)
    keep_every: int = flag(
        0, "images; keeps also the first checkpoint at or after each multiple", low=0, high=1e12
    )
    workers: int = flag(
        -1,
        "loader processes; -1 = none for data in memory on a CPU, else up to 8",
        low=-1,
        high=128,
    )
    device: str = flag("auto", "auto | cpu | cuda")


# ---- the folder ---------------------------------------------------------------------------------


@dataclass
class Recorded(Open):
    """What scripts read of the config that a run, or the file of a network, recorded."""

    data: str = ""
    stage: Literal["", "standard", "fine", "stage2"] = "standard"
    exclude_tags: list[str] = ()
    classes: list[str] = ()
    resolution: Annotated[int, Range(0, 65536)] = 0
    holdout: Annotated[float, Range(0, 1)] = 0.0
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    model: str = ""
    vae: str = ""
    init: str = ""
    objective: str = ""
    images: Count = 0
    mode: str = ""
    end_steps: Annotated[int, Range(1, 10**6)] = 1
    fid_features: Literal["inception", "pca"] = "inception"
    dtype: Literal["auto", "fp32", "bf16"] = "auto"


def read_config(run: Path) -> dict[str, Any]:
    """A run's config.json as a dict."""
    advice = "Restore it, or move the folder away."
    return read_json(run / "config.json", Recorded, advice)


def recorded_config(checkpoint: Path) -> dict[str, Any]:
    """The config that a checkpoint was written under, by its own metadata."""
    path = checkpoint / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} is missing", do="Restore it, or use another checkpoint.")
    return check(read_meta(open_safetensors(path)).get("config", {}), Recorded, path)


def begun_with(run: Path, flag: str, default: Any) -> Any:
    """A flag's value in a run that has begun; default: before there was such a flag. Else None."""
    if found := checkpoints(run):
        return recorded_config(found[-1]).get(flag, default)
    return read_config(run).get(flag, default) if (run / "config.json").exists() else None


def check_config(cfg: Any, run: Path, free: set[str], resume: bool = True) -> None:
    """An existing run continues only under the config it was made with, but for `free` fields."""
    check_places(run)
    if not (run / "config.json").exists():
        if checkpoints(run):
            raise UserError(
                f"{run} has checkpoints but no config.json",
                do="Restore it, or start under another --name.",
            )
        return
    if not resume:
        raise UserError(
            f"{run} exists and --no-resume was given", do="Start the new run under another --name."
        )
    check_same(cfg, read_config(run), run, free | {"name"})


def check_same(cfg: Any, old: dict[str, Any], run: Path, free: set[str]) -> None:
    """Refuse a config that differs from the `old` one of a run in more than `free` fields."""
    # A flag that is younger than the run had its default.
    defaults = json.loads(json.dumps(asdict(type(cfg)())))
    old, new = {**defaults, **old}, json.loads(json.dumps(asdict(cfg)))
    differs = [
        f"{key} {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if key not in free and old.get(key) != new.get(key)
    ]
    if differs:
        raise UserError(
            f"{run} was made with another config: {'; '.join(differs)}",
            do="Repeat its flags to resume, or give this run its own --name "
            f"(and --init {run} to go on from its weights).",
        )


def check_places(run: Path) -> None:
    """Refuse a run's folder in which something else stands where a run writes."""
    for folder in (run, run / "ckpt", run / "samples", *checkpoints(run)):
        check_place(folder, "a folder")
    for name in ("config.json", "log.jsonl", "vae.safetensors", ".lock", "wandb-id", FINAL):
        check_place(run / name, "a file")
    for preview in (run / "samples").glob("[0-9]" * 12 + ".png"):
        check_place(preview, "a file")


def lock(run: Path) -> IO[str]:
    """Hold a run's folder for this process, and sweep it; the kernel lets go when it ends, however
    it ends."""
    check_place(run / ".lock", "a file")
    handle = open(run / ".lock", "a")
    try:
        with naming(run / ".lock"):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(
                f"another process is writing to {run}",
                do="Wait for it, or give this one its own name.",
            ) from None
        if error.errno not in NO_LOCKS:
            raise
        what = f"{run} is on a file system without locks ({error.strerror})"
        print(f"warning: {what}: see that no other process writes there.", file=sys.stderr)
    sweep(run)
    return handle


def check_disk(run: Path, each: int, cfg: Any) -> None:
    """Refuse a run whose checkpoints, of `each` bytes, cannot fit: those that it keeps, and one
    more while it is written. cfg: keep, keep_every, save_every, images, ema."""
    # Between two that are saved, however many multiples of keep_every lie there, none is kept.
    milestones = cfg.images // max(cfg.keep_every, cfg.save_every) if cfg.keep_every else 0
    there = len(checkpoints(run))
    # An old one goes when a new one is whole, so there is always one to come.
    count = max(cfg.keep + milestones + 1 - there, 1)
    existing = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists())
    # What a kill left behind goes before anything is written.
    free = shutil.disk_usage(existing).free + sum(map(size_of, leftovers(run)))
    if each * count <= free:
        return
    lacking = f"{(each * count - free) / 1e9:.2f} GB"
    ways = [f"Make {lacking} free"]
    fewer = free // each + there - milestones - 1
    if free >= each and 1 <= fewer < cfg.keep:
        ways.append(f"give --keep {fewer}")
    if milestones and each * max(cfg.keep + 1 - there, 1) <= free:
        ways.append("leave --keep-every out")
    if not (run / "config.json").exists():  # else it goes on only where and as it is
        if cfg.ema:
            ways.append("drop --ema widths")
        ways.append("give another --out")
    raise UserError(
        f"{run}: {count} checkpoints of {each / 1e9:.2f} GB need {each * count / 1e9:.2f} GB, "
        f"{free / 1e9:.2f} GB are free",
        do=f"{', or '.join(ways)}.",
    )


def leftovers(run: Path) -> list[Path]:
    """What a kill in mid-write left in a run: only names that ckpt.save_checkpoint uses before and
    after, and those of harness.files.temporary_name()."""
    folders = [path for path in (run / "ckpt").glob("*") if HALF_FOLDER.fullmatch(path.name)]
    hidden = [path for at in (run, run / "ckpt", run / "samples") for path in at.glob(".*.tmp")]
    return folders + [path for path in hidden if HALF_FILE.fullmatch(path.name)]


def sweep(run: Path) -> None:
    """Remove what a kill left behind; only for who holds the run's lock."""
    for path in leftovers(run):
        remove(path)


def size_of(folder: Path) -> int:
    """Bytes that removing a file or folder sets free. What is gone by then counts as nothing: it
    was being written by another rank, which has put it in its place."""
    total = 0
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            total += path.lstat().st_blocks * 512
    return total


def checkpoints(run: Path) -> list[Path]:
    """A run's complete checkpoints, oldest first. A folder gets its number once it is whole."""
    return sorted(path for path in (run / "ckpt").glob("*") if re.fullmatch(r"\d{12}", path.name))


def images_seen(run: Path) -> int:
    """Of a run's newest checkpoint; -1 = it has none."""
    return int(checkpoints(run)[-1].name) if checkpoints(run) else -1


def find_runs(out: str, **fields: Any) -> list[Path]:
    """The runs under a folder that have a checkpoint, and these values in their config."""
    found = []
    for run in sorted(path.parent for path in Path(out).glob("*/config.json")):
        config = read_config(run)
        same = all(config.get(key) == value for key, value in fields.items())
        if same and checkpoints(run):
            found.append(run)
    return found


def find_fine(out: str, tags: tuple[str, ...], alike: dict[str, Any]) -> Path:
    """The run under a folder to which stage2 belongs: stage fine, alike, with the tags if given."""
    found = find_runs(out, stage="fine", **alike)
    if tags:
        same = sorted(tags)
        found = [run for run in found if sorted(read_config(run).get("exclude_tags", ())) == same]
    if not found:
        flags = " ".join(f"--{key} {value}" for key, value in alike.items())
        excluded = f" --exclude-tags {','.join(tags)!r}" if tags else ""
        raise UserError(
            "--stage stage2 starts from a fine run of the same data, objective and model, and "
            f"{out}/ has none",
            do=f"Make it with: python train.py {flags} --stage fine{excluded}",
        )
    if len(found) > 1:
        raise UserError(
            f"--stage stage2 could start from any of {', '.join(map(str, found))}",
            do="Choose with --init, and give --exclude-tags.",
        )
    return found[0]


def run_name(name: str, data: str, *words: str) -> str:
    """The folder's name under --out: as given, else made of the data's name and some words."""
    if Path(name).name != name or name.startswith("."):
        raise UserError(
            f"--name {name!r}",
            wanted="the name of a folder under --out, without slashes",
            do="Choose another name, or another --out.",
        )
    stem = "".join(c if c.isalnum() or c in "._-" else "-" for c in Path(data).name)
    return name or "-".join((stem, *words))


@lru_cache
def versions(*packages: str, dirty: bool = False) -> dict[str, Any]:
    """Python, torch, packages (None = not installed) and the commit of this code (None = no git).

    dirty: also a hash of the uncommitted changes, "" if there are none. Only measurements ask for
    it, because it runs git, which does what the configuration of the repository says.
    """
    folder = Path(__file__).parent.parent
    return {
        "commit": commit_of(folder),
        "dirty": uncommitted(folder) if dirty else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{package: installed(package) for package in ("numpy", "triton", *packages)},
        },
    }


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit_of(folder: Path) -> str | None:
    """The commit that is checked out in a folder, read from git's files: git itself would run what
    the configuration of a stranger's repository names, even of one in a folder above."""
    git = folder / ".git"
    try:
        if git.is_file():  # a work tree beside the repository
            git = (folder / git.read_text().removeprefix("gitdir:").strip()).resolve()
        head = (git / "HEAD").read_text().strip()
        if head.startswith("ref:"):
            common = git / "commondir"
            shared = git / common.read_text().strip() if common.is_file() else git
            head = ref_of(shared, head.removeprefix("ref:").strip())
    except (OSError, ValueError):
        return None
    return head if re.fullmatch(r"[0-9a-f]{40,64}", head) else None


def ref_of(git: Path, name: str) -> str:
    """The commit of a branch: in a file of its own, or packed with others. "" if in neither."""
    if (git / name).is_file():
        return (git / name).read_text().strip()
    lines = (git / "packed-refs").read_text().splitlines()
    return next((line.split()[0] for line in lines if line.endswith(f" {name}")), "")


def uncommitted(folder: Path) -> str | None:
    """12 digits of a hash of the uncommitted changes; results of measurements do not count."""
    command = ["git", "-C", str(folder), "diff", "HEAD", "--", ".", ":!benchmarks/results"]
    try:
        diff = subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return hashlib.sha256(diff).hexdigest()[:12] if diff else ""


# ---- the log ------------------------------------------------------------------------------------


def append(run: Path, row: dict[str, Any]) -> None:
    """One JSON line at the end of a run's log."""
    path = run / "log.jsonl"
    with naming(path), open(path, "a") as file:
        file.write(strict_json(row) + "\n")


class Log:
    """log.jsonl, and tensorboard or wandb if asked for. Rank 0 writes; every rank calls."""

    def __init__(
        self, run: Path, mirrors: tuple[str, ...], ranks: Ranks, seen: int, facts: dict[str, Any]
    ):
        """Begin, or go on after `seen` images; facts: of the run, for the line that says so."""
        self.run, self.rank, self.mirrors = run, ranks.rank, []
        if self.rank:
            return
        path = run / "log.jsonl"
        if path.exists():
            rows, damaged = read_log(path)
            if damaged:
                set_aside(path, damaged)
            # Lines past the checkpoint describe steps that are about to be repeated, exactly.
            kept = [line + b"\n" for line, row in rows if row["images"] <= seen]
            with atomic(path) as temporary:
                temporary.write_bytes(b"".join(kept))
        device = device_name(ranks.device)
        row = {"command": " ".join(sys.argv), "event": "start", "images": seen, "device": device}
        # With the versions, what it takes to repeat the run.
        append(run, {**row, "ranks": ranks.world, **facts, **versions()})
        for name in mirrors:
            self.mirrors.append(open_mirror(name, run, facts["config"], seen))

    def write(self, row: dict[str, Any]) -> None:
        if self.rank:
            return
        append(self.run, row)
        numbers = {f"{row['event']}/{k}": v for k, v in row.items() if isinstance(v, float)}
        for mirror in self.mirrors:
            mirror(numbers, row["images"])


def check_mirrors(names: tuple[str, ...]) -> None:
    """Refuse views of the log that do not exist or are not installed."""
    for name in names:
        if name not in ("tensorboard", "wandb"):
            raise UserError(
                f"--log {name} is not one of tensorboard, wandb",
                do="Leave it out: log.jsonl is always written.",
            )
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"--log {name} needs a package that is not installed", do=f"Run: pip install {name}"
            )


def open_mirror(
    name: str, run: Path, config: dict[str, Any], seen: int
) -> Callable[[dict[str, float], int], None]:
    """A function (values, images) -> None for tensorboard or wandb."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run / "tensorboard"), purge_step=seen + 1)

        def write(values: dict[str, float], images: int) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, images)
            writer.flush()

        return write
    import wandb

    wandb.init(
        project="twinpath",
        name=run.name,
        dir=str(run),
        config=config,
        id=wandb_id(run, seen),
        resume="allow",
    )
    return lambda values, images: wandb.log(values, step=images)


def wandb_id(run: Path, seen: int) -> str:
    """What W&B knows a run by: drawn once and kept in its folder, so that it moves with it, and two
    folders of one name are two runs. A run that was begun before has its name."""
    path = run / "wandb-id"
    if not path.exists() and not seen:
        write_text(path, f"{safe_name(run.name)}-{uuid.uuid4().hex[:8]}\n")
    return path.read_text().strip() if path.exists() else run.name


class Meter:
    """The loss since the last line of the log, in all and by time."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        # The sum of the losses and their count, for each bin of t: this rank's.
        self.sums = torch.zeros(2, TIME_BINS, dtype=torch.float64)

    def add(self, t: Tensor, per_sample: Tensor) -> None:
        """t (B,) in [0, 1], per_sample (B,)."""
        bins = (t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        ones = torch.ones_like(t, dtype=torch.float64)
        update = torch.stack([per_sample.detach().double(), ones])
        self.sums = self.sums.to(update.device).index_add(1, bins, update)

    def state(self) -> Tensor:
        """Summed over ranks, so that the next line of the log is exact after a resume."""
        return self.ranks.all_reduce(self.sums.clone().to(self.ranks.device)).cpu()

    def load_state(self, sums: Tensor) -> None:
        self.sums = sums if self.ranks.rank == 0 else torch.zeros_like(sums)

    def drop_nonfinite(self) -> None:
        """Sums cannot be cleaned of a NaN, so they start again."""
        if not torch.isfinite(self.sums).all():
            self.sums = torch.zeros_like(self.sums)

    def read(self) -> dict[str, Any]:
        """The mean loss over all ranks, also by t (None = no sample fell there), and start anew."""
        sums, counts = self.ranks.all_reduce(self.sums.clone()).tolist()
        self.sums.zero_()
        return {
            "loss": sum(sums) / sum(counts) if sum(counts) else None,
            "loss_by_t": [s / n if n else None for s, n in zip(sums, counts)],
        }


class Progress:
    """How far a run is: on a terminal a bar, elsewhere a line for each report. Its rate leaves out
    the time that evaluating and saving takes."""

    def __init__(self, seen: int, images: int, ranks: Ranks):
        self.seen, self.images, self.first = seen, images, ranks.rank == 0
        self.since = time.perf_counter()
        # None = only on a terminal.
        hidden = None if self.first else True
        self.bar = tqdm(total=images, initial=seen, unit="img", disable=hidden)
        self.update, self.close = self.bar.update, self.bar.close

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def rate(self, seen: int) -> float:
        """Images per second since the last call."""
        now = time.perf_counter()
        rate = (seen - self.seen) / (now - self.since)
        self.seen, self.since = seen, now
        return rate

    def show(self, row: dict[str, Any]) -> None:
        """What of a training line of the log is shown."""
        loss = "none" if row["loss"] is None else f"{row['loss']:.4f}"
        self.bar.set_postfix(loss=loss)
        if self.bar.disable and self.first:
            seen, rate = row["images"], row["images_per_s"]
            left = max(self.images - seen, 0) / rate
            line = f"{seen:>11,} images  loss {loss}  {rate:.1f} images/s  {left:.0f} s left"
            print(line, flush=True)


def print_start(run: Path, seen: int, images: int, weights: str | None) -> None:
    """The first words of a run that goes on, or starts from other weights."""
    if seen:
        print(f"resuming {run} at {seen:,} of {images:,} images", flush=True)
    elif weights:
        print(f"starting from the weights of {weights}", flush=True)


def print_unfinished(start: str, meta: dict[str, Any]) -> None:
    """Say so if the run to start from, of which meta is a checkpoint's, was stopped."""
    seen, of = meta.get("images", 0), meta.get("config", {}).get("images", 0)
    if seen < of:
        print(f"warning: {start} stopped at {seen:,} of its {of:,} images.", flush=True)


def print_end(run: Path, images: int) -> None:
    """The last words of a finished run."""
    more = f"More samples: python samplers.py --ckpt {run}"
    print(f"finished: {run} has seen {images:,} images.  {more}")
    print(run / FINAL)


# ---- trouble ------------------------------------------------------------------------------------


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

    def asked(self, ranks: Ranks) -> bool:
        """Ranks agree: a signal to one stops all at the same step."""
        if ranks.world == 1:
            return self.received
        return bool(ranks.all_reduce(torch.tensor(int(self.received), device=ranks.device)))


def report_nonfinite(
    run: Path,
    ranks: Ranks,
    net: torch.nn.Module,
    loss: Callable[..., Any],
    batches: list[dict[str, Tensor]],
    broken: list[str],
    seen: int,
    in_a_row: int,
) -> str:
    """Find out where the loss(net, batch) of a skipped step was not finite, or its gradient, which
    was not for the parameters `broken`; rank 0 writes it into the log. Every rank calls."""
    found = [first_nonfinite(net, lambda net: loss(net, batch), broken) for batch in batches]
    where = next(filter(None, found), "another rank's batch")
    if ranks.rank == 0:
        row = {"event": "non-finite", "images": seen, "where": where, "in_a_row": in_a_row}
        append(run, {**row, "rank": 0})
        tqdm.write(f"warning: step to {seen:,} images skipped, non-finite: {where}")
    return where


def first_nonfinite(
    net: torch.nn.Module, loss_of: Callable[[torch.nn.Module], Any], broken: list[str]
) -> str:
    """Repeat a forward pass; name the first layer with a non-finite output, and its t. "" = none.

    loss_of(net) returns an objectives.Loss. broken: in their order, the parameters whose gradient
    was not finite. The last is the first that a backward pass came to.
    """
    found: list[str] = []

    def watch(name: str) -> Callable:
        def hook(module: torch.nn.Module, args: tuple, output: Tensor) -> None:
            if not found and not torch.isfinite(output).all():
                found.append(name)

        return hook

    leaves = [(n, m) for n, m in net.named_modules() if n and not list(m.children())]
    hooks = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            loss = loss_of(net)
    finally:
        for hook in hooks:
            hook.remove()
    bad = ~torch.isfinite(loss.per_sample)
    if bad.any():
        times = ", ".join(f"{t:.4f}" for t in loss.t[bad][:4].tolist())
        return f"layer {found[0] if found else 'input'}, t = {times}"
    if broken:
        times = f"t from {float(loss.t.min()):.4f} to {float(loss.t.max()):.4f}"
        return f"gradient of {broken[-1]} (forward is finite), {times}"
    return ""
