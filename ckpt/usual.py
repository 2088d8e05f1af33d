"""What files of Stable Diffusion leave unsaid, for all of a family have it alike.

    meta, notes = as_usual(meta)      # eps over scaled_linear, where 1.x and XL are silent
    side = usual_side(meta, "v")      # 512, 768, 1024 pixels
    shown_encoders(2048)              # the text encoders, by how wide a network's context is
"""

from collections.abc import Mapping
from typing import Any

# Their noise schedule, and what they were trained to output, until a file says another
# (ckpt/meaning.py). Of 2.x there are two kinds, eps at 512 pixels and v at 768: that is no guess.
TABLE = "scaled_linear"
TARGETS = {"sd1": "eps", "sd2": None, "sdxl": "eps"}
SIDES = {"sd1": 512} | dict.fromkeys(("sdxl", "sd3", "sd3.5", "flux1", "flux2"), 1024)
SIDES_OF_2 = {"eps": 512, "v": 768}
# The autoencoders that they were trained with, by their names in vae.py.
VAES = {
    "sd1": "sd", "sd2": "sd", "sdxl": "sdxl", "sd3": "sd3", "sd3.5": "sd3", "flux1": "flux1",
    "flux2": "flux2",
}  # fmt: skip
# {how wide a context is: the encoders}, and the files that other programs keep them in.
ENCODERS = {768: ("ViT-L",), 1024: ("ViT-H",), 1280: ("ViT-bigG",), 2048: ("ViT-L", "ViT-bigG")}
CLIPS = 2048  # SDXL's two, which Stable Diffusion 3 has too
FILES = {"ViT-L": "clip_l.safetensors", "ViT-H": "", "ViT-bigG": "clip_g.safetensors"}
WIDTHS = {768: "ViT-L", 1024: "ViT-H", 1280: "ViT-bigG"}


def as_usual(meta: Mapping[str, Any], table: str = "") -> tuple[dict[str, Any], str]:
    """(metadata of a Stable Diffusion with what its file does not say, a line of what that is: ""
    = nothing). Other metadata stays as it is. table: the noise schedule that the user names."""
    meta, family = dict(meta), meta.get("family", "")
    if family not in TARGETS or isinstance(meta.get("objective"), dict):
        return meta, ""
    added = []
    target = meta.get("objective") or TARGETS[family]
    if target and not meta.get("objective"):
        meta["objective"] = target
        added.append(f"objective {target}")
    schedule = dict(meta.get("schedule", {}))
    if target in ("eps", "v", "x0") and not table and "table" not in schedule:
        schedule["table"] = TABLE
        added.append(f"noise schedule {TABLE}")
    meta["schedule"] = schedule
    return meta, " and ".join(added)


def usual_side(meta: Mapping[str, Any], target: str) -> int:
    """The side, in pixels, that a network of a family was trained at; 0 if that is not known."""
    family = meta.get("family", "")
    return SIDES_OF_2.get(target, 0) if family == "sd2" else SIDES.get(family, 0)


def shown_encoders(context_dim: int) -> str:
    """The text encoders of a network whose context is so wide, and where to find them."""
    names = ENCODERS.get(context_dim)
    if not names:
        return f"text encoders {context_dim} wide"
    if names == ("ViT-H",):
        return "ViT-H, of any Stable Diffusion 2.x"
    return f"{' and '.join(names)} ({encoder_files(context_dim)})"


def encoder_files(context_dim: int) -> str:
    """What --text may be given for a network whose context is so wide; "" if that has no name."""
    return ",".join(FILES[name] for name in ENCODERS.get(context_dim, ()) if FILES[name])
