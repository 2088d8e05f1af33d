"""Folders with links and archives, the Hub, parquet, random crops, and loading in other
processes."""

import io
import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data.sources as sources
import train
from data.dataset import Stream, batches, open_dataset
from harness.cli import UserError
from harness.ranks import Ranks


def picture(i, width=60, height=40):
    """Noise, so that no two crops are alike."""
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "set"
    (root / "a").mkdir(parents=True)
    for i in range(8):
        picture(i, 60 + 30 * (i % 3), 40).save(root / f"a/{i}.png")
    picture(8, 40, 90).save(root / "tall.webp", lossless=True)
    (root / "tags.jsonl").write_text(
        "".join(
            json.dumps({"file_name": f"a/{i}.png", "tags": ["first", f"n{i}", "x", "y"]}) + "\n"
            for i in range(8)
        )
    )
    return root


# ---- folders ------------------------------------------------------------------------------------


def test_linked_folders_are_read_once_and_loops_end(folder, tmp_path):
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    picture(20).save(tmp_path / "elsewhere/deep/far.png")
    (tmp_path / "elsewhere/deep/far.txt").write_text("far away")
    os.symlink(tmp_path / "elsewhere", folder / "link")
    os.symlink(tmp_path / "elsewhere", folder / "link2")
    os.symlink(folder, tmp_path / "elsewhere/deep/back")
    os.symlink(".", folder / "a/self")
    ds = open_dataset(str(folder), resolution=32, holdout=0)
    assert sorted(ds.source.names) == [
        *(f"a/{i}.png" for i in range(8)),
        "link/deep/far.png",
        "tall.webp",
    ]
    assert dict(zip(ds.source.names, ds.source.tags))["link/deep/far.png"] == ("far away",)
    before = ds.source.hash
    (folder / "a/3.txt").write_text("beside")  # wins over the table; other tags are other data
    ds = open_dataset(str(folder), resolution=32, holdout=0)
    assert (
        dict(zip(ds.source.names, ds.source.tags))["a/3.png"] == ("beside",)
        and ds.source.hash != before
    )


def test_files_without_an_ending_are_used_named_or_counted(tmp_path):
    """Every file is in one of the three; an image by its first bytes is the image, with its
    tags."""
    for i, kind in enumerate(("PNG", "JPEG", "WEBP", "GIF", "BMP")):
        picture(i).save(tmp_path / f"{kind.lower()}{i}", format=kind)
    (tmp_path / "png0.txt").write_text("first")
    picture(9).save(tmp_path / "plain.png")
    other = {
        "tiff": b"II*\0",
        "mac-tiff": b"MM\0*",
        "heic": b"\0\0\0\x18ftypheic",
        "avif": b"\0\0\0\x1cftypavif",
        "jxl": b"\0\0\0\x0cJXL \r\n",
        "psd": b"8BPS\0\1",
    }
    for name, head in other.items():
        (tmp_path / name).write_bytes(head + bytes(100))
    (tmp_path / "half").write_bytes((tmp_path / "png0").read_bytes()[:200])
    counted = {
        "LICENSE": b"Permission",
        "empty": b"",
        ".DS_Store": b"\0\0\0\1Bud1",
        "memo": b"BMW and others",
        "a.png.part": (tmp_path / "png0").read_bytes(),
        "b.json": b"{}",
    }
    for name, data in counted.items():
        (tmp_path / name).write_bytes(data)
    os.symlink("nowhere", tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    ds = open_dataset(str(tmp_path), resolution=32, holdout=0)
    assert ds.source.names == sorted(["plain.png", "png0", "jpeg1", "webp2", "gif3", "bmp4"])
    assert dict(zip(ds.source.names, ds.source.tags))["png0"] == ("first",)
    kinds = {
        "tiff": "TIFF",
        "mac-tiff": "TIFF",
        "heic": "HEIC or AVIF",
        "avif": "HEIC or AVIF",
        "jxl": "JPEG XL",
        "psd": "PSD",
    }
    assert {k: v for k, v in ds.source.unreadable.items() if k != "half"} == {
        name: f"{kind} files are not read" for name, kind in kinds.items()
    }
    assert (
        "13 found = 6 used + 0 held out + 0 left out by stage=standard + 7 unreadable" in ds.report
        and "half" in ds.source.unreadable
    )
    assert (
        f"{len(counted) + 1} other files, no images by name or, without an ending, by content "
        "(first: LICENSE)"
        in ds.report
    )
    assert "1 hidden files and folders, or generated ones, not read (first: .DS_Store)" in ds.report
    assert len(list(tmp_path.iterdir())) == 13 + len(counted) + 2 + 1  # and one file of tags


def test_archives_and_parquet_beside_images_are_said(folder, tmp_path):
    for name in ("more.zip", "old.TAR.GZ", "train.parquet"):
        (folder / name).write_bytes(b"x")
    report = open_dataset(str(folder), resolution=32).report
    assert "text files" not in report and "caption files" not in report
    for name in ("a/3.txt", "a/0.png.txt", "a/1.TXT", "a/0.png.caption", "a/1.caption"):
        (folder / name).write_text("x")
    notes = open_dataset(str(folder), resolution=32).source.notes
    tags, captions = [note for note in notes if "of no image's name" in note]
    said = "2 text files of no image's name (the tags of a.png lie in a.txt) (first: a/0.png.txt)"
    assert tags == said
    said = "1 caption files of no image's name (that of a.png is a.caption) (first: a/0.png.capt"
    assert captions.startswith(said)
    assert (
        "2 archives, not opened: unpack them (first: more.zip)" in report
        and "1 parquet files beside images, not read" in report
    )
    (tmp_path / "zips").mkdir()
    (tmp_path / "zips/data.zip").write_bytes(b"x")
    with pytest.raises(UserError, match="has no images .*1 archives, not opened: unpack them"):
        open_dataset(str(tmp_path / "zips"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_damaged_later_is_named_in_one_line(folder, monkeypatch, workers):
    monkeypatch.setattr(sources, "IN_MEMORY", 0)
    ds = open_dataset(str(folder), resolution=32, holdout=0)
    (folder / "a/3.png").write_bytes(b"no longer")
    stream = Stream(ds, None, (2, 4, 4), seed=0)
    with pytest.raises(UserError) as error:
        list(batches(stream, iter([list(range(9))]), workers=workers))
    assert str(error.value).startswith("a/3.png: not PNG") and "\n" not in str(error.value)


# ---- crops, workers -----------------------------------------------------------------------------


def test_random_crops_are_a_function_of_seed_and_position(folder, monkeypatch):
    ds = open_dataset(str(folder), resolution=32, holdout=0, crop="random")
    stream = Stream(ds, None, (2, 4, 4), seed=3)
    seen: dict[str, set] = {}
    for p in range(180):
        sample, again = stream[p], Stream(ds, None, (2, 4, 4), seed=3)[p]
        assert torch.equal(sample["image"], again["image"]) and sample["image"].shape == (3, 32, 32)
        name = next(
            n
            for i, n in enumerate(ds.source.names)
            if any(
                torch.equal(
                    sample["image"],
                    torch.from_numpy(sources.cut(ds.source.pixels[i], where).copy()).permute(
                        2, 0, 1
                    ),
                )
                for where in np.arange(100) / 100
            )
        )  # it is a crop of one of the images
        seen.setdefault(name, set()).add(sample["image"].numpy().tobytes())
    assert len(seen) == 9 and all(len(crops) > 5 for crops in seen.values())
    centre = Stream(open_dataset(str(folder), resolution=32, holdout=0), None, (2, 4, 4), seed=3)
    assert all(
        torch.equal(centre[p]["eps"], stream[p]["eps"]) and centre[p]["q"] == stream[p]["q"]
        for p in range(9)
    )  # the noise stays
    assert torch.equal(
        ds.images(range(9)), centre.ds.images(range(9))
    )  # looking at an image is not training on it
    monkeypatch.setattr(sources, "IN_MEMORY", 0)
    lazy = open_dataset(str(folder), resolution=32, holdout=0, crop="random")
    assert (
        lazy.source.pixels is None and lazy.source.hash == ds.source.hash != centre.ds.source.hash
    )
    assert all(
        torch.equal(Stream(lazy, None, (2, 4, 4), seed=3)[p]["image"], stream[p]["image"])
        for p in range(20)
    )


@pytest.mark.parametrize("kept", [2_000_000_000, 0])
def test_workers_change_nothing_from_files(folder, monkeypatch, kept):
    monkeypatch.setattr(sources, "IN_MEMORY", kept)
    ds = open_dataset(str(folder), resolution=32, holdout=0, crop="random")
    stream = Stream(ds, None, (2, 4, 4), seed=1, flip=True)
    groups = [list(range(k, k + 4)) for k in range(0, 32, 4)]
    alone, shared = (list(batches(stream, iter(groups), workers=w)) for w in (0, 2))
    assert len(alone) == len(shared) == 8
    for a, b in zip(alone, shared):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_unreadable_files_shift_no_image(folder, monkeypatch):
    (folder / "a/00.png").write_bytes(b"no")
    kept = open_dataset(str(folder), resolution=32, holdout=0)
    monkeypatch.setattr(sources, "IN_MEMORY", 0)
    lazy = open_dataset(str(folder), resolution=32, holdout=0)
    assert list(lazy.source.unreadable) == ["a/00.png"] and torch.equal(
        lazy.images(range(9)), kept.images(range(9))
    )


def test_pixels_are_kept_only_while_they_fit(folder, monkeypatch):
    monkeypatch.setattr(sources, "IN_MEMORY", 9 * 32 * 32 * 3)  # enough for squares, not for strips
    assert open_dataset(str(folder), resolution=32).source.pixels is not None
    assert open_dataset(str(folder), resolution=32, crop="random").source.pixels is None


def test_train_crops_at_random(folder, tmp_path, user):
    cfg = train.resolve(
        train.Config(
            data=str(folder),
            crop="random",
            resolution=32,
            vae="pixel:4",
            out=str(tmp_path),
            name="crops",
            holdout=0,
        )
    )
    assert train.setup(cfg, Ranks(0, 1, torch.device("cpu"))).ds.source.crop == "random"
    code, _, errors = user(train.main, "--data", folder, "--crop", "middle")
    assert code == 2 and "--crop 'middle' is not one of center, random" in errors[-1]


# ---- the Hub ------------------------------------------------------------------------------------


def test_a_dataset_on_the_hub_is_the_folder_of_its_snapshot(folder, monkeypatch):
    import huggingface_hub as hub

    asked = {}
    monkeypatch.setattr(
        hub, "snapshot_download", lambda repo, **how: asked.update(repo=repo, **how) or str(folder)
    )
    ds = open_dataset("hf:someone/faces@abc", resolution=32, holdout=0)
    assert (asked["repo"], asked["repo_type"], asked["revision"]) == (
        "someone/faces",
        "dataset",
        "abc",
    ) and len(ds) == 9
    wanted = hub.utils.filter_repo_objects
    files = [
        "a/0.png",
        "B.JPG",
        "metadata.jsonl",
        "x/metadata.csv",
        "data/train-0.parquet",
        "a/0.txt",
        "data.zip",
        "model.safetensors",
        "README.md",
    ]
    assert list(wanted(files, allow_patterns=asked["allow_patterns"])) == files[:6]
    ds = open_dataset("hf:someone/faces/a", resolution=32, holdout=0)
    assert ds.source.names == [f"{i}.png" for i in range(8)]
    assert (
        list(wanted(["a/0.png", "b/0.png"], allow_patterns=asked["allow_patterns"])) == ["a/0.png"]
        and asked["revision"] is None
    )
    with pytest.raises(
        UserError,
        match="no images, parquet files or tags below b/.*huggingface.co/datasets/someone/faces",
    ):
        open_dataset("hf:someone/faces/b")


@pytest.mark.parametrize(
    "kind, message",
    [
        ("LocalEntryNotFoundError", "hf download --repo-type dataset someone/faces --revision v9"),
        ("OfflineModeIsEnabled", "hf download --repo-type dataset someone/faces"),
        ("ConnectionError", "Check the network"),
        (
            "RepositoryNotFoundError",
            "no such repository, or it is private.  "
            "Check https://huggingface.co/datasets/someone/faces",
        ),
    ],
)
def test_a_dataset_that_cannot_be_fetched_is_one_line(monkeypatch, user, kind, message):
    import huggingface_hub as hub

    def fail(*_, **__):
        error = getattr(hub.errors, kind, ConnectionError)
        raise error.__new__(error, "no")  # its __init__ may want a response of the HTTP library

    monkeypatch.setattr(hub, "snapshot_download", fail)
    code, _, errors = user(train.main, "--data", "hf:someone/faces@v9")
    assert code == 2 and len(errors) == 1 and message in errors[0]


def test_a_name_that_is_none_on_the_hub():
    with pytest.raises(UserError, match="is not a dataset on the Hub"):
        open_dataset("hf:faces")


# ---- parquet ------------------------------------------------------------------------------------


def rows(n):
    def png(i):
        box = io.BytesIO()
        picture(i).save(box, "PNG")
        return box.getvalue()

    return [png(i) for i in range(n)]


def test_parquet_as_the_hub_writes_it(tmp_path, monkeypatch):
    pa = pytest.importorskip(
        "pyarrow", reason="parquet data sets need pyarrow (pip install pyarrow)"
    )
    import pyarrow.parquet as pq

    data = rows(10)
    for i in range(10):
        (tmp_path / "flat").mkdir(exist_ok=True)
        picture(i).save(tmp_path / f"flat/{i}.png")
    data[4] = data[4][:300]
    column = [{"bytes": b, "path": f"{i}.png"} for i, b in enumerate(data)]
    column[7] = {"bytes": None, "path": "7.png"}
    tags = [["A_Tag", f"n{i}"] for i in range(10)]
    (tmp_path / "set/data").mkdir(parents=True)
    for k, part in enumerate((slice(0, 6), slice(6, 10))):
        pq.write_table(
            pa.table({"id": list(range(10))[part], "image": column[part], "tags": tags[part]}),
            tmp_path / f"set/data/train-{k}.parquet",
            row_group_size=4,
        )
    ds = open_dataset(str(tmp_path / "set"), resolution=32, holdout=0)
    assert (
        "10 found = 8 used + 0 held out + 0 left out by stage=standard + 2 unreadable" in ds.report
    )
    assert (
        ds.source.unreadable["data/train-1.parquet:1"] == "no bytes in this row"
        and "data/train-0.parquet:4" in ds.source.unreadable
    )
    good = [0, 1, 2, 3, 5, 6, 8, 9]
    assert ds.source.tags == [("a tag", f"n{i}") for i in good]
    flat = open_dataset(str(tmp_path / "flat"), resolution=32, holdout=0)
    assert torch.equal(ds.images(range(8)), flat.images(good))
    monkeypatch.setattr(sources, "IN_MEMORY", 0)
    lazy = open_dataset(str(tmp_path / "set"), resolution=32, holdout=0)
    assert lazy.source.pixels is None and lazy.source.hash == ds.source.hash
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]
    for a, b in zip(
        *(batches(Stream(d, None, (2, 4, 4), 0), iter(groups), w) for d, w in ((ds, 0), (lazy, 2)))
    ):
        assert all(torch.equal(a[k], b[k]) for k in a)
    one = open_dataset(str(tmp_path / "set/data/train-1.parquet"), resolution=32, holdout=0)
    assert torch.equal(one.images(range(3)), flat.images([6, 8, 9]))


def test_parquet_of_plain_bytes_and_text(tmp_path):
    pa = pytest.importorskip(
        "pyarrow", reason="parquet data sets need pyarrow (pip install pyarrow)"
    )
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"jpg": rows(3), "text": ["a, b", None, ""]}), tmp_path / "x.parquet")
    ds = open_dataset(str(tmp_path), resolution=32, holdout=0)
    assert ds.source.tags == [("a", "b"), (), ()] and ds.source.names == [
        f"x.parquet:{i}" for i in range(3)
    ]
    pq.write_table(pa.table({"a": rows(3), "b": rows(3)}), tmp_path / "x.parquet")
    with pytest.raises(
        UserError, match=r"which column holds the images\?.*a \(binary\), b \(binary\)"
    ):
        open_dataset(str(tmp_path))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="x.parquet is damaged or not a parquet file"):
        open_dataset(str(tmp_path))


def test_captions_of_parquet_are_those_of_the_rows_that_are_read(tmp_path):
    pa = pytest.importorskip(
        "pyarrow", reason="parquet data sets need pyarrow (pip install pyarrow)"
    )
    import pyarrow.parquet as pq

    data = rows(9)
    data[4] = data[4][:300]  # unreadable: the rows behind it move up
    first = {"image": data[:6], "tags": ["a"] * 6}
    first["caption"] = ["One, TWO.", None, " Zoë ", "", "of a picture that is damaged", "six"]
    pq.write_table(pa.table(first), tmp_path / "0.parquet", row_group_size=4)
    pq.write_table(pa.table({"image": data[6:8], "tags": ["b"] * 2}), tmp_path / "1.parquet")
    last = {"image": data[8:], "tags": ["c"], "caption": pa.array(["nine"]).dictionary_encode()}
    pq.write_table(pa.table(last), tmp_path / "2.parquet")
    source = open_dataset(str(tmp_path), resolution=32, holdout=0).source
    assert source.captions() == ["One, TWO.", "", "Zoë", "", "six", "", "", "nine"]
    assert source.tags == [("a",)] * 5 + [("b",)] * 2 + [("c",)]


def test_parquet_drops_no_tags_and_no_files_in_silence(tmp_path):
    pa = pytest.importorskip(
        "pyarrow", reason="parquet data sets need pyarrow (pip install pyarrow)"
    )
    import pyarrow.parquet as pq

    file = tmp_path / "x.parquet"
    text = ["a, b", "c", None]
    for column in (
        pa.array(text).dictionary_encode(),
        pa.array(text, pa.string_view()),
        pa.ListArray.from_arrays([0, 2, 3, 3], pa.array(list("abc")).dictionary_encode()),
    ):
        pq.write_table(pa.table({"image": rows(3), "tags": column}), file)
        assert open_dataset(str(tmp_path), resolution=32, holdout=0).source.tags == [
            ("a", "b"),
            ("c",),
            (),
        ]
    pq.write_table(pa.table({"image": rows(3), "tags": [1, 2, 3]}), file)
    assert (
        "no tags are read from the column tags (int64)"
        in open_dataset(str(tmp_path), resolution=32, holdout=0).report
    )
    pq.write_table(pa.table({"image": rows(3), "tags": [1, 2, 3], "text": ["a", "b", "c"]}), file)
    assert open_dataset(str(tmp_path), resolution=32, holdout=0).source.tags == [
        ("a",),
        ("b",),
        ("c",),
    ]
    pq.write_table(pa.table({"image": rows(3), "tags": [["a"], ["b", None], []]}), file)
    with pytest.raises(
        UserError, match="x.parquet:1, column tags: tags are text or a list of texts, got"
    ):
        open_dataset(str(tmp_path))
    captions = pa.table({"image": rows(3), "tags": ["a", "b", "c"], "caption": [["x"], ["y"], []]})
    pq.write_table(captions, file)
    source = open_dataset(str(tmp_path), resolution=32, holdout=0).source
    kind = "list<element: string>"
    said = f"x.parquet: no captions are read from the column caption ({kind}), no text"
    assert said in source.notes and source.captions() == [""] * 3
    offsets = pa.array([0, 2, 4, 4], pa.int32()).buffers()[1]
    broken = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"\xff\xfeok"))
    table = pa.table({"image": rows(3), "tags": ["a", "b", "c"], "caption": broken})
    pq.write_table(table, file)
    source = open_dataset(str(tmp_path), resolution=32, holdout=0).source
    with pytest.raises(UserError, match="x.parquet is damaged or not a parquet file .*utf-8"):
        source.captions()
    pq.write_table(pa.table({"image": rows(3)}), file)
    for name in ("a.tif", "b.zip", "c.md", "metadata.jsonl", "d.txt", "d.caption"):
        (tmp_path / name).write_text("?")
    report = open_dataset(str(tmp_path), resolution=32, holdout=0).report
    assert (
        "4 found = 3 used + 0 held out + 0 left out by stage=standard + 1 unreadable" in report
        and "a.tif (.tif files are not read)" in report
    )
    assert (
        "1 archives" in report
        and "first: c.md" in report
        and "3 files of tags or captions beside parquet, not read (first: d.caption)" in report
    )


def test_a_damaged_row_group_is_named_and_the_rest_is_used(tmp_path, monkeypatch):
    pa = pytest.importorskip(
        "pyarrow", reason="parquet data sets need pyarrow (pip install pyarrow)"
    )
    import pyarrow.parquet as pq

    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": rows(9), "text": list("abcdefghi")}), file, row_group_size=3)
    pages = pq.ParquetFile(file).metadata.row_group(1).column(0)
    data = bytearray(file.read_bytes())
    start = pages.dictionary_page_offset or pages.data_page_offset
    data[start : start + 30] = b"\xff" * 30
    monkeypatch.setattr(sources, "IN_MEMORY", 0)
    whole = open_dataset(str(tmp_path), resolution=32, holdout=0)
    file.write_bytes(data)
    sources.row_group.cache_clear()
    ds = open_dataset(str(tmp_path), resolution=32, holdout=0)
    assert (
        "9 found = 6 used + 0 held out + 0 left out by stage=standard + 3 unreadable" in ds.report
    )
    assert [t for (t,) in ds.source.tags] == list("abcghi") and ds.source.unreadable[
        "x.parquet:4"
    ].startswith("row group 1 is damaged")
    assert torch.equal(ds.image(3), whole.image(6))
    sources.row_group.cache_clear()
    with pytest.raises(
        UserError,
        match="x.parquet:4: row group 1 is damaged.*could be read when the data was opened",
    ):
        list(batches(Stream(whole, None, (2, 4, 4), 0), iter([list(range(9))]), 2))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="pip install pyarrow"):
        open_dataset(str(tmp_path))
