"""Tags: their spelling, the files they come in, expressions over them, captions made of them.

An expression picks images: "character:nova", "* hair", "glasses & !cat ears | character:nova", "(smile | frown) & !beret".

    &  |  !          and, or, not; ! binds tightest, | least. & and | stand between spaces, ! before what it negates
    ( )              group. Booru tags have parentheses of their own, so a pair inside a tag belongs to the tag, as in
                     "albedo (overlord) & solo"; those that do not belong to a tag that exists group, as in "(a | b) & c"
    *  ?             any letters, one letter; the expression then means any of the tags that fit
    " "              around a tag that would read as something else: '"!" | "salt & pepper" | !"!!"'

What is a tag as a whole means that tag. Within a longer expression, signs alone are never a tag unless quoted.
"""

import csv
import fnmatch
import io
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Iterable, Iterator, Sequence

import numpy as np

from harness.cli import UserError, closest

TABLES = ("tags.jsonl", "metadata.jsonl", "metadata.csv")
BLOCK = 2 ** 17                              # images
COLUMNS = ("tags", "text", "caption")        # where tags are looked for, in this order
Test = Callable[["TagTable"], np.ndarray]    # which images fit, (n,) bool


class TagTable(Sequence):
    """The tags of n images as numbers: image i has vocabulary[k] for k in ids[starts[i]:starts[i + 1]], in its order."""

    def __init__(self, vocabulary: Sequence[str], starts: np.ndarray, ids: np.ndarray):
        self.vocabulary, self.starts, self.ids = list(vocabulary), starts, ids

    @classmethod
    def of(cls, lists: Sequence[Sequence[str]]) -> "TagTable":
        number: dict[str, int] = {}
        ids = [number.setdefault(tag, len(number)) for tags in lists for tag in tags]
        return cls(list(number), np.cumsum([0, *map(len, lists)]), np.array(ids, dtype=np.int32))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> tuple[str, ...]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return tuple(self.vocabulary[k] for k in self.ids[self.starts[i]:self.starts[i + 1]])

    def lengths(self) -> np.ndarray:
        """(n,): tags an image."""
        return np.diff(self.starts)

    def blocks(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """(images, where their tags start and the last ones end, ids) a few at a time: of ten million tags, numpy makes 80 MB more than once."""
        for first in range(0, len(self), BLOCK):
            starts = self.starts[first:first + BLOCK + 1]
            yield slice(first, first + len(starts) - 1), starts - starts[0], self.ids[starts[0]:starts[-1]]

    def counts(self, index: np.ndarray | None = None) -> Counter:
        """How many images have each tag; of the images `index` only."""
        chosen, n = np.full(len(self), index is None), np.zeros(len(self.vocabulary), np.int64)
        chosen[slice(0) if index is None else index] = True
        for images, starts, ids in self.blocks():
            n += np.bincount(ids[np.repeat(chosen[images], np.diff(starts))], minlength=len(n))
        return Counter({tag: int(k) for tag, k in zip(self.vocabulary, n) if k})

    def any_of(self, tags: Iterable[str]) -> np.ndarray:
        """(n,) bool: which images have one of these."""
        tags, out = set(tags), np.zeros(len(self), bool)
        wanted = np.fromiter((tag in tags for tag in self.vocabulary), bool, len(self.vocabulary))
        for images, starts, ids in self.blocks():
            before = np.concatenate([[0], np.cumsum(wanted[ids], dtype=np.int32)])
            out[images] = before[starts[1:]] > before[starts[:-1]]
        return out


def normalize_tag(tag: str) -> str:
    """One spelling of a booru tag: 'Albedo_\\(Overlord\\)' -> 'albedo (overlord)'."""
    return re.sub(r"\s+", " ", re.sub(r"\\([()])", r"\1", tag).replace("_", " ")).strip().lower()


def split_tags(text: str | Sequence[str]) -> tuple[str, ...]:
    """Comma-separated text, or a list, to normalized tags in order, without repeats."""
    parts = text.split(",") if isinstance(text, str) else text
    return tuple(dict.fromkeys(t for t in map(normalize_tag, parts) if t))


# ---- expressions ----------------------------------------------------------------------------------------------------

def matching(pattern: str, vocabulary: Counter) -> list[str]:
    """The tags a pattern names: itself, or all that fit its * and ?."""
    pattern = normalize_tag(pattern)
    if pattern in vocabulary or "*" not in pattern and "?" not in pattern:
        return [pattern] * (pattern in vocabulary)
    return sorted(t for t in vocabulary if fnmatch.fnmatchcase(t, pattern.replace("[", "[[]")))


def match_tags(pattern: str, vocabulary: Counter, what: str, images: int) -> list[str]:
    """… of which there have to be some: none is an error with the nearest tags."""
    hits = matching(pattern, vocabulary)
    if not hits:
        pattern = normalize_tag(pattern)
        raise UserError(f"{what}: {pattern!r} matches 0 of {images:,} images.{closest(pattern, vocabulary)}")
    return hits


QUOTED = re.compile(r'(?<![^\s!(])"([^"]*)"(?![^\s)])')                        # apart from what is around it, but for ! and parentheses
DEPTH = 50                                   # of parentheses and negations within each other
Token = tuple[str, bool]                     # "&" "|" "!" "(" ")" or a tag, and whether it is a tag


def tokens(text: str, known: Callable[[str], bool], fail: Callable[[str], UserError]) -> Iterator[Token]:
    """The signs and tags of an expression, in order."""
    for i, part in enumerate(QUOTED.split(text)):
        if i % 2:                                                               # every second one was quoted
            yield part, True
            continue
        for j, term in enumerate(re.split(r"(?:^|\s+)([&|])(?=\s|$)", part)):   # … is an operator
            yield from [(term, False)] if j % 2 else read_term(term.strip(), known, fail)


def read_term(term: str, known: Callable[[str], bool], fail: Callable[[str], UserError]) -> list[Token]:
    """A tag and the signs around it: of the parentheses, as few are taken off as leave a tag that exists."""
    before, after = len(re.match(r"[!(\s]*", term)[0]), len(re.search(r"[)\s]*$", term)[0])
    if max(before, after) > 3 * DEPTH:
        raise fail(f"{max(before, after)} signs in a row came where at most {3 * DEPTH} were wanted")
    first = term.rfind("!", 0, before) + 1                                      # a ! before a tag always negates
    ways = sorted(((a, b) for a in range(first, before + 1) for b in range(after + 1) if a + b < len(term)), key=sum)
    rest = {way: word for way in ways if (word := term[way[0]:len(term) - way[1]].strip()).strip("!() ")}
    fits = {rest[way]: way for way in reversed(ways) if way in rest and known(rest[way])}
    if len(fits) > 1:
        raise fail(f"{term!r} can mean any of the tags {', '.join(map(repr, fits))}; put the one in double quotes")
    # none exists: the one whose parentheses are in pairs is what the error is about
    a, b = next(iter(fits.values()), None) or next((way for way in rest if balanced(rest[way])), (before, after if before < len(term) else 0))
    signs = [[(sign, False) for sign in part if sign in "!()"] for part in (term[:a], term[len(term) - b:])]
    return signs[0] + ([(rest[a, b], True)] if (a, b) in rest else []) + signs[1]


def balanced(word: str) -> bool:
    return word.count("(") == word.count(")") and not word.startswith("!")


def compile_tags(text: str, vocabulary: Counter, what: str, images: int) -> tuple[Test, list[str]]:
    """An expression -> (test of all images, the tags it names)."""
    def known(word: str) -> bool:
        return normalize_tag(word) in vocabulary or balanced(word) and bool(matching(word, vocabulary))

    def fail(fault: str) -> UserError:
        shown = repr(text if len(text) < 200 else text[:200] + " …")
        return UserError(f"{what}: in {shown}, {fault}.  Write, for example, 'glasses & !(smile | frown)'.")

    def unexpected(wanted: str) -> UserError:
        return fail(f"{repr(words[0][0]) if words else 'the end'} came where {wanted} was wanted")

    def taken(sign: str) -> bool:
        """Is this sign next? Then it is taken."""
        return words[:1] == [(sign, False)] and bool(words.pop(0))

    def joined(sign: str, join: Callable, part: Callable[[int], Test], depth: int) -> Test:
        tests = [part(depth)]
        while taken(sign):
            tests.append(part(depth))
        return lambda table: join([test(table) for test in tests], axis=0)

    def either(depth: int) -> Test:
        return joined("|", np.any, partial(joined, "&", np.all, one), depth)

    def one(depth: int) -> Test:
        if depth > DEPTH:
            raise fail(f"parentheses and negations lie more than {DEPTH} deep")
        if taken("!"):
            inner = one(depth + 1)
            return lambda table: ~inner(table)
        if taken("("):
            inner = either(depth + 1)
            if not taken(")"):
                raise unexpected("')'")
            return inner
        if not words or not words[0][1]:
            raise unexpected("a tag")
        hits = frozenset(match_tags(words.pop(0)[0], vocabulary, what, images))
        named.extend(sorted(hits))
        return lambda table: table.any_of(hits)

    words = [(text, True)] if known(text) else list(tokens(text, known, fail))
    named: list[str] = []
    test = either(0)
    if words:
        raise unexpected("'&', '|' or the end")
    return test, named


# ---- captions -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Captions:
    """How tags become text, for a network that reads: Stream(..., captions=Captions(drop=0.1, keep=1)) makes a caption for each
    position, and batches() hands them on as batch["caption"], a list of texts. train.py knows no such network yet, so it has no
    flag for this; whoever adds one takes the captions out of the batch, encodes them and passes them to the net as context.
    """
    shuffle: bool = True
    drop: float = 0.0                        # share of tags left out
    keep: int = 0                            # the first n keep their place, and are not left out
    empty: float = 0.0                       # share of captions left empty, for classifier-free guidance

    def text(self, tags: Sequence[str], r: np.random.Generator) -> str:
        """Tags, comma separated. All dice are thrown whatever the settings, so that none moves another."""
        blank, order, out = r.random(), r.permutation(len(tags)), r.random(len(tags))
        rest = [i for i in (order if self.shuffle else range(len(tags))) if i >= self.keep and out[i] >= self.drop]
        return "" if blank < self.empty else ", ".join([*tags[:self.keep], *(tags[i] for i in rest)])


# ---- files ----------------------------------------------------------------------------------------------------------

def read_tags(root: Path, names: Sequence[str], tables: Sequence[Path], sidecars: set[str]) -> dict[str, tuple[str, ...]]:
    """Tags by image name: from tables with a file_name and tags (or text, caption) in any folder, and from sidecar files
    (a.png -> a.txt), which win."""
    tags: dict[str, tuple[str, ...]] = {}
    for table in sorted(tables):
        for number, row in (csv_rows if table.suffix == ".csv" else json_rows)(table):
            try:
                key = str((table.parent / row["file_name"]).relative_to(root))
                tags[key] = tags_of(row[next((c for c in COLUMNS if c in row), "tags")])
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{table}:{number}: wanted a \"file_name\" below the folder and \"tags\", got {str(row)[:60]!r} "
                                f"({type(error).__name__}: {error}).") from None
    absent = sorted(tags.keys() - set(names))
    if absent:
        print(f"warning: tags for {len(absent):,} files that are not there, first {printable(absent[0])}", file=sys.stderr, flush=True)
    for name in names:
        sidecar = str(Path(name).with_suffix(".txt"))
        if sidecar in sidecars:
            tags[name] = split_tags(read_text(root / sidecar))
    return tags


def tags_of(value: object) -> tuple[str, ...]:
    """What a table says about one image: text or a list of texts."""
    if not isinstance(value, (str, list)) or not all(isinstance(tag, str) for tag in value):
        raise ValueError("tags are text or a list of texts")
    return split_tags(value)


def json_rows(table: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(read_text(table).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise UserError(f"{table}:{number}: wanted {{\"file_name\": …, \"tags\": …}}, got {line[:60]!r} ({error}).") from None


def csv_rows(table: Path) -> Iterator[tuple[int, dict]]:
    rows = csv.DictReader(io.StringIO(read_text(table), newline=""))
    for row in rows:
        yield rows.line_num, row


def read_text(path: Path) -> str:
    """A UTF-8 text file, with or without a byte-order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).  Save it as UTF-8.") from None


def printable(name: str) -> str:
    """A file name as any terminal can show it: they may hold bytes that are no text."""
    return name.encode("utf-8", "backslashreplace").decode()
