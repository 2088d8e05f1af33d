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
from ckpt import convert, open_unet, save_unet
from ckpt.convert import inspect
from ckpt.__main__ import main
from ckpt.meaning import BETAS, SILENT, said_table, table_in, with_table
from conftest import randomize
from diffusion.schedules import alphas_bar, betas_of
from distillation.teacher import teacher_objective
from harness.cli import UserError
from model import UNet
from objectives import Objective
from training.start import check_aligned

SDXL = replace(TINY["sdxl"], num_heads=1)
SMALL = replace(
    SDXL, channel_mult=(1,), num_res_blocks=1, attention=(1,), middle_attention=1, vector_dim=0
)
HEADS = {"num_head_channels": 16}
EMPTY = torch.zeros(0)
BARS = alphas_bar("scaled_linear").float()
LONG = "0.0015,0.0195,scaled_linear"  # LDM's betas of its first models
# Betas of no formula, as trained_betas may be, in float64 and in a file's fp32.
OWN = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).sqrt() * 0.05
OWN = (OWN + 1e-3 * torch.arange(1000).sin().abs()).tolist()
PURE = [*OWN[:-1], 1.0]
V, ZERO = {"v_pred": EMPTY}, {"ztsnr": EMPTY}


def file_of(path, beside=None, header=None, prefix="model.diffusion_model.", cfg=SDXL):
    """A Stable Diffusion file in small, with other tensors and words in its header."""
    state = {prefix + k: v for k, v in ldm(randomize(UNet(cfg), 0)).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({**state, **(beside or {})}, path, header or {"format": "pt"})
    return path


def describe_teacher_of(path):
    return teacher_objective(meta_of(path), str(path), table="scaled_linear")


def scheduler(folder, **config):
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))


def meta_of(path, **known):
    return open_unet(path, **{**HEADS, **known}).meta


def said(path, table="", **known):
    """(target, table, zero_snr) of the objective that a file gets."""
    o = Objective(**with_table(meta_of(path, **known), table, str(path)))
    return o.target, o.table, o.zero_snr


SPEC = {"modelspec.prediction_type": "v"}
EPS = {"modelspec.prediction_type": "epsilon"}
SD2_V = {"modelspec.architecture": "stable-diffusion-v2-768-v"}
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
        ({}, SD2_V, "cosine", ("v", "cosine", False)),
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
    for kind in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"):
        peer = diffusers.DDPMScheduler(beta_schedule=kind, beta_start=0.001, beta_end=0.015)
        own = betas_of(table_in(peer.config, BETAS)[0])
        torch.testing.assert_close(own.float(), peer.betas, rtol=1e-4, atol=1e-6)
    for name in SILENT:
        if name == "DPMSolverSDEScheduler":
            continue  # needs torchsde
        peer = getattr(diffusers, name)()
        own = betas_of(table_in({}, SILENT[name])[0]).float()
        torch.testing.assert_close(own, peer.betas, rtol=1e-4, atol=1e-7)
    for name in ("DDIMScheduler", "EulerDiscreteScheduler"):
        for pure in (False, True):
            betas = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
            peer = getattr(diffusers, name)(**betas, rescale_betas_zero_snr=pure)
            own = alphas_bar(LONG, pure)[:-1].float()
            torch.testing.assert_close(own, peer.alphas_cumprod[:-1], rtol=2e-4, atol=2e-7)


@pytest.mark.parametrize(
    "beside, header, config, message",
    [
        (V, EPS, None, "objective is v by its marker v_pred"),
        (V, {}, {"prediction_type": "epsilon"}, "is v by its marker v_pred, and eps by scheduler"),
        (LDM, {}, {"beta_schedule": "linear"}, "noise schedule is scaled_linear by its buffer"),
        ({**V, **ZERO}, {}, {**SD_BETAS, "prediction_type": "v_prediction"}, "SNR is on by .* off"),
        (
            {},
            SD2_V | EPS,
            None,
            "is eps by modelspec.prediction_type, and v by modelspec.architecture",
        ),
        (ZERO, EPS, None, "cannot be sampled"),
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
    "beside, header, config",
    [
        ({}, {}, {"num_train_timesteps": 500}),
        ({"alphas_cumprod": BARS.flip(0)}, SPEC, None),
        ({"alphas_cumprod": (BARS * 0.9).half()}, SPEC, None),
        ({"betas": torch.full((1000,), 0.9)}, SPEC, None),
        ({"alphas_cumprod": BARS.flip(0)}, {}, {"_class_name": "EDMEulerScheduler"}),
        ({"edm_mean": torch.zeros(1, 4, 1, 1)}, {}, None),
        ({"betas": torch.full((500,), 0.01)}, SPEC, None),
        ({"alphas_cumprod": torch.linspace(1, 0, 4000)}, SPEC, None),
        ({}, {"modelspec.prediction_type": "trigflow"}, None),
        ({}, SPEC, {"_class_name": "CMStochasticIterativeScheduler"}),
        ({}, SPEC, {"_class_name": "UnCLIPScheduler", "beta_schedule": "squaredcos_cap_v2"}),
        ({}, SPEC, {"_class_name": "CogVideoXDDIMScheduler"}),
        ({}, SPEC, {**SD_BETAS, "_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 3.0}),
        ({}, SPEC, {**SD_BETAS, "prediction_type": "v_prediction", "use_flow_sigmas": True}),
        ({}, {}, {**SD_BETAS, "prediction_type": "v_prediction", "timestep_type": "continuous"}),
    ],
)
def test_what_this_code_cannot_draw_is_shown_and_not_drawn(tmp_path, beside, header, config):
    """No table that is another's is used in its place, whatever the flags say; and converting it
    keeps what it says."""
    path = file_of(tmp_path / "f.safetensors", beside, header or None, cfg=SMALL)
    if config:
        scheduler(tmp_path, **config)
    assert "no flag gives it" in "\n".join(inspect(str(path), **HEADS))
    out = tmp_path / "out/f.safetensors"
    convert(path, out, "native", **HEADS)
    assert "no flag gives it" in "\n".join(inspect(str(out), **HEADS))
    for file in (path, out):
        for table in ("", "linear", "scaled_linear", LONG):
            with pytest.raises(UserError, match="the code that it was made for"):
                said(file, table)
        with pytest.raises(UserError, match="the code that it was made for"):
            describe_teacher_of(file)


@pytest.mark.parametrize("marks, zero_snr", [(V, False), ({**V, **ZERO}, True)])
@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_do_not_tell_how_a_cosine_table_ends(tmp_path, marks, zero_snr, pure, dtype):
    """It ends at 2e-9 or at 0; the markers say at which."""
    beside = {**marks, "alphas_cumprod": alphas_bar("cosine", pure).to(dtype)}
    path = file_of(tmp_path / "f.safetensors", beside, cfg=SMALL)
    assert said(path) == ("v", "cosine", zero_snr)


def bars_of(betas):
    return (1 - torch.as_tensor(betas).double()).cumprod(0)


def long_betas(kind):
    """0.0015 … 0.0195 by a formula, float64."""
    if kind == "linear":
        return torch.linspace(0.0015, 0.0195, 1000, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    rise = torch.linspace(-6, 6, 1000, dtype=torch.float64).sigmoid()
    return 0.0015 + rise * (0.0195 - 0.0015)


def long_config(kind):
    return {"beta_schedule": kind, "beta_start": 0.0015, "beta_end": 0.0195}


OF_THEIR_OWN = [
    *((({}, long_config(kind)), long_betas(kind), kind) for kind in
      ("linear", "scaled_linear", "sigmoid")),
    *((({"betas": long_betas(kind).float()}, None), long_betas(kind), kind) for kind in
      ("linear", "scaled_linear", "sigmoid")),
    (({"alphas_cumprod": bars_of(long_betas("linear")).float()}, None), long_betas("linear"),
     "linear"),
    (({}, {"trained_betas": long_betas("scaled_linear").tolist()}), long_betas("scaled_linear"),
     "scaled_linear"),
    (({}, {"trained_betas": OWN}), torch.tensor(OWN), "all 1000 given"),
    (({"betas": torch.tensor(OWN)}, {"trained_betas": OWN}), torch.tensor(OWN), "all 1000 given"),
    (({"alphas_cumprod": bars_of(OWN).float()}, None), torch.tensor(OWN), "all 1000 given"),
    (({}, {"trained_betas": PURE}), torch.tensor(PURE), "all 1000 given"),
]  # fmt: skip


@pytest.mark.parametrize("places, betas, kind", OF_THEIR_OWN)
def test_betas_of_a_files_own_are_read_shown_kept_and_drawn(tmp_path, places, betas, kind):
    """Whatever the betas are, the network is drawn with them, and with no others."""
    beside, config = places
    path = file_of(tmp_path / "f.safetensors", beside, SPEC, cfg=SMALL)
    if config:
        scheduler(tmp_path, prediction_type="v_prediction", **config)
    out = tmp_path / "out/f.safetensors"
    convert(path, out, "diffusers", **HEADS)
    pure = float(betas[-1]) == 1
    place = "scheduler_config.json" if config and not beside else "its buffer"
    for file in (path, out):
        target, table, zero_snr = said(file)
        o = Objective(**with_table(meta_of(file), "", "f"))
        assert (target, zero_snr) == ("v", pure) and o.table == table
        got, wanted = alphas_bar(table, zero_snr), bars_of(betas)
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=0)
        torch.testing.assert_close(1 - got, 1 - wanted, rtol=2e-3, atol=0)
        shown = "\n".join(inspect(str(file), **HEADS))
        assert kind in shown and place in shown and ("zero_snr=True" in shown) == pure
        assert len(shown) < 4000
        with pytest.raises(UserError, match="says its table is"):
            said(file, "scaled_linear")
        if len(table) < 80:
            assert table == f"0.0015,0.0195,{kind}" == said(file, said_table("", table))[1]


@pytest.mark.parametrize(
    "table, betas, wanted",
    [
        ("", "", ""),
        ("cosine", "", "cosine"),
        ("", "1e-4, 0.02 ,linear", "linear"),
        ("linear", "0.0001,0.02,linear", "linear"),
        ("", "0.00085,0.012,sqrt", "scaled_linear"),
        ("", "0.1,0.2,squaredcos_cap_v2", "cosine"),
        ("", "0.0015,0.0195,scaled_linear", LONG),
        ("linear", "0.0015,0.0195,linear", UserError("0.0195,linear is not --table linear")),
        ("", "0.0015,0.0195", UserError("wanted START,END,SCHEDULE")),
        ("", "0.0015,0.0195,sqrt_linear", UserError("wanted START,END,SCHEDULE")),
        ("", "0.0195,1,linear", UserError("0 < START, END < 1")),
        ("", "nan,0.1,linear", UserError("0 < START, END < 1")),
        ("", "0.5,0.9,linear", UserError("leave nothing of the image")),
        ("", "none.json", UserError("is no scheduler's config")),
        ("", "run.json", UserError("nothing of it is known: lr")),
    ],
)  # fmt: skip
def test_betas_are_said_in_one_spelling(table, betas, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.json").write_text('{"lr": 1, "shift": 3}')  # of a run, not of a scheduler
    if isinstance(wanted, str):
        assert said_table(table, betas) == wanted
        return
    with pytest.raises(UserError, match=str(wanted).strip(". ")):
        said_table(table, betas)


def test_betas_may_be_taken_from_a_schedulers_config(tmp_path):
    scheduler(tmp_path, trained_betas=OWN)
    table = said_table("", str(tmp_path / "scheduler/scheduler_config.json"))
    assert betas_of(table).tolist() == pytest.approx(OWN, rel=1e-12)
    assert said_table("", table) == table


@pytest.mark.parametrize("name", ["betas", "teacher_betas"])
def test_a_schedulers_config_that_ends_in_pure_noise_is_not_taken_for_one_that_does_not(
    tmp_path, name
):
    scheduler(tmp_path, **SD_BETAS, rescale_betas_zero_snr=True)
    file = str(tmp_path / "scheduler/scheduler_config.json")
    flag = name.replace("betas", "zero_snr").replace("_", "-")
    with pytest.raises(UserError, match=f"ends in pure noise.  Add --{flag}[.]"):
        said_table("", file, name=name)
    assert said_table("", file, True, name) == "scaled_linear"


def test_no_word_of_a_file_reaches_the_terminal_as_a_command(tmp_path, user):
    word = "\x1b[2J" + "x"
    path = file_of(tmp_path / "f.safetensors", {}, {"modelspec.prediction_type": word}, cfg=SMALL)
    code, out, _ = user(main, "inspect", path, "--num-head-channels", 16)
    assert code == 0 and "\x1b" not in "".join(out) and "[2jx" in "".join(out)
    save_unet(tmp_path / "own.safetensors", UNet(SMALL), {"said": [word], "objective": "v"})
    code, out, _ = user(main, "inspect", tmp_path / "own.safetensors")
    assert code == 0 and "\x1b" not in "".join(out) and "[2Jx" in "".join(out)
    save_file({word: EMPTY}, tmp_path / "none.safetensors")
    code, _, err = user(main, "inspect", tmp_path / "none.safetensors")
    assert code == 2 and "\x1b" not in err[0] and "[2Jx" in err[0]


def test_zero_snr_can_be_said_where_a_file_is_silent(tmp_path, user):
    silent = file_of(tmp_path / "f.safetensors", V, cfg=SMALL)
    for table, zero_snr in (("scaled_linear", True), (LONG, True), ("linear", False)):
        o = Objective(**with_table(meta_of(silent), table, "f", zero_snr))
        assert (o.target, o.table, o.zero_snr) == ("v", table, zero_snr)
    # Said alone, it is kept for whoever knows the schedule.
    more = ("--num-head-channels", 16)
    out = tmp_path / "out.safetensors"
    code, *_ = user(main, "convert", silent, out, "--layout", "native", "--zero-snr", *more)
    assert code == 0 and said(out, "linear") == ("v", "linear", True)
    with safe_open(out, "pt") as file:
        assert "ztsnr" in file.keys()
    code, shown, _ = user(main, "inspect", out, *more)
    assert "zero terminal SNR on by --zero-snr" in shown and "by its marker v_pred" in shown
    full = tmp_path / "full.safetensors"
    betas = ("--betas", LONG, "--zero-snr")
    assert user(main, "convert", silent, full, "--layout", "native", *betas, *more)[0] == 0
    assert said(full) == ("v", LONG, True)
    code, shown, _ = user(main, "inspect", full, *betas, *more)
    assert code == 0 and "0.0015 to 0.0195, scaled_linear" in shown and "zero_snr=True" in shown


@pytest.mark.parametrize(
    "beside, config, words, message",
    [
        (LDM, None, ["--zero-snr"], "does not end in pure noise, got --zero-snr"),
        ({}, {"prediction_type": "sample"}, ["--zero-snr"], "does not end in pure noise"),
        ({}, {}, ["--betas", LONG], "its table is 'linear', got '0.0015,0.0195,scaled_linear'"),
        ({}, None, ["--objective", "eps", "--zero-snr"], "zero_snr with target eps"),
        ({}, None, ["--objective", "fm", "--zero-snr"], "is fm, which has none"),
        ({}, None, ["--zero-snr"], "does not say its objective"),
        ({}, None, ["--objective", "v", "--betas", "1,2,3"], "wanted START,END,SCHEDULE"),
        ({}, None, ["--table", "linear", "--betas", LONG], "is not --table linear"),
    ],
)
def test_flags_that_contradict_a_file_are_refused(tmp_path, user, beside, config, words, message):
    path = file_of(tmp_path / "f.safetensors", {**beside, **(V if beside else {})}, cfg=SMALL)
    if config is not None:
        scheduler(tmp_path, **config)
    code, _, errors = user(main, "inspect", path, "--num-head-channels", 16, *words)
    assert code == 2 and len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize(
    "config, note",
    [
        ({"timestep_spacing": "trailing", **SD_BETAS}, "timestep spacing trailing"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "shift 3.0"),
        ({"prediction_type": "flow_prediction", "flow_shift": 2.5}, "shift 2.5"),
    ],
)
def test_where_a_sampler_puts_its_steps_is_shown_and_kept(tmp_path, config, note):
    scheduler(tmp_path, **config)
    path = file_of(tmp_path / "f.safetensors", cfg=SMALL)
    convert(path, tmp_path / "out.safetensors", "native", **HEADS)
    for file in (path, tmp_path / "out.safetensors"):
        assert f"{note} (scheduler_config.json)" in "\n".join(inspect(str(file), **HEADS))


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
