"""What an exact resume needs of a checkpoint beside the network: its averages and its optimizer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ckpt.foreign import load_unet
from harness.files import load_strict


def load_weights(
    folder: Path, net: nn.Module, emas: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Any]:
    """Put a checkpoint's weights into a network, and its averages where they belong; returns the
    network's metadata."""
    saved, meta = load_unet(folder / "model.safetensors")
    load_strict(net, saved.state_dict(), str(folder))
    for width, weights in emas.items():
        average, _ = load_unet(folder / f"ema-{width}.safetensors")
        for name, value in average.state_dict().items():
            weights[name].copy_(value)
    return meta


def optimizer_state(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's tensors, as ENTRY/PARAMETER."""
    names = {id(p): name for name, p in net.named_parameters()}
    return {
        f"{key}/{names[id(p)]}": value
        for p, entry in optimizer.state.items()
        for key, value in entry.items()
    }


def load_optimizer(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    """The inverse of optimizer_state()."""
    params = dict(net.named_parameters())
    for key, value in state.items():
        entry, name = key.split("/", 1)
        p = params[name]
        if value.shape == p.shape:
            # In the parameter's own order in memory (channels_last, for one): fused steps walk it.
            value = torch.empty_like(p, dtype=value.dtype, device="cpu").copy_(value)
        # AdamW8bit's "order" is about memory, and stays on the CPU.
        value = value if entry == "order" else value.to(device)
        optimizer.state[p][entry] = value
