"""Which networks a file holds: found by what they look like, under whatever prefix they stand.

    found = unets(names)         # [Part("model.diffusion_model.", {full: inner}, ema=False), …]
    part = choose(found, "U-Net", box, ema=True)     # one of them; a UserError where it is a guess
    buffers(names, part.prefix)      # {"betas": full name}, of the modules around it
    beside(names, part, found)       # {"text": 196, "opt": 338}: all other tensors, counted

A prefix is any path of modules, "module.model.diffusion_model.", and of a pickle's dictionaries,
which end in a slash: "state_dict/unet.". A network is an EMA if the last name on the way to it that
speaks of it says so (ema_model, shadow …; online_model is raw), and if torch's AveragedModel or
Lightning's WeightAveraging put it there. LDM's LitEma writes names without their dots. Wrappers
that torch puts between modules are no part of a name.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from harness.cli import UserError
from harness.files import Container, listed, raw_bytes

INSERTED = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
UNET = re.compile(r"((?:.*?[./])?)(?:input_blocks|down_blocks)\.\d")
TRANSFORMER = re.compile(r"((?:.*?[./])?)(?:final_layer|norm_out)\.linear\.weight")
AUTOENCODER = re.compile(r"((?:.*?[./])?)encoder\.conv_in\.weight")
FLAT = re.compile(r"((?:.*[./])?)(\w*?)(?:input_blocks|down_blocks)\d\w*(?:weight|bias)")
# A transformer's first block, in any layout, and its last layer.
FIRST = ("blocks.0.", "joint_blocks.0.", "double_blocks.0.", "transformer_blocks.0.")
LAST = {"final_layer.linear.weight", "proj_out.weight"}
SIDES = ({"input_blocks", "output_blocks"}, {"down_blocks", "up_blocks", "time_embedding"})
AVERAGE = "ema|avg|averages?|averaged|averaging|shadow|swa|polyak"
EMA = re.compile(
    rf"(?i:(?<![a-z])(?:{AVERAGE})(?![a-z]))|(?<![A-Z])EMA(?=[A-Z][a-z])|(?<![A-Za-z])ema(?=[A-Z])"
    r"|(?<=[a-z])(?:Ema|EMA)(?![a-z])"
)
RAW = re.compile(r"(?i)(?<![a-z])(?:online|raw|current|non?_?ema)(?![a-z])")
# What holds moments and gradients under a network's own names, but no weights.
MOMENTS = re.compile(
    r"(?i)(?<![a-z])(?:opt|optim|optimi[sz]ers?|exp_avg\w*|momentum\w*|grads?|gradients?)(?![a-z])"
)
# What programs call what is not, or not only, a U-Net, and what it is called here.
PARTS = {
    "model.diffusion_model.": "unet", "diffusion_model.": "unet", "unet.": "unet",
    "model_ema.": "ema", "first_stage_model.": "vae", "vae.": "vae", "cond_stage_model.": "text",
    "conditioner.": "text", "text_encoder.": "text", "text_encoder_2.": "text",
    "text_encoders.": "text", "control_model.": "ControlNet",
}  # fmt: skip
# Buffers of the modules around a network.
SCHEDULE = frozenset((
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights", "logvar", "scale_factor",
    "denoiser.sigmas", "edm_mean", "edm_std", "v_pred", "ztsnr", "edm_vpred.sigma_max",
    "edm_vpred.sigma_min", "ddim_sigmas", "ddim_alphas", "ddim_alphas_prev",
    "ddim_sqrt_one_minus_alphas", "model_ema.decay", "model_ema.num_updates",
))  # fmt: skip
COUNTERS = frozenset(("step", "global_step", "n_averaged", "initted", "decay", "num_updates"))
# What a file without a U-Net is instead, by a name in it.
KINDS = {
    "a ControlNet, which steers a U-Net and is none": re.compile(
        r"(^|[./])(zero_convs|input_hint_block|controlnet_\w+)\."
    ),
    "a LoRA, which changes a U-Net and is none": re.compile(
        r"((^|[._])lora[._]|[._](hada_w\d_\w|lokr_w\d))"
    ),
    "half a U-Net, as classifiers are": re.compile(r"(^|[./])input_blocks\.\d+\.\d+\."),
}
LONGEST = 300  # letters of a name that may be a network's
LABELS = 10  # kinds of other tensors that are counted one by one
WORDS = (
    "input_blocks middle_block output_blocks time_embed label_emb in_layers emb_layers out_layers "
    "skip_connection op conv qkv norm proj_in proj_out transformer_blocks attn1 attn2 to_q to_k "
    "to_v to_out ff net proj norm1 norm2 norm3 out weight bias "
    "down_blocks mid_block up_blocks resnets attentions downsamplers upsamplers time_embedding "
    "linear_1 linear_2 conv_in conv_out conv_norm_out conv1 conv2 conv_shortcut time_emb_proj "
    "group_norm class_embedding add_embedding"
)
WORD = re.compile("|".join(sorted(WORDS.split(), key=len, reverse=True)) + r"|\d+")


class Part(NamedTuple):
    """A whole network in a file."""

    prefix: str  # "" = bare
    names: dict[str, str]  # {full name: the network's own name}
    ema: bool

    def place(self) -> str:
        """Its prefix, for a message and for --part."""
        return self.prefix.rstrip("./") or "the top"


# ---- finding ------------------------------------------------------------------------------------


def clean_names(names: Iterable[str]) -> dict[str, str]:
    """{name without inserted wrappers: name}."""
    table: dict[str, str] = {}
    for full in names:
        if len(full) > LONGEST:
            continue
        name = INSERTED.sub("", full)
        if name in table:
            raise UserError(
                f"two tensors are the same one of a compiled network: {table[name]} and {full}",
                do="Save only the network's state dict.",
            )
        table[name] = full
    return table


def unets(names: Iterable[str]) -> list[Part]:
    """Every whole U-Net, with both its halves, and every transformer, in either layout."""
    table = clean_names(names)
    flat = flat_groups(table)
    whole = {}
    for prefix, inner in (grouped(table, UNET) | flat).items():
        heads = {name.split(".", 1)[0] for name in inner.values()}
        if any(side <= heads for side in SIDES) and not MOMENTS.search(prefix):
            whole[prefix] = inner
    for prefix, inner in grouped(table, TRANSFORMER).items():
        if is_transformer(inner.values()) and not MOMENTS.search(prefix):
            whole[prefix] = inner
    return [
        Part(prefix, inner, prefix in flat or is_ema(prefix, table, whole))
        for prefix, inner in whole.items()
    ]


def is_transformer(names: Iterable[str]) -> bool:
    """Are these a transformer's inner names?"""
    names = set(names)
    return bool(LAST & names) and any(name.startswith(FIRST) for name in names)


def autoencoders(names: Iterable[str]) -> list[Part]:
    """Every autoencoder."""
    table = clean_names(names)
    groups = grouped(table, AUTOENCODER)
    return [
        Part(prefix, inner, is_ema(prefix, table, groups))
        for prefix, inner in groups.items()
        if not MOMENTS.search(prefix)
    ]


def grouped(table: Mapping[str, str], sign: re.Pattern) -> dict[str, dict[str, str]]:
    """{prefix: {full name: inner name}}: a prefix ends where `sign` begins, and a name belongs to
    its longest prefix. Known parts, buffers and further dictionaries below a prefix are others."""
    groups: dict[str, dict[str, str]] = {m[1]: {} for name in table if (m := sign.match(name))}
    for name, full in table.items():
        # The places where a prefix can end, from the right.
        ends = [m.end() for m in re.finditer(r"[./]", name)] if groups else []
        end = next((end for end in [*ends[::-1], 0] if name[:end] in groups), None)
        if end is None:
            continue
        inner = name[end:]
        known = inner in SCHEDULE or inner in COUNTERS or inner.startswith(tuple(PARTS))
        known = known or inner.endswith(".n_averaged")
        if not known and "/" not in inner:
            groups[name[:end]][full] = inner
    return groups


def flat_groups(table: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The same of LitEma's names: "model_ema.diffusion_modelout0bias" is out.0.bias, in the group
    "model_ema.diffusion_model"."""
    starts = {m[1]: m[2] for name in table if (m := FLAT.fullmatch(name))}
    groups: dict[str, dict[str, str]] = {}
    for name, full in table.items() if starts else ():
        place = name[: max(name.rfind("."), name.rfind("/")) + 1]
        prefix = place + starts.get(place, "")
        inner = dotted(name.removeprefix(prefix))
        if place in starts and name.startswith(prefix) and inner:
            groups.setdefault(prefix, {})[full] = inner
    return groups


def dotted(name: str) -> str:
    """A U-Net's name with its dots, from one without; "" if it is none."""
    words = WORD.findall(name)
    if "".join(words) != name:
        return ""
    # Two numbers: input_blocks.11.0 and label_emb.0.2. The second has one digit.
    return re.sub(
        r"^(input_blocks|output_blocks|label_emb)\.(\d+)(\d)\.", r"\1.\2.\3.", ".".join(words)
    )


def is_ema(prefix: str, table: Mapping[str, str], whole: Iterable[str]) -> bool:
    """Does what stands under a prefix average the weights of training?"""
    if prefix.replace("state_dict/", "current_model_state/", 1) in set(whole) - {prefix}:
        return True  # Lightning's WeightAveraging
    if any(prefix[: m.start()] + "n_averaged" in table for m in re.finditer(r"\bmodule\.", prefix)):
        return True  # torch's AveragedModel
    for word in reversed(re.split(r"[./]", prefix)):
        if RAW.search(word) or EMA.search(word):
            return not RAW.search(word)
    return False


# ---- choosing -----------------------------------------------------------------------------------


def choose(
    found: list[Part], kind: str, box: Container, ema: bool | None = None, part: str = ""
) -> Part:
    """The one network that is meant: under `part` if that is given, then raw before EMA unless
    ema=True. Copies of one another are one. UserError where nothing fits, or more than one."""
    inside = [p for p in found if lies_in(p.prefix, part)]
    if part and not inside:
        places = listed([p.place() for p in found], 8)
        do = f"Choose one of {places}." if found else "Leave --part out."
        raise UserError(f"{box.path} holds no {kind} under {part!r}", do=do)
    averages = [p for p in inside if p.ema]
    raw = [p for p in inside if not p.ema]
    if ema:
        wanted = averages
    elif ema is None:
        wanted = raw or averages
    else:
        wanted = raw
    different = []
    for p in wanted:
        if not any(same_tensors(box, p, q) for q in different):
            different.append(p)
    if len(different) == 1:
        return different[0]
    if different:
        several = f"several {'EMAs' if different[0].ema else kind + 's'}"
        places = [p.place() for p in different]
        raise UserError(
            f"{box.path} holds {several}: {listed(places, 8)}",
            do=f"Choose one with python -m ckpt convert … --part {places[0]}, or another.",
        )
    if averages:
        raise UserError(
            f"{box.path} holds an EMA ({averages[0].place()}), wanted the raw weights",
            do="Name the file of the raw weights.",
        )
    raise nothing(f"EMA of a {kind}" if raw else kind, box)


def lies_in(prefix: str, part: str) -> bool:
    """Does a prefix begin with what a user calls a part?"""
    path, wanted = ([w for w in re.split(r"[./]", text) if w] for text in (prefix, part))
    return part == "the top" and not path or path[: len(wanted)] == wanted


def same_tensors(box: Container, a: Part, b: Part) -> bool:
    """Are two networks of a file one, bit for bit? Stops at the first difference."""
    one, two = ({inner: full for full, inner in p.names.items()} for p in (a, b))
    if one.keys() != two.keys():
        return False
    pairs = [(one[inner], two[inner]) for inner in one]
    if any(box.table[x][:2] != box.table[y][:2] for x, y in pairs):
        return False
    return all(
        torch.equal(torch.from_numpy(raw_bytes(box[x])), torch.from_numpy(raw_bytes(box[y])))
        for x, y in pairs
    )


def nothing(kind: str, box: Container) -> UserError:
    """The error for a file that has no such network; says what it is instead, if that shows."""
    for what, sign in KINDS.items() if kind == "U-Net" else ():
        if any(sign.search(name) for name in box):
            return UserError(
                f"{box.path} is {what} ({len(box)} tensors: {listed(box)})",
                do="Name a U-Net's file.",
            )
    counts = beside(box, None, unets(box))
    counted = ", ".join(f"{n:,} {label} tensors" for label, n in counts.items()) or "nothing"
    do = "Name a file that has one."
    if kind.startswith("EMA"):
        do = "Take the raw weights: leave ema out."
    return UserError(f"{box.path} holds no {kind}, but {counted} ({listed(box)})", do=do)


# ---- what lies around it ------------------------------------------------------------------------


def buffers(names: Iterable[str], prefix: str) -> dict[str, str]:
    """{buffer: full name} of the schedule and the markers in the modules around a prefix, the
    nearest first."""
    table = clean_names(names)
    found = {}
    for end in [0, *(m.end() for m in re.finditer(r"[./]", prefix))]:
        here = {mark: table.get(prefix[:end] + mark) for mark in SCHEDULE}
        found |= {mark: full for mark, full in here.items() if full}
    return found


def beside(names: Iterable[str], part: Part | None, found: list[Part]) -> dict[str, int]:
    """{what: how many} of all tensors but a network's own, each kind under a known word, or the
    first name on its way. found: the networks that unets() sees."""
    networks = {full: p for p in found for full in p.names}
    vaes = {full for p in autoencoders(names) if p.prefix for full in p.names}
    inside = part.prefix[: part.prefix.rfind("/") + 1] if part else ""
    counts: dict[str, int] = {}
    for full in names:
        if part and full in part.names:
            continue
        plain = re.sub(r"^(module\.)+", "", INSERTED.sub("", full.rpartition("/")[2]))
        start = next((p for p in PARTS if plain.startswith(p)), "")
        other = networks.get(full)
        if plain in SCHEDULE:
            label = "schedule"
        elif start:
            label = PARTS[start]
        elif full in vaes:
            label = "vae"
        elif part and part.ema and other and not other.ema:
            label = "raw"
        else:
            plain = re.sub(r"^(module\.)+", "", full.removeprefix(inside))
            label = ascii(re.split(r"[./]", plain)[0][:40])[1:-1]
        counts[label] = counts.get(label, 0) + 1
    most = sorted(counts, key=counts.__getitem__, reverse=True)[:LABELS]
    shown = {label: n for label, n in counts.items() if label in most}
    if len(shown) < len(counts):
        shown["other"] = sum(counts.values()) - sum(shown.values())
    return shown
