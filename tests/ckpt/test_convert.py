"""Any layout in, any layout out, bit for bit; and python -m ckpt."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from checkpoints import ADM, CFG, SD, TINY, convert_net, heads, inputs, ldm, same, spoil
from conftest import ROOT, randomize
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ckpt.__main__ as command
import ckpt.foreign as foreign
import ckpt.layouts as layouts
import harness.files as files
from ckpt import convert, fingerprint, load_unet, save_unet
from ckpt.containers import PRECISIONS, open_weights
from ckpt.convert import inspect, verify
from ckpt.layouts import modelspec
from ckpt.native import probe
from harness.cli import UserError
from harness.files import read_meta, stream_tensors, text_meta
from model import PRESETS, UNet, UNetConfig
from objectives import make_objective
from vae import pixel


# The name ckpt.convert is the function.
converting = sys.modules[convert.__module__]


@pytest.fixture
def net():
    return randomize(UNet(CFG))


# ---- converting ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("family", TINY)
def test_there_and_back_is_bit_exact(family, dtype, tmp_path):
    net = randomize(UNet(TINY[family])).to(PRECISIONS[dtype])
    src = tmp_path / "a.safetensors"
    mark = save_unet(src, net, {"images": 3})
    assert (
        convert(src, tmp_path / "folder", "diffusers")
        == mark
        == convert(tmp_path / "folder", tmp_path / "b.safetensors", "native")
    )
    assert convert(src, tmp_path / "c.safetensors", "diffusers") == mark
    own = {k: v.contiguous() for k, v in net.state_dict().items()}
    # By safetensors' own reader, as LDM's files have it.
    back = load_file(
        tmp_path / "b.safetensors"
    )
    assert same(back, ldm(net)) and same(load_unet(tmp_path / "b.safetensors")[0], own)
    for name in ("folder", "c.safetensors", "b.safetensors"):
        again, meta = load_unet(tmp_path / name)
        assert (
            same(again, own)
            and again.cfg == net.cfg
            and meta["fingerprint"] == mark
            and meta["images"] == 3
            and "probe" in meta
        )
    shutil.rmtree(tmp_path / "stripped", ignore_errors=True)
    # As diffusers itself would have written it.
    shutil.copytree(
        tmp_path / "folder", tmp_path / "stripped"
    )
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
    single = (
        kind.from_single_file(str(tmp_path / "one.safetensors"), config=str(tmp_path / "d"))
        if net.cfg.context_dim
        else oracle
    )
    x, t, y, context = inputs(net.cfg)
    for theirs in (oracle, single):
        extra = {}
        if net.cfg.vector_dim:
            sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64], [128, 64, 8, 0, 64, 32]])
            pooled = torch.randn(2, 16, generator=torch.Generator().manual_seed(2))
            y = torch.cat([pooled, theirs.add_time_proj(sizes.flatten()).reshape(2, -1)], 1)
            extra["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
        with torch.no_grad():
            wanted = (
                theirs(x, t, context, **extra).sample
                if net.cfg.context_dim
                else theirs(x, t, y).sample
            )
            assert (net(x, t, y, context) - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_the_dtype_changes_only_when_asked_and_what_does_not_fit_is_refused(net, tmp_path):
    with torch.no_grad():
        net.out[2].bias[0] = 70000.0
    mark = save_unet(tmp_path / "a", net, {})
    assert convert(tmp_path / "a", tmp_path / "b.safetensors", "native", "bf16") != mark
    assert {v.dtype for v in load_file(tmp_path / "b.safetensors").values()} == {torch.bfloat16}
    assert (
        same(load_unet(tmp_path / "b.safetensors")[0], net.to(torch.bfloat16))
        and load_unet(tmp_path / "b.safetensors")[1]["cast_from"] == mark
    )
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "diffusers", "fp32")
    assert {v.dtype for v in load_file(tmp_path / "c.safetensors").values()} == {torch.float32}
    with pytest.raises(
        UserError,
        match=r"out.2.bias does not fit fp16: .* from .* to 7e\+04, fp16 ends at 6.55e\+04",
    ):
        convert(tmp_path / "a", tmp_path / "d.safetensors", "native", "fp16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b.safetensors", "c.safetensors"]


def test_nothing_is_overwritten_and_a_bad_disk_is_noticed(net, tmp_path, monkeypatch):
    src = tmp_path / "a.safetensors"
    save_unet(src, net, {})
    before = src.read_bytes()
    (tmp_path / "other").mkdir()
    for dst, message in (
        (src, "exists and is the source"),
        (tmp_path / "other", "exists.  Give another name, or remove it first"),
        (tmp_path / "x.ckpt", "wanted a name that ends in .safetensors"),
    ):
        with pytest.raises(UserError, match=message):
            convert(src, dst, "native")
    with pytest.raises(UserError, match="layout 'comfy' is not one of native, diffusers"):
        convert(src, tmp_path / "b.safetensors", "comfy")
    stream = converting.stream_tensors

    def flip(path, *args):
        stream(path, *args)
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(converting, "stream_tensors", flip)
    for layout, dst in (("native", "b.safetensors"), ("diffusers", "b")):
        with pytest.raises(UserError, match="was read back with other weights"):
            convert(src, tmp_path / dst, layout)
    assert src.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == [
        "a.safetensors",
        "other",
    ]
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
    for name, layout in (
        ("a.safetensors", "native"),
        ("b.safetensors", "native"),
        ("d", "diffusers"),
    ):
        convert(src, tmp_path / name, layout)
    with pytest.raises(UserError, match="gone.safetensors exists"):
        convert(src, tmp_path / "gone.safetensors", "native")
    assert (
        src.read_bytes() == before
        and (tmp_path / "b.safetensors.part").read_text() == "the user's"
        and (tmp_path / "d.part/keep").exists()
    )
    assert len(os.listdir(tmp_path)) == 7 and not list(tmp_path.glob(".*"))


def test_converting_checks_the_probe_and_leaves_one(tmp_path, monkeypatch):
    net = randomize(UNet(ADM))
    save_unet(tmp_path / "a", net, {})
    meta = read_meta(open_weights(tmp_path / "a"))
    meta["unet"]["num_head_channels"] = 32
    save_file(
        {k: v.contiguous() for k, v in net.state_dict().items()},
        tmp_path / "wrong",
        metadata=text_meta(meta),
    )
    with pytest.raises(UserError, match="its config .heads.* is not that of these weights"):
        convert(tmp_path / "wrong", tmp_path / "w.safetensors", "native")
    torch.save(net.state_dict(), tmp_path / "f.pt")
    for src, dst, dtype, known in (
        ("f.pt", "1.safetensors", None, heads(ADM)),
        ("a", "2.safetensors", "bf16", {}),
    ):
        convert(tmp_path / src, tmp_path / dst, "native", dtype, **known)
        again, meta = load_unet(tmp_path / dst)
        assert meta["probe"] == pytest.approx(probe(ADM, again.state_dict()), rel=1e-5)
    monkeypatch.setattr(converting, "PROBE_LIMIT", 10)
    convert(tmp_path / "f.pt", tmp_path / "3.safetensors", "native", **heads(ADM))
    assert "probe" not in load_unet(tmp_path / "3.safetensors")[1]
    assert "probe        none: above" in "\n".join(inspect(tmp_path / "3.safetensors"))


def test_the_written_config_is_read_back(tmp_path, monkeypatch):
    write = files.write_text
    monkeypatch.setattr(
        converting,
        "write_text",
        lambda path, text: write(
            path, text.replace('"num_class_embeds": 5', '"num_class_embeds": 6')
        ),
    )
    with pytest.raises(
        UserError, match="config.json is not the config of the weights beside it: num_classes 5 / 6"
    ):
        convert_net(randomize(UNet(ADM)), tmp_path / "d", "diffusers")
    assert not (tmp_path / "d").exists()


def test_a_noise_schedule_is_stored_with_the_objective(tmp_path, user):
    torch.save(randomize(UNet(ADM)).state_dict(), tmp_path / "adm.pt")
    says = ["--layout", "native", "--num-head-channels", 16, "--attention-order", "legacy"]
    code, _, err = user(
        command.main,
        "convert",
        tmp_path / "adm.pt",
        tmp_path / "a.safetensors",
        "--objective",
        "eps",
        "--table",
        "cosine",
        *says,
    )
    assert code == 0, err
    assert load_unet(tmp_path / "a.safetensors")[1]["objective"] == asdict(
        make_objective("ddpm", table="cosine")
    )
    for src, flags, message in (
        ("adm.pt", [*says, "--table", "linear"], "does not say its objective.  Add --objective"),
        ("adm.pt", [*says, "--table", "linear", "--objective", "fm"], "is fm, which has none"),
        (
            "a.safetensors",
            ["--layout", "native", "--table", "linear"],
            "says its table is 'cosine', got 'linear'",
        ),
    ):
        code, _, err = user(
            command.main, "convert", tmp_path / src, tmp_path / "b.safetensors", *flags
        )
        assert code == 2 and message in err[0], err


@pytest.mark.parametrize(
    "preset, change, target, name",
    [
        ("sd15", {}, None, "v1"),
        ("sd15", {"num_heads": 1, "num_head_channels": 40}, "fm", None),
        ("sd15", {"in_channels": 9}, "eps", None),  # inpainting
        ("sd21", {}, None, None),
        ("sd21", {}, "eps", "v2-512"),
        ("sd21", {}, "v", "v2-768-v"),
        ("sdxl", {}, "eps", "xl-v1-base"),
        ("sdxl", {"attention": (0, 2, 4), "middle_attention": 4}, "eps", None),  # distilled
        ("sdxl-refiner", {}, "eps", "xl-v1-refiner"),
        ("adm-256", {}, "eps", None),
    ],
)
def test_an_architecture_is_claimed_only_where_it_is_known(preset, change, target, name):
    cfg, meta = replace(PRESETS[preset], **change), {"objective": target}
    spec = modelspec(cfg, "native", meta, "toy", {"license": "fair"})
    own = {"license": "fair"}
    if name is None:
        assert spec == own
    else:
        word = {None: None, "eps": "epsilon", "v": "v"}[target]
        assert spec["modelspec.architecture"] == f"stable-diffusion-{name}"
        assert spec.get("modelspec.prediction_type") == spec.get("modelspec.predict_key") == word
        assert spec["modelspec.title"] == "toy" and spec["modelspec.sai_model_spec"] == "1.0.0"
        assert len(spec["modelspec.date"]) == 10 and spec["license"] == "fair"


def test_what_a_file_says_of_itself_is_kept_but_not_how_it_was_written(net, tmp_path):
    said = {
        "modelspec.architecture": "stable-diffusion-v1/inpainting", "modelspec.title": "Its own",
        "modelspec.date": "2023-01-02", "modelspec.implementation": "diffusers",
        "modelspec.author": "A", "modelspec.license": "CC", "license": "fair",
    }  # fmt: skip
    save_file(ldm(net), tmp_path / "a.safetensors", metadata=said | {"other": "x"})
    for name, layout in (("n.safetensors", "native"), ("d.safetensors", "diffusers")):
        convert(tmp_path / "a.safetensors", tmp_path / name, layout, objective="v", **heads(CFG))
        with safe_open(tmp_path / name, "pt") as file:
            meta = file.metadata()
        wrote = "diffusers" if layout == "diffusers" else "https://github.com/Stability-AI/"
        assert meta.pop("modelspec.implementation").startswith(wrote)
        assert meta["modelspec.prediction_type"] == "v" and meta["format"] == "pt"
        assert {key: meta.get(key) for key in said if "implementation" not in key} == {
            key: value for key, value in said.items() if "implementation" not in key
        }
    del said["modelspec.architecture"]
    save_file(ldm(net), tmp_path / "b.safetensors", metadata=said)
    convert(tmp_path / "b.safetensors", tmp_path / "b2.safetensors", "native", **heads(CFG))
    with safe_open(tmp_path / "b2.safetensors", "pt") as file:
        assert "modelspec.architecture" not in file.metadata()
        assert "modelspec.implementation" not in file.metadata()
        assert file.metadata()["modelspec.title"] == "Its own"


MEMORY = """
import sys
from pathlib import Path
import torch
import ckpt
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024
base = status("VmRSS:")
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
ckpt.convert(sys.argv[1], sys.argv[2], "diffusers")
print(status("VmHWM:") - base)
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux' /proc/self/clear_refs"
)
def test_converting_needs_little_more_than_the_largest_tensor(tmp_path):
    cfg = UNetConfig(
        model_channels=64,
        channel_mult=(1, 4, 16),
        attention=(0, 1, 0),
        num_head_channels=64,
        use_scale_shift_norm=False,
    )
    header = {k: (torch.float32, s) for k, s in layouts.native_shapes(cfg).items()}
    stream_tensors(
        tmp_path / "big.safetensors",
        header,
        text_meta({"unet": asdict(cfg)}),
        lambda k: torch.full(header[k][1], float(hash(k) % 97)),
    )
    sizes = [4 * torch.Size(s).numel() for _, s in header.values()]
    assert sum(sizes) > 600e6 and len(sizes) > 250
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "big.safetensors"), str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 1.5 * max(sizes) + 16e6, (done.stdout, max(sizes))


# ---- the command line ---------------------------------------------------------------------------


def test_inspect_says_what_it_is_and_what_is_missing(tmp_path, user):
    net = randomize(UNet(TINY["adm"]))
    torch.save(net.state_dict(), tmp_path / "adm.pt")
    code, out, _ = user(command.main, "inspect", tmp_path / "adm.pt")
    lines = dict(line.split(None, 1) for line in out.splitlines())
    assert (
        code == 0
        and lines["layout"] == "native"
        and lines["family"] == "adm"
        and "torch zip pickle" in lines["file"]
    )
    assert (
        lines["parameters"]
        == f"{sum(p.numel() for p in net.parameters()):,} in {len(net.state_dict())} tensors"
    )
    assert lines["dtype"] == f"float32 × {len(net.state_dict())}" and lines[
        "fingerprint"
    ] == fingerprint(net.state_dict())
    assert (
        "heads and attention order" in lines["missing"]
        and "--objective" in lines["missing"]
        and "vae" not in lines["missing"]
    )
    assert "model_channels=32" in lines["config"] and "num_head" not in lines["config"]
    save_unet(
        tmp_path / "own",
        net,
        {
            "objective": {"name": "fm", "target": "u", "table": ""},
            "vae": pixel().meta(),
            "images": 12345,
            "resolution": 16,
        },
    )
    code, out, _ = user(command.main, "inspect", tmp_path / "own")
    assert (
        "missing      nothing" in out
        and "name=fm target=u" in out
        and "12,345" in out
        and "num_head_channels=16" in out
    )
    spoil(tmp_path / "own", "one bit flipped")
    assert user(command.main, "inspect", tmp_path / "own")[0] == 2


def test_convert_and_verify_from_the_command_line(net, tmp_path, user):
    mark = save_unet(tmp_path / "a.safetensors", net, {})
    code, out, _ = user(
        command.main,
        "convert",
        tmp_path / "a.safetensors",
        "--layout",
        "diffusers",
        tmp_path / "new/d",
    )
    assert (
        code == 0
        and mark in out
        and sorted(os.listdir(tmp_path / "new/d"))
        == ["config.json", "diffusion_pytorch_model.safetensors"]
    )
    code, out, _ = user(command.main, "verify", tmp_path / "a.safetensors", tmp_path / "new/d")
    assert code == 0 and "the same weights, bit for bit" in out
    torch.save(net.state_dict(), tmp_path / "bare.pt")
    # Heads are taken from the first.
    assert (
        user(command.main, "verify", tmp_path / "a.safetensors", tmp_path / "bare.pt")[0] == 0
    )
    with torch.no_grad():
        part, before = (
            net.middle_block[0].in_layers[2].weight,
            sum(p.square().sum() for p in net.middle_block.parameters()),
        )
        scale = float(0.5 * part.norm() / before.sqrt())
        part *= 1.5
    save_unet(tmp_path / "b", net, {})
    code, out, _ = user(command.main, "verify", tmp_path / "a.safetensors", tmp_path / "b")
    assert (
        code == 1
        and "1 of 16 blocks differ" in out
        and float(out.split()[-1]) == pytest.approx(scale, rel=1e-3)
        and "middle_block" in out
    )
    assert (
        user(
            command.main,
            "convert",
            tmp_path / "b",
            tmp_path / "h.safetensors",
            "--layout",
            "native",
            "--dtype",
            "fp16",
        )[0]
        == 0
    )
    code, out, _ = user(command.main, "verify", tmp_path / "b", tmp_path / "h.safetensors")
    assert code == 1 and "another dtype: float32 / float16" in out and "16 of 16 blocks" in out
    save_unet(tmp_path / "c", UNet(replace(CFG, num_classes=4)), {})
    code, out, _ = user(command.main, "verify", tmp_path / "b", tmp_path / "c")
    assert code == 1 and "another architecture: num_classes 3 / 4" in out


@pytest.mark.parametrize(
    "flags, asked, config",
    [
        (
            [],
            [
                "heads and attention order (--num-heads or --num-head-channels, --attention-order)",
                "noise schedule (--table)",
                "objective",
            ],
            [],
        ),
        (
            ["--num-head-channels", 16],
            ["attention order (--attention-order)"],
            ["num_head_channels=16"],
        ),
        (
            ["--attention-order", "new"],
            ["heads (--num-heads or --num-head-channels)"],
            ["attention_order=new"],
        ),
        (
            ["--num-heads", 2, "--attention-order", "new", "--objective", "eps"],
            ["noise schedule (--table);", "--resolution"],
            ["num_heads=2"],
        ),
        (
            ["--num-heads", 2, "--attention-order", "new", "--objective", "v", "--table", "linear"],
            ["missing      size of the images"],
            ["use_scale_shift_norm=True"],
        ),
    ],
)
def test_inspect_honours_partial_answers(tmp_path, user, flags, asked, config):
    torch.save(UNet(ADM).state_dict(), tmp_path / "adm.pt")
    code, out, err = user(command.main, "inspect", tmp_path / "adm.pt", *flags)
    assert code == 0 and all(words in out for words in asked + config), out + str(err)
    assert ("attention order" in out) == ("--attention-order" not in flags) and (
        "heads (" in out or "heads and" in out
    ) == ("--num-head" not in str(flags))


def test_inspect_asks_transformers_for_no_order(tmp_path, user):
    torch.save(UNet(SD).state_dict(), tmp_path / "sd.pt")
    code, out, _ = user(command.main, "inspect", tmp_path / "sd.pt")
    assert (
        code == 0 and "heads (--num-heads" in out and "order" not in out and "text encoders" in out
    )


def test_verify_lists_blocks_in_the_order_of_the_network(tmp_path):
    for name in "ab":
        save_unet(tmp_path / name, randomize(UNet(TINY["adm"]), seed=ord(name)), {})
    same, lines = verify(tmp_path / "a", tmp_path / "b")
    own = [".".join(k.split(".")[:2]) for k in layouts.native_shapes(TINY["adm"])]
    own = list(dict.fromkeys(k if "_blocks." in k else k.split(".")[0] for k in own))
    assert not same and [line.split()[0] for line in lines[1:]] == own


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
    with pytest.raises(UserError, match="order of the qkv rows"):  # neither says it
        verify(tmp_path / "d", tmp_path / "bare.pt")
    other = UNet(replace(ADM, attention_order="new"))
    other.load_state_dict(
        {
            k: layouts.reorder_attention(v, v.shape[0] // 48, "new") if ".qkv." in k else v
            for k, v in net.state_dict().items()
        }
    )
    save_unet(tmp_path / "new", other, {})
    check("own", "new", True)
    other.load_state_dict(net.state_dict())  # the same bits, another function
    save_unet(tmp_path / "else", other, {})
    check("own", "else", False)
    for n, order in enumerate(("legacy", "new")):
        one = UNet(replace(ADM, num_head_channels=0, num_heads=1, attention_order=order))
        one.load_state_dict(net.state_dict())
        save_unet(tmp_path / f"one{n}", one, {})
    check("one0", "one1", True)  # one head has no order
    check("own", "one0", False)
    sd = randomize(UNet(SD))
    save_unet(tmp_path / "sd", sd, {})
    torch.save(ldm(sd), tmp_path / "sd.ckpt")
    check("sd", "sd.ckpt", True)


def test_only_verify_says_no_with_exit_code_1(tmp_path, user, monkeypatch, capsys):
    def main_of(error):
        def fail(*_):
            raise error

        monkeypatch.setattr(foreign, "open_weights", fail)
        monkeypatch.delitem(sys.modules, "ckpt.__main__", raising=False)
        monkeypatch.setattr(
            sys, "argv", ["ckpt", "verify", str(tmp_path / "a"), str(tmp_path / "a")]
        )
        (tmp_path / "a").touch()
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("ckpt", run_name="__main__")
        return stop.value.code

    assert main_of(RuntimeError("a bug")) == 3 and main_of(
        PermissionError(13, "Permission denied", "a")
    ) == 2 == main_of(MemoryError())
    assert "RuntimeError: a bug" in capsys.readouterr().err
    code, _, err = user(command.main, "inspect", "x" * 5000)
    assert code == 2 and len(err) == 1 and "File name too long" in err[0]


def test_names_after_two_dashes_may_begin_with_one(tmp_path, user, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_unet("-m", randomize(UNet(ADM)), {})
    code, out, err = user(command.main, "verify", "--", "-m", "-m")
    assert code == 0 and "bit for bit" in out, err


@pytest.mark.parametrize(
    "args, message",
    [
        (["inspect", "x", "--num-heads", 4, "--num-heads=8"], "--num-heads is given twice"),
        (["convert", "a", "b", "--layout", "x"], "--layout 'x' is not one of native, diffusers."),
        (["inspect", "x", "--layout", "native"], "are convert's"),
        (["insepct", "x"], "'insepct' is not one of inspect, convert, verify.  Closest: inspect"),
        ([], "is not one of"),
        (["inspect"], "inspect takes FILE, got 0"),
        (["convert", "a"], "takes SRC DST"),
        (["convert", "a", "b"], "needs --layout"),
        (["verify", "a", "b", "--dtype", "fp16"], "are convert's, not verify's"),
        (["inspect", "none"], "no checkpoint at none"),
        (["inspect", "--zero-snr", "none"], "no checkpoint at none"),
        (["inspect", "--no-ema", "--no-zero-snr", "none"], "no checkpoint at none"),
        (["convert", "a", "b", "--layout", "diffuser"], "Closest: diffusers"),
        (["inspect", "x", "--num-head", "4"], "Closest: --num-heads|num-heads"),
    ],
)
def test_bad_commands(user, args, message):
    code, _, err = user(command.main, *args)
    assert code == 2 and len(err) == 1 and message.split("|")[-1] in err[0]


def test_help_fits_a_screen_and_a_dry_run_does_nothing(user, tmp_path):
    code, out, _ = user(command.main, "--help")
    assert (
        code == 0
        and len(out.splitlines()) <= 30
        and max(map(len, out.splitlines())) <= 160
        and "python -m ckpt verify A B" in out
    )
    code, out, _ = user(
        command.main, "convert", tmp_path / "a", tmp_path / "b", "--layout", "native", "--dry-run"
    )
    assert code == 0 and json.loads(out)["layout"] == "native" and not list(tmp_path.iterdir())
