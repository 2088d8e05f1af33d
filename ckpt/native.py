"""Checkpoints of our own: what a config read from a file may hold."""

from dataclasses import fields
from reprlib import repr as brief
from typing import Any, Literal, get_args, get_origin, get_type_hints

from model import UNetConfig

# From, to; 0 to 65536 for a U-Net's field that is not here. Far beyond any network: a damaged file
# must end in a message, not in hours of building.
LIMITS = {
    "in_channels": (1, 65536),
    "out_channels": (1, 65536),
    "model_channels": (1, 65536),
    "channel_mult": (2**-16, 65536),
    "num_res_blocks": (1, 64),
    "attention": (0, 64),
    "middle_attention": (1, 64),
    "num_classes": (0, 2**24),
    "dropout": (0, 0.999),
}
MAX_LEVELS, MAX_BLOCKS = 16, 1024


def config_from(cls: type, values: dict[str, Any]) -> Any:
    """cls(**values) of values that may be anything. ValueError or TypeError says what is wrong,
    before anything is built."""
    kinds = get_type_hints(cls)
    of_unet = cls is UNetConfig
    for key, value in values.items():
        limits = LIMITS.get(key, (0, 65536)) if of_unet else (float("-inf"), float("inf"))
        if key in kinds:
            check_field(key, value, kinds[key], limits)
    if of_unet:
        check_size({**{f.name: f.default for f in fields(cls)}, **values})
    return cls(**values)


def check_field(name: str, value: Any, kind: Any, limits: tuple[float, float]) -> None:
    """Is a value of its field's type and within limits?"""
    options = (True, False) if kind is bool else get_args(kind)
    if kind is bool or get_origin(kind) is Literal:
        fits = type(value) in (bool, str) and value in options
        wanted = " or ".join(map(repr, options))
    elif kind is str:
        fits = type(value) is str
        wanted = "a word"
    else:
        low, high = limits
        many = get_origin(kind) is tuple
        numbers = (int, float) if float in (kind, *options) else (int,)
        entries = value if many and type(value) is tuple else (value,)
        fits = many == (type(value) is tuple)
        # NaN fails every comparison.
        fits = fits and all(type(v) in numbers and low <= v <= high for v in entries)
        wanted = f"{'numbers' if float in numbers else 'whole numbers'} from {low:g} to {high:g}"
        wanted = f"a tuple of {wanted}" if many else wanted
    if not fits:
        raise ValueError(f"{name} is {brief(value)}: wanted {wanted}.")


def check_size(values: dict[str, Any]) -> None:
    """Is a U-Net of this config of a size that anybody builds?"""
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
