"""Datasets, tags, stages, and an order that is a function of (seed, position)."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data.toyfaces as toyfaces
from harness.cli import UserError
from data.dataset import Stream, batches, classes_of, index_at, open_dataset, rng
from data.images import decode
from data.tags import normalize_tag, split_tags
from vae import fit_pca, load_vae, pixel, psnr, save_vae, vae_from_meta

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    """Twelve images in nested folders with all three kinds of tag files, two of them unreadable."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    for i in range(10):
        where = tmp_path / ("a" if i < 5 else "a/b")
        Image.new("RGB", (40 + i, 36), (20 * i, 0, 255 - 20 * i)).save(where / f"{i}.{('png', 'jpg', 'webp')[i % 3]}")
    (tmp_path / "a" / "tags.jsonl").write_text(json.dumps({"file_name": "0.png", "tags": ["Red_Hair", "solo"]}) + "\n")
    (tmp_path / "a/b/metadata.jsonl").write_text("\n".join(json.dumps({"file_name": f"{i}.{('png', 'jpg', 'webp')[i % 3]}",
                                                                       "text": "albedo (overlord), solo"}) for i in (5, 6)))
    (tmp_path / "a/1.txt").write_text(r"souryuu asuka langley, albedo \(overlord\), 1girl")
    (tmp_path / "a/broken.png").write_bytes(b"\x89PNG not really")
    whole = (tmp_path / "a/0.png").read_bytes()
    (tmp_path / "a/cut.png").write_bytes(whole[:len(whole) // 2])
    return tmp_path


def test_folder_reads_all_tag_files_and_names_what_it_cannot_read(folder):
    ds = open_dataset(str(folder), resolution=32, holdout=0)
    by_name = dict(zip(ds.source.names, ds.source.tags))
    assert len(ds) == 10 and ds[0].image.shape == (3, 32, 32) and ds[0].image.dtype == torch.uint8
    assert by_name["a/0.png"] == ("red hair", "solo")
    assert by_name["a/1.jpg"] == ("souryuu asuka langley", "albedo (overlord)", "1girl")
    assert by_name["a/b/5.webp"] == ("albedo (overlord)", "solo")
    assert by_name["a/2.webp"] == ()
    assert "12 found = 10 used + 0 held out + 0 left out by stage=standard + 2 unreadable" in ds.report
    assert "without tags: 6 of the used" in ds.report
    assert "a/broken.png" in ds.report and "a/cut.png" in ds.report


def test_stages_add_up_and_split_by_tag(folder):
    tags = ("Albedo_(Overlord)",)
    fine, stage2 = (open_dataset(str(folder), stage=s, exclude_tags=tags, resolution=32, holdout=0) for s in ("fine", "stage2"))
    assert (len(fine), len(stage2)) == (7, 3)
    assert set(fine.index) | set(stage2.index) == set(range(10)) and not set(fine.index) & set(stage2.index)
    assert fine.counts()["albedo (overlord)"] == 0 and stage2.counts()["albedo (overlord)"] == 3
    assert "'albedo (overlord)': 3 found, 3 used" in stage2.report


def test_a_tag_that_matches_nothing_names_the_nearest(folder):
    with pytest.raises(UserError, match="matches 0 of 10 images.  Closest: albedo \\(overlord\\)"):
        open_dataset(str(folder), stage="fine", exclude_tags=("albedo overlord",), resolution=32)
    assert len(open_dataset(str(folder), stage="stage2", exclude_tags=("albedo*",), resolution=32, holdout=0)) == 3


@pytest.mark.parametrize("make, message", [
    (lambda p: p / "nowhere", "no data at"),
    (lambda p: p, "has no images"),
    (lambda p: (p / "x.png").write_bytes(b"no") and p, "none of the 1 images"),
])
def test_folders_that_cannot_be_used(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        open_dataset(str(make(tmp_path)))


def test_tags_for_absent_files_are_said_and_a_byte_order_mark_is_not_a_tag(folder, capsys):
    (folder / "a" / "tags.jsonl").write_bytes(b'\xef\xbb\xbf{"file_name": "gone.png", "tags": "x"}\n')
    (folder / "a" / "1.txt").write_bytes(b"\xef\xbb\xbffirst, second")
    ds = open_dataset(str(folder), resolution=32, holdout=0)
    assert "tags for 1 files that are not there, first a/gone.png" in capsys.readouterr().err
    assert dict(zip(ds.source.names, ds.source.tags))["a/1.jpg"] == ("first", "second")


@pytest.mark.parametrize("tags", ['{"a": 1}', "[1, 2]", "3", "null"])
def test_tags_of_the_wrong_type_are_named(folder, tags):
    (folder / "a" / "tags.jsonl").write_text(f'{{"file_name": "0.png", "tags": {tags}}}\n')
    with pytest.raises(UserError, match="tags.jsonl:1: wanted"):
        open_dataset(str(folder), resolution=32)


def test_a_bad_line_in_a_tag_file_is_named(folder):
    (folder / "a" / "tags.jsonl").write_text('{"file_name": "0.png", "tags": ["x"]}\n{"name": 1}\n')
    with pytest.raises(UserError, match=r"tags.jsonl:2: .*KeyError"):
        open_dataset(str(folder), resolution=32)


@pytest.mark.parametrize("text, tags", [
    (r"albedo \(overlord\), Blue_Hair,  , blue hair", ("albedo (overlord)", "blue hair")),
    (["Looking At Viewer", "1girl"], ("looking at viewer", "1girl")),
    ("", ()),
])
def test_booru_tags_have_one_spelling(text, tags):
    assert split_tags(text) == tags
    assert all(normalize_tag(t) == t for t in tags)


def test_decode_keeps_the_middle_and_puts_alpha_on_white(tmp_path):
    wide = np.zeros((50, 150, 3), np.uint8)
    wide[:, 50:100] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert decode(tmp_path / "wide.png", 50).min() == 200
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert decode(tmp_path / "clear.png", 4).min() == 255
    Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(tmp_path / "deep.png")
    assert set(decode(tmp_path / "deep.png", 8).ravel()) == {30_000 >> 8}
    exif = Image.Exif()
    exif[274] = 6                                                               # "rotate me by 90 degrees"
    half = np.zeros((20, 40, 3), np.uint8)
    half[:, :20] = 255
    Image.fromarray(half).save(tmp_path / "phone.jpg", exif=exif, quality=100)
    assert decode(tmp_path / "phone.jpg", 20)[:3].min() > 200 > 50 > decode(tmp_path / "phone.jpg", 20)[-3:].max()
    Image.new("L", (8, 8), 77).save(tmp_path / "grey.png")
    assert decode(tmp_path / "grey.png", 8).shape == (8, 8, 3)


# ---- toy faces ------------------------------------------------------------------------------------------------------

def test_toyfaces_are_a_function_of_the_index_and_carry_their_attributes_as_tags():
    ds = open_dataset("toyfaces:40", resolution=32, holdout=0)
    again = open_dataset("toyfaces:20", resolution=32, holdout=0)
    assert torch.equal(ds.images(range(20)), again.images(range(20))) and ds.source.tags[:20] == again.source.tags
    assert len({ds[i].image.numpy().tobytes() for i in range(40)}) == 40
    vocabulary = set(toyfaces.VOCABULARY)
    for i in range(40):
        tags = set(ds[i].tags)
        assert tags <= vocabulary and len(tags & set(toyfaces.GROUPS["hair color"])) == 1


def test_a_character_is_a_combination_that_nobody_else_has():
    faces = [toyfaces.sample_face(i) for i in range(5000)]
    count = Counter(toyfaces.character(f) for f in faces)
    for name, look in toyfaces.CHARACTERS.items():
        assert 0.02 < count[name] / 5000 < 0.06
        for key, value in look.items():                                         # every attribute also occurs without the character
            assert sum(getattr(f, key) == value and toyfaces.character(f) != name for f in faces) > 50


@pytest.mark.parametrize("size", [32, 64, 100, 256])
def test_toyfaces_at_any_size_are_the_same_picture(size):
    small = np.asarray(toyfaces.draw(toyfaces.sample_face(3), size).resize((32, 32), Image.Resampling.BOX), float)
    distance = [np.abs(small - np.asarray(toyfaces.draw(toyfaces.sample_face(i), 32), float)).mean() for i in range(20)]
    assert int(np.argmin(distance)) == 3 and distance[3] < 0.4 * sorted(distance)[1]


def test_excluded_characters_exist_and_the_stages_add_up():
    counts = [len(open_dataset("toyfaces:400", stage=s, exclude_tags=toyfaces.EXCLUDED, resolution=32, holdout=0))
              for s in ("standard", "fine", "stage2")]
    assert counts[0] == 400 == counts[1] + counts[2] and counts[2] > 10


def test_held_out_images_are_the_same_in_every_stage_and_never_trained_on():
    stages = [open_dataset("toyfaces:400", stage=s, exclude_tags=toyfaces.EXCLUDED, resolution=32, holdout=0.1)
              for s in ("standard", "fine", "stage2")]
    held = [set(ds.heldout.index) for ds in stages]
    assert held[1] | held[2] == held[0] and 20 < len(held[0]) < 60
    assert not any(set(ds.index) & held[0] for ds in stages)


# ---- order and randomness -------------------------------------------------------------------------------------------

def test_every_image_is_seen_once_an_epoch_in_a_new_order():
    epochs = [[index_at(7, 50, p) for p in range(e * 50, e * 50 + 50)] for e in range(3)]
    assert all(sorted(e) == list(range(50)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(50))
    assert epochs[0] != [index_at(8, 50, p) for p in range(50)]


def test_a_sample_is_a_function_of_seed_and_position():
    ds = open_dataset("toyfaces:30", resolution=32, holdout=0)
    _, labels = classes_of(ds, ("* hair",))
    stream = Stream(ds, labels, (2, 4, 4), seed=3, flip=True, label_drop=0.3)
    ahead = [stream[p] for p in range(60)]
    for p in (59, 0, 31):
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(stream[p].values(), ahead[p].values()))
    assert len({s["q"] for s in ahead}) == 60
    eps = torch.stack([s["eps"] for s in ahead])
    assert abs(float(eps.mean())) < 0.05 and abs(float(eps.std()) - 1) < 0.05
    # neither flips nor label dropout move the noise
    plain = Stream(ds, None, (2, 4, 4), seed=3)
    assert all(torch.equal(plain[p]["eps"], ahead[p]["eps"]) and plain[p]["q"] == ahead[p]["q"] for p in range(60))
    flipped = [not torch.equal(plain[p]["image"], ahead[p]["image"]) for p in range(60)]
    assert 15 < sum(flipped) < 45 and all(torch.equal(plain[p]["image"].flip(-1), ahead[p]["image"]) for p in range(60) if flipped[p])
    dropped = np.mean([s["y"] == -1 for s in ahead])
    assert 0.1 < dropped < 0.5
    assert torch.equal(Stream(ds, None, (2, 4, 4), seed=4)[0]["eps"], plain[0]["eps"]) is False


def test_loader_workers_change_nothing():
    ds = open_dataset("toyfaces:30", resolution=32, holdout=0)
    stream, groups = Stream(ds, None, (2, 4, 4), seed=0), [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    alone, shared = (list(batches(stream, iter(groups), workers=w)) for w in (0, 2))
    assert len(alone) == 3
    for a, b in zip(alone, shared):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert alone[2]["position"].tolist() == [6, 7, 8] and alone[0]["q"].dtype == torch.float64


def test_streams_of_randomness_are_independent():
    a, b = rng(0, "sample", 5), rng(0, "order", 5)
    assert not np.array_equal(a.random(4), b.random(4))
    assert np.array_equal(rng(0, "sample", 5).random(4), rng(0, "sample", 5).random(4))


def test_classes_are_the_first_matching_tag():
    ds = open_dataset("toyfaces:50", resolution=32, holdout=0)
    names, labels = classes_of(ds, ("character:*", "glasses"))
    assert names == ["character:ember", "character:kiri", "character:moss", "character:nova", "glasses"]
    for i in range(50):
        first = next((k for k, n in enumerate(names) if n in ds[i].tags), -1)
        assert labels[i] == first
    with pytest.raises(UserError, match="matches 0 of 50"):
        classes_of(ds, ("tail",))


# ---- autoencoders ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def faces():
    return open_dataset("toyfaces:300", holdout=0).images(range(300)) / 127.5 - 1


def test_pca_latents_are_uncorrelated_of_unit_variance_and_invert(faces, tmp_path):
    vae = fit_pca(faces)
    z = vae.encode(faces)
    assert z.shape == (300, 32, 8, 8)
    flat = z.double().movedim(1, -1).reshape(-1, 32)
    covariance, variance = flat.T @ flat / len(flat), (vae.std.double() ** 4)   # std is the fourth root of the variance, scaled
    assert flat.mean(0).abs().max() < 1e-3 and float(covariance.diagonal().mean()) == pytest.approx(1.0, abs=1e-3)
    assert (covariance - covariance.diagonal().diag()).abs().max() < 1e-3       # uncorrelated
    assert torch.allclose(covariance.diagonal() ** 2 / variance, (covariance.diagonal() ** 2 / variance)[:1].expand(32), rtol=1e-2)
    random = torch.randn(4, 32, 8, 8)
    assert (vae.encode(vae.decode(random)) - random).abs().max() < 1e-3
    assert psnr(vae.decode(z), faces) > 27
    save_vae(tmp_path / "vae.safetensors", vae)
    for twin in (load_vae(tmp_path / "vae.safetensors"), vae_from_meta(vae.meta())):
        assert torch.equal(twin.encode(faces[:2]), vae.encode(faces[:2])) and twin.name == "pca"


def test_pca_of_full_rank_is_exact_and_no_32_components_do_better(faces):
    full = fit_pca(faces, channels=192)
    assert psnr(full.decode(full.encode(faces)), faces) > 80
    vae = fit_pca(faces)
    patches = torch.nn.functional.pixel_unshuffle(faces.double(), 8).movedim(1, -1).reshape(-1, 192).numpy()
    _, singular, _ = np.linalg.svd(patches - patches.mean(0), full_matrices=False)
    lost = (singular[32:] ** 2).sum() / patches.size                            # Eckart-Young
    assert float((vae.decode(vae.encode(faces)) - faces).double().square().mean()) == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize("name, shape", [("pixel", (3, 64, 64)), ("pixel:4", (48, 16, 16))])
def test_pixel_is_the_identity(faces, name, shape):
    vae = load_vae(name)
    z = vae.encode(faces[:3])
    assert z.shape[1:] == shape == vae.latent_shape(64)
    assert torch.equal(z, torch.nn.functional.pixel_unshuffle(faces[:3], vae.factor)) and torch.equal(vae.decode(z), faces[:3])


def test_autoencoders_that_cannot_be():
    with pytest.raises(UserError, match="not divisible"):
        pixel(8).latent_shape(60)
    with pytest.raises(UserError, match="wanted pixel"):
        load_vae("flux9")


@pytest.mark.parametrize("ending", ["error", "abandoned"])
def test_worker_processes_never_keep_a_script_from_ending(tmp_path, ending):
    """They ignore SIGTERM for 20 s, so whoever is done with them has to end them; else an exit joins them for ever."""
    for i in range(8):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    script = f"""if True:
        import sys
        import data.sources as sources
        from harness.cli import cli
        from data.dataset import Stream, batches, open_dataset
        sources.IN_MEMORY = 0
        ds = open_dataset({str(tmp_path)!r}, resolution=16, holdout=0)
        loader = batches(Stream(ds, None, (2, 4, 4), 0), iter([list(range(8))] * 99), workers=2)
        next(loader)
        if {ending!r} == "error":
            open({str(tmp_path / "3.png")!r}, "w").close()
            cli(lambda: list(loader))
        print("left")
    """
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if ending == "error":
        assert done.returncode == 2 and done.stderr.startswith("error: 3.png"), done.stderr
        assert time.monotonic() - start < 15
    else:
        assert done.stdout == "left\n"
