"""The tensors of a TorchScript archive, read without running any of it.

    tensors = read_torchscript(data)     # {"layers.conv.weight": …} in the order they stand there

torch.jit.load runs code that the file brings (a module's __setstate__), so a weights file could do
anything. The archive is a zip: data.pkl describes nested objects, data/N hold the tensors' bytes.
Here data.pkl is read by an unpickler that knows two things only: an object with attributes, and a
tensor over such bytes. Everything else in it is refused.
"""

import io
import math
import pickle
import zipfile
import zlib
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

# Names of storages in the pickle -> what their bytes are.
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# TorchScript's typed lists.
LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
# More bytes than this in one archive are not FID's weights, whatever its directory claims.
LIMIT = 2**30


class Node:
    """A module of the archive: nothing but its attributes."""


def read_torchscript(data: bytes) -> dict[str, Tensor]:
    """{dotted name: tensor} of an archive. ValueError for what is not a plain tree of tensors."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        if sum(entry.file_size for entry in archive.infolist()) > LIMIT:
            raise ValueError(f"it unpacks to more than {LIMIT:,} bytes")
        pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        root = Reader(archive, pickled).load()
    except StopIteration:
        raise ValueError("it has no data.pkl") from None
    except (pickle.UnpicklingError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(str(error)) from None
    except (EOFError, LookupError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return tensors_below(root)


class Reader(pickle.Unpickler):
    """Builds Nodes and tensors, and calls nothing else."""

    def __init__(self, archive: zipfile.ZipFile, name: str):
        super().__init__(io.BytesIO(archive.read(name)))
        self.archive, self.folder = archive, name.removesuffix("data.pkl")

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return Node
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name in LISTS:
            return list
        raise pickle.UnpicklingError(f"it wants to build or call {module}.{name}")

    def persistent_load(self, found: Any) -> Tensor:
        """A storage: its bytes, as one flat tensor."""
        kind, dtype, key, _, size = found
        raw = self.archive.read(f"{self.folder}data/{key}")
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("a storage without a type")
        if len(raw) != size * dtype.itemsize:
            raise pickle.UnpicklingError(f"data/{key} has {len(raw)} bytes, wanted {size} numbers")
        flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0)
        return flat.view(dtype) if raw else torch.empty(0, dtype=dtype)


def rebuild(
    flat: Tensor, offset: int, shape: tuple, stride: tuple, grad: bool, hooks: Any
) -> Tensor:
    """A tensor over a storage, within its bounds, in memory of its own."""
    sizes = [*shape, *stride, offset]
    if len(shape) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in sizes):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} with strides {stride}")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride))
    # The second: a stride of 0 makes a few numbers as large as one likes.
    if math.prod(shape) and (last >= len(flat) or math.prod(shape) > len(flat)):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} outside its {len(flat)} numbers")
    return flat.as_strided(shape, stride, offset).clone()


def tensors_below(root: Any) -> dict[str, Tensor]:
    """Every tensor that hangs below a Node, under its dotted name."""
    if not isinstance(root, Node):
        raise ValueError(f"it holds a {type(root).__name__}, wanted a module")
    found: dict[str, Tensor] = {}
    todo = [("", root, ())]
    while todo:
        prefix, node, above = todo.pop(0)
        if id(node) in above:
            raise ValueError("a module in it contains itself")
        children = []
        for name, value in vars(node).items():
            if isinstance(value, Tensor):
                found[prefix + name] = value
            elif isinstance(value, Node):
                children.append((f"{prefix}{name}.", value, (*above, id(node))))
        todo = children + todo
    return found
