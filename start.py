"""What a run starts from: the weights of another network, and the autoencoder whose latents it learns."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ckpt.unets import find_checkpoint, load_unet, open_unet
from harness.cli import UserError
from data.dataset import Dataset
from data.images import to_float
from harness.files import META
from ckpt.containers import open_weights
from data.cache import is_cache, self_check, vae_path
from model import PRESETS, UNet, UNetConfig
from objectives import Objective
from harness.run import read_config
from vae import AnyVAE, choose, fit_pca, pca_samples, pixel, psnr

if TYPE_CHECKING:
    from train import Config


def start_from(cfg: "Config", name: str) -> tuple[UNet, dict[str, Any]]:
    """The network to start from. Where its file does not say its heads and their order, --model does, and must be what it was made with."""
    path, preset, told = find_checkpoint(name), PRESETS[cfg.model], {"heads", "order"}
    try:
        source = open_unet(path)
    except UserError:
        if META in open_weights(path).meta:                                     # ours says its heads: something else is wrong
            raise
        source, told = open_unet(path, num_heads=1, attention_order="legacy"), set()   # what else is wrong is raised now
    told -= set() if "unet" in source.meta else {"order"}                       # diffusers' files have none: theirs becomes --model's

    def traits(unet: UNetConfig) -> dict[str, Any]:
        unseen = {"in_channels", "out_channels", "num_classes", "dropout", "linear_projection", "num_heads", "num_head_channels", "attention_order"}
        used = [C for C, depth in zip(unet.channels, (*unet.attention[:-1], 1)) if depth]
        widths = [unet.head_channels(C) for C in used]
        return {**{f.name: getattr(unet, f.name) for f in fields(unet) if f.name not in unseen}, **({"channels a head": widths} if "heads" in told else {}),
                **({"attention_order": unet.attention_order} if "order" in told and widths != used else {})}   # one head has none
    its, ours = traits(source.cfg), traits(preset)
    if differs := [key for key in its if key in ours and its[key] != ours[key]]:
        same = " or ".join(key for key, unet in PRESETS.items() if traits(unet) == its)
        has, wanted = (", ".join(f"{key} {which[key]}" for key in differs) for which in (its, ours))
        raise UserError(f"--init {name} is of another architecture: it has {has}; --model {cfg.model} is {wanted}.  Choose the preset it was made "
                        f"with{f' (--model {same})' * bool(same)}.")
    say = () if "order" in told else ("attention_order",) if "heads" in told else ("num_heads", "num_head_channels", "attention_order")
    return load_unet(path, dtype=torch.float32, **{k: getattr(preset, k) for k in say})


def check_aligned(objective: Objective, told: dict[str, Any] | str | None, name: str) -> None:
    """--aligned reads the network as it was trained; `told` is what its file says of that."""
    told = {"target": told} if isinstance(told, str) else told or {}
    if differs := [f"{key} {told[key]!r}" for key in ("target", "table", "zero_snr") if key in told and told[key] != getattr(objective, key)]:
        raise UserError(f"--aligned reads the network as it was trained, and {name} has {', '.join(differs)}; the flags say target "
                        f"{objective.target!r}, table {objective.table!r}, zero_snr {objective.zero_snr}.  Give its own.")


def vae_moved(cfg: "Config", run: Path) -> bool:
    """Does --vae name another place than when the run began?"""
    return (run / "vae.safetensors").exists() and (run / "config.json").exists() and cfg.vae not in ("pca", read_config(run).get("vae", "pca"))


def make_vae(cfg: "Config", run: Path, ds: Dataset, init_meta: dict[str, Any] | None) -> AnyVAE:
    """The autoencoder of a run; the data of a cache must be its latents."""
    kept = run / "vae.safetensors"
    vae = choose(
        "" if kept.exists() and not vae_moved(cfg, run) else cfg.vae,
        kept=kept,
        meta=init_meta,
        network=f"--init {cfg.init}" if cfg.init else "the checkpoint to start from",
        cached=vae_path(cfg.data) if is_cache(cfg.data) else None,
        fit=lambda: fit_to(ds, cfg.resolution),
    )
    if is_cache(cfg.data):
        self_check(ds.source, vae)
    return vae


def fit_to(ds: Dataset, resolution: int) -> AnyVAE:
    """pca, fitted to a data set."""
    pixel(8).latent_shape(resolution)  # has the factor of pca: refused before any image is read
    images = to_float(ds.images(range(min(len(ds), pca_samples(resolution)))))
    vae = fit_pca(images)
    quality = psnr(vae.decode(vae.encode(images[:256])), images[:256])
    print(f"vae pca: fitted on {len(images):,} images, PSNR {quality:.2f} dB", flush=True)
    return vae
