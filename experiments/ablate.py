"""Does the assessor help? Arms that differ in one thing, paired by seed, and a verdict by a rule fixed beforehand.
    python distill.py ablate --teacher RUN --assessor-file assessor.safetensors --arms A,B,C,D,E,S --seeds 0,1,2 --images 40_000 --out runs/ablation

    A  no block losses (vanilla)                    E  as D, by an assessor that was never trained (placebo; e_t is chance, so λ is large)
    B  block losses, λ = w                          S  as D, every block with another block's λ (placebo)
    C  block losses, λ = D's mean over the run      F  as D, timesteps drawn by the assessor's profile
    D  block losses, λ by the assessor              G  as A, timesteps shifted by 3 towards noise

Arms of a seed share first weights, order of images, timesteps (but F, G) and noise. The same command goes on where it stopped. It
writes ablation.json (a card a run), ablation.png and ablation.txt under --out. The hypothesis is that of the source: weights by
the assessor make a better student. It is supported only if D's FD is below B's and below C's by more than two standard errors of
the paired differences, over three seeds or more, and no bin of t has a held-out loss more than 5 % above theirs.
"""

import json
import math
import signal
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from scipy.special import stdtr
from torch import Tensor

import distill
from distillation.assessor import load_assessor
from harness.run import checkpoints
from ckpt import find_checkpoint, load_unet, open_unet
from harness.cli import UserError, parse
from harness.ranks import pick_device
from harness.run import versions
from data.dataset import open_dataset
from data.images import to_float
from distill_flags import ASSESSED, BLOCKS, DRAWN
from metrics.features import cached_data, features_in_batches, pooled
from harness.files import make_dir, write_text
from metrics.inception import load_inception
from data.cache import is_cache
from metrics.distances import frechet_from_features
from harness.ranks import Ranks, join_ranks
from distillation.teacher import describe_teacher
from samplers import Sampling, open_generator
from vae import AnyVAE, vae_from_meta

ARMS: dict[str, dict[str, Any]] = {
    "A": {"assessor": "none", "block_weight": 0.0}, "B": {"assessor": "none"}, "C": {"assessor": "const"}, "D": {"assessor": "david"},
    "E": {"assessor": "random"}, "S": {"assessor": "shuffled"}, "F": {"assessor": "david", "adaptive_t": True},
    "G": {"assessor": "none", "block_weight": 0.0, "shift": 3.0},
}
WORSE, ERRORS, SEEDS = 1.05, 2.0, 3          # the rule: allowed held-out loss by t against B and C; standard errors of FD; seeds at least


@dataclass(frozen=True)
class Config(distill.Config):
    arms: tuple[str, ...] = ("A", "B", "C", "D", "E", "S")   # A vanilla, B λ = w, C D's mean λ, D assessed, E untrained, S other blocks', F = D + --adaptive-t, G = A + --shift 3
    seeds: tuple[int, ...] = (0, 1, 2)   # each with every arm
    fd_images: int = 1_000               # generated for the Fréchet distance; 0 = none
    fd_steps: int = 10                   # Heun steps of each
    fd_features: Literal["latents", "inception"] = "latents"   # the autoencoder's latents at 4×4; inception: FID itself, needs its weights
    out: str = "runs/ablation"           # where runs and report go
    eval_every: int = 0                  # images; 0 = ten times a run
    preview_every: int = 0               # images; 0 = never


# ---- one run --------------------------------------------------------------------------------------------------------

def arm_config(cfg: Config, arm: str, seed: int, lambdas: tuple[float, ...] = ()) -> distill.Config:
    """The distillation an arm is."""
    own = {k: v for k, v in asdict(cfg).items() if k in distill.Config.__dataclass_fields__}
    own = {k: tuple(v) if isinstance(v, list) else v for k, v in own.items()}
    arm_is, unset = ARMS[arm], lambda *names: {name: getattr(distill.Config, name) for name in names}       # what is not for this arm
    own |= unset("assessor_file", *ASSESSED) if arm_is["assessor"] not in distill.READS else {}
    own |= unset(*BLOCKS) if not arm_is.get("block_weight", 1) else {}
    own |= unset("block_weights") if lambdas else {}
    own |= unset("density") if "adaptive_t" in arm_is else unset(*DRAWN)
    return distill.resolve(distill.Config(**{**own, **ARMS[arm], "lambdas": lambdas, "name": f"{arm}-{seed}", "seed": seed,
                                             "eval_every": cfg.eval_every or max(cfg.images // 10, 1)}))


def rows_of(run: Path, event: str) -> list[dict[str, Any]]:
    """The lines of one kind in a run's log."""
    return [row for row in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if row["event"] == event]


def mean_lambdas(run: Path) -> tuple[float, ...]:
    """λ of each block over a whole run, from its log."""
    rows = [row for row in rows_of(run, "train") if "blocks" in row]
    images = [row["images"] - before for row, before in zip(rows, [0] + [row["images"] for row in rows])]   # lines may stand for unequal stretches
    return tuple(statistics.fmean([row["blocks"][name]["lambda"] for row in rows], images) for name in rows[0]["blocks"])


@torch.no_grad()
def generate(ckpt: Path | str, n: int, steps: int, device: torch.device, method: str = "heun", seed: int = 0) -> tuple[Tensor, AnyVAE]:
    """n images of seeds seed, seed + 1, … from a checkpoint that says what it is: uint8 (n, 3, H, W), and its autoencoder. Classes in turn."""
    gen = open_generator(Sampling(str(ckpt), method=method, steps=steps), device)
    labels = torch.arange(n) % len(gen.classes) if gen.classes else None
    parts = []
    for index in torch.arange(n).split(64):
        y = None if labels is None else labels[index]
        parts.append(gen.images((seed + index).tolist(), y).images.cpu())
    return torch.cat(parts), gen.vae



def latent_features(images: Tensor, vae: AnyVAE, device: torch.device) -> Tensor:
    """uint8 (n, 3, H, W) -> their latents, averaged to 4×4, flat: (n, d) fp32 on the CPU. With more dimensions than images a
    covariance says little."""
    return torch.cat([pooled(vae.encode(to_float(part).to(device)), 4).cpu() for part in images.split(64)])


def features_of(images: Tensor, vae: AnyVAE, kind: str, device: torch.device) -> Tensor:
    """uint8 (n, 3, H, W) -> (n, d) fp32 on the CPU: latent_features, or Inception's."""
    if kind == "latents":
        return latent_features(images, vae, device)
    return features_in_batches(load_inception(device=device), lambda part: images[part.start:part.stop], range(len(images)), device)


def distance(ckpt: Path | str, ds: Any, n: int, steps: int, device: torch.device, method: str = "heun", kind: str = "latents", seed: int = 0) -> float:
    """FD of n generated images against as many of ds, in the space of the checkpoint's own latents or of Inception."""
    images, vae = generate(ckpt, n, steps, device, method, seed)
    return frechet_from_features(*(features_of(x, vae, kind, device) for x in (images, ds.images(range(min(n, len(ds)))))))


def card_of(cfg: Config, own: distill.Config, arm: str, ds: Any, device: torch.device) -> dict[str, Any]:
    """What a finished run came to. Kept beside it, so that FD is computed once."""
    run = Path(own.out) / own.name
    file, last = run / "card.json", checkpoints(run)[-1]
    weights = load_unet(find_checkpoint(run))[1]["fingerprint"]
    asked = {"images": int(last.name), "weights": weights, "fd_images": cfg.fd_images, "fd_steps": cfg.fd_steps, "fd_features": cfg.fd_features}
    if file.exists() and asked.items() <= (card := json.loads(file.read_text())).items():
        return card
    held, lines = rows_of(run, "held-out"), rows_of(run, "train")
    weighed = [row for row in lines if "blocks" in row]                         # a line of steps that were all skipped has none
    blocks = {name: {m: [row["blocks"][name][m] for row in weighed] for m in block} for name, block in (weighed[-1]["blocks"] if weighed else {}).items()}
    fd = distance(run, ds, cfg.fd_images, cfg.fd_steps, device, kind=cfg.fd_features) if cfg.fd_images else None
    card = {"arm": arm, "seed": own.seed, **asked, "config": asdict(own), "fd": fd,
            "held_out": [{k: row[k] for k in ("images", "loss", "loss_by_t")} for row in held], "train_images": [row["images"] for row in lines],
            "blocks": blocks, "block_share": [row["block_share"] for row in weighed if "block_share" in row], "alarms": sum(bool(row.get("alarm")) for row in lines),
            "images_per_s": statistics.median(row["images_per_s"] for row in lines), **versions()}
    write_text(file, json.dumps(card, indent=1) + "\n")
    return card


def references(cfg: Config, own: distill.Config, ds: Any, device: torch.device) -> dict[str, Any]:
    """FD of the teacher's own images, and of training images against others: what the arms' FD is to be held against. Kept in a file."""
    file, teacher = Path(cfg.out) / "references.json", rows_of(Path(own.out) / own.name, "start")[0]["init"]["teacher"]
    asked = {"fingerprint": teacher, "fd_images": cfg.fd_images, "fd_steps": cfg.fd_steps, "fd_features": cfg.fd_features}
    if file.exists() and asked.items() <= (found := json.loads(file.read_text())).items():
        return found
    vae, n = vae_from_meta(open_unet(Path(own.out) / own.name).meta["vae"]).to(device), min(cfg.fd_images, len(ds) // 2)
    halves = [features_of(ds.images(range(low, low + n)), vae, cfg.fd_features, device) for low in (0, n)]
    found = {**asked, "floor": frechet_from_features(*halves), "floor_images": n,
             "teacher": distance(own.teacher, ds, cfg.fd_images, cfg.fd_steps, device, kind=cfg.fd_features) if "vae" in open_unet(own.teacher).meta else None}
    write_text(file, json.dumps(found, indent=1) + "\n")
    return found


# ---- the verdict ----------------------------------------------------------------------------------------------------

def paired(cards: list[dict[str, Any]], one: str, other: str, value: Any) -> tuple[float, float, int]:
    """(mean, standard error, n) of value(one) - value(other) over the seeds both have; nan for an error of one pair."""
    by = {(c["arm"], c["seed"]): value(c) for c in cards}
    d = [by[one, s] - by[other, s] for a, s in by if a == one and (other, s) in by]
    return (statistics.mean(d) if d else math.nan), (statistics.stdev(d) / math.sqrt(len(d)) if len(d) > 1 else math.nan), len(d)


def by_t(cards: list[dict[str, Any]], arm: str) -> list[float]:
    """Last held-out loss in each bin of t, over seeds."""
    last = [c["held_out"][-1]["loss_by_t"] for c in cards if c["arm"] == arm and c["held_out"]]
    return [statistics.mean(column) for column in zip(*last)]


def needed(cards: list[dict[str, Any]], other: str, error: float) -> str:
    """How large a gain over an arm the seeds' spread could have shown, in percent of its FD."""
    return f"{100 * ERRORS * error / statistics.mean(c['fd'] for c in cards if c['arm'] == other):.2g}%"


def verdict(cards: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """("supported" | "not supported" | "open", the reasons), by the rule in this file's head."""
    arms, reasons = {c["arm"] for c in cards}, []
    if missing := {"B", "C", "D"} - arms:
        return "open", [f"the rule compares D with B and C; missing: {', '.join(sorted(missing))}."]
    if any(c["fd"] is None for c in cards):
        return "open", ["no FD was computed (--fd-images 0)."]
    if any(not c["held_out"] for c in cards):
        return "open", ["no image was held out, so there is no loss by t."]
    good = True
    for other in ("B", "C"):
        mean, error, n = paired(cards, "D", other, lambda c: c["fd"])
        if n < SEEDS:
            return "open", [f"D and {other} share {n} of the {SEEDS} seeds the rule asks for."]
        holds = mean < -ERRORS * error
        worst = max(d / o for d, o in zip(by_t(cards, "D"), by_t(cards, other)))
        good = good and holds and worst <= WORSE
        luck = f", which chance alone does in {stdtr(n - 1, -ERRORS):.0%} of such comparisons" if holds else ""
        reasons.append(f"FD of D - {other}: {mean:+.4g} ± {error:.2g} ({n} seeds): {'below' if holds else 'not below'} zero by more than {ERRORS:g} "
                       f"standard errors{luck}; a gain of {needed(cards, other, error)} would have been.")
        reasons.append(f"held-out loss of D / {other}, worst bin of t: {worst:.3f} ({'within' if worst <= WORSE else 'above'} {WORSE:g}).")
    shares = [v for c in cards if c["arm"] == "D" for v in c.get("block_share", [])]
    if shares:
        blocks = [b for c in cards if c["arm"] == "D" for b in c["blocks"].values()]
        clipped = statistics.fmean(v for b in blocks for v in b["clipped"])
        drift = statistics.fmean(statistics.pstdev(b["lambda"]) / max(statistics.fmean(b["lambda"]), 1e-9) for b in blocks)
        reasons.append(f"the treatment: D's λ was clipped {clipped:.0%} of the time and drifted by {drift:.1%} of itself over a run; the blocks' losses were "
                       f"{statistics.fmean(shares):.1%} of the loss.")
    for placebo, what in (("E", "an assessor that was never trained"), ("S", "giving every block another's weight")):
        if placebo in arms:
            mean, error, n = paired(cards, "D", placebo, lambda c: c["fd"])
            told = "" if mean < -ERRORS * error else f"; D is not better than {what}, by this rule"
            reasons.append(f"FD of D - {placebo} (placebo): {mean:+.4g} ± {error:.2g} ({n} seeds; a gain of {needed(cards, placebo, error)} would have shown){told}.")
    return ("supported" if good else "not supported"), reasons


def images_to(cards: list[dict[str, Any]], arm: str, goal: str) -> list[int]:
    """Images until the held-out loss of each of an arm's runs was down to the last one of the goal's run of its seed; those that got there."""
    last = {c["seed"]: c["held_out"][-1]["loss"] for c in cards if c["arm"] == goal and c["held_out"]}
    curves = [[r["images"] for r in c["held_out"] if r["loss"] <= last.get(c["seed"], -math.inf)] for c in cards if c["arm"] == arm]
    return [curve[0] for curve in curves if curve]


def text_report(cards: list[dict[str, Any]], cfg: Config, accuracy: dict[str, Any], hold: dict[str, Any]) -> str:
    """A page that says what was compared and what came out."""
    answer, reasons = verdict(cards)
    arms = [a for a in ARMS if any(c["arm"] == a for c in cards)]
    lines = [f"Assessor-weighted distillation, {len(cards)} runs of {cards[0]['images']:,} images: the hypothesis is {answer.upper()}.", *reasons, "",
             f"assessor: held-out accuracy {accuracy.get('mean', math.nan):.3f}, chance {accuracy.get('chance', math.nan):.3f}"]
    if hold:
        own = f"the teacher's own FD {hold['teacher']:.5g}; " if hold["teacher"] is not None else ""
        lines.append(f"{own}FD of {hold['floor_images']:,} training images against as many others {hold['floor']:.5g}")
    lines += ["", "arm  seeds  held-out loss         FD                    FD - A                images to A's last loss  images/s  clipped  alarms"]
    for arm in arms:
        own = [c for c in cards if c["arm"] == arm]
        loss, fd = [c["held_out"][-1]["loss"] for c in own if c["held_out"]], [c["fd"] for c in own if c["fd"] is not None]
        mean, error, n = paired(cards, arm, "A", lambda c: c["fd"] if c["fd"] is not None else math.nan)
        clipped = [v for c in own for b in c["blocks"].values() for v in b["clipped"]]
        against = f"{mean:+.4g} ± {error:.2g}" if n and arm != "A" else ""
        there = images_to(cards, arm, "A")
        reach = f"{statistics.mean(there):,.0f} ({len(there)} of {len(own)})" if there else "-"
        speed, clip = statistics.median(c["images_per_s"] for c in own), statistics.mean(clipped) if clipped else 0.0
        lines.append(f"{arm:<4} {len(own):>5}  {spread(loss):<20}  {spread(fd):<20}  {against:<20}  {reach:<23}  {speed:>8.1f}  {clip:>7.2f}  "
                     f"{sum(c['alarms'] for c in own):>6}")
    space = "the space of the autoencoder's latents at 4×4; it is not an Inception FID" if cfg.fd_features == "latents" else "Inception's space (FID)"
    lines += ["", f"± is a standard error over seeds. FD is between {cfg.fd_images:,} generated and as many training images in {space}.",
              "Held-out loss is the EMA's, last and, for the images to A's, at each evaluation; in brackets, the runs that got there. images/s include whatever",
              "else the machine was doing. clipped: share of λ at a bound. alarms: log lines where one third of the timesteps had most of the gradient.", ""]
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean ± standard error."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.5g}{error}" if values else "-"


def plot(cards: list[dict[str, Any]], path: Path) -> None:
    """Held-out loss over images and by t, λ by block, share clipped and KD over images: one picture."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import ScalarFormatter
    arms = [a for a in ARMS if any(c["arm"] == a for c in cards)]
    colour = dict(zip(ARMS, plt.get_cmap("tab10").colors))
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), constrained_layout=True)
    base, style = by_t(cards, arms[0]), {"C": "--", "S": ":", "E": "-."}       # where lines lie on each other
    for arm in arms:
        own = [c for c in cards if c["arm"] == arm]
        for i, c in enumerate(own):
            label = arm if i == 0 else None
            axes[0, 0].plot([r["images"] for r in c["held_out"]], [r["loss"] for r in c["held_out"]], color=colour[arm], ls=style.get(arm, "-"), label=label, alpha=0.8)
            for axis, metric in ((axes[1, 1], "clipped"), (axes[1, 2], "kd")):
                if c["blocks"]:
                    curves = [b[metric] for b in c["blocks"].values()]
                    axis.plot(c["train_images"], [statistics.mean(v) for v in zip(*curves)], color=colour[arm], ls=style.get(arm, "-"), label=label, alpha=0.8)
        if base and (mine := by_t(cards, arm)):
            middles = [(i + 0.5) / len(base) for i in range(len(base))]
            axes[0, 1].plot(middles, [a / b for a, b in zip(mine, base)], color=colour[arm], ls=style.get(arm, "-"), label=arm, marker=".")
    axes[0, 1].axhline(WORSE, color="grey", lw=0.8, ls=":")
    assessed = next((c for c in cards if c["arm"] == "D"), None)
    for name, b in (assessed["blocks"] if assessed else {}).items():
        axes[1, 0].plot(assessed["train_images"], b["lambda"], label=name)
    first = {c["seed"]: c["fd"] for c in cards if c["arm"] == arms[0] and c["fd"] is not None}
    for arm in arms:
        points = [c["fd"] - first[c["seed"]] for c in cards if c["arm"] == arm and c["fd"] is not None and c["seed"] in first]
        axes[0, 2].scatter([arm] * len(points), points, color=colour[arm])
    for axis, title, x in ((axes[0, 0], "held-out loss (EMA), a line a seed", "images"),
                           (axes[0, 1], f"last held-out loss by t, relative to {arms[0]}", "t (1 = noise)"),
                           (axes[0, 2], f"FD above {arms[0]}'s, a point a seed", "arm"), (axes[1, 0], "λ by block, arm D, first seed", "images"),
                           (axes[1, 1], "share of λ clipped", "images"), (axes[1, 2], "KD = 1 - cos, mean over blocks", "images")):
        axis.set(title=title, xlabel=x)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    axes[0, 0].set_yscale("log")
    for formatted in (axes[0, 0].yaxis.set_major_formatter, axes[0, 0].yaxis.set_minor_formatter):
        formatted(ScalarFormatter())
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=90, format="png")
    plt.close(figure)
    temporary.replace(path)


# ---- the whole ------------------------------------------------------------------------------------------------------

def check(cfg: Config) -> dict[str, Any]:
    """Refuse what cannot be compared; returns what pretraining measured of the assessor."""
    if unknown := [a for a in cfg.arms if a not in ARMS]:
        raise UserError(f"--arms {','.join(unknown)}: wanted some of {', '.join(ARMS)}.")
    if not cfg.arms or not cfg.seeds or len({*cfg.arms}) < len(cfg.arms) or len({*cfg.seeds}) < len(cfg.seeds):
        raise UserError(f"--arms {','.join(cfg.arms)} --seeds {','.join(map(str, cfg.seeds))}: wanted at least one of each, none twice.")
    if taken := [f for f in ("name", "seed", "lambdas", "assessor", "adaptive_t", "mode") if getattr(cfg, f) != getattr(Config, f)]:
        raise UserError(f"--{taken[0].replace('_', '-')} is what the arms and --seeds say here.  Leave it out.")
    if not cfg.block_weight or not (cfg.kd_weight or cfg.local_heads):
        raise UserError(f"--block-weight {cfg.block_weight:g} --kd-weight {cfg.kd_weight:g}: all arms would be one.  Give both a weight above 0.")
    if "G" in cfg.arms and cfg.shift != 1.0:
        raise UserError(f"--shift {cfg.shift}: arm G is A with --shift 3.  Leave it out, or G.")
    if "C" in cfg.arms and "D" not in cfg.arms:
        raise UserError("--arms with C need D: C's weights are D's averages.")
    if not cfg.log_every:
        raise UserError("--log-every 0: the report is made from the logs.")
    if cfg.fd_images == 1 or cfg.fd_images < 0 or cfg.fd_steps < 1:
        raise UserError(f"--fd-images {cfg.fd_images} --fd-steps {cfg.fd_steps}: wanted 0 images, or 2 and more, and a step at least.")
    if cfg.fd_images and describe_teacher(cfg.teacher, cfg.teacher_objective, cfg.teacher_table)[0].context_dim:   # found now, and not after the first run
        raise UserError("FD is of samples, and a network that is told what to draw by text cannot be sampled here yet.  Add --fd-images 0: "
                        "held-out losses only, no verdict.")
    if cfg.fd_images and cfg.fd_features == "inception":
        try:
            load_inception()
        except UserError as error:
            raise UserError(f"{error}  (Here that is --fd-features latents.)") from None
    reading = any(ARMS[a]["assessor"] in distill.READS for a in cfg.arms)
    if reading and not cfg.assessor_file:
        raise UserError(f"--arms {','.join(cfg.arms)} need --assessor-file.  Make one: python distill.py pretrain-assessor --teacher {cfg.teacher}")
    idle = () if reading else ("assessor_file", *ASSESSED)
    idle += () if any("adaptive_t" in ARMS[a] for a in cfg.arms) else DRAWN
    if ignored := [name for name in idle if getattr(cfg, name) != getattr(Config, name)]:
        raise UserError(f"--{ignored[0].replace('_', '-')} changes nothing here: none of the arms {','.join(cfg.arms)} reads it.  Leave it out.")
    for arm in cfg.arms:
        for seed in cfg.seeds:
            arm_config(cfg, arm, seed)
    if reading:
        meta = load_assessor(cfg.assessor_file).meta
        if meta.get("teacher") != load_unet(find_checkpoint(cfg.teacher))[1]["fingerprint"]:
            raise UserError(f"{cfg.assessor_file} was trained on another teacher's features.  Pretrain one on {cfg.teacher}.")
        found = meta.get("held_out", {})
        if found.get("mean", 0) < 3 * found.get("chance", 1):
            raise UserError(f"{cfg.assessor_file} reads timesteps with accuracy {found.get('mean', 0):.3f} on held-out images, "
                            f"chance is {found.get('chance', 0):.3f}: "
                            "below three times chance there is nothing to test.  Pretrain it longer.")
        return found
    return {}


def ablate(cfg: Config, ranks: Ranks) -> Path | None:
    """Run what has not been run, then report; returns the report's path, or None if it was asked to stop."""
    accuracy, cards, ds = check(cfg), [], None
    if ranks.rank == 0 and {"B", "C", "D"} <= {*cfg.arms} and len(cfg.seeds) < SEEDS:
        print(f"note: {len(cfg.seeds)} seeds are compared, but the rule decides from {SEEDS} on.", flush=True)
    jobs = [(arm, seed) for seed in cfg.seeds for arm in sorted(cfg.arms, key=lambda a: a == "C")]          # C needs D
    for i, (arm, seed) in enumerate(jobs):
        if ranks.rank == 0:
            print(f"---- run {i + 1} of {len(jobs)}: arm {arm}, seed {seed}", flush=True)
        own = arm_config(cfg, arm, seed, mean_lambdas(Path(cfg.out) / f"D-{seed}") if arm == "C" else ())
        if distill.run(own, ranks) or int(checkpoints(Path(own.out) / own.name)[-1].name) < own.images:
            return None
        signal.signal(signal.SIGINT, signal.default_int_handler)                # train()'s wait for the end of a step, and here is none
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if ranks.rank == 0:
            images = cached_data(own.data) if is_cache(own.data) else own.data
            ds = ds or open_dataset(images, stage=own.stage, exclude_tags=own.exclude_tags, resolution=own.resolution, holdout=own.holdout)
            cards.append(card_of(cfg, own, arm, ds, pick_device(cfg.device)))
        ranks.barrier()
    if ranks.rank:
        return None
    out = Path(cfg.out)
    make_dir(out)
    answer, reasons = verdict(cards)
    hold = references(cfg, own, ds, pick_device(cfg.device)) if cfg.fd_images else {}
    report = {"verdict": answer, "reasons": reasons, "assessor": accuracy, "references": hold, "config": asdict(cfg), "cards": cards}
    write_text(out / "ablation.json", json.dumps(report, indent=1) + "\n")
    plot(cards, out / "ablation.png")
    write_text(out / "ablation.txt", text_report(cards, cfg, accuracy, hold))
    print((out / "ablation.txt").read_text())
    return out / "ablation.txt"


def main(argv: list[str]) -> None:
    cfg, dry_run = parse(Config, __doc__, argv)
    if dry_run:
        check(cfg)
        print(json.dumps(asdict(cfg), indent=1))
        return
    ranks = join_ranks(cfg.device)
    if path := ablate(cfg, ranks):
        print(path)
    ranks.leave()
