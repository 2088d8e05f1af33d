"""U-Nets on disk: whole, strict, self-describing, atomic; any layout in, any layout out, bit for bit."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckpt
import files
import layouts
import run
import samplers
import train
from ckpt import checkpoints, convert, find_checkpoint, fingerprint, inspect, load_unet, read_tensors, save_unet
from config import UserError
from conftest import ROOT, randomize
from files import META, text_meta, write_tensors
from model import PRESETS, UNet, UNetConfig
from objectives import make_objective
from run import save_checkpoint
from vae import pixel

CFG = UNetConfig(in_channels=4, out_channels=4, model_channels=32, channel_mult=(1, 2), attention=(0, 1), num_classes=3)
# The families in small: names and shapes as in the real ones, counted by the same code.
SD = UNetConfig(4, 4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention=(1, 0), use_scale_shift_norm=False,
                resblock_updown=False, num_heads=2, context_dim=24, linear_projection=False)
TINY = {"adm": UNetConfig(3, 6, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention=(0, 1), num_head_channels=16, num_classes=5),
        "adm-new": UNetConfig(3, 6, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention=(0, 1), num_head_channels=16,
                              attention_order="new", use_scale_shift_norm=False, resblock_updown=False),
        "sd15": SD, "sdxl": replace(SD, attention=(0, 2), middle_attention=2, vector_dim=6 * 256 + 16, num_heads=1, num_head_channels=16,
                                    linear_projection=True)}


def heads(cfg):
    return dict(num_heads=cfg.num_heads, num_head_channels=cfg.num_head_channels, attention_order=cfg.attention_order)


def inputs(cfg, n=2, side=8):
    g = torch.Generator().manual_seed(1)
    y = torch.randn(n, cfg.vector_dim, generator=g) if cfg.vector_dim else torch.arange(n) % cfg.num_classes if cfg.num_classes else None
    return torch.randn(n, cfg.in_channels, side, side, generator=g), torch.tensor([3.0, 701.0]), y, \
        torch.randn(n, 7, cfg.context_dim, generator=g) if cfg.context_dim else None


def ldm(net):
    """A net's tensors as LDM's own files have them."""
    return {name: t.contiguous() for k, v in net.state_dict().items() for name, t in layouts.to_foreign(net.cfg, "native", k, v)}


def same(a, b):
    a, b = (x.state_dict() if isinstance(x, torch.nn.Module) else x for x in (a, b))
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def net():
    return randomize(UNet(CFG))


def test_round_trip_is_bitwise_and_needs_nothing_but_the_file(net, tmp_path):
    mark = save_unet(tmp_path / "m.safetensors", net, {"images": 7})
    again, meta = load_unet(tmp_path / "m.safetensors")
    assert again.cfg == CFG and meta["images"] == 7 and meta["fingerprint"] == mark == fingerprint(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([0, -1])
    assert torch.equal(net(x, t, y), again(x, t, y))
    assert again.input_blocks[0][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_any_safetensors_reader_sees_plain_native_names(net, tmp_path):
    wrapped = torch.compile(torch.nn.parallel.DataParallel(net))                # .module inside _orig_mod
    save_unet(tmp_path / "m.safetensors", wrapped, {})
    assert load_file(tmp_path / "m.safetensors").keys() == net.state_dict().keys()
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt" and json.loads(file.metadata()["twinpath"])["unet"]["model_channels"] == 32
    with pytest.raises(AssertionError, match="not this U-Net"):
        save_unet(tmp_path / "x.safetensors", net, {}, {f"module.{k}": v for k, v in net.state_dict().items()})


def test_files_have_ordinary_permissions(net, tmp_path):
    save_unet(tmp_path / "m.safetensors", net, {})
    (tmp_path / "plain").touch()
    assert (tmp_path / "m.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def spoil(path, how):
    data = path.read_bytes()
    tensors = load_file(path)
    if how == "truncated":
        path.write_bytes(data[:len(data) // 2])
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
    elif how == "another number of heads":                                      # consistent, loads strictly, computes something else
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


@pytest.mark.parametrize("how, message", [
    ("truncated", "truncated or not a safetensors"), ("truncated in the header", "truncated or not"), ("empty", "truncated or not"),
    ("pickle", "is a Python pickle"), ("torch.save", "1 of 1 tensors belong to nothing known: a"),
    ("foreign", "order of the qkv rows|number of attention heads"),
    ("metadata altered", "metadata does not match its own checksum"), ("another number of heads", "the network computes .* its config"),
    ("one bit flipped", "do not match their own fingerprint"), ("a tensor missing", "1 missing: out.2.weight"),
    ("a tensor more", "1 unexpected: extra.weight"), ("another shape", r"1 of another shape: out.2.weight \(5, 32, 3, 3\) for \(4, 32, 3, 3\)"),
])
def test_a_damaged_or_foreign_file_is_named_for_what_it_is(net, tmp_path, how, message):
    path = tmp_path / "m.safetensors"
    save_unet(path, net, {})
    spoil(path, how)
    with pytest.raises(UserError, match=message):
        load_unet(path)


def test_wrong_kinds_of_file_are_named(tmp_path):
    write_tensors(tmp_path / "v.safetensors", {"x": torch.zeros(1)}, {"kind": "vae"})
    with pytest.raises(UserError, match="holds no U-Net.*vae"):
        load_unet(tmp_path / "v.safetensors")
    with pytest.raises(UserError, match="no checkpoint at"):
        load_unet(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="no checkpoint in"):
        find_checkpoint(tmp_path)


def save_three(folder, net, keep, keep_every=0, images=(100, 200, 300, 400)):
    for n in images:
        save_checkpoint(folder, n, net, {"run": "r"}, {"0.050": net.state_dict()}, {"meter": torch.zeros(2)}, {}, keep, keep_every)


def test_the_last_ones_and_every_multiple_are_kept(net, tmp_path):
    save_three(tmp_path, net, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["000000000300", "000000000400"]
    save_three(tmp_path / "b", net, keep=1, keep_every=200)
    assert [p.name for p in checkpoints(tmp_path / "b")] == ["000000000200", "000000000400"]
    assert find_checkpoint(tmp_path).name == "ema-0.050.safetensors" and find_checkpoint(tmp_path).parent.name == "000000000400"
    assert load_unet(find_checkpoint(tmp_path))[1]["ema"] == 0.05
    assert load_unet(tmp_path / "ckpt/000000000400/model.safetensors")[1]["ema"] is None


def test_a_kill_in_mid_save_leaves_the_last_good_one(net, tmp_path, monkeypatch):
    save_three(tmp_path, net, keep=2, images=(100,))

    def killed(*args, **kwargs):
        raise KeyboardInterrupt
    for module, name in ((ckpt, "write_tensors"), (run, "write_tensors"), (files, "fsync")):
        with monkeypatch.context() as m:
            m.setattr(module, name, killed)
            with pytest.raises(KeyboardInterrupt):
                save_three(tmp_path, net, keep=2, images=(200,))
        assert [p.name for p in checkpoints(tmp_path)] == ["000000000100"]
    with monkeypatch.context() as m:
        m.setattr(shutil, "rmtree", killed)                                     # … while removing an old one
        with pytest.raises(KeyboardInterrupt):
            save_three(tmp_path, net, keep=1, images=(200,))
    save_three(tmp_path, net, keep=1, images=(300,))
    assert sorted(os.listdir(tmp_path / "ckpt")) == ["000000000300"]
    assert read_tensors(checkpoints(tmp_path)[0] / "state.safetensors")[1]["images"] == 300


def test_a_header_whose_length_begins_like_a_pickle_is_still_safetensors(tmp_path):
    """The first byte of a safetensors file is the low byte of its header's length: one file in 256 begins with 0x80."""
    for padding in range(0, 256, 8):
        ckpt.write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(1)}, {"padding": "-" * padding})
        assert read_tensors(tmp_path / "x.safetensors")[1]["padding"] == "-" * padding


# ---- what training leaves -------------------------------------------------------------------------------------------

def test_trained_weights_that_equal_their_base_are_refused(net, tmp_path):
    base = fingerprint(net.state_dict())
    save_unet(tmp_path / "start", net, {"images": 0, "base_fingerprint": base})
    with pytest.raises(UserError, match="is not written: after 64 images the weights are bit for bit those training started from"):
        save_unet(tmp_path / "m", net, {"images": 64, "base_fingerprint": base})
    with pytest.raises(UserError, match="bit for bit those"):
        save_checkpoint(tmp_path, 8, net, {"base_fingerprint": base}, {}, {}, {}, 1, 0)
    assert not (tmp_path / "m").exists() and not checkpoints(tmp_path)
    with torch.no_grad():
        net.out[2].bias[0] += 1e-6
    save_unet(tmp_path / "m", net, {"images": 64, "base_fingerprint": base})


def test_raw_weights_and_ema_are_not_mixed_up(net, tmp_path):
    save_three(tmp_path, net, keep=1, images=(8,))
    raw, ema = (checkpoints(tmp_path)[0] / f"{name}.safetensors" for name in ("model", "ema-0.050"))
    assert load_unet(ema, ema=True)[1]["ema"] == 0.05 and load_unet(raw, ema=False)[1]["ema"] is None
    with pytest.raises(UserError, match="holds the raw weights, wanted an EMA"):
        load_unet(raw, ema=True)
    with pytest.raises(UserError, match="holds an EMA of width 0.05, wanted the raw weights"):
        load_unet(ema, ema=False)


@pytest.mark.parametrize("family", TINY)
def test_the_probe_sees_heads_and_order_and_touches_nothing(family, tmp_path, capfd, monkeypatch):
    net = randomize(UNet(TINY[family]))
    value, state = ckpt.probe(net.cfg, net.state_dict()), torch.get_rng_state()
    assert len(value) == 8 and value == ckpt.probe(net.cfg, {k: v.double() for k, v in net.state_dict().items()})
    others = [replace(net.cfg, num_heads=8, num_head_channels=0), replace(net.cfg, num_heads=1, num_head_channels=0)]
    others += [replace(net.cfg, attention_order="new" if net.cfg.attention_order == "legacy" else "legacy")] if not net.cfg.context_dim else []
    for other in others:
        assert max(abs(a - b) for a, b in zip(value, ckpt.probe(other, net.state_dict()))) > 5e-3 * max(map(abs, value))
    assert torch.equal(state, torch.get_rng_state())
    monkeypatch.setenv("KERNELS", "triton")                                     # on the side: neither interpreted nor said
    assert ckpt.probe(net.cfg, net.state_dict()) == value and capfd.readouterr().err == ""
    save_unet(tmp_path / "m", net.bfloat16(), {})
    again, meta = load_unet(tmp_path / "m")
    assert same(again, net) and len(meta["probe"]) == 8
    assert next(load_unet(tmp_path / "m", dtype=torch.float32)[0].parameters()).dtype == torch.float32


# ---- foreign files --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "unet.", "student.", "model.diffusion_model.",
                                    "diffusion_model."])
def test_a_wrapper_prefix_is_taken_off(prefix, tmp_path):
    net = randomize(UNet(TINY["adm"]))
    torch.save({prefix + k: v for k, v in net.state_dict().items()}, tmp_path / "model.safetensors")   # a pickle, whatever it says
    again, meta = load_unet(tmp_path / "model.safetensors", **heads(net.cfg))
    assert same(again, net) and again.cfg == net.cfg and torch.equal(net(*inputs(net.cfg)), again(*inputs(net.cfg)))
    assert meta["layout"] == "native" and meta["family"] == "adm" and meta["objective"] is None
    assert meta["fingerprint"] == fingerprint(net.state_dict())
    assert meta["source"] == str(tmp_path / "model.safetensors")


def test_what_a_file_cannot_say_is_asked_for_and_what_it_can_say_must_agree(tmp_path):
    net = randomize(UNet(TINY["adm"]))
    torch.save(net.state_dict(), tmp_path / "a.pt")
    with pytest.raises(UserError, match="number of attention heads leaves no trace"):
        load_unet(tmp_path / "a.pt")
    with pytest.raises(UserError, match="order of the qkv rows"):
        load_unet(tmp_path / "a.pt", num_head_channels=16)
    assert load_unet(tmp_path / "a.pt", num_head_channels=16, attention_order="legacy", objective="eps")[1]["objective"] == "eps"
    save_unet(tmp_path / "own", net, {"objective": {"name": "ddpm", "target": "eps"}})
    assert load_unet(tmp_path / "own", num_head_channels=16, attention_order="legacy", objective="eps")[0].cfg == net.cfg
    for known, message in (({"num_head_channels": 32}, "says num_heads 1, num_head_channels 16.*got num_head_channels 32"),
                           ({"attention_order": "new"}, "got attention_order new"),
                           ({"objective": "fm"}, "says its objective is eps, got fm"), ({"num_heads": 5}, "got num_heads 5")):
        with pytest.raises(UserError, match=message):
            load_unet(tmp_path / "own", **known)


def single_file(net, ema):
    """A Stable Diffusion checkpoint with all its parts."""
    tensors = {f"model.diffusion_model.{k}": v for k, v in ldm(net).items()}
    tensors |= {f"model_ema.diffusion_model{k.replace('.', '')}": v.clone() for k, v in ldm(ema).items()}
    return tensors | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5), "betas": torch.ones(1000),
                      "first_stage_model.encoder.conv_in.weight": torch.ones(8, 3, 3, 3), "first_stage_model.quant_conv.bias": torch.ones(8),
                      "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}


@pytest.mark.parametrize("pickled", [True, False])
def test_a_single_file_with_all_parts(pickled, tmp_path):
    net, ema = randomize(UNet(SD)), randomize(UNet(SD), seed=1)
    tensors = single_file(net, ema)
    torch.save({"state_dict": tensors, "global_step": 840000}, tmp_path / "sd.ckpt") if pickled else save_file(tensors, tmp_path / "sd.ckpt")
    raw, meta = load_unet(tmp_path / "sd.ckpt", num_heads=2)
    assert same(raw, net) and raw.cfg == SD and meta["family"] == "latent diffusion" and meta["ema"] is None
    assert same(load_unet(tmp_path / "sd.ckpt", num_heads=2, ema=True)[0], ema)
    shown = "\n".join(inspect(tmp_path / "sd.ckpt", num_heads=2))
    assert "2 vae tensors" in shown and "1 text tensors" in shown and f"{len(net.state_dict()) + 2} ema tensors" in shown or "schedule" in shown
    for drop, message in ((lambda k: "model_ema" in k, "holds no EMA of a U-Net"), (lambda k: "diffusion_model" in k, "holds no U-Net, but .*vae")):
        save_file({k: v for k, v in tensors.items() if not drop(k)}, tmp_path / "part")
        with pytest.raises(UserError, match=message):
            load_unet(tmp_path / "part", num_heads=2, ema="ema" in message.lower())


@pytest.mark.parametrize("how, message", [
    ("a key missing", "1 missing: middle_block.0.out_layers.3.weight"), ("a key more", "1 unexpected: input_blocks.0.0.extra"),
    ("another shape", r"1 of another shape: middle_block.0.out_layers.3.weight \(64, 64, 1, 1\) for \(64, 64, 3, 3\)"),
    ("no architecture", "x.safetensors: cannot tell"),
    ("a flat convolution", r"of another shape: input_blocks.3.0.skip_connection.weight \(64, 32\)"),
    ("a part nobody knows", "1 of [0-9]+ tensors belong to nothing known: lora.down"),
    ("a wrong prefix", "belong to nothing known: foo.input_blocks"),
    ("a prefix in the middle", "x.safetensors: cannot tell the architecture: no tensor"), ("an EMA with a hole", "1 missing: out.2.bias"),
    ("mixed dtypes", "float16"),
])
def test_a_foreign_file_loads_completely_or_not_at_all(how, message, tmp_path):
    net, tensors = randomize(UNet(SD)), None
    tensors = single_file(net, net)
    key = "middle_block.0.out_layers.3.weight"
    key, twin = f"model.diffusion_model.{key}", f"model_ema.diffusion_model{key.replace('.', '')}"
    if how == "a key missing":
        del tensors[key], tensors[twin]
    elif how == "a flat convolution":                                           # only projections may be written without their 1×1
        for name in [k for k in tensors if "input_blocks.3.0.skip_connection.weight" in k or "input_blocks30skip_connectionweight" in k]:
            tensors[name] = tensors[name][..., 0, 0].contiguous()
    elif how == "no architecture":
        del tensors["model.diffusion_model.out.2.weight"], tensors["model_ema.diffusion_modelout2weight"]
    elif how == "a key more":
        tensors["model.diffusion_model.input_blocks.0.0.extra"] = torch.ones(1)
    elif how == "another shape":
        tensors[key] = torch.ones(64, 64, 1, 1)
    elif how == "a part nobody knows":
        tensors["lora.down"] = torch.ones(1)
    elif how == "a wrong prefix":
        tensors = {f"foo.{k}": v for k, v in ldm(net).items()}
    elif how == "a prefix in the middle":
        tensors = {k.replace("input_blocks.", "input_blocks.module."): v for k, v in ldm(net).items()}
    elif how == "an EMA with a hole":
        del tensors["model_ema.diffusion_modelout2bias"]
    else:                                                                       # q in fp16, k and v in fp32 cannot become one qkv
        net = randomize(UNet(TINY["adm"]))
        convert_net(net, tmp_path / "d", "diffusers")
        tensors = load_file(tmp_path / "d/diffusion_pytorch_model.safetensors")
        tensors["mid_block.attentions.0.to_q.weight"] = tensors["mid_block.attentions.0.to_q.weight"].half()
        save_file(tensors, tmp_path / "d/diffusion_pytorch_model.safetensors")
        with pytest.raises(UserError, match="parts of middle_block.1.qkv.weight have dtypes"):
            load_unet(tmp_path / "d")
        return
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        load_unet(tmp_path / "x.safetensors", num_heads=2, ema=how == "an EMA with a hole")


# ---- converting -----------------------------------------------------------------------------------------------------

def convert_net(net, dst, layout, **meta):
    src = dst.with_name(dst.name + ".src.safetensors")
    save_unet(src, net, meta)
    return convert(src, dst, layout)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("family", TINY)
def test_there_and_back_is_bit_exact(family, dtype, tmp_path):
    net = randomize(UNet(TINY[family])).to(files.PRECISIONS[dtype])
    src = tmp_path / "a.safetensors"
    mark = save_unet(src, net, {"images": 3})
    assert convert(src, tmp_path / "folder", "diffusers") == mark == convert(tmp_path / "folder", tmp_path / "b.safetensors", "native")
    assert convert(src, tmp_path / "c.safetensors", "diffusers") == mark
    own = {k: v.contiguous() for k, v in net.state_dict().items()}
    back = load_file(tmp_path / "b.safetensors")                                # by safetensors' own reader, as LDM's files have it
    assert same(back, ldm(net)) and same(load_unet(tmp_path / "b.safetensors")[0], own)
    for name in ("folder", "c.safetensors", "b.safetensors"):
        again, meta = load_unet(tmp_path / name)
        assert same(again, own) and again.cfg == net.cfg and meta["fingerprint"] == mark and meta["images"] == 3 and "probe" in meta
    shutil.rmtree(tmp_path / "stripped", ignore_errors=True)
    shutil.copytree(tmp_path / "folder", tmp_path / "stripped")                 # as diffusers itself would have written it
    weights = tmp_path / "stripped/diffusion_pytorch_model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt"})
    again, meta = load_unet(tmp_path / "stripped", attention_order=net.cfg.attention_order)
    assert same(again, own) and meta["layout"] == "diffusers"


@pytest.mark.parametrize("family", TINY)
def test_diffusers_loads_what_was_exported_and_computes_the_same(family, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    net = randomize(UNet(TINY[family]))
    convert_net(net, tmp_path / "d", "diffusers")
    kind = diffusers.UNet2DConditionModel if net.cfg.context_dim else diffusers.UNet2DModel
    oracle, report = kind.from_pretrained(tmp_path / "d", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    convert_net(net, tmp_path / "one.safetensors", "diffusers")
    single = kind.from_single_file(str(tmp_path / "one.safetensors"), config=str(tmp_path / "d")) if net.cfg.context_dim else oracle
    x, t, y, context = inputs(net.cfg)
    for theirs in (oracle, single):
        extra = {}
        if net.cfg.vector_dim:
            sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64], [128, 64, 8, 0, 64, 32]])
            pooled = torch.randn(2, 16, generator=torch.Generator().manual_seed(2))
            y = torch.cat([pooled, theirs.add_time_proj(sizes.flatten()).reshape(2, -1)], 1)
            extra["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
        with torch.no_grad():
            wanted = theirs(x, t, context, **extra).sample if net.cfg.context_dim else theirs(x, t, y).sample
            assert (net(x, t, y, context) - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_the_dtype_changes_only_when_asked_and_what_does_not_fit_is_refused(net, tmp_path):
    with torch.no_grad():
        net.out[2].bias[0] = 70000.0
    mark = save_unet(tmp_path / "a", net, {})
    assert convert(tmp_path / "a", tmp_path / "b.safetensors", "native", "bf16") != mark
    assert {v.dtype for v in load_file(tmp_path / "b.safetensors").values()} == {torch.bfloat16}
    assert same(load_unet(tmp_path / "b.safetensors")[0], net.to(torch.bfloat16)) and load_unet(tmp_path / "b.safetensors")[1]["cast_from"] == mark
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "diffusers", "fp32")
    assert {v.dtype for v in load_file(tmp_path / "c.safetensors").values()} == {torch.float32}
    with pytest.raises(UserError, match=r"out.2.bias does not fit fp16: its values go from .* to 7e\+04, fp16 ends at 6.55e\+04"):
        convert(tmp_path / "a", tmp_path / "d.safetensors", "native", "fp16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b.safetensors", "c.safetensors"]


def test_nothing_is_overwritten_and_a_bad_disk_is_noticed(net, tmp_path, monkeypatch):
    src = tmp_path / "a.safetensors"
    save_unet(src, net, {})
    before = src.read_bytes()
    (tmp_path / "other").mkdir()
    for dst, message in ((src, "exists and is the source"), (tmp_path / "other", "exists.  Give another name, or remove it first"),
                         (tmp_path / "x.ckpt", "wanted a name that ends in .safetensors")):
        with pytest.raises(UserError, match=message):
            convert(src, dst, "native")
    with pytest.raises(UserError, match="layout 'comfy' is not one of native, diffusers"):
        convert(src, tmp_path / "b.safetensors", "comfy")
    stream = ckpt.stream_tensors

    def flip(path, *args):
        stream(path, *args)
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    monkeypatch.setattr(ckpt, "stream_tensors", flip)
    for layout, dst in (("native", "b.safetensors"), ("diffusers", "b")):
        with pytest.raises(UserError, match="was read back with other weights"):
            convert(src, tmp_path / dst, layout)
    assert src.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "other"]
    spoil(src, "one bit flipped")
    with pytest.raises(UserError, match="do not match their own fingerprint"):
        convert(src, tmp_path / "b.safetensors", "native")


def test_stable_diffusion_exports_carry_modelspec(tmp_path):
    net = UNet(replace(SD, context_dim=768))
    save_unet(tmp_path / "a", net, {"objective": {"name": "v", "target": "v", "table": "scaled_linear"}})
    convert(tmp_path / "a", tmp_path / "toy.safetensors", "native")
    with safe_open(tmp_path / "toy.safetensors", "pt") as file:
        meta = file.metadata()
    assert meta["modelspec.architecture"] == "stable-diffusion-v1" and meta["modelspec.prediction_type"] == "v" and meta["modelspec.title"] == "toy"
    assert meta["modelspec.sai_model_spec"] == "1.0.0" and meta["format"] == "pt" and len(meta["modelspec.date"]) == 10


MEMORY = """
import sys
from pathlib import Path
import torch
import ckpt
def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024
base = status("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")                                   # the peak counts from here
ckpt.convert(sys.argv[1], sys.argv[2], "diffusers")
print(status("VmHWM:") - base)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' /proc/self/clear_refs")
def test_converting_needs_little_more_than_the_largest_tensor(tmp_path):
    cfg = UNetConfig(model_channels=64, channel_mult=(1, 4, 16), attention=(0, 1, 0), num_head_channels=64, use_scale_shift_norm=False)
    header = {k: (torch.float32, s) for k, s in layouts.native_shapes(cfg).items()}
    ckpt.stream_tensors(tmp_path / "big.safetensors", header, text_meta({"unet": asdict(cfg)}),
                        lambda k: torch.full(header[k][1], float(hash(k) % 97)))
    sizes = [4 * torch.Size(s).numel() for _, s in header.values()]
    assert sum(sizes) > 600e6 and len(sizes) > 250
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / "big.safetensors"), str(tmp_path / "out")], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 1.5 * max(sizes) + 16e6, (done.stdout, max(sizes))


# ---- the command line -----------------------------------------------------------------------------------------------

def test_inspect_says_what_it_is_and_what_is_missing(tmp_path, user):
    net = randomize(UNet(TINY["adm"]))
    torch.save(net.state_dict(), tmp_path / "adm.pt")
    code, out, _ = user(ckpt.main, "inspect", tmp_path / "adm.pt")
    lines = dict(line.split(None, 1) for line in out.splitlines())
    assert code == 0 and lines["layout"] == "native" and lines["family"] == "adm" and "torch zip pickle" in lines["file"]
    assert lines["parameters"] == f"{sum(p.numel() for p in net.parameters()):,} in {len(net.state_dict())} tensors"
    assert lines["dtype"] == f"float32 × {len(net.state_dict())}" and lines["fingerprint"] == fingerprint(net.state_dict())
    assert "heads and attention order" in lines["missing"] and "--objective" in lines["missing"] and "vae" not in lines["missing"]
    assert "model_channels=32" in lines["config"] and "num_head" not in lines["config"]
    save_unet(tmp_path / "own", net, {"objective": {"name": "fm", "target": "u", "table": ""}, "vae": {}, "images": 12345})
    code, out, _ = user(ckpt.main, "inspect", tmp_path / "own")
    assert "missing      nothing" in out and "name=fm target=u" in out and "12,345" in out and "num_head_channels=16" in out
    spoil(tmp_path / "own", "one bit flipped")
    assert user(ckpt.main, "inspect", tmp_path / "own")[0] == 2


def test_convert_and_verify_from_the_command_line(net, tmp_path, user):
    mark = save_unet(tmp_path / "a.safetensors", net, {})
    code, out, _ = user(ckpt.main, "convert", tmp_path / "a.safetensors", "--layout", "diffusers", tmp_path / "new/d")
    assert code == 0 and mark in out and sorted(os.listdir(tmp_path / "new/d")) == ["config.json", "diffusion_pytorch_model.safetensors"]
    code, out, _ = user(ckpt.main, "verify", tmp_path / "a.safetensors", tmp_path / "new/d")
    assert code == 0 and "the same weights, bit for bit" in out
    torch.save(net.state_dict(), tmp_path / "bare.pt")
    assert user(ckpt.main, "verify", tmp_path / "a.safetensors", tmp_path / "bare.pt")[0] == 0   # heads are taken from the first
    with torch.no_grad():
        part, before = net.middle_block[0].in_layers[2].weight, sum(p.square().sum() for p in net.middle_block.parameters())
        scale = float(0.5 * part.norm() / before.sqrt())
        part *= 1.5
    save_unet(tmp_path / "b", net, {})
    code, out, _ = user(ckpt.main, "verify", tmp_path / "a.safetensors", tmp_path / "b")
    assert code == 1 and "1 of 16 blocks differ" in out and float(out.split()[-1]) == pytest.approx(scale, rel=1e-3) and "middle_block" in out
    assert user(ckpt.main, "convert", tmp_path / "b", tmp_path / "h.safetensors", "--layout", "native", "--dtype", "fp16")[0] == 0
    code, out, _ = user(ckpt.main, "verify", tmp_path / "b", tmp_path / "h.safetensors")
    assert code == 1 and "another dtype: float32 / float16" in out and "16 of 16 blocks" in out
    save_unet(tmp_path / "c", UNet(replace(CFG, num_classes=4)), {})
    code, out, _ = user(ckpt.main, "verify", tmp_path / "b", tmp_path / "c")
    assert code == 1 and "another architecture: num_classes 3 / 4" in out


@pytest.mark.parametrize("args, message", [
    (["insepct", "x"], "'insepct' is not one of inspect, convert, verify.  Closest: inspect"), ([], "is not one of"),
    (["inspect"], "inspect takes FILE, got 0"), (["convert", "a"], "takes SRC DST"), (["convert", "a", "b"], "needs --layout"),
    (["verify", "a", "b", "--dtype", "fp16"], "are convert's, not verify's"), (["inspect", "none"], "no checkpoint at none"),
    (["convert", "a", "b", "--layout", "diffuser"], "Closest: diffusers"), (["inspect", "x", "--num-head", "4"], "Closest: --num-heads|num-heads"),
])
def test_bad_commands(user, args, message):
    code, _, err = user(ckpt.main, *args)
    assert code == 2 and len(err) == 1 and message.split("|")[-1] in err[0]


def test_help_fits_a_screen_and_a_dry_run_does_nothing(user, tmp_path):
    code, out, _ = user(ckpt.main, "--help")
    assert code == 0 and len(out.splitlines()) <= 30 and max(map(len, out.splitlines())) <= 160 and "python ckpt.py verify A B" in out
    code, out, _ = user(ckpt.main, "convert", tmp_path / "a", tmp_path / "b", "--layout", "native", "--dry-run")
    assert code == 0 and json.loads(out)["layout"] == "native" and not list(tmp_path.iterdir())


# ---- foreign files in the other scripts -----------------------------------------------------------------------------

def test_the_sampler_draws_from_a_foreign_file_what_it_draws_from_our_own(tmp_path, user):
    net = randomize(UNet(TINY["adm"]))
    torch.save(net.state_dict(), tmp_path / "adm.pt")
    save_unet(tmp_path / "own", net, {"objective": asdict(make_objective("v", table="scaled_linear")), "vae": pixel().meta(), "resolution": 16,
                                      "run": "r", "images": 8, "classes": ["a", "b", "c", "d", "e"]})
    convert(tmp_path / "own", tmp_path / "folder", "diffusers")
    says = ["--objective", "v", "--table", "scaled_linear", "--resolution", 16, "--num-head-channels", 16, "--attention-order", "legacy"]
    grids = []
    for name, flags in (("own", []), ("adm.pt", says), ("folder", [])):
        code, _, err = user(samplers.main, "--ckpt", tmp_path / name, "--n", 2, "--steps", 2, "--labels", "3,1" if flags else "d,b",
                            "--out", tmp_path / f"s{len(grids)}", *flags)
        assert code == 0, err
        grids.append((tmp_path / f"s{len(grids)}/grid.png").read_bytes())
    assert grids[0] == grids[1] == grids[2] and len(set(Image.open(tmp_path / "s0/grid.png").tobytes())) > 20
    for drop, message in (("--objective", "does not say what its network was trained to output.  Add --objective"),
                          ("--resolution", "does not say its own"),
                          ("--num-head-channels", "number of attention heads"), ("--attention-order", "order of the qkv rows")):
        i = says.index(drop)
        code, _, err = user(samplers.main, "--ckpt", tmp_path / "adm.pt", *says[:i], *says[i + 2:])
        assert code == 2 and len(err) == 1 and message in err[0], err
    for flags, message in ((["--objective", "fm"], "says its objective is v, got fm"), (["--table", "linear"], "was trained with scaled_linear"),
                           (["--vae", "pixel"], "carries its own autoencoder"), (["--num-heads", 1], "got num_heads 1"),
                           (["--resolution", 17], "wanted a multiple of 2")):
        code, _, err = user(samplers.main, "--ckpt", tmp_path / "own", *flags)
        assert code == 2 and len(err) == 1 and message in err[0], err


def test_the_sampler_says_what_a_network_still_needs(tmp_path, user):
    torch.save(UNet(SD).state_dict(), tmp_path / "sd.ckpt")
    torch.save(UNet(CFG).state_dict(), tmp_path / "latent.pt")
    for name, flags, message in (("sd.ckpt", ["--num-heads", 2], "told what to draw by text"),
                                 ("latent.pt", [], "latents of 4 channels and names no autoencoder"),
                                 ("latent.pt", ["--vae", "pixel:2"], "makes 12 channels, but"), ("latent.pt", ["--table", "linear"], "fm has none")):
        heads = [] if name == "sd.ckpt" else ["--num-heads", 1]
        code, _, err = user(samplers.main, "--ckpt", tmp_path / name, "--objective", "fm", *heads, *flags)
        assert code == 2 and len(err) == 1 and message in err[0], err


def test_training_starts_from_a_foreign_file_and_never_saves_it_as_its_own(tmp_path, user):
    net = randomize(UNet(replace(PRESETS["nano"], in_channels=192, out_channels=192)))
    torch.save({"module." + k: v for k, v in net.state_dict().items()}, tmp_path / "foreign.pt")
    flags = ["--data", "toyfaces:24", "--resolution", 32, "--model", "nano", "--images", 8, "--batch", 4, "--ema", "0.1",
             "--init", tmp_path / "foreign.pt",
             "--preview-every", 0, "--eval-every", 0, "--out", tmp_path]
    code, _, err = user(train.main, *flags, "--name", "a")
    assert code == 2 and "does not say which latents its network knows.  Name the autoencoder with --vae" in err[-1]
    code, _, err = user(train.main, *flags, "--name", "b", "--vae", "pixel:8")
    assert code == 0, err
    meta = load_unet(tmp_path / "b")[1]
    assert meta["base_fingerprint"] == meta["init"]["fingerprint"] == fingerprint(net.state_dict()) != meta["fingerprint"]
    code, _, err = user(train.main, *flags, "--name", "c", "--vae", "pixel:8", "--lr", 0)
    assert code == 2 and "after 8 images the weights are bit for bit those training started from" in err[-1] and not checkpoints(tmp_path / "c")
    code, _, err = user(train.main, *flags, "--name", "d", "--vae", "pixel:8", "--model", "tiny")
    assert code == 2 and "foreign.pt: infer_config: level 1: 32 channels do not split into heads of 64" in err[-1] and not (tmp_path / "d").exists()
    assert "is told what to draw by text" in user(train.main, *flags, "--model", "sd15")[2][-1]
    head = PRESETS["nano"]
    with pytest.raises(UserError, match="got num_heads 4"):                     # heads are compared although no tensor shows them
        load_unet(tmp_path / "b", num_heads=4, num_head_channels=0, attention_order=head.attention_order)
