"""Tags: their spelling, the files they come in, expressions over them.

An expression picks images: "character:nova", "* hair", "glasses & !cat ears | character:nova",
"(smile | frown) & !beret".

    &  |  !      and, or, not; ! binds tightest, | least. & and | stand between spaces, ! before
                 what it negates
    ( )          group. Booru tags have parentheses of their own, so a pair inside a tag belongs to
                 the tag, as in "albedo (overlord) & solo"; those that do not belong to a tag that
                 exists group, as in "(a | b) & c"
    *  ?         any letters, one letter; the expression then means any of the tags that fit
    " "          around a tag that would read as something else: '"!" | "salt & pepper" | !"!!"'

What is a tag as a whole means that tag. Within a longer expression, signs alone are never a tag
unless quoted.
"""

import csv
import fnmatch
import io
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness.cli import UserError, closest
from harness.reading import open_file

TABLES = ("tags.jsonl", "metadata.jsonl", "metadata.csv")
BLOCK = 2**17  # images
COLUMNS = ("tags", "text", "caption")  # where tags are looked for, in this order
Test = Callable[["TagTable"], np.ndarray]  # which images fit, (n,) bool


class TagTable(Sequence):
    """The tags of n images as numbers: image i has vocabulary[k] for k in
    ids[starts[i]:starts[i + 1]], in its order."""

    def __init__(self, vocabulary: Sequence[str], starts: np.ndarray, ids: np.ndarray):
        self.vocabulary, self.starts, self.ids = list(vocabulary), starts, ids

    @classmethod
    def of(cls, lists: Sequence[Sequence[str]]) -> "TagTable":
        number: dict[str, int] = {}
        ids = [number.setdefault(tag, len(number)) for tags in lists for tag in tags]
        starts = np.cumsum([0, *map(len, lists)])
        return cls(list(number), starts, np.array(ids, dtype=np.int32))

    def of_one_form(self) -> "TagTable":
        """The same tags as they are compared."""
        if all(tag == one_form(tag) for tag in self.vocabulary):
            return self
        return TagTable.of([of_one_form(tags) for tags in self])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> tuple[str, ...]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        ids = self.ids[self.starts[i] : self.starts[i + 1]]
        return tuple(self.vocabulary[k] for k in ids)

    def lengths(self) -> np.ndarray:
        """(n,): tags an image."""
        return np.diff(self.starts)

    def blocks(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """(images, where their tags start and the last ones end, ids) a few at a time: of ten
        million tags, numpy makes 80 MB more than once."""
        for first in range(0, len(self), BLOCK):
            starts = self.starts[first : first + BLOCK + 1]
            images = slice(first, first + len(starts) - 1)
            yield images, starts - starts[0], self.ids[starts[0] : starts[-1]]

    def counts(self, index: np.ndarray | None = None) -> Counter:
        """How many images have each tag; of the images `index` only."""
        chosen = np.full(len(self), index is None)
        if index is not None:
            chosen[index] = True
        n = np.zeros(len(self.vocabulary), np.int64)
        for images, starts, ids in self.blocks():
            used = np.repeat(chosen[images], np.diff(starts))
            n += np.bincount(ids[used], minlength=len(n))
        return Counter({tag: int(k) for tag, k in zip(self.vocabulary, n) if k})

    def any_of(self, tags: Iterable[str]) -> np.ndarray:
        """(n,) bool: which images have one of these."""
        tags = set(tags)
        out = np.zeros(len(self), bool)
        wanted = np.fromiter((tag in tags for tag in self.vocabulary), bool, len(self.vocabulary))
        for images, starts, ids in self.blocks():
            before = np.concatenate([[0], np.cumsum(wanted[ids], dtype=np.int32)])
            out[images] = before[starts[1:]] > before[starts[:-1]]
        return out


def is_text(text: str) -> bool:
    """Can it be written as UTF-8? Half a surrogate pair, as in JSON's "\\ud800", cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def one_form(text: str) -> str:
    """Text as it is compared: "é" is one character or two, and Unicode's NFC is the one."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def one_spelling(tag: str) -> str:
    """Of a booru tag: 'Albedo_\\(Overlord\\)' -> 'albedo (overlord)'."""
    unescaped = re.sub(r"\\([()])", r"\1", tag)
    return re.sub(r"\s+", " ", unescaped.replace("_", " ")).strip().lower()


def normalize_tag(tag: str) -> str:
    """A tag as it is compared."""
    return one_form(one_spelling(tag))


def split_tags(text: str | Sequence[str]) -> tuple[str, ...]:
    """Comma-separated text, or a list, to tags of one spelling in order, without repeats. Not yet
    of one form: the hash of a data set, by which runs know it, is of these."""
    parts = text.split(",") if isinstance(text, str) else text
    return tuple(dict.fromkeys(t for t in map(one_spelling, parts) if t))


def of_one_form(tags: tuple[str, ...]) -> tuple[str, ...]:
    """Tags as they are compared, without the repeats that this makes."""
    return tags if all(map(str.isascii, tags)) else tuple(dict.fromkeys(map(one_form, tags)))


# ---- patterns -----------------------------------------------------------------------------------


def matching(pattern: str, vocabulary: Counter) -> list[str]:
    """The tags a pattern names: itself, or all that fit its * and ?."""
    pattern = normalize_tag(pattern)
    if pattern in vocabulary:
        return [pattern]
    if "*" not in pattern and "?" not in pattern:
        return []
    literal = pattern.replace("[", "[[]")  # brackets are no pattern here
    return sorted(tag for tag in vocabulary if fnmatch.fnmatchcase(tag, literal))


def match_tags(pattern: str, vocabulary: Counter, what: str, images: int) -> list[str]:
    """The tags a pattern names. None is an error with the nearest tags."""
    hits = matching(pattern, vocabulary)
    if not hits:
        pattern = normalize_tag(pattern)
        raise UserError(
            f"{what}: {pattern!r} matches 0 of {images:,} images",
            do=closest(pattern, vocabulary) or "The report of the data set lists its tags.",
        )
    return hits


# ---- expressions --------------------------------------------------------------------------------

# A tag in quotes: apart from what is around it, but for ! and parentheses.
QUOTED = re.compile(r'(?<![^\s!(])"([^"]*)"(?![^\s)])')
DEPTH = 50  # of parentheses and negations within each other
SIGNS = 3 * DEPTH  # in a row
Token = tuple[str, bool]  # "&" "|" "!" "(" ")" or a tag, and whether it is a tag


def compile_tags(text: str, vocabulary: Counter, what: str, images: int) -> tuple[Test, list[str]]:
    """An expression -> (test of all images, the tags it names).

    `what` the expression belongs to and the number of `images` are for the error messages.
    """
    parser = Parser(text, vocabulary, what, images)
    test = parser.either(0)
    if parser.words:
        raise parser.unexpected("'&', '|' or the end")
    return test, parser.named


class Parser:
    """An expression on its way to a Test: `words` are still to be read, `named` are the tags that
    were met. Each of either(), both() and one() reads a part of the expression."""

    def __init__(self, text: str, vocabulary: Counter, what: str, images: int):
        self.text, self.vocabulary, self.what, self.images = text, vocabulary, what, images
        self.named: list[str] = []
        self.words = [(text, True)] if self.known(text) else list(self.tokens())

    def known(self, word: str) -> bool:
        """Is this a tag, or a pattern that some tags fit?"""
        if normalize_tag(word) in self.vocabulary:
            return True
        return balanced(word) and bool(matching(word, self.vocabulary))

    def fail(self, fault: str) -> UserError:
        shown = self.text if len(self.text) < 200 else self.text[:200] + " …"
        return UserError(
            f"{self.what}: in {shown!r}, {fault}",
            do="Write, for example, 'glasses & !(smile | frown)'.",
        )

    def unexpected(self, wanted: str) -> UserError:
        came = repr(self.words[0][0]) if self.words else "the end"
        return self.fail(f"{came} came where {wanted} was wanted")

    # from text to words

    def tokens(self) -> Iterator[Token]:
        """The signs and tags of the expression, in order."""
        for i, part in enumerate(QUOTED.split(self.text)):
            if i % 2:  # every second one was quoted
                yield part, True
                continue
            for j, term in enumerate(re.split(r"(?:^|\s+)([&|])(?=\s|$)", part)):
                if j % 2:  # every second one is an operator
                    yield term, False
                else:
                    yield from self.term(term.strip())

    def term(self, term: str) -> list[Token]:
        """A tag and the signs around it."""
        before = len(re.match(r"[!(\s]*", term)[0])
        after = len(re.search(r"[)\s]*$", term)[0])
        if max(before, after) > SIGNS:
            raise self.fail(
                f"{max(before, after)} signs in a row came where at most {SIGNS} were wanted"
            )
        a, b, word = self.split_term(term, before, after)
        words = [(word, True)] if word else []
        return signs_in(term[:a]) + words + signs_in(term[len(term) - b :])

    def split_term(self, term: str, before: int, after: int) -> tuple[int, int, str]:
        """(a, b, word): how many of the characters before and after are signs, and the tag between
        them, or "".

        As few are taken off as leave a tag that exists. A ! before a tag always negates.
        """
        first = term.rfind("!", 0, before) + 1
        ways = [
            (a, b) for a in range(first, before + 1) for b in range(after + 1) if a + b < len(term)
        ]
        words = {}  # way -> what it leaves, if that is not signs alone
        for a, b in sorted(ways, key=sum):
            word = term[a : len(term) - b].strip()
            if word.strip("!() "):
                words[a, b] = word
        fits: dict[str, tuple[int, int]] = {}  # tag that exists -> the least way to it
        for way, word in reversed(words.items()):
            if self.known(word):
                fits[word] = way
        if len(fits) > 1:
            tags = ", ".join(map(repr, fits))
            raise self.fail(
                f"{term!r} can mean any of the tags {tags}; put the one in double quotes"
            )
        for word, way in fits.items():
            return *way, word
        # None exists: the one whose parentheses are in pairs is what the error is about.
        for way, word in words.items():
            if balanced(word):
                return *way, word
        b = after if before < len(term) else 0
        return before, b, words.get((before, b), "")

    # from words to tests

    def took(self, sign: str) -> bool:
        """Is this sign next? Then it is taken."""
        if self.words[:1] != [(sign, False)]:
            return False
        self.words.pop(0)
        return True

    def either(self, depth: int) -> Test:
        """a & b | c & d"""
        tests = [self.both(depth)]
        while self.took("|"):
            tests.append(self.both(depth))
        return lambda table: np.any([test(table) for test in tests], axis=0)

    def both(self, depth: int) -> Test:
        """a & b"""
        tests = [self.one(depth)]
        while self.took("&"):
            tests.append(self.one(depth))
        return lambda table: np.all([test(table) for test in tests], axis=0)

    def one(self, depth: int) -> Test:
        """A tag, or something in parentheses, with or without ! before it."""
        if depth > DEPTH:
            raise self.fail(f"parentheses and negations lie more than {DEPTH} deep")
        if self.took("!"):
            inner = self.one(depth + 1)
            return lambda table: ~inner(table)
        if self.took("("):
            inner = self.either(depth + 1)
            if not self.took(")"):
                raise self.unexpected("')'")
            return inner
        if not self.words or not self.words[0][1]:
            raise self.unexpected("a tag")
        word, _ = self.words.pop(0)
        hits = frozenset(match_tags(word, self.vocabulary, self.what, self.images))
        self.named.extend(sorted(hits))
        return lambda table: table.any_of(hits)


def balanced(word: str) -> bool:
    return word.count("(") == word.count(")") and not word.startswith("!")


def signs_in(text: str) -> list[Token]:
    return [(sign, False) for sign in text if sign in "!()"]


# ---- files --------------------------------------------------------------------------------------


def read_tags(
    root: Path, names: Sequence[str], tables: Sequence[Path], sidecars: set[str]
) -> dict[str, tuple[str, ...]]:
    """Tags by image name: from tables with a file_name and tags (or text, caption) in any folder,
    and from sidecar files (a.png -> a.txt), which win."""
    tags: dict[str, tuple[str, ...]] = {}
    named, texts = Spellings(names), Spellings(sidecars)
    for table in sorted(tables):
        for number, key, row in table_rows(root, table):
            try:
                tags[named.find(key) or key] = tags_in(row)
            except ValueError as error:
                raise not_a_row(table, number, row, error) from None
    absent = sorted(tags.keys() - set(names))
    if absent:
        print(
            f"warning: tags for {len(absent):,} files that are not there, "
            f"first {printable(absent[0])}",
            file=sys.stderr,
            flush=True,
        )
    for name in names:
        sidecar = texts.find(str(Path(name).with_suffix(".txt")))
        if sidecar:
            tags[name] = split_tags(read_text(root / sidecar))
    return tags


def table_rows(root: Path, table: Path) -> Iterator[tuple[int, str, dict]]:
    """(line, image's name relative to root, row) of a table's rows."""
    rows = csv_rows if table.suffix == ".csv" else json_rows
    for number, row in rows(table):
        try:
            key = image_key(root, table, row["file_name"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise not_a_row(table, number, row, error) from None
        yield number, key, row


def not_a_row(table: Path, number: int, row: object, error: Exception) -> UserError:
    return UserError(
        f'{table}:{number}: wanted a "file_name" below the folder and "tags", '
        f"got {str(row)[:60]!r} ({type(error).__name__}: {error})",
        do="Mend this line.",
    )


def image_key(root: Path, table: Path, name: str) -> str:
    """The image that a table names, relative to root. It lies below the table's own folder: a name
    in a file leads nowhere else."""
    inner = Path(os.path.normpath(name))
    if inner.parts[:1] == ("..",):
        raise ValueError("it leads out of the folder")
    return str((table.parent / inner).relative_to(root))


class Spellings:
    """File names, found by any form of their characters: macOS and what it packs write "é" as two,
    tables mostly as one."""

    def __init__(self, names: Iterable[str]):
        self.names = set(names)
        more = sorted(name for name in self.names if not name.isascii())
        self.by_form = {one_form(name): name for name in more}

    def find(self, name: str) -> str:
        """The name as the disk has it; "" if it is not there in any form."""
        return name if name in self.names else self.by_form.get(one_form(name), "")


def tags_in(row: dict) -> tuple[str, ...]:
    """The tags of a table's row; none where no column says anything."""
    values = (row.get(column) for column in COLUMNS)
    value = next((value for value in values if value is not None), ())
    return tags_of(value) if value != () else ()


def find_class(word: str, classes: Sequence[str]) -> int:
    """The number of a class, given by its name in any form of its characters, or by its number; -1:
    there is none."""
    forms = [one_form(name) for name in classes]
    if one_form(word) in forms:
        return forms.index(one_form(word))
    # isdigit() would let "²" through, which int() does not read.
    number = int(word) if word.isdecimal() and len(word) < 10 else -1
    return number if number < len(classes) else -1


def pick_labels(wanted: tuple[str, ...], classes: list[str], n: int) -> Tensor | None:
    """Names or numbers to labels (n,), cycled; None when nothing is wanted."""
    if not wanted:
        return None
    if not classes:
        raise UserError(
            "--labels given, but this checkpoint was trained without classes",
            do="Leave --labels out.",
        )
    ids = []
    for word in wanted:
        ids.append(find_class(word, classes))
        if ids[-1] < 0:
            known = ", ".join(classes[:20]) + (" …" if len(classes) > 20 else "")
            raise UserError(
                f"--labels: no class {word!r} among {len(classes)}",
                do=f"{closest(word, classes)}  Known: {known}.",
            )
    return torch.tensor([ids[i % len(ids)] for i in range(n)])


def tags_of(value: object) -> tuple[str, ...]:
    """What a table says about one image: text or a list of texts."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(tag, str) for tag in texts):
        raise ValueError("tags are text or a list of texts")
    if any("\ud800" <= letter <= "\udfff" for tag in texts for letter in tag):
        raise ValueError("half of a character, \\ud800 to \\udfff without its other half")
    return split_tags(value)


def json_rows(table: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(read_text(table).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f'{table}:{number}: wanted {{"file_name": …, "tags": …}}, '
                f"got {line[:60]!r} ({error})",
                do="Mend this line.",
            ) from None
        yield number, row


def csv_rows(table: Path) -> Iterator[tuple[int, dict]]:
    rows = csv.DictReader(io.StringIO(read_text(table), newline=""))
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise UserError(
            f"{table}:{rows.line_num}: not a row of csv ({error})",
            do="Look for a quotation mark without its second one.",
        ) from None


def read_text(path: Path) -> str:
    """A UTF-8 text file, with or without a byte-order mark."""
    try:
        with open_file(path) as file:
            return io.TextIOWrapper(file, "utf-8-sig").read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})",
            do="Save it as UTF-8.",
        ) from None


def printable(name: str) -> str:
    """A file name as any terminal can show it: they may hold bytes that are no text."""
    return name.encode("utf-8", "backslashreplace").decode()
