"""The U-Net against diffusers' with the same weights, guided-diffusion's published sizes, and its own promises."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from conftest import randomize
from kernels.attention import attention, attention_ref
from kernels.groupnorm import group_norm_silu, group_norm_silu_ref
from model import PRESETS, UNet, UNetConfig, num_params, timestep_embedding

SMALL = UNetConfig(in_channels=4, out_channels=4, model_channels=32, channel_mult=(1, 2, 2), num_res_blocks=2,
                   attention=(0, 1, 1), num_head_channels=16)
SIZES = {"toy-281m": (280_674_336, 354), "toy-281m-attn": (281_730_336, 384), "adm-256-uncond": (552_814_086, 566),
         "adm-256": (553_838_086, 567), "adm-512": (558_997_638, 645), "adm-128": (421_529_606, 493), "adm-64": (295_904_454, 541)}


@pytest.mark.parametrize("name", SIZES)
def test_preset_has_the_published_parameter_and_tensor_count(name):
    with torch.device("meta"):
        tensors = len(UNet(PRESETS[name]).state_dict())
    assert (num_params(PRESETS[name]), tensors) == SIZES[name]


@pytest.mark.parametrize("cfg", [
    pytest.param(SMALL, id="film-resblock_updown-legacy"),
    pytest.param(replace(SMALL, use_scale_shift_norm=False), id="additive"),
    pytest.param(replace(SMALL, resblock_updown=False), id="conv_resample"),
    pytest.param(replace(SMALL, attention_order="new"), id="new_order"),
    pytest.param(replace(SMALL, attention=(1, 0, 0), num_res_blocks=1), id="attention_at_the_top"),
])
def test_computes_what_diffusers_computes_with_the_same_weights(cfg):
    pytest.importorskip("diffusers", reason="oracle: pip install -r requirements-dev.txt")
    from benchmarks.peer_unet import peer_unet
    net = randomize(UNet(cfg)).double()
    peer = peer_unet(net).double()
    x, t = torch.randn(3, 4, 8, 16, dtype=torch.float64), torch.tensor([0.0, 312.5, 999.0], dtype=torch.float64)
    ours, theirs = net(x, t), peer(x, t).sample
    # time embeddings are fp32 in both, hence not 1e-12
    assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()
    assert theirs.std() > 0.1


def test_attention_order_changes_the_function_not_the_shapes():
    legacy, new = UNet(SMALL), UNet(replace(SMALL, attention_order="new"))
    randomize(legacy)
    new.load_state_dict(legacy.state_dict())
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 2.0])
    assert (legacy(x, t) - new(x, t)).abs().max() > 1e-3


def test_starts_as_zero_and_every_parameter_gets_a_gradient_once_it_is_not():
    net = UNet(replace(SMALL, num_classes=3))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 2.0]), torch.tensor([0, 2])
    assert net(x, t, y).abs().max() == 0
    randomize(net)(x, t, y).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def test_null_label_equals_no_label_and_labels_differ():
    net = randomize(UNet(replace(SMALL, num_classes=3)))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 2.0])
    assert torch.equal(net(x, t, torch.tensor([-1, -1])), net(x, t))
    assert (net(x, t, torch.tensor([0, 0])) - net(x, t, torch.tensor([1, 1]))).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_channels_last_throughout(dtype):
    net, seen = randomize(UNet(SMALL)).to(dtype), []
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_hook(lambda m, args, out: seen.append(
                args[0].is_contiguous(memory_format=torch.channels_last) and out.is_contiguous(memory_format=torch.channels_last)))
    net(torch.randn(2, 4, 16, 16, dtype=dtype), torch.tensor([1.0, 2.0]))
    assert len(seen) > 20 and all(seen)


def test_time_embedding_is_cos_then_sin_and_fp32_in_bf16():
    t = torch.tensor([988.49, 0.0])
    e = timestep_embedding(t, 8)
    freqs = 10000.0 ** (-torch.arange(4) / 4)
    assert torch.allclose(e, torch.cat([(t[:, None] * freqs).cos(), (t[:, None] * freqs).sin()], 1), atol=1e-5)
    assert (timestep_embedding(torch.tensor([988.0]), 8) - e[:1]).abs().max() > 1e-2


@pytest.mark.parametrize("film", [True, False])
@pytest.mark.parametrize("silu", [True, False])
def test_group_norm_silu_matches_its_fp64_reference(film, silu):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 5, 3, generator=g) * 0.3 + 2
    w, b = torch.randn(64, generator=g), torch.randn(64, generator=g)
    scale, shift = (torch.randn(2, 64, generator=g), torch.randn(2, 64, generator=g)) if film else (None, None)
    args = [x, w, b, 32, scale, shift, silu]
    exact = group_norm_silu_ref(*[a.double() if isinstance(a, torch.Tensor) else a for a in args])
    ours = group_norm_silu(x.contiguous(memory_format=torch.channels_last), *args[1:])
    assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()
    plain = F.group_norm(x.double(), 32, w.double(), b.double()) * (1 + (scale.double()[..., None, None] if film else 0))
    plain = plain + (shift.double()[..., None, None] if film else 0)
    assert torch.allclose(exact, F.silu(plain) if silu else plain, atol=1e-10)


def test_attention_matches_its_fp64_reference_on_strided_inputs():
    qkv = torch.randn(2, 10, 3, 4, 16, dtype=torch.float64)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    assert torch.allclose(attention(q, k, v), attention_ref(q, k, v), atol=1e-12)
    assert torch.allclose(attention(q, k[:, :, :7], v[:, :, :7], scale=0.3), attention_ref(q, k[:, :, :7], v[:, :, :7], 0.3), atol=1e-12)


@pytest.mark.parametrize("call, message", [
    (lambda: UNetConfig(model_channels=48), "not a multiple of 32"),
    (lambda: UNetConfig(model_channels=64, num_head_channels=48), "do not split into heads"),
    (lambda: UNetConfig(channel_mult=(1, 2, 3)), "give one each"),
    (lambda: UNet(SMALL)(torch.randn(1, 4, 6, 8), torch.tensor([1.0])), "divisible by 4"),
    (lambda: UNet(SMALL)(torch.randn(1, 4, 8, 8), torch.tensor([1.0]), torch.tensor([0])), "unconditional"),
])
def test_impossible_shapes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
