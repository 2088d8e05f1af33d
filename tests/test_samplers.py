"""Solvers on fields with closed forms, and against the reference schedulers on their own grids."""

import math

import pytest
import torch

import samplers
from ckpt import save_unet
from config import UserError
from conftest import randomize
from model import UNet, UNetConfig
from objectives import T, alphas_bar, make_objective, norm, table_row
from samplers import METHODS, draw, generators, guided, native_grid, pick_labels, sample, time_grid

FIXED = tuple(m for m in METHODS if m != "dopri5")


def delta(c):
    """Data is one point: x0 = c everywhere."""
    def predict(x, t):
        w = t.view(-1, 1, 1, 1)
        eps = (x - (1 - w) * c) / w
        return c.expand_as(x), eps, eps - c
    return predict


def gaussian(mu=0.7, sd=0.3):
    """Data is N(mu, sd²): the exact conditional means, and the exact map from noise z to data mu + sd z."""
    def predict(x, t):
        w = t.view(-1, 1, 1, 1)
        var = (1 - w) ** 2 * sd ** 2 + w ** 2
        x0, eps = mu + (1 - w) * sd ** 2 * (x - (1 - w) * mu) / var, w * (x - (1 - w) * mu) / var
        return x0, eps, eps - x0
    return predict


def mixture(means=(-1.5, 1.0), sds=(0.3, 0.5), weights=(0.3, 0.7)):
    def predict(x, t):
        w, parts = t.view(-1, 1, 1, 1), []
        for m, s, p in zip(means, sds, weights):
            var = (1 - w) ** 2 * s ** 2 + w ** 2
            mean = (1 - w) * m
            parts.append((math.log(p) - 0.5 * (x - mean) ** 2 / var - 0.5 * var.log(), m + (1 - w) * s ** 2 * (x - mean) / var))
        r = torch.softmax(torch.stack([a for a, _ in parts]), 0)
        x0 = (r * torch.stack([b for _, b in parts])).sum(0)
        eps = (x - (1 - w) * x0) / w
        return x0, eps, eps - x0
    return predict


def noise(n=64, dtype=torch.float64, seed=0):
    return torch.randn(n, 1, 2, 2, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_delta_data_is_exact_for_any_number_of_steps(method, steps):
    c = torch.tensor([[[[1.0, -2.0], [0.5, 3.0]]]], dtype=torch.float64)
    out = sample(delta(c), noise(5), method=method, steps=steps, seeds=range(5))
    assert (out.x - c).abs().max() < (1e-12 if method != "dopri5" else 1e-9)


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2), ("ddim", 1)])
def test_order_of_convergence_on_a_mixture(method, order):
    z = noise(200)
    truth = sample(mixture(), z, method="dopri5", rtol=1e-11, atol=1e-11, max_nfe=10_000).x
    errors = [(sample(mixture(), z, method=method, steps=n).x - truth).square().mean().sqrt() for n in (40, 80, 160, 320)]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert all(order - 0.2 < o < order + 0.3 for o in orders), (errors, orders)
    assert errors[0] < {1: 0.1, 2: 5e-3}[order]


@pytest.mark.parametrize("method", ["euler", "heun", "ddim", "dopri5"])
def test_gaussian_data_goes_to_the_analytic_map(method):
    z = noise()
    options = {"rtol": 1e-9, "atol": 1e-9} if method == "dopri5" else {"steps": 400}
    error = (sample(gaussian(), z, method=method, **options).x - (0.7 + 0.3 * z)).abs().max()
    assert error < {"euler": 2e-2, "ddim": 2e-2, "heun": 1e-4, "dopri5": 1e-7}[method]


def test_dopri5_error_falls_with_rtol_and_ends_within_rounding():
    z, errors = noise(), []
    for tol in (1e-3, 1e-5, 1e-7, 1e-9, 1e-11):
        out = sample(gaussian(), z, method="dopri5", rtol=tol, atol=tol)
        errors.append(float((out.x - (0.7 + 0.3 * z)).abs().max()))
    assert all(b < a / 5 for a, b in zip(errors, errors[1:])), errors
    assert errors[-1] < 1e-9


def test_dopri5_takes_torchdiffeqs_steps_for_one_sample():
    """Same tableau, error weights, controller and first step: the accepted times agree up to the clamped last one."""
    torchdiffeq = pytest.importorskip("torchdiffeq", reason="oracle: pip install -r requirements-dev.txt")
    z, predict, ours, theirs = noise(1), mixture(), [], []

    class Field(torch.nn.Module):
        def forward(self, t, x):
            return predict(x, t.expand(len(x)))[2]

        def callback_accept_step(self, t0, y0, dt):
            theirs.append(float(t0 - dt))                                       # time runs down

    end = torchdiffeq.odeint(Field(), z, torch.tensor([1.0, 1e-3], dtype=torch.float64), rtol=1e-7, atol=1e-7, method="dopri5")[-1]
    out = sample(predict, z, method="dopri5", rtol=1e-7, atol=1e-7, callback=lambda progress, x: ours.append(1 - progress))
    inside = [t for t in theirs if t > 0.05]
    accepted = sorted(set(ours), reverse=True)
    assert len(inside) > 5
    assert accepted[:len(inside)] == pytest.approx(inside, abs=1e-9)
    assert (out.x - end).abs().max() < 5e-3                                     # theirs stops at t = 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dopri5_never_leaves_the_unit_interval_and_each_row_is_on_its_own(dtype):
    z, times = noise(9, dtype), []
    def watched(x, t):
        times.append(t)
        return mixture()(x, t)
    together = sample(watched, z, method="dopri5", rtol=1e-4, atol=1e-5)
    assert float(torch.cat(times).min()) > 0 and float(torch.cat(times).max()) <= 1
    assert together.x.dtype == dtype and len(set(together.nfe_each.tolist())) > 1
    for i in (0, 4, 8):
        alone = sample(mixture(), z[i:i + 1], method="dopri5", rtol=1e-4, atol=1e-5)
        # exp() and pow() differ by an ulp between SIMD widths; in fp32 that can move a step, within the tolerance
        assert (alone.x[0] - together.x[i]).abs().max() < (1e-8 if dtype == torch.float64 else 3e-3)
        assert dtype == torch.float32 or alone.nfe == together.nfe_each[i]


def test_dopri5_gives_up_at_max_nfe_with_a_warning(capsys):
    def stiff(x, t):
        u = torch.where(t.view(-1, 1, 1, 1) < 0.5, torch.full_like(x, float("nan")), x)
        return x, x, u
    out = sample(stiff, noise(3), method="dopri5", max_nfe=200)
    assert out.nfe <= 200 and "unfinished" in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 6])
def test_nfe_is_the_number_of_calls(method, steps):
    calls = []
    def counting(x, t):
        assert t.shape == (len(x),)
        calls.append(len(x))
        return gaussian()(x, t)
    out = sample(counting, noise(3), method=method, steps=steps, seeds=[1, 2, 3])
    assert out.nfe == len(calls) and int(out.nfe_each.sum()) == sum(calls)
    if method in ("euler", "ddim", "ddpm"):
        assert out.nfe == steps
    if method == "heun":
        assert out.nfe == 2 * steps - 1


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_depends_on_its_seed_only(method):
    options = {"ddim": {"eta": 0.7}}.get(method, {})
    def run(seeds):
        x = draw(generators(seeds), torch.empty(1, 1, 2, 2))
        return sample(gaussian(), x, method=method, steps=5, seeds=seeds, **options).x
    seeds = list(range(10, 23))
    together, apart = run(seeds), torch.cat([run(seeds[:1]), run(seeds[1:5]), run(seeds[5:])])
    assert torch.equal(together, apart)
    assert not torch.equal(together[0], together[1])


def test_step_noise_is_not_the_initial_noise_again():
    x = draw(generators([3]), torch.empty(1, 1, 2, 2))
    seen = []
    def predict(x, t):
        return torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)    # what is left of x is step noise
    sample(predict, x, method="ddpm", steps=2, seeds=[3], callback=lambda p, x: seen.append(x))
    ratio = seen[0] / x
    assert ratio.std() > 0.1


@pytest.mark.parametrize("steps", [1000, 50])
@pytest.mark.parametrize("eta", [0.0, 1.0, 0.5])
def test_ddim_on_the_native_grid_is_diffusers_ddim(steps, eta):
    diffusers = pytest.importorskip("diffusers", reason="oracle: pip install -r requirements-dev.txt")
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    check_native("ddim", scheduler, steps, {"eta": eta}, {"eta": eta})


@pytest.mark.parametrize("steps", [1000, 50])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_on_the_native_grid_is_diffusers_ddpm(steps, variance):
    diffusers = pytest.importorskip("diffusers", reason="oracle: pip install -r requirements-dev.txt")
    scheduler = diffusers.DDPMScheduler(timestep_spacing="trailing", clip_sample=False, variance_type=f"fixed_{variance}")
    check_native("ddpm", scheduler, steps, {"variance": variance}, {})


def check_native(method, scheduler, steps, options, their_options):
    """Both integrate the same eps network over the same rows with the same step noise."""
    objective = make_objective("ddpm")
    def net(x, k):                                                              # N(0.7, 0.3²) data under Ho's table, fp32
        ab = alphas_bar("linear")[k.long()].view(-1, 1, 1, 1)
        return ((1 - ab).sqrt() * (x - ab.sqrt() * 0.7) / (ab * 0.09 + 1 - ab)).to(x.dtype)
    z, seed = draw(generators([5]), torch.empty(1, 1, 2, 2, dtype=torch.float64)), [5]
    scheduler.alphas_cumprod = alphas_bar("linear")                             # theirs in fp64 too
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == table_row("linear", native_grid(objective, steps)[:-1]).round().tolist()
    x, step_noise = z.clone(), generators(seed)
    draw(step_noise, z)
    for k in scheduler.timesteps:
        torch_noise = draw(step_noise, z) if their_options.get("eta", 1.0) and k > 0 and k != scheduler.timesteps[-1] else None
        x = step_with(scheduler, net(x, k.view(1)), k, x, torch_noise, their_options)
    # the linear path's state at t is the VP state times norm(t)
    ours = sample(lambda x, t: objective.predict(net, x, t), z * norm(native_grid(objective, steps)[0]), method=method,
                  grid=native_grid(objective, steps), seeds=seed, **options).x
    assert (ours - x).abs().max() < 1e-4


def step_with(scheduler, eps, k, x, noise_, options):
    """scheduler.step with its noise given; None = none wanted."""
    if "eta" in options:
        return scheduler.step(eps, k, x, variance_noise=noise_ if options["eta"] and noise_ is not None else None,
                              **({"eta": options["eta"]} if noise_ is not None else {"eta": 0.0})).prev_sample
    import diffusers.schedulers.scheduling_ddpm as module
    kept, module.randn_tensor = module.randn_tensor, lambda *a, **kw: noise_ if noise_ is not None else torch.zeros_like(x)
    try:
        return scheduler.step(eps, k, x).prev_sample
    finally:
        module.randn_tensor = kept


def test_ddpm_final_variance_for_unit_gaussian_data():
    """Facts of the schedule: large variance ends at 1 - beta_1, small below it (1000 rows, exact eps = s x)."""
    objective = make_objective("ddpm")
    def net(x, k):
        return ((1 - alphas_bar("linear")[k.long()]).sqrt().view(-1, 1, 1, 1) * x).to(x.dtype)
    grid = native_grid(objective, T)
    z = torch.randn(1, 1, 200, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for variance, want in (("large", 0.9999), ("small", 0.991067)):
        out = sample(lambda x, t: objective.predict(net, x, t), objective.prior(z), method="ddpm", grid=grid, seeds=[0], variance=variance)
        assert float(out.x.var()) == pytest.approx(want, abs=0.012)


def test_the_whole_way_from_a_vp_network_to_gaussian_data():
    objective = make_objective("ddpm")
    def net(x, k):
        ab = torch.from_numpy(__import__("numpy").interp(k.double(), range(T), alphas_bar("linear"))).view(-1, 1, 1, 1)
        return (1 - ab).sqrt() * (x - ab.sqrt() * 0.7) / (ab * 0.09 + 1 - ab)
    z = noise()
    out = sample(lambda x, t: objective.predict(net, x, t), objective.prior(z), steps=200, t_start=objective.t_max)
    assert (out.x - (0.7 + 0.3 * z)).abs().max() < 0.02                         # up to the mean left at the last row


def test_guidance_is_a_lerp_in_one_call_and_free_when_off():
    calls = []
    def net(x, t, y=None):
        calls.append(len(x))
        return x * 0 + (0 if y is None else y.view(-1, 1, 1, 1).float())
    objective, x, t, y = make_objective("fm"), noise(3, torch.float32), torch.full((3,), 0.5), torch.tensor([2, 4, 6])
    u = guided(objective, net, 3.0)(x, t, y)[2]
    assert calls == [6] and u[:, 0, 0, 0].tolist() == [-1 + 3 * (2 + 1), -1 + 3 * (4 + 1), -1 + 3 * (6 + 1)]
    assert guided(objective, net, 1.0)(x, t, y)[2][:, 0, 0, 0].tolist() == [2, 4, 6] and calls == [6, 3]
    assert guided(objective, net, 1.0)(x, t)[2].abs().max() == 0


def test_conditions_follow_their_rows_when_dopri5_retires_some():
    tags = torch.arange(9)
    def predict(x, t, y):
        assert torch.equal(x[:, 0, 0, 0].round().long() // 100, y)
        x0 = mixture()(x * 0 + (x % 100), t)[0] * 0
        return x0, x0, torch.sin(40 * t.view(-1, 1, 1, 1) * (1 + y.view(-1, 1, 1, 1))) + x0
    x = (100 * tags + 50).double().view(-1, 1, 1, 1).expand(-1, 1, 2, 2).clone()
    out = sample(predict, x, method="dopri5", cond={"y": tags}, rtol=1e-6, atol=1e-6)
    assert len(set(out.nfe_each.tolist())) > 1


def test_grids_end_at_zero_and_shift_towards_noise():
    assert time_grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert time_grid(4, shift=3.0).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert time_grid(3, t_start=0.6).tolist() == pytest.approx([0.6, 0.4, 0.2, 0])
    assert table_row("linear", native_grid(make_objective("ddpm"), 4)[:-1]).round().tolist() == [999, 749, 499, 249]


def test_unknown_method_and_labels_are_named():
    with pytest.raises(ValueError, match="euler, heun"):
        sample(gaussian(), noise(), method="rk45")
    with pytest.raises(ValueError, match="Closest: blonde hair"):
        pick_labels(("blond hair",), ["red hair", "blonde hair"], 3)
    assert pick_labels(("blonde hair", "0"), ["red hair", "blonde hair"], 3).tolist() == [1, 0, 1]


# ---- files that cannot say everything -------------------------------------------------------------------------------

PIXELS = UNetConfig(3, 3, model_channels=32, channel_mult=(1, 1), num_res_blocks=1, attention=(0, 1), num_classes=5)


@pytest.mark.parametrize("flags, message", [
    (dict(objective="eps"), "eps needs its noise schedule.  Add --table linear, cosine or scaled_linear (guided-diffusion: cosine for its 64×64 "
                            "model, linear for the others; Stable Diffusion: scaled_linear)"),
    (dict(objective="v", resolution=8), "v needs its noise schedule"), (dict(objective="x0", resolution=8), "x0 needs its noise schedule"),
    (dict(objective="eps", table="linear"), "F does not say its own resolution.  Add --resolution N, a multiple of 2."),
    (dict(objective="fm"), "F does not say its own resolution.  Add --resolution N, a multiple of 2."),
    (dict(objective="fm", resolution=9), "--resolution 9: wanted a multiple of 2."),
    (dict(objective="fm", resolution=-2), "--resolution -2: wanted a multiple of 2."),
])
def test_what_a_foreign_file_does_not_say_is_asked_for(flags, message):
    with pytest.raises(UserError) as error:
        samplers.describe(samplers.Config("F", **flags), PIXELS, {"objective": flags["objective"]}, "F")
    assert message in str(error.value)


def test_fm_needs_no_table_and_a_given_one_is_taken():
    assert samplers.describe(samplers.Config("F", resolution=8), PIXELS, {"objective": "fm"}, "F")[0] == make_objective("fm")
    assert samplers.describe(samplers.Config("F", resolution=8, table="cosine"), PIXELS, {"objective": "eps"}, "F")[0] == make_objective("ddpm", table="cosine")


@pytest.mark.parametrize("classes, flags, warns", [(None, [], True), (None, ["--labels", "3"], False), (None, ["--labels", "3", "--cfg", "2"], True),
                                                   (list("abcde"), [], False), (list("abcde"), ["--labels", "c", "--cfg", "2"], False)])
def test_drawing_without_a_class_is_warned_of_where_nobody_says_it_was_trained(tmp_path, user, classes, flags, warns):
    (tmp_path / "theirs").mkdir()
    path = tmp_path / "theirs/diffusion_pytorch_model.safetensors"
    net = randomize(UNet(PIXELS))
    save_unet(path, net, {"objective": "eps", **({"classes": classes} if classes else {})})
    code, _, err = user(samplers.main, "--ckpt", path, "--n", 1, "--steps", 1, "--resolution", 8, "--table", "linear", "--out", tmp_path / "s", *flags)
    warnings = [line for line in err if line.startswith("warning: ")]
    assert code == 0 and len(warnings) == warns and all("\"no class\"" in line for line in warnings), err


def test_sample_folders_of_diffusers_files_have_the_folders_name(tmp_path):
    for path, name in (("a/unet.safetensors", "unet-abcdef"), ("a/diffusion_pytorch_model.safetensors", "a-abcdef"),
                       ("b/diffusion_pytorch_model.safetensors.index.json", "b-abcdef")):
        assert samplers.default_folder(samplers.Config("F"), tmp_path / path, {"fingerprint": "abcdef0123"}) == f"samples/{name}"
    assert samplers.default_folder(samplers.Config("F", n=2, steps=3), tmp_path / "ema-0.050.safetensors",
                                   {"run": "r", "images": 8, "fingerprint": "abcdef01"}) == "samples/r-8-ema-0.050-abcdef-steps=3"
