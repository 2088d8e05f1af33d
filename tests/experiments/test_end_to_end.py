"""Two networks against one: equal arithmetic, the same pictures in any batch, a rule kept."""

import json

import pytest
import torch

from data.dataset import open_dataset
from data.images import to_float
from experiments import end_to_end
from experiments.boost import ROOT
from experiments.costs import flops_of
from experiments.end_to_end import SIZES, batches, flops, images_of, measured, steps_of, verdicts
from model import PRESETS
from objectives import make_objective
from training.start import network_config
from vae import fit_pca

COST = flops("nano")


def test_costs_are_those_of_the_networks_that_train_py_builds():
    vae = fit_pca(torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    built = (("base", "fm", 32), ("enlarger", "cfm", 64), ("single", "fm", 64))
    for name, objective, side in built:
        cfg = network_config(PRESETS["nano"], "nano", vae, make_objective(objective), side, 0)
        assert getattr(COST, name) == flops_of(cfg, side // 8)


@pytest.mark.parametrize("model", ["nano", "tiny"])
def test_the_pair_never_costs_more_and_each_of_it_about_half(model):
    cost = flops(model)
    for images in (4_000, 12_345):
        seen = images_of(images, cost)
        for mine, each in zip(seen[:2], cost):
            assert 0.98 < mine * each / (seen.single * cost.single / 2) <= 1 and mine % 16 == 0
        assert seen.single == images // 16 * 16
    for budget in (4, 10, 20):
        steps = steps_of(budget, cost)
        enlarger = steps.enlarger * cost.enlarger
        whole = steps.base * cost.base + enlarger
        assert 0.9 < whole / (budget * cost.single) <= 1 and steps.single == budget
        assert 0.4 < enlarger / (budget * cost.single) < 0.6


def test_seeds_go_on_from_batch_to_batch(monkeypatch):
    monkeypatch.setattr(end_to_end, "BATCH", 4)
    assert batches(10) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_real_images_are_those_of_training_and_the_others_and_are_no_distance_from_themselves():
    real = end_to_end.open_real(SIZES["dry"])
    ds = open_dataset("toyfaces:400", resolution=64, holdout=0.5)
    seen, held = (to_float(part.images(range(len(part)))) for part in (ds, ds.heldout))
    torch.testing.assert_close(real.held, held.add(1) / 2, rtol=0, atol=1e-6)
    torch.testing.assert_close(real.features(seen), real.seen, rtol=0, atol=1e-5)
    same, other = measured(real, seen), measured(real, held)
    assert same["fd"] < 1e-6 * other["fd"] and same["patches"] > 0
    assert other["patches"] < 1e-9 and abs(other["sharpness"] - 1) < 1e-6


def cards(pair, seeds=(0, 1, 2)):
    found = []
    for seed in seeds:
        for arm in ("pair", "single"):
            own = pair if arm == "pair" else {}
            row = {"fd": 2.0, "patches": 0.1} | own
            rows = [{"budget": k, **{m: x * (1 + 0.01 * seed * (arm == "pair"))
                     for m, x in row.items()}} for k in (4, 10)]  # fmt: skip
            found.append({"arm": arm, "seed": seed, "rows": rows})
    return found


def test_the_rule():
    def words(found):
        return [verdict.word for verdict in verdicts(found, (4, 10))]

    assert words(cards({"fd": 1.0, "patches": 0.2})) == ["suggested", "against"]
    assert words(cards({"fd": 4.0, "patches": 0.05})) == ["against", "suggested"]
    mixed = cards({"fd": 1.0})
    for card in mixed:
        if card["arm"] == "pair":
            card["rows"][1]["fd"] *= 4
    assert words(mixed)[0] == "not shown"
    assert words(cards({"fd": 1.0}, (0, 1))) == ["open: fewer than three seeds"] * 2


def test_the_committed_report_is_of_the_committed_cards():
    folder = ROOT / "benchmarks" / "results" / "end-to-end"
    if not (folder / "cards").is_dir():
        pytest.skip("no results are committed")
    assert json.loads((folder / "verdict.json").read_text())["verdicts"]
    found = [json.loads(p.read_text()) for p in sorted((folder / "cards").glob("*-*.json"))]
    text = (folder / "report.md").read_text()
    for verdict in verdicts(found, SIZES["cpu"].budgets):
        assert f"{verdict.name}: {verdict.word}. {verdict.why}." in text
    assert all(card["asked"] == json.loads(json.dumps(SIZES["cpu"])) for card in found)
