"""What the runs of an ablation came to: a verdict by the rule in ablate.py, a page and a picture.

Everything is read from the runs' cards (ablate.card_of), {"arm": …, "seed": …, "fd": …,
"held_out": […], "blocks": {…}, …}; nothing is trained or drawn here.
"""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scipy.special import stdtr

from harness.files import atomic

Card = dict[str, Any]
Cards = list[Card]

# In the order of the report.
ARMS = ("A", "B", "C", "D", "E", "S", "F", "G")
PLACEBOS = {"E": "an assessor that was never trained", "S": "giving every block another's weight"}
# The rule: how much larger a held-out loss by t may be than B's and C's; how many standard errors
# of FD count; how many seeds there must be.
WORSE, ERRORS, SEEDS = 1.05, 2.0, 3


# ---- the numbers behind it -----------------------------------------------------------------------


def of_arm(cards: Cards, arm: str) -> Cards:
    return [card for card in cards if card["arm"] == arm]


def paired(
    cards: Cards, one: str, other: str, value: Callable[[Card], float]
) -> tuple[float, float, int]:
    """(mean, standard error, n) of value(one) - value(other) over the seeds both have; nan for an
    error of one pair."""
    by = {(card["arm"], card["seed"]): value(card) for card in cards}
    apart = []
    for arm, seed in by:
        if arm == one and (other, seed) in by:
            apart.append(by[one, seed] - by[other, seed])
    mean = statistics.mean(apart) if apart else math.nan
    return mean, standard_error(apart), len(apart)


def standard_error(values: list[float]) -> float:
    """Of a mean; nan of fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def fd_of(card: Card) -> float:
    return math.nan if card["fd"] is None else card["fd"]


def by_t(cards: Cards, arm: str) -> list[float]:
    """Last held-out loss in each bin of t, over seeds."""
    rows = [card["held_out"][-1]["loss_by_t"] for card in of_arm(cards, arm) if card["held_out"]]
    return [statistics.mean(column) for column in zip(*rows)]


def needed(cards: Cards, other: str, error: float) -> str:
    """How large a gain over an arm the seeds' spread could have shown, in percent of its FD."""
    mean = statistics.mean(card["fd"] for card in of_arm(cards, other))
    return f"{100 * ERRORS * error / mean:.2g}%"


def images_to(cards: Cards, arm: str, goal: str) -> list[int]:
    """Images until the held-out loss of each of an arm's runs was down to the last one of the
    goal's run of its seed; those that got there."""
    last = {
        card["seed"]: card["held_out"][-1]["loss"]
        for card in of_arm(cards, goal)
        if card["held_out"]
    }
    found = []
    for card in of_arm(cards, arm):
        low = last.get(card["seed"], -math.inf)
        there = [row["images"] for row in card["held_out"] if row["loss"] <= low]
        found += there[:1]
    return found


def all_of(card: Card, metric: str) -> list[float]:
    """A metric of every block at every line of the log."""
    return [value for block in card["blocks"].values() for value in block[metric]]


# ---- the verdict ---------------------------------------------------------------------------------


def verdict(cards: Cards) -> tuple[str, list[str]]:
    """("supported" | "not supported" | "open", the reasons), by the rule in ablate.py's head."""
    if why := why_open(cards):
        return "open", [why]
    good, reasons = True, []
    for other in ("B", "C"):
        better, sentences = against(cards, other)
        good = good and better
        reasons += sentences
    reasons += treatment(of_arm(cards, "D"))
    for arm, what in PLACEBOS.items():
        if of_arm(cards, arm):
            reasons.append(against_placebo(cards, arm, what))
    return ("supported" if good else "not supported"), reasons


def why_open(cards: Cards) -> str:
    """Why the rule cannot be applied; "" = it can."""
    if missing := {"B", "C", "D"} - {card["arm"] for card in cards}:
        return f"the rule compares D with B and C; missing: {', '.join(sorted(missing))}."
    if any(card["fd"] is None for card in cards):
        return "no FD was computed (--fd-images 0)."
    if any(not card["held_out"] for card in cards):
        return "no image was held out, so there is no loss by t."
    for other in ("B", "C"):
        _, _, n = paired(cards, "D", other, fd_of)
        if n < SEEDS:
            return f"D and {other} share {n} of the {SEEDS} seeds the rule asks for."
    return ""


def against(cards: Cards, other: str) -> tuple[bool, list[str]]:
    """(is D better than an arm, in what way)."""
    mean, error, n = paired(cards, "D", other, fd_of)
    holds = mean < -ERRORS * error
    worst = max(d / o for d, o in zip(by_t(cards, "D"), by_t(cards, other)))
    side, luck = "not below", ""
    if holds:
        side = "below"
        luck = f", which chance alone does in {stdtr(n - 1, -ERRORS):.0%} of such comparisons"
    within = "within" if worst <= WORSE else "above"
    return holds and worst <= WORSE, [
        f"FD of D - {other}: {mean:+.4g} ± {error:.2g} ({n} seeds): {side} zero by more than "
        f"{ERRORS:g} standard errors{luck}; a gain of {needed(cards, other, error)} would have "
        "been.",
        f"held-out loss of D / {other}, worst bin of t: {worst:.3f} ({within} {WORSE:g}).",
    ]


def treatment(cards: Cards) -> list[str]:
    """How much of a treatment arm D was."""
    shares = [value for card in cards for value in card.get("block_share", [])]
    if not shares:
        return []
    clipped = statistics.fmean(value for card in cards for value in all_of(card, "clipped"))
    drifts = []
    for card in cards:
        for block in card["blocks"].values():
            mean = max(statistics.fmean(block["lambda"]), 1e-9)
            drifts.append(statistics.pstdev(block["lambda"]) / mean)
    return [
        f"the treatment: D's λ was clipped {clipped:.0%} of the time and drifted by "
        f"{statistics.fmean(drifts):.1%} of itself over a run; the blocks' losses were "
        f"{statistics.fmean(shares):.1%} of the loss."
    ]


def against_placebo(cards: Cards, arm: str, what: str) -> str:
    mean, error, n = paired(cards, "D", arm, fd_of)
    better = mean < -ERRORS * error
    rest = "" if better else f"; D is not better than {what}, by this rule"
    return (
        f"FD of D - {arm} (placebo): {mean:+.4g} ± {error:.2g} ({n} seeds; a gain of "
        f"{needed(cards, arm, error)} would have shown){rest}."
    )


# ---- the page ------------------------------------------------------------------------------------

SPACES = {
    "latents": "the space of the autoencoder's latents at 4×4; it is not an Inception FID",
    "inception": "Inception's space (FID)",
}
HEADING = (
    "arm  seeds  held-out loss         FD                    FD - A                "
    "images to A's last loss  images/s  clipped  alarms"
)


def text_report(
    cards: Cards,
    *,
    fd_images: int,
    fd_features: str,
    accuracy: dict[str, Any],
    references: dict[str, Any],
) -> str:
    """A page that says what was compared and what came out."""
    answer, reasons = verdict(cards)
    lines = [
        f"Assessor-weighted distillation, {len(cards)} runs of {cards[0]['images']:,} images: the "
        f"hypothesis is {answer.upper()}.",
        *reasons,
        "",
        f"assessor: held-out accuracy {accuracy.get('mean', math.nan):.3f}, "
        f"chance {accuracy.get('chance', math.nan):.3f}",
    ]
    if references:
        own = ""
        if references["teacher"] is not None:
            own = f"the teacher's own FD {references['teacher']:.5g}; "
        lines.append(
            f"{own}FD of {references['floor_images']:,} training images against as many others "
            f"{references['floor']:.5g}"
        )
    lines += ["", HEADING, *(line_of(cards, arm) for arm in ARMS if of_arm(cards, arm)), ""]
    lines += [
        f"± is a standard error over seeds. FD is between {fd_images:,} generated and as many "
        f"training images in {SPACES[fd_features]}.",
        "Held-out loss is the EMA's, last and, for the images to A's, at each evaluation; in "
        "brackets, the runs that got there. images/s include whatever",
        "else the machine was doing. clipped: share of λ at a bound. alarms: log lines where one "
        "third of the timesteps had most of the gradient.",
        "",
    ]
    return "\n".join(lines)


def line_of(cards: Cards, arm: str) -> str:
    """An arm's line of the table."""
    own = of_arm(cards, arm)
    loss = spread([card["held_out"][-1]["loss"] for card in own if card["held_out"]])
    fd = spread([card["fd"] for card in own if card["fd"] is not None])
    mean, error, n = paired(cards, arm, "A", fd_of)
    apart = f"{mean:+.4g} ± {error:.2g}" if n and arm != "A" else ""
    there = images_to(cards, arm, "A")
    reach = f"{statistics.mean(there):,.0f} ({len(there)} of {len(own)})" if there else "-"
    speed = statistics.median(card["images_per_s"] for card in own)
    values = [value for card in own for value in all_of(card, "clipped")]
    clipped = statistics.mean(values) if values else 0.0
    alarms = sum(card["alarms"] for card in own)
    return (
        f"{arm:<4} {len(own):>5}  {loss:<20}  {fd:<20}  {apart:<20}  {reach:<23}  {speed:>8.1f}  "
        f"{clipped:>7.2f}  {alarms:>6}"
    )


def spread(values: list[float]) -> str:
    """Mean ± standard error."""
    if not values:
        return "-"
    error = f" ± {standard_error(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.5g}{error}"


# ---- the picture ---------------------------------------------------------------------------------

# Where lines lie on each other.
STYLES = {"C": "--", "S": ":", "E": "-."}


def plot(cards: Cards, path: Path) -> None:
    """Held-out loss over images and by t, λ by block, share clipped and KD over images: one
    picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    arms = [arm for arm in ARMS if of_arm(cards, arm)]
    colors = dict(zip(ARMS, plt.get_cmap("tab10").colors))
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), constrained_layout=True)
    losses, times, distances, weights, clipped, kd = axes.flatten()
    for arm in arms:
        style = {"color": colors[arm], "ls": STYLES.get(arm, "-"), "alpha": 0.8}
        plot_runs(of_arm(cards, arm), arm, style, losses, clipped, kd)
        plot_by_t(times, by_t(cards, arm), by_t(cards, arms[0]), arm, colors[arm])
    times.axhline(WORSE, color="grey", lw=0.8, ls=":")
    for card in of_arm(cards, "D")[:1]:
        for name, block in card["blocks"].items():
            weights.plot(card["train_images"], block["lambda"], label=name)
    plot_distances(distances, cards, arms, colors)
    for axis, title, x in (
        (losses, "held-out loss (EMA), a line a seed", "images"),
        (times, f"last held-out loss by t, relative to {arms[0]}", "t (1 = noise)"),
        (distances, f"FD above {arms[0]}'s, a point a seed", "arm"),
        (weights, "λ by block, arm D, first seed", "images"),
        (clipped, "share of λ clipped", "images"),
        (kd, "KD = 1 - cos, mean over blocks", "images"),
    ):
        axis.set(title=title, xlabel=x)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    losses.set_yscale("log")
    losses.yaxis.set_major_formatter(ScalarFormatter())
    losses.yaxis.set_minor_formatter(ScalarFormatter())
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=90, format="png")
    plt.close(figure)


def plot_runs(
    cards: Cards, arm: str, style: dict[str, Any], losses: Any, clipped: Any, kd: Any
) -> None:
    """The curves of an arm's runs over images."""
    for i, card in enumerate(cards):
        label = arm if i == 0 else None
        images = [row["images"] for row in card["held_out"]]
        losses.plot(images, [row["loss"] for row in card["held_out"]], label=label, **style)
        if not card["blocks"]:
            continue
        for axis, metric in ((clipped, "clipped"), (kd, "kd")):
            curves = [block[metric] for block in card["blocks"].values()]
            mean = [statistics.mean(values) for values in zip(*curves)]
            axis.plot(card["train_images"], mean, label=label, **style)


def plot_by_t(axis: Any, own: list[float], base: list[float], arm: str, color: Any) -> None:
    if own and base:
        middles = [(i + 0.5) / len(base) for i in range(len(base))]
        ratios = [a / b for a, b in zip(own, base)]
        axis.plot(middles, ratios, color=color, ls=STYLES.get(arm, "-"), label=arm, marker=".")


def plot_distances(axis: Any, cards: Cards, arms: list[str], colors: dict[str, Any]) -> None:
    """FD above the first arm's of the same seed."""
    known = [card for card in cards if card["fd"] is not None]
    first = {card["seed"]: card["fd"] for card in of_arm(known, arms[0])}
    for arm in arms:
        points = [c["fd"] - first[c["seed"]] for c in of_arm(known, arm) if c["seed"] in first]
        axis.scatter([arm] * len(points), points, color=colors[arm])
