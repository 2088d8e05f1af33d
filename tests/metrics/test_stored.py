"""Sets of images and their features on disk: computed once, found again, whole after a kill."""

import os
import random
import shutil
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import eval_fid
from data.dataset import open_dataset
from folders import pictures
from harness.cli import UserError
from harness.files import write_tensors
from harness.ranks import Ranks
from metrics.distances import Statistics, frechet
from metrics.features import CHUNK, compute, extract, fit_extractor, open_images, short, split_spec

ALONE = Ranks(0, 1, torch.device("cpu"))


def numbered(chunk):
    """Features that say which image they are of."""
    return torch.arange(chunk.start, chunk.stop).float()[:, None].expand(-1, 3)


# ---- features on disk ---------------------------------------------------------------------------


def test_a_kill_loses_one_chunk_at_most(tmp_path):
    n, made = 3 * CHUNK + 10, []

    def produce(chunk):
        made.append(chunk.start)
        if len(made) == 3:
            raise KeyboardInterrupt
        return numbered(chunk)

    def stored(name, index):
        return compute(tmp_path / name, n, index, produce, ALONE, {}, "x")

    with pytest.raises(KeyboardInterrupt):
        stored("c", np.arange(n))
    rows = stored("c", np.arange(n)).rows()
    assert made == [0, CHUNK, 2 * CHUNK, 2 * CHUNK, 3 * CHUNK]
    assert torch.equal(rows[:, 0], torch.arange(n).float())
    files = sorted((tmp_path / "c").glob("*.safetensors"))
    files[1].write_bytes(files[1].read_bytes()[:-100])  # a disk that lost something
    stored("c", np.arange(n))
    assert made[5:] == [CHUNK]
    stored("c", np.array([5, 3 * CHUNK + 1]))
    assert len(made) == 6
    sparse = stored("d", np.array([3 * CHUNK + 1, 5]))  # only chunks that are asked for
    assert made[6:] == [0, 3 * CHUNK] and sparse.rows()[:, 0].tolist() == [5, 3 * CHUNK + 1]


def test_a_damaged_chunk_that_nobody_asks_for_does_no_harm(tmp_path):
    n = 2 * CHUNK
    compute(tmp_path, n, np.arange(n), numbered, ALONE, {}, "x")
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-100])
    last = compute(tmp_path, n, np.arange(CHUNK, n), numbered, ALONE, {}, "x")
    assert last.statistics(ALONE)[0].n == CHUNK


def test_a_digit_of_what_is_kept_beside_features_does_not_change_silently(tmp_path):
    """The evaluations that samples took stand in a card."""
    made = []

    def stored():
        def produce(chunk):
            made.append(chunk.start)
            return numbered(chunk)

        def notes(chunk):
            return {"nfe": 50.25}

        return compute(tmp_path, 8, np.arange(8), produce, ALONE, {}, "x", notes).notes()

    assert stored() == [{"nfe": 50.25}] == stored() and made == [0]
    (file,) = tmp_path.glob("*.safetensors")
    data = file.read_bytes()
    assert data.count(b"50.25") == 1
    file.write_bytes(data.replace(b"50.25", b"51.25"))
    assert stored() == [{"nfe": 50.25}] and made == [0, 0]


def whole(tmp_path, capsys):
    """Features of 300 images in two chunks -> (a call that gives them, their files)."""
    n = CHUNK + 44

    def stored(name="c", what={"of": 1}):
        found = compute(tmp_path / name, n, np.arange(n), numbered, ALONE, what, "x").rows()
        return found, capsys.readouterr().out

    rows, said = stored()
    assert torch.equal(rows, numbered(range(n))) and said == ""
    return stored, sorted((tmp_path / "c").glob("*.safetensors"))


def test_a_flipped_bit_anywhere_in_cached_features_is_found_or_changes_nothing(tmp_path, capsys):
    """Positions in header and data, and files that a kill cut short: made anew, and said."""
    stored, paths = whole(tmp_path, capsys)
    r, found = random.Random(0), 0
    for _ in range(50):
        path = r.choice(paths)
        data = bytearray(path.read_bytes())
        at = r.randrange(r.choice((600, len(data))))
        data[at] ^= 1 << r.randrange(8)
        path.write_bytes(data)
        rows, said = stored()
        assert torch.equal(rows, numbered(range(CHUNK + 44)))
        found += "1 files of features are damaged, of something else, or older" in said
        assert stored()[1] == ""
    assert found > 40
    for size in (0, 7, 300, paths[0].stat().st_size - 1):
        os.truncate(paths[0], size)
        assert "are made anew" in stored()[1]


def test_features_of_something_else_in_their_place_are_made_anew(tmp_path, capsys):
    stored, paths = whole(tmp_path, capsys)
    other, _ = stored("d", {"of": 2})  # the same names and shapes, of another network
    shutil.copy(tmp_path / "d" / paths[0].name, paths[0])
    assert "are made anew" in stored()[1] and stored()[1] == ""
    two = tmp_path / "two"
    compute(two, 2 * CHUNK, np.arange(2 * CHUNK), numbered, ALONE, {}, "x")
    a, b = sorted(two.glob("*.safetensors"))
    shutil.copy(a, b)  # the same key and shape, of other images
    rows = compute(two, 2 * CHUNK, np.arange(2 * CHUNK), numbered, ALONE, {}, "x").rows()
    assert torch.equal(rows, numbered(range(2 * CHUNK)))


def test_features_that_an_older_version_kept_are_not_used(tmp_path, capsys):
    """It drew a broken network's images in black, and kept their features."""
    stored, paths = whole(tmp_path, capsys)
    black = torch.ones(CHUNK, 3)
    write_tensors(paths[0], {"features": black}, {"kind": "features", "of": {"of": 1}})
    rows, said = stored()
    assert torch.equal(rows[:CHUNK], numbered(range(CHUNK)))
    assert "1 files of features are damaged" in said and "older than their fingerprints" in said


def test_features_that_are_damaged_between_their_making_and_their_use_are_refused(tmp_path):
    stored = compute(tmp_path, 9, np.arange(9), numbered, ALONE, {}, "x")
    path = next(tmp_path.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged since it was written.*Run the same command again"):
        stored.rows()


def test_what_a_kill_left_half_written_is_swept_and_nothing_else(tmp_path, capsys):
    stored, paths = whole(tmp_path, capsys)
    folder = tmp_path / "c"
    names = [f".{paths[0].name}.12.tmp", ".what.json.77.tmp", ".mine.tmp", "notes.12.tmp"]
    for name in names:
        (folder / name).write_text("half")
    stored()
    assert all((folder / name).exists() for name in names)  # perhaps it is being written
    for name in names:
        os.utime(folder / name, (1, 1))
    _, said = stored()
    assert [(folder / name).exists() for name in names] == [False, False, True, True]
    assert said == ""


def test_what_is_noted_beside_features_is_kept_with_them(tmp_path):
    def stored(note):
        n = CHUNK + 1
        return compute(tmp_path, n, np.arange(n), numbered, ALONE, {}, "x", note)

    wanted = [{"nfe": 0.5}, {"nfe": 128.5}]
    assert stored(lambda chunk: {"nfe": chunk.start / 2 + 0.5}).notes() == wanted
    assert stored(lambda chunk: {}).notes() == wanted


def test_file_order_and_grouping_change_nothing(tmp_path):
    a = pictures(tmp_path / "a", 70)
    shuffled = tmp_path / "b"
    shuffled.mkdir()
    names = np.random.default_rng(1).permutation(70)
    for i, j in enumerate(names):
        (shuffled / f"{i:04d}.png").write_bytes((a / f"{j:04d}.png").read_bytes())
    images = open_images(str(a))
    extractor = fit_extractor(images)
    rows = extract(images, extractor, tmp_path / "f", ALONE).rows()
    far = pictures(tmp_path / "c", 30, seed=9)
    values = []
    for folder in (a, shuffled):
        cfg = eval_fid.Config(
            fake=str(folder), ref=str(far), features="pca", cache=str(tmp_path / "g")
        )
        values.append(eval_fid.evaluate(cfg, ALONE)["metrics"]["FD-pca70"]["value"])
    # On some CPUs features in fp32 round by their place in a batch.
    assert values[0] == pytest.approx(values[1], rel=1e-7)
    stored = extract(images, extractor, tmp_path / "f", ALONE)
    for groups in (1, 3, 10):
        parts = stored.statistics(ALONE, groups)
        assert frechet(sum(parts[1:], parts[0]), Statistics.of(rows)) < 1e-10
        assert [p.n for p in parts] == [len(range(g, 70, groups)) for g in range(groups)]


def test_subsets_by_tag_share_features_and_subtract(tmp_path):
    images = open_images("toyfaces:150", 32)
    extractor = fit_extractor(images)
    everything = extract(images, extractor, tmp_path, ALONE)
    part, rest = images.where("glasses"), images.where("!(glasses)")
    assert 0 < len(part) < 150 and len(part) + len(rest) == 150

    def times():
        return sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors"))

    before = times()
    stored = [extract(subset, extractor, tmp_path, ALONE) for subset in (part, rest)]
    assert times() == before  # nothing was computed again
    whole, one, two = (each.statistics(ALONE)[0] for each in (everything, *stored))
    left = whole - one
    gap = (left.scatter - two.scatter).abs().max()
    assert left.n == two.n and gap < 1e-10 * two.scatter.abs().max()
    again = open_images("toyfaces:150:glasses", 32)
    assert again.index.tolist() == part.index.tolist()
    assert "glasses" not in images.table[int(rest.index[0])]


def test_any_callable_is_an_extractor(tmp_path):
    def mean_colour(images):
        return images.float().mean((2, 3))

    sets = []
    for seed in (1, 2):
        images = open_images(str(pictures(tmp_path / str(seed), 30, seed=seed)))
        sets.append(extract(images, mean_colour, tmp_path / "f", ALONE))
    x, y = sets
    sides = eval_fid.side(y, ALONE, 10), eval_fid.side(x, ALONE)
    metrics = eval_fid.measure(*sides, None, "colour")
    expected = frechet(Statistics.of(x.rows()), Statistics.of(y.rows()))
    assert metrics["FD-colour30"]["value"] == pytest.approx(expected, rel=1e-9)


def test_features_that_are_not_numbers_are_refused(tmp_path):
    images = open_images(str(pictures(tmp_path / "x", 4)))
    rows = torch.tensor([[1.0], [2.0], [float("nan")], [3.0]])
    with pytest.raises(UserError, match="features of .*1 of 4 rows are not finite"):
        extract(images, lambda x: rows, tmp_path / "f", ALONE)
    assert not list(tmp_path.rglob("*.safetensors"))


# ---- sets of images -----------------------------------------------------------------------------


def test_specs_fall_apart_at_the_right_colon(tmp_path):
    (tmp_path / "a:b").mkdir()
    assert split_spec("toyfaces:2000:character:nova") == ("toyfaces:2000", "character:nova")
    assert split_spec("toyfaces:a | b") == ("toyfaces", "a | b")
    assert split_spec("robohash") == ("robohash", "")
    assert split_spec(f"{tmp_path}/a:b:x:y") == (f"{tmp_path}/a:b", "x:y")
    assert split_spec("hf:org/name:hat") == ("hf:org/name", "hat")
    assert [short(n) for n in (500, 2048, 10_000, 50_000)] == ["500", "2048", "10k", "50k"]


def test_an_image_at_its_own_size_is_not_touched(tmp_path):
    r = np.random.default_rng(0)
    for i in range(2):
        image = Image.fromarray(r.integers(0, 256, (24, 40, 3), dtype=np.uint8))
        image.save(tmp_path / f"{i}.png")
    images = open_images(str(tmp_path))
    for i in range(2):
        assert np.array_equal(images.load(i), np.asarray(Image.open(tmp_path / f"{i}.png")))


def test_pictures_that_are_turned_by_exif_count_as_they_are_seen(tmp_path):
    for i, turn in enumerate((1, 6)):
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.new("RGB", (40, 24), "red").save(tmp_path / f"{i}.jpg", exif=exif)
    with pytest.raises(UserError, match="mixes image sizes"):
        open_images(str(tmp_path)).batch([0, 1])


def bomb(path, side):
    """A PNG whose header says side × side; its one row of bytes is never reached."""

    def chunk(kind, data):
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    size = side.to_bytes(4, "big") * 2
    head = chunk(b"IHDR", size + b"\x08\x02\0\0\0")
    rest = chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + rest)


@pytest.mark.parametrize("side", [10_000, 60_000])  # above Pillow's line of warning, and of error
@pytest.mark.parametrize("resolution", [0, 32])
def test_a_decompression_bomb_is_refused_by_its_header_as_in_training(
    tmp_path, capsys, side, resolution
):
    folder = pictures(tmp_path / "x", 4)
    bomb(folder / "bomb.png", side)
    images = open_images(str(folder), resolution)
    trained = open_dataset(str(folder), resolution=32, holdout=0)
    assert len(images) == len(trained) == 4 and images.unreadable == 1
    assert "over 89 megapixels" in trained.source.unreadable["bomb.png"]
    report = capsys.readouterr().err
    assert "bomb.png (" in report and "over 89 megapixels)" in report
    for path in folder.glob("*.png"):
        bomb(path, side)
    with pytest.raises(UserError, match="none of the 5 images .*over 89 megapixels"):
        open_images(str(folder), resolution)
