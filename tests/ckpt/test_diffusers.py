"""U-Nets as diffusers writes and wrote them: one file without a config, names and details of its
first years, and what a config says beside the network."""

import json
from dataclasses import replace

import pytest
import torch
from checkpoints import SD, TINY, heads, inputs, same
from conftest import randomize
from safetensors.torch import load_file, save_file

from ckpt import convert, load_unet, save_unet
from ckpt.convert import inspect
from ckpt.diffusers import LIKE_HO, diffusers_config, from_diffusers_config
from ckpt.foreign import config_of
from ckpt.layouts import foreign_shapes, native_names, to_foreign
from harness.cli import UserError
from harness.files import Container, Entry
from model import PRESETS, UNet

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
# google/ddpm-cifar10-32, narrower: its config.json of July 2022.
GOOGLE = {
    "_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "act_fn": "silu",
    "attention_head_dim": None, "block_out_channels": [32, 64, 64], "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3,
    "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-06, "norm_num_groups": 32,
    "out_channels": 3, "sample_size": 32, "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip


def foreign_state(net):
    pairs = (to_foreign(net.cfg, "diffusers", k, v) for k, v in net.state_dict().items())
    return {name: tensor.contiguous() for some in pairs for name, tensor in some}


def old_names(tensors):
    def old(name):
        for new, was in OLD.items():
            name = name.replace(f".{new}.", f".{was}.")
        return name

    return {old(name): tensor for name, tensor in tensors.items()}


def folder_of(path, config, tensors):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    torch.save(tensors, path / "diffusion_pytorch_model.bin")
    return path


# ---- names and details of the first years -------------------------------------------------------


def test_googles_ddpm_is_read_under_the_names_of_its_time_and_computes_what_diffusers_does(
    tmp_path,
):
    diffusers = pytest.importorskip("diffusers", reason="pip install -r requirements-dev.txt")
    peer = randomize(diffusers.UNet2DModel.from_config(GOOGLE)).double()
    folder = folder_of(tmp_path / "ddpm", GOOGLE, old_names(peer.state_dict()))
    net, meta = load_unet(folder)
    assert net.cfg.like_ho and meta["diffusers"] == {"sample_size": 32}
    assert "like_ho=True" in "\n".join(inspect(folder))
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, 8, 16, dtype=torch.float64, generator=g)
    t = torch.tensor([0.0, 312.0, 999.0], dtype=torch.float64)
    with torch.no_grad():
        theirs = peer(x, t).sample
        assert theirs.std() > 0.1
        assert (net(x, t) - theirs).abs().max() < 1e-9 * theirs.abs().max()
        # Each of the details is seen: without them all it is another function.
        plain = UNet(replace(net.cfg, like_ho=False)).double()
        plain.load_state_dict(net.state_dict())
        assert (plain(x, t) - theirs).abs().max() > 1e-3 * theirs.abs().max()
    # And back: what is written is again a network of Google's kind to diffusers.
    convert(folder, tmp_path / "again", "diffusers")
    written = json.loads((tmp_path / "again/config.json").read_text())
    assert {key: written[key] for key in LIKE_HO} == {key: GOOGLE[key] for key in LIKE_HO}
    assert written["sample_size"] == 32
    back = load_file(tmp_path / "again/diffusion_pytorch_model.safetensors")
    assert same(back, peer.state_dict())


@pytest.mark.parametrize("key", LIKE_HO)
def test_some_of_googles_details_without_the_others_are_refused_by_name(key):
    half = GOOGLE | {key: diffusers_config(TINY["adm"])[key]}
    for name in LIKE_HO.keys() - {key}:
        with pytest.raises(UserError, match="|".join(LIKE_HO)):
            from_diffusers_config(half)
        assert from_diffusers_config(GOOGLE).like_ho and name in half
    alone = diffusers_config(TINY["sd15"]) | {key: GOOGLE[key]}
    with pytest.raises(UserError, match=f"{key} = {GOOGLE[key]}; this U-Net computes"):
        from_diffusers_config(alone)


def test_a_tensor_under_its_old_and_its_new_name_is_refused(tmp_path):
    net = randomize(UNet(from_diffusers_config(GOOGLE)))
    tensors = foreign_state(net)
    twice = next(name for name in tensors if name.endswith(".to_q.weight"))
    old = old_names(tensors)
    folder = folder_of(tmp_path / "two", GOOGLE, old | {twice: tensors[twice]})
    with pytest.raises(UserError, match=r"query\.weight"):
        load_unet(folder)
    assert same(load_unet(folder_of(tmp_path / "old", GOOGLE, old))[0], net)


# ---- one file without a config ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "sdxl-refiner"])
@pytest.mark.parametrize("in_channels", [4, 9])
def test_names_and_shapes_are_enough_where_the_family_fixes_the_heads(name, in_channels, tmp_path):
    cfg = replace(PRESETS[name], in_channels=in_channels)
    shapes = foreign_shapes(cfg, "diffusers")
    table = {k: Entry(torch.float16, shape, None) for k, shape in shapes.items()}
    box = Container(tmp_path / "lightning.safetensors", "safetensors", table, {})
    assert config_of(native_names(box), {}) == cfg
    for wrong in ({"num_heads": 5}, {"num_head_channels": 40}):
        with pytest.raises(UserError, match="Leave it out"):
            config_of(native_names(box), wrong)


def test_where_the_family_is_unknown_the_heads_are_asked_for(tmp_path):
    net = randomize(UNet(SD))
    file = tmp_path / "unet.safetensors"
    save_file(foreign_state(net), file)
    with pytest.raises(UserError, match="attention heads.*Add --num-heads or --num-head-channels"):
        load_unet(file)
    assert "heads (--num-heads or --num-head-channels)" in "\n".join(inspect(file))
    assert "like_ho" not in "\n".join(inspect(file))
    again, meta = load_unet(file, num_heads=SD.num_heads)
    assert same(again, net) and again.cfg == SD and meta["layout"] == "diffusers"
    assert torch.equal(again(*inputs(SD)), net(*inputs(SD)))
    mark = convert(file, tmp_path / "ldm.safetensors", "native", num_heads=SD.num_heads)
    assert mark == meta["fingerprint"]


def test_a_config_of_something_else_beside_it_is_not_passed_over(tmp_path):
    file = tmp_path / "unet.safetensors"
    save_file(foreign_state(randomize(UNet(SD))), file)
    for other in ({"model_type": "clip"}, {"_class_name": "AutoencoderKL"}, []):
        (tmp_path / "config.json").write_text(json.dumps(other))
        with pytest.raises(UserError, match="config.json: .*move its file away from another's"):
            load_unet(file, num_heads=SD.num_heads)
    (tmp_path / "config.json").write_text(json.dumps(diffusers_config(replace(SD, num_heads=4))))
    assert load_unet(file)[0].cfg.num_heads == 4  # what stands beside it is believed
    with pytest.raises(UserError, match="got num_heads 2"):
        load_unet(file, num_heads=2)


def test_a_file_of_unet2dmodel_without_its_config_asks_for_it(tmp_path):
    net = randomize(UNet(TINY["adm"]))
    for tensors in (foreign_state(net), old_names(foreign_state(net))):
        save_file(tensors, tmp_path / "adm.safetensors")
        with pytest.raises(
            UserError, match="needs diffusers' config.json beside it.*Copy it there"
        ):
            load_unet(tmp_path / "adm.safetensors", **heads(net.cfg))


def test_what_is_no_whole_u_net_is_refused_by_name_and_at_once(tmp_path):
    tensors = foreign_state(randomize(UNet(SD)))
    one = torch.zeros(1)
    middle = {k: v for k, v in tensors.items() if not k.startswith("mid_block.")}
    first = next(k for k in tensors if k.startswith("down_blocks.0.resnets.0."))
    many = {f"down_blocks.{i}.resnets.0.conv1.weight": one.clone() for i in range(999)}
    for changed, message in (
        (tensors | {"time_embedding.cond_proj.weight": one}, "cond_proj"),
        (tensors | {"down_blocks.0.motion_modules.0.proj_in.weight": one}, "motion_modules"),
        ({k: v for k, v in tensors.items() if k != first}, "in_layers|resnets.0"),
        (middle, "middle_block|mid_block"),
        (tensors | many, "999 levels of 1 blocks"),
    ):
        save_file(changed, tmp_path / "unet.safetensors")
        with pytest.raises(UserError, match=message):
            load_unet(tmp_path / "unet.safetensors", num_heads=2)


# ---- what a config says beside the network ------------------------------------------------------


def test_what_a_config_says_beside_the_network_survives_every_layout(tmp_path):
    net = randomize(UNet(SD))
    aside = {"sample_size": 96, "upcast_attention": True, "num_train_timesteps": None}
    folder = folder_of(tmp_path / "unet", diffusers_config(SD) | aside, foreign_state(net))
    convert(folder, tmp_path / "fp16", "diffusers", "fp16")
    convert(folder, tmp_path / "one.safetensors", "native")
    convert(tmp_path / "one.safetensors", tmp_path / "back", "diffusers")
    for name in ("fp16", "back"):
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert written == diffusers_config(SD) | aside
        assert from_diffusers_config(written) == SD
    # Metadata is anybody's: it changes nothing else of a config, and nothing that cannot be.
    save_unet(
        tmp_path / "a.safetensors", net, {"diffusers": {"in_channels": 9, "sample_size": [64, 32]}}
    )
    convert(tmp_path / "a.safetensors", tmp_path / "a", "diffusers")
    written = json.loads((tmp_path / "a/config.json").read_text())
    assert written == diffusers_config(SD) | {"sample_size": [64, 32]}
    for odd in ("96", -1, 10**9, [1, 2, 3], {"a": 1}, 0.5):
        (folder / "config.json").write_text(json.dumps(diffusers_config(SD) | {"sample_size": odd}))
        with pytest.raises(UserError, match="config has sample_size = .*wanted a number"):
            load_unet(folder)
