"""Text encoders in small: filled by a formula, and as other programs' files have them."""

import torch

from ckpt.texts import foreign_text
from text import BOS, EOS, TextConfig, TextEncoder

CAT = [BOS, 320, 1125, 539, 320, 2368, EOS]  # "a photo of a cat"
L = TextConfig(64, 3, 4, "quick_gelu", 64)


def mixed(n: int, k: int) -> torch.Tensor:
    """n numbers in [-0.5, 0.5), fp64: a hash of 1 … n and k."""
    h = (torch.arange(1, n + 1) * 2654435761 + k * 2246822519) % 2**32
    h = h ^ (h >> 15)
    h = h * 2246822519 % 2**32
    h = h ^ (h >> 13)
    return h.double() / 2**32 - 0.5


def filled(cfg: TextConfig) -> TextEncoder:
    """An encoder in fp64 whose weights come from a formula, in the order of transformers' names."""
    net = TextEncoder(cfg).double().eval().requires_grad_(False)
    state = net.state_dict()
    named = {next(iter(foreign_text({name: state[name]}, "hf"))): name for name in state}
    for k, foreign in enumerate(sorted(named)):
        name = named[foreign]
        v = mixed(state[name].numel(), k).view(state[name].shape)
        if "embedding" in name:
            pass
        elif "norm" in name and name.endswith("weight"):
            v = 1 + v
        elif name.endswith("bias"):
            v = v / 2
        else:
            v = v * (12 / v.shape[1]) ** 0.5
        state[name].copy_(v)
    return net


def cat_ids(pad: int = EOS) -> torch.Tensor:
    return torch.tensor([CAT + [pad] * (77 - len(CAT))])


def tagged(cfg: TextConfig) -> TextEncoder:
    """Each weight another number: a transposed or exchanged tensor shows."""
    net = TextEncoder(cfg).eval().requires_grad_(False)
    start = 0
    for value in net.state_dict().values():
        value.copy_(torch.arange(start, start + value.numel()).view(value.shape) / 2**10)
        start += value.numel()
    return net
