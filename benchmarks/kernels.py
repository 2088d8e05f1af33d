"""Measure the kernels where you are:
    python benchmarks/kernels.py [--quick] [--parts groupnorm,attention,optimizer,step] [--out FILE]

Per kernel and shape of the U-Nets we ship: the floor (bytes over the copy bandwidth, or FLOPs over
the matmul rate, both measured in the same run), ours and its peers (eager torch, torch.compile,
each SDPA backend, other optimizers), and the errors of all against fp64. Then whole training
steps. How time is taken: benchmarks/race.py. A peer that fails is left out with the reason. FILE
is saved after every row; the same command again finishes a section that was cut off; sections that
were not asked for stay in it. KERNELS is set here, part by part.
On a CPU it measures the torch paths of small shapes in fp32, and a step of `nano`.
"""

import importlib
import json
import os
import sys
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Collection, Iterator

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.peer_unet import peer_unet
from benchmarks.race import CUDA, DEVICE, STREAM, finish, left_out, race, release, spread
from harness import record
from harness.cli import UserError, cli, closest, flag, parse
from harness.ranks import autocast
from kernels import adamw8bit as adamw8bit_file
from kernels import attention as attention_file
from kernels import groupnorm as groupnorm_file
from kernels.adamw8bit import AdamW8bit, AdamW32bit
from kernels.attention import attention, attention_ref
from kernels.groupnorm import group_norm_silu, group_norm_silu_ref
from model import PRESETS, UNet

DTYPE = torch.bfloat16 if CUDA else torch.float32
# (B, C, side): of ADM with 192 channels, then of ADM with 256
GROUPNORM = [
    (64, 192, 32),
    (64, 384, 16),
    (64, 576, 8),
    (64, 768, 4),
    (64, 1536, 4),
    (64, 384, 32),
    (64, 256, 32),
    (64, 512, 32),
    (64, 256, 16),
    (64, 512, 16),
    (64, 768, 16),
    (64, 512, 8),
    (64, 1024, 8),
    (64, 1024, 4),
    (64, 2048, 4),
]
# (B, heads, N, M, D)
ATTENTION = [
    (64, 6, 256, 256, 64),
    (64, 3, 1024, 1024, 64),
    (64, 9, 64, 64, 64),
    (64, 16, 16, 16, 64),
    (64, 4, 256, 256, 64),
    (64, 8, 64, 64, 64),
    (16, 5, 4096, 4096, 64),
    (64, 3, 1024, 77, 64),
    (64, 5, 4096, 77, 64),
    (64, 8, 256, 256, 32),
    (64, 4, 256, 256, 128),
]
# (preset, batch)
STEPS = [("toy-281m", 64), ("toy-281m-attn", 64), ("toy-281m", 256)] if CUDA else [("nano", 2)]
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
EIGHT_BIT = ("bitsandbytes", "torchao")  # packages with optim.AdamW8bit


@dataclass(frozen=True)
class Config:
    quick: bool = flag(False, "fewer shapes and repeats")
    parts: tuple[str, ...] = flag(
        ("groupnorm", "attention", "optimizer", "step"), "what to measure"
    )
    out: str = flag(
        "", "JSON file to write; default benchmarks/results/kernels-<device>.json", writes=".json"
    )


# ---- rows ----------------------------------------------------------------------------------------


def floors(repeats: int) -> dict[str, float]:
    """Bytes a second of a copy and FLOP/s of a square matmul, here and now."""
    size, n = (2**28, 8192) if CUDA else (2**24, 1024)
    a = torch.ones(size, dtype=torch.uint8, device=DEVICE)
    x = torch.randn(n, n, device=DEVICE, dtype=DTYPE)
    b, y = torch.empty_like(a), torch.empty_like(x)
    times = race(
        {"copy": lambda: lambda: b.copy_(a), "matmul": lambda: lambda: torch.mm(x, x, out=y)},
        repeats,
    )
    return {
        "copy bytes/s": 2 * size / times["copy"]["seconds"],
        "matmul FLOP/s": 2 * n**3 / times["matmul"]["seconds"],
    }


def both_ways(
    fns: dict[str, Callable], inputs: list[Tensor], grad: Tensor, repeats: int
) -> dict[str, dict[str, Any]]:
    """A race forward and one backward, with gradients for all inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]

    def backward(fn: Callable) -> Callable[[], Any]:
        y = fn(*leaves)
        return lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)

    finish()  # inputs come from another stream
    # a compiled backward pass that gave its inputs' memory away could not be run again
    with (
        torch.cuda.stream(STREAM),
        torch._functorch.config.patch(donated_buffer=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # SDPA's backends explain at length what they do not take
        forward = race({n: lambda fn=fn: lambda: fn(*leaves) for n, fn in fns.items()}, repeats)
        again = race(
            {n: lambda fn=fn: backward(fn) for n, fn in fns.items() if "seconds" in forward[n]},
            repeats,
        )
    return {"forward": forward, "backward": {n: again.get(n, forward[n]) for n in fns}}


def ran(fns: dict[str, Callable], ways: dict[str, dict[str, Any]]) -> dict[str, Callable]:
    return {
        name: fn for name, fn in fns.items() if all("seconds" in way[name] for way in ways.values())
    }


def errors(
    fns: dict[str, Callable],
    ref: Callable,
    inputs: list[Tensor],
    grad: Tensor,
    few: slice = slice(None),
) -> dict[str, dict[str, Any]]:
    """Relative Frobenius error, and largest error over largest value, against ref in fp64.

    Per side, for the output and the worst gradient; on the samples `few` (where they do not depend
    on one another).
    """

    def run(fn: Callable, convert: Callable, part: slice) -> list[Tensor]:
        leaves = [convert(t.detach()[part]).requires_grad_() for t in inputs]
        y = fn(*leaves)
        return [t.detach() for t in (y, *torch.autograd.grad(y, leaves, convert(grad[part])))]

    try:
        exact, result = run(ref, Tensor.double, few), {}
    except Exception as error:  # fp64 wants memory; times are worth having without it
        return {"fp64": left_out("errors against fp64", error)}
    for name, fn in fns.items():
        try:
            pairs = [(a[few].double(), b) for a, b in zip(run(fn, lambda t: t, slice(None)), exact)]
            frobenius = [float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs]
            most = [float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs]
            result[name] = {
                "output": {"frobenius": frobenius[0], "max": most[0]},
                "gradients": {"frobenius": max(frobenius[1:]), "max": max(most[1:])},
            }
        except Exception as error:
            result[name] = left_out(f"error of {name}", error)
    return result


def compare(
    row: dict[str, Any], ways: dict[str, dict[str, Any]], floor: dict[str, float]
) -> dict[str, Any]:
    """Add times, shares of the floor and the factor over the best peer to a row, and print it."""
    texts = []
    for way, times in ways.items():
        timed = {name: t["seconds"] for name, t in times.items() if "seconds" in t}
        ours = timed.pop("ours", None)
        best = min(timed, key=timed.get, default=None)
        row[way] = {
            "times": times,
            "floor": floor[way],
            "best peer": best,
            "share of floor": ours and floor[way] / ours,
            "times faster": ours and best and timed[best] / ours,
        }
        text = f"{way} left out"
        if ours:
            text = f"{way} {ours * 1e6:9.1f} us ({floor[way] / ours:4.0%} of floor"
            text += f", {timed[best] / ours:.2f}x {best})" if best else ")"
        if "errors" in row:
            of = "output" if way == "forward" else "gradients"
            sides = [row["errors"].get(name, {}).get(of, {}) for name in ("ours", best)]
            pair = [f"{e['frobenius']:.1e}" if "frobenius" in e else "?" for e in sides]
            text += f" error {' / '.join(pair)}"
        texts.append(text)
    print(f"{row['shape']:<28} {'   '.join(texts)}", flush=True)
    return row


def with_groups(fn: Callable, x: Tensor, w: Tensor, b: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return fn(x, w, b, 32, s, t)


def bench_groupnorm(
    rates: dict[str, float], cfg: Config, repeats: int, done: Collection[str]
) -> Iterator[dict[str, Any]]:
    def eager(x, w, b, s, t):
        """What autocast does: fp32 inside."""
        n = F.group_norm(x.float(), 32, w, b)
        return F.silu(n * (1 + s.float()[..., None, None]) + t.float()[..., None, None]).to(x.dtype)

    for B, C, side in GROUPNORM[:2] if cfg.quick else GROUPNORM:
        B = B if CUDA else 2
        row = {"shape": f"groupnorm {B}x{C}x{side}x{side}"}
        if key(row) in done:
            continue
        release()  # a compiled function's limit of recompilations
        x = torch.randn(B, C, side, side, device=DEVICE, dtype=DTYPE).contiguous(
            memory_format=torch.channels_last
        )
        w, b = torch.rand(C, device=DEVICE), torch.rand(C, device=DEVICE)
        inputs = [x, w, b, *(torch.randn(B, C, device=DEVICE, dtype=DTYPE) for _ in range(2))]
        grad = torch.randn_like(x)
        fns = {"ours": partial(with_groups, group_norm_silu), "eager": eager}
        if CUDA:
            fns["compile"] = torch.compile(eager, dynamic=False)
        ways = both_ways(fns, inputs, grad, repeats)
        reference = partial(with_groups, group_norm_silu_ref)
        row["errors"] = errors(ran(fns, ways), reference, inputs, grad)
        move = x.nbytes / rates["copy bytes/s"]
        yield compare(row, ways, {"forward": 2 * move, "backward": 3 * move})


def bench_attention(
    rates: dict[str, float], cfg: Config, repeats: int, done: Collection[str]
) -> Iterator[dict[str, Any]]:
    def forced(backend: SDPBackend) -> Callable:
        def sdpa(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return sdpa

    cases = ATTENTION
    if cfg.quick or not CUDA:
        cases = [case for case in ATTENTION if case[2] <= 256]
    for B, heads, N, M, D in cases[:2] if cfg.quick else cases:
        B = B if CUDA else 1
        row = {"shape": f"attention {B}x{heads}x{N}x{M} d{D}"}
        if key(row) in done:
            continue
        q, grad = (torch.randn(B, heads, N, D, device=DEVICE, dtype=DTYPE) for _ in range(2))
        k, v = (torch.randn(B, heads, M, D, device=DEVICE, dtype=DTYPE) for _ in range(2))
        fns = {"ours": attention, "as torch chooses": F.scaled_dot_product_attention}
        for name, backend in SDPA.items():
            if CUDA or name in ("flash", "math"):
                fns[name] = forced(backend)
        ways = both_ways(fns, [q, k, v], grad, repeats)
        row["errors"] = errors(ran(fns, ways), attention_ref, [q, k, v], grad, slice(1))
        flops = 4 * B * heads * N * M * D / rates["matmul FLOP/s"]
        move = 2 * B * heads * (N + M) * D * q.element_size() / rates["copy bytes/s"]
        floor = {"forward": max(flops, move), "backward": max(2.5 * flops, 2 * move)}
        yield compare(row, ways, floor)


def eight_bit(package: str, params: list[Tensor], **options: Any) -> torch.optim.Optimizer:
    return importlib.import_module(f"{package}.optim").AdamW8bit(params, **options)


def bench_optimizer(
    rates: dict[str, float], cfg: Config, repeats: int, done: Collection[str]
) -> Iterator[dict[str, Any]]:
    """One step over the parameters of toy-281m-attn (tiny on a CPU), with and without clipping.

    Against torch's fused AdamW and other 8-bit ones.
    """
    name = "toy-281m-attn" if CUDA else "tiny"
    with torch.device("meta"):
        template = [p.detach() for p in UNet(PRESETS[name]).parameters()]
    n = sum(p.numel() for p in template)

    def stepper(make: Callable, clip: bool) -> Callable[[], Any]:
        # channels_last as in the net
        params = [(torch.randn_like(p, device=DEVICE) * 0.02).requires_grad_() for p in template]
        for p in params:
            p.grad = torch.randn_like(p) * 1e-3
        optimizer = make(params)
        if isinstance(optimizer, AdamW8bit):
            return lambda: optimizer.step(clip=1.0 if clip else None)

        def step() -> None:
            if clip:
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()

        return step

    makers = {
        "ours": AdamW8bit,
        "ours in 32 bits": AdamW32bit,
        "torch fused": lambda p: torch.optim.AdamW(p, fused=True, capturable=CUDA),
    }
    if CUDA:
        makers |= {package: partial(eight_bit, package) for package in EIGHT_BIT}
    for clip in (True, False):
        row = {"shape": f"adamw8bit {name}" + (" clip" if clip else ""), "parameters": n}
        if key(row) in done:
            continue
        sides = {side: partial(stepper, make, clip) for side, make in makers.items()}
        ways = {"step": race(sides, repeats, EIGHT_BIT)}
        # bytes a parameter: p and g in fp32, p back, 2 bytes of state there and back; for the
        # norm, g once more
        yield compare(row, ways, {"step": (16.06 + 4 * clip) * n / rates["copy bytes/s"]})


# ---- a whole training step -----------------------------------------------------------------------


def forward_flops(preset: str, side: int) -> int:
    """Of one image, counted without computing."""
    before, os.environ["KERNELS"] = os.environ["KERNELS"], "torch"
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        UNet(PRESETS[preset])(
            torch.empty(1, PRESETS[preset].in_channels, side, side), torch.empty(1)
        )
    os.environ["KERNELS"] = before
    return counter.get_total_flops()


def make_optimizer(kind: str, params: list[Tensor]) -> torch.optim.Optimizer:
    if kind == "torch fused":
        return torch.optim.AdamW(params, lr=1e-4, fused=True)
    if kind == "adamw8bit":
        return AdamW8bit(params, lr=1e-4)
    return eight_bit(kind, params, lr=1e-4)


def make_net(diffusers: bool, preset: str) -> torch.nn.Module:
    """Ours, or diffusers' net of the same function."""
    net = UNet(PRESETS[preset])
    for p in net.parameters():
        if p.ndim > 1 and not p.any():
            # zeros would multiply faster than a trained net's weights
            torch.nn.init.normal_(p, std=0.02)
    if diffusers:
        return peer_unet(net).to(DEVICE, memory_format=torch.channels_last)
    return net.to(DEVICE)


def measure_step(
    diffusers: bool,
    optim: str,
    kernels: str,
    compiled: bool,
    preset: str,
    batch: int,
    side: int,
    repeats: int,
) -> dict[str, Any]:
    """Seconds of a step (forward, backward, clip, AdamW) in bf16, and peak memory.

    In blocks of four so that the CPU may run ahead.
    """
    os.environ["KERNELS"] = kernels
    before = torch.cuda.memory_allocated() if CUDA else 0
    model = make_net(diffusers, preset)
    optimizer = make_optimizer(optim, list(model.parameters()))
    fast = model
    if compiled:
        fast = torch.compile(model, dynamic=False, backend="inductor" if CUDA else "aot_eager")
    x = torch.randn(batch, PRESETS[preset].in_channels, side, side, device=DEVICE).contiguous(
        memory_format=torch.channels_last
    )
    t, goal = torch.rand(batch, device=DEVICE) * 1000, torch.randn_like(x)

    def step() -> None:
        with autocast(DEVICE, "auto"):
            y = fast(x, t)
            loss = ((y.sample if diffusers else y).float() - goal).square().mean()
        loss.backward()
        if optim == "adamw8bit":
            optimizer.step(clip=1.0)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    block, times = 4 if CUDA else 1, []
    # three blocks of warming up: compilation, cuDNN, the allocator
    for i in range(3 + max(repeats // 8, 4)):
        if i == 3 and CUDA:
            torch.cuda.reset_peak_memory_stats()
        finish()
        start = time.perf_counter()
        for _ in range(block):
            step()
        finish()
        times.append((time.perf_counter() - start) / block)
    result = spread(times[3:])
    return {
        "optimizer": optim,
        "images/s": batch / result["seconds"],
        **result,
        "blocks": len(times) - 3,
        "peak bytes": torch.cuda.max_memory_allocated() - before if CUDA else None,
    }


def bench_step(
    rates: dict[str, float], cfg: Config, repeats: int, done: Collection[str]
) -> Iterator[dict[str, Any]]:
    """Ours with and without kernels, compilation and 8-bit moments, against diffusers' compiled.

    With every optimizer that is installed; one net alive at a time. What is to be compared first
    comes first.
    """
    side = 32 if CUDA else 8
    sides = {
        "ours eager, adamw8bit": (False, "adamw8bit", "auto", False),
        "diffusers eager, torch fused": (True, "torch fused", "auto", False),
        "ours eager, torch fused": (False, "torch fused", "auto", False),
        "ours eager, torch fused, KERNELS=torch": (False, "torch fused", "torch", False),
        "ours compiled, adamw8bit": (False, "adamw8bit", "auto", True),
    }
    sides |= {
        f"diffusers compiled, {optim}": (True, optim, "auto", True)
        for optim in ("torch fused", *EIGHT_BIT)
    }
    sides |= {"ours compiled, torch fused": (False, "torch fused", "auto", True)}
    for preset, batch in STEPS[:1] if cfg.quick else STEPS:
        flops = forward_flops(preset, side)
        for name, how in sides.items():
            row = {
                "shape": f"step {preset} batch {batch}",
                "side": name,
                "forward FLOPs/image": flops,
            }
            if key(row) in done:
                continue
            try:
                row |= measure_step(*how, preset, batch, side, repeats)
                row["MFU"] = 3 * flops * row["images/s"] / rates["matmul FLOP/s"]
                text = f"{row['images/s']:8.1f} images/s   MFU {row['MFU']:.1%}"
                if CUDA:
                    text += f"   {row['peak bytes'] / 1e9:.1f} GB"
                print(f"{row['shape']:<28} {name:<38} {text}", flush=True)
            except Exception as error:
                row |= left_out(name, error)
            release()
            yield row


# ---- all of it -----------------------------------------------------------------------------------

PARTS = {
    "groupnorm": bench_groupnorm,
    "attention": bench_attention,
    "optimizer": bench_optimizer,
    "step": bench_step,
}


def key(row: dict[str, Any]) -> str:
    return f"{row['shape']} {row.get('side', '')}"


def unfinished(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a section that was cut off, if they were measured as they would be now.

    They need no second time.
    """
    same = all(
        old.get(name) == new[name]
        for name in ("machine", "commit", "dirty", "versions", "quick", "dtype", "configurations")
    )
    return old["rows"] if same and not old["complete"] else []


def failed(row: dict[str, Any]) -> bool:
    """Were we left out? (Peers may be.)"""
    if "side" in row:
        return "left out" in row and row["side"].startswith("ours")
    ways = [way for way in row.values() if isinstance(way, dict) and "times" in way]
    return any("left out" in way["times"]["ours"] for way in ways)


def written_before(path: Path) -> dict[str, Any]:
    """The sections that FILE holds."""
    advice = "Name another file, or remove it."
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        why = f"cannot be added to ({type(error).__name__})"
        raise UserError(f"--out {path} is there and {why}", do=advice) from None
    parts = content.values() if isinstance(content, dict) else [None]
    if not all(isinstance(part, dict) and "rows" in part for part in parts):
        raise UserError(f"--out {path} is there and holds something else", do=advice)
    return content


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    known = ", ".join(PARTS)
    if not cfg.parts:
        raise UserError("--parts is empty", wanted=f"some of {known}", do="Leave it out for all.")
    for part in cfg.parts:
        if part not in PARTS:
            advice = closest(part, PARTS) or f"Choose some of {known}."
            raise UserError(f"--parts {part!r} is not one of {known}", do=advice)
    if dry_run:
        print(cfg)
        return
    path = Path(cfg.out) if cfg.out else record.RESULTS / f"kernels-{DEVICE.type}.json"
    content = written_before(path)
    torch.manual_seed(0)
    repeats = 100 if CUDA and not cfg.quick else 20
    rates, bad = floors(repeats), []
    copy, matmul = rates["copy bytes/s"] / 1e9, rates["matmul FLOP/s"] / 1e12
    print(f"copy {copy:.0f} GB/s, matmul {matmul:.2f} TFLOP/s ({DTYPE}, {DEVICE.type})")
    tables = {
        f"{module.__name__}.{k}": repr(v)
        for module in (attention_file, groupnorm_file, adamw8bit_file)
        for k, v in vars(module).items()
        if k.isupper() and isinstance(v, (int, tuple, dict))
    }
    for part in cfg.parts:
        # the kernels as they are, also where auto would leave a case to torch; a whole step as
        # its users run it
        os.environ["KERNELS"] = "triton" if CUDA and part != "step" else "auto"
        section = {
            **record.context("diffusers", *EIGHT_BIT),
            "quick": cfg.quick,
            "dtype": str(DTYPE),
            "rates": rates,
            "configurations": tables,
            "complete": False,
            "rows": [],
        }
        section["rows"] = unfinished(content.get(part, section), section)
        try:
            for row in PARTS[part](rates, cfg, repeats, [key(row) for row in section["rows"]]):
                section["rows"].append(row)
                record.save(path, {**content, part: section})
                if failed(row):
                    bad.append(row["shape"])
        except Exception as error:  # the other parts go on; this one keeps its rows
            section |= left_out(part, error)
            bad.append(part)
        content[part] = {**section, "complete": True}
        record.save(path, content)
    if not CUDA:
        print(
            "left out on a CPU: Triton, torch.compile's inductor, SDPA's GPU backends, "
            "large shapes, toy-281m."
        )
    print(path)
    if bad:
        sys.exit(f"ours was left out: {', '.join(bad)}")


if __name__ == "__main__":
    cli(main)
