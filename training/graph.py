"""The forward and backward pass of a step as one CUDA graph (--graph).

A step launches some thousand kernels; a graph launches them all at once. What is left outside, some
dozen launches of clipping, optimizer and averages, the host queues while the GPU is busy: so lr,
counters and checkpoints are those of any run. Before a graph is used, a replay is compared with the
pass that it replaces, on images that it was not recorded with; if it is not exact, nothing changes.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kernels import proof
from kernels.recording import beside, record
from training.trainer import Trainer

Batch = dict[str, Tensor]
# pass_(batch) adds the gradients of a batch; returns (times, losses), (B,) each.
Pass = Callable[[Batch], tuple[Tensor, Tensor]]
# Steps before one is recorded: kernels are compiled and checked in them, and algorithms chosen.
WARM = 3


def repeater(tr: Trainer) -> Callable[[Pass, Batch], tuple[Tensor, Tensor]]:
    """What runs the pass of each step: a Graph with --graph, if nothing stands against it."""
    if not tr.cfg.graph:
        return at_once
    if reason := obstacle(tr):
        if tr.ranks.rank == 0 and tr.ranks.device.type == "cuda":
            say_none(reason)
        return at_once
    return Graph(list(tr.params.values()), tr.ranks.device)


def at_once(pass_: Pass, batch: Batch) -> tuple[Tensor, Tensor]:
    """The pass as it is."""
    return pass_(batch)


def obstacle(tr: Trainer) -> str:
    """Why the passes of this run cannot be a graph; "" = they may."""
    reasons = {
        f"the network is on a {tr.ranks.device.type}": tr.ranks.device.type != "cuda",
        "several ranks share a step": tr.ranks.world > 1,
        "--accum adds up several passes": tr.cfg.accum > 1,
        "--compile launches them its own way": tr.cfg.compile,
        "--checkpointing reads the state of random numbers": tr.cfg.checkpointing,
        "--buckets gives batches of several shapes": tr.ds.frames is not None,
        "dropout is seeded in every step": getattr(tr.net.cfg, "dropout", 0) > 0,
        "--coupling ot pairs on the CPU": tr.objective.coupling == "ot",
        "its loss keeps a record of its own": bool(tr.loss.state_dict()),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def say_none(reason: str) -> None:
    tqdm.write(f"--graph: no CUDA graph, each kernel is launched by itself: {reason}")


class Graph:
    """Runs a pass as it is for WARM steps; then records it, and replays that."""

    def __init__(self, params: list[torch.nn.Parameter], device: torch.device):
        self.params, self.device = params, device
        # How many passes are still to run as they are; infinity once a graph is found wanting.
        self.left: float = WARM
        self.inputs: Batch = {}
        self.replay: Callable[[], Any] | None = None
        # Where a replay writes: times, losses and all gradients.
        self.outcome: list[Tensor | None] = []

    def __call__(self, pass_: Pass, batch: Batch) -> tuple[Tensor, Tensor]:
        with proof.for_replay(self.left < math.inf):
            return self.step(pass_, batch)

    def step(self, pass_: Pass, batch: Batch) -> tuple[Tensor, Tensor]:
        """The pass as it is, or a replay."""
        if self.left > 0:
            self.left -= 1
            if self.left == 0:
                self.inputs = {key: x.to(self.device, copy=True) for key, x in batch.items()}
            return pass_(batch)
        if not self.fits(batch):
            return pass_(batch)
        if self.replay is None and not self.begin(pass_, batch):
            return pass_(batch)
        self.fill(batch)
        self.replay()
        for p, gradient in zip(self.params, self.outcome[2:]):
            p.grad = gradient
        return self.outcome[0], self.outcome[1]

    def fits(self, batch: Batch) -> bool:
        """Has the batch the shapes of that which was recorded?"""
        forms = [
            {key: (x.shape, x.dtype) for key, x in tensors.items()}
            for tensors in (batch, self.inputs)
        ]
        return forms[0] == forms[1]

    def fill(self, batch: Batch) -> None:
        """Put a batch where the graph reads."""
        for key, x in self.inputs.items():
            x.copy_(batch[key], non_blocking=True)

    def run(self, pass_: Pass) -> list[Tensor | None]:
        """[times, losses, gradients of all parameters …] of what the graph reads."""
        for p in self.params:
            p.grad = None
        found = [*pass_(self.inputs), *(p.grad for p in self.params)]
        for p in self.params:
            p.grad = None
        return found

    def begin(self, pass_: Pass, batch: Batch) -> bool:
        """Record a pass on the last batch, and compare it on this one. False: not to be used."""
        try:
            with beside(self.device):
                self.run(pass_)
                self.replay, self.outcome = record(lambda: self.run(pass_))
                self.fill(batch)
                first, second = self.run(pass_), self.run(pass_)
                self.replay()
        except RuntimeError as error:
            return self.give_up(str(error).splitlines()[0])
        if crowded(self.device):
            return self.give_up("it leaves less than a quarter of the GPU's memory to the rest")
        # 0 where passes are deterministic: then a replay has to be the same to the bit.
        usual, found = distance(first, second), distance(first, self.outcome)
        if usual == math.inf:
            # This batch has no finite gradient. The next one may tell.
            self.replay = None
            return False
        if found > 4 * usual:
            return self.give_up(f"a replay is off by {found:.1e}, two passes by {usual:.1e}")
        tqdm.write("--graph: forward and backward pass run as one CUDA graph")
        return True

    def give_up(self, reason: str) -> bool:
        """No graph in this run."""
        say_none(reason)
        self.left, self.replay, self.outcome, self.inputs = math.inf, None, [], {}
        return False


def distance(a: list[Tensor | None], b: list[Tensor | None]) -> float:
    """The largest difference relative to a tensor's norm; infinity where one is missing or not
    finite."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x is None or y is None:
            apart = 0.0 if x is y else math.inf
        elif torch.equal(x, y):
            apart = 0.0
        else:
            apart = float((x.double() - y.double()).norm() / x.double().norm())
        # max() would lose a NaN.
        worst = max(worst, math.inf if math.isnan(apart) else apart)
    return worst


def crowded(device: torch.device) -> bool:
    """Is less than a quarter of the GPU's memory left? A graph keeps its activations, and previews
    and evaluation need some too."""
    if device.type != "cuda":
        return False
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return free < total / 4
