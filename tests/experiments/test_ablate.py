"""The ablation: its arms, its rule, its files."""

import json
import math

import pytest
import torch
from distilling import few_samples, home  # noqa: F401
from distilling import words

import distill
import eval_fid
import experiments.ablate as ablate
from ckpt import read_tensors
from data.dataset import open_dataset
from experiments import verdict
from harness.files import write_tensors
from metrics.distances import frechet_from_features
from training import precision


def cards(fd, loss=lambda arm, seed: [1.0] * 8, seeds=(0, 1, 2)):
    return [
        {
            "arm": arm,
            "seed": s,
            "fd": fd(arm, s),
            "held_out": [{"images": 1, "loss": 1.0, "loss_by_t": loss(arm, s)}],
        }
        for arm in "BCDE"
        for s in seeds
    ]


def test_the_verdict_follows_the_rule():
    better = lambda arm, s: (
        10 + 3 * s - (arm == "D") * (1 + 0.1 * s)
    )  # paired: seeds differ by more than the arms
    assert verdict.verdict(cards(better))[0] == "supported"
    mean, error, n = verdict.paired(cards(better), "D", "B", lambda c: c["fd"])
    assert (mean, error, n) == (pytest.approx(-1.1), pytest.approx(0.1 / math.sqrt(3)), 3)
    assert verdict.verdict(cards(lambda arm, s: 10 + 3 * s + (arm == "D")))[0] == "not supported"
    assert (
        verdict.verdict(cards(lambda arm, s: 10 - (arm == "D") * (s - 0.9)))[0] == "not supported"
    )  # within two standard errors
    assert (
        verdict.verdict(cards(lambda arm, s: better(arm, s) - 5 * (arm == "C")))[0]
        == "not supported"
    )  # C is better still
    spoiled = lambda arm, s: [1.0] * 7 + [1.06 if arm == "D" else 1.0]
    answer, reasons = verdict.verdict(cards(better, spoiled))
    assert answer == "not supported" and any("1.060 (above 1.05)" in r for r in reasons)
    late = cards(better)
    for card in late:
        card["held_out"].insert(
            0, {"images": 0, "loss": 9.0, "loss_by_t": [9.0 * (1 + (card["arm"] == "D"))] * 8}
        )
    assert verdict.verdict(late)[0] == "supported"  # the last evaluation counts
    assert any("a gain of 0.89% would have been" in r for r in verdict.verdict(late)[1]), (
        verdict.verdict(late)[1]
    )
    dosed = cards(better)
    for card in dosed:
        card |= {
            "blocks": {"mid": {"clipped": [0.0, 0.5], "lambda": [1.0, 1.2]}},
            "block_share": [0.01, 0.03],
        }
    assert any(
        "clipped 25% of the time and drifted by 9.1% of itself over a run; the blocks' losses were "
        "2.0% of the loss" in r
        for r in verdict.verdict(dosed)[1]
    )
    assert not any("treatment" in r for r in verdict.verdict(late)[1])
    assert (
        verdict.verdict(cards(better, seeds=(0, 1)))[0]
        == "open"
        == verdict.verdict([c for c in cards(better) if c["arm"] != "C"])[0]
    )
    curve = lambda arm, s: [
        {"images": i, "loss": 10 / i + (arm == "B") * (4 - s), "loss_by_t": [1.0]}
        for i in (1, 2, 4)
    ]
    curves = [{"arm": arm, "seed": s, "held_out": curve(arm, s)} for arm in "AB" for s in (2, 4)]
    curves[-1]["held_out"][1]["loss"] = 2.4  # B, seed 4, is faster; seed 2 never gets there
    assert verdict.images_to(curves, "B", "A") == [2] and verdict.images_to(curves, "A", "A") == [
        4,
        4,
    ]
    _, reasons = verdict.verdict(cards(lambda arm, s: better("D" if arm == "E" else arm, s)))
    assert any("D is not better than an assessor that was never trained" in r for r in reasons)


def test_arms_are_what_the_table_says(home):
    shared = dict(
        teacher=str(home / "teacher.safetensors"),
        assessor_file=str(home / "a.safetensors"),
        alpha=0.6,
        e_t="excess",
        local_heads=True,
        base_jitter=7,
    )
    fields = (
        "assessor",
        "block_weight",
        "adaptive_t",
        "shift",
        "local_heads",
        "alpha",
        "e_t",
        "base_jitter",
    )
    wanted = {
        "A": ("none", 0.0, False, 1.0, False, 0.5, "abs", 5),
        "B": ("none", 0.05, False, 1.0, True, 0.5, "abs", 5),
        "C": ("const", 0.05, False, 1.0, True, 0.5, "abs", 5),
        "D": ("david", 0.05, False, 1.0, True, 0.6, "excess", 5),
        "E": ("random", 0.05, False, 1.0, True, 0.6, "excess", 5),
        "S": ("shuffled", 0.05, False, 1.0, True, 0.6, "excess", 5),
        "F": ("david", 0.05, True, 1.0, True, 0.6, "excess", 7),
        "G": ("none", 0.0, False, 3.0, False, 0.5, "abs", 5),
    }
    assert ablate.ARMS.keys() == wanted.keys()
    for arm, values in wanted.items():
        own = ablate.arm_config(shared, arm, 4, (1.0, 2.0, 3.0, 2.0, 1.0) if arm == "C" else ())
        assert (
            tuple(getattr(own, f) for f in fields) == values
            and own.seed == 4
            and own.name == f"{arm}-4"
        )
        assert own.lambdas == ((1.0, 2.0, 3.0, 2.0, 1.0) if arm == "C" else ())


def test_mean_weights_count_images_and_not_lines(tmp_path):
    lines = [
        {"event": "train", "images": i, "blocks": {"mid": {"lambda": lam}}}
        for i, lam in ((160, 1.0), (320, 1.5), (336, 3.0))
    ]
    (tmp_path / "log.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in [{"event": "start", "images": 0}, *lines])
    )
    assert ablate.mean_lambdas(tmp_path) == pytest.approx(((160 + 240 + 48) / 336,))


def test_the_ablation_runs_reports_and_goes_on(home, tmp_path, user, monkeypatch):
    # Its runs are compared: no clock gives them different dtypes.
    monkeypatch.setattr(precision, "decide", None)
    flags = [
        "--teacher",
        home / "teacher.safetensors",
        "--assessor-file",
        home / "a.safetensors",
        "--arms",
        "B,C,D",
        "--seeds",
        "3",
        "--out",
        tmp_path,
        "--fd-images",
        8,
        "--fd-steps",
        1,
        *words(images=16, eval_every=8),
    ]
    code, out, err = user(ablate.main, *flags)
    assert code == 0, err
    report = json.loads((tmp_path / "ablation.json").read_text())
    assert (
        report["verdict"] == "open"
        and {c["arm"] for c in report["cards"]} == {"B", "C", "D"}
        and (tmp_path / "ablation.png").stat().st_size > 10_000
    )
    by = {c["arm"]: c for c in report["cards"]}
    mean = [sum(b["lambda"]) / len(b["lambda"]) for b in by["D"]["blocks"].values()]
    assert by["C"]["config"]["lambdas"] == pytest.approx(mean) and by["C"]["blocks"]["mid"][
        "lambda"
    ][0] == pytest.approx(mean[2], rel=1e-6)
    assert [len(c["held_out"]) for c in report["cards"]] == [2, 2, 2] and all(
        c["fd"] > 0 for c in report["cards"]
    )
    hold, device = report["references"], torch.device("cpu")
    ds = open_dataset("toyfaces:48", resolution=32, holdout=0.1)
    assert (
        hold["teacher"]
        == pytest.approx(eval_fid.distance(home / "teacher.safetensors", ds, 8, 1, device))
        and 0 < hold["floor"] < hold["teacher"]
    )
    assert (
        by["B"]["fd"]
        == pytest.approx(eval_fid.distance(tmp_path / "B-3", ds, 8, 1, device))
        != eval_fid.distance(tmp_path / "B-3", ds, 8, 1, device, seed=8)
    )
    assert "D and B share 1 of the 3 seeds" in (tmp_path / "ablation.txt").read_text()
    (tmp_path / "references.json").write_text(json.dumps({**hold, "floor": 7.5}))
    again = user(ablate.main, *flags)[1]
    assert (
        json.loads((tmp_path / "ablation.json").read_text())["references"]["floor"] == 7.5
    )  # taken from the file
    assert (
        again.count("finished:") == 3 and "loss" not in again.split("Assessor-weighted")[0]
    )  # nothing is run twice


def test_fd_by_inception_is_of_its_features(home, monkeypatch):
    """Wiring only, with a network that names mean colours; Inception itself is test_fid.py's."""
    colours = lambda images: images.float().mean((2, 3))
    monkeypatch.setattr(eval_fid, "load_inception", lambda device: colours)
    ds, device = open_dataset("toyfaces:48", resolution=32, holdout=0.1), torch.device("cpu")
    drawn = eval_fid.generate(home / "teacher.safetensors", 8, 2, device, "euler", seed=5)[0]
    wanted = frechet_from_features(colours(drawn), colours(ds.images(range(8))))
    assert (
        eval_fid.distance(
            home / "teacher.safetensors", ds, 8, 2, device, "euler", "inception", seed=5
        )
        == pytest.approx(wanted)
        and wanted > 1
    )


def test_bad_ablations_and_pretrainings(home, tmp_path, user, capsys):
    base = ["--teacher", home / "teacher.safetensors", "--out", tmp_path / "out"]
    for args, message in (
        (["--arms", "A,X"], "--arms X"),
        (["--arms", "C"], "C need D"),
        (["--arms", "D"], "need --assessor-file"),
        (["--seeds", "1,1"], "none twice"),
        (["--arms", "A", "--log-every", "0"], "made from the logs"),
        (["--arms", "A", "--fd-images", "1"], "--fd-images 1: wanted"),
        (["--arms", "A", "--seed", "1"], "--seed is what the arms"),
        (["--arms", "A", "--mode", "progressive"], "--mode is what the arms"),
        (["--arms", "A", "--block-weight", "0"], "all arms would be one"),
        (["--arms", "A", "--kd-weight", "0"], "all arms would be one"),
        (["--arms", "A,G", "--shift", "2"], "arm G is A with --shift 3"),
        (["--arms", "A", "--teacher", ""], "--teacher is required"),
        (["--arms", "A,B", "--alpha", "7"], "--alpha changes nothing here: none of the arms A,B"),
        (["--arms", "A,B", "--assessor-file", "x"], "--assessor-file changes"),
        (
            ["--arms", "A,D", "--assessor-file", home / "a.safetensors", "--importance"],
            "--importance changes nothing",
        ),
        (
            ["--arms", "A,D", "--assessor-file", home / "a.safetensors", "--alpha", "nan"],
            "--alpha nan",
        ),
    ):
        code, _, err = user(ablate.main, *base, *args)
        assert code == 2 and len(err) == 1 and message in err[0], err
    tensors_, card = read_tensors(home / "a.safetensors")
    write_tensors(
        home / "poor.safetensors", tensors_, {**card, "held_out": {"mean": 0.29, "chance": 0.1}}
    )
    code, _, err = user(
        ablate.main, *base, "--arms", "B,C,D", "--assessor-file", home / "poor.safetensors"
    )
    assert code == 2 and "below three times chance" in err[0]
    write_tensors(home / "foreign.safetensors", tensors_, {**card, "teacher": "0" * 64})
    code, _, err = user(
        ablate.main, *base, "--arms", "B,C,D", "--assessor-file", home / "foreign.safetensors"
    )
    assert code == 2 and "another teacher's features" in err[0]
    code, _, err = user(
        distill.main,
        "pretrain-assessor",
        "--teacher",
        home / "teacher.safetensors",
        "--out",
        home / "a.safetensors",
    )
    assert code == 2 and "exists, by other flags" in err[0]
    code, out, _ = user(
        distill.main,
        "pretrain-assessor",
        "--teacher",
        home / "teacher.safetensors",
        "--out",
        home / "a.safetensors",
        "--bins",
        10,
        "--patterns",
        3,
        "--dim",
        24,
        "--samples",
        1024,
        "--profile-samples",
        200,
        "--holdout",
        0.1,
        "--steps",
        200,
        "--batch",
        64,
        "--lr",
        1e-2,
    )
    assert code == 0 and "was made by this command" in out  # the fixture's
    code, _, err = user(
        distill.main,
        "--teacher",
        home / "teacher.safetensors",
        "--assessor",
        "david",
        "--assessor-file",
        home,
        "--dry-run",
    )
    assert code == 2 and "no assessor at" in err[0]
    code, _, err = user(
        distill.main,
        "pretrain-assessor",
        "--teacher",
        home / "teacher.safetensors",
        "--bins",
        "1",
        "--out",
        tmp_path / "b.safetensors",
    )
    assert code == 2 and "--bins 1" in err[0]
    code, _, err = user(
        distill.main,
        "pretrain-assessor",
        "--teacher",
        home / "teacher.safetensors",
        "--profile-samples",
        "99",
        "--out",
        tmp_path / "b.safetensors",
    )
    assert code == 2 and "--profile-samples 99: wanted 100" in err[0]
