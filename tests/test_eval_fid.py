"""From checkpoints, folders and files to cards: sampling, caching, resuming, ranks, refusals."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_fid
import samplers
import train
from ckpt import find_checkpoint, load_unet, save_unet
from conftest import ROOT, randomize
from data.dataset import open_dataset
from eval_fid import compare, default_ref
from experiments import protocol
from folders import pictures, read_all
from diffusion.sampling import NonFinite
from harness.cli import UserError
from harness.files import strict_json
from harness.ranks import Ranks
from metrics.distances import Statistics, frechet, kernel_distance
from metrics.features import Pca, key_of
from metrics.inception import load_inception
from objectives import make_objective
from vae import fit_pca

ALONE = Ranks(0, 1, torch.device("cpu"))
# The same random network need not be made for every test.
LOAD_INCEPTION = lru_cache(load_inception)
FAST = "--features pca --method euler --steps 2"
# A run of a second or two that shows nothing of itself.
SMALL = {
    "model": "nano",
    "resolution": 32,
    "batch": 8,
    "images": 8,
    "preview_every": 0,
    "eval_every": 0,
    "save_every": 0,
}


def train_run(**flags):
    """Train; the run's folder."""
    cfg = train.resolve(train.Config(**{**SMALL, **flags}))
    train.train(cfg, ALONE)
    return Path(cfg.out) / cfg.name


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has barely begun: toy faces of 32 pixels."""
    return train_run(
        data="toyfaces:96",
        images=16,
        holdout=0.3,
        out=str(tmp_path_factory.mktemp("runs")),
        stage="fine",
        exclude_tags=("glasses", "character:nova"),
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TWINPATH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FID_INCEPTION", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(eval_fid, "load_inception", LOAD_INCEPTION)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def command(user):
    """command("--ckpt RUN …") -> (exit code, stdout, stderr lines) of eval_fid.py."""
    return lambda line: user(eval_fid.main, *line.split())


def card_of(line):
    """The card of a command line."""
    cfg, _ = eval_fid.parse(eval_fid.Config, argv=line.split())
    return eval_fid.evaluate(cfg, ALONE)


def value_of(line, metric):
    return card_of(line)["metrics"][metric]["value"]


def network_of(run):
    """(network, metadata) of a run, without what is said of its weights."""
    net, meta = load_unet(find_checkpoint(run))
    return net, {k: v for k, v in meta.items() if k not in ("probe", "fingerprint")}


# ---- from a checkpoint --------------------------------------------------------------------------


def test_a_checkpoint_is_scored_against_what_it_was_trained_on(run, cache, command):
    code, out, err = command(f"--ckpt {run} --n 60 {FAST} --out a.json")
    assert code == 0 and out.splitlines()[-1] == "a.json"
    assert "60 of 60 images to draw × 2 NFE = 120 network evaluations: about" in out
    assert sum("fewer than 2,048" in line for line in err) == 1
    card = json.loads(Path("a.json").read_text())
    pairs = ("KD-pca60", "precision60", "recall60", "density60", "coverage60", "memorisation")
    assert card["metrics"].keys() == {"FD-pca60", *pairs}
    fd, kd = card["metrics"]["FD-pca60"], card["metrics"]["KD-pca60"]
    assert fd["value"] > 0 and fd["error"] > 0 and fd["floor"] > 0 and kd["error"] > 0
    machine = {"dtype": card["sampled"].pop("dtype"), "device": card["sampled"].pop("device")}
    assert all(machine.values()) and card["sampled"] == {
        "method": "euler",
        "steps": 2,
        "grid": "uniform",
        "shift": 1.0,
        "t_start": 1.0,
        "cfg": 1.0,
        "labels": [],
        "nfe": 2.0,
        "seeds": [0, 59],
    }
    subject = card["subject"]
    assert subject["ema"] == 0.05 and subject["images"] == 16 and "commit" in card
    assert len(subject["fingerprint"]) == 64
    measured, excluded = card["measured"], ["glasses", "character:nova"]
    spec = {"stage": "fine", "exclude_tags": excluded, "resolution": 32, "holdout": 0.3}
    own = open_dataset("toyfaces:96", **spec)
    assert measured["reference images"] == len(own) and measured["holdout"] == 0.3
    assert card["metrics"]["memorisation"]["held_out"] == len(own.heldout)
    assert measured["reference hash"] == own.source.hash
    assert measured["filter"] == "!(glasses) & !(character:nova)"


def test_sampling_in_one_go_is_the_same_as_through_files(run, cache, user):
    card = card_of(f"--ckpt {run} --n 40 {FAST} --seed 5")
    how = "--n 40 --method euler --steps 2 --seed 5 --out drawn"
    user(samplers.main, "--ckpt", run, *how.split())
    ref = default_ref(json.loads((run / "config.json").read_text()), "")
    against = ["--ref", ref, "--holdout", "0.3", "--resolution", "32", "--features", "pca"]
    np.savez("drawn.npz", read_all(Path("drawn")))  # arr_0
    for fake in ("drawn", "drawn.npz"):
        cfg, _ = eval_fid.parse(eval_fid.Config, argv=["--fake", fake, *against])
        other = eval_fid.evaluate(cfg, ALONE)["metrics"]
        for name, m in card["metrics"].items():
            assert other[name]["value"] == pytest.approx(m["value"], rel=1e-10), name


# Fewer images than dimensions, and more.
@pytest.mark.parametrize("side, d", [(32, 512), (8, 32)])
def test_the_metrics_are_those_of_the_features(side, d, cache):
    """The card against the definitions, by hand."""
    pictures(cache / "x", 80, (side, side), seed=1)
    pictures(cache / "y", 60, (side, side), seed=2)
    x, y = (torch.from_numpy(read_all(cache / name)).permute(0, 3, 1, 2) for name in "xy")
    extractor = Pca(fit_pca(x.float() / 127.5 - 1), {})
    fx, fy = extractor(x), extractor(y)
    assert fx.shape == (80, d)

    def near(value, rel=1e-6, abs=None):  # features in fp32 round by their batch
        return pytest.approx(value, rel=rel, abs=abs)

    metrics = card_of(f"--fake {cache}/y --ref {cache}/x --features pca")["metrics"]
    fd, kd = metrics["FD-pca60"], metrics["KD-pca60"]
    whole = Statistics.of(fx)
    assert fd["value"] == near(frechet(whole, Statistics.of(fy)))
    assert kd["value"] == near(kernel_distance(fx, fy).value, abs=1e-6)
    rest = [[i for i in range(60) if i % 10 != g] for g in range(10)]
    copies = [frechet(whole, Statistics.of(fy[keep])) for keep in rest]
    # √(9/10 · 10) of the population's standard deviation.
    assert fd["error"] == near(np.std(copies) * 3, rel=1e-5)
    # The floor: half of the reference against the other half.
    order = np.random.default_rng(0).permutation(80)
    assert fd["floor n"] == 40
    halves = [fx[torch.from_numpy(np.sort(half))] for half in (order[:40], order[40:])]
    assert fd["floor"] == near(frechet(*map(Statistics.of, halves)))
    assert kd["floor"] == near(kernel_distance(*halves).value, abs=1e-6)
    assert value_of(f"--fake {cache}/x --ref {cache}/x --features pca", "FD-pca80") == 0.0


def test_two_ranks_give_what_one_gives(run, cache, tmp_path):
    line = f"--ckpt {run} --n 520 --features pca --method euler --steps 1 --ref toyfaces:600 "
    line += "--holdout 0.2"
    one = card_of(line)
    env = {**os.environ, "TWINPATH_CACHE": str(tmp_path / "other"), "TRITON_INTERPRET": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = [*torchrun, "--nproc_per_node=2", "--", ROOT / "eval_fid.py", *line.split()]
    words += ["--out", "two.json"]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads(Path("two.json").read_text())
    assert two["ranks"] == 2 and "on 2 ranks" in done.stdout
    assert done.stdout.count("network evaluations") == 1
    for name, m in one["metrics"].items():
        for key, value in m.items():
            assert two["metrics"][name][key] == pytest.approx(value, rel=1e-10), (name, key)


def test_two_sets_of_one_size_and_two_checkpoints_do_not_share_features(run, cache):
    x, y = pictures(cache / "x", 40, seed=1), pictures(cache / "y", 40, seed=2)
    assert value_of(f"--fake {y} --ref {x} --features pca", "FD-pca40") > 1
    how = f"--n 2 --method euler --steps 1 --weights random:0 --ref {pictures(cache / 'z', 2)}"
    net, meta = network_of(run)
    for seed in (1, 2):
        save_unet(cache / f"{seed}.safetensors", randomize(net, seed), meta)
    lines = [f"--ckpt {cache}/{seed}.safetensors {how}" for seed in (1, 2, 1)]
    values = [value_of(line, "FD-random2") for line in lines]
    assert values[0] != values[1] and values[0] == values[2]


def test_features_of_a_checkpoint_keep_their_name_on_disk(cache):
    """What was computed before the code was put into folders is found again: the fields that make
    the name, and what an old run says there."""
    old = ROOT / "tests" / "fixtures" / "834bb60" / "run"
    card = card_of(f"--ckpt {old} --n 8 {FAST}")
    said = [json.loads(path.read_text()) for path in cache.rglob("what.json")]
    what = next(each for each in said if "checkpoint" in each)
    assert (cache / "features" / key_of(what)).is_dir()
    extractor, unet = what.pop("extractor"), what.pop("unet")
    assert extractor.keys() == {"features", "fitted on", "fitted to", "resolution"}
    assert unet == load_unet(find_checkpoint(old))[1]["unet"]
    assert what.pop("objective") == asdict(make_objective("fm", density="logit_normal"))
    assert what == {
        "checkpoint": "6489f36c55479d5d283993e100c6603d8a95dea85bf2d5626e5b4da017b5a197",
        "vae": "902ce1f185049ec053632861120dd7bc318161f5a4f9927cfc5fa1061410aca9",
        "attention_order": "",
        "num_head_channels": 0,
        "num_heads": 0,
        "cfg": 1.0,
        "classes": "unconditional, of 11",
        "device": "cpu",
        "dtype": "fp32",
        "grid": "uniform",
        "labels": [],
        "method": "euler",
        "resolution": 32,
        "seed": 0,
        "shift": 1.0,
        "steps": 2,
        "t_start": 1.0,
    }
    assert card["subject"]["fingerprint"] == what["checkpoint"]


# ---- statistics as files ------------------------------------------------------------------------


def test_moments_are_written_read_and_checked(cache, command, capsys):
    x, y = pictures(cache / "x", 8, seed=1), pictures(cache / "y", 8, seed=2)
    fake = f"--fake {y} --weights random:1"
    whole = card_of(f"{fake} --ref {x} --save-stats x.npz")
    value = whole["metrics"]["FD-random8"]["value"]
    assert whole["measured"]["weights"] == "random:1"
    capsys.readouterr()
    card = card_of(f"{fake} --ref x.npz")
    assert "does not say" not in capsys.readouterr().err
    assert list(card["metrics"]) == ["FD-random8"]
    assert card["metrics"]["FD-random8"]["value"] == pytest.approx(value, rel=1e-6)
    assert card["measured"]["reference hash"] == whole["measured"]["reference hash"]
    assert value_of("--fake x.npz --ref x.npz --weights random:1", "FD-random8") == 0.0
    for changed, what in (
        ("--preproc clean", "preproc 'torch', and this asks for 'clean'"),
        ("--weights random:2", "weights 'random:1'"),
    ):
        code, _, err = command(f"{fake} --ref x.npz {changed}")
        assert code == 2 and what in err[-1]
    with np.load("x.npz") as file:
        np.savez("foreign.npz", mu=file["mu"], sigma=file["sigma"])
        np.savez("short.npz", mu=file["mu"][:64], sigma=file["sigma"][:64, :64])
    foreign = value_of(f"{fake} --ref foreign.npz", "FD-random8")
    assert "cannot vouch" in capsys.readouterr().err and foreign == pytest.approx(value, rel=1e-6)
    _, _, err = command(f"{fake} --ref short.npz")
    assert err[-1].endswith("They are of another network.")


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
def test_files_of_moments_that_are_none(name, what, cache, command):
    good = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    bad = {
        "object": {"mu": np.array([None])},
        "text": {"mu": np.array(["a"] * 2048)},
        "negative": {"sigma": -np.eye(2048)},
        "skew": {"sigma": np.eye(2048) + np.tri(2048, k=-1)},
    }
    path = Path("x.npz")
    np.savez(path, **{**good, **bad.get(name, {})})
    data = bytearray(path.read_bytes())
    if name == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif name == "flipped":
        data[3000] ^= 255
        path.write_bytes(data)
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "npy":
        np.save("x.npy", good["mu"])
        Path("x.npy").rename(path)
    fake = pictures(Path("x"), 3)
    code, _, err = command(f"--fake {fake} --ref x.npz --weights random:0")
    assert code == 2 and what in err[-1] and "x.npz" in err[-1], err


def test_moments_at_another_resolution_are_refused(cache, command):
    x, y = pictures(cache / "x", 4), pictures(cache / "y", 8, seed=2)
    large = pictures(cache / "large", 4, (64, 64))
    card_of(f"--fake {x} --ref {y} --weights random:1 --save-stats new/y.npz")
    Path("new/y.npz").rename("y.npz")
    code, _, err = command(f"--fake {large} --ref y.npz --weights random:1")
    assert code == 2 and "32" in err[-1] and "64" in err[-1] and "y.npz" in err[-1], err
    code, _, err = command(f"--fake {x} --ref y.npz --weights random:1 --save-stats z.npz")
    assert code == 2 and "--save-stats" in err[-1] and "is moments already" in err[-1], err


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, what",
    [
        ("--features pca", "Give one of --ckpt"),
        ("--ckpt {run} --fake x --features pca", "Give one of --ckpt"),
        ("--fake x --features pca", "--fake needs --ref"),
        ("--ckpt {run} --n 1 --features pca", "at least 2 images"),
        ("--ckpt {run} --cfg 2 --features pca", "--cfg 2.0 needs --labels"),
        (f"--ckpt {{run}} --seed {2**63 - 5} --features pca", "wanted 0 to 9,223,372,"),
        ("--ckpt {run} --n 40", "python -m metrics.inception --fetch"),
        ("--fake x --ref nowhere --features pca", "no data at nowhere"),
        ("--fake x --ref one --features pca", "has 1 images; a distance between sets needs at"),
        (
            "--fake x --ref mixed --features pca",
            "mixes image sizes (32×32, 40×40).  Resizing is part of the metric",
        ),
        ("--fake x --ref big --features pca", "the two sides have"),
        ("--fake x --ref bad.npz --features pca", "wanted images as arr_0"),
        ("--fake x --ref empty.npz --features pca", "empty.npz has 0 images"),
        ("--fake x --ref none.npz --weights random:0", "wanted mu and sigma"),
        ("--fake x --ref x:hat --features pca", "matches 0 of 3 images"),
        ("--fake x --ref nan.npz --weights random:0", "not finite"),
        ("--fake x --ref noise.npz --features pca", "cannot be read as npz"),
        ("--fake x --ref x --weights nowhere.pth", "no weights at nowhere.pth"),
        ("--fake x --ref x --preproc bicubic", "is not one of torch, clean, tf"),
        ("--fake odd.npz --ref odd.npz --features pca", "patches of 8×8"),
        ("--fake x --ref moments.npz --features pca", "--ref gives only moments"),
    ],
)
def test_bad_input_is_one_line(line, what, run, cache, command):
    for name, n, size in (("x", 3, 32), ("one", 1, 32), ("big", 3, 64), ("mixed", 2, 32)):
        pictures(Path(name), n, (size, size))
    pictures(Path("mixed") / "sub", 2, (40, 40))
    np.savez("bad.npz", arr_0=np.zeros((3, 8, 8), np.uint8))
    np.savez("empty.npz", arr_0=np.zeros((0, 32, 32, 3), np.uint8))
    np.savez("none.npz", a=np.zeros(3))
    np.savez("nan.npz", mu=np.zeros(2048), sigma=np.full((2048, 2048), np.nan))
    np.savez("odd.npz", arr_0=np.zeros((3, 36, 36, 3), np.uint8))
    np.savez("moments.npz", mu=np.zeros(64), sigma=np.eye(64))
    Path("noise.npz").write_bytes(b"PK no zip")
    code, _, err = command(line.format(run=run))
    assert code == 2 and err[-1].startswith("error: ") and what in err[-1], err


@pytest.mark.parametrize(
    "flags, what",
    [
        ("--steps 3", "--steps does nothing with --fake"),
        ("--cfg 2", "--cfg does nothing with --fake"),
        ("--batch 8", "--batch does nothing with --fake"),
        ("--preproc clean", "--preproc changes nothing here: it is of --features inception"),
        ("--weights random:1", "--weights changes nothing here: it is of --features inception"),
        ("--holdout 1.5", "--holdout 1.5: wanted -1 to 1"),
        ("--holdout -0.5", "--holdout -0.5: wanted 0 to 1"),
        ("--holdout 0.9999", "has 0 images that are not held out"),
        ("--pairs 9", "--pairs 9: wanted 10 to 1,000,000"),
        ("--infinity --n 19", "at least 20"),
        ("--infinity", "at least 20"),
        ("--save-stats plain", "--save-stats plain: wanted a file that ends in .npz"),
        ("--out x", "--out x is a folder"),
        ("--ref wide", "the two sides have 48×32 and 32×32 pixels"),
    ],
)
def test_what_cannot_be_done_is_said_before_it_is_tried(flags, what, cache, command):
    pictures(Path("x"), 6)
    pictures(Path("y"), 5, seed=1)
    pictures(Path("wide"), 5, (48, 32))
    ref = "" if "--ref" in flags else "--ref x"
    code, _, err = command(f"--fake y {ref} --features pca {flags}")
    assert code == 2 and what in err[-1], err
    assert not list(Path().rglob("cards/*"))


@pytest.mark.parametrize("flags", ["--n 3", "--seed 1", "--infinity"])
def test_moments_cannot_be_chosen_from(flags, cache, command):
    np.savez("m.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    code, _, err = command(f"--fake m.npz --ref m.npz --weights random:0 {flags}")
    assert code == 2 and flags.split()[0] in err[-1] and "Leave it out." in err[-1], err


def test_every_flag_of_sampling_is_used_or_refused(run, cache, command):
    """What changes the images is in the card; making pictures from pictures is no flag here."""
    how = f"--ckpt {run} --n 8 --method dpmpp_2m --steps 3 --features pca"
    cards = []
    for name, more in (("k.json", "--grid karras"), ("u.json", "")):
        code, _, err = command(f"{how} {more} --out {name}")
        assert code == 0, err
        cards.append(json.loads(Path(name).read_text()))
    values = [card["metrics"]["FD-pca8"]["value"] for card in cards]
    assert cards[0]["sampled"]["grid"] == "karras" and values[0] != values[1]
    for flags, message in (
        ("--init a.png", "unknown flag --init"),
        ("--no-grid-image", "unknown flag --no-grid-image"),
        ("--eta 1", "--eta changes nothing here: it is of --method"),
    ):
        code, _, err = command(f"--ckpt {run} {flags}")
        assert code == 2 and len(err) == 1 and message in err[0], err


def test_a_resolution_mends_mixed_sizes(cache):
    pictures(Path("mixed"), 2)
    pictures(Path("mixed") / "sub", 2, (40, 40))
    pictures(Path("y"), 3, (64, 64))
    card = card_of("--fake y --ref mixed --resolution 32 --features pca")
    assert card["measured"]["reference images"] == 4


# ---- cards --------------------------------------------------------------------------------------


def test_cards_that_differ_do_not_share_a_table(run, cache, command):
    for name, more in (
        ("a", ""),
        ("b", "--seed 40"),
        ("c", "--steps 3"),
        ("d", "--ref toyfaces:96:glasses"),
    ):
        line = f"--ckpt {run} --n 40 {FAST} --cache {cache} {more} --out {name}.json"
        assert command(line)[0] == 0
    code, _, err = command("compare a.json c.json")
    assert code == 2
    assert "differ in steps: 2, 3.  Measure them alike, or say --allow 'steps'" in err[-1]
    code, out, _ = command("compare a.json c.json --allow steps")
    value = json.loads(Path("c.json").read_text())["metrics"]["FD-pca40"]["value"]
    assert code == 0 and f"{value:.4f} ± " in out and "floor" in out
    assert out.splitlines()[0].split()[:3] == ["card", "steps", "NFE"]
    with pytest.raises(UserError, match="filter"):
        compare(["a.json", "d.json"], ())
    with pytest.raises(UserError, match="seeds"):
        compare(["a.json", "b.json"], ())
    assert len(compare(["a.json", "b.json"], ("seeds",)).splitlines()) == 4
    with pytest.raises(UserError, match="Closest: steps"):
        compare(["a.json", "b.json"], ("step",))
    Path("no.json").write_text("{}")
    _, _, err = command("compare a.json no.json")
    assert err[-1].startswith("error: no.json")
    assert command("compare a.json")[0] == 2


def test_compare_reads_its_words(cache, command):
    Path("k.json").write_text('{"kind": "metric card"}')
    x, y = pictures(cache / "x", 12), pictures(cache / "y", 12, seed=1)
    for name, more in (("a", ""), ("b", "--pairs 11")):
        line = f"--fake {y} --ref {x} --features pca {more} --out {name}.json"
        assert command(line)[0] == 0
    assert "k.json: metrics is missing" in command("compare k.json a.json")[2][-1]
    for words in ("a.json b.json --allow", "--allow pairs a.json", "a.json b.json --deny x"):
        code, _, err = command(f"compare {words}")
        assert code == 2 and "Write python eval_fid.py compare" in err[-1], words
    for words in ("--allow=pairs a.json b.json", "--allow pairs --allow n a.json b.json"):
        assert command(f"compare {words}")[0] == 0, words


def test_what_is_missing_from_a_card_is_said(run, cache, command):
    code, out, err = command(f"--ckpt {run} --n 60 {FAST} --ref toyfaces:96 --holdout 0.05")
    assert code == 0 and not any("was trained on" in line for line in err), err
    said = [line for line in err if "no memorisation check: " in line]
    assert said and " images are held out" in said[0], err
    # The floor could only be had at half of the reference.
    assert re.search(r"FD-pca60 .* at 4\d", out), out
    x, y = pictures(cache / "x", 30), pictures(cache / "y", 2, seed=3)
    code, out, err = command(f"--fake {y} --ref {x} --features pca --out two.json")
    assert code == 0 and " at " not in out and "NaN" not in Path("two.json").read_text()
    np.savez("drawn.npz", np.zeros((9, 32, 32, 3), np.uint8))
    card = card_of(f"--fake drawn.npz --ref {x} --features pca")
    assert len(card["subject"]["hash"]) == 64


# ---- the source's protocol ----------------------------------------------------------------------


def test_the_protocol_measures_subsets_and_flags_a_copier(run, cache):
    cfg = protocol.Config(runs=(str(run),), n=40, features="pca", method="euler", steps=2)
    result = protocol.assess(cfg, ALONE)
    own = result[run.name]
    assert own["trained on"] == "rest"
    assert own["metrics"].keys() == {"all", "excluded tags", "rest"}
    card = card_of(f"--ckpt {run} --n 40 {FAST}")  # its own training set, opened by its own way
    for name in ("FD-pca40", "KD-pca40", "memorisation"):
        got, expected = own["metrics"]["rest"][name], card["metrics"][name]
        assert got["value"] == pytest.approx(expected["value"], rel=1e-9), name
        assert got.get("floor", 0) == pytest.approx(expected.get("floor", 0), rel=1e-9)
    copier, fresh = (result[name]["metrics"]["all"] for name in ("a copier", "fresh images"))
    assert copier["memorisation"]["flagged"] and copier["memorisation"]["ratio"] < 0.01
    assert not fresh["memorisation"]["flagged"]
    assert copier["FD-pca40"]["value"] < own["metrics"]["all"]["FD-pca40"]["value"]
    rows = protocol.lines_of(result)
    assert {len(row) for row in rows} == {7} and rows[-1][0] == "fresh images"
    assert [row[1] for row in rows if row[0] == run.name][-1] == "rest (its own)"
    with pytest.raises(UserError, match="wanted folders of runs"):
        protocol.assess(protocol.Config(), ALONE)


def test_random_weights_never_pass_for_fid_in_the_protocol(run, cache, monkeypatch):
    class Made:
        id = {"features": "inception", "weights": "random:0"}

        def __call__(self, images):
            return images.float().mean((2, 3))

    monkeypatch.setattr(eval_fid, "build_extractor", lambda *a: Made())
    how = {"weights": "random:0", "method": "euler", "steps": 1}
    result = protocol.assess(protocol.Config(runs=(str(run),), n=4, **how), ALONE)
    metrics = [m for row in result.values() for m in row["metrics"].values()]
    names = {name for m in metrics for name in m if name[0] in "FK"}
    assert names == {"FD-random4", "KD-random4", "FD-random16", "KD-random16"}


# ---- in training --------------------------------------------------------------------------------


def test_a_run_can_log_its_own_fid(cache, tmp_path, monkeypatch, user):
    monkeypatch.setattr(eval_fid, "FID_IMAGES", 24)
    flags = {"data": "toyfaces:60", "images": 16, "holdout": 0.2, "log_every": 0}
    flags |= {"fid_every": 8, "fid_features": "pca", "out": str(tmp_path)}
    watched = train_run(**flags, name="with")
    lines = (watched / "log.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["event"] == "fid"]
    assert [row["images"] for row in rows] == [8, 16]
    assert all(row["FD-pca24"] > row["floor"] > 0 for row in rows)
    assert {row["of"] for row in rows} == {"ema-0.050"}
    assert rows[0]["FD-pca24"] != rows[1]["FD-pca24"] and rows[1]["KD-pca24 error"] > 0
    # Looking changes nothing, and the last line is what eval_fid.py says of the checkpoint.
    blind = train_run(**{**flags, "fid_every": 0}, name="without")
    last = [sorted((folder / "ckpt").iterdir())[-1] for folder in (watched, blind)]
    assert len({load_unet(path / "model.safetensors")[1]["fingerprint"] for path in last}) == 1
    line = f"--ckpt {watched} --n 24 --features pca --method heun --steps 10"
    assert value_of(line, "FD-pca24") == pytest.approx(rows[1]["FD-pca24"], rel=1e-5)
    words = []
    for name, value in {**SMALL, **flags, "fid_features": "inception", "name": "no"}.items():
        words += [f"--{name.replace('_', '-')}", value]
    code, _, err = user(train.main, *words)
    assert code == 2 and "python -m metrics.inception --fetch" in err[-1]


def test_a_network_that_draws_no_numbers_has_no_distance_and_no_card(run, cache, command, capsys):
    net, meta = network_of(run)
    with torch.no_grad():
        net.out[2].bias[0] = torch.nan
    save_unet(cache.parent / "broken.safetensors", net, meta)
    out = ["--out card.json", "--save-stats moments.npz"]
    code, _, err = command(f"--ckpt broken.safetensors --n 20 {FAST} {' '.join(out)}")
    assert code == 1 and "no finite numbers for 8 of 8 images, of seeds 0 (t = " in err[-1], err
    assert not Path("card.json").exists() and not list(cache.rglob("*.safetensors"))[1:]

    def draw(seeds):
        raise NonFinite({3: 0.5}, torch.zeros(len(seeds), 3, 32, 32, dtype=torch.uint8))

    trained = {"data": "toyfaces:60", "resolution": 32, "fid_features": "pca", "holdout": 0.2}
    fid = eval_fid.FID(trained, "r", ALONE)
    row = json.loads(strict_json(fid(draw, 8, "raw")))
    name = fid.names[0]
    assert row[name] is None and row["images"] == 8 and row[f"{fid.names[1]} error"] is None
    assert f"no {name}: the network gives no finite numbers" in capsys.readouterr().err


def test_a_run_that_enlarges_pictures_has_no_fid_of_its_own(cache, tmp_path, user):
    line = "--model nano --data toyfaces:60 --resolution 32 --batch 8 --images 8 --objective cfm "
    line += f"--fid-every 8 --fid-features pca --out {tmp_path / 'runs'}"
    code, _, err = user(train.main, *line.split())
    assert code == 2 and "--fid-every" in err[-1] and "cfm" in err[-1], err


# ---- what a number must not be mistaken for -----------------------------------------------------


def test_what_a_file_says_of_its_network_is_part_of_the_features_name(run, cache):
    """Equal tensors that mean something else, equal flags: an objective in the file, and solvers
    that step a batch as one."""
    net, meta = network_of(run)
    randomize(net)
    values = []
    for name in ("v", "x0"):
        path = cache.parent / f"{name}.safetensors"
        save_unet(path, net, {**meta, "objective": asdict(make_objective(name))})
        values.append(value_of(f"--ckpt {path} --n 8 {FAST}", "FD-pca8"))
    assert values[0] != values[1]
    line = f"--ckpt {cache.parent / 'v.safetensors'} --n 8 --features pca"
    line += " --method dopri5 --rtol 0.1 --atol 0.1"
    small, large = (value_of(f"{line} --whole-batch --batch {b}", "FD-pca8") for b in (1, 8))
    alone = value_of(f"{line} --batch 1 --cache {cache / 'other'}", "FD-pca8")
    assert small == alone and small != large


def test_nfe_is_the_mean_of_all_images_also_when_they_come_from_disk(run, cache):
    net, meta = network_of(run)
    path = cache.parent / "r.safetensors"
    save_unet(path, randomize(net), meta)
    line = f"--ckpt {path} --n 20 --features pca --method dopri5 --rtol 0.05"
    nfe = card_of(line)["sampled"]["nfe"]
    assert nfe == card_of(line)["sampled"]["nfe"]
    cfg, _ = eval_fid.parse(eval_fid.Config, argv=line.split())
    checkpoint = eval_fid.open_checkpoint(cfg, ALONE.device)
    first, mean = (checkpoint.draw(list(range(n))).nfe for n in (8, 20))
    assert first != mean == nfe


def test_a_network_of_classes_without_labels_is_said_to_draw_without(tmp_path, cache, capsys):
    flags = {"data": "toyfaces:64", "classes": ("glasses", "smile"), "flip": True}
    run = train_run(**flags, out=str(tmp_path), name="c")
    capsys.readouterr()
    card, err = card_of(f"--ckpt {run} --n 8 {FAST}"), capsys.readouterr().err
    assert card["sampled"]["classes"] == "unconditional, of 2" and "drawn without a class" in err
    assert card["subject"]["flip"] is True and "was trained on mirrored images too" in err
    card = card_of(f"--ckpt {run} --n 8 {FAST} --cfg 2 --labels smile,glasses")
    printed = capsys.readouterr()
    assert card["sampled"]["classes"] == "2 of 2" and "without a class" not in printed.err
    cost = "8 images to draw × 2 NFE × 2 networks = 32 network evaluations"
    assert cost in printed.out and card["sampled"]["nfe"] == 2


def test_a_path_spelled_otherwise_is_the_same_training_set(cache, tmp_path):
    data = pictures(tmp_path / "data", 60)
    train_run(data=str(data), holdout=0.3, out=str(tmp_path), name="own")
    for ref in ("data", "./data/", str(data)):
        card = card_of(f"--ckpt own --n 8 {FAST} --ref {ref}")
        assert card["measured"]["holdout"] == 0.3, ref
