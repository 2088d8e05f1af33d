"""Pretraining an assessor: what it is shown, what it learns, how it is measured."""

import json
import math

import pytest
import torch
from distilling import (
    home,  # noqa: F401
    planted,
)

import distillation.pretrain as pretrain_file
import distillation.teacher as teacher_file
from data.dataset import Stream, batches, open_dataset
from diffusion.schedules import alphas_bar
from distillation.assessor import (
    Assessor,
    AssessorConfig,
    block_weights,
    fresh_assessor,
    load_assessor,
)
from distillation.pretrain import examine, fit
from distillation.teacher import taps
from model import PRESETS
from vae import pixel


def test_pretraining_reads_timesteps_of_held_out_images_and_says_how_well(home):
    card = json.loads((home / "a.json").read_text())
    held = card["held_out"]
    assert held["mean"] > 3 * held["chance"] == pytest.approx(0.3) and held["blocks"].keys() == {
        "down_0",
        "down_1",
        "mid",
        "up_0",
        "up_1",
    }
    assert all(
        len(b["by_bin"]) == 10 and b["within1"] >= b["top1"] and 0 <= b["ece"] <= 1
        for b in held["blocks"].values()
    )
    net = load_assessor(home / "a.safetensors")
    w = block_weights(PRESETS["nano"])
    profile = sum(w[k] * torch.tensor(b["by_bin"]) for k, b in held["blocks"].items()) / sum(
        w.values()
    )
    assert (
        torch.allclose(net.accuracy, profile, atol=1e-6)
        and net.accuracy.mean().item() == pytest.approx(held["mean"], abs=1e-6)
        and not net.training
    )


def test_planted_pretraining_learns_what_is_there_and_nothing_that_is_not():
    g = torch.Generator().manual_seed(0)
    cfg = AssessorConfig({"mid": 12}, bins=12, patterns=2, dim=32)
    bins, held = torch.randint(12, (2000,), generator=g), torch.randint(12, (600,), generator=g)
    show = lambda k: {"mid": torch.eye(12)[k] + 0.05 * torch.randn(len(k), 12, generator=g)}
    net = fresh_assessor(cfg, 0)
    history = fit(net, show(bins), bins, {"mid": 1.0}, 300, 128, 1e-2, 0)
    assert (
        history[-1] < history[0]
        and examine(net.frozen(), show(held), held, {"mid": 1.0})["mean"] > 0.95
    )
    blind = fresh_assessor(cfg, 0)
    noise = lambda k: {"mid": torch.randn(len(k), 12, generator=g)}
    fit(blind, noise(bins), bins, {"mid": 1.0}, 300, 128, 1e-2, 0)
    assert abs(
        examine(blind.frozen(), noise(held), held, {"mid": 1.0})["mean"] - 1 / 12
    ) < 3 * math.sqrt(1 / 12 * 11 / 12 / 600)


def test_what_is_measured_on_held_out_features():
    """Heads that say the same of everything: bin 2 with probability 0.7, and within a bin two of
    four patterns."""
    net = Assessor(AssessorConfig({"a": 6, "b": 6}, bins=5, patterns=4, dim=8)).frozen()
    p = torch.tensor([0.1, 0.05, 0.7, 0.1, 0.05]).log()
    planted(None, net.blocks["a"], p, torch.tensor([0.0, 0.0, -1e4, -1e4]).repeat(5))
    planted(None, net.blocks["b"], p.roll(1), torch.zeros(20))
    bins = torch.tensor([2, 2, 1, 0, 4, 3, 3, 3, 3, 0])
    report = examine(net, {k: torch.randn(10, 6) for k in "ab"}, bins, {"a": 3.0, "b": 1.0})
    a, b = report["blocks"]["a"], report["blocks"]["b"]
    assert (a["top1"], b["top1"], report["mean"]) == pytest.approx((0.2, 0.4, 0.25)) and (
        a["within1"],
        b["within1"],
    ) == pytest.approx((0.7, 0.7))
    assert (
        (a["ece"], b["ece"]) == pytest.approx((0.5, 0.3), abs=1e-6)
        and a["by_bin"] == [0, 0, 1, 0, 0]
        and b["by_bin"] == [0, 0, 0, 1, 0]
    )
    pair = Assessor(AssessorConfig({"a": 6}, bins=2, patterns=1, dim=8)).frozen()
    confident = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]).log()
    pair.forward = lambda features, bins: {"a": {"t_logits": confident, "p_logits": confident}}
    assert examine(pair, {}, torch.tensor([0, 0, 1, 1]), {"a": 1.0})["blocks"]["a"][
        "ece"
    ] == pytest.approx((2 * 0.1 + 2 * 0.6) / 4)  # not their difference
    assert net.accuracy.tolist() == pytest.approx(
        [0, 0, 0.75, 0.25, 0]
    ) and net.entropy.tolist() == pytest.approx([0.75 * 0.5 + 0.25] * 5)


@pytest.mark.parametrize("source", ["data", "noise"])
def test_pretraining_shows_the_teacher_what_x_source_says(home, source):
    teacher, ds = (
        teacher_file.open_teacher(str(home / "teacher.safetensors")),
        open_dataset("toyfaces:48", resolution=32, holdout=0.1),
    )
    rows_, vae = torch.tensor([3, 500, 998]), pixel(8)
    found = pretrain_file.features(
        teacher,
        vae,
        ds,
        rows_,
        pretrain_file.Pretrain(resolution=32, x_source=source),
        torch.device("cpu"),
    )
    batch = next(batches(Stream(ds, None, vae.latent_shape(32), 0), iter([[0, 1, 2]])))
    a = alphas_bar("scaled_linear")[rows_].sqrt().view(-1, 1, 1, 1)
    x = (
        batch["eps"]
        if source == "noise"
        else (
            a * vae.encode(batch["image"].float() / 127.5 - 1) + (1 - a**2).sqrt() * batch["eps"]
        ).float()
    )
    with torch.no_grad():
        _, features = teacher.net(x, rows_.float(), features=tuple(taps(teacher.net.cfg).values()))
    assert all(
        torch.allclose(found[k], features[block].mean((2, 3)), rtol=1e-3, atol=1e-3)
        for k, block in taps(teacher.net.cfg).items()
    )


def test_pretraining_is_measured_on_held_out_images_spread_over_time(home, tmp_path, monkeypatch):
    calls, real = [], pretrain_file.features
    monkeypatch.setattr(
        pretrain_file,
        "features",
        lambda teacher, vae, ds, rows, *rest: (
            calls.append((ds, rows)) or real(teacher, vae, ds, rows, *rest)
        ),
    )
    pretrain_file.pretrain(
        pretrain_file.Pretrain(
            teacher=str(home / "teacher.safetensors"),
            out=str(tmp_path / "a.safetensors"),
            bins=4,
            patterns=2,
            dim=8,
            samples=40,
            profile_samples=20,
            holdout=0.1,
            steps=2,
            batch=8,
        )
    )
    (train_ds, rows_), (held, spread) = calls
    assert (
        len(held) == len(train_ds.heldout) > 0
        and len(train_ds) + len(held) == 48
        and torch.equal(spread, torch.arange(20) * 50)
    )
    assert len(rows_) == 40 and len(rows_.unique()) > 30


def test_a_shuffled_time_leaves_only_what_the_image_shows(home, tmp_path):
    """The features of this teacher come from its time embedding: told a wrong time, they say
    nothing of the true one."""
    how = dict(
        teacher=str(home / "teacher.safetensors"),
        bins=10,
        patterns=2,
        dim=16,
        samples=512,
        profile_samples=200,
        holdout=0.1,
        steps=60,
        batch=64,
        lr=1e-2,
    )
    found = {}
    for shuffle in (False, True):
        pretrain_file.pretrain(
            pretrain_file.Pretrain(
                **how, out=str(tmp_path / f"{shuffle}.safetensors"), shuffle_time=shuffle
            )
        )
        found[shuffle] = json.loads((tmp_path / f"{shuffle}.json").read_text())["held_out"]["mean"]
    assert found[True] < 0.18 < 0.25 < found[False]
