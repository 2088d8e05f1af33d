"""LoRA (Hu et al. 2021) of Stable Diffusion, merged: W + scale · alpha/r · up @ down.

    lora = read_lora(Path("style.safetensors"))
    merge_unet(net, lora, 0.8)
    merge_texts(encoders, lora, 0.8)     # text.TextEncoder's, in the order of the pipeline

Read are kohya's names (lora_unet_…, lora_te1_…), with diffusers' or LDM's modules, and those of
diffusers and peft. Whatever is not understood is refused by name: a LoRA that is applied in part
draws something else without an error.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr as brief
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ckpt.containers import open_weights
from ckpt.hub import resolve
from ckpt.layouts import foreign_names
from harness.cli import UserError, clipped
from harness.files import fingerprint, listed

# Of a file's names: which network, which module, which of its tensors.
KOHYA = re.compile(r"lora_(unet|te|te1|te2)_(.+)\.(lora_down\.weight|lora_up\.weight|alpha)")
PEFT = re.compile(
    r"(unet|text_encoder|text_encoder_2)\.(.+?)"
    r"[._](lora_A\.weight|lora_B\.weight|lora\.down\.weight|lora\.up\.weight|alpha)"
)
NETWORKS = {
    "unet": "unet", "te": "text 1", "te1": "text 1", "te2": "text 2",
    "text_encoder": "text 1", "text_encoder_2": "text 2",
}  # fmt: skip
ROLES = {
    "lora_down.weight": "down", "lora_A.weight": "down", "lora.down.weight": "down",
    "lora_up.weight": "up", "lora_B.weight": "up", "lora.up.weight": "up", "alpha": "alpha",
}  # fmt: skip
# Other ways to change weights that share the file format.
OTHERS = {
    "hada_": "LoHa", "lokr_": "LoKr", "lora_mid": "LoCon with a middle part", "dora_scale": "DoRA",
    "base_model.": "peft's own format, whose alpha lies in another file,",
    "lora_magnitude_vector": "DoRA", "oft_": "OFT", ".diff": "a difference of weights",
}  # fmt: skip
HEADER = "lora_adapter_metadata"
# What it may say that changes the arithmetic.
UNKNOWN = ("alpha_pattern", "use_dora", "use_rslora", "fan_in_fan_out")


class Low(NamedTuple):
    """A module's change: (up @ down) · alpha / r."""

    down: Tensor  # (r, in) or (r, in, k, k)
    up: Tensor  # (out, r) or (out, r, 1, 1)
    alpha: float

    def change(self, like: Tensor, scale: float) -> Tensor:
        """What is added to a weight `like`, in its shape, fp32."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (product * (scale * self.alpha / len(self.down))).view(like.shape)


class LoRA(NamedTuple):
    path: Path
    # By network, "unet", "text 1" or "text 2": {module with _ for dots: its change}
    parts: dict[str, dict[str, Low]]
    fingerprint: str


def read_lora(path: Path) -> LoRA:
    """A file's changes, all of it understood."""
    box = open_weights(path)
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name in box:
        part, module, role = place_of(name, path)
        own = found.setdefault((part, module), {})
        if role in own:
            raise UserError(f"{path} holds {clipped(name)!r} twice", do="Copy the file again.")
        own[role] = box[name]
    if not found:
        raise UserError(f"{path} holds no LoRA", do="Name a file of lora_down and lora_up tensors.")
    usual = alphas(box.meta, path)
    parts: dict[str, dict[str, Low]] = {}
    for (part, module), tensors in found.items():
        where = f"{path}: {part}, {module}"
        parts.setdefault(part, {})[module] = low_of(tensors, usual.get(part), where)
    return LoRA(path, parts, fingerprint(dict(box)))


def place_of(name: str, path: Path) -> tuple[str, str, str]:
    """(network, module with _ for dots, role) of a tensor's name."""
    match = KOHYA.fullmatch(name) or PEFT.fullmatch(name)
    if not match:
        kind = next((word for sign, word in OTHERS.items() if sign in name), "")
        what = f"is of {kind}" if kind else "is no part of a LoRA"
        raise UserError(
            f"{path}: tensor {clipped(name)!r} {what}",
            wanted="lora_down, lora_up and alpha, or lora_A and lora_B",
            do="Merge it with the program that made it.",
        )
    network, module, role = match.groups()
    # diffusers' first attention processors: attn1.processor.to_q_lora.down
    module = re.sub(r"\.processor\.(to_\w+)$", r".\1", module)
    module = re.sub(r"\.to_out$", ".to_out.0", module)
    return NETWORKS[network], module.replace(".", "_"), ROLES[role]


def low_of(tensors: Mapping[str, Tensor], usual: float | None, where: str) -> Low:
    """A module's change, from its two or three tensors."""
    if not {"down", "up"} <= set(tensors):
        raise UserError(f"{where} has only {listed(sorted(tensors))}", do="Copy the file again.")
    down, up = tensors["down"], tensors["up"]
    fits = down.ndim == up.ndim in (2, 4) and up.shape[1] == len(down) > 0
    if not fits or up.shape[2:].numel() != 1:
        raise UserError(
            f"{where}: down {tuple(down.shape)} and up {tuple(up.shape)}",
            wanted="(r, in) and (out, r), or of a convolution (r, in, k, k) and (out, r, 1, 1)",
            do="Copy the file again.",
        )
    alpha = tensors.get("alpha", torch.tensor(len(down) if usual is None else usual))
    if alpha.numel() != 1 or not alpha.float().isfinite().all():
        raise UserError(
            f"{where}: alpha is {brief(alpha.tolist())}",
            wanted="a finite number",
            do="Copy the file again.",
        )
    return Low(down, up, float(alpha))


def alphas(meta: Mapping[str, Any], path: Path) -> dict[str, float]:
    """The alpha of a network's modules that a header of diffusers says; without one it is r."""
    try:
        said = json.loads(meta.get(HEADER) or "{}")
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise UserError(f"{path}: its {HEADER} is no table", do="Save it again.")
    for key in said:
        if key.endswith(UNKNOWN) and said[key]:
            raise UserError(
                f"{path}: its {HEADER} says {key}", do="Merge it with the program that made it."
            )
    names = {f"{word}.lora_alpha": part for word, part in NETWORKS.items()}
    found = {names[key]: value for key, value in said.items() if key in names}
    for part, value in found.items():
        if type(value) not in (int, float):
            raise UserError(
                f"{path}: its {HEADER} says that alpha of {part} is {brief(value)}",
                wanted="a number",
                do="Save it again.",
            )
    return found


# ---- merging ------------------------------------------------------------------------------------


def merge_unet(net: nn.Module, lora: LoRA, scale: float = 1.0) -> None:
    """Add a LoRA's changes of the U-Net to its weights."""
    names = {}
    for layout in ("native", "diffusers"):
        for foreign, native in foreign_names(net.cfg, layout).items():
            names[flat(foreign)] = native
    merge(net, lora, lora.parts.get("unet", {}), names, scale)


def merge_texts(encoders: Sequence[nn.Module], lora: LoRA, scale: float = 1.0) -> None:
    """Add a LoRA's changes of the text encoders to theirs."""
    for i, encoder in enumerate(encoders, 1):
        names = {}
        for name in encoder.state_dict():
            names[flat(name)] = names[flat(f"text_model.{name}")] = name
        merge(encoder, lora, lora.parts.get(f"text {i}", {}), names, scale)
    last = f"text {len(encoders) + 1}"
    if last in lora.parts:
        raise UserError(
            f"{lora.path} changes {len(encoders) + 1} text encoders, and there is one",
            do="It is of SDXL: name another --ckpt.",
        )


def flat(name: str) -> str:
    return name.removesuffix(".weight").replace(".", "_")


@torch.no_grad()
def merge(
    net: nn.Module, lora: LoRA, changes: Mapping[str, Low], names: Mapping[str, str], scale: float
) -> None:
    """Add changes to the weights they are of; all are checked before one is added."""
    state = dict(net.named_parameters())
    for module, low in changes.items():
        weight = state.get(names.get(module, ""))
        if weight is None:
            raise UserError(
                f"{lora.path}: this network has no module {clipped(module)!r}",
                do="It is of another family: name another --ckpt or --lora.",
            )
        shape = (len(low.up), *low.down.shape[1:])
        if bare(shape) != bare(weight.shape):
            raise UserError(
                f"{lora.path}: its change of {clipped(module)} is {shape}, the weight "
                f"{tuple(weight.shape)}",
                do="It is of another network: name another --ckpt or --lora.",
            )
    for module, low in changes.items():
        weight = state[names[module]]
        weight.add_(low.change(weight, scale).to(weight))


def bare(shape: Sequence[int]) -> tuple[int, ...]:
    """A weight's shape without the 1 × 1 that some files give a linear layer."""
    return tuple(shape[:2]) if tuple(shape[2:]) in ((), (1, 1)) else tuple(shape)


def read_loras(specs: Sequence[str]) -> list[tuple[LoRA, float]]:
    """The files of --lora, with their strengths."""
    found = []
    for spec in specs:
        path, scale = read_spec(spec)
        on_hub = str(path).startswith("hf:")
        path = resolve(str(path)) if on_hub else path
        if not path.is_file():
            raise UserError(f"--lora {spec}: no such file", do="Name a file of a LoRA.")
        found.append((read_lora(path), scale))
    return found


def read_spec(spec: str) -> tuple[Path, float]:
    """FILE or FILE:SCALE."""
    name, colon, number = spec.rpartition(":")
    try:
        scale = float(number) if colon else 1.0
    except ValueError:
        return Path(spec), 1.0
    if not abs(scale) < 1e3:
        raise UserError(f"--lora {spec}", wanted="a strength below 1000", do="Try :0.8.")
    return (Path(name) if colon else Path(spec)), scale
