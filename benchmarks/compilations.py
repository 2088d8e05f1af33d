"""Every configuration of a kernel that ships, compiled for GPUs that are not here.

    python -m benchmarks.compilations LABEL …     # what these compile to on each target, as JSON

tests/aot.py asks whether all of them compile and fit; benchmarks/isa.py counts what is in them.
Pointers, and the sizes and strides that are multiples of 16 in our U-Nets, carry the hints that the
JIT would give them.
"""

import inspect
import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import triton.language as tl

from kernels import adamw8bit, attention, groupnorm

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Target(NamedTuple):
    """A GPU, and what one of its multiprocessors has.

    From the CUDA C++ Programming Guide's table of compute capabilities and AMD's CDNA3 ISA guide.
    All have four schedulers with 512 registers a lane each.
    """

    gpu: GPUTarget
    warps: int
    blocks: int
    shared: int  # bytes; NVIDIA keeps RESERVED of them for itself in each block
    reserved: int


KB = 1024
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 64, 32, 164 * KB, KB),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 48, 24, 100 * KB, KB),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 64, 32, 228 * KB, KB),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 64, 32, 228 * KB, KB),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 32, 32, 64 * KB, 0),
}
SCHEDULERS, LANE_REGISTERS, REGISTER_UNIT = 4, 512, 8
OTHER_POINTERS = {
    "table": "*i64",
    "owner": "*i32",
    "scalars": "*fp32",
    "keys": "*i32",
    "control": "*fp32",
    "levels": "*fp32",
    "buckets": "*u8",
}
FLOAT_POINTERS = {
    *("mean", "m2", "a", "d", "group_mean", "group_rstd"),
    *("ps", "qs", "P", "Q", "c0", "c1", "lse", "delta"),
    *("weight", "bias", "dw", "db"),  # fp32 parameters, and their gradients
}
SCALARS = {"eps": "fp32", "scale": "fp32", "scale2": "fp32"}
NOT_16 = {"B", "HW", "K", "G", "N", "M", "heads", "sc"}  # sizes that need not be multiples of 16
STRIDES = {"sb", "sp", "ss", "ts"} | {a + b for a in "qkvgoe" for b in "bhn"}
# How the JIT may specialise: as in our U-Nets; where every size is a multiple of 16; where strides
# pass 2^31.
VARIANTS = ("", "÷16", "i64")
# Bytes of stack that may be spilled, on NVIDIA's: on an H100 these are 27% and 43% faster than the
# tiles that spill none.
SPILLS = {"attention small D=64 N=256": 128, "attention small D=32 N=256": 16}


class Case(NamedTuple):
    """A configuration: the kernel's constants, warps and stages, and the dtype of its data."""

    label: str
    kernel: Any
    constants: dict[str, Any]
    options: dict[str, int]
    dtype: str


# ---- what ships ----------------------------------------------------------------------------------

# An argument of 1 reaches the compiler as a constant.
LAYOUTS = {"nhwc": {"NHWC": True, "sc": 1}, "nchw": {"NHWC": False, "sp": 1}}
WARPS = {"num_warps": groupnorm.WARPS}
ONE_WARP = {"num_warps": 1}


def cases() -> list[Case]:
    """Everything that ships."""
    return [
        *norm_cases(),
        *coefficient_cases(),
        *whole_norm_cases(),
        *optimizer_cases(),
        *attention_cases(),
    ]


def norm_cases() -> list[Case]:
    """GroupNorm by tiles of rows and channels."""
    g, found = groupnorm, []
    tile = {"ROWS": g.ROWS, "COLS": g.COLS}
    kinds = (("", True, "bf16"), (" no silu", False, "bf16"), (" fp32", True, "fp32"))
    for CG, (layout, forms), (what, silu, dtype) in product((6, 8), LAYOUTS.items(), kinds):
        tag, per = f"C/G={CG} {layout}{what}", {"CG": CG, "SILU": silu, **forms}
        summed = sum_tile(layout)
        found += [
            Case(f"gn apply {tag}", g.apply_kernel, {**per, **tile}, WARPS, dtype),
            Case(f"gn sums {tag}", g.sums_kernel, {**per, **summed}, WARPS, dtype),
            Case(f"gn dx {tag}", g.dx_kernel, {**per, **tile}, WARPS, dtype),
        ]
        if CG == 6 and silu:
            label = f"gn moments {layout}{what}"
            found.append(Case(label, g.moments_kernel, {**forms, **summed}, WARPS, dtype))
    return found


def sum_tile(layout: str) -> dict[str, int]:
    """The constants of a tile of the kernels that sum."""
    g = groupnorm
    tile = g.ROWS, g.COLS  # of all kernels, once
    if hasattr(g, "SUM_TILE"):
        tile = g.SUM_TILE[layout == "nhwc"]
    return {"CHUNK": g.CHUNK, "ROWS": tile[0], "COLS": tile[1]}


def coefficient_cases() -> list[Case]:
    """What stands between GroupNorm's tiles, and what finishes the gradients of weights."""
    g, found = groupnorm, []
    for CG, film in product((6, 8), (True, False)):
        CGP, tag = triton.next_power_of_2(CG), f"C/G={CG}{'' if film else ' no FiLM'}"
        per = {"CG": CG, "CGP": CGP}
        ahead = {"FILM": film, "CHUNK": g.CHUNK, **per}
        label = f"gn coefficients {tag}"
        found.append(Case(label, g.forward_coefficients_kernel, ahead, ONE_WARP, "bf16"))
        if film:
            label = f"gn coefficients bwd {tag}"
            found.append(Case(label, g.backward_coefficients_kernel, per, ONE_WARP, "bf16"))
    one = {"HW": 1, "K": 1, "CG": 48, "CGP": 64}
    label = "gn coefficients bwd one pixel"
    found.append(Case(label, g.backward_coefficients_kernel, one, ONE_WARP, "bf16"))
    if not hasattr(g, "finish_kernel"):  # torch did that once
        return found
    for film in (True, False):
        label = f"gn coefficients of weights{'' if film else ' no FiLM'}"
        constants = {"FILM": film, "ROWS": g.FINISH_ROWS, "COLS": g.FINISH_COLS}
        found.append(Case(label, g.finish_kernel, constants, WARPS, "bf16"))
    return found


def whole_norm_cases() -> list[Case]:
    """GroupNorm of a (sample, group) by one program."""
    g, found = groupnorm, []
    sizes = ((48, 64), (24, 64), (48, 16), (8, 256), (3, 1024), (1, 4096))
    for (CG, HWP), (layout, forms), film in product(sizes, LAYOUTS.items(), (True, False)):
        per = {"CG": CG, "SILU": film, "HWP": HWP, "CGP": triton.next_power_of_2(CG)}
        per |= {name: value for name, value in forms.items() if name != "NHWC"}
        tag = f"C/G={CG} HW={HWP} {layout}{'' if film else ' plain'}"
        ahead = {**per, "FILM": film}
        warps = {"num_warps": g.small_warps(HWP * per["CGP"])}
        found += [
            Case(f"gn small {tag}", g.small_forward_kernel, ahead, warps, "bf16"),
            Case(f"gn small bwd {tag}", g.small_backward_kernel, per, warps, "bf16"),
        ]
    one = {"HW": 1, "CG": 48, "SILU": True, "HWP": 1, "CGP": 64, "sc": 1}
    ahead = {**one, "FILM": True}
    warps = {"num_warps": g.small_warps(64)}
    found += [
        Case("gn small one pixel", g.small_forward_kernel, ahead, warps, "bf16"),
        Case("gn small bwd one pixel", g.small_backward_kernel, one, warps, "bf16"),
    ]
    return found


def optimizer_cases() -> list[Case]:
    kernel, options = adamw8bit.update_kernel, {"num_warps": adamw8bit.WARPS}
    found = []
    for quant, emas, gradient in product((True, False), (0, 2), (tl.float32, tl.bfloat16)):
        constants = {"P": tl.float32, "G": gradient, "QUANT": quant, "E": emas}
        constants |= {"ROWS": adamw8bit.ROWS, "BLOCK": adamw8bit.BLOCK, "STOCHASTIC": False}
        label = f"adamw8bit {'8-bit' if quant else 'fp32'} {emas} EMAs g={gradient}"
        found.append(Case(label, kernel, constants, options, "fp32"))
        if gradient == tl.bfloat16:
            rounded = {**constants, "P": tl.bfloat16, "STOCHASTIC": True}
            found.append(Case(f"{label} p=bf16", kernel, rounded, options, "fp32"))
    return found


def attention_cases() -> list[Case]:
    a, found = attention, []
    kernels = {
        "forward": a.forward_kernel,
        "backward_kv": a.backward_kv_kernel,
        "backward_q": a.backward_q_kernel,
        "small": a.backward_small_kernel,
    }
    types = {"bf16": torch.bfloat16, "fp32": torch.float32}
    for (kind, kernel), D, dtype in product(kernels.items(), a.HEAD_DIMS, types):
        queries = [a.FEW, 2 * a.FEW] if kind == "forward" else [2 * a.FEW]
        if kind == "small":
            # the op rounds N up to a power of two
            most = a.largest(D, types[dtype])
            queries = [n for n in (16, 32, 64, 128, 256) if n <= most]
        for N in queries:
            BN, BM, warps, stages = a.config(kind, D, types[dtype], N)
            label = f"attention {kind} D={D}"
            if kind == "small":
                BN = N
                label += f" N={N}"
            elif N <= a.FEW:
                label += " few"
            label += " fp32" if dtype == "fp32" else ""
            options = {"num_warps": warps, "num_stages": stages}
            found.append(Case(label, kernel, {"D": D, "BN": BN, "BM": BM}, options, dtype))
    for D in a.HEAD_DIMS:
        constants = {"D": D, "BN": a.DELTA_ROWS}
        label = f"attention delta D={D}"
        found.append(Case(label, a.delta_kernel, constants, {"num_warps": 4}, "bf16"))
    return found


def runs_on(case: Case, target: str) -> bool:
    """Attention's one-program backward pass wants shared memory: attention.roomy()."""
    roomy = TARGETS[target].shared >= 160 * KB
    return roomy or case.kernel is not attention.backward_small_kernel


# ---- compiling -----------------------------------------------------------------------------------


def source(case: Case, variant: str) -> ASTSource:
    """The kernel with the signature and hints that a launch would give it."""
    kernel, constants = case.kernel, case.constants
    names = list(inspect.signature(kernel.fn).parameters)
    signature, hints = {}, {}
    pointers = pointer_names(names)
    for i, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in OTHER_POINTERS:
            signature[name] = OTHER_POINTERS[name]
            hints[(i,)] = [["tt.divisibility", 16]]
        elif name in pointers:
            signature[name] = "*fp32" if name in FLOAT_POINTERS else f"*{case.dtype}"
            hints[(i,)] = [["tt.divisibility", 16]]
        elif name in SCALARS:
            signature[name] = SCALARS[name]
        else:
            signature[name] = "i64" if variant == "i64" and name in STRIDES else "i32"
            if name not in NOT_16 or variant == "÷16":
                hints[(i,)] = [["tt.divisibility", 16]]
    at = {(names.index(name),): value for name, value in constants.items()}
    return ASTSource(kernel, signature, at, hints)


def pointer_names(names: list[str]) -> set[str]:
    """Arguments that are loaded from or stored to: the ones before the first size."""
    sizes = [i for i, name in enumerate(names) if name in ("HW", "qb", "ob", "B")]
    return set(names[: sizes[0]] if sizes else names)


def compiled(case: Case, target: str, variant: str = "") -> Any:
    """Triton's CompiledKernel."""
    gpu = TARGETS[target].gpu
    return triton.compile(source(case, variant), target=gpu, options=case.options)


# ---- what came out -------------------------------------------------------------------------------


class Counts(NamedTuple):
    """Of one compiled kernel. Registers are a lane's, occupancy is a share of all warps."""

    instructions: int
    in_loops: int
    registers: int
    spilled: int
    shared: int
    occupancy: float


def counts(case: Case, target: str, code: Any) -> Counts:
    """Instructions in the code, of these in loops, and what limits how many warps run at once."""
    registers, spilled = resources(code)
    shared = code.metadata.shared
    total, in_loops = instructions(code)
    share = occupancy(registers, shared, case.options["num_warps"], TARGETS[target])
    return Counts(total, in_loops, registers, spilled, shared, share)


def resources(code: Any) -> tuple[int, int]:
    """(registers a lane, spills): bytes of stack on NVIDIA's, registers on AMD's."""
    if "amdgcn" in code.asm:
        text = code.asm["amdgcn"]
        registers, spilled = r"\.vgpr_count:\s+(\d+)", r"\.vgpr_spill_count:\s+(\d+)"
    else:
        text = tool("cuobjdump", "-res-usage", cubin=code.asm["cubin"])
        registers, spilled = r"REG:(\d+)", r"STACK:(\d+)"
    return int(re.search(registers, text)[1]), int(re.search(spilled, text)[1])


def tool(name: str, *options: str, cubin: bytes) -> str:
    """What one of the CUDA tools that Triton ships prints of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(BINARIES / name), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(code: Any) -> tuple[int, int]:
    """(all that can be reached, those of them that can be reached again), without padding."""
    blocks = basic_blocks(code)
    alive = reached(blocks, [0])
    again = [i for i in alive if i in reached(blocks, blocks[i].next)]
    return sum(blocks[i].size for i in alive), sum(blocks[i].size for i in again)


class Block(NamedTuple):
    """Instructions without a jump between them, and the numbers of the blocks that may follow."""

    size: int
    next: list[int]


def basic_blocks(code: Any) -> list[Block]:
    if "amdgcn" in code.asm:
        text = code.asm["amdgcn"]
        line_of, padding = r"\t([a-z]\w+.*)", "s_nop"
        jump_of, end_of = r"s_c?branch\S*\s+(\S+)", r"s_branch|s_endpgm"
    else:
        text = tool("nvdisasm", "-c", cubin=code.asm["cubin"])
        line_of, padding = r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?) *;", "NOP"
        jump_of, end_of = r"(?:BRA|CALL)\b.*`\((\S+)\)", r"BRA `|EXIT|RET"
    sizes, jumps, falls, labels = [0], [[]], [True], {}

    def begin() -> None:
        sizes.append(0)
        jumps.append([])
        falls.append(True)

    for line in text.splitlines():
        if label := re.match(r"([.$\w]+):", line):
            begin()
            labels[label[1]] = len(sizes) - 1
        instruction = re.match(line_of, line)
        if not instruction or instruction[1].startswith(padding):
            continue
        sizes[-1] += 1
        jump, end = re.search(jump_of, instruction[1]), re.match(end_of, instruction[1])
        if jump:
            jumps[-1].append(jump[1])
        if jump or end:
            falls[-1] = not end
            begin()
    falls[-1] = False
    return [
        Block(sizes[i], [labels[name] for name in jumps[i]] + [i + 1] * falls[i])
        for i in range(len(sizes))
    ]


def reached(blocks: list[Block], starts: list[int]) -> set[int]:
    """The numbers of `starts` and of all blocks that may run after them."""
    found, todo = set(), list(starts)
    while todo:
        i = todo.pop()
        if i not in found:
            found.add(i)
            todo += blocks[i].next
    return found


def occupancy(registers: int, shared: int, warps: int, target: Target) -> float:
    """The share of a multiprocessor's warps that blocks of so many fill, if there are enough."""
    each = -(-registers // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = LANE_REGISTERS // each * SCHEDULERS
    blocks = min(by_registers, target.warps) // warps
    if shared:
        blocks = min(blocks, target.shared // (shared + target.reserved))
    return min(blocks, target.blocks) * warps / target.warps


def main(labels: list[str]) -> None:
    by_label = {case.label: case for case in cases()}
    found = {}
    for label in labels:
        case = by_label.get(label)
        if case:
            found[label] = {
                target: counts(case, target, compiled(case, target))._asdict()
                for target in TARGETS
                if runs_on(case, target)
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
