"""Checkpoints: ours and other people's.

native.py writes and reads our own files; foreign.py opens anybody's, and is where load_unet is.
layouts.py (names), diffusers.py (configs), containers.py (pickles, shards) and hub.py are what
foreign files need; vaes.py and texts.py know the names in autoencoders and text encoders, and
clip_merges.txt.gz is the vocabulary of the latter; convert.py is behind
`python -m ckpt inspect | convert | verify`.
"""

import sys

if sys.argv[0] == "-m":
    import harness.interrupt  # noqa: F401

from ckpt.convert import convert
from ckpt.diffusers import UNetModel
from ckpt.foreign import load_like, load_unet, open_checked, open_like, open_unet
from ckpt.native import find_checkpoint, read_tensors, save_checkpoint, save_unet
from harness.files import fingerprint, load_strict

__all__ = [
    "UNetModel", "convert", "find_checkpoint", "fingerprint", "load_like", "load_strict",
    "load_unet", "open_checked", "open_like", "open_unet", "read_tensors", "save_checkpoint",
    "save_unet",
]  # fmt: skip
