"""What needs a GPU, beside the numeric kernel tests, which run there too:

    TWINPATH_GPU=1 python -m pytest tests/gpu tests/test_kernels.py tests/test_adamw8bit.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or os.environ.get("TWINPATH_GPU") != "1",
                                reason="needs a CUDA GPU and TWINPATH_GPU=1 (which compiles kernels instead of interpreting them)")
ROOT = Path(__file__).parent.parent.parent


def test_a_unet_step_can_be_captured_in_a_cuda_graph(monkeypatch):
    monkeypatch.setenv("KERNELS", "triton")
    from model import PRESETS, UNet
    from conftest import randomize
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    net = randomize(UNet(PRESETS["nano"])).cuda()
    x, t = torch.randn(8, 32, 8, 8, device="cuda").contiguous(memory_format=torch.channels_last), torch.rand(8, device="cuda") * 1000

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
    assert all(torch.equal(p.grad, captured[n]) for n, p in net.named_parameters() if p.grad is not None)   # deterministic kernels


@pytest.mark.parametrize("optim", ["adamw", "adamw8bit"])
def test_a_short_run_learns_and_resumes(tmp_path, optim):
    args = [sys.executable, "train.py", "--data", "toyfaces:256", "--images", "6400", "--batch", "64", "--log-every", "640", "--optim", optim,
            "--out", str(tmp_path)]
    for _ in range(2):
        done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "finished" in done.stdout, done.stderr[-3000:]
    log = [json.loads(line) for line in next(tmp_path.glob("*/log.jsonl")).read_text().splitlines()]
    losses = [row["loss"] for row in log if row["event"] == "train"]
    assert losses[-1] < 0.8 * losses[0]
