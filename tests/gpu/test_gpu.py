"""What needs a GPU, beside the numeric kernel tests, which run there too:

TWINPATH_GPU=1 python -m pytest tests/gpu tests/kernels
"""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file

import train
from conftest import randomize
from kernels.adamw8bit import AdamW8bit
from kernels.attention import attention, attention_ref
from kernels.groupnorm import group_norm_silu
from model import PRESETS, UNet
from training.nonfinite import conclude

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TWINPATH_GPU") != "1",
    reason="needs a CUDA GPU and TWINPATH_GPU=1 (which compiles kernels, not interprets them)",
)
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def tensors_begin_on_the_cpu():
    """As for users; the kernels' tests, in the same process, let them begin on the GPU."""
    device = torch.get_default_device()
    torch.set_default_device(None)
    yield
    torch.set_default_device(device)


def test_a_unet_step_can_be_captured_in_a_cuda_graph(monkeypatch):
    net, x, t = nano(monkeypatch)
    x = x.contiguous(memory_format=torch.channels_last)

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = (net(x, t).float() - 1).square().mean()
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            net.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(stream)
    net.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    graph.replay()
    captured = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    assert torch.equal(step(), loss)
    # deterministic kernels
    assert all(
        torch.equal(p.grad, captured[n]) for n, p in net.named_parameters() if p.grad is not None
    )


def nano(monkeypatch):
    """nano on the GPU with our kernels, deterministic; and inputs for it."""
    monkeypatch.setenv("KERNELS", "triton")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    return (
        randomize(UNet(PRESETS["nano"])).cuda(),
        torch.randn(8, 32, 8, 8, device="cuda"),
        torch.rand(8, device="cuda") * 1000,
    )


def gradients(model, net, x, t):
    """(output, gradient of every parameter) of one bf16 step of model, which is net or wraps it."""
    net.zero_grad(set_to_none=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = model(x, t)
    (y.float() - 1).square().mean().backward()
    return y.detach(), {n: p.grad.detach().clone() for n, p in net.named_parameters()}


def distance(a, b):
    """Relative, Frobenius."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def test_the_unet_compiles_whole_and_equals_eager_in_bf16(monkeypatch):
    net, x, t = nano(monkeypatch)
    torch._dynamo.reset()
    y, grads = gradients(net, net, x, t)
    fast, fast_grads = gradients(torch.compile(net, fullgraph=True), net, x, t)
    assert distance(fast, y) < 2e-2
    assert (
        distance(*(torch.cat([g.flatten() for g in gs.values()]) for gs in (fast_grads, grads)))
        < 3e-2
    )


@pytest.mark.skipif(not dist.is_available() or not dist.is_nccl_available(), reason="needs NCCL")
def test_ddp_gives_the_same_gradients(monkeypatch, tmp_path):
    net, x, t = nano(monkeypatch)
    twin = copy.deepcopy(net)
    y, grads = gradients(net, net, x, t)
    dist.init_process_group(
        "nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(
            twin, device_ids=[torch.cuda.current_device()], gradient_as_bucket_view=True
        )
        ddp_y, ddp_grads = gradients(wrapped, twin, x, t)
        assert torch.equal(y, ddp_y) and all(torch.equal(grads[n], ddp_grads[n]) for n in grads)
    finally:
        dist.destroy_process_group()


def test_adamw8bit_can_be_captured_in_a_cuda_graph(monkeypatch):
    """Replays read gradients, learning rate and step counts from where they were captured.

    Bitwise what eager steps do.
    """
    monkeypatch.setenv("KERNELS", "triton")
    # the last keeps fp32 state
    g = torch.Generator("cpu").manual_seed(0)
    shapes = [(64, 32, 3, 3), (96, 128), (257, 19), (64,)]
    randn = lambda shape: torch.randn(shape, generator=g, device="cpu").cuda()
    starts, feed = [randn(s) for s in shapes], [[randn(s) for s in shapes] for _ in range(8)]
    starts[0] = starts[0].contiguous(memory_format=torch.channels_last)

    def make():
        params = [p.clone().requires_grad_() for p in starts]
        for p in params:
            p.grad = torch.zeros_like(p)
        return params, AdamW8bit(params, lr=torch.tensor(1e-2, device="cuda"))

    def steps(params, optimizer, grads, step):
        for new in grads:
            optimizer.zero_grad(set_to_none=False)
            for p, value in zip(params, new):
                p.grad.copy_(value)
            step()
            optimizer.param_groups[0]["lr"].mul_(0.9)  # in place: the graph holds its address

    sides = [make(), make()]
    for params, optimizer in sides:  # warm up: state, tables, compilation
        steps(params, optimizer, feed[:3], lambda optimizer=optimizer: optimizer.step(clip=1.0))
    torch.cuda.synchronize()
    (params, optimizer), (captured, twin) = sides
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        twin.step(clip=1.0)
    steps(params, optimizer, feed[3:], lambda: optimizer.step(clip=1.0))
    steps(captured, twin, feed[3:], graph.replay)
    torch.cuda.synchronize()
    for p, q, start in zip(params, captured, starts):
        assert torch.equal(p, q) and not torch.equal(p, start)
        assert optimizer.state[p].keys() == twin.state[q].keys()
        assert all(
            torch.equal(value, twin.state[q][name]) for name, value in optimizer.state[p].items()
        )


def test_group_norm_reaches_beyond_2_to_31_elements(monkeypatch):
    monkeypatch.setenv("KERNELS", "triton")
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB of free GPU memory")
    # the last sample starts at 2**31
    x = torch.randn(33, 1024, 1024, 64, device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2)
    w, b = torch.rand(64, device="cuda") + 0.5, torch.randn(64, device="cuda")
    assert x.numel() > 2**31 and x.is_contiguous(memory_format=torch.channels_last)

    def run(x):
        leaf = x.detach().requires_grad_()
        y = group_norm_silu(leaf, w, b, 32)
        # x itself as the gradient
        return y.detach()[-1].clone(), torch.autograd.grad(y, leaf, x)[0][-1].clone()

    last, alone = run(x), run(x[-1:].clone(memory_format=torch.channels_last))
    for whole, single in zip(last, alone):
        assert torch.isfinite(single).all() and distance(whole, single) < 1e-3


@pytest.mark.parametrize("side, heads", [(4, 16), (8, 9), (16, 6), (32, 3)])
def test_attention_on_packed_views_is_as_exact_as_sdpa(monkeypatch, side, heads):
    """q, k, v as views of a 1×1 convolution's channels_last output, as the U-Net has them."""
    monkeypatch.setenv("KERNELS", "triton")
    B, C = 4, heads * 64
    conv = torch.nn.Conv2d(C, 3 * C, 1).to(
        "cuda", torch.bfloat16, memory_format=torch.channels_last
    )
    x = torch.randn(B, C, side, side, device="cuda", dtype=torch.bfloat16).contiguous(
        memory_format=torch.channels_last
    )
    packed = conv(x).detach()  # (B, 3C, H, W)
    do = torch.randn(B, heads, side * side, 64, device="cuda", dtype=torch.bfloat16)
    assert packed.is_contiguous(memory_format=torch.channels_last)

    def run(fn, convert):
        leaf = convert(packed).requires_grad_()
        # view: nothing is copied
        q, k, v = leaf.permute(0, 2, 3, 1).view(B, side * side, 3, heads, 64).permute(2, 0, 3, 1, 4)
        o = fn(q, k, v)
        return o.detach(), torch.autograd.grad(o, leaf, convert(do))[0]

    exact = run(attention_ref, torch.Tensor.double)
    ours = run(attention, torch.clone)
    sdpa = run(F.scaled_dot_product_attention, torch.clone)
    for o, s, e in zip(ours, sdpa, exact):
        assert distance(o, e) <= max(1.5 * distance(s, e), 4e-3)


def first_steps(out, n=12, poison=(), **fields):
    """(trainer, gradient norms) of the first steps of nano in bf16; those of `poison` are NaN."""
    small = dict(model="nano", data="toyfaces:64", resolution=32, batch=16, images=10_000)
    cfg = train.resolve(train.Config(**{**small, "device": "cuda", "out": str(out), **fields}))
    tr = train.setup(cfg, train.join_ranks("cuda"))
    loader, norms = train.load(tr), []
    for i in range(n):
        batch = next(loader)
        if i in poison:
            batch = {**batch, "eps": batch["eps"] * float("nan")}
        norms.append(train.step(tr, iter([batch])))
    conclude(tr)
    return tr, torch.stack(norms)


@pytest.mark.parametrize("optim", ["adamw", "adamw8bit"])
def test_replayed_steps_are_the_same_to_the_bit(monkeypatch, tmp_path, capsys, optim):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    plain, norms = first_steps(tmp_path / "plain", poison=(8,), optim=optim, graph=False)
    said = capsys.readouterr().out
    graph, replayed = first_steps(tmp_path / "graph", poison=(8,), optim=optim, graph=True)
    assert "run as one CUDA graph" in capsys.readouterr().out and "CUDA graph" not in said
    assert torch.equal(norms.nan_to_num(-1.0), replayed.nan_to_num(-1.0)) and norms[7] > 0
    assert all(torch.equal(plain.params[name], p) for name, p in graph.params.items())
    assert torch.equal(plain.meter.sums, graph.meter.sums)
    assert plain.skipped == graph.skipped == 1


@pytest.mark.parametrize("optim", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("graph", [False, True])
def test_no_step_waits_for_the_gpu(tmp_path, optim, graph):
    tr, _ = first_steps(tmp_path, optim=optim, graph=graph, workers=0)
    assert tr.late
    batches = [next(train.load(tr)) for _ in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            train.step(tr, iter([batch]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    conclude(tr)


@pytest.mark.parametrize("optim", ["adamw", "adamw8bit"])
def test_a_short_run_learns_and_resumes(tmp_path, optim):
    args = [
        sys.executable,
        "train.py",
        "--data",
        "toyfaces:256",
        "--images",
        "12800",
        "--batch",
        "64",
        "--log-every",
        "640",
        "--optim",
        optim,
        "--out",
        str(tmp_path),
    ]
    log = lambda: [
        json.loads(line)
        for path in tmp_path.glob("*/log.jsonl")
        for line in path.read_text().splitlines()
    ]
    first = subprocess.Popen(
        args, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.time() + 120
    while not any(row["event"] == "train" for row in log()):
        assert first.poll() is None and time.time() < deadline
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 0 and "stopped and saved at" in said, said[-3000:]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "resuming" in done.stdout and "finished" in done.stdout, (
        done.stderr[-3000:]
    )
    losses = [row["loss"] for row in log() if row["event"] == "train"]
    assert len(losses) >= 20 and losses[-1] < 0.8 * losses[0]


def test_distillation_resumes_and_agrees_with_a_cpu(tmp_path):
    """A teacher, an assessor and a student with heads: interrupted or not, the same tensors.

    And the first λ of fp32 are the CPU's.
    """

    def run(script, *args):
        done = subprocess.run(
            [sys.executable, ROOT / script, *map(str, args)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]

    small = (
        "--batch",
        16,
        "--log-every",
        16,
        "--eval-every",
        0,
        "--preview-every",
        0,
        "--out",
        tmp_path,
    )
    run(
        "train.py",
        "--model",
        "nano",
        "--objective",
        "ddpm",
        "--table",
        "scaled_linear",
        "--data",
        "toyfaces:256",
        "--images",
        320,
        "--name",
        "teacher",
        *small,
    )
    judge = tmp_path / "a.safetensors"
    run(
        "distill.py",
        "pretrain-assessor",
        "--teacher",
        tmp_path / "teacher",
        "--out",
        judge,
        "--bins",
        5,
        "--patterns",
        2,
        "--dim",
        16,
        "--samples",
        512,
        "--profile-samples",
        64,
        "--steps",
        100,
    )
    how = (
        "--teacher",
        tmp_path / "teacher",
        "--assessor",
        "david",
        "--assessor-file",
        judge,
        "--local-heads",
        "--images",
        160,
        "--save-every",
        80,
        "--lr",
        1e-2,
        *small,
    )
    run("distill.py", *how, "--name", "whole", "--dtype", "fp32")
    run("distill.py", *how, "--name", "cpu", "--dtype", "fp32", "--device", "cpu")
    lam = lambda name: [
        json.loads(line)["blocks"]
        for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
        if '"blocks"' in line
    ]
    for block, values in lam("whole")[0].items():
        assert values["lambda"] == pytest.approx(lam("cpu")[0][block]["lambda"], rel=1e-3)
        assert values["e_t"] == pytest.approx(lam("cpu")[0][block]["e_t"], rel=1e-3)
    last = sorted((tmp_path / "whole" / "ckpt").iterdir())[-1]
    whole = {f.name: load_file(f) for f in last.glob("*.safetensors")}
    for f in last.iterdir():  # as if it had been killed before its end
        f.unlink()
    last.rmdir()
    (tmp_path / "whole" / "samples" / "final.png").unlink()
    run("distill.py", *how, "--name", "whole", "--dtype", "fp32")
    again = {f.name: load_file(f) for f in last.glob("*.safetensors")}
    half = load_file(last.parent / f"{80:012d}" / "model.safetensors")
    assert whole.keys() == again.keys()
    assert all(whole[name].keys() == again[name].keys() for name in whole)
    ours, theirs = whole["model.safetensors"], again["model.safetensors"]
    apart, moved = (
        sum(float((ours[k] - other[k]).square().sum()) for k in ours) ** 0.5
        for other in (theirs, half)
    )
    assert apart < 0.1 * moved  # cuDNN may add in another order
