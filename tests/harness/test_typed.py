"""JSON is checked before it is believed: types, ranges, names, and that it is JSON at all."""

import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from harness.cli import UserError, flag
from harness.typed import (
    AnyFloat, Hash, Length, Open, Range, called, check, parse_json, read_json,
)  # fmt: skip


@dataclass
class Part(Open):
    size: Annotated[int, Range(1, 9)]
    note: str = ""


@dataclass
class Whole:
    name: str
    parts: list[Part]
    kind: Literal["a", 1]
    share: Annotated[float, Range(0, high=1)] | None = None
    three: Annotated[list[float], Length(3, 3)] = ()
    table: dict[str, int] = ()
    lr: float = flag(1e-3, above=0, high=1)
    digest: Hash = ""
    probe: list[AnyFloat] = ()
    with_space: bool = called("with space", False)
    free: Any = None


VALID = {"name": "x", "parts": [{"size": 1}, {"size": 9, "more": [None]}], "kind": "a"}


@pytest.mark.parametrize(
    "change",
    [
        {"share": 1}, {"share": None}, {"three": [1, 2.5, -3]}, {"table": {"a": 1, "": 2}},
        {"lr": 1.0}, {"digest": "0" * 64}, {"probe": [float("nan"), 1]}, {"kind": 1},
        {"with space": True}, {"free": {"x": [True]}},
    ],
)  # fmt: skip
def test_what_fits_is_returned_as_it_is(change):
    value = {**VALID, **change}
    assert check(value, Whole, "x.json") is value


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": 1}, "x.json: name is 1: wanted a text."),
        ({"name": None}, "name is None: wanted a text"),
        ({"parts": {}}, "parts is {}: wanted a list, each an object"),
        ({"parts": [3]}, "parts[0] is 3: wanted an object"),
        ({"parts": [{"size": 1}, {"size": 10}]}, "parts[1].size is 10: wanted a whole number"),
        ({"parts": [{"size": True}]}, "parts[0].size is True: wanted a whole number from 1 to 9"),
        ({"parts": [{"size": 1.0}]}, "parts[0].size is 1.0"),
        ({"parts": [{}]}, "parts[0].size is missing: wanted a whole number from 1 to 9"),
        ({"kind": True}, 'kind is True: wanted "a" or 1'),
        ({"kind": 1.0}, "kind is 1.0"),
        ({"share": -0.1}, "share is -0.1: wanted a number from 0 to 1 or null"),
        ({"share": float("nan")}, "share is nan"),
        ({"three": [1, 2]}, "three is [1, 2]: wanted a list, each a number 3 long"),
        ({"three": [1, 2, "3"]}, "three[2] is '3': wanted a number"),
        ({"three": [1, 2, 10**400]}, "three[2] is 1000"),
        ({"table": {"a": 2**70}}, "table.a is 118"),
        ({"table": {"a\n": 0.5}}, "table.'a\\n' is 0.5: wanted a whole number"),
        ({"lr": 0}, "lr is 0: wanted a number more than 0, up to 1"),
        ({"digest": "0" * 63}, "digest is '000000000000...0000000000000': wanted 64 hexadecimal"),
        ({"probe": ["nan"]}, "probe[0] is 'nan'"),
        ({"with space": 1}, "with space is 1: wanted true or false"),
        ({"with_space": True}, "with_space is there: wanted no other fields than name, parts"),
    ],
)
def test_the_first_place_that_does_not_fit_is_named(change, message):
    with pytest.raises(UserError) as caught:
        check({**VALID, **change}, Whole, "x.json", "Do this.")
    assert message in str(caught.value) and str(caught.value).endswith("  Do this.")


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "'c' stands twice in an object"),
        ('{"a": NaN}', "NaN is not a number of JSON"),
        ('[-Infinity]', "-Infinity is not a number"),
        ("[" * 10**5, "recursion"),
        ("1" * 5000, "digits"),
        (b"\xff", "codec"),
        ("", "Expecting value"),
    ],
)  # fmt: skip
def test_what_is_not_strictly_json_is_damaged(text, message, tmp_path):
    with pytest.raises(UserError, match="x is damaged: it is not JSON") as caught:
        parse_json(text, "x")
    assert message in str(caught.value)


def test_a_large_object_with_a_name_twice_is_refused_at_once():
    """A stranger's header may have a hundred thousand names."""
    text = "{" + "".join(f'"{i}": 0, ' for i in range(20_000)) + '"19999": 1}'
    start = time.process_time()
    with pytest.raises(UserError, match="'19999' stands twice"):
        parse_json(text, "x")
    assert time.process_time() - start < 2


def test_metadata_may_hold_nan_and_nothing_else_beyond_json():
    value = parse_json('{"probe": [NaN, -Infinity, 1]}', "x", nan=True)
    assert value["probe"][0] != value["probe"][0] and value["probe"][1] == float("-inf")


def test_a_file_that_is_not_there_or_too_long_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="x cannot be read .No such file"):
        read_json(tmp_path / "x")
    with open(tmp_path / "y", "wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(UserError, match="y has 1,099,511,627,776 bytes, wanted at most"):
        read_json(tmp_path / "y")
