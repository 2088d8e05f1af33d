"""Foreign files in the scripts that sample and train."""

from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image

import samplers
import train
from checkpoints import CFG, SD, TINY
from ckpt import convert, fingerprint, load_unet, save_unet
from conftest import randomize
from harness.cli import UserError
from harness.run import checkpoints
from model import PRESETS, UNet
from objectives import make_objective
from vae import pixel

# ---- foreign files in the other scripts ---------------------------------------------------------


def test_the_sampler_draws_from_a_foreign_file_what_it_draws_from_our_own(tmp_path, user):
    net = randomize(UNet(TINY["adm"]))
    torch.save(net.state_dict(), tmp_path / "adm.pt")
    save_unet(
        tmp_path / "own",
        net,
        {
            "objective": asdict(make_objective("v", table="scaled_linear")),
            "vae": pixel().meta(),
            "resolution": 16,
            "run": "r",
            "images": 8,
            "classes": ["a", "b", "c", "d", "e"],
        },
    )
    convert(tmp_path / "own", tmp_path / "folder", "diffusers")
    says = [
        "--objective",
        "v",
        "--table",
        "scaled_linear",
        "--resolution",
        16,
        "--num-head-channels",
        16,
        "--attention-order",
        "legacy",
    ]
    grids = []
    for name, flags in (("own", []), ("adm.pt", says), ("folder", [])):
        code, _, err = user(
            samplers.main,
            "--ckpt",
            tmp_path / name,
            "--n",
            2,
            "--steps",
            2,
            "--labels",
            "3,1" if flags else "d,b",
            "--out",
            tmp_path / f"s{len(grids)}",
            *flags,
        )
        assert code == 0, err
        grids.append((tmp_path / f"s{len(grids)}-grid.png").read_bytes())
    assert (
        grids[0] == grids[1] == grids[2]
        and len(set(Image.open(tmp_path / "s0-grid.png").tobytes())) > 20
    )
    for drop, message in (
        ("--objective", "does not say what its network was trained to output.  Add --objective"),
        ("--resolution", "does not say its own"),
        ("--num-head-channels", "number of attention heads"),
        ("--attention-order", "order of the qkv rows"),
    ):
        i = says.index(drop)
        code, _, err = user(samplers.main, "--ckpt", tmp_path / "adm.pt", *says[:i], *says[i + 2 :])
        assert code == 2 and len(err) == 1 and message in err[0], err
    for flags, message in (
        (["--objective", "fm"], "says its objective is v, got fm"),
        (["--table", "linear"], "says its table is 'scaled_linear', got 'linear'"),
        (["--vae", "pixel:2"], "was trained on other latents"),
        (["--num-heads", 1], "got num_heads 1"),
        (["--resolution", 17], "wanted a multiple of 2"),
    ):
        code, _, err = user(samplers.main, "--ckpt", tmp_path / "own", *flags)
        assert code == 2 and len(err) == 1 and message in err[0], err


def test_the_sampler_says_what_a_network_still_needs(tmp_path, user):
    torch.save(UNet(SD).state_dict(), tmp_path / "sd.ckpt")
    torch.save(UNet(CFG).state_dict(), tmp_path / "latent.pt")
    for name, flags, message in (
        ("sd.ckpt", ["--num-heads", 2], "draws what a text says"),
        ("latent.pt", [], "does not say which latents its network knows"),
        ("latent.pt", ["--vae", "pixel:2"], "makes 12 channels, but"),
        ("latent.pt", ["--table", "linear"], "is fm, which has none"),
    ):
        heads = [] if name == "sd.ckpt" else ["--num-heads", 1]
        code, _, err = user(
            samplers.main, "--ckpt", tmp_path / name, "--objective", "fm", *heads, *flags
        )
        assert code == 2 and len(err) == 1 and message in err[0], err


def test_training_starts_from_a_foreign_file_and_never_saves_it_as_its_own(tmp_path, user):
    net = randomize(UNet(replace(PRESETS["nano"], in_channels=192, out_channels=192)))
    torch.save({"module." + k: v for k, v in net.state_dict().items()}, tmp_path / "foreign.pt")
    flags = [
        "--data",
        "toyfaces:24",
        "--resolution",
        32,
        "--model",
        "nano",
        "--images",
        8,
        "--batch",
        4,
        "--ema",
        "0.1",
        "--init",
        tmp_path / "foreign.pt",
        "--preview-every",
        0,
        "--eval-every",
        0,
        "--out",
        tmp_path,
    ]
    code, _, err = user(train.main, *flags, "--name", "a")
    assert (
        code == 2
        and "does not say which latents its network knows.  Name the autoencoder with --vae"
        in err[-1]
    )
    code, _, err = user(train.main, *flags, "--name", "b", "--vae", "pixel:8")
    assert code == 0, err
    meta = load_unet(tmp_path / "b")[1]
    assert (
        meta["base_fingerprint"]
        == meta["init"]["fingerprint"]
        == fingerprint(net.state_dict())
        != meta["fingerprint"]
    )
    code, _, err = user(train.main, *flags, "--name", "c", "--vae", "pixel:8", "--lr", 0)
    assert (
        code == 2
        and "after 8 images the weights are bit for bit those training started from" in err[-1]
        and not checkpoints(tmp_path / "c")
    )
    code, _, err = user(train.main, *flags, "--name", "d", "--vae", "pixel:8", "--model", "tiny")
    assert (
        code == 2
        and "--model tiny is model_channels 128.  Choose the preset it was made with (--model nano)"
        in err[-1]
        and not (tmp_path / "d").exists()
    )
    assert "is told what to draw by text" in user(train.main, *flags, "--model", "sd15")[2][-1]
    head = PRESETS["nano"]
    # Heads are compared although no tensor shows them.
    with pytest.raises(
        UserError, match="got num_heads 4"
    ):
        load_unet(
            tmp_path / "b", num_heads=4, num_head_channels=0, attention_order=head.attention_order
        )
