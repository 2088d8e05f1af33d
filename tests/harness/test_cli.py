"""A flag is declared once: its type, default, range and what it is of come out of one line."""

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from conftest import ROOT
from harness.cli import UserError, check_flags, closest, flag, flag_like, parse


@dataclass(frozen=True)
class Base:
    lr: float = flag(1e-3, "peak", low=0, high=1e3)


@dataclass(frozen=True)
class Config(Base):
    """A few of every kind."""

    weight: Literal["uniform", "min_snr", "soft_min_snr"] = flag("uniform", "per sample")
    gamma: float = flag(5.0, "caps it", above=0, of="--weight min_snr | soft_min_snr")
    init: str = flag("", "weights to start from", head="start")
    keep_head: bool = flag(False, "of them", of=("--init", "not --fresh"))
    fresh: bool = flag(False, "a new head")
    widths: tuple[float, ...] = flag((), "comma separated", low=0.01, high=0.25)
    shift: float | Literal["auto"] = flag(1.0, "of times", low=1e-3)
    seed: int | None = flag(None, "of all", low=0)


def read(*words: str) -> Config:
    return parse(Config, "What it does.\n\nMore.", list(words))[0]


def test_words_become_the_declared_types():
    cfg = read(
        "--lr", "1e-2", "--weight=min_snr", "--widths", "0.05,0.1", "--fresh", "--shift=auto"
    )
    assert (cfg.lr, cfg.weight, cfg.widths, cfg.fresh) == (0.01, "min_snr", (0.05, 0.1), True)
    assert (cfg.shift, cfg.seed, read("--no-fresh").fresh) == ("auto", None, False)
    assert read("--seed", "2e3").seed == 2000 and parse(Config, "", ["--dry-run"])[1]


@pytest.mark.parametrize(
    "words, message",
    [
        ("--lr -1", "--lr -1.0: wanted 0 to 1000.  See --help."),
        ("--lr nan", "--lr nan: wanted 0 to 1000"),
        ("--lr fast", "--lr takes float, got 'fast'"),
        ("--shift 0", "--shift 0.0: wanted at least 0.001"),
        ("--widths 0.05,0.5", "--widths 0.05,0.5: wanted 0.01 to 0.25"),
        ("--weight min_snr --gamma 0", "--gamma 0.0: wanted more than 0"),
        ("--gamma 4", "--gamma changes nothing here: it is of --weight min_snr | soft_min_snr."),
        ("--keep-head", "--keep-head changes nothing here: it is of --init.  Leave it out."),
        ("--keep-head --init x --fresh", "--keep-head changes nothing with --fresh"),
        ("--wieght min_snr", "unknown flag --wieght.  Closest: weight"),
        ("--weight min", "--weight 'min' is not one of uniform, min_snr, soft_min_snr.  Closest: "),
        ("--lr", "--lr needs a value"),
        ("fast", "unexpected argument 'fast': every option is written --name value"),
        ("--seed 1e999", "--seed takes int"),
        (f"--seed -1{'0' * 400}", "--seed -1000"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_that_says_what_to_do(words, message):
    with pytest.raises(UserError) as caught:
        read(*words.split())
    line = str(caught.value)
    assert line.startswith(message) and "\n" not in line and line.endswith((".", "help."))


def test_an_error_lists_what_may_be_chosen_once():
    with pytest.raises(UserError) as caught:
        read("--weight", "p2")
    assert str(caught.value) == (
        "--weight 'p2' is not one of uniform, min_snr, soft_min_snr.  Choose one of them."
    )


def test_a_number_may_be_larger_than_any_float():
    assert read("--seed", "1" + "0" * 400).seed == 10**400


def test_flags_that_belong_together_pass():
    assert read("--gamma", "4", "--weight", "soft_min_snr").gamma == 4
    assert read("--keep-head", "--init", "x").keep_head
    check_flags(read())


def test_help_shows_each_flag_with_default_choices_and_text(capsys):
    with pytest.raises(SystemExit) as stop:
        read("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith("What it does.\n") and "More." not in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "uniform | min_snr | soft_min_snr: per sample" in lines["--weight"]
    assert lines["--lr"].split()[1:] == ["0.001", "peak"] and "start:" in lines
    assert len(lines) == 2 + len(Config.__dataclass_fields__) + 1


def test_a_flag_declared_like_another_keeps_its_range_and_help():
    @dataclass(frozen=True)
    class Other(Base):
        lr: float = flag_like(Base, "lr", 1e-4)

    assert Other().lr == 1e-4
    with pytest.raises(UserError, match="--lr 2000.0: wanted 0 to 1000"):
        parse(Other, "", ["--lr", "2000"])


def test_an_error_is_what_got_wanted_do():
    error = UserError("--batch", got="250", wanted="a multiple of 32", do="Try --batch 256.")
    assert str(error) == "--batch: got 250, wanted a multiple of 32.  Try --batch 256."
    assert str(UserError("it is gone")) == "it is gone."
    assert closest("heum", ["heun", "euler"]) == "  Closest: heun."
    assert closest("zzzz", ["heun", "euler"]) == ""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_letter_that_cannot_be_printed_is_escaped(encoding):
    """A lone surrogate out of a file's JSON, and any letter on a terminal of few letters."""
    script = "from harness.cli import cli; cli(lambda: print('tag \\ud800 λ'))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    shown = "λ" if encoding == "utf-8" else "\\u03bb"
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == f"tag \\ud800 {shown}\n"
