"""What --dry-run says of a run's memory, against the run's own tensors; and who is refused."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch

import train
import training.plan
from harness.cli import UserError
from harness.ranks import Ranks, autocast
from miniature import write_pictures
from model import PRESETS, build
from training.casts import cast_together
from training.plan import Plan, activations, check_plan, plan_of, vae_by_name
from training.precision import inputs_of
from training.start import largest_shape
from vae import pixel

ALONE = Ranks(0, 1, torch.device("cpu"))
ON_A_GPU = Ranks(0, 1, torch.device("cuda"))
FAST = dict(
    model="nano",
    data="toyfaces:24",
    resolution=32,
    batch=8,
    images=16,
    preview_every=0,
    eval_every=0,
    save_every=0,
)


def config(out, **fields):
    return train.resolve(train.Config(**{**FAST, "out": str(out), **fields}))


def flags(**fields):
    usual = dict(batch=1, accum=1, optim="adamw8bit", weights="bf16", dtype="bf16", ema=())
    return SimpleNamespace(**{**usual, "checkpointing": False, **fields})


def bytes_of(tensors) -> int:
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize(
    "optim, weights",
    [("adamw", "fp32"), ("adamw8bit", "fp32"), ("adamw32bit", "fp32"), ("adamw8bit", "bf16")],
)
def test_the_state_is_that_of_a_run_to_the_byte(tmp_path, monkeypatch, optim, weights):
    tr = train.setup(config(tmp_path, optim=optim, weights=weights), ALONE)
    seen, real = [], train.update

    def watched(tr, norm):
        seen.append(bytes_of(p.grad for p in tr.params.values()))
        real(tr, norm)

    monkeypatch.setattr(train, "update", watched)
    with contextlib.closing(train.load(tr)) as loader:
        train.step(tr, loader)
    plan = plan_of(build(tr.net.cfg), tr.vae, tr.latent_shape, tr.cfg, ALONE)
    moments = [
        value
        for state in tr.optimizer.state.values()
        for key, value in state.items()
        if key not in ("step", "order")
    ]
    assert plan.weights == bytes_of(tr.net.state_dict().values())
    assert plan.gradients == seen[0]
    assert plan.moments == bytes_of(moments)
    averages = [e for average in tr.ema.weights.values() for e in average.values()]
    assert plan.averages == bytes_of(averages)
    assert plan.autoencoder == bytes_of(tr.vae.state_dict().values())


@pytest.mark.parametrize("dtype, weights", [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")])
@pytest.mark.parametrize("model", ["nano", "sit-nano"])
def test_activations_are_what_autograd_keeps_of_a_real_pass(monkeypatch, model, dtype, weights):
    monkeypatch.setenv("KERNELS", "torch")
    net_cfg, shape = PRESETS[model], (PRESETS[model].in_channels, 8, 8)
    net = build(net_cfg)
    for p in net.parameters():
        p.data = p.data.to(torch.bfloat16 if weights == "bf16" else torch.float32)
    own = {t.untyped_storage().data_ptr() for t in [*net.parameters(), *net.buffers()]}
    kept = {}

    def keep(x):
        memory = x.untyped_storage()
        if memory.data_ptr() not in own:
            kept[memory.data_ptr()] = memory
        return x

    inputs = inputs_of(net_cfg, 4, shape)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        with autocast(ALONE.device, dtype):
            out = cast_together(net)(**inputs)
    real = sum(memory.nbytes() for memory in kept.values())
    cfg = flags(batch=8, accum=2, dtype=dtype, weights=weights)
    planned = activations(net_cfg, shape, cfg, ALONE)
    assert out.requires_grad and planned == real > 100_000


def test_kernels_keep_less_and_counting_them_prints_nothing(capfd):
    cfg = flags(batch=8)
    by_kernels = activations(PRESETS["nano"], (32, 8, 8), cfg, ON_A_GPU)
    by_torch = activations(PRESETS["nano"], (32, 8, 8), cfg, ALONE)
    assert 0.2 * by_torch < by_kernels < 0.8 * by_torch
    assert capfd.readouterr().err == ""


def test_sdxls_state_is_6_bytes_a_parameter_and_trains_on_24_gib(monkeypatch):
    """From the real config, on meta: bf16 weights, gradients and 8-bit moments, one image of
    1024×1024. Codes take 2 bytes a parameter, their scales 2 · 4 / 256; small tensors more."""
    with torch.device("meta"):
        net = build(PRESETS["sdxl"])
    numbers = sum(p.numel() for p in net.parameters())
    given, vae = flags(text="sdxl:FILE"), vae_by_name(flags(vae="sdxl", data="x"))
    plan = plan_of(net, vae, (4, 128, 128), given, ON_A_GPU)
    state = (plan.weights + plan.gradients + plan.moments) / numbers
    assert numbers == 2_567_463_684
    assert state == pytest.approx(6 + 8 / 256, abs=0.01)
    assert plan.autoencoder == pytest.approx(4 * 83_653_863)
    # Both encoders, by their counts; of a layer of width d, 12 d² + 9 d are of matrices in bf16.
    matrices = sum(n * (12 * d**2 + 9 * d) for n, d in ((12, 768), (32, 1280))) + 1280**2
    assert plan.encoders == 4 * (123_060_480 + 694_659_840) - 2 * matrices
    assert plan.peak < 24 * 2**30
    # As train.py would have it by default: 4 + 4 + 8 + 2 · 4 bytes a parameter.
    monkeypatch.setattr(training.plan, "activations", lambda *args: 0)
    usual = flags(optim="adamw", weights="fp32", ema=(0.05, 0.1))
    full = plan_of(net, pixel(), (4, 128, 128), usual, ON_A_GPU)
    parts = full.weights, full.gradients, full.moments, full.averages
    assert parts == (4 * numbers, 4 * numbers, 8 * numbers, 8 * numbers)
    assert full.peak > 48 * 2**30


def test_a_step_needs_the_larger_of_gradients_and_activations_or_both():
    plan = Plan(1, 20, 300, 4_000, 50_000, 7, at_once=False)
    assert plan.peak == 1 + 300 + 4_000 + 50_000 + 20
    assert plan._replace(activations=100).peak == 54_301 + 100
    assert plan._replace(at_once=True).peak == 54_301 + 27


@pytest.mark.parametrize("accum, ranks, at_once", [(1, 1, False), (2, 1, True), (1, 2, True)])
def test_gradients_stay_with_micro_batches_and_ranks(accum, ranks, at_once):
    cfg = flags(batch=4, accum=accum)
    world = Ranks(0, ranks, torch.device("cpu"))
    assert plan_of(build(PRESETS["nano"]), pixel(), (32, 8, 8), cfg, world).at_once is at_once


def test_no_room_on_a_gpu_is_one_line_before_anything_is_written(tmp_path, monkeypatch, user):
    """A GPU of 5 MB is faked; the plan of this run is what it would be there."""
    monkeypatch.setattr(training.plan, "capacity", lambda device: 5_000_000)
    monkeypatch.setattr(train, "check_plan", lambda *args: check_plan(*args[:-1], ON_A_GPU))
    words = [w for k, v in FAST.items() for w in (f"--{k.replace('_', '-')}", v)]
    words += ["--dtype", "bf16"]  # auto would ask the GPU
    code, _, errors = user(train.main, *words, "--out", tmp_path / "r")
    assert code == 2 and len(errors) == 1 and not (tmp_path / "r").exists()
    assert "and this GPU has 0.0 GB" in errors[0] and "averages 0.0" in errors[0]
    assert errors[0].endswith(
        "Raise --accum, or drop --ema widths, or add --ema-device cpu, or add --checkpointing, "
        "or add --optim adamw8bit, or add --weights bf16."
    )


def test_what_helps_is_what_can_be_changed(monkeypatch):
    monkeypatch.setattr(training.plan, "capacity", lambda device: 1_000)
    net = build(PRESETS["nano"])
    most = dict(checkpointing=True)
    with pytest.raises(UserError, match="Choose a smaller --model.$"):
        check_plan(net, pixel(), (32, 8, 8), flags(**most), ON_A_GPU)
    with pytest.raises(UserError, match="  Add --weights bf16.$"):
        check_plan(net, pixel(), (32, 8, 8), flags(**most, weights="fp32"), ON_A_GPU)
    with pytest.raises(UserError, match="  Add --checkpointing.$"):
        check_plan(net, pixel(), (32, 8, 8), flags(), ON_A_GPU)
    check_plan(net, pixel(), (32, 8, 8), flags(), ALONE)  # a CPU may have a disk to swap to
    monkeypatch.setattr(training.plan, "capacity", lambda device: 10**9)
    check_plan(net, pixel(), (32, 8, 8), flags(), ON_A_GPU)


@pytest.mark.parametrize("there, fits", [(1e9, "it fits"), (1e6, "it does not fit")])
def test_a_dry_run_prints_the_table_beside_the_config(tmp_path, monkeypatch, user, there, fits):
    monkeypatch.setattr(training.plan, "capacity", lambda device: int(there))
    words = [w for k, v in FAST.items() for w in (f"--{k.replace('_', '-')}", v)]
    words += ["--accum", 2, "--optim", "adamw8bit", "--weights", "bf16", "--device", "cpu"]
    words += ["--text", "clip-l:FILE"]
    code, out, lines = user(train.main, *words, "--out", tmp_path / "r", "--dry-run")
    assert code == 0 and json.loads(out)["dtype"] == "bf16" and not (tmp_path / "r").exists()
    rows = {line.split("  ")[1].strip(): line for line in lines[1:]}
    assert [*rows] == [*Plan._fields[:6], "encoders", "a step"]
    assert "of --text clip-l:FILE" in rows["encoders"] and "0.492" in rows["encoders"]
    assert "of 4 images in bf16" in rows["activations"]
    sizes = {name: float(line.split()[1 + (name == "a step")]) for name, line in rows.items()}
    step = sizes.pop("a step")
    assert step == pytest.approx(sum(sizes.values()), abs=0.004)  # --accum keeps the gradients
    assert f"this machine has {there / 1e9:.1f}: {fits}" in rows["a step"]


@pytest.mark.parametrize(
    "name, shape",
    [
        ("pca", (32, 32, 32)),
        ("pixel:8", (192, 32, 32)),
        ("sd", (4, 32, 32)),
        ("flux1", (16, 32, 32)),
        ("flux2", (32, 32, 32)),
        ("flux2:packed128", (128, 16, 16)),
    ],
)
def test_latents_are_known_before_anything_is_fetched(name, shape):
    assert vae_by_name(flags(vae=name, data="x")).latent_shape(256) == shape


def test_an_autoencoder_that_only_its_file_knows_is_said_to_be_unknown(tmp_path, user):
    words = ["--vae", "hf:someone/something", "--out", tmp_path / "r", "--dry-run"]
    code, out, lines = user(train.main, *words)
    assert code == 0 and json.loads(out)["vae"] == "hf:someone/something"
    assert lines == ["memory: known once the autoencoder of --vae hf:someone/something was fetched"]


def test_averages_in_host_memory_take_nothing_of_a_gpu(monkeypatch):
    monkeypatch.setattr(training.plan, "capacity", lambda device: 10**9)
    cfg, net = flags(ema=(0.05, 0.1), ema_device="cpu"), build(PRESETS["nano"])
    there = plan_of(net, pixel(), (32, 8, 8), flags(ema=(0.05, 0.1)), ON_A_GPU)
    host = plan_of(net, pixel(), (32, 8, 8), cfg, ON_A_GPU)
    assert host.averages == 0 and host.host == there.averages > 0 == there.host
    assert there.peak - host.peak == there.averages
    lines = training.plan.table(host, cfg, 1, "pixel", ON_A_GPU).splitlines()
    assert any(f"; {host.host / 1e9:.3f} in host memory" in line for line in lines)
    # Where a CPU trains, host memory is what it trains in.
    assert plan_of(net, pixel(), (32, 8, 8), cfg, ALONE).averages == there.averages


@pytest.mark.parametrize("shard", ["none", "full"])
def test_of_buckets_the_largest_is_counted_whoever_holds_the_network(tmp_path, monkeypatch, shard):
    """64×128 pixels are more than the square's 80×80, and within 92×92."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    bucketed = dict(buckets=True, area="92x92", step=16, resolution=64, shard=shard)
    cfg, world = config(tmp_path, **bucketed), Ranks(0, 2, torch.device("cpu"))
    assert cfg.resolution == 80
    net, vae = build(PRESETS["nano"]), vae_by_name(cfg)
    plan = plan_of(net, vae, largest_shape(cfg, vae), cfg, world)
    each = {
        size: activations(net.cfg, (32, size[1] // 8, size[0] // 8), cfg, world)
        for size in cfg.bucket_sizes().sizes
        if size[0] * size[1] >= 80 * 80
    }
    assert plan.activations == max(each.values()) == each[64, 128] > 1.1 * each[80, 80]
    parts, whole = 2 if shard == "full" else 1, sum(p.nbytes for p in net.parameters())
    assert plan.gradients == whole // parts and plan.averages == 2 * whole // parts
    monkeypatch.setattr(training.plan, "place_here", lambda: (0, 2))
    told = training.plan.memory_text(cfg, train.objective_of(cfg)).splitlines()
    row = next(line for line in told if line.strip().startswith("activations"))
    assert float(row.split()[1]) == pytest.approx(plan.activations / 1e9, abs=1e-3)


def test_a_run_with_buckets_asks_for_room_for_its_largest(tmp_path, monkeypatch):
    shapes = []
    keep = lambda what, micro, side, shape, *_: shapes.append(shape)  # noqa: E731
    monkeypatch.setattr(training.start, "check_batch_memory", keep)
    monkeypatch.setattr(train, "check_plan", lambda net, vae, shape, *_: shapes.append(shape))
    data = str(write_pictures(tmp_path / "pictures", 1))
    small = dict(model="nano", data=data, vae="pixel:8", batch=2, images=2, dtype="fp32")
    words = dict(buckets=True, area="92x92", step=16, out=str(tmp_path / "runs"), workers=0)
    train.setup(train.resolve(train.Config(**small, **words)), ALONE)
    assert [sorted(shape[1:]) for shape in shapes] == [[8, 16]] * 2  # 64×128 pixels, not 80×80
