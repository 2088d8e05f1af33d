"""Distillation: the loss written out, the arms against each other bit for bit, the files against
what they came from."""

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
from distilling import few_samples, home  # noqa: F401
from distilling import ALONE, FAST, config, go, rows, same, stub, tensors, words
from test_resume import kill_tree, wait_for

import distill
import distillation.teacher as teacher_file
import samplers
import train
from ckpt import convert, fingerprint, load_unet, read_tensors, save_unet
from data.dataset import Stream, batches
from diffusion.schedules import alphas_bar, norm
from distill import fuse, kd_cosine
from distillation.assessor import block_weights, load_assessor
from distillation.teacher import Teacher, tap_channels, taps, without_variance
from distillation.timesteps import make_sampler
from harness.cli import UserError
from harness.files import write_tensors
from harness.run import checkpoints
from model import PRESETS, UNet, UNetConfig, build
from objectives import Objective, make_objective
from training import precision
from vae import pixel

ROOT = Path(__file__).parent.parent


def test_a_flow_student_of_an_eps_teacher_is_asked_for_eps_minus_x0_also_beyond_the_schedule():
    n = norm(torch.tensor(0.3, dtype=torch.float64))
    a, s = 0.7 / n, 0.3 / n
    assert [1 / n, a, s, 2 * math.log(a / s)] == pytest.approx(
        [1.313064, 0.919145, 0.393919, 1.694596], abs=1e-6
    )
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(3, 3, 8, 8, generator=g) for _ in range(2))
    t = torch.tensor([0.3, 0.99, 1.0])  # SD's table ends at 0.936
    teacher, asked = stub(lambda x, row, features: (eps, {f: x for f in features})), []
    student = lambda x, row, **c: asked.append((x, row)) or torch.zeros_like(x)
    loss_of = distill.DistillLoss(
        distill.Config(), ALONE, pixel(1), make_objective("fm"), None, teacher, torch.ones(5)
    )
    image = ((x0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    with torch.no_grad():
        loss = loss_of(student, {"image": image, "eps": eps, "t": t})
    x0 = image.float() / 127.5 - 1
    assert loss.per_sample.tolist() == pytest.approx(
        (eps - x0).square().flatten(1).mean(1).tolist(), rel=1e-4
    )
    assert torch.allclose(
        asked[0][0], (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * eps
    ) and asked[0][1].tolist() == pytest.approx((t * 1000).tolist())


ARMS = {
    "vanilla": dict(block_weight=0.0),
    "none": {},
    "david": dict(assessor="david"),
    "random": dict(assessor="random"),
    "shuffled": dict(assessor="shuffled"),
    "const": dict(assessor="const", assessor_file="", lambdas=(1.0, 2.0, 3.0, 2.0, 1.0)),
}


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
    assert (
        all(prints[:10] == seen["vanilla"][:10] for prints in seen.values())
        and len(set(seen["vanilla"][:10])) == 10
    )
    weights = {name: tensors(run)["model.safetensors:out.2.weight"] for name, run in runs.items()}
    assert len({fingerprint({"w": w}) for w in weights.values()}) == len(ARMS)
    lam = {
        name: {k: b["lambda"] for k, b in rows(run)[-1]["blocks"].items()}
        for name, run in runs.items()
        if name != "vanilla"
    }
    assert list(lam["none"].values()) == pytest.approx([0.7, 1.0, 1.2, 1.0, 0.7]) and list(
        lam["const"].values()
    ) == [1, 2, 3, 2, 1]
    assert (
        list(lam["shuffled"].values()) != list(lam["david"].values())
        and "blocks" not in rows(runs["vanilla"])[-1]
    )
    assert all(
        b.keys() == {"lambda", "clipped", "kd"} for b in rows(runs["none"])[0]["blocks"].values()
    )
    first = {
        name: list(v["lambda"] for v in rows(runs[name])[0]["blocks"].values())
        for name in ("david", "shuffled")
    }
    assert first["shuffled"] == pytest.approx(
        first["david"][-2:] + first["david"][:-2]
    )  # the first batch's, from equal students


def test_lambda_moves_and_the_log_says_what_it_is_made_of(arms):
    lines = rows(arms[0]["david"])
    assert (
        len({line["blocks"]["down_0"]["lambda"] for line in lines}) > 3
    )  # alive: another one in every batch
    for line in lines:
        assert sum(line["t_drawn"]) == 8 and sum(line["gradient_by_third"]) == pytest.approx(
            1
        ) == pytest.approx(sum(line["gradient_by_third_unweighted"]))
        for name, b in line["blocks"].items():
            w = block_weights(PRESETS["nano"])[name]
            assert b["lambda"] == pytest.approx(
                fuse(b["e_t"], b["e_p"], b["coh"], w), rel=1e-5
            ) and b["clipped"] == float(b["lambda"] in (0.5, 3.0))
    chance = rows(arms[0]["random"])[0]["blocks"]["mid"]
    assert (
        chance["e_t"] == pytest.approx(math.log(10), abs=0.4)
        and rows(arms[0]["david"])[0]["blocks"]["up_0"]["e_t"] < math.log(10) - 0.4
    )


def test_null_equivalences_are_bitwise(home, arms, tmp_path):
    """none = const with λ = w; block_weight 0 = a loss that never looks at a block, whatever the
    arm; and another λ is another student."""
    runs, _ = arms
    w = tuple(block_weights(PRESETS["nano"]).values())
    const = go(home, tmp_path, images=80, assessor="const", assessor_file="", lambdas=w)
    assert same(tensors(runs["none"]), tensors(const)) and [r["loss"] for r in rows(const)] == [
        r["loss"] for r in rows(runs["none"])
    ]
    off = go(home, tmp_path, images=80, assessor="david", block_weight=0.0, name="off")
    assert same(tensors(runs["vanilla"]), tensors(off)) and not same(
        tensors(runs["none"]), tensors(off), "model"
    )


def test_vanilla_is_mse_to_the_teachers_v_by_an_independent_loop(home, tmp_path):
    """Two steps of SGD-free arithmetic: the first batch's loss, written out in VP's coordinates."""
    cfg = config(home, out=str(tmp_path), images=8, block_weight=0.0)
    tr = distill.setup(cfg, ALONE)
    batch = next(batches(Stream(tr.ds, None, tr.latent_shape, cfg.seed), iter([list(range(8))])))
    x0, eps, k = (
        tr.vae.encode(batch["image"].float() / 127.5 - 1),
        batch["eps"],
        (batch["q"] * 1000).floor().long(),
    )
    a = alphas_bar("scaled_linear")[k].sqrt().view(-1, 1, 1, 1)
    s = (1 - a**2).sqrt()
    x_t = (a * x0 + s * eps).float()
    net, _ = load_unet(home / "teacher.safetensors")
    with torch.no_grad():
        out = net(x_t, k.float())  # teacher and student are equal at first
        v = (out - s * x_t) / a
        wanted = (out - v).square().flatten(1).mean(1)
    got = tr.loss(tr.model, batch)
    assert got.per_sample.tolist() == pytest.approx(
        wanted.tolist(), rel=1e-3
    ) and got.loss.item() == pytest.approx(wanted.mean().item(), rel=1e-3)


def test_the_whole_loss_with_every_setting_off_its_default_written_out(home, tmp_path):
    w = [0.5, 0.6, 0.7, 0.8, 0.9]
    cfg = config(
        home,
        out=str(tmp_path),
        assessor="david",
        local_heads=True,
        block_weight=0.3,
        kd_weight=70.0,
        alpha=0.9,
        beta=0.4,
        delta=0.6,
        lam_min=0.1,
        lam_max=0.95,
        coherence="data",
        e_t="excess",
        block_weights=tuple(w),
        adaptive_t=True,
        importance=True,
        shift=2.0,
        shift_dir="clean",
        base_jitter=30,
        adaptive_chaos=False,
        reliability=0.8,
        unreliable="drop",
        difficulty_gain=2.0,
        x_source="noise",
    )
    tr = distill.setup(cfg, ALONE)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():  # a student that has left its teacher
        for p in tr.net.parameters():
            p.add_(0.3 * p.abs().mean() * torch.randn(p.shape, generator=noise))
    batch = next(batches(Stream(tr.ds, None, tr.latent_shape, cfg.seed), iter([list(range(8))])))
    judge, teacher = (
        load_assessor(home / "a.safetensors"),
        load_unet(home / "teacher.safetensors")[0],
    )
    drawn = make_sampler(
        judge.accuracy,
        judge.entropy,
        shift=0.5,
        base_jitter=30,
        chaos=False,
        threshold=0.8,
        unreliable="drop",
        gain=2.0,
    )
    row, importance = drawn.draw(batch["q"])
    assert 0 < int(drawn.reliable.sum()) < 10 and importance.unique().numel() > 2
    a, x = alphas_bar("scaled_linear")[row].sqrt().float().view(-1, 1, 1, 1), batch["eps"]
    s, names = (1 - a**2).sqrt(), taps(teacher.cfg)
    look = lambda net: net(x, row.float(), features=tuple(names.values()))
    mean = lambda h, k: h[names[k]].mean((2, 3))
    with torch.no_grad():
        (theirs, h), (mine, g) = look(teacher), look(tr.net)
        v = (theirs - s * x) / a
        total, bins, expected = (
            (importance * (mine - v).square().flatten(1).mean(1)).mean(),
            row * 10 // 1000,
            [],
        )
        for k, weight in zip(names, w):
            (now, then), F = (
                (judge.blocks[k](mean(features, k), bins) for features in (g, h)),
                torch.nn.functional,
            )
            e_t = (
                F.cross_entropy(now["t_logits"], bins) - F.cross_entropy(then["t_logits"], bins)
            ).clamp(min=0)
            p = now["p_logits"].softmax(1)
            e_p = -(p * p.log()).sum(1).mean() / math.log(30)
            pairs = [
                abs(now["cantor"][i] - now["cantor"][j])
                for i in range(8)
                for j in range(8)
                if i != j and bins[i] == bins[j]
            ]
            coh = math.exp(-float(sum(pairs)) / len(pairs) / 0.1) if pairs else 1.0
            lam = min(
                max(weight * (1 + 0.9 * float(e_t) + 0.4 * float(e_p) + 0.6 * (1 - coh)), 0.1), 0.95
            )
            kd = 1 - F.cosine_similarity(mean(g, k), mean(h, k)).mean()
            local = (
                (
                    tr.loss.heads.net[k](g[names[k]])
                    - F.interpolate(v, g[names[k]].shape[2:], mode="bilinear")
                )
                .square()
                .mean()
            )
            total, expected = total + 0.3 * lam * (70.0 * kd + local), [*expected, lam]
    assert pairs and len({round(lam, 4) for lam in expected}) > 1
    assert tr.loss(tr.model, batch).loss.item() == pytest.approx(total.item(), rel=1e-3)
    row, flow = tr.loss.report(), (importance * (mine - v).square().flatten(1).mean(1)).mean()
    assert row["blocks"]["mid"]["lambda"] == pytest.approx(expected[2], rel=1e-3) and row[
        "block_share"
    ] == pytest.approx(1 - float(flow / total), rel=1e-2)


def test_a_step_that_is_not_finite_leaves_no_trace_in_heads_or_log(home, tmp_path):
    tr = distill.setup(config(home, out=str(tmp_path), assessor="david", local_heads=True), ALONE)
    batch = next(batches(Stream(tr.ds, None, tr.latent_shape, 0), iter([list(range(8))])))
    before = {k: p.clone() for k, p in tr.loss.heads.net.named_parameters()}
    train.step(tr, iter([{**batch, "eps": batch["eps"] * math.nan}]))
    assert tr.skipped == 1 and all(
        torch.equal(p, before[k]) for k, p in tr.loss.heads.net.named_parameters()
    )
    json.dumps(tr.loss.report(), allow_nan=False)
    train.step(tr, iter([batch]))
    assert all(
        torch.isfinite(p).all() and not torch.equal(p, before[k])
        for k, p in tr.loss.heads.net.named_parameters()
    )
    row = tr.loss.report()
    json.dumps(row, allow_nan=False)
    assert sum(row["t_drawn"]) == 8 and row["blocks"]["mid"]["lambda"] > 0.5
    breaks = tr.net.middle_block.register_forward_hook(lambda module, args, out: out * math.nan)
    train.step(tr, iter([batch]))  # half of the blocks are whole
    breaks.remove()
    assert (
        tr.loss.tally.sums["batches"].item() == 0 == tr.loss.tally.sums["blocks"].abs().sum()
        and tr.skipped == 2
    )
    train.step(tr, iter([batch]))
    broken = tr.loss.report()["blocks"]
    assert (
        all(0.5 <= b["lambda"] <= 3 and b["e_t"] < 3 for b in broken.values())
        and broken["down_0"]["kd"] < 0.5
    )


def test_ranks_agree_on_what_is_above_the_teachers(home, tmp_path):
    """excess is of all samples: -1 here and +3 on the other rank are 1 on average, not 1.5."""
    tr = distill.setup(
        config(home, out=str(tmp_path), assessor="david", e_t="excess", coherence="data"), ALONE
    )
    loss = tr.loss
    assert (
        loss.per_part == "--coherence data"
        and replace(loss, cfg=replace(loss.cfg, coherence="alpha")).per_part == ""
    )
    found = torch.tensor([[-1.0, 0.5, 0.5]] * 5)
    loss.assessor.assess = lambda features, bins, coherence: dict(
        zip("abcde", found if features == "mine" else torch.zeros(5, 3))
    )

    class Two:
        world = 2

        def all_reduce(self, x):
            return x + torch.tensor([self.other, 0.5, 0.5])

    for other, wanted in ((3.0, 1.0), (-3.0, 0.0)):
        loss.ranks, Two.other = Two(), other
        assert (
            loss.lambdas("mine", "theirs", loss.teacher.time(torch.arange(8)))[1][:, 2].tolist()
            == [wanted] * 5
        )


def test_the_placebo_knows_the_features_scale_and_nothing_else(home):
    cfg = config(home, assessor="random")
    teacher, real = teacher_file.open_teacher(cfg.teacher), load_assessor(home / "a.safetensors")
    placebo = distill.open_assessor(cfg, teacher)
    for k, companion in placebo.blocks.items():
        assert (
            torch.equal(companion.mean, real.blocks[k].mean)
            and torch.equal(companion.std, real.blocks[k].std)
            and companion.std.std() > 0
        )
        assert not torch.equal(companion.t_head.weight, real.blocks[k].t_head.weight)
    assert not placebo.training and not any(p.requires_grad for p in placebo.parameters())


def test_an_assessor_of_noise_is_warned_of_where_data_is_shown(home, capsys):
    teacher = teacher_file.open_teacher(str(home / "teacher.safetensors"))
    for source in ("data", "noise"):
        distill.open_assessor(config(home, assessor="david", x_source=source), teacher)
        assert ("knows features of data, and --x-source is noise" in capsys.readouterr().out) == (
            source == "noise"
        )


def test_a_student_sees_what_its_teacher_was_trained_on(home, tmp_path):
    net, meta = load_unet(home / "teacher.safetensors")
    trained = {"data": "toyfaces:48", "stage": "fine", "exclude_tags": ["glasses"], "holdout": 0.2}
    save_unet(tmp_path / "fine.safetensors", net, {**meta, "config": trained})
    like = lambda **fields: distill.resolve(
        distill.Config(teacher=str(tmp_path / "fine.safetensors"), **fields)
    )
    found = like()
    assert (found.stage, found.exclude_tags, found.holdout, found.data) == (
        "fine",
        ("glasses",),
        0.2,
        "toyfaces:48",
    )
    other = like(data="toyfaces:64")
    assert (other.stage, other.exclude_tags, other.holdout) == ("standard", (), 0.02)
    told = like(
        stage="standard", holdout=0.02
    )  # what is given stays, also if it is what others have by default
    assert (told.stage, told.exclude_tags, told.holdout) == ("standard", (), 0.02)
    assert like(exclude_tags=("smile",)).exclude_tags == ("smile",)


def test_a_student_that_is_the_teacher_has_kd_zero_and_each_runs_once_a_step(home, tmp_path):
    tr = distill.setup(config(home, out=str(tmp_path), assessor="david"), ALONE)
    calls = {"teacher": 0, "student": 0}
    tr.loss.teacher.net.register_forward_hook(lambda *_: calls.update(teacher=calls["teacher"] + 1))
    tr.net.register_forward_hook(lambda *_: calls.update(student=calls["student"] + 1))
    frozen = {
        **{f"t.{k}": v.clone() for k, v in tr.loss.teacher.net.state_dict().items()},
        **{f"a.{k}": v.clone() for k, v in tr.loss.assessor.state_dict().items()},
    }
    loader = batches(Stream(tr.ds, None, tr.latent_shape, 0), train.positions(tr.cfg, ALONE, 0))
    batch = next(loader)
    tr.loss(tr.model, batch).loss.backward()
    tr.loss.cfg = replace(tr.cfg, e_t="excess")
    seen = {k: torch.randn(8, C, 2, 2) for k, C in tap_channels(tr.net.cfg).items()}
    assert (
        tr.loss.lambdas(seen, seen, tr.loss.teacher.time(torch.arange(8) * 100))[1][:, 2].tolist()
        == [0] * 5
    )  # no worse than the teacher
    assert tr.loss.tally.sums["blocks"][:, 2].abs().max() < 1e-6 and calls == {
        "teacher": 1,
        "student": 1,
    }
    tr.optimizer.zero_grad()
    for _ in range(4):
        train.step(tr, loader)
    now = {
        **{f"t.{k}": v for k, v in tr.loss.teacher.net.state_dict().items()},
        **{f"a.{k}": v for k, v in tr.loss.assessor.state_dict().items()},
    }
    assert (
        calls == {"teacher": 5, "student": 5}
        and same(frozen, now)
        and not tr.loss.assessor.training
    )
    assert tr.loss.tally.sums["blocks"][:, 2].min() > 1e-6  # it has moved away since


def test_gradients_reach_the_blocks_through_kd_and_not_through_lambda(home, tmp_path):
    tr = distill.setup(config(home, out=str(tmp_path), assessor="david"), ALONE)
    mine = {
        k: torch.randn(8, C, 2, 2, requires_grad=True) for k, C in tap_channels(tr.net.cfg).items()
    }
    theirs = {k: torch.randn_like(v) for k, v in mine.items()}
    t = tr.loss.teacher.time(torch.arange(8) * 100)
    lam, _ = tr.loss.lambdas(mine, theirs, t)
    tr.loss.block_loss(mine, distill.Answer(t, None, None, None, theirs, None))[0].backward()
    for value, (name, x) in zip(lam, mine.items()):
        y = x.detach().clone().requires_grad_()
        (float(value) * 0.25 * kd_cosine(y, theirs[name])).backward()
        assert torch.allclose(x.grad, y.grad, atol=1e-7) and x.grad.abs().max() > 0


@pytest.mark.parametrize(
    "optim, weights", [("adamw", "fp32"), ("adamw8bit", "fp32"), ("adamw8bit", "bf16")]
)
def test_resume_is_bitwise_with_heads_tally_and_adaptive_times(
    home, tmp_path, monkeypatch, optim, weights
):
    how = dict(
        weights=weights,
        assessor="david",
        local_heads=True,
        adaptive_t=True,
        shift=2.0,
        optim=optim,
        save_every=16,
        log_every=24,
        images=48,
        e_t="excess",
        coherence="data",
        x_source="noise" if optim == "adamw" else "data",
        importance=True,
    )
    whole = go(home, tmp_path / "whole", **how)

    class Once:
        asks = 0

        def asked(self, ranks):
            Once.asks += 1
            return Once.asks > 2  # after two steps of six, mid-meter

    with monkeypatch.context() as m:
        m.setattr(train, "StopSignal", Once)
        cut = go(home, tmp_path / "cut", **how)
    assert int(checkpoints(cut)[-1].name) == 16 and not (cut / "samples").exists()
    go(home, tmp_path / "cut", **how)
    assert same(tensors(whole), tensors(cut)) and any(":own/heads/" in k for k in tensors(whole))
    strip = lambda line: {k: v for k, v in line.items() if k != "images_per_s"}
    assert [strip(r) for r in rows(whole)] == [strip(r) for r in rows(cut)] and len(
        rows(whole)
    ) == 2


def test_a_student_that_was_raced_is_bitwise_the_one_that_was_told(home, tmp_path, monkeypatch):
    told = go(home, tmp_path / "told", images=16, dtype="bf16")
    monkeypatch.setattr(precision, "decide", lambda *args: "bf16")
    raced = go(home, tmp_path / "raced", images=16)
    assert same(tensors(told), tensors(raced))
    assert not same(tensors(told), tensors(go(home, tmp_path / "fp32", images=16, dtype="fp32")))


def test_two_kills_change_nothing(home, tmp_path):
    """SIGKILL, at random moments after a new checkpoint; the run ends as if nothing had happened.
    The log's lines and every tensor are the same."""
    flags = [
        "--teacher",
        home / "teacher.safetensors",
        "--assessor-file",
        home / "a.safetensors",
        "--assessor",
        "david",
        "--local-heads",
        "--adaptive-t",
        *words(images=240, save_every=8, log_every=24, name="r"),
    ]
    begin = lambda out: subprocess.Popen(
        [sys.executable, ROOT / "distill.py", *map(str, flags), "--out", out],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    finish = lambda process: (process.communicate()[0], process.returncode)
    text, code = finish(begin(tmp_path / "whole"))
    assert code == 0, text
    moments, run = random.Random(0), tmp_path / "cut" / "r"
    done = lambda: int(found[-1].name) if (found := checkpoints(run)) else 0
    for _ in range(2):
        process, before = begin(tmp_path / "cut"), done()
        wait_for(lambda: done() > before, process)
        time.sleep(moments.uniform(0, 0.15))
        kill_tree(process)
        assert done() < 240
    text, code = finish(begin(tmp_path / "cut"))
    assert code == 0 and "resuming" in text, text
    strip = lambda line: {k: v for k, v in line.items() if k != "images_per_s"}
    assert same(tensors(tmp_path / "whole" / "r"), tensors(run)) and [
        strip(r) for r in rows(tmp_path / "whole" / "r")
    ] == [strip(r) for r in rows(run)]


def test_local_heads_learn_and_ranks_only_split_the_work(home, tmp_path):
    """Two ranks of four samples make the step of one rank of eight: λ, KD's gradient and the heads
    are averaged over ranks."""
    flags = [
        "--teacher",
        home / "teacher.safetensors",
        "--assessor-file",
        home / "a.safetensors",
        "--assessor",
        "david",
        "--local-heads",
        "--ema",
        "",
        *words(images=8, name="r"),
    ]
    for ranks in (1, 2):
        launcher = (
            [sys.executable]
            if ranks == 1
            else [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node=2",
            ]
        )
        done = subprocess.run(
            [*launcher, ROOT / "distill.py", *map(str, flags), "--out", tmp_path / str(ranks)],
            capture_output=True,
            text=True,
            env=os.environ,
        )
        assert done.returncode == 0, done.stderr
    one, two = tensors(tmp_path / "1" / "r"), tensors(tmp_path / "2" / "r")
    moments = (
        [k for k in one if "exp_avg/" in k] if one.keys() == two.keys() else []
    )  # gradients; AdamW would hide their size
    assert len(moments) > 100 and all(
        (one[k] - two[k]).norm() <= 1e-4 * one[k].norm() + 1e-7 for k in moments
    )
    fresh = distill.setup(
        config(home, out=str(tmp_path / "fresh"), local_heads=True), ALONE
    ).loss.heads.net
    assert all(
        (one[f"state.safetensors:own/heads/{k}"] - p).abs().max() > 1e-4
        for k, p in fresh.named_parameters()
    )
    a, b = (rows(tmp_path / r / "r")[0]["blocks"]["mid"] for r in "12")
    assert a["lambda"] == pytest.approx(b["lambda"], rel=1e-5) and a["e_t"] == pytest.approx(
        b["e_t"], rel=1e-5
    )


def test_a_students_checkpoint_says_what_it_is(home, arms, tmp_path, user):
    run = arms[0]["david"]
    net, meta = load_unet(checkpoints(run)[-1] / "model.safetensors")
    objective = Objective(**meta["objective"])
    assert (objective.target, objective.table) == ("v", "scaled_linear") and meta["init"][
        "teacher"
    ] == load_unet(home / "teacher.safetensors")[1]["fingerprint"]
    code, out, err = user(
        samplers.main, "--ckpt", run, "--n", 2, "--steps", 2, "--out", tmp_path / "s"
    )
    assert code == 0 and not err and (tmp_path / "s" / "000001.png").exists()


def test_sd_shaped_teacher_in_diffusers_layout_to_a_student_that_diffusers_loads(tmp_path, user):
    """Every trained block differs from the teacher's: the published checkpoints were, for a while,
    the teacher again."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    shape = dict(
        block_out_channels=(32, 64, 64, 64),
        cross_attention_dim=24,
        attention_head_dim=8,
        layers_per_block=2,
        norm_num_groups=32,
    )
    theirs = randomize(diffusers.UNet2DConditionModel(in_channels=48, out_channels=48, **shape))
    theirs.save_pretrained(tmp_path / "sd")
    encoded = {"kind": "texts", "encoders": "ab" * 32, "source": "clip", "chunks": 1}
    context = {"context": torch.randn(5, 7, 24)}
    write_tensors(tmp_path / "text.safetensors", context, {**encoded, "clip skip": 2})
    flags = words(images=16, log_every=16)
    code, _, err = user(
        distill.main,
        "--teacher",
        tmp_path / "sd",
        "--teacher-objective",
        "eps",
        "--teacher-table",
        "scaled_linear",
        "--context",
        tmp_path / "text.safetensors",
        "--vae",
        "pixel:4",
        "--data",
        "toyfaces:24",
        "--resolution",
        32,
        "--out",
        tmp_path,
        "--name",
        "student",
        *flags,
    )
    assert code == 0 and not [line for line in err if line.startswith("error")], err
    assert (tmp_path / "student" / "samples" / "final.png").exists()
    convert(
        checkpoints(tmp_path / "student")[-1] / "model.safetensors", tmp_path / "out", "diffusers"
    )
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out")
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    block = lambda name: ".".join(name.split(".")[: 4 if "blocks" in name else 1])
    changed = {block(k) for k in before if not torch.equal(before[k], after[k])}
    assert changed == {block(k) for k in before} and len(changed) > 40
    x, text = torch.randn(1, 48, 8, 8), torch.randn(1, 7, 24)
    own, meta = load_unet(checkpoints(tmp_path / "student")[-1] / "model.safetensors")
    told = {"encoders": "ab" * 32, "source": "clip", "chunks": 1, "skip": 2}
    assert meta["init"]["text"] == told  # a prompt to the student needs the same encoders
    with torch.no_grad():
        ours, out = own(x, torch.tensor([37.0]), context=text), again(x, 37, text).sample
    assert torch.allclose(ours, out, atol=1e-4 * float(out.abs().max()))


def test_one_step_of_the_progressive_target_is_two_steps_of_the_teacher(home, tmp_path):
    fields = dict(mode="progressive", start_steps=8, end_steps=4, out=str(tmp_path))
    tr = distill.setup(config(home, **fields), ALONE)
    assert tr.cfg.block_weight == 0
    x0, eps, q = (
        torch.randn(8, 192, 4, 4),
        torch.randn(8, 192, 4, 4),
        (torch.arange(8) + 0.5).double() / 8,
    )
    t, x, a, b, _, _ = tr.loss.two_steps(x0, eps, q, {})
    grid = samplers.time_grid(8, t_start=tr.objective.t_max)
    assert sorted(set(t.tolist())) == pytest.approx(sorted(grid[0:8:2].tolist()))
    for i in range(8):
        j = (grid - t[i]).abs().argmin()
        two = samplers.sample(
            lambda z, s: tr.loss.teacher.objective.predict(tr.loss.teacher.net, z, s),
            x[i : i + 1],
            method="euler",
            grid=grid[j : j + 3],
        )
        assert torch.allclose(
            x[i] + (grid[j + 2] - t[i]).float() * (b[i] - a[i]),
            two.x[0],
            atol=2e-3 * float(two.x.abs().max()),
        )
        assert torch.allclose(
            (1 - t[i]) * a[i] + t[i] * b[i], x[i], atol=1e-3 * float(a[i].abs().max())
        )  # on the line through x_t


def test_progressive_halves_run_by_run_and_resumes(home, tmp_path, user, monkeypatch):
    drawn, plain = [], samplers.sample
    monkeypatch.setattr(
        samplers.Generator,
        "walk",
        lambda self, *args, **how: drawn.append((how["method"], how.get("steps")))
        or plain(*args, **how),
    )
    flags = [
        "--teacher",
        home / "teacher.safetensors",
        "--mode",
        "progressive",
        "--start-steps",
        4,
        "--end-steps",
        1,
        "--out",
        tmp_path,
        "--name",
        "p",
        *words(images=16),
    ]
    assert user(distill.main, *flags)[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p-1", "p-2"]
    assert set(drawn) == {("euler", 2), ("euler", 1)}  # the runs' own pictures too
    first = json.loads((tmp_path / "p-1" / "config.json").read_text())
    assert (first["teacher"], first["start_steps"], first["end_steps"]) == (
        str(tmp_path / "p-2"),
        2,
        1,
    )
    for steps in (1, 2):  # without a flag, by the steps it was made for
        code, out, err = user(
            samplers.main,
            "--ckpt",
            tmp_path / f"p-{steps}",
            "--n",
            2,
            "--out",
            tmp_path / "drawn" / str(steps),
        )
        assert code == 0 and f"2 images  euler  NFE/image {steps} " in out, err
    assert "finished" in user(distill.main, *flags)[1]


def test_a_chain_starts_each_phase_from_its_teacher_and_is_not_mixed_with_another(tmp_path):
    cfg = distill.Config(
        mode="progressive",
        out=str(tmp_path),
        name="p",
        teacher="SD",
        teacher_objective="eps",
        teacher_table="scaled_linear",
        init="scratch",
        model="nano",
        start_steps=8,
        end_steps=1,
        images=16,
    )
    first, second, third = distill.phases(cfg)
    assert (
        first.teacher,
        first.init,
        first.model,
        first.teacher_objective,
        first.start_steps,
        first.end_steps,
    ) == ("SD", "scratch", "nano", "eps", 8, 4)
    assert (
        second.teacher,
        second.init,
        second.model,
        second.teacher_objective,
        second.teacher_table,
    ) == (str(tmp_path / "p-4"), "", "", "", "")
    assert (second.start_steps, second.end_steps, second.name, third.teacher, third.end_steps) == (
        4,
        2,
        "p-2",
        str(tmp_path / "p-2"),
        1,
    )
    (tmp_path / "p-4" / "ckpt" / f"{8:012d}").mkdir(parents=True)
    assert len(distill.phases(cfg)) == 3
    with pytest.raises(UserError, match="p-4 is of another chain: p-8"):
        distill.phases(replace(cfg, start_steps=16))
    assert [p.name for p in distill.phases(distill.Config(name="x"))] == ["x"]


@pytest.fixture(scope="module")
def odd(home):
    """Assessors and teachers that do not fit."""
    net, meta = load_unet(home / "teacher.safetensors")
    drop = lambda *keys: {k: v for k, v in meta.items() if k not in keys}
    save_unet(home / "silent.safetensors", net, drop("objective"))
    save_unet(
        home / "linear.safetensors",
        net,
        {**meta, "objective": {**meta["objective"], "table": "linear"}},
    )
    save_unet(home / "nodata.safetensors", net, drop("config"))
    save_unet(home / "nolatents.safetensors", net, drop("vae"))
    wide = randomize(
        UNet(replace(PRESETS["nano"], in_channels=192, out_channels=192, channel_mult=(1, 2)))
    )
    save_unet(home / "wide.safetensors", wide, meta)
    good, card = read_tensors(home / "a.safetensors")
    write_tensors(home / "damaged.safetensors", {**good, "accuracy": good["accuracy"] + 1}, card)
    write_tensors(
        home / "control.safetensors",
        good,
        {**card, "pretraining": {**card["pretraining"], "shuffle_time": True}},
    )
    write_tensors(
        home / "zero.safetensors",
        good,
        {**card, "objective": {**card["objective"], "zero_snr": True}},
    )
    save_unet(home / "pixel4.safetensors", net, {**meta, "vae": pixel(4).meta()})
    save_unet(home / "big.safetensors", net, {**meta, "resolution": 64})
    short = {k: v for k, v in good.items() if k != "blocks.mid.alpha"}
    write_tensors(home / "short.safetensors", short, {**card, "fingerprint": fingerprint(short)})
    prefixed = {f"unet.{k}": v for k, v in good.items()}
    write_tensors(
        home / "prefixed.safetensors", prefixed, {**card, "fingerprint": fingerprint(prefixed)}
    )
    return home


BAD = {
    "no teacher": (["--teacher", ""], "--teacher is required"),
    "absent teacher": (["--teacher", "nowhere"], "no checkpoint at nowhere"),
    "unknown objective": (
        ["--teacher", "HOME/silent.safetensors"],
        "does not say what its network was trained to output",
    ),
    "objective without table": (
        ["--teacher", "HOME/silent.safetensors", "--teacher-objective", "eps"],
        "needs its noise schedule",
    ),
    "contradicted objective": (["--teacher-objective", "v"], "Leave them out"),
    "no data": (["--teacher", "HOME/nodata.safetensors"], "--data is required"),
    "no latents": (["--teacher", "HOME/nolatents.safetensors"], "--vae is required"),
    "other latents": (
        ["--teacher", "HOME/nolatents.safetensors", "--vae", "pixel"],
        "makes 3 channels, but the teacher",
    ),
    "other vae": (["--vae", "pixel:4"], "the teacher was trained on other latents"),
    "resolution": (["--resolution", "64"], "the teacher was trained at 32"),
    "bounds": (["--lam-min", "3", "--lam-max", "0.5"], "--lam-min 3.0 is above --lam-max 0.5"),
    "nan": (["--assessor", "david", "--alpha", "nan"], "--alpha nan: wanted"),
    "david without file": (["--assessor", "david", "--assessor-file", ""], "needs --assessor-file"),
    "not an assessor": (
        ["--assessor", "david", "--assessor-file", "HOME/teacher.safetensors"],
        "holds no assessor",
    ),
    "other bins": (
        ["--assessor", "david", "--teacher", "HOME/linear.safetensors"],
        "10 bins on the schedule scaled_linear, the teacher is on linear",
    ),
    "other blocks": (["--assessor", "david", "--teacher", "HOME/wide.safetensors"], "reads blocks"),
    "damaged": (
        ["--assessor", "david", "--assessor-file", "HOME/damaged.safetensors"],
        "do not match their own fingerprint",
    ),
    "missing tensor": (
        ["--assessor", "david", "--assessor-file", "HOME/short.safetensors"],
        "1 missing: blocks.mid.alpha",
    ),
    "prefix": (["--assessor", "david", "--assessor-file", "HOME/prefixed.safetensors"], "missing"),
    "lambdas": (
        ["--assessor", "const", "--assessor-file", "", "--lambdas", "1,2"],
        "--lambdas 1.0,2.0: wanted 5 numbers from 0, for down_0, ",
    ),
    "lambdas without const": (
        ["--lambdas", "1,1,1,1,1"],
        "--lambdas changes nothing here: it is of --assessor const",
    ),
    "table": (["--table", "cosine"], "the teacher's schedule is scaled_linear"),
    "halving": (["--mode", "progressive", "--start-steps", "6", "--end-steps", "1"], "by halving"),
    "progressive david": (
        ["--mode", "progressive", "--assessor", "david"],
        "--assessor changes nothing here: it is of --mode flow",
    ),
    "progressive path": (
        ["--mode", "progressive", "--objective", "fm"],
        "stays on its teacher's path",
    ),
    "progressive weight": (
        ["--mode", "progressive", "--block-weight", "3"],
        "--block-weight changes nothing",
    ),
    "idle steps": (["--start-steps", "4"], "--start-steps changes nothing"),
    "idle alpha": (["--alpha", "0.7"], "--alpha changes nothing here: it is of --assessor david"),
    "idle assessor file": (
        ["--assessor-file", "HOME/a.safetensors"],
        "--assessor-file changes nothing",
    ),
    "idle jitter": (
        ["--base-jitter", "1"],
        "--base-jitter changes nothing here: it is of --adaptive-t",
    ),
    "idle density": (["--adaptive-t", "--density", "logit_normal"], "--density changes nothing"),
    "idle without blocks": (
        ["--assessor", "david", "--block-weight", "0", "--alpha", "2"],
        "--alpha changes nothing here: it is of --block-weight",
    ),
    "no loss for blocks": (["--kd-weight", "0"], "leaves the blocks no loss"),
    "idle time": (
        ["--objective", "fm", "--t-loc", "1"],
        "--t-loc changes nothing here: it is of --density logit_normal",
    ),
    "idle direction": (["--shift-dir", "clean"], "--shift-dir changes nothing"),
    "idle heads": (["--local-heads", "--block-weight", "0"], "--local-heads changes nothing"),
    "idle weights": (
        [
            "--assessor",
            "const",
            "--lambdas",
            "1,1,1,1,1",
            "--block-weights",
            "1,1,1,1,1",
            "--assessor-file",
            "",
        ],
        "--block-weights changes nothing",
    ),
    "nan weights": (
        ["--block-weights", "1,1,nan,1,1"],
        "--block-weights 1.0,1.0,nan,1.0,1.0: wanted 0 to 1,000,000",
    ),
    "control": (
        ["--assessor", "david", "--assessor-file", "HOME/control.safetensors"],
        "as a control",
    ),
    "zero snr": (
        ["--assessor", "david", "--assessor-file", "HOME/zero.safetensors"],
        "on the schedule scaled_linear, zero SNR, the teacher is on scaled_linear",
    ),
    "init latents": (
        [
            "--init",
            "HOME/pixel4.safetensors",
            "--teacher",
            "HOME/nolatents.safetensors",
            "--vae",
            "pixel:8",
        ],
        "was trained on other latents",
    ),
    "init size": (
        ["--init", "HOME/big.safetensors"],
        "was trained at 64 pixels, the teacher at 32",
    ),
    "model": (["--model", "tiny"], "add --init scratch"),
    "blocks": (["--model", "tiny", "--init", "scratch"], "they cannot be compared"),
    "model of text": (
        ["--model", "sd15", "--init", "scratch", "--block-weight", "0"],
        "takes text embeddings of 768 and 0 numbers (0 = none), the teacher of 0 and 0",
    ),
    "text": (["--context", "x"], "takes no text"),
    "command": (["frobnicate"], "command 'frobnicate'"),
    "ablate": (["ablate"], "python experiments/ablate.py"),
    "flag": (["--asessor", "none"], "unknown flag --asessor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, odd, tmp_path, user):
    args, message = BAD[case]
    args = [w.replace("HOME", str(odd)) for w in args]
    reads = (
        ["--assessor-file", odd / "a.safetensors"]
        if "--assessor" in args or "--adaptive-t" in args
        else []
    )
    base = (
        []
        if case in ("command", "ablate")
        else [
            "--teacher",
            odd / "teacher.safetensors",
            *reads,
            "--out",
            tmp_path / "out",
            "--images",
            16,
        ]
    )
    given = set(args)
    base = [
        w for i, w in enumerate(base) if w not in given and (i == 0 or base[i - 1] not in given)
    ]
    code, _, err = user(distill.main, *args, *base)
    assert code == 2 and len(err) == 1 and err[0].startswith("error: ") and message in err[0]
    assert not (tmp_path / "out").exists()


def test_no_reliable_bin_falls_back_to_uniform_and_says_so(home, tmp_path, capsys):
    weights, card = read_tensors(home / "a.safetensors")
    weights["accuracy"].fill_(0.149)
    write_tensors(
        tmp_path / "a.safetensors", weights, {**card, "fingerprint": fingerprint(weights)}
    )
    run = go(
        home, tmp_path, adaptive_t=True, assessor_file=str(tmp_path / "a.safetensors"), images=8
    )
    assert "none is, so all rows are drawn alike" in capsys.readouterr().out and checkpoints(run)


def test_contents_are_compared_and_not_paths_also_of_finished_runs(home, tmp_path):
    """Another teacher, assessor or placebo in the same place is noticed, before config.json is
    written; a moved one goes on."""
    net, meta = load_unet(home / "teacher.safetensors")
    weights, card = read_tensors(home / "a.safetensors")
    here = {"teacher": tmp_path / "t.safetensors", "assessor_file": tmp_path / "a.safetensors"}

    def put(teacher=net, judge=weights):
        save_unet(here["teacher"], teacher, {k: v for k, v in meta.items() if k != "probe"})
        write_tensors(here["assessor_file"], judge, {**card, "fingerprint": fingerprint(judge)})

    other_net, other_judge = (
        randomize(UNet(net.cfg), 5),
        {**weights, "blocks.mid.alpha": weights["blocks.mid.alpha"] + 1},
    )
    for assessor in ("david", "random"):
        how = dict(assessor=assessor, images=16, name=assessor)
        put()
        run = go(home, tmp_path, **how, **{k: str(v) for k, v in here.items()})
        before = (run / "config.json").read_text()
        for finished in (True, False):
            if not finished:
                (run / "samples" / "final.png").unlink()
            for what, contents in (
                ("teacher", dict(teacher=other_net)),
                ("assessor", dict(judge=other_judge)),
            ):
                put(**contents)
                with pytest.raises(UserError, match=f"is not the {what} that"):
                    go(home, tmp_path, **how, **{k: str(v) for k, v in here.items()})
                assert (run / "config.json").read_text() == before
        if assessor == "random":
            with pytest.raises(UserError, match="no assessor is not the assessor that"):
                go(home, tmp_path, **how, assessor_file="")
        go(home, tmp_path, **how)  # home's, which these were copies of
        assert (run / "samples" / "final.png").exists()


def test_weights_without_an_assessor_stay_in_bounds_and_given_ones_are_kept(home, tmp_path):
    setup = lambda name, **fields: distill.setup(
        config(home, out=str(tmp_path), name=name, **fields), ALONE
    ).loss.weights.tolist()
    assert setup("a", block_weights=(0.1, 1.0, 5.0, 1.0, 0.7)) == pytest.approx(
        [0.5, 1.0, 3.0, 1.0, 0.7]
    )
    assert setup("b", assessor="const", lambdas=(0.1, 1.0, 5.0, 1.0, 0.7)) == pytest.approx(
        [0.1, 1.0, 5.0, 1.0, 0.7]
    )
    assert setup("c", assessor="david", block_weights=(0.1, 1.0, 5.0, 1.0, 0.7)) == pytest.approx(
        [0.1, 1.0, 5.0, 1.0, 0.7]
    )  # fuse's w


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
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "distill.py",
            "--teacher",
            str(home / "teacher.safetensors"),
            "--mode",
            "progressive",
            "--start-steps",
            "4",
            "--out",
            str(tmp_path),
            "--name",
            "p",
            "--images",
            "8",
            "--batch",
            "8",
        ],
    )
    distill.main()
    assert begun == [8] and not (tmp_path / "p-1").exists()


def test_an_architecture_of_its_own(home, tmp_path):
    """Without the blocks' losses any preset may learn from the teacher, from scratch."""
    run = go(home, tmp_path, model="tiny", init="scratch", block_weight=0.0, images=8)
    net, _ = load_unet(checkpoints(run)[-1] / "model.safetensors")
    assert net.cfg == UNetConfig(
        **{**PRESETS["tiny"].__dict__, "in_channels": 192, "out_channels": 192}
    )


def test_a_run_whose_config_still_has_flags_that_were_refused_goes_on(home, tmp_path):
    """Before distillations had flags of their own, theirs were all of train.py's."""
    how = dict(images=8, block_weight=0.0, name="old")
    file = go(home, tmp_path, **how) / "config.json"
    flags = {"target": "", "stratified": False, "learn_sigma": False, "aligned": False}
    flags |= {"coupling": "none", "lowres": 2, "upsample": "psu", "noise_aug": 0.5883}
    file.write_text(json.dumps(json.loads(file.read_text()) | flags))
    go(home, tmp_path, **how)
    with pytest.raises(UserError, match="was made with another config: lr"):
        go(home, tmp_path, **how, lr=1.0)


def test_a_transformer_teaches_a_transformer(tmp_path):
    """From its own weights, but for the variance it had learned; its blocks are read by depth."""
    objective, vae = make_objective("ddpm", table="scaled_linear", learn_sigma=True), pixel(8)
    cfg = replace(PRESETS["sit-nano"], in_channels=192, out_channels=384, pos_max=4)
    net = randomize(build(cfg), 1).eval()
    meta = {"objective": asdict(objective), "vae": vae.meta(), "resolution": 32, "classes": []}
    file = tmp_path / "teacher.safetensors"
    save_unet(file, net, {**meta, "config": {"data": "toyfaces:48"}})
    how = dict(teacher=str(file), out=str(tmp_path), assessor="none", images=16, log_every=8)
    distill.run(distill.resolve(distill.Config(**{**FAST, **how, "name": "student"})), ALONE)
    student, _ = load_unet(tmp_path / "student")
    assert student.cfg == replace(cfg, out_channels=192)
    row = rows(tmp_path / "student")[0]
    assert row["images"] == 8 and row["loss"] > 0
    assert set(row["blocks"]) == {"depth_0", "depth_1"}
    with pytest.raises(UserError, match="--model nano is a UNet, and the teacher a MMDiT"):
        distill.resolve(distill.Config(**{**FAST, **how, "model": "nano", "init": "scratch"}))


@pytest.mark.parametrize("tokens", ["pqc", "cpq"])
def test_a_learned_variance_is_cut_off_the_right_rows(tokens):
    cfg = replace(PRESETS["sit-nano"], in_channels=4, out_channels=8, patch=2, tokens=tokens)
    net, student = randomize(build(cfg), 1), build(replace(cfg, out_channels=4))
    student.load_state_dict(without_variance(net, 4))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 900.0])
    torch.testing.assert_close(student(x, t), net(x, t)[:, :4])
