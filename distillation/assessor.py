"""The assessor ("David", after AbstractPhil's GeoDavidCollective): small classifiers that read a timestep out of a U-Net's blocks.
    python distill.py pretrain-assessor --teacher RUN --out assessor.safetensors       # some minutes; an interrupted one starts again

One companion a block, none sees another's. A block's features, averaged over space, become a unit vector z; heads on it name
the timestep's bin and one of P patterns within it; 4-simplices ("crystals", one a class, five vertices) and a soft Cantor
staircase shape z in pretraining. In a distillation the assessor is frozen and reads the student: e_t, how badly it can tell the
timestep; e_p, how undecided it is about the pattern; coh, its coherence. distill.py turns these into the weights of the blocks.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data.dataset as data
from ckpt.unets import fingerprint, load_strict, read_tensors
from harness.cli import UserError
from harness.ranks import autocast, pick_device
from harness.run import versions
from data.dataset import Dataset, Stream, open_dataset
from harness.files import make_dir, write_tensors, write_text
from data.cache import latents_of
from objectives import T, norm
from settings import embedded_tags
from distillation.teacher import Teacher, describe_teacher, like_the_teacher, open_teacher, tap_channels, teacher_vae
from distillation.timesteps import bins_of
from vae import AnyVAE

ROLES = (1.0, -0.75, 0.75, 0.75, -0.75)      # anchor, need, relation, purpose, observer; sum 1
WEIGHTS = {"feature": 0.40, "rose": 0.25, "ce": 0.15, "diversity": 0.05, "cayley": 0.10, "cantor": 0.05}
ROSE_T, MARGIN, CANTOR_WIDTH, MIN_VOLUME = 0.07, 1.0, 0.1, 1e-4


# ---- the parts, as formulas -----------------------------------------------------------------------------------------

def pool(x: Tensor) -> Tensor:
    """(B, C, H, W), or pooled already (B, C) -> (B, C) fp32: the mean over space."""
    return x.float().mean((2, 3)) if x.ndim == 4 else x.float()


def kd_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - the mean over the batch of cos(student, teacher) of features (B, C, H, W) averaged over space, or (B, C); (), fp32.

    The teacher gets no gradient. Neither scale nor a permutation of positions changes it.
    """
    return 1 - F.cosine_similarity(pool(student), pool(teacher.detach()), dim=1).mean()


def fuse(e_t: Any, e_p: Any, coh: Any, w: Any, *, alpha: float = 0.5, beta: float = 0.25, delta: float = 0.25,
         lo: float = 0.5, hi: float = 3.0) -> Any:
    """A block's weight: clip(w (1 + alpha e_t + beta e_p + delta (1 - coh)), lo, hi), coh clipped to [0, 1] first.

    e_t: cross-entropy of the timestep in nats (chance: ln K); e_p: entropy of the patterns in [0, 1]. Tensors or floats.
    """
    if not lo <= hi:
        raise UserError(f"bounds of the block weights are {lo} to {hi}: wanted the smaller one first.")
    clip = lambda x, low, high: x.clamp(low, high) if isinstance(x, Tensor) else min(max(x, low), high)
    return clip(w * (1 + alpha * e_t + beta * e_p + delta * (1 - clip(coh, 0.0, 1.0))), lo, hi)


def cantor(x: Tensor, alpha: Tensor | float = 0.5, tau: float = 0.25, levels: int = 12) -> Tensor:
    """A soft Cantor staircase on [0, 1] in x's shape: at each level the ternary digit is a softmax over three centres, the middle
    third counts alpha, the right one 1. Not monotone, and steep: at 12 levels its slope is hundreds."""
    x, total = x.clamp(1e-6, 1 - 1e-6), torch.zeros_like(x)
    centres = x.new_tensor([0.5, 1.5, 2.5])
    for level in range(levels):
        y = 3 * x
        _, middle, right = (-(y[..., None] - centres).square() / tau).softmax(-1).unbind(-1)
        total, x = total + 2.0 ** -(level + 1) * (alpha * middle + right), y - y.floor()
    return total.clamp(0, 1)


def simplex(points: Tensor) -> tuple[Tensor, Tensor]:
    """4-simplices (…, 5, D) -> volume (…) by Cayley and Menger, V² = -det / 9216, and the variation (std / mean) of their ten
    squared edges (…). A flat one has volume 0 and finite gradients."""
    centred = points - points[..., :1, :]                                       # squared edges from a Gram matrix: a quarter of the time
    gram = centred @ centred.mT                                                                             # (…, 5, 5)
    own = gram.diagonal(dim1=-2, dim2=-1)
    squared = own[..., :, None] + own[..., None, :] - 2 * gram
    matrix = F.pad(squared, (1, 0, 1, 0), value=1.0)
    matrix[..., 0, 0] = 0
    i, j = torch.triu_indices(5, 5, 1, device=points.device)
    edges = squared[..., i, j]
    v2, rounding = -torch.linalg.det(matrix) / 9216, 8 * torch.finfo(points.dtype).eps * edges.detach().mean(-1) ** 4 + 1e-30
    return torch.where(v2 > rounding, v2.clamp(min=rounding).sqrt(), 0.0), edges.std(-1, correction=0) / edges.mean(-1)


def rose_scores(z: Tensor, crystals: Tensor) -> Tensor:
    """z (B, D) unit, crystals (N, 5, D) -> (B, N): the cosines to a class's five vertices under their roles, over 0.07."""
    return z @ (F.normalize(crystals, dim=-1) * z.new_tensor(ROLES)[:, None]).sum(1).T / ROSE_T


def rose_loss(scores: Tensor, true: Tensor) -> Tensor:
    """(B, N), (B,) -> (): how far the true class is from beating every other by the margin."""
    own = scores.gather(1, true[:, None])[:, 0]
    others = scores.scatter(1, true[:, None], -math.inf).amax(1)
    return F.relu(MARGIN - (own - others)).mean()


def entropy(logits: Tensor) -> Tensor:
    """Of softmax (…, N), over ln N: (…) in [0, 1]."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1) / math.log(logits.shape[-1])


def same_bin_gap(c: Tensor, bins: Tensor, distinct: bool) -> Tensor:
    """Mean |c_i - c_j| over pairs of one bin: (). Of distinct samples (0 if there is no such pair), or with i = j as in the source."""
    pairs = bins[:, None] == bins[None]
    if distinct:
        pairs = pairs & ~torch.eye(len(bins), dtype=torch.bool, device=bins.device)
    return ((c[:, None] - c[None]).abs() * pairs).sum() / pairs.sum().clamp(min=1)


# ---- the network ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class AssessorConfig:
    """The shape of an assessor, and how its patterns were taught."""
    blocks: dict[str, int]                   # {"down_0": channels, …}
    bins: int = 100                          # of the timestep, K
    patterns: int = 10                       # a bin, P
    dim: int = 128                           # of z
    belly: float = 2.0                       # hidden width of the projection, times dim
    head: Literal["linear", "mlp"] = "linear"   # on z; mlp has a hidden layer of 2 dim
    pattern_target: Literal["nearest", "zero"] = "nearest"   # a bin's nearest crystals, softly; or always its pattern 0 (the source's last)
    x_source: Literal["data", "noise"] = "data"   # what the teacher was shown: noised data, or noise at every t (the source's)


class Companion(nn.Module):
    """What reads one block."""

    def __init__(self, cfg: AssessorConfig, channels: int):
        super().__init__()
        self.cfg, K, P, D, hidden = cfg, cfg.bins, cfg.patterns, cfg.dim, int(cfg.belly * cfg.dim)
        self.register_buffer("mean", torch.zeros(channels))                     # of the teacher's features, for standardising
        self.register_buffer("std", torch.ones(channels))
        self.project = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Dropout(min(0.5, max(D ** -0.5, 0.2))),
                                     nn.Linear(hidden, D, bias=False))
        head = lambda n: nn.Linear(D, n) if cfg.head == "linear" else nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, n))
        self.t_head, self.p_head, self.place = head(K), head(K * P), nn.Linear(D, 1)
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.crystals = nn.Parameter(F.normalize(torch.randn(K, P, 5, D), dim=-1))
        for layer in (self.project[0], self.project[3]):
            nn.init.xavier_uniform_(layer.weight, gain=0.5)

    def forward(self, features: Tensor, bins: Tensor, staircase: bool = True) -> dict[str, Tensor]:
        """features (B, C) or (B, C, H, W), bins (B,) -> z (B, D), t_logits (B, K), p_logits (B, K·P), cantor (B,). The bins reach
        cantor only, which is left out without `staircase`."""
        z = F.normalize(self.project((pool(features) - self.mean) / self.std), dim=-1)
        out = {"z": z, "t_logits": self.t_head(z), "p_logits": self.p_head(z)}
        if staircase:
            x = bins / max(self.cfg.bins - 1, 1) + 0.3 * torch.tanh(self.place(z)[:, 0])   # not over the batch's largest bin, as the source
            out["cantor"] = cantor(x, self.alpha)
        return out

    def losses(self, features: Tensor, bins: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The six terms of pretraining, unweighted. The source's Gram term is the constant 1 (five centred points have rank 4): left out."""
        cfg, out = self.cfg, self(features, bins)
        K, P, z, p_logits = cfg.bins, cfg.patterns, out["z"], out["p_logits"]
        again = F.normalize(self.project((pool(features) - self.mean) / self.std), dim=-1)   # the teacher's, that is another dropout mask
        own = F.normalize(self.crystals.mean(2), dim=-1)[bins]                  # (B, P, D): centroids of the own bin's crystals
        near = (own @ z.detach()[:, :, None])[..., 0]                           # (B, P)
        if cfg.pattern_target == "nearest":
            pattern, soft = near.argmax(1), (near / 0.1).softmax(1).detach()
            ce_p = -(soft * p_logits.log_softmax(1).view(-1, K, P)[torch.arange(len(bins)), bins]).sum(1).mean()
        else:
            pattern = torch.zeros_like(bins)
            ce_p = F.cross_entropy(p_logits, bins * P)
        mean_p = p_logits.softmax(1).mean(0)
        some = torch.randperm(K * P, generator=generator)[:min(5 * len(bins), K * P)].to(z.device)
        volume, variation = simplex(self.crystals.flatten(0, 1)[some])
        return {"feature": 1 - (z * again).sum(1).mean(),
                "rose": rose_loss(rose_scores(z, self.crystals.flatten(0, 1)), bins * P + pattern),
                "ce": (F.cross_entropy(out["t_logits"], bins) + ce_p) / 2,
                "diversity": math.log(K * P) + (mean_p * mean_p.clamp(min=1e-12).log()).sum(),
                "cayley": F.relu(MIN_VOLUME - volume).mean() + 0.5 * variation.mean(),
                "cantor": same_bin_gap(out["cantor"], bins, distinct=False) / CANTOR_WIDTH}


class Assessor(nn.Module):
    """Companions by block name."""

    def __init__(self, cfg: AssessorConfig):
        super().__init__()
        self.cfg, self.meta = cfg, {}
        self.blocks = nn.ModuleDict({name: Companion(cfg, channels) for name, channels in cfg.blocks.items()})
        self.register_buffer("accuracy", torch.zeros(cfg.bins))                 # the profile: per bin, averaged over blocks
        self.register_buffer("entropy", torch.ones(cfg.bins))

    def forward(self, features: dict[str, Tensor], bins: Tensor, staircase: bool = True) -> dict[str, dict[str, Tensor]]:
        """{block: features (B, C, H, W) or (B, C)}, bins (B,) -> {block: what Companion returns}. Every block must be there."""
        if features.keys() != self.blocks.keys():
            raise UserError(f"the assessor reads {', '.join(self.blocks)}; got features of {', '.join(features) or 'nothing'}.")
        return {name: companion(features[name], bins, staircase) for name, companion in self.blocks.items()}

    @torch.no_grad()
    def assess(self, features: dict[str, Tensor], bins: Tensor, coherence: str = "alpha") -> dict[str, Tensor]:
        """{block: (3,) fp32: e_t in nats, e_p in [0, 1], coh}, means over the batch, whatever the autocast around.

        coherence "alpha" is the source's: the staircase's learned scalar, which looks at no feature and is constant once trained.
        "data" is exp(-mean |C_i - C_j| / 0.1) over pairs of one bin.
        """
        with torch.autocast(bins.device.type, enabled=False):
            found = {}
            for name, out in self(features, bins, coherence == "data").items():
                coh = self.blocks[name].alpha if coherence == "alpha" else \
                    (-same_bin_gap(out["cantor"], bins, distinct=True) / CANTOR_WIDTH).exp()
                found[name] = torch.stack([F.cross_entropy(out["t_logits"], bins), entropy(out["p_logits"]).mean(), coh])
        return found

    def frozen(self) -> "Assessor":
        """Itself, in eval mode and without gradients."""
        return self.eval().requires_grad_(False)

    def save(self, path: Path, meta: dict[str, Any]) -> None:
        """Weights, statistics and profile with config and what pretraining measured, in one file, atomically."""
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        write_tensors(path, tensors, {**meta, "kind": "assessor", "assessor": asdict(self.cfg), "fingerprint": fingerprint(tensors)})


def load_assessor(path: Path | str) -> Assessor:
    """An assessor as it was saved, frozen: every tensor must be there, fit, and match the fingerprint."""
    tensors, meta = read_tensors(path)
    if meta.get("kind") != "assessor":
        raise UserError(f"{path} holds no assessor (its kind: {meta.get('kind', 'U-Net')}).  "
                        "Make one: python distill.py pretrain-assessor")
    try:
        cfg = AssessorConfig(**meta["assessor"])
        net = fresh_assessor(cfg, 0)
    except (TypeError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: its metadata is not of this version's assessors ({error}).") from None
    if fingerprint(tensors) != meta["fingerprint"]:
        raise UserError(f"{path}: the weights do not match their own fingerprint; the file was altered or damaged.")
    load_strict(net, tensors, str(path))
    net.meta = meta
    return net.frozen()


def fresh_assessor(cfg: AssessorConfig, seed: int) -> Assessor:
    """Untrained; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Assessor(cfg)


# ---- pretraining ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Pretrain:
    teacher: str = ""                    # a run, a file, a diffusers folder, hf:org/name[/file]
    out: str = "assessor.safetensors"    # the assessor; what was measured goes beside it as .json
    data: str = ""                       # "" = what the teacher was trained on
    resolution: int = 0                  # 0 = the teacher's
    vae: str = ""                        # of a teacher whose file does not say
    classes: tuple[str, ...] = ()        # the teacher's
    teacher_objective: Literal["", "eps", "v", "x0", "fm"] = ""   # of a file that does not say
    teacher_table: Literal["", "linear", "cosine", "scaled_linear"] = ""   # of a file that does not say
    context: str = ""                    # text embeddings, for a teacher that takes text
    bins: int = 100                      # of the timestep
    patterns: int = 10                   # a bin
    dim: int = 128                       # of the companions' vectors
    belly: float = 2.0                   # their hidden width, times dim
    head: Literal["linear", "mlp"] = "linear"   # what reads bins and patterns out of the vectors
    pattern_target: Literal["nearest", "zero"] = "nearest"   # zero is the source's last version: a bin's pattern 0 for all
    x_source: Literal["data", "noise"] = "data"   # noise is the source's: no image ever enters
    shuffle_time: bool = False           # tell the teacher another sample's time: what can still be read comes from the image
    samples: int = 20_000                # noised images the teacher is shown
    profile_samples: int = 2_500         # … of held-out images, spread evenly over time: accuracy and the sampler's profile
    stage: Literal["", "standard", "fine", "stage2"] = ""   # "" = the teacher's, or standard with --data
    exclude_tags: tuple[str, ...] = ()   # with the stage
    holdout: float | None = None         # share of the images that are held out; if not given, the teacher's, or 0.02 with --data
    steps: int = 3_000                   # of AdamW
    batch: int = 256                     # of it
    lr: float = 5e-3                     # at the start, falling to 0 as a cosine; 1e-3 leaves z's heads, whose inputs are unit vectors, flat
    seed: int = 0                        # of weights, order, noise
    dtype: Literal["auto", "fp32", "bf16"] = "auto"   # of the teacher
    device: str = "auto"                 # auto | cpu | cuda


def see(teacher: Teacher, vae: AnyVAE, ds: Dataset, rows: Tensor, cfg: Pretrain, device: torch.device) -> dict[str, Tensor]:
    """What the teacher's blocks return for images of ds noised to schedule rows (n,): {block: (n, C)} on the CPU."""
    labels = data.classes_of(ds, cfg.classes)[1] if cfg.classes else None
    shape, found = vae.latent_shape(cfg.resolution), {name: [] for name in teacher.blocks}
    groups = [list(range(lo, min(lo + 64, len(rows)))) for lo in range(0, len(rows), 64)]
    told = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(cfg.seed))] if cfg.shuffle_time else rows
    for batch in tqdm(data.batches(Stream(ds, labels, shape, cfg.seed), iter(groups)), total=len(groups), desc="features", disable=None, leave=False):
        at = batch["position"]
        cond = ({"y": batch["y"].to(device)} if labels is not None else {}) | teacher.text(cfg.seed, at, len(at))
        t, said = (teacher.time(r[at]).to(device) for r in (rows, told))
        x = teacher.noised(latents_of(vae, {k: v.to(device) for k, v in batch.items()}), batch["eps"].to(device), t, cfg.x_source)
        if cfg.shuffle_time and teacher.objective.table:                        # the network still sees the picture at its own scale
            x = x * (norm(said) / norm(t)).view(-1, 1, 1, 1)
        with autocast(device, cfg.dtype):
            for name, feature in teacher.ask(x, said, **cond)[2].items():
                found[name].append(pool(feature).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def fit(net: Assessor, features: dict[str, Tensor], bins: Tensor, weights: dict[str, float], steps: int, batch: int, lr: float,
        seed: int) -> list[float]:
    """Pretrain on pooled features {block: (n, C)} with bins (n,); returns the loss of each step. Blocks learn alone: the sum only
    weighs them."""
    g = torch.Generator().manual_seed(seed)
    for name, companion in net.blocks.items():
        companion.mean.copy_(features[name].mean(0))
        companion.std.copy_(features[name].std(0, correction=0).clamp(min=1e-4))
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    history, device = [], bins.device
    with torch.random.fork_rng(devices=[]):                                     # dropout
        torch.manual_seed(seed)
        for step in (bar := tqdm(range(steps), desc="assessor", disable=None, leave=False)):
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            some = torch.randint(len(bins), (batch,), generator=g).to(device)
            loss = sum(weights[name] * sum(WEIGHTS[k] * v for k, v in companion.losses(features[name][some], bins[some], g).items())
                       for name, companion in net.blocks.items())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            history.append(loss.detach())
            if bar.disable and (step + 1) % max(steps // 5, 1) == 0:            # no terminal: a line now and then instead of a bar
                print(f"{step + 1:>11,} of {steps:,} steps  loss {float(loss.detach()):.4f}", flush=True)
    return torch.stack(history).tolist() if history else []


@torch.no_grad()
def examine(net: Assessor, features: dict[str, Tensor], bins: Tensor, weights: dict[str, float]) -> dict[str, Any]:
    """Held-out accuracy by block and bin, and the profile of the timestep sampler, which is written into the assessor.

    top1; within1: the bin or a neighbour; ece: expected calibration error in 15 bins of confidence; the profile's accuracy is
    the blocks' mean under `weights`, its entropy that of the patterns within the own bin, over ln P.
    """
    cfg, report, total = net.cfg, {}, sum(weights.values())
    count = torch.bincount(bins, minlength=cfg.bins).clamp(min=1).float()
    accuracy, disorder = torch.zeros(cfg.bins), torch.zeros(cfg.bins)
    for name, out in net(features, bins).items():
        confidence, guess = out["t_logits"].softmax(1).max(1)
        right = (guess == bins).float()
        cell = (confidence * 15).long().clamp(max=14)
        gap = torch.zeros(15).index_add(0, cell.cpu(), (confidence - right).cpu())
        by_bin = torch.zeros(cfg.bins).index_add(0, bins.cpu(), right.cpu()) / count.cpu()
        patterns = out["p_logits"].view(-1, cfg.bins, cfg.patterns)[torch.arange(len(bins)), bins]
        own = entropy(patterns) if cfg.patterns > 1 else torch.zeros(len(bins))
        accuracy += weights[name] / total * by_bin
        disorder += weights[name] / total * torch.zeros(cfg.bins).index_add(0, bins.cpu(), own.cpu()) / count.cpu()
        report[name] = {"top1": float(right.mean()), "within1": float(((guess - bins).abs() <= 1).float().mean()),
                        "ece": float(gap.abs().sum()) / len(bins), "by_bin": by_bin.tolist()}
    net.accuracy.copy_(accuracy)
    net.entropy.copy_(disorder)
    return {"blocks": report, "mean": sum(weights[k] * v["top1"] for k, v in report.items()) / total, "chance": 1 / cfg.bins, "samples": len(bins)}


def pretrain(cfg: Pretrain) -> None:
    """Show the teacher noised images, fit the assessor to what its blocks return, measure it on held-out ones, save."""
    unet, objective, meta = describe_teacher(cfg.teacher, cfg.teacher_objective, cfg.teacher_table)
    cfg = like_the_teacher(cfg, meta)
    cfg = replace(cfg, exclude_tags=cfg.exclude_tags or embedded_tags(cfg.data, cfg.stage))
    for name, least, most in (("bins", 2, T), ("patterns", 1, 1000), ("dim", 4, 4096), ("samples", 1, 1e9), ("profile_samples", 1, 1e9),
                              ("steps", 1, 1e9), ("batch", 1, 1e6)):
        if not least <= getattr(cfg, name) <= most:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: wanted {least:g} to {most:g}.")
    if cfg.profile_samples < cfg.bins:
        raise UserError(f"--profile-samples {cfg.profile_samples}: wanted {cfg.bins} at least, one a bin.")
    device, out = pick_device(cfg.device), Path(cfg.out)
    if out.suffix != ".safetensors":
        raise UserError(f"--out {cfg.out}: wanted a name that ends in .safetensors.")
    if out.exists():
        if read_tensors(out)[1].get("pretraining") == json.loads(json.dumps(asdict(cfg))):
            return print(f"finished: {out} was made by this command.")
        raise UserError(f"{out} exists, by other flags.  Give another --out, or remove it first.")
    ds = open_dataset(cfg.data, stage=cfg.stage, exclude_tags=cfg.exclude_tags, resolution=cfg.resolution, holdout=cfg.holdout)
    if not len(ds.heldout):
        raise UserError(f"--holdout {cfg.holdout} of {cfg.data} leaves no image to measure the assessor on.  Raise it.")
    print(ds.report, flush=True)
    make_dir(out.parent)
    teacher = open_teacher(cfg.teacher, cfg.teacher_objective, cfg.teacher_table, cfg.context, device)
    vae = teacher_vae(cfg, teacher.meta, ds).to(device)
    teacher.check_latents(vae, cfg.resolution)
    g = torch.Generator().manual_seed(cfg.seed)
    rows = torch.randint(T, (cfg.samples,), generator=g)
    held_rows = torch.arange(cfg.profile_samples) * T // cfg.profile_samples
    features, held = see(teacher, vae, ds, rows, cfg, device), see(teacher, vae, ds.heldout, held_rows, cfg, device)
    shape = AssessorConfig(tap_channels(unet), cfg.bins, cfg.patterns, cfg.dim, cfg.belly, cfg.head, cfg.pattern_target, cfg.x_source)
    net, weights = fresh_assessor(shape, cfg.seed).to(device), block_weights(unet)
    fit(net, {k: v.to(device) for k, v in features.items()}, bins_of(rows, cfg.bins).to(device), weights, cfg.steps, cfg.batch, cfg.lr, cfg.seed)
    report = examine(net.frozen(), {k: v.to(device) for k, v in held.items()}, bins_of(held_rows, cfg.bins).to(device), weights)
    card = {"teacher": teacher.mark, "objective": asdict(objective), "pretraining": asdict(cfg), "held_out": report, **versions()}
    net.save(out, card)
    write_text(out.with_suffix(".json"), json.dumps(card, indent=1) + "\n")
    for name, row in report["blocks"].items():
        print(f"{name:<8} top-1 {row['top1']:.3f}  within one bin {row['within1']:.3f}  calibration error {row['ece']:.3f}")
    print(f"held-out accuracy {report['mean']:.3f}, {report['mean'] * cfg.bins:.1f} times chance; reliable bins (0.15): "
          f"{int((net.accuracy >= 0.15).sum())} of {cfg.bins}")
    if report["mean"] < 3 / cfg.bins and not cfg.shuffle_time:
        print("warning: below three times chance, this assessor has nothing to say about timesteps.")
    print(out)


def block_weights(unet: Any) -> dict[str, float]:
    """The source's base weights of the blocks, {"down_0": 0.7, …}: 0.7 at the ends to 1.2 in the middle, read at each level's depth."""
    levels, marks = len(unet.channel_mult), (0.7, 0.9, 1.0, 1.1, 1.2)
    def at(depth: float) -> float:
        low = min(int(depth * 4), 3)
        return round(marks[low] + (marks[low + 1] - marks[low]) * (depth * 4 - low), 6)
    down = [at(i / levels) for i in range(levels)]
    return dict(zip(tap_channels(unet), (*down, 1.2, *reversed(down))))
