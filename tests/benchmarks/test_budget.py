"""The budget of a fine-tuning: its counts are those of closed forms, and its rows agree."""

import pytest
import torch
from torch import nn

from benchmarks import budget, sdxl_step
from benchmarks.sdxl_step import Config, matmul_rate, network, one_step, random_network
from benchmarks.sdxl_step import seconds_of
from model import PRESETS, build
from objectives import make_objective


def flop_of_a_text(layers, width):
    """A layer of width d on n tokens: 24 n d² in its products, 4 n² d in its attention."""
    return layers * (24 * 77 * width**2 + 4 * 77**2 * width)


# ViT-bigG's pooled output is projected: one row, two a multiply-add.
TEXTS = {"clip-l": flop_of_a_text(12, 768), "clip-bigg": flop_of_a_text(32, 1280) + 2 * 1280**2}


def test_the_flop_of_a_text_are_a_transformers():
    assert {name: budget.caption_flops(name) for name in TEXTS} == TEXTS


def test_the_rows_agree():
    found = budget.budget()
    for row in found["speeds"]:
        assert row["hours a pass"] * row["images/s"] * 3600 == pytest.approx(3.6e6)
        assert row["hours a pass"] * row["gpus"] == pytest.approx(row["GPU-hours a pass"])
        said = row["text FLOP/s a GPU"] * row["gpus"]
        assert said == pytest.approx(row["images/s"] * sum(TEXTS.values()))
    # Counted by another's tool: 6.76 TFLOP forward at 1024 px.
    assert found["flops of a step, an image"] == pytest.approx(3 * 6.76e12, rel=1e-3)
    images, hours = found["source"]["shown"], 32 * 48
    assert images == pytest.approx(hours * 3600 * 0.4 * 989e12 / 20.2837e12, rel=1e-4)
    # As many GPUs as the source had, for as long.
    assert found["speeds"][-1]["images/s"] * 48 * 3600 == pytest.approx(images)
    # 4 channels of 128×128; 77 states of 2,048 numbers, and 2,816 more: each of two bytes.
    sizes = found["bytes"]
    assert (sizes["latents of an image"], sizes["encoded text of an image"]) == (131_072, 321_024)
    assert sizes["latents"] == 3_600_000 * 131_072
    with torch.device("meta"):
        n = sum(p.numel() for p in build(PRESETS["sdxl"]).parameters())
    assert found["checkpoints"][0]["bytes"] == n * (4 + 4 + 4 + 2 * 4)


def test_a_measured_step_is_one_of_training():
    cfg, cpu = Config(mini=True, weights="fp32"), torch.device("cpu")
    like, side = network(cfg)
    torch.manual_seed(0)
    net, flow = random_network(cfg, cpu), make_objective("fm")
    assert all(p.any() for p in net.parameters() if p.ndim > 1)  # zeros would be fast
    before = [p.detach().clone() for p in net.parameters()]
    given = budget.inputs_of(like, 1, (4, side, side))
    x0, t = given.pop("x"), given.pop("t") / 1000
    batch = {"x0": x0, "eps": torch.randn_like(x0), "t": t, **given}
    loss = flow.loss(net, **batch).loss
    wanted = torch.autograd.grad(loss, list(net.parameters()))
    norm = nn.utils.get_total_norm(wanted)
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    seen = []
    net.middle_block.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    one_step(net, optimizer, flow, batch, cpu)
    assert seen == [torch.bfloat16] and all(p.grad is None for p in net.parameters())
    scale = min(1.0, 1 / float(norm))
    # bf16 of autocast: each weight's step to a share of the largest.
    largest = max(g.abs().max() for g in wanted) * scale
    for p, old, g in zip(net.parameters(), before, wanted):
        assert ((old - p) - scale * g).abs().max() < 0.1 * largest


def test_a_rate_is_of_calls_after_the_first_ones(monkeypatch):
    now, cpu = [0.0], torch.device("cpu")

    def work():  # of which three have to be compiled
        calls.append(1)
        now[0] += 100 if len(calls) <= 3 else 0.5

    calls = []
    monkeypatch.setattr(sdxl_step.time, "perf_counter", lambda: now[0])
    assert seconds_of(work, cpu) == [0.5] * (len(calls) - 3) and len(calls) > 6
    monkeypatch.setattr(sdxl_step, "seconds_of", lambda work, device: [0.5])
    assert matmul_rate(cpu, 8) == 64 * 8 * 2 / 0.5  # 64 sums of eight products
