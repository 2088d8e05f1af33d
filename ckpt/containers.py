"""Weight files of other programs, opened by what they hold and not by what they are called.

    box = open_weights("model.ckpt")     # safetensors | torch pickle, zip or legacy | shards
    box["out.2.weight"]                  # read now, alone; box.shape and box.dtype need no read

A pickle is opened by torch's weights_only reader, which builds tensors and plain containers and
runs nothing.
"""

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from harness.archives import check_members
from harness.cli import UserError
from harness.files import HEADER_LIMIT, TENSORS, Container, Entry, listed, open_safetensors
from harness.reading import open_file
from harness.typed import Length, Open, Rule, read_json

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# diffusers puts a variant before .json.
INDEX = re.compile(r"\.(safetensors|bin)\.index(\.\w+)?\.json$")
WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
DEPTH = 16  # dictionaries and lists in one another; tensors below are not looked for
VALUES = 10_000_000  # in all of them: a small file may repeat one without end
ENDINGS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json",
    ".fp16.safetensors", ".safetensors.index.fp16.json", ".fp16.bin", ".bin.index.fp16.json",
)  # fmt: skip
# Where a folder or a repository keeps a network, most specific first.
USUAL = [
    f"{folder}{stem}{end}"
    for folder in ("", "unet/", "transformer/", "unet_ema/")
    for stem in ("diffusion_pytorch_model", "model")
    for end in ENDINGS
]
AGAIN = "Copy it again, or use an older one."


def open_weights(path: Path | str) -> Container:
    """Open a weight file of any container, or an index of shards. What cannot be read whole is a
    UserError."""
    path = Path(path)
    if not path.is_file():
        do = "It is a folder." if path.is_dir() else "Name a file that exists."
        raise UserError(f"no weight file at {path}", do=do)
    try:
        with open_file(path) as file:
            head = file.read(64)
    except OSError as error:
        what = f"cannot read {path}: {error.strerror or error}"
        raise UserError(what, do="Name a file that can be read.") from None
    # Safetensors first: the length of its header may well begin with the byte that begins a pickle.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= HEADER_LIMIT:
        return open_safetensors(path)
    zipped = head[:4] == b"PK\x03\x04"
    if zipped or (head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5"):
        return open_pickle(path, zipped)
    if INDEX.search(path.name):
        return open_shards(path)
    raise no_weights(path, head)


def no_weights(path: Path, head: bytes) -> UserError:
    """The error for a file that is none we know; `head` is how it begins."""
    size = path.stat().st_size
    if not size:
        return UserError(f"{path} is empty (0 bytes)", do=AGAIN)
    if head.startswith(b"GGUF"):
        return UserError(
            f"{path} is a GGUF file: its weights are quantised, and what was rounded away is not "
            "in it",
            do="Wanted safetensors, in fp32, bf16 or fp16.",
        )
    if head.startswith(b"version https://git-lfs"):
        what = "it is a Git LFS pointer; fetch the real file with git lfs pull"
    elif head.lstrip()[:1] == b"<":
        what = "it looks like a web page saved in the file's place"
    elif size >= 9 and head[8:9] == b"{":
        what = f"its header says it is {int.from_bytes(head[:8], 'little'):,} bytes long"
    else:
        return UserError(
            f"{path} is not a weight file (it begins with {head[:12]!r})",
            do="Wanted safetensors, or what torch.save wrote.",
        )
    return UserError(
        f"{path} is truncated or not a safetensors file, nor a torch pickle ({size:,} bytes: "
        f"{what})",
        do=AGAIN,
    )


# ---- pickles ------------------------------------------------------------------------------------


def open_pickle(path: Path, zipped: bool) -> Container:
    """torch.save's files. A zip's checksums are verified and its storages mapped, not loaded; the
    legacy format allows neither."""
    try:
        loaded = unpickle(path, zipped)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        wants = re.search(r"(?:GLOBAL|global:?|class) [`']?(?!GLOBAL)([\w.]+)", str(error))
        what = f": it wants to build or call {wants[1]}" if wants else ""
        if "lightning" in what:
            what += " (an original Stable Diffusion .ckpt does; its page has the same weights as "
            what += ".safetensors)"
        raise UserError(
            f"{path} is a Python pickle that torch refuses to read as weights alone{what}.  "
            "Nothing in it was run",
            do="Ask for a safetensors file, or have its owner save only the state dict.",
        ) from None
    except Exception as error:  # damaged bytes can mean anything to an unpickler
        size, text = path.stat().st_size, " ".join(str(error).split())[:120]
        raise UserError(
            f"{path} is a Python pickle that is truncated, damaged or not torch's ({size:,} "
            f"bytes: {type(error).__name__}: {text})",
            do="Copy it again.",
        ) from None
    kind = "torch zip pickle" if zipped else "torch legacy pickle"
    # Its plain values are never metadata: nothing protects them, and any script may use any name.
    return Container(path, kind, entries(loaded, path), {})


def unpickle(path: Path, zipped: bool) -> Any:
    """What torch.save was given."""
    if zipped:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            check_members(archive, file)
            if any(member.compress_type for member in archive.infolist()):
                raise UserError(
                    f"{path} was zipped again: its members are compressed, and torch reads them "
                    "only as it writes them, without",
                    do="Unzip it, and zip it again without compression (zip -0 -r).",
                )
            bad = archive.testzip()
        if bad:
            raise UserError(
                f"{path} is damaged: the checksum of {bad} in it is wrong", do="Copy it again."
            )
    # By that name torch would try another reader.
    mapped = zipped and path.suffix != ".safetensors"
    # The warnings are about formats, for torch's developers.
    with open_file(path) as file, warnings.catch_warnings(action="ignore"):
        source = path if mapped else file
        return torch.load(source, weights_only=True, map_location="cpu", mmap=mapped)


def entries(loaded: Any, path: Path) -> dict[str, Entry]:
    """The tensors of all dictionaries and lists, each under the keys that lead to it:
    "state_dict/model.out.2.bias". The slash tells a dictionary from a module."""
    table: dict[str, Entry] = {}
    for keys, tensor in named_tensors(loaded, path):
        name = "/".join(keys)
        if name in table or len(table) == TENSORS:
            what = f"two tensors under {name!r}" if name in table else f"over {TENSORS:,} tensors"
            raise UserError(f"{path} holds {what}", do="Save only the network's state dict.")
        table[name] = Entry(tensor.dtype, tuple(tensor.shape), partial(copy, tensor, name, path))
    if not table:
        top = loaded if isinstance(loaded, Mapping) else {}
        names = listed(top, 5) or "none"
        raise UserError(
            f"{path} is a Python pickle without a single set of weights (it holds {names})",
            do="Save the one you want alone.",
        )
    return table


def named_tensors(loaded: Any, path: Path) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Every tensor and the keys that lead to it, in the order of the file. Containers may be very
    deep, or hold themselves."""
    seen, stack = 0, [((), loaded)]
    while stack:
        keys, value = stack.pop()
        if isinstance(value, Tensor):
            yield keys or ("tensor",), value
            continue
        if len(keys) == DEPTH or not isinstance(value, (Mapping, list, tuple)):
            continue
        seen += len(value)
        if seen > VALUES:
            raise UserError(
                f"{path} holds more than {VALUES:,} values",
                do="Save only the network's state dict.",
            )
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        below = [((*keys, str(key)), v) for key, v in items if holds_more(v)]
        stack += reversed(below)


def holds_more(value: Any) -> bool:
    return isinstance(value, (Tensor, Mapping, list, tuple))


def copy(tensor: Tensor, name: str, path: Path) -> Tensor:
    """A tensor in memory of its own. One that is not plain may lie beside the weights."""
    plain = tensor.layout == torch.strided and not tensor.is_quantized
    if not plain or tensor.is_meta or tensor.is_nested:
        raise UserError(
            f"{path}: {name} is not a plain dense tensor ({tensor.layout})",
            do="Save it dequantised and dense.",
        )
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise UserError(
            f"{path}: {name} repeats few numbers as a tensor of {tuple(tensor.shape)}",
            do="Save it after .contiguous().",
        )
    return tensor.detach().contiguous().clone().resolve_neg()


def unboxed(box: Container) -> Container:
    """The same file without the dictionaries that all its tensors are in."""
    first = next(iter(box), "")
    shared = os.path.commonprefix(list(box))
    boxes = len(shared[: shared.rfind("/") + 1]) if first else 0
    return box.over({name[boxes:]: entry for name, entry in box.table.items()})


# ---- shards -------------------------------------------------------------------------------------


def open_shards(index: Path) -> Container:
    """Several files as one. Each shard must hold exactly the keys that the index gives it."""
    weight_map = read_index(index)
    files = sorted(set(weight_map.values()))
    table, meta, kind = {}, {}, ""
    for file in files:
        if not (index.parent / file).is_file():
            raise UserError(
                f"{index} names the shard {file}, which is not there",
                do=f"Wanted beside it: {', '.join(files)}.",
            )
        shard = open_weights(index.parent / file)
        wanted = {name for name, where in weight_map.items() if where == file}
        for name in sorted(wanted ^ set(shard)):
            if name not in weight_map:
                fault = "is in it, but not in the index"
            elif name in wanted:
                fault = "is not in it"
            else:
                fault = f"is in it, but the index says {weight_map[name]}"
            raise UserError(
                f"{index.parent / file} does not fit {index.name}: {name} {fault}",
                do="Copy all shards again, of one version.",
            )
        table.update(shard.table)
        meta.update(shard.meta)
        kind = shard.kind
    return Container(index, f"{len(files)} {kind} shards", table, meta)


def beside(name: str) -> bool:
    """Is a shard's name that of a file of weights beside its index, and no path?"""
    plain = Path(name).name == name != ".." and name.isprintable()
    return plain and not INDEX.search(name)


@dataclass
class ShardIndex(Open):
    """An index of shards: {tensor: file}."""

    weight_map: Annotated[
        dict[str, Annotated[str, Rule(beside, "a file beside it")]], Length(1, TENSORS)
    ]


def read_index(index: Path) -> dict[str, str]:
    """{tensor: file beside the index}. A name in it is no path: it leads nowhere else."""
    return read_json(index, ShardIndex, "Copy it again.")["weight_map"]


def weights_in(folder: Path) -> Path | None:
    """The network's file in a folder of the usual shape."""
    return next((folder / name for name in USUAL if (folder / name).is_file()), None)


# ---- another precision --------------------------------------------------------------------------


def rounded(box: Container, dtype: str) -> Container:
    """The same tensors in fp32, fp16 or bf16, converted as they are read; values that do not fit
    are an error."""
    if dtype not in PRECISIONS:
        names = ", ".join(PRECISIONS)
        raise UserError(f"dtype {dtype!r} is not one of {names}", do="Choose one of them.")
    to = PRECISIONS[dtype]

    def convert(name: str, read: Callable[[], Tensor]) -> Tensor:
        tensor = read()
        out = tensor.to(to)
        # Two numbers first, not a mask as large as it is.
        if not out.numel() or all(torch.isfinite(v) for v in torch.aminmax(out)):
            return out
        # What was NaN or infinite before may stay so.
        if (tensor.isfinite() & ~out.isfinite()).any():
            low, high = torch.aminmax(tensor[tensor.isfinite()])
            raise UserError(
                f"{box.path}: {name} does not fit {dtype}: its values go from {float(low):.3g} to "
                f"{float(high):.3g}, {dtype} ends at {torch.finfo(to).max:.3g}",
                do="Use bf16 or fp32.",
            )
        return out

    table = {}
    for name, entry in box.table.items():
        if entry.dtype.is_floating_point and entry.dtype != to:
            entry = Entry(to, entry.shape, partial(convert, name, entry.read))
        table[name] = entry
    return box.over(table)
