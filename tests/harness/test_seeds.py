"""Every seed is one of its own, also those that differ only above bit 32, which torch's CPU
generator does not look at."""

import ast

import pytest
import torch
from distilling import ALONE
from test_house import ROOT, files, place

from data.dataset import index_at, rng
from data.robohash import sample_kitten
from data.toyfaces import sample_face
from diffusion.sampling import draw, generators
from distillation.assessor import AssessorConfig, fresh_assessor
from distillation.heads import LocalHeads
from harness.seeds import step_seed, torch_seed

BITS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**40, 2**62, 2**63 - 1]
SMALL = AssessorConfig({"mid": 4}, bins=4, patterns=2, dim=4)


def uniform(seed):
    return torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist()


USES = {
    "weights": lambda seed: uniform(torch_seed(seed)),
    "dropout": lambda seed: uniform(step_seed(seed, 96)),
    "noise": lambda seed: draw(generators([seed]), torch.empty(1, 1, 2, 2)).flatten().tolist(),
    "samples": lambda seed: rng(seed, "sample", 3).random(4).tolist(),
    "order": lambda seed: [index_at(seed, 40, i) for i in range(40)],
    "heads": lambda seed: (
        LocalHeads({"mid": 4}, 2, ALONE, seed=seed, lr=1e-3, weight_decay=0)
        .net["mid"].weight.flatten().tolist()
    ),
    "assessor": lambda seed: (
        torch.cat([p.flatten() for p in fresh_assessor(SMALL, seed).parameters()]).tolist()
    ),
    "faces": lambda seed: repr([sample_face(i, seed) for i in range(8)]),
    "kittens": lambda seed: repr([sample_kitten(i, seed) for i in range(8)]),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_no_two_seeds_are_one(use):
    drawn = [USES[use](seed) for seed in BITS]
    assert [USES[use](seed) for seed in BITS] == drawn
    pairs = [(a, b) for i, a in enumerate(BITS) for b in BITS[:i]]
    same = [(a, b) for a, b in pairs if drawn[BITS.index(a)] == drawn[BITS.index(b)]]
    assert same == []


def test_small_seeds_are_taken_as_they_always_were():
    for seed in (0, 1, 7, 2**31, 2**32 - 1):
        assert torch_seed(seed) == seed
        assert step_seed(seed, 480) == seed * 1_000_003 + 480
    for seed in (2**32, 2**63 - 1):
        assert 0 <= torch_seed(seed) < 2**64 and 0 <= step_seed(seed, 480) < 2**64


def test_no_generator_of_torch_is_given_a_seed_as_it_comes():
    """manual_seed(…) of the product: a constant, torch_seed(…) or step_seed(…)."""
    found = []
    for path in files():
        if place(path) in ("tests", "benchmarks"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("manual_seed")):
                continue
            text = ast.unparse(node.args[0])
            if not (text.isdecimal() or text.startswith(("torch_seed(", "step_seed("))):
                found.append(f"{path.relative_to(ROOT)}: {text}")
    # Those of 2^32 and more are refused in the one, and NumPy's in the other.
    assert sorted(found) == ["diffusion/laplace.py: seed", "diffusion/sampling.py: seed"]
