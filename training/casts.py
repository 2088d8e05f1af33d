"""A network's weights in bf16, cast together.

Autocast casts every weight by a launch of its own, and each of their gradients by another. Here a
few launches do it for all of them, to the same bits. What the optimizer sees stays fp32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernels.dispatch import forward_mode

# Layers whose weights autocast would cast. A subclass may want its weights as they are.
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


class Cast(torch.autograd.Function):
    """fp32 tensors -> their bf16 copies, with the same strides."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.weights = weights
        return tuple(copied(weights, weights, torch.bfloat16))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.weights, gradients)
        used = [(w, g) for w, g in pairs if g is not None]
        if torch.is_grad_enabled():
            # Someone differentiates the gradient, which what is written in place has none of.
            return tuple(None if g is None else g.float() for g in gradients)
        whole = iter(copied([w for w, _ in used], [g for _, g in used], torch.float32))
        return tuple(None if g is None else next(whole) for g in gradients)


def copied(like: Any, values: Any, dtype: torch.dtype) -> list[Tensor]:
    """Copies of tensors in another dtype, each with the strides of its tensor in `like`."""
    copies = [torch.empty_like(x, dtype=dtype) for x in like]
    if copies:
        torch._foreach_copy_(copies, list(values))
    return copies


def cast_together(net: nn.Module) -> Callable[..., Any]:
    """net, but where autocast would cast its weights to bf16 one by one, they are cast together.

    All gradients of weights arrive together, when the last is known: with DistributedDataParallel
    nothing would be left to send them beside. Without gradients, as for samples, it is net.
    """
    places = [
        (module, name)
        for module in net.modules()
        if type(module) in LAYERS
        for name, p in module._parameters.items()
        if p is not None
    ]
    return partial(run, net, places)


def run(net: nn.Module, places: list[tuple[nn.Module, str]], *args: Any, **kwargs: Any) -> Any:
    """net(*args, **kwargs), with bf16 copies at the (module, name) of weights while it runs."""
    found = [(module, name, module._parameters[name]) for module, name in places]
    # Of copies, autograd would work out the gradients of frozen weights too.
    found = [place for place in found if place[2].requires_grad and place[2].dtype == torch.float32]
    if not found or not torch.is_grad_enabled() or forward_mode() or not casts(found[0][2]):
        return net(*args, **kwargs)
    # Layers that share a weight share its copy, as under autocast.
    weights = [p for _, _, p in found]
    copies = dict(zip(weights, Cast.apply(*weights)))
    try:
        for module, name, p in found:
            module._parameters[name] = copies[p]
        return net(*args, **kwargs)
    finally:
        for module, name, p in found:
            module._parameters[name] = p


def casts(weight: Tensor) -> bool:
    """Is autocast on for bf16, where this weight is?"""
    kind = weight.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
