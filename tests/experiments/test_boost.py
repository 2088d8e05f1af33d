"""The boosting experiment: its arms start where they say, its rule says what was fixed."""

import json
import math
from dataclasses import replace

import pytest
import torch

import train
from diffusion.boosting import Stage
from diffusion.guidance import guided
from diffusion.schedules import time_quantile
from experiments import boost
from experiments.boost import Faces, enlarge, features, verdicts
from experiments.report import Report
from harness.cli import parse
from objectives import make_objective


def test_an_arm_starts_where_it_says():
    g = torch.Generator().manual_seed(0)
    low, noise = torch.randn(2, 3, 4, 4, generator=g), torch.randn(2, 3, 4, 4, generator=g)
    for arm, share in boost.NOISE.items():
        start = make_objective("cfm", noise_aug=share).source(low, noise)
        wanted = math.sqrt(1 - share**2) * low + share * noise
        torch.testing.assert_close(start, wanted, rtol=0, atol=1e-6)
    assert torch.equal(make_objective("cfm", noise_aug=boost.NOISE["none"]).source(low, noise), low)
    assert torch.equal(
        make_objective("cfm", noise_aug=boost.NOISE["noise"]).source(low, noise), noise
    )


def test_regression_learns_at_the_end_of_the_path_alone():
    t = time_quantile(torch.linspace(1e-6, 1, 1001), "gaussian", 1, 1e-4)
    assert t.min() > 0.999 and t.max() <= 1


def test_one_euler_step_is_the_start_less_the_velocity_and_one_call():
    asked = []

    def net(x, t, **cond):
        asked.append(t)
        return 0.3 * x[:, :3] + 0.1

    objective = make_objective("cfm", noise_aug=0.0)
    stage = Stage(objective.source, guided(objective, net), lambda x: x, lambda z: z, 4)
    small = torch.rand(3, 3, 16, 16) * 2 - 1
    pixels, nfe = enlarge(stage, Faces(None, small, None), method="euler", steps=1)
    low = torch.nn.functional.interpolate(small, (64, 64), mode="bilinear", antialias=True)
    torch.testing.assert_close(pixels, low - (0.3 * low + 0.1), rtol=0, atol=1e-6)
    assert nfe == 1 and len(asked) == 1 and (asked[0] == 1000).all()


def test_features_are_means_of_squares():
    x = torch.arange(2 * 3 * 64 * 64).view(2, 3, 64, 64).double()
    found = features(x)
    assert found.shape == (2, 48)
    assert found[1, 17] == x[1, 1, :16, 16:32].mean()


def cards(**changes):
    """Three seeds: coupled best by FD at few evaluations, regression smooth, all equal at 40."""
    found = []
    for seed in range(3):
        wobble = 1 + 0.01 * seed
        for arm in boost.NETS:
            row = {"psnr": 20.0, "ssim": 0.8, "sharpness": 1.0, "patches": 0.1, "fd": 2.0}
            row |= {"noise": {"fd": 4.0}, "none": {"patches": 0.5}}.get(arm, {})
            if arm == "regression":
                row |= {"psnr": 25.0, "sharpness": 0.5, "patches": 0.6}
            row |= changes.get(arm, {})
            shaky = arm in ("coupled", "regression")
            row = {k: v * (wobble if shaky else 1) for k, v in row.items()}
            steps = (1,) if arm == "regression" else (1, 2, 4, 10, 40)
            rows = [{"method": "euler", "nfe": float(k), **row} for k in steps]
            if arm in ("coupled", "noise"):
                rows[-1]["fd"] = changes.get(f"{arm} at 40", 1.0) * wobble
            found.append({"arm": arm, "seed": seed, "rows": rows})
    return found


def words(found, floor=0.1):
    return [verdict.word for verdict in verdicts(found, floor)]


def test_the_rule():
    assert words(cards()) == ["suggested"] * 4
    assert words(cards(coupled={"fd": 8.0}))[0] == "against"
    assert words(cards(coupled={"patches": 0.9}))[1:3] == ["against", "against"]
    assert words(cards(none={"psnr": 26.0}))[2] == "not shown"
    assert words(cards(regression={"sharpness": 0.95}))[2] == "not shown"
    assert words(cards(**{"coupled at 40": 3.0}))[3] == "against"
    assert words(cards(**{"coupled at 40": 0.2}))[3] == "against"
    assert words(cards(**{"coupled at 40": 1.1}), floor=0.102)[3] == "not shown"
    two = [card for card in cards() if card["seed"] < 2]
    assert words(two) == ["open: fewer than three seeds"] * 4


def test_the_rule_of_cascaded_diffusion():
    def beside(**patches):
        found = cards()
        for seed in range(3):
            for arm in boost.DIFFUSION:
                low = {4: 0.2, 10: 0.2} | patches.get(arm, {})
                rows = [
                    {"method": "euler", "nfe": float(k), "patches": low[k] * (1 + 0.02 * seed)}
                    for k in (4, 10)
                ]
                found.append({"arm": arm, "seed": seed, "rows": rows})
        return words(found)

    assert beside() == ["suggested"] * 5
    assert beside(eps={4: 0.05, 10: 0.05}, v={4: 0.05, 10: 0.05})[4] == "against"
    assert beside(v={10: 0.1})[4] == "not shown"
    assert beside(v={4: 0.1})[4] == "not shown"


def test_a_card_is_kept_for_its_size_and_made_anew_for_another(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(boost, "train", lambda *args: made.append(args) or tmp_path)
    monkeypatch.setattr(boost, "open_run", lambda run, small: (small, None))
    monkeypatch.setattr(boost, "enlarge", lambda stage, faces, **how: (stage, 1.0))
    monkeypatch.setattr(boost, "measured", lambda faces, pixels, nfe: {"small": pixels})
    size = boost.SIZES["dry"]
    first = boost.card_of(size, None, "eps", 0, tmp_path)
    assert boost.card_of(size, None, "eps", 0, tmp_path)["rows"] == first["rows"]
    assert len(made) == 1 and first["rows"][0]["small"] == 16
    again = boost.card_of(size._replace(side=128), None, "eps", 0, tmp_path)
    assert len(made) == 2 and again["rows"][0]["small"] == 32


RESULTS = {"cpu": "boost", "twice": "boost-twice", "robohash": "boost-robohash"}


def committed(size):
    """(folder, cards) of a size's results; skips, if there are none."""
    folder = boost.ROOT / "benchmarks" / "results" / RESULTS[size]
    if not (folder / "cards").is_dir():
        pytest.skip("no results are committed")
    found = [json.loads(p.read_text()) for p in sorted((folder / "cards").glob("*-*.json"))]
    assert found
    return folder, found


@pytest.mark.parametrize("size", RESULTS)
def test_committed_cards_are_of_the_size_that_is_run_today(size):
    _, found = committed(size)
    assert all(card["asked"] == boost.asked_of(boost.SIZES[size]) for card in found)
    assert {card["arm"] for card in found} == set(boost.SIZES[size].arms)


@pytest.mark.parametrize("arm, target, table", [("eps", "eps", "linear"), ("v", "v", "cosine")])
def test_diffusion_s_arms_differ_from_noise_in_what_they_say_alone(
    tmp_path, monkeypatch, arm, target, table
):
    def objective(arm):
        asked = []
        monkeypatch.setattr(boost.subprocess, "run", lambda words, check: asked.extend(words[2:]))
        boost.train(boost.SIZES["dry"], arm, 0, tmp_path)
        return train.objective_of(train.resolve(parse(train.Config, "", asked)[0]))

    assert objective(arm) == replace(objective("noise"), target=target, table=table)


@pytest.mark.parametrize("size", RESULTS)
def test_the_committed_report_is_of_the_committed_cards(size):
    folder, found = committed(size)
    said = json.loads((folder / "verdict.json").read_text())
    assert said["config"]["size"] == size
    assert sorted(said["config"]["seeds"]) == sorted({card["seed"] for card in found})
    plain = json.loads((folder / "cards" / "plain.json").read_text())
    text = (folder / "report.md").read_text()
    for verdict in verdicts(found, plain["floor"]["fd"]):
        assert f"{verdict.name}: {verdict.word}." in text
        assert verdict._asdict() in said["verdicts"]


def test_a_command_leaves_verdicts_without_its_place_and_a_report(tmp_path, user):
    def answered(cfg, out):
        assert (out / "cards").is_dir() and cfg.seeds == (4,)
        return [boost.Verdict("A1", "against", "because")], Report("Of nothing", ["A1."], [])

    place = tmp_path / "o"
    code, out, err = user(
        lambda: boost.command(boost.Config, "", answered), "--seeds", 4, "--out", place
    )
    assert code == 0 and out.splitlines()[-1] == str(place / "report.html"), err
    said = json.loads((place / "verdict.json").read_text())
    assert said["config"] == {"size": "cpu", "seeds": [4]}
    assert said["verdicts"] == [{"name": "A1", "word": "against", "why": "because"}]
    assert "Of nothing" in (place / "report.md").read_text()
    assert str(tmp_path) not in (place / "verdict.json").read_text()
    words = ["--seeds", 4, "--out", tmp_path / "dry", "--dry-run"]
    code, out, _ = user(lambda: boost.command(boost.Config, "", answered), *words)
    assert code == 0 and json.loads(out)["seeds"] == [4] and not (tmp_path / "dry").exists()
