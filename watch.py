"""What a run shows of itself while it trains: the loss on held-out images, samples from fixed seeds, and if asked its FID.

Every rank takes its share of both, so none waits for another.
"""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

import data.dataset as data
from harness.ranks import autocast
from harness.files import make_dir
from data.cache import latents_of
from harness.pictures import save_grid, to_uint8
from samplers import draw, generators, guided, sample

HELD_OUT = 64                            # images of the held-out loss, at most
FID_IMAGES = 2_048                       # samples of an FID in training: enough to see it fall, too few for a table


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
        tr = replace(tr, objective=replace(tr.objective, coupling="none"))
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
        loss = tr.forward(net, batch)
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
            cond["concat"] = tr.low_resolution(batch, latents_of(tr.vae, batch))
            if y is not None:                                                   # they have classes of their own
                labels = data.classes_of(ds, tr.classes)[1]
                cond["y"] = torch.tensor([int(labels[s % len(ds)]) for s in mine], device=x.device)
            start = tr.objective.source(cond["concat"], x)
        with autocast(tr.ranks.device, tr.cfg.dtype):
            s = sample(guided(tr.objective, net), start, seeds=mine, t_start=tr.objective.t_max, cond=cond or None, **tr.drawn(how))
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


class FID:
    """FID of the first EMA to the run's own training images, on fixed seeds. The reference is looked at once, before training."""

    def __init__(self, tr: Any):
        import eval_fid                                                         # here, for most runs do without
        from metrics.features import extract, fit_extractor, look, open_images
        from metrics.inception import cache_folder, load_inception
        self.eval, self.look, self.announced, alike = eval_fid, look, False, tr.cfg.fid_features
        images = open_images(eval_fid.default_ref(asdict(tr.cfg), tr.cfg.name), tr.cfg.resolution)
        self.extractor = load_inception(device=tr.ranks.device) if alike == "inception" else fit_extractor(images)
        stored = extract(images.split(tr.cfg.holdout)[0], self.extractor, cache_folder() / "features", tr.ranks)
        self.ref = eval_fid.side(stored, tr.ranks)
        self.names = [name + eval_fid.short(FID_IMAGES) for name in eval_fid.NAMES[alike]]
        self.floor = eval_fid.floor(self.ref, FID_IMAGES, FID_IMAGES)

    def __call__(self, tr: Any) -> dict[str, Any]:
        """A line of the log; every rank draws and looks at its share."""
        name, net = ema_net(tr)
        start, group, parts = time.perf_counter(), 64 * tr.ranks.world, []
        for lo in range(0, FID_IMAGES, group):
            images = draw_samples(tr, net, list(range(lo, min(lo + group, FID_IMAGES))), method="heun", steps=10)
            mine = images[tr.ranks.rank::tr.ranks.world]
            mine = self.look(self.extractor, lambda part: mine[part.start:part.stop], range(len(mine)), tr.ranks.device).to(tr.ranks.device)
            parts.append(mine.new_zeros(len(images), mine.shape[1]))
            parts[-1][tr.ranks.rank::tr.ranks.world] = mine
            if not self.announced and tr.ranks.rank == 0:
                seconds = (time.perf_counter() - start) * FID_IMAGES / len(images)
                print(f"{self.names[0]}: {FID_IMAGES:,} samples of 10 Heun steps each time, about {self.eval.span(seconds)}", flush=True)
            self.announced = True
        y = tr.ranks.all_reduce(torch.cat(parts)).double().cpu()

        def distances() -> list[float]:
            from metrics.distances import Statistics, frechet, kernel_distance
            kid = kernel_distance(self.eval.some(self.ref.stored, FID_IMAGES), y)
            return [frechet(self.ref.best(), y if len(y) < y.shape[1] else Statistics.of(y)), *kid]
        fid, kid, error = tr.ranks.broadcast(distances)
        return {"event": "fid", "images": tr.seen, "of": name, self.names[0]: fid, self.names[1]: kid, f"{self.names[1]} error": error,
                **({"floor": self.floor["frechet"], "floor n": self.floor["n"]} if self.floor else {}), "seconds": time.perf_counter() - start}
