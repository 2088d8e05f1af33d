"""Make an assessor of a teacher's blocks.    Some minutes; an interrupted one starts again.
    python distill.py pretrain-assessor --teacher RUN --out assessor.safetensors

The teacher is shown noised images of its own data, the assessor learns to read their timestep out
of what the teacher's blocks return, and is measured on held-out images. What was measured goes
beside the file, as .json.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

import data.dataset as data
from ckpt import read_tensors
from data.dataset import Dataset, Stream, latents_of, open_dataset
from data.sources import embedded_tags
from data.watch import wait
from diffusion.schedules import T, norm
from distillation.assessor import (
    Assessor,
    AssessorConfig,
    block_weights,
    entropy,
    fresh_assessor,
    pool,
)
from distillation.teacher import (
    Teacher,
    TeacherFlags,
    describe_teacher,
    like_the_teacher,
    open_teacher,
    tap_channels,
    teacher_vae,
)
from distillation.timesteps import bins_of
from harness.cli import UserError, check_flags, flag
from harness.files import make_dir, write_text
from harness.memory import check_memory
from harness.ranks import autocast, pick_device
from harness.run import versions
from harness.seeds import torch_seed
from vae import AnyVAE

# Of the terms of Companion.losses.
WEIGHTS = {
    "feature": 0.40,
    "rose": 0.25,
    "ce": 0.15,
    "diversity": 0.05,
    "cayley": 0.10,
    "cantor": 0.05,
}
CHUNK = 64  # images that the teacher is shown at once
RELIABLE = 0.15  # accuracy from which a bin has a say in distill.py --adaptive-t, by default


@dataclass(frozen=True)
class Pretrain(TeacherFlags):
    """The flags of pretrain-assessor."""

    out: str = flag(
        "assessor.safetensors",
        "what was measured goes beside it, .json",
        writes=".safetensors",
        head="the assessor",
    )
    data: str = flag("", '"" = what the teacher was trained on')
    resolution: int = flag(0, "0 = the teacher's", low=0, high=8192)
    vae: str = flag("", "of a teacher whose file does not say")
    classes: tuple[str, ...] = flag((), "the teacher's")
    bins: int = flag(100, "of the timestep", low=2, high=T)
    patterns: int = flag(10, "a bin", low=1, high=1000)
    dim: int = flag(128, "of the companions' vectors", low=4, high=4096)
    belly: float = flag(2.0, "their hidden width, times dim", low=0.25, high=64)
    head: Literal["linear", "mlp"] = flag("linear", "what reads bins and patterns out of vectors")
    pattern_target: Literal["nearest", "zero"] = flag(
        "nearest", "zero is the source's last version: a bin's pattern 0 for all"
    )
    x_source: Literal["data", "noise"] = flag("data", "noise is the source's: no image ever enters")
    shuffle_time: bool = flag(
        False, "tell the teacher another sample's time: what is still read comes from the image"
    )
    samples: int = flag(20_000, "noised images the teacher is shown", low=1, high=1e9)
    profile_samples: int = flag(
        2_500,
        "held-out ones, spread evenly over time: accuracy and the sampler's profile",
        low=1,
        high=1e9,
    )
    stage: Literal["", "standard", "fine", "stage2"] = flag(
        "", '"" = the teacher\'s, or standard with --data'
    )
    exclude_tags: tuple[str, ...] = flag((), "with the stage")
    holdout: float | None = flag(
        None, "share of images held out; the teacher's, or 0.02 with --data", low=0, high=0.9
    )
    steps: int = flag(3_000, "of AdamW", low=1, high=1e9)
    batch: int = flag(256, "of it", low=1, high=1e6)
    # 1e-3 leaves z's heads, whose inputs are unit vectors, flat.
    lr: float = flag(5e-3, "at the start, falling to 0 as a cosine", low=0, high=1e3)
    seed: int = flag(0, "of weights, order, noise", low=0, high=2**63 - 1)
    dtype: Literal["auto", "fp32", "bf16"] = flag("auto", "of the teacher")
    device: str = flag("auto", "auto | cpu | cuda")


def pretrain(cfg: Pretrain) -> None:
    """Show the teacher noised images, fit the assessor to what its blocks return, measure it on
    held-out ones, save."""
    cfg = resolve(cfg)
    out = Path(cfg.out)
    if out.exists():
        # Flags that an older version had not are at their defaults.
        made = {**asdict(Pretrain()), **read_tensors(out)[1].get("pretraining", {})}
        if json.dumps(made, sort_keys=True) == json.dumps(asdict(cfg), sort_keys=True):
            print(f"finished: {out} was made by this command.")
            return
        raise UserError(
            f"{out} exists, by other flags", do="Give another --out, or remove it first."
        )
    device = pick_device(cfg.device)
    ds = open_dataset(
        cfg.data,
        stage=cfg.stage,
        exclude_tags=cfg.exclude_tags,
        resolution=cfg.resolution,
        holdout=cfg.holdout,
    )
    if not len(ds.heldout):
        raise UserError(
            f"--holdout {cfg.holdout} of {cfg.data} leaves no image to measure the assessor on",
            do="Raise it.",
        )
    print(ds.report, flush=True)
    make_dir(out.parent)
    teacher = open_teacher(cfg.teacher, cfg.context, device, **cfg.says)
    vae = teacher_vae(cfg, teacher.meta, ds).to(device)
    teacher.check_latents(vae, cfg.resolution)
    shape = shape_of(cfg, teacher)
    check_sizes(cfg, shape)

    rows = torch.randint(
        T, (cfg.samples,), generator=torch.Generator().manual_seed(torch_seed(cfg.seed))
    )
    held_rows = torch.arange(cfg.profile_samples) * T // cfg.profile_samples
    seen = features(teacher, vae, ds, rows, cfg, device)
    held = features(teacher, vae, ds.heldout, held_rows, cfg, device)
    weights = block_weights(teacher.net.cfg)
    net = fresh_assessor(shape, cfg.seed).to(device)
    bins = bins_of(rows, cfg.bins).to(device)
    fit(net, on(device, seen), bins, weights, cfg.steps, cfg.batch, cfg.lr, cfg.seed)
    held_bins = bins_of(held_rows, cfg.bins).to(device)
    report = examine(net.frozen(), on(device, held), held_bins, weights)
    wait(ds.source)
    save(cfg, net, teacher, report)


def resolve(cfg: Pretrain) -> Pretrain:
    """Fill in what follows from the teacher, and refuse what cannot run."""
    _, _, meta = describe_teacher(cfg.teacher, **cfg.says)
    cfg = like_the_teacher(cfg, meta)
    check_flags(cfg)
    if cfg.profile_samples < cfg.bins:
        raise UserError(
            f"--profile-samples {cfg.profile_samples}",
            wanted=f"{cfg.bins} at least, one a bin",
            do="Raise it, or lower --bins.",
        )
    return replace(cfg, exclude_tags=cfg.exclude_tags or embedded_tags(cfg.data, cfg.stage))


def shape_of(cfg: Pretrain, teacher: Teacher) -> AssessorConfig:
    return AssessorConfig(
        blocks=tap_channels(teacher.net.cfg),
        bins=cfg.bins,
        patterns=cfg.patterns,
        dim=cfg.dim,
        belly=cfg.belly,
        head=cfg.head,
        pattern_target=cfg.pattern_target,
        x_source=cfg.x_source,
    )


def check_sizes(cfg: Pretrain, shape: AssessorConfig) -> None:
    """Refuse features and an assessor that cannot be held."""
    numbers = (cfg.samples + cfg.profile_samples) * sum(shape.blocks.values())
    check_memory(f"--samples {cfg.samples} --profile-samples {cfg.profile_samples}", 4 * numbers)
    # Of each pattern five vertices and a row of its head, with gradients and two moments, and its
    # logits, with gradients.
    patterns = len(shape.blocks) * cfg.bins * cfg.patterns
    numbers = patterns * (4 * 6 * cfg.dim + 2 * cfg.batch)
    sizes = {name: getattr(cfg, name) for name in ("bins", "patterns", "dim", "batch")}
    check_memory(" ".join(f"--{name} {size}" for name, size in sizes.items()), 4 * numbers)


def on(device: torch.device, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


# ---- what the teacher's blocks return ------------------------------------------------------------


def features(
    teacher: Teacher, vae: AnyVAE, ds: Dataset, rows: Tensor, cfg: Pretrain, device: torch.device
) -> dict[str, Tensor]:
    """What the teacher's blocks return for images of ds noised to schedule rows (n,), averaged over
    space: {block: (n, C)} on the CPU."""
    found: dict[str, list[Tensor]] = {name: [] for name in teacher.blocks}
    labels = data.classes_of(ds, cfg.classes)[1] if cfg.classes else None
    stream = Stream(ds, labels, vae.latent_shape(cfg.resolution), cfg.seed)
    n = len(rows)
    groups = [list(range(low, min(low + CHUNK, n))) for low in range(0, n, CHUNK)]
    batches = data.batches(stream, iter(groups))
    # The rows whose times the teacher is given.
    given = rows
    if cfg.shuffle_time:
        given = rows[
            torch.randperm(n, generator=torch.Generator().manual_seed(torch_seed(cfg.seed)))
        ]
    for batch in tqdm(batches, total=len(groups), desc="features", disable=None, leave=False):
        at = batch["position"]
        text = teacher.text(cfg.seed, at, len(at))
        batch = on(device, batch)
        cond = {"y": batch["y"]} if labels is not None else {}
        t = teacher.time(rows[at]).to(device)
        t_given = teacher.time(given[at]).to(device)
        x = teacher.noised(latents_of(vae, batch), batch["eps"], t, cfg.x_source)
        if cfg.shuffle_time and teacher.objective.table:
            # The network still sees the picture at its own scale.
            x = x * (norm(t_given) / norm(t)).view(-1, 1, 1, 1)
        with autocast(device, cfg.dtype):
            _, _, blocks = teacher.ask(x, t_given, **(cond | text))
            for name, feature in blocks.items():
                found[name].append(pool(feature).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


# ---- learning and measuring ----------------------------------------------------------------------


def fit(
    net: Assessor,
    features: dict[str, Tensor],
    bins: Tensor,
    weights: dict[str, float],
    steps: int,
    batch: int,
    lr: float,
    seed: int,
) -> list[float]:
    """Pretrain on pooled features {block: (n, C)} with bins (n,); returns the loss of each step.

    Blocks learn alone: the sum only weighs them.
    """
    g = torch.Generator().manual_seed(torch_seed(seed))
    for name, companion in net.blocks.items():
        companion.mean.copy_(features[name].mean(0))
        companion.std.copy_(features[name].std(0, correction=0).clamp(min=1e-4))
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    history: list[Tensor] = []
    with torch.random.fork_rng(devices=[]):  # dropout
        torch.manual_seed(torch_seed(seed))
        bar = tqdm(range(steps), desc="assessor", disable=None, leave=False)
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            rows = torch.randint(len(bins), (batch,), generator=g).to(bins.device)
            loss: Any = 0
            for name, companion in net.blocks.items():
                terms = companion.losses(features[name][rows], bins[rows], g)
                loss = loss + weights[name] * sum(WEIGHTS[k] * v for k, v in terms.items())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            history.append(loss.detach())
            # No terminal: a line now and then instead of a bar.
            if bar.disable and (step + 1) % max(steps // 5, 1) == 0:
                print(
                    f"{step + 1:>11,} of {steps:,} steps  loss {float(history[-1]):.4f}", flush=True
                )
    return torch.stack(history).tolist() if history else []


@torch.no_grad()
def examine(
    net: Assessor, features: dict[str, Tensor], bins: Tensor, weights: dict[str, float]
) -> dict[str, Any]:
    """Held-out accuracy by block and bin, and the profile of the timestep sampler, which is written
    into the assessor.

    The profile's accuracy is the blocks' mean under `weights`, its entropy that of the patterns
    within the own bin, over ln P.
    """
    cfg = net.cfg
    total = sum(weights.values())
    report = {}
    accuracy, disorder = torch.zeros(cfg.bins), torch.zeros(cfg.bins)
    for name, out in net(features, bins).items():
        report[name] = measure(out["t_logits"], bins)
        own = torch.zeros(len(bins))
        if cfg.patterns > 1:
            patterns = out["p_logits"].view(-1, cfg.bins, cfg.patterns)
            own = entropy(patterns[torch.arange(len(bins)), bins])
        share = weights[name] / total
        accuracy += share * torch.tensor(report[name]["by_bin"])
        disorder += mean_by(bins, own, cfg.bins, share)
    net.accuracy.copy_(accuracy)
    net.entropy.copy_(disorder)
    mean = sum(weights[name] * row["top1"] for name, row in report.items()) / total
    return {"blocks": report, "mean": mean, "chance": 1 / cfg.bins, "samples": len(bins)}


def measure(logits: Tensor, bins: Tensor) -> dict[str, Any]:
    """How well logits (n, K) name the bins (n,).

    top1; within1: the bin or a neighbour; ece: the expected calibration error, in 15 bins of
    confidence; by_bin: top1 by bin (K,).
    """
    confidence, guess = logits.softmax(1).max(1)
    right = (guess == bins).float()
    cell = (confidence * 15).long().clamp(max=14)
    gap = torch.zeros(15).index_add(0, cell.cpu(), (confidence - right).cpu())
    return {
        "top1": float(right.mean()),
        "within1": float(((guess - bins).abs() <= 1).float().mean()),
        "ece": float(gap.abs().sum()) / len(bins),
        "by_bin": mean_by(bins, right, logits.shape[1]).tolist(),
    }


def mean_by(bins: Tensor, values: Tensor, K: int, scale: float = 1.0) -> Tensor:
    """scale · the mean of values (n,) by bin (n,): (K,) on the CPU; 0 of a bin without any."""
    count = torch.bincount(bins, minlength=K).clamp(min=1).float().cpu()
    return scale * torch.zeros(K).index_add(0, bins.cpu(), values.cpu()) / count


# ---- its file ------------------------------------------------------------------------------------


def save(cfg: Pretrain, net: Assessor, teacher: Teacher, report: dict[str, Any]) -> None:
    """Write the assessor and its card, and say what was measured."""
    out = Path(cfg.out)
    card = {
        "teacher": teacher.fingerprint,
        "objective": asdict(teacher.objective),
        "pretraining": asdict(cfg),
        "held_out": report,
        **versions(),
    }
    net.save(out, card)
    write_text(out.with_suffix(".json"), json.dumps(card, indent=1) + "\n")
    for name, row in report["blocks"].items():
        print(
            f"{name:<8} top-1 {row['top1']:.3f}  within one bin {row['within1']:.3f}  "
            f"calibration error {row['ece']:.3f}"
        )
    mean = report["mean"]
    reliable = int((net.accuracy >= RELIABLE).sum())
    print(
        f"held-out accuracy {mean:.3f}, {mean * cfg.bins:.1f} times chance; "
        f"reliable bins ({RELIABLE}): {reliable} of {cfg.bins}"
    )
    if mean < 3 / cfg.bins and not cfg.shuffle_time:
        print(
            "warning: below three times chance, this assessor has nothing to say about timesteps."
        )
    print(out)
