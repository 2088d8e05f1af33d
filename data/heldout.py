"""The loss on held-out images: fixed pictures, times and noise, so that its values compare."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from data.dataset import Dataset, classes_of, rng
from harness.ranks import Ranks

# Images, at most, and times of each.
IMAGES = 64
TIMES = 8


@torch.no_grad()
def loss_of(
    loss: Callable[[dict[str, Tensor]], Any],
    held: Dataset,
    classes: list[str],
    latent_shape: tuple[int, int, int],
    seed: int,
    ranks: Ranks,
    texts: Callable[[int, Tensor | None], dict[str, Tensor]] | None = None,
    even: bool = False,
) -> dict[str, Any]:
    """{"n": images, "loss": mean, "loss_by_t": TIMES means}. Every rank takes its share.

    loss(batch) returns an objectives.Loss of a collated batch like those of training, but with
    t (B,) instead of q. texts(i, sizes): what is said of image i of `held`. even: every rank takes
    all of it, as a sharded network needs, which all have to call equally often.
    """
    labels = classes_of(held, classes)[1] if classes else None
    share = slice(None) if even else slice(ranks.rank, None, ranks.world)
    sums = torch.zeros(TIMES, dtype=torch.float64)
    for batch in batches(held, labels, latent_shape, seed, share, texts):
        per_sample = loss(batch).per_sample.double().cpu()
        sums.index_add_(0, (batch["t"] * TIMES).long(), per_sample)
    n = min(len(held), IMAGES)
    sums = ranks.all_reduce(sums.to(ranks.device)) / (ranks.world if even else 1)
    by_t = (sums / max(n, 1)).tolist()
    return {"n": n, "loss": sum(by_t) / TIMES, "loss_by_t": by_t}


def batches(
    held: Dataset,
    labels: np.ndarray | None,
    latent_shape: tuple[int, int, int],
    seed: int,
    share: slice,
    texts: Callable[[int, Tensor | None], dict[str, Tensor]] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Fixed (image, t, noise): the first IMAGES at TIMES times each, 64 pairs a batch; of them
    the `share` of a rank."""
    jobs = [(i, k) for i in range(min(len(held), IMAGES)) for k in range(TIMES)][share]
    for chunk in chunks(held, jobs):
        batch = held.views([i for i, _ in chunk])
        draws = (rng(seed, "held out", i * TIMES + k) for i, k in chunk)
        shape = held.latent_shape(chunk[0][0], latent_shape)
        noise = [draw.standard_normal(shape, dtype=np.float32) for draw in draws]
        batch["eps"] = torch.from_numpy(np.stack(noise))
        batch["t"] = torch.tensor([(k + 0.5) / TIMES for _, k in chunk])
        if labels is not None:
            batch["y"] = torch.from_numpy(labels[[i for i, _ in chunk]])
        if texts is not None:
            sizes = batch.get("sizes", [None] * len(chunk))
            batch |= default_collate([texts(i, told) for (i, _), told in zip(chunk, sizes)])
        yield batch


def chunks(held: Dataset, jobs: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """The jobs, whose first number is an image, 64 at a time and each time of one shape."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for job in jobs:
        groups.setdefault(held.bucket(job[0]), []).append(job)
    for group in groups.values():
        for low in range(0, len(group), 64):
            yield group[low : low + 64]
