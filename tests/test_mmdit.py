"""Transformers against diffusers' with the same weights, published sizes, and their own promises.

Every way to be slightly wrong that anybody has found is tried, and must be seen.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mmdit
from benchmarks.peer_dit import peer_dit
from ckpt import load_unet, save_unet
from diffusion.positions import rotate, rotations, sincos
from kernels import attention
from mmdit import MMDiT, MMDiTConfig, PRESETS
from mmdit_cases import OF_DIFFUSERS, SMALL, ask_peer, filled, peer_of, told
from model import PRESETS as ALL
from model import num_params

BOUND = 1e-8  # of fp64 outputs, relative to the largest: diffusers has fp32 in places
# What the authors' files hold beside parameters is one table of places.
SIZES = {
    "sit-s": (32_865_056, 131 + 1),
    "sit-b": (130_315_808, 131 + 1),
    "sit-l": (457_840_672, 251 + 1),
    "sit-xl": (674_834_720, 291 + 1),
    "sd3-medium": (2_028_328_000, 490 + 1),
    "sd3.5-medium": (2_243_171_520, 664 + 1),
    "sd3.5-large": (8_056_627_520, 922 + 1),
    "flux1-dev": (11_901_408_320, 780),
    "flux1-schnell": (11_891_178_560, 776),
    "flux2-klein-4b": (3_875_544_576, 149),
    "flux2-dev": (32_223_281_152, 299),
}


def answer(net: MMDiT, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return net(**inputs)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def told_as(net: MMDiT, **changes) -> None:
    """Another config for all parts of a built network."""
    for module in net.modules():
        if hasattr(module, "cfg"):
            module.cfg = replace(net.cfg if module is net else module.cfg, **changes)


@pytest.fixture(scope="module")
def peers():
    """{family: (diffusers' network, what it says)}."""
    made = {}
    for name in OF_DIFFUSERS:
        peer = peer_of(filled(SMALL[name]))
        with torch.no_grad():
            made[name] = peer, ask_peer(peer, SMALL[name], told(SMALL[name]))
    return made


# ---- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_a_preset_has_the_published_size(name):
    cfg = PRESETS[name]
    if name.startswith("sit"):  # as released: SD's latents, twice the outputs, ImageNet
        cfg = replace(cfg, in_channels=4, out_channels=8, num_classes=1000)
    with torch.device("meta"):
        tensors = MMDiT(cfg).state_dict()
    assert (num_params(cfg), len(tensors)) == SIZES[name]


def test_every_preset_is_known_to_the_scripts():
    assert PRESETS.items() <= ALL.items() and len(PRESETS) == len(SIZES) + 2


# ---- diffusers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OF_DIFFUSERS)
def test_computes_what_diffusers_computes(name, peers):
    cfg = SMALL[name]
    assert distance(answer(filled(cfg), told(cfg)), peers[name][1]) < BOUND


def test_a_sit_computes_what_diffusers_dit_computes():
    cfg = replace(SMALL["sit"], out_channels=8)
    net, inputs = filled(cfg), told(cfg) | {"y": torch.tensor([1, 3])}
    inputs["x"] = inputs["x"][..., :8]  # theirs knows squares only
    with torch.no_grad():
        # Theirs has a table for its own size, from the first place on.
        net.pos_embed = sincos(4, cfg.width).double()
        told_as(net, pos_max=4)
        peer = peer_dit(net, 8).eval()
        wanted = peer(inputs["x"], inputs["t"], inputs["y"]).sample
    inputs["y"] = torch.tensor([1, -1])
    assert distance(answer(net, inputs), wanted) < BOUND
    inputs["y"] = torch.tensor([1, 2])
    assert distance(answer(net, inputs), wanted) > 3 * BOUND


def swap_halves(layer: torch.nn.Module) -> None:
    for p in layer.parameters():
        p.data = torch.cat(p.data.chunk(2)[::-1])


def exchange(a: torch.nn.Module, b: torch.nn.Module) -> None:
    a.weight.data, b.weight.data = b.weight.data, a.weight.data


def final_not_swapped(net, inputs, monkeypatch):
    swap_halves(net.final_layer["adaLN_modulation"][1])


def last_text_not_swapped(net, inputs, monkeypatch):
    swap_halves(net.joint_blocks[-1].context_block.adaLN_modulation[1])


def token_order(net, inputs, monkeypatch):
    told_as(net, tokens="cpq" if net.cfg.tokens == "pqc" else "pqc")


def time_not_scaled(net, inputs, monkeypatch):
    inputs["t"] = inputs["t"] / 1000


def guidance_not_scaled(net, inputs, monkeypatch):
    inputs["guidance"] = inputs["guidance"] / 1000


def other_activation(net, inputs, monkeypatch):
    """The exact GELU; SwiGLU's halves exchanged."""

    def activate(cfg, h):
        if cfg.mlp == "gelu":
            return F.gelu(h)
        value, gate = h.chunk(2, -1)
        return F.silu(gate) * value

    monkeypatch.setattr(mmdit, "activate", activate)


def cropped_at_the_corner(net, inputs, monkeypatch):
    side = net.cfg.pos_max
    table = net.pos_embed.view(1, side, side, -1)
    h, w = (n // net.cfg.patch for n in inputs["x"].shape[2:])
    moved = table.roll(((side - h) // 2, (side - w) // 2), (1, 2))
    net.pos_embed = moved.reshape(net.pos_embed.shape)


def rows_and_columns(net, inputs, monkeypatch):
    side = net.cfg.pos_max
    table = net.pos_embed.view(1, side, side, -1).transpose(1, 2)
    net.pos_embed = table.reshape(net.pos_embed.shape)


def second_attention_reads_the_moved(net, inputs, monkeypatch):
    def end(self, x, h, moves):
        out = x + moves[2] * self.attn.proj(h)
        if self.dual:
            (h,) = mmdit.attend([self.attn2(mmdit.modulate(out, *moves[6:8]))])
            out = out + moves[8] * self.attn2.proj(h)
        h = mmdit.activate(self.cfg, self.mlp["fc1"](mmdit.modulate(out, *moves[3:5])))
        return out + moves[5] * self.mlp["fc2"](h)

    monkeypatch.setattr(mmdit.Stream, "end", end)


def norms_exchanged(net, inputs, monkeypatch):
    for module in net.modules():
        if hasattr(module, "ln_q"):
            exchange(module.ln_q, module.ln_k)


def halves_not_pairs(net, inputs, monkeypatch):
    def halves(x, turns):
        a, b = x.chunk(2, -1)
        cos, sin = turns
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    monkeypatch.setattr(mmdit, "rotate", halves)


def the_other_way_round(net, inputs, monkeypatch):
    back = torch.tensor([1.0, -1.0])[:, None, None]
    monkeypatch.setattr(mmdit, "rotate", lambda x, turns: rotate(x, turns * back))


def other_theta(net, inputs, monkeypatch):
    told_as(net, theta=12_000 - net.cfg.theta)


def other_places_of_text(net, inputs, monkeypatch):
    # Flux 1 has no axis for it, and takes its columns here.
    told_as(net, text_axis=0 if net.cfg.text_axis else 2)


def eps_of_layer_norm(net, inputs, monkeypatch):
    def modulate(x, shift, scale):
        return F.layer_norm(x, x.shape[-1:], eps=1e-5) * (1 + scale) + shift

    monkeypatch.setattr(mmdit, "modulate", modulate)


def eps_of_rms_norm(net, inputs, monkeypatch):
    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-5)

    monkeypatch.setattr(mmdit.RMSNorm, "forward", forward)


ALL_FOUR = ("sd3", "sd3.5", "flux1", "flux2")
ROTATED = ("flux1", "flux2")
MISTAKES = {
    final_not_swapped: ALL_FOUR,
    last_text_not_swapped: ("sd3", "sd3.5"),
    token_order: ALL_FOUR,
    time_not_scaled: ALL_FOUR,
    guidance_not_scaled: ROTATED,
    other_activation: ALL_FOUR,
    cropped_at_the_corner: ("sd3", "sd3.5"),
    rows_and_columns: ("sd3", "sd3.5"),
    second_attention_reads_the_moved: ("sd3.5",),
    norms_exchanged: ("sd3.5", "flux1", "flux2"),
    halves_not_pairs: ROTATED,
    the_other_way_round: ROTATED,
    other_theta: ROTATED,
    other_places_of_text: ROTATED,
    eps_of_layer_norm: ALL_FOUR,
    eps_of_rms_norm: ("sd3.5", "flux1", "flux2"),
}
CASES = [(mistake, name) for mistake, names in MISTAKES.items() for name in names]


@pytest.mark.parametrize("mistake,name", CASES, ids=lambda v: getattr(v, "__name__", v))
def test_a_mistake_is_seen(mistake, name, peers, monkeypatch):
    """The bound of the test above is tight enough for each of them."""
    net, inputs = filled(SMALL[name]), told(SMALL[name])
    mistake(net, inputs, monkeypatch)
    assert distance(answer(net, inputs), peers[name][1]) > 3 * BOUND


# ---- what it is told ----------------------------------------------------------------------------


def test_the_table_of_places_is_dits():
    """By numpy, as DiT's authors compute it: the column first."""
    side, W = 5, 24
    omega = 1.0 / 10000 ** (np.arange(W // 4, dtype=np.float64) / (W / 4))
    y, x = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    waves = [f(np.outer(place.reshape(-1), omega)) for place in (x, y) for f in (np.sin, np.cos)]
    wanted = torch.from_numpy(np.concatenate(waves, 1)).float()[None]
    assert torch.equal(sincos(side, W), wanted)


def test_rotations_only_tell_distances():
    """Of two tokens, what q and k say of each other depends on how far apart they are."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=g, dtype=torch.float64)
    turns = rotations((4, 6, 6), 10_000, 0, 0, 6, 6).double()

    def score(a: tuple[int, int], b: tuple[int, int]) -> float:
        at, to = turns[:, [6 * a[0] + a[1]]], turns[:, [6 * b[0] + b[1]]]
        return float((rotate(q, at) * rotate(k, to)).sum())

    assert score((0, 1), (2, 0)) == pytest.approx(score((3, 4), (5, 3)), rel=1e-6)
    assert score((0, 1), (2, 0)) != pytest.approx(score((0, 1), (0, 0)), rel=1e-3)


@pytest.mark.parametrize("name", ["sd3", "flux1", "flux2"])
def test_only_flux_2_counts_the_words(name):
    net, inputs = filled(SMALL[name]), told(SMALL[name])
    before = answer(net, inputs)
    inputs["context"] = inputs["context"].flip(1)
    moved = distance(answer(net, inputs), before)
    assert moved > 1e-5 if name == "flux2" else moved < 1e-13


def test_no_class_is_the_last_row():
    net, inputs = filled(SMALL["sit"]), told(SMALL["sit"])
    none = torch.tensor([-1, -1])
    last = answer(net, inputs | {"y": none})
    assert torch.equal(answer(net, inputs | {"y": None}), last)
    with torch.no_grad():
        net.y_embedder["embedding_table"].weight[:-1].zero_()
    assert torch.equal(answer(net, inputs | {"y": none}), last)
    assert not torch.equal(answer(net, inputs | {"y": torch.tensor([0, 2])}), last)


def test_sits_time_runs_backwards_from_one():
    cfg = replace(SMALL["sit"], reversed_time=True)
    inputs = told(cfg)
    plain = answer(filled(SMALL["sit"]), inputs | {"t": 1 - inputs["t"].float() / 1000})
    assert torch.equal(answer(filled(cfg), inputs), plain)


@pytest.mark.parametrize("name", SMALL)
def test_a_batch_is_its_samples(name):
    net, inputs = filled(SMALL[name]), told(SMALL[name])
    whole = answer(net, inputs)
    for i in range(2):
        alone = answer(net, {key: value[i : i + 1] for key, value in inputs.items()})
        assert distance(alone, whole[i : i + 1]) < 1e-12


@pytest.mark.parametrize("name", SMALL)
def test_times_are_looked_at_once_a_sample(name):
    """The modulations, a third of a SiT's weights, see (B, W) and never a token."""
    net, shapes = filled(SMALL[name]), {}
    for key, module in net.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, i, k=key: shapes.update({k: i[0].shape}))
    answer(net, told(SMALL[name]))
    seen = {key: shape for key, shape in shapes.items() if "adaLN" in key}
    assert seen and set(seen.values()) == {torch.Size([2, SMALL[name].width])}


# ---- its promises -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_it_begins_at_zero_and_can_leave_it(name):
    net, inputs = MMDiT(SMALL[name]), told(SMALL[name], torch.float32)
    out = net(**inputs)
    assert not out.any()
    (out - 1).square().mean().backward()
    assert net.final_layer["linear"].weight.grad.any() or not net.cfg.bias
    assert not any(p.any() for n, p in net.named_parameters() if "adaLN" in n)


@pytest.mark.parametrize("name", SMALL)
def test_features_are_the_image_after_a_block(name):
    net, inputs = filled(SMALL[name]), told(SMALL[name])
    names = net.block_names
    out, seen = net(**inputs, features=names)
    assert torch.equal(out, net(**inputs)) and tuple(seen) == names
    assert {tuple(h.shape) for h in seen.values()} == {(2, 32, 4, 6)}
    # The last one is what the last layer reads.
    tokens = seen[names[-1]].flatten(2).transpose(1, 2)
    c = F.silu(net._condition(*(inputs.get(k) for k in ("t", "y", "guidance")), inputs["x"]))
    assert torch.equal(net._pixels(tokens, c, 4, 6), out)
    with pytest.raises(ValueError, match="no block 'bloks.0'"):
        net(**inputs, features=("bloks.0",))


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_changes_no_gradient(name):
    inputs, grads = told(SMALL[name]), []
    for on in (False, True):
        net = filled(SMALL[name])
        net.checkpointing = on
        net(**inputs).square().mean().backward()
        grads.append({key: p.grad for key, p in net.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][key], grads[1][key]) for key in grads[0])


@pytest.mark.parametrize("name", SMALL)
def test_bf16_autocast_is_near(name):
    net, inputs = filled(SMALL[name], torch.float32), told(SMALL[name], torch.float32)
    wanted = answer(filled(SMALL[name]), told(SMALL[name]))
    with torch.autocast("cpu", torch.bfloat16):
        got = answer(net, inputs).double()
    low = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    whole = answer(net.bfloat16(), low | {"t": inputs["t"]}).double()
    assert distance(got, wanted) < 2 * distance(whole, wanted) < 0.05


@pytest.mark.parametrize("name", ["sit", "sd3", "sd3.5", "flux1", "flux2"])
def test_it_compiles_as_one_graph(name):
    net, inputs = filled(SMALL[name], torch.float32), told(SMALL[name], torch.float32)
    torch._dynamo.reset()  # it gives up on code that it has compiled for too many networks
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert distance(answer(compiled, inputs), answer(net, inputs)) < 1e-5


def test_the_kernels_take_turned_heads(monkeypatch):
    """Strided, rotated q and k, 71 tokens of two kinds: no multiple of a tile."""
    cfg = replace(SMALL["flux1"], width=64, heads=1, rope=(16, 24, 24), joint=1, single=1)
    net, inputs = filled(cfg, torch.float32), told(cfg, torch.float32)
    inputs["x"] = inputs["x"].repeat(1, 1, 2, 2)[..., :16, :16]  # 64 image tokens, 7 words
    seen, forward, results = [], attention.forward, []

    def counted(q, *more):
        seen.append(tuple(q.shape))
        return forward(q, *more)

    monkeypatch.setattr(attention, "FORWARD", counted)
    for mode in ("torch", "triton"):
        monkeypatch.setenv("KERNELS", mode)
        net.zero_grad()
        out = net(**inputs)
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    for a, b in zip(*results):
        assert distance(b, a) < 1e-4
    assert seen == [(2, 1, 71, 64)] * 2


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_a_file_brings_it_back(name, tmp_path):
    net = filled(SMALL[name], torch.float32)
    save_unet(tmp_path / "net.safetensors", net, {})
    again, meta = load_unet(tmp_path / "net.safetensors")
    assert again.cfg == net.cfg and meta["network"] == "MMDiT"
    inputs = told(SMALL[name], torch.float32)
    assert torch.equal(answer(again.eval(), inputs), answer(net, inputs))


WRONG = {
    "heads that do not split the width": dict(heads=5),
    "no blocks": dict(blocks=0),
    "blocks and joint ones": dict(joint=2, context_dim=8),
    "single ones alone": dict(single=2),
    "text for nobody": dict(context_dim=8),
    "no places": dict(pos_max=0),
    "places twice": dict(rope=(4, 6, 6)),
    "an axis that is none": dict(text_axis=2),
    "labels and vectors": dict(num_classes=3, vector_dim=4),
    "shared by blocks without text": dict(modulation="shared"),
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_together_is_refused(changes):
    with pytest.raises(ValueError, match="do not fit together"):
        replace(MMDiTConfig(width=32, heads=2, blocks=1, pos_max=4), **changes)


def test_what_it_cannot_read_is_refused():
    net, inputs = filled(SMALL["sit"]), told(SMALL["sit"])
    for change, words in (
        (dict(x=inputs["x"][..., :7]), "divisible by 2"),
        (dict(x=inputs["x"].repeat(1, 1, 2, 2)), "table of places ends at 12"),
        (dict(context=torch.zeros(2, 3, 4)), "takes no context"),
        (dict(guidance=torch.ones(2)), "takes no guidance"),
        (dict(y=torch.tensor([0, 3])), "wanted 0 to 2"),
    ):
        with pytest.raises(ValueError, match=words):
            net(**(inputs | change))
    net, inputs = filled(SMALL["flux1"]), told(SMALL["flux1"])
    for key in ("guidance", "context", "y"):
        with pytest.raises(ValueError, match=f"{key} is None"):
            net(**(inputs | {key: None}))


# ---- training -----------------------------------------------------------------------------------


def test_it_learns_64_pictures():
    torch.manual_seed(0)
    net = MMDiT(replace(PRESETS["sit-nano"], in_channels=4, out_channels=4))
    x0, t = torch.randn(64, 4, 1, 1).expand(64, 4, 4, 4), torch.rand(64)
    eps = torch.randn(64, 4, 4, 4)
    w = t.view(-1, 1, 1, 1)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(40):
        loss = (net((1 - w) * x0 + w * eps, 1000 * t) - (eps - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * (eps - x0).square().mean()
