"""Ways to damage a file: its bytes, what it says of itself, and what lies in its place.

damage(path, r) changes one file and says how. r: a random.Random, from which all choices come.
"""

import hashlib
import io
import json
import os
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# What may stand in the place of any JSON value, any cell and any flag.
ODD = [
    None, True, False, 0, -1, 1, 3, 0.5, -0.5, 1e30, -1e30, 10**12, 2**63, 10**400, "", "x", "0",
    "nan", "²", "\ud800", "a" * 200_000, "../../etc/passwd", "/dev/zero", "hf:evil-org/x", "\0",
    [], {}, [[]], [0], [-1, 1e30], [None], ["x"] * 3, {"x": {}}, {"": None}, "1,2", "\u202e",
    float("nan"), float("inf"),
]  # fmt: skip


def replaced(path: Path, data: bytes) -> None:
    """Other bytes under the name. The file itself may be a link to one that others use."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


# ---- bytes --------------------------------------------------------------------------------------


def damaged(data: bytes, r: random.Random) -> tuple[bytes, str]:
    """Other bytes, and what was done to them."""
    place = r.choice([r.randrange(len(data)), r.randrange(min(len(data), 4096))])
    size = r.choice([1, 8, 512, 65536])
    end = place + size
    block = data[place:end]
    noise = r.randbytes(len(block))
    number = struct.pack("<Q", r.choice([0, 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1]))
    flipped = bytes([data[place] ^ 1 << r.randrange(8)])
    ways = {
        f"bit flipped in byte {place}": data[:place] + flipped + data[place + 1 :],
        f"cut at {place}": data[:place],
        f"{size} bytes from {place} zeroed": data[:place] + bytes(len(block)) + data[end:],
        f"{size} bytes from {place} random": data[:place] + noise + data[end:],
        f"{size} bytes from {place} twice": data[:end] + block + data[end:],
        f"{size} bytes from {place} gone": data[:place] + data[end:],
        f"a number of 8 bytes at {place}": data[:place] + number + data[place + 8 :],
        "another number in front": number + data[8:],
        "half a page behind": data + noise,
        "a page in front": noise + data,
    }
    how = r.choice(list(ways))
    return ways[how], how


# ---- JSON ---------------------------------------------------------------------------------------


def containers(value: Any) -> list[Any]:
    """Every object and list of a JSON value that is not empty."""
    if not isinstance(value, dict | list) or not value:
        return []
    parts = value.values() if isinstance(value, dict) else value
    return [value, *(each for part in parts for each in containers(part))]


def edited(value: Any, r: random.Random) -> tuple[Any, str]:
    """A JSON value with one part that is another, gone, or more."""
    value = json.loads(json.dumps(value))
    found = containers(value)
    if not found or r.random() < 0.03:
        other = r.choice(ODD)
        return other, f"all of it {str(other)[:40]!r}"
    parent = r.choice(found)
    key = r.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    way = r.choice(["other", "other", "other", "gone", "more", "nested"])
    if way == "gone":
        del parent[key]
        return value, f"{key!r} gone"
    if way == "more" and isinstance(parent, dict):
        parent[r.choice(["x", "", "sha256", "__proto__", "config"])] = r.choice(ODD)
        return value, f"one more beside {key!r}"
    if way == "nested":
        parent[key] = [parent[key]]
        return value, f"{key!r} in a list"
    parent[key] = r.choice(ODD)
    return value, f"{key!r} = {str(parent[key])[:40]!r}"


def json_text(value: Any, r: random.Random) -> tuple[str, str]:
    """An edited value as text; now and then text that is hard to read."""
    value, how = edited(value, r)
    text = json.dumps(value)
    odd = {
        "100,000 lists in each other": "[" * 100_000 + "]" * 100_000,
        "a key twice": text[:-1] + ',"version":1,"version":2}' if text[:1] == "{" else text,
        "a byte order mark": "\ufeff" + text,
    }
    if r.random() < 0.06:
        how = r.choice(list(odd))
        text = odd[how]
    return text, how


def checksum(value: dict[str, Any]) -> str:
    """What data.cache.sealed() puts into a JSON object."""
    rest = {key: part for key, part in value.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def seal(path: Path, value: dict[str, Any]) -> None:
    """A JSON file with a checksum of its own."""
    sealed = {**value, "sha256": checksum(value)}
    replaced(path, (json.dumps(sealed, indent=1, sort_keys=True) + "\n").encode())


def edit_json(path: Path, r: random.Random) -> str:
    """A JSON file with another value in it, under a checksum that fits, if it had one."""
    value = json.loads(path.read_bytes())
    if not isinstance(value, dict) or value.get("sha256") != checksum(value):
        text, how = json_text(value, r)
        replaced(path, text.encode("utf-8", "surrogatepass"))
        return how
    value.pop("sha256", None)
    value, how = edited(value, r)
    if isinstance(value, dict):
        seal(path, value)
        return f"{how}, sealed again"
    replaced(path, json.dumps(value).encode())
    return how


def edit_lines(path: Path, r: random.Random) -> str:
    """A file of JSON lines with another value in one of them."""
    lines = path.read_bytes().splitlines(keepends=True)
    number = r.randrange(len(lines))
    text, how = json_text(json.loads(lines[number]), r)
    lines[number] = text.encode("utf-8", "surrogatepass") + b"\n"
    replaced(path, b"".join(lines))
    return f"line {number}: {how}"


def edit_text(path: Path, r: random.Random) -> str:
    """A text with an odd word in place of one of its own."""
    data = path.read_bytes()
    words = data.split(b",")
    number = r.randrange(len(words))
    other = r.choice([str(r.choice(ODD)).encode("utf-8", "surrogatepass"), b"\xff\xfe", b'"'])
    words[number] = other
    replaced(path, b",".join(words))
    return f"word {number} = {other[:40]!r}"


# ---- safetensors, npz and pickles ---------------------------------------------------------------


def opened(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its tensors' bytes."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_notes(header: dict[str, Any], notes: Any, tensors: bytes = b"") -> bytes:
    """A safetensors file of ours with other metadata, under a checksum that fits."""
    text = json.dumps(notes)
    digest = hashlib.sha256(text.encode()).hexdigest()
    meta = {**header["__metadata__"], "twinpath": text, "twinpath_sha256": digest}
    head = json.dumps({**header, "__metadata__": meta}).encode()
    return struct.pack("<Q", len(head)) + head + tensors


def edit_header(path: Path, r: random.Random) -> str:
    """A safetensors file whose header or metadata is another, under a checksum that fits."""
    header, tensors = opened(path)
    notes = header.get("__metadata__", {}).get("twinpath")
    if notes and r.random() < 0.7:
        value, how = edited(json.loads(notes), r)
        replaced(path, with_notes(header, value, tensors))
        return f"metadata: {how}"
    if r.random() < 0.05:
        how = "100,000 tensors of no bytes"
        entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        text = json.dumps({f"t{i}": entry for i in range(100_000)})
    else:
        text, how = json_text(header, r)
    head = text.encode("utf-8", "surrogatepass")
    replaced(path, struct.pack("<Q", len(head)) + head + tensors)
    return f"header: {how}"


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as box:
        return {name: box.read(name) for name in box.namelist()}


def edit_zip(path: Path, r: random.Random) -> str:
    """An npz or a .pt whose members are packed otherwise, gone, doubled or damaged inside."""
    parts = members(path)
    name = r.choice(list(parts))
    way = r.choice(
        ["inside", "inside", "inside", "deflated", "gone", "renamed", "encrypted", "bomb"]
    )
    level = zipfile.ZIP_DEFLATED if way in ("deflated", "bomb") else zipfile.ZIP_STORED
    how = f"{way}: {name}"
    if way == "inside" and parts[name]:
        parts[name], inside = damaged(parts[name], r)
        how = f"{name}: {inside}"
    elif way == "gone":
        del parts[name]
    elif way == "renamed":
        parts[f"../{name}"] = parts.pop(name)
    elif way == "bomb":
        parts[name] = parts[name][:128] + bytes(300_000_000)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", level) as box:
        for each, content in parts.items():
            box.writestr(each, content)
    data = bytearray(buffer.getvalue())
    if way == "encrypted":
        for sign, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            place = data.find(sign)
            data[place + offset] |= 1
    replaced(path, bytes(data))
    return how


def odd_array(r: random.Random) -> tuple[bytes, str]:
    """The bytes of a .npy file that is not what was wanted."""
    arrays = {
        "objects": np.array([{}, None], object),
        "words": np.array(["a", "b"]),
        "complex": np.ones((4, 32, 32, 3), complex),
        "NaN": np.full((512, 512), np.nan),
        "a number": np.array(3),
        "nothing": np.zeros((0, 32, 32, 3), np.uint8),
        "records": np.zeros(3, [("a", "i4"), ("b", "f8")]),
        "dates": np.zeros(3, "datetime64[s]"),
        "one row": np.ones(512),
        "grey": np.zeros((12, 32, 32), np.uint8),
    }
    headers = [
        "{'descr': '|u1', 'fortran_order': False, 'shape': (10000000, 10000, 10000, 3), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 32, 32, 3), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '<f8', 'fortran_order': 1, 'shape': 3, }",
        "{'descr': [('a', '<i4')], 'fortran_order': True, 'shape': (2**9,), }",
        "{'descr': '<f8', 'shape': (3,)}",
        "(" * 5000,
        "\ud800",
    ]
    how = r.choice([*arrays, *headers])
    if how in arrays:
        out = io.BytesIO()
        np.save(out, arrays[how], allow_pickle=True)
        return out.getvalue(), how
    text = how.encode("utf-8", "surrogatepass") + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(64), how[:60]


def edit_array(path: Path, r: random.Random) -> str:
    """An npy or npz with another array in it."""
    data, how = odd_array(r)
    if path.suffix == ".npy":
        replaced(path, data)
        return how
    parts = members(path)
    name = r.choice(list(parts))
    parts[name] = data
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as box:
        for each, content in parts.items():
            box.writestr(each, content)
    replaced(path, buffer.getvalue())
    return f"{name}: {how}"


def edit_parquet(path: Path, r: random.Random) -> str:
    """A parquet file with a column of another type, a column twice, or no rows."""
    images = pq.read_table(path)["image"].to_pylist()
    n = len(images)
    columns = {
        "numbers": pa.array(range(n)),
        "nulls": pa.nulls(n),
        "lists of numbers": pa.array([[1, 2]] * n),
        "dictionaries": pa.array([{"bytes": "x", "path": 3}] * n),
        "dictionaries without bytes": pa.array([{"path": "../x.png"}] * n),
        "empty bytes": pa.array([b""] * n),
        "text": pa.array(["\u202e²" * 50_000] * n),
        "few words": pa.array(["x"] * n).dictionary_encode(),
    }
    name = r.choice(list(columns))
    how = r.choice([f"images are {name}", f"tags are {name}", "images twice", "no rows"])
    arrays = {"image": pa.array(images), "tags": pa.array(["t"] * n)}
    if how.endswith(name):
        arrays["image" if how.startswith("images") else "tags"] = columns[name]
    table = pa.table(arrays)
    if how == "images twice":
        table = pa.Table.from_arrays([arrays["image"]] * 2, ["image"] * 2)
    elif how == "no rows":
        table = table.slice(0, 0)
    path.unlink()
    pq.write_table(table, path)
    return how


# ---- what lies in a file's place ----------------------------------------------------------------


def misplace(path: Path, r: random.Random) -> str:
    """Something else under the name of a file."""
    way = r.choice(
        ["gone", "empty", "folder", "fifo", "loop", "nowhere", "device", "zeros", "other"]
    )
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        size = path.stat().st_size
        path.unlink()
    makers: dict[str, Callable[[], Any]] = {
        "gone": lambda: None,
        "empty": lambda: path.write_bytes(b""),
        "folder": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "loop": lambda: path.symlink_to(path.name),
        "nowhere": lambda: path.symlink_to("nowhere"),
        "device": lambda: path.symlink_to("/dev/zero"),
        "zeros": lambda: path.write_bytes(bytes(size)),
        "other": lambda: path.write_text("<html>404</html>"),
    }
    makers[way]()
    return f"{way} in its place"


# ---- any file -----------------------------------------------------------------------------------

EDITS: dict[str, tuple[Callable[[Path, random.Random], str], ...]] = {
    ".json": (edit_json, edit_json, edit_json),
    ".jsonl": (edit_lines, edit_lines),
    ".csv": (edit_text, edit_text),
    ".txt": (edit_text,),
    ".safetensors": (edit_header, edit_header),
    ".npz": (edit_array, edit_zip),
    ".npy": (edit_array, edit_array),
    ".pt": (edit_zip, edit_zip),
    ".ckpt": (edit_zip,),
    ".parquet": (edit_parquet, edit_parquet),
}


def harm(path: Path, r: random.Random) -> str:
    """Bytes of a file changed below every checksum, or the file exchanged for something else."""
    data = path.read_bytes()
    if not data or r.random() < 0.2:
        return misplace(path, r)
    data, how = damaged(data, r)
    replaced(path, data)
    return how


def forge(path: Path, r: random.Random) -> str:
    """What a file says changed, as somebody would who writes such files: mostly under checksums
    that fit."""
    edits = EDITS.get(path.suffix)
    if not edits or not path.stat().st_size or zipless(path):
        return harm(path, r)
    how = r.choice(edits)(path, r)
    if r.random() < 0.8:
        sign_again(path)
    return how


def sign_again(path: Path) -> None:
    """What the files beside a forged one say of it, made to fit."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest, digests = path.with_name("manifest.json"), path.with_name("digests.safetensors")
    if path == manifest:
        value = json.loads(path.read_bytes())
        plan = value.get("plan") if isinstance(value, dict) else None
        if isinstance(plan, dict):
            seal(path.with_name("plan.json"), plan)
    elif manifest.is_file():
        value = json.loads(manifest.read_bytes())
        if path.name == "plan.json":
            seal(manifest, {**value, "plan": json.loads(path.read_bytes())})
        elif path.stem in value:
            seal(manifest, {**value, path.stem: digest})
    if digests.is_file() and path != digests:
        header, _ = opened(digests)
        notes = json.loads(header["__metadata__"]["twinpath"])
        if path.name in notes["files"]:
            notes["files"][path.name] = digest
            replaced(digests, with_notes(header, notes))


def zipless(path: Path) -> bool:
    """Does the name promise a zip that the file is not?"""
    return path.suffix in (".pt", ".ckpt", ".npz") and not zipfile.is_zipfile(path)
