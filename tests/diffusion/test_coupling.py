"""Couplings against brute force and against the closed form of a linear-Gaussian pair."""

import itertools
import math

import pytest
import torch

from diffusion.coupling import ot_permutation, resize, upsampled
from objectives import make_objective
from samplers import sample

CFM = make_objective("cfm")


def cost(x0, eps, order):
    return (x0 - eps[order]).square().sum().item()


def draws(n, seed, *shape):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=g), torch.randn(n, *shape, generator=g)


# ---- optimal transport ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 6])
@pytest.mark.parametrize(
    "labels", [None, (0, 0, 0, 0, 0, 0), (3, -1, 3, -1, 3, 3), (5, 4, 3, 2, 1, 0)]
)
def test_ot_is_the_best_of_all_orders_that_keep_labels(n, labels):
    y = None if labels is None else torch.tensor(labels[:n])
    for seed in range(5):
        x0, eps = draws(n, seed, 2, 3, 3)
        order = ot_permutation(x0, eps, y)
        allowed = [
            p
            for p in itertools.permutations(range(n))
            if y is None or all(y[i] == y[j] for i, j in enumerate(p))
        ]
        assert tuple(order.tolist()) in allowed
        assert cost(x0, eps, order) == pytest.approx(
            min(cost(x0, eps, list(p)) for p in allowed), rel=1e-6
        )


def test_ot_shortens_the_way_and_loses_no_noise():
    x0, eps = draws(64, 0, 8)
    order = ot_permutation(x0.bfloat16(), eps)
    assert torch.equal(order.sort().values, torch.arange(64)) and cost(x0, eps, order) < 0.9 * cost(
        x0, eps, list(range(64))
    )


def test_the_loss_moves_noise_and_nothing_else():
    x0, eps = draws(8, 0, 1, 2, 2)
    y, t, fed = torch.tensor([0, 1, 0, 1, 0, 1, -1, -1]), torch.linspace(0.1, 0.9, 8), {}

    def net(x, k, y):
        fed.update(x=x, t=k / 1000, y=y)
        return torch.zeros_like(x)

    out = make_objective("fm", coupling="ot").loss(net, x0, eps=eps, t=t, y=y)
    w = t.view(-1, 1, 1, 1)
    order = ot_permutation(x0, eps, y)
    assert (
        order.tolist() != list(range(8))
        and torch.equal(fed["y"], y)
        and torch.allclose(fed["t"], t)
    )
    assert torch.allclose(fed["x"], (1 - w) * x0 + w * eps[order])
    assert torch.allclose(out.per_sample, (eps[order] - x0).square().flatten(1).mean(1))


# ---- coupling flow matching ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "small, upsample",
    [((4, 4), "bilinear"), ((4, 4), "nearest"), ((8, 8), "psu"), ((3, 5), "bilinear")],
)
def test_a_source_has_the_targets_shape_and_keeps_unit_variance(small, upsample):
    z_hi, noise = draws(400, 0, 4, 8, 8)
    z_lo = torch.randn(400, 4, *small, generator=torch.Generator().manual_seed(1))
    z_up = z_lo if upsample == "psu" else resize(z_lo, (8, 8), upsample)
    source = CFM.source(z_up, noise)
    assert source.shape == z_up.shape == z_hi.shape
    assert torch.allclose(source, math.sqrt(1 - 0.5883**2) * z_up + 0.5883 * noise, atol=1e-6)
    if upsample != "bilinear":  # a mean of neighbours has less, whatever is added
        assert source.var().item() == pytest.approx(1, abs=0.02)
    if upsample == "nearest":
        assert torch.equal(z_up[..., ::2, ::2], z_lo) and torch.equal(z_up[..., 1::2, 1::2], z_lo)


def test_the_loss_of_a_low_resolution_is_that_of_its_source_and_condition():
    z, low = draws(4, 0, 3, 8, 8)
    noise, t = draws(4, 1, 3, 8, 8)[0], torch.tensor([0.1, 0.4, 0.6, 0.9])
    seen = []

    def net(x, k, y=None):
        seen.append(x)
        return x[:, :3] - 0.5 * x[:, 3:] + (0 if y is None else y.view(-1, 1, 1, 1))

    y = torch.arange(4)
    ours = CFM.loss(net, z, low=low, eps=noise, t=t, y=y)
    by_hand = CFM.loss(net, z, source=CFM.source(low, noise), concat=low, t=t, y=y)
    assert torch.equal(ours.per_sample, by_hand.per_sample) and torch.equal(*seen)
    without = CFM.loss(net, z, low=low, eps=noise, t=t).per_sample
    assert ((without != ours.per_sample) == (y > 0)).all()
    drawn = [
        CFM.loss(net, z, low=low, generator=torch.Generator().manual_seed(i)) for i in (0, 0, 1)
    ]
    assert drawn[0].loss == drawn[1].loss != drawn[2].loss
    with pytest.raises(ValueError, match="needs low="):
        CFM.loss(net, z)
    with pytest.raises(ValueError, match="low= is for coupling lowres"):
        make_objective("ddpm").loss(net, z, low=low)
    for objective, more in ((CFM, {"eps": noise, "concat": low}), (make_objective("ddpm"), {})):
        with pytest.raises(ValueError, match="source= replaces eps="):
            objective.loss(net, z, source=noise, t=t, **more)


@pytest.mark.parametrize("how", ["psu", "bilinear", "nearest"])
def test_upsampling_knows_no_more_than_the_small_picture(how):
    g = torch.Generator().manual_seed(0)
    flat = torch.rand(2, 3, 1, 1, generator=g).expand(2, 3, 16, 16)
    checks = (torch.arange(16).view(-1, 1) + torch.arange(16)).remainder(2) * 2.0 - 1
    fine = flat + 0.5 * checks  # detail that a half-size picture cannot hold
    seen = []

    def encode(images):
        seen.append(images)
        return images

    a, b = (upsampled(images, images, encode, 2, how) for images in (flat, fine))
    assert a.shape == flat.shape and torch.allclose(a, flat, atol=1e-6)
    inner = (slice(None), slice(None), slice(3, -3), slice(3, -3))
    assert torch.allclose(a[inner], b[inner], atol=1e-5) and len(seen) == 2 * (how == "psu")
    noise = torch.randn(2, 3, 16, 16, generator=g)
    back = upsampled(noise, noise, lambda images: images, 4, how)
    blocky = (
        back.unfold(2, 4, 4).unfold(3, 4, 4) - back[..., ::4, ::4, None, None]
    ).abs().max() < 1e-6
    assert blocky == (how == "nearest")
    ramp = torch.linspace(-1, 1, 16).expand(1, 3, 16, 16)
    back = upsampled(ramp, ramp, lambda images: images, 4, how)
    assert (back - ramp)[..., 6:-6].abs().max() < (
        0.21 if how == "nearest" else 1e-5
    )  # and loses no ramp


def test_shrinking_reads_every_pixel():
    x = torch.rand(1, 1, 16, 16, requires_grad=True)
    resize(x, (4, 4)).sum().backward()
    assert (x.grad > 0.01).all()  # without antialiasing, 12 of 16 would be skipped


def test_an_image_that_is_its_own_source_stands_still():
    z, noise = draws(4, 0, 3, 8, 8)
    still = make_objective("cfm", noise_aug=0.0)
    out = still.loss(lambda x, t: torch.zeros_like(x[:, :3]), z, low=z, eps=noise)
    assert torch.equal(still.source(z, noise), z) and out.loss == 0
    assert torch.equal(
        make_objective("cfm", noise_aug=1.0).source(z, noise), noise
    )  # the other end: the ordinary conditional flow


RHO, NOISE = 0.8, 0.5883  # of a pair of unit normals, and of the source


def best_velocity(x, k):
    """E[source - z_hi | x_t, z_up] when z_hi and z_up are unit normals with correlation RHO: least
    squares from covariances."""
    x, z, t, keep = (
        x[:, :1].double(),
        x[:, 1:].double(),
        k.double().view(-1, 1, 1, 1) / 1000,
        math.sqrt(1 - NOISE**2),
    )
    cov_hs = keep * RHO  # of target and source
    var_x, cov_xz = (1 - t) ** 2 + t**2 + 2 * t * (1 - t) * cov_hs, (1 - t) * RHO + t * keep
    with_x, with_z = (
        t - (1 - t) + (1 - 2 * t) * cov_hs,
        keep - RHO,
    )  # of source - target with x_t, with z_up
    det = var_x - cov_xz**2
    on_x, on_z = (with_x - with_z * cov_xz) / det, (with_z * var_x - with_x * cov_xz) / det
    best_velocity.residual = (
        2 - 2 * cov_hs - on_x * with_x - on_z * with_z
    ).flatten()  # variance that is left
    return (on_x * x + on_z * z).float()


def linear_pair(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    z_up, rest, noise = (torch.randn(n, 1, 1, 1, generator=g) for _ in range(3))
    return RHO * z_up + math.sqrt(1 - RHO**2) * rest, z_up, noise


@pytest.mark.parametrize("t", [0.05, 0.4, 0.9])
def test_the_closed_form_velocity_of_a_linear_gaussian_pair_is_the_minimum(t):
    z_hi, z_up, noise = linear_pair(100_000)
    source, cond = CFM.source(z_up, noise), z_up
    objective, times = CFM, torch.full((len(z_hi),), t)
    best = objective.loss(best_velocity, z_hi, source=source, concat=cond, t=times).loss.item()
    assert best == pytest.approx(best_velocity.residual[0].item(), rel=0.02)
    for change in (
        lambda x: 0.1 * x[:, :1],
        lambda x: -0.1 * x[:, :1],
        lambda x: 0.1 * x[:, 1:],
        lambda x: -0.1 * x[:, 1:],
    ):
        worse = objective.loss(
            lambda x, k: best_velocity(x, k) + change(x), z_hi, source=source, concat=cond, t=times
        ).loss.item()
        assert worse > best + 0.001


def test_its_flow_makes_the_right_high_resolution_of_each_low_one():
    _, z_up, noise = linear_pair(20_000, seed=1)
    objective = make_objective("cfm")
    out = sample(
        lambda x, t, concat: objective.predict(best_velocity, x, t, concat=concat),
        objective.source(z_up, noise),
        method="heun",
        steps=60,
        cond={"concat": z_up},
    ).x
    rest = out - RHO * z_up  # given z_up: N(RHO z_up, 1 - RHO²)
    assert rest.std().item() == pytest.approx(math.sqrt(1 - RHO**2), rel=0.02)
    assert abs((rest * z_up).mean().item()) < 0.02 and abs(rest.mean().item()) < 0.02
