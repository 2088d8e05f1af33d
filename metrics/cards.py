"""Metric cards: what was measured, of what, how it was sampled, and what the numbers are.

A card is JSON: {"kind": "metric card", "metrics": {name: {"value", "error", "floor", …}},
"measured", "sampled", "subject", …, "sha256": of the rest}. Several stand in one table if what
was measured and how it was sampled agree.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from data.cache import digest
from harness.cli import UserError, closest
from harness.files import safe_name
from harness.typed import Count, Length, Open, Range, called, read_json
from metrics.features import key_of

Card = dict[str, Any]
Value = Annotated[float, Range(-1e15, 1e15)] | None


@dataclass
class Metric(Open):
    """One number of a card, as a table shows it. None: it was not finite, or there is none."""

    value: Value
    error: Value = None
    floor: Value = None
    floor_n: Count | None = called("floor n", None)
    flagged: bool = False


@dataclass
class Measured(Open):
    n: Count


@dataclass
class Sampled(Open):
    nfe: Annotated[float, Range(0, 1e9)] | None = None


@dataclass
class CardFile(Open):
    """What is read of a card's file. All else in these parts is only compared."""

    kind: Literal["metric card"]
    metrics: Annotated[dict[str, Metric], Length(1, 1000)]
    measured: Measured
    sampled: Sampled
    subject: dict[str, Any]


# What may differ in one table. (Which reference it was is said by its hash.)
FREE = ("nfe", "device", "reference", "reference images")
# Fields in which cards differ that one message names.
SHOWN = 6


def card_name(card: Card) -> str:
    """The card's own file name: whose weights, the first metric, and a hash of all conditions."""
    subject = card["subject"]
    parts = [safe_name(subject[k]) for k in ("run", "images", "fingerprint") if subject.get(k)]
    fake = Path(subject.get("fake", ""))
    # A dot in a folder's name is no ending: it may stand in an EMA's width.
    own = fake.stem if fake.suffix in (".npz", ".parquet") else fake.name
    stem = ("-".join(parts) or own)[:60]
    first = next(iter(card["metrics"]))
    conditions = key_of({**card["measured"], **card["sampled"], **subject})
    return f"cards/{stem}-{first}-{conditions[:6]}.json"


def card_text(card: Card) -> str:
    """A card as its file: with a checksum of what it says."""
    return json.dumps({**card, "sha256": digest(card)}, indent=1) + "\n"


def check_checksum(path: Path, card: Card) -> None:
    """Refuse a card that was altered. Older ones have no checksum; under a damaged name it is one
    too."""
    said = {key: value for key, value in card.items() if key != "sha256"}
    renamed = [key for key, value in said.items() if re.fullmatch(r"[0-9a-f]{64}", str(value))]
    has_one = "sha256" in card or set(renamed) - {"weights_sha256"}
    if has_one and card.get("sha256") != digest(said):
        raise UserError(
            f"{path} does not match its own checksum: it was altered or damaged",
            do="Copy it again, or measure again.",
        )


def read_card(path: Path) -> Card:
    card = read_json(path, CardFile, "Give a file that eval_fid.py wrote.")
    check_checksum(path, card)
    return card


# ---- as text ------------------------------------------------------------------------------------


def table(rows: list[list[str]]) -> str:
    """Rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def decimals(metric: dict[str, Any], key: str) -> str:
    """A number of a metric, "" if it has none."""
    return "" if metric.get(key) is None else f"{metric[key]:.4f}"


def floor_of(metric: dict[str, Any], card: Card) -> str:
    """The floor, and at how many images where the reference has not enough for as many as were
    measured."""
    text, n = decimals(metric, "floor"), card["measured"]["n"]
    if text and metric.get("floor n", n) != n:
        text += f" at {metric['floor n']}"
    return text


def number(metric: dict[str, Any]) -> str:
    """A cell of a table: value ± standard error, and whether it is flagged."""
    text = decimals(metric, "value")
    if text and (error := decimals(metric, "error")):
        text += f" ± {error}"
    if text and metric.get("flagged"):
        text += " FLAGGED"
    return text


def show(card: Card) -> str:
    """One card as a table, with a sentence on copies."""
    rows = [["", "value", "± s.e.", "floor"]]
    for name, metric in card["metrics"].items():
        cells = [decimals(metric, "value"), decimals(metric, "error"), floor_of(metric, card)]
        rows.append([name, *cells])
    text = table(rows)
    if memory := card["metrics"].get("memorisation"):
        flag = "FLAGGED: " if memory["flagged"] else ""
        text += f"\n{flag}{memory['copies']:.1%} of the images lie nearer to a training image "
        text += "than 95% of held-out ones do"
    return text


# ---- side by side -------------------------------------------------------------------------------


def conditions_of(card: Card) -> dict[str, Any]:
    """What must be equal in one table."""
    fields = {**card["measured"], **card["sampled"], "sampled": bool(card["sampled"])}
    return {key: value for key, value in fields.items() if key not in FREE}


def in_order(groups: Iterable[Iterable[str]]) -> list[str]:
    """All names, each once, as they first come."""
    return list(dict.fromkeys(name for group in groups for name in group))


def compare(names: list[str], allow: tuple[str, ...]) -> str:
    """A table of several cards' files; UserError if what was measured or how it was sampled differs
    in a field that is not among `allow`."""
    cards = [read_card(Path(name)) for name in names]
    conditions = [conditions_of(card) for card in cards]
    fields = in_order(conditions)
    for field in allow:
        if field not in fields:
            raise UserError(
                f"--allow {field} is nothing that cards say",
                do=f"{closest(field, fields)}  They say: {', '.join(fields)}.",
            )
    texts = {
        field: {json.dumps(each.get(field), sort_keys=True) for each in conditions}
        for field in fields
    }
    differs = [field for field in fields if len(texts[field]) > 1]
    if refused := [field for field in differs if field not in allow]:
        raise not_alike(refused, conditions)

    columns = in_order(card["metrics"] for card in cards)
    rows = [["card", *differs, "NFE", *columns]]
    for name, card, fields_of in zip(names, cards, conditions):
        nfe = card["sampled"].get("nfe")
        own = [str(fields_of.get(field, "")) for field in differs]
        values = [number(card["metrics"].get(column, {})) for column in columns]
        rows.append([Path(name).stem, *own, f"{nfe:g}" if nfe else "", *values])
    first = cards[0]
    floors = [floor_of(first["metrics"].get(column, {}), first) for column in columns]
    rows.append(["floor (of the first)", *["" for _ in differs], "", *floors])
    return table(rows)


def not_alike(fields: list[str], conditions: list[dict[str, Any]]) -> UserError:
    """Cards that do not belong in one table, and why."""
    parts = []
    for field in fields[:SHOWN]:
        values = {json.dumps(each.get(field))[:40] for each in conditions}
        parts.append(f"{field}: {', '.join(sorted(values))}")
    more = " …" if len(fields) > SHOWN else ""
    return UserError(
        f"these cards do not belong in one table; they differ in {'; '.join(parts)}{more}",
        do=f"Measure them alike, or say --allow {','.join(fields)!r}.",
    )
