"""Weight files of other programs, opened by what they hold and not by what they are called.

    box = open_weights("model.ckpt")     # safetensors | torch pickle, zip or legacy | shards with an index
    box["out.2.weight"]                  # read now, alone; box.shape(name) and box.dtype(name) need no read

A pickle is opened by torch's weights_only reader, which builds tensors and plain containers and runs nothing.
"""

import json
import pickle
import re
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, Callable, Mapping

import torch
from torch import Tensor

from harness.cli import UserError
from harness.files import HEADER_LIMIT, Container, Entry, open_safetensors

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
INDEX = re.compile(r"\.(safetensors|bin)\.index(\.\w+)?\.json$")              # diffusers puts a variant before .json
WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
EMA = re.compile(r"(?i)(^|[_.-])ema([_.-]|\d|$)")  # state_dict_ema, ema_0.9999
# Where a folder or a repository keeps a U-Net, most specific first.
USUAL = [f"{folder}{stem}{end}" for folder in ("", "unet/") for stem in ("diffusion_pytorch_model", "model")
         for end in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json",
                     ".fp16.safetensors", ".safetensors.index.fp16.json", ".fp16.bin", ".bin.index.fp16.json")]


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
