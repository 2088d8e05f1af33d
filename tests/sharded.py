"""Runs of a few ranks in processes that share one import of torch: for tests of --shard.

    ranks(2, losses, place, {"shard": "full"})    # what each rank returned, in order
"""

import hashlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import distill
import miniature  # noqa: F401  its network, which children know by name
import train
import training.checkpoints as checkpoints_py
from harness.cli import UserError
from harness.ranks import Ranks, join_ranks
from harness.run import checkpoints
from kernels.adamw8bit import local
from training.previews import held_out_loss
from training.sharding import gathered, is_sharded, showing
from training.states import optimizer_state

FULL = {"shard": "full"}

ONE = Ranks(0, 1, torch.device("cpu"))
FLAGS = {
    "model": "nano", "data": "toyfaces:24", "resolution": 32, "batch": 8, "images": 160,
    "lr": 2e-4, "name": "run", "device": "cpu", "workers": 0, "dtype": "fp32",
}  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["sharded"])


def ranks(world: int, function, *args, each: int = 0) -> list:
    """function(ranks, *args) on `world` ranks, `each` of them on a host; None of one that died."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    pipes = [CONTEXT.Pipe(False) for _ in range(world)]
    started = []
    for rank, (_, end) in enumerate(pipes):
        place = (rank, world, each or world, port)
        started.append(CONTEXT.Process(target=child, args=(place, end, function, args)))
        # The server that forks them imports what it should before it is told where from.
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
            started[-1].start()
        end.close()
    said = []
    for receive, _ in pipes:
        try:
            said.append(receive.recv() if receive.poll(300) else None)
        except EOFError:
            said.append(None)
    dead = None in said
    for process in started:
        if dead:  # the others wait for it
            process.kill()
        process.join()
    return said


def child(place: tuple[int, ...], end, function, args) -> None:
    rank, world, each, port = place
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    os.environ.update(zip(names, map(str, place)), MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    group = join_ranks("cpu")
    try:
        end.send(function(group, *args))
    except UserError as error:
        end.send(str(error))
    group.leave()


def script_of(flags: dict):
    """Whose flags they are."""
    return distill if "teacher" in flags else train


def config(place: Path, flags: dict) -> train.Config | distill.Config:
    script = script_of(flags)
    return script.resolve(script.Config(**{**FLAGS, "out": str(place), **flags}))


def trained(group: Ranks, place: Path, flags: dict) -> list[tuple[float, float]]:
    """(loss, norm of the gradient) of each step to the end of a run, which is saved at its half
    and its end; goes on where it was stopped."""
    tr, said = opened(group, place, flags), []
    loader = train.load(tr)
    while tr.seen < tr.cfg.images:
        norm = train.step(tr, loader)
        train.conclude(tr)
        said.append((tr.meter.read()["loss"], float(norm)))
        if tr.seen % (tr.cfg.images // 2) == 0:
            checkpoints_py.save(tr)
    return said


def newest(place: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint, {FILE:KEY: tensor}."""
    folder = checkpoints(place / "run")[-1]
    files = sorted(folder.glob("*.safetensors"))
    return {f"{path.name}:{key}": x for path in files for key, x in load_file(path).items()}


def check_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and len(a) > 300
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def check_losses(said: list, alone: list, norms: float = 1e-3) -> None:
    """What trained() returned, to 1e-5 in its losses; norms: how close those of gradients are."""
    assert len(said) == len(alone)
    for i, rel in enumerate((1e-5, norms)):
        assert [row[i] for row in said] == pytest.approx([row[i] for row in alone], rel=rel)


def digest(tensors: dict) -> dict[str, str]:
    """{name: sha256 of this rank's part}."""
    parts = {name: local(x.detach()).contiguous().cpu() for name, x in tensors.items()}
    return {
        name: hashlib.sha256(str((x.dtype, x.shape)).encode() + x.numpy().tobytes()).hexdigest()
        for name, x in parts.items()
    }


def opened(group: Ranks, place: Path, flags: dict) -> train.Trainer:
    tr = script_of(flags).setup(config(place, flags), group)
    if tr.held:
        tr.held.close()
    return tr


def stepped(group: Ranks, place: Path, flags: dict, steps: int) -> tuple[dict, dict]:
    """Digests of this rank's state after some steps, which are saved; and after loading that."""
    tr = opened(group, place, flags)
    loader = train.load(tr)
    for _ in range(steps):
        train.step(tr, loader)
    before = held(tr)
    checkpoints_py.save(tr)
    again = opened(group, place, flags)
    return before, held(again)


def held(tr: train.Trainer) -> dict[str, str]:
    """Digests of all that this rank holds of a run."""
    tensors = {f"net/{name}": p for name, p in tr.net.named_parameters()}
    for width, weights in tr.ema.weights.items():
        tensors |= {f"{width}/{name}": x for name, x in weights.items()}
    return digest(tensors | optimizer_state(tr.net, tr.optimizer))


def whole(group: Ranks, place: Path, flags: dict, save: bool = False) -> dict[str, str]:
    """Digests of a run's whole tensors, as it is loaded by these ranks; then perhaps saved anew."""
    tr = opened(group, place, flags)
    tensors = {f"net/{name}": p for name, p in tr.net.named_parameters()}
    for width, weights in tr.ema.weights.items():
        tensors |= {f"{width}/{name}": x for name, x in weights.items()}
    found = gathered(tensors | optimizer_state(tr.net, tr.optimizer), group)
    if save:
        if group.rank == 0:
            shutil.rmtree(checkpoints(tr.run)[-1])
        group.barrier()
        checkpoints_py.save(tr)
    return digest(found)


def killed(group: Ranks, place: Path, flags: dict, victim: int, step: int) -> list:
    """Train; at a save, one rank dies before it has written its shard."""
    write = checkpoints_py.write_shard

    def dying(folder, tr, state, counts):
        if tr.seen == step and group.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        write(folder, tr, state, counts)

    checkpoints_py.write_shard = dying
    return trained(group, place, flags)


def struck(group: Ranks, place: Path, flags: dict, victims: list[int], at: int) -> list:
    """Train; in the step after `at` images, before it changes a weight, ranks die."""
    update = train.update

    def dying(tr, norm):
        if tr.seen > at and group.rank in victims:
            os.kill(os.getpid(), signal.SIGKILL)
        update(tr, norm)

    train.update = dying
    return trained(group, place, flags)


def times(group: Ranks, place: Path) -> list[float]:
    """The times that a sharded network sees in bf16."""
    tr, seen = opened(group, place, {**FULL, "dtype": "bf16"}), []
    tr.net.register_forward_hook(lambda net, args, out: seen.extend(args[1].tolist()))
    train.step(tr, train.load(tr))
    return seen


def shown(group: Ranks, place: Path, how: str) -> tuple[float, ...]:
    """Of the average the held-out loss; mean squares of what weights, average, weights say."""
    tr = opened(group, place, {"shard": how})
    assert is_sharded(tr.net)
    first = held_out_loss(tr)["loss"]
    x, t = torch.ones(2, 32, 4, 4), torch.full((2,), 500.0)
    tr.net.eval()
    with torch.no_grad():
        own = tr.net(x, t).double().square().mean()
        average = showing(tr.net, tr.ema.weights["0.050"])(x, t).double().square().mean()
        again = tr.net(x, t).double().square().mean()
    return first, float(own), float(average), float(again)
