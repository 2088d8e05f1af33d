"""A run's folder and log: what a kill leaves behind, what another process may not touch."""

import errno
import json
import math
import os
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from harness.cli import UserError, flag
from harness.files import remove
from harness.ranks import Ranks
from harness import run as run_module
from harness.run import (
    TIME_BINS,
    Log,
    Meter,
    append,
    begun_with,
    check_config,
    check_disk,
    check_mirrors,
    check_places,
    checkpoints,
    find_fine,
    images_seen,
    leftovers,
    lock,
    open_mirror,
    read_config,
    run_name,
)

ALONE = Ranks(0, 1, torch.device("cpu"))
FACTS = {"config": {"lr": 1.0}}


@dataclass(frozen=True)
class Config:
    lr: float = flag(1.0, "peak")
    workers: int = flag(0, "loader processes")


def begin(folder, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def events(run) -> list[tuple[str, int]]:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [(line["event"], line["images"]) for line in lines]


def test_a_log_forgets_what_came_after_the_checkpoint_and_what_a_kill_cut_short(tmp_path):
    log = Log(tmp_path, (), ALONE, 0, FACTS)
    for images in (8, 16, 24):
        log.write({"event": "train", "images": images, "loss": 1.0})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"event": "train", "ima')
    Log(tmp_path, (), ALONE, 16, FACTS)
    assert events(tmp_path) == [("start", 0), ("train", 8), ("train", 16), ("start", 16)]
    start = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert {"command", "device", "ranks", "config", "commit", "dirty", "versions"} <= start.keys()


GOOD = [b'{"event": "start", "images": 0}', b'{"event": "train", "images": 8, "loss": 1.0}']
# name: (a log, how many lines of it are no entries)
LOGS = {
    "a word": (b"\n".join([GOOD[0], b"mine", GOOD[1], b""]), 1),
    "binary": (b"\n".join([GOOD[0], bytes(range(128, 256)), GOOD[1], b""]), 1),
    "nested": (b"\n".join([GOOD[0], b"[" * 100_000, b'{"a":' * 100_000, GOOD[1], b""]), 2),
    "half zeros": (b"\n".join([*GOOD, b"\0" * 4096]), 1),
    "zeros in a line": (b"\n".join([*GOOD, b'{"event": "tr\0\0\0\0']), 1),
    "lists and texts": (b"\n".join([b"[1]", GOOD[0], b'"x"', b"null", GOOD[1], b""]), 3),
    "no number of images": (
        b"\n".join([*GOOD, b'{"images": "8"}', b'{"images": NaN}', b'{"images": true}', b""]),
        3,
    ),
    "cut short by a kill": (b"\n".join([*GOOD, b'{"event": "tr']), 0),
    "without its last newline": (b"\n".join(GOOD), 0),
    "empty lines": (b"\n\n".join([*GOOD, b""]), 0),
}


@pytest.mark.parametrize("name", LOGS)
def test_of_a_damaged_log_the_entries_stay_and_the_rest_is_set_aside(tmp_path, capsys, name):
    text, damaged = LOGS[name]
    path, aside = tmp_path / "log.jsonl", tmp_path / "log.damaged"
    path.write_bytes(text)
    for _ in range(2):
        Log(tmp_path, (), ALONE, 8, FACTS)
    lines = path.read_bytes().splitlines()
    assert lines[:2] == GOOD and [json.loads(line)["event"] for line in lines[2:]] == ["start"] * 2
    said = capsys.readouterr().err
    if not damaged:
        assert said == "" and not aside.exists()
        return
    assert said.startswith(f"warning: {damaged} lines of {path}") and said.count("\n") == 1
    kept = aside.read_bytes().splitlines()
    assert len(kept) == damaged and all(line in text for line in kept)
    path.write_bytes(path.read_bytes() + b"more\n")
    Log(tmp_path, (), ALONE, 8, FACTS)
    assert aside.read_bytes().splitlines() == [*kept, b"more"]  # nothing is lost


def test_only_the_first_rank_writes(tmp_path):
    log = Log(tmp_path, (), Ranks(1, 1, torch.device("cpu")), 0, FACTS)
    log.write({"event": "train", "images": 8})
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_under_its_config_alone(tmp_path):
    run = begin(tmp_path / "run", lr=1.0, workers=3)
    check_config(Config(), run, {"workers"})
    with pytest.raises(UserError, match="was made with another config: lr 1.0 -> 2.0"):
        check_config(Config(lr=2.0), run, {"workers"})
    with pytest.raises(UserError, match="workers 3 -> 0"):
        check_config(Config(), run, set())
    with pytest.raises(UserError, match="--no-resume was given"):
        check_config(Config(), run, {"workers"}, resume=False)
    # A flag that is younger than the run had its default.
    check_config(Config(), begin(tmp_path / "older", lr=1.0), set())
    assert begun_with(run, "lr", 5.0) == 1.0 and begun_with(run, "new", 5.0) == 5.0
    assert begun_with(tmp_path / "none", "lr", 5.0) is None
    (run / "config.json").write_text("[]")
    with pytest.raises(UserError, match="config.json is damaged"):
        read_config(run)


def test_half_a_checkpoint_is_none(tmp_path):
    for name in ("000000000016", "000000000008", "000000000024.tmp", "000000000004.old", "x"):
        (tmp_path / "ckpt" / name).mkdir(parents=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["000000000008", "000000000016"]
    assert images_seen(tmp_path) == 16 and images_seen(tmp_path / "none") == -1


def test_a_folder_has_one_writer(tmp_path):
    held = lock(tmp_path)
    with pytest.raises(UserError, match="another process is writing to"):
        lock(tmp_path)
    held.close()
    lock(tmp_path)


def test_a_pipe_in_place_of_a_lock_is_refused_at_once(tmp_path):
    """Opening it would wait for somebody who reads."""
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UserError, match=r"\.lock is .*, wanted a file"):
        lock(tmp_path)


@pytest.mark.parametrize("code", ["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def test_a_file_system_without_locks_is_said_and_the_run_goes_on(
    tmp_path, monkeypatch, capsys, code
):
    def none(handle, how):
        raise OSError(getattr(errno, code), "No locks available")

    monkeypatch.setattr(run_module.fcntl, "flock", none)
    (tmp_path / "ckpt/000000000008.tmp").mkdir(parents=True)
    lock(tmp_path).close()
    said = capsys.readouterr().err
    assert "is on a file system without locks (No locks available)" in said
    assert said.startswith("warning: ") and said.count("\n") == 1
    assert not leftovers(tmp_path)


def test_another_error_of_a_lock_is_not_taken_for_another_process(tmp_path, monkeypatch):
    def broken(handle, how):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(run_module.fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output error") as error:
        lock(tmp_path)
    assert error.value.filename == str(tmp_path / ".lock")


def a_file(path):
    path.write_text("mine")


def a_folder(path):
    path.mkdir()
    (path / "mine").write_text("mine")


def a_link(path):
    """To a user's folder."""
    a_folder(path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def a_link_to_nothing(path):
    path.symlink_to("nowhere")


def a_pipe(path):
    os.mkfifo(path)


KINDS = (a_file, a_folder, a_link, a_link_to_nothing, a_pipe)
# place: which of them may stand there
FOLDERS = dict.fromkeys(("", "ckpt", "samples", "ckpt/000000000008"), (a_folder, a_link))
FILES = dict.fromkeys(("config.json", "log.jsonl", "vae.safetensors", ".lock"), (a_file,))
FILES |= dict.fromkeys(("samples/final.png", "samples/000000000008.png"), (a_file,))
FILES["samples/mine.png"] = KINDS
OURS = (
    *("ckpt/000000000008.tmp", "ckpt/.000000000008.17.tmp", ".log.jsonl.17.tmp"),
    "samples/.x.9.tmp",
)
# A checkpoint that its user moved out of the way is called .old, too.
THEIRS = (
    "ckpt/latest",
    "ckpt/000000000008.old",
    "ckpt/8.tmp",
    ".mine.tmp",
    "notes.tmp",
    "ckpt/000000000008.tmp2",
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_stands_in_a_place_of_a_run_is_used_swept_or_refused_by_one_rule(tmp_path, kind):
    """A place takes a file or a folder, or a link to one; under a temporary name of ours anything
    goes, and of a link only the link; anything else stays as it is."""
    for place, fit in {**FOLDERS, **FILES}.items():
        run = tmp_path / "places" / (place.replace("/", "-") or "run")
        (run / place).parent.mkdir(parents=True)
        kind(run / place)
        if kind in fit:
            check_places(run)
            continue
        with pytest.raises(UserError, match=f"^{run / place} is .*, wanted .*Move it away"):
            check_places(run)
        assert os.path.lexists(run / place)
    for name in (*OURS, *THEIRS):
        run = tmp_path / "sweeps" / name.replace("/", "-")
        (run / name).parent.mkdir(parents=True)
        kind(run / name)
        lock(run).close()
        assert os.path.lexists(run / name) == (name in THEIRS), name
        if kind is a_link:
            assert (run / name).with_name("elsewhere").joinpath("mine").read_text() == "mine"


def test_an_old_checkpoint_that_is_a_link_is_removed_as_a_link(tmp_path):
    a_folder(tmp_path / "disk2")
    (tmp_path / "link").symlink_to(tmp_path / "disk2")
    remove(tmp_path / "link")
    remove(tmp_path / "link")  # gone already
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "disk2/mine").exists()


def test_the_fine_run_is_the_one_with_these_tags(tmp_path):
    alike = {"data": "toyfaces", "objective": "fm"}
    for name, tags in (("a", ["x"]), ("b", ["y", "x"]), ("c", ["x"])):
        run = begin(tmp_path / name, stage="fine", exclude_tags=tags, **alike)
        if name != "c":
            (run / "ckpt" / "000000000008").mkdir(parents=True)
    assert find_fine(str(tmp_path), ("x", "y"), alike).name == "b"
    assert find_fine(str(tmp_path), ("x",), alike).name == "a"
    with pytest.raises(UserError, match="could start from any of"):
        find_fine(str(tmp_path), (), alike)
    with pytest.raises(UserError, match="train.py --data toyfaces --objective fm --stage fine"):
        find_fine(str(tmp_path / "none"), (), alike)


def test_a_runs_name_is_a_folder_of_its_own():
    assert run_name("", "im/my pictures!", "fm", "fine") == "my-pictures--fm-fine"
    assert run_name("a", "toyfaces:8", "fm") == "a"
    for name in ("../a", "a/b", ".a"):
        with pytest.raises(UserError, match="without slashes"):
            run_name(name, "toyfaces")


def test_views_of_the_log_are_known_before_a_run_begins():
    with pytest.raises(UserError, match="mlflow is not one of tensorboard, wandb"):
        check_mirrors(("mlflow",))


def test_the_meter_keeps_the_loss_by_time_through_a_resume():
    t, loss = torch.tensor([0.0, 0.05, 0.95, 1.0]), torch.tensor([1.0, 3.0, 5.0, 7.0])
    meter, other = Meter(ALONE), Meter(ALONE)
    meter.add(t[:2], loss[:2])
    other.load_state(meter.state())
    other.add(t[2:], loss[2:])
    row = other.read()
    assert row["loss"] == 4.0 and row["loss_by_t"] == [2.0, *[None] * (TIME_BINS - 2), 6.0]
    assert other.read() == {"loss": None, "loss_by_t": [None] * TIME_BINS}
    other.add(t, loss * float("nan"))
    other.drop_nonfinite()
    assert other.read()["loss"] is None


def test_the_log_is_strict_json_whatever_is_measured(tmp_path):
    row = {"event": "held-out", "loss": math.nan, "loss_by_t": [1.5, math.inf, {"x": -math.inf}]}
    append(tmp_path, {**row, "n": 3, "of": "NaN"})
    written = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail)
    assert written["loss"] is None and written["loss_by_t"] == [1.5, None, {"x": None}]
    assert written["of"] == "NaN" and written["n"] == 3


def test_an_error_of_the_log_names_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "strict_json", full)
    with pytest.raises(OSError) as error:
        append(tmp_path, {})
    assert error.value.filename == str(tmp_path / "log.jsonl")


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def disk(monkeypatch, free: int) -> None:
    monkeypatch.setattr(run_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def flags(**more):
    usual = {"keep": 3, "keep_every": 0, "save_every": 5, "images": 100, "ema": (0.05,)}
    return SimpleNamespace(**{**usual, **more})


def test_a_new_run_that_cannot_fit_is_told_what_would(tmp_path, monkeypatch):
    each = 4 * 10**6
    disk(monkeypatch, 16 * 10**6)
    check_disk(tmp_path / "r", each, flags())
    disk(monkeypatch, 9 * 10**6)
    with pytest.raises(UserError) as error:
        check_disk(tmp_path / "r", each, flags())
    assert "Make 0.01 GB free, or give --keep 1, or drop --ema" in str(error.value)
    check_disk(tmp_path / "r", each, flags(keep=1))
    disk(monkeypatch, 5 * 10**6)
    with pytest.raises(UserError) as error:
        check_disk(tmp_path / "r", 3 * 10**6, flags(ema=()))
    assert "--keep" not in str(error.value) and "--ema" not in str(error.value)
    disk(monkeypatch, 9 * 10**6)
    with pytest.raises(UserError, match="or leave --keep-every out"):
        check_disk(tmp_path / "r", each, flags(keep=1, keep_every=10))
    # No more are kept than are saved: none of them is a milestone of this one's own.
    check_disk(tmp_path / "r", each, flags(keep=1, keep_every=1, save_every=101))


def test_what_another_rank_is_writing_meanwhile_is_no_obstacle(tmp_path, monkeypatch):
    """Rank 0 may already write while rank 1 still looks for room: a half file is gone by then."""
    gone = tmp_path / f".vae.safetensors.{os.getpid()}.tmp"
    monkeypatch.setattr(run_module, "leftovers", lambda run: [gone])
    check_disk(tmp_path, 32, flags())


def test_a_run_that_has_begun_is_told_only_what_it_can_still_change(tmp_path, monkeypatch):
    each = 4 * 10**6
    run = begin(tmp_path / "r")
    for images in (100, 200):
        (run / f"ckpt/{images:012d}").mkdir(parents=True)
    disk(monkeypatch, 3 * 10**6)
    with pytest.raises(UserError) as error:
        check_disk(run, each, flags(keep=1))
    assert "1 checkpoints of 0.00 GB need" in str(error.value)  # the old ones go when it is whole
    assert str(error.value).endswith("Make 0.00 GB free.")


def test_what_a_full_disk_left_behind_counts_as_free_and_is_swept_by_who_holds_the_run(
    tmp_path, monkeypatch
):
    each = 4 * 10**6
    run = begin(tmp_path / "r")
    half = run / "ckpt/000000000300.tmp"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"x" * 3_000_000)
    disk(monkeypatch, 5_100_000)
    check_disk(run, each, flags(keep=1))
    with pytest.raises(UserError, match="GB are free"):
        check_disk(tmp_path / "s", each, flags(keep=1))
    handle = lock(run)
    assert not half.exists()
    half.mkdir()
    with pytest.raises(UserError, match="another process"):
        lock(run)
    assert half.exists()  # it may be the other's, who is writing
    handle.close()


def test_two_folders_of_one_name_are_two_runs_of_wandb_and_a_moved_one_is_the_same(
    tmp_path, monkeypatch
):
    ids = []
    wandb = SimpleNamespace(init=lambda **how: ids.append(how["id"]), log=lambda *a, **k: None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for out in ("a", "b"):
        (tmp_path / out / "r#1").mkdir(parents=True)
        open_mirror("wandb", tmp_path / out / "r#1", {}, 0)
    (tmp_path / "a/r#1").rename(tmp_path / "a/moved")
    open_mirror("wandb", tmp_path / "a/moved", {}, 64)
    assert ids[0] == ids[2] != ids[1] and not set("/\\#?%:") & set("".join(ids))
    (tmp_path / "old").mkdir()
    open_mirror("wandb", tmp_path / "old", {}, 64)
    assert ids[3] == "old"  # begun when the name was the id
