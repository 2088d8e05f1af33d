"""What is timed at Stable Diffusion's size, in miniature: the parts are all of it, and asking how
sure the network is changes no image."""

import json

import pytest
import torch

from benchmarks import boosting_sd
from model import PRESETS, UNet


def test_a_row_s_parts_are_the_whole(tmp_path, user):
    words = ["--mini", "--batches", 2, "--rounds", 2, "--device", "cpu"]
    code, out, err = user(boosting_sd.main, *words, "--out", tmp_path / "r.json")
    assert code == 0, err
    said = json.loads((tmp_path / "r.json").read_text())
    assert said["sides"] == [64, 128] and said["evaluations"] == {"base": 3, "boost": 10}
    (row,) = said["rows"]
    assert row["uncertainty"]["same images"] and row["uncertainty"]["ratio"] > 0
    low, high = min(row["all seconds"]), max(row["all seconds"])
    # Medians of parts over two turns are their means.
    total = row["batch"] * sum(row["seconds an image"].values())
    assert 0.8 * low < total < 1.001 * high
    assert all(value > 0 for value in row["seconds an image"].values())


def test_the_networks_are_of_the_sizes_that_are_told():
    base, enlarger, vae, side = boosting_sd.networks(mini=False)
    assert base == PRESETS["sd15"] and 8 * side == 512 and vae == boosting_sd.VAEConfig()
    with torch.device("meta"):
        size = sum(p.numel() for p in UNet(enlarger).parameters())
    assert size == pytest.approx(280_674_336, rel=0.01)
    assert (enlarger.in_channels, enlarger.out_channels) == (8, 4)
