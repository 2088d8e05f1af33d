"""The convolutional encoder and decoder of every VAE here, under the key names of LDM (Rombach et al. 2022), which are Black
Forest Labs' too. What normalises, cuts and loads is in vae.py."""

from collections import OrderedDict

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import Upsample, norm_act
from kernels.attention import attention


class Norm(nn.GroupNorm):
    """GroupNorm and SiLU. The U-Net's eps is 1e-5."""

    def __init__(self, C: int, silu: bool = True):
        super().__init__(32, C, eps=1e-6)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        return norm_act(self, x, silu=self.silu)


class ResBlock(nn.Module):
    def __init__(self, C: int, out: int):
        super().__init__()
        self.norm1, self.conv1 = Norm(C), nn.Conv2d(C, out, 3, padding=1)
        self.norm2, self.conv2 = Norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if C == out else nn.Conv2d(C, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.nin_shortcut(x) + self.conv2(self.norm2(self.conv1(self.norm1(x))))


class Attention(nn.Module):
    """Self-attention over the positions, one head, residual."""

    def __init__(self, C: int):
        super().__init__()
        self.norm = Norm(C, silu=False)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(C, C, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = self.norm(x).permute(0, 2, 3, 1).reshape(B, H * W, C)               # a view in channels_last
        q, k, v = (F.linear(h, m.weight.flatten(1), m.bias)[:, None] for m in (self.q, self.k, self.v))   # 3 × (B, 1, N, C)
        h = F.linear(attention(q, k, v)[:, 0], self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + h.view(B, H, W, C).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Halve H and W. Padded on the right and below only, unlike the U-Net's."""

    def __init__(self, C: int):
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def chain(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def middle(C: int) -> nn.Sequential:
    return chain(block_1=ResBlock(C, C), attn_1=Attention(C), block_2=ResBlock(C, C))


def level(C: int, out: int, blocks: int, **resample: nn.Module) -> nn.Sequential:
    return chain(block=nn.Sequential(*[ResBlock(out if j else C, out) for j in range(blocks)]), **resample)


def encoder(widths: tuple[int, ...], z: int) -> nn.Sequential:
    """(B, 3, H, W) -> (B, 2z, H/f, W/f)."""
    last = len(widths) - 1
    down = [level(widths[max(i - 1, 0)], C, 2, **{"downsample": Downsample(C)} if i < last else {}) for i, C in enumerate(widths)]
    return chain(conv_in=nn.Conv2d(3, widths[0], 3, padding=1), down=nn.Sequential(*down), mid=middle(widths[-1]),
                 norm_out=Norm(widths[-1]), conv_out=nn.Conv2d(widths[-1], 2 * z, 3, padding=1))


def decoder(widths: tuple[int, ...], z: int) -> nn.Sequential:
    """(B, z, h, w) -> (B, 3, f·h, f·w). Level 0 is the last to run."""
    up = {str(i): level(C, out, 3, **{"upsample": Upsample(out, conv=True)} if i else {})
          for i, (C, out) in reversed(list(enumerate(zip((*widths[1:], widths[-1]), widths))))}
    return chain(conv_in=nn.Conv2d(z, widths[-1], 3, padding=1), mid=middle(widths[-1]), up=chain(**up),
                 norm_out=Norm(widths[0]), conv_out=nn.Conv2d(widths[0], 3, 3, padding=1))
