"""Does what a network says of its own uncertainty mean anything?   On toy faces:

    python experiments/uncertainty.py --ckpt runs/toyfaces-fm-standard
    python experiments/uncertainty.py --size dry --ckpt RUN --out DIR      # all of it, in a minute

It fits the posterior of the network's last layer (diffusion/laplace.py) to training faces, keeps it
in OUT/posterior.safetensors, and asks four questions. Each has a placebo, and scores that cost
nothing: the size of the features that the last layer is given, and of the latents.

    outliers    noised pictures that are no faces, against held-out faces: how often is one of them
                the more uncertain (AUROC)?
    realism     samples: does the score go with the distance to the nearest drawing?
    filtering   most uncertain samples left out, against as many left out at random: FD, precision,
                recall
    modes       does the cheap way of integrated features agree with K networks?

It writes OUT/report.md, report.html and uncertainty.json.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import harness.interrupt  # noqa: F401

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from ckpt import find_checkpoint, load_unet
from ckpt.posteriors import save_posterior
from data.dataset import Dataset, open_dataset
from data.images import to_float
from data.uncertainty import fit, noise_of
from diffusion.laplace import Posterior, gain_of, integrated, score, shared, watching
from diffusion.sampling import sample
from eval_fid import features_in
from experiments.report import Picture, Report, Section, Table, number, write
from experiments.stages import as_arrays, drawn, read_face
from harness import record
from harness.cli import UserError, cli, flag, parse
from harness.files import make_dir, strict_json, write_text
from harness.pictures import save_grid, to_uint8
from metrics.distances import frechet_from_features, precision_recall
from model import UNet
from samplers import Generator, Sampling, describe

RULE = """
Written down before the first run.
1.  outliers: full and diagonal are compared by AUROC at t = 0.3; above 0.9 the score tells, below
    0.6 it does not.
2.  realism: the score means something if the 95 % bootstrap interval of Spearman's correlation with
    the distance to the nearest drawing is above 0, and it says more than the baselines if its
    interval is above their values. Otherwise the answer is no.
3.  filtering helps if FD of the kept is below that of 95 % of the random choices, and recall is not
    below that of 95 % of them.
4.  modes: Spearman's correlation of scores, and the ratio of standard deviations; described, not
    tested.
"""


class Size(NamedTuple):
    pairs: int  # (image, time) that the posterior is fitted to
    outliers: int  # pictures of each kind
    samples: int
    kept: int
    read: int  # samples whose nearest drawing is searched for
    steps: int  # of Heun
    networks: int  # drawn for the modes, and for how many images:
    compared: int
    resamples: int


SIZES = {
    "dry": Size(64, 16, 24, 20, 4, 2, 2, 4, 50),
    "cpu": Size(2_048, 256, 1_200, 1_000, 500, 10, 8, 32, 2_000),
}
TIMES = (0.3, 0.8)


@dataclass(frozen=True)
class Config:
    ckpt: str = flag("runs/toyfaces-fm-standard", "a U-Net trained on toy faces")
    size: Literal["dry", "cpu"] = flag("cpu", "dry: a minute | cpu: about ten")
    out: str = flag("runs/uncertainty", "posterior and report", writes="folder")


class Subject(NamedTuple):
    """What is asked."""

    net: UNet
    gen: Generator
    train: Dataset
    held: Dataset
    fingerprint: str

    @property
    def layer(self) -> torch.nn.Conv2d:
        return self.net.out[2]


def open_subject(ckpt: str) -> Subject:
    path = find_checkpoint(ckpt)
    net, meta = load_unet(path, dtype=torch.float32)
    data = meta.get("config", {}).get("data", "")
    if not isinstance(net, UNet) or data.partition(":")[0] != "toyfaces":
        raise UserError(
            f"--ckpt {path} is no U-Net that was trained on toy faces",
            do="Train one: python train.py.",
        )
    cfg = Sampling(str(path), device="cpu", dtype="fp32")
    objective, vae, shape = describe(cfg, net.cfg, meta, str(path))
    if objective.coupling == "lowres" or objective.learn_sigma or net.cfg.num_classes:
        raise UserError(
            f"--ckpt {path} is told more than noise, or says a variance",
            do="Take one without classes that draws from noise.",
        )
    gen = Generator(objective, net.eval(), vae, shape, device=torch.device("cpu"), dtype="fp32")
    ds = open_dataset(data, resolution=gen.resolution)
    return Subject(net, gen, ds, ds.heldout, meta["fingerprint"])


# ---- outliers ------------------------------------------------------------------------------------

Change = Callable[[Tensor], Tensor]
KINDS: dict[str, Change] = {
    "upside down": lambda x: x.flip(2),
    "inverted": lambda x: -x,
    "channels permuted": lambda x: x[:, [1, 2, 0]],
    "white noise": lambda x: noise_of(list(range(len(x))), x.shape[1:]).clamp(-1, 1),
    "contrast × 1.5": lambda x: (1.5 * x).clamp(-1, 1),
    "constant": lambda x: x.mean((2, 3), keepdim=True).expand_as(x),
}


@torch.no_grad()
def scores_at(
    subject: Subject, posterior: Posterior, pictures: Tensor, time: float
) -> dict[str, Tensor]:
    """{score: (n,)} of pictures (n, 3, H, W) in [-1, 1], noised to a time."""
    gen, parts = subject.gen, []
    for numbers in torch.arange(len(pictures)).split(64):
        x0 = gen.vae.encode(pictures[numbers])
        x = (1 - time) * x0 + time * noise_of(numbers.tolist(), gen.latent_shape)
        with watching(subject.layer) as seen:
            gen.plain(x, torch.full((len(x),), time))
        phi = seen[-1]
        parts.append({
            "full": score(posterior.variance(phi)),
            "diagonal": score(posterior.diagonal(phi)),
            "features": phi.square().flatten(1).mean(1),
            "latents": x0.square().flatten(1).mean(1),
        })
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def auroc(high: Tensor, low: Tensor) -> float:
    """How often a value of `high` is above one of `low`; a tie counts half."""
    ranks = rankdata(torch.cat([high, low]).double().numpy())[: len(high)]
    return float((ranks.mean() - (len(high) + 1) / 2) / len(low))


def outliers(subject: Subject, posterior: Posterior, n: int) -> dict[str, Any]:
    """{time: {kind: {score: AUROC against held-out faces}}}."""
    held = to_float(subject.held.images(range(min(n, len(subject.held)))))
    own = to_float(subject.train.images(range(len(held))))
    sets = {"training faces": own} | {kind: change(held) for kind, change in KINDS.items()}
    found: dict[str, Any] = {}
    for time in TIMES:
        usual = scores_at(subject, posterior, held, time)
        rows = {}
        for kind, pictures in sets.items():
            scores = scores_at(subject, posterior, pictures, time)
            rows[kind] = {key: auroc(scores[key], usual[key]) for key in scores}
        found[str(time)] = rows
    return found


# ---- samples -------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    images: Tensor  # uint8 (n, 3, H, W)
    deviations: Tensor  # (n, h, w) standard deviation of a latent
    scores: dict[str, Tensor]  # (n,) each


@torch.no_grad()
def draw(subject: Subject, posterior: Posterior, n: int, steps: int) -> Drawn:
    """n samples with what integrated features say of each."""
    gen, parts = subject.gen, []
    gain = gain_of(gen.objective.what)
    for seeds in torch.arange(n).split(64):
        x = gen.objective.prior(gen.noise(seeds.tolist()))
        how = {"steps": steps, "t_start": gen.objective.t_max}
        s, variance = integrated(gen.plain, subject.layer, posterior, x, gain, **how)
        size = s.x.square().flatten(1).mean(1)
        parts.append((to_uint8(gen.vae.decode(s.x)), variance, size))
    images, variances, sizes = (torch.cat(column) for column in zip(*parts))
    return Drawn(images, variances.sqrt(), {"score": score(variances), "latents": sizes})


def distances(images: Tensor) -> np.ndarray:
    """(n,) root mean squared error of uint8 images to the nearest drawing."""
    arrays = as_arrays(images)
    return np.array([((drawn(read_face(a)) - a) ** 2).mean() ** 0.5 for a in arrays])


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def realism(samples: Drawn, size: Size) -> dict[str, Any]:
    """{score: {"rho", "low", "high"}} against the distance to the nearest drawing."""
    far, r = distances(samples.images[: size.read]), np.random.default_rng(0)
    scores = {key: value[: size.read].numpy() for key, value in samples.scores.items()}
    scores["placebo"] = r.permutation(scores["score"])
    choices = [r.integers(0, len(far), len(far)) for _ in range(size.resamples)]
    found = {}
    for key, values in scores.items():
        again = [spearman(values[rows], far[rows]) for rows in choices]
        low, high = np.nanquantile(again, [0.025, 0.975])
        found[key] = {"rho": spearman(values, far), "low": float(low), "high": float(high)}
    return found


def filtering(subject: Subject, samples: Drawn, size: Size) -> dict[str, Any]:
    """Measures of the kept, and the same of random choices of as many."""
    gen, r = subject.gen, np.random.default_rng(0)
    real = subject.train.images(range(min(size.samples, len(subject.train))))
    wanted = features_in("latents", real, gen.vae, gen.device).double()
    features = features_in("latents", samples.images, gen.vae, gen.device).double()

    def measured(rows: Any) -> dict[str, float]:
        one = features[rows]
        alike = precision_recall(wanted[: len(one)], one)
        return {
            "fd": frechet_from_features(wanted, one),
            "precision": alike.precision,
            "recall": alike.recall,
        }

    kept = samples.scores["score"].argsort()[: size.kept]
    chance = [measured(r.permutation(size.samples)[: size.kept]) for _ in range(20)]
    found = {"all": measured(slice(None)), "kept": measured(kept)}
    for key in ("fd", "precision", "recall"):
        values = [each[key] for each in chance]
        low, high = np.quantile(values, [0.05, 0.95])
        found[f"random {key}"] = {
            "mean": float(np.mean(values)),
            "5%": float(low),
            "95%": float(high),
        }
    return found


@torch.no_grad()
def modes(subject: Subject, posterior: Posterior, samples: Drawn, size: Size) -> dict[str, float]:
    """Integrated features against networks drawn, each kept for its whole trajectory."""
    gen = subject.gen
    x = gen.objective.prior(gen.noise(list(range(size.compared))))
    how = {"steps": size.steps, "t_start": gen.objective.t_max}

    def walk() -> Tensor:
        return sample(gen.plain, x, **how).x

    each = shared(walk, subject.layer, posterior, size.networks)
    variance = each.var(0).mean(1)
    ours = samples.deviations[: size.compared]
    return {
        "rank correlation of scores": spearman(
            score(variance).numpy(), score(ours.square()).numpy()
        ),
        "correlation of pixels": float(
            np.corrcoef(variance.sqrt().flatten().numpy(), ours.flatten().numpy())[0, 1]
        ),
        "deviation, integrated / networks": float(ours.mean() / variance.sqrt().mean()),
    }


# ---- the report ----------------------------------------------------------------------------------


def answers(found: dict[str, Any]) -> list[str]:
    """The rule's words."""
    rows = found["outliers"][str(TIMES[0])]
    told = [kind for kind in KINDS if rows[kind]["full"] > 0.9]
    diagonal = [kind for kind in KINDS if rows[kind]["diagonal"] > 0.9]
    own, kept = found["realism"], found["filtering"]["kept"]
    rho = own["score"]
    others = max(own["latents"]["rho"], own["placebo"]["rho"])
    says = "says nothing"
    if rho["low"] > 0:
        more = "more than" if rho["low"] > others else "not more than"
        says = f"means something, {more} the baselines do"
    better = kept["fd"] < found["filtering"]["random fd"]["5%"]
    wide = kept["recall"] >= found["filtering"]["random recall"]["5%"]
    return [
        f"Outliers: the exact posterior tells {len(told)} of {len(KINDS)} kinds "
        f"({', '.join(told) or 'none'}); the diagonal one {len(diagonal)}.",
        f"Realism: the score {says}: Spearman's correlation with the distance to the nearest "
        f"drawing is {rho['rho']:.2f} ({rho['low']:.2f} to {rho['high']:.2f}).",
        f"Filtering {'helps' if better and wide else 'does not help'}: FD {kept['fd']:.3g} against "
        f"{found['filtering']['random fd']['mean']:.3g} at random, recall {kept['recall']:.3f} "
        f"against {found['filtering']['random recall']['mean']:.3f}.",
    ]


def report(found: dict[str, Any], maps: Picture) -> Report:
    tables = []
    for time, rows in found["outliers"].items():
        keys = list(rows["constant"])
        cells = [[kind, *(f"{row[key]:.2f}" for key in keys)] for kind, row in rows.items()]
        tables.append(Table([f"t = {time}", *keys], cells, "AUROC against held-out faces."))
    cells = [
        [key, number(row["rho"]), f"{row['low']:.2f} to {row['high']:.2f}"]
        for key, row in found["realism"].items()
    ]
    real = Table(["score", "Spearman's correlation", "95% interval"], cells)
    rows = []
    for key in ("fd", "precision", "recall"):
        chance = found["filtering"][f"random {key}"]
        values = [found["filtering"][part][key] for part in ("all", "kept")]
        span = f"{number(chance['mean'])} ({number(chance['5%'])} to {number(chance['95%'])})"
        rows.append([key, *map(number, values), span])
    kept = Table(["", "all", "most certain", "random (5% to 95%)"], rows)
    same = Table(["", ""], [[key, number(value)] for key, value in found["modes"].items()])
    made = Table(["", ""], [[key, str(value)] for key, value in found["posterior"].items()])
    sections = [
        Section("Outliers", [], tables),
        Section("Realism", [], [real]),
        Section("Filtering", [], [kept], [maps]),
        Section("Integrated features against networks drawn", [], [same]),
        Section("The rule", [RULE.strip()], [made]),
    ]
    title = "What a network's last layer says of its own uncertainty"
    return Report(title, answers(found), sections)


def pictured(samples: Drawn, path: Path, columns: int = 8) -> Picture:
    """The most certain and the most uncertain samples, each with its map below it."""
    order = samples.scores["score"].argsort()
    edge = min(columns, len(order) // 2)
    maps = samples.deviations / samples.deviations.max()
    rows = []
    for part in (order[:edge], order[-edge:]):
        images = samples.images[part]
        large = torch.nn.functional.interpolate(maps[part, None], images.shape[-2:])
        rows += [images, (255 * large).round().to(torch.uint8).expand_as(images)]
    save_grid(torch.cat(rows), path, columns=edge)
    caption = (
        "The most certain samples (above) and the most uncertain (below), each with the standard "
        "deviation of its latents by place: white is the largest of all samples."
    )
    return Picture("maps", caption, path.read_bytes())


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(json.dumps({**asdict(cfg), **SIZES[cfg.size]._asdict()}, indent=1))
        return
    size, subject, out = SIZES[cfg.size], open_subject(cfg.ckpt), Path(cfg.out)
    make_dir(out)
    posterior = fit(subject.gen, subject.layer, subject.train, size.pairs)
    save_posterior(out / "posterior.safetensors", posterior, subject.fingerprint)
    samples = draw(subject, posterior, size.samples, size.steps)
    found = {
        "posterior": {
            "pairs": size.pairs,
            "places": posterior.rows,
            "prior": round(posterior.prior, 3),
            "network": subject.fingerprint[:12],
        },
        "outliers": outliers(subject, posterior, size.outliers),
        "realism": realism(samples, size),
        "filtering": filtering(subject, samples, size),
        "modes": modes(subject, posterior, samples, size),
    }
    path = write(report(found, pictured(samples, out / "maps.png")), out)
    text = strict_json({**record.context(), "size": size._asdict(), **found}, indent=1)
    write_text(out / "uncertainty.json", text + "\n")
    print("\n".join(answers(found)))
    print(path)


if __name__ == "__main__":
    cli(main)
