"""What a run starts from: what is there of it, the network that fits its latents, whether weights
fit its flags, and which row of a class embedding is whose."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from ckpt import fingerprint, open_checked, open_like
from ckpt.hub import ask
from ckpt.meaning import same_table
from ckpt.native import Source
from data.buckets import Buckets
from data.cache import is_cache
from data.dataset import first_of
from data.tags import one_form
from diffusion.schedules import shorter
from harness.cli import UserError
from harness.files import Entry
from harness.memory import check_batch_memory
from harness.ranks import Ranks
from harness.run import FINAL, begun_with, check_config, check_disk, checkpoints, images_seen
from harness.run import find_fine, print_end, read_config
from model import PRESETS, network_name
from objectives import Objective
from training.checkpoints import beginning, check_resume
from training.optimizer import state_bytes
from training.sharding import check_sharding, fill
from training.texts import data_hash, preset_of
from vae import AnyVAE, choose, read_name


def fine_run(cfg: Any) -> Path:
    """The run that stage2 starts from: a fine one that is like this one."""
    same = ["data", "objective", "model", "resolution"] + ["text"] * bool(cfg.text)
    alike = {key: getattr(cfg, key) for key in same}
    return find_fine(cfg.out, cfg.exclude_tags, alike)


def vae_name(cfg: Any, run: Path) -> str:
    """--vae, or "" if the run was begun with the same: what it kept is not looked for again.

    Every rank calls: what is named here may then be fetched, also where a file names it.
    """
    ask(read_name(cfg.vae, None, None)[0])
    kept = (run / "vae.safetensors").exists() and checkpoints(run)
    return "" if kept and cfg.vae == begun_with(run, "vae", "pca") else cfg.vae


def is_finished(cfg: Any, ranks: Ranks, free: set[str]) -> bool:
    """Check an existing run against the flags; say so if there is nothing left to do."""
    run = Path(cfg.out) / cfg.name
    free = free | moved(cfg, run)
    check_config(cfg, run, free, cfg.resume)
    goes_on = not (run / FINAL).exists() or images_seen(run) < cfg.images
    ranks.broadcast(partial(check_resume, cfg, run, free, goes_on))
    if goes_on:
        return False
    if ranks.rank == 0:
        print_end(run, cfg.images)
    return True


def moved(cfg: Any, run: Path) -> set[str]:
    """Flags that name another place than a run was begun with, where the same lies: the contents
    are compared."""
    found, kept = set(), run / "vae.safetensors"
    name = vae_name(cfg, run)
    if name not in ("", "pca") and kept.exists():
        choose(name, kept=kept)
        found.add("vae")
    if not checkpoints(run) or not (run / "config.json").exists():
        return found
    config = read_config(run)
    if cfg.data != config.get("data") and Path(cfg.data).exists() and same_data(cfg, run):
        found.add("data")
    # The newest checkpoint may have been put there from another run.
    inits = {config.get("init"), begun_with(run, "init", "")}
    if cfg.init not in ("", "scratch") and inits != {cfg.init} and same_init(cfg, run):
        found.add("init")
    return found


def same_data(cfg: Any, run: Path) -> bool:
    """Is --data what the checkpoint was trained on? If the run goes on, it is compared when it is
    resumed, and not opened twice."""
    if images_seen(run) < cfg.images:
        return True
    return data_hash(cfg, cfg.open_data().source) == beginning(run).get("data_hash")


def same_init(cfg: Any, run: Path) -> bool:
    """Does --init hold the weights that the run began with?"""
    before = beginning(run)["init"]
    if cfg.model in PRESETS:
        other = open_like(cfg.init, preset_of(cfg), cfg.model)
    else:
        other = open_checked(cfg.init, "fp32")
    return fingerprint(other.weights) == before["fingerprint"]


def network_config(
    like: Any,
    model: str,
    vae: AnyVAE,
    objective: Objective,
    resolution: int,
    classes: int,
    buckets: Buckets | None = None,
) -> Any:
    """The config of --model, `like`, with the channels, classes and sizes that it meets here."""
    enlarges = objective.coupling == "lowres"
    cfg = replace(
        like,
        in_channels=vae.channels * (2 if enlarges else 1),
        out_channels=vae.channels * (2 if objective.learn_sigma else 1),
        num_classes=classes,
    )
    side, multiple = vae.latent_shape(resolution)[1], cfg.multiple
    if buckets:
        buckets.check_step(vae.factor * multiple, f"--model {model} on {vae.name}")
        side = max(map(max, buckets.sizes)) // vae.factor
    if side % multiple:
        raise UserError(
            f"--resolution {resolution} gives {side}×{side} latents; {model} needs a side that "
            f"is divisible by {multiple}",
            do=f"Use a multiple of {vae.factor * multiple}.",
        )
    if getattr(cfg, "pos_max", 0):
        cfg = replace(cfg, pos_max=side // multiple)  # a place for every token
    if enlarges and objective.upsample != "psu" and side % objective.lowres:
        raise UserError(
            f"--lowres {objective.lowres} does not divide the {side}×{side} latents of this "
            "--resolution",
            do="Choose another, or --upsample psu.",
        )
    return cfg


def largest_shape(cfg: Any, vae: AnyVAE) -> tuple[int, int, int]:
    """(C, h, w) of the largest latents of a run: those of --resolution, or of the bucket with the
    most pixels, which need not be the square one."""
    channels, *square = vae.latent_shape(cfg.resolution)
    buckets = cfg.bucket_sizes()
    if buckets:
        width, height = max(buckets.sizes, key=lambda size: size[0] * size[1])
        square = height // vae.factor, width // vae.factor
    return channels, *square


def check_room(run: Path, net: nn.Module, vae: AnyVAE, cfg: Any, ranks: Ranks) -> None:
    """Refuse a run whose checkpoints the disk, or whose micro-batches the memory cannot hold."""
    check_sharding(cfg, ranks)
    check_disk(run, sum(state_bytes(net, cfg)), cfg)
    micro, width = cfg.batch // (ranks.world * cfg.accum), getattr(net.cfg, "model_channels", 0)
    shape = largest_shape(cfg, vae)
    check_batch_memory("a micro-batch of", micro, cfg.resolution, shape, ranks.device, width)


def check_table(cfg: Any) -> None:
    """Only eps, v and x0 have a noise schedule."""
    linear = cfg.objective in ("fm", "cfm") and cfg.target in ("", "u")
    if not linear or cfg.table in ("", "gvp"):
        return
    table = shorter(cfg.table)
    raise UserError(
        f"--table {table} is a noise schedule of ddpm, v and x0; {cfg.objective} has none",
        do="Leave it out, or choose --table gvp." if cfg.objective == "fm" else "Leave it out.",
    )


def check_enlarging(cfg: Any) -> None:
    """What only --objective cfm, from low resolution to high, cannot do."""
    if getattr(cfg, "buckets", False):
        raise UserError(
            "--objective cfm enlarges square pictures, not --buckets", do="Leave one of them out."
        )
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
    if same_table(own["table"], objective.table):
        own["table"] = objective.table
    if own != flags:
        for words in (own, flags):
            words["table"] = shorter(words["table"])
        raise UserError(
            f"--aligned reads the network as it was trained, and {name} has {own}; the flags say "
            f"{flags}",
            do="Give the flags that it was trained with.",
        )


# ---- weights ------------------------------------------------------------------------------------

# The embedding of classes of each network, and how many rows it has beside theirs: a U-Net adds
# nothing for "no class", for which a transformer has a last row.
ROWS = {
    "UNet": ("label_emb.weight", 0),
    "ByteUNet": ("label_emb.weight", 0),
    "MMDiT": ("y_embedder.embedding_table.weight", 1),
}
BIAS = "t_embedder.mlp.2.bias"  # of a transformer: added to whatever it is told
SHOWN = 20  # classes of a line


def take_weights(net: nn.Module, other: Source, classes: list[str], what: str) -> str:
    """Load another network's weights, each class's row of the embedding by the class's name.

    other: its file, which names its classes, and is read tensor by tensor. A class that it has not
    keeps the row of the network as it was begun. Returns a line that says which were taken, new,
    dropped; "" if neither knows classes.
    """
    check_places(net, other, what)
    key, none = ROWS.get(network_name(net.cfg), ("", 0))
    meta, table, own = other.meta, dict(other.weights.table), net.state_dict().get(key)
    theirs = table.pop(key).read() if key in table else None
    if own is None and theirs is None:
        fill(net, other.weights, what)
        return ""
    names = names_of(meta, 0 if theirs is None else len(theirs) - none, classes, what)
    place = {one_form(name): row for row, name in enumerate(names)}
    taken = [name for name in classes if one_form(name) in place]
    new = [name for name in classes if one_form(name) not in place]
    kept = {one_form(name) for name in taken}
    dropped = [name for name in names if one_form(name) not in kept]
    changed = {} if own is None else {key: own.clone()}
    for row, name in enumerate(classes):
        if name in taken:
            changed[key][row] = theirs[place[one_form(name)]]
    if none:
        # Of "no class" it says the same as before.
        bias = table[BIAS].read()
        silence = torch.zeros_like(bias) if theirs is None else theirs[-1]
        if own is None:
            changed[BIAS] = bias + silence
        else:
            changed[key][-1] = silence
    for name, x in changed.items():
        table[name] = Entry(x.dtype, tuple(x.shape), partial(changed.get, name))
    fill(net, other.weights.over(table), what)
    words = {"taken": taken, "new": new, "dropped": dropped}
    told = [f"{word} {first_of(found, SHOWN) or 'none'}" for word, found in words.items()]
    unnamed = "" if "classes" in meta or theirs is None else " (by number: it names none)"
    return f"classes of {what}{unnamed}: {'; '.join(told)}"


def check_places(net: nn.Module, other: Source, what: str) -> None:
    """Refuse a transformer that has learnt its places by another table."""
    ours, theirs = (getattr(each.cfg, "pos_max", 0) for each in (net, other))
    if ours != theirs:
        raise UserError(
            f"{what} has places for {theirs}×{theirs} tokens, and this --resolution makes "
            f"{ours}×{ours}",
            do="Use the --resolution that it was trained at.",
        )


def names_of(meta: dict[str, Any], rows: int, classes: list[str], what: str) -> list[str]:
    """The names of a file's classes, one a row of its embedding. Where it names none, they are
    the run's own, in their order, if there are as many."""
    names = meta.get("classes", [])
    if rows and not names:
        if len(classes) not in (0, rows):
            raise UserError(
                f"{what} has {rows} classes without names, and --classes has {len(classes)}",
                do=f"Give {rows} --classes in its order, or start from a file that names its "
                "classes.",
            )
        return classes or [f"number {row}" for row in range(rows)]
    texts = [one_form(name) for name in names if isinstance(name, str)]
    if len(texts) != rows or len(names) != rows or len(set(texts)) != rows:
        raise UserError(
            f"{what} has {rows} rows for classes and names {len(names)}, of which "
            f"{len(set(texts))} are names of their own",
            do="Restore the file, or start from another.",
        )
    return names
