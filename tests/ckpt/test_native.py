"""Our own checkpoints: whole, strict, self-describing, atomic."""

import functools
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckpt.native as native
import harness.files as files
import samplers
from checkpoints import ADM, CFG, TINY, same, save_three, spoil
from ckpt import (
    convert,
    find_checkpoint,
    fingerprint,
    load_like,
    load_unet,
    open_unet,
    read_tensors,
    save_checkpoint,
    save_unet,
)
from ckpt.configs import config_from, differences
from ckpt.containers import open_weights
from ckpt.convert import inspect, verify
from ckpt.native import probe
from conftest import ROOT, randomize
from harness.cli import UserError
from harness.files import META, text_meta, write_tensors
from harness.run import checkpoints
from metrics import cards
from model import NETWORKS, PRESETS, UNet, UNetConfig, num_params


@pytest.fixture
def net():
    return randomize(UNet(CFG))


def test_round_trip_is_bitwise_and_needs_nothing_but_the_file(net, tmp_path):
    mark = save_unet(tmp_path / "m.safetensors", net, {"images": 7})
    again, meta = load_unet(tmp_path / "m.safetensors")
    assert (
        again.cfg == CFG
        and meta["images"] == 7
        and meta["fingerprint"] == mark == fingerprint(net.state_dict())
    )
    assert all(
        torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values())
    )
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([0, -1])
    assert torch.equal(net(x, t, y), again(x, t, y))
    assert again.input_blocks[0][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_any_safetensors_reader_sees_plain_native_names(net, tmp_path):
    wrapped = torch.compile(torch.nn.parallel.DataParallel(net))  # .module inside _orig_mod
    save_unet(tmp_path / "m.safetensors", wrapped, {})
    assert load_file(tmp_path / "m.safetensors").keys() == net.state_dict().keys()
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert (
            file.metadata()["format"] == "pt"
            and json.loads(file.metadata()["twinpath"])["unet"]["model_channels"] == 32
        )
    with pytest.raises(AssertionError, match="not this network"):
        save_unet(
            tmp_path / "x.safetensors",
            net,
            {},
            {f"module.{k}": v for k, v in net.state_dict().items()},
        )


def test_files_have_ordinary_permissions(net, tmp_path):
    save_unet(tmp_path / "m.safetensors", net, {})
    (tmp_path / "plain").touch()
    assert (tmp_path / "m.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    "how, message",
    [
        ("truncated", "truncated or not a safetensors"),
        ("truncated in the header", "truncated or not"),
        ("empty", "is empty"),
        ("pickle", "is a Python pickle"),
        ("torch.save", "holds no U-Net, but 1 a tensors"),
        ("foreign", "order of the qkv rows|number of attention heads"),
        ("metadata altered", "metadata does not match its own checksum"),
        ("another number of heads", "the network computes .* its config"),
        ("one bit flipped", "do not match their own fingerprint"),
        ("a tensor missing", "1 missing: out.2.weight"),
        ("a tensor more", "1 unexpected: extra.weight"),
        ("another shape", r"1 of another shape: out.2.weight \(5, 32, 3, 3\) for \(4, 32, 3, 3\)"),
    ],
)
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


def test_the_last_ones_and_every_multiple_are_kept(net, tmp_path):
    save_three(tmp_path, net, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["000000000300", "000000000400"]
    save_three(tmp_path / "b", net, keep=1, keep_every=200)
    assert [p.name for p in checkpoints(tmp_path / "b")] == ["000000000200", "000000000400"]
    assert (
        find_checkpoint(tmp_path).name == "ema-0.050.safetensors"
        and find_checkpoint(tmp_path).parent.name == "000000000400"
    )
    assert load_unet(find_checkpoint(tmp_path))[1]["ema"] == 0.05
    assert load_unet(tmp_path / "ckpt/000000000400/model.safetensors")[1]["ema"] is None


def test_the_first_checkpoint_at_or_after_each_multiple_is_kept_whatever_the_batch(net, tmp_path):
    steps = range(96, 1200, 96)
    save_three(tmp_path, net, keep=1, keep_every=250, images=steps)
    kept = [int(p.name) for p in checkpoints(tmp_path)]
    assert kept == [288, 576, 768, 1056, 1152]
    save_three(tmp_path / "b", net, keep=1, keep_every=40, images=(96, 192, 288))
    assert len(checkpoints(tmp_path / "b")) == 3  # several multiples between two


def test_a_kill_in_mid_save_leaves_the_last_good_one(net, tmp_path, monkeypatch):
    save_three(tmp_path, net, keep=2, images=(100,))

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    def killed_at_the_state(path, *args):
        return killed() if path.name == "state.safetensors" else write_tensors(path, *args)

    for module, name, how in (
        (native, "write_tensors", killed),
        (native, "write_tensors", killed_at_the_state),
        (files, "fsync", killed),
    ):
        with monkeypatch.context() as m:
            m.setattr(module, name, how)
            with pytest.raises(KeyboardInterrupt):
                save_three(tmp_path, net, keep=2, images=(200,))
        assert [p.name for p in checkpoints(tmp_path)] == ["000000000100"]
    with monkeypatch.context() as m:
        m.setattr(shutil, "rmtree", killed)  # … while removing an old one
        with pytest.raises(KeyboardInterrupt):
            save_three(tmp_path, net, keep=1, images=(200,))
    save_three(tmp_path, net, keep=1, images=(300,))
    assert sorted(os.listdir(tmp_path / "ckpt")) == ["000000000300"]
    assert read_tensors(checkpoints(tmp_path)[0] / "state.safetensors")[1]["images"] == 300


def test_a_header_whose_length_begins_like_a_pickle_is_still_safetensors(tmp_path):
    """The first byte of a safetensors file is the low byte of its header's length: one file in 256
    begins with 0x80."""
    for padding in range(0, 256, 8):
        write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(1)}, {"padding": "-" * padding})
        assert read_tensors(tmp_path / "x.safetensors")[1]["padding"] == "-" * padding


# ---- what training leaves -----------------------------------------------------------------------


def test_trained_weights_that_equal_their_base_are_refused(net, tmp_path):
    base = fingerprint(net.state_dict())
    save_unet(tmp_path / "start", net, {"images": 0, "base_fingerprint": base})
    with pytest.raises(
        UserError,
        match="is not written: after 64 images the weights are bit for bit those training started",
    ):
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
    assert (
        load_unet(ema, ema=True)[1]["ema"] == 0.05 and load_unet(raw, ema=False)[1]["ema"] is None
    )
    with pytest.raises(UserError, match="holds the raw weights, wanted an EMA"):
        load_unet(raw, ema=True)
    with pytest.raises(UserError, match="holds an EMA of width 0.05, wanted the raw weights"):
        load_unet(ema, ema=False)


@pytest.mark.parametrize("family", TINY)
def test_the_probe_sees_heads_and_order_and_touches_nothing(family, tmp_path, capfd, monkeypatch):
    net = randomize(UNet(TINY[family]))
    value, state = probe(net.cfg, net.state_dict()), torch.get_rng_state()
    assert len(value) == 8 and value == probe(
        net.cfg, {k: v.double() for k, v in net.state_dict().items()}
    )
    others = [
        replace(net.cfg, num_heads=8, num_head_channels=0),
        replace(net.cfg, num_heads=1, num_head_channels=0),
    ]
    others += (
        [
            replace(
                net.cfg, attention_order="new" if net.cfg.attention_order == "legacy" else "legacy"
            )
        ]
        if not net.cfg.context_dim
        else []
    )
    for other in others:
        assert max(abs(a - b) for a, b in zip(value, probe(other, net.state_dict()))) > 5e-3 * max(
            map(abs, value)
        )
    assert torch.equal(state, torch.get_rng_state())
    monkeypatch.setenv("KERNELS", "triton")  # on the side: neither interpreted nor said
    assert probe(net.cfg, net.state_dict()) == value and capfd.readouterr().err == ""
    save_unet(tmp_path / "m", net.bfloat16(), {})
    again, meta = load_unet(tmp_path / "m")
    assert same(again, net) and len(meta["probe"]) == 8
    assert (
        next(load_unet(tmp_path / "m", dtype=torch.float32)[0].parameters()).dtype == torch.float32
    )


def test_what_is_saved_is_read_back_before_anything_is_replaced(net, tmp_path, monkeypatch):
    save_three(tmp_path, net, keep=1, images=(8,))
    before, raw_bytes = (
        (checkpoints(tmp_path)[0] / "model.safetensors").read_bytes(),
        files.raw_bytes,
    )
    ema = {k: v.double() for k, v in net.state_dict().items()}

    def flip(dtype):  # a disk that loses a bit of tensors of that type
        def write(tensor):
            data = raw_bytes(tensor).copy()
            data[:1] ^= tensor.dtype == dtype
            return data

        return write

    for dtype in (torch.float32, torch.float64):  # of all, or of the EMA alone
        with monkeypatch.context() as m:
            m.setattr(files, "raw_bytes", flip(dtype))
            with pytest.raises(UserError, match="was read back with other weights"):
                save_checkpoint(tmp_path, 16, net, {}, {"0.050": ema}, {}, {}, 1, 0)
            with pytest.raises(UserError, match="was read back with other weights"):
                save_unet(
                    checkpoints(tmp_path)[0] / "model.safetensors",
                    net,
                    {},
                    ema if dtype == torch.float64 else None,
                )
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


@pytest.mark.parametrize(
    "meta",
    [
        {"unet": None},
        {"unet": [1]},
        {"unet": {"channel_mult": "ab"}},
        {"unet": {"num_res_blocks": -5}},
        {"unet": {"num_res_blocks": 10**5}},
        {"unet": {"num_heads": "x"}},
        {"unet": {"channel_mult": [[1], [1]]}},
        {"unet": {"attention_order": "sideways"}},
        {"unet": {"new": 1}},
        {"layout": "zzz"},
        {"layout": ["native"]},
        {"layout": None},
        {"objective": 3},
        {"objective": {"a": 1}},
        {"objective": "banana"},
        {"objective": ["eps"]},
        {"objective": {"name": "x", "target": "y"}},
        {"probe": "x"},
        {"probe": [1.0]},
        {"probe": []},
        {"probe": None},
        {"probe": ["a"]},
        {"probe": [10**400]},
        {"fingerprint": None},
        {"fingerprint": 3},
        {"images": "x"},
        {"vae": 3},
        {"source": 3},
        {"ema": [1]},
        {"resolution": "x"},
        {"classes": 3},
        {"objective": "v", "schedule": {"table": "foo,bar"}},
        {"objective": "v", "schedule": {"table": "0.1,2,linear"}},
    ],
    ids=str,
)
def test_metadata_of_odd_types_is_one_line(meta, tmp_path):
    tensors, unet = dict(randomize(UNet(ADM)).state_dict()), asdict(ADM)
    meta = {
        **meta,
        "unet": {**unet, **meta["unet"]}
        if isinstance(meta.get("unet"), dict)
        else meta.get("unet", unet),
    }
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        tmp_path / "m",
        metadata={META: json.dumps(meta)},
    )
    with pytest.raises(UserError):
        load_unet(tmp_path / "m")
    with pytest.raises(UserError):
        convert(tmp_path / "m", tmp_path / "d", "diffusers")


def test_weights_that_are_whole_numbers_are_refused_by_all(tmp_path):
    tensors = dict(UNet(ADM).state_dict())
    tensors["out.2.bias"] = tensors["out.2.bias"].long()
    write_tensors(tmp_path / "m", tensors, {"unet": asdict(ADM)})
    message = r"1 weights are not floating-point numbers: out.2.bias .torch.int64"
    for use in (load_unet, inspect, lambda m: convert(m, tmp_path / "n.safetensors", "native")):
        with pytest.raises(UserError, match=message):
            use(str(tmp_path / "m"))


SMALL = UNetConfig(
    4, 4, model_channels=32, channel_mult=(1, 2, 2), attention=(0, 1, 1), num_head_channels=16
)
XL = UNetConfig(
    4, 4, model_channels=64, channel_mult=(1, 2), num_res_blocks=1, attention=(2, 0),
    num_head_channels=16, vector_dim=12, context_dim=24, use_scale_shift_norm=False,
    resblock_updown=False,
)  # fmt: skip


# ---- what a config of a file may hold -----------------------------------------------------------

ODD = (
    None, "x", "", [], [1, 2], {}, (), (1, "x"), (1, (2,)), ((),), True, -1, 1.5, 10**9, 10**400,
    math.inf, math.nan, 1j, b"x", (math.nan, 1), (0, 10**9), (True, 1), "a" * 10**6, (1,) * 10**6,
    torch.zeros(3), functools.reduce(lambda inner, _: [inner], range(500), 1),
)  # fmt: skip
SAYS = ("wanted", "not a multiple", "do not split", "give one each", "set one")


@pytest.mark.parametrize("name", [f.name for f in fields(UNetConfig)])
@pytest.mark.parametrize("base", [SMALL, XL], ids=["adm", "sd"])
def test_every_odd_field_of_a_config_is_named_at_once(base, name):
    """Configs come from other people's files: an odd one is a ValueError in one short line, or
    builds, quickly."""
    start, fine = time.process_time(), []
    for value in ODD:
        try:
            cfg = config_from(UNetConfig, asdict(base) | {name: value})
            hash(cfg)
            num_params(cfg)
            fine.append(value)
        except ValueError as error:
            assert len(str(error)) < 400 and any(word in str(error) for word in SAYS), error
    # True is one of two; a depth or number of 1.5 is none.
    assert len(fine) <= 1 and time.process_time() - start < 5


@dataclass(frozen=True)
class OwnConfig:
    """Fields of types that UNetConfig does not have."""

    names: tuple[str, ...] = ("a",)
    note: str | None = None
    order: Literal[1, 2] = 1


def test_the_config_of_a_fork_may_have_fields_of_other_types():
    own = OwnConfig(("b", "c"), "d", 2)
    assert config_from(OwnConfig, asdict(own)) == own
    for value in (3, True, "1"):
        with pytest.raises(ValueError, match="order is .*: wanted 1 or 2"):
            config_from(OwnConfig, {"order": value})


@pytest.mark.parametrize("base, changes, message", [
    (SMALL, {"model_channels": 32768, "channel_mult": (1, 4, 1)}, "131072 channels"),
    (SMALL, {"channel_mult": (1,) * 17, "attention": (0,) * 17}, "for 1 to 16 levels"),
    (SMALL, {"channel_mult": (), "attention": ()}, "for 1 to 16 levels"),
    (XL, {"num_res_blocks": 64, "attention": (64, 64)}, "16770 blocks: wanted up to 1024"),
    (XL, {"middle_attention": 0}, "middle_attention is 0: wanted a whole number from 1 to 64"),
])  # fmt: skip
def test_sizes_that_nobody_builds_are_named(base, changes, message):
    with pytest.raises(ValueError, match=message):
        config_from(UNetConfig, asdict(base) | changes)


# ---- the walk through the code ------------------------------------------------------------------


def test_loading_our_own_file_takes_five_calls(net, tmp_path):
    """Who reads how a checkpoint of ours is loaded opens at most five functions.

    Counted are the functions of this repository that the file passes through: those that are given
    its path, its open container, or what was opened. Not counted is what is given plain values (a
    config's fields, tensors by name: their names say what they do), what lies below ckpt (harness
    reads bytes, model.py builds and runs the network), and methods of the container.
    """
    path = tmp_path / "m.safetensors"
    save_unet(path, net, {"objective": {"name": "fm", "target": "u"}})
    called = {}

    def watch(frame, event, _):
        code = frame.f_code
        file = os.path.relpath(code.co_filename, ROOT)
        if event != "call" or not file.endswith(".py") or file.startswith(("..", "tests")):
            return
        if file.split(os.sep)[0] in ("harness", "kernels", "model.py") or code.co_name[0] in "<_":
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        values = [frame.f_locals.get(name) for name in names]
        given = any(
            isinstance(v, (files.Container, native.Source)) or v in (path, str(path))
            for v in values
            if not isinstance(v, (torch.Tensor, dict))
        )
        if given:
            called[f"{file}:{code.co_name}"] = None

    sys.setprofile(watch)
    try:
        again, _ = load_unet(path)
    finally:
        sys.setprofile(None)
    assert same(again, net)
    assert list(called) == [
        "ckpt/foreign.py:load_unet", "ckpt/native.py:find_checkpoint",
        "ckpt/containers.py:open_weights", "ckpt/native.py:open_own",
        "ckpt/native.py:check_weights",
    ]  # fmt: skip


# ---- files of before, and other networks --------------------------------------------------------


def test_a_checkpoint_of_before_loads_and_computes_what_it_did():
    """tests/fixtures/834bb60 was written before the code was rebuilt, on another processor: up to
    the rounding of fp32."""
    folder = ROOT / "tests/fixtures/834bb60/run/ckpt/000000000080"
    for name in ("model", "ema-0.100"):
        net, meta = load_unet(folder / f"{name}.safetensors")
        now = torch.tensor(probe(net.cfg, net.state_dict()))
        torch.testing.assert_close(now, torch.tensor(meta["probe"]), rtol=1e-5, atol=1e-6)
        assert "network" not in meta
    assert find_checkpoint(folder.parents[1]) == folder / "ema-0.100.safetensors"


@dataclass(frozen=True)
class DiTConfig:
    in_channels: int = 4
    out_channels: int = 4
    num_classes: int = 3
    width: int = 32
    depth: int = 2
    heads: int = 2
    patch: int = 2

    @property
    def multiple(self) -> int:
        return self.patch


class DiT(nn.Module):
    """A network of somebody's fork: patches, attention, time that is added, a buffer of its own."""

    def __init__(self, cfg: DiTConfig):
        super().__init__()
        self.cfg, C = cfg, cfg.width
        self.embed = nn.Conv2d(cfg.in_channels, C, cfg.patch, cfg.patch)
        self.time, self.label = nn.Linear(1, C), nn.Embedding(cfg.num_classes, C)
        layers = [nn.MultiheadAttention(C, cfg.heads, batch_first=True) for _ in range(cfg.depth)]
        self.blocks, self.norm = nn.ModuleList(layers), nn.LayerNorm(C)
        self.out = nn.ConvTranspose2d(C, cfg.out_channels, cfg.patch, cfg.patch)
        self.register_buffer("waves", torch.arange(1.0, C + 1).sin(), persistent=False)

    def forward(self, x, t, y=None, context=None):
        h = self.embed(x)
        time = self.time(t[:, None] / 1000) + self.waves
        time = time if y is None else time + self.label(y.clamp(min=0)) * (y >= 0)[:, None]
        tokens = h.flatten(2).transpose(1, 2) + time[:, None]
        for block in self.blocks:
            normed = self.norm(tokens)
            tokens = tokens + block(normed, normed, normed)[0]
        return self.out(tokens.transpose(1, 2).unflatten(2, h.shape[2:]))


def test_another_network_saves_loads_strictly_and_is_refused_when_altered(tmp_path, monkeypatch):
    """docs/forking.md: a class, its config and a line of NETWORKS, and nothing else."""
    monkeypatch.setitem(NETWORKS, "DiT", (DiT, DiTConfig))
    net, path = randomize(DiT(DiTConfig(depth=3))), tmp_path / "m.safetensors"
    state = torch.get_rng_state()
    digest = save_unet(path, net, {"objective": "fm", "images": 5})
    again, meta = load_unet(path)
    assert torch.equal(state, torch.get_rng_state())
    assert type(again) is DiT and again.cfg == net.cfg and same(again, net)
    assert meta["network"] == "DiT" and meta["fingerprint"] == digest and len(meta["probe"]) == 8
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([0, -1])
    assert torch.equal(net(x, t, y), again(x, t, y))
    assert same(load_like(path, DiTConfig(depth=3), "dit")[0], net)
    assert open_unet(path).cfg == net.cfg and "network" in "\n".join(differences(net.cfg, CFG))
    lines = "\n".join(inspect(str(path)))
    assert "family       DiT" in lines and "depth=3" in lines
    save_unet(tmp_path / "b", net, {})
    assert verify(str(path), str(tmp_path / "b"))[0]
    # What does not fit is refused.
    with pytest.raises(UserError, match="it has depth 3; --model dit is depth 2"):
        load_like(path, DiTConfig(), "dit")
    with pytest.raises(UserError, match="it has network DiT"):
        load_like(path, PRESETS["nano"], "nano")
    with pytest.raises(UserError, match="holds a DiT, which has one layout only"):
        convert(path, tmp_path / "d", "diffusers")
    with pytest.raises(UserError, match="says depth = 3: got 5.  Leave it out"):
        load_unet(path, depth=5)
    tensors = dict(open_weights(path))
    for change, message in (
        ({"heads": 4}, "the network computes .* its config"),  # no tensor shows it
        ({"depth": 2}, "unexpected: blocks.2"),
        ({"width": "x"}, "width is 'x': wanted a whole number"),
    ):
        odd = meta | {"unet": asdict(net.cfg) | change}
        save_file(tensors, tmp_path / "odd", metadata=text_meta(odd))
        with pytest.raises(UserError, match=message):
            load_unet(tmp_path / "odd")
    save_file(tensors, tmp_path / "odd", metadata=text_meta(meta | {"network": "Other"}))
    known = "UNet, ByteUNet, LCMUNet, MMDiT"
    with pytest.raises(UserError, match=f"network is 'Other': wanted one of {known}"):
        load_unet(tmp_path / "odd")
    spoil(path, "one bit flipped")
    with pytest.raises(UserError, match="do not match their own fingerprint"):
        load_unet(path)


@pytest.mark.parametrize("run", ["../../up", "/etc/cron.d/x", "..", ".hidden", "a/b\\c", ""])
def test_a_name_in_a_file_leads_nowhere_else(run):
    """What metadata calls its run becomes part of a folder's or a card's name, never a path."""
    meta = {"run": run, "images": 5, "fingerprint": "0" * 64}
    folder = samplers.default_folder(samplers.Config(ckpt="x"), Path("m.safetensors"), meta)
    subject = {"run": run, "fingerprint": "0" * 64}
    card = {"metrics": {"FD": {}}, "measured": {}, "sampled": {}, "subject": subject}
    for name, parent in ((folder, "samples"), (cards.card_name(card), "cards")):
        place = Path(name)
        assert place.parent == Path(parent) and not place.name.startswith(".")
