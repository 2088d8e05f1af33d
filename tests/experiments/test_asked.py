"""What experiments/prompts.py asks and counts."""

import json

import pytest
import torch

from data.toyfaces import GROUPS
from experiments import prompts
from experiments.measures import TagReader
from experiments.prompts import PAIR, random_pairs, shares, shown

GROUP = {tag: name for name, tags in GROUPS.items() for tag in tags}


def test_pairs_are_of_two_groups_and_a_function_of_the_seed():
    pairs = random_pairs(400, 0)
    assert len(set(pairs)) > 200
    assert all(GROUP[a] != GROUP[b] for a, b in pairs)
    assert PAIR not in pairs and {*PAIR} not in map(set, pairs)
    assert random_pairs(64, 0) == pairs[:64] != random_pairs(64, 1)
    every = {GROUP[tag] for pair in pairs for tag in pair}
    assert every == set(GROUPS) - {"character"}


def test_a_tag_is_looked_for_in_its_own_sample():
    eye = torch.eye(4, dtype=torch.float64)
    half = torch.full((4,), 0.5, dtype=torch.float64)
    reader = TagReader(("a", "b", "c", "d"), torch.zeros(4), torch.ones(()), eye, half)
    features = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    found = shown(reader, features, [("c", "a"), ("b", "c"), ("a", "b")])
    assert found.tolist() == [[True, True], [True, False], [False, False]]
    assert shares(found) == {"both": pytest.approx(1 / 3), "each": pytest.approx(0.5)}


def test_training_leaves_out_the_pair_that_is_never_together(monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(prompts.subprocess, "run", lambda words, **kw: said.extend(words))
    run, seconds = prompts.train(prompts.Config(images=5), tmp_path)
    flags = dict(zip(said[2:], said[3:]))
    assert run == tmp_path / "prompts" and seconds >= 0
    assert flags["--stage"] == "fine" and flags["--exclude-tags"] == "green hair & glasses"
    assert flags["--images"] == "5" and flags["--text"] == "bytes"


def test_its_result_is_of_its_own_flags():
    result = json.loads((prompts.ROOT / "benchmarks/results/prompts.json").read_text())
    assert result["config"] == {**vars(prompts.Config())}
    asked, minutes = result["asked"]["both"], result["minutes"]
    assert result["passes"] == (asked >= prompts.SHARE and minutes <= prompts.MINUTES)
