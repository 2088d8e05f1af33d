"""A teacher, its assessor and its students, small enough for tests."""

import atexit
import json
import shutil
import tempfile
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import randomize
from safetensors.torch import load_file

import distill
import train
from ckpt import save_unet
from distillation.pretrain import Pretrain, pretrain
from distillation.teacher import Teacher
from harness.cli import dashed, shown
from harness.ranks import Ranks
from harness.run import checkpoints
from model import PRESETS, UNet
from objectives import make_objective
from vae import pixel

ALONE = Ranks(0, 1, torch.device("cpu"))
FAST = dict(
    batch=8,
    images=40,
    lr=1e-3,
    preview_every=0,
    eval_every=0,
    save_every=0,
    log_every=8,
    holdout=0.1,
    ema=(0.05,),
)
EPS = make_objective("ddpm", table="scaled_linear")


@pytest.fixture(scope="module")
def home():
    return make_home()


@cache
def make_home() -> Path:
    """A teacher of random weights (its blocks show the timestep as a trained one's do) and a
    pretrained assessor; made once for all files of tests."""
    home, vae = Path(tempfile.mkdtemp(prefix="distill-")), pixel(8)
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    net = randomize(UNet(replace(PRESETS["nano"], in_channels=192, out_channels=192)), 1)
    net.time_embed[2].weight.data.mul_(12)
    meta = {"objective": asdict(EPS), "vae": vae.meta(), "resolution": 32, "classes": []}
    save_unet(home / "teacher.safetensors", net, {**meta, "config": {"data": "toyfaces:48"}})
    how = dict(bins=10, patterns=3, dim=24, samples=1024, profile_samples=200, holdout=0.1)
    how |= dict(steps=200, batch=64, lr=1e-2)
    places = dict(teacher=str(home / "teacher.safetensors"), out=str(home / "a.safetensors"))
    pretrain(Pretrain(**places, **how))
    return home


def planted(z, companion, t_logits, p_logits):
    """A companion whose heads say the given logits whatever it sees."""
    for head, logits in ((companion.t_head, t_logits), (companion.p_head, p_logits)):
        head.weight.data.zero_()
        head.bias.data.copy_(logits)


def stub(net, objective=EPS):
    """A Teacher around any function."""
    net.cfg = replace(PRESETS["nano"], in_channels=3, out_channels=3)
    return Teacher(net, objective, {"fingerprint": ""}, Path("stub"), {})


@pytest.fixture(scope="module", autouse=True)
def few_samples():
    """The final grid of a run: two images in one step, for 32 in 50 would be most of the time."""
    draw = train.draw_samples
    with pytest.MonkeyPatch.context() as m:
        m.setattr(
            train,
            "draw_samples",
            lambda tr, net, seeds, **how: draw(tr, net, seeds[:2], method="ddim", steps=1),
        )
        yield


def words(**flags) -> list[str]:
    """FAST and other flags, as they are typed."""
    return [w for k, v in {**FAST, **flags}.items() for w in (dashed(k), shown(v))]


def config(home, **fields):
    places = {"teacher": str(home / "teacher.safetensors")}
    if fields.get("assessor") in distill.READS or fields.get("adaptive_t"):
        places["assessor_file"] = str(home / "a.safetensors")
    return distill.resolve(distill.Config(**{**FAST, **places, **fields}))


def go(home, out, **fields) -> Path:
    cfg = config(home, out=str(out), **fields)
    distill.run(cfg, ALONE)
    return out / cfg.name


def rows(run, event="train"):
    return [
        r
        for r in map(json.loads, (run / "log.jsonl").read_text().splitlines())
        if r["event"] == event
    ]


def tensors(run) -> dict[str, torch.Tensor]:
    folder = checkpoints(run)[-1]
    return {f"{f.name}:{k}": v for f in sorted(folder.iterdir()) for k, v in load_file(f).items()}


def same(a, b, of="") -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) for k, v in a.items() if k.startswith(of)
    )
