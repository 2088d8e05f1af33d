"""Boosting against enlarging without a network, and against itself one image at a time."""

from dataclasses import replace

import pytest
import torch

from diffusion.boosting import Stage, boost
from diffusion.coupling import resize
from diffusion.guidance import guided
from diffusion.sampling import draw, generators
from objectives import make_objective

SEEDS = [3, 4, 2**40]


def same(x):
    return x


def stage(net, noise_aug, told=None):
    cfm = replace(make_objective("cfm"), noise_aug=noise_aug)
    return Stage(cfm.source, guided(cfm, net), same, same, 2, told=told)


def still(x, t, y=None):
    return torch.zeros_like(x[:, :3])  # the other three channels are the small picture's


def small():
    return torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ["euler", "heun", "dopri5"])
def test_two_networks_that_do_nothing_are_two_resizes(method):
    large, costs, *_ = boost([stage(still, 0.0)] * 2, small(), SEEDS, method=method)
    torch.testing.assert_close(large, resize(resize(small(), (8, 8)), (16, 16)), rtol=0, atol=0)
    assert len(costs) == 2


@pytest.mark.parametrize("method", ["euler", "dpmpp_2m", "dopri5"])
def test_a_constant_velocity_is_taken_off_once(method):
    large, *_ = boost([stage(lambda x, t: still(x, t) + 0.5, 0.0)], small(), SEEDS, method=method)
    torch.testing.assert_close(large, resize(small(), (8, 8)) - 0.5, rtol=1e-5, atol=1e-5)


def test_an_image_is_the_same_alone_and_its_stages_have_noises_of_their_own():
    whole, *_ = boost([stage(still, 1.0)] * 2, small(), SEEDS, method="euler", steps=2)
    alone, *_ = boost([stage(still, 1.0)] * 2, small()[1:2], SEEDS[1:2], method="euler", steps=2)
    assert torch.equal(whole[1:2], alone)
    first, *_ = boost([stage(still, 1.0)], torch.zeros(1, 3, 8, 8), [3], method="euler", steps=2)
    assert not torch.equal(first[0], whole[0])  # the second stage's, of the same size
    like = torch.empty(1, 3, 16, 16)
    grey = torch.zeros(2, 3, 8, 8)
    apart, *_ = boost([stage(still, 1.0)], grey, [3, 2**40], method="euler")
    for image, base in zip(apart, draw(generators([3, 2**40]), like)):
        assert not torch.equal(image, base)
    assert not torch.equal(apart[0], apart[1])


def test_labels_reach_only_networks_that_know_them_and_none_is_minus_one():
    seen = []

    def net(x, t, y=None):
        seen.append(y)
        return still(x, t)

    stages = [stage(net, 0.0), stage(net, 0.0, told=lambda y: {"y": y})]
    y = torch.tensor([2, 0, 1])
    _, costs, *_ = boost(stages, small(), SEEDS, y, method="euler", steps=1)
    assert seen[0] is None and torch.equal(seen[1], y)
    assert [c.nfe_each.tolist() for c in costs] == [[1, 1, 1]] * 2
    boost(stages[1:], small(), SEEDS, method="euler", steps=1)
    assert seen[2].tolist() == [-1, -1, -1]


def test_a_method_that_adds_noise_is_refused():
    for method in ("ddpm", "sde", "euler_ancestral", "dpmpp_2m_sde"):
        with pytest.raises(ValueError, match="ODE"):
            boost([stage(still, 0.0)], small(), SEEDS, method=method)
    with pytest.raises(ValueError, match="ODE"):
        boost([stage(still, 0.0)], small(), SEEDS, method="ddim", eta=1.0)


def test_an_image_that_is_lost_in_one_stage_is_named_and_spoils_no_other():
    def breaks(x, t):
        marked = x[:, 3:].flatten(1).mean(1) > 50
        return (still(x, t) + 0.5).masked_fill(marked.view(-1, 1, 1, 1), torch.nan)

    begun = small()
    begun[1] += 100

    for method in ("euler", "dopri5"):
        two = [stage(breaks, 0.0), stage(still, 0.0)]
        large, _, lost, _ = boost(two, begun, SEEDS, method=method)
        assert lost.isnan().tolist() == [True, False, True]
        whole, *_ = boost([stage(lambda x, t: still(x, t) + 0.5, 0.0)], small(), SEEDS)
        torch.testing.assert_close(large[::2], resize(whole, (16, 16))[::2], rtol=1e-5, atol=1e-5)
