"""Every method on fields with closed forms in fp64, and against the reference schedulers fed with
our own grids."""

import inspect
import math
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from scipy import integrate

from fields import delta, exact, gaussian, mixture, noise, triple, rows_grid
from diffusion.schedules import T, alphas_bar, norm, table_row, table_time
from diffusion.guidance import guided
from objectives import make_objective
from samplers import draw, generators, invert, sample
from diffusion.dopri5 import DOPRI_A
from diffusion.editing import begin
from diffusion.solvers import METHODS, lcm, log_snr, norm64, table_rows, time_grid

FIXED = tuple(m for m in METHODS if m != "dopri5")
NOISY = {
    "ddim": {"eta": 0.7},
    "ddpm": {},
    "lcm": {},
    "euler_ancestral": {},
    "dpmpp_2m_sde": {},
    "sde": {},
}  # options that draw noise
ROWS = ("trailing", "leading", "linspace")


def walk(method, predict, x, grid, draws=None, **options):
    """The step method itself: its last state. `draws` gives the step noise."""
    draws = iter(draws if draws is not None else ())
    for x in METHODS[method](
        lambda x, t: predict(x, torch.full((len(x),), t, dtype=x.dtype)),
        x,
        grid,
        lambda x: next(draws),
        **options,
    ):
        pass
    return x


def moments(method, predict, grid, **options):
    """Exact mean and standard deviation of what comes out, when predict is affine: row 0 starts
    from 0, row 1 from 1, row 2 + i has step noise 1 at draw i, all else 0. Responses to unit noises
    add in squares."""
    n = len(grid) + 1
    impulses = torch.eye(n, dtype=torch.float64).view(n, n, 1, 1, 1)
    out = walk(method, predict, impulses[1], grid, impulses[2:], **options).flatten()
    return float(out[0]), float((out[1:] - out[0]).square().sum().sqrt())


# ---- A, B: exact ends ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_delta_data_is_exact_for_any_number_of_steps(method, steps):
    c = torch.tensor([[[[1.0, -2.0], [0.5, 3.0]]]], dtype=torch.float64)
    out = sample(
        delta(c),
        noise(5),
        method=method,
        seeds=range(5),
        **({} if method == "dopri5" else {"steps": steps}),
    )
    assert (out.x - c).abs().max() < (1e-12 if method != "dopri5" else 1e-9)


@pytest.mark.parametrize(
    "method, tolerance",
    [
        ("euler", 2e-2),
        ("ddim", 2e-2),
        ("heun", 1e-4),
        ("midpoint", 1e-4),
        ("ab2", 1e-4),
        ("lms4", 1e-4),
        ("rk4", 1e-8),
        ("dpmpp_2m", 1e-3),
        ("unipc", 1e-3),
        ("dopri5", 1e-7),
    ],
)
def test_gaussian_data_goes_to_the_analytic_map(method, tolerance):
    """On the way too: at t the state is (1 - t) mu + sqrt((1 - t)² sd² + t²) z."""
    z = noise()
    options = {"rtol": 1e-9, "atol": 1e-9} if method == "dopri5" else {"steps": 400}
    states = {}
    out = sample(
        gaussian(), z, method=method, callback=lambda p, x: states.update({p: x}), **options
    ).x
    assert (out - (0.7 + 0.3 * z)).abs().max() < tolerance
    if method != "dopri5":
        t = 0.25
        assert (
            states[1 - t] - ((1 - t) * 0.7 + math.hypot((1 - t) * 0.3, t) * z)
        ).abs().max() < tolerance


# ---- C: orders and errors ------------------------------------------------------------------------

GRIDS = {
    "uniform": lambda n: torch.linspace(1, 0.02, n + 1, dtype=torch.float64),
    "karras": lambda n: time_grid(n + 1, 1.0, 80 / 81, "karras")[:-1],
}  # sigma 80 … 0.002
# RMS errors at 20 and 320 uniform steps, from an independent computation with NumPy; order; the
# least steps it shows at
MEASURED = {
    "euler": (8.2e-2, 5.2e-3),
    "heun": (3.6e-3, 1.5e-5),
    "midpoint": (2.5e-3, 1.1e-5),
    "ab2": (4.8e-3, 2.1e-5),
    "rk4": (1.9e-5, 3.3e-10),
    "dpmpp_2m": (1.6e-2, 7.5e-5),
}
ORDERS = {
    "euler": 1,
    "ddim": 1,
    "heun": 2,
    "midpoint": 2,
    "ab2": 2,
    "dpmpp_2m": 2,
    "rk4": 4,
    "unipc": 3,
    "lms4": {"uniform": 2, "karras": 4},
}


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("method", ORDERS)
def test_order_and_error_on_a_mixture(method, kind):
    """lms4 starts with an Euler step, whose error shows on the uniform grid (order 2) and hides
    behind Karras's tiny first steps. UniPC-2 is of order 3, its corrector included. Both, and rk4
    on Karras's grid (3.79 from 40 to 80), reach their order later."""
    z, grid = noise(60), GRIDS[kind]
    truth = walk("rk4", mixture(), z, grid(1000))
    late = method in ("unipc", "lms4") or (method, kind) == ("rk4", "karras")
    counts = (80, 160, 320) if late else (40, 80, 160, 320)
    errors = {
        n: float((walk(method, mixture(), z, grid(n)) - truth).square().mean().sqrt())
        for n in {20, 40, *counts}
    }
    orders = [math.log2(errors[n] / errors[2 * n]) for n in counts[:-1]]
    p = ORDERS[method] if isinstance(ORDERS[method], int) else ORDERS[method][kind]
    assert all(p - 0.2 < o < p + 0.3 for o in orders), (errors, orders)
    if kind == "uniform" and method in MEASURED:
        first, last = MEASURED[method]
        at = {20: first, 40: first * (last / first) ** 0.25, 320: last}
        assert all(want / 2 < errors[n] < want * 2 for n, want in at.items()), errors


def test_the_step_to_zero_keeps_the_order_of_runge_kutta():
    z, truth = noise(60), None
    truth = sample(mixture(), z, method="dopri5", rtol=1e-12, atol=1e-12, max_nfe=10_000).x
    for method, p in (("heun", 2), ("midpoint", 2), ("rk4", 4)):
        errors = [
            float((walk(method, mixture(), z, time_grid(n)) - truth).square().mean().sqrt())
            for n in (40, 80)
        ]
        assert p - 0.2 < math.log2(errors[0] / errors[1]) < p + 0.3, (method, errors)


# ---- D, E: stochastic methods, by exact moments --------------------------------------------------


def unit_gaussian(x, t):
    """N(0, 1) data: eps = s x in VP's coordinates."""
    n = norm(t).view(-1, 1, 1, 1)
    w = t.view(-1, 1, 1, 1)
    eps = w / n * x / n
    x0 = (1 - w) / n * x / n
    return x0, eps, eps - x0


@pytest.mark.parametrize("variance, want", [("large", 0.9999), ("small", 0.991067)])
def test_final_variance_of_ddpm_for_unit_gaussian_data(variance, want):
    """Ho's table, 1000 rows: large ends at 1 - beta_1, small below it."""
    grid = rows_grid(make_objective("ddpm"), T)
    first = norm64(float(grid[0]))  # the VP state N(0, 1) on the linear path
    mean, sd = moments("ddpm", unit_gaussian, grid, variance=variance)
    one, silence = (
        torch.ones(1, 1, 1, 1, dtype=torch.float64),
        torch.zeros(T, 1, 1, 1, 1, dtype=torch.float64),
    )
    of_x = walk("ddpm", unit_gaussian, one, grid, silence, variance=variance)
    assert mean == 0 and sd**2 + float(of_x) ** 2 * (first**2 - 1) == pytest.approx(want, abs=5e-7)


def test_final_deviation_of_ddim_is_a_product_of_cosines():
    """N(0, 1) data, theta = acos sqrt(alpha bar): a step multiplies by cos(theta_t - theta_r)."""

    def both(rows):
        grid = torch.cat([table_time("linear", rows), torch.zeros(1, dtype=torch.float64)])
        theta = torch.acos(alphas_bar("linear").sqrt())[rows.long()]
        out = walk(
            "ddim",
            unit_gaussian,
            torch.full((1, 1, 1, 1), norm64(float(grid[0])), dtype=torch.float64),
            grid,
        )
        return float(out), float(torch.cos(torch.cat([theta, theta.new_zeros(1)]).diff()).prod())

    for steps, want in ((10, 0.82896), (20, 0.91105), (40, 0.95451), (80, 0.97695)):
        ours, product = both(torch.linspace(999, 0, steps + 1, dtype=torch.float64).round()[:-1])
        assert ours == pytest.approx(want, abs=6e-6) and ours == pytest.approx(product, abs=1e-12)
        for spacing in ROWS:
            assert math.isclose(*both(table_rows(steps, spacing)), rel_tol=1e-12)


def test_the_sde_converges_weakly_with_order_one():
    """N(0.7, 0.3²): the errors of an independent Euler–Maruyama were .0032 .0018 .0009 .0003 ±
    .0005; its last step was of another kind."""
    errors = []
    for steps, most in ((50, 0.0032), (100, 0.0018), (200, 0.0009), (400, 0.0004)):
        mean, sd = moments("sde", gaussian(), time_grid(steps))
        errors.append(abs(sd - 0.3))
        assert abs(mean - 0.7) < 1e-4 and errors[-1] < most
    assert all(0.8 < math.log2(a / b) < 1.3 for a, b in zip(errors, errors[1:])), errors


@pytest.mark.parametrize(
    "method, options",
    [
        # An LCM's jumps are its distillation's, not the posterior mean's.
        *((method, options) for method, options in NOISY.items() if method != "lcm"),
        ("ddim", {"eta": 1.0}),
        ("ddpm", {"variance": "large"}),
        ("sde", {"eta": 0.3}),
        ("euler_ancestral", {"eta": 0.5}),
        ("dpmpp_2m_sde", {"eta": 0.5}),
    ],
)
def test_stochastic_methods_end_in_the_data_distribution(method, options):
    """A wrong noise level in a step (VE's rule in a flow, say) leaves an error that steps do not
    cure."""
    coarse, fine = (moments(method, gaussian(), time_grid(n), **options) for n in (200, 800))
    assert (
        abs(fine[0] - 0.7) < 1e-3
        and abs(fine[1] - 0.3) < 3e-3
        and abs(fine[1] - 0.3) < 0.4 * abs(coarse[1] - 0.3)
    )


def test_2m_sde_is_closer_than_first_order_at_every_number_of_steps():
    for steps, first_order in ((10, 0.081), (20, 0.050), (40, 0.029), (80, 0.016)):
        assert abs(moments("dpmpp_2m_sde", gaussian(), time_grid(steps))[1] - 0.3) < first_order / 2


def test_ddim_with_eta_one_is_ddpm_with_the_small_variance():
    for steps in (5, 50):
        assert moments("ddim", gaussian(), time_grid(steps), eta=1.0) == pytest.approx(
            moments("ddpm", gaussian(), time_grid(steps)), abs=1e-12
        )


@pytest.mark.parametrize(
    "method, twin",
    [
        ("ddim", "euler"),
        ("euler_ancestral", "euler"),
        ("sde", "euler"),
        ("dpmpp_2m_sde", "dpmpp_2m"),
    ],
)
@pytest.mark.parametrize("kind", ["uniform", "karras"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_noise_a_stochastic_method_is_its_twin_bit_for_bit(method, twin, kind, dtype):
    z, grid = noise(dtype=dtype), time_grid(9, kind=kind)
    a, b = (
        sample(mixture(), z, method=m, grid=grid, seeds=range(64), **o).x
        for m, o in ((method, {"eta": 0.0}), (twin, {}))
    )
    assert a.dtype == dtype and torch.equal(a, b)


# ---- grids and calls -----------------------------------------------------------------------------


def test_grids_end_at_zero_and_shift_towards_noise():
    assert time_grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert time_grid(4, shift=3.0).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert time_grid(3, t_start=0.6).tolist() == pytest.approx([0.6, 0.4, 0.2, 0])
    assert table_row("linear", rows_grid(make_objective("ddpm"), 4)[:-1]).round().tolist() == [
        999,
        749,
        499,
        249,
    ]


@pytest.mark.parametrize("kind", ["uniform", "karras", "logsnr"])
@pytest.mark.parametrize("steps", [1, 2, 3, 40])
@pytest.mark.parametrize(
    "t_start, table", [(1.0, ""), (0.6, ""), (0.01, ""), (0.9936875, "linear"), (1e-4, "")]
)
def test_every_grid_falls_from_its_start_to_zero(kind, steps, t_start, table):
    grid = time_grid(steps, 1.0, t_start, kind, table)
    assert (
        grid.dtype == torch.float64
        and len(grid) == steps + 1
        and grid[0] == t_start
        and grid[-1] == 0
        and (grid.diff() < 0).all()
    )
    q = grid / t_start
    assert torch.allclose(
        time_grid(steps, 3.0, t_start, kind, table) / t_start, 3 * q / (1 + 2 * q), rtol=1e-12
    )  # shifted once


def test_karras_and_logsnr_are_their_formulas_in_sigma():
    for kind, even in (("karras", lambda s: s ** (1 / 7)), ("logsnr", torch.log)):
        for t_start, high in ((1.0, 80.0), (0.6, 1.5)):
            grid = time_grid(10, 1.0, t_start, kind)
            sigma = (grid / (1 - grid))[:-1]
            sigma[0] = high  # at t = 1 sigma is infinite; the points below count from 80
            assert (
                sigma[-1] == pytest.approx(0.002) and even(sigma).diff().diff().abs().max() < 1e-10
            )
    sd = time_grid(
        10, 1.0, make_objective("ddpm", table="scaled_linear").t_max, "karras", "scaled_linear"
    )
    assert float(sd[0] / (1 - sd[0])) == pytest.approx(14.6146, rel=1e-5) and float(
        sd[-2] / (1 - sd[-2])
    ) == pytest.approx(0.029167, rel=1e-4)


@pytest.mark.parametrize("spacing", ROWS)
@pytest.mark.parametrize("steps", [1, 7, 50, 999, 1000])
def test_rows_are_those_of_diffusers(spacing, steps):
    diffusers = pytest.importorskip(
        "diffusers", reason="oracle: pip install -r requirements-dev.txt"
    )
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    theirs = [0] if (spacing, steps) == ("linspace", 1) else scheduler.timesteps.tolist()
    assert table_rows(steps, spacing).tolist() == theirs
    assert (
        table_row("cosine", rows_grid(make_objective("v"), steps, spacing)[:-1]).round().tolist()
        == theirs
    )


def test_what_a_grid_cannot_be_is_said():
    for args, message in (
        ((0,), "at least 1"),
        ((5, 1.0, 1.0, "trailing"), "rows of a VP table"),
        ((5, 2.0, 0.9, "leading", "linear"), "unshifted"),
        ((1001, 1.0, 1.0, "trailing", "linear"), "1001 steps do not fit"),
        ((5, 1.0, 1.0, "karas"), "not one of uniform, karras"),
    ):
        with pytest.raises(ValueError, match=message):
            time_grid(*args)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 2, 6])
@pytest.mark.parametrize("kind", ["uniform", "karras"])
def test_times_stay_inside_and_nfe_is_the_number_of_calls(method, steps, kind):
    times, calls = [], []

    def watched(x, t):
        assert t.shape == (len(x),) and t.dtype == x.dtype == torch.float32
        times.append(t), calls.append(len(x))
        return mixture()(x, t)

    out = sample(
        watched,
        noise(3, torch.float32),
        method=method,
        grid=time_grid(steps, kind=kind),
        seeds=[1, 2, 3],
        **NOISY.get(method, {}),
    )
    assert (
        0 < float(torch.cat(times).min())
        and float(torch.cat(times).max()) <= 1
        and torch.isfinite(out.x).all()
        and out.x.dtype == torch.float32
    )
    assert out.nfe == len(calls) and int(out.nfe_each.sum()) == sum(calls)
    want = {
        "heun": 2 * steps - 1,
        "midpoint": 2 * steps,
        "rk4": 4 * steps - 1,
        "ab2": steps + (steps > 1),
        "dopri5": out.nfe,
    }
    assert out.nfe == want.get(method, steps)


@pytest.mark.parametrize("method", METHODS)
def test_a_network_in_bf16_and_odd_shapes_leave_state_and_time_in_fp32(method):
    def net(x, k):
        assert x.dtype == k.dtype == torch.float32
        return (0.5 * x).to(torch.bfloat16)

    objective = make_objective("fm")
    options = {} if method == "dopri5" else {"steps": 1}
    out = sample(
        lambda x, t: objective.predict(net, x, t),
        torch.randn(1, 3, 5, 7),
        method=method,
        seeds=[0],
        **options,
    )
    assert (
        out.x.dtype == torch.float32 and out.x.shape == (1, 3, 5, 7) and torch.isfinite(out.x).all()
    )


@pytest.mark.parametrize("method", [m for m in FIXED if m not in NOISY or m == "ddim"])
def test_without_noise_nothing_is_drawn(method):
    walk(method, mixture(), noise(), time_grid(4))  # no draws are given: next() would stop it


# ---- J: reference solvers on our grids -----------------------------------------------------------


def on_rows(net, table="linear"):
    """predict of an eps network (x_vp, k) -> eps or (eps, v), in the state's own precision, at
    whole rows."""

    def predict(x, t):
        w, k = t.view(-1, 1, 1, 1), table_row(table, t).round()
        eps, *v = net(x / norm(t).view(-1, 1, 1, 1), k)
        x0 = (x - w * eps) / (1 - w)
        return x0, eps, eps - x0, *v

    return predict


def vp_net(x, k):
    """The exact eps of N(0.7, 0.3²) data, made crooked by a sine, so that no step is exact."""
    ab = alphas_bar("linear")[k.long()].view(-1, 1, 1, 1).to(x)
    return (
        (1 - ab).sqrt() * (x - ab.sqrt() * 0.7) / (ab * 0.09 + 1 - ab) + 0.1 * torch.sin(3 * x),
    )


def relative(a, b):
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


@pytest.mark.parametrize("steps", [1, 50, 1000])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "spacing", ["trailing", "leading"]
)  # its linspace steps are not between the rows it names
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_ddim_is_diffusers(steps, eta, spacing, dtype, tolerance):
    diffusers = pytest.importorskip(
        "diffusers", reason="oracle: pip install -r requirements-dev.txt"
    )
    scheduler = diffusers.DDIMScheduler(
        timestep_spacing=spacing, clip_sample=False, set_alpha_to_one=True
    )
    scheduler.alphas_cumprod = alphas_bar("linear")  # theirs is a product in fp32
    scheduler.set_timesteps(steps)
    grid, x, draws = (
        rows_grid(make_objective("ddpm"), steps, spacing),
        noise(4, dtype),
        noise(4 * steps, dtype, 1).view(steps, 4, 1, 2, 2),
    )
    ours = walk("ddim", on_rows(vp_net), x * norm64(float(grid[0])), grid, draws, eta=eta)
    for i, k in enumerate(scheduler.timesteps):
        last = i == steps - 1  # at row 0 theirs would add noise to data
        noisy = {} if last or not eta else {"eta": eta, "variance_noise": draws[i]}
        x = scheduler.step(vp_net(x, k.expand(4))[0], k, x, **noisy).prev_sample
    assert relative(ours, x) < tolerance


@pytest.mark.parametrize("steps", [1, 50, 1000])
@pytest.mark.parametrize(
    "variance, theirs",
    [("small", "fixed_small"), ("large", "fixed_large"), ("learned", "learned_range")],
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_ddpm_is_diffusers(steps, variance, theirs, dtype, tolerance, monkeypatch):
    diffusers = pytest.importorskip(
        "diffusers", reason="oracle: pip install -r requirements-dev.txt"
    )
    import diffusers.schedulers.scheduling_ddpm as module

    scheduler = diffusers.DDPMScheduler(
        timestep_spacing="trailing", clip_sample=False, variance_type=theirs
    )
    scheduler.alphas_cumprod = alphas_bar("linear")
    scheduler.set_timesteps(steps)

    def net(x, k):
        return *vp_net(x, k), torch.cos(5 * x)  # a learned variance in [-1, 1]

    grid, x, draws = (
        rows_grid(make_objective("ddpm"), steps),
        noise(4, dtype),
        noise(4 * steps, dtype, 1).view(steps, 4, 1, 2, 2),
    )
    ours = walk("ddpm", on_rows(net), x * norm64(float(grid[0])), grid, draws, variance=variance)
    for i, k in enumerate(scheduler.timesteps):
        # with one step theirs steps from row 999 to "row -1" too, and would still add noise at k >
        # 0
        monkeypatch.setattr(
            module,
            "randn_tensor",
            lambda *a, i=i, **kw: draws[i] if i < steps - 1 else torch.zeros_like(draws[i]),
        )
        eps, v = net(x, k.expand(4))
        x = scheduler.step(
            torch.cat([eps, v], 1) if variance == "learned" else eps, k, x
        ).prev_sample
    assert relative(ours, x) < tolerance


def test_rising_ddim_is_diffusers_inverse():
    diffusers = pytest.importorskip(
        "diffusers", reason="oracle: pip install -r requirements-dev.txt"
    )
    scheduler = diffusers.DDIMInverseScheduler(
        timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    scheduler.alphas_cumprod, steps = alphas_bar("linear"), 50
    scheduler.initial_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    grid, x = rows_grid(make_objective("ddpm"), steps), noise(4)
    assert scheduler.timesteps.tolist() == table_row("linear", grid[:-1]).round().flip(0).tolist()
    ours = walk("ddim", on_rows(vp_net), x, grid.flip(0)) / norm64(float(grid[0]))
    for k in scheduler.timesteps:
        x = scheduler.step(vp_net(x, k.expand(4))[0], k, x).prev_sample
    assert relative(ours, x) < 1e-10


def field(x, t):
    """A crooked field in any coordinates: x0 depends on x and t in no simple way."""
    w = t.view(-1, 1, 1, 1)
    return triple(x, t, torch.sin(2 * x + 3 * w) + 0.3 * x)


@pytest.mark.parametrize("kind", ["uniform", "karras"])
def test_euler_is_diffusers_flow_match_euler(kind):
    """fp32 only: theirs casts the state."""
    diffusers = pytest.importorskip(
        "diffusers", reason="oracle: pip install -r requirements-dev.txt"
    )
    grid, x = time_grid(20, kind=kind), noise(4, torch.float32)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=grid[:-1].tolist())
    ours = walk("euler", field, x, grid)
    for i, k in enumerate(scheduler.timesteps):
        x = scheduler.step(field(x, torch.full((4,), float(grid[i])))[2], k, x).prev_sample
    assert relative(ours, x) < 1e-5


def sigmas_of(scheduler, flow, steps, kind):
    """(our grid, the scheduler set to it, theirs: our state / their state at a grid point). flow:
    sigma = t; else sigma = t / (1 - t) and the state is VP's."""
    grid = time_grid(steps, 1.0, 0.995, kind)
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps
    scheduler.sigmas = grid if flow else grid / (1 - grid)
    scheduler._step_index = 0
    return grid, (lambda t: 1.0) if flow else norm64


@pytest.mark.parametrize("flow", [True, False])
@pytest.mark.parametrize("kind", ["uniform", "karras"])
@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("sde", [False, True])
def test_dpmpp_2m_is_diffusers(flow, kind, steps, sde):
    """Its step() casts the state to fp32, so that is compared to 1e-5 and its update formulas in
    fp64 to 1e-10."""
    diffusers = pytest.importorskip(
        "diffusers", reason="oracle: pip install -r requirements-dev.txt"
    )
    method, draws = (
        "dpmpp_2m_sde" if sde else "dpmpp_2m",
        noise(4 * steps, seed=1).view(steps, 4, 1, 2, 2),
    )
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        scheduler = diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=flow,
            prediction_type="sample",
            final_sigmas_type="zero",
            algorithm_type="sde-dpmsolver++" if sde else "dpmsolver++",
        )
        grid, scale = sigmas_of(scheduler, flow, steps, kind)
        x, outs = noise(4, dtype), []
        ours = walk(method, field, x * scale(float(grid[0])), grid, draws.to(dtype))
        for i in range(steps):
            t = float(grid[i])
            x0 = field(x * scale(t), torch.full((4,), t, dtype=dtype))[0]
            z = draws[i].to(dtype) if sde else None
            if dtype == torch.float32:
                x = scheduler.step(x0, scheduler.timesteps[i], x, variance_noise=z).prev_sample
                continue
            outs.append(x0)
            first = i in (0, steps - 1)
            x = (
                scheduler.dpm_solver_first_order_update(x0, sample=x, noise=z)
                if first
                else scheduler.multistep_dpm_solver_second_order_update(
                    outs[-2:], sample=x, noise=z
                )
            )
            scheduler._step_index += 1
        assert relative(ours, x) < tolerance


@pytest.mark.parametrize("flow", [True, False])
@pytest.mark.parametrize("kind", ["uniform", "karras"])
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_unipc_is_diffusers(flow, kind, steps, dtype, tolerance):
    diffusers = pytest.importorskip(
        "diffusers", reason="oracle: pip install -r requirements-dev.txt"
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=flow,
        prediction_type="sample",
        solver_order=2,
        solver_type="bh2",
        final_sigmas_type="zero",
    )
    grid, scale = sigmas_of(scheduler, flow, steps, kind)
    x = noise(4, dtype)
    ours = walk("unipc", field, x * scale(float(grid[0])), grid)
    for i in range(steps):
        t = float(grid[i])
        x = scheduler.step(
            field(x * scale(t), torch.full((4,), t, dtype=dtype))[0], scheduler.timesteps[i], x
        ).prev_sample
    assert relative(ours, x) < tolerance


def k_heun(x, sigmas, denoise):
    """k-diffusion's sample_heun without churn."""
    for s, n in zip(sigmas, sigmas[1:]):
        d = (x - denoise(x, s)) / s
        if n == 0:
            x = x + d * (n - s)
        else:
            x2 = x + d * (n - s)
            x = x + (d + (x2 - denoise(x2, n)) / n) / 2 * (n - s)
    return x


def k_lms(x, sigmas, denoise, order=4):
    """k-diffusion's sample_lms, its quadrature with a tighter tolerance."""
    ds = []
    for i, s in enumerate(sigmas[:-1]):
        ds = [*ds, (x - denoise(x, s)) / s][-order:]
        n = len(ds)

        def basis(tau, j):
            return math.prod(
                (tau - sigmas[i - k]) / (sigmas[i - j] - sigmas[i - k]) for k in range(n) if k != j
            )

        x = x + sum(
            integrate.quad(basis, s, sigmas[i + 1], (j,), epsabs=1e-14, epsrel=1e-13)[0]
            * ds[-1 - j]
            for j in range(n)
        )
    return x


def k_dpmpp_2m(x, sigmas, denoise):
    """k-diffusion's sample_dpmpp_2m, in VE's coordinates."""
    old = None
    for i, (s, n) in enumerate(zip(sigmas, sigmas[1:])):
        d = denoise(x, s)
        if old is None or n == 0:
            x = n / s * x - (math.expm1(math.log(n) - math.log(s)) if n else -1) * d
        else:
            h, h_last = math.log(s) - math.log(n), math.log(sigmas[i - 1]) - math.log(s)
            r = h_last / h
            x = n / s * x - math.expm1(-h) * ((1 + 1 / (2 * r)) * d - 1 / (2 * r) * old)
        old = d
    return x


def k_dpmpp_2m_sde(x, sigmas, denoise, draws, eta):
    """k-diffusion's sample_dpmpp_2m_sde, midpoint, in VE's coordinates."""
    old, h_last = None, None
    for i, (s, n) in enumerate(zip(sigmas, sigmas[1:])):
        d = denoise(x, s)
        if n == 0:
            x = d
        else:
            h = math.log(s) - math.log(n)
            x = n / s * math.exp(-eta * h) * x - math.expm1(-h - eta * h) * d
            if old is not None:
                x = x - 0.5 * math.expm1(-h - eta * h) * (h / h_last) * (d - old)
            x = x + draws[i] * n * math.sqrt(-math.expm1(-2 * h * eta))
            h_last = h
        old = d
    return x


def k_euler_ancestral_rf(x, sigmas, denoise, draws, eta):
    """The ancestral step of rectified flows (as ComfyUI's fork of k-diffusion has it)."""
    for i, (s, n) in enumerate(zip(sigmas, sigmas[1:])):
        d = denoise(x, s)
        if n == 0:
            x = d
        else:
            down = n * (1 + (n / s - 1) * eta)
            a_n, a_down = 1 - n, 1 - down
            x = down / s * x + (1 - down / s) * d
            x = a_n / a_down * x + draws[i] * (n**2 - down**2 * a_n**2 / a_down**2) ** 0.5
    return x


@pytest.mark.parametrize("kind", ["uniform", "karras"])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_methods_are_k_diffusions(kind, steps):
    grid, z, draws = (
        time_grid(steps, 1.0, 0.995, kind),
        noise(4),
        noise(4 * steps, seed=1).view(steps, 4, 1, 2, 2),
    )
    flow, ve = grid.tolist(), (grid / (1 - grid)).tolist()

    def at(x, t):
        return field(x, torch.full((len(x),), t, dtype=x.dtype))[0]

    def ve_denoise(x, s):  # VE's point is ours divided by 1 - t
        return at(x / (1 + s), s / (1 + s))

    for name, theirs, options in (
        ("heun", k_heun(z, flow, at), {}),
        ("lms4", k_lms(z, flow, at), {}),
        ("euler_ancestral", k_euler_ancestral_rf(z, flow, at, draws, 0.6), {"eta": 0.6}),
        ("dpmpp_2m", k_dpmpp_2m(z * (1 + ve[0]), ve, ve_denoise), {}),
        ("dpmpp_2m_sde", k_dpmpp_2m_sde(z * (1 + ve[0]), ve, ve_denoise, draws, 0.6), {"eta": 0.6}),
    ):
        assert relative(walk(name, field, z, grid, draws, **options), theirs) < 1e-10, name


@pytest.mark.parametrize("method", ["euler", "midpoint"])
def test_fixed_steps_are_torchdiffeqs(method):
    torchdiffeq = pytest.importorskip(
        "torchdiffeq", reason="oracle: pip install -r requirements-dev.txt"
    )
    grid, z = time_grid(15, shift=2.0), noise(4)
    theirs = torchdiffeq.odeint(lambda t, x: field(x, t.expand(len(x)))[2], z, grid, method=method)[
        -1
    ]
    assert relative(walk(method, field, z, grid), theirs) < 1e-12


def test_rk4_is_the_classical_one_and_of_the_order_of_torchdiffeqs():
    """torchdiffeq's "rk4" is the 3/8 rule; the classical step is there too, under an internal
    name."""
    torchdiffeq = pytest.importorskip(
        "torchdiffeq", reason="oracle: pip install -r requirements-dev.txt"
    )
    from torchdiffeq._impl.rk_common import rk4_step_func

    z = noise(60)

    def f(t, x, perturb=None):
        return mixture()(x, t.expand(len(x)))[2]

    x, grid = z, GRIDS["uniform"](20)
    for t, r in zip(grid, grid[1:]):
        x = x + rk4_step_func(f, t, r - t, r, x)
    assert relative(walk("rk4", mixture(), z, grid), x) < 1e-12
    truth = walk("rk4", mixture(), z, GRIDS["uniform"](1000))
    ours, theirs = (
        [float((end - truth).square().mean()) for end in ends]
        for ends in zip(
            *(
                (walk("rk4", mixture(), z, g), torchdiffeq.odeint(f, z, g, method="rk4")[-1])
                for g in (GRIDS["uniform"](40), GRIDS["uniform"](80))
            )
        )
    )
    assert all(3.8 < math.log2(e[0] / e[1]) / 2 < 4.3 for e in (ours, theirs)), (ours, theirs)


# ---- I: dopri5 -----------------------------------------------------------------------------------


def accepted_by_torchdiffeq(predict, z, tolerance):
    """(start times of the steps it accepts from t = 1 on, its end at t = 1e-3)."""
    torchdiffeq = pytest.importorskip(
        "torchdiffeq", reason="oracle: pip install -r requirements-dev.txt"
    )
    times = []

    class Field(torch.nn.Module):
        def forward(self, t, x):
            return predict(x, t.to(x.dtype).expand(len(x)))[2]

        def callback_accept_step(self, t0, y0, dt):
            times.append(float(t0))

    ends = torchdiffeq.odeint(
        Field(),
        z,
        torch.tensor([1.0, 1e-3], dtype=torch.float64),
        rtol=tolerance,
        atol=tolerance,
        method="dopri5",
    )
    return times, ends[-1]


@pytest.mark.parametrize("batch, whole", [(1, False), (1, True), (9, True)])
@pytest.mark.parametrize("tolerance", [1e-5, 1e-7])
def test_dopri5_takes_torchdiffeqs_steps(batch, whole, tolerance):
    """Tableau, error weights, controller and first step: the accepted times agree up to the first
    attempt that would leave (0, 1], which ours clamps. At tolerances looser than these that is an
    early one, and theirs asks the field at t < 0."""
    z, predict, ours = noise(batch), mixture(), [1.0]
    theirs, end = accepted_by_torchdiffeq(predict, z, tolerance)
    out = sample(
        predict,
        z,
        method="dopri5",
        rtol=tolerance,
        atol=tolerance,
        whole_batch=whole,
        callback=lambda p, x: ours.append(1 - p),
    )
    accepted = sorted(set(ours), reverse=True)
    inside = [t for t in theirs if t > 0.05]
    assert len(inside) >= 3 and accepted[: len(inside)] == pytest.approx(inside, abs=1e-9)
    # from t = 1e-3, where theirs ends, one Euler step errs by 1e-6 of the curvature
    there = torch.full((batch,), 1e-3, dtype=torch.float64)
    assert (out.x - (end - 1e-3 * predict(end, there)[2])).abs().max() < max(1e-5, 20 * tolerance)
    assert len(set(out.nfe_each.tolist())) == 1 or not whole


def test_dopri5_error_falls_with_rtol_about_in_proportion():
    z, errors, tolerances = noise(), [], [10.0**-i for i in range(3, 12)]
    for tolerance in tolerances:
        out = sample(gaussian(), z, method="dopri5", rtol=tolerance, atol=tolerance)
        errors.append(float((out.x - (0.7 + 0.3 * z)).abs().max()))
    assert all(b < a for a, b in zip(errors, errors[1:])) and errors[-1] < 1e-9, errors
    assert (
        0.6 < math.log(errors[0] / errors[-1]) / math.log(tolerances[0] / tolerances[-1]) < 1.3
    ), errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dopri5_gives_each_sample_what_it_gets_alone(dtype):
    z = noise(256, dtype)
    how = {"method": "dopri5", "rtol": 1e-4, "atol": 1e-5}
    whole, order = (
        sample(exact, z, **how),
        torch.randperm(256, generator=torch.Generator().manual_seed(1)),
    )
    shuffled = sample(exact, z[order], **how)
    assert len(set(whole.nfe_each.tolist())) > 1 and whole.nfe == int(whole.nfe_each.max())
    assert torch.equal(shuffled.x, whole.x[order]) and torch.equal(
        shuffled.nfe_each, whole.nfe_each[order]
    )
    for part in (slice(17, 18), slice(100, 107)):
        alone = sample(exact, z[part], **how)
        assert torch.equal(alone.x, whole.x[part]) and torch.equal(
            alone.nfe_each, whole.nfe_each[part]
        )
    together = sample(exact, z, whole_batch=True, **how)
    assert int(whole.nfe_each.sum()) < int(together.nfe_each.sum())
    times = []
    sample(lambda x, t: times.append(t) or exact(x, t), z, **how)
    assert float(torch.cat(times).min()) > 0 and float(torch.cat(times).max()) <= 1


@pytest.mark.parametrize("rtol, atol, most", [(1e-3, 1e-6, 0.75), (1e-5, 1e-5, 0.8)])
def test_dopri5_by_sample_spends_less_than_by_batch(rtol, atol, most):
    """A mixture of two Gaussians in 16 dimensions, one narrow: whoever ends in the wide one is done
    early."""

    def predict(x, t):
        w = t.view(-1, 1, 1, 1)
        parts = []
        for mean, sd in ((-1.0, 0.05), (1.0, 0.4)):
            var = (1 - w) ** 2 * sd**2 + w**2
            rest = x - (1 - w) * mean
            parts.append(
                (
                    -(rest**2 / var + var.log()).sum((1, 2, 3), keepdim=True) / 2,
                    mean + (1 - w) * sd**2 * rest / var,
                )
            )
        r = torch.softmax(torch.stack([a for a, _ in parts]), 0)
        return triple(x, t, (r * torch.stack([b for _, b in parts])).sum(0))

    z = torch.randn(256, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    each, whole = (
        sample(predict, z, method="dopri5", rtol=rtol, atol=atol, whole_batch=w)
        for w in (False, True)
    )
    assert float(each.nfe_each.double().mean()) <= most * float(whole.nfe_each.double().mean())
    assert (each.x - whole.x).abs().median() < 5e-3


def test_dopri5_integrates_polynomials_of_degree_four_in_t_exactly():
    """In steps of any size: with so loose a tolerance each is ten times the last, until the clamp
    ends it."""
    for degree in range(5):
        c, z, starts = [1.0, -2.0, 3.0, 5.0, -7.0][: degree + 1], noise(3), []

        def predict(x, t):
            u = sum(a * t**i for i, a in enumerate(c)).view(-1, 1, 1, 1).expand_as(x)
            return x, x, u

        out = sample(
            predict, z, method="dopri5", rtol=1e9, atol=1e9, callback=lambda p, x: starts.append(p)
        )
        assert (
            out.x - (z - sum(a / (i + 1) for i, a in enumerate(c)))
        ).abs().max() < 1e-12 and len(starts) <= 6, (degree, starts)


def test_the_tableau_is_consistent():
    from diffusion.dopri5 import DOPRI_C, DOPRI_E

    assert all(sum(a) == pytest.approx(c, abs=1e-14) for a, c in zip(DOPRI_A, DOPRI_C))
    assert sum(DOPRI_E) == pytest.approx(0, abs=1e-15)
    for power in range(1, 5):  # quadrature of t^(power - 1) … by the fifth-order weights
        assert sum(b * c ** (power - 1) for b, c in zip(DOPRI_A[6], DOPRI_C)) == pytest.approx(
            1 / power, abs=1e-14
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("t", [1e-6, 3e-4])
def test_a_start_next_to_data_ends_next_to_it(method, t):
    z = noise(3, torch.float32)
    out = sample(exact, z, method=method, seeds=[0, 1, 2], grid=time_grid(3, t_start=t))
    assert (out.x - z).abs().max() < 20 * math.sqrt(t) ** (2 if method not in NOISY else 1)


def test_dopri5_gives_up_at_max_nfe_with_a_warning(capsys):
    def stiff(x, t):
        return x, x, 1e6 * torch.sin(1e5 * t.view(-1, 1, 1, 1)) * x

    out = sample(stiff, noise(3), method="dopri5", max_nfe=200)
    assert (
        out.nfe <= 200 and "unfinished" in capsys.readouterr().err and torch.isfinite(out.x).all()
    )


def test_dopri5_ends_a_row_without_a_number_and_lets_the_others_finish(capsys):
    """Every row is on its own, also in misfortune: the same numbers as without the bad one."""

    def predict(x, t):
        x0, eps, u = exact(x, t)
        bad = (x[:, :1, :1, :1] > 50) & (t.view(-1, 1, 1, 1) < 0.99)
        return x0, eps, torch.where(bad, torch.nan, torch.where(x > 50, 0 * u, u))

    z = noise(4)
    bad = torch.cat([z[:2], torch.full_like(z[:1], 100.0), z[2:]])
    alone, out = (
        sample(predict, x, method="dopri5", rtol=1e-11, atol=1e-11) for x in (z, bad)
    )  # the bad one ends first
    assert int(out.nfe_each[2]) < int(out.nfe_each[[0, 1, 3, 4]].min())
    assert "1 of 5 samples unfinished" in capsys.readouterr().err
    assert torch.equal(out.x[[0, 1, 3, 4]], alone.x) and torch.isfinite(out.x).all()


# ---- O: seeds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_depends_on_its_seed_only(method):
    def run(seeds):
        x = draw(generators(seeds), torch.empty(1, 1, 3, 5))
        return sample(
            exact,
            x,
            method=method,
            seeds=seeds,
            **({} if method == "dopri5" else {"steps": 5}),
            **NOISY.get(method, {}),
        ).x

    seeds = list(range(10, 26))
    together = run(seeds)
    for size in (1, 4):
        assert torch.equal(
            together, torch.cat([run(seeds[i : i + size]) for i in range(0, 16, size)])
        )
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("method", NOISY)
def test_step_noise_is_not_the_initial_noise_again(method):
    x, seen = draw(generators([3]), torch.empty(1, 1, 8, 8)), []

    def predict(x, t):
        return (
            torch.zeros_like(x),
            torch.zeros_like(x),
            torch.zeros_like(x),
        )  # what is left of x is step noise

    sample(
        predict,
        x,
        method=method,
        steps=3,
        seeds=[3],
        callback=lambda p, x: seen.append(x),
        **NOISY[method],
    )
    assert (seen[0] / x).std() > 0.1 and (seen[1] / seen[0]).std() > 0.1


@pytest.mark.parametrize("method", FIXED)
def test_the_benchmark_gives_no_method_more_calls_than_its_column_says(method):
    from benchmarks.solvers import CALLS, PER_STEP, steps_for

    for calls in CALLS:
        nfe = sample(
            gaussian(), noise(1), method=method, seeds=[0], steps=steps_for(method, calls)
        ).nfe
        assert calls - PER_STEP.get(method, 1) < nfe <= calls


def test_every_method_is_one_small_function():
    for name in FIXED:
        assert len(inspect.getsource(METHODS[name]).splitlines()) <= 40, name
    assert (
        log_snr(1.0) == -math.inf
        and log_snr(0.0) == math.inf
        and log_snr(0.25) == pytest.approx(math.log(3))
        and np.isfinite(log_snr(1e-300))
    )
    assert float(table_time("linear", torch.tensor(0))) > 0


@pytest.mark.parametrize("seed", [2**32, 2**32 + 7, 2**40, 2**63 - 1])
def test_large_seeds_are_seeds_of_their_own(seed):
    like = torch.empty(1, 4, 8, 8)
    own, low = draw(generators([seed, seed % 2**32]), like)
    assert torch.equal(own, draw(generators([seed]), like)[0])
    assert own.dtype == torch.float32 and not torch.equal(own, low)
    many = draw(generators(list(range(seed - 200, seed + 1))), torch.empty(1, 64))
    assert len({tuple(row.tolist()) for row in many}) == 201


def test_noise_of_large_seeds_is_unit_noise_and_of_small_ones_torchs():
    x = draw(generators(list(range(2**32, 2**32 + 400))), torch.empty(1, 3, 16, 16))
    assert abs(float(x.mean())) < 0.01 and abs(float(x.std()) - 1) < 0.01
    gens = generators([2**32 - 1])
    want = torch.Generator().manual_seed(2**32 - 1)
    for _ in range(2):  # the second draw is the first step's
        assert torch.equal(draw(gens, x)[0], torch.randn(3, 16, 16, generator=want))


def test_rescaling_an_x0_without_spread_leaves_it_as_it_is():
    """An x0 network that says 0 has nothing to draw back."""
    objective, x = make_objective("x0"), draw(generators([0, 1]), torch.empty(1, 4, 8, 8))

    def constant(value):
        return lambda x, k, y=None, **cond: torch.full_like(x, value)

    for value in (0.0, 0.5):
        plain, drawn_back = (
            guided(objective, constant(value), 3.0, rescale=share) for share in (0.0, 0.7)
        )
        cond = {"y": torch.tensor([0, 1])}
        how = {"steps": 4, "t_start": objective.t_max, "cond": cond}
        outs = [sample(p, objective.prior(x), **how).x for p in (plain, drawn_back)]
        assert outs[1].isfinite().all() and torch.allclose(*outs, atol=1e-6)


# ---- networks that break -------------------------------------------------------------------------


def breaks(row, below):
    """Exact, but no number for one row, from a time on."""

    def predict(x, t, row_of):
        x0, eps, u, *_ = exact(x, t)
        bad = ((row_of == row) & (t < below)).view(-1, 1, 1, 1)
        return tuple(torch.where(bad, torch.nan, part) for part in (x0, eps, u))

    return predict


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_says_when_it_ceased_to_be_finite(method):
    x, how = noise(3), {} if method == "dopri5" else {"steps": 8}
    cond = {"row_of": torch.arange(3)}
    for below, low, high in ((0.55, 0.25, 0.65), (2.0, 1.0, 1.0)):
        s = sample(breaks(1, below), x, method=method, cond=cond, seeds=[0, 1, 2], **how)
        assert s.lost.isnan().tolist() == [True, False, True]
        assert low <= float(s.lost[1]) <= high and s.x[[0, 2]].isfinite().all()
    whole = sample(breaks(-1, 1.0), x, method=method, cond=cond, seeds=[0, 1, 2], **how)
    assert whole.lost.isnan().all()


@pytest.mark.parametrize("whole_batch", [False, True])
def test_dopri5_stops_at_the_first_prediction_that_is_no_number(whole_batch, capsys):
    x, options = noise(2), {"method": "dopri5", "whole_batch": whole_batch}
    cond = {"row_of": torch.arange(2)}
    for below, most in ((2.0, 1), (0.999, 8)):
        s = sample(breaks(0, below), x[:1], cond={"row_of": torch.zeros(1)}, **options)
        assert s.nfe <= most, below
        assert "the prediction is not finite, first at t = " in capsys.readouterr().err
    s = sample(breaks(0, 2.0), x, cond=cond, **options)
    assert s.nfe_each[0] == 1 and s.x[1].isfinite().all() and s.lost[1].isnan()


def test_an_inversion_says_when_it_broke():
    s = invert(breaks(1, 0.5), noise(3), time_grid(8), cond={"row_of": torch.arange(3)})
    assert s.lost.isnan().tolist() == [True, False, True] and 0 <= float(s.lost[1]) < 0.5


# ---- latent consistency models -------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, rows",
    [
        (1, [999]),
        (2, [999, 499]),
        (4, [999, 759, 499, 259]),
        (8, [999, 879, 759, 639, 499, 379, 259, 139]),
    ],
)
def test_lcm_is_diffusers(steps, rows):
    """The same rows, and from the same noise the same samples, of an eps network that is wrong."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    scheduler = diffusers.LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == rows == table_rows(steps, "lcm").tolist()
    objective = make_objective("ddpm", table="scaled_linear")
    z = noise(3).float()
    draws = [noise(3, seed=1 + i).float() for i in range(steps)]

    def net(x, k):
        return (0.6 * x + 0.1 * torch.sin(3 * x)) * (1 + k.view(-1, 1, 1, 1) / 2000)

    grid = time_grid(steps, 1.0, objective.t_max, "lcm", "scaled_linear")
    x = begin(objective, z, float(grid[0]))
    left = iter(draws)
    ours = [*lcm(partial(predict_at, objective, net), x, grid, lambda like: next(left))][-1]
    theirs, given = z.clone(), iter(draws)
    for k in scheduler.timesteps:
        out = net(theirs, k.float().expand(3))
        with mock.patch(
            "diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: next(given)
        ):
            theirs = scheduler.step(out, k, theirs).prev_sample
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def predict_at(objective, net, x, t):
    """The triple at one time for all."""
    return objective.predict(net, x, torch.full((len(x),), t))


def test_lcm_adds_noise_but_at_the_end():
    """From exact data predictions it draws data plus nothing; with one step no noise is asked."""
    asked = []

    def draw(like):
        asked.append(len(like))
        return torch.zeros_like(like)

    predict = lambda x, t: (torch.full_like(x, 0.25), x, x)  # noqa: E731
    steps = [*lcm(predict, noise(2), time_grid(3), draw)]
    assert [float(x[0, 0, 0, 0]) for x in steps] == pytest.approx([0.25 / 3, 0.5 / 3, 0.25])
    assert asked == [2, 2]
    asked.clear()
    assert len([*lcm(predict, noise(2), time_grid(1), draw)]) == 1 and not asked


def test_more_steps_than_an_lcm_knows_are_refused():
    with pytest.raises(ValueError, match="51 steps are more than the 50"):
        time_grid(51, 1.0, 0.93, "lcm", "scaled_linear")
