"""The assessor ("David", after AbstractPhil's GeoDavidCollective): small classifiers that read a
timestep out of a U-Net's blocks.

    net = load_assessor("assessor.safetensors")          # pretrain.py makes one
    found = net.assess(features, bins)                   # {block: (e_t, e_p, coh)}

One companion a block, none sees another's. A block's features, averaged over space, become a unit
vector z; heads on it name the timestep's bin and one of P patterns within it; 4-simplices
("crystals", one a class, five vertices) and a soft Cantor staircase shape z in pretraining. In a
distillation the assessor is frozen and reads the student: e_t, how badly it can tell the timestep;
e_p, how undecided it is about the pattern; coh, its coherence. fuse() turns these into the weights
of the blocks.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Annotated, Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ckpt import fingerprint, load_strict, read_tensors
from distillation.teacher import Teacher, tap_channels
from harness.cli import UserError
from harness.files import write_tensors
from harness.seeds import torch_seed
from harness.typed import Hash, Open, Range, check
from objectives import Objective

# Of a crystal's vertices: anchor, need, relation, purpose, observer. Their sum is 1.
ROLES = (1.0, -0.75, 0.75, 0.75, -0.75)
ROSE_T = 0.07  # temperature of the rose scores
MARGIN = 1.0  # by which the true class should beat the others
CANTOR_WIDTH = 0.1  # the gap within a bin that counts as 1
MIN_VOLUME = 1e-4  # of a crystal
MAKE_ONE = "python distill.py pretrain-assessor --teacher RUN"


# ---- the parts, as formulas ----------------------------------------------------------------------


def pool(x: Tensor) -> Tensor:
    """(B, C, H, W), or pooled already (B, C) -> (B, C) fp32: the mean over space."""
    return x.float().mean((2, 3)) if x.ndim == 4 else x.float()


def kd_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - the mean over the batch of cos(student, teacher) of features (B, C, H, W) averaged over
    space, or (B, C); (), fp32.

    The teacher gets no gradient. Neither scale nor a permutation of positions changes it.
    """
    return 1 - F.cosine_similarity(pool(student), pool(teacher.detach()), dim=1).mean()


def clip(x: Any, low: float, high: float) -> Any:
    """A tensor or a float, kept between two bounds."""
    return x.clamp(low, high) if isinstance(x, Tensor) else min(max(x, low), high)


def fuse(
    e_t: Any,
    e_p: Any,
    coh: Any,
    w: Any,
    *,
    alpha: float = 0.5,
    beta: float = 0.25,
    delta: float = 0.25,
    lo: float = 0.5,
    hi: float = 3.0,
) -> Any:
    """A block's weight: clip(w (1 + alpha e_t + beta e_p + delta (1 - coh)), lo, hi), coh clipped
    to [0, 1] first.

    e_t: cross-entropy of the timestep in nats (chance: ln K); e_p: entropy of the patterns in
    [0, 1]. Tensors or floats.
    """
    if not lo <= hi:
        raise UserError(
            f"bounds of the block weights are {lo} to {hi}",
            wanted="the smaller one first",
            do="Exchange them.",
        )
    return clip(w * (1 + alpha * e_t + beta * e_p + delta * (1 - clip(coh, 0.0, 1.0))), lo, hi)


def cantor(x: Tensor, alpha: Tensor | float = 0.5, tau: float = 0.25, levels: int = 12) -> Tensor:
    """A soft Cantor staircase on [0, 1], in x's shape.

    At each level the ternary digit is a softmax over three centres; the middle third counts alpha,
    the right one 1. Not monotone, and steep: at 12 levels its slope is hundreds.
    """
    x, total = x.clamp(1e-6, 1 - 1e-6), torch.zeros_like(x)
    centres = x.new_tensor([0.5, 1.5, 2.5])
    for level in range(levels):
        y = 3 * x
        digit = (-(y[..., None] - centres).square() / tau).softmax(-1)
        _, middle, right = digit.unbind(-1)
        total = total + 2.0 ** -(level + 1) * (alpha * middle + right)
        x = y - y.floor()
    return total.clamp(0, 1)


def simplex(points: Tensor) -> tuple[Tensor, Tensor]:
    """(volume, variation of the ten squared edges), (…) each, of 4-simplices (…, 5, D).

    The volume is Cayley's and Menger's, V² = -det / 9216; the variation is std / mean. A flat one
    has volume 0 and finite gradients.
    """
    # Squared edges from a Gram matrix: a quarter of the time of differences.
    centred = points - points[..., :1, :]
    gram = centred @ centred.mT  # (…, 5, 5)
    own = gram.diagonal(dim1=-2, dim2=-1)
    squared = own[..., :, None] + own[..., None, :] - 2 * gram
    matrix = F.pad(squared, (1, 0, 1, 0), value=1.0)
    matrix[..., 0, 0] = 0
    i, j = torch.triu_indices(5, 5, 1, device=points.device)
    edges = squared[..., i, j]
    v2 = -torch.linalg.det(matrix) / 9216
    rounding = 8 * torch.finfo(points.dtype).eps * edges.detach().mean(-1) ** 4 + 1e-30
    volume = torch.where(v2 > rounding, v2.clamp(min=rounding).sqrt(), 0.0)
    return volume, edges.std(-1, correction=0) / edges.mean(-1)


def rose_scores(z: Tensor, crystals: Tensor) -> Tensor:
    """z (B, D) unit, crystals (N, 5, D) -> (B, N): the cosines to a class's five vertices, summed
    with the vertices' roles, over 0.07."""
    roles = z.new_tensor(ROLES)[:, None]
    return z @ (F.normalize(crystals, dim=-1) * roles).sum(1).T / ROSE_T


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
    """Mean |c_i - c_j| over pairs of one bin: (). Of distinct samples (0 if there is no such pair),
    or with i = j as in the source."""
    pairs = bins[:, None] == bins[None]
    if distinct:
        pairs = pairs & ~torch.eye(len(bins), dtype=torch.bool, device=bins.device)
    return ((c[:, None] - c[None]).abs() * pairs).sum() / pairs.sum().clamp(min=1)


def block_weights(unet: Any) -> dict[str, float]:
    """The source's base weights of the blocks, {"down_0": 0.7, …}: 0.7 at the ends to 1.2 in the
    middle, read at each level's depth."""
    if not hasattr(unet, "channel_mult"):
        return dict.fromkeys(tap_channels(unet), 1.0)  # a transformer has no middle
    marks = (0.7, 0.9, 1.0, 1.1, 1.2)
    levels = len(unet.channel_mult)
    down = []
    for level in range(levels):
        depth = level / levels * 4
        low = min(int(depth), 3)
        down.append(round(marks[low] + (marks[low + 1] - marks[low]) * (depth - low), 6))
    return dict(zip(tap_channels(unet), (*down, 1.2, *reversed(down))))


# ---- the network ---------------------------------------------------------------------------------


Size = Annotated[int, Range(1, 65536)]


@dataclass(frozen=True)
class AssessorConfig:
    """The shape of an assessor, and how its patterns were taught."""

    blocks: dict[str, Size]  # {"down_0": channels, …}
    bins: Size = 100  # of the timestep, K
    patterns: Size = 10  # a bin, P
    dim: Size = 128  # of z
    belly: Annotated[float, Range(1e-3, 1e3)] = 2.0  # hidden width of the projection, times dim
    head: Literal["linear", "mlp"] = "linear"  # on z; mlp has a hidden layer of 2 dim
    # A bin's nearest crystals, softly; or always its pattern 0 (the source's last version).
    pattern_target: Literal["nearest", "zero"] = "nearest"
    # What the teacher was shown: noised data, or noise at every t (the source's).
    x_source: Literal["data", "noise"] = "data"


@dataclass
class Pretraining(Open):
    """How an assessor was made, as far as it matters here."""

    shuffle_time: bool = False


@dataclass
class HeldOut(Open):
    """How well it read timesteps of held-out images."""

    mean: Annotated[float, Range(0, 1)] = 0.0
    chance: Annotated[float, Range(0, 1)] = 1.0


@dataclass
class AssessorMeta(Open):
    """What the metadata of an assessor's file says."""

    kind: Literal["assessor"]
    assessor: AssessorConfig
    fingerprint: Hash
    objective: Objective = ()
    teacher: Hash | None = None
    pretraining: Pretraining = ()
    held_out: HeldOut = ()


class Companion(nn.Module):
    """What reads one block."""

    def __init__(self, cfg: AssessorConfig, channels: int):
        super().__init__()
        self.cfg = cfg
        K, P, D = cfg.bins, cfg.patterns, cfg.dim
        hidden = int(cfg.belly * D)
        # Of the teacher's features, for standardising.
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.project = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.ReLU(),
            nn.Dropout(min(0.5, max(D**-0.5, 0.2))),
            nn.Linear(hidden, D, bias=False),
        )
        self.t_head = make_head(cfg, K)
        self.p_head = make_head(cfg, K * P)
        self.place = nn.Linear(D, 1)
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.crystals = nn.Parameter(F.normalize(torch.randn(K, P, 5, D), dim=-1))
        for layer in (self.project[0], self.project[3]):
            nn.init.xavier_uniform_(layer.weight, gain=0.5)

    def vector(self, features: Tensor) -> Tensor:
        """features (B, C) or (B, C, H, W) -> z (B, D), of length 1."""
        return F.normalize(self.project((pool(features) - self.mean) / self.std), dim=-1)

    def forward(self, features: Tensor, bins: Tensor, staircase: bool = True) -> dict[str, Tensor]:
        """features (B, C) or (B, C, H, W), bins (B,) -> z (B, D), t_logits (B, K),
        p_logits (B, K·P), cantor (B,).

        The bins reach cantor only, which is left out without `staircase`.
        """
        z = self.vector(features)
        out = {"z": z, "t_logits": self.t_head(z), "p_logits": self.p_head(z)}
        if staircase:
            # Relative to the last bin there is, not to the batch's largest one, as in the source.
            x = bins / max(self.cfg.bins - 1, 1) + 0.3 * torch.tanh(self.place(z)[:, 0])
            out["cantor"] = cantor(x, self.alpha)
        return out

    def losses(
        self, features: Tensor, bins: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The six terms of pretraining, unweighted.

        The source's Gram term is the constant 1 (five centred points have rank 4): left out.
        """
        K, P = self.cfg.bins, self.cfg.patterns
        out = self(features, bins)
        z, p_logits = out["z"], out["p_logits"]
        again = self.vector(features)  # the teacher's, which is another dropout mask
        pattern, ce_p = self.pattern_loss(z, p_logits, bins)
        mean_p = p_logits.softmax(1).mean(0)
        count = min(5 * len(bins), K * P)
        classes = torch.randperm(K * P, generator=generator)[:count].to(z.device)
        crystals = self.crystals.flatten(0, 1)
        volume, variation = simplex(crystals[classes])
        return {
            "feature": 1 - (z * again).sum(1).mean(),
            "rose": rose_loss(rose_scores(z, crystals), bins * P + pattern),
            "ce": (F.cross_entropy(out["t_logits"], bins) + ce_p) / 2,
            "diversity": math.log(K * P) + (mean_p * mean_p.clamp(min=1e-12).log()).sum(),
            "cayley": F.relu(MIN_VOLUME - volume).mean() + 0.5 * variation.mean(),
            "cantor": same_bin_gap(out["cantor"], bins, distinct=False) / CANTOR_WIDTH,
        }

    def pattern_loss(self, z: Tensor, p_logits: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
        """(the pattern (B,) within its bin that a sample is taught, the cross-entropy ())."""
        K, P = self.cfg.bins, self.cfg.patterns
        if self.cfg.pattern_target == "zero":
            return torch.zeros_like(bins), F.cross_entropy(p_logits, bins * P)
        # Centroids of the own bin's crystals, (B, P, D), and how near each is to z.
        own = F.normalize(self.crystals.mean(2), dim=-1)[bins]
        near = (own @ z.detach()[:, :, None])[..., 0]  # (B, P)
        soft = (near / 0.1).softmax(1).detach()
        logp = p_logits.log_softmax(1).view(-1, K, P)[torch.arange(len(bins)), bins]
        return near.argmax(1), -(soft * logp).sum(1).mean()


def make_head(cfg: AssessorConfig, n: int) -> nn.Module:
    """From z to n logits."""
    if cfg.head == "linear":
        return nn.Linear(cfg.dim, n)
    return nn.Sequential(nn.Linear(cfg.dim, 2 * cfg.dim), nn.GELU(), nn.Linear(2 * cfg.dim, n))


class Assessor(nn.Module):
    """Companions by block name."""

    def __init__(self, cfg: AssessorConfig):
        super().__init__()
        self.cfg = cfg
        self.meta: dict[str, Any] = {}
        companions = {name: Companion(cfg, channels) for name, channels in cfg.blocks.items()}
        self.blocks = nn.ModuleDict(companions)
        # The profile: per bin, averaged over blocks.
        self.register_buffer("accuracy", torch.zeros(cfg.bins))
        self.register_buffer("entropy", torch.ones(cfg.bins))

    def forward(
        self, features: dict[str, Tensor], bins: Tensor, staircase: bool = True
    ) -> dict[str, dict[str, Tensor]]:
        """{block: features (B, C, H, W) or (B, C)}, bins (B,) -> {block: what Companion returns}.

        Every block must be there.
        """
        if features.keys() != self.blocks.keys():
            raise UserError(
                f"the assessor reads {', '.join(self.blocks)}",
                got=f"features of {', '.join(features) or 'nothing'}",
                do=f"Make one for this network: {MAKE_ONE}",
            )
        return {
            name: companion(features[name], bins, staircase)
            for name, companion in self.blocks.items()
        }

    @torch.no_grad()
    def assess(
        self, features: dict[str, Tensor], bins: Tensor, coherence: str = "alpha"
    ) -> dict[str, Tensor]:
        """{block: (3,) fp32: e_t in nats, e_p in [0, 1], coh}, means over the batch, whatever the
        autocast around.

        coherence "alpha" is the source's: the staircase's learned scalar, which looks at no feature
        and is constant once trained. "data" is exp(-mean |C_i - C_j| / 0.1) over pairs of one bin.
        """
        found = {}
        with torch.autocast(bins.device.type, enabled=False):
            for name, out in self(features, bins, coherence == "data").items():
                if coherence == "alpha":
                    coh = self.blocks[name].alpha
                else:
                    gap = same_bin_gap(out["cantor"], bins, distinct=True)
                    coh = (-gap / CANTOR_WIDTH).exp()
                e_t = F.cross_entropy(out["t_logits"], bins)
                found[name] = torch.stack([e_t, entropy(out["p_logits"]).mean(), coh])
        return found

    def frozen(self) -> "Assessor":
        """Itself, in eval mode and without gradients."""
        return self.eval().requires_grad_(False)

    def save(self, path: Path, meta: dict[str, Any]) -> None:
        """Weights, statistics and profile with config and what pretraining measured, in one file,
        atomically."""
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        own = {
            "kind": "assessor",
            "assessor": asdict(self.cfg),
            "fingerprint": fingerprint(tensors),
        }
        write_tensors(path, tensors, meta | own)


def fresh_assessor(cfg: AssessorConfig, seed: int) -> Assessor:
    """Untrained; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed))
        return Assessor(cfg)


def load_assessor(path: Path | str) -> Assessor:
    """An assessor as it was saved, frozen: every tensor must be there, fit, and match the
    fingerprint."""
    tensors, meta = read_tensors(path)
    make_one = f"Make one: {MAKE_ONE}"
    if meta.get("kind") != "assessor":
        kind = brief(meta.get("kind", "U-Net"))
        raise UserError(f"{path} holds no assessor (its kind: {kind})", do=make_one)
    check(meta, AssessorMeta, path, make_one)
    with torch.device("meta"):  # so that its size is that of the file
        net = Assessor(AssessorConfig(**meta["assessor"]))
    if fingerprint(tensors) != meta["fingerprint"]:
        raise UserError(
            f"{path}: the weights do not match their own fingerprint; "
            "the file was altered or damaged",
            do=make_one,
        )
    load_strict(net, tensors, str(path), assign=True)
    net.meta = meta
    return net.frozen()


def check_fits(net: Assessor, path: str, teacher: Teacher, x_source: str) -> None:
    """Refuse an assessor of other blocks or times than this teacher's; warn of one that has seen
    other features."""
    another = "Pretrain one for this teacher."
    blocks = tap_channels(teacher.net.cfg)
    if net.cfg.blocks != blocks:
        raise UserError(
            f"{path} reads blocks {net.cfg.blocks}, the teacher has {blocks}", do=another
        )
    schedule = schedule_of(net.meta.get("objective", {}))
    wanted = schedule_of(asdict(teacher.objective))
    if schedule != wanted:
        raise UserError(
            f"{path} has its {net.cfg.bins} bins on the schedule {schedule}, the "
            f"teacher is on {wanted}",
            do=another,
        )
    if net.meta.get("pretraining", {}).get("shuffle_time"):
        raise UserError(
            f"{path} was made with --shuffle-time, as a control: its times are wrong",
            do="Pretrain one without.",
        )
    if net.meta.get("teacher") != teacher.fingerprint:
        print(f"warning: {path} was trained on another teacher's features.", flush=True)
    if net.cfg.x_source != x_source:
        print(
            f"warning: {path} knows features of {net.cfg.x_source}, and --x-source is {x_source}.",
            flush=True,
        )


def schedule_of(objective: dict[str, Any]) -> str:
    """The noise schedule of an objective, in words."""
    zero = ", zero SNR" if objective.get("zero_snr") else ""
    return (objective.get("table") or "the linear path") + zero
