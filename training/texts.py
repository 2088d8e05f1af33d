"""What a run tells its network in words: the flags --text and --caption-…, as byte ids.

texts = texts_of(cfg, ds, net.cfg)
texts.drawn(i, rng)      # (places,) ids of image i, by chance
"""

import hashlib
import json
from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ckpt.byteunet import ByteUNetConfig, byte_config, byte_ids
from data.captions import ENDING, Captions
from data.dataset import Dataset
from data.prompts import Conditions
from harness.cli import UserError, closest
from harness.ranks import Ranks
from model import PRESETS, UNetConfig

PLAIN = Captions(caption_share=1.0, caption_empty=0.0)


def preset_of(flags: Any) -> Any:
    """The config of --model, with an encoder of bytes if --text asks for one."""
    model, text = flags.model, getattr(flags, "text", "")
    cfg = PRESETS.get(model)
    if cfg is None:
        raise UserError(
            f"--model {model!r} is not a preset",
            do=f"{closest(model, PRESETS)}  Known: {', '.join(PRESETS)}.",
        )
    if not text and getattr(cfg, "context_dim", 0):
        raise UserError(
            f"--model {model} is told what to draw by text that its encoders have read, and these "
            "are not trained with here",
            do="Choose another --model, or a small U-Net with --text bytes.",
        )
    if not text:
        return cfg
    if flags.classes:
        raise UserError(
            "--text and --classes both say what to draw",
            wanted="one of them",
            do="Leave --classes out: tags are told as texts.",
        )
    if not isinstance(cfg, UNetConfig) or cfg.context_dim or cfg.vector_dim:
        raise UserError(
            f"--text {text} --model {model}", wanted="a U-Net without text", do="Try --model tiny."
        )
    return byte_config(cfg)


def captions_of(source: Any) -> list[str]:
    """The caption of each image of a source, "" where there is none; latent caches keep none."""
    read = getattr(source, "captions", None)
    return read() if read else [""] * len(source.names)


def hash_of(source: Any, captions: list[str]) -> str:
    """Of images with what is told of them; the source's own, if there are no captions."""
    if not any(captions):
        return source.hash
    return hashlib.sha256(json.dumps([source.hash, captions]).encode()).hexdigest()


def data_hash(cfg: Any, source: Any) -> str:
    """By what a run of this config knows its data again."""
    if not getattr(cfg, "text", ""):
        return source.hash
    return hash_of(source, captions_of(source))


class Texts:
    """The texts of a data set's images. flags: a Captions, such as a run's config."""

    def __init__(self, flags: Captions, ds: Dataset, places: int):
        self.flags, self.ds, self.places = flags, ds, places
        self.captions = captions_of(ds.source)
        self.hash = hash_of(ds.source, self.captions)

    def of(self, ds: Dataset) -> "Texts":
        """The same for other images of the same source."""
        other = copy(self)
        other.ds = ds
        return other

    def text(self, flags: Captions, i: int, rng: np.random.Generator) -> str:
        j = self.ds.index[i]
        return flags.say(self.captions[j], self.ds.source.tags[j], rng)

    def drawn(self, i: int, rng: np.random.Generator) -> Tensor:
        """(places,) ids of what is said of image i, by chance."""
        return byte_ids([self.text(self.flags, i, rng)], self.places)[0]

    def plain(self, i: int) -> Tensor:
        """The same without chance: what held-out losses and previews show."""
        return byte_ids([self.text(PLAIN, i, np.random.default_rng(0))], self.places)[0]

    def told(self, seeds: Sequence[int]) -> Conditions:
        """What previews of these seeds are told: of a held-out image each, if there are any."""
        shown = self.of(self.ds.heldout) if len(self.ds.heldout) else self
        ids = torch.stack([shown.plain(seed % len(shown.ds)) for seed in seeds])
        return Conditions({"context": ids}, {"context": byte_ids([""], self.places)})


def texts_of(cfg: Any, ds: Dataset, net: Any, ranks: Ranks) -> Texts | None:
    """The texts of a run; None where its network (config `net`) reads none."""
    if not isinstance(net, ByteUNetConfig) or not isinstance(cfg, Captions):
        return None
    texts = Texts(cfg, ds, net.text_places)
    said = [texts.text(PLAIN, i, np.random.default_rng(0)) for i in range(len(ds))]
    untold = said.count("")
    if untold == len(ds):
        raise UserError(
            f"--text {cfg.text}: none of the {untold:,} images has a caption or tags",
            do=f"Put NAME{ENDING} (a caption) or NAME.txt (tags) beside them.",
        )
    if ranks.rank == 0:
        captions = sum(bool(texts.captions[j]) for j in ds.index)
        long = sum(len(text.encode()) > net.text_places for text in said)
        print(
            f"texts: {captions:,} of {len(ds):,} images have a caption, "
            f"{len(ds) - captions - untold:,} only tags, {untold:,} neither; {long:,} are cut off "
            f"at {net.text_places} bytes",
            flush=True,
        )
    return texts
