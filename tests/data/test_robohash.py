"""Kittens: put together as the package itself does, a function of the index, with tags that say
what is there."""

import importlib.metadata
import pickle
import re
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import data.robohash as robo
import data.sources as sources
import train
from data.dataset import Stream, batches, index_at, open_dataset
from harness.cli import UserError

try:
    importlib.metadata.distribution("robohash")
    absent = False
except importlib.metadata.PackageNotFoundError:
    absent = True
needs_art = pytest.mark.skipif(
    absent, reason="needs the pictures of robohash==2.0 (pip install robohash==2.0)"
)
KITTENS = [robo.sample_kitten(i) for i in range(4096)]


def test_kittens_are_a_function_of_seed_and_index():
    assert (
        KITTENS[:50] == [robo.sample_kitten(i) for i in range(50)]
        and robo.sample_kitten(7, seed=1) != KITTENS[7]
    )
    assert len(set(KITTENS)) > 3900


def test_odds_are_uneven_and_every_part_occurs():
    ordinary = [k for k in KITTENS if not robo.character(k)]
    for layer, names in robo.NAMES.items():
        count = Counter(k.name(layer) for k in ordinary)
        shares = np.array([count[name] for name in dict.fromkeys(names) if name])
        assert shares.min() > 25 and shares.max() > 2.2 * shares.min(), (layer, count)
    assert 0.3 < np.mean([k.name("accessory") == "" for k in ordinary]) < 0.45


def test_a_character_is_a_combination_that_nobody_else_has():
    count = Counter(map(robo.character, KITTENS))
    for name, look in robo.CHARACTERS.items():
        assert 0.025 < count[name] / len(KITTENS) < 0.06
        for layer, value in look.items():  # every part also occurs without the character
            assert sum(k.name(layer) == value and robo.character(k) != name for k in KITTENS) > 40
    for kitten in KITTENS[:500]:
        found, name = robo.tags(kitten), robo.character(kitten)
        assert set(found) <= set(robo.VOCABULARY) and (f"character:{name}" in found) == bool(name)
        assert all(
            sum(tag.startswith(f"{layer}:") for tag in found) == bool(kitten.name(layer))
            for layer in robo.LAYERS
        )


def test_nobody_is_a_character_by_accident(monkeypatch):
    monkeypatch.setattr(robo, "CHARACTER_RATE", 0)
    assert not any(robo.character(robo.sample_kitten(i)) for i in range(6000))  # else about ten


def test_the_stages_leave_enough_on_both_sides():
    excluded = sum(not set(robo.tags(k)).isdisjoint(robo.EXCLUDED) for k in KITTENS)
    assert 500 < excluded < 1000 and set(robo.EXCLUDED) <= set(robo.VOCABULARY)
    cfg = train.resolve(train.Config(data="robohash:64", stage="fine"))
    assert cfg.exclude_tags == robo.EXCLUDED and cfg.name == "robohash-64-fm-fine"


@needs_art
def test_pictures_are_the_packages_own_layers():
    """Against its layers put together at full size, background last of all, as its own code
    does."""
    files, art = robo.files_of(robo.art_folder()), robo.load_art(64)
    wrong = []
    for kitten in KITTENS[:12]:
        whole = (
            Image.open(files["background"][kitten.background])
            .convert("RGBA")
            .resize((1024, 1024), Image.Resampling.LANCZOS)
        )
        for layer in ("body", "fur", "eyes", "mouth", "accessory"):
            whole.alpha_composite(Image.open(files[layer][getattr(kitten, layer)]))
        wanted = np.asarray(whole.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS), float)
        drawn = art.draw(kitten)
        assert drawn.shape == (64, 64, 3) and drawn.dtype == np.uint8
        wrong.append(np.abs(drawn - wanted).mean())
        assert wrong[-1] < 2.0 < np.abs(art.draw(KITTENS[20]) - wanted).mean(), wrong
    assert np.mean(wrong) < 1.5


@needs_art
def test_parts_without_a_name_are_pictures_of_nothing():
    for layer, paths in robo.files_of(robo.art_folder()).items():
        for path, name in zip(paths, robo.NAMES[layer]):
            empty = (
                Image.open(path).convert("RGBA").resize((64, 64)).getchannel("A").getextrema()[1]
                < 8
            )
            assert empty == (name == ""), (path.name, name)


@needs_art
def test_robohash_as_a_data_set(monkeypatch):
    ds = open_dataset("robohash:60", resolution=32, holdout=0)
    again = open_dataset("robohash:30", resolution=32, holdout=0)
    assert (
        torch.equal(ds.images(range(30)), again.images(range(30)))
        and ds.source.tags[:30] == again.source.tags
    )
    assert "60 found = 60 used" in ds.report and "David Revoy (CC-BY 4.0)" in ds.report
    counts = [
        len(
            open_dataset(
                "robohash:400", stage=s, exclude_tags=robo.EXCLUDED, resolution=32, holdout=0
            )
        )
        for s in ("standard", "fine", "stage2")
    ]
    assert counts[0] == 400 == counts[1] + counts[2] and counts[2] > 30
    monkeypatch.setattr(
        sources, "IN_MEMORY", 1000
    )  # too many to keep: drawn when used, in loader processes too
    lazy = open_dataset("robohash:60", resolution=32, holdout=0)
    assert (
        lazy.source.pixels is None
        and lazy.source.hash == ds.source.hash
        and torch.equal(lazy.images(range(60)), ds.images(range(60)))
    )
    groups = [[0, 1, 2], [3, 4, 5]]
    kept, drawn = (
        list(batches(Stream(d, None, (2, 4, 4), 0, flip=True), iter(groups), w))
        for d, w in ((ds, 0), (lazy, 2))
    )
    assert all(torch.equal(a[k], b[k]) for a, b in zip(kept, drawn) for k in a)
    assert torch.equal(
        pickle.loads(pickle.dumps(lazy)).images([5]), ds.images([5])
    )  # processes that are spawned, not forked
    with pytest.raises(UserError, match="32 to 512 pixels"):
        open_dataset("robohash", resolution=16)


def test_without_the_package_the_error_says_what_to_install(monkeypatch, tmp_path, user):
    monkeypatch.setattr(
        importlib.metadata,
        "distribution",
        lambda name: (_ for _ in ()).throw(importlib.metadata.PackageNotFoundError(name)),
    )
    robo.load_art.cache_clear()
    code, _, errors = user(train.main, "--data", "robohash", "--out", tmp_path)
    assert (
        code == 2
        and errors[-1].endswith("pip install robohash==2.0")
        and "not installed" in errors[-1]
        and not list(tmp_path.iterdir())
    )


def test_a_package_without_its_pictures_is_said(monkeypatch, tmp_path):
    class Empty:
        locate_file = staticmethod(lambda name: tmp_path / name)

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Empty)
    robo.load_art.cache_clear()
    with pytest.raises(UserError, match="has 0 pictures for body, wanted 15"):
        open_dataset("robohash", resolution=64)
    robo.load_art.cache_clear()


@needs_art
def test_training_on_kittens_stage_by_stage(tmp_path, user, monkeypatch):
    """What the two stages saw, told from the pixels alone: which kitten each picture is, and
    whether it is one of the excluded."""
    art, kittens = robo.load_art(64), KITTENS[:200]
    drawn = {art.draw(kitten).tobytes(): set(robo.tags(kitten)) for kitten in kittens}
    assert len(drawn) == 200  # no two look alike
    seen, forward = [], train.ObjectiveLoss.__call__

    def watched(tr, net, batch):
        seen.extend(
            zip(
                batch["position"].tolist(),
                (drawn[x.permute(1, 2, 0).numpy().tobytes()] for x in batch["image"]),
            )
        )
        return forward(tr, net, batch)

    monkeypatch.setattr(train.ObjectiveLoss, "__call__", watched)
    monkeypatch.setattr(
        train, "draw_samples", lambda *how, **more: torch.zeros(32, 3, 64, 64, dtype=torch.uint8)
    )  # takes long, and is not the subject
    excluded, counts = set(robo.EXCLUDED), {}
    for stage in ("fine", "stage2"):
        seen.clear()
        code, out, errors = user(
            train.main,
            "--data",
            "robohash:200",
            "--resolution",
            64,
            "--model",
            "nano",
            "--stage",
            stage,
            "--batch",
            8,
            "--images",
            64,
            "--eval-every",
            0,
            "--preview-every",
            0,
            "--out",
            tmp_path,
        )
        assert code == 0, errors
        assert sorted(position for position, _ in seen) == list(range(64))  # every position once
        assert all(bool(tags & excluded) == (stage == "stage2") for _, tags in seen)
        found, used, held, left, bad = (
            int(n)
            for n in re.search(
                r"(\d+) found = (\d+) used \+ (\d+) held out \+ (\d+) left out by \S+ "
                r"\+ (\d+) unreadable",
                out,
            ).groups()
        )
        assert found == 200 == used + held + left and bad == 0
        assert (
            left == sum(bool(tags & excluded) == (stage == "fine") for tags in drawn.values()) > 20
        )
        ds = open_dataset("robohash:200", stage=stage, exclude_tags=robo.EXCLUDED)
        assert [set(ds.source.tags[ds.index[index_at(0, len(ds), p)]]) for p in range(64)] == [
            tags for _, tags in sorted(seen, key=lambda row: row[0])
        ]
        assert (
            len({frozenset(tags) for _, tags in seen}) > min(used, 64) / 2
        )  # many kittens, not one
        counts[stage] = used + held
    assert sum(counts.values()) == 200
    assert "starting from the weights of" in out and "robohash-200-fm-fine" in out
