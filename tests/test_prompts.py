"""Pictures from prompts: ours are diffusers', from the same noise."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch

import samplers
import text
from ckpt import save_unet
from model import PRESETS, UNet
from objectives import make_objective
from samplers import Sampling, asked, open_generator

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
import pipelines  # noqa: E402

PROMPT = "a photo of a cat, masterpiece, (red hair)"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="module")
def kept():
    """{family: its pipeline}, made once."""
    return {}


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


def made(kept, home, family):
    """(a family's pipeline, its folder)."""
    if family not in kept:
        kept[family] = pipelines.pipeline(family)
        kept[family].set_progress_bar_config(disable=True)
        kept[family].save_pretrained(home / family)
    return kept[family], home / family


def ours(ckpt, seeds=(3, 4), **flags):
    """Pixels in [-1, 1] of one prompt, and the noise that they began with."""
    flags = {"prompt": PROMPT, "steps": 5, "method": "ddim", "grid": "trailing", **flags}
    if "size" not in flags:
        flags["resolution"] = 64
    gen, pixels = open_generator(Sampling(str(ckpt), **flags), torch.device("cpu")), []
    decode = gen.vae.decode
    gen.vae.decode = lambda z: pixels.append(decode(z)) or pixels[0]
    gen.images(list(seeds), [0] * len(seeds))
    return pixels[0].clamp(-1, 1), gen.noise(list(seeds))


def theirs(pipe, noise, scheduler=None, cfg=1.0, negative=None, size=(64, 64), steps=5):
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


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("cfg, negative", [(1.0, None), (7.0, None), (7.0, ""), (7.0, "blurry")])
def test_ddim_draws_what_diffusers_draws(kept, home, family, cfg, negative):
    pipe, folder = made(kept, home, family)
    pixels, noise = ours(folder, cfg=cfg, negative=negative)
    near(pixels, theirs(pipe, noise, cfg=cfg, negative=negative))


SCHEDULERS = {
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero"}),
}


@pytest.mark.parametrize("method", SCHEDULERS)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_other_solvers_draw_what_diffusers_draws(kept, home, family, method):
    import diffusers

    pipe, folder = made(kept, home, family)
    name, how = SCHEDULERS[method]
    spaced = {**pipelines.BETAS, "timestep_spacing": "trailing", **how}
    scheduler = getattr(diffusers, name)(**spaced)
    pixels, noise = ours(folder, method=method, cfg=7.0)
    if method == "euler":
        # diffusers begins with noise · sigma where the state's deviation is (1 + sigma²)^½.
        noise = noise * (1 + scheduler.init_noise_sigma**-2) ** 0.5
    near(pixels, theirs(pipe, noise, scheduler, cfg=7.0))


@pytest.mark.parametrize("zero_snr", [False, True])
def test_v_prediction_and_zero_snr_are_read_from_the_scheduler(kept, home, zero_snr):
    import diffusers

    pipe, _ = made(kept, home, "sd2")
    how = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr}
    own = pipe.scheduler
    pipe.scheduler = diffusers.DDIMScheduler.from_config(own.config, **how)
    folder = home / f"sd2-v-{zero_snr}"
    pipe.save_pretrained(folder)
    pixels, noise = ours(folder, cfg=7.0)
    wanted = theirs(pipe, noise, cfg=7.0)
    pipe.scheduler = own
    near(pixels, wanted)


def test_a_picture_may_be_wider_than_high(kept, home):
    pipe, folder = made(kept, home, "sdxl")
    pixels, noise = ours(folder, size="128x64", cfg=7.0)
    near(pixels, theirs(pipe, noise, cfg=7.0, size=(64, 128)))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_one_file_draws_as_the_pipeline_it_was_made_of(kept, home, family):
    _, folder = made(kept, home, family)
    path = pipelines.single_file(folder, family, home / f"{family}.safetensors")
    more = {"num_heads": pipelines.HEADS[family]}
    if family == "sd2":  # its files do not say which of two objectives it has
        more |= {"objective": "eps", "table": "scaled_linear"}
    flags = {"seeds": (3,), "cfg": 7.0}
    assert (ours(path, **flags, **more)[0] - ours(folder, **flags)[0]).abs().max() < 1e-5


def test_a_picture_is_its_seeds_and_prompts_whatever_the_batch(kept, home):
    _, folder = made(kept, home, "sd1")
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


# ---- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def refused(user):
    """refused(flags …) -> the one line of samplers.py."""

    def line(*flags):
        code, _, err = user(samplers.main, "--device", "cpu", "--n", "1", *map(str, flags))
        assert code == 2, err
        return err[-1]

    return line


def test_prompts_that_cannot_be_read(kept, home, refused):
    _, folder = made(kept, home, "sd1")
    (home / "none.txt").write_text("\n  \n")
    (home / "latin.txt").write_bytes("ein Kätzchen".encode("latin-1"))
    small = ("--ckpt", folder, "--resolution", 64, "--steps", 1)
    assert "has no prompts.  Write one a line." in refused(*small, "--prompt", f"@{home}/none.txt")
    assert "not UTF-8 (byte 5)" in refused(*small, "--prompt", f"@{home}/latin.txt")
    assert "No such file" in refused(*small, "--prompt", f"@{home}/nowhere.txt")
    assert 'Add --prompt "' in refused(*small)
    assert "--negative changes nothing here" in refused(*small, "--negative", "bad")


def test_networks_and_encoders_that_do_not_fit(kept, home, net_file, refused):
    _, folder = made(kept, home, "sd1")
    made(kept, home, "sdxl")
    line = refused("--ckpt", net_file, "--prompt", "a cat")
    assert "reads no text" in line and "Leave it out" in line
    both = ("--prompt", "a cat", "--resolution", 64)
    line = refused("--ckpt", folder, *both, "--text", home / "sdxl")
    assert "tell 2048 numbers a token and 2816 an image, but the network" in line
    assert "reads 768 numbers a token" in line and "clip_l.safetensors" in line
    half = home / "half"
    if not half.exists():
        shutil.copytree(home / "sdxl", half)
        shutil.rmtree(half / "text_encoder")
        index = json.loads((half / "model_index.json").read_text())
        index["text_encoder"] = [None, None]
        (half / "model_index.json").write_text(json.dumps(index))
    line = refused("--ckpt", half, *both)
    assert "tell 1280 numbers a token" in line and "--text" in line and "clip_g" in line
