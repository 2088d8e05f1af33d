"""Compile every kernel configuration for GPUs that are not here:  python tests/aot.py [--quick]

For sm_80, sm_89, sm_90, sm_100 and gfx942: does it compile, does its shared memory fit, does it
spill (sm_90), are its loads 128 bits wide, does attention use wgmma on sm_90 (from 64 rows on)?
Prints a table; exit code 1 if any answer is no. Registers, spills, loads and wgmma are read for
sm_90. Pointers and the sizes and strides that are multiples of 16 in our U-Nets carry the hints
that the JIT would give them; for sm_90 also as it specialises where every size is such a multiple
("÷16") and where strides pass 2^31 ("i64"). That is a thousand compilations, some ten minutes on
two cores. --quick: every configuration for sm_90, and one of each kernel for the other GPUs.
"""

import inspect
import itertools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # the compiler itself, in a process of its own
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import triton.language as tl

from kernels import adamw8bit, attention, groupnorm

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_89": (GPUTarget("cuda", 89, 32), 99 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
OTHER_POINTERS = {
    "table": "*i64",
    "owner": "*i32",
    "scalars": "*fp32",
    "control": "*fp32",
    "levels": "*fp32",
    "buckets": "*u8",
}
FLOAT_POINTERS = {
    "mean",
    "m2",
    "a",
    "d",
    "group_mean",
    "group_rstd",
    "ps",
    "qs",
    "P",
    "Q",
    "c0",
    "c1",
    "lse",
    "delta",
}
WEIGHTS = {"weight", "bias", "dw", "db"}  # fp32 parameters, and their gradients
SCALARS = {"eps": "fp32", "scale": "fp32", "scale2": "fp32"}
NOT_16 = {"B", "HW", "K", "G", "N", "M", "heads", "sc"}  # sizes that need not be multiples of 16


STRIDES = {"sb", "sp", "ss", "ts"} | {a + b for a in "qkvgoe" for b in "bhn"}
VARIANTS = ("", "÷16", "i64")


def source(kernel, constants: dict, dtype: str, variant: str) -> ASTSource:
    """The kernel with the signature and hints that a launch on dtype tensors would give it."""
    names = list(inspect.signature(kernel.fn).parameters)
    signature, hints = {}, {}
    pointers = pointer_names(kernel)
    for i, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in OTHER_POINTERS:
            signature[name] = OTHER_POINTERS[name]
            hints[(i,)] = [["tt.divisibility", 16]]
        elif name in pointers:
            signature[name] = "*fp32" if name in FLOAT_POINTERS | WEIGHTS else f"*{dtype}"
            hints[(i,)] = [["tt.divisibility", 16]]
        elif name in SCALARS:
            signature[name] = SCALARS[name]
        else:
            signature[name] = "i64" if variant == "i64" and name in STRIDES else "i32"
            if name not in NOT_16 or variant == "÷16":
                hints[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, hints)


def pointer_names(kernel) -> set[str]:
    """Arguments that are loaded from or stored to: the ones before the first size."""
    names = []
    for name in inspect.signature(kernel.fn).parameters:
        if name in ("HW", "qb", "ob", "B"):
            break
        names.append(name)
    return set(names)


def cases() -> list[tuple]:
    """(label, kernel, constants, options, dtype of the data) of everything that ships."""
    g, out = groupnorm, []
    tile = {"ROWS": g.ROWS, "COLS": g.COLS}
    options = {"num_warps": g.WARPS}
    # an argument of 1 reaches the compiler as a constant
    layouts = {"nhwc": {"NHWC": True, "sc": 1}, "nchw": {"NHWC": False, "sp": 1}}
    for CG, (layout, forms), (what, silu, dtype) in itertools.product(
        (6, 8),
        layouts.items(),
        (("", True, "bf16"), (" no silu", False, "bf16"), ("", True, "fp32")),
    ):
        tag, per = f"C/G={CG} {layout}{what}", {"CG": CG, "SILU": silu, **forms}
        out += [
            (f"gn apply {tag}", g.apply_kernel, {**per, **tile}, options, dtype),
            (f"gn sums {tag}", g.sums_kernel, {**per, **tile, "CHUNK": g.CHUNK}, options, dtype),
            (f"gn dx {tag}", g.dx_kernel, {**per, **tile}, options, dtype),
        ]
        if CG == 6 and silu:
            out.append(
                (
                    f"gn moments {tag}",
                    g.moments_kernel,
                    {**forms, "CHUNK": g.CHUNK, **tile},
                    options,
                    dtype,
                )
            )
    for CG, film in itertools.product((6, 8), (True, False)):
        CGP, tag = triton.next_power_of_2(CG), f"C/G={CG}{'' if film else ' no FiLM'}"
        out.append(
            (
                f"gn coefficients {tag}",
                g.forward_coefficients_kernel,
                {"FILM": film, "CHUNK": g.CHUNK, "CG": CG, "CGP": CGP},
                {"num_warps": 1},
                "bf16",
            )
        )
        if film:
            out.append(
                (
                    f"gn coefficients bwd {tag}",
                    g.backward_coefficients_kernel,
                    {"CG": CG, "CGP": CGP},
                    {"num_warps": 1},
                    "bf16",
                )
            )
    for (CG, HWP), (layout, forms), film in itertools.product(
        ((48, 64), (24, 64), (48, 16), (8, 256), (3, 1024), (1, 4096)),
        layouts.items(),
        (True, False),
    ):
        per = {
            "CG": CG,
            "SILU": film,
            "HWP": HWP,
            "CGP": triton.next_power_of_2(CG),
            **{k: v for k, v in forms.items() if k != "NHWC"},
        }
        tag = f"C/G={CG} HW={HWP} {layout}{'' if film else ' plain'}"
        out += [
            (f"gn small {tag}", g.small_forward_kernel, {**per, "FILM": film}, options, "bf16"),
            (f"gn small bwd {tag}", g.small_backward_kernel, per, options, "bf16"),
        ]
    finish = {"ROWS": g.FINISH_ROWS, "COLS": g.FINISH_COLS}
    for film in (True, False):
        label = f"gn coefficients of weights{'' if film else ' no FiLM'}"
        out.append((label, g.finish_kernel, {"FILM": film, **finish}, options, "bf16"))
    one = {"HW": 1, "CG": 48, "SILU": True, "HWP": 1, "CGP": 64, "sc": 1}
    out += [
        ("gn small one pixel", g.small_forward_kernel, {**one, "FILM": True}, options, "bf16"),
        ("gn small bwd one pixel", g.small_backward_kernel, one, options, "bf16"),
        (
            "gn coefficients bwd one pixel",
            g.backward_coefficients_kernel,
            {"HW": 1, "K": 1, "CG": 48, "CGP": 64},
            {"num_warps": 1},
            "bf16",
        ),
    ]
    for quant, emas, gradient in itertools.product(
        (True, False), (0, 2), (tl.float32, tl.bfloat16)
    ):
        out.append(
            (
                f"adamw8bit {'8-bit' if quant else 'fp32'} {emas} EMAs g={gradient}",
                adamw8bit.update_kernel,
                {
                    "P": tl.float32,
                    "G": gradient,
                    "QUANT": quant,
                    "E": emas,
                    "ROWS": adamw8bit.ROWS,
                    "BLOCK": adamw8bit.BLOCK,
                },
                {"num_warps": adamw8bit.WARPS},
                "fp32",
            )
        )
    for kind, D, dtype in itertools.product(
        attention.CONFIG, attention.HEAD_DIMS, ("bf16", "fp32")
    ):
        BN, BM, warps, stages = attention.config(
            kind, D, torch.bfloat16 if dtype == "bf16" else torch.float32
        )
        name = {"forward": "forward_kernel", "small": "backward_small_kernel"}.get(
            kind, f"{kind}_kernel"
        )
        # the op rounds N up to a power of two
        rows = {BN} | {n for n in (16, 32, 64, 128) if kind == "small" and n < BN}
        out += [
            (
                f"attention {kind} D={D} N={n}" if kind == "small" else f"attention {kind} D={D}",
                getattr(attention, name),
                {"D": D, "BN": n, "BM": BM},
                {"num_warps": warps, "num_stages": stages},
                dtype,
            )
            for n in sorted(rows)
        ]
    out += [
        (
            f"attention delta D={D}",
            attention.delta_kernel,
            {"D": D, "BN": attention.DELTA_ROWS},
            {"num_warps": 4},
            "bf16",
        )
        for D in attention.HEAD_DIMS
    ]
    return out


def spills(ptx: str, arch: str) -> tuple[int, int]:
    """(registers, bytes spilled) by the ptxas that Triton ships."""
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        text = subprocess.run(
            [str(ptxas), "-v", f"--gpu-name={arch}", file.name, "-o", os.devnull],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    registers = re.search(r"Used (\d+) registers", text)[1]
    spilled = re.search(r"(\d+) bytes spill stores", text)[1]
    return int(registers), int(spilled)


def examine(
    label: str, kernel, constants: dict, options: dict, dtype: str, target: str, variant: str
) -> tuple[str, list[str]]:
    """A table row and what is wrong with it."""
    gpu, limit = TARGETS[target]
    label = f"{label} {variant}".rstrip()
    try:
        k = triton.compile(source(kernel, constants, dtype, variant), target=gpu, options=options)
    except Exception as error:  # every kind of compiler error is the answer "no"
        why = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        return f"{label:<42} {target:<7} does not compile", [f"{label} {target}: {why}"]
    shared, wrong = k.metadata.shared, []
    registers, spilled, wide, mma = "", "", "", ""
    if shared > limit:
        wrong.append(f"shared memory {shared} > {limit}")
    if target == "sm_90":
        ptx = k.asm["ptx"]
        registers, spilled = spills(ptx, "sm_90a")
        wide = len(re.findall(r"ld\.global\S*\.v4|cp\.async\.cg|cp\.async\.bulk", ptx))
        mma = ptx.count("wgmma.mma_async")
        if spilled:
            wrong.append(f"{spilled} bytes spilled")
        if not wide and not any(w in label for w in ("coefficients", "nchw", "small")):
            wrong.append("no 128-bit load")
        uses_dots = "attention" in label and "delta" not in label and dtype == "bf16"
        if uses_dots and constants["BN"] >= 64 and not mma:  # it takes 64 rows
            wrong.append("no wgmma")
    row = (
        f"{label:<42} {target:<7} {dtype}  regs {registers!s:>4}  spill {spilled!s:>4}  "
        f"smem {shared:>6}  128-bit {wide!s:>3}  wgmma {mma!s:>3}"
    )
    if wrong:
        row += f"   <- {', '.join(wrong)}"
    return row, [f"{label} {target}: {problem}" for problem in wrong]


def quick_jobs() -> list[tuple]:
    """See --quick."""
    found, seen = [], set()
    for job in jobs():
        kernel, target, variant = job[1], job[-2], job[-1]
        if not variant and (target == "sm_90" or (kernel, target) not in seen):
            seen.add((kernel, target))
            found.append(job)
    return found


def jobs() -> list[tuple]:
    """Everything for every target; the JIT's other specialisations for sm_90.

    A consumer GPU does not run the one-program backward pass: attention.roomy(). The optimizer's
    kernel takes no sizes, so it has no other specialisation.
    """
    return [
        (*case, target, variant)
        for case in cases()
        for target in TARGETS
        if (target, case[0][:15]) != ("sm_89", "attention small")
        for variant in VARIANTS
        if not variant or target == "sm_90" and case[1] is not adamw8bit.update_kernel
    ]


def examine_job(number: int, quick: bool) -> tuple[str, list[str]]:
    chosen = quick_jobs() if quick else jobs()
    return examine(*chosen[number])


def main() -> None:
    quick, bad = "--quick" in sys.argv, []
    n = len(quick_jobs() if quick else jobs())
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for row, wrong in pool.map(examine_job, range(n), [quick] * n, chunksize=8):
            print(row, flush=True)
            bad += wrong
    verdict = f"{len(bad)} problems" if bad else "all well"
    print(f"{n} compilations, triton {triton.__version__}: {verdict}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
