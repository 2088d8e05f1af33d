"""The report of a comparison, made of its cards and nothing else."""

import math
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments import hypotheses as rule
from experiments.answers import made_at, tests
from experiments.arms import SAID, STAGES
from experiments.hypotheses import Card, Cards, best, percent, points, swept
from experiments.paired import crossing, paired
from experiments.report import Chart, Panel, Picture, Report, Section, Series, Table
from experiments.report import number, with_error

# Tags of a chart of marginals, at most.
TAGS = 24
Number = Callable[[Card], Any]


# ---- over seeds ----------------------------------------------------------------------------------


def mean_and_error(found: Iterable[Any]) -> tuple[float, float]:
    """Mean and standard error of the numbers that are there; nan where there are too few."""
    numbers = [value for value in found if value is not None and not math.isnan(value)]
    if not numbers:
        return math.nan, math.nan
    error = math.nan
    if len(numbers) > 1:
        error = statistics.stdev(numbers) / math.sqrt(len(numbers))
    return statistics.fmean(numbers), error


def cell(found: Iterable[Any]) -> str:
    return with_error(*mean_and_error(found))


def band(arm: str, x: list[Any], columns: list[list[Any]], color: int) -> Series:
    """A line of means with ± one standard error; columns: the seeds' numbers at each x."""
    middle = [mean_and_error(column) for column in columns]
    means = [mean for mean, _ in middle]
    errors = [0.0 if math.isnan(error) else error for _, error in middle]
    low = [mean - error for mean, error in zip(means, errors)]
    high = [mean + error for mean, error in zip(means, errors)]
    return Series(arm, x, means, low, high, color)


def bands(
    cards: Cards, stage: str, rows: Callable[[Card], list[Card]], x: str, y: Number, base: str = ""
) -> list[Series]:
    """A band an arm, of a number of rows that every run of a stage has."""
    found = []
    for color, arm in enumerate(cards.arms):
        runs = [rows(card) for card in cards.of(arm, stage, base).values()]
        if runs and all(runs):
            shortest = min(map(len, runs))
            places = [row[x] for row in runs[0][:shortest]]
            columns = [[y(run[i]) for run in runs] for i in range(shortest)]
            found.append(band(arm, places, columns, color))
    return found


def curve_loss(row: Card) -> float:
    """L_u of a line of the log: the geometric mean over t, in which no time outweighs the rest."""
    return math.exp(statistics.fmean(math.log(value) for value in row["loss_by_t"]))


# ---- sections ------------------------------------------------------------------------------------


def build(cards: Cards, rule_text: str, pictures: Path) -> Report:
    """The whole report. pictures: the folder of PNGs of samples, if it is there."""
    tested = {rule.FLOW, rule.DDPM} <= set(cards.arms)
    sections, lead = [], [f"Runs of {', '.join(named(arm) for arm in cards.arms)}."]
    if tested:
        found = rule.endpoints(cards)
        verdicts = rule.verdicts(found)
        lead = [each.sentence for each in verdicts]
        sections.append(tests(cards, found, verdicts))
    stages = [stage for stage in STAGES if any(at == stage for _, _, at, _ in cards.runs)]
    sections += [quality(cards, stage) for stage in stages if is_swept(cards, stage)]
    sections.append(losses(cards))
    if "stage2" in stages and "excluded" in cards.references.get("floor", {}):
        sections.append(stage2(cards))
    sections += [diversity(cards), samples(cards, pictures), choices(cards), conditions(cards)]
    if tested:
        sections.append(Section("The rule, as it was fixed", paragraphs(rule_text)))
    whole = [each for each in sections if each.tables or each.figures or each.text]
    title = "Flow matching against DDPM, paired by seed" if tested else "Runs, side by side"
    return Report(title, lead, whole)


def paragraphs(text: str) -> list[str]:
    """Numbered points, each on one line."""
    return [" ".join(part.split()) for part in re.split(r"\n(?=\d)", text.strip())]


def named(arm: str) -> str:
    return f"{arm} ({SAID[arm]})" if arm in SAID else arm


def is_swept(cards: Cards, stage: str) -> bool:
    """Were runs of a stage sampled by several numbers of steps?"""
    return any(len(swept(card)) > 1 for key, card in cards.runs.items() if key[2] == stage)


def quality(cards: Cards, stage: str) -> Section:
    """After a stage: distances at each's best and at equal evaluations."""
    measures: list[tuple[str, Number]] = [
        ("FD, at its best", lambda card: best(card)["all"]["fd"]),
        ("FD, equal evaluations", lambda card: points(card)[-1]["all"]["fd"]),
        ("FD to held-out", lambda card: best(card)["all"]["fd_held_out"]),
        ("KD, at its best", lambda card: best(card)["all"]["kd"]),
        ("precision", lambda card: best(card)["all"].get("precision")),
        ("recall", lambda card: best(card)["all"].get("recall")),
        ("nearer to training than 95% of fresh", lambda card: copies(best(card))),
        ("sharpness / real", lambda card: sharp(cards, card)),
    ]
    rows = []
    for arm in cards.arms:
        runs = cards.of(arm, stage)
        if runs:
            used = sorted({card["best"] for card in runs.values()})
            cells = [cell(measure(card) for card in runs.values()) for _, measure in measures]
            rows.append([named(arm), str(len(runs)), ", ".join(used), *cells])
    head = ["arm", "seeds", "best sampler", *(name for name, _ in measures)]
    note = "± is a standard error over seeds. Fresh images: 5% by definition."
    charts = [
        Chart(
            f"fd-over-evaluations-{stage}",
            f"FD to the training images after {stage}, over evaluations of the network, by the "
            "same method; ± one standard error over seeds.",
            [fd_panel(cards, stage)],
        ),
        Chart(
            f"precision-recall-{stage}",
            "Precision and recall over the same numbers of evaluations.",
            [swept_panel(cards, stage, name) for name in ("precision", "recall")],
        ),
    ]
    text = budget(cards) if stage == "standard" else []
    return Section(f"Samples after {stage}", text, [Table(head, rows, note)], charts)


def fd_panel(cards: Cards, stage: str) -> Panel:
    series = bands(cards, stage, swept, "nfe", lambda row: row["all"]["fd"])
    floor = {}
    if "floor" in cards.references:
        floor = {"real against real": cards.references["floor"]["all"]["fd"]}
    return Panel("Equal evaluations", "evaluations an image", "FD", series, "xy", floor)


def swept_panel(cards: Cards, stage: str, name: str) -> Panel:
    """A measure over numbers of evaluations."""
    series = bands(cards, stage, swept, "nfe", lambda row: row["all"].get(name))
    return Panel(name, "evaluations an image", name, series, "x")


def copies(found: Card) -> float | None:
    return found["copies"]["copies"] if found.get("copies") else None


def sharp(cards: Cards, card: Card) -> float | None:
    real = cards.references.get("sharpness")
    return card["sharpness"] / real if real and card["sharpness"] is not None else None


def budget(cards: Cards) -> list[str]:
    """Does the order of arms hold at a part of the images?"""
    if not {rule.FLOW, rule.DDPM} <= set(cards.arms):
        return []
    text = []
    for k, name in ((0, "first"), (-1, "last")):
        def fd(card: Card, k: int = k) -> Any:
            return points(card)[k]["all"]["fd"]

        one = rule.values(cards, rule.FLOW, "standard", fd)
        other = rule.values(cards, rule.DDPM, "standard", fd)
        pairs = paired(one, other)
        if pairs.n:
            card = next(iter(cards.of(rule.FLOW, "standard").values()))
            images = points(card)[k]["images"]
            text.append(
                f"At the {name} point ({images:,} images), by the same sampler, FD of F is "
                f"{percent(pairs.mean)} against D's ({pairs.n} seeds; secondary)."
            )
    return text


def losses(cards: Cards) -> Section:
    """Held-out loss in one unit, by t and over images, and what that says of speed."""
    by_t, over = [], []
    for stage in STAGES:
        series = []
        for color, arm in enumerate(cards.arms):
            held = [card["held_out"].get("all") for card in cards.of(arm, stage).values()]
            runs = [found["loss_by_t"] for found in held if found]
            if runs:
                times = [(i + 0.5) / len(runs[0]) for i in range(len(runs[0]))]
                series.append(band(arm, times, [list(column) for column in zip(*runs)], color))
        if series:
            by_t.append(Panel(f"After {stage}", "t (1 = noise)", "L_u", series, "y"))
        curves = bands(cards, stage, lambda card: card["curve"], "images", curve_loss)
        if curves:
            axes = ("images seen", "L_u, geometric mean over t")
            over.append(Panel(f"During {stage}", *axes, curves, "xy"))
    if not by_t:
        return Section("Held-out loss")
    charts = [
        Chart("loss-by-t", "Squared error of the velocity on held-out images, by t.", by_t)
    ]
    if over:
        charts.append(
            Chart("loss-over-images", "The same during training, of the EMA.", over)
        )
    text = [
        "L_u is the squared error of the velocity that a prediction implies, whatever the network "
        "was trained to say: raw losses of two targets do not compare. All arms share what of it "
        "cannot be learnt."
    ]
    return Section("Held-out loss in one unit", text + speed(cards), [], charts)


def speed(cards: Cards) -> list[str]:
    """Images until F's held-out loss is down to D's last one, of D's."""
    if not {rule.FLOW, rule.DDPM} <= set(cards.arms):
        return []
    text = []
    for stage in STAGES:
        one, other = cards.of(rule.FLOW, stage), cards.of(rule.DDPM, stage)
        for label, fast, slow in (("F", one, other), ("D", other, one)):
            shares, never = [], []
            for seed in sorted(fast.keys() & slow.keys()):
                curve, goal = fast[seed]["curve"], slow[seed]["curve"]
                if not curve or not goal:
                    continue
                images = [row["images"] for row in curve]
                there = crossing(images, [curve_loss(row) for row in curve], curve_loss(goal[-1]))
                if there is None:
                    never.append(str(seed))
                else:
                    shares.append(math.log(there / goal[-1]["images"]))
            if shares:
                missed = f"; never with seeds {', '.join(never)}" if never else ""
                text.append(
                    f"{stage}: {label} reaches the other's last L_u after "
                    f"{math.exp(statistics.fmean(shares)):.2f} of its images (geometric mean of "
                    f"{len(shares)} seeds{missed})."
                )
    return text


def fd_to(found: Card, group: str) -> float | None:
    return found[group]["fd"] if found.get(group) else None


def stage2(cards: Cards) -> Section:
    """Acquisition and forgetting."""
    kinds: list[tuple[str, str, Number, str]] = [
        ("Acquisition", "share of samples with an excluded tag", lambda row: row["acquired"], "x"),
        ("FD to the excluded images", "FD", lambda row: fd_to(row, "excluded"), "xy"),
        ("Forgetting: FD to the other images", "FD", lambda row: fd_to(row, "rest"), "xy"),
    ]
    panels = [
        Panel(title, "images of stage2", y, bands(cards, "stage2", points, "images", value), log)
        for title, y, value, log in kinds
    ]
    against = []
    for color, arm in enumerate(cards.arms):
        curves = [rule.stage2_curve(cards, arm, seed) for seed in cards.seeds]
        curves = [curve for curve in curves if curve]
        if curves:
            columns = [list(column) for column in zip(*curves)]
            x = [mean_and_error(row["rest"]["fd"] for row in column)[0] for column in columns]
            y = [mean_and_error(row["acquired"] for row in column)[0] for column in columns]
            against.append(Series(arm, x, y, color=color))
    charts = [Chart("stage2-over-images", "Stage 2, ± one standard error over seeds.", panels)]
    if against:
        axes = ("FD to the other images (more = more forgotten)", "share with an excluded tag")
        caption = "The same without time: an arm that only runs faster moves along the same line."
        charts.append(Chart("stage2-trade", caption, [Panel("Trade", *axes, against)]))
    return Section("Stage 2: what fine left out", cross_text(cards), cross_table(cards), charts)


def cross_text(cards: Cards) -> list[str]:
    found = cards.references["reader"]
    if None in (found["found"], found["false"]):
        return []
    return [
        "Tags of samples are read from their features by a linear reader; on held-out images it "
        f"finds {found['found']:.1%} of those with an excluded tag and sees one in "
        f"{found['false']:.1%} of the others."
    ]


def cross_table(cards: Cards) -> list[Table]:
    """Stage 2 by either arm from either's fine base: is it F that is faster, or its base?"""
    pair, rows = (rule.FLOW, rule.DDPM), []
    for arm in pair:
        for base in pair:
            runs = cards.of(arm, "stage2", "" if base == arm else base)
            if runs:
                ends = [points(card) for card in runs.values()]
                rows.append([
                    f"{arm} from {base}'s base",
                    str(len(runs)),
                    *(cell(fd_to(run[k], "excluded") for run in ends) for k in (0, -1)),
                    *(cell(run[k]["acquired"] for run in ends) for k in (0, -1)),
                    cell(fd_to(run[-1], "rest") for run in ends),
                ])
    if len(rows) < 3:
        return []
    first = ends[0]
    early, late = f"{first[0]['images']:,}", f"{first[-1]['images']:,}"
    head = ["stage2", "seeds", f"FD excluded at {early}", f"at {late}", f"acquired at {early}",
            f"at {late}", f"FD rest at {late}"]
    note = "Two by two: objective of stage2, and whose fine run it starts from (native)."
    return [Table(head, rows, note)]


def diversity(cards: Cards) -> Section:
    """Shares of tags in samples against those of the data, and the spread over learning rates."""
    real = cards.references.get("tags", {})
    runs = {arm: cards.of(arm, "standard") for arm in cards.arms}
    runs = {arm: own for arm, own in runs.items() if own}
    if not real or not runs:
        return Section("Diversity")
    common = sorted(real, key=lambda tag: -real[tag])[:TAGS]
    series = [Series("data", common, [real[tag] for tag in common], color=7, kind="bars")]
    rows = []
    for color, arm in enumerate(cards.arms):
        if arm in runs:
            own = list(runs[arm].values())
            shares = [
                statistics.fmean(best(card)["tags"].get(tag, 0.0) for card in own)
                for tag in common
            ]
            series.append(Series(arm, common, shares, color=color, kind="bars"))
            spread = rule.spread(cards, arm)
            rows.append([
                named(arm),
                cell(variation(best(card)["tags"], real) for card in own),
                cell(card["sets"][-1]["all"].get("coverage") for card in own),
                cell(spread.values()),
            ])
    head = ["arm", "mean |share - data's| of a tag", "coverage", "log FD over learning rates"]
    note = "The last column: of the largest and the smallest FD, by runs of a part of the images."
    chart = Chart(
        "tags", "Share of images with each of the data's most common tags.",
        [Panel("Tags of samples and of the data", "", "share", series)],
    )
    return Section("Diversity", [], [Table(head, rows, note)], [chart])


def variation(shares: dict[str, float], real: dict[str, float]) -> float:
    """Mean absolute difference of tags' shares."""
    return statistics.fmean(abs(shares.get(tag, 0.0) - share) for tag, share in real.items())


def samples(cards: Cards, pictures: Path) -> Section:
    """The same noise through every arm, of the first seed."""
    found: list[Chart | Picture] = []
    for stage in STAGES:
        for arm in cards.arms:
            for seed in list(cards.of(arm, stage))[:1]:
                path = pictures / f"{arm}-{seed}-{stage}.png"
                if path.is_file():
                    caption = f"{named(arm)} after {stage}, seed {seed}"
                    found.append(Picture(f"samples-{stage}-{arm}", caption, path.read_bytes()))
    text = []
    if found:
        text = ["With exact networks both ODEs would map the same noise to the same image."]
    return Section("The same noise through every arm", text, [], found)


def choices(cards: Cards) -> Section:
    """What the tuning seed chose."""
    rows = []
    for arm, card in cards.tuning.items():
        rates = ", ".join(f"{each['name']}: {number(each['fd'])}" for each in card["rates"])
        tried = ", ".join(f"{each['name']}: {number(each['fd'])}" for each in card["samplers"])
        chosen = f"{card['lr']:g}, {best_name(card)}"
        rows.append([named(arm), chosen, rates, tried])
    if not rows:
        return Section("Choices")
    head = ["arm", "chosen", "FD by learning rate", "FD by sampler"]
    return Section("Each at its best: chosen on the tuning seed", [], [Table(head, rows)])


def best_name(card: Card) -> str:
    lowest = min(card["samplers"], key=lambda each: each["fd"])
    return lowest["name"]


def conditions(cards: Cards) -> Section:
    """What all numbers depend on."""
    refs = cards.references
    runs = [*cards.runs.values()]
    asked = runs[0]["asked"] if runs else {}
    rows = [
        ["data", str(refs.get("data", ""))],
        ["features of distances", str(refs.get("features", {}).get("features", ""))],
        ["samples of each set", str(asked.get("n", ""))],
        ["excluded", ", ".join(refs.get("excluded", []))],
    ]
    for key, found in refs.get("floor", {}).items():
        label = f"floor of FD, {key} ({found['n']} real images against the others)"
        rows.append([label, number(found["fd"])])
    for what, key in (("commits", "commit"), ("machines", "machine")):
        rows.append([what, "; ".join(sorted({made_at(card, key) for card in runs}))])
    return Section("What was measured", [], [Table(["", ""], rows)])
