"""What a network computes, in eight numbers: kept with its weights, compared when they are loaded."""

from typing import Mapping

import torch
import torch.nn as nn
from torch import Tensor

from kernels.dispatch import reference
from model import UNet, UNetConfig

PROBE_LIMIT = 1e9                            # parameters: above, one more pass over the weights would be felt


@torch.no_grad()
def probe(cfg: UNetConfig, tensors: Mapping[str, Tensor]) -> list[float]:
    """Eight output values on a fixed input, in fp32 on the CPU: what names and shapes cannot show (heads, their order, eps).

    The lowest level sees 2×2: a softmax over one position would hide the heads. A tensor is asked for when its layer runs and
    forgotten after, so that one at a time is in memory.
    """
    with torch.device("meta"):
        net = UNet(cfg).eval()
    for path, module in net.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        read = {name: property(lambda self, name=f"{path}.{name}": tensors[name].detach().cpu().float()) for name in names}
        if isinstance(module, nn.Conv2d):
            read["forward"] = lean_convolution
        for name in names:
            del module._parameters[name]
        module.__class__ = type(type(module).__name__, (type(module),), read)   # found before nn.Module looks for parameters
    side = 2 ** len(cfg.channel_mult)

    def wave(*shape: int) -> Tensor:
        return torch.sin(1.7 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).float().view(shape) * 1.4

    y = wave(1, cfg.vector_dim) if cfg.vector_dim else torch.tensor([cfg.num_classes - 1]) if cfg.num_classes else None
    context = wave(1, 3, cfg.context_dim) if cfg.context_dim else None
    with reference(), torch.autocast("cpu", enabled=False):
        out = net(wave(1, cfg.in_channels, side, side), torch.tensor([371.0]), y, context)
    return out.flatten()[::max(out.numel() // 8, 1)][:8].tolist()


def lean_convolution(self: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution that copies the smaller of picture and weights: the CPU's own kernels copy weights into another order."""
    weight, bias = self.weight, self.bias
    if x.numel() > weight.numel():
        return nn.functional.conv2d(x, weight, bias, self.stride, self.padding)
    columns = nn.functional.unfold(x, self.kernel_size, padding=self.padding, stride=self.stride)[0]        # (in · k · k, H' · W')
    side = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.shape[2:], self.padding, self.kernel_size, self.stride)]
    return (weight.flatten(1) @ columns + bias[:, None]).view(1, -1, *side)
