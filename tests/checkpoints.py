"""Small networks of every family, and what may be wrong with their files."""

import json
import pickle
from dataclasses import replace

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckpt.layouts as layouts
from ckpt import convert, save_checkpoint, save_unet
from harness.files import META, text_meta
from model import UNetConfig

CFG = UNetConfig(
    in_channels=4,
    out_channels=4,
    model_channels=32,
    channel_mult=(1, 2),
    attention=(0, 1),
    num_classes=3,
)
# The families in small: names and shapes as in the real ones, counted by the same code.
SD = UNetConfig(
    4,
    4,
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention=(1, 0),
    use_scale_shift_norm=False,
    resblock_updown=False,
    num_heads=2,
    context_dim=24,
    linear_projection=False,
)
TINY = {
    "adm": UNetConfig(
        3,
        6,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention=(0, 1),
        num_head_channels=16,
        num_classes=5,
    ),
    "adm-new": UNetConfig(
        3,
        6,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention=(0, 1),
        num_head_channels=16,
        attention_order="new",
        use_scale_shift_norm=False,
        resblock_updown=False,
    ),
    "sd15": SD,
    "sdxl": replace(
        SD,
        attention=(0, 2),
        middle_attention=2,
        vector_dim=6 * 256 + 16,
        num_heads=1,
        num_head_channels=16,
        linear_projection=True,
    ),
}


def heads(cfg):
    return dict(
        num_heads=cfg.num_heads,
        num_head_channels=cfg.num_head_channels,
        attention_order=cfg.attention_order,
    )


def inputs(cfg, n=2, side=8):
    g = torch.Generator().manual_seed(1)
    y = (
        torch.randn(n, cfg.vector_dim, generator=g)
        if cfg.vector_dim
        else torch.arange(n) % cfg.num_classes
        if cfg.num_classes
        else None
    )
    return (
        torch.randn(n, cfg.in_channels, side, side, generator=g),
        torch.tensor([3.0, 701.0]),
        y,
        torch.randn(n, 7, cfg.context_dim, generator=g) if cfg.context_dim else None,
    )


def ldm(net):
    """A net's tensors as LDM's own files have them."""
    return {
        name: t.contiguous()
        for k, v in net.state_dict().items()
        for name, t in layouts.to_foreign(net.cfg, "native", k, v)
    }


def same(a, b):
    a, b = (x.state_dict() if isinstance(x, torch.nn.Module) else x for x in (a, b))
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


ADM = TINY["adm"]


def spoil(path, how):
    data = path.read_bytes()
    tensors = load_file(path)
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "truncated in the header":
        path.write_bytes(data[:100])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}))
    elif how == "torch.save":
        torch.save({"a": torch.zeros(1)}, path)
    elif how == "foreign":
        save_file(tensors, path)
    elif how == "metadata altered":
        path.write_bytes(data.replace(b'num_res_blocks\\": 2', b'num_res_blocks\\": 1'))
    elif how == "another number of heads":  # consistent, loads strictly, computes something else
        meta = json.loads(safe_open(path, "pt").metadata()[META])
        meta["unet"]["num_heads"] = 2
        save_file(tensors, path, metadata=text_meta(meta))
    elif how == "one bit flipped":
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    else:
        with safe_open(path, "pt") as file:
            meta = file.metadata()
        if how == "a tensor missing":
            tensors.pop("out.2.weight")
        elif how == "a tensor more":
            tensors["extra.weight"] = torch.zeros(1)
        else:
            tensors["out.2.weight"] = torch.zeros(5, 32, 3, 3)
        save_file(tensors, path, metadata=meta)


def save_three(folder, net, keep, keep_every=0, images=(100, 200, 300, 400)):
    for n in images:
        save_checkpoint(
            folder,
            n,
            net,
            {"run": "r"},
            {"0.050": net.state_dict()},
            {"meter": torch.zeros(2)},
            {},
            keep,
            keep_every,
        )


def single_file(net, ema):
    """A Stable Diffusion checkpoint with all its parts."""
    tensors = {f"model.diffusion_model.{k}": v for k, v in ldm(net).items()}
    tensors |= {
        f"model_ema.diffusion_model{k.replace('.', '')}": v.clone() for k, v in ldm(ema).items()
    }
    return tensors | {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(5),
        "betas": torch.ones(1000),
        "first_stage_model.encoder.conv_in.weight": torch.ones(8, 3, 3, 3),
        "first_stage_model.quant_conv.bias": torch.ones(8),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }


def convert_net(net, dst, layout, **meta):
    src = dst.with_name(dst.name + ".src.safetensors")
    save_unet(src, net, meta)
    return convert(src, dst, layout)
