"""What a PNG says of how it was drawn: to other programs, and to --like, which draws it again.

    said = likeness.chunks(cfg, solver, (H, W), model, fingerprint)     # texts for its chunks
    cfg, dry_run = likeness.parse_like(Config, __doc__)                 # --like PNG, as defaults

"parameters" is what A1111 writes and its users' tools read. OWN holds the flags as they are typed,
but for those that name files: a file that came from somewhere opens no other.
"""

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from PIL import Image

from harness.cli import UserError, clipped, dashed, idle_flags, made, read_flags, shown
from harness.typed import Hash, Length, check

OWN = "twinpath flags"
# Of the command, not of an image.
COMMAND = (
    "ckpt", "like", "out", "npz", "grid_image", "device", "batch", "uncertainty", "tangent",
    "posterior", "posterior_data", "posterior_pairs",
)  # fmt: skip
# What may name a file, or lead to the network.
PLACES = ("text", "vae", "guide_ckpt", "init", "mask", "boost", "lora", "context")
# Our methods as A1111 calls them; others have their own name.
SAMPLERS = {
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "lms4": "LMS",
    "ddim": "DDIM",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
}
AGAIN = "Name a PNG as samplers.py wrote it."


@dataclass
class Likeness:
    """What OWN holds, as JSON."""

    flags: Annotated[list[str], Length(0, 100)]  # "--cfg=7.0"
    withheld: Annotated[list[str], Length(0, 100)]  # "--init"
    fingerprint: Hash = ""


# ---- writing ------------------------------------------------------------------------------------


def chunks(
    cfg: Any, solver: Mapping[str, Any], size: tuple[int, int], model: str, fingerprint: str
) -> dict[str, str]:
    """{key: text} of a PNG's text chunks.

    cfg: a Config of this one image, its prompt the text itself; solver: its method, and what its
    flags come to; size: (height, width) in pixels; model, fingerprint: of the network.
    """
    flags, withheld = [], []
    for field in fields(cfg):
        value, name = getattr(cfg, field.name), field.name
        if value == field.default or name in COMMAND:
            continue
        if name in PLACES or name == "betas" and value.endswith(".json"):
            withheld.append(dashed(name))
            continue
        # A line of a file of prompts: the sign would name a file.
        text = f" {value}" if name == "prompt" and value.startswith("@") else shown(value)
        flags.append(f"{dashed(name)}={text}")
    own = {"flags": flags, "withheld": withheld, "fingerprint": fingerprint}
    return {
        "parameters": parameters(cfg, solver, size, model, fingerprint),
        OWN: json.dumps(own),
    }


def parameters(
    cfg: Any, solver: Mapping[str, Any], size: tuple[int, int], model: str, fingerprint: str
) -> str:
    """The text by which A1111 and its users' tools know a picture: prompt, negative prompt, and a
    line of "Name: value"."""
    method, grid = solver["method"], solver.get("grid")
    row = {
        "Steps": solver.get("steps"),
        "Sampler": SAMPLERS.get(method, method),
        "Schedule type": "Karras" if grid == "karras" else grid,
        "CFG scale": f"{cfg.cfg:g}",
        "Seed": str(cfg.seed),
        "Size": f"{size[1]}x{size[0]}",
        "Model": model,
        "Fingerprint": fingerprint[:12],
        "Clip skip": getattr(cfg, "clip_skip", 0),
        "Version": "twinpath",
    }
    lines = [getattr(cfg, "prompt", None) or ""]
    if getattr(cfg, "negative", None):
        lines.append(f"Negative prompt: {cfg.negative}")
    lines.append(", ".join(f"{key}: {quoted(value)}" for key, value in row.items() if value))
    return "\n".join(lines)


def quoted(value: Any) -> str:
    """A value of the line; as JSON where it has a sign of the line's own."""
    text = str(value)
    return json.dumps(text) if set(text) & set(',:"\n') else text


def settings(cfg: Any) -> str:
    """What makes an image of a seed, as far as it is not the default: two different images never
    share a default folder."""
    silent = (*COMMAND, "n", "seed")
    text = ""
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        if field.name not in silent and value != field.default:
            text += f"-{field.name}={shown(value).replace(',', '+')}"
    text = re.sub(r"[^\w=.+-]+", "_", text)
    # A folder's name has an end.
    return text if len(text) < 150 else "-" + hashlib.sha256(text.encode()).hexdigest()[:12]


# ---- reading ------------------------------------------------------------------------------------


def parse_like(cls: type, doc: str | None = "") -> tuple[Any, bool]:
    """harness.cli.parse() for a Config with a flag `like`: what the PNG says counts where the user
    says nothing."""
    given, dry_run = read_flags([cls], doc)
    if not given.get("like"):
        return made(cls, given), dry_run
    path = Path(given["like"])
    said = read_like(path)
    flags = flags_of(said, cls, path)
    # Of a method, for example, that the user has replaced by another.
    idle = idle_flags(cls(**{"ckpt": "", **flags, **given}))
    flags = {name: value for name, value in flags.items() if name not in idle}
    missed = [name for name in said.withheld if name[2:].replace("-", "_") not in given]
    if missed:
        print(
            f"note: {path} was drawn with {', '.join(missed)}, too, which it does not hold",
            file=sys.stderr,
        )
    return made(cls, {**flags, **given}), dry_run


def read_like(path: Path) -> Likeness:
    """What a PNG of ours says of itself."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.info.get(OWN)
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"--like {path} is no PNG", do=AGAIN) from None
    except (ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError(f"--like {path} is a damaged PNG", do=AGAIN) from None
    if not isinstance(text, str):
        raise UserError(f"--like {path} does not say how it was drawn", do=AGAIN)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"--like {path}: its text {OWN!r} is no JSON", do=AGAIN) from None
    check(value, Likeness, f"{path}, {OWN}")
    return Likeness(**value)


def flags_of(said: Likeness, cls: type, path: Path) -> dict[str, Any]:
    """{name: value} of what a PNG may say: no file, no place on the network, nothing but flags."""
    known = {dashed(field.name) for field in fields(cls)}
    known -= {dashed(name) for name in (*COMMAND, *PLACES)}
    for word in said.flags:
        name, equals, value = word.partition("=")
        strange = name not in known or not equals
        opens = name == "--prompt" and value.startswith("@")
        opens = opens or name == "--betas" and value.endswith(".json")
        if strange or opens:
            raise UserError(f"--like {path} says {clipped(word)!r}", wanted="a setting", do=AGAIN)
    return read_flags([cls], "", said.flags)[0]


def check_same(like: str, fingerprint: str) -> None:
    """Say where the weights are not those that drew the PNG of --like, "" = none."""
    said = read_like(Path(like)).fingerprint if like else ""
    if said and said != fingerprint:
        print(
            f"warning: {like} was drawn by other weights ({said[:12]}) than these "
            f"({fingerprint[:12]})",
            file=sys.stderr,
        )
