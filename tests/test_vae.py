"""Autoencoders: against diffusers, in memory, what is refused, and whose is used."""

import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
import torch.nn.functional as F

import samplers
import train
import vae as vae_py
from autoencoders import SMALL, images, peer, relative, saved, small
from ckpt import hub, save_unet
from conftest import ROOT, randomize
from data import robohash
from data.dataset import open_dataset
from data.images import to_float
from harness.cli import UserError
from model import PRESETS, UNet
from vae import (
    FAMILIES,
    VAE,
    VAEConfig,
    choose,
    fit_pca,
    load_vae,
    pixel,
    psnr,
    save_vae,
    vae_from_meta,
)

MADE_BEFORE = ROOT / "tests/fixtures/834bb60"


# ---- the same function --------------------------------------------------------------------------


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


# ---- memory -------------------------------------------------------------------------------------


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
    """A decoder without a view beyond its position is put together exactly; seams of one that has
    offsets are spread."""
    monkeypatch.setattr(vae_py, "TILE", 12)
    monkeypatch.setattr(vae_py, "OVERLAP", 4)

    def local(z):
        return F.interpolate(z[:, :3], scale_factor=8)

    z = torch.randn(2, 4, 33, 12, dtype=torch.float64)
    assert torch.allclose(vae_py.tiled(local, z, 8), local(z), rtol=1e-12)
    assert torch.equal(vae_py.tiled(local, z[:, :, :12], 8), local(z[:, :, :12]))  # one tile
    calls = iter(range(10))

    def counted(z):
        return z.new_full((1, 3, z.shape[2] * 8, z.shape[3] * 8), float(next(calls)))

    steps = vae_py.tiled(counted, z[:1, :, :20], 8)[0, 0, :, 0]
    assert steps[0] == 0 and steps[-1] == 1
    assert 0 < steps.diff().max() < 2 / 32 and (steps.diff() >= 0).all()
    net, smooth = small("sd"), torch.sin(torch.linspace(0, 3, 40)).expand(1, 4, 12, 40) * 0.2
    net.post_quant_conv.weight.mul_(0.05)  # nearly constant images: no tile sees another world
    monkeypatch.setattr(vae_py, "TILE_ABOVE", 100)
    whole = net.decode(smooth)
    monkeypatch.setattr(vae_py, "TILE_ABOVE", 16)
    apart = float((net.decode(smooth) - whole).square().mean().sqrt())
    assert 0 < apart < 0.2 * float(whole.std())  # tile borders are padded


# ---- what is refused ----------------------------------------------------------------------------


def test_names_that_are_refused(tmp_path):
    file = saved(tmp_path / "f.safetensors", small("flux2"))
    for spec, args, message in (
        ("flx2", (), "no autoencoder 'flx2'.*Closest: flux2"),
        (f"flux2:{tmp_path}/none", (), "no autoencoder 'flux2:"),
        (f"flux2:{file}", ("sd",), "got family flux2, wanted sd"),
        (file, ("sd4",), "family 'sd4' is not one of"),
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
    # Linear, where a convolutional one is wanted.
    for where, what in ((pca, "pixel:8, got sd"), ("pixel", "no autoencoder 'pixel'")):
        with pytest.raises(UserError, match=what):
            load_vae(where, "sd")
    with pytest.raises(UserError, match="says it is pixel:8, got packed128"):
        load_vae(pca, None, "packed128")
    with pytest.raises(UserError, match="holds no autoencoder"):
        save_unet(tmp_path / "unet", UNet(PRESETS["tiny"]), {})
        load_vae(tmp_path / "unet")
    with pytest.raises(UserError, match="layout 'lmd' is not one of"):
        save_vae(tmp_path / "x", small("sd"), "lmd")
    assert load_vae(f"flux2:packed128:{file}").channels == 128
    assert load_vae(file, None, "packed128").channels == 128
    (tmp_path / "vae").mkdir()
    saved(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", small("flux2"), "diffusers")
    pipeline = load_vae(f"flux2:{tmp_path}")
    assert pipeline.fingerprint == load_vae(file).fingerprint


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
    finite = sd.decode(broken).isfinite().flatten(1).all(1)
    assert finite.tolist() == [True, False, True]  # not the autoencoder's fault
    x = images(2)
    for part, call in (
        ("encode", lambda: sd.encode(x)),
        ("decode", lambda: sd.decode(torch.zeros(2, 4, 4, 4))),
    ):
        net = sd.encoder if part == "encode" else sd.decoder
        net.conv_out.bias[0] = torch.nan
        message = (
            f"sd: {part} made 2 of 2 samples non-finite, with weights in torch.float32.  "
            "Are its weights damaged"
        )
        with pytest.raises(UserError, match=message):
            call()


@torch.no_grad()
def test_sdxl_in_fp16_is_refused_but_for_its_fix():
    z = torch.randn(1, 4, 4, 4)
    message = "sdxl overflows in fp16.  Use bf16 or fp32, or the autoencoder sdxl-fp16-fix"
    with pytest.raises(UserError, match=message):
        small("sdxl").half().decode(z)
    assert small("sdxl").half().encode(images()).dtype == torch.float32  # encoding is fp32 anyway
    fixed = randomize(VAE(SMALL["sdxl"], "sdxl-fp16-fix")).half()
    assert relative(fixed.decode(z), small("sdxl").decode(z)) < 0.05
    fixed.decoder.conv_out.bias[0] = torch.inf
    with pytest.raises(UserError, match="in torch.float16.  Use bf16 or fp32"):
        fixed.decode(z)


# ---- pca and pixel ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faces():
    return open_dataset("toyfaces:300", holdout=0).images(range(300)) / 127.5 - 1


def test_pca_latents_are_uncorrelated_of_unit_variance_and_invert(faces, tmp_path):
    vae = fit_pca(faces)
    z = vae.encode(faces)
    assert z.shape == (300, 32, 8, 8)
    flat = z.double().movedim(1, -1).reshape(-1, 32)
    covariance = flat.T @ flat / len(flat)
    variance = vae.std.double() ** 4  # std is the fourth root of the variance, scaled
    diagonal = covariance.diagonal()
    assert flat.mean(0).abs().max() < 1e-3 and float(diagonal.mean()) == pytest.approx(1, abs=1e-3)
    assert (covariance - diagonal.diag()).abs().max() < 1e-3  # uncorrelated
    ratio = diagonal**2 / variance
    assert torch.allclose(ratio, ratio[:1].expand(32), rtol=1e-2)
    random = torch.randn(4, 32, 8, 8)
    assert (vae.encode(vae.decode(random)) - random).abs().max() < 1e-3
    assert psnr(vae.decode(z), faces) > 27
    save_vae(tmp_path / "vae.safetensors", vae)
    for twin in (load_vae(tmp_path / "vae.safetensors"), vae_from_meta(vae.meta())):
        assert torch.equal(twin.encode(faces[:2]), vae.encode(faces[:2])) and twin.name == "pca"


def test_pca_of_full_rank_is_exact_and_no_32_components_do_better(faces):
    full = fit_pca(faces, channels=192)
    assert psnr(full.decode(full.encode(faces)), faces) > 80
    vae = fit_pca(faces)
    patches = F.pixel_unshuffle(faces.double(), 8).movedim(1, -1).reshape(-1, 192).numpy()
    _, singular, _ = np.linalg.svd(patches - patches.mean(0), full_matrices=False)
    lost = (singular[32:] ** 2).sum() / patches.size  # Eckart-Young
    error = (vae.decode(vae.encode(faces)) - faces).double().square().mean()
    assert float(error) == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize("name, shape", [("pixel", (3, 64, 64)), ("pixel:4", (48, 16, 16))])
def test_pixel_is_the_identity(faces, name, shape):
    vae = load_vae(name)
    z = vae.encode(faces[:3])
    assert z.shape[1:] == shape == vae.latent_shape(64)
    assert torch.equal(z, F.pixel_unshuffle(faces[:3], vae.factor))
    assert torch.equal(vae.decode(z), faces[:3])


def test_autoencoders_that_cannot_be():
    with pytest.raises(UserError, match="not divisible"):
        pixel(8).latent_shape(60)
    with pytest.raises(UserError, match="wanted pixel"):
        load_vae("flux9")


@torch.no_grad()
@pytest.mark.parametrize("family", ["pixel", "sd", "flux2"])
def test_what_a_cache_keeps_gives_the_latents(family):
    """raw() and from_raw() are encode() in two halves, in every class and layout."""
    x = images()
    for net in [pixel(8)] if family == "pixel" else [small(family), small(family).half()]:
        assert torch.equal(net.from_raw(net.raw(x)), net.encode(x))
    if family == "flux2":
        packed = small(family, latents="packed128")
        one, two = small(family), packed
        assert one.raw_fingerprint == two.raw_fingerprint and one.fingerprint != two.fingerprint
        assert torch.equal(one.raw(x), two.raw(x))
        assert torch.equal(two.from_raw(one.raw(x)), two.encode(x))


def test_an_autoencoder_of_an_earlier_version_opens_unchanged():
    vae = load_vae(MADE_BEFORE / "run/vae.safetensors")
    assert (vae.name, vae.channels, vae.factor) == ("pca", 32, 8)
    assert vae.fingerprint == vae.raw_fingerprint
    assert vae.fingerprint.startswith("902ce1f18504")


# ---- whose autoencoder? -------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path):
    """Files of autoencoders by name: pca, flux2, "moved" (the same flux2), "other" (another)."""
    folder = {k: tmp_path / f"{k}.safetensors" for k in ("pca", "flux2", "moved", "other")}
    save_vae(folder["pca"], fit_pca(images(64, 32, 32)))
    save_vae(folder["flux2"], small("flux2"))
    shutil.copy(folder["flux2"], folder["moved"])
    save_vae(folder["other"], small("flux2", seed=1))
    return folder


def never():
    raise AssertionError("fitted, though there is an autoencoder")


def test_nobody_has_one_so_it_is_fitted_or_asked_for():
    fresh = pixel(4)
    assert choose(fit=lambda: fresh) is fresh and choose("pca", fit=lambda: fresh) is fresh
    for how in ({"meta": {}, "fit": never}, {"meta": None}):
        with pytest.raises(UserError, match="the file does not say which latents.*with --vae FILE"):
            choose("pca", network="the file", **how)


def test_a_named_one_comes_before_a_cache_and_a_cache_before_a_fit(places):
    assert choose("pixel:4", cached=places["pca"], fit=never).name == "pixel:4"
    assert choose("pixel:4", meta={}, fit=never).name == "pixel:4"
    for name in ("", "pca"):
        found = choose(name, cached=places["flux2"], meta={}, fit=never)
        assert found.fingerprint == load_vae(places["flux2"]).fingerprint


def test_a_network_knows_its_own_latents_only(places):
    pca, flux2 = load_vae(places["pca"]).meta(), load_vae(places["flux2"]).meta()
    for name in ("", "pca", str(places["pca"])):
        assert choose(name, meta={"vae": pca}, fit=never).meta() == pca
    for name in ("", str(places["flux2"])):
        assert choose(name, meta={"vae": flux2}, fit=never).meta() == flux2
    # pca is what --vae says by default: a cache's own autoencoder overrules it.
    assert choose("pca", meta={"vae": flux2}, cached=places["flux2"]).meta() == flux2
    message = r"--init A was trained on other latents \({}\) than --vae {} makes.*Leave --vae out"
    for meta, name in ((flux2, "pca"), (flux2, "pixel:8"), (pca, "pixel"), (pca, places["flux2"])):
        with pytest.raises(UserError, match=message.format(meta["name"], name)):
            choose(str(name), meta={"vae": meta}, network="--init A", fit=never)
    with pytest.raises(UserError, match="is not the flux2 autoencoder that this belongs to"):
        choose(str(places["other"]), meta={"vae": flux2})
    places["flux2"].unlink()
    with pytest.raises(UserError, match="cannot load flux2.*say where it is with --vae"):
        choose("", meta={"vae": flux2})
    moved = choose(str(places["moved"]), meta={"vae": flux2})
    assert moved.meta() == {**flux2, "source": str(places["moved"])}


def test_what_a_run_has_kept_stays(places, tmp_path):
    """A note of a large one, or a whole linear one; a name may say where it is now, no more."""
    run = tmp_path / "run"
    run.mkdir()
    kept = run / "vae.safetensors"
    assert choose("pixel", kept=kept).name == "pixel"  # it is not there yet
    save_vae(kept, load_vae(places["flux2"]), weights=False)
    for name in ("", "pca", str(places["moved"])):
        assert choose(name, kept=kept, meta={}, fit=never).raw_fingerprint.startswith("flux2 ")
    with pytest.raises(UserError, match="is not the flux2 autoencoder that this belongs to"):
        choose(str(places["other"]), kept=kept)
    shutil.copy(places["pca"], kept)
    for name in ("", "pca", str(places["pca"])):
        assert choose(name, kept=kept, cached=places["flux2"]).name == "pca"
    with pytest.raises(
        UserError, match=r"run was begun with another autoencoder \(pca\) than pixel"
    ):
        choose("pixel", kept=kept)


def test_the_old_spelling_of_encoding_names_the_new_one(user):
    code, _, errors = user(vae_py.main, "encode", "--out", "x")
    assert code == 2 and len(errors) == 1 and "python -m data.encode" in errors[0]


# ---- checkpoints and runs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, latents", [("sdxl", ""), ("flux2", "packed128"), ("flux2", "unpacked32")]
)
def test_meta_finds_the_same_autoencoder_again_or_says_so(tmp_path, family, latents):
    file = saved(tmp_path / "f.safetensors", small(family), "diffusers")
    net = load_vae(file, family, latents or None)
    meta = net.meta()
    assert meta["source"] == str(file) and len(repr(meta)) < 3000
    twin = vae_from_meta(meta)
    assert twin.meta() == meta and twin.fingerprint == net.fingerprint
    assert torch.equal(twin.encode(images()), net.encode(images()))
    note = tmp_path / "note.safetensors"
    save_vae(note, net, weights=False)
    assert load_vae(note).meta() == meta and note.stat().st_size < 4000
    elsewhere = file.rename(tmp_path / "moved.safetensors")
    message = f"cannot load {family}, .*no autoencoder .*f.safetensors.*say where it is with --vae"
    with pytest.raises(UserError, match=message) as info:
        vae_from_meta(meta)
    assert "\n" not in str(info.value)
    assert vae_from_meta(meta, str(elsewhere)).fingerprint == net.fingerprint
    saved(file, small(family, seed=1))
    message = f"is not the {family} autoencoder that this belongs to: its fingerprint is another"
    with pytest.raises(UserError, match=message):
        vae_from_meta(meta)
    if family == "flux2":
        other = "packed128" if latents == "unpacked32" else "unpacked32"
        assert load_vae(elsewhere, None, other).fingerprint != net.fingerprint
        with pytest.raises(UserError, match=f"wanted {latents}"):
            vae_from_meta(meta, f"flux2:{other}:{elsewhere}")


@pytest.mark.parametrize("family", ["sdxl", "flux2"])
def test_constants_that_changed_since_are_noticed(tmp_path, monkeypatch, family):
    """A checkpoint's latents are those of the constants it was trained with, not of those that this
    code has now."""
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
    monkeypatch.setattr(vae_py, "resolve", lambda spec, usual: asked.append(spec) or file)
    monkeypatch.setattr(
        vae_py, "origin", lambda path: {"source": "hf:org/name/f.safetensors@0123", "sha256": "ab"}
    )
    net = load_vae("flux2:packed128")
    place = "hf:org/name/f.safetensors@0123"
    assert asked == [FAMILIES["flux2"].hub] and net.latents == "packed128"
    assert net.meta()["source"] == place
    hub.ask(place)
    assert vae_from_meta(net.meta()).meta() == net.meta() and asked[1] == place


def test_train_and_sample_through_a_convolutional_autoencoder(tmp_path, user):
    file = saved(tmp_path / "f.safetensors", small("flux2"), "bfl")
    flags = ["--data", "toyfaces:16", "--resolution", 32, "--images", 8, "--batch", 8]
    flags += ["--preview-every", 0, "--eval-every", 0, "--device", "cpu"]
    flags += ["--out", tmp_path, "--name", "a"]
    code, _, err = user(train.main, *flags, "--vae", file)
    assert code == 0, err
    run = tmp_path / "a"
    assert (run / "vae.safetensors").stat().st_size < 10_000  # a note, not 300 MB
    code, out, err = user(train.main, *flags, "--vae", file)  # it is finished
    assert code == 0, err
    sampling = ["--ckpt", run, "--n", 2, "--steps", 2, "--device", "cpu", "--out", tmp_path / "s"]
    code, _, err = user(samplers.main, *sampling)
    assert code == 0 and (tmp_path / "s-grid.png").exists(), err
    before = Image.open(tmp_path / "s/000001.png").tobytes()
    file.rename(tmp_path / "moved.safetensors")
    code, _, err = user(samplers.main, *sampling)
    assert code == 2 and "say where it is with --vae" in err[-1]
    code, _, err = user(samplers.main, *sampling, "--vae", tmp_path / "moved.safetensors")
    assert code == 0 and Image.open(tmp_path / "s/000001.png").tobytes() == before, err
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


# ---- real images --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kittens():
    try:
        robohash.art_folder()
    except UserError as error:
        pytest.skip(str(error))

    def pictures(n, resolution):
        kept = range(n - n // 10)
        return to_float(open_dataset(f"robohash:{n}", resolution=resolution).images(kept))

    return pictures


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
