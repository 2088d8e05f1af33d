"""The optimizer of a run."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from training.optimizer import make_optimizer

FORMS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}


@pytest.mark.parametrize("weights", FORMS)
@pytest.mark.parametrize("gradients", FORMS)
@pytest.mark.parametrize("optim", ["adamw", "adamw8bit"])
def test_a_gradient_in_another_layout_goes_to_its_own_weights(optim, weights, gradients):
    """torch's fused AdamW alone is off by 0.6 after three steps of 0.1 where layouts differ."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, bias=False)
    start, gradient = conv.weight.detach().clone(), torch.randn(8, 4, 3, 3)
    conv = conv.to(memory_format=FORMS[weights])
    cfg = SimpleNamespace(optim=optim, lr=0.1, weight_decay=0.01, weights="fp32")
    optimizer = make_optimizer(conv, cfg)
    for _ in range(3):
        conv.weight.grad = gradient.contiguous(memory_format=FORMS[gradients])
        optimizer.step()
    # a constant gradient: every update is lr times its sign
    exact = start.double()
    for _ in range(3):
        exact = exact * (1 - 0.1 * 0.01) - 0.1 * gradient.double().sign()
    assert (conv.weight - exact).abs().max() < 1e-5
    assert conv.weight.is_contiguous(memory_format=FORMS[weights])
