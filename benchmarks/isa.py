"""What is in each kernel's machine code, counted on a machine without a GPU.

    python benchmarks/isa.py [--before COMMIT]    # writes benchmarks/results/isa.json

Each kernel is compiled for five GPUs as a training step of toy-281m-attn calls it. Counted are the
instructions in the code (all of it, and what lies in loops), registers, spills, shared memory, and
the share of a multiprocessor's warps that these let run at once. Beside them stands the floor of
the call: the bytes it has to read and write once, whatever its code. --before counts the kernels of
another commit too.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from harness import record
from harness.cli import UserError, cli, flag, parse
from kernels import adamw8bit, attention, groupnorm
from model import PRESETS, build

MODEL, BATCH, GROUPS = "toy-281m-attn", 64, 32
# By kernel, what benchmarks/compilations.py calls the configuration that such a step runs.
LABELS = {
    "moments_kernel": "gn moments nhwc",
    "forward_coefficients_kernel": "gn coefficients C/G=8",
    "apply_kernel": "gn apply C/G=8 nhwc",
    "sums_kernel": "gn sums C/G=8 nhwc",
    "backward_coefficients_kernel": "gn coefficients bwd C/G=8",
    "dx_kernel": "gn dx C/G=8 nhwc",
    "finish_kernel": "gn coefficients of weights",
    "small_forward_kernel": "gn small C/G=8 HW=256 nhwc",
    "small_backward_kernel": "gn small bwd C/G=8 HW=256 nhwc",
    "forward_kernel": "attention forward D=64",
    "backward_small_kernel": "attention small D=64 N=256",
    "delta_kernel": "attention delta D=64",
    "backward_kv_kernel": "attention backward_kv D=64",
    "backward_q_kernel": "attention backward_q D=64",
}
OPTIMIZER = {True: "adamw8bit 8-bit 2 EMAs g=fp32", False: "adamw8bit fp32 2 EMAs g=fp32"}
EMAS = 2


@dataclass(frozen=True)
class Config:
    before: str = flag("", "commit whose kernels are counted too")


# ---- floors --------------------------------------------------------------------------------------


class Recorder:
    """Stands for a kernel and notes the size of what it is given: all of it has to be touched."""

    def __init__(self, name: str, found: dict[str, int]):
        self.name, self.found = name, found

    def __getitem__(self, grid: Any) -> Callable:
        return self.launch

    def launch(self, *args: Any, **options: Any) -> None:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        self.found[LABELS[self.name]] = sum(t.numel() * t.element_size() for t in tensors)


def floors() -> dict[str, int]:
    """Bytes that a call of each configuration has to read or write."""
    found: dict[str, int] = {}

    def recorded(module: Any) -> Any:
        """The module with recorders in the place of its kernels."""
        recorders = {name: Recorder(name, found) for name in LABELS if hasattr(module, name)}
        return mock.patch.multiple(module, **recorders)

    with recorded(groupnorm), recorded(attention), FakeTensorMode():
        norm(256, 32)
        norm(256, 16)
        attend(4, 16 * 16, 64)
    return {**found, **optimizer_bytes()}


def norm(C: int, side: int) -> None:
    """GroupNorm + FiLM + SiLU, forward and backward, in bf16."""
    x = torch.empty(BATCH, C, side, side, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    scale, shift = torch.empty(BATCH, 2 * C, dtype=torch.bfloat16).chunk(2, 1)
    weight, bias = torch.empty(C), torch.empty(C)
    y, *kept = groupnorm.forward(x, weight, bias, scale, shift, GROUPS, True, 1e-5)
    groupnorm.backward(torch.empty_like(y), x, weight, bias, scale, *kept, True)


def attend(heads: int, N: int, D: int) -> None:
    """Self-attention in bf16, and its backward pass by one program a head and by blocks."""
    q, k, v, o, do, dq, dk, dv = torch.empty(8, BATCH, heads, N, D, dtype=torch.bfloat16)
    lse = torch.empty(BATCH, heads, N)
    attention.forward(q, k, v, 1.0)
    attention.launch_small(q, k, v, o, do, lse, dq, dk, dv, 1.0)
    attention.launch_blocks(q, k, v, o, do, lse, dq, dk, dv, 1.0)


def optimizer_bytes() -> dict[str, int]:
    """A step on all weights: gradients are read; weights, moments and EMAs are written too."""
    found = {label: 0 for label in OPTIMIZER.values()}
    with torch.device("meta"):
        weights = list(build(PRESETS[MODEL]).parameters())
    for p in weights:
        moments = sum(n * dtype.itemsize for n, dtype in adamw8bit.kept(p).values())
        one = p.numel() * p.element_size()
        found[OPTIMIZER[adamw8bit.quantized(p)]] += one + 2 * (one + moments + EMAS * one)
    return found


# ---- counts --------------------------------------------------------------------------------------


def counted(kernels: Path, labels: list[str]) -> dict[str, Any]:
    """What kernels/ in a folder compiles to, by label and target."""
    hidden = ("TRITON_INTERPRET", "PYTHONSAFEPATH")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    env["PYTHONPATH"] = str(ROOT)
    # python -m looks into the folder where it runs before it looks into PYTHONPATH
    command = [sys.executable, "-m", "benchmarks.compilations", *labels]
    done = subprocess.run(command, cwd=kernels, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout)


def unpack(commit: str, folder: str) -> str:
    """Write a commit's kernels/, and what lists their configurations, into a folder; the commit's
    full name."""

    def git(*words: str) -> bytes:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True)
        if done.returncode:
            raise UserError(
                f"--before {commit}",
                wanted="a commit of this repository",
                do=done.stderr.decode().strip().splitlines()[-1],
            )
        return done.stdout

    name = git("rev-parse", "--verify", "--end-of-options", f"{commit}^{{commit}}")
    archive = git("archive", name.decode().strip(), "kernels", "benchmarks")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return name.decode().strip()


def say(row: dict[str, Any]) -> None:
    print(f"{row['kernel']:<32} {row['bytes'] / 1e6:8.1f} MB at least")
    for side in ("before", "now"):
        for target, n in row.get(side, {}).items():
            print(
                f"  {side:<6} {target:<7} {n['instructions']:>5} instructions, "
                f"{n['in_loops']:>4} in loops; {n['registers']:>3} registers, "
                f"{n['spilled']} spilled; {n['shared']:>6} B shared; {n['occupancy']:.0%} of warps"
            )


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(cfg)
        return
    least = floors()
    labels = [*LABELS.values(), *OPTIMIZER.values()]
    sides, commit = {}, ""
    if cfg.before:
        with tempfile.TemporaryDirectory() as folder:
            commit = unpack(cfg.before, folder)
            sides["before"] = counted(Path(folder), labels)
    sides["now"] = counted(ROOT, labels)
    missing = [label for label in labels if label not in sides["now"]]
    assert not missing, f"no such configurations: {missing}"
    rows = []
    for label in labels:
        row = {"kernel": label, "bytes": least[label]}
        row |= {side: found[label] for side, found in sides.items() if label in found}
        rows.append(row)
        say(row)
    record.write("isa", {"model": MODEL, "batch": BATCH, "before": commit, "rows": rows})


if __name__ == "__main__":
    cli(main)
