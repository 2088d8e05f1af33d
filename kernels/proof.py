"""KERNELS=auto proves itself: a kernel serves a kind of call if it was right there, and faster.

The first call of a kind (GPU, op, dtype, shape, layout) runs both paths on random tensors like its
own, forward and backward. A kernel whose error against fp32 is above 1.5 times that of torch in the
same dtype is not used, and one line asks for a report; of two that are right the faster is used:
by the clock, or, where passes are replayed as a CUDA graph, by the GPU's time alone.
(With several ranks every right kernel is used: a clock does not tell all of them the same.)

    choices                 what was decided here: {kind: "triton" or "torch"}
    pin(choices)            a run that is resumed keeps what it began with
    with for_replay():      what is decided here will be replayed, so launching costs nothing
    python -m kernels.selfcheck    the table of a whole network

Decisions are kept in ~/.cache/twinpath/kernels.json, by GPU, driver, versions and the text of this
folder. A file that is damaged or of another version is not used.
"""

import contextlib
import hashlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import chosen, reference, triton
from kernels.recording import beside, record

try:
    from triton.errors import TritonError
except ImportError:
    TritonError = RuntimeError

ROUNDING = {
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 4e-3,
}  # no error below it counts
REPEATS = 7
RECORDED = 10  # calls in a graph, so that its launch does not count
# Where the drivers of NVIDIA and AMD say their version.
DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))

choices: dict[str, str] = {}  # of this process
known: dict[tuple, bool] = {}  # the same, by what is quickly asked: is it the kernel?
verdicts: dict[str, "Verdict"] = {}  # of what was measured in this process
busy = False  # the calls of a check are not checked themselves
replayed = False  # are passes CUDA graphs?


class Verdict(NamedTuple):
    """Worst relative error against fp32 over output and gradients, and median seconds; by path."""

    error: float
    torch_error: float
    seconds: float
    torch_seconds: float
    limit: float

    @property
    def right(self) -> bool:
        return self.error <= self.limit

    @property
    def path(self) -> str:
        return "triton" if self.right and self.seconds <= self.torch_seconds else "torch"


def trusted(
    op: str, details: object, kernel: Callable, plain: Callable, tensors: Sequence[Tensor]
) -> bool:
    """Does this call run its kernel, with KERNELS=auto?

    kernel(*tensors) and plain(*tensors) compute the same from floating-point tensors. details: what
    else the kind of call depends on.
    """
    if busy or chosen() != "auto":
        return True
    signature = (op, details, replayed, *((t.shape, t.dtype, t.stride()) for t in tensors))
    if signature not in known:
        kind = kind_of(op, details, tensors)
        path = decide(kind, partial(examine, kernel, plain, tensors))
        if not path:  # nothing can be measured now
            return True
        known[signature] = path == "triton"
    return known[signature]


def decide(kind: str, measure: Callable[[bool], "Verdict"]) -> str:
    """The path of a kind of call: as it was decided before, or by measure(timing); "" = not now."""
    if kind in choices:
        return choices[kind]
    if torch.compiler.is_compiling() or capturing():
        return ""
    # The ranks of a run have to decide alike, and a clock would not.
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    kept = remembered() if alone else {}
    if kind in kept:
        choices[kind] = kept[kind]
        return choices[kind]
    verdict = measure(alone)
    verdicts[kind] = verdict
    choices[kind] = verdict.path
    if not verdict.right:
        complain(kind, verdict)
    if alone:
        remember(kept | choices)
    return choices[kind]


def pin(pinned: Mapping[str, str]) -> None:
    """Take these decisions, whatever was found here."""
    choices.update(pinned)
    known.clear()


@contextlib.contextmanager
def for_replay(is_so: bool = True) -> Iterator[None]:
    """Inside, calls are of passes that become a CUDA graph, if that is so."""
    global replayed
    before, replayed = replayed, is_so
    try:
        yield
    finally:
        replayed = before


def summary() -> dict[str, dict[str, int]]:
    """For a log: how many kinds of call each path serves; {} where nothing had to be decided."""
    if not choices:
        return {}
    paths = list(choices.values())
    return {"kernels": {path: paths.count(path) for path in ("triton", "torch")}}


def forget() -> None:
    """Decide everything anew."""
    choices.clear()
    known.clear()
    cache_file().unlink(missing_ok=True)


def kind_of(op: str, details: object, tensors: Sequence[Tensor]) -> str:
    """A kind of call in words. Batches count as the next power of two."""
    first = tensors[0]
    shapes = []
    for t in tensors:
        batch, *rest = t.shape or (1,)
        shape = (1 << (batch - 1).bit_length() if batch else 0, *rest)
        shapes.append(f"{shape} {str(t.dtype).removeprefix('torch.')}")
    form = "nhwc" if first.ndim == 4 and first.stride(1) == 1 else "nchw"
    how = " replayed" if replayed else ""
    return f"{op} {details} {form} {'; '.join(shapes)}{how}"


def capturing() -> bool:
    """Is a CUDA graph being captured?"""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


# ---- right, and fast? ----------------------------------------------------------------------------


def examine(
    kernel: Callable, plain: Callable, tensors: Sequence[Tensor], timing: bool = True
) -> Verdict:
    """Compare two paths on random tensors like these, and time them, on a GPU."""
    device = tensors[0].device.type
    # Within a checkpointed block: what is compared here keeps its own tensors, not the block's.
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with alone(), torch.enable_grad(), torch.autocast(device, enabled=False), keep:
        return compare(kernel, plain, tensors, timing)


def trusted_steps(op: str, make: Callable, p: Tensor, emas: int) -> bool:
    """trusted() of an optimizer, which make(parameters) gives: it steps on tensors like p, with as
    many averages. Nothing is timed: torch's path takes tensors one by one."""
    if busy or chosen() != "auto":
        return True
    kind = f"{op} {p.dtype} {emas} EMAs"

    def measure(timing: bool) -> Verdict:
        with alone():
            ours = three_steps(make, p, emas)
            with reference():
                theirs = three_steps(make, p, emas)
        # A fused product and sum may round a code to its neighbour.
        return Verdict(worst(ours, theirs), 0.0, 0.0, 0.0, 1e-2)

    return decide(kind, measure) != "torch"


def three_steps(make: Callable, like: Tensor, emas: int) -> list[Tensor]:
    """What they add to two tensors, one with 8-bit moments, and to their averages."""
    generator = torch.Generator(like.device).manual_seed(0)
    noise = partial(torch.randn, generator=generator, device=like.device)
    params = [torch.nn.Parameter(noise(n, 129).to(like.dtype)) for n in (1, 40)]
    averages = [([p.detach().float() for p in params], 0.5) for _ in range(emas)]
    kept = [p.detach() for p in params] + [e for tensors, _ in averages for e in tensors]
    before = [t.clone() for t in kept]
    optimizer = make(params)
    for _ in range(3):
        for p in params:
            p.grad = noise(p.shape).to(p.dtype)
        optimizer.step(clip=1.0, ema=averages)
    return [(after - start).float() for after, start in zip(kept, before)]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside a check: its own calls are not checked."""
    global busy
    busy = True
    try:
        yield
    finally:
        busy = False


def compare(kernel: Callable, plain: Callable, tensors: Sequence[Tensor], timing: bool) -> Verdict:
    """See examine()."""
    device, dtype = tensors[0].device, tensors[0].dtype
    # its own generator: the run's random numbers are not touched
    generator = torch.Generator(device).manual_seed(0)
    leaves = [like(t, generator) for t in tensors]
    with torch.no_grad():
        gradient = like(plain(*leaves), generator)
    truth = run(plain, [t.float() for t in leaves], gradient.float())
    torch_error = worst(run(plain, leaves, gradient), truth)
    limit = max(1.5 * torch_error, ROUNDING[dtype])
    try:
        ours = run(kernel, leaves, gradient)
    except (RuntimeError, TritonError) as error:  # it does not compile, or does not fit this GPU
        print(f"kernels: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return Verdict(float("inf"), torch_error, 0.0, 0.0, limit)
    seconds = torch_seconds = 0.0
    if timing and device.type == "cuda":
        seconds = timed(kernel, leaves, gradient)
        torch_seconds = timed(plain, leaves, gradient)
    return Verdict(worst(ours, truth), torch_error, seconds, torch_seconds, limit)


def like(t: Tensor, generator: torch.Generator) -> Tensor:
    """Noise in t's shape, dtype and layout; an expanded dimension gets memory."""
    if 0 in t.stride():
        t = t.contiguous()
    noise = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    return noise.normal_(generator=generator)


def run(fn: Callable, tensors: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """Output and gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = fn(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]


def worst(values: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest relative error (Frobenius); infinite where a value is not finite."""
    errors = []
    for value, exact in zip(values, truth):
        error = float((value.float() - exact).norm() / exact.norm().clamp(min=1e-30))
        errors.append(error if error < float("inf") else float("inf"))
    return max(errors)


def timed(fn: Callable, tensors: Sequence[Tensor], gradient: Tensor) -> float:
    """Median seconds of forward and backward on the GPU, after a warm-up; infinity for what is to
    be replayed and cannot be recorded."""
    call = partial(run, fn, tensors, gradient)
    calls = 1
    if replayed:
        calls = RECORDED
        try:
            call = recorded(call)
        except RuntimeError:
            return float("inf")
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) / calls)
    return statistics.median(times[2:])


def recorded(call: Callable) -> Callable:
    """RECORDED calls, one after the other, as the replay of a CUDA graph."""

    def calls() -> list:
        for _ in range(RECORDED):
            call()
        return []

    with beside(torch.device("cuda")):
        call()
        replay, _ = record(calls)
    return replay


def complain(kind: str, verdict: Verdict) -> None:
    """One line to stderr."""
    print(
        f"kernels: {kind} is wrong here (error {verdict.error:.1e}, torch {verdict.torch_error:.1e}"
        f"): torch's is used.  Please report this line, with `python -m kernels.selfcheck`.",
        file=sys.stderr,
        flush=True,
    )


# ---- what is remembered --------------------------------------------------------------------------


def cache_file() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "twinpath" / "kernels.json"


@lru_cache
def here() -> str:
    """What a decision depends on: GPU, driver, versions, and the text of this folder."""
    text = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text.update(path.read_bytes())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = (torch.__version__, getattr(triton, "__version__", ""))
    return " | ".join([gpu, driver(), *versions, text.hexdigest()])


def driver() -> str:
    """The version of the GPU's driver, as Linux tells it; "" elsewhere."""
    for path in DRIVERS:
        try:
            return path.read_text().splitlines()[0]
        except (OSError, IndexError):
            continue
    return ""


def remembered() -> dict[str, str]:
    """Decisions that were made under the same conditions; {} if there are none or they are
    damaged."""
    try:
        kept = json.loads(cache_file().read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    found = kept.get(here()) if isinstance(kept, dict) else None
    if not isinstance(found, dict):
        return {}
    if not all(path in ("triton", "torch") for path in found.values()):
        return {}
    return found


def remember(found: Mapping[str, str]) -> None:
    """Keep decisions for the next process. Those of other conditions go: they are old."""
    path = cache_file()
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps({here(): dict(found)}, indent=1))
        os.replace(draft, path)
    except OSError:
        return  # nowhere to keep them: measured again next time
