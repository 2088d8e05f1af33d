"""Diffusion transformers: DiT (Peebles & Xie 2023), SiT (Ma et al. 2024), SD3 and SD3.5 (Esser et
al. 2024), Flux 1 and Flux 2 (Black Forest Labs), which are one network with different parts.

    net = MMDiT(PRESETS["sit-tiny"])
    out = net(x, t)            # x (B, C, H, W), t (B,) in [0, 1000]  ->  (B, out, H, W)
    out = MMDiT(PRESETS["sd3-medium"])(x, t, y=pooled, context=tokens)
    out, h = net(x, t, features=("blocks.3",))         # also what a block returned

A *stream* is what one kind of tokens passes in a block: attention and MLP, each shifted, scaled and
gated by the time (adaLN-Zero). A *joint block* is a stream of the image and one of the text, which
attend together. A *single block* takes both as one, attention beside MLP. Tensors have DiT's and
SD3's names (Flux's: ckpt/). Who imports this file finds the network in model.NETWORKS.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import model
from diffusion.positions import rotate, rotations, sincos
from kernels.attention import attention
from model import Maybe, check_input, check_shape, timestep_embedding

EPS = 1e-6  # of every norm
WAVES = 256  # numbers that a time is written in
Told = dict[str, Tensor]


@dataclass(frozen=True)
class MMDiTConfig:
    """The shape of a diffusion transformer."""

    in_channels: int = 32
    out_channels: int = 32
    patch: int = 1  # side of a token, in pixels of the latent
    width: int = 192
    heads: int = 3
    blocks: int = 0  # over the image alone (DiT, SiT)
    joint: int = 0  # over image and text, a stream each (SD3; Flux's double blocks)
    single: int = 0  # over both in one stream, after the joint ones (Flux)
    mlp_ratio: int = 4
    mlp: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True  # of every layer
    qk_norm: bool = False  # RMS norm of q and k over the numbers of a head
    dual: int = 0  # first joint blocks in which the image also attends to itself (SD3.5 medium)
    last_pre_only: bool = False  # the last joint block reads the text, and ends it (SD3)
    modulation: Literal["own", "shared"] = "own"  # of each block, or of all (Flux 2)
    pos_max: int = 0  # side of the table of places, of which the image takes the centre; or
    rope: tuple[int, ...] = ()  # rotations: how many numbers of a head tell of each axis
    theta: int = 10_000  # of rope
    text_axis: int = 0  # of rope: along which text tokens are counted; 0 = none
    num_classes: int = 0  # 0 = unconditional. The label -1 stands for "no class" (guidance)
    vector_dim: int = 0  # instead of classes: y is a vector (B, vector_dim), of pooled text
    context_dim: int = 0  # of text tokens (B, M, context_dim)
    guidance: bool = False  # it is told a strength of guidance (Flux's distilled networks)
    tokens: Literal["pqc", "cpq"] = "pqc"  # an output token's order of row, column, channel
    reversed_time: bool = False  # it sees 1 - t / 1000: files of SiT's authors

    def __post_init__(self):
        """What fits together. Of a config from a file, ckpt/ has checked types and sizes before."""
        D, rest = divmod(self.width, self.heads)
        text, shared, ends = self.joint > 0, self.modulation == "shared", self.last_pre_only
        more = self.dual or ends  # what no network with shared modulations has
        axes = len(self.rope) > 2 and sum(self.rope) == D and not any(n % 2 for n in self.rope)
        fits = {
            ("width", "heads"): not rest and D % 2 == 0 and self.width % 4 == 0,
            ("blocks", "joint", "single"): (self.blocks > 0) != text and (text or not self.single),
            ("joint", "context_dim"): text == (self.context_dim > 0),
            ("pos_max", "rope"): (self.pos_max > 0) != (len(self.rope) > 0),
            ("joint", "width", "heads", "rope"): not self.rope or (text and axes),
            ("rope", "text_axis"): self.text_axis in range(max(len(self.rope), 1)),
            ("num_classes", "vector_dim"): not (self.num_classes and self.vector_dim),
            ("joint", "dual"): self.dual <= self.joint,
            ("joint", "single", "last_pre_only"): not ends or (text and not self.single),
            ("joint", "dual", "last_pre_only", "modulation"): not shared or (text and not more),
        }
        for names, fit in fits.items():
            if not fit:
                given = ", ".join(f"{name} {getattr(self, name)}" for name in names)
                raise ValueError(f"{given} do not fit together.")

    @property
    def multiple(self) -> int:
        """What H and W of the input have to be divisible by."""
        return self.patch

    @property
    def largest(self) -> int:
        """The greatest H and W of the input; 0 = any."""
        return self.pos_max * self.patch


# ---- pieces -------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, in fp32 at least; x's dtype is kept."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), x.shape[-1:], self.weight.to(wide), EPS).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) · norm(x) + shift, for x (B, N, W) and shift, scale (B, 1, W)."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def modulation(cfg: MMDiTConfig, chunks: int) -> nn.Sequential:
    """silu(c) (B, W) -> (B, chunks · W); the Identity holds the place of the silu."""
    return nn.Sequential(nn.Identity(), nn.Linear(cfg.width, chunks * cfg.width, cfg.bias))


def embedder(cfg: MMDiTConfig, dim: int) -> nn.ModuleDict:
    """{"mlp": (B, dim) -> (B, W)}."""
    first, last = nn.Linear(dim, cfg.width, cfg.bias), nn.Linear(cfg.width, cfg.width, cfg.bias)
    return nn.ModuleDict({"mlp": nn.Sequential(first, nn.SiLU(), last)})


def attend(kinds: Sequence[Sequence[Tensor]], turns: Maybe = None) -> Sequence[Tensor]:
    """All tokens attend to all. q, k, v (B, heads, N, D) of each kind -> (B, N, W) of each."""
    q, k, v = kinds[0]
    if len(kinds) > 1:
        q, k, v = [torch.cat(tensors, 2) for tensors in zip(*kinds)]
    if turns is not None:
        q, k = rotate(q, turns), rotate(k, turns)
    h = attention(q, k, v).transpose(1, 2).flatten(2)
    return h.split([kind[0].shape[2] for kind in kinds], 1)


def widths(cfg: MMDiTConfig) -> tuple[int, int]:
    """Of an MLP's hidden layer, before and after activate()."""
    hidden = cfg.mlp_ratio * cfg.width
    return hidden * (2 if cfg.mlp == "swiglu" else 1), hidden


def activate(cfg: MMDiTConfig, h: Tensor) -> Tensor:
    if cfg.mlp == "gelu":
        return F.gelu(h, approximate="tanh")
    gate, value = h.chunk(2, -1)  # Shazeer 2020
    return F.silu(gate) * value


class Heads(nn.Module):
    """What splits a projection into heads, and norms them if the network does."""

    def __init__(self, cfg: MMDiTConfig):
        super().__init__()
        self.cfg = cfg
        if cfg.qk_norm:
            D = cfg.width // cfg.heads
            self.ln_q, self.ln_k = RMSNorm(D), RMSNorm(D)

    def split(self, qkv: Tensor) -> Sequence[Tensor]:
        """(B, N, 3W), in the order [q, k, v][head][d] -> q, k, v (B, heads, N, D)."""
        q, k, v = qkv.unflatten(2, (3, self.cfg.heads, -1)).permute(2, 0, 3, 1, 4)
        return (self.ln_q(q), self.ln_k(k), v) if self.cfg.qk_norm else (q, k, v)


class Attention(Heads):
    """The layers before and after attention."""

    def __init__(self, cfg: MMDiTConfig, out: bool = True):
        super().__init__(cfg)
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width, cfg.bias)
        if out:
            self.proj = nn.Linear(cfg.width, cfg.width, cfg.bias)

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        return self.split(self.qkv(x))


# ---- blocks -------------------------------------------------------------------------------------
# A block takes the image's tokens x (B, N, W), the text's (B, M, W) or None, what each kind of
# tokens is told of the sample (MMDiT._condition), and the rotations of all; it returns both kinds.


def moves(block: nn.Module, told: Tensor) -> Sequence[Tensor]:
    """What moves tokens: shift, scale, gate (B, 1, W) of attention, of the MLP, of a second
    attention. Once a sample, not a token."""
    rows = block.adaLN_modulation[1](told) if block.cfg.modulation == "own" else told
    return rows[:, None].split(block.cfg.width, -1)


class Stream(nn.Module):
    """What one kind of tokens passes in a block. Alone, a block of DiT.

    dual: they also attend to themselves. pre_only: they are read, and end here.
    """

    def __init__(self, cfg: MMDiTConfig, dual: bool = False, pre_only: bool = False):
        super().__init__()
        self.cfg, self.dual, self.pre_only = cfg, dual, pre_only
        if cfg.modulation == "own":
            self.adaLN_modulation = modulation(cfg, 6 + 3 * dual - 4 * pre_only)
        self.attn = Attention(cfg, out=not pre_only)
        if dual:
            self.attn2 = Attention(cfg)
        if not pre_only:
            (wide, hidden), W = widths(cfg), cfg.width
            layers = {"fc1": nn.Linear(W, wide, cfg.bias), "fc2": nn.Linear(hidden, W, cfg.bias)}
            self.mlp = nn.ModuleDict(layers)

    def begin(self, x: Tensor, told: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """(q, k, v of x (B, N, W), what moves x)."""
        by = moves(self, told)
        return self.attn(modulate(x, *by[:2])), by

    def end(self, x: Tensor, h: Tensor, by: Sequence[Tensor]) -> Tensor:
        """The block's output, of its input x (B, N, W) and what attention made of it."""
        out = x + by[2] * self.attn.proj(h)
        if self.dual:  # of the same input
            (h,) = attend([self.attn2(modulate(x, *by[6:8]))])
            out = out + by[8] * self.attn2.proj(h)
        h = activate(self.cfg, self.mlp["fc1"](modulate(out, *by[3:5])))
        return out + by[5] * self.mlp["fc2"](h)

    def forward(self, x: Tensor, text: Maybe, told: Told, turns: Maybe) -> tuple[Tensor, Maybe]:
        qkv, by = self.begin(x, told["x_block"])
        return self.end(x, *attend([qkv], turns), by), text


class JointBlock(nn.Module):
    """The image's stream and the text's."""

    def __init__(self, cfg: MMDiTConfig, dual: bool, pre_only: bool):
        super().__init__()
        self.context_block = Stream(cfg, pre_only=pre_only)
        self.x_block = Stream(cfg, dual)

    def forward(self, x: Tensor, text: Tensor, told: Told, turns: Maybe) -> tuple[Tensor, Tensor]:
        qkv_x, by_x = self.x_block.begin(x, told["x_block"])
        qkv_text, by_text = self.context_block.begin(text, told["context_block"])
        h_text, h_x = attend([qkv_text, qkv_x], turns)
        if not self.context_block.pre_only:
            text = self.context_block.end(text, h_text, by_text)
        return self.x_block.end(x, h_x, by_x), text


class SingleBlock(Heads):
    """Both as one stream x (B, M + N, W), attention beside MLP."""

    def __init__(self, cfg: MMDiTConfig):
        super().__init__(cfg)
        (wide, hidden), W = widths(cfg), cfg.width
        if cfg.modulation == "own":
            self.adaLN_modulation = modulation(cfg, 3)
        self.linear1 = nn.Linear(W, 3 * W + wide, cfg.bias)
        self.linear2 = nn.Linear(W + hidden, W, cfg.bias)

    def forward(self, x: Tensor, text: None, told: Told, turns: Maybe) -> tuple[Tensor, None]:
        shift, scale, gate = moves(self, told["single"])
        h = self.linear1(modulate(x, shift, scale))
        qkv, h = h.tensor_split([3 * self.cfg.width], -1)
        (attended,) = attend([self.split(qkv)], turns)
        return x + gate * self.linear2(torch.cat([attended, activate(self.cfg, h)], -1)), text


# ---- the network --------------------------------------------------------------------------------


class MMDiT(nn.Module):
    """The transformer. It begins as DiT's does: each block as the identity, the output as zero."""

    checkpointing = False  # True: the backward pass computes each block again from its inputs

    def __init__(self, cfg: MMDiTConfig):
        super().__init__()
        self.cfg, W, p, last = cfg, cfg.width, cfg.patch, cfg.joint - 1
        proj = nn.Conv2d(cfg.in_channels, W, p, p, bias=cfg.bias)
        self.x_embedder = nn.ModuleDict({"proj": proj})
        if cfg.pos_max:
            self.register_buffer("pos_embed", sincos(cfg.pos_max, W))
        self.t_embedder = embedder(cfg, WAVES)
        if cfg.guidance:
            self.guidance_embedder = embedder(cfg, WAVES)
        if cfg.num_classes:
            rows = nn.Embedding(cfg.num_classes + 1, W)  # the last of "no class"
            self.y_embedder = nn.ModuleDict({"embedding_table": rows})
        elif cfg.vector_dim:
            self.y_embedder = embedder(cfg, cfg.vector_dim)
        if cfg.context_dim:
            self.context_embedder = nn.Linear(cfg.context_dim, W, cfg.bias)
        if cfg.modulation == "shared":
            chunks = {"x_block": 6, "context_block": 6, "single": 3}
            layers = {name: modulation(cfg, n) for name, n in chunks.items()}
            self.adaLN_modulation = nn.ModuleDict(layers)
        self.blocks = nn.ModuleList(Stream(cfg) for _ in range(cfg.blocks))
        self.joint_blocks = nn.ModuleList(
            JointBlock(cfg, i < cfg.dual, cfg.last_pre_only and i == last) for i in range(cfg.joint)
        )
        self.single_blocks = nn.ModuleList(SingleBlock(cfg) for _ in range(cfg.single))
        linear = nn.Linear(W, p * p * cfg.out_channels, cfg.bias)
        layers = {"linear": linear, "adaLN_modulation": modulation(cfg, 2)}
        self.final_layer = nn.ModuleDict(layers)
        for name, weight in self.named_parameters():
            if "adaLN_modulation" in name or "final_layer" in name or name.endswith("bias"):
                nn.init.zeros_(weight)
            elif name.startswith("t_embedder") or "embedding_table" in name:
                nn.init.normal_(weight, std=0.02)
            elif weight.ndim > 1:
                nn.init.xavier_uniform_(weight.view(len(weight), -1))

    def _blocks(self) -> dict[str, nn.Module]:
        kinds = ("blocks", "joint_blocks", "single_blocks")
        return {f"{kind}.{i}": b for kind in kinds for i, b in enumerate(getattr(self, kind))}

    @property
    def block_names(self) -> tuple[str, ...]:
        """What `features` may name, in the order of the forward pass."""
        return tuple(self._blocks())

    def forward(
        self, x: Tensor, t: Tensor, y: Maybe = None, context: Maybe = None, guidance: Maybe = None,
        features: tuple[str, ...] | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """x (B, C, H, W); t (B,) float in [0, 1000] -> (B, out, H, W).

        y: class labels (B,), -1 = none; or (B, vector_dim). context: (B, M, context_dim). guidance
        (B,): a strength, such as 3.5. With `features`, of block_names, also {name: the image after
        that block (B, width, H / patch, W / patch)}.
        """
        check_input(self, x, y, context, features or ())
        cfg, text, turns, seen = self.cfg, None, None, dict.fromkeys(features or ())
        h, w = (side // cfg.patch for side in x.shape[2:])
        c = F.silu(self._condition(t, y, guidance, x))  # (B, W)
        told = dict.fromkeys(("x_block", "context_block", "single"), c)
        if cfg.modulation == "shared":
            told = {kind: layer[1](c) for kind, layer in self.adaLN_modulation.items()}
        if cfg.joint:
            text = self.context_embedder(context.to(x.dtype))  # (B, M, W)
        if cfg.rope:
            M = text.shape[1]
            turns = rotations(cfg.rope, cfg.theta, cfg.text_axis, M, h, w, x.device)
        x, first = self._tokens(x, h, w), 0  # (B, N, W), and which of them is the image's first
        for name, block in self._blocks().items():
            if name == "single_blocks.0":
                x, text, first = torch.cat([text, x], 1), None, text.shape[1]
            if self.checkpointing and torch.is_grad_enabled():
                x, text = checkpoint(block, x, text, told, turns, use_reentrant=False)
            else:
                x, text = block(x, text, told, turns)
            if name in seen:
                seen[name] = x[:, first:].transpose(1, 2).unflatten(2, (h, w))
        out = self._pixels(x[:, first:], c, h, w)
        return out if features is None else (out, seen)

    def _condition(self, t: Tensor, y: Maybe, guidance: Maybe, x: Tensor) -> Tensor:
        """(B, W): all that is told of a sample."""
        cfg = self.cfg
        t = 1 - t.float() / 1000 if cfg.reversed_time else t
        c = self.t_embedder["mlp"](timestep_embedding(t, WAVES).to(x.dtype))
        if cfg.guidance:
            check_shape("guidance", guidance, len(x))
            waves = timestep_embedding(1000 * guidance.float(), WAVES).to(x.dtype)
            c = c + self.guidance_embedder["mlp"](waves)
        elif guidance is not None:
            raise ValueError("this MMDiT takes no guidance: it must be None.")
        if cfg.vector_dim:
            c = c + self.y_embedder["mlp"](y.to(x.dtype))
        elif cfg.num_classes:
            none = torch.full((len(x),), cfg.num_classes, device=x.device)
            rows = none if y is None else torch.where(y < 0, none, y)
            c = c + self.y_embedder["embedding_table"](rows)
        return c

    def _tokens(self, x: Tensor, h: int, w: int) -> Tensor:
        """(B, C, H, W) -> (B, N, W), told where they are unless that is rope's."""
        cfg, side = self.cfg, self.cfg.pos_max
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2)
        if not side:
            return x
        if max(h, w) > side:
            got = f"{h * cfg.patch}×{w * cfg.patch}"
            raise ValueError(f"H×W = {got}: its table of places ends at {cfg.largest}.")
        top, left = (side - h) // 2, (side - w) // 2
        places = self.pos_embed.view(1, side, side, cfg.width)
        return x + places[:, top : top + h, left : left + w].flatten(1, 2)

    def _pixels(self, tokens: Tensor, c: Tensor, h: int, w: int) -> Tensor:
        """(B, N, W) -> (B, out, H, W)."""
        p, C = self.cfg.patch, self.cfg.out_channels
        by = self.final_layer["adaLN_modulation"][1](c)[:, None].chunk(2, -1)
        out = self.final_layer["linear"](modulate(tokens, *by))  # (B, N, p · p · out)
        if self.cfg.tokens == "cpq":
            out = out.view(-1, h, w, C, p, p).permute(0, 3, 1, 4, 2, 5)
        else:
            out = out.view(-1, h, w, p, p, C).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(-1, C, h * p, w * p)


# ---- presets ------------------------------------------------------------------------------------

# The sizes of DiT's paper, for 256 px: 32×32 latents are 16×16 tokens.
SIT = MMDiTConfig(patch=2, width=384, heads=6, blocks=12, pos_max=16)
SD3 = MMDiTConfig(
    16, 16, 2, 1536, 24, joint=24, last_pre_only=True, pos_max=192, vector_dim=2048,
    context_dim=4096,
)  # fmt: skip
FLUX = MMDiTConfig(
    16, 16, 2, 3072, 24, joint=19, single=38, qk_norm=True, rope=(16, 56, 56), vector_dim=768,
    context_dim=4096, tokens="cpq",
)  # fmt: skip
FLUX2 = MMDiTConfig(
    32, 32, 2, 3072, 24, joint=5, single=20, mlp_ratio=3, mlp="swiglu", bias=False, qk_norm=True,
    modulation="shared", rope=(32, 32, 32, 32), theta=2000, text_axis=3, context_dim=7680,
    tokens="cpq",
)  # fmt: skip
PRESETS: dict[str, MMDiTConfig] = {
    "sit-nano": MMDiTConfig(width=64, heads=2, blocks=2, pos_max=8),  # for tests of the loop
    "sit-tiny": MMDiTConfig(width=192, heads=3, blocks=8, pos_max=8),
    "sit-s": SIT,
    "sit-b": replace(SIT, width=768, heads=12),
    "sit-l": replace(SIT, width=1024, heads=16, blocks=24),
    # Heads of 72 numbers, as released. Our kernels have none of that size: torch serves them.
    "sit-xl": replace(SIT, width=1152, heads=16, blocks=28),
    "sd3-medium": SD3,
    "sd3.5-medium": replace(SD3, qk_norm=True, dual=13, pos_max=384),
    "sd3.5-large": replace(SD3, width=2432, heads=38, joint=38, qk_norm=True),
    "flux1-dev": replace(FLUX, guidance=True),
    "flux1-schnell": FLUX,
    "flux2-klein-4b": FLUX2,
    "flux2-dev": replace(
        FLUX2, width=6144, heads=48, joint=8, single=48, context_dim=15360, guidance=True
    ),
}

model.NETWORKS["MMDiT"] = (MMDiT, MMDiTConfig)
model.PRESETS.update(PRESETS)
