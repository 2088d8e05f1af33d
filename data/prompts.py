"""Prompts: what a user asks for in words, and what a network is told in their place.

    texts = open_tellers(spec)                        # CLIP's encoders of a checkpoint
    told = conditions(texts, ["a cat", "a dog"], None, size=(512, 512))
    told = embedded(flags, net.cfg)                   # what other encoders said: --context FILE
    told.cond                  # {"context": (2, 77, D)}, of SDXL also {"y": (2, 2816)}
    told.null                  # the same of one row: what guidance leads away from

A teller is anything with tell(texts) and null(negative), as text.Texts.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ckpt.byteunet import ByteUNetConfig
from ckpt.containers import open_weights, unboxed
from ckpt.hub import HUB, from_file
from ckpt.lora import LoRA, merge_texts
from ckpt.mmdits import is_sd3
from ckpt.texts import INDEX, inside, pipeline_of
from ckpt.usual import CLIPS, VAES, shown_encoders
from data.captions import ByteTexts
from data.emphasis import weighted
from data.tags import is_text
from harness.cli import UserError
from harness.reading import read_file
from model import UNetConfig
from text import Told, open_texts, size_vector, vector


REFINER = (1280, 2560)  # SDXL's: it goes on with another's picture, and is told a score of it


class Teller(Protocol):
    """What turns texts into what a network is told."""

    context_dim: int
    vector_dim: int
    fingerprint: str

    def tell(self, texts: Sequence[str], *, chunks: int = 1, skip: int = 0) -> Told: ...

    def null(self, negative: str | None, *, chunks: int = 1, skip: int = 0) -> Told: ...

    def to(self, device: torch.device) -> "Teller": ...


class Conditions(NamedTuple):
    """What a network is told, a row for each prompt; and of one row, what guidance leaves."""

    cond: dict[str, Tensor]
    null: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.cond["context"])

    def rows(self, index: Tensor) -> dict[str, Tensor]:
        """What the prompts of index (B,) say; -1 is the null text."""
        return {name: torch.cat([x, self.null[name]])[index] for name, x in self.cond.items()}

    def to(self, device: torch.device) -> "Conditions":
        moved = ({name: x.to(device) for name, x in part.items()} for part in self[:])
        return Conditions(*moved)


def reads_text(net: Any) -> bool:
    """Is a network of config `net` told what to draw by texts, or by embeddings of them?"""
    return bool(getattr(net, "context_dim", 0)) or isinstance(net, ByteUNetConfig)


def check_asked(net: Any, flags: Any, what: str) -> bool:
    """Is a network asked for something by --prompt or --context? Refuse what it cannot read, and
    one that reads texts without any. flags: samplers.Sampling."""
    context, vector = getattr(net, "context_dim", 0), getattr(net, "vector_dim", 0)
    reads = reads_text(net)
    asks = flags.prompt is not None
    if vector and not reads or (context, vector) == REFINER:
        raise UserError(
            f"{what} is told {vector} numbers that do not come from a text alone",
            wanted="a network that reads a context, of Stable Diffusion 1.x, 2.x or XL",
            do="Sample it with the code that it was made for.",
        )
    if flags.context and not context:
        raise UserError(f"--context: the network of {what} reads none", do="Leave it out.")
    if asks and not reads:
        raise UserError(f"--prompt: the network of {what} reads no text", do="Leave it out.")
    if reads and not isinstance(net, UNetConfig) and not flags.context and not is_sd3(net):
        raise UserError(
            f"{what} holds a transformer that reads the embeddings of encoders which are not part "
            "of this code (T5, or a language model)",
            do=f"Add --context FILE: safetensors with {context_form(net)}, what they said.",
        )
    if reads and not asks and not flags.context:
        raise UserError(f"{what} draws what a text says", do='Add --prompt "a photo of a cat".')
    return asks or bool(flags.context)


# ---- embeddings of a file ------------------------------------------------------------------------


def context_form(net: Any, prefix: str = "", rows: str = "n") -> str:
    """What a network of config `net` is told, as --context FILE has it."""
    form = f"{prefix}context ({rows}, tokens, {net.context_dim})"
    if net.vector_dim:
        form += f" and {prefix}y ({rows}, {net.vector_dim})"
    return form


def read_context(file: str, net: Any, null: bool = False) -> dict[str, Tensor]:
    """{"context": (n, M, D)} of --context FILE, and "y" (n, V) of a network that takes a vector;
    fp32. null: the file's null text as well, if it has one: "null_context" (1, M, D), "null_y"."""
    wanted = {"context": (3, net.context_dim)}
    if net.vector_dim:
        wanted["y"] = (2, net.vector_dim)
    box = unboxed(open_weights(file))
    shapes = {name: box.shape(name) for name in box}
    nulls = {f"null_{name}": form for name, form in wanted.items()}
    has_null = not nulls.keys().isdisjoint(shapes)
    both = wanted | nulls if has_null else wanted
    fits = shapes.keys() == both.keys() and all(
        (len(shapes[name]), *shapes[name][-1:]) == shape for name, shape in both.items()
    )
    rows = {shapes[name][:1] for name in wanted if name in shapes}
    fits = fits and len(rows) == 1 and not any(0 in shape for shape in shapes.values())
    if has_null:
        fits = fits and all(shapes[name][0] == 1 for name in nulls)
        fits = fits and shapes["null_context"][1:] == shapes["context"][1:]
    if not fits:
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise UserError(
            f"{file} holds {found}",
            wanted=f"{context_form(net)}; for guidance also {context_form(net, 'null_', '1')}",
            do="Write the text encoder's output so.",
        )
    tensors = {name: box[name].float() for name in (both if null else wanted)}
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise UserError(f"{file}: {name} has NaN or infinity", do="Write it anew, in fp32.")
    return tensors


def embedded(flags: Any, net: Any) -> Conditions:
    """What --context FILE says, or of FILE:ROW one row of it. flags: samplers.Sampling."""
    file, row = flags.context, None
    head, colon, tail = file.rpartition(":")
    if colon and tail.isdecimal() and not Path(file).exists():
        file, row = head, int(tail)
    tensors = read_context(file, net, null=True)
    count = len(tensors["context"])
    if row is not None and row >= count:
        what = f"--context {flags.context}: {file} has {count} rows"
        raise UserError(what, do="Rows count from 0.")
    keep = slice(None) if row is None else slice(row, row + 1)
    cond = {name: tensors[name][keep] for name in ("context", "y") if name in tensors}
    null = {name: tensors[f"null_{name}"] for name in cond if f"null_{name}" in tensors}
    if not null and flags.cfg != 1.0 and not net_guided(net) and not flags.guide_ckpt:
        raise UserError(
            f"--cfg {flags.cfg:g}: this network is told no strength of guidance, it is led away "
            f"from a null text, and {file} has none",
            wanted=context_form(net, "null_", "1"),
            do="Add it to the file, or leave --cfg out.",
        )
    return Conditions(cond, null or {name: value[:1] for name, value in cond.items()})


def net_guided(net: Any) -> bool:
    """Is a network told the strength of guidance as a number?"""
    return bool(getattr(net, "guidance", False))


# ---- texts ---------------------------------------------------------------------------------------


def read_prompts(prompt: str | None) -> list[str]:
    """TEXT itself, or of @FILE every line; none of None."""
    if prompt is None:
        return []
    if not prompt.startswith("@"):
        if not is_text(prompt):
            raise UserError("--prompt is not UTF-8", do="Type it in a terminal that is.")
        return [prompt]
    path = Path(prompt[1:])
    try:
        text = read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt {prompt}: not UTF-8 (byte {error.start:,})", do="Save it as UTF-8."
        ) from None
    except OSError as error:
        raise UserError(f"--prompt {prompt}: {error.strerror}", do="Name a text file.") from None
    # Not splitlines(), which cuts at a dozen other signs.
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if not any(line.strip() for line in lines):
        raise UserError(f"--prompt {prompt} has no prompts", do="Write one a line.")
    return lines


def conditions(
    texts: Teller,
    prompts: Sequence[str],
    negative: str | None,
    size: tuple[int, int],
    *,
    chunks: int = 1,
    skip: int = 0,
) -> Conditions:
    """What prompts say. negative: None is the family's null text, which "" need not be.
    size: (height, width) of the pictures, of which SDXL is told; the null text has it too."""
    told = texts.tell(prompts, chunks=chunks, skip=skip)
    null = texts.null(negative, chunks=chunks, skip=skip)
    if told.pooled is None:
        return Conditions({"context": told.context}, {"context": null.context})
    # Stable Diffusion 3 is told no sizes.
    sized = told.pooled.shape[1] < texts.vector_dim
    sizes = size_vector(size) if sized else torch.zeros(0)
    return Conditions(
        {"context": told.context, "y": vector(told, sizes)},
        {"context": null.context, "y": vector(null, sizes)},
    )


def tell(
    flags: Any,
    net: Any,
    meta: dict[str, Any],
    size: tuple[int, int],
    what: str,
    loras: list[tuple[LoRA, float]],
    device: torch.device,
) -> Conditions:
    """What --prompt and --negative, or --context, say to a network of config `net`, for images of
    size (height, width). flags: samplers.Sampling."""
    if flags.context:
        return embedded(flags, net)
    told = meta.get("init", {}).get("text") or {}
    texts = open_tellers(flags.text, flags.ckpt, net, what, told)
    for lora, strength in loras:
        merge_texts(texts.encoders, lora, strength)
    texts = weighted(texts.to(device), flags.prompt_weights)
    asked = read_prompts(flags.prompt)
    chunks = flags.chunks if flags.chunks > 1 else told.get("chunks", 1)
    how = {"chunks": chunks, "skip": flags.clip_skip or told.get("skip", 0)}
    return conditions(texts, asked, flags.negative, size, **how)


def with_strength(
    told: Conditions | None, net: Any, flags: Any, what: str
) -> tuple[Conditions | None, float]:
    """(told, --cfg), unless a network is told the strength of guidance itself: then it is one of
    its conditions, and 1 is left for the sampler, which asks once a step. flags: samplers.Sampling.
    """
    if told is None or not net_guided(net):
        return told, flags.cfg
    asks_twice = {
        "--negative": flags.negative is not None,
        "--cfg-rescale": flags.cfg_rescale,
        "--cfg-interval": flags.cfg_interval,
        "--guide-ckpt": flags.guide_ckpt,
    }
    for name, given in asks_twice.items():
        if given:
            raise UserError(
                f"{name}: the network of {what} is told the strength of guidance and draws in one "
                "call, so nothing is led away from",
                do="Leave it out.",
            )
    if flags.cfg == 1.0:
        raise UserError(
            f"the network of {what} is told a strength of guidance",
            do="Add --cfg: 8 for an LCM (distilled for 3 to 13), 3.5 for Flux 1, 4 for Flux 2.",
        )
    strength = {"guidance": torch.full((1,), flags.cfg)}
    many = {"guidance": strength["guidance"].repeat(len(told))}
    return Conditions(told.cond | many, told.null | strength), 1.0


def check_told(texts: Teller, net: Any, spec: str, what: str) -> None:
    """Refuse encoders of another width than a network reads."""
    if (texts.context_dim, texts.vector_dim) == (net.context_dim, net.vector_dim):
        return
    raise UserError(
        f"the text encoders of {spec} tell {numbers(texts.context_dim, texts.vector_dim)}, but the "
        f"network of {what} reads {numbers(net.context_dim, net.vector_dim)}",
        do=f"Name its own with --text: {shown_encoders(net.context_dim)}.",
    )


def numbers(context: int, vector: int) -> str:
    return f"{context} numbers a token" + (f" and {vector} an image" if vector else "")


def open_tellers(
    spec: str, ckpt: str, net: Any, what: str, told: dict[str, Any] | None = None
) -> Teller:
    """The encoders of --text, or those that lie in or beside a checkpoint. told: those by which it
    was trained, where it says so (ckpt.native.ToldBy)."""
    if isinstance(net, ByteUNetConfig):
        if spec:
            raise UserError(
                f"--text {spec}: {what} has an encoder of its own, which was trained with it",
                do="Leave it out.",
            )
        return ByteTexts(net)
    if told:
        return open_again(spec, told, what)
    try:
        # A path may have a comma, where names of several files are parted.
        place = spec or (ckpt if ckpt.startswith("hf:") else Path(ckpt))
        texts = open_texts(place, sd3=is_sd3(net))
    except UserError as error:
        if spec:
            raise
        wide = CLIPS if is_sd3(net) else net.context_dim
        raise UserError(
            f"{what} has no text encoders for its network: {error}",
            do=f"Add --text FILE: {shown_encoders(wide)}.",
        ) from None
    check_told(texts, net, spec or what, what)
    if is_sd3(net):
        print(f"note: {what} is told zeros in T5's place", file=sys.stderr)
    return texts


def open_again(spec: str, told: dict[str, Any], what: str) -> Teller:
    """The encoders by which a network was trained, from where they were then, or where --text says
    that they are now."""
    names = spec or told.get("source", "")
    try:
        found = names.split(",") if spec else [from_file(n, "--text") for n in names.split(",")]
        texts = open_texts(",".join(found))
    except (UserError, OSError) as error:
        words = str(error) if isinstance(error, UserError) else f"{names}: {error.strerror}"
        raise UserError(
            f"cannot load the text encoders by which {what} was trained: {words}",
            do="Put them back, or say where they are with --text.",
        ) from None
    if texts.fingerprint != told["encoders"]:
        raise UserError(
            f"{names} has other text encoders than those by which {what} was trained",
            do="Restore them, or say where they are with --text.",
        )
    return texts


# ---- what else lies with a network ---------------------------------------------------------------


def own_vae(ckpt: str, path: Path, meta: dict[str, Any]) -> str:
    """The name, for --vae, of the autoencoder in or beside the file of a Stable Diffusion; "" if
    there is none. ckpt: what the user named; path: the network's file."""
    family = VAES.get(meta.get("family", ""))
    if not family or not meta.get("latent"):
        return ""
    on_hub = HUB.fullmatch(ckpt)
    if on_hub and not on_hub[2]:
        return f"{family}:{inside(ckpt, 'vae')}"
    folder = pipeline_of(path)
    if folder is not None and (folder / INDEX).is_file():
        return f"{family}:{folder / 'vae'}"
    return f"{family}:{path}"
