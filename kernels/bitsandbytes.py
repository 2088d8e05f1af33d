"""AdamW8bit's state as bitsandbytes keeps it, and back.

The maps and the block of 256 are the same. Theirs has a parameter's shape and lies in contiguous
order; ours lies in the parameter's memory order.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.adamw8bit import new_state, quantized
from kernels.adamw_update import flat
from kernels.codec8bit import blocks, dequantize, dynamic_map, quantize


def moments(state: dict[str, Tensor], p: Tensor) -> tuple[Tensor, Tensor]:
    """m and v of p as fp32 in p's shape and strides, from its entry in AdamW8bit.state."""

    def moment(name):
        x = state[name].clone()
        if f"{name}_absmax" in state:
            x = dequantize(x, state[f"{name}_absmax"], name == "v")
        return x.as_strided(p.shape, p.stride())

    return moment("m"), moment("v")


def to_bitsandbytes(state: dict[str, Tensor], p: Tensor) -> dict[str, Any]:
    """p's entry in AdamW8bit.state as bitsandbytes' AdamW8bit keeps it.

    Codes in p's shape, blocks in contiguous order. The codes are the same if p is contiguous; else
    they are rounded again, with other neighbours.
    """
    entry: dict[str, Any] = {"step": int(state["step"])}
    for i, (k, x) in enumerate(zip(("m", "v"), moments(state, p)), 1):
        if f"{k}_absmax" not in state:
            entry[f"state{i}"] = x.contiguous()
            continue
        codes, absmax = state[k], state[f"{k}_absmax"]
        if not p.is_contiguous():
            codes, absmax = quantize(x.contiguous().view(-1), k == "v")
        entry[f"state{i}"] = codes.clone().view(p.shape)
        entry[f"absmax{i}"] = absmax.clone()
        entry[f"qmap{i}"] = dynamic_map(k == "m").to(p.device)
    return entry


def from_bitsandbytes(entry: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
    """The reverse: an entry for AdamW8bit.state[p].

    Maps, blocks and dtypes other than ours are converted.
    """
    # recent bitsandbytes wraps its quantised tensors
    entry = {**entry, **entry.get("__bnb_optimizer_quant_state__", {})}
    state = new_state(p)
    state["step"].fill_(float(entry["step"]))
    for i, k in enumerate(("m", "v"), 1):
        x = entry[f"state{i}"].to(p.device).contiguous()
        if x.shape != p.shape:
            raise ValueError(
                f"state{i} of a parameter {tuple(p.shape)} is {tuple(x.shape)}: "
                "wanted the parameter's shape."
            )
        if x.dtype == torch.uint8:
            levels, absmax = entry[f"qmap{i}"].to(p.device), entry[f"absmax{i}"].to(p.device)
            our_map = torch.equal(levels, dynamic_map(k == "m").to(p.device))
            if quantized(p) and p.is_contiguous() and our_map:
                state[k], state[f"{k}_absmax"] = x.view(-1).clone(), absmax.clone()
                continue
            values = blocks(levels.index_select(0, x.view(-1).int())) * absmax[:, None]
            x = values.view(-1)[: p.numel()].view(p.shape)
        # into p's memory order
        state[k] = flat(torch.empty_like(p, dtype=torch.float32).copy_(x))
        if quantized(p):
            state[k], state[f"{k}_absmax"] = quantize(state[k], k == "v")
    return state
