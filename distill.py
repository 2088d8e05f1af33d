"""Distil a teacher into a student of another objective, with an assessor that weighs the blocks.   The same command again resumes.
    python distill.py --teacher runs/toyfaces-ddpm-standard                       # eps -> v, as the source does; --objective fm: a flow
    python distill.py pretrain-assessor --teacher runs/toyfaces-ddpm-standard --out assessor.safetensors                     # has a --help
    python distill.py --teacher runs/toyfaces-ddpm-standard --assessor david --assessor-file assessor.safetensors
    python distill.py --mode progressive --teacher runs/toyfaces-fm-standard --objective fm --start-steps 8 --end-steps 1
    python distill.py ablate --teacher runs/toyfaces-ddpm-standard --assessor-file assessor.safetensors --seeds 0,1,2        # has a --help

    loss = L_flow + block_weight · Σ_b λ_b (kd_weight · KD_b [+ local_b])
    λ_b  = clip(w_b (1 + α e_t + β e_p + δ (1 - coh)), 0.5, 3)

L_flow compares the student with what the teacher implies at the same noised image; KD_b is 1 - cos of a block's features, student
and teacher, averaged over space; e_t, e_p and coh are the assessor's (assessor.py). This is AbstractPhil's sd15-flow-matching
("Sol"), whose hypothesis, that such weights help, was never tested: `ablate` does. Where its code and its description differ
(no data, a dead λ, another schedule, a shift in the wrong direction), this follows the description; flags bring the rest back.
A run is a folder as train.py makes it, and train.py's loop is what runs.
"""

if __name__ == "__main__":
    import harness.interrupt  # noqa: F401

import json
import sys
import weakref
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data.dataset as data
import train
from distillation.assessor import Assessor, AssessorConfig, block_weights, fresh_assessor, fuse, kd_cosine, load_assessor
from distillation.pretrain import Pretrain, pretrain
from harness.run import TIME_BINS, checkpoints
from ckpt import find_checkpoint, fingerprint, load_strict, load_unet, open_unet, read_tensors
from harness.cli import UserError, cli, parse
from harness.ranks import autocast
from data.dataset import open_dataset
from distill_flags import READS, resolve
from data.dataset import latents_of
from model import PRESETS, UNet
from objectives import Loss
from diffusion.schedules import norm
from harness.ranks import Ranks, join_ranks
from samplers import time_grid
from train import objective_of
from distillation.teacher import Teacher, open_teacher, read_texts, student_config, tap_channels, tapped, taps, teacher_vae, v_target
from distillation.timesteps import TimestepSampler, bins_of, make_sampler
from vae import AnyVAE, vae_from_meta

__all__ = ["Assessor", "fuse", "kd_cosine", "v_target"]


@dataclass(frozen=True)
class Config(train.Config):
    # the teacher, and what follows from it
    teacher: str = ""                    # a run, a file, a diffusers folder, hf:org/name[/file]
    teacher_objective: Literal["", "eps", "v", "x0", "fm"] = ""   # of a file that does not say
    teacher_table: Literal["", "linear", "cosine", "scaled_linear"] = ""   # of a file that does not say
    context: str = ""                    # text embeddings, for a teacher that takes text (teacher.py)
    data: str = ""                       # "" = what the teacher was trained on, with its stage, excluded tags and held-out images
    stage: Literal["", "standard", "fine", "stage2"] = ""   # "" = the teacher's, or standard with --data
    holdout: float | None = None         # share of the images kept for the held-out loss; if not given, the teacher's, or 0.02 with --data
    resolution: int = 0                  # 0 = the teacher's
    vae: str = ""                        # "" = the teacher's
    # the student
    model: str = ""                      # "" = the teacher's architecture; else a preset
    init: str = ""                       # "" = the teacher's weights | scratch | a run, a file …
    objective: Literal["v", "fm"] = "v"  # v on the teacher's own schedule, as the source; fm = the linear path
    batch: int = 64                      # global; split over ranks and --accum
    lr: float = 1e-4                     # peak
    weight_decay: float = 1e-3           # AdamW
    # the loss
    mode: Literal["flow", "progressive"] = "flow"   # progressive: one step of the student is two of the teacher
    start_steps: int = 8                 # progressive: the first teacher's
    end_steps: int = 1                   # progressive: the last student's; halved from one to the other, a run each
    assessor: Literal["none", "david", "random", "shuffled", "const"] = "none"   # λ: none, w; david, assessed; random, by an untrained one; shuffled, other blocks'; const, --lambdas
    assessor_file: str = ""              # from pretrain-assessor
    block_weight: float = 0.05           # of the blocks' losses; 0 = vanilla
    kd_weight: float = 0.25              # of a block's KD
    local_heads: bool = False            # also predict the target from each block, through a 1×1 convolution
    block_weights: tuple[float, ...] = ()   # w_b in the order of the blocks; none = the source's, 0.7 … 1.2 … 0.7
    lambdas: tuple[float, ...] = ()      # const: λ_b in the order of the blocks; none = w_b
    alpha: float = 0.5                   # of e_t
    beta: float = 0.25                   # of e_p
    delta: float = 0.25                  # of 1 - coh
    lam_min: float = 0.5                 # bounds of λ
    lam_max: float = 3.0                 # …
    e_t: Literal["abs", "excess"] = "abs"   # excess = above the teacher's own, on the same batch
    coherence: Literal["alpha", "data"] = "alpha"   # alpha is the source's: a constant a block; data looks at the features
    x_source: Literal["data", "noise"] = "data"   # noise is the source's: no image ever enters
    # timesteps (timesteps.py)
    adaptive_t: bool = False             # drawn by the assessor's profile: a reconstruction
    shift_dir: Literal["noise", "clean"] = "noise"   # where --shift > 1 moves them
    base_jitter: int = 5                 # rows around a bin's centre
    adaptive_chaos: bool = True          # … more where patterns are hard to tell
    reliability: float = 0.15            # accuracy below which a bin has no say
    unreliable: Literal["neutral", "drop"] = "neutral"   # such bins: drawn as the others are on average, or never
    difficulty_gain: float = 1.0         # 0 = every bin alike
    importance: bool = False             # weigh samples so that the choice of bins has no effect on the mean


FREE = train.FREE - {"accum"} | {"teacher", "assessor_file", "context"}   # λ is of a micro-batch; files may move, their marks are compared
METRICS = ("lambda", "clipped", "kd", "e_t", "e_p", "coh")
ALARM = (0.5, 0.15, 0.7)                     # a third of the timesteps has this share of the gradient and so much more than unweighted; or this share


# ---- the trainer ----------------------------------------------------------------------------------------------------

@dataclass
class Distiller(train.Trainer):
    """A Trainer whose loss comes from a teacher."""
    teacher: Teacher = None                      # type: ignore[assignment]   # a dataclass wants a default here
    assessor: Assessor | None = None
    weights: Tensor = None                       # type: ignore[assignment]   # (n,) fp32: w, or the const arm's λ
    sampler: TimestepSampler | None = None
    tally: dict[str, Tensor] = field(default_factory=dict)                      # sums since the last line of the log
    alarmed: bool = False
    cleared: int = 0                                                            # non-finite steps after which the heads were cleared

    def __post_init__(self) -> None:
        super().__post_init__()
        n, device = len(self.weights), self.ranks.device
        shapes = {"blocks": (n, len(METRICS)), "batches": (1,), "share": (1,), "times": (TIME_BINS,), "thirds": (3, 3)}
        self.tally = {k: torch.zeros(shape, dtype=torch.float64, device=device) for k, shape in shapes.items()}
        self.heads, self.head_optimizer = nn.ModuleDict(), None
        if self.cfg.local_heads:                                                # before the first step, with an optimizer of their own
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.cfg.seed)
                heads = {name: nn.Conv2d(C, self.net.cfg.in_channels, 1) for name, C in tap_channels(self.net.cfg).items()}
            self.heads = nn.ModuleDict(heads).to(device)
            self.head_optimizer = torch.optim.AdamW(self.heads.parameters(), lr=self.cfg.lr, weight_decay=self.cfg.weight_decay)
            me = weakref.proxy(self)                                            # a cycle would keep the folder's lock
            self.optimizer.register_step_post_hook(lambda *_: me.step_heads())
        if self.teacher.texts:                                                  # previews and held-out images get the first caption
            text = self.teacher.text
            self.net.register_forward_pre_hook(lambda net, args, kwargs: (args, text(0, None, len(args[0])) | kwargs), with_kwargs=True)

    def forward(self, net: Any, batch: dict[str, Tensor]) -> Loss:
        """The distillation loss on a collated batch. Held-out images (another net than the one that trains) get L_flow alone."""
        cfg, training = self.cfg, net is self.model and torch.is_grad_enabled()
        if self.cleared != self.skipped:                                        # the last step's gradients were not finite: the heads' go too
            self.heads.zero_grad(set_to_none=True)
            self.cleared = self.skipped
        text = self.teacher.text(cfg.seed, batch.get("position"), len(batch["eps"]))
        batch = {k: v.to(self.ranks.device, non_blocking=True) for k, v in batch.items()}
        cond = ({"y": batch["y"]} if "y" in batch else {}) | text
        x0, eps = latents_of(self.vae, batch), batch["eps"]
        with autocast(self.ranks.device, cfg.dtype):
            if cfg.mode == "progressive":
                t, x, goals, theirs = self.two_steps(x0, eps, batch.get("q", batch.get("t")), cond)
                weight = torch.ones_like(t)
            else:
                t, weight = self.times(batch)
                x = self.teacher.noised(x0, eps, t, cfg.x_source)
                asked = t.clamp(*self.teacher.limits)                           # beyond its schedule, at its end of the same line x0 … eps
                *goals, theirs = self.teacher.ask(self.teacher.noised(x0, eps, asked, cfg.x_source), asked, **cond)
            mine: dict[str, Tensor] = {}
            student = tapped(net, taps(self.net.cfg), mine) if training and cfg.block_weight else net
            own = x / norm(t).view(-1, 1, 1, 1) if self.objective.table else x  # what the teacher saw, to the bit: goals mix to it up to rounding

            def answer(_: Tensor, row: Tensor, **c: Any) -> Tensor:
                out = student(own, row, **c)
                if training:
                    error = (out.detach().float() - self.objective.goal(*goals, t.view(-1, 1, 1, 1))).flatten(1).norm(dim=1)
                    out.register_hook(lambda g: self.count(t, g.float().flatten(1).norm(dim=1), error))
                return out
            loss = self.objective.loss(answer, goals[0], eps=goals[1], t=t, **cond)
            total = (loss.per_sample * weight).mean() if cfg.importance else loss.loss
            if mine:
                blocks, seen = self.block_loss(mine, theirs, t, goals)
                flow, total = total.detach(), total + cfg.block_weight * blocks
                good = torch.isfinite(total.detach())                           # train.py skips a step that is not; so does the log
                for name, value in {"blocks": seen, "batches": torch.ones_like(flow), "share": 1 - flow / total.detach()}.items():
                    self.tally[name] += finite(value) * good
        return Loss(total, loss.per_sample, t)

    def times(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(t (B,), importance weights (B,))."""
        if "t" in batch or self.sampler is None:
            t = batch["t"] if "t" in batch else self.objective.time(batch["q"])
            return t, torch.ones_like(t)
        rows, weight = self.sampler.draw(batch["q"].cpu())
        return self.teacher.time(rows).to(self.ranks.device), weight.to(self.ranks.device)

    def two_steps(self, x0: Tensor, eps: Tensor, q: Tensor, cond: dict[str, Tensor]) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], dict]:
        """Two steps of the teacher as one of the student (Salimans & Ho 2022): (t, x_t, (x0, eps) of the line they end on, features).

        The grid is samplers.time_grid's, so `samplers.py --method euler --steps N` walks it. On the linear path DDIM is Euler.
        """
        N, ask = self.cfg.end_steps, lambda x, t: self.teacher.ask(x, t.clamp(*self.teacher.limits), **cond)
        grid = time_grid(2 * N, t_start=self.objective.t_max).float().to(q.device)
        i = 2 * ((1 - q) * N).long().clamp(0, N - 1)
        t, middle, end = grid[i], grid[i + 1], grid[i + 2]
        column = lambda v: v.view(-1, 1, 1, 1)
        x = (1 - column(t)) * x0 + column(t) * eps
        a, b, features = ask(x, t)
        halfway = x + column(middle - t) * (b - a)
        a, b, _ = ask(halfway, middle)
        u = (halfway + column(end - middle) * (b - a) - x) / column(end - t)
        return t, x, (x - column(t) * u, x + (1 - column(t)) * u), features

    def block_loss(self, mine: dict[str, Tensor], theirs: dict[str, Tensor], t: Tensor, goals: Any) -> tuple[Tensor, Tensor]:
        """Σ_b λ_b (kd_weight · KD_b + local_b), and METRICS of each block (n, 6). No gradient goes through λ."""
        kd = torch.stack([kd_cosine(mine[name], theirs[name]) for name in theirs])
        lam, metrics = self.lambdas(mine, theirs, t)
        terms = self.cfg.kd_weight * kd
        if self.cfg.local_heads:
            goal = self.objective.goal(goals[0], goals[1], t.view(-1, 1, 1, 1))
            with torch.autocast(t.device.type, enabled=False):
                terms = terms + torch.stack([F.mse_loss(head(mine[name].float()), F.interpolate(goal, mine[name].shape[2:], mode="bilinear"))
                                             for name, head in self.heads.items()])
        return (lam * terms).sum(), torch.cat([metrics[:, :2], kd.detach()[:, None], metrics[:, 2:]], 1)

    def lambdas(self, mine: dict[str, Tensor], theirs: dict[str, Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
        """(λ (n,), what the log shows of each block (n, 5): λ, clipped, and from an assessor e_t, e_p, coh). Ranks agree."""
        cfg = self.cfg
        if self.assessor is None:
            return self.weights, F.pad(self.weights[:, None], (0, 4))
        bins = bins_of(self.teacher.row(t.clamp(*self.teacher.limits)), self.assessor.cfg.bins)
        assess = lambda features: torch.stack(list(self.assessor.assess(features, bins, cfg.coherence).values()))                # (n, 3)
        found = assess(mine)
        if cfg.e_t == "excess":
            found[:, 0] -= assess(theirs)[:, 0]
        e_t, e_p, coh = (self.ranks.all_reduce(found) / self.ranks.world).unbind(1)
        if cfg.e_t == "excess":
            e_t = e_t.clamp(min=0)                                              # of all ranks' samples together
        lam = fuse(e_t, e_p, coh, self.weights, alpha=cfg.alpha, beta=cfg.beta, delta=cfg.delta, lo=cfg.lam_min, hi=cfg.lam_max)
        if cfg.assessor == "shuffled":
            lam = lam.roll(len(lam) // 2)                                       # every block gets another's
        return lam, torch.stack([lam, ((lam <= cfg.lam_min) | (lam >= cfg.lam_max)).float(), e_t, e_p, coh], 1)

    def count(self, t: Tensor, gradient: Tensor, error: Tensor) -> None:
        """Where in time the samples are, the norms (B,) of the loss's gradient at the output, and of the error itself."""
        self.tally["times"].index_add_(0, (t * TIME_BINS).long().clamp(max=TIME_BINS - 1), torch.ones_like(t, dtype=torch.float64))
        good = torch.isfinite(gradient) & torch.isfinite(error)
        third = bins_of(self.teacher.row(t.clamp(*self.teacher.limits)), 3)
        self.tally["thirds"].index_add_(1, third, finite(torch.stack([gradient, error, torch.ones_like(error)]) * good))

    def step_heads(self) -> None:
        """The local heads' own step, after the network's; ranks share the gradient. One that is not finite is dropped, as there."""
        grads = [p.grad for p in self.heads.parameters()]                       # all there: heads are built only where their loss counts
        for g in grads:
            g.copy_(self.ranks.all_reduce(g) / self.ranks.world)
        if all(bool(torch.isfinite(g).all()) for g in grads):
            self.head_optimizer.param_groups[0]["lr"] = train.learning_rate(self.seen - self.cfg.batch, self.cfg)
            self.head_optimizer.step()
        self.head_optimizer.zero_grad(set_to_none=True)

    # ---- what train.py's loop asks for ----

    def report(self) -> dict[str, Any]:
        """For the training line: each block's λ, share of clipped, KD, e_t, e_p, coh; times drawn; shares of the gradient by third."""
        sums = {k: self.ranks.all_reduce(v.clone()).cpu() for k, v in self.tally.items()}
        for v in self.tally.values():
            v.zero_()
        row, names = {"t_drawn": [int(n) for n in sums["times"].tolist()]}, list(self.teacher.blocks)
        if batches := float(sums["batches"]):
            known = METRICS if self.assessor else METRICS[:3]                   # nobody assessed: nothing is said, rather than zero
            row["block_share"] = float(sums["share"]) / batches                 # of the loss
            row["blocks"] = {name: dict(zip(known, (v / batches).tolist())) for name, v in zip(names, sums["blocks"])}
        used, plain, counts = sums["thirds"]
        if float(used.sum()) > 0 and bool(torch.isfinite(used).all()):
            even = plain / counts.clamp(min=1)                                  # as if all thirds were drawn alike
            share, even = used / used.sum(), even / even.sum()
            worst = int(share.argmax())
            moved = share[worst] > ALARM[0] and share[worst] > even[worst] + ALARM[1]
            alarm = "weighting" if moved else "target" if share[worst] > ALARM[2] else ""
            alarm = "" if self.cfg.mode == "progressive" else alarm             # its times are its steps
            row |= {"gradient_by_third": share.tolist(), "gradient_by_third_unweighted": even.tolist(), "alarm": alarm}
            if alarm and not self.alarmed and self.ranks.rank == 0:
                why = {"weighting": "The way times are drawn and weighed does it.",
                       "target": "The target itself is largest there; --weight min_snr weighs noise down."}
                where = ("next to data", "in the middle", "next to noise")[worst]
                tqdm.write(f"warning: {share[worst]:.0%} of the gradient comes from the third of the timesteps {where}, "
                           f"{even[worst]:.0%} if all were drawn and weighed alike.  {why[alarm]}")
            self.alarmed = self.alarmed or bool(alarm)
        return row

    def state(self) -> dict[str, Tensor]:
        """Local heads with their optimizer, and the half-filled tally."""
        out = {f"tally/{k}": self.ranks.all_reduce(v.clone()).cpu() for k, v in self.tally.items()}
        out["alarmed/"] = torch.tensor(self.alarmed)
        for name, p in self.heads.named_parameters():
            out[f"heads/{name}"] = p.detach()
            out |= {f"head_{key}/{name}": v for key, v in self.head_optimizer.state.get(p, {}).items()}
        return out

    def by_parts(self) -> str:
        return "--coherence data" if self.assessor and self.cfg.coherence == "data" else ""

    def drawn(self, how: dict[str, Any]) -> dict[str, Any]:
        """A progressive student knows the times of its own steps only."""
        return {"method": "euler", "steps": self.cfg.end_steps} if self.cfg.mode == "progressive" else how

    def take_up(self, state: dict[str, Tensor]) -> None:
        params = dict(self.heads.named_parameters())
        for key, value in state.items():
            kind, name = key.split("/", 1)
            if kind == "tally":
                self.tally[name].copy_(value if self.ranks.rank == 0 else torch.zeros_like(value))
            elif kind == "alarmed":
                self.alarmed = bool(value)
            elif kind == "heads":
                params[name].data.copy_(value)
            else:                                                               # AdamW counts its steps on the CPU
                place = "cpu" if kind == "head_step" else self.ranks.device
                self.head_optimizer.state[params[name]][kind.removeprefix("head_")] = value.to(place, copy=True)


class AsLoss:
    """What the training loop calls a loss, of a Distiller."""

    def __init__(self, tr: Distiller):
        self.tr = weakref.proxy(tr)                                             # a cycle would keep the folder's lock

    def __call__(self, net: Any, batch: dict[str, Tensor]) -> Loss:
        return self.tr.forward(net, batch)

    def report(self) -> dict[str, Any]:
        return self.tr.report()

    def state_dict(self) -> dict[str, Tensor]:
        return self.tr.state()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.tr.take_up(state)

    @property
    def per_part(self) -> str:
        return self.tr.by_parts()

    @property
    def drawing(self) -> dict[str, Any] | None:
        return self.tr.drawn({}) or None


def finite(x: Tensor) -> Tensor:
    """x as float64, with 0 for what is not finite."""
    return x.double().nan_to_num(0.0, 0.0, 0.0)


# ---- setting up -----------------------------------------------------------------------------------------------------

def setup(cfg: Config, ranks: Ranks) -> Distiller:
    """Teacher, data, student and assessor. Everything that can be wrong is found before the first byte is written."""
    run, device = Path(cfg.out) / cfg.name, ranks.device
    teacher = open_teacher(cfg.teacher, cfg.teacher_objective, cfg.teacher_table, cfg.context, device)
    ds = open_dataset(cfg.data, stage=cfg.stage, exclude_tags=cfg.exclude_tags, resolution=cfg.resolution, holdout=cfg.holdout,
                      crop=cfg.crop, flip=cfg.flip)
    if ranks.rank == 0:
        print(ds.report, flush=True)
    classes, labels = data.classes_of(ds, cfg.classes) if cfg.classes else ([], None)
    if len(classes) != teacher.net.cfg.num_classes:
        raise UserError(f"--classes has {len(classes)}, but the teacher knows {teacher.net.cfg.num_classes}.  "
                        "Leave it out, if the teacher's file names them.")
    vae = teacher_vae(cfg, teacher.meta, ds).to(device)
    teacher.check_latents(vae, cfg.resolution)
    unet = student_config(teacher.net.cfg, PRESETS[cfg.model] if cfg.model else None)
    w = torch.tensor(cfg.lambdas or cfg.block_weights or list(block_weights(teacher.net.cfg).values()), device=device)
    if cfg.assessor not in READS and not cfg.lambdas:                           # λ itself, within the bounds of the others
        w = w.clamp(cfg.lam_min, cfg.lam_max)
    if cfg.block_weight and tap_channels(unet) != tap_channels(teacher.net.cfg):
        raise UserError(f"--model {cfg.model} has blocks {tap_channels(unet)}, the teacher {tap_channels(teacher.net.cfg)}: they cannot be "
                        "compared.  Choose another student, or --block-weight 0.")
    assessor = open_assessor(cfg, teacher)
    shift, sampler = cfg.shift if cfg.shift_dir == "noise" else 1 / cfg.shift, None
    if cfg.adaptive_t:
        sampler = make_sampler(assessor.accuracy, assessor.entropy, shift=shift, base_jitter=cfg.base_jitter, chaos=cfg.adaptive_chaos,
                               threshold=cfg.reliability, unreliable=cfg.unreliable, gain=cfg.difficulty_gain)
    if sampler and ranks.rank == 0:
        print(f"timesteps: {int(sampler.reliable.sum())} of {len(sampler.p)} bins are reliable (accuracy ≥ {cfg.reliability:g})" +
              ("; none is, so all rows are drawn alike." if not sampler.reliable.any() else "."), flush=True)
    torch.manual_seed(cfg.seed)
    net = UNet(unet)
    start = begin(cfg, teacher, net, vae) if not checkpoints(run) else None
    init = {"path": start, "fingerprint": fingerprint(net.state_dict()) if start else None, **marks_of(cfg, teacher.fingerprint, teacher.texts)}
    # Uniform times, as the source's; train.py's preset for fm is logit_normal.
    objective = objective_of(replace(cfg, shift=shift, density=cfg.density or "uniform"), vae.latent_shape(cfg.resolution))
    return train.assemble(cfg, ranks, ds, vae, objective, net, classes, labels, init, AsLoss, Distiller, teacher=teacher, weights=w, sampler=sampler,
                        assessor=assessor.to(device) if assessor and cfg.assessor in READS and cfg.block_weight else None)


def marks_of(cfg: Config, teacher: str, texts: dict[str, Tensor]) -> dict[str, str | None]:
    """What a run's targets and weights come from, by content."""
    judge = read_tensors(cfg.assessor_file)[1].get("fingerprint") if cfg.assessor_file else "made for the run" if cfg.assessor == "random" else None
    return {"teacher": teacher, "assessor": judge, "context": fingerprint(texts) if texts else None}


def run(cfg: Config, ranks: Ranks) -> bool:
    """train.train of a distillation, begun, taken up or finished; True if it was asked to stop. Files may have moved, but not changed."""
    folder = Path(cfg.out) / cfg.name
    if begun := checkpoints(folder):
        net, meta = load_unet(find_checkpoint(cfg.teacher))
        before = open_unet(begun[-1] / "model.safetensors").meta["init"]
        for what, mark in marks_of(cfg, meta["fingerprint"], read_texts(net.cfg, cfg.context)).items():
            if before.get(what) not in (None, mark):                            # a run that is older than a mark has none
                raise UserError(f"{getattr(cfg, 'assessor_file' if what == 'assessor' else what) or f'no {what}'} is not the {what} that {folder} began with "
                                "(its contents are others).  Put it back, or start under another --name.")
    return train.train(cfg, ranks, setup, FREE)


def begin(cfg: Config, teacher: Teacher, net: UNet, vae: AnyVAE) -> str | None:
    """Give a new student its first weights; returns where they came from."""
    if cfg.init == "scratch":
        return None
    if cfg.init:
        other, meta = load_unet(cfg.init, dtype=torch.float32)
        if "vae" in meta and vae_from_meta(meta["vae"]).fingerprint != vae.fingerprint:
            raise UserError(f"--init {cfg.init} was trained on other latents than the teacher.  Start from a network that shares them.")
        if meta.get("resolution", cfg.resolution) != cfg.resolution:
            raise UserError(f"--init {cfg.init} was trained at {meta['resolution']} pixels, the teacher at {cfg.resolution}.  "
                            "Start from a network of its size.")
        load_strict(net, other.state_dict(), f"--init {cfg.init}")
        return cfg.init
    weights = teacher.net.state_dict()
    half = {k: v[:net.cfg.out_channels] if k.startswith("out.2.") else v for k, v in weights.items()}       # without a learned variance
    load_strict(net, half, cfg.teacher)
    return cfg.teacher


def open_assessor(cfg: Config, teacher: Teacher) -> Assessor | None:
    """The assessor of an arm, or None; it must read this teacher's blocks and times."""
    if cfg.assessor not in READS and not cfg.adaptive_t:
        return None
    if not cfg.assessor_file:                                                   # --assessor random without one
        return fresh_assessor(AssessorConfig(tap_channels(teacher.net.cfg)), cfg.seed).frozen()
    net = load_assessor(cfg.assessor_file)
    wanted, path = tap_channels(teacher.net.cfg), lambda o: (o.get("table") or "the linear path") + ", zero SNR" * bool(o.get("zero_snr"))
    theirs, ours = path(net.meta.get("objective", {})), path(asdict(teacher.objective))
    if net.cfg.blocks != wanted:
        raise UserError(f"{cfg.assessor_file} reads blocks {net.cfg.blocks}, the teacher has {wanted}.  Pretrain one for this teacher.")
    if theirs != ours:
        raise UserError(f"{cfg.assessor_file} has its {net.cfg.bins} bins on the schedule {theirs}, the teacher is on {ours}.  Pretrain one for this teacher.")
    if net.meta.get("pretraining", {}).get("shuffle_time"):
        raise UserError(f"{cfg.assessor_file} was made with --shuffle-time, as a control: its times are wrong.  Pretrain one without.")
    if net.meta.get("teacher") != teacher.fingerprint:
        print(f"warning: {cfg.assessor_file} was trained on another teacher's features.", flush=True)
    if net.cfg.x_source != cfg.x_source:
        print(f"warning: {cfg.assessor_file} knows features of {net.cfg.x_source}, and --x-source is {cfg.x_source}.", flush=True)
    if cfg.assessor == "random":                                                # the placebo: same shape, same standardising, nothing learned
        fresh = fresh_assessor(net.cfg, cfg.seed)
        for name, companion in net.blocks.items():
            fresh.blocks[name].mean.copy_(companion.mean)
            fresh.blocks[name].std.copy_(companion.std)
        net = fresh.frozen()
    return net


def phases(cfg: Config) -> list[Config]:
    """A progressive run as one run for each halving, each the next one's teacher; any other config as it is."""
    if cfg.mode != "progressive":
        return [cfg]
    chain, steps = [], cfg.start_steps // 2
    while steps >= cfg.end_steps:
        phase = replace(cfg, name=f"{cfg.name}-{steps}", start_steps=2 * steps, end_steps=steps)
        if chain:                                                               # its teacher is the last student, and it starts as that
            phase = replace(phase, teacher=str(Path(cfg.out) / chain[-1].name), init="", model="", teacher_objective="", teacher_table="")
        chain, steps = [*chain, phase], steps // 2
    begun = [bool(checkpoints(Path(cfg.out) / phase.name)) for phase in chain]
    if True in begun and not all(begun[:begun.index(True)]):                    # found now, and not after the first phase was trained
        raise UserError(f"{Path(cfg.out) / chain[begun.index(True)].name} is of another chain: {chain[0].name}, which should come first, is not there.  "
                        "Repeat that chain's --start-steps, or start under another --name.")
    return chain


def main() -> None:
    command, argv = "train", sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        command, *argv = argv
    if command == "ablate":
        from experiments.ablate import main as ablate_main                                  # here, for it builds on this file
        return ablate_main(argv)
    if command not in ("train", "pretrain-assessor"):
        raise UserError(f"command {command!r} is not one of train, pretrain-assessor, ablate.  See --help.")
    kind = Pretrain if command == "pretrain-assessor" else Config
    cfg, dry_run = parse(kind, sys.modules[kind.__module__].__doc__, argv)
    if kind is Config:
        cfg = resolve(cfg)
    if dry_run:
        print(json.dumps(asdict(cfg), indent=1))
    elif kind is Pretrain:
        pretrain(cfg)
    else:
        ranks = join_ranks(cfg.device)
        for phase in phases(cfg):
            if run(phase, ranks):
                break
        ranks.leave()


if __name__ == "__main__":
    cli(main)
