"""What other people's files say of their objective and noise schedule: read, shown, kept; refused
where it contradicts itself or the user."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import samplers
from checkpoints import TINY, heads, ldm
from ckpt import convert, load_unet
from ckpt.convert import inspect
from ckpt.meaning import with_table
from conftest import randomize
from diffusion.schedules import alphas_bar
from harness.cli import UserError
from model import UNet
from objectives import Objective
from training.start import check_aligned

SDXL, SD = replace(TINY["sdxl"], num_heads=1), TINY["sd15"]
EMPTY = torch.zeros(0)
BARS = alphas_bar("scaled_linear").float()
V, ZERO = {"v_pred": EMPTY}, {"ztsnr": EMPTY}


def file_of(path, beside=None, header=None, prefix="model.diffusion_model.", cfg=SDXL):
    """A Stable Diffusion file in small, with other tensors and words in its header."""
    state = {prefix + k: v for k, v in ldm(randomize(UNet(cfg), 0)).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({**state, **(beside or {})}, path, header or {"format": "pt"})
    return path


def scheduler(folder, **config):
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))


def meta_of(path, **known):
    return load_unet(path, **heads(SDXL), **known)[1]


def said(path, table="", **known):
    """(target, table, zero_snr) of the objective that a file gets."""
    o = Objective(**with_table(meta_of(path, **known), table, str(path)))
    return o.target, o.table, o.zero_snr


SPEC = {"modelspec.prediction_type": "v"}
LDM = {"alphas_cumprod": BARS, "betas": (1 - BARS / torch.cat([torch.ones(1), BARS[:-1]]))}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "module.model.diffusion_model."])
@pytest.mark.parametrize(
    "beside, header, table, wanted",
    [
        (V, {}, "scaled_linear", ("v", "scaled_linear", False)),
        ({**V, **ZERO}, {}, "scaled_linear", ("v", "scaled_linear", True)),
        ({**V, **LDM}, SPEC, "", ("v", "scaled_linear", False)),
        ({}, {"modelspec.predict_key": "V"}, "cosine", ("v", "cosine", False)),
        ({}, {"modelspec.prediction_type": "epsilon"}, "linear", ("eps", "linear", False)),
        ({"betas": LDM["betas"]}, SPEC, "", ("v", "scaled_linear", False)),
        ({"alphas_cumprod": BARS.half()}, SPEC, "", ("v", "scaled_linear", False)),
        (
            {"alphas_cumprod": alphas_bar("scaled_linear", True).float()},
            SPEC,
            "",
            ("v", "scaled_linear", True),
        ),
        (
            {},
            {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"},
            "linear",
            ("v", "linear", True),
        ),
    ],
)
def test_markers_headers_and_buffers_say_the_objective(
    tmp_path, prefix, beside, header, table, wanted
):
    path = file_of(tmp_path / "f.safetensors", beside, header or None, prefix)
    assert said(path, table) == wanted
    assert said(path, table, objective=wanted[0]) == wanted
    for other in {"eps", "v", "fm"} - {wanted[0]}:
        with pytest.raises(UserError, match=f"says its objective is {wanted[0]} .*, got {other}"):
            meta_of(path, objective=other)
    if not table:
        with pytest.raises(UserError, match="its table is 'scaled_linear', got 'linear'"):
            said(path, "linear")


SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize(
    "config, wanted",
    [
        ({**SD_BETAS, "prediction_type": "v_prediction"}, ("v", "scaled_linear", False)),
        (
            {**SD_BETAS, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            ("v", "scaled_linear", True),
        ),
        (
            {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"},
            ("x0", "cosine", False),
        ),
        ({}, ("eps", "linear", False)),
        ({"_class_name": "LCMScheduler"}, ("eps", "scaled_linear", False)),
        ({"_class_name": "EulerDiscreteScheduler", **SD_BETAS}, ("eps", "scaled_linear", False)),
        (
            {"trained_betas": torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist()},
            ("eps", "linear", False),
        ),
    ],
)
@pytest.mark.parametrize("where", ["beside", "one folder up", "index"])
def test_the_scheduler_of_a_pipeline_says_it(tmp_path, config, wanted, where):
    name = {"beside": "f", "one folder up": "unet/f", "index": "weights/f"}[where]
    (tmp_path / "model_index.json").write_text("{}")
    scheduler(tmp_path, **config)
    path = file_of(tmp_path / f"{name}.safetensors", cfg=SDXL)
    assert said(path) == wanted
    shown = "\n".join(inspect(str(path), **heads(SDXL)))
    assert "by scheduler_config.json" in shown and f"table={wanted[1]}" in shown
    assert ("zero_snr=True" in shown) == wanted[2]


def test_betas_are_those_of_diffusers(tmp_path):
    """Each schedule's words mean the table that diffusers computes from them."""
    diffusers = pytest.importorskip("diffusers", reason="pip install -r requirements-dev.txt")
    from ckpt.meaning import BETAS, SILENT, betas_of

    for kind in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"):
        peer = diffusers.DDPMScheduler(beta_schedule=kind, beta_start=0.001, beta_end=0.015)
        torch.testing.assert_close(
            betas_of(peer.config, BETAS).float(), peer.betas, rtol=1e-4, atol=1e-6
        )
    for name in ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", *SILENT):
        peer = getattr(diffusers, name)()
        own = betas_of({}, SILENT.get(name, BETAS)).float()
        torch.testing.assert_close(own, peer.betas, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "beside, header, config, message",
    [
        (V, {"modelspec.prediction_type": "epsilon"}, None, "objective is v by its marker v_pred"),
        (V, {}, {"prediction_type": "epsilon"}, "is v by its marker v_pred, and eps by scheduler"),
        (LDM, {}, {"beta_schedule": "linear"}, "noise schedule is scaled_linear by its buffer"),
        ({**V, **ZERO}, {}, {**SD_BETAS, "prediction_type": "v_prediction"}, "SNR is on by .* off"),
        (ZERO, {"modelspec.prediction_type": "epsilon"}, None, "cannot be sampled"),
        ({}, {}, {"prediction_type": "noise"}, "prediction_type is 'noise'"),
        ({}, {}, {"beta_schedule": "round"}, "beta_schedule is 'round'"),
        ({}, {}, {"beta_start": "0.1"}, "betas are from '0.1'"),
        ({}, {}, {"beta_end": float("nan")}, "betas are from"),
        ({}, {}, {"trained_betas": [0.1, 0.2]}, "trained_betas are not"),
        ({}, {}, {"trained_betas": [["x"]]}, "no scheduler's config"),
        ({}, {}, {"rescale_betas_zero_snr": 1}, "rescale_betas_zero_snr is 1"),
    ],
)
def test_contradictions_and_nonsense_are_refused(tmp_path, beside, header, config, message):
    path = file_of(tmp_path / "f.safetensors", beside, header or None)
    if config is not None:
        scheduler(tmp_path, **config)
    with pytest.raises(UserError, match=message):
        inspect(str(path), **heads(SDXL))


@pytest.mark.parametrize(
    "beside, config",
    [
        ({}, {**SD_BETAS, "beta_start": 0.0015, "beta_end": 0.0195}),
        ({}, {"num_train_timesteps": 500}),
        ({"alphas_cumprod": BARS.flip(0)}, {"_class_name": "EDMEulerScheduler"}),
        ({"edm_mean": torch.zeros(1, 4, 1, 1)}, None),
    ],
)
def test_what_this_code_cannot_draw_is_shown_and_not_drawn(tmp_path, beside, config):
    """No table that is another's is used in its place, whatever the flags say."""
    path = file_of(tmp_path / "f.safetensors", beside)
    if config:
        scheduler(tmp_path, **config)
    assert "no flag gives it" in "\n".join(inspect(str(path), **heads(SDXL)))
    for table in ("", "linear", "scaled_linear"):
        with pytest.raises(UserError, match="the code that it was made for"):
            said(path, table)


def test_converting_keeps_what_a_file_says(tmp_path):
    header = {
        "modelspec.architecture": "stable-diffusion-xl-v1-base", "modelspec.prediction_type": "v",
        "modelspec.title": "Its own", "modelspec.license": "CC", "license": "fair",
        "modelspec.hash_sha256": "0x" + "ab" * 32,
    }  # fmt: skip
    path = file_of(tmp_path / "f.safetensors", {**V, **ZERO}, header)
    for layout in ("native", "diffusers"):
        out = tmp_path / f"{layout}.safetensors"
        convert(path, out, layout, **heads(SDXL))
        with safe_open(out, "pt") as file:
            meta, names = file.metadata(), set(file.keys())
        assert meta["modelspec.license"] == "CC" and meta["license"] == "fair"
        assert "modelspec.hash_sha256" not in meta and meta["modelspec.prediction_type"] == "v"
        assert ({"v_pred", "ztsnr"} <= names) == (layout == "native")
        assert said(out, "scaled_linear") == ("v", "scaled_linear", True)
        with pytest.raises(UserError, match="objective is v, got eps"):
            meta_of(out, objective="eps")
        again = tmp_path / f"{layout}-again.safetensors"
        assert convert(out, again, "native") == convert(
            path, tmp_path / f"{layout}-3.safetensors", "native", **heads(SDXL)
        )
        assert said(again, "scaled_linear") == ("v", "scaled_linear", True)


def test_aligned_training_is_what_the_file_says(tmp_path):
    """--aligned reads the network as it was trained, so the flags may not say something else."""
    scheduler(tmp_path, **SD_BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    meta = meta_of(file_of(tmp_path / "f.safetensors"))
    flags = Objective("v", "v", "scaled_linear", zero_snr=True)
    check_aligned(flags, meta, "f")
    for other in (replace(flags, zero_snr=False), replace(flags, table="cosine")):
        with pytest.raises(UserError, match="--aligned reads the network as it was trained"):
            check_aligned(other, meta, "f")
    marked = meta_of(file_of(tmp_path / "b/f.safetensors", {**V, **ZERO}))
    check_aligned(flags, marked, "f")
    with pytest.raises(UserError, match="--aligned reads"):
        check_aligned(replace(flags, zero_snr=False), marked, "f")
    check_aligned(Objective("fm", "u"), {"objective": "fm"}, "f")


@pytest.mark.parametrize("where", ["nowhere", "in the file", "in the pipeline"])
def test_three_channels_are_pixels_only_where_no_autoencoder_lies_beside(tmp_path, where):
    """LDM's first autoencoders have latents of three channels."""
    cfg, beside = replace(TINY["adm"], num_classes=0, out_channels=3), {}
    if where == "in the file":
        beside = {"first_stage_model.encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)}
    if where == "in the pipeline":
        (tmp_path / "vae").mkdir()
        (tmp_path / "vae/diffusion_pytorch_model.bin").write_bytes(b"x")
    scheduler(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    path = file_of(tmp_path / "unet/f.safetensors", beside, cfg=cfg)
    asked = "autoencoder (--vae)" in "\n".join(inspect(str(path), **heads(cfg)))
    assert asked == (where != "nowhere")
    given = {k: v for k, v in heads(cfg).items() if v}
    wanted = samplers.Config(ckpt=str(path), resolution=8, **given)
    if where == "nowhere":
        assert samplers.open_generator(wanted, torch.device("cpu")).vae.name == "pixel"
    else:
        with pytest.raises(UserError, match="does not say which latents its network knows"):
            samplers.open_generator(wanted, torch.device("cpu"))
    convert(path, tmp_path / "native.safetensors", "native", **heads(cfg))
    asked = "autoencoder (--vae)" in "\n".join(inspect(str(tmp_path / "native.safetensors")))
    assert asked == (where != "nowhere")
