"""Fused operations for GPUs, each with the plain torch code that defines it.

    dispatch     which path a call takes: KERNELS=auto | triton | torch
    groupnorm    GroupNorm + FiLM + SiLU
    attention    softmax(q kᵀ) v
    adamw8bit    AdamW whose moments take a byte each

Each file is read from top to bottom: the maths, an eager reference, the Triton kernels, the op
with its gradient, the function that a network calls. Start with attention. Nothing of the house is
imported here, and nothing needs a GPU: elsewhere, torch runs.
"""
