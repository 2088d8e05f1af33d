"""U-Net against transformer: what is matched, what is counted, the rule's words of cards that are
known, and the whole of it in miniature."""

import json
import random
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import ttest_1samp

import experiments.cards as cards_py
import model
import train
from experiments import architecture, contest, matched, parts, report
from experiments.contest import Cell, answers, questions
from experiments.costs import TRAINING, flops_of, parameters_of
from experiments.hypotheses import sort_cards
from harness.cli import UserError
from specimen_cards import MADE, POINTS, rates_card, references_card, run_card, tuning_card
from test_own_json import LOST, WRONG, places
from test_own_json import changed as changed_at

ARMS = matched.ARMS
PLANNED = [("small", 32), ("tiny", 32)]


@pytest.fixture(autouse=True, scope="module")
def own_presets():
    """The networks that are added to the presets go again."""
    before = dict(model.PRESETS)
    yield
    model.PRESETS.clear()
    model.PRESETS.update(before)


def networks_card() -> dict:
    """A transformer of equal parameters takes twice the U-Net's arithmetic."""
    own = {"unet": (100, 1e9, 2e6, 0.01), "sit-params": (100, 2e9, 4e6, 0.02),
           "sit-flops": (50, 1e9, 2e6, 0.01)}
    names = ("parameters", "flops", "bytes", "seconds")
    networks = {arm: {"model": arm, **dict(zip(names, values))} for arm, values in own.items()}
    return {"kind": "networks", "asked": {}, "made": MADE, "networks": networks}


def cards_of(skills: dict[str, float], seeds: int = 5) -> list[dict]:
    """A cell in which arms have skills; the U-Net's is 1."""
    cards = [references_card(), networks_card(), *(tuning_card(arm) for arm in ARMS)]
    for seed in range(seeds):
        for arm in ARMS:
            cards.append(run_card(arm, seed, "standard", skill=skills.get(arm, 1.0)))
    return cards


def cell_of(cards: list[dict], size: str = "small", resolution: int = 32, folder=None) -> Cell:
    found = sort_cards(cards, 2_000, differ=("model",))
    networks = next(card["networks"] for card in cards if card["kind"] == "networks")
    return Cell(size, resolution, found, networks, folder or architecture.Path("/nowhere"))


def words(cells: list[Cell]) -> dict[str, str]:
    return {each.question.title: each.word for each in answers(questions(cells))}


# ---- what is matched, what is counted ------------------------------------------------------------


def test_the_transformers_of_the_tiny_unet_are_the_known_ones():
    found = matched.matched("tiny", 64)
    assert found == {
        "unet": "tiny", "sit-params": "sit-w192-d8-p1", "sit-flops": "sit-w192-d5-p1"
    }
    numbers = [parameters_of(matched.network_at(found[arm], 8)) for arm in ARMS]
    assert numbers == [5_660_576, 5_504_480, 3_505_184]
    flops = [flops_of(matched.network_at(found[arm], 8), 8) / 1e9 for arm in ARMS]
    assert flops == pytest.approx([0.287, 0.484, 0.303], abs=5e-4)


@pytest.mark.parametrize("resolution", [32, 64])
def test_no_other_depth_is_nearer(resolution):
    """All depths, one by one, against the two that the choice extrapolates from."""
    found, side = matched.matched("small", resolution), resolution // 8
    unet = model.PRESETS[found["unet"]]
    family = matched.FAMILIES["small"]
    for arm in ("sit-params", "sit-flops"):
        goal = matched.number_of(arm, unet, side)
        off = {}
        for depth in range(1, 14):
            cfg = matched.MMDiTConfig(
                width=family.width, heads=family.heads, blocks=depth, pos_max=side
            )
            off[depth] = abs(matched.number_of(arm, cfg, side) - goal)
        assert model.PRESETS[found[arm]].blocks == min(off, key=off.get)


def test_what_no_depth_equals_is_refused(monkeypatch):
    monkeypatch.setattr(matched, "APART", 0.001)
    with pytest.raises(UserError, match="of what sit-params should equal"):
        matched.matched("tiny", 64)


class TwoLayers(torch.nn.Module):
    """Keeps its input, what silu was given and what it gave."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)

    def forward(self, x, t):
        return self.last(torch.nn.functional.silu(self.first(x)))


def test_bytes_kept_are_those_of_the_backward_pass():
    inputs = {"x": torch.randn(4, 5), "t": torch.rand(4)}
    assert matched.kept_bytes(TwoLayers(), inputs) == 4 * 4 * (5 + 7 + 7)


def test_seconds_are_the_fastest_pass(monkeypatch):
    took = iter([1.0, 5.0, 3.0, 4.0])
    clock = SimpleNamespace(now=0.0)

    def tick(*_):
        clock.now += next(took)

    monkeypatch.setattr(matched, "pass_seconds", tick)
    monkeypatch.setattr(matched, "ROUNDS", 2)
    monkeypatch.setattr(matched, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    cpu = torch.device("cpu")
    assert matched.fastest({"a": 0, "b": 0}, {"a": 0, "b": 0}, cpu) == {"a": 1.0, "b": 4.0}


# ---- the rule's words ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "skill, seeds, word",
    [
        (1.25, 5, "supported: the transformer"),
        (1.25, 3, "suggested: the transformer"),
        (0.8, 5, "supported: the U-Net"),
        (1.25, 2, "open: 2 of the 3 seeds that the rule asks for"),
    ],
)
def test_the_word_is_the_rules(skill, seeds, word):
    found = words([cell_of(cards_of({"sit-params": skill}, seeds))])
    assert found["small at 32 px, equal parameters"] == word


@pytest.mark.parametrize("factor, word", [(1.01, "equal"), (1.08, "supported: the U-Net")])
def test_twins_are_equal_within_the_margin(factor, word):
    cards = [card for card in cards_of({}) if card.get("arm") != "sit-flops"]
    for seed in range(5):
        twin = {**run_card("unet", seed, "standard", skill=1 / factor), "arm": "sit-flops"}
        cards.append(twin)
    assert words([cell_of(cards)])["small at 32 px, equal FLOP"] == word


@pytest.mark.parametrize("fd", [(1.5,) * 5, (0.7, 1.7, 0.8, 1.9, 1.25)])
def test_both_measures_must_say_so(fd):
    """The loss is lower; FD is higher, or in no seed what it is in the others."""
    cards = cards_of({"sit-flops": 1.25})
    for card in cards:
        if card.get("arm") == "sit-flops" and card["kind"] == "run":
            for found in card["sets"]:
                found["all"]["fd"] *= fd[card["seed"]]
    assert words([cell_of(cards)])["small at 32 px, equal FLOP"] == "open"


def test_p_is_students_two_sided_and_holms():
    cell = cell_of(cards_of({"sit-params": 1.01, "sit-flops": 1.02}))
    found = answers(questions([cell]))
    plain, adjusted = [], []
    for answer in found:
        for each, p in zip(answer.question.endpoints, answer.p):
            plain.append(float(ttest_1samp(list(each.pairs.by_seed.values()), 0).pvalue))
            adjusted.append(p)
    assert len(plain) == 5
    order, highest = sorted(range(5), key=plain.__getitem__), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (5 - rank) * plain[i]))
        assert adjusted[i] == pytest.approx(highest, rel=1e-9)


def with_loss(skills, factor) -> list[dict]:
    """Cards whose transformer of equal FLOP has a loss of factor(k) times itself at the bin k."""
    cards = cards_of(skills)
    for card in cards:
        if card.get("arm") == "sit-flops" and card["kind"] == "run":
            by_t = card["held_out"]["all"]["loss_by_t"]
            by_t[:] = [value * factor(k) for k, value in enumerate(by_t)]
    return cards


@pytest.mark.parametrize(
    "factor, word",
    [
        (lambda k: 0.8 if k >= 6 else 1.0, "supported: it is so"),
        (lambda k: 0.8 if k < 2 else 1.0, "supported: it is the other way round"),
        (lambda k: 1.0, "equal"),
    ],
)
def test_who_is_global_is_the_loss_where_noise_is_most(factor, word):
    found = words([cell_of(with_loss({}, factor))])
    assert found['"A U-Net is local, a transformer global", small at 32 px'] == word


@pytest.mark.parametrize(
    "small, large, word",
    [(1.0, 1.3, "supported: it does"), (1.3, 1.0, "supported: the U-Net does")],
)
def test_who_scales_better_is_the_ratio_at_the_larger_size(small, large, word):
    cells = [
        cell_of(cards_of({"sit-flops": small})),
        cell_of(cards_of({"sit-flops": large}), size="tiny"),
    ]
    assert words(cells)['"A transformer scales better", small to tiny at 32 px'] == word
    # At another resolution there is nothing to compare with.
    apart = [cells[0], cells[1]._replace(resolution=64)]
    assert not [title for title in words(apart) if "scales" in title]


def test_fd_at_equal_arithmetic_lies_on_the_power_law():
    """The specimens' FD falls with images^-0.2, on which a line through logarithms lies."""
    cell = cell_of(cards_of({}))
    goal = contest.least(cell, "TFLOP")
    assert goal == pytest.approx(TRAINING * 1e9 * POINTS["standard"][-1] / 1e12)
    twice, once = (cell.cards.of(arm, "standard")[0] for arm in ("sit-params", "sit-flops"))
    assert contest.fd_at(cell, once, "TFLOP", goal) == pytest.approx(contest.fd_of(once))
    # It takes twice the arithmetic an image, so it had seen half of the images.
    found = contest.fd_at(cell, twice, "TFLOP", goal)
    assert found == pytest.approx(contest.fd_of(twice) * 2**0.2)


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_says_what_it_cannot_say(tmp_path):
    page = contest.build([cell_of(cards_of({}, 3))], architecture.RULE, PLANNED)
    text = "\n".join(report.markdown(page))
    assert "tiny at 32 px was not run" in text
    assert "which network scales better was not asked" in text
    assert "the highest of the rates was the best" in text
    # The rule, whole.
    assert " ".join(architecture.RULE.split()[-12:]) in " ".join(text.split())


@pytest.mark.parametrize(
    "more, said", [([rates_card("sit-flops", 0, 0.4)], "equal FLOP -20.0%"), ([], "equal FLOP ")]
)
def test_the_page_says_what_another_rate_would_have_come_to(more, said):
    """A specimen's lower rate has FD 10, its higher one 10 times the spread. A network of which no
    whole runs were made stands with its own."""
    cards = cards_of({}, 3) + [rates_card("unet", 0, 0.5), *more]
    cell = cell_of(cards)
    text = "\n".join(report.markdown(contest.build([cell], architecture.RULE, PLANNED)))
    if not more:
        own = contest.fd_of(cell.cards.of("sit-flops", "standard")[0])
        said += f"{100 * (own / 5 - 1):+.1f}%"
    assert f"{said}." in text


def test_whatever_a_card_says_is_refused_in_one_line_or_makes_a_page(tmp_path):
    whole = cards_of({"sit-flops": 1.1}, 2) + [rates_card("unet", 0, 1.1)]
    path, draw, refused = tmp_path / "x-32" / "cards" / "card.json", random.Random(0), 0
    path.parent.mkdir(parents=True)
    every = [(i, place) for i, card in enumerate(whole) for place in places(card)]
    own = [(1, place) for place in places(whole[1])]
    for k in range(200):
        i, place = draw.choice(own if k % 4 == 0 else every)
        wrong = draw.choice([*WRONG, LOST])
        path.write_text(json.dumps(changed_at(whole[i], place, wrong)))
        try:
            read = [*whole[:i], cards_py.read_card(path), *whole[i + 1 :]]
            cell = architecture.cell_from(path.parent.parent, read)
            contest.build([cell], architecture.RULE, PLANNED)
            contest.summary([cell])
        except UserError:
            refused += 1
    assert 40 < refused < 200


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, line",
    [
        (["--sizes", "tini"], "wanted some of nano"),
        (["--sizes", "nano,nano"], "names one twice"),
        (["--resolutions", "40"], "multiples of 16"),
        (["--seeds", "1,1"], "names one twice"),
        (["--size", "gpu"], "needs --data"),
    ],
)
def test_what_cannot_be_compared_is_one_line(user, tmp_path, given, line):
    code, _, errors = user(architecture.main, "--out", tmp_path / "out", *given)
    assert code == 2 and len(errors) == 1 and line in errors[0], errors
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A whole comparison in miniature."""
    out = tmp_path_factory.mktemp("architecture")
    cfg = architecture.Config(size="dry", out=str(out), device="cpu")
    bench = architecture.bench_of(cfg, "nano", 32)
    architecture.carry_out(bench)
    architecture.report(out, architecture.cells_of(cfg))
    return cfg, bench, out


def test_networks_of_a_seed_differ_in_the_network_alone(made):
    _, bench, _ = made
    one, *others = [asdict(bench.config(parts.Part(arm, 0, "standard"))) for arm in ARMS]
    for other in others:
        differs = {key for key in one if one[key] != other[key]}
        assert {"model", "name"} <= differs <= {"model", "name", "lr"}
    tuning = bench.config(parts.Part("unet", 1_000, "standard", rate=1e-3))
    assert (one["images"], tuning.images, one["decay"]) == (64, 16, "constant")


def test_the_whole_of_it_leaves_a_page_and_its_numbers(made):
    _, bench, out = made
    names = {path.stem for path in bench.cards.glob("*.json")}
    assert names == {
        "references", "networks", *(f"tuning-{arm}" for arm in ARMS),
        *(f"{arm}-0-standard" for arm in ARMS),
    }
    text = (out / "report.html").read_text()
    assert "OPEN: 1 of the 3 seeds" in text and text.count("<img") >= 7
    found = json.loads((out / "verdict.json").read_text())
    card = json.loads((bench.cards / "sit-flops-0-standard.json").read_text())
    unet = json.loads((bench.cards / "unet-0-standard.json").read_text())
    fd = card["sets"][-1]["all"]["fd"] / unet["sets"][-1]["all"]["fd"]
    assert found["answers"][1]["endpoints"][1]["ratio"] == pytest.approx(fd)


def test_what_is_finished_is_never_run_again(made, user, monkeypatch):
    cfg, _, out = made
    before = (out / "report.html").read_bytes()

    def no(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(train, "train", no)
    code, text, errors = user(
        architecture.main, "--size", cfg.size, "--out", out, "--device", "cpu"
    )
    assert code == 0 and not errors and "report.html" in text
    assert (out / "report.html").read_bytes() == before


def test_a_card_too_few_is_one_line(made, user, tmp_path):
    _, bench, out = made
    cards = tmp_path / "nano-32" / "cards"
    cards.mkdir(parents=True)
    for path in bench.cards.glob("*.json"):
        if path.stem != "networks":
            (cards / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="networks.json is missing"):
        architecture.report(tmp_path, PLANNED)
