"""Anybody's files: completely or not at all."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import ADM, SD, TINY, convert_net, heads, inputs, ldm, same, single_file
from ckpt import convert, find_checkpoint, fingerprint, load_like, load_unet, save_unet
from ckpt.containers import open_weights
from ckpt.convert import inspect
from ckpt.diffusers import diffusers_config
from ckpt.foreign import config_of
from conftest import randomize
from harness.cli import UserError
from harness.files import Container
from model import PRESETS, UNet, UNetConfig


# ---- foreign files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "unet.",
        "student.",
        "model.diffusion_model.",
        "diffusion_model.",
    ],
)
def test_a_wrapper_prefix_is_taken_off(prefix, tmp_path):
    net = randomize(UNet(TINY["adm"]))
    # A pickle, whatever it says.
    torch.save(
        {prefix + k: v for k, v in net.state_dict().items()}, tmp_path / "model.safetensors"
    )
    again, meta = load_unet(tmp_path / "model.safetensors", **heads(net.cfg))
    assert (
        same(again, net)
        and again.cfg == net.cfg
        and torch.equal(net(*inputs(net.cfg)), again(*inputs(net.cfg)))
    )
    assert meta["layout"] == "native" and meta["family"] == "adm" and meta["objective"] is None
    assert meta["fingerprint"] == fingerprint(net.state_dict())
    assert meta["source"] == str(tmp_path / "model.safetensors")


def test_what_a_file_cannot_say_is_asked_for_and_what_it_can_say_must_agree(tmp_path):
    net = randomize(UNet(TINY["adm"]))
    torch.save(net.state_dict(), tmp_path / "a.pt")
    with pytest.raises(UserError, match="number of attention heads"):
        load_unet(tmp_path / "a.pt")
    with pytest.raises(UserError, match="order of the qkv rows"):
        load_unet(tmp_path / "a.pt", num_head_channels=16)
    assert (
        load_unet(
            tmp_path / "a.pt", num_head_channels=16, attention_order="legacy", objective="eps"
        )[1]["objective"]
        == "eps"
    )
    save_unet(tmp_path / "own", net, {"objective": {"name": "ddpm", "target": "eps"}})
    assert (
        load_unet(
            tmp_path / "own", num_head_channels=16, attention_order="legacy", objective="eps"
        )[0].cfg
        == net.cfg
    )
    for known, message in (
        (
            {"num_head_channels": 32},
            "says num_heads 1, num_head_channels 16.*got num_head_channels 32",
        ),
        ({"attention_order": "new"}, "got attention_order new"),
        ({"objective": "fm"}, "says its objective is eps, got fm"),
        ({"num_heads": 5}, "got num_heads 5"),
    ):
        with pytest.raises(UserError, match=message):
            load_unet(tmp_path / "own", **known)


@pytest.mark.parametrize("pickled", [True, False])
def test_a_single_file_with_all_parts(pickled, tmp_path):
    net, ema = randomize(UNet(SD)), randomize(UNet(SD), seed=1)
    tensors = single_file(net, ema)
    torch.save(
        {"state_dict": tensors, "global_step": 840000}, tmp_path / "sd.ckpt"
    ) if pickled else save_file(tensors, tmp_path / "sd.ckpt")
    raw, meta = load_unet(tmp_path / "sd.ckpt", num_heads=2)
    assert (
        same(raw, net)
        and raw.cfg == SD
        and meta["family"] == "latent diffusion"
        and meta["ema"] is None
    )
    assert same(load_unet(tmp_path / "sd.ckpt", num_heads=2, ema=True)[0], ema)
    shown = "\n".join(inspect(tmp_path / "sd.ckpt", num_heads=2))
    assert "also in it   " in shown and all(
        f"{n} tensors" in shown for n in (f"{len(ldm(ema))} ema", "3 schedule", "2 vae", "1 text")
    )
    for drop, message in (
        (lambda k: "model_ema" in k, "holds no EMA of a U-Net"),
        (lambda k: "diffusion_model" in k, "holds no U-Net, but .*vae"),
    ):
        save_file({k: v for k, v in tensors.items() if not drop(k)}, tmp_path / "part")
        with pytest.raises(UserError, match=message):
            load_unet(tmp_path / "part", num_heads=2, ema="ema" in message.lower())


def test_raw_weights_and_emas_of_foreign_pickles_are_not_mixed_up(tmp_path):
    raw, ema = (randomize(UNet(ADM), seed).state_dict() for seed in (0, 1))
    told = heads(ADM)
    for n, box in enumerate(
        (
            {"model": {**raw, "step": 3}, "model_ema": ema},
            {"state_dict": raw, "state_dict_ema": ema, "opt": {0: [torch.ones(1)]}},
            {"net": raw, "ema": {f"module.{k}": v for k, v in ema.items()}, "epoch": 1},
        )
    ):
        path = tmp_path / f"{n}.pt"
        torch.save(box, path)
        for choice, wanted in ((None, raw), (False, raw), (True, ema)):
            net, meta = load_unet(path, ema=choice, **told)
            assert same(net, wanted) and meta["ema"] == ("the file's" if choice else None)
        also = "\n".join(inspect(path, **told))
        assert f"{len(ema)} {list(box)[1]} tensors" in also and ("1 opt tensors" in also) == (
            n == 1
        )
        assert f"{len(raw)} raw tensors" in "\n".join(inspect(path, ema=True, **told))
    for box in ({f"ema.{k}": v for k, v in ema.items()}, {"model_ema": ema}):
        torch.save(box, path)
        assert (
            load_unet(path, **told)[1]["ema"]
            == load_unet(path, ema=True, **told)[1]["ema"]
            == "the file's"
        )
        with pytest.raises(UserError, match="holds an EMA .*, wanted the raw weights"):
            load_unet(path, ema=False, **told)
    torch.save({"net": raw, "ema_1": ema, "ema_2": raw}, path)
    with pytest.raises(UserError, match="holds several EMAs: ema_1, ema_2"):
        load_unet(path, ema=True, **told)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint16])
def test_weights_that_are_no_floating_point_numbers_are_refused(dtype, tmp_path):
    torch.save(
        {
            k: v.abs().to(dtype) if k == "out.2.bias" else v
            for k, v in randomize(UNet(ADM)).state_dict().items()
        },
        tmp_path / "x.pt",
    )
    with pytest.raises(UserError, match="1 weights are not floating-point numbers: out.2.bias"):
        convert(tmp_path / "x.pt", tmp_path / "y.safetensors", "native", **heads(ADM))


def test_a_small_file_of_large_tensors_is_refused_before_memory_is_taken(tmp_path):
    """One number, read as a weight of 10^18: a pickle may say so of its strides."""
    state = dict(UNet(ADM).state_dict())
    state["out.2.bias"] = torch.zeros(1).expand(10**18)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError, match="out.2.bias repeats few numbers"):
        open_weights(tmp_path / "x.pt")["out.2.bias"]


BASE = diffusers_config(ADM)


@pytest.mark.parametrize(
    "config",
    [
        [],
        "x",
        None,
        3,
        {"block_out_channels": "ab"},
        {"block_out_channels": None},
        {"block_out_channels": []},
        {"down_block_types": [1, 2]},
        {"down_block_types": None},
        {"attention_head_dim": "8"},
        {"attention_head_dim": 0},
        {"block_out_channels": [0, 0]},
        {"layers_per_block": 10**6},
        {"in_channels": None},
        {"_class_name": ["x"]},
        {"act_fn": ["silu"]},
        {"up_block_types": []},
        {"dropout": "x"},
        {"attention_head_dim": [None, 16]},
    ],
    ids=str,
)
def test_a_config_of_diffusers_with_odd_types_is_one_line(config, tmp_path):
    convert_net(randomize(UNet(ADM)), tmp_path / "d", "diffusers")
    (tmp_path / "d/config.json").write_text(
        json.dumps({**BASE, **config} if isinstance(config, dict) else config)
    )
    for strip in (False, True):  # ours, and as diffusers would have written it
        if strip:
            weights = tmp_path / "d/diffusion_pytorch_model.safetensors"
            save_file(load_file(weights), weights, metadata={"format": "pt"})
        with pytest.raises(UserError, match="config.json"):
            load_unet(tmp_path / "d")


def test_an_edited_config_beside_our_weights_is_an_error(tmp_path):
    convert_net(randomize(UNet(ADM)), tmp_path / "d", "diffusers")
    file = tmp_path / "d/config.json"
    for change, message in (
        ({"attention_head_dim": 32}, r"channels a head \[16\] / \[32\]"),
        ({"num_class_embeds": 9}, "num_classes 5 / 9"),
        ({"norm_eps": 1e-6}, "norm_eps"),
    ):
        file.write_text(json.dumps({**BASE, **change}))
        with pytest.raises(UserError, match=message) as info:
            load_unet(tmp_path / "d")
        assert str(file) in str(info.value)
    file.write_text(json.dumps({**BASE, "sample_size": 32}))  # this changes nothing
    load_unet(tmp_path / "d")


def test_a_folder_names_what_it_has_and_a_shard_its_index(tmp_path):
    torch.save({}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="It has a.ckpt; name one"):
        find_checkpoint(tmp_path)
    for name in (
        "m-00001-of-00002.safetensors",
        "m-00001-of-00002.fp16.safetensors",
        "m-00001-of-00001.safetensors",
    ):
        save_file({"x": torch.ones(1)}, tmp_path / name)
    with pytest.raises(
        UserError, match="is one of 2 shards.  Name their index: .*/m.safetensors.index.json"
    ):
        find_checkpoint(tmp_path / "m-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="index: .*/m.safetensors.index.fp16.json"):
        find_checkpoint(tmp_path / "m-00001-of-00002.fp16.safetensors")
    find_checkpoint(tmp_path / "m-00001-of-00001.safetensors")


@pytest.mark.parametrize(
    "how, message",
    [
        ("a key missing", "1 missing: middle_block.0.out_layers.3.weight"),
        ("a key more", "1 unexpected: input_blocks.0.0.extra"),
        (
            "another shape",
            r"1 of another shape: middle_block.0.out_layers.3.weight "
            r"\(64, 64, 1, 1\) for \(64, 64, 3, 3\)",
        ),
        ("no architecture", "x.safetensors: cannot tell"),
        (
            "a flat convolution",
            r"of another shape: input_blocks.3.0.skip_connection.weight \(64, 32\)",
        ),
        ("a prefix in the middle", "x.safetensors holds no U-Net, but .* input_blocks tensors"),
        ("an EMA with a hole", "1 missing: out.2.bias"),
        ("mixed dtypes", "float16"),
    ],
)
def test_a_foreign_file_loads_completely_or_not_at_all(how, message, tmp_path):
    net, tensors = randomize(UNet(SD)), None
    tensors = single_file(net, net)
    key = "middle_block.0.out_layers.3.weight"
    key, twin = f"model.diffusion_model.{key}", f"model_ema.diffusion_model{key.replace('.', '')}"
    if how == "a key missing":
        del tensors[key], tensors[twin]
    elif how == "a flat convolution":  # only projections may be written without their 1×1
        for name in [
            k
            for k in tensors
            if "input_blocks.3.0.skip_connection.weight" in k
            or "input_blocks30skip_connectionweight" in k
        ]:
            tensors[name] = tensors[name][..., 0, 0].contiguous()
    elif how == "no architecture":
        del (
            tensors["model.diffusion_model.out.2.weight"],
            tensors["model_ema.diffusion_modelout2weight"],
        )
    elif how == "a key more":
        tensors["model.diffusion_model.input_blocks.0.0.extra"] = torch.ones(1)
    elif how == "another shape":
        tensors[key] = torch.ones(64, 64, 1, 1)
    elif how == "a prefix in the middle":
        tensors = {
            k.replace("input_blocks.", "input_blocks.module."): v for k, v in ldm(net).items()
        }
    elif how == "an EMA with a hole":
        del tensors["model_ema.diffusion_modelout2bias"]
    else:  # q in fp16, k and v in fp32 cannot become one qkv
        net = randomize(UNet(TINY["adm"]))
        convert_net(net, tmp_path / "d", "diffusers")
        tensors = load_file(tmp_path / "d/diffusion_pytorch_model.safetensors")
        tensors["mid_block.attentions.0.to_q.weight"] = tensors[
            "mid_block.attentions.0.to_q.weight"
        ].half()
        save_file(tensors, tmp_path / "d/diffusion_pytorch_model.safetensors")
        with pytest.raises(UserError, match="parts of middle_block.1.qkv.weight have dtypes"):
            load_unet(tmp_path / "d")
        return
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        load_unet(tmp_path / "x.safetensors", num_heads=2, ema=how == "an EMA with a hole")


# ---- what no tensor shows -----------------------------------------------------------------------

SMALL = UNetConfig(
    4, 4, model_channels=32, channel_mult=(1, 2, 2), attention=(0, 1, 1), num_head_channels=16
)
TEXT = UNetConfig(
    4, 4, model_channels=64, channel_mult=(1, 2), num_res_blocks=1, attention=(2, 0),
    num_head_channels=16, vector_dim=12, context_dim=24, use_scale_shift_norm=False,
    resblock_updown=False,
)  # fmt: skip


def shapes(cfg):
    with torch.device("meta"):
        return dict(UNet(cfg).state_dict())


def without(cfg, start):
    return {k: v for k, v in shapes(cfg).items() if not k.startswith(start)}


@pytest.mark.parametrize("state, known, message", [
    (shapes(SMALL), {}, "heads and the order .*--num-heads or --num-head-channels .*; and --att"),
    (shapes(replace(SMALL, attention=(0, 0, 0))), {}, "Add --num-heads or --num-head-channels"),
    (shapes(SMALL), {"attention_order": "new"}, "Add --num-heads or --num-head-channels [^;]*$"),
    (shapes(SMALL), {"num_heads": 4}, "Add --attention-order"),
    # Transformers have no order.
    (shapes(TEXT), {}, "context_dim 24.*Add --num-heads or --num-head-channels [^;]*$"),
    (
        shapes(SMALL), {"num_heads": 5, "attention_order": "new"},
        "do not split into 5 heads.  Give the values that the network was made with",
    ),
    (shapes(SMALL), {"num_heads": "4"}, "x.pt: num_heads is '4': wanted a whole number from 0"),
    (
        shapes(PRESETS["sd15"]), {"num_head_channels": 64},
        "'num_head_channels': 64. was given, .* 1.x's, which has .'num_heads': 8.*  Leave it out",
    ),
    (shapes(SMALL), {"num_head_channels": 48, "attention_order": "new"}, "split into heads of 48"),
    (
        shapes(SMALL), {"num_heads": 4, "attention_order": "new", "in_channels": 3},
        "in_channels=3 was given, but the tensors say 4.  Leave it out",
    ),
    (shapes(SMALL), {"num_head": 4}, "Closest: num_heads"),
    (
        {f"model.diffusion_model.{k}": v for k, v in shapes(TEXT).items()}, {},
        "no tensor 'time_embed.0.weight' among",
    ),
    (without(TEXT, "out.2.weight"), {}, "no tensor 'out.2.weight'.*  Is the file complete"),
    (without(TEXT, "middle_block.1."), {}, "no tensor 'middle_block.1"),
    ({}, {}, "no tensor 'time_embed.0.weight' among 0"),
])  # fmt: skip
def test_what_cannot_be_read_off_is_asked_for_by_its_flag(state, known, message):
    box = Container(Path("x.pt"), "", state, {})
    with pytest.raises(UserError, match=message):
        config_of(box, known)


def test_what_a_file_cannot_say_the_preset_says(tmp_path):
    net = randomize(UNet(SMALL))
    torch.save(net.state_dict(), tmp_path / "a.pt")
    again, meta = load_like(tmp_path / "a.pt", SMALL, "small")
    assert same(again, net) and again.cfg == SMALL and "unet" not in meta
    convert_net(net, tmp_path / "d", "diffusers")
    weights = tmp_path / "d/diffusion_pytorch_model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt"})
    new = replace(SMALL, attention_order="new")
    assert load_like(tmp_path / "d", new, "small")[0].cfg == new  # its order becomes the preset's
    # What the file does say has to be the preset's.
    with pytest.raises(UserError, match="it has channels a head .16, 16.; --model small is .*8, 8"):
        load_like(tmp_path / "d", replace(SMALL, num_head_channels=8), "small")
    deep = replace(SMALL, num_res_blocks=1)
    with pytest.raises(UserError, match="it has num_res_blocks 2; --model small is num_res_b"):
        load_like(tmp_path / "a.pt", deep, "small")
    save_unet(tmp_path / "own", net, {})
    with pytest.raises(UserError, match="it has attention_order legacy; --model small is .*new"):
        load_like(tmp_path / "own", new, "small")
    assert same(load_like(tmp_path / "own", replace(SMALL, in_channels=9), "small")[0], net)
