"""The optimizer of a run, by --optim."""

from typing import Any

import torch
from torch import nn

from kernels.adamw8bit import AdamW8bit, in_layout


def make_optimizer(net: nn.Module, cfg: Any) -> torch.optim.Optimizer:
    """AdamW on net's weights, in 32 or 8 bits as cfg (train.Optim) says."""
    how = {"lr": cfg.lr, "weight_decay": cfg.weight_decay}
    if cfg.optim == "adamw8bit":
        return AdamW8bit(net.parameters(), **how)
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
