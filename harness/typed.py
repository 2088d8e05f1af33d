"""JSON as it should be: a dataclass says its fields, their types and ranges; all of it is checked
before anything believes it.

    @dataclass
    class Shard:
        file: str
        images: Annotated[int, Range(1, 65536)]
        note: str = ""                          # has a default, so it may be missing

    record = read_json(path, Shard)             # a dict that holds what the fields say
    check(value, list[Shard], "of the manifest")

Types are those of JSON: bool, int, float (finite, or whole), str, None, Any, Literal[…], list[X],
dict[str, X], X | Y, dataclasses; and tuple[X, ...] of values that do not come from JSON. A field
may have its range by flag(low=1, high=9), as those of a Config. Fields that a dataclass does
not name are refused, unless it is an Open.
"""

import json
import math
import re
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, Field, field, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from reprlib import repr as brief
from typing import Annotated, Any, Literal, NamedTuple

from harness.cli import UserError, range_text
from harness.reading import read_file

AGAIN = "Copy it again, or make it anew."
Fault = tuple[str, str, str]  # where; what is there, "" = nothing; what is wanted


class Open:
    """A dataclass of this kind lets other fields be there as well, which nobody reads."""


class AnyFloat(float):
    """As a type of a field: a number, NaN and infinity among them."""


class Range(NamedTuple):
    """From where to where a number goes, or each of a list; `above` is not reached."""

    low: float | None = None
    high: float | None = None
    above: float | None = None

    def holds(self, value: Any) -> bool:
        entries = value if isinstance(value, (list, tuple)) else [value]
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        above = -math.inf if self.above is None else self.above
        return all(low <= v <= high and v > above for v in entries if isinstance(v, (int, float)))

    def __str__(self) -> str:
        both = self.low is not None and self.high is not None
        return f"from {self.low:g} to {self.high:g}" if both else range_text(*self)


class Length(NamedTuple):
    """How many entries a list has, or letters a text."""

    low: int
    high: int

    def holds(self, value: Any) -> bool:
        return self.low <= len(value) <= self.high

    def __str__(self) -> str:
        return f"{self.low} long" if self.low == self.high else f"{self.low} to {self.high} long"


class Like(NamedTuple):
    """A text of one form."""

    pattern: str
    words: str

    def holds(self, value: Any) -> bool:
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.words


class Rule(NamedTuple):
    """What else has to be true, as a function and in words."""

    holds: Callable[[Any], bool]
    words: str

    def __str__(self) -> str:
        return self.words


Count = Annotated[int, Range(0, 10**12)]
Hash = Annotated[str, Like("[0-9a-f]{64}", "64 hexadecimal digits")]


# ---- from text ----------------------------------------------------------------------------------


def read_json(path: Path, kind: Any = Any, do: str = AGAIN) -> Any:
    """What a file holds, checked."""
    try:
        data = read_file(path)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{path} cannot be read ({reason})", do=do) from None
    return check(parse_json(data, path, do), kind, path, do)


def parse_json(text: str | bytes, what: Any, do: str = AGAIN, nan: bool = False) -> Any:
    """Strict JSON: no name twice in an object, no number beyond floats, and NaN only if it is
    allowed."""
    try:
        constant = float if nan else refuse_constant
        return json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{what} is damaged: it is not JSON ({reason})", do=do) from None


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON in which every name stands once."""
    value = dict(pairs)
    if len(value) < len(pairs):
        seen = Counter(name for name, _ in pairs)  # one pass: a stranger's object may be large
        twice = next(name for name, times in seen.items() if times > 1)
        raise ValueError(f"{brief(twice)} stands twice in an object")
    return value


# ---- what it should be --------------------------------------------------------------------------


def check(value: Any, kind: Any, what: Any, do: str = AGAIN) -> Any:
    """The value itself, if it is of a kind; else a UserError with the first place where it is not.
    `what` names the file."""
    for place, got, wanted in faults(value, kind, ""):
        found = f"{what} is damaged: it holds {got}"
        if place:
            found = f"{what}: {place} is {got or 'missing'}"
        raise UserError(found, wanted=wanted, do=do)
    return value


def faults(value: Any, kind: Any, place: str) -> Iterator[Fault]:
    """Where a value is not of a kind."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        yield from faults_of_rules(value, kind, place)
    elif is_dataclass(kind):
        yield from faults_of_object(value, kind, place)
    elif origin in (types.UnionType, typing.Union):
        yield from faults_of_union(value, kind, place)
    elif origin is dict and type(value) is dict:
        for name, entry in value.items():
            yield from faults(entry, inner[1], inside(place, name))
    elif origin in (list, tuple) and type(value) is origin:
        entries = [] if all_plain(value, inner[0]) else value
        for i, entry in enumerate(entries):
            yield from faults(entry, inner[0], f"{place}[{i}]")
    elif not is_plain(value, kind):
        yield place, brief(value), wanted(kind)


def is_plain(value: Any, kind: Any) -> bool:
    """Is a value of a type without parts? A container is none: faults() looks at its parts."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        # By type too: 1 equals True.
        return any(type(value) is type(word) and value == word for word in typing.get_args(kind))
    if kind is float:  # NaN fails every comparison
        number = type(value) in (int, float)
        return number and abs(value) <= 1.7e308
    if kind is AnyFloat:
        return type(value) is float or is_plain(value, int)
    if kind is int:
        return type(value) is int and abs(value) < 2**63
    if kind in (None, type(None)):
        return value is None
    if kind in (bool, str) or origin in (dict, list, tuple):
        return origin is None and type(value) is kind
    return True  # a type of somebody's own, who checks it


def all_plain(values: Any, kind: Any) -> bool:
    """Are the entries of a list, which may be a million, what they should be, as far as their types
    tell? False = look at each."""
    found = set(map(type, values))
    if kind is str:
        return found <= {str}
    if kind is float and found == {float}:
        return all(map(math.isfinite, values))
    is_small = found == {int} and -(2**63) < min(values) and max(values) < 2**63
    return kind in (int, float) and is_small


def faults_of_rules(value: Any, kind: Any, place: str) -> Iterator[Fault]:
    """Of Annotated[type, rules]."""
    base, *rules = typing.get_args(kind)
    found = list(faults(value, base, place))
    for where, got, words in found:
        yield where, got, wanted(kind) if where == place else words
    if not found and not all(rule.holds(value) for rule in rules if not isinstance(rule, str)):
        yield place, brief(value), wanted(kind)


def faults_of_union(value: Any, kind: Any, place: str) -> Iterator[Fault]:
    """Of X | Y: those of the one that it seems to be."""
    found = [list(faults(value, option, place)) for option in typing.get_args(kind)]
    if not all(found):
        return
    deeper = [each for each in found if each[0][0] != place]
    yield from deeper[0][:1] if deeper else [(place, brief(value), wanted(kind))]


def faults_of_object(value: Any, kind: type, place: str) -> Iterator[Fault]:
    """Of a dataclass."""
    if type(value) is not dict:
        yield place, brief(value), "an object"
        return
    kinds = field_kinds(kind)
    required = {named(f) for f in fields(kind) if f.default is MISSING}
    for name, own in kinds.items():
        if name in value:
            yield from faults(value[name], own, inside(place, name))
        elif name in required:
            yield inside(place, name), "", wanted(own)
    if unknown := [name for name in value if name not in kinds and not issubclass(kind, Open)]:
        names = ", ".join(kinds)
        yield inside(place, unknown[0]), "there", f"no other fields than {names}"


@lru_cache
def field_kinds(kind: type) -> dict[str, Any]:
    """{field: its type, with the range that flag() gave it}."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {named(f): ranged(hints[f.name], f) for f in fields(kind)}


def named(f: Field) -> str:
    """What a field is called in JSON, where names may have spaces."""
    return f.metadata.get("called", f.name)


def called(name: str, default: Any) -> Any:
    """A field that JSON knows by another name."""
    return field(default=default, metadata={"called": name})


def ranged(kind: Any, f: Field) -> Any:
    limits = [f.metadata.get(key) for key in ("low", "high", "above")]
    return kind if limits == [None] * 3 else Annotated[kind, Range(*limits)]


def inside(place: str, name: str) -> str:
    """A field of the object at a place; names in files may be anything."""
    plain = isinstance(name, str) and name.isprintable() and len(name) <= 60
    name = name if plain else brief(name)
    return f"{place}.{name}" if place else name


def wanted(kind: Any) -> str:
    """A kind in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        rules = " ".join(map(str, inner[1:]))
        return rules if isinstance(inner[1], (Like, Rule)) else f"{wanted(inner[0])} {rules}"
    if origin in (types.UnionType, typing.Union):
        return listed_or(wanted(option) for option in inner)
    if origin is Literal:
        return listed_or(json.dumps(word) for word in inner)
    if origin in (list, tuple):
        return f"a {origin.__name__}, each {wanted(inner[0])}"
    plain = {
        int: "a whole number",
        float: "a number",
        AnyFloat: "a number",
        str: "a text",
        bool: "true or false",
    }
    plain |= {list: "a list", type(None): "null", Any: "anything"}
    return plain.get(kind, "an object")


def listed_or(words: Iterable[str]) -> str:
    return " or ".join(words)
