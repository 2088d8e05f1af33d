"""Autoencoders between images and the latents a U-Net sees.

    vae = fit_pca(images)                    # "pca": linear, f8, 32 channels, fitted in seconds, no download
    vae = load_vae("flux2")                  # LDM's convolutional ones: sd, sdxl, sdxl-fp16-fix, flux1, flux2
    vae = load_vae("sdxl:FILE")              # … in any layout; FILE may be hf:org/name/file. "flux2:packed128" is /16 with 128 channels
    z = vae.encode(x)                        # x (B, 3, H, W) in [-1, 1]  ->  (B, C, H/f, W/f), about unit variance
    x = vae.decode(z)

`pixel` is the identity: pixels as latents. VAE has LDM's key names (Rombach et al. 2022), which are Black Forest Labs' too;
what diffusers calls the same tensors is at the end of this file. encode() gives the posterior's mean, never a sample.
"""

import contextlib
import json
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from autoencoder import decoder, encoder
from ckpt.unets import check_shapes, fingerprint, load_strict, some
from harness.cli import UserError, cli, closest
from harness.files import META, Container, read_meta, write_tensors
from ckpt.containers import open_weights
from ckpt.hub import origin, resolve
from ckpt.layouts import parts
from linear import LinearVAE, enough, fit_pca, linear_from_meta, pixel, psnr, text   # noqa: F401  this file is where the rest of the code finds them


class Family(NamedTuple):
    z: int                                   # channels of the network's own latents
    scale: float                             # model-space latents are (mean - shift) · scale …
    shift: float
    quant: bool                              # has the two 1×1 convolutions around the latents
    stats: bool                              # … or, instead of scale and shift, are normalised by running statistics
    fp16: bool                               # activations stay below 65,504
    hub: str


# No revision is pinned, for none was checked; what a name led to (commit, sha256, fingerprint) is recorded with every use.
FAMILIES = {
    "sd": Family(4, 0.18215, 0.0, True, False, True, "hf:stable-diffusion-v1-5/stable-diffusion-v1-5/vae/diffusion_pytorch_model.safetensors"),
    "sdxl": Family(4, 0.13025, 0.0, True, False, False, "hf:stabilityai/sdxl-vae/diffusion_pytorch_model.safetensors"),
    "sdxl-fp16-fix": Family(4, 0.13025, 0.0, True, False, True, "hf:madebyollin/sdxl-vae-fp16-fix/diffusion_pytorch_model.safetensors"),
    "flux1": Family(16, 0.3611, 0.1159, False, False, True, "hf:black-forest-labs/FLUX.1-schnell/ae.safetensors"),
    "flux2": Family(32, 1.0, 0.0, True, True, True, "hf:black-forest-labs/FLUX.2-dev/ae.safetensors"),
}
LATENTS = ("unpacked32", "packed128")        # flux2: /8 with 32 channels, or the same numbers at /16 with 128, as its own U-Net has them
STATS_EPS = 1e-4                             # of flux2; BatchNorm's usual 1e-5 is wrong here
SLICE = 512 * 512                            # pixels at a time: about 1 GB of activations in fp32; a larger image goes alone
TILE_ABOVE, TILE, OVERLAP = 256, 128, 32     # decode: an image with a side above 256 · 8 = 2048 px is put together from 1024 px tiles
FOLDER = ("diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors", "ae.safetensors", "vae.safetensors")


# ---- the network ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class VAEConfig:
    """The shape of a VAE. Levels are counted from the image: level l works at H / 2^l."""
    z: int = 4
    encoder: tuple[int, ...] = (128, 256, 512, 512)      # channels by level
    decoder: tuple[int, ...] = (128, 256, 512, 512)      # in the same order, though it runs backwards
    quant: bool = True
    stats: bool = False


class Stats(nn.Module):
    """Flux 2's normalisation under its file's names. Not nn.BatchNorm2d: train() would change what latents mean, half() round it."""

    def __init__(self, C: int):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(C))
        self.register_buffer("running_var", torch.ones(C))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))     # unused; some files have it, some do not

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Stats":
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, after in list(self._buffers.items()):                         # another device, yes; another dtype, no
            self._buffers[name] = after if after.dtype == before[name].dtype else before[name].to(after.device)
        return self

    def normalise(self, x: Tensor, inverse: bool = False) -> Tensor:
        mean, std = (v.to(x.dtype)[:, None, None] for v in (self.running_mean, (self.running_var.to(x.dtype) + STATS_EPS).sqrt()))
        return x * std + mean if inverse else (x - mean) / std


class VAE(nn.Module):
    """LDM's AutoencoderKL, frozen. Encodes in fp32 whatever the weights' dtype; decodes in the weights' dtype."""

    def __init__(self, cfg: VAEConfig, family: str, latents: str = ""):
        super().__init__()
        known = LATENTS if cfg.stats else ("",)
        if latents and latents not in known:
            raise UserError(f"latent layout {latents!r}: {family} has {' and '.join(known) or 'only one, without a name'}.")
        self.cfg, self.family, self.kind, self.latents, self.name = cfg, family, FAMILIES[family], latents or known[0], family
        self.f, packed = 2 ** (len(cfg.encoder) - 1), self.latents == "packed128"
        self.factor, self.channels, self.unit = self.f * (1 + packed), cfg.z * (1 + 3 * packed), self.f * (1 + cfg.stats)
        self.source: dict[str, str] = {}                                        # where the weights came from, and their fingerprint
        self.encoder, self.decoder = encoder(cfg.encoder, cfg.z), decoder(cfg.decoder, cfg.z)
        self.quant_conv = nn.Conv2d(2 * cfg.z, 2 * cfg.z, 1) if cfg.quant else nn.Identity()
        self.post_quant_conv = nn.Conv2d(cfg.z, cfg.z, 1) if cfg.quant else nn.Identity()
        self.bn = Stats(4 * cfg.z) if cfg.stats else None
        self.requires_grad_(False).to(memory_format=torch.channels_last)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.weight.dtype

    @property
    def raw_mark(self) -> str:
        """Equal raw marks, equal moments."""
        return f"{self.family} {self.source['fingerprint'] if self.source else weights_mark(self)}"

    @property
    def mark(self) -> str:
        """Equal marks, equal latents."""
        return f"{self.raw_mark} {self.latents}"

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of a square image's latents."""
        if resolution % self.unit:
            raise UserError(f"resolution {resolution} is not divisible by {self.unit}, as {self.name} needs.")
        return self.channels, resolution // self.factor, resolution // self.factor

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) in [-1, 1] -> mean, logvar (B, z, H/8, W/8) of the posterior, as the network gives them, fp32."""
        self.check(images, 3, self.unit, "encodes images")
        wide = torch.promote_types(self.dtype, torch.float32)
        pair = nn.Sequential(self.encoder, self.quant_conv)
        weights = {k: v.to(wide) for k, v in pair.state_dict().items()}         # themselves, if they are wide already
        with full_precision(images.device):
            h = sliced(lambda x: torch.func.functional_call(pair, weights, x.to(wide, memory_format=torch.channels_last)), images, 1)
        mean, logvar = self.finite(h, images, "encode").chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> model-space latents (B, C, H/factor, W/factor), fp32: the mean, normalised."""
        return self.normalise(self.moments(images)[0])

    def decode(self, latents: Tensor) -> Tensor:
        """Model-space latents (B, C, h, w) -> images (B, 3, factor·h, factor·w), fp32, about [-1, 1], not clamped."""
        self.check(latents, self.channels, self.unit // self.factor, "decodes latents")
        if self.dtype == torch.float16 and not self.kind.fp16:
            raise UserError(f"{self.name} overflows in fp16.  Use bf16 or fp32, or the autoencoder {self.name}-fp16-fix.")
        z = self.denormalise(latents)
        wide = z.dtype

        def run(z: Tensor) -> Tensor:
            return self.decoder(self.post_quant_conv(z.to(self.dtype, memory_format=torch.channels_last))).to(wide)

        with torch.autocast(latents.device.type, enabled=False):
            images = tiled(run, z, self.f) if max(z.shape[2:]) > TILE_ABOVE else sliced(run, z, self.f)
        return self.finite(images, latents, "decode")

    def normalise(self, mean: Tensor, inverse: bool = False) -> Tensor:
        """The network's own latents (B, z, H/8, W/8) -> model space, in at least fp32."""
        x = mean.to(torch.promote_types(torch.promote_types(mean.dtype, self.dtype), torch.float32))
        if self.bn is None:
            return x / self.kind.scale + self.kind.shift if inverse else (x - self.kind.shift) * self.kind.scale
        x = x if inverse and self.latents == "packed128" else F.pixel_unshuffle(x, 2)
        x = self.bn.normalise(x, inverse)                                       # (B, 4z, H/16, W/16): each phase has its own statistics
        return x if not inverse and self.latents == "packed128" else F.pixel_shuffle(x, 2)

    def denormalise(self, latents: Tensor) -> Tensor:
        return self.normalise(latents, inverse=True)

    def check(self, x: Tensor, channels: int, unit: int, what: str) -> None:
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % unit or x.shape[3] % unit:
            raise UserError(f"{self.name} {what} (B, {channels}, H, W){f' with H and W divisible by {unit}' * (unit > 1)}, got {tuple(x.shape)}.")

    def finite(self, out: Tensor, given: Tensor, what: str) -> Tensor:
        """out, unless the autoencoder itself made it non-finite; what comes in broken goes out broken."""
        bad = ~out.isfinite().flatten(1).all(1) & given.isfinite().flatten(1).all(1)
        if bad.any():
            do = "Use bf16 or fp32." if self.dtype == torch.float16 else "Are its weights damaged, or another family's?"
            raise UserError(f"{self.name}: {what} made {int(bad.sum())} of {len(bad)} samples non-finite, with weights in {self.dtype}.  {do}")
        return out

    def meta(self) -> dict[str, Any]:
        """What a checkpoint needs to find this autoencoder again, and to know that it is the same: no weights."""
        if not self.source:
            raise ValueError("this VAE came from no file, so nothing can name it: save_vae() it and load that.")
        constants = {"scale": self.kind.scale, "shift": self.kind.shift} if self.bn is None else \
            {"eps": STATS_EPS, "mean": text(self.bn.running_mean), "var": text(self.bn.running_var)}
        return {"name": self.name, "factor": self.factor, "channels": self.channels, "family": self.family, "latents": self.latents,
                "normalisation": constants, **self.source}


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, and no TF32 in convolutions: latents are kept and compared, and TF32 has ten bits of mantissa."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def sliced(run: Callable[[Tensor], Tensor], x: Tensor, f: int) -> Tensor:
    """run(x) for SLICE pixels at a time, f² of them to a position of x: memory does not grow with the batch."""
    return torch.cat([run(part) for part in x.split(max(SLICE // (f * f * x.shape[2] * x.shape[3]), 1))])


def tiled(run: Callable[[Tensor], Tensor], z: Tensor, f: int) -> Tensor:
    """Decode z (B, z, h, w) in overlapping tiles, faded linearly into each other.

    An approximation: GroupNorm and attention see one tile at a time, so colours may shift a little from tile to tile.
    """
    ramp = torch.arange(1, OVERLAP * f + 1, device=z.device, dtype=z.dtype) / (OVERLAP * f + 1)

    def places(length: int) -> Iterator[tuple[int, Tensor]]:
        """(start, weights by pixel) of each tile; all are of one size, and evenly spread."""
        n, size = max(math.ceil((length - OVERLAP) / (TILE - OVERLAP)), 1), min(TILE, length)
        for i in range(n):
            weights = torch.ones(size * f, device=z.device, dtype=z.dtype)
            weights[:len(ramp)] *= ramp if i else 1
            weights[-len(ramp):] *= ramp.flip(0) if i < n - 1 else 1
            yield i * (length - size) // max(n - 1, 1), weights

    out, total = z.new_zeros(len(z), 3, z.shape[2] * f, z.shape[3] * f), z.new_zeros(z.shape[2] * f, z.shape[3] * f)
    for top, rows in places(z.shape[2]):
        for left, columns in places(z.shape[3]):
            weights, at = rows[:, None] * columns, (..., slice(top * f, top * f + len(rows)), slice(left * f, left * f + len(columns)))
            out[at] += weights * sliced(run, z[:, :, top:top + TILE, left:left + TILE], f)
            total[at] += weights
    return out / total


AnyVAE = VAE | LinearVAE


# ---- what files call the tensors ------------------------------------------------------------------------------------

LAYOUTS = ("native", "diffusers", "bfl")     # bfl: native, but the 1×1 convolutions are inside encoder and decoder (flux2's own file)
OPTIONAL = "bn.num_batches_tracked"          # the only tensor that a file may lack
DIFFUSERS = {"nin_shortcut": "conv_shortcut", "norm_out": "conv_norm_out", "downsample": "downsamplers.0", "upsample": "upsamplers.0",
             "block": "resnets", "mid.block_1": "mid_block.resnets.0", "mid.block_2": "mid_block.resnets.1",
             "mid.attn_1.norm": "mid_block.attentions.0.group_norm", "mid.attn_1.proj_out": "mid_block.attentions.0.to_out.0",
             **{f"mid.attn_1.{x}": f"mid_block.attentions.0.to_{x}" for x in "qkv"}}
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}      # in attention, in diffusers' first years


@lru_cache
def vae_map(cfg: VAEConfig, layout: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{native name: (name, shape) in files of that layout}, for every tensor of VAE(cfg); one to one."""
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}.{closest(layout, LAYOUTS)}")
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in VAE(cfg, "flux2" if cfg.stats else "sd").state_dict().items()}
    table, last = {}, len(cfg.decoder) - 1
    for name, shape in shapes.items():
        theirs = name
        if layout == "bfl":
            theirs = re.sub("^quant_conv", "encoder.quant_conv", re.sub("^post_quant_conv", "decoder.post_quant_conv", name))
        elif layout == "diffusers":
            for ours, other in DIFFUSERS.items():
                theirs = theirs.replace(f".{ours}.", f".{other}.")
            theirs = re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{last - int(m[1])}.", theirs.replace(".down.", ".down_blocks."))
            shape = shape[:2] if ".attentions." in theirs else shape            # linear layers, not 1×1 convolutions
        table[name] = (theirs, shape)
    assert len({theirs for theirs, _ in table.values()}) == len(table), "the map is not one to one"
    return table


def vae_part(box: Container) -> tuple[Container, str]:
    """(the autoencoder in a file, without prefixes; its layout). Everything beside it must be something known."""
    groups = parts(box)
    inner, other = groups.get("vae"), groups.get("other", {})
    if inner is None:                                                           # a bare one; LDM saved its training loss with it
        inner, other = {full: name for full, name in other.items() if not name.startswith("loss.")}, {}
    if other:
        raise UserError(f"{box.path}: {len(other)} of {len(box)} tensors belong to nothing known: {some(other)}.")
    table = {re.sub(r"(?<=\.attentions\.0\.)\w+", lambda m: OLD.get(m[0], m[0]), name): box.table[full] for full, name in inner.items()}
    if "encoder.conv_in.weight" not in table or len(table) < len(inner):
        raise UserError(f"{box.path} holds no autoencoder of a known kind, but {len(box)} tensors: {some(box)}.  In a repository of "
                        "several models, write hf:org/name/vae/FILE.")
    layout = "diffusers" if any(n.startswith("encoder.down_blocks.") for n in table) else "bfl" if "encoder.quant_conv.weight" in table else "native"
    return box.over(table), layout


def infer_vae(box: Container, layout: str) -> VAEConfig:
    """The config of a file's autoencoder, from names and shapes."""
    def widths(place: str) -> tuple[int, ...]:
        found = {int(m[1]): box.shape(n)[0] for n in box if (m := re.fullmatch(place + r"\.(\d+)\.(?:block|resnets)\.\d\.conv1\.weight", n))}
        return tuple(found[i] for i in sorted(found))

    down, up = map(widths, ("encoder.down_blocks", "decoder.up_blocks") if layout == "diffusers" else ("encoder.down", "decoder.up"))
    z = box.shape("decoder.conv_in.weight")[1] if "decoder.conv_in.weight" in box else 0
    if not z or not down or len(down) != len(up) or any(C % 32 or not C for C in down + up):
        raise UserError(f"{box.path}: no autoencoder has {down} channels down, {up} up, and {z} between.  Is the file complete?")
    quant = any(name.endswith("quant_conv.weight") for name in box)
    return VAEConfig(z, down, up[::-1] if layout == "diffusers" else up, quant, "bn.running_mean" in box)


def pick_family(cfg: VAEConfig, given: str | None, path: Path) -> str:
    """What a file is: shapes tell flux2 alone; of the others, a diffusers config.json beside it may tell the scale. No guess."""
    try:
        scale = json.loads((path.parent / "config.json").read_text()).get("scaling_factor")
    except (OSError, ValueError, AttributeError):
        scale = None                                                            # none there, or somebody else's
    fits = [name for name, f in FAMILIES.items() if (f.z, f.quant, f.stats) == (cfg.z, cfg.quant, cfg.stats)
            and (f.stats or scale is None or math.isclose(f.scale, scale))]
    can = f"{path} ({cfg.z} latent channels{', running statistics' * cfg.stats}{f', scaling_factor {scale}' if scale is not None else ''}) can be " + \
        (" or ".join(fits) or "nothing known here") + " (or Stable Diffusion 3, not known here)" * (fits == ["flux1"])
    if given and given not in fits:
        raise UserError(f"{can}, not {given}.")
    if not given and (len(fits) != 1 or not cfg.stats and scale is None):
        raise UserError(f"{can}.  What it is changes what its latents mean; say it: --vae {fits[0] if len(fits) == 1 else 'FAMILY'}:FILE")
    return given or fits[0]


# ---- loading and saving ---------------------------------------------------------------------------------------------

def weights_mark(vae: VAE) -> str:
    """The fingerprint of the weights in fp32, whatever the file has them in."""
    return fingerprint({k: v.float() for k, v in vae.state_dict().items() if k != OPTIONAL})


def build_vae(box: Container, family: str | None, latents: str | None) -> VAE:
    """A VAE from any file that holds one, on the CPU and in fp32; every tensor is used."""
    part, layout = vae_part(box)
    cfg = infer_vae(part, layout)
    table, absent = vae_map(cfg, layout), {OPTIONAL} - set(part)
    check_shapes({name: shape for name, shape in table.values() if name not in absent}, {k: e.shape for k, e in part.table.items()}, str(box.path))
    with torch.device("meta"):
        vae = VAE(cfg, pick_family(cfg, family, box.path), latents or "")
    tensors = {k: torch.zeros_like(v, device="cpu") if k in absent else part[table[k][0]].to(v.dtype).reshape(v.shape) for k, v in vae.state_dict().items()}
    load_strict(vae, tensors, str(box.path), assign=True)
    vae.source = {**origin(box.path), "fingerprint": weights_mark(vae)}
    return vae.requires_grad_(False).to(memory_format=torch.channels_last)


def save_vae(path: Path, vae: AnyVAE, layout: str = "native", weights: bool = True) -> None:
    """Write to a file that load_vae reads. weights=False: of a VAE only the note where they are; a LinearVAE is its own note."""
    if isinstance(vae, LinearVAE):
        write_tensors(path, dict(vae.state_dict()), {"kind": "vae", "name": vae.name, "factor": vae.factor})
    elif not weights:
        write_tensors(path, {}, {"kind": "vae", **vae.meta()})
    else:
        state = vae.state_dict()
        write_tensors(path, {name: state[k].reshape(shape) for k, (name, shape) in vae_map(vae.cfg, layout).items()},
                      {"kind": "vae", "family": vae.family, "latents": vae.latents, "layout": layout, "fingerprint": weights_mark(vae)})


def vae_from_meta(meta: dict[str, Any], where: str = "") -> AnyVAE:
    """The inverse of meta(). A VAE is loaded again from its source, or from `where` it lies now, and must be the same, bit for bit."""
    if "family" not in meta:
        return linear_from_meta(meta)
    source = where or meta["source"]
    try:
        vae = load_vae(source, meta["family"], meta["latents"] or None)
    except UserError as error:
        raise UserError(f"cannot load {meta['name']}, the autoencoder that this belongs to: {error}  Put it back, or say where it is with --vae.") from None
    wrong = [k for k in ("fingerprint", "normalisation") if vae.meta()[k] != meta[k]]
    if wrong:
        raise UserError(f"{source} is not the {meta['name']} autoencoder that this belongs to: its {wrong[0]} is another.  "
                        "Restore the file, or name the right one with --vae.")
    return vae


def load_noted(note: Path, moved: str = "") -> AnyVAE:
    """The autoencoder that a run kept in its folder, or a note of. `moved`: where it lies now; it has to be the same one."""
    if moved and "source" in (meta := read_meta(open_weights(note))):
        return vae_from_meta(meta, moved)
    vae = load_vae(note)
    if moved and load_vae(moved).mark != vae.mark:
        raise UserError(f"{note.parent} was begun with another autoencoder ({vae.name}) than {moved}.  Leave --vae as it was, or give the new run "
                        "its own --name.")
    return vae


def load_vae(name_or_path: Path | str, family: str | None = None, latent_layout: str | None = None) -> AnyVAE:
    """An autoencoder by name or file.

    "pixel", "pixel:8"; "sd" … "flux2" from the Hub, "flux2:packed128"; FILE or hf:org/name/file in any layout, also a folder
    or a whole Stable Diffusion checkpoint, as "sdxl:FILE" where the file cannot say what it is; a file written by save_vae
    (every training run leaves one: runs/<name>/vae.safetensors).
    """
    name, said = str(name_or_path), {}
    for key, known in (("family", FAMILIES), ("latents", LATENTS)):
        head, _, rest = name.partition(":")
        if head in known and (said or key == "family"):
            said[key], name = head, rest
    name = name or FAMILIES[said["family"]].hub
    for key, value, known in (("family", family, FAMILIES), ("latents", latent_layout, LATENTS)):
        if value and value not in known:
            raise UserError(f"{key} {value!r} is not one of {', '.join(known)}.{closest(value, known)}")
        if value and said.setdefault(key, value) != value:
            raise UserError(f"autoencoder {name_or_path}: got {key} {said[key]}, wanted {value}.")
    if re.fullmatch(r"pixel(:[1-9]\d?)?", name) and not said:
        return pixel(int(name[6:] or 1))
    path = resolve(name)
    path = next((path / f for f in FOLDER if (path / f).is_file()), path)
    if not path.is_file():
        raise UserError(f"no autoencoder {str(name_or_path)!r}.{closest(name, FAMILIES)}  Got no such file; wanted pixel, pixel:N (N below 100), "
                        f"{', '.join(FAMILIES)}, one of these before :FILE, hf:org/name/file, or a file such as runs/<name>/vae.safetensors.")
    box = open_weights(path)
    meta = read_meta(box) if META in box.meta else {"kind": "vae"}
    if meta.get("kind") != "vae":
        raise UserError(f"{path} holds no autoencoder (its kind: {meta.get('kind', 'U-Net')}).")
    own = meta.get("family") or meta.get("name")
    if own and (said.get("family", own) != own or "basis" in box and said):
        raise UserError(f"{path} says it is {own}, got {' '.join(said.values())}.  Leave it out.")
    if "basis" in box:
        return LinearVAE(meta["name"], meta["factor"], box["basis"], box["mean"], box["std"])
    if "source" in meta:                                                        # a note
        return vae_from_meta({**meta, **said})
    vae = build_vae(box, own or said.get("family"), said.get("latents") or meta.get("latents"))
    if meta.get("fingerprint", vae.source["fingerprint"]) != vae.source["fingerprint"]:
        raise UserError(f"{path}: the weights do not match their own fingerprint; the file was altered or damaged.")
    return vae


if __name__ == "__main__":
    from data.encode import main                                                     # which builds on this file
    cli(main)
