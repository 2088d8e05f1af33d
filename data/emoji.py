"""Emoji with captions, as a folder that --data reads:

    npm pack emoji-datasource-twitter@16.0.0 emojibase-data@17.0.0
    python -m data.emoji --out emoji

Each is NAME.png, Twemoji's picture of 64 px over white; NAME.caption, its label; NAME.txt, its
tags, both of emojibase's English table. Pictures: CC-BY 4.0, Twitter, Inc and other contributors
(https://github.com/jdecked/twemoji). Words: MIT, Miles Johnson.
"""

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    import harness.interrupt  # noqa: F401

from PIL import Image

from harness.cli import UserError, cli, flag, parse
from harness.files import make_dir, write_text
from harness.pictures import save_png
from harness.typed import Length, Like, Open, check

PICTURES = "emoji-datasource-twitter-16.0.0.tgz"
WORDS = "emojibase-data-17.0.0.tgz"
TABLE = "package/en/data.json"
FETCH = "npm pack emoji-datasource-twitter@16.0.0 emojibase-data@17.0.0"


@dataclass
class Emoji(Open):
    """What is read of a row of emojibase's table."""

    label: Annotated[str, Length(1, 200)]
    # A file is named by it.
    hexcode: Annotated[str, Like("[0-9A-Fa-f]{1,8}(-[0-9A-Fa-f]{1,8}){0,15}", "such as 2764-FE0F")]
    tags: list[str] | None = None


@dataclass(frozen=True)
class Config:
    out: str = flag("", "folder to write", writes="folder")
    packages: str = flag(".", "folder with the two packages of npm pack")


def read_table(path: Path) -> list[Emoji]:
    """emojibase's rows; each stands for all skin tones."""
    with tarfile.open(path) as tar:
        rows = json.load(tar.extractfile(TABLE))
    check(rows, list[Emoji], path, f"Fetch both again: {FETCH}")
    return [Emoji(row["label"], row["hexcode"], row.get("tags")) for row in rows]


def picture_of(emoji: Emoji, known: set[str]) -> str:
    """The picture's place in its package, "" if there is none. The mark that asks for a coloured
    picture, fe0f, stands in some names of either package and not in the other's."""
    code = emoji.hexcode.lower()
    for name in (code, f"{code}-fe0f", code.replace("-fe0f", "")):
        place = f"package/img/twitter/64/{name}.png"
        if place in known:
            return place
    return ""


def pictures(packages: Path) -> Iterator[tuple[Emoji, Image.Image]]:
    """Every emoji that has a picture, over white (64, 64)."""
    table = read_table(packages / WORDS)
    with tarfile.open(packages / PICTURES) as tar:
        known = set(tar.getnames())
        for emoji in table:
            place = picture_of(emoji, known)
            if not place:
                continue
            data = tar.extractfile(place).read()
            try:
                image = Image.open(io.BytesIO(data)).convert("RGBA")
            except OSError as error:  # Pillow's own
                raise ValueError(f"{place}: {type(error).__name__}") from None
            white = Image.new("RGBA", image.size, "white")
            yield emoji, Image.alpha_composite(white, image).convert("RGB")


def write(folder: Path, packages: Path) -> int:
    """The pictures, captions and tags; returns how many."""
    make_dir(folder)
    n = 0
    for emoji, image in pictures(packages):
        stem = folder / emoji.hexcode.lower()
        save_png(image, stem.with_suffix(".png"))
        write_text(stem.with_suffix(".caption"), emoji.label + "\n")
        write_text(stem.with_suffix(".txt"), ", ".join(emoji.tags or [emoji.label]) + "\n")
        n += 1
    return n


def main() -> None:
    cfg, dry_run = parse(Config, __doc__)
    if not cfg.out:
        raise UserError("--out is missing", do="Add --out DIR.")
    if dry_run:
        print(json.dumps(vars(cfg), indent=1))
        return
    packages = Path(cfg.packages)
    for name in (PICTURES, WORDS):
        if not (packages / name).is_file():
            raise UserError(f"{packages / name} is not there", do=f"Fetch both: {FETCH}")
    try:
        n = write(Path(cfg.out), packages)
    except UserError:
        raise
    except (tarfile.TarError, EOFError, KeyError, ValueError) as error:
        raise UserError(
            f"{packages}: a package is damaged ({' '.join(str(error).split())[:120]})",
            do=f"Fetch both again: {FETCH}",
        ) from None
    if not n:
        raise UserError(
            f"{packages / PICTURES} has no picture of any emoji of {WORDS}",
            do=f"Fetch both again: {FETCH}",
        )
    print(f"{n:,} emoji with a label and tags each", file=sys.stderr)
    print(cfg.out)


if __name__ == "__main__":
    cli(main)
