"""One flipped bit in a run, a latent cache or a cache of features: it is found, or does no harm.

    python tests/flips.py [--seed 0] [--n 3000] [--jobs N]
    python tests/flips.py --case 123           # one of them alone

Each case flips a bit of one file and runs a command that opens the folder: going on with the run,
drawing from it, measuring it, training on the latents, encoding again, measuring by the features.
Either the command ends in one error, or its tensors, pictures and metrics are bitwise those of
whole files. Half of the bits are drawn from any file alike, half by size, for most of a folder is
weights. Of a log, from which nothing is computed, only what comes of it counts.
"""

import random
from pathlib import Path

from fuzz import ENCODED, FROM_CACHE, OF_PICTURES, OF_SAMPLES, RESUME, SAMPLE, Case, Trials, try_all
from harness.cli import cli, parse
from mutations import replaced

FOLDERS = {
    "runs/half": (RESUME, RESUME, SAMPLE, OF_SAMPLES.replace("runs/done", "{}")),
    "latents": (FROM_CACHE, FROM_CACHE, ENCODED),
    "features": (OF_PICTURES, OF_SAMPLES),
}


def flip(number: int, r: random.Random) -> Case:
    """One bit under the current folder flipped."""
    folder = list(FOLDERS)[number % len(FOLDERS)]
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    sizes = [path.stat().st_size for path in paths]
    evenly = [int(size > 0) for size in sizes]
    path = r.choices(paths, r.choice([evenly, sizes]))[0]
    data = bytearray(path.read_bytes())
    place, bit = r.randrange(len(data)), r.randrange(8)
    data[place] ^= 1 << bit
    replaced(path, bytes(data))
    line = r.choice(FOLDERS[folder]).replace("{}", folder)
    how = f"bit {bit} of byte {place} of {path}"
    return Case(folder, line.split(), how, {}, True)


def main() -> None:
    cfg, _ = parse(Trials, __doc__)
    try_all(cfg, flip, f"python tests/flips.py --seed {cfg.seed}")


if __name__ == "__main__":
    cli(main)
