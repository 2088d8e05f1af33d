"""Cards: what a part of a comparison was asked, what was found, and where.

A card is JSON. A report is made of cards alone, so all that it reads of them is checked here.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from harness.cli import UserError
from harness.files import strict_json
from harness.typed import Count, Length, Open, Range, read_json

# Of the measures: a card of another version answers another question.
VERSION = 1
BROKEN = "Remove it: that part is then made again."
Positive = Annotated[float, Range(high=1e15, above=0)]
Number = Annotated[float, Range(-1e15, 1e15)]
Share = Annotated[float, Range(0, 1)]
Images = Annotated[int, Range(1, 10**12)]
Word = Annotated[str, Length(0, 200)]


@dataclass
class Asked(Open):
    train: dict[str, Any] = ()


@dataclass
class Machine(Open):
    cpu: str | None = None
    threads: int | None = None
    gpu: str | None = None


@dataclass
class Made(Open):
    commit: str | None = None
    machine: Machine | None = None


@dataclass
class CardFile(Open):
    """What every card says."""

    kind: Literal["run", "tuning", "rates", "references", "networks"]
    asked: Asked
    made: Made


# ---- of a run ------------------------------------------------------------------------------------


@dataclass
class Group(Open):
    """Samples against a group of images."""

    fd: Positive
    kd: Number
    fd_held_out: Positive | None = None
    precision: Share | None = None
    recall: Share | None = None
    coverage: Share | None = None


@dataclass
class Copies(Open):
    copies: Share


@dataclass
class SetOfSamples(Open):
    """What was measured of the samples of one checkpoint by one sampler."""

    images: Images
    sampler: Word
    nfe: Positive
    all: Group
    acquired: Share
    tags: dict[str, Share]
    excluded: Group | None = None
    rest: Group | None = None
    copies: Copies | None = None


@dataclass
class Loss(Open):
    """L_u by t."""

    loss_by_t: Annotated[list[Positive], Length(1, 1_000)]


@dataclass
class Evaluation(Loss):
    images: Images


@dataclass
class RunCard(CardFile):
    arm: Annotated[str, Length(1, 200)]
    seed: Count
    stage: Literal["standard", "fine", "stage2"]
    base: Word
    data_hash: str
    vae: str
    best: Word
    sets: Annotated[list[SetOfSamples], Length(1, 1_000)]
    held_out: dict[str, Loss]
    curve: list[Evaluation]
    sharpness: Annotated[float, Range(0, 1e15)] | None


# ---- of choices, and of the images ---------------------------------------------------------------


@dataclass
class Tried(Open):
    """A learning rate or a sampler, and the distance it came to."""

    name: Word
    fd: Positive


Tries = Annotated[list[Tried], Length(1, 1_000)]


@dataclass
class TuningCard(CardFile):
    arm: Word
    rates: Tries
    samplers: Tries
    lr: Positive
    # Method, steps, eta.
    sampler: Annotated[list[str | float | None], Length(3, 3)]


@dataclass
class RatesCard(CardFile):
    arm: Word
    seed: Count
    rates: Tries


@dataclass
class Floor(Open):
    n: Count
    fd: Positive


@dataclass
class Floors(Open):
    all: Floor
    excluded: Floor | None = None
    rest: Floor | None = None


@dataclass
class Reader(Open):
    """How often an excluded tag is seen where it is, and where it is not."""

    found: Share | None
    false: Share | None


@dataclass
class Features(Open):
    features: Word


@dataclass
class ReferencesCard(CardFile):
    data: str
    data_hash: str
    features: Features
    floor: Floors
    reader: Reader
    tags: dict[str, Share]
    excluded: list[str]
    sharpness: Annotated[float, Range(0, 1e15)] | None = None


@dataclass
class Network(Open):
    """What a network costs: of one image, but for its parameters."""

    model: Word
    parameters: Images
    flops: Positive
    bytes: Positive
    seconds: Positive


@dataclass
class NetworksCard(CardFile):
    networks: dict[str, Network]


KINDS = {
    "run": RunCard,
    "tuning": TuningCard,
    "rates": RatesCard,
    "references": ReferencesCard,
    "networks": NetworksCard,
}


# ---- files ---------------------------------------------------------------------------------------


def read_card(path: Path) -> dict[str, Any]:
    """A card, checked."""
    kind = read_json(path, CardFile, BROKEN)["kind"]
    card = read_json(path, KINDS[kind], BROKEN)
    if kind == "run":
        check_points(path, card["sets"])
    return card


def check_points(path: Path, sets: list[dict[str, Any]]) -> None:
    """The samples of a run are in the order of the images it had seen."""
    first = [found["images"] for found in sets if found["sampler"] == sets[0]["sampler"]]
    rising = all(a < b for a, b in zip(first, first[1:]))
    if not rising or sets[-1]["images"] != max(found["images"] for found in sets):
        raise UserError(f"{path}: its samples are out of order", do=BROKEN)


def read_cards(folder: Path) -> list[dict[str, Any]]:
    """All cards of a comparison, in the order of their names."""
    return [read_card(path) for path in sorted(folder.glob("*.json"))]


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(strict_json(value))


def differences(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """Where two JSON values differ: "train.lr 0.002 and 0.004"."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            yield from differences(one.get(key), other.get(key), f"{place}.{key}".strip("."))
    elif one != other:
        yield f"{place} {json.dumps(one)} and {json.dumps(other)}"
