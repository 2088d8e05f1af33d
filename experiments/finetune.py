"""How to go on from an eps network: a flow, aligned, or as it was?   python experiments/finetune.py

Toy faces of 32 px. A network of eps on Stable Diffusion's table is trained without the faces that
wear glasses or stand in the night, then goes on with those alone:

    native   fm on its weights: other times, other points and another answer (nyaflow-xl's way)
    aligned  --objective ddpm --aligned: it goes on saying eps, the loss is fm's
    eps      as before

All start from one network, since a short training of several would leave none that is worth going
on from. Arms of a seed share images, their order, noise and quantiles of time.
It writes OUT/cards/*.json, report.md, report.html and samples.png, and goes on where it stopped.
--size dry goes through all of it in a minute.
"""

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import harness.interrupt  # noqa: F401

import torch

import train
from ckpt import load_unet
from data.dataset import open_dataset
from data.images import to_float
from experiments.arms import Sampler
from experiments.boost import Verdict, says, shown
from experiments.measures import References, held_out_u, in_u, open_references, sampled, sampling
from experiments.page import band, cell, paragraphs
from experiments.paired import Paired, check_each, mean_over_log, paired
from experiments.parts import Stopped
from experiments.report import Chart, Panel, Picture, Report, Section, Table, number, write
from harness import record
from harness.cli import cli, flag, parse
from harness.files import make_dir
from harness.pictures import save_grid, to_uint8
from harness.ranks import Ranks
from harness.rows import read_log
from objectives import make_objective
from samplers import open_generator
from training.precision import without_race
from vae import vae_from_meta

RULE = """
Written down before the first run. L_u is the squared error of the velocity on held-out faces of the
new kind, of the EMA, a mean over eight times from 1/16 to 15/16; FD is to the new kind's training
faces. Each arm trains at every rate, and has the rate of which L_u after all images is lowest in
the mean over seeds. All of it is of one network to start from; seeds are of what follows. Each run
has the lower FD of its two samplers. Asked of the seeds in pairs, by one-sided t tests of log
ratios at 5%, adjusted by Holm within a question; "suggested" is what three seeds can say, "against"
that the opposite is, all else is "not shown".
1.  B1, the end: L_u and FD of aligned after all images are below native's. Both tests.
2.  B2, the way: the mean of L_u over the logarithm of images is below native's for aligned.
3.  B3, the loss: FD of aligned after all images is below that of eps. The objective is then worth
    changing, and not only the data.
4.  B4, the source: FD of native after all images is below that of eps. "Adapted well to the flow
    matching target" says at least this.
"""
CPU = Ranks(0, 1, torch.device("cpu"))
TABLE = ("--objective", "ddpm", "--table", "scaled_linear")
ARMS = {
    "native": ("--objective", "fm"),
    "aligned": (*TABLE, "--aligned", "--density", "logit_normal"),
    "eps": TABLE,
}
# How an arm's network is read.
READ = {
    "native": make_objective("fm"),
    "aligned": make_objective("ddpm", table="scaled_linear", aligned=True),
    "eps": make_objective("ddpm", table="scaled_linear"),
}
NEW = "glasses | night background"
SIDE, HOLDOUT, SHOWN = 32, 0.0625, 8
SAMPLERS = (Sampler("heun", 8), Sampler("ddim", 16, 1.0))
BASE_SEED = 1_000
# Sampling seeds of training seed s begin at FIRST + APART · s.
FIRST, APART = 1_000_000, 100_000


class Size(NamedTuple):
    """base, images: of training before and after; every: images between two measures of L_u."""

    faces: int
    base: int
    images: int
    every: int
    model: str
    n: int


SIZES = {
    "cpu": Size(4096, 16_000, 800, 200, "tiny", 128),
    "dry": Size(400, 64, 64, 32, "nano", 16),
}
Card = dict[str, Any]


@dataclass(frozen=True)
class Config:
    size: Literal["cpu", "dry"] = flag("cpu", "how much of everything")
    seeds: tuple[int, ...] = flag((0, 1, 2), "of the runs", low=0, high=1e6)
    rates: tuple[float, ...] = flag((1e-3,), "learning rates that each arm tries", above=0, high=1)
    only: bool = flag(False, "train these and stop: another process does the rest")
    out: str = flag("runs/finetune", "runs, cards and report", writes="folder")


class Run(NamedTuple):
    """A training run: of an arm at a rate, or the base that all start from."""

    arm: str
    seed: int
    rate: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed}" + (f"-{self.rate:g}" if self.rate else "")


BASE = Run("base", BASE_SEED)


@dataclass(frozen=True)
class Bench:
    size: Size
    out: Path
    refs: References
    held: Any


def open_bench(size: Size, out: Path) -> Bench:
    make_dir(out / "cards")
    spec = f"toyfaces:{size.faces}"
    refs = open_references(spec, SIDE, HOLDOUT, (NEW,), "pca", out / "features", CPU)
    kept = {"resolution": SIDE, "holdout": HOLDOUT, "exclude_tags": (NEW,)}
    return Bench(size, out, refs, open_dataset(spec, stage="stage2", **kept).heldout)


# ---- runs ----------------------------------------------------------------------------------------


def words_of(size: Size, run: Run, out: Path) -> list[str]:
    """The flags of train.py that make a run."""
    words = ["--data", f"toyfaces:{size.faces}", "--resolution", SIDE, "--holdout", HOLDOUT]
    words += ["--exclude-tags", NEW, "--model", size.model, "--seed", run.seed, "--ema", 0.1]
    words += ["--preview-every", 0, "--workers", 0, "--out", out, "--name", run.name]
    if run.arm == "base":
        words += ["--stage", "fine", *TABLE, "--images", size.base, "--eval-every", size.base]
        return list(map(str, words))
    words += ["--stage", "stage2", *ARMS[run.arm], "--init", out / BASE.name]
    words += ["--images", size.images, "--eval-every", size.every, "--lr", run.rate]
    return list(map(str, words))


def trained(bench: Bench, run: Run) -> Path:
    """A run's folder, trained where it is not yet."""
    cfg, _ = parse(train.Config, "", words_of(bench.size, run, bench.out))
    print(f"---- {run.name}", flush=True)
    if train.train(without_race(train.resolve(cfg), CPU.device), CPU):
        raise Stopped()
    # A training waits with a stop for the end of its step, and here is none.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return bench.out / run.name


def card_of(bench: Bench, run: Run) -> Card:
    """What is known of a run after its training; made if there is no card of this size."""
    file, asked = bench.out / "cards" / f"{run.name}.json", [*bench.size]
    if file.is_file():
        card = json.loads(file.read_text())
        if card["asked"] == json.loads(json.dumps(asked)):
            return card
    folder = trained(bench, run)
    card = {**run._asdict(), "asked": asked, **record.context()}
    card["curve"] = starts(bench, folder) if run.arm == "base" else curve(run.arm, folder)
    record.save(file, card)
    return card


def curve(arm: str, folder: Path) -> list[dict[str, Any]]:
    """L_u of a run over images, from its log."""
    rows = []
    for _, row in read_log(folder / "log.jsonl")[0]:
        if row["event"] == "held-out":
            by_t = in_u(row["loss_by_t"], READ[arm])
            rows.append({"images": row["images"], "loss": sum(by_t) / len(by_t), "loss_by_t": by_t})
    return rows


def starts(bench: Bench, folder: Path) -> list[dict[str, Any]]:
    """L_u of a base before any of the new images, read as each arm reads it."""
    net, meta = load_unet(folder)
    vae, net = vae_from_meta(meta["vae"]), net.eval()
    shape = vae.latent_shape(SIDE)
    rows = []
    for arm in ("native", "aligned"):

        def plain(x: Any, t: Any, read: Any = READ[arm]) -> Any:
            return read.predict(net, x, t)

        gen = SimpleNamespace(plain=plain, vae=vae, latent_shape=shape)
        rows.append({"arm": arm, "images": 0, **held_out_u(gen, bench.held, CPU)})
    return rows


def with_samples(bench: Bench, card: Card) -> Card:
    """A card with FD by each sampler added, if it has none."""
    if "fd" in card:
        return card
    run = Run(card["arm"], card["seed"], card["rate"])
    first, found = FIRST + APART * run.seed, {}
    for how in SAMPLERS:
        cache = bench.out / "features"
        features, nfe = sampled(
            bench.out / run.name, how, bench.size.n, first, bench.refs, cache, CPU
        )
        compared = bench.refs.against("excluded", bench.refs.compared(features))
        found[how.label] = {"nfe": nfe, **compared}
    card["fd"] = found
    record.save(bench.out / "cards" / f"{run.name}.json", card)
    return card


# ---- the rule ------------------------------------------------------------------------------------


def best_rates(cards: list[Card]) -> dict[str, float]:
    """Of each arm, the rate of which L_u after all images is lowest in the mean over seeds."""
    found = {}
    for arm in ARMS:
        means = {}
        for rate in {card["rate"] for card in cards if card["arm"] == arm}:
            own = [last(card) for card in cards if card["arm"] == arm and card["rate"] == rate]
            means[rate] = sum(own) / len(own)
        found[arm] = min(means, key=means.get)
    return found


def chosen(cards: list[Card]) -> list[Card]:
    """The cards of each arm at its rate."""
    rates = best_rates(cards)
    return [card for card in cards if card["arm"] in ARMS and card["rate"] == rates[card["arm"]]]


def last(card: Card) -> float:
    return card["curve"][-1]["loss"]


def way(card: Card) -> float:
    rows = card["curve"]
    return mean_over_log([row["images"] for row in rows], [row["loss"] for row in rows])


def fd(card: Card) -> float:
    return min(row["fd"] for row in card["fd"].values())


def compared(cards: list[Card], one: str, other: str, value: Callable[[Card], float]) -> Paired:
    """Log ratios by seed of one arm's number to the other's."""
    by_seed = [
        {card["seed"]: value(card) for card in cards if card["arm"] == arm} for arm in (one, other)
    ]
    return paired(*by_seed)


def verdicts(cards: list[Card]) -> list[Verdict]:
    """cards: each arm's at its rate, with samples."""
    end = [compared(cards, "aligned", "native", value) for value in (last, fd)]
    on_the_way = compared(cards, "aligned", "native", way)
    loss, source = (compared(cards, arm, "eps", fd) for arm in ("aligned", "native"))
    both = f"L_u {shown(end[0])}, FD {shown(end[1])}"
    return [
        Verdict("B1, the end", says(end), f"aligned over native: {both}"),
        Verdict("B2, the way", says([on_the_way]), f"aligned over native: L_u {shown(on_the_way)}"),
        Verdict("B3, the loss", says([loss]), f"aligned over eps: FD {shown(loss)}"),
        Verdict("B4, the source", says([source]), f"native over eps: FD {shown(source)}"),
    ]


# ---- the report ----------------------------------------------------------------------------------


def report(base: Card, cards: list[Card], floor: dict[str, float], picture: Path) -> Report:
    mine = chosen(cards)
    lead = [f"{v.name}: {v.word}. {v.why}." for v in verdicts(mine)]
    text = ["± is a standard error over seeds; intervals are 90%, by seeds in pairs."]
    grid = Picture(
        "samples",
        "From the top: the start, eps, aligned, native, each by the sampler of its lower FD; "
        "training faces of the new kind.",
        picture.read_bytes(),
    )
    sections = [
        Section("Numbers", text, [numbers(base, cards, floor), by_t(cards)], [chart(cards)]),
        Section("Samples", [], [], [grid]),
        Section("The rule", paragraphs(RULE)),
    ]
    return Report("Fine-tuning an eps network: native, aligned or as it was", lead, sections)


def numbers(base: Card, cards: list[Card], floor: dict[str, float]) -> Table:
    mine, rates = chosen(cards), best_rates(cards)
    begun = {row["arm"]: number(row["loss"], 4) for row in base["curve"]}
    rows = [["the start, read as native", "–", "–", begun["native"], "–", "–"]]
    rows.append(["the start", "–", "–", begun["aligned"], *map(number, fds(base))])
    for arm in ARMS:
        for rate in sorted({card["rate"] for card in cards if card["arm"] == arm}):
            own = [card for card in cards if card["arm"] == arm and card["rate"] == rate]
            columns = ["–"] * len(SAMPLERS)
            if rate == rates[arm]:
                columns = [cell(fds(card)[k] for card in own) for k in range(len(SAMPLERS))]
            rows.append([arm, f"{rate:g}", cell(map(way, own)), cell(map(last, own)), *columns])
    seen = mine[0]["curve"][-1]["images"]
    head = ["arm", "rate", "L_u on the way", f"L_u after {seen:,}"]
    evaluations = [f"{row['nfe']:g}" for row in mine[0]["fd"].values()]
    head += [f"FD, {how.label} ({k} calls)" for how, k in zip(SAMPLERS, evaluations)]
    note = f"FD of {floor['n']} training faces of the new kind to the rest: {number(floor['fd'])}."
    return Table(head, rows, note)


def fds(card: Card) -> list[float]:
    return [row["fd"] for row in card["fd"].values()]


def by_t(cards: list[Card]) -> Table:
    """L_u after all images by time."""
    mine, rows = chosen(cards), []
    for arm in ARMS:
        ends = [card["curve"][-1]["loss_by_t"] for card in mine if card["arm"] == arm]
        rows.append([arm, *(number(sum(column) / len(column)) for column in zip(*ends))])
    n = len(mine[0]["curve"][-1]["loss_by_t"])
    return Table(["L_u at t", *(f"{(k + 0.5) / n:.3f}" for k in range(n))], rows)


def chart(cards: list[Card]) -> Chart:
    series = []
    for color, arm in enumerate(ARMS):
        runs = [card["curve"] for card in chosen(cards) if card["arm"] == arm]
        columns = [[row["loss"] for row in rows] for rows in zip(*runs)]
        series.append(band(arm, [row["images"] for row in runs[0]], columns, color))
    panel = Panel("Held-out loss of the velocity", "images", "L_u", series, "xy")
    return Chart("way", "Over images of the new kind; ± one standard error over seeds.", [panel])


def draw_grid(bench: Bench, cards: list[Card], seed: int) -> Path:
    """The same noise by every arm of a seed, and real faces."""
    rows = []
    for arm in ("base", "eps", "aligned", "native"):
        card = next(c for c in cards if c["arm"] == arm and c["seed"] in (seed, BASE_SEED))
        how = min(SAMPLERS, key=lambda each: card["fd"][each.label]["fd"])
        run = Run(arm, card["seed"], card["rate"])
        gen = open_generator(sampling(bench.out / run.name, how, 0, CPU.device), CPU.device)
        rows.append(gen.images(list(range(SHOWN))).images)
    spec = f"toyfaces:{bench.size.faces}"
    kept = {"resolution": SIDE, "holdout": HOLDOUT, "exclude_tags": (NEW,)}
    real = open_dataset(spec, stage="stage2", **kept).images(range(SHOWN))
    path = bench.out / "samples.png"
    save_grid(torch.cat([*rows, to_uint8(to_float(real))]), path, columns=SHOWN)
    return path


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    check_each("--seeds", cfg.seeds)
    check_each("--rates", cfg.rates)
    if dry_run:
        print(json.dumps(asdict(cfg), indent=1))
        return
    bench = open_bench(SIZES[cfg.size], Path(cfg.out))
    base = card_of(bench, BASE)
    runs = [Run(arm, seed, rate) for rate in cfg.rates for seed in cfg.seeds for arm in ARMS]
    cards = [card_of(bench, run) for run in runs]
    if cfg.only:
        return
    drawn = [with_samples(bench, card) for card in (base, *chosen(cards))]
    words = verdicts(drawn[1:])
    floor = bench.refs.floor("excluded", bench.size.n)
    # Where it lies means nothing elsewhere.
    config = {name: value for name, value in asdict(cfg).items() if name != "out"}
    found = {"config": config, "rates": best_rates(cards), "floor": floor}
    found["verdicts"] = [each._asdict() for each in words]
    record.save(bench.out / "verdict.json", {**record.context(), **found})
    grid = draw_grid(bench, drawn, cfg.seeds[0])
    write(report(base, cards, floor, grid), bench.out)
    print(bench.out / "report.html")


if __name__ == "__main__":
    cli(main)
