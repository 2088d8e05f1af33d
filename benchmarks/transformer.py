"""A transformer's training speed on a CPU:  python benchmarks/transformer.py

A training step (forward, backward, AdamW) of `sit-tiny` against diffusers' DiTTransformer2DModel
with the same weights, input and optimizer; alternating, medians, as a ratio (above 1 = ours is
faster).
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.peer_dit import peer_dit
from benchmarks.race import alternate
from benchmarks.train_cpu import stepper
from harness import record
from mmdit import PRESETS, MMDiT

ROUNDS, STEPS = 9, 4  # a round = STEPS steps of each side in turn
SIDE = 8
BATCHES = (16, 64)


def against_diffusers(batch: int) -> dict[str, float]:
    # diffusers' needs a class; one label for all is the least.
    net = MMDiT(replace(PRESETS["sit-tiny"], num_classes=1, pos_max=SIDE))
    for p in net.parameters():
        if not p.any():
            # zero-initialised layers, so that outputs can be compared
            torch.nn.init.normal_(p, std=0.02)
    peer, y = peer_dit(net, SIDE), torch.zeros(batch, dtype=torch.long)
    x, t = torch.randn(batch, 32, SIDE, SIDE), torch.rand(batch) * 1000
    with torch.no_grad():
        error = float((net(x, t, y) - peer(x, t, y).sample).abs().max())
    assert error < 1e-3, f"not the same function: {error}"
    sides = {
        "ours": stepper(net, lambda n, x, t: n(x, t, y), batch, SIDE),
        "diffusers": stepper(peer, lambda n, x, t: n(x, t, y).sample, batch, SIDE),
    }
    times = alternate(sides, ROUNDS, STEPS)
    return {
        **{f"{k} s/step": v for k, v in times.items()},
        "images/s": batch / times["ours"],
        "ratio to diffusers": times["diffusers"] / times["ours"],
        "max output difference": error,
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    result = {f"sit-tiny, batch {n}, 32×{SIDE}×{SIDE}": against_diffusers(n) for n in BATCHES}
    for name, row in result.items():
        ratio = row["ratio to diffusers"]
        print(f"{name:<42} {row['images/s']:7.1f} images/s   {ratio:.2f}× diffusers")
    record.write("transformer", {"rounds": ROUNDS, "steps a round": STEPS, "results": result})
