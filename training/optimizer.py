"""The optimizer of a run, by --optim."""

from typing import Any

import torch
from torch import nn

from kernels.adamw8bit import AdamW8bit, AdamW32bit, in_layout

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
