"""Writing a latent cache (latents.py says what is in it):  python vae.py encode --data DIR --vae flux2 --resolution 256 --out CACHE
    torchrun --nproc_per_node=8 vae.py encode …                                  # ranks share the work; the same command again goes on
    python vae.py encode --out CACHE --verify                                    # every byte against its checksum
"""

import contextlib
import json
import math
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from harness.cli import UserError, parse
from data.images import to_float
from harness.files import make_dir, read_meta, write_tensors, write_text
from ckpt.containers import open_weights
from data.cache import (CHECKED, PRECISION, VERSION, file_digest, from_raw, is_cache, raw_latents, raw_mark, read_sealed, save_shard, sealed,
                     shard_path, shard_record, sound, verify)
from harness.ranks import PATIENCE, Ranks, join_ranks
from harness.run import lock
from data.sources import Source, open_source
from vae import AnyVAE, enough, fit_pca, load_vae, pixel, save_vae, vae_from_meta

SHARD = 64 * 2 ** 20                         # bytes of latents a shard
AHEAD = 4                                    # batches being decoded while one is encoded


@dataclass(frozen=True)
class Encode:
    out: str                           # folder of the cache
    data: str = "toyfaces"             # toyfaces[:count] | robohash[:count] | DIR | FILE.parquet | hf:org/name, with tags
    vae: str = "pca"                   # as for train.py; with --verify, where its file lies now
    resolution: int = 64               # pixels; the centre of each image
    flip: bool = False                 # also the mirrored images, for train.py --flip
    dtype: Literal["fp16", "bf16"] = "fp16"   # of the latents on disk
    batch: int = 16                    # images at a time; part of the plan, as sums of another size round differently
    device: str = "auto"
    verify: bool = False               # only check the cache at --out


def encode(cfg: Encode, ranks: Ranks) -> None:
    """Encode a whole source; what is there already, of the same plan, stays."""
    out = Path(cfg.out)
    named = None if cfg.vae == "pca" else load_vae(cfg.vae)
    (named or pixel(8)).latent_shape(cfg.resolution)                            # before anything is read
    source = open_source(cfg.data, cfg.resolution)
    held: list[Any] = []                                                        # the lock, until this process ends
    old = ranks.broadcast(lambda: begun(out, held))
    data, threads = ranks.broadcast(lambda: [old.get("data", cfg.data), old.get("threads", torch.get_num_threads())])
    if threads != torch.get_num_threads() and ranks.rank == 0:
        print(f"encoding with {threads} threads, not {torch.get_num_threads()}" + f", as {out} was begun" * bool(old), flush=True)
    torch.set_num_threads(threads)
    vae = (named or vae_from_meta(ranks.broadcast(lambda: fitted(out, source, old).meta()))).to(ranks.device)
    shape = list(raw_latents(vae, torch.zeros(1, 3, cfg.resolution, cfg.resolution, device=ranks.device)).shape[1:])
    per = max(SHARD // (math.prod(shape) * (1 + cfg.flip) * 2), 1)
    plan = {"version": VERSION, "data": data, "resolution": cfg.resolution, "crop": "center", "resize": "lanczos", "flip": cfg.flip,
            "dtype": cfg.dtype, "batch": cfg.batch, "images": len(source.names), "source": source.hash, "vae": raw_mark(vae),
            "shape": shape, "shard": per, "threads": threads, "torch": str(torch.__version__), "device": device_name(ranks.device)}
    agreed = ranks.broadcast(lambda: begin(out, old, plan, vae))
    if differs := differences(agreed, plan):
        raise UserError(f"rank {ranks.rank} is not like rank 0: {differs}.  Ranks need the same files, torch and devices.")
    ranks.barrier()                                                             # nobody writes before the plan is agreed on
    write_shards(out, plan, source, vae, ranks)
    ranks.barrier()
    ranks.broadcast(lambda: finish(out, plan, source))


def device_name(device: torch.device) -> str:
    """What computes, as far as it changes the last bits."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def begun(out: Path, held: list[Any]) -> dict[str, Any]:
    """Lock the folder, and read the plan that is there, if any."""
    make_dir(out)
    held.append(lock(out))
    if (out / "plan.json").exists():
        with contextlib.suppress(UserError):
            return read_sealed(out / "plan.json")
        with contextlib.suppress(UserError):
            return read_sealed(out / "manifest.json")["plan"]                   # which has it too
        return read_sealed(out / "plan.json", "Remove the cache and encode it again.")
    if [p for p in out.iterdir() if not p.name.startswith(".")]:                # what a kill leaves behind begins with a dot
        raise UserError(f"{out} is there and is not a cache.  Give another --out.")
    return {}


def fitted(out: Path, source: Source, old: dict[str, Any]) -> AnyVAE:
    """pca, fitted once; then the one that is in the cache, if it is still that of the plan."""
    if old and (out / "vae.safetensors").exists():
        with contextlib.suppress(UserError):                                    # damaged: fitted again
            vae = load_vae(out / "vae.safetensors")
            if vae.name == "pca" and raw_mark(vae) == old["vae"]:
                return vae
    return fit_pca(to_float(stacked(map(source.pixel, range(min(len(source.names), enough(source.resolution)))))))


def begin(out: Path, old: dict[str, Any], plan: dict[str, Any], vae: AnyVAE) -> dict[str, Any]:
    """Compare the plan with the one that is there, and write it, and the autoencoder as it was found this time."""
    if old and (differs := differences(old, plan)):
        raise UserError(f"{out} was begun with another plan: {differs}.  Give another --out, or remove it.")
    write_text(out / "plan.json", sealed(plan))
    save_vae(out / "vae.safetensors", vae, weights=False)
    return plan


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """"resolution 64, now 128"; hashes are named, not shown."""
    named = {"source": "the images or their tags", "vae": "the autoencoder"}
    return ", ".join(f"{named[k]} changed" if k in named else f"{k} {old.get(k)}, now {new.get(k)}"
                     for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k))


def stacked(pixels: Iterable[np.ndarray]) -> Tensor:
    """n images (H, W, 3) -> uint8 (n, 3, H, W)."""
    return torch.from_numpy(np.stack(list(pixels))).permute(0, 3, 1, 2).contiguous()


def decoded(source: Source, groups: Iterable[range]) -> Iterator[Tensor]:
    """uint8 (n, 3, H, W) of each group of images; threads decode the next ones while those before are encoded."""
    waiting: deque[Iterator[np.ndarray]] = deque()
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        for group in groups:
            waiting.append(pool.map(source.pixel, group))
            if len(waiting) > AHEAD:
                yield stacked(waiting.popleft())
        while waiting:
            yield stacked(waiting.popleft())


def chunks(plan: dict[str, Any], k: int) -> list[range]:
    """The images of shard k, a batch at a time."""
    last = min((k + 1) * plan["shard"], plan["images"])
    return [range(i, min(i + plan["batch"], last)) for i in range(k * plan["shard"], last, plan["batch"])]


def write_shards(out: Path, plan: dict[str, Any], source: Source, vae: AnyVAE, ranks: Ranks) -> None:
    """This rank's share, every world-th shard, but for those that are there."""
    mine, records = range(ranks.rank, -(-plan["images"] // plan["shard"]), ranks.world), {}
    with contextlib.suppress(UserError):                                        # not finished yet, or damaged: shards speak for themselves
        records = dict(enumerate(read_sealed(out / "manifest.json")["shards"]))
    size = lambda shards: sum(len(group) for k in shards for group in chunks(plan, k))
    with tqdm(total=size(mine), unit="img", desc=f"encoding to {out}", disable=None if ranks.rank == 0 else True) as bar:
        absent = [k for k in mine if not sound(out, plan, k, records.get(k))]
        bar.update(bar.total - size(absent))

        def pixels() -> Iterator[Tensor]:
            for batch in decoded(source, (group for k in absent for group in chunks(plan, k))):
                bar.update(len(batch))
                yield batch
        batches = pixels()
        for k in absent:
            write_shard(out, plan, k, source.names, batches, vae, ranks.device)


@torch.no_grad()
def write_shard(out: Path, plan: dict[str, Any], k: int, names: Sequence[str], pixels: Iterator[Tensor], vae: AnyVAE, device: torch.device) -> None:
    """Encode shard k, whose images come next in pixels."""
    dtype, parts = PRECISION[plan["dtype"]], []
    sums: Tensor | float = 0.0                                                  # of the model-space latents: number, values, squares by channel
    for chunk, batch in zip(chunks(plan, k), pixels):
        images = to_float(batch.to(device))
        both = torch.cat([images, images.flip(-1)]) if plan["flip"] else images     # a mirrored latent is not the latent of the mirrored image
        raw = raw_latents(vae, both)
        kept = raw.to(dtype)
        if not kept.isfinite().all():
            bad = names[chunk[int((~kept.isfinite()).flatten(1).any(1).nonzero()[0]) % len(chunk)]]
            raise UserError(f"the latents of {bad} do not fit {plan['dtype']} (largest {float(raw.abs().max()):.3g}).  Use --dtype bf16.")
        z = from_raw(vae, kept).double().cpu()
        z = z if z.shape[1] == kept.shape[1] else F.pixel_shuffle(z, 2)         # the same numbers whichever layout flux2 was asked for
        sums = sums + torch.stack([z.new_full((z.shape[1],), z.numel() / z.shape[1]), z.sum((0, 2, 3)), z.square().sum((0, 2, 3))])
        parts.append(kept.cpu().unflatten(0, (-1, len(chunk))).transpose(0, 1))
    save_shard(out, plan, k, torch.cat(parts).contiguous(), sums)


def finish(out: Path, plan: dict[str, Any], source: Source) -> None:
    """The index and, from the shards' headers, the manifest."""
    names = [name.encode("utf-8", "surrogateescape") for name in source.names]
    first = np.stack([source.pixel(i) for i in range(min(CHECKED, len(names)))])
    tags = source.table
    index = {"names": torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8), "first": torch.from_numpy(first),
             "name_ends": torch.tensor([len(name) for name in names]).cumsum(0), "held": torch.from_numpy(source.held.astype(np.int64)),
             "tag_starts": torch.from_numpy(tags.starts), "tag_ids": torch.from_numpy(tags.ids)}
    write_tensors(out / "index.safetensors", index, {"kind": "latent cache", "vocabulary": tags.vocabulary, "notes": source.notes,
                                                     "unreadable": source.unreadable})
    numbers = range(-(-plan["images"] // plan["shard"]))
    total = torch.tensor([read_meta(open_weights(shard_path(out, k)))["sums"] for k in numbers], dtype=torch.float64).sum(0)
    mean = total[1] / total[0]
    std = (total[2] / total[0] - mean.square()).clamp(min=0).sqrt()
    overall = float(total[1].sum() / total[0].sum())
    spread = float((total[2].sum() / total[0].sum() - overall ** 2).clamp(min=0).sqrt())
    manifest = {"plan": plan, "mean": overall, "std": spread, "channel_mean": mean.tolist(), "channel_std": std.tolist(),
                "index": file_digest(out / "index.safetensors"), "vae": file_digest(out / "vae.safetensors"),
                "shards": [shard_record(out, k) for k in numbers]}
    write_text(out / "manifest.json", sealed(manifest))


def main() -> None:
    """`python vae.py encode …`"""
    if sys.argv[1:2] != ["encode"] and not {"--help", "-h"} & set(sys.argv):
        raise UserError(f"command {' '.join(sys.argv[1:2])!r}: wanted encode.  See python vae.py --help.")
    cfg, dry_run = parse(Encode, __doc__, sys.argv[1 + (sys.argv[1:2] == ["encode"]):])
    if cfg.batch < 1:
        raise UserError(f"--batch {cfg.batch}: wanted at least 1.")
    if dry_run:
        print(cfg)
    elif cfg.verify:
        wrong = verify(Path(cfg.out), cfg.vae) if is_cache(cfg.out) else [f"{cfg.out} is not a cache."]
        print("\n".join([*wrong, "Repeat the command that encodes the cache: what is damaged is written again."] if wrong else
                        [f"{cfg.out}: latents, names and tags are as they were written."]))
        sys.exit(bool(wrong))
    else:
        ranks = join_ranks(cfg, "gloo", PATIENCE)                             # a GPU that waits need not spin
        encode(cfg, ranks)
        ranks.leave()
        if ranks.rank == 0:
            manifest = json.loads((Path(cfg.out) / "manifest.json").read_text())
            print(f"{manifest['plan']['images']:,} images in {len(manifest['shards'])} shards, mean {manifest['mean']:.3f}, std {manifest['std']:.3f}")
            print(cfg.out)
