"""Convolutional autoencoders: against diffusers, in every layout, and what is refused. (pca and pixel: test_data.py)"""

import re

import pytest
import torch
import torch.nn.functional as F

import samplers
import train
import vae as vae_py
from ckpt import read_tensors, save_unet
from harness.cli import UserError
from conftest import randomize
from ckpt.containers import open_weights
from harness.files import write_tensors
from model import PRESETS, UNet
from ckpt.vaes import vae_map
from vae import FAMILIES, VAE, VAEConfig, load_vae, save_vae, tensor_shapes, vae_from_meta

WIDTHS = (32, 64, 128, 128)
SMALL = {
    "sd": VAEConfig(4, WIDTHS, WIDTHS),
    "sdxl": VAEConfig(4, WIDTHS, WIDTHS),
    "flux1": VAEConfig(16, WIDTHS, WIDTHS, quant=False),
    "flux2": VAEConfig(32, WIDTHS, (32, 64, 64, 96), stats=True),
}  # a narrower decoder, as newer files may have
FULL = {"sd": VAEConfig(), "flux1": VAEConfig(16, quant=False), "flux2": VAEConfig(32, stats=True)}


def small(family, seed=0, latents="", dtype=torch.float32):
    """Random weights and statistics; the widths are those of no real file."""
    net = randomize(VAE(SMALL[family], family, latents), seed)
    g = torch.Generator().manual_seed(seed)
    if net.bn is not None:
        net.bn.running_mean.copy_(torch.randn(128, generator=g))
        net.bn.running_var.copy_(torch.rand(128, generator=g) + 0.1)
        net.bn.num_batches_tracked.fill_(7)
    return net.to(dtype)


def peer(net):
    """diffusers' class with the same weights, put there through its own names."""
    diffusers = pytest.importorskip(
        "diffusers", reason="oracle: pip install -r requirements-dev.txt"
    )
    cfg = net.cfg
    common = dict(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=cfg.encoder,
        latent_channels=cfg.z,
        use_quant_conv=cfg.quant,
        use_post_quant_conv=cfg.quant,
    )
    with torch.device("meta"):
        other = (
            diffusers.AutoencoderKLFlux2(**common, decoder_block_out_channels=cfg.decoder)
            if cfg.stats
            else diffusers.AutoencoderKL(**common, layers_per_block=2)
        )
    state = {
        name: net.state_dict()[k].reshape(shape).clone()
        for k, (name, shape) in vae_map(tensor_shapes(cfg), "diffusers").items()
    }
    assert {k: v.shape for k, v in other.state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }
    other.load_state_dict(state, assign=True)
    return other.to(net.dtype).eval()


def images(n=2, h=32, w=48, seed=0, dtype=torch.float32):
    return (
        torch.rand(
            n, 3, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        ).to(dtype)
        * 2
        - 1
    )


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def saved(path, net, layout="native"):
    """A file as its authors wrote it: no metadata of ours."""
    write_tensors(
        path,
        {
            name: net.state_dict()[k].reshape(shape)
            for k, (name, shape) in vae_map(tensor_shapes(net.cfg), layout).items()
        },
        {},
    )
    foreign(path)
    return path


def foreign(path):
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path)


# ---- the same function ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, encode, decode",
    [(torch.float32, 1e-5, 1e-4), (torch.float64, 1e-12, 1e-12)],
    ids=["fp32", "fp64"],
)
@pytest.mark.parametrize("family", SMALL)
@torch.no_grad()
def test_computes_what_diffusers_computes(family, dtype, encode, decode):
    net = small(family, dtype=dtype)
    other, x = peer(net), images(dtype=dtype)
    theirs = other.encode(x).latent_dist
    mean, logvar = net.moments(x)
    assert relative(mean, theirs.mean) < encode and relative(logvar, theirs.logvar) < encode
    if net.cfg.stats:
        m, v = other.bn.running_mean, other.bn.running_var
        raw = F.pixel_shuffle(
            (F.pixel_unshuffle(theirs.mean, 2) - m[:, None, None])
            / (v[:, None, None] + 1e-4).sqrt(),
            2,
        )
    else:
        raw = (theirs.mean - FAMILIES[family].shift) * FAMILIES[family].scale
    z = net.encode(x)
    assert (
        relative(z, raw) < encode
        and z.dtype == dtype
        and z.shape == (2, *net.latent_shape(32)[:2], 6)
    )
    assert relative(net.decode(z), other.decode(theirs.mean).sample) < decode


@torch.no_grad()
def test_logvar_is_clamped():
    net = small("sd")
    net.quant_conv.bias.copy_(torch.tensor([0.0] * 4 + [1e3, -1e3, 0, 0]))
    logvar = net.moments(images())[1]
    assert (logvar[:, 0] == 20).all() and (logvar[:, 1] == -30).all()


@torch.no_grad()
def test_flux2_packs_as_pixel_unshuffle_and_both_layouts_are_one_tensor():
    one, two, x = small("flux2"), small("flux2", latents="packed128"), images()
    z, p = one.encode(x), two.encode(x)
    assert (
        torch.equal(F.pixel_unshuffle(z, 2), p)
        and z.shape[1:] == (32, 4, 6)
        and p.shape[1:] == (128, 2, 3)
    )
    assert (one.factor, one.channels, one.latent_shape(64)) == (8, 32, (32, 8, 8)) and (
        two.factor,
        two.channels,
        two.latent_shape(64),
    ) == (16, 128, (128, 4, 4))
    assert torch.equal(one.decode(z), two.decode(p))
    mean = one.moments(x)[0]
    for c, i, j in (
        (0, 0, 0),
        (5, 0, 1),
        (31, 1, 0),
    ):  # each phase of a channel has its own statistics
        at = c * 4 + i * 2 + j
        want = (mean[:, c, i::2, j::2] - one.bn.running_mean[at]) / (
            one.bn.running_var[at] + 1e-4
        ).sqrt()
        assert torch.allclose(p[:, at], want, rtol=1e-6)
    assert relative(one.denormalise(z), mean) < 1e-5 and relative(two.denormalise(p), mean) < 1e-5


@torch.no_grad()
def test_flux2_statistics_outlive_train_and_half():
    net, x = small("flux2"), images()
    before, z = {k: v.clone() for k, v in net.bn.state_dict().items()}, net.encode(x)
    for change in (
        net.train,
        net.half,
        net.bfloat16,
        net.double,
        lambda: net.to(torch.float16),
        net.eval,
    ):
        change()
        net.float() if net.dtype == torch.float16 else None
        net.decode(net.encode(x))
        assert all(
            torch.equal(v, before[k]) and v.dtype == before[k].dtype
            for k, v in net.bn.state_dict().items()
        )
    net = small("flux2")
    net.train()
    assert torch.equal(net.encode(x), z)
    assert torch.equal(
        net.bfloat16().normalise(net.moments(x)[0]), small("flux2").normalise(net.moments(x)[0])
    )


@torch.no_grad()
def test_encoding_is_fp32_whatever_the_weights_and_autocast():
    net, x, tf32 = small("sd"), images(), []
    net.encoder.register_forward_hook(lambda *_: tf32.append(torch.backends.cudnn.allow_tf32))
    before = torch.backends.cudnn.allow_tf32
    z = net.encode(x)
    assert (
        tf32 == [False] and before and torch.backends.cudnn.allow_tf32
    )  # switched off, and on again
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(net.encode(x), z) and net.decode(z).dtype == torch.float32
    rounded = small("sd").bfloat16()
    with_fp32 = small("sd").bfloat16().float()  # the same rounded weights, in fp32
    assert torch.equal(rounded.encode(x), with_fp32.encode(x)) and rounded.dtype == torch.bfloat16
    image = rounded.decode(z)
    assert image.dtype == torch.float32 and 1e-4 < relative(image, net.decode(z)) < 0.2
    assert not net.decode(
        z.requires_grad_()
    ).requires_grad  # under no_grad; and no weight ever wants a gradient
    assert not any(p.requires_grad for p in net.parameters())


# ---- memory ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_slices_equal_the_whole(monkeypatch):
    net, x = small("flux2"), images(5)
    z, seen = net.encode(x), []
    y = net.decode(z)
    monkeypatch.setattr(vae_py, "SLICE", 2 * 32 * 48)
    hook = net.encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    net.decoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    assert (
        relative(net.encode(x), z) < 1e-5
        and relative(net.decode(z), y) < 1e-5
        and seen == [2, 2, 1] * 2
    )
    monkeypatch.setattr(vae_py, "SLICE", 1)  # an image larger than a slice goes alone
    assert relative(net.encode(x), z) < 1e-5 and seen[6:] == [1] * 5
    hook.remove()


@torch.no_grad()
def test_only_large_images_are_decoded_in_tiles(monkeypatch):
    monkeypatch.setattr(vae_py, "TILE_ABOVE", 16)
    monkeypatch.setattr(vae_py, "TILE", 12)
    monkeypatch.setattr(vae_py, "OVERLAP", 4)
    net, sizes = small("sd"), []
    net.decoder.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[2:])))
    for h, w, want in (
        (16, 16, {(16, 16)}),
        (18, 8, {(12, 8)}),
        (8, 40, {(8, 12)}),
        (20, 31, {(12, 12)}),
    ):
        sizes.clear()
        y = net.decode(torch.randn(1, 4, h, w))
        assert set(sizes) == want and y.shape == (1, 3, 8 * h, 8 * w)
    sizes.clear()
    net.encode(images(1, 256, 256))  # never the encoder
    assert not sizes


@torch.no_grad()
def test_tiles_fade_into_each_other(monkeypatch):
    """A decoder without a view beyond its position is put together exactly; seams of one that has offsets are spread."""
    monkeypatch.setattr(vae_py, "TILE", 12)
    monkeypatch.setattr(vae_py, "OVERLAP", 4)
    local = lambda z: F.interpolate(z[:, :3], scale_factor=8)
    z = torch.randn(2, 4, 33, 12, dtype=torch.float64)
    assert torch.allclose(vae_py.tiled(local, z, 8), local(z), rtol=1e-12)
    assert torch.equal(vae_py.tiled(local, z[:, :, :12], 8), local(z[:, :, :12]))  # one tile
    calls = iter(range(10))
    steps = vae_py.tiled(
        lambda z: torch.full(
            (1, 3, z.shape[2] * 8, z.shape[3] * 8), float(next(calls)), dtype=z.dtype
        ),
        z[:1, :, :20],
        8,
    )[0, 0, :, 0]
    assert (
        steps[0] == 0
        and steps[-1] == 1
        and 0 < steps.diff().max() < 2 / 32
        and (steps.diff() >= 0).all()
    )
    net, smooth = small("sd"), torch.sin(torch.linspace(0, 3, 40)).expand(1, 4, 12, 40) * 0.2
    net.post_quant_conv.weight.mul_(0.05)  # nearly constant images: no tile sees another world
    monkeypatch.setattr(vae_py, "TILE_ABOVE", 100)
    whole = net.decode(smooth)
    monkeypatch.setattr(vae_py, "TILE_ABOVE", 16)
    assert (
        0 < float((net.decode(smooth) - whole).square().mean().sqrt()) < 0.2 * float(whole.std())
    )  # tile borders are padded


# ---- names ----------------------------------------------------------------------------------------------------------


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
    """Every tensor is a constant of its own; both converters must put it in the same place. 0 disagreements."""
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
    with pytest.raises(UserError, match="vea.x"):
        load_vae(f"sdxl:{tmp_path / 'odd.ckpt'}")


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


# ---- what is refused ------------------------------------------------------------------------------------------------


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
            lambda s: s.update({"encoder.mid.attn_1.q.weight": torch.zeros(128, 128)}),
            r"1 of another shape: encoder.mid.attn_1.q.weight \(128, 128\)",
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
        "2-D attention",
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
            "4 latent channels. can be sd or sdxl or sdxl-fp16-fix.  What it is .* say it: --vae FAMILY:FILE",
        ),
        ("flux1", None, None, "can be flux1 .or Stable Diffusion 3.*--vae flux1:FILE"),
        ("sd", None, "flux1", "can be sd or .*, not flux1"),
        ("flux2", None, "sd", "running statistics. can be flux2, not sd"),
        ("sd", '{"scaling_factor": 0.13025}', "sd", "0.13025. can be sdxl or .*, not sd"),
        ("sd", '{"scaling_factor": 0.5}', None, "can be nothing known here"),
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


def test_names_that_are_refused(tmp_path):
    file = saved(tmp_path / "f.safetensors", small("flux2"))
    for spec, args, message in (
        ("flx2", (), "no autoencoder 'flx2'.*Closest: flux2"),
        (f"flux2:{tmp_path}/none", (), "no autoencoder 'flux2:"),
        (f"flux2:{file}", ("sd",), "got family flux2, wanted sd"),
        (file, ("sd3",), "family 'sd3' is not one of"),
        (file, (None, "packed"), "latents 'packed' is not one of unpacked32, packed128"),
        (
            f"flux2:packed128:{file}",
            (None, "unpacked32"),
            "got latents packed128, wanted unpacked32",
        ),
    ):
        with pytest.raises(UserError, match=message):
            load_vae(spec, *args)
    with pytest.raises(UserError, match="latent layout 'packed128': sd has only one"):
        VAE(SMALL["sd"], "sd", "packed128")
    pca = tmp_path / "pca.safetensors"
    save_vae(pca, vae_py.pixel(8))
    assert load_vae(pca).fingerprint == vae_py.pixel(8).fingerprint != vae_py.pixel(4).fingerprint
    for where, what in (
        (pca, "pixel:8, got sd"),
        ("pixel", "no autoencoder 'pixel'"),
    ):  # linear, where a convolutional one is wanted
        with pytest.raises(UserError, match=what):
            load_vae(where, "sd")
    with pytest.raises(UserError, match="says it is pixel:8, got packed128"):
        load_vae(pca, None, "packed128")
    with pytest.raises(UserError, match="holds no autoencoder"):
        save_unet(tmp_path / "unet", UNet(PRESETS["tiny"]), {})
        load_vae(tmp_path / "unet")
    with pytest.raises(UserError, match="layout 'lmd' is not one of"):
        save_vae(tmp_path / "x", small("sd"), "lmd")
    assert (
        load_vae(f"flux2:packed128:{file}").channels
        == load_vae(file, None, "packed128").channels
        == 128
    )
    (tmp_path / "vae").mkdir()
    saved(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", small("flux2"), "diffusers")
    assert (
        load_vae(f"flux2:{tmp_path}").fingerprint == load_vae(file).fingerprint
    )  # a pipeline's folder


@torch.no_grad()
def test_shapes_that_do_not_divide_and_numbers_that_are_not():
    sd, flux2 = small("sd"), small("flux2")
    for call, message in (
        (lambda: sd.encode(images(1, 36, 32)), "divisible by 8, got .1, 3, 36, 32"),
        (lambda: flux2.encode(images(1, 40, 32)), "divisible by 16"),
        (lambda: sd.encode(images()[:, :1]), "B, 3, H, W"),
        (lambda: sd.decode(torch.zeros(1, 16, 4, 4)), "latents .B, 4, H, W., got"),
        (lambda: flux2.decode(torch.zeros(1, 32, 4, 3)), "divisible by 2"),
        (lambda: sd.latent_shape(60), "resolution 60 is not divisible by 8"),
        (lambda: flux2.latent_shape(72), "resolution 72 is not divisible by 16"),
        (lambda: flux2.meta(), "came from no file"),
    ):
        with pytest.raises((UserError, ValueError), match=message):
            call()
    assert sd.latent_shape(72) == (4, 9, 9)
    broken = torch.zeros(3, 4, 4, 4)
    broken[1] = torch.nan
    assert sd.decode(broken).isfinite().flatten(1).all(1).tolist() == [
        True,
        False,
        True,
    ]  # not the autoencoder's fault
    x = images(2)
    for part, call in (
        ("encode", lambda: sd.encode(x)),
        ("decode", lambda: sd.decode(torch.zeros(2, 4, 4, 4))),
    ):
        net = sd.encoder if part == "encode" else sd.decoder
        net.conv_out.bias[0] = torch.nan
        with pytest.raises(
            UserError,
            match=f"sd: {part} made 2 of 2 samples non-finite, with weights in torch.float32.  Are its weights damaged",
        ):
            call()


@torch.no_grad()
def test_sdxl_in_fp16_is_refused_but_for_its_fix():
    z = torch.randn(1, 4, 4, 4)
    with pytest.raises(
        UserError,
        match="sdxl overflows in fp16.  Use bf16 or fp32, or the autoencoder sdxl-fp16-fix",
    ):
        small("sdxl").half().decode(z)
    assert small("sdxl").half().encode(images()).dtype == torch.float32  # encoding is fp32 anyway
    fixed = randomize(VAE(SMALL["sdxl"], "sdxl-fp16-fix")).half()
    assert relative(fixed.decode(z), small("sdxl").decode(z)) < 0.05
    fixed.decoder.conv_out.bias[0] = torch.inf
    with pytest.raises(UserError, match="in torch.float16.  Use bf16 or fp32"):
        fixed.decode(z)


# ---- checkpoints and runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, latents", [("sdxl", ""), ("flux2", "packed128"), ("flux2", "unpacked32")]
)
def test_meta_finds_the_same_autoencoder_again_or_says_so(tmp_path, family, latents):
    file = saved(tmp_path / "f.safetensors", small(family), "diffusers")
    net = load_vae(file, family, latents or None)
    meta = net.meta()
    assert meta["source"] == str(file) and len(repr(meta)) < 3000
    twin = vae_from_meta(meta)
    assert (
        twin.meta() == meta
        and twin.fingerprint == net.fingerprint
        and torch.equal(twin.encode(images()), net.encode(images()))
    )
    save_vae(tmp_path / "note.safetensors", net, weights=False)
    assert (
        load_vae(tmp_path / "note.safetensors").meta() == meta
        and (tmp_path / "note.safetensors").stat().st_size < 4000
    )
    elsewhere = file.rename(tmp_path / "moved.safetensors")
    with pytest.raises(
        UserError,
        match=f"cannot load {family}, .*no autoencoder .*f.safetensors.*say where it is with --vae",
    ) as info:
        vae_from_meta(meta)
    assert "\n" not in str(info.value)
    assert vae_from_meta(meta, str(elsewhere)).fingerprint == net.fingerprint
    saved(file, small(family, seed=1))
    with pytest.raises(
        UserError,
        match=f"is not the {family} autoencoder that this belongs to: its fingerprint is another",
    ):
        vae_from_meta(meta)
    if family == "flux2":
        other = "packed128" if latents == "unpacked32" else "unpacked32"
        assert load_vae(elsewhere, None, other).fingerprint != net.fingerprint
        with pytest.raises(UserError, match=f"wanted {latents}"):
            vae_from_meta(meta, f"flux2:{other}:{elsewhere}")


@pytest.mark.parametrize("family", ["sdxl", "flux2"])
def test_constants_that_changed_since_are_noticed(tmp_path, monkeypatch, family):
    """A checkpoint's latents are those of the constants it was trained with, not of those this code has now."""
    net = load_vae(saved(tmp_path / "f.safetensors", small(family), "native"), family)
    meta = net.meta()
    monkeypatch.setitem(vae_py.FAMILIES, family, vae_py.FAMILIES[family]._replace(scale=0.2))
    monkeypatch.setattr(vae_py, "STATS_EPS", 1e-5)
    with pytest.raises(UserError, match="its normalisation is another"):
        vae_from_meta(meta)


def test_names_on_the_hub(monkeypatch, tmp_path):
    asked = []
    for family in FAMILIES:
        assert re.fullmatch(r"hf:[\w.-]+/[\w.-]+/.+\.safetensors", FAMILIES[family].hub)
    file = saved(tmp_path / "f.safetensors", small("flux2"))
    monkeypatch.setattr(vae_py, "resolve", lambda spec: asked.append(spec) or file)
    monkeypatch.setattr(
        vae_py, "origin", lambda path: {"source": "hf:org/name/f.safetensors@0123", "sha256": "ab"}
    )
    net = load_vae("flux2:packed128")
    assert (
        asked == [FAMILIES["flux2"].hub]
        and net.latents == "packed128"
        and net.meta()["source"] == "hf:org/name/f.safetensors@0123"
    )
    assert (
        vae_from_meta(net.meta()).meta() == net.meta()
        and asked[1] == "hf:org/name/f.safetensors@0123"
    )


def test_train_and_sample_through_a_convolutional_autoencoder(tmp_path, user):
    file = saved(tmp_path / "f.safetensors", small("flux2"), "bfl")
    flags = [
        "--data",
        "toyfaces:16",
        "--resolution",
        32,
        "--images",
        8,
        "--batch",
        8,
        "--preview-every",
        0,
        "--eval-every",
        0,
        "--out",
        tmp_path,
        "--name",
        "a",
        "--device",
        "cpu",
    ]
    code, _, err = user(train.main, *flags, "--vae", file)
    assert code == 0, err
    run = tmp_path / "a"
    assert (run / "vae.safetensors").stat().st_size < 10_000  # a note, not 300 MB
    code, out, err = user(train.main, *flags, "--vae", file)  # it is finished
    assert code == 0, err
    sampling = ["--ckpt", run, "--n", 2, "--steps", 2, "--device", "cpu", "--out", tmp_path / "s"]
    code, _, err = user(samplers.main, *sampling)
    assert code == 0 and (tmp_path / "s/grid.png").exists(), err
    before = (tmp_path / "s/000001.png").read_bytes()
    file.rename(tmp_path / "moved.safetensors")
    code, _, err = user(samplers.main, *sampling)
    assert code == 2 and "say where it is with --vae" in err[-1]
    code, _, err = user(samplers.main, *sampling, "--vae", tmp_path / "moved.safetensors")
    assert code == 0 and (tmp_path / "s/000001.png").read_bytes() == before, err
    moved = tmp_path / "moved.safetensors"
    for name, args, code, message in (
        ("b", ["--vae", f"flux2:packed128:{moved}"], 2, "got latents packed128, wanted unpacked32"),
        ("c", ["--vae", moved], 0, ""),
        ("d", ["--vae", "pixel:8"], 2, "no autoencoder"),
        ("a", ["--vae", moved], 0, ""),
    ):
        flags[flags.index("--name") + 1] = name
        got, _, err = user(train.main, *flags, *args, *["--init", run] * (name != "a"))
        assert got == code and message in (err or [""])[-1], (name, err)
    flags[flags.index("--images") + 1] = 16
    got, _, err = user(train.main, *flags, "--vae", file)  # resuming: the config says where it was
    assert got == 2 and "images 8 -> 16" in err[-1]


# ---- real images ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kittens():
    import data.robohash as robo
    from harness.cli import UserError
    from data.dataset import open_dataset
    from data.images import to_float

    try:
        robo.art_folder()
    except UserError as error:
        pytest.skip(str(error))
    return lambda n, resolution: to_float(
        open_dataset(f"robohash:{n}", resolution=resolution).images(range(n - n // 10))
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_real_images_go_through_every_family_and_back(kittens, family):
    """Random weights: shapes, ranges and inverses, not pictures."""
    kind, images = FAMILIES[family], kittens(5, 64)
    net = VAE(
        VAEConfig(kind.z, (32, 32, 32, 32), (32, 32, 32, 32), kind.quant, kind.stats), family
    ).eval()
    z = net.encode(images)
    assert z.shape == (len(images), *net.latent_shape(64)) and z.isfinite().all()
    assert torch.allclose(net.denormalise(z), net.moments(images)[0], atol=1e-5)
    assert net.decode(z).shape == images.shape and net.decode(z).isfinite().all()


def test_pca_keeps_30_db_of_real_art_at_256_px_with_32_channels(kittens):
    images = kittens(330, 256)
    fitted = vae_py.fit_pca(images[:200])
    assert (
        vae_py.psnr(fitted.decode(fitted.encode(images[200:])), images[200:]) > 30
    )  # of pictures it was not fitted to
