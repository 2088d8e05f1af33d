"""The U-Net against diffusers' with the same weights, published sizes, and its own promises. (SD's
parity: ckpt/test_layouts.py.)"""

import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, randomize
from kernels.attention import attention, attention_ref
from kernels.groupnorm import group_norm_silu, group_norm_silu_ref
from model import (
    PRESETS,
    Block,
    UNet,
    UNetConfig,
    build,
    infer_config,
    multiplier,
    network_name,
    num_params,
    timestep_embedding,
)

SMALL = UNetConfig(
    in_channels=4,
    out_channels=4,
    model_channels=32,
    channel_mult=(1, 2, 2),
    num_res_blocks=2,
    attention=(0, 1, 1),
    num_head_channels=16,
)
SIZES = {
    "toy-281m": (280_674_336, 354),
    "toy-281m-attn": (281_730_336, 384),
    "adm-256-uncond": (552_814_086, 566),
    "adm-256": (553_838_086, 567),
    "adm-512": (558_997_638, 645),
    "adm-128": (421_529_606, 493),
    "adm-64": (295_904_454, 541),
    "sd15": (859_520_964, 686),
    "sd21": (865_910_724, 686),
    "sdxl": (2_567_463_684, 1680),
    "sdxl-refiner": (2_259_526_660, 1220),
}
# 64 channels: with 32 a group of GroupNorm is one channel, and an embedding added before it is
# without effect.
SD = UNetConfig(
    4,
    4,
    model_channels=64,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention=(2, 0),
    num_head_channels=16,
    vector_dim=12,
    context_dim=24,
    use_scale_shift_norm=False,
    resblock_updown=False,
)


def batch(
    cfg: UNetConfig, B: int = 2, size: int = 8, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Fixed inputs of every kind that a config takes."""
    g = torch.Generator().manual_seed(7)
    inputs = {
        "x": torch.randn(B, cfg.in_channels, size, size, generator=g, dtype=dtype),
        "t": torch.tensor([1.0, 500.0, 999.0])[:B],
    }
    if cfg.num_classes:
        inputs["y"] = torch.arange(B) % cfg.num_classes
    if cfg.vector_dim:
        inputs["y"] = torch.randn(B, cfg.vector_dim, generator=g, dtype=dtype)
    if cfg.context_dim:
        inputs["context"] = torch.randn(B, 5, cfg.context_dim, generator=g, dtype=dtype)
    return inputs


@pytest.mark.parametrize("name", SIZES)
def test_preset_has_the_published_parameter_and_tensor_count(name):
    with torch.device("meta"):
        tensors = len(UNet(PRESETS[name]).state_dict())
    assert (num_params(PRESETS[name]), tensors) == SIZES[name]


@pytest.mark.parametrize(
    "cfg",
    [
        pytest.param(SMALL, id="film-resblock_updown-legacy"),
        pytest.param(replace(SMALL, use_scale_shift_norm=False), id="additive"),
        pytest.param(replace(SMALL, resblock_updown=False), id="conv_resample"),
        pytest.param(replace(SMALL, attention_order="new"), id="new_order"),
        pytest.param(
            replace(SMALL, attention=(1, 0, 0), num_res_blocks=1), id="attention_at_the_top"
        ),
    ],
)
def test_computes_what_diffusers_computes_with_the_same_weights(cfg):
    pytest.importorskip("diffusers", reason="oracle: pip install -r requirements-dev.txt")
    from benchmarks.peer_unet import peer_unet

    net = randomize(UNet(cfg)).double()
    peer = peer_unet(net).double()
    x, t = (
        torch.randn(3, 4, 8, 16, dtype=torch.float64),
        torch.tensor([0.0, 312.5, 999.0], dtype=torch.float64),
    )
    ours, theirs = net(x, t), peer(x, t).sample
    assert (ours - theirs).abs().max() < 1e-12 * theirs.abs().max()
    assert theirs.std() > 0.1


def test_attention_order_changes_the_function_not_the_shapes():
    legacy, new = UNet(SMALL), UNet(replace(SMALL, attention_order="new"))
    randomize(legacy)
    new.load_state_dict(legacy.state_dict())
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 2.0])
    assert (legacy(x, t) - new(x, t)).abs().max() > 1e-3


@pytest.mark.parametrize("cfg", [replace(SMALL, num_classes=3), SD], ids=["adm", "sd"])
def test_starts_as_zero_and_every_parameter_gets_a_gradient_once_it_is_not(cfg):
    net, inputs = UNet(cfg), batch(cfg)
    assert net(**inputs).abs().max() == 0
    for value in inputs.values():
        value.requires_grad_(value.is_floating_point() and value.ndim > 1)
    randomize(net)(**inputs).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []
    assert [
        k
        for k, v in inputs.items()
        if v.requires_grad and (v.grad is None or v.grad.abs().max() == 0)
    ] == []


def test_null_label_equals_no_label_and_labels_differ():
    net = randomize(UNet(replace(SMALL, num_classes=3)))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 2.0])
    assert torch.equal(net(x, t, torch.tensor([-1, -1])), net(x, t))
    assert (net(x, t, torch.tensor([0, 0])) - net(x, t, torch.tensor([1, 1]))).abs().max() > 1e-3


@pytest.mark.parametrize("cfg", [SMALL, SD], ids=["adm", "sd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_channels_last_throughout(cfg, dtype):
    net, seen = randomize(UNet(cfg)).to(dtype), []
    for module in net.modules():
        if (
            isinstance(module, Block)
            or isinstance(module, torch.nn.Conv2d)
            and module.kernel_size == (3, 3)
        ):
            module.register_forward_hook(
                lambda m, args, out: seen.append(
                    args[0].is_contiguous(memory_format=torch.channels_last)
                    and out.is_contiguous(memory_format=torch.channels_last)
                )
            )
    net(**batch(cfg, size=16, dtype=dtype))
    assert len(seen) > 20 and all(seen)


def test_autocast_takes_fp32_conditioning():
    net, inputs = randomize(UNet(SD)), batch(SD)
    exact = net(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(**inputs)
    assert (low - exact).abs().max() < 0.1 * exact.abs().max()
    half = net.to(torch.bfloat16)
    assert (
        half(inputs["x"].bfloat16(), *list(inputs.values())[1:]) - exact
    ).abs().max() < 0.1 * exact.abs().max()


def test_context_and_vector_reach_the_output_per_sample():
    net, inputs = randomize(UNet(SD)), batch(SD)
    whole = net(**inputs).detach()
    for key in ("y", "context"):
        changed = inputs[key].clone()
        changed[1] += 1
        out = net(**(inputs | {key: changed}))
        assert torch.equal(out[0], whole[0]) and (out[1] - whole[1]).abs().max() > 1e-3
    # Tokens are a set: their order comes from the encoder.
    shuffled = net(
        **(inputs | {"context": inputs["context"].flip(1)})
    )
    assert torch.allclose(shuffled, whole, rtol=0, atol=1e-5 * float(whole.abs().max()))


def test_swapping_any_two_neighbours_of_one_shape_is_noticed():
    """Which of two same-shape tensors is which: all are visible in the output, but for biases that
    are only ever added together; the unique tags of test_layouts.py tell those apart."""
    cfg = replace(SD, attention=(1, 1), linear_projection=False)
    net, inputs = randomize(UNet(cfg)).double(), batch(cfg, size=4, dtype=torch.float64)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight")):
                p *= 3  # an attention that is far from uniform
    params, before, by_shape = dict(net.named_parameters()), net(**inputs), {}
    for name, p in params.items():
        by_shape.setdefault(p.shape, []).append(name)
    pairs, blind = [pair for names in by_shape.values() for pair in zip(names, names[1:])], set()
    with torch.no_grad():
        for a, b in pairs:
            params[a].data, params[b].data = params[b].data, params[a].data
            if (net(**inputs) - before).abs().max() < 1e-6 * before.abs().max():
                blind.add((a, b))
            params[a].data, params[b].data = params[b].data, params[a].data
    blocks = [
        name[: -len(".in_layers.2.bias")] for name in params if name.endswith(".in_layers.2.bias")
    ]
    twins = {(f"{block}.in_layers.2.bias", f"{block}.emb_layers.1.bias") for block in blocks}
    twins |= {
        (f"{block}.out_layers.3.bias", f"{block}.skip_connection.bias")
        for block in blocks
        if f"{block}.skip_connection.bias" in params
    }
    assert len(pairs) > 150 and blind == twins


# ---- features and recomputation -----------------------------------------------------------------


@pytest.mark.parametrize("cfg", [SMALL, SD], ids=["adm", "sd"])
def test_features_are_what_the_blocks_return(cfg):
    net, inputs, seen = randomize(UNet(cfg)), batch(cfg), {}
    modules = dict(net.named_modules())
    for name in net.block_names:
        modules[name].register_forward_hook(
            lambda m, args, out, name=name: seen.__setitem__(name, out)
        )
    plain = net(**inputs)
    assert tuple(seen) == net.block_names  # in forward order
    asked = (net.block_names[-1], "middle_block", "input_blocks.0")
    out, h = net(**inputs, features=asked)
    assert (
        torch.equal(out, plain)
        and tuple(h) == asked
        and all(torch.equal(h[n], seen[n]) for n in asked)
    )
    assert net(**inputs, features=())[1] == {}
    with pytest.raises(ValueError, match=r"no block 'midle_block'.  Closest: middle_block"):
        net(**inputs, features=("midle_block",))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_survive_a_full_graph_compile(checkpointing):
    cfg = replace(SD, channel_mult=(1,), attention=(1,))
    net, inputs = randomize(UNet(cfg)), batch(cfg)
    net.checkpointing = checkpointing
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    out, h = net(**inputs, features=("input_blocks.1", "middle_block"))
    fast, g = compiled(**inputs, features=("input_blocks.1", "middle_block"))
    assert (
        torch.allclose(out, fast, atol=1e-5)
        and tuple(g) == tuple(h)
        and all(torch.allclose(g[n], h[n], atol=1e-5) for n in h)
    )
    g["middle_block"].sum().backward()
    assert net.input_blocks[0][0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("cfg", [replace(SMALL, dropout=0.2), SD], ids=["adm-dropout", "sd"])
def test_checkpointing_changes_no_bit_of_any_gradient(cfg, monkeypatch):
    calls, forward = [], Block.forward
    monkeypatch.setattr(
        Block, "forward", lambda self, *args: calls.append(self) or forward(self, *args)
    )
    net, inputs, grads = randomize(UNet(cfg)), batch(cfg), []
    inputs["x"].requires_grad_()
    for net.checkpointing in (False, True):
        torch.manual_seed(3)  # of dropout
        inputs["x"].grad, _ = None, net.zero_grad()
        out, h = net(**inputs, features=("middle_block",))
        (out.square().sum() + h["middle_block"].sum()).backward()
        grads.append([inputs["x"].grad, *(p.grad for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert len(calls) == 3 * len(net.block_names)  # once, and then twice: it did recompute


# ---- infer_config -------------------------------------------------------------------------------

UNSEEN = ("num_heads", "num_head_channels", "attention_order", "dropout")
AVGPOOL = replace(SMALL, resblock_updown=False, conv_resample=False)


@pytest.mark.parametrize(
    "cfg",
    [
        *(cfg for cfg in PRESETS.values() if isinstance(cfg, UNetConfig)),
        AVGPOOL,
        replace(AVGPOOL, attention=(1, 0, 0), num_classes=7),
        replace(SMALL, resblock_updown=False),
        replace(SMALL, attention=(0, 0, 0)),
        replace(SMALL, use_scale_shift_norm=False, channel_mult=(1.5, 3, 3), model_channels=64),
        replace(SMALL, channel_mult=(1, 7 / 3, 3), model_channels=96),
        SD,
        replace(SD, linear_projection=False),
    ],
)
def test_config_is_read_off_names_and_shapes(cfg):
    with torch.device("meta"):
        state = dict(UNet(cfg).state_dict())
    if not cfg.linear_projection:  # as LDM's files have them
        state = {
            k: v[..., None, None]
            if k.endswith(("proj_in.weight", "proj_out.weight")) and v.ndim == 2
            else v
            for k, v in state.items()
        }
    assert infer_config(state, **{k: getattr(cfg, k) for k in UNSEEN}) == cfg
    assert infer_config(state, **asdict(cfg)) == cfg  # what is known and visible must agree


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "sdxl-refiner"])
def test_stable_diffusion_needs_no_hints_but_takes_them(name):
    with torch.device("meta"):
        state = UNet(PRESETS[name]).state_dict()
    assert infer_config(state, linear_projection=True) == replace(
        PRESETS[name], linear_projection=True
    )
    same = {k: getattr(PRESETS[name], k) for k in ("num_heads", "num_head_channels")}
    assert infer_config(state, **same) == infer_config(state)
    own = "'num_heads': 8" if name == "sd15" else "'num_head_channels': 64"
    for wrong in (
        {"num_heads": 4},
        {"num_head_channels": 40},
        {"num_heads": 1, "num_head_channels": 32},
    ):
        with pytest.raises(ValueError, match=rf"was given, .* are S.*, which has .{own}"):
            infer_config(state, **wrong)


def test_multiplier_gives_back_every_width():
    assert all(
        int(multiplier(C, m) * m) == C
        for m in (32, 96, 160, 192, 224, 320, 384)
        for C in range(32, 4096, 32)
    )
    assert isinstance(multiplier(640, 320), int)


def shapes(cfg, **changes):
    with torch.device("meta"):
        return dict(UNet(cfg).state_dict()) | changes


@pytest.mark.parametrize(
    "state, known, message",
    [
        (shapes(SMALL), {}, "the number of attention heads and the order of the qkv rows"),
        (shapes(SMALL), {"attention_order": "new"}, "shows the number of attention heads .model"),
        (shapes(SMALL), {"num_heads": 4}, "no tensor shows the order of the qkv rows"),
        (shapes(SD), {}, "shows the number of attention heads .model_channels 64, context_dim 24"),
        (shapes(SMALL), {"num_heads": 5, "attention_order": "new"}, "do not split into 5 heads"),
        ({}, {}, "no tensor 'time_embed.0.weight' among 0"),
    ],
)
def test_what_cannot_be_read_off_is_asked_for(state, known, message):
    with pytest.raises(ValueError, match=message):
        infer_config(state, **known)


def test_one_head_needs_no_order():
    assert infer_config(shapes(SMALL), num_heads=1).attention_order == "legacy"


def test_time_embedding_is_cos_then_sin_and_fp32_in_bf16():
    t = torch.tensor([988.49, 0.0])
    e = timestep_embedding(t, 8)
    freqs = 10000.0 ** (-torch.arange(4) / 4)
    assert torch.allclose(
        e, torch.cat([(t[:, None] * freqs).cos(), (t[:, None] * freqs).sin()], 1), atol=1e-5
    )
    assert (timestep_embedding(torch.tensor([988.0]), 8) - e[:1]).abs().max() > 1e-2


def test_an_odd_number_of_model_channels_computes():
    e = timestep_embedding(torch.tensor([3.0]), 33)
    assert e.shape == (1, 33) and e[0, -1] == 0
    assert torch.equal(e[:, :32], timestep_embedding(torch.tensor([3.0]), 32))
    widths = tuple(multiplier(C, 33) for C in (32, 64))
    net = UNet(UNetConfig(model_channels=33, channel_mult=widths))
    assert net(torch.randn(1, 32, 4, 4), torch.tensor([1.0])).shape == (1, 32, 4, 4)


@pytest.mark.parametrize("film", [True, False])
@pytest.mark.parametrize("silu", [True, False])
def test_group_norm_silu_matches_its_fp64_reference(film, silu):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 5, 3, generator=g) * 0.3 + 2
    w, b = torch.randn(64, generator=g), torch.randn(64, generator=g)
    scale, shift = (
        (torch.randn(2, 64, generator=g), torch.randn(2, 64, generator=g)) if film else (None, None)
    )
    args = [x, w, b, 32, scale, shift, silu]
    exact = group_norm_silu_ref(*[a.double() if isinstance(a, torch.Tensor) else a for a in args])
    ours = group_norm_silu(x.contiguous(memory_format=torch.channels_last), *args[1:])
    assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()
    plain = F.group_norm(x.double(), 32, w.double(), b.double()) * (
        1 + (scale.double()[..., None, None] if film else 0)
    )
    plain = plain + (shift.double()[..., None, None] if film else 0)
    assert torch.allclose(exact, F.silu(plain) if silu else plain, atol=1e-10)


def test_attention_matches_its_fp64_reference_on_strided_inputs():
    qkv = torch.randn(2, 10, 3, 4, 16, dtype=torch.float64)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    assert torch.allclose(attention(q, k, v), attention_ref(q, k, v), atol=1e-12)
    assert torch.allclose(
        attention(q, k[:, :, :7], v[:, :, :7], scale=0.3),
        attention_ref(q, k[:, :, :7], v[:, :, :7], 0.3),
        atol=1e-12,
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: UNetConfig(model_channels=48), "not a multiple of 32"),
        (lambda: UNetConfig(model_channels=64, num_head_channels=48), "do not split into heads"),
        (lambda: UNetConfig(channel_mult=(1, 2, 3)), "give one each"),
        (lambda: UNet(SMALL)(torch.randn(1, 4, 6, 8), torch.tensor([1.0])), "divisible by 4"),
        (
            lambda: UNet(SMALL)(torch.randn(1, 4, 8, 8), torch.tensor([1.0]), torch.tensor([0])),
            "takes no y",
        ),
        (lambda: UNetConfig(num_heads=24), "do not split into 24 heads"),
        (
            lambda: UNet(replace(SMALL, num_classes=3))(
                **(batch(SMALL) | {"y": torch.tensor([0, 3])})
            ),
            "labels 0 to 3: wanted 0 to 2, or -1",
        ),
        (
            lambda: UNet(replace(SMALL, num_classes=3))(
                **(batch(SMALL) | {"y": torch.tensor([-2, 1])})
            ),
            "labels -2 to 1",
        ),
        (lambda: UNetConfig(channel_mult=(2**-10, 1)), "level 0 has 0 channels"),
        (lambda: UNetConfig(attention=(0, 2)), "without context_dim"),
        (lambda: replace(SD, num_classes=2), "set one"),
        (lambda: UNet(SMALL)(**batch(SMALL), context=torch.zeros(2, 5, 24)), "takes no context"),
        (
            lambda: UNet(SD)(**(batch(SD) | {"context": None})),
            r"context is None: wanted \(2, tokens, 24\)",
        ),
        (
            lambda: UNet(SD)(**(batch(SD) | {"context": torch.zeros(2, 5, 768)})),
            r"context is \(2, 5, 768\): wanted \(2, tokens, 24\)",
        ),
        (
            lambda: UNet(SD)(**(batch(SD) | {"context": torch.zeros(1, 5, 24)})),
            r"context is \(1, 5, 24\)",
        ),
        (lambda: UNet(SD)(**(batch(SD) | {"y": None})), r"y is None: wanted \(2, 12\)"),
        (
            lambda: UNet(SD)(**(batch(SD) | {"y": torch.tensor([0, 1])})),
            r"y is \(2,\): wanted \(2, 12\)",
        ),
        (
            lambda: UNet(replace(SMALL, num_classes=3))(
                **(batch(SMALL) | {"y": torch.zeros(2, 3)})
            ),
            "wanted integer class labels",
        ),
    ],
)
def test_impossible_shapes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- networks -----------------------------------------------------------------------------------


def test_a_network_is_built_from_its_config():
    assert (
        network_name(SMALL) == "UNet" and type(build(SMALL)) is UNet and build(SMALL).cfg == SMALL
    )
    assert [cfg.multiple for cfg in (PRESETS["nano"], SMALL, PRESETS["adm-512"])] == [2, 4, 64]
    with pytest.raises(ValueError, match="no network has a int: add a line to model.NETWORKS"):
        build(3)


def test_the_model_and_its_kernels_run_alone_in_another_project(tmp_path):
    """docs/forking.md: copy model.py and kernels/, and use them."""
    shutil.copy(ROOT / "model.py", tmp_path)
    ours = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=ours)
    code = """if True:
        import torch
        from model import PRESETS, UNet
        x, t = torch.randn(2, 32, 4, 4), torch.tensor([1.0, 999.0])
        print(tuple(UNet(PRESETS["nano"])(x, t).shape))
    """
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 32, 4, 4)"
