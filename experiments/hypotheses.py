"""What the first source claims of flow matching and DDPM, as numbers of cards, and the verdicts.

Endpoints are ratios of F to D by seed, each turned so that below 1 (a log below 0) is what the
source says. The rule by which they become words stands in compare.py.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from experiments.paired import ALPHA, Paired, at_level, equivalent, holm, mean_over_log, paired
from harness.cli import UserError

Card = dict[str, Any]
# Seeds from which a verdict says "suggested", and "supported".
FEW, ENOUGH = 3, 5
# Of a ratio: what counts as equal.
MARGIN = 0.05
# What cards must have been asked alike, and what their runs must share.
ALIKE = ("version", "n", "features", "evaluations")
ALIKE_IN_TRAINING = ("data", "resolution", "holdout", "model", "batch", "ema", "images", "decay")
# The two arms that the hypotheses are about, and the first seed of a control's second arm.
FLOW, DDPM = "F", "D"


# ---- finding numbers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Cards:
    """The cards of a comparison by what they are of."""

    runs: Mapping[tuple[str, int, str, str], Card]  # (arm, seed, stage, base arm or "")
    tuning: Mapping[str, Card]
    rates: Mapping[tuple[str, int], Card]
    references: Card
    control_seed: int

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(arm for arm, _, _, _ in self.runs))

    @property
    def seeds(self) -> list[int]:
        """Those of the comparison itself, without the control's."""
        return sorted({seed for _, seed, _, _ in self.runs if seed < self.control_seed})

    def of(self, arm: str, stage: str, base: str = "") -> dict[int, Card]:
        """An arm's runs of a stage by seed."""
        own = (arm, stage, base)
        return {
            seed: card
            for (name, seed, at, start), card in self.runs.items()
            if (name, at, start) == own and seed < self.control_seed
        }


def sort_cards(cards: list[Card], control_seed: int, differ: tuple[str, ...] = ()) -> Cards:
    """A list of cards, as read_cards() gives it. differ: the flags in which arms may differ."""
    runs, tuning, rates, references = {}, {}, {}, {}
    for card in cards:
        if card["kind"] == "run":
            runs[card["arm"], card["seed"], card["stage"], card["base"]] = card
        elif card["kind"] == "tuning":
            tuning[card["arm"]] = card
        elif card["kind"] == "rates":
            rates[card["arm"], card["seed"]] = card
        elif card["kind"] == "references":
            references = card
    found = Cards(runs, tuning, rates, references, control_seed)
    check_alike(found, differ)
    return found


def check_alike(cards: Cards, differ: tuple[str, ...] = ()) -> None:
    """Refuse cards that cannot be compared: of other data or latents, measured in other ways."""
    said: dict[str, tuple[str, Any]] = {}
    alike = [key for key in ALIKE_IN_TRAINING if key not in differ]
    if cards.references:
        said["data_hash"] = ("references", cards.references["data_hash"])
    for (arm, seed, stage, base), card in cards.runs.items():
        name = "-".join(filter(None, (arm, base and f"on-{base}", str(seed), stage)))
        asked = card["asked"]
        flags = asked.get("train", {})
        # A pca is fitted anew on every machine, from the data whose hash is compared.
        latents = "pca" if flags.get("vae") == "pca" else card["vae"]
        own = {"data_hash": card["data_hash"], f"latents of {stage}": latents}
        own |= {key: asked.get(key) for key in ALIKE}
        own |= {f"{key} of {stage}": flags.get(key) for key in alike}
        own[f"points of {stage}"] = asked.get("points")
        for key, value in own.items():
            before, first = said.setdefault(key, (name, value))
            if value != first:
                raise UserError(
                    f"the cards of {before} and {name} do not belong together: {key} is "
                    f"{first!r} and {value!r}",
                    do="Measure them alike, or keep them in folders of their own.",
                )


def last(card: Card, sampler: str) -> Card:
    """The samples of a run's end that one sampler drew."""
    end = card["sets"][-1]["images"]
    for found in card["sets"]:
        if found["images"] == end and found["sampler"] == sampler:
            return found
    raise UserError(
        f"the card of {card['arm']}, seed {card['seed']}, has no samples by {sampler}",
        do="Remove it: that part is then made again.",
    )


def points(card: Card) -> list[Card]:
    """The samples of every measured checkpoint of a run, by the sampler of them all."""
    return [found for found in card["sets"] if found["sampler"] == card["sets"][0]["sampler"]]


def best(card: Card) -> Card:
    return last(card, card["best"])


def swept(card: Card) -> list[Card]:
    """The samples of a run's end over numbers of steps, by one method, fewest first."""
    method = card["sets"][0]["sampler"].rpartition("-")[0]
    end = card["sets"][-1]["images"]
    found = [
        each
        for each in card["sets"]
        if each["images"] == end and each["sampler"].rpartition("-")[0] == method
    ]
    return sorted(found, key=lambda each: each["nfe"])


def values(cards: Cards, arm: str, stage: str, number: Callable[[Card], Any]) -> dict[int, Any]:
    """A number of each of an arm's runs, by seed."""
    return {seed: number(card) for seed, card in cards.of(arm, stage).items()}


# ---- endpoints -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guard:
    """What must not speak against an endpoint: a mean over seeds that is not above 0."""

    what: str
    # nan: not measured.
    value: float
    n: int

    @property
    def holds(self) -> bool:
        return self.value <= 0


@dataclass(frozen=True)
class Endpoint:
    key: str
    claim: str
    measure: str
    pairs: Paired
    guards: list[Guard] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    key: str
    word: str
    # Holm's.
    p: float
    sentence: str


def mean_difference(what: str, one: Mapping[int, Any], other: Mapping[int, Any]) -> Guard:
    """The mean of one - other over the seeds that both have, as a guard."""
    both = [one[seed] - other[seed] for seed in one.keys() & other.keys()]
    mean = statistics.fmean(sorted(both)) if both else math.nan
    return Guard(what, mean, len(both))


def superior(cards: Cards, one: str, other: str) -> Endpoint:
    """H1: distances after `standard`, each arm at its best."""

    def fd(card: Card) -> Any:
        return best(card)["all"]["fd"]

    def equal(card: Card) -> float:
        return math.log(points(card)[-1]["all"]["fd"])

    def kernel(card: Card) -> Any:
        return best(card)["all"]["kd"]

    def both(number: Callable[[Card], Any]) -> tuple[dict[int, Any], dict[int, Any]]:
        return values(cards, one, "standard", number), values(cards, other, "standard", number)

    return Endpoint(
        "H1",
        "flow matching is clearly superior",
        "FD after standard, each at its best",
        paired(*both(fd)),
        [
            mean_difference("log FD at equal evaluations", *both(equal)),
            mean_difference("kernel distance at the best", *both(kernel)),
        ],
    )


def adaptation(cards: Cards, one: str, other: str) -> Endpoint:
    """H2: how far from the excluded tags' images samples are over stage2, from each arm's own fine
    base."""
    floor = subset_floor(cards, (one, other))
    areas = [areas_of(cards, arm, floor) for arm in (one, other)]
    shown, shown_by_other = acquired(cards, one, other)
    guard = mean_difference("acquisition at equal forgetting", shown_by_other, shown)
    return Endpoint(
        "H2",
        "flow matching adapts faster in stage 2",
        "area under the FD to the new images over log images",
        paired(*areas),
        [guard],
    )


def stage2_curve(cards: Cards, arm: str, seed: int) -> list[Card] | None:
    """Samples at 0 images (the fine base) and at every point of stage2; None = not all there."""
    base, run = cards.of(arm, "fine").get(seed), cards.of(arm, "stage2").get(seed)
    if base is None or run is None:
        return None
    curve = [{**points(base)[-1], "images": 0}, *points(run)]
    return curve if all(each.get("excluded") and each.get("rest") for each in curve) else None


def subset_floor(cards: Cards, arms: tuple[str, ...]) -> float:
    """What the gap is counted from: real against real; 0 where that, of fewer images, lies above
    any of the curves."""
    excluded = cards.references["floor"].get("excluded")
    floor = excluded["fd"] if excluded else 0.0
    for arm in arms:
        for seed in cards.seeds:
            for found in stage2_curve(cards, arm, seed) or []:
                if found["excluded"]["fd"] <= floor:
                    return 0.0
    return floor


def areas_of(cards: Cards, arm: str, floor: float) -> dict[int, float]:
    """Of each seed: the mean over log images of (FD(n) - floor) / (FD(0) - floor)."""
    found = {}
    for seed in cards.seeds:
        curve = stage2_curve(cards, arm, seed)
        if curve:
            first, *rest = [each["excluded"]["fd"] - floor for each in curve]
            images = [each["images"] for each in curve[1:]]
            found[seed] = mean_over_log(images, [gap / first for gap in rest])
    return found


def acquired(cards: Cards, one: str, other: str) -> tuple[dict[int, float], dict[int, float]]:
    """The share of samples that show an excluded tag where both arms have forgotten as much: FD to
    the rest of the images equal to the smaller of their last ones."""
    found: tuple[dict[int, float], dict[int, float]] = ({}, {})
    for seed in cards.seeds:
        curves = [stage2_curve(cards, arm, seed) for arm in (one, other)]
        if None in curves:
            continue
        forgotten = [[each["rest"]["fd"] for each in curve] for curve in curves]
        level = min(each[-1] for each in forgotten)
        for curve, x, into in zip(curves, forgotten, found):
            into[seed] = at_level(x, [each["acquired"] for each in curve], level)
    return found


def robust(cards: Cards, one: str, other: str) -> Endpoint:
    """H3: recall where precision is equal, over numbers of steps. The source names no measure: this
    one is ours."""
    recalls: tuple[dict[int, float], dict[int, float]] = ({}, {})
    for seed in cards.seeds:
        runs = [cards.of(arm, "standard").get(seed) for arm in (one, other)]
        if None in runs:
            continue
        sweeps = [[each["all"] for each in swept(card)] for card in runs]
        if any(each.get("recall") is None for sweep in sweeps for each in sweep):
            continue
        level = min(max(each["precision"] for each in sweep) for sweep in sweeps)
        for sweep, into in zip(sweeps, recalls):
            x = [each["precision"] for each in sweep]
            into[seed] = at_level(x, [each["recall"] for each in sweep], level)
    spreads = [spread(cards, arm) for arm in (other, one)]
    guard = mean_difference("spread of log FD over learning rates, D - F", *spreads)
    return Endpoint(
        "H3",
        "DDPM is more robust in pre-training",
        "recall at equal precision after standard",
        paired(*recalls),
        [guard],
    )


def spread(cards: Cards, arm: str) -> dict[int, float]:
    """log of the largest over the smallest FD over learning rates, by seed."""
    found = {}
    for (name, seed), card in cards.rates.items():
        if name == arm:
            tried = [math.log(each["fd"]) for each in card["rates"]]
            found[seed] = max(tried) - min(tried)
    return found


def control(cards: Cards, arm: str) -> Paired:
    """Two arms of one config and different seeds (A/A): log ratios that must be null."""
    own = values(cards, arm, "standard", lambda card: best(card)["all"]["fd"])
    twins = {
        seed - cards.control_seed: best(card)["all"]["fd"]
        for (name, seed, stage, base), card in cards.runs.items()
        if name == arm and stage == "standard" and not base and seed >= cards.control_seed
    }
    both = own.keys() & twins.keys()
    return paired({s: own[s] for s in both}, {s: twins[s] for s in both})


def endpoints(cards: Cards, one: str = FLOW, other: str = DDPM) -> list[Endpoint]:
    return [make(cards, one, other) for make in (superior, adaptation, robust)]


# ---- verdicts ------------------------------------------------------------------------------------


def verdicts(found: list[Endpoint]) -> list[Verdict]:
    """The words, by the rule in compare.py."""
    below = holm([each.pairs.p_below for each in found])
    above = holm([each.pairs.p_above for each in found])
    return [
        verdict(each, p_below, p_above) for each, p_below, p_above in zip(found, below, above)
    ]


def verdict(each: Endpoint, p_below: float, p_above: float) -> Verdict:
    pairs, why = each.pairs, ""
    failed = [guard for guard in each.guards if not guard.holds]
    if pairs.n < FEW:
        word, why = "open", f"{pairs.n} of the {FEW} seeds that the rule asks for"
    elif equivalent(pairs.interval, MARGIN):
        word = "equivalent"
    elif p_below <= ALPHA and failed:
        word, why = "open", "; ".join(against(guard) for guard in failed)
    elif p_below <= ALPHA:
        word = "supported" if pairs.n >= ENOUGH else "suggested"
    elif p_above <= ALPHA:
        word = "contradicted" if pairs.n >= ENOUGH else "the opposite is suggested"
    else:
        word = "open"
    return Verdict(each.key, word, min(p_below, p_above), sentence(each, word, p_below, why))


def against(guard: Guard) -> str:
    if math.isnan(guard.value):
        return f"{guard.what} was not measured"
    return f"{guard.what} says otherwise ({guard.value:+.3g})"


def sentence(each: Endpoint, word: str, p: float, why: str) -> str:
    """The verdict as it is read."""
    pairs = each.pairs
    text = f"{each.key}, {each.claim}: {word.upper()}"
    if why:
        text += f" ({why})"
    if not pairs.n:
        return f"{text}."
    text += f". {each.measure[0].upper()}{each.measure[1:]}, F against D: {percent(pairs.mean)}"
    if pairs.n > 1:
        low, high = pairs.interval
        text += f" (90% interval {percent(low)} to {percent(high)}, Holm's p {p:.2g})"
        visible = percent(pairs.visible, sign=False)
        text += f" over {pairs.n} seeds; {visible} would have been visible"
    return f"{text}."


def percent(log_ratio: float, sign: bool = True) -> str:
    """A log ratio as it is read: -0.05 -> "-4.9%"."""
    change = 100 * math.expm1(log_ratio)
    return f"{change:+.1f}%" if sign else f"{change:.1f}%"
