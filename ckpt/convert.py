"""Looking into checkpoints and turning them into another layout: what a file is and what it lacks,
the same weights under other names, and whether two files hold the same network."""

import json
import os
import re
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ckpt.byteunet import ByteUNetConfig
from ckpt.configs import differences, written
from ckpt.containers import rounded
from ckpt.diffusers import diffusers_config
from ckpt.foreign import Unsaid, has_part, open_guessing, open_unet
from ckpt.hub import HUB
from ckpt.lcm import LCMUNetConfig
from ckpt.layouts import (
    MARKERS, Config, family, foreign_names, foreign_shapes, modelspec, native_shapes,
    reorder_attention, target_of, to_foreign,
)
from ckpt.meaning import ANOTHER, UNKNOWN, add_schedule, shown_betas
from ckpt.mmdit_configs import usual_shift
from ckpt.mmdits import is_sd3
from ckpt.native import PROBE_LIMIT, Source, check_weights, find_checkpoint, probe
from ckpt.texts import encoders_with
from ckpt.usual import (
    CLIPS, VAES, WIDTHS, as_usual, encoder_files, shown_encoders, usual_side,
)  # fmt: skip
from diffusion.schedules import shorter
from harness.cli import UserError, dashed, printable
from harness.files import (
    Container, fingerprint, fsync, make_dir, raw_bytes, stream_tensors, text_meta, write_text,
)
from model import UNetConfig, network_name

# ---- convert ------------------------------------------------------------------------------------


def convert(
    src: Path | str,
    dst: Path | str,
    layout: str,
    dtype: str | None = None,
    *,
    ema: bool | None = None,
    table: str = "",
    zero_snr: bool = False,
    **known: Any,
) -> str:
    """Write a U-Net in another layout and read it back; returns the fingerprint.

    "native": one file as LDM and guided-diffusion name things. "diffusers": one file if dst ends in
    .safetensors, else a folder for from_pretrained. The dtype stays unless asked. One tensor is in
    memory at a time. Nothing is overwritten, and dst appears only once it is proven to hold the
    source's weights, bit for bit. With table, the noise schedule, the objective is written in full;
    what is known of it, and by which words of the source, is kept.
    """
    dst, source = Path(dst), open_unet(src, ema=ema, **known)
    cfg, weights, meta = source.cfg, source.weights, dict(source.meta)
    if not isinstance(cfg, Config):
        raise UserError(
            f"{src} holds a {network_name(cfg)}, which has one layout only",
            do="Copy the file as it is.",
        )
    foreign_shapes(cfg, layout)  # refuses what the layout cannot say
    folder = layout == "diffusers" and dst.suffix != ".safetensors"
    check_target(dst, weights.path, folder)
    add_schedule(meta, table, zero_snr, str(src))
    digest = check_weights(source, weights)
    if dtype:
        weights = rounded(weights, dtype)
        before, digest = digest, fingerprint(weights)
        if digest != before:
            # The probe's tolerance is for arithmetic, not for rounding.
            meta.pop("probe", None)
            meta["cast_from"] = before
    if "probe" not in meta and parameters(weights) <= PROBE_LIMIT:
        meta["probe"] = probe(cfg, weights)
    meta |= {"unet": written(cfg), "layout": layout, "fingerprint": digest}
    if network_name(cfg) != "UNet":
        meta["network"] = network_name(cfg)
    if "source" in meta and "sha256" not in meta:
        # The folders of this machine are nobody's business.
        meta["source"] = Path(meta["source"]).name
    make_dir(dst.parent)
    # A name of our own: whatever else lies there is the user's. A kill leaves a hidden folder.
    with tempfile.TemporaryDirectory(prefix=f".{dst.name[:50]}.", dir=dst.parent) as scratch:
        part = Path(scratch) / dst.name
        write_layout(part, folder, cfg, layout, weights, meta)
        check_again(dst, part, cfg, digest)
        os.replace(part, dst)
        fsync(dst.parent)
    return digest


def check_target(dst: Path, src: Path, folder: bool) -> None:
    """Refuse a name that is taken, or that says something else than what will be written."""
    if os.path.lexists(dst) or dst.name in ("", ".."):
        same = " and is the source" if dst.resolve() == src.resolve() else ""
        raise UserError(f"{dst} exists{same}", do="Give another name, or remove it first.")
    if not folder and dst.suffix != ".safetensors":
        raise UserError(
            f"{dst}: wanted a name that ends in .safetensors, for that is what will be written",
            do=f"Write {dst}.safetensors.",
        )


def write_layout(
    part: Path, folder: bool, cfg: Config, layout: str, weights: Container, meta: dict[str, Any]
) -> None:
    """Weights under a layout's names, one tensor at a time; a folder has its config.json too."""
    file = part
    if folder:
        part.mkdir()
        file = part / "diffusion_pytorch_model.safetensors"
        config = diffusers_config(cfg, meta.get("diffusers"))
        write_text(part / "config.json", json.dumps(config, indent=2) + "\n")
    natives, shapes = foreign_names(cfg, layout), foreign_shapes(cfg, layout)

    def get(name: str) -> Tensor:
        if name not in natives:
            return torch.empty(0)
        native = natives[name]
        return dict(to_foreign(cfg, layout, native, weights[native]))[name]

    header = {name: (weights.dtype(natives[name]), shape) for name, shape in shapes.items()}
    marks = markers(meta) if layout == "native" and cfg.context_dim else []
    header |= {name: (torch.float32, (0,)) for name in marks}
    spec = modelspec(cfg, layout, meta, part.stem, kept(weights.meta))
    stream_tensors(file, header, {**text_meta(meta), **spec}, get)


def markers(meta: dict[str, Any]) -> list[str]:
    """The empty tensors by which other programs see what a file's objective is."""
    zero_snr = noise_of(meta).get("zero_snr", False)
    signs = {"v_pred": target_of(meta) == "v", "ztsnr": zero_snr}
    return [name for name in MARKERS if signs[name]]


def kept(meta: Mapping[str, Any]) -> dict[str, str]:
    """What a header says of its file's origin, which another layout does not change. Digests are of
    the old bytes."""
    about = ("modelspec.", "license", "ss_v_parameterization", "ss_zero_terminal_snr")
    words = {k: v for k, v in meta.items() if isinstance(v, str) and k.startswith(about)}
    return {k: v for k, v in words.items() if not re.search(r"[0-9a-fA-F]{64}", v)}


def check_again(dst: Path, part: Path, cfg: Config, digest: str) -> None:
    """Read back what was written; its config.json is compared when it is opened."""
    again = open_unet(part)
    got = fingerprint(again.weights)
    if got != digest or again.cfg != cfg:
        raise UserError(
            f"{dst} was read back with other weights ({got[:12]}) than were written "
            f"({digest[:12]})",
            do="Is the disk sound?",
        )


def parameters(box: Container) -> int:
    return sum(torch.Size(e.shape).numel() for e in box.table.values())


# ---- inspect ------------------------------------------------------------------------------------


def inspect(path: str, *, table: str = "", zero_snr: bool = False, **known: Any) -> list[str]:
    """What a file is, line by line, and what would have to be added to sample from it."""
    known = {k: v for k, v in known.items() if v is not None}
    source, unsaid = open_guessing(find_checkpoint(path, known.get("ema")), **known)
    cfg, box, meta = source.cfg, source.weights, source.meta
    digest = fingerprint(box)
    if meta.get("fingerprint", digest) != digest:
        raise UserError(
            f"{path}: the weights do not match their own fingerprint; the file was altered or "
            "damaged",
            do="Copy it again, or use an older one.",
        )
    add_schedule(meta, table, zero_snr, path)
    meta, unsaid_too = as_usual(meta, table)
    source = source._replace(meta=meta)
    objective, said = shown_objective(meta), meta.get("said", [])
    said = [*said, *([f"nothing of its {unsaid_too}: as all of its family"] if unsaid_too else [])]
    if isinstance(meta.get("objective"), dict) and not said:
        said = ["objective and noise schedule by its own metadata"]
    unprobed = parameters(box) > PROBE_LIMIT and "probe" not in meta
    images = meta.get("images")
    dtypes = [dtype_name(entry.dtype) for entry in box.table.values()]
    flags = {**known, "table": table, "zero_snr": zero_snr}
    lines = {
        "file": f"{box.path} ({box.path.stat().st_size:,} bytes, {box.kind})",
        "network": source.taken,
        "layout": source.layout,
        "family": family(cfg) if isinstance(cfg, Config) else network_name(cfg),
        "also in it": ", ".join(f"{n:,} {part} tensors" for part, n in source.left_out.items()),
        "config": shown_config(cfg, unsaid),
        "parameters": f"{parameters(box):,} in {len(box)} tensors",
        "dtype": ", ".join(f"{name} × {dtypes.count(name)}" for name in sorted(set(dtypes))),
        "objective": objective or "not said",
        "betas": shown_betas(noise_of(meta).get("table") or ""),
        "it says": "; ".join(map(str, said)),
        "sampled": shown_shift(cfg),
        "probe": "none: above 1e9 parameters" if unprobed else "",
        "ema": meta.get("ema"),
        "images": f"{images:,}" if images else "",
        "source": meta.get("source"),
        "sha256": meta.get("sha256"),
        "fingerprint": digest,
        **how_to_draw(source, path, what_is_missing(source, unsaid, objective), flags),
    }
    return [f"{key:<12} {printable(str(value))}" for key, value in lines.items() if value]


def noise_of(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """What metadata says of the noise schedule: its table, its zero terminal SNR."""
    objective = meta.get("objective")
    return objective if isinstance(objective, dict) else meta.get("schedule", {})


def shown_objective(meta: Mapping[str, Any]) -> str | None:
    """The objective in a line, or in a word, if that is all that is known."""
    objective = meta.get("objective")
    if not isinstance(objective, dict):
        return objective
    shown = ("name", "target", "table", "zero_snr")
    words = {key: value for key, value in objective.items() if key in shown and value}
    return " ".join(f"{key}={shorter(str(value))}" for key, value in words.items())


def shown_shift(cfg: Any) -> str:
    """How the authors of a transformer that reads text sample from it."""
    if not getattr(cfg, "joint", 0):
        return ""
    return f"--shift {usual_shift(cfg, 128, 128, 28):.4g} for 1024 px in 28 steps, by its authors"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def what_is_missing(source: Source, unsaid: set[str], objective: str | None) -> list[str]:
    """What a user would have to add to sample from a file, with the flags."""
    cfg, meta = source.cfg, source.meta
    words = {
        "heads": ("heads", "--num-heads or --num-head-channels"),
        "order": ("attention order", "--attention-order"),
    }
    asked = [words[key] for key in ("heads", "order") if key in unsaid]
    missing = []
    if asked:
        names, flags = " and ".join(name for name, _ in asked), ", ".join(f for _, f in asked)
        missing.append(f"{names} ({flags})")
    if objective is None:
        missing.append("objective (--objective)")
        if "table" not in meta.get("schedule", {}):
            missing.append("noise schedule (--table) of eps, v or x0")
    table = meta.get("schedule", {}).get("table")
    if objective in ("edm", ANOTHER) or table == UNKNOWN:
        missing.append("code for what it says: no flag gives it")
    elif objective in ("eps", "v", "x0") and not table:
        missing.append("noise schedule (--table)")
    more, whole = cfg.in_channels - getattr(cfg, "out_channels", cfg.in_channels), meta["objective"]
    enlarges = isinstance(whole, dict) and whole.get("coupling") == "lowres"
    if more > 0 and not enlarges:
        what = {1: ": depth", 4: ": another image", 5: ": inpainting's mask and image"}
        missing.append(f"code for its {more} further input channels{what.get(more, '')}")
    latent = cfg.in_channels != 3 or meta.get("latent")
    if "vae" not in meta and latent and meta.get("family") not in VAES:
        missing.append("autoencoder (--vae)")
    if "resolution" not in meta and not usual_side(meta, objective or ""):
        missing.append("size of the images (--resolution)")
    return missing


def lies_elsewhere(source: Source, path: str) -> dict[str, str]:
    """{flag with a value: what it gives} of what belongs to a Stable Diffusion, but does not lie in
    or beside its file."""
    meta, found = source.meta, {}
    family, context = meta.get("family"), getattr(source.cfg, "context_dim", 0)
    if family in VAES and "vae" not in meta and not meta.get("latent"):
        found[f"--vae {VAES[family]}"] = "autoencoder (--vae)"
    widths = [width for width, _ in encoders_of(source, path)]
    is_told = "text" in meta.get("init", {}) or is_repository(path)
    if is_sd3(source.cfg):
        context = CLIPS  # of which the rest of its width is room for T5's
    elif context and not isinstance(source.cfg, UNetConfig):
        found["--context FILE"] = "what its text encoders say (--context)"
        return found
    if isinstance(source.cfg, ByteUNetConfig) or sum(widths) == context or is_told:
        return found
    found[f"--text {encoder_files(context) or 'FILE'}"] = (
        f"text encoders (--text): {shown_encoders(context)}"
    )
    return found


def encoders_of(source: Source, path: str) -> list[tuple[int, str]]:
    """(width, place) of the text encoders that lie with a network which is told by them."""
    reads = isinstance(source.cfg, UNetConfig) and source.cfg.context_dim or is_sd3(source.cfg)
    return encoders_with(source.weights.path) if reads and not is_repository(path) else []


def is_repository(path: str) -> bool:
    """A whole one on the Hub: of its encoders nothing is known until they are fetched."""
    match = HUB.fullmatch(str(path))
    return bool(match and not match[2])


def told_by(source: Source, path: str) -> str:
    """The text encoders that lie with a network, or by which it was trained."""
    told = source.meta.get("init", {}).get("text")
    if isinstance(source.cfg, ByteUNetConfig):
        return "the bytes of a text, by an encoder that was trained with it"
    if told:
        return f"the text encoders of {told.get('source', 'an unknown place')}, by its training"
    found = encoders_of(source, path)
    return ", ".join(f"{WIDTHS.get(width, f'{width} wide')} ({place})" for width, place in found)


def flags_as_typed(flags: Mapping[str, Any]) -> list[str]:
    """What the user said of a file, for another command."""
    words = []
    for name, value in flags.items():
        if value and name != "ema":
            words.append(dashed(name) if value is True else f"{dashed(name)} {value}")
    return words


def how_to_draw(
    source: Source, path: str, missing: list[str], flags: Mapping[str, Any]
) -> dict[str, str]:
    """The lines of inspect() about drawing: by what a network is told, what is missing, and where
    flags can give that, the command."""
    elsewhere = lies_elsewhere(source, path)
    words = ["python samplers.py --ckpt", shlex.quote(str(path)), *flags_as_typed(flags)]
    words += elsewhere
    if isinstance(source.cfg, ByteUNetConfig):
        words.append('--prompt "…" --cfg 4')
    elif isinstance(source.cfg, LCMUNetConfig):
        words.append('--prompt "a photo of a cat" --method lcm --cfg 8')
    elif getattr(source.cfg, "context_dim", 0):
        words.append('--prompt "a photo of a cat" --cfg 7')
    wanted = "; ".join([*missing, *elsewhere.values()])
    return {
        "told by": told_by(source, path),
        "missing": wanted or "nothing, samplers.py can draw from it",
        "draw": "" if missing or "part" in flags else " ".join(words),
    }


def shown_config(cfg: Any, unsaid: set[str]) -> str:
    """The fields of a config that its file says."""
    unknown = {"dropout"}
    if "heads" in unsaid:
        unknown |= {"num_heads", "num_head_channels"}
    if "order" in unsaid or getattr(cfg, "context_dim", 0):
        unknown.add("attention_order")
    words = []
    for name, value in written(cfg).items():
        if isinstance(value, tuple):
            value = ",".join(f"{v:g}" for v in value)
        if name not in unknown:
            words.append(f"{name}={value}")
    return " ".join(words)


# ---- verify -------------------------------------------------------------------------------------


def open_both(a: str, b: str, known: dict[str, Any]) -> list[Source]:
    """Two networks to compare. What one file cannot say is taken from the other, whichever comes
    first."""
    known, part = dict(known), known.get("part")
    known.pop("part", None)
    files = [find_checkpoint(name, known.get("ema")) for name in (a, b)]
    # Both files, or one of them, may hold several networks.
    parts = [part if part and has_part(file, part) else None for file in files]
    if part and parts == [None, None]:
        parts[0] = part  # its error says what there is
    found, errors = [], []
    for file, part in zip(files, parts):
        try:
            found.append(open_unet(file, part=part, **known))
        except UserError as error:
            found.append(None)
            errors.append(error)
    if len(errors) == 2:
        raise errors[0]
    if errors:
        if not isinstance(errors[0], Unsaid):
            raise errors[0]
        other = next(source for source in found if source)
        heads = heads_of(other)
        found = [
            src or open_unet(file, part=part, **{**heads, **known})
            for file, src, part in zip(files, found, parts)
        ]
    return found


def heads_of(source: Source) -> dict[str, Any]:
    """The heads of an open file, and their order where it has one."""
    cfg = source.cfg
    if cfg.num_head_channels:
        heads = {"num_head_channels": cfg.num_head_channels}
    else:
        heads = {"num_heads": cfg.num_heads}
    # qkv rows are in no order in files of diffusers.
    if source.layout != "diffusers" or "unet" in source.meta:
        heads["attention_order"] = cfg.attention_order
    return heads


def verify(a: str, b: str, **known: Any) -> tuple[bool, list[str]]:
    """Whether two files hold the same network, and if not, how far apart each block is."""
    one, two = open_both(a, b, known)
    differs = differences(one.cfg, two.cfg)
    shapes = [{k: e.shape for k, e in source.weights.table.items()} for source in (one, two)]
    if shapes[0] != shapes[1]:
        return False, [f"another architecture: {'; '.join(differs)}"]
    sums: dict[str, list[float]] = {}  # block: [squared difference, squared norm]
    bitwise = True
    for name in native_shapes(one.cfg):
        x = in_new_order(one.cfg, name, one.weights[name])
        y = in_new_order(two.cfg, name, two.weights[name])
        same = same_bits(x, y)
        bitwise = bitwise and same
        block = sums.setdefault(block_of(name), [0.0, 0.0])
        for u, v in chunks(x, y):
            block[0] += 0.0 if same else float((u.double() - v.double()).square().sum())
            block[1] += float(u.float().square().sum())
    if bitwise and not differs:
        layouts = f"{one.layout} / {two.layout}"
        return True, [f"the same weights, bit for bit ({len(one.weights)} tensors, {layouts})"]
    lines = [f"another config: {'; '.join(differs)}"] if differs else []
    dtypes = [" + ".join(dtypes_in(source.weights)) for source in (one, two)]
    if dtypes[0] != dtypes[1]:
        lines.append(f"another dtype: {' / '.join(dtypes)}")
    rows = {}
    for block, (difference, norm) in sums.items():
        if difference != 0:  # NaN differs too
            rows[block] = (difference / norm) ** 0.5 if norm else float(difference > 0)
    if not rows:
        return False, [*lines, "the values are equal"]
    lines.append(f"{len(rows)} of {len(sums)} blocks differ; relative L2:")
    return False, lines + [f"  {block:<18} {value:.3e}" for block, value in rows.items()]


def same_bits(x: Tensor, y: Tensor) -> bool:
    """The same values, NaN too."""
    if x.dtype != y.dtype:
        return False
    return torch.equal(torch.from_numpy(raw_bytes(x)), torch.from_numpy(raw_bytes(y)))


def chunks(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Two tensors piece by piece: fp64 of a whole one would be large."""
    return zip(x.flatten().split(2**20), y.flatten().split(2**20))


def block_of(name: str) -> str:
    """The block that a tensor is part of: input_blocks.3, middle_block, out."""
    lists = ("input_blocks", "output_blocks", "blocks", "joint_blocks", "single_blocks")
    depth = 2 if name.split(".")[0] in lists else 1
    return ".".join(name.split(".")[:depth])


def dtypes_in(box: Container) -> list[str]:
    return sorted({dtype_name(entry.dtype) for entry in box.table.values()})


def in_new_order(cfg: Any, name: str, tensor: Tensor) -> Tensor:
    """ADM's qkv in one order of its rows, whichever the file has: the same network may be written
    in both."""
    if not isinstance(cfg, UNetConfig) or ".qkv." not in name or cfg.attention_order == "new":
        return tensor
    C = tensor.shape[0] // 3
    return reorder_attention(tensor, C // cfg.head_channels(C), "new")
