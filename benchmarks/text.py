"""Prompts' speed, against transformers and diffusers:  python benchmarks/text.py [--out FILE]

The text encoders of Stable Diffusion 1 and XL with random weights, on 8 prompts; the tokenizer on
distinct prompts, cold; and a guided DDIM step of a miniature of each family, as samplers.py takes
it, against diffusers' U-Net and scheduler doing the same. In turns, medians; above 1, ours is
faster. On a GPU if there is one, networks in bf16 there, else on the CPU in fp32. Needs
transformers and diffusers (requirements-dev.txt).
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import pipelines
from benchmarks.race import CUDA, DEVICE, alternate, finish
from ckpt import load_unet
from diffusion.guidance import guided
from diffusion.sampling import sample
from diffusion.solvers import time_grid
from harness import record
from harness.cli import cli, flag, parse
from objectives import make_objective
from text import BOS, EOS, TEXT_PRESETS, TextEncoder, tokenize, vocabulary, word_ids

DTYPE = torch.bfloat16 if CUDA else torch.float32
ROUNDS, PROMPTS, STRINGS, STEPS = 9, 8, 4_000, 5
WORDS = "a photo of the red blue green cat dog house tree hair glasses 1girl solo ,".split()


def prompts(n: int, seed: int = 0) -> list[str]:
    """n distinct ones of 10 to 40 words, some of them made up."""
    rng = random.Random(seed)

    def word() -> str:
        if rng.random() < 0.9:
            return rng.choice(WORDS)
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 9)))

    return [" ".join(word() for _ in range(rng.randint(10, 40))) for _ in range(n)]


def peer_of(net: TextEncoder) -> torch.nn.Module:
    """transformers' encoder with the same weights."""
    cfg = net.cfg
    peer = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=cfg.vocab, hidden_size=cfg.width, intermediate_size=4 * cfg.width,
            num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads, hidden_act=cfg.act,
            projection_dim=cfg.projection or cfg.width, bos_token_id=BOS, eos_token_id=EOS,
        )
    ).eval()  # fmt: skip
    inner = {k: v for k, v in net.state_dict().items() if not k.startswith("text_projection")}
    peer.text_model.load_state_dict(inner)
    return peer


@torch.no_grad()
def encoders() -> dict[str, dict[str, float]]:
    found = {}
    for name in ("clip-l", "clip-bigg"):
        net = TextEncoder(TEXT_PRESETS[name]).eval()
        peer = peer_of(net).to(DEVICE, DTYPE)
        net = net.to(DEVICE, DTYPE)
        ids = torch.randint(0, 49_000, (PROMPTS, 77), device=DEVICE)
        ids[:, 0], ids[:, 60:] = BOS, EOS
        apart = float((net(ids).last - peer.text_model(ids).last_hidden_state).abs().max())
        assert apart < (0.5 if CUDA else 1e-3), f"not the same function: {apart}"
        sides = {"ours": lambda: net(ids), "transformers": lambda: peer.text_model(ids)}
        times = alternate(in_peace(sides), ROUNDS)
        found[name] = ratio(times, "transformers", PROMPTS, "prompts/s")
    return found


def in_peace(sides: dict[str, Callable]) -> dict[str, Callable]:
    """Without gradients, whatever calls; to its end, on a GPU too."""

    def whole(call: Callable) -> Callable:
        @torch.no_grad()
        def timed() -> None:
            call()
            finish()

        return timed

    return {name: whole(call) for name, call in sides.items()}


def ratio(times: dict[str, float], peer: str, n: int, unit: str) -> dict[str, float]:
    return {unit: n / times["ours"], f"ratio to {peer}": times[peer] / times["ours"]}


def tokenizer() -> dict[str, float]:
    """Strings a second: with nothing remembered, and again."""
    texts = prompts(STRINGS)
    vocabulary()
    seconds = {}
    for state in ("cold", "warm"):
        if state == "cold":
            word_ids.cache_clear()
        start = time.perf_counter()
        for text in texts:
            tokenize(text)
        seconds[state] = time.perf_counter() - start
    return {f"strings/s, {state}": STRINGS / took for state, took in seconds.items()}


@torch.no_grad()
def steps(family: str) -> dict[str, float]:
    """Five guided DDIM steps of four images: ours and diffusers'."""
    pipe = pipelines.pipeline(family)
    with tempfile.TemporaryDirectory() as folder:
        pipe.unet.save_pretrained(f"{folder}/unet")
        net, _ = load_unet(f"{folder}/unet")
    net = net.eval().to(DEVICE, DTYPE)
    pipe.unet.to(DEVICE, DTYPE)
    g, n = torch.Generator().manual_seed(0), 4
    x = torch.randn(n, 4, 32, 32, generator=g).to(DEVICE)
    context = torch.randn(2, 77, net.cfg.context_dim, generator=g).to(DEVICE, DTYPE)
    cond = {"context": context[:1].expand(n, -1, -1)}
    null = {"context": context[1:]}
    more: dict[str, Any] = {}
    if net.cfg.vector_dim:
        pooled = torch.randn(1, 1280, generator=g).to(DEVICE, DTYPE)
        sizes = torch.full((1, 6), 256.0, device=DEVICE)
        waves = pipe.unet.add_time_proj(sizes.flatten()).view(1, -1).to(DTYPE)
        cond["y"] = torch.cat([pooled, waves], 1).expand(n, -1)
        null["y"] = torch.cat([pooled, waves], 1)
        both = {"text_embeds": pooled.expand(2 * n, -1), "time_ids": sizes.expand(2 * n, -1)}
        more = {"added_cond_kwargs": both}
    objective = make_objective("ddpm", table="scaled_linear")
    predict = guided(objective, lambda x, t, **cond: net(x.to(DTYPE), t, **cond), 7.0, null=null)
    grid = time_grid(STEPS, 1.0, objective.t_max, "trailing", "scaled_linear")
    told = torch.cat([context[1:].expand(n, -1, -1), context[:1].expand(n, -1, -1)])

    def theirs() -> torch.Tensor:
        pipe.scheduler.set_timesteps(STEPS)
        z = x
        for t in pipe.scheduler.timesteps:
            both = torch.cat([z, z]).to(DTYPE)
            out = pipe.unet(both, t, encoder_hidden_states=told, **more).sample.float()
            weak, strong = out.chunk(2)
            z = pipe.scheduler.step(weak + 7.0 * (strong - weak), t, z).prev_sample
        return z

    def ours() -> torch.Tensor:
        return sample(predict, objective.prior(x), method="ddim", grid=grid, cond=cond).x

    apart = float((ours() - theirs()).abs().max() / theirs().abs().max())
    assert apart < (0.1 if CUDA else 1e-3), f"not the same pictures: {apart}"
    times = alternate(in_peace({"ours": ours, "diffusers": theirs}), ROUNDS)
    return ratio(times, "diffusers", n * STEPS, "guided image steps/s")


@dataclass(frozen=True)
class Config:
    out: str = flag(
        "", "JSON file to write; default benchmarks/results/text.json", writes=".json"
    )


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(json.dumps(vars(cfg), indent=1))
        return
    torch.manual_seed(0)
    result = {**encoders(), "tokenizer": tokenizer()}
    result |= {f"{family} in miniature": steps(family) for family in ("sd1", "sdxl")}
    for name, row in result.items():
        print(f"{name:<22} " + "  ".join(f"{key} {value:,.2f}" for key, value in row.items()))
    report = {"rounds": ROUNDS, "dtype": str(DTYPE).removeprefix("torch."), "results": result}
    if cfg.out:
        record.save(Path(cfg.out), {**record.context(), **report})
    else:
        record.write("text", report)


if __name__ == "__main__":
    cli(main)
