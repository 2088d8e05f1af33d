"""Work on a GPU as one CUDA graph, which is launched at once: recorded here, and replayed."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


def record(run: Callable[[], list]) -> tuple[Callable[[], Any], list]:
    """(replay, the tensors that it writes) of a function without arguments."""
    graph = torch.cuda.CUDAGraph()
    # On the stream that is current: what ran there before is what warmed it up.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        outcome = run()
    return graph.replay, outcome


@contextlib.contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """On another stream than the default one, which cannot be recorded."""
    if device.type != "cuda":
        yield
        return
    stream, main = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(main)
    with torch.cuda.stream(stream):
        yield
    main.wait_stream(stream)
