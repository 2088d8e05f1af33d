"""What a run starts from: what is there of it, the network that fits its latents, and whether
weights fit its flags."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt.hub import ask
from data.cache import is_cache
from harness.cli import UserError
from harness.ranks import Ranks
from harness.run import FINAL, begun_with, check_config, images_seen, print_end
from model import PRESETS
from objectives import Objective
from vae import AnyVAE, choose, read_name


def vae_name(cfg: Any, run: Path) -> str:
    """--vae, or "" if the run was begun with the same: what it kept is not looked for again.

    Every rank calls: what is named here may then be fetched, also where a file names it.
    """
    ask(read_name(cfg.vae, None, None)[0])
    kept = (run / "vae.safetensors").exists()
    return "" if kept and cfg.vae == begun_with(run, "vae", "pca") else cfg.vae


def is_finished(cfg: Any, ranks: Ranks, free: set[str]) -> bool:
    """Check an existing run against the flags; say so if there is nothing left to do."""
    run = Path(cfg.out) / cfg.name
    kept = run / "vae.safetensors"
    name = vae_name(cfg, run)
    if name not in ("", "pca") and kept.exists():
        # The file may have moved: its contents are compared, not its name.
        choose(name, kept=kept)
        free = free | {"vae"}
    check_config(cfg, run, free, cfg.resume)
    if not (run / FINAL).exists() or images_seen(run) < cfg.images:
        return False
    if ranks.rank == 0:
        print_end(run, cfg.images)
    return True


def network_config(
    model: str, vae: AnyVAE, objective: Objective, resolution: int, classes: int
) -> Any:
    """The config of --model, with the channels and classes that it meets here."""
    enlarges = objective.coupling == "lowres"
    cfg = replace(
        PRESETS[model],
        in_channels=vae.channels * (2 if enlarges else 1),
        out_channels=vae.channels * (2 if objective.learn_sigma else 1),
        num_classes=classes,
    )
    side, multiple = vae.latent_shape(resolution)[1], cfg.multiple
    if side % multiple:
        raise UserError(
            f"--resolution {resolution} gives {side}×{side} latents, and {model} needs a side that "
            f"is divisible by {multiple}",
            do=f"Use a multiple of {vae.factor * multiple}.",
        )
    if enlarges and objective.upsample != "psu" and side % objective.lowres:
        raise UserError(
            f"--lowres {objective.lowres} does not divide the {side}×{side} latents of this "
            "--resolution",
            do="Choose another, or --upsample psu.",
        )
    return cfg


def check_table(cfg: Any) -> None:
    """Only eps, v and x0 have a noise schedule."""
    linear = cfg.objective in ("fm", "cfm") and cfg.target in ("", "u")
    if not linear or cfg.table in ("", "gvp"):
        return
    raise UserError(
        f"--table {cfg.table} is a noise schedule of ddpm, v and x0; {cfg.objective} has none",
        do="Leave it out, or choose --table gvp." if cfg.objective == "fm" else "Leave it out.",
    )


def check_enlarging(cfg: Any) -> None:
    """What only --objective cfm, from low resolution to high, cannot do."""
    if cfg.resolution % cfg.lowres:
        size = f"{cfg.resolution}×{cfg.resolution}"
        raise UserError(
            f"--lowres {cfg.lowres} does not divide the {size} pixels of this --resolution",
            do=f"Use a --resolution that is a multiple of {cfg.lowres}, or another --lowres.",
        )
    if cfg.fid_every:
        raise UserError(
            "--fid-every: a cfm network enlarges pictures, so its FID would be that of a few "
            "held-out images, over and over",
            do="Leave it out; enlarge pictures with samplers.py, and give the folder to "
            "eval_fid.py as --fake.",
        )
    if cfg.upsample == "psu" and is_cache(cfg.data):
        raise UserError(
            f"--upsample psu enlarges pixels, and {cfg.data} keeps latents only",
            do="Use --upsample bilinear or nearest, or the images themselves.",
        )


def check_aligned(objective: Objective, meta: dict[str, Any], name: str) -> None:
    """--aligned reads the network as it was trained; `meta` holds what its file says of that."""
    known = meta.get("objective") or {}
    if isinstance(known, str):
        target = {"fm": "u", "ddpm": "eps"}.get(known, known)
        known = {"target": target, **meta.get("schedule", {})}
    else:
        known = {**meta.get("schedule", {}), **known}
    flags = {key: getattr(objective, key) for key in ("target", "table", "zero_snr")}
    own = {key: known.get(key, value) for key, value in flags.items()}
    if own != flags:
        raise UserError(
            f"--aligned reads the network as it was trained, and {name} has {own}; the flags say "
            f"{flags}",
            do="Give the flags that it was trained with.",
        )
