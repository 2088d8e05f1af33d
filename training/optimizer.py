"""The optimizer of a run, by --optim, and how much it keeps."""

from typing import Any

import torch
from torch import nn

from kernels.adamw8bit import AdamW8bit, AdamW32bit, in_layout, kept

# What --optim names beside torch's own AdamW.
FUSED = {"adamw8bit": AdamW8bit, "adamw32bit": AdamW32bit}


def make_optimizer(net: nn.Module, cfg: Any) -> torch.optim.Optimizer:
    """AdamW on net's weights, torch's or one of ours, as cfg (train.Optim) says."""
    how = {"lr": cfg.lr, "weight_decay": cfg.weight_decay}
    if cfg.optim in FUSED:
        rounding = cfg.seed if cfg.weights == "bf16" else None
        return FUSED[cfg.optim](net.parameters(), rounding=rounding, **how)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True, **how)
    optimizer.register_step_pre_hook(lay_out_gradients)
    return optimizer


def state_bytes(net: nn.Module, cfg: Any) -> tuple[int, int, int]:
    """Bytes of net's parameters, of their moments and of their averages in a run of cfg
    (train.Optim). net may be on meta, and is still in fp32."""
    params = list(net.parameters())
    numbers = sum(p.numel() for p in params)
    moments = 8 * numbers
    if cfg.optim in FUSED:
        bits = FUSED[cfg.optim].bits
        moments = sum(n * dtype.itemsize for p in params for n, dtype in kept(p, bits).values())
    return numbers * (2 if cfg.weights == "bf16" else 4), moments, 4 * numbers * len(cfg.ema)


def lay_out_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Before a step: every gradient in its weight's memory layout.

    torch's fused AdamW walks both as they lie, without a look at strides: a contiguous gradient of
    a channels_last weight would be applied to other elements. Autograd and DDP lay them out alike;
    code that sets .grad by itself may not.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad = in_layout(p.grad, p)
