"""Tags: their spelling, the files they come in, expressions over them, captions made of them.

An expression picks images: "character:nova", "* hair", "glasses & !cat ears | character:nova", "(smile | frown) & !beret".

    &  |  !          and, or, not; ! binds tightest, | least. & and | stand between spaces, ! before what it negates
    ( )              group. Booru tags have parentheses of their own, so a pair inside a tag belongs to the tag, as in
                     "albedo (overlord) & solo"; those that do not belong to a tag that exists group, as in "(a | b) & c"
    *  ?             any letters, one letter; the expression then means any of the tags that fit
    a tag with & or | in it is written with underscores: "dungeons_&_dragons & solo"; whatever is a tag as a whole, means it
"""

import csv
import fnmatch
import io
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator, Sequence

import numpy as np

from config import UserError, closest

TABLES = ("tags.jsonl", "metadata.jsonl", "metadata.csv")
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

    def counts(self, index: np.ndarray | None = None) -> Counter:
        """How many images have each tag; of the images `index` only."""
        chosen = np.full(len(self), index is None)
        chosen[slice(0) if index is None else index] = True
        n = np.bincount(self.ids[np.repeat(chosen, self.lengths())], minlength=len(self.vocabulary))
        return Counter({tag: int(k) for tag, k in zip(self.vocabulary, n) if k})

    def any_of(self, tags: Iterable[str]) -> np.ndarray:
        """(n,) bool: which images have one of these."""
        tags = set(tags)
        wanted = np.fromiter((tag in tags for tag in self.vocabulary), bool, len(self.vocabulary))
        before = np.concatenate([[0], np.cumsum(wanted[self.ids], dtype=np.int32)])
        return before[self.starts[1:]] > before[self.starts[:-1]]


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


def tokens(text: str, known: Callable[[str], bool]) -> Iterator[str]:
    """"&" "|" "!" "(" ")" and tags. Of a term, as few "!" and parentheses are taken off as leave a tag that exists."""
    for i, term in enumerate(re.split(r"(?:^|\s+)([&|])(?=\s|$)", text)):       # every second one is an operator
        term = term.strip()
        before, after = len(re.match(r"[!(\s]*", term)[0]), len(re.search(r"[)\s]*$", term)[0])
        ways = sorted(((a, b) for a in range(before + 1) for b in range(after + 1) if a + b <= len(term)), key=sum)
        rest = {(a, b): term[a:len(term) - b].strip() for a, b in ways}
        # none exists: the one whose parentheses are in pairs is what the error is about
        fits = [w for w in ways if known(rest[w])] or [w for w in ways if balanced(rest[w])] or [(before, after)]
        a, b = fits[0] if i % 2 == 0 else (0, 0)
        yield from [c for c in term[:a] if c != " "] + [rest[a, b]] * bool(rest[a, b]) + [c for c in term[len(term) - b:] if c != " "]


def balanced(word: str) -> bool:
    return word.count("(") == word.count(")") and not word.startswith("!")


def compile_tags(text: str, vocabulary: Counter, what: str, images: int) -> tuple[Test, list[str]]:
    """An expression -> (test of all images, the tags it names)."""
    def known(word: str) -> bool:
        return normalize_tag(word) in vocabulary or balanced(word) and bool(matching(word, vocabulary))

    def fail(found: str, wanted: str) -> UserError:
        return UserError(f"{what}: in {text!r}, {found or 'the end'} came where {wanted} was wanted.  "
                         "Write, for example, 'glasses & !(smile | frown)'.")

    def either() -> Test:
        tests = [both()]
        while words[:1] == ["|"]:
            words.pop(0)
            tests.append(both())
        return lambda table: np.any([test(table) for test in tests], axis=0)

    def both() -> Test:
        tests = [one()]
        while words[:1] == ["&"]:
            words.pop(0)
            tests.append(one())
        return lambda table: np.all([test(table) for test in tests], axis=0)

    def one() -> Test:
        word = words.pop(0) if words else ""
        if word == "!" and not known("!"):
            inner = one()
            return lambda table: ~inner(table)
        if word == "(":
            inner = either()
            if words[:1] != [")"]:
                raise fail(repr(words[0]) if words else "", "')'")
            words.pop(0)
            return inner
        if word in ("", "&", "|", ")"):
            raise fail(repr(word) if word else "", "a tag")
        hits = frozenset(match_tags(word, vocabulary, what, images))
        named.extend(sorted(hits))
        return lambda table: table.any_of(hits)

    words = [text] if known(text) else list(tokens(text, known))
    named: list[str] = []
    test = either()
    if words:
        raise fail(repr(words[0]), "'&', '|' or the end")
    return test, named


# ---- captions -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Captions:
    """How tags become text."""
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
