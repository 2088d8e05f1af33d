"""Training on texts: every sample hears its own image's, a resumed run and two ranks hear the same,
and what has no text is told in one line."""

import contextlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data.encode as encode
import distill
import samplers
import train
from ckpt import load_unet
from ckpt.byteunet import PAD, byte_ids
from data import heldout
from data.cache import check_index, open_cache, read_manifest, sealed
from data.dataset import Stream, index_at, open_dataset
from harness.cli import UserError
from harness.run import checkpoints
from objectives import Objective
from samplers import Generator
from test_resume import BASE, finish, losses
from test_train import ALONE, FAST, a_quick_last_picture, go  # noqa: F401
from train import Config, resolve
from training.texts import data_hash, texts_of
from vae import vae_from_meta

CAPTIONS = {0: "A Red circle, on white.", 1: "Zoë's dog,  asleep", 2: ""}


@pytest.fixture
def folder(tmp_path):
    """Six pictures: two with captions, four with tags, one with neither."""
    root = tmp_path / "pictures"
    root.mkdir()
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(root / f"{i}.png")
    for i, text in CAPTIONS.items():
        (root / f"{i}.caption").write_text(text)
    for i in (1, 3, 4, 5):
        (root / f"{i}.txt").write_text(f"Tag_{i}, solo")
    return root


def config(folder, **fields):
    return resolve(
        Config(**{**FAST, "data": str(folder), "text": "bytes", "holdout": 0.0, **fields})
    )


def network(cfg):
    return train.preset_of(cfg)


def spelled(ids):
    return bytes(id for id in ids.tolist() if id != PAD).decode()


def test_a_sample_hears_its_own_images_text_and_no_noise_moves(folder):
    cfg = config(folder, caption_share=1.0, caption_empty=0.0)
    ds = cfg.open_data()
    texts = texts_of(cfg, ds, network(cfg), ALONE)
    told = Stream(ds, None, (4, 4, 4), 5, texts=texts.drawn)
    silent = Stream(ds, None, (4, 4, 4), 5)
    wanted = ["A Red circle, on white.", "Zoë's dog,  asleep", ""]
    wanted += [f"tag {i}, solo" for i in (3, 4, 5)]
    for p in range(30):
        assert spelled(told[p]["context"]) == wanted[index_at(5, 6, p)]
        assert torch.equal(told[p]["eps"], silent[p]["eps"]) and told[p]["q"] == silent[p]["q"]
        assert torch.equal(told[p]["image"], silent[p]["image"])


def test_the_text_of_a_position_is_drawn_anew_and_always_the_same(folder):
    cfg = config(folder, caption_share=0.5, caption_empty=0.1)
    ds = cfg.open_data()
    texts = texts_of(cfg, ds, network(cfg), ALONE)
    stream = Stream(ds, None, (4, 4, 4), 5, texts=texts.drawn)
    of_both = [p for p in range(300) if index_at(5, 6, p) == 1]
    heard = [spelled(stream[p]["context"]) for p in of_both]
    assert set(heard) == {"Zoë's dog,  asleep", "tag 1, solo", ""}
    assert heard == [spelled(stream[p]["context"]) for p in of_both]


def test_held_out_losses_hear_texts_without_chance():
    ds = open_dataset("toyfaces:40", resolution=32, holdout=0.3)
    cfg = resolve(Config(**{**FAST, "text": "bytes", "caption_empty": 1.0}))
    texts = texts_of(cfg, ds, network(cfg), ALONE).of(ds.heldout)
    batch = next(
        heldout.batches(ds.heldout, None, (4, 4, 4), 0, slice(None, None, 8), texts.plain)
    )
    for i, ids in enumerate(batch["context"]):
        assert spelled(ids) == ", ".join(ds.heldout[i].tags) != ""


def test_a_table_with_a_caption_beside_its_tags(folder):
    for file in [*folder.glob("*.txt"), *folder.glob("*.caption")]:
        file.unlink()
    rows = [
        {"file_name": "0.png", "tags": ["solo"], "caption": "One, TWO."},
        {"file_name": "1.png", "caption": "Three, FOUR."},
        {"file_name": "2.png", "tags": "a, b"},
        {"file_name": "3.png", "caption": ["c", "d"]},  # tags, by the only column of words
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cfg = config(folder, caption_share=0.0, caption_empty=0.0)
    ds = cfg.open_data()
    texts = texts_of(cfg, ds, network(cfg), ALONE)
    assert texts.captions == ["One, TWO.", "Three, FOUR.", *[""] * 4]
    draw = np.random.default_rng(0)
    # Of the second one the tags are pieces of its caption, which is not told in pieces.
    heard = [spelled(texts.drawn(i, draw)["context"]) for i in range(5)]
    assert heard == ["solo", "Three, FOUR.", "a, b", "c, d", ""]


def test_a_latent_cache_tells_what_its_folder_tells(tmp_path, folder, user):
    out = tmp_path / "cache"
    how = {"data": str(folder), "vae": "pixel:8", "resolution": 32, "device": "cpu"}
    encode.encode(encode.Encode(str(out), **how), ALONE)
    flags = {"caption_share": 0.5, "caption_shuffle": True}
    told = []
    for data in (folder, out):
        cfg = config(data, **flags)
        ds = cfg.open_data()
        texts = texts_of(cfg, ds, network(cfg), ALONE)
        stream = Stream(ds, None, (4, 4, 4), 5, texts=texts.drawn)
        told.append([spelled(stream[p]["context"]) for p in range(40)])
    assert texts.captions == [CAPTIONS.get(i, "") for i in range(6)]
    assert told[0] == told[1] and len(set(told[0])) > 4
    # Another caption, another cache, whose latents stay.
    latents = (out / "shard-00000.safetensors").read_bytes()
    (folder / "0.caption").write_text("A blue circle.")
    encode.encode(encode.Encode(str(out), **how), ALONE)
    again = open_cache(str(out), 32)
    assert again.captions() == ["A blue circle.", CAPTIONS[1], *[""] * 4]
    # Only who tells them has other data: the rest of a run goes on.
    assert again.hash == ds.source.hash and again.manifest["index"] != ds.source.manifest["index"]
    silent, telling = config(out, text=""), config(out)
    assert data_hash(silent, again) == data_hash(silent, ds.source) == ds.source.hash
    assert data_hash(telling, again) != data_hash(telling, ds.source)
    (folder / "5.txt").write_text("another tag")
    encode.encode(encode.Encode(str(out), **how), ALONE)
    assert open_cache(str(out), 32).hash != again.hash
    # A cache from before there was that hash.
    old = read_manifest(out)
    del old["bare"]
    (out / "manifest.json").write_text(sealed(old))
    assert open_cache(str(out), 32).hash not in (again.hash, ds.source.hash)
    assert not [*out.glob(".bare*")]
    assert (out / "shard-00000.safetensors").read_bytes() == latents
    # What is no text is found before anything is encoded.
    (folder / "0.caption").write_bytes(b"caf\xe9")
    words = ["--data", folder, "--vae", "pixel:8", "--resolution", 32, "--out", tmp_path / "no"]
    code, _, errors = user(encode.main, *words)
    assert code == 2 and len(errors) == 1 and "0.caption is not UTF-8 text" in errors[0]
    assert not (tmp_path / "no").exists()


def test_captions_that_do_not_fit_their_cache_are_refused(tmp_path, folder):
    out = tmp_path / "cache"
    encode.encode(encode.Encode(str(out), str(folder), "pixel:8", 32, device="cpu"), ALONE)
    index = {name: x.numpy() for name, x in load_file(out / "index.safetensors").items()}
    plan = read_manifest(out)["plan"]
    check_index(out, index, 10, plan)
    ends = index["caption_ends"]
    for wrong in (ends[:-1], ends + 1, ends[::-1], ends.astype(np.int32)):
        with pytest.raises(UserError, match="does not hold the names and tags of 6 images"):
            check_index(out, {**index, "caption_ends": wrong}, 10, plan)
    del index["caption_ends"]
    with pytest.raises(UserError, match="does not hold the names"):
        check_index(out, index, 10, plan)


# ---- runs ---------------------------------------------------------------------------------------


def tensors(run):
    folder = checkpoints(run)[-1]
    return {f"{f.name}:{k}": v for f in sorted(folder.iterdir()) for k, v in load_file(f).items()}


def test_a_run_resumes_bitwise_and_trains_its_encoder(tmp_path, folder, capsys):
    how = dict(data=str(folder), text="bytes", caption_shuffle=True, save_every=16, holdout=0.0)
    run = go(tmp_path / "a", **how)
    line = "texts: 2 of 6 images have a caption, 3 only tags, 1 neither; 0 are cut off at 256 bytes"
    assert line in capsys.readouterr().out
    whole = tensors(run)
    assert {f.name for f in checkpoints(run)[-1].glob("ema*")} and len(whole) > 300
    shutil.rmtree(checkpoints(run)[-1])
    (run / "samples" / "final.png").unlink()
    go(tmp_path / "a", **how)
    again = tensors(run)
    assert whole.keys() == again.keys()
    assert [key for key in whole if not torch.equal(whole[key], again[key])] == []
    net, meta = load_unet(checkpoints(run)[-1] / "model.safetensors")
    torch.manual_seed(train.torch_seed(0))
    fresh = train.build(net.cfg)
    moved = [
        name
        for name, weight in fresh.state_dict().items()
        if name.startswith("text.") and not torch.equal(weight, net.state_dict()[name])
    ]
    assert len(moved) == 2 and meta["config"]["text"] == "bytes"


def test_a_changed_caption_ends_a_resume(tmp_path, folder, user):
    how = dict(data=str(folder), text="bytes", save_every=16, holdout=0.0)
    run = go(tmp_path / "a", **how)
    shutil.rmtree(checkpoints(run)[-1])
    (run / "samples" / "final.png").unlink()
    (folder / "0.caption").write_text("A blue circle.")
    with pytest.raises(UserError, match="changed since"):
        go(tmp_path / "a", **how)
    with pytest.raises(UserError, match="text 'bytes' -> ''"):
        go(tmp_path / "a", **{**how, "text": ""})


def test_two_ranks_hear_what_one_hears(tmp_path, user):
    # Adam amplifies rounding by lr where gradients are tiny.
    flags = ("--text", "bytes", "--caption-shuffle", "--images", "24", "--log-every", "8")
    flags += ("--lr", "2e-4")
    code, _, errors = user(train.main, *BASE, *flags, "--out", tmp_path / "1")
    assert code == 0, errors
    finish(tmp_path / "2", *flags, ranks=2)
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == 3
    assert [row[1] for row in two] == pytest.approx([row[1] for row in one], rel=1e-5)


# ---- drawing ------------------------------------------------------------------------------------


def test_prompts_draw_what_the_network_is_told_by_hand(tmp_path, user):
    run = go(tmp_path, text="bytes", lr=0.02)
    asked = tmp_path / "prompts.txt"
    asked.write_text("red hair, glasses\nZoë\n")
    flags = ["--ckpt", run, "--prompt", f"@{asked}", "--n", 3, "--cfg", 2, "--steps", 3]
    flags += ["--method", "euler", "--dtype", "fp32", "--npz", tmp_path / "drawn.npz"]
    code, _, errors = user(samplers.main, *flags, "--out", tmp_path / "drawn")
    assert code == 0, errors
    drawn = torch.from_numpy(np.load(tmp_path / "drawn.npz")["arr_0"]).permute(0, 3, 1, 2)

    net, meta = load_unet(samplers.find_checkpoint(run), dtype=torch.float32)
    objective, vae = Objective(**meta["objective"]), vae_from_meta(meta["vae"])
    shape = vae.latent_shape(32)
    gen = Generator(objective, net.eval(), vae, shape, device=torch.device("cpu"))
    x, times = gen.noise([0, 1, 2]), torch.linspace(1, 0, 4)
    told, null = byte_ids(["red hair, glasses", "Zoë", "red hair, glasses"]), byte_ids([""] * 3)
    with torch.no_grad():
        for start, end in zip(times[:-1], times[1:]):
            t = 1000 * start.expand(3)
            weak = net(x, t, context=null)
            x = x + (end - start) * (weak + 2 * (net(x, t, context=told) - weak))
        wanted = vae.decode(x).add(1).mul(127.5).clamp(0, 255).round()
    assert (drawn.float() - wanted).abs().max() <= 1
    assert not torch.equal(drawn[0], drawn[1])


def test_pictures_that_are_enlarged_are_shown_with_their_own_texts(tmp_path, folder, monkeypatch):
    """Previews of cfm: picture i with the text of picture i."""
    heard, call = [], Generator.images
    monkeypatch.setattr(
        Generator,
        "images",
        lambda self, seeds, labels, **how: (
            heard.append((self.cond(labels)["context"], how["low"]))
            or call(self, seeds, labels, **how)
        ),
    )
    run = go(tmp_path, text="bytes", objective="cfm", data=str(folder), holdout=0.0, images=8)
    assert (run / train.FINAL).is_file()
    context, low = heard[-1]
    assert len(context) == len(low) == 32
    told = {spelled(row): i for i, row in enumerate(context[:6])}
    assert len(told) == 6
    assert torch.equal(context[:6], context[6:12]) and torch.equal(low[:6], low[6:12])
    texts = ["A Red circle, on white.", "Zoë's dog,  asleep", "", "tag 3, solo", "tag 4, solo"]
    assert list(told) == [*texts, "tag 5, solo"]


def test_a_long_prompt_is_cut_and_said(tmp_path, user):
    run = go(tmp_path, text="bytes", images=8)
    flags = ["--ckpt", run, "--n", 1, "--steps", 1, "--out", tmp_path / "drawn", "--prompt"]
    code, _, errors = user(samplers.main, *flags, "x" * 256 + " and the end")
    assert code == 0
    assert any("256 bytes of a text are read; cut off: ' and the end'" in e for e in errors)


# ---- students ---------------------------------------------------------------------------------


def student(run, out, **fields):
    """A distillation's settings, of a teacher that was trained here."""
    quick = dict(batch=4, images=8, eval_every=0, preview_every=0, save_every=0, log_every=4)
    return distill.resolve(distill.Config(teacher=str(run), out=str(out), **quick, **fields))


def test_teacher_and_student_hear_each_pictures_own_text(tmp_path, folder, monkeypatch):
    run = go(tmp_path, data=str(folder), text="bytes", lr=0.02, holdout=0.0)
    flags = dict(caption_share=1.0, caption_empty=0.0, objective="fm", name="s", dtype="fp32")
    tr = distill.setup(student(run, tmp_path, text="bytes", **flags), ALONE)
    heard, ask = [], tr.loss.teacher.ask
    monkeypatch.setattr(
        tr.loss.teacher, "ask", lambda *a, **cond: heard.append(cond["context"]) or ask(*a, **cond)
    )
    wanted = {0: CAPTIONS[0], 1: CAPTIONS[1], 2: ""} | {i: f"tag {i}, solo" for i in (3, 4, 5)}
    with contextlib.closing(train.load(tr)) as loader:
        batch = next(loader)
    loss = tr.loss(tr.model, batch)
    texts = [wanted[index_at(0, 6, int(p))] for p in batch["position"]]
    assert [spelled(ids) for ids in heard[0]] == texts and len(set(texts)) == 4
    # The student has its teacher's weights: told the same, it has nothing to learn.
    assert float(loss.per_sample.detach().max()) < 1e-9
    shown = tr.net(batch["eps"], 1000 * torch.ones(4), context=batch["context"])
    other = tr.net(batch["eps"], 1000 * torch.ones(4), context=batch["context"].roll(1, 0))
    assert float((shown - other).detach().abs().max()) > 1e-3


def test_a_students_prompts_are_read_by_its_own_encoder(tmp_path, folder, user):
    run = go(tmp_path, data=str(folder), text="bytes", images=8, holdout=0.0)
    words = ["--teacher", run, "--text", "bytes", "--caption-shuffle", "--images", 8, "--batch", 4]
    words += ["--out", tmp_path, "--name", "s", "--eval-every", 0]
    code, text, errors = user(distill.main, *words)
    assert code == 0, errors
    assert "texts: 2 of 6 images have a caption" in text
    net, meta = load_unet(samplers.find_checkpoint(str(tmp_path / "s")))
    assert meta["network"] == "ByteUNet" and meta["config"]["caption_shuffle"]
    # It goes on training the encoder that it took over.
    table = load_unet(samplers.find_checkpoint(str(run)))[0].text.words.weight
    assert not torch.equal(net.text.words.weight, table)
    draw = ["--ckpt", tmp_path / "s", "--prompt", "a dog", "--n", 1, "--steps", 1]
    code, _, errors = user(samplers.main, *draw, "--out", tmp_path / "x")
    assert code == 0, errors
    scratch = [*words[:-4], "--name", "t", "--model", "nano", "--init", "scratch"]
    code, _, errors = user(distill.main, *scratch, "--block-weight", 0, "--dry-run")
    assert code == 0, errors


# ---- what cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, line",
    [
        ("--text bytes --caption-drop 1.5", "--caption-drop 1.5: wanted 0 to 1."),
        ("--caption-drop 0.5", "--caption-drop changes nothing here: it is of --text."),
        ("--text bytes --model sit-nano", "--model sit-nano: wanted a U-Net without text."),
        ("--text bytes --model sd15", "--model sd15: wanted a U-Net without text."),
        ("--text bytes --classes glasses", "--text and --classes both say what to draw"),
        ("--model sd15", "--model sd15 is told what to draw by text"),
        ("--model tinny", "'tinny' is not a preset"),
    ],
)
def test_flags_that_cannot_be_are_one_line(tmp_path, user, flags, line):
    code, _, errors = user(train.main, *flags.split(), "--out", tmp_path / "runs")
    assert code == 2 and len(errors) == 1 and line in errors[0]
    assert not (tmp_path / "runs").exists()


def test_texts_that_cannot_be_are_one_line(tmp_path, folder, user):
    flags = ["--text", "bytes", "--data", folder, "--resolution", 32, "--out", tmp_path / "runs"]
    flags += ["--model", "nano", "--holdout", 0]
    (folder / "3.caption").write_bytes(b"caf\xe9")
    code, _, errors = user(train.main, *flags)
    assert code == 2 and len(errors) == 1 and "3.caption is not UTF-8 text" in errors[0]
    for file in [*folder.glob("*.txt"), *folder.glob("*.caption")]:
        file.unlink()
    code, _, errors = user(train.main, *flags)
    assert code == 2 and len(errors) == 1
    assert "none of the 6 images has a caption or tags" in errors[0]
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "tags": "a", "caption": 5}')
    code, _, errors = user(train.main, *flags)
    assert code == 2 and len(errors) == 1 and "metadata.jsonl:1: the caption '5'" in errors[0]
    row = {"file_name": "0.png", "tags": "a", "caption": ["b", "c"]}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    code, _, errors = user(train.main, *flags)
    assert code == 2 and len(errors) == 1 and "metadata.jsonl:1: the caption" in errors[0]
    assert not (tmp_path / "runs").exists()


def test_a_network_that_reads_is_asked_in_words(tmp_path, user):
    run = go(tmp_path, text="bytes", images=8)
    draw = ["--ckpt", run, "--n", 1, "--steps", 1]
    for flags, line in (
        ([], 'Add --prompt "a photo of a cat".'),
        (["--prompt", "x", "--chunks", 2], "are for CLIP's text encoders"),
        (["--prompt", "x", "--prompt-weights", "a1111"], "is for CLIP's text encoders"),
        (["--prompt", "x", "--text", "f"], "has an encoder of its own"),
    ):
        code, _, errors = user(samplers.main, *draw, *flags)
        assert code == 2 and line in errors[-1]
    code, _, errors = user(distill.main, "--teacher", run, "--out", tmp_path / "students")
    assert code == 2 and "by an encoder of its own" in errors[-1]
    for flags, line in (
        (["clip-l:x"], "by an encoder of its own"),
        (["bytes", "--context", "x"], "both say what to draw"),
    ):
        words = ["--teacher", run, "--out", tmp_path / "students", "--text", *flags]
        code, _, errors = user(distill.main, *words)
        assert code == 2 and len(errors) == 1 and line in errors[0]
