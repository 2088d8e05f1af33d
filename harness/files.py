"""Tensors on disk: our safetensors, written atomically and read one tensor at a time.

    stream_tensors(path, {name: (dtype, shape)}, meta, get)     # one tensor in memory at a time
    box = open_safetensors(path)
    box["out.2.weight"]                # read now, alone; box.shape(name), box.dtype(name): no read

Files of other programs are opened by ckpt/containers.py.
"""

import contextlib
import glob
import hashlib
import json
import math
import mmap
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harness.cli import UserError
from harness.reading import open_file
from harness.typed import check, parse_json, unique

META = "twinpath"
# In the order of safetensors' own list.
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32, "F64": torch.float64,
    "I64": torch.int64,
}  # fmt: skip
HEADER_LIMIT = 64 << 20  # bytes
TENSORS = 100_000  # in one file; the largest networks have some thousands
# In a folder of ours: the sha256 of its other files. No tensors, only metadata.
DIGESTS = "digests.safetensors"


# ---- writing ------------------------------------------------------------------------------------


def make_dir(path: Path) -> None:
    """Create a folder we can write to, or say why not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        what = f"cannot write to {path}: {error.strerror or error}"
        raise UserError(what, do="Give a writable folder.") from None


def what_is(path: Path) -> str:
    """What stands at a path: "a file" or "a folder", also by a link; "nothing"; or what else."""
    if path.is_dir():
        return "a folder"
    if path.is_file():
        return "a file"
    if path.is_symlink():
        return "a link to nothing"
    return "neither a file nor a folder" if path.exists() else "nothing"


def check_place(path: Path, wanted: str) -> None:
    """Refuse what stands where we write "a file" or "a folder", and is not one: it is a user's, so
    it is neither removed nor written through."""
    there = what_is(path)
    if there not in ("nothing", wanted):
        raise UserError(f"{path} is {there}, wanted {wanted}", do="Move it away.")


def remove(path: Path) -> None:
    """Remove what stands under one of our own temporary names, whatever it is. Of a link only the
    link: where it leads is not ours."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_name(path: Path) -> Path:
    """Beside path, hidden and of this process: no name that a user's own file has. Names end at
    255 bytes."""
    return path.with_name(f".{path.name[:50]}.{os.getpid()}.tmp")


def safe_name(text: Any) -> str:
    """What a file says of itself, as part of a file's name: letters, digits and ._- only.

    No slash and no leading dot, so that metadata cannot name a place outside a folder.
    """
    plain = "".join(c if c.isalnum() or c in "._-" else "-" for c in str(text))
    return plain.lstrip(".")[:80] or "unnamed"


HALF_FILE = re.compile(r"\..+\.\d+\.tmp")  # temporary_name() of any process
HOUR = 3600  # seconds
SEARCHES = 16  # of a folder by a process, at most: one that gets a million pictures is large
SEARCHED: Counter[Path] = Counter()


def sweep_old(folder: Path, name: str = "") -> None:
    """Remove what kills left half written, of all files or of one. Processes share the folder
    without a lock, so nothing that may still be written to: it has to be an hour old."""
    of_this = glob.escape(f".{name[:50]}") if name else ".*"
    for path in folder.glob(f"{of_this}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # another process sweeps too
            if HALF_FILE.fullmatch(path.name) and time.time() - path.lstat().st_mtime > HOUR:
                remove(path)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file to write in path's place: a reader sees the old file or the new one, never
    a half.

    It is synced and renamed when the block ends, and removed when the block fails. What an earlier
    process left half written of this file goes first.
    """
    if SEARCHED[path.parent] < SEARCHES:
        SEARCHED[path.parent] += 1
        sweep_old(path.parent, path.name)
    temporary = temporary_name(path)
    try:
        with naming(path):
            yield temporary
            fsync(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # on an error; a disk may be full because of it
    fsync(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the file system says which file it is about, where it has no name of its own or
    that of a temporary file: "No space left on device" of a write() has none."""
    try:
        yield
    except OSError as error:
        nameless = error.filename is None or str(error.filename) == str(temporary_name(path))
        if error.errno and nameless:
            error.filename, error.filename2 = str(path), None
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text)


def strict_json(value: Any, indent: int | None = None) -> str:
    """JSON in which NaN and infinity, which it does not have, are null."""
    loose = json.dumps(value)
    return json.dumps(json.loads(loose, parse_constant=lambda name: None), indent=indent)


def raw_bytes(tensor: Tensor) -> Any:
    """A tensor's bytes in row-major order, as a numpy array; no copy if it is contiguous and on the
    CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():  # an empty one may have stride 0
        return torch.empty(0, dtype=torch.uint8).numpy()
    return flat.view(torch.uint8).numpy()


def stream_tensors(
    path: Path,
    header: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    meta: Mapping[str, str],
    get: Callable[[str], Tensor],
    check: Callable[[Path], None] = lambda path: None,
) -> None:
    """A safetensors file of get(name) for each name, asked for one by one; atomic. check(file) may
    refuse what was written.

    Layout: u64 length, JSON header padded with spaces to 8 bytes, then the data. The order is that
    of safetensors' own writer, by type, widest first, then by name, so that every tensor is
    aligned.
    """
    table: dict[str, Any] = {"__metadata__": dict(meta)} if meta else {}
    labels = {dtype: label for label, dtype in DTYPES.items()}
    rank = list(DTYPES.values())
    names = sorted(header, key=lambda name: (-rank.index(header[name][0]), name))
    offset = 0
    for name in names:
        dtype, shape = header[name]
        end = offset + dtype.itemsize * math.prod(shape)
        offsets = [offset, end]
        table[name] = {"dtype": labels[dtype], "shape": list(shape), "data_offsets": offsets}
        offset = end
    head = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    if len(head) > HEADER_LIMIT or len(header) > TENSORS:
        raise UserError(
            f"{path} would have {len(header):,} tensors and a header of {len(head):,} bytes",
            wanted=f"at most {TENSORS:,} and {HEADER_LIMIT:,}",
            do="Split it.",
        )
    try:
        with atomic(path) as temporary:
            with open(temporary, "wb") as file:
                file.write(len(head).to_bytes(8, "little") + head)
                for name in names:
                    tensor = get(name)
                    dtype, shape = header[name]
                    fits = (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape))
                    assert fits, f"{name}: {tensor.dtype} {tuple(tensor.shape)}"
                    file.write(raw_bytes(tensor))
                    del tensor  # before the next one is made
            check(temporary)
    except OSError as error:
        what = f"cannot write {path}: {error.strerror or error}.  No file was replaced"
        raise UserError(what, do="Make room, or give another folder.") from None


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    meta: dict[str, Any],
    check: Callable[[Path], None] = lambda path: None,
) -> None:
    """Tensors + JSON metadata as one safetensors file, atomically."""
    stream_tensors(
        path,
        {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()},
        text_meta(meta),
        tensors.__getitem__,
        check,
    )


def text_meta(meta: dict[str, Any]) -> dict[str, str]:
    """Our JSON as safetensors metadata, with a checksum: it decides what the weights mean."""
    text = json.dumps(meta)
    return {"format": "pt", META: text, f"{META}_sha256": hashlib.sha256(text.encode()).hexdigest()}


def is_ours(box: "Container") -> bool:
    """Either key is enough: with one of them damaged, the file must not pass for a foreign one,
    which nothing protects."""
    return META in box.meta or f"{META}_sha256" in box.meta


def read_meta(box: "Container") -> dict[str, Any]:
    """The inverse of text_meta. Older files have no checksum."""
    text, wanted = box.meta.get(META, ""), box.meta.get(f"{META}_sha256")
    digest = hashlib.sha256(text.encode()).hexdigest()
    # A checksum under a damaged name is one too.
    renamed = any(re.fullmatch(r"[0-9a-f]{64}", str(value)) for value in box.meta.values())
    if digest != wanted and (renamed or wanted):
        raise UserError(
            f"{box.path}: the metadata does not match its own checksum; the file was altered or "
            "damaged",
            do="Copy it again, or use an older one.",
        )
    what = f"{box.path}: the metadata"
    return check(parse_json(text, what, nan=True), dict[str, Any], what)


# ---- reading ------------------------------------------------------------------------------------


class Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]  # a tensor of its own memory


class Container(Mapping[str, Tensor]):
    """Named tensors on disk. A mapping that reads on access and knows dtypes and shapes without
    reading."""

    def __init__(self, path: Path, kind: str, table: Mapping[str, Entry], meta: Mapping[str, Any]):
        self.path, self.kind, self.table, self.meta = path, kind, dict(table), dict(meta)

    def __getitem__(self, name: str) -> Tensor:
        return self.table[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)

    def dtype(self, name: str) -> torch.dtype:
        return self.table[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self.table[name].shape

    def header(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {name: (entry.dtype, entry.shape) for name, entry in self.table.items()}

    def over(self, table: Mapping[str, Entry]) -> "Container":
        """The same file seen through another table: other names, other shapes, fewer tensors."""
        return Container(self.path, self.kind, table, self.meta)


def open_safetensors(path: Path) -> Container:
    """The header is checked by safetensors itself; tensors are then read with plain reads, for
    mapped pages count as memory."""
    size = path.stat().st_size
    try:
        with open_file(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(HEADER_LIMIT, size):
                raise ValueError(f"a header of {length:,} bytes")
            head = file.read(length)
        # Counted first: a million tensors are minutes, and no network's.
        if max(head.count(b'"data_offsets"'), head.count(b"{"), head.count(b"[") // 2) > TENSORS:
            raise ValueError(f"a header of more than {TENSORS:,} tensors")
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
        header = json.loads(head, object_pairs_hook=unique)
        header.pop("__metadata__", None)
        table = {}
        for name, entry in header.items():
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            start = 8 + length + entry["data_offsets"][0]
            table[name] = Entry(dtype, shape, partial(read_range, path, start, dtype, shape))
    except KeyError as error:
        what = f"{path} holds tensors of type {error}, which this code does not know"
        raise UserError(what, do=f"Known: {', '.join(DTYPES)}.") from None
    except (SafetensorError, ValueError, TypeError, RecursionError, OSError) as error:
        what = f"{path} is truncated or not a safetensors file ({size:,} bytes: {error})"
        raise UserError(what, do="Copy it again, or use an older one.") from None
    return Container(path, "safetensors", table, meta)


def read_range(path: Path, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """One tensor from its place in a file. A large one gets pages of its own, for malloc keeps up
    to 64 MB of what it is given back."""
    size = dtype.itemsize * math.prod(shape)
    if size < 1 << 20:
        data = torch.empty(size, dtype=torch.uint8)
    else:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        data = torch.frombuffer(pages, dtype=torch.uint8)
    view, done = memoryview(data.numpy()), 0
    with naming(path), open(path, "rb", buffering=0) as file:
        file.seek(start)
        while done < len(view):  # a read returns at most 2 GiB
            n = file.readinto(view[done:])
            if not n:
                raise UserError(
                    f"{path} became shorter while it was read", do="Is something still writing it?"
                )
            done += n
    return data.view(dtype).view(shape)


# ---- digests ------------------------------------------------------------------------------------


class Digests(NamedTuple):
    of: dict[str, Any]  # what the files belong to: a run, a step
    files: dict[str, str]  # {name in the folder: sha256 of the file}


def digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_digests(folder: Path, names: Iterable[str], **of: Any) -> None:
    """List files of a folder with their sha256, and what they are `of`. They are read for it, so it
    is written last."""
    names = sorted(names)
    with ThreadPoolExecutor() as pool:  # hashing lets go of the GIL
        sums = list(pool.map(digest, [folder / name for name in names]))
    meta = {"kind": "digests", "of": of, "files": dict(zip(names, sums))}
    write_tensors(folder / DIGESTS, {}, meta)


def read_digests(folder: Path) -> Digests:
    """The list of a folder. Empty where there is none: what was written before there were lists,
    and files that were copied without theirs."""
    path = folder / DIGESTS
    if not os.path.lexists(path):
        return Digests({}, {})
    if not path.is_file():
        raise UserError(f"{path} is not a file", do="Copy the folder again, or use an older one.")
    meta = read_meta(open_safetensors(path))
    of, files = meta.get("of"), meta.get("files")
    named = isinstance(of, dict) and isinstance(files, dict)
    if not named or not all(Path(k).name == k and isinstance(v, str) for k, v in files.items()):
        raise UserError(
            f"{path} is not a list of files and their sha256",
            do="Copy the folder again, or use an older one.",
        )
    return Digests(of, files)


def fault(path: Path) -> str:
    """What is wrong with a file that the list beside it names; "" = nothing, or it is not listed.

    A file is read once by a process, unless it changes.
    """
    wanted = read_digests(path.parent).files.get(path.name)
    if wanted is None:
        return ""
    if not path.is_file():
        return f"{path} is missing, and {DIGESTS} beside it lists it"
    if digest_once(path) == wanted:
        return ""
    return (
        f"{path} is not the file that {DIGESTS} beside it lists: it is damaged, or of another run "
        "or step"
    )


def digest_once(path: Path) -> str:
    """digest(), remembered for as long as the file does not change."""
    stat = path.stat()
    # Clocks of file systems are coarse: two changes may have one time.
    if time.time_ns() - stat.st_ctime_ns < 10**9:
        return digest(path)
    return remembered(path, stat.st_ino, stat.st_size, stat.st_ctime_ns)


@lru_cache(maxsize=1024)
def remembered(path: Path, *state: int) -> str:
    return digest(path)


def check_digest(path: Path, do: str) -> None:
    """Refuse a file that is not the one that the list beside it names; do: what helps then."""
    if what := fault(path):
        raise UserError(what, do=do)


# ---- comparing ----------------------------------------------------------------------------------


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over sorted (name, dtype, shape, bytes), one tensor at a time."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(raw_bytes(t))
        del t  # before the next one is read
    return digest.hexdigest()


def load_strict(
    net: nn.Module, tensors: Mapping[str, Tensor], what: str, assign: bool = False
) -> None:
    """load_state_dict where every difference is an error that lists both sides."""
    check_fits(net, {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()}, what)
    net.load_state_dict(tensors, assign=assign)


def check_fits(
    net: nn.Module, header: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], what: str
) -> None:
    """Refuse tensors {name: (dtype, shape)} that a network's state dict cannot be."""
    own = net.state_dict()
    shapes = {k: tuple(v.shape) for k, v in own.items()}
    check_shapes(shapes, {k: shape for k, (_, shape) in header.items()}, what)
    floats = [name for name, value in own.items() if value.is_floating_point()]
    odd = {name: header[name][0] for name in floats if not header[name][0].is_floating_point}
    if odd:
        given = listed(f"{name} ({dtype})" for name, dtype in odd.items())
        raise UserError(
            f"{what}: {len(odd)} weights are not floating-point numbers: {given}",
            do="Save them in fp32, fp16 or bf16.",
        )


def check_shapes(
    own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Refuse tensors that are not those of a network: missing, unexpected, of another shape."""
    missing = [k for k in own if k not in given]
    extra = [k for k in given if k not in own]
    wrong = [f"{k} {given[k]} for {own[k]}" for k in own if k in given and given[k] != own[k]]
    kinds = {"missing": missing, "unexpected": extra, "of another shape": wrong}
    parts = [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names]
    if parts:
        raise UserError(
            f"{what} is of another architecture ({len(given)} tensors, wanted {len(own)}): "
            f"{'; '.join(parts)}",
            do="Name the file of this architecture, or give its own config.",
        )


def listed(words: Iterable[Any], n: int = 3) -> str:
    """The first n, for a message."""
    words = list(words)
    more = " …" if len(words) > n else ""
    return ", ".join(map(str, words[:n])) + more
