"""From checkpoints, folders and files to cards: sampling, caching, resuming, ranks, refusals."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import samplers
import eval_fid
import train
from ckpt import find_checkpoint, load_unet, save_unet
from harness.cli import UserError
from conftest import ROOT, randomize
from eval_fid import compare, default_ref
from metrics.features import (
    CHUNK,
    Pca,
    compute,
    extract,
    fit_extractor,
    open_images,
    short,
    split_spec,
)
from vae import fit_pca
from metrics.distances import Statistics, frechet, kernel_distance
from objectives import make_objective
from harness.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has barely begun: toy faces of 32 pixels."""
    cfg = train.resolve(
        train.Config(
            model="nano",
            data="toyfaces:96",
            resolution=32,
            batch=8,
            images=16,
            holdout=0.3,
            preview_every=0,
            eval_every=0,
            save_every=0,
            out=str(tmp_path_factory.mktemp("runs")),
            stage="fine",
            exclude_tags=("glasses", "character:nova"),
        )
    )
    train.train(cfg, ALONE)
    return Path(cfg.out) / cfg.name


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TWINPATH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FID_INCEPTION", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def pictures(folder, n, size=(32, 32), seed=0):
    """Smooth noise as PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    r = np.random.default_rng(seed)
    for i in range(n):
        Image.fromarray(r.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        ).save(folder / f"{i:04d}.png")
    return folder


def card_of(*flags):
    cfg, _ = eval_fid.parse(eval_fid.Config, argv=[str(f) for f in flags])
    return eval_fid.evaluate(cfg, ALONE)


FAST = ("--features", "pca", "--method", "euler", "--steps", 2)


# ---- from a checkpoint --------------------------------------------------------------------------


def test_a_checkpoint_is_scored_against_what_it_was_trained_on(run, cache, user):
    code, out, err = user(eval_fid.main, "--ckpt", run, "--n", 60, *FAST, "--out", "a.json")
    assert (
        code == 0
        and "60 of 60 images to draw × 2 NFE = 120 network evaluations: about" in out
        and out.splitlines()[-1] == "a.json"
    )
    assert sum("fewer than 2,048" in line for line in err) == 1
    card = json.loads(Path("a.json").read_text())
    assert {
        "FD-pca60",
        "KD-pca60",
        "precision60",
        "recall60",
        "density60",
        "coverage60",
        "memorisation",
    } == card["metrics"].keys()
    main = card["metrics"]["FD-pca60"]
    assert (
        main["value"] > 0
        and main["error"] > 0
        and main["floor"] > 0
        and card["metrics"]["KD-pca60"]["error"] > 0
    )
    assert card["sampled"] | {"dtype": "", "device": ""} == {
        "method": "euler",
        "steps": 2,
        "grid": "uniform",
        "shift": 1.0,
        "t_start": 1.0,
        "cfg": 1.0,
        "labels": [],
        "dtype": "",
        "device": "",
        "nfe": 2.0,
        "seeds": [0, 59],
    }
    assert (
        card["subject"]["ema"] == 0.05
        and card["subject"]["images"] == 16
        and len(card["subject"]["fingerprint"]) == 64
        and "commit" in card
    )
    measured = card["measured"]
    own = train.data.open_dataset(
        "toyfaces:96",
        stage="fine",
        exclude_tags=["glasses", "character:nova"],
        resolution=32,
        holdout=0.3,
    )
    assert measured["reference images"] == len(own) and card["metrics"]["memorisation"][
        "held_out"
    ] == len(own.heldout)
    assert (
        measured["reference hash"] == own.source.hash
        and measured["filter"] == "!(glasses) & !(character:nova)"
        and measured["holdout"] == 0.3
    )


def test_sampling_in_one_go_is_the_same_as_through_files(run, cache, user):
    card = card_of("--ckpt", run, "--n", 40, *FAST, "--seed", 5)
    user(
        samplers.main,
        "--ckpt",
        run,
        "--n",
        40,
        "--method",
        "euler",
        "--steps",
        2,
        "--seed",
        5,
        "--out",
        "drawn",
    )
    Path("drawn/grid.png").unlink()
    ref = default_ref(json.loads((run / "config.json").read_text()), "")
    again = card_of(
        "--fake", "drawn", "--ref", ref, "--holdout", 0.3, "--resolution", 32, "--features", "pca"
    )
    np.savez(
        "drawn.npz", np.stack([np.asarray(Image.open(p)) for p in sorted(Path("drawn").iterdir())])
    )  # arr_0
    batch = card_of(
        "--fake",
        "drawn.npz",
        "--ref",
        ref,
        "--holdout",
        0.3,
        "--resolution",
        32,
        "--features",
        "pca",
    )
    for other in (again, batch):
        for name, m in card["metrics"].items():
            assert other["metrics"][name]["value"] == pytest.approx(m["value"], rel=1e-10), name


@pytest.mark.parametrize("side, d", [(32, 512), (8, 32)])  # fewer images than dimensions, and more
def test_the_metrics_are_those_of_the_features(side, d, cache):
    """The card against the definitions, by hand."""
    pictures(cache / "x", 80, (side, side), seed=1), pictures(cache / "y", 60, (side, side), seed=2)
    metrics = card_of("--fake", cache / "y", "--ref", cache / "x", "--features", "pca")["metrics"]
    x, y = (
        torch.from_numpy(
            np.stack([np.asarray(Image.open(p)) for p in sorted((cache / d).iterdir())])
        ).permute(0, 3, 1, 2)
        for d in "xy"
    )
    extractor = Pca(fit_pca(x.float() / 127.5 - 1), {})
    fx, fy = extractor(x), extractor(y)
    assert fx.shape == (80, d)
    assert metrics["FD-pca60"]["value"] == pytest.approx(
        frechet(Statistics.of(fx), Statistics.of(fy)), rel=1e-6
    )  # fp32 features round by their batch
    assert metrics["KD-pca60"]["value"] == pytest.approx(
        kernel_distance(fx, fy).value, rel=1e-6, abs=1e-6
    )
    copies = [
        frechet(Statistics.of(fx), Statistics.of(fy[[i for i in range(60) if i % 10 != g]]))
        for g in range(10)
    ]
    assert metrics["FD-pca60"]["error"] == pytest.approx(
        np.std(copies) * 3, rel=1e-5
    )  # √(9/10 · 10) of the population's
    order = np.random.default_rng(0).permutation(
        80
    )  # the floor: half of the reference against the other half
    assert metrics["FD-pca60"]["floor n"] == 40
    halves = [fx[torch.from_numpy(np.sort(half))] for half in (order[:40], order[40:])]
    assert metrics["FD-pca60"]["floor"] == pytest.approx(
        frechet(*map(Statistics.of, halves)), rel=1e-6
    )
    assert metrics["KD-pca60"]["floor"] == pytest.approx(
        kernel_distance(*halves).value, rel=1e-6, abs=1e-6
    )
    assert (
        card_of("--fake", cache / "x", "--ref", cache / "x", "--features", "pca")["metrics"][
            "FD-pca80"
        ]["value"]
        == 0.0
    )


def test_two_ranks_give_what_one_gives(run, cache, tmp_path):
    flags = [
        "--ckpt",
        run,
        "--n",
        520,
        "--features",
        "pca",
        "--method",
        "euler",
        "--steps",
        1,
        "--ref",
        "toyfaces:600",
        "--holdout",
        0.2,
    ]
    one = card_of(*flags)
    env = {**os.environ, "TWINPATH_CACHE": str(tmp_path / "other"), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "--",
            ROOT / "eval_fid.py",
            *map(str, flags),
            "--out",
            "two.json",
        ],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads(Path("two.json").read_text())
    assert (
        two["ranks"] == 2
        and "on 2 ranks" in done.stdout
        and done.stdout.count("network evaluations") == 1
    )
    for name, m in one["metrics"].items():
        for key, value in m.items():
            assert two["metrics"][name][key] == pytest.approx(value, rel=1e-10), (name, key)


def test_two_sets_of_one_size_and_two_checkpoints_do_not_share_features(run, cache):
    x, y = pictures(cache / "x", 40, seed=1), pictures(cache / "y", 40, seed=2)
    assert card_of("--fake", y, "--ref", x, "--features", "pca")["metrics"]["FD-pca40"]["value"] > 1
    flags = (
        "--n",
        2,
        "--method",
        "euler",
        "--steps",
        1,
        "--weights",
        "random:0",
        "--ref",
        pictures(cache / "z", 2),
    )
    net, meta = load_unet(find_checkpoint(run))
    for seed in (1, 2):
        save_unet(
            cache / f"{seed}.safetensors",
            randomize(net, seed),
            {k: v for k, v in meta.items() if k not in ("probe", "fingerprint")},
        )
    values = [
        card_of("--ckpt", cache / f"{seed}.safetensors", *flags)["metrics"]["FD-random2"]["value"]
        for seed in (1, 2, 1)
    ]
    assert values[0] != values[1] and values[0] == values[2]


# ---- features on disk ---------------------------------------------------------------------------


def test_a_kill_loses_one_chunk_at_most(tmp_path):
    n, made = 3 * CHUNK + 10, []

    def produce(chunk):
        made.append(chunk.start)
        if len(made) == 3:
            raise KeyboardInterrupt
        return torch.arange(chunk.start, chunk.stop).float()[:, None] * torch.ones(1, 3)

    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path / "c", n, np.arange(n), produce, ALONE, {}, "x")
    stored = compute(tmp_path / "c", n, np.arange(n), produce, ALONE, {}, "x")
    assert made == [0, CHUNK, 2 * CHUNK, 2 * CHUNK, 3 * CHUNK]
    assert torch.equal(stored.rows()[:, 0], torch.arange(n).float())
    files = sorted((tmp_path / "c").glob("*.safetensors"))
    files[1].write_bytes(files[1].read_bytes()[:-100])  # a disk that lost something
    compute(tmp_path / "c", n, np.arange(n), produce, ALONE, {}, "x")
    assert made[5:] == [CHUNK]
    compute(tmp_path / "c", n, np.array([5, 3 * CHUNK + 1]), produce, ALONE, {}, "x")
    assert len(made) == 6
    sparse = compute(
        tmp_path / "d", n, np.array([3 * CHUNK + 1, 5]), produce, ALONE, {}, "x"
    )  # only chunks that are asked for
    assert made[6:] == [0, 3 * CHUNK] and sparse.rows()[:, 0].tolist() == [5, 3 * CHUNK + 1]


def test_file_order_and_grouping_change_nothing(cache):
    a = pictures(cache / "a", 70)
    shuffled = cache / "b"
    shuffled.mkdir()
    names = np.random.default_rng(1).permutation(70)
    for i, j in enumerate(names):
        (shuffled / f"{i:04d}.png").write_bytes((a / f"{j:04d}.png").read_bytes())
    images = open_images(str(a))
    extractor = fit_extractor(images)
    rows = extract(images, extractor, cache / "f", ALONE).rows()
    far = pictures(cache / "c", 30, seed=9)
    values = [
        card_of("--fake", d, "--ref", far, "--features", "pca")["metrics"]["FD-pca70"]["value"]
        for d in (a, shuffled)
    ]
    assert values[0] == pytest.approx(
        values[1], rel=1e-7
    )  # fp32 features round by their place in a batch, on some CPUs
    stored = extract(images, extractor, cache / "f", ALONE)
    for groups in (1, 3, 10):
        parts = stored.statistics(ALONE, groups)
        assert frechet(sum(parts[1:], parts[0]), Statistics.of(rows)) < 1e-10 and [
            p.n for p in parts
        ] == [len(range(g, 70, groups)) for g in range(groups)]


def test_subsets_by_tag_share_features_and_subtract(cache):
    images = open_images("toyfaces:150", 32)
    extractor, folder = fit_extractor(images), cache / "f"
    everything = extract(images, extractor, folder, ALONE)
    part, rest = images.where("glasses"), images.where("!(glasses)")
    assert 0 < len(part) < 150 and len(part) + len(rest) == 150
    before = sorted(p.stat().st_mtime_ns for p in folder.rglob("*.safetensors"))
    stored = [extract(i, extractor, folder, ALONE) for i in (part, rest)]
    assert (
        sorted(p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")) == before
    )  # nothing was computed again
    whole, one, two = (s.statistics(ALONE)[0] for s in (everything, *stored))
    left = whole - one
    assert (
        left.n == two.n
        and (left.scatter - two.scatter).abs().max() < 1e-10 * two.scatter.abs().max()
    )
    assert (
        open_images("toyfaces:150:glasses", 32).index.tolist() == part.index.tolist()
        and "glasses" not in images.table[int(rest.index[0])]
    )


def test_specs_fall_apart_at_the_right_colon(tmp_path):
    (tmp_path / "a:b").mkdir()
    assert split_spec("toyfaces:2000:character:nova") == ("toyfaces:2000", "character:nova")
    assert split_spec("toyfaces:a | b") == ("toyfaces", "a | b") and split_spec("robohash") == (
        "robohash",
        "",
    )
    assert split_spec(f"{tmp_path}/a:b:x:y") == (f"{tmp_path}/a:b", "x:y") and split_spec(
        "hf:org/name:hat"
    ) == ("hf:org/name", "hat")
    assert [short(n) for n in (500, 2048, 10_000, 50_000)] == ["500", "2048", "10k", "50k"]


def test_an_image_at_its_own_size_is_not_touched(tmp_path):
    r = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(r.integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    images = open_images(str(tmp_path))
    assert all(
        np.array_equal(images.load(i), np.asarray(Image.open(tmp_path / f"{i}.png")))
        for i in range(2)
    )


def test_pictures_that_are_turned_by_exif_count_as_they_are_seen(tmp_path):
    for i, turn in enumerate((1, 6)):
        exif = Image.Exif()
        exif[0x0112] = turn
        Image.new("RGB", (40, 24), "red").save(tmp_path / f"{i}.jpg", exif=exif)
    with pytest.raises(UserError, match="mixes image sizes"):
        open_images(str(tmp_path)).batch([0, 1])


def test_any_callable_is_an_extractor(cache):
    def mean_colour(images):
        return images.float().mean((2, 3))

    x, y = (
        extract(open_images(str(pictures(cache / d, 30, seed=s))), mean_colour, cache / "f", ALONE)
        for d, s in (("x", 1), ("y", 2))
    )
    metrics = eval_fid.measure(eval_fid.side(y, ALONE, 10), eval_fid.side(x, ALONE), None, "colour")
    assert metrics["FD-colour30"]["value"] == pytest.approx(
        frechet(Statistics.of(x.rows()), Statistics.of(y.rows())), rel=1e-9
    )


# ---- statistics as files ------------------------------------------------------------------------


def test_moments_are_written_read_and_checked(cache, user, capsys):
    x, y = pictures(cache / "x", 8, seed=1), pictures(cache / "y", 8, seed=2)
    flags = ("--fake", y, "--weights", "random:1")
    whole = card_of(*flags, "--ref", x, "--save-stats", "x.npz")
    assert whole["measured"]["weights"] == "random:1"
    capsys.readouterr()
    card = card_of(*flags, "--ref", "x.npz")
    assert "does not say" not in capsys.readouterr().err
    assert list(card["metrics"]) == ["FD-random8"] and card["metrics"]["FD-random8"][
        "value"
    ] == pytest.approx(whole["metrics"]["FD-random8"]["value"], rel=1e-6)
    assert card["measured"]["reference hash"] == whole["measured"]["reference hash"]
    both = card_of("--fake", "x.npz", "--ref", "x.npz", "--weights", "random:1")
    assert both["metrics"]["FD-random8"]["value"] == 0.0
    for changed, what in (
        (("--preproc", "clean"), "preproc 'torch', and this asks for 'clean'"),
        (("--weights", "random:2"), "weights 'random:1'"),
    ):
        code, _, err = user(eval_fid.main, *flags, "--ref", "x.npz", *changed)
        assert code == 2 and what in err[-1]
    with np.load("x.npz") as file:
        np.savez("foreign.npz", mu=file["mu"], sigma=file["sigma"])
        np.savez("short.npz", mu=file["mu"][:64], sigma=file["sigma"][:64, :64])
    card = card_of(*flags, "--ref", "foreign.npz")
    assert "cannot vouch" in capsys.readouterr().err and card["metrics"]["FD-random8"][
        "value"
    ] == pytest.approx(whole["metrics"]["FD-random8"]["value"], rel=1e-6)
    assert user(eval_fid.main, *flags, "--ref", "short.npz")[2][-1].endswith(
        "They are of another network."
    )


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, what",
    [
        ((), "give one of --ckpt"),
        (("--fake", "x"), "--fake needs --ref"),
        (("--ckpt", "{run}", "--n", 1), "at least 2 images"),
        (("--ckpt", "{run}", "--cfg", 2), "--cfg 2.0 needs --labels"),
        (("--ckpt", "{run}", "--seed", 2**63 - 5), "wanted 0 to 2^63"),
        (("--ckpt", "{run}", "--n", 40), "python -m metrics.inception --fetch"),
        (("--fake", "x", "--ref", "nowhere"), "no data at nowhere"),
        (("--fake", "x", "--ref", "one"), "has 1 images; a distance between sets needs at least 2"),
        (
            ("--fake", "x", "--ref", "mixed"),
            "mixes image sizes (32×32, 40×40).  Resizing is part of the metric",
        ),
        (("--fake", "x", "--ref", "big"), "the two sides have"),
        (("--fake", "x", "--ref", "bad.npz"), "wanted images as arr_0"),
        (("--fake", "x", "--ref", "none.npz", "--weights", "random:0"), "wanted mu and sigma"),
        (("--fake", "x", "--ref", "x:hat"), "matches 0 of 3 images"),
        (("--fake", "x", "--ref", "nan.npz", "--weights", "random:0"), "not finite"),
        (("--fake", "x", "--ref", "noise.npz"), "cannot be read as npz"),
        (
            ("--fake", "x", "--ref", "x", "--weights", "nowhere.pth", "--features", "inception"),
            "no weights at nowhere.pth",
        ),
        (("--fake", "x", "--ref", "x", "--preproc", "bicubic"), "is not one of torch, clean, tf"),
        (("--fake", "x", "--ref", "odd.npz", "--features", "pca"), "patches of 8×8"),
    ],
)
def test_bad_input_is_one_line(flags, what, run, cache, user):
    (
        pictures(Path("x"), 3),
        pictures(Path("one"), 1),
        pictures(Path("big"), 3, (64, 64)),
        pictures(Path("mixed"), 2),
    )
    pictures(Path("mixed") / "sub", 2, (40, 40))
    np.savez("bad.npz", arr_0=np.zeros((3, 8, 8), np.uint8))
    np.savez("none.npz", a=np.zeros(3))
    np.savez("nan.npz", mu=np.zeros(2048), sigma=np.full((2048, 2048), np.nan))
    np.savez("odd.npz", arr_0=np.zeros((3, 36, 36, 3), np.uint8))
    Path("noise.npz").write_bytes(b"PK no zip")
    fast = (
        () if "--weights" in flags or "--n" in flags and flags[3] == 40 else ("--features", "pca")
    )
    if "odd.npz" in flags:
        flags = ("--fake", "odd.npz", *flags[2:])
    code, _, err = user(eval_fid.main, *(str(f).format(run=run) for f in flags), *fast)
    assert code == 2 and err[-1].startswith("error: ") and what in err[-1], err


def test_a_resolution_mends_mixed_sizes(cache):
    (
        pictures(Path("mixed"), 2),
        pictures(Path("mixed") / "sub", 2, (40, 40)),
        pictures(Path("y"), 3, (64, 64)),
    )
    assert (
        card_of("--fake", "y", "--ref", "mixed", "--resolution", 32, "--features", "pca")[
            "measured"
        ]["reference images"]
        == 4
    )


def test_features_that_are_not_numbers_are_refused(cache):
    images = open_images(str(pictures(cache / "x", 4)))
    with pytest.raises(UserError, match="features of .*1 of 4 rows are not finite"):
        extract(images, lambda x: torch.tensor([[1.0], [2.0], [float("nan")], [3.0]]), cache, ALONE)
    assert not list(cache.rglob("*.safetensors"))


def test_cards_that_differ_do_not_share_a_table(run, cache, user):
    flags = ("--ckpt", run, "--n", 40, *FAST, "--cache", cache)
    for name, more in (
        ("a", ()),
        ("b", ("--seed", 40)),
        ("c", ("--steps", 3)),
        ("d", ("--ref", "toyfaces:96:glasses")),
    ):
        assert user(eval_fid.main, *flags, *more, "--out", f"{name}.json")[0] == 0
    code, _, err = user(eval_fid.main, "compare", "a.json", "c.json")
    assert (
        code == 2
        and "differ in steps: 2, 3.  Measure them alike, or say --allow 'steps'" in err[-1]
    )
    code, out, _ = user(eval_fid.main, "compare", "a.json", "c.json", "--allow", "steps")
    value = json.loads(Path("c.json").read_text())["metrics"]["FD-pca40"]["value"]
    assert (
        code == 0
        and f"{value:.4f} ± " in out
        and "floor" in out
        and out.splitlines()[0].split()[:3] == ["card", "steps", "NFE"]
    )
    with pytest.raises(UserError, match="filter"):
        compare(["a.json", "d.json"], ())
    with pytest.raises(UserError, match="seeds"):
        compare(["a.json", "b.json"], ())
    assert len(compare(["a.json", "b.json"], ("seeds",)).splitlines()) == 4
    with pytest.raises(UserError, match="Closest: steps"):
        compare(["a.json", "b.json"], ("step",))
    Path("no.json").write_text("{}")
    assert user(eval_fid.main, "compare", "a.json", "no.json")[2][-1].startswith(
        "error: no.json is not a metric card."
    )
    assert user(eval_fid.main, "compare", "a.json")[0] == 2


# ---- the source's protocol ----------------------------------------------------------------------


def test_the_protocol_measures_subsets_and_flags_a_copier(run, cache):
    from experiments import protocol

    cfg = protocol.Config(runs=(str(run),), n=40, features="pca", method="euler", steps=2)
    result = protocol.assess(cfg, ALONE)
    mine = result[run.name]
    assert mine["trained on"] == "rest" and mine["metrics"].keys() == {
        "all",
        "excluded tags",
        "rest",
    }
    card = card_of("--ckpt", run, "--n", 40, *FAST)  # its own training set, opened by its own way
    for name in ("FD-pca40", "KD-pca40", "memorisation"):
        assert mine["metrics"]["rest"][name]["value"] == pytest.approx(
            card["metrics"][name]["value"], rel=1e-9
        ), name
        assert mine["metrics"]["rest"][name].get("floor", 0) == pytest.approx(
            card["metrics"][name].get("floor", 0), rel=1e-9
        )
    copier, fresh = (result[k]["metrics"]["all"] for k in ("a copier", "fresh images"))
    assert (
        copier["memorisation"]["flagged"]
        and copier["memorisation"]["ratio"] < 0.01
        and not fresh["memorisation"]["flagged"]
    )
    assert copier["FD-pca40"]["value"] < mine["metrics"]["all"]["FD-pca40"]["value"]
    with pytest.raises(UserError, match="wanted folders of runs"):
        protocol.assess(protocol.Config(), ALONE)


# ---- in training --------------------------------------------------------------------------------


def test_a_run_can_log_its_own_fid(cache, tmp_path, monkeypatch, user):
    monkeypatch.setattr(eval_fid, "FID_IMAGES", 24)
    fields = dict(
        model="nano",
        data="toyfaces:60",
        resolution=32,
        batch=8,
        images=16,
        holdout=0.2,
        preview_every=0,
        eval_every=0,
        save_every=0,
        log_every=0,
        fid_every=8,
        fid_features="pca",
        out=str(tmp_path),
    )
    train.train(cfg := train.resolve(train.Config(**fields, name="with")), ALONE)
    rows = [
        r
        for r in map(json.loads, (tmp_path / "with" / "log.jsonl").read_text().splitlines())
        if r["event"] == "fid"
    ]
    assert [r["images"] for r in rows] == [8, 16] and all(
        r["FD-pca24"] > r["floor"] > 0 and r["of"] == "ema-0.050" for r in rows
    )
    assert rows[0]["FD-pca24"] != rows[1]["FD-pca24"] and rows[1]["KD-pca24 error"] > 0
    # looking changes nothing, and the last line is what eval_fid.py says of the checkpoint
    train.train(train.resolve(train.Config(**{**fields, "fid_every": 0}, name="without")), ALONE)
    last = [
        sorted((tmp_path / name / "ckpt").iterdir())[-1] / "model.safetensors"
        for name in ("with", "without")
    ]
    assert len({load_unet(path)[1]["fingerprint"] for path in last}) == 1
    card = card_of(
        "--ckpt",
        tmp_path / "with",
        "--n",
        24,
        "--features",
        "pca",
        "--method",
        "heun",
        "--steps",
        10,
    )
    assert card["metrics"]["FD-pca24"]["value"] == pytest.approx(rows[1]["FD-pca24"], rel=1e-5)
    flags = [
        w
        for k, v in {**fields, "fid_features": "inception", "name": "no"}.items()
        for w in (f"--{k.replace('_', '-')}", str(v))
    ]
    code, _, err = user(train.main, *flags)
    assert code == 2 and "python -m metrics.inception --fetch" in err[-1] and "cfg" in locals()


def test_every_flag_of_drawing_is_used_or_refused(run, cache, user):
    """What changes the images is in the card; what makes pictures from pictures is not a flag here."""
    code, _, err = user(
        eval_fid.main,
        "--ckpt",
        run,
        "--n",
        8,
        "--method",
        "dpmpp_2m",
        "--grid",
        "karras",
        "--steps",
        3,
        "--features",
        "pca",
        "--out",
        "k.json",
    )
    assert code == 0, err
    code, _, err = user(
        eval_fid.main,
        "--ckpt",
        run,
        "--n",
        8,
        "--method",
        "dpmpp_2m",
        "--steps",
        3,
        "--features",
        "pca",
        "--out",
        "u.json",
    )
    one, two = (json.loads(Path(name).read_text()) for name in ("k.json", "u.json"))
    assert (
        one["sampled"]["grid"] == "karras"
        and one["metrics"]["FD-pca8"]["value"] != two["metrics"]["FD-pca8"]["value"]
    )
    for flags, message in (
        (["--init", "a.png"], "unknown flag --init"),
        (["--no-grid-image"], "unknown flag --no-grid-image"),
        (["--eta", 1], "--eta changes nothing here: it is of --method"),
    ):
        code, _, err = user(eval_fid.main, "--ckpt", run, *flags)
        assert code == 2 and len(err) == 1 and message in err[0], err


# ---- what a number must not be mistaken for -----------------------------------------------------


def test_what_a_file_says_of_its_network_is_part_of_the_features_name(run, cache):
    """Equal tensors that mean something else, equal flags: an objective in the file, and solvers that step a batch as one."""
    net, meta = load_unet(find_checkpoint(run))
    net, meta = randomize(net), {k: v for k, v in meta.items() if k not in ("probe", "fingerprint")}
    values = []
    for name in ("v", "x0"):
        save_unet(
            cache.parent / f"{name}.safetensors",
            net,
            {**meta, "objective": asdict(make_objective(name))},
        )
        values.append(
            card_of("--ckpt", cache.parent / f"{name}.safetensors", "--n", 8, *FAST)["metrics"][
                "FD-pca8"
            ]["value"]
        )
    assert values[0] != values[1]
    flags = (
        "--ckpt",
        cache.parent / "v.safetensors",
        "--n",
        8,
        "--features",
        "pca",
        "--method",
        "dopri5",
        "--whole-batch",
        "--batch",
    )
    small, large = (card_of(*flags, batch)["metrics"]["FD-pca8"]["value"] for batch in (1, 8))
    alone = card_of(*flags[:-1], "--batch", 1, "--cache", cache / "other")["metrics"]["FD-pca8"][
        "value"
    ]
    assert small == alone and small != large


def test_nfe_is_the_mean_of_all_images_also_when_they_come_from_disk(run, cache, capsys):
    net, meta = load_unet(find_checkpoint(run))
    save_unet(
        cache.parent / "r.safetensors",
        randomize(net),
        {k: v for k, v in meta.items() if k not in ("probe", "fingerprint")},
    )
    flags = (
        "--ckpt",
        cache.parent / "r.safetensors",
        "--n",
        20,
        "--features",
        "pca",
        "--method",
        "dopri5",
        "--rtol",
        0.01,
    )
    card = card_of(*flags)
    assert card["sampled"]["nfe"] == card_of(*flags)["sampled"]["nfe"]
    cfg, _ = eval_fid.parse(eval_fid.Config, argv=[str(f) for f in flags])
    gen = eval_fid.open_checkpoint(cfg, ALONE.device)
    first, mean = (gen.draw(list(range(n))).nfe for n in (8, 20))
    assert first != mean == card["sampled"]["nfe"]


def test_a_network_of_classes_without_labels_is_said_to_draw_without(tmp_path, cache, capsys):
    cfg = train.resolve(
        train.Config(
            model="nano",
            data="toyfaces:64",
            resolution=32,
            batch=8,
            images=8,
            preview_every=0,
            eval_every=0,
            save_every=0,
            out=str(tmp_path),
            name="c",
            classes=("glasses", "smile"),
            flip=True,
        )
    )
    train.train(cfg, ALONE)
    capsys.readouterr()
    card, err = card_of("--ckpt", tmp_path / "c", "--n", 8, *FAST), capsys.readouterr().err
    assert card["sampled"]["classes"] == "unconditional, of 2" and "drawn without a class" in err
    assert card["subject"]["flip"] is True and "was trained on mirrored images too" in err
    card = card_of(
        "--ckpt", tmp_path / "c", "--n", 8, *FAST, "--cfg", 2, "--labels", "smile,glasses"
    )
    printed = capsys.readouterr()
    assert card["sampled"]["classes"] == "2 of 2" and "without a class" not in printed.err
    assert (
        "8 images to draw × 2 NFE × 2 networks = 32 network evaluations" in printed.out
        and card["sampled"]["nfe"] == 2
    )


def test_random_weights_never_pass_for_fid_in_the_protocol(run, cache, monkeypatch):
    from experiments import protocol

    class Made:
        id = {"features": "inception", "weights": "random:0"}

        def __call__(self, images):
            return images.float().mean((2, 3))

    monkeypatch.setattr(eval_fid, "build_extractor", lambda *a: Made())
    result = protocol.assess(
        protocol.Config(runs=(str(run),), n=4, weights="random:0", method="euler", steps=1), ALONE
    )
    assert {
        name
        for row in result.values()
        for m in row["metrics"].values()
        for name in m
        if name[0] in "FK"
    } == {"FD-random4", "KD-random4", "FD-random16", "KD-random16"}


def test_what_is_missing_from_a_card_is_said(run, cache, user):
    code, out, err = user(
        eval_fid.main, "--ckpt", run, "--n", 60, *FAST, "--ref", "toyfaces:96", "--holdout", 0.05
    )
    assert (
        code == 0
        and not any("was trained on" in line for line in err)
        and any(
            "no memorisation check: " in line and " images are held out" in line for line in err
        )
    ), err
    assert re.search(r"FD-pca60 .* at 4\d", out), (
        out
    )  # the floor could only be had at half of the reference
    x = pictures(cache / "x", 30)
    code, out, err = user(
        eval_fid.main,
        "--fake",
        pictures(cache / "y", 2, seed=3),
        "--ref",
        x,
        "--features",
        "pca",
        "--out",
        "two.json",
    )
    assert code == 0 and " at " not in out and "NaN" not in Path("two.json").read_text()
    np.savez("drawn.npz", np.zeros((9, 32, 32, 3), np.uint8))
    assert (
        len(card_of("--fake", "drawn.npz", "--ref", x, "--features", "pca")["subject"]["hash"])
        == 64
    )


def test_a_path_spelled_otherwise_is_the_same_training_set(cache, tmp_path, monkeypatch):
    pictures(tmp_path / "data", 60, (32, 32))
    cfg = train.resolve(
        train.Config(
            model="nano",
            data=str(tmp_path / "data"),
            resolution=32,
            batch=8,
            images=8,
            holdout=0.3,
            preview_every=0,
            eval_every=0,
            save_every=0,
            out=str(tmp_path),
            name="own",
        )
    )
    train.train(cfg, ALONE)
    monkeypatch.chdir(tmp_path)
    for ref in ("data", "./data/", str(tmp_path / "data")):
        assert (
            card_of("--ckpt", "own", "--n", 8, *FAST, "--ref", ref)["measured"]["holdout"] == 0.3
        ), ref


def test_a_damaged_chunk_that_nobody_asks_for_does_no_harm(tmp_path):
    def produce(chunk):
        return torch.arange(chunk.start, chunk.stop).float()[:, None].expand(-1, 3)

    n = 2 * CHUNK
    compute(tmp_path, n, np.arange(n), produce, ALONE, {}, "x")
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-100])
    last = compute(tmp_path, n, np.arange(CHUNK, n), produce, ALONE, {}, "x")
    assert last.statistics(ALONE)[0].n == CHUNK


@pytest.mark.parametrize(
    "flags, what",
    [
        (("--steps", 3), "--steps does nothing with --fake"),
        (("--cfg", 2), "--cfg does nothing with --fake"),
        (("--preproc", "clean"), "--preproc changes nothing here: it is of --features inception"),
        (("--weights", "random:1"), "--weights changes nothing here: it is of --features inception"),
        (("--holdout", 1.5), "--holdout 1.5: wanted 0 to 1"),
        (("--holdout", -0.5), "--holdout -0.5: wanted 0 to 1"),
        (("--holdout", 0.9999), "has 0 images that are not held out"),
        (("--infinity",), "at least 20"),
        (
            ("--save-stats", "nodir/x.npz"),
            "--save-stats nodir/x.npz: wanted FILE.npz in a folder that exists",
        ),
        (("--save-stats", "plain"), "--save-stats plain: wanted FILE.npz"),
        (("--out", "x"), "--out x is a folder"),
        (("--ref", "wide"), "the two sides have 48×32 and 32×32 pixels"),
    ],
)
def test_what_cannot_be_done_is_said_before_it_is_tried(flags, what, cache, user):
    pictures(Path("x"), 6), pictures(Path("y"), 5, seed=1), pictures(Path("wide"), 5, (48, 32))
    code, _, err = user(
        eval_fid.main,
        "--fake",
        "y",
        *(() if "--ref" in flags else ("--ref", "x")),
        "--features",
        "pca",
        *flags,
    )
    assert code == 2 and what in err[-1], err
    assert not list(Path().rglob("cards/*"))


@pytest.mark.parametrize(
    "name, what",
    [
        ("cut", "cannot be read as npz"),
        ("flipped", "cannot be read as npz"),
        ("npy", "wanted an npz"),
        ("object", "cannot be read as npz"),
        ("text", "cannot be read as npz"),
        ("empty", "cannot be read as npz"),
        ("negative", "not a covariance"),
        ("skew", "not a covariance"),
    ],
)
def test_files_of_moments_that_are_none(name, what, cache, user):
    good = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez("x.npz", **good)
    data = bytearray(Path("x.npz").read_bytes())
    if name in ("cut", "flipped", "empty"):
        data[3000] ^= 255
        Path("x.npz").write_bytes(
            {"cut": data[: len(data) // 2], "flipped": data, "empty": b""}[name]
        )
    elif name == "npy":
        np.save("x.npy", good["mu"])
        Path("x.npy").rename("x.npz")
    else:
        np.savez(
            "x.npz",
            **good
            | {
                "object": {"mu": np.array([None])},
                "text": {"mu": np.array(["a"] * 2048)},
                "negative": {"sigma": -np.eye(2048)},
                "skew": {"sigma": np.eye(2048) + np.tri(2048, k=-1)},
            }[name],
        )
    code, _, err = user(
        eval_fid.main, "--fake", pictures(Path("x"), 3), "--ref", "x.npz", "--weights", "random:0"
    )
    assert code == 2 and what in err[-1] and "x.npz" in err[-1], err


def test_moments_at_another_resolution_are_refused(cache, user):
    flags = ("--weights", "random:1")
    card_of(
        "--fake",
        pictures(cache / "x", 4),
        "--ref",
        pictures(cache / "y", 8, seed=2),
        *flags,
        "--save-stats",
        "y.npz",
    )
    code, _, err = user(
        eval_fid.main, "--fake", pictures(cache / "large", 4, (64, 64)), "--ref", "y.npz", *flags
    )
    assert code == 2 and "32" in err[-1] and "64" in err[-1] and "y.npz" in err[-1], err
    code, _, err = user(
        eval_fid.main, "--fake", cache / "x", "--ref", "y.npz", *flags, "--save-stats", "z.npz"
    )
    assert code == 2 and "--save-stats" in err[-1] and "is moments already" in err[-1], err


def test_compare_reads_its_words(cache, user):
    Path("k.json").write_text('{"kind": "metric card"}')
    x, y = pictures(cache / "x", 12), pictures(cache / "y", 12, seed=1)
    card_flags = ("--ref", x, "--features", "pca")
    for name, more in (("a", ()), ("b", ("--pairs", 11))):
        assert user(eval_fid.main, "--fake", y, *card_flags, *more, "--out", f"{name}.json")[0] == 0
    assert "not a metric card" in user(eval_fid.main, "compare", "k.json", "a.json")[2][-1]
    for words in (
        ("a.json", "b.json", "--allow"),
        ("--allow", "pairs", "a.json"),
        ("a.json", "b.json", "--deny", "x"),
    ):
        code, _, err = user(eval_fid.main, "compare", *words)
        assert code == 2 and "Write python eval_fid.py compare" in err[-1], words
    for words in (
        ("--allow=pairs", "a.json", "b.json"),
        ("--allow", "pairs", "--allow", "n", "a.json", "b.json"),
    ):
        assert user(eval_fid.main, "compare", *words)[0] == 0, words


def test_a_run_that_enlarges_pictures_has_no_fid_of_its_own(cache, tmp_path, user):
    code, _, err = user(
        train.main,
        "--model",
        "nano",
        "--data",
        "toyfaces:60",
        "--resolution",
        32,
        "--batch",
        8,
        "--images",
        8,
        "--objective",
        "cfm",
        "--fid-every",
        8,
        "--fid-features",
        "pca",
        "--out",
        tmp_path / "runs",
    )
    assert code == 2 and "--fid-every" in err[-1] and "cfm" in err[-1], err
