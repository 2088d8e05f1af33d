"""How much memory a rank takes to begin a sharded run from a file, to take a step, to go on.

    python benchmarks/loading.py

Two ranks (gloo, on this CPU) train a network of half a billion parameters with --shard full. Each
is a process of its own; counted is the most memory that it had in each part, beside what it had
before, as copies of the network in fp32. What is asked: no rank ever holds two.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)

import torch

import train
from ckpt import save_unet
from harness import record
from harness.ranks import join_ranks
from model import PRESETS, build
from training.checkpoints import save
from training.sharding import shard

RANKS = 2
# Of toy-281m's form; all of its weights grow with the square of its channels.
CHANNELS = {"half a billion": 352, "small": 96}
FLAGS = {
    "data": "toyfaces:16", "resolution": 64, "batch": 2, "images": 4, "ema": (), "shard": "full",
    "optim": "adamw8bit", "dtype": "fp32", "device": "cpu", "workers": 0, "name": "run",
    "holdout": 0.0, "vae": "pixel:8",
}  # fmt: skip


def network(name: str) -> Any:
    """The config of a network for this, in- and outputs as the run's latents have them."""
    channels = 3 * 8 * 8
    return replace(
        PRESETS["toy-281m"],
        model_channels=CHANNELS[name],
        in_channels=channels,
        out_channels=channels,
    )


def memory(word: str) -> int:
    """Bytes of this process: VmRSS, now; VmHWM, the most since forget()."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(word)))


def forget() -> None:
    """From here on VmHWM counts anew (Linux: proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def measured(place: Path, name: str) -> dict[str, int]:
    """On each rank: bytes at most while the run was loaded, in one step and in a save, beside what
    the process had before."""
    PRESETS[name] = network(name)
    ranks = join_ranks("cpu")
    small = build(PRESETS["nano"])
    # What libraries keep for themselves, about 100 MB, is no copy of a network.
    shard(small, "full", "fp32", ranks)
    small(torch.zeros(1, 32, 8, 8), torch.zeros(1)).sum().backward()
    cfg = train.resolve(
        train.Config(model=name, init=str(place / "init.safetensors"), out=str(place), **FLAGS)
    )
    before = memory("VmRSS")
    forget()
    tr = train.setup(cfg, ranks)
    found = {"begun at": tr.seen, "load": memory("VmHWM") - before}
    forget()
    train.step(tr, train.load(tr))
    train.conclude(tr)
    found["step"] = memory("VmHWM") - before
    forget()
    save(tr)
    found["save"] = memory("VmHWM") - before
    ranks.leave()
    return found


def on_ranks(place: Path, name: str) -> list[dict[str, int]]:
    """measured() of each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_PORT": port}
    started = []
    for rank in range(RANKS):
        own = {key: str(value) for key, value in {**common, "RANK": rank}.items()}
        # What is freed goes back to the system: else heaps that are kept count as memory.
        env = {**os.environ, **own, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        env |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        command = [sys.executable, __file__, "rank", str(place), name]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"a rank ended with {[p.returncode for p in started]}")
    return [json.loads(text.splitlines()[-1]) for text in said]


def copies(name: str) -> dict[str, Any]:
    """The most that a rank took in each part, as copies of the network: begun from a file, and gone
    on with after its first step."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        torch.manual_seed(0)
        net = build(network(name))
        one = sum(p.nbytes for p in net.parameters())
        save_unet(place / "init.safetensors", net, {"objective": "fm"})
        del net
        rows = {}
        for part in ("from a file", "gone on with"):
            found = on_ranks(place, name)
            most = {key: max(row[key] for row in found) for key in found[0]}
            assert (most.pop("begun at") > 0) == (part == "gone on with")
            rows[part] = {key: round(size / one, 3) for key, size in most.items()}
    return {"parameters": one // 4, "ranks": RANKS, "optim": FLAGS["optim"], "copies": rows}


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        print(json.dumps(measured(Path(sys.argv[2]), sys.argv[3])))
    else:
        result = copies("half a billion")
        print(result)
        record.write("loading", result)
