"""Looking into checkpoints: what a file is and what it lacks, and whether two hold the same network."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

import ckpt.layouts as layouts
from ckpt.unets import Source, differences, find_checkpoint, fingerprint, open_unet, parameters, with_table
from harness.cli import UserError
from harness.files import raw_bytes
from model import UNetConfig
from ckpt.probe import PROBE_LIMIT


def inspect(path: str, *, table: str = "", **known: Any) -> list[str]:
    """What a file is, line by line, and what would have to be added to sample from it."""
    file, known, untold = find_checkpoint(path), {k: v for k, v in known.items() if v is not None}, []
    try:
        source = open_unet(file, **known)
    except UserError as error:                                                  # all but what no tensor shows may still be told
        heads_told = known.keys() & {"num_heads", "num_head_channels"}
        guesses = {"attention_order": "legacy"} | ({} if heads_told else {"num_heads": 1})
        try:
            source = open_unet(file, **{**guesses, **known})
        except UserError:
            raise error from None
        untold = [("heads", "--num-heads or --num-head-channels")] * (not heads_told)
        untold += [("attention order", "--attention-order")] * ("attention_order" not in known and not source.cfg.context_dim)
    cfg, box, meta = source.cfg, source.weights, source.meta
    mark, dtypes = fingerprint(box), [str(entry.dtype).removeprefix("torch.") for entry in box.table.values()]
    if meta.get("fingerprint", mark) != mark:
        raise UserError(f"{path}: the weights do not match their own fingerprint; the file was altered or damaged.")
    missing = [f"{' and '.join(what for what, _ in untold)} ({', '.join(flag for _, flag in untold)})"] if untold else []
    if table:
        meta["objective"] = with_table(meta, table, path)
    objective = meta["objective"] if isinstance(meta.get("objective"), (str, type(None))) else \
        " ".join(f"{k}={v}" for k, v in meta["objective"].items() if k in ("name", "target", "table"))
    unknown = {"dropout", *(("num_heads", "num_head_channels") if any(what == "heads" for what, _ in untold) else ()),
               *(("attention_order",) if cfg.context_dim or any(what == "attention order" for what, _ in untold) else ())}
    shown = " ".join(f"{f.name}={','.join(f'{v:g}' for v in value) if isinstance(value := getattr(cfg, f.name), tuple) else value}"
                     for f in fields(cfg) if f.name not in unknown)
    if objective is None:
        missing.append("objective (--objective)")
    if objective in ("eps", "v", "x0", None):
        missing.append("noise schedule (--table)" + " of eps, v or x0" * (objective is None))
    if "vae" not in meta and cfg.in_channels != 3:
        missing.append("autoencoder (--vae)")
    if cfg.context_dim:
        missing.append("text encoders (not part of this code yet)")
    if "resolution" not in meta:
        missing.append("size of the images (--resolution)")
    lines = {"file": f"{box.path} ({box.path.stat().st_size:,} bytes, {box.kind})", "layout": source.layout, "family": layouts.family(cfg),
             "also in it": ", ".join(f"{n:,} {part} tensors" for part, n in source.left_out.items()), "config": shown,
             "parameters": f"{parameters(box):,} in {len(box)} tensors",
             "dtype": ", ".join(f"{name} × {dtypes.count(name)}" for name in sorted(set(dtypes))), "objective": objective or "not said",
             "probe": "none: above 1e9 parameters" * (parameters(box) > PROBE_LIMIT and "probe" not in meta),
             "ema": meta.get("ema"), "images": meta.get("images") and f"{meta['images']:,}", "source": meta.get("source"),
             "sha256": meta.get("sha256"), "fingerprint": mark, "missing": "; ".join(missing) or "nothing, samplers.py can draw from it"}
    return [f"{key:<12} {value}" for key, value in lines.items() if value]


def open_both(a: str, b: str, known: dict[str, Any]) -> list[Source]:
    """Two networks to compare. What one file cannot say is taken from the other, whichever comes first."""
    files, found, errors = [find_checkpoint(a), find_checkpoint(b)], [], []
    for file in files:
        try:
            found.append(open_unet(file, **known))
        except UserError as error:
            found.append(None)
            errors.append(error)
    if len(errors) == 2:
        raise errors[0]
    if errors:
        told = next(source for source in found if source)
        heads = {"num_head_channels": told.cfg.num_head_channels} if told.cfg.num_head_channels else {"num_heads": told.cfg.num_heads}
        if told.layout != "diffusers" or "unet" in told.meta:                   # qkv rows are in no order in files of diffusers
            heads["attention_order"] = told.cfg.attention_order
        found = [source or open_unet(file, **{**heads, **known}) for file, source in zip(files, found)]
    return found


def verify(a: str, b: str, **known: Any) -> tuple[bool, list[str]]:
    """Whether two files hold the same network, and if not, how far apart each block is."""
    one, two = open_both(a, b, known)
    differs = differences(one.cfg, two.cfg)
    if {k: e.shape for k, e in one.weights.table.items()} != {k: e.shape for k, e in two.weights.table.items()}:
        return False, [f"another architecture: {'; '.join(differs)}"]
    sums: dict[str, list[float]] = {}
    bitwise = True
    for name in one.weights:
        x, y = (in_new_order(source.cfg, name, source.weights[name]) for source in (one, two))
        same = x.dtype == y.dtype and torch.equal(*(torch.from_numpy(raw_bytes(t)) for t in (x, y)))      # NaN too
        bitwise = bitwise and same
        block = sums.setdefault(".".join(name.split(".")[:2 if name.startswith(("input_blocks", "output_blocks")) else 1]), [0.0, 0.0])
        for u, v in zip(x.flatten().split(2 ** 20), y.flatten().split(2 ** 20)):             # fp64 of a whole tensor would be large
            block[0] += 0.0 if same else float((u.double() - v.double()).square().sum())
            block[1] += float(u.float().square().sum())
    if bitwise and not differs:
        return True, [f"the same weights, bit for bit ({len(one.weights)} tensors, {one.layout} / {two.layout})"]
    lines = [f"another config: {'; '.join(differs)}"] if differs else []
    dtypes = [" + ".join(sorted({str(e.dtype).removeprefix("torch.") for e in s.weights.table.values()})) for s in (one, two)]
    lines += [f"another dtype: {' / '.join(dtypes)}"] if len(set(dtypes)) > 1 else []
    rows = {block: (d / n) ** 0.5 if n else float(d > 0) for block, (d, n) in sums.items() if d != 0}
    lines += [f"{len(rows)} of {len(sums)} blocks differ; relative L2:" if rows else "the values are equal"]
    return False, lines + [f"  {block:<18} {value:.3e}" for block, value in rows.items()]


def in_new_order(cfg: UNetConfig, name: str, tensor: Tensor) -> Tensor:
    """ADM's qkv in one order of its rows, whichever the file has: the same network may be written in both."""
    if ".qkv." not in name or cfg.attention_order == "new":
        return tensor
    C = tensor.shape[0] // 3
    return layouts.reorder_attention(tensor, C // cfg.head_channels(C), "new")
