"""From an image file, whatever it is, to RGB pixels of one shape; or a reason in a few words.

    strip = read_strip(path, 64, wide=1)   # uint8 (64, 64, 3): shorter side resized (Lanczos),
                                           # the middle of the longer
    strip = read_strip(path, 64, wide=4)   # what a random crop chooses from: the longer side may
                                           # have up to 256 pixels
    cut(strip, 0.25)                       # (64, 64, 3), a quarter of the way along
    strip = read_fitted(path, (96, 48))    # uint8 (48, 96, 3): the middle of what covers that

What an image is, its first bytes say, not its name: PNG, JPEG, WebP, GIF or BMP. Files without an
ending are looked into, those with an ending that no image has are not (a.jpg.part is not yet one).
Of an animation the first frame counts. Transparency goes on white; EXIF rotations are applied;
16 bits become 8; CMYK is converted by formula. Colour profiles are ignored: values are taken for
sRGB. An image of more than MAX_PIXELS is refused by its header, and threads wait while IN_FLIGHT
pixels are being decoded, so that memory stays below about 1 GB however many they are.
"""

import contextlib
import os
import re
import threading
import warnings
from collections.abc import Iterator
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from harness.cli import UserError
from harness.reading import check_kind, open_file

# The only decoders that are let near a downloaded file.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp")
# Endings and first bytes of images that are named in a report, not read.
OTHERS = (
    ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".tga", ".psd", ".svg", ".ico",
    ".exr", ".dng", ".apng",
)  # fmt: skip
OTHER_MAGIC = {
    "TIFF": rb"II\*\0|MM\0\*",
    "HEIC or AVIF": rb"....ftyp(avi|hei|hev|mif|msf)",
    "JPEG XL": rb"\0\0\0\x0cJXL ",
    "JPEG 2000": rb"\0\0\0\x0cjP  ",
    "PSD": rb"8BPS",
}
# First bytes of FORMATS.
MAGIC = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP|GIF8[79]a|BM....\0\0\0\0", re.S)
MAX_PIXELS = 89_478_485  # Pillow's own line: a quarter of a GiB of RGB
LARGE = 16_000_000  # pixels; an image above is decoded while no other is
# Pixels. Decoding takes up to 9 bytes for each: a palette's index, RGBA, the same multiplied.
IN_FLIGHT = 64_000_000
WIDE = 4  # of a longer side, so many times the shorter are kept for random crops
ORIENTATION = 0x0112  # EXIF's tag, and how to turn what its values stand for
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Those that swap the sides.
LYING = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
Size = tuple[int, int]  # (width, height)

gate = threading.Condition()
in_flight = 0  # pixels being decoded in this process


class BadImage(Exception):
    """Why a file is no image that can be used, in a few words."""


def sniff(path: Path) -> str:
    """ "image" for a file that begins like one we read, a reason for one that we do not, "" for
    what is no image."""
    try:
        with open_file(path) as file:
            head = file.read(16)
    except OSError as error:
        return error.strerror or "cannot be opened"
    if MAGIC.match(head):
        return "image"
    for kind, magic in OTHER_MAGIC.items():
        if re.match(magic, head, re.S):
            return f"{kind} files are not read"
    return ""


# ---- decoding -----------------------------------------------------------------------------------


def read_strip(source: Path | bytes, resolution: int, wide: int = 1) -> np.ndarray:
    """uint8 (h, w, 3): one side is `resolution`, the other from that to `wide` times it.
    BadImage says what is wrong."""
    with opened(source) as image, drafted(image, resolution):
        return shrink(image, resolution, wide)


def read_fitted(source: Path | bytes, size: Size, wide: int = 1) -> np.ndarray:
    """uint8 (h, w, 3) that covers `size`: one side is equal, the other up to `wide` times it. The
    image is resized to covering(upright_size(source), size), and its middle kept."""
    with opened(source) as image:
        whole = covering(upright(image), size)
        with drafted(image, max(size)):
            return fit(image, whole, size, wide)


@contextlib.contextmanager
def drafted(image: Image.Image, side: int) -> Iterator[None]:
    """Wait until there is room to decode an opened image, of which no side need be larger than
    four times `side`."""
    pixels = image.width * image.height
    # A JPEG decodes at 1/2, 1/4 or 1/8 where that is plenty.
    image.draft(None, (4 * side, 4 * side))
    baseline = image.format == "JPEG" and "progressive" not in image.info
    if baseline and pixels <= LARGE:  # the others are held at full size
        pixels = image.width * image.height
    with taken(IN_FLIGHT if pixels > LARGE else pixels):
        yield


def read_size(source: Path | bytes) -> Size:
    """(width, height) of an image by its header, where read_strip would not refuse that."""
    with opened(source) as image:
        return image.size


def upright_size(source: Path | bytes) -> Size:
    """(width, height) of an image as it is shown, by its header; BadImage as in read_strip."""
    with opened(source) as image:
        return upright(image)


def upright(file: Image.Image) -> Size:
    width, height = file.size
    return (height, width) if orientation(file) in LYING else (width, height)


@contextlib.contextmanager
def opened(source: Path | bytes) -> Iterator[Image.Image]:
    """An image whose header was read; what is wrong with it then or later is a BadImage. Every file
    that training or a metric looks into is opened here."""
    set_up_pillow()
    try:
        file = source if isinstance(source, Path) else BytesIO(source)
        if isinstance(source, Path):
            check_kind(source, source.stat().st_mode)
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width}×{image.height} is over {megapixels()}")
            yield image
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # damaged bytes can mean anything to a decoder
        raise BadImage(reason(error, source)) from None


@lru_cache
def set_up_pillow() -> None:
    """What decoding wants of Pillow, once in a process."""
    # Images that large are refused by opened(), by name.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    # A large image lies in one piece: smaller ones are kept by malloc for the next, 64 MB a thread.
    Image.core.set_block_size(2**29)


@contextlib.contextmanager
def taken(pixels: int) -> Iterator[None]:
    """Wait until so many more may be decoded."""
    global in_flight
    with gate:
        gate.wait_for(lambda: in_flight + pixels <= IN_FLIGHT)
        in_flight += pixels
    try:
        yield
    finally:
        with gate:
            in_flight -= pixels
            gate.notify_all()


def megapixels() -> str:
    return f"{MAX_PIXELS // 10**6} megapixels"


def reason(error: Exception, source: Path | bytes) -> str:
    """A few words for what a decoder said."""
    if isinstance(source, bytes):
        empty = not source
    else:
        empty = os.path.exists(source) and not os.path.getsize(source)
    if empty:
        return "empty"
    if isinstance(error, UnidentifiedImageError):
        return f"not {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
    if isinstance(error, Image.DecompressionBombError):
        return f"over {megapixels()}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:80]
    return " ".join(str(error).split())[:80] or type(error).__name__


def shrink(file: Image.Image, resolution: int, wide: int) -> np.ndarray:
    """Decode an opened image and resize the part of it that is kept."""
    file.load()  # first: a second attempt at damaged rows raises nothing
    turn = orientation(file)
    image = to_8_bits(file)
    size = resolution, resolution
    image = covered(image, covering(image.size, size), size, wide)
    # Turned after resizing, when there is less to turn.
    return np.asarray(image if turn is None else image.transpose(turn))


def fit(file: Image.Image, whole: Size, size: Size, wide: int) -> np.ndarray:
    """Decode an opened image and resize the part of it that is kept, all of it being `whole` then.
    It is upright first: so the middle is that of the upright image to the pixel."""
    file.load()
    turn = orientation(file)
    image = to_8_bits(file)
    image = image if turn is None else image.transpose(turn)
    return np.asarray(covered(image, whole, size, wide))


def covering(original: Size, size: Size) -> Size:
    """The smallest size of an image's shape that covers another one."""
    scale = max(part / side for part, side in zip(size, original))
    width, height = (max(round(side * scale), part) for part, side in zip(size, original))
    return width, height


def kept_of(whole: Size, size: Size, wide: int) -> Size:
    """How much of a resized whole is kept, for crops of a size."""
    width, height = (min(side, wide * part) for side, part in zip(whole, size))
    return width, height


def covered(image: Image.Image, whole: Size, size: Size, wide: int) -> Image.Image:
    """The middle of an image (kept_of) that is resized to `whole`, as RGB over white."""
    kept = kept_of(whole, size, wide)
    # Where the kept part starts, in pixels of the resized whole: hence no blur by half a pixel.
    start = [(side - part) // 2 for side, part in zip(whole, kept)]
    step = [have / side for have, side in zip(image.size, whole)]
    left, top = start[0] * step[0], start[1] * step[1]
    right = min((start[0] + kept[0]) * step[0], image.width)
    bottom = min((start[1] + kept[1]) * step[1], image.height)
    image = image.resize(kept, Image.Resampling.LANCZOS, (left, top, right, bottom))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_8_bits(file: Image.Image) -> Image.Image:
    """An opened image as L, RGB or RGBA."""
    if file.mode.startswith("I;16") or file.mode == "I":
        # 16-bit grey: convert() would clip it at 255.
        return Image.fromarray((np.asarray(file) >> 8).clip(0, 255).astype(np.uint8))
    transparent = "A" in file.getbands() or "transparency" in file.info
    mode = "RGBA" if transparent else "RGB"
    return file if file.mode == mode else file.convert(mode)


def orientation(file: Image.Image) -> Image.Transpose | None:
    """How to turn a decoded image upright. A picture with unreadable EXIF is still a picture."""
    try:
        return TURNS.get(file.getexif().get(ORIENTATION))
    except Exception:  # see read_strip
        return None


# ---- what others use ----------------------------------------------------------------------------


def cut(strip: np.ndarray, where: float | None = None, size: Size | None = None) -> np.ndarray:
    """A square of a strip, or (width, height) of it: its middle, or what is at `where` in [0, 1)
    along the side that is too long."""
    H, W = strip.shape[:2]
    w, h = size or (min(H, W), min(H, W))
    left, top = start_of(W - w, where), start_of(H - h, where)
    return strip[top : top + h, left : left + w]


def start_of(slack: int, where: float | None) -> int:
    """Where a crop starts that leaves `slack` pixels out: the middle, or `where` in [0, 1)."""
    return slack // 2 if where is None else int(where * (slack + 1))


def decode(path: Path, resolution: int) -> np.ndarray:
    """An image file to (resolution, resolution, 3) uint8: RGB over white, shorter side resized,
    centre crop."""
    return read_strip(path, resolution)


def read_picture(path: str, resolution: int) -> Tensor:
    """An image file as uint8 (3, resolution, resolution): shorter side resized, centre crop."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder, wanted an image", do="Name an image in it.")
    try:
        pixels = decode(Path(path), resolution)
    except BadImage as error:
        raise UserError(f"{path}: {error}", do="Give an image.") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def read_mask(path: str, like: tuple[str, ...], resolution: int) -> Tensor:
    """A mask file as bool (1, 1, resolution, resolution), white = True, resized and cropped as the
    images `like` it, whose size it must have."""
    mask = read_picture(path, resolution).float().mean(0) > 127
    sizes = {}
    for name in (path, *like):
        sizes[name] = "×".join(map(str, read_size(Path(name))))
        if sizes[name] != sizes[path]:
            raise UserError(
                f"--mask {path} is {sizes[path]}, but {name} is {sizes[name]}",
                do="Make them the same size.",
            )
    return mask[None, None]


def to_float(images: Tensor) -> Tensor:
    """uint8 images -> fp32 in [-1, 1]."""
    return images.float() / 127.5 - 1
