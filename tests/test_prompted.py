"""Commands that draw from prompts: what their PNGs say, weights, and students of prompts."""


import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import Image


import distill
import samplers
import text
import train
from ckpt import find_checkpoint, load_unet
from ckpt.convert import inspect
from data.emphasis import weighted
from text import open_texts

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
import pipelines  # noqa: E402


@pytest.fixture(scope="module")
def sd1():
    """A pipeline's folder."""
    return pipelines.made("sd1")[1]


def pictures(folder):
    """[(pixels (H, W, 3), texts)] of a folder's PNGs."""
    found = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            found.append((np.asarray(image).astype(int), image.info))
    return found


def test_a_png_says_how_it_was_drawn_and_is_drawn_again(sd1, tmp_path, user):
    (tmp_path / "prompts.txt").write_text("a cat, (red:1.3)\na dog\n")
    a, b = tmp_path / "a", tmp_path / "b"
    words = ["--ckpt", sd1, "--prompt", f"@{tmp_path / 'prompts.txt'}", "--negative", "blurry"]
    words += ["--cfg", 4, "--steps", 2, "--n", 3, "--seed", 5, "--size", "64x96", "--out", a]
    code, _, err = user(samplers.main, *words, "--prompt-weights", "comfy")
    assert code == 0, err
    drawn = pictures(a)
    lines = drawn[1][1]["parameters"].split("\n")
    assert lines[:2] == ["a dog", "Negative prompt: blurry"]
    assert "Steps: 2, Sampler: Heun, " in lines[2]
    assert "CFG scale: 4, Seed: 6, Size: 64x96" in lines[2]
    assert drawn[0][1]["parameters"] == drawn[2][1]["parameters"].replace("Seed: 7", "Seed: 5")
    for i in range(3):
        like = a / f"{5 + i:06d}.png"
        code, _, err = user(samplers.main, "--ckpt", sd1, "--like", like, "--out", b)
        assert code == 0 and not [line for line in err if "warning" in line], err
        (again,) = pictures(b)
        assert abs(again[0] - drawn[i][0]).max() <= 1  # in a batch of another size
        assert again[1]["parameters"] == drawn[i][1]["parameters"]
    words = ["--ckpt", sd1, "--like", a / "000005.png", "--prompt-weights", "none", "--out", b]
    assert user(samplers.main, *words)[0] == 0
    assert abs(pictures(b)[0][0] - drawn[0][0]).max() > 1


@pytest.mark.parametrize("dialect", ["none", "a1111", "comfy"])
def test_a_network_is_told_what_a_dialect_reads(sd1, dialect):
    flags = {"prompt": "a (red:1.3) cat", "negative": "[dog]", "cfg": 3.0}
    flags |= {"resolution": 64, "prompt_weights": dialect}
    gen = samplers.open_generator(samplers.Sampling(str(sd1), **flags), torch.device("cpu"))
    texts = weighted(open_texts(sd1), dialect)
    assert torch.equal(gen.told.cond["context"], texts.tell(["a (red:1.3) cat"]).context)
    assert torch.equal(gen.told.null["context"], texts.null("[dog]").context)
    assert gen.sampled.get("prompt weights", "none") == dialect


def test_the_command_of_inspect_draws(sd1, tmp_path, user):
    one = tmp_path / "one file.safetensors"
    one.symlink_to(pipelines.single_file("sd1"))
    for path, heads in ((sd1, {}), (one, {"num_heads": 8})):
        shown = {line[:12].strip(): line[13:] for line in inspect(str(path), **heads)}
        assert shown["told by"].startswith("ViT-L (")
        python, script, *words = shlex.split(shown["draw"])
        assert (python, script) == ("python", "samplers.py")
        words += ["--resolution", 64, "--steps", 1, "--n", 1, "--out", tmp_path / "out"]
        code, _, err = user(samplers.main, *words)
        assert code == 0, err
        # A single file has no scheduler beside it: what is taken for it is said.
        assert ("does not say its objective eps" in "\n".join(err)) == (path == one)


def test_a_picture_to_start_from_is_square(sd1, tmp_path, user):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    words = ["--ckpt", sd1, "--prompt", "a cat", "--size", "64x96", "--init", tmp_path / "a.png"]
    code, _, err = user(samplers.main, *words)
    assert code == 2 and "--init with --size 64x96: wanted a square.  Name its side" in err[-1]


# ---- a student ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(sd1, tmp_path_factory):
    """A run's folder: a student of the miniature, told by the embeddings of three prompts."""
    home = tmp_path_factory.mktemp("student")
    (home / "prompts.txt").write_text("a cat\na dog, sitting\n\n")
    context = home / "texts.safetensors"
    words = f"encode --text {sd1} --prompts {home / 'prompts.txt'} --out {context} --chunks 2"
    run(text.main, words)
    words = f"--teacher {sd1} --vae sd:{sd1 / 'vae'} --context {context} --data toyfaces:8"
    words += f" --resolution 64 --images 8 --batch 4 --holdout 0 --out {home} --name student"
    words += " --preview-every 0 --save-every 0 --lr 1e-3 --ema 0.05"
    run(distill.main, words)
    return home / "student"


def run(main, words):
    draw = train.draw_samples

    def quick(tr, net, seeds, **how):
        """A run's final grid in one step: 50 are most of a short run's time."""
        return draw(tr, net, seeds[:2], method="euler", steps=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_samples", quick)
        patch.setattr("sys.argv", ["script.py", *words.split()])
        main()


def test_a_student_of_prompts_draws_from_prompts(student, sd1):
    flags = {"prompt": "a cat", "resolution": 64, "steps": 2}
    cpu = torch.device("cpu")
    gen = samplers.open_generator(samplers.Sampling(str(student), **flags), cpu)
    texts = open_texts(sd1)
    assert torch.equal(gen.told.cond["context"], texts.tell(["a cat"], chunks=2).context)
    assert torch.equal(gen.told.null["context"], texts.null(None, chunks=2).context)
    flags["prompt"] = "a dog"
    other = samplers.open_generator(samplers.Sampling(str(student), **flags), cpu)
    cat, dog = (g.images([0], [0]).images.int() for g in (gen, other))
    assert (cat - dog).abs().max() > 1


def test_a_student_is_told_by_no_other_encoder(student, sd1, tmp_path, user):
    words = ["--ckpt", student, "--prompt", "a cat", "--steps", 1, "--n", 1]
    words += ["--out", tmp_path / "out"]
    meta = load_unet(find_checkpoint(student))[1]["init"]["text"]
    assert meta["source"] == str(sd1)
    own, moved = sd1 / "text_encoder", tmp_path / "moved"
    shutil.move(own, moved)
    try:
        code, _, err = user(samplers.main, *words)
        assert code == 2 and "cannot load the text encoders by which" in err[-1]
        assert "say where they are with --text" in err[-1]
        code, _, err = user(samplers.main, *words, "--text", moved)
        assert code == 0, err
    finally:
        shutil.move(moved, own)
    torch.manual_seed(1)
    pipelines.encoder(768, "quick_gelu").save_pretrained(tmp_path / "other")
    code, _, err = user(samplers.main, *words, "--text", tmp_path / "other")
    assert code == 2 and "has other text encoders than those by which" in err[-1]
