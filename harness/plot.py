"""Draw runs from their logs:  python -m harness.plot RUN [RUN …] [--out FILE.png]

Loss, held-out loss by t, Fréchet distances and learning rate over the images seen, as one PNG.
A run is a folder or its log.jsonl. The picture of one run is RUN/samples/plot.png, that of several
is samples/plot.png here; its path is the last line printed.
"""

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # also where the file itself is run
    sys.path[0] = str(Path(__file__).parent.parent)
    import harness.interrupt  # noqa: F401

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

from harness.cli import UserError, cli, closest, flag, parse
from harness.files import atomic, make_dir
from harness.rows import is_number, read_log

# Values whose largest is so many times the smallest are drawn on a log axis.
WIDE = 3.0
# Points of a curve; above, its moving average stands out and the points fade.
MANY = 200
# Held-out losses by t that are drawn of a single run: the last one, and how it came about.
AGES = 5
PLAIN = StrMethodFormatter("{x:g}")
# 1500 -> "1.5k"
THOUSANDS = EngFormatter(sep="")
DOTS = {"marker": "o", "markersize": 3.5}


@dataclass(frozen=True)
class Config:
    out: str = flag(
        "", "the picture, FILE.png; default samples/plot.png, of one run inside it", writes=".png"
    )


class Run(NamedTuple):
    """A run's log."""

    name: str
    folder: Path
    rows: list[dict[str, Any]]
    color: Any

    def of(self, event: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row.get("event") == event]

    def series(self, event: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(images seen, value) of each row that has a finite number there."""
        pairs = [(row["images"], row[key]) for row in self.of(event) if is_number(row.get(key))]
        points = np.array(pairs, float).reshape(-1, 2)
        return points[:, 0], points[:, 1]


# ---- reading ------------------------------------------------------------------------------------


def find_log(name: str) -> Path:
    """The log of a run that is named by its folder or by the log itself."""
    path = Path(name)
    if path.is_file():
        return path
    if not path.is_dir():
        siblings = [p.name for p in path.parent.glob("*") if (p / "log.jsonl").is_file()]
        advice = "Give a run's folder, or its log.jsonl."
        raise UserError(f"no run at {name}", do=advice + closest(path.name, siblings))
    if not (path / "log.jsonl").is_file():
        inside = sorted(log.parent.name for log in path.glob("*/log.jsonl"))
        advice = "Give the folder of a run of train.py or distill.py."
        if inside:
            advice = f"It holds runs: give {path / inside[0]}"
            advice += f", or {path}/* for all {len(inside)}." if len(inside) > 1 else "."
        raise UserError(f"{name} has no log.jsonl", do=advice)
    return path / "log.jsonl"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; lines that are none are counted."""
    rows, damaged = read_log(path)
    if not rows and damaged:
        advice = "Give a run's folder, or its log.jsonl."
        raise UserError(f"{path} is not a log", wanted="one JSON object a line", do=advice)
    if damaged:
        words = f"{len(damaged)} lines of {path} are no entries of a log"
        print(f"warning: {words}; the others are drawn.", file=sys.stderr)
    return [row for _, row in rows]


def read_runs(names: list[str]) -> list[Run]:
    """The runs, each with a short name and a colour of its own."""
    logs = list(dict.fromkeys(find_log(name) for name in names))
    folders = [log.resolve().parent for log in logs]
    short = [folder.name for folder in folders]
    if len(set(short)) < len(short):
        short = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    if len(set(short)) < len(short):
        short = [str(log) for log in logs]
    colors = colormaps["tab10"].colors
    if len(logs) > len(colors):
        colors = colormaps["turbo"](np.linspace(0, 1, len(logs)))
    short = [name.replace("$", r"\$") for name in short]  # no mathematics
    return [
        Run(name, log.parent, read_rows(log), color)
        for name, log, color in zip(short, logs, colors)
    ]


# ---- panels -------------------------------------------------------------------------------------


def plot_curve(ax: Axes, run: Run, x: np.ndarray, y: np.ndarray) -> None:
    """A line; of many points their moving average, and the points faintly behind it."""
    if len(x) <= MANY:
        ax.plot(x, y, color=run.color, marker=lone_dot(x))
        return
    window = len(x) // 50
    kernel = np.ones(window)
    mean = np.convolve(y, kernel, "same") / np.convolve(np.ones(len(y)), kernel, "same")
    ax.plot(x, y, color=run.color, alpha=0.25, linewidth=0.7)
    ax.plot(x, mean, color=run.color)


def lone_dot(x: np.ndarray) -> str:
    """The marker of a curve: a single point would be an invisible line."""
    return "o" if len(x) == 1 else ""


def set_scale(ax: Axes, values: list[np.ndarray]) -> None:
    """A log axis for values that differ much, with numbers on it that can be read."""
    y = np.concatenate(values)
    ax.yaxis.set_major_formatter(PLAIN)
    if y.min() > 0 and y.max() >= WIDE * y.min():
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(PLAIN)
        ax.yaxis.set_minor_formatter(NullFormatter())


def draw_loss(ax: Axes, runs: list[Run]) -> None:
    """Training loss as lines, held-out loss as dots on a dashed line, steps that were skipped as
    crosses below."""
    values, styles = [], []
    for run in runs:
        x, y = run.series("train", "loss")
        plot_curve(ax, run, x, y)
        held_x, held_y = run.series("held-out", "loss")
        ax.plot(held_x, held_y, color=run.color, linestyle="--", **DOTS)
        values += [y, held_y]
        bad, _ = run.series("non-finite", "images")
        low = np.full(len(bad), 0.02)
        ax.plot(bad, low, "x", color=run.color, transform=ax.get_xaxis_transform())
    if any(run.of("train") for run in runs):
        styles.append(Line2D([], [], color="gray", label="training"))
    if held := {str(row.get("of", "")) for run in runs for row in run.of("held-out")}:
        label = f"held-out ({', '.join(sorted(held))})"
        styles.append(Line2D([], [], color="gray", linestyle="--", label=label, **DOTS))
    if any(run.of("non-finite") for run in runs):
        label = "skipped: not finite"
        styles.append(Line2D([], [], color="gray", linestyle="", marker="x", label=label))
    ax.legend(handles=styles, fontsize="small")
    ax.set(title=f"Loss{caveat(runs)}", ylabel="loss per element")
    set_scale(ax, values)


def caveat(runs: list[Run]) -> str:
    """For the title of a loss: runs of different objectives have different losses."""
    if len({str(config_of(run).get("objective")) for run in runs}) < 2:
        return ""
    return " (different objectives: levels do not compare)"


def config_of(run: Run) -> dict[str, Any]:
    """The flags of a run, as its log says them."""
    config = next((row.get("config") for row in run.of("start")), None)
    return config if isinstance(config, dict) else {}


def by_t(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(t, loss) of a held-out row: the centres of equal bins of [0, 1] that have a loss."""
    losses = row.get("loss_by_t")
    losses = losses if isinstance(losses, list) else []
    pairs = [((i + 0.5) / len(losses), y) for i, y in enumerate(losses) if is_number(y)]
    points = np.array(pairs, float).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def draw_by_t(ax: Axes, runs: list[Run]) -> None:
    """The last held-out loss by t of every run; of one run alone also earlier ones, fainter."""
    values = []
    for run in runs:
        rows = [row for row in run.of("held-out") if len(by_t(row)[0])]
        if len(runs) == 1:
            keep = np.unique(np.linspace(0, len(rows) - 1, AGES).round().astype(int))
        else:
            keep = range(len(rows))[-1:]
        for i in keep:
            x, y = by_t(rows[i])
            values.append(y)
            last = i == len(rows) - 1
            alpha = 1.0 if last else 0.2 + 0.5 * i / len(rows)
            rounded = float(f"{rows[i]['images']:.3g}")
            label = f"{THOUSANDS(rounded)} images seen"
            dots = DOTS if last else {}
            ax.plot(x, y, color=run.color, alpha=alpha, label=label, **dots)
    if len(runs) == 1:
        ax.legend(fontsize="small")
    ax.set(title=f"Held-out loss by t{caveat(runs)}", ylabel="loss per element")
    ax.set(xlabel="t (0 = data, 1 = noise)", xlim=(0, 1))
    set_scale(ax, values)


def draw_metric(ax: Axes, runs: list[Run], metric: str) -> None:
    """A distance, and below it the one between real images as a dotted line."""
    values = []
    for run in runs:
        x, y = run.series("fid", metric)
        ax.plot(x, y, color=run.color, **DOTS)
        values.append(y)
        floors = [row.get("floor") for row in run.of("fid") if metric in row]
        if floors and is_number(floors[-1]):
            ax.axhline(floors[-1], color=run.color, linestyle=":")
            values.append(np.array(floors[-1:]))
    floor = Line2D([], [], color="gray", linestyle=":", label="floor: real against real")
    if len(values) > len(runs):
        ax.legend(handles=[floor], fontsize="small")
    ax.set(title=f"{metric} to the training images", ylabel=f"{metric} (lower is better)")
    set_scale(ax, values)


def draw_rate(ax: Axes, runs: list[Run]) -> None:
    """Learning rates; on a log axis where runs are far apart, without the zero at their end."""
    peaks = []
    for run in runs:
        x, y = run.series("train", "lr")
        ax.plot(x, y, color=run.color, marker=lone_dot(x))
        if len(y):
            peaks.append(y.max())
    ax.set(title="Learning rate", ylabel="learning rate", ylim=(0, None))
    if min(peaks) > 0 and max(peaks) > 10 * min(peaks):
        ax.set(yscale="log", ylim=(min(peaks) / 100, 2 * max(peaks)))
    ax.yaxis.set_major_formatter(PLAIN)


def panels_of(runs: list[Run]) -> list[Callable[[Axes], None]]:
    """What there is to draw."""
    panels = []
    if any(len(run.series(event, "loss")[0]) for run in runs for event in ("train", "held-out")):
        panels.append(partial(draw_loss, runs=runs))
    if any(len(by_t(row)[0]) for run in runs for row in run.of("held-out")):
        panels.append(partial(draw_by_t, runs=runs))
    names = [key for run in runs for row in run.of("fid") for key in row]
    for metric in dict.fromkeys(key for key in names if re.match(r"FI?D", key)):
        if any(len(run.series("fid", metric)[0]) for run in runs):
            panels.append(partial(draw_metric, runs=runs, metric=metric))
    if any(len(run.series("train", "lr")[0]) for run in runs):
        panels.append(partial(draw_rate, runs=runs))
    return panels


def draw_figure(runs: list[Run]) -> Figure:
    """All panels as one figure, with the runs' names above."""
    panels = panels_of(runs)
    if not panels:
        names = ", ".join(run.name for run in runs)
        advice = "Let it train on: the first line comes after --log-every images."
        raise UserError(f"nothing to draw yet in {names}", do=advice)
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(6.4 * columns, 3.8 * lines + 0.5), dpi=120, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    most = max(row["images"] for run in runs for row in run.rows)
    for ax, panel in zip(grid, panels):
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        panel(ax)
        if not ax.get_xlabel():
            ax.set(xlabel="images seen", xlim=(0, max(1.02 * most, 1)))
            ax.xaxis.set_major_formatter(THOUSANDS)
    for ax in grid[len(panels) :]:
        ax.set_visible(False)
    if len(runs) == 1:
        figure.suptitle(runs[0].name)
    else:
        handles = [Line2D([], [], color=run.color, linewidth=3, label=run.name) for run in runs]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(runs)))
    return figure


# ---- the command --------------------------------------------------------------------------------


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """(names of runs, flags): names come first."""
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first], words[first:]


def picture_path(cfg: Config, runs: list[Run]) -> Path:
    """Where the picture goes."""
    if not cfg.out:
        # Not beside several runs: the next `runs/*` would take the picture for a run.
        folder = runs[0].folder if len(runs) == 1 else Path()
        return folder / "samples" / "plot.png"
    return Path(cfg.out)


def main() -> None:
    names, flags = split_words(sys.argv[1:])
    cfg, dry_run = parse(Config, __doc__, flags)
    if not names:
        advice = "python -m harness.plot RUN [RUN …] [--out FILE.png]"
        raise UserError("no run was given", do=f"Write {advice}, names first.")
    runs = read_runs(names)
    path = picture_path(cfg, runs)
    if dry_run:
        print(json.dumps({**asdict(cfg), "runs": [run.name for run in runs], "out": str(path)}))
        return
    figure = draw_figure(runs)
    for run in runs:
        if not panels_of([run]):
            print(f"warning: there is nothing to draw yet of {run.name}.", file=sys.stderr)
    make_dir(path.parent)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")
    print(path)


if __name__ == "__main__":
    cli(main)
