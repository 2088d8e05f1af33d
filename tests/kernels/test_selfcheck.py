"""python -m kernels.selfcheck: a table of every kind of call, and an exit code."""

import sys

import pytest

from kernel_cases import GPU

from kernels import dispatch, proof, selfcheck
from kernels.groupnorm import GroupNormSilu


@pytest.fixture
def check(monkeypatch, tmp_path, capsys):
    """check("--model", "nano") -> (exit code, lines of the table); nothing decided, own cache."""
    monkeypatch.setenv("KERNELS", "torch")  # what the command sets ends with the test
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(dispatch, "interpret_in_auto", False)
    tables = (proof.choices, proof.known, proof.verdicts)

    def run(*args):
        for table in tables:
            table.clear()
        monkeypatch.setattr(sys, "argv", ["selfcheck.py", *args])
        return selfcheck.main(), capsys.readouterr().out.splitlines()

    yield run
    for table in tables:
        table.clear()


NANO = ("--model", "nano", "--batch", "1", "--side", "8", "--dtype", "fp16")


def test_a_network_whose_kernels_are_right(check):
    code, lines = check(*NANO)
    head, *rows, verdict = lines
    assert code == 0 and head.startswith("path")
    assert verdict == f"{len(rows)} kinds of call, 0 wrong"
    assert {row.split()[0] for row in rows} <= {"triton", "torch"}
    for op in ("group_norm_silu", "attention"):
        assert any(op in row for row in rows)
    assert proof.remembered() == proof.choices and len(proof.choices) == len(rows)
    if not GPU:
        assert all("not timed" in row for row in rows)


def test_a_wrong_kernel_is_shown_and_ends_with_1(check, monkeypatch):
    right = GroupNormSilu.forward
    wrong = staticmethod(lambda ctx, *args: right(ctx, *args) * 1.02)
    monkeypatch.setattr(GroupNormSilu, "forward", wrong)
    code, lines = check(*NANO)
    norms = [line for line in lines if "group_norm_silu" in line]
    assert code == 1 and lines[-1].endswith(f"{len(norms)} wrong")
    assert norms and all(row.startswith("torch") and row.endswith("WRONG") for row in norms)
    others = [line for line in lines[1:-1] if line not in norms]
    assert others and not any("WRONG" in row for row in others)


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(check, monkeypatch):
    code, lines = check("--model", "nano", "--dtype", "bf16")
    assert code == 2 and len(lines) == 1 and "--dtype fp16" in lines[0]
    monkeypatch.delenv("TRITON_INTERPRET")
    code, lines = check("--model", "nano")
    assert code == 2 and len(lines) == 1 and "TRITON_INTERPRET=1" in lines[0]
