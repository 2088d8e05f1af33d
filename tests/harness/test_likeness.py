"""What a PNG says of how it was drawn, written and read back."""

import json
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from harness.cli import UserError, flag
from harness.likeness import OWN, check_same, chunks, parse_like
from harness.pictures import save_all

PRINT = "ab" * 32  # a fingerprint


@dataclass(frozen=True)
class Config:
    ckpt: str = flag()
    seed: int = flag(0, low=0)
    prompt: str = flag("")
    negative: str | None = flag(None)
    labels: tuple[str, ...] = flag(())
    cfg: float = flag(1.0)
    method: Literal["", "heun", "dpmpp_2m", "ddim"] = flag("")
    eta: float | None = flag(None, of="--method ddim")
    zero_snr: bool = flag(False)
    clip_skip: int = flag(0)
    vae: str = flag("")
    init: tuple[str, ...] = flag(())
    betas: str = flag("")
    lora: tuple[str, ...] = flag(())
    n: int = flag(16)
    out: str = flag("", writes="folder")
    like: str = flag("")


DRAWN = Config(
    "secret/model.safetensors",
    seed=7,
    prompt='a "red, (hair:1.2)" — 初音\nsecond line',
    negative="",
    labels=("red hair",),
    cfg=6.5,
    method="ddim",
    eta=0.25,
    zero_snr=True,
    clip_skip=2,
    n=1,
    out="secret/out",
)
SOLVER = {"method": "dpmpp_2m", "steps": 25, "grid": "karras"}


def png(path, cfg, size=(64, 48)):
    path.mkdir()
    images = torch.zeros(1, 3, *size, dtype=torch.uint8)
    texts = chunks(cfg, SOLVER, size, "model", PRINT)
    save_all(images, path, cfg.seed, grid=False, said=lambda seed: texts)
    return path / f"{cfg.seed:06d}.png"


def like(monkeypatch, path, *words):
    argv = ["samplers.py", "--ckpt", "other.safetensors", "--like", str(path), *words]
    monkeypatch.setattr("sys.argv", argv)
    return parse_like(Config)[0]


def test_a_png_gives_back_the_settings_that_drew_it(tmp_path, monkeypatch):
    path = png(tmp_path / "a", DRAWN)
    wanted = replace(DRAWN, ckpt="other.safetensors", out="", like=str(path))
    assert like(monkeypatch, path) == wanted
    assert like(monkeypatch, path, "--cfg", "2", "--n", "3") == replace(wanted, cfg=2.0, n=3)
    # What the user's method does not know is left out.
    assert like(monkeypatch, path, "--method", "heun") == replace(wanted, method="heun", eta=None)


def test_other_programs_read_what_a1111_writes(tmp_path):
    cfg = replace(DRAWN, prompt="a cat", negative="blurry, red")
    with Image.open(png(tmp_path / "a", cfg)) as image:
        assert image.info["parameters"].split("\n") == [
            "a cat",
            "Negative prompt: blurry, red",
            "Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 7, "
            "Size: 48x64, Model: model, Fingerprint: abababababab, Clip skip: 2, "
            "Version: twinpath",
        ]
        assert "secret" not in str(image.info)
    other = chunks(replace(cfg, seed=0), SOLVER, (8, 8), 'a, "b"', PRINT)["parameters"]
    assert "Seed: 0, " in other and r', Model: "a, \"b\"", ' in other


def test_files_are_not_named_but_missed(tmp_path, monkeypatch, capsys):
    cfg = replace(DRAWN, vae="secret.safetensors", init=("a.png",), betas="secret.json")
    cfg = replace(cfg, lora=("secret.safetensors:0.8",))
    path = png(tmp_path / "a", cfg)
    assert b"secret" not in path.read_bytes()
    found = like(monkeypatch, path, "--init", "b.png")
    assert (found.vae, found.init, found.betas) == ("", ("b.png",), "")
    assert "was drawn with --vae, --betas, --lora, too, which it" in capsys.readouterr().err


def test_a_line_of_a_file_that_begins_with_the_sign_of_files_stays_text(tmp_path, monkeypatch):
    path = png(tmp_path / "a", replace(DRAWN, prompt="@home"))
    assert like(monkeypatch, path).prompt == " @home"


def test_other_weights_are_said(tmp_path, capsys):
    path = str(png(tmp_path / "a", DRAWN))
    check_same(path, PRINT)
    check_same("", "cd" * 32)
    assert capsys.readouterr().err == ""
    check_same(path, "cd" * 32)
    assert f"{path} was drawn by other weights (abababababab) than" in capsys.readouterr().err


def strange(value):
    return json.dumps({"flags": value, "withheld": []})


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "does not say how it was drawn"),
        ("{", "is no JSON"),
        ("[]", "flags"),
        (json.dumps({"flags": [1], "withheld": []}), "flags"),
        (strange(["--ckpt=hf:some/where"]), "says '--ckpt=hf:some/where': wanted a setting"),
        (strange(["--vae=hf:some/where"]), "says '--vae=hf:some/where'"),
        (strange(["--lora=a.safetensors"]), "says '--lora=a.safetensors'"),
        (strange(["--out=/"]), "says '--out=/'"),
        (strange(["--prompt=@/etc/passwd"]), "says '--prompt=@/etc/passwd'"),
        (strange(["--betas=/a.json"]), "says '--betas=/a.json'"),
        (strange(["--help"]), "says '--help'"),
        (strange(["cat"]), "says 'cat'"),
        (strange(["--seed=-1"]), "--seed -1: wanted at least 0"),
        (strange(["--cfg=high"]), "--cfg takes float, got 'high'"),
        (strange(["--cfg=1"] * 101), "flags"),
    ],
)
def test_a_strangers_png_opens_nothing_and_ends_in_one_line(tmp_path, monkeypatch, text, message):
    path, info = tmp_path / "a.png", PngInfo()
    if text is not None:
        info.add_text(OWN, text)
    Image.new("RGB", (2, 2)).save(path, pnginfo=info)
    with pytest.raises(UserError) as error:
        like(monkeypatch, path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR"])
def test_what_is_no_png_is_refused(tmp_path, monkeypatch, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is (no|a damaged) PNG"):
        like(monkeypatch, path)
    with pytest.raises(FileNotFoundError):
        like(monkeypatch, tmp_path / "none.png")


def test_a_prompt_may_end_like_a_file(tmp_path, monkeypatch):
    path = png(tmp_path / "a", replace(DRAWN, prompt="a file.json", negative="x.json"))
    drawn = like(monkeypatch, path)
    assert (drawn.prompt, drawn.negative) == ("a file.json", "x.json")
