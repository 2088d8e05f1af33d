"""A run is known by its content: its images, its cache and its folder may lie elsewhere when it
goes on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from ckpt import read_tensors
from data.encode import Encode, encode
from harness.ranks import Ranks

ONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Drawing takes long, and is not the subject."""
    black = torch.zeros(32, 3, 32, 32, dtype=torch.uint8)
    monkeypatch.setattr(train, "draw_samples", lambda *how, **more: black)


def fill(folder: Path, first: int = 0) -> Path:
    folder.mkdir(parents=True)
    for i in range(6):
        noise = np.random.default_rng(first + i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    return folder


def begin(user, tmp_path: Path, data: Path | str):
    """A run of 16 images, cut back to its checkpoint at 8 -> (go on, its weights at the end)."""
    words = ["--model", "nano", "--resolution", 32, "--batch", 4, "--images", 16, "--holdout", 0]
    words += ["--save-every", 8, "--eval-every", 0, "--preview-every", 0, "--out", tmp_path]

    def go_on(data, name):
        return user(train.main, *words, "--data", data, "--name", name)

    code, _, errors = go_on(data, "run")
    assert code == 0, errors
    weights = end(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/ckpt/000000000016")
    (tmp_path / "run/samples/final.png").unlink()
    return go_on, weights


def end(run: Path):
    return read_tensors(run / "ckpt/000000000016/model.safetensors")[0]


def goes_on_to(weights, run: Path, result) -> bool:
    code, out, errors = result
    assert code == 0 and f"resuming {run} at 8 of 16 images" in out, (out, errors)
    found = end(run)
    return found.keys() == weights.keys() and all(torch.equal(found[k], weights[k]) for k in found)


def test_images_may_move_and_be_renamed(user, tmp_path):
    go_on, weights = begin(user, tmp_path, fill(tmp_path / "here/images"))
    (tmp_path / "there").mkdir()
    (tmp_path / "here/images").rename(tmp_path / "there/pictures")
    assert goes_on_to(weights, tmp_path / "run", go_on(tmp_path / "there/pictures", "run"))


def test_a_run_may_be_renamed(user, tmp_path):
    go_on, weights = begin(user, tmp_path, fill(tmp_path / "images"))
    (tmp_path / "run").rename(tmp_path / "better-name")
    assert goes_on_to(weights, tmp_path / "better-name", go_on(tmp_path / "images", "better-name"))


def test_a_cache_may_move(user, tmp_path):
    fill(tmp_path / "images")
    encode(Encode(str(tmp_path / "c"), str(tmp_path / "images"), resolution=32), ONE)
    go_on, weights = begin(user, tmp_path, tmp_path / "c")
    shutil.rmtree(tmp_path / "images")
    (tmp_path / "c").rename(tmp_path / "moved")
    assert goes_on_to(weights, tmp_path / "run", go_on(tmp_path / "moved", "run"))


def test_other_images_under_any_path_are_refused_and_the_right_ones_still_go_on(user, tmp_path):
    go_on, weights = begin(user, tmp_path, fill(tmp_path / "images"))
    fill(tmp_path / "others", first=100)
    code, _, errors = go_on(tmp_path / "others", "run")
    assert code == 2 and "the images or tags of" in errors[-1] and "changed since" in errors[-1]
    code, _, errors = go_on("toyfaces:6", "run")
    assert code == 2 and "was made with another config: data" in errors[-1]
    assert goes_on_to(weights, tmp_path / "run", go_on(tmp_path / "images", "run"))
    code, _, errors = go_on(tmp_path / "others", "run")  # finished: no data is read any more
    assert code == 2 and "was made with another config: data" in errors[-1]


def test_a_finished_run_may_be_opened_from_where_its_images_and_its_init_lie_now(user, tmp_path):
    """Also where its last pictures are missing, which it then draws again."""
    images = fill(tmp_path / "images")
    begin(user, tmp_path, images)
    init = tmp_path / "init.safetensors"
    shutil.copy(tmp_path / "run/ckpt/000000000008/model.safetensors", init)

    def go_on(init, data, *more):
        words = ["--model", "nano", "--resolution", 32, "--batch", 4, "--images", 8, "--holdout", 0]
        words += ["--eval-every", 0, "--preview-every", 0, "--out", tmp_path, "--name", "second"]
        return user(train.main, *words, "--init", init, "--data", data, *more)

    code, _, errors = go_on(init, images)
    assert code == 0, errors
    final = tmp_path / "second/samples/final.png"
    moved = Path(shutil.copytree(images, tmp_path / "there"))
    other = tmp_path / "moved.safetensors"
    shutil.move(init, other)
    for pictures in (True, False):
        if not pictures:
            final.unlink()
        code, out, errors = go_on(other, moved)
        assert code == 0 and "finished" in out and final.exists(), errors
    config = json.loads((tmp_path / "second/config.json").read_text())
    assert (config["init"], config["data"]) == (str(other), str(moved))
    code, _, errors = go_on(tmp_path / "run/ckpt/000000000008/ema-0.050.safetensors", moved)
    assert code == 2 and "was made with another config: init" in errors[-1]
    code, _, errors = go_on(other, fill(tmp_path / "others", first=100))
    assert code == 2 and "was made with another config: data" in errors[-1]
    code, _, errors = go_on(other, moved, "--seed", 1)
    assert code == 2 and "was made with another config: seed" in errors[-1]


def test_a_run_whose_init_moved_goes_on(user, tmp_path):
    images = fill(tmp_path / "images")
    begin(user, tmp_path, images)
    words = ["--model", "nano", "--resolution", 32, "--batch", 4, "--images", 16, "--holdout", 0]
    words += ["--save-every", 8, "--eval-every", 0, "--preview-every", 0, "--out", tmp_path]
    init = tmp_path / "init.safetensors"
    shutil.copy(tmp_path / "run/ckpt/000000000008/model.safetensors", init)

    def go_on(init):
        return user(train.main, *words, "--data", images, "--name", "second", "--init", init)

    assert go_on(init)[0] == 0
    weights = end(tmp_path / "second")
    shutil.rmtree(tmp_path / "second/ckpt/000000000016")
    (tmp_path / "second/samples/final.png").unlink()
    init.rename(tmp_path / "moved.safetensors")
    assert goes_on_to(weights, tmp_path / "second", go_on(tmp_path / "moved.safetensors"))
