"""A flow that SDXL was fine-tuned to, in other people's programs: diffusers' pipeline draws what we
draw, and ComfyUI's convention (ModelSamplingSD3) is ours."""

import re
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from ckpt import load_unet, save_unet
from ckpt.convert import convert
from diffusion.sampling import sample
from diffusion.solvers import time_grid
from objectives import make_objective
from samplers import Sampling, open_generator

PROMPT = "a photo of a cat, masterpiece"
DOCS = Path(__file__).parents[2] / "docs" / "checkpoints.md"


@pytest.fixture(scope="module")
def diffusers():
    for name in ("diffusers", "transformers"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    import diffusers

    return diffusers


@pytest.fixture(scope="module")
def tuned(diffusers, tmp_path_factory):
    """(a pipeline's folder, a run's file): SDXL in miniature after two steps of --objective fm."""
    import pipelines

    folder = pipelines.made("sdxl")[1]
    net, _ = load_unet(folder)
    objective, g = make_objective("fm"), torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=g)
    told = {"context": draw(4, 77, 2048), "y": draw(4, 2816)}
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    for _ in range(2):
        loss = objective.loss(net.train(), draw(4, 4, 8, 8), generator=g, **told).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path = tmp_path_factory.mktemp("tuned") / "model.safetensors"
    save_unet(path, net.eval(), {"objective": asdict(objective), "resolution": 64})
    return folder, path


def scheduler_of_the_docs():
    """The class that docs/checkpoints.md shows for diffusers' pipeline."""
    found = r"```python\n(from diffusers import Flow.*?)\n\n\npipe"
    code = re.search(found, DOCS.read_text(), re.S)
    names = {}
    exec(code[1], names)
    return names["Flow"]


def test_diffusers_pipeline_draws_a_converted_flow_as_we_do(diffusers, tuned, tmp_path):
    (folder, path), cfg, shift = tuned, 5.0, 3.0
    flags = {"prompt": PROMPT, "steps": 4, "method": "euler", "cfg": cfg, "resolution": 64}
    flags |= {"text": str(folder), "vae": f"sdxl:{folder / 'vae'}", "shift": shift}
    gen, pixels = open_generator(Sampling(str(path), **flags), torch.device("cpu")), []
    decode = gen.vae.decode
    gen.vae.decode = lambda z: pixels.append(decode(z)) or pixels[0]
    gen.images([3, 4], [0, 0])
    convert(path, tmp_path / "unet", "diffusers")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
        folder,
        unet=diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet"),
        scheduler=scheduler_of_the_docs()(shift=shift),
    )
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        theirs = pipe(
            [PROMPT] * 2, latents=gen.noise([3, 4]), guidance_scale=cfg, height=64, width=64,
            sigmas=np.linspace(1, 1 / 4, 4), output_type="pt",
        ).images  # fmt: skip
    theirs = theirs * 2 - 1
    assert theirs.std() > 0.05  # it is a picture
    assert (pixels[0].clamp(-1, 1) - theirs).abs().max() < 1e-4


# ---- ComfyUI ------------------------------------------------------------------------------------


def comfy_sigma(time: torch.Tensor, shift: float) -> torch.Tensor:
    """What ModelSamplingSD3 makes of a share of the way: comfy's time_snr_shift."""
    return shift * time / (1 + (shift - 1) * time)


def test_comfyuis_modelsamplingsd3_is_our_flow():
    """Its loop, written from its formulas: the network is fed x and 1000 sigma; x0 = x - sigma out;
    k-diffusion's Euler step; noise_scaling begins at sigma noise + (1 - sigma) latent."""
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 3, generator=g, dtype=torch.float64)
    fed = []

    def net(x, time, **cond):
        fed.append(time[0].item())
        wave = (time / 300).cos().view(-1, 1, 1, 1)
        return torch.einsum("ij,bjhw->bihw", weights.to(x), x) * 0.3 + wave

    noise, latent = torch.randn(2, 2, 3, 4, 4, generator=g, dtype=torch.float64)
    sigmas = comfy_sigma(torch.linspace(1, 0, 7, dtype=torch.float64), 3.0)
    x = sigmas[0] * noise + (1 - sigmas[0]) * latent
    for now, then in zip(sigmas, sigmas[1:]):
        denoised = x - net(x, torch.full((2,), 1000.0) * now) * now
        x = x + (x - denoised) / now * (then - now)
    theirs, fed = fed, []

    flow = make_objective("fm")
    found = sample(
        partial(flow.predict, net), flow.prior(noise), method="euler", steps=6, shift=3.0
    )
    torch.testing.assert_close(found.x, x, rtol=1e-5, atol=1e-5)
    assert fed == pytest.approx(theirs, rel=1e-6) and fed[0] == 1000
    torch.testing.assert_close(time_grid(6, 3.0).double(), sigmas, rtol=1e-6, atol=1e-7)


def test_training_at_shift_3_is_sampling_at_shift_3():
    """--shift of training and ComfyUI's shift are one formula on the times."""
    q = torch.linspace(0, 1, 101, dtype=torch.float64)
    flow = replace(make_objective("fm"), density="uniform", shift=3.0)
    torch.testing.assert_close(flow.time(q).double(), comfy_sigma(q, 3.0), rtol=1e-6, atol=1e-7)
