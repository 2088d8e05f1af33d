"""Damaged and odd image files: each is used, and shows what it should, or is named with a reason;
memory stays bounded."""

import os
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageCms

import data.images as images
from data.dataset import open_dataset
from data.images import BadImage, cut, decode, read_strip

RED, BLUE = (230, 20, 30), (20, 30, 230)


def half(width=48, height=32, mode="RGB"):
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), BLUE)
    image.paste(RED, (0, 0, width // 2, height))
    return image.convert(mode)


def png(width, height, depth, color, rows, good=True):
    """A PNG written by hand."""

    def chunk(kind, data):
        wrong = not good and kind == b"IHDR"
        checksum = zlib.crc32(kind + data) ^ wrong
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def exif(turn):
    tags = Image.Exif()
    tags[0x0112] = turn
    return tags


def build(root: Path) -> tuple[dict, dict]:
    """The corpus: used name -> (left colour, right colour) of the centre square, and unusable
    name -> why."""
    used, bad = {}, {}
    sides = (RED, BLUE)

    def good(name, image, expect=sides, **how):
        image.save(root / name, **how)
        used[name] = expect

    for end in ("png", "jpg", "webp", "gif", "bmp", "jpeg", "jfif", "PNG", "JPG"):
        good(f"plain-{end}.{end}", half(), **({"format": "JPEG"} if end == "jfif" else {}))
    good("jpeg-called.png", half(), format="JPEG")
    good("png-called.jpg", half(), format="PNG")
    good("webp-called.jpeg", half(), format="WEBP")
    good("gif-called.png", half(), format="GIF")
    good("1x1.png", Image.new("RGB", (1, 1), RED), (RED, RED))
    good("1x1.jpg", Image.new("RGB", (1, 1), RED), (RED, RED), quality=100)
    good("wide.png", half(20_000, 40))
    good("wider.png", half(20_000, 1), None)  # what is kept is two pixels of the middle, blurred
    good("tall.jpg", half(20_000, 40).transpose(Image.Transpose.ROTATE_270), None)
    good(
        "animated.gif",
        half(),
        save_all=True,
        append_images=[Image.new("RGB", (48, 32), "lime")] * 3,
    )
    good(
        "animated.webp",
        half(),
        save_all=True,
        append_images=[Image.new("RGB", (48, 32), "lime")] * 3,
        lossless=True,
    )
    good(
        "animated.png",
        half(),
        save_all=True,
        append_images=[Image.new("RGB", (48, 32), "lime")] * 3,
    )
    good("cmyk.jpg", half(mode="CMYK"))
    good("progressive.jpg", half(), progressive=True)
    good(
        "grey.png",
        half(mode="L"),
        (half(mode="L").getpixel((0, 0)), half(mode="L").getpixel((47, 0))),
    )
    good(
        "grey.jpg",
        half(mode="L"),
        (half(mode="L").getpixel((0, 0)), half(mode="L").getpixel((47, 0))),
    )
    good(
        "grey16.png",
        Image.fromarray(np.repeat([[60_000] * 24 + [9_000] * 24], 32, 0).astype(np.uint16)),
        (60_000 >> 8, 9_000 >> 8),
    )
    good("bits.png", half(mode="L").point(lambda v: 255 * (v > 60)).convert("1"), (255, 0))
    good("palette.png", half().quantize(4))
    clear = half(mode="RGBA")
    clear.putalpha(Image.fromarray(np.repeat([[255] * 24 + [0] * 24], 32, 0).astype(np.uint8)))
    good("alpha.png", clear, (RED, 255))
    good("alpha.webp", clear, (RED, 255), lossless=True)
    good(
        "palette-alpha.png",
        half().quantize(4),
        (255, BLUE),
        transparency=half().quantize(4).getpixel((0, 0)),
    )
    good("palette-alphas.png", clear.quantize(8), (RED, 255))
    good(
        "clear.gif",
        half().quantize(4),
        (255, BLUE),
        transparency=half().quantize(4).getpixel((0, 0)),
    )
    good("la.png", clear.convert("LA"), (half(mode="L").getpixel((0, 0)), 255))
    good("key.png", half(), (255, BLUE), transparency=RED)
    good(
        "icc.png",
        half(),
        icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(),
    )
    good("bad-icc.jpg", half(), icc_profile=b"nonsense")
    for end in ("jpg", "png", "webp"):
        good(f"bad-exif.{end}", half(), exif=b"Exif\0\0\0\x4d\x4d\xd7\x2a nonsense")
    for turn, undo in {
        1: None,
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
        8: "ROTATE_270",
    }.items():
        good(
            f"turn-{turn}.jpg",
            half().transpose(Image.Transpose[undo]) if undo else half(),
            exif=exif(turn),
            quality=95,
        )
    good("turn-6.png", half().transpose(Image.Transpose.ROTATE_90), exif=exif(6))

    def raw(name, data, expect):
        (root / name).write_bytes(data)
        used[name] = expect

    raw("rgb16.png", png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 60_000, 0, 0, 0, 0, 60_000)), None)
    raw("odd \u00e9\u4e2d\n.png", (root / "plain-png.png").read_bytes(), sides)
    os.symlink("plain-png.png", root / "linked.png")
    used["linked.png"] = sides
    (root / "folder.png").mkdir()
    good("folder.png/inside.png", half())
    os.symlink("..", root / "folder.png" / "loop")
    if sys.platform == "linux":
        Path(os.fsdecode(os.fsencode(root) + b"/latin-\xe9.png")).write_bytes(
            (root / "plain-png.png").read_bytes()
        )
        used[os.fsdecode(b"latin-\xe9.png")] = sides

    whole = {
        end: (root / f"plain-{end}.{end}").read_bytes()
        for end in ("png", "jpg", "webp", "bmp", "gif")
    }
    for end, data in whole.items():
        (root / f"cut.{end}").write_bytes(data[: len(data) * 2 // 3])
        bad[f"cut.{end}"] = ""
        (root / f"head.{end}").write_bytes(data[:20])
        bad[f"head.{end}"] = ""
        (root / f"zero.{end}").write_bytes(b"")
        bad[f"zero.{end}"] = "empty"
    for name, data, why in (
        ("text.png", b"hello", "not PNG"),
        ("page.jpg", b"<!DOCTYPE html><html>404</html>", "not PNG"),
        ("nul.png", bytes(4096), "not PNG"),
        ("noise.webp", np.random.default_rng(0).bytes(5000), "not PNG"),
        ("lfs.png", b"version https://git-lfs.github.com/spec/v1\noid x", "not PNG"),
        ("_plain.jpg", b"\0\5\x16\7\0\2\0\0Mac OS X", "not PNG"),
        ("vector.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not PNG"),
        ("svg.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not PNG"),
        ("bomb.png", png(60_000, 60_000, 8, 2, bytes(1000)), "megapixels"),
        ("large.png", png(10_000, 10_000, 8, 2, bytes(1000)), "10000×10000 is over 89 megapixels"),
        ("bomb.gif", b"GIF89a\xff\xff\xff\xff" + whole["gif"][10:], "megapixels"),
        (
            "bomb.jpg",
            whole["jpg"].replace(struct.pack(">HH", 32, 48), struct.pack(">HH", 65_000, 65_000), 1),
            "megapixels",
        ),
        (
            "bomb.bmp",
            whole["bmp"][:18] + struct.pack("<ii", 50_000, 50_000) + whole["bmp"][26:],
            "megapixels",
        ),
        ("no-width.png", png(0, 9, 8, 2, b""), ""),
        ("bad-crc.png", png(9, 9, 8, 2, bytes(280), good=False), ""),
        ("short-rows.png", png(90, 90, 8, 2, bytes(280)), ""),
        ("bad-rows.png", whole["png"].replace(b"IDAT", b"IDAT\xff\xff", 1), ""),
    ):
        (root / name).write_bytes(data)
        bad[name] = why
    half().save(root / "tiff-called.png", format="TIFF")
    Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(root / "nan.tif")
    for name in ("photo.HEIC", "photo.avif", "layers.psd"):
        (root / name).write_bytes(b"\0\0\0\x18ftypheic")
        bad[name] = f"{Path(name).suffix.lower()} files are not read"
    bad |= {"tiff-called.png": "not PNG", "nan.tif": ".tif files are not read"}
    os.symlink("nowhere", root / "broken.png")
    os.symlink("ring.png", root / "ring.png")
    os.mkfifo(root / "pipe.png")
    return used, bad | {
        "broken.png": "a link to nothing",
        "ring.png": "a link to nothing",
        "pipe.png": "not a file",
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    return root, *build(root)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_corpus_of_damaged_and_odd_files_is_used_or_named(corpus, crop):
    root, used, bad = corpus
    assert len(bad) >= 40 and len(used) >= 40
    ds = open_dataset(str(root), resolution=32, holdout=0, crop=crop)
    assert set(ds.source.names) == set(used)
    assert set(ds.source.unreadable) == set(bad)
    for name, why in bad.items():
        assert why in ds.source.unreadable[name] and 3 < len(ds.source.unreadable[name]) < 100, (
            name,
            ds.source.unreadable[name],
        )
    assert (
        f"{len(used) + len(bad)} found = {len(used)} used + 0 held out + "
        f"0 left out by stage=standard + {len(bad)} unreadable" in ds.report
    )
    ds.report.encode()  # file names of any bytes can be printed
    for i, name in enumerate(ds.source.names):
        pixels = ds[i].image.permute(1, 2, 0).numpy().astype(int)
        assert pixels.shape == (32, 32, 3)
        if used[name]:
            for got, wanted in zip((pixels[:, 3:10], pixels[:, 22:29]), used[name]):
                assert np.abs(got - np.broadcast_to(wanted, (3,))).max() <= 12, (
                    name,
                    got[16, 3],
                    wanted,
                )


def test_files_that_cannot_be_opened_are_named():
    root = Path(tempfile.mkdtemp(dir="/tmp"))  # where other users may look
    root.chmod(0o755)
    half().save(root / "a.png")
    half().save(root / "locked.png")
    (root / "vault").mkdir()
    half().save(root / "vault/b.png")
    (root / "locked.png").chmod(0)
    (root / "vault").chmod(0)
    me = os.geteuid()
    try:
        if me == 0:  # nothing is locked to root
            os.seteuid(65534)
        ds = open_dataset(str(root), resolution=32, holdout=0)
    finally:
        os.seteuid(me)
    assert ds.source.names == ["a.png"] and ds.source.unreadable == {
        "locked.png": "Permission denied",
        "vault": "a folder: Permission denied",
    }
    assert "3 found = 1 used" in ds.report and "vault (a folder: Permission denied)" in ds.report


def lanczos(pixels, size, start, count):
    """Output samples start … start + count of resizing axis 0 to `size`: windowed sinc of radius
    3, in float64."""
    scale = len(pixels) / size
    wide, rows = max(scale, 1.0), []
    for k in range(start, start + count):
        distance = (np.arange(len(pixels)) + 0.5 - (k + 0.5) * scale) / wide
        weight = np.sinc(distance) * np.sinc(distance / 3) * (np.abs(distance) < 3)
        rows.append(np.tensordot(weight / weight.sum(), pixels, 1))
    return np.stack(rows)


@pytest.mark.parametrize(
    "width, height, wide",
    [(131, 97, 1), (131, 97, 4), (40, 300, 4), (40, 300, 1), (20, 30, 1), (700, 64, 4)],
)
def test_strips_are_lanczos_of_the_whole_image_cropped(tmp_path, width, height, wide):
    r = np.random.default_rng(width)
    image = Image.fromarray(
        r.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    ).resize((width, height), Image.Resampling.BICUBIC)
    image.save(tmp_path / "x.png")
    strip = read_strip(tmp_path / "x.png", 32, wide)
    scale = 32 / min(width, height)
    W, H = max(round(width * scale), 32), max(round(height * scale), 32)
    w, h = min(W, 32 * wide), min(H, 32 * wide)
    assert strip.shape == (h, w, 3)
    rows = lanczos(np.asarray(image, float), H, (H - h) // 2, h)
    wanted = lanczos(rows.swapaxes(0, 1), W, (W - w) // 2, w).swapaxes(0, 1).clip(0, 255)
    assert np.abs(strip - wanted).max() < 2.5 and np.abs(strip - wanted).mean() < 0.4
    assert np.abs(cut(strip).astype(int) - decode(tmp_path / "x.png", 32)).max() <= 1


def test_crops_slide_along_the_longer_side():
    strip = np.arange(100, dtype=np.uint8).reshape(1, 100, 1).repeat(32, 0).repeat(3, 2)
    assert (
        cut(strip, 0.0)[0, 0, 0] == 0
        and cut(strip, 0.9999)[0, -1, 0] == 99
        and cut(strip)[0, 0, 0] == 34
    )
    assert np.array_equal(cut(strip.swapaxes(0, 1), 0.5), cut(strip, 0.5).swapaxes(0, 1))
    first = [int(cut(strip, where)[0, 0, 0]) for where in np.linspace(0, 0.99999, 6900)]
    assert np.array_equal(np.bincount(first), [100] * 69)  # each of the 69 places is as likely


def test_jpegs_decoded_at_a_fraction_look_the_same(tmp_path):
    r = np.random.default_rng(0)
    Image.fromarray(r.integers(0, 256, (30, 40, 3), np.uint8)).resize(
        (2000, 1500), Image.Resampling.BICUBIC
    ).save(tmp_path / "x.jpg", quality=95)
    with Image.open(tmp_path / "x.jpg") as file:
        file.draft = lambda *_: None
        whole = images.shrink(file, 64, 1).astype(int)
    fast = decode(tmp_path / "x.jpg", 64)
    assert 0 < np.abs(fast - whole).mean() < 1.0 and np.abs(fast - whole).max() < 12


MEMORY = """
import re, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import data.images as images
# not ru_maxrss, which a process has from its parent at first
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
threads, paths = int(sys.argv[1]), sys.argv[2:]
def read(path):
    try: images.read_strip(Path(path), 64)
    except images.BadImage as error: return str(error)
before = peak()
with ThreadPoolExecutor(threads) as pool: results = list(pool.map(read, paths))
print(peak() - before, images.in_flight, results)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize("side, threads, limit", [(4500, 4, 260), (4000, 16, 850), (1000, 16, 260)])
def test_memory_is_bounded_however_many_threads_meet_large_images(tmp_path, side, threads, limit):
    """Palette with transparency takes most: 9 bytes a pixel. Of 20 megapixels one at a time, of 16
    four, of one all 16."""
    Image.new("P", (side, side)).save(tmp_path / "a.png", transparency=0, compress_level=1)
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000, 8, 2, bytes(1000)))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            MEMORY,
            str(threads),
            *[tmp_path / "a.png"] * threads,
            tmp_path / "bomb.png",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    grown, left, results = done.stdout.split(" ", 2)
    assert results.count("None") == threads and "over 89 megapixels" in results and left == "0"
    assert int(grown) < limit, f"{grown} MB"


def test_a_damaged_image_gives_its_room_back(tmp_path, monkeypatch):
    half(400, 400).save(tmp_path / "x.png")
    whole = (tmp_path / "x.png").read_bytes()
    monkeypatch.setattr(images, "IN_FLIGHT", 400 * 400)
    for _ in range(3):  # a second one would wait for ever
        with pytest.raises(BadImage):
            read_strip(whole[: len(whole) // 2], 32)
    assert read_strip(whole, 32).shape == (32, 32, 3) and images.in_flight == 0


def test_one_reason_for_bytes_and_files(tmp_path):
    for data, why in ((b"", "empty"), (b"hello", "not PNG, JPEG, WEBP, GIF or BMP")):
        (tmp_path / "x").write_bytes(data)
        for source in (data, tmp_path / "x"):
            with pytest.raises(BadImage, match=why):
                read_strip(source, 32)
    with pytest.raises(BadImage, match="No such file"):
        read_strip(tmp_path / "gone", 32)


def test_decode_keeps_the_middle_and_puts_alpha_on_white(tmp_path):
    wide = np.zeros((50, 150, 3), np.uint8)
    wide[:, 50:100] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert decode(tmp_path / "wide.png", 50).min() == 200
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert decode(tmp_path / "clear.png", 4).min() == 255
    Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(tmp_path / "deep.png")
    assert set(decode(tmp_path / "deep.png", 8).ravel()) == {30_000 >> 8}
    exif = Image.Exif()
    exif[274] = 6  # "rotate me by 90 degrees"
    half = np.zeros((20, 40, 3), np.uint8)
    half[:, :20] = 255
    Image.fromarray(half).save(tmp_path / "phone.jpg", exif=exif, quality=100)
    assert (
        decode(tmp_path / "phone.jpg", 20)[:3].min()
        > 200
        > 50
        > decode(tmp_path / "phone.jpg", 20)[-3:].max()
    )
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png")
    assert decode(tmp_path / "grey.png", 8).shape == (8, 8, 3)
