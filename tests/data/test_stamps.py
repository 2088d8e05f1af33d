"""A latent cache tells in one line that the folder it was made of is another now."""

import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data.encode as encode
import data.stamps as stamps
import train
from data.cache import open_cache
from data.dataset import open_dataset
from data.encode import Encode
from data.stamps import difference, stamps_path
from harness.ranks import Ranks

ONE = Ranks(0, 1, torch.device("cpu"))


def picture(path: Path, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture
def made(tmp_path):
    """(folder of 8 tagged images and one that cannot be read, its cache)."""
    folder, out = tmp_path / "my images", tmp_path / "c"
    (folder / "more").mkdir(parents=True)
    for i in range(8):
        picture(folder / f"{i}.png", i)
        (folder / f"{i}.txt").write_text(f"cat, {i}")
    (folder / "1.caption").write_text("One, TWO.")
    (folder / "2.caption").write_text("Zoë")
    (folder / "broken.png").write_text("no picture")
    encode.encode(Encode(str(out), str(folder), "pixel:8", resolution=32, device="cpu"), ONE)
    return folder, out


def said(out: Path) -> str:
    return difference(open_cache(str(out), 32))


def later(path: Path) -> None:
    """Another time, and nothing else."""
    os.utime(path, ns=(1, os.stat(path).st_mtime_ns + 10**9))


def replaced(path: Path) -> None:
    """Other pixels, of the same number of bytes at the same time where that can be."""
    picture(path, 99)
    later(path)


CHANGES = {
    "1 images added": lambda d: picture(d / "new.png", 50),
    "2 images added": lambda d: [picture(d / f"more/{i}.png", i) for i in range(2)],
    "1 images gone": lambda d: (d / "3.png").unlink(),
    "1 images changed": lambda d: replaced(d / "4.png"),
    "1 images added, 1 images gone": lambda d: (d / "3.png").rename(d / "three.png"),
    "1 images with other tags": lambda d: (d / "5.txt").write_text("dog"),
    "2 images with other tags": lambda d: [(d / f"{i}.txt").unlink() for i in (5, 6)],
    "8 images with other tags": lambda d: [(d / f"{i}.txt").write_text("x") for i in range(8)],
    "1 images with other captions": lambda d: (d / "1.caption").write_text("Three."),
    "2 images with other captions": lambda d: [(d / f"{i}.caption").unlink() for i in (1, 2)],
    "1 images added, 1 images changed": lambda d: (
        picture(d / "broken.png", 7),
        replaced(d / "4.png"),
    ),
}
NOTHING = {
    "nothing": lambda d: None,
    "times": lambda d: [later(path) for path in d.glob("*.*")],
    "a copy": lambda d: [
        shutil.copyfile(p, d / "x") and (d / "x").replace(p) for p in d.glob("*.*")
    ],
    "other files": lambda d: (d / "notes.md").write_text("x"),
    "hidden files": lambda d: (d / ".thumbnails").mkdir() or picture(d / ".thumbnails/0.png", 0),
    "the same caption": lambda d: (d / "1.caption").write_text("One, TWO. \n"),
    "the same tags": lambda d: (d / "5.txt").write_text("cat,  5 "),
    "gone": lambda d: d.rename(d.with_name("elsewhere")),
}


@pytest.mark.parametrize("wanted", CHANGES)
def test_what_changed_is_said_with_the_command_that_updates(made, user, wanted):
    folder, out = made
    assert said(out) == ""
    CHANGES[wanted](folder)
    line = said(out)
    assert line.startswith(f"{folder} differs from this cache of it: {wanted}.  Update it with: ")
    command = shlex.split(line.partition("python -m data.encode ")[2])
    assert user(encode.main, *command)[0] == 0
    assert said(out) == ""


@pytest.mark.parametrize("change", NOTHING)
def test_what_is_the_same_is_not_said(made, change):
    folder, out = made
    NOTHING[change](folder)
    assert said(out) == ""


def test_only_what_differs_is_read(made, monkeypatch):
    folder, out = made
    read, strip = [], stamps.strip_hash
    monkeypatch.setattr(stamps, "strip_hash", lambda image: read.append(1) or strip(image))
    picture(folder / "new.png", 50)
    (folder / "5.txt").write_text("dog")
    later(folder / "2.png")
    assert "1 images added, 1 images with other tags" in said(out) and len(read) == 1
    monkeypatch.setattr(stamps, "READ", 2)
    for i in range(8):
        replaced(folder / f"{i}.png")
    read.clear()
    assert "8 images changed" in said(out) and len(read) == 2


def test_tables_of_tags_count_too(made):
    folder, out = made
    for i in range(8):
        (folder / f"{i}.txt").unlink()
    lines = [f'{{"file_name": "{i}.png", "tags": ["cat", "{i}"]}}' for i in range(8)]
    (folder / "tags.jsonl").write_text("\n".join(lines))
    assert said(out) == ""  # the same tags
    (folder / "tags.jsonl").write_text("\n".join(lines[1:]))
    assert "1 images with other tags" in said(out)
    (folder / "tags.jsonl").write_text("{")
    assert "other tags" in said(out)


def test_a_run_says_it_once_and_goes_on(made, tmp_path, user, monkeypatch):
    black = torch.zeros(32, 3, 32, 32, dtype=torch.uint8)
    monkeypatch.setattr(train, "draw_samples", lambda *how, **more: black)
    folder, out = made
    (folder / "5.txt").write_text("dog")
    words = ["--data", out, "--resolution", 32, "--model", "nano", "--batch", 4, "--images", 4]
    words += ["--eval-every", 0, "--preview-every", 0, "--out", tmp_path, "--name", "r"]
    code, text, _ = user(train.main, *words)
    assert code == 0 and text.count("differs from this cache of it: 1 images with other tags") == 1


@pytest.mark.parametrize("kind", ["none", "damaged", "junk"])
def test_a_cache_without_stamps_compares_names_and_tags(made, kind):
    folder, out = made
    path = stamps_path(out)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.unlink() if kind == "none" else path.write_bytes(data if kind == "damaged" else b"x")
    assert said(out) == ""
    picture(folder / "new.png", 50)
    (folder / "5.txt").write_text("dog")
    assert "1 images added, 1 images with other tags" in said(out)


def test_a_folder_without_end_is_not_searched_to_its_end(made, monkeypatch):
    """A stranger's cache may say that it was made of the root of this machine."""
    folder, out = made
    monkeypatch.setattr(stamps, "SPARE", 5)
    for k in range(20):
        (folder / f"f{k:02d}").mkdir()
        for i in range(5):
            picture(folder / f"f{k:02d}/{i}.png", i)
    assert "files and more are there" in said(out)


def test_parquet_is_known_by_its_files(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    folder, out = tmp_path / "d", tmp_path / "c"
    folder.mkdir()
    picture(tmp_path / "x.png", 0)

    def table(n):
        rows = pa.table({"image": [(tmp_path / "x.png").read_bytes()] * n, "tags": ["cat"] * n})
        pq.write_table(rows, folder / "a.parquet")

    table(3)
    encode.encode(Encode(str(out), str(folder), "pixel:8", resolution=32, device="cpu"), ONE)
    later(folder / "a.parquet")
    assert said(out) == ""
    table(4)
    assert "1 parquet files changed" in said(out)


def test_a_set_that_is_no_folder_has_no_stamps(tmp_path):
    encode.encode(Encode(str(tmp_path / "c"), "toyfaces:8", "pixel:8", resolution=32), ONE)
    assert not stamps_path(tmp_path / "c").exists() and said(tmp_path / "c") == ""
    assert "differs" not in open_dataset(str(tmp_path / "c"), resolution=32).report
