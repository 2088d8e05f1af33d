"""
Toy faces: the embedded default data set, procedurally drawn portraits with tags.

Every face is a pure function of (seed, index): attributes are picked from small pools, turned into
booru-style tags, and painted with a few bold flat shapes. Four characters are fixed combinations of
ordinary attributes: they own no colour and no shape, so a model can only learn them as concepts.

    face = sample_face(7, seed=0)
    tags(face)                         # ["silver hair", "twin tails", "yellow eyes", ...]
    draw(face, size=64)                # PIL.Image, RGB, 64 x 64
    python -m data --out sheet.png     # the first 64 faces

Shapes live on a 64 x 64 grid (x to the right, y down) whatever the output size is. A shape is
(points (n, 2), the same points grown by LINE (n, 2)). A layer is (fill, outline or "", *shapes),
where a colour is "#rrggbb" or a name that palette() knows.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # also where the file itself is run
    sys.path[0] = str(Path(__file__).parent.parent)

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from harness.cli import UserError, cli

GRID = 64  # side of the design grid
LINE = 1.5  # outline width in grid units; small models lose anything much thinner
SUPER = 4  # supersampling factor for anti-aliasing
SOFT = 0.25  # blur in output pixels: lets a linear autoencoder keep edges without ringing


def outlined(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shape with these corners (n, 2), listed in either direction."""
    edge = np.roll(points, -1, 0) - points
    normal = np.stack([edge[:, 1], -edge[:, 0]], 1) / np.linalg.norm(edge, axis=1, keepdims=True)
    area = (points[:, 0] * edge[:, 1] - points[:, 1] * edge[:, 0]).sum()
    before = np.roll(normal, 1, 0)
    # the floor keeps sharp tips from growing into needles
    miter = (before + normal) / np.maximum(1 + (before * normal).sum(1, keepdims=True), 0.5)
    return points, points + math.copysign(LINE, area) * miter


def path(text: str) -> tuple[np.ndarray, np.ndarray]:
    """A closed shape: "x y" is a straight step, "cx cy x y" a quadratic curve."""
    steps = [np.array(step.split(), float) for step in text.split(",")]
    points = [steps[0]]
    for step in steps[1:]:
        start, control, end = points[-1], step[:2], step[-2:]
        for t in np.arange(1, 13) / 12 if len(step) == 4 else [1.0]:
            points.append((1 - t) ** 2 * start + 2 * t * (1 - t) * control + t * t * end)
    return outlined(np.stack(points[:-1] if np.allclose(points[0], points[-1]) else points))


def oval(
    cx: float, cy: float, rx: float, ry: float, lean: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """An ellipse around (cx, cy), turned clockwise by `lean` degrees."""
    angle, lean = np.arange(32) * (2 * math.pi / 32), math.radians(lean)
    x, y = rx * np.cos(angle), ry * np.sin(angle)
    right = cx + x * math.cos(lean) - y * math.sin(lean)
    down = cy + x * math.sin(lean) + y * math.cos(lean)
    return outlined(np.stack([right, down], 1))


def twin(shape: tuple) -> tuple[tuple, tuple]:
    """The shape and its mirror image across the vertical axis of the grid."""
    return shape, tuple(points * (-1, 1) + (GRID, 0) for points in shape)


# The pools, keyed by tag. The colours are: hair, hair_dark (shade and outline), hair_light,
# accent (ribbons, hats)
HAIR_COLOR = {
    "black hair": ("#3f3f5e", "#24223c", "#666b9c", "#ff4f6d"),
    "brown hair": ("#9a5a3a", "#5f3124", "#c98555", "#45c4b0"),
    "blonde hair": ("#ffd35c", "#b87b35", "#fff0a8", "#4a7bf0"),
    "red hair": ("#e8493f", "#931f32", "#ff8a6b", "#ffd84d"),
    "pink hair": ("#ff94bd", "#b84c82", "#ffc8de", "#7a5cf0"),
    "blue hair": ("#4a8df0", "#2b459c", "#8fc6ff", "#ff9a3d"),
    "green hair": ("#4fc48a", "#24796a", "#9aedb5", "#f2557f"),
    "silver hair": ("#dfe4f2", "#7f87aa", "#ffffff", "#e0435c"),
}
# pupil, iris, iris_light; the clothes repeat the colours of the iris
EYE_COLOR = {
    "blue eyes": ("#122a80", "#2a62e0", "#74ccff"),
    "green eyes": ("#0a4a35", "#15935a", "#86ee80"),
    "red eyes": ("#6b0f2a", "#cc2444", "#ff8c84"),
    "purple eyes": ("#3a1a78", "#7438d0", "#cda4ff"),
    "yellow eyes": ("#7a3a06", "#dc8c10", "#ffe658"),
}
# skin, skin_dark, skin_line, blush, lens (skin seen through glasses), lips
SKIN = {
    "light skin": ("#ffe6d5", "#f3b9a2", "#a8645c", "#ff9f9c", "#fff3ea", "#a8324a"),
    "tan skin": ("#f3bf92", "#d08d63", "#8e4f3c", "#ee8068", "#f9dfc9", "#8c2638"),
    "dark skin": ("#b3724f", "#7f4936", "#5a2f2a", "#d8685a", "#d9b9a7", "#571a26"),
}


def hair(text: str, fill: str = "hair") -> tuple:
    """A layer of hair; "hair_dark" fills the shadow behind the head."""
    return fill, "hair_dark", path(text)


TAIL = path("13 17, -3 17 3 42, 5 54 4 61, 14 57 14.5 42, 15 30 13 17")
NAPE = hair("14 24, 10 40 16 50, 32 54 48 50, 54 40 50 24", "hair_dark")
CURLS = (
    "13 41, 5.2 38 10.3 31.2, 4.4 25.1 12 21.4, 9.5 13.3 18 13.4, 19.3 5 27 8.9, 32 2 37 8.9, "
    "44.7 5 46 13.4, 54.5 13.3 52 21.4, 59.6 25.1 53.7 31.2, 58.8 38 51 41"
)

# (layers behind the head, layers in front of it)
HAIR_STYLE = {
    "bob cut": (
        [hair("32 6, 57 5 57 32, 58 48 53 55, 32 58 11 55, 6 48 7 32, 7 5 32 6", "hair_dark")],
        [
            hair(
                "32 6, 57 5 57 32, 58 48 53 55, 48 54 46 51, 50 40 47 30, 42.5 31, 39.5 26.5, "
                "37 31.5, 27 31.5, 24.5 26.5, 21.5 31, 17 30, 14 40 18 51, 16 54 11 55, 6 48 7 32, "
                "7 5 32 6"
            )
        ],
    ),
    "long hair": (
        [hair("32 5, 56 5 56 32, 58 56 58 74, 6 74, 6 56 8 32, 8 5 32 5", "hair_dark")],
        [
            hair(
                "32 6, 55 5 55.5 32, 56 50 53 62, 46 54 48 36, 42 29 33 15, 23 30 16 36, "
                "18 54 11 62, 8 50 8.5 32, 9 5 32 6"
            )
        ],
    ),
    "twin tails": (
        [NAPE, ("hair", "hair_dark", *twin(TAIL))],
        [
            hair(
                "32 6, 53 6 53 30, 52 38 50 43, 48 36 47 28, 43 33, 39 26, 32 33, 25 26, 21 33, "
                "17 28, 16 36 14 43, 12 38 11 30, 11 6 32 6"
            ),
            ("accent", "hair_dark", *twin(oval(11.5, 21, 2.6, 4, 25))),
        ],
    ),
    "spiky hair": (
        [],
        [
            hair(
                "14 39, 6 33, 10 29, 3 22, 10 18, 7 8, 17 10, 20 2, 27 6, 35 1.5, 39 6, 49 3, "
                "49 11, 58 11, 54 19, 61 24, 54 29, 58 34, 50 39, 48 28, 43 33, 40 25, 33 33, "
                "29 25, 23 33, 20 26, 16 31"
            )
        ],
    ),
    "double bun": (
        [NAPE, ("hair", "hair_dark", *twin(oval(11.5, 15, 8.5, 8.5)))],
        [
            hair(
                "32 6, 53 6 53 32, 52 35 50 37, 49 30 44 22, 34 32 17 31, 15 35 14 38, 11 32, "
                "11 6 32 6"
            )
        ],
    ),
    "side ponytail": (
        [NAPE, hair("48 12, 66 12 61 38, 60 54 50 60, 53 48 51 40, 46 28 48 12")],
        [
            hair(
                "32 6, 53 6 53 30, 52 36 50 40, 50 32 46 29.5, 33 30 25 18, 21 26 17 33, "
                "18 42 13 50, 11 40 11 30, 11 6 32 6"
            ),
            ("accent", "hair_dark", oval(52.5, 21, 2.8, 4.4, -25)),
        ],
    ),
    "curly hair": (
        [hair(CURLS + ", 52 52 43 52, 21 52, 12 52 13 41", "hair_dark")],
        [
            hair(
                CURLS
                + ", 50 33 47 31, 43 36 39 30, 36 35 32 30, 28 35 25 30, 21 36 17 31, 14 33 13 41"
            )
        ],
    ),
}

INK = "#553058"  # outline of the ornaments
PETALS = [
    oval(x, y, 3.6, 3.6)
    for x, y in ((16, 12.4), (20.4, 15.6), (18.7, 20.7), (13.3, 20.7), (11.6, 15.6))
]
ORNAMENT = {
    "bow": [
        ("accent", INK, *twin(path("32 8, 26 -2 17 2, 15 8 18 15, 27 16 32 8"))),
        ("accent", INK, oval(32, 8.5, 3.2, 3.6)),
    ],
    "flower": [("#ffffff", INK, *PETALS), ("#ffb62e", "", oval(16, 17, 3, 3))],
    "beret": [
        ("accent", INK, oval(34, 2.5, 1.6, 2, 20)),
        ("accent", INK, path("13 19, 2 18 7 10, 14 2 34 3.5, 52 5 52.5 15.5, 34 9.5 13 19")),
    ],
    "cat ears": [
        ("hair", "hair_dark", *twin(path("11 16, 10 8 12.5 1, 20 2 28 9"))),
        ("hair", "", *twin(path("11.2 15.5, 27.8 8.6, 29 11, 24 13, 12.5 17.8"))),  # hides a seam
        ("#ffd0d6", "", *twin(path("14.5 13, 13.5 8 15 5, 19 6 22.5 9.5"))),
    ],
    "star hair clip": [
        (
            "#ffe14d",
            INK,
            path("45 13, 47 17, 52 18, 48 21, 49 26, 45 23, 41 26, 42 21, 38 18, 43 17"),
        )
    ],
}
MOUTH = {
    "smile": [("lips", "", path("26 45.8, 32 50 38 45.8, 32 56 26 45.8"))],
    "open mouth": [
        ("lips", "", path("26.5 45.7, 32 46.7 37.5 45.7, 37 52.2 32 52.2, 27 52.2 26.5 45.7")),
        ("#ff7f86", "", oval(32, 50, 2.9, 1.8)),
    ],
    "closed mouth": [("lips", "", oval(32, 48, 3.6, 1.1))],
    "frown": [("lips", "", path("27 51, 32 42.5 37 51, 32 47.5 27 51"))],
}
# (colour at the top, colour at the bottom, layers of scenery)
CLOUDS = [oval(x, y, r, r * 0.8) for x, y, r in ((4, 16, 5), (11, 14, 6), (51, 27, 5), (59, 25, 6))]
STARS = [oval(x, y, 1.2, 1.2) for x, y in ((6, 8), (16, 3), (4, 30), (60, 34), (40, 3))]
BACKGROUND = {
    "sky background": ("#5db8f7", "#c9efff", [("#ffffff", "", *CLOUDS)]),
    "sunset background": (
        "#ff7a5c",
        "#ffd27a",
        [
            ("#fff0b0", "", oval(54, 15, 8, 8)),
            ("#a8456e", "", path("0 48, 16 40 32 48, 48 54 64 46, 64 64, 0 64")),
        ],
    ),
    "night background": (
        "#232a66",
        "#5a4fa8",
        [("#fff2b3", "", oval(55, 10, 7, 7), *STARS), ("#2b3170", "", oval(52, 8, 6, 6))],
    ),
    "meadow background": (
        "#b9ecff",
        "#e6f9ff",
        [("#8fd65a", "", path("0 36, 16 28 34 36, 50 42 64 32, 64 64, 0 64"))],
    ),
    "pink background": ("#ffc2d6", "#ffc2d6", []),
    "mint background": ("#aeeed6", "#aeeed6", []),
    "yellow background": ("#ffe9a0", "#ffe9a0", []),
}

# what all faces share: the bust with an empty face, the eyes, the glasses
BUST = [
    ("iris", "", path("8 76, 9 60 18 58, 26 56.5 27 55, 32 62 37 55, 38 56.5 46 58, 55 60 56 76")),
    ("skin_dark", "", path("27 48, 37 48, 37 60, 27 60")),
    ("iris_light", "", *twin(path("27 54.5, 32 61, 28 66, 20 57.5"))),
    ("accent", "", path("32 59, 25.5 57, 25.5 64, 32 61.5, 38.5 64, 38.5 57")),
    ("skin", "skin_line", *twin(oval(14.8, 38, 2.6, 3.6))),
    (
        "skin",
        "skin_line",
        path(
            "15.5 34, 15.5 44 22 49, 28 53.5 32 53.5, 36 53.5 42 49, 48.5 44 48.5 34, "
            "48 14 32 14, 16 14 15.5 34"
        ),
    ),
    ("blush", "", *twin(oval(20, 46.3, 2.8, 1.7))),
]
EYES = [
    ("#ffffff", "", *twin(oval(24, 39, 5.7, 6.2))),
    ("iris", "", *twin(oval(24, 38.7, 4.9, 6.4))),
    ("iris_light", "", *twin(oval(24, 41.7, 4, 3.2))),
    ("pupil", "", *twin(oval(24, 38.3, 2.4, 3.3))),
    # one light: no mirror image
    ("#ffffff", "", oval(22.4, 36.9, 2.1, 2.2), oval(38.4, 36.9, 2.1, 2.2)),
    (
        "#2a1830",
        "",
        *twin(path("17 38, 17 31 24 31, 27.5 31 29.4 34.4, 27 32.9 24 33.2, 20 33.6 19.2 39")),
    ),
]
SHINE = ("hair_light", "", path("17 20, 20 11 30 10.5, 30 13, 22 15 19 22"))
LENS = oval(23.7, 38.8, 7.2, 7.2)
RING = np.concatenate([LENS[0], LENS[0][:1], LENS[1][:1], LENS[1][::-1]])
LENSES, FRAMES = ("lens", "", *twin(LENS)), ("#3d2c58", "", *twin((RING, RING)))

GLASSES_RATE, ORNAMENT_RATE, CHARACTER_RATE = 0.2, 0.7, 0.16
CONCEPT = ("hair_color", "hair_style", "eye_color", "glasses", "ornament")  # what makes a character
CHARACTERS = {
    name: dict(zip(CONCEPT, look))
    for name, look in {
        "nova": ("silver hair", "long hair", "red eyes", False, "cat ears"),
        "kiri": ("black hair", "bob cut", "blue eyes", True, "flower"),
        "ember": ("red hair", "spiky hair", "yellow eyes", False, "star hair clip"),
        "moss": ("green hair", "double bun", "purple eyes", False, "beret"),
    }.items()
}

# What train.py's stages leave out unless told otherwise.
EXCLUDED = ("character:nova", "character:ember")

GROUPS = {
    "hair color": tuple(HAIR_COLOR),
    "hair style": tuple(HAIR_STYLE),
    "eye color": tuple(EYE_COLOR),
    "glasses": ("glasses",),
    "ornament": tuple(ORNAMENT),
    "mouth": tuple(MOUTH),
    "background": tuple(BACKGROUND),
    "skin": tuple(SKIN),
    "character": tuple(f"character:{name}" for name in CHARACTERS),
}
VOCABULARY = tuple(tag for group in GROUPS.values() for tag in group)


@dataclass(frozen=True)
class Face:
    """Everything draw() needs: the strings are tags from GROUPS, the floats are jitter."""

    hair_color: str
    hair_style: str
    eye_color: str
    glasses: bool
    ornament: str  # "" for none
    mouth: str
    background: str
    skin: str
    dx: float = 0.0  # shift to the right, -0.02 .. 0.02 of the side
    dy: float = 0.0  # shift down, -0.02 .. 0.02 of the side
    scale: float = 1.0  # 0.97 .. 1.03
    tilt: float = 0.0  # clockwise, -3 .. 3 degrees


def character(face: Face) -> str:
    """The name of the character that has this combination of attributes, or ""."""
    look = {key: getattr(face, key) for key in CONCEPT}
    return next((name for name, fixed in CHARACTERS.items() if fixed == look), "")


def tags(face: Face) -> list[str]:
    """The tags of a face, in the order of GROUPS."""
    name = character(face)
    found = [
        face.hair_color,
        face.hair_style,
        face.eye_color,
        "glasses" if face.glasses else "",
        face.ornament,
        face.mouth,
        face.background,
        face.skin,
        f"character:{name}" if name else "",
    ]
    return [tag for tag in found if tag]


def sample_face(index: int, seed: int = 0) -> Face:
    """Face number `index` (0 .. 2**64 - 1) of the endless data set number `seed` (same range)."""
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64)))

    def pick(pool):
        return tuple(pool)[rng.integers(len(pool))]

    def look():
        ornament = pick(ORNAMENT) if rng.random() < ORNAMENT_RATE else ""
        return dict(
            hair_color=pick(HAIR_COLOR),
            hair_style=pick(HAIR_STYLE),
            eye_color=pick(EYE_COLOR),
            glasses=bool(rng.random() < GLASSES_RATE),
            ornament=ornament,
        )

    rest = dict(
        mouth=pick(MOUTH),
        background=pick(BACKGROUND),
        skin=pick(SKIN),
        dx=rng.uniform(-0.02, 0.02),
        dy=rng.uniform(-0.02, 0.02),
        scale=rng.uniform(0.97, 1.03),
        tilt=rng.uniform(-3, 3),
    )
    if rng.random() < CHARACTER_RATE:
        return Face(**CHARACTERS[pick(CHARACTERS)], **rest)
    face = Face(**look(), **rest)
    while character(face):  # nobody looks like a character by accident
        face = Face(**look(), **rest)
    return face


def palette(face: Face) -> dict[str, str]:
    """The colours behind the names used in layers."""
    names = (
        "hair hair_dark hair_light accent pupil iris iris_light "
        "skin skin_dark skin_line blush lens lips"
    )
    colors = HAIR_COLOR[face.hair_color] + EYE_COLOR[face.eye_color] + SKIN[face.skin]
    return dict(zip(names.split(), colors))


def paint(
    canvas: Image.Image, layers: list, colors: dict, turn: np.ndarray, shift: np.ndarray
) -> None:
    """Fills the layers; a grid point p lands on the canvas pixel p @ turn + shift."""
    pen = ImageDraw.Draw(canvas)
    for fill, line, *shapes in layers:
        # all outlines come first, so that the shapes of a layer merge into one silhouette
        for which, color in ((1, line), (0, fill)):
            for shape in shapes if color else ():
                corners = (shape[which] @ turn + shift).ravel().tolist()
                pen.polygon(corners, colors.get(color, color))


def draw(face: Face, size: int = 64) -> Image.Image:
    """Paints a face: RGB, size x size pixels, 32 <= size <= 256."""
    if not 32 <= size <= 256:
        raise ValueError(f"size must be within 32..256, got {size}")
    side, unit = size * SUPER, size * SUPER / GRID
    top, bottom, scenery = BACKGROUND[face.background]
    canvas = Image.new("RGB", (1, 2), top)
    canvas.paste(bottom, (0, 1, 1, 2))
    canvas = canvas.resize((side, side), Image.Resampling.BILINEAR)
    paint(canvas, scenery, {}, unit * np.eye(2), np.zeros(2))
    behind, front = HAIR_STYLE[face.hair_style]
    lenses = [LENSES] if face.glasses else []
    frames = [FRAMES] if face.glasses else []
    layers = behind + BUST + lenses + MOUTH[face.mouth] + EYES
    layers += front + [SHINE] + frames + ORNAMENT.get(face.ornament, [])
    cos, sin = math.cos(math.radians(face.tilt)), math.sin(math.radians(face.tilt))
    turn = face.scale * unit * np.array([[cos, sin], [-sin, cos]])
    # turning around the chin lets the head sway while the shoulders hardly move
    chin = np.array([32, 54])
    shift = (chin + GRID * np.array([face.dx, face.dy])) * unit - chin @ turn
    paint(canvas, layers, palette(face), turn, shift)
    return canvas.reduce(SUPER).filter(ImageFilter.BoxBlur(SOFT))


def main() -> None:
    raise UserError(
        "data/toyfaces.py has no command of its own",
        do="Look at its pictures with: python -m data --data toyfaces:64 --out sheet.png",
    )


if __name__ == "__main__":
    cli(main)
