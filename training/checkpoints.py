"""A run's checkpoints: writing one, and going on from one exactly where it was written."""

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ckpt import load_strict, load_unet, open_unet, read_tensors, save_checkpoint
from data.watch import wait
from harness.cli import UserError
from harness.files import atomic, listed, read_digests
from harness.run import check_same, checkpoints, recorded_config, versions
from harness.typed import Count, Open, check
from harness.whole import check_checkpoint
from kernels import proof
from training.trainer import Trainer

# Flags that say where something lies whose contents are compared (check_state, check_vae).
PLACES = {"name", "data", "vae"}
# Of an autoencoder's metadata: where it lies, and what it is called.
WHERE = {"source", "sha256", "name", "commit"}


@dataclass
class State(Open):
    """The counters of a run, in the metadata of its state."""

    kind: Literal["training state"]
    images: Count
    skipped: Count
    data_hash: str
    parts: Count | None = None
    # Which calls ran on kernels: kernels/proof.py.
    kernels: dict[str, Literal["triton", "torch"]] = ()


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
    """Put a checkpoint's weights into a network, and its averages where they belong; returns the
    network's metadata."""
    saved, meta = load_unet(folder / "model.safetensors")
    load_strict(net, saved.state_dict(), str(folder))
    for width, weights in emas.items():
        average, _ = load_unet(folder / f"ema-{width}.safetensors")
        found = average.state_dict()
        for name, weight in weights.items():
            weight.copy_(found[name])
    return meta


def optimizer_state(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's tensors, as ENTRY/PARAMETER."""
    names = {id(p): name for name, p in net.named_parameters()}
    return {
        f"{key}/{names[id(p)]}": value
        for p, entry in optimizer.state.items()
        for key, value in entry.items()
    }


def load_optimizer(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    """The inverse of optimizer_state()."""
    params = dict(net.named_parameters())
    for key, value in state.items():
        entry, _, name = key.partition("/")
        if name not in params:
            raise UserError(
                f"the state of the optimizer holds {key!r:.60}, which is none of the network's",
                do="Use an older checkpoint, or start again with --init.",
            )
        p = params[name]
        if value.shape == p.shape:
            # In the parameter's own order in memory (channels_last, for one): fused steps walk it.
            value = torch.empty_like(p, dtype=value.dtype, device="cpu").copy_(value)
        # AdamW8bit's "order" is about memory, and stays on the CPU.
        value = value if entry == "order" else value.to(device)
        optimizer.state[p][entry] = value


def save(tr: Trainer) -> None:
    """Write a checkpoint. Rank 0 writes; every rank calls."""
    if tr.taken is not None:
        raise RuntimeError("a step is open: conclude() of training/nonfinite.py comes first.")
    wait(tr.ds.source, tr.ranks)  # each rank its share
    more = {"meter": tr.meter.state()}
    more |= {f"own/{key}": value for key, value in tr.loss.state_dict().items()}
    if tr.ranks.rank == 0:
        # No step taken, nothing to have changed: then the weights are those it started from.
        begun = tr.init.get("rounded", tr.init["fingerprint"])
        base = begun if tr.skipped * tr.cfg.batch < tr.seen else None
        meta = {
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
        parts = tr.ranks.world * tr.cfg.accum
        counts = {"skipped": tr.skipped, "data_hash": tr.data_hash, "parts": parts}
        counts["kernels"] = dict(proof.choices)
        save_checkpoint(
            tr.run,
            tr.seen,
            tr.net,
            meta,
            emas=tr.ema.weights,
            state=optimizer_state(tr.net, tr.optimizer) | more,
            state_meta=counts,
            keep=tr.cfg.keep,
            keep_every=tr.cfg.keep_every,
        )
    tr.ranks.barrier()


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
    state, meta = read_state(folder)
    check_state(tr, meta)
    network = load_weights(folder, tr.net, tr.ema.weights)
    tr.init = check(network, Begun, folder / "model.safetensors")["init"]
    check_vae(tr, network.get("vae", {}))
    tr.seen, tr.skipped = meta["images"], meta["skipped"]
    proof.pin(meta.get("kernels", {}))
    tr.meter.load_state(state.pop("meter"))
    own = [key for key in state if key.startswith("own/")]
    tr.loss.load_state_dict({key.removeprefix("own/"): state.pop(key) for key in own})
    if not read_digests(folder).files:
        check_moments(tr.net, state, folder)
    load_optimizer(tr.net, tr.optimizer, state, tr.ranks.device)


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, counters) of a checkpoint, beside its weights."""
    path = folder / "state.safetensors"
    state, meta = read_tensors(path)
    check(meta, State, path)
    if meta["images"] != int(folder.name):
        raise UserError(
            f"{path} is of {meta['images']:,} images, and its folder of {int(folder.name):,}",
            do="Restore the folder as it was written.",
        )
    return state, meta


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


def check_moments(net: nn.Module, state: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse a state that is not of all of a network's parameters. Where there is a list of digests
    this is known already."""
    own, found = dict(net.named_parameters()).keys(), {key.partition("/")[2] for key in state}
    if found in (set(), own):  # none: no step was taken
        return
    raise UserError(
        f"{folder / 'state.safetensors'} is not the state of this network's optimizer: "
        f"{len(own - found)} of {len(own)} parameters are missing, {len(found - own)} are others: "
        f"{listed(sorted(own ^ found))}",
        do="Use an undamaged copy, or an older checkpoint.",
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
