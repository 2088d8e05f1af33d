"""Encoding and decoding speed on a CPU:  python benchmarks/vae.py

Our VAE against diffusers' classes of full size with the same random weights, as diffusers builds
them and in channels_last; alternating, medians, as a ratio (above 1 = ours is faster).
"""

import sys
from pathlib import Path

import diffusers
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.race import alternate
from ckpt.vaes import vae_map
from harness import record
from vae import VAE, VAEConfig, tensor_shapes

ROUNDS = 5
# Family, its config, batch, pixels.
CASES = {
    "sd, 64 px, batch 4": ("sd", VAEConfig(), 4, 64),
    "sd, 256 px": ("sd", VAEConfig(), 1, 256),
    "flux2, 256 px": ("flux2", VAEConfig(32, stats=True), 1, 256),
}


def peer(vae: VAE) -> torch.nn.Module:
    """diffusers' class with the same weights."""
    cfg = vae.cfg
    common = dict(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=cfg.encoder,
        latent_channels=cfg.z,
        layers_per_block=2,
    )
    kind = diffusers.AutoencoderKLFlux2 if cfg.stats else diffusers.AutoencoderKL
    net = kind(**common)
    state = vae.state_dict()
    table = vae_map(tensor_shapes(cfg), "diffusers")
    net.load_state_dict({name: state[k].reshape(shape) for k, (name, shape) in table.items()})
    return net.eval().requires_grad_(False)


@torch.no_grad()
def against_diffusers(family: str, cfg: VAEConfig, batch: int, side: int) -> dict[str, float]:
    ours = VAE(cfg, family)
    stock = peer(ours)
    nhwc = peer(ours).to(memory_format=torch.channels_last)
    x = torch.rand(batch, 3, side, side) * 2 - 1
    z = ours.moments(x)[0]
    latents = ours.normalise(z)

    def wide(image: torch.Tensor) -> torch.Tensor:
        return image.contiguous(memory_format=torch.channels_last)

    encode = {
        "ours": lambda: ours.encode(x),
        "diffusers": lambda: stock.encode(x).latent_dist.mean,
        "diffusers channels_last": lambda: nhwc.encode(wide(x)).latent_dist.mean,
    }
    decode = {
        "ours": lambda: ours.decode(latents),
        "diffusers": lambda: stock.decode(z).sample,
        "diffusers channels_last": lambda: nhwc.decode(wide(z)).sample,
    }
    errors = {
        "encode": z - encode["diffusers"](),
        "decode": decode["ours"]() - decode["diffusers"](),
    }
    row = {f"{part}, max difference": float(error.abs().max()) for part, error in errors.items()}
    assert all(error < 1e-3 for error in row.values()), f"not the same function: {row}"
    for part, calls in (("encode", encode), ("decode", decode)):
        times = alternate(calls, ROUNDS)
        row |= {f"{part}, {k} s": v for k, v in times.items()}
        row[f"{part}, images/s"] = batch / times["ours"]
        row |= {f"{part}, ratio to {k}": times[k] / times["ours"] for k in list(times)[1:]}
    return row


if __name__ == "__main__":
    torch.manual_seed(0)
    results = {}
    for name, case in CASES.items():
        results[name] = row = against_diffusers(*case)
        print(name)
        for part in ("encode", "decode"):
            speed, stock = row[f"{part}, images/s"], row[f"{part}, ratio to diffusers"]
            nhwc = row[f"{part}, ratio to diffusers channels_last"]
            print(
                f"  {part} {speed:.2f} images/s, {stock:.2f}× diffusers, {nhwc:.2f}× in "
                "channels_last",
                flush=True,
            )
    record.write("vae", {"rounds": ROUNDS, "results": results})
