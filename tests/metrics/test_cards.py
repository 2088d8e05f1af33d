"""Metric cards: read, shown, and put side by side where they belong together."""

import json
import random
from pathlib import Path

import pytest

import eval_fid
from conftest import ROOT
from harness.cli import UserError
from metrics import cards

# Cards of the time before the code was put into folders.
OLD = ROOT / "tests" / "fixtures" / "834bb60"


@pytest.fixture
def old():
    return cards.read_card(OLD / "card.json")


def test_old_cards_still_make_their_table(user):
    """The table, byte by byte, that the code of their time printed."""
    names = [OLD / "card.json", OLD / "card2.json"]
    code, out, err = user(eval_fid.main, "compare", *names, "--allow", "steps")
    assert (code, err) == (0, [])
    metrics = ("precision32", "recall32", "density32", "coverage32")
    values = ("0.0000", "0.8696", "0.0312", "0.1304")
    same = "".join(value.rjust(len(name) + 2) for name, value in zip(metrics, values))
    assert out.splitlines() == [
        "card                  steps  NFE           FD-pca32         KD-pca32  "
        + "  ".join(metrics),
        "card                      4    7  811.6494 ± 9.9715  0.3023 ± 0.0772" + same,
        "card2                     8   15  811.5146 ± 9.9623  0.3016 ± 0.0769" + same,
        "floor (of the first)                 491.1518 at 11    -0.0802 at 11",
    ]
    code, _, err = user(eval_fid.main, "compare", *names)
    assert (
        code == 2 and "differ in steps: 4, 8.  Measure them alike, or say --allow 'steps'" in err[0]
    )


def test_a_card_is_named_as_before(old):
    assert (
        cards.card_name(old)
        == "cards/old-160-368118099814a2d2f1f60946cfd742c1a2fd9f8e078e8b94a00b-FD-pca32-98d433.json"
    )


@pytest.mark.parametrize(
    "fake, stem",
    [
        ("samples/faces-6000-ema-0.050-2b6461-steps=4", "faces-6000-ema-0.050-2b6461-steps=4"),
        ("a/drawn.npz", "drawn"),
        ("pictures", "pictures"),
        ("samples/" + 200 * "x", 60 * "x"),
    ],
)
def test_a_card_of_pictures_is_named_after_their_folder(old, fake, stem):
    old["subject"] = {"fake": fake}
    assert cards.card_name(old).startswith(f"cards/{stem}-FD-pca32-")


def test_a_card_is_shown_with_its_floor_and_its_copies(old):
    lines = cards.show(old).splitlines()
    assert lines[0].split() == ["value", "±", "s.e.", "floor"]
    assert lines[1].split() == ["FD-pca32", "811.6494", "9.9715", "491.1518", "at", "11"]
    assert lines[3].split() == ["precision32", "0.0000"] and len(lines) == 7
    memory = {"value": 0.5, "ratio": 0.5, "copies": 0.25, "flagged": True, "held_out": 20}
    old["metrics"]["memorisation"] = memory
    last = cards.show(old).splitlines()[-1]
    assert last.startswith("FLAGGED: 25.0% of the images lie nearer to a training image")
    memory["flagged"] = False
    assert cards.show(old).splitlines()[-1].startswith("25.0% of the images")


def test_numbers_of_a_table():
    card = {"measured": {"n": 32}}
    assert cards.number({}) == cards.number({"value": None, "error": 1.0}) == ""
    assert cards.number({"value": 1.0}) == "1.0000"
    flagged = {"value": 1.0, "error": 0.25, "flagged": True}
    assert cards.number(flagged) == "1.0000 ± 0.2500 FLAGGED"
    assert cards.floor_of({}, card) == ""
    assert cards.floor_of({"floor": 2.0, "floor n": 32}, card) == "2.0000"
    assert cards.floor_of({"floor": 2.0, "floor n": 11}, card) == "2.0000 at 11"


def test_cards_that_differ_in_what_was_measured_or_sampled_are_refused(old, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text(json.dumps(old))
    other = json.loads(json.dumps(old))
    other["measured"]["pairs"], other["sampled"]["method"] = 100, "euler"
    other["sampled"]["nfe"], other["measured"]["reference"] = 4.0, "elsewhere"
    Path("b.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match='differ in pairs: 100, 5000; method: "euler", "heun"'):
        cards.compare(["a.json", "b.json"], ())
    with pytest.raises(UserError, match="say --allow 'method'"):
        cards.compare(["a.json", "b.json"], ("pairs",))
    lines = cards.compare(["a.json", "b.json"], ("pairs", "method")).splitlines()
    assert lines[0].split()[:4] == ["card", "pairs", "method", "NFE"]
    assert lines[2].split()[:4] == ["b", "100", "euler", "4"]
    with pytest.raises(UserError, match="--allow pair is nothing .*Closest: pairs.*They say: "):
        cards.compare(["a.json", "b.json"], ("pair",))
    other["sampled"] = {}  # of a folder
    Path("b.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="sampled"):
        cards.compare(["a.json", "b.json"], ("pairs",))


def test_many_differences_are_not_all_named(old, tmp_path):
    path = tmp_path / "a.json"
    other = json.loads(json.dumps(old))
    other["sampled"] = {f"flag {i}": i for i in range(20)}
    path.write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"; [^;]* …\.  Measure"):
        cards.compare([str(OLD / "card.json"), str(path)], ())


@pytest.mark.parametrize(
    "text, what",
    [
        ("{", "is damaged: it is not JSON"),
        ("[" * 100_000, "is damaged: it is not JSON"),
        (b"\xff\xfe", "is damaged: it is not JSON"),
        (None, "cannot be read (No such file or directory)"),
        ("[]", "is damaged: it holds []: wanted an object"),
        ("{}", "kind is missing"),
        ('{"kind": "metric card"}', "metrics is missing"),
        (
            '{"kind": "metric card", "metrics": {"a": {"value": 1}}, "measured": {"n": 1}, '
            '"sampled": 1}',
            "sampled is 1: wanted an object",
        ),
    ],
)
def test_what_is_no_card_is_one_line(text, what, tmp_path, user):
    path = tmp_path / "card.json"
    if isinstance(text, bytes):
        path.write_bytes(text)
    elif text is not None:
        path.write_text(text)
    code, _, err = user(eval_fid.main, "compare", OLD / "card.json", path)
    assert code == 2 and len(err) == 1 and str(path) in err[0] and what in err[0], err
    assert "Give a file that eval_fid.py wrote." in err[0]


def test_a_table_is_aligned():
    text = cards.table([["", "b"], ["long name", "1"], ["c", "22.5"]])
    assert text.splitlines() == ["              b", "long name     1", "c          22.5"]


# ---- altered files ------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_card_is_refused_or_changes_nothing(old, tmp_path):
    """All places of the checksum's line, and some elsewhere; compare() reads with read_card()."""
    path, r = tmp_path / "a.json", random.Random(0)
    path.write_text(cards.card_text(old))
    assert cards.read_card(path) == {**old, "sha256": cards.digest(old)}
    data = path.read_bytes()
    places = [(at, r.randrange(8)) for at in range(len(data) - 85, len(data))]
    places += [(r.randrange(len(data)), r.randrange(8)) for _ in range(150)]
    refused = 0
    for at, bit in places:
        bad = bytearray(data)
        bad[at] ^= 1 << bit
        path.write_bytes(bad)
        try:
            found = cards.read_card(path)
            assert {k: v for k, v in found.items() if k != "sha256"} == old, (at, bit)
        except UserError:
            refused += 1
    assert refused > 0.8 * len(places)


def test_a_number_that_was_changed_by_hand_is_refused_and_an_older_card_is_not(old, tmp_path):
    first = next(iter(old["metrics"]))
    path = tmp_path / "a.json"
    text = cards.card_text(old)
    changed = json.loads(text)
    changed["metrics"][first]["value"] -= 1
    path.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="a.json does not match its own checksum"):
        cards.compare([str(path), str(OLD / "card2.json")], ())
    path.write_text(json.dumps(old))  # without one
    assert cards.read_card(path) == old
