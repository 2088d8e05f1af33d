"""python -m harness.plot: what is in the picture, where it goes, and what cannot be drawn."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from harness import plot

START = {"event": "start", "images": 0, "config": {"objective": "fm"}}


def train_row(images, loss, lr=1e-3):
    bins = [loss, None, loss]
    return {"event": "train", "images": images, "loss": loss, "loss_by_t": bins, "lr": lr}


def held_row(images, loss):
    bins = [loss / 2, loss, 2 * loss, None]
    row = {"event": "held-out", "images": images, "of": "ema-0.050", "n": 8}
    return {**row, "loss": loss, "loss_by_t": bins}


def fid_row(images, fid):
    return {"event": "fid", "images": images, "of": "ema-0.050", "FD-pca2048": fid, "floor": 3.0}


def write_log(folder, rows, end=""):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return path


def full_run(folder, n=4, scale=1.0, objective="fm"):
    rows = [{**START, "config": {"objective": objective}}]
    for i in range(1, n + 1):
        rows.append(train_row(100 * i, scale / i, 1e-3 / i))
    rows += [held_row(100 * i, scale / i) for i in range(2, n + 1, 2)]
    rows += [fid_row(100 * i, 50.0 / i) for i in range(2, n + 1, 2)]
    write_log(folder, rows)
    return folder


def axes_of(*folders):
    """The panels that are seen, by their title."""
    figure = plot.draw_figure(plot.read_runs([str(folder) for folder in folders]))
    return {ax.get_title(): ax for ax in figure.axes if ax.get_visible()}, figure


def points(line):
    return np.array(line.get_xdata()).tolist(), np.array(line.get_ydata()).tolist()


# ---- what is drawn ------------------------------------------------------------------------------


def test_a_run_becomes_a_picture_in_its_own_folder(tmp_path, user):
    run = full_run(tmp_path / "run")
    code, out, err = user(plot.main, run)
    assert (code, err) == (0, []) and out.splitlines()[-1] == str(run / "samples" / "plot.png")
    with Image.open(run / "samples" / "plot.png") as image:
        assert image.format == "PNG" and image.width > 1000 and len(image.getcolors(10**6)) > 50
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["plot.png"]


def test_every_panel_shows_what_the_log_says(tmp_path):
    axes, figure = axes_of(full_run(tmp_path / "run"))
    by_t, fid, rate = "Held-out loss by t", "FD-pca2048 to the training images", "Learning rate"
    assert list(axes) == ["Loss", by_t, fid, rate]
    train, held = axes["Loss"].lines[:2]
    assert points(train) == ([100, 200, 300, 400], [1.0, 1 / 2, 1 / 3, 1 / 4])
    assert points(held) == ([200, 400], [1 / 2, 1 / 4])
    assert points(axes[by_t].lines[-1]) == ([0.125, 0.375, 0.625], [1 / 8, 1 / 4, 1 / 2])
    assert points(axes[fid].lines[0]) == ([200, 400], [25.0, 12.5])
    assert axes[fid].lines[1].get_ydata() == [3.0, 3.0]
    assert points(axes[rate].lines[0]) == ([100, 200, 300, 400], [1e-3 / i for i in (1, 2, 3, 4)])
    assert figure.get_suptitle() == "run"
    for title, ax in axes.items():
        wanted = "t (0 = data, 1 = noise)" if title == by_t else "images seen"
        assert ax.get_xlabel() == wanted and ax.get_ylabel()


def test_runs_of_different_length_share_the_axis_and_have_a_colour_each(tmp_path):
    short, long = full_run(tmp_path / "short", 4), full_run(tmp_path / "long", 10, 0.9)
    axes, figure = axes_of(short, long)
    for title, ax in axes.items():
        limits = (0, 1) if title == "Held-out loss by t" else (0, 1.02 * 1000)
        assert ax.get_xlim() == pytest.approx(limits), title
        assert len({line.get_color() for line in ax.lines}) == 2, title
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["short", "long"]
    colors = [line.get_color() for line in legend.get_lines()]
    assert colors == [axes["Learning rate"].lines[i].get_color() for i in (0, 1)]
    # Of several runs only the last held-out loss by t is drawn.
    assert len(axes["Held-out loss by t"].lines) == 2


def test_panels_without_data_are_left_out(tmp_path):
    write_log(tmp_path / "a", [START, train_row(100, 1.0), train_row(200, float("nan"))])
    axes, _ = axes_of(tmp_path / "a")
    assert list(axes) == ["Loss", "Learning rate"]
    assert points(axes["Loss"].lines[0]) == ([100], [1.0])
    assert axes["Loss"].lines[0].get_marker() == "o"  # a line of one point is not seen
    write_log(tmp_path / "b", [START, held_row(100, 1.0), {**held_row(200, 1.0), "loss": None}])
    assert list(axes_of(tmp_path / "b")[0]) == ["Loss", "Held-out loss by t"]


def test_axes_are_logarithmic_where_values_are_far_apart(tmp_path):
    axes, _ = axes_of(full_run(tmp_path / "wide", 10))
    assert axes["Loss"].get_yscale() == "log" and axes["Learning rate"].get_yscale() == "linear"
    rows = [START, *(train_row(i, 1.0 + i / 100) for i in range(1, 9))]
    write_log(tmp_path / "flat", rows)
    assert axes_of(tmp_path / "flat")[0]["Loss"].get_yscale() == "linear"
    write_log(tmp_path / "slow", [START, *(train_row(i, 1.0, 1e-5) for i in range(1, 9))])
    assert axes_of(tmp_path / "flat", tmp_path / "slow")[0]["Learning rate"].get_yscale() == "log"


def test_a_long_log_is_drawn_with_its_moving_average(tmp_path):
    r = np.random.default_rng(0)
    write_log(tmp_path / "a", [START, *(train_row(i, float(r.uniform(1, 2))) for i in range(500))])
    faint, mean = axes_of(tmp_path / "a")[0]["Loss"].lines[:2]
    assert len(faint.get_xdata()) == 500 and faint.get_alpha() < 0.5
    values, means = faint.get_ydata(), mean.get_ydata()
    assert means[250] == pytest.approx(np.mean(values[245:255])) and np.std(means[9:-9]) < 0.15


def test_losses_of_different_objectives_are_said_not_to_compare(tmp_path):
    a, b = full_run(tmp_path / "a"), full_run(tmp_path / "b", objective="ddpm")
    titles = list(axes_of(a, b)[0])
    assert sum("levels do not compare" in title for title in titles) == 2
    assert not any("compare" in title for title in axes_of(a)[0])


def test_steps_that_were_skipped_are_marked(tmp_path):
    rows = [START, train_row(100, 1.0), {"event": "non-finite", "images": 150, "where": "x"}]
    write_log(tmp_path / "a", [*rows, train_row(200, 1.0)])
    ax = axes_of(tmp_path / "a")[0]["Loss"]
    assert "skipped: not finite" in [text.get_text() for text in ax.get_legend().get_texts()]
    assert [150] in [points(line)[0] for line in ax.lines]


def test_a_log_that_train_wrote_can_be_drawn(tmp_path):
    shutil.copytree(ROOT / "tests" / "fixtures" / "834bb60" / "run", tmp_path / "run")
    assert list(axes_of(tmp_path / "run")[0]) == ["Loss", "Held-out loss by t", "Learning rate"]


# ---- names and places ---------------------------------------------------------------------------


def test_a_log_is_its_run_and_a_run_given_twice_is_one(tmp_path, user):
    run = full_run(tmp_path / "run")
    code, out, _ = user(plot.main, run / "log.jsonl", run)
    assert code == 0 and out.splitlines()[-1] == str(run / "samples" / "plot.png")


def test_several_runs_are_drawn_here_and_can_be_drawn_again(tmp_path, user, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [full_run(Path("runs") / name).as_posix() for name in ("a", "b")]
    for _ in range(2):  # `runs/*` must not find the picture of the first time
        code, out, err = user(plot.main, *sorted(Path("runs").iterdir()))
        assert (code, out.splitlines()[-1], err) == (0, "samples/plot.png", [])
    code, out, _ = user(plot.main, *runs, "--out", "new/folder/x.png")
    assert code == 0 and out.splitlines()[-1] == "new/folder/x.png" and Path(out.strip()).is_file()
    assert user(plot.main, *runs, "--dry-run")[0] == 0


def test_names_are_told_apart_and_shown_as_they_are(tmp_path):
    folders = [tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "y" / "_$a_b$"]
    _, figure = axes_of(*map(full_run, folders))
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["x/run", "y/run", r"y/_\$a_b\$"]
    _, figure = axes_of(*(full_run(tmp_path / "many" / str(i)) for i in range(12)))
    lines = figure.legends[0].get_lines()
    assert len({tuple(line.get_color()) for line in lines}) == 12


def test_a_line_that_is_still_being_written_does_not_count(tmp_path):
    write_log(tmp_path / "a", [START, train_row(100, 1.0)], end='{"event": "train", "ima')
    assert points(axes_of(tmp_path / "a")[0]["Loss"].lines[0]) == ([100], [1.0])


def test_a_run_with_nothing_yet_is_said_beside_others(tmp_path, user):
    write_log(tmp_path / "new", [START])
    out = tmp_path / "x.png"
    code, _, err = user(plot.main, full_run(tmp_path / "run"), tmp_path / "new", "--out", out)
    assert code == 0 and err == ["warning: there is nothing to draw yet of new."] and out.exists()


def test_it_runs_as_a_module(tmp_path):
    run = full_run(tmp_path / "run")
    command = [sys.executable, "-m", "harness.plot", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(run / "samples" / "plot.png")


def test_of_a_damaged_log_the_entries_are_drawn_and_the_rest_is_counted(tmp_path, user):
    rows = [START, *(train_row(i, 1.0) for i in range(1, 4))]
    write_log(tmp_path / "a", rows, end="[1]\n" + "\0" * 512 + "\n" + "[" * 100_000 + "\n")
    code, out, err = user(plot.main, tmp_path / "a")
    assert code == 0 and out.splitlines()[-1] == str(tmp_path / "a/samples/plot.png")
    assert len(err) == 1 and err[0].startswith("warning: 3 lines of") and "no entries" in err[0]


# ---- what cannot be drawn -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, what",
    [
        ((), "no run was given"),
        (("nowhere",), "no run at nowhere"),
        (("goof",), "Closest: good"),
        (("empty",), "empty has no log.jsonl"),
        (("runs",), "It holds runs: give runs/a, or runs/* for all 2"),
        (("list",), "list/log.jsonl is not a log"),
        (("word",), "word/log.jsonl is not a log"),
        (("picture.png",), "picture.png is not a log"),
        (("deep",), "deep/log.jsonl is not a log"),
        (("new",), "nothing to draw yet in new"),
        (("silent",), "nothing to draw yet in silent"),
        (
            ("good", "--out", "x.pdf"),
            "--out x.pdf: wanted a file that ends in .png.  Try --out x.png",
        ),
        (("good", "--out", "folder.png"), "--out folder.png is a folder: wanted a file"),
        (("good", "--ot", "x.png"), "Closest: out"),
        (("good", "--out", "x.png", "new"), "unexpected argument 'new'"),
        (("good", "--out", "good/log.jsonl/x.png"), "--out good/log.jsonl/x.png: Not a directory"),
    ],
)
def test_bad_input_is_one_line(words, what, tmp_path, user, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("good", "runs/a", "runs/b"):
        full_run(tmp_path / name)
    for folder in ("empty", "folder.png"):
        Path(folder).mkdir()
    write_log(Path("list"), [], end="[1]\n")
    write_log(Path("word"), [{"event": "train", "images": "x", "loss": 1.0}])
    write_log(Path("deep"), [], end="[" * 100_000 + "\n")
    write_log(Path("new"), [START])
    huge = {**train_row(1, 10**400, "x"), "event": "train"}
    write_log(Path("silent"), [huge, {"event": "held-out", "loss": True, "loss_by_t": {"a": 1}}])
    Image.new("RGB", (64, 64), "red").save("picture.png")
    code, out, err = user(plot.main, *words)
    assert code == 2 and len(err) == 1 and err[0].startswith("error: "), err
    assert what in err[0], err[0]
    assert out == "" and not list(tmp_path.rglob("*plot.png")) and not list(tmp_path.rglob("*.tmp"))
