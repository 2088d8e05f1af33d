"""Flow matching against DDPM: verdicts and pages of cards that are known, measures against closed
forms, and the whole of it in miniature."""

import csv
import json
import math
import random
import re
import shutil
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from conftest import ROOT
import experiments.cards as cards_py
from experiments import answers, compare, costs, hypotheses, measures, page, parts, report
from experiments.arms import PLANS, read_arms
from experiments.hypotheses import endpoints, sort_cards, verdicts
from harness.cli import UserError
from harness.run import checkpoints
from metrics.distances import frechet_from_features, precision_recall
from objectives import make_objective
from test_own_json import LOST, WRONG, places
from test_own_json import changed as changed_at
from specimen_cards import all_cards, rates_card, references_card, run_card

CONTROL = PLANS["cpu"].control_seed


def sorted_cards(*args, **kwargs):
    return sort_cards(all_cards(*args, **kwargs), CONTROL)


def words(cards) -> dict[str, str]:
    return {each.key: each.word for each in verdicts(endpoints(cards))}


# ---- verdicts ------------------------------------------------------------------------------------


def arms_of(skill_of_f, seeds=(0, 1, 2, 3, 4), spread=1.3):
    """Standard runs of D and F of a skill."""
    cards = [references_card()]
    for seed in seeds:
        cards.append(run_card("D", seed, "standard"))
        cards.append(run_card("F", seed, "standard", skill=skill_of_f))
        cards += [rates_card("D", seed, 1.1), rates_card("F", seed, spread)]
    return sort_cards(cards, CONTROL)


@pytest.mark.parametrize(
    "skill, seeds, word",
    [
        (1.25, 5, "supported"),
        (1.25, 3, "suggested"),
        (1.25, 2, "open"),
        (1.0, 5, "equivalent"),
        (0.8, 5, "contradicted"),
        (0.8, 4, "the opposite is suggested"),
    ],
)
def test_the_word_is_the_rules(skill, seeds, word):
    assert words(arms_of(skill, tuple(range(seeds))))["H1"] == word


def test_a_difference_within_the_noise_is_open():
    cards = arms_of(1.06)
    runs = [card for key, card in cards.runs.items() if key[0] == "F"]
    for card, factor in zip(runs, (0.8, 1.2, 0.9, 1.1, 1.0)):
        for found in card["sets"]:
            found["all"]["fd"] *= factor
    each = verdicts(endpoints(cards))[0]
    assert each.word == "open" and "would have been visible" in each.sentence


def test_an_arm_against_itself_is_null_in_all():
    cards = sorted_cards()
    for each in endpoints(cards, "F", "F"):
        assert each.pairs.n == 5 and set(each.pairs.by_seed.values()) == {0.0}
        assert all(guard.value == 0 for guard in each.guards)


def test_swapped_arms_flip_every_sign():
    cards = sorted_cards()
    for one, other in zip(endpoints(cards, "F", "D"), endpoints(cards, "D", "F")):
        assert other.pairs.mean == -one.pairs.mean and one.pairs.mean != 0
        for here, there in zip(one.guards, other.guards):
            assert there.value == -here.value


def test_a_guard_stops_a_verdict():
    reversed_kernel = arms_of(1.25)
    for (arm, *_), card in reversed_kernel.runs.items():
        for found in card["sets"]:
            found["all"]["kd"] = {"F": 2.0, "D": 1.0}[arm]
    each = verdicts(endpoints(reversed_kernel))[0]
    assert each.word == "open" and "kernel distance" in each.sentence
    # The spread over learning rates of D is larger than F's.
    assert words(arms_of(1.25, spread=1.3))["H3"] == "supported"
    assert words(arms_of(1.25, spread=1.01))["H3"] == "open"


def test_a_guard_that_was_not_measured_does_not_hold():
    cards = arms_of(1.25)
    each = verdicts(endpoints(replace(cards, rates={})))[2]
    assert each.word == "open" and "was not measured" in each.sentence


def test_a_missing_seed_is_dropped():
    cards = [card for card in all_cards() if (card.get("arm"), card.get("seed")) != ("D", 1)]
    cards = sort_cards(cards, CONTROL)
    first = endpoints(cards)[0]
    assert sorted(first.pairs.by_seed) == [0, 2, 3, 4] and 1 in first.pairs.dropped
    text = "\n".join(report.markdown(page.build(cards, compare.RULE, ROOT / "none")))
    assert "seed 1" in text and words(cards)["H1"] == "suggested"


def test_the_area_of_stage2_is_a_share_of_the_gap():
    # Two straight curves in log images from the same base: the floor cancels.
    def card(arm, fds):
        made = run_card(arm, 0, "stage2")
        for found, fd in zip(made["sets"], fds):
            found["excluded"]["fd"] = fd
        return made

    base = [run_card(arm, 0, "fine") for arm in "DF"]
    for made in base:
        made["sets"][-1]["excluded"]["fd"] = 22.0
    cards = [references_card(), *base, card("D", [12.0] * 4), card("F", [7.0] * 4)]
    each = endpoints(sort_cards(cards, CONTROL))[1]
    assert each.pairs.by_seed[0] == pytest.approx(math.log((7 - 2) / (12 - 2)))
    # A floor that a curve is below of is none.
    cards[-1] = card("F", [12.0, 6.0, 1.0, 1.0])
    assert hypotheses.subset_floor(sort_cards(cards, CONTROL), ("F", "D")) == 0.0


def test_recall_is_held_against_recall_at_equal_precision():
    def card(arm, pairs):
        made = run_card(arm, 0, "standard")
        for found, (precision, recall) in zip(hypotheses.swept(made), pairs):
            found["all"] |= {"precision": precision, "recall": recall}
        return made

    low = card("D", [(0.3, 0.9), (0.4, 0.8), (0.5, 0.7), (0.55, 0.6), (0.6, 0.5)])
    high = card("F", [(0.5, 0.8), (0.6, 0.6), (0.7, 0.4), (0.8, 0.3), (0.9, 0.2)])
    each = endpoints(sort_cards([references_card(), low, high], CONTROL))[2]
    assert each.pairs.by_seed[0] == pytest.approx(math.log(0.6 / 0.5))


# ---- pages ---------------------------------------------------------------------------------------


def written(cards, out) -> dict[str, bytes]:
    report.write(page.build(sort_cards(cards, CONTROL), compare.RULE, out / "none"), out)
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.*")}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """A whole report, by name."""
    return written(all_cards(seeds=(0, 1, 2)), tmp_path_factory.mktemp("report"))


def test_a_report_that_was_completed_later_is_the_same_bitwise(files, tmp_path):
    cards = all_cards(seeds=(0, 1, 2))
    early = [card for card in cards if card.get("seed") != 2]
    assert written(early, tmp_path) != files
    assert written(cards, tmp_path) == files


def test_the_page_stands_alone(files):
    text = files["report.html"].decode()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', text)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in text and "http" not in text and 'name="viewport"' in text
    charts = {name for name in files if name.endswith(".csv")}
    assert len(charts) >= 7
    for name in charts:
        assert files[name.replace(".csv", ".png")].startswith(b"\x89PNG")


def test_what_is_drawn_stands_in_the_csv(files):
    lines = files["figures/fd-over-evaluations-standard.csv"].decode().splitlines()
    mine = [float(row["FD"]) for row in csv.DictReader(lines) if row["series"] == "F"]
    cards = sort_cards(all_cards(seeds=(0, 1, 2)), CONTROL)
    sweeps = [hypotheses.swept(card) for card in cards.of("F", "standard").values()]
    means = [np.mean([each["all"]["fd"] for each in column]) for column in zip(*sweeps)]
    assert mine == pytest.approx(means)


def test_a_part_of_a_comparison_has_its_page(tmp_path):
    for stages in (("standard",), ("fine", "stage2"), ("fine",)):
        cards = [each for each in all_cards() if each.get("stage", stages[0]) in stages]
        cards = sort_cards(cards, CONTROL)
        report.write(page.build(cards, compare.RULE, tmp_path), tmp_path)
        found = answers.summary(cards)["tests"]
        open_ones = {each["key"] for each in found if each["word"] == "open"}
        assert ("H1" in open_ones) == ("standard" not in stages)
        assert ("H2" in open_ones) == ("stage2" not in stages)


def test_words_of_strangers_are_no_markup(tmp_path):
    table = report.Table(["<b>"], [["<script>"]])
    chart = report.Chart("c", '"><img>', [report.Panel("t", "x", "y", [])])
    content = report.Report("<i>", ["<u>"], [report.Section("<h1>", ["<p>"], [table], [chart])])
    report.write(content, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "<script>" not in text and "<i>" not in text and "<u>" not in text
    assert "<img>" not in text


def test_the_rule_is_in_the_report():
    text = "\n".join(report.markdown(page.build(sorted_cards(), compare.RULE, ROOT / "none")))
    assert " ".join(compare.RULE.split())[:200] in " ".join(text.split())


def changed(**how):
    cards = all_cards(seeds=(0, 1))
    card = cards[-1]
    card["asked"] = {**card["asked"], **how.pop("asked", {})}
    card.update(how)
    return cards


@pytest.mark.parametrize(
    "how, names",
    [
        ({"asked": {"n": 100}}, "n is"),
        ({"data_hash": "other"}, "data_hash"),
        ({"vae": "other"}, "latents"),
        ({"asked": {"train": {"resolution": 32}}}, "resolution"),
        ({"asked": {"points": [1]}}, "points"),
    ],
)
def test_cards_that_do_not_belong_together_are_refused(how, names):
    with pytest.raises(UserError, match="do not belong together") as refused:
        sort_cards(changed(**how), CONTROL)
    assert names in str(refused.value)


# ---- measures ------------------------------------------------------------------------------------


MEAN, SD = 0.7, 0.3


class Exact:
    """The best that any network can say of data from N(MEAN, SD²), by each objective's own words:
    E[x0 | x] is linear."""

    def __init__(self, objective):
        self.objective = objective

    def __call__(self, x, row, **cond):
        t = self.times(row).view(-1, 1, 1, 1)
        if self.objective.table:
            x = x * ((1 - t) ** 2 + t**2).sqrt()
        variance = (1 - t) ** 2 * SD**2 + t**2
        x0 = MEAN + (1 - t) * SD**2 / variance * (x - (1 - t) * MEAN)
        eps = (x - (1 - t) * x0) / t
        return self.objective.goal(x0, eps, t)

    def times(self, row):
        """The t whose row it is: those of the held-out loss."""
        t = (torch.arange(8) + 0.5) / 8
        rows = self.objective.row(t).float()
        return t[(row.view(-1, 1) - rows).abs().argmin(1)]


@pytest.mark.parametrize("name", ["ddpm", "v", "x0", "fm"])
def test_the_loss_in_u_is_the_closed_form_whatever_is_predicted(name):
    objective = make_objective(name)
    n = 4_096
    draw = torch.Generator().manual_seed(0)
    t = ((torch.arange(8) + 0.5) / 8).repeat(n // 8)
    x0 = MEAN + SD * torch.randn(n, 2, 4, 4, generator=draw)
    eps = torch.randn(x0.shape, generator=draw)
    batch = {"raw": x0, "eps": eps, "t": t}

    def by_t(objective):
        predict = partial(objective.predict, Exact(objective))
        loss = measures.u_loss(predict, SimpleNamespace(from_raw=lambda raw: raw))(batch)
        return [float(loss.per_sample[k::8].double().mean()) for k in range(8)]

    times = (torch.arange(8) + 0.5) / 8
    exact = (SD**2 / ((1 - times) ** 2 * SD**2 + times**2)).tolist()
    found = by_t(objective)
    assert found == pytest.approx(exact, rel=0.02)
    # On the same draws all predictions are one: what is left is fp32.
    assert found == pytest.approx(by_t(make_objective("fm")), rel=1e-6)


LOGGED = {
    "ddpm": {},
    "v": {},
    "x0": {},
    "fm": {},
    # Ends at t = 0.936, before the last of the eight times.
    "Stable Diffusion's table": {"name": "ddpm", "table": "scaled_linear"},
    "aligned": {"name": "ddpm", "table": "scaled_linear", "aligned": True},
}


@pytest.mark.parametrize("name", LOGGED)
def test_a_logged_loss_becomes_the_loss_in_u(name):
    objective = make_objective(**{"name": name, **LOGGED[name]})
    draw = torch.Generator().manual_seed(0)
    t = (torch.arange(8) + 0.5) / 8
    x0, eps, out = (torch.randn(8, 2, 64, 64, generator=draw).double() for _ in range(3))
    net = lambda x, row: out.float()  # noqa: E731
    logged = objective.loss(net, x0, eps=eps, t=t).per_sample.tolist()
    w = t.double().view(-1, 1, 1, 1)
    u = objective.predict(net, (1 - w) * x0 + w * eps, t)[2]
    wanted = (u - (eps - x0)).square().flatten(1).mean(1)
    found = measures.in_u(logged, objective)
    assert found[:7] == pytest.approx(wanted[:7].tolist(), rel=1e-5)
    # Beyond the table's end x0 has a small share in it, too.
    beyond = objective.t_max < t[7]
    assert found[7] == pytest.approx(float(wanted[7]), rel=2e-3 if beyond else 1e-5)


def test_a_reader_reads_tags_it_never_saw_an_image_of():
    draw = torch.Generator().manual_seed(0)
    truth = torch.rand(600, 3, generator=draw) < 0.3
    ways = torch.randn(3, 20, generator=draw)
    features = truth.double() @ ways.double() + 0.1 * torch.randn(600, 20, generator=draw)
    truth = torch.cat([truth, torch.zeros(600, 1, dtype=torch.bool)], 1)
    reader = measures.fit_reader(features[:400], truth[:400], ("a", "b", "c", "never"))
    assert (reader.shows(features[400:]) == truth[400:]).double().mean() > 0.99
    assert not reader.shows(features)[:, 3].any()


def test_a_reader_errs_as_often_in_either_way():
    draw = torch.Generator().manual_seed(0)
    truth = torch.rand(4_000, 3, generator=draw) < 0.2
    ways = torch.randn(3, 20, generator=draw)
    features = truth.double() @ ways.double() + 1.5 * torch.randn(4_000, 20, generator=draw)
    reader = measures.fit_reader(features[:2_000], truth[:2_000], ("a", "b", "c"))
    shown, truth = reader.shows(features[2_000:]), truth[2_000:]
    seen, missed = shown[~truth].double().mean(), (~shown[truth]).double().mean()
    assert 0.05 < seen < 0.1 and abs(seen - missed) < 0.015


def test_sharpness_is_known_of_stripes_and_of_nothing():
    stripes = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    stripes[..., ::2] = 255
    assert measures.sharpness(stripes) == 1.0
    assert measures.sharpness(torch.full((2, 3, 8, 8), 9, dtype=torch.uint8)) == 0.0


# ---- the command ---------------------------------------------------------------------------------


def arguments(out, *more):
    return ["--size", "dry", "--objectives", "D,F", "--seeds", "0", "--out", out, *more]


@pytest.mark.parametrize(
    "words, line",
    [
        (["--objectives", "fm,dppm"], "Closest: ddpm"),
        (["--objectives", "F"], "two arms or more"),
        (["--objectives", "F,fm"], "twice"),
        (["--objectives", "F,mine=--lr 1"], "the same in all arms"),
        (["--objectives", "F,mine=--objektive fm"], "unknown flag --objektive"),
        (["--seeds", "1,1"], "names one twice"),
        (["--stages", "standard,stage2"], "stage2 starts from fine"),
        (["--stages", "standart"], "wanted some of"),
        (["--images", "100"], "three numbers"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--size", "gpu"], "--data"),
    ],
)
def test_what_cannot_be_compared_is_one_line(user, tmp_path, words, line):
    code, _, errors = user(compare.main, *arguments(tmp_path / "out"), *words)
    assert code == 2 and len(errors) == 1 and line in errors[0], errors
    assert not (tmp_path / "out" / "cards").exists()


def test_an_arm_of_ones_own_has_its_flags():
    arms = read_arms(("ddpm", "mine=--objective fm --shift 3"))
    assert arms == {"D": {"objective": "ddpm"}, "mine": {"objective": "fm", "shift": 3.0}}


def test_arms_differ_in_their_own_flags_alone(tmp_path):
    cfg = compare.Config(size="cpu", out=str(tmp_path))
    bench = compare.bench_of(cfg)
    for arm in bench.arms:
        bench.chosen[arm] = (2e-3, bench.plan.curve)
    one, *others = [
        asdict(bench.config(parts.Part(arm, 3, "standard"))) for arm in ("F", "D", "V")
    ]
    for other in others:
        differs = {key for key in one if one[key] != other[key]}
        assert differs == {"objective", "name"}
    assert one["decay"] == "constant" and one["seed"] == 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A whole comparison in miniature."""
    out = tmp_path_factory.mktemp("compare")
    cfg = compare.Config(size="dry", objectives=("D", "F"), seeds=(0,), out=str(out))
    bench = compare.bench_of(cfg)
    compare.carry_out(cfg, bench)
    compare.report(out, bench.plan.control_seed)
    return out, bench


def cards_in(out) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (out / "cards").glob("*.json")}


def test_the_whole_of_it_leaves_a_page_and_cards(made):
    out, _ = made
    names = set(cards_in(out))
    assert {"references", "tuning-D", "tuning-F", "rates-D-0", "rates-F-0"} <= names
    assert {f"{arm}-0-{stage}" for arm in "DF" for stage in train_stages()} <= names
    assert {"F-on-D-0-stage2", "D-on-F-0-stage2", "F-2000-standard"} <= names
    text = (out / "report.html").read_text()
    assert "OPEN (1 of the 3 seeds" in text and "data:image/png" in text


def train_stages():
    return ("standard", "fine", "stage2")


def test_what_is_finished_is_never_run_again(made, monkeypatch):
    out, bench = made
    before = {path: path.stat().st_mtime_ns for path in (out / "cards").iterdir()}

    def no(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(train, "train", no)
    cfg = compare.Config(size="dry", objectives=("D", "F"), seeds=(0,), out=str(out))
    page_before = (out / "report.html").read_bytes()
    again = compare.bench_of(cfg)
    compare.carry_out(cfg, again)
    compare.report(out, again.plan.control_seed)
    assert {path: path.stat().st_mtime_ns for path in (out / "cards").iterdir()} == before
    assert (out / "report.html").read_bytes() == page_before


def test_a_card_that_is_lost_is_made_again_and_is_the_same(made):
    out, bench = made
    before = cards_in(out)["F-0-fine"]
    (out / "cards" / "F-0-fine.json").unlink()
    found = parts.run_card(bench, parts.Part("F", 0, "fine"))
    for key in before:
        if key != "made":
            assert found[key] == before[key], key


def test_cards_need_no_checkpoints(made, tmp_path):
    out, _ = made
    (tmp_path / "cards").symlink_to(out / "cards")
    compare.report(tmp_path, CONTROL)
    own, other = (
        re.sub(r"<figure>.*?</figure>", "", (place / "report.html").read_text(), flags=re.S)
        for place in (tmp_path, out)
    )
    # But for the pictures of samples, which lie elsewhere.
    assert own.split("<h2>Each at its best")[1] == other.split("<h2>Each at its best")[1]


def test_what_was_measured_is_what_was_drawn(made):
    _, bench = made
    refs, part = bench.refs, parts.Part("F", 0, "standard")
    folder = checkpoints(bench.runs / part.name)[-1]
    features, nfe = bench.features(part, folder, bench.plan.curve, bench.plan.n)
    card = json.loads((bench.cards / "F-0-standard.json").read_text())
    found = hypotheses.points(card)[-1]
    assert nfe == found["nfe"] == 2
    own = refs.compared(refs.features[refs.train["excluded"]])
    fake = refs.compared(features)
    assert found["excluded"]["fd"] == pytest.approx(frechet_from_features(own, fake), rel=1e-9)
    drawn = np.random.default_rng(0)
    everything = refs.train["all"]
    some = np.sort(drawn.permutation(everything)[: measures.PAIRS])
    real = refs.compared(refs.features[some])[: len(fake)]
    assert found["all"]["recall"] == precision_recall(real, fake).recall


def test_real_images_pass_for_real(made):
    refs = made[1].refs
    found = refs.measure(refs.features[refs.train["all"]])
    assert found["all"]["fd"] == pytest.approx(0, abs=1e-6)
    assert found["copies"]["flagged"] and found["copies"]["ratio"] < 1e-6
    held = refs.measure(refs.features[refs.held["all"]])
    assert not held["copies"]["flagged"]
    share = len(refs.train["excluded"]) / len(refs.train["all"])
    assert found["acquired"] == pytest.approx(share, abs=0.05)


def test_a_card_of_another_question_is_refused(made, user, tmp_path):
    out, _ = made
    code, _, errors = user(compare.main, *arguments(out), "--n", "25")
    assert code == 2 and len(errors) == 1 and "n 24 and 25" in errors[0], errors


def test_whatever_a_card_says_is_refused_in_one_line_or_makes_a_page(tmp_path):
    """Each card of a small comparison with something else at a place of it."""
    whole = all_cards(seeds=(0, 1), arms=("D", "F"))
    path, draw = tmp_path / "card.json", random.Random(0)
    every = [(i, place) for i, card in enumerate(whole) for place in places(card)]
    refused = 0
    for _ in range(300):
        i, place = draw.choice(every)
        wrong = draw.choice([*WRONG, LOST])
        path.write_text(json.dumps(changed_at(whole[i], place, wrong)))
        try:
            read = [*whole[:i], cards_py.read_card(path), *whole[i + 1 :]]
            page.build(sort_cards(read, CONTROL), compare.RULE, tmp_path)
        except UserError:
            refused += 1
    assert 60 < refused < 300


def test_samples_out_of_order_are_refused(tmp_path):
    card = run_card("F", 0, "stage2")
    card["sets"][0]["images"] = 5_000
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="out of order"):
        cards_py.read_card(tmp_path / "card.json")


def test_a_folder_without_cards_is_one_line(made, user, tmp_path):
    (tmp_path / "cards").mkdir()
    code, _, errors = user(compare.main, "report", tmp_path)
    assert code == 2 and len(errors) == 1 and "no card of a run" in errors[0]
    shutil.copy(made[0] / "cards" / "F-0-fine.json", tmp_path / "cards")
    code, _, errors = user(compare.main, "report", tmp_path)
    assert code == 2 and len(errors) == 1 and "references.json" in errors[0]


def test_a_half_written_card_is_refused(made, user):
    out, _ = made
    path = out / "cards" / "rates-F-0.json"
    whole = path.read_text()
    try:
        path.write_text(whole[:100])
        code, _, errors = user(compare.main, *arguments(out))
        assert code == 2 and len(errors) == 1 and str(path) in errors[0], errors
        path.write_text(whole.replace('"fd": ', '"fe": ', 1))
        code, _, errors = user(compare.main, *arguments(out))
        assert code == 2 and "fd" in errors[0]
    finally:
        path.write_text(whole)


# ---- any runs, and what it costs -----------------------------------------------------------------


def test_any_runs_get_the_same_page(made, user, tmp_path):
    out, bench = made
    names = [str(bench.runs / f"{arm}-0-fine") for arm in "DF"]
    words = ["report", *names, "--n", "16", "--out", tmp_path]
    code, said, errors = user(compare.main, *words)
    assert code == 0, errors
    assert "Runs of D-0-fine, F-0-fine." in said
    text = (tmp_path / "report.html").read_text()
    assert "Samples after fine" in text and "Runs, side by side" in text
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cards").iterdir()}
    assert user(compare.main, *words)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cards").iterdir()} == before
    code, _, errors = user(compare.main, *words[:-3], "8", *words[-2:])
    assert code == 2 and "n 16 and 8" in errors[0]


def test_runs_that_do_not_compare_are_one_line(made, user, tmp_path):
    _, bench = made
    one, other = bench.runs / "D-0-standard", tmp_path / "elsewhere"
    shutil.copytree(bench.runs / "F-0-standard", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "holdout": 0.5}))
    for words, line in (
        ([one, other], "not of one data set"),
        ([one, one], "have one name"),
        ([one, tmp_path], "no run with a checkpoint"),
        ([], "report of what"),
    ):
        code, _, errors = user(compare.main, "report", *words, "--out", tmp_path / "out")
        assert code == 2 and len(errors) == 1 and line in errors[0], errors


def test_the_cost_counts_what_will_be_done():
    plan = replace(PLANS["gpu"], data="folder", seeds=(0, 1, 2))
    parts_of_two = [
        parts.Part(arm, seed, stage)
        for arm in "DF"
        for seed in plan.seeds
        for stage in train_stages()
    ]
    found = costs.cost(plan, parts_of_two, 0)
    # 2 arms × 3 seeds × (8M + 8M + 200k) images.
    assert found.runs == 18 and found.images == 97_200_000
    assert costs.forward_flops("toy-281m", 256) == pytest.approx(39.5e9, rel=0.01)
    assert found.flops == pytest.approx(39.5e9 * (3 * found.images + found.evaluations), rel=0.01)
    assert costs.cost(plan, [], 0).disk == 0


def test_a_run_costs_what_it_took(made):
    out, bench = made
    part = parts.Part("F", 0, "standard")
    images, evaluations = costs.run_cost(bench.plan, part)
    card = cards_in(out)[part.name]
    drawn = sum(found["nfe"] for found in card["sets"]) * bench.plan.n
    assert images == card["sets"][-1]["images"]
    # The best sampler is counted as if it had the most evaluations, and an equal one once more.
    assert drawn <= evaluations <= 2 * drawn


def test_no_space_for_the_plan_is_one_line(user, tmp_path, monkeypatch):
    monkeypatch.setattr(costs.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    code, _, errors = user(compare.main, *arguments(tmp_path / "out"))
    assert code == 2 and len(errors) == 1 and "the plan needs" in errors[0], errors
    assert not (tmp_path / "out").exists()
