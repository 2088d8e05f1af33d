"""Pictures from prompts: ours are diffusers', from the same noise."""

import json
from dataclasses import asdict, replace
from functools import lru_cache

import pytest
import torch
from safetensors.torch import load_file, save_file

import samplers
import text
from ckpt import save_unet
from data.prompts import read_prompts
from harness.cli import UserError
from data import prompts
from model import PRESETS, UNet, UNetConfig
from objectives import make_objective
from samplers import Sampling, asked, open_generator

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
import pipelines  # noqa: E402
from pipelines import made  # noqa: E402

PROMPT = "a photo of a cat, masterpiece, (red hair)"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="module")
def net_file(home):
    """A network without classes or text."""
    path = home / "plain.safetensors"
    net = UNet(PRESETS["nano"])
    save_unet(path, net, {"objective": asdict(make_objective("fm")), "resolution": 8})
    return path


@pytest.fixture(autouse=True)
def layers(monkeypatch):
    """ViT-H has three layers here, of which Stable Diffusion 2 has two, as 23 of 24."""
    short = replace(text.TEXT_PRESETS["clip-h"], layers=3)
    monkeypatch.setitem(text.TEXT_PRESETS, "clip-h", short)


def ours(ckpt, seeds=(3, 4), **flags):
    """Pixels in [-1, 1] of one prompt, and the noise that they began with."""
    flags = {"prompt": PROMPT, "steps": 4, "method": "ddim", "grid": "trailing", **flags}
    if "size" not in flags:
        flags["resolution"] = 64
    gen, pixels = open_generator(Sampling(str(ckpt), **flags), torch.device("cpu")), []
    decode = gen.vae.decode
    gen.vae.decode = lambda z: pixels.append(decode(z)) or pixels[0]
    gen.images(list(seeds), [0] * len(seeds))
    return pixels[0].clamp(-1, 1), gen.noise(list(seeds))


@pytest.fixture(autouse=True)
def read_once(monkeypatch):
    """Encoders that were read for the test before stay in memory: they are most of a file."""
    monkeypatch.setattr(prompts, "open_texts", once)


once = lru_cache(maxsize=1)(text.open_texts)


def linked(folder, other, *without):
    """Another folder with the parts of a pipeline's, but for some."""
    other.mkdir()
    for part in folder.iterdir():
        if part.name not in without:
            (other / part.name).symlink_to(part)
    return other


def theirs(pipe, noise, scheduler=None, cfg=1.0, negative=None, size=(64, 64), steps=4):
    """The same by diffusers."""
    n, own = len(noise), pipe.scheduler
    pipe.scheduler = scheduler or own
    with torch.no_grad():
        images = pipe(
            [PROMPT] * n,
            negative_prompt=None if negative is None else [negative] * n,
            latents=noise,
            guidance_scale=cfg,
            num_inference_steps=steps,
            height=size[0],
            width=size[1],
            output_type="pt",
        ).images
    pipe.scheduler = own
    return images * 2 - 1


def near(a, b):
    assert b.std() > 0.05  # it is a picture
    assert (a - b).abs().max() < 1e-4


@pytest.mark.parametrize("cfg, negative", [(1.0, None), (7.0, None), (7.0, "")])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_ddim_draws_what_diffusers_draws(family, cfg, negative):
    pipe, folder = made(family)
    pixels, noise = ours(folder, cfg=cfg, negative=negative)
    near(pixels, theirs(pipe, noise, cfg=cfg, negative=negative))


SCHEDULERS = {
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero"}),
}


@pytest.mark.parametrize("method", SCHEDULERS)
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_other_solvers_draw_what_diffusers_draws(family, method):
    import diffusers

    pipe, folder = made(family)
    name, how = SCHEDULERS[method]
    spaced = {**pipelines.BETAS, "timestep_spacing": "trailing", **how}
    scheduler = getattr(diffusers, name)(**spaced)
    pixels, noise = ours(folder, method=method, cfg=7.0)
    if method == "euler":
        # diffusers begins with noise · sigma where the state's deviation is (1 + sigma²)^½.
        noise = noise * (1 + scheduler.init_noise_sigma**-2) ** 0.5
    near(pixels, theirs(pipe, noise, scheduler, cfg=7.0))


@pytest.mark.parametrize("zero_snr", [False, True])
def test_v_prediction_and_zero_snr_are_read_from_the_scheduler(home, zero_snr):
    import diffusers

    pipe, _ = made("sd2")
    how = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr}
    own = pipe.scheduler
    pipe.scheduler = diffusers.DDIMScheduler.from_config(own.config, **how)
    folder = linked(made("sd2")[1], home / f"sd2-v-{zero_snr}", "scheduler")
    pipe.scheduler.save_pretrained(folder / "scheduler")
    pixels, noise = ours(folder, cfg=7.0)
    wanted = theirs(pipe, noise, cfg=7.0)
    pipe.scheduler = own
    near(pixels, wanted)


def test_a_picture_may_be_wider_than_high():
    pipe, folder = made("sdxl")
    pixels, noise = ours(folder, size="128x64", cfg=7.0)
    near(pixels, theirs(pipe, noise, cfg=7.0, size=(64, 128)))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_one_file_draws_as_the_pipeline_it_was_made_of(family):
    _, folder = made(family)
    path = pipelines.single_file(family)
    more = {"num_heads": pipelines.HEADS[family]}
    if family == "sd2":  # its files do not say which of two objectives it has
        more |= {"objective": "eps", "table": "scaled_linear"}
    flags = {"seeds": (3,), "cfg": 7.0}
    assert (ours(path, **flags, **more)[0] - ours(folder, **flags)[0]).abs().max() < 1e-5


def test_a_picture_is_its_seeds_and_prompts_whatever_the_batch(home):
    _, folder = made("sd1")
    flags = {"prompt": f"@{home / 'lines.txt'}", "resolution": 64, "steps": 2, "cfg": 3.0}
    (home / "lines.txt").write_text("a cat, sitting\n\n犬\n")
    cfg = Sampling(str(folder), **flags)
    gen = open_generator(cfg, torch.device("cpu"))
    assert asked(cfg, gen, 5).tolist() == [0, 1, 2, 0, 1]
    assert asked(cfg, gen).tolist() == [0, 1, 2]
    both = gen.images([5, 6, 7], [0, 2, -1]).images
    for i, row in enumerate((0, 2, -1)):
        alone = gen.images([5 + i], [row]).images
        assert (alone[0].int() - both[i].int()).abs().max() <= 1
    assert (both[0].int() - gen.images([5], [2]).images[0].int()).abs().max() > 1
    # -1 is the text of nothing: of Stable Diffusion 1, the empty prompt.
    assert (gen.images([7], [1]).images[0].int() - both[2].int()).abs().max() <= 1


def test_an_empty_prompt_is_a_prompt(user, tmp_path):
    """Of Stable Diffusion 1 it is what guidance leads away from."""
    _, folder = made("sd1")
    gen = open_generator(Sampling(str(folder), prompt="", resolution=64), torch.device("cpu"))
    assert torch.equal(gen.told.cond["context"], gen.told.null["context"])
    flags = ["--ckpt", folder, "--n", 1, "--resolution", 64, "--steps", 1, "--out", tmp_path / "x"]
    code, _, errors = user(samplers.main, *flags, "--prompt", "")
    assert code == 0
    code, _, errors = user(samplers.main, *flags)
    assert code == 2 and "draws what a text says" in errors[-1]


def test_clip_skip_2_is_the_last_but_one_normed():
    pipe, folder = made("sd1")
    flags = {"prompt": PROMPT, "clip_skip": 2}
    gen = open_generator(Sampling(str(folder), **flags), torch.device("cpu"))
    ids = pipe.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
        wanted = pipe.text_encoder.final_layer_norm(states[-2])
    torch.testing.assert_close(gen.told.cond["context"], wanted, rtol=0, atol=1e-5)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_repository_is_drawn_from_like_a_folder(monkeypatch, tmp_path):
    """One in the Hub's cache, without a network: all parts are found by its name alone."""
    from huggingface_hub import constants

    _, folder = made("sdxl")
    repo = tmp_path / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "snapshots").mkdir()
    (repo / "snapshots" / COMMIT).symlink_to(folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    flags = {"seeds": (3,), "cfg": 7.0}
    assert torch.equal(ours("hf:org/name", **flags)[0], ours(folder, **flags)[0])


# ---- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def refused(user):
    """refused(flags …) -> the one line of samplers.py."""

    def line(*flags):
        code, _, err = user(samplers.main, "--device", "cpu", "--n", "1", *map(str, flags))
        assert code == 2, err
        return err[-1]

    return line


def test_prompts_that_cannot_be_read(home, refused):
    _, folder = made("sd1")
    (home / "none.txt").write_text("\n  \n")
    (home / "latin.txt").write_bytes("ein Kätzchen".encode("latin-1"))
    small = ("--ckpt", folder, "--resolution", 64, "--steps", 1)
    assert "has no prompts.  Write one a line." in refused(*small, "--prompt", f"@{home}/none.txt")
    assert "not UTF-8 (byte 5)" in refused(*small, "--prompt", f"@{home}/latin.txt")
    assert "No such file" in refused(*small, "--prompt", f"@{home}/nowhere.txt")
    assert 'Add --prompt "' in refused(*small)
    assert "--negative changes nothing here" in refused(*small, "--negative", "bad")
    alone = refused(*small, "--prompt", "a cat", "--negative", "bad")
    assert "--negative changes nothing here: it is of --cfg" in alone


def test_networks_and_encoders_that_do_not_fit(home, net_file, refused):
    _, folder = made("sd1")
    sdxl = made("sdxl")[1]
    line = refused("--ckpt", net_file, "--prompt", "a cat")
    assert "reads no text" in line and "Leave it out" in line
    both = ("--prompt", "a cat", "--resolution", 64)
    line = refused("--ckpt", folder, *both, "--text", sdxl)
    assert "tell 2048 numbers a token and 2816 an image, but the network" in line
    assert "reads 768 numbers a token" in line and "clip_l.safetensors" in line
    half = linked(sdxl, home / "half", "text_encoder", "model_index.json")
    index = json.loads((sdxl / "model_index.json").read_text())
    (half / "model_index.json").write_text(json.dumps({**index, "text_encoder": [None, None]}))
    line = refused("--ckpt", half, *both)
    assert "tell 1280 numbers a token" in line and "--text" in line and "clip_g" in line


def altered(path, change):
    """A pipeline's single file, with other tensors: change({name: tensor})."""
    tensors = load_file(pipelines.single_file("sd1"))
    change(tensors)
    save_file(tensors, path)
    return ("--ckpt", path, "--resolution", 64, "--steps", 1, "--num-heads", 8)


def test_a_file_without_encoders_is_told_which_to_give(refused, tmp_path):
    def strip(tensors):
        for name in [name for name in tensors if name.startswith("cond_stage_model.")]:
            del tensors[name]

    words = altered(tmp_path / "bare.safetensors", strip)
    line = refused(*words, "--prompt", "a cat")
    assert "has no text encoders for its network" in line
    assert "Add --text FILE: ViT-L (clip_l.safetensors)" in line


def test_an_autoencoder_that_gives_no_numbers_is_named_with_what_to_do(
    refused, tmp_path
):
    def damage(tensors):
        tensors["first_stage_model.decoder.conv_out.bias"][0] = float("nan")

    words = altered(tmp_path / "black.safetensors", damage)
    line = refused(*words, "--prompt", "a cat", "--out", tmp_path / "out")
    assert "sd: decode made 1 of 1 samples non-finite" in line and "with --vae" in line


def test_a_prompt_that_is_too_long_is_cut_and_that_is_said(user, tmp_path):
    _, folder = made("sd1")
    words = ["--ckpt", folder, "--resolution", 64, "--steps", 1, "--n", 1, "--out", tmp_path]
    words += ["--prompt", "cat " * 75 + "behind the end"]
    code, _, err = user(samplers.main, *words)
    assert code == 0 and "Cut off, of the first: 'behind the end'" in "\n".join(err)
    code, _, err = user(samplers.main, *words, "--chunks", 2)
    assert code == 0 and "Cut off" not in "\n".join(err)


@pytest.mark.parametrize("context, vector", [(0, 1), (1280, 2560)])
def test_a_network_that_is_told_more_than_a_text_is_refused(tmp_path, refused, context, vector):
    shape = dict(context_dim=context, vector_dim=vector, attention=(1,), num_head_channels=32)
    net = UNet(UNetConfig(4, 4, 32, (1,), 1, **shape))
    meta = {"objective": asdict(make_objective("fm")), "resolution": 64}
    save_unet(tmp_path / "net.safetensors", net, meta)
    line = refused("--ckpt", tmp_path / "net.safetensors", "--prompt", "a cat")
    assert f"is told {vector} numbers that do not come from a text alone" in line


def test_lines_end_where_an_editor_ends_them(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\u2028still one\r\ntwo\x0bstill two\n".encode())
    assert read_prompts(f"@{tmp_path}/a.txt") == ["one\u2028still one", "two\x0bstill two"]
    with pytest.raises(UserError, match="--prompt is not UTF-8"):
        read_prompts("\udcff")
