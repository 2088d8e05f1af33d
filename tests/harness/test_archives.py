"""An npz of a stranger holds numbers or is refused, before memory is taken for what it claims."""

import io
import os
import socket
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from ckpt.containers import open_weights
from harness.archives import read_npz
from harness.cli import UserError
from harness.files import TENSORS, open_safetensors
from harness.reading import open_file, read_file


def npy(value):
    file = io.BytesIO()
    np.save(file, value, allow_pickle=True)
    return file.getvalue()


def header(text, version=(1, 0)):
    data = text.encode() + b"\n"
    size = struct.pack("<H" if version == (1, 0) else "<I", len(data))
    return b"\x93NUMPY" + bytes(version) + size + data


def npz(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as box:
        for name, data in members:
            box.writestr(name, data)
    return path


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(4, dtype=">f8"), np.arange(4, dtype=">i2").reshape(2, 2), np.float32(3),
        np.zeros((0, 3)), np.array([True, False]), np.arange(6, dtype="<u4")[::2],
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_order_of_numbers_is_read_as_numpy_reads_it(value, save, tmp_path):
    save(tmp_path / "x.npz", a=value, other=1)
    names, arrays = read_npz(tmp_path / "x.npz", ["a", "none"])
    assert sorted(names) == ["a", "other"] and list(arrays) == ["a"]
    assert np.array_equal(arrays["a"], value) and arrays["a"].shape == np.shape(value)
    assert arrays["a"].dtype == value.dtype.newbyteorder("=")
    torch.from_numpy(np.asarray(arrays["a"]))


def good(shape="(2,)", descr="'<f8'", order="False"):
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


HEADERS = {
    "no dictionary": "not python",
    "open": "{'descr': '<f8'",
    "deep": "(" * 2000,
    "calls": "__import__('os')",
    "keys": "{'descr': '<f8'}",
    "huge": good("(10**9, 10**9)"),
    "very large": good("(1000000000000,)"),
    "negative": good("(-1,)"),
    "words": good("('a',)"),
    "float": good("(2.0,)"),
    "short": good("(3,)"),
    "long": good("(1,)"),
    "object": good(descr="'|O'"),
    "text": good(descr="'<U2'"),
    "fields": good(descr="[('a', '<f8')]"),
    "times": good(descr="'<M8[s]'"),
    "complex": good("(1,)", descr="'<c16'"),
    "odd type": good(descr="'<q99'"),
    "order": good(order="7"),
}


@pytest.mark.parametrize("text", HEADERS.values(), ids=HEADERS)
def test_a_header_that_lies_takes_no_memory(text, tmp_path):
    path = npz(tmp_path / "x.npz", [("a.npy", header(text) + bytes(16))])
    tracemalloc.start()
    with pytest.raises(UserError, match="x.npz cannot be read as npz .*Make it anew") as caught:
        read_npz(path, ["a"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6 and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def spoilt(path, how):
    if how == "a bomb":
        big = npy(np.zeros(9 * 2**20))  # 75 MB
        return npz(path, [("a.npy", big)], zipfile.ZIP_DEFLATED)
    if how == "bzip2":
        return npz(path, [("a.npy", npy(np.ones(3)))], zipfile.ZIP_BZIP2)
    if how == "lzma":
        return npz(path, [("a.npy", npy(np.ones(3)))], zipfile.ZIP_LZMA)
    if how == "twice":
        with pytest.warns(UserWarning):
            return npz(path, [("a.npy", npy(np.ones(3))), ("a.npy", npy(np.zeros(3)))])
    if how == "objects":
        return npz(path, [("a.npy", npy(np.array([{}], object)))])
    if how == "no array":
        return npz(path, [("a.npy", b"")])
    if how == "one array":
        path.write_bytes(npy(np.ones(3)))
        return path
    data = bytearray(npz(path, [("a.npy", npy(np.ones(3)))]).read_bytes())
    place = data.index(b"PK\1\2")
    if how == "encrypted":
        data[6] |= 1
        data[place + 8] |= 1
    elif how == "a flipped bit":
        data[data.index(b"\n") + 5] ^= 1
    elif how == "cut":
        del data[-30:]
    elif how == "over each other":
        data[place + 20 : place + 28] = struct.pack("<II", 10**6, 10**6)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "how, what",
    [
        ("a bomb", "would unpack from"),
        ("bzip2", "compressed by bzip2"),
        ("lzma", "compressed by lzma"),
        ("twice", "stands in it twice"),
        ("objects", "wanted numbers"),
        ("no array", "does not parse"),
        ("one array", "holds one array"),
        ("encrypted", "is encrypted"),
        ("a flipped bit", "CRC"),
        ("cut", "not a zip file"),
        ("over each other", "lie over each other"),
    ],
)
def test_a_zip_that_is_not_plain_is_one_line(how, what, tmp_path):
    path = spoilt(tmp_path / "x.npz", how)
    with pytest.raises(UserError, match=what):
        read_npz(path, ["a"])


def test_a_pickle_that_was_zipped_again_says_what_to_do(tmp_path):
    torch.save({"w": torch.arange(1000.0)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as box:
        members = [(name, box.read(name)) for name in box.namelist()]
    path = npz(tmp_path / "b.pt", members, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="b.pt was zipped again.*zip -0"):
        open_weights(path)
    again = npz(tmp_path / "c.pt", members)
    assert torch.equal(open_weights(again)["w"], torch.arange(1000.0))


def safetensors(path, head):
    path.write_bytes(struct.pack("<Q", len(head)) + head)
    return path


def test_a_header_of_a_million_tensors_is_refused_at_once(tmp_path):
    entry = '"{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    for n, what in ((TENSORS + 1, "more than 100,000 tensors"), (10**6, "a header of")):
        head = "{" + ",".join(entry.format(i) for i in range(n)) + "}"
        path = safetensors(tmp_path / "x.safetensors", head.encode())
        with pytest.raises(UserError, match=what):
            open_safetensors(path)
    nested = safetensors(tmp_path / "y.safetensors", b"[" * 10**6 + b"]" * 10**6)
    with pytest.raises(UserError, match="more than"):
        open_safetensors(nested)


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "folder"])
def test_what_only_looks_like_a_file_does_not_hang(kind, tmp_path, monkeypatch):
    path = tmp_path / "x"
    monkeypatch.chdir(tmp_path)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        server = socket.socket(socket.AF_UNIX)
        server.bind("x")  # such an address is at most 108 bytes long
        server.close()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    for read in (open_file, read_file, lambda p: read_npz(p, ["a"])):
        with pytest.raises(UserError, match="wanted a file"):
            read(path)
