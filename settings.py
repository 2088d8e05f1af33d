"""train.py's flags, before anything is read or written: what depends on others is filled in, what cannot run is refused."""

import importlib.util
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cli import UserError, closest
from kernels import dispatch
from data.cache import is_cache
from data.sources import embedded_tags
from model import PRESETS
from objectives import Objective, make_objective
from harness.run import checkpoints, read_config
from diffusion.schedules import resolution_shift

if TYPE_CHECKING:
    from train import Config

BOUNDS = {"images": (1, 1e12), "batch": (1, 1e6), "accum": (1, 1e6), "lr": (0, 1e3), "warmup": (0, 1), "weight_decay": (0, 1e3),
          "clip": (0, 1e9), "shift": (1e-3, 1e3), "t_loc": (-10, 10), "t_scale": (-1, 10), "gamma": (1e-3, 1e6), "lowres": (2, 64),
          "label_drop": (0, 1), "holdout": (0, 0.9), "resolution": (1, 8192), "seed": (0, 2 ** 63 - 1),
          "keep": (1, 1e6), "keep_every": (0, 1e12), "log_every": (0, 1e12), "eval_every": (0, 1e12), "preview_every": (0, 1e12),
          "save_every": (0, 1e12), "fid_every": (0, 1e12), "workers": (-1, 128)}


def resolve(cfg: "Config") -> "Config":
    """Fill in what depends on other fields, and refuse what cannot run, before anything is read or written."""
    dispatch.chosen()
    if cfg.model not in PRESETS:
        raise UserError(f"--model {cfg.model!r} is not a preset.{closest(cfg.model, PRESETS)}  Known: {', '.join(PRESETS)}.")
    if PRESETS[cfg.model].context_dim:
        raise UserError(f"--model {cfg.model} is told what to draw by text, and data sets here have none yet.  Choose another.")
    world = int(os.environ.get("WORLD_SIZE", 1))
    for name, (low, high) in BOUNDS.items():
        value = getattr(cfg, name)
        if value not in (None, "auto") and not low <= value <= high:            # NaN fails too
            raise UserError(f"--{name.replace('_', '-')} {value}: wanted {low:g} to {high:g}.")
    if cfg.batch % (world * cfg.accum):
        unit = world * cfg.accum
        raise UserError(f"--batch {cfg.batch} is not divisible by {world} ranks × {cfg.accum} accumulation (= {unit}).  "
                        f"Try --batch {max(cfg.batch // unit, 1) * unit}.")
    if any(not 0.01 <= width <= 0.25 for width in cfg.ema) or len({f"{w:.3f}" for w in cfg.ema}) < len(cfg.ema):
        raise UserError(f"--ema {','.join(map(str, cfg.ema))}: wanted different widths from 0.01 to 0.25, shares of the run.")
    check_objective(cfg)
    if cfg.name and (Path(cfg.name).name != cfg.name or cfg.name.startswith(".")):
        raise UserError(f"--name {cfg.name!r}: wanted the name of a folder under --out, without slashes.")
    unknown = set(cfg.log) - {"tensorboard", "wandb"}
    if unknown:
        raise UserError(f"--log {', '.join(sorted(unknown))} is not one of tensorboard, wandb.")
    absent = [name for name in cfg.log if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(f"--log {absent[0]} needs a package that is not installed.  pip install {absent[0]}")
    stem = "".join(c if c.isalnum() or c in "._-" else "-" for c in Path(cfg.data).name)
    name, tags = cfg.name or f"{stem}-{cfg.objective}-{cfg.stage}", cfg.exclude_tags
    if not tags and cfg.stage == "stage2" and not cfg.init:
        own = Path(cfg.out) / name                                              # once begun, the fine run is no longer needed
        tags = tuple(read_config(own if (own / "config.json").exists() else fine_run(cfg))["exclude_tags"])
    tags = tags or embedded_tags(cfg.data, cfg.stage)
    place = str(Path(cfg.data)) if Path(cfg.data).exists() else cfg.data          # im/ and im are one
    return replace(cfg, data=place, name=name, exclude_tags=tags)


def fine_run(cfg: Any) -> Path:
    """The run that stage2 starts from: under --out, stage=fine, same data, objective, model and (if given) tags."""
    found = []
    for run in sorted(p.parent for p in Path(cfg.out).glob("*/config.json")):
        other = read_config(run)
        same = all(other.get(k) == getattr(cfg, k) for k in ("data", "objective", "model", "resolution"))
        tags = not cfg.exclude_tags or sorted(other.get("exclude_tags", ())) == sorted(cfg.exclude_tags)
        if same and tags and other.get("stage") == "fine" and checkpoints(run):
            found.append(run)
    if not found:
        tags = f" --exclude-tags {','.join(cfg.exclude_tags)!r}" if cfg.exclude_tags else ""
        raise UserError(f"--stage stage2 starts from a fine run of the same data, objective and model, and {cfg.out}/ has none.  Make it "
                        f"with: python train.py --data {cfg.data} --objective {cfg.objective} --model {cfg.model} --stage fine{tags}")
    if len(found) > 1:
        raise UserError(f"--stage stage2 could start from any of {', '.join(map(str, found))}.  Choose with --init, and give --exclude-tags.")
    return found[0]


def check_objective(cfg: "Config") -> None:
    """Refuse what contradicts itself, and flags that would change nothing."""
    idle = {} if cfg.objective == "cfm" else dict.fromkeys(("lowres", "upsample", "noise_aug"), "--objective cfm")
    idle |= {} if "min_snr" in cfg.weight else {"gamma": "--weight min_snr and soft_min_snr"}
    for name, owner in idle.items():
        if getattr(cfg, name) != getattr(type(cfg), name):
            raise UserError(f"--{name.replace('_', '-')} changes nothing here: it is of {owner}.  Leave it out.")
    if cfg.table not in ("", "gvp") and cfg.objective in ("fm", "cfm") and cfg.target in ("", "u"):
        raise UserError(f"--table {cfg.table} is a noise schedule of ddpm, v and x0; {cfg.objective} has none{' but gvp' * (cfg.objective == 'fm')}.")
    try:
        objective = objective_of(cfg)
    except ValueError as error:
        raise UserError(f"--objective {cfg.objective}: {error}") from None
    for name, given in (("t-loc", cfg.t_loc), ("t-scale", cfg.t_scale)):
        if given is not None and (objective.density == "uniform" or (objective.density, name) == ("mode", "t-loc")):
            raise UserError(f"--{name} changes nothing here: density {objective.density} has none.  Choose another --density, or leave it out.")
    if cfg.objective == "cfm" and cfg.coupling != "none":
        raise UserError(f"--coupling {cfg.coupling}: cfm has its own, from each image's low resolution.  Leave it out.")
    if cfg.objective == "cfm" and cfg.fid_every:
        raise UserError("--fid-every: a cfm network enlarges pictures, so its FID would be that of a few held-out images, over and over.  Leave it out; "
                        "enlarge pictures with samplers.py, and give the folder to eval_fid.py as --fake.")
    if cfg.objective == "cfm" and cfg.resolution % cfg.lowres:
        raise UserError(f"--resolution {cfg.resolution} is not divisible by --lowres {cfg.lowres}.")
    if cfg.objective == "cfm" and cfg.upsample == "psu" and is_cache(cfg.data):
        raise UserError(f"--upsample psu enlarges pixels, and {cfg.data} keeps latents only.  Use --upsample bilinear or nearest, or "
                        "the images themselves.")


def objective_of(cfg: "Config", latent_shape: tuple[int, int, int] = (0, 32, 32)) -> Objective:
    """The objective the flags describe, for latents of a shape (C, H, W), on which --shift auto depends."""
    shift = resolution_shift(*latent_shape[1:]) if cfg.shift == "auto" else cfg.shift
    coupling = "lowres" if cfg.objective == "cfm" else cfg.coupling
    overrides = {key: value for key in ("target", "table", "density") if (value := getattr(cfg, key))}
    return make_objective(cfg.objective, shift=shift, loss_type=cfg.loss, coupling=coupling, **overrides, **{key: getattr(cfg, key) for key in (
        "zero_snr", "t_loc", "t_scale", "stratified", "weight", "gamma", "learn_sigma", "aligned", "lowres", "upsample", "noise_aug")})
