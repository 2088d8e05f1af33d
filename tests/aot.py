"""Compile every kernel configuration for GPUs that are not here:  python tests/aot.py [--quick]

For sm_80, sm_89, sm_90, sm_100 and gfx942: does it compile, does its shared memory fit, does it
spill, are its loads 128 bits wide (on sm_90), does attention use wgmma on sm_90 (from 64 rows on)?
Prints a table; exit code 1 if any answer is no. For sm_90 also as the JIT specialises where every
size is a multiple of 16 ("÷16") and where strides pass 2^31 ("i64"). That is a thousand
compilations, some ten minutes on two cores. --quick: every kernel once for every GPU.
"""

import os
import re
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # the compiler itself, in a process of its own
sys.path.insert(0, str(Path(__file__).parent.parent))

import triton

from benchmarks.compilations import (
    SPILLS,
    TARGETS,
    VARIANTS,
    Case,
    cases,
    compiled,
    resources,
    runs_on,
)
from kernels import adamw8bit

Job = tuple[Case, str, str]  # with its target and variant


def jobs() -> list[Job]:
    """Everything for every target; the JIT's other specialisations for sm_90.

    The optimizer's kernel takes no sizes, so it has no other specialisation.
    """
    found = []
    for case in cases():
        for target in TARGETS:
            sized = target == "sm_90" and case.kernel is not adamw8bit.update_kernel
            variants = VARIANTS if sized else VARIANTS[:1]
            if runs_on(case, target):
                found += [(case, target, variant) for variant in variants]
    return found


def quick_jobs() -> list[Job]:
    """Every kernel once for every target, each target with another of its configurations."""
    of = defaultdict(list)
    for case in cases():
        of[case.kernel].append(case)
    found = []
    for own in of.values():
        for i, target in enumerate(TARGETS):
            case = own[i % len(own)]
            if runs_on(case, target):
                found.append((case, target, ""))
    return found


def examine(case: Case, target: str, variant: str) -> tuple[str, list[str]]:
    """A table row and what is wrong with it."""
    label = f"{case.label} {variant}".rstrip()
    try:
        code = compiled(case, target, variant)
    except Exception as error:  # every kind of compiler error is the answer "no"
        why = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        return f"{label:<42} {target:<7} does not compile", [f"{label} {target}: {why}"]
    limit = TARGETS[target].shared - TARGETS[target].reserved
    shared, wrong = code.metadata.shared, []
    registers, spilled = resources(code)
    wide, mma = "", ""
    if shared > limit:
        wrong.append(f"shared memory {shared} > {limit}")
    if spilled > SPILLS.get(case.label, 0):
        wrong.append(f"{spilled} spilled")
    if target == "sm_90":
        ptx = code.asm["ptx"]
        wide = len(re.findall(r"ld\.global\S*\.v4|cp\.async\.cg|cp\.async\.bulk", ptx))
        mma = ptx.count("wgmma.mma_async")
        if not wide and not any(w in label for w in ("coefficients", "nchw", "small")):
            wrong.append("no 128-bit load")
        uses_dots = "attention" in label and "delta" not in label and case.dtype == "bf16"
        if uses_dots and case.constants["BN"] >= 64 and not mma:  # it takes 64 rows
            wrong.append("no wgmma")
    row = (
        f"{label:<42} {target:<7} regs {registers:>4}  spill {spilled:>4}  "
        f"smem {shared:>6}  128-bit {wide!s:>3}  wgmma {mma!s:>3}"
    )
    if wrong:
        row += f"   <- {', '.join(wrong)}"
    return row, [f"{label} {target}: {problem}" for problem in wrong]


def examine_job(number: int, quick: bool) -> tuple[str, list[str]]:
    chosen = quick_jobs() if quick else jobs()
    return examine(*chosen[number])


def main() -> None:
    quick, bad = "--quick" in sys.argv, []
    n = len(quick_jobs() if quick else jobs())
    with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
        for row, wrong in pool.map(examine_job, range(n), [quick] * n, chunksize=8):
            print(row, flush=True)
            bad += wrong
    verdict = f"{len(bad)} problems" if bad else "all well"
    print(f"{n} compilations, triton {triton.__version__}: {verdict}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
