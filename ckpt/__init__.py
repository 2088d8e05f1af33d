"""Checkpoints: ours and other people's. Read unets.py first."""

from ckpt.unets import convert, find_checkpoint, fingerprint, load_unet, save_unet

__all__ = ["convert", "find_checkpoint", "fingerprint", "load_unet", "save_unet"]
