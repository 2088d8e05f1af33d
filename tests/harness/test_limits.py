"""No size, place or device that cannot be gets past the command line, in any command."""

import dataclasses
import importlib
import resource
import sys
import time
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ckpt.__main__ import main as ckpt_main
from harness import memory
from harness.cli import UserError, check_range, cli, dashed
from harness.memory import check_memory

# What a command needs before its flags: its subcommand, its names, the flags that are required.
COMMANDS = {
    "train": [],
    "samplers": ["--ckpt", "none"],
    "distill": ["--teacher", "none"],
    "distill pretrain-assessor": ["--teacher", "none"],
    "eval_fid": ["--ckpt", "none"],
    "experiments.ablate": ["--teacher", "none"],
    "experiments.architecture": [],
    "experiments.protocol": ["--runs", "none"],
    "experiments.stages": [],
    "experiments.boost": [],
    "experiments.compare": [],
    "experiments.finetune": [],
    "experiments.end_to_end": [],
    "experiments.prompts": [],
    "experiments.uncertainty": ["--ckpt", "none"],
    "ckpt.__main__": ["inspect", "none"],
    "data.__main__": [],
    "data.emoji": ["--out", "none"],
    "data.encode": ["--out", "none"],
    "harness.plot": ["none"],
    "text encode": ["--text", "none", "--out", "none.safetensors"],
    "metrics.inception": [],
    "metrics.clip_score": ["--images", "none", "--clip", "none"],
    "benchmarks.solvers": [],
    "benchmarks.kernels": [],
    "benchmarks.tiles": [],
    "benchmarks.bf16": [],
    "benchmarks.boosting_sd": [],
    "benchmarks.startup": [],
    "benchmarks.convert": [],
    "benchmarks.digests": [],
    "benchmarks.isa": [],
    "benchmarks.host": [],
    "benchmarks.boosting": [],
    "benchmarks.peer_schedulers": ["--ckpt", "none"],
    "benchmarks.rounding": ["--out", "none"],
    "benchmarks.sdxl_step": [],
    "benchmarks.text": [],
    "benchmarks.uncertainty": [],
}
# What is no number, no whole one, or none that any of these flags takes.
IMPOSSIBLE = ("1e30", "-1", "nan", "inf", "-inf", "9" * 50, "9" * 5000, "1.5e", "²", "")


def configs(command: str) -> list[type]:
    """The dataclasses whose fields are a command's flags."""
    module = importlib.import_module(command.split()[0])
    if command.endswith("pretrain-assessor"):
        return [module.Pretrain]
    names = [name for name in ("Config", "Options", "Encode") if hasattr(module, name)]
    found = [getattr(module, name) for name in names]
    return [*found, module.distill.Config] if command.endswith("ablate") else found


def numeric(cls: type) -> Iterator[tuple[dataclasses.Field, type]]:
    """The flags that take numbers, also as a list or beside words."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        union = typing.get_origin(kind) in (tuple, types.UnionType, typing.Union)
        inner = typing.get_args(kind)[0] if union else kind
        if inner in (int, float):
            yield field, inner


NUMBERS = [
    (command, field, kind)
    for command in COMMANDS
    for cls in configs(command)
    for field, kind in numeric(cls)
]
PLACES = [
    (command, field)
    for command in COMMANDS
    for cls in configs(command)
    for field in dataclasses.fields(cls)
    if field.name in ("out", "npz", "save_stats", "cache") and "help" in field.metadata
]


def name_of(case: tuple) -> str:
    return f"{case[0]} {dashed(case[1].name)}"


def refused(monkeypatch, capsys, command: str, *words: str) -> str:
    """The one line with which a command refuses words: exit code 2, at once."""
    name, *more = command.split()
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, *more, *COMMANDS[command], *words])
    start = time.process_time()
    with pytest.raises(SystemExit) as stop:
        cli(module.main)
    seconds = time.process_time() - start
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and seconds < 2, (words, lines, seconds)
    assert len(lines[0]) < 500, lines
    return lines[0]


def test_every_command_is_here():
    """A module that reads a command line is a command."""
    root = Path(__file__).parents[2]
    found = set()
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0].startswith((".", "tests", "runs", "venv")) or parts == ("harness", "cli"):
            continue
        text = path.read_text()
        ways = (" = parse(", " = read_flags(", "parse_like(Config", "    command(Config")
        reads = any(way in text for way in ways)
        if reads and '__name__ == "__main__"' in text:
            found.add(".".join(parts))
    assert found == {command.split()[0] for command in COMMANDS}


@pytest.mark.parametrize("case", NUMBERS, ids=name_of)
def test_a_number_has_a_lowest_and_a_highest_value(case):
    _, field, kind = case
    low = field.metadata["above"] if field.metadata["low"] is None else field.metadata["low"]
    high = field.metadata["high"]
    assert low is not None and high is not None and -1e12 <= low < high < 2**63
    default = field.default
    if default is not dataclasses.MISSING and default is not None:
        check_range(field, default)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_size_that_cannot_be_ends_in_one_line_before_anything_is_made(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for at, field, _ in NUMBERS:
        if at != command:
            continue
        low = field.metadata["low"]
        for text in IMPOSSIBLE:
            if text == "-1" and low is not None and low <= -1:
                continue
            if not text and "tuple" in str(field.type):
                continue
            line = refused(monkeypatch, capsys, command, f"{dashed(field.name)}={text}")
            assert dashed(field.name) in line and "error: --" in line, line
    assert not list(tmp_path.iterdir())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize("case", PLACES, ids=name_of)
def test_a_place_that_cannot_be_written_ends_in_one_line(case, tmp_path, monkeypatch, capsys):
    command, field = case
    kind = field.metadata["writes"]
    ending = kind if kind.startswith(".") else ".json"
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path(f"folder{ending}").mkdir()
    bad = {
        f"file/x{ending}": "Not a directory",
        f"{'x' * 250}{ending}": "names of 240 bytes at most",
        f"{'ä' * 130}{ending}": "names of 240 bytes at most",
        f"new/{'x' * 300}/y{ending}": "names of 240 bytes at most",
        "x/" * 3000 + f"y{ending}": "too long",
        f"caf\udce9{ending}": "wanted UTF-8 text",
        f"a\0b{ending}": "wanted UTF-8 text",
    }
    if kind == "folder":
        bad |= {"file": "wanted a folder", "/dev/full": "wanted a folder"}
    else:
        bad |= {
            ".": "is a folder",
            "..": "is a folder",
            "/": "is a folder",
            f"new{ending}/": "is a folder",
            f"folder{ending}": "is a folder",
            "/dev/full": "no regular file",
        }
    if kind.startswith("."):
        bad |= {
            "plain": f"a file that ends in {kind}",
            "x.jpg": f"a file that ends in {kind}",
            f"{kind}": f"a file that ends in {kind}",
            "a.": f"a file that ends in {kind}",
        }
    if field.default != "":
        bad[""] = "wanted a f" if kind == "folder" else "is a folder"
    before = sorted(tmp_path.rglob("*"))
    for name, message in bad.items():
        words = [word for word in COMMANDS[command] if word != "--out"]
        if len(words) < len(COMMANDS[command]):  # it is the flag in question
            words = words[:-1]
        monkeypatch.setitem(COMMANDS, command, words)
        line = refused(monkeypatch, capsys, command, f"{dashed(field.name)}={name}")
        assert message in line, (name, line)
    assert sorted(tmp_path.rglob("*")) == before and Path("file").read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch):
    from harness.cli import check_place

    monkeypatch.setattr("harness.cli.os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match="cannot write to"):
        check_place("--out", str(tmp_path / "new" / "card.json"), "file")
    check_place("--out", str(tmp_path / "new"), "folder")  # which says so when it is made
    (tmp_path / "sub").mkdir()
    check_place("--out", str(tmp_path / "sub" / "card.json"), "file")
    check_place("--out", str(tmp_path / "sub" / "CARD.PNG"), ".png")


def test_words_that_are_no_text_are_refused_wherever_they_stand(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ckpt", "inspect", "caf\udce9.safetensors"])
    with pytest.raises(SystemExit) as stop:
        cli(ckpt_main)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line == (
        "error: 'caf\\udce9.safetensors': wanted UTF-8 text.  Rename that file or folder.\n"
    )


def test_a_list_of_numbers_has_an_end(monkeypatch, capsys):
    many = ",".join(["0.05"] * 1001)
    line = refused(monkeypatch, capsys, "train", "--ema", many)
    assert "--ema: got 1,001 numbers, wanted 1,000 at most" in line


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, words, message",
    [
        ("data.__main__", "--data robohash:64 --resolution 8192", ""),
        ("data.__main__", "--data toyfaces:10000000 --resolution 256", "needs about 1,966 GB"),
        ("data.__main__", "--data toyfaces:10000001", "1 to 10,000,000 pictures"),
        ("data.__main__", "--data toyfaces:0", "1 to 10,000,000 pictures"),
        ("data.__main__", f"--data toyfaces:{'9' * 5000}", "File name too long"),
        ("data.__main__", f"--data toyfaces:{'9' * 200}", "1 to 10,000,000 pictures"),
        ("data.__main__", "--data robohash:99999999", "1 to 10,000,000 pictures"),
        ("train", "--data toyfaces:8 --batch 1000000 --model nano --vae pixel:8", "needs about"),
    ],
)
def test_what_cannot_be_held_is_refused_before_it_is_made(
    command, words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "capacity", lambda device: 24 * 10**9)
    assert message in refused(monkeypatch, capsys, command, *words.split())


def test_a_batch_of_an_encoding_is_at_most_its_source(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = "--data toyfaces:8 --batch 65536 --vae pixel:8 --resolution 64".split()
    # Pixels, and latents four times: 4 · (3 · 64² + 4 · 192 · 8²) bytes each.
    monkeypatch.setattr(memory, "capacity", lambda device: 8 * 245_760 // memory.FAR - 1)
    assert "--batch 8 at --resolution 64 needs" in refused(
        monkeypatch, capsys, "data.encode", *words
    )
    monkeypatch.setattr(memory, "capacity", lambda device: 8 * 245_760 // memory.FAR)
    monkeypatch.setattr(sys, "argv", ["encode", "--out", "cache", *words])
    importlib.import_module("data.encode").main()


def test_only_what_is_far_beyond_the_machine_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "capacity", lambda device: 24 * 10**9)
    check_memory("--n 5", 96 * 10**9)
    with pytest.raises(UserError) as caught:
        check_memory("--n 5", 97 * 10**9)
    message = "--n 5 needs about 97 GB, this machine has 24 GB.  Lower one of them."
    assert str(caught.value) == message


def test_the_machine_is_measured():
    pages = Path("/proc/meminfo")
    if not pages.exists():
        pytest.skip("no /proc/meminfo to compare with")
    total = 1024 * int(pages.read_text().split()[1])
    assert memory.capacity(torch.device("cpu")) == pytest.approx(total, rel=0.01)
