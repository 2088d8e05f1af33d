"""Noise schedules and training times against closed forms, autograd, the reference schedulers and
their own densities."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from diffusion.schedules import (
    DENSITIES,
    T,
    TABLES,
    alphas_bar,
    flux2_shift,
    flux_shift,
    norm,
    resolution_shift,
    sample_t,
    shift_time,
    stratify,
    table_row,
    table_time,
    time_quantile,
)
from diffusion.solvers import time_grid

CURVES = [(table, zero) for table in TABLES for zero in (False, True)]


@pytest.mark.parametrize(
    "table, last", [("linear", 4.036e-5), ("scaled_linear", 4.660e-3), ("cosine", 2.43e-9)]
)
def test_tables_match_diffusers(table, last):
    diffusers = pytest.importorskip(
        "diffusers", reason="oracle: pip install -r requirements-dev.txt"
    )
    name = {"cosine": "squaredcos_cap_v2"}.get(table, table)
    limits = {"scaled_linear": dict(beta_start=0.00085, beta_end=0.012)}.get(table, {})
    theirs = diffusers.DDPMScheduler(beta_schedule=name, **limits).alphas_cumprod.double()
    assert torch.allclose(
        alphas_bar(table), theirs, rtol=2e-4, atol=1e-6
    )  # theirs is an fp32 product
    assert math.isclose(float(alphas_bar(table)[-1]), last, rel_tol=2e-3)


@pytest.mark.parametrize("table, zero", CURVES)
def test_table_time_and_row_are_inverse_between_rows_too(table, zero):
    k = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * (T - 1)
    k[:20] = torch.linspace(
        T - 2, T - 1, 20
    )  # the last cell, where a zero-SNR table has no finite end
    assert (
        table_row(table, table_time(table, k, zero), zero) - k
    ).abs().max() < 6e-3  # whole rows attract within 5e-3
    ab, rows = alphas_bar(table, zero), torch.arange(T)
    t = table_time(table, rows, zero)
    assert torch.allclose((t / norm(t)) ** 2, 1 - ab, rtol=1e-9) and torch.equal(
        table_row(table, t, zero), rows.double()
    )
    assert table_row(
        table, torch.tensor([0.0, 1e-9, 1 - 1e-12, 1.0], dtype=torch.float64), zero
    ).tolist() == [0, 0, T - 1, T - 1]
    fine = table_time(table, torch.linspace(0, T - 1, 30_001, dtype=torch.float64), zero)
    assert (fine.diff() > 0).all() and fine.diff().max() < 0.02  # rises, without a jump


@pytest.mark.parametrize("table", TABLES)
def test_zero_snr_is_diffusers_rescaling(table):
    ddim = pytest.importorskip(
        "diffusers.schedulers.scheduling_ddim", reason="oracle: pip install -r requirements-dev.txt"
    )
    plain, zero = alphas_bar(table), alphas_bar(table, zero_snr=True)
    betas = 1 - torch.cat([plain[:1], plain[1:] / plain[:-1]])
    theirs = (1 - ddim.rescale_zero_terminal_snr(betas)).cumprod(0)
    assert (zero - theirs).abs().max() < 1e-12
    assert (
        zero[-1] == 0 and math.isclose(zero[0], plain[0], rel_tol=1e-14) and (zero.diff() < 0).all()
    )
    assert table_time(table, torch.tensor([T - 1, 5000.0]), True).tolist() == [1, 1]


def test_gvp_is_the_cosine_path():
    k = torch.linspace(0, T, 101, dtype=torch.float64)
    t, angle = table_time("gvp", k), k / T * math.pi / 2
    assert torch.allclose((1 - t) / norm(t), angle.cos(), atol=1e-15) and torch.allclose(
        t / norm(t), angle.sin(), atol=1e-15
    )
    assert torch.allclose(table_row("gvp", t), k, atol=1e-9) and t[
        [0, 50, 100]
    ].tolist() == pytest.approx([0, 0.5, 1], abs=1e-15)


def test_shift_works_on_odds():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.allclose(shift_time(shift_time(t, 3.0), 1 / 3), t)
    assert torch.allclose(shift_time(shift_time(t, 2.0), 1.5), shift_time(t, 3.0))
    assert torch.equal(shift_time(t, 1.0), t) and shift_time(t, 3.0)[50] == 0.75


def mode_cdf(t, scale):
    """SD3's f_mode falls from 1 to 0 as its uniform u rises."""
    u = np.linspace(0, 1, 200_001)
    f = 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
    return 1 - np.interp(t, f[::-1], u[::-1])


@pytest.mark.parametrize(
    "density, loc, scale, shift, cdf",
    [
        ("uniform", None, None, 1.0, scipy.stats.uniform().cdf),
        ("uniform", None, None, 3.0, lambda t: t / (3 - 2 * t)),
        ("logit_normal", None, None, 1.0, lambda t: scipy.stats.norm.cdf(np.log(t / (1 - t)))),
        (
            "logit_normal",
            None,
            None,
            3.0,
            lambda t: scipy.stats.norm.cdf(np.log(t / (1 - t)) - math.log(3.0)),
        ),
        (
            "logit_normal",
            -0.5,
            0.7,
            1.0,
            lambda t: scipy.stats.norm.cdf((np.log(t / (1 - t)) + 0.5) / 0.7),
        ),
        ("gaussian", None, None, 1.0, scipy.stats.truncnorm(-2.5, 2.5, 0.5, 0.2).cdf),
        ("gaussian", 0.8, 0.4, 1.0, scipy.stats.truncnorm(-2, 0.5, 0.8, 0.4).cdf),
        ("mode", None, None, 1.0, lambda t: mode_cdf(t, 1.29)),
        ("mode", None, -0.8, 1.0, lambda t: mode_cdf(t, -0.8)),
        (
            "lognormal",
            None,
            None,
            1.0,
            lambda t: scipy.stats.lognorm(1.2, scale=math.exp(-1.2)).cdf(t / (1 - t)),
        ),  # of sigma
        (
            "lognormal",
            -0.4,
            1.0,
            1.0,
            lambda t: scipy.stats.lognorm(1.0, scale=math.exp(-0.4)).cdf(t / (1 - t)),
        ),
    ],
)
def test_times_follow_their_density(density, loc, scale, shift, cdf):
    t = sample_t(20_000, density, shift, torch.Generator().manual_seed(0), loc, scale)
    assert t.dtype == torch.float32 and t.min() >= 0 and t.max() <= 1
    assert scipy.stats.kstest(t.double().numpy(), cdf).pvalue > 0.01


@pytest.mark.parametrize("density", DENSITIES)
def test_quantiles_rise_from_end_to_end(density):
    t = time_quantile(torch.linspace(0, 1, 2001, dtype=torch.float64), density)
    assert (t.diff() >= 0).all() and t[[0, -1]].tolist() == pytest.approx([0, 1], abs=1e-6)


def test_a_shift_of_a_logit_normal_is_its_location():
    q = torch.linspace(1e-4, 1 - 1e-4, 1001, dtype=torch.float64)
    assert torch.allclose(
        shift_time(time_quantile(q, "logit_normal"), 3.0),
        time_quantile(q, "logit_normal", math.log(3.0)),
        rtol=1e-12,
    )


def test_the_shift_for_a_resolution_keeps_the_uncertainty_of_the_mean():
    assert (
        resolution_shift(32, 32) == 1
        and resolution_shift(64, 64) == 2
        and resolution_shift(16, 64) == 1
        and resolution_shift(8, 8) == 0.25
    )
    # of a constant image of m pixels seen at t, the mean is known to t / (1 - t) / sqrt(m): SD3's
    # argument, eq. 22
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    moved = shift_time(t, resolution_shift(128, 64))
    assert torch.allclose(moved / (1 - moved) / math.sqrt(128 * 64), t / (1 - t) / 32)


@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096, 5000])
def test_fluxs_shifts_are_those_of_its_pipelines(tokens):
    """diffusers keeps them as mu."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    assert math.log(flux_shift(tokens)) == pytest.approx(calculate_shift(tokens), rel=1e-12)
    for steps in (4, 28, 50, 200):
        wanted = compute_empirical_mu(tokens, steps)
        assert math.log(flux2_shift(tokens, steps)) == pytest.approx(wanted, rel=1e-12)


def test_a_shift_is_applied_once():
    """diffusers' grid for SD3 is shifted twice at its low end, and wastes its last step."""
    assert time_grid(4, 3.0).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])


def test_stratified_times_have_one_in_each_stratum_and_keep_the_marginal():
    q = torch.rand(64 * 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    position = torch.arange(1_000_000 * 64, 1_000_000 * 64 + len(q))
    even = stratify(q, position, 64)
    counts = (even.view(300, 64) * 64).long().sort(1).values
    assert torch.equal(counts, torch.arange(64).expand(300, 64))
    assert scipy.stats.kstest(even.numpy(), "uniform").pvalue > 0.01
    assert scipy.stats.kstest((even * 64 % 1).numpy(), "uniform").pvalue > 0.01
    assert even.view(300, 64).mean(1).std() < q.view(300, 64).mean(1).std() / 20  # what it is for
    parts = [
        stratify(q[i::4], position[i::4], 64) for i in range(4)
    ]  # a function of each position, however they are split
    assert torch.equal(torch.stack(parts, 1).flatten(), even)


@pytest.mark.parametrize(
    "call",
    [
        lambda: sample_t(3, "beta"),
        lambda: alphas_bar("sigmoid"),
        lambda: table_time("edm", torch.tensor(3)),
    ],
)
def test_unknown_names_say_what_is_known(call):
    with pytest.raises(ValueError, match="is not one of"):
        call()
