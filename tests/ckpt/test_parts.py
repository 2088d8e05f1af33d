"""Where a network stands in a file: by rule, under any prefix; asked for where it is a guess."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import ADM, SD, TINY, convert_net, heads, ldm, single_file
from ckpt import open_unet
from ckpt.convert import convert, inspect, verify
from ckpt.layouts import LAYOUTS, foreign_names, native_shapes
from ckpt.meaning import meaning_of
from ckpt.parts import autoencoders, beside, buffers, choose, dotted, unets
from conftest import randomize
from harness.cli import UserError
from harness.files import Container, Entry
from model import PRESETS, UNet, UNetConfig

RAW, MEAN = (randomize(UNet(ADM), seed).state_dict() for seed in (0, 1))
OPT = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
BY_NAME = {name: {"exp_avg": torch.ones(1)} for name in RAW}
COUNTS = {"initted": torch.tensor(True), "step": torch.tensor(5)}
AVERAGED = {"n_averaged": torch.tensor(3)}


def under(prefix, weights):
    return {prefix + k: v for k, v in weights.items()}


def flat(weights, prefix=""):
    return {prefix + k.replace(".", ""): v for k, v in weights.items()}


# (what wrote it, what it wrote, are there raw weights, is there an EMA)
LAYOUTS_SEEN = [
    ("bare", RAW, 1, 0),
    ("a script", {"model": RAW, "epoch": 1, "opt": OPT}, 1, 0),
    ("a list", [RAW, OPT, 3], 1, 0),
    ("nested", {"model": {"unet": RAW, "text": {"w": torch.ones(2)}}, "step": 3}, 1, 0),
    ("deeply nested", {"a": {"b": {"c": {"d": [{"e": RAW}]}}}}, 1, 0),
    ("twice", {"checkpoint": {"state_dict": {"state_dict": RAW}}}, 1, 0),
    ("DDP around compile", under("module._orig_mod.", RAW), 1, 0),
    ("compile around DDP", {"net": under("_orig_mod.module.", RAW)}, 1, 0),
    ("a part compiled", under("module.model.diffusion_model._orig_mod.module.", RAW), 1, 0),
    (
        "blocks compiled",
        under("unet.", {k.replace("middle_block.", "middle_block._orig_mod."): v
                        for k, v in RAW.items()}),
        1, 0,
    ),
    ("FSDP", {"model": under("_fsdp_wrapped_module.", RAW), "optim": {"state": BY_NAME}}, 1, 0),
    ("moments by name", {"model": RAW, "optimizer": {"exp_avg": MEAN, "exp_avg_sq": MEAN}}, 1, 0),
    ("DeepSpeed", {"module": RAW, "optimizer": OPT}, 1, 0),
    ("an unheard-of prefix", under("my.denoiser.backbone.", RAW), 1, 0),
    ("a part unheard of", under("net.", RAW) | {"lora.down": torch.ones(1)}, 1, 0),
    ("k-diffusion", {
        "model": under("inner_model.", RAW), "model_ema": under("inner_model.", MEAN),
        "opt": OPT, "gns_stats": {"sq": torch.ones(1)},
    }, 1, 1),
    ("timm", {"state_dict": RAW, "state_dict_ema": MEAN, "epoch": 3}, 1, 1),
    ("BasicSR", {"params": RAW, "params_ema": MEAN}, 1, 1),
    ("EDM", {"net": under("model.", RAW), "ema": under("model.", MEAN)}, 1, 1),
    ("a shadow", {"model": RAW, "ema": {"decay": 0.9, "shadow": MEAN}}, 1, 1),
    ("camel case", {"model": RAW, "modelEma": MEAN}, 1, 1),
    ("AveragedModel", {"net": RAW, "avg": under("module.", MEAN) | AVERAGED}, 1, 1),
    ("AveragedModel in a module", under("net.", RAW) | under("swa.module.", MEAN)
     | under("swa.", AVERAGED), 1, 1),
    ("AveragedModel by no name", under("a.", RAW) | under("b.module.", MEAN)
     | under("b.", AVERAGED), 1, 1),
    ("AveragedModel alone", under("module.", MEAN) | AVERAGED, 0, 1),
    ("ema_pytorch", under("online_model.", RAW) | under("ema_model.", MEAN) | COUNTS, 1, 1),
    ("ema_pytorch in a trainer", {
        "model": under("model.", RAW) | {"betas": torch.ones(1000)}, "opt": OPT,
        "ema": under("online_model.model.", RAW) | under("ema_model.model.", MEAN) | COUNTS,
    }, 1, 1),
    ("ema_pytorch without the raw", under("ema_model.module.", MEAN) | COUNTS, 0, 1),
    ("Lightning", {
        "state_dict": under("model.", RAW), "optimizer_states": [OPT], "epoch": 3,
        "callbacks": {"EMACallback{'decay': 0.9}": {"state_dict": under("model.", MEAN)}},
    }, 1, 1),
    ("Lightning's WeightAveraging", {
        "state_dict": under("net.", MEAN), "current_model_state": under("net.", RAW),
        "averaging_state": AVERAGED,
    }, 1, 1),
    ("LitEma", under("model.diffusion_model.", RAW) | flat(MEAN, "model_ema.diffusion_model")
     | {"model_ema.decay": torch.tensor(0.9)}, 1, 1),
    ("LitEma alone", flat(MEAN, "model_ema.diffusion_model"), 0, 1),
    ("LitEma itself", flat(MEAN) | {"decay": torch.tensor(0.9)}, 0, 1),
    ("LitEma without a word", under("net.", RAW) | flat(MEAN, "copy.unet"), 1, 1),
    ("an EMA alone", {"ema": under("module.", MEAN), "step": 3}, 0, 1),
    ("a width in the name", {"ema_0.9999": MEAN}, 0, 1),
]  # fmt: skip


@pytest.mark.parametrize("what, saved, raw, ema", LAYOUTS_SEEN, ids=[r[0] for r in LAYOUTS_SEEN])
def test_what_programs_write_is_found(what, saved, raw, ema, tmp_path):
    torch.save(saved, tmp_path / "x.pt")
    wanted = {None: RAW if raw else MEAN, False: RAW if raw else None, True: MEAN if ema else None}
    for choice, weights in wanted.items():
        if weights is None:
            with pytest.raises(UserError, match="holds (an EMA .*, wanted the raw|no EMA of a)"):
                open_unet(tmp_path / "x.pt", ema=choice, **heads(ADM))
            continue
        source = open_unet(tmp_path / "x.pt", ema=choice, **heads(ADM))
        assert source.meta["ema"] == ("the file's" if weights is MEAN else None)
        assert all(torch.equal(source.weights[k], weights[k]) for k in weights), choice


def test_a_file_says_what_else_is_in_it_and_what_was_taken(tmp_path):
    saved = next(row[1] for row in LAYOUTS_SEEN if row[0] == "ema_pytorch in a trainer")
    torch.save({**saved, "text_encoder": {"w": torch.ones(2)}}, tmp_path / "x.pt")
    lines = "\n".join(inspect(tmp_path / "x.pt", **heads(ADM)))
    assert "network      model/model, raw weights (--ema takes ema/ema_model.model)" in lines
    n = 2 * len(RAW) + 2
    assert f"also in it   1 schedule tensors, 1 opt tensors, {n} ema tensors, 1 text_enc" in lines
    many = {f"part{i}.w": torch.ones(1) for i in range(99)} | under("unet.", RAW)
    torch.save(many, tmp_path / "x.pt")
    lines = "\n".join(inspect(tmp_path / "x.pt", **heads(ADM)))
    assert "1 part9 tensors, 89 other tensors" in lines


# ---- a property ---------------------------------------------------------------------------------

BOXES = ("state_dict/", "model/", "checkpoint/", "0/", "weights/")
MODULES = (
    "module.", "_orig_mod.", "model.", "unet.", "net.", "inner_model.", "diffusion_model.", "x.",
    "student.", "_fsdp_wrapped_module.",
)  # fmt: skip
STRANGERS = (
    "text/encoder.layers.0.weight", "opt/state/0/exp_avg", "control/zero_convs.0.0.weight",
    "control/input_blocks.0.0.weight", "control/time_embed.0.weight", "critic/input_blocks.1",
    "vae/encoder.conv_in.weight", "vae/encoder.down_blocks.0.resnets.0.conv1.weight",
    "vae/decoder.up_blocks.0.resnets.0.conv1.weight", "rng/cpu", "scale", "betas",
    "first_stage_model.quant_conv.bias", "cond_stage_model.w", "opt/m/input_blocks.0.0.weight",
    "opt/m/output_blocks.0.0.weight", "opt/m/time_embed.0.weight", "adapter/lora_A.x",
)  # fmt: skip


def boxed(names):
    """A file of these names, each tensor another number."""
    table = {
        name: Entry(torch.float32, (1,), lambda i=i: torch.tensor([float(i)]))
        for i, name in enumerate(names)
    }
    return Container(Path("x.pt"), "", table, {})


def nest(rng):
    """A random prefix."""
    boxes = rng.choices(BOXES, k=rng.randint(0, 3))
    return "".join(boxes + rng.choices(MODULES, k=rng.randint(0, 3)))


def average(rng, prefix, inner, layout):
    """({full: inner} of an EMA somewhere, what stands beside it)."""
    kinds = [
        "ema/",
        "ema_model.",
        "model_ema/module.",
        "averaged.",
        "callbacks/EMA/",
        "AveragedModel",
    ]
    kind = rng.choice(kinds + ["LitEma"] * (layout == "native"))
    if kind == "LitEma":
        start = rng.choice(["some_ema.", "lit/net", "model_ema.diffusion_model"])
        return {start + n.replace(".", ""): n for n in inner}, []
    if kind == "AveragedModel":
        return {f"q.module.{n}": n for n in inner}, ["q.n_averaged"]
    after = "".join(rng.choices(MODULES, k=rng.randint(0, 2)))
    return {f"{kind}{after}{n}": n for n in inner}, []


def unwrapped(name):
    return name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")


@pytest.mark.parametrize("seed", range(100))
def test_under_random_prefixes_the_same_tensors_are_found_or_asked_for(seed):
    rng = random.Random(seed)
    layout = rng.choice(LAYOUTS)
    inner = list(foreign_names(TINY[rng.choice(["sd15", "sdxl", "adm"])], layout))
    prefix = nest(rng)
    raw = {prefix + n: n for n in inner}
    kind = rng.choice(["raw", "EMA", "both", "two"])
    mean, counters = average(rng, prefix, inner, layout)
    strangers = [s for s in STRANGERS if rng.random() < 0.5]
    if not unwrapped(prefix):  # a bare network's own module has no other tensors
        strangers = [s for s in strangers if s != "scale"]
    if kind == "two":
        # A second one that none says to come second.
        second = rng.choice(["other.", "other/", "other/model.", "_orig_mod.other.net."])
        other = {second + n: n for n in inner}
        box = boxed([*strangers, *raw, *other])
        with pytest.raises(UserError, match="holds several U-Nets: .*--part"):
            choose(unets(box), "U-Net", box)
        assert choose(unets(box), "U-Net", box, part="other").names == other
        return
    names = {"raw": [*raw], "EMA": [*mean, *counters], "both": [*mean, *raw, *counters]}[kind]
    rng.shuffle(names)
    box = boxed([*strangers, *names])
    found = choose(unets(box), "U-Net", box)
    assert found.names == (mean if kind == "EMA" else raw) and found.ema == (kind == "EMA")
    if kind != "raw":
        assert choose(unets(box), "U-Net", box, ema=True).names == mean
    if kind != "EMA":
        assert choose(unets(box), "U-Net", box, ema=False).names == raw


def test_names_without_dots_are_unambiguous_in_every_preset():
    for cfg in [*PRESETS.values(), *TINY.values()]:
        for layout in LAYOUTS if isinstance(cfg, UNetConfig) else ():
            try:
                names = [*foreign_names(cfg, layout)]
            except UserError:
                continue  # diffusers has no such network
            assert [dotted(name.replace(".", "")) for name in names] == names
    assert not dotted("decay") and not dotted("input_blocks00wait") and not dotted("")


# ---- asked for ----------------------------------------------------------------------------------


def test_two_networks_are_asked_for_and_copies_are_one(tmp_path):
    both, one = tmp_path / "both.pt", tmp_path / "one.pt"
    torch.save({"student": RAW, "teacher": {"unet": MEAN}}, both)
    torch.save(MEAN, one)
    with pytest.raises(UserError, match="several U-Nets: student, teacher/unet.*--part student"):
        open_unet(both, **heads(ADM))
    for part, weights in (("student", RAW), ("teacher", MEAN), ("teacher.unet", MEAN)):
        source = open_unet(both, part=part, **heads(ADM))
        assert all(torch.equal(source.weights[k], weights[k]) for k in weights)
    with pytest.raises(UserError, match="no U-Net under 'nobody'.  Choose one of student, teach"):
        open_unet(both, part="nobody", **heads(ADM))
    assert verify(both, one, part="teacher", **heads(ADM))[0]
    assert verify(one, both, part="teacher", **heads(ADM))[0]
    assert not verify(both, one, part="student", **heads(ADM))[0]
    convert(both, tmp_path / "own.safetensors", "native", part="teacher", **heads(ADM))
    assert verify(both, tmp_path / "own.safetensors", part="teacher", **heads(ADM))[0]
    with pytest.raises(UserError, match="holds one network, got --part teacher"):
        open_unet(tmp_path / "own.safetensors", part="teacher")
    torch.save({"student": RAW, "teacher": RAW}, both)
    assert open_unet(both, **heads(ADM)).left_out == {"teacher": len(RAW)}
    torch.save({"net": RAW, "ema_1": RAW, "ema_2": MEAN}, both)
    with pytest.raises(UserError, match="holds several EMAs: ema_1, ema_2"):
        open_unet(both, ema=True, **heads(ADM))
    source = open_unet(both, ema=True, part="ema_2", **heads(ADM))
    assert torch.equal(source.weights["out.2.bias"], MEAN["out.2.bias"])


def test_the_folder_of_diffusers_emamodel_is_an_ema(tmp_path):
    for name, weights in (("unet", RAW), ("unet_ema", MEAN)):
        net = UNet(ADM)
        net.load_state_dict(weights)
        convert_net(net, tmp_path / name, "diffusers")
        file = tmp_path / name / "diffusion_pytorch_model.safetensors"
        save_file(load_file(file), file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "unet_ema/config.json").read_text())
    config |= {
        "decay": 0.9999, "min_decay": 0.0, "optimization_step": 1, "update_after_step": 0,
        "use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.66,
    }  # fmt: skip
    (tmp_path / "unet_ema/config.json").write_text(json.dumps(config))
    for choice, weights in ((None, RAW), (False, RAW), (True, MEAN)):
        source = open_unet(tmp_path, ema=choice, attention_order="legacy")
        assert torch.equal(source.weights["out.2.bias"], weights["out.2.bias"])
        assert source.meta["ema"] == ("the file's" if choice else None)
    (tmp_path / "unet").rename(tmp_path / "elsewhere")
    source = open_unet(tmp_path, attention_order="legacy")
    assert torch.equal(source.weights["out.2.bias"], MEAN["out.2.bias"])
    with pytest.raises(UserError, match="holds an EMA .the top., wanted the raw weights"):
        open_unet(tmp_path, ema=False, attention_order="legacy")


# ---- other networks -----------------------------------------------------------------------------

HALF = {k: v for k, v in RAW.items() if not k.startswith("out")}


@pytest.mark.parametrize("tensors, message", [
    (under("control_model.", HALF) | {"control_model.zero_convs.0.0.weight": torch.ones(1)},
     "is a ControlNet, which steers a U-Net and is none"),
    ({"conv_in.weight": torch.ones(1), "controlnet_down_blocks.0.weight": torch.ones(1)},
     "is a ControlNet"),
    ({"lora_unet_down_blocks_0_attentions_0.lora_down.weight": torch.ones(1)}, "is a LoRA, which"),
    ({"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": torch.ones(1)}, "is a LoRA, which"),
    ({"down_blocks.0.attn1.processor.to_q_lora.down.weight": torch.ones(1)}, "is a LoRA, which"),
    (HALF | {"out.0.weight": torch.ones(1)}, "is half a U-Net, as classifiers are"),
    ({"optimizer.exp_avg." + k: v for k, v in RAW.items()}, "is half|holds no U-Net, but"),
    ({"first_stage_model.encoder.conv_in.weight": torch.ones(1)}, "no U-Net, but 1 vae tensors"),
    ({"a._orig_mod.input_blocks.0": torch.ones(1), "a.input_blocks.0": torch.ones(1)},
     "two tensors are the same one of a compiled network"),
])  # fmt: skip
def test_what_is_no_unet_is_called_what_it_is(tensors, message, tmp_path):
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        open_unet(tmp_path / "x.safetensors", **heads(ADM))


def test_a_unet_beside_its_controlnet_is_verified_and_converted(tmp_path):
    files = [tmp_path / "mlsd.pth", tmp_path / "normal.pth"]
    control = under("control_model.", HALF) | {"control_model.zero_convs.0.0.weight": torch.ones(1)}
    for file, weights in zip(files, (RAW, MEAN)):
        torch.save(under("model.diffusion_model.", weights) | control, file)
    assert not verify(*files, **heads(ADM))[0]
    assert open_unet(files[0], **heads(ADM)).left_out == {"ControlNet": len(control)}
    convert(files[0], tmp_path / "own.safetensors", "native", **heads(ADM))
    assert verify(files[0], tmp_path / "own.safetensors", **heads(ADM))[0]


@pytest.mark.parametrize("more, message", [
    (1, "code for its 1 further input channels: depth"),
    (5, "code for its 5 further input channels: inpainting's mask and image"),
    (2, "code for its 2 further input channels;"),
])  # fmt: skip
def test_further_input_channels_are_said(more, message, tmp_path):
    net = UNet(UNetConfig(**{**SD.__dict__, "in_channels": SD.out_channels + more}))
    torch.save(under("model.diffusion_model.", ldm(net)), tmp_path / "x.ckpt")
    assert message in inspect(tmp_path / "x.ckpt", num_heads=2)[-1]


def test_cosxl_says_edm_even_where_it_says_v_too(tmp_path):
    marks = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}
    for beside in ({}, {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}):
        said = meaning_of(boxed([*marks, *beside]))
        assert said.target == "edm"
    save_file(single_file(UNet(SD), UNet(SD)) | marks, tmp_path / "x.safetensors")
    text = "\n".join(inspect(tmp_path / "x.safetensors", num_heads=2))
    assert "objective    edm" in text and "no flag gives it" in text


def test_buffers_are_those_of_the_modules_around_a_network():
    names = [
        "state_dict/betas", "state_dict/model.v_pred", "low_scale_model.betas", "v_pred",
        "state_dict/cond_stage_model.ztsnr", "state_dict/model.unet.scale_factor",
    ]  # fmt: skip
    assert buffers(names, "state_dict/model.unet.") == {
        "betas": "state_dict/betas", "v_pred": "state_dict/model.v_pred",
        "scale_factor": "state_dict/model.unet.scale_factor",
    }  # fmt: skip


def test_endless_names_take_no_time():
    hostile = ["input_blocks0" * 80_000, "a." * 500_000 + "input_blocks.0.x", "_orig_mod." * 10**5]
    hostile.append("m." * 10**5 + "encoder.conv_in.weight")
    box = boxed([*hostile, *(f"net.{n}" for n in native_shapes(ADM))])
    found = unets(box)
    assert [p.prefix for p in found] == ["net."] and not autoencoders(box)
    assert sum(beside(box, found[0], found).values()) == len(hostile)


def test_an_autoencoder_is_found_under_any_prefix():
    inner = ["encoder.conv_in.weight", "decoder.conv_in.weight", "encoder.down_blocks.0.x.weight"]
    for prefix in ("", "vae.", "first_stage_model.", "a/b/module.net.", "_orig_mod.autoencoder."):
        box = boxed([prefix + n for n in inner] + ["opt/x", "text/encoder.layers.0.x", "betas"])
        assert choose(autoencoders(box), "autoencoder", box).names == {prefix + n: n for n in inner}
    box = boxed([p + n for n in inner for p in ("a/", "ema/")])
    assert choose(autoencoders(box), "autoencoder", box).prefix == "a/"
    box = boxed([p + n for n in inner for p in ("a.", "b.")])
    with pytest.raises(UserError, match="several autoencoders: a, b"):
        choose(autoencoders(box), "autoencoder", box)
    box = boxed(["unet." + n for n in native_shapes(ADM)])
    with pytest.raises(UserError, match="holds no autoencoder, but .* unet tensors"):
        choose(autoencoders(box), "autoencoder", box)
