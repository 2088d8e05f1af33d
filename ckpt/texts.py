"""CLIP's text encoders in anybody's files: which a file holds, and what their tensors are called.

    found = encoders(names)              # [TextPart("cond_stage_model.transformer.", "hf", {…})]
    view = native_text(box, part)        # the file under text.TextEncoder's own names

    layout "hf"          transformers': Stable Diffusion 1, SDXL's first, folders, clip_l, clip_g
    layout "open_clip"   OpenCLIP's: Stable Diffusion 2, SDXL's second; OpenAI's own

TextEncoder's names are transformers' without "text_model.". OpenCLIP keeps q, k and v in one
tensor, and its projection as x @ P, where transformers has a Linear layer: the transpose. That of
ViT-bigG is square, so that no shape tells a file that has it the wrong way round: see is_turned().
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from reprlib import repr as brief
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ckpt.containers import ENDINGS, open_weights
from ckpt.hub import resolve
from ckpt.parts import clean_names
from harness.cli import UserError
from harness.files import Container, Entry, listed
from harness.reading import read_file

LAYOUTS = ("hf", "open_clip")
HF = re.compile(r"((?:.*?[./])??)(?:text_model\.)?embeddings\.token_embedding\.weight")
OPEN_CLIP = re.compile(r"((?:.*?[./])??)token_embedding\.weight")
# The image side of a whole CLIP, and the temperature of its loss.
NOT_TEXT = re.compile(r"(vision_model|visual|visual_projection)\.|logit_scale$|logit_bias$")
# A buffer 0 … 76. Merging programs have averaged it into fractions; nobody needs it.
POSITIONS = re.compile(r"(text_model\.)?embeddings\.position_ids")
# Native names and OpenCLIP's, inside a layer and beside them.
LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
TOP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
QKV = ("q_proj", "k_proj", "v_proj")
# The first row of ViT-bigG's projection, as released: x @ P, and as a Linear layer's weight
# (Stability-AI/generative-models, issue 111).
ANCHORS = {"open_clip": (-0.0348, 0.0218, -0.0025), "hf": (-0.0348, -0.0037, 0.0261)}
# The parts of a pipeline of diffusers, and the names of an encoder's file in its folder.
KINDS = ("text_encoder", "text_encoder_2")
INDEX = "model_index.json"
OWN = [f"{stem}{end}" for stem in ("model", "pytorch_model") for end in ENDINGS]
CONFIG = "config.json"


class TextPart(NamedTuple):
    """A text encoder in a file."""

    prefix: str
    layout: str
    names: dict[str, str]  # {its name in that layout: full name}
    aside: dict[str, str]  # the same of what is no part of it, but is written back: logit_scale


# ---- finding ------------------------------------------------------------------------------------


def encoders(names: Iterable[str]) -> list[TextPart]:
    """Every text encoder of a file, in the order of their names."""
    table = clean_names(names)
    starts = {match[1]: "hf" for name in table if (match := HF.fullmatch(name))}
    for name in table:
        match = OPEN_CLIP.fullmatch(name)
        if match and f"{match[1]}positional_embedding" in table:
            starts[match[1]] = "open_clip"
    return [part_at(table, prefix, starts) for prefix in sorted(starts)]


def part_at(table: Mapping[str, str], prefix: str, starts: Mapping[str, str]) -> TextPart:
    """What stands under a prefix, and not under a longer one of `starts`."""
    inside = {name: full for name, full in table.items() if name.startswith(prefix)}
    for other in starts:
        if len(other) > len(prefix):
            inside = {name: full for name, full in inside.items() if not name.startswith(other)}
    own = {name.removeprefix(prefix): full for name, full in inside.items()}
    aside = {name: full for name, full in own.items() if name in ("logit_scale", "logit_bias")}
    names = {
        name.removeprefix("text_model."): full
        for name, full in own.items()
        if not NOT_TEXT.match(name) and not POSITIONS.fullmatch(name)
    }
    return TextPart(prefix, starts[prefix], names, aside)


# ---- names --------------------------------------------------------------------------------------


def native_text(box: Container, part: TextPart) -> Container:
    """An encoder of a file under native names, read on access. Values are moved, never computed
    with."""
    table = {name: box.table[full] for name, full in part.names.items()}
    if part.layout == "hf":
        return box.over(table)
    native: dict[str, Entry] = {}
    for name, entry in table.items():
        native |= from_open_clip(name, entry)
    return box.over(native)


def from_open_clip(name: str, entry: Entry) -> dict[str, Entry]:
    """One tensor of OpenCLIP's as native ones: itself, or q, k and v."""
    top = {theirs: ours for ours, theirs in TOP.items()}
    if name == "text_projection":
        turned = Entry(entry.dtype, entry.shape[::-1], lambda: entry.read().t().contiguous())
        return {top[name]: turned}
    if name in top:
        return {top[name]: entry}
    match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    if not match:
        return {name: entry}  # unknown: the strict loader will say so
    layer, rest = f"encoder.layers.{match[1]}", match[2]
    if joined := re.fullmatch(r"attn\.in_proj_(weight|bias)", rest):
        return thirds(f"{layer}.self_attn", joined[1], entry)
    stem, _, leaf = rest.rpartition(".")
    inner = {theirs: ours for ours, theirs in LAYER.items()}.get(stem)
    return {f"{layer}.{inner}.{leaf}" if inner else name: entry}


def thirds(place: str, leaf: str, entry: Entry) -> dict[str, Entry]:
    """in_proj's rows: q, then k, then v."""
    rows = entry.shape[0] // 3
    shape = (rows, *entry.shape[1:])

    def third(i: int) -> Entry:
        part = slice(i * rows, (i + 1) * rows)
        return Entry(entry.dtype, shape, lambda: entry.read()[part].clone())

    return {f"{place}.{name}.{leaf}": third(i) for i, name in enumerate(QKV)}


def foreign_text(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Native tensors under a layout's names: the inverse of native_text."""
    if layout not in LAYOUTS:
        do = f"Choose one of {', '.join(LAYOUTS)}."
        raise UserError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}", do=do)
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if layout == "hf":
            head = "" if name.startswith("text_projection.") else "text_model."
            out[head + name] = tensor
        else:
            out |= to_open_clip(name, tensors)
    return out


def to_open_clip(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One native tensor as OpenCLIP's; k and v come along with q."""
    if name == "text_projection.weight":
        return {TOP[name]: tensors[name].t().contiguous()}
    if name in TOP:
        return {TOP[name]: tensors[name]}
    layer, place, stem, leaf = re.fullmatch(
        r"encoder\.layers\.(\d+)\.((?:self_attn\.|mlp\.)?(\w+))\.(weight|bias)", name
    ).groups()
    block = f"transformer.resblocks.{layer}"
    if place in LAYER:
        return {f"{block}.{LAYER[place]}.{leaf}": tensors[name]}
    if stem != "q_proj":
        return {}
    three = [tensors[name.replace("q_proj", one)] for one in QKV]
    return {f"{block}.attn.in_proj_{leaf}": torch.cat(three)}


# ---- what a file says ---------------------------------------------------------------------------


def infer_text(view: Container) -> dict[str, int]:
    """What the tensors of an encoder show of text.TextConfig: all but heads, activation and pad."""
    needed = {
        "token": "embeddings.token_embedding.weight",
        "position": "embeddings.position_embedding.weight",
        "hidden": "encoder.layers.0.mlp.fc1.weight",
    }
    shapes = {key: view.shape(name) for key, name in needed.items() if name in view}
    if len(shapes) < len(needed) or any(len(shape) != 2 for shape in shapes.values()):
        raise UserError(
            f"{view.path} holds half a text encoder ({len(view)} tensors: {listed(view)})",
            do="Copy it again.",
        )
    numbers = [re.match(r"encoder\.layers\.(\d+)\.", name) for name in view]
    projection = view.shape("text_projection.weight") if "text_projection.weight" in view else (0,)
    return {
        "vocab": shapes["token"][0],
        "width": shapes["token"][1],
        "context": shapes["position"][0],
        "hidden": shapes["hidden"][0],
        "layers": 1 + max(int(match[1]) for match in numbers if match),
        "projection": projection[0],
    }


def says_text(path: Path) -> dict[str, Any]:
    """What a config.json of transformers beside an encoder's file says of text.TextConfig that its
    tensors do not: heads, act. {}: there is none."""
    file = path.absolute().parent / CONFIG
    if not file.is_file():
        return {}
    try:
        config = json.loads(read_file(file))
    except (ValueError, RecursionError):
        config = None
    config = config.get("text_config", config) if isinstance(config, dict) else None
    if not isinstance(config, dict) or "num_attention_heads" not in config:
        return {}  # somebody else's
    heads, act = config["num_attention_heads"], config.get("hidden_act", "quick_gelu")
    eps = config.get("layer_norm_eps", 1e-5)
    if type(heads) is not int or heads < 1 or act not in ("quick_gelu", "gelu") or eps != 1e-5:
        raise UserError(
            f"{file}: heads {brief(heads)}, activation {brief(act)}, layer_norm_eps {brief(eps)}",
            wanted="whole heads, quick_gelu or gelu, 1e-05",
            do="Use it in transformers.",
        )
    return {"heads": heads, "act": act}


def pad_word(path: Path) -> str:
    """The word with which a pipeline's tokenizer fills up, by the tokenizer's folder beside that of
    an encoder; "" where there is none."""
    folder = path.absolute().parent
    file = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    try:
        config = json.loads(read_file(file / "tokenizer_config.json"))
    except (OSError, ValueError, RecursionError):
        return ""
    word = config.get("pad_token") if isinstance(config, dict) else None
    if isinstance(word, dict):
        word = word.get("content")
    return word if isinstance(word, str) else ""


def is_turned(projection: Tensor) -> bool:
    """Is a native projection, (P, W) of a Linear layer, that of ViT-bigG the wrong way round?

    By the first numbers of its first row: fine-tuning hardly moves them.
    """
    if projection.shape != (1280, 1280):
        return False
    row = projection[0, :3].float()
    far = {key: float((row - row.new_tensor(one)).abs().max()) for key, one in ANCHORS.items()}
    return far["open_clip"] < 2e-3 < far["hf"]


# ---- where they lie -----------------------------------------------------------------------------


def text_files(name: str) -> tuple[list[Path], dict[str, Any]]:
    """(the files in which a checkpoint's text encoders are; the model_index.json of its pipeline,
    {} where there is none). name: a file, a folder of diffusers or of one encoder, or on the
    Hub."""
    on_hub = name.startswith("hf:")
    if on_hub and "." in name.partition("@")[0].rpartition("/")[2] and name.count("/") > 1:
        return [resolve(name)], {}
    root = resolve(inside(name, INDEX)).parent if on_hub else pipeline_of(Path(name))
    if root is None:
        return [own_file(Path(name))], {}
    index = read_index(root / INDEX)
    files = []
    for kind in KINDS:
        said = index.get(kind)
        if not isinstance(said, list) or said[:1] == [None]:
            continue
        files.append(resolve(inside(name, kind), OWN) if on_hub else own_file(root / kind))
    return files, index


def encoders_with(path: Path) -> list[tuple[int, str]]:
    """(width, place) of every text encoder in a network's file, or in the pipeline around it, of
    which parts may not be there."""
    root, found = pipeline_of(path), []
    folders = [root / kind for kind in KINDS] if root else []
    files = [own_file(folder) for folder in folders if any((folder / n).is_file() for n in OWN)]
    for file in files if root else [path]:
        box = open_weights(file)
        for part in encoders(box):
            shape = native_text(box, part).shape("embeddings.token_embedding.weight")
            if len(shape) == 2:
                found.append((shape[1], part.prefix.rstrip("./") or file.parent.name))
    return sorted(found)


def inside(name: str, place: str) -> str:
    """hf:org/name@revision -> hf:org/name/PLACE@revision"""
    repo, at, revision = name.partition("@")
    return f"{repo.rstrip('/')}/{place}{at}{revision}"


def pipeline_of(path: Path) -> Path | None:
    """The folder of diffusers' pipeline that a path is, or that its network is a part of. A file
    with text encoders of its own is in none."""
    path = path.absolute()
    if path.is_file() and encoders(open_weights(path)):
        return None
    folders = [path, path.parent] if path.is_dir() else [path.parent, path.parent.parent]
    return next((folder for folder in folders if (folder / INDEX).is_file()), None)


def own_file(path: Path) -> Path:
    """A file as it is; the weights in an encoder's folder."""
    if not path.is_dir():
        return path
    for name in OWN:
        if (path / name).is_file():
            return path / name
    raise UserError(
        f"{path} has no text encoder's weights", wanted=f"{OWN[0]}", do="Copy them there."
    )


def read_index(path: Path) -> dict[str, Any]:
    """A pipeline's model_index.json: {part: [library, class]} and its settings."""
    try:
        index = json.loads(read_file(path))
    except (ValueError, RecursionError):
        index = None
    if not isinstance(index, dict):
        raise UserError(f"{path} is no model_index.json of diffusers", do="Copy it again.")
    return index
