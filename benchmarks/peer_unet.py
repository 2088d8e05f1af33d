"""diffusers' UNet2DModel with the weights of one of ours: the oracle of tests/test_model.py and the peer of train_cpu.py."""

import torch
from torch import Tensor

from model import UNet

RES = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
       "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}


def peer_unet(net: UNet) -> torch.nn.Module:
    """A UNet2DModel that computes the same function as `net` (unconditional, num_head_channels set)."""
    from diffusers import UNet2DModel
    cfg = net.cfg
    plain = "Resnet{}sampleBlock2D" if cfg.resblock_updown else "{}Block2D"
    down = ["AttnDownBlock2D" if a else plain.format("Down") for a in cfg.attention]
    up = ["AttnUpBlock2D" if a else plain.format("Up") for a in reversed(cfg.attention)]
    kind = "resnet" if cfg.resblock_updown else "conv"
    peer = UNet2DModel(
        in_channels=cfg.in_channels, out_channels=cfg.out_channels, block_out_channels=cfg.channels,
        layers_per_block=cfg.num_res_blocks, down_block_types=down, up_block_types=up, downsample_type=kind, upsample_type=kind,
        attention_head_dim=cfg.num_head_channels, attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift" if cfg.use_scale_shift_norm else "default")
    peer.load_state_dict(peer_weights(net))                                     # strict: both name exactly the same things
    return peer


def peer_weights(net: UNet) -> dict[str, Tensor]:
    """Our state dict under UNet2DModel's names."""
    cfg, per, out = net.cfg, net.cfg.num_res_blocks + 1, {}
    modules = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
               "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
               "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
               "middle_block.2": "mid_block.resnets.1"}
    for k in range(1, len(net.input_blocks)):
        level, j = divmod(k - 1, per)
        if j < cfg.num_res_blocks:
            modules[f"input_blocks.{k}.0"] = f"down_blocks.{level}.resnets.{j}"
            modules[f"input_blocks.{k}.1"] = f"down_blocks.{level}.attentions.{j}"
        else:
            modules[f"input_blocks.{k}.0"] = f"down_blocks.{level}.downsamplers.0"
    for k, block in enumerate(net.output_blocks):
        i, j = divmod(k, per)
        modules[f"output_blocks.{k}.0"] = f"up_blocks.{i}.resnets.{j}"
        modules[f"output_blocks.{k}.1"] = f"up_blocks.{i}.attentions.{j}"
        if j == cfg.num_res_blocks and i < len(cfg.channels) - 1:
            modules[f"output_blocks.{k}.{len(block) - 1}"] = f"up_blocks.{i}.upsamplers.0"
    for name, value in net.state_dict().items():
        prefix = next(p for p in sorted(modules, key=len, reverse=True) if name.startswith(p + "."))
        leaf = name[len(prefix) + 1:]
        for ours, theirs in RES.items():
            leaf = theirs + leaf[len(ours):] if leaf.startswith(ours + ".") else leaf
        leaf = leaf.replace("op.", "conv.")
        if leaf.startswith("qkv."):
            order = (0, 1, 2, 3) if cfg.attention_order == "new" else (1, 0, 2, 3)
            C = len(value) // 3
            D = cfg.head_channels(C)
            rows = value.reshape(*((3, C // D) if cfg.attention_order == "new" else (C // D, 3)), D, -1).permute(order)
            for part, tensor in zip("qkv", rows.reshape(3, C, -1)):
                out[f"{modules[prefix]}.to_{part}.{leaf[4:]}"] = tensor if leaf.endswith("weight") else tensor.flatten()
            continue
        if leaf.startswith("proj_out."):
            leaf, value = "to_out.0." + leaf[9:], value.squeeze(-1)
        if leaf.startswith("norm.") and modules[prefix].split(".")[-2] == "attentions":
            leaf = "group_norm." + leaf[5:]
        out[f"{modules[prefix]}.{leaf}"] = value
    return out
