"""train.py --text clip-l:FILE: a small U-Net is told what a frozen CLIP reads of captions."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import distill
import samplers
import train
import training.texts as texts_py
from ckpt import load_unet
from harness.cli import UserError
from harness.run import checkpoints
from samplers import Sampling, open_generator
from test_texts import a_quick_last_picture, config, folder, network, tensors  # noqa: F401
from test_train import ALONE, go
from training.texts import texts_of

pytest.importorskip("transformers", reason="transformers is not installed")
import pipelines  # noqa: E402

SMALL = ["--data", "toyfaces:8", "--resolution", 32, "--model", "nano"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(transformers' encoder, its file): ViT-L's width with two layers."""
    torch.manual_seed(0)
    net = pipelines.encoder(768, "quick_gelu")
    path = tmp_path_factory.mktemp("clip") / "clip_l.safetensors"
    names = {k: f"text_model.{k.removeprefix('text_model.')}" for k in net.state_dict()}
    save_file({names[k]: v.contiguous() for k, v in net.state_dict().items()}, path)
    return net, path


def theirs(net, text):
    ids = pipelines.tokenizer("<|endoftext|>")(text, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        return net(ids.input_ids).last_hidden_state[0]


def test_an_image_is_told_transformers_states_of_its_caption(folder, clip):
    net, path = clip
    cfg = config(folder, text=f"clip-l:{path}", caption_share=1.0, caption_empty=0.0)
    texts = texts_of(cfg, cfg.open_data(), network(cfg), ALONE)
    draw = np.random.default_rng(0)
    for i, text in enumerate(["A Red circle, on white.", "Zoë's dog,  asleep", "", "tag 3, solo"]):
        heard = texts.drawn(i, draw)["context"]
        torch.testing.assert_close(heard, theirs(net, text), rtol=0, atol=2e-5)
    told = texts.told([0])
    torch.testing.assert_close(told.null["context"][0], theirs(net, ""), rtol=0, atol=2e-5)
    heard = texts.drawn(0, draw)["context"]
    assert heard is texts.drawn(0, draw)["context"]  # encoded once
    again = pickle.loads(pickle.dumps(texts))  # as workers get it that do not fork
    assert torch.equal(again.drawn(3, draw)["context"], texts.drawn(3, draw)["context"])


def test_the_texts_that_are_remembered_are_limited(clip, monkeypatch):
    monkeypatch.setattr(texts_py, "KEPT", 2)
    reader = texts_py.ClipReader(f"clip-l:{clip[1]}")
    first = [reader.read(text).context for text in ("a", "b", "c")]
    assert list(reader.states) == ["b", "c"]
    assert torch.equal(reader.read("a").context, first[0]) and list(reader.states) == ["c", "a"]


def test_a_run_resumes_bitwise_and_draws_by_its_own_encoder(folder, clip, tmp_path, user):
    net, path = clip
    own = shutil.copy(path, tmp_path / "own.safetensors")
    how = dict(data=str(folder), text=f"clip-l:{own}", caption_shuffle=True, save_every=16)
    run = go(tmp_path / "a", holdout=0.0, **how)
    whole = tensors(run)
    shutil.rmtree(checkpoints(run)[-1])
    (run / "samples" / "final.png").unlink()
    go(tmp_path / "a", holdout=0.0, **how)
    again = tensors(run)
    assert whole.keys() == again.keys()
    assert [key for key in whole if not torch.equal(whole[key], again[key])] == []
    unet, meta = load_unet(samplers.find_checkpoint(str(run)))
    assert unet.cfg.context_dim == 768 and meta["init"]["text"]["source"] == str(own)
    gen = open_generator(Sampling(str(run), prompt="tag 3, solo"), torch.device("cpu"))
    torch.testing.assert_close(
        gen.told.cond["context"][0], theirs(net, "tag 3, solo"), rtol=0, atol=2e-5
    )
    # A student of it, told by the same encoder.
    learn = ["--teacher", run, "--images", 4, "--batch", 4, "--eval-every", 0]
    learn += ["--out", tmp_path, "--name", "student", "--text"]
    code, _, errors = user(distill.main, *learn, f"clip-l:{path}")
    assert code == 0, errors
    _, taught = load_unet(samplers.find_checkpoint(str(tmp_path / "student")))
    assert taught["init"]["text"]["encoders"] == meta["init"]["text"]["encoders"]
    # Another encoder where the run's own was.
    weights = load_file(path)
    name = "text_model.final_layer_norm.bias"
    save_file(weights | {name: weights[name] + 0.1}, own)
    words = ["--ckpt", run, "--prompt", "x", "--n", 1, "--out", tmp_path / "x"]
    code, _, errors = user(samplers.main, *words)
    assert code == 2 and len(errors) == 1 and "other text encoders than those" in errors[0]
    code, _, errors = user(samplers.main, *words, "--text", path, "--steps", 1)
    assert code == 0
    learn[learn.index("student")] = "misled"
    code, _, errors = user(distill.main, *learn, f"clip-l:{own}")
    assert code == 2 and len(errors) == 1 and "the teacher was told by another" in errors[0]
    assert not (tmp_path / "misled").exists()
    refused = {"bytes": "not told what to draw by", "bites": "wanted bytes or", "": "--context"}
    for text, line in refused.items():
        code, _, errors = user(distill.main, *learn, text)
        assert code == 2 and len(errors) == 1 and line in errors[0]
    shutil.rmtree(checkpoints(run)[-1])
    with pytest.raises(UserError, match="was begun with another encoder"):
        go(tmp_path / "a", holdout=0.0, **how)


@pytest.mark.parametrize(
    "text, line",
    [
        ("clip-l:nowhere.safetensors", "nowhere.safetensors"),
        ("clip-g:x", "wanted bytes, clip-l:FILE or sdxl:FILE"),
        ("byte", "wanted bytes, clip-l:FILE or sdxl:FILE"),
        ("clip-l", "'clip-l': wanted bytes, clip-l:FILE or sdxl:FILE"),
        ("sdxl:", "'sdxl:': wanted bytes, clip-l:FILE or sdxl:FILE"),
        ("clip-l:a.safetensors,", "wanted bytes, clip-l:FILE or sdxl:FILE"),
    ],
)
def test_what_is_no_encoder_is_one_line(tmp_path, user, text, line):
    flags = ["--text", text, *SMALL, "--out", tmp_path / "runs"]
    code, _, errors = user(train.main, *flags)
    assert code == 2 and len(errors) == 1 and line in errors[0]
    assert not (tmp_path / "runs").exists()


def test_a_wider_encoder_is_refused(tmp_path, user):
    path = tmp_path / "clip_g.safetensors"
    torch.manual_seed(0)
    net = pipelines.encoder(1280, "gelu", 1280)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, path)
    flags = ["--text", f"clip-l:{path}", *SMALL, "--out", tmp_path / "runs"]
    code, _, errors = user(train.main, *flags)
    assert code == 2 and len(errors) == 1 and "1280 wide: wanted ViT-L's" in errors[0]
    assert not (tmp_path / "runs").exists()
