"""The training loop: exact arithmetic of progress, and errors that a user can act on."""

import copy
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import harness.run as run_module
import harness.likeness as likeness
import samplers
import train
import training.previews
from diffusion.sampling import NonFinite
from harness.run import checkpoints
from ckpt import convert, fingerprint, load_unet, save_unet
from harness.cli import UserError
from data.dataset import Stream
from harness.ema import EMA
from model import PRESETS, UNet, UNetConfig
from objectives import Objective
from train import Config, Ranks, due, learning_rate, resolve
from vae import load_vae, pixel

ALONE = Ranks(0, 1, torch.device("cpu"))
FAST = dict(
    model="nano",
    data="toyfaces:48",
    resolution=32,
    batch=8,
    images=40,
    preview_every=0,
    eval_every=0,
    save_every=0,
    log_every=8,
)


@pytest.fixture(autouse=True)
def a_quick_last_picture(monkeypatch):
    """A run's final grid in one step: its own would be most of a short run's time."""
    draw = train.draw_samples

    def quick(tr, net, seeds, **how):
        if how.get("steps") in (25, 50):
            how["steps"] = 1
        return draw(tr, net, seeds, **how)

    monkeypatch.setattr(train, "draw_samples", quick)


def flags(**fields):
    return [w for k, v in {**FAST, **fields}.items() for w in (f"--{k.replace('_', '-')}", str(v))]


def go(tmp_path, **fields) -> Path:
    cfg = resolve(Config(**{**FAST, "out": str(tmp_path), **fields}))
    train.train(cfg, ALONE)
    return tmp_path / cfg.name


def rows(run, event="train"):
    return [
        r
        for r in map(json.loads, (run / "log.jsonl").read_text().splitlines())
        if r["event"] == event
    ]


# ---- functions of images seen -------------------------------------------------------------------


def test_learning_rate_is_a_function_of_images_seen():
    cfg = Config(images=1000, batch=10, lr=1.0, warmup=0.1, decay="cosine")
    curve = [learning_rate(s, cfg) for s in range(0, 1000, 10)]
    assert (
        0 < curve[0] < 0.1
        and curve[10] == pytest.approx(1.0)
        and all(a <= b for a, b in zip(curve[:10], curve[1:11]))
    )
    assert curve[55] == pytest.approx(0.5) and curve[-1] < 1e-2
    assert learning_rate(990, replace(cfg, decay="constant")) == 1.0
    assert [learning_rate(s, replace(cfg, accum=5)) for s in range(0, 1000, 10)] == curve


def test_due_fires_once_per_crossing_for_any_batch():
    for batch in (1, 7, 64, 250):
        fired = sum(due(seen, 100, batch) for seen in range(batch, 10 * 700 + 1, batch))
        assert fired == min(10 * 700 // batch * batch // 100, 10 * 700 // batch)
    assert not due(100, 0, 10)


# ---- what a run leaves behind -------------------------------------------------------------------


def test_a_run_leaves_everything_needed_to_repeat_and_to_sample_it(tmp_path, user, capsys):
    run = go(
        tmp_path, preview_every=16, eval_every=16, holdout=0.2, classes=("glasses", "double bun")
    )
    assert {p.name for p in run.iterdir()} == {
        "config.json",
        "log.jsonl",
        "vae.safetensors",
        "samples",
        "ckpt",
        ".lock",
    }
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "samples" / "final.png")
    start = rows(run, "start")[0]
    assert start["config"]["batch"] == 8 and start["params"] > 1e5 and len(start["data_hash"]) == 64
    assert {"commit", "dirty", "versions", "command", "device", "used", "held_out"} <= start.keys()
    reports = rows(run)
    assert [r["images"] for r in reports] == [8, 16, 24, 32, 40]
    assert all(
        math.isfinite(r["loss"]) and len(r["loss_by_t"]) == 10 and r["images_per_s"] > 0
        for r in reports
    )
    held = rows(run, "held-out")
    assert [r["images"] for r in held] == [16, 32, 40] and len(held[0]["loss_by_t"]) == 8
    assert Image.open(run / "samples" / "000000000016.png").size == (8 * 34 + 2, 2 * 34 + 2)
    net, meta = load_unet(checkpoints(run)[-1] / "ema-0.050.safetensors")
    assert (
        meta["objective"]["target"] == "u"
        and meta["classes"] == ["glasses", "double bun"]
        and net.cfg.num_classes == 2
    )
    code, out, err = user(
        samplers.main,
        "--ckpt",
        run,
        "--n",
        3,
        "--steps",
        2,
        "--batch",
        2,
        "--labels",
        "glasses,1",
        "--cfg",
        2,
        "--out",
        tmp_path / "s",
    )
    assert (
        code == 0
        and out.splitlines()[-1] == str(tmp_path / "s-grid.png")
        and "NFE/image 3 " in out
    )
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        "000000.png",
        "000001.png",
        "000002.png",
    ]


def test_the_sampler_gives_the_same_image_for_a_seed_at_any_batch_size(tmp_path, user):
    run = go(tmp_path)
    for out, batch, first in (("a", 4, 0), ("b", 1, 0), ("c", 2, 2)):
        assert (
            user(
                samplers.main,
                "--ckpt",
                run,
                "--n",
                4 - first,
                "--seed",
                first,
                "--steps",
                3,
                "--batch",
                batch,
                "--method",
                "ddim",
                "--eta",
                1.0,
                "--out",
                tmp_path / out,
            )[0]
            == 0
        )
    for i in range(4):
        pixels = [
            torch.tensor(
                list(Image.open(tmp_path / o / f"{i:06d}.png").tobytes()), dtype=torch.int16
            )
            for o in ("a", "b", "c")
            if (tmp_path / o / f"{i:06d}.png").exists()
        ]
        assert len(pixels) == 2 + (i >= 2) and all(
            (p - pixels[0]).abs().max() <= 1 for p in pixels
        )  # rounding of batched convs


def test_default_sample_folders_differ_where_images_differ():
    base = samplers.Config(ckpt="x")
    names = {
        likeness.settings(replace(base, **change))
        for change in (
            {},
            {"steps": 10},
            {"labels": ("a b",)},
            {"labels": ("a/c",)},
            {"cfg": 2.0},
            {"shift": 3.0},
            {"method": "ddim"},
            {"method": "ddim", "eta": 1.0},
        )
    }
    assert len(names) == 8 and all("/" not in n for n in names)
    assert likeness.settings(replace(base, n=99, batch=3, out="y", seed=4)) == ""


def test_held_out_loss_is_fixed(tmp_path):
    cfg = resolve(Config(**{**FAST, "out": str(tmp_path), "holdout": 0.3}))
    tr = train.setup(cfg, ALONE)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in tr.net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    tr.ema = EMA(tr.net, (0.05,))
    first, second = train.held_out_loss(tr), train.held_out_loss(tr)
    assert (
        first == second
        and first["n"] == len(tr.ds.heldout) > 5
        and first["loss"] != pytest.approx(2.0, abs=0.05)
    )


def test_held_out_loss_is_of_fixed_noise_with_ot_too(tmp_path):
    """Pairs found within a batch would depend on the split over ranks, and on the other times of
    the same image."""
    tr = train.setup(
        resolve(Config(**{**FAST, "out": str(tmp_path), "holdout": 0.3, "coupling": "ot"})), ALONE
    )
    with_ot = train.held_out_loss(tr)
    assert tr.objective.coupling == "ot"
    tr.objective = replace(tr.objective, coupling="none")
    tr.loss = replace(tr.loss, objective=tr.objective)
    assert with_ot == train.held_out_loss(tr)


def test_a_network_that_breaks_ends_no_run_and_its_pictures_are_said_to_be_none(tmp_path, capsys):
    """The weights are what matters; strict, for a distance, it is an error."""
    go(tmp_path)
    tr = train.setup(resolve(Config(**{**FAST, "out": str(tmp_path)})), ALONE)
    with torch.no_grad():
        next(tr.net.parameters()).fill_(torch.nan)
    capsys.readouterr()
    images = train.draw_samples(tr, tr.net, [4, 6], method="heun", steps=1)
    assert images.shape == (2, 3, 32, 32) and tr.net.training
    assert "no finite numbers for 2 of 2 images, of seeds 4 (t = 1" in capsys.readouterr().err
    with pytest.raises(NonFinite):
        train.draw_samples(tr, tr.net, [4, 6], strict=True, method="heun", steps=1)
    assert tr.net.training


def test_a_runs_own_samples_are_those_of_the_command(tmp_path, user):
    """A table that ends far from pure noise: where they begin, and with what variance, shows."""
    run = go(tmp_path, objective="ddpm", table="scaled_linear", classes=("glasses", "smile"))
    tr = train.setup(
        resolve(
            Config(
                **{
                    **FAST,
                    "out": str(tmp_path),
                    "objective": "ddpm",
                    "table": "scaled_linear",
                    "classes": ("glasses", "smile"),
                }
            )
        ),
        ALONE,
    )
    with torch.no_grad():
        for p in tr.net.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    images = train.draw_samples(tr, tr.net, [4, 6], method="heun", steps=3)
    save_unet(
        tmp_path / "raw.safetensors",
        tr.net,
        load_unet(checkpoints(run)[-1] / "model.safetensors")[1],
    )
    for i, seed in enumerate((4, 6)):
        code, _, err = user(
            samplers.main,
            "--ckpt",
            tmp_path / "raw.safetensors",
            "--n",
            1,
            "--seed",
            seed,
            "--labels",
            0,
            "--steps",
            3,
            "--out",
            tmp_path / "s",
        )
        assert code == 0, err
        drawn = torch.from_numpy(
            np.asarray(Image.open(tmp_path / f"s/{seed:06d}.png")).copy()
        ).permute(2, 0, 1)
        assert (images[i].int() - drawn.int()).abs().max() <= 1 and len(drawn.unique()) > 20


def test_ot_resumes_only_with_the_parts_of_a_batch_it_paired_within(tmp_path, user):
    """ranks × accum; plain coupling does not mind."""
    for coupling, code_wanted in (("ot", 2), ("none", 0)):
        out, cfg = (
            tmp_path / coupling,
            resolve(Config(**{**FAST, "out": str(tmp_path / coupling), "coupling": coupling})),
        )
        tr = train.setup(cfg, Ranks(0, 1, torch.device("cpu")))
        train.save(tr)
        tr.held.close()
        code, _, err = user(train.main, *flags(out=out, coupling=coupling, accum=2))
        assert code == code_wanted and ("ranks × --accum = 1, now 2" in " ".join(err)) == (
            code == 2
        ), err
    assert user(train.main, *flags(out=tmp_path / "ot", coupling="ot"))[0] == 0


def test_fm_and_ddpm_arms_see_the_same_samples_and_noise_in_the_same_order(tmp_path, monkeypatch):
    import hashlib

    seen = {}
    real = Objective.loss

    def recording(self, net, x0, *, eps=None, **kwargs):
        digest = [hashlib.sha256(v.numpy().tobytes()).hexdigest() for v in (x0, eps)]
        seen.setdefault((self.name, current), []).append(digest)
        return real(self, net, x0, eps=eps, **kwargs)

    monkeypatch.setattr(Objective, "loss", recording)
    for current, objective, seed in ((0, "fm", 0), (0, "ddpm", 0), (1, "fm", 1)):
        go(tmp_path, objective=objective, seed=seed, name=f"{objective}{seed}")
    assert len(seen["fm", 0]) == 5 and seen["fm", 0] == seen["ddpm", 0]
    assert seen["fm", 0] != seen["fm", 1]


@pytest.mark.parametrize(
    "optim, tolerance", [("adamw", 1e-5), ("adamw8bit", 2e-4)]
)  # 8 bits: a few percent of three steps of 1e-3
def test_a_step_is_adamw_on_the_clipped_mean_gradient_and_the_emas_follow(
    tmp_path, optim, tolerance
):
    """Three steps by hand, with AdamW's textbook form, against step() with accumulation."""
    cfg = resolve(
        Config(
            **{
                **FAST,
                "out": str(tmp_path),
                "optim": optim,
                "accum": 2,
                "clip": 0.05,
                "lr": 1e-3,
                "weight_decay": 0.1,
                "warmup": 0.5,
            }
        )
    )
    tr = train.setup(cfg, ALONE)
    loader = train.data.batches(
        Stream(tr.ds, None, tr.latent_shape, 0), train.positions(cfg, ALONE, 0)
    )
    twin = copy.deepcopy(tr.net)
    m, v, emas = ({n: torch.zeros_like(p) for n, p in twin.named_parameters()} for _ in range(3))
    for i in range(1, 4):
        batch = next(
            train.data.batches(
                Stream(tr.ds, None, tr.latent_shape, 0), iter([list(range(8 * i - 8, 8 * i))])
            )
        )
        lr = learning_rate(tr.seen, cfg)
        train.step(tr, loader)
        tr.loss(twin, batch).loss.backward()
        norm = torch.stack([p.grad.square().sum() for p in twin.parameters()]).sum().sqrt()
        assert norm > cfg.clip
        exponent = tr.ema.exponents["0.100"]
        with torch.no_grad():
            for n, p in twin.named_parameters():
                g = p.grad * cfg.clip / norm
                m[n], v[n] = 0.9 * m[n] + 0.1 * g, 0.999 * v[n] + 0.001 * g * g
                p.mul_(1 - lr * 0.1).sub_(
                    lr * (m[n] / (1 - 0.9**i)) / ((v[n] / (1 - 0.999**i)).sqrt() + 1e-8)
                )
                beta = (1 - 1 / i) ** exponent
                emas[n] = beta * emas[n] + (1 - beta) * p
                p.grad = None
    for n, p in twin.named_parameters():
        for ours, exact in ((tr.net.get_parameter(n), p), (tr.ema.weights["0.100"][n], emas[n])):
            assert (ours - exact).square().mean().sqrt() < tolerance, n
    assert (
        twin.out[2].weight - train.setup(replace(cfg, name="b"), ALONE).net.out[2].weight
    ).abs().max() > 1e-3


def test_kernels_that_cannot_run_are_one_line(user, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    small = [
        "--model",
        "nano",
        "--data",
        "toyfaces:8",
        "--resolution",
        "32",
        "--batch",
        "4",
        "--images",
        "4",
        "--out",
        tmp_path,
    ]
    for value, message in (
        ("bogus", "KERNELS='bogus' is not one of auto, triton, torch."),
        ("triton", "KERNELS=triton, but group_norm_silu cannot run"),
    ):
        monkeypatch.setenv("KERNELS", value)
        code, _, lines = user(train.main, *small)
        assert code == 2 and message in lines[-1], lines


def test_every_setting_reaches_what_it_sets(tmp_path, monkeypatch):
    streams = []
    real = train.data.batches
    monkeypatch.setattr(
        train.data,
        "batches",
        lambda stream, *a, **k: streams.append(stream) or real(stream, *a, **k),
    )
    nets = []

    def draw(tr, net, seeds, **how):
        nets.append(net)
        return torch.zeros(8, 3, 32, 32, dtype=torch.uint8)

    for module in (train, training.previews):
        monkeypatch.setattr(module, "draw_samples", draw)
    settings = dict(
        objective="v",
        table="scaled_linear",
        density="gaussian",
        shift=2.0,
        loss="l1",
        weight="min_snr",
    )
    run = go(
        tmp_path,
        images=16,
        flip=True,
        label_drop=0.3,
        classes=("glasses",),
        seed=5,
        preview_every=16,
        ema=(0.1, 0.05),
        **settings,
    )
    (stream,) = streams
    assert (stream.flip, stream.label_drop, stream.seed) == (True, 0.3, 5) and set(
        stream.labels
    ) == {-1, 0}
    objective = load_unet(checkpoints(run)[-1] / "model.safetensors")[1]["objective"]
    assert objective == {
        **objective,
        "name": "v",
        "target": "v",
        "table": "scaled_linear",
        "density": "gaussian",
        "shift": 2.0,
        "loss_type": "l1",
        "weight": "min_snr",
    }
    assert (
        isinstance(nets[0], UNet)
        and not isinstance(nets[1], UNet)
        and not isinstance(nets[2], UNet)
    )  # raw, EMA, EMA
    weights = dict(
        zip(nets[1].__code__.co_freevars, (c.cell_contents for c in nets[1].__closure__))
    )["weights"]
    narrow = load_unet(checkpoints(run)[-1] / "ema-0.050.safetensors")[0].state_dict()
    assert all(
        torch.equal(weights[k], narrow[k]) for k in narrow
    )  # previews show what samplers.py takes


def test_only_the_network_runs_in_bf16(tmp_path, monkeypatch):
    real, latents = Objective.loss, {}
    monkeypatch.setattr(
        Objective,
        "loss",
        lambda self, net, x0, **k: (
            latents.setdefault(current, []).append(x0) or real(self, net, x0, **k)
        ),
    )
    for current in ("fp32", "bf16"):
        go(tmp_path, images=16, dtype=current, name=current)
    assert all(torch.equal(a, b) for a, b in zip(latents["fp32"], latents["bf16"]))
    a, b = (rows(tmp_path / n)[1]["loss"] for n in ("fp32", "bf16"))
    assert a != b and b == pytest.approx(a, rel=1e-2)


def test_the_network_learns(tmp_path):
    run = go(tmp_path, images=2400, batch=16, log_every=240, lr=3e-3)
    losses = [r["loss"] for r in rows(run)]
    assert losses[0] > 1.7 and losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("objective", ["v", "x0", "ddpm"])
def test_every_objective_trains_and_samples(tmp_path, objective):
    run = go(
        tmp_path,
        objective=objective,
        weight="min_snr",
        table="cosine",
        loss="huber",
        density="gaussian",
    )
    assert rows(run)[-1]["loss"] > 0 and (run / "samples" / "final.png").exists()


TRANSFORMER = {
    "cfm": dict(objective="cfm", lowres=2),
    "a learned variance": dict(objective="ddpm", learn_sigma=True, table="linear"),
    "8 bits and bf16": dict(optim="adamw8bit", dtype="bf16", accum=2),
    "classes": dict(classes=("* hair",), objective="v"),
}


@pytest.mark.parametrize("flags", TRANSFORMER.values(), ids=TRANSFORMER)
def test_a_transformer_trains_by_every_flag(tmp_path, flags):
    run = go(tmp_path, model="sit-nano", **flags)
    assert rows(run)[-1]["loss"] > 0 and (run / "samples" / "final.png").exists()


# ---- trouble ------------------------------------------------------------------------------------


def test_a_non_finite_step_changes_nothing_and_is_logged_with_layer_and_t(tmp_path, monkeypatch):
    real = Stream.__getitem__

    def poisoned(self, position):
        sample = real(self, position)
        if position == 11:
            sample["eps"] = sample["eps"] * float("nan")
        return sample

    monkeypatch.setattr(Stream, "__getitem__", poisoned)
    run = go(tmp_path)
    (event,) = rows(run, "non-finite")
    assert (
        event["images"] == 16
        and event["in_a_row"] == 1
        and event["where"].startswith("layer input_blocks.0.0, t = ")
    )
    assert rows(run)[-1]["skipped"] == 1 and math.isfinite(rows(run)[-1]["loss"])
    assert all(
        torch.isfinite(p).all()
        for p in load_unet(checkpoints(run)[-1] / "model.safetensors")[0].parameters()
    )


def test_ten_non_finite_steps_in_a_row_stop_with_the_batch_saved(tmp_path):
    def sick(cfg, ranks):
        tr = train.setup(cfg, ranks)
        tr.net.middle_block[0].in_layers[2].bias.data[0] = float("inf")
        return tr

    cfg = resolve(Config(**{**FAST, "out": str(tmp_path), "images": 400}))
    with pytest.raises(
        UserError,
        match="10 non-finite steps in a row, the last: layer middle_block.0.in_layers.2, t = ",
    ):
        train.train(cfg, ALONE, setup=sick)
    run = tmp_path / "toyfaces-48-fm-standard"
    batches = torch.load(run / "bad-batch-000000000080-rank0.pt", weights_only=True)
    assert batches[0]["position"].tolist() == list(range(72, 80)) and checkpoints(run)
    assert rows(run)[-1]["loss"] is None and rows(run)[-1]["grad_norm"] is None


def test_a_non_finite_gradient_names_its_parameter(tmp_path, monkeypatch):
    real = Objective.loss

    def explode(self, net, x0, **kwargs):
        out = real(self, net, x0, **kwargs)
        return out._replace(
            loss=out.loss + (out.loss - out.loss.detach()).abs().sqrt()
        )  # value 0, slope infinite

    monkeypatch.setattr(Objective, "loss", explode)
    with pytest.raises(UserError, match=r"gradient of out.2.bias \(forward is finite\), t from"):
        go(tmp_path, images=400)


# ---- bad input ----------------------------------------------------------------------------------


def tree(path):
    return sorted((str(p), p.stat().st_size) for p in Path(path).rglob("*"))


@pytest.mark.parametrize(
    "args, message",
    [
        pytest.param(
            ["--objectives", "fm"],
            "unknown flag --objectives.  Closest: objective",
            id="unknown flag",
        ),
        pytest.param(["fm"], "every option is written --name value", id="positional"),
        pytest.param(["--lr"], "--lr needs a value", id="no value"),
        pytest.param(["--lr", "fast"], "--lr takes float, got 'fast'", id="wrong type"),
        pytest.param(
            ["--objective", "ffm"], "'ffm' is not one of fm, ddpm, v, x0", id="unknown objective"
        ),
        pytest.param(
            ["--model", "toy-281"],
            "'toy-281' is not a preset.  Closest: toy-281m",
            id="unknown preset",
        ),
        pytest.param(
            ["--batch", "10", "--accum", "4"],
            "not divisible by 1 ranks × 4 accumulation (= 4).  Try --batch 8",
            id="batch",
        ),
        pytest.param(["--data", "nowhere"], "no data at nowhere", id="missing folder"),
        pytest.param(["--data", "EMPTY"], "has no images", id="empty folder"),
        pytest.param(["--data", "BROKEN"], "none of the 2 images", id="all unreadable"),
        pytest.param(
            ["--stage", "fine", "--exclude-tags", "character:novae"],
            "matches 0 of 48 images.  Closest: character:nova",
            id="tag",
        ),
        pytest.param(
            ["--stage", "stage2"],
            "has none.  Make it with: python train.py --data toyfaces:48 --objective fm "
            "--model nano --resolution 32 --stage fine",
            id="stage2 without fine",
        ),
        pytest.param(
            ["--init", "none.safetensors"], "no checkpoint at none.safetensors", id="init missing"
        ),
        pytest.param(["--init", "PICKLE"], "is a Python pickle", id="init pickle"),
        pytest.param(["--init", "CUT"], "truncated", id="init truncated"),
        pytest.param(
            ["--init", "OTHER"],
            "is of another architecture: it has channel_mult (1,), num_res_blocks 2, "
            "attention (0,); --model nano is channel_mult (1, 1), num_res_blocks 1, "
            "attention (0, 1).  "
            "Choose the preset it was made with.",
            id="init of another architecture",
        ),
        pytest.param(
            ["--resolution", "44"], "not divisible by 8, as the VAE needs", id="resolution"
        ),
        pytest.param(
            ["--resolution", "40"],
            "divisible by 2.  Use a multiple of 16",
            id="resolution for the U-Net",
        ),
        pytest.param(["--vae", "flux9"], "no autoencoder 'flux9'", id="vae"),
        pytest.param(["--vae", "pixel:999"], "N below 100", id="vae factor"),
        pytest.param(
            ["--init", "NANO", "--vae", "pca"],
            "trained on other latents",
            id="init with another autoencoder",
        ),
        pytest.param(["--objective", "fm", "--table", "cosine"], "fm has none", id="table for fm"),
        pytest.param(["--lr", "nan"], "--lr nan: wanted 0 to 1000", id="nan"),
        pytest.param(["--lr", "-1"], "wanted 0 to", id="negative"),
        pytest.param(["--images", "0"], "--images 0: wanted 1 to 1,000,000", id="no images"),
        pytest.param(["--images", "1e999"], "--images takes int", id="infinite"),
        pytest.param(["--shift", "0"], "--shift 0.0: wanted 0.001", id="shift"),
        pytest.param(["--workers", "100000"], "--workers 100000: wanted -1 to 128", id="workers"),
        pytest.param(["--name", "../escape"], "without slashes", id="name"),
        pytest.param(["--classes", "cat tail"], "--classes: 'cat tail' matches 0", id="classes"),
        pytest.param(["--ema", "0.05,0.0501"], "wanted different widths", id="ema twice"),
        pytest.param(["--data", "LATIN"], "is not UTF-8", id="sidecar encoding"),
        pytest.param(["--log", "mlflow"], "mlflow is not one of tensorboard, wandb", id="log"),
        pytest.param(["--ema", "0.5"], "--ema 0.5: wanted 0.01 to 0.25", id="ema"),
        pytest.param(["--device", "cuda:99"], "is not usable here", id="device"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(tmp_path, user, args, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for name in ("a.png", "b.jpg"):
        (tmp_path / "broken" / name).write_bytes(b"not an image")
    torch.save({}, tmp_path / "pickle.safetensors")
    other = UNetConfig(
        in_channels=192, out_channels=192, model_channels=32, channel_mult=(1,), attention=(0,)
    )
    save_unet(tmp_path / "other.safetensors", UNet(other), {"vae": pixel(8).meta()})
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:5000])
    nano = replace(PRESETS["nano"], in_channels=192, out_channels=192)
    save_unet(tmp_path / "nano.safetensors", UNet(nano), {"vae": pixel(8).meta()})
    names = {
        "NANO": "nano.safetensors",
        "EMPTY": "empty",
        "LATIN": "latin",
        "BROKEN": "broken",
        "PICKLE": "pickle.safetensors",
        "CUT": "cut.safetensors",
        "OTHER": "other.safetensors",
    }
    (tmp_path / "latin").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "latin" / "a.png")
    (tmp_path / "latin" / "a.txt").write_bytes("caf\xe9".encode("latin-1"))
    before = tree(tmp_path)
    vae = ["--vae", "pixel:8"] if "OTHER" in args else []
    code, _, err = user(
        train.main,
        *flags(out=tmp_path / "runs"),
        *vae,
        *[str(tmp_path / names[a]) if a in names else a for a in args],
    )
    errors = [line for line in err if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0], err
    assert tree(tmp_path) == before


# Of every number: beyond them a run hangs, fills the memory, or computes nonsense.
BOUNDS = {
    "images": (1, 10**12), "batch": (1, 10**6), "accum": (1, 10**6), "lr": (0.0, 1e3),
    "warmup": (0.0, 1.0), "weight_decay": (0.0, 1e3), "clip": (0.0, 1e9), "shift": (1e-3, 1e3),
    "t_loc": (-10.0, 10.0), "t_scale": (-1.0, 10.0), "gamma": (1e-3, 1e6), "lowres": (2, 64),
    "label_drop": (0.0, 1.0), "holdout": (0.0, 0.9), "resolution": (1, 8192),
    "seed": (0, 2**63 - 1), "keep": (1, 10**6), "keep_every": (0, 10**12),
    "log_every": (0, 10**12), "eval_every": (0, 10**12), "preview_every": (0, 10**12),
    "save_every": (0, 10**12), "fid_every": (0, 10**12), "workers": (-1, 128),
}  # fmt: skip


@pytest.mark.parametrize("name", BOUNDS)
def test_a_number_has_a_least_and_a_greatest_value(name):
    low, high = BOUNDS[name]
    if isinstance(low, int):
        beyond = [low - 1, high + 1, 10**400]
    else:
        beyond = [math.nextafter(low, -math.inf), math.nextafter(high, math.inf), math.nan]
    for value in beyond:
        with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} .*: wanted "):
            train.resolve(replace(train.Config(), **{name: value}))


def test_another_config_in_the_same_folder_says_what_differs(tmp_path, user):
    run = go(tmp_path)
    before, old = tree(run), (run / "config.json").read_text()
    code, _, err = user(train.main, *flags(out=tmp_path, lr=5e-4, seed=3))
    assert code == 2 and "lr 0.002 -> 0.0005; seed 0 -> 3" in err[-1] and tree(run) == before
    (run / "config.json").write_text("{")
    assert "config.json is damaged" in user(train.main, *flags(out=tmp_path))[2][-1]
    (run / "config.json").unlink()
    assert "has checkpoints but no config.json" in user(train.main, *flags(out=tmp_path))[2][-1]
    (run / "config.json").write_text(old)
    assert "--no-resume" in user(train.main, *flags(out=tmp_path), "--no-resume")[2][-1]
    code, out, _ = user(
        train.main, *flags(out=tmp_path, accum=2, log_every=16)
    )  # what may change does not count
    assert code == 0 and "finished" in out and tree(run) == before


def test_two_processes_cannot_train_in_one_folder(tmp_path, user):
    run = go(tmp_path, images=16)
    (run / "samples" / "final.png").unlink()
    held = run_module.lock(run)
    before = tree(run)
    code, _, err = user(train.main, *flags(out=tmp_path, images=16))
    assert code == 2 and "another process is writing to" in err[-1] and tree(run) == before
    held.close()
    assert user(train.main, *flags(out=tmp_path, images=16))[0] == 0


def test_changed_data_under_a_run_is_refused(tmp_path, user):
    (tmp_path / "d").mkdir()
    for i in range(8):
        Image.new("RGB", (32, 32), (i * 30, 0, 0)).save(tmp_path / "d" / f"{i}.png")
    args = flags(out=tmp_path / "runs", data=tmp_path / "d", holdout=0)
    assert user(train.main, *args)[0] == 0
    next((tmp_path / "runs").glob("*/samples/final.png")).unlink()
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "d" / "3.png")
    code, _, err = user(train.main, *args)
    assert code == 2 and "changed since" in err[-1]


def test_output_that_cannot_be_written(tmp_path, user):
    (tmp_path / "file").write_text("mine")
    code, _, err = user(train.main, *flags(out=tmp_path / "file"))
    assert code == 2 and f"--out {tmp_path / 'file'}"[:60] in err[-1]
    assert "wanted a folder" in err[-1] and (tmp_path / "file").read_text() == "mine"
    if os.getuid():
        (tmp_path / "locked").mkdir(mode=0o555)
        assert "cannot write to" in user(train.main, *flags(out=tmp_path / "locked"))[2][-1]


def test_a_disk_too_small_is_noticed_before_anything_is_written(tmp_path, user, monkeypatch):
    monkeypatch.setattr(
        run_module.shutil, "disk_usage", lambda path: type("usage", (), {"free": 10**6})
    )
    code, _, err = user(train.main, *flags(out=tmp_path / "runs"))
    assert code == 2 and "0.00 GB are free" in err[-1] and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["--ckpt", "nowhere"], "no checkpoint at nowhere"),
        ([], "--ckpt is required"),
        (["--ckpt", "RUN", "--labels", "cat"], "without classes"),
        (["--ckpt", "RUN", "--cfg", "2"], "needs --labels"),
        (["--ckpt", "RUN", "--steps", "0"], "wanted 1 to 1,000,000"),
        (["--ckpt", "RUN", "--seed", "99999999999999999999"], "wanted 0 to"),
        (["--ckpt", "STATE"], "holds no U-Net (its kind: training state)"),
        (["--ckpt", "VAE"], "holds no U-Net (its kind: vae)"),
        (["--ckpt", "RUN", "--method", "heum"], "Closest: heun"),
        (["--ckpt", "FILE"], "is a Python pickle"),
    ],
)
def test_bad_input_to_the_sampler(tmp_path, user, args, message):
    run = go(tmp_path, images=8)
    torch.save({}, tmp_path / "file.pt")
    code, _, err = user(
        samplers.main,
        *[
            {
                "RUN": run,
                "FILE": tmp_path / "file.pt",
                "VAE": run / "vae.safetensors",
                "STATE": checkpoints(run)[-1] / "state.safetensors",
            }.get(a, a)
            for a in args
        ],
        "--out",
        tmp_path / "s",
    )
    assert code == 2 and len(err) == 1 and message in err[0] and not (tmp_path / "s").exists()


def test_missing_optional_packages_name_the_pip_command(tmp_path, user, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in ("wandb", "tensorboard"):
        code, _, err = user(train.main, *flags(out=tmp_path, log=name, name=name))
        assert code == 2 and f"pip install {name}" in err[-1] and not list(tmp_path.iterdir())


# ---- stages -------------------------------------------------------------------------------------


def test_stage2_starts_from_its_fine_run_in_its_latents_and_takes_its_tags(tmp_path, user):
    fine = go(tmp_path, stage="fine", exclude_tags=("character:nova", "character:kiri"))
    code, out, _ = user(train.main, *flags(out=tmp_path, stage="stage2", images=16))
    run = tmp_path / "toyfaces-48-fm-stage2"
    assert f"starting from the weights of {fine}" in out
    assert code == 0 and json.loads((run / "config.json").read_text())["exclude_tags"] == [
        "character:nova",
        "character:kiri",
    ]
    start = rows(run, "start")[0]
    _, meta = load_unet(checkpoints(fine)[-1] / "ema-0.050.safetensors")
    assert start["init"] == {"path": str(fine), "fingerprint": meta["fingerprint"]}
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            *(load_vae(r / "vae.safetensors").state_dict().values() for r in (run, fine))
        )
    )
    assert (
        start["used"]
        + rows(fine, "start")[0]["used"]
        + start["held_out"]
        + rows(fine, "start")[0]["held_out"]
        == 48
    )
    assert rows(run)[0]["loss"] != rows(fine)[0]["loss"]
    # another objective has no fine run; a second fine run makes the choice the user's
    assert (
        "has none"
        in user(train.main, *flags(out=tmp_path, stage="stage2", objective="ddpm"))[2][-1]
    )
    go(tmp_path, stage="fine", name="other")
    assert (
        "could start from any of"
        in user(train.main, *flags(out=tmp_path, stage="stage2", name="third"))[2][-1]
    )


def test_dry_run_prints_the_resolved_config_and_writes_nothing(tmp_path, user):
    code, out, _ = user(
        train.main,
        "--stage",
        "fine",
        "--lr=3e-4",
        "--images",
        "2_000",
        "--ema",
        "",
        "--no-resume",
        "--out",
        tmp_path / "x",
        "--dry-run",
    )
    cfg = json.loads(out)
    assert code == 0 and not (tmp_path / "x").exists()
    assert (cfg["name"], cfg["lr"], cfg["images"], cfg["ema"], cfg["resume"]) == (
        "toyfaces-fm-fine",
        3e-4,
        2000,
        [],
        False,
    )
    assert cfg["exclude_tags"] == ["character:nova", "character:ember"]


@pytest.mark.parametrize("main", [train.main, samplers.main])
def test_help_fits_a_screen(user, main):
    code, out, _ = user(main, "--help")
    assert "fm | ddpm | v | x0" in out or (
        "euler | heun | midpoint" in out and "\nguidance:\n" in out
    )
    assert code == 0 and len(out.splitlines()) <= 77 and max(map(len, out.splitlines())) <= 165
    assert "# " not in out and all(line.strip() for line in out.splitlines()[2:])


# ---- starting from other weights ----------------------------------------------------------------


def init_error(tmp_path, user, path, *args):
    code, _, err = user(
        train.main, *flags(out=tmp_path / "runs"), "--vae", "pixel:8", "--init", path, *args
    )
    assert code == 2 and len(err) == 1 and not (tmp_path / "runs").exists(), err
    return err[0]


def test_init_from_another_preset_names_the_one_it_was_made_with(tmp_path, user):
    tiny = replace(PRESETS["tiny"], in_channels=192, out_channels=192)
    save_unet(tmp_path / "tiny.safetensors", UNet(tiny), {"vae": pixel(8).meta()})
    torch.save(UNet(tiny).state_dict(), tmp_path / "tiny.pt")
    convert(tmp_path / "tiny.safetensors", tmp_path / "folder", "diffusers")
    for name in ("tiny.safetensors", "tiny.pt", "folder"):
        message = init_error(tmp_path, user, tmp_path / name)
        assert (
            f"--init {tmp_path / name} is of another architecture: it has model_channels 128"
            in message
        )
        assert "--model nano is model_channels 32" in message and message.endswith(
            "Choose the preset it was made with (--model tiny)."
        )
    net = UNet(replace(PRESETS["nano"], in_channels=192, out_channels=192))
    torch.save(
        {k: v for k, v in net.state_dict().items() if k != "out.0.bias"}, tmp_path / "less.pt"
    )
    save_unet(tmp_path / "whole.safetensors", net, {"vae": pixel(8).meta()})
    with safe_open(tmp_path / "whole.safetensors", "pt") as file:
        save_file(
            {k: file.get_tensor(k) for k in file.keys() if k != "out.0.bias"},
            tmp_path / "less.safetensors",
            file.metadata(),
        )
    for name in (
        "less.pt",
        "less.safetensors",
    ):  # what is wrong is not hidden by the question of heads
        assert "1 missing: out.0.bias" in init_error(tmp_path, user, tmp_path / name)
    heads = replace(PRESETS["nano"], in_channels=192, out_channels=192, num_heads=2)
    save_unet(tmp_path / "heads.safetensors", UNet(heads), {"vae": pixel(8).meta()})
    assert "it has channels a head [16]; --model nano is channels a head [32].  " in init_error(
        tmp_path, user, tmp_path / "heads.safetensors"
    )
    save_unet(
        tmp_path / "new.safetensors",
        UNet(replace(tiny, attention_order="new")),
        {"vae": pixel(8).meta()},
    )
    assert "it has attention_order new; --model tiny is attention_order legacy." in init_error(
        tmp_path, user, tmp_path / "new.safetensors", "--model", "tiny"
    )


def test_init_from_any_layout_of_the_same_network_starts_from_the_same_weights(tmp_path, user):
    """Heads by number or by width, qkv rows in --model's order: one function, and its fingerprint
    where it is one set of bytes."""
    net = UNet(replace(PRESETS["tiny"], in_channels=192, out_channels=192))
    save_unet(tmp_path / "own.safetensors", net, {"vae": pixel(8).meta()})
    convert(tmp_path / "own.safetensors", tmp_path / "folder", "diffusers")
    torch.save(net.state_dict(), tmp_path / "foreign.pt")
    config = json.loads((tmp_path / "folder/config.json").read_text())
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text(json.dumps(config))
    save_file(
        load_file(tmp_path / "folder/diffusion_pytorch_model.safetensors"),
        tmp_path / "bare/diffusion_pytorch_model.safetensors",
    )
    for name in ("own.safetensors", "foreign.pt", "folder", "bare"):
        code, _, err = user(
            train.main,
            *flags(out=tmp_path / "runs", model="tiny", images=8, name=name, ema=""),
            "--vae",
            "pixel:8",
            "--init",
            tmp_path / name,
        )
        assert code == 0, err
        assert load_unet(tmp_path / "runs" / name)[1]["init"]["fingerprint"] == fingerprint(
            net.state_dict()
        ), name


def test_init_that_names_no_latents_says_that_pca_does_not_count(tmp_path, user):
    torch.save(UNet(replace(PRESETS["nano"])).state_dict(), tmp_path / "foreign.pt")
    code, _, err = user(
        train.main, *flags(out=tmp_path / "runs"), "--vae", "pca", "--init", tmp_path / "foreign.pt"
    )
    assert (
        code == 2
        and "does not say which latents its network knows.  Name the autoencoder with --vae FILE, "
        "pixel or pixel:N; pca is fitted "
        "anew to every data set, so it does not count."
        in err[-1]
        and not (tmp_path / "runs").exists()
    )


# ---- the walk from a batch to its loss ----------------------------------------------------------


def pictures_in(value) -> bool:
    """Does an argument hold images or latents (B, C, H, W)?"""
    if isinstance(value, dict):
        return any(map(pictures_in, value.values()))
    return isinstance(value, torch.Tensor) and value.ndim == 4


def test_a_batch_meets_few_functions_on_its_way_to_the_loss(tmp_path):
    """Eight of ours are given pictures, latents or their errors; the network and torch aside."""
    cfg = resolve(Config(**{**FAST, "out": str(tmp_path), "classes": ("glasses",)}))
    tr = train.setup(cfg, ALONE)
    batch = next(train.load(tr))
    root, walk = str(Path(train.__file__).parent), []

    class Net(torch.nn.Module):
        def forward(self, x, t, **cond):
            walk.append("the network")
            return x

    def follow(frame, event, arg):
        code = frame.f_code
        ours = code.co_filename.startswith(root) and "site-packages" not in code.co_filename
        if event != "call" or not ours or code.co_name[0] == "<":
            return
        if any(pictures_in(frame.f_locals[name]) for name in code.co_varnames[: code.co_argcount]):
            walk.append(f"{Path(code.co_filename).stem}.{code.co_name}")

    net = Net()
    sys.setprofile(follow)
    try:
        loss = tr.loss(net, batch)
    finally:
        sys.setprofile(None)
    assert loss.per_sample.shape == (8,)
    walk = [name for name in dict.fromkeys(walk) if not name.startswith("test_")]
    assert walk[0] == "train.__call__" and "objectives.loss" in walk
    walk.remove("the network")
    assert len(walk) <= 8, walk
