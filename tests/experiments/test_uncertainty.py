"""What is asked of a network's uncertainty: the measures against their definitions, and all of it
once on a network that was never trained."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from ckpt import save_unet
from ckpt.posteriors import load_posterior
from conftest import randomize
from experiments import stages, uncertainty
from model import PRESETS, UNet
from objectives import make_objective
from vae import pixel

NET = replace(PRESETS["nano"], in_channels=192, out_channels=192)


def network(path, data="toyfaces"):
    meta = {
        "objective": asdict(make_objective("fm")),
        "vae": pixel(8).meta(),
        "resolution": 64,
        "config": {"data": data},
    }
    save_unet(path, randomize(UNet(NET)), meta)
    return path


def test_auroc_counts_pairs_and_ties_half():
    high, low = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 0.0])
    pairs = [(h > l) + 0.5 * (h == l) for h in high for l in low]  # noqa: E741
    assert uncertainty.auroc(high, low) == pytest.approx(float(sum(pairs)) / 6)
    assert uncertainty.auroc(low, low) == 0.5


def test_spearman_is_scipy_s():
    r = np.random.default_rng(0)
    a, b = r.integers(0, 5, 40), r.normal(size=40)
    assert uncertainty.spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)


def test_the_dry_size_asks_everything_and_says_the_same_again(tmp_path, user, monkeypatch):
    faces = [stages.toyfaces.sample_face(10**6 + i) for i in range(30)]
    bank = faces, np.stack([stages.drawn(face) for face in faces])
    monkeypatch.setattr(stages, "bank", lambda: bank)
    monkeypatch.setattr(stages, "MOVES", stages.MOVES[:6])
    path, found = network(tmp_path / "net"), []
    for name in ("a", "b"):
        flags = ["--ckpt", path, "--size", "dry", "--out", tmp_path / name]
        code, out, err = user(uncertainty.main, *flags)
        assert code == 0, err
        text = json.loads((tmp_path / name / "uncertainty.json").read_text())
        found.append({key: text[key] for key in ("outliers", "realism", "filtering", "modes")})
        assert (tmp_path / name / "report.html").exists()
    assert found[0] == found[1]
    assert set(found[0]["outliers"]["0.3"]) == {"training faces", *uncertainty.KINDS}
    _, meta = uncertainty.load_unet(path)
    posterior = load_posterior(tmp_path / "a" / "posterior.safetensors", meta["fingerprint"])
    assert posterior.rows == 64 * 64  # pairs × places


def test_a_network_of_other_images_is_refused(tmp_path, user):
    network(tmp_path / "net", "robohash")
    code, _, err = user(uncertainty.main, "--ckpt", tmp_path / "net", "--out", tmp_path / "o")
    assert code == 2 and len(err) == 1 and "toy faces" in err[0]
    assert not (tmp_path / "o").exists()
