"""Autoencoders between images and the latents a U-Net sees, all under one protocol.

    vae = fit_pca(images)              # "pca": linear, 1/8 of the size, 32 channels, no download
    vae = load_vae("flux2")            # LDM's: sd, sdxl, sdxl-fp16-fix, flux1, flux2
    vae = load_vae("sdxl:FILE")        # … in any layout; FILE may be hf:org/name/file
    vae = load_vae("flux2:packed128")  # the same latents at 1/16 of the size with 128 channels
    z = vae.encode(x)                  # x (B, 3, H, W) in [-1, 1] -> (B, C, H/f, W/f), std about 1
    x = vae.decode(z)

`pixel` is the identity: pixels as latents. VAE has LDM's key names (Rombach et al. 2022), which are
Black Forest Labs' too; encode() gives the posterior's mean, never a sample. choose() is the one
rule by which commands decide whose autoencoder they use.
"""

if __name__ == "__main__":
    import harness.interrupt  # noqa: F401

import base64
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ckpt import fingerprint, load_strict
from ckpt.containers import open_weights
from ckpt.hub import from_file, origin, resolve
from ckpt.notes import VaeMeta, check_note, linear_parts
from ckpt.vaes import (
    FAMILIES, OPTIONAL, USUAL_VAE, Family, constants_of, infer_vae, pick_family, scaled, scaling_of,
    vae_file, vae_map, vae_part,
)  # fmt: skip
from harness.cli import UserError, cli, closest
from harness.files import META, Container, check_shapes, read_meta, write_tensors
from harness.pictures import decibels
from harness.ranks import full_precision
from harness.typed import check
from kernels.attention import attention
from kernels.groupnorm import group_norm_silu
from model import Upsample


# Of flux2: 1/8 of the size with 32 channels, or the same numbers at 1/16 with 128, as its own
# U-Net has them.
LATENTS = ("unpacked32", "packed128")
STATS_EPS = 1e-4  # of flux2; BatchNorm's usual 1e-5 is wrong here
# Pixels at a time: about 1 GB of activations in fp32. A larger image goes alone.
SLICE = 512 * 512
# In latents: an image with a side above 256 · 8 = 2048 px is decoded in tiles of 1024 px.
TILE_ABOVE, TILE, OVERLAP = 256, 128, 32
PIXEL = re.compile(r"pixel(?::([1-9]\d?))?")


class Autoencoder(nn.Module):
    """What VAE and LinearVAE are to the rest of the code.

    encode(images), decode(latents)     see the top of this file
    raw(images), from_raw(raw)          what a cache keeps of images, and its latents
    fingerprint, raw_fingerprint        equal fingerprints, equal latents, or equal raw ones
    meta()                              what vae_from_meta() needs to find or rebuild it
    """

    name: str
    channels: int  # of the latents
    factor: int  # an image's side over its latents'
    unit: int  # what divides the side of an image

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of a square image's latents."""
        if resolution % self.unit:
            raise UserError(
                f"resolution {resolution} is not divisible by {self.unit}, as the VAE needs",
                do=f"Use a multiple of {self.unit}.",
            )
        side = resolution // self.factor
        return self.channels, side, side


# ---- the convolutional network ------------------------------------------------------------------


class Norm(nn.GroupNorm):
    """GroupNorm and SiLU. The U-Net's eps is 1e-5."""

    def __init__(self, C: int, silu: bool = True):
        super().__init__(32, C, eps=1e-6)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.weight, self.bias, 32, silu=self.silu, eps=self.eps)


class ResBlock(nn.Module):
    def __init__(self, C: int, out: int):
        super().__init__()
        self.norm1 = Norm(C)
        self.conv1 = nn.Conv2d(C, out, 3, padding=1)
        self.norm2 = Norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if C == out else nn.Conv2d(C, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.nin_shortcut(x) + self.conv2(self.norm2(self.conv1(self.norm1(x))))


class Attention(nn.Module):
    """Self-attention over the positions, one head, residual."""

    def __init__(self, C: int):
        super().__init__()
        self.norm = Norm(C, silu=False)
        self.q = nn.Conv2d(C, C, 1)
        self.k = nn.Conv2d(C, C, 1)
        self.v = nn.Conv2d(C, C, 1)
        self.proj_out = nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        def linear(conv: nn.Conv2d, h: Tensor) -> Tensor:
            return F.linear(h, conv.weight.flatten(1), conv.bias)

        B, C, H, W = x.shape
        h = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)  # a view in channels_last
        q, k, v = [linear(conv, h)[:, None] for conv in (self.q, self.k, self.v)]  # (B, 1, N, C)
        h = linear(self.proj_out, attention(q, k, v)[:, 0])
        return x + h.view(B, H, W, C).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Halve H and W. Padded on the right and below only, unlike the U-Net's."""

    def __init__(self, C: int):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def chain(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def middle(C: int) -> nn.Sequential:
    return chain(block_1=ResBlock(C, C), attn_1=Attention(C), block_2=ResBlock(C, C))


def level(C: int, out: int, blocks: int, **resample: nn.Module) -> nn.Sequential:
    stack = [ResBlock(out if j else C, out) for j in range(blocks)]
    return chain(block=nn.Sequential(*stack), **resample)


def encoder(widths: tuple[int, ...], z: int) -> nn.Sequential:
    """(B, 3, H, W) -> (B, 2z, H/f, W/f)."""
    down = []
    for i, (C, out) in enumerate(zip((widths[0], *widths), widths)):
        resample = {"downsample": Downsample(out)} if i < len(widths) - 1 else {}
        down.append(level(C, out, 2, **resample))
    return chain(
        conv_in=nn.Conv2d(3, widths[0], 3, padding=1),
        down=nn.Sequential(*down),
        mid=middle(widths[-1]),
        norm_out=Norm(widths[-1]),
        conv_out=nn.Conv2d(widths[-1], 2 * z, 3, padding=1),
    )


def decoder(widths: tuple[int, ...], z: int) -> nn.Sequential:
    """(B, z, h, w) -> (B, 3, f·h, f·w). Level 0 is the last to run."""
    up = {}
    for i, (C, out) in reversed(list(enumerate(zip((*widths[1:], widths[-1]), widths)))):
        resample = {"upsample": Upsample(out, conv=True)} if i else {}
        up[str(i)] = level(C, out, 3, **resample)
    return chain(
        conv_in=nn.Conv2d(z, widths[-1], 3, padding=1),
        mid=middle(widths[-1]),
        up=chain(**up),
        norm_out=Norm(widths[0]),
        conv_out=nn.Conv2d(widths[0], 3, 3, padding=1),
    )


class Stats(nn.Module):
    """Flux 2's normalisation under its file's names. Not nn.BatchNorm2d: train() would change what
    latents mean, half() would round it."""

    def __init__(self, C: int):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(C))
        self.register_buffer("running_var", torch.ones(C))
        # Unused; some files have it, some do not.
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Stats":
        """To another device, yes; to another dtype, no."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, after in list(self._buffers.items()):
            if after.dtype != before[name].dtype:
                self._buffers[name] = before[name].to(after.device)
        return self

    def normalise(self, x: Tensor, inverse: bool = False) -> Tensor:
        mean = self.running_mean.to(x.dtype)[:, None, None]
        std = (self.running_var.to(x.dtype) + STATS_EPS).sqrt()[:, None, None]
        return x * std + mean if inverse else (x - mean) / std


@dataclass(frozen=True)
class VAEConfig:
    """The shape of a VAE. Levels are counted from the image: level l works at H / 2^l."""

    z: int = 4
    encoder: tuple[int, ...] = (128, 256, 512, 512)  # channels by level
    decoder: tuple[int, ...] = (128, 256, 512, 512)  # in the same order, though it runs backwards
    quant: bool = True
    stats: bool = False


class VAE(Autoencoder):
    """LDM's AutoencoderKL, frozen. Encodes in fp32 whatever the weights' dtype; decodes in the
    weights' dtype."""

    def __init__(self, cfg: VAEConfig, family: str, latents: str = "", kind: Family | None = None):
        super().__init__()
        known = LATENTS if cfg.stats else ("",)
        if latents and latents not in known:
            names = " and ".join(known) or "only one, without a name"
            raise UserError(f"latent layout {latents!r}: {family} has {names}", do="Leave it out.")
        self.cfg = cfg
        self.name = self.family = family
        # A file may have constants of its own.
        self.kind = kind or FAMILIES[family]
        self.latents = latents or known[0]
        packed = self.latents == "packed128"
        self.f = 2 ** (len(cfg.encoder) - 1)  # of the convolutions
        self.factor = 2 * self.f if packed else self.f
        self.channels = 4 * cfg.z if packed else cfg.z
        self.unit = 2 * self.f if cfg.stats else self.f
        self.source: dict[str, str] = {}  # where the weights came from, and their fingerprint
        self.encoder = encoder(cfg.encoder, cfg.z)
        self.decoder = decoder(cfg.decoder, cfg.z)
        self.quant_conv = nn.Conv2d(2 * cfg.z, 2 * cfg.z, 1) if cfg.quant else nn.Identity()
        self.post_quant_conv = nn.Conv2d(cfg.z, cfg.z, 1) if cfg.quant else nn.Identity()
        self.bn = Stats(4 * cfg.z) if cfg.stats else None
        self.requires_grad_(False).to(memory_format=torch.channels_last)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.weight.dtype

    @property
    def raw_fingerprint(self) -> str:
        """Equal raw fingerprints, equal raw latents: flux2's two layouts are views of the same."""
        weights = self.source["fingerprint"] if self.source else weights_fingerprint(self)
        return f"{self.family} {weights}"

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints, equal latents."""
        mark = f"{self.raw_fingerprint} {self.latents}"
        return f"{mark} {self.constants}" if self.kind != FAMILIES[self.family] else mark

    @property
    def constants(self) -> dict[str, Any]:
        """Of normalisation, as JSON has them."""
        if self.bn is not None:
            mean, var = to_base64(self.bn.running_mean), to_base64(self.bn.running_var)
            return {"eps": STATS_EPS, "mean": mean, "var": var}
        return constants_of(self.kind)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) in [-1, 1] -> mean, logvar (B, z, H/8, W/8) of the posterior, as the
        network gives them, fp32."""
        self.check_shape(images, 3, self.unit, "encodes images")
        wide = torch.promote_types(self.dtype, torch.float32)
        pair = nn.Sequential(self.encoder, self.quant_conv)
        # The weights themselves, if they are wide already.
        weights = {k: v.to(wide) for k, v in pair.state_dict().items()}

        def run(x: Tensor) -> Tensor:
            x = x.to(wide, memory_format=torch.channels_last)
            return torch.func.functional_call(pair, weights, x)

        with full_precision(images.device):
            h = sliced(run, images, 1)
        mean, logvar = self.check_finite(h, images, "encode").chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def raw(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> what a cache keeps (B, z, H/8, W/8), fp32: the mean
        before it is normalised, for the constants of normalisation can change later."""
        return self.moments(images)[0]

    def from_raw(self, raw: Tensor) -> Tensor:
        """What a cache keeps -> model-space latents, fp32."""
        return self.normalise(raw.float())

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> model-space latents (B, C, H/factor, W/factor), fp32:
        the mean, normalised."""
        return self.normalise(self.moments(images)[0])

    def decode(self, latents: Tensor) -> Tensor:
        """Model-space latents (B, C, h, w) -> images (B, 3, factor·h, factor·w), fp32, about
        [-1, 1], not clamped."""
        self.check_shape(latents, self.channels, self.unit // self.factor, "decodes latents")
        if self.dtype == torch.float16 and not self.kind.fp16:
            raise UserError(
                f"{self.name} overflows in fp16",
                do=f"Use bf16 or fp32, or the autoencoder {self.name}-fp16-fix.",
            )
        z = self.denormalise(latents)

        def run(part: Tensor) -> Tensor:
            part = part.to(self.dtype, memory_format=torch.channels_last)
            return self.decoder(self.post_quant_conv(part)).to(z.dtype)

        decode = tiled if max(z.shape[2:]) > TILE_ABOVE else sliced
        with torch.autocast(latents.device.type, enabled=False):
            images = decode(run, z, self.f)
        return self.check_finite(images, latents, "decode")

    def normalise(self, mean: Tensor) -> Tensor:
        """The network's own latents (B, z, H/8, W/8) -> model space, in at least fp32."""
        x = self.widened(mean)
        if self.bn is None:
            shift, scale = scaled(self.kind, x)
            return (x - shift) * scale
        x = self.bn.normalise(F.pixel_unshuffle(x, 2))  # (B, 4z, H/16, W/16): statistics by phase
        return x if self.latents == "packed128" else F.pixel_shuffle(x, 2)

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of normalise()."""
        x = self.widened(latents)
        if self.bn is None:
            shift, scale = scaled(self.kind, x)
            return x / scale + shift
        x = x if self.latents == "packed128" else F.pixel_unshuffle(x, 2)
        return F.pixel_shuffle(self.bn.normalise(x, inverse=True), 2)

    def widened(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.dtype)
        return x.to(torch.promote_types(dtype, torch.float32))

    def check_shape(self, x: Tensor, channels: int, unit: int, what: str) -> None:
        if x.ndim == 4 and x.shape[1] == channels and all(n % unit == 0 for n in x.shape[2:]):
            return
        sides = f" with H and W divisible by {unit}" if unit > 1 else ""
        raise UserError(
            f"{self.name} {what} (B, {channels}, H, W){sides}, got {tuple(x.shape)}",
            do="Crop, pad or resize them.",
        )

    def check_finite(self, out: Tensor, given: Tensor, what: str) -> Tensor:
        """out, unless the autoencoder itself made it non-finite; what comes in broken goes out
        broken."""
        bad = ~out.isfinite().flatten(1).all(1) & given.isfinite().flatten(1).all(1)
        if not bad.any():
            return out
        do = "Are its weights damaged, or another family's?  Name another file with --vae."
        if self.dtype == torch.float16:
            do = "Use bf16 or fp32."
        samples = f"{int(bad.sum())} of {len(bad)} samples"
        raise UserError(
            f"{self.name}: {what} made {samples} non-finite, with weights in {self.dtype}", do=do
        )

    def meta(self) -> dict[str, Any]:
        """What a checkpoint needs to find this autoencoder again, and to know that it is the same:
        no weights."""
        if not self.source:
            raise ValueError(
                "this VAE came from no file, so nothing can name it: save_vae() it and load that."
            )
        return {
            "name": self.name,
            "factor": self.factor,
            "channels": self.channels,
            "family": self.family,
            "latents": self.latents,
            "normalisation": self.constants,
            **self.source,
        }


# ---- memory -------------------------------------------------------------------------------------


def sliced(run: Callable[[Tensor], Tensor], x: Tensor, f: int) -> Tensor:
    """run(x) for SLICE pixels at a time, f² of them to a position of x: memory does not grow with
    the batch."""
    n = SLICE // (f * f * x.shape[2] * x.shape[3])
    return torch.cat([run(part) for part in x.split(max(n, 1))])


def tile_places(length: int, ramp: Tensor, f: int) -> Iterator[tuple[int, Tensor]]:
    """(start, weights by pixel) of each tile on a side; all are of one size, and evenly spread."""
    n = max(math.ceil((length - OVERLAP) / (TILE - OVERLAP)), 1)
    size = min(TILE, length)
    for i in range(n):
        weights = torch.ones(size * f, device=ramp.device, dtype=ramp.dtype)
        if i > 0:
            weights[: len(ramp)] *= ramp
        if i < n - 1:
            weights[-len(ramp) :] *= ramp.flip(0)
        yield i * (length - size) // max(n - 1, 1), weights


def tiled(run: Callable[[Tensor], Tensor], z: Tensor, f: int) -> Tensor:
    """Decode z (B, z, h, w) in overlapping tiles, faded linearly into each other.

    An approximation: GroupNorm and attention see one tile at a time, so colours may shift a little
    from tile to tile.
    """
    B, _, h, w = z.shape
    steps = OVERLAP * f
    ramp = torch.arange(1, steps + 1, device=z.device, dtype=z.dtype) / (steps + 1)
    out = z.new_zeros(B, 3, h * f, w * f)
    total = z.new_zeros(h * f, w * f)
    for top, rows in tile_places(h, ramp, f):
        for left, columns in tile_places(w, ramp, f):
            weights = rows[:, None] * columns
            down = slice(top * f, top * f + len(rows))
            right = slice(left * f, left * f + len(columns))
            part = z[:, :, top : top + TILE, left : left + TILE]
            out[..., down, right] += weights * sliced(run, part, f)
            total[down, right] += weights
    return out / total


# ---- the linear ones: pca and pixel -------------------------------------------------------------


class LinearVAE(Autoencoder):
    """Each factor × factor patch, minus the mean patch, in an orthonormal basis, each channel
    divided by its `std`.

    basis (channels, 3·factor²) has orthonormal rows, so encode(decode(z)) = z always, and
    decode(encode(x)) = x when the basis is square. Patch entries are in pixel_unshuffle order:
    channel, then row, then column.
    """

    def __init__(self, name: str, factor: int, basis: Tensor, mean: Tensor, std: Tensor):
        super().__init__()
        self.name = name
        self.factor = self.unit = factor
        self.channels = len(basis)
        for key, value in (("basis", basis), ("mean", mean), ("std", std)):
            self.register_buffer(key, value.float())

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints, equal latents."""
        return fingerprint(self.state_dict())

    @property
    def raw_fingerprint(self) -> str:
        return self.fingerprint

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> latents (B, C, H/f, W/f)."""
        patches = F.pixel_unshuffle(images.float(), self.factor).movedim(1, -1)  # (B, h, w, 3f²)
        return ((patches - self.mean) @ self.basis.T / self.std).movedim(-1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, h, w) -> images (B, 3, f·h, f·w), about [-1, 1], not clamped."""
        patches = latents.float().movedim(1, -1) * self.std @ self.basis + self.mean
        return F.pixel_shuffle(patches.movedim(-1, 1), self.factor)

    def raw(self, images: Tensor) -> Tensor:
        """What a cache keeps of images: the latents."""
        return self.encode(images)

    def from_raw(self, raw: Tensor) -> Tensor:
        return raw.float()

    def meta(self) -> dict[str, Any]:
        """What a checkpoint needs to rebuild this autoencoder: its constants are small enough to
        travel along."""
        constants = {k: to_base64(v) for k, v in self.state_dict().items()}
        return {"name": self.name, "factor": self.factor, "channels": self.channels, **constants}


def to_base64(tensor: Tensor) -> str:
    return base64.b64encode(tensor.cpu().numpy().tobytes()).decode()


def pixel(factor: int = 1) -> LinearVAE:
    """Pixels as latents, factor × factor of them stacked per position."""
    n = 3 * factor * factor
    name = "pixel" if factor == 1 else f"pixel:{factor}"
    return LinearVAE(name, factor, torch.eye(n), torch.zeros(n), torch.ones(n))


def pca_samples(resolution: int) -> int:
    """How many images pca is fitted to: 131,072 patches at least tell 192 dimensions apart, and
    more would cost gigabytes."""
    return max(2048 * 64**2 // resolution**2, 64)


def fit_pca(images: Tensor, channels: int = 32, factor: int = 8) -> LinearVAE:
    """Principal components of the patches of images (N, 3, H, W) in [-1, 1]. Deterministic, signs
    included.

    Latents have unit variance over all channels; between channels the spread is halved (in log),
    not removed: the mean colour of a patch weighs more in a loss than its faintest texture,
    without drowning it.
    """
    patches = F.pixel_unshuffle(images.double(), factor).movedim(1, -1)
    patches = patches.reshape(-1, 3 * factor * factor)
    mean = patches.mean(0)
    centred = patches - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    basis = vectors.flip(1)[:, :channels].T  # rows: largest variance first
    # Eigenvectors have no sign of their own: the largest entry becomes positive.
    basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
    variance = values.flip(0)[:channels].clamp(min=1e-8)  # a constant data set has none
    std = variance**0.25
    std = std * (variance / std**2).mean().sqrt()
    return LinearVAE("pca", factor, basis, mean, std)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two image batches in [-1, 1] (peak to peak 2), over all
    pixels."""
    error = (a.double().clamp(-1, 1) - b.double().clamp(-1, 1)).square().mean()
    return float(decibels(error.clamp(min=1e-12), peak=2.0))


AnyVAE = VAE | LinearVAE


# ---- loading and saving -------------------------------------------------------------------------


def weights_fingerprint(vae: VAE) -> str:
    """The fingerprint of the weights in fp32, whatever the file has them in."""
    return fingerprint({k: v.float() for k, v in vae.state_dict().items() if k != OPTIONAL})


@lru_cache
def tensor_shapes(cfg: VAEConfig) -> dict[str, tuple[int, ...]]:
    """{native name: shape} of every tensor of VAE(cfg)."""
    with torch.device("meta"):
        net = VAE(cfg, "flux2" if cfg.stats else "sd")
    return {name: tuple(v.shape) for name, v in net.state_dict().items()}


def build_vae(
    box: Container, family: str | None, latents: str | None, own: dict[str, Any] | None = None
) -> VAE:
    """A VAE from any file that holds one, on the CPU and in fp32; every tensor is used. own: the
    constants of normalisation in metadata of ours, {} for the family's."""
    part, layout = vae_part(box)
    cfg = VAEConfig(**infer_vae(part, layout))
    table = vae_map(tensor_shapes(cfg), layout)
    absent = {OPTIONAL} - set(part)
    wanted = {name: shape for name, shape in table.values() if name not in absent}
    check_shapes(wanted, {k: e.shape for k, e in part.table.items()}, str(box.path))
    said = scaling_of(box, cfg.z, own)
    with torch.device("meta"):
        name, kind = pick_family(cfg, family, said, box.path)
        vae = VAE(cfg, name, latents or "", kind)
    tensors = {}
    for name, v in vae.state_dict().items():
        if name in absent:
            tensors[name] = torch.zeros_like(v, device="cpu")
        else:
            tensors[name] = part[table[name][0]].to(v.dtype).reshape(v.shape)
    load_strict(vae, tensors, str(box.path), assign=True)
    vae.source = {**origin(box.path), "fingerprint": weights_fingerprint(vae)}
    return vae.requires_grad_(False).to(memory_format=torch.channels_last)


def save_vae(path: Path, vae: AnyVAE, layout: str = "native", weights: bool = True) -> None:
    """Write to a file that load_vae reads. weights=False: of a VAE only the note where they are; a
    LinearVAE is its own note."""
    if isinstance(vae, LinearVAE):
        meta = {"kind": "vae", "name": vae.name, "factor": vae.factor}
        meta["fingerprint"] = vae.fingerprint
        write_tensors(path, dict(vae.state_dict()), meta)
    elif not weights:
        write_tensors(path, {}, {"kind": "vae", **vae.meta()})
    else:
        state = vae.state_dict()
        table = vae_map(tensor_shapes(vae.cfg), layout)
        meta = {
            "kind": "vae",
            "family": vae.family,
            "latents": vae.latents,
            "layout": layout,
            "fingerprint": weights_fingerprint(vae),
        }
        if vae.kind != FAMILIES[vae.family]:
            meta["normalisation"] = vae.constants
        tensors = {name: state[k].reshape(shape) for k, (name, shape) in table.items()}
        write_tensors(path, tensors, meta)


def vae_from_meta(meta: dict[str, Any], where: str = "") -> AnyVAE:
    """The inverse of meta(). A VAE is loaded again from its source, or from `where` it lies now,
    and must be the same, bit for bit."""
    if "family" not in meta:
        return LinearVAE(*linear_parts(meta, "the checkpoint"))
    source = where or meta["source"]
    try:
        named = where or from_file(source, "--vae")
        vae = load_vae(named, meta["family"], meta["latents"] or None)
    except UserError as error:
        raise UserError(
            f"cannot load {meta['name']}, the autoencoder that this belongs to: {error}",
            do="Put it back, or say where it is with --vae.",
        ) from None
    now = vae.meta()
    for key in ("fingerprint", "normalisation"):
        if now[key] != meta[key]:
            raise UserError(
                f"{source} is not the {meta['name']} autoencoder that this belongs to: its {key} "
                "is another",
                do="Restore the file, or name the right one with --vae.",
            )
    return vae


def read_name(
    name_or_path: Path | str, family: str | None, latents: str | None
) -> tuple[str, dict[str, str]]:
    """Split "flux2:packed128:FILE" into FILE and what it says, {"family": …, "latents": …}.
    That must not differ from the other two arguments. A family alone is its place on the Hub."""
    name = str(name_or_path)
    given: dict[str, str] = {}
    head, _, rest = name.partition(":")
    if head in FAMILIES:
        given["family"], name = head, rest
        head, _, rest = name.partition(":")
        if head in LATENTS:
            given["latents"], name = head, rest
        name = name or FAMILIES[given["family"]].hub
    for key, value, known in (("family", family, FAMILIES), ("latents", latents, LATENTS)):
        if value and value not in known:
            raise UserError(
                f"{key} {value!r} is not one of {', '.join(known)}",
                do=closest(value, known) or "Choose one of them.",
            )
        if value and given.setdefault(key, value) != value:
            raise UserError(
                f"autoencoder {name_or_path}",
                got=f"{key} {given[key]}",
                wanted=value,
                do=f"Name one of {key} {value}.",
            )
    return name, given


def load_vae(
    name_or_path: Path | str, family: str | None = None, latent_layout: str | None = None
) -> AnyVAE:
    """An autoencoder by name or file.

    "pixel", "pixel:8"; "sd" … "flux2" from the Hub, "flux2:packed128"; FILE or hf:org/name/file
    in any layout, also a folder or a whole Stable Diffusion checkpoint, as "sdxl:FILE" where the
    file cannot say what it is; a file written by save_vae (every training run leaves one:
    runs/<name>/vae.safetensors).
    """
    name, given = read_name(name_or_path, family, latent_layout)
    pixels = PIXEL.fullmatch(name)
    if pixels and not given:
        return pixel(int(pixels[1] or 1))
    path = vae_file(resolve(name, USUAL_VAE))
    if not path.is_file():
        raise UserError(
            f"no autoencoder {str(name_or_path)!r}.{closest(name, FAMILIES)}  Got no such file; "
            f"wanted pixel, pixel:N (N below 100), {', '.join(FAMILIES)}, one of these before "
            ":FILE, hf:org/name/file, or a file such as runs/<name>/vae.safetensors",
            do="Name one of them.",
        )
    return open_vae(open_weights(path), given)


def open_vae(box: Container, given: dict[str, str]) -> AnyVAE:
    """The autoencoder in a file: one of ours, a note where it is, or somebody else's."""
    meta = read_meta(box) if META in box.meta else {"kind": "vae"}
    if meta.get("kind") != "vae":
        raise UserError(
            f"{box.path} holds no autoencoder (its kind: {meta.get('kind', 'U-Net')})",
            do="Name an autoencoder's file; a run's is runs/<name>/vae.safetensors.",
        )
    recorded = meta.get("family") or meta.get("name")
    linear = "basis" in box
    if recorded and (given.get("family", recorded) != recorded or linear and given):
        got = " ".join(given.values())
        raise UserError(f"{box.path} says it is {recorded}, got {got}", do="Leave it out.")
    if "source" in meta:  # a note
        check_note(meta, box.path)
        return vae_from_meta({**meta, **given})
    if META in box.meta and not linear:
        check(meta, VaeMeta, box.path)
    if linear:
        vae = LinearVAE(*linear_parts(meta, box.path, box))
        digest = vae.fingerprint
    else:
        latents = given.get("latents") or meta.get("latents")
        own = meta.get("normalisation", {}) if META in box.meta else None
        vae = build_vae(box, recorded or given.get("family"), latents, own)
        digest = vae.source["fingerprint"]
    if meta.get("fingerprint", digest) != digest:
        raise UserError(
            f"{box.path}: the weights do not match their own fingerprint; the file was altered or "
            "damaged",
            do="Copy it again.",
        )
    return vae


# ---- whose autoencoder? -------------------------------------------------------------------------


def choose(
    name: str = "",
    *,
    kept: Path | None = None,
    meta: dict[str, Any] | None = None,
    network: str = "the checkpoint",
    cached: Path | None = None,
    fit: Callable[[], AnyVAE] | None = None,
) -> AnyVAE:
    """The autoencoder to work with: one rule for training, distilling, sampling and encoding.

    In this order: the one that a run has kept in its folder; that of a network's metadata, whose
    weights know no other latents; the one that is named; that of a latent cache; a new one by
    fit(). Whoever reads a cache also calls data.cache.self_check.

    name: what --vae says. "" and "pca" leave it to the rest, but "pca" refuses a network of others.
    kept: a file that save_vae wrote, and that may not be there yet. A name must mean the same one.
    meta: of the checkpoint that is to be used; `network` is what errors call it. A name must mean
        its autoencoder too: it may have moved.
    cached: the file of the autoencoder in a latent cache, if the data is one.
    """
    named = name not in ("", "pca")
    if kept is not None and kept.exists():
        return load_kept(kept, name if named else "")
    if meta is not None and "vae" in meta:
        return vae_of_network(meta["vae"], name, network, cached)
    if named:
        return load_vae(name)
    if cached is not None:
        return load_vae(cached)
    if meta is not None or fit is None:
        raise UserError(
            f"{network} does not say which latents its network knows",
            do="Name the autoencoder with --vae FILE, pixel or pixel:N; pca is fitted anew to "
            "every data set, so it does not count.",
        )
    return fit()


def load_kept(note: Path, name: str) -> AnyVAE:
    """The autoencoder that a run kept in its folder, or a note of. `name`: where it lies now; it
    has to be the same one."""
    meta = read_meta(open_weights(note))
    if name and "source" in meta:
        check_note(meta, note)
        return vae_from_meta(meta, name)
    vae = load_vae(note)
    if name and load_vae(name).fingerprint != vae.fingerprint:
        raise UserError(
            f"{note.parent} was begun with another autoencoder ({vae.name}) than {name}",
            do="Leave --vae as it was, or give the new run its own --name.",
        )
    return vae


def vae_of_network(meta: dict[str, Any], name: str, network: str, cached: Path | None) -> AnyVAE:
    """The autoencoder of a checkpoint's metadata, which `name` must not contradict."""
    named = name not in ("", "pca")
    has_file = "family" in meta and not PIXEL.fullmatch(name)
    # A convolutional one may have moved to `name`, and has to be the same there.
    vae = vae_from_meta(meta, name if named and has_file else "")
    same = True
    if named and not has_file:
        same = load_vae(name).fingerprint == vae.fingerprint
    elif name == "pca" and cached is None:
        same = vae.name == "pca"
    if not same:
        raise UserError(
            f"{network} was trained on other latents ({vae.name}) than --vae {name} makes",
            do="Leave --vae out, or name the same autoencoder.",
        )
    return vae


def main() -> None:
    raise UserError(
        "vae.py has no command of its own",
        do="A latent cache is made by python -m data.encode, in the folder of this file.",
    )


if __name__ == "__main__":
    cli(main)
