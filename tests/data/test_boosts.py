"""--boost: against resizing where the networks do nothing, and against --init where they do."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

import samplers
from ckpt import save_unet
from conftest import randomize
from data.boosts import Before, open_stage
from data.images import read_picture
from diffusion.boosting import boost
from diffusion.coupling import resize
from harness.pictures import to_uint8
from model import UNet, UNetConfig
from objectives import make_objective
from samplers import Sampling, open_generator
from vae import pixel

NET = UNetConfig(12, 12, 32, (1,), num_res_blocks=1, attention=(0,), num_heads=2)
CPU = torch.device("cpu")


def base(path, **more):
    net = randomize(UNet(replace(NET, num_classes=len(more.get("classes", ())))), 1)
    meta = {"objective": asdict(make_objective("fm")), "vae": pixel(2).meta(), "resolution": 8}
    save_unet(path, net, meta | more)
    return path


def cfm(path, resolution=16, seed=None, vae=None, classes=(), in_channels=24, **objective):
    """An untrained network says u = 0; one with a seed, something."""
    cfg = replace(NET, in_channels=in_channels, num_classes=len(classes))
    net = UNet(cfg) if seed is None else randomize(UNet(cfg), seed)
    said = make_objective("cfm", **{"noise_aug": 0.0, **objective})
    meta = {"objective": asdict(said), "vae": (vae or pixel(2)).meta(), "resolution": resolution}
    save_unet(path, net, meta | ({"classes": list(classes)} if classes else {}))
    return path


def drawn(folder):
    paths = sorted(folder.glob("*.png"))
    return np.stack([np.asarray(Image.open(path), int) for path in paths])


def run(user, tmp_path, *flags, out="s"):
    flags = ["--n", 3, "--steps", 2, *flags, "--out", tmp_path / out]
    return user(samplers.main, "--ckpt", tmp_path / "base", *flags)


def test_networks_that_do_nothing_resize_what_the_base_drew_without_rounding(tmp_path, user):
    base(tmp_path / "base"), cfm(tmp_path / "a"), cfm(tmp_path / "b", 32)
    boosts = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    code, out, err = run(user, tmp_path, "--boost", boosts)
    assert code == 0, err
    gen = open_generator(Sampling(str(tmp_path / "base"), steps=2, device="cpu"), CPU)
    pixels = gen.images([0, 1, 2]).pixels
    large = to_uint8(resize(resize(pixels, (16, 16)), (32, 32))).permute(0, 2, 3, 1).numpy()
    apart = abs(drawn(tmp_path / "s") - large)
    # 8 bits in between would change a value in four.
    assert apart.max() <= 1 and (apart > 0).mean() < 0.01
    lines = [line for line in out.splitlines() if line.startswith("boost to ")]
    assert [line.split()[2] for line in lines] == ["16x16", "32x32"]
    assert all("NFE/image" in line and "decode" in line for line in lines)


def test_a_seed_s_picture_is_the_same_in_any_batch_and_holds_noise_of_its_own(tmp_path, user):
    base(tmp_path / "base"), cfm(tmp_path / "a", seed=5, noise_aug=0.6)
    flags = ["--boost", tmp_path / "a", "--boost-method", "euler", "--boost-steps", 2]
    for name, batch in (("one", 1), ("all", 64)):
        code, out, err = run(user, tmp_path, *flags, "--batch", batch, out=name)
        assert code == 0 and "NFE/image 2 " in out, err
    assert abs(drawn(tmp_path / "one") - drawn(tmp_path / "all")).max() <= 1
    code, _, err = run(user, tmp_path, *flags, "--seed", 1, out="later")
    assert abs(drawn(tmp_path / "later")[:2] - drawn(tmp_path / "all")[1:]).max() <= 1


def test_what_is_enlarged_is_what_init_enlarges(tmp_path, user):
    """The same small picture on both ways; its noise is none, for the two ways draw others."""
    path = cfm(tmp_path / "base", seed=3)
    r = np.random.default_rng(0)
    Image.fromarray(r.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "p.png")
    flags = ["--init", tmp_path / "p.png", "--method", "euler", "--n", 1]
    code, _, err = run(user, tmp_path, *flags)
    assert code == 0, err
    small = read_picture(str(tmp_path / "p.png"), 8)[None] / 127.5 - 1
    stage, _ = open_stage(str(path), Before((8, 8), pixel(2), [], False), CPU, "fp32")
    large = boost([stage], small, [0], method="euler", steps=2).pixels
    assert abs(drawn(tmp_path / "s")[0] - to_uint8(large)[0].permute(1, 2, 0).numpy()).max() <= 1


def test_labels_go_to_networks_that_were_trained_with_the_same_classes(tmp_path, user):
    base(tmp_path / "base", classes=["cat", "dog"])
    cfm(tmp_path / "own", seed=5, classes=["cat", "dog"]), cfm(tmp_path / "other", classes=["cow"])
    pictures = {}
    for label in ("cat", "dog"):
        code, _, err = run(
            user, tmp_path, "--labels", label, "--boost", tmp_path / "own", out=label
        )
        assert code == 0, err
        stage, _ = open_stage(
            str(tmp_path / "own"), Before((8, 8), pixel(2), ["cat", "dog"], True), CPU, "fp32"
        )
        assert stage.labelled
        gen = open_generator(
            Sampling(str(tmp_path / "base"), steps=2, labels=(label,), device="cpu"), CPU
        )
        y = torch.full((3,), ["cat", "dog"].index(label))
        large = boost([stage], gen.images([0, 1, 2], y).pixels, [0, 1, 2], y).pixels
        pictures[label] = to_uint8(large).permute(0, 2, 3, 1).numpy()
        assert abs(drawn(tmp_path / label) - pictures[label]).max() <= 1
    code, _, err = run(user, tmp_path, "--labels", "cat", "--boost", tmp_path / "other", out="no")
    assert code == 2 and len(err) == 1 and "other classes" in err[0]


@pytest.mark.parametrize(
    "made, message",
    [
        ({"lowres": 4}, "enlarges 4 times to 16 px: got pictures of 8x8, wanted a side of 4"),
        ({"resolution": 32}, "enlarges 2 times to 32 px: got pictures of 8x8"),
        ({"in_channels": 16}, "takes 16 channels"),
        ({"vae": pixel(1), "in_channels": 24}, "takes 24 channels"),
        ({"upsample": "nearest", "vae": pixel(4), "in_channels": 96}, "are not those of"),
    ],
    ids=["factor", "size", "channels", "family", "autoencoder"],
)
def test_what_does_not_follow_is_refused_in_one_line(tmp_path, user, made, message):
    base(tmp_path / "base")
    made = {**made}
    if made.get("in_channels") == 96:
        net = UNet(replace(NET, in_channels=96, out_channels=48))
        said = make_objective("cfm", noise_aug=0.0, upsample="nearest")
        meta = {"objective": asdict(said), "vae": pixel(4).meta(), "resolution": 16}
        save_unet(tmp_path / "a", net, meta)
    else:
        cfm(tmp_path / "a", **made)
    code, _, err = run(user, tmp_path, "--boost", tmp_path / "a")
    assert code == 2 and len(err) == 1 and message in err[0], err
    assert not (tmp_path / "s").exists()


def test_a_network_that_does_not_enlarge_is_refused(tmp_path, user):
    base(tmp_path / "base")
    code, _, err = run(user, tmp_path, "--boost", tmp_path / "base")
    assert code == 2 and len(err) == 1 and "was not trained to enlarge" in err[0]
    code, _, err = run(user, tmp_path, "--boost-steps", 3)
    assert code == 2 and len(err) == 1 and "--boost" in err[0]
