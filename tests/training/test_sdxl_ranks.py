"""SDXL's training in small, on several ranks: both encoders, the vector, buckets, captions."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.cli import UserError
from harness.run import checkpoints
from harness.whole import state_files
from miniature import sdxl
from sharded import FULL, ONE, opened, ranks, stepped, struck, trained, trained_each, whole


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory):
    """Losses of one process."""
    return trained(ONE, tmp_path_factory.mktemp("alone"), flags)


@pytest.fixture(scope="module")
def two(flags, tmp_path_factory):
    """(folder, losses) of two shards, with checkpoints at 40 and 80 images."""
    place = tmp_path_factory.mktemp("two")
    first, second = ranks(2, trained, place, flags | FULL)
    assert first == second
    return place, first


def newest(place: Path) -> dict[str, torch.Tensor]:
    folder = checkpoints(place / "run")[-1]
    files = sorted(folder.glob("*.safetensors"))
    return {f"{path.name}:{key}": x for path in files for key, x in load_file(path).items()}


def check_losses(losses: list, alone: list) -> None:
    assert len(losses) == len(alone) == 20
    for i, rel in enumerate((1e-5, 1e-3)):  # of the loss, of the norm of its gradient
        want = pytest.approx([said[i] for said in alone], rel=rel)
        assert [said[i] for said in losses] == want


def test_two_shards_have_the_losses_of_one_process(two, alone):
    check_losses(two[1], alone)


@pytest.mark.parametrize("world, ways", [(2, ("grad", "none")), (4, ("full", "grad", "none"))])
def test_however_many_ranks_share_it_the_losses_are_the_same(flags, alone, tmp_path, world, ways):
    said = ranks(world, trained_each, tmp_path, flags, {how: {"shard": how} for how in ways})
    assert said == [said[0]] * world and [*said[0]] == [*ways]
    for how, losses in said[0].items():
        check_losses(losses, alone)
        shards = 1 if how == "none" else world
        assert len(state_files(checkpoints(tmp_path / how / "run")[-1])) == shards


@pytest.mark.parametrize("victims", [[1], [0, 1]], ids=["one", "all"])
def test_ranks_that_are_killed_in_a_step_cost_no_bit(flags, two, tmp_path, victims):
    assert None in ranks(2, struck, tmp_path, flags | FULL, victims, 60)
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"{40:012d}"]
    assert ranks(2, trained, tmp_path, flags | FULL)[1] == two[1][10:]
    a, b = newest(tmp_path), newest(two[0])
    assert a.keys() == b.keys() and len(a) > 300
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_four_then_two_then_one_rank_hold_the_same(flags, tmp_path):
    said = ranks(4, stepped, tmp_path, flags | FULL, 3)
    for before, after in said:  # of each rank, element by element
        assert before == after and len(before) > 400
    found = [ranks(n, whole, tmp_path, flags | FULL, True)[0] for n in (4, 2)]
    found += [whole(ONE, tmp_path, flags | FULL)]
    assert found[0] == found[1] == found[2] and len(found[0]) > 400


def test_eight_bit_moments_stay_with_their_ranks(flags, tmp_path):
    flags = flags | FULL | {"optim": "adamw8bit"}
    said = ranks(2, stepped, tmp_path, flags, 3)
    for before, after in said:
        assert before == after and len(before) > 400
    with pytest.raises(UserError, match="are in 2 pieces, now there are 1.*Resume with 2 shards"):
        opened(ONE, tmp_path, flags)
