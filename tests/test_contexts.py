"""Transformers that read texts, from files of diffusers to pictures: Stable Diffusion 3 by --prompt
without T5, Flux by --context. diffusers' own pipelines are the truth."""

import torch
import pytest
from safetensors.torch import save_file

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


def scheduler(**how):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**how)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    """(diffusers' pipeline, its folder)."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    net = SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        caption_projection_dim=128,
        pos_embed_max_size=12,
    )
    first = encoder(768, "quick_gelu", 768)
    # As released: the identity, since Stable Diffusion 3 reads this one's pooled output as it is.
    first.text_projection.weight.data = torch.eye(768)
    pipe = StableDiffusion3Pipeline(
        shaken(net),
        scheduler(shift=3.0),
        autoencoder(1.5305, 0.0609),
        first,
        tokenizer("<|endoftext|>"),
        encoder(1280, "gelu", 1280),
        tokenizer("!"),
        None,
        None,
    )
    folder = tmp_path_factory.mktemp("sd3") / "sd3"
    pipe.save_pretrained(folder)
    return pipe, folder


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


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """(diffusers' pipeline, its folder, a file of what encoders said)."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    net = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=True,
    )
    pipe = FluxPipeline(
        scheduler(use_dynamic_shifting=True, max_shift=1.15, base_shift=0.5),
        autoencoder(0.3611, 0.1159),
        None,
        None,
        None,
        None,
        shaken(net),
    )
    folder = tmp_path_factory.mktemp("flux")
    pipe.save_pretrained(folder / "flux")
    texts = {"context": torch.randn(3, 9, 24), "y": torch.randn(3, 16)}
    save_file(texts, folder / "texts.safetensors")
    return pipe, folder / "flux", folder / "texts.safetensors"


def test_flux_draws_what_diffusers_draws_from_embeddings(flux):
    pipe, folder, texts = flux
    how = {"method": "euler", "steps": STEPS, "resolution": SIDE, "dtype": "fp32"}
    gen = open_generator(Sampling(str(folder), context=str(texts), cfg=3.5, **how), CPU)
    said, noise = read_context(str(texts), gen_cfg(24, 16)), gen.noise([5])
    theirs = pipe(
        prompt_embeds=said["context"][1:2],
        pooled_prompt_embeds=said["y"][1:2],
        guidance_scale=3.5,
        num_inference_steps=STEPS,
        height=SIDE,
        width=SIDE,
        latents=pipe._pack_latents(noise, 1, *noise.shape[1:]),
        output_type="pt",
    ).images
    ours = gen.images([5], [1]).pixels
    assert apart(ours, theirs) < 1e-4
    assert float(theirs.std()) > 0.05
    other = gen.images([5], [2]).pixels
    assert float((ours - other).abs().max()) > 1e-3


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
    _, folder, _ = flux
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
