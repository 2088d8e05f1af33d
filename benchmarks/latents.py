"""What does it cost to read a latent cache?   python benchmarks/latents.py

Latents a second, one by one in random order, from a cache of 20,000 (32, 32, 32) latents in fp16
(1.3 GB, the size of a 256 px image) against a numpy memmap of the same numbers; and whole samples a
second as the loader makes them, noise included.
"""

import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).parent.parent)
import numpy as np
import torch

from data import cache, encode
from data.dataset import Stream, batches, open_dataset
from data.sources import held_hash
from data.tags import TagTable
from harness import record

N, SHAPE, READS, ROUNDS = 20_000, (32, 32, 32), 4000, 9
BATCH, BATCHES = 64, 20


class Noise:
    """Stands in for a source of images: only names, tags and a first picture are asked for."""

    names = [f"{i:06d}" for i in range(N)]
    held = held_hash(names)
    table = TagTable.of([()] * N)
    notes: list[str] = []
    unreadable: dict[str, str] = {}
    contents: list[str] = []

    @staticmethod
    def pixel(i: int) -> np.ndarray:
        return np.zeros((256, 256, 3), np.uint8)


def make(folder: Path) -> None:
    """A cache of noise, as encode() writes it, and the same numbers in one flat file."""
    plan = {
        "version": cache.VERSION,
        "data": "noise",
        "resolution": 256,
        "crop": "center",
        "resize": "lanczos",
        "flip": False,
        "dtype": "fp16",
        "batch": 1,
        "images": N,
        "source": "0" * 64,
        "vae": "",
        "threads": 1,
        "torch": "",
        "device": "",
        "shape": list(SHAPE),
        "shard": encode.SHARD // (2 * 32**3),
    }
    out = folder / "cache"
    out.mkdir()
    for name in ("plan.json", "vae.safetensors"):
        (out / name).write_text("not read")
    g = torch.Generator().manual_seed(0)
    sums = torch.tensor([[1, 1], [0, 0], [1, 1]])
    with open(folder / "flat", "wb") as flat:
        for k in range(encode.shard_count(plan)):
            n = len(encode.shard_images(plan, k))
            z = torch.randn(n, 1, *SHAPE, generator=g).half()
            cache.save_shard(out, plan, k, z, sums)
            flat.write(z.numpy().tobytes())
    encode.finish(out, plan, Noise)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        ds = open_dataset(f"{folder}/cache", resolution=256)
        flat = np.memmap(f"{folder}/flat", np.float16, mode="r", shape=(N, *SHAPE))

        def copied(i: int) -> torch.Tensor:
            return torch.from_numpy(flat[i].copy())

        order = np.random.default_rng(0).integers(0, N, READS)
        reads = {"cache": ds.source.raw, "memmap": copied}
        speeds: dict[str, list[float]] = {name: [] for name in reads}
        for r in range(ROUNDS + 1):
            for name, read in reads.items():
                start = time.perf_counter()
                for i in order:
                    read(i)
                if r:  # the first round warms the page cache
                    speeds[name].append(READS / (time.perf_counter() - start))
        assert all(torch.equal(ds.source.raw(i), copied(i)) for i in order[:50])
        stream = Stream(ds, None, SHAPE, seed=0)
        positions = (list(range(p, p + BATCH)) for p in itertools.count(0, BATCH))
        loader = batches(stream, positions)
        start = time.perf_counter()
        for _ in range(BATCHES):
            next(loader)
        whole = BATCHES * BATCH / (time.perf_counter() - start)
        result = {name: statistics.median(values) for name, values in speeds.items()}
        ratio = statistics.median(a / b for a, b in zip(speeds["cache"], speeds["memmap"]))
        print(
            f"cache {result['cache']:.0f} latents/s, memmap {result['memmap']:.0f}, ratio "
            f"{ratio:.2f}; whole samples {whole:.0f} images/s, no workers"
        )
        record.write(
            "latents", {"rounds": ROUNDS, "latents/s": result, "ratio": ratio, "samples/s": whole}
        )


if __name__ == "__main__":
    main()
