"""LCMs that are told the strength of guidance: our pictures are diffusers'."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import randomize
from safetensors.torch import load_file, save_file

import diffusion.sampling as sampling
import samplers
from ckpt import load_unet, save_unet
from ckpt.byteunet import ByteUNet, byte_config, byte_ids
from ckpt.convert import convert, inspect
from ckpt.lcm import LCMUNet, LCMUNetConfig
from diffusion.coupling import resize
from harness.pictures import to_uint8
from model import UNet, UNetConfig, timestep_embedding
from objectives import make_objective
from samplers import Sampling, open_generator
from vae import pixel

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
import pipelines  # noqa: E402

CPU = torch.device("cpu")
PROMPT = "a photo of a cat"
NANO = LCMUNetConfig(
    in_channels=4, out_channels=4, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
    attention=(1, 0), middle_attention=1, num_heads=8, context_dim=768, resblock_updown=False,
    use_scale_shift_norm=False, linear_projection=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def lcm(tmp_path_factory):
    """(a pipeline of diffusers, its folder): the miniature of SD 1 with a strength's embedding."""
    made = pipelines.made("sd1")[0]
    torch.manual_seed(1)
    config = {k: v for k, v in made.unet.config.items() if not k.startswith("_")}
    unet = diffusers.UNet2DConditionModel(**{**config, "time_cond_proj_dim": 256})
    own, theirs = unet.state_dict(), made.unet.state_dict()
    assert own.keys() - theirs.keys() == {"time_embedding.cond_proj.weight"}
    unet.load_state_dict({**own, **theirs})
    # Far from its small first values, so that a wrong embedding shows.
    unet.time_embedding.cond_proj.weight.data.normal_(std=0.5)
    parts = {**made.components, "unet": unet.eval()}
    parts["scheduler"] = diffusers.LCMScheduler(**pipelines.BETAS, clip_sample=False)
    pipe = diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("lcm")
    pipe.save_pretrained(folder)
    return pipe, folder


def test_strengths_are_embedded_as_published():
    """The known values of w = 6.5."""
    waves = timestep_embedding(1000 * (torch.tensor([7.5]) - 1), 256, like_ho=True)[0]
    sines = torch.tensor([-0.044785, 0.762861, -0.871030])
    cosines = torch.tensor([-0.998997, 0.646562])
    torch.testing.assert_close(waves[:3], sines, rtol=0, atol=2e-3)
    torch.testing.assert_close(waves[128:130], cosines, rtol=0, atol=2e-3)


@pytest.mark.parametrize("steps, cfg", [(1, 8.0), (4, 3.0), (4, 8.0)])
def test_its_pictures_are_diffusers(lcm, monkeypatch, steps, cfg):
    pipe, folder = lcm
    drawn, own = [], sampling.draw
    for module in (samplers, sampling):
        monkeypatch.setattr(module, "draw", lambda *args: drawn.append(own(*args)) or drawn[-1])
    flags = {"prompt": PROMPT, "method": "lcm", "grid": "lcm", "steps": steps, "cfg": cfg}
    gen, pixels = open_generator(Sampling(str(folder), resolution=64, **flags), CPU), []
    decode = gen.vae.decode
    gen.vae.decode = lambda z: pixels.append(decode(z)) or pixels[0]
    gen.images([3, 4], [0, 0])
    assert gen.evaluations == 2 * steps  # one call a step
    noise, again, *later = drawn  # the generators of the steps go on behind the first noise
    assert torch.equal(noise, again) and len(later) == steps - 1
    left = iter(later)
    place = "diffusers.schedulers.scheduling_lcm.randn_tensor"
    monkeypatch.setattr(place, lambda *_, **__: next(left))
    theirs = pipe(
        [PROMPT] * 2, latents=noise, guidance_scale=cfg, num_inference_steps=steps,
        height=64, width=64, output_type="pt",
    ).images * 2 - 1  # fmt: skip
    ours = pixels[0].clamp(-1, 1)
    assert theirs.std() > 0.05
    assert (ours - theirs).abs().max() < 1e-4
    other = open_generator(Sampling(str(folder), resolution=64, **{**flags, "cfg": 5.0}), CPU)
    assert (other.images([3], [0]).images.int() - gen.images([3], [0]).images.int()).abs().max() > 2


def test_its_pictures_are_enlarged_by_a_reader_of_texts_that_its_strength_does_not_guide(
    lcm, user, tmp_path
):
    """--boost behind an LCM: x - u of one Euler step, with u of the prompt alone, though --cfg is
    8."""
    like = UNetConfig(24, 12, 32, (1,), num_res_blocks=1, attention=(0,), num_heads=2)
    net = randomize(ByteUNet(byte_config(like, 32))).eval()
    meta = {"objective": asdict(make_objective("cfm", noise_aug=0.0)), "vae": pixel(2).meta()}
    save_unet(tmp_path / "twice", net, meta | {"resolution": 128})
    flags = {"prompt": PROMPT, "method": "lcm", "steps": 2, "cfg": 8.0, "resolution": 64}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    words += ["--ckpt", lcm[1], "--n", 1, "--seed", 3, "--boost", tmp_path / "twice"]
    words += ["--boost-method", "euler", "--boost-steps", 1, "--npz", tmp_path / "s.npz"]
    code, out, errors = user(samplers.main, *words, "--out", tmp_path / "s")
    assert code == 0 and "boost to 128x128  NFE/image 1 " in out, errors
    pixels = open_generator(Sampling(str(lcm[1]), **flags), CPU).images([3], [0]).pixels
    low = pixel(2).encode(resize(pixels, (128, 128)))
    with torch.no_grad():
        u = net(torch.cat([low, low], 1), torch.tensor([1000.0]), context=byte_ids([PROMPT]))
    wanted = to_uint8(pixel(2).decode(low - u)).permute(0, 2, 3, 1).int().numpy()
    assert abs(np.load(tmp_path / "s.npz")["arr_0"].astype(int) - wanted).max() <= 1


def test_its_tensors_have_one_name_in_each_layout(lcm, tmp_path):
    _, folder = lcm
    net, meta = load_unet(folder)
    assert isinstance(net, LCMUNet) and isinstance(net.cfg, LCMUNetConfig)
    save_unet(tmp_path / "own.safetensors", net, {})
    again, said = load_unet(tmp_path / "own.safetensors")
    assert said["network"] == "LCMUNet" and again.cfg == net.cfg
    convert(tmp_path / "own.safetensors", tmp_path / "theirs", "diffusers")
    theirs = load_file(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors")
    wanted = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert theirs.keys() == wanted.keys()
    assert all(torch.equal(theirs[name], wanted[name]) for name in wanted)
    diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "theirs")
    # As one file without a config.json, its names are enough.
    save_file(wanted, tmp_path / "alone.safetensors")
    alone, _ = load_unet(tmp_path / "alone.safetensors", num_heads=8, objective="eps")
    assert all(map(torch.equal, alone.state_dict().values(), net.state_dict().values()))
    assert isinstance(alone, LCMUNet)


def test_the_strength_joins_the_waves_before_the_time_mlp():
    torch.manual_seed(0)
    net = randomize(LCMUNet(NANO)).double().eval()
    plain = UNet(UNetConfig(**{k: v for k, v in asdict(NANO).items() if k != "guidance"})).double()
    weights = net.state_dict()
    proj = weights.pop("guidance_proj.weight")
    plain.load_state_dict(weights)
    x, t = torch.randn(2, 4, 4, 4).double(), torch.tensor([999.0, 259.0])
    context, cfg = torch.randn(2, 3, 768).double(), torch.tensor([3.0, 8.0])
    out = net(x, t, context=context, guidance=cfg)
    embedded = timestep_embedding(1000 * (cfg - 1), 256, like_ho=True).double() @ proj.T
    shifted = embedded @ net.time_embed[0].weight.T  # the same, as a bias of the first layer
    for i in range(2):
        plain.time_embed[0].bias.data = net.time_embed[0].bias.data + shifted[i]
        alone = plain(x[i : i + 1], t[i : i + 1], context=context[i : i + 1])[0]
        torch.testing.assert_close(out[i], alone, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="guidance is None: wanted"):
        net(x, t, context=context)
    with pytest.raises(ValueError, match="such a network is a UNet"):
        replace(NANO, guidance=False)


@pytest.mark.parametrize(
    "flags, wanted",
    [
        (["--cfg", 8, "--negative", "dog"], "--negative: the network of"),
        (["--cfg", 8, "--negative", ""], "--negative: the network of"),
        (["--cfg", 8, "--cfg-interval", "0.3,5"], "--cfg-interval: the network of"),
        (["--cfg", 8, "--cfg-rescale", 0.7], "--cfg-rescale: the network of"),
        ([], "is told a strength of guidance"),
    ],
)
def test_what_asks_twice_is_refused(lcm, user, tmp_path, flags, wanted):
    words = ["--ckpt", lcm[1], "--prompt", PROMPT, "--n", 1, "--resolution", 64, "--steps", 1]
    code, _, errors = user(samplers.main, *words, "--out", tmp_path / "x", *flags)
    assert code == 2 and len(errors) == 1 and wanted in errors[0]


def test_inspect_says_how_to_draw(lcm):
    shown = "\n".join(inspect(lcm[1]))
    assert "--method lcm --cfg 8" in shown
