"""diffusers' DiT with the weights of one of our transformers.

The peer of transformer.py, the oracle of the transformer's tests. diffusers spaces DiT's
frequencies of time otherwise than its authors did; here they are put right, and labels are never
dropped, so that both compute the same function.
"""

import torch

from mmdit import MMDiT

MODULES = {
    "attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}  # fmt: skip


def peer_dit(net: MMDiT, side: int) -> torch.nn.Module:
    """The DiTTransformer2DModel that computes the same as `net`, which has classes, on latents of
    side × side."""
    import diffusers

    cfg = net.cfg
    peer = diffusers.DiTTransformer2DModel(
        num_attention_heads=cfg.heads, attention_head_dim=cfg.width // cfg.heads,
        in_channels=cfg.in_channels, out_channels=cfg.out_channels, num_layers=cfg.blocks,
        sample_size=side, patch_size=cfg.patch, num_embeds_ada_norm=cfg.num_classes,
        norm_eps=1e-6,
    ).to(next(net.parameters()).dtype)  # fmt: skip
    own, state = net.state_dict(), {}
    for leaf in ("weight", "bias"):
        state[f"pos_embed.proj.{leaf}"] = own[f"x_embedder.proj.{leaf}"]
        state[f"proj_out_1.{leaf}"] = own[f"final_layer.adaLN_modulation.1.{leaf}"]
        state[f"proj_out_2.{leaf}"] = own[f"final_layer.linear.{leaf}"]
        for i in range(cfg.blocks):
            here, there = f"blocks.{i}", f"transformer_blocks.{i}"
            for ours, theirs in MODULES.items():
                state[f"{there}.{theirs}.{leaf}"] = own[f"{here}.{ours}.{leaf}"]
            for part, rows in zip("qkv", own[f"{here}.attn.qkv.{leaf}"].chunk(3)):
                state[f"{there}.attn1.to_{part}.{leaf}"] = rows
            for j in (0, 2):
                theirs = f"{there}.norm1.emb.timestep_embedder.linear_{1 + j // 2}.{leaf}"
                state[theirs] = own[f"t_embedder.mlp.{j}.{leaf}"]
    for i, block in enumerate(peer.transformer_blocks):
        table = f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"
        state[table] = own["y_embedder.embedding_table.weight"]
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm1.emb.class_embedder.dropout_prob = 0
    peer.load_state_dict(state)
    return peer
