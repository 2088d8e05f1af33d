"""Does the assessor help? Arms that differ in one thing, paired by seed, and a verdict by a rule
that was fixed beforehand. Every flag of distill.py that the arms do not say goes to all of them.
    python experiments/ablate.py --teacher RUN --assessor-file assessor.safetensors \\
        --seeds 0,1,2 --images 40_000 --out runs/ablation

    A  no block losses (vanilla)                E  as D, by an assessor that was never trained
    B  block losses, λ = w                         (placebo; e_t is chance, so λ is large)
    C  block losses, λ = D's mean over the run  S  as D, a block with another's λ (placebo)
    D  block losses, λ by the assessor          F  as D, timesteps drawn by its profile
                                                G  as A, timesteps shifted by 3 towards noise

Arms of a seed share first weights, order of images, timesteps (but F, G) and noise. The same
command goes on where it stopped. It writes ablation.json (a card a run), ablation.png and
ablation.txt under --out. The hypothesis is that of the source: weights by the assessor make a
better student. It is supported only if D's FD is below B's and below C's by more than two standard
errors of the paired differences, over three seeds or more, and no bin of t has a held-out loss more
than 5 % above theirs.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import harness.interrupt  # noqa: F401

import json
import signal
import statistics
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch

import distill
from ckpt import find_checkpoint, load_unet, open_unet
from ckpt.hub import data_from_file
from data.cache import is_cache
from data.dataset import Dataset, open_dataset
from distillation.assessor import load_assessor
from distillation.teacher import describe_teacher
from eval_fid import distance, features_in
from experiments import verdict
from harness.cli import UserError, check_flags, check_values, cli, dashed, flag
from harness.cli import idle_flags, read_flags, shown
from harness.files import make_dir, strict_json, write_text
from harness.memory import check_memory
from harness.ranks import Ranks, join_ranks
from harness.rows import read_log
from harness.run import checkpoints, versions
from harness.typed import Count, Open, read_json
from metrics.distances import frechet_from_features
from metrics.features import cached_data
from metrics.inception import load_inception
from training.precision import without_race
from vae import vae_from_meta

ARMS: dict[str, dict[str, Any]] = {
    "A": {"assessor": "none", "block_weight": 0.0},
    "B": {"assessor": "none"},
    "C": {"assessor": "const"},
    "D": {"assessor": "david"},
    "E": {"assessor": "random"},
    "S": {"assessor": "shuffled"},
    "F": {"assessor": "david", "adaptive_t": True},
    "G": {"assessor": "none", "block_weight": 0.0, "shift": 3.0},
}
# Flags of distill.py that the arms and --seeds say.
FIXED = ("name", "seed", "lambdas", "assessor", "adaptive_t", "mode")


@dataclass(frozen=True)
class Config:
    """The ablation's own flags."""

    arms: tuple[str, ...] = flag(
        ("A", "B", "C", "D", "E", "S"),
        "A vanilla, B λ = w, C D's mean λ, D assessed, E untrained, S other blocks', "
        "F = D + --adaptive-t, G = A + --shift 3",
    )
    seeds: tuple[int, ...] = flag((0, 1, 2), "each with every arm", low=0, high=2**63 - 1)
    fd_images: int = flag(1_000, "generated for the Fréchet distance; 0 = none", low=0, high=1e7)
    fd_steps: int = flag(10, "Heun steps of each", low=1, high=1e6)
    fd_features: Literal["latents", "inception"] = flag(
        "latents", "latents: the autoencoder's, at 4×4 | inception: FID itself, needs its weights"
    )
    out: str = flag("runs/ablation", "where runs and report go", writes="folder")

    def asked(self) -> dict[str, Any]:
        """What a distance depends on, beside the images."""
        return {key: getattr(self, key) for key in ("fd_images", "fd_steps", "fd_features")}


# ---- one run -------------------------------------------------------------------------------------


def flags_of(
    shared: dict[str, Any], arm: str, seed: int, lambdas: tuple[float, ...] = ()
) -> distill.Config:
    """The flags of an arm's run: those that all share, without what this arm does not read."""
    fixed = {**ARMS[arm], "lambdas": lambdas, "name": f"{arm}-{seed}", "seed": seed}
    cfg = distill.Config(**{**shared, **fixed})
    while idle := idle_flags(cfg):
        cfg = replace(cfg, **{name: getattr(distill.Config, name) for name in idle})
    return replace(cfg, eval_every=shared.get("eval_every") or max(cfg.images // 10, 1))


def arm_config(
    shared: dict[str, Any], arm: str, seed: int, lambdas: tuple[float, ...] = ()
) -> distill.Config:
    """The distillation that an arm is."""
    return distill.resolve(flags_of(shared, arm, seed, lambdas))


def rows_of(run: Path, event: str) -> list[dict[str, Any]]:
    """The lines of one kind in a run's log."""
    path = run / "log.jsonl"
    rows, damaged = read_log(path)
    if damaged:  # what is averaged over a run needs all of it
        raise UserError(
            f"{path} has {len(damaged)} lines that are no entries of a log, the first "
            f"{damaged[0][:60]!r}",
            do="Restore it, or remove the run's folder: it is then trained again.",
        )
    return [row for _, row in rows if row.get("event") == event]


def mean_lambdas(run: Path) -> tuple[float, ...]:
    """λ of each block over a whole run, from its log."""
    rows = [row for row in rows_of(run, "train") if "blocks" in row]
    # Lines may stand for unequal stretches.
    ends = [row["images"] for row in rows]
    images = [end - before for end, before in zip(ends, [0, *ends])]
    return tuple(
        statistics.fmean([row["blocks"][name]["lambda"] for row in rows], images)
        for name in rows[0]["blocks"]
    )


def fd(cfg: Config, ckpt: Path | str, ds: Dataset, device: torch.device) -> float | None:
    """FD as the flags ask for it; None = they do not."""
    if not cfg.fd_images:
        return None
    return distance(ckpt, ds, cfg.fd_images, cfg.fd_steps, device, kind=cfg.fd_features)


def card_of(
    cfg: Config, own: distill.Config, arm: str, ds: Dataset, device: torch.device
) -> dict[str, Any]:
    """What a finished run came to. Kept beside it, so that FD is computed once."""
    run = Path(own.out) / own.name
    file = run / "card.json"
    weights = load_unet(find_checkpoint(run))[1]["fingerprint"]
    asked = {"images": int(checkpoints(run)[-1].name), "weights": weights, **cfg.asked()}
    if kept := read_kept(file, asked):
        return kept
    held, lines = rows_of(run, "held-out"), rows_of(run, "train")
    # A line of steps that were all skipped has no blocks.
    weighed = [row for row in lines if "blocks" in row]
    card = {
        "arm": arm,
        "seed": own.seed,
        **asked,
        "config": asdict(own),
        "fd": fd(cfg, run, ds, device),
        "held_out": [{key: row[key] for key in ("images", "loss", "loss_by_t")} for row in held],
        "train_images": [row["images"] for row in lines],
        "blocks": curves(weighed),
        "block_share": [row["block_share"] for row in weighed if "block_share" in row],
        "alarms": sum(bool(row.get("alarm")) for row in lines),
        "images_per_s": statistics.median(row["images_per_s"] for row in lines),
        **versions(),
    }
    write_text(file, strict_json(card, indent=1) + "\n")
    return card


def curves(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """{block: {metric: its value in each line of the log}}."""
    if not rows:
        return {}
    return {
        name: {metric: [row["blocks"][name][metric] for row in rows] for metric in block}
        for name, block in rows[-1]["blocks"].items()
    }


@dataclass
class HeldOut(Open):
    """A line of the log with the loss on held-out images."""

    images: Count
    loss: float | None
    loss_by_t: list[float | None]


@dataclass
class Kept(Open):
    """What a run came to (card_of), as it is kept beside it."""

    arm: Literal[tuple(ARMS)]
    seed: int
    fd: float | None
    held_out: list[HeldOut]
    train_images: list[Count]
    blocks: dict[str, dict[str, list[float | None]]]
    block_share: list[float | None]
    alarms: Count
    images_per_s: float


@dataclass
class Held(Open):
    """What FD is held against (references), as it is kept."""

    fingerprint: str
    floor: float
    floor_images: Count
    teacher: float | None


def read_kept(file: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What a file says, if it was made for the same question."""
    if not file.exists():
        return None
    advice = "Remove it: it is made anew from the runs."
    found = read_json(file, Kept if file.name == "card.json" else Held, advice)
    return found if asked.items() <= found.items() else None


def references(
    cfg: Config, own: distill.Config, ds: Dataset, device: torch.device
) -> dict[str, Any]:
    """FD of the teacher's own images, and of training images against others: what the arms' FD is
    to be held against. Kept in a file."""
    file, run = Path(cfg.out) / "references.json", Path(own.out) / own.name
    teacher = rows_of(run, "start")[0]["init"]["teacher"]
    asked = {"fingerprint": teacher, **cfg.asked()}
    if kept := read_kept(file, asked):
        return kept
    vae = vae_from_meta(open_unet(run).meta["vae"]).to(device)
    n = min(cfg.fd_images, len(ds) // 2)
    halves = []
    for low in (0, n):
        images = ds.images(range(low, low + n))
        halves.append(features_in(cfg.fd_features, images, vae, device))
    says_latents = "vae" in open_unet(own.teacher).meta
    found = {
        **asked,
        "floor": frechet_from_features(*halves),
        "floor_images": n,
        "teacher": fd(cfg, own.teacher, ds, device) if says_latents else None,
    }
    write_text(file, strict_json(found, indent=1) + "\n")
    return found


# ---- what cannot be compared ---------------------------------------------------------------------


def check(cfg: Config, shared: dict[str, Any]) -> dict[str, Any]:
    """Refuse what cannot be compared; returns what pretraining measured of the assessor."""
    check_flags(cfg)
    check_values(distill.Config(**shared))
    check_arms(cfg, shared)
    check_distance(cfg, shared)
    assessor_file = shared.get("assessor_file", "")
    reads = any(ARMS[arm]["assessor"] in distill.READS for arm in cfg.arms)
    if reads and not assessor_file:
        raise UserError(
            f"--arms {shown(cfg.arms)} need --assessor-file",
            do="Make one: python distill.py pretrain-assessor --teacher "
            f"{shared.get('teacher', 'RUN')}",
        )
    for arm in cfg.arms:
        for seed in cfg.seeds:
            arm_config(shared, arm, seed)
    check_read(cfg, shared)
    return check_accuracy(shared["teacher"], assessor_file) if reads else {}


def check_arms(cfg: Config, shared: dict[str, Any]) -> None:
    """Which arms, and what they say themselves."""
    if unknown := [arm for arm in cfg.arms if arm not in ARMS]:
        raise UserError(
            f"--arms {shown(tuple(unknown))}",
            wanted=f"some of {', '.join(ARMS)}",
            do="Choose from these.",
        )
    for values in (cfg.arms, cfg.seeds):
        if not values or len(set(values)) < len(values):
            raise UserError(
                f"--arms {shown(cfg.arms)} --seeds {shown(cfg.seeds)}",
                wanted="at least one of each, none twice",
                do="Name each once.",
            )
    for name in FIXED:
        if name in shared and shared[name] != getattr(distill.Config, name):
            raise UserError(
                f"{dashed(name)} is what the arms and --seeds say here", do="Leave it out."
            )
    both = distill.Config(**shared)
    if not both.block_weight or not (both.kd_weight or both.local_heads):
        raise UserError(
            f"--block-weight {both.block_weight:g} --kd-weight {both.kd_weight:g}: all arms would "
            "be one",
            do="Give both a weight above 0.",
        )
    if "G" in cfg.arms and both.shift != 1.0:
        raise UserError(
            f"--shift {both.shift}: arm G is A with --shift 3", do="Leave it out, or G."
        )
    if "C" in cfg.arms and "D" not in cfg.arms:
        raise UserError("--arms with C need D: C's weights are D's averages", do="Add D.")
    if not both.log_every:
        raise UserError("--log-every 0: the report is made from the logs", do="Leave it out.")


def check_distance(cfg: Config, shared: dict[str, Any]) -> None:
    """Can FD be computed? Found now, and not after the first run."""
    if not cfg.fd_images:
        return
    if cfg.fd_images == 1:
        raise UserError("--fd-images 1", wanted="0, or 2 and more", do="Try --fd-images 1000.")
    both = distill.Config(**shared)
    unet, _, meta = describe_teacher(both.teacher, **both.says)
    if unet.context_dim:
        raise UserError(
            "FD is of samples, and a network that is told what to draw by text cannot be sampled "
            "here yet",
            do="Add --fd-images 0: held-out losses only, no verdict.",
        )
    R = both.resolution or meta.get("resolution", 0)
    check_memory(f"--fd-images {cfg.fd_images} at --resolution {R}", cfg.fd_images * 3 * R**2)
    if cfg.fd_features == "inception":
        try:
            load_inception()
        except UserError as error:
            raise UserError(str(error), do="(Here that is --fd-features latents.)") from None


def check_read(cfg: Config, shared: dict[str, Any]) -> None:
    """Every flag that was given is read by some arm."""
    arms = [flags_of(shared, arm, cfg.seeds[0]) for arm in cfg.arms]
    for name, value in shared.items():
        if all(getattr(arm, name) != value for arm in arms) and name != "eval_every":
            raise UserError(
                f"{dashed(name)} changes nothing here: none of the arms {shown(cfg.arms)} reads it",
                do="Leave it out.",
            )


def check_accuracy(teacher: str, assessor_file: str) -> dict[str, Any]:
    """The assessor knows this teacher, and reads timesteps; returns how well."""
    meta = load_assessor(assessor_file).meta
    if meta.get("teacher") != load_unet(find_checkpoint(teacher))[1]["fingerprint"]:
        raise UserError(
            f"{assessor_file} was trained on another teacher's features",
            do=f"Pretrain one on {teacher}.",
        )
    found = meta.get("held_out", {})
    mean, chance = found.get("mean", 0), found.get("chance", 1)
    if mean < 3 * chance:
        raise UserError(
            f"{assessor_file} reads timesteps with accuracy {mean:.3f} on held-out images, chance "
            f"is {chance:.3f}: below three times chance there is nothing to test",
            do="Pretrain it longer.",
        )
    return found


# ---- the whole -----------------------------------------------------------------------------------


def ablate(cfg: Config, shared: dict[str, Any], ranks: Ranks) -> Path | None:
    """Run what has not been run, then report; returns the report's path, or None if it was asked to
    stop."""
    accuracy = check(cfg, shared)
    if {"B", "C", "D"} <= {*cfg.arms} and len(cfg.seeds) < verdict.SEEDS and ranks.rank == 0:
        print(
            f"note: {len(cfg.seeds)} seeds are compared, but the rule decides from "
            f"{verdict.SEEDS} on.",
            flush=True,
        )
    cards, ds = [], None
    arms = sorted(cfg.arms, key=lambda arm: arm == "C")  # C needs D
    jobs = [(arm, seed) for seed in cfg.seeds for arm in arms]
    for i, (arm, seed) in enumerate(jobs):
        if ranks.rank == 0:
            print(f"---- run {i + 1} of {len(jobs)}: arm {arm}, seed {seed}", flush=True)
        lambdas = mean_lambdas(Path(cfg.out) / f"D-{seed}") if arm == "C" else ()
        own = without_race(arm_config(shared, arm, seed, lambdas), ranks.device)
        stopped = distill.run(own, ranks)
        if stopped or int(checkpoints(Path(own.out) / own.name)[-1].name) < own.images:
            return None
        # A training waits with a stop for the end of its step, and here is none.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if ranks.rank == 0:
            ds = images_of(own) if ds is None else ds
            cards.append(card_of(cfg, own, arm, ds, ranks.device))
        ranks.barrier()
    if ranks.rank:
        return None
    hold = references(cfg, own, ds, ranks.device) if cfg.fd_images else {}
    return report(cfg, shared, cards, accuracy, hold)


def images_of(own: distill.Config) -> Dataset:
    """The images of a run, also where it was trained on their latents."""
    place = data_from_file(cached_data(own.data)) if is_cache(own.data) else own.data
    return open_dataset(
        place,
        stage=own.stage,
        exclude_tags=own.exclude_tags,
        resolution=own.resolution,
        holdout=own.holdout,
    )


def report(
    cfg: Config,
    shared: dict[str, Any],
    cards: list[dict[str, Any]],
    accuracy: dict[str, Any],
    hold: dict[str, Any],
) -> Path:
    """Write ablation.json, .png and .txt; returns the last."""
    out = Path(cfg.out)
    make_dir(out)
    answer, reasons = verdict.verdict(cards)
    page = {
        "verdict": answer,
        "reasons": reasons,
        "assessor": accuracy,
        "references": hold,
        "config": config_of(cfg, shared),
        "cards": cards,
    }
    write_text(out / "ablation.json", json.dumps(page, indent=1) + "\n")
    verdict.plot(cards, out / "ablation.png")
    text = verdict.text_report(
        cards,
        fd_images=cfg.fd_images,
        fd_features=cfg.fd_features,
        accuracy=accuracy,
        references=hold,
    )
    write_text(out / "ablation.txt", text)
    print(text)
    return out / "ablation.txt"


def config_of(cfg: Config, shared: dict[str, Any]) -> dict[str, Any]:
    """All flags, the ablation's own and what its runs share."""
    return {**asdict(distill.Config(**shared)), **asdict(cfg)}


def read(argv: list[str] | None = None) -> tuple[Config, dict[str, Any], bool]:
    """The command line: the ablation's own flags, those of distill.py that its runs share, and
    whether --dry-run was given."""
    given, dry_run = read_flags([Config, distill.Config], __doc__, argv)
    own = {field.name for field in fields(Config)}
    cfg = Config(**{name: value for name, value in given.items() if name in own})
    shared = {name: value for name, value in given.items() if name not in own}
    # Ten evaluations a run (flags_of), and no previews, if nothing else is asked for.
    return cfg, {"eval_every": 0, "preview_every": 0, **shared, "out": cfg.out}, dry_run


def main() -> None:
    cfg, shared, dry_run = read()
    if dry_run:
        check(cfg, shared)
        print(json.dumps(config_of(cfg, shared), indent=1))
        return
    ranks = join_ranks(distill.Config(**shared).device)
    if path := ablate(cfg, shared, ranks):
        print(path)
    ranks.leave()


if __name__ == "__main__":
    cli(main)
