"""Prompts: what a user asks for in words, and what a network is told in their place.

    texts = open_tellers(spec)                        # CLIP's encoders of a checkpoint
    told = conditions(texts, ["a cat", "a dog"], None, size=(512, 512))
    told.cond                  # {"context": (2, 77, D)}, of SDXL also {"y": (2, 2816)}
    told.null                  # the same of one row: what guidance leads away from

A teller is anything with tell(texts) and null(negative), as text.Texts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ckpt.byteunet import ByteUNetConfig
from ckpt.hub import HUB, from_file
from ckpt.texts import INDEX, inside, pipeline_of
from ckpt.usual import VAES, shown_encoders
from data.captions import ByteTexts
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


def check_asked(net: Any, asks: bool, what: str) -> None:
    """Refuse a prompt for a network that reads none, and such a network without one."""
    context, vector = getattr(net, "context_dim", 0), getattr(net, "vector_dim", 0)
    reads = context or isinstance(net, ByteUNetConfig)
    if vector and not reads or (context, vector) == REFINER:
        raise UserError(
            f"{what} is told {vector} numbers that do not come from a text alone",
            wanted="a network that reads a context, of Stable Diffusion 1.x, 2.x or XL",
            do="Sample it with the code that it was made for.",
        )
    if reads and not isinstance(net, UNetConfig):
        raise UserError(
            f"{what} holds a transformer that reads the embeddings of encoders which are not part "
            "of this code (T5, or a language model)",
            do="It can be inspected, converted and verified: python -m ckpt --help",
        )
    if reads and not asks:
        raise UserError(f"{what} draws what a text says", do='Add --prompt "a photo of a cat".')
    if asks and not reads:
        raise UserError(f"--prompt: the network of {what} reads no text", do="Leave it out.")


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
    sizes = size_vector(size)
    return Conditions(
        {"context": told.context, "y": vector(told, sizes)},
        {"context": null.context, "y": vector(null, sizes)},
    )


def with_strength(
    told: Conditions | None, net: Any, flags: Any, what: str
) -> tuple[Conditions | None, float]:
    """(told, --cfg), unless a network is told the strength of guidance itself: then it is one of
    its conditions, and 1 is left for the sampler, which asks once a step. flags: samplers.Sampling.
    """
    if told is None or not getattr(net, "guidance", False):
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
            do="Add --cfg, about 8 for an LCM (they were distilled for 3 to 13).",
        )
    strength = {"guidance": torch.full((1,), flags.cfg)}
    many = {"guidance": strength["guidance"].repeat(len(told))}
    return Conditions(told.cond | many, told.null | strength), 1.0


def check_told(texts: Teller, net: UNetConfig, spec: str, what: str) -> None:
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
    spec: str, ckpt: str, net: UNetConfig, what: str, told: dict[str, Any] | None = None
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
        texts = open_texts(spec or (ckpt if ckpt.startswith("hf:") else Path(ckpt)))
    except UserError as error:
        if spec:
            raise
        raise UserError(
            f"{what} has no text encoders for its network: {error}",
            do=f"Add --text FILE: {shown_encoders(net.context_dim)}.",
        ) from None
    check_told(texts, net, spec or what, what)
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
