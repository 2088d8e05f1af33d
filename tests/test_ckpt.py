"""U-Nets on disk: whole, strict, self-describing, atomic; any layout in, any layout out, bit for bit."""

import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckpt.unets as ckpt
import ckpt.examine as examine
import harness.files as files
import ckpt.layouts as layouts
import harness.run as run
import drawing
import train
from harness.run import checkpoints
from ckpt.unets import convert, find_checkpoint, fingerprint, load_unet, read_tensors, save_unet
from harness.cli import UserError
from conftest import ROOT, randomize
from ckpt.examine import inspect, verify
from harness.files import META, text_meta, write_tensors
from model import PRESETS, UNet, UNetConfig
from objectives import make_objective
from ckpt.probe import probe
from ckpt.unets import save_checkpoint
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
    ("truncated", "truncated or not a safetensors"), ("truncated in the header", "truncated or not"), ("empty", "is empty"),
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
    value, state = probe(net.cfg, net.state_dict()), torch.get_rng_state()
    assert len(value) == 8 and value == probe(net.cfg, {k: v.double() for k, v in net.state_dict().items()})
    others = [replace(net.cfg, num_heads=8, num_head_channels=0), replace(net.cfg, num_heads=1, num_head_channels=0)]
    others += [replace(net.cfg, attention_order="new" if net.cfg.attention_order == "legacy" else "legacy")] if not net.cfg.context_dim else []
    for other in others:
        assert max(abs(a - b) for a, b in zip(value, probe(other, net.state_dict()))) > 5e-3 * max(map(abs, value))
    assert torch.equal(state, torch.get_rng_state())
    monkeypatch.setenv("KERNELS", "triton")                                     # on the side: neither interpreted nor said
    assert probe(net.cfg, net.state_dict()) == value and capfd.readouterr().err == ""
    save_unet(tmp_path / "m", net.bfloat16(), {})
    again, meta = load_unet(tmp_path / "m")
    assert same(again, net) and len(meta["probe"]) == 8
    assert next(load_unet(tmp_path / "m", dtype=torch.float32)[0].parameters()).dtype == torch.float32


def test_what_is_saved_is_read_back_before_anything_is_replaced(net, tmp_path, monkeypatch):
    save_three(tmp_path, net, keep=1, images=(8,))
    before, raw_bytes = (checkpoints(tmp_path)[0] / "model.safetensors").read_bytes(), files.raw_bytes
    ema = {k: v.double() for k, v in net.state_dict().items()}

    def flip(dtype):                                                            # a disk that loses a bit of tensors of that type
        def write(tensor):
            data = raw_bytes(tensor).copy()
            data[:1] ^= tensor.dtype == dtype
            return data
        return write
    for dtype in (torch.float32, torch.float64):                                # of all, or of the EMA alone
        with monkeypatch.context() as m:
            m.setattr(files, "raw_bytes", flip(dtype))
            with pytest.raises(UserError, match="was read back with other weights"):
                save_checkpoint(tmp_path, 16, net, {}, {"0.050": ema}, {}, {}, 1, 0)
            with pytest.raises(UserError, match="was read back with other weights"):
                save_unet(checkpoints(tmp_path)[0] / "model.safetensors", net, {}, ema if dtype == torch.float64 else None)
    assert [p.name for p in checkpoints(tmp_path)] == ["000000000008"]
    assert (checkpoints(tmp_path)[0] / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_broke_in_training_still_loads(value, tmp_path):
    net = randomize(UNet(TINY["adm"]))
    with torch.no_grad():
        net.out[2].bias[:2] = value
    save_unet(tmp_path / "m", net, {})
    assert fingerprint(load_unet(tmp_path / "m")[0].state_dict()) == fingerprint(net.state_dict())
    convert(tmp_path / "m", tmp_path / "b.safetensors", "native", "bf16")
    assert len(load_unet(tmp_path / "b.safetensors")[1]["probe"]) == 8


ADM = TINY["adm"]


@pytest.mark.parametrize("meta", [
    {"unet": None}, {"unet": [1]}, {"unet": {"channel_mult": "ab"}}, {"unet": {"num_res_blocks": -5}}, {"unet": {"num_res_blocks": 10 ** 5}},
    {"unet": {"num_heads": "x"}}, {"unet": {"channel_mult": [[1], [1]]}}, {"unet": {"attention_order": "sideways"}}, {"unet": {"new": 1}},
    {"layout": "zzz"}, {"layout": ["native"]}, {"layout": None}, {"objective": 3}, {"objective": {"a": 1}}, {"objective": "banana"}, {"objective": ["eps"]},
    {"objective": {"name": "x", "target": "y"}}, {"probe": "x"}, {"probe": [1.0]}, {"probe": []}, {"probe": None}, {"probe": ["a"]}, {"probe": [10 ** 400]},
    {"fingerprint": None}, {"fingerprint": 3}, {"images": "x"}, {"vae": 3}, {"source": 3}, {"ema": [1]}, {"resolution": "x"}, {"classes": 3},
], ids=str)
def test_metadata_of_odd_types_is_one_line(meta, tmp_path):
    tensors, unet = dict(randomize(UNet(ADM)).state_dict()), asdict(ADM)
    meta = {**meta, "unet": {**unet, **meta["unet"]} if isinstance(meta.get("unet"), dict) else meta.get("unet", unet)}
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "m", metadata={META: json.dumps(meta)})
    with pytest.raises(UserError):
        load_unet(tmp_path / "m")
    with pytest.raises(UserError):
        convert(tmp_path / "m", tmp_path / "d", "diffusers")


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
    with pytest.raises(UserError, match="number of attention heads"):
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
    assert "also in it   " in shown and all(f"{n} tensors" in shown for n in (f"{len(ldm(ema))} ema", "3 schedule", "2 vae", "1 text"))
    for drop, message in ((lambda k: "model_ema" in k, "holds no EMA of a U-Net"), (lambda k: "diffusion_model" in k, "holds no U-Net, but .*vae")):
        save_file({k: v for k, v in tensors.items() if not drop(k)}, tmp_path / "part")
        with pytest.raises(UserError, match=message):
            load_unet(tmp_path / "part", num_heads=2, ema="ema" in message.lower())


def test_raw_weights_and_emas_of_foreign_pickles_are_not_mixed_up(tmp_path):
    raw, ema = (randomize(UNet(ADM), seed).state_dict() for seed in (0, 1))
    told = heads(ADM)
    for n, box in enumerate(({"model": {**raw, "step": 3}, "model_ema": ema}, {"state_dict": raw, "state_dict_ema": ema, "opt": {0: [torch.ones(1)]}},
                             {"net": raw, "ema": {f"module.{k}": v for k, v in ema.items()}, "epoch": 1})):
        path = tmp_path / f"{n}.pt"
        torch.save(box, path)
        for choice, wanted in ((None, raw), (False, raw), (True, ema)):
            net, meta = load_unet(path, ema=choice, **told)
            assert same(net, wanted) and meta["ema"] == ("the file's" if choice else None)
        also = "\n".join(inspect(path, **told))
        assert f"{len(ema)} {list(box)[1]} tensors" in also and ("1 opt tensors" in also) == (n == 1)
        assert f"{len(raw)} raw tensors" in "\n".join(inspect(path, ema=True, **told))
    for box in ({f"ema.{k}": v for k, v in ema.items()}, {"model_ema": ema}):
        torch.save(box, path)
        assert load_unet(path, **told)[1]["ema"] == load_unet(path, ema=True, **told)[1]["ema"] == "the file's"
        with pytest.raises(UserError, match="holds an EMA .*, wanted the raw weights"):
            load_unet(path, ema=False, **told)
    torch.save({"net": raw, "ema_1": ema, "ema_2": ema}, path)
    with pytest.raises(UserError, match="holds several EMAs: ema_1, ema_2"):
        load_unet(path, ema=True, **told)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint16])
def test_weights_that_are_no_floating_point_numbers_are_refused(dtype, tmp_path):
    torch.save({k: v.abs().to(dtype) if k == "out.2.bias" else v for k, v in randomize(UNet(ADM)).state_dict().items()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="1 weights are not floating-point numbers: out.2.bias"):
        convert(tmp_path / "x.pt", tmp_path / "y.safetensors", "native", **heads(ADM))


BASE = layouts.diffusers_config(ADM)


@pytest.mark.parametrize("config", [
    [], "x", None, 3, {"block_out_channels": "ab"}, {"block_out_channels": None}, {"block_out_channels": []}, {"down_block_types": [1, 2]},
    {"down_block_types": None}, {"attention_head_dim": "8"}, {"attention_head_dim": 0}, {"block_out_channels": [0, 0]}, {"layers_per_block": 10 ** 6},
    {"in_channels": None}, {"_class_name": ["x"]}, {"act_fn": ["silu"]}, {"up_block_types": []}, {"dropout": "x"}, {"attention_head_dim": [None, 16]},
], ids=str)
def test_a_config_of_diffusers_with_odd_types_is_one_line(config, tmp_path):
    convert_net(randomize(UNet(ADM)), tmp_path / "d", "diffusers")
    (tmp_path / "d/config.json").write_text(json.dumps({**BASE, **config} if isinstance(config, dict) else config))
    for strip in (False, True):                                                 # ours, and as diffusers would have written it
        if strip:
            weights = tmp_path / "d/diffusion_pytorch_model.safetensors"
            save_file(load_file(weights), weights, metadata={"format": "pt"})
        with pytest.raises(UserError, match="config.json"):
            load_unet(tmp_path / "d")


def test_an_edited_config_beside_our_weights_is_an_error(tmp_path):
    convert_net(randomize(UNet(ADM)), tmp_path / "d", "diffusers")
    file = tmp_path / "d/config.json"
    for change, message in (({"attention_head_dim": 32}, r"channels a head \[16\] / \[32\]"), ({"num_class_embeds": 9}, "num_classes 5 / 9"),
                            ({"norm_eps": 1e-6}, "norm_eps")):
        file.write_text(json.dumps({**BASE, **change}))
        with pytest.raises(UserError, match=message) as info:
            load_unet(tmp_path / "d")
        assert str(file) in str(info.value)
    file.write_text(json.dumps({**BASE, "sample_size": 32}))                    # this changes nothing
    load_unet(tmp_path / "d")


def test_a_folder_names_what_it_has_and_a_shard_its_index(tmp_path):
    torch.save({}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="It has a.ckpt; name one"):
        find_checkpoint(tmp_path)
    for name in ("m-00001-of-00002.safetensors", "m-00001-of-00002.fp16.safetensors", "m-00001-of-00001.safetensors"):
        save_file({"x": torch.ones(1)}, tmp_path / name)
    with pytest.raises(UserError, match="is one of 2 shards.  Name their index: .*/m.safetensors.index.json"):
        find_checkpoint(tmp_path / "m-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="index: .*/m.safetensors.index.fp16.json"):
        find_checkpoint(tmp_path / "m-00001-of-00002.fp16.safetensors")
    find_checkpoint(tmp_path / "m-00001-of-00001.safetensors")


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


def test_converting_touches_no_other_file(net, tmp_path):
    src = tmp_path / "a.safetensors.part"
    save_unet(src, net, {})
    (tmp_path / "b.safetensors.part").write_text("the user's")
    (tmp_path / "d.part").mkdir()
    (tmp_path / "d.part/keep").touch()
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    before = src.read_bytes()
    for name, layout in (("a.safetensors", "native"), ("b.safetensors", "native"), ("d", "diffusers")):
        convert(src, tmp_path / name, layout)
    with pytest.raises(UserError, match="gone.safetensors exists"):
        convert(src, tmp_path / "gone.safetensors", "native")
    assert src.read_bytes() == before and (tmp_path / "b.safetensors.part").read_text() == "the user's" and (tmp_path / "d.part/keep").exists()
    assert len(os.listdir(tmp_path)) == 7 and not list(tmp_path.glob(".*"))


def test_converting_checks_the_probe_and_leaves_one(tmp_path, monkeypatch):
    net = randomize(UNet(ADM))
    save_unet(tmp_path / "a", net, {})
    meta = files.read_meta(files.open_weights(tmp_path / "a"))
    meta["unet"]["num_head_channels"] = 32
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "wrong", metadata=text_meta(meta))
    with pytest.raises(UserError, match="its config .heads.* is not that of these weights"):
        convert(tmp_path / "wrong", tmp_path / "w.safetensors", "native")
    torch.save(net.state_dict(), tmp_path / "f.pt")
    for src, dst, dtype, known in (("f.pt", "1.safetensors", None, heads(ADM)), ("a", "2.safetensors", "bf16", {})):
        convert(tmp_path / src, tmp_path / dst, "native", dtype, **known)
        again, meta = load_unet(tmp_path / dst)
        assert meta["probe"] == pytest.approx(probe(ADM, again.state_dict()), rel=1e-5)
    for module in (ckpt, examine):
        monkeypatch.setattr(module, "PROBE_LIMIT", 10)
    convert(tmp_path / "f.pt", tmp_path / "3.safetensors", "native", **heads(ADM))
    assert "probe" not in load_unet(tmp_path / "3.safetensors")[1]
    assert "probe        none: above" in "\n".join(inspect(tmp_path / "3.safetensors"))


def test_the_written_config_is_read_back(tmp_path, monkeypatch):
    write = files.write_text
    monkeypatch.setattr(ckpt, "write_text", lambda path, text: write(path, text.replace('"num_class_embeds": 5', '"num_class_embeds": 6')))
    with pytest.raises(UserError, match="config.json is not the config of the weights beside it: num_classes 5 / 6"):
        convert_net(randomize(UNet(ADM)), tmp_path / "d", "diffusers")
    assert not (tmp_path / "d").exists()


def test_a_noise_schedule_is_stored_with_the_objective(tmp_path, user):
    torch.save(randomize(UNet(ADM)).state_dict(), tmp_path / "adm.pt")
    says = ["--layout", "native", "--num-head-channels", 16, "--attention-order", "legacy"]
    code, _, err = user(ckpt.main, "convert", tmp_path / "adm.pt", tmp_path / "a.safetensors", "--objective", "eps", "--table", "cosine", *says)
    assert code == 0, err
    assert load_unet(tmp_path / "a.safetensors")[1]["objective"] == asdict(make_objective("ddpm", table="cosine"))
    for src, flags, message in (("adm.pt", [*says, "--table", "linear"], "does not say its objective.  Add --objective"),
                                ("adm.pt", [*says, "--table", "linear", "--objective", "fm"], "is fm, which has none"),
                                ("a.safetensors", ["--layout", "native", "--table", "linear"], "says its table is 'cosine', got 'linear'")):
        code, _, err = user(ckpt.main, "convert", tmp_path / src, tmp_path / "b.safetensors", *flags)
        assert code == 2 and message in err[0], err


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
import ckpt.unets as ckpt
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
    save_unet(tmp_path / "own", net, {"objective": {"name": "fm", "target": "u", "table": ""}, "vae": {}, "images": 12345, "resolution": 16})
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


@pytest.mark.parametrize("flags, asked, config", [
    ([], ["heads and attention order (--num-heads or --num-head-channels, --attention-order)", "noise schedule (--table)", "objective"], []),
    (["--num-head-channels", 16], ["attention order (--attention-order)"], ["num_head_channels=16"]),
    (["--attention-order", "new"], ["heads (--num-heads or --num-head-channels)"], ["attention_order=new"]),
    (["--num-heads", 2, "--attention-order", "new", "--objective", "eps"], ["noise schedule (--table);", "--resolution"], ["num_heads=2"]),
    (["--num-heads", 2, "--attention-order", "new", "--objective", "v", "--table", "linear"], ["missing      size of the images"], ["use_scale_shift_norm=True"]),
])
def test_inspect_honours_partial_answers(tmp_path, user, flags, asked, config):
    torch.save(UNet(ADM).state_dict(), tmp_path / "adm.pt")
    code, out, err = user(ckpt.main, "inspect", tmp_path / "adm.pt", *flags)
    assert code == 0 and all(words in out for words in asked + config), out + str(err)
    assert ("attention order" in out) == ("--attention-order" not in flags) and ("heads (" in out or "heads and" in out) == ("--num-head" not in str(flags))


def test_inspect_asks_transformers_for_no_order(tmp_path, user):
    torch.save(UNet(SD).state_dict(), tmp_path / "sd.pt")
    code, out, _ = user(ckpt.main, "inspect", tmp_path / "sd.pt")
    assert code == 0 and "heads (--num-heads" in out and "order" not in out and "text encoders" in out


def test_verify_does_not_depend_on_the_order_of_its_arguments(tmp_path):
    def check(a, b, wanted):
        for pair in ((a, b), (b, a)):
            same, lines = verify(*(tmp_path / name for name in pair))
            assert same == wanted, lines
    net = randomize(UNet(ADM))
    save_unet(tmp_path / "own", net, {})
    torch.save(net.state_dict(), tmp_path / "bare.pt")
    convert(tmp_path / "own", tmp_path / "d", "diffusers")
    weights = tmp_path / "d/diffusion_pytorch_model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt"})
    check("own", "bare.pt", True)
    check("own", "d", True)
    with pytest.raises(UserError, match="order of the qkv rows"):               # neither says it
        verify(tmp_path / "d", tmp_path / "bare.pt")
    other = UNet(replace(ADM, attention_order="new"))
    other.load_state_dict({k: layouts.reorder_attention(v, v.shape[0] // 48, "new") if ".qkv." in k else v for k, v in net.state_dict().items()})
    save_unet(tmp_path / "new", other, {})
    check("own", "new", True)
    other.load_state_dict(net.state_dict())                                     # the same bits, another function
    save_unet(tmp_path / "else", other, {})
    check("own", "else", False)
    for n, order in enumerate(("legacy", "new")):
        one = UNet(replace(ADM, num_head_channels=0, num_heads=1, attention_order=order))
        one.load_state_dict(net.state_dict())
        save_unet(tmp_path / f"one{n}", one, {})
    check("one0", "one1", True)                                                 # one head has no order
    check("own", "one0", False)
    sd = randomize(UNet(SD))
    save_unet(tmp_path / "sd", sd, {})
    torch.save(ldm(sd), tmp_path / "sd.ckpt")
    check("sd", "sd.ckpt", True)


def test_only_verify_says_no_with_exit_code_1(tmp_path, user, monkeypatch, capsys):
    def main_of(error):
        def fail(*_):
            raise error
        monkeypatch.setattr(ckpt, "open_weights", fail)                         # which examine.py builds on
        monkeypatch.setattr(sys, "argv", ["ckpt.py", "verify", str(tmp_path / "a"), str(tmp_path / "a")])
        (tmp_path / "a").touch()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "ckpt.py"), run_name="__main__")
        return stop.value.code
    assert main_of(RuntimeError("a bug")) == 3 and main_of(PermissionError(13, "Permission denied", "a")) == 2 == main_of(MemoryError())
    assert "RuntimeError: a bug" in capsys.readouterr().err
    code, _, err = user(ckpt.main, "inspect", "x" * 5000)
    assert code == 2 and len(err) == 1 and "File name too long" in err[0]


def test_names_after_two_dashes_may_begin_with_one(tmp_path, user, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_unet("-m", randomize(UNet(ADM)), {})
    code, out, err = user(ckpt.main, "verify", "--", "-m", "-m")
    assert code == 0 and "bit for bit" in out, err


@pytest.mark.parametrize("args, message", [
    (["inspect", "x", "--num-heads", 4, "--num-heads=8"], "--num-heads is given twice"),
    (["convert", "a", "b", "--layout", "x"], "--layout 'x' is not one of native, diffusers."), (["inspect", "x", "--layout", "native"], "are convert's"),
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
        code, _, err = user(drawing.main, "--ckpt", tmp_path / name, "--n", 2, "--steps", 2, "--labels", "3,1" if flags else "d,b",
                            "--out", tmp_path / f"s{len(grids)}", *flags)
        assert code == 0, err
        grids.append((tmp_path / f"s{len(grids)}/grid.png").read_bytes())
    assert grids[0] == grids[1] == grids[2] and len(set(Image.open(tmp_path / "s0/grid.png").tobytes())) > 20
    for drop, message in (("--objective", "does not say what its network was trained to output.  Add --objective"),
                          ("--resolution", "does not say its own"),
                          ("--num-head-channels", "number of attention heads"), ("--attention-order", "order of the qkv rows")):
        i = says.index(drop)
        code, _, err = user(drawing.main, "--ckpt", tmp_path / "adm.pt", *says[:i], *says[i + 2:])
        assert code == 2 and len(err) == 1 and message in err[0], err
    for flags, message in ((["--objective", "fm"], "says its objective is v, got fm"), (["--table", "linear"], "was trained with scaled_linear"),
                           (["--vae", "pixel"], "was trained on other latents"), (["--num-heads", 1], "got num_heads 1"),
                           (["--resolution", 17], "wanted a multiple of 2")):
        code, _, err = user(drawing.main, "--ckpt", tmp_path / "own", *flags)
        assert code == 2 and len(err) == 1 and message in err[0], err


def test_the_sampler_says_what_a_network_still_needs(tmp_path, user):
    torch.save(UNet(SD).state_dict(), tmp_path / "sd.ckpt")
    torch.save(UNet(CFG).state_dict(), tmp_path / "latent.pt")
    for name, flags, message in (("sd.ckpt", ["--num-heads", 2], "told what to draw by text"),
                                 ("latent.pt", [], "does not say which latents its network knows"),
                                 ("latent.pt", ["--vae", "pixel:2"], "makes 12 channels, but"), ("latent.pt", ["--table", "linear"], "fm has none")):
        heads = [] if name == "sd.ckpt" else ["--num-heads", 1]
        code, _, err = user(drawing.main, "--ckpt", tmp_path / name, "--objective", "fm", *heads, *flags)
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
    assert code == 2 and "--model tiny is model_channels 128.  Choose the preset it was made with (--model nano)" in err[-1] and not (tmp_path / "d").exists()
    assert "is told what to draw by text" in user(train.main, *flags, "--model", "sd15")[2][-1]
    head = PRESETS["nano"]
    with pytest.raises(UserError, match="got num_heads 4"):                     # heads are compared although no tensor shows them
        load_unet(tmp_path / "b", num_heads=4, num_head_channels=0, attention_order=head.attention_order)
