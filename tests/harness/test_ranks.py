"""A device that is not here, and an environment that no torchrun made, are refused in one line."""

import socket

import pytest
import torch

from harness.cli import UserError
from harness.ranks import check_batch, join_ranks, pick_device, place_here

WHERE = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "name",
    ["meta", "hpu", "vulkan", "xla", "", "cpu:7", "cpu:", "cuda:99", "cuda:x", "cuda:-1", "mkldnn"]
    + ["gpu", "CPU", "privateuseone", "x" * 5000],
)
def test_a_device_that_cannot_compute_here_is_refused(name):
    with pytest.raises(UserError) as caught:
        pick_device(name)
    line = str(caught.value)
    assert "--device" in line and "Try --device cpu, or auto." in line and len(line) < 300
    assert "\n" not in line


def test_what_torch_says_of_a_missing_device_is_cut_to_its_first_sentence():
    if torch.backends.mps.is_available():
        pytest.skip("there is an mps device")
    with pytest.raises(UserError) as caught:
        pick_device("mps")
    assert len(str(caught.value)) < 300


def test_the_cpu_is_a_device():
    assert pick_device("cpu") == torch.device("cpu") and pick_device("cpu:0").type == "cpu"


@pytest.mark.parametrize(
    "env, message",
    [
        ({"RANK": "0"}, "WORLD_SIZE is not"),
        ({"WORLD_SIZE": "1"}, "RANK is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK='2': wanted 0 to 1"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1': wanted 0 to 1"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x'"),
        ({"RANK": "²", "WORLD_SIZE": "2"}, "RANK='²'"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK=''"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE='0': wanted 1 to 1000000"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE='999"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}, "MASTER_PORT is not"),
        ({"RANK": "0", "WORLD_SIZE": "1", **WHERE, "MASTER_PORT": "0"}, "MASTER_PORT='0'"),
        ({"RANK": "0", "WORLD_SIZE": "1", **WHERE, "MASTER_PORT": "70000"}, "1 to 65535"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "29500"}, "MASTER_ADDR is not"),
    ],
)
def test_an_environment_that_torchrun_cannot_have_made_is_refused(env, message, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *WHERE):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    for begin in (lambda: join_ranks("cpu"), lambda: check_batch(8, 1)):
        with pytest.raises(UserError) as caught:
            begin()
        line = str(caught.value)
        assert message in line and "unset RANK and WORLD_SIZE" in line and len(line) < 300


def test_the_environment_says_who_one_is(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert place_here() is None
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", **WHERE}.items():
        monkeypatch.setenv(name, value)
    assert place_here() == (3, 8)
    with pytest.raises(UserError, match="--batch 12 is not divisible by 8 ranks"):
        check_batch(12, 1)


def test_a_local_rank_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(UserError, match="LOCAL_RANK='first'"):
        pick_device("cuda")


def test_a_port_that_is_taken_ends_in_one_line(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        env = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
        for name, value in {**env, "MASTER_PORT": str(taken.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with pytest.raises(UserError, match="rank 0 of 1 met no others at localhost"):
            join_ranks("cpu")
