"""What a data set holds: its report, and its first images as training sees them.

python -m data --data DIR --resolution 128 --out sheet.png
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # also where the file itself is run
    sys.path[0] = str(Path(__file__).parent.parent)
    import harness.interrupt  # noqa: F401

from data.cache import is_cache
from data.dataset import open_dataset
from harness.cli import UserError, cli, flag, parse
from harness.memory import check_memory
from harness.pictures import save_grid


@dataclass(frozen=True)
class Config:
    data: str = flag("toyfaces:64", "toyfaces, robohash, a folder, a parquet file, hf:org/name")
    resolution: int = flag(128, "of the pictures", low=1, high=8192)
    n: int = flag(64, "pictures, at most", low=1, high=1e4)
    out: str = flag("sheet.png", "where they go, on one sheet", writes=".png")


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if dry_run:
        print(json.dumps(vars(cfg), indent=1))
        return
    if is_cache(cfg.data):
        raise UserError(
            f"{cfg.data} is a latent cache, which keeps no images",
            do="Name the data set that it was made from.",
        )
    ds = open_dataset(cfg.data, resolution=cfg.resolution, holdout=0)
    print(ds.report)
    count = min(cfg.n, len(ds))
    # The pictures, and the sheet of them.
    what = f"--n {count} at --resolution {cfg.resolution}"
    check_memory(what, 2 * count * 3 * cfg.resolution**2)
    save_grid(ds.images(range(count)), Path(cfg.out))
    print(cfg.out)


if __name__ == "__main__":
    cli(main)
