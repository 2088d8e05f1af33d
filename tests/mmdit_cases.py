"""Small transformers of every family, and what diffusers computes with their weights."""

from dataclasses import replace

import torch

import mmdit
from ckpt.diffusers import diffusers_config
from ckpt.layouts import to_foreign
from mmdit import MMDiT, MMDiTConfig

SMALL = {
    "sit": MMDiTConfig(4, 4, 2, 32, 2, blocks=2, pos_max=6, num_classes=3),
    "sd3": replace(
        mmdit.SD3, in_channels=4, out_channels=4, width=32, heads=2, joint=3, pos_max=11,
        vector_dim=12, context_dim=20,
    ),
    "flux1": replace(
        mmdit.FLUX, in_channels=4, out_channels=4, width=32, heads=2, joint=2, single=2,
        rope=(4, 6, 6), vector_dim=12, context_dim=20, guidance=True,
    ),
    "flux2": replace(
        mmdit.FLUX2, in_channels=4, out_channels=4, width=32, heads=2, joint=2, single=2,
        rope=(4, 4, 4, 4), context_dim=20, guidance=True,
    ),
}  # fmt: skip
SMALL["sd3.5"] = replace(SMALL["sd3"], qk_norm=True, dual=2)
SMALL["schnell"] = replace(SMALL["flux1"], guidance=False)
SMALL["klein"] = replace(SMALL["flux2"], guidance=False)
OF_DIFFUSERS = ("sd3", "sd3.5", "flux1", "schnell", "flux2", "klein")
LARGE = 0.3  # of biases and norms


def filled(cfg: MMDiTConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> MMDiT:
    """A network with random weights everywhere: untrained, its blocks would be the identity."""
    net, g = MMDiT(cfg).to(dtype), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
            p.copy_(noise * (LARGE if p.ndim == 1 else p[0].numel() ** -0.5))
    return net.eval()


def told(cfg: MMDiTConfig, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Inputs of every kind that a config takes: not square, seven words, two times."""
    g = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    inputs = {"x": noise(2, cfg.in_channels, 8, 12), "t": torch.tensor([3.7, 988.5]).to(dtype)}
    if cfg.num_classes:
        inputs["y"] = torch.tensor([1, -1])
    if cfg.vector_dim:
        inputs["y"] = noise(2, cfg.vector_dim)
    if cfg.context_dim:
        inputs["context"] = noise(2, 7, cfg.context_dim)
    if cfg.guidance:
        inputs["guidance"] = torch.tensor([3.5, 1.25]).to(dtype)
    return inputs


def peer_of(net: MMDiT) -> torch.nn.Module:
    """diffusers' network with the weights of one of ours, loaded strictly."""
    import diffusers

    config = diffusers_config(net.cfg)
    peer = getattr(diffusers, config["_class_name"]).from_config(config)
    peer.to(next(net.parameters()).dtype)
    state = {}
    for name, value in net.state_dict().items():
        state |= dict(to_foreign(net.cfg, "diffusers", name, value))
    peer.load_state_dict(state)
    return peer.eval()


def ask_peer(peer: torch.nn.Module, cfg: MMDiTConfig, inputs: dict) -> torch.Tensor:
    """What it says, given our inputs: it takes Flux's tokens packed, with their places, and times
    from 0 to 1."""
    x, t = inputs["x"], inputs["t"]
    if cfg.pos_max:
        return peer(x, inputs["context"], inputs["y"], t).sample
    (B, C, H, W), M = x.shape, inputs["context"].shape[1]
    h, w = H // 2, W // 2
    packed = x.view(B, C, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w, 4 * C)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    image = torch.zeros(h * w, len(cfg.rope))
    image[:, 1], image[:, 2] = rows.flatten(), columns.flatten()
    words = torch.zeros(M, len(cfg.rope))
    if cfg.text_axis:
        words[:, 3] = torch.arange(M)
    more = {"pooled_projections": inputs["y"]} if cfg.vector_dim else {}
    out = peer(
        hidden_states=packed, encoder_hidden_states=inputs["context"], timestep=t / 1000,
        img_ids=image, txt_ids=words, guidance=inputs.get("guidance"), **more,
    ).sample  # fmt: skip
    return out.view(B, h, w, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)
