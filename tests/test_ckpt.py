"""Files on disk: whole, strict, self-describing, atomic."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckpt
from ckpt import checkpoints, find_checkpoint, fingerprint, load_unet, read_tensors, save_checkpoint, save_unet
from config import UserError
from conftest import randomize
from model import UNet, UNetConfig

CFG = UNetConfig(in_channels=4, out_channels=4, model_channels=32, channel_mult=(1, 2), attention=(0, 1), num_classes=3)


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
    ("pickle", "is a Python pickle"), ("torch.save", "is a Python pickle"), ("foreign", "not written by twinpath"),
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
    ckpt.write_tensors(tmp_path / "v.safetensors", {"x": torch.zeros(1)}, {"kind": "vae"})
    with pytest.raises(UserError, match="holds no U-Net.*vae"):
        load_unet(tmp_path / "v.safetensors")
    with pytest.raises(UserError, match="no checkpoint at"):
        load_unet(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="no checkpoint in"):
        find_checkpoint(tmp_path)


def save_three(run, net, keep, keep_every=0, images=(100, 200, 300, 400)):
    for n in images:
        save_checkpoint(run, n, net, {"run": "r"}, {"0.050": net.state_dict()}, {"meter": torch.zeros(2)}, {}, keep, keep_every)


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
    for name in ("write_tensors", "fsync"):
        with monkeypatch.context() as m:
            m.setattr(ckpt, name, killed)
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
