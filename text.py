"""Prompts to what a U-Net is told: CLIP's tokenizer and text encoders (Radford et al. 2021), as
Stable Diffusion 1.x, 2.x and XL use them.

    ids = tokenize("a photo of a cat")              # [320, 1125, 539, 320, 2368]
    net = TextEncoder(TEXT_PRESETS["clip-l"])       # .last .penultimate .pooled of net(ids (B, 77))
    texts = open_texts("v1-5-pruned.safetensors")   # all the encoders of a checkpoint, loaded
    told = texts.tell(["a cat", "a dog"])           # .context (2, 77, 768)

    python text.py encode --text FILE --prompts prompts.txt --out texts.safetensors

encode writes what distill.py reads with --context, and encodes each distinct text once, ever: the
same command again takes what is there from the file. A causal mask runs on torch's SDPA: the
kernels of kernels/attention.py know none.
"""

if __name__ == "__main__":
    import harness.interrupt  # noqa: F401

import gzip
import hashlib
import json
import math
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ckpt import texts as files
from ckpt.containers import open_weights
from harness.cli import UserError, cli, clipped, flag, parse
from harness.files import (
    Container,
    check_fits,
    fingerprint,
    is_ours,
    load_strict,
    read_meta,
    stream_tensors,
    write_tensors,
)
from harness.ranks import pick_device
from harness.reading import read_file
from kernels.attention import attention
from model import timestep_embedding

# ---- the tokenizer ------------------------------------------------------------------------------

MERGES = Path(__file__).parent / "ckpt" / "clip_merges.txt.gz"  # MIT: clip_merges.LICENSE
BOS, EOS = 49406, 49407
CONTEXT = 77  # tokens of a piece, with BOS and EOS
ROOM = CONTEXT - 2
# Bytes as letters, in the order of their ids: those that print as Latin-1 stand for themselves.
PRINT = [*range(33, 127), *range(161, 173), *range(174, 256)]
REST = [byte for byte in range(256) if byte not in PRINT]
LETTER = {byte: chr(byte) for byte in PRINT} | {b: chr(256 + i) for i, b in enumerate(REST)}
SUFFIXES = ("s", "t", "re", "ve", "m", "ll", "d")  # it's, don't, we're …: words of their own


@lru_cache
def vocabulary() -> tuple[dict[tuple[str, str], int], dict[str, int]]:
    """({pair of pieces: rank of their merge}, {piece: id}); </w> ends a word's last piece."""
    lines = gzip.decompress(MERGES.read_bytes()).decode().splitlines()[1:]
    merges = [tuple(line.split()) for line in lines]
    pieces = [*LETTER.values()]
    pieces += [f"{piece}</w>" for piece in pieces]
    pieces += ["".join(pair) for pair in merges]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    return ranks, {piece: number for number, piece in enumerate(pieces)}


class Kinds(dict):
    """{character: " ", "L", "N" or "other"}: what words are cut by, found once a character."""

    def __missing__(self, c: str) -> str:
        category = unicodedata.category(c)
        if category[0] == "Z" or c in "\t\n\v\f\r\x85":
            kind = " "
        elif category[0] in "LN":
            kind = category[0]
        else:
            kind = "other"
        self[c] = kind
        return kind


KIND = Kinds().__getitem__


def tokenize(text: str) -> list[int]:
    """The ids of a text, without BOS and EOS, by the rule of transformers' CLIP tokenizer, which
    users' tools follow; what stands in it is text, also "<|endoftext|>".

    OpenAI's and OpenCLIP's own scripts differ for HTML entities and full-width letters.
    """
    # Letter by letter: str.lower() makes a last Σ a ς.
    text = unicodedata.normalize("NFC", text).replace("Σ", "σ").lower()
    return [number for word in words(text) for number in word_ids(word)]


def words(text: str) -> Iterable[str]:
    """Runs of letters, single numbers, runs of other signs, and 's 't 're 've 'm 'll 'd."""
    apostrophe = False
    for kind, run in groupby(text, KIND):
        run = "".join(run)
        if apostrophe:
            suffix = next((s for s in SUFFIXES if kind == "L" and run.startswith(s)), "")
            yield f"'{suffix}"
            run = run[len(suffix) :]
        apostrophe = run == "'"
        if kind == "N":
            yield from run
        elif run and kind != " " and not apostrophe:
            yield run
    if apostrophe:
        yield "'"


@lru_cache(maxsize=1 << 16)
def word_ids(word: str) -> tuple[int, ...]:
    """Byte-pair encoding: of all neighbours, those whose merge was learnt first are joined, until
    no two have one (Sennrich et al. 2016)."""
    ranks, ids = vocabulary()
    pieces = [LETTER[byte] for byte in word.encode()]
    pieces[-1] += "</w>"
    while len(pieces) > 1:
        pair = min(zip(pieces, pieces[1:]), key=lambda pair: ranks.get(pair, math.inf))
        if pair not in ranks:
            break
        joined: list[str] = []
        for piece in pieces:
            # A piece that was just made joins nothing in this round: it is longer than pair[0].
            if piece == pair[1] and joined and joined[-1] == pair[0]:
                joined[-1] += piece
            else:
                joined.append(piece)
        pieces = joined
    return tuple(ids[piece] for piece in pieces)


def pieces_of(text: str, pad: int, chunks: int = 1) -> tuple[Tensor, str]:
    """(ids (chunks, 77), the end of the text for which there was no room).

    Every piece is BOS, 75 tokens, EOS; the last is filled up with EOS, or behind its first EOS with
    `pad` (A1111's and ComfyUI's rule for long prompts).
    """
    ids = tokenize(text)
    kept, rest = ids[: ROOM * chunks], ids[ROOM * chunks :]
    rows = []
    for start in range(0, ROOM * chunks, ROOM):
        row = [BOS, *kept[start : start + ROOM], EOS]
        rows.append(row + [pad] * (CONTEXT - len(row)))
    return torch.tensor(rows), spelled(rest)


def spelled(ids: Sequence[int]) -> str:
    """The text of ids: what is lower case, and its spaces, are the tokenizer's."""
    by_id = {number: piece for piece, number in vocabulary()[1].items()}
    text = "".join(by_id[number] for number in ids).replace("</w>", " ")
    byte = {letter: number for number, letter in LETTER.items()}
    parts = [bytes(byte[c] for c in word).decode(errors="replace") for word in text.split(" ")]
    return " ".join(parts).strip()


# ---- the encoder --------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextConfig:
    """The shape of a CLIP text encoder, and what it was trained with."""

    width: int
    layers: int
    heads: int
    act: Literal["quick_gelu", "gelu"]  # leaves no trace in a file
    projection: int = 0  # numbers of the pooled output, through a matrix; 0 = none, width numbers
    pad: int = EOS  # the id behind a text's EOS, which a U-Net sees, too
    hidden: int = 0  # of the MLP; 0 = 4 · width
    vocab: int = 49408
    context: int = CONTEXT


TEXT_PRESETS = {
    "clip-l": TextConfig(768, 12, 12, "quick_gelu"),  # Stable Diffusion 1.x, SDXL's first
    "clip-h": TextConfig(1024, 24, 16, "gelu", pad=0),  # Stable Diffusion 2.x
    "clip-bigg": TextConfig(1280, 32, 20, "gelu", 1280, pad=0),  # SDXL's second, its refiner's
    "clip-b32": TextConfig(512, 12, 8, "quick_gelu", 512),  # of metrics
}


class Encoded(NamedTuple):
    last: Tensor  # (B, 77, D), after the final norm
    penultimate: Tensor  # (B, 77, D), what went into the last layer: without the final norm
    pooled: Tensor  # (B, D) or (B, projection), of the EOS


class Layer(nn.Module):
    """Self-attention, causal for texts, and an MLP: x (B, N, D), each normed before, residual."""

    def __init__(self, cfg: TextConfig, causal: bool = True):
        super().__init__()
        D, hidden = cfg.width, cfg.hidden or 4 * cfg.width
        self.causal, self.heads, self.quick = causal, cfg.heads, cfg.act == "quick_gelu"
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(D, D) for name in names})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(D, hidden), "fc2": nn.Linear(hidden, D)})

    def forward(self, x: Tensor) -> Tensor:
        h, proj = self.layer_norm1(x), self.self_attn
        rows = [proj[name](h) for name in ("q_proj", "k_proj", "v_proj")]
        q, k, v = [row.unflatten(2, (self.heads, -1)).transpose(1, 2) for row in rows]
        h = attention(q, k, v, causal=self.causal)  # (B, heads, N, D / heads)
        x = x + proj["out_proj"](h.transpose(1, 2).flatten(2))
        h = self.mlp["fc1"](self.layer_norm2(x))
        h = h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h)
        return x + self.mlp["fc2"](h)


class TextEncoder(nn.Module):
    """A CLIP text encoder. Names are transformers' CLIPTextModel's, without "text_model."."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.cfg = cfg
        D = cfg.width
        tables = {"token_embedding": cfg.vocab, "position_embedding": cfg.context}
        self.embeddings = nn.ModuleDict({name: nn.Embedding(n, D) for name, n in tables.items()})
        layers = nn.ModuleList([Layer(cfg) for _ in range(cfg.layers)])
        self.encoder = nn.ModuleDict({"layers": layers})
        self.final_layer_norm = nn.LayerNorm(D)
        if cfg.projection:
            self.text_projection = nn.Linear(D, cfg.projection, bias=False)
        self.aside: dict[str, Tensor] = {}  # what its file holds beside it, to be written back

    def states(self, ids: Tensor) -> list[Tensor]:
        """What went into each layer, and what came out of the last: layers + 1 of (B, N, D)."""
        positions = self.embeddings["position_embedding"].weight[: ids.shape[1]]
        found = [self.embeddings["token_embedding"](ids) + positions]
        for layer in self.encoder["layers"]:
            found.append(layer(found[-1]))
        return found

    def pool(self, last: Tensor, ids: Tensor, projected: bool = True) -> Tensor:
        """Of each text's first EOS, projected: (B, projection); or as it is: (B, D)."""
        ends = (ids == EOS).int().argmax(1)
        pooled = last[torch.arange(len(ids), device=ids.device), ends]
        return self.text_projection(pooled) if self.cfg.projection and projected else pooled

    def forward(self, ids: Tensor) -> Encoded:
        """ids (B, 77), with BOS and EOS -> Encoded. No mask hides the padding: Stable Diffusion's
        U-Nets were trained to see it."""
        states = self.states(ids)
        last = self.final_layer_norm(states[-1])
        return Encoded(last, states[-2], self.pool(last, ids))


# ---- loading and saving -------------------------------------------------------------------------


def load_encoder(
    box: Container, part: files.TextPart, dtype: torch.dtype | None = torch.float32
) -> TextEncoder:
    """One encoder of a file, on the CPU; dtype=None keeps the file's. Every tensor is used."""
    view, what = files.native_text(box, part), f"{box.path}, text encoder at {part.prefix!r}"
    cfg = text_config(view, what)
    with torch.device("meta"):
        net = TextEncoder(cfg)
    # Shapes first: a file of another architecture is not read.
    check_fits(net, view.header(), what)
    load_strict(net, dict(view), what, assign=True)
    net.aside = {name: box[full] for name, full in part.aside.items()}
    if cfg.projection and files.is_turned(net.text_projection.weight):
        print(
            f"warning: {what}: text_projection is the wrong way round, as some programs write it; "
            "it is turned.",
            file=sys.stderr,
        )
        net.text_projection.weight.data = net.text_projection.weight.data.t().contiguous()
    return net.to(dtype).eval().requires_grad_(False)


def text_config(view: Container, what: str) -> TextConfig:
    """The config of native tensors: by their shapes, by a config.json of transformers beside them,
    and for CLIP's own widths by what is known of these."""
    shown, said = files.infer_text(view), files.says_text(view.path)
    like = preset_of(shown["width"])
    if not said and like is None:
        widths = ", ".join(str(cfg.width) for cfg in TEXT_PRESETS.values())
        raise UserError(
            f"{what} is {shown['width']} wide: no tensor shows its heads and its activation",
            wanted=f"one of CLIP's, {widths} wide",
            do="Put transformers' config.json beside it.",
        )
    said = said or {"heads": like.heads, "act": like.act}
    if shown["width"] % said["heads"]:
        heads = f"{said['heads']} heads do not divide {shown['width']} channels"
        raise UserError(f"{what}: {heads}", do="Restore its config.json.")
    word = files.pad_word(view.path)
    pad = like.pad if like else EOS
    if word:
        # "!" is id 0 where it fills up: the piece, not the word.
        pad = ({"<|endoftext|>": EOS} | vocabulary()[1]).get(word, -1)
    if pad < 0 or shown["vocab"] <= EOS or shown["context"] != CONTEXT:
        raise UserError(
            f"{what}: {shown['vocab']:,} tokens, {shown['context']} positions, filled up with "
            f"{word!r}",
            wanted=f"CLIP's {EOS + 1:,}, {CONTEXT} and one of its tokens",
            do="Use it in transformers.",
        )
    return TextConfig(**shown, **said, pad=pad)


def preset_of(width: int) -> TextConfig | None:
    return next((cfg for cfg in TEXT_PRESETS.values() if cfg.width == width), None)


def save_encoder(path: Path, net: TextEncoder, layout: str = "hf", prefix: str = "") -> None:
    """Write an encoder as other programs know it: "hf" or "open_clip", under a prefix if it is
    wanted. What was loaded is written back bit for bit, its logit_scale, too."""
    tensors = files.foreign_text(net.state_dict(), layout) | net.aside
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    header = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    stream_tensors(path, header, {"format": "pt"}, tensors.__getitem__)


def open_texts(
    spec: str | Path, dtype: torch.dtype | None = torch.float32, sd3: bool = False
) -> "Texts":
    """All the text encoders of a checkpoint: of a file (Stable Diffusion's, or an encoder's own), a
    folder or a repository of diffusers. FILE,FILE: two of SDXL's that lie apart, in any order.
    sd3: as Stable Diffusion 3 reads them."""
    names = [str(spec)] if isinstance(spec, Path) else spec.split(",")
    found, zeros = [], True
    for name in names:
        paths, index = files.text_files(name)
        zeros = zeros and index.get("force_zeros_for_empty_prompt", True) is not False
        for box in map(open_weights, paths):
            found += [load_encoder(box, part, dtype) for part in files.encoders(box)]
    # SD3's file names clip_g before clip_l, and files that lie apart come in any order.
    found.sort(key=lambda net: net.cfg.width)
    if not 1 <= len(found) <= 2:
        raise UserError(
            f"{spec} holds {len(found) or 'no'} text encoders",
            wanted="one, or SDXL's two",
            do="Name files that have them: a whole checkpoint, or clip_l.safetensors …",
        )
    return Texts(found, zeros, sd3)


# ---- what a U-Net is told -----------------------------------------------------------------------


# Stable Diffusion 3's third encoder, T5, is not part of this code: zeros stand in its place, as its
# authors have it where T5 is left out. So wide is its state, and so long a text is for it.
T5_WIDTH, T5_TOKENS = 4096, 77


class Told(NamedTuple):
    context: Tensor  # (n, 77 · chunks, D); of Stable Diffusion 3 (n, 77 · chunks + 77, 4096)
    pooled: Tensor | None  # (n, P) of SDXL and Stable Diffusion 3


class Texts:
    """The text encoders of a checkpoint and their rules: from texts to what its U-Net is told.

    One encoder is Stable Diffusion 1's or 2's: the state `skip` layers from the end, through the
    final norm. Two are SDXL's: their penultimate states side by side, without the norm, and the
    second one's pooled output. zeros: SDXL's null text is zeros, not the encoded "". sd3: the same
    two as Stable Diffusion 3 reads them (Esser et al. 2024), with the pooled outputs of both, the
    first one's without its projection, and zeros for T5; its null text is the encoded "".
    """

    def __init__(self, encoders: Sequence[TextEncoder], zeros: bool = True, sd3: bool = False):
        self.encoders, self.double = list(encoders), len(encoders) == 2
        self.sd3 = sd3 and self.double
        self.zeros = zeros and self.double and not self.sd3
        first = self.encoders[0].cfg
        # Stable Diffusion 2 was trained on the last but one of 24 layers; some files lack the last.
        self.skip = 2 if self.double or first.width == TEXT_PRESETS["clip-h"].width else 1
        self.context_dim = sum(net.cfg.width for net in self.encoders)
        self.vector_dim = self.encoders[1].cfg.projection + 6 * WAVES if self.double else 0
        if self.sd3:
            self.context_dim = T5_WIDTH
            self.vector_dim = first.width + self.encoders[1].cfg.projection

    @property
    def device(self) -> torch.device:
        return self.encoders[0].final_layer_norm.weight.device

    def to(self, device: torch.device) -> "Texts":
        for net in self.encoders:
            net.to(device)
        return self

    @property
    def fingerprint(self) -> str:
        """Equal fingerprints, equal states; of the weights in fp32, whatever the file has."""
        prints = []
        for net in self.encoders:
            weights = {name: value.float() for name, value in net.state_dict().items()}
            prints += [repr(net.cfg), fingerprint(weights)]
        return hashlib.sha256(" ".join(prints).encode()).hexdigest()

    @torch.no_grad()
    def tell(
        self, texts: Sequence[str], *, chunks: int = 1, skip: int = 0, batch: int = 32
    ) -> Told:
        """What a U-Net is told of n texts. chunks: pieces of 75 tokens that each has room for; what
        is behind them is said and cut off. skip: 1 = the last layer, 2 = the last but one; 0 = as
        trained ("clip skip"). Each distinct text is encoded once."""
        distinct = list(dict.fromkeys(texts))
        self.warn(distinct, chunks)
        parts = [
            self.part(distinct[lo : lo + batch], chunks, skip)
            for lo in range(0, len(distinct), batch)
        ]
        rows = {text: row for row, text in enumerate(distinct)}
        index = torch.tensor([rows[text] for text in texts])
        context = torch.cat([part.context for part in parts])[index]
        if not self.double:
            return Told(context, None)
        return Told(context, torch.cat([part.pooled for part in parts])[index])

    def part(self, texts: Sequence[str], chunks: int, skip: int) -> Told:
        """tell() of one batch of distinct texts."""
        contexts, pooled = [], []
        for net in self.encoders:
            state, one = self.states(net, texts, chunks, skip)
            contexts.append(state.reshape(len(texts), chunks * CONTEXT, -1))
            pooled.append(one)
        context = torch.cat(contexts, dim=2)
        if not self.double:
            return Told(context, None)
        # Of a text's first piece.
        pooled = [one[::chunks] for one in pooled]
        if not self.sd3:
            return Told(context, pooled[1])
        room = (0, T5_WIDTH - context.shape[2], 0, T5_TOKENS)
        return Told(F.pad(context, room), torch.cat(pooled, dim=1))

    def states(
        self, net: TextEncoder, texts: Sequence[str], chunks: int, skip: int
    ) -> tuple[Tensor, Tensor | None]:
        """encode() of texts by one encoder: (n · chunks, 77, D), (n · chunks, P)."""
        ids = [self.cut(text, net.cfg.pad, chunks)[0] for text in texts]
        return self.encode(net, torch.cat(ids), skip)

    def cut(self, text: str, pad: int, chunks: int) -> tuple[Tensor, str]:
        """A text as pieces_of() cuts it."""
        return pieces_of(text, pad, chunks)

    def encode(self, net: TextEncoder, ids: Tensor, skip: int) -> tuple[Tensor, Tensor | None]:
        """What is seen of an encoder's ids (n, 77): (n, 77, D); of two also pooled (n, P)."""
        ids = ids.to(self.device)
        states = net.states(ids)
        state = states[self.state(net, skip or self.skip)]
        if not self.double:
            return net.final_layer_norm(state), None
        plain = self.sd3 and net is self.encoders[0]
        return state, net.pool(net.final_layer_norm(states[-1]), ids, projected=not plain)

    def state(self, net: TextEncoder, skip: int) -> int:
        """Which of net.states() is `skip` layers from the end of the whole encoder."""
        like = preset_of(net.cfg.width)
        whole = max(like.layers if like else 0, net.cfg.layers)
        # Stable Diffusion 2 in diffusers' layout: without the layer that nobody reads.
        whole = whole if whole - net.cfg.layers == 1 else net.cfg.layers
        wanted = whole + 1 - skip
        if not 1 <= wanted <= net.cfg.layers:
            raise UserError(
                f"--clip-skip {skip}: a text encoder of {net.cfg.layers} layers has no such state",
                wanted=f"{whole + 1 - net.cfg.layers} to {whole}",
                do="Leave it out: each family has its own.",
            )
        return wanted

    def null(self, negative: str | None, *, chunks: int = 1, skip: int = 0) -> Told:
        """What guidance leads away from (1, …): the negative prompt, or where there is none
        (None) the null text. That is zeros for SDXL, as in its own code and diffusers, and the
        encoded "" for the others."""
        told = self.tell([negative or ""], chunks=chunks, skip=skip)
        if negative is None and self.zeros:
            return Told(torch.zeros_like(told.context), torch.zeros_like(told.pooled))
        return told

    def warn(self, texts: Sequence[str], chunks: int) -> None:
        """Say for which texts there is no room."""
        rests = [rest for text in texts if (rest := self.cut(text, EOS, chunks)[1])]
        if rests:
            print(
                f"warning: {len(rests)} of {len(texts)} texts are longer than {chunks} × {ROOM} "
                f"tokens (--chunks).  Cut off, of the first: {clipped(rests[0])!r}",
                file=sys.stderr,
            )


WAVES = 256  # numbers that one size becomes


def size_vector(
    original: tuple[int, int], crop: tuple[int, int] = (0, 0), target: tuple[int, int] | None = None
) -> Tensor:
    """SDXL's sizes (Podell et al. 2023) as 6 · 256 sinusoids: original (height, width) in pixels,
    cropped (top, left), target (height, width), the original's if it is not given."""
    sizes = torch.tensor([*original, *crop, *(target or original)], dtype=torch.float32)
    return timestep_embedding(sizes, WAVES).flatten()


def vector(told: Told, sizes: Tensor) -> Tensor:
    """SDXL's y (n, P + 1536): the pooled output, then size_vector()."""
    return torch.cat([told.pooled, sizes.to(told.pooled).expand(len(told.pooled), -1)], dim=1)


# ---- the command --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encode:
    """The flags of text.py encode."""

    text: str = flag(
        help="the encoders: a Stable Diffusion file, a diffusers folder, hf:org/name, FILE,FILE"
    )
    out: str = flag(help="what distill.py --context reads", writes=".safetensors")
    prompts: str = flag("", "a text file, a line a prompt …")
    data: str = flag("", "… or a folder of pictures, with a caption in NAME.txt beside each")
    chunks: int = flag(1, "pieces of 75 tokens that there is room for", low=1, high=64)
    clip_skip: int = flag(0, "1 = the last state, 2 = the one before; 0 = own", low=0, high=64)
    size: str = flag("1024x1024", "WIDTHxHEIGHT of the pictures, which SDXL is told")
    dtype: Literal["fp32", "fp16"] = flag("fp16", "of the file")
    batch: int = flag(32, "texts at a time", low=1, high=1e4)
    device: str = flag("auto", "auto | cpu | cuda | cuda:1")


def read_prompts(cfg: Encode) -> list[str]:
    """The texts to encode, as they stand there."""
    if bool(cfg.prompts) == bool(cfg.data):
        raise UserError("--prompts and --data", wanted="one of them", do="Add --prompts FILE.")
    if cfg.prompts:
        texts = utf8(Path(cfg.prompts)).splitlines()
    else:
        captions = sorted(Path(cfg.data).rglob("*.txt"))
        texts = [" ".join(utf8(path).split("\n")).strip() for path in captions]
    if not any(text.strip() for text in texts):
        raise UserError(
            f"{cfg.prompts or cfg.data} has no prompts",
            do="Write one a line." if cfg.prompts else "Put NAME.txt beside NAME.png.",
        )
    return texts


def utf8(path: Path) -> str:
    """A file's text. An empty line of it is the empty prompt."""
    try:
        return read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start:,})", do="Save it as UTF-8."
        ) from None


def parse_size(size: str, flag: str = "--size") -> tuple[int, int]:
    """"832x1216" -> (height 1216, width 832)."""
    match = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", size)
    if not match or "0" in match.groups():
        raise UserError(f"{flag} {size}", wanted="WIDTHxHEIGHT", do=f"Try {flag} 1024x1024.")
    return int(match[2]), int(match[1])


def encode(cfg: Encode) -> Path:
    """Write what a U-Net is told of every prompt, a row each: context (n, 77 · chunks, D), and for
    SDXL y (n, 2816). Rows of texts that OUT has already, encoded in the same way, are kept."""
    texts, size = read_prompts(cfg), parse_size(cfg.size)
    encoders = open_texts(cfg.text).to(pick_device(cfg.device))
    dtype = torch.float16 if cfg.dtype == "fp16" else torch.float32
    how = {
        "kind": "texts",
        "encoders": encoders.fingerprint,
        "chunks": cfg.chunks,
        "clip skip": cfg.clip_skip or encoders.skip,
        "size": list(size) if encoders.double else [],
        "dtype": cfg.dtype,
    }
    source = ",".join(map(absolute, cfg.text.split(",")))
    out, distinct = Path(cfg.out), list(dict.fromkeys(texts))
    kept = kept_rows(out, how)
    new = [text for text in distinct if text_id(text) not in kept]
    if new:
        told = encoders.tell(new, chunks=cfg.chunks, skip=cfg.clip_skip, batch=cfg.batch)
        rows = {"context": told.context}
        if encoders.double:
            rows["y"] = vector(told, size_vector(size))
        rows = {name: narrow(name, value, dtype) for name, value in rows.items()}
        for i, text in enumerate(new):
            kept[text_id(text)] = {name: value[i] for name, value in rows.items()}
    names = kept[text_id(texts[0])]
    tensors = {name: torch.stack([kept[text_id(text)][name] for text in texts]) for name in names}
    more = {"source": source, "texts": [text_id(text) for text in texts]}
    write_tensors(out, tensors, {**how, **more})
    print(f"{len(texts):,} prompts, {len(distinct):,} of them distinct, {len(new):,} encoded now")
    print(out)
    return out


def absolute(name: str) -> str:
    """A file's name that holds in any folder; one on the Hub as it is."""
    return name if name.startswith("hf:") else str(Path(name).absolute())


def text_id(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def narrow(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU in a dtype that holds all of it."""
    out = value.to(dtype).cpu()
    if not out.isfinite().all():
        raise UserError(
            f"{name} does not fit fp16: its largest number is {float(value.abs().max()):.3g}",
            do="Use --dtype fp32; NaN there means that the encoder's file is damaged.",
        )
    return out


def kept_rows(out: Path, how: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """{id of a text: its row of every tensor} of a file that encode() wrote in the same way; {}."""
    if not out.is_file():
        return {}
    box = open_weights(out)
    meta = read_meta(box) if is_ours(box) else {}
    texts = meta.pop("texts", [])
    meta.pop("source", None)  # the same encoders, wherever they lay
    if meta != how or any(box.shape(name)[0] != len(texts) for name in box):
        return {}
    tensors = dict(box)
    return {text: {name: t[i] for name, t in tensors.items()} for i, text in enumerate(texts)}


def main() -> None:
    command, *argv = sys.argv[1:] or [""]
    if command in ("-h", "--help"):
        command, argv = "encode", [command]
    if command != "encode":
        raise UserError(
            f"text.py: command {clipped(command)!r} is not known",
            wanted="encode",
            do="Try python text.py encode --help.",
        )
    cfg, dry_run = parse(Encode, __doc__, argv)
    if dry_run:
        print(json.dumps(asdict(cfg), indent=1))
    else:
        encode(cfg)


if __name__ == "__main__":
    cli(main)
