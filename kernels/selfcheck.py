"""Are the kernels right on this GPU, and faster than torch?

    python -m kernels.selfcheck                          # for toy-281m-attn at batch 64, in bf16
    python -m kernels.selfcheck --model tiny --batch 16 --side 16 --dtype fp32
    python -m kernels.selfcheck --no-graph               # as train.py --no-graph, with several GPUs

Runs one training step of a network and prints each kind of call that has kernels: errors against
fp32, times, and what KERNELS=auto takes. Exit code 1 if a kernel is wrong. Without a GPU, with
TRITON_INTERPRET=1, kernels are interpreted: errors are real then, and nothing is timed. (Not in
bf16, which Triton's interpreter computes wrongly.)
"""

import argparse
import os
import sys

import torch
from torch import Tensor

from kernels import dispatch, proof
from mmdit import PRESETS as TRANSFORMERS
from model import PRESETS as UNETS
from model import build

PRESETS = {**UNETS, **TRANSFORMERS}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def step(model: str, batch: int, side: int, dtype: torch.dtype, device: torch.device) -> None:
    """One forward and backward pass, in which every kind of call is examined."""
    cfg = PRESETS[model]
    net = build(cfg).to(device, memory_format=torch.channels_last)
    x = torch.randn(batch, cfg.in_channels, side, side, device=device)
    t = torch.rand(batch, device=device) * 1000
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        y: Tensor = net(x.contiguous(memory_format=torch.channels_last), t)
    y.float().square().mean().backward()


def row(kind: str, verdict: proof.Verdict) -> str:
    """A line of the table."""
    times = "        not timed"
    if verdict.seconds:
        times = f"{verdict.seconds * 1e6:7.0f} {verdict.torch_seconds * 1e6:7.0f} us"
    right = "" if verdict.right else "   WRONG"
    errors = f"{verdict.error:8.1e} {verdict.torch_error:8.1e}"
    return f"{verdict.path:<6} {errors}  {times}  {kind}{right}"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="toy-281m-attn", choices=sorted(PRESETS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=32, help="of the latents")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--no-graph", action="store_true", help="count what launching costs")
    return parser


def main() -> int:
    args = parser().parse_args()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpreted:
        print("kernels.selfcheck: no GPU here.  TRITON_INTERPRET=1 interprets the kernels.")
        return 2
    if interpreted and args.dtype == "bf16":
        print("kernels.selfcheck: Triton's interpreter computes bf16 wrongly.  Add --dtype fp16.")
        return 2
    os.environ["KERNELS"] = "auto"
    dispatch.interpret_in_auto = interpreted
    proof.forget()  # measured here and now, whatever was decided before
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with proof.for_replay(device.type == "cuda" and not args.no_graph):
        step(args.model, args.batch, args.side, DTYPES[args.dtype], device)
    print("path      error    torch     kernel   torch   kind of call")
    for kind, verdict in proof.verdicts.items():
        print(row(kind, verdict))
    wrong = sum(not verdict.right for verdict in proof.verdicts.values())
    print(f"{len(proof.verdicts)} kinds of call, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
