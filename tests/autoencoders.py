"""Small autoencoders with random weights, their files, and diffusers' classes beside them."""

import pytest
import torch
from safetensors.torch import save_file

from ckpt.vaes import vae_map
from conftest import randomize
from vae import VAE, VAEConfig, tensor_shapes

WIDTHS = (32, 64, 128, 128)
SMALL = {
    "sd": VAEConfig(4, WIDTHS, WIDTHS),
    "sdxl": VAEConfig(4, WIDTHS, WIDTHS),
    "flux1": VAEConfig(16, WIDTHS, WIDTHS, quant=False),
    # A narrower decoder, as newer files may have.
    "flux2": VAEConfig(32, WIDTHS, (32, 64, 64, 96), stats=True),
}
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


def tensors_of(net, layout):
    """{name: tensor} of a VAE as files of a layout have them."""
    state, table = net.state_dict(), vae_map(tensor_shapes(net.cfg), layout)
    return {name: state[k].reshape(shape).clone() for k, (name, shape) in table.items()}


def peer(net):
    """diffusers' class with the same weights, put there through its own names."""
    diffusers = pytest.importorskip("diffusers", reason="pip install -r requirements-dev.txt")
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
        if cfg.stats:
            other = diffusers.AutoencoderKLFlux2(**common, decoder_block_out_channels=cfg.decoder)
        else:
            other = diffusers.AutoencoderKL(**common, layers_per_block=2)
    state = tensors_of(net, "diffusers")
    wanted = {k: v.shape for k, v in other.state_dict().items()}
    assert wanted == {k: v.shape for k, v in state.items()}
    other.load_state_dict(state, assign=True)
    return other.to(net.dtype).eval()


def images(n=2, h=32, w=48, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, h, w, generator=g, dtype=torch.float64).to(dtype) * 2 - 1


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def saved(path, net, layout="native"):
    """A file as its authors wrote it: no metadata of ours."""
    save_file({k: v.contiguous() for k, v in tensors_of(net, layout).items()}, path)
    return path
