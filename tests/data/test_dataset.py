"""Datasets, stages, and an order that is a function of (seed, position)."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data.toyfaces as toyfaces
from data.__main__ import main
from data.dataset import Stream, batches, classes_of, index_at, open_dataset, rng
from harness.cli import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    """Twelve images in nested folders with all three kinds of tag files, two of them unreadable."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    for i in range(10):
        where = tmp_path / ("a" if i < 5 else "a/b")
        Image.new("RGB", (40 + i, 36), (20 * i, 0, 255 - 20 * i)).save(
            where / f"{i}.{('png', 'jpg', 'webp')[i % 3]}"
        )
    (tmp_path / "a" / "tags.jsonl").write_text(
        json.dumps({"file_name": "0.png", "tags": ["Red_Hair", "solo"]}) + "\n"
    )
    (tmp_path / "a/b/metadata.jsonl").write_text(
        "\n".join(
            json.dumps(
                {
                    "file_name": f"{i}.{('png', 'jpg', 'webp')[i % 3]}",
                    "text": "albedo (overlord), solo",
                }
            )
            for i in (5, 6)
        )
    )
    (tmp_path / "a/1.txt").write_text(r"souryuu asuka langley, albedo \(overlord\), 1girl")
    (tmp_path / "a/broken.png").write_bytes(b"\x89PNG not really")
    whole = (tmp_path / "a/0.png").read_bytes()
    (tmp_path / "a/cut.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def test_folder_reads_all_tag_files_and_names_what_it_cannot_read(folder):
    ds = open_dataset(str(folder), resolution=32, holdout=0)
    by_name = dict(zip(ds.source.names, ds.source.tags))
    assert len(ds) == 10 and ds[0].image.shape == (3, 32, 32) and ds[0].image.dtype == torch.uint8
    assert by_name["a/0.png"] == ("red hair", "solo")
    assert by_name["a/1.jpg"] == ("souryuu asuka langley", "albedo (overlord)", "1girl")
    assert by_name["a/b/5.webp"] == ("albedo (overlord)", "solo")
    assert by_name["a/2.webp"] == ()
    assert (
        "12 found = 10 used + 0 held out + 0 left out by stage=standard + 2 unreadable" in ds.report
    )
    assert "without tags: 6 of the used" in ds.report
    assert "a/broken.png" in ds.report and "a/cut.png" in ds.report


def test_stages_add_up_and_split_by_tag(folder):
    tags = ("Albedo_(Overlord)",)
    fine, stage2 = (
        open_dataset(str(folder), stage=s, exclude_tags=tags, resolution=32, holdout=0)
        for s in ("fine", "stage2")
    )
    assert (len(fine), len(stage2)) == (7, 3)
    assert set(fine.index) | set(stage2.index) == set(range(10)) and not set(fine.index) & set(
        stage2.index
    )
    assert fine.counts()["albedo (overlord)"] == 0 and stage2.counts()["albedo (overlord)"] == 3
    assert "'albedo (overlord)': 3 found, 3 used" in stage2.report


def test_a_tag_that_matches_nothing_names_the_nearest(folder):
    with pytest.raises(UserError, match="matches 0 of 10 images.  Closest: albedo \\(overlord\\)"):
        open_dataset(str(folder), stage="fine", exclude_tags=("albedo overlord",), resolution=32)
    assert (
        len(
            open_dataset(
                str(folder), stage="stage2", exclude_tags=("albedo*",), resolution=32, holdout=0
            )
        )
        == 3
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: p / "nowhere", "no data at"),
        (lambda p: p, "has no images"),
        (lambda p: (p / "x.png").write_bytes(b"no") and p, "none of the 1 images"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        open_dataset(str(make(tmp_path)))


def test_tags_for_absent_files_are_said_and_a_byte_order_mark_is_not_a_tag(folder, capsys):
    (folder / "a" / "tags.jsonl").write_bytes(
        b'\xef\xbb\xbf{"file_name": "gone.png", "tags": "x"}\n'
    )
    (folder / "a" / "1.txt").write_bytes(b"\xef\xbb\xbffirst, second")
    ds = open_dataset(str(folder), resolution=32, holdout=0)
    assert "tags for 1 files that are not there, first a/gone.png" in capsys.readouterr().err
    assert dict(zip(ds.source.names, ds.source.tags))["a/1.jpg"] == ("first", "second")


@pytest.mark.parametrize("tags", ['{"a": 1}', "[1, 2]", "3", "true"])
def test_tags_of_the_wrong_type_are_named(folder, tags):
    (folder / "a" / "tags.jsonl").write_text(f'{{"file_name": "0.png", "tags": {tags}}}\n')
    with pytest.raises(UserError, match="tags.jsonl:1: wanted"):
        open_dataset(str(folder), resolution=32)


def test_a_bad_line_in_a_tag_file_is_named(folder):
    (folder / "a" / "tags.jsonl").write_text('{"file_name": "0.png", "tags": ["x"]}\n{"name": 1}\n')
    with pytest.raises(UserError, match=r"tags.jsonl:2: .*KeyError"):
        open_dataset(str(folder), resolution=32)


def test_held_out_images_are_the_same_in_every_stage_and_never_trained_on():
    stages = [
        open_dataset(
            "toyfaces:400", stage=s, exclude_tags=toyfaces.EXCLUDED, resolution=32, holdout=0.1
        )
        for s in ("standard", "fine", "stage2")
    ]
    held = [set(ds.heldout.index) for ds in stages]
    assert held[1] | held[2] == held[0] and 20 < len(held[0]) < 60
    assert not any(set(ds.index) & held[0] for ds in stages)


def test_every_image_is_seen_once_an_epoch_in_a_new_order():
    epochs = [[index_at(7, 50, p) for p in range(e * 50, e * 50 + 50)] for e in range(3)]
    assert all(sorted(e) == list(range(50)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(50))
    assert epochs[0] != [index_at(8, 50, p) for p in range(50)]


def test_a_sample_is_a_function_of_seed_and_position():
    ds = open_dataset("toyfaces:30", resolution=32, holdout=0)
    _, labels = classes_of(ds, ("* hair",))
    stream = Stream(ds, labels, (2, 4, 4), seed=3, flip=True, label_drop=0.3)
    ahead = [stream[p] for p in range(60)]
    for p in (59, 0, 31):
        assert all(
            torch.equal(torch.as_tensor(a), torch.as_tensor(b))
            for a, b in zip(stream[p].values(), ahead[p].values())
        )
    assert len({s["q"] for s in ahead}) == 60
    eps = torch.stack([s["eps"] for s in ahead])
    assert abs(float(eps.mean())) < 0.05 and abs(float(eps.std()) - 1) < 0.05
    # neither flips nor label dropout move the noise
    plain = Stream(ds, None, (2, 4, 4), seed=3)
    assert all(
        torch.equal(plain[p]["eps"], ahead[p]["eps"]) and plain[p]["q"] == ahead[p]["q"]
        for p in range(60)
    )
    flipped = [not torch.equal(plain[p]["image"], ahead[p]["image"]) for p in range(60)]
    assert 15 < sum(flipped) < 45 and all(
        torch.equal(plain[p]["image"].flip(-1), ahead[p]["image"]) for p in range(60) if flipped[p]
    )
    dropped = np.mean([s["y"] == -1 for s in ahead])
    assert 0.1 < dropped < 0.5
    assert torch.equal(Stream(ds, None, (2, 4, 4), seed=4)[0]["eps"], plain[0]["eps"]) is False


def test_loader_workers_change_nothing():
    ds = open_dataset("toyfaces:30", resolution=32, holdout=0)
    stream, groups = Stream(ds, None, (2, 4, 4), seed=0), [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    alone, shared = (list(batches(stream, iter(groups), workers=w)) for w in (0, 2))
    assert len(alone) == 3
    for a, b in zip(alone, shared):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert alone[2]["position"].tolist() == [6, 7, 8] and alone[0]["q"].dtype == torch.float64


def test_streams_of_randomness_are_independent():
    a, b = rng(0, "sample", 5), rng(0, "order", 5)
    assert not np.array_equal(a.random(4), b.random(4))
    assert np.array_equal(rng(0, "sample", 5).random(4), rng(0, "sample", 5).random(4))


def test_classes_are_the_first_matching_tag():
    ds = open_dataset("toyfaces:50", resolution=32, holdout=0)
    names, labels = classes_of(ds, ("character:*", "glasses"))
    assert names == [
        "character:ember",
        "character:kiri",
        "character:moss",
        "character:nova",
        "glasses",
    ]
    for i in range(50):
        first = next((k for k, n in enumerate(names) if n in ds[i].tags), -1)
        assert labels[i] == first
    with pytest.raises(UserError, match="matches 0 of 50"):
        classes_of(ds, ("tail",))


@pytest.mark.parametrize("ending", ["error", "abandoned"])
def test_worker_processes_never_keep_a_script_from_ending(tmp_path, ending):
    """They ignore SIGTERM for 20 s, so whoever is done with them has to end them; else an exit
    joins them for ever."""
    for i in range(8):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    script = f"""if True:
        import time
        import data.sources as sources
        from harness.cli import cli
        from data.dataset import Stream, batches, open_dataset
        sources.IN_MEMORY = 0
        ds = open_dataset({str(tmp_path)!r}, resolution=16, holdout=0)
        loader = batches(Stream(ds, None, (2, 4, 4), 0), iter([list(range(8))] * 99), workers=2)
        next(loader)
        print(time.time())
        if {ending!r} == "error":
            open({str(tmp_path / "3.png")!r}, "w").close()
            cli(lambda: list(loader))
        print("left")
    """
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if ending == "error":
        assert done.returncode == 2 and done.stderr.startswith("error: 3.png"), done.stderr
    else:
        assert done.stdout.endswith("\nleft\n")
    # Without the imports, which take long on a busy machine.
    assert time.time() - float(done.stdout.split()[0]) < 15


def test_the_first_images_on_a_sheet(folder, tmp_path, user):
    code, out, errors = user(
        main, "--data", folder, "--resolution", 16, "--out", tmp_path / "s.png"
    )
    assert code == 0 and "12 found = 10 used" in out, errors
    with Image.open(tmp_path / "s.png") as sheet:  # ten images in four columns
        assert sheet.size == (4 * 18 + 2, 3 * 18 + 2)
    (tmp_path / "plan.json").write_text("{}")
    code, _, errors = user(main, "--data", tmp_path)
    assert code == 2 and "is a latent cache, which keeps no images" in errors[-1]
