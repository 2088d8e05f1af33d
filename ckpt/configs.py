"""A network's config as a file or a user gives it: types, limits, and where two of them differ."""

from dataclasses import asdict, fields, replace
from functools import lru_cache
from reprlib import repr as brief
from typing import Annotated, Any, NamedTuple, get_args

import torch

from ckpt.byteunet import ByteUNetConfig
from ckpt.lcm import LCMUNetConfig
from harness.cli import UserError
from harness.typed import Range, faults, field_kinds
from mmdit import MMDiTConfig
from model import UNetConfig, build, network_name

# From, to; 0 to 65536 for a field that is not here. Far beyond any network: a damaged file must end
# in a message, not in hours of building.
OF_UNET = {
    "in_channels": (1, 65536), "out_channels": (1, 65536), "model_channels": (1, 65536),
    "channel_mult": (2**-16, 65536), "num_res_blocks": (1, 64), "attention": (0, 64),
    "middle_attention": (1, 64), "num_classes": (0, 2**24), "dropout": (0, 0.999),
}  # fmt: skip
OF_MMDIT = {
    "in_channels": (1, 65536), "out_channels": (1, 65536), "patch": (1, 64), "width": (4, 65536),
    "heads": (1, 4096), "blocks": (0, 256), "joint": (0, 256), "single": (0, 256),
    "mlp_ratio": (1, 64), "dual": (0, 256), "pos_max": (0, 2048), "theta": (1, 10**9),
    "num_classes": (0, 2**24),
}  # fmt: skip
OF_BYTES = OF_UNET | {
    "vector_dim": (1, 65536), "context_dim": (0, 0), "text_places": (1, 65536),
    "text_rows": (1, 2**24),
}  # fmt: skip
LIMITS: dict[type, dict[str, tuple[float, float]]] = {
    UNetConfig: OF_UNET, MMDiTConfig: OF_MMDIT, ByteUNetConfig: OF_BYTES,
    LCMUNetConfig: OF_UNET,
}  # fmt: skip
MAX_LEVELS, MAX_BLOCKS = 16, 1024


@lru_cache
def native_shapes(cfg: Any) -> dict[str, tuple[int, ...]]:
    """The tensors of a config's network, whatever the network."""
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in build(cfg).state_dict().items()}


def config_from(cls: type, values: dict[str, Any]) -> Any:
    """cls(**values) of values that may be anything. ValueError or TypeError says what is wrong,
    before anything is built."""
    check_fields(cls, values)
    if issubclass(cls, UNetConfig):
        check_size({**{f.name: f.default for f in fields(cls)}, **values})
    return cls(**values)


def written(cfg: Any) -> dict[str, Any]:
    """A network's config as metadata holds it. like_ho stands there only where it is on, so that
    versions which do not know it read all other files, and refuse those."""
    return {k: v for k, v in asdict(cfg).items() if k != "like_ho" or v}


def check_fields(cls: type, values: dict[str, Any]) -> None:
    """Refuse values that are not of their fields' types, or beyond limits."""
    kinds = field_kinds(cls)
    for key, value in values.items():
        if key not in kinds:
            continue  # the class itself refuses it
        kind = kinds[key]
        if cls in LIMITS and holds_numbers(kind):
            kind = Annotated[kind, Range(*LIMITS[cls].get(key, (0, 65536)))]
        for place, got, words in faults(value, kind, key):
            raise ValueError(f"{place} is {got}: wanted {words}.")


def holds_numbers(kind: Any) -> bool:
    return bool({int, float} & {kind, *get_args(kind)})


def check_size(values: dict[str, Any]) -> None:
    """Refuse a U-Net of a size that nobody builds."""
    attention, levels = values["attention"], len(values["channel_mult"])
    if not 1 <= levels <= MAX_LEVELS or len(attention) != levels:
        raise ValueError(
            f"attention has {len(attention)} levels, channel_mult {levels}; give one each, "
            f"for 1 to {MAX_LEVELS} levels."
        )
    blocks = sum((2 * values["num_res_blocks"] + 1) * (1 + depth) for depth in attention)
    if blocks > MAX_BLOCKS:
        raise ValueError(
            f"num_res_blocks {values['num_res_blocks']} and attention {brief(attention)} make "
            f"{blocks} blocks: wanted up to {MAX_BLOCKS}."
        )
    widest = max(values["channel_mult"]) * values["model_channels"]
    if widest > 65536:
        raise ValueError(f"a level has {widest:g} channels: wanted up to 65536.")


def check_resolution(net: Any, factor: int, resolution: int) -> None:
    """Refuse a size of images that a network of config `net` does not take. factor: pixels of an
    image for one of its latents."""
    unit, most = factor * net.multiple, factor * getattr(net, "largest", 0)
    if resolution < 1 or resolution % unit:
        raise UserError(
            f"--resolution {resolution}",
            wanted=f"a multiple of {unit}",
            do=f"Try --resolution {unit}.",
        )
    if most and resolution > most:
        raise UserError(
            f"--resolution {resolution}",
            wanted=f"at most {most}, for beyond that the network knows no places",
            do=f"Try --resolution {most}.",
        )


def differences(a: Any, b: Any) -> list[str]:
    """In what two networks differ. How their heads are given, dropout, and how files write them are
    no differences."""
    if type(a) is not type(b):
        return [f"network {network_name(a)} / {network_name(b)}"]
    silent = ["dropout"]
    if isinstance(a, UNetConfig):
        silent += ["linear_projection", "num_heads", "num_head_channels", "attention_order"]
    found = [
        f"{f.name} {getattr(a, f.name)} / {getattr(b, f.name)}"
        for f in fields(a)
        if f.name not in silent and getattr(a, f.name) != getattr(b, f.name)
    ]
    if isinstance(a, UNetConfig) and head_widths(a) != head_widths(b):
        found.append(f"channels a head {head_widths(a)} / {head_widths(b)}")
    return found


def head_widths(cfg: UNetConfig) -> list[int]:
    """Channels a head of every level that attends, the middle block's last."""
    attends = (*cfg.attention[:-1], 1)
    return [cfg.head_channels(C) for C, depth in zip(cfg.channels, attends) if depth]


def check_known(cfg: Any, known: dict[str, Any], what: str) -> None:
    """What the user says must be what the file says, if it says it. Heads may be given by number or
    by width."""
    heads = ("num_heads", "num_head_channels", "attention_order")
    for key, value in known.items():
        if key not in (*heads, "objective") and getattr(cfg, key, None) != value:
            own = getattr(cfg, key, "nothing")
            raise UserError(f"{what} says {key} = {own!r}", got=f"{value!r}", do="Leave it out.")
    given = {k: known[k] for k in heads if k in known}
    if given and not same_heads(cfg, given):
        own = ", ".join(f"{key} {getattr(cfg, key, 'nothing')}" for key in heads)
        got = ", ".join(f"{key} {value}" for key, value in known.items() if key != "objective")
        raise UserError(f"{what} says {own}; got {got}", do="Leave them out.")


def same_heads(cfg: Any, given: dict[str, Any]) -> bool:
    """Do heads, given by number or by width, and their order say what a config says?"""
    if not isinstance(cfg, UNetConfig):
        return all(getattr(cfg, key, None) == value for key, value in given.items())
    heads = {k: given.get(k, 0) for k in ("num_heads", "num_head_channels")}
    heads = heads if any(heads.values()) else {}
    order = given.get("attention_order", cfg.attention_order)
    try:
        wanted = replace(cfg, **heads)
    except (TypeError, ValueError):
        return False
    same = all(wanted.head_channels(C) == cfg.head_channels(C) for C in cfg.channels)
    return same and order == cfg.attention_order


class Space(NamedTuple):
    """What two networks share if one can guide the other, as far as their files say."""

    channels: int
    vae: dict[str, Any]
    classes: tuple[int, Any]


def space_of(net: Any, meta: dict[str, Any]) -> Space:
    places = ("source", "sha256", "name")
    vae = {k: v for k, v in meta.get("vae", {}).items() if k not in places}
    return Space(net.cfg.in_channels, vae, (net.cfg.num_classes, meta.get("classes")))
