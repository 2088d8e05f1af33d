"""--uncertainty: pictures that stay as they are, maps against networks drawn by hand, and whose
posterior is taken."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import samplers
from ckpt import load_unet, save_unet
from ckpt.posteriors import load_posterior, save_posterior
from conftest import randomize
from data.uncertainty import mapped
from diffusion.guidance import guided
from diffusion.laplace import Curvature
from diffusion.sampling import sample
from model import UNet, UNetConfig
from objectives import make_objective
from samplers import Sampling, open_generator
from vae import pixel

# Norms, attention and two levels, as the real ones have them.
NET = UNetConfig(48, 48, 32, (1, 2), num_res_blocks=1, attention=(0, 1), num_heads=2)
SHAPE, PIXEL = (48, 4, 4), pixel(4)
CPU = torch.device("cpu")
N = 3


def network(path, objective="fm", seed=1, config=None, **more):
    """A small U-Net of 16 px toy faces, whose last layer is not all noise."""
    classes = more.get("classes", ())
    net = randomize(UNet(replace(NET, num_classes=len(classes))), seed)
    meta = {"objective": asdict(make_objective(objective)), "vae": PIXEL.meta(), "resolution": 16}
    config = {"data": "toyfaces:64", "holdout": 0.2} if config is None else config
    save_unet(path, net, meta | {"config": config} | more)
    return path


def known(path, prior=50.0, scale=1.0):
    """A posterior of a network in a file, of features that nobody saw."""
    net, meta = load_unet(path)
    curvature = Curvature(net.out[2], torch.tensor([0.5, 2.0]))
    phi = torch.randn(8, 32, 4, 4, generator=torch.Generator().manual_seed(2)).relu()
    curvature.add(phi, torch.rand(8, generator=torch.Generator().manual_seed(3)))
    curvature.A *= scale
    file = path.with_name(f"{path.name}-posterior.safetensors")
    save_posterior(file, curvature.posterior(prior), meta["fingerprint"])
    return file


def run(user, tmp_path, *flags, out="s", net="net"):
    flags = ["--n", N, "--steps", 4, *flags, "--out", tmp_path / out]
    return user(samplers.main, "--ckpt", tmp_path / net, *flags)


def files_of(tmp_path, out):
    return {path.name: path.read_bytes() for path in sorted((tmp_path / out).glob("*.png"))}


def pixels_of(tmp_path, out):
    paths = sorted((tmp_path / out).glob("*.png"))
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def found(tmp_path, out="s"):
    return json.loads((tmp_path / f"{out}-uncertainty.json").read_text())


def scores(said):
    return torch.tensor([row["score"] for row in said["images"]])


MODES = {
    "shared": ["--uncertainty", 3],
    "tangent": ["--uncertainty", 2, "--tangent"],
    "integrated": ["--uncertainty", "integrated"],
}


@pytest.mark.parametrize(
    "objective, mode",
    [("fm", "shared"), ("fm", "tangent"), ("fm", "integrated"), ("ddpm", "integrated")],
)
def test_pictures_are_those_of_plain_sampling_bit_for_bit(tmp_path, user, objective, mode):
    posterior = known(network(tmp_path / "net", objective))
    method = ["--method", "dpmpp_2m"] if objective == "ddpm" else []
    code, out, err = run(user, tmp_path, *method, out="plain")
    assert code == 0, err
    code, more, err = run(
        user, tmp_path, *method, *MODES[mode], "--posterior", posterior, out="plain2"
    )
    assert code == 0, err
    assert (pixels_of(tmp_path, "plain") == pixels_of(tmp_path, "plain2")).all()
    said = found(tmp_path, "plain2")
    assert said["mode"] == mode and len(said["images"]) == N
    assert [row["seed"] for row in said["images"]] == [0, 1, 2]
    assert len(set(scores(said).tolist())) == N and scores(said).isfinite().all()
    # The line of NFE says what the images cost, and no word of guidance.
    assert out.splitlines()[0].split("  ")[:3] == more.splitlines()[0].split("  ")[:3]
    calls = 7 if objective != "ddpm" else 4
    extra = {"shared": 3, "tangent": 2, "integrated": 0}[mode] * calls
    assert f"uncertainty: {mode}, {extra} network evaluations" in more, more
