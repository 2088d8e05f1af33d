"""--ema-device, --ema-every: averages in host memory, of every K-th step."""

import shutil

import pytest
import torch

import train
from harness.cli import UserError
from sharded import FULL, ONE, check_bits, config, newest, opened, ranks, stepped, trained


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    place = tmp_path_factory.mktemp("plain")
    return place, trained(ONE, place, {"images": 80})


def test_averages_in_host_memory_are_the_same_bits(plain, tmp_path):
    assert trained(ONE, tmp_path, {"images": 80, "ema_device": "cpu"}) == plain[1]
    check_bits(newest(tmp_path), newest(plain[0]))


def test_two_shards_keep_the_same_averages_in_host_memory(tmp_path):
    # Of each rank, as saved and as loaded; and beside those of shards that lie on the device.
    said = ranks(2, stepped, tmp_path / "host", FULL | {"ema_device": "cpu"}, 2)
    assert all(before == after for before, after in said)
    assert said == ranks(2, stepped, tmp_path / "device", FULL, 2)


@pytest.mark.parametrize("optim, device", [("adamw", "cpu"), ("adamw8bit", "same")])
def test_every_third_network_is_averaged_and_a_resume_goes_on_with_the_same(
    tmp_path, optim, device
):
    """adamw8bit averages in its own pass, and not these."""
    flags = {"ema_device": device, "ema_every": 3, "optim": optim, "images": 160}
    tr = opened(ONE, tmp_path / "a", flags)
    loader, kept = train.load(tr), []
    for step in range(1, 21):
        train.step(tr, loader)
        train.conclude(tr)
        if step % 3 == 0:
            kept.append({name: p.detach().double() for name, p in tr.net.named_parameters()})
        if step == 10:  # between two updates
            train.save(tr)
            shutil.copytree(tmp_path / "a", tmp_path / "b")
    m = len(kept)
    for key, e in tr.ema.exponents.items():
        shares = [((j + 1) / m) ** e - (j / m) ** e for j in range(m)]
        for name, average in tr.ema.weights[key].items():
            wanted = sum(share * net[name] for share, net in zip(shares, kept))
            assert torch.allclose(average.double(), wanted, atol=1e-6), name
    again = opened(ONE, tmp_path / "b", flags)
    assert again.seen == 80
    loader = train.load(again)
    for _ in range(10):
        train.step(again, loader)
    for key, average in tr.ema.weights.items():
        assert all(torch.equal(x, again.ema.weights[key][name]) for name, x in average.items())


def test_a_step_that_is_not_finite_loses_no_update(tmp_path):
    tr = opened(ONE, tmp_path, {"ema_every": 2, "ema": (0.05,), "lr": 1e-3})
    loader, norms = train.load(tr), train.gradient_norms
    train.step(tr, loader)
    with pytest.MonkeyPatch.context() as patch:
        broken = lambda tr: (norms(tr)[0] * float("nan"), norms(tr)[1])  # noqa: E731
        patch.setattr(train, "gradient_norms", broken)
        train.step(tr, loader)
    assert tr.skipped == 1 and tr.seen == 16
    averages = tr.ema.weights["0.050"]
    assert all(torch.equal(averages[name], p) for name, p in tr.net.named_parameters())


def test_another_rhythm_is_another_run(plain, tmp_path):
    shutil.copytree(plain[0] / "run", tmp_path / "run")
    with pytest.raises(UserError, match="ema_every 1 -> 2"):
        train.train(config(tmp_path, {"images": 80, "ema_every": 2}), ONE)


@pytest.mark.parametrize(
    "flags, line",
    [("--ema-every 9", "of 8, so no average would ever"), ("--ema 0.1,0.1", "wanted different")],
)
def test_averages_that_cannot_be_are_one_line(user, tmp_path, flags, line):
    small = "--model nano --data toyfaces:8 --resolution 32 --images 64 --batch 8".split()
    code, _, errors = user(train.main, *small, *flags.split(), "--out", tmp_path / "runs")
    assert code == 2 and len(errors) == 1 and line in errors[0]
    assert not (tmp_path / "runs").exists()
