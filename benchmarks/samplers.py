"""What the sampling loop costs beside its network:  python benchmarks/samplers.py [--repeats 30]

1. 25 Heun steps, without and with guidance, against as many bare calls of the same network (1 =
   the loop is free).
2. Whole runs against diffusers' scheduler loops with the same network and as many calls; above 1 =
   ours is faster.
Sides take turns; medians.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import race as races
from benchmarks.race import DEVICE, race
from harness import record
from model import PRESETS, UNet
from objectives import make_objective
from samplers import guided, sample

STEPS, BATCH, SIDE = 25, 16, 8
races.SECONDS = 40.0  # a race may last: differences of a percent are asked for
FM = make_objective("fm")


def bare(net: UNet, x: torch.Tensor, calls: int, **cond: torch.Tensor):
    """`calls` calls and nothing else."""
    t = torch.full((len(x),), 500.0, device=x.device)

    @torch.no_grad()
    def run() -> None:
        for _ in range(calls):
            net(x, t, **cond)

    return lambda: run


def ours(net: UNet, x: torch.Tensor, method: str, cfg: float = 1.0, cond: dict | None = None):
    predict = guided(FM, net, cfg)
    return lambda: lambda: sample(predict, x, method=method, steps=STEPS, cond=cond)


def peer(net: UNet, x: torch.Tensor, name: str, **options):
    """A diffusers scheduler's loop as its pipelines have it."""

    def make():
        import diffusers

        scheduler = getattr(diffusers, name)(**options)

        @torch.no_grad()
        def run() -> None:
            scheduler.set_timesteps(STEPS, device=x.device)
            state = x
            for t in scheduler.timesteps:
                state = scheduler.step(net(state, t.expand(len(x)).float()), t, state).prev_sample

        return run

    return make


def main() -> None:
    repeats = int(sys.argv[sys.argv.index("--repeats") + 1]) if "--repeats" in sys.argv else 30
    g = torch.Generator().manual_seed(0)
    net = UNet(replace(PRESETS["tiny"], num_classes=10)).to(DEVICE).eval()
    x = torch.randn(BATCH, 32, SIDE, SIDE, generator=g).to(DEVICE)
    y = torch.arange(BATCH, device=DEVICE) % 10
    calls = 2 * STEPS - 1
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    cases = {
        "25 Heun steps": {
            "ours": ours(net, x, "heun"),
            "bare": bare(net, x, calls),
            "diffusers": peer(net, x, "FlowMatchHeunDiscreteScheduler"),
        },
        "25 Heun steps, guided": {
            "ours": ours(net, x, "heun", 2.0, {"y": y}),
            "bare": bare(net, torch.cat([x, x]), calls, y=torch.cat([y, y])),
        },
        "25 Euler steps": {
            "ours": ours(net, x, "euler"),
            "bare": bare(net, x, STEPS),
            "diffusers": peer(net, x, "FlowMatchEulerDiscreteScheduler"),
        },
        "25 DPM++ 2M steps": {
            "ours": ours(net, x, "dpmpp_2m"),
            "bare": bare(net, x, STEPS),
            "diffusers": peer(net, x, "DPMSolverMultistepScheduler", **flow),
        },
        "25 UniPC steps": {
            "ours": ours(net, x, "unipc"),
            "bare": bare(net, x, STEPS),
            "diffusers": peer(net, x, "UniPCMultistepScheduler", **flow),
        },
    }
    result = {}
    for name, sides in cases.items():
        times = race(sides, repeats, uncaptured=tuple(sides))
        row = result[name] = {"times": times}
        for side in times:
            if side != "ours" and "seconds" in times[side]:
                row[f"ratio to {side}"] = times[side]["seconds"] / times["ours"]["seconds"]
        text = f"{times['ours']['seconds']:.3f} s   loop {1 / row['ratio to bare'] - 1:+.1%}"
        if "ratio to diffusers" in row:
            text += f"   {row['ratio to diffusers']:.2f}× diffusers"
        print(f"{name:<24} {text}")
    about = {"network": "tiny", "batch": BATCH, "latents": [32, SIDE, SIDE]}
    record.write("samplers", {**about, "repeats": repeats, "results": result})


if __name__ == "__main__":
    main()
