"""Encoding with a convolutional autoencoder: bytes are a function of the plan; autoencoders and
images may move; every bit is watched."""

import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data.cache as cache_py
import data.encode as encode
import train
from autoencoders import small
from ckpt import read_tensors
from conftest import ROOT
from data.cache import open_cache, self_check, verify
from data.dataset import latents_of, open_dataset
from data.encode import Encode
from data.sources import open_source
from harness.cli import UserError
from harness.ranks import Ranks
from test_cache import files, near, pixels_of
from vae import load_vae, save_vae

ONE = Ranks(0, 1, torch.device("cpu"))
SHARD = 3 * 2 * 32 * 16  # bytes: three images of 32 px


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """Small shards; the number of threads is this process's, and encoded() sets it."""
    monkeypatch.setattr(encode, "SHARD", SHARD)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "flux2.safetensors"
    save_vae(path, small("flux2"))
    return path


def encoded(out, vae, threads=1, data="toyfaces:14"):
    """In this process; the batch of 3 is split unevenly by 2 threads, which rounds convolutions
    otherwise than 1."""
    torch.set_num_threads(threads)
    cfg = Encode(str(out), data, str(vae), resolution=32, batch=3, device="cpu")
    encode.encode(cfg, ONE)
    return files(out)


@pytest.fixture(scope="module")
def cache(weights, tmp_path_factory):
    """Made by two threads."""
    out = tmp_path_factory.mktemp("caches") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "SHARD", SHARD)
        encoded(out, weights, threads=2)
    return out


def torchrun(code, *args, ranks=2):
    """The command in several processes, after `code` -> (exit code, all that was printed)."""
    head = f"import data.encode as encode\nencode.SHARD = {SHARD}\n"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += [f"--nproc_per_node={ranks}", "--no-python", sys.executable, "-c"]
    words += [f"{head}{code}\nencode.cli(encode.main)", "--resolution", "32", "--device", "cpu"]
    words += map(str, args)
    done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


# ---- a function of the plan ---------------------------------------------------------------------


def test_kills_ranks_and_threads_leave_no_trace(cache, weights, tmp_path, monkeypatch, capsys):
    whole, save = files(cache), encode.save_shard
    assert cache_py.read_sealed(cache / "plan.json")["threads"] == 2 and len(whole) == 5 + 4

    def killed(out, plan, k, *rest):
        if k == 2:
            raise KeyboardInterrupt
        save(out, plan, k, *rest)

    monkeypatch.setattr(encode, "save_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        encoded(tmp_path / "one", weights, threads=2)
    monkeypatch.setattr(encode, "save_shard", save)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert len(files(tmp_path / "one")) == 4
    # Gone on with by another number of threads.
    assert encoded(tmp_path / "one", weights, threads=1) == whole
    message = f"encoding with 2 threads, not 1, as {tmp_path / 'one'} was begun"
    assert message in capsys.readouterr().out
    args = ["--data", "toyfaces:14", "--vae", weights, "--batch", 3, "--out", tmp_path / "two"]
    code, text = torchrun("", *args)
    assert code == 0 and "encoding with 2 threads, not 1" in text, text
    assert files(tmp_path / "two") == whole
    assert encoded(tmp_path / "fresh", weights, threads=2) == whole


@pytest.mark.parametrize("key, value", [("torch", "2.0.1"), ("device", "NVIDIA X"), ("threads", 3)])
def test_what_rounds_otherwise_is_said_or_taken_over(cache, weights, tmp_path, key, value):
    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    plan = cache_py.read_sealed(copy / "plan.json")
    (copy / "plan.json").write_text(cache_py.sealed({**plan, key: value}))
    (copy / "manifest.json").unlink()
    if key == "threads":  # its shards are of another plan: all are encoded again
        encoded(copy, weights)
        assert torch.get_num_threads() == 3 and not verify(copy)
        assert cache_py.read_sealed(copy / "manifest.json")["plan"]["threads"] == 3
    else:
        message = f"was begun with another plan: {key} {value}, now .*Give another --out"
        with pytest.raises(UserError, match=message):
            encoded(copy, weights)
        assert files(copy)["shard-00000.safetensors"] == files(cache)["shard-00000.safetensors"]


def test_a_rank_that_is_not_like_the_others_says_so(weights, tmp_path):
    code = "import os\nif os.environ['RANK'] == '1': encode.device_name = lambda device: 'NVIDIA X'"
    args = ["--data", "toyfaces:14", "--vae", weights, "--out", tmp_path / "c"]
    code, text = torchrun(code, *args)
    assert code != 0 and "now NVIDIA X" in text, text
    assert "error [rank 1]: rank 1 is not like rank 0: device cpu" in text, text


def test_a_rank_far_behind_is_waited_for(weights, tmp_path):
    """Longer than torch waits by itself, here cut to two seconds."""
    code = """import os, time, torch.distributed.distributed_c10d as c10d
from datetime import timedelta
c10d.default_pg_timeout = timedelta(seconds=2)
save = encode.save_shard
def slow(*args):
    time.sleep(3 * (os.environ['RANK'] == '1'))
    save(*args)
encode.save_shard = slow"""
    args = ["--data", "toyfaces:9", "--vae", weights, "--out", tmp_path / "c"]
    code, text = torchrun(code, *args)
    assert code == 0 and not verify(tmp_path / "c"), text


def test_one_folder_however_it_is_spelled(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "im").mkdir()
    for i in range(5):
        noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"im/{i}.png")
    first = encoded("c", weights, data="im")
    for spelled in ("im/", "./im", str(tmp_path / "im"), "im/../im"):
        assert encoded("c", weights, data=spelled) == first
    other = encoded("d", weights, data=str(tmp_path / "im"))
    # These show how it was spelled.
    assert {k for k in first if first[k] != other[k]} == {"plan.json", "manifest.json"}
    assert open_cache("c", 32).hash == open_cache("d", 32).hash
    (tmp_path / "im/4.png").unlink()
    encoded("c", weights, data="im")
    assert open_cache("c", 32).hash != open_cache("d", 32).hash


# ---- the autoencoder ----------------------------------------------------------------------------


def test_an_autoencoder_may_move_but_not_change(cache, weights, tmp_path, user, monkeypatch):
    # Drawing takes long, and is not the subject.
    black = torch.zeros(32, 3, 32, 32, dtype=torch.uint8)
    monkeypatch.setattr(train, "draw_samples", lambda *how, **more: black)
    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    new, other = tmp_path / "new.safetensors", tmp_path / "other.safetensors"
    old = Path(shutil.copy(weights, tmp_path / "old.safetensors"))
    encoded(copy, old)
    save_vae(other, small("flux2", seed=1))
    trained = ["--data", copy, "--resolution", 32, "--model", "nano", "--batch", 4, "--images", 8]
    trained += ["--save-every", 4, "--eval-every", 0, "--preview-every", 0]
    trained += ["--out", tmp_path, "--name", "run", "--vae"]
    assert user(train.main, *trained, old)[0] == 0
    before = read_tensors(tmp_path / "run/ckpt/000000000008/model.safetensors")[0]
    old.rename(new)
    with pytest.raises(UserError, match="cannot load flux2.*say where it is with --vae"):
        verify(copy)
    with pytest.raises(UserError, match="holds latents of another autoencoder"):
        verify(copy, str(other))
    assert verify(copy, str(new)) == []
    shutil.rmtree(tmp_path / "run/ckpt/000000000008")
    (tmp_path / "run/samples/final.png").unlink()
    code, _, errors = user(train.main, *trained, other)
    message = "is not the flux2 autoencoder that this belongs to: its fingerprint"
    assert code == 2 and message in errors[-1]
    code, _, errors = user(train.main, *trained[:-1])  # without --vae
    assert code == 2 and "was made with another config: vae" in errors[-1]
    code, out, errors = user(train.main, *trained, new)
    after, meta = read_tensors(tmp_path / "run/ckpt/000000000008/model.safetensors")
    assert code == 0 and "resuming" in out and meta["vae"]["source"] == str(new), errors
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert "finished" in user(train.main, *trained, new)[1]
    code, _, errors = user(train.main, *trained, other)  # also when there is nothing left to do
    assert code == 2 and "is not the flux2 autoencoder" in errors[-1]
    with pytest.raises(UserError, match="the autoencoder changed"):
        encoded(copy, other)
    was = files(copy)
    now = encoded(copy, new)  # nothing to encode; its new place is kept
    assert {k for k in now if now[k] != was[k]} == {"vae.safetensors", "manifest.json"}
    assert verify(copy) == [] and open_cache(str(copy), 32).hash == open_cache(str(cache), 32).hash


def test_a_run_on_images_finds_its_linear_autoencoder_unchanged(tmp_path, user):
    args = ["--data", "toyfaces:40", "--resolution", 32, "--model", "nano", "--batch", 4]
    args += ["--images", 4, "--eval-every", 0, "--preview-every", 0]
    args += ["--out", tmp_path, "--name", "run", "--vae"]
    assert user(train.main, *args, "pixel:8")[0] == 0
    copy = shutil.copy(tmp_path / "run/vae.safetensors", tmp_path / "same.safetensors")
    assert "finished" in user(train.main, *args, copy)[1]
    code, _, errors = user(train.main, *args, "pixel:4")
    assert code == 2 and "was begun with another autoencoder (pixel:8) than pixel:4" in errors[-1]


@torch.no_grad()
def test_both_layouts_of_flux2_are_served_by_one_cache(cache, weights, tmp_path):
    packed = f"flux2:packed128:{weights}"
    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    again = encoded(copy, packed)
    fresh = encoded(tmp_path / "fresh", packed, threads=2)
    # What differs is the layout to use unless told otherwise.
    for other in (again, fresh):
        changed = {k for k, v in files(cache).items() if other[k] != v}
        assert changed == {"vae.safetensors", "manifest.json"}
    one = cache_py.read_sealed(cache / "manifest.json")
    two = cache_py.read_sealed(copy / "manifest.json")
    assert {k for k in one if one[k] != two[k]} == {"vae"} and len(one["channel_std"]) == 32
    source = open_cache(str(cache), 32)
    x = pixels_of(open_source("toyfaces:14", 32))
    raw = torch.stack([source.raw(i) for i in range(14)])
    for name, shape in ((weights, (32, 4, 4)), (packed, (128, 2, 2))):
        vae = load_vae(name)
        self_check(source, vae)
        exact, ours = vae.encode(x), vae.from_raw(raw)
        assert exact.shape[1:] == shape and near(ours, exact)
        assert one["std"] == pytest.approx(float(ours.double().std(correction=0)), rel=1e-6)
        run = {"out": str(tmp_path), "name": str(shape[0]), "resolution": 32, "model": "nano"}
        cfg = train.resolve(train.Config(data=str(cache), vae=str(name), **run))
        tr = train.setup(cfg, ONE)
        assert tr.latent_shape == shape and tr.net.cfg.in_channels == shape[0]
        batch = next(train.data.batches(train.data.Stream(tr.ds, None, shape, 0), iter([[0, 1]])))
        assert latents_of(vae, batch).shape[1:] == shape == batch["eps"].shape[1:]


# ---- every bit ----------------------------------------------------------------------------------


def test_a_plan_of_another_cache_is_found(tmp_path):
    copy = tmp_path / "c"
    encoded(copy, "pixel:8")
    plan = cache_py.read_sealed(copy / "plan.json")
    (copy / "plan.json").write_text(cache_py.sealed({**plan, "batch": 99}))
    assert "plan.json: not that of the manifest" in verify(copy)


def test_any_flipped_bit_in_any_file_is_found(tmp_path, monkeypatch):
    """Every file, its first bytes, its header and its end, and anywhere; --verify finds it, and
    encoding again mends it."""
    copy, r, tried = tmp_path / "c", random.Random(0), 0
    written, write = [], encode.write_shard
    before = encoded(copy, "pixel:8")
    assert verify(copy) == [] and encoded(copy, "pixel:8") == before and len(before) >= 9

    def noted(out, plan, k, *rest):
        written.append(k)
        write(out, plan, k, *rest)

    monkeypatch.setattr(encode, "write_shard", noted)
    for name in before:
        data = (copy / name).read_bytes()
        places = [0, 7, 8, r.randrange(8, 90), len(data) - 1]
        places += [r.randrange(len(data)) for _ in range(6)]
        for at in places:
            bad = bytearray(data)
            bad[at] ^= 1 << r.randrange(8)
            (copy / name).write_bytes(bad)
            found = verify(copy)
            assert found and name in found[0], (name, at)
            if name == "manifest.json":
                message = "manifest.json is damaged.*Repeat the command"
                with pytest.raises(UserError, match=message):
                    open_cache(str(copy), 32)
            tried += 1
        written.clear()
        # With the last flip still in it; nothing else is encoded.
        assert encoded(copy, "pixel:8") == before, name
        assert verify(copy) == [] and written == [int(k) for k in re.findall(r"shard-(\d+)", name)]
    assert tried >= 90


# ---- decoding ahead -----------------------------------------------------------------------------


def test_images_are_decoded_ahead_in_order_and_not_without_end():
    asked, lock, gate = set(), threading.Lock(), threading.Event()

    class Slow:
        @staticmethod
        def pixel(i):
            with lock:
                asked.add(i)
            if i >= 4 and not gate.wait(30):
                raise TimeoutError
            return np.full((2, 2, 3), i, np.uint8)

    pulled = []
    stream = encode.decoded(Slow, (pulled.append(k) or range(k, k + 2) for k in range(0, 40, 2)))
    taken = []
    taker = threading.Thread(target=lambda: taken.append(next(stream)))
    taker.start()
    taker.join(30)
    assert not taker.is_alive() and taken[0].shape == (2, 3, 2, 2)
    assert taken[0].flatten(1)[:, 0].tolist() == [0, 1]  # 4 and on are not there yet
    wanted = min(2 * (encode.AHEAD + 1), 4 + min(os.cpu_count(), 16))
    end = time.perf_counter() + 30
    while len(asked) < wanted and time.perf_counter() < end:
        time.sleep(0.01)
    assert len(asked) > 4 and len(pulled) == encode.AHEAD + 1
    gate.set()
    rest = torch.cat(list(stream))
    assert rest.dtype == torch.uint8 and rest[:, 0, 0, 0].tolist() == list(range(2, 40))


def test_the_bar_counts_the_images_of_this_rank_batch_by_batch(weights, tmp_path, monkeypatch):
    bars = []

    class Bar(list):  # the steps of tqdm's
        def __init__(self, total, **_):
            self.total = total
            bars.append(self)

        update = list.append
        __enter__, __exit__ = lambda self: self, lambda *_: None

    monkeypatch.setattr(encode, "tqdm", Bar)
    encoded(tmp_path / "c", weights)
    (tmp_path / "c/shard-00001.safetensors").unlink()
    encoded(tmp_path / "c", weights)
    assert [(bar.total, *bar) for bar in bars] == [(14, 0, 3, 3, 3, 3, 2), (14, 11, 3)]


def test_an_image_damaged_while_encoding_is_one_line(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("data.sources.IN_MEMORY", 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "im").mkdir()
    for i in range(9):
        Image.new("RGB", (32, 32), (9 * i, 0, 0)).save(tmp_path / f"im/{i}.png")
    whole = encoded("whole", weights, data="im")
    file = tmp_path / "im/7.png"
    keep = file.read_bytes()

    def damaged(*how):
        source = open_source(*how)
        file.write_bytes(b"no")
        return source

    monkeypatch.setattr(encode, "open_source", damaged)
    with pytest.raises(UserError, match="7.png: not PNG.*Restore it"):
        encoded("c", weights, data="im")
    monkeypatch.setattr(encode, "open_source", open_source)
    file.write_bytes(keep)
    assert encoded("c", weights, data="im") == whole
    assert len(open_dataset("c", resolution=32, holdout=0)) == 9


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"junk", lambda data: data[:-3] + bytes([data[-3] ^ 64]) + data[-2:]],
    ids=["junk", "bit"],
)
def test_a_damaged_pca_is_fitted_again_the_same(tmp_path, damage):
    before = encoded(tmp_path / "c", "pca")
    file = tmp_path / "c/vae.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    message = "vae.safetensors, its autoencoder, or where that is, is damaged"
    with pytest.raises(UserError, match=message):
        open_cache(str(tmp_path / "c"), 32)
    assert encoded(tmp_path / "c", "pca") == before and verify(tmp_path / "c") == []


def test_the_command_says_which_images_it_could_not_read(tmp_path, monkeypatch, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        Image.new("RGB", (40, 40), (60 * i, 90, 120)).save(images / f"{i}.png")
    (images / "broken.png").write_text("no picture")
    words = ["encode.py", "--data", images, "--out", tmp_path / "cache", "--vae", "pixel"]
    words += ["--resolution", "32", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    encode.main()
    out = capsys.readouterr().out
    assert out.startswith("4 images in ")
    assert "unreadable: broken.png (not PNG, JPEG, WEBP, GIF or BMP)" in out
