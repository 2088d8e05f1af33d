"""What a run shows of itself: its loss on held-out images, and samples of fixed seeds."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

from data import heldout
from data.dataset import classes_of, latents_of, low_latents_of
from diffusion.sampling import NonFinite
from harness.pictures import save_grid
from samplers import Generator
from training.nonfinite import conclude
from training.sharding import evenly, is_sharded, reshard, showing
from training.trainer import Trainer


def ema_net(tr: Trainer) -> tuple[str, Any]:
    """(name, net) of what one would sample: the first EMA, or without one the weights."""
    conclude(tr)
    # Of the network, not of the trainer: who keeps it does not keep the folder's lock.
    net = tr.net
    if not tr.ema.weights:
        return "raw", net
    width, weights = next(iter(tr.ema.weights.items()))
    if is_sharded(net):
        return f"ema-{width}", showing(net, weights)
    # From host memory, with --ema-device cpu: a step's gradients are not there now.
    weights = {name: weight.to(tr.ranks.device) for name, weight in weights.items()}
    return f"ema-{width}", lambda x, t, **cond: functional_call(net, weights, (x, t), cond)


def held_out_loss(tr: Trainer) -> dict[str, Any]:
    """A row of the log: the loss of the first EMA on held-out images."""
    loss, (name, net) = tr.loss, ema_net(tr)
    if tr.objective.coupling == "ot":
        # It would pair by who else is in the batch.
        loss = replace(loss, objective=replace(tr.objective, coupling="none"))
    tr.net.eval()
    held = tr.ds.heldout
    texts = tr.texts and tr.texts.of(held).plain
    row = heldout.loss_of(
        partial(loss, net), held, tr.classes, tr.latent_shape, tr.cfg.seed, tr.ranks, texts,
        even=is_sharded(tr.net),
    )  # fmt: skip
    tr.net.train()
    if is_sharded(tr.net):
        reshard(tr.net)
    return {"event": "held-out", "images": tr.seen, "of": name, **row}


def draw_samples(
    tr: Trainer, net: Any, seeds: Sequence[int], strict: bool = False, **how: Any
) -> Tensor:
    """uint8 images (B, 3, H, W) of fixed seeds, on every rank; labels cycle through the classes.

    how: as sample() takes it, 10 Heun steps if nothing is said. strict: raise NonFinite where the
    network gives no finite numbers, else say so.
    """
    device, dtype, n = tr.ranks.device, tr.cfg.dtype, len(seeds)
    if is_sharded(tr.net):
        seeds = evenly(list(seeds), tr.ranks.world)
    told = tr.texts and tr.texts.told(seeds)
    generator = Generator(
        tr.objective, net, tr.vae, tr.latent_shape, device=device, dtype=dtype, told=told
    )
    how = tr.loss.drawing or how or {"method": "heun", "steps": 10}
    tr.net.eval()
    labels, low = [seed % len(tr.classes) for seed in seeds] if tr.classes else None, None
    if tr.objective.coupling == "lowres":
        low, labels = enlarged(tr, seeds)
    if told is not None:  # of the pictures that are enlarged, too
        labels = list(range(len(seeds)))
    try:
        return generator.images_on(tr.ranks, seeds, labels, low=low, **how)[:n]
    except NonFinite as error:
        if strict:
            raise
        if tr.ranks.rank == 0:
            tqdm.write(f"warning: {error}", file=sys.stderr)
        return error.images[:n]
    finally:
        tr.net.train()
        if is_sharded(tr.net):
            reshard(tr.net)


def enlarged(tr: Trainer, seeds: Sequence[int]) -> tuple[Tensor, list[int] | None]:
    """cfm: (low, labels) of the pictures that seeds enlarge, held-out ones if there are any."""
    ds = tr.ds.heldout if len(tr.ds.heldout) else tr.ds
    batch = ds.views([seed % len(ds) for seed in seeds], tr.ranks.device)
    x0, kind = latents_of(tr.vae, batch), tr.objective
    low = low_latents_of(tr.vae, batch, x0, kind.lowres, kind.upsample)
    if not tr.classes:
        return low, None
    _, labels = classes_of(ds, tr.classes)
    return low, [int(labels[seed % len(ds)]) for seed in seeds]


def preview(tr: Trainer) -> None:
    """A row of raw samples over a row of EMA samples, the same eight seeds at every call."""
    nets = [tr.net, ema_net(tr)[1]] if tr.ema.weights else [tr.net]
    rows = [draw_samples(tr, net, range(8)) for net in nets]
    if tr.ranks.rank == 0:
        save_grid(torch.cat(rows), tr.run / "samples" / f"{tr.seen:012d}.png", columns=8)
