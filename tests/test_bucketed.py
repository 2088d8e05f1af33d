"""Training on pictures that keep their shape: train.py --buckets, from files to checkpoints."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import objectives
import train
from conftest import ROOT
from data import heldout
from data.buckets import Buckets
from data.dataset import Stream, fit_vae, open_dataset, rng
from data.images import to_float
from data.order import BucketOrder
from harness.run import checkpoints
from objectives import Loss
from vae import fit_pca

BUCKETS = Buckets.of("64x64", 16)
# Of which the last two are smaller than their bucket, one of them than any.
SHAPES = [(64, 64), (70, 66), (90, 50), (60, 100), (128, 32), (200, 60), (63, 64), (30, 20)]
BATCH, IMAGES = 4, 64


def noise(width: int, height: int, seed: int) -> Image.Image:
    """Smooth enough to be resized alike by whoever does it."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Three of each shape."""
    root = tmp_path_factory.mktemp("pictures")
    for i, (width, height) in enumerate(3 * SHAPES):
        noise(width, height, i).save(root / f"{i:02d}.png")
    return root


def flags(pictures, out, *more) -> list[str]:
    given = ["--data", pictures, "--buckets", "--area", "64x64", "--step", 16, "--model", "nano"]
    given += ["--batch", BATCH, "--images", IMAGES, "--lr", 2e-4, "--shift", "auto", "--flip"]
    given += ["--crop", "random", "--log-every", BATCH, "--preview-every", 0, "--dtype", "fp32"]
    return [str(word) for word in (*given, "--out", out, "--name", "run", *more)]


def by_ranks(*args, ranks=2) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *launcher, "train.py", *args]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def final(run: Path) -> dict[str, torch.Tensor]:
    folder = checkpoints(run)[-1]
    return {f"{f.name}:{k}": v for f in sorted(folder.iterdir()) for k, v in load_file(f).items()}


def losses(run: Path) -> list:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(r["images"], r["loss"], r["grad_norm"]) for r in rows if r["event"] == "train"]


def cut_back(run: Path, images: int, to: Path) -> Path:
    """A copy of a run as it was after so many images."""
    shutil.copytree(run, to)
    for folder in checkpoints(to):
        if int(folder.name) > images:
            shutil.rmtree(folder)
    (to / "samples/final.png").unlink()
    return to


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch):
    """Drawing takes long, and is not the subject; the runs of two ranks do draw."""
    black = torch.zeros(32, 3, 64, 64, dtype=torch.uint8)
    monkeypatch.setattr(train, "draw_samples", lambda *how, **more: black)


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory) -> Path:
    """A run of one rank, with all its checkpoints."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        more = ("--save-every", str(BATCH), "--keep", "99", "--eval-every", "32")
        patch.setattr(sys, "argv", ["train.py", *flags(pictures, out, *more)])
        black = torch.zeros(32, 3, 64, 64, dtype=torch.uint8)
        patch.setattr(train, "draw_samples", lambda *how, **more: black)
        train.main()
    return out / "run"


# ---- a run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [4, 28, 60])
def test_bucketed_runs_resume_bitwise_at_any_step(whole, pictures, tmp_path, user, images):
    cut_back(whole, images, tmp_path / "run")
    more = ("--save-every", BATCH, "--keep", 99, "--eval-every", 32)
    code, out, errors = user(train.main, *flags(pictures, tmp_path, *more))
    assert code == 0 and f"resuming {tmp_path / 'run'} at {images} " in out, (out, errors)
    a, b = final(whole), final(tmp_path / "run")
    assert a.keys() == b.keys() and len(a) > 300
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert losses(tmp_path / "run") == losses(whole) and len(losses(whole)) == IMAGES // BATCH


def test_two_ranks_split_the_batches_of_one_and_resume_bitwise(whole, pictures, tmp_path):
    more = ("--save-every", "32", "--eval-every", "0", "--accum", "2")
    by_ranks(*flags(pictures, tmp_path, *more))
    one, two = losses(whole), losses(tmp_path / "run")
    assert [row[1] for row in two] == pytest.approx([row[1] for row in one], rel=1e-5)
    assert [row[2] for row in two] == pytest.approx([row[2] for row in one], rel=1e-3)
    cut_back(tmp_path / "run", 32, tmp_path / "again/run")
    assert "resuming" in by_ranks(*flags(pictures, tmp_path / "again", *more))
    a, b = final(tmp_path / "run"), final(tmp_path / "again/run")
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_each_batch_has_the_shape_of_its_bucket_and_a_shift_of_its_own(
    pictures, tmp_path, user, monkeypatch
):
    met, loss = [], objectives.Objective.loss

    def seen(self, net, x0, **how):
        if how["q"] is not None:
            met.append((tuple(x0.shape), tuple(how["eps"].shape), self.shift))
        return loss(self, net, x0, **how)

    monkeypatch.setattr(objectives.Objective, "loss", seen)
    assert user(train.main, *flags(pictures, tmp_path, "--eval-every", 0))[0] == 0
    ds = open_dataset(str(pictures), resolution=64, crop="random", buckets=BUCKETS)
    order = BucketOrder(0, ds.frames.members(ds.index), BATCH)
    for step, (shape, eps, shift) in enumerate(met):
        width, height = BUCKETS.sizes[order.bucket(step * BATCH)]
        assert shape == eps == (BATCH, 32, height // 8, width // 8)
        assert shift == pytest.approx((height * width) ** 0.5 / 8 / 32)
    assert len(met) == IMAGES // BATCH and len({shape for shape, _, _ in met}) >= 4


def test_the_report_lists_buckets_counts_and_what_is_enlarged(pictures, tmp_path, user):
    code, out, _ = user(train.main, *flags(pictures, tmp_path, "--holdout", 0, "--images", 4))
    assert code == 0 and "24 found = 24 used + 0 held out" in out
    # By hand: which of the nine each shape is nearest to.
    line = "  buckets, 5 of 9 with images: 48×80 3, 64×64 9, 80×48 6, 112×32 3, 128×32 3"
    assert f"\n{line}\n  smaller than their bucket, and enlarged: 6 of the used\n" in out
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["resolution"] == 64 and config["area"] == "64x64"


def test_small_images_can_be_skipped_and_are_named(pictures, tmp_path, user):
    more = ("--holdout", 0, "--images", 4, "--small", "skip")
    code, out, _ = user(train.main, *flags(pictures, tmp_path, *more))
    assert code == 0 and "24 found = 18 used + 0 held out" in out and "+ 6 unreadable" in out
    assert "06.png (63×64 is smaller than its bucket, 64×64)" in out
    assert "07.png (30×20 is smaller than its bucket, 80×48)" in out
    assert "enlarged" not in out


# ---- what a sample is ---------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_sample_is_what_pillow_cuts_where_its_numbers_say(pictures, crop):
    ds = open_dataset(str(pictures), resolution=64, holdout=0, crop=crop, buckets=BUCKETS)
    stream = Stream(ds, None, (32, 8, 8), seed=0, flip=True, batch=BATCH)
    mirrored = crops = 0
    for position in range(120):
        sample, i = stream[position], stream.order(position)
        height, width, top, left, target_height, target_width = map(int, sample["sizes"])
        image = Image.open(pictures / ds.source.names[ds.index[i]])
        assert image.size == (width, height)
        scale = max(target_width / width, target_height / height)
        size = round(width * scale), round(height * scale)
        resized = np.asarray(image.resize(size, Image.Resampling.LANCZOS), np.int64)
        flipped = rng(0, "sample", position).random(3)[1] < 0.5
        resized = resized[:, ::-1] if flipped else resized
        wanted = resized[top : top + target_height, left : left + target_width]
        got = sample["image"].permute(1, 2, 0).numpy()
        assert got.shape == wanted.shape == (target_height, target_width, 3)
        assert np.abs(got - wanted).max() <= 2
        assert sample["eps"].shape == (32, target_height // 8, target_width // 8)
        mirrored += flipped
        crops += top + left > 0
    assert 30 < mirrored < 90 and crops > 30


def test_parquet_files_are_read_in_buckets_too(pictures, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    files = sorted(pictures.iterdir())
    table = pyarrow.table({"image": [file.read_bytes() for file in files]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    rows = open_dataset(str(tmp_path), resolution=64, holdout=0, buckets=BUCKETS)
    folder = open_dataset(str(pictures), resolution=64, holdout=0, buckets=BUCKETS)
    assert [rows.bucket(i) for i in range(24)] == [folder.bucket(i) for i in range(24)]
    assert all(torch.equal(rows.image(i), folder.image(i)) for i in range(24))


def test_images_that_memory_does_not_hold_are_read_again(pictures, monkeypatch):
    kept = open_dataset(str(pictures), resolution=64, crop="random", buckets=BUCKETS)
    monkeypatch.setattr("data.sources.IN_MEMORY", 0)
    read = open_dataset(str(pictures), resolution=64, crop="random", buckets=BUCKETS)
    assert read.source.pixels is None and kept.source.pixels is not None
    assert read.source.hash == kept.source.hash
    assert all(torch.equal(read.image(i, 0.4), kept.image(i, 0.4)) for i in range(len(kept)))


def test_damaged_pictures_are_named_and_no_other_takes_their_bucket(pictures, tmp_path):
    for file in sorted(pictures.iterdir())[:8]:
        shutil.copy(file, tmp_path)
    data = (tmp_path / "02.png").read_bytes()
    (tmp_path / "02.png").write_bytes(data[: len(data) // 2])  # its header is whole
    (tmp_path / "04.png").write_bytes(b"no picture")
    ds = open_dataset(str(tmp_path), resolution=64, holdout=0, buckets=BUCKETS)
    assert set(ds.source.unreadable) == {"02.png", "04.png"} and len(ds) == 6
    for i, name in enumerate(ds.source.names):
        width, height = SHAPES[int(name[:2])]
        assert ds.frames.originals[i].tolist() == [width, height]
        assert ds.image(i).shape[1:] == BUCKETS.assign([(width, height)]).size(0)[::-1]


# ---- what else reads a data set -----------------------------------------------------------------


def test_the_held_out_loss_is_the_mean_over_images_of_all_shapes(pictures, tmp_path):
    held = open_dataset(str(pictures), resolution=64, holdout=0, buckets=BUCKETS)
    ranks = train.join_ranks("cpu")

    def loss(batch):
        found = batch["image"].float().flatten(1).mean(1) * batch["t"]
        found = found + batch["eps"].square().flatten(1).mean(1)
        return Loss(found.mean(), found, batch["t"])

    row = heldout.loss_of(loss, held, [], (32, 8, 8), 3, ranks)
    wanted = torch.zeros(8, dtype=torch.float64)
    for i in range(len(held)):
        image = held.image(i)
        for k in range(8):
            shape = (32, image.shape[1] // 8, image.shape[2] // 8)
            eps = rng(3, "held out", 8 * i + k).standard_normal(shape, dtype=np.float32)
            mean = image.float().mean() * (k + 0.5) / 8 + float(np.square(eps).mean())
            wanted[k] += mean / len(held)
    assert row["n"] == 24 and row["loss_by_t"] == pytest.approx(wanted.tolist(), rel=1e-5)


def test_pca_is_fitted_to_all_patches_of_all_shapes(pictures, capsys):
    ds = open_dataset(str(pictures), resolution=64, holdout=0, buckets=BUCKETS)
    vae = fit_vae(ds)
    patches = []
    for i in range(len(ds)):
        image = to_float(ds.image(i))
        for top in range(0, image.shape[1], 8):
            for left in range(0, image.shape[2], 8):
                patches.append(image[:, top : top + 8, left : left + 8])
    wanted = fit_pca(torch.stack(patches))
    x = torch.rand(1, 3, 48, 80) * 2 - 1
    assert torch.allclose(vae.encode(x), wanted.encode(x), atol=1e-5)
    assert "fitted on 24 images" in capsys.readouterr().out


def test_a_transformer_has_a_place_for_every_token_of_every_bucket(pictures, tmp_path, user):
    more = ("--model", "sit-nano", "--images", 32, "--eval-every", 0)
    assert user(train.main, *flags(pictures, tmp_path, *more))[0] == 0
    folder = checkpoints(tmp_path / "run")[-1]
    # 128 pixels are 16 latents; of the square there are 8.
    assert load_file(folder / "model.safetensors")["pos_embed"].shape[1] == 16 * 16


# ---- what cannot be -----------------------------------------------------------------------------

WRONG = {
    "a step that the autoencoder cannot": (
        ("--step", 20),
        "--step 20: --vae pca needs sides that are divisible by 8.  Try --step 40.",
    ),
    "a step that the network cannot": (
        ("--step", 8),
        "--step 8: --model nano on pca needs sides that are divisible by 16.  Try --step 16.",
    ),
    "a step that pixels cannot": (
        ("--step", 10, "--vae", "pixel:4"),
        "--step 10: --vae pixel:4 needs sides that are divisible by 4.  Try --step 20.",
    ),
    "an area that is none": (("--area", "64"), "--area 64: wanted WIDTHxHEIGHT"),
    "an area below a step": (("--area", "8x8"), "--step 16 is larger than a picture of --area 8x8"),
    "another resolution": (
        ("--resolution", 128),
        "--resolution 128 with --buckets, whose pictures are about 64×64.",
    ),
    "all images too small": (
        ("--area", "512x512", "--small", "skip"),
        "--small skip: each of the 24 images in PICTURES is smaller than its bucket.  Lower --area",
    ),
    "square pictures": (("--data", "toyfaces:9"), "--buckets: the pictures of toyfaces:9 are all"),
    "from small to large": (("--objective", "cfm"), "--objective cfm enlarges square pictures"),
    "a flag of buckets alone": (("--no-buckets",), "--area changes nothing here: it is of --bucke"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_bucketed_is_one_line_before_the_first_step(
    pictures, tmp_path, user, case
):
    more, message = WRONG[case]
    code, _, errors = user(train.main, *flags(pictures, tmp_path, *more))
    message = message.replace("PICTURES", str(pictures))
    assert code == 2 and len(errors) == 1 and errors[0].startswith(f"error: {message}"), errors
    assert not (tmp_path / "run").exists()


def test_a_dry_run_knows_the_buckets(pictures, tmp_path, user):
    code, out, errors = user(train.main, *flags(pictures, tmp_path, "--dry-run"))
    assert code == 0 and json.loads(out)["resolution"] == 64
    code, _, errors = user(train.main, *flags(pictures, tmp_path, "--step", 8, "--dry-run"))
    assert code == 2 and errors[-1].startswith("error: --step 8: --model nano on pca needs sides")


def test_a_run_goes_on_with_its_own_buckets_only(whole, pictures, tmp_path, user):
    cut_back(whole, 8, tmp_path / "run")
    code, _, errors = user(train.main, *flags(pictures, tmp_path, "--area", "48x80"))
    message = "was made with another config: area '64x64' -> '48x80'; resolution 64 -> 48."
    assert code == 2 and message in errors[-1]
