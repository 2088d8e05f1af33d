"""Train a diffusion or flow-matching network.   The same command again resumes.

    python train.py                        # toy faces, some minutes on a CPU
    python train.py --objective ddpm       # the other arm: same images, same noise, same order
    torchrun --nproc_per_node=8 train.py --data DIR --resolution 256 --model toy-281m \\
        --batch 256 --images 5_000_000
    torchrun train.py --stage fine         # without two characters …
    torchrun train.py --stage stage2       # … then only them, from the fine run
    python train.py --help

A run is a folder: config.json, log.jsonl, vae.safetensors, samples/, ckpt/.
"""

if __name__ == "__main__":
    import harness.interrupt  # noqa: F401

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

import data.dataset as data
from ckpt import fingerprint, open_like
from ckpt.meaning import said_table
from data.captions import Captions
from data.dataset import Dataset, latents_of
from data.sources import embedded_tags
from diffusion.schedules import resolution_shift
from eval_fid import FID
from harness.cli import UserError, check_flags, cli, flag, parse
from harness.ema import EMA, Averaging, check_averages
from harness.files import make_dir, write_text
from harness.pictures import save_grid
from harness.ranks import Ranks, autocast, check_batch, join_ranks
from harness.run import FINAL, Log, Progress, Run, StopSignal, begun_with, check_mirrors
from harness.run import checkpoints, images_seen, lock, print_end, print_start
from harness.run import print_unfinished, run_name
from harness.seeds import step_seed, torch_seed
from kernels import dispatch, proof
from kernels.adamw8bit import AdamW8bit
from model import build
from objectives import PRESETS as OBJECTIVES
from objectives import Density, Loss, LossType, Objective, Table, Target, Upsample, Weight
from objectives import make_objective
from training.checkpoints import load_state, save
from training.graph import repeater
from training.nonfinite import conclude, gradient_norms, reads_late, taken
from training.optimizer import FUSED, make_optimizer
from training.plan import check_plan, show_plan
from training.precision import as_begun, cast_weights, settle_dtype, with_weights
from training.previews import draw_samples, ema_net, held_out_loss, preview
from training.sharding import Sharding, parallel
from training.start import check_aligned, check_enlarging, check_room, check_table, fine_run
from training.start import is_finished, largest_shape, network_config, take_weights, vae_name
from training.texts import preset_of, texts_of
from training.trainer import Trainer
from vae import AnyVAE, save_vae, vae_from_meta

# ---- flags --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data(data.ImageFlags):
    """Which images, and what the network is told of them."""

    classes: tuple[str, ...] = flag((), 'tags to condition on, or "* hair"; none = unconditional')
    label_drop: float = flag(0.1, "share of labels dropped, for guidance", low=0, high=1)


@dataclass(frozen=True)
class Optim:
    """How the weights are found. Progress is counted in images."""

    images: int = flag(
        40_000, "shown in all, rounded up to whole batches", low=1, high=1e12, head="optimisation"
    )
    batch: int = flag(16, "images a step, over all ranks and --accum", low=1, high=1e6)
    accum: int = flag(1, "micro-batches a step", low=1, high=1e6)
    optim: Literal["adamw", *FUSED] = flag("adamw", "8-bit moments, or clip and EMAs in one pass")
    lr: float = flag(2e-3, "learning rate at its peak", low=0, high=1e3)
    decay: Literal["constant", "cosine"] = flag("cosine", "of --lr, after the warm-up")
    warmup: float = flag(0.05, "share of --images in which --lr rises", low=0, high=1)
    weight_decay: float = flag(0.01, "of AdamW, times --lr", low=0, high=1e3)
    clip: float = flag(1.0, "greatest norm of a gradient; 0 = off", low=0, high=1e9)
    ema: tuple[float, ...] = flag((0.05, 0.1), "power-EMA widths; none = off", low=0.01, high=0.25)
    dtype: Literal["auto", "fp32", "bf16"] = flag("auto", "auto = bf16 where it is faster")
    weights: Literal["fp32", "bf16"] = flag("fp32", "bf16: no fp32 copies, rounded stochastically")
    compile: bool = flag(False, "the network, with torch.compile")
    checkpointing: bool = flag(False, "blocks computed twice, for memory", beside=True)
    graph: bool = flag(True, "a step's passes as one CUDA graph, if that is exact")
    seed: int = flag(0, "of weights, order, noise, times", low=0, high=2**63 - 1)


@dataclass(frozen=True)
class Task:
    """Which network learns to say what."""

    model: str = flag("tiny", "tiny | toy-281m | sit-tiny | sit-b …", head="model and objective")
    text: str = flag("", "bytes | clip-l:FILE | sdxl:FILE: captions and tags say what to draw")
    vae: str = flag(
        "pca", "pca | pixel[:N] | sd | sdxl | flux1 | flux2 | FILE | sdxl:FILE | hf:…"
    )
    init: str = flag("", "network to start from: a run, a file, a folder, hf:org/name[/file]")
    objective: Literal[*OBJECTIVES] = flag("fm", "what is learnt; cfm = from small to large")
    target: Literal["", Target] = flag("", "what the network says, if not the objective's own")
    table: Literal["", Table] = flag("", "noise schedule of ddpm, v, x0; gvp also of fm")
    betas: str = flag("", "… or START,END,SCHEDULE: any betas, as 0.0015,0.0195,scaled_linear")
    zero_snr: bool = flag(False, "v, x0: the table's last row becomes pure noise")
    density: Literal["", Density] = flag("", "of training times")
    t_loc: float | None = flag(
        None, "its centre: logit_normal 0, gaussian 0.5, lognormal -1.2", low=-10, high=10
    )
    t_scale: float | None = flag(
        None, "width: 1, 0.2, 1.2, of mode 1.29", low=-1, high=10, beside=True
    )
    stratified: bool = flag(False, "training times spread evenly over each batch")
    shift: float | Literal["auto"] = flag(
        1.0, "of times; > 1 = more noise; auto = sqrt(latent pixels) / 32", low=1e-3, high=1e3
    )
    loss: LossType = flag("mse", "per element")
    weight: Weight = flag("uniform", "per sample, by its time")
    gamma: float = flag(
        5.0, "caps the SNR", low=1e-3, high=1e6, of="--weight min_snr | soft_min_snr"
    )
    learn_sigma: bool = flag(False, "ddpm, v, x0: also learn the reverse steps' variance")
    aligned: bool = flag(False, "ddpm, v, x0: fm's loss on what they imply, to fine-tune an --init")
    coupling: Literal["none", "ot"] = flag(
        "none", "ot = noise goes to near images of its micro-batch", of="not --objective cfm"
    )
    lowres: int = flag(2, "cfm: how many times smaller", low=2, high=64, of="--objective cfm")
    upsample: Upsample = flag("psu", "cfm: psu of pixels, else of latents", of="--objective cfm")
    noise_aug: float = flag(0.5883, "cfm: noise at the start", low=0, high=1, of="--objective cfm")


@dataclass(frozen=True)
class Config(Run, Sharding, Averaging, Optim, Captions, Task, data.BucketFlags, Data):
    """The flags of this script. --help shows the last base first."""


# Fields that may change when a run is resumed: they do not change what is computed.
FREE = {
    *("accum", "compile", "graph", "out", "resume", "log", "log_every", "eval_every", "keep"),
    *("preview_every", "save_every", "fid_every", "fid_features", "keep_every", "workers"),
    *("device", "shard", "ema_device", "checkpointing"),
}
# Flags that an Objective has under the same name.
OBJECTIVE_FLAGS = (
    *("zero_snr", "t_loc", "t_scale", "stratified", "weight", "gamma", "learn_sigma", "aligned"),
    *("lowres", "upsample", "noise_aug"),
)


def resolve(cfg: Config) -> Config:
    """Fill in what depends on other flags; refuse what cannot run, before anything is touched."""
    cfg = settle(cfg.squared(), cfg.objective, cfg.stage)
    preset_of(cfg)
    check_objective(cfg)
    tags = cfg.exclude_tags
    if not tags and cfg.stage == "stage2" and not cfg.init:
        # Once begun, the fine run is no longer needed.
        own = begun_with(Path(cfg.out) / cfg.name, "exclude_tags", ())
        tags = tuple(begun_with(fine_run(cfg), "exclude_tags", ()) if own is None else own)
    return replace(cfg, exclude_tags=tags or embedded_tags(cfg.data, cfg.stage))


def settle(cfg: Any, *words: str) -> Any:
    """The part of resolve() that Data, Optim and Run need. words: of the default --name."""
    dispatch.chosen()
    check_flags(cfg)
    check_batch(cfg.batch, cfg.accum)
    check_averages(cfg)
    check_mirrors(cfg.log)
    cfg = with_weights(cfg)
    # im/ and im are one.
    place = str(Path(cfg.data)) if Path(cfg.data).exists() else cfg.data
    name, table = run_name(cfg.name, place, *words), said_table(cfg.table, cfg.betas, cfg.zero_snr)
    return replace(cfg, data=place, name=name, table=table, betas="")


def check_objective(cfg: Config) -> None:
    """Refuse what cannot be trained."""
    check_table(cfg)
    try:
        objective_of(cfg)
    except ValueError as error:
        raise UserError(f"--objective {cfg.objective}: {error}", do="Change that flag.") from None
    if cfg.objective == "cfm":
        check_enlarging(cfg)


def objective_of(cfg: Config, latent_shape: tuple[int, int, int] = (0, 32, 32)) -> Objective:
    """The objective that the flags describe. latent_shape (C, H, W): --shift auto depends on it."""
    shift = resolution_shift(*latent_shape[1:]) if cfg.shift == "auto" else cfg.shift
    coupling = "lowres" if cfg.objective == "cfm" else cfg.coupling
    flags = {key: getattr(cfg, key) for key in OBJECTIVE_FLAGS}
    # Without a value, these are the objective's own.
    flags |= {key: getattr(cfg, key) for key in ("target", "table", "density") if getattr(cfg, key)}
    return make_objective(
        cfg.objective, shift=shift, loss_type=cfg.loss, coupling=coupling, **flags
    )


# ---- pure functions of images seen --------------------------------------------------------------


def learning_rate(seen: int, cfg: Any) -> float:
    """Linear warm-up, then constant or half a cosine: of images, not of steps or ranks."""
    warm = cfg.warmup * cfg.images
    if seen < warm:
        return cfg.lr * (seen + cfg.batch) / (warm + cfg.batch)
    if cfg.decay == "constant":
        return cfg.lr
    rest = max(cfg.images - warm, 1)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (seen - warm) / rest))


def due(seen: int, every: int, batch: int) -> bool:
    """Did the last step cross a multiple of `every`?"""
    return every > 0 and seen // every > (seen - batch) // every


# ---- what is trained ----------------------------------------------------------------------------


@dataclass
class ObjectiveLoss:
    """The loss of a run: its objective's, on the latents of a batch.

    Another loss (distill.py has one) is an object with the same attributes.
    """

    cfg: Config
    ranks: Ranks
    vae: AnyVAE
    objective: Objective
    texts: Any = None

    # How the run's samples are drawn, as arguments of sample(); None = like any network's.
    drawing: ClassVar[dict[str, Any] | None] = None

    @property
    def per_part(self) -> str:
        """The flag, if one is on, that makes a step depend on how ranks and --accum split it."""
        # It pairs noise and data within a micro-batch.
        return "--coupling ot" if self.objective.coupling == "ot" else ""

    def __call__(self, net: Any, batch: dict[str, Tensor]) -> Loss:
        """The loss of a collated batch, which brings everything random with it."""
        batch = {key: x.to(self.ranks.device, non_blocking=True) for key, x in batch.items()}
        batch = self.texts.heard(batch) if self.texts else batch
        cond = {key: batch[key] for key in ("y", "context") if key in batch}
        # Outside autocast: only the network runs in bf16.
        x0, kind = latents_of(self.vae, batch), self.objective
        if self.cfg.shift == "auto":
            kind = replace(kind, shift=resolution_shift(*x0.shape[2:]))
        if kind.coupling == "lowres":
            cond["low"] = data.low_latents_of(self.vae, batch, x0, kind.lowres, kind.upsample)
        drawn = {key: batch.get(key) for key in ("eps", "t", "q", "position")}
        with autocast(self.ranks.device, self.cfg.dtype):
            return kind.loss(net, x0, strata=self.cfg.batch, **drawn, **cond)

    def report(self) -> dict[str, Any]:
        """More for the training line of the log. Every rank calls it."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """More tensors that an exact resume needs, the same on every rank. Every rank calls it."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of state_dict()."""


# ---- setting up ---------------------------------------------------------------------------------


def setup(cfg: Config, ranks: Ranks) -> Trainer:
    """Open the data, fit or load the autoencoder, build the network, take up a checkpoint.

    Everything that can be wrong is found before the first byte is written.
    """
    run = Path(cfg.out) / cfg.name
    ds = cfg.open_data()
    classes, labels = data.classes_of(ds, cfg.classes) if cfg.classes else ([], None)
    start, other, meta = "", None, None
    if not checkpoints(run):
        start = cfg.init or (str(fine_run(cfg)) if cfg.stage == "stage2" else "")
    if start:
        other = open_like(start, preset_of(cfg), cfg.model)
        meta = other.meta
    if ranks.rank == 0:
        print(ds.report, flush=True)
    known = {"meta": meta, "network": f"--init {cfg.init}" if cfg.init else start}
    # What was kept counts from the first checkpoint on, which says whether it is the run's own.
    kept = run / "vae.safetensors" if checkpoints(run) else None
    name = vae_name(cfg, run)
    chosen = ranks.broadcast(lambda: data.vae_for(ds, name, kept=kept, **known).meta())
    vae = vae_from_meta(chosen).to(ranks.device)
    objective = objective_of(cfg, vae.latent_shape(cfg.resolution))
    like, sizes = preset_of(cfg), cfg.bucket_sizes()
    unet = network_config(like, cfg.model, vae, objective, cfg.resolution, len(classes), sizes)
    torch.manual_seed(torch_seed(cfg.seed))
    net = build(unet)
    init = {"path": None, "fingerprint": None}
    if start:
        if cfg.aligned:
            check_aligned(objective, meta, start)
        if cfg.stage == "stage2" and ranks.rank == 0:
            print_unfinished(start, meta)
        line = take_weights(net, other, classes, f"--init {start}")
        if line and ranks.rank == 0:
            print(line, flush=True)
        init = {"path": start, "fingerprint": fingerprint(net.state_dict())}
    return assemble(cfg, ranks, ds, vae, objective, net, classes, labels, init)


def assemble(
    cfg: Any,
    ranks: Ranks,
    ds: Dataset,
    vae: AnyVAE,
    objective: Objective,
    net: torch.nn.Module,
    classes: list[str],
    labels: Any,
    init: dict[str, Any],
    make_loss: Callable[[Trainer], Any] | None = None,
) -> Trainer:
    """Begin the run's folder and put its parts together: from here on something is written.

    make_loss(trainer) returns an object like ObjectiveLoss. It may keep parts of the trainer, but
    not the trainer itself: in a cycle it would hold on to the folder's lock.
    """
    run, held = Path(cfg.out) / cfg.name, None
    check_room(run, net, vae, cfg, ranks)
    check_plan(net, vae, largest_shape(cfg, vae), cfg, ranks)
    texts = texts_of(cfg, ds, net.cfg, ranks, init.get("text"))
    cfg = settle_dtype(cfg, ranks, net, vae.latent_shape(cfg.resolution))
    if ranks.rank == 0:
        make_dir(run)
        held = lock(run)
        # The config comes first: the rest is only taken up under it.
        write_text(run / "config.json", json.dumps(asdict(cfg), indent=1) + "\n")
        save_vae(run / "vae.safetensors", vae, weights=False)
    init = cast_weights(net, init, cfg)
    net.checkpointing = cfg.checkpointing
    # First: sharded, the network's parameters are other ones.
    model = parallel(net, cfg, ranks)
    parts = (cfg, ranks, run, ds, vae, objective, net, model)
    tr = Trainer(*parts, make_optimizer(net, cfg), EMA.of(net, cfg), classes, labels, init, held)
    tr.take_texts(texts)
    tr.loss = make_loss(tr) if make_loss else ObjectiveLoss(cfg, ranks, vae, objective, texts)
    tr.late, tr.repeat = reads_late(tr), repeater(tr)
    if checkpoints(run):
        load_state(tr)
    return tr


# ---- a step -------------------------------------------------------------------------------------


def positions(cfg: Any, ranks: Ranks, seen: int) -> Iterator[list[int]]:
    """The sample positions of each of this rank's micro-batches, from `seen` to the run's end."""
    micro = cfg.batch // (ranks.world * cfg.accum)
    for step in range(seen, cfg.images, cfg.batch):
        for start in range(step + ranks.rank * micro, step + cfg.batch, ranks.world * micro):
            yield list(range(start, start + micro))


def step(tr: Trainer, loader: Iterator[dict[str, Tensor]]) -> Tensor:
    """One optimizer step on cfg.batch images; returns the gradient norm ().

    A non-finite one changes no weight.
    """
    cfg, batches, losses = tr.cfg, [], []
    for group in tr.optimizer.param_groups:
        group["lr"] = learning_rate(tr.seen, cfg)
    for i in range(cfg.accum):
        batch = next(loader)
        if tr.ranks.world > 1:
            # DistributedDataParallel: all-reduce once a step, not once a micro-batch.
            tr.model.require_backward_grad_sync = i == cfg.accum - 1
        if getattr(tr.net.cfg, "dropout", 0):
            # Masks too are a function of position.
            torch.manual_seed(step_seed(cfg.seed, int(batch["position"][0])))
        losses.append(tr.repeat(partial(gradients, tr), batch))
        batches.append(batch)
    # Of the step before: on a GPU it is not known earlier whether that was finite.
    conclude(tr)
    for t, per_sample in losses:
        tr.meter.add(t, per_sample)
    norms, names = gradient_norms(tr)
    tr.seen += cfg.batch
    if tr.late or torch.isfinite(norms[0]):
        update(tr, norms[0])
    tr.taken = taken(norms, names, batches)
    if not tr.late:
        conclude(tr)
    tr.optimizer.zero_grad(set_to_none=True)
    return norms[0]


def gradients(tr: Trainer, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Add the gradients of a micro-batch; its times and losses, (B,) each."""
    loss = tr.loss(tr.model, batch)
    (loss.loss / tr.cfg.accum).backward()
    return loss.t, loss.per_sample.detach()


def update(tr: Trainer, norm: Tensor) -> None:
    """Clip and step; nothing, if the norm is not finite. conclude() averages."""
    if isinstance(tr.optimizer, AdamW8bit):
        # It clips and averages in the same pass.
        pairs = [] if tr.ema.aside else tr.ema.pairs(tr.seen, tr.cfg.batch)
        tr.optimizer.step(clip=tr.cfg.clip or None, norm=norm, ema=pairs)
        return
    if tr.cfg.clip:
        torch.nn.utils.clip_grads_with_norm_(tr.params.values(), tr.cfg.clip, norm)
    if tr.late:
        # A name of torch's: where it is 1, a fused step changes nothing.
        tr.optimizer.found_inf = (~torch.isfinite(norm)).float()
    tr.optimizer.step()


def report(tr: Trainer, log: Log, progress: Progress, norm: Tensor, lr: float) -> None:
    """The training line of the log, and what of it is shown."""
    conclude(tr)
    row = {"event": "train", "images": tr.seen, **tr.meter.read()}
    # JSON has no NaN.
    row["grad_norm"] = float(norm) if torch.isfinite(norm) else None
    row |= {"lr": lr, "images_per_s": progress.rate(tr.seen), "skipped": tr.skipped}
    row |= tr.loss.report() | proof.summary()
    log.write(row)
    progress.show(row)


# ---- the loop -----------------------------------------------------------------------------------


def train(
    cfg: Any, ranks: Ranks, setup: Callable[[Any, Ranks], Trainer] = setup, free: set[str] = FREE
) -> bool:
    """Train until cfg.images have been seen or a signal asks to stop; save, and show samples.

    True if a signal came, also while the samples were drawn.
    """
    # From here on, also while the data is being read.
    stop, cfg = StopSignal(), as_begun(cfg)
    if is_finished(cfg, ranks, free):
        return False
    tr = setup(cfg, ranks)
    if ranks.rank == 0:
        print_start(tr.run, tr.seen, cfg.images, tr.init["path"])
    fid = FID(asdict(tr.cfg), cfg.name, ranks) if cfg.fid_every else None
    facts = {
        "config": asdict(tr.cfg),
        "params": sum(p.numel() for p in tr.net.parameters()),
        "init": tr.init,
        "data_hash": tr.data_hash,
        "used": len(tr.ds),
        "held_out": len(tr.ds.heldout),
    }
    log = Log(tr.run, cfg.log, ranks, tr.seen, facts)
    progress = Progress(tr.seen, cfg.images, ranks)
    # The loader's worker processes end here, whatever happens.
    with contextlib.closing(load(tr)) as loader:
        while tr.seen < cfg.images and not stop.asked(ranks):
            lr = learning_rate(tr.seen, cfg)
            norm = step(tr, loader)
            progress.update(cfg.batch)
            if is_due(tr, cfg.log_every):
                report(tr, log, progress, norm, lr)
            with progress.paused():
                if is_due(tr, cfg.eval_every) and len(tr.ds.heldout):
                    log.write(held_out_loss(tr))
                if fid and is_due(tr, cfg.fid_every):
                    name, net = ema_net(tr)
                    log.write(fid(partial(draw_samples, tr, net, strict=True), tr.seen, name))
                    del net  # --ema-device cpu: it is a copy on the GPU
                if due(tr.seen, cfg.preview_every, cfg.batch):
                    preview(tr)
                if due(tr.seen, cfg.save_every, cfg.batch):
                    conclude(tr)
                    save(tr)
    progress.close()
    finish(tr)
    return stop.asked(ranks)


def is_due(tr: Trainer, every: int) -> bool:
    """due(), and at the end of the run; 0 = never."""
    return every > 0 and (tr.seen >= tr.cfg.images or due(tr.seen, every, tr.cfg.batch))


def load(tr: Trainer) -> Iterator[dict[str, Tensor]]:
    """The batches of this rank from here to the end of the run."""
    cfg, ranks = tr.cfg, tr.ranks
    workers = cfg.workers
    if workers < 0:
        workers = data.workers_for(tr.ds, ranks.world, ranks.device)
    groups = positions(cfg, ranks, tr.seen)
    return data.batches(tr.stream, groups, workers, pin=ranks.device.type == "cuda")


def finish(tr: Trainer) -> None:
    """Save; then either say how to go on, or draw the final grid. Its path is printed last."""
    conclude(tr)
    if images_seen(tr.run) != tr.seen:
        save(tr)
    if tr.seen < tr.cfg.images:
        if tr.ranks.rank == 0:
            of = f"{tr.seen:,} of {tr.cfg.images:,} images"
            print(f"stopped and saved at {of}.  The same command continues.")
        return
    # The noise of a stochastic sampler corrects what a young network gets wrong; an ODE keeps it
    # as grain. From a source that is not noise, only an ODE goes.
    how = {"method": "ddim", "eta": 1.0, "steps": 50}
    if tr.objective.coupling == "lowres":
        how = {"method": "heun", "steps": 25}
    images = draw_samples(tr, ema_net(tr)[1], range(32), **how)
    if tr.ranks.rank == 0:
        save_grid(images, tr.run / FINAL, columns=8)
        print_end(tr.run, tr.seen)


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    cfg = resolve(cfg)
    if dry_run:
        show_plan(cfg, objective_of(cfg))
        return
    ranks = join_ranks(cfg.device)
    train(cfg, ranks)
    ranks.leave()


if __name__ == "__main__":
    cli(main)
