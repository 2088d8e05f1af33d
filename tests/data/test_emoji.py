"""Emoji as a folder: two packages of npm's layout with three emoji, against what was put in."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from data import emoji
from data.sources import open_source

ROWS = [
    {"label": "red heart", "hexcode": "2764-FE0F", "tags": ["love", "heart"], "group": 0},
    {"label": "copyright", "hexcode": "00A9"},
    {"label": "umbrella", "hexcode": "2602-FE0F", "tags": ["rain"]},
    {"label": "no picture", "hexcode": "1F999", "tags": ["none"]},
]


def add(tar, name, data):
    member = tarfile.TarInfo(f"package/{name}")
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def png(colour):
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste(colour, (16, 16, 48, 48))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def packages(tmp_path):
    with tarfile.open(tmp_path / emoji.WORDS, "w:gz") as tar:
        add(tar, "en/data.json", json.dumps(ROWS).encode())
    with tarfile.open(tmp_path / emoji.PICTURES, "w:gz") as tar:
        add(tar, "img/twitter/64/2764-fe0f.png", png((255, 0, 0, 255)))
        add(tar, "img/twitter/64/00a9-fe0f.png", png((0, 0, 255, 128)))
        add(tar, "img/twitter/64/2602.png", png((0, 255, 0, 255)))
        add(tar, "img/apple/64/1f999.png", png((0, 0, 0, 255)))
    return tmp_path


def test_each_has_its_picture_over_white_its_label_and_its_tags(packages, user):
    out = packages / "out"
    code, _, lines = user(emoji.main, "--packages", packages, "--out", out)
    assert (code, lines[-1]) == (0, "3 emoji with a label and tags each")
    source = open_source(str(out), 64)
    assert list(source.names) == ["00a9.png", "2602-fe0f.png", "2764-fe0f.png"]
    assert [list(tags) for tags in source.tags] == [["copyright"], ["rain"], ["love", "heart"]]
    assert source.captions() == ["copyright", "umbrella", "red heart"]
    for name, middle in (("2764-fe0f", (255, 0, 0)), ("00a9", (127, 127, 255))):
        pixels = np.asarray(Image.open(out / f"{name}.png")).astype(int)
        assert pixels.shape == (64, 64, 3) and (pixels[:16] == 255).all()
        assert abs(pixels[32, 32] - middle).max() <= 1


def test_a_package_that_is_missing_or_damaged_is_named(packages, user):
    flags = ("--packages", packages, "--out", packages / "out")
    whole = (packages / emoji.PICTURES).read_bytes()
    for data in (whole[:60], b"no archive", b""):
        (packages / emoji.PICTURES).write_bytes(data)
        code, _, lines = user(emoji.main, *flags)
        assert code == 2 and len(lines) == 1 and "npm pack emoji-datasource" in lines[0]
    for pictures, said in (({"2764-fe0f": b"x"}, "2764-fe0f.png: Unid"), ({}, "no picture of any")):
        with tarfile.open(packages / emoji.PICTURES, "w:gz") as tar:
            for name, data in pictures.items():
                add(tar, f"img/twitter/64/{name}.png", data)
        code, _, lines = user(emoji.main, *flags)
        assert code == 2 and len(lines) == 1 and said in lines[0] and "npm pack" in lines[0]
    # A name that led out of the folder would write there.
    for row in ({"label": "x"}, {"label": "x", "hexcode": "../../2764"}):
        with tarfile.open(packages / emoji.WORDS, "w:gz") as tar:
            add(tar, "en/data.json", json.dumps([row]).encode())
        code, _, lines = user(emoji.main, *flags)
        assert code == 2 and len(lines) == 1 and "hexcode" in lines[0]
        assert lines[0].count("npm pack") == 1
    damaged = bytearray((packages / emoji.WORDS).read_bytes())
    damaged[40:60] = bytes(20)
    (packages / emoji.WORDS).write_bytes(damaged)
    code, _, lines = user(emoji.main, *flags)
    assert code == 2 and len(lines) == 1 and "a package is damaged" in lines[0]
    (packages / emoji.WORDS).unlink()
    code, _, lines = user(emoji.main, *flags)
    assert code == 2 and "emojibase-data-17.0.0.tgz is not there" in lines[0]
