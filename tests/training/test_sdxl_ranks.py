"""SDXL's training in small, on several ranks: both encoders, the vector, buckets, captions."""

import pytest

from harness.cli import UserError
from harness.run import checkpoints
from harness.whole import state_files
from miniature import sdxl
from sharded import FULL, ONE, check_bits, check_losses, newest, opened, ranks, stepped, struck
from sharded import trained, whole


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


def test_two_shards_have_the_losses_of_one_process(two, alone):
    check_losses(two[1], alone)
    assert len(alone) == 20


@pytest.mark.parametrize(
    "world, how", [(2, "grad"), (2, "none"), (4, "full"), (4, "grad"), (4, "none")]
)
def test_however_many_ranks_share_it_the_losses_are_the_same(flags, alone, tmp_path, world, how):
    said = ranks(world, trained, tmp_path, flags | {"shard": how})
    assert said == [said[0]] * world
    check_losses(said[0], alone)
    shards = 1 if how == "none" else world
    assert len(state_files(checkpoints(tmp_path / "run")[-1])) == shards


@pytest.mark.parametrize("victims", [[1], [0, 1]], ids=["one", "all"])
def test_ranks_that_are_killed_in_a_step_cost_no_bit(flags, two, tmp_path, victims):
    assert None in ranks(2, struck, tmp_path, flags | FULL, victims, 60)
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"{40:012d}"]
    assert ranks(2, trained, tmp_path, flags | FULL)[1] == two[1][10:]
    check_bits(newest(tmp_path), newest(two[0]))


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
