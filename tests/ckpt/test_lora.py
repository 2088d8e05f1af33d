"""LoRA merged into weights, against peft and diffusers, and what is refused."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import samplers
from ckpt import load_unet
from ckpt.lora import flat, merge_texts, merge_unet, place_of, read_lora, read_spec
from harness.cli import UserError
from model import PRESETS, UNet
from text import open_texts

pytest.importorskip("diffusers", reason="diffusers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
import pipelines  # noqa: E402


@pytest.fixture(scope="module")
def sd1():
    """(a miniature pipeline of diffusers, its folder)."""
    return pipelines.made("sd1")


def random_lora(shapes, rank=3, alpha=None):
    """{module: tensors} of kohya's roles."""
    g = torch.Generator().manual_seed(0)
    noise = lambda *shape: torch.randn(*shape, generator=g) * 0.1  # noqa: E731
    found = {}
    for module, shape in shapes.items():
        ones = (1, 1) if len(shape) == 4 else ()
        found[f"{module}.lora_down.weight"] = noise(rank, *shape[1:])
        found[f"{module}.lora_up.weight"] = noise(shape[0], rank, *ones)
        if alpha is not None:
            found[f"{module}.alpha"] = torch.tensor(float(alpha))
    return found


def weights_of(net, words):
    """{module: shape} of the weights of a diffusers or transformers network whose names have one
    of these words."""
    return {
        name.removesuffix(".weight"): tuple(p.shape)
        for name, p in net.named_parameters()
        if name.endswith(".weight") and p.ndim > 1 and any(word in name for word in words)
    }


UNET = ("attn1.to_q", "attn2.to_v", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "emb_proj")


def kohya(pipe, path):
    """A LoRA of kohya's names, of linear layers, convolutions and the text encoder."""
    shapes = {
        f"lora_unet_{name.replace('.', '_')}": shape
        for name, shape in weights_of(pipe.unet, UNET).items()
    }
    shapes |= {
        f"lora_te_text_model_{name.removeprefix('text_model.').replace('.', '_')}": shape
        for name, shape in weights_of(pipe.text_encoder, ("q_proj", "fc1")).items()
    }
    save_file(random_lora(shapes, alpha=2), path)
    return path


def fused(sd1, path, scale):
    """The U-Net of diffusers' own merge."""
    from diffusers import StableDiffusionPipeline

    # Not read again: most of a file is its vocabulary.
    own = {"text_encoder": deepcopy(sd1[0].text_encoder), "tokenizer": sd1[0].tokenizer}
    pipe = StableDiffusionPipeline.from_pretrained(sd1[1], safety_checker=None, **own)
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()
    return pipe.unet


def same_as(sd1, path, scale, folder):
    """Merge, and compare every weight with diffusers'; how many were changed."""
    fused(sd1, path, scale).save_pretrained(folder)
    (net, _), (wanted, _), (before, _) = (load_unet(f) for f in (sd1[1], folder, sd1[1]))
    merge_unet(net, read_lora(path), scale)
    own, theirs, old = net.state_dict(), wanted.state_dict(), before.state_dict()
    for name, value in own.items():
        assert (value - theirs[name]).abs().max() <= 1e-6 * theirs[name].abs().max(), name
    return {name for name in own if not torch.equal(own[name], old[name])}


def test_kohyas_file_is_merged_as_diffusers_merges_it(sd1, tmp_path):
    path = kohya(sd1[0], tmp_path / "kohya.safetensors")
    changed = same_as(sd1, path, 0.7, tmp_path / "merged")
    assert len(changed) == len(weights_of(sd1[0].unet, UNET))


def test_pefts_file_is_merged_as_diffusers_merges_it(sd1, tmp_path):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from peft.utils import get_peft_model_state_dict

    net = UNet2DConditionModel.from_pretrained(sd1[1], subfolder="unet")
    cfg = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_out.0", "conv1"])
    net.add_adapter(cfg)
    torch.manual_seed(1)
    for name, p in net.named_parameters():
        if "lora_" in name:
            p.data.normal_(0, 0.1)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(net), unet_lora_adapter_metadata=cfg.to_dict()
    )
    changed = same_as(sd1, tmp_path / "pytorch_lora_weights.safetensors", 1.0, tmp_path / "merged")
    assert len(changed) == sum("lora_A" in name for name, _ in net.named_parameters())


def test_the_change_is_the_product(sd1, tmp_path):
    net, _ = load_unet(sd1[1])
    before = {name: p.clone() for name, p in net.named_parameters()}
    path = kohya(sd1[0], tmp_path / "kohya.safetensors")
    lora = read_lora(path)
    merge_unet(net, lora, 0.5)
    low = lora.parts["unet"]["down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"]
    name = "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    change = low.up.double() @ low.down.double() * (0.5 * 2 / 3)
    own = dict(net.named_parameters())[name]
    assert torch.allclose(own - before[name], change.float(), atol=1e-6)
    merge_unet(net, lora, -0.5)
    for name, p in net.named_parameters():
        assert torch.allclose(p, before[name], atol=1e-5)


def test_text_encoders_are_changed_by_the_product(sd1, tmp_path):
    """By the formula: diffusers leaves transformers 5's encoders as they are."""
    (encoder,), (before,) = (open_texts(sd1[1]).encoders for _ in range(2))
    lora = read_lora(kohya(sd1[0], tmp_path / "kohya.safetensors"))
    merge_texts([encoder], lora, 0.5)
    old = dict(before.named_parameters())
    moved = set()
    for name, p in encoder.named_parameters():
        low = lora.parts["text 1"].get("text_model_" + flat(name))
        low = None if name.endswith("bias") else low
        change = 0.0
        if low:
            change = (low.up.double() @ low.down.double() * (0.5 * 2 / 3)).float()
            moved.add(name)
        assert torch.allclose(p - old[name], torch.as_tensor(change), atol=1e-6), name
    assert len(moved) == len(lora.parts["text 1"]) == 4


def test_ldms_names_are_known_too(sd1, tmp_path):
    net, _ = load_unet(sd1[1])
    module = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    weight = dict(net.named_parameters())[f"{module}.weight"]
    save_file(
        random_lora({f"lora_unet_{module.replace('.', '_')}": tuple(weight.shape)}),
        tmp_path / "ldm.safetensors",
    )
    before = weight.clone()
    merge_unet(net, read_lora(tmp_path / "ldm.safetensors"))
    assert not torch.equal(weight, before)


def broken(path, change):
    tensors = random_lora({"lora_unet_conv_in": (32, 4, 3, 3)}, alpha=1)
    change(tensors)
    save_file(tensors, path)
    return path


TES = ("te", "te1")
UP, DOWN = "lora_unet_conv_in.lora_up.weight", "lora_unet_conv_in.lora_down.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(UP), "has only alpha, down"),
        (lambda t: t.update({UP: torch.zeros(32, 2, 1, 1)}), "wanted (r, in) and (out, r)"),
        (lambda t: t.update({"x.hada_w1_a": torch.zeros(1)}), "is of LoHa"),
        (lambda t: t.update({"lora_unet_conv_in.dora_scale": torch.zeros(1)}), "is of DoRA"),
        (lambda t: t.update({"model.bias": torch.zeros(1)}), "is no part of a LoRA"),
        (lambda t: t.update({"lora_unet_conv_in.alpha": torch.tensor(torch.nan)}), "alpha is nan"),
        (lambda t: t.update({"lora_unet_conv_in.alpha": torch.ones(2)}), "alpha is [1.0, 1.0]"),
        (lambda t: t.update({"base_model.model.a.lora_A.weight": torch.ones(2, 2)}), "peft's own"),
        (lambda t: t.update({f"lora_{te}_a.alpha": torch.ones(1) for te in TES}), "twice"),
        (lambda t: t.clear() or t.update({"a": torch.zeros(1)}), "is no part of a LoRA"),
    ],
)
def test_files_that_are_not_understood_are_refused(tmp_path, change, message):
    with pytest.raises(UserError) as error:
        read_lora(broken(tmp_path / "a.safetensors", change))
    assert message in str(error.value)


def test_loras_of_other_networks_are_refused_and_change_nothing(sd1, tmp_path):
    net, _ = load_unet(sd1[1])
    before = {name: p.clone() for name, p in net.named_parameters()}
    other = {"lora_unet_conv_in": (32, 4, 3, 3), "lora_unet_conv_far": (32, 4)}
    save_file(random_lora(other), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="no module 'conv_far'"):
        merge_unet(net, read_lora(tmp_path / "a.safetensors"))
    save_file(random_lora({"lora_unet_conv_in": (32, 9, 3, 3)}), tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"is \(32, 9, 3, 3\), the weight \(32, 4, 3, 3\)"):
        merge_unet(net, read_lora(tmp_path / "b.safetensors"))
    second = {"lora_te2_text_model_encoder_layers_0_mlp_fc1": (8, 8)}
    save_file(random_lora(second), tmp_path / "c.safetensors")
    with pytest.raises(UserError, match="changes 2 text encoders, and there is one"):
        merge_texts(open_texts(sd1[1]).encoders, read_lora(tmp_path / "c.safetensors"))
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


@pytest.mark.parametrize(
    "spec, wanted",
    [("a.safetensors", ("a.safetensors", 1.0)), ("a.safetensors:0.5", ("a.safetensors", 0.5)),
     ("dir:x/a.safetensors", ("dir:x/a.safetensors", 1.0)), ("a:-1", ("a", -1.0))],
)  # fmt: skip
def test_a_strength_stands_behind_a_colon(spec, wanted):
    path, scale = read_spec(spec)
    assert (str(path), scale) == wanted


def test_the_sampler_takes_them(sd1, tmp_path, user):
    path = kohya(sd1[0], tmp_path / "kohya.safetensors")
    flags = ("--ckpt", sd1[1], "--prompt", "a cat", "--resolution", 64, "--steps", 2, "--n", 1)
    pictures = {}
    for name, more in {"none": (), "0": (f"{path}:0",), "1": (str(path),)}.items():
        more = ("--lora", *more) if more else ()
        out = tmp_path / name
        code, _, err = user(samplers.main, *flags, *more, "--out", out)
        assert code == 0, err
        pictures[name] = np.asarray(Image.open(out / "000000.png")).astype(int)
    assert (pictures["none"] == pictures["0"]).all()
    assert (pictures["none"] != pictures["1"]).mean() > 0.5
    code, _, err = user(samplers.main, *flags, "--lora", tmp_path / "nowhere.safetensors")
    assert code == 2 and "no such file" in err[-1]


@pytest.mark.parametrize("alpha", ["null", '"x"', "[1]"])
def test_a_header_that_says_no_number_is_refused(tmp_path, alpha):
    tensors = random_lora({"unet.conv_in": (32, 4, 3, 3)})
    names = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    for ours, theirs in names.items():
        tensors[f"unet.conv_in.{theirs}"] = tensors.pop(f"unet.conv_in.{ours}")
    meta = {"lora_adapter_metadata": f'{{"unet.lora_alpha": {alpha}}}'}
    save_file(tensors, tmp_path / "a.safetensors", meta)
    with pytest.raises(UserError, match="alpha of unet is .* wanted a number"):
        read_lora(tmp_path / "a.safetensors")


def test_names_of_the_first_processors_are_read():
    place = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor"
    module = "down_blocks_0_attentions_0_transformer_blocks_0_attn1"
    down, up = "to_q_lora.down.weight", "to_out_lora.up.weight"
    assert place_of(f"{place}.{down}", "a") == ("unet", f"{module}_to_q", "down")
    assert place_of(f"{place}.{up}", "a") == ("unet", f"{module}_to_out_0", "up")


def test_a_change_of_as_many_numbers_but_another_shape_is_refused(tmp_path):
    like = {"in_channels": 1, "out_channels": 1, "context_dim": 8, "resblock_updown": False}
    net = UNet(replace(PRESETS["nano"], **like))
    wrong = random_lora({"lora_unet_conv_in": (net.cfg.model_channels, 9, 1, 1)})
    save_file(wrong, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="the weight"):
        merge_unet(net, read_lora(tmp_path / "a.safetensors"))
