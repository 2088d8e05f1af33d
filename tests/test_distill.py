"""Distillation: its formulas against closed forms, the arms against each other bit for bit, the files against what they came from."""

import json
import math
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import randomize
from safetensors.torch import load_file, save_file

import experiments.ablate as ablate
from experiments import verdict
import distillation.pretrain as pretrain_file
import distill
import eval_fid
import samplers
import distillation.teacher as teacher_file
import train
from distillation.assessor import (MIN_VOLUME, ROLES, ROSE_T, Assessor, AssessorConfig, block_weights, cantor, entropy, fresh_assessor, load_assessor,
                      rose_loss, rose_scores, same_bin_gap, simplex)
from distillation.pretrain import examine, fit
from harness.run import checkpoints
from ckpt import convert, fingerprint, load_unet, read_tensors, save_unet
from harness.cli import UserError
from data.dataset import Stream, batches, open_dataset
from distill import fuse, kd_cosine, v_target
from harness.files import write_tensors
from metrics.distances import frechet_from_features
from model import PRESETS, UNet, UNetConfig
from objectives import Objective, make_objective
from diffusion.schedules import alphas_bar, norm, table_time
from harness.ranks import Ranks
from distillation.tally import Tally
from distillation.teacher import Teacher, tap_channels, taps
from test_resume import kill_tree, wait_for
from distillation.timesteps import bins_of, make_sampler
from vae import pixel

ALONE, ROOT = Ranks(0, 1, torch.device("cpu")), Path(__file__).parent.parent
FAST = dict(batch=8, images=40, lr=1e-3, preview_every=0, eval_every=0, save_every=0, log_every=8, holdout=0.1)
EPS = make_objective("ddpm", table="scaled_linear")


# ---- formulas -------------------------------------------------------------------------------------------------------

def test_fuse_is_the_clipped_sum_for_floats_and_tensors():
    assert fuse(0.8, 0.3, 0.45, 1.2) == pytest.approx(1.935)
    for w, wanted in ((0.7, 2.5743), (0.9, 3.0), (1.2, 3.0)):
        assert fuse(math.log(100), 1.0, 0.5, w) == pytest.approx(wanted, abs=1e-4)
    assert fuse(0.0, 0.0, 1.0, 0.3) == 0.5 and [fuse(0.0, 0.0, 1.0, w) for w in (0.7, 1.0, 1.2)] == [0.7, 1.0, 1.2]
    assert fuse(0.0, 0.0, 7.0, 1.0) == 1.0 and fuse(0.0, 0.0, -7.0, 1.0) == 1.25                            # coh is clipped first
    w, e_t = torch.tensor([1.2, 0.7]), torch.tensor([0.8, math.log(100)])
    assert fuse(e_t, torch.tensor([0.3, 1.0]), torch.tensor([0.45, 0.5]), w).tolist() == pytest.approx([1.935, 2.5743], abs=1e-4)
    with pytest.raises(UserError, match="smaller one first"):
        fuse(0.0, 0.0, 1.0, 1.0, lo=3.0, hi=0.5)


def planted(z, companion, t_logits, p_logits):
    """A companion whose heads say the given logits whatever it sees."""
    for head, logits in ((companion.t_head, t_logits), (companion.p_head, p_logits)):
        head.weight.data.zero_()
        head.bias.data.copy_(logits)


def test_e_t_is_cross_entropy_in_nats_and_e_p_entropy_over_the_log_of_all_classes():
    net = Assessor(AssessorConfig({"mid": 6}, bins=8, patterns=125, dim=8)).frozen()
    features, bins = {"mid": torch.randn(5, 6, 4, 4)}, torch.tensor([3] * 5)
    planted(None, net.blocks["mid"], torch.zeros(8), torch.zeros(1000))
    assert net.assess(features, bins)["mid"].tolist() == pytest.approx([2.079442, 1.0, 0.5], abs=1e-6)
    planted(None, net.blocks["mid"], 1000.0 * torch.eye(8)[3], 1000.0 * torch.eye(1000)[7])
    assert net.assess(features, bins)["mid"].tolist() == pytest.approx([0.0, 0.0, 0.5], abs=1e-6)
    logits = lambda n: torch.where(torch.arange(1000) < n, 0.0, -1e4)
    assert entropy(logits(2)).item() == pytest.approx(0.100343, abs=1e-6) and entropy(logits(10)).item() == pytest.approx(1 / 3, abs=1e-6)


def test_kd_compares_directions_of_means_over_space_and_leaves_the_teacher_alone():
    a, b = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[0.0, 3], [0, 5]])
    assert kd_cosine(a, b).item() == pytest.approx(0.5)
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 7, 4, 4, generator=g), torch.randn(3, 7, 4, 4, generator=g, requires_grad=True)
    shuffled = x.flatten(2)[:, :, torch.randperm(16, generator=g)].view_as(x)
    x.requires_grad_()
    assert kd_cosine(3 * shuffled, y).item() == pytest.approx(kd_cosine(x, y).item(), abs=1e-6) and kd_cosine(x, x).item() == pytest.approx(0, abs=1e-6)
    kd_cosine(x, y).backward()
    assert y.grad is None and x.grad.abs().sum() > 0 and kd_cosine(x.bfloat16(), y.bfloat16()).dtype == torch.float32


def test_v_star_and_the_teachers_own_schedule():
    one = lambda v: torch.full((1, 1, 1, 1), v, dtype=torch.float64)
    assert v_target(one(1.0), one(0.5), 0.6, 0.8).item() == pytest.approx(-0.5) == v_target(1.0, 0.5, 0.6, 0.8)
    assert v_target(one(1.0), one(0.5), 0.0, 1.0).item() == pytest.approx(-500)                             # guarded
    a = alphas_bar("scaled_linear").sqrt()
    assert a[999].item() == pytest.approx(0.06826, abs=1e-5) and a[500].item() == pytest.approx(0.52567, abs=1e-5)
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(4, 3, 4, 4, generator=g) for _ in range(2))
    rows = torch.tensor([0, 250, 500, 999])
    t = table_time("scaled_linear", rows).float()
    fed = []

    def net(x, row, features):                                                  # says the true eps; x tells how it was fed
        fed.append((x, row))
        return eps, {name: x for name in features}
    teacher = stub(net)
    got_x0, got_eps, features = teacher.ask(teacher.noised(x0, eps, t), t)
    own = a[rows].view(-1, 1, 1, 1)
    assert torch.allclose(got_x0, x0, atol=2e-5) and torch.allclose(got_eps, eps, atol=2e-5) and fed[0][1].tolist() == rows.tolist()
    assert torch.allclose(fed[0][0].double(), own * x0 + (1 - own ** 2).sqrt() * eps, atol=1e-6)            # x_t on SD's schedule, not DDPM's
    assert features.keys() == taps(PRESETS["nano"]).keys() and len(fed) == 1


def stub(net, objective=EPS):
    """A Teacher around any function."""
    net.cfg = replace(PRESETS["nano"], in_channels=3, out_channels=3)
    return Teacher(net, objective, {"fingerprint": ""}, Path("stub"), {})


def test_a_flow_student_of_an_eps_teacher_is_asked_for_eps_minus_x0_also_beyond_the_schedule():
    n = norm(torch.tensor(0.3, dtype=torch.float64))
    a, s = 0.7 / n, 0.3 / n
    assert [1 / n, a, s, 2 * math.log(a / s)] == pytest.approx([1.313064, 0.919145, 0.393919, 1.694596], abs=1e-6)
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(3, 3, 8, 8, generator=g) for _ in range(2))
    t = torch.tensor([0.3, 0.99, 1.0])                                          # SD's table ends at 0.936
    teacher, asked = stub(lambda x, row, features: (eps, {f: x for f in features})), []
    student = lambda x, row, **c: asked.append((x, row)) or torch.zeros_like(x)
    loss_of = distill.DistillLoss(distill.Config(), ALONE, pixel(1), make_objective("fm"), None, teacher, torch.ones(5))
    image = ((x0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    with torch.no_grad():
        loss = loss_of(student, {"image": image, "eps": eps, "t": t})
    x0 = image.float() / 127.5 - 1
    assert loss.per_sample.tolist() == pytest.approx((eps - x0).square().flatten(1).mean(1).tolist(), rel=1e-4)
    assert torch.allclose(asked[0][0], (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * eps) and asked[0][1].tolist() == pytest.approx((t * 1000).tolist())


def test_the_cantor_staircase():
    x = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)
    assert cantor(x).tolist() == pytest.approx([0.000171, 0.353116, 0.499878, 0.646640, 0.999585], abs=1e-6)
    assert cantor(torch.tensor([0.1, 0.9], dtype=torch.float64), levels=3).tolist() == pytest.approx([0.16445, 0.71055], abs=1e-5)
    assert cantor(torch.tensor([0.5], dtype=torch.float64), levels=1).item() == pytest.approx(0.25, abs=1e-9)
    u = torch.linspace(0.001, 0.999, 97, dtype=torch.float64)
    assert (cantor(u) + cantor(1 - u) - 0.999756).abs().median() < 1e-5         # but at jumps, where u and 1 - u fall on different sides
    net = Assessor(AssessorConfig({"mid": 6}, bins=20, patterns=2, dim=8)).frozen()
    features, bins = torch.randn(7, 6), torch.arange(7)
    together = net({"mid": features}, bins)["mid"]["cantor"]
    alone = torch.cat([net({"mid": features[i:i + 1]}, bins[i:i + 1])["mid"]["cantor"] for i in range(7)])
    assert torch.allclose(together, alone, atol=1e-5)                           # the source divides by the batch's largest bin


def test_a_simplexs_volume_by_cayley_and_menger():
    regular = torch.eye(5, dtype=torch.float64) / math.sqrt(2)                  # edge 1
    volume, variation = simplex(regular)
    assert volume.item() == pytest.approx(math.sqrt(5) / 96) == pytest.approx(0.0232924, abs=1e-7) and variation.item() == pytest.approx(0, abs=1e-12)
    q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    assert simplex(3 * regular @ q + 7)[0].item() == pytest.approx(81 * volume.item())
    flat = torch.randn(5, 6, dtype=torch.float64)
    flat[4] = flat[:4].mean(0)
    flat.requires_grad_()
    volume, _ = simplex(flat)
    volume.backward()
    assert volume.item() == 0 and torch.isfinite(flat.grad).all()
    centred = regular - regular.mean(0)
    assert torch.linalg.det(centred @ centred.T).item() == pytest.approx(0, abs=1e-12)                      # why there is no Gram term


def test_rose_scores_and_margin():
    assert sum(ROLES) == 1.0
    z = torch.nn.functional.normalize(torch.randn(4, 6, dtype=torch.float64), dim=-1)
    for i in range(4):
        scores = rose_scores(z[i:i + 1], torch.stack([z[i].expand(5, 6), -z[i].expand(5, 6)]))
        assert scores[0].tolist() == pytest.approx([1 / ROSE_T, -1 / ROSE_T]) and rose_loss(scores, torch.tensor([0])).item() == 0
        twins = rose_scores(z[i:i + 1], z[i].expand(2, 5, 6))
        assert rose_loss(twins, torch.tensor([1])).item() == pytest.approx(1.0)


def test_bins_are_counted_in_integers():
    rows = torch.arange(1000)
    assert bins_of(rows, 100).tolist() == [k * 100 // 1000 for k in range(1000)] and bins_of(rows, 7).tolist() == [k * 7 // 1000 for k in range(1000)]
    assert bins_of(torch.tensor([0.0, 9.9, 10.0, 530.0, 590.0, 999.0, 1000.0]), 100).tolist() == [0, 0, 1, 53, 59, 99, 99]


def test_the_timestep_sampler():
    sure, vague = torch.ones(100), torch.zeros(100)
    p = make_sampler(sure, vague, shift=3.0).p
    assert p[0].item() == pytest.approx(0.003356, abs=1e-6) and p[99].item() == pytest.approx(0.029410, abs=2e-6) and p.sum().item() == pytest.approx(1)
    assert torch.allclose(make_sampler(sure, vague, shift=1 / 3).p, p.flip(0))  # towards clean
    q = (torch.arange(100_000) + 0.5) / 100_000
    rows, weight = make_sampler(sure, vague, base_jitter=0).draw(q.double())
    assert torch.equal(torch.bincount(rows, minlength=1000)[5::10], torch.full((100,), 1000)) and torch.allclose(weight, torch.ones(1))
    rows, _ = make_sampler(sure, vague, base_jitter=5).draw(q.double())
    counts = torch.bincount(rows, minlength=1000)
    assert rows.min() == 0 and rows.max() == 999 and (counts[20:980] > 0).all() and counts[20:980].float().std() < 45   # 1000/11 a row, its edges two bins'
    rows, _ = make_sampler(sure, torch.ones(100), base_jitter=5).draw(torch.full((999,), 0.505, dtype=torch.float64) + torch.arange(999) * 1e-6)
    assert (rows - 505).abs().max() <= 10
    ends = torch.bincount(make_sampler(sure, torch.ones(100), base_jitter=5).draw(q.double())[0], minlength=1000).double()
    assert ends[[0, 1, 998, 999]].max() < 2 * ends.median()                     # nothing piles up at the ends
    accuracy = torch.tensor([0.1, 0.9, 0.5, 0.1])
    neutral, drop = (make_sampler(accuracy, torch.zeros(4), unreliable=u) for u in ("neutral", "drop"))
    assert torch.allclose(neutral.p * 5.2, torch.tensor([1.3, 1.1, 1.5, 1.3], dtype=torch.float64)) and drop.p.tolist() == pytest.approx([0, 1.1 / 2.6, 1.5 / 2.6, 0])
    rows, weight = drop.draw(torch.rand(4000, dtype=torch.float64))
    assert rows.min() >= 370 and rows.max() <= 630 and torch.allclose(weight[rows < 450], torch.tensor(2.6 / 4.4))
    hard = make_sampler(torch.linspace(0.2, 0.9, 100), vague, shift=2.0, base_jitter=0)
    rows, weight = hard.draw(q.double())
    assert weight.mean().item() == pytest.approx(1, abs=1e-3) and (weight * rows).mean().item() == pytest.approx(500, abs=1)   # as if uniform
    none = make_sampler(torch.full((100,), 0.149), vague, shift=3.0)
    rows, weight = none.draw((torch.arange(5000).double() + 0.5) / 5000)
    assert not none.reliable.any() and torch.equal(torch.bincount(rows, minlength=1000), torch.full((1000,), 5)) and (weight == 1).all()


def test_base_weights_are_the_sources_at_four_levels():
    assert list(block_weights(PRESETS["sd15"]).values()) == [0.7, 0.9, 1.0, 1.1, 1.2, 1.1, 1.0, 0.9, 0.7]
    assert list(tap_channels(PRESETS["sd15"]).values()) == [320, 640, 1280, 1280, 1280, 1280, 1280, 640, 320]
    cfg = AssessorConfig(tap_channels(PRESETS["sd15"]))
    with torch.device("meta"):
        assert sum(p.numel() for p in Assessor(cfg).parameters()) == 9_465_406


@pytest.mark.parametrize("name", ["nano", "toy-281m", "adm-64", "sd15"])
def test_taps_have_the_channels_they_are_said_to_have(name):
    with torch.device("meta"):
        net = UNet(PRESETS[name])
        side = 2 ** (len(net.cfg.channel_mult) - 1)
        context = torch.zeros(1, 2, net.cfg.context_dim) if net.cfg.context_dim else None
        _, h = net(torch.zeros(1, net.cfg.in_channels, side, side), torch.zeros(1), context=context, features=tuple(taps(net.cfg).values()))
    assert {k: h[block].shape[1] for k, block in taps(net.cfg).items()} == tap_channels(net.cfg)


# ---- a teacher, its assessor, its students --------------------------------------------------------------------------

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A teacher of random weights (its blocks show the timestep as a trained one's do) and a pretrained assessor."""
    home, vae = tmp_path_factory.mktemp("distill"), pixel(8)
    net = randomize(UNet(replace(PRESETS["nano"], in_channels=192, out_channels=192)), 1)
    net.time_embed[2].weight.data.mul_(12)
    save_unet(home / "teacher.safetensors", net, {"objective": asdict(EPS), "vae": vae.meta(), "resolution": 32, "config": {"data": "toyfaces:48"}, "classes": []})
    pretrain_file.pretrain(pretrain_file.Pretrain(teacher=str(home / "teacher.safetensors"), out=str(home / "a.safetensors"), bins=10, patterns=3, dim=24,
                                                  samples=1024, profile_samples=200, holdout=0.1, steps=200, batch=64, lr=1e-2))
    return home


@pytest.fixture(scope="module", autouse=True)
def few_samples():
    """The final grid of a run: two images in one step, for 32 in 50 would be most of the time."""
    draw = train.draw_samples
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "draw_samples", lambda tr, net, seeds, **how: draw(tr, net, seeds[:2], method="ddim", steps=1))
        yield


def config(home, **fields):
    reads = {"assessor_file": str(home / "a.safetensors")} if fields.get("assessor") in distill.READS or fields.get("adaptive_t") else {}
    return distill.resolve(distill.Config(**{**FAST, "teacher": str(home / "teacher.safetensors"), **reads, **fields}))


def go(home, out, **fields) -> Path:
    cfg = config(home, out=str(out), **fields)
    distill.run(cfg, ALONE)
    return out / cfg.name


def rows(run, event="train"):
    return [r for r in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if r["event"] == event]


def tensors(run) -> dict[str, torch.Tensor]:
    folder = checkpoints(run)[-1]
    return {f"{f.name}:{k}": v for f in sorted(folder.iterdir()) for k, v in load_file(f).items()}


def same(a, b, of="") -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items() if k.startswith(of))


def test_pretraining_reads_timesteps_of_held_out_images_and_says_how_well(home):
    card = json.loads((home / "a.json").read_text())
    held = card["held_out"]
    assert held["mean"] > 3 * held["chance"] == pytest.approx(0.3) and held["blocks"].keys() == {"down_0", "down_1", "mid", "up_0", "up_1"}
    assert all(len(b["by_bin"]) == 10 and b["within1"] >= b["top1"] and 0 <= b["ece"] <= 1 for b in held["blocks"].values())
    net = load_assessor(home / "a.safetensors")
    w = block_weights(PRESETS["nano"])
    profile = sum(w[k] * torch.tensor(b["by_bin"]) for k, b in held["blocks"].items()) / sum(w.values())
    assert torch.allclose(net.accuracy, profile, atol=1e-6) and net.accuracy.mean().item() == pytest.approx(held["mean"], abs=1e-6) and not net.training


def test_liveness_a_corrupted_block_and_no_other_is_noticed(home):
    net, g = load_assessor(home / "a.safetensors"), torch.Generator().manual_seed(3)
    teacher = teacher_file.open_teacher(str(home / "teacher.safetensors"))
    row = torch.randint(1000, (64,), generator=g)
    t, x0, eps = teacher.time(row), torch.rand(64, 192, 4, 4, generator=g) * 2 - 1, torch.randn(64, 192, 4, 4, generator=g)
    features, bins = teacher.ask(teacher.noised(x0, eps, t), t)[2], bins_of(row, 10)
    before, lam = net.assess(features, bins), lambda found: {k: fuse(*v, 0.5) for k, v in found.items()}
    for name, x in features.items():
        noise = torch.randn(*x.shape[:2], 1, 1, generator=g) * x.mean((2, 3)).std(0)[:, None, None]         # of one size a channel: it survives the mean
        after = net.assess({**features, name: x + 2 * noise}, bins)
        assert after[name][0] > before[name][0] + 0.2 and lam(after)[name] > lam(before)[name] + 0.02
        assert all(torch.equal(after[k], before[k]) for k in features if k != name)
    swapped = net.assess(features, bins.roll(1))
    assert all(swapped[k][0] > before[k][0] for k in features)
    halves = [lam(net.assess({k: v[s] for k, v in features.items()}, bins[s])) for s in (slice(0, 32), slice(32, 64))]
    assert all(halves[0][k] != halves[1][k] for k in features)
    for wrong in ({k: v for k, v in features.items() if k != "mid"}, {**features, "up_9": features["mid"]}):
        with pytest.raises(UserError, match="the assessor reads down_0"):
            net.assess(wrong, bins)
    assert net.assess({k: v.bfloat16() for k, v in features.items()}, bins)["mid"].dtype == torch.float32


def test_assessing_draws_nothing_from_the_global_generator(home):
    state = torch.get_rng_state()
    net = load_assessor(home / "a.safetensors")
    net.assess({k: torch.ones(2, C) for k, C in net.cfg.blocks.items()}, torch.tensor([1, 1]), "data")
    fresh_assessor(net.cfg, 7)
    assert torch.equal(state, torch.get_rng_state())


def test_planted_pretraining_learns_what_is_there_and_nothing_that_is_not():
    g = torch.Generator().manual_seed(0)
    cfg = AssessorConfig({"mid": 12}, bins=12, patterns=2, dim=32)
    bins, held = torch.randint(12, (2000,), generator=g), torch.randint(12, (600,), generator=g)
    show = lambda k: {"mid": torch.eye(12)[k] + 0.05 * torch.randn(len(k), 12, generator=g)}
    net = fresh_assessor(cfg, 0)
    history = fit(net, show(bins), bins, {"mid": 1.0}, 300, 128, 1e-2, 0)
    assert history[-1] < history[0] and examine(net.frozen(), show(held), held, {"mid": 1.0})["mean"] > 0.95
    blind = fresh_assessor(cfg, 0)
    noise = lambda k: {"mid": torch.randn(len(k), 12, generator=g)}
    fit(blind, noise(bins), bins, {"mid": 1.0}, 300, 128, 1e-2, 0)
    assert abs(examine(blind.frozen(), noise(held), held, {"mid": 1.0})["mean"] - 1 / 12) < 3 * math.sqrt(1 / 12 * 11 / 12 / 600)


def test_what_is_measured_on_held_out_features():
    """Heads that say the same of everything: bin 2 with probability 0.7, and within a bin two of four patterns."""
    net = Assessor(AssessorConfig({"a": 6, "b": 6}, bins=5, patterns=4, dim=8)).frozen()
    p = torch.tensor([0.1, 0.05, 0.7, 0.1, 0.05]).log()
    planted(None, net.blocks["a"], p, torch.tensor([0.0, 0.0, -1e4, -1e4]).repeat(5))
    planted(None, net.blocks["b"], p.roll(1), torch.zeros(20))
    bins = torch.tensor([2, 2, 1, 0, 4, 3, 3, 3, 3, 0])
    report = examine(net, {k: torch.randn(10, 6) for k in "ab"}, bins, {"a": 3.0, "b": 1.0})
    a, b = report["blocks"]["a"], report["blocks"]["b"]
    assert (a["top1"], b["top1"], report["mean"]) == pytest.approx((0.2, 0.4, 0.25)) and (a["within1"], b["within1"]) == pytest.approx((0.7, 0.7))
    assert (a["ece"], b["ece"]) == pytest.approx((0.5, 0.3), abs=1e-6) and a["by_bin"] == [0, 0, 1, 0, 0] and b["by_bin"] == [0, 0, 0, 1, 0]
    pair = Assessor(AssessorConfig({"a": 6}, bins=2, patterns=1, dim=8)).frozen()
    confident = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]).log()
    pair.forward = lambda features, bins: {"a": {"t_logits": confident, "p_logits": confident}}
    assert examine(pair, {}, torch.tensor([0, 0, 1, 1]), {"a": 1.0})["blocks"]["a"]["ece"] == pytest.approx((2 * 0.1 + 2 * 0.6) / 4)   # not their difference
    assert net.accuracy.tolist() == pytest.approx([0, 0, 0.75, 0.25, 0]) and net.entropy.tolist() == pytest.approx([0.75 * 0.5 + 0.25] * 5)


@pytest.mark.parametrize("source", ["data", "noise"])
def test_pretraining_shows_the_teacher_what_x_source_says(home, source):
    teacher, ds = teacher_file.open_teacher(str(home / "teacher.safetensors")), open_dataset("toyfaces:48", resolution=32, holdout=0.1)
    rows_, vae = torch.tensor([3, 500, 998]), pixel(8)
    found = pretrain_file.features(teacher, vae, ds, rows_, pretrain_file.Pretrain(resolution=32, x_source=source), torch.device("cpu"))
    batch = next(batches(Stream(ds, None, vae.latent_shape(32), 0), iter([[0, 1, 2]])))
    a = alphas_bar("scaled_linear")[rows_].sqrt().view(-1, 1, 1, 1)
    x = batch["eps"] if source == "noise" else (a * vae.encode(batch["image"].float() / 127.5 - 1) + (1 - a ** 2).sqrt() * batch["eps"]).float()
    with torch.no_grad():
        _, features = teacher.net(x, rows_.float(), features=tuple(taps(teacher.net.cfg).values()))
    assert all(torch.allclose(found[k], features[block].mean((2, 3)), rtol=1e-3, atol=1e-3) for k, block in taps(teacher.net.cfg).items())


def test_pretraining_is_measured_on_held_out_images_spread_over_time(home, tmp_path, monkeypatch):
    calls, real = [], pretrain_file.features
    monkeypatch.setattr(pretrain_file, "features", lambda teacher, vae, ds, rows, *rest: calls.append((ds, rows)) or real(teacher, vae, ds, rows, *rest))
    pretrain_file.pretrain(pretrain_file.Pretrain(teacher=str(home / "teacher.safetensors"), out=str(tmp_path / "a.safetensors"), bins=4, patterns=2, dim=8,
                                                  samples=40, profile_samples=20, holdout=0.1, steps=2, batch=8))
    (train_ds, rows_), (held, spread) = calls
    assert len(held) == len(train_ds.heldout) > 0 and len(train_ds) + len(held) == 48 and torch.equal(spread, torch.arange(20) * 50)
    assert len(rows_) == 40 and len(rows_.unique()) > 30


@pytest.mark.parametrize("target", ["nearest", "zero"])
def test_pattern_targets(target):
    """zero: always pattern 0 of the bin, as in the source. nearest: the bin's own crystals nearest to z, and no other bin's."""
    cfg = AssessorConfig({"mid": 6}, bins=3, patterns=4, dim=8, pattern_target=target)
    net = fresh_assessor(cfg, 0).eval().blocks["mid"]
    x, bins = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1, 0])
    z = net(x, bins)["z"]
    near = torch.einsum("bpd,bd->bp", torch.nn.functional.normalize(net.crystals.mean(2), dim=-1)[bins], z)
    wanted = (near / 0.1).softmax(1) if target == "nearest" else torch.eye(4)[torch.zeros(5, dtype=torch.long)]
    logp = net(x, bins)["p_logits"].log_softmax(1).view(5, 3, 4)[torch.arange(5), bins]
    ce = (torch.nn.functional.cross_entropy(net(x, bins)["t_logits"], bins) - (wanted * logp).sum(1).mean()) / 2
    losses = net.losses(x, bins)
    assert losses["ce"].item() == pytest.approx(ce.item(), rel=1e-5) and losses["feature"].item() == pytest.approx(0, abs=1e-6)
    pattern = near.argmax(1) if target == "nearest" else torch.zeros(5, dtype=torch.long)
    assert losses["rose"].item() == pytest.approx(rose_loss(rose_scores(z, net.crystals.flatten(0, 1)), bins * 4 + pattern).item(), rel=1e-5)
    assert 0 <= losses["diversity"] <= math.log(12) and losses["cayley"] >= 0.5 * simplex(net.crystals.flatten(0, 1))[1].mean() - 1e-6 and MIN_VOLUME > 0


def test_heads_with_a_hidden_layer_learn_what_linear_ones_cannot(tmp_path):
    """Two bins on a line, interleaved: z (2-d, a projection that is kept as it is) can be cut by a curve only."""
    z = torch.nn.functional.normalize(torch.tensor([[math.cos(a), math.sin(a)] for a in torch.linspace(0, 2 * math.pi, 201)[:-1].tolist()]), dim=1)
    bins, right = (torch.arange(200) // 50) % 2, {}
    for head in ("linear", "mlp"):
        net = fresh_assessor(AssessorConfig({"mid": 2}, bins=2, patterns=1, dim=2, head=head), 0)
        companion = net.blocks["mid"]
        optimizer = torch.optim.AdamW(companion.t_head.parameters(), lr=0.05)
        for _ in range(300):
            loss = torch.nn.functional.cross_entropy(companion.t_head(z), bins)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        right[head] = float((companion.t_head(z).argmax(1) == bins).float().mean())
        net.save(tmp_path / f"{head}.safetensors", {})
        again = load_assessor(tmp_path / f"{head}.safetensors")
        assert again.cfg.head == head and torch.equal(again.blocks["mid"].t_head(z), companion.t_head(z))
    assert right["linear"] < 0.8 < right["mlp"]


def test_coherence_of_data_is_by_pairs_of_one_bin():
    c, bins = torch.tensor([0.1, 0.3, 0.9, 0.4]), torch.tensor([2, 2, 5, 2])
    gaps = [0.2, 0.3, 0.1]                                                      # of bin 2; bin 5 has no pair
    assert same_bin_gap(c, bins, distinct=True).item() == pytest.approx(sum(gaps) / 3)
    assert same_bin_gap(c, bins, distinct=False).item() == pytest.approx(2 * sum(gaps) / (9 + 1))           # the source's counts i = j
    assert same_bin_gap(c, torch.arange(4), distinct=True).item() == 0
    net = Assessor(AssessorConfig({"mid": 6}, bins=8, patterns=2, dim=8)).frozen()
    x = {"mid": torch.randn(4, 6)}
    gap = same_bin_gap(net(x, bins)["mid"]["cantor"], bins, distinct=True)
    assert net.assess(x, bins, "data")["mid"][2].item() == pytest.approx(math.exp(-gap.item() / 0.1)) and net.assess(x, bins)["mid"][2].item() == 0.5


def test_a_shuffled_time_leaves_only_what_the_image_shows(home, tmp_path):
    """The features of this teacher come from its time embedding: told a wrong time, they say nothing of the true one."""
    how = dict(teacher=str(home / "teacher.safetensors"), bins=10, patterns=2, dim=16, samples=512, profile_samples=200, holdout=0.1, steps=60, batch=64, lr=1e-2)
    found = {}
    for shuffle in (False, True):
        pretrain_file.pretrain(pretrain_file.Pretrain(**how, out=str(tmp_path / f"{shuffle}.safetensors"), shuffle_time=shuffle))
        found[shuffle] = json.loads((tmp_path / f"{shuffle}.json").read_text())["held_out"]["mean"]
    assert found[True] < 0.18 < 0.25 < found[False]


ARMS = {"vanilla": dict(block_weight=0.0), "none": {}, "david": dict(assessor="david"), "random": dict(assessor="random"), "shuffled": dict(assessor="shuffled"),
        "const": dict(assessor="const", assessor_file="", lambdas=(1.0, 2.0, 3.0, 2.0, 1.0))}


@pytest.fixture(scope="module")
def arms(home):
    """Every arm's run, and the hash of what each of its first ten steps saw: x_t, t and noise."""
    seen, real, runs = {}, Teacher.ask, {}
    for name, fields in ARMS.items():
        prints = seen[name] = []

        def ask(self, x, t, **cond):
            prints.append(fingerprint({"x": x, "t": t}))
            return real(self, x, t, **cond)
        Teacher.ask = ask
        try:
            runs[name] = go(home, home / "arms", images=80, **fields, name=name)
        finally:
            Teacher.ask = real
    return runs, seen


def test_arms_share_their_first_ten_batches_and_differ_in_what_they_learn(arms):
    runs, seen = arms
    assert all(prints[:10] == seen["vanilla"][:10] for prints in seen.values()) and len(set(seen["vanilla"][:10])) == 10
    weights = {name: tensors(run)["model.safetensors:out.2.weight"] for name, run in runs.items()}
    assert len({fingerprint({"w": w}) for w in weights.values()}) == len(ARMS)
    lam = {name: {k: b["lambda"] for k, b in rows(run)[-1]["blocks"].items()} for name, run in runs.items() if name != "vanilla"}
    assert list(lam["none"].values()) == pytest.approx([0.7, 1.0, 1.2, 1.0, 0.7]) and list(lam["const"].values()) == [1, 2, 3, 2, 1]
    assert list(lam["shuffled"].values()) != list(lam["david"].values()) and "blocks" not in rows(runs["vanilla"])[-1]
    assert all(b.keys() == {"lambda", "clipped", "kd"} for b in rows(runs["none"])[0]["blocks"].values())
    first = {name: list(v["lambda"] for v in rows(runs[name])[0]["blocks"].values()) for name in ("david", "shuffled")}
    assert first["shuffled"] == pytest.approx(first["david"][-2:] + first["david"][:-2])                    # the first batch's, from equal students


def test_lambda_moves_and_the_log_says_what_it_is_made_of(arms):
    lines = rows(arms[0]["david"])
    assert len({line["blocks"]["down_0"]["lambda"] for line in lines}) > 3                                  # alive: another one in every batch
    for line in lines:
        assert sum(line["t_drawn"]) == 8 and sum(line["gradient_by_third"]) == pytest.approx(1) == pytest.approx(sum(line["gradient_by_third_unweighted"]))
        for name, b in line["blocks"].items():
            w = block_weights(PRESETS["nano"])[name]
            assert b["lambda"] == pytest.approx(fuse(b["e_t"], b["e_p"], b["coh"], w), rel=1e-5) and b["clipped"] == float(b["lambda"] in (0.5, 3.0))
    chance = rows(arms[0]["random"])[0]["blocks"]["mid"]
    assert chance["e_t"] == pytest.approx(math.log(10), abs=0.4) and rows(arms[0]["david"])[0]["blocks"]["up_0"]["e_t"] < math.log(10) - 0.4


def test_null_equivalences_are_bitwise(home, arms, tmp_path):
    """none = const with λ = w; block_weight 0 = a loss that never looks at a block, whatever the arm; and another λ is another student."""
    runs, _ = arms
    w = tuple(block_weights(PRESETS["nano"]).values())
    const = go(home, tmp_path, images=80, assessor="const", assessor_file="", lambdas=w)
    assert same(tensors(runs["none"]), tensors(const)) and [r["loss"] for r in rows(const)] == [r["loss"] for r in rows(runs["none"])]
    off = go(home, tmp_path, images=80, assessor="david", block_weight=0.0, name="off")
    assert same(tensors(runs["vanilla"]), tensors(off)) and not same(tensors(runs["none"]), tensors(off), "model")


def test_vanilla_is_mse_to_the_teachers_v_by_an_independent_loop(home, tmp_path):
    """Two steps of SGD-free arithmetic: the first batch's loss, written out in VP's coordinates."""
    cfg = config(home, out=str(tmp_path), images=8, block_weight=0.0)
    tr = distill.setup(cfg, ALONE)
    batch = next(batches(Stream(tr.ds, None, tr.latent_shape, cfg.seed), iter([list(range(8))])))
    x0, eps, k = tr.vae.encode(batch["image"].float() / 127.5 - 1), batch["eps"], (batch["q"] * 1000).floor().long()
    a = alphas_bar("scaled_linear")[k].sqrt().view(-1, 1, 1, 1)
    s = (1 - a ** 2).sqrt()
    x_t = (a * x0 + s * eps).float()
    net, _ = load_unet(home / "teacher.safetensors")
    with torch.no_grad():
        out = net(x_t, k.float())                                               # teacher and student are equal at first
        v = (out - s * x_t) / a
        wanted = (out - v).square().flatten(1).mean(1)
    got = tr.loss(tr.model, batch)
    assert got.per_sample.tolist() == pytest.approx(wanted.tolist(), rel=1e-3) and got.loss.item() == pytest.approx(wanted.mean().item(), rel=1e-3)


def test_the_whole_loss_with_every_setting_off_its_default_written_out(home, tmp_path):
    w = [0.5, 0.6, 0.7, 0.8, 0.9]
    cfg = config(home, out=str(tmp_path), assessor="david", local_heads=True, block_weight=0.3, kd_weight=70.0, alpha=0.9, beta=0.4, delta=0.6, lam_min=0.1, lam_max=0.95,
                 coherence="data", e_t="excess", block_weights=tuple(w), adaptive_t=True, importance=True, shift=2.0, shift_dir="clean", base_jitter=30,
                 adaptive_chaos=False, reliability=0.8, unreliable="drop", difficulty_gain=2.0, x_source="noise")
    tr = distill.setup(cfg, ALONE)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():                                                       # a student that has left its teacher
        for p in tr.net.parameters():
            p.add_(0.3 * p.abs().mean() * torch.randn(p.shape, generator=noise))
    batch = next(batches(Stream(tr.ds, None, tr.latent_shape, cfg.seed), iter([list(range(8))])))
    judge, teacher = load_assessor(home / "a.safetensors"), load_unet(home / "teacher.safetensors")[0]
    drawn = make_sampler(judge.accuracy, judge.entropy, shift=0.5, base_jitter=30, chaos=False, threshold=0.8, unreliable="drop", gain=2.0)
    row, importance = drawn.draw(batch["q"])
    assert 0 < int(drawn.reliable.sum()) < 10 and importance.unique().numel() > 2
    a, x = alphas_bar("scaled_linear")[row].sqrt().float().view(-1, 1, 1, 1), batch["eps"]
    s, names = (1 - a ** 2).sqrt(), taps(teacher.cfg)
    look = lambda net: net(x, row.float(), features=tuple(names.values()))
    mean = lambda h, k: h[names[k]].mean((2, 3))
    with torch.no_grad():
        (theirs, h), (mine, g) = look(teacher), look(tr.net)
        v = (theirs - s * x) / a
        total, bins, expected = (importance * (mine - v).square().flatten(1).mean(1)).mean(), row * 10 // 1000, []
        for k, weight in zip(names, w):
            (now, then), F = (judge.blocks[k](mean(features, k), bins) for features in (g, h)), torch.nn.functional
            e_t = (F.cross_entropy(now["t_logits"], bins) - F.cross_entropy(then["t_logits"], bins)).clamp(min=0)
            p = now["p_logits"].softmax(1)
            e_p = -(p * p.log()).sum(1).mean() / math.log(30)
            pairs = [abs(now["cantor"][i] - now["cantor"][j]) for i in range(8) for j in range(8) if i != j and bins[i] == bins[j]]
            coh = math.exp(-float(sum(pairs)) / len(pairs) / 0.1) if pairs else 1.0
            lam = min(max(weight * (1 + 0.9 * float(e_t) + 0.4 * float(e_p) + 0.6 * (1 - coh)), 0.1), 0.95)
            kd = 1 - F.cosine_similarity(mean(g, k), mean(h, k)).mean()
            local = (tr.loss.heads.net[k](g[names[k]]) - F.interpolate(v, g[names[k]].shape[2:], mode="bilinear")).square().mean()
            total, expected = total + 0.3 * lam * (70.0 * kd + local), [*expected, lam]
    assert pairs and len({round(lam, 4) for lam in expected}) > 2
    assert tr.loss(tr.model, batch).loss.item() == pytest.approx(total.item(), rel=1e-3)
    row, flow = tr.loss.report(), (importance * (mine - v).square().flatten(1).mean(1)).mean()
    assert row["blocks"]["mid"]["lambda"] == pytest.approx(expected[2], rel=1e-3) and row["block_share"] == pytest.approx(1 - float(flow / total), rel=1e-2)


def test_a_step_that_is_not_finite_leaves_no_trace_in_heads_or_log(home, tmp_path):
    tr = distill.setup(config(home, out=str(tmp_path), assessor="david", local_heads=True), ALONE)
    batch = next(batches(Stream(tr.ds, None, tr.latent_shape, 0), iter([list(range(8))])))
    before = {k: p.clone() for k, p in tr.loss.heads.net.named_parameters()}
    train.step(tr, iter([{**batch, "eps": batch["eps"] * math.nan}]))
    assert tr.skipped == 1 and all(torch.equal(p, before[k]) for k, p in tr.loss.heads.net.named_parameters())
    json.dumps(tr.loss.report(), allow_nan=False)
    train.step(tr, iter([batch]))
    assert all(torch.isfinite(p).all() and not torch.equal(p, before[k]) for k, p in tr.loss.heads.net.named_parameters())
    row = tr.loss.report()
    json.dumps(row, allow_nan=False)
    assert sum(row["t_drawn"]) == 8 and row["blocks"]["mid"]["lambda"] > 0.5
    breaks = tr.net.middle_block.register_forward_hook(lambda module, args, out: out * math.nan)
    train.step(tr, iter([batch]))                                               # half of the blocks are whole
    breaks.remove()
    assert tr.loss.tally.sums["batches"].item() == 0 == tr.loss.tally.sums["blocks"].abs().sum() and tr.skipped == 2
    train.step(tr, iter([batch]))
    broken = tr.loss.report()["blocks"]
    assert all(0.5 <= b["lambda"] <= 3 and b["e_t"] < 3 for b in broken.values()) and broken["down_0"]["kd"] < 0.5


def test_ranks_agree_on_what_is_above_the_teachers(home, tmp_path):
    """excess is of all samples: -1 here and +3 on the other rank are 1 on average, not 1.5."""
    tr = distill.setup(config(home, out=str(tmp_path), assessor="david", e_t="excess", coherence="data"), ALONE)
    loss = tr.loss
    assert loss.per_part == "--coherence data" and replace(loss, cfg=replace(loss.cfg, coherence="alpha")).per_part == ""
    found = torch.tensor([[-1.0, 0.5, 0.5]] * 5)
    loss.assessor.assess = lambda features, bins, coherence: dict(zip("abcde", found if features == "mine" else torch.zeros(5, 3)))

    class Two:
        world = 2

        def all_reduce(self, x):
            return x + torch.tensor([self.other, 0.5, 0.5])
    for other, wanted in ((3.0, 1.0), (-3.0, 0.0)):
        loss.ranks, Two.other = Two(), other
        assert loss.lambdas("mine", "theirs", loss.teacher.time(torch.arange(8)))[1][:, 2].tolist() == [wanted] * 5


def test_captions_depend_on_seed_and_position_alone():
    teacher = Teacher(None, EPS, {}, Path("stub"), {"context": torch.arange(5.0).view(5, 1, 1), "y": torch.arange(5.0).view(5, 1)})
    at = lambda seed, positions: teacher.text(seed, torch.tensor(positions), len(positions))["context"].flatten().tolist()
    drawn = at(0, list(range(40)))
    assert len(set(drawn)) == 5 and at(0, [7, 3]) == [drawn[7], drawn[3]] and at(1, list(range(40))) != drawn
    both = teacher.text(0, torch.arange(40), 40)
    assert both["y"].flatten().tolist() == drawn and teacher.text(0, None, 3)["context"].flatten().tolist() == [0, 0, 0]


def test_the_placebo_knows_the_features_scale_and_nothing_else(home):
    cfg = config(home, assessor="random")
    teacher, real = teacher_file.open_teacher(cfg.teacher), load_assessor(home / "a.safetensors")
    placebo = distill.open_assessor(cfg, teacher)
    for k, companion in placebo.blocks.items():
        assert torch.equal(companion.mean, real.blocks[k].mean) and torch.equal(companion.std, real.blocks[k].std) and companion.std.std() > 0
        assert not torch.equal(companion.t_head.weight, real.blocks[k].t_head.weight)
    assert not placebo.training and not any(p.requires_grad for p in placebo.parameters())


def test_an_assessor_of_noise_is_warned_of_where_data_is_shown(home, capsys):
    teacher = teacher_file.open_teacher(str(home / "teacher.safetensors"))
    for source in ("data", "noise"):
        distill.open_assessor(config(home, assessor="david", x_source=source), teacher)
        assert ("knows features of data, and --x-source is noise" in capsys.readouterr().out) == (source == "noise")


def test_a_student_sees_what_its_teacher_was_trained_on(home, tmp_path):
    net, meta = load_unet(home / "teacher.safetensors")
    trained = {"data": "toyfaces:48", "stage": "fine", "exclude_tags": ["glasses"], "holdout": 0.2}
    save_unet(tmp_path / "fine.safetensors", net, {**meta, "config": trained})
    like = lambda **fields: distill.resolve(distill.Config(teacher=str(tmp_path / "fine.safetensors"), **fields))
    found = like()
    assert (found.stage, found.exclude_tags, found.holdout, found.data) == ("fine", ("glasses",), 0.2, "toyfaces:48")
    other = like(data="toyfaces:64")
    assert (other.stage, other.exclude_tags, other.holdout) == ("standard", (), 0.02)
    told = like(stage="standard", holdout=0.02)                                 # what is given stays, also if it is what others have by default
    assert (told.stage, told.exclude_tags, told.holdout) == ("standard", (), 0.02)
    assert like(exclude_tags=("smile",)).exclude_tags == ("smile",)


def test_a_student_that_is_the_teacher_has_kd_zero_and_each_runs_once_a_step(home, tmp_path):
    tr = distill.setup(config(home, out=str(tmp_path), assessor="david"), ALONE)
    calls = {"teacher": 0, "student": 0}
    tr.loss.teacher.net.register_forward_hook(lambda *_: calls.update(teacher=calls["teacher"] + 1))
    tr.net.register_forward_hook(lambda *_: calls.update(student=calls["student"] + 1))
    frozen = {**{f"t.{k}": v.clone() for k, v in tr.loss.teacher.net.state_dict().items()}, **{f"a.{k}": v.clone() for k, v in tr.loss.assessor.state_dict().items()}}
    loader = batches(Stream(tr.ds, None, tr.latent_shape, 0), train.positions(tr.cfg, ALONE, 0))
    batch = next(loader)
    tr.loss(tr.model, batch).loss.backward()
    tr.loss.cfg = replace(tr.cfg, e_t="excess")
    seen = {k: torch.randn(8, C, 2, 2) for k, C in tap_channels(tr.net.cfg).items()}
    assert tr.loss.lambdas(seen, seen, tr.loss.teacher.time(torch.arange(8) * 100))[1][:, 2].tolist() == [0] * 5      # no worse than the teacher
    assert tr.loss.tally.sums["blocks"][:, 2].abs().max() < 1e-6 and calls == {"teacher": 1, "student": 1}
    tr.optimizer.zero_grad()
    for _ in range(4):
        train.step(tr, loader)
    now = {**{f"t.{k}": v for k, v in tr.loss.teacher.net.state_dict().items()}, **{f"a.{k}": v for k, v in tr.loss.assessor.state_dict().items()}}
    assert calls == {"teacher": 5, "student": 5} and same(frozen, now) and not tr.loss.assessor.training
    assert tr.loss.tally.sums["blocks"][:, 2].min() > 1e-6                                # it has moved away since


def test_the_assessor_is_a_small_part_of_a_steps_arithmetic():
    """At the default size (tiny, 8×8×32 latents) and the source's K, P and D: multiplications, for a clock would measure the machine."""
    from torch.utils.flop_counter import FlopCounterMode
    net, x, t = UNet(PRESETS["tiny"]), torch.zeros(4, 32, 8, 8), torch.zeros(4)
    judge = Assessor(AssessorConfig(tap_channels(net.cfg))).frozen()
    with FlopCounterMode(display=False) as step:
        with torch.no_grad():
            net(x, t)                                                           # the teacher
        out, h = net(x, t, features=tuple(taps(net.cfg).values()))
        out.sum().backward()
    with FlopCounterMode(display=False) as assessing:
        judge.assess({k: h[block].detach() for k, block in taps(net.cfg).items()}, torch.zeros(4, dtype=torch.long))
    assert 0 < assessing.get_total_flops() < 0.15 * step.get_total_flops()


def test_gradients_reach_the_blocks_through_kd_and_not_through_lambda(home, tmp_path):
    tr = distill.setup(config(home, out=str(tmp_path), assessor="david"), ALONE)
    mine = {k: torch.randn(8, C, 2, 2, requires_grad=True) for k, C in tap_channels(tr.net.cfg).items()}
    theirs = {k: torch.randn_like(v) for k, v in mine.items()}
    t = tr.loss.teacher.time(torch.arange(8) * 100)
    lam, _ = tr.loss.lambdas(mine, theirs, t)
    tr.loss.block_loss(mine, distill.Answer(t, None, None, None, theirs, None))[0].backward()
    for value, (name, x) in zip(lam, mine.items()):
        y = x.detach().clone().requires_grad_()
        (float(value) * 0.25 * kd_cosine(y, theirs[name])).backward()
        assert torch.allclose(x.grad, y.grad, atol=1e-7) and x.grad.abs().max() > 0


# ---- the run --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("optim", ["adamw", "adamw8bit"])
def test_resume_is_bitwise_with_heads_tally_and_adaptive_times(home, tmp_path, monkeypatch, optim):
    how = dict(assessor="david", local_heads=True, adaptive_t=True, shift=2.0, optim=optim, save_every=16, log_every=24, images=48, e_t="excess", coherence="data",
               x_source="noise" if optim == "adamw" else "data", importance=True)
    whole = go(home, tmp_path / "whole", **how)

    class Once:
        asks = 0

        def asked(self, ranks):
            Once.asks += 1
            return Once.asks > 2                                                # after two steps of six, mid-meter
    with monkeypatch.context() as m:
        m.setattr(train, "StopSignal", Once)
        cut = go(home, tmp_path / "cut", **how)
    assert int(checkpoints(cut)[-1].name) == 16 and not (cut / "samples").exists()
    go(home, tmp_path / "cut", **how)
    assert same(tensors(whole), tensors(cut)) and any(":own/heads/" in k for k in tensors(whole))
    strip = lambda line: {k: v for k, v in line.items() if k != "images_per_s"}
    assert [strip(r) for r in rows(whole)] == [strip(r) for r in rows(cut)] and len(rows(whole)) == 2


def test_three_kills_change_nothing(home, tmp_path):
    """SIGKILL, at random moments after a new checkpoint; the run ends as if nothing had happened. The log's lines and every tensor are the same."""
    flags = ["--teacher", home / "teacher.safetensors", "--assessor-file", home / "a.safetensors", "--assessor", "david", "--local-heads", "--adaptive-t",
             *(w for k, v in {**FAST, "images": 320, "save_every": 8, "log_every": 24, "name": "r"}.items() for w in (f"--{k.replace('_', '-')}", v))]
    begin = lambda out: subprocess.Popen([sys.executable, ROOT / "distill.py", *map(str, flags), "--out", out], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    finish = lambda process: (process.communicate()[0], process.returncode)
    text, code = finish(begin(tmp_path / "whole"))
    assert code == 0, text
    moments, run = random.Random(0), tmp_path / "cut" / "r"
    done = lambda: int(found[-1].name) if (found := checkpoints(run)) else 0
    for _ in range(3):
        process, before = begin(tmp_path / "cut"), done()
        wait_for(lambda: done() > before, process)
        time.sleep(moments.uniform(0, 0.15))
        kill_tree(process)
        assert done() < 320
    text, code = finish(begin(tmp_path / "cut"))
    assert code == 0 and "resuming" in text, text
    strip = lambda line: {k: v for k, v in line.items() if k != "images_per_s"}
    assert same(tensors(tmp_path / "whole" / "r"), tensors(run)) and [strip(r) for r in rows(tmp_path / "whole" / "r")] == [strip(r) for r in rows(run)]


def test_local_heads_learn_and_ranks_only_split_the_work(home, tmp_path):
    """Two ranks of four samples make the step of one rank of eight: λ, KD's gradient and the heads are averaged over ranks."""
    flags = ["--teacher", home / "teacher.safetensors", "--assessor-file", home / "a.safetensors", "--assessor", "david", "--local-heads", "--ema", "",
             *(str(w) for k, v in {**FAST, "images": 8, "name": "r"}.items() for w in (f"--{k.replace('_', '-')}", v))]
    for ranks in (1, 2):
        launcher = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run([*launcher, ROOT / "distill.py", *map(str, flags), "--out", tmp_path / str(ranks)], capture_output=True, text=True, env=os.environ)
        assert done.returncode == 0, done.stderr
    one, two = tensors(tmp_path / "1" / "r"), tensors(tmp_path / "2" / "r")
    moments = [k for k in one if "exp_avg/" in k] if one.keys() == two.keys() else []   # gradients; AdamW would hide their size
    assert len(moments) > 100 and all((one[k] - two[k]).norm() <= 1e-4 * one[k].norm() + 1e-7 for k in moments)
    fresh = distill.setup(config(home, out=str(tmp_path / "fresh"), local_heads=True), ALONE).loss.heads.net
    assert all((one[f"state.safetensors:own/heads/{k}"] - p).abs().max() > 1e-4 for k, p in fresh.named_parameters())
    a, b = (rows(tmp_path / r / "r")[0]["blocks"]["mid"] for r in "12")
    assert a["lambda"] == pytest.approx(b["lambda"], rel=1e-5) and a["e_t"] == pytest.approx(b["e_t"], rel=1e-5)


def test_the_alarm_rings_when_times_are_shifted_and_not_otherwise():
    teacher, blocks = stub(lambda: None), list(taps(PRESETS["nano"]))
    tally = lambda **how: Tally(blocks, ALONE, assessed=True, bins=10, **how)
    for counts, gradient, error, wanted in (
        ((30, 30, 30), (1, 1, 1), (1, 1, 1), ""),
        ((6, 6, 60), (1, 1, 1), (1, 1, 1), "weighting"),
        ((30, 30, 30), (9, 1, 1), (1, 1, 1), "weighting"),
        ((30, 30, 30), (1, 1, 9), (1, 1, 9), "target"),
    ):
        own = tally()
        for third, n in enumerate(counts):
            t = teacher.time(torch.full((n,), 166 + 333 * third))
            sizes = (torch.full((n,), float(gradient[third])), torch.full((n,), float(error[third])))
            own.add_times(t, bins_of(teacher.row(t), 3), *sizes)
        row = own.report()
        share = torch.tensor([n * g for n, g in zip(counts, gradient)], dtype=torch.float64)
        assert row["alarm"] == wanted and sum(row["t_drawn"]) == sum(counts)
        assert row["gradient_by_third"] == pytest.approx((share / share.sum()).tolist())
        assert own.sums["thirds"].sum() == 0
    progressive = tally(alarms=False)  # its times are its steps
    t = teacher.time(torch.full((8,), 999))
    progressive.add_times(t, torch.full((8,), 2), torch.ones(8), torch.ones(8))
    assert progressive.report()["alarm"] == ""
    progressive.load_state_dict({"alarmed/": torch.tensor(True)})
    assert progressive.alarmed  # a warning is not repeated on resume


def test_noise_as_the_source_shows_the_network_unit_noise_at_every_t():
    teacher, eps, t = stub(lambda: None), torch.randn(3, 3, 4, 4), torch.tensor([0.1, 0.5, 0.9])
    x = teacher.noised(torch.ones_like(eps), eps, t, "noise")
    assert torch.allclose(x / norm(t).view(-1, 1, 1, 1), eps, atol=1e-6)
    assert torch.equal(stub(lambda: None, make_objective("fm")).noised(eps, eps, t, "noise"), eps)


def test_a_students_checkpoint_says_what_it_is(home, arms, tmp_path, user):
    run = arms[0]["david"]
    net, meta = load_unet(checkpoints(run)[-1] / "model.safetensors")
    objective = Objective(**meta["objective"])
    assert (objective.target, objective.table) == ("v", "scaled_linear") and meta["init"]["teacher"] == load_unet(home / "teacher.safetensors")[1]["fingerprint"]
    code, out, err = user(samplers.main, "--ckpt", run, "--n", 2, "--steps", 2, "--out", tmp_path / "s")
    assert code == 0 and not err and (tmp_path / "s" / "000001.png").exists()


def test_sd_shaped_teacher_in_diffusers_layout_to_a_student_that_diffusers_loads(tmp_path, user):
    """Every trained block differs from the teacher's: the published checkpoints were, for a while, the teacher again."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    shape = dict(block_out_channels=(32, 64, 64, 64), cross_attention_dim=24, attention_head_dim=8, layers_per_block=2, norm_num_groups=32)
    theirs = randomize(diffusers.UNet2DConditionModel(in_channels=48, out_channels=48, **shape))
    theirs.save_pretrained(tmp_path / "sd")
    save_file({"context": torch.randn(5, 7, 24)}, tmp_path / "text.safetensors")
    flags = [str(w) for k, v in {**FAST, "images": 16, "log_every": 16}.items() for w in (f"--{k.replace('_', '-')}", v)]
    code, _, err = user(distill.main, "--teacher", tmp_path / "sd", "--teacher-objective", "eps", "--teacher-table", "scaled_linear", "--context",
                        tmp_path / "text.safetensors", "--vae", "pixel:4", "--data", "toyfaces:24", "--resolution", 32, "--out", tmp_path, "--name", "student", *flags)
    assert code == 0 and not [line for line in err if line.startswith("error")], err
    assert (tmp_path / "student" / "samples" / "final.png").exists()
    convert(checkpoints(tmp_path / "student")[-1] / "model.safetensors", tmp_path / "out", "diffusers")
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out")
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    block = lambda name: ".".join(name.split(".")[:4 if "blocks" in name else 1])
    changed = {block(k) for k in before if not torch.equal(before[k], after[k])}
    assert changed == {block(k) for k in before} and len(changed) > 40
    x, text = torch.randn(1, 48, 8, 8), torch.randn(1, 7, 24)
    own, _ = load_unet(checkpoints(tmp_path / "student")[-1] / "model.safetensors")
    with torch.no_grad():
        ours, out = own(x, torch.tensor([37.0]), context=text), again(x, 37, text).sample
    assert torch.allclose(ours, out, atol=1e-4 * float(out.abs().max()))


# ---- progressive ----------------------------------------------------------------------------------------------------

def test_one_step_of_the_progressive_target_is_two_steps_of_the_teacher(home, tmp_path):
    fields = dict(mode="progressive", start_steps=8, end_steps=4, out=str(tmp_path))
    tr = distill.setup(config(home, **fields), ALONE)
    assert tr.cfg.block_weight == 0
    x0, eps, q = torch.randn(8, 192, 4, 4), torch.randn(8, 192, 4, 4), (torch.arange(8) + 0.5).double() / 8
    t, x, a, b, _, _ = tr.loss.two_steps(x0, eps, q, {})
    grid = samplers.time_grid(8, t_start=tr.objective.t_max)
    assert sorted(set(t.tolist())) == pytest.approx(sorted(grid[0:8:2].tolist()))
    for i in range(8):
        j = (grid - t[i]).abs().argmin()
        two = samplers.sample(lambda z, s: tr.loss.teacher.objective.predict(tr.loss.teacher.net, z, s), x[i:i + 1], method="euler", grid=grid[j:j + 3])
        assert torch.allclose(x[i] + (grid[j + 2] - t[i]).float() * (b[i] - a[i]), two.x[0], atol=2e-3 * float(two.x.abs().max()))
        assert torch.allclose((1 - t[i]) * a[i] + t[i] * b[i], x[i], atol=1e-3 * float(a[i].abs().max()))   # on the line through x_t


def test_progressive_halves_run_by_run_and_resumes(home, tmp_path, user, monkeypatch):
    drawn, plain = [], samplers.sample
    monkeypatch.setattr(samplers, "sample", lambda *args, **how: drawn.append((how["method"], how.get("steps"))) or plain(*args, **how))
    flags = ["--teacher", home / "teacher.safetensors", "--mode", "progressive", "--start-steps", 4, "--end-steps", 1, "--out", tmp_path, "--name", "p",
             *(w for k, v in {**FAST, "images": 16}.items() for w in (f"--{k.replace('_', '-')}", v))]
    assert user(distill.main, *flags)[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p-1", "p-2"]
    assert set(drawn) == {("euler", 2), ("euler", 1)}                           # the runs' own pictures too
    first = json.loads((tmp_path / "p-1" / "config.json").read_text())
    assert (first["teacher"], first["start_steps"], first["end_steps"]) == (str(tmp_path / "p-2"), 2, 1)
    for steps in (1, 2):                                                        # without a flag, by the steps it was made for
        code, out, err = user(samplers.main, "--ckpt", tmp_path / f"p-{steps}", "--n", 2, "--out", tmp_path / "drawn" / str(steps))
        assert code == 0 and f"2 images  euler  NFE/image {steps} " in out, err
    assert "finished" in user(distill.main, *flags)[1]


def test_a_chain_starts_each_phase_from_its_teacher_and_is_not_mixed_with_another(tmp_path):
    cfg = distill.Config(mode="progressive", out=str(tmp_path), name="p", teacher="SD", teacher_objective="eps", teacher_table="scaled_linear", init="scratch", model="nano",
                         start_steps=8, end_steps=1, images=16)
    first, second, third = distill.phases(cfg)
    assert (first.teacher, first.init, first.model, first.teacher_objective, first.start_steps, first.end_steps) == ("SD", "scratch", "nano", "eps", 8, 4)
    assert (second.teacher, second.init, second.model, second.teacher_objective, second.teacher_table) == (str(tmp_path / "p-4"), "", "", "", "")
    assert (second.start_steps, second.end_steps, second.name, third.teacher, third.end_steps) == (4, 2, "p-2", str(tmp_path / "p-2"), 1)
    (tmp_path / "p-4" / "ckpt" / f"{8:012d}").mkdir(parents=True)
    assert len(distill.phases(cfg)) == 3
    with pytest.raises(UserError, match="p-4 is of another chain: p-8"):
        distill.phases(replace(cfg, start_steps=16))
    assert [p.name for p in distill.phases(distill.Config(name="x"))] == ["x"]


# ---- the ablation ---------------------------------------------------------------------------------------------------

def cards(fd, loss=lambda arm, seed: [1.0] * 8, seeds=(0, 1, 2)):
    return [{"arm": arm, "seed": s, "fd": fd(arm, s), "held_out": [{"images": 1, "loss": 1.0, "loss_by_t": loss(arm, s)}]} for arm in "BCDE" for s in seeds]


def test_the_verdict_follows_the_rule():
    better = lambda arm, s: 10 + 3 * s - (arm == "D") * (1 + 0.1 * s)           # paired: seeds differ by more than the arms
    assert verdict.verdict(cards(better))[0] == "supported"
    mean, error, n = verdict.paired(cards(better), "D", "B", lambda c: c["fd"])
    assert (mean, error, n) == (pytest.approx(-1.1), pytest.approx(0.1 / math.sqrt(3)), 3)
    assert verdict.verdict(cards(lambda arm, s: 10 + 3 * s + (arm == "D")))[0] == "not supported"
    assert verdict.verdict(cards(lambda arm, s: 10 - (arm == "D") * (s - 0.9)))[0] == "not supported"        # within two standard errors
    assert verdict.verdict(cards(lambda arm, s: better(arm, s) - 5 * (arm == "C")))[0] == "not supported"    # C is better still
    spoiled = lambda arm, s: [1.0] * 7 + [1.06 if arm == "D" else 1.0]
    answer, reasons = verdict.verdict(cards(better, spoiled))
    assert answer == "not supported" and any("1.060 (above 1.05)" in r for r in reasons)
    late = cards(better)
    for card in late:
        card["held_out"].insert(0, {"images": 0, "loss": 9.0, "loss_by_t": [9.0 * (1 + (card["arm"] == "D"))] * 8})
    assert verdict.verdict(late)[0] == "supported"                               # the last evaluation counts
    assert any("a gain of 0.89% would have been" in r for r in verdict.verdict(late)[1]), verdict.verdict(late)[1]
    dosed = cards(better)
    for card in dosed:
        card |= {"blocks": {"mid": {"clipped": [0.0, 0.5], "lambda": [1.0, 1.2]}}, "block_share": [0.01, 0.03]}
    assert any("clipped 25% of the time and drifted by 9.1% of itself over a run; the blocks' losses were 2.0% of the loss" in r for r in verdict.verdict(dosed)[1])
    assert not any("treatment" in r for r in verdict.verdict(late)[1])
    assert verdict.verdict(cards(better, seeds=(0, 1)))[0] == "open" == verdict.verdict([c for c in cards(better) if c["arm"] != "C"])[0]
    curve = lambda arm, s: [{"images": i, "loss": 10 / i + (arm == "B") * (4 - s), "loss_by_t": [1.0]} for i in (1, 2, 4)]
    curves = [{"arm": arm, "seed": s, "held_out": curve(arm, s)} for arm in "AB" for s in (2, 4)]
    curves[-1]["held_out"][1]["loss"] = 2.4                                     # B, seed 4, is faster; seed 2 never gets there
    assert verdict.images_to(curves, "B", "A") == [2] and verdict.images_to(curves, "A", "A") == [4, 4]
    _, reasons = verdict.verdict(cards(lambda arm, s: better("D" if arm == "E" else arm, s)))
    assert any("D is not better than an assessor that was never trained" in r for r in reasons)


def test_arms_are_what_the_table_says(home):
    shared = dict(teacher=str(home / "teacher.safetensors"), assessor_file=str(home / "a.safetensors"), alpha=0.6, e_t="excess", local_heads=True, base_jitter=7)
    fields = ("assessor", "block_weight", "adaptive_t", "shift", "local_heads", "alpha", "e_t", "base_jitter")
    wanted = {"A": ("none", 0.0, False, 1.0, False, 0.5, "abs", 5), "B": ("none", 0.05, False, 1.0, True, 0.5, "abs", 5),
              "C": ("const", 0.05, False, 1.0, True, 0.5, "abs", 5), "D": ("david", 0.05, False, 1.0, True, 0.6, "excess", 5),
              "E": ("random", 0.05, False, 1.0, True, 0.6, "excess", 5), "S": ("shuffled", 0.05, False, 1.0, True, 0.6, "excess", 5),
              "F": ("david", 0.05, True, 1.0, True, 0.6, "excess", 7), "G": ("none", 0.0, False, 3.0, False, 0.5, "abs", 5)}
    assert ablate.ARMS.keys() == wanted.keys()
    for arm, values in wanted.items():
        own = ablate.arm_config(shared, arm, 4, (1.0, 2.0, 3.0, 2.0, 1.0) if arm == "C" else ())
        assert tuple(getattr(own, f) for f in fields) == values and own.seed == 4 and own.name == f"{arm}-4"
        assert own.lambdas == ((1.0, 2.0, 3.0, 2.0, 1.0) if arm == "C" else ())


def test_mean_weights_count_images_and_not_lines(tmp_path):
    lines = [{"event": "train", "images": i, "blocks": {"mid": {"lambda": lam}}} for i, lam in ((160, 1.0), (320, 1.5), (336, 3.0))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [{"event": "start", "images": 0}, *lines]))
    assert ablate.mean_lambdas(tmp_path) == pytest.approx(((160 + 240 + 48) / 336,))


def test_the_ablation_runs_reports_and_goes_on(home, tmp_path, user):
    flags = ["--teacher", home / "teacher.safetensors", "--assessor-file", home / "a.safetensors", "--arms", "B,C,D", "--seeds", "3", "--out", tmp_path,
             "--fd-images", 8, "--fd-steps", 1, *(w for k, v in {**FAST, "images": 16, "eval_every": 8}.items() for w in (f"--{k.replace('_', '-')}", v))]
    code, out, err = user(ablate.main, *flags)
    assert code == 0, err
    report = json.loads((tmp_path / "ablation.json").read_text())
    assert report["verdict"] == "open" and {c["arm"] for c in report["cards"]} == {"B", "C", "D"} and (tmp_path / "ablation.png").stat().st_size > 10_000
    by = {c["arm"]: c for c in report["cards"]}
    mean = [sum(b["lambda"]) / len(b["lambda"]) for b in by["D"]["blocks"].values()]
    assert by["C"]["config"]["lambdas"] == pytest.approx(mean) and by["C"]["blocks"]["mid"]["lambda"][0] == pytest.approx(mean[2], rel=1e-6)
    assert [len(c["held_out"]) for c in report["cards"]] == [2, 2, 2] and all(c["fd"] > 0 for c in report["cards"])
    hold, device = report["references"], torch.device("cpu")
    ds = open_dataset("toyfaces:48", resolution=32, holdout=0.1)
    assert hold["teacher"] == pytest.approx(eval_fid.distance(home / "teacher.safetensors", ds, 8, 1, device)) and 0 < hold["floor"] < hold["teacher"]
    assert by["B"]["fd"] == pytest.approx(eval_fid.distance(tmp_path / "B-3", ds, 8, 1, device)) != eval_fid.distance(tmp_path / "B-3", ds, 8, 1, device, seed=8)
    assert "D and B share 1 of the 3 seeds" in (tmp_path / "ablation.txt").read_text()
    (tmp_path / "references.json").write_text(json.dumps({**hold, "floor": 7.5}))
    again = user(ablate.main, *flags)[1]
    assert json.loads((tmp_path / "ablation.json").read_text())["references"]["floor"] == 7.5                # taken from the file
    assert again.count("finished:") == 3 and "loss" not in again.split("Assessor-weighted")[0]              # nothing is run twice


def test_fd_by_inception_is_of_its_features(home, monkeypatch):
    """Wiring only, with a network that names mean colours; Inception itself is test_fid.py's."""
    colours = lambda images: images.float().mean((2, 3))
    monkeypatch.setattr(eval_fid, "load_inception", lambda device: colours)
    ds, device = open_dataset("toyfaces:48", resolution=32, holdout=0.1), torch.device("cpu")
    drawn = eval_fid.generate(home / "teacher.safetensors", 8, 2, device, "euler", seed=5)[0]
    wanted = frechet_from_features(colours(drawn), colours(ds.images(range(8))))
    assert eval_fid.distance(home / "teacher.safetensors", ds, 8, 2, device, "euler", "inception", seed=5) == pytest.approx(wanted) and wanted > 1


# ---- bad input ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def odd(home):
    """Assessors and teachers that do not fit."""
    net, meta = load_unet(home / "teacher.safetensors")
    drop = lambda *keys: {k: v for k, v in meta.items() if k not in keys}
    save_unet(home / "silent.safetensors", net, drop("objective"))
    save_unet(home / "linear.safetensors", net, {**meta, "objective": {**meta["objective"], "table": "linear"}})
    save_unet(home / "nodata.safetensors", net, drop("config"))
    save_unet(home / "nolatents.safetensors", net, drop("vae"))
    wide = randomize(UNet(replace(PRESETS["nano"], in_channels=192, out_channels=192, channel_mult=(1, 2))))
    save_unet(home / "wide.safetensors", wide, meta)
    good, card = read_tensors(home / "a.safetensors")
    write_tensors(home / "damaged.safetensors", {**good, "accuracy": good["accuracy"] + 1}, card)
    write_tensors(home / "control.safetensors", good, {**card, "pretraining": {**card["pretraining"], "shuffle_time": True}})
    write_tensors(home / "zero.safetensors", good, {**card, "objective": {**card["objective"], "zero_snr": True}})
    save_unet(home / "pixel4.safetensors", net, {**meta, "vae": pixel(4).meta()})
    save_unet(home / "big.safetensors", net, {**meta, "resolution": 64})
    short = {k: v for k, v in good.items() if k != "blocks.mid.alpha"}
    write_tensors(home / "short.safetensors", short, {**card, "fingerprint": fingerprint(short)})
    prefixed = {f"unet.{k}": v for k, v in good.items()}
    write_tensors(home / "prefixed.safetensors", prefixed, {**card, "fingerprint": fingerprint(prefixed)})
    return home


BAD = {
    "no teacher": (["--teacher", ""], "--teacher is required"),
    "absent teacher": (["--teacher", "nowhere"], "no checkpoint at nowhere"),
    "unknown objective": (["--teacher", "HOME/silent.safetensors"], "does not say what its network was trained to output"),
    "objective without table": (["--teacher", "HOME/silent.safetensors", "--teacher-objective", "eps"], "needs its noise schedule"),
    "contradicted objective": (["--teacher-objective", "v"], "Leave them out"),
    "no data": (["--teacher", "HOME/nodata.safetensors"], "--data is required"),
    "no latents": (["--teacher", "HOME/nolatents.safetensors"], "--vae is required"),
    "other latents": (["--teacher", "HOME/nolatents.safetensors", "--vae", "pixel"], "makes 3 channels, but the teacher"),
    "other vae": (["--vae", "pixel:4"], "the teacher was trained on other latents"),
    "resolution": (["--resolution", "64"], "the teacher was trained at 32"),
    "bounds": (["--lam-min", "3", "--lam-max", "0.5"], "--lam-min 3.0 is above --lam-max 0.5"),
    "nan": (["--assessor", "david", "--alpha", "nan"], "--alpha nan: wanted"),
    "david without file": (["--assessor", "david", "--assessor-file", ""], "needs --assessor-file"),
    "not an assessor": (["--assessor", "david", "--assessor-file", "HOME/teacher.safetensors"], "holds no assessor"),
    "other bins": (["--assessor", "david", "--teacher", "HOME/linear.safetensors"], "10 bins on the schedule scaled_linear, the teacher is on linear"),
    "other blocks": (["--assessor", "david", "--teacher", "HOME/wide.safetensors"], "reads blocks"),
    "damaged": (["--assessor", "david", "--assessor-file", "HOME/damaged.safetensors"], "do not match their own fingerprint"),
    "missing tensor": (["--assessor", "david", "--assessor-file", "HOME/short.safetensors"], "1 missing: blocks.mid.alpha"),
    "prefix": (["--assessor", "david", "--assessor-file", "HOME/prefixed.safetensors"], "missing"),
    "lambdas": (["--assessor", "const", "--assessor-file", "", "--lambdas", "1,2"], "--lambdas 1.0,2.0: wanted 5 numbers from 0, for down_0, "),
    "lambdas without const": (["--lambdas", "1,1,1,1,1"], "--lambdas changes nothing here: it is of --assessor const"),
    "table": (["--table", "cosine"], "the teacher's schedule is scaled_linear"),
    "halving": (["--mode", "progressive", "--start-steps", "6", "--end-steps", "1"], "by halving"),
    "progressive david": (["--mode", "progressive", "--assessor", "david"], "--assessor changes nothing here: it is of --mode flow"),
    "progressive path": (["--mode", "progressive", "--objective", "fm"], "stays on its teacher's path"),
    "progressive weight": (["--mode", "progressive", "--block-weight", "3"], "--block-weight changes nothing"),
    "idle steps": (["--start-steps", "4"], "--start-steps changes nothing"),
    "idle alpha": (["--alpha", "0.7"], "--alpha changes nothing here: it is of --assessor david"),
    "idle assessor file": (["--assessor-file", "HOME/a.safetensors"], "--assessor-file changes nothing"),
    "idle jitter": (["--base-jitter", "1"], "--base-jitter changes nothing here: it is of --adaptive-t"),
    "idle density": (["--adaptive-t", "--density", "logit_normal"], "--density changes nothing"),
    "idle without blocks": (["--assessor", "david", "--block-weight", "0", "--alpha", "2"], "--alpha changes nothing here: it is of --block-weight"),
    "no loss for blocks": (["--kd-weight", "0"], "leaves the blocks no loss"),
    "idle time": (["--objective", "fm", "--t-loc", "1"], "--t-loc changes nothing here: it is of --density logit_normal"),
    "idle direction": (["--shift-dir", "clean"], "--shift-dir changes nothing"),
    "idle heads": (["--local-heads", "--block-weight", "0"], "--local-heads changes nothing"),
    "idle weights": (["--assessor", "const", "--lambdas", "1,1,1,1,1", "--block-weights", "1,1,1,1,1", "--assessor-file", ""], "--block-weights changes nothing"),
    "nan weights": (["--block-weights", "1,1,nan,1,1"], "--block-weights 1.0,1.0,nan,1.0,1.0: wanted at least 0"),
    "control": (["--assessor", "david", "--assessor-file", "HOME/control.safetensors"], "as a control"),
    "zero snr": (["--assessor", "david", "--assessor-file", "HOME/zero.safetensors"], "on the schedule scaled_linear, zero SNR, the teacher is on scaled_linear"),
    "init latents": (["--init", "HOME/pixel4.safetensors", "--teacher", "HOME/nolatents.safetensors", "--vae", "pixel:8"], "was trained on other latents"),
    "init size": (["--init", "HOME/big.safetensors"], "was trained at 64 pixels, the teacher at 32"),
    "model": (["--model", "tiny"], "add --init scratch"),
    "blocks": (["--model", "tiny", "--init", "scratch"], "they cannot be compared"),
    "text": (["--context", "x"], "takes no text"),
    "command": (["frobnicate"], "command 'frobnicate'"),
    "ablate": (["ablate"], "python experiments/ablate.py"),
    "flag": (["--asessor", "none"], "unknown flag --asessor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, odd, tmp_path, user):
    args, message = BAD[case]
    args = [w.replace("HOME", str(odd)) for w in args]
    reads = ["--assessor-file", odd / "a.safetensors"] if "--assessor" in args or "--adaptive-t" in args else []
    base = [] if case in ("command", "ablate") else ["--teacher", odd / "teacher.safetensors", *reads, "--out", tmp_path / "out", "--images", 16]
    given = set(args)
    base = [w for i, w in enumerate(base) if w not in given and (i == 0 or base[i - 1] not in given)]
    code, _, err = user(distill.main, *args, *base)
    assert code == 2 and len(err) == 1 and err[0].startswith("error: ") and message in err[0]
    assert not (tmp_path / "out").exists()


def test_bad_ablations_and_pretrainings(home, tmp_path, user, capsys):
    base = ["--teacher", home / "teacher.safetensors", "--out", tmp_path / "out"]
    for args, message in ((["--arms", "A,X"], "--arms X"), (["--arms", "C"], "C need D"), (["--arms", "D"], "need --assessor-file"), (["--seeds", "1,1"], "none twice"),
                          (["--arms", "A", "--log-every", "0"], "made from the logs"), (["--arms", "A", "--fd-images", "1"], "--fd-images 1: wanted"),
                          (["--arms", "A", "--seed", "1"], "--seed is what the arms"), (["--arms", "A", "--mode", "progressive"], "--mode is what the arms"),
                          (["--arms", "A", "--block-weight", "0"], "all arms would be one"), (["--arms", "A", "--kd-weight", "0"], "all arms would be one"),
                          (["--arms", "A,G", "--shift", "2"], "arm G is A with --shift 3"), (["--arms", "A", "--teacher", ""], "--teacher is required"),
                          (["--arms", "A,B", "--alpha", "7"], "--alpha changes nothing here: none of the arms A,B"), (["--arms", "A,B", "--assessor-file", "x"], "--assessor-file changes"),
                          (["--arms", "A,D", "--assessor-file", home / "a.safetensors", "--importance"], "--importance changes nothing"),
                          (["--arms", "A,D", "--assessor-file", home / "a.safetensors", "--alpha", "nan"], "--alpha nan")):
        code, _, err = user(ablate.main, *base, *args)
        assert code == 2 and len(err) == 1 and message in err[0], err
    tensors_, card = read_tensors(home / "a.safetensors")
    write_tensors(home / "poor.safetensors", tensors_, {**card, "held_out": {"mean": 0.29, "chance": 0.1}})
    code, _, err = user(ablate.main, *base, "--arms", "B,C,D", "--assessor-file", home / "poor.safetensors")
    assert code == 2 and "below three times chance" in err[0]
    write_tensors(home / "foreign.safetensors", tensors_, {**card, "teacher": "0" * 64})
    code, _, err = user(ablate.main, *base, "--arms", "B,C,D", "--assessor-file", home / "foreign.safetensors")
    assert code == 2 and "another teacher's features" in err[0]
    code, _, err = user(distill.main, "pretrain-assessor", "--teacher", home / "teacher.safetensors", "--out", home / "a.safetensors")
    assert code == 2 and "exists, by other flags" in err[0]
    code, out, _ = user(distill.main, "pretrain-assessor", "--teacher", home / "teacher.safetensors", "--out", home / "a.safetensors", "--bins", 10, "--patterns", 3, "--dim", 24,
                        "--samples", 1024, "--profile-samples", 200, "--holdout", 0.1, "--steps", 200, "--batch", 64, "--lr", 1e-2)
    assert code == 0 and "was made by this command" in out                      # the fixture's
    code, _, err = user(distill.main, "--teacher", home / "teacher.safetensors", "--assessor", "david", "--assessor-file", home, "--dry-run")
    assert code == 2 and "no assessor at" in err[0]
    code, _, err = user(distill.main, "pretrain-assessor", "--teacher", home / "teacher.safetensors", "--bins", "1", "--out", tmp_path / "b.safetensors")
    assert code == 2 and "--bins 1" in err[0]
    code, _, err = user(distill.main, "pretrain-assessor", "--teacher", home / "teacher.safetensors", "--profile-samples", "99", "--out", tmp_path / "b.safetensors")
    assert code == 2 and "--profile-samples 99: wanted 100" in err[0]


def test_no_reliable_bin_falls_back_to_uniform_and_says_so(home, tmp_path, capsys):
    weights, card = read_tensors(home / "a.safetensors")
    weights["accuracy"].fill_(0.149)
    write_tensors(tmp_path / "a.safetensors", weights, {**card, "fingerprint": fingerprint(weights)})
    run = go(home, tmp_path, adaptive_t=True, assessor_file=str(tmp_path / "a.safetensors"), images=8)
    assert "none is, so all rows are drawn alike" in capsys.readouterr().out and checkpoints(run)


def test_contents_are_compared_and_not_paths_also_of_finished_runs(home, tmp_path):
    """Another teacher, assessor or placebo in the same place is noticed, before config.json is written; a moved one goes on."""
    net, meta = load_unet(home / "teacher.safetensors")
    weights, card = read_tensors(home / "a.safetensors")
    here = {"teacher": tmp_path / "t.safetensors", "assessor_file": tmp_path / "a.safetensors"}

    def put(teacher=net, judge=weights):
        save_unet(here["teacher"], teacher, {k: v for k, v in meta.items() if k != "probe"})
        write_tensors(here["assessor_file"], judge, {**card, "fingerprint": fingerprint(judge)})
    other_net, other_judge = randomize(UNet(net.cfg), 5), {**weights, "blocks.mid.alpha": weights["blocks.mid.alpha"] + 1}
    for assessor in ("david", "random"):
        how = dict(assessor=assessor, images=16, name=assessor)
        put()
        run = go(home, tmp_path, **how, **{k: str(v) for k, v in here.items()})
        before = (run / "config.json").read_text()
        for finished in (True, False):
            if not finished:
                (run / "samples" / "final.png").unlink()
            for what, contents in (("teacher", dict(teacher=other_net)), ("assessor", dict(judge=other_judge))):
                put(**contents)
                with pytest.raises(UserError, match=f"is not the {what} that"):
                    go(home, tmp_path, **how, **{k: str(v) for k, v in here.items()})
                assert (run / "config.json").read_text() == before
        if assessor == "random":
            with pytest.raises(UserError, match="no assessor is not the assessor that"):
                go(home, tmp_path, **how, assessor_file="")
        go(home, tmp_path, **how)                                               # home's, which these were copies of
        assert (run / "samples" / "final.png").exists()


def test_weights_without_an_assessor_stay_in_bounds_and_given_ones_are_kept(home, tmp_path):
    setup = lambda name, **fields: distill.setup(config(home, out=str(tmp_path), name=name, **fields), ALONE).loss.weights.tolist()
    assert setup("a", block_weights=(0.1, 1.0, 5.0, 1.0, 0.7)) == pytest.approx([0.5, 1.0, 3.0, 1.0, 0.7])
    assert setup("b", assessor="const", lambdas=(0.1, 1.0, 5.0, 1.0, 0.7)) == pytest.approx([0.1, 1.0, 5.0, 1.0, 0.7])
    assert setup("c", assessor="david", block_weights=(0.1, 1.0, 5.0, 1.0, 0.7)) == pytest.approx([0.1, 1.0, 5.0, 1.0, 0.7])   # fuse's w


def test_a_stopped_run_says_so_and_no_other_begins(home, tmp_path, monkeypatch):
    """Also when the signal came while its last pictures were drawn."""
    begun, cfg = [], config(home, out=str(tmp_path), images=8)

    class Late:
        def asked(self, ranks):
            return bool(begun)
    monkeypatch.setattr(train, "StopSignal", Late)
    monkeypatch.setattr(train, "finish", lambda tr: begun.append(tr.seen) or train.save(tr))
    assert distill.run(cfg, ALONE) is True and begun == [8]
    begun.clear()
    monkeypatch.setattr(sys, "argv", ["distill.py", "--teacher", str(home / "teacher.safetensors"), "--mode", "progressive", "--start-steps", "4", "--out", str(tmp_path),
                                      "--name", "p", "--images", "8", "--batch", "8"])
    distill.main()
    assert begun == [8] and not (tmp_path / "p-1").exists()


def test_an_architecture_of_its_own(home, tmp_path):
    """Without the blocks' losses any preset may learn from the teacher, from scratch."""
    run = go(home, tmp_path, model="tiny", init="scratch", block_weight=0.0, images=8)
    net, _ = load_unet(checkpoints(run)[-1] / "model.safetensors")
    assert net.cfg == UNetConfig(**{**PRESETS["tiny"].__dict__, "in_channels": 192, "out_channels": 192})
