"""U-Net against transformer: what the cards say, in the words of the rule in architecture.py, and
the page that says it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from experiments.answers import dropped, made_at, of_seeds, ratio, visible
from experiments.costs import TRAINING
from experiments.hypotheses import ENOUGH, FEW, MARGIN, Card, Cards, percent, points, values
from experiments.matched import ARMS, SIT_FLOPS, SIT_PARAMS, UNET
from experiments.page import band, bands, cell as over_seeds, choices, conditions, curve_loss
from experiments.page import paragraphs, samples
from experiments.paired import ALPHA, Paired, at_level, equivalent, holm, paired
from experiments.report import Chart, Panel, Report, Section, Table, number

SAID = {UNET: "U-Net", SIT_PARAMS: "SiT, equal parameters", SIT_FLOPS: "SiT, equal FLOP"}
EQUAL = {SIT_PARAMS: "equal parameters", SIT_FLOPS: "equal FLOP"}
REST = "floor of FD, rest"
Rows = Callable[[Card], list[Card]]


class Cell(NamedTuple):
    """One size at one resolution."""

    size: str
    resolution: int
    cards: Cards
    # {arm: a cards.Network}
    networks: dict[str, Any]
    pictures: Path

    @property
    def name(self) -> str:
        return f"{self.size}-{self.resolution}"

    @property
    def title(self) -> str:
        return f"{self.size} at {self.resolution} px"


# ---- what is asked -------------------------------------------------------------------------------


class Measured(NamedTuple):
    """A primary endpoint."""

    what: str
    pairs: Paired


@dataclass(frozen=True)
class Question:
    """below, above: what it means that its endpoints are below or above 0."""

    title: str
    below: str
    above: str
    endpoints: list[Measured]


@dataclass(frozen=True)
class Answer:
    question: Question
    # Holm's p of each endpoint, two-sided.
    p: list[float]
    word: str

    @property
    def sentence(self) -> str:
        parts = [told(each, p) for each, p in zip(self.question.endpoints, self.p)]
        verdict, colon, rest = self.word.partition(":")
        head = f"{self.question.title}: {verdict.upper()}{colon}{rest}"
        return f"{head}. {'; '.join(parts)}. Seeds: {seeds_of(self.question)}."


def seeds_of(question: Question) -> int:
    return min(each.pairs.n for each in question.endpoints)


def told(each: Measured, p: float) -> str:
    if each.pairs.n < 2:
        return f"{each.what} {percent(each.pairs.mean)}"
    low, high = map(percent, each.pairs.interval)
    return f"{each.what} {percent(each.pairs.mean)} (90% interval {low} to {high}, p {p:.2g})"


def loss_of(card: Card) -> float | None:
    """Held-out L_u of a run's end, a geometric mean over t; None if no image was held out."""
    found = card["held_out"].get("all")
    return curve_loss(found) if found else None


def fd_of(card: Card) -> float:
    return points(card)[-1]["all"]["fd"]


def quarter(k: int) -> Callable[[Card], float | None]:
    """The same loss over a quarter of t: 0 is the least noise, 3 the most."""

    def loss(card: Card) -> float | None:
        if not card["held_out"].get("all"):
            return None
        by_t = card["held_out"]["all"]["loss_by_t"]
        n = len(by_t)
        part = by_t[k * n // 4 : (k + 1) * n // 4] or by_t
        return curve_loss({"loss_by_t": part})

    return loss


def against(cell: Cell, arm: str, measure: Callable[[Card], Any]) -> Paired:
    """log(transformer / U-Net) of a measure, by seed."""
    one = values(cell.cards, arm, "standard", measure)
    return paired(one, values(cell.cards, UNET, "standard", measure))


def less(one: Paired, other: Paired) -> Paired:
    """The difference of two log ratios, of the seeds that both have."""
    both = sorted(one.by_seed.keys() & other.by_seed.keys())
    return Paired({seed: one.by_seed[seed] - other.by_seed[seed] for seed in both}, {})


def questions(cells: list[Cell]) -> list[Question]:
    """All that the rule tests, in the order of the report."""
    found = []
    for cell in cells:
        for arm, equal in EQUAL.items():
            found.append(
                Question(
                    f"{cell.title}, {equal}",
                    "the transformer",
                    "the U-Net",
                    [
                        Measured("held-out loss", against(cell, arm, loss_of)),
                        Measured("FD", against(cell, arm, fd_of)),
                    ],
                )
            )
    return found + [scaling(*pair) for pair in neighbours(cells)] + [locality(c) for c in cells]


def neighbours(cells: list[Cell]) -> list[tuple[Cell, Cell]]:
    """Each size with the next larger one, at the same resolution. cells: from small to large."""
    found = []
    for resolution in sorted({cell.resolution for cell in cells}):
        own = [cell for cell in cells if cell.resolution == resolution]
        found += list(zip(own, own[1:]))
    return found


def scaling(small: Cell, large: Cell) -> Question:
    ratios = [against(cell, SIT_FLOPS, loss_of) for cell in (large, small)]
    what = f"held-out loss against the U-Net's, {large.size} against {small.size}"
    return Question(
        f'"A transformer scales better", {small.size} to {large.size} at {small.resolution} px',
        "it does",
        "the U-Net does",
        [Measured(what, less(*ratios))],
    )


def locality(cell: Cell) -> Question:
    ratios = [against(cell, SIT_FLOPS, quarter(k)) for k in (3, 0)]
    what = "held-out loss against the U-Net's, most noise against least"
    return Question(
        f'"A U-Net is local, a transformer global", {cell.title}',
        "it is so",
        "it is the other way round",
        [Measured(what, less(*ratios))],
    )


def answers(asked: list[Question]) -> list[Answer]:
    """Every question in the rule's words."""
    pairs = [each.pairs for question in asked for each in question.endpoints]
    adjusted = iter(holm([min(2 * min(own.p_below, own.p_above), 1.0) for own in pairs]))
    found = []
    for question in asked:
        p = [next(adjusted) for _ in question.endpoints]
        found.append(Answer(question, p, word(question, p)))
    return found


def word(question: Question, p: list[float]) -> str:
    pairs = [each.pairs for each in question.endpoints]
    seeds = seeds_of(question)
    if seeds < FEW:
        return f"open: {seeds} of the {FEW} seeds that the rule asks for"
    if all(equivalent(own.interval, MARGIN) for own in pairs):
        return "equal"
    if max(p) > ALPHA:
        return "open"
    strength = "supported" if seeds >= ENOUGH else "suggested"
    if all(own.mean < 0 for own in pairs):
        return f"{strength}: {question.below}"
    if all(own.mean > 0 for own in pairs):
        return f"{strength}: {question.above}"
    return "open"


def summary(cells: list[Cell]) -> dict[str, Any]:
    """What came out, for another page to show."""
    runs = [card for cell in cells for card in cell.cards.runs.values()]
    found = answers(questions(cells))
    return {
        "commands": [command_of(cell) for cell in cells],
        "cells": [cell.name for cell in cells],
        "seeds": sorted({seed for cell in cells for seed in cell.cards.seeds}),
        "commits": sorted({made_at(card, "commit") for card in runs}),
        "machines": sorted({made_at(card, "machine") for card in runs}),
        "networks": {cell.name: cell.networks for cell in cells},
        "answers": [
            {
                "title": each.question.title,
                "word": each.word,
                "sentence": each.sentence,
                "endpoints": [
                    {
                        "what": one.what,
                        "seeds": one.pairs.n,
                        "ratio": finite(one.pairs.mean),
                        "interval": [finite(bound) for bound in one.pairs.interval],
                        "p": p,
                    }
                    for one, p in zip(each.question.endpoints, each.p)
                ],
            }
            for each in found
        ],
    }


def command_of(cell: Cell) -> str:
    """What makes the cards of a cell."""
    cards = list(cell.cards.runs.values())
    images, asked = max(points(card)[-1]["images"] for card in cards), cards[0]["asked"]
    return (
        f"python experiments/architecture.py --sizes {cell.size} --resolutions {cell.resolution} "
        f"--images {images} --n {asked.get('n')}"
    )


def finite(log_ratio: float) -> float | None:
    """A ratio, if there is one."""
    return math.exp(log_ratio) if math.isfinite(log_ratio) else None


# ---- the page ------------------------------------------------------------------------------------


def build(cells: list[Cell], rule: str, planned: list[tuple[str, int]]) -> Report:
    """The whole report. planned: (size, resolution) of all that the plan has."""
    found = answers(questions(cells))
    sections = [tested(found), networks(cells), losses(cells), distances(cells)]
    sections += [pictured(cells), chosen(cells)]
    sections.append(Section("What was left out", left_out(cells, planned)))
    sections.append(what_was_measured(cells))
    sections.append(Section("The rule, as it was fixed", paragraphs(rule)))
    whole = [each for each in sections if each.tables or each.figures or each.text]
    return Report("U-Net against transformer", [each.sentence for each in found], whole)


def tested(found: list[Answer]) -> Section:
    rows, series, text = [], [], []
    for k, answer in enumerate(found):
        for each, p in zip(answer.question.endpoints, answer.p):
            low, high = each.pairs.interval
            rows.append([
                f"{answer.question.title}: {each.what}",
                str(each.pairs.n),
                ratio(each.pairs.mean),
                f"{ratio(low)} to {ratio(high)}" if each.pairs.n > 1 else "–",
                number(p),
                visible(each.pairs),
                answer.word,
            ])
            label = f"{k + 1}: {each.what.split(' against')[0]}"
            series.append(of_seeds(label, each.pairs, k))
            if each.pairs.dropped:
                text.append(dropped(f"{answer.question.title}, {each.what},", each.pairs))
    note = (
        "Ratios of the transformer to the U-Net, geometric means over seeds; below 1 the "
        "transformer is better, or what the claim says is so. p: two-sided, Holm's for all. "
        "visible: the smallest change that these seeds would have shown with 80% power."
    )
    head = ["question", "seeds", "ratio", "90% interval", "p", "visible", "answer"]
    labels = "; ".join(f"{k + 1}: {each.question.title}" for k, each in enumerate(found))
    chart = Chart(
        "paired-differences",
        f"Log ratio of the transformer to the U-Net, a point a seed. {labels}.",
        [Panel("Primary endpoints", "", "log ratio", upright(series), levels={"equal": 0.0})],
    )
    return Section("What was asked beforehand", text, [Table(head, rows, note)], [chart])


def upright(series: list[Any]) -> list[Any]:
    """Points over their number alone: names of endpoints would cover each other."""
    return [each._replace(x=[str(k + 1)] * len(each.x), label="") for k, each in enumerate(series)]


def networks(cells: list[Cell]) -> Section:
    """What each of them costs."""
    rows = []
    for cell in cells:
        unet = cell.networks[UNET]
        for arm in ARMS:
            own = cell.networks.get(arm)
            if not own:
                continue
            tuning = cell.cards.tuning.get(arm)
            rows.append([
                f"{cell.title}: {SAID[arm]}",
                own["model"],
                f"{own['parameters']:,}",
                f"{own['flops'] / 1e9:.3f}",
                *(f"{own[key] / unet[key]:.2f}" for key in ("parameters", "flops")),
                f"{own['bytes'] / 1e6:.2f}",
                f"{own['bytes'] / unet['bytes']:.2f}",
                f"{1e3 * own['seconds']:.2f}",
                f"{own['seconds'] / unet['seconds']:.2f}",
                f"{tuning['lr']:g}" if tuning else "–",
            ])
    head = ["", "network", "parameters", "GFLOP", "parameters / U-Net's", "FLOP / U-Net's",
            "MB kept", "/ U-Net's", "ms", "/ U-Net's", "learning rate"]
    note = (
        "GFLOP of one evaluation of one image. MB that training keeps of an image for the backward "
        "pass. ms an image of a forward and a backward pass, the fastest of several, taken in turn."
    )
    return Section("The networks", [], [Table(head, rows, note)])


def spent(cell: Cell, rows: Rows) -> Rows:
    """Rows with what training up to them took: TFLOP and seconds."""

    def costed(card: Card) -> list[Card]:
        own = cell.networks[card["arm"]]
        flops, seconds = TRAINING * own["flops"] / 1e12, own["seconds"]
        return [
            {**row, "TFLOP": flops * row["images"], "seconds": seconds * row["images"]}
            for row in rows(card)
        ]

    return costed


AXES = {"images": "images seen", "TFLOP": "TFLOP of training", "seconds": "seconds of its passes"}


def over_costs(
    cell: Cell, rows: Rows, y: Callable[[Card], float], label: str, log: str
) -> list[Panel]:
    """A measure over images, over arithmetic and over seconds."""
    costed = spent(cell, rows)
    return [
        Panel(
            f"{cell.title}, over {key}", axis, label,
            bands(cell.cards, "standard", costed, key, y), log,
        )
        for key, axis in AXES.items()
    ]


def losses(cells: list[Cell]) -> Section:
    """Held-out loss by t, and over what was spent."""
    by_t, charts, rows = [], [], []
    for cell in cells:
        series = []
        for color, arm in enumerate(cell.cards.arms):
            runs = [card for card in cell.cards.of(arm, "standard").values()
                    if card["held_out"].get("all")]
            columns = list(zip(*(card["held_out"]["all"]["loss_by_t"] for card in runs)))
            times = [(i + 0.5) / len(columns) for i in range(len(columns))]
            series.append(band(arm, times, [list(column) for column in columns], color))
            parts = [over_seeds(map(quarter(k), runs)) for k in range(4)]
            name = f"{cell.title}: {SAID[arm]}"
            rows.append([name, str(len(runs)), over_seeds(map(loss_of, runs)), *parts])
        by_t.append(Panel(cell.title, "t (1 = noise)", "held-out loss", series))
        panels = over_costs(cell, lambda card: card["curve"], curve_loss, "held-out loss", "x")
        if all(panel.series for panel in panels):
            caption = f"{cell.title}: held-out loss, a geometric mean over t, during training."
            charts.append(Chart(f"loss-{cell.name}", caption, panels))
    caption = "Held-out loss (squared error of the velocity) by t; one standard error over seeds."
    head = ["", "seeds", "held-out loss", "t < 1/4", "1/4 to 1/2", "1/2 to 3/4", "t > 3/4"]
    note = "Geometric means over t; ± is a standard error over seeds. t = 1 is noise."
    return Section(
        "Held-out loss", [], [Table(head, rows, note)], [Chart("loss-by-t", caption, by_t), *charts]
    )


def distances(cells: list[Cell]) -> Section:
    """FD over what was spent, and at equal spending."""
    charts, rows = [], []
    for cell in cells:
        goals = {key: least(cell, key) for key in ("TFLOP", "seconds")}
        for arm in cell.cards.arms:
            runs = list(cell.cards.of(arm, "standard").values())
            rows.append([
                f"{cell.title}: {SAID[arm]}",
                over_seeds(map(fd_of, runs)),
                *(over_seeds(fd_at(cell, card, key, goal) for card in runs)
                  for key, goal in goals.items()),
                over_seeds(points(card)[-1]["all"].get("fd_held_out") for card in runs),
                over_seeds(points(card)[-1]["all"].get("precision") for card in runs),
                over_seeds(points(card)[-1]["all"].get("recall") for card in runs),
            ])
        caption = f"{cell.title}: FD to the training images; ± one standard error over seeds."
        panels = over_costs(cell, points, lambda row: row["all"]["fd"], "FD", "xy")
        charts.append(Chart(f"fd-{cell.name}", caption, panels))
    head = ["", "FD, equal images", "FD, equal FLOP", "FD, equal seconds", "FD to held-out",
            "precision", "recall"]
    note = (
        "Equal FLOP and seconds: of the whole training, where the network that took least of them "
        "ended; between two checkpoints, on the line through their logarithms."
    )
    return Section("Samples", [], [Table(head, rows, note)], charts)


def least(cell: Cell, key: str) -> float:
    """What the cheapest network of a cell took for its whole training."""
    rows = spent(cell, points)
    return min(rows(card)[-1][key] for card in cell.cards.runs.values())


def fd_at(cell: Cell, card: Card, key: str, goal: float) -> float:
    """FD of a run where its training had taken so much."""
    rows = spent(cell, points)(card)
    x = [math.log(row[key]) for row in rows]
    y = [math.log(row["all"]["fd"]) for row in rows]
    return math.exp(at_level(x, y, math.log(goal)))


def pictured(cells: list[Cell]) -> Section:
    """The same noise through every network."""
    found = []
    for cell in cells:
        for picture in samples(cell.cards, cell.pictures).figures:
            caption = f"{cell.title}: {picture.caption}"
            found.append(replace(picture, name=f"{cell.name}-{picture.name}", caption=caption))
    return Section("The same noise through every network", [], [], found)


def chosen(cells: list[Cell]) -> Section:
    """What the tuning seed chose, and whether it would rather have chosen more."""
    tables, text = [], []
    for cell in cells:
        for table in choices(cell.cards).tables:
            tables.append(replace(table, note=f"{cell.title}."))
        if cell.cards.rates:
            tables.append(whole_runs(cell))
            text.append(at_best(cell))
        for arm, card in cell.cards.tuning.items():
            tried = [each["name"] for each in card["rates"]]
            ends = {tried[0]: "lowest", tried[-1]: "highest"}
            if end := ends.get(f"{card['lr']:g}"):
                text.append(
                    f"{cell.title}, {SAID.get(arm, arm)}: the {end} of the rates was the best; "
                    "beyond it there may be a better one."
                )
    return Section("Learning rates", text, tables)


def whole_runs(cell: Cell) -> Table:
    """What every learning rate comes to over a whole run."""
    rows = []
    for (arm, seed), card in cell.cards.rates.items():
        tried = ", ".join(f"{each['name']}: {number(each['fd'])}" for each in card["rates"])
        tuning = cell.cards.tuning.get(arm)
        chosen = f"{tuning['lr']:g}" if tuning else "–"
        rows.append([SAID.get(arm, arm), str(seed), tried, chosen])
    note = f"{cell.title}: whole runs of one seed, which chose nothing."
    return Table(["", "seed", "FD by learning rate", "chosen before"], rows, note)


def at_best(cell: Cell) -> str:
    """Would the order be the same, had whole runs chosen the rates? Of a network of which they were
    not made, its own run counts."""
    tried = {arm: seed for arm, seed in cell.cards.rates}
    seed = tried.get(UNET)
    runs = cell.cards.runs
    keys = {arm: (arm, seed, "standard", "") for arm in ARMS}
    lowest = {arm: fd_of(runs[key]) for arm, key in keys.items() if key in runs}
    for (arm, of), card in cell.cards.rates.items():
        if of == seed:
            lowest[arm] = min(each["fd"] for each in card["rates"])
    ratios = [
        f"{equal} {percent(math.log(lowest[arm] / lowest[UNET]))}"
        for arm, equal in EQUAL.items()
        if arm in lowest and UNET in lowest
    ]
    names = ", ".join(SAID.get(arm, arm) for arm in tried)
    return (
        f"{cell.title}: had whole runs of one seed chosen the rate ({names}), FD of the "
        f"transformer against the U-Net's would be: {', '.join(ratios) or 'not measured'}."
    )


def left_out(cells: list[Cell], planned: list[tuple[str, int]]) -> list[str]:
    """What this report cannot say, and why."""
    made = {(cell.size, cell.resolution) for cell in cells}
    seeds = min(len(cell.cards.of(UNET, "standard")) for cell in cells)
    budgets = []
    for cell in cells:
        images = max(points(card)[-1]["images"] for card in cell.cards.runs.values())
        budgets.append(f"{images:,} at {cell.title}")
    text = [f"Images a run: {', '.join(budgets)}. With more of them an order may change."]
    missing = [
        f"{size} at {resolution} px"
        for size, resolution in planned
        if (size, resolution) not in made
    ]
    if missing:
        text.append(f"Of the plan, {', '.join(missing)} was not run.")
    if not neighbours(cells):
        text.append("No resolution has two sizes: which network scales better was not asked.")
    if len({cell.resolution for cell in cells}) == 1:
        text.append("One resolution: how the order hangs on it was not seen.")
    if seeds < ENOUGH:
        text.append(f"{seeds} seeds: the rule's strongest word, supported, asks for {ENOUGH}.")
    text.append(
        "Patch, width, heads and depth of the transformer, and the U-Net's shape, were not tuned; "
        "weight decay, clipping and warm-up are the U-Net's defaults for all."
    )
    return text


def what_was_measured(cells: list[Cell]) -> Section:
    tables = []
    for cell in cells:
        for table in conditions(cell.cards).tables:
            # No tag is excluded here, so that the rest is all.
            rows = [row for row in table.rows if not row[0].startswith(("excluded", REST))]
            tables.append(replace(table, rows=rows, note=f"{cell.title}."))
    return Section("What was measured", [], tables)
