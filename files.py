"""Tensors on disk: reading any weight file by what it holds, not by what it is called; writing safetensors, atomically.

    box = open_weights("model.ckpt")             # safetensors | torch pickle, zip or legacy | shards with an index
    box["out.2.weight"]                          # read now, alone; box.shape(name) and box.dtype(name) need no read
    stream_tensors(path, {name: (dtype, shape)}, meta, get)     # one tensor in memory at a time

A pickle is opened by torch's weights_only reader, which builds tensors and plain containers and runs nothing.
"""

import hashlib
import json
import math
import mmap
import os
import pickle
import re
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from config import UserError

META = "twinpath"
DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
          "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32,
          "F64": torch.float64, "I64": torch.int64}                             # in the order of safetensors' own list
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HEADER_LIMIT = 100_000_000                   # bytes; safetensors' own
INDEX = re.compile(r"\.(safetensors|bin)\.index(\.\w+)?\.json$")              # diffusers puts a variant before .json
WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
EMA = re.compile(r"(?i)(^|[_.-])ema([_.-]|\d|$)")  # state_dict_ema, ema_0.9999
# Where a folder or a repository keeps a U-Net, most specific first.
USUAL = [f"{folder}{stem}{end}" for folder in ("", "unet/") for stem in ("diffusion_pytorch_model", "model")
         for end in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json",
                     ".fp16.safetensors", ".safetensors.index.fp16.json", ".fp16.bin", ".bin.index.fp16.json")]


# ---- writing --------------------------------------------------------------------------------------------------------

def make_dir(path: Path) -> None:
    """Create a folder we can write to, or say why not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}.  Give a writable folder.") from None


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_name(path: Path) -> Path:
    """Beside path, hidden and of this process: no name that a user's own file has. Names end at 255 bytes."""
    return path.with_name(f".{path.name[:50]}.{os.getpid()}.tmp")


def write_text(path: Path, text: str) -> None:
    """Atomically: a reader sees the old file or the new one, never a half."""
    temporary = temporary_name(path)
    temporary.write_text(text)
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


def raw_bytes(tensor: Tensor) -> Any:
    """A tensor's bytes in row-major order, as a numpy array; no copy if it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return (flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)).numpy()      # an empty one may have stride 0


def stream_tensors(path: Path, header: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], meta: Mapping[str, str],
                   get: Callable[[str], Tensor], check: Callable[[Path], None] = lambda path: None) -> None:
    """A safetensors file of get(name) for each name, asked for one by one; atomic. check(file) may refuse what was written.

    Layout: u64 length, JSON header padded with spaces to 8 bytes, then the data. The order is that of safetensors' own
    writer, by type, widest first, then by name, so that every tensor is aligned.
    """
    table: dict[str, Any] = {"__metadata__": dict(meta)} if meta else {}
    labels, rank, offset = {v: k for k, v in DTYPES.items()}, list(DTYPES.values()), 0
    names = sorted(header, key=lambda name: (-rank.index(header[name][0]), name))
    for name in names:
        dtype, shape = header[name]
        end = offset + dtype.itemsize * math.prod(shape)
        table[name] = {"dtype": labels[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for name in names:
                tensor = get(name)
                assert (tensor.dtype, tuple(tensor.shape)) == (header[name][0], tuple(header[name][1])), f"{name}: {tensor.dtype} {tensor.shape}"
                file.write(raw_bytes(tensor))
                del tensor                                                      # before the next one is made
        fsync(temporary)
        check(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}.  No file was replaced.") from None
    finally:
        temporary.unlink(missing_ok=True)                                       # on an error; a disk may be full because of it
    fsync(path.parent)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], meta: dict[str, Any], check: Callable[[Path], None] = lambda path: None) -> None:
    """Tensors + JSON metadata as one safetensors file, atomically."""
    stream_tensors(path, {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()}, text_meta(meta), tensors.__getitem__, check)


def text_meta(meta: dict[str, Any]) -> dict[str, str]:
    """Our JSON as safetensors metadata, with a checksum: it decides what the weights mean."""
    text = json.dumps(meta)
    return {"format": "pt", META: text, f"{META}_sha256": hashlib.sha256(text.encode()).hexdigest()}


def is_ours(box: "Container") -> bool:
    """Either key is enough: with one of them damaged, the file must not pass for a foreign one, which nothing protects."""
    return META in box.meta or f"{META}_sha256" in box.meta


def read_meta(box: "Container") -> dict[str, Any]:
    """The inverse. Older files have no checksum."""
    text, mark = box.meta.get(META, ""), box.meta.get(f"{META}_sha256")
    renamed = any(re.fullmatch(r"[0-9a-f]{64}", str(value)) for key, value in box.meta.items())  # a checksum under a damaged name
    if hashlib.sha256(text.encode()).hexdigest() != mark and (renamed or mark):
        raise UserError(f"{box.path}: the metadata does not match its own checksum; the file was altered or damaged.")
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{box.path}: the metadata is damaged ({error}).") from None
    if not isinstance(meta, dict):
        raise UserError(f"{box.path}: the metadata is damaged (a JSON {type(meta).__name__}, wanted an object).")
    return meta


# ---- reading --------------------------------------------------------------------------------------------------------

class Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]               # a tensor of its own memory


class Container(Mapping[str, Tensor]):
    """Named tensors on disk. A mapping that reads on access and knows dtypes and shapes without reading."""

    def __init__(self, path: Path, kind: str, table: Mapping[str, Entry], meta: Mapping[str, Any],
                 emas: Mapping[str, Mapping[str, Entry]] = {}, beside: Mapping[str, int] = {}):
        self.path, self.kind, self.table, self.meta = path, kind, dict(table), dict(meta)
        self.emas, self.beside = dict(emas), dict(beside)                       # of a pickle: EMAs under their own names; tensors not taken

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
        return Container(self.path, self.kind, table, self.meta, self.emas, self.beside)


def open_weights(path: Path | str) -> Container:
    """Open a weight file of any container, or an index of shards. What cannot be read whole is a UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weight file at {path}." + ("  It is a folder." if path.is_dir() else ""))
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from None
    # Safetensors first: the length of its header may well begin with the byte that begins a pickle.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= HEADER_LIMIT:
        return open_safetensors(path)
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5":
        return open_pickle(path, zipped=head[:2] == b"PK")
    if INDEX.search(path.name):
        return open_shards(path)
    size, what = path.stat().st_size, ""
    if not size:
        raise UserError(f"{path} is empty (0 bytes).  Copy it again, or use an older one.")
    if head.startswith(b"version https://git-lfs"):
        what = "it is a Git LFS pointer; fetch the real file with git lfs pull"
    elif head.lstrip()[:1] == b"<":
        what = "it looks like a web page saved in the file's place"
    elif size >= 9 and head[8:9] == b"{":
        what = f"its header says it is {int.from_bytes(head[:8], 'little'):,} bytes long"
    else:
        raise UserError(f"{path} is not a weight file (it begins with {head[:12]!r}).  Wanted safetensors, or what torch.save wrote.")
    raise UserError(f"{path} is truncated or not a safetensors file, nor a torch pickle ({size:,} bytes{what and f': {what}'}).  "
                    "Copy it again, or use an older one.")


def open_safetensors(path: Path) -> Container:
    """The header is checked by safetensors itself; tensors are then read with plain reads, for mapped pages count as memory."""
    size = path.stat().st_size
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        table = {}
        for name, entry in header.items():
            dtype, shape, start = DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
            table[name] = Entry(dtype, shape, partial(read_range, path, start, dtype, shape))
    except KeyError as error:
        raise UserError(f"{path} holds tensors of type {error}, which this code does not know.  Known: {', '.join(DTYPES)}.") from None
    except (SafetensorError, ValueError, TypeError, RecursionError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({size:,} bytes: {error}).  Copy it again, or use an older one.") from None
    return Container(path, "safetensors", table, meta)


def read_range(path: Path, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """One tensor from its place in a file. A large one gets pages of its own, for malloc keeps up to 64 MB of what it is given back."""
    size = dtype.itemsize * math.prod(shape)
    if size < 1 << 20:
        data = torch.empty(size, dtype=torch.uint8)
    else:
        data = torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
    view, done = memoryview(data.numpy()), 0
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while done < len(view):                                                 # a read returns at most 2 GiB
            n = file.readinto(view[done:])
            if not n:
                raise UserError(f"{path} became shorter while it was read.  Is something still writing it?")
            done += n
    return data.view(dtype).view(shape)


def open_pickle(path: Path, zipped: bool) -> Container:
    """torch.save's files. A zip's checksums are verified and its storages mapped, not loaded; the legacy format allows neither."""
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
            if bad:
                raise UserError(f"{path} is damaged: the checksum of {bad} in it is wrong.  Copy it again.")
        mapped = zipped and path.suffix != ".safetensors"                       # by that name torch would try another reader
        with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):   # they are about formats, for torch's developers
            loaded = torch.load(path if mapped else file, weights_only=True, map_location="cpu", mmap=mapped)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        wants = re.search(r"(?:GLOBAL|global:?|class) [`']?(?!GLOBAL)([\w.]+)", str(error))
        what = f": it wants to build or call {wants[1]}" if wants else ""
        if "lightning" in what:
            what += " (an original Stable Diffusion .ckpt does; its page has the same weights as .safetensors)"
        raise UserError(f"{path} is a Python pickle that torch refuses to read as weights alone{what}.  Nothing in it was run.  Ask for "
                        "a safetensors file, or have its owner save only the state dict.") from None
    except Exception as error:                                                  # damaged bytes can mean anything to an unpickler
        raise UserError(f"{path} is a Python pickle that is truncated, damaged or not torch's ({path.stat().st_size:,} bytes: "
                        f"{type(error).__name__}: {' '.join(str(error).split())[:120]}).  Copy it again.") from None
    raw, emas, beside = state_dicts(loaded, path)
    kind = "torch zip pickle" if zipped else "torch legacy pickle"
    # Its plain values are never metadata: nothing protects them, and any script may use any name.
    return Container(path, kind, entries(raw, path), {}, {k: entries(v, path) for k, v in emas.items()}, beside)


def entries(weights: Mapping[Any, Any], path: Path) -> dict[str, Entry]:
    """The tensors of one mapping in memory, each a plain one under a name."""
    table = {}
    for name, v in weights.items():
        if not isinstance(v, Tensor):
            continue
        if not isinstance(name, str):
            raise UserError(f"{path}: a tensor has the key {name!r}, wanted a name.  Save only the network's state dict.")
        if v.layout != torch.strided or v.is_quantized or v.is_meta or v.is_nested:
            raise UserError(f"{path}: {name} is not a plain dense tensor ({v.layout}).  Save it dequantised and dense.")
        table[name] = Entry(v.dtype, tuple(v.shape), lambda v=v: v.detach().contiguous().clone().resolve_neg())
    return table


def state_dicts(loaded: Any, path: Path) -> tuple[Mapping, dict[str, Mapping], dict[str, int]]:
    """(weights, {name: EMA}, {name: other tensors}) in what a training script saved. What is not taken is counted.

    Every mapping with a tensor in it may be the weights: the whole, or one of its values. Two of them are an error.
    """
    top = loaded if isinstance(loaded, Mapping) else {}
    found = {k: v for k, v in [("the top", top), *top.items()] if isinstance(v, Mapping) and any(isinstance(t, Tensor) for t in v.values())}
    emas = {k: v for k, v in found.items() if EMA.search(str(k))}
    raw = {k: v for k, v in found.items() if k not in emas}
    if len(raw) > 1:                                                            # counters and states of generators are no weights
        raw = {k: v for k, v in raw.items() if any(isinstance(t, Tensor) and t.is_floating_point() and t.ndim for t in v.values())} or raw
    if len(raw) != 1 and not (emas and not raw):
        what = f"it holds {', '.join(map(str, list(raw or top)[:5])) or 'none'}"
        raise UserError(f"{path} is a Python pickle without a single set of weights ({what}).  Save the one you want alone.")
    taken = [id(v) for v in [*raw.values(), *emas.values()]]
    beside = {}
    for key, value in top.items():
        inner = [v for v in value.values() if not isinstance(v, Tensor)] if id(value) in taken else \
            [] if isinstance(value, Tensor) and id(top) in taken else [value]
        if n := tensors_in(inner):
            beside[str(key)] = n
    return next(iter(raw.values()), {}), {str(k): v for k, v in emas.items()}, beside


def tensors_in(value: Any) -> int:
    """How many tensors hang below a value. Containers may be very deep, or hold themselves."""
    seen, stack, n = set(), [value], 0
    while stack:
        value = stack.pop()
        n += isinstance(value, Tensor)
        if isinstance(value, (Mapping, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            stack += value.values() if isinstance(value, Mapping) else value
    return n


def open_shards(index: Path) -> Container:
    """Several files as one. Each shard must hold exactly the keys that the index gives it."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
        if not all(Path(f).name == f for f in files):
            raise ValueError("shards must lie beside the index")
        if any(INDEX.search(f) for f in files):
            raise ValueError("a shard is a weight file, not an index")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of shards ({type(error).__name__}: {error}).  Copy it again.") from None
    table, meta, kind = {}, {}, ""
    for file in files:
        if not (index.parent / file).is_file():
            raise UserError(f"{index} names the shard {file}, which is not there.  Wanted beside it: {', '.join(files)}.")
        shard = open_weights(index.parent / file)
        wanted = {name for name, where in weight_map.items() if where == file}
        for name in sorted(wanted ^ set(shard)):
            fault = "is in it, but not in the index" if name not in weight_map else \
                "is not in it" if name in wanted else f"is in it, but the index says {weight_map[name]}"
            raise UserError(f"{index.parent / file} does not fit {index.name}: {name} {fault}.  Copy all shards again, of one version.")
        table.update(shard.table)
        meta.update(shard.meta)
        kind = shard.kind
    return Container(index, f"{len(files)} {kind} shards", table, meta)


def weights_in(folder: Path) -> Path | None:
    """The U-Net's file in a folder of the usual shape."""
    return next((folder / name for name in USUAL if (folder / name).is_file()), None)


def rounded(box: Container, dtype: str) -> Container:
    """The same tensors in fp32, fp16 or bf16, converted as they are read; values that do not fit are an error."""
    if dtype not in PRECISIONS:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(PRECISIONS)}.")
    to = PRECISIONS[dtype]

    def convert(name: str, read: Callable[[], Tensor]) -> Tensor:
        tensor = read()
        out = tensor.to(to)
        # Two numbers first, not a mask as large as it is; what was NaN or infinite before may stay so.
        if out.numel() and not all(torch.isfinite(v) for v in torch.aminmax(out)) and (tensor.isfinite() & ~out.isfinite()).any():
            low, high = torch.aminmax(tensor[tensor.isfinite()])
            raise UserError(f"{box.path}: {name} does not fit {dtype}: its values go from {float(low):.3g} to {float(high):.3g}, "
                            f"{dtype} ends at {torch.finfo(to).max:.3g}.  Use bf16 or fp32.")
        return out

    return box.over({k: Entry(to, e.shape, partial(convert, k, e.read)) if e.dtype.is_floating_point and e.dtype != to else e
                     for k, e in box.table.items()})
