"""What does it cost that a checkpoint's files are compared with its list?

    python benchmarks/digests.py [--preset NAME]

A checkpoint of `toy-281m` (or any preset of model.py): weights, one EMA, AdamW's moments. Seconds
per GB of hashing it (all files at once, a thread each), beside those of writing and loading it.
"""

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from ckpt import load_unet, read_tensors, save_checkpoint
from harness import files, record
from harness.cli import cli, flag, parse
from harness.run import checkpoints
from harness.whole import broken
from model import PRESETS, UNet


@dataclass(frozen=True)
class Config:
    preset: Literal[*PRESETS] = flag("toy-281m", "network of the checkpoint")


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def load(folder: Path) -> None:
    """What a run reads when it goes on."""
    for path in sorted(folder.iterdir()):
        if path.name == "state.safetensors":
            read_tensors(path)
        elif path.name != files.DIGESTS:
            load_unet(path)


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(cfg)
        return
    preset = cfg.preset
    net = UNet(PRESETS[preset])
    params = dict(net.named_parameters())
    moments = {
        f"{key}/{name}": p.data for key in ("exp_avg", "exp_avg_sq") for name, p in params.items()
    }
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch)
        save = lambda: save_checkpoint(
            run, 8, net, {"run": preset}, {"0.050": params}, moments, {}, 1, 0
        )
        rows = {"save": seconds(save)}
        folder = checkpoints(run)[-1]
        names = [path.name for path in folder.iterdir() if path.name != files.DIGESTS]
        size = sum((folder / name).stat().st_size for name in names) / 1e9
        rows["hash one by one"] = seconds(lambda: [files.digest(folder / name) for name in names])
        files.remembered.cache_clear()
        rows["hash"] = seconds(lambda: broken(folder))
        # From here on the hashes are remembered: this is loading without them.
        rows["load"] = seconds(lambda: load(folder))
    per_gb = {f"{key}, seconds per GB": value / size for key, value in rows.items()}
    share = rows["hash"] / (rows["hash"] + rows["load"])
    for key, value in per_gb.items():
        print(f"{key}: {value:.2f}")
    print(f"{size:.2f} GB; hashing is {share:.0%} of loading it with the comparison", flush=True)
    record.write("digests", {"preset": preset, "GB": size, **per_gb, "share of loading": share})


if __name__ == "__main__":
    cli(main)
