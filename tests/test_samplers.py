"""Guidance, editing and the command: on fields with closed forms, on small networks, and through
the command line."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy import integrate

import harness.likeness as likeness
import harness.pictures as pictures
import samplers
from ckpt import load_unet, save_unet
from harness.cli import UserError
from conftest import randomize
from fields import exact, gaussian, mixture, noise, rows_grid
from data.images import decode
from data.tags import pick_labels
from vae import pixel
from model import UNet, UNetConfig
from diffusion.schedules import T, alphas_bar
from objectives import make_objective
from diffusion.sampling import NonFinite
from harness.pictures import check_set, save_all, to_uint8
from metrics.features import open_images
from harness.ranks import Ranks
from samplers import (
    METHODS,
    Generator,
    Sampling,
    begin,
    draw,
    edit,
    generators,
    guided,
    invert,
    open_generator,
    sample,
    slerp,
    time_grid,
)

FM = make_objective("fm")
ALONE = Ranks(0, 1, torch.device("cpu"))


def test_the_whole_way_from_a_vp_network_to_gaussian_data():
    objective = make_objective("ddpm")

    def net(x, k):
        ab = torch.from_numpy(
            __import__("numpy").interp(k.double(), range(T), alphas_bar("linear"))
        ).view(-1, 1, 1, 1)
        return (1 - ab).sqrt() * (x - ab.sqrt() * 0.7) / (ab * 0.09 + 1 - ab)

    z = noise()
    out = sample(
        lambda x, t: objective.predict(net, x, t),
        objective.prior(z),
        steps=200,
        t_start=objective.t_max,
    )
    assert (out.x - (0.7 + 0.3 * z)).abs().max() < 0.02  # up to the mean left at the last row


def closed_form(low, high, root, pure):
    """a² of 1000 betas, float64: from low to high, by their square roots or not; zero SNR."""
    if root:
        betas = torch.linspace(low**0.5, high**0.5, T, dtype=torch.float64) ** 2
    else:
        betas = torch.linspace(low, high, T, dtype=torch.float64)
    a = (1 - betas).cumprod(0).sqrt()
    if pure:
        a = (a - a[-1]) * a[0] / (a[0] - a[-1])
    return a.square()


@pytest.mark.parametrize(
    "bars, table, zero_snr",
    [
        (closed_form(0.00085, 0.012, True, True), "scaled_linear", True),
        (closed_form(0.0015, 0.0195, True, False), "0.0015,0.0195,scaled_linear", False),
        (closed_form(0.0015, 0.0195, True, True), "0.0015,0.0195,sqrt", True),
        (closed_form(0.00085, 0.012, False, False), "0.00085,0.012,linear", False),
        (closed_form(0.00085, 0.012, False, False), "own", False),
    ],
)
def test_a_network_of_any_betas_draws_what_it_was_trained_on(bars, table, zero_snr):
    """The exact v network of nearly constant, bright pictures, whose mean another schedule would
    miss: 0.8 ± 0.05."""
    mean, std = 0.8, 0.05
    if table == "own":
        betas = 1 - bars / torch.cat([bars.new_ones(1), bars[:-1]])
        table = ",".join(map(repr, betas.tolist()))

    def net(x, k):
        a = bars[k.round().long()].sqrt().view(-1, 1, 1, 1).float()
        s = (1 - a * a).sqrt()
        off, variance = x - a * mean, (a * std) ** 2 + s**2
        return a * s / variance * off - s * (mean + a * std**2 / variance * off)

    flags = {"betas" if "," in table else "table": table, "zero_snr": zero_snr}
    objective = samplers.objective_of(Sampling("f", **flags), {"objective": "v"}, "f")
    torch.testing.assert_close(
        alphas_bar(objective.table, objective.zero_snr), bars, rtol=1e-10, atol=0
    )
    x = objective.prior(draw(generators(list(range(64))), torch.empty(1, 3, 8, 8)))
    how = {"method": "heun", "steps": 100, "t_start": objective.t_max}
    x = sample(guided(objective, net), x, **how).x
    # Row 0 is not quite data: nothing is known of what is finer than its s of 0.03.
    assert float(x.mean()) == pytest.approx(mean, abs=0.002)
    assert float(x.std()) == pytest.approx(std, abs=0.008)


def test_conditions_follow_their_rows_when_dopri5_retires_some():
    tags = torch.arange(9)

    def predict(x, t, y):
        assert torch.equal(x[:, 0, 0, 0].round().long() // 100, y)
        x0 = mixture()(x * 0 + (x % 100), t)[0] * 0
        return x0, x0, torch.sin(40 * t.view(-1, 1, 1, 1) * (1 + y.view(-1, 1, 1, 1))) + x0

    x = (100 * tags + 50).double().view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()
    out = sample(predict, x, method="dopri5", cond={"y": tags}, rtol=1e-6, atol=1e-6)
    assert len(set(out.nfe_each.tolist())) > 1


def test_unknown_method_and_labels_are_named():
    with pytest.raises(ValueError, match="euler, heun"):
        sample(gaussian(), noise(), method="rk45")
    with pytest.raises(ValueError, match="Closest: blonde hair"):
        pick_labels(("blond hair",), ["red hair", "blonde hair"], 3)
    for word in ("²", "9" * 5000):  # digits, but no number that int() reads
        with pytest.raises(UserError, match="no class"):
            pick_labels((word,), ["red hair", "blonde hair"], 3)
    assert pick_labels(("blonde hair", "0"), ["red hair", "blonde hair"], 3).tolist() == [1, 0, 1]


@pytest.mark.parametrize("steps", [1000, 50])
def test_a_vp_network_on_its_own_rows_is_diffusers_ddim(steps):
    """Through Objective.predict: the rows the network is fed are whole, and its fp32 opinion is
    turned into the same step."""
    diffusers = pytest.importorskip(
        "diffusers", reason="oracle: pip install -r requirements-dev.txt"
    )
    scheduler = diffusers.DDIMScheduler(
        timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(steps)
    objective, rows, x = make_objective("ddpm"), [], noise(3, torch.float32)

    def net(x, k):
        rows.append(float(k[0]))
        ab = alphas_bar("linear")[k.long()].view(-1, 1, 1, 1)
        return ((1 - ab).sqrt() * (x - ab.sqrt() * 0.7) / (ab * 0.09 + 1 - ab)).float()

    grid = rows_grid(objective, steps)
    ours = sample(
        guided(objective, net), begin(objective, x, float(grid[0])), method="ddim", grid=grid
    ).x
    assert rows == scheduler.timesteps.tolist()
    for k in scheduler.timesteps:
        x = scheduler.step(net(x, k.expand(3)), k, x).prev_sample
    assert (ours - x).abs().max() < 2e-4


def test_plain_sampling_of_a_vp_network_begins_with_unit_variance_at_any_row():
    objective, z = make_objective("ddpm"), noise(2, torch.float32)
    for t in rows_grid(objective, 7, "leading")[:-1].tolist():
        assert torch.allclose(begin(objective, z, t) / math.hypot(1 - t, t), z, atol=1e-6)
    assert torch.equal(begin(objective, z, objective.t_max), objective.prior(z)) and torch.equal(
        begin(FM, z, 1.0), z
    )


# ---- guidance ------------------------------------------------------------------------------------


def labelled(calls=None):
    """A velocity that is its label; -1 without one."""

    def net(x, t, y=None):
        if calls is not None:
            calls.append(len(x))
        return x * 0 + (0 if y is None else y.view(-1, 1, 1, 1).float())

    return net


X, HALF, Y = noise(3, torch.float32), torch.full((3,), 0.5), torch.tensor([2, 4, 6])


def test_guidance_is_a_lerp_in_one_call_and_free_when_off():
    calls = []
    net = labelled(calls)
    u = guided(FM, net, 3.0)(X, HALF, Y)[2]
    assert calls == [6] and u[:, 0, 0, 0].tolist() == [
        -1 + 3 * (2 + 1),
        -1 + 3 * (4 + 1),
        -1 + 3 * (6 + 1),
    ]
    assert guided(FM, net, 1.0, interval=(0.1, 0.2), rescale=1.0)(X, HALF, Y)[2][
        :, 0, 0, 0
    ].tolist() == [2, 4, 6] and calls == [6, 3]
    assert guided(FM, net, 0.0)(X, HALF, Y)[2][:, 0, 0, 0].tolist() == [-1, -1, -1]
    assert (
        guided(FM, net, 1.0)(X, HALF)[2].abs().max() == 0
        and guided(FM, net, 2.0)(X, HALF)[2].abs().max() == 0
    )


def test_guidance_outside_the_interval_is_off_and_evaluates_no_null():
    """sigma = t / (1 - t) = 1/3, 1, 3; the interval holds its upper end, not its lower one."""
    t, calls = torch.tensor([0.25, 0.5, 0.75]), []
    for lo, hi, inside in (
        (0.5, 1.0, [1]),
        (0.2, 1.0, [0, 1]),
        (1.0, 9.0, [2]),
        (1.0, 3.0, [2]),
        (3.0, math.inf, []),
        (0.0, math.inf, [0, 1, 2]),
    ):
        calls.clear()
        got = guided(FM, labelled(calls), 3.0, interval=(lo, hi))(X, t, Y)
        full, plain = guided(FM, labelled(), 3.0)(X, t, Y), guided(FM, labelled())(X, t, Y)
        assert calls == [3 + len(inside)]
        for i in range(3):
            assert all(
                torch.equal(g[i], (f if i in inside else p)[i])
                for g, f, p in zip(got[:3], full, plain)
            )
    at_one = guided(FM, labelled(calls := []), 3.0, interval=(1.0, math.inf))(X, torch.ones(3), Y)[
        2
    ]
    assert calls == [6] and at_one[0, 0, 0, 0] == 8  # sigma is infinite at t = 1, and inside


def wobbly(x, t, y=None):
    return torch.sin(3 * x) * (1 + 0.3 * (0 if y is None else y.view(-1, 1, 1, 1).float())) + x


def test_rescaling_restores_the_spread_of_x0_and_stays_on_the_line_through_x():
    x, t = (
        torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0.3, 0.6, 1.0]),
    )
    plain, full = guided(FM, wobbly)(x, t, Y), guided(FM, wobbly, 4.0)(x, t, Y)
    std = [v[0].flatten(1).std(1) for v in (plain, full)]
    assert (std[1] / std[0] > 1.2).all()
    for phi in (1.0, 0.7):
        x0, eps, u, _ = guided(FM, wobbly, 4.0, rescale=phi)(x, t, Y)
        assert torch.allclose(x0.flatten(1).std(1), phi * std[0] + (1 - phi) * std[1], rtol=1e-5)
        assert torch.allclose(
            x0, full[0] * (phi * std[0] / std[1] + 1 - phi).view(-1, 1, 1, 1), rtol=1e-5
        )
        w = t.view(-1, 1, 1, 1)
        assert torch.allclose((1 - w) * x0 + w * eps, x, atol=1e-5) and torch.allclose(
            eps - x0, u, atol=1e-5
        )


def test_rescaling_is_diffusers():
    theirs = pytest.importorskip(
        "diffusers.guiders.guider_utils", reason="oracle: pip install -r requirements-dev.txt"
    )
    x, t = (
        torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0.3, 0.6, 0.9]),
    )
    plain, full = guided(FM, wobbly)(x, t, Y)[0], guided(FM, wobbly, 4.0)(x, t, Y)[0]
    want = theirs.rescale_noise_cfg(full, plain, guidance_rescale=0.7)
    assert torch.allclose(
        guided(FM, wobbly, 4.0, rescale=0.7)(x, t, Y)[0], want, rtol=1e-5, atol=1e-6
    )


def test_autoguidance_leads_away_from_the_other_network():
    calls, theirs = [], []

    def weak(x, t, **cond):
        theirs.append((len(x), cond["y"].tolist()))
        return FM.predict(lambda x, t, y: x * 0 - 10, x, t, **cond)

    t = torch.tensor([0.2, 0.5, 0.8])
    u = guided(FM, labelled(calls), 2.0, guide=weak)(X, t, Y)[2]
    assert (
        u[:, 0, 0, 0].tolist() == [-10 + 2 * (y + 10) for y in (2, 4, 6)]
        and calls == [3]
        and theirs == [(3, [2, 4, 6])]
    )
    u = guided(FM, labelled(calls), 2.0, guide=weak, interval=(0.5, 2.0))(X, t, Y)[2]
    assert u[:, 0, 0, 0].tolist() == [2, 18, 6] and theirs[1:] == [(1, [4])]


def test_guidance_of_a_gaussian_by_a_wider_one_is_the_lerp_of_their_fields():
    """The guide may have another objective: both are turned into velocities of the same path."""
    ddpm, t = make_objective("ddpm"), torch.tensor([0.3, 0.5, 0.7])

    def weak_eps(x, k):
        ab = (
            torch.from_numpy(np.interp(k.double(), range(T), alphas_bar("linear")))
            .view(-1, 1, 1, 1)
            .float()
        )
        return (1 - ab).sqrt() * (x - ab.sqrt() * 0.7) / (ab * 0.09 + 1 - ab)

    def strong_u(x, k):
        return mixture()(x, k / 1000)[2]

    got = guided(FM, strong_u, 1.5, guide=guided(ddpm, weak_eps))(X, t)
    for g, weak, strong in zip(got[:3], gaussian()(X, t), mixture()(X, t)):
        assert torch.allclose(g, weak + 1.5 * (strong - weak), atol=2e-4)


def test_the_learned_variance_is_the_second_half_of_the_channels_unguided():
    def net(x, t, y):
        return torch.cat([labelled()(x, t, y), torch.full_like(x, 0.25) * y.view(-1, 1, 1, 1)], 1)

    for cfg in (1.0, 3.0):
        x0, eps, u, v = guided(FM, net, cfg)(X, HALF, Y)
        assert v.shape == X.shape and v[:, 0, 0, 0].tolist() == [0.5, 1.0, 1.5]
        assert torch.equal(u, guided(FM, labelled(), cfg)(X, HALF, Y)[2])
    assert guided(FM, labelled())(X, HALF, Y)[3] is None
    with pytest.raises(ValueError, match="needs a network that outputs one"):
        sample(guided(FM, labelled()), X, method="ddpm", variance="learned", seeds=[0, 1, 2])
    out = sample(
        guided(FM, net),
        X,
        method="ddpm",
        variance="learned",
        seeds=[0, 1, 2],
        steps=3,
        cond={"y": Y - 3},
    )
    assert torch.isfinite(out.x).all()


def test_a_learned_variance_between_small_and_large_gives_what_lies_there():
    """v = -1 is small and v = 1 large, elementwise."""

    def says(v):
        return lambda x, t: (*gaussian()(x, t), torch.full_like(x, v))

    z = noise(3)
    by = {
        v: sample(says(v), z, method="ddpm", variance="learned", steps=7, seeds=[0, 1, 2]).x
        for v in (-1.0, 0.0, 1.0)
    }
    small, large = (
        sample(gaussian(), z, method="ddpm", variance=k, steps=7, seeds=[0, 1, 2]).x
        for k in ("small", "large")
    )
    assert torch.allclose(by[-1.0], small, atol=1e-12) and torch.allclose(
        by[1.0], large, atol=1e-12
    )
    assert not torch.allclose(by[0.0], small, atol=1e-3) and not torch.allclose(
        by[0.0], large, atol=1e-3
    )


# ---- editing -------------------------------------------------------------------------------------

STOCHASTIC = {"ddim": {"eta": 0.7}}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["fm", "ddpm"])
def test_strength_zero_returns_the_input_and_one_is_plain_sampling(method, name):
    objective, z, e, seeds = (
        make_objective(name),
        noise(3, torch.float32),
        draw(generators([4, 5, 6]), torch.empty(1, 1, 2, 2)),
        [4, 5, 6],
    )
    options = STOCHASTIC.get(method, {})
    grid = time_grid(6, t_start=objective.t_max)
    plain = sample(
        exact,
        begin(objective, e, objective.t_max),
        method=method,
        grid=grid,
        seeds=seeds,
        **options,
    ).x
    for mask in (None, torch.ones(1, 1, 2, 2, dtype=torch.bool)):
        s = edit(
            objective,
            exact,
            z,
            e,
            grid,
            strength=1.0,
            mask=mask,
            method=method,
            seeds=seeds,
            **options,
        )
        assert torch.equal(s.x, plain) and not torch.equal(s.x, z)
        s = edit(
            objective,
            exact,
            z,
            e,
            torch.zeros(2),
            strength=0.0,
            mask=mask,
            method=method,
            seeds=seeds,
            **options,
        )
        assert torch.equal(s.x, z) and s.nfe == 0
    for strength in (-0.1, 1.1):
        with pytest.raises(ValueError, match="strength is"):
            edit(objective, exact, z, e, grid, strength=strength)


@pytest.mark.parametrize("method", ["heun", "ddpm", "unipc", "dopri5"])
@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_a_little_strength_keeps_a_gaussian_where_the_path_says(method, strength):
    """For N(mu, sd²) the ODE takes the state at t linearly to data: mu + sd (x_t - (1 - t) mu) /
    sqrt((1-t)² sd² + t²)."""
    mu, sd, z, e, t = 0.7, 0.3, 0.7 + 0.3 * noise(200), noise(200, seed=1), strength
    options = {"rtol": 1e-6, "atol": 1e-6} if method == "dopri5" else {}
    out = edit(
        FM,
        gaussian(),
        z,
        e,
        time_grid(200, t_start=t),
        strength=t,
        method=method,
        seeds=range(200),
        **options,
    ).x
    want = mu + sd * (((1 - t) * (z - mu) + t * e) / math.hypot((1 - t) * sd, t))
    if method == "ddpm":
        assert abs(float(out.mean()) - mu) < 0.04 and abs(float(out.std()) - sd) < 0.03
    else:
        assert (out - want).abs().max() < 2e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_outside_the_mask_the_input_comes_back_and_is_what_the_network_sees(method, strength):
    z, mask = noise(3), torch.tensor([[[[True, False], [False, False]]]])
    e = draw(generators([4, 5, 6]), torch.empty(1, 1, 2, 2, dtype=torch.float64))

    def watched(x, t):
        w = t.view(-1, 1, 1, 1)
        if len(x) == 3:  # dopri5 may have retired some
            assert torch.allclose(
                x[:, :, 1], ((1 - w) * z + w * e)[:, :, 1], atol=1e-12
            )  # one fixed noise an image
        mean = x.mean((1, 2, 3), keepdim=True).expand_as(
            x
        )  # the painted part looks at what is kept
        return mean, 0 * x, -mean

    s = edit(
        FM,
        watched,
        z,
        e,
        time_grid(5, t_start=strength),
        strength=strength,
        mask=mask,
        method=method,
        seeds=[4, 5, 6],
    )
    assert (
        torch.equal(s.x[:, :, 1], z[:, :, 1])
        and torch.equal(s.x[:, :, 0, 1], z[:, :, 0, 1])
        and (s.x[:, :, 0, 0] != z[:, :, 0, 0]).all()
    )


def test_inpainting_leans_on_what_is_kept():
    """Two pixels, jointly Gaussian with correlation 0.9, one kept at 1.5. The field is linear, so
    the mean of the other follows one ODE, in which the kept one is on its straight way (1 - t) 1.5.
    (It ends short of the conditional mean 1.35: a known bias of showing the network what is kept,
    which is no exact conditioning.)"""
    C, eye, n = (
        torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64),
        torch.eye(2, dtype=torch.float64),
        4000,
    )

    def predict(x, t):
        w, flat = t.view(-1, 1, 1), x.reshape(-1, 2, 1)
        K = (1 - w) ** 2 * C + w**2 * eye
        x0, eps = (1 - w) * C @ torch.linalg.solve(K, flat), w * torch.linalg.solve(K, flat)
        return tuple(v.view_as(x) for v in (x0, eps, eps - x0))

    def mean_field(t, m):
        a = np.array([[1.0, 0.9], [0.9, 1.0]])
        K = (1 - t) ** 2 * a + t**2 * np.eye(2)
        return (
            (t * np.eye(2) - (1 - t) * a) @ np.linalg.solve(K, np.array([m[0], (1 - t) * 1.5]))
        )[:1]

    want = integrate.solve_ivp(mean_field, (1, 0), [0.0], rtol=1e-8).y[0, -1]
    z = torch.full((n, 1, 1, 2), 1.5, dtype=torch.float64)
    e = torch.randn(n, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = edit(
        FM, predict, z, e, time_grid(50), mask=torch.tensor([[[[True, False]]]]), method="heun"
    ).x[:, 0, 0, 0]
    alone = sample(predict, e, grid=time_grid(50)).x[:, 0, 0, 0]
    assert want > 0.5 and abs(float(out.mean()) - want) < 0.05 and abs(float(alone.mean())) < 0.05


@pytest.mark.parametrize("method", samplers.DETERMINISTIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inversion_and_sampling_return_the_start(method, dtype):
    """To 1e-3 by 100 Heun steps; first-order methods come back in proportion to their steps."""
    data, times, errors = sample(mixture(), noise(64, dtype, 3), method="rk4", steps=100).x, [], []

    def watched(x, t):
        times.append(t)
        return mixture()(x, t)

    for steps in (100, 200):
        times.clear()
        back = invert(watched, data, time_grid(steps), method=method)
        assert (
            0 < float(torch.cat(times).min())
            and float(torch.cat(times).max()) <= 1
            and back.nfe == len(times)
            and back.x.dtype == dtype
        )
        errors.append(
            (sample(mixture(), back.x, method=method, grid=time_grid(steps)).x - data).abs()
        )
    if method in ("euler", "ddim"):
        assert (
            errors[0].square().mean().sqrt() < 0.1
            and 0.4 < errors[1].mean() / errors[0].mean() < 0.6
        )
    else:
        assert errors[0].max() < (2e-3 if method == "lms4" else 1e-3), errors[0].max()


def test_inversion_goes_no_further_than_the_grid_and_only_where_it_can():
    data = 0.7 + 0.3 * noise()
    x = invert(gaussian(), data, time_grid(200, t_start=0.6)).x
    assert (x - (0.4 * 0.7 + math.hypot(0.4 * 0.3, 0.6) * (data - 0.7) / 0.3)).abs().max() < 1e-3
    for method in set(METHODS) - set(samplers.DETERMINISTIC):
        with pytest.raises(ValueError, match="cannot be inverted"):
            invert(gaussian(), data, time_grid(5), method=method)


def test_slerp_is_a_great_circle_and_straight_where_there_is_none():
    a, b = noise(1, seed=1), noise(1, seed=2)
    share = torch.linspace(0, 1, 5, dtype=torch.float64)
    path = slerp(a, b, share)
    assert (
        torch.allclose(path[0], a[0])
        and torch.allclose(path[-1], b[0])
        and path.dtype == torch.float64
    )
    ua, ub = a / a.norm(), b / b.norm()
    unit = slerp(ua, ub, share)
    angles = [math.acos(float((unit[i] * unit[i + 1]).sum().clamp(max=1))) for i in range(4)]
    assert unit.flatten(1).norm(dim=1).tolist() == pytest.approx(
        [1] * 5
    ) and angles == pytest.approx([angles[0]] * 4)
    assert torch.allclose(slerp(a, a, share), a.expand(5, -1, -1, -1)) and torch.allclose(
        slerp(a, 3 * a, share)[2], 2 * a[0]
    )
    assert (
        torch.isfinite(slerp(a, -a, share)).all() and torch.isfinite(slerp(0 * a, a, share)).all()
    )


# ---- from seeds to images -----------------------------------------------------------------------

SMALL = UNetConfig(
    12,
    12,
    model_channels=32,
    channel_mult=(1, 1),
    num_res_blocks=1,
    attention=(0, 1),
    num_classes=3,
)
CPU = torch.device("cpu")


def small_generator(objective=FM, unet=SMALL, **how):
    net = randomize(UNet(unet)).eval()
    return Generator(objective, net, pixel(2), (12, 8, 8), device=CPU, classes="abc", **how)


@pytest.mark.parametrize("name, method", [("fm", "heun"), ("ddpm", "ddpm"), ("v", "dopri5")])
def test_a_generator_is_sample_and_decode_of_each_seeds_own_noise(name, method):
    objective = make_objective(name)
    gen = small_generator(objective)
    how = {"method": method} if method == "dopri5" else {"method": method, "steps": 3}
    seeds, y = [3, 4, 9], torch.tensor([0, 2, -1])
    drawn = gen.images(seeds, y, **how)
    x = objective.prior(draw(generators(seeds), torch.empty(1, 12, 8, 8)))
    predict = guided(objective, randomize(UNet(SMALL)).eval())
    s = sample(predict, x, seeds=seeds, t_start=objective.t_max, cond={"y": y}, **how)
    assert torch.equal(drawn.images, to_uint8(pixel(2).decode(s.x)))
    assert drawn.nfe == s.nfe_each.double().mean() and drawn.images.shape == (3, 3, 16, 16)
    alone = gen.images([9], [-1], **how).images[0].int()
    assert (alone - drawn.images[2].int()).abs().max() <= 1  # convolutions round by batch
    shared = gen.images_on(Ranks(0, 1, CPU), seeds, y.tolist(), **how)
    assert torch.equal(shared, drawn.images)


def test_a_generator_counts_the_networks_that_guidance_asks():
    plain = small_generator().images([0, 1], [0, 1], method="euler", steps=4)
    assert (plain.nfe, plain.evaluations) == (4, 4)
    gen = small_generator(cfg=2.0)
    for _ in range(2):  # counted a call, not in all
        drawn = gen.images([0, 1], [0, 1], method="euler", steps=4)
        assert (drawn.nfe, drawn.evaluations) == (4, 8)
    weak = randomize(UNet(SMALL), 1).eval()
    both = small_generator(cfg=2.0, guide=(FM, weak)).images([0], method="euler", steps=4)
    assert (both.nfe, both.evaluations) == (4, 8)


def test_a_generator_of_enlarging_needs_what_it_enlarges():
    gen = small_generator(make_objective("cfm"), replace(SMALL, in_channels=24))
    low = torch.zeros(1, 12, 8, 8)
    assert gen.images([0], low=low, steps=2).images.shape == (1, 3, 16, 16)
    for wrong, how in ((gen, {}), (small_generator(), {"low": low})):
        with pytest.raises(ValueError, match="low= is what a cfm network enlarges"):
            wrong.images([0], **how)


def test_an_opened_generator_says_what_its_images_depend_on(tmp_path):
    path = checkpoint(tmp_path / "m.safetensors")
    cfg = Sampling(str(path), labels=("a", "c"), cfg=2.0, method="dopri5", whole_batch=True)
    assert open_generator(cfg, CPU).sampled == {
        "method": "dopri5",
        "rtol": 1e-3,
        "atol": 1e-4,
        "max_nfe": 1000,
        "whole_batch": True,
        "t_start": 1.0,
        "cfg": 2.0,
        "labels": ["a", "c"],
        "dtype": "fp32",
        "device": "cpu",
        "classes": "2 of 3",
        "batch": 64,
    }
    cfg = Sampling(str(path), cfg=2.0, guide_ckpt=str(path), cfg_interval=(0.3, 5.0), steps=4)
    gen = open_generator(cfg, CPU)
    assert list(gen.sampled.items())[:4] == [
        ("method", "heun"),
        ("steps", 4),
        ("grid", "uniform"),
        ("shift", 1.0),
    ]
    assert gen.sampled["classes"] == "unconditional, of 3"
    assert gen.sampled["cfg interval"] == [0.3, 5.0]
    assert gen.sampled["guide"] == gen.meta["fingerprint"] and gen.path == path
    assert "cfg rescale" not in gen.sampled and "batch" not in gen.sampled


# ---- the command ---------------------------------------------------------------------------------

def checkpoint(path, seed=0, cfg=SMALL, name="fm", vae=None, classes=("a", "b", "c"), **more):
    """A random network of 16×16 pixel images over pixel:2 latents (12, 8, 8)."""
    save_unet(
        path,
        randomize(UNet(cfg), seed),
        {
            "objective": asdict(make_objective(name)),
            "vae": (vae or pixel(2)).meta(),
            "resolution": 16,
            "run": "r",
            "images": 8,
            **({"classes": list(classes)} if classes else {}),
            **more,
        },
    )
    return path


def picture(path, seed=0, size=(16, 16)):
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


def pixels_of(folder, i=0):
    return np.asarray(Image.open(folder / f"{i:06d}.png"))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_draws_the_same_image_for_a_seed_at_any_batch_size(tmp_path, user, method):
    path = checkpoint(tmp_path / "m.safetensors")
    images = {}
    for batch in (1, 4, 16):
        code, out, err = user(
            samplers.main,
            "--ckpt",
            path,
            "--n",
            4,
            "--batch",
            batch,
            "--method",
            method,
            "--out",
            tmp_path / str(batch),
            "--labels",
            "a,b",
            *([] if method == "dopri5" else ["--steps", 3]),
        )
        assert (
            code == 0
            and f"4 images  {method}  NFE/image" in out
            and "s/image" in out
            and "images/s" in out
        ), err
        images[batch] = np.stack([pixels_of(tmp_path / str(batch), i) for i in range(4)]).astype(
            int
        )
    assert all(
        abs(v - images[16]).max() <= 1 for v in images.values()
    )  # convolutions over other batches round otherwise
    assert len(np.unique(images[16])) > 20 and (images[16][0] != images[16][1]).any()


def test_npz_is_what_the_evaluator_reads_and_the_grid_can_be_left_out(tmp_path, user):
    path = checkpoint(tmp_path / "m.safetensors")
    code, out, err = user(
        samplers.main,
        "--ckpt",
        path,
        "--n",
        3,
        "--steps",
        2,
        "--out",
        tmp_path / "s",
        "--npz",
        tmp_path / "s.npz",
        "--no-grid-image",
    )
    assert code == 0, err
    array = np.load(tmp_path / "s.npz")["arr_0"]
    assert (
        array.dtype == np.uint8
        and array.shape == (3, 16, 16, 3)
        and sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "s", "s.npz"]
    )
    assert (
        all((array[i] == pixels_of(tmp_path / "s", i)).all() for i in range(3))
        and not (tmp_path / "s-grid.png").exists()
    )


def test_network_evaluations_are_counted(tmp_path, user):
    path, weak = (
        checkpoint(tmp_path / "m.safetensors"),
        checkpoint(tmp_path / "weak.safetensors", seed=1),
    )
    run = [
        "--ckpt",
        path,
        "--n",
        2,
        "--steps",
        4,
        "--method",
        "euler",
        "--out",
        tmp_path / "s",
        "--labels",
        "a",
        "--cfg",
        2,
    ]
    assert "NFE/image 4 (8 network evaluations: guidance)" in user(samplers.main, *run)[1]
    assert (
        "NFE/image 4 (6 network evaluations: guidance)"
        in user(samplers.main, *run, "--cfg-interval", "0.5,4")[1]
    )  # t = .75, .5
    assert (
        "NFE/image 4 (8 network evaluations: guidance)"
        in user(samplers.main, *run, "--guide-ckpt", weak)[1]
    )


def test_autoguidance_by_the_same_network_changes_nothing_and_by_another_does(tmp_path, user):
    path, weak = (
        checkpoint(tmp_path / "m.safetensors"),
        checkpoint(tmp_path / "weak.safetensors", seed=1, name="ddpm"),
    )
    images = {}
    for name, flags in (
        ("plain", []),
        ("same", ["--cfg", 2, "--guide-ckpt", path]),
        ("weak", ["--cfg", 2, "--guide-ckpt", weak]),
    ):
        code, _, err = user(
            samplers.main, "--ckpt", path, "--n", 1, "--steps", 3, "--out", tmp_path / name, *flags
        )
        assert code == 0, err
        images[name] = pixels_of(tmp_path / name).astype(int)
    assert (
        abs(images["plain"] - images["same"]).max() <= 1
        and (images["plain"] != images["weak"]).any()
    )


@pytest.mark.parametrize(
    "name, flags, guidance, how",
    [
        ("fm", "--shift 3", {}, {"grid": time_grid(4, 3.0)}),
        (
            "fm",
            "--grid karras --method dpmpp_2m",
            {},
            {"grid": time_grid(4, kind="karras"), "method": "dpmpp_2m"},
        ),
        (
            "fm",
            "--cfg 40 --cfg-rescale 0.7 --cfg-interval 0.5,5",
            {"cfg": 40.0, "rescale": 0.7, "interval": (0.5, 5.0)},
            {"grid": time_grid(4)},
        ),
        ("fm", "--cfg 4 --guide-ckpt WEAK", {"cfg": 4.0, "guide": True}, {"grid": time_grid(4)}),
        (
            "fm",
            "--method dopri5 --rtol 0.1 --atol 0.1",
            {},
            {"method": "dopri5", "rtol": 0.1, "atol": 0.1},
        ),
        (
            "zero",
            "--grid trailing",
            {},
            {"grid": rows_grid(make_objective("v", table="scaled_linear", zero_snr=True), 4)},
        ),
        (
            "zero",
            "--method ddpm --variance large",
            {},
            {"grid": time_grid(4), "method": "ddpm", "variance": "large", "seeds": [5, 6]},
        ),
    ],
)
def test_flags_do_what_the_functions_do(tmp_path, user, name, flags, guidance, how):
    """The same pictures from Python, put together by hand; another reading of any flag shows at 4
    steps."""
    objective = FM if name == "fm" else make_objective("v", table="scaled_linear", zero_snr=True)
    path, weak = (
        checkpoint(tmp_path / "m.safetensors", objective=asdict(objective)),
        checkpoint(tmp_path / "WEAK", seed=1, name="x0"),
    )
    words = flags.replace("WEAK", str(weak)).split() + (
        [] if how.get("method") == "dopri5" else ["--steps", 4]
    )
    code, _, err = user(
        samplers.main,
        "--ckpt",
        path,
        "--n",
        2,
        "--seed",
        5,
        "--labels",
        "b",
        "--out",
        tmp_path / "s",
        *words,
    )
    assert code == 0, err
    net, other = (load_unet(p)[0].eval() for p in (path, weak))
    if "guide" in guidance:
        guidance = {**guidance, "guide": guided(make_objective("x0"), other)}
    noise, y = draw(generators([5, 6]), torch.empty(1, 12, 8, 8)), torch.tensor([1, 1])
    want = to_uint8(
        pixel(2).decode(
            sample(
                guided(objective, net, **guidance),
                noise,
                cond={"y": y},
                **{"method": "heun", **how},
            ).x
        )
    )
    for i in range(2):
        assert (
            abs(
                pixels_of(tmp_path / "s", 5 + i).astype(int) - want[i].permute(1, 2, 0).numpy()
            ).max()
            <= 1
        )


def test_editing_through_the_command(tmp_path, user):
    path, init = checkpoint(tmp_path / "m.safetensors"), picture(tmp_path / "i.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[3:9, 4:10] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(np.full((16, 16), 255, np.uint8)).save(tmp_path / "white.png")

    def run(*flags):
        code, out, err = user(
            samplers.main,
            "--ckpt",
            path,
            "--n",
            1,
            "--steps",
            4,
            "--out",
            tmp_path / "s",
            "--seed",
            7,
            *flags,
        )
        assert code == 0, err
        return np.asarray(Image.open(tmp_path / "s/000007.png"))

    original, plain = np.asarray(Image.open(init)), run()
    assert (run("--init", init, "--strength", 0) == original).all()
    assert (run("--init", init, "--strength", 1) == plain).all()
    assert (run("--init", init, "--mask", tmp_path / "white.png") == plain).all()
    for strength in ([], ["--strength", 0.5]):
        painted = run("--init", init, "--mask", tmp_path / "mask.png", *strength)
        assert (painted[mask == 0] == original[mask == 0]).all() and (
            painted[mask > 0] != original[mask > 0]
        ).mean() > 0.5
        # the network sees the mask: of the latent cells with any white in them (2×2 pixels each)
        z, cells = (
            pixel(2).encode(torch.tensor(original).permute(2, 0, 1)[None] / 127.5 - 1),
            torch.zeros(1, 1, 8, 8, dtype=torch.bool),
        )
        cells[..., 1:5, 2:5] = True
        s, net = strength[1] if strength else 1.0, load_unet(path)[0].eval()
        shown = edit(
            FM,
            guided(FM, net),
            z,
            draw(generators([7]), z),
            time_grid(4, 1.0, s),
            strength=s,
            mask=cells,
            method="heun",
            seeds=[7],
        )
        want = to_uint8(pixel(2).decode(shown.x))[0].permute(1, 2, 0).numpy()
        assert abs(painted.astype(int) - want)[mask > 0].max() <= 1
    half = run("--init", init, "--strength", 0.4)
    assert (
        (half != original).any()
        and (half != plain).any()
        and (run("--init", init) == run("--init", init, "--strength", 0.6)).all()
    )


def test_inversion_and_interpolation_through_the_command(tmp_path, user):
    """A network whose velocity is small and smooth, so that 100 Heun steps return the picture."""
    net = randomize(UNet(replace(SMALL, num_classes=0)))
    with torch.no_grad():
        for p in net.out.parameters():
            p.mul_(0.3)
    path, a, b = (
        tmp_path / "m.safetensors",
        picture(tmp_path / "a.png"),
        picture(tmp_path / "b.png", 1),
    )
    save_unet(
        path,
        net,
        {
            "objective": asdict(FM),
            "vae": pixel(2).meta(),
            "resolution": 16,
            "run": "r",
            "images": 8,
        },
    )
    run = ["--ckpt", path, "--steps", 60, "--out", tmp_path / "s"]
    code, out, err = user(samplers.main, *run, "--n", 2, "--init", f"{a},{b}", "--invert")
    assert code == 0, err
    for i, name in enumerate((a, b)):
        assert (
            abs(pixels_of(tmp_path / "s", i).astype(int) - np.asarray(Image.open(name))).max() <= 2
        )
    code, out, err = user(
        samplers.main, *run, "--n", 5, "--batch", 2, "--init", f"{a},{b}", "--interpolate"
    )
    assert code == 0, err
    frames = [pixels_of(tmp_path / "s", i).astype(int) for i in range(5)]
    assert (
        abs(frames[0] - np.asarray(Image.open(a))).max() <= 2
        and abs(frames[4] - np.asarray(Image.open(b))).max() <= 2
    )
    steps = [np.abs(x - y).mean() for x, y in zip(frames, frames[1:])]
    assert max(steps) < 3 * min(steps) and np.abs(frames[2] - frames[0]).mean() > 5


def test_inversion_knows_the_labels(tmp_path, user):
    path, init = checkpoint(tmp_path / "m.safetensors"), picture(tmp_path / "i.png")
    code, _, err = user(
        samplers.main,
        "--ckpt",
        path,
        "--n",
        1,
        "--steps",
        3,
        "--init",
        init,
        "--invert",
        "--labels",
        "b",
        "--out",
        tmp_path / "s",
    )
    assert code == 0, err
    z = pixel(2).encode(
        torch.tensor(np.asarray(Image.open(init))).permute(2, 0, 1)[None] / 127.5 - 1
    )
    predict, grid, images = guided(FM, load_unet(path)[0].eval()), time_grid(3), []
    for label in (1, -1):
        back = invert(predict, z, grid, cond={"y": torch.tensor([label])}).x
        images.append(
            to_uint8(
                pixel(2).decode(sample(predict, back, grid=grid, cond={"y": torch.tensor([1])}).x)
            )[0]
            .permute(1, 2, 0)
            .numpy()
        )
    assert (
        abs(pixels_of(tmp_path / "s").astype(int) - images[0]).max()
        <= 1
        < abs(images[1].astype(int) - images[0]).max()
    )


def test_rows_of_a_table_and_a_learned_variance_through_the_command(tmp_path, user):
    adm = replace(SMALL, out_channels=24, num_classes=0)
    path = checkpoint(tmp_path / "m.safetensors", cfg=adm, name="ddpm", classes=None)
    images = {}
    for name, flags in {
        "trailing": ["--grid", "trailing"],
        "leading": ["--grid", "leading"],
        "small": [],
        "large": ["--variance", "large"],
        "learned": ["--variance", "learned"],
    }.items():
        code, _, err = user(
            samplers.main,
            "--ckpt",
            path,
            "--n",
            1,
            "--steps",
            5,
            "--method",
            "ddpm",
            "--out",
            tmp_path / name,
            *flags,
        )
        assert code == 0, err
        images[name] = pixels_of(tmp_path / name).tobytes()
    assert len(set(images.values())) == 5


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--method heum", "Closest: heun"),
        ("--steps 0", "--steps 0: wanted 1 to 1,000,000"),
        ("--n 0", "--n 0: wanted 1 to 1,000,000,000"),
        ("--grid karas", "Closest: karras"),
        ("--rtol 0 --method dopri5", "--rtol 0.0: wanted more than 0"),
        ("--atol -1 --method dopri5", "wanted more than 0"),
        ("--rtol nan --method dopri5", "wanted more than 0"),
        ("--shift 0", "wanted more than 0"),
        ("--eta 2 --method ddim", "--eta 2.0: wanted 0 to 1"),
        ("--eta x --method ddim", "--eta takes float, got 'x'"),
        (
            "--eta 0",
            "--eta changes nothing here: it is of --method ddim | euler_ancestral | "
            "dpmpp_2m_sde | sde",
        ),
        ("--eta 1 --method dpmpp_2m", "--eta changes nothing here"),
        ("--rtol 1e-3", "--rtol changes nothing here: it is of --method dopri5"),
        ("--whole-batch", "--whole-batch changes nothing here: it is of --method dopri5"),
        (
            "--method dopri5 --steps 25",
            "--steps changes nothing with --method dopri5",
        ),
        ("--method dopri5 --grid uniform", "--grid changes nothing with"),
        ("--method dopri5 --shift 1", "--shift changes nothing with"),
        ("--variance small", "--variance changes nothing here: it is of --method ddpm"),
        ("--method dopri5 --max-nfe 3", "--max-nfe 3: wanted 8 to 1,000,000,000"),
        ("--cfg nan", "--cfg nan: wanted -1000 to 1000"),
        ("--cfg-interval 1,2", "--cfg-interval changes nothing here: it is of --cfg"),
        ("--cfg-rescale 0.7", "--cfg-rescale changes nothing here: it is of --cfg"),
        ("--guide-ckpt CKPT", "--guide-ckpt changes nothing here: it is of --cfg"),
        ("--cfg 2 --labels a --cfg-interval 3,1", "--cfg-interval 3.0,1.0: wanted LO,HI"),
        ("--cfg 2 --labels a --cfg-interval 3", "wanted LO,HI"),
        ("--cfg 2 --labels a --cfg-rescale 1.5", "wanted 0 to 1"),
        ("--cfg 2", "--cfg 2.0 needs --labels"),
        ("--labels d", "no class 'd' among 3"),
        ("--labels 3", "no class '3' among 3"),
        ("--labels -1", "no class '-1'"),
        ("--strength 0.5", "--strength changes nothing here: it is of --init"),
        ("--strength 0", "--strength changes nothing here: it is of --init"),
        ("--mask INIT", "--mask changes nothing here: it is of --init"),
        ("--invert", "--invert changes nothing here: it is of --init"),
        ("--init INIT --strength 1.5", "--strength 1.5: wanted 0 to 1"),
        ("--init INIT --strength -0.1", "wanted 0 to 1"),
        ("--init INIT --mask WIDE", "is 20×16, but"),
        ("--init INIT --mask CKPT", "Give an image"),
        ("--init CKPT", "Give an image"),
        ("--init .", "error: . is a folder, wanted an image.  Name an image in it."),
        ("--init nowhere.png", "nowhere.png"),
        ("--init INIT --interpolate", "wanted two images"),
        (
            "--init INIT,INIT --interpolate --strength 0.5",
            "--strength changes nothing with --interpolate",
        ),
        ("--init INIT,INIT --interpolate --labels a,b", "--labels a,b: wanted one"),
        ("--init INIT --invert --mask INIT", "--mask changes nothing with --invert"),
        ("--init INIT --invert --method unipc", "--method unipc cannot be inverted"),
        ("--init INIT --invert --method ddim --eta 0.5", "--method ddim --eta cannot be inverted"),
        ("--grid trailing", "rows of a VP table, unshifted"),
        ("--method ddpm --variance learned", "gives no variance (it has 12 output channels)"),
        ("--cfg 2 --guide-ckpt OTHER", "is of another latent space than --ckpt"),
        ("--cfg 2 --guide-ckpt PIXELS", "is of another latent space than --ckpt"),
        ("--cfg 2 --guide-ckpt CLASSES", "was trained with other classes"),
        ("--cfg 2 --guide-ckpt nowhere", "no checkpoint at nowhere"),
        ("--ckpt PLAIN --cfg 2", "this checkpoint was trained without classes"),
        ("--ckpt PLAIN --labels 0", "was trained without classes"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, user, flags, message):
    other = pixel(2)
    other.mean += 0.5
    plain = replace(SMALL, num_classes=0)
    made = {
        "CKPT": lambda p: checkpoint(p),
        "OTHER": lambda p: checkpoint(p, vae=other),
        "CLASSES": lambda p: checkpoint(p, classes=("a", "b", "x")),
        "PIXELS": lambda p: checkpoint(p, cfg=PIXELS, vae=pixel(), classes="abcde"),
        "PLAIN": lambda p: checkpoint(p, cfg=plain, classes=None),
        "INIT": lambda p: picture(p),
        "WIDE": lambda p: picture(p, size=(20, 16)),
    }
    words = flags.split() if "--ckpt" in flags else ["--ckpt", "CKPT", *flags.split()]
    for name, make in made.items():
        if any(name in word.split(",") for word in words):
            file = make(tmp_path / f"{name}.{'png' if name in ('INIT', 'WIDE') else 'safetensors'}")
            words = [
                ",".join(str(file) if part == name else part for part in word.split(","))
                for word in words
            ]
    code, out, err = user(samplers.main, *words, "--out", tmp_path / "s")
    assert code == 2 and len(err) == 1 and message in err[0] and not (tmp_path / "s").exists(), err


def test_a_dry_run_says_what_the_method_will_use(tmp_path, user):
    import json

    path = checkpoint(tmp_path / "m.safetensors")
    said = {
        m: json.loads(user(samplers.main, "--ckpt", path, "--method", m, "--dry-run")[1])
        for m in ("heun", "ddim", "sde", "dopri5")
    }
    assert (said["heun"]["steps"], said["heun"]["grid"], said["heun"]["eta"]) == (
        25,
        "uniform",
        None,
    )
    assert (
        said["ddim"]["eta"] == 0.0
        and said["sde"]["eta"] == 1.0
        and (said["dopri5"]["rtol"], said["dopri5"]["steps"]) == (1e-3, None)
    )


def test_default_folders_of_long_settings_are_short_and_differ():
    names = {
        likeness.settings(samplers.Config("F", init=(f"{'x' * 200}{i}.png",))) for i in range(3)
    }
    names |= {
        likeness.settings(samplers.Config("F", cfg=2.0, cfg_interval=interval))
        for interval in ((), (0.5, 4.0))
    }
    assert len(names) == 5 and all(len(name) < 150 for name in names)


# ---- files that cannot say everything ------------------------------------------------------------

PIXELS = UNetConfig(
    3, 3, model_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention=(0, 1), num_classes=5
)


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            dict(objective="eps"),
            "eps needs its noise schedule.  Add --table linear, cosine or scaled_linear "
            "(guided-diffusion: cosine for its 64×64 "
            "model, linear for the others; Stable Diffusion: scaled_linear)",
        ),
        (dict(objective="v", resolution=8), "v needs its noise schedule"),
        (dict(objective="x0", resolution=8), "x0 needs its noise schedule"),
        (
            dict(objective="eps", table="linear"),
            "F does not say its own resolution.  Add --resolution N, a multiple of 2.",
        ),
        (
            dict(objective="fm"),
            "F does not say its own resolution.  Add --resolution N, a multiple of 2.",
        ),
        (dict(objective="fm", resolution=9), "--resolution 9: wanted a multiple of 2."),
        (dict(objective="fm", resolution=-2), "--resolution -2: wanted a multiple of 2."),
    ],
)
def test_what_a_foreign_file_does_not_say_is_asked_for(flags, message):
    with pytest.raises(UserError) as error:
        samplers.describe(
            samplers.Config("F", **flags), PIXELS, {"objective": flags["objective"]}, "F"
        )
    assert message in str(error.value)


def test_fm_needs_no_table_and_a_given_one_is_taken():
    assert samplers.describe(samplers.Config("F", resolution=8), PIXELS, {"objective": "fm"}, "F")[
        0
    ] == make_objective("fm")
    assert samplers.describe(
        samplers.Config("F", resolution=8, table="cosine"), PIXELS, {"objective": "eps"}, "F"
    )[0] == make_objective("ddpm", table="cosine")


@pytest.mark.parametrize(
    "classes, flags, warns",
    [
        (None, [], True),
        (None, ["--labels", "3"], False),
        (None, ["--labels", "3", "--cfg", "2"], True),
        (list("abcde"), [], False),
        (list("abcde"), ["--labels", "c", "--cfg", "2"], False),
    ],
)
def test_drawing_without_a_class_is_warned_of_where_nobody_says_it_was_trained(
    tmp_path, user, classes, flags, warns
):
    (tmp_path / "theirs").mkdir()
    path = tmp_path / "theirs/diffusion_pytorch_model.safetensors"
    net = randomize(UNet(PIXELS))
    save_unet(path, net, {"objective": "eps", **({"classes": classes} if classes else {})})
    code, _, err = user(
        samplers.main,
        "--ckpt",
        path,
        "--n",
        1,
        "--steps",
        1,
        "--resolution",
        8,
        "--table",
        "linear",
        "--out",
        tmp_path / "s",
        *flags,
    )
    warnings = [line for line in err if line.startswith("warning: ")]
    assert (
        code == 0 and len(warnings) == warns and all('"no class"' in line for line in warnings)
    ), err


def test_sample_folders_of_diffusers_files_have_the_folders_name(tmp_path):
    for path, name in (
        ("a/unet.safetensors", "unet-abcdef"),
        ("a/diffusion_pytorch_model.safetensors", "a-abcdef"),
        ("b/diffusion_pytorch_model.safetensors.index.json", "b-abcdef"),
    ):
        assert (
            samplers.default_folder(
                samplers.Config("F"), tmp_path / path, {"fingerprint": "abcdef0123"}
            )
            == f"samples/{name}"
        )
    assert (
        samplers.default_folder(
            samplers.Config("F", n=2, steps=3),
            tmp_path / "ema-0.050.safetensors",
            {"run": "r", "images": 8, "fingerprint": "abcdef01"},
        )
        == "samples/r-8-ema-0.050-abcdef-steps=3"
    )


# ---- objectives that begin or end elsewhere ------------------------------------------------------


@pytest.mark.parametrize("upsample", ["psu", "nearest"])
def test_a_cfm_network_enlarges_pictures(tmp_path, user, upsample):
    """An untrained network says u = 0, so the way ends where it began: in the noised, enlarged
    picture."""
    objective, vae = make_objective("cfm", upsample=upsample), pixel(2)
    save_unet(
        tmp_path / "a",
        UNet(replace(SMALL, in_channels=24, num_classes=0)),
        {"objective": asdict(objective), "vae": vae.meta(), "resolution": 16},
    )
    picture(tmp_path / "p.png", size=(40, 30))
    base = ["--ckpt", tmp_path / "a", "--n", 2, "--steps", 3]
    code, _, err = user(samplers.main, *base, "--init", tmp_path / "p.png", "--out", tmp_path / "s")
    assert code == 0, err
    small = (
        torch.from_numpy(decode(tmp_path / "p.png", 8).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    )
    up = (
        vae.encode(
            torch.nn.functional.interpolate(small, (16, 16), mode="bilinear", antialias=True)
        )
        if upsample == "psu"
        else vae.encode(small).repeat_interleave(2, 2).repeat_interleave(2, 3)
    )
    for i in range(2):
        z = torch.randn(12, 8, 8, generator=torch.Generator().manual_seed(i))
        want = vae.decode((1 - 0.5883**2) ** 0.5 * up + 0.5883 * z)[0].clamp(-1, 1).permute(1, 2, 0)
        assert abs(pixels_of(tmp_path / "s", i) / 127.5 - 1 - want.numpy()).max() < 0.006
    for flags, message in (
        ((), "was trained to enlarge pictures 2 times.  Add --init"),
        (("--init", tmp_path / "p.png", "--strength", 0.5), "--strength: "),
        (("--init", tmp_path / "p.png", "--strength", 0), "--strength: "),
        (("--init", tmp_path / "p.png", "--method", "sde"), "Use an ODE solver"),
        (("--init", tmp_path / "p.png", "--method", "ddim", "--eta", 1), "Use an ODE solver"),
    ):
        code, _, err = user(samplers.main, *base, *flags, "--out", tmp_path / "t")
        assert (
            code == 2 and len(err) == 1 and message in err[0] and not (tmp_path / "t").exists()
        ), err
    code, _, err = user(
        samplers.main,
        *base,
        "--init",
        tmp_path / "p.png",
        "--method",
        "sde",
        "--eta",
        0,
        "--out",
        tmp_path / "e",
    )
    assert (
        code == 0
        and abs(pixels_of(tmp_path / "e").astype(int) - pixels_of(tmp_path / "s")).max() <= 1
    ), err  # without noise an ODE as well


def test_rows_of_a_zero_snr_table_begin_in_pure_noise():
    objective = make_objective("v", table="scaled_linear", zero_snr=True)
    for spacing in ("trailing", "linspace"):
        grid = rows_grid(objective, 10, spacing)
        assert grid[0] == 1 and (grid.diff() < 0).all() and grid[-1] == 0
    rows = [float(objective.row(t)) for t in rows_grid(objective, 10)[:-1]]
    assert rows == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    z = noise(2, torch.float32)
    assert torch.equal(begin(objective, z, 1.0), z)
    with pytest.raises(ValueError, match="rows of a VP table.*'gvp'"):
        time_grid(5, kind="trailing", table="gvp")
    for kind in ("karras", "logsnr"):
        assert torch.equal(time_grid(5, kind=kind, table="gvp"), time_grid(5, kind=kind))


def test_only_the_network_runs_in_bf16(tmp_path, user, monkeypatch):
    """Encoding, the solver's arithmetic and decoding are outside."""
    checkpoint(tmp_path / "a.safetensors")
    picture(tmp_path / "p.png")
    seen, calls = (
        {},
        {
            "net": (UNet, "forward"),
            "encode": (type(pixel()), "encode"),
            "decode": (type(pixel()), "decode"),
        },
    )
    for what, (owner, name) in calls.items():

        def spy(self, *args, what=what, plain=getattr(owner, name), **how):
            seen.setdefault(what, set()).add(torch.is_autocast_enabled("cpu"))
            return plain(self, *args, **how)

        monkeypatch.setattr(owner, name, spy)
    code, _, err = user(
        samplers.main,
        "--ckpt",
        tmp_path / "a.safetensors",
        "--init",
        tmp_path / "p.png",
        "--n",
        1,
        "--dtype",
        "bf16",
        "--out",
        tmp_path / "s",
    )
    assert (
        code == 0 and seen["encode"] == {False} == seen["decode"] and seen["net"] == {True, False}
    ), err  # False: the probe on loading


# ---- networks that break -------------------------------------------------------------------------


def test_a_network_without_numbers_draws_nothing_and_says_for_which_seeds_and_when(tmp_path, user):
    path = checkpoint(tmp_path / "m.safetensors")
    net, meta = load_unet(path)
    with torch.no_grad():
        net.out[2].bias[0] = torch.nan
    save_unet(path, net, meta)
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    ways = ([], ["--method", "dopri5"], ["--init", tmp_path / "a.png"])
    for i, how in enumerate((*ways, [*ways[2], "--invert"])):
        steps = [] if "dopri5" in how else ["--steps", 2]
        out = tmp_path / f"s{i}"
        code, _, err = user(
            samplers.main, "--ckpt", path, "--n", 3, "--seed", 7, "--out", out, *steps, *how
        )
        assert code == 1 and "for 3 of 3 images, of seeds 7 (t = " in err[-1], err
        assert not list(out.glob("*.png")) and not (tmp_path / f"s{i}-grid.png").exists()


def test_one_broken_seed_is_named_and_the_others_are_whole():
    gen = small_generator()
    whole = gen.images([4, 5, 6], steps=2).images
    real = gen.noise
    gen.noise = lambda seeds: real(seeds).where(
        torch.tensor(seeds).view(-1, 1, 1, 1) != 5, torch.inf
    )
    for draw_them in (gen.images, lambda seeds, **how: gen.images_on(ALONE, seeds, **how)):
        with pytest.raises(NonFinite) as error:
            draw_them([4, 5, 6], steps=2)
        assert error.value.lost == {5: 1.0}
        assert (error.value.images[[0, 2]].int() - whole[[0, 2]].int()).abs().max() <= 1


def test_pixels_that_an_autoencoder_cannot_make_are_none():
    gen = small_generator()
    gen.vae = pixel(2)
    gen.vae.decode = lambda z: torch.full((len(z), 3, 16, 16), torch.inf)
    with pytest.raises(NonFinite, match="seeds 3 \\(t = 0.0000\\)"):
        gen.images([3], steps=1)


# ---- a folder of samples -------------------------------------------------------------------------


def test_a_folder_of_samples_is_the_set_of_one_commands_images(tmp_path, user):
    path, out = checkpoint(tmp_path / "m.safetensors"), tmp_path / "s"
    how = ["--ckpt", path, "--steps", 1, "--out", out]
    assert user(samplers.main, *how, "--n", 5)[0] == 0
    first = (out / "000001.png").read_bytes()
    code, said, _ = user(samplers.main, *how, "--n", 2, "--seed", 1)
    assert code == 0 and "3 pictures of an earlier command" in said
    assert sorted(p.name for p in out.glob("*.*g")) == ["000001.png", "000002.png"]
    assert (out / "000001.png").read_bytes() == first and (tmp_path / "s-grid.png").exists()
    open_images(str(out))  # one size: the grid is not among them


@pytest.mark.parametrize("name", ["photo.png", "000001.png", "deep/er/photo.JPG"])
def test_pictures_that_were_not_drawn_into_a_folder_are_refused_and_left(name, tmp_path, user):
    path, out = checkpoint(tmp_path / "m.safetensors"), tmp_path / "s"
    how = ["--ckpt", path, "--steps", 1, "--n", 2, "--out", out]
    assert user(samplers.main, *how)[0] == 0
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), "red").save(out / name)
    (out / "notes.txt").write_text("mine")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    code, _, err = user(samplers.main, *how, "--seed", 50)
    assert code == 2 and f"not drawn into it ({name})" in err[-1]
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_a_kill_while_pictures_are_written_leaves_a_folder_that_is_drawn_anew(
    tmp_path, monkeypatch
):
    out, images = tmp_path / "s", torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    check_set(out, (".png",), True)
    save_all(images, out, 0)
    real, calls = pictures.save_png, []

    def killed(image, path, *info):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(image, path, *info)

    with monkeypatch.context() as m:
        m.setattr(pictures, "save_png", killed)
        with pytest.raises(KeyboardInterrupt):
            save_all(images + 9, out, 2)
    check_set(out, (".png",), True)
    save_all(images, out, 7)
    assert sorted(p.name for p in out.glob("*.png")) == [f"{i:06d}.png" for i in (7, 8, 9)]


def test_only_what_was_drawn_into_a_folder_and_is_as_it_was_may_be_replaced(tmp_path):
    images = torch.arange(2 * 3 * 64).view(2, 3, 8, 8).to(torch.uint8)
    for name in ("a", "b", "c", "d"):
        check_set(tmp_path / name, (".png",), False)
        save_all(images, tmp_path / name, 0, grid=False)
    file = tmp_path / "a/000001.png"
    with Image.open(file) as image:
        text = PngInfo()
        text.add_text(pictures.SEAL, image.info[pictures.SEAL])
        edited = image.transpose(Image.Transpose.ROTATE_90)
    edited.save(file, pnginfo=text)
    (tmp_path / "b/best.png").write_bytes((tmp_path / "c/000001.png").read_bytes())
    file.with_name("000003.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name in ("a", "b"):
        with pytest.raises(UserError, match="not drawn into it"):
            check_set(tmp_path / name, (".png",), False)
    check_set(tmp_path / "d", (".png",), False)
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["000000.png", "000001.png"]
