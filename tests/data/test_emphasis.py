"""Prompt weights: how two programs read them, where they cut, and numbers of a formula."""

import pytest
import torch

from data.emphasis import COMMA, WORD, cut, number_of, segments, weighted, written_number
from harness.cli import UserError
from text import BOS, EOS, ROOM, Texts, tokenize
from texts import L, filled

CAT = 5  # the place of "cat" in "a photo of a cat"


def read(prompt, dialect):
    return [(part.text, pytest.approx(part.weight)) for part in segments(prompt, dialect)]


@pytest.mark.parametrize(
    "prompt, a1111, comfy",
    [
        ("a cat", [("a cat", 1)], [("a cat", 1)]),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)], ...),
        ("a (red:1.3) cat", [("a ", 1), ("red", 1.3), (" cat", 1)], ...),
        ("((red))", [("red", 1.21)], ...),
        ("((red:1.5))", [("red", 1.65)], [("red", 1.5)]),
        ("(a (red:2) cat:0.5)", [("a ", 0.5), ("red", 1), (" cat", 0.5)],
         [("a ", 0.5), ("red", 2), (" cat", 0.5)]),
        ("[red] cat", [("red", 1 / 1.1), (" cat", 1)], [("[red] cat", 1)]),
        (r"albedo \(overlord\)", [("albedo (overlord)", 1)], ...),
        ("a (red cat", [("a ", 1), ("red cat", 1.1)], [("a ", 1), ("(red cat", 1)]),
        ("a red) cat", [("a red) cat", 1)], ...),
        ("(a: b)", [("a: b", 1.1)], ...),
        ("a:1.3)", [("a:1.3)", 1)], ...),
        ("(red:-0.5)", [("red", -0.5)], ...),
        ("a BREAK b", [("a", 1), (None, 1), ("b", 1)], [("a BREAK b", 1)]),
        ("", [], []),
    ],
)  # fmt: skip
def test_a_prompt_has_the_parts_that_each_program_reads(prompt, a1111, comfy):
    assert read(prompt, "a1111") == a1111
    assert read(prompt, "comfy") == (a1111 if comfy is ... else comfy)
    assert read(prompt, "none") == ([(prompt, 1)] if prompt else [])


def goldens(dialect, prompt, **how):
    texts = Texts([filled(L)])
    return weighted(texts, dialect).tell([prompt], **how).context[0]


def test_states_under_weights_are_the_numbers_of_a_formula():
    """fp64, of weights made by a formula (tests/texts.py); without the mean drawn back, "cat" would
    begin with -0.2756200, and "a" with 0.6845376."""
    a1111 = goldens("a1111", "a photo of a (cat:1.3)")
    assert float(a1111[CAT, 0]) == pytest.approx(-0.2755992, abs=5e-8)
    assert float(a1111[1, 0]) == pytest.approx(0.6844860, abs=5e-8)
    comfy = goldens("comfy", "a photo of a (cat:1.3)")
    assert comfy[CAT, :3].tolist() == pytest.approx((-0.3742713, 1.8295774, 0.1126287), abs=5e-8)
    assert float(comfy[1, 0]) == pytest.approx(0.6845376, abs=5e-8)


@pytest.mark.parametrize("dialect", ["a1111", "comfy"])
def test_a_prompt_without_weights_is_the_plain_one_to_the_bit(dialect):
    plain = goldens("none", "a photo of a cat", chunks=2)
    assert torch.equal(goldens(dialect, "a photo of a cat", chunks=2), plain)
    # One of 1 is none, but that words end at parentheses.
    assert torch.equal(goldens(dialect, "a photo (of:1) a cat", chunks=2), plain)
    assert not torch.equal(goldens(dialect, "a photo of (a:0.9) cat", chunks=2), plain)


def test_each_prompt_of_a_batch_is_weighted_alone():
    texts = weighted(Texts([filled(L)]), "a1111")
    prompts = ["a (red:1.4) cat", "a [blue] dog BREAK (on:2) grass", ""]
    together = texts.tell(prompts, chunks=2).context
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(
            together[row], texts.tell([prompt], chunks=2).context[0], rtol=0, atol=1e-12
        )


def pieces(prompt, dialect, chunks=4):
    """The tokens of each piece."""
    found = cut(prompt, 0, chunks, dialect)
    ends = (found.ids == EOS).int().argmax(1)
    assert found.ids[:, 0].tolist() == [BOS] * chunks
    return [row[1:end].tolist() for row, end in zip(found.ids, ends)], found.rest


def test_a1111_begins_a_new_piece_behind_the_last_comma_and_at_break():
    words = "cat " * 60 + ", " + "dog " * 20
    ids = tokenize(words)
    assert ids[60] == COMMA
    rows, _ = pieces(words, "a1111")
    assert rows == [ids[:61], ids[61:], [], []]
    rows, _ = pieces("cat, " + "dog " * 80, "a1111")  # that comma is too far back
    assert [len(row) for row in rows] == [ROOM, 7, 0, 0]
    rows, _ = pieces("a cat BREAK a dog", "a1111")
    assert rows == [tokenize("a cat"), tokenize("a dog"), [], []]
    rows, _ = pieces("a cat BREAK BREAK a dog", "a1111")
    assert rows == [tokenize("a cat"), [], tokenize("a dog"), []]


def test_comfyui_cuts_only_parts_of_eight_tokens_or_more_in_two():
    start, short = "cat " * 70, "(" + "dog " * (WORD - 1) + ":1.2)"
    rows, _ = pieces(start + short, "comfy")
    assert [len(row) for row in rows] == [70, WORD - 1, 0, 0]
    rows, _ = pieces(start + short.replace("(", "(dog "), "comfy")
    assert [len(row) for row in rows] == [ROOM, 3, 0, 0]


@pytest.mark.parametrize("dialect", ["a1111", "comfy"])
def test_every_token_has_the_weight_of_its_part(dialect):
    found = cut("a photo of a (red cat:1.3) " + "dog " * 75 + "(fox:0.5)", EOS, 2, dialect)
    flat = dict(zip(found.ids.flatten().tolist(), found.weights.flatten().tolist()))
    (red,), (cat,), (fox,) = tokenize("red"), tokenize("cat"), tokenize("fox")
    assert (flat[red], flat[cat], flat[fox]) == (1.3, 1.3, 0.5)
    others = ~torch.isin(found.ids, torch.tensor([red, cat, fox]))
    assert found.weights[others].unique().tolist() == [1.0]


def test_what_is_cut_off_is_said_without_its_signs(capsys):
    texts = weighted(Texts([filled(L)]), "a1111")
    texts.tell(["cat " * 80 + "(red:1.3) fox"])
    assert "Cut off, of the first: 'cat cat cat cat cat red fox'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "prompt, dialect, message",
    [
        ("a (cat:1.2.3)", "a1111", "has the weight '1.2.3': wanted a number below 1000"),
        ("(" * 101 + "cat", "a1111", "has 101 parentheses in each other"),
        ("(" * 101 + "cat", "comfy", "has 101 parentheses in each other"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_one_line(prompt, dialect, message):
    with pytest.raises(UserError) as error:
        segments(prompt, dialect)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("number", ["9" * 400, "1e39", "1000", "-1e3", "nan"])
def test_a_weight_has_a_highest_value(number):
    with pytest.raises(UserError, match="a number below 1000"):
        number_of(number, "x")
    assert written_number(number) is None
