"""The list of a folder's files: what is not what was written is named, whatever happened to it."""

import hashlib
import os
import time

import pytest

import harness.files as files
from harness.cli import UserError
from harness.files import DIGESTS, check_digest, digest, fault, read_digests, write_digests
from harness.files import write_tensors


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "b.json").write_text('{"x": 1}')
    write_digests(tmp_path, ["a.bin", "b.json"], run="r", images=80)
    return tmp_path


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)


def test_a_list_has_the_sha256_of_each_file_and_what_it_is_of(folder):
    wanted = hashlib.sha256((folder / "a.bin").read_bytes()).hexdigest()
    assert digest(folder / "a.bin") == wanted == read_digests(folder).files["a.bin"]
    assert read_digests(folder).of == {"run": "r", "images": 80}
    assert fault(folder / "a.bin") == fault(folder / "b.json") == ""
    check_digest(folder / "a.bin", do="Nothing.")


def remove(path):
    path.unlink()


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def replace(path):
    """The same size and time, other bytes."""
    stat, data = path.stat(), path.read_bytes()
    path.unlink()
    path.write_bytes(data[::-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


DAMAGE = {
    "one bit": (lambda path: flip(path, 5_000), "is damaged, or of another run or step"),
    "half of it": (lambda path: path.write_bytes(path.read_bytes()[:99]), "is damaged, or of"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged, or of another"),
    "another of its size": (replace, "is damaged, or of another"),
    "gone": (remove, "is missing"),
    "a folder": (lambda path: (remove(path), path.mkdir()), "is missing"),
    "a pipe, which would never end": (pipe, "is missing"),
    "a link to nothing": (lambda path: (remove(path), path.symlink_to("none")), "is missing"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_listed_file_that_is_another_is_refused_by_name(folder, how):
    damage, words = DAMAGE[how]
    path = folder / "a.bin"
    assert fault(path) == ""  # read once already
    damage(path)
    assert str(path) in fault(path) and words in fault(path)
    with pytest.raises(UserError, match="Take the copy"):
        check_digest(path, do="Take the copy.")
    assert fault(folder / "b.json") == ""


def test_one_bit_anywhere_in_the_list_is_noticed_or_changes_nothing(folder):
    path = folder / DIGESTS
    whole, good = read_digests(folder), path.read_bytes()
    for at in range(0, 8 * len(good), 37):
        flip(path, at)
        try:
            assert read_digests(folder) == whole, at
        except UserError as error:
            assert DIGESTS in str(error), at
        path.write_bytes(good)


def test_an_old_file_is_read_once_and_a_changed_one_again(folder, monkeypatch):
    path, read = folder / "a.bin", []
    monkeypatch.setattr(files, "digest", lambda path: read.append(path) or digest(path))
    fault(path), fault(path)
    assert len(read) == 2  # so fresh that a change might have the same time
    now = time.time_ns()
    monkeypatch.setattr(files.time, "time_ns", lambda: now + 2 * 10**9)
    fault(path), fault(path)
    assert len(read) == 3
    time.sleep(0.02)
    replace(path)
    assert "is damaged" in fault(path) and len(read) == 4


def test_files_without_a_list_and_files_beside_one_are_read_as_ever(folder, tmp_path):
    (folder / "mine.txt").write_text("x")
    (folder / "alone").mkdir()
    lone = folder / "alone" / "a.bin"
    lone.write_bytes(b"other")
    assert fault(folder / "mine.txt") == fault(lone) == ""
    assert read_digests(folder / "alone") == ({}, {})


@pytest.mark.parametrize(
    "meta",
    [
        {"of": {}, "files": {"../a.bin": "0"}},  # a name is no path
        {"of": {}, "files": {"a.bin": 0}},
        {"of": [], "files": {}},
        {"files": {}},
        {},
    ],
)
def test_what_is_no_list_is_refused(folder, meta):
    write_tensors(folder / DIGESTS, {}, meta)
    with pytest.raises(UserError, match="is not a list of files"):
        fault(folder / "a.bin")
    (folder / DIGESTS).unlink()
    (folder / DIGESTS).symlink_to("nothing")
    with pytest.raises(UserError, match="is not a file"):
        fault(folder / "a.bin")
