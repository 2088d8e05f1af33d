"""A latent cache of pictures that keep their shape: what it holds, what a run makes of it, and what
it says when it does not fit."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data.cache as cache_py
import data.encode as encode
import train
from data.buckets import Buckets
from data.cache import encode_command, open_cache, verify
from data.dataset import Stream, latents_of, open_dataset
from data.images import to_float
from data.shards import Layout
from data.stamps import difference
from harness.cli import UserError
from harness.ranks import Ranks
from harness.run import checkpoints
from safetensors.torch import load_file

ONE = Ranks(0, 1, torch.device("cpu"))
BUCKETS = Buckets.of("64x64", 16)
ASKED = ["--buckets", "--area", "64x64", "--step", "16"]
SHAPES = [(64, 64), (70, 66), (90, 50), (60, 100), (128, 32), (200, 60)]


def picture(path: Path, width: int, height: int, seed: int) -> None:
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Four of each shape, mixed."""
    root = tmp_path / "pictures"
    root.mkdir()
    for i, (width, height) in enumerate(4 * SHAPES):
        picture(root / f"{i:02d}.png", width, height, i)
    return root


def encoded(pictures, out, **how) -> Path:
    given = {"vae": "pixel:8", "flip": True, "device": "cpu", "buckets": True, "area": "64x64"}
    encode.encode(encode.Encode(str(out), str(pictures), **(given | {"step": 16} | how)), ONE)
    return Path(out)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Two images a shard, of 192 × 8 × 8 numbers, with their mirrored twins."""
    monkeypatch.setattr(encode, "SHARD", 2 * 2 * 2 * 192 * 8 * 8)


def opened(cache, **how):
    given = {"resolution": 64, "holdout": 0, "flip": True, "buckets": BUCKETS}
    return open_dataset(str(cache), **(given | how))


def test_a_shard_has_one_shape_and_a_cache_all_images(pictures, tmp_path):
    cache = encoded(pictures, tmp_path / "c")
    manifest = cache_py.read_manifest(cache)
    # By hand: 64×64 and 70×66; 90×50; 60×100; 128×32; 200×60.
    counts = [[48, 80, 4], [64, 64, 8], [80, 48, 4], [112, 32, 4], [128, 32, 4]]
    assert manifest["plan"]["counts"] == counts
    assert manifest["plan"]["buckets"] == {"area": "64x64", "step": 16, "small": "upscale"}
    shapes = []
    for shard in manifest["shards"]:
        latents = load_file(cache / shard["file"])["latents"]
        assert latents.shape[:2] == (2, 2) and latents.shape[2] == 192
        shapes.append(tuple(latents.shape[3:]))
    assert shapes == [(10, 6)] * 2 + [(8, 8)] * 4 + [(6, 10)] * 2 + [(4, 14)] * 2 + [(4, 16)] * 2
    assert verify(cache) == []
    before = {file.name: file.read_bytes() for file in cache.iterdir()}
    encoded(pictures, cache)
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == before


def test_a_run_sees_of_a_cache_what_it_sees_of_the_pictures(pictures, tmp_path):
    """Latents, sizes, names, order, noise: by a pixel autoencoder, to fp16's rounding."""
    cached, read = opened(encoded(pictures, tmp_path / "c")), opened(pictures)
    assert list(cached.source.names) == read.source.names
    vae = train.data.vae_for(cached, "pixel:8")
    streams = [Stream(ds, None, (192, 8, 8), 5, flip=True, batch=4) for ds in (cached, read)]
    for position in range(60):
        a, b = (stream[position] for stream in streams)
        assert streams[0].order(position) == streams[1].order(position)
        assert torch.equal(a["sizes"], b["sizes"]) and torch.equal(a["eps"], b["eps"])
        x = latents_of(vae, {"raw": a["raw"][None]})
        y = latents_of(vae, {"image": b["image"][None]})
        assert x.shape == y.shape == (1, *a["eps"].shape) and (x - y).abs().max() < 2e-3


def test_layout_is_where_a_walk_over_all_images_puts_them():
    plan = {"shape": [4, 8, 8], "resolution": 64, "shard": 3, "images": 12, "buckets": {"x": 1}}
    plan["counts"] = [[48, 80, 7], [64, 64, 1], [80, 48, 4]]
    shards = []  # of each image: its shard
    for number, (_, _, images) in enumerate(plan["counts"]):
        begin = shards[-1] + 1 if shards else 0
        shards += [begin + i // 3 for i in range(images)]
    layout = Layout(plan)
    assert len(layout) == shards[-1] + 1 == 6
    assert layout.shard_of(np.arange(12)).tolist() == shards
    assert layout.shard_of(np.array([-1, 5, -1])).tolist() == [-1, 1, -1]
    for k in range(6):
        own = [i for i in range(12) if shards[i] == k]
        assert (layout[k].first, layout[k].images) == (own[0], len(own))
    assert [layout[k].shape for k in range(6)] == [(4, 10, 6)] * 3 + [(4, 8, 8)] + [(4, 6, 10)] * 2
    with pytest.raises(IndexError):
        layout[6]


@pytest.mark.parametrize("change", ["new", "gone", "another shape", "tags"])
def test_pictures_that_changed_cost_their_own_latents_only(pictures, tmp_path, monkeypatch, change):
    cache = encoded(pictures, tmp_path / "c")
    assert difference(open_cache(str(cache), 64, buckets=BUCKETS)) == ""
    if change == "new":
        picture(pictures / "98.png", 100, 60, 98)
        picture(pictures / "10b.png", 62, 62, 99)
    elif change == "gone":
        (pictures / "00.png").unlink()
    elif change == "another shape":
        picture(pictures / "00.png", 60, 100, 7)
    else:
        (pictures / "00.txt").write_text("red")
    said = difference(open_cache(str(cache), 64, buckets=BUCKETS))
    words = {"new": "2 images added", "gone": "1 images gone", "another shape": "1 images changed"}
    assert words.get(change, "1 images with other tags") in said
    assert "--flip --buckets --area 64x64 --step 16 --small upscale --device cpu" in said
    count, batch = [], encode.encode_batch
    monkeypatch.setattr(encode, "encode_batch", lambda *a: count.append(len(a[2])) or batch(*a))
    encoded(pictures, cache)
    assert sum(count) == {"new": 2, "gone": 0, "another shape": 1, "tags": 0}[change]
    assert verify(cache) == []
    ds, whole = opened(cache), opened(encoded(pictures, tmp_path / "whole"))
    assert list(ds.source.names) == list(whole.source.names)
    for i in range(len(ds)):
        for mirrored in (False, True):
            a, b = ds.view(i, mirrored), whole.view(i, mirrored)
            assert torch.equal(a["raw"], b["raw"]) and torch.equal(a["sizes"], b["sizes"])


def test_a_run_on_a_cache_of_buckets_resumes_bitwise(pictures, tmp_path, user, monkeypatch):
    black = torch.zeros(32, 3, 64, 64, dtype=torch.uint8)
    monkeypatch.setattr(train, "draw_samples", lambda *how, **more: black)
    cache = encoded(pictures, tmp_path / "c", vae="pca")
    flags = ["--data", cache, "--buckets", "--area", "64x64", "--step", 16, "--model", "nano"]
    flags += ["--batch", 4, "--images", 32, "--flip", "--save-every", 16, "--preview-every", 0]
    flags += ["--eval-every", 16, "--dtype", "fp32", "--out", tmp_path, "--name"]
    assert user(train.main, *flags, "whole")[0] == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(checkpoints(tmp_path / "cut")[-1])
    (tmp_path / "cut/samples/final.png").unlink()
    code, out, errors = user(train.main, *flags, "cut")
    assert code == 0 and "at 16 of 32" in out, errors
    newest = [checkpoints(tmp_path / run)[-1] for run in ("whole", "cut")]
    a, b = (load_file(folder / "model.safetensors") for folder in newest)
    assert a.keys() == b.keys() and [key for key in a if not torch.equal(a[key], b[key])] == []
    assert "buckets, 5 of 9 with images: 48×80" in out


def test_small_pictures_are_left_out_of_a_cache_and_named(pictures, tmp_path, capsys):
    picture(pictures / "small.png", 20, 20, 1)
    cache = encoded(pictures, tmp_path / "c", small="skip")
    skipping = Buckets.of("64x64", 16, skip_small=True)
    ds = opened(cache, buckets=skipping)
    assert len(ds) == 24 and "small.png (20×20 is smaller than its bucket, 64×64)" in ds.report
    # Touched, it is still none.
    picture(pictures / "small.png", 21, 21, 2)
    assert difference(ds.source) == ""


def test_the_command_that_mends_it_is_the_command_that_made_it(pictures, tmp_path, user):
    cache = encoded(pictures, tmp_path / "c")
    manifest = cache_py.read_manifest(cache)
    whole = {file.name: file.read_bytes() for file in cache.iterdir()}
    (cache / "shard-00003.safetensors").unlink()
    code, _, errors = user(train.main, "--data", cache, *ASKED)
    assert code == 2 and "1 of 12 shards are missing" in errors[-1]
    command = encode_command(cache, manifest["plan"])
    assert command in errors[-1] and "--buckets --area 64x64 --step 16 --small upscale" in command
    code, out, _ = user(encode.main, *command.split()[3:])
    assert code == 0 and "buckets, 5 of 9 with images: 48×80 4, 64×64 8, 80×48 4" in out
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == whole


# ---- what does not fit --------------------------------------------------------------------------

UNFIT = {
    "squares": (["--resolution", "64"], "holds buckets of --area 64x64 --step 16 --small upscale."),
    "another step": ([*ASKED[:-1], "32"], "holds buckets of --area 64x64 --step 16 --small upsc"),
    "skipping": ([*ASKED, "--small", "skip"], "holds buckets of --area 64x64 --step 16 --small "),
    "random crops": ([*ASKED, "--crop", "random"], "was encoded with crop center, wanted random"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_cache_of_buckets_is_for_these_buckets_only(pictures, tmp_path, user, case):
    more, message = UNFIT[case]
    cache = encoded(pictures, tmp_path / "c")
    code, _, errors = user(train.main, "--data", cache, "--out", tmp_path / "runs", *more)
    assert code == 2 and len(errors) == 1 and message in errors[0], errors
    assert not (tmp_path / "runs").exists()


def test_a_cache_of_squares_is_for_no_buckets(tmp_path, user):
    cache = tmp_path / "c"
    how = {"vae": "pixel:8", "device": "cpu"}
    encode.encode(encode.Encode(str(cache), "toyfaces:4", **how), ONE)
    code, _, errors = user(train.main, "--data", cache, "--out", tmp_path / "runs", *ASKED)
    assert code == 2 and "holds square pictures.  Leave --buckets out." in errors[-1]
    assert cache_py.read_plan(cache).keys().isdisjoint({"buckets", "counts"})


FORGED = {
    "a bucket without images": (
        lambda plan: plan["counts"][1].__setitem__(2, 0),
        "plan.counts[1][2] is 0: wanted a whole number from 1",
    ),
    "fewer images": (
        lambda plan: plan["counts"][1].__setitem__(2, 7),
        "its 12 shards do not hold the 24 images of its plan",
    ),
    "images of another bucket": (
        lambda plan: plan["counts"].__setitem__(slice(0, 2), [[48, 80, 8], [64, 64, 4]]),
        "its images are not of the buckets of the plan",
    ),
    "a size that is none of its own": (
        lambda plan: plan["counts"][1].__setitem__(slice(0, 2), [72, 56]),
        "its images are not of the buckets of the plan",
    ),
    "an area that is none": (lambda plan: plan["buckets"].update(area="x"), "--area x: wanted"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_plan_is_one_line(pictures, tmp_path, user, case):
    change, message = FORGED[case]
    cache = encoded(pictures, tmp_path / "c")
    manifest = cache_py.read_manifest(cache)
    change(manifest["plan"])
    (cache / "manifest.json").write_text(cache_py.sealed(manifest))
    code, _, errors = user(train.main, "--data", cache, "--out", tmp_path / "runs", *ASKED)
    # Before it, pixels' statistics are warned of.
    found = [line for line in errors if not line.startswith("warning: the latents of")]
    assert code == 2 and len(found) == 1 and message in found[0], errors


@pytest.mark.parametrize(
    "step, vae, message",
    [
        (20, "pixel:8", "--step 20: --vae pixel:8 needs sides that are divisible by 8.  Try"),
        (20, "pca", "--step 20: --vae pca needs sides that are divisible by 8.  Try --step 40."),
    ],
)
def test_a_step_that_cannot_be_encoded_is_one_line(pictures, tmp_path, step, vae, message):
    with pytest.raises(UserError) as error:
        encoded(pictures, tmp_path / "c", step=step, vae=vae)
    assert str(error.value).startswith(message) and not (tmp_path / "c").exists()


def test_damage_in_a_shard_of_any_bucket_is_found(pictures, tmp_path):
    cache = encoded(pictures, tmp_path / "c")
    for k in (0, 5, 11):
        shard = cache / f"shard-{k:05d}.safetensors"
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert verify(cache) == [f"{shard.name}: checksum"]
        shard.write_bytes(whole)
    latents = opened(cache).view(23)["raw"]
    assert latents.shape == (192, 4, 16)
    vae = train.data.vae_for(opened(cache), "")
    own = vae.encode(to_float(opened(pictures).image(23)[None]))[0]
    assert (vae.from_raw(latents[None])[0] - own).abs().max() < 2e-3
