"""Prompt weights, "a (red:1.3) car", as A1111 and ComfyUI read and apply them.

    texts = weighted(open_texts("v1-5-pruned.safetensors"), "comfy")
    told = texts.tell(["a (red:1.3) car"])      # as text.Texts

    a1111    (x) 1.1 times, [x] 1 / 1.1 times, (x:1.3) 1.3 times what is around it. An open ( counts
             to the end; BREAK begins a new piece. A state is multiplied by its weight, then each
             piece drawn back to the mean that it had.
    comfy    (x) 1.1 times, (x:1.3) 1.3 whatever is around it. An open ( is a sign. A state is led
             away from that of the empty text at its place.

\\( and \\) are signs in both.

Neither is known to tokenize(): in training, parentheses are text. Long prompts are cut where each
program does it: A1111 behind a comma among the last 20 tokens of a piece, ComfyUI before a part of
fewer than 8 tokens for which there is no room.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from harness.cli import UserError, clipped
from text import BOS, CONTEXT, EOS, ROOM, TextEncoder, Texts, pieces_of, spelled, tokenize

Dialect = Literal["none", "a1111", "comfy"]
FACTOR = 1.1  # of a pair of parentheses
MOST = 1e3  # of a weight
COMMA = 267
BACK = 20  # tokens: how far A1111 looks back for a comma
WORD = 8  # tokens: from here on ComfyUI cuts a part in two
DEEPEST = 100  # parentheses in parentheses
A1111 = re.compile(
    r"\\[\\()\[\]]?|[(\[]|:\s*(?P<number>[+-]?[\d.]+)\s*\)|[)\]]|[^\\()\[\]:]+|:", re.S
)
BREAK = re.compile(r"\s*\bBREAK\b\s*")


class Segment(NamedTuple):
    """A part of a prompt under one weight. text None: here a new piece begins."""

    text: str | None
    weight: float = 1.0


Token = tuple[int, float]


# ---- reading ------------------------------------------------------------------------------------


def segments(prompt: str, dialect: Dialect) -> list[Segment]:
    """The parts of a prompt, in their order, none of them empty."""
    if dialect == "none":
        return [Segment(prompt)] if prompt else []
    check_depth(prompt)
    if dialect == "a1111":
        return read_a1111(prompt)
    return [part for part in read_comfy(re.findall(r"\\[()]|.", prompt, re.S), 1.0) if part.text]


def check_depth(prompt: str) -> None:
    depth = deepest = 0
    for c in prompt:
        depth += {"(": 1, ")": -1}.get(c, 0)
        deepest = max(deepest, depth)
    if deepest > DEEPEST:
        raise UserError(
            f"the prompt {clipped(prompt)!r} has {deepest} parentheses in each other",
            wanted=f"{DEEPEST} at most",
            do="Write a weight as a number: (word:1.3).",
        )


def read_a1111(prompt: str) -> list[Segment]:
    """A1111's rule: weights multiply."""
    found: list[Segment] = []
    starts: dict[str, list[int]] = {"(": [], "[": []}

    def scale(start: int, factor: float) -> None:
        found[start:] = [part._replace(weight=part.weight * factor) for part in found[start:]]

    for match in A1111.finditer(prompt):
        word, number = match[0], match["number"]
        if word.startswith("\\"):
            found.append(Segment(word[1:]))
        elif word in starts:
            starts[word].append(len(found))
        elif number and starts["("]:
            scale(starts["("].pop(), number_of(number, prompt))
        elif word == ")" and starts["("]:
            scale(starts["("].pop(), FACTOR)
        elif word == "]" and starts["["]:
            scale(starts["["].pop(), 1 / FACTOR)
        else:
            for i, text in enumerate(BREAK.split(word)):
                found += [Segment(None)] * (i > 0) + [Segment(text)]
    for start in starts["("]:
        scale(start, FACTOR)
    for start in starts["["]:
        scale(start, 1 / FACTOR)
    return joined(found)


def number_of(text: str, prompt: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not abs(number) < MOST:
        raise UserError(
            f"the prompt {clipped(prompt)!r} has the weight {clipped(text)!r}",
            wanted=f"a number below {MOST:g}",
            do=r"Write (word:1.3), or \( and \) for parentheses that are text.",
        )
    return number


def joined(found: Sequence[Segment]) -> list[Segment]:
    """Neighbours of one weight as one, for a word may go on from one to the next."""
    out: list[Segment] = []
    for part in found:
        last = out[-1] if out else Segment(None)
        if part.text is None:
            out.append(part)
        elif last.text is not None and last.weight == part.weight:
            out[-1] = last._replace(text=last.text + part.text)
        elif part.text:
            out.append(part)
    return out


def read_comfy(units: Sequence[str], weight: float) -> list[Segment]:
    """ComfyUI's rule: the innermost number counts. units: characters, and \\( and \\)."""
    found = []
    for group in groups(units):
        if len(group) < 2 or (group[0], group[-1]) != ("(", ")"):
            text = "".join(unit[-1] if unit in (r"\(", r"\)") else unit for unit in group)
            found.append(Segment(text, weight))
            continue
        inner, own = group[1:-1], FACTOR * weight
        colon = max((i for i, unit in enumerate(inner) if unit == ":"), default=0)
        number = written_number("".join(inner[colon + 1 :])) if colon else None
        if number is not None:
            inner, own = inner[:colon], number
        found += read_comfy(inner, own)
    return found


def written_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) < MOST else None


def groups(units: Sequence[str]) -> Iterator[list[str]]:
    """Outermost parentheses with what is in them, and what is between them."""
    group: list[str] = []
    depth = 0
    for unit in units:
        if unit == "(" and depth == 0 and group:
            yield group
            group = []
        group.append(unit)
        depth += {"(": 1, ")": -1}.get(unit, 0)
        if unit == ")" and depth == 0:
            yield group
            group = []
    if group:
        yield group


# ---- pieces of 75 tokens ------------------------------------------------------------------------


def rows_a1111(parts: Sequence[Segment]) -> list[list[Token]]:
    """Tokens and their weights by pieces, as A1111 cuts them."""
    rows: list[list[Token]] = [[]]
    for part in parts:
        if part.text is None:
            rows.append([])
            continue
        for token in tokenize(part.text):
            row = rows[-1]
            if len(row) == ROOM:
                commas = [i for i, (one, _) in enumerate(row) if one == COMMA]
                cut = ROOM
                if commas and token != COMMA and ROOM - commas[-1] <= BACK:
                    cut = commas[-1] + 1
                rows[-1] = row[:cut]
                rows.append(row[cut:])
            rows[-1].append((token, part.weight))
    return rows


def rows_comfy(parts: Sequence[Segment]) -> list[list[Token]]:
    """The same as ComfyUI cuts them."""
    rows: list[list[Token]] = [[]]
    for part in parts:
        tokens = [(token, part.weight) for token in tokenize(part.text or "")]
        large = len(tokens) >= WORD
        while tokens:
            room = ROOM - len(rows[-1])
            if room < len(tokens) and not large:
                room = 0
            rows[-1] += tokens[:room]
            tokens = tokens[room:]
            if tokens:
                rows.append([])
    return rows


class Cut(NamedTuple):
    """A prompt in pieces."""

    ids: Tensor  # (chunks, 77)
    rest: str  # for which there was no room
    weights: Tensor  # (chunks, 77)


def cut(prompt: str, pad: int, chunks: int, dialect: Dialect) -> Cut:
    """A prompt as text.pieces_of() cuts it, with the weight of every token."""
    parts = segments(prompt, dialect)
    rows = (rows_comfy if dialect == "comfy" else rows_a1111)(parts)
    rest = spelled([token for row in rows[chunks:] for token, _ in row])
    ids, weights = [], []
    for row in rows[:chunks] + [[]] * (chunks - len(rows)):
        tokens = [BOS, *(token for token, _ in row), EOS]
        ids.append(tokens + [pad] * (CONTEXT - len(tokens)))
        ones = [1.0] * (CONTEXT - 1 - len(row))
        weights.append([1.0, *(weight for _, weight in row), *ones])
    return Cut(torch.tensor(ids), rest, torch.tensor(weights, dtype=torch.float64))


# ---- applying -----------------------------------------------------------------------------------


def applied(z: Tensor, weights: Tensor, dialect: Dialect, empty: Tensor) -> Tensor:
    """States z (n, 77, D) under weights (n, 77); empty (77, D): the states of the empty text."""
    w = weights.to(z)[..., None]
    if dialect == "comfy":
        return torch.where(w == 1, z, empty + (z - empty) * w)
    out = z * w
    return out * (z.mean((1, 2), keepdim=True) / out.mean((1, 2), keepdim=True))


class Weighted(Texts):
    """Text encoders that read weights in their texts."""

    def __init__(self, texts: Texts, dialect: Dialect):
        super().__init__(texts.encoders, texts.zeros, texts.sd3)
        self.dialect = dialect

    def cut(self, text: str, pad: int, chunks: int) -> tuple[Tensor, str]:
        ids, rest, _ = cut(text, pad, chunks, self.dialect)
        return ids, rest

    def states(
        self, net: TextEncoder, texts: Sequence[str], chunks: int, skip: int
    ) -> tuple[Tensor, Tensor | None]:
        """As Texts.states(), weighted. The pooled output knows no weights."""
        cuts = [cut(text, net.cfg.pad, chunks, self.dialect) for text in texts]
        ids = torch.cat([one.ids for one in cuts])
        weights = torch.cat([one.weights for one in cuts])
        z, pooled = self.encode(net, ids, skip)
        empty, _ = self.encode(net, pieces_of("", net.cfg.pad)[0], skip)
        return applied(z, weights, self.dialect, empty[0]), pooled


def weighted(texts: Any, dialect: Dialect) -> Any:
    """Text encoders that read prompts by a dialect; "none" leaves them as they are."""
    if dialect == "none":
        return texts
    if not isinstance(texts, Texts):
        raise UserError(
            f"--prompt-weights {dialect} is for CLIP's text encoders", do="Leave it out."
        )
    return Weighted(texts, dialect)
