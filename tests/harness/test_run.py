"""A run's folder and log: what a kill leaves behind, what another process may not touch."""

import json
from dataclasses import dataclass

import pytest
import torch

from harness.cli import UserError, flag
from harness.ranks import Ranks
from harness.run import (
    TIME_BINS,
    Log,
    Meter,
    begun_with,
    check_config,
    check_mirrors,
    checkpoints,
    find_fine,
    images_seen,
    lock,
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


def test_a_line_that_is_no_entry_is_not_thrown_away(tmp_path):
    (tmp_path / "log.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="has a line that is not a log entry: 'mine'"):
        Log(tmp_path, (), ALONE, 0, FACTS)
    assert (tmp_path / "log.jsonl").read_text() == "mine\n"


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
    with pytest.raises(UserError, match="is not the config of a run"):
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
