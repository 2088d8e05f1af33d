"""A run's checkpoints: writing one, and going on from one exactly where it was written."""

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ckpt import open_checked, open_unet, save_checkpoint, save_unet
from ckpt.native import begin_checkpoint, end_checkpoint
from data.watch import wait
from harness.cli import UserError
from harness.files import atomic, read_digests, write_tensors
from harness.run import check_same, checkpoints, recorded_config, versions
from harness.typed import Open, check
from harness.whole import LISTED, check_checkpoint, state_name
from kernels import proof
from kernels.adamw8bit import local
from training.sharding import fill, gathered, is_sharded, place_of, put, writes
from training.states import check_moments, check_weights_of, load_optimizer, optimizer_state
from training.states import read_state
from training.trainer import Trainer

# Flags that say where something lies whose contents are compared (check_state, check_vae).
PLACES = {"name", "data", "vae"}
# Of an autoencoder's metadata: where it lies, and what it is called.
WHERE = {"source", "sha256", "name", "commit"}


@dataclass
class Init(Open):
    path: str | None
    fingerprint: str | None


@dataclass
class Begun(Open):
    """What the metadata of a run's network says of its beginning."""

    init: Init
    data_hash: str | None = None


def beginning(run: Path) -> dict[str, Any]:
    """What the metadata of a run's newest network says of its beginning (Begun)."""
    file = checkpoints(run)[-1] / "model.safetensors"
    return check(open_unet(file).meta, Begun, file)


def load_weights(
    folder: Path, net: nn.Module, emas: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Any]:
    """Put a checkpoint's weights into a network, and its averages where they belong, tensor by
    tensor; returns the network's metadata."""
    saved = open_checked(folder / "model.safetensors")
    fill(net, saved.weights, str(folder))
    for width, weights in emas.items():
        average = open_checked(folder / f"ema-{width}.safetensors").weights
        for name, weight in weights.items():
            put(weight, average[name])
    return saved.meta


def save(tr: Trainer) -> None:
    """Write a checkpoint. Rank 0 writes; every rank calls."""
    if tr.taken is not None:
        raise RuntimeError("a step is open: conclude() of training/nonfinite.py comes first.")
    wait(tr.ds.source, tr.ranks)  # each rank its share
    more = {"meter": tr.meter.state()}
    more |= {f"own/{key}": value for key, value in tr.loss.state_dict().items()}
    state, parts = optimizer_state(tr.net, tr.optimizer) | more, tr.ranks.world * tr.cfg.accum
    counts = {"skipped": tr.skipped, "data_hash": tr.data_hash, "parts": parts}
    counts["kernels"] = dict(proof.choices)
    if is_sharded(tr.net):
        save_shards(tr, state, counts)
    elif tr.ranks.rank == 0:
        save_checkpoint(
            tr.run,
            tr.seen,
            tr.net,
            description(tr),
            emas=tr.ema.weights,
            state=state,
            state_meta=counts,
            keep=tr.cfg.keep,
            keep_every=tr.cfg.keep_every,
        )
    tr.ranks.barrier()


def description(tr: Trainer) -> dict[str, Any]:
    """What the files of a run's networks say of it."""
    # No step taken, nothing to have changed: then the weights are those it started from.
    begun = tr.init.get("rounded", tr.init["fingerprint"])
    base = begun if tr.skipped * tr.cfg.batch < tr.seen else None
    return {
        "run": tr.cfg.name,
        "base_fingerprint": base,
        "config": asdict(tr.cfg),
        "objective": asdict(tr.objective),
        "vae": tr.vae.meta(),
        "classes": tr.classes,
        "latent_shape": tr.latent_shape,
        "resolution": tr.cfg.resolution,
        "init": tr.init,
        "data_hash": tr.data_hash,
        **versions(),
    }


def save_shards(tr: Trainer, state: dict[str, Tensor], counts: dict[str, Any]) -> None:
    """Write a checkpoint of a sharded run; every rank calls.

    Networks are written whole, one after the other, by rank 0, which holds no more than one of
    them; the state by every rank that holds a shard of it.
    """
    folder = Path(tr.ranks.broadcast(lambda: str(begin_checkpoint(tr.run, tr.seen))))
    meta, digests = description(tr) | {"images": tr.seen}, []
    nets = {"model": (None, dict(tr.net.named_parameters()))}
    for width, weights in tr.ema.weights.items():
        nets[f"ema-{width}"] = float(width), weights
    for name, (ema, weights) in nets.items():
        whole, path = gathered(weights, tr.ranks), folder / f"{name}.safetensors"
        write = partial(save_unet, path, tr.net, {**meta, "ema": ema}, whole)
        digests.append(tr.ranks.broadcast(write))
        # Before the next one is in memory.
        del whole, write
    if writes(tr.net, tr.ranks):
        write_shard(folder, tr, state, {**counts, "weights": digests[0]})
    tr.ranks.barrier()
    if tr.ranks.rank == 0:
        end_checkpoint(folder, tr.cfg.name, tr.cfg.keep, tr.cfg.keep_every)


def write_shard(
    folder: Path, tr: Trainer, state: dict[str, Tensor], counts: dict[str, Any]
) -> None:
    """Write this rank's part of the state."""
    index, shards = place_of(next(tr.net.parameters()))
    cut = {key.partition("/")[0] for key, x in state.items() if hasattr(x, "to_local")}
    counts |= {"kind": "training state", "images": tr.seen, LISTED: True}
    counts |= {"shard": index, "shards": shards, "cut": sorted(cut)}
    own = {key: local(x) for key, x in state.items()}
    write_tensors(folder / state_name(index, shards), own, counts)


def keep_batches(tr: Trainer, batches: list[dict[str, Tensor]]) -> Path:
    """Write this rank's batches of a step that was not finite, to be looked at with torch.load."""
    path = tr.run / f"bad-batch-{tr.seen:012d}-rank{tr.ranks.rank}.pt"
    data = io.BytesIO()  # of a full disk torch.save says nothing that a user can read
    torch.save(batches, data)
    with atomic(path) as temporary:
        temporary.write_bytes(data.getbuffer())
    return path


def load_state(tr: Trainer) -> None:
    """Continue exactly: weights, EMAs, optimizer, counters, the half-filled loss meter.

    Every rank reads for itself.
    """
    folder = checkpoints(tr.run)[-1]
    state, meta = read_state(folder, place_of(next(tr.net.parameters())))
    check_state(tr, meta)
    if tr.ranks.rank == 0 and meta.get("shards", 1) > 1:
        print(f"{folder}: the state is in {meta['shards']} shards", flush=True)
    network = load_weights(folder, tr.net, tr.ema.weights)
    check_weights_of(folder, meta, network["fingerprint"])
    tr.init = check(network, Begun, folder / "model.safetensors")["init"]
    check_vae(tr, network.get("vae", {}))
    tr.seen, tr.skipped = meta["images"], meta["skipped"]
    proof.pin(meta.get("kernels", {}))
    tr.meter.load_state(state["meter"])
    own = [key for key in state if key.startswith("own/")]
    tr.loss.load_state_dict({key.removeprefix("own/"): state[key] for key in own})
    kept = {key: entry for key, entry in state.table.items() if key not in ("meter", *own)}
    moments = state.over(kept)
    if not read_digests(folder).files:
        check_moments(tr.net, moments, folder)
    load_optimizer(tr.net, tr.optimizer, moments, tr.ranks.device, meta.get("cut", []))


def check_resume(cfg: Any, run: Path, free: set[str], goes_on: bool = True) -> None:
    """Before anything is written: a run's newest checkpoint, if it has one, has to be of this
    config up to `free` fields, and as it was written, if the run goes on from it."""
    if found := checkpoints(run):
        if goes_on:
            check_checkpoint(found[-1])
        check_same(cfg, recorded_config(found[-1]), found[-1], free | PLACES)


def check_vae(tr: Trainer, before: dict[str, Any]) -> None:
    """Refuse another autoencoder than that of the checkpoint, whose metadata is `before`."""
    now = tr.vae.meta()
    differs = [key for key in now.keys() & before.keys() if now[key] != before[key]]
    if set(differs) <= WHERE:
        return
    raise UserError(
        f"{tr.run / 'vae.safetensors'} is not the autoencoder that {tr.run} was trained with",
        do="Put it back, or remove it: it is then made as at first, and compared.",
    )


def check_state(tr: Trainer, meta: dict[str, Any]) -> None:
    """Refuse to go on where the rest of the run would be another one."""
    if meta["data_hash"] != tr.data_hash:
        raise UserError(
            f"the images or tags of {tr.cfg.data} changed since {tr.run} began; "
            "its order of samples is gone",
            do=f"Restore them, or start again with --init {tr.run} --name NEW.",
        )
    parts, before = tr.ranks.world * tr.cfg.accum, meta.get("parts")
    if tr.loss.per_part and before not in (None, parts):
        raise UserError(
            f"{tr.run} was trained with ranks × --accum = {before}, now {parts}, and "
            f"{tr.loss.per_part} compares the images within such a part of a batch",
            do=f"Resume with {before}.",
        )
