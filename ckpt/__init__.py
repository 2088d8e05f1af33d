"""Checkpoints: ours and other people's. Read native.py first, then foreign.py."""

from ckpt.layouts import guided_diffusion as UNetModel
from ckpt.unets import (
    convert, find_checkpoint, fingerprint, load_strict, load_unet, open_unet, read_tensors,
    save_checkpoint, save_unet,
)

__all__ = [
    "UNetModel", "convert", "find_checkpoint", "fingerprint", "load_strict", "load_unet",
    "open_unet", "read_tensors", "save_checkpoint", "save_unet",
]
