"""Distil a teacher into a student of another objective, with an assessor that weighs the blocks.
    python distill.py --teacher runs/toyfaces-ddpm-standard      # eps -> v; --objective fm: a flow
    python distill.py pretrain-assessor --teacher RUN --out assessor.safetensors   # has a --help
    python distill.py --teacher RUN --assessor david --assessor-file assessor.safetensors
    python distill.py --teacher RUN --text bytes                 # of a network that reads captions
    python distill.py --mode progressive --teacher FLOW --objective fm --start-steps 8
    python experiments/ablate.py --teacher RUN …                 # does the assessor help?

    loss = L_flow + block_weight · Σ_b λ_b (kd_weight · KD_b [+ local_b])
    λ_b  = clip(w_b (1 + α e_t + β e_p + δ (1 - coh)), 0.5, 3)

L_flow compares the student with what the teacher implies at the same noised image; KD_b is 1 - cos
of a block's features, student and teacher, averaged over space; e_t, e_p and coh are the assessor's
(distillation/assessor.py). This is AbstractPhil's sd15-flow-matching ("Sol"), whose hypothesis,
that such weights help, was never tested: experiments/ablate.py does. Where its code and its
description differ (no data, a dead λ, another schedule, a shift in the wrong direction), this
follows the description; flags bring the rest back. A run is a folder as train.py makes it, and
train.py's loop is what runs. The same command again resumes.
"""

if __name__ == "__main__":
    import harness.interrupt  # noqa: F401

import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import train
from ckpt import find_checkpoint, fingerprint, load_strict, load_unet, open_checked, read_tensors
from ckpt.meaning import same_table
from data.captions import Captions
from data.dataset import classes_of, latents_of
from data.sources import embedded_tags
from diffusion.schedules import norm, shorter
from diffusion.solvers import time_grid
from distillation.assessor import (
    Assessor,
    AssessorConfig,
    block_weights,
    check_fits,
    fresh_assessor,
    fuse,
    kd_cosine,
    load_assessor,
)
from distillation.heads import LocalHeads
from distillation.pretrain import Pretrain, pretrain
from distillation.tally import Tally
from distillation.teacher import (
    Teacher,
    TeacherFlags,
    add_caption,
    describe_teacher,
    like_the_teacher,
    open_teacher,
    read_texts,
    student_config,
    tap_channels,
    tapped,
    taps,
    teacher_vae,
    v_target,
    without_variance,
)
from distillation.timesteps import TimestepSampler, bins_of, make_sampler
from harness.cli import UserError, check_flags, cli, closest, dashed, flag, flag_like, parse, shown
from harness.ranks import Ranks, autocast, join_ranks
from harness.run import TIME_BINS, checkpoints
from harness.seeds import torch_seed
from model import PRESETS, build, network_name
from objectives import Loss, Net, Objective, make_objective
from training.checkpoints import beginning
from training.sharding import Sharding
from training.start import take_weights
from training.texts import check_taught, student_preset
from vae import AnyVAE, vae_from_meta

__all__ = ["Assessor", "fuse", "kd_cosine", "v_target"]

READS = ("david", "random", "shuffled")  # arms that run an assessor

# With what other flags a flag has an effect.
FLOW = ("--mode flow",)
BLOCKS = ("--mode flow", "--block-weight")
ASSESSED = (*BLOCKS, "--assessor david | random | shuffled")
DRAWN = ("--mode flow", "--adaptive-t")
# The range of what a loss is weighed with.
WEIGHT = {"low": 0, "high": 1e6}


@dataclass(frozen=True)
class Config(TeacherFlags, train.Run, Sharding, train.Optim, Captions, train.Data):
    """The flags of this script: train.py's of data, optimiser and run, with other defaults; a
    teacher, a student, and what the one learns from the other."""

    data: str = flag_like(
        train.Data,
        "data",
        "",
        "none = what the teacher was trained on, with its stage, excluded tags and held-out images",
    )
    stage: Literal["", "standard", "fine", "stage2"] = flag_like(
        train.Data, "stage", "", "none = the teacher's, or standard with --data"
    )
    resolution: int = flag(0, "0 = the teacher's", low=0, high=8192)
    holdout: float | None = flag_like(
        train.Data,
        "holdout",
        None,
        "share of the images kept for the held-out loss; the teacher's, or 0.02 with --data",
    )
    batch: int = flag_like(train.Optim, "batch", 64)
    lr: float = flag_like(train.Optim, "lr", 1e-4)
    weight_decay: float = flag_like(train.Optim, "weight_decay", 1e-3)
    name: str = flag_like(train.Run, "name", "", "default <data>-distill-<objective>-<arm>")

    vae: str = flag("", "none = the teacher's")

    model: str = flag("", "none = the teacher's architecture; else a preset", head="the student")
    text: str = flag("", "bytes | clip-l:FILE: a picture's own captions and tags, not --context")
    init: str = flag("", "none = the teacher's weights | scratch | a run, a file …")
    objective: Literal["v", "fm"] = flag(
        "v", "v on the teacher's own schedule, as the source | fm, the linear path"
    )
    table: Literal["", "linear", "cosine", "scaled_linear", "gvp"] = flag_like(
        train.Config, "table", ""
    )
    betas: str = flag_like(train.Config, "betas", "")
    zero_snr: bool = flag_like(train.Config, "zero_snr", False)
    density: Literal["", "uniform", "logit_normal", "gaussian", "mode", "lognormal"] = flag(
        "", "of training times; uniform, as the source's", of=("--mode flow", "not --adaptive-t")
    )
    t_loc: float | None = flag(
        None,
        "its centre: logit_normal 0, gaussian 0.5, lognormal -1.2",
        low=-10,
        high=10,
        of="--density logit_normal | gaussian | lognormal",
    )
    t_scale: float | None = flag(
        None,
        "its width: logit_normal 1, gaussian 0.2, lognormal 1.2, mode 1.29",
        low=-1,
        high=10,
        of="--density logit_normal | gaussian | lognormal | mode",
    )
    shift: float = flag(
        1.0,
        "of training times; > 1 = more noise, or less (--shift-dir)",
        low=1e-3,
        high=1e3,
        of=FLOW,
        off=1.0,
    )
    shift_dir: Literal["noise", "clean"] = flag("noise", "where it moves them", of="--shift")
    loss: Literal["mse", "l1", "huber"] = flag_like(train.Config, "loss", "mse")
    weight: Literal["uniform", "min_snr", "soft_min_snr", "debiased", "cosmap"] = flag_like(
        train.Config, "weight", "uniform"
    )
    gamma: float = flag_like(train.Config, "gamma", 5.0)

    mode: Literal["flow", "progressive"] = flag(
        "flow", "progressive: one step of the student is two of the teacher", head="the loss"
    )
    start_steps: int = flag(8, "the first teacher's", low=2, high=1024, of="--mode progressive")
    end_steps: int = flag(
        1,
        "the last student's; halved from one to the other, a run each",
        low=1,
        high=512,
        of="--mode progressive",
    )
    assessor: Literal["none", "david", "random", "shuffled", "const"] = flag(
        "none",
        "λ: none | david, w: assessed | random, by an untrained one | shuffled, other blocks' | "
        "const, --lambdas",
        of=FLOW,
    )
    assessor_file: str = flag(
        "",
        "from pretrain-assessor",
        of=("--mode flow", "--assessor david | random | shuffled or --adaptive-t"),
    )
    block_weight: float = flag(0.05, "of the blocks' losses; 0 = vanilla", **WEIGHT, of=FLOW)
    kd_weight: float = flag(0.25, "of a block's KD", **WEIGHT, of=BLOCKS)
    local_heads: bool = flag(
        False, "also predict the target from each block, through a 1×1 convolution", of=BLOCKS
    )
    block_weights: tuple[float, ...] = flag(
        (),
        "w_b in the order of the blocks; none = the source's, 0.7 … 1.2 … 0.7",
        **WEIGHT,
        of=(*BLOCKS, "not --lambdas"),
    )
    lambdas: tuple[float, ...] = flag(
        (), "λ_b in the order of the blocks; none = w_b", **WEIGHT, of="--assessor const"
    )
    alpha: float = flag(0.5, "of e_t", low=-1e6, high=1e6, of=ASSESSED)
    beta: float = flag(0.25, "of e_p", low=-1e6, high=1e6, of=ASSESSED)
    delta: float = flag(0.25, "of 1 - coh", low=-1e6, high=1e6, of=ASSESSED)
    lam_min: float = flag(0.5, "lower bound of λ", **WEIGHT, of=BLOCKS)
    lam_max: float = flag(3.0, "upper bound of λ", **WEIGHT, of=BLOCKS)
    e_t: Literal["abs", "excess"] = flag(
        "abs", "excess = above the teacher's own, on the same batch", of=ASSESSED
    )
    coherence: Literal["alpha", "data"] = flag(
        "alpha", "alpha, the source's: a constant a block; data looks at features", of=ASSESSED
    )
    x_source: Literal["data", "noise"] = flag(
        "data", "noise is the source's: no image ever enters", of=FLOW
    )

    adaptive_t: bool = flag(
        False,
        "drawn by the assessor's profile: a reconstruction",
        of=FLOW,
        head="timesteps (distillation/timesteps.py)",
    )
    base_jitter: int = flag(5, "rows around a bin's centre", low=0, high=499, of=DRAWN)
    adaptive_chaos: bool = flag(True, "… more where patterns are hard to tell", of=DRAWN)
    reliability: float = flag(
        0.15, "accuracy below which a bin has no say", low=0, high=1, of=DRAWN
    )
    unreliable: Literal["neutral", "drop"] = flag(
        "neutral", "such bins: drawn as the others are on average, or never", of=DRAWN
    )
    difficulty_gain: float = flag(1.0, "0 = every bin alike", **WEIGHT, of=DRAWN)
    importance: bool = flag(
        False, "weigh samples so that the choice of bins has no effect on the mean", of=DRAWN
    )


# λ is of a micro-batch, so --accum is not free; files may move, for their contents are compared.
FREE = train.FREE - {"accum"} | {"teacher", "assessor_file", "context"}
# Flags that a distillation once had from train.py, and refused: they stand in the configs of old
# runs, at their defaults.
FREE |= {"target", "stratified", "learn_sigma", "aligned", "coupling"}
FREE |= {"lowres", "upsample", "noise_aug"}


# ---- the flags -----------------------------------------------------------------------------------


def resolve(cfg: Config) -> Config:
    """Fill in what follows from the teacher, and refuse what cannot run, before anything is read or
    written."""
    check_flags(cfg)
    unet, teacher, meta = describe_teacher(cfg.teacher, text=cfg.text, **cfg.says)
    check_taught(cfg.text, unet, cfg.teacher)
    cfg = like_the_teacher(cfg, meta)
    check_student(cfg, unet)
    check_blocks(cfg, tap_channels(unet))
    check_files(cfg)
    arm = cfg.assessor if cfg.block_weight else "vanilla"
    if cfg.mode == "progressive":
        check_halving(cfg, teacher)
        arm = "progressive"
    cfg = on_its_path(train.settle(cfg, "distill", cfg.objective, arm), teacher)
    check_objective(cfg)
    tags = cfg.exclude_tags or embedded_tags(cfg.data, cfg.stage)
    # A progressive student learns from outputs alone.
    block_weight = 0.0 if cfg.mode == "progressive" else cfg.block_weight
    return replace(cfg, exclude_tags=tags, block_weight=block_weight)


def check_student(cfg: Config, teacher: Any) -> None:
    """--model: a network of its teacher's kind, that is given what its teacher is given."""
    if not cfg.model:
        return
    if cfg.model not in PRESETS:
        raise UserError(
            f"--model {cfg.model!r} is not a preset",
            do=f"{closest(cfg.model, PRESETS)}  Known: {', '.join(PRESETS)}.",
        )
    if not cfg.init:
        raise UserError(
            f"--model {cfg.model} with the teacher's weights",
            do="Leave --model out for its architecture, or add --init scratch or FILE.",
        )
    student = student_preset(cfg)
    if type(student) is not type(teacher):
        raise UserError(
            f"--model {cfg.model} is a {network_name(student)}, and the teacher a "
            f"{network_name(teacher)}",
            do="Choose a preset of its kind.",
        )
    dims, wanted = text_dims(student), text_dims(teacher)
    if dims != wanted:
        raise UserError(
            f"--model {cfg.model} takes text embeddings of {dims} numbers (0 = none), the teacher "
            f"of {wanted}",
            do="Choose a preset that takes what the teacher takes.",
        )


def text_dims(cfg: Any) -> str:
    """Of what a network is told beside classes: its tokens and its vector."""
    return f"{cfg.context_dim} and {cfg.vector_dim}"


def check_blocks(cfg: Config, blocks: dict[str, int]) -> None:
    """The weights of the blocks, and of their losses."""
    if cfg.lam_min > cfg.lam_max:
        raise UserError(
            f"--lam-min {cfg.lam_min} is above --lam-max {cfg.lam_max}", do="Exchange them."
        )
    for name in ("block_weights", "lambdas"):
        values = getattr(cfg, name)
        if values and len(values) != len(blocks):
            raise UserError(
                f"{dashed(name)} {shown(values)}",
                wanted=f"{len(blocks)} numbers from 0, for {', '.join(blocks)}",
                do="Give one a block.",
            )
    if cfg.block_weight and not cfg.kd_weight and not cfg.local_heads:
        raise UserError(
            "--kd-weight 0 leaves the blocks no loss without --local-heads",
            do="If that is meant: --block-weight 0.",
        )


def check_files(cfg: Config) -> None:
    adaptive = " --adaptive-t" if cfg.adaptive_t else ""
    if (cfg.assessor in ("david", "shuffled") or adaptive) and not cfg.assessor_file:
        raise UserError(
            f"--assessor {cfg.assessor}{adaptive} needs --assessor-file",
            do=f"Make one: python distill.py pretrain-assessor --teacher {cfg.teacher}",
        )
    if cfg.assessor_file and not Path(cfg.assessor_file).is_file():
        raise UserError(
            f"no assessor at {cfg.assessor_file}",
            wanted="a file that pretrain-assessor wrote",
            do="Check the name.",
        )


def on_its_path(cfg: Config, teacher: Objective) -> Config:
    """A student of v is on the teacher's own schedule."""
    if cfg.objective != "v" or not teacher.table:
        return cfg
    if cfg.table and not same_table(cfg.table, teacher.table):
        raise UserError(
            f"--table {shorter(cfg.table)}, but the teacher's schedule is "
            f"{shorter(teacher.table)}, and the student's v is on it",
            do="Leave it out.",
        )
    if cfg.zero_snr and not teacher.zero_snr:
        raise UserError(
            "--zero-snr, but the teacher's schedule does not end in pure noise, and the student's "
            "v is on it",
            do="Leave it out.",
        )
    return replace(cfg, table=teacher.table, zero_snr=teacher.zero_snr)


def check_halving(cfg: Config, teacher: Objective) -> None:
    """Progressive: numbers of steps, and the path."""
    ratio, rest = divmod(cfg.start_steps, cfg.end_steps)
    if rest or ratio < 2 or ratio.bit_count() != 1:
        raise UserError(
            f"--start-steps {cfg.start_steps} does not become --end-steps {cfg.end_steps} by "
            "halving",
            do="Use powers of two, such as 8 and 1.",
        )
    wanted = "v" if teacher.table else "fm"
    if cfg.objective != wanted:
        raise UserError(
            f"--objective {cfg.objective}: a progressive student stays on its teacher's path, "
            f"{shorter(teacher.table) or 'the linear one'}",
            do=f"Use --objective {wanted}.",
        )


def shift_of(cfg: Config) -> float:
    """Of the training times; > 1 = towards noise."""
    return cfg.shift if cfg.shift_dir == "noise" else 1 / cfg.shift


def check_objective(cfg: Config) -> None:
    try:
        student_objective(cfg)
    except ValueError as error:
        raise UserError(f"--objective {cfg.objective}: {error}", do="Change that flag.") from None


def student_objective(cfg: Config) -> Objective:
    """What the student is trained to say."""
    table = {"table": cfg.table} if cfg.table else {}
    return make_objective(
        cfg.objective,
        # As the source's; train.py's preset for fm is logit_normal.
        density=cfg.density or "uniform",
        shift=shift_of(cfg),
        t_loc=cfg.t_loc,
        t_scale=cfg.t_scale,
        zero_snr=cfg.zero_snr,
        loss_type=cfg.loss,
        weight=cfg.weight,
        gamma=cfg.gamma,
        **table,
    )


# ---- the loss ------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What a teacher says of noised images."""

    t: Tensor  # (B,) where, on the linear path
    x: Tensor  # (B, C, H, W) the noised images
    x0: Tensor  # (B, C, H, W) what it takes for the image …
    eps: Tensor  # (B, C, H, W) … and for the noise: the student's goal
    features: dict[str, Tensor]  # of its blocks
    weight: Tensor  # (B,) of the samples, for importance sampling


@dataclass
class DistillLoss:
    """The loss of a student, as train.Trainer holds one (see train.ObjectiveLoss)."""

    cfg: Config
    ranks: Ranks
    vae: AnyVAE
    objective: Objective  # the student's
    net: torch.nn.Module  # the student, without what wraps it in training
    teacher: Teacher
    weights: Tensor  # (n,) fp32: w, or λ where no assessor weighs
    assessor: Assessor | None = None
    sampler: TimestepSampler | None = None
    heads: LocalHeads | None = None
    texts: Any = None  # of --text (training/texts.py)
    tally: Tally = field(init=False)
    parts: int = field(init=False, default=0)  # of --accum, since the run began

    def __post_init__(self) -> None:
        self.tally = Tally(
            list(self.teacher.blocks),
            self.ranks,
            assessed=self.assessor is not None,
            bins=TIME_BINS,
            # The times of a progressive student are its steps: no choice of ours.
            alarms=self.cfg.mode != "progressive",
        )

    @property
    def per_part(self) -> str:
        """The flag, if one is on, that makes a step depend on how its batch is split over ranks and
        --accum."""
        return "--coherence data" if self.assessor and self.cfg.coherence == "data" else ""

    @property
    def drawing(self) -> dict[str, Any] | None:
        """A progressive student knows the times of its own steps only."""
        if self.cfg.mode == "progressive":
            return {"method": "euler", "steps": self.cfg.end_steps}
        return None

    def __call__(self, net: Net, batch: dict[str, Tensor]) -> Loss:
        """The loss on a collated batch. Without gradients, as for held-out images, L_flow alone."""
        cfg = self.cfg
        text = self.teacher.text(cfg.seed, batch.get("position"), len(batch["eps"]))
        batch = {k: v.to(self.ranks.device, non_blocking=True) for k, v in batch.items()}
        batch = self.texts.heard(batch) if self.texts else batch
        cond = {key: batch[key] for key in ("y", "context") if key in batch} | text
        x0 = latents_of(self.vae, batch)  # outside autocast: only networks run in bf16
        features: dict[str, Tensor] = {}
        if cfg.block_weight and torch.is_grad_enabled():
            net = tapped(net, taps(self.net.cfg), features)
        with autocast(self.ranks.device, cfg.dtype):
            answer = self.ask(x0, batch, cond)
            flow = self.flow_loss(net, answer, cond)
            loss = flow.loss
            if cfg.importance:
                loss = (flow.per_sample * answer.weight).mean()
            if features:
                blocks, metrics = self.block_loss(features, answer)
                total = loss + cfg.block_weight * blocks
                self.tally.add_blocks(metrics, loss.detach(), total.detach())
                loss = total
        return Loss(loss, flow.per_sample, answer.t)

    def ask(self, x0: Tensor, batch: dict[str, Tensor], cond: dict[str, Tensor]) -> Answer:
        """Noise the latents x0 (B, C, H, W), and show them to the teacher."""
        eps = batch["eps"]
        if self.cfg.mode == "progressive":
            return self.two_steps(x0, eps, batch["q"] if "q" in batch else batch["t"], cond)
        t, weight = self.times(batch)
        # Beyond its schedule the teacher is asked at its end, on the same line from x0 to eps.
        within = self.teacher.within(t)
        shown = self.teacher.noised(x0, eps, within, self.cfg.x_source)
        says_x0, says_eps, features = self.teacher.ask(shown, within, **cond)
        x = self.teacher.noised(x0, eps, t, self.cfg.x_source)
        return Answer(t, x, says_x0, says_eps, features, weight)

    def times(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(t (B,), importance weights (B,))."""
        if "t" in batch or self.sampler is None:
            t = batch["t"] if "t" in batch else self.objective.time(batch["q"])
            return t, torch.ones_like(t)
        rows, weight = self.sampler.draw(batch["q"].cpu())
        return self.teacher.time(rows).to(self.ranks.device), weight.to(self.ranks.device)

    def two_steps(self, x0: Tensor, eps: Tensor, q: Tensor, cond: dict[str, Tensor]) -> Answer:
        """Two steps of the teacher as one of the student (Salimans & Ho 2022), for uniform q (B,).

        The goal is (x0, eps) of the line that such a step walks. The grid is time_grid's, so
        `samplers.py --method euler --steps N` walks it. On the linear path DDIM is Euler.
        """
        N = self.cfg.end_steps
        grid = time_grid(2 * N, t_start=self.objective.t_max).float().to(q.device)
        i = 2 * ((1 - q) * N).long().clamp(0, N - 1)
        t, later = grid[i], grid[i + 1]
        start, middle, end = column(t), column(later), column(grid[i + 2])
        x = (1 - start) * x0 + start * eps
        a, b, features = self.teacher.ask(x, self.teacher.within(t), **cond)
        halfway = x + (middle - start) * (b - a)
        a, b, _ = self.teacher.ask(halfway, self.teacher.within(later), **cond)
        u = (halfway + (end - middle) * (b - a) - x) / (end - start)
        return Answer(t, x, x - start * u, x + (1 - start) * u, features, torch.ones_like(t))

    def flow_loss(self, net: Net, answer: Answer, cond: dict[str, Tensor]) -> Loss:
        """L_flow: the student against what the teacher says, at the same noised images."""
        t = answer.t
        # What the teacher saw, to the bit: its x0 and eps mix to it only up to rounding.
        x = answer.x / norm(column(t)) if self.objective.table else answer.x

        def student(_: Tensor, row: Tensor, **cond: Any) -> Tensor:
            out = net(x, row, **cond)
            if out.requires_grad:
                self.watch(out, answer)
            return out

        return self.objective.loss(student, answer.x0, eps=answer.eps, t=t, **cond)

    def watch(self, out: Tensor, answer: Answer) -> None:
        """Let the tally know how much of the gradient comes from which times."""
        goal = self.objective.goal(answer.x0, answer.eps, column(answer.t))
        error = (out.detach().float() - goal).flatten(1).norm(dim=1)
        thirds = bins_of(self.teacher.row(self.teacher.within(answer.t)), 3)

        def count(gradient: Tensor) -> None:
            size = gradient.float().flatten(1).norm(dim=1)
            self.tally.add_times(answer.t, thirds, size, error)

        out.register_hook(count)

    def block_loss(self, features: dict[str, Tensor], answer: Answer) -> tuple[Tensor, Tensor]:
        """Σ_b λ_b (kd_weight · KD_b + local_b), and tally.METRICS of each block (n, 6).

        No gradient goes through λ.
        """
        wanted = answer.features
        kd = torch.stack([kd_cosine(features[name], wanted[name]) for name in wanted])
        lam, metrics = self.lambdas(features, wanted, answer.t)
        terms = self.cfg.kd_weight * kd
        if self.heads:
            if self.parts % self.cfg.accum == 0:
                # A step begins: what one that was skipped left in the heads goes.
                self.heads.zero_grad()
            self.parts += 1
            goal = self.objective.goal(answer.x0, answer.eps, column(answer.t))
            terms = terms + self.heads.losses(features, goal)
        metrics = torch.cat([metrics[:, :2], kd.detach()[:, None], metrics[:, 2:]], 1)
        return (lam * terms).sum(), metrics

    def lambdas(
        self, features: dict[str, Tensor], wanted: dict[str, Tensor], t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(λ (n,), what the log shows of each block (n, 5): λ, clipped, e_t, e_p, coh), from the
        student's features and the teacher's, which are wanted. Ranks agree."""
        cfg = self.cfg
        if self.assessor is None:
            return self.weights, F.pad(self.weights[:, None], (0, 4))
        found = self.assess(features, t)
        if cfg.e_t == "excess":
            found[:, 0] -= self.assess(wanted, t)[:, 0]
        e_t, e_p, coh = (self.ranks.all_reduce(found) / self.ranks.world).unbind(1)
        if cfg.e_t == "excess":
            e_t = e_t.clamp(min=0)  # of all ranks' samples together
        lam = fuse(
            e_t,
            e_p,
            coh,
            self.weights,
            alpha=cfg.alpha,
            beta=cfg.beta,
            delta=cfg.delta,
            lo=cfg.lam_min,
            hi=cfg.lam_max,
        )
        if cfg.assessor == "shuffled":
            lam = lam.roll(len(lam) // 2)  # every block gets another's
        clipped = (lam <= cfg.lam_min) | (lam >= cfg.lam_max)
        return lam, torch.stack([lam, clipped.float(), e_t, e_p, coh], 1)

    def assess(self, features: dict[str, Tensor], t: Tensor) -> Tensor:
        """(n, 3): e_t, e_p and coh of each block."""
        row = self.teacher.row(self.teacher.within(t))
        bins = bins_of(row, self.assessor.cfg.bins)
        return torch.stack(list(self.assessor.assess(features, bins, self.cfg.coherence).values()))

    def report(self) -> dict[str, Any]:
        """More for the training line of the log. Every rank calls it."""
        return self.tally.report()

    def state_dict(self) -> dict[str, Tensor]:
        """Local heads with their optimizer, and the half-filled tally. Every rank calls it."""
        return self.tally.state_dict() | (self.heads.state_dict() if self.heads else {})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        own = {key: state[key] for key in state if key.startswith(("tally/", "alarmed/"))}
        self.tally.load_state_dict(own)
        if self.heads:
            self.heads.load_state_dict({key: state[key] for key in state if key not in own})


def column(v: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), which broadcasts against images."""
    return v.view(-1, 1, 1, 1)


# ---- setting up ----------------------------------------------------------------------------------


def setup(cfg: Config, ranks: Ranks) -> train.Trainer:
    """Teacher, data, student and assessor. Everything that can be wrong is found before the first
    byte is written."""
    teacher = open_teacher(cfg.teacher, cfg.context, ranks.device, cfg.text, **cfg.says)
    ds = cfg.open_data()
    classes, labels = classes_of(ds, cfg.classes) if cfg.classes else ([], None)
    if ranks.rank == 0:
        print(ds.report, flush=True)
    teacher.check_classes(classes)
    vae = teacher_vae(cfg, teacher.meta, ds).to(ranks.device)
    teacher.check_latents(vae, cfg.resolution)
    unet = student_like(teacher, cfg)
    assessor = open_assessor(cfg, teacher)
    sampler = open_sampler(cfg, assessor, ranks) if cfg.adaptive_t else None
    weights = weights_of(cfg, teacher).to(ranks.device)
    torch.manual_seed(torch_seed(cfg.seed))
    net = build(unet)
    begun = checkpoints(Path(cfg.out) / cfg.name)
    start = None if begun else begin(cfg, teacher, net, vae, classes, ranks.rank)
    init = {"path": start, "fingerprint": fingerprint(net.state_dict()) if start else None}
    init |= contents_of(cfg, teacher.fingerprint, teacher.texts) | {"text": teacher.told_by}

    def make_loss(tr: train.Trainer) -> DistillLoss:
        judges = cfg.block_weight and cfg.assessor in READS
        judge = assessor.to(ranks.device) if judges else None
        heads = add_heads(cfg, tr) if cfg.local_heads else None
        if teacher.texts:
            add_caption(tr.net, teacher)
        parts = tr.cfg, ranks, vae, tr.objective, tr.net, teacher, weights
        return DistillLoss(*parts, judge, sampler, heads, tr.texts)

    objective = student_objective(cfg)
    return train.assemble(cfg, ranks, ds, vae, objective, net, classes, labels, init, make_loss)


def student_like(teacher: Teacher, cfg: Config) -> Any:
    """The student's network; its blocks can be compared with the teacher's, if they are to be."""
    unet = student_config(teacher.net.cfg, student_preset(cfg) if cfg.model else None)
    blocks, wanted = tap_channels(unet), tap_channels(teacher.net.cfg)
    if cfg.block_weight and blocks != wanted:
        raise UserError(
            f"--model {cfg.model} has blocks {blocks}, the teacher {wanted}: they cannot be "
            "compared",
            do="Choose another student, or --block-weight 0.",
        )
    return unet


def weights_of(cfg: Config, teacher: Teacher) -> Tensor:
    """(n,) fp32: w, or λ itself where no assessor weighs, within the bounds of the others'."""
    given = cfg.lambdas or cfg.block_weights
    weights = torch.tensor(given or list(block_weights(teacher.net.cfg).values()))
    if cfg.assessor not in READS and not cfg.lambdas:
        weights = weights.clamp(cfg.lam_min, cfg.lam_max)
    return weights


def open_assessor(cfg: Config, teacher: Teacher) -> Assessor | None:
    """The assessor of an arm, or None; it must read this teacher's blocks and times."""
    if cfg.assessor not in READS and not cfg.adaptive_t:
        return None
    if not cfg.assessor_file:  # --assessor random without one
        return fresh_assessor(AssessorConfig(tap_channels(teacher.net.cfg)), cfg.seed).frozen()
    net = load_assessor(cfg.assessor_file)
    check_fits(net, cfg.assessor_file, teacher, cfg.x_source)
    if cfg.assessor == "random":  # the placebo: same shape and standardising, nothing learned
        fresh = fresh_assessor(net.cfg, cfg.seed)
        for name, companion in net.blocks.items():
            fresh.blocks[name].mean.copy_(companion.mean)
            fresh.blocks[name].std.copy_(companion.std)
        net = fresh.frozen()
    return net


def open_sampler(cfg: Config, assessor: Assessor, ranks: Ranks) -> TimestepSampler:
    """What draws the times by the assessor's profile. Says how much of it is of use."""
    sampler = make_sampler(
        assessor.accuracy,
        assessor.entropy,
        shift=shift_of(cfg),
        base_jitter=cfg.base_jitter,
        chaos=cfg.adaptive_chaos,
        threshold=cfg.reliability,
        unreliable=cfg.unreliable,
        gain=cfg.difficulty_gain,
    )
    if ranks.rank == 0:
        n = int(sampler.reliable.sum())
        rest = "." if n else "; none is, so all rows are drawn alike."
        print(
            f"timesteps: {n} of {len(sampler.p)} bins are reliable "
            f"(accuracy ≥ {cfg.reliability:g}){rest}",
            flush=True,
        )
    return sampler


def add_heads(cfg: Config, tr: train.Trainer) -> LocalHeads:
    """Local heads, made before the first step, whose own step follows each of the network's."""
    heads = LocalHeads(
        tap_channels(tr.net.cfg),
        tr.net.cfg.in_channels,
        tr.ranks,
        seed=cfg.seed,
        lr=cfg.lr,
        weight_decay=cfg.weight_decay,
    )

    def follow(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        heads.step(optimizer.param_groups[0]["lr"])

    tr.optimizer.register_step_post_hook(follow)
    return heads


def begin(
    cfg: Config, teacher: Teacher, net: Any, vae: AnyVAE, classes: list[str], rank: int
) -> str | None:
    """Give a new student its first weights; returns where they came from."""
    if cfg.init == "scratch":
        return None
    if not cfg.init:
        load_strict(net, without_variance(teacher.net, net.cfg.out_channels), cfg.teacher)
        return cfg.teacher
    other = open_checked(cfg.init, "fp32")
    meta = other.meta
    if "vae" in meta and vae_from_meta(meta["vae"]).fingerprint != vae.fingerprint:
        raise UserError(
            f"--init {cfg.init} was trained on other latents than the teacher",
            do="Start from a network that shares them.",
        )
    if meta.get("resolution", cfg.resolution) != cfg.resolution:
        raise UserError(
            f"--init {cfg.init} was trained at {meta['resolution']} pixels, the teacher at "
            f"{cfg.resolution}",
            do="Start from a network of its size.",
        )
    line = take_weights(net, other, classes, f"--init {cfg.init}")
    if line and rank == 0:
        print(line, flush=True)
    return cfg.init


# ---- the run -------------------------------------------------------------------------------------


def contents_of(cfg: Config, teacher: str, texts: dict[str, Tensor]) -> dict[str, str | None]:
    """What a run's targets and weights come from, by fingerprint; `teacher` is the teacher's."""
    assessor = None
    if cfg.assessor_file:
        assessor = read_tensors(cfg.assessor_file)[1].get("fingerprint")
    elif cfg.assessor == "random":
        assessor = "made for the run"
    context = fingerprint(texts) if texts else None
    return {"teacher": teacher, "assessor": assessor, "context": context}


def run(cfg: Config, ranks: Ranks) -> bool:
    """train.train of a distillation, begun, resumed or finished; True if it was asked to stop."""
    folder = Path(cfg.out) / cfg.name
    if checkpoints(folder):
        check_contents(cfg, folder)
    return train.train(cfg, ranks, setup, FREE)


def check_contents(cfg: Config, folder: Path) -> None:
    """Files may have moved since a run began, but not changed."""
    before = beginning(folder)["init"]
    net, meta = load_unet(find_checkpoint(cfg.teacher))
    now = contents_of(cfg, meta["fingerprint"], read_texts(net.cfg, cfg.context, cfg.text))
    for what, contents in now.items():
        if before.get(what) in (None, contents):  # None: older than this check
            continue
        file = getattr(cfg, "assessor_file" if what == "assessor" else what) or f"no {what}"
        raise UserError(
            f"{file} is not the {what} that {folder} began with (its contents are others)",
            do="Put it back, or start under another --name.",
        )


def phases(cfg: Config) -> list[Config]:
    """A progressive run as one run for each halving, each the next one's teacher; any other config
    as it is."""
    if cfg.mode != "progressive":
        return [cfg]
    chain: list[Config] = []
    steps = cfg.start_steps // 2
    while steps >= cfg.end_steps:
        name = f"{cfg.name}-{steps}"
        phase = replace(cfg, name=name, start_steps=2 * steps, end_steps=steps)
        if chain:  # its teacher is the last student, and it starts as that
            teacher = str(Path(cfg.out) / chain[-1].name)
            phase = replace(
                phase, init="", model="", **asdict(TeacherFlags(teacher, context=cfg.context))
            )
        chain.append(phase)
        steps //= 2
    # Found now, and not after the first phase was trained.
    begun = [bool(checkpoints(Path(cfg.out) / phase.name)) for phase in chain]
    if True in begun and not all(begun[: begun.index(True)]):
        other = Path(cfg.out) / chain[begun.index(True)].name
        raise UserError(
            f"{other} is of another chain: {chain[0].name}, which should come first, is not there",
            do="Repeat that chain's --start-steps, or start under another --name.",
        )
    return chain


def main() -> None:
    command, argv = "", sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        command, *argv = argv
    if command == "ablate":
        raise UserError(
            "distill.py ablate has a command of its own",
            do="Use it: python experiments/ablate.py --teacher RUN …",
        )
    if command == "pretrain-assessor":
        pretraining, dry_run = parse(Pretrain, sys.modules[Pretrain.__module__].__doc__, argv)
        if dry_run:
            print(json.dumps(asdict(pretraining), indent=1))
        else:
            pretrain(pretraining)
        return
    if command not in ("", "train"):
        raise UserError(
            f"command {command!r} is not one of train, pretrain-assessor",
            do="Leave it out, to distil a teacher; distill.py --help lists the flags.",
        )
    cfg, dry_run = parse(Config, __doc__, argv)
    cfg = resolve(cfg)
    if dry_run:
        print(json.dumps(asdict(cfg), indent=1))
        return
    ranks = join_ranks(cfg.device)
    for phase in phases(cfg):
        if run(phase, ranks):
            break
    ranks.leave()


if __name__ == "__main__":
    cli(main)
