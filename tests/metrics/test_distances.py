"""Distances between sets of features against closed forms and brute force."""

import math
import random
import re

import numpy as np
import pytest
import scipy.linalg
import torch

from eval_fid import frechet_distance, frechet_from_features, kernel_distance, precision_recall
from harness.cli import UserError
from metrics.distances import (
    Statistics,
    frechet,
    frechet_infinity,
    gather,
    jackknife,
    load_statistics,
    matrix_root,
    memorisation,
    save_statistics,
)


def normal(n, d=8, seed=0, scale=1.0, shift=0.0):
    return (
        torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        * scale
        + shift
    )


def rotation(d, seed=0):
    return torch.linalg.qr(normal(d, d, seed))[0]


def test_frechet_of_gaussians_with_a_closed_form():
    d, Q = 64, rotation(64)
    a, b = normal(1, d, 1).abs()[0] + 0.1, normal(1, d, 2).abs()[0] + 0.1
    mu1, mu2, S1, S2 = normal(1, d, 3)[0], normal(1, d, 4)[0], Q * a @ Q.T, Q * b @ Q.T
    shared = float(
        (a.sqrt() - b.sqrt()).square().sum() + (mu1 - mu2).square().sum()
    )  # one eigenbasis
    assert frechet_distance(mu1, S1, mu2, S2) == pytest.approx(shared, rel=1e-12)
    assert frechet_distance(mu1.numpy(), S1.numpy(), mu2.numpy(), S2.numpy()) == frechet_distance(
        mu1, S1, mu2, S2
    )
    assert frechet_distance(mu1, S1, mu1, 9 * S1) == pytest.approx(4 * float(S1.trace()), rel=1e-12)
    assert frechet_distance(mu1, S1, mu2, S1) == pytest.approx(
        float((mu1 - mu2).square().sum()), rel=1e-12
    )
    for seed in range(5):  # 2×2 without a shared basis: tr √(AB) = √(tr AB + 2 √det AB)
        A, B = (
            m @ m.T + 0.01 * torch.eye(2) for m in (normal(2, 2, seed), normal(2, 2, seed + 50))
        )
        want = float(A.trace() + B.trace()) - 2 * math.sqrt(
            float((A @ B).trace()) + 2 * math.sqrt(float(torch.det(A @ B)))
        )
        assert frechet_distance(torch.zeros(2), A, torch.zeros(2), B) == pytest.approx(
            want, rel=1e-12
        )


def test_frechet_of_badly_conditioned_gaussians():
    Q, a = (
        rotation(64),
        torch.logspace(0, -10, 64, dtype=torch.float64),
    )  # a root of their product loses half of the digits
    S, zero = Q * a @ Q.T, torch.zeros(64)
    assert frechet_distance(zero, S, zero, 4 * S) == pytest.approx(float(a.sum()), rel=1e-12)


def test_frechet_of_matrices_without_a_closed_form_is_scipys():
    S1, S2 = (m @ m.T / 20 for m in (normal(20, 20, 5), normal(20, 20, 6)))
    want = float(S1.trace() + S2.trace()) - 2 * np.trace(scipy.linalg.sqrtm((S1 @ S2).numpy())).real
    assert frechet_distance(torch.zeros(20), S1, torch.zeros(20), S2) == pytest.approx(
        want, rel=1e-9
    )


def test_equal_sets_are_exactly_zero_and_nothing_is_negative():
    for n in (5, 30, 300):
        x = normal(n, 30)
        assert frechet_from_features(x, x.clone()) == 0.0
        assert all(
            frechet(y, y.clone()) == 0.0 for y in (normal(n, 500, seed) for seed in range(8))
        )  # as eval_fid.py asks, also when N < d
        mixed = x[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
        assert 0.0 <= frechet_from_features(x, mixed) < 1e-11
        assert 0.0 <= frechet_from_features(x, x + 1e-9 * normal(n, 30, 1)) < 1e-11
    S = Statistics.of(normal(300, 30))
    assert frechet_distance(S.mean, S.sigma, S.mean, S.sigma) == 0.0
    low = normal(30, 4) @ normal(4, 30, 1)  # rank 4
    assert frechet_distance(low[0], torch.cov(low.T), low[0], torch.cov(low.T)) == 0.0


def test_small_sets_are_exact_where_roots_of_matrices_are_not():
    direction = normal(1, 300, 9)[0]
    direction /= direction.norm()
    a, b = normal(40, 1, 1, scale=2.0), normal(60, 1, 2, scale=3.0, shift=5.0)
    want = float(
        (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    )  # one dimension, embedded in 300
    x, y = a * direction, b * direction
    forms = [
        (x, y),
        (Statistics.of(x), Statistics.of(y)),
        (Statistics.of(x), y),
        (x, Statistics.of(y)),
    ]
    assert [frechet(*form) for form in forms] == pytest.approx([want] * 4, rel=1e-10)
    x, y = normal(40, 300, 1), normal(500, 300, 2, scale=1.1)
    forms = [
        frechet(*f)
        for f in (
            (x, y[:60]),
            (Statistics.of(x), Statistics.of(y[:60])),
            (y[:60], x),
            (x, Statistics.of(y[:60])),
        )
    ]
    assert forms == pytest.approx([forms[0]] * 4, rel=1e-10)
    assert frechet_from_features(x, y) == pytest.approx(
        frechet(Statistics.of(x), Statistics.of(y)), rel=1e-10
    )


@pytest.mark.parametrize("n", [20, 200])
def test_a_constant_reference_has_rank_0_and_a_distance(n):
    """Fewer images than dimensions, and more; the other one constant, or with a spread."""
    one, two = torch.full((n, 64), 0.1), torch.full((n, 64), 1.1)
    assert frechet_from_features(one, two) == pytest.approx(64, rel=1e-6)
    assert frechet_from_features(one.double(), one.double()) == 0
    zero = torch.zeros(64, 64)
    assert frechet_distance(one[0], zero, two[0], zero) == pytest.approx(64, rel=1e-6)
    spread = torch.randn(n, 64, generator=torch.Generator().manual_seed(0)).double()
    wanted = float(spread.mean(0).square().sum() + spread.var(0).sum())
    for pair in ((spread, torch.zeros(n, 64)), (torch.zeros(n, 64), spread)):
        assert frechet_from_features(*pair) == pytest.approx(wanted)
    assert frechet_infinity(one, two).value == pytest.approx(64, rel=1e-6)


@pytest.mark.parametrize("copies", [1, 5])
@pytest.mark.parametrize("scale, offset", [(1, 0), (1, 1e4), (1e-3, 0)])
def test_duplicates_lie_in_neighbourhoods_of_radius_0(copies, scale, offset):
    """More copies than k: every ball has the radius 0, and rounding may not lead out of it."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 64, generator=g, dtype=torch.float64) * scale + offset
    x = x.repeat(copies, 1)
    found = precision_recall(x, x.flip(0))
    assert found.precision == found.recall == found.coverage == 1
    # A few of 2,048 dimensions are multiplied by another kernel, which rounds otherwise.
    wide = torch.rand(300, 2048, generator=g, dtype=torch.float64).repeat(5, 1) * scale + offset
    few = wide[torch.randperm(len(wide), generator=g)[: 4 + copies]]
    assert precision_recall(wide, few).precision == 1
    constant = torch.full((50, 64), offset + scale / 3, dtype=torch.float64)
    assert precision_recall(constant, constant)[:2] == (1, 1)
    moved = x + scale * 1e-3  # near, but no copy
    if copies > 1:
        assert precision_recall(x, moved)[:2] == (0, 0)


def test_the_root_of_a_singular_matrix_has_its_rank():
    m = normal(50, 7) @ torch.diag(torch.logspace(0, -5, 7, dtype=torch.float64))
    for sigma, rank in (
        (m @ m.T, 7),
        (torch.eye(50, dtype=torch.float64), 50),
        (torch.zeros(50, 50, dtype=torch.float64), 0),
    ):
        L = matrix_root(sigma)
        assert L.shape == (50, rank)
        torch.testing.assert_close(L @ L.T, sigma, rtol=0, atol=1e-14 * 50)


@pytest.mark.parametrize(
    "bad, what",
    [
        (torch.zeros(1, 4), "at least 2"),
        (torch.zeros(4), r"\(N, d\)"),
        (torch.full((4, 4), float("nan")), "4 of 4 rows"),
    ],
)
def test_sets_that_are_none_are_refused(bad, what):
    for metric in (frechet_from_features, kernel_distance, precision_recall):
        with pytest.raises(UserError, match=what):
            metric(bad, normal(4, 4))
    with pytest.raises(UserError, match="dimensions"):
        frechet_from_features(normal(4, 4), normal(4, 5))


def test_statistics_stream_merge_and_subtract():
    x = normal(
        1000, 20, scale=torch.logspace(-1, 2, 20, dtype=torch.float64), shift=1e4
    )  # large means cancel in a sum of squares
    mean, sigma = x.numpy().mean(0), np.cov(x.numpy().T)
    limit = 1e-10 * np.sqrt(np.outer(sigma.diagonal(), sigma.diagonal()))

    def is_all(s):
        return (
            s.n == 1000
            and np.abs(s.mean.numpy() - mean).max() < 1e-9
            and (np.abs(s.sigma.numpy() - sigma) <= limit).all()
        )

    assert is_all(Statistics.of(x))
    for size in (1, 7, 64, 999):
        assert is_all(gather(x.split(size))), size
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(3))
    assert is_all(gather(x[order].split(50)))
    a, b, c = (Statistics.of(part) for part in x.split([100, 300, 600]))
    assert is_all(a + (b + c)) and is_all((c + a) + b)
    rest, want = Statistics.of(x) - b, Statistics.of(torch.cat([x[:100], x[400:]]))
    assert (
        rest.n == 700
        and (rest.mean - want.mean).abs().max() < 1e-9
        and ((rest.sigma - want.sigma).abs().numpy() <= limit).all()
    )
    far = normal(500, 20, 1, scale=3.0, shift=1e4)
    assert frechet(rest, Statistics.of(far)) == pytest.approx(
        frechet(want, Statistics.of(far)), rel=1e-10
    )
    with pytest.raises(UserError, match="cannot take"):
        a - b
    with pytest.raises(UserError, match="not finite"):
        gather([x[:5], x[5:8] * float("inf")])


def test_statistics_on_disk_are_what_others_read(tmp_path):
    s = Statistics.of(normal(50, 6))
    save_statistics(tmp_path / "s.npz", s, {"features": {"preproc": "clean"}})
    with np.load(tmp_path / "s.npz") as file:  # pytorch-fid, EDM: mu and sigma, float64
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
        np.testing.assert_allclose(file["sigma"], np.cov(normal(50, 6).numpy().T), rtol=1e-12)
    back, meta = load_statistics(tmp_path / "s.npz")
    assert meta == {"n": 50, "features": {"preproc": "clean"}} and frechet(s, back) < 1e-12
    np.savez(
        tmp_path / "foreign.npz",
        mu=s.mean.numpy().astype(np.float32),
        sigma=s.sigma.numpy(),
        mu_s=np.zeros(3),
        sigma_s=np.eye(3),
    )  # ADM
    back, meta = load_statistics(tmp_path / "foreign.npz", 6)
    assert meta == {"n": 0} and frechet(s, back) < 1e-12
    np.savez(tmp_path / "bad.npz", mu=np.zeros(5), sigma=np.zeros((6, 6)))
    np.savez(tmp_path / "none.npz", a=np.zeros(5))
    np.savez(tmp_path / "nan.npz", mu=np.zeros(6), sigma=np.full((6, 6), np.nan))
    for name, d, what in (
        ("bad.npz", None, "another network"),
        ("foreign.npz", 2048, "another network"),
        ("none.npz", None, "wanted mu and sigma"),
        ("nan.npz", None, "not finite"),
    ):
        with pytest.raises(UserError, match=what):
            load_statistics(tmp_path / name, d)


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
    assert kernel_distance(x, y).error == pytest.approx(
        math.hypot(jackknife(without_x), jackknife(without_y)), rel=1e-9
    )
    assert kernel_distance(y, x).value == pytest.approx(kernel_distance(x, y).value, rel=1e-12)


def test_the_kernel_distances_error_is_its_spread():
    for shift, low, high in (
        (0.5, 0.8, 1.25),
        (0.0, 0.9, 2.0),
    ):  # of equal sets, a jackknife is too careful by up to √2
        runs = [
            kernel_distance(normal(150, 8, 2 * s), normal(150, 8, 2 * s + 1, shift=shift))
            for s in range(200)
        ]
        spread = float(np.std([r.value for r in runs]))
        assert low < float(np.mean([r.error for r in runs])) / spread < high
    assert abs(float(np.mean([r.value for r in runs]))) < 3 * spread / 200**0.5  # unbiased


def test_halves_of_one_set_kernel_zero_frechet_biased():
    fids = []
    for n in (100, 400, 1600):
        x = normal(2 * n, 32, n)
        kid = kernel_distance(x[:n], x[n:])
        assert abs(kid.value) < 3 * kid.error
        fids.append(frechet_from_features(x[:n], x[n:]))
    assert fids[0] > 3 * fids[1] > 9 * fids[2] > 0  # about 1 / N


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
    mode = precision_recall(
        normal(400, 4), normal(400, 4, 1, scale=0.2)
    )  # a generator that draws one thing well
    assert mode.precision > 0.95 and mode.recall < 0.3 and mode.coverage < 0.5
    with pytest.raises(UserError, match="nearest"):
        precision_recall(x[:3], y)


def test_a_copier_is_flagged_and_a_fresh_or_a_bad_generator_is_not():
    train, held, fresh = normal(800, 10), normal(100, 10, 1), normal(300, 10, 2)
    copier = memorisation(train[:300] + 1e-3 * normal(300, 10, 3), train, held)
    assert copier.flagged and copier.ratio < 0.01 and copier.copies == 1.0 and copier.closer > 0.99
    some = memorisation(torch.cat([train[:100], fresh[:200]]), train, held)  # a third are copies
    assert some.flagged and 0.3 < some.copies < 0.45
    assert memorisation(train[:300], iter(train.split(70)), held) == memorisation(
        train[:300], train, held
    )
    good, bad = memorisation(fresh, train, held), memorisation(fresh * 3, train, held)
    assert (
        not good.flagged
        and 0.9 < good.ratio < 1.1
        and 0.4 < good.closer < 0.6
        and good.copies < 0.12
    )
    assert not bad.flagged and bad.ratio > 1.5
    twins = memorisation(
        fresh, train, torch.cat([held[:80], train[:20]])
    )  # a data set with duplicates has distances of 0
    assert not twins.flagged


def test_frechet_at_infinity_takes_the_bias_away():
    n = 10**9
    x = Statistics(
        n, torch.zeros(16, dtype=torch.float64), torch.eye(16, dtype=torch.float64) * (n - 1)
    )
    sets, truth = [normal(300, 16, seed, shift=0.2) for seed in range(12)], 16 * 0.04
    biased = np.mean([frechet(x, Statistics.of(y)) for y in sets]) - truth
    fits = [frechet_infinity(x, y) for y in sets]
    assert (
        biased > 0.1
        and abs(np.mean([fit.value for fit in fits]) - truth) < 0.3 * biased
        and all(fit.error > 0 for fit in fits)
    )
    assert frechet_infinity(x, sets[0]) == fits[0]
    with pytest.raises(UserError, match="at least 20"):
        frechet_infinity(x, sets[0][:10])


def test_the_jackknife_of_a_mean_is_the_textbooks():
    v = normal(40, 1)[:, 0].numpy()
    assert jackknife([np.delete(v, i).mean() for i in range(40)]) == pytest.approx(
        v.std(ddof=1) / 40**0.5, rel=1e-12
    )


def test_a_flipped_bit_in_saved_statistics_is_refused_or_changes_nothing(tmp_path):
    """All places of the zip's directory, and some others."""
    path, r = tmp_path / "s.npz", random.Random(0)
    save_statistics(path, Statistics.of(torch.randn(50, 6)), {"size": [32, 32]})
    data, (stats, meta) = path.read_bytes(), load_statistics(path)
    places = [r.randrange(len(data)) for _ in range(150)]
    heads = [match.start() for match in re.finditer(b"PK\1\2", data)]
    places += [head + at for head in heads for at in range(50)]
    assert len(heads) == 4
    refused = 0
    for at in places:
        bad = bytearray(data)
        bad[at] ^= 1 << r.randrange(8)
        path.write_bytes(bad)
        try:
            found, about = load_statistics(path)
            assert about == meta and torch.equal(found.mean, stats.mean), at
            assert torch.equal(found.scatter, stats.scatter), at
        except UserError:
            refused += 1
    assert refused > 0.6 * len(places)
