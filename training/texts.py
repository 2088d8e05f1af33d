"""What a run tells its network in words: the flags --text and --caption-….

texts = texts_of(cfg, ds, net.cfg, ranks)
texts.drawn(i, rng)      # of image i, by chance: {"context": byte ids (places,)}, or CLIP's states
                         # (77, D), of SDXL also {"y": (2816,)}: the pooled output and the sizes
"""

import hashlib
import json
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from ckpt.byteunet import ByteUNetConfig, byte_config, byte_ids
from data.captions import ENDING, ByteTexts, Captions
from data.dataset import Dataset
from data.prompts import Conditions, Teller, check_told
from harness.cli import UserError, closest
from harness.ranks import Ranks
from model import PRESETS, UNetConfig
from text import CONTEXT, TEXT_PRESETS, Told, absolute, open_texts, pieces_of, size_vector, vector
from training.checkpoints import beginning, checkpoints

CLIP_L, SDXL = "clip-l:", "sdxl:"
# What their encoders tell: numbers a token, and an image (model.UNetConfig).
TOLD = {CLIP_L: (TEXT_PRESETS["clip-l"].width, 0), SDXL: (2048, 2816)}
SPELLED = f"bytes, {CLIP_L}FILE or {SDXL}FILE"
KEPT = 4096  # texts of ViT-L whose states a process remembers, 236 KB each; of SDXL fewer
PLAIN = Captions(caption_share=1.0, caption_empty=0.0)


def preset_of(flags: Any) -> Any:
    """The config of --model, with an encoder of bytes or room for CLIP's states if --text asks."""
    model, text = flags.model, getattr(flags, "text", "")
    cfg = PRESETS.get(model)
    if cfg is None:
        raise UserError(
            f"--model {model!r} is not a preset",
            do=f"{closest(model, PRESETS)}  Known: {', '.join(PRESETS)}.",
        )
    reads = getattr(cfg, "context_dim", 0), getattr(cfg, "vector_dim", 0)
    if not text and reads[0]:
        known = [f"--text {key}FILE" for key, told in TOLD.items() if told == reads]
        raise UserError(
            f"--model {model} is told what to draw by text that its encoders have read"
            + ("" if known else ", and these are not trained with here"),
            do=f"Add {known[0]}." if known
            else "Choose another --model, or a small U-Net with --text bytes.",
        )
    if not text:
        return cfg
    if flags.classes:
        raise UserError(
            "--text and --classes both say what to draw",
            wanted="one of them",
            do="Leave --classes out: tags are told as texts.",
        )
    word, colon, names = text.partition(":")
    kind = word + colon
    if text != "bytes" and not (kind in TOLD and all(names.split(","))):
        raise UserError(f"--text {text!r}", wanted=SPELLED, do="Name the encoder's file.")
    if not isinstance(cfg, UNetConfig) or any(reads) and (kind == "bytes" or not reads[0]):
        raise UserError(
            f"--text {text} --model {model}", wanted="a U-Net without text", do="Try --model tiny."
        )
    if kind == "bytes":
        return byte_config(cfg)
    context, vector = reads if any(reads) else TOLD[kind]
    return replace(cfg, context_dim=context, vector_dim=vector)


def student_preset(flags: Any) -> Any:
    """The config of --model for a student; with --text, of one that reads what its teacher does."""
    return preset_of(flags) if flags.text else PRESETS[flags.model]


def captions_of(source: Any) -> list[str]:
    """The caption of each image of a source, "" where there is none."""
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


# ---- what reads them ----------------------------------------------------------------------------


class Reader(Protocol):
    """What turns a text into what a network is told of it, without a first dimension; alone, so
    that it never depends on the other texts of a batch."""

    room: str  # for how much of a text
    init: dict[str, Any]  # what a checkpoint says of it, of Init's fields (ckpt/native.py)
    teller: Teller

    def read(self, text: str) -> Told: ...

    def is_long(self, text: str) -> bool: ...


class ByteReader:
    init: dict[str, Any] = {}

    def __init__(self, net: ByteUNetConfig):
        self.teller, self.places = ByteTexts(net), net.text_places
        self.room = f"{self.places} bytes"

    def read(self, text: str) -> Told:
        return Told(byte_ids([text], self.places)[0], None)

    def is_long(self, text: str) -> bool:
        return len(text.encode()) > self.places


class ClipReader:
    """CLIP's ViT-L, or SDXL's two encoders, frozen, on the CPU: each distinct text is encoded once
    a process. spec: --text. "" is the null text, for guidance: of SDXL zeros."""

    room = f"{CONTEXT} tokens"

    def __init__(self, spec: str):
        kind, _, names = spec.partition(":")
        self.teller = open_texts(names)
        if kind + ":" == CLIP_L and self.teller.context_dim != TOLD[CLIP_L][0]:
            raise UserError(
                f"--text {spec} holds text encoders {self.teller.context_dim} wide",
                wanted="ViT-L's, 768 wide",
                do="Name clip_l.safetensors, or a Stable Diffusion 1.",
            )
        source = ",".join(map(absolute, names.split(",")))
        own = {"encoders": self.teller.fingerprint, "source": source}
        self.init = {"text": own | {"chunks": 1, "skip": 0}}
        # Not lru_cache, which a loader's workers cannot take with them where they do not fork.
        self.states: dict[str, Told] = {}

    @torch.no_grad()
    def read(self, text: str) -> Told:
        if text not in self.states:
            if len(self.states) >= max(KEPT * TOLD[CLIP_L][0] // self.teller.context_dim, 1):
                del self.states[next(iter(self.states))]
            told = self.teller.part([text], 1, 0) if text else self.teller.null(None)
            self.states[text] = Told(*[None if x is None else x[0] for x in told])
        return self.states[text]

    def is_long(self, text: str) -> bool:
        return bool(pieces_of(text, 0)[1])


def reader_of(cfg: Any, net: Any, teacher: dict[str, Any] | None = None) -> Reader:
    """The reader of --text; the one that a run began with, if it has begun, and by which its
    teacher was trained, if that says so (ckpt.native.ToldBy)."""
    if isinstance(net, ByteUNetConfig):
        return ByteReader(net)
    reader, run = ClipReader(cfg.text), Path(cfg.out) / cfg.name
    check_told(reader.teller, net, f"--text {cfg.text}", f"--model {cfg.model}")
    told = beginning(run)["init"].get("text") if checkpoints(run) else None
    if told and told["encoders"] != reader.init["text"]["encoders"]:
        raise UserError(
            f"--text {cfg.text}: {run} was begun with another encoder ({told['source']})",
            do="Restore it, or begin another run (--name).",
        )
    if not teacher:
        return reader
    own = reader.init["text"]
    if any(teacher.get(key, own[key]) != own[key] for key in ("encoders", "chunks", "skip")):
        raise UserError(
            f"--text {cfg.text}: the teacher was told by another encoder, or by longer texts or "
            f"other layers of it ({teacher.get('source', 'its file does not say where it is')})",
            do="Name its own encoder, or tell it by --context.",
        )
    return reader


def check_taught(text: str, net: Any, name: str) -> None:
    """Refuse a --text that a teacher of this config does not read."""
    if not text:
        return
    if text == "bytes":
        fits = isinstance(net, ByteUNetConfig)
    elif text.startswith(CLIP_L):
        fits = (net.context_dim, net.vector_dim) == TOLD[CLIP_L]
    else:
        raise UserError(
            f"--text {text!r}", wanted=f"bytes or {CLIP_L}FILE", do="Name the encoder's file."
        )
    if not fits:
        raise UserError(
            f"--text {text}: {name} is not told what to draw by that",
            do="Leave it out, or use --context for other encoders.",
        )


# ---- of a data set ------------------------------------------------------------------------------


class Texts:
    """The texts of a data set's images. flags: a Captions, such as a run's config."""

    def __init__(self, flags: Captions, ds: Dataset, reader: Reader):
        self.flags, self.ds, self.reader = flags, ds, reader
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

    def drawn(
        self, i: int, rng: np.random.Generator, sizes: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What is said of image i, by chance, as its network is told it: its conditions, without
        a first dimension. sizes (6,): of data/buckets.size_numbers, for SDXL; None = the square
        pictures of --resolution."""
        return self.said(self.text(self.flags, i, rng), sizes)

    def plain(self, i: int, sizes: Tensor | None = None) -> dict[str, Tensor]:
        """The same without chance: what held-out losses and previews show."""
        return self.said(self.text(PLAIN, i, np.random.default_rng(0)), sizes)

    def said(self, text: str, sizes: Tensor | None) -> dict[str, Tensor]:
        """What a network is told of one image."""
        told = self.reader.read(text)
        if told.pooled is None:
            return {"context": told.context}
        square = (self.ds.source.resolution,) * 2
        height, width, top, left, *target = (
            (*square, 0, 0, *square) if sizes is None else sizes.tolist()
        )
        waves = size_vector((height, width), (top, left), tuple(target))
        one = Told(told.context[None], told.pooled[None])
        return {"context": told.context, "y": vector(one, waves)[0]}

    def told(self, seeds: Sequence[int]) -> Conditions:
        """What previews of these seeds are told: of a held-out image each, if there are any."""
        shown = self.of(self.ds.heldout) if len(self.ds.heldout) else self
        said = default_collate([shown.plain(seed % len(shown.ds)) for seed in seeds])
        return Conditions(said, default_collate([self.said("", None)]))


def texts_of(
    cfg: Any, ds: Dataset, net: Any, ranks: Ranks, teacher: dict[str, Any] | None = None
) -> Texts | None:
    """The texts of a run; None where its network (config `net`) reads none. teacher: by what its
    teacher was told, if it has one."""
    if not isinstance(cfg, Captions) or not getattr(cfg, "text", ""):
        return None
    texts = Texts(cfg, ds, reader_of(cfg, net, teacher))
    said = [texts.text(PLAIN, i, np.random.default_rng(0)) for i in range(len(ds))]
    untold = said.count("")
    if untold == len(ds):
        raise UserError(
            f"--text {cfg.text}: none of the {untold:,} images has a caption or tags",
            do=f"Put NAME{ENDING} (a caption) or NAME.txt (tags) beside them.",
        )
    if ranks.rank == 0:
        captions = sum(bool(texts.captions[j]) for j in ds.index)
        long = sum(map(texts.reader.is_long, said))
        print(
            f"texts: {captions:,} of {len(ds):,} images have a caption, "
            f"{len(ds) - captions - untold:,} only tags, {untold:,} neither; {long:,} are cut off "
            f"at {texts.reader.room}",
            flush=True,
        )
    return texts
