"""Configs in other code bases' terms: diffusers' config.json, guided-diffusion's constructor.

diffusers_config(cfg)               -> what from_pretrained wants
from_diffusers_config(config)       -> our config; UserError names what we do not compute
UNetModel(…)                        guided-diffusion's constructor, its arguments in its order
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from reprlib import repr as brief
from typing import Any, Literal

from ckpt.byteunet import ByteUNetConfig
from ckpt.configs import check_known, config_from, differences
from ckpt.lcm import WAVES, LCMUNetConfig
from ckpt.mmdit_configs import CLASSES, from_transformer_config, transformer_config
from harness.cli import UserError, closest
from harness.reading import read_file
from mmdit import MMDiTConfig
from model import UNet, UNetConfig, multiplier

# What diffusers assumes where a config.json is silent (0.42.1). A key that is not here is not known
# to us.
SHARED = dict(
    in_channels=4, out_channels=4, center_input_sample=False, time_embedding_type="positional",
    time_embedding_dim=None, freq_shift=0, flip_sin_to_cos=True, layers_per_block=2,
    mid_block_scale_factor=1, downsample_padding=1, dropout=0.0, act_fn="silu",
    attention_head_dim=8, norm_num_groups=32, norm_eps=1e-5, resnet_time_scale_shift="default",
    class_embed_type=None, num_class_embeds=None,
)  # fmt: skip
OF_2D = dict(
    in_channels=3, out_channels=3, mid_block_type="UNetMidBlock2D", add_attention=True,
    attn_norm_num_groups=None, block_out_channels=(224, 448, 672, 896),
    down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * 3),
    up_block_types=(*["AttnUpBlock2D"] * 3, "UpBlock2D"),
    downsample_type="conv", upsample_type="conv",
)  # fmt: skip
OF_CONDITION = dict(
    mid_block_type="UNetMidBlock2DCrossAttn", block_out_channels=(320, 640, 1280, 1280),
    down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    cross_attention_dim=1280, transformer_layers_per_block=1, use_linear_projection=False,
    num_attention_heads=None, addition_embed_type=None, addition_time_embed_dim=None,
    projection_class_embeddings_input_dim=None, only_cross_attention=False,
    mid_block_only_cross_attention=None, dual_cross_attention=False, cross_attention_norm=None,
    reverse_transformer_layers_per_block=None, encoder_hid_dim=None, encoder_hid_dim_type=None,
    attention_type="default", resnet_skip_time_act=False, resnet_out_scale_factor=1.0,
    time_embedding_act_fn=None, timestep_post_act=None, time_cond_proj_dim=None, conv_in_kernel=3,
    conv_out_kernel=3, class_embeddings_concat=False,
)  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "UNet2DModel": SHARED | OF_2D,
    "UNet2DConditionModel": SHARED | OF_CONDITION,
}
# They change no result: they are kept, and not used.
ASIDE = (
    "sample_size", "upcast_attention", "num_train_timesteps", "addition_embed_type_num_heads",
)  # fmt: skip
# EMAModel.save_pretrained writes its counters into the network's config.
AVERAGING = (
    "decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma",
    "power", "collected_params",
)  # fmt: skip
CONDITION = "UNet2DConditionModel"
# Details in which ADM and its kin are one, and Ho et al. 2020 (google/ddpm-*) another.
LIKE_ADM = dict(norm_eps=1e-5, flip_sin_to_cos=True, freq_shift=0, downsample_padding=1)
LIKE_HO = dict(norm_eps=1e-6, flip_sin_to_cos=False, freq_shift=1, downsample_padding=0)


# ---- ours as theirs -----------------------------------------------------------------------------


def diffusers_config(
    cfg: UNetConfig | MMDiTConfig, aside: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """config.json for diffusers' from_pretrained: the same network. UserError where no diffusers
    class computes it.

    aside: what is in no weights, ASIDE. Where it is silent sample_size, H/8 of a pipeline's
    default image, is 64, or 128 with a vector (SDXL).
    """
    if isinstance(cfg, MMDiTConfig):
        return transformer_config(cfg) | said_aside(aside or {})
    conv = not cfg.resblock_updown
    kind = "CrossAttn" if cfg.context_dim else "Attn"
    plain = "DownBlock2D" if conv else "ResnetDownsampleBlock2D"
    down = [f"{kind}DownBlock2D" if depth else plain for depth in cfg.attention]
    problem = ""
    if isinstance(cfg, ByteUNetConfig):
        problem = "a text encoder inside it"
    elif cfg.channels[0] != cfg.model_channels:
        problem = f"channel_mult[0] = {cfg.channel_mult[0]:g}, not 1"
    if conv and not cfg.conv_resample and len(down) > 1:
        problem = "average pooling between levels (conv_resample=False)"
    common = dict(
        in_channels=cfg.in_channels, out_channels=cfg.out_channels,
        block_out_channels=list(cfg.channels), layers_per_block=cfg.num_res_blocks,
        down_block_types=down, up_block_types=[_up(name) for name in reversed(down)],
        dropout=cfg.dropout,
        resnet_time_scale_shift="scale_shift" if cfg.use_scale_shift_norm else "default",
        act_fn="silu", norm_num_groups=32, num_class_embeds=cfg.num_classes or None,
        **(LIKE_HO if cfg.like_ho else LIKE_ADM),
    )  # fmt: skip
    if cfg.context_dim:
        own, missing = _of_condition(cfg)
        name = CONDITION
    else:
        own, missing = _of_2d(cfg)
        name = "UNet2DModel"
    if problem or missing:
        raise UserError(
            f"diffusers has no U-Net with {problem or missing}",
            do="Keep this network in the native layout.",
        )
    return dict(_class_name=name, **common, **own) | said_aside(aside or {})


def _of_condition(cfg: UNetConfig) -> tuple[dict[str, Any], str]:
    """(what UNet2DConditionModel has beside the common fields, what it cannot compute)."""
    problem = ""
    if cfg.attention[-1] not in (0, cfg.middle_attention):
        problem = "another transformer depth in the middle than in the last level"
    if cfg.resblock_updown:
        problem = "resampling inside residual blocks with cross-attention"
    # The last depth is also the middle's.
    depths = [depth or 1 for depth in cfg.attention[:-1]] + [cfg.middle_attention]
    heads = [max(C // cfg.head_channels(C), 1) for C in cfg.channels]
    own = dict(
        mid_block_type="UNetMidBlock2DCrossAttn", cross_attention_dim=cfg.context_dim,
        transformer_layers_per_block=_one(depths),
        attention_head_dim=_one(heads),  # diffusers' name; its meaning is the head count
        use_linear_projection=cfg.linear_projection, sample_size=128 if cfg.vector_dim else 64,
    )  # fmt: skip
    if isinstance(cfg, LCMUNetConfig):
        own["time_cond_proj_dim"] = WAVES
    if cfg.vector_dim:
        own["addition_embed_type"] = "text_time"
        own["addition_time_embed_dim"] = 256
        own["projection_class_embeddings_input_dim"] = cfg.vector_dim
    return own, problem


def _of_2d(cfg: UNetConfig) -> tuple[dict[str, Any], str]:
    """(what UNet2DModel has beside the common fields, what it cannot compute)."""
    used = [C for C, depth in zip(cfg.channels, cfg.attention) if depth] + [cfg.channels[-1]]
    dims = {cfg.head_channels(C) for C in used}
    one_head = all(cfg.head_channels(C) == C for C in used)
    problem = ""
    if len(dims) > 1 and not one_head:
        problem = f"head dims {sorted(dims)} at different levels"
    if cfg.vector_dim:
        problem = "class vectors without cross-attention"
    resample = "resnet" if cfg.resblock_updown else "conv"
    own = dict(
        attn_norm_num_groups=32, downsample_type=resample, upsample_type=resample, sample_size=None,
        attention_head_dim=dims.pop() if len(dims) == 1 else None,
    )  # fmt: skip
    return own, problem


def _up(down_block_type: str) -> str:
    return down_block_type.replace("Downsample", "Upsample").replace("Down", "Up")


def _one(values: list[Any]) -> Any:
    """An int for a list of equal ints, as diffusers' configs have it."""
    return values[0] if values and all(value == values[0] for value in values) else values


# ---- theirs as ours -----------------------------------------------------------------------------


def from_diffusers_config(
    config: Mapping[str, Any], attention_order: Literal["legacy", "new"] = "new"
) -> UNetConfig | MMDiTConfig:
    """A config.json of diffusers as ours, or a UserError that names what we do not compute.

    qkv rows are in no order there: for ADM choose the one the native tensors shall have.
    """
    name = config.get("_class_name") if isinstance(config, Mapping) else None
    if not isinstance(name, str) or name not in DEFAULTS | CLASSES:
        raise UserError(
            f"config _class_name is {brief(name)}: wanted one of {', '.join(DEFAULTS | CLASSES)}",
            do="Name a network's own folder, or move its file away from another's config.",
        )
    if name in CLASSES:
        return from_transformer_config(config)
    c = _completed(name, config)
    cross, down = name == CONDITION, c["down_block_types"]
    own = LCMUNetConfig if c.get("time_cond_proj_dim") == WAVES else UNetConfig
    depths = c.get("transformer_layers_per_block", 1)
    depths = (depths,) * len(down) if isinstance(depths, int) else depths
    resamples = [_resample(c, block, cross) for block in down[:-1]]
    channels = c["block_out_channels"]
    values = dict(
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        model_channels=channels[0],
        channel_mult=tuple(multiplier(C, channels[0]) for C in channels),
        num_res_blocks=c["layers_per_block"],
        attention=tuple(depth * ("Attn" in block) for depth, block in zip(depths, down)),
        middle_attention=depths[-1],
        **_heads(c, cross),
        attention_order="legacy" if cross else attention_order,
        use_scale_shift_norm=c["resnet_time_scale_shift"] == "scale_shift",
        resblock_updown="resnet" in resamples,
        num_classes=c["num_class_embeds"] or 0,
        dropout=c["dropout"],
        like_ho=all(c[key] == value for key, value in LIKE_HO.items()),
    )
    if cross:
        values["context_dim"] = c["cross_attention_dim"]
        values["linear_projection"] = c["use_linear_projection"]
        if c["addition_embed_type"]:
            values["vector_dim"] = c["projection_class_embeddings_input_dim"] or 0
    try:
        cfg = config_from(own, values)
    except ValueError as error:
        raise UserError(f"config of {name}: {error}", do="Restore the file.") from None
    # Whatever was read wrongly or not at all comes back different.
    again = {k: v for k, v in diffusers_config(cfg).items() if k in c}
    wanted, computed = _canonical(c), _canonical(DEFAULTS[name] | again)
    for key in wanted:
        if wanted[key] != computed[key]:
            raise UserError(
                f"config of {name} has {key} = {brief(c[key])}; this U-Net computes "
                f"{computed[key]!r} only",
                do="Use it in diffusers.",
            )
    return cfg


def _completed(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with its class's defaults; every key is known and of the type it is used as."""
    ignored = (*ASIDE, *AVERAGING)
    own = {k: v for k, v in config.items() if not k.startswith("_") and k not in ignored}
    c = DEFAULTS[name] | own
    unknown = sorted(c.keys() - DEFAULTS[name].keys())
    if unknown:
        near = closest(unknown[0][:60], DEFAULTS[name])
        what = f"config of {name} has {brief(unknown[0])}, which is not known here"
        raise UserError(what, do=near or "Use it in diffusers.")
    for key in ("layers_per_block", "cross_attention_dim"):
        if key not in c:
            continue
        c[key] = _one(c[key]) if isinstance(c[key], (list, tuple)) else c[key]
        if type(c[key]) is not int or c[key] < 1:
            raise UserError(
                f"config of {name} has {key} = {brief(c[key])}: wanted one number for all levels",
                do="Use it in diffusers.",
            )
    head_dims = (int,) if name == CONDITION else (int, type(None))
    _check_levels(name, c, "block_out_channels", int)
    _check_levels(name, c, "down_block_types", str)
    _check_levels(name, c, "up_block_types", str)
    _check_levels(name, c, "attention_head_dim", int, head_dims)
    _check_levels(name, c, "transformer_layers_per_block", int, (int,))
    levels = len(c["block_out_channels"])
    lists = [c["down_block_types"], c["up_block_types"]]
    both = [c["attention_head_dim"], c.get("transformer_layers_per_block", 1)]
    lists += [value for value in both if isinstance(value, (list, tuple))]
    if any(len(value) != levels for value in lists):
        raise UserError(
            f"config of {name}: block_out_channels has {levels} levels; down_block_types, "
            "up_block_types, transformer_layers_per_block or attention_head_dim another number",
            do="Restore the file.",
        )
    return c


def _check_levels(name: str, c: dict, key: str, kind: type, alone: tuple[type, ...] = ()) -> None:
    """One value a level, names or numbers; or a single one, of a type in `alone`."""
    value = c.get(key, 1)
    if key not in c or type(value) in alone:
        return
    fits = isinstance(value, (list, tuple)) and len(value) > 0
    fits = fits and all(type(v) is kind and (kind is str or 0 < v <= 65536) for v in value)
    if not fits:
        wanted = "names" if kind is str else "numbers from 1 to 65536"
        raise UserError(
            f"config of {name} has {key} = {brief(value)}: wanted {wanted}, one a level",
            do="Restore the file.",
        )


def _heads(c: dict[str, Any], cross: bool) -> dict[str, int]:
    """attention_head_dim as ours. In UNet2DModel it is what its name says, None = one head; in
    UNet2DConditionModel it is the number of heads."""
    heads = c["attention_head_dim"]
    if not cross:
        return dict(num_heads=1) if heads is None else dict(num_head_channels=heads)
    if isinstance(heads, int):
        return dict(num_heads=heads)
    if len(set(heads)) == 1:
        return dict(num_heads=heads[-1])
    return dict(num_head_channels=c["block_out_channels"][-1] // heads[-1])


def _resample(c: dict[str, Any], block: str, cross: bool) -> str:
    """How a level is left: "resnet" or "conv"."""
    if "Attn" in block and not cross:
        return c["downsample_type"]
    return "resnet" if "Resnet" in block else "conv"


def _canonical(config: dict[str, Any]) -> dict[str, Any]:
    """Different ways to write the same network, written the same: synonyms, an int for equal
    entries, entries nobody reads."""
    c = {k: list(v) if isinstance(v, (list, tuple)) else v for k, v in config.items()}
    down, up, channels = c["down_block_types"], c["up_block_types"], c["block_out_channels"]
    attends = ["Attn" in block for block in down[:-1]] + [True]
    for key in ("transformer_layers_per_block", "attention_head_dim"):
        values = c[key] if isinstance(c.get(key), list) else [c.get(key)] * len(channels)
        # No head dim is one head.
        values = [C if v is None else v for v, C in zip(values, channels)]
        c[key] = [v for v, used in zip(values, attends) if used]
    if isinstance(c.get("only_cross_attention"), list):
        c["only_cross_attention"] = _one(c["only_cross_attention"])
    for key, blocks in (("down_block_types", down), ("up_block_types", up)):
        # The last one resamples nothing.
        c[key] = [*blocks[:-1], blocks[-1].replace("Resnet", "").replace("sample", "")]
    if "cross_attention_dim" not in c:
        if not any(attends[:-1]):
            c["downsample_type"] = None
        if not any("Attn" in block for block in down[1:]):
            c["upsample_type"] = None
        if c["attn_norm_num_groups"] is None and c["resnet_time_scale_shift"] == "default":
            c["attn_norm_num_groups"] = c["norm_num_groups"]
    if c["time_embedding_dim"] == 4 * channels[0]:
        c["time_embedding_dim"] = None
    c["act_fn"] = "silu" if c["act_fn"] == "swish" else c["act_fn"]
    return c


def said_aside(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json of diffusers says that changes no result: the size of a pipeline's images,
    and what guards fp16."""
    aside = {key: config[key] for key in ASIDE if key in config}
    for key, value in aside.items():
        sizes = value if isinstance(value, list) and len(value) == 2 else [value]
        if not all(v is None or type(v) is bool or _is_size(v) for v in sizes):
            raise UserError(
                f"config has {key} = {brief(value)}: wanted a number, true or false",
                do="Restore the file.",
            )
    return aside


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value <= 65536


def config_beside(
    path: Path, known: dict[str, Any]
) -> tuple[UNetConfig | MMDiTConfig, dict[str, Any]]:
    """(the config of diffusers weights, what else is said), from the config.json beside them."""
    file = path.parent / "config.json"
    try:
        config = json.loads(read_file(file))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} has diffusers' names and needs diffusers' config.json beside it "
            f"({type(error).__name__})",
            do="Copy it there.",
        ) from None
    try:
        cfg = from_diffusers_config(config, known.get("attention_order", "new"))
        aside = said_aside(config)
    except UserError as error:
        what, _, do = str(error).partition("  ")
        raise UserError(f"{file}: {what}", do=do) from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # It is JSON, of other types than wanted.
        what = f"{file} is not a config of diffusers ({type(error).__name__}: {error})"
        raise UserError(what, do="Restore it.") from None
    check_known(cfg, known, str(file))
    return cfg, aside


def is_average(path: Path) -> bool:
    """Does the config.json beside weights say that diffusers' EMAModel saved them?"""
    try:
        config = json.loads(read_file(path.parent / "config.json"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and {"decay", "optimization_step"} <= config.keys()


def check_config_beside(cfg: UNetConfig | MMDiTConfig, path: Path, layout: str) -> None:
    """A folder of ours in diffusers' layout: diffusers itself would believe its config.json."""
    file, usual = path.parent / "config.json", path.name.startswith("diffusion_pytorch_model")
    if layout != "diffusers" or not usual or not file.exists():
        return
    order = {}
    if isinstance(cfg, UNetConfig):
        order["attention_order"] = cfg.attention_order
    said, _ = config_beside(path, order)
    found = differences(cfg, said)
    if found:
        raise UserError(
            f"{file} is not the config of the weights beside it: {'; '.join(found)}",
            do="Restore it.",
        )


# ---- guided-diffusion's constructor -------------------------------------------------------------


def UNetModel(
    image_size: int | None = None,
    in_channels: int | None = None,
    model_channels: int | None = None,
    out_channels: int | None = None,
    num_res_blocks: int | None = None,
    attention_resolutions: Iterable[int] | None = None,
    dropout: float = 0.0,
    channel_mult: Iterable[float] = (1, 2, 4, 8),
    conv_resample: bool = True,
    dims: int = 2,
    num_classes: int | None = None,
    use_checkpoint: bool = False,
    use_fp16: bool = False,
    num_heads: int = 1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = False,
    resblock_updown: bool = False,
    use_new_attention_order: bool = False,
) -> UNet:
    """guided-diffusion's UNetModel(...): its arguments in its order, and its defaults.

    attention_resolutions are downsample factors (8 = at H/8), as its constructor takes them; one
    that no level has is ignored, as there. image_size never mattered and may be left out; the
    others up to attention_resolutions may not.
    """
    needed = dict(
        in_channels=in_channels, model_channels=model_channels, out_channels=out_channels,
        num_res_blocks=num_res_blocks, attention_resolutions=attention_resolutions,
    )  # fmt: skip
    absent = [name for name, value in needed.items() if value is None]
    if absent:
        raise TypeError(f"UNetModel() is missing {', '.join(absent)}.")
    lists = {"channel_mult": channel_mult, "attention_resolutions": attention_resolutions}
    for name, value in lists.items():
        if not isinstance(value, Iterable) or isinstance(value, str):
            raise UserError(
                f"{name}={value!r}: wanted numbers such as (1, 2, 4)",
                do="Strings are for guided-diffusion's create_model, not its UNetModel.",
            )
    if dims != 2 or use_fp16:
        raise UserError(
            f"dims={dims}, use_fp16={use_fp16}: wanted 2 and False",
            do="For half precision call .half() on the U-Net, or autocast.",
        )
    if num_heads_upsample not in (-1, num_heads) and num_head_channels == -1:
        raise UserError(
            f"num_heads_upsample={num_heads_upsample} with num_heads={num_heads}",
            wanted="the same heads on both ways",
            do="Leave num_heads_upsample out.",
        )
    factors, mult = set(attention_resolutions), tuple(channel_mult)
    values = dict(
        in_channels=in_channels, out_channels=out_channels, model_channels=model_channels,
        channel_mult=mult, num_res_blocks=num_res_blocks,
        attention=tuple(int(2**level in factors) for level in range(len(mult))),
        num_heads=num_heads, num_head_channels=max(num_head_channels, 0),
        attention_order="new" if use_new_attention_order else "legacy",
        use_scale_shift_norm=use_scale_shift_norm, resblock_updown=resblock_updown,
        conv_resample=conv_resample, num_classes=num_classes or 0, dropout=dropout,
    )  # fmt: skip
    net = UNet(config_from(UNetConfig, values))
    net.checkpointing = use_checkpoint
    return net
