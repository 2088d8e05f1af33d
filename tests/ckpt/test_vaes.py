"""Autoencoders in other people's files: names, shapes and families, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoencoders import FULL, SMALL, peer, saved, small, tensors_of
from ckpt.containers import open_weights
from ckpt import read_tensors
from ckpt.vaes import vae_map
from harness.cli import UserError
from vae import VAE, load_vae, save_vae, tensor_shapes, vae_from_meta


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, keys, params, buffers",
    [("sd", 248, 83_653_863, 0), ("flux1", 244, 83_819_683, 0), ("flux2", 251, 84_046_115, 257)],
)
def test_full_size_counts_and_names(family, keys, params, buffers):
    with torch.device("meta"):
        net = VAE(FULL[family], family)
    assert (
        len(net.state_dict()) == keys
        and sum(p.numel() for p in net.parameters()) == params
        and sum(b.numel() for b in net.buffers()) == buffers
    )
    peer(net)  # asserts that diffusers has exactly our translated names and shapes
    native = set(vae_map(tensor_shapes(net.cfg), "native"))
    assert {
        "encoder.down.2.block.1.norm1.weight",
        "encoder.down.0.downsample.conv.bias",
        "encoder.mid.attn_1.proj_out.weight",
        "decoder.up.3.block.2.conv2.weight",
        "decoder.up.1.upsample.conv.weight",
        "decoder.norm_out.bias",
    } <= native
    bfl = {name for name, _ in vae_map(tensor_shapes(net.cfg), "bfl").values()}
    moved = {
        f"{part}.{name}.{leaf}"
        for part, name in (("encoder", "quant_conv"), ("decoder", "post_quant_conv"))
        for leaf in ("weight", "bias")
    }
    assert bfl - native == (moved if net.cfg.quant else set())


@pytest.mark.parametrize("cfg", [FULL["sd"], FULL["flux1"]], ids=["sd", "flux1"])
def test_names_agree_with_diffusers_converter(cfg):
    """Every tensor is a constant of its own; both converters put it in the same place."""
    pytest.importorskip("diffusers", reason="oracle: pip install -r requirements-dev.txt")
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    native = {k: shape for k, (_, shape) in vae_map(tensor_shapes(cfg), "native").items()}
    tags = {
        k: torch.full([1] * len(shape), float(i)) for i, (k, shape) in enumerate(native.items())
    }
    theirs = convert_ldm_vae_checkpoint(
        {f"first_stage_model.{k}": v for k, v in tags.items()},
        {"down_block_types": [""] * 4, "up_block_types": [""] * 4},
    )
    ours = {
        name: float(tags[k]) for k, (name, _) in vae_map(tensor_shapes(cfg), "diffusers").items()
    }
    assert ours == {k: float(v) for k, v in theirs.items()}


@pytest.mark.parametrize("layout", ["native", "diffusers", "bfl"])
@pytest.mark.parametrize("family", SMALL)
def test_every_layout_loads_and_is_written_back_bit_for_bit(tmp_path, family, layout):
    net = small(family)
    file = saved(tmp_path / "a.safetensors", net, layout)
    loaded = load_vae(file, family)
    assert loaded.cfg == net.cfg and all(
        torch.equal(v, net.state_dict()[k]) for k, v in loaded.state_dict().items()
    )
    save_vae(tmp_path / "b.safetensors", loaded, layout)
    a, b = open_weights(file), open_weights(tmp_path / "b.safetensors")
    assert a.header() == b.header() and all(torch.equal(a[k], b[k]) for k in a)
    own = load_vae(tmp_path / "b.safetensors")  # our file says what it is
    assert own.family == family and own.fingerprint == loaded.fingerprint == net.fingerprint
    assert {
        k: read_tensors(tmp_path / "b.safetensors")[1][k] for k in ("kind", "family", "layout")
    } == {"kind": "vae", "family": family, "layout": layout}
    whole = (tmp_path / "b.safetensors").read_bytes()
    (tmp_path / "c.safetensors").write_bytes(
        whole[:-1] + bytes([whole[-1] ^ 1])
        if family != "flux2"
        else whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    )
    with pytest.raises(UserError, match="do not match their own fingerprint"):
        load_vae(tmp_path / "c.safetensors")
    with pytest.raises(UserError, match=f"says it is {family}, got"):
        load_vae(tmp_path / "b.safetensors", "flux1" if family != "flux1" else "sd")


def test_old_diffusers_names_and_half_precision_files(tmp_path):
    net = small("sd").half()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for k, (name, shape) in vae_map(tensor_shapes(net.cfg), "diffusers").items():
        for new, was in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{was}.")
        tensors[name] = net.state_dict()[k].reshape(shape)
    assert sum("query" in k or "proj_attn" in k for k in tensors) == 8
    torch.save({"state_dict": tensors}, tmp_path / "old.ckpt")
    loaded = load_vae(f"sd:{tmp_path / 'old.ckpt'}")
    assert loaded.dtype == torch.float32 and loaded.fingerprint == net.float().fingerprint
    with pytest.raises(UserError, match="holds no autoencoder"):  # a name twice, old and new
        torch.save(
            {**tensors, "encoder.mid_block.attentions.0.to_q.weight": torch.zeros(128, 128)},
            tmp_path / "two.ckpt",
        )
        load_vae(f"sd:{tmp_path / 'two.ckpt'}")


@pytest.mark.parametrize(
    "prefix, beside",
    [
        (
            "first_stage_model.",
            [
                "model.diffusion_model.input_blocks.0.0.weight",
                "cond_stage_model.x",
                "betas",
                "model_ema.decay",
            ],
        ),
        ("vae.", ["text_encoders.x"]),
        ("first_stage_model.", []),
        ("module.", []),
        ("", ["loss.logvar", "loss.discriminator.main.0.weight"]),
    ],
)
def test_the_autoencoder_is_found_inside_larger_files(tmp_path, prefix, beside):
    net = small("sdxl")
    rest = {k: torch.zeros(1) for k in beside}
    torch.save(
        {"state_dict": {**{prefix + k: v for k, v in net.state_dict().items()}, **rest}},
        tmp_path / "sd.ckpt",
    )
    assert load_vae(f"sdxl:{tmp_path / 'sd.ckpt'}").fingerprint == net.fingerprint
    torch.save(
        {
            **{prefix + k: v for k, v in net.state_dict().items()},
            **rest,
            prefix * (prefix == "module.") + "vea.x": torch.zeros(1),
        },
        tmp_path / "odd.ckpt",
    )
    if prefix in ("", "module."):  # it is in the network itself
        with pytest.raises(UserError, match="1 unexpected: vea.x"):
            load_vae(f"sdxl:{tmp_path / 'odd.ckpt'}")
    else:
        assert load_vae(f"sdxl:{tmp_path / 'odd.ckpt'}").fingerprint == net.fingerprint


def test_a_flux2_file_may_lack_the_batch_count_and_nothing_else(tmp_path):
    net = small("flux2")
    state = {k: v for k, v in net.state_dict().items() if k != "bn.num_batches_tracked"}
    torch.save(state, tmp_path / "f.pt")
    loaded = load_vae(tmp_path / "f.pt")
    assert (
        loaded.family == "flux2"
        and loaded.latents == "unpacked32"
        and loaded.fingerprint == net.fingerprint
        and loaded.bn.num_batches_tracked == 0
    )
    torch.save({k: v for k, v in state.items() if k != "bn.running_var"}, tmp_path / "g.pt")
    with pytest.raises(UserError, match="1 missing: bn.running_var"):
        load_vae(tmp_path / "g.pt")


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: s.pop("decoder.up.2.block.1.norm2.weight"),
            "1 missing: decoder.up.2.block.1.norm2.weight",
        ),
        (
            lambda s: s.pop("encoder.down.3.block.0.conv1.weight"),
            "1 missing: encoder.down.3.block.0.conv1.weight",
        ),
        (
            lambda s: s.update({"decoder.extra.weight": torch.zeros(1)}),
            "1 unexpected: decoder.extra.weight",
        ),
        (
            lambda s: s.update({"encoder.mid.attn_1.q.weight": torch.zeros(128, 64)}),
            r"1 of another shape: encoder.mid.attn_1.q.weight \(128, 64, 1, 1\)",
        ),
        (
            lambda s: s.update({"encoder.conv_in.weight": torch.zeros(32, 4, 3, 3)}),
            "1 of another shape: encoder.conv_in.weight",
        ),
        (lambda s: s.pop("decoder.conv_in.weight"), "no autoencoder has"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("decoder.up")], "no autoencoder has"),
        (lambda s: s.pop("encoder.conv_in.weight"), "holds no autoencoder"),
        (
            lambda s: s.update({"encoder.quant_conv.weight": s["quant_conv.weight"]}),
            "of another architecture",
        ),
    ],
    ids=[
        "missing",
        "missing width",
        "extra",
        "narrow attention",
        "4 colours",
        "no latents",
        "no decoder",
        "no encoder",
        "two layouts",
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, change, message):
    state = dict(small("sd").state_dict())
    change(state)
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=message) as info:
        load_vae(tmp_path / "bad.pt", "sd")
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "family, config, given, message",
    [
        (
            "sd",
            None,
            None,
            "4 latent channels. can be sd or sdxl or sdxl-fp16-fix.  What it is .* say it: --vae "
            "FAMILY:FILE",
        ),
        ("flux1", None, None, "can be flux1 or sd3.*--vae FAMILY:FILE"),
        ("sd", None, "flux1", "can be sd or .*, not flux1"),
        ("flux2", None, "sd", "running statistics. can be flux2, not sd"),
        ("sd", '{"scaling_factor": 0.13025}', "sd", "0.13025. can be sdxl or .*, not sd"),
        (
            "sd",
            '{"scaling_factor": 0.13025}',
            "flux1",
            "scaling_factor 0.13025. can be sdxl .* not",
        ),
        ("sd", '{"scaling_factor": 0.13025}', None, "sdxl or sdxl-fp16-fix"),
        ("sd", '{"scaling_factor": 0.18215}', None, ""),
        ("flux1", '{"scaling_factor": 0.3611}', None, ""),
        ("flux2", "[]", None, ""),
    ],
)
def test_families_are_asked_for_not_guessed(tmp_path, family, config, given, message):
    file = saved(tmp_path / "f.safetensors", small(family))
    if config:
        (tmp_path / "config.json").write_text(config)
    if not message:
        assert load_vae(file, given).family == family
        return
    with pytest.raises(UserError, match=message):
        load_vae(file, given)


# ---- whose constants ----------------------------------------------------------------------------

EDM = {
    "edm_mean": torch.tensor([-1.6574, 1.886, -1.383, 2.5155]).view(1, 4, 1, 1),
    "edm_std": torch.tensor([8.4927, 5.9022, 6.5498, 5.2299]).view(1, 4, 1, 1),
}
KL = '{"_class_name": "AutoencoderKL"%s}'
LIST = ', "scaling_factor": 0.5, "latents_mean": [1, 2, 3, 4], "latents_std": [5, 6, 7, 8]'


def expected(net, x, scale, means=0.0, stds=1.0):
    means, stds = (torch.as_tensor(v).view(-1, 1, 1) for v in (means, stds))
    return (net.moments(x)[0] - means) * scale / stds


@pytest.mark.parametrize(
    "given, config, beside, scale, means, stds",
    [
        ("sdxl", None, EDM, 0.5, EDM["edm_mean"], EDM["edm_std"]),
        (None, None, EDM, 0.5, EDM["edm_mean"], EDM["edm_std"]),
        (None, KL % LIST, {}, 0.5, [1.0, 2, 3, 4], [5.0, 6, 7, 8]),
        ("sdxl", KL % LIST, {}, 0.5, [1.0, 2, 3, 4], [5.0, 6, 7, 8]),
        (None, KL % ', "scaling_factor": 0.2, "shift_factor": 0.1', {}, 0.2, 0.1, 1.0),
        ("sdxl", KL % ', "scaling_factor": 0.2', {}, 0.2, 0.0, 1.0),
        (None, KL % "", {}, 0.18215, 0.0, 1.0),
        (None, None, {"scale_factor": torch.tensor(0.22765929)}, 0.22765929, 0.0, 1.0),
        (None, KL % "", {"scale_factor": torch.tensor(0.18215)}, 0.18215, 0.0, 1.0),
    ],
)
@torch.no_grad()
def test_latents_are_normalised_as_the_file_says(
    tmp_path, given, config, beside, scale, means, stds
):
    """Whatever the family's name: the constants in a file, or beside it, are those its networks
    were trained with."""
    net, x = small("sd"), torch.rand(1, 3, 32, 32) * 2 - 1
    file = tmp_path / "f.safetensors"
    state = {**tensors_of(net, "native"), **beside}
    save_file({k: v.contiguous() for k, v in state.items()}, file)
    if config:
        (tmp_path / "config.json").write_text(config)
    vae = load_vae(file, given)
    latents = vae.encode(x)
    torch.testing.assert_close(latents, expected(net, x, scale, means, stds))
    torch.testing.assert_close(
        vae.decode(latents), net.decoder(net.post_quant_conv(vae.moments(x)[0]))
    )
    # The constants travel with the autoencoder, and tell it from its family's.
    (tmp_path / "copy").mkdir()
    save_vae(tmp_path / "copy" / "own.safetensors", vae)
    save_vae(tmp_path / "copy" / "note.safetensors", vae, weights=False)
    meta = json.loads(json.dumps(vae.meta()))
    for again in (
        load_vae(tmp_path / "copy" / "own.safetensors"),
        load_vae(tmp_path / "copy" / "note.safetensors"),
        vae_from_meta(meta),
    ):
        assert torch.equal(again.encode(x), latents)
        assert (
            again.fingerprint == vae.fingerprint
            and again.meta()["normalisation"] == meta["normalisation"]
        )
    plain = scale == 0.18215
    assert (vae.fingerprint == net.fingerprint) == plain
    assert vae.raw_fingerprint.split()[1] == net.raw_fingerprint.split()[1]


@pytest.mark.parametrize(
    "config, beside, scale, means, stds",
    [
        (None, {"scale_factor": torch.tensor(1.5305)}, 1.5305, 0.0, 1.0),
        ('{"scaling_factor": 1.7}', {}, 1.7, 0.0, 1.0),
        (KL % ', "scaling_factor": 1.5305, "shift_factor": 0.0609', {}, 1.5305, 0.0609, 1.0),
        (json.dumps({"latents_mean": [0.5] * 16, "latents_std": [2.0] * 16}), {}, 0.3611, 0.5, 2.0),
    ],
)
@torch.no_grad()
def test_a_shift_that_is_not_said_is_not_that_of_the_shape(
    tmp_path, config, beside, scale, means, stds
):
    """Latents of 16 channels need not be Flux's, whose shift is 0.1159."""
    net, x = small("flux1"), torch.rand(1, 3, 32, 32) * 2 - 1
    file = saved(tmp_path / "f.safetensors", net)
    save_file({**load_file(file), **beside}, file)
    if config:
        (tmp_path / "config.json").write_text(config)
    vae = load_vae(file)
    torch.testing.assert_close(vae.encode(x), expected(net, x, scale, means, stds))
    save_vae(tmp_path / "own.safetensors", vae)
    assert torch.equal(load_vae(tmp_path / "own.safetensors").encode(x), vae.encode(x))


@pytest.mark.parametrize(
    "config, beside, message",
    [
        (KL % ', "scaling_factor": 0.13025', EDM, "say different things"),
        (KL % "", {"scale_factor": torch.tensor(0.13025)}, "say different things"),
        (KL % ', "scaling_factor": "0.2"', {}, "scale of the latents: got '0.2'"),
        (KL % ', "scaling_factor": -1', {}, "scale of the latents"),
        (KL % ', "scaling_factor": NaN', {}, "scale of the latents"),
        (KL % ', "latents_mean": [1, 2, 3, 4]', {}, "wanted mean and standard deviation"),
        (KL % ', "latents_mean": [1, 2], "latents_std": [1, 2]', {}, "4 numbers, one a channel"),
        (KL % ', "latents_mean": [1, 2, 3, 4], "latents_std": [1, 2, 3, 0]', {}, "above 0"),
        (KL % ', "norm_num_groups": 16', {}, "norm_num_groups = 16; this autoencoder computes 32"),
        (KL % ', "act_fn": "relu"', {}, "act_fn = 'relu'; this autoencoder computes 'silu'"),
        ('{"_class_name": "AutoencoderKL", "scaling_fac', {}, "config.json.* cannot be read"),
        (None, {"edm_mean": EDM["edm_mean"]}, "wanted mean and standard deviation"),
        (None, {**EDM, "edm_std": torch.ones(3)}, "4 numbers, one a channel"),
        (None, {"scale_factor": torch.tensor(float("nan"))}, "scale of the latents"),
    ],
)
def test_constants_that_cannot_be_or_contradict_are_refused(tmp_path, config, beside, message):
    state = {**tensors_of(small("sd"), "native"), **beside}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "f.safetensors")
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=message):
        load_vae(tmp_path / "f.safetensors", "sd")


@pytest.mark.parametrize("layout", ["native", "diffusers"])
@pytest.mark.parametrize("rank", [2, 4])
def test_attention_may_be_linear_or_a_convolution_and_losses_are_no_weights(tmp_path, layout, rank):
    net = small("sd")
    state = {}
    for name, tensor in tensors_of(net, layout).items():
        if "attn" in name or "attentions" in name:
            if name.endswith("weight") and "norm" not in name:
                tensor = tensor.reshape(tensor.shape[0], -1)
                tensor = tensor[..., None, None] if rank == 4 else tensor
        state[f"first_stage_model.{name}"] = tensor.contiguous()
    state["first_stage_model.loss.logvar"] = torch.zeros(())
    save_file(state, tmp_path / "f.safetensors")
    assert load_vae(tmp_path / "f.safetensors", "sd").fingerprint == net.fingerprint


@pytest.mark.parametrize("inner", ["", "vae/"])
@pytest.mark.parametrize("ending", [".safetensors", ".fp16.safetensors", ".bin", ".fp16.bin"])
def test_folders_of_diffusers_hold_variants_and_pickles(tmp_path, inner, ending):
    net, folder = small("sd"), tmp_path / inner
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(KL % "")
    state = tensors_of(net, "diffusers")
    state = {k: v.half() if "fp16" in ending else v for k, v in state.items()}
    file = folder / f"diffusion_pytorch_model{ending}"
    if ending.endswith("bin"):
        torch.save(state, file)
    else:
        save_file({k: v.contiguous() for k, v in state.items()}, file)
    vae = load_vae(tmp_path)
    assert vae.family == "sd" and vae.fingerprint == load_vae(file).fingerprint
    if "fp16" not in ending:
        assert vae.fingerprint == net.fingerprint
