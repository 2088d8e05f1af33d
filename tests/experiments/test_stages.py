"""Faces are read back from their pixels."""

import numpy as np
import pytest

from data import toyfaces
from experiments import stages


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
