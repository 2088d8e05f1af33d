"""Transformers that read texts, from files of diffusers to pictures: Stable Diffusion 3 by --prompt
without T5, and 3.5, Flux 1 and Flux 2 by --context. diffusers' own pipelines are the truth."""

from functools import cache

import torch
import pytest
from safetensors.torch import save_file

import samplers
from ckpt import load_unet
from ckpt.texts import INDEX, foreign_text
from data.prompts import embedded, read_context
from harness.cli import UserError
from mmdit import MMDiTConfig
from pipelines import encoder, tokenizer
from samplers import Sampling, open_generator
from text import open_texts
from vae import load_vae

SIDE, STEPS = 64, 3
CONTEXT, VECTOR = 24, 16  # numbers of a token, and of an image, of what encoders say
CPU = torch.device("cpu")


def shaken(net):
    """Far from small first values, so that all of it counts."""
    torch.manual_seed(1)
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return net.eval()


def autoencoder(scale, shift):
    from diffusers import AutoencoderKL

    return shaken(
        AutoencoderKL(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=16,
            norm_num_groups=32,
            scaling_factor=scale,
            shift_factor=shift,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    )


def autoencoder_of_flux2():
    """Its latents are normalised by statistics of 2×2 of them."""
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(block_out_channels=(32, 32, 32, 32), norm_num_groups=32)
    torch.nn.init.normal_(vae.bn.running_mean)
    torch.nn.init.uniform_(vae.bn.running_var, 0.1, 1.1)
    return shaken(vae)


def scheduler(**how):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**how)


def sd3_of(*encoders, **how):
    """A pipeline of Stable Diffusion 3 or 3.5; encoders: two with their tokenizers, or none."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    net = SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        caption_projection_dim=128,
        pos_embed_max_size=12,
        **how,
    )
    parts = encoders or (None,) * 4
    return StableDiffusion3Pipeline(
        shaken(net), scheduler(shift=3.0), autoencoder(1.5305, 0.0609), *parts, None, None
    )


def sd3_that_reads():
    first = encoder(768, "quick_gelu", 768)
    # As released: the identity, since Stable Diffusion 3 reads this one's pooled output as it is.
    first.text_projection.weight.data = torch.eye(768)
    second = encoder(1280, "gelu", 1280)
    return sd3_of(first, tokenizer("<|endoftext|>"), second, tokenizer("!"))


def flux1_of(guided, **times):
    from diffusers import FluxPipeline, FluxTransformer2DModel

    net = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=2,
        joint_attention_dim=CONTEXT,
        pooled_projection_dim=VECTOR,
        guidance_embeds=guided,
    )
    return FluxPipeline(
        scheduler(**times), autoencoder(0.3611, 0.1159), None, None, None, None, shaken(net)
    )


def flux2_of(pipeline, guided):
    import diffusers

    net = diffusers.Flux2Transformer2DModel(
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=2,
        joint_attention_dim=CONTEXT,
        guidance_embeds=guided,
    )
    times = scheduler(use_dynamic_shifting=True)
    cls = getattr(diffusers, pipeline)
    return cls(times, autoencoder_of_flux2(), None, None, shaken(net))


TOLD = {"joint_attention_dim": CONTEXT, "pooled_projection_dim": VECTOR, "qk_norm": "rms_norm"}
PIPELINES = {
    "sd3": sd3_that_reads,
    "sd3.5-medium": lambda: sd3_of(**TOLD, dual_attention_layers=(0,)),
    "sd3.5-large": lambda: sd3_of(**TOLD),
    "flux1-dev": lambda: flux1_of(True, use_dynamic_shifting=True, max_shift=1.15, base_shift=0.5),
    "flux1-schnell": lambda: flux1_of(False),
    "flux2-dev": lambda: flux2_of("Flux2Pipeline", True),
    "flux2-klein": lambda: flux2_of("Flux2KleinPipeline", False),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name of PIPELINES) -> (diffusers' pipeline, its folder), of each once."""

    @cache
    def make(name):
        torch.manual_seed(0)
        pipe, folder = PIPELINES[name](), tmp_path_factory.mktemp(name) / "pipeline"
        pipe.save_pretrained(folder)
        return pipe, folder

    return make


@pytest.fixture(scope="module")
def sd3(made):
    return made("sd3")


@pytest.fixture(scope="module")
def flux(made):
    return made("flux1-dev")


def apart(ours, theirs):
    """How far pixels in [-1, 1] are from diffusers', in [0, 1] and clamped."""
    return float(((ours / 2 + 0.5).clamp(0, 1) - theirs).abs().max())


def grid():
    """Diffusers' own times before its shift, which it applies once to them."""
    return torch.linspace(1, 1 / STEPS, STEPS).tolist()


def test_sd3_draws_what_diffusers_draws_from_a_prompt(sd3, capsys):
    pipe, folder = sd3
    how = {"method": "euler", "steps": STEPS, "resolution": SIDE, "dtype": "fp32"}
    gen = open_generator(Sampling(str(folder), prompt="a red cat", cfg=4.0, **how), CPU)
    assert "--shift 3" in capsys.readouterr().err
    theirs = pipe(
        "a red cat",
        sigmas=grid(),
        guidance_scale=4.0,
        height=SIDE,
        width=SIDE,
        latents=gen.noise([5]),
        max_sequence_length=77,
        output_type="pt",
    ).images
    ours = gen.images([5], [0]).pixels
    assert apart(ours, theirs) < 1e-4
    assert float(theirs.std()) > 0.05


def test_the_first_encoders_pooled_output_is_not_projected(sd3, tmp_path):
    from transformers import CLIPTextModelWithProjection

    pipe, folder = sd3
    net = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder")
    net.text_projection.weight.data = torch.randn(768, 768)
    net.save_pretrained(tmp_path / "first")
    files = (tmp_path / "first", folder / "text_encoder_2")
    spec = ",".join(f"{file}/model.safetensors" for file in files)
    texts = open_texts(spec, sd3=True)
    told = texts.tell(["a red cat"])
    ids = pipe.tokenizer("a red cat", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = net.text_model(ids).pooler_output
    assert told.pooled.shape == (1, 2048) and told.context.shape == (1, 154, 4096)
    assert torch.allclose(told.pooled[:, :768], wanted, atol=1e-5)
    assert not told.context[:, 77:].any() and not told.context[..., 2048:].any()


def test_one_file_of_stability_ai_draws_what_its_folder_draws(sd3, tmp_path):
    _, folder = sd3
    net, _ = load_unet(folder)
    vae = load_vae(f"sd3:{folder / 'vae'}")
    parts = {"model.diffusion_model.": net.state_dict(), "first_stage_model.": vae.state_dict()}
    for name, encoder in zip(("clip_l", "clip_g"), open_texts(folder).encoders):
        parts[f"text_encoders.{name}.transformer."] = foreign_text(encoder.state_dict(), "hf")
    tensors = {
        prefix + name: tensor.contiguous()
        for prefix, part in parts.items()
        for name, tensor in part.items()
    }
    save_file(tensors, tmp_path / "sd3.safetensors")
    how = {"method": "euler", "steps": 2, "resolution": SIDE, "dtype": "fp32"}
    drawn = [
        open_generator(Sampling(str(name), prompt="a red cat", **how), CPU).images([0], [0]).pixels
        for name in (folder, tmp_path / "sd3.safetensors")
    ]
    assert float((drawn[0] - drawn[1]).abs().max()) < 1e-6


def test_a_picture_beyond_the_table_of_places_is_refused(sd3):
    asks = Sampling(str(sd3[1]), prompt="a cat", resolution=512)
    with pytest.raises(UserError, match="knows no places"):
        open_generator(asks, CPU)


def test_sides_that_do_not_make_whole_patches_are_refused(sd3):
    asks = Sampling(str(sd3[1]), prompt="a cat", resolution=72)
    with pytest.raises(UserError, match="multiple of 16"):
        open_generator(asks, CPU)


# {name: --cfg}: of the networks that are told it, and of those that lead away from a null text.
STRENGTHS = {"flux1-dev": 3.5, "flux2-dev": 4.0}
AWAY = {"sd3.5-medium": 4.5, "sd3.5-large": 4.5, "flux2-klein": 4.0, "flux1-schnell": 1.0}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """(what encoders said, {False: its file, True: a file without a vector}) and a null text."""
    g, folder = torch.Generator().manual_seed(2), tmp_path_factory.mktemp("said")
    shapes = {"context": (3, 9, CONTEXT), "null_context": (1, 9, CONTEXT)}
    vectors = {"y": (3, VECTOR), "null_y": (1, VECTOR)}
    texts = {k: torch.randn(shape, generator=g) for k, shape in (shapes | vectors).items()}
    save_file(texts, folder / "vector.safetensors")
    save_file({k: texts[k] for k in shapes}, folder / "tokens.safetensors")
    return texts, folder


def asked_of_theirs(name, pipe, texts, noise):
    """What diffusers' pipeline takes, for row 1."""
    asked = {"prompt_embeds": texts["context"][1:2]}
    away = AWAY.get(name, 1.0) > 1
    if away:
        asked["negative_prompt_embeds"] = texts["null_context"]
    if not name.startswith("flux2"):
        asked["pooled_prompt_embeds"] = texts["y"][1:2]
        if away:
            asked["negative_pooled_prompt_embeds"] = texts["null_y"]
    if name.startswith("sd3"):
        return asked | {"latents": noise, "sigmas": grid()}
    if name.startswith("flux2"):
        return asked | {"latents": pipe._patchify_latents(noise)}
    return asked | {"latents": pipe._pack_latents(noise, 1, *noise.shape[1:])}


@pytest.mark.parametrize("name", STRENGTHS | AWAY)
def test_embeddings_are_drawn_as_diffusers_draws_them(name, made, said):
    (pipe, folder), (texts, files) = made(name), said
    strength = (STRENGTHS | AWAY)[name]
    file = files / ("tokens.safetensors" if name.startswith("flux2") else "vector.safetensors")
    how = {"method": "euler", "steps": STEPS, "resolution": SIDE, "dtype": "fp32"}
    gen = open_generator(Sampling(str(folder), context=str(file), cfg=strength, **how), CPU)
    theirs = pipe(
        **asked_of_theirs(name, pipe, texts, gen.noise([5])),
        guidance_scale=strength,
        num_inference_steps=STEPS,
        height=SIDE,
        width=SIDE,
        output_type="pt",
    ).images
    ours = gen.images([5], [1]).pixels
    assert apart(ours, theirs) < 1e-4
    assert float(theirs.std()) > 0.05
    other = gen.images([5], [2]).pixels
    assert float((ours - other).abs().max()) > 1e-3
    assert gen.evaluations == STEPS * 2 * (2 if AWAY.get(name, 1.0) > 1 else 1)


NO_NULL = "is told no strength of guidance, it is led away from a null text"
GUIDANCE = {
    "flux1-dev": ([], "is told a strength of guidance.  Add --cfg: "),
    "flux2-dev": (["--cfg", 4, "--cfg-interval", "0.3,5"], "--cfg-interval: the network of "),
    "flux1-schnell": (["--cfg", 3.5], NO_NULL),
    "flux2-klein": (["--cfg", 4], NO_NULL),
    "sd3.5-large": (["--cfg", 4.5], NO_NULL),
}


@pytest.mark.parametrize("name", GUIDANCE)
def test_guidance_that_a_network_has_not_is_one_line(name, made, said, tmp_path, user):
    """A strength for those that are told one, and a null text for those that are not."""
    texts, (words, wanted) = said[0], GUIDANCE[name]
    names = ("context",) if name.startswith("flux2") else ("context", "y")
    save_file({key: texts[key] for key in names}, tmp_path / "rows.safetensors")
    asked = ["--ckpt", made(name)[1], "--context", tmp_path / "rows.safetensors", "--n", 1]
    asked += ["--steps", 1, "--resolution", SIDE, "--out", tmp_path / "out", "--device", "cpu"]
    code, _, err = user(samplers.main, *asked, *words)
    assert code == 2 and wanted in err[-1], err
    assert not (tmp_path / "out").exists() and not any("Traceback" in line for line in err)


def gen_cfg(context, vector):
    """A config of a network that reads contexts this wide and vectors this long."""
    return MMDiTConfig(
        width=128, heads=2, joint=1, last_pre_only=True, pos_max=4, context_dim=context,
        vector_dim=vector,
    )  # fmt: skip


def asks(file, cfg=1.0):
    return Sampling("x", context=str(file), cfg=cfg)


def test_a_row_is_drawn_alone_and_guidance_needs_a_null_text(tmp_path):
    net, file = gen_cfg(24, 16), tmp_path / "texts.safetensors"
    rows = {"context": torch.randn(3, 9, 24), "y": torch.randn(3, 16)}
    save_file(rows, file)
    assert torch.equal(embedded(asks(f"{file}:2"), net).cond["y"], rows["y"][2:])
    with pytest.raises(UserError, match="has 3 rows"):
        embedded(asks(f"{file}:3"), net)
    with pytest.raises(UserError, match="has none"):
        embedded(asks(file, cfg=4.0), net)
    nulls = {"null_context": torch.randn(1, 9, 24), "null_y": torch.randn(1, 16)}
    save_file(rows | nulls, file)
    told = embedded(asks(file, cfg=4.0), net)
    both = told.rows(torch.tensor([1, -1]))
    assert torch.equal(both["context"], torch.stack([rows["context"][1], nulls["null_context"][0]]))
    assert torch.equal(both["y"], torch.stack([rows["y"][1], nulls["null_y"][0]]))


@pytest.mark.parametrize(
    "tensors",
    [
        {"context": (3, 9, 23), "y": (3, 16)},
        {"context": (3, 9, 24)},
        {"context": (3, 9, 24), "y": (2, 16)},
        {"context": (0, 9, 24), "y": (0, 16)},
        {"context": (3, 0, 24), "y": (3, 16)},
        {"context": (), "y": (3, 16)},
        {"context": (3, 9, 24), "y": ()},
        {"context": (3, 9, 24), "y": (3, 16), "null_context": (), "null_y": (1, 16)},
        {"context": (3, 9, 24), "y": (3, 16), "null_y": (1, 16)},
        {"context": (3, 9, 24), "y": (3, 16), "null_context": (1, 8, 24), "null_y": (1, 16)},
        {"context": (3, 9, 24), "y": (3, 16), "null_context": (2, 9, 24), "null_y": (2, 16)},
    ],
)
def test_embeddings_that_do_not_fit_are_refused(tmp_path, tensors):
    file = tmp_path / "texts.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, file)
    with pytest.raises(UserError, match="wanted context"):
        read_context(str(file), gen_cfg(24, 16), null=True)


def test_a_transformer_without_what_it_reads_says_what_is_wanted(flux, sd3):
    _, folder = flux
    with pytest.raises(UserError, match=r"--context FILE: .*with context \(n, tokens, 24"):
        open_generator(Sampling(str(folder), prompt="a cat"), CPU)
    with pytest.raises(UserError, match="draws what a text says"):
        open_generator(Sampling(str(sd3[1])), CPU)
    assert (sd3[1] / INDEX).is_file()


def test_nan_in_embeddings_is_refused(tmp_path):
    file = tmp_path / "texts.safetensors"
    save_file({"context": torch.full((1, 2, 24), torch.nan), "y": torch.zeros(1, 16)}, file)
    with pytest.raises(UserError, match="context has NaN"):
        read_context(str(file), gen_cfg(24, 16))
