"""The posterior of a last layer against ridge regression, explicit Jacobians and a model whose
samples' spread is known."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from torch.autograd.functional import hessian, jacobian

from diffusion import laplace
from diffusion.guidance import guided
from diffusion.laplace import Curvature, Posterior, integrated, shared, tangent
from diffusion.sampling import sample
from objectives import make_objective

NOISE = torch.tensor([0.5, 2.0])
T = torch.tensor([0.1, 0.9, 0.4])


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(channels=2, out=3, kernel=3):
    torch.manual_seed(1)
    return nn.Conv2d(channels, out, kernel, padding=kernel // 2)


def known(of, phi, prior=0.7):
    curvature = Curvature(of, NOISE)
    curvature.add(phi, T[: len(phi)])
    return curvature, curvature.posterior(prior)


def explicit(of, phi):
    """d out / d weights of one channel, (places, K), by autograd."""
    first = of.weight[0].numel()

    def out(flat):
        weight = flat[:first].view(1, *of.weight.shape[1:])
        out = nn.functional.conv2d(phi.double(), weight, flat[first:], padding=of.padding)
        return out.flatten()

    return jacobian(out, torch.zeros(first + 1, dtype=torch.float64))


def test_A_is_the_loss_s_own_second_derivative():
    of, phi = layer(), rand(3, 2, 4, 5)
    curvature, _ = known(of, phi)

    def loss(flat):
        weight = flat[:-1].view(1, *of.weight.shape[1:])
        out = nn.functional.conv2d(phi.double(), weight, flat[-1:], padding=1)
        per = (out - 0.3).square().flatten(1).sum(1)
        return (per / torch.tensor([0.5, 2.0, 0.5])).sum() / 2  # t .1 and .4: first half

    flat = torch.zeros(19, dtype=torch.float64)
    torch.testing.assert_close(curvature.A, hessian(loss, flat), rtol=1e-12, atol=1e-12)


def test_of_identity_features_it_is_bayesian_ridge_regression():
    """One place, one pixel: rows of a table. Bishop 2006, eq. 3.54 and 3.59."""
    of, x = layer(4, 2, 1), rand(40, 4, 1, 1)
    curvature = Curvature(of, torch.tensor([0.25]))
    curvature.add(x, torch.full((40,), 0.5))
    design = torch.cat([x[:, :, 0, 0], torch.ones(40, 1)], 1).double()
    covariance = torch.linalg.inv(1.5 * torch.eye(5).double() + design.T @ design / 0.25)
    fresh = rand(6, 4, 1, 1, seed=2)
    rows = torch.cat([fresh[:, :, 0, 0], torch.ones(6, 1)], 1).double()
    wanted = ((rows @ covariance) * rows).sum(1).float()
    got = curvature.posterior(1.5).variance(fresh)[:, 0, 0]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)


def test_parts_of_the_data_add_up_to_the_whole():
    of, phi = layer(), rand(3, 2, 4, 4)
    whole, _ = known(of, phi)
    parts = Curvature(of, NOISE)
    parts.add(phi[:1], T[:1])
    parts.add(phi[1:], T[1:])
    torch.testing.assert_close(parts.A, whole.A, rtol=1e-12, atol=1e-12)
    assert parts.rows == whole.rows == 48
    # As two ranks have them, each with its own half.
    first, second = Curvature(of, NOISE), Curvature(of, NOISE)
    first.add(phi[:1], T[:1])
    second.add(phi[1:], T[1:])
    torch.testing.assert_close(first.A + second.A, whole.A, rtol=1e-12, atol=1e-12)
    assert first.rows + second.rows == 48


def test_the_variance_is_J_P_JT_and_so_is_that_of_networks_drawn():
    of, phi = layer(), rand(3, 2, 4, 4)
    curvature, posterior = known(of, phi)
    covariance = torch.linalg.inv(curvature.A + 0.7 * torch.eye(19).double())
    fresh = rand(1, 2, 4, 4, seed=5)
    J = explicit(of, fresh)
    wanted = (J @ covariance * J).sum(1).view(4, 4)
    torch.testing.assert_close(posterior.variance(fresh)[0], wanted.float(), rtol=1e-5, atol=0)
    drawn = posterior.draws(30_000, 1, seed=3).double()[:, 0] @ J.T
    # Of a variance of n draws the standard error is sqrt(2 / n) of it: here 0.8 %.
    torch.testing.assert_close(drawn.var(0).view(4, 4), wanted, rtol=0.04, atol=0)
    assert drawn.mean(0).abs().max() < 5 * wanted.max().sqrt() / math.sqrt(30_000)
    diagonal = (J.square() / (curvature.A.diagonal() + 0.7)).sum(1).view(4, 4).float()
    torch.testing.assert_close(posterior.diagonal(fresh)[0], diagonal, rtol=1e-5, atol=0)


def test_a_certain_prior_leaves_no_variance_and_more_data_less():
    of, phi = layer(), rand(3, 2, 8, 8)
    curvature, _ = known(of, phi)
    assert curvature.posterior(1e12).variance(phi).max() < 1e-9
    once = curvature.posterior(1e-9).variance(phi)
    curvature.A *= 2
    torch.testing.assert_close(curvature.posterior(1e-9).variance(phi), once / 2)


def test_the_likeliest_prior_is_where_the_evidence_is_largest():
    of, phi = layer(), rand(3, 2, 8, 8)
    curvature, _ = known(of, phi)
    a = torch.linalg.eigvalsh(curvature.A)
    w = torch.cat([of.weight.flatten(), of.bias]).detach().double()

    def evidence(prior):
        logs = w.numel() * math.log(prior) - 3 * (a + prior).log().sum()
        return float(logs - prior * w.square().sum()) / 2

    best = curvature.likeliest()
    assert evidence(best) >= max(evidence(best * 0.99), evidence(best * 1.01))
    nn.init.zeros_(of.weight), nn.init.zeros_(of.bias)
    with pytest.raises(ValueError, match="never trained"):
        curvature.likeliest()


def test_a_layer_with_another_way_to_its_patches_is_refused():
    bare = [nn.Conv2d(4, 4, 1, bias=False), nn.Linear(2, 2, bias=False)]
    for other in [nn.Conv2d(4, 4, 3, stride=2), *bare, nn.Identity()]:
        with pytest.raises(ValueError, match="plain convolution or projection"):
            Curvature(other, NOISE)


def test_a_projection_of_tokens_is_a_convolution_that_sees_one_place():
    """Of the same weights and features the posterior is the same, bit for bit."""
    of, phi = layer(kernel=1), rand(3, 2, 4, 5)
    tokens = nn.Linear(2, 3)
    tokens.load_state_dict({"weight": of.weight[..., 0, 0], "bias": of.bias})
    with laplace.watching(tokens) as seen:
        tokens(phi.flatten(2).transpose(1, 2))
    one, two = known(of, phi), known(tokens, seen[-1])
    assert torch.equal(one[0].A, two[0].A) and one[0].rows == two[0].rows == 60
    assert one[0].likeliest() == two[0].likeliest() and two[1].kernel == (1, 1)
    wanted = one[1].variance(phi)
    assert torch.equal(two[1].variance(laplace.spread(seen[-1], 4, 5)), wanted)


def test_a_token_s_features_stand_at_all_places_of_its_square():
    grid = rand(2, 3, 4, 6)
    wanted = nn.functional.interpolate(grid, scale_factor=2, mode="nearest")
    assert torch.equal(laplace.spread(grid.flatten(2)[..., None], 8, 12), wanted)
    assert laplace.spread(grid, 4, 6) is grid


# ---- whole samples ------------------------------------------------------------------------------


class Line(nn.Module):
    """Velocities of data N(m, s²): u = w1 · a(t) (x - (1 - t) m) + w0, with w = (1, -m)."""

    def __init__(self, m=0.7, s=0.3):
        super().__init__()
        self.m, self.s = m, s
        self.last = nn.Conv2d(1, 1, 1)
        nn.init.ones_(self.last.weight)
        nn.init.constant_(self.last.bias, -m)

    def phi(self, x, t):
        w = t.view(-1, 1, 1, 1)
        a = (w - (1 - w) * self.s**2) / ((1 - w) ** 2 * self.s**2 + w**2)
        return a * (x - (1 - w) * self.m)

    def forward(self, x, t):
        u = self.last(self.phi(x, t))
        w = t.view(-1, 1, 1, 1)
        return x - w * u, x + (1 - w) * u, u


SD = torch.tensor([0.02, 0.05], dtype=torch.float64)  # of w1 and w0
LINE = Posterior((1 / SD).diag(), 1.0, torch.ones(1), 1, (1, 1), (0, 0))


def by_hand(steps, fresh, n=20_000):
    """Standard deviation of n Euler samples from x = 1.2, with weights drawn once or each step."""
    net, g = Line(), torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(2, n, 1, 1, 1, generator=g, dtype=torch.float64)  # noqa: E731
    x, z = torch.full((n, 1, 1, 1), 1.2, dtype=torch.float64), draw()
    for k in range(steps, 0, -1):
        z = draw() if fresh else z
        phi = net.phi(x, torch.tensor(k / steps, dtype=torch.float64))
        x = x - ((1 + SD[0] * z[0]) * phi - net.m + SD[1] * z[1]) / steps
    return float(x.std())


def test_weights_drawn_anew_at_each_step_cancel_out_and_one_network_s_do_not():
    """What is published (Kou et al. 2024) adds up independent steps: its spread falls like the
    root of their number, while that of networks does not."""
    one = {n: by_hand(n, False) for n in (10, 50, 200)}
    new = {n: by_hand(n, True) for n in (10, 50, 200)}
    assert one[200] > 0.95 * one[10]
    assert new[10] < 0.5 * one[10]
    assert new[200] / new[50] == pytest.approx(math.sqrt(50 / 200), rel=0.05)
    net, x = Line(), torch.full((1, 1, 1, 1), 1.2)
    for steps in (10, 50):
        walk = lambda: sample(net, x, method="euler", steps=steps).x  # noqa: E731, B023
        along = tangent(walk, net.last, LINE, 4, seed=1).flatten()
        kept = shared(walk, net.last, LINE, 4, seed=1).flatten() - walk().flatten()
        torch.testing.assert_close(kept, along, rtol=0.06, atol=1e-4)
        # The end is linear in the weights, so four draws say how: S, by least squares.
        S = torch.linalg.lstsq(LINE.draws(4, 1, seed=1)[:, 0], along[:, None]).solution[:, 0]
        assert float((S * SD).square().sum().sqrt()) == pytest.approx(one[steps], rel=0.03)


def test_an_unknown_offset_is_one_in_the_sample_and_less_by_the_root_of_steps_drawn_anew(
    monkeypatch,
):
    """Nothing but the bias counts: a sample of one network moves by its error, once."""
    monkeypatch.setattr(Line, "phi", lambda self, x, t: torch.zeros_like(x))
    net, x = Line(), torch.full((1, 1, 1, 1), 1.2)
    for steps in (10, 50):
        assert by_hand(steps, True) / SD[1] == pytest.approx(1 / math.sqrt(steps), rel=0.03)
        _, variance = integrated(net, net.last, LINE, x, method="euler", steps=steps)
        assert float(variance.sqrt()) == pytest.approx(float(SD[1]), rel=1e-5)
        walk = lambda: sample(net, x, method="euler", steps=steps).x  # noqa: E731, B023
        moved = tangent(walk, net.last, LINE, 4, seed=1).flatten()
        torch.testing.assert_close(moved, -LINE.draws(4, 1, seed=1)[:, 0, 1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", ["euler", "heun", "rk4", "dpmpp_2m", "dopri5"])
def test_the_tangent_is_the_limit_of_small_moves(method):
    net, x = Line(), torch.full((2, 1, 1, 1), 1.2).double()
    net = net.double()
    how = {"rtol": 1e-9, "atol": 1e-9} if method == "dopri5" else {"steps": 6}
    walk = lambda: sample(net, x, method=method, **how).x  # noqa: E731
    small = replace(LINE, root=1e3 * LINE.root)
    before = walk()
    along = tangent(walk, net.last, small, 3)
    kept = shared(walk, net.last, small, 3) - before
    torch.testing.assert_close(along, kept, rtol=2e-3, atol=1e-9)
    assert along.abs().min() > 0 and torch.equal(walk(), before)


class Features(nn.Module):
    """A network whose last layer sees features of x, t and a label."""

    def __init__(self, channels=3):
        super().__init__()
        torch.manual_seed(2)
        self.first, self.last = nn.Conv2d(channels, 5, 1), nn.Conv2d(5, channels, 3, padding=1)

    def forward(self, x, t, y=None):
        h = self.first(x) + t.view(-1, 1, 1, 1) / 1000
        if y is not None:
            h = h + y.view(-1, 1, 1, 1).clamp(min=0)
        return self.last(torch.tanh(h))


class Tokens(Features):
    """The same, whose last layer sees tokens of 2×2 and says all numbers of their pixels."""

    def __init__(self, channels=3):
        super().__init__(channels)
        self.first, self.last = nn.Conv2d(channels, 5, 2, 2), nn.Linear(5, 4 * channels)

    def forward(self, x, t, y=None):
        h = torch.tanh(self.first(x) + t.view(-1, 1, 1, 1) / 1000)
        out = self.last(h.flatten(2).transpose(1, 2)).view(len(x), *h.shape[2:], 2, 2, -1)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def case(seed=0, net=Features):
    net = net()
    curvature = Curvature(net.last, NOISE)
    curvature.add(torch.tanh(rand(3, 5, 4, 4)), T)
    return net, curvature.posterior(1.0), rand(3, 3, 4, 6, seed=seed)


@pytest.mark.parametrize("net", [Features, Tokens])
def test_a_moved_layer_is_one_with_other_weights(net):
    net, posterior, x = case(net=net)
    (by,) = posterior.draws(1, len(net.last.weight))
    with torch.no_grad():
        with laplace.moved(net.last, by):
            got = net(x, 1000 * T)
        net.last.weight += by[:, :-1].view_as(net.last.weight)
        net.last.bias += by[:, -1]
        torch.testing.assert_close(got, net(x, 1000 * T), rtol=1e-5, atol=1e-5)
    walk = lambda: net(x, 1000 * T).detach()  # noqa: E731
    spread = shared(walk, net.last, posterior, 2, seed=1)
    assert not torch.equal(*spread)


@pytest.mark.parametrize("net", [Features, Tokens])
@pytest.mark.parametrize("method", ["euler", "heun", "ab2", "ddim", "dpmpp_2m"])
def test_integrated_leaves_the_samples_alone_and_is_exact_where_features_do_not_see_x(method, net):
    every = 2 if net is Tokens else 1  # of a token, the first output is that of one pixel
    net, posterior, x = case(net=net)
    predict = guided(make_objective("fm"), net)
    plain = sample(predict, x, method=method, steps=5)
    s, variance = integrated(predict, net.last, posterior, x, method=method, steps=5)
    assert torch.equal(s.x, plain.x) and s.nfe == plain.nfe and variance.shape == (3, 4, 6)
    with torch.no_grad():
        net.first.weight.zero_()
    walk = lambda: sample(predict, x, method=method, steps=5).x  # noqa: E731
    _, variance = integrated(predict, net.last, posterior, x, method=method, steps=5)
    along = tangent(walk, net.last, Whole(posterior), 0)[:, :, 0]
    exact = along.square().sum(0)[:, ::every, ::every]
    whole = exact.repeat_interleave(every, 1).repeat_interleave(every, 2)
    torch.testing.assert_close(variance, whole, rtol=1e-3, atol=0)


class Whole:
    """In place of draws, all directions of the first channel: their squares add up exactly."""

    def __init__(self, posterior):
        self.whiten = posterior.whiten(torch.zeros(1))

    def draws(self, n, out, seed):
        return torch.stack([self.whiten, *[torch.zeros_like(self.whiten)] * (out - 1)], 1)


def test_of_another_target_the_features_are_scaled_as_the_velocity_is():
    net, posterior, x = case()
    with torch.no_grad():
        net.first.weight.zero_()
    predict = guided(make_objective("x0"), net)
    gain = laplace.gain_of("x0")
    _, got = integrated(predict, net.last, posterior, x, gain, method="euler", steps=4)
    t = torch.tensor([1.0, 0.75, 0.5, 0.25])
    rows = make_objective("x0").row(t)
    phi = 0
    for k in range(4):
        seen = torch.tanh(net.first.bias.view(1, 5, 1, 1) + float(rows[k]) / 1000)
        phi = phi + 0.25 / t[k] * seen.expand(1, 5, 4, 6)
    ones = torch.full((1, 1, 4, 6), float((0.25 / t).sum()))
    torch.testing.assert_close(got[:1], posterior.variance(phi.detach(), ones), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["fm", "ddpm", "v", "x0"])
def test_the_gain_is_how_far_the_velocity_moves_with_the_output(name):
    objective, t, x = make_objective(name), torch.tensor([0.3, 0.6, 0.9]), rand(3, 2, 1, 1)
    low, high = (
        objective.predict(lambda x, k: torch.full_like(x, out), x, t)[2] for out in (0.0, 1.0)
    )
    wanted = laplace.gain_of(objective.what)(t).float()
    torch.testing.assert_close((high - low).abs()[:, 0, 0, 0], wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("cfg", [0.0, 1.0, 3.5])
def test_guidance_mixes_features_of_one_network(cfg):
    """Its variance is that of the mixed output; one feature in both halves is left as it is."""
    net, posterior, x = case()
    predict, t = guided(make_objective("fm"), net, cfg), torch.full((3,), 0.5)
    y = torch.tensor([1, 2, 0])
    with laplace.watching(net.last) as seen:
        before = predict(x, t, y=y)[2]
        phi = laplace.mixed(seen[-1], t, cfg)
        net(x, 1000 * t)
        without = seen[-1]
        net(x, 1000 * t, y=y)
        predicted = seen[-1]
    by = posterior.draws(1, 3)[0]
    with laplace.moved(net.last, by):
        after = predict(x, t, y=y)[2]
    moved = nn.functional.conv2d(phi, by[:, :-1].unflatten(1, (5, 3, 3)), by[:, -1], padding=1)
    torch.testing.assert_close(after - before, moved, rtol=1e-3, atol=1e-4)
    if cfg < 2:  # the variance is that of the half that alone is left: without a label, or with it
        alone = [without, predicted][int(cfg)]
        same = posterior.variance(phi), posterior.variance(alone)
        torch.testing.assert_close(*same, rtol=1e-4, atol=0)
    same = torch.cat([phi, phi])
    torch.testing.assert_close(laplace.mixed(same, t, 7.5), phi, rtol=1e-5, atol=1e-5)


def test_an_image_s_score_is_its_own_and_weights_are_never_written():
    net, posterior, x = case()
    predict = guided(make_objective("fm"), net)
    kept = {key: value.clone() for key, value in net.state_dict().items()}
    _, whole = integrated(predict, net.last, posterior, x, method="euler", steps=3)
    _, alone = integrated(predict, net.last, posterior, x[1:2], method="euler", steps=3)
    scores = laplace.score(whole)
    torch.testing.assert_close(laplace.score(alone), scores[1:2], rtol=1e-5, atol=1e-5)
    walk = lambda: sample(predict, x, method="sde", steps=3, seeds=[4, 5, 6]).x  # noqa: E731
    drawn = shared(walk, net.last, posterior, 2)
    assert torch.equal(drawn, shared(walk, net.last, posterior, 2))
    assert not torch.equal(drawn[0], drawn[1])
    assert all(torch.equal(value, kept[key]) for key, value in net.state_dict().items())


def test_methods_that_features_cannot_follow_are_refused():
    net, posterior, x = case()
    for how in [{"method": "sde"}, {"method": "dopri5"}, {"method": "ddim", "eta": 0.5}]:
        with pytest.raises(ValueError, match="summed up along"):
            integrated(guided(make_objective("fm"), net), net.last, posterior, x, **how)
