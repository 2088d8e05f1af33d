"""distill.py --shard: a student that is shared out, beside a teacher that each rank has whole."""

import shutil

import pytest
import torch

from harness.run import checkpoints
from harness.whole import state_files
from sharded import FULL, ONE, check_bits, check_losses, newest, ranks, trained

# Blocks that are compared, an untrained assessor that weighs them, and heads with an optimizer.
LEARN = {
    "model": "", "images": 32, "eval_every": 0, "assessor": "random", "local_heads": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    place = tmp_path_factory.mktemp("teacher")
    trained(ONE, place, {"images": 16, "objective": "ddpm"})
    return place / "run"


def own(state):
    """Moments of the heads, of what newest() returns."""
    parts = {key.partition(":own/")[2]: x for key, x in state.items()}
    return {key: x for key, x in parts.items() if key.startswith("head_exp_avg/")}


@pytest.mark.parametrize("how, accum", [("full", 1), ("grad", 2)])
def test_a_student_in_two_shards_learns_as_in_one_process_and_goes_on_bitwise(
    teacher, tmp_path, how, accum
):
    flags = LEARN | {"teacher": str(teacher), "accum": accum}
    alone = trained(ONE, tmp_path / "alone", flags)
    flags |= FULL | {"shard": how}
    said = ranks(2, trained, tmp_path / "two", flags)
    assert said[0] == said[1] and len(alone) == 4
    check_losses(said[0], alone)
    last, whole = checkpoints(tmp_path / "two/run")[-1], newest(tmp_path / "two")
    mine, theirs = own(newest(tmp_path / "alone")), own(whole)
    assert mine.keys() == theirs.keys() and len(mine) > 1
    for key, x in mine.items():  # moments: a head's gradients are those of all micro-batches
        assert torch.allclose(theirs[key], x, rtol=1e-3, atol=1e-3 * float(x.abs().max())), key
    assert len(state_files(last)) == 2 and last.name == f"{32:012d}"
    assert sum(":own/" in key for key in whole) > 4  # of the heads, and the tally
    shutil.rmtree(last)
    assert ranks(2, trained, tmp_path / "two", flags)[0] == said[0][2:]
    check_bits(newest(tmp_path / "two"), whole)
