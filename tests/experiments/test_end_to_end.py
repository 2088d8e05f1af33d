"""Two networks against one: equal arithmetic, the same pictures in any batch, a rule kept."""

import json
from pathlib import Path
from types import SimpleNamespace

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


@pytest.fixture
def drawn(monkeypatch):
    """Runs that are not trained, and pictures that say by how many steps they were drawn."""
    made = []

    def pixels_of(run, steps, n):
        return torch.full((n, 3, 64 if run == "single" else 32, 8), steps / 1000)

    def enlarge(run, small, steps):
        assert run == "enlarger" and small.shape[2] == 32
        return torch.full((len(small), 3, 64, 8), float(small[0, 0, 0, 0]) + steps)

    def measured(real, pixels):
        assert len(pixels) == SIZES["dry"].n and pixels.shape[2] == 64
        return {"fd": float(pixels.mean())}

    monkeypatch.setattr(end_to_end, "train", lambda *said: made.append(said) or dict(NAMES))
    monkeypatch.setattr(end_to_end, "pixels_of", pixels_of)
    monkeypatch.setattr(end_to_end, "enlarge", enlarge)
    monkeypatch.setattr(end_to_end, "measured", measured)
    return made


NAMES = {name: name for name in ("base", "enlarger", "single")}


def test_cards_are_of_each_network_s_own_steps_and_are_kept(drawn, tmp_path):
    size = SIZES["dry"]
    pair, single = end_to_end.cards_of(size, None, 3, tmp_path)
    assert (pair["arm"], single["arm"], pair["seed"], len(drawn)) == ("pair", "single", 3, 1)
    for budget, row, other in zip(size.budgets, pair["rows"], single["rows"], strict=True):
        steps = steps_of(budget, flops(size.model))
        assert (row["budget"], row["steps"]) == (budget, [steps.base, steps.enlarger])
        assert row["fd"] == pytest.approx(steps.base / 1000 + steps.enlarger, rel=1e-4)
        assert row["resized"]["fd"] == pytest.approx(steps.base / 1000, rel=1e-4)
        assert other["fd"] == pytest.approx(budget / 1000, rel=1e-4)
        assert row["flops"] <= other["flops"]
    assert pair["training flops"] <= single["training flops"]
    assert end_to_end.cards_of(size, None, 3, tmp_path) == [pair, single] and len(drawn) == 1
    end_to_end.cards_of(size._replace(faces=8), None, 3, tmp_path)
    assert len(drawn) == 2


def test_networks_of_a_seed_see_the_same_data_and_each_its_own_number_of_images(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        end_to_end, "trained", lambda folder, words: asked.update({folder.name: words})
    )
    end_to_end.train(SIZES["cpu"], 2, ROOT)
    seen, found = images_of(4_000, flops("tiny")), {}
    for name in NAMES:
        words = list(map(str, asked[f"{name}-2"]))
        flags = found[name] = dict(zip(words[::2], words[1::2], strict=True))
        assert int(flags.pop("--images")) == getattr(seen, name)
        assert flags["--seed"] == "2" and flags["--data"] == "toyfaces:4096"
    assert found["single"] == found["base"] | {"--resolution": "64"}
    assert found["enlarger"] == found["single"] | {"--objective": "cfm", "--lowres": "2"}


def test_each_picture_is_enlarged_by_its_own_noise(monkeypatch):
    said = []

    def boost(stages, small, seeds, **how):
        said.append((stages, how))
        return SimpleNamespace(pixels=small * 10 + torch.tensor(seeds))

    monkeypatch.setattr(end_to_end, "BATCH", 4)
    monkeypatch.setattr(end_to_end, "open_stage", lambda *asked: (asked[0], None))
    monkeypatch.setattr(end_to_end, "boost", boost)
    found = end_to_end.enlarge(Path("run"), torch.arange(10), 7)
    assert found.tolist() == [11 * i for i in range(10)]
    assert said == [(["run"], {"method": "euler", "steps": 7})] * 3


def test_real_images_are_compared_with_others(monkeypatch):
    asked = []
    monkeypatch.setattr(
        end_to_end, "frechet_from_features", lambda *both: asked.append(both) or 1.0
    )
    monkeypatch.setattr(end_to_end, "crops", lambda images: images)
    real = end_to_end.Real(None, torch.arange(100), torch.arange(20))
    end_to_end.floors(SIZES["dry"], real)
    for one, other in asked:
        whole = 100 if len(one) == SIZES["dry"].n else 20
        assert sorted([*one.tolist(), *other.tolist()]) == list(range(whole))
    assert [len(one) for one, _ in asked] in ([32, 10], [10, 32])


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
