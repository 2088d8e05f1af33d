"""What inspect says of drawing: which text encoders a file has or lacks, and the command."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ckpt.convert import inspect
from ckpt.usual import as_usual, encoder_files, shown_encoders, usual_side
from model import UNet, UNetConfig

SHAPE = dict(channel_mult=(1,), attention=(1,), num_res_blocks=1)
SD1 = UNetConfig(4, 4, 32, **SHAPE, context_dim=768, num_heads=8)
SD2 = UNetConfig(4, 4, 64, **SHAPE, context_dim=1024, num_head_channels=64, linear_projection=True)
SDXL = UNetConfig(
    4, 4, 64, **SHAPE, context_dim=2048, vector_dim=2816, num_head_channels=64,
    linear_projection=True,
)  # fmt: skip
WIDE = {"num_head_channels": 64}
L = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
XL = "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"
G = "conditioner.embedders.1.model."
VAE = {"first_stage_model.encoder.conv_in.weight": torch.zeros(1)}
CLIP_L, CLIP_XL = {L: torch.zeros(9, 768)}, {XL: torch.zeros(9, 768)}
BIGG = {
    f"{G}token_embedding.weight": torch.zeros(9, 1280),
    f"{G}positional_embedding": torch.zeros(77, 1280),
}
BARE = "python samplers.py --ckpt {} "
PROMPT = '--prompt "a photo of a cat" --cfg 7'


def lines(path, cfg, beside, **known):
    """{name: text} of inspect(), of a file with a U-Net and other tensors."""
    state = UNet(cfg).state_dict()
    tensors = {f"model.diffusion_model.{name}": v.contiguous() for name, v in state.items()}
    save_file({**tensors, **beside}, path)
    return {line[:12].strip(): line[13:] for line in inspect(str(path), **known)}


@pytest.mark.parametrize(
    "cfg, beside, told, missing, flags",
    [
        (SD1, VAE | CLIP_L, "ViT-L (cond_stage_model.transformer)", "nothing", ""),
        (SD1, VAE, None, "text encoders (--text): ViT-L (clip_l.safetensors)",
         "--text clip_l.safetensors "),
        (SD1, CLIP_L, "ViT-L (cond_stage_model.transformer)", "autoencoder (--vae)",
         "--vae sd "),
        (SDXL, VAE | CLIP_XL | BIGG,
         "ViT-L (conditioner.embedders.0.transformer), ViT-bigG (conditioner.embedders.1.model)",
         "nothing", ""),
        (SDXL, VAE | CLIP_XL, "ViT-L (conditioner.embedders.0.transformer)",
         "text encoders (--text): ViT-L and ViT-bigG (clip_l.safetensors,clip_g.safetensors)",
         "--text clip_l.safetensors,clip_g.safetensors "),
        (SDXL, {}, None, "autoencoder (--vae); text encoders (--text): ViT-L and ViT-bigG",
         "--vae sdxl --text clip_l.safetensors,clip_g.safetensors "),
    ],
)  # fmt: skip
def test_inspect_says_which_encoders_a_file_has_and_the_command(
    tmp_path, cfg, beside, told, missing, flags
):
    path = tmp_path / "my model.safetensors"
    heads = {"num_heads": 8} if cfg is SD1 else WIDE
    shown = lines(path, cfg, beside, **heads)
    assert shown.get("told by") == told
    assert shown["missing"].startswith(missing)
    own = "--num-heads 8 " if cfg is SD1 else "--num-head-channels 64 "
    assert shown["draw"] == BARE.format(f"'{path}'") + own + flags + PROMPT
    said = "nothing of its objective eps and noise schedule scaled_linear: as all of its family"
    assert shown["it says"] == said


def test_a_pipeline_without_all_of_its_encoders_is_inspected_too(tmp_path):
    (tmp_path / "unet").mkdir()
    index = {"text_encoder": ["transformers", "A"], "text_encoder_2": ["transformers", "B"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    shown = lines(path, SDXL, {}, **WIDE)
    assert "told by" not in shown and "ViT-L and ViT-bigG" in shown["missing"]
    (tmp_path / "text_encoder").mkdir()
    words = {L.partition("transformer.")[2]: torch.zeros(9, 768)}
    save_file(words, tmp_path / "text_encoder" / "model.safetensors")
    shown = lines(path, SDXL, {}, **WIDE)
    assert shown["told by"] == "ViT-L (text_encoder)" and "--text clip_l" in shown["draw"]


@pytest.mark.parametrize("shape", [(), (9,), (9, 768, 1)])
def test_an_encoder_of_a_strange_shape_is_none(tmp_path, shape):
    shown = lines(tmp_path / "a.safetensors", SD1, {L: torch.zeros(shape)}, num_heads=8)
    assert "told by" not in shown and "ViT-L (clip_l.safetensors)" in shown["missing"]


def test_what_has_no_usual_answer_is_missing_and_there_is_no_command(tmp_path):
    path = tmp_path / "a.safetensors"
    shown = lines(path, SD2, VAE, **WIDE)
    assert shown["missing"].startswith("objective (--objective)")
    assert "text encoders (--text): ViT-H, of any Stable Diffusion 2.x" in shown["missing"]
    assert "draw" not in shown
    shown = lines(path, SD2, VAE, objective="v", **WIDE)
    flags = "--objective v --num-head-channels 64 --text FILE"
    assert shown["draw"] == f"{BARE.format(path)}{flags} {PROMPT}"


@pytest.mark.parametrize(
    "meta, table, wanted, said",
    [
        ({"family": "sd1"}, "", ("eps", "scaled_linear"), "objective eps and noise schedule"),
        ({"family": "sdxl", "objective": "v"}, "", ("v", "scaled_linear"), "noise schedule"),
        ({"family": "sd2"}, "", (None, None), ""),
        ({"family": "sd2", "objective": "v"}, "", ("v", "scaled_linear"), "noise schedule"),
        ({"family": "sd1", "objective": "fm"}, "", ("fm", None), ""),
        ({"family": "sd1"}, "linear", ("eps", None), "objective eps"),
        ({"family": "sd1", "schedule": {"table": "linear"}}, "", ("eps", "linear"), "objective"),
        ({"family": "adm"}, "", (None, None), ""),
        ({"objective": {"name": "fm"}, "family": "sd1"}, "", ({"name": "fm"}, None), ""),
    ],
)
def test_only_what_a_family_has_alike_is_added_and_that_is_said(meta, table, wanted, said):
    before = dict(meta)
    usual, words = as_usual(meta, table)
    assert (usual.get("objective"), usual.get("schedule", {}).get("table")) == wanted
    assert words.startswith(said) and bool(words) == bool(said)
    assert meta == before


def test_sides_and_encoders_of_the_families():
    sides = {("sd1", "eps"): 512, ("sd2", "eps"): 512, ("sd2", "v"): 768, ("sdxl", "v"): 1024}
    assert {key: usual_side({"family": key[0]}, key[1]) for key in sides} == sides
    assert usual_side({}, "eps") == usual_side({"family": "sd2"}, "fm") == 0
    assert shown_encoders(24) == "text encoders 24 wide" and encoder_files(24) == ""
