"""Kittens and loading:  python benchmarks/robohash.py

1. Milliseconds to put a kitten together at 64 and 256 pixels, against the robohash package's own
   assemble() of the same art.
2. Images/s of pure loading, nothing trained: from memory, drawn when used, from PNG and JPEG
   files, with 0 and 2 workers.
"""

import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

# in place of this folder, where `import robohash` would find this file
sys.path[0] = str(Path(__file__).parent.parent)

import torch
from PIL import Image

import data.robohash as robo
from data import sources
from data.dataset import Dataset, Stream, batches, open_dataset
from harness import record

ROUNDS, KITTENS, OWN = 5, 400, 3  # OWN = images of assemble() a round, it takes its time
BATCH = 16


def compositor(size: int) -> dict[str, float]:
    """Median milliseconds an image of each side, in turns so that a noisy machine hits both."""
    from robohash import Robohash

    robo.load_art.cache_clear()
    start = time.perf_counter()
    art = robo.load_art(size)
    seconds, ours, theirs = time.perf_counter() - start, [], []
    for r in range(ROUNDS):
        start = time.perf_counter()
        for i in range(KITTENS):
            art.draw(robo.sample_kitten(r * KITTENS + i))
        ours.append((time.perf_counter() - start) / KITTENS)
        start = time.perf_counter()
        for i in range(OWN):
            Robohash(f"{r} {i}").assemble(roboset="set4", bgset="any", sizex=size, sizey=size)
        theirs.append((time.perf_counter() - start) / OWN)
    return {
        "ms/image": 1e3 * statistics.median(ours),
        "assemble() ms/image": 1e3 * statistics.median(theirs),
        "times faster": statistics.median(theirs) / statistics.median(ours),
        "s to read the parts": seconds,
    }


def throughput(ds: Dataset, workers: int, images: int) -> float:
    """Images/s once what workers fetched ahead is used up."""
    side = ds.source.resolution // 8
    stream = Stream(ds, None, (32, side, side), seed=0, flip=True)
    positions = (list(range(p, p + BATCH)) for p in itertools.count(0, BATCH))
    loader = batches(stream, positions, workers)
    for _ in range(4 * workers + 4):
        next(loader)
    start = time.perf_counter()
    for _ in range(images // BATCH):
        next(loader)
    return images // BATCH * BATCH / (time.perf_counter() - start)


def loading() -> dict[str, dict[str, float]]:
    """Each data set at 64 pixels, from its own place, with and without workers."""
    result = {}
    with tempfile.TemporaryDirectory() as out:
        for end, size in (("png", 256), ("jpg", 1024)):
            Path(out, end).mkdir()
            art = robo.load_art(256)
            for i in range(200):
                picture = Image.fromarray(art.draw(robo.sample_kitten(i)))
                picture = picture.resize((size, size), Image.Resampling.BICUBIC)
                picture.save(f"{out}/{end}/{i}.{end}")
        keep = sources.IN_MEMORY
        for name, spec, limit in (
            ("kittens in memory", "robohash:1000", keep),
            ("kittens drawn when used", "robohash:1000", 0),
            ("PNG files of 256 px", f"{out}/png", 0),
            ("JPEG files of 1024 px", f"{out}/jpg", 0),
        ):
            sources.IN_MEMORY = limit
            ds = open_dataset(spec, resolution=64, holdout=0)
            result[name] = {
                f"{w} workers images/s": throughput(ds, w, 800 if "files" in name else 4000)
                for w in (0, 2)
            }
        sources.IN_MEMORY = keep
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = {f"{size} px": compositor(size) for size in (64, 256)}
    for name, row in result.items():
        print(
            f"{name:<26} {row['ms/image']:6.2f} ms/image   "
            f"assemble() {row['assemble() ms/image']:.0f} ms   {row['times faster']:.0f}×   "
            f"parts read in {row['s to read the parts']:.1f} s"
        )
    rates = loading()
    for name, row in rates.items():
        print(f"{name:<26} " + "   ".join(f"{key}: {value:,.0f}" for key, value in row.items()))
    record.write(
        "robohash", {"rounds": ROUNDS, "results": {"compositor": result, "loading": rates}}
    )
