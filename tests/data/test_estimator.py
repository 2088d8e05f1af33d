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
from data.dataset import open_dataset
from data.uncertainty import fit, mapped, noise_of, open_estimator
from diffusion.guidance import guided
from diffusion.laplace import Curvature
from diffusion.sampling import sample
from mmdit import PRESETS, MMDiT
from model import UNet, UNetConfig, build
from objectives import make_objective
from samplers import Config, Sampling, open_generator
from vae import pixel

# Norms, attention and two levels, as the real ones have them.
NET = UNetConfig(192, 192, 32, (1, 2), num_res_blocks=1, attention=(0, 1), num_heads=2)
# Tokens of 2×2.
SIT = replace(PRESETS["sit-nano"], in_channels=192, out_channels=192, patch=2, pos_max=2)
SHAPE, PIXEL = (192, 4, 4), pixel(8)
CPU = torch.device("cpu")
N = 3
PAIRS = 12


def network(path, objective="fm", seed=1, config=None, cfg=NET, **more):
    """A small network of 32 px toy faces, whose last layer is not all noise."""
    classes = more.get("classes", ())
    net = randomize(build(replace(cfg, num_classes=len(classes))), seed)
    if isinstance(objective, str):
        objective = asdict(make_objective(objective))
    meta = {"objective": objective, "vae": PIXEL.meta(), "resolution": 32}
    config = {"data": "toyfaces:64", "holdout": 0.2} if config is None else config
    save_unet(path, net, meta | {"config": config} | more)
    return path


def last_of(net):
    return net.final_layer["linear"] if isinstance(net, MMDiT) else net.out[2]


def known(path, prior=50.0, scale=1.0):
    """A posterior of a network in a file, of features that nobody saw."""
    net, meta = load_unet(path)
    layer = last_of(net)
    curvature = Curvature(layer, torch.tensor([0.5, 2.0]))
    size = layer.weight.shape[1], *((4, 1) if isinstance(net, MMDiT) else (4, 4))
    phi = torch.randn(8, *size, generator=torch.Generator().manual_seed(2)).relu()
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
    "objective, mode, cfg",
    [
        ("fm", "shared", NET),
        ("fm", "tangent", NET),
        ("fm", "integrated", NET),
        ("ddpm", "integrated", NET),
        ("fm", "shared", SIT),
        ("fm", "tangent", SIT),
        ("fm", "integrated", SIT),
    ],
)
def test_pictures_are_those_of_plain_sampling_bit_for_bit(tmp_path, user, objective, mode, cfg):
    posterior = known(network(tmp_path / "net", objective, cfg=cfg))
    method = ["--method", "dpmpp_2m"] if objective == "ddpm" else []
    code, out, err = run(user, tmp_path, *method, out="plain")
    assert code == 0, err
    code, more, err = run(
        user, tmp_path, *method, *MODES[mode], "--posterior", posterior, out="plain2"
    )
    assert code == 0, err
    assert (pixels_of(tmp_path, "plain") == pixels_of(tmp_path, "plain2")).all()
    # And before they are rounded to 8 bits.
    cfg = Config(str(tmp_path / "net"), device="cpu", steps=4, method="dpmpp_2m" if method else "")
    asked = {"uncertainty": MODES[mode][1], "tangent": mode == "tangent"}
    gen, own = open_generator(cfg, CPU), open_generator(cfg, CPU)
    open_estimator(replace(cfg, posterior=str(posterior), **asked), own)
    seeds = list(range(N))
    assert torch.equal(own.images(seeds).pixels, gen.images(seeds).pixels)
    said = found(tmp_path, "plain2")
    assert said["mode"] == mode and len(said["images"]) == N
    assert [row["seed"] for row in said["images"]] == [0, 1, 2]
    assert len(set(scores(said).tolist())) == N and scores(said).isfinite().all()
    # The line of NFE says what the images cost, and no word of guidance.
    lines = [line for said in (out, more) for line in said.splitlines() if "NFE/image" in line]
    assert len(lines) == 2 and lines[0].split("  ")[:3] == lines[1].split("  ")[:3]
    calls = 7 if objective != "ddpm" else 4
    extra = {"shared": 3, "tangent": 2, "integrated": 0}[mode] * calls
    assert f"uncertainty: {mode}, {extra} network evaluations" in more, more


# ---- against networks drawn by hand --------------------------------------------------------------


def by_hand(path, file, n, steps, seed=7):
    """The variance (N, 4, 4) of n whole networks, their weights written and drawn by another
    generator from the covariance itself."""
    net, meta = load_unet(path)
    posterior = load_posterior(file, meta["fingerprint"])
    covariance = torch.linalg.inv(posterior.root @ posterior.root.T)
    many = torch.distributions.MultivariateNormal(torch.zeros(len(covariance)).double(), covariance)
    torch.manual_seed(seed)
    last, objective = net.out[2], make_objective("fm")
    own, bias = last.weight.detach().clone(), last.bias.detach().clone()
    x, ends = open_generator(Sampling(str(path), device="cpu"), CPU).noise(list(range(N))), []
    for by in many.sample((n, 192)).float():
        with torch.no_grad():
            last.weight.copy_(own + by[:, :-1].reshape(own.shape))
            last.bias.copy_(bias + by[:, -1])
        ends.append(sample(guided(objective, net), x, method="euler", steps=steps).x)
    return torch.stack(ends).var(0).mean(1)


def test_shared_networks_spread_as_those_drawn_by_hand(tmp_path, user):
    """Means over 192 independent channels of variances of 50 draws: a standard error of about
    sqrt(2 / 49 / 192) = 1.5 % at each place, on either side."""
    file = known(network(tmp_path / "net"), scale=20.0)
    flags = ["--uncertainty", 50, "--posterior", file, "--method", "euler", "--steps", 2]
    code, _, err = run(user, tmp_path, *flags)
    assert code == 0, err
    wanted = by_hand(tmp_path / "net", file, 50, 2)
    deviations = torch.tensor([row["deviation"] for row in found(tmp_path)["images"]])
    torch.testing.assert_close(deviations, wanted.sqrt().mean((1, 2)), rtol=0.03, atol=0)
    logs = wanted.log().mean((1, 2))
    torch.testing.assert_close(scores(found(tmp_path)), logs, rtol=0, atol=0.05)
    # First order is near where weights move little.
    code, _, err = run(user, tmp_path, "--uncertainty", 8, "--tangent", *flags[2:], out="t")
    near = torch.tensor([row["deviation"] for row in found(tmp_path, "t")["images"]])
    torch.testing.assert_close(near, deviations, rtol=0.1, atol=0)


@pytest.mark.parametrize("mode", ["shared", "integrated"])
def test_a_seed_s_score_is_its_own_in_any_batch(tmp_path, user, mode):
    file = known(network(tmp_path / "net"))
    said = []
    for name, more in (("all", []), ("one", ["--batch", 1]), ("later", ["--seed", 1])):
        code, _, err = run(user, tmp_path, *MODES[mode], "--posterior", file, *more, out=name)
        assert code == 0, err
        said.append(scores(found(tmp_path, name)))
    torch.testing.assert_close(said[1], said[0], rtol=0, atol=1e-3)
    torch.testing.assert_close(said[2][:2], said[0][1:], rtol=0, atol=1e-3)


@pytest.mark.parametrize("cfg", [1, 30])
def test_labels_and_guidance_reach_the_walk(tmp_path, user, cfg):
    """Where features do not see x, integrated is the tangent's limit: its ratio to 20 directions is
    1 but for their number. Guided, features of both halves are mixed."""
    path = network(tmp_path / "net", classes=["cat", "dog"])
    net, meta = load_unet(path)
    with torch.no_grad():
        net.input_blocks[0][0].weight.zero_()
    save_unet(path, net, {key: value for key, value in meta.items() if key != "fingerprint"})
    file, said = known(path), {}
    flags = ["--labels", "cat,dog", "--cfg", cfg, "--posterior", file, "--method", "euler"]
    flags += ["--steps", 2]
    for name, more in (("i", ["integrated"]), ("t", [20, "--tangent"])):
        code, _, err = run(user, tmp_path, *flags, "--uncertainty", *more, out=name)
        assert code == 0, err
        said[name] = torch.tensor([row["deviation"] for row in found(tmp_path, name)["images"]])
    torch.testing.assert_close(said["i"], said["t"], rtol=0.03, atol=0)
    cat, dog, again = said["i"].tolist()
    assert cat != dog and cat == pytest.approx(again, rel=1e-5)


# ---- whose posterior -----------------------------------------------------------------------------


def test_a_posterior_is_fitted_written_and_taken_up_and_another_network_s_refused(tmp_path, user):
    network(tmp_path / "net"), network(tmp_path / "other", seed=9)
    file = tmp_path / "kept" / "p.safetensors"
    flags = ["--uncertainty", "integrated", "--posterior-pairs", 40, "--posterior", file]
    code, out, err = run(user, tmp_path, *flags)
    assert code == 0 and "fits a posterior to 40 pairs of toyfaces:64" in out, err
    said, written = found(tmp_path), file.read_bytes()
    assert said["places"] == 40 * 4 * 4
    assert load_posterior(file, said["network"]).prior == said["prior"]
    code, out, err = run(user, tmp_path, *flags, out="again")
    assert code == 0 and "fits" not in out and file.read_bytes() == written, err
    assert scores(found(tmp_path, "again")).equal(scores(said)) and f"posterior of {file}" in out
    code, _, err = run(user, tmp_path, *flags, "--resolution", 64, out="large")
    assert code == 0 and found(tmp_path, "large")["places"] == 40 * 4 * 4, err
    code, out, err = run(user, tmp_path, *flags, out="o", net="other")
    assert code == 2 and len(err) == 1 and "is of the network" in err[0], err
    assert not (tmp_path / "o").exists() and file.read_bytes() == written


@pytest.mark.parametrize("kernel, padding", [((9, 9), (1, 1)), ((1, 9), (0, 4)), ((3, 3), (2, 0))])
def test_a_posterior_of_another_form_of_layer_is_refused(tmp_path, user, kernel, padding):
    file = known(network(tmp_path / "net"))
    fingerprint = load_unet(tmp_path / "net")[1]["fingerprint"]
    other = replace(load_posterior(file, fingerprint), kernel=kernel, padding=padding)
    save_posterior(file, other, fingerprint)
    code, _, err = run(user, tmp_path, "--uncertainty", "integrated", "--posterior", file)
    assert code == 2 and len(err) == 1 and "a layer of another form" in err[0], err


@pytest.mark.parametrize("cfg", [NET, SIT], ids=["U-Net", "SiT"])
def test_what_it_is_fitted_to_is_the_network_s_features_of_its_own_pictures(tmp_path, user, cfg):
    """A of pairs by hand: labels, pictures that are not held out, times and noise."""
    path = network(tmp_path / "net", "v", cfg=cfg, classes=["glasses", "cat ears"])
    file = tmp_path / "p.safetensors"
    flags = ["--uncertainty", "integrated", "--posterior-pairs", PAIRS, "--posterior", file]
    code, _, err = run(user, tmp_path, *flags, "--labels", "1")
    assert code == 0, err
    net, meta = load_unet(path)
    posterior = load_posterior(file, meta["fingerprint"])
    ds = open_dataset("toyfaces:64", resolution=32, holdout=0.2)
    tags = [ds[i].tags for i in range(PAIRS)]
    labels = [0 if "glasses" in own else 1 if "cat ears" in own else -1 for own in tags]
    assert len(set(labels)) == 3
    objective = make_objective("v")
    x0 = PIXEL.encode(ds.images(range(PAIRS)) / 127.5 - 1)
    t = ((torch.arange(PAIRS) * 0.6180339887) % 1).clamp(1e-3, objective.t_max)
    w = t.view(-1, 1, 1, 1)
    x = (1 - w) * x0 + w * noise_of(list(range(PAIRS)), SHAPE)
    seen = []
    last_of(net).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    with torch.no_grad():
        objective.predict(net, x, t, y=torch.tensor(labels))
    if cfg is SIT:
        u = seen[-1].permute(2, 0, 1)  # of tokens (pairs, places, K - 1)
    else:
        u = F.unfold(seen[-1], 3, padding=1).transpose(0, 1)
    assert found(tmp_path)["places"] == PAIRS * (4 if cfg is SIT else 16)
    u = torch.cat([u, torch.ones_like(u[:1])])  # (K, pairs, places)
    noise = posterior.noise[(t * len(posterior.noise)).long()]
    A = torch.einsum("kbp,lbp,b->kl", u, u, 1 / noise)
    wanted = A + posterior.prior * torch.eye(len(A)).double()
    got = posterior.root @ posterior.root.T
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * float(wanted.max()))


@pytest.mark.parametrize("loss", [{"weight": "min_snr"}, {"loss_type": "l1"}, {"aligned": True}])
def test_the_noise_is_the_squared_error_of_what_is_said_whatever_training_asks_for(tmp_path, loss):
    """Equal networks with equal outputs have one posterior."""
    ds, noise = open_dataset("toyfaces:16", resolution=32, holdout=0.2), []
    for name, said in (("plain", {}), ("other", loss)):
        objective = asdict(make_objective("ddpm", **said))
        path = network(tmp_path / name, objective=objective)
        gen = open_generator(Sampling(str(path), device="cpu"), CPU)
        noise.append(fit(gen, gen.net.out[2], ds, 4).noise)
        assert gen.evaluations == 0
    assert torch.equal(*noise)


# ---- what is refused -----------------------------------------------------------------------------

REFUSED = {
    "another method": (["--method", "dopri5"], "integrated with --method dopri5: wanted one of"),
    "noise": (["--method", "ddim", "--eta", 1], "integrated with --method ddim --eta"),
    "stochastic": (["--method", "ddpm"], "integrated with --method ddpm"),
    "noise of its own": (["--method", "euler_ancestral"], "euler_ancestral: wanted"),
    "rescale": (["--labels", 0, "--cfg", 2, "--cfg-rescale", 0.5], "--cfg-rescale, which is not"),
    "guide": (["--cfg", 2, "--guide-ckpt", "NET"], "--guide-ckpt, which is another network"),
    "init": (["--init", "PNG"], "--uncertainty with --init"),
    "no data": (["--posterior-data", "nowhere"], "nowhere"),
    "no posterior": (["--posterior", "NET.safetensors"], "holds no posterior"),
    "idle": (["--tangent"], "--tangent changes nothing with --uncertainty integrated"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_in_one_line_before_anything_is_made(tmp_path, user, name):
    path = network(tmp_path / "net.safetensors", classes=["cat", "dog"])
    Image.new("RGB", (32, 32)).save(tmp_path / "p.png")
    places = {"NET": path, "PNG": tmp_path / "p.png", "NET.safetensors": path}
    flags, message = REFUSED[name]
    flags = [places.get(word, word) for word in flags]
    flags += ["--steps", 4] if "dopri5" not in flags else []
    words = ["--ckpt", path, "--uncertainty", "integrated", *flags, "--out", tmp_path / "s"]
    code, _, err = user(samplers.main, *words)
    assert code == 2 and len(err) == 1 and message in err[0], err
    assert not list(tmp_path.glob("s*"))


def test_one_network_has_no_spread_and_one_direction_has(tmp_path, user):
    file = known(network(tmp_path / "net"))
    flags = ["--uncertainty", 1, "--posterior", file]
    code, _, err = run(user, tmp_path, *flags)
    assert code == 2 and len(err) == 1 and "2 networks at least" in err[0], err
    code, _, err = run(user, tmp_path, *flags, "--tangent")
    assert code == 0 and scores(found(tmp_path)).isfinite().all(), err


def test_networks_without_a_plain_last_layer_or_without_data_are_refused(tmp_path, user):
    network(tmp_path / "none", config={"data": ""})
    code, _, err = run(user, tmp_path, "--uncertainty", 4, net="none")
    assert code == 2 and len(err) == 1 and "--posterior-data" in err[0], err
    save_unet(
        tmp_path / "zeros",
        UNet(NET),
        {"objective": asdict(make_objective("fm")), "vae": PIXEL.meta(), "resolution": 32},
    )
    flags = ["--uncertainty", 4, "--posterior-data", "toyfaces:8"]
    code, _, err = run(user, tmp_path, *flags, net="zeros")
    assert code == 2 and len(err) == 1 and "never trained" in err[0], err
    network(tmp_path / "bare", cfg=replace(SIT, bias=False))
    code, _, err = run(user, tmp_path, *flags, net="bare")
    assert code == 2 and len(err) == 1 and "does not end as a U-Net or a SiT does" in err[0], err


def test_a_network_that_enlarges_says_it_of_what_it_enlarges(tmp_path, user):
    cfg = replace(NET, in_channels=384)
    said = make_objective("cfm", noise_aug=0.2)
    meta = {"objective": asdict(said), "vae": PIXEL.meta(), "resolution": 32}
    save_unet(tmp_path / "net", randomize(UNet(cfg)), meta | {"config": {"data": "toyfaces:16"}})
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(
        tmp_path / "p.png"
    )
    flags = ["--init", tmp_path / "p.png", "--uncertainty", 2, "--posterior-pairs", 4]
    code, _, err = run(user, tmp_path, *flags)
    assert code == 0 and scores(found(tmp_path)).isfinite().all(), err


# ---- the picture ---------------------------------------------------------------------------------


def test_a_map_lies_over_its_picture_red_where_it_is_largest(tmp_path, user):
    images = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    deviations = torch.full((2, 2, 2), 0.1)
    deviations[1, 0, 0] = 0.5
    both = mapped(images, deviations)
    assert both.shape == (4, 3, 8, 8) and (both[[0, 2]] == images).all()
    assert (both[1] == 114).all()  # half of 100, and 64
    assert both[3, :, 0, 0].tolist() == [255, 32, 0] and (both[3, :, 7, 7] == 114).all()
    assert (mapped(images, torch.full((2, 2, 2), 0.1))[[1, 3]] == 114).all()  # all alike
    file = known(network(tmp_path / "net"))
    flags = ["--uncertainty", "integrated", "--posterior", file]
    code, _, err = run(user, tmp_path, *flags)
    said = found(tmp_path)
    assert 0 < said["map"]["none"] < said["map"]["red"]
    assert Image.open(tmp_path / "s-uncertainty.png").size == (104, 70)  # 6 of 32 px
    code, _, err = run(user, tmp_path, *flags, "--no-grid-image", out="n")
    assert not (tmp_path / "n-uncertainty.png").exists() and found(tmp_path, "n")
