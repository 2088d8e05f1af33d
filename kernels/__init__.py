"""Fused operations for GPUs, each with the plain torch code that defines it.

    dispatch            which path a call takes: KERNELS=auto | triton | torch
    proof               auto proves itself: a kernel is used where it was right, and faster
    selfcheck           the table of that for a whole network: python -m kernels.selfcheck
    groupnorm           GroupNorm + FiLM + SiLU
    groupnorm_kernels   its Triton kernels
    attention           softmax(q kᵀ) v
    adamw8bit           AdamW whose moments take a byte each
    codec8bit           the 8-bit numbers that they are kept in
    bitsandbytes        their state as bitsandbytes keeps it, and back

Each op's file is read from top to bottom: the maths, an eager reference, the Triton kernels, the op
with its gradient, the function that a network calls. Start with attention. Nothing of the house is
imported here but by the command selfcheck, and nothing needs a GPU: elsewhere, torch runs.
"""
