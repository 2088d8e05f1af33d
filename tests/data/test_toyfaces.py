"""Toy faces: a function of the index, with tags that say what is drawn."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import data.toyfaces as toyfaces
from data.dataset import open_dataset


def test_toyfaces_are_a_function_of_the_index_and_carry_their_attributes_as_tags():
    ds = open_dataset("toyfaces:40", resolution=32, holdout=0)
    again = open_dataset("toyfaces:20", resolution=32, holdout=0)
    assert (
        torch.equal(ds.images(range(20)), again.images(range(20)))
        and ds.source.tags[:20] == again.source.tags
    )
    assert len({ds[i].image.numpy().tobytes() for i in range(40)}) == 40
    vocabulary = set(toyfaces.VOCABULARY)
    for i in range(40):
        tags = set(ds[i].tags)
        assert tags <= vocabulary and len(tags & set(toyfaces.GROUPS["hair color"])) == 1


def test_a_character_is_a_combination_that_nobody_else_has():
    faces = [toyfaces.sample_face(i) for i in range(5000)]
    count = Counter(toyfaces.character(f) for f in faces)
    for name, look in toyfaces.CHARACTERS.items():
        assert 0.02 < count[name] / 5000 < 0.06
        for key, value in look.items():  # every attribute also occurs without the character
            assert (
                sum(getattr(f, key) == value and toyfaces.character(f) != name for f in faces) > 50
            )


@pytest.mark.parametrize("size", [32, 64, 100, 256])
def test_toyfaces_at_any_size_are_the_same_picture(size):
    small = np.asarray(
        toyfaces.draw(toyfaces.sample_face(3), size).resize((32, 32), Image.Resampling.BOX), float
    )
    distance = [
        np.abs(small - np.asarray(toyfaces.draw(toyfaces.sample_face(i), 32), float)).mean()
        for i in range(20)
    ]
    assert int(np.argmin(distance)) == 3 and distance[3] < 0.4 * sorted(distance)[1]


def test_excluded_characters_exist_and_the_stages_add_up():
    counts = [
        len(
            open_dataset(
                "toyfaces:400", stage=s, exclude_tags=toyfaces.EXCLUDED, resolution=32, holdout=0
            )
        )
        for s in ("standard", "fine", "stage2")
    ]
    assert counts[0] == 400 == counts[1] + counts[2] and counts[2] > 10
