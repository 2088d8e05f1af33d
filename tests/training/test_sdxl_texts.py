"""train.py --text sdxl:FILE: what a network is told of a picture's text, its size and its crop."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import default_collate

import train
import training.texts as texts_py
from ckpt import load_unet
from data import heldout
from data.dataset import Stream
from harness.run import checkpoints
from miniature import FIRST, NAME, SECOND, sdxl
from model import timestep_embedding
from samplers import Sampling, open_generator
from sharded import ONE, config, opened
from text import open_texts, size_vector
from training.texts import texts_of

SIZES = (1024, 1536, 0, 128, 832, 1216)  # height, width; top, left; height, width


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def stream(flags, tmp_path_factory):
    cfg = config(tmp_path_factory.mktemp("out"), flags)
    ds = cfg.open_data()
    texts = texts_of(cfg, ds, train.preset_of(cfg), ONE)
    return Stream(ds, None, (32, 8, 8), 0, flip=True, texts=texts.drawn, batch=4)


def theirs(original, crop, target):
    """diffusers' time ids of a picture, (1, 6)."""
    diffusers = pytest.importorskip("diffusers")
    unet = SimpleNamespace(
        config=SimpleNamespace(addition_time_embed_dim=256),
        add_embedding=SimpleNamespace(linear_1=SimpleNamespace(in_features=2816)),
    )
    ids = diffusers.StableDiffusionXLPipeline._get_add_time_ids
    return ids(SimpleNamespace(unet=unet), original, crop, target, torch.float32, 1280)


def test_sizes_become_the_waves_that_diffusers_makes_of_its_time_ids():
    from diffusers.models.embeddings import Timesteps

    ids = theirs(SIZES[:2], SIZES[2:4], SIZES[4:])
    assert ids[0].tolist() == list(SIZES)
    wanted = Timesteps(256, True, 0)(ids.flatten())
    ours = size_vector(SIZES[:2], SIZES[2:4], SIZES[4:])
    assert torch.equal(ours, wanted.flatten())
    # By hand, of those numbers; and how far each swap of a pair is.
    assert ours[:3].tolist() == pytest.approx([0.98735, -0.53762, 0.68346], abs=1e-5)
    assert float(ours.double().sum()) == pytest.approx(374.70874, abs=1e-3)
    for i in (0, 2, 4):
        swapped = list(SIZES)
        swapped[i], swapped[i + 1] = swapped[i + 1], swapped[i]
        other = size_vector(swapped[:2], swapped[2:4], swapped[4:])
        assert float((other - ours).norm() / ours.norm()) > 0.3


def test_each_sample_is_told_its_own_sizes_in_diffusers_order(stream):
    shapes, crops = set(), 0
    for position in range(60):
        sample = stream[position]
        height, width, top, left, h, w = map(int, sample["sizes"])
        # By the file itself, and by the sample's own pixels.
        original = stream.ds.frames.originals[stream.ds.index[stream.order(position)]]
        assert (width, height) == tuple(original) and sample["image"].shape == (3, h, w)
        ids = theirs((height, width), (top, left), (h, w)).flatten()
        assert torch.equal(sample["y"], timestep_embedding(ids, 256).flatten())
        shapes.add((h, w))
        crops += (top > 0) + (left > 0)
    assert len(shapes) >= 4 and crops > 10 and any(h != w for h, w in shapes)


def heard(texts, text, sizes):
    """What the network is told of one text."""
    told = texts.heard(default_collate([texts.said(text, sizes)]))
    return {name: x[0] for name, x in told.items()}


def test_text_is_that_of_both_encoders_and_silence_is_zeros(stream, flags):
    teller = open_texts(flags["text"].removeprefix("sdxl:"))
    texts, pooled = stream.texts.__self__, SECOND.projection
    told = teller.tell(["A picture of 3 things"])
    said = heard(texts, "A picture of 3 things", None)
    assert said["context"].shape == (77, FIRST.width + SECOND.width)
    assert torch.equal(said["context"], told.context[0])
    assert torch.equal(said["y"][:pooled], told.pooled[0]) and float(told.pooled.abs().max()) > 0.1
    assert torch.equal(said["y"][pooled:], size_vector((64, 64)))  # of a square picture
    silent = heard(texts, "", torch.tensor([90.0, 50, 0, 8, 48, 80]))
    assert not silent["context"].any() and not silent["y"][:pooled].any()
    assert torch.equal(silent["y"][pooled:], size_vector((90, 50), (0, 8), (48, 80)))
    sums = {float(stream[p]["ids"].sum()) for p in range(120)}
    assert 0.0 in sums and len(sums) > 20


@pytest.mark.parametrize("dtype, apart", [("fp32", 1e-5), ("bf16", 0.02)])
def test_a_batch_is_encoded_as_each_text_is_alone(stream, flags, dtype, apart, monkeypatch):
    """As on a GPU; and what the plan counts of it."""
    texts, cpu = stream.texts.__self__, torch.device("cpu")
    reader = texts_py.ClipReader(flags["text"], cpu, dtype)
    reader.remembers = False
    batch = default_collate([texts.said(text, None) for text in ("a cat", "", "tag 3, solo")])
    alone, told = texts.heard(batch), reader.hear(batch)
    for name in ("context", "y"):
        for a, b in zip(alone[name], told[name]):
            assert float((a - b).norm()) <= apart * float(a.norm())
    assert not told["context"][1].any() and not told["y"][1, : SECOND.projection].any()
    small = {"clip-l": FIRST, "clip-bigg": SECOND}
    monkeypatch.setattr(texts_py, "TEXT_PRESETS", small)
    monkeypatch.setattr(texts_py, "dtype_of", lambda cfg, device: dtype)
    counted = texts_py.encoder_bytes(SimpleNamespace(text=flags["text"]), cpu)
    assert counted == sum(p.nbytes for net in reader.teller.encoders for p in net.parameters())
    assert texts_py.encoder_bytes(SimpleNamespace(text="bytes"), cpu) == 0


def test_held_out_losses_and_previews_are_told_sizes(flags, tmp_path):
    cfg = config(tmp_path, flags | {"holdout": 0.3})
    ds = cfg.open_data()
    texts = texts_of(cfg, ds, train.preset_of(cfg), ONE)
    held, pooled = texts.of(ds.heldout), SECOND.projection
    batches = heldout.batches(ds.heldout, None, (32, 8, 8), 0, slice(None, None, 8), held.plain)
    rows = 0
    for batch in batches:
        for sizes, y in zip(batch["sizes"], batch["y"]):
            assert torch.equal(y, timestep_embedding(sizes, 256).flatten())
            rows += 1
    assert rows == len(ds.heldout) > 3
    shown = texts.told([0, 1])
    assert torch.equal(shown.cond["y"][1, pooled:], size_vector((64, 64)))
    assert torch.equal(shown.null["y"][0, pooled:], size_vector((64, 64)))


def test_a_network_learns_by_its_vector_and_draws_by_its_own_encoders(flags, tmp_path):
    tr = opened(ONE, tmp_path, flags | {"images": 16, "lr": 0.01})
    loader = train.load(tr)
    first = tr.net.label_emb[0][0].weight.detach().clone()
    for _ in range(2):
        train.step(tr, loader)
    moved = (tr.net.label_emb[0][0].weight.detach() - first).abs().amax(0)
    # Of what it was told of sizes, and of the pooled output.
    assert (moved[SECOND.projection :] > 0).float().mean() > 0.9
    assert (moved[: SECOND.projection] > 0).all()
    train.save(tr)
    _, meta = load_unet(checkpoints(tr.run)[-1] / "model.safetensors")
    assert meta["init"]["text"]["source"] == flags["text"].removeprefix("sdxl:")
    gen = open_generator(Sampling(str(tr.run), prompt="tag 3, solo"), torch.device("cpu"))
    assert torch.equal(gen.told.cond["y"][0], heard(tr.texts, "tag 3, solo", None)["y"])


@pytest.mark.parametrize(
    "words, line",
    [
        ("--model sdxl", "is told what to draw by text that its encoders have read.  Add --text s"),
        ("--model sd15", "that its encoders have read.  Add --text clip-l:FILE."),
        ("--model sd21", "these are not trained with here.  Choose another --model"),
        ("--model sdxl --text bytes", "--model sdxl: wanted a U-Net without text"),
        (f"--model {NAME} --text clip-l:ALONE", "16 wide: wanted ViT-L's, 768 wide"),
        ("--model tiny --text sdxl:HERE", "tell 48 numbers a token and 1560 an image, but the net"),
        (f"--model {NAME} --text sdxl:ALONE/model.safetensors", "tell 16 numbers a token, but the"),
        ("--text sdxl:nowhere.safetensors", "nowhere.safetensors"),
    ],
)
def test_what_does_not_go_is_one_line(flags, tmp_path, user, words, line):
    encoders = flags["text"].removeprefix("sdxl:")
    shutil.copytree(Path(encoders) / "text_encoder", tmp_path / "alone")
    words = words.replace("HERE", encoders).replace("ALONE", str(tmp_path / "alone")).split()
    small = ["--data", "toyfaces:8", "--resolution", 32, "--out", tmp_path / "runs"]
    code, _, errors = user(train.main, *small, *words)
    assert code == 2 and len(errors) == 1 and line in errors[0], errors
    assert not (tmp_path / "runs").exists()
