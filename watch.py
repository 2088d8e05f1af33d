"""What a run shows of itself while it trains: the loss on held-out images and samples from fixed seeds.

Every rank takes its share of both, so none waits for another.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

import data.dataset as data
from harness.ranks import autocast
from harness.files import make_dir
from data.dataset import latents_of
from harness.pictures import save_grid, to_uint8
from samplers import draw, generators, guided, sample

HELD_OUT = 64                            # images of the held-out loss, at most


def ema_net(tr: Any) -> tuple[str, Any]:
    """(name, net) of what one would sample: the first EMA, or the raw weights when there is none."""
    if not tr.ema.weights:
        return "raw", tr.net
    width, weights = next(iter(tr.ema.weights.items()))
    return f"ema-{width}", lambda x, t, **cond: functional_call(tr.net, weights, (x, t), cond)


@torch.no_grad()
def held_out_loss(tr: Any) -> dict[str, Any]:
    """Loss of the first EMA on fixed (image, t, noise): 8 t a held-out image, every rank its share. Also by t."""
    if tr.objective.coupling == "ot":                                           # it would pair by who else is in the chunk
        tr = replace(tr, loss=replace(tr.loss, objective=replace(tr.objective, coupling="none")))
    held, name, net = tr.ds.heldout, *ema_net(tr)
    n, bins = min(len(held), HELD_OUT), 8
    sums = torch.zeros(bins, dtype=torch.float64)
    labels = torch.from_numpy(data.classes_of(held, tr.classes)[1]) if tr.classes else None
    tr.net.eval()
    jobs = [(i, b) for i in range(n) for b in range(bins)][tr.ranks.rank::tr.ranks.world]
    for lo in range(0, len(jobs), 64):
        chunk = jobs[lo:lo + 64]
        noise = [data.rng(tr.cfg.seed, "held out", i * bins + b).standard_normal(tr.latent_shape, dtype="float32") for i, b in chunk]
        views = [held.view(i) for i, _ in chunk]
        batch = {**{key: torch.stack([view[key] for view in views]) for key in views[0]}, "eps": torch.stack([torch.from_numpy(e) for e in noise]),
                 "t": torch.tensor([(b + 0.5) / bins for _, b in chunk])}
        if labels is not None:
            batch["y"] = labels[[i for i, _ in chunk]]
        loss = tr.loss(net, batch)
        sums.index_add_(0, torch.tensor([b for _, b in chunk]), loss.per_sample.double().cpu())
    tr.net.train()
    by_t = (tr.ranks.all_reduce(sums.to(tr.ranks.device)) / max(n, 1)).tolist()
    return {"event": "held-out", "images": tr.seen, "of": name, "n": n, "loss": sum(by_t) / bins, "loss_by_t": by_t}


def draw_samples(tr: Any, net: Any, seeds: list[int], **how: Any) -> Tensor:
    """uint8 images of fixed seeds; every rank draws its share. Labels cycle through the classes; `how` goes to sample()."""
    mine = seeds[tr.ranks.rank::tr.ranks.world]
    tr.net.eval()
    images = torch.zeros(len(seeds), 3, tr.cfg.resolution, tr.cfg.resolution, dtype=torch.int32, device=tr.ranks.device)
    if mine:
        x = draw(generators(mine), torch.empty(1, *tr.latent_shape, device=tr.ranks.device))
        y = torch.tensor([s % len(tr.classes) for s in mine], device=tr.ranks.device) if tr.classes else None
        cond, start = {} if y is None else {"y": y}, tr.objective.prior(x)
        if tr.objective.coupling == "lowres":                                   # enlarges held-out images, if there are any
            ds = tr.ds.heldout if len(tr.ds.heldout) else tr.ds
            views = [ds.view(s % len(ds)) for s in mine]
            batch = {key: torch.stack([view[key] for view in views]).to(x.device) for key in views[0]}
            cond["concat"] = tr.loss.low_resolution(batch, latents_of(tr.vae, batch))
            if y is not None:                                                   # they have classes of their own
                labels = data.classes_of(ds, tr.classes)[1]
                cond["y"] = torch.tensor([int(labels[s % len(ds)]) for s in mine], device=x.device)
            start = tr.objective.source(cond["concat"], x)
        with autocast(tr.ranks.device, tr.cfg.dtype):
            s = sample(guided(tr.objective, net), start, seeds=mine, t_start=tr.objective.t_max, cond=cond or None, **(tr.loss.drawing or how))
        images[tr.ranks.rank::tr.ranks.world] = to_uint8(tr.vae.decode(s.x)).int()
    tr.net.train()
    return tr.ranks.all_reduce(images).to(torch.uint8)                                 # the others' rows are zero


def preview(tr: Any) -> Path:
    """A row of raw samples over a row of EMA samples, the same eight seeds at every call."""
    seeds, rows = list(range(8)), [draw_samples(tr, tr.net, list(range(8)), method="heun", steps=10)]
    if tr.ema.weights:
        rows.append(draw_samples(tr, ema_net(tr)[1], seeds, method="heun", steps=10))
    path = tr.run / "samples" / f"{tr.seen:012d}.png"
    if tr.ranks.rank == 0:
        make_dir(path.parent)
        save_grid(torch.cat(rows), path, columns=8)
    return path
