"""The assessor: its formulas against closed forms, its network, what it reads."""

import math

import pytest
import torch
from distilling import (
    home,  # noqa: F401
    planted,
)

import distillation.teacher as teacher_file
from distill import fuse, kd_cosine
from distillation.assessor import (
    MIN_VOLUME,
    ROLES,
    ROSE_T,
    Assessor,
    AssessorConfig,
    block_weights,
    cantor,
    entropy,
    fresh_assessor,
    load_assessor,
    rose_loss,
    rose_scores,
    same_bin_gap,
    simplex,
)
from distillation.teacher import tap_channels, taps
from distillation.timesteps import bins_of
from harness.cli import UserError
from model import PRESETS, UNet


def test_fuse_is_the_clipped_sum_for_floats_and_tensors():
    assert fuse(0.8, 0.3, 0.45, 1.2) == pytest.approx(1.935)
    for w, wanted in ((0.7, 2.5743), (0.9, 3.0), (1.2, 3.0)):
        assert fuse(math.log(100), 1.0, 0.5, w) == pytest.approx(wanted, abs=1e-4)
    assert fuse(0.0, 0.0, 1.0, 0.3) == 0.5 and [
        fuse(0.0, 0.0, 1.0, w) for w in (0.7, 1.0, 1.2)
    ] == [0.7, 1.0, 1.2]
    assert (
        fuse(0.0, 0.0, 7.0, 1.0) == 1.0 and fuse(0.0, 0.0, -7.0, 1.0) == 1.25
    )  # coh is clipped first
    w, e_t = torch.tensor([1.2, 0.7]), torch.tensor([0.8, math.log(100)])
    assert fuse(
        e_t, torch.tensor([0.3, 1.0]), torch.tensor([0.45, 0.5]), w
    ).tolist() == pytest.approx([1.935, 2.5743], abs=1e-4)
    with pytest.raises(UserError, match="smaller one first"):
        fuse(0.0, 0.0, 1.0, 1.0, lo=3.0, hi=0.5)


def test_e_t_is_cross_entropy_in_nats_and_e_p_entropy_over_the_log_of_all_classes():
    net = Assessor(AssessorConfig({"mid": 6}, bins=8, patterns=125, dim=8)).frozen()
    features, bins = {"mid": torch.randn(5, 6, 4, 4)}, torch.tensor([3] * 5)
    planted(None, net.blocks["mid"], torch.zeros(8), torch.zeros(1000))
    assert net.assess(features, bins)["mid"].tolist() == pytest.approx(
        [2.079442, 1.0, 0.5], abs=1e-6
    )
    planted(None, net.blocks["mid"], 1000.0 * torch.eye(8)[3], 1000.0 * torch.eye(1000)[7])
    assert net.assess(features, bins)["mid"].tolist() == pytest.approx([0.0, 0.0, 0.5], abs=1e-6)
    logits = lambda n: torch.where(torch.arange(1000) < n, 0.0, -1e4)
    assert entropy(logits(2)).item() == pytest.approx(0.100343, abs=1e-6) and entropy(
        logits(10)
    ).item() == pytest.approx(1 / 3, abs=1e-6)


def test_kd_compares_directions_of_means_over_space_and_leaves_the_teacher_alone():
    a, b = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[0.0, 3], [0, 5]])
    assert kd_cosine(a, b).item() == pytest.approx(0.5)
    g = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(3, 7, 4, 4, generator=g),
        torch.randn(3, 7, 4, 4, generator=g, requires_grad=True),
    )
    shuffled = x.flatten(2)[:, :, torch.randperm(16, generator=g)].view_as(x)
    x.requires_grad_()
    assert kd_cosine(3 * shuffled, y).item() == pytest.approx(
        kd_cosine(x, y).item(), abs=1e-6
    ) and kd_cosine(x, x).item() == pytest.approx(0, abs=1e-6)
    kd_cosine(x, y).backward()
    assert (
        y.grad is None
        and x.grad.abs().sum() > 0
        and kd_cosine(x.bfloat16(), y.bfloat16()).dtype == torch.float32
    )


def test_the_cantor_staircase():
    x = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)
    assert cantor(x).tolist() == pytest.approx(
        [0.000171, 0.353116, 0.499878, 0.646640, 0.999585], abs=1e-6
    )
    assert cantor(
        torch.tensor([0.1, 0.9], dtype=torch.float64), levels=3
    ).tolist() == pytest.approx([0.16445, 0.71055], abs=1e-5)
    assert cantor(torch.tensor([0.5], dtype=torch.float64), levels=1).item() == pytest.approx(
        0.25, abs=1e-9
    )
    u = torch.linspace(0.001, 0.999, 97, dtype=torch.float64)
    assert (
        cantor(u) + cantor(1 - u) - 0.999756
    ).abs().median() < 1e-5  # but at jumps, where u and 1 - u fall on different sides
    net = Assessor(AssessorConfig({"mid": 6}, bins=20, patterns=2, dim=8)).frozen()
    features, bins = torch.randn(7, 6), torch.arange(7)
    together = net({"mid": features}, bins)["mid"]["cantor"]
    alone = torch.cat(
        [net({"mid": features[i : i + 1]}, bins[i : i + 1])["mid"]["cantor"] for i in range(7)]
    )
    assert torch.allclose(
        together, alone, atol=1e-5
    )  # the source divides by the batch's largest bin


def test_a_simplexs_volume_by_cayley_and_menger():
    regular = torch.eye(5, dtype=torch.float64) / math.sqrt(2)  # edge 1
    volume, variation = simplex(regular)
    assert volume.item() == pytest.approx(math.sqrt(5) / 96) == pytest.approx(
        0.0232924, abs=1e-7
    ) and variation.item() == pytest.approx(0, abs=1e-12)
    q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    assert simplex(3 * regular @ q + 7)[0].item() == pytest.approx(81 * volume.item())
    flat = torch.randn(5, 6, dtype=torch.float64)
    flat[4] = flat[:4].mean(0)
    flat.requires_grad_()
    volume, _ = simplex(flat)
    volume.backward()
    assert volume.item() == 0 and torch.isfinite(flat.grad).all()
    centred = regular - regular.mean(0)
    assert torch.linalg.det(centred @ centred.T).item() == pytest.approx(
        0, abs=1e-12
    )  # why there is no Gram term


def test_rose_scores_and_margin():
    assert sum(ROLES) == 1.0
    z = torch.nn.functional.normalize(torch.randn(4, 6, dtype=torch.float64), dim=-1)
    for i in range(4):
        scores = rose_scores(z[i : i + 1], torch.stack([z[i].expand(5, 6), -z[i].expand(5, 6)]))
        assert (
            scores[0].tolist() == pytest.approx([1 / ROSE_T, -1 / ROSE_T])
            and rose_loss(scores, torch.tensor([0])).item() == 0
        )
        twins = rose_scores(z[i : i + 1], z[i].expand(2, 5, 6))
        assert rose_loss(twins, torch.tensor([1])).item() == pytest.approx(1.0)


def test_base_weights_are_the_sources_at_four_levels():
    assert list(block_weights(PRESETS["sd15"]).values()) == [
        0.7,
        0.9,
        1.0,
        1.1,
        1.2,
        1.1,
        1.0,
        0.9,
        0.7,
    ]
    assert list(tap_channels(PRESETS["sd15"]).values()) == [
        320,
        640,
        1280,
        1280,
        1280,
        1280,
        1280,
        640,
        320,
    ]
    cfg = AssessorConfig(tap_channels(PRESETS["sd15"]))
    with torch.device("meta"):
        assert sum(p.numel() for p in Assessor(cfg).parameters()) == 9_465_406


def test_liveness_a_corrupted_block_and_no_other_is_noticed(home):
    net, g = load_assessor(home / "a.safetensors"), torch.Generator().manual_seed(3)
    teacher = teacher_file.open_teacher(str(home / "teacher.safetensors"))
    row = torch.randint(1000, (64,), generator=g)
    t, x0, eps = (
        teacher.time(row),
        torch.rand(64, 192, 4, 4, generator=g) * 2 - 1,
        torch.randn(64, 192, 4, 4, generator=g),
    )
    features, bins = teacher.ask(teacher.noised(x0, eps, t), t)[2], bins_of(row, 10)
    before, lam = (
        net.assess(features, bins),
        lambda found: {k: fuse(*v, 0.5) for k, v in found.items()},
    )
    for name, x in features.items():
        noise = (
            torch.randn(*x.shape[:2], 1, 1, generator=g) * x.mean((2, 3)).std(0)[:, None, None]
        )  # of one size a channel: it survives the mean
        after = net.assess({**features, name: x + 2 * noise}, bins)
        assert (
            after[name][0] > before[name][0] + 0.2 and lam(after)[name] > lam(before)[name] + 0.02
        )
        assert all(torch.equal(after[k], before[k]) for k in features if k != name)
    swapped = net.assess(features, bins.roll(1))
    assert all(swapped[k][0] > before[k][0] for k in features)
    halves = [
        lam(net.assess({k: v[s] for k, v in features.items()}, bins[s]))
        for s in (slice(0, 32), slice(32, 64))
    ]
    assert all(halves[0][k] != halves[1][k] for k in features)
    for wrong in (
        {k: v for k, v in features.items() if k != "mid"},
        {**features, "up_9": features["mid"]},
    ):
        with pytest.raises(UserError, match="the assessor reads down_0"):
            net.assess(wrong, bins)
    assert (
        net.assess({k: v.bfloat16() for k, v in features.items()}, bins)["mid"].dtype
        == torch.float32
    )


def test_assessing_draws_nothing_from_the_global_generator(home):
    state = torch.get_rng_state()
    net = load_assessor(home / "a.safetensors")
    net.assess(
        {k: torch.ones(2, C) for k, C in net.cfg.blocks.items()}, torch.tensor([1, 1]), "data"
    )
    fresh_assessor(net.cfg, 7)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("target", ["nearest", "zero"])
def test_pattern_targets(target):
    """zero: always pattern 0 of the bin, as in the source. nearest: the bin's own crystals nearest
    to z, and no other bin's."""
    cfg = AssessorConfig({"mid": 6}, bins=3, patterns=4, dim=8, pattern_target=target)
    net = fresh_assessor(cfg, 0).eval().blocks["mid"]
    x, bins = (
        torch.randn(5, 6, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 1, 2, 1, 0]),
    )
    z = net(x, bins)["z"]
    near = torch.einsum(
        "bpd,bd->bp", torch.nn.functional.normalize(net.crystals.mean(2), dim=-1)[bins], z
    )
    wanted = (
        (near / 0.1).softmax(1)
        if target == "nearest"
        else torch.eye(4)[torch.zeros(5, dtype=torch.long)]
    )
    logp = net(x, bins)["p_logits"].log_softmax(1).view(5, 3, 4)[torch.arange(5), bins]
    ce = (
        torch.nn.functional.cross_entropy(net(x, bins)["t_logits"], bins)
        - (wanted * logp).sum(1).mean()
    ) / 2
    losses = net.losses(x, bins)
    assert losses["ce"].item() == pytest.approx(ce.item(), rel=1e-5) and losses[
        "feature"
    ].item() == pytest.approx(0, abs=1e-6)
    pattern = near.argmax(1) if target == "nearest" else torch.zeros(5, dtype=torch.long)
    assert losses["rose"].item() == pytest.approx(
        rose_loss(rose_scores(z, net.crystals.flatten(0, 1)), bins * 4 + pattern).item(), rel=1e-5
    )
    assert (
        0 <= losses["diversity"] <= math.log(12)
        and losses["cayley"] >= 0.5 * simplex(net.crystals.flatten(0, 1))[1].mean() - 1e-6
        and MIN_VOLUME > 0
    )


def test_heads_with_a_hidden_layer_learn_what_linear_ones_cannot(tmp_path):
    """Two bins on a line, interleaved: z (2-d, a projection that is kept as it is) can be cut by a
    curve only."""
    z = torch.nn.functional.normalize(
        torch.tensor(
            [[math.cos(a), math.sin(a)] for a in torch.linspace(0, 2 * math.pi, 201)[:-1].tolist()]
        ),
        dim=1,
    )
    bins, right = (torch.arange(200) // 50) % 2, {}
    for head in ("linear", "mlp"):
        net = fresh_assessor(AssessorConfig({"mid": 2}, bins=2, patterns=1, dim=2, head=head), 0)
        companion = net.blocks["mid"]
        optimizer = torch.optim.AdamW(companion.t_head.parameters(), lr=0.05)
        for _ in range(300):
            loss = torch.nn.functional.cross_entropy(companion.t_head(z), bins)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        right[head] = float((companion.t_head(z).argmax(1) == bins).float().mean())
        net.save(tmp_path / f"{head}.safetensors", {})
        again = load_assessor(tmp_path / f"{head}.safetensors")
        assert again.cfg.head == head and torch.equal(
            again.blocks["mid"].t_head(z), companion.t_head(z)
        )
    assert right["linear"] < 0.8 < right["mlp"]


def test_coherence_of_data_is_by_pairs_of_one_bin():
    c, bins = torch.tensor([0.1, 0.3, 0.9, 0.4]), torch.tensor([2, 2, 5, 2])
    gaps = [0.2, 0.3, 0.1]  # of bin 2; bin 5 has no pair
    assert same_bin_gap(c, bins, distinct=True).item() == pytest.approx(sum(gaps) / 3)
    assert same_bin_gap(c, bins, distinct=False).item() == pytest.approx(
        2 * sum(gaps) / (9 + 1)
    )  # the source's counts i = j
    assert same_bin_gap(c, torch.arange(4), distinct=True).item() == 0
    net = Assessor(AssessorConfig({"mid": 6}, bins=8, patterns=2, dim=8)).frozen()
    x = {"mid": torch.randn(4, 6)}
    gap = same_bin_gap(net(x, bins)["mid"]["cantor"], bins, distinct=True)
    assert (
        net.assess(x, bins, "data")["mid"][2].item() == pytest.approx(math.exp(-gap.item() / 0.1))
        and net.assess(x, bins)["mid"][2].item() == 0.5
    )


def test_the_assessor_is_a_small_part_of_a_steps_arithmetic():
    """At the default size (tiny, latents of side 8) and the source's K, P and D.

    Multiplications are counted, for a clock would measure the machine.
    """
    from torch.utils.flop_counter import FlopCounterMode

    net, x, t = UNet(PRESETS["tiny"]), torch.zeros(4, 32, 8, 8), torch.zeros(4)
    judge = Assessor(AssessorConfig(tap_channels(net.cfg))).frozen()
    with FlopCounterMode(display=False) as step:
        with torch.no_grad():
            net(x, t)  # the teacher
        out, h = net(x, t, features=tuple(taps(net.cfg).values()))
        out.sum().backward()
    with FlopCounterMode(display=False) as assessing:
        judge.assess(
            {k: h[block].detach() for k, block in taps(net.cfg).items()},
            torch.zeros(4, dtype=torch.long),
        )
    assert 0 < assessing.get_total_flops() < 0.15 * step.get_total_flops()
