"""Measure the kernels where you are:  python -m kernels.bench [--quick] [--out FILE]

Per kernel and shape of the U-Nets we ship: the floor (bytes over the copy bandwidth, or FLOPs over the matmul rate, both
measured in the same run), eager torch, torch.compile, the best peer, ours, the share of the floor, the factor over the
peer, and errors against fp64. Then a whole training step against diffusers' UNet2DModel. Writes JSON to benchmarks/.
On a CPU it measures the torch paths of the small shapes and says what it left out.
"""

import importlib
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from config import cli, parse
from kernels import attention as attention_file
from kernels import groupnorm as groupnorm_file
from kernels.adamw8bit import AdamW8bit
from kernels.attention import attention, attention_ref
from kernels.groupnorm import group_norm_silu, group_norm_silu_ref

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
GROUPNORM = [(64, 192, 32), (64, 384, 16), (64, 576, 8), (64, 768, 4), (64, 256, 32), (64, 1024, 4), (64, 1536, 4)]   # (B, C, side)
ATTENTION = [(64, 6, 256, 256), (64, 9, 64, 64), (64, 16, 16, 16), (64, 3, 1024, 1024), (16, 5, 4096, 4096), (64, 3, 1024, 77), (64, 5, 4096, 77)]
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH}


@dataclass(frozen=True)
class Config:
    quick: bool = False                # fewer shapes and repeats
    out: str = ""                      # a name for benchmarks/results/NAME.json; default kernels-<device>
    step: bool = True                  # also a whole training step of toy-281m (GPU only)


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median time of run() on this device, after warming up, with L2 flushed between runs on a GPU."""
    for _ in range(3):
        run()
    if not CUDA:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    flush, times = torch.empty(256 * 2 ** 20, dtype=torch.uint8, device=DEVICE), []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def floors(repeats: int) -> dict[str, float]:
    """Bytes a second of a copy and FLOP/s of a square matmul, here and now."""
    size, n = (2 ** 28, 8192) if CUDA else (2 ** 24, 1024)
    a, b = torch.empty(size, dtype=torch.uint8, device=DEVICE), torch.empty(size, dtype=torch.uint8, device=DEVICE)
    x = torch.randn(n, n, device=DEVICE, dtype=DTYPE)
    return {"copy bytes/s": 2 * size / seconds(lambda: b.copy_(a), repeats), "matmul FLOP/s": 2 * n ** 3 / seconds(lambda: x @ x, repeats)}


def both_ways(fn: Callable, inputs: list[Tensor], grad: Tensor, repeats: int) -> tuple[float, float]:
    """(forward, backward) seconds of fn(*inputs) with gradients for all inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = fn(*leaves)
    return (seconds(lambda: fn(*leaves), repeats),
            seconds(lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True), repeats))


def errors(fn: Callable, ref: Callable, inputs: list[Tensor], grad: Tensor) -> dict[str, float]:
    """Largest absolute error of output and gradients against ref in fp64, over the largest value."""
    def run(f, convert):
        leaves = [convert(t.detach()).requires_grad_() for t in inputs]
        y = f(*leaves)
        return [y.detach().double(), *(g.double() for g in torch.autograd.grad(y, leaves, convert(grad)))]
    pairs = list(zip(run(fn, lambda t: t), run(ref, Tensor.double)))
    return {"output": float((pairs[0][0] - pairs[0][1]).abs().max() / pairs[0][1].abs().max()),
            "gradients": max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs[1:])}


def versus(row: dict[str, Any], names: dict[str, tuple[float, float]], floor: tuple[float, float], ours: str) -> dict[str, Any]:
    """Add times, shares of the floor and the factor over the best other to a row, and print it."""
    for i, way in enumerate(("forward", "backward")):
        times = {name: t[i] for name, t in names.items()}
        best = min((t, name) for name, t in times.items() if name != ours)
        row[way] = {"seconds": times, "floor": floor[i], "share of floor": floor[i] / times[ours], "best other": best[1],
                    "times faster": best[0] / times[ours]}
    print(f"{row['shape']:<24} " + "   ".join(
        f"{way} {row[way]['seconds'][ours] * 1e6:8.1f} us ({row[way]['share of floor']:4.0%} of floor, {row[way]['times faster']:.2f}x {row[way]['best other']})"
        for way in ("forward", "backward")) + f"   error {row['errors']['output']:.1e} {row['errors']['gradients']:.1e}", flush=True)
    return row


def bench_groupnorm(rates: dict[str, float], cfg: Config, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for B, C, side in GROUPNORM[:2] if cfg.quick else GROUPNORM:
        B = B if CUDA else 2
        x = torch.randn(B, C, side, side, device=DEVICE, dtype=DTYPE).contiguous(memory_format=torch.channels_last)
        w, b = torch.rand(C, device=DEVICE), torch.rand(C, device=DEVICE)
        film = [torch.randn(B, C, device=DEVICE, dtype=DTYPE) for _ in range(2)]
        inputs, grad = [x, w, b, *film], torch.randn_like(x)

        def eager(x, w, b, s, t):
            n = F.group_norm(x.float(), 32, w, b)
            return F.silu(n * (1 + s.float()[..., None, None]) + t.float()[..., None, None]).to(x.dtype)

        def ours(x, w, b, s, t):
            return group_norm_silu(x, w, b, 32, s, t)

        names = {"eager": both_ways(eager, inputs, grad, repeats), "ours": both_ways(ours, inputs, grad, repeats)}
        if CUDA:
            torch._dynamo.reset()
            names["compile"] = both_ways(torch.compile(eager), inputs, grad, repeats)
        bytes_ = x.numel() * x.element_size()
        row = {"shape": f"gn {B}x{C}x{side}x{side}", "errors": errors(ours, lambda x, w, b, s, t: group_norm_silu_ref(x, w, b, 32, s, t), inputs, grad)}
        rows.append(versus(row, names, (2 * bytes_ / rates["copy bytes/s"], 3 * bytes_ / rates["copy bytes/s"]), "ours"))
    return rows


def bench_attention(rates: dict[str, float], cfg: Config, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for B, heads, N, M in ATTENTION[:2] if cfg.quick or not CUDA else ATTENTION:
        B, D = B if CUDA else 1, 64
        q, grad = (torch.randn(B, heads, N, D, device=DEVICE, dtype=DTYPE) for _ in range(2))
        k, v = (torch.randn(B, heads, M, D, device=DEVICE, dtype=DTYPE) for _ in range(2))
        names = {"ours": both_ways(attention, [q, k, v], grad, repeats)}
        for name, backend in SDPA.items():
            try:
                with sdpa_kernel(backend):
                    names[name] = both_ways(F.scaled_dot_product_attention, [q, k, v], grad, repeats)
            except RuntimeError as error:                                       # this backend does not take this case
                print(f"  SDPA {name} left out: {str(error).splitlines()[0][:80]}")
        flops, moved = 4 * B * heads * N * M * D, B * heads * (2 * N + 2 * M) * D * q.element_size()
        floor = (max(flops / rates["matmul FLOP/s"], moved / rates["copy bytes/s"]),
                 max(2.5 * flops / rates["matmul FLOP/s"], 2 * moved / rates["copy bytes/s"]))
        few = [t[:1] for t in (q, k, v)]                                        # fp64 of one sample is enough
        row = {"shape": f"attention {B}x{heads}x{N}x{M}", "errors": errors(attention, attention_ref, few, grad[:1])}
        rows.append(versus(row, names, floor, "ours"))
    return rows


def bench_optimizer(rates: dict[str, float], cfg: Config, repeats: int) -> list[dict[str, Any]]:
    """One step of AdamW with clipping over the parameters of toy-281m-attn (tiny on a CPU), against torch's fused and other 8-bit ones."""
    from model import PRESETS, UNet
    name = "toy-281m-attn" if CUDA else "tiny"
    peers: dict[str, Callable] = {"torch fused": lambda p: torch.optim.AdamW(p, fused=True)}
    for package, cls in (("bitsandbytes.optim", "AdamW8bit"), ("torchao.optim", "AdamW8bit")):
        try:
            peers[package.split(".")[0]] = getattr(importlib.import_module(package), cls)
        except ImportError:
            print(f"  {package.split('.')[0]} left out: not installed")
    times = {}
    for label, make in {"ours": AdamW8bit, **(peers if CUDA else {"torch fused": peers["torch fused"]})}.items():
        params = list(UNet(PRESETS[name]).to(DEVICE).parameters())
        optimizer = make(params)
        for p in params:
            p.grad = torch.randn_like(p) * 1e-3

        def step():
            if label == "ours":
                optimizer.step(clip=1.0)
            else:
                torch.nn.utils.clip_grad_norm_(params, 1.0)
                optimizer.step()
        times[label] = seconds(step, repeats)
    n = sum(p.numel() for p in params)
    floor = 16.06 * n / rates["copy bytes/s"]                                   # p and g in fp32, p back, 2 bytes of state there and back
    print(f"adamw8bit {name:<14} {times['ours'] * 1e3:8.2f} ms ({floor / times['ours']:4.0%} of floor)   "
          + "   ".join(f"{k} {v * 1e3:.2f} ms" for k, v in times.items() if k != "ours"), flush=True)
    return [{"shape": f"adamw {name}", "parameters": n, "seconds": times, "floor": floor}]


def bench_step(cfg: Config, repeats: int) -> list[dict[str, Any]]:
    """A training step of toy-281m-attn (forward, backward, clip, AdamW) in bf16, ours against diffusers' UNet2DModel + compile."""
    from benchmarks.peer_unet import peer_unet
    from model import PRESETS, UNet
    rows = []
    for batch in (64,) if cfg.quick else (64, 256):
        net = UNet(PRESETS["toy-281m-attn"])
        sides = {"ours": (net.to(DEVICE), lambda n, x, t: n(x, t)), "ours compiled": (None, None), "diffusers compiled": (None, None)}
        sides["ours compiled"] = (torch.compile(net), sides["ours"][1])
        sides["diffusers compiled"] = (torch.compile(peer_unet(net).to(DEVICE, memory_format=torch.channels_last)), lambda n, x, t: n(x, t).sample)
        row: dict[str, Any] = {"shape": f"step toy-281m-attn batch {batch}"}
        for name, (model, call) in sides.items():
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            x, t = torch.randn(batch, 32, 32, 32, device=DEVICE).contiguous(memory_format=torch.channels_last), torch.rand(batch, device=DEVICE) * 1000
            torch.cuda.reset_peak_memory_stats()

            def step():
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = call(model, x, t).float().square().mean()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            time_ = seconds(step, max(repeats // 5, 5))
            row[name] = {"images/s": batch / time_, "seconds": time_, "peak bytes": torch.cuda.max_memory_allocated()}
            print(f"{row['shape']}  {name:<20} {batch / time_:8.1f} images/s  {row[name]['peak bytes'] / 1e9:.1f} GB", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(cfg)
        return
    sys.path.insert(0, ".")
    from benchmarks import record
    torch.manual_seed(0)
    repeats = 20 if cfg.quick or not CUDA else 100
    rates = floors(repeats)
    print(f"copy {rates['copy bytes/s'] / 1e9:.0f} GB/s, matmul {rates['matmul FLOP/s'] / 1e12:.2f} TFLOP/s ({DTYPE}, {DEVICE.type})")
    result = {"rates": rates, "dtype": str(DTYPE), "groupnorm": bench_groupnorm(rates, cfg, repeats), "attention": bench_attention(rates, cfg, repeats),
              "optimizer": bench_optimizer(rates, cfg, repeats),
              "configurations": {"attention": {k: {str(d): c for d, c in v.items()} for k, v in attention_file.CONFIG.items()},
                                 "groupnorm": [groupnorm_file.CHUNK, groupnorm_file.ROWS, groupnorm_file.COLS, groupnorm_file.WARPS]}}
    if CUDA and cfg.step:
        result["step"] = bench_step(cfg, repeats)
    else:
        print("left out: Triton paths, torch.compile, SDPA's GPU backends, large shapes and the whole step: they need a GPU." if not CUDA
              else "left out: the whole step (--no-step).")
    record.write(cfg.out or f"kernels-{DEVICE.type}", result)


if __name__ == "__main__":
    cli(main)
