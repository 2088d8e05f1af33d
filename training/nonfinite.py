"""Steps whose gradient is not finite: they change no weight, are counted, and the log says why.

On a GPU nothing waits to learn of one. The optimizer leaves all as it was by itself, and the norms
of the gradients are read after the next backward pass was begun, when they are long there: before
the next step changes a weight, so that what was wrong can be looked for in the same weights.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.cli import UserError
from harness.run import checkpoints, report_nonfinite
from kernels.adamw8bit import AdamW8bit, local
from training.checkpoints import keep_batches, save
from training.sharding import is_sharded, reshard, whole_norms
from training.trainer import Trainer

# Non-finite steps in a row before giving up.
MAX_BAD = 10


class Taken(NamedTuple):
    """A step that was taken, or left out by the optimizer itself: which, is not yet known here."""

    # (1 + n,) norms of all gradients together and of each; on the host once `written` happened.
    norms: Tensor
    written: Any
    names: list[str]
    batches: list[dict[str, Tensor]]


def reads_late(tr: Trainer) -> bool:
    """Can a step's norms wait until the next one? On a GPU, with an optimizer that leaves out a
    non-finite step by itself, and a loss whose own parts do not hang on it."""
    optimizer = tr.optimizer
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    # Of torch's own, with shards, this is not known.
    fused = fused and not is_sharded(tr.net)
    leaves_out = isinstance(optimizer, AdamW8bit) or fused
    return leaves_out and not tr.loss.state_dict() and tr.ranks.device.type == "cuda"


def gradient_norms(tr: Trainer) -> tuple[Tensor, list[str]]:
    """((1 + n,) norms of all gradients together and of each, in fp32 whatever they are; the n names
    of their parameters)."""
    found = {name: local(p.grad) for name, p in tr.params.items() if p.grad is not None}
    each = torch.stack(torch._foreach_norm(list(found.values()), 2, dtype=torch.float32))
    each = whole_norms(each, tr.net, tr.ranks)
    return torch.cat([torch.linalg.vector_norm(each)[None], each]), list(found)


def taken(norms: Tensor, names: list[str], batches: list[dict[str, Tensor]]) -> Taken:
    """Send a step's norms to the host, without waiting for them."""
    if norms.device.type != "cuda":
        return Taken(norms, None, names, batches)
    host = torch.empty_like(norms, device="cpu", pin_memory=True)
    host.copy_(norms, non_blocking=True)
    written = torch.cuda.Event()
    written.record()
    return Taken(host, written, names, batches)


def conclude(tr: Trainer) -> None:
    """Average the weights of the last step, or count it as non-finite and say where that came from.

    Before anything reads the averages, the counters or the meter. Every rank calls.
    """
    step, tr.taken = tr.taken, None
    if step is None:
        return
    if step.written is not None:
        step.written.synchronize()
    # Of a tensor on a GPU this would be an error, and no wait.
    total, *each = map(float, step.norms.numpy())
    if math.isfinite(total):
        tr.bad = 0
        # AdamW8bit averages in the pass that changes the weights.
        if tr.ema.aside or not isinstance(tr.optimizer, AdamW8bit):
            tr.ema.update(tr.net, tr.seen, tr.cfg.batch)
        return
    if tr.ema.every > 1:
        # An update stands for the steps before it, too.
        tr.ema.update(tr.net, tr.seen, tr.cfg.batch)
    broken = [name for name, norm in zip(step.names, each) if not math.isfinite(norm)]
    report_bad_step(tr, step.batches, broken)


def report_bad_step(tr: Trainer, batches: list[dict[str, Tensor]], broken: list[str]) -> None:
    """Say where a non-finite loss or gradient came from; after MAX_BAD in a row, stop.

    broken: the parameters whose gradient is not finite.
    """
    tr.skipped += 1
    tr.bad += 1
    where = report_nonfinite(tr.run, tr.ranks, tr.net, tr.loss, batches, broken, tr.seen, tr.bad)
    if is_sharded(tr.net):
        reshard(tr.net)
    tr.meter.drop_nonfinite()
    if tr.bad >= MAX_BAD:
        path = keep_batches(tr, batches)
        save(tr)
        raise UserError(
            f"{MAX_BAD} non-finite steps in a row, the last: {where}",
            do=f"Look at the batch, which is in {path}; the weights, as they were before, are in "
            f"{checkpoints(tr.run)[-1]}.",
        )
