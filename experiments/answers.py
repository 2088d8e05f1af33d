"""What a comparison answers of what was asked beforehand: a section of its report, and JSON."""

import math
from typing import Any

from experiments import hypotheses as rule
from experiments.hypotheses import Card, Cards, percent
from experiments.paired import Paired
from experiments.report import Chart, Panel, Section, Series, Table, number


def tests(cards: Cards, found: list[rule.Endpoint], verdicts: list[rule.Verdict]) -> Section:
    """The primary endpoints, and the control."""
    rows, series, places = [], [], []
    for k, (each, verdict) in enumerate(zip(found, verdicts)):
        low, high = each.pairs.interval
        guards = "; ".join(guard_text(guard) for guard in each.guards)
        rows.append([
            f"{each.key}: {each.measure}",
            str(each.pairs.n),
            ratio(each.pairs.mean),
            f"{ratio(low)} to {ratio(high)}" if each.pairs.n > 1 else "–",
            number(verdict.p),
            visible(each.pairs),
            guards,
            verdict.word,
        ])
        series.append(of_seeds(each.key, each.pairs, k))
        places.append(each.key)
    own = rule.control(cards, rule.FLOW)
    if own.n:
        low, high = own.interval
        null = "null, as it must be" if low <= 0 <= high else "NOT null: distrust the rest"
        rows.append([
            f"control: {rule.FLOW} against {rule.FLOW} of other seeds",
            str(own.n),
            ratio(own.mean),
            f"{ratio(low)} to {ratio(high)}" if own.n > 1 else "–",
            number(2 * min(own.p_below, own.p_above, 0.5)),
            visible(own),
            "",
            null if own.n > 1 else "one pair says nothing",
        ])
        series.append(of_seeds("control", own, len(found)))
    numbers = ["F / D", "90% interval", "p", "visible"]
    head = ["endpoint", "seeds", *numbers, "guards (≤ 0 holds)", ""]
    note = (
        "Ratios of F to D, a geometric mean over seeds; below 1 is what the source says. p: "
        "one-sided, Holm's for three (control: two-sided). visible: the smallest change that these "
        "seeds would have shown with 80% power."
    )
    text = [dropped(each.key, each.pairs) for each in found if each.pairs.dropped]
    chart = Chart(
        "paired-differences",
        "Log ratio of F to D, a point a seed; below 0 is what the source says.",
        [Panel("Primary endpoints", "", "log (F / D)", series, levels={"no difference": 0.0})],
    )
    return Section("What was asked beforehand", text, [Table(head, rows, note)], [chart])


def of_seeds(label: str, pairs: Paired, color: int) -> Series:
    numbers = list(pairs.by_seed.values())
    return Series(label, [label] * len(numbers), numbers, color=color, kind="points")


def ratio(log_ratio: float) -> str:
    return number(math.exp(log_ratio)) if math.isfinite(log_ratio) else "–"


def visible(pairs: Paired) -> str:
    return percent(pairs.visible, sign=False) if pairs.n > 1 else "–"


def guard_text(guard: rule.Guard) -> str:
    if math.isnan(guard.value):
        return f"{guard.what}: not measured"
    return f"{guard.what}: {guard.value:+.3g}"


def dropped(key: str, pairs: Paired) -> str:
    reasons = "; ".join(f"seed {seed}: {why}" for seed, why in pairs.dropped.items())
    return f"Pairs that {key} does without: {reasons}."


def summary(cards: Cards) -> dict[str, Any]:
    """What came out, for another page to show."""
    runs = list(cards.runs.values())
    found = {
        "arms": cards.arms,
        "seeds": cards.seeds,
        "data": cards.references.get("data"),
        "commits": sorted({made_at(card, "commit") for card in runs}),
        "machines": sorted({made_at(card, "machine") for card in runs}),
    }
    if {rule.FLOW, rule.DDPM} <= set(cards.arms):
        tested = rule.endpoints(cards)
        found["tests"] = [
            {
                "key": each.key,
                "claim": each.claim,
                "measure": each.measure,
                "seeds": each.pairs.n,
                "ratio": math.exp(each.pairs.mean),
                "interval": [math.exp(bound) for bound in each.pairs.interval],
                "p": verdict.p,
                "visible": math.expm1(each.pairs.visible) if each.pairs.n > 1 else None,
                "word": verdict.word,
                "sentence": verdict.sentence,
            }
            for each, verdict in zip(tested, rule.verdicts(tested))
        ]
    return found


def made_at(card: Card, key: str) -> str:
    value = card["made"].get(key)
    if isinstance(value, dict):
        gpu = value.get("gpu")
        return gpu or f"{value.get('cpu')}, {value.get('threads')} thread(s)"
    return str(value)[:9]
