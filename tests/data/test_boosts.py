"""--boost: against resizing where the networks do nothing, and against --init where they do."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

import data.boosts
import samplers
from ckpt import load_unet, save_unet
from ckpt.byteunet import ByteUNet, byte_config, byte_ids
from conftest import randomize
from data.boosts import Before, Enlarger, open_stage
from data.images import read_picture
from diffusion.boosting import Cost, boost, boost_generators
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


def cfm(
    path, resolution=16, seed=None, vae=None, classes=(), in_channels=24, kind=UNet, **objective
):
    """An untrained network says u = 0; one with a seed, something. kind: of its config."""
    cfg = replace(NET, in_channels=in_channels, num_classes=len(classes))
    net = kind(cfg) if seed is None else randomize(kind(cfg), seed)
    said = make_objective("cfm", **{"noise_aug": 0.0, **objective})
    meta = {"objective": asdict(said), "vae": (vae or pixel(2)).meta(), "resolution": resolution}
    meta |= {"classes": list(classes)} if classes else {}
    save_unet(path, net, {key: value for key, value in meta.items() if value})
    return path


def reader(cfg):
    """A network that is told what to draw in bytes."""
    return ByteUNet(byte_config(cfg, 32))


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
    code, out, err = run(user, tmp_path, "--boost", boosts, "--npz", tmp_path / "s.npz", out="z")
    assert code == 0, err
    assert (np.load(tmp_path / "s.npz")["arr_0"] == drawn(tmp_path / "z")).all()


def test_the_card_splits_the_seconds_of_all_that_was_drawn():
    enlarger = Enlarger([], [(16, 16), (32, 32)], {}, [])
    two, one = torch.tensor([10, 10]), torch.tensor([13])
    enlarger.costs = [
        [Cost(two, 0.2, 0.4, 0.6), Cost(two, 2.0, 4.0, 6.0)],
        [Cost(one, 0.1, 0.2, 0.3), Cost(one, 1.0, 2.0, 3.0)],
    ]
    base, first, second = enlarger.card(seconds=25.8).splitlines()
    assert base == "base  s/image: network and decode 2.000"  # 25.8 less 19.8, of three images
    times = "resize and encode 0.100  network 0.200  decode 0.300"
    assert first == f"boost to 16x16  NFE/image 11  s/image: {times}"
    times = "resize and encode 1.000  network 2.000  decode 3.000"
    assert second == f"boost to 32x32  NFE/image 11  s/image: {times}"


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


def test_a_picture_of_the_user_s_needs_no_base(tmp_path, user):
    """--init alone: the first network of --boost is --ckpt, walked as --boost-method says."""
    a, b = cfm(tmp_path / "base", seed=3, noise_aug=0.4), cfm(tmp_path / "b", 32, seed=4)
    r = np.random.default_rng(0)
    Image.fromarray(r.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "p.png")
    picture, euler = ["--init", tmp_path / "p.png"], ["--boost-method", "euler"]
    euler += ["--boost-steps", 2]
    code, _, err = run(user, tmp_path, *picture, "--method", "euler", "--boost", b, *euler)
    assert code == 0, err
    words = ["--n", 3, *picture, *euler, "--out"]
    code, out, err = user(samplers.main, *words, tmp_path / "o", "--boost", f"{a},{b}")
    assert code == 0 and "boost to 32x32  NFE/image 2 " in out, err
    assert (drawn(tmp_path / "o") == drawn(tmp_path / "s")).all()
    assert (drawn(tmp_path / "o")[0] != drawn(tmp_path / "o")[1]).any()  # noise of their own
    # Without noise on the way both are what boost() makes of the pixels.
    cfm(tmp_path / "still", seed=3)
    code, _, err = user(samplers.main, *words, tmp_path / "w", "--boost", tmp_path / "still")
    assert code == 0, err
    small = read_picture(str(tmp_path / "p.png"), 8)[None] / 127.5 - 1
    stage, _ = open_stage(str(tmp_path / "still"), Before((8, 8), None, [], False), CPU, "fp32")
    large = boost([stage], small, [0], method="euler", steps=2).pixels
    assert abs(drawn(tmp_path / "w") - to_uint8(large).permute(0, 2, 3, 1).numpy()).max() <= 1


def test_without_a_base_what_does_not_enlarge_or_has_no_picture_is_refused(tmp_path, user):
    base(tmp_path / "base"), cfm(tmp_path / "a")
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    for words, message in [
        (["--init", tmp_path / "p.png", "--boost", tmp_path / "base"], "not trained to enlarge"),
        (["--boost", tmp_path / "a"], "--ckpt is required"),
        (["--init", tmp_path / "p.png"], "--ckpt is required"),
        (["--init", tmp_path / "p.png", "--boost", tmp_path / "a", "--boost-steps", 3], "dopri5"),
        (["--init", tmp_path / "p.png", "--boost", tmp_path / "a", "--steps", 3], "dopri5"),
    ]:
        code, _, err = user(samplers.main, *words, "--out", tmp_path / "s")
        assert code == 2 and len(err) == 1 and message in err[0], err
    assert not (tmp_path / "s").exists()


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
        assert stage.told
        gen = open_generator(
            Sampling(str(tmp_path / "base"), steps=2, labels=(label,), device="cpu"), CPU
        )
        y = torch.full((3,), ["cat", "dog"].index(label))
        large = boost([stage], gen.images([0, 1, 2], y).pixels, [0, 1, 2], y).pixels
        pictures[label] = to_uint8(large).permute(0, 2, 3, 1).numpy()
        assert abs(drawn(tmp_path / label) - pictures[label]).max() <= 1
    code, _, err = run(user, tmp_path, "--labels", "cat", "--boost", tmp_path / "other", out="no")
    assert code == 2 and len(err) == 1 and "other classes" in err[0]


def by_hand(path, pixels, told, null, cfg):
    """What a network without noise makes of pixels (3, 3, 8, 8) in one Euler step from t = 1:
    x - u, with u = weak + cfg (strong - weak)."""
    net, vae = load_unet(path)[0].eval(), pixel(2)
    low = vae.encode(resize(pixels, (16, 16)))
    t, both = torch.full((3,), 1000.0), torch.cat([low, low], 1)
    with torch.no_grad():
        strong, weak = net(both, t, **told), net(both, t, **null)
    large = vae.decode(low - (weak + cfg * (strong - weak)))
    return to_uint8(large).permute(0, 2, 3, 1).numpy()


ONE = ["--boost-method", "euler", "--boost-steps", 1]


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_guidance_reaches_networks_with_classes(tmp_path, user, cfg):
    base(tmp_path / "base", classes=["cat", "dog"])
    path = cfm(tmp_path / "own", seed=5, classes=["cat", "dog"])
    flags = ["--labels", "dog,cat", "--cfg", cfg, "--boost", path, *ONE]
    code, _, err = run(user, tmp_path, *flags)
    assert code == 0, err
    said = Sampling(str(tmp_path / "base"), steps=2, labels=("dog",), cfg=cfg, device="cpu")
    y = torch.tensor([1, 0, 1])
    pixels = open_generator(said, CPU).images([0, 1, 2], y).pixels
    wanted = by_hand(path, pixels, {"y": y}, {"y": torch.full_like(y, -1)}, cfg)
    assert abs(drawn(tmp_path / "s") - wanted).max() <= 1
    asked = samplers.Config(said.ckpt, steps=2, labels=("dog",), cfg=cfg, boost=(str(path),))
    (about,) = data.boosts.open_enlarger(asked, open_generator(asked, CPU)).sampled()["boost"]
    assert about.get("cfg", 1.0) == cfg  # kept features of another strength are others
    # Autoguidance is of the base's own network: the strength is its, too.
    if cfg != 1.0:
        more = ["--guide-ckpt", tmp_path / "base"]
        code, _, err = run(user, tmp_path, *flags, *more, out="auto")
        assert code == 0, err
        gen = open_generator(replace(said, guide_ckpt=said.ckpt), CPU)
        pixels = gen.images([0, 1, 2], y).pixels
        wanted = by_hand(path, pixels, {"y": y}, {"y": y}, 1.0)
        assert abs(drawn(tmp_path / "auto") - wanted).max() <= 1


@pytest.mark.parametrize("prompts, cfg", [(["glasses", "a hat"], 1.0), (["a hat"], 2.5), ([], 1.0)])
def test_prompts_reach_networks_that_read_texts(tmp_path, user, prompts, cfg):
    """Whose base may read none: then they are told the null text, as unlabelled ones no class."""
    meta = {"objective": asdict(make_objective("fm")), "vae": pixel(2).meta(), "resolution": 8}
    save_unet(tmp_path / "base", randomize((reader if prompts else UNet)(NET), 1), meta)
    path = cfm(tmp_path / "own", seed=5, kind=reader)
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    asks = ["--prompt", f"@{tmp_path / 'prompts.txt'}", "--cfg", cfg] if prompts else []
    code, _, err = run(user, tmp_path, *asks, "--boost", path, *ONE)
    assert code == 0, err
    said = {"steps": 2, "cfg": cfg, "device": "cpu"}
    said |= {"prompt": asks[1]} if prompts else {}
    gen = open_generator(Sampling(str(tmp_path / "base"), **said), CPU)
    index = torch.arange(3) % len(prompts) if prompts else None
    pixels = gen.images([0, 1, 2], index).pixels
    texts = [prompts[i] for i in index] if prompts else [""] * 3
    null = {"context": byte_ids([""] * 3)}
    wanted = by_hand(path, pixels, {"context": byte_ids(texts)}, null, cfg)
    assert abs(drawn(tmp_path / "s") - wanted).max() <= 1
    if prompts:
        other = by_hand(path, pixels, null, null, 1.0)
        assert abs(other - wanted).max() > 2


@pytest.mark.parametrize(
    "made, message",
    [
        ({"lowres": 4}, "enlarges 4 times to 16 px: got pictures of 8x8, wanted a side of 4"),
        ({"resolution": 32}, "enlarges 2 times to 32 px: got pictures of 8x8"),
        ({"in_channels": 16}, "takes 16 channels"),
        ({"vae": pixel(1), "in_channels": 24}, "takes 24 channels"),
        ({"upsample": "nearest", "vae": pixel(4), "in_channels": 96}, "are not those of"),
        (
            {"resolution": 0, "vae": pixel(5), "in_channels": 150},
            "pictures of 8x8, wanted 2 times a side to be a multiple of 5",
        ),
    ],
    ids=["factor", "size", "channels", "family", "autoencoder", "not divisible"],
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


def test_who_reads_texts_and_is_asked_nothing_is_told_the_null_text(tmp_path, monkeypatch):
    """Which need not be the empty one: SDXL's is zeros."""
    zeros, ones = ({"context": torch.full((1, 4), i)} for i in (0.0, 1.0))
    said = data.boosts.prompts.Conditions(ones, zeros)
    monkeypatch.setattr(data.boosts.prompts, "tell", lambda *args: said)
    path, flags = cfm(tmp_path / "a", kind=reader), Sampling("base")
    before = Before((8, 8), None, [], False, flags)
    told = open_stage(str(path), before, CPU, "fp32")[0].told
    assert torch.equal(told(torch.tensor([-1, 3]))["context"], torch.zeros(2, 4))
    asked = before._replace(flags=replace(flags, prompt="a"))
    told = open_stage(str(path), asked, CPU, "fp32")[0].told
    assert torch.equal(told(torch.tensor([0]))["context"], torch.ones(1, 4))
    with pytest.raises(ValueError, match="wanted flags"):
        open_stage(str(path), before._replace(flags=None), CPU, "fp32")
