"""train.py --text clip-l:FILE: a small U-Net is told what a frozen CLIP reads of captions."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import default_collate

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
    said = ["A Red circle, on white.", "Zoë's dog,  asleep", "", "tag 3, solo"]
    batch = default_collate([texts.drawn(i, draw) for i in range(4)])
    assert [*batch] == ["ids"]  # which is all that a loader sends
    for heard, text in zip(texts.heard(batch)["context"], said, strict=True):
        torch.testing.assert_close(heard, theirs(net, text), rtol=0, atol=2e-5)
    told = texts.told([0])
    torch.testing.assert_close(told.null["context"][0], theirs(net, ""), rtol=0, atol=2e-5)
    kept = pickle.dumps(texts)  # as workers get it that do not fork: without encoders
    assert len(kept) < 1e6 < path.stat().st_size
    assert torch.equal(pickle.loads(kept).drawn(3, draw)["ids"], texts.drawn(3, draw)["ids"])


def reader_on_a_cpu(clip, dtype="fp32"):
    return texts_py.ClipReader(f"clip-l:{clip[1]}", torch.device("cpu"), dtype)


def test_each_text_is_encoded_alone_and_once_and_a_gigabyte_of_them_is_remembered(
    clip, monkeypatch
):
    reader, calls, encoded = reader_on_a_cpu(clip), [], texts_py.ClipReader.encoded
    monkeypatch.setattr(
        texts_py.ClipReader, "encoded", lambda self, ids: calls.append(ids) or encoded(self, ids)
    )
    words = ["a", "b", "a", "a red dog"]
    ids = {text: reader.read(text)["ids"] for text in words}
    first = reader.hear({"ids": torch.stack([ids[text] for text in words])})["context"]
    assert [len(one) for one in calls] == [1, 1, 1] and torch.equal(first[0], first[2])
    again = reader.hear({"ids": ids["a red dog"][None]})["context"]
    assert len(calls) == 3 and torch.equal(again[0], first[3])
    # Bytes of two.
    monkeypatch.setattr(texts_py, "KEPT", 2 * 4 * 77 * 768)
    calls.clear()
    reader.states.clear()
    for text in ("a", "b", "a red dog", "b", "a"):
        heard = reader.hear({"ids": ids[text][None]})["context"][0]
        assert torch.equal(heard, first[words.index(text)]) and len(reader.states) <= 2
    assert len(calls) == 4  # "b" was still there


@pytest.mark.parametrize("dtype, apart", [("fp32", 1e-5), ("bf16", 0.02)])
def test_a_batch_as_a_gpu_encodes_it_says_what_each_text_says_alone(clip, dtype, apart):
    """Its matrices are in the run's precision; what is added up stays in fp32."""
    net, reader = clip[0], reader_on_a_cpu(clip, dtype)
    reader.remembers = False
    words = ["a red dog", "", "tag 3, solo", "Zoë's dog,  asleep"]
    batch = default_collate([reader.read(text) | {"q": 0.5} for text in words])
    told = reader.hear(batch)
    assert told.keys() == {"context", "q"} and "ids" in batch
    assert told["context"].dtype == torch.float32
    for heard, text in zip(told["context"], words, strict=True):
        wanted = theirs(net, text)
        assert float((heard - wanted).norm() / wanted.norm()) < apart, text
    layers = texts_py.matrices(reader.teller.encoders)
    low = torch.bfloat16 if dtype == "bf16" else torch.float32
    assert {p.dtype for layer in layers for p in layer.parameters()} == {low}
    assert reader.teller.encoders[0].final_layer_norm.weight.dtype == torch.float32
    # By the same encoder, whatever it was rounded to.
    assert reader.init == reader_on_a_cpu(clip).init


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
