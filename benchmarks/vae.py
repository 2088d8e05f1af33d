"""Encoding and decoding speed on a CPU:  python benchmarks/vae.py

Our VAE against diffusers' classes of full size with the same random weights, as diffusers builds them and in channels_last;
alternating, medians, as a ratio (above 1 = ours is faster).
"""

import sys
from pathlib import Path

import diffusers
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from harness import record
from benchmarks.race import alternate
from ckpt.vaes import vae_map
from vae import VAE, VAEConfig, tensor_shapes

ROUNDS = 5
CASES = {                                    # family, its config, batch, pixels
    "sd, 64 px, batch 4": ("sd", VAEConfig(), 4, 64),
    "sd, 256 px": ("sd", VAEConfig(), 1, 256),
    "flux2, 256 px": ("flux2", VAEConfig(32, stats=True), 1, 256),
}


def peer(vae: VAE) -> torch.nn.Module:
    """diffusers' class with the same weights."""
    cfg = vae.cfg
    common = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=cfg.encoder,
                  latent_channels=cfg.z, layers_per_block=2)
    net = diffusers.AutoencoderKLFlux2(**common) if cfg.stats else diffusers.AutoencoderKL(**common)
    net.load_state_dict({name: vae.state_dict()[k].reshape(shape) for k, (name, shape) in vae_map(tensor_shapes(cfg), "diffusers").items()})
    return net.eval().requires_grad_(False)


@torch.no_grad()
def against_diffusers(family: str, cfg: VAEConfig, batch: int, side: int) -> dict[str, float]:
    ours = VAE(cfg, family)
    stock, nhwc = peer(ours), peer(ours).to(memory_format=torch.channels_last)
    x = torch.rand(batch, 3, side, side) * 2 - 1
    z = ours.moments(x)[0]
    last, latents = torch.channels_last, ours.normalise(z)
    errors = {"encode": z - stock.encode(x).latent_dist.mean, "decode": ours.decode(latents) - stock.decode(z).sample}
    row = {f"{part}, max difference": float(error.abs().max()) for part, error in errors.items()}
    assert all(error < 1e-3 for error in row.values()), f"not the same function: {row}"
    for part, calls in {"encode": {"ours": lambda: ours.encode(x), "diffusers": lambda: stock.encode(x).latent_dist.mean,
                                   "diffusers channels_last": lambda: nhwc.encode(x.contiguous(memory_format=last)).latent_dist.mean},
                        "decode": {"ours": lambda: ours.decode(latents), "diffusers": lambda: stock.decode(z).sample,
                                   "diffusers channels_last": lambda: nhwc.decode(z.contiguous(memory_format=last)).sample}}.items():
        times = alternate(calls, ROUNDS)
        row |= {f"{part}, {k} s": v for k, v in times.items()} | {f"{part}, images/s": batch / times["ours"]}
        row |= {f"{part}, ratio to {k}": times[k] / times["ours"] for k in list(times)[1:]}
    return row


if __name__ == "__main__":
    torch.manual_seed(0)
    results = {}
    for name, case in CASES.items():
        results[name] = row = against_diffusers(*case)
        print(name, *(f"  {part} {row[f'{part}, images/s']:.2f} images/s, {row[f'{part}, ratio to diffusers']:.2f}× diffusers, "
                      f"{row[f'{part}, ratio to diffusers channels_last']:.2f}× in channels_last" for part in ("encode", "decode")), sep="\n", flush=True)
    record.write("vae", {"rounds": ROUNDS, "results": results})
