"""Times of competitors that take turns:  race({"ours": make, "peer": make}, repeats)

One that fails is left out. On a GPU the time is the GPU's own: a CUDA graph is replayed ("graph")
or launches wait behind a sleeping kernel ("queued"), with L2 flushed before each ("seconds") or
not ("warm seconds"). On a CPU it is the clock's.
"""

import gc
import statistics
import time
from functools import lru_cache
from typing import Any, Callable, Collection

import torch
import torch._dynamo
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# graphs are captured here, so their forward passes must run here too
STREAM = torch.cuda.Stream() if CUDA else None
SECONDS = 4.0  # a race ends after so long, if each side had its 5 repeats


def finish() -> None:
    if CUDA:
        torch.cuda.synchronize()


def spread(times: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4)
    return {"seconds": median, "interquartile range": high - low}


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


def left_out(name: str, error: Exception) -> dict[str, str]:
    """Say and record why a side does not take part, and free what it held."""
    print(f"  {name} left out: {brief(error)}", flush=True)
    error.__traceback__ = None  # its frames hold the side's tensors
    free()
    return {"left out": brief(error)}


def free() -> None:
    """Give back the memory of what is no longer used."""
    gc.collect()
    if CUDA:
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:
            # a capture that broke can leave the allocator believing in it
            print(f"  memory is not given back: {brief(error)}", flush=True)


def release() -> None:
    """Between races: also forget what was compiled."""
    torch._dynamo.reset()
    free()


@lru_cache
def big() -> Tensor:
    """More than any L2 cache holds."""
    return torch.zeros(256 * 2**20, dtype=torch.uint8, device=DEVICE)


def capture(call: Callable[[], Any]) -> Callable[[], Any]:
    """call() as the replay of a CUDA graph.

    A capture that breaks leaves torch's random generator and current stream in capture mode, which
    would cost all that follows: so call() is tried first with every synchronisation an error, and
    both are put right.
    """
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        call()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, stream=STREAM):
            call()
    except Exception:
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())
        raise
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


class Run:
    """One warmed-up side of a race and how it is timed."""

    def __init__(self, call: Callable[[], Any], graph: bool):
        for _ in range(3):
            call()
        self.call, self.how, self.sleep = call, "clock", 0
        # A captured graph reads what this keeps: the output, and what its backward pass needs.
        self.captured = call
        if CUDA:
            finish()
            self.how = "queued"
            if graph:
                try:
                    self.call, self.how = capture(call), "graph"
                except Exception as error:  # any reason: it is timed in the other way, and says so
                    self.how = f"queued, since capture failed: {brief(error)}"
            finish()
            start = time.perf_counter()
            self.call()
            # how long the CPU is busy: the GPU sleeps longer than that
            launch = time.perf_counter() - start
            torch.cuda.synchronize()
            self.sleep = int(2e9 * min(1e-4 + 1.5 * launch, 0.05))  # cycles, at 2 GHz or less

    def seconds(self, warm: bool) -> float:
        if not CUDA:
            start = time.perf_counter()
            self.call()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if not warm:
            big().max()  # read, not written: dirty lines would be written back in the timed part
        torch.cuda._sleep(self.sleep)
        start.record()
        self.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def race(
    makers: dict[str, Callable[[], Callable[[], Any]]],
    repeats: int,
    uncaptured: Collection[str] = (),
) -> dict[str, dict[str, Any]]:
    """Per side: median seconds and interquartile range with cold caches, the median with warm ones,
    and how it was timed; or why it was left out.

    makers[name]() returns the call to time: whatever fails, from there on, costs only that side.
    `uncaptured` sides are known to break a capture.
    """
    runs, results, times = {}, {}, {}
    for name, make in makers.items():
        try:
            runs[name] = Run(make(), name not in uncaptured)
            times[name] = {"cold": [], "warm": []}
        except Exception as error:  # import, construction, compilation, launch, memory
            results[name] = left_out(name, error)
    for state in ("cold", "warm") if CUDA else ("cold",):
        start = time.perf_counter()
        for i in range(repeats):
            for name in list(runs):
                try:
                    times[name][state].append(runs[name].seconds(state == "warm"))
                except Exception as error:
                    del runs[name]
                    results[name] = left_out(name, error)
            if i >= 4 and time.perf_counter() - start > SECONDS:
                break
    for name, run in runs.items():
        results[name] = {
            **spread(times[name]["cold"]),
            "repeats": len(times[name]["cold"]),
            "how": run.how,
        }
        if CUDA:
            results[name]["warm seconds"] = statistics.median(times[name]["warm"])
    return {name: results[name] for name in makers}


def alternate(
    calls: dict[str, Callable[[], Any]], rounds: int, times_each: int = 1
) -> dict[str, float]:
    """Median seconds a call of each side on a CPU.

    Measured in turns so that a noisy machine hits all alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(times_each):
                call()
            seconds[name].append((time.perf_counter() - start) / times_each)
    return {name: statistics.median(v) for name, v in seconds.items()}
