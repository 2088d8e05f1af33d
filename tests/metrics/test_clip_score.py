"""CLIP against transformers and goldens; the scores against their formulas."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file, save_file

import eval_fid
from harness.cli import UserError
from harness.likeness import OWN
from metrics import clip_score
from metrics.clip import MEAN, STD, VisionConfig, VisionEncoder, open_clip, preprocess
from metrics.clip_score import PREFIX, Config, cosines, precision, score, text_of
from text import EOS, pieces_of
from texts import mixed

MISSING = "transformers is not installed"
TINY = VisionConfig(64, 2, 4, 32, 224, 64, 256, "quick_gelu")


def theirs(**text):
    """A tiny CLIP of transformers, with everything far from its first values."""
    transformers = pytest.importorskip("transformers", reason=MISSING)
    both = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    both |= {"hidden_act": "quick_gelu", "projection_dim": 40}
    torch.manual_seed(0)
    cfg = transformers.CLIPConfig(
        text_config={**both, "hidden_size": 64, "vocab_size": 49408, "eos_token_id": 49407},
        vision_config={**both, "hidden_size": 48, "patch_size": 16, "image_size": 64},
        projection_dim=40,
    )
    net = transformers.CLIPModel(cfg).eval()
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return net


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(transformers' CLIP, the folder it was saved to)."""
    net, folder = theirs(), tmp_path_factory.mktemp("clip")
    net.save_pretrained(folder)
    return net, folder


def test_both_encoders_are_transformers_to_fp64(clip):
    net, folder = clip
    ours = open_clip(str(folder))
    ours = ours._replace(vision=ours.vision.double(), text=ours.text.double())
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    net = net.double()
    wanted = net.visual_projection(net.vision_model(x).pooler_output)
    assert (ours.vision(x) - wanted).abs().max() < 1e-9
    texts = ["a cat", "", "a photo of a dog, sitting on a very long bench " * 9]
    ids = torch.cat([clip_ids(text) for text in texts])
    wanted = net.text_projection(net.text_model(ids).pooler_output)
    wanted = wanted / wanted.norm(dim=-1, keepdim=True)
    assert (ours.texts(texts) - wanted).abs().max() < 1e-9
    net.float()


def clip_ids(text):
    return pieces_of(text, EOS)[0]


def filled(net):
    """Weights by texts.filled's formula, in the order of transformers' names."""
    state = net.state_dict()
    for k, name in enumerate(sorted(state, key=foreign)):
        v = mixed(state[name].numel(), k).view(state[name].shape)
        if name in ("embeddings.class_embedding", "embeddings.position_embedding.weight"):
            pass
        elif "norm" in name and name.endswith("weight"):
            v = 1 + v
        elif name.endswith("bias"):
            v = v / 2
        else:
            v = v * (12 / v[0].numel()) ** 0.5
        state[name].copy_(v)
    return net


def foreign(name):
    return name if name.startswith("visual_projection") else f"vision_model.{name}"


def test_a_golden_picture():
    """Every pixel and weight is a formula; the numbers were computed once by transformers."""
    net = filled(VisionEncoder(TINY).double())
    x, y = np.meshgrid(np.arange(300), np.arange(200))
    pixels = np.stack([7 * x + 3 * y, 5 * x, 11 * y], 2) % 256
    x = preprocess([Image.fromarray(pixels.astype(np.uint8))])
    out = net(x.double())[0]
    wanted = torch.tensor([-0.4440098, -1.0916432, 0.8920790, -0.8828876])
    assert (out[:4].float() - wanted).abs().max() < 1e-6
    assert float(out.abs().sum()) == pytest.approx(54.734201, abs=1e-5)


def test_pictures_are_resized_by_pillow_and_cut_in_the_middle():
    x, y = np.meshgrid(np.arange(300), np.arange(200))
    pixels = (np.stack([7 * x + 3 * y, 5 * x, 11 * y], 2) % 256).astype(np.uint8)
    out = preprocess([Image.fromarray(pixels)])[0]
    back = out * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    back = (back * 255).round().int()
    assert back[:, 0, 0].tolist() == [94, 250, 0]
    assert back[:, 111, 37].tolist() == [110, 159, 66]
    assert back[:, 223, 223].tolist() == [36, 221, 141]
    tall = preprocess([Image.fromarray(pixels[:, :100])], 32)
    assert tall.shape == (1, 3, 32, 32)


class Fake:
    """A CLIP whose texts are vectors by name."""

    def __init__(self, table):
        self.table = table

    def texts(self, texts, batch=64):
        rows = torch.stack([self.table[text] for text in texts])
        return torch.nn.functional.normalize(rows, dim=-1)


def test_scores_are_their_formulas():
    e = torch.eye(3)
    table = {"a": e[0], "b": e[1], PREFIX + "a": e[0] + e[2], PREFIX + "b": -e[1]}
    images = torch.nn.functional.normalize(torch.stack([e[0] + e[1], e[1], -e[0]]), dim=-1)
    texts = ["a", "b", "a"]
    found = score(Fake(table), images, texts, 99, 0)
    root = 0.5**0.5
    assert found["CLIP score"]["value"] == pytest.approx(100 * (root + 1 + 0) / 3, rel=1e-6)
    assert found["CLIP-S"]["value"] == pytest.approx(2.5 * 0.5 / 3, rel=1e-6)
    # The first is as near to both texts, the last nearer to the other one.
    assert found["R-precision"]["value"] == pytest.approx(1 / 3)
    assert cosines(Fake(table), images, texts).tolist() == pytest.approx([root, 1, -1])


def test_rivals_are_other_texts_and_are_drawn_by_the_seed():
    g = torch.Generator().manual_seed(0)
    names = [f"text {i}" for i in range(30)]
    table = {name: torch.randn(8, generator=g) for name in names}
    images = torch.nn.functional.normalize(torch.randn(30, 8, generator=g), dim=-1)
    fake = Fake(table)
    few = [float(precision(fake, images, names, 1, seed).mean()) for seed in range(40)]
    many = float(precision(fake, images, names, 99, 0).mean())
    # Pictures without meaning: 1 of 2, and 1 of 30.
    assert abs(np.mean(few) - 0.5) < 0.1 and many < 0.2
    assert torch.equal(precision(fake, images, names, 5, 1), precision(fake, images, names, 5, 1))
    own = fake.texts(names)
    assert precision(fake, own, names, 99, 0).tolist() == [1.0] * 30
    assert precision(fake, own[:1], names[:1], 99, 0).isnan().all()


def test_a_picture_says_its_text(tmp_path):
    image, info = Image.new("RGB", (8, 8)), PngInfo()
    said = {"flags": ["--prompt=a cat, (red) = x", "--cfg=3"], "withheld": []}
    info.add_text(OWN, json.dumps({**said, "fingerprint": "0" * 64}))
    image.save(tmp_path / "a.png", pnginfo=info)
    image.save(tmp_path / "b.png")
    assert text_of(tmp_path / "a.png") == "a cat, (red) = x"
    with pytest.raises(UserError, match="does not say what it was drawn from"):
        text_of(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("what was not asked for")
    assert text_of(tmp_path / "a.png") == "a cat, (red) = x"
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(UserError, match="does not say what it was drawn from"):
        text_of(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("A dog,\nsitting\n")
    assert text_of(tmp_path / "b.png") == "A dog, sitting"


def test_a_card_is_written(clip, tmp_path, user):
    folder = tmp_path / "drawn"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 10, 200)).save(folder / f"{i}.png")
    (tmp_path / "p.txt").write_text("red\ngreen\nblue\n")
    flags = ("--images", folder, "--clip", clip[1], "--device", "cpu")
    out = tmp_path / "card.json"
    more = ("--prompts", tmp_path / "p.txt", "--out", out)
    code, text, err = user(clip_score.main, *flags, *more)
    assert code == 0 and "CLIP score" in text, err
    card = json.loads(out.read_text())
    images = clip_score.embed(open_clip(str(clip[1])), clip_score.pictures_of(folder), 2, "cpu")
    wanted = 100 * cosines(open_clip(str(clip[1])), images, ["red", "green", "blue"]).clamp(min=0)
    assert card["metrics"]["CLIP score"]["value"] == pytest.approx(float(wanted.mean()), rel=1e-6)
    assert card["measured"]["n"] == 3 and card["measured"]["rivals"] == 2
    (tmp_path / "p.txt").write_text("red\n")
    code, _, err = user(clip_score.main, *flags, *more)
    assert code == 2 and "has 1 lines" in err[-1]
    code, _, err = user(clip_score.main, *flags)
    assert code == 2 and "does not say what it was drawn from" in err[-1]
    code, _, err = user(clip_score.main, "--images", tmp_path / "none", "--clip", clip[1])
    assert code == 2 and "no such folder" in err[-1]


def test_it_stands_in_the_card_of_the_distances_too(clip, tmp_path, user):
    folder, ref = tmp_path / "drawn", tmp_path / "ref"
    for where in (folder, ref):
        where.mkdir()
        for i in range(12):
            noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(noise).save(where / f"{i}.png")
    both = ("--fake", folder, "--ref", ref, "--features", "pca", "--clip", clip[1])
    flags = (*both, "--resolution", 32, "--device", "cpu", "--out", tmp_path / "card.json")
    code, _, err = user(eval_fid.main, *flags)
    assert code == 2 and "does not say what it was drawn from" in err[-1]
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"picture {i % 3}")
    code, text, err = user(eval_fid.main, *flags)
    assert code == 0 and "CLIP score" in text and "FD-pca" in text, err
    card = json.loads((tmp_path / "card.json").read_text())
    alone = ("--images", folder, "--clip", clip[1], "--device", "cpu", "--out", tmp_path / "c.json")
    assert user(clip_score.main, *alone)[0] == 0
    own = json.loads((tmp_path / "c.json").read_text())
    assert card["metrics"] | own["metrics"] == card["metrics"]
    assert card["measured"]["CLIP"] == own["measured"] and card["measured"]["CLIP"]["n"] == 12
    code, _, err = user(eval_fid.main, "--ckpt", "x", "--clip", clip[1])
    assert code == 2 and "--clip changes nothing here: it is of --fake" in err[-1]


def test_files_that_are_no_whole_clip_are_refused(clip, tmp_path):
    tensors = load_file(clip[1] / "model.safetensors")
    text = {k: v for k, v in tensors.items() if "vision" not in k and "visual" not in k}
    save_file(text, tmp_path / "text.safetensors")
    (tmp_path / "config.json").write_text((clip[1] / "config.json").read_text())
    with pytest.raises(UserError, match="holds no picture encoder and 1 text"):
        open_clip(str(tmp_path / "text.safetensors"))
    less = dict(tensors)
    less.pop("vision_model.post_layernorm.bias")
    save_file(less, tmp_path / "less.safetensors")
    with pytest.raises((UserError, ValueError), match="post_layernorm.bias"):
        open_clip(str(tmp_path / "less.safetensors"))


def test_a_config_that_cannot_be_read_is_refused(clip, tmp_path):
    save_file(load_file(clip[1] / "model.safetensors"), tmp_path / "model.safetensors")
    config = json.loads((clip[1] / "config.json").read_text())
    for broken in ("{", "[]", json.dumps({**config, "vision_config": {"hidden_act": "gelu"}})):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(UserError, match="config.json|no tensor shows"):
            open_clip(str(tmp_path))
    config["vision_config"]["hidden_act"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_clip(str(tmp_path)).vision.cfg.act == "gelu"
