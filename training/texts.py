"""What a run tells its network in words: the flags --text and --caption-….

texts = texts_of(cfg, ds, net.cfg, ranks)
texts.drawn(i, rng)      # of image i, by chance: {"context": byte ids (places,)}; or CLIP's tokens,
                         # {"ids": (encoders, 77)}, and of SDXL {"y": (1536,)}, the sizes
texts.heard(batch)       # of a batch of these, on the device that trains: "context" (B, 77, D), the
                         # encoders' states, for "ids"; of SDXL "y" (B, 2816), the pooled output
                         # before the sizes

A loader's processes cut texts; encoders are frozen, and run in the step. On a CPU each distinct
text is encoded alone, in fp32, and remembered: small runs have the same texts again and again. On
a GPU a batch is encoded as it comes, which is half a percent of a step of SDXL.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from ckpt.byteunet import ByteUNetConfig, byte_config, byte_ids
from data.captions import ENDING, ByteTexts, Captions
from data.dataset import Dataset
from data.prompts import Conditions, Teller, check_told
from harness.cli import UserError, closest
from harness.ranks import Ranks, autocast, precision
from model import PRESETS, UNetConfig
from text import BOS, CONTEXT, TEXT_PRESETS, TextEncoder, Told
from text import absolute, open_texts, pieces_of, size_vector, vector
from training.checkpoints import beginning, checkpoints

CLIP_L, SDXL = "clip-l:", "sdxl:"
# What their encoders tell: numbers a token, and an image (model.UNetConfig).
TOLD = {CLIP_L: (TEXT_PRESETS["clip-l"].width, 0), SDXL: (2048, 2816)}
ENCODERS = {CLIP_L: ("clip-l",), SDXL: ("clip-l", "clip-bigg")}
SPELLED = f"bytes, {CLIP_L}FILE or {SDXL}FILE"
KEPT = 2**30  # bytes of states that a process remembers: a text's are 236 KB of ViT-L, 636 of SDXL
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
    """What turns a text into what a network is told of it."""

    room: str  # for how much of a text
    init: dict[str, Any]  # what a checkpoint says of it, of Init's fields (ckpt/native.py)
    teller: Teller
    sized: bool  # are pictures' sizes told, too?

    def read(self, text: str) -> dict[str, Tensor]:
        """What a sample brings of its text; a loader's processes call."""

    def hear(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of samples with what the network is told in place of what they brought."""

    def is_long(self, text: str) -> bool: ...


class ByteReader:
    init: dict[str, Any] = {}
    sized = False

    def __init__(self, net: ByteUNetConfig):
        self.teller, self.places = ByteTexts(net), net.text_places
        self.room = f"{self.places} bytes"

    def read(self, text: str) -> dict[str, Tensor]:
        return {"context": byte_ids([text], self.places)[0]}

    def hear(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return batch

    def is_long(self, text: str) -> bool:
        return len(text.encode()) > self.places


class ClipReader:
    """CLIP's ViT-L, or SDXL's two encoders, frozen. spec: --text. "" is the null text, for
    guidance: of SDXL zeros. dtype: "fp32", or "bf16" of matrices; what is added up stays fp32."""

    room = f"{CONTEXT} tokens"

    def __init__(self, spec: str, device: torch.device, dtype: str):
        kind, _, names = spec.partition(":")
        self.teller, self.dtype = open_texts(names), dtype
        if kind + ":" == CLIP_L and self.teller.context_dim != TOLD[CLIP_L][0]:
            raise UserError(
                f"--text {spec} holds text encoders {self.teller.context_dim} wide",
                wanted="ViT-L's, 768 wide",
                do="Name clip_l.safetensors, or a Stable Diffusion 1.",
            )
        source = ",".join(map(absolute, names.split(",")))
        # Before they are rounded.
        own = {"encoders": self.teller.fingerprint, "source": source}
        self.init = {"text": own | {"chunks": 1, "skip": 0}}
        self.pads = [net.cfg.pad for net in self.teller.encoders]
        self.sized, self.zeros = self.teller.double, self.teller.zeros
        if dtype == "bf16":
            for layer in matrices(self.teller.encoders):
                layer.to(torch.bfloat16)
        self.teller.to(device)
        self.remembers = device.type == "cpu"
        self.states: dict[bytes, Told] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A loader's process that is not forked: it encodes nothing.
        return self.__dict__ | {"teller": None, "states": {}}

    def read(self, text: str) -> dict[str, Tensor]:
        """{"ids": (encoders, 77)}, all 0 where silence is zeros and not the encoded ""."""
        if not text and self.zeros:
            return {"ids": torch.zeros(len(self.pads), CONTEXT, dtype=torch.long)}
        return {"ids": torch.cat([pieces_of(text, pad)[0] for pad in self.pads])}

    @torch.no_grad()
    def hear(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        told = dict(batch)
        ids = told.pop("ids")
        context, pooled = self.remembered(ids) if self.remembers else self.encoded(ids)
        if pooled is not None:
            told["y"] = vector(Told(context, pooled), told["y"])
        return told | {"context": context}

    def encoded(self, ids: Tensor) -> Told:
        """What encoders say of ids (B, encoders, 77), in fp32."""
        with autocast(self.teller.device, self.dtype):
            parts = zip(self.teller.encoders, ids.unbind(1))
            found = [self.teller.encode(net, part, 0) for net, part in parts]
        states, pooled = torch.cat([state for state, _ in found], 2).float(), found[-1][1]
        silent = (ids[:, 0, :1] != BOS).to(states.device)  # (B, 1)
        context = states.masked_fill(silent[:, None], 0)
        return Told(context, None if pooled is None else pooled.float().masked_fill(silent, 0))

    def remembered(self, ids: Tensor) -> Told:
        """encoded() of each text alone, so that it never depends on the others; those that came
        last are remembered."""
        rows = []
        for one in ids:
            key = one.numpy().tobytes()
            if key not in self.states:
                told = self.encoded(one[None])
                each = sum(x.nbytes for x in told if x is not None)
                if (len(self.states) + 1) * each > KEPT and self.states:
                    del self.states[next(iter(self.states))]
                self.states[key] = told
            rows.append(self.states[key])
        contexts, pooled = zip(*rows)
        return Told(torch.cat(contexts), None if pooled[0] is None else torch.cat(pooled))

    def is_long(self, text: str) -> bool:
        return bool(pieces_of(text, 0)[1])


def matrices(encoders: Iterable[nn.Module]) -> list[nn.Linear]:
    """The layers of encoders that compute in low precision."""
    return [layer for net in encoders for layer in net.modules() if isinstance(layer, nn.Linear)]


def dtype_of(cfg: Any, device: torch.device) -> str:
    """In what the encoders of a run compute: on a GPU as the run does."""
    return "fp32" if device.type == "cpu" else precision(device, cfg.dtype)


def encoder_bytes(cfg: Any, device: torch.device) -> int:
    """Of the encoders of --text on the device of a run, by their usual sizes: no file is opened."""
    kind = getattr(cfg, "text", "").partition(":")[0] + ":"
    with torch.device("meta"):
        nets = [TextEncoder(TEXT_PRESETS[name]) for name in ENCODERS.get(kind, ())]
    if dtype_of(cfg, device) == "bf16":
        for layer in matrices(nets):
            layer.to(torch.bfloat16)
    return sum(p.nbytes for net in nets for p in net.parameters())


def reader_of(
    cfg: Any, net: Any, device: torch.device, teacher: dict[str, Any] | None = None
) -> Reader:
    """The reader of --text; the one that a run began with, if it has begun, and by which its
    teacher was trained, if that says so (ckpt.native.ToldBy)."""
    if isinstance(net, ByteUNetConfig):
        return ByteReader(net)
    reader, run = ClipReader(cfg.text, device, dtype_of(cfg, device)), Path(cfg.out) / cfg.name
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
        """What is said of image i, by chance, as a sample brings it: without a first dimension.
        sizes (6,): of data/buckets.size_numbers, for SDXL; None = the square pictures of
        --resolution."""
        return self.said(self.text(self.flags, i, rng), sizes)

    def plain(self, i: int, sizes: Tensor | None = None) -> dict[str, Tensor]:
        """The same without chance: what held-out losses and previews show."""
        return self.said(self.text(PLAIN, i, np.random.default_rng(0)), sizes)

    def said(self, text: str, sizes: Tensor | None) -> dict[str, Tensor]:
        """What a sample brings of its text."""
        brought = self.reader.read(text)
        if not self.reader.sized:
            return brought
        square = (self.ds.source.resolution,) * 2
        height, width, top, left, *target = (
            (*square, 0, 0, *square) if sizes is None else sizes.tolist()
        )
        return brought | {"y": size_vector((height, width), (top, left), tuple(target))}

    def heard(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of samples with what its network is told; the loss of a run calls."""
        return self.reader.hear(batch)

    def told(self, seeds: Sequence[int]) -> Conditions:
        """What previews of these seeds are told: of a held-out image each, if there are any."""
        shown = self.of(self.ds.heldout) if len(self.ds.heldout) else self
        plain = [shown.plain(seed % len(shown.ds)) for seed in seeds]
        parts = plain, [self.said("", None)]
        return Conditions(*(self.heard(default_collate(part)) for part in parts))


def texts_of(
    cfg: Any, ds: Dataset, net: Any, ranks: Ranks, teacher: dict[str, Any] | None = None
) -> Texts | None:
    """The texts of a run; None where its network (config `net`) reads none. teacher: by what its
    teacher was told, if it has one."""
    if not isinstance(cfg, Captions) or not getattr(cfg, "text", ""):
        return None
    texts = Texts(cfg, ds, reader_of(cfg, net, ranks.device, teacher))
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
