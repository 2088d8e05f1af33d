"""What an exact resume needs beside the weights: the optimizer's tensors, counters, the loss meter.

It is one file, state.safetensors, or of a sharded run (training/sharding.py) one for each shard,
state-rank0of4.safetensors and so on, written by the rank that holds it. Keys are ENTRY/PARAMETER.
torch's AdamW goes on with any number of shards: rows are rows. The 8-bit moments, and those of
--optim adamw32bit, lie in pieces of a shard's own size, so their number has to stay.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ckpt.native import open_tensors
from harness.cli import UserError
from harness.files import Container, Entry, listed
from harness.typed import Count, Hash, Open, check
from harness.whole import state_files
from kernels.adamw8bit import AdamW8bit
from training.sharding import as_shard, part, place_of


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
    # Of a shard: which of how many, the entries of which it holds a part, and the fingerprint of
    # the weights that it belongs to.
    shard: Count = 0
    shards: Count = 1
    cut: list[str] = ()
    weights: Hash = ""


def read_state(folder: Path, own: tuple[int, int] = (0, 1)) -> tuple[Container, dict[str, Any]]:
    """(tensors, which are read on access; counters) of a checkpoint's state.

    own: (which shard, of how many) this rank has. Of a state in as many shards, the entries that
    the counters call "cut" are this rank's parts; else all are whole.
    """
    paths = state_files(folder)
    opened = [open_tensors(path) for path in paths]
    for i, (path, (_, meta)) in enumerate(zip(paths, opened)):
        check(meta, State, path)
        check_step(folder, path, meta)
        check_shard(path, meta, i, opened[0][1], len(paths))
    index, shards = own
    if len(paths) == shards:
        return opened[index]
    boxes, meta = [box for box, _ in opened], opened[0][1]
    check_joinable(folder, boxes[0], len(paths), shards)
    return joined(boxes, meta.get("cut", [])), {**meta, "cut": []}


def check_step(folder: Path, path: Path, meta: dict[str, Any]) -> None:
    """Refuse a state that is of another step than its folder says."""
    if meta["images"] != int(folder.name):
        raise UserError(
            f"{path} is of {meta['images']:,} images, and its folder of {int(folder.name):,}",
            do="Restore the folder as it was written.",
        )


def check_shard(path: Path, meta: dict[str, Any], i: int, first: dict[str, Any], n: int) -> None:
    """Refuse a file that is not shard i of the n of which `first` describes the first."""
    same = ("images", "skipped", "data_hash", "weights", "cut")
    alike = all(meta.get(key) == first.get(key) for key in same)
    if alike and (meta.get("shard", 0), meta.get("shards", 1)) == (i, n):
        return
    raise UserError(
        f"{path} is no shard of this checkpoint: it says it is number {meta.get('shard', 0)} of "
        f"{meta.get('shards', 1)}, of the weights {meta.get('weights', '')[:12]}",
        wanted=f"number {i} of {n}, of the weights {first.get('weights', '')[:12]}",
        do="Restore the folder as it was written.",
    )


def check_weights_of(folder: Path, state: dict[str, Any], fingerprint: str) -> None:
    """Refuse shards that belong to other weights than those beside them."""
    wanted = state.get("weights", "")
    if wanted and wanted != fingerprint:
        raise UserError(
            f"the shards in {folder} belong to other weights ({wanted[:12]}) than its "
            f"model.safetensors ({fingerprint[:12]})",
            do="Restore the folder as it was written.",
        )


def check_joinable(folder: Path, box: Container, before: int, now: int) -> None:
    """Refuse to go on with another number of shards where that is not exact."""
    if any(key.startswith("order/") for key in box):
        raise UserError(
            f"the optimizer's moments in {folder} are in {before} pieces, now there are {now}: "
            "adamw8bit and adamw32bit keep them in the blocks of each rank's shard",
            do=f"Resume with {before} shards, or start again with --init.",
        )


def joined(boxes: list[Container], cut: list[str]) -> Container:
    """Whole tensors from the parts in several files, joined as they are read."""
    table = {}
    for key, entry in boxes[0].table.items():
        table[key] = entry
        if key.partition("/")[0] in cut:
            rows = sum(box.shape(key)[0] for box in boxes)
            table[key] = Entry(entry.dtype, (rows, *entry.shape[1:]), partial(join, boxes, key))
    return boxes[0].over(table)


def join(boxes: list[Container], key: str) -> Tensor:
    return torch.cat([box[key] for box in boxes])


# ---- the optimizer ------------------------------------------------------------------------------


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
    cut: list[str] = (),
) -> None:
    """The inverse of optimizer_state(). cut: entries of which a sharded net's `state` holds this
    rank's parts; others are whole."""
    params = dict(net.named_parameters())
    for key in state:
        entry, _, name = key.partition("/")
        if name not in params:
            raise UserError(
                f"the state of the optimizer holds {key!r:.60}, which is none of the network's",
                do="Use an older checkpoint, or start again with --init.",
            )
        p, value = params[name], state[key]
        rows = value.shape == p.shape
        if rows and place_of(p)[1] == 1:
            # In the parameter's own order in memory (channels_last, for one): fused steps walk it.
            value = torch.empty_like(p, dtype=value.dtype, device="cpu").copy_(value)
        # AdamW8bit's "order" is about memory, and stays on the CPU.
        value = value if entry == "order" else value.to(device)
        if entry in cut:
            value = as_shard(value, p, flat=isinstance(optimizer, AdamW8bit))
        elif rows and value.ndim and place_of(p)[1] > 1:
            value = as_shard(part(value, p).clone(), p)
        optimizer.state[p][entry] = value


def check_moments(net: nn.Module, state: Mapping[str, Tensor], folder: Path) -> None:
    """Refuse a state that is not of all of a network's parameters. Where there is a list of digests
    this is known already."""
    own, found = dict(net.named_parameters()).keys(), {key.partition("/")[2] for key in state}
    if found in (set(), own):  # none: no step was taken
        return
    raise UserError(
        f"{state_files(folder)[0]} is not the state of this network's optimizer: "
        f"{len(own - found)} of {len(own)} parameters are missing, {len(found - own)} are others: "
        f"{listed(sorted(own ^ found))}",
        do="Use an undamaged copy, or an older checkpoint.",
    )
