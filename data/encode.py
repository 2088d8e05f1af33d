"""Writing a latent cache; the same command again goes on with it. cache.py says what is in it.

python -m data.encode --data DIR --vae flux2 --resolution 256 --out CACHE
torchrun --nproc_per_node=8 -m data.encode …     # ranks share the work
python -m data.encode --out CACHE --verify       # every byte against its checksum
"""

import contextlib
import math
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # also where the file itself is run
    sys.path[0] = str(Path(__file__).parent.parent)
    import harness.interrupt  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ckpt.containers import open_weights
from data.cache import (
    CHECKED,
    PRECISION,
    VERSION,
    identity,
    is_cache,
    read_manifest,
    read_plan,
    retagged,
    save_shard,
    sealed,
    shard_meta,
    shard_path,
    shard_record,
    vae_path,
    verify,
    verify_shard,
)
from data.dataset import BucketFlags, bucket_line, pca_images, unreadable_line
from data.images import to_float
from data.reuse import Reuse, clear_update, find_reuse, take_over, update_folder, write_contents
from data.shards import Layout, buckets_of
from data.sources import Source, open_source
from data.stamps import take_stamps, write_stamps
from harness.cli import UserError, cli, flag, flag_like, parse
from harness.files import digest, make_dir, read_meta, write_tensors, write_text
from harness.memory import check_batch_memory
from harness.ranks import PATIENCE, Ranks, join_ranks
from harness.run import lock
from vae import AnyVAE, choose, fit_pca, load_vae, pca_samples, pixel, save_vae, vae_from_meta

SHARD = 64 * 2**20  # bytes of latents a shard
AHEAD = 4  # batches being decoded while one is encoded


@dataclass(frozen=True)
class Encode:
    out: str = flag(help="folder of the cache", writes="folder")
    data: str = flag(
        "toyfaces",
        "toyfaces[:count] | robohash[:count] | DIR | FILE.parquet | hf:org/name, with tags",
    )
    vae: str = flag("pca", "as for train.py; with --verify, where its file lies now")
    resolution: int = flag(64, "pixels; the centre of each image", low=1, high=8192)
    flip: bool = flag(False, "also the mirrored images, for train.py --flip")
    dtype: Literal["fp16", "bf16"] = flag("fp16", "fp16 | bf16: of the latents on disk")
    # Part of the plan, as sums of another size round differently.
    batch: int = flag(16, "images at a time; part of the plan", low=1, high=65_536)
    device: str = flag("auto", "auto | cpu | cuda")
    verify: bool = flag(False, "only check the cache at --out")
    buckets: bool = flag_like(BucketFlags, "buckets", False)
    area: str = flag_like(BucketFlags, "area", BucketFlags.area)
    step: int = flag_like(BucketFlags, "step", BucketFlags.step)
    small: Literal["upscale", "skip"] = flag_like(BucketFlags, "small", BucketFlags.small)
    bucket_sizes = BucketFlags.bucket_sizes
    squared = BucketFlags.squared


def encode(cfg: Encode, ranks: Ranks) -> None:
    """Encode a whole source; what is there already, of the same plan, stays."""
    with contextlib.ExitStack() as held:  # the folder's lock, on rank 0
        write_cache(cfg, ranks, held)


def write_cache(cfg: Encode, ranks: Ranks, held: contextlib.ExitStack) -> None:
    """Agree on the autoencoder and the plan, write this rank's shards, then what is about all."""
    out, cfg = Path(cfg.out), cfg.squared()
    buckets = cfg.bucket_sizes()
    vae = choose(cfg.vae, fit=lambda: pixel(8))  # pca has the same factor and is not fitted yet
    if buckets:
        buckets.check_step(vae.unit, f"--vae {cfg.vae}")
    shape = vae.latent_shape(cfg.resolution)  # before anything is read
    stamps = take_stamps(cfg.data) if ranks.rank == 0 else None
    source = open_source(cfg.data, cfg.resolution, "center", buckets)
    captions = source.captions() if source.captions else []
    batch = min(cfg.batch, len(source.names))
    check_batch_memory("--batch", batch, cfg.resolution, shape, ranks.device)
    old = ranks.broadcast(lambda: begun(out, held))
    threads = set_threads(old, out, ranks)
    if cfg.vae in ("", "pca"):
        vae = vae_from_meta(ranks.broadcast(lambda: fitted(out, source, old).meta()))
    vae = vae.to(ranks.device)
    plan = make_plan(cfg, spelled(old, cfg.data), threads, source, vae, ranks.device)
    if "written_for" in old and old["source"] == source.hash:
        plan["written_for"] = old["written_for"]
    reuse = ranks.broadcast(lambda: reusable(out, old, plan, source))
    moves = reuse is not None and not reuse.in_place
    if reuse and reuse.in_place:  # shards stay
        plan = retagged(old, plan)
    agreed = ranks.broadcast(lambda: plan if moves else begin(out, old, plan, vae))
    if differs := differences(agreed, plan):
        raise UserError(
            f"rank {ranks.rank} is not like rank 0: {differs}",
            do="Ranks need the same files, torch and devices.",
        )
    ranks.barrier()  # nobody writes before the plan is agreed on
    write_shards(update_folder(out) if moves else out, plan, source, vae, ranks, reuse)
    ranks.barrier()
    if moves:
        ranks.broadcast(lambda: take_over(out, plan, shard_count(plan)))
    ranks.broadcast(lambda: finish(out, plan, source, captions))
    ranks.broadcast(lambda: write_stamps(out, stamps))


def reusable(out: Path, old: dict[str, Any], plan: dict[str, Any], source: Source) -> Reuse | None:
    """What there is already of a source that changed; said, and the place for the rest made."""
    if old == plan:
        clear_update(out, plan, shard_count(plan))
        return None
    reuse = find_reuse(out, old, plan, source)
    if reuse and not reuse.in_place:
        make_dir(update_folder(out))
    if reuse and reuse.cache.manifest.get("source") != source.hash:
        print(f"{out}: the images or their tags changed; {reuse}", flush=True)
    return reuse


def begun(out: Path, held: contextlib.ExitStack) -> dict[str, Any]:
    """Lock the folder, and read the plan that is there, if any."""
    make_dir(out)
    held.enter_context(lock(out))
    if (out / "plan.json").exists():
        with contextlib.suppress(UserError):
            return read_plan(out)
        with contextlib.suppress(UserError):
            return read_manifest(out)["plan"]  # which has it too
        return read_plan(out, "Remove the cache and encode it again.")
    # What a kill leaves behind begins with a dot.
    if any(not path.name.startswith(".") for path in out.iterdir()):
        raise UserError(f"{out} is there and is not a cache", do="Give another --out.")
    return {}


def set_threads(old: dict[str, Any], out: Path, ranks: Ranks) -> int:
    """As many threads in all ranks as the plan says, or as rank 0 has: their number changes the
    last bits."""
    threads = ranks.broadcast(lambda: old.get("threads", torch.get_num_threads()))
    if threads != torch.get_num_threads() and ranks.rank == 0:
        why = f", as {out} was begun" if old else ""
        print(f"encoding with {threads} threads, not {torch.get_num_threads()}{why}", flush=True)
    torch.set_num_threads(threads)
    return threads


def fitted(out: Path, source: Source, old: dict[str, Any]) -> AnyVAE:
    """pca, fitted once; then the one that is in the cache, if it is still that of the plan."""
    if old and vae_path(out).exists():
        with contextlib.suppress(UserError):  # damaged: fitted again
            vae = load_vae(vae_path(out))
            if vae.name == "pca" and vae.raw_fingerprint == old["vae"]:
                return vae
    n = min(len(source.names), pca_samples(source.resolution))

    def image(i: int) -> Tensor:
        return stacked([source.pixel(i)])[0]

    return fit_pca(pca_images(image, n, source.frames is not None))


# ---- the plan -----------------------------------------------------------------------------------


def make_plan(
    cfg: Encode, data: str, threads: int, source: Source, vae: AnyVAE, device: torch.device
) -> dict[str, Any]:
    """All that changes a bit of what is written; and how --data was spelled."""
    image = torch.zeros(1, 3, cfg.resolution, cfg.resolution, device=device)
    shape = list(vae.raw(image).shape[1:])
    size = math.prod(shape) * (1 + cfg.flip) * 2  # bytes an image
    plan = {
        "version": VERSION,
        "data": data,
        "resolution": cfg.resolution,
        "crop": "center",
        "resize": "lanczos",
        "flip": cfg.flip,
        "dtype": cfg.dtype,
        "batch": cfg.batch,
        "images": len(source.names),
        "source": source.hash,
        "vae": vae.raw_fingerprint,
        "shape": shape,
        "shard": max(SHARD // size, 1),
        "threads": threads,
        "torch": str(torch.__version__),
        "device": device_name(device),
    }
    if source.frames:
        plan["buckets"] = {"area": cfg.area, "step": cfg.step, "small": cfg.small}
        plan["counts"] = source.frames.counts()
    return plan


def spelled(old: dict[str, Any], data: str) -> str:
    """How --data was spelled at first, if it still leads to the same place."""
    first = old.get("data", data)
    moved = Path(data).exists() and not (Path(first).exists() and os.path.samefile(first, data))
    return data if moved else first


def device_name(device: torch.device) -> str:
    """What computes, as far as it changes the last bits."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def begin(out: Path, old: dict[str, Any], plan: dict[str, Any], vae: AnyVAE) -> dict[str, Any]:
    """Compare the plan with the one that is there, and write it, and the autoencoder as it was
    found this time."""
    if old and identity(old) != identity(plan):
        raise UserError(
            f"{out} was begun with another plan: {differences(old, plan)}",
            do="Give another --out, or remove it.",
        )
    write_text(out / "plan.json", sealed(plan))
    save_vae(vae_path(out), vae, weights=False)
    return plan


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs, as in "resolution 64, now 128"; hashes are named, not shown."""
    hashes = {"source": "the images or their tags", "vae": "the autoencoder"}
    found = []
    for key in sorted((old.keys() | new.keys()) - {"written_for"}):
        if old.get(key) == new.get(key):
            continue
        if key in hashes:
            found.append(f"{hashes[key]} changed")
        else:
            found.append(f"{key} {old.get(key)}, now {new.get(key)}")
    return ", ".join(found)


# ---- from images to shards ----------------------------------------------------------------------


def stacked(pixels: Iterable[np.ndarray]) -> Tensor:
    """n images (H, W, 3) -> uint8 (n, 3, H, W)."""
    return torch.from_numpy(np.stack(list(pixels))).permute(0, 3, 1, 2).contiguous()


def decoded(source: Source, groups: Iterable[range]) -> Iterator[Tensor]:
    """uint8 (n, 3, H, W) of each group of images; threads decode the next ones while those before
    are encoded."""
    waiting: deque[Iterator[np.ndarray]] = deque()
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        for group in groups:
            waiting.append(pool.map(source.pixel, group))
            if len(waiting) > AHEAD:
                yield stacked(waiting.popleft())
        while waiting:
            yield stacked(waiting.popleft())


def shard_count(plan: dict[str, Any]) -> int:
    return len(Layout(plan))


def shard_images(plan: dict[str, Any], k: int) -> range:
    first, images, _ = Layout(plan)[k]
    return range(first, first + images)


def chunks(plan: dict[str, Any], k: int) -> list[range]:
    """The images of shard k, a batch at a time."""
    images = shard_images(plan, k)
    return [images[i : i + plan["batch"]] for i in range(0, len(images), plan["batch"])]


def write_shards(
    out: Path,
    plan: dict[str, Any],
    source: Source,
    vae: AnyVAE,
    ranks: Ranks,
    reuse: Reuse | None = None,
) -> None:
    """This rank's share, every world-th shard, but for those that are there."""
    share = range(ranks.rank, shard_count(plan), ranks.world)
    records = {}
    with contextlib.suppress(UserError):  # not finished, or damaged: shards speak for themselves
        records = dict(enumerate(read_manifest(out)["shards"]))

    def count(shards: Iterable[int]) -> int:
        return sum(len(shard_images(plan, k)) for k in shards)

    total = count(share)
    quiet = None if ranks.rank == 0 else True  # None: shown on a terminal
    with tqdm(total=total, unit="img", desc=f"encoding to {out}", disable=quiet) as bar:
        absent = [k for k in share if not verify_shard(out, plan, k, records.get(k))]
        bar.update(total - count(absent))

        def pixels() -> Iterator[Tensor]:
            groups = (fresh(chunk, reuse) for k in absent for chunk in chunks(plan, k))
            for batch in decoded(source, filter(len, groups)):
                bar.update(len(batch))
                yield batch

        batches = pixels()
        for k in absent:
            write_shard(out, plan, k, source.names, batches, vae, ranks.device, reuse)


def fresh(chunk: range, reuse: Reuse | None) -> Sequence[int]:
    """The images of a chunk that are to be encoded."""
    return [i for i in chunk if reuse.places[i] < 0] if reuse else chunk


@torch.no_grad()
def write_shard(
    out: Path,
    plan: dict[str, Any],
    k: int,
    names: Sequence[str],
    pixels: Iterator[Tensor],
    vae: AnyVAE,
    device: torch.device,
    reuse: Reuse | None = None,
) -> None:
    """Encode shard k, whose images come next in pixels, but for those that are encoded already."""
    parts, sums = [], []
    for chunk in chunks(plan, k):
        new, latents = fresh(chunk, reuse), {}
        if reuse:
            latents = {i: reuse.latents(i) for i in chunk if reuse.places[i] >= 0}
        if len(new):
            named = [names[i] for i in new]
            latents |= zip(new, encode_batch(plan, named, next(pixels), vae, device))
        part = torch.stack([latents[i] for i in chunk])  # (images, 1 or 2, C, h, w)
        kept = part.transpose(0, 1).flatten(0, 1).to(device)
        sums.append(moment_sums(vae.from_raw(kept), kept.shape[1]))
        parts.append(part)
    save_shard(out, plan, k, torch.cat(parts).contiguous(), sum(sums))


def encode_batch(
    plan: dict[str, Any], names: list[str], batch: Tensor, vae: AnyVAE, device: torch.device
) -> Tensor:
    """What is kept (B, 1 or 2, C, h, w) of images uint8 (B, 3, H, W)."""
    images = to_float(batch.to(device))
    if plan["flip"]:  # a mirrored latent is not the latent of the mirrored image
        images = torch.cat([images, images.flip(-1)])
    raw = vae.raw(images)
    kept = raw.to(PRECISION[plan["dtype"]])
    check_fits(kept, raw, names, plan["dtype"])
    return kept.cpu().unflatten(0, (-1, len(batch))).transpose(0, 1)


def check_fits(kept: Tensor, raw: Tensor, names: list[str], dtype: str) -> None:
    bad = ~kept.isfinite().flatten(1).all(1)
    if bad.any():
        name = names[int(bad.nonzero()[0]) % len(names)]
        raise UserError(
            f"the latents of {name} do not fit {dtype} (largest {float(raw.abs().max()):.3g})",
            do="Use --dtype bf16.",
        )


def moment_sums(latents: Tensor, channels: int) -> Tensor:
    """(3, C) by channel: number, sum and sum of squares of model-space latents, in float64. The
    same numbers whichever layout flux2 was asked for."""
    z = latents.double().cpu()
    if z.shape[1] != channels:
        z = F.pixel_shuffle(z, 2)
    number = z.new_full((channels,), z.numel() / channels)
    return torch.stack([number, z.sum((0, 2, 3)), z.square().sum((0, 2, 3))])


def finish(out: Path, plan: dict[str, Any], source: Source, captions: list[str]) -> None:
    """The index and, from the shards' headers, the manifest."""
    write_index(out / "index.safetensors", source, plan, captions)
    shards = range(shard_count(plan))
    sums = [shard_meta(open_weights(shard_path(out, k)))["sums"] for k in shards]
    number, value, square = torch.tensor(sums, dtype=torch.float64).sum(0)  # (C,) each
    mean = value / number
    std = (square / number - mean.square()).clamp(min=0).sqrt()
    overall = float(value.sum() / number.sum())
    spread = float((square.sum() / number.sum() - overall**2).clamp(min=0).sqrt())
    manifest = {
        "plan": plan,
        "mean": overall,
        "std": spread,
        "channel_mean": mean.tolist(),
        "channel_std": std.tolist(),
        "index": digest(out / "index.safetensors"),
        "vae": digest(vae_path(out)),
        "shards": [shard_record(out, k) for k in shards],
    }
    if any(captions):
        bare = out / ".bare-index.safetensors"
        write_index(bare, source, plan, [])
        manifest["bare"] = digest(bare)
        bare.unlink()
    if source.contents:
        manifest |= {"source": source.hash, "contents": write_contents(out, source)}
    write_text(out / "manifest.json", sealed(manifest))


def write_index(
    path: Path, source: Source, plan: dict[str, Any], captions: list[str]
) -> None:
    """Names, tags, captions, and the first images, of one shape, with which a run checks the
    cache."""
    names = [name.encode("utf-8", "surrogateescape") for name in source.names]
    first = np.stack([source.pixel(i) for i in range(min(CHECKED, Layout(plan).firsts[1]))])
    tags = source.table
    index = {
        "names": torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8),
        "first": torch.from_numpy(first),
        "name_ends": torch.tensor([len(name) for name in names]).cumsum(0),
        "held": torch.from_numpy(source.held.astype(np.int64)),
        "tag_starts": torch.from_numpy(tags.starts),
        "tag_ids": torch.from_numpy(tags.ids),
    }
    if source.frames:
        index["originals"] = torch.from_numpy(source.frames.originals)
    if any(captions):
        texts = [text.encode() for text in captions]
        index["captions"] = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)
        index["caption_ends"] = torch.tensor([len(text) for text in texts]).cumsum(0)
    meta = {
        "kind": "latent cache",
        "vocabulary": tags.vocabulary,
        "notes": source.notes,
        "unreadable": source.unreadable,
    }
    write_tensors(path, index, meta)


# ---- the command --------------------------------------------------------------------------------


def check(cfg: Encode) -> bool:
    """--verify: say what is wrong with a cache; True if nothing is."""
    wrong = [f"{cfg.out} is not a cache."]
    if is_cache(cfg.out):
        wrong = verify(Path(cfg.out), cfg.vae)
    if wrong:
        print("\n".join(wrong))
        print("Repeat the command that encodes the cache: what is damaged is written again.")
    else:
        print(f"{cfg.out}: latents, names and tags are as they were written.")
    return not wrong


def main() -> None:
    cfg, dry_run = parse(Encode, __doc__)
    if dry_run:
        print(cfg)
        return
    if cfg.verify:
        sys.exit(0 if check(cfg) else 1)
    ranks = join_ranks(cfg.device, "gloo", PATIENCE)  # a GPU that waits need not spin
    encode(cfg, ranks)
    ranks.leave()
    if ranks.rank == 0:
        manifest = read_manifest(Path(cfg.out))
        images = manifest["plan"]["images"]
        shards = len(manifest["shards"])
        mean, std = manifest["mean"], manifest["std"]
        plural = "" if shards == 1 else "s"
        print(f"{images:,} images in {shards} shard{plural}, mean {mean:.3f}, std {std:.3f}")
        if buckets := buckets_of(manifest["plan"]):
            print(bucket_line(manifest["plan"]["counts"], buckets))
        unreadable = read_meta(open_weights(Path(cfg.out) / "index.safetensors"))["unreadable"]
        if unreadable:
            print(unreadable_line(unreadable))
        print(cfg.out)


if __name__ == "__main__":
    cli(main)
