"""Old name, until its caller has moved: write `ckpt.load_like`."""

from typing import Any

from ckpt import load_like
from model import PRESETS, UNet


def start_from(cfg: Any, name: str) -> tuple[UNet, dict[str, Any]]:
    return load_like(name, PRESETS[cfg.model], cfg.model)
