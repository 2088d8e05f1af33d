"""
Robohash kittens: the second embedded data set, real illustrated art with tags.

Every picture is a pure function of (seed, index): a background and up to five layers drawn by hand,
chosen with uneven odds, each of them a tag. Four characters are fixed combinations of body, eyes
and accessory: they own no layer, so a model can only learn them as concepts.

    kitten = sample_kitten(7, seed=0)
    tags(kitten)                        # ["body:mauve", "fur:spots", "eyes:calm", ...]
    load_art(64).draw(kitten)           # uint8 (64, 64, 3)
    python -m data --data robohash:64 --out sheet.png   # the first 64

The pictures come from the installed package (pip install robohash==2.0, 44 MB), of which only the
PNG files are used, none of the code. Its art is licensed under Creative Commons Attribution: the
cats are by David Revoy (CC-BY 4.0,
https://www.peppercarrot.com/extras/html/2016_cat-generator/), the backgrounds by Zikri Kader
(CC-BY 3.0 or 4.0). Whoever shows such pictures, or what was trained on them, has to name them.
"""

import hashlib
import importlib.metadata
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # also where the file itself is run
    sys.path[0] = str(Path(__file__).parent.parent)

import numpy as np
from PIL import Image

from harness.cli import UserError, cli

COUNT = 4096  # pictures, unless the spec says robohash:N
SIZES = (32, 512)  # pixels a side
CREDIT = (
    "cats by David Revoy (CC-BY 4.0), backgrounds by Zikri Kader (CC-BY), from the robohash package"
)
REINSTALL = "pip install --force-reinstall robohash==2.0"

FOLDERS = {
    "body": "000#00body",
    "fur": "001#01fur",
    "eyes": "002#02eyes",
    "mouth": "003#03mouth",
    "accessory": "004#04accessories",
}
# What the package's pictures show, in the order of their numbers; "" is a picture of nothing, which
# gets no tag.
# fmt: off
NAMES = {
    "body": (
        "maroon", "lime", "black", "mauve", "red", "sand", "pink", "brown", "blue", "yellow",
        "gold", "grey", "amber", "cream", "orange",
    ),
    "fur": (
        "stripes", "tiger", "", "swirls", "dark patches", "light patches", "", "eye patch",
        "blocks", "spots",
    ),
    "eyes": (
        "wide", "doubtful", "dots", "worried", "magnifier", "square", "closed", "tired", "calm",
        "green", "lashes", "round", "glasses", "long", "sly",
    ),
    "mouth": (
        "laugh", "smile", "small", "shout", "open", "crooked", "smirk", "narrow", "teeth", "happy",
    ),
    "accessory": (
        "red scarf", "bell", "red collar", "headband", "pink bow", "black hat", "red headphones",
        "blue scarf", "barrel", "robot mouse", "gem", "bandana", "blue bow", "red hat",
        "silver headphones", "",
    ),
    "background": (
        "stars", "clouds", "city", "forest", "island", "hills", "moon", "mountain", "desert",
        "sunrise", "sky", "beach", "terminal", "red hexagons", "blue hexagons", "blue rays",
        "green rays", "yellow rays", "red rays", "green hexagons",
    ),
}
# fmt: on
LAYERS = tuple(NAMES)
BARE_RATE, CHARACTER_RATE = 0.3, 0.16  # no accessory; a character
CONCEPT = ("body", "eyes", "accessory")  # what makes a character
CHARACTERS = {
    name: dict(zip(CONCEPT, look))
    for name, look in {
        "inkwell": ("black", "glasses", "red scarf"),
        "duchess": ("cream", "lashes", "gem"),
        "comet": ("blue", "sly", "red headphones"),
        "marmalade": ("orange", "closed", "black hat"),
    }.items()
}
# What train.py's stages leave out unless told otherwise.
EXCLUDED = ("accessory:pink bow", "character:duchess", "character:comet")

GROUPS = {
    layer: tuple(f"{layer}:{name}" for name in dict.fromkeys(names) if name)
    for layer, names in NAMES.items()
}
GROUPS["character"] = tuple(f"character:{name}" for name in CHARACTERS)
VOCABULARY = tuple(tag for group in GROUPS.values() for tag in group)


def odds_of(number: int, n: int) -> np.ndarray:
    """(n,): how frequent each picture of layer `number` is. The common ones are four times as
    frequent as the rare ones; which are which has nothing to do with their order."""
    r = np.random.Generator(np.random.Philox(key=number))
    odds = r.permutation(np.linspace(0.4, 1.6, n))
    return odds / odds.sum()


ODDS = {layer: odds_of(k, len(names)) for k, (layer, names) in enumerate(NAMES.items())}


@dataclass(frozen=True)
class Kitten:
    """Everything draw() needs: the number of the picture in each layer; accessory 15, fur 2 and 6
    are nothing."""

    body: int
    fur: int
    eyes: int
    mouth: int
    accessory: int
    background: int

    def name(self, layer: str) -> str:
        return NAMES[layer][getattr(self, layer)]


def character(kitten: Kitten) -> str:
    """The name of the character that has this combination of layers, or ""."""
    look = {layer: kitten.name(layer) for layer in CONCEPT}
    return next((name for name, fixed in CHARACTERS.items() if fixed == look), "")


def tags(kitten: Kitten) -> list[str]:
    """The tags of a kitten, in the order of GROUPS."""
    found = [f"{layer}:{kitten.name(layer)}" for layer in LAYERS if kitten.name(layer)]
    name = character(kitten)
    return found + [f"character:{name}"] if name else found


def sample_kitten(index: int, seed: int = 0) -> Kitten:
    """Kitten number `index` (0 .. 2**64 - 1) of the endless data set number `seed` (same range)."""
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))

    def look() -> dict[str, int]:
        chosen = {layer: int(rng.choice(len(NAMES[layer]), p=ODDS[layer])) for layer in LAYERS}
        if rng.random() < BARE_RATE:
            chosen["accessory"] = NAMES["accessory"].index("")
        return chosen

    kitten = Kitten(**look())
    if rng.random() < CHARACTER_RATE:
        concept = list(CHARACTERS.values())[rng.integers(len(CHARACTERS))]
        fixed = {layer: NAMES[layer].index(name) for layer, name in concept.items()}
        return Kitten(**{**vars(kitten), **fixed})
    while character(kitten):  # nobody looks like a character by accident
        kitten = Kitten(**look())
    return kitten


# ---- the pictures -------------------------------------------------------------------------------


class Part(NamedTuple):
    corner: tuple[int, int]
    color: Image.Image  # RGB, cropped to where there is anything
    alpha: Image.Image


class Art:
    """The package's pictures at one size, and what they make together."""

    def __init__(
        self, size: int, parts: dict[tuple[str, int], Part], backgrounds: list[Image.Image]
    ):
        self.size, self.parts, self.backgrounds = size, parts, backgrounds

    def draw(self, kitten: Kitten) -> np.ndarray:
        """uint8 (size, size, 3)."""
        canvas = self.backgrounds[kitten.background].copy()
        for layer in FOLDERS:
            part = self.parts.get((layer, getattr(kitten, layer)))
            if part:
                canvas.paste(part.color, part.corner, part.alpha)
        return np.asarray(canvas)

    def digest(self) -> str:
        """Of all pictures: they and the index decide what is drawn."""
        whole = hashlib.sha256()
        for (layer, number), part in sorted(self.parts.items()):
            whole.update(f"{layer} {number} {part.corner} {part.color.size}".encode())
            whole.update(part.color.tobytes() + part.alpha.tobytes())
        for background in self.backgrounds:
            whole.update(background.tobytes())
        return whole.hexdigest()


def art_folder() -> Path:
    """Where the package keeps its pictures. Asked of pip's records: a module called robohash may be
    anything."""
    try:
        package = importlib.metadata.distribution("robohash")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "--data robohash draws with the pictures of a package that is not installed",
            do="pip install robohash==2.0",
        ) from None
    return Path(str(package.locate_file("robohash")))


def files_of(folder: Path) -> dict[str, list[Path]]:
    """The files of each layer by number, as many as it has names."""
    found = {}
    for layer, where in FOLDERS.items():
        files = (folder / "sets" / "set4" / where).glob("*.png")
        found[layer] = sorted(files, key=lambda path: path.name.partition("#")[0])
    found["background"] = sorted((folder / "backgrounds").glob("bg[12]/*.png"))
    for layer, names in NAMES.items():
        if len(found[layer]) != len(names):
            raise UserError(
                f"the robohash package in {folder} has {len(found[layer])} pictures for {layer}, "
                f"wanted {len(names)}",
                do=REINSTALL,
            )
    return found


@lru_cache(maxsize=2)
def load_art(size: int) -> Art:
    """Read and resize every picture once: seconds, for they are large."""
    found = files_of(art_folder())

    def read(path: Path) -> Image.Image:
        try:
            with Image.open(path) as file:
                return file.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error})", do=REINSTALL) from None

    with ThreadPoolExecutor() as pool:
        images = {layer: list(pool.map(read, paths)) for layer, paths in found.items()}
    parts = {}
    for layer in FOLDERS:
        for k, image in enumerate(images[layer]):
            box = image.getchannel("A").getbbox()
            if box:  # what is nothing has none
                visible = image.crop(box)
                parts[layer, k] = Part(box[:2], visible.convert("RGB"), visible.getchannel("A"))
    return Art(size, parts, [image.convert("RGB") for image in images["background"]])


def main() -> None:
    raise UserError(
        "data/robohash.py has no command of its own",
        do="Look at its pictures with: python -m data --data robohash:64 --out sheet.png",
    )


if __name__ == "__main__":
    cli(main)
