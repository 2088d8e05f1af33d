"""The rule of benchmarks/rounding.py, on losses whose verdict can be seen."""

import pytest
import torch

import train
from benchmarks.rounding import ARMS, LR, held_out, verdict

FP32 = [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    "stochastic, nearest, holds, fails",
    [
        pytest.param([1.0] * 3, [1.02] * 3, True, True, id="as-hoped"),
        pytest.param([1.011] * 3, [1.02] * 3, False, True, id="worse-by-more"),
        pytest.param([0.989] * 3, [1.02] * 3, False, True, id="better-by-more"),
        pytest.param([1.0] * 3, [1.009] * 3, True, False, id="nearest-is-near"),
        # their mean is 1.02, and its standard error 0.01
        pytest.param([1.0] * 3, [1.0, 1.03, 1.03], True, False, id="nearest-by-chance"),
        pytest.param([1.03, 0.97, 1.0], [1.02] * 3, True, True, id="the-mean-counts"),
    ],
)
def test_the_rule(stochastic, nearest, holds, fails):
    losses = {"fp32": FP32}
    for arm, ratios in (("stochastic", stochastic), ("nearest", nearest)):
        losses[arm] = [ratio * base for ratio, base in zip(ratios, FP32)]
    found = verdict(losses)
    assert (found["stochastic holds"], found["nearest fails"]) == (holds, fails)
    assert found["ratios"]["nearest"] == pytest.approx(nearest)


def test_arms_differ_in_their_weights_and_how_they_are_rounded(tmp_path, monkeypatch):
    """And in nothing else: their configs, and the parameters that they begin with in fp32."""
    seen = {}

    def look(cfg, ranks, setup):
        tr = setup(cfg, ranks)
        seen[cfg.name] = tr.cfg, tr.optimizer.rounding, next(iter(tr.params.values())).dtype
        (tr.run / "log.jsonl").write_text('{"event": "held-out", "images": 16, "loss": 1.5}\n')
        return False

    monkeypatch.setattr(train, "train", look)
    monkeypatch.setattr(train.data, "fit_vae", lambda ds: train.data.pixel(8))
    for arm in ARMS:
        assert held_out(str(tmp_path), arm, 3, 16) == 1.5
    configs = [{**vars(cfg), "weights": "", "name": ""} for cfg, _, _ in seen.values()]
    assert configs[0] == configs[1] == configs[2] and configs[0]["lr"] == LR
    rounding = {name: (how, dtype) for name, (_, how, dtype) in seen.items()}
    assert rounding == {
        "fp32-3": (None, torch.float32),
        "stochastic-3": (3, torch.bfloat16),
        "nearest-3": (None, torch.bfloat16),
    }
