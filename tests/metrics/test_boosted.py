"""eval_fid.py --boost: networks that do nothing against resizing measured by hand, boosted samples
against the folder that samplers.py draws, and what does not fit."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

import eval_fid
import samplers
from ckpt import save_unet
from conftest import randomize
from data.dataset import open_dataset
from harness.pictures import decibels
from metrics.features import Pca, fit_extractor, open_images
from model import UNet, UNetConfig
from objectives import make_objective
from vae import pixel, psnr

NET = UNetConfig(12, 12, 32, (1,), num_res_blocks=1, attention=(0,), num_heads=2)
TRAINED = {"data": "toyfaces:96", "holdout": 0.4}
FAST = "--features pca --boost-method euler --boost-steps 2"


def base(path, **more):
    net = randomize(UNet(NET), 1)
    meta = {"objective": asdict(make_objective("fm")), "vae": pixel(2).meta(), "resolution": 16}
    save_unet(path, net, meta | {"config": TRAINED} | more)
    return path


def cfm(path, resolution=32, seed=None, vae=None, channels=12, **objective):
    """An untrained network says u = 0; one with a seed, something."""
    net = UNet(replace(NET, in_channels=2 * channels, out_channels=channels))
    said = make_objective("cfm", **{"noise_aug": 0.0, **objective})
    meta = {"objective": asdict(said), "vae": (vae or pixel(2)).meta(), "resolution": resolution}
    net = net if seed is None else randomize(net, seed)
    save_unet(path, net, meta | {"config": TRAINED})
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("TWINPATH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(user):
    return lambda line: user(eval_fid.main, *line.split())


def card_of(command, line):
    code, _, err = command(f"{line} --out card.json")
    assert code == 0, err
    return json.loads(Path("card.json").read_text())


def held_out():
    """uint8 (n, 3, 32, 32), as training holds them out."""
    held = open_dataset("toyfaces:96", resolution=32, holdout=0.4).heldout
    return held.images(range(len(held)))


def frechet_by_hand(x, y):
    """|m - n|² + tr(A + B - 2 (A B)^½), in NumPy."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b + 0j).real
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)


def test_two_networks_that_do_nothing_are_measured_as_two_resizes(here, command):
    """Held-out faces of 32 px, from 8 px."""
    metrics = pytest.importorskip("skimage.metrics", reason="a development oracle")
    cfm("a", 16), cfm("b")
    card = card_of(command, f"--boost a,b {FAST}")
    truth = held_out()
    n, x = len(truth), truth.float() / 127.5 - 1
    low = F.interpolate(x, (8, 8), mode="bilinear", antialias=True)
    large = F.interpolate(F.interpolate(low, (16, 16), mode="bilinear"), (32, 32), mode="bilinear")
    found = ((large + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    pairs = [(a.numpy(), b.numpy()) for a, b in zip(found, truth)]
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    ssims = [metrics.structural_similarity(a, b, channel_axis=0, **how) for a, b in pairs]
    psnrs = [metrics.peak_signal_noise_ratio(b, a) for a, b in pairs]
    got = card["metrics"]
    # 8 bits round one way or the other.
    assert got[f"PSNR{n}"]["value"] == pytest.approx(np.mean(psnrs), rel=1e-4)
    assert got[f"SSIM{n}"]["value"] == pytest.approx(np.mean(ssims), rel=1e-4)
    assert got[f"PSNR{n}"]["error"] == pytest.approx(np.std(psnrs, ddof=1) / n**0.5, rel=1e-3)
    assert got[f"latent MSE{n}"]["value"] == pytest.approx(
        float((pixel(2).encode(large) - pixel(2).encode(x)).square().mean()), rel=1e-4
    )
    extractor = fit_extractor(open_images("toyfaces:96", 32))
    assert isinstance(extractor, Pca) and extractor(truth).shape[1] == 512 > n  # fewer than d
    fx, fy = (extractor(images).double().numpy() for images in (truth, found))
    assert got[f"FD-pca{n}"]["value"] == pytest.approx(frechet_by_hand(fx, fy), rel=1e-3)

    # Unpaired: to what training saw, of which there are fewer than d, too.
    seen = open_dataset("toyfaces:96", resolution=32, holdout=0.4)
    fs = extractor(seen.images(range(len(seen)))).double().numpy()
    far = got[f"unpaired FD-pca{n}"]
    assert far["value"] == pytest.approx(frechet_by_hand(fs, fy), rel=1e-3)
    assert far["floor"] == pytest.approx(frechet_by_hand(fs, fx), rel=1e-3)  # true pictures'
    assert card["measured"]["unpaired reference images"] == len(seen) == 96 - n

    def rough(images):
        images = images.double() / 255
        return sum(float(images.diff(dim=dim).square().mean()) for dim in (-1, -2))

    assert got[f"sharpness{n}"]["value"] == pytest.approx(rough(found) / rough(truth), rel=1e-3)
    # Pixels as an autoencoder lose nothing.
    assert got[f"SSIM{n}"]["floor"] == pytest.approx(1) and got[f"patch FD{n}"]["floor"] == 0
    assert card["measured"]["holdout"] == 0.4 and card["measured"]["small"] == [8, 8]
    assert card["sampled"]["nfe"] == 4 and len(card["sampled"]["boost"]) == 2


def test_the_card_is_the_same_at_every_call_and_in_any_batch(here, command):
    cfm("a", seed=5, noise_aug=0.3)
    one, two, few = (
        card_of(command, f"--boost a {FAST} {more}")["metrics"]
        for more in ("", "", "--batch 7")
    )
    assert one == two
    for name, metric in one.items():
        assert few[name]["value"] == pytest.approx(metric["value"], rel=2e-3), name
        assert metric["error"] > 0, name


def test_a_better_network_has_a_nearer_card(here, command):
    """Noise that is left in is grain: PSNR falls, and the patches are far."""
    cfm("clean"), cfm("noisy", noise_aug=0.3)
    near, far = (card_of(command, f"--boost {name} {FAST}")["metrics"] for name in
                 ("clean", "noisy"))  # fmt: skip
    values = [{name.rstrip("0123456789"): m["value"] for name, m in each.items()}
              for each in (near, far)]  # fmt: skip
    assert values[0]["PSNR"] > values[1]["PSNR"] and values[0]["SSIM"] > values[1]["SSIM"]
    assert values[0]["patch FD"] < values[1]["patch FD"]
    assert values[0]["sharpness"] < 1 < values[1]["sharpness"]


def test_boosted_samples_are_those_that_samplers_draws(here, command, user):
    base("base"), cfm("a", seed=5, noise_aug=0.3)
    line = "--method euler --steps 2 --seed 3 --boost-method euler --boost-steps 2"
    card = card_of(command, f"--ckpt base --boost a --n 30 --features pca {line}")
    code, _, err = user(
        samplers.main, *"--ckpt base --boost a --n 30 --out drawn".split(), *line.split()
    )
    assert code == 0, err
    folder = "--fake drawn --ref toyfaces:96 --holdout 0.4 --resolution 32 --features pca"
    other = card_of(command, folder)
    assert card["measured"]["size"] == [32, 32] and card["sampled"]["nfe"] == 4
    for name, metric in card["metrics"].items():
        assert other["metrics"][name]["value"] == pytest.approx(metric["value"], rel=1e-6), name
    # The distance of both cards is to the same images, so their gap is of the small pictures.
    paired = card_of(command, f"--boost a {FAST}")["measured"]
    for name in ("reference", "reference hash", "reference images"):
        assert paired[f"unpaired {name}"] == card["measured"][name]
    given = card_of(command, f"--boost a {FAST} --ref toyfaces:20 --resolution 32")
    assert not any("unpaired" in name for name in (*given["metrics"], *given["measured"]))
    # Another network has features of its own, and its card does not stand beside the first.
    cfm("b", seed=6, noise_aug=0.3)
    third = card_of(command, f"--ckpt base --boost b --n 30 --features pca {line}")
    assert third["metrics"]["FD-pca30"]["value"] != card["metrics"]["FD-pca30"]["value"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("--boost five --resolution 64", "enlarges 5 times: got pictures of 64x64, wanted sides"),
        ("--boost two --resolution 64", "enlarges 2 times to 32 px: got pictures of 32x32"),
        ("--boost base", "was not trained to enlarge"),
        ("--boost nowhere", "nowhere"),
        ("--ckpt base --boost wide", "are not those of the network before it"),
        ("--ckpt base --boost five", "enlarges 5 times to 40 px: got pictures of 16x16"),
        ("--boost two --steps 3", "--steps does nothing with --boost without --ckpt"),
        ("--boost two --pairs 20", "--pairs does nothing with --boost without --ckpt"),
        ("--fake base --ref toyfaces:9 --boost two", "--boost does nothing with --fake"),
        ("--ckpt base --boost-steps 3", "--boost"),
        ("--boost two --holdout 0 --ref toyfaces:1", "has 1 images"),
        ("--boost two --infinity", "--infinity does nothing"),
        ("", "wanted either images to sample"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(here, command, line, message):
    base("base"), cfm("two"), cfm("five", 40, lowres=5)
    if "wide" in line:
        cfm("wide", vae=pixel(4), channels=48, upsample="nearest")
    code, _, err = command(f"{line} --features pca")
    assert code == 2 and len(err) == 1 and message in err[0], err


def test_decibels_are_one_formula():
    a, b = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.2)
    assert psnr(a, b) == pytest.approx(20, rel=1e-6)  # 0.2 of 2
    assert float(decibels(torch.tensor(25.0), peak=255)) == pytest.approx(34.1514, rel=1e-5)
    assert float(decibels(torch.tensor(0.0), peak=1)) == float("inf")
