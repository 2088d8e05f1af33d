"""A report that anyone can open: sentences, tables and charts, as Markdown and as one HTML file.

    page = Report("Title", ["what came out"], [Section("Part", ["text"], [table], [chart])])
    write(page, Path("out"))    # report.md, report.html, figures/NAME.png and NAME.csv

The HTML has its pictures inside and asks nothing of the network; it is one column, so that it can
be read on a phone. Every chart says its numbers in a CSV. Equal content gives equal bytes. Nothing
here knows what is compared.
"""

import base64
import csv
import html
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from harness.files import atomic, make_dir, write_text

COLORS = colormaps["tab10"].colors
MARKERS = "osD^vP"
# Inches of a panel, and pixels an inch.
WIDTH, HEIGHT, DPI = 6.4, 3.9, 110
# Characters of a cell that is no number.
LONG = 30
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 46rem; padding: 0 1rem 3rem;
  color: #1b1b1b; background: #fff; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
.lead { background: #f2f5f9; border-left: 4px solid #4a78b0; padding: .6rem 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 7rem; }
td.words { white-space: normal; min-width: 11rem; text-align: left; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
figcaption, .note { font-size: .85rem; color: #555; }
"""


class Series(NamedTuple):
    """A line, points or bars of a chart. low, high: a band, or error bars of points. color: a
    number, the same for the same thing everywhere."""

    label: str
    x: Sequence[Any]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    color: int = 0
    kind: str = "line"  # line | dashed | points | bars


@dataclass(frozen=True)
class Panel:
    title: str
    x: str
    y: str
    series: list[Series]
    # The axes that are logarithmic: "", "x", "y" or "xy".
    log: str = ""
    # Horizontal lines, by what they are.
    levels: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Chart:
    """Panels below each other, in figures/NAME.png."""

    name: str
    caption: str
    panels: list[Panel]


@dataclass(frozen=True)
class Picture:
    """A picture that is there, as the bytes of a PNG."""

    name: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Section:
    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Chart | Picture] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    title: str
    lead: list[str]
    sections: list[Section]


# ---- numbers as text -----------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """A cell of a table; "–" of nothing."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.{digits}g}"


def with_error(mean: float, error: float) -> str:
    """Mean ± standard error, to the digits that the error leaves."""
    if math.isnan(mean):
        return "–"
    if math.isnan(error) or error <= 0:
        return number(mean, 4)
    places = max(1 - math.floor(math.log10(error)), 0)
    return f"{mean:.{places}f} ± {error:.{places}f}"


# ---- charts --------------------------------------------------------------------------------------


def draw(chart: Chart) -> bytes:
    """A chart as PNG."""
    rows = len(chart.panels)
    figure = Figure(figsize=(WIDTH, HEIGHT * rows), layout="constrained", dpi=DPI)
    for panel, axes in zip(chart.panels, figure.subplots(rows, 1, squeeze=False)[:, 0]):
        draw_panel(panel, axes)
    data = io.BytesIO()
    # Without the version of matplotlib.
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def draw_panel(panel: Panel, axes: Axes) -> None:
    for i, series in enumerate(panel.series):
        draw_series(series, axes, i, len(panel.series))
    for label, level in panel.levels.items():
        axes.axhline(level, color="grey", lw=1, ls=":", label=label or None)
    axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    axes.grid(alpha=0.25)
    for name in panel.log:
        scale(axes, name, [x for series in panel.series for x in series.x])
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, framealpha=0.7)


def scale(axes: Axes, name: str, ticks: list[Any]) -> None:
    """Make an axis logarithmic, with plain numbers at it."""
    axis = axes.xaxis if name == "x" else axes.yaxis
    axes.set(**{f"{name}scale": "log"})
    plain = FuncFormatter(lambda value, _: f"{value:,.6g}")
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(NullFormatter())
    if name == "x" and len(set(ticks)) <= 8:
        axis.set_ticks(sorted(set(ticks)))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def draw_series(series: Series, axes: Axes, i: int, of: int) -> None:
    color = COLORS[series.color % len(COLORS)]
    marker = MARKERS[series.color % len(MARKERS)]
    if series.kind == "bars":
        width = 0.8 / of
        places = [k + (i - (of - 1) / 2) * width for k in range(len(series.x))]
        axes.bar(places, series.y, width, color=color, label=series.label)
        axes.set_xticks(range(len(series.x)), series.x, rotation=60, ha="right", fontsize=7)
        return
    if series.kind == "points":
        errors = None
        if series.low:
            below = [y - low for y, low in zip(series.y, series.low)]
            errors = [below, [high - y for y, high in zip(series.y, series.high)]]
        style = {"color": color, "marker": marker, "ls": "", "ms": 5, "capsize": 3}
        axes.errorbar(series.x, series.y, errors, label=series.label, **style)
        return
    style = "--" if series.kind == "dashed" else "-"
    axes.plot(
        series.x, series.y, color=color, ls=style, marker=marker, ms=3.5, label=series.label
    )
    if series.low:
        axes.fill_between(series.x, series.low, series.high, color=color, alpha=0.18, lw=0)


def numbers_of(chart: Chart) -> str:
    """The CSV of a chart."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    axes = panel_axis(chart, "x"), panel_axis(chart, "y")
    writer.writerow(["panel", "series", *axes, "low", "high"])
    for panel in chart.panels:
        for series in panel.series:
            for i, (x, y) in enumerate(zip(series.x, series.y)):
                band = [series.low[i], series.high[i]] if series.low else ["", ""]
                writer.writerow([panel.title, series.label, x, y, *band])
        for label, level in panel.levels.items():
            writer.writerow([panel.title, label, "", level, "", ""])
    return text.getvalue()


def panel_axis(chart: Chart, name: str) -> str:
    """What an axis is called, if all panels agree."""
    names = {getattr(panel, name) for panel in chart.panels}
    return names.pop() if len(names) == 1 else name


# ---- pages ---------------------------------------------------------------------------------------


def write(page: Report, out: Path) -> Path:
    """Write all files of a report; returns the HTML's path."""
    pictures = {}
    make_dir(out / "figures")
    for section in page.sections:
        for figure in section.figures:
            pictures[figure.name] = figure.png if isinstance(figure, Picture) else draw(figure)
            write_bytes(out / "figures" / f"{figure.name}.png", pictures[figure.name])
            if isinstance(figure, Chart):
                write_text(out / "figures" / f"{figure.name}.csv", numbers_of(figure))
    write_text(out / "report.md", "\n".join(markdown(page)))
    write_text(out / "report.html", "\n".join(hypertext(page, pictures)))
    return out / "report.html"


def write_bytes(path: Path, content: bytes) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def markdown(page: Report) -> Iterator[str]:
    """The lines of report.md."""
    yield f"# {page.title}\n"
    for sentence in page.lead:
        yield f"- {sentence}"
    for section in page.sections:
        yield f"\n## {section.title}\n"
        for text in section.text:
            yield f"{text}\n"
        for table in section.tables:
            yield "| " + " | ".join(table.head) + " |"
            yield "|---" + "|---:" * (len(table.head) - 1) + "|"
            for row in table.rows:
                yield "| " + " | ".join(row) + " |"
            yield f"\n{table.note}\n"
        for figure in section.figures:
            yield f"![{figure.caption}](figures/{figure.name}.png)\n\n{figure.caption}\n"
    yield ""


def hypertext(page: Report, pictures: dict[str, bytes]) -> Iterator[str]:
    """The lines of report.html."""
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{html.escape(page.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>"
    yield f"<h1>{html.escape(page.title)}</h1>"
    yield '<div class="lead">'
    for sentence in page.lead:
        yield f"<p>{html.escape(sentence)}</p>"
    yield "</div>"
    for section in page.sections:
        yield f"<h2>{html.escape(section.title)}</h2>"
        for text in section.text:
            yield f"<p>{html.escape(text)}</p>"
        for table in section.tables:
            yield from html_table(table)
        for figure in section.figures:
            data = base64.b64encode(pictures[figure.name]).decode()
            caption = html.escape(figure.caption)
            yield f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
            yield f"<figcaption>{caption}</figcaption></figure>"
    yield "</body>\n</html>\n"


def html_table(table: Table) -> Iterator[str]:
    yield '<div class="scroll"><table><thead>' + html_row("th", table.head) + "</thead><tbody>"
    for row in table.rows:
        yield html_row("td", row)
    yield "</tbody></table></div>"
    if table.note:
        yield f'<p class="note">{html.escape(table.note)}</p>'


def html_row(tag: str, cells: list[str]) -> str:
    """Long cells are words, and may be broken into lines."""
    texts = []
    for cell in cells:
        kind = ' class="words"' if tag == "td" and len(cell) > LONG else ""
        texts.append(f"<{tag}{kind}>{html.escape(cell)}</{tag}>")
    return f"<tr>{''.join(texts)}</tr>"
