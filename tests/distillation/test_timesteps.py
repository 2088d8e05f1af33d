"""Timesteps drawn by an assessor's profile."""

import pytest
import torch

from distillation.timesteps import bins_of, make_sampler


def test_bins_are_counted_in_integers():
    rows = torch.arange(1000)
    assert bins_of(rows, 100).tolist() == [k * 100 // 1000 for k in range(1000)] and bins_of(
        rows, 7
    ).tolist() == [k * 7 // 1000 for k in range(1000)]
    assert bins_of(torch.tensor([0.0, 9.9, 10.0, 530.0, 590.0, 999.0, 1000.0]), 100).tolist() == [
        0,
        0,
        1,
        53,
        59,
        99,
        99,
    ]


def test_the_timestep_sampler():
    sure, vague = torch.ones(100), torch.zeros(100)
    p = make_sampler(sure, vague, shift=3.0).p
    assert (
        p[0].item() == pytest.approx(0.003356, abs=1e-6)
        and p[99].item() == pytest.approx(0.029410, abs=2e-6)
        and p.sum().item() == pytest.approx(1)
    )
    assert torch.allclose(make_sampler(sure, vague, shift=1 / 3).p, p.flip(0))  # towards clean
    q = (torch.arange(100_000) + 0.5) / 100_000
    rows, weight = make_sampler(sure, vague, base_jitter=0).draw(q.double())
    assert torch.equal(
        torch.bincount(rows, minlength=1000)[5::10], torch.full((100,), 1000)
    ) and torch.allclose(weight, torch.ones(1))
    rows, _ = make_sampler(sure, vague, base_jitter=5).draw(q.double())
    counts = torch.bincount(rows, minlength=1000)
    assert (
        rows.min() == 0
        and rows.max() == 999
        and (counts[20:980] > 0).all()
        and counts[20:980].float().std() < 45
    )  # 1000/11 a row, its edges two bins'
    rows, _ = make_sampler(sure, torch.ones(100), base_jitter=5).draw(
        torch.full((999,), 0.505, dtype=torch.float64) + torch.arange(999) * 1e-6
    )
    assert (rows - 505).abs().max() <= 10
    ends = torch.bincount(
        make_sampler(sure, torch.ones(100), base_jitter=5).draw(q.double())[0], minlength=1000
    ).double()
    assert ends[[0, 1, 998, 999]].max() < 2 * ends.median()  # nothing piles up at the ends
    accuracy = torch.tensor([0.1, 0.9, 0.5, 0.1])
    neutral, drop = (
        make_sampler(accuracy, torch.zeros(4), unreliable=u) for u in ("neutral", "drop")
    )
    assert torch.allclose(
        neutral.p * 5.2, torch.tensor([1.3, 1.1, 1.5, 1.3], dtype=torch.float64)
    ) and drop.p.tolist() == pytest.approx([0, 1.1 / 2.6, 1.5 / 2.6, 0])
    rows, weight = drop.draw(torch.rand(4000, dtype=torch.float64))
    assert (
        rows.min() >= 370
        and rows.max() <= 630
        and torch.allclose(weight[rows < 450], torch.tensor(2.6 / 4.4))
    )
    hard = make_sampler(torch.linspace(0.2, 0.9, 100), vague, shift=2.0, base_jitter=0)
    rows, weight = hard.draw(q.double())
    assert weight.mean().item() == pytest.approx(1, abs=1e-3) and (
        weight * rows
    ).mean().item() == pytest.approx(500, abs=1)  # as if uniform
    none = make_sampler(torch.full((100,), 0.149), vague, shift=3.0)
    rows, weight = none.draw((torch.arange(5000).double() + 0.5) / 5000)
    assert (
        not none.reliable.any()
        and torch.equal(torch.bincount(rows, minlength=1000), torch.full((1000,), 5))
        and (weight == 1).all()
    )
