"""What a run starts from: the weights of another network, and the autoencoder whose latents it learns."""

from dataclasses import fields
from typing import Any

import torch

from ckpt.unets import find_checkpoint, load_unet, open_unet
from harness.cli import UserError
from harness.files import META
from ckpt.containers import open_weights
from model import PRESETS, UNet, UNetConfig


def start_from(cfg: Any, name: str) -> tuple[UNet, dict[str, Any]]:
    """The network to start from. Where its file does not say its heads and their order, --model does, and must be what it was made with."""
    path, preset, told = find_checkpoint(name), PRESETS[cfg.model], {"heads", "order"}
    try:
        source = open_unet(path)
    except UserError:
        if META in open_weights(path).meta:                                     # ours says its heads: something else is wrong
            raise
        source, told = open_unet(path, num_heads=1, attention_order="legacy"), set()   # what else is wrong is raised now
    told -= set() if "unet" in source.meta else {"order"}                       # diffusers' files have none: theirs becomes --model's

    def traits(unet: UNetConfig) -> dict[str, Any]:
        unseen = {"in_channels", "out_channels", "num_classes", "dropout", "linear_projection", "num_heads", "num_head_channels", "attention_order"}
        used = [C for C, depth in zip(unet.channels, (*unet.attention[:-1], 1)) if depth]
        widths = [unet.head_channels(C) for C in used]
        return {**{f.name: getattr(unet, f.name) for f in fields(unet) if f.name not in unseen}, **({"channels a head": widths} if "heads" in told else {}),
                **({"attention_order": unet.attention_order} if "order" in told and widths != used else {})}   # one head has none
    its, ours = traits(source.cfg), traits(preset)
    if differs := [key for key in its if key in ours and its[key] != ours[key]]:
        same = " or ".join(key for key, unet in PRESETS.items() if traits(unet) == its)
        has, wanted = (", ".join(f"{key} {which[key]}" for key in differs) for which in (its, ours))
        raise UserError(f"--init {name} is of another architecture: it has {has}; --model {cfg.model} is {wanted}.  Choose the preset it was made "
                        f"with{f' (--model {same})' * bool(same)}.")
    say = () if "order" in told else ("attention_order",) if "heads" in told else ("num_heads", "num_head_channels", "attention_order")
    return load_unet(path, dtype=torch.float32, **{k: getattr(preset, k) for k in say})
