"""Objectives against closed forms, autograd, and the reference schedulers."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from objectives import (PRESETS, T, Objective, alphas_bar, make_objective, min_snr, norm, sample_t, shift_time, table_row,
                        table_time, time_quantile)

TABLES = ("linear", "cosine", "scaled_linear")
NAMES = tuple(PRESETS)


def oracle(objective: Objective, x0: torch.Tensor, eps: torch.Tensor):
    """A network that knows x0 and eps and answers in the objective's terms, checking what it is fed."""
    def net(x, t):
        k = t.double()
        if objective.table:
            ab = alphas_bar(objective.table)
            a, s = np.interp(k, range(T), ab.sqrt()), np.interp(k, range(T), (1 - ab).sqrt())
            a, s = torch.tensor(a).view(-1, 1, 1, 1), torch.tensor(s).view(-1, 1, 1, 1)
        else:
            a, s = (1 - k / T).view(-1, 1, 1, 1), (k / T).view(-1, 1, 1, 1)
        assert torch.allclose(x.double(), a * x0 + s * eps, atol=2e-5), "the network is not fed a x0 + s eps"
        return {"u": eps - x0, "eps": eps, "x0": x0, "v": a * eps - s * x0}[objective.target]
    return net


def pair(n=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 3, 3, generator=g), torch.randn(n, 2, 3, 3, generator=g)


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_zero_for_an_oracle_and_feeds_the_schedules_own_coordinates(name):
    objective, (x0, eps) = make_objective(name), pair()
    out = objective.loss(oracle(objective, x0, eps), x0, eps=eps, generator=torch.Generator().manual_seed(1))
    assert out.loss < 1e-8 and out.per_sample.shape == out.t.shape == (64,)
    worse = objective.loss(lambda x, t: torch.zeros_like(x), x0, eps=eps)
    assert worse.loss > 0.1 and torch.isclose(worse.loss, worse.per_sample.mean())


@pytest.mark.parametrize("name, table", [("fm", "linear")] + [(n, t) for n in ("ddpm", "v", "x0") for t in TABLES])
def test_predict_recovers_x0_eps_and_u(name, table):
    objective = make_objective(name, **({} if name == "fm" else {"table": table}))
    x0, eps = (v.double() for v in pair(50))
    k = torch.randint(1, 950, (50,), generator=torch.Generator().manual_seed(2))
    t = table_time(table, k)
    w = t.view(-1, 1, 1, 1)
    got = objective.predict(oracle(objective, x0, eps), (1 - w) * x0 + w * eps, t)
    for value, want in zip(got, (x0, eps, eps - x0)):
        assert (value - want).abs().max() < 1e-5


def test_u_and_v_are_regular_at_both_ends():
    x = torch.randn(2, 1, 2, 2)
    for name in ("fm", "v"):
        for value in make_objective(name).predict(lambda x, t: torch.ones_like(x), x, torch.tensor([0.0, 1.0])):
            assert torch.isfinite(value).all() and value.abs().max() < 10
    x0, eps, u = make_objective("fm").predict(lambda x, t: torch.full_like(x, 2.0), x, torch.tensor([0.0, 1.0]))
    assert torch.equal(u, torch.full_like(x, 2.0)) and torch.equal(x0[0], x[0]) and torch.equal(eps[1], x[1])


@pytest.mark.parametrize("table, last", [("linear", 4.036e-5), ("scaled_linear", 4.660e-3), ("cosine", 2.43e-9)])
def test_tables_match_diffusers(table, last):
    diffusers = pytest.importorskip("diffusers", reason="oracle: pip install -r requirements-dev.txt")
    name = {"cosine": "squaredcos_cap_v2"}.get(table, table)
    limits = {"scaled_linear": dict(beta_start=0.00085, beta_end=0.012)}.get(table, {})
    theirs = diffusers.DDPMScheduler(beta_schedule=name, **limits).alphas_cumprod.double()
    assert torch.allclose(alphas_bar(table), theirs, rtol=2e-4, atol=1e-6)      # theirs is an fp32 product
    assert math.isclose(float(alphas_bar(table)[-1]), last, rel_tol=2e-3)


def test_ddpm_noising_matches_diffusers_at_every_row():
    diffusers = pytest.importorskip("diffusers", reason="oracle: pip install -r requirements-dev.txt")
    scheduler, objective, (x0, eps) = diffusers.DDPMScheduler(), make_objective("ddpm"), pair(T)
    fed = {}
    def net(x, t):
        fed.update(x=x, k=t)
        return x
    objective.loss(net, x0, eps=eps, t=table_time("linear", torch.arange(T)).float())
    assert torch.equal(fed["k"], torch.arange(T).float())                       # whole rows, exactly
    assert torch.allclose(fed["x"], scheduler.add_noise(x0, eps, torch.arange(T)), atol=2e-6)


def test_table_time_and_row_are_inverse_between_rows_too():
    for table in TABLES:
        k = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * (T - 1)
        assert (table_row(table, table_time(table, k)) - k).abs().max() < 6e-3  # whole rows attract within 5e-3
        ab, rows = alphas_bar(table), torch.arange(T)
        t = table_time(table, rows)
        assert torch.allclose((t / norm(t)) ** 2, 1 - ab, rtol=1e-9)
        assert table_row(table, torch.tensor([1e-9, 1 - 1e-12], dtype=torch.float64)).tolist() == [0, T - 1]


def test_starts_where_the_table_ends():
    assert make_objective("fm").t_max == 1.0
    assert math.isclose(make_objective("ddpm").t_max, 0.9937, abs_tol=5e-5)
    assert math.isclose(make_objective("ddpm", table="scaled_linear").t_max, 0.9360, abs_tol=5e-5)
    z = torch.randn(4, 1, 64, 64)
    start = make_objective("ddpm", table="scaled_linear").prior(z)
    assert math.isclose(float((start / z).mean()), math.hypot(0.9360, 0.0640), abs_tol=1e-4)


def test_shift_works_on_odds():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.allclose(shift_time(shift_time(t, 3.0), 1 / 3), t)
    assert torch.allclose(shift_time(shift_time(t, 2.0), 1.5), shift_time(t, 3.0))
    assert torch.equal(shift_time(t, 1.0), t) and shift_time(t, 3.0)[50] == 0.75


@pytest.mark.parametrize("density, shift, cdf", [
    ("uniform", 1.0, scipy.stats.uniform().cdf),
    ("logit_normal", 1.0, lambda t: scipy.stats.norm.cdf(np.log(t / (1 - t)))),
    ("logit_normal", 3.0, lambda t: scipy.stats.norm.cdf(np.log(t / (1 - t)) - math.log(3.0))),
    ("gaussian", 1.0, scipy.stats.truncnorm(-2.5, 2.5, 0.5, 0.2).cdf),
])
def test_times_follow_their_density(density, shift, cdf):
    t = sample_t(20_000, density, shift, torch.Generator().manual_seed(0))
    assert t.dtype == torch.float32
    assert scipy.stats.kstest(t.double().numpy(), cdf).pvalue > 0.01


def test_ddpm_draws_every_row_alike_and_gaussian_centres_on_500():
    k = table_row("linear", make_objective("ddpm").time((torch.arange(10_000) + 0.5) / 10_000))
    assert torch.equal(k.long().bincount(), torch.full((T,), 10))
    k = table_row("linear", make_objective("ddpm", density="gaussian").time((torch.arange(10_000) + 0.5) / 10_000))
    assert abs(float(k.mean()) - 499.5) < 1 and 180 < float(k.std()) < 200
    assert time_quantile(torch.tensor([0.0, 1.0]), "gaussian").tolist() == pytest.approx([0, 1], abs=1e-6)


def test_min_snr_weighs_the_same_x0_error_alike_for_every_target():
    t = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.97], dtype=torch.float64)
    d = torch.randn(5, 1, 2, 2, dtype=torch.float64)                            # an error of x0
    a, s = ((1 - t) / norm(t)).view(-1, 1, 1, 1), (t / norm(t)).view(-1, 1, 1, 1)
    errors = {"x0": d, "eps": -a / s * d, "v": -d / s, "u": -d / t.view(-1, 1, 1, 1)}
    losses = [(min_snr(t, k) * e.square().flatten(1).mean(1)) for k, e in errors.items()]
    for other in losses[1:]:
        assert torch.allclose(losses[0], other, rtol=1e-10)
    snr = ((1 - t) / t) ** 2
    assert torch.allclose(min_snr(t, "x0"), snr.clamp(max=5.0))


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_weighted_when_asked(name):
    x0, eps = pair(16)
    t = table_time("linear", torch.arange(20, 980, 60)).float()
    plain, weighted = (make_objective(name, weight=w).loss(lambda x, t: x * 0, x0, eps=eps, t=t) for w in ("uniform", "min_snr"))
    weight = min_snr(t, PRESETS[name].target)
    assert torch.allclose(weighted.per_sample, plain.per_sample * weight) and weight.std() > 0.05


@pytest.mark.parametrize("target", ["eps", "v", "u", "x0"])
def test_min_snr_is_finite_at_both_ends(target):
    w = min_snr(torch.tensor([0.0, 1e-8, 1 - 1e-7, 1.0]), target)
    assert torch.isfinite(w).all() and (w >= 0).all()


def test_losses_per_element():
    x0, eps = pair(8)
    net, t = (lambda x, t: torch.zeros_like(x)), torch.full((8,), 0.5)
    d = (eps - x0).double()
    values = {k: make_objective("fm", loss_type=k).loss(net, x0, eps=eps, t=t).loss for k in ("mse", "l1", "huber")}
    assert values["mse"].item() == pytest.approx(d.square().mean().item(), rel=1e-5)
    assert values["l1"].item() == pytest.approx(d.abs().mean().item(), rel=1e-5)
    c = 0.03
    assert values["huber"].item() == pytest.approx((2 * c * ((d ** 2 + c ** 2).sqrt() - c)).mean().item(), rel=1e-5)


def test_fm_minimum_for_gaussian_data_is_the_conditional_variance():
    g, sd, mu, t = torch.Generator().manual_seed(0), 0.5, 0.7, 0.4
    x0, eps = mu + sd * torch.randn(20_000, 1, 2, 2, generator=g), torch.randn(20_000, 1, 2, 2, generator=g)
    var = (1 - t) ** 2 * sd ** 2 + t ** 2
    def best(x, _):
        return (x - (1 - t) * mu) * (t - (1 - t) * sd ** 2) / var - mu          # E[eps - x0 | x]
    loss = make_objective("fm").loss(best, x0, eps=eps, t=torch.full((20_000,), t)).loss
    assert loss.item() == pytest.approx(sd ** 2 / var, rel=0.02)                # 1 + sd² - cov² / var


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
    out = make_objective("fm").loss(net, torch.randn(1, 1, 2, 2).bfloat16(), eps=torch.randn(1, 1, 2, 2).bfloat16(), t=t)
    assert fed["t"].dtype == torch.float32 and fed["t"].item() == pytest.approx(988.49, abs=1e-3)
    assert out.loss.dtype == torch.float32


def test_conditions_reach_the_network():
    y = torch.tensor([3, 1])
    def net(x, t, y):
        assert y.tolist() == [3, 1]
        return x
    make_objective("fm").loss(net, torch.randn(2, 1, 2, 2), y=y)
    make_objective("fm").predict(net, torch.randn(2, 1, 2, 2), torch.tensor([0.5, 0.5]), y=y)


@pytest.mark.parametrize("call", [lambda: make_objective("edm"), lambda: make_objective("fm", density="normal"),
                                  lambda: make_objective("ddpm", table="sigmoid"), lambda: sample_t(3, "beta")])
def test_unknown_names_say_what_is_known(call):
    with pytest.raises(ValueError, match="is not one of"):
        call()
