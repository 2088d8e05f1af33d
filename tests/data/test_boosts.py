"""--boost: against resizing where the networks do nothing, and against --init where they do."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

import data.boosts
import samplers
from ckpt import save_unet
from conftest import randomize
from data.boosts import Before, open_stage
from data.images import read_picture
from diffusion.boosting import boost, boost_generators
from diffusion.coupling import enlarged, resize
from diffusion.sampling import draw
from diffusion.schedules import norm, table_time
from harness.pictures import to_uint8
from model import UNet, UNetConfig
from objectives import make_objective
from samplers import Generator, Sampling, open_generator
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


class Oracle(torch.nn.Module):
    """The exact mean of what `objective` asks for, in float64, where a large latent is normal about
    0.8 times what is known of it, with deviation 0.5."""

    cfg = replace(NET, in_channels=24, num_classes=0)

    def __init__(self, objective):
        super().__init__()
        self.objective = objective

    def forward(self, x, k):
        o, k = self.objective, k.double().view(-1, 1, 1, 1)
        x, low = x.double().chunk(2, 1)
        t = table_time(o.table, k, o.zero_snr) if o.table else k / 1000
        x = x * norm(t) if o.table else x
        mean, share = 0.8 * low, (1 - t) * 0.25 / ((1 - t) ** 2 * 0.25 + t**2)
        x0 = mean + share * (x - (1 - t) * mean)
        eps = (x - (1 - t) * x0) / t
        return o.goal(x0, eps, t)


CASCADES = [
    dict(target="u"), dict(target="u", table="gvp"), dict(target="eps", table="linear"),
    dict(target="v", table="cosine"), dict(target="v", table="linear", zero_snr=True),
    dict(target="x0", table="cosine"), dict(target="eps"),
]  # fmt: skip


@pytest.mark.parametrize("said", CASCADES, ids=lambda v: "-".join(map(str, v.values())))
def test_diffusion_from_pure_noise_is_drawn_along_its_own_path(monkeypatch, said):
    """With the exact mean a sample keeps its quantile on the way from noise to data (the flow of
    normal distributions is that in closed form), whatever the network says, and by both ways that
    enlarge: as one of --boost, and --init."""
    objective = make_objective("cfm", noise_aug=1.0, **said)
    meta = {"objective": asdict(objective), "vae": pixel(2).meta(), "resolution": 16}
    monkeypatch.setattr(data.boosts, "find_checkpoint", lambda name: name)
    monkeypatch.setattr(data.boosts, "load_unet", lambda path, dtype: (Oracle(objective), meta))
    small, vae = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5, pixel(2)
    low = enlarged(small, (16, 16), vae.encode).double()

    def wanted(noise):
        end = torch.tensor(objective.t_max).double()
        spread = ((1 - end) ** 2 * 0.25 + end**2).sqrt()
        quantile = (noise.double() * norm(end) - (1 - end) * 0.8 * low) / spread
        return vae.decode((0.8 * low + 0.5 * quantile).float())

    how = {"method": "dopri5", "rtol": 1e-6, "atol": 1e-6}
    stage, _ = open_stage("a", Before((8, 8), vae, [], False), CPU, "fp32")
    found = boost([stage], small, [3, 4], **how).pixels
    noise = draw(boost_generators([3, 4], 0), low.float())
    torch.testing.assert_close(found, wanted(noise), rtol=0, atol=6e-4)
    gen = Generator(objective, Oracle(objective), vae, (12, 8, 8), device=CPU)
    found = gen.images([3, 4], low=low.float(), **how).pixels
    torch.testing.assert_close(found, wanted(gen.noise([3, 4])), rtol=0, atol=6e-4)


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
