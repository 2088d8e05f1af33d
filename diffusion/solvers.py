"""Grids, and the methods that walk along them:

    for x in heun(predict, x, time_grid(25), noise): ...

Every method knows one thing only, the linear path: x runs from noise at t = 1 to data at t = 0
along dx/dt = u, and predict(x, t) returns (x0, eps, u[, v]) there. On that path s = t, a = 1 - t,
and lambda = log(a / s). None is ever asked outside (0, 1], and none divides by 1 - t at t = 1:
where lambda is infinite a step has order 1.
"""

import math

import torch
from torch import Tensor

from diffusion.dopri5 import dopri5
from diffusion.schedules import T, has_rows, shift_time, table_row, table_time

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # Karras et al. 2022, table 1


# ---- grids: falling times that end in exactly 0, float64 ----------------------------------------


ROWS = ("trailing", "leading", "linspace", "lcm")  # grids of rows of a VP table
DISTILLED = 50  # rows that a latent consistency model knows


def time_grid(
    steps: int,
    shift: float = 1.0,
    t_start: float = 1.0,
    kind: str = "uniform",
    table: str = "",
    zero_snr: bool = False,
) -> Tensor:
    """steps + 1 times from t_start to 0, (steps + 1,). `shift` multiplies the odds t / (1 - t) of t
    as a share of t_start: > 1 = more steps near the noise.

    uniform                       evenly in t
    karras                        in sigma^(1/7), sigma = t / (1 - t) (Karras et al. 2022, eq. 5)
    logsnr                        in log sigma
    trailing, leading, linspace, lcm   rows of the VP `table`, as table_rows() says

    karras and logsnr go down to the smallest sigma that the network knows (row 0 of its table;
    0.002 on the linear path), then to 0. They come from t_start's sigma or, if that is larger, from
    80, in whose place the grid has t_start itself.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: wanted at least 1.")
    if kind in ROWS:
        if not has_rows(table) or shift != 1.0:
            raise ValueError(
                f"grid {kind!r} is made of rows of a VP table, unshifted: got table {table!r}, "
                f"shift {shift:g}."
            )
        last = round(float(table_row(table, torch.tensor(t_start), zero_snr)))
        times = table_time(table, table_rows(steps, kind, last + 1), zero_snr)
        return torch.cat([times, times.new_zeros(1)])
    q = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if kind in ("karras", "logsnr"):
        sigma = sigmas(steps, kind, t_start, table, zero_snr)
        q[1:-1] = (sigma / (1 + sigma))[1:] / t_start
    elif kind != "uniform":
        kinds = ", ".join(("uniform", "karras", "logsnr", *ROWS))
        raise ValueError(f"grid {kind!r} is not one of {kinds}.")
    return t_start * shift_time(q, shift)


def sigmas(steps: int, kind: str, t_start: float, table: str, zero_snr: bool) -> Tensor:
    """The falling sigmas of a karras or logsnr grid, (steps,) float64."""
    low = SIGMA_MIN / (1 + SIGMA_MIN)
    if has_rows(table):
        low = float(table_time(table, torch.tensor(0), zero_snr))
    low = low / (1 - low)
    high = SIGMA_MAX if t_start == 1 else min(t_start / (1 - t_start), SIGMA_MAX)
    low = min(low, high / 2)  # a start below the smallest sigma: still falling
    w = torch.linspace(0, 1, steps, dtype=torch.float64)
    if kind == "logsnr":
        return high * (low / high) ** w
    first = torch.tensor(high, dtype=torch.float64) ** (1 / RHO)
    last = torch.tensor(low, dtype=torch.float64) ** (1 / RHO)
    return torch.lerp(first, last, w) ** RHO


def table_rows(steps: int, spacing: str = "trailing", rows: int = T) -> Tensor:
    """`steps` of the first `rows` rows of a VP table, falling, float64 (Lin et al. 2023, table 2).

    trailing holds the last row, leading row 0, linspace both. ADM, DDIM and Stable Diffusion used
    leading. lcm: spread over the 50 rows of `trailing`, on which LCMs were distilled.
    """
    if steps > rows:
        raise ValueError(f"{steps} steps do not fit into {rows} rows of a VP table.")
    if spacing == "trailing":
        return torch.arange(rows, 0, -rows / steps, dtype=torch.float64)[:steps].round() - 1
    if spacing == "lcm":
        own = table_rows(DISTILLED, "trailing", rows)
        if steps > DISTILLED:
            raise ValueError(f"{steps} steps are more than the {DISTILLED} of an LCM.")
        return own[(torch.arange(steps) * DISTILLED) // steps]
    if spacing == "leading":
        return (torch.arange(steps, dtype=torch.float64) * (rows // steps)).flip(0)
    return torch.linspace(0, rows - 1, steps, dtype=torch.float64).round().flip(0)


def steps_of(grid: Tensor) -> zip:
    """(t, r) pairs of Python floats, float64 whatever the state is."""
    times = grid.tolist()
    return zip(times[:-1], times[1:])


def norm64(t: float) -> float:
    return math.hypot(1 - t, t)


def log_snr(t: float) -> float:
    """lambda = log(a / s)."""
    if 0 < t < 1:
        return math.log1p(-t) - math.log(t)
    return math.inf if t < 1 else -math.inf


# ---- Runge–Kutta and Adams–Bashforth on u ---------------------------------------------------
# Each goes from t to r once per step; a forker can read and change one alone.


def euler(predict, x, grid, noise):
    """First order; on the linear path this is DDIM with eta = 0."""
    for t, r in steps_of(grid):
        x = x + (r - t) * predict(x, t)[2]
        yield x


def heun(predict, x, grid, noise):
    """Second order, two calls a step. The last step is Euler (Karras et al. 2022, alg. 1): t = 0 is
    never evaluated."""
    for t, r in steps_of(grid):
        u = predict(x, t)[2]
        if r > 0:
            u = (u + predict(x + (r - t) * u, r)[2]) / 2
        x = x + (r - t) * u
        yield x


def midpoint(predict, x, grid, noise):
    """Second order, two calls a step."""
    for t, r in steps_of(grid):
        half = x + (r - t) / 2 * predict(x, t)[2]
        x = x + (r - t) * predict(half, (t + r) / 2)[2]
        yield x


def rk4(predict, x, grid, noise):
    """Fourth order, four calls a step (classical). The step to 0 is Heun's of third order, whose
    stages are t, 2t/3 and t/3: one step of local order 4 keeps the whole at order 4, and t = 0 is
    never evaluated."""
    for t, r in steps_of(grid):
        h, k1 = r - t, predict(x, t)[2]
        if r > 0:
            k2 = predict(x + h / 2 * k1, t + h / 2)[2]
            k3 = predict(x + h / 2 * k2, t + h / 2)[2]
            k4 = predict(x + h * k3, r)[2]
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        else:
            k2 = predict(x + h / 3 * k1, t + h / 3)[2]
            k3 = predict(x + 2 / 3 * h * k2, t + 2 / 3 * h)[2]
            x = x + h / 4 * (k1 + 3 * k3)
        yield x


def ab2(predict, x, grid, noise):
    """Second order, one call a step: Adams–Bashforth on an uneven grid, after a step of Heun."""
    before = None  # (step, u) of the last one
    for t, r in steps_of(grid):
        h, u = r - t, predict(x, t)[2]
        if before:
            q = h / (2 * before[0])
            x = x + h * ((1 + q) * u - q * before[1])
        else:
            mean = u if r == 0 else (u + predict(x + h * u, r)[2]) / 2
            x = x + h * mean
        before = h, u
        yield x


def lms4(predict, x, grid, noise):
    """Adams–Bashforth of up to four velocities, one call a step. The first step is Euler's, as in
    k-diffusion's LMS: it leaves an error of order 2, with a small constant."""
    times, us = [], []
    for t, r in steps_of(grid):
        times, us = [*times, t][-4:], [*us, predict(x, t)[2]][-4:]
        # Gauss: exact for the cubic through all four.
        nodes = [(t + r) / 2 + s * (r - t) / math.sqrt(12) for s in (-1, 1)]
        weights = []
        for a in times:
            values = (math.prod((g - b) / (a - b) for b in times if b != a) for g in nodes)
            weights.append((r - t) / 2 * sum(values))
        x = x + sum(w * u for w, u in zip(weights, us))
        yield x


# ---- exponential integrators in lambda, on x0 ---------------------------------------------------


def dpmpp_2m(predict, x, grid, noise):
    """DPM-Solver++(2M) (Lu et al. 2022, alg. 2), second order, one call a step."""
    return dpmpp_2m_sde(predict, x, grid, noise, eta=0.0)


def dpmpp_2m_sde(predict, x, grid, noise, eta=1.0):
    """SDE-DPM-Solver++(2M), midpoint form, one call a step; eta scales the noise (k-diffusion), 0
    is the ODE."""
    before, x0_before = None, None
    for t, r in steps_of(grid):
        x0 = predict(x, t)[0]
        decay = (r / t * ((1 - t) / (1 - r))) ** eta  # e^(-eta h), h = lambda_r - lambda_t
        keep = r / t * decay
        ahead = x0
        if before and r > 0:  # h_before may be infinite: then nothing is extrapolated
            h, h_before = log_snr(r) - log_snr(t), log_snr(t) - log_snr(before)
            ahead = x0 + h / (2 * h_before) * (x0 - x0_before)
        x = keep * x + (1 - r - (1 - t) * keep) * ahead
        if eta and r > 0:
            x = x + r * math.sqrt(max(1 - decay**2, 0.0)) * noise(x)
        before, x0_before = t, x0
        yield x


def unipc(predict, x, grid, noise):
    """UniPC-2 with B(h) = e^h - 1 ("bh2", Zhao et al. 2023, alg. 5-8) on x0, one call a step: the
    call at r also corrects the step that came there. The last step, to 0, is not corrected."""
    before, m_before, correct = None, None, None
    for t, r in steps_of(grid):
        m = predict(x, t)[0]
        if correct:
            x = correct(m)
        h, slope = log_snr(r) - log_snr(t), None
        c = 0.0, 0.5  # weights of slope and of m_r - m_t in the corrector
        if before and before < 1 and r > 0:
            q = h / (log_snr(t) - log_snr(before))
            slope = q * (m - m_before)
            b = math.expm1(-h)
            phi = -b / h - 1
            b1, b2 = phi / b, -2 * (phi / h + 0.5) / b
            c1 = -(b2 - b1) / (1 / q + 1)
            c = c1, b1 - c1
        base, gain, start = r / t * x + (1 - r / t) * m, 1 - r / t, m
        x = base if slope is None else base + gain / 2 * slope
        before, m_before = t, m

        def correct(m_r, base=base, gain=gain, start=start, slope=slope, c=c):
            bend = 0 if slope is None else c[0] * slope
            return base + gain * (c[1] * (m_r - start) + bend)

        yield x


# ---- stochastic ---------------------------------------------------------------------------------


def ddim(predict, x, grid, noise, eta=0.0):
    """DDIM (Song et al. 2021, eq. 12 and 16) in VP's coordinates; eta = 0 is Euler, eta = 1 is DDPM
    (small).

    On a rising grid (inversion) the network is asked at the same VP point and the later time, as
    DDIM inversion does: never at 0.
    """
    for t, r in steps_of(grid):
        if r > t:
            eps = predict(norm64(r) / norm64(t) * x, r)[1]
            x = (1 - r) / (1 - t) * (x - t * eps) + r * eps
        elif not eta or r == 0:
            x = x + (r - t) * predict(x, t)[2]
        else:
            x0, eps = predict(x, t)[:2]
            s_t, s_r = t / norm64(t), r / norm64(r)
            a_ratio = (1 - t) / norm64(t) * norm64(r) / (1 - r)
            sd = eta * (s_r / s_t) * math.sqrt(max(1 - a_ratio**2, 0.0))  # of z, in VP units
            kept = math.sqrt(max(s_r**2 - sd**2, 0.0))
            x = (1 - r) * x0 + norm64(r) * (kept * eps + sd * noise(x))
        yield x


def ddpm(predict, x, grid, noise, variance="small"):
    """Ancestral sampling (Ho et al. 2020, eq. 7): the posterior q(x_r | x_t, x0), respaced to the
    grid. The last step adds no noise.

    variance: the posterior's own ("small"), beta ("large"), or what the network says ("learned",
    Nichol & Dhariwal 2021, eq. 15: between both in log, v = -1 small, v = 1 large).
    """
    if variance not in ("small", "large", "learned"):
        raise ValueError(f"variance {variance!r} is not small, large or learned.")
    for t, r in steps_of(grid):
        x0, _, _, *v = predict(x, t)
        if variance == "learned" and (not v or v[0] is None):
            raise ValueError(
                "variance 'learned' needs a network that outputs one: twice the channels of its "
                "input."
            )
        s2_t, s2_r = (t / norm64(t)) ** 2, (r / norm64(r)) ** 2
        a_r, a_ratio = (1 - r) / norm64(r), (1 - t) / norm64(t) * norm64(r) / (1 - r)
        beta = 1 - a_ratio**2
        mean = a_r * beta / s2_t * x0 + a_ratio * s2_r / s2_t * x / norm64(t)
        if r > 0:
            large = math.sqrt(beta)
            small = large * math.sqrt(s2_r / s2_t)
            if variance == "learned":
                share = (v[0] + 1) / 2 * math.log(large) + (1 - v[0]) / 2 * math.log(small)
                sd = torch.exp(share)
            else:
                sd = small if variance == "small" else large
            mean = mean + sd * noise(x)
        x = norm64(r) * mean
        yield x


def lcm(predict, x, grid, noise):
    """To the predicted data and back up to r by new noise (Luo et al. 2023, algorithm 3): for
    networks that jump to the data at once. Their c_skip, 7e-6 at row 19 and less before it, is left
    out."""
    for t, r in steps_of(grid):
        x0 = predict(x, t)[0]
        x = (1 - r) * x0 + r * noise(x0) if r else x0
        yield x


def euler_ancestral(predict, x, grid, noise, eta=1.0):
    """Euler beyond r, to d = r (1 + (r/t - 1) eta), and back up by noise to the linear path's own
    mix at r: the rule of flows (k-diffusion's for VE breaks the marginals here). eta = 0 is
    Euler."""
    for t, r in steps_of(grid):
        d = r * (1 + (r / t - 1) * eta)
        scale = (1 - r) / (1 - d)
        x = scale * (x + (d - t) * predict(x, t)[2])
        sd = math.sqrt(max(r**2 - (scale * d) ** 2, 0.0))
        if eta and sd:
            x = x + sd * noise(x)
        yield x


def sde(predict, x, grid, noise, eta=1.0):
    """Euler–Maruyama on the reverse SDE with diffusion w(t) = eta t (Ma et al. 2024, SiT, eq. 6
    and "sigma"): u - w score = u + eta eps, which divides by nothing. The step to 0 is Euler's,
    without noise; eta = 0 is Euler throughout."""
    for t, r in steps_of(grid):
        eps, u = predict(x, t)[1:3]
        if eta and r > 0:
            x = x + (r - t) * (u + eta * eps) + math.sqrt(2 * eta * t * (t - r)) * noise(x)
        else:
            x = x + (r - t) * u
        yield x


METHODS = {
    "euler": euler,
    "heun": heun,
    "midpoint": midpoint,
    "rk4": rk4,
    "ab2": ab2,
    "lms4": lms4,
    "ddim": ddim,
    "ddpm": ddpm,
    "lcm": lcm,
    "euler_ancestral": euler_ancestral,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
    "sde": sde,
    "dopri5": dopri5,
}
