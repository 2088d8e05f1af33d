"""Objectives against closed forms, autograd, and the reference schedulers; and train.py with each
of their flags."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import scipy.stats
import torch

import data.dataset as data
import train
from harness.run import checkpoints
from ckpt import load_unet
from harness.cli import UserError
from objectives import EDGE, PRESETS, Objective, loss_weight, make_objective
from diffusion.schedules import (
    T, TABLES, alphas_bar, norm, stratify, table_row, table_time,
)
from diffusion.variance import posterior
from samplers import sample
from test_train import a_quick_last_picture  # noqa: F401

NAMES = tuple(name for name in PRESETS if name != "cfm")  # cfm: test_coupling.py
KINDS = [
    Objective("x", target, table, zero_snr=zero)
    for table in ("", "gvp", *TABLES)
    for zero in (False, True)
    for target in ("u", "v", "eps", "x0")
    if not (zero and (table in ("", "gvp") or target == "eps"))
    and not (target == "u" and table in TABLES)
]
WEIGHTS = ("min_snr", "soft_min_snr", "debiased", "cosmap")


def label(o: Objective) -> str:
    return f"{o.target}-{o.table or 'path'}{'-zero' * o.zero_snr}{'-aligned' * o.aligned}"


def coordinates(o: Objective, k: torch.Tensor):
    """a and s of what a network is fed beside the number k, from the schedules' definitions."""
    k = k.double()
    if o.table in TABLES:
        ab = alphas_bar(o.table, o.zero_snr)
        a, s = (
            torch.tensor(np.interp(k, range(T), ab.sqrt())),
            torch.tensor(np.interp(k, range(T), (1 - ab).sqrt())),
        )
    else:
        a, s = (
            ((math.pi / 2 * k / T).cos(), (math.pi / 2 * k / T).sin())
            if o.table
            else (1 - k / T, k / T)
        )
    return a.view(-1, 1, 1, 1), s.view(-1, 1, 1, 1)


def answer(o: Objective, a, s, x0, eps):
    """What a network says that knows x0 and eps: each target by its definition, u as the path's
    derivative."""
    r = (a**2 + s**2) ** 0.5  # v is defined where this is 1
    return {
        "u": eps - x0 if not o.table else math.pi / 2 * (a * eps - s * x0),
        "eps": eps,
        "x0": x0,
        "v": (a * eps - s * x0) / r,
    }[o.target]


def oracle(o: Objective, x0: torch.Tensor, eps: torch.Tensor):
    """A network that knows x0 and eps and answers in the objective's terms, checking what it is
    fed."""

    def net(x, k):
        a, s = coordinates(o, k)
        assert torch.allclose(x.double(), a * x0 + s * eps, atol=2e-5), (
            "the network is not fed a x0 + s eps"
        )
        return answer(o, a, s, x0, eps)

    return net


def inside(o: Objective, n: int) -> torch.Tensor:
    """(n,) times that a network of this kind knows, whole rows of a table."""
    if o.table in TABLES:
        return table_time(o.table, torch.linspace(1, T - 2, n).round(), o.zero_snr)
    return torch.linspace(0.01, 0.99, n, dtype=torch.float64)


def pair(n=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 3, 3, generator=g), torch.randn(n, 2, 3, 3, generator=g)


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_zero_for_an_oracle_and_feeds_the_schedules_own_coordinates(name):
    objective, (x0, eps) = make_objective(name), pair()
    out = objective.loss(
        oracle(objective, x0, eps), x0, eps=eps, generator=torch.Generator().manual_seed(1)
    )
    assert out.loss < 1e-8 and out.per_sample.shape == out.t.shape == (64,)
    worse = objective.loss(lambda x, t: torch.zeros_like(x), x0, eps=eps)
    assert worse.loss > 0.1 and torch.isclose(worse.loss, worse.per_sample.mean())


@pytest.mark.parametrize("o", KINDS, ids=label)
def test_predict_recovers_x0_eps_and_u(o):
    x0, eps = (v.double() for v in pair(50))
    t = inside(o, 50)
    w = t.view(-1, 1, 1, 1)
    amplified = (
        1 / (1 - t) if o.target == "eps" else 1 / t if o.target == "x0" else torch.ones_like(t)
    )
    for value, want in zip(
        o.predict(oracle(o, x0, eps), (1 - w) * x0 + w * eps, t), (x0, eps, eps - x0)
    ):
        assert ((value - want).abs().flatten(1).amax(1) < 1e-6 * amplified + 1e-6).all()


@pytest.mark.parametrize("table", ["", "gvp", *TABLES])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_eps_to_v_to_u_to_x0_to_eps_is_the_identity(table, dtype, error):
    x0, eps = (v.to(dtype) for v in pair(99))
    t = torch.linspace(0.01, 0.99, 99, dtype=dtype).view(-1, 1, 1, 1)
    x, value = (1 - t) * x0 + t * eps, eps
    targets = [k for k in ("eps", "v", "u", "x0", "eps") if k != "u" or table not in TABLES]
    for now, then in zip(targets[:-1], targets[1:]):
        x0_hat, eps_hat, _ = Objective("x", now, table).triple(value, x, t)
        value = Objective("x", then, table).goal(x0_hat, eps_hat, t)
    known = (t <= Objective("x", "eps", table).t_max) & (
        t >= Objective("x", "x0", table).t_min
    )  # elsewhere a guard stands before the division
    assert (
        known.sum() > 80 and ((value - eps).abs() * known * t * (1 - t)).max() < error
    )  # one division by 1 - t, one by t


def own_point(o: Objective, k, x0, eps):
    """The point a network is fed at k, made of our own functions, differentiable in k."""
    t = (table_time(o.table, k, o.zero_snr) if o.table else k / T).view(-1, 1, 1, 1)
    x = (1 - t) * x0 + t * eps
    return x / norm(t) if o.table else x


@pytest.mark.parametrize(
    "o", [o for o in KINDS if o.target in ("u", "v") and (o.target == "u" or o.table)], ids=label
)
def test_u_is_the_derivative_of_the_path_and_v_the_derivative_by_angle(o):
    x0, eps = (v.double()[:1].expand(50, 2, 3, 3) for v in pair())
    k = torch.linspace(3.3, T - 3.7, 50, dtype=torch.float64)
    k.requires_grad_()
    t, towards = (
        table_time(o.table, k, o.zero_snr) if o.table else k / T,
        torch.randn(50, 2, 3, 3, dtype=torch.float64),
    )
    dx = torch.autograd.grad((own_point(o, k, x0, eps) * towards).sum(), k)[0]
    speed = (
        1 / T if o.target == "u" else torch.autograd.grad(torch.atan(t / (1 - t)).sum(), k)[0]
    )  # of the angle whose cosine is a
    goal = (o.goal(x0, eps, t.detach().view(-1, 1, 1, 1)) * towards).flatten(1).sum(1)
    assert torch.allclose(dx, goal * speed, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("o", KINDS, ids=label)
def test_every_prediction_is_regular_at_both_ends(o):
    x = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.0, 1e-9, 1 - 1e-7, 1.0])
    for value in o.predict(lambda x, t: torch.ones_like(x), x, t):
        assert torch.isfinite(value).all()
        if o.target in ("u", "v"):
            assert value.abs().max() < 10
    if o.target == "x0":  # the network is asked about t_min, and divided by it
        assert torch.allclose(
            o.predict(lambda x, t: torch.ones_like(x), x, t)[1][0], (x[0] - 1) / o.t_min
        )


def test_u_gives_the_end_it_stands_at():
    x = torch.randn(2, 1, 2, 2)
    x0, eps, u = make_objective("fm").predict(
        lambda x, t: torch.full_like(x, 2.0), x, torch.tensor([0.0, 1.0])
    )
    assert (
        torch.equal(u, torch.full_like(x, 2.0))
        and torch.equal(x0[0], x[0])
        and torch.equal(eps[1], x[1])
    )


@pytest.mark.parametrize("o", KINDS, ids=label)
def test_training_and_sampling_stay_where_the_prediction_means_something(o):
    for density in ("uniform", "logit_normal", "lognormal"):
        t = replace(o, density=density).time(torch.tensor([0.0, 1e-9, 0.5, 1 - 1e-9, 1.0]))
        assert (
            t.dtype == torch.float32
            and t.min() >= np.float32(o.t_min)
            and t.max() <= np.float32(o.t_max)
            and (t.diff() >= 0).all()
        )
    assert o.t_max == 1 or o.target == "eps" or (o.table in TABLES and not o.zero_snr)
    assert (o.t_max, o.t_min) == (1, 0) or o.target in ("eps", "x0") or (o.table and not o.zero_snr)
    if o.zero_snr:
        z = torch.randn(3, 1, 2, 2)
        assert (
            o.t_max == 1.0
            and torch.equal(o.prior(z), z)
            and o.time(torch.tensor([0.9999])).item() == 1.0
            and o.row(torch.ones(1)).item() == T - 1
        )
    if o.target == "eps" and o.table not in TABLES:
        assert o.t_max == 1 - EDGE


def test_ddpm_noising_matches_diffusers_at_every_row():
    diffusers = pytest.importorskip(
        "diffusers", reason="oracle: pip install -r requirements-dev.txt"
    )
    scheduler, objective, (x0, eps) = diffusers.DDPMScheduler(), make_objective("ddpm"), pair(T)
    fed = {}

    def net(x, t):
        fed.update(x=x, k=t)
        return x

    objective.loss(net, x0, eps=eps, t=table_time("linear", torch.arange(T)).float())
    assert torch.equal(fed["k"], torch.arange(T).float())  # whole rows, exactly
    assert torch.allclose(fed["x"], scheduler.add_noise(x0, eps, torch.arange(T)), atol=2e-6)


def test_starts_where_the_table_ends():
    assert make_objective("fm").t_max == 1.0
    assert math.isclose(make_objective("ddpm").t_max, 0.9937, abs_tol=5e-5)
    assert math.isclose(make_objective("ddpm", table="scaled_linear").t_max, 0.9360, abs_tol=5e-5)
    z = torch.randn(4, 1, 64, 64)
    start = make_objective("ddpm", table="scaled_linear").prior(z)
    assert math.isclose(float((start / z).mean()), math.hypot(0.9360, 0.0640), abs_tol=1e-4)


def test_ddpm_draws_every_row_alike_and_gaussian_centres_on_500():
    k = table_row("linear", make_objective("ddpm").time((torch.arange(10_000) + 0.5) / 10_000))
    assert torch.equal(k.long().bincount(), torch.full((T,), 10))
    k = table_row(
        "linear",
        make_objective("ddpm", density="gaussian").time((torch.arange(10_000) + 0.5) / 10_000),
    )
    assert abs(float(k.mean()) - 499.5) < 1 and 180 < float(k.std()) < 200


def test_losses_per_element():
    x0, eps = pair(8)
    net, t = (lambda x, t: torch.zeros_like(x)), torch.full((8,), 0.5)
    d = (eps - x0).double()
    values = {
        k: make_objective("fm", loss_type=k).loss(net, x0, eps=eps, t=t).loss
        for k in ("mse", "l1", "huber")
    }
    assert values["mse"].item() == pytest.approx(d.square().mean().item(), rel=1e-5)
    assert values["l1"].item() == pytest.approx(d.abs().mean().item(), rel=1e-5)
    c = 0.03
    assert values["huber"].item() == pytest.approx(
        (2 * c * ((d**2 + c**2).sqrt() - c)).mean().item(), rel=1e-5
    )


def test_fm_minimum_for_gaussian_data_is_the_conditional_variance():
    g, sd, mu, t = torch.Generator().manual_seed(0), 0.5, 0.7, 0.4
    x0, eps = (
        mu + sd * torch.randn(20_000, 1, 2, 2, generator=g),
        torch.randn(20_000, 1, 2, 2, generator=g),
    )
    var = (1 - t) ** 2 * sd**2 + t**2

    def best(x, _):
        return (x - (1 - t) * mu) * (t - (1 - t) * sd**2) / var - mu  # E[eps - x0 | x]

    loss = make_objective("fm").loss(best, x0, eps=eps, t=torch.full((20_000,), t)).loss
    assert loss.item() == pytest.approx(sd**2 / var, rel=0.02)  # 1 + sd² - cov² / var


def test_source_takes_the_place_of_noise_for_velocities_only():
    x0, source = pair(4)
    out = make_objective("fm").loss(lambda x, t: source - x0, x0, source=source)
    assert out.loss < 1e-10
    with pytest.raises(ValueError, match="source"):
        make_objective("ddpm").loss(lambda x, t: x, x0, source=source)


def test_time_stays_fp32_when_everything_else_is_bf16():
    fed = {}

    def net(x, t):
        fed["t"] = t
        return x.bfloat16()

    t = torch.tensor([0.98849])
    out = make_objective("fm").loss(
        net, torch.randn(1, 1, 2, 2).bfloat16(), eps=torch.randn(1, 1, 2, 2).bfloat16(), t=t
    )
    assert fed["t"].dtype == torch.float32 and fed["t"].item() == pytest.approx(988.49, abs=1e-3)
    assert out.loss.dtype == torch.float32


def test_conditions_reach_the_network():
    y = torch.tensor([3, 1])

    def net(x, t, y):
        assert y.tolist() == [3, 1]
        return x

    make_objective("fm").loss(net, torch.randn(2, 1, 2, 2), y=y)
    make_objective("fm").predict(net, torch.randn(2, 1, 2, 2), torch.tensor([0.5, 0.5]), y=y)


@pytest.mark.parametrize(
    "call",
    [
        lambda: make_objective("edm"),
        lambda: make_objective("fm", density="normal"),
        lambda: make_objective("ddpm", table="sigmoid"),
    ],
)
def test_unknown_names_say_what_is_known(call):
    with pytest.raises(ValueError, match="is not one of"):
        call()


def test_gvp_draws_angles_without_rows():
    q = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = make_objective("v", table="gvp").time(q).double()
    assert torch.allclose(torch.atan2(t, 1 - t), q * math.pi / 2, atol=1e-6)


# ---- weights -------------------------------------------------------------------------------------


def test_weights_are_what_their_papers_say_on_the_error_of_x0():
    t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    snr, sigma = ((1 - t) / t) ** 2, t / (1 - t)
    assert torch.allclose(loss_weight(t, "x0", "min_snr"), snr.clamp(max=5.0))
    assert torch.allclose(loss_weight(t, "x0", "min_snr", 2.0), snr.clamp(max=2.0))
    assert torch.allclose(
        loss_weight(t, "x0", "soft_min_snr", 4.0), 1 / (sigma**2 + 1 / 4)
    )  # k-diffusion's, at sigma_data 1
    assert torch.allclose(loss_weight(t, "eps", "debiased"), 1 / snr.clamp(max=1000).sqrt())
    assert torch.allclose(loss_weight(t, "u", "cosmap"), 2 / (math.pi * (1 - 2 * t + 2 * t**2)))
    assert torch.equal(loss_weight(t, "v", "uniform"), torch.ones_like(t))
    with pytest.raises(ValueError, match="is not one of"):
        loss_weight(t, "u", "p2")


def test_weights_are_diffusers():
    training = pytest.importorskip(
        "diffusers.training_utils", reason="oracle: pip install -r requirements-dev.txt"
    )
    diffusers = pytest.importorskip(
        "diffusers", reason="oracle: pip install -r requirements-dev.txt"
    )
    rows = torch.arange(0, T, 7)
    snr, t = (
        training.compute_snr(diffusers.DDPMScheduler(), rows).double(),
        table_time("linear", rows),
    )
    capped = torch.stack([snr, 5 * torch.ones_like(snr)], 1).min(1)[
        0
    ]  # as its train_text_to_image.py divides it
    assert torch.allclose(
        loss_weight(t, "eps", "min_snr"), capped / snr, rtol=1e-3
    )  # its table is an fp32 product
    assert torch.allclose(loss_weight(t, "v", "min_snr"), capped / (snr + 1), rtol=1e-3)
    assert torch.allclose(
        loss_weight(t, "u", "cosmap"), training.compute_loss_weighting_for_sd3("cosmap", t)
    )


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("zero", [False, True])
def test_the_same_error_of_x0_costs_the_same_whatever_is_predicted(kind, zero):
    """Networks that are wrong by the same d in x0 (and so consistently in eps, v and u), through
    the whole of loss()."""
    x0, eps = (v.double() for v in pair(60))
    d = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5)) * 0.3
    table = "cosine" if zero else "linear"
    t = table_time(
        table, torch.linspace(2, 990, 60).round(), zero
    ).float()  # whole rows, for the tables' sake
    losses = {}
    aligned = [
        Objective("x", k, table, zero_snr=zero, aligned=True) for k in ("eps", "v", "x0")[zero:]
    ]
    for o in [
        o for o in KINDS if (o.table, o.zero_snr) in ((table, zero), ("", False), ("gvp", False))
    ] + aligned:

        def net(x, k):
            a, s = coordinates(o, k)
            wrong = x0 + d
            return answer(
                o, a, s, wrong, (x.double() - a * wrong) / s
            )  # the eps that x leaves to that x0

        losses[label(o)] = replace(o, weight=kind).loss(net, x0, eps=eps, t=t).per_sample.double()
    w = t.double()
    want = loss_weight(w, "x0", kind) * d.square().flatten(1).mean(1)
    assert len(losses) >= 9
    for name, got in losses.items():
        assert torch.allclose(got, want, rtol=2e-3), name  # fp32 networks, divided by s and 1 - t


@pytest.mark.parametrize("o", KINDS, ids=label)
@pytest.mark.parametrize("kind", ("uniform",) + WEIGHTS)
def test_weights_are_finite_where_a_target_is_trained(o, kind):
    w = loss_weight(
        torch.tensor(
            [max(o.t_min, 0.0), 1e-8 if not o.t_min else o.t_min, 0.5, o.t_max], dtype=torch.float32
        ),
        o.what,
        kind,
    )
    assert torch.isfinite(w).all() and (w >= 0).all() and w.dtype == torch.float32
    if kind in ("min_snr", "soft_min_snr"):  # these everywhere, 0/0 being their limit
        w = loss_weight(torch.tensor([0.0, 1e-8, 1 - 1e-7, 1.0]), o.what, kind)
        assert torch.isfinite(w).all() and w.max() <= 5 + 1e-6
        assert w[0].item() == pytest.approx({"x0": 5.0}.get(o.what, 0.0), abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_weighted_when_asked(name):
    x0, eps = pair(16)
    t = table_time("linear", torch.arange(20, 980, 60)).float()
    plain, weighted = (
        make_objective(name, weight=w).loss(lambda x, t: x * 0, x0, eps=eps, t=t)
        for w in ("uniform", "min_snr")
    )
    weight = loss_weight(t, PRESETS[name].target, "min_snr")
    assert torch.allclose(weighted.per_sample, plain.per_sample * weight) and weight.std() > 0.05


# ---- learned variance ----------------------------------------------------------------------------


def guided_diffusions_bound(table, zero, x0, eps, k, eps_hat, frac):
    """The term of guided-diffusion's vb loss in bits, with its arrays written out; at row 0 the
    Gaussian likelihood of latents."""
    ab = alphas_bar(table, zero).numpy()
    prev = np.append(1.0, ab[:-1])
    betas = 1 - ab / prev
    variance = betas * (1 - prev) / (1 - ab)
    log_clipped = np.log(np.append(variance[1], variance[1:]))
    coef1, coef2 = betas * np.sqrt(prev) / (1 - ab), (1 - prev) * np.sqrt(ab / prev) / (1 - ab)
    x0, eps, eps_hat, frac = (v.double().numpy() for v in (x0, eps, eps_hat.detach(), frac))
    terms = []
    for i, row in enumerate(k.tolist()):
        xt = np.sqrt(ab[row]) * x0[i] + np.sqrt(1 - ab[row]) * eps[i]
        x0_hat = (xt - np.sqrt(1 - ab[row]) * eps_hat[i]) / np.sqrt(ab[row])
        true_mean, mean = (coef1[row] * z + coef2[row] * xt for z in (x0[i], x0_hat))
        log_var, true_log_var = (
            (frac[i] + 1) / 2 * np.log(betas[row]) + (1 - (frac[i] + 1) / 2) * log_clipped[row],
            log_clipped[row],
        )
        kl = 0.5 * (
            -1
            + log_var
            - true_log_var
            + np.exp(true_log_var - log_var)
            + (true_mean - mean) ** 2 * np.exp(-log_var)
        )
        nll = -scipy.stats.norm(mean, np.exp(log_var / 2)).logpdf(x0[i])
        terms.append((nll if row == 0 else kl).mean() / np.log(2))
    return torch.tensor(np.array(terms))


@pytest.mark.parametrize(
    "target, table, zero",
    [
        ("eps", "linear", False),
        ("eps", "cosine", False),
        ("v", "scaled_linear", False),
        ("v", "cosine", True),
        ("x0", "linear", True),
    ],
)
def test_the_hybrid_loss_is_guided_diffusions(target, table, zero):
    o = Objective("x", target, table, learn_sigma=True, zero_snr=zero)
    k = torch.tensor(
        [0, 0, 1, 2, 3, 50, 400, 800, 950, 998]
    )  # (999 has no eps to compare with when it is pure noise)
    x0, eps = pair(len(k))
    g = torch.Generator().manual_seed(7)
    off, frac = (
        torch.randn(x0.shape, generator=g) * 0.1,
        torch.rand(x0.shape, generator=g) * 2.4 - 1.2,
    )
    a, s = coordinates(o, k)
    off = off * (a / s).clamp(max=1)  # neither x0 nor eps is far off
    eps_hat = eps.double() + off
    said = answer(o, a, s, x0 - s / a * off, eps_hat).clone().requires_grad_()
    sigma = frac.clone().requires_grad_()
    out = o.loss(
        lambda x, t: torch.cat([said, sigma], 1), x0, eps=eps, t=table_time(table, k, zero).float()
    )
    simple = (
        (said - o.goal(x0, eps, table_time(table, k, zero).view(-1, 1, 1, 1)))
        .square()
        .flatten(1)
        .mean(1)
    )
    bound = guided_diffusions_bound(table, zero, x0, eps, k, eps_hat, frac)
    t = table_time(table, k, zero)
    alone = o.variational_bound(
        said.detach() - o.goal(x0.double(), eps.double(), t.view(-1, 1, 1, 1)), frac, t
    )
    assert torch.allclose(alone, bound, rtol=1e-4, atol=1e-14) and bound.abs().max() > 1
    assert torch.allclose(
        out.per_sample - simple, bound, rtol=1e-2, atol=2e-6
    )  # T rows x lambda 0.001 = 1
    gradient = torch.autograd.grad(out.loss, (said, sigma))
    assert torch.allclose(
        gradient[0], torch.autograd.grad(simple.mean(), said)[0], rtol=1e-5
    )  # the bound leaves the mean alone
    assert gradient[1].abs().flatten(1).amax(1).min() > 0


def test_the_bound_is_least_where_the_variance_is_the_steps_own():
    o, x0 = make_objective("ddpm", learn_sigma=True), torch.zeros(1, 1, 1, 1)
    t = table_time("linear", torch.tensor([3])).float()
    values = [
        o.variational_bound(torch.zeros_like(x0), torch.full_like(x0, f), t).item()
        for f in (-1.0, -0.9, 0.0, 1.0)
    ]
    assert values[0] == pytest.approx(0, abs=1e-12) and values == sorted(values) and values[1] > 0
    small, large, _ = posterior("linear", False, torch.device("cpu"))
    assert (small <= large).all() and small[0] == small[1]


def test_learned_variance_does_not_reach_predict():
    o, x = make_objective("ddpm", learn_sigma=True), torch.randn(2, 3, 4, 4)
    t = torch.tensor([0.3, 0.6])
    both = o.predict(lambda x, t: torch.cat([x * 2, x * 99], 1), x, t)
    assert all(
        torch.equal(p, q)
        for p, q in zip(both, make_objective("ddpm").predict(lambda x, t: x * 2, x, t))
    )


# ---- aligned -------------------------------------------------------------------------------------


def gaussian_net(o: Objective, mu, sd):
    """The best network of Gaussian data, in the objective's terms: E[x0 | x] and E[eps | x] are
    linear in x."""

    def net(x, k):
        a, s = coordinates(o, k)
        var = a**2 * sd**2 + s**2
        off = x.double() - a * mu
        return answer(o, a, s, mu + a * sd**2 * off / var, s * off / var).float()

    return net


@pytest.mark.parametrize(
    "target, table, zero",
    [
        ("eps", "linear", False),
        ("eps", "scaled_linear", False),
        ("v", "scaled_linear", False),
        ("v", "cosine", True),
        ("x0", "linear", False),
    ],
)
def test_a_perfect_pretrained_network_has_the_aligned_loss_of_a_perfect_flow(target, table, zero):
    pretrained = Objective("x", target, table, zero_snr=zero)
    aligned, flow, mu, sd = replace(pretrained, aligned=True), make_objective("fm"), 0.4, 0.6
    x0, eps = pair(64)
    x0 = mu + sd * x0
    rows = torch.linspace(1, 998, 64).round()
    t = table_time(table, rows, zero).float()
    ours = aligned.loss(gaussian_net(aligned, mu, sd), x0, eps=eps, t=t)
    theirs = flow.loss(gaussian_net(flow, mu, sd), x0, eps=eps, t=t)
    assert (
        torch.allclose(ours.per_sample, theirs.per_sample, rtol=1e-3, atol=1e-5) and ours.loss > 0.1
    )
    t, x = (
        aligned.time(torch.rand(64, generator=torch.Generator().manual_seed(0))),
        torch.randn(64, 2, 3, 3),
    )
    for now, then in zip(
        aligned.predict(gaussian_net(aligned, mu, sd), x, t),
        pretrained.predict(gaussian_net(aligned, mu, sd), x, t),
    ):
        assert torch.equal(now, then)
    assert aligned.t_max == pretrained.t_max and torch.equal(aligned.prior(x), pretrained.prior(x))


def test_a_perfect_eps_network_starts_at_the_optimum_aligned_and_above_it_native():
    """Unit Gaussian data: E[eps | x] = s x in a network's coordinates, and the least loss of u at t
    is 1 / ((1-t)² + t²), since u's covariance with x is 2t - 1."""
    q = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    draw = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(20_000, 64, 1, 1, generator=draw) for _ in range(2))
    table = {"table": "scaled_linear", "density": "logit_normal"}
    pretrained = make_objective("ddpm", **table)
    aligned, flow = replace(pretrained, aligned=True), make_objective("fm")
    started, least = {}, {}
    for objective in (aligned, flow):
        t = objective.time(q).double()
        least[objective.name] = float((1 / ((1 - t) ** 2 + t**2)).mean())
        net = gaussian_net(pretrained, 0.0, 1.0)
        started[objective.name] = float(objective.loss(net, x0, eps=eps, q=q).loss)
    assert started["ddpm"] == pytest.approx(least["ddpm"], rel=0.01)
    # Read as a flow, it sees x itself, and the row 1000 t.
    s = coordinates(pretrained, flow.row(flow.time(q)))[1].flatten()
    t = flow.time(q).double()
    native = (s**2 * ((1 - t) ** 2 + t**2) - 2 * s * (2 * t - 1) + 2).mean()
    assert started["fm"] == pytest.approx(float(native), rel=0.01)
    assert least["fm"] == pytest.approx(1.741, abs=0.001) and float(native) > 1.25 * least["fm"]


def test_aligned_times_are_the_flows_scaled_to_the_table():
    q = torch.linspace(0, 1, 1001, dtype=torch.float64)
    flow = make_objective("fm", shift=2.0).time(q)
    aligned = make_objective(
        "ddpm", table="scaled_linear", aligned=True, density="logit_normal", shift=2.0
    )
    assert (
        torch.allclose(aligned.time(q), flow * aligned.t_max)
        and aligned.time(q).max() <= aligned.t_max < 0.937
    )
    assert (aligned.row(aligned.time(q)[5:-5]) % 1 != 0).float().mean() > 0.9  # between rows too


def test_an_aligned_gradient_is_the_velocitys():
    """d loss / d out = 2 (u_hat - u) / (1 - t), by the chain rule: the wrapping is differentiable
    and has no detour."""
    o, (x0, eps) = make_objective("ddpm", aligned=True), pair(8)
    t, said = (
        torch.linspace(0.1, 0.9, 8),
        torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(3)).requires_grad_(),
    )
    loss = o.loss(lambda x, t: said, x0, eps=eps, t=t).loss
    w = t.view(-1, 1, 1, 1)
    error = (said - ((1 - w) * x0 + w * eps)) / (1 - w) - (eps - x0)
    assert torch.allclose(loss, error.square().mean(), rtol=1e-4)
    assert torch.allclose(
        torch.autograd.grad(loss, said)[0],
        2 * error / (1 - w) / error.numel(),
        rtol=1e-3,
        atol=1e-7,
    )


# ---- as a value ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "o",
    [
        *PRESETS.values(),
        make_objective(
            "v", zero_snr=True, learn_sigma=True, density="mode", t_scale=0.5, stratified=True
        ),
    ],
    ids=lambda o: o.name,
)
def test_an_objective_survives_json(o):
    assert Objective(**json.loads(json.dumps(asdict(o)))) == o


def test_older_checkpoints_objectives_load():
    old = {
        "name": "ddpm",
        "target": "eps",
        "table": "linear",
        "density": "gaussian",
        "t_loc": 0.0,
        "t_scale": 1.0,
        "shift": 1.0,
        "loss_type": "mse",
        "huber_c": 0.03,
        "weight": "min_snr",
        "gamma": 5.0,
    }
    o = Objective(**old)
    assert (
        o.predict(lambda x, t: x, torch.ones(1, 1, 2, 2), torch.tensor([0.5]))[0].isfinite().all()
        and not o.zero_snr
        and o.coupling == "none"
    )


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(target="eps", table="cosine", zero_snr=True), "says nothing of x0.  Use v or x0"),
        (dict(target="u", table="cosine"), "no velocity of its own"),
        (dict(target="u", table="linear"), "Use target v"),
        (dict(target="v", zero_snr=True), "ends in pure noise as it is"),
        (dict(target="v", table="gvp", zero_snr=True), "ends in pure noise as it is"),
        (dict(target="u", learn_sigma=True), "needs a table"),
        (dict(target="eps", table="linear", learn_sigma=True, aligned=True), "not aligned"),
        (dict(target="u", aligned=True), "is one already"),
        (dict(target="v", table="cosine", coupling="lowres"), "needs target u"),
        (dict(target="u", table="gvp", coupling="lowres"), "on the linear path"),
        (dict(target="eps", table="linear", coupling="lowres", noise_aug=0.99), "noise_aug 1"),
        (dict(target="u", noise_aug=1.5), "wanted 0 to 1"),
        (dict(target="u", density="mode", t_scale=2.0), "wanted -1 to 1.75"),
        (dict(target="u", density="gaussian", t_scale=0.0), "wanted more than 0"),
        (dict(target="u", density="gaussian", t_loc=-3.0), "wanted 0 to 1, a time"),
        (dict(target="u", density="gaussian", t_loc=1.1), "wanted 0 to 1, a time"),
        (dict(target="noise"), "is not one of 'u'"),
        (dict(target="u", weight="p2"), "is not one of"),
        (dict(target="u", coupling="sinkhorn"), "is not one of"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Objective("x", **fields)


@pytest.mark.parametrize("name", ["ddpm", "v", "x0"])
def test_enlarging_from_pure_noise_is_diffusion_beside_the_small_picture(name):
    """Of equal noise and times, bit for bit the preset's own loss with the same on its input."""
    x0, eps = pair(8)
    low = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5))
    plain = make_objective(name)
    cfm = make_objective("cfm", target=plain.target, table=plain.table, noise_aug=1.0)

    def net(x, t):
        assert x.shape[1] == 2 * x0.shape[1] and torch.equal(x[:, x0.shape[1] :], low)
        return x[:, : x0.shape[1]] * 0.3 + low + t.view(-1, 1, 1, 1) / 1000

    t = plain.time(torch.linspace(0.01, 0.99, len(x0), dtype=torch.float64))
    one = cfm.loss(net, x0, eps=eps, t=t, low=low)
    other = plain.loss(net, x0, eps=eps, t=t, concat=low)
    assert torch.equal(one.per_sample, other.per_sample) and one.loss > 0
    assert cfm.t_max == plain.t_max
    with pytest.raises(ValueError, match="needs low="):
        cfm.loss(net, x0, eps=eps, t=t)


def test_stratified_loss_draws_one_time_a_stratum():
    x0, _ = pair(50)
    t = (
        make_objective("fm", density="uniform", stratified=True)
        .loss(lambda x, t: x, x0, generator=torch.Generator().manual_seed(0))
        .t
    )
    assert torch.equal((t * 50).long().sort().values, torch.arange(50))


def test_times_of_a_runs_positions_do_not_know_the_split():
    """q and position come with the batch; the objective stratifies over the run's batches."""
    objective = make_objective("fm", stratified=True, shift=3.0)
    x0, eps = pair(16)
    q = torch.rand(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    position = torch.arange(32, 48)

    def times(part):
        how = {"q": q[part], "position": position[part], "strata": 16, "eps": eps[part]}
        return objective.loss(lambda x, t: x, x0[part], **how).t

    whole = times(slice(None))
    assert torch.equal(whole, objective.time(stratify(q, position, 16)))
    assert torch.equal(torch.cat([times(slice(0, 4)), times(slice(4, 16))]), whole)
    plain = make_objective("ddpm").loss(lambda x, t: x, x0, q=q, position=position, strata=16)
    assert torch.equal(plain.t, make_objective("ddpm").time(q))


# ---- train.py with each of the flags -------------------------------------------------------------

FAST = dict(
    model="nano",
    data="toyfaces:48",
    resolution=32,
    batch=8,
    images=16,
    preview_every=8,
    eval_every=8,
    save_every=0,
    log_every=8,
    holdout=0.2,
    classes=("glasses",),
)
ALONE = train.Ranks(0, 1, torch.device("cpu"))


def go(tmp_path, **fields):
    cfg = train.resolve(train.Config(**{**FAST, "out": str(tmp_path), **fields}))
    train.train(cfg, ALONE)
    return tmp_path / cfg.name


@pytest.mark.parametrize(
    "fields, says",
    [
        (
            dict(objective="ddpm", table="cosine", density="gaussian", loss="l1"),
            dict(target="eps", table="cosine", density="gaussian", loss_type="l1"),
        ),
        (
            dict(objective="v", zero_snr=True, stratified=True),
            dict(target="v", zero_snr=True, stratified=True),
        ),
        (dict(table="gvp", weight="cosmap"), dict(target="u", table="gvp", weight="cosmap")),
        (dict(objective="ddpm", learn_sigma=True, weight="debiased"), dict(learn_sigma=True)),
        (
            dict(objective="ddpm", table="scaled_linear", aligned=True, density="logit_normal"),
            dict(aligned=True, target="eps"),
        ),
        (
            dict(target="x0", density="mode", t_scale=1.0, weight="soft_min_snr", gamma=4.0),
            dict(target="x0", t_scale=1.0, gamma=4.0),
        ),
        (
            dict(target="eps", density="lognormal", t_loc=-0.4, t_scale=1.0),
            dict(target="eps", t_loc=-0.4),
        ),
        (dict(coupling="ot", shift="auto", weight="min_snr"), dict(coupling="ot", shift=4 / 32)),
        (
            dict(objective="cfm"),
            dict(coupling="lowres", upsample="psu", lowres=2, noise_aug=0.5883),
        ),
        (
            dict(objective="cfm", upsample="nearest", lowres=4, noise_aug=0.3, loss="huber"),
            dict(upsample="nearest", lowres=4, noise_aug=0.3),
        ),
        (
            dict(objective="cfm", target="eps", table="linear", noise_aug=1.0),
            dict(coupling="lowres", target="eps", table="linear"),
        ),
    ],
    ids=lambda v: "-".join(map(str, v.values())) if "objective" in v or len(v) else "",
)
def test_a_run_with_these_flags_leaves_a_checkpoint_that_samples(tmp_path, fields, says, capsys):
    run = go(tmp_path, **fields)
    reports = [
        row
        for row in map(json.loads, (run / "log.jsonl").read_text().splitlines())
        if row["event"] in ("train", "held-out")
    ]
    assert (
        len(reports) == 4
        and all(math.isfinite(row["loss"]) for row in reports)
        and (run / "samples" / "000000000008.png").exists()
    )
    net, meta = load_unet(checkpoints(run)[-1] / "ema-0.050.safetensors")
    objective = Objective(**meta["objective"])
    assert {k: getattr(objective, k) for k in says} == says
    C, side = meta["latent_shape"][0], meta["latent_shape"][1]
    assert net.cfg.in_channels == C * (
        1 + (objective.coupling == "lowres")
    ) and net.cfg.out_channels == C * (1 + objective.learn_sigma)
    noise, cond = torch.randn(2, C, side, side), {"y": torch.tensor([0, -1])}
    start = objective.prior(noise)
    if objective.coupling == "lowres":
        cond["concat"] = torch.randn(2, C, side, side)
        start = objective.prior(objective.source(cond["concat"], noise))
    out = sample(
        lambda x, t, **cond: objective.predict(net.eval(), x, t, **cond),
        start,
        method="heun",
        steps=3,
        t_start=objective.t_max,
        cond=cond,
    ).x
    assert out.shape == noise.shape and torch.isfinite(out).all() and not torch.equal(out, start)
    capsys.readouterr()
    go(tmp_path, **fields)  # the config, with its None and auto, is read back as it was
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, message",
    [
        ("--objective ddpm --zero-snr", "Use v or x0"),
        ("--objective fm --zero-snr", "ends in pure noise as it is"),
        ("--objective ddpm --target u", "no velocity of its own"),
        ("--objective cfm --table linear", "cfm has none"),
        ("--objective cfm --table gvp", "on the linear path"),
        ("--learn-sigma", "needs a table"),
        ("--aligned", "target u is one already"),
        ("--objective cfm --coupling ot", "--coupling changes nothing with --objective cfm"),
        ("--objective cfm --target v", "needs target u"),
        ("--objective cfm --target eps --table linear --noise-aug 0.9", "noise_aug 1 starts"),
        ("--noise-aug 0.3", "--noise-aug changes nothing here: it is of --objective cfm"),
        ("--upsample nearest", "it is of --objective cfm"),
        ("--lowres 4", "it is of --objective cfm"),
        ("--objective cfm --noise-aug 2", "wanted 0 to 1"),
        ("--objective cfm --lowres 3", "--lowres 3 does not divide the 32×32 pixels"),
        ("--objective cfm --lowres 1", "--lowres 1: wanted 2 to 64"),
        ("--objective cfm --lowres 8 --upsample bilinear", "does not divide the 4×4 latents"),
        ("--gamma 3", "--gamma changes nothing here: it is of --weight min_snr | soft_min_snr"),
        ("--t-loc 1 --density uniform", "density uniform has none"),
        ("--density mode --t-loc 1", "density mode has none"),
        ("--density mode --t-scale 2", "wanted -1 to 1.75"),
        ("--density logit_normal --t-scale 0", "wanted more than 0"),
        ("--shift much", "--shift takes float or auto, got 'much'"),
        ("--shift nan", "--shift nan: wanted"),
        ("--t-loc x", "--t-loc takes float, got 'x'"),
        ("--t-loc inf", "--t-loc inf: wanted -10 to 10"),
        ("--density mod", "Closest: mode"),
        ("--weight min-snr", "Closest: min_snr"),
        ("--coupling lowres", "is not one of none, ot"),
    ],
)
def test_flags_that_mean_nothing_are_one_line(tmp_path, user, args, message):
    base = [
        w for k, v in FAST.items() if k != "classes" for w in (f"--{k.replace('_', '-')}", str(v))
    ]
    code, _, err = user(train.main, *base, "--out", tmp_path / "runs", *args.split())
    errors = [line for line in err if line.startswith("error: ")]
    assert (
        code == 2 and len(errors) == 1 and message in errors[0] and not (tmp_path / "runs").exists()
    ), err


def test_what_cannot_be_enlarged_is_refused_before_anything_is_read():
    cfg = train.Config(data="nowhere", objective="cfm", resolution=32)
    assert train.resolve(replace(cfg, lowres=4)).lowres == 4
    for upsample in ("psu", "bilinear"):
        with pytest.raises(UserError, match="does not divide the 32×32 pixels .* multiple of 3"):
            train.resolve(replace(cfg, lowres=3, upsample=upsample))
    with pytest.raises(UserError, match="--fid-every: a cfm network enlarges"):
        train.resolve(replace(cfg, lowres=4, fid_every=8))


def test_a_flag_may_be_a_number_or_a_word(user):
    code, out, _ = user(
        train.main, "--shift", "auto", "--density", "lognormal", "--t-loc", "-0.4", "--dry-run"
    )
    cfg = json.loads(out)
    assert code == 0 and (cfg["shift"], cfg["t_loc"], cfg["t_scale"]) == ("auto", -0.4, None)
    assert json.loads(user(train.main, "--shift", "2", "--dry-run")[1])["shift"] == 2.0


def test_psu_needs_pixels(tmp_path, user):
    import data.encode as encode

    encode.encode(
        encode.Encode(str(tmp_path / "cache"), data="toyfaces:48", vae="pixel:8", resolution=32),
        ALONE,
    )
    args = [
        "--data",
        tmp_path / "cache",
        "--model",
        "nano",
        "--resolution",
        32,
        "--objective",
        "cfm",
        "--images",
        8,
        "--batch",
        8,
        "--out",
        tmp_path / "runs",
    ]
    code, _, err = user(train.main, *args)
    assert (
        code == 2
        and "--upsample psu enlarges pixels" in err[-1]
        and not (tmp_path / "runs").exists()
    )
    assert user(train.main, *args, "--upsample", "bilinear")[0] == 0


def test_aligned_fine_tuning_starts_from_what_the_checkpoint_is(tmp_path, user):
    base = go(tmp_path, objective="ddpm", table="scaled_linear")
    tuned = dict(
        init=str(base), objective="ddpm", table="scaled_linear", aligned=True, name="tuned"
    )
    net, meta = load_unet(checkpoints(base)[-1] / "ema-0.050.safetensors")
    before, tr = (
        Objective(**meta["objective"]),
        train.setup(train.resolve(train.Config(**{**FAST, "out": str(tmp_path), **tuned})), ALONE),
    )
    assert tr.objective == replace(before, aligned=True)
    noise = torch.randn(2, *tr.latent_shape, generator=torch.Generator().manual_seed(0))
    a, b = (
        sample(lambda x, t: o.predict(n.eval(), x, t), o.prior(noise), steps=3, t_start=o.t_max).x
        for n, o in ((net, before), (tr.net, tr.objective))
    )
    assert torch.equal(a, b)
    base_args = [
        w for k, v in FAST.items() if k != "classes" for w in (f"--{k.replace('_', '-')}", str(v))
    ]
    for other in (["--objective", "ddpm"], ["--objective", "v", "--table", "scaled_linear"]):
        code, _, err = user(
            train.main,
            *base_args,
            "--classes",
            "glasses",
            "--out",
            tmp_path,
            "--name",
            "wrong",
            "--init",
            base,
            "--aligned",
            *other,
        )
        assert (
            code == 2
            and "--aligned reads the network as it was trained" in err[-1]
            and not (tmp_path / "wrong").exists()
        )


def test_stratified_times_do_not_know_how_the_batch_was_split(tmp_path, monkeypatch):
    cfg = train.resolve(
        train.Config(
            **{
                **FAST,
                "out": str(tmp_path),
                "stratified": True,
                "density": "uniform",
                "classes": (),
            }
        )
    )
    tr = train.setup(cfg, ALONE)
    stream = data.Stream(tr.ds, None, tr.latent_shape, cfg.seed)

    def times(world, accum):
        parts = []
        for rank in range(world):
            groups = train.positions(
                replace(cfg, accum=accum), train.Ranks(rank, world, torch.device("cpu")), 0
            )
            parts.append(
                [
                    (batch["position"], tr.loss(tr.net, batch).t)
                    for batch in data.batches(stream, groups)
                ]
            )
        position, t = (torch.cat(v) for v in zip(*(pair for part in parts for pair in part)))
        return t[position.argsort()]

    whole = times(1, 1)
    assert torch.equal((whole.view(2, 8) * 8).long(), torch.arange(8).expand(2, 8))
    assert all(torch.equal(times(*split), whole) for split in ((1, 2), (2, 1), (2, 4)))
