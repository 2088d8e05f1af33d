"""Faces are read back from their pixels."""

import json

import numpy as np
import pytest

from data import toyfaces
from experiments import protocol, stages


@pytest.fixture
def few(monkeypatch):
    """A bank of few faces: the search has further to go."""
    faces = [toyfaces.sample_face(10**6 + i) for i in range(60)]
    bank = faces, np.stack([stages.drawn(face) for face in faces])
    monkeypatch.setattr(stages, "bank", lambda: bank)


@pytest.mark.parametrize("seed", [5, 6])
def test_the_concept_of_a_drawn_face_is_read_back(seed, few):
    face = toyfaces.sample_face(seed)
    noise = np.random.default_rng(0).normal(0, 8, (stages.SIZE, stages.SIZE, 3))
    found = stages.read_face((stages.drawn(face) + noise).astype(np.float32))
    for name in toyfaces.CONCEPT:
        assert getattr(found, name) == getattr(face, name), name


@pytest.mark.parametrize("script", [stages, protocol], ids=["stages", "protocol"])
def test_a_dry_run_only_prints_the_flags(script, user, monkeypatch):
    def started(*args, **kwargs):
        raise AssertionError("a dry run has started something")

    monkeypatch.setattr(stages.subprocess, "run", started)
    monkeypatch.setattr(protocol, "join_ranks", started)
    code, out, err = user(script.main, "--dry-run")
    assert code == 0 and err == [] and json.loads(out)
