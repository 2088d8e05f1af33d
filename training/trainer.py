"""Everything a training step needs, in one place."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.dataset import Dataset, Stream
from harness.ema import EMA
from harness.ranks import Ranks
from harness.run import Meter
from objectives import Objective
from vae import AnyVAE


@dataclass
class Trainer:
    """Everything a step needs."""

    cfg: Any
    ranks: Ranks
    run: Path
    ds: Dataset
    vae: AnyVAE
    objective: Objective
    # The bare module, which is saved; and what a step calls: it inside torch.compile and
    # DistributedDataParallel, or with weights that are cast together (training/casts.py).
    net: torch.nn.Module
    model: Callable[..., Any]
    optimizer: torch.optim.Optimizer
    ema: EMA
    classes: list[str]
    # (n,) classes of the images, or None.
    labels: Any
    # Where the weights started.
    init: dict[str, Any]
    # Rank 0's lock on the folder.
    held: Any
    # loss(net, batch) -> Loss; see ObjectiveLoss.
    loss: Any = None
    # What the network is told in words (training/texts.py).
    texts: Any = None
    seen: int = 0
    # Non-finite steps, in all and in a row; the last step, until it is known whether it was one,
    # and whether that is asked only in the next (training/nonfinite.py).
    skipped: int = 0
    bad: int = 0
    taken: Any = None
    late: bool = False
    # What runs the forward and backward pass of a step (training/graph.py).
    repeat: Any = None
    meter: Meter = field(init=False)
    # net's, by name: to walk its modules takes a while.
    params: dict[str, torch.nn.Parameter] = field(init=False)

    def __post_init__(self):
        self.meter = Meter(self.ranks)
        self.params = dict(self.net.named_parameters())

    def take_texts(self, texts: Any) -> None:
        """What the network is told in words, from now on; a checkpoint says by which encoder."""
        self.texts = texts
        self.init |= texts.reader.init if texts else {}

    @property
    def data_hash(self) -> str:
        """Of the images, and of what the network is told of them."""
        return self.texts.hash if self.texts else self.ds.source.hash

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.vae.latent_shape(self.cfg.resolution)

    @property
    def stream(self) -> Stream:
        """The samples of the run, by position."""
        cfg, texts = self.cfg, self.texts and self.texts.drawn
        return Stream(
            self.ds,
            self.labels,
            self.latent_shape,
            cfg.seed,
            cfg.flip,
            getattr(cfg, "label_drop", 0.0),  # a fork may have no classes
            texts,
            cfg.batch,
        )
