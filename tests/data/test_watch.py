"""A latent cache is checked while training reads it: no damaged latent reaches a saved weight."""

import os
import pickle
import random
import re
import shlex
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data.encode as encode
import data.watch as watch
import train
from conftest import ROOT
from data.cache import open_cache, shard_path
from data.dataset import Stream, batches, open_dataset
from data.encode import Encode
from distillation.pretrain import Pretrain, pretrain
from harness.cli import UserError
from harness.ranks import Ranks
from harness.run import checkpoints
from test_cache import files
from vae import save_vae
from autoencoders import small

ONE = Ranks(0, 1, torch.device("cpu"))
SHARD = 3 * 2 * 192 * 16  # bytes: three images of 32 px through pixel:8


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small shards; drawing takes long, and is not the subject."""
    monkeypatch.setattr(encode, "SHARD", SHARD)
    black = torch.zeros(32, 3, 32, 32, dtype=torch.uint8)
    monkeypatch.setattr(train, "draw_samples", lambda *how, **more: black)


def made(folder: Path, first: int = 0) -> Path:
    """A cache of 14 images, which lie beside it."""
    images = folder / "images"
    images.mkdir(parents=True)
    for i in range(14):
        noise = np.random.default_rng(first + i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(images / f"{i:02d}.png")
    cfg = Encode(str(folder / "c"), str(images), "pixel:8", resolution=32, batch=2, device="cpu")
    encode.encode(cfg, ONE)
    return folder / "c"


def flip(path: Path, place: int, bit: int = 2) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def words(cache: Path, out: Path, *more):
    args = ["--data", cache, "--resolution", 32, "--model", "nano", "--batch", 4, "--images", 8]
    return [*args, "--eval-every", 0, "--preview-every", 0, "--save-every", 4, "--out", out, *more]


def another(cache: Path, tmp_path: Path) -> None:
    shutil.copy(shard_path(made(tmp_path / "other", 50), 3), shard_path(cache, 3))


def swapped(cache: Path, tmp_path: Path) -> None:
    a, b = shard_path(cache, 2).read_bytes(), shard_path(cache, 3).read_bytes()
    shard_path(cache, 2).write_bytes(b)
    shard_path(cache, 3).write_bytes(a)


DAMAGE = {
    "a latent": (lambda cache, _: flip(shard_path(cache, 3), -5), [3]),
    "of another cache of equal shapes": (another, [3]),
    "in another order": (swapped, [2, 3]),
}


@pytest.mark.parametrize("kind, workers", [*((kind, 0) for kind in DAMAGE), ("a latent", 1)])
def test_a_damaged_shard_ends_a_run_before_it_saves_and_is_mended_alone(
    tmp_path, user, monkeypatch, kind, workers
):
    cache = made(tmp_path / "own")
    before, (damage, shards) = files(cache), DAMAGE[kind]
    damage(cache, tmp_path)
    code, _, errors = user(train.main, *words(cache, tmp_path, "--name", "r", "--workers", workers))
    said = [line for line in errors if not line.startswith("kernels:")]
    assert code == 2 and len(said) == 1, errors
    # Headers hold sums in decimals, so that one of another cache mostly has another length too.
    problem = r"is damaged, or of another cache|\(\d+,\d+ bytes, wanted \d+,\d+\)"
    assert re.search(rf"shard-0000{shards[0]}.safetensors ({problem})", said[0]), said
    assert not checkpoints(tmp_path / "r")

    written, write = [], encode.write_shard

    def noted(out, plan, k, *rest):
        written.append(k)
        write(out, plan, k, *rest)

    monkeypatch.setattr(encode, "write_shard", noted)
    command = shlex.split(said[0].partition("python -m data.encode ")[2])
    assert user(encode.main, *command)[0] == 0
    assert written == shards and files(cache) == before
    result = user(train.main, *words(cache, tmp_path, "--name", "r"))
    assert result[0] == 0, result


def test_weights_wait_for_a_check_that_is_slow(tmp_path, user, monkeypatch):
    cache = made(tmp_path)
    gate, join, asked = threading.Event(), watch.Watch.join, []

    def joined(self, timeout=None):
        asked.append(timeout)
        if len(asked) > 2:  # the run waits in earnest
            gate.set()
        join(self, timeout)

    monkeypatch.setattr(watch, "is_whole", lambda source, k: gate.wait(60) and k < 1)
    monkeypatch.setattr(watch.Watch, "join", joined)
    monkeypatch.setattr(watch, "QUIET", 0.05)
    code, out, errors = user(train.main, *words(cache, tmp_path, "--name", "r"))
    assert code == 2 and "shard-00001" in errors[-1] and not checkpoints(tmp_path / "r")
    assert "are compared with their checksums: 0 of 5 so far" in out and "\ncompared, after" in out


class Others:
    """Another rank, which answers one question after another: is it still busy, did it find
    damage?"""

    def __init__(self, answers):
        self.device, self.answers = torch.device("cpu"), list(answers)

    def all_reduce(self, x):
        return x + self.answers.pop(0)


def test_ranks_wait_for_each_other_and_all_of_them_stop(tmp_path):
    """None is left alone in a sum, in which it would end in an error of its own."""
    source = open_cache(str(made(tmp_path)), 32)
    watch.start(source)
    others = Others([1, 1, 0, 0])
    watch.wait(source, others)
    assert not others.answers
    with pytest.raises(UserError, match=r"^another rank found damage in .*/c\."):
        watch.wait(source, Others([0, 1]))
    others = Others([0, 0])
    source.watch.damaged = 3
    with pytest.raises(UserError, match="shard-00003.*is damaged, or of another cache"):
        watch.wait(source, others)
    assert not others.answers  # they were told


@pytest.mark.parametrize("name, value", [("LOCAL_WORLD_SIZE", "0"), ("LOCAL_RANK", "two")])
def test_shares_of_a_machine_make_sense(monkeypatch, name, value):
    monkeypatch.setattr(watch.dist, "is_initialized", lambda: True)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert watch.share_of(5) == range(5)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert list(watch.share_of(5)) == [1, 3]
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"the environment's {name}='{value}'"):
        watch.share_of(5)


def test_a_shard_that_became_a_pipe_is_damage(tmp_path):
    source = open_cache(str(made(tmp_path)), 32)
    shard_path(source.root, 1).unlink()
    os.mkfifo(shard_path(source.root, 1))
    assert watch.is_whole(source, 0) and not watch.is_whole(source, 1)


def test_an_assessor_is_not_saved_either(tmp_path, user):
    cache = made(tmp_path)
    result = user(train.main, *words(cache, tmp_path, "--name", "r"))
    assert result[0] == 0, result
    flip(shard_path(cache, 4), -5)
    cfg = Pretrain(
        teacher=str(tmp_path / "r"),
        out=str(tmp_path / "a.safetensors"),
        samples=8,
        profile_samples=8,
        steps=1,
        bins=4,
        device="cpu",
        holdout=0.3,
    )
    with pytest.raises(UserError, match="shard-00004.*is damaged, or of another cache"):
        pretrain(cfg)
    assert not (tmp_path / "a.safetensors").exists()


def test_any_flipped_bit_is_found_or_changes_nothing(tmp_path):
    """Positions in all files: refused when opened, found by the check, or not read."""
    cache, r = made(tmp_path), random.Random(0)
    whole = {path: path.read_bytes() for path in cache.glob("[a-z]*")}
    sizes = {path: len(data) for path, data in whole.items()}
    kept = [open_cache(str(cache), 32).raw(i) for i in range(14)]
    unread = {"plan.json", "contents.safetensors"}  # of the encoder; a run does not open them
    found = dict.fromkeys((path.name for path in whole), 0)
    places = [r.choices(list(sizes), sizes.values())[0] for _ in range(200)]
    places += [r.choice(list(sizes)) for _ in range(200)]
    for path in places:
        at, bit = r.randrange(sizes[path]), r.randrange(8)
        flip(path, at, bit)
        try:
            source = open_cache(str(cache), 32)
            watch.start(source)
            watch.wait(source)
            assert path.name in unread, (path.name, at, bit)
            assert all(torch.equal(source.raw(i), kept[i]) for i in range(14))
        except UserError:
            found[path.name] += 1
        path.write_bytes(whole[path])
    assert all(n > 10 for name, n in found.items() if name not in unread), found


def test_a_cache_of_an_earlier_version_is_whole():
    source = open_cache(str(ROOT / "tests/fixtures/834bb60/cache"), 32)
    watch.wait(source)  # nothing was read
    watch.start(source)
    watch.wait(source)
    assert source.watch.done == len(source.manifest["shards"])


def test_processes_of_a_machine_share_the_shards(monkeypatch):
    assert list(watch.share_of(5)) == [0, 1, 2, 3, 4]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with monkeypatch.context() as patch:
        patch.setattr(watch.dist, "is_initialized", lambda: True)
        patch.setenv("LOCAL_RANK", "0")
        assert list(watch.share_of(5)) == [0, 2, 4]
        patch.setenv("LOCAL_RANK", "1")
        assert list(watch.share_of(5)) == [1, 3]


def test_a_cache_is_read_once_for_each_time_that_it_is_opened(tmp_path):
    ds = open_dataset(str(made(tmp_path)), resolution=32, holdout=0)
    stream = Stream(ds, None, (192, 4, 4), 0)
    next(batches(stream, iter([[0]])))
    first = ds.source.watch
    next(batches(stream, iter([[0]])))
    assert ds.source.watch is first and pickle.loads(pickle.dumps(ds.source)).watch is None


def test_an_autoencoder_is_named_as_it_was_typed(tmp_path, monkeypatch, user):
    weights = tmp_path / "a b.safetensors"
    save_vae(weights, small("flux2"))
    out = tmp_path / "c"
    given = ["--data", "toyfaces:6", "--resolution", 32, "--dtype", "bf16", "--flip"]
    given += ["--vae", weights, "--device", "cpu", "--out", out]
    assert user(encode.main, *given)[0] == 0
    before = files(out)
    shard_path(out, 0).unlink()
    with pytest.raises(UserError, match="Encode them again, and nothing else") as error:
        open_cache(str(out), 32)
    command = shlex.split(str(error.value).partition("python -m data.encode ")[2])
    assert f"flux2:unpacked32:{weights}" in command and "--flip" in command
    assert user(encode.main, *command)[0] == 0
    assert files(out) == before
