"""Train a diffusion or flow-matching U-Net.   The same command again resumes; a finished run says so.

    python train.py                                              # toy faces, flow matching, 3 minutes on two CPU cores
    python train.py --objective ddpm                             # the other arm: same images, same noise, same order
    torchrun --nproc_per_node=8 train.py --data DIR --resolution 256 --model toy-281m --batch 256 --images 5_000_000
    torchrun train.py --objective fm --stage fine                # without two characters …
    torchrun train.py --objective fm --stage stage2              # … then only them, from the fine run
    python train.py --help

A run is a folder: config.json, log.jsonl, vae.safetensors, samples/, ckpt/.
"""

import contextlib
import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, ClassVar, Iterator, Literal

import torch
from torch import Tensor
from tqdm import tqdm

import data.dataset as data
from harness.run import checkpoints
from ckpt.unets import fingerprint, load_strict, load_unet, read_tensors
from harness.cli import UserError, cli, flag, parse
from harness.ranks import autocast
from harness.run import versions
from diffusion.coupling import upsampled
from data.dataset import Dataset, Stream, open_dataset
from data.images import to_float
from harness.ema import EMA
from harness.files import make_dir, write_text
from kernels.adamw8bit import AdamW8bit
from data.dataset import latents_of
from model import PRESETS, UNet, num_params
from objectives import Loss, Objective
from harness.run import (
    Log, Speed, StopSignal, append, check_config, check_disk, first_nonfinite, lock,
)
from harness.ranks import Ranks, join_ranks
from settings import fine_run
from ckpt.unets import save_checkpoint
from harness.pictures import save_grid
from diffusion.schedules import stratify
from settings import objective_of, resolve
from start import check_aligned, make_vae, start_from, vae_moved
from eval_fid import FID
from vae import AnyVAE, choose, save_vae, vae_from_meta
from watch import draw_samples, ema_net, held_out_loss, preview


@dataclass(frozen=True)
class Data:
    """Which images, and which tags of them."""

    data: str = flag(
        "toyfaces",
        "toyfaces[:count] | robohash[:count] | DIR | FILE.parquet | hf:org/name | a latent cache",
        head="data",
    )
    stage: Literal["standard", "fine", "stage2"] = flag(
        "standard", "all | without --exclude-tags | only those, from the fine run"
    )
    exclude_tags: tuple[str, ...] = flag(
        (), 'a,b or "a & !(b | c*)"  (embedded data: some; stage2: what its fine run excluded)'
    )
    classes: tuple[str, ...] = flag(
        (), 'tags to condition on, * and ? allowed: "* hair"; none = unconditional'
    )
    label_drop: float = flag(0.1, "share of labels dropped, for guidance", low=0, high=1)
    resolution: int = flag(64, "pixels", low=1, high=8192)
    crop: Literal["center", "random"] = flag("center", "of images that are not square")
    flip: bool = flag(False, "mirror half of the images")
    holdout: float = flag(0.02, "share of the images kept for the held-out loss", low=0, high=0.9)


@dataclass(frozen=True)
class Optim:
    """How the weights are found. Progress is counted in images."""

    images: int = flag(
        40_000, "images shown in all, rounded up to whole batches", low=1, high=1e12,
        head="optimisation",
    )
    batch: int = flag(16, "global; split over ranks and --accum", low=1, high=1e6)
    accum: int = flag(1, "micro-batches a step", low=1, high=1e6)
    optim: Literal["adamw", "adamw8bit"] = flag(
        "adamw", "adamw8bit keeps its moments in 2 bytes a parameter"
    )
    lr: float = flag(2e-3, "peak", low=0, high=1e3)
    decay: Literal["constant", "cosine"] = flag("cosine", "after the warm-up")
    warmup: float = flag(0.05, "share of --images", low=0, high=1)
    weight_decay: float = flag(0.01, "AdamW", low=0, high=1e3)
    clip: float = flag(1.0, "global gradient norm; 0 = off", low=0, high=1e9)
    ema: tuple[float, ...] = flag(
        (0.05, 0.1),
        "power-EMA widths, relative to the run's length (Karras et al. 2024); none = off",
    )
    dtype: Literal["auto", "fp32", "bf16"] = flag("auto", "auto = bf16 on GPUs that have it")
    compile: bool = flag(False, "torch.compile")
    seed: int = flag(0, "of weights, order, noise, times", low=0, high=2**63 - 1)


@dataclass(frozen=True)
class Run:
    """Where a run lives, and what it writes how often. The `every` flags count images; 0 = never."""

    out: str = flag("runs", "where runs live", head="the run")
    name: str = flag("", "default <data>-<objective>-<stage>")
    resume: bool = flag(True, "--no-resume = refuse to continue an existing run")
    log: tuple[str, ...] = flag((), "tensorboard,wandb beside log.jsonl")
    log_every: int = flag(1_280, "images, like the next three; 0 = never", low=0, high=1e12)
    eval_every: int = flag(10_000, "held-out loss", low=0, high=1e12)
    preview_every: int = flag(10_000, "sample previews, raw and EMA", low=0, high=1e12)
    save_every: int = flag(10_000, "checkpoints", low=0, high=1e12)
    fid_every: int = flag(
        0, "images; FID of 2,048 samples to the training images, into the log; 0 = never",
        low=0, high=1e12,
    )
    fid_features: Literal["inception", "pca"] = flag(
        "inception", "pca: FD-pca, instant, needs no weights"
    )
    keep: int = flag(2, "newest checkpoints kept", low=1, high=1e6)
    keep_every: int = flag(
        0, "images; also keep checkpoints at its multiples; 0 = none", low=0, high=1e12
    )
    workers: int = flag(
        -1, "loader processes; -1 = none for data in memory on a CPU, else up to 8",
        low=-1, high=128,
    )
    device: str = flag("auto", "auto | cpu | cuda")


@dataclass(frozen=True)
class Config(Run, Optim, Data):
    """The flags of this script: the bases', and which network learns to say what."""

    model: str = flag(
        "tiny", "tiny | toy-281m | toy-281m-attn | adm-64 …", head="model and objective"
    )
    vae: str = flag(
        "pca",
        "pca | pixel | pixel:N | sd | sdxl | flux1 | flux2 | FILE | sdxl:FILE | hf:org/name/file",
    )
    init: str = flag(
        "", "U-Net to start from: a run, a file, a diffusers folder, hf:org/name[/file]"
    )
    objective: Literal["fm", "ddpm", "v", "x0", "cfm"] = flag(
        "fm", "what the network learns to say; cfm = from low resolution to high"
    )
    target: Literal["", "u", "eps", "v", "x0"] = flag(
        "", "its output, if not the objective's own"
    )
    table: Literal["", "linear", "cosine", "scaled_linear", "gvp"] = flag(
        "", "noise schedule of ddpm, v, x0; gvp (a continuous cosine) also of fm"
    )
    zero_snr: bool = flag(False, "v, x0: the table's last row becomes pure noise")
    density: Literal["", "uniform", "logit_normal", "gaussian", "mode", "lognormal"] = flag(
        "", "of training times"
    )
    t_loc: float | None = flag(
        None, "its centre: logit_normal 0, gaussian 0.5, lognormal -1.2", low=-10, high=10
    )
    t_scale: float | None = flag(
        None, "its width: logit_normal 1, gaussian 0.2, lognormal 1.2, mode 1.29", low=-1, high=10
    )
    stratified: bool = flag(False, "training times spread evenly over each batch")
    shift: float | Literal["auto"] = flag(
        1.0, "of training times; > 1 = more noise; auto = sqrt(latent pixels) / 32",
        low=1e-3, high=1e3,
    )
    loss: Literal["mse", "l1", "huber"] = flag("mse", "per element")
    weight: Literal["uniform", "min_snr", "soft_min_snr", "debiased", "cosmap"] = flag(
        "uniform", "per sample, by its time"
    )
    gamma: float = flag(
        5.0, "of min_snr and soft_min_snr", low=1e-3, high=1e6,
        of="--weight min_snr | soft_min_snr",
    )
    learn_sigma: bool = flag(False, "ddpm, v, x0: also learn the reverse steps' variance")
    aligned: bool = flag(
        False, "ddpm, v, x0: flow matching's loss on what they imply, to fine-tune an --init"
    )
    coupling: Literal["none", "ot"] = flag(
        "none", "ot = noise goes to the nearest images of its micro-batch (of equal label)"
    )
    lowres: int = flag(
        2, "cfm: how many times smaller the low resolution is", low=2, high=64,
        of="--objective cfm",
    )
    upsample: Literal["psu", "bilinear", "nearest"] = flag(
        "psu", "cfm: psu enlarges pixels, the others latents", of="--objective cfm"
    )
    noise_aug: float = flag(
        0.5883, "cfm: noise's standard deviation where its path starts", of="--objective cfm"
    )


# Fields that may change when a run is resumed: they do not change what is computed.
FREE = {"accum", "compile", "out", "resume", "log", "log_every", "eval_every", "preview_every", "save_every", "fid_every",
        "fid_features", "keep", "keep_every", "workers", "device"}
TIME_BINS = 10                           # of the loss by t
MAX_BAD = 10                             # non-finite steps in a row before giving up


# ---- pure functions of images seen ----------------------------------------------------------------------------------

def learning_rate(seen: int, cfg: Config) -> float:
    """Linear warm-up, then constant or half a cosine. A function of images seen, not of steps, ranks or accumulation."""
    warm = cfg.warmup * cfg.images
    if seen < warm:
        return cfg.lr * (seen + cfg.batch) / (warm + cfg.batch)
    if cfg.decay == "constant":
        return cfg.lr
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (seen - warm) / max(cfg.images - warm, 1)))


def due(seen: int, every: int, batch: int) -> bool:
    """Did the last step cross a multiple of `every`?"""
    return every > 0 and seen // every > (seen - batch) // every


# ---- setting up -----------------------------------------------------------------------------------------------------

@dataclass
class ObjectiveLoss:
    """The loss of a run: its objective's, on the latents of a batch. Another one (distill.py's) has the same attributes."""

    cfg: Config
    ranks: Ranks
    vae: AnyVAE
    objective: Objective

    # How the run's samples are drawn, as arguments of sample(); None = as those of any network.
    drawing: ClassVar[dict[str, Any] | None] = None

    @property
    def per_part(self) -> str:
        """The flag, if one is on, that makes a step depend on how its batch is split over ranks and --accum."""
        return "--coupling ot" if self.objective.coupling == "ot" else ""       # it pairs noise and data within a micro-batch

    def __call__(self, net: Any, batch: dict[str, Tensor]) -> Loss:
        """Everything random comes with the collated batch."""
        batch = {k: v.to(self.ranks.device, non_blocking=True) for k, v in batch.items()}
        cond = {"y": batch["y"]} if "y" in batch else {}
        q = batch.get("q")
        if q is not None and self.objective.stratified:
            q = stratify(q, batch["position"], self.cfg.batch)
        t = batch["t"] if q is None else self.objective.time(q)
        x0, start = latents_of(self.vae, batch), {"eps": batch["eps"]}          # outside autocast: only the net runs in bf16
        if self.objective.coupling == "lowres":
            cond["concat"] = self.low_resolution(batch, x0)
            start = {"source": self.objective.source(cond["concat"], batch["eps"])}
        with autocast(self.ranks.device, self.cfg.dtype):
            return self.objective.loss(net, x0, t=t, **start, **cond)

    def low_resolution(self, batch: dict[str, Tensor], x0: Tensor) -> Tensor:
        """cfm: what the low-resolution versions of a batch say of its latents x0, in x0's shape."""
        images = to_float(batch["image"]) if "image" in batch else None
        return upsampled(images, x0, self.vae.encode, self.objective.lowres, self.objective.upsample)

    def report(self) -> dict[str, Any]:
        """More for the training line of the log. Every rank calls it."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """More tensors that an exact resume needs, equal on every rank. Every rank calls it."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of state_dict()."""


@dataclass
class Trainer:
    """Everything a step needs."""
    cfg: Config
    ranks: Ranks
    run: Path
    ds: Dataset
    vae: AnyVAE
    objective: Objective
    net: UNet                                # the bare module: what is saved
    model: torch.nn.Module                   # net inside torch.compile and DistributedDataParallel: what is trained
    optimizer: torch.optim.Optimizer
    ema: EMA
    classes: list[str]
    labels: Any                              # (n,) or None
    init: dict[str, Any]                     # where the weights started
    held: Any                                # rank 0's lock on the folder
    loss: Any = None                         # called as loss(net, batch) -> Loss; see ObjectiveLoss
    seen: int = 0
    skipped: int = 0                         # non-finite steps, in all
    bad: int = 0                             # … in a row
    meter: Tensor = field(default_factory=lambda: torch.zeros(2, TIME_BINS, dtype=torch.float64))   # loss sum, count by t

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.vae.latent_shape(self.cfg.resolution)


def setup(cfg: Config, ranks: Ranks) -> Trainer:
    """Open the data, fit or load the autoencoder, build the network, and take up a checkpoint if the run has one.

    Everything that can be wrong is found before the first byte is written.
    """
    run = Path(cfg.out) / cfg.name
    ds = open_dataset(cfg.data, stage=cfg.stage, exclude_tags=cfg.exclude_tags, resolution=cfg.resolution, holdout=cfg.holdout,
                      crop=cfg.crop, flip=cfg.flip)
    classes, labels = data.classes_of(ds, cfg.classes) if cfg.classes else ([], None)
    start = "" if checkpoints(run) else cfg.init or (str(fine_run(cfg)) if cfg.stage == "stage2" else "")
    init_net, init_meta = start_from(cfg, start) if start else (None, None)
    if ranks.rank == 0:
        print(ds.report, flush=True)
    vae = vae_from_meta(ranks.broadcast(lambda: make_vae(cfg, run, ds, init_meta).meta())).to(ranks.device)
    objective = objective_of(cfg, vae.latent_shape(cfg.resolution))
    unet = replace(PRESETS[cfg.model], in_channels=vae.channels * (1 + (objective.coupling == "lowres")),
                   out_channels=vae.channels * (1 + objective.learn_sigma), num_classes=len(classes))
    side, factor = vae.latent_shape(cfg.resolution)[1], 2 ** (len(unet.channel_mult) - 1)
    if side % factor:
        raise UserError(f"--resolution {cfg.resolution} gives {side}×{side} latents, which {cfg.model} cannot halve "
                        f"{len(unet.channel_mult) - 1} times.  Use a multiple of {vae.factor * factor}.")
    if cfg.objective == "cfm" and cfg.upsample != "psu" and side % cfg.lowres:
        raise UserError(f"--lowres {cfg.lowres} does not divide the {side}×{side} latents of --resolution {cfg.resolution}.  Use --upsample psu.")
    if cfg.aligned and start:
        check_aligned(objective, init_meta.get("objective"), start)
    check_disk(cfg, run, num_params(unet))
    torch.manual_seed(cfg.seed)
    net = UNet(unet)
    if cfg.stage == "stage2" and start and init_meta.get("images", 0) < init_meta.get("config", {}).get("images", 0) and ranks.rank == 0:
        print(f"warning: {start} stopped at {init_meta['images']:,} of its {init_meta['config']['images']:,} images.", flush=True)
    if start:
        load_strict(net, init_net.state_dict(), f"--init {start}")
    init = {"path": start or None, "fingerprint": fingerprint(net.state_dict()) if start else None}
    return assemble(cfg, ranks, ds, vae, objective, net, classes, labels, init)


def assemble(cfg: Config, ranks: Ranks, ds: Dataset, vae: AnyVAE, objective: Objective, net: UNet, classes: list[str], labels: Any,
             init: dict[str, Any], make_loss: Callable[[Trainer], Any] | None = None, kind: type[Trainer] = Trainer, **more: Any) -> Trainer:
    """Begin the run's folder and put its parts together: from here on something is written.

    make_loss(trainer) returns an object like ObjectiveLoss. It may keep parts of the trainer, but not the trainer: a cycle would hold the
    folder's lock.
    """
    run, held = Path(cfg.out) / cfg.name, None
    if ranks.rank == 0:
        make_dir(run)
        held = lock(run)
        write_text(run / "config.json", json.dumps(asdict(cfg), indent=1) + "\n")   # first: the rest is only taken up under it
        save_vae(run / "vae.safetensors", vae, weights=False)
    net = net.to(ranks.device)
    model = torch.compile(net) if cfg.compile else net
    if ranks.world > 1:
        model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = AdamW8bit(net.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay) if cfg.optim == "adamw8bit" else \
        torch.optim.AdamW(net.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    trainer = kind(cfg, ranks, run, ds, vae, objective, net, model, optimizer, EMA(net, cfg.ema), classes, labels, init, held, **more)
    trainer.loss = make_loss(trainer) if make_loss else ObjectiveLoss(cfg, ranks, vae, objective)
    if checkpoints(run):
        load_state(trainer)
    return trainer


# ---- checkpoints ----------------------------------------------------------------------------------------------------

def save(tr: Trainer) -> None:
    """Rank 0 writes; the loss meter is summed over ranks so that the next log line is exact after a resume."""
    meter, own = tr.ranks.all_reduce(tr.meter.clone().to(tr.ranks.device)).cpu(), tr.loss.state_dict()
    if tr.ranks.rank == 0:
        names = {id(p): n for n, p in tr.net.named_parameters()}
        state = {f"{key}/{names[id(p)]}": v for p, entry in tr.optimizer.state.items() for key, v in entry.items()}
        base = tr.init["fingerprint"] if tr.skipped * tr.cfg.batch < tr.seen else None   # no step taken, nothing to have changed
        meta = {"run": tr.cfg.name, "base_fingerprint": base, "config": asdict(tr.cfg), "objective": asdict(tr.objective), "vae": tr.vae.meta(),
                "classes": tr.classes, "latent_shape": tr.latent_shape, "resolution": tr.cfg.resolution, "init": tr.init,
                "data_hash": tr.ds.source.hash, **versions()}
        state |= {"meter": meter, **{f"own/{k}": v for k, v in own.items()}}
        save_checkpoint(tr.run, tr.seen, tr.net, meta, tr.ema.weights, state,
                        {"skipped": tr.skipped, "data_hash": tr.ds.source.hash, "parts": tr.ranks.world * tr.cfg.accum}, tr.cfg.keep, tr.cfg.keep_every)
    tr.ranks.barrier()


def load_state(tr: Trainer) -> None:
    """Continue exactly: weights, EMAs, optimizer, counters, the half-filled loss meter. Every rank reads for itself."""
    folder = checkpoints(tr.run)[-1]
    state, meta = read_tensors(folder / "state.safetensors")
    if meta["data_hash"] != tr.ds.source.hash:
        raise UserError(f"the images or tags of {tr.cfg.data} changed since {tr.run} began; its order of samples is gone.  "
                        f"Restore them, or start again with --init {tr.run} --name NEW.")
    parts, before = tr.ranks.world * tr.cfg.accum, meta.get("parts")
    if (flag := tr.loss.per_part) and before not in (None, parts):
        raise UserError(f"{tr.run} was trained with ranks × --accum = {before}, now {parts}, and {flag} compares the images within such "
                        f"a part of a batch.  Resume with {before}.")
    net, model_meta = load_unet(folder / "model.safetensors")
    load_strict(tr.net, net.state_dict(), str(folder))
    for width, weights in tr.ema.weights.items():
        for name, value in load_unet(folder / f"ema-{width}.safetensors")[0].state_dict().items():
            weights[name].copy_(value)
    meter = state.pop("meter")
    tr.loss.load_state_dict({k.removeprefix("own/"): state.pop(k) for k in list(state) if k.startswith("own/")})
    tr.meter = meter if tr.ranks.rank == 0 else torch.zeros_like(meter)         # it was summed over ranks
    params = dict(tr.net.named_parameters())
    for key, value in state.items():
        key, name = key.split("/", 1)
        if value.ndim == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        tr.optimizer.state[params[name]][key] = value if key == "order" else value.to(tr.ranks.device)   # order is about memory
    tr.seen, tr.skipped, tr.init = meta["images"], meta["skipped"], model_meta["init"]


# ---- a step ---------------------------------------------------------------------------------------------------------

def positions(cfg: Config, ranks: Ranks, seen: int) -> Iterator[list[int]]:
    """The sample positions of each of this rank's micro-batches, from `seen` to the end of the run."""
    micro = cfg.batch // (ranks.world * cfg.accum)
    for step in range(seen, cfg.images, cfg.batch):
        for i in range(cfg.accum):
            start = step + (i * ranks.world + ranks.rank) * micro
            yield list(range(start, start + micro))


def step(tr: Trainer, loader: Iterator[dict[str, Tensor]]) -> Tensor:
    """One optimizer step on cfg.batch images; returns the gradient norm. A non-finite one changes no weight."""
    cfg, batches = tr.cfg, []
    for group in tr.optimizer.param_groups:
        group["lr"] = learning_rate(tr.seen, cfg)
    for i in range(cfg.accum):
        batch = next(loader)
        if tr.ranks.world > 1:
            tr.model.require_backward_grad_sync = i == cfg.accum - 1            # all-reduce once a step, not once a micro-batch
        if tr.net.cfg.dropout:
            torch.manual_seed(cfg.seed * 1_000_003 + int(batch["position"][0]))   # masks too are a function of position
        loss = tr.loss(tr.model, batch)
        (loss.loss / cfg.accum).backward()
        bins = (loss.t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        update = torch.stack([loss.per_sample.detach().double(), torch.ones_like(loss.t, dtype=torch.float64)])
        tr.meter = tr.meter.to(update.device).index_add(1, bins, update)
        batches.append(batch)
    norm = torch.nn.utils.get_total_norm([p.grad for p in tr.net.parameters() if p.grad is not None])
    tr.seen += cfg.batch
    if torch.isfinite(norm):
        if isinstance(tr.optimizer, AdamW8bit):                                 # clips and averages in the same pass
            tr.optimizer.step(clip=cfg.clip or None, norm=norm, ema=tr.ema.pairs(tr.seen, cfg.batch))
        else:
            if cfg.clip:
                torch.nn.utils.clip_grads_with_norm_(tr.net.parameters(), cfg.clip, norm)
            tr.optimizer.step()
            tr.ema.update(tr.net, tr.seen, cfg.batch)
        tr.bad = 0
    else:
        report_bad_step(tr, batches)
    tr.optimizer.zero_grad(set_to_none=True)
    return norm


def report_bad_step(tr: Trainer, batches: list[dict[str, Tensor]]) -> None:
    """Say where a non-finite loss or gradient came from; after MAX_BAD in a row save the batch and stop."""
    tr.skipped, tr.bad = tr.skipped + 1, tr.bad + 1
    where = [first_nonfinite(tr.net, lambda net: tr.loss(net, batch)) for batch in batches]
    where = next((w for w in where if w), "another rank's batch")
    row = {"event": "non-finite", "images": tr.seen, "where": where, "in_a_row": tr.bad, "rank": tr.ranks.rank}
    if tr.ranks.rank == 0:
        append(tr.run, row)
        tqdm.write(f"warning: step to {tr.seen:,} images skipped, non-finite: {where}")
    # The sums cannot be cleaned of a NaN, so this stretch of the loss log restarts here.
    tr.meter = torch.zeros_like(tr.meter) if not torch.isfinite(tr.meter).all() else tr.meter
    if tr.bad >= MAX_BAD:
        path = tr.run / f"bad-batch-{tr.seen:012d}-rank{tr.ranks.rank}.pt"
        torch.save(batches, path)
        save(tr)
        raise UserError(f"{MAX_BAD} non-finite steps in a row, the last: {where}.  The batch is in {path}; the weights, as they were before, "
                        f"in {checkpoints(tr.run)[-1]}.")


# ---- the loop -------------------------------------------------------------------------------------------------------

def train(cfg: Config, ranks: Ranks, setup: Callable[[Config, Ranks], Trainer] = setup, free: set[str] = FREE) -> bool:
    """Train until cfg.images have been seen, or a signal asks to stop; then save and show samples. True if one did, also during the samples."""
    stop = StopSignal()                                                         # also while the data is being read
    run = Path(cfg.out) / cfg.name
    final = run / "samples" / "final.png"
    if moved := vae_moved(cfg, run):
        choose(cfg.vae, kept=run / "vae.safetensors")  # another one ends here, also when the run is finished
    check_config(cfg, run, free | ({"vae"} if moved else set()))
    if final.exists() and checkpoints(run) and int(checkpoints(run)[-1].name) >= cfg.images:
        if ranks.rank == 0:
            print(f"finished: {run} has seen its {cfg.images:,} images.  More samples: python samplers.py --ckpt {run}")
            print(final)
        return False
    tr = setup(cfg, ranks)
    if ranks.rank == 0 and (tr.seen or tr.init["path"]):
        print(f"resuming {run} at {tr.seen:,} of {cfg.images:,} images" if tr.seen else f"starting from the weights of {tr.init['path']}", flush=True)
    fid = FID(asdict(cfg), cfg.name, ranks) if cfg.fid_every else None
    log = Log(tr.run, cfg.log, ranks.rank, tr.seen, header(tr))
    clock = Speed(tr.seen)
    workers = cfg.workers if cfg.workers >= 0 else 0 if tr.ds.source.pixels is not None and ranks.device.type == "cpu" \
        else min(8, (os.cpu_count() or 1) // ranks.world)
    stream = Stream(tr.ds, tr.labels, tr.latent_shape, cfg.seed, cfg.flip, cfg.label_drop)
    bar = tqdm(total=cfg.images, initial=tr.seen, unit="img", disable=None if ranks.rank == 0 else True)
    batches = data.batches(stream, positions(cfg, ranks, tr.seen), workers, pin=ranks.device.type == "cuda")
    with contextlib.closing(batches):                                           # its worker processes end here, whatever happens
        while tr.seen < cfg.images and not stop.asked(ranks):
            lr = learning_rate(tr.seen, cfg)
            norm = step(tr, batches)
            bar.update(cfg.batch)
            if due(tr.seen, cfg.log_every, cfg.batch) or (cfg.log_every and tr.seen >= cfg.images):
                row = log.report(tr, norm, lr, clock)
                loss = "none" if row["loss"] is None else f"{row['loss']:.4f}"
                bar.set_postfix(loss=loss)
                if bar.disable and ranks.rank == 0:                             # no terminal: a line a report instead of a bar
                    print(f"{tr.seen:>11,} images  loss {loss}  {row['images_per_s']:.1f} images/s  "
                          f"{max(cfg.images - tr.seen, 0) / row['images_per_s']:.0f} s left", flush=True)
            with clock.paused():
                looks = due(tr.seen, cfg.eval_every, cfg.batch) or (cfg.eval_every and tr.seen >= cfg.images)
                if looks and len(tr.ds.heldout):
                    log.write(held_out_loss(tr))
                if fid and (due(tr.seen, cfg.fid_every, cfg.batch) or tr.seen >= cfg.images):
                    name, net = ema_net(tr)
                    log.write(fid(lambda seeds: draw_samples(tr, net, seeds, method="heun", steps=10), tr.seen, name))
                if due(tr.seen, cfg.preview_every, cfg.batch):
                    preview(tr)
                if due(tr.seen, cfg.save_every, cfg.batch):
                    save(tr)
    bar.close()
    finish(tr, log, final)
    return stop.asked(ranks)


def finish(tr: Trainer, log: Log, final: Path) -> None:
    """Save; then either say how to go on, or draw the final grid. Its path is the last line printed."""
    if not checkpoints(tr.run) or int(checkpoints(tr.run)[-1].name) != tr.seen:
        save(tr)
    if tr.seen < tr.cfg.images:
        if tr.ranks.rank == 0:
            print(f"stopped and saved at {tr.seen:,} of {tr.cfg.images:,} images.  The same command continues.")
        return
    # The noise of a stochastic sampler corrects what a young network gets wrong; an ODE keeps it as grain.
    how = {"method": "ddim", "eta": 1.0, "steps": 50} if tr.objective.coupling != "lowres" else {"method": "heun", "steps": 25}
    images = draw_samples(tr, ema_net(tr)[1], list(range(32)), **how)           # (from a source that is not noise, only an ODE)
    if tr.ranks.rank == 0:
        make_dir(final.parent)
        save_grid(images, final, columns=8)
        print(f"finished: {tr.run} has seen {tr.seen:,} images.  More samples: python samplers.py --ckpt {tr.run}")
        print(final)


def header(tr: Trainer) -> dict[str, Any]:
    """The first line of log.jsonl: what it takes to repeat the run."""
    return {"event": "start", "images": tr.seen, "config": asdict(tr.cfg), "params": sum(p.numel() for p in tr.net.parameters()),
            "device": torch.cuda.get_device_name(tr.ranks.device) if tr.ranks.device.type == "cuda" else "cpu",
            "ranks": tr.ranks.world, "init": tr.init, "data_hash": tr.ds.source.hash, "used": len(tr.ds),
            "held_out": len(tr.ds.heldout), **versions()}


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    cfg = resolve(cfg)
    if dry_run:
        print(json.dumps(asdict(cfg), indent=1))
        return
    ranks = join_ranks(cfg)
    train(cfg, ranks)
    ranks.leave()


if __name__ == "__main__":
    cli(main)
