"""What does it cost to read a latent cache?   python benchmarks/latents.py

Latents a second, one by one in random order, from a cache of 20,000 (32, 32, 32) latents in fp16 (1.3 GB, the size of a 256 px
image) against a numpy memmap of the same numbers; and whole samples a second as the loader makes them, noise included.
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

import data.encode as encode
import data.cache as latents
from harness import record
from data.dataset import Stream, batches, open_dataset
from data.sources import held_hash
from data.tags import TagTable

N, SHAPE, READS, ROUNDS = 20_000, (32, 32, 32), 4000, 9


class Noise:
    """Stands in for a source of images: only names, tags and a first picture are asked for."""
    names = [f"{i:06d}" for i in range(N)]
    held, table, notes, unreadable = held_hash(names), TagTable.of([()] * N), [], {}
    pixel = staticmethod(lambda i: np.zeros((256, 256, 3), np.uint8))


def make(folder: Path) -> None:
    """A cache of noise, as encode() writes it, and the same numbers in one flat file."""
    plan = {"version": latents.VERSION, "data": "noise", "resolution": 256, "crop": "center", "resize": "lanczos", "flip": False, "dtype": "fp16", "batch": 1,
            "images": N, "source": "", "vae": "", "shape": list(SHAPE), "shard": encode.SHARD // (2 * 32 ** 3)}
    (folder / "cache").mkdir()
    for name in ("plan.json", "vae.safetensors"):
        (folder / "cache" / name).write_text("not read")
    g, sums = torch.Generator().manual_seed(0), torch.tensor([[1, 1], [0, 0], [1, 1]])
    with open(folder / "flat", "wb") as flat:
        for k, start in enumerate(range(0, N, plan["shard"])):
            z = torch.randn(min(plan["shard"], N - start), 1, *SHAPE, generator=g).half()
            latents.save_shard(folder / "cache", plan, k, z, sums)
            flat.write(z.numpy().tobytes())
    encode.finish(folder / "cache", plan, Noise)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        ds = open_dataset(f"{folder}/cache", resolution=256)
        source, flat = ds.source, np.memmap(f"{folder}/flat", np.float16, mode="r", shape=(N, *SHAPE))
        order, rows = np.random.default_rng(0).integers(0, N, READS), {"cache": [], "memmap": []}
        for r in range(ROUNDS + 1):                                             # the first round warms the page cache
            for name, read in (("cache", source.raw), ("memmap", lambda i: torch.from_numpy(flat[i].copy()))):
                start = time.perf_counter()
                for i in order:
                    read(i)
                rows[name] += [READS / (time.perf_counter() - start)] * (r > 0)
        assert all(torch.equal(source.raw(i), torch.from_numpy(flat[i].copy())) for i in order[:50])
        stream = Stream(ds, None, SHAPE, seed=0)
        loader, start = batches(stream, (list(range(p, p + 64)) for p in itertools.count(0, 64))), time.perf_counter()
        for _ in range(20):
            next(loader)
        whole = 20 * 64 / (time.perf_counter() - start)
        result = {name: statistics.median(values) for name, values in rows.items()}
        ratio = statistics.median(a / b for a, b in zip(rows["cache"], rows["memmap"]))
        print(f"cache {result['cache']:.0f} latents/s, memmap {result['memmap']:.0f}, ratio {ratio:.2f}; whole samples {whole:.0f} images/s, no workers")
        record.write("latents", {"latents/s": result, "ratio": ratio, "samples/s": whole})


if __name__ == "__main__":
    main()
