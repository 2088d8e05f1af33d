"""Other code bases' names, shapes and configs: against diffusers' own converter and networks, and
there and back again."""

import functools
import json
import time
from dataclasses import replace

import pytest
import torch

from conftest import randomize
from harness.cli import UserError
from ckpt import UNetModel
from ckpt.diffusers import DEFAULTS, diffusers_config, from_diffusers_config
from ckpt.layouts import (
    LAYOUTS,
    detect,
    foreign_names,
    foreign_shapes,
    native_shapes,
    reorder_attention,
    target_of,
    to_foreign,
    to_native,
    unet_map,
)
from model import PRESETS, UNet, UNetConfig, infer_config, num_params, timestep_embedding

# 64 channels: with 32 a group of GroupNorm is one channel, and an embedding added before it is
# without effect.
SD15 = UNetConfig(
    4,
    4,
    model_channels=64,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    attention=(1, 1, 0),
    num_heads=4,
    context_dim=24,
    use_scale_shift_norm=False,
    resblock_updown=False,
    linear_projection=False,
)
SD2 = replace(
    SD15,
    num_heads=1,
    num_head_channels=16,
    context_dim=40,
    linear_projection=True,
    num_res_blocks=2,
)
XL = replace(
    SD2,
    channel_mult=(1, 2, 4),
    attention=(0, 2, 3),
    middle_attention=3,
    vector_dim=20 + 6 * 256,
    num_res_blocks=1,
)
REFINER = replace(
    SD2,
    channel_mult=(1, 2, 2, 2),
    attention=(0, 2, 2, 0),
    middle_attention=2,
    vector_dim=20 + 6 * 256,
    num_res_blocks=1,
)
ADM = UNetConfig(
    4,
    6,
    model_channels=32,
    channel_mult=(1, 2, 2),
    num_res_blocks=2,
    attention=(0, 1, 1),
    num_head_channels=16,
    num_classes=5,
)
TINY = {
    "sd15": SD15,
    "sd2": SD2,
    "sdxl": XL,
    "refiner": REFINER,
    "adm": ADM,
    "adm-new": replace(ADM, attention_order="new"),
    "adm-additive": replace(ADM, use_scale_shift_norm=False),
    "adm-additive-new": replace(ADM, use_scale_shift_norm=False, attention_order="new"),
    "adm-conv_resample": replace(ADM, resblock_updown=False),
    "adm-uncond-one_head": replace(ADM, num_head_channels=0, num_classes=0),
    "adm-no_attention_above": replace(ADM, attention=(0, 0, 0)),
    "adm-attention_at_the_top": replace(ADM, attention=(1, 0, 0), num_res_blocks=1),
    "ho": replace(ADM, resblock_updown=False, use_scale_shift_norm=False, like_ho=True),
    "ho-resblock_updown": replace(ADM, like_ho=True),
    "ho-sd2": replace(SD2, like_ho=True),
}


def foreign_state(net: UNet, layout: str = "diffusers") -> dict[str, torch.Tensor]:
    return dict(
        pair
        for name, tensor in net.state_dict().items()
        for pair in to_foreign(net.cfg, layout, name, tensor)
    )


@pytest.mark.parametrize("name", TINY)
def test_diffusers_builds_the_same_network_from_our_config_and_weights(name):
    diffusers = pytest.importorskip(
        "diffusers", reason="oracle: pip install -r requirements-dev.txt"
    )
    cfg, g = TINY[name], torch.Generator().manual_seed(1)
    net, B = randomize(UNet(cfg)).double(), 3
    config = json.loads(json.dumps(diffusers_config(cfg)))
    peer = getattr(diffusers, config["_class_name"]).from_config(config).double()
    peer.load_state_dict(foreign_state(net))  # strict
    x, t = (
        torch.randn(B, 4, 8, 16, dtype=torch.float64, generator=g),
        torch.tensor([0.0, 312.5, 999.0], dtype=torch.float64),
    )
    y = context = None
    if cfg.context_dim:
        context = torch.randn(B, 7, cfg.context_dim, dtype=torch.float64, generator=g)
        added = None
        if cfg.vector_dim:  # pooled text and six numbers, as sinusoids
            text, ids = (
                torch.randn(B, 20, dtype=torch.float64, generator=g),
                torch.tensor([[1024.0, 768, 0, 64, 1024, 512]] * B),
            )
            y = torch.cat([text, timestep_embedding(ids.flatten(), 256).reshape(B, -1)], 1)
            added = {"text_embeds": text, "time_ids": ids}
        theirs = peer(x, t, context, added_cond_kwargs=added).sample
    else:
        y = torch.tensor([0, 4, 2]) if cfg.num_classes else None
        theirs = peer(x, t, y).sample
    assert theirs.std() > 0.1
    assert (net(x, t, y, context) - theirs).abs().max() < 1e-12 * theirs.abs().max()


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "sdxl-refiner"])
def test_every_tensor_goes_where_diffusers_own_converter_puts_it(name):
    """Full size, each tensor one unique number (expanded, so of no memory)."""
    single_file = pytest.importorskip(
        "diffusers.loaders.single_file_utils", reason="oracle: pip install -r requirements-dev.txt"
    )
    cfg = PRESETS[name]
    files = {
        k: torch.full((1,), float(i)).expand(s)
        for i, (k, s) in enumerate(foreign_shapes(cfg, "native").items())
    }
    theirs = single_file.convert_ldm_unet_checkpoint(
        {f"model.diffusion_model.{k}": v for k, v in files.items()}, diffusers_config(cfg)
    )
    ours = dict(
        pair
        for k in native_shapes(cfg)
        for pair in to_foreign(cfg, "diffusers", k, to_native(cfg, "native", k, files))
    )
    assert ours.keys() == theirs.keys() and len(ours) == len(files)
    wrong = [
        k
        for k in ours
        if ours[k].shape != theirs[k].shape or ours[k].flatten()[0] != theirs[k].flatten()[0]
    ]
    assert wrong == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TINY)
def test_there_and_back_is_bit_exact(name, layout, dtype):
    cfg = TINY[name]
    own = {
        k: torch.randn(s, generator=torch.Generator().manual_seed(i)).to(dtype)
        for i, (k, s) in enumerate(native_shapes(cfg).items())
    }
    foreign = dict(pair for k, v in own.items() for pair in to_foreign(cfg, layout, k, v))
    assert {k: tuple(v.shape) for k, v in foreign.items()} == foreign_shapes(cfg, layout)
    assert {r.foreign: r.native for r in unet_map(cfg, layout)} == foreign_names(cfg, layout)
    for k, v in own.items():
        back = to_native(cfg, layout, k, foreign)
        assert back.dtype == dtype and back.shape == v.shape and torch.equal(back, v), k


def test_conv_projections_keep_their_four_dimensions_in_files_of_sd1_only():
    four = [
        n
        for n in PRESETS
        for layout in LAYOUTS
        if isinstance(PRESETS[n], UNetConfig) and n.startswith("sd")
        for s in foreign_shapes(PRESETS[n], layout).items()
        if s[0].endswith(("proj_in.weight", "proj_out.weight")) and len(s[1]) == 4
    ]
    assert four == ["sd15"] * 64  # 16 transformers × in, out × two layouts
    name = "middle_block.1.proj_in.weight"
    flat = randomize(UNet(SD15)).state_dict()[name]
    # Our own files hold it as the net does.
    assert (
        to_native(SD15, "native", name, {name: flat}) is flat
    )


def test_attention_orders_are_the_same_function_once_reordered():
    legacy = randomize(UNet(ADM)).double()
    new = UNet(replace(ADM, attention_order="new")).double()
    state = {
        k: reorder_attention(v, v.shape[0] // 48, "new") if ".qkv." in k else v
        for k, v in legacy.state_dict().items()
    }
    new.load_state_dict(state)
    x, t, y = (
        torch.randn(2, 4, 8, 8, dtype=torch.float64),
        torch.tensor([1.0, 500.0]),
        torch.tensor([1, -1]),
    )
    assert torch.allclose(legacy(x, t, y), new(x, t, y), rtol=0, atol=1e-12)
    back = {
        k: reorder_attention(v, v.shape[0] // 48, "legacy") if ".qkv." in k else v
        for k, v in state.items()
    }
    assert all(torch.equal(back[k], v) for k, v in legacy.state_dict().items())
    rows = torch.arange(12)  # two heads of two: (head, part, d) by hand
    assert reorder_attention(rows, 2, "new").tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    with pytest.raises(ValueError, match="multiple of 3"):
        reorder_attention(rows, 5, "new")


# ---- configs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cfg",
    [
        *(
            PRESETS[n]
            for n in ("sd15", "sd21", "sdxl", "sdxl-refiner", "adm-256", "adm-64", "tiny")
        ),
        *TINY.values(),
    ],
)
def test_config_survives_diffusers(cfg):
    config = json.loads(json.dumps(diffusers_config(cfg)))
    back = from_diffusers_config(config, cfg.attention_order)
    used = [C for C, depth in zip(cfg.channels, cfg.attention) if depth] + [cfg.channels[-1]]
    assert [back.head_channels(C) for C in used] == [cfg.head_channels(C) for C in used]
    assert replace(back, num_heads=1, num_head_channels=0) == replace(
        cfg, num_heads=1, num_head_channels=0
    )


@pytest.mark.parametrize("name", ["sd15", "sdxl", "adm"])
def test_config_as_diffusers_itself_saves_it_is_read(name):
    """save_config writes every default and its own bookkeeping; a file may also leave all defaults
    out."""
    diffusers = pytest.importorskip(
        "diffusers", reason="oracle: pip install -r requirements-dev.txt"
    )
    cfg = TINY[name]
    config = diffusers_config(cfg)
    with torch.device("meta"):
        saved = json.loads(
            getattr(diffusers, config["_class_name"]).from_config(config).to_json_string()
        )
    assert from_diffusers_config(saved) == from_diffusers_config(config)


def test_config_of_sd15_as_published_years_ago():
    """Old files write few keys; the attention_head_dim of 8 in them is a number of heads."""
    old = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "layers_per_block": 2,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "sample_size": 64,
    }
    assert from_diffusers_config(old) == PRESETS["sd15"]
    two = {
        **old,
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    }
    assert from_diffusers_config(two) == PRESETS["sd21"]
    refiner = diffusers_config(PRESETS["sdxl-refiner"]) | {"transformer_layers_per_block": 4}
    assert from_diffusers_config(refiner) == PRESETS["sdxl-refiner"]


@pytest.mark.parametrize(
    "base, change, message",
    [
        ("sd15", {"_class_name": "PixArtTransformer2DModel"}, "wanted one of UNet2DModel"),
        ("sd15", {"norm_eps": 1e-6}, "norm_eps = 1e-06"),
        ("sd15", {"time_cond_proj_dim": 128}, "time_cond_proj_dim = 128"),
        ("sd15", {"freq_shift": 1}, "freq_shift = 1"),
        ("sd15", {"flip_sin_to_cos": False}, "flip_sin_to_cos"),
        ("sd15", {"num_atention_heads": 8}, "Closest: num_attention_heads"),
        ("sd15", {"attention_head_dim": [4, 8, 2]}, "attention_head_dim"),
        ("sd15", {"attention_head_dim": [4, 8]}, "another number"),
        ("sd15", {"attention_head_dim": 5}, "do not split into 5 heads"),
        (
            "sd15",
            {"up_block_types": ["UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"]},
            "up_block_types",
        ),
        ("sd15", {"encoder_hid_dim": 32}, "encoder_hid_dim"),
        ("sd15", {"only_cross_attention": True}, "only_cross_attention"),
        ("sd15", {"layers_per_block": [1, 2, 1]}, "layers_per_block = "),
        ("sdxl", {"addition_embed_type": "text"}, "addition_embed_type"),
        ("adm", {"attn_norm_num_groups": None}, "attn_norm_num_groups"),
        ("adm", {"upsample_type": "conv"}, "upsample_type"),
        (
            "adm",
            {"down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"]},
            "block_types",
        ),
        ("adm", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("adm", {"add_attention": False}, "add_attention"),
    ],
)
def test_config_that_means_another_network_is_refused(base, change, message):
    with pytest.raises(UserError, match=message):
        from_diffusers_config(diffusers_config(TINY[base]) | change)


NESTED = functools.reduce(lambda inner, _: [inner], range(900), 1)  # as deep as json reads
ODD = (
    None,
    [],
    {},
    "",
    "x",
    True,
    -1,
    0,
    1.5,
    10**9,
    10**400,
    float("nan"),
    [None] * 3,
    ["x"] * 3,
    [0] * 3,
    [-1] * 3,
    [[1], [1], [1]],
    [[], {}, 1],
    [True] * 3,
    [1, 2],
    [32] * 5000,
    {"a": 1},
    "x" * 10**6,
    NESTED,
)


@pytest.mark.parametrize("base", ["sd15", "sdxl", "adm"])
def test_a_config_with_anything_anywhere_in_it_is_read_or_refused_at_once(base):
    start, config = time.process_time(), diffusers_config(TINY[base])
    for key in ("_class_name", *DEFAULTS[config["_class_name"]]):
        for value in ODD:
            try:
                native_shapes(from_diffusers_config({**config, key: value}))
            except UserError as error:
                assert len(str(error)) < 600 and "config" in str(error), error
    for odd in (None, [], "x", 1, {}):
        with pytest.raises(UserError, match="config _class_name is None"):
            from_diffusers_config(odd)
    with pytest.raises(
        UserError, match="num_res_blocks is 1000000000: wanted a whole number from 1 to 64"
    ):
        from_diffusers_config({**config, "layers_per_block": 10**9})
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    "cfg, message",
    [
        (PRESETS["adm-128"], r"head dims \[128, 192, 256\]"),
        (PRESETS["adm-512"], "channel_mult"),
        (replace(ADM, resblock_updown=False, conv_resample=False), "average pooling"),
        (replace(SD15, resblock_updown=True), "resampling inside residual blocks"),
        (replace(XL, middle_attention=1), "depth in the middle"),
        (replace(ADM, num_classes=0, vector_dim=8), "class vectors"),
    ],
)
def test_network_that_diffusers_cannot_build_is_not_converted(cfg, message):
    for call in (lambda: diffusers_config(cfg), lambda: unet_map(cfg, "diffusers")):
        with pytest.raises(UserError, match=message):
            call()
    assert len(unet_map(cfg, "native")) == len(native_shapes(cfg))


def test_unknown_layout_suggests_the_nearest():
    with pytest.raises(UserError, match="Closest: diffusers"):
        unet_map(SD15, "diffuser")


# ---- guided-diffusion's constructor -------------------------------------------------------------

TOY_CALL = dict(
    in_channels=32,
    model_channels=256,
    out_channels=32,
    num_res_blocks=2,
    attention_resolutions=(16, 8),
    channel_mult=(1, 1, 2, 4),
    resblock_updown=True,
)


def test_toy_diffusions_call_builds_its_281m_unet():
    with torch.device("meta"):
        net = UNetModel(**TOY_CALL)
    assert net.cfg == PRESETS["toy-281m"]
    assert (num_params(net.cfg), len(net.state_dict())) == (280_674_336, 354)


def test_shim_loads_a_guided_diffusion_state_dict_from_torch_load(tmp_path):
    """The published usage, at 1/8 width; the names written out from guided-diffusion's constructor,
    not taken from ours."""
    call = TOY_CALL | {"model_channels": 32}
    n, mult, names = (
        2,
        call["channel_mult"],
        ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"],
    )
    res = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"]
    attention, k, C, skips = ["norm", "qkv", "proj_out"], 1, 32, [32]
    for level, m in enumerate(mult):
        for _ in range(n):
            names += [
                f"input_blocks.{k}.0.{leaf}" for leaf in res + ["skip_connection"] * (C != 32 * m)
            ]
            names += [f"input_blocks.{k}.1.{leaf}" for leaf in attention * (2**level in (16, 8))]
            k, C = k + 1, 32 * m
            skips.append(C)
        if level < 3:
            names += [f"input_blocks.{k}.0.{leaf}" for leaf in res]
            k, skips = k + 1, skips + [C]
    names += [
        f"middle_block.{i}.{leaf}"
        for i, leaves in enumerate((res, attention, res))
        for leaf in leaves
    ]
    for k in range(4 * (n + 1)):
        level = 3 - k // 3
        names += [f"output_blocks.{k}.0.{leaf}" for leaf in res + ["skip_connection"]]
        names += [f"output_blocks.{k}.1.{leaf}" for leaf in attention * (2**level in (16, 8))]
        names += [
            f"output_blocks.{k}.{2 if level == 3 else 1}.{leaf}"
            for leaf in res * (level > 0 and k % 3 == 2)
        ]
    source = randomize(UNetModel(**call))
    theirs = {
        f"{name}.{leaf}": source.state_dict()[f"{name}.{leaf}"]
        for name in names
        for leaf in ("weight", "bias")
    }
    assert len(theirs) == 354
    torch.save(theirs, tmp_path / "model_ema.pt")
    model = UNetModel(**call)
    model.load_state_dict(
        torch.load(tmp_path / "model_ema.pt", map_location="cpu", weights_only=True)
    )
    x, t = torch.randn(1, 32, 8, 8), torch.tensor([500.0])
    assert torch.equal(model(x, t), source(x, t))
    assert infer_config(theirs, num_heads=1) == model.cfg


@pytest.mark.parametrize(
    "name, call",
    [
        (
            "adm-64",
            dict(
                image_size=64,
                model_channels=192,
                num_res_blocks=3,
                attention_resolutions=(2, 4, 8),
                channel_mult=(1, 2, 3, 4),
                dropout=0.1,
                use_new_attention_order=True,
                num_head_channels=64,
            ),
        ),
        (
            "adm-128",
            dict(
                image_size=128,
                model_channels=256,
                num_res_blocks=2,
                attention_resolutions=(4, 8, 16),
                channel_mult=(1, 1, 2, 3, 4),
                num_heads=4,
                num_heads_upsample=4,
            ),
        ),
        (
            "adm-512",
            dict(
                image_size=512,
                model_channels=256,
                num_res_blocks=2,
                attention_resolutions=(16, 32, 64),
                channel_mult=(0.5, 1, 1, 2, 2, 4, 4),
                num_head_channels=64,
            ),
        ),
    ],
)
def test_published_calls_are_the_presets(name, call):
    with torch.device("meta"):
        net = UNetModel(
            in_channels=3,
            out_channels=6,
            num_classes=1000,
            resblock_updown=True,
            use_scale_shift_norm=True,
            **call,
        )
    assert net.cfg == PRESETS[name] and not net.checkpointing


@pytest.mark.parametrize(
    "change, error",
    [
        ({"use_fp16": True}, UserError),
        ({"dims": 3}, UserError),
        ({"num_heads_upsample": 2}, UserError),
        ({"attention_resolution": 8}, TypeError),
    ],
)
def test_call_that_we_cannot_honour_is_refused(change, error):
    with torch.device("meta"), pytest.raises(error):
        UNetModel(**(TOY_CALL | change))


def test_positional_call_has_guided_diffusions_order():
    with torch.device("meta"):
        net = UNetModel(64, 3, 32, 6, 1, (2,), 0.1, (1, 2, 2), False, 2, 10, True, False, 4)
    assert (
        net.cfg
        == UNetConfig(
            3,
            6,
            32,
            (1, 2, 2),
            1,
            (0, 1, 0),
            num_heads=4,
            use_scale_shift_norm=False,
            resblock_updown=False,
            conv_resample=False,
            num_classes=10,
            dropout=0.1,
        )
        and net.checkpointing
    )
    with pytest.raises(TypeError, match="missing out_channels, attention_resolutions"):
        UNetModel(64, 3, 32, num_res_blocks=1)
    for name in ("channel_mult", "attention_resolutions"):
        with pytest.raises(UserError, match=f"{name}='1,2,3,4': wanted numbers"):
            UNetModel(**(TOY_CALL | {name: "1,2,3,4"}))


def test_use_checkpoint_means_checkpointing():
    with torch.device("meta"):
        assert UNetModel(
            **TOY_CALL, use_checkpoint=True, dims=2, use_fp16=False, image_size=32
        ).checkpointing


def test_an_odd_objective_is_none():
    odd = [
        {},
        {"objective": None},
        {"objective": {}},
        {"objective": {"target": []}},
        {"objective": ["eps"]},
        {"objective": 3},
    ]
    assert [target_of(meta) for meta in odd] == [None] * 6 and target_of(
        {"objective": {"target": "u"}}
    ) == "fm"


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sdxl", "adm"])
def test_the_layout_of_a_unet_is_seen(name):
    for layout in LAYOUTS:
        assert detect(foreign_names(TINY[name], layout)) == layout
    assert detect(["encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.up_blocks.0.x"]) is None
    assert (
        detect(["input_blocks.0.0.weight", "down_blocks.0.x", "time_embedding.linear_1.bias"])
        is None
        and detect([]) is None
    )


def test_flat_ema_names_are_unambiguous_in_every_preset():
    for cfg in PRESETS.values():
        assert len({n.replace(".", "") for n in native_shapes(cfg)}) == len(native_shapes(cfg))
