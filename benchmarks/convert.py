"""What does it take to convert a large checkpoint?   python benchmarks/convert.py [--preset NAME]

A file of random fp16 weights of `sdxl` (5 GB; any preset of model.py) is converted to diffusers'
layout and verified, each in a process of its own: seconds, and peak memory above what the process
had after a tiny network, over the largest tensor. (Linux)
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from ckpt import convert, layouts, save_unet
from ckpt.convert import verify
from harness import record
from harness.cli import cli, flag, parse
from harness.files import stream_tensors
from model import PRESETS, UNet


@dataclass(frozen=True)
class Config:
    preset: Literal[*PRESETS] = flag("sdxl", "network of the checkpoint")


def memory(which: str) -> int:
    """VmRSS, bytes now, or VmHWM, the most there was."""
    return 1024 * int(re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def child(step: str, src: str, dst: str) -> None:
    """Warm up on a tiny network; then the peak must grow by the large one alone."""
    with tempfile.TemporaryDirectory() as folder:
        save_unet(Path(folder) / "tiny.safetensors", UNet(PRESETS["nano"]).half(), {})
        convert(Path(folder) / "tiny.safetensors", Path(folder) / "out.safetensors", "diffusers")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before, start = memory("VmRSS"), time.perf_counter()
    if step == "convert":
        convert(src, dst, "diffusers")
    else:
        assert verify(src, dst)[0]
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "extra bytes": memory("VmHWM") - before}))


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(cfg)
        return
    preset = cfg.preset
    shapes = layouts.foreign_shapes(PRESETS[preset], "native")
    largest = max(2 * torch.Size(shape).numel() for shape in shapes.values())
    with tempfile.TemporaryDirectory() as folder:
        src, dst = Path(folder) / "native.safetensors", Path(folder) / "diffusers"
        kinds = {name: (torch.float16, shape) for name, shape in shapes.items()}
        stream_tensors(src, kinds, {}, lambda name: torch.randn(shapes[name]).half() * 0.02)
        rows = {}
        for step in ("convert", "verify"):
            command = [sys.executable, __file__, step, src, dst]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = rows[step] = json.loads(done.stdout.splitlines()[-1])
            row["extra / largest tensor"] = row["extra bytes"] / largest
            extra = f"{row['extra bytes'] / 1e6:.0f} MB extra"
            times = f"{row['extra / largest tensor']:.2f} x its largest tensor"
            print(f"{step} {preset}: {row['seconds']:.1f} s, {extra} = {times}", flush=True)
        about = {"preset": preset, "bytes": src.stat().st_size, "largest tensor": largest}
        record.write("convert", {**about, **rows})


if __name__ == "__main__":
    if sys.argv[1:2] in (["convert"], ["verify"]):
        child(*sys.argv[1:])
    else:
        cli(main)
