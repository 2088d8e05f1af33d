"""Does the coupling of boosting help, and does its noise?   python experiments/boost.py

Toy faces of 16 px made 64 px large, by networks that differ in the start of their path and in what
they say: weights, order of images, times and noise are those of the seed.

    coupled     the small picture with noise of deviation 0.5883 (Fischer et al. 2023)
    little      with 0.3
    none        without noise
    noise       pure noise, and the small picture as a condition (concat), as everywhere here
    regression  t = 1 alone, without noise: one call that says the mean
    eps, v      as noise, but cascaded diffusion (Ho et al. 2022): DDPM's eps, or v on the cosine
                table
    psu, pixels no network: the small picture enlarged, through the autoencoder and not

It writes OUT/cards/*.json, report.md, report.html and pictures, and goes on where it stopped.
--size dry goes through all of it in a minute; twice makes faces of 32 px 64 px large, robohash
pictures of 64 px 128 px, with five arms.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import harness.interrupt  # noqa: F401

import torch
from torch import Tensor

from data.boosts import Before, open_stage
from data.dataset import open_dataset
from data.images import to_float
from diffusion.boosting import Stage, boost
from diffusion.coupling import enlarged, resize
from experiments.page import band, cell, paragraphs
from experiments.paired import ALPHA, Paired, check_each, holm, paired
from experiments.report import Chart, Panel, Picture, Report, Section, Series, Table, number, write
from harness import record
from harness.cli import cli, flag, parse
from harness.files import make_dir, strict_json
from harness.pictures import save_grid, to_uint8
from metrics.distances import frechet_from_features
from metrics.paired import patch_distance, psnr, sharpness, ssim

RULE = """
Written down before the first run. Each is asked of the seeds in pairs, by one-sided t tests of log
ratios at 5%, adjusted by Holm within a hypothesis; "suggested" is what three seeds can say.
1.  A1, few evaluations: FD of coupled is below that of noise at 1, 2 and 4 evaluations. Suggested
    if all three tests say so.
2.  A2, the noise is needed: the distance of patches of coupled is below that of none at 10
    evaluations.
3.  A3, regression averages: its PSNR is above that of every other network at every number of
    evaluations in the mean over seeds, its sharpness is below 0.9, and its distance of patches is
    above coupled's at 10 evaluations (tested).
4.  A4, many evaluations: at 40 coupled and noise differ in FD by less than FD between two halves of
    real images. Suggested if the 90% interval of the difference lies within that; against, if it
    lies outside.
5.  A5, cascaded diffusion: the distance of patches of coupled is below that of eps and below that
    of v, at 4 and at 10 evaluations. This one was written down after the runs of the others, when
    it was known that FD hardly tells them apart, and before the first run of eps and v.
"""
ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
NOISE = {"coupled": 0.5883, "little": 0.3, "none": 0.0, "noise": 1.0, "regression": 0.0}
NETS = tuple(NOISE)
# From noise 1.
DIFFUSION = {"eps": ["--target", "eps", "--table", "linear"]}
DIFFUSION["v"] = ["--target", "v", "--table", "cosine"]
# Rows of the two pictures, top down, and how many faces they show.
DRAWN = {
    "samples": ("regression", "none", "little", "coupled", "noise"),
    "diffusion": ("noise", *DIFFUSION),
}
SHOWN = 8
MANY = 40


class Size(NamedTuple):
    images: int
    faces: int
    holdout: float
    model: str
    euler: tuple[int, ...]
    data: str = "toyfaces"
    side: int = 64
    factor: int = 4

    @property
    def small(self) -> int:
        return self.side // self.factor

    @property
    def quick(self) -> bool:
        """Large pictures cost much: no diffusion, and no dopri5."""
        return self.side > 64

    @property
    def arms(self) -> tuple[str, ...]:
        return NETS if self.quick else (*NETS, *DIFFUSION)

    @property
    def pictures(self) -> tuple[str, ...]:
        return ("samples",) if self.quick else tuple(DRAWN)


SIZES = {
    "cpu": Size(8_000, 4096, 0.0625, "tiny", (1, 2, 4, 10, MANY)),
    "dry": Size(64, 400, 0.5, "nano", (1, 2, 4, 10, MANY)),
    "twice": Size(8_000, 4096, 0.0625, "tiny", (1, 2, 4, 10, MANY), "toyfaces", 64, 2),
    "robohash": Size(4_000, 2048, 0.03125, "tiny", (1, 2, 4, 10, MANY), "robohash", 128, 2),
}
Card = dict[str, Any]


@dataclass(frozen=True)
class Config:
    size: Literal["cpu", "dry", "twice", "robohash"] = flag("cpu", "how much of everything")
    seeds: tuple[int, ...] = flag((0, 1, 2), "of the runs", low=0, high=1e6)
    out: str = flag("runs/boost", "runs, cards and report", writes="folder")


# ---- runs ----------------------------------------------------------------------------------------


def train(size: Size, arm: str, seed: int, out: Path) -> Path:
    """A network's run, trained where it is not yet."""
    words = ["--objective", "cfm", "--lowres", size.factor, "--upsample", "psu"]
    words += ["--noise-aug", NOISE.get(arm, 1.0), *DIFFUSION.get(arm, [])]
    words += ["--data", f"{size.data}:{size.faces}", "--resolution", size.side, "--seed", seed]
    words += ["--holdout", size.holdout, "--model", size.model, "--images", size.images]
    if arm == "regression":
        words += ["--density", "gaussian", "--t-loc", 1, "--t-scale", 1e-4]
    return trained(out / f"{arm}-{seed}", words)


def trained(run: Path, words: list[Any]) -> Path:
    """A run of train.py with these flags, taken up where it stopped."""
    words = [*words, "--eval-every", 0, "--preview-every", 0, "--out", run.parent]
    words += ["--name", run.name]
    subprocess.run([sys.executable, ROOT / "train.py", *map(str, words)], check=True)
    return run


class Faces(NamedTuple):
    """Held-out pictures (n, 3, H, H) in [-1, 1], the same small, and features of the others."""

    truth: Tensor
    small: Tensor
    others: Tensor


def open_faces(size: Size) -> Faces:
    ds = open_dataset(f"{size.data}:{size.faces}", resolution=size.side, holdout=size.holdout)
    truth = to_float(ds.heldout.images(range(len(ds.heldout))))
    small = resize(truth, (size.small, size.small))
    return Faces(truth, small, features(to_float(ds.images(range(len(ds))))))


def features(pixels: Tensor) -> Tensor:
    """(n, 48): pictures averaged to 4×4, which leaves far fewer numbers than there are images."""
    return torch.nn.functional.avg_pool2d(pixels.double(), pixels.shape[-1] // 4).flatten(1)


def measured(faces: Faces, found: Tensor, nfe: float) -> dict[str, float]:
    """The numbers of enlarged pictures (n, 3, H, H) in [-1, 1]."""
    found = found.clamp(-1, 1)
    mine, true = found.add(1) / 2, faces.truth.add(1) / 2
    return {
        "nfe": nfe,
        "psnr": float(psnr(mine, true).mean()),
        "ssim": float(ssim(mine, true).mean()),
        "sharpness": sharpness(mine, true),
        "patches": patch_distance(mine, true),
        "fd": frechet_from_features(features(found), faces.others),
    }


def enlarge(stage: Stage, faces: Faces, **how: Any) -> tuple[Tensor, float]:
    """(pictures, evaluations an image) of one network; the noise of image i is that of seed i."""
    parts, calls = [], []
    for lo in range(0, len(faces.small), 64):
        seeds = list(range(lo, min(lo + 64, len(faces.small))))
        made = boost([stage], faces.small[lo : lo + 64], seeds, **how)
        parts.append(made.pixels)
        calls.append(made.costs[0].nfe_each.double())
    return torch.cat(parts), float(torch.cat(calls).mean())


def open_run(run: Path, small: int) -> tuple[Stage, Any]:
    """(a run's network, its autoencoder), for pictures of small px."""
    stage, after = open_stage(str(run), Before((small, small), None, [], False), CPU, "auto")
    return stage, after.vae


def walks(size: Size, arm: str) -> list[dict[str, Any]]:
    """How an arm is sampled."""
    if arm == "regression":
        return [{"method": "euler", "steps": 1}]
    euler = [{"method": "euler", "steps": k} for k in size.euler]
    if size.quick or arm in DIFFUSION:
        return euler
    return [*euler, {"method": "dopri5"}]


def card_of(size: Size, faces: Faces, arm: str, seed: int, out: Path) -> Card:
    """The card of one run, made if there is none of this size."""
    file, asked = out / "cards" / f"{arm}-{seed}.json", asked_of(size)
    if file.is_file():
        card = json.loads(file.read_text())
        if card["asked"] == asked:
            return card
    stage, _ = open_run(train(size, arm, seed, out), size.small)
    rows = []
    for how in walks(size, arm):
        pixels, nfe = enlarge(stage, faces, **how)
        rows.append({"method": how["method"], **measured(faces, pixels, nfe)})
    card = {"arm": arm, "seed": seed, "asked": asked, "rows": rows, **record.context()}
    record.save(file, card)
    return card


def asked_of(size: Size) -> list[Any]:
    """A size as a card keeps it: what all had before there were others, where it is only that."""
    usual = Size(*size[:5]) == size
    return json.loads(json.dumps(size[:5] if usual else size))


def without_network(faces: Faces, vae: Any) -> dict[str, dict[str, float]]:
    """What enlarging alone comes to, and how far apart two halves of the real are."""
    side = faces.truth.shape[-2:]
    large = resize(faces.small, side)
    with torch.no_grad():
        through = vae.decode(enlarged(faces.small, side, vae.encode))
        kept = vae.decode(vae.encode(faces.truth))
    half = len(faces.others) // 2
    floor = frechet_from_features(faces.others[:half], faces.others[half:])
    found = {"pixels": large, "psu": through, "the truth, through the autoencoder": kept}
    rows = {name: measured(faces, pixels, 0) for name, pixels in found.items()}
    return rows | {"floor": {"fd": floor}}


# ---- the rule ------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    name: str
    word: str
    why: str


def row_at(card: Card, steps: int) -> dict[str, float]:
    """An arm's numbers after so many Euler steps."""
    return next(r for r in card["rows"] if r["method"] == "euler" and r["nfe"] == steps)


def compared(cards: list[Card], one: str, other: str, steps: tuple[int, int], key: str) -> Paired:
    """Log ratios by seed of one arm's number to the other's."""

    def by_seed(arm: str, k: int) -> dict[int, float]:
        return {card["seed"]: row_at(card, k)[key] for card in cards if card["arm"] == arm}

    return paired(by_seed(one, steps[0]), by_seed(other, steps[1]))


def says(pairs: list[Paired]) -> str:
    """The word for "below" in all of some comparisons."""
    if min(p.n for p in pairs) < 3:
        return "open: fewer than three seeds"
    if max(holm([p.p_below for p in pairs])) < ALPHA:
        return "suggested"
    if max(holm([p.p_above for p in pairs])) < ALPHA:
        return "against"
    return "not shown"


def shown(p: Paired) -> str:
    low, high = p.interval
    return f"{math.exp(p.mean):.2f} ({math.exp(low):.2f} to {math.exp(high):.2f})"


def verdicts(cards: list[Card], floor: float) -> list[Verdict]:
    few = [compared(cards, "coupled", "noise", (k, k), "fd") for k in (1, 2, 4)]
    a1 = "FD of coupled over noise's at 1, 2, 4: " + ", ".join(map(shown, few))
    patches = compared(cards, "coupled", "none", (10, 10), "patches")
    a2 = f"distance of patches of coupled over none's at 10: {shown(patches)}"
    found = [
        Verdict("A1, few evaluations", says(few), a1),
        Verdict("A2, the noise is needed", says([patches]), a2),
        averages(cards),
        at_many(cards, floor),
    ]
    if any(card["arm"] in DIFFUSION for card in cards):
        found.append(against_diffusion(cards))
    return found


def averages(cards: list[Card]) -> Verdict:
    """A3."""
    worse = compared(cards, "coupled", "regression", (10, 1), "patches")

    def mean(arm: str, number_of: Callable[[Card], float]) -> float:
        found = [number_of(card) for card in cards if card["arm"] == arm]
        return sum(found) / len(found)

    own = mean("regression", lambda card: row_at(card, 1)["psnr"])
    blur = mean("regression", lambda card: row_at(card, 1)["sharpness"])
    others = [
        mean(arm, lambda card, i=i: card["rows"][i]["psnr"])
        for arm in NETS
        if arm != "regression"
        for i in range(len(cards[0]["rows"]))
    ]
    word = says([worse])
    if word == "suggested" and not (own > max(others) and blur < 0.9):
        word = "not shown"
    why = f"PSNR {own:.1f} dB, the others' best {max(others):.1f}; sharpness {blur:.2f}; "
    return Verdict(
        "A3, regression averages", word, why + f"coupled's patches over its: {shown(worse)}"
    )


def at_many(cards: list[Card], floor: float) -> Verdict:
    """A4."""
    fd = {
        (card["arm"], card["seed"]): row_at(card, MANY)["fd"]
        for card in cards
        if card["arm"] in ("coupled", "noise")
    }
    seeds = sorted({seed for _, seed in fd})
    apart = Paired({s: fd["coupled", s] - fd["noise", s] for s in seeds}, {})
    low, high = apart.interval
    why = f"FD of coupled less noise's at {MANY}: {apart.mean:.3f} ({low:.3f} to {high:.3f}), "
    why += f"against {floor:.3f} between halves of real images"
    if len(seeds) < 3:
        word = "open: fewer than three seeds"
    elif -floor < low and high < floor:
        word = "suggested"
    elif high < -floor or low > floor:
        word = "against"
    else:
        word = "not shown"
    return Verdict("A4, many evaluations", word, why)


def against_diffusion(cards: list[Card]) -> Verdict:
    """A5."""
    pairs = {
        (arm, k): compared(cards, "coupled", arm, (k, k), "patches")
        for arm in DIFFUSION
        for k in (4, 10)
    }
    told = [f"{arm}'s at {k}: {shown(p)}" for (arm, k), p in pairs.items()]
    why = "distance of patches of coupled over " + ", ".join(told)
    return Verdict("A5, cascaded diffusion", says([*pairs.values()]), why)


# ---- the report ----------------------------------------------------------------------------------

MEASURES = {
    "fd": "FD",
    "patches": "distance of patches",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "sharpness": "sharpness",
}


def report(
    size: Size, cards: list[Card], plain: dict[str, dict[str, float]], out: Path
) -> Report:
    found = verdicts(cards, plain["floor"]["fd"])
    lead = [f"{v.name}: {v.word}. {v.why}." for v in found]
    text = [
        "FD is of pictures averaged to 4×4 against the training images, which are others; patches "
        "are crops of 8 px less their mean, against the true pictures' own. ± is a standard error "
        "over seeds.",
    ]
    tests = Section("Numbers", text, [numbers(cards, plain)], [chart(cards, plain)])
    pictures = []
    for name in size.pictures:
        arms = DRAWN[name]
        many = ", ".join(arm for arm in arms if arm != "regression")
        one = "regression; " if "regression" in arms else ""
        caption = f"From the top: small; enlarged (psu); {one}{many} at 10 evaluations; the truth."
        pictures.append(Picture(name, caption, (out / f"{name}.png").read_bytes()))
    return Report(
        f"Boosting {size.small} px to {size.side} px: coupled or not",
        lead,
        [tests, Section("Samples", [], [], pictures), Section("The rule", paragraphs(RULE))],
    )


def arms_of(cards: list[Card]) -> list[str]:
    """Those that have run, in the order of everywhere."""
    return [arm for arm in (*NETS, *DIFFUSION) if any(card["arm"] == arm for card in cards)]


def numbers(cards: list[Card], plain: dict[str, dict[str, float]]) -> Table:
    rows = []
    for name, row in plain.items():
        if name != "floor":
            rows.append([name, "0", *(number(row[key]) for key in MEASURES)])
    for arm in arms_of(cards):
        runs = [card["rows"] for card in cards if card["arm"] == arm]
        for same in zip(*runs):
            nfe = sum(row["nfe"] for row in same) / len(same)
            label = arm if same[0]["method"] == "euler" else f"{arm}, dopri5"
            columns = [cell(row[key] for row in same) for key in MEASURES]
            rows.append([label, f"{nfe:g}", *columns])
    floor = number(plain["floor"]["fd"])
    note = f"FD between two halves of the training images: {floor}."
    return Table(["start", "evaluations", *MEASURES.values()], rows, note)


def chart(cards: list[Card], plain: dict[str, dict[str, float]]) -> Chart:
    panels = []
    for key in ("fd", "patches"):
        series: list[Series] = []
        for color, arm in enumerate(arms_of(cards)):
            runs = [card["rows"] for card in cards if card["arm"] == arm]
            same = [rows for rows in zip(*runs) if rows[0]["method"] == "euler"]
            columns = [[row[key] for row in rows] for rows in same]
            series.append(band(arm, [rows[0]["nfe"] for rows in same], columns, color))
        levels = {"psu": plain["psu"][key]}
        panels.append(Panel(MEASURES[key], "evaluations", MEASURES[key], series, "xy", levels))
    return Chart("evaluations", "Over Euler steps; ± one standard error over seeds.", panels)


def draw_grid(size: Size, faces: Faces, name: str, seed: int, out: Path) -> None:
    """Eight held-out faces by the arms of a picture. One that is there stays where its runs are
    gone."""
    path, arms = out / f"{name}.png", DRAWN[name]
    if path.is_file() and not all((out / f"{arm}-{seed}").is_dir() for arm in arms):
        return
    few = Faces(faces.truth[:SHOWN], faces.small[:SHOWN], faces.others)
    large = (size.side, size.side)
    rows = [resize(few.small, large, "nearest")]
    for arm in arms:
        stage, vae = open_run(train(size, arm, seed, out), size.small)
        if len(rows) == 1:
            with torch.no_grad():
                rows.append(vae.decode(enlarged(few.small, large, vae.encode)))
        steps = 1 if arm == "regression" else 10
        rows.append(enlarge(stage, few, method="euler", steps=steps)[0])
    save_grid(to_uint8(torch.cat([*rows, few.truth])), path, columns=SHOWN)


def answered(cfg: Config, out: Path) -> tuple[list[Verdict], Report]:
    """What became of each hypothesis, and the report."""
    size = SIZES[cfg.size]
    faces = open_faces(size)
    cards = []
    for seed in cfg.seeds:
        for arm in size.arms:
            cards.append(card_of(size, faces, arm, seed, out))
            print(f"{arm}, seed {seed}: {strict_json(cards[-1]['rows'][-1])}", flush=True)
    _, vae = open_run(train(size, "noise", cfg.seeds[0], out), size.small)
    plain = without_network(faces, vae)
    record.save(out / "cards" / "plain.json", plain)
    for name in size.pictures:
        draw_grid(size, faces, name, cfg.seeds[0], out)
    return verdicts(cards, plain["floor"]["fd"]), report(size, cards, plain, out)


def command(
    cls: type, doc: str, answered: Callable[[Any, Path], tuple[list[Verdict], Report]]
) -> None:
    """An experiment's command: cls are its flags, with `out`, where answered() finds OUT/cards."""
    cfg, dry_run = parse(cls, doc)
    check_each("--seeds", cfg.seeds)
    if dry_run:
        print(json.dumps(asdict(cfg), indent=1))
        return
    out = Path(cfg.out)
    make_dir(out / "cards")
    found, page = answered(cfg, out)
    # Where it lies means nothing elsewhere.
    config = {name: value for name, value in asdict(cfg).items() if name != "out"}
    about = {"config": config, "verdicts": [each._asdict() for each in found]}
    record.save(out / "verdict.json", {**record.context(), **about})
    write(page, out)
    print(out / "report.html")


def main() -> None:
    command(Config, __doc__, answered)


if __name__ == "__main__":
    cli(main)
