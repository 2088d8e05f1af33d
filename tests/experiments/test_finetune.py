"""The fine-tuning experiment: its arms are trained as they say, its rule says what was fixed."""

import json
import math
from pathlib import Path

import pytest

import train
from experiments import finetune
from experiments.finetune import Run, best_rates, chosen, verdicts, way, words_of
from harness.cli import parse


def config_of(run, tmp_path, monkeypatch):
    words = words_of(finetune.SIZES["cpu"], run, tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    return train.resolve(parse(train.Config, train.__doc__)[0])


def test_arms_differ_in_their_objective_alone(tmp_path, monkeypatch):
    cfgs = {
        arm: config_of(Run(arm, 3, 0.001), tmp_path, monkeypatch) for arm in (*finetune.ARMS,)
    }
    told = {"objective", "table", "aligned", "density", "name"}
    first = cfgs["eps"]
    for cfg in cfgs.values():
        same = {k: v for k, v in vars(cfg).items() if k not in told}
        assert same == {k: v for k, v in vars(first).items() if k not in told}
        assert cfg.init == str(tmp_path / "base-1000") and cfg.stage == "stage2" and cfg.lr == 0.001
    flow, aligned = (train.objective_of(cfgs[arm]) for arm in ("native", "aligned"))
    assert (flow.target, flow.table) == ("u", "")
    assert (aligned.target, aligned.table, aligned.aligned) == ("eps", "scaled_linear", True)
    assert flow.density == aligned.density == "logit_normal"
    base = config_of(finetune.BASE, tmp_path, monkeypatch)
    assert train.objective_of(base) == train.objective_of(first)
    assert base.stage == "fine" and base.exclude_tags == first.exclude_tags


def cards(**changes):
    """Three seeds and two rates: aligned best, then native, then eps; the second rate is worse."""
    found = []
    values = {"native": 2.0, "aligned": 1.0, "eps": 3.0}
    for seed in range(3):
        for arm, value in values.items():
            for rate in (0.001, 0.002):
                row = {"loss": value, "fd": value, "way": value} | changes.get(arm, {})
                worse = rate / 0.001
                wobble = 1 + 0.01 * seed * (arm != "eps")
                ends = {"images": 200, "loss": row["loss"] * worse * wobble}
                begun = {"images": 100, "loss": row["way"] * worse * wobble}
                fd = {"heun-8": {"fd": row["fd"] * wobble}, "other": {"fd": 100.0}}
                card = {"arm": arm, "seed": seed, "rate": rate, "curve": [begun, ends], "fd": fd}
                found.append(card)
    return found


def words(found):
    return [verdict.word for verdict in verdicts(chosen(found))]


def test_the_rule():
    assert words(cards()) == ["suggested"] * 4
    assert words(cards(aligned={"loss": 2.5, "fd": 2.5, "way": 2.5})) == [
        "against", "against", "suggested", "suggested",
    ]  # fmt: skip
    late = ["suggested", "against", "suggested", "suggested"]
    assert words(cards(aligned={"way": 4.0})) == late
    assert words(cards(aligned={"fd": 2.5}))[0] == "not shown"
    assert words(cards(aligned={"fd": 3.5}))[2] == "against"
    assert words(cards(native={"fd": 3.5}))[3] == "against"
    assert words(cards(native={"fd": 2.97}))[3] == "not shown"
    two = [card for card in cards() if card["seed"] < 2]
    assert words(two) == ["open: fewer than three seeds"] * 4


def test_an_arm_has_its_own_best_rate():
    found = cards()
    for card in found:
        if card["arm"] == "native":
            card["rate"] = 0.003 - card["rate"]
    assert best_rates(found) == {"native": 0.002, "aligned": 0.001, "eps": 0.001}
    assert len(chosen(found)) == 9


def test_the_way_counts_every_doubling_alike():
    rows = [{"images": 100, "loss": 4.0}, {"images": 200, "loss": 2.0}, {"images": 800, "loss": 1}]
    expected = (math.log(2) * 3 + math.log(4) * 1.5) / math.log(8)
    assert way({"curve": rows}) == pytest.approx(expected, rel=1e-12)


def test_the_committed_report_is_of_the_committed_cards():
    folder = Path(__file__).parents[2] / "benchmarks" / "results" / "finetune"
    if not (folder / "cards").is_dir():
        pytest.skip("no results are committed")
    found = [json.loads(path.read_text()) for path in sorted((folder / "cards").glob("*.json"))]
    assert {card["arm"] for card in found} == {"base", *finetune.ARMS}
    text = (folder / "report.md").read_text()
    for verdict in verdicts(chosen(found)):
        assert f"{verdict.name}: {verdict.word}. {verdict.why}." in text
