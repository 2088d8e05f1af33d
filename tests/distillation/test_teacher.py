"""A teacher under its own schedule, and its captions."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distilling import EPS, stub

from diffusion.schedules import alphas_bar, norm, table_time
from distill import v_target
from distillation import teacher as teachers
from distillation.teacher import Teacher, TeacherFlags, tap_channels, taps
from harness.cli import UserError
from model import PRESETS, UNet
from objectives import make_objective


def test_v_star_and_the_teachers_own_schedule():
    one = lambda v: torch.full((1, 1, 1, 1), v, dtype=torch.float64)
    assert (
        v_target(one(1.0), one(0.5), 0.6, 0.8).item()
        == pytest.approx(-0.5)
        == v_target(1.0, 0.5, 0.6, 0.8)
    )
    assert v_target(one(1.0), one(0.5), 0.0, 1.0).item() == pytest.approx(-500)  # guarded
    a = alphas_bar("scaled_linear").sqrt()
    assert a[999].item() == pytest.approx(0.06826, abs=1e-5) and a[500].item() == pytest.approx(
        0.52567, abs=1e-5
    )
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(4, 3, 4, 4, generator=g) for _ in range(2))
    rows = torch.tensor([0, 250, 500, 999])
    t = table_time("scaled_linear", rows).float()
    fed = []

    def net(x, row, features):  # says the true eps; x tells how it was fed
        fed.append((x, row))
        return eps, {name: x for name in features}

    teacher = stub(net)
    got_x0, got_eps, features = teacher.ask(teacher.noised(x0, eps, t), t)
    own = a[rows].view(-1, 1, 1, 1)
    assert (
        torch.allclose(got_x0, x0, atol=2e-5)
        and torch.allclose(got_eps, eps, atol=2e-5)
        and fed[0][1].tolist() == rows.tolist()
    )
    assert torch.allclose(
        fed[0][0].double(), own * x0 + (1 - own**2).sqrt() * eps, atol=1e-6
    )  # x_t on SD's schedule, not DDPM's
    assert features.keys() == taps(PRESETS["nano"]).keys() and len(fed) == 1


@pytest.mark.parametrize("name", ["nano", "toy-281m", "adm-64", "sd15"])
def test_taps_have_the_channels_they_are_said_to_have(name):
    with torch.device("meta"):
        net = UNet(PRESETS[name])
        side = 2 ** (len(net.cfg.channel_mult) - 1)
        context = torch.zeros(1, 2, net.cfg.context_dim) if net.cfg.context_dim else None
        _, h = net(
            torch.zeros(1, net.cfg.in_channels, side, side),
            torch.zeros(1),
            context=context,
            features=tuple(taps(net.cfg).values()),
        )
    assert {k: h[block].shape[1] for k, block in taps(net.cfg).items()} == tap_channels(net.cfg)


def test_captions_depend_on_seed_and_position_alone():
    teacher = Teacher(
        None,
        EPS,
        {},
        Path("stub"),
        {"context": torch.arange(5.0).view(5, 1, 1), "y": torch.arange(5.0).view(5, 1)},
    )
    at = lambda seed, positions: (
        teacher.text(seed, torch.tensor(positions), len(positions))["context"].flatten().tolist()
    )
    drawn = at(0, list(range(40)))
    assert (
        len(set(drawn)) == 5
        and at(0, [7, 3]) == [drawn[7], drawn[3]]
        and at(1, list(range(40))) != drawn
    )
    both = teacher.text(0, torch.arange(40), 40)
    assert both["y"].flatten().tolist() == drawn and teacher.text(0, None, 3)[
        "context"
    ].flatten().tolist() == [0, 0, 0]


def test_noise_as_the_source_shows_the_network_unit_noise_at_every_t():
    teacher, eps, t = stub(lambda: None), torch.randn(3, 3, 4, 4), torch.tensor([0.1, 0.5, 0.9])
    x = teacher.noised(torch.ones_like(eps), eps, t, "noise")
    assert torch.allclose(x / norm(t).view(-1, 1, 1, 1), eps, atol=1e-6)
    assert torch.equal(stub(lambda: None, make_objective("fm")).noised(eps, eps, t, "noise"), eps)


LONG = "0.0015,0.0195,scaled_linear"
WHOLE = asdict(make_objective("v", table=LONG, zero_snr=True))


@pytest.mark.parametrize(
    "meta, flags, wanted",
    [
        ({"objective": "v"}, dict(teacher_betas="0.0015,0.0195,sqrt"), ("v", LONG, False)),
        (
            {"objective": "v", "schedule": {"zero_snr": True}},
            dict(teacher_table="linear"),
            ("v", "linear", True),
        ),
        (
            {"objective": "v"},
            dict(teacher_table="scaled_linear", teacher_zero_snr=True),
            ("v", "scaled_linear", True),
        ),
        (
            {"objective": None},
            dict(teacher_objective="x0", teacher_betas=LONG, teacher_zero_snr=True),
            ("x0", LONG, True),
        ),
        ({"objective": WHOLE}, dict(teacher_betas=LONG, teacher_zero_snr=True), ("v", LONG, True)),
        ({"objective": WHOLE}, dict(teacher_betas="0.0015,0.02,sqrt"), "Leave them out"),
        (
            {"objective": {**WHOLE, "zero_snr": False}},
            dict(teacher_zero_snr=True),
            "without zero SNR.  Leave them out",
        ),
        (
            {"objective": "v", "schedule": {"zero_snr": False}},
            dict(teacher_table="linear", teacher_zero_snr=True),
            "does not end in pure noise",
        ),
        ({"objective": "eps"}, dict(teacher_table="linear", teacher_zero_snr=True), "target eps"),
        ({"objective": "v"}, dict(teacher_zero_snr=True), "--teacher-betas START,END,SCHEDULE"),
        ({"objective": "fm"}, dict(teacher_zero_snr=True), "is fm, which has none"),
        (
            {"objective": "v"},
            dict(teacher_table="linear", teacher_betas=LONG),
            "is not --teacher-table linear",
        ),
        ({"objective": "edm", "schedule": {}}, {}, "edm, which this code cannot draw"),
    ],
)
def test_any_schedule_of_a_teacher_can_be_said_where_its_file_is_silent(meta, flags, wanted):
    flags = TeacherFlags("f", **flags)
    if isinstance(wanted, str):
        with pytest.raises(UserError, match=wanted):
            teachers.teacher_objective(meta, "f", **flags.says)
        return
    o = teachers.teacher_objective(meta, "f", **flags.says)
    assert (o.target, o.table, o.zero_snr) == wanted


@pytest.mark.parametrize(
    "classes, names, message",
    [
        (["a", "b"], ["a", "b"], ""),
        (["a", "b"], None, ""),
        (["b", "a"], ["a", "b"], "--classes are b, a, but the teacher's are a, b"),
        (["a"], ["a", "b"], "--classes has 1, but the teacher knows 2"),
    ],
)
def test_a_students_classes_are_its_teachers_in_their_order(classes, names, message):
    meta = {} if names is None else {"classes": names}
    net = SimpleNamespace(cfg=SimpleNamespace(num_classes=2))
    teacher = Teacher(net, make_objective("fm"), meta, Path("f"), {})
    if not message:
        teacher.check_classes(classes)
        return
    with pytest.raises(UserError, match=message):
        teacher.check_classes(classes)


def test_a_network_of_another_kind_is_no_teacher(monkeypatch):
    source = SimpleNamespace(cfg=SimpleNamespace(in_channels=4, out_channels=4), meta={})
    monkeypatch.setattr(teachers, "open_unet", lambda name: source)
    with pytest.raises(UserError, match="other.safetensors holds no U-Net or transformer"):
        teachers.describe_teacher("other.safetensors", "fm")
