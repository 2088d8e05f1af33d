"""The budget of a fine-tuning: its counts are those of closed forms, and its rows agree."""

import pytest
import torch
from torch import nn

from benchmarks import budget
from benchmarks.sdxl_step import Config, matmul_rate, network, one_step, random_network
from model import PRESETS, build
from objectives import make_objective


def test_the_flop_of_a_text_are_a_transformers():
    """A layer of width d on n tokens: 24 n d² in its products, 4 n² d in its attention."""
    for name, layers, width in (("clip-l", 12, 768), ("clip-bigg", 32, 1280)):
        own = layers * (24 * 77 * width**2 + 4 * 77**2 * width)
        # ViT-bigG's pooled output is projected: one row, two a multiply-add.
        found = budget.caption_flops(name) - own
        assert found == (0 if name == "clip-l" else 2 * 1280**2)


def test_the_rows_agree():
    found = budget.budget()
    for row in found["speeds"]:
        assert row["hours a pass"] * row["images/s"] * 3600 == pytest.approx(3.6e6)
        assert row["hours a pass"] * row["gpus"] == pytest.approx(row["GPU-hours a pass"])
    # Counted by another's tool: 6.76 TFLOP forward at 1024 px.
    assert found["flops of a step, an image"] == pytest.approx(3 * 6.76e12, rel=1e-3)
    images, hours = found["source"]["shown"], 32 * 48
    assert images == pytest.approx(hours * 3600 * 0.4 * 989e12 / 20.2837e12, rel=1e-4)
    with torch.device("meta"):
        n = sum(p.numel() for p in build(PRESETS["sdxl"]).parameters())
    assert found["checkpoints"][0]["bytes"] == n * (4 + 4 + 4 + 2 * 4)


def test_a_measured_step_is_one_of_training():
    cfg, cpu = Config(mini=True, weights="fp32"), torch.device("cpu")
    like, side = network(cfg)
    torch.manual_seed(0)
    net, flow = random_network(cfg, cpu), make_objective("fm")
    before = [p.detach().clone() for p in net.parameters()]
    given = budget.inputs_of(like, 1, (4, side, side))
    x0, t = given.pop("x"), given.pop("t") / 1000
    batch = {"x0": x0, "eps": torch.randn_like(x0), "t": t, **given}
    loss = flow.loss(net, **batch).loss
    wanted = torch.autograd.grad(loss, list(net.parameters()))
    norm = nn.utils.get_total_norm(wanted)
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    one_step(net, optimizer, flow, batch, cpu)
    scale = min(1.0, 1 / float(norm))
    # bf16 of autocast: each weight's step to a share of the largest.
    largest = max(g.abs().max() for g in wanted) * scale
    for p, old, g in zip(net.parameters(), before, wanted):
        assert ((old - p) - scale * g).abs().max() < 0.1 * largest
    assert matmul_rate(cpu, 64) > 0
