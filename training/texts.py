"""What a run tells its network in words: the flags --text and --caption-….

texts = texts_of(cfg, ds, net.cfg, ranks)
texts.drawn(i, rng)      # of image i, by chance: byte ids (places,), or CLIP's states (77, 768)
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

from ckpt.byteunet import ByteUNetConfig, byte_config, byte_ids
from data.captions import ENDING, ByteTexts, Captions
from data.dataset import Dataset
from data.prompts import Conditions, Teller
from harness.cli import UserError, closest
from harness.ranks import Ranks
from model import PRESETS, UNetConfig
from text import CONTEXT, TEXT_PRESETS, absolute, open_texts, pieces_of
from training.checkpoints import beginning, checkpoints

CLIP_L = "clip-l:"
KEPT = 4096  # texts whose states a process remembers: 236 KB each
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
    if text == "bytes":
        return byte_config(cfg)
    if not text.startswith(CLIP_L):
        raise UserError(
            f"--text {text!r}", wanted=f"bytes or {CLIP_L}FILE", do="Name the encoder's file."
        )
    return replace(cfg, context_dim=TEXT_PRESETS["clip-l"].width)


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
    """What turns a text into what a network is told of it; alone, so that it never depends on the
    other texts of a batch."""

    room: str  # for how much of a text
    init: dict[str, Any]  # what a checkpoint says of it, of Init's fields (ckpt/native.py)
    teller: Teller

    def read(self, text: str) -> Tensor: ...

    def is_long(self, text: str) -> bool: ...


class ByteReader:
    init: dict[str, Any] = {}

    def __init__(self, net: ByteUNetConfig):
        self.teller, self.places = ByteTexts(net), net.text_places
        self.room = f"{self.places} bytes"

    def read(self, text: str) -> Tensor:
        return byte_ids([text], self.places)[0]

    def is_long(self, text: str) -> bool:
        return len(text.encode()) > self.places


class ClipReader:
    """CLIP's ViT-L, frozen, on the CPU: each distinct text is encoded once a process."""

    room = f"{CONTEXT} tokens"

    def __init__(self, file: str):
        self.teller = open_texts(file)
        if self.teller.context_dim != TEXT_PRESETS["clip-l"].width:
            raise UserError(
                f"--text {CLIP_L}{file} holds text encoders {self.teller.context_dim} wide",
                wanted="ViT-L's, 768 wide",
                do="Name clip_l.safetensors, or a Stable Diffusion 1.",
            )
        own = {"encoders": self.teller.fingerprint, "source": absolute(file)}
        self.init = {"text": own | {"chunks": 1, "skip": 0}}
        # Not lru_cache, which a loader's workers cannot take with them where they do not fork.
        self.states: dict[str, Tensor] = {}

    @torch.no_grad()
    def read(self, text: str) -> Tensor:
        if text not in self.states:
            if len(self.states) == KEPT:
                del self.states[next(iter(self.states))]
            self.states[text] = self.teller.part([text], 1, 0).context[0]
        return self.states[text]

    def is_long(self, text: str) -> bool:
        return bool(pieces_of(text, 0)[1])


def reader_of(cfg: Any, net: Any, teacher: dict[str, Any] | None = None) -> Reader:
    """The reader of --text; the one that a run began with, if it has begun, and by which its
    teacher was trained, if that says so (ckpt.native.ToldBy)."""
    if isinstance(net, ByteUNetConfig):
        return ByteReader(net)
    reader, run = ClipReader(cfg.text.removeprefix(CLIP_L)), Path(cfg.out) / cfg.name
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
        fits = net.context_dim == TEXT_PRESETS["clip-l"].width and not net.vector_dim
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

    def drawn(self, i: int, rng: np.random.Generator) -> Tensor:
        """What is said of image i, by chance, as its network is told it."""
        return self.reader.read(self.text(self.flags, i, rng))

    def plain(self, i: int) -> Tensor:
        """The same without chance: what held-out losses and previews show."""
        return self.reader.read(self.text(PLAIN, i, np.random.default_rng(0)))

    def told(self, seeds: Sequence[int]) -> Conditions:
        """What previews of these seeds are told: of a held-out image each, if there are any."""
        shown = self.of(self.ds.heldout) if len(self.ds.heldout) else self
        said = torch.stack([shown.plain(seed % len(shown.ds)) for seed in seeds])
        return Conditions({"context": said}, {"context": self.reader.read("")[None]})


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
