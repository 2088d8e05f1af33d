"""What benchmarks/isa.py counts, on code and sizes that can be counted by hand."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks import compilations, isa

ROOT = Path(__file__).parents[2]
KB = 1024


@pytest.mark.parametrize(
    "target, registers, shared, warps, share",
    [
        # a scheduler of sm_80 has 64 KB of registers: 512 of 32 lanes
        ("sm_80", 32, 0, 8, 1),
        ("sm_80", 64, 0, 8, 1 / 2),
        ("sm_80", 65, 0, 4, 7 / 16),  # they are given out by eights
        ("sm_80", 255, 0, 8, 1 / 8),
        ("sm_80", 32, 48 * KB, 8, 3 / 8),  # 164 KB hold three blocks of 48 + 1
        ("sm_90", 16, 0, 1, 1 / 2),  # 32 blocks at most
        ("sm_89", 40, 0, 8, 1),  # of 48 warps
        ("gfx942", 128, 0, 4, 1 / 2),  # four waves of eight on each SIMD
        ("gfx942", 16, 64 * KB, 4, 1 / 8),
    ],
)
def test_what_fills_a_multiprocessor_bounds_its_warps(target, registers, shared, warps, share):
    got = compilations.occupancy(registers, shared, warps, compilations.TARGETS[target])
    assert got == pytest.approx(share)


AMD = """
kernel:
\tv_mov_b32 v0, 0
.LBB0_1:
\tv_add_f32 v0, v0, v1
\ts_nop 0
\ts_cbranch_vccnz .LBB0_9
.LBB0_2:
\ts_cbranch_scc0 .LBB0_1
\ts_endpgm
.LBB0_9:
\tv_mul_f32 v0, v0, v1
\ts_branch .LBB0_2
.LBB0_10:
\tv_mov_b32 v7, v7
"""


def test_instructions_are_counted_where_they_can_be_reached_and_in_loops_where_again():
    code = SimpleNamespace(asm={"amdgcn": AMD})
    # The loop is add, branch, branch and, out of line, mul and branch; the last mov is never run.
    assert compilations.instructions(code) == (7, 5)
    straight = AMD.replace("s_cbranch_scc0 .LBB0_1", "s_cbranch_scc0 .LBB0_2x").replace(
        ".LBB0_10:", ".LBB0_2x:"
    )
    assert compilations.instructions(SimpleNamespace(asm={"amdgcn": straight})) == (8, 0)


def test_a_call_has_to_read_and_write_its_tensors_once():
    floors = isa.floors()
    x = 2 * 64 * 256 * 32 * 32
    chunks = 4 * 64 * 256 * (1024 // 128)
    assert floors["gn moments nhwc"] == x + 2 * chunks
    assert floors["gn apply C/G=8 nhwc"] == 2 * x + 2 * 4 * 64 * 256 + 4 * 64 * 32
    heads = 2 * 64 * 4 * 256 * 64
    # q, k, v, o and do are read, three gradients written
    assert floors["attention small D=64 N=256"] == 8 * heads + 4 * 64 * 4 * 256
    # p, m, v and two EMAs twice, g once; m and v have 1 byte and a 64th each
    bytes_each = 2 * (4 + 2 * (1 + 1 / 64) + 2 * 4) + 4
    weights = floors["adamw8bit 8-bit 2 EMAs g=fp32"] / bytes_each
    assert weights == pytest.approx(281_730_336, rel=2e-3)
    assert set(floors) == {*isa.LABELS.values(), *isa.OPTIMIZER.values()}


def test_every_kernel_has_a_row():
    shown = {*isa.LABELS.values(), *isa.OPTIMIZER.values()}
    found = {case.kernel for case in compilations.cases()}
    assert found == {case.kernel for case in compilations.cases() if case.label in shown}


def test_a_commit_that_is_not_there_is_told_in_one_line():
    command = [sys.executable, "benchmarks/isa.py", "--before", "nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "--before nowhere" in done.stderr


def test_the_table_says_that_nothing_spills_but_what_may():
    rows = json.loads((ROOT / "benchmarks/results/isa.json").read_text())["rows"]
    for row in rows:
        allowed = compilations.SPILLS.get(row["kernel"], 0)
        spilled = {target: n["spilled"] for target, n in row["now"].items()}
        assert all(bytes_ <= allowed for bytes_ in spilled.values()), (row["kernel"], spilled)
