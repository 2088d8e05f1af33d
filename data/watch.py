"""Every byte of a latent cache against its checksum, beside the training that reads it.

    start(source)     # a thread begins to read all shards; data.dataset.batches() does this
    look(source)      # refuses the cache if something was found, without waiting
    wait(source, ranks)   # the same of the whole cache: before weights are written that saw it

Shards are as large as a disk, so opening a cache does not read them. A flipped bit, or a shard of
another cache, still reaches no checkpoint. The processes of a machine share the work; each machine
reads what it sees, for it may have a copy of its own.
"""

import hashlib
import os
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from data.cache import LatentSource, encode_command, shard_path
from harness.cli import UserError
from harness.ranks import Ranks, variable
from harness.reading import open_file

PIECE = 1 << 20  # bytes read at once
QUIET = 5.0  # seconds that a run waits before it says for what
ONE = Ranks(0, 1, torch.device("cpu"))


class Watch(threading.Thread):
    """Compares shards with what the manifest says of them. It calls no code of torch, in which a
    thread cannot be left behind when the process ends."""

    def __init__(self, source: LatentSource, share: range):
        super().__init__(daemon=True)
        self.source, self.share = source, share
        self.done = 0  # shards
        self.damaged: int | None = None  # the first such shard

    def run(self) -> None:
        for k in self.share:
            if not is_whole(self.source, k):
                self.damaged = k
                return
            self.done += 1


def is_whole(source: LatentSource, k: int) -> bool:
    """Is shard k, its header too, what the manifest says?"""
    record, head_bytes = source.manifest["shards"][k], source.head_bytes(k)
    try:
        with open_file(shard_path(source.root, k)) as file:
            head = hashlib.sha256(file.read(head_bytes))
            rest, length = hashlib.sha256(), head_bytes
            while piece := file.read(PIECE):
                rest.update(piece)
                length += len(piece)
    except (OSError, UserError):  # gone, no file, or on a part of the disk that cannot be read
        return False
    found = (length, head.hexdigest(), rest.hexdigest())
    return found == (record["bytes"], record["head"], record["sha256"])


def start(source: Any) -> None:
    """Begin to check a cache, if `source` is one; once for each time that it is opened."""
    if not isinstance(source, LatentSource) or source.watch is not None:
        return
    source.watch = Watch(source, share_of(len(source.manifest["shards"])))
    source.watch.start()


def share_of(shards: int) -> range:
    """Those that this process reads: torchrun says how many share the machine, and without it each
    reads all."""
    if not dist.is_initialized():
        return range(shards)
    if "LOCAL_WORLD_SIZE" not in os.environ:
        return range(shards)
    world = variable("LOCAL_WORLD_SIZE", 1, 1_000_000)
    return range(variable("LOCAL_RANK", 0, world - 1), shards, world)


def look(source: Any) -> None:
    """Raise what start() has found so far."""
    watch = getattr(source, "watch", None)
    if watch is None or watch.damaged is None:
        return
    raise UserError(
        f"{shard_path(source.root, watch.damaged)} is damaged, or of another cache: it is not what "
        "the manifest says",
        do="Nothing that saw it was saved.  Encode it again, and nothing else: "
        f"{encode_command(source.root, source.manifest['plan'])}",
    )


def wait(source: Any, ranks: Ranks = ONE) -> None:
    """Wait until all that start() began is checked, on every rank, and raise what any rank found.

    Ranks ask each other every few seconds: minutes of silence are taken for death.
    """
    watch = getattr(source, "watch", None)
    if watch is None:  # no latent was read
        return
    begun = time.perf_counter()
    watch.join(QUIET)
    told = False
    while any_of(ranks, watch.is_alive()):
        if watch.is_alive() and not told:
            told = True
            print(
                f"before weights are saved, the shards of {source.root} are compared with their "
                f"checksums: {watch.done:,} of {len(watch.share):,} so far",
                flush=True,
            )
        watch.join(QUIET)
    if told:
        print(f"compared, after {time.perf_counter() - begun:.0f} s", flush=True)
    damaged = any_of(ranks, watch.damaged is not None)
    look(source)
    if damaged:
        raise UserError(f"another rank found damage in {source.root}", do="See what it says.")
    if watch.done < len(watch.share):  # the thread has printed why
        raise RuntimeError(f"the check of {source.root} ended early")


def any_of(ranks: Ranks, here: bool) -> bool:
    """Is it so on any rank? Every rank asks."""
    return bool(ranks.all_reduce(torch.tensor(int(here), device=ranks.device)))
