"""Tag expressions against Python's own booleans; tables of tags."""

import json
import random
import re
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data.dataset import open_dataset
from data.tags import TagTable, compile_tags, find_class, normalize_tag, split_tags
from harness.cli import UserError

TAGS = [
    "glasses",
    "cat ears",
    "albedo (overlord)",
    "character:nova",
    "dungeons & dragons",
    ":)",
    "!!",
    "smile",
    "frown",
    "(o) (o)",
]
VOCABULARY = Counter({tag: 1 for tag in TAGS})


def holds(text, *tags):
    return compile_tags(text, VOCABULARY, "stage=fine", 9)[0](TagTable.of([tuple(tags)]))[0]


def written(r, depth=3):
    """A random expression -> (its text, the same for eval())."""
    kind = r.choice(["tag", "not", "and", "or", "group"]) if depth else "tag"
    if kind == "tag":
        tag = r.choice(TAGS)
        plain = (
            [f'"{tag}"']
            if tag == "!!"
            else [tag, tag.title(), f'"{tag.title()}"']
            if "&" not in tag
            else [tag.replace(" ", "_"), f'"{tag}"']
        )
        return r.choice(plain), f"({tag!r} in tags)"
    if kind in ("not", "group"):
        text, truth = written(r, depth - 1)
        text = r.choice([f"({text})", f"( {text} )"])
        return (
            (f"!{r.choice(['', ' '])}{text}", f"(not {truth})") if kind == "not" else (text, truth)
        )
    (a, x), (b, y) = written(r, depth - 1), written(r, depth - 1)
    sign, word = ("&", "and") if kind == "and" else ("|", "or")
    return f"({a}) {sign} ({b})", f"({x} {word} {y})"


def test_expressions_are_what_python_says():
    r, seen = random.Random(0), set()
    for _ in range(400):
        text, truth = written(r)
        test, named = compile_tags(text, VOCABULARY, "x", 9)
        for _ in range(12):
            tags = frozenset(r.sample(TAGS, r.randrange(len(TAGS))))
            fits = bool(test(TagTable.of([(), tuple(sorted(tags))]))[1])
            assert fits == eval(truth, {"tags": tags}), (text, tags)
            seen.add(fits)
        assert set(named) == {tag for tag in TAGS if repr(tag) in truth}
    assert seen == {True, False}


@pytest.mark.parametrize(
    "text, yes, no",
    [
        (
            "glasses & !cat ears | character:nova",
            [["glasses"], ["character:nova", "cat ears"]],
            [["cat ears", "glasses"], []],
        ),
        (
            "!glasses & smile | frown",
            [["smile"], ["frown", "glasses"]],
            [["glasses", "smile"], ["glasses"], []],
        ),  # not before and before or
        ("(smile | frown) & glasses", [["frown", "glasses"]], [["smile"], ["glasses"]]),
        ("Albedo_(Overlord)", [["albedo (overlord)"]], [["smile"]]),
        (r"albedo \(overlord\) & smile", [["albedo (overlord)", "smile"]], [["smile"]]),
        ("(albedo (overlord) | smile) & glasses", [["albedo (overlord)", "glasses"]], [["smile"]]),
        ("!(albedo (overlord))", [[]], [["albedo (overlord)"]]),
        ("dungeons & dragons", [["dungeons & dragons"]], [["smile"]]),  # a tag as a whole
        ("dungeons_&_dragons & smile", [["dungeons & dragons", "smile"]], [["smile"]]),
        ("!!", [["!!"]], [[]]),
        ('!"!!"', [[]], [["!!"]]),
        ('!(!"!!")', [["!!"]], [[]]),
        (":)", [[":)"]], [[]]),
        ("(smile | :)) & frown", [[":)", "frown"]], [["smile"]]),
        ("character:*", [["character:nova"]], [["glasses"]]),
        ("!* (*)", [["smile"]], [["albedo (overlord)"]]),
        ("s?ile", [["smile"]], [[]]),
    ],
)
def test_expressions_as_documented(text, yes, no):
    assert all(holds(text, *tags) for tags in yes) and not any(holds(text, *tags) for tags in no)


@pytest.mark.parametrize(
    "text, message",
    [
        ("smile &", "the end came where a tag was wanted"),
        ("| smile", "'|' came where a tag"),
        ("(smile | frown", "the end came where ')'"),
        ("smile | frown)", "')' came where '&', '|' or the end"),
        ("!", "the end came where a tag"),
        ("", "the end came"),
        ("()", "')' came where a tag"),
        ("!!!", "the end came where a tag"),
        ("smile & glases", "stage=fine: 'glases' matches 0 of 9 images.  Closest: glasses"),
        ("smile frown", "matches 0 of 9 images.  Closest: smile, frown"),
    ],
)
def test_expressions_that_cannot_be_say_where(text, message):
    with pytest.raises(UserError) as error:
        holds(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_tags_that_look_like_signs_are_tags_alone_or_quoted():
    """Every expression over such a vocabulary against sets: a tag as a whole, a sign within, a tag
    in quotes."""
    odd = Counter({tag: 1 for tag in ("!", "(", ")", "a & b", "!a", "(a)", "a", "b", "|")})

    def images(text):
        table = TagTable.of([(tag,) for tag in odd] + [("a", "b")])
        return {
            "".join(tags)
            for tags, fits in zip(
                [(tag,) for tag in odd] + [("a", "b")], compile_tags(text, odd, "x", 9)[0](table)
            )
            if fits
        }

    everything = set(odd) | {"ab"}
    for tag in odd:
        wanted = {
            other for other in everything if other == tag or other == "ab" and tag in ("a", "b")
        }
        assert images(tag) == images(f'"{tag}"') == images(f'("{tag}")') == wanted, tag
        assert images(f'!"{tag}"') == everything - wanted
        assert (
            images(f'"{tag}" | b') == wanted | {"b", "ab"}
            and images(f'b & !"{tag}"') == {"b", "ab"} - wanted
        )
    assert (
        images("!b") == everything - {"b", "ab"}
        and images("b & !a") == {"b"}
        and images("b & a") == images("(b & a)") == {"ab"}
    )
    assert images("a & b | b") == {"b", "ab"} != images('"a & b" | b') == {"b", "ab", "a & b"}
    for text, message in (
        ("b & !", "the end came where a tag"),
        ("b & (", "the end came where a tag"),
        ("b & )", "')' came where a tag"),
        ("b & (a)", "'(a)' can mean any of the tags 'a', '(a)'; put the one in double quotes"),
        ('b "a"', "'a' came where '&'"),
        ('"b', "matches 0 of 9"),
        ('b & "c"', "'c' matches 0 of 9"),
        ('"a"&"b"', "matches 0"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            images(text)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 400 + "smile" + ")" * 400,
        "!" * 400 + "smile",
        "(! " * 400 + "smile" + ")" * 400,
        "( " * 400 + "smile & frown" + " )" * 400,
        "(smile | " * 400 + "frown" + ")" * 400,
        "(" * 10**5,
        "!(" * 60 + '"smile"' + ")" * 60,
    ],
)
def test_deep_expressions_are_one_line_and_fifty_levels_are_read(text):
    start = time.process_time()
    with pytest.raises(UserError) as error:
        holds(text)
    assert (
        "\n" not in str(error.value)
        and len(str(error.value)) < 400
        and time.process_time() - start < 5
    )
    assert "deep" in str(error.value) or "signs in a row" in str(error.value)
    for n in (1, 24, 25):
        assert holds("!(" * n + "smile" + ")" * n, "smile") == (n % 2 == 0) and holds(
            "(" * 2 * n + "smile" + ")" * 2 * n, "smile"
        )
    assert holds(" & ".join(["!frown"] * 300 + ["(smile)"] * 300), "smile")  # long is not deep


def test_stages_by_expression_add_up(tmp_path):
    rows = [["glasses"], ["glasses", "cat ears"], ["character:nova", "cat ears"], ["smile"], []]
    for i in range(len(rows)):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{i}.png", "tags": t}) + "\n" for i, t in enumerate(rows))
    )
    text = "glasses & !cat ears | character:nova"
    fine, stage2 = (
        open_dataset(str(tmp_path), stage=s, exclude_tags=(text,), resolution=8, holdout=0)
        for s in ("fine", "stage2")
    )
    assert list(fine.index) == [1, 3, 4] and list(stage2.index) == [0, 2]
    assert (
        f"stage2 {text!r}: 2 found, 2 used" in stage2.report
        and f"fine {text!r}: 2 found, 0 used" in fine.report
    )
    both = open_dataset(
        str(tmp_path), stage="stage2", exclude_tags=("smile", text), resolution=8, holdout=0
    )  # the comma is an or
    assert list(both.index) == [0, 2, 3]


# ---- tables -------------------------------------------------------------------------------------


def test_tags_from_csv(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "metadata.csv").write_bytes(
        (
            '\ufefffile_name,text\r\na.png,"Red_Hair, albedo \\(overlord\\)"\r\n'
            'b.png,"two\nlines, x"\r\n'
        ).encode()
    )
    ds = open_dataset(str(tmp_path), resolution=8, holdout=0)
    assert ds.source.tags == [("red hair", "albedo (overlord)"), ("two lines", "x"), ()]
    (tmp_path / "metadata.csv").write_text("text,file_name\nx,a.png\ny\n")
    with pytest.raises(UserError, match="metadata.csv:3: wanted"):
        open_dataset(str(tmp_path), resolution=8)
    (tmp_path / "metadata.csv").write_text("name,text\na.png,x\n")
    with pytest.raises(UserError, match="metadata.csv:2: wanted .*KeyError: 'file_name'"):
        open_dataset(str(tmp_path), resolution=8)


def test_a_table_speaks_of_its_own_folder_only(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "x.png")
    table = tmp_path / "a/metadata.jsonl"
    for name, tags in (("x.png", ("t",)), ("./x.png", ("t",)), ("c/../x.png", ("t",))):
        table.write_text(json.dumps({"file_name": name, "tags": "t"}))
        ds = open_dataset(str(tmp_path), resolution=8, holdout=0)
        assert ds.source.tags == [tags, ()]
    for name in ("../b/x.png", "..", "c/../../b/x.png", "/etc/passwd", 7):
        table.write_text(json.dumps({"file_name": name, "tags": "t"}))
        with pytest.raises(UserError, match="metadata.jsonl:1: wanted a .file_name. below"):
            open_dataset(str(tmp_path), resolution=8)


@pytest.mark.parametrize("block", [2**17, 2, 1])
def test_a_tag_table_is_its_lists_and_counts_as_they_do(monkeypatch, block):
    monkeypatch.setattr("data.tags.BLOCK", block)
    lists = [("b", "a"), (), ("a",), ("c", "b", "a"), ()]
    table = TagTable.of(lists)
    assert [table[i] for i in range(5)] == lists == list(table) and len(table) == 5
    for index in (None, np.array([0, 3]), np.array([], dtype=int), np.array([4])):
        chosen = range(5) if index is None else index
        assert table.counts(index) == Counter(tag for i in chosen for tag in lists[i])
    for wanted in ({"a"}, {"b", "c"}, {"nothing"}, set()):
        assert table.any_of(wanted).tolist() == [bool(wanted & set(tags)) for tags in lists]


@pytest.mark.parametrize(
    "text, tags",
    [
        (r"albedo \(overlord\), Blue_Hair,  , blue hair", ("albedo (overlord)", "blue hair")),
        (["Looking At Viewer", "1girl"], ("looking at viewer", "1girl")),
        ("", ()),
    ],
)
def test_booru_tags_have_one_spelling(text, tags):
    assert split_tags(text) == tags
    assert all(normalize_tag(t) == t for t in tags)


@pytest.mark.parametrize(
    "word, number",
    [
        *(("cat", 0), ("pok\u00e9mon", 1), ("poke\u0301mon", 1), ("2", 2), ("02", 2), ("7", 2)),
        *(("²", -1), ("①", -1), ("٢", 2), ("3", -1), ("-1", -1), ("", -1), ("9" * 5000, -1)),
    ],
)
def test_a_class_is_found_by_its_name_in_any_form_or_by_its_number(word, number):
    assert find_class(word, ["cat", "poke\u0301mon", "7"]) == number
