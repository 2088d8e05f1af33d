"""--shard: the same run, whoever holds what; and it goes on exactly where it was stopped."""

import gc
import shutil
from pathlib import Path

import pytest
import torch

import train
from ckpt import convert, load_unet
from data import heldout
from data.dataset import open_dataset
from harness.cli import UserError
from harness.files import DIGESTS
from harness.ranks import Ranks
from harness.run import checkpoints
from harness.whole import state_files
from model import PRESETS, build
from sharded import FULL, ONE, check_bits, check_losses, config, killed, newest, opened, ranks
from sharded import shown, stepped, times, trained, whole
from training.plan import plan_of
from training.previews import held_out_loss
from training.sharding import check_sharding, evenly, local, part
from vae import pixel

@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(folder, losses) of one process."""
    place = tmp_path_factory.mktemp("alone")
    return place, trained(ONE, place, {})


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder, losses) of two shards, with checkpoints at 80 and 160 images."""
    place = tmp_path_factory.mktemp("two")
    first, second = ranks(2, trained, place, FULL)
    assert first == second
    return place, first


def network(place: Path, name: str = "model") -> torch.nn.Module:
    return load_unet(checkpoints(place / "run")[-1] / f"{name}.safetensors")[0].eval()


def check_close(place: Path, losses: list, alone: tuple) -> None:
    check_losses(losses, alone[1], norms=1e-4)
    assert len(losses) == 20
    # Adam amplifies rounding where gradients are tiny, by lr at most.
    for x, y in zip(network(place).parameters(), network(alone[0]).parameters(), strict=True):
        assert (x - y).abs().max() < 2e-4


def test_two_shards_train_as_one_process_and_become_one_file(alone, two, tmp_path):
    check_close(*two, alone)
    convert(two[0] / "run", tmp_path / "one.safetensors", "native")
    one = load_unet(tmp_path / "one.safetensors")[0].state_dict()
    own = network(two[0], "ema-0.050").state_dict()
    assert one.keys() == own.keys() and all(torch.equal(one[key], own[key]) for key in own)


@pytest.mark.parametrize(
    "world, each, flags",
    [(2, 2, {}), (2, 2, {"shard": "grad"}), (4, 2, FULL), (2, 2, {**FULL, "accum": 2})],
    ids=["ddp", "grad", "two hosts", "accum"],
)
def test_however_ranks_share_the_network_the_run_is_the_same(alone, tmp_path, world, each, flags):
    said = ranks(world, trained, tmp_path, flags, each=each)
    assert said == [said[0]] * world
    check_close(tmp_path, said[0], alone)
    shards = each if "shard" in flags else 1
    assert len(state_files(checkpoints(tmp_path / "run")[-1])) == shards


def test_blocks_that_are_gathered_in_bf16_learn_as_those_in_fp32(alone, tmp_path):
    first, _ = ranks(2, trained, tmp_path, {**FULL, "dtype": "bf16"})
    assert [loss for loss, _ in first] == pytest.approx([loss for loss, _ in alone[1]], rel=5e-3)
    assert [loss for loss, _ in first] != pytest.approx([loss for loss, _ in alone[1]], rel=1e-6)


def test_times_are_not_rounded_to_bf16(tmp_path):
    seen = torch.tensor(ranks(2, times, tmp_path)[0])
    assert len(seen) == 4 and not torch.equal(seen, seen.bfloat16().float())


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_in_a_save_costs_no_bit(two, tmp_path, victim):
    assert None in ranks(2, killed, tmp_path, FULL, victim, 160)
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"{80:012d}"]
    assert ranks(2, trained, tmp_path, FULL)[1] == two[1][10:]
    check_bits(newest(tmp_path), newest(two[0]))


@pytest.mark.parametrize("optim", ["adamw", "adamw8bit", "adamw32bit"])
def test_each_rank_gets_back_what_it_held_element_by_element(tmp_path, optim):
    said = ranks(2, stepped, tmp_path, {**FULL, "optim": optim}, 3)
    for before, after in said:
        assert before == after and len(before) > 400
    # They hold different parts.
    differ = [key for key in said[0][0] if said[0][0][key] != said[1][0][key]]
    assert len(differ) > 300


def test_four_then_two_then_one_rank_hold_the_same(tmp_path):
    ranks(4, stepped, tmp_path, FULL, 3)
    found = [ranks(n, whole, tmp_path, FULL, True)[0] for n in (4, 2)]
    found += [whole(ONE, tmp_path, FULL, True)]
    # One file by now; and from that to shards again.
    assert [path.name for path in state_files(checkpoints(tmp_path / "run")[-1])] == [
        "state.safetensors"
    ]
    found += [ranks(2, whole, tmp_path, FULL)[0]]
    assert len(found[0]) > 400
    for other in found[1:]:
        assert other == found[0]


def test_eight_bit_moments_stay_in_as_many_shards(tmp_path):
    flags = {**FULL, "optim": "adamw8bit"}
    ranks(2, stepped, tmp_path, flags, 1)
    with pytest.raises(UserError, match="are in 2 pieces, now there are 1.*Resume with 2 shards"):
        opened(ONE, tmp_path, flags)


# ---- what is refused ----------------------------------------------------------------------------


def copied(two: tuple, place: Path) -> Path:
    """The newest checkpoint of the run, which has no final picture yet, in a new place."""
    shutil.copytree(two[0] / "run", place / "run")
    return checkpoints(place / "run")[-1]


def refused(place: Path) -> str:
    with pytest.raises(UserError) as caught:
        train.train(config(place, FULL), ONE)
    line = str(caught.value)
    # A run that was refused late holds its lock for as long as its frames live.
    del caught
    gc.collect()
    assert "\n" not in line
    return line


def test_a_missing_shard_is_named(two, tmp_path):
    folder = copied(two, tmp_path)
    (folder / "state-rank1of2.safetensors").unlink()
    assert "state-rank1of2.safetensors is missing" in refused(tmp_path)
    (folder / DIGESTS).unlink()
    assert "no complete checkpoint in 2 shards: 1 are missing" in refused(tmp_path)


def test_shards_of_another_number_of_ranks_are_refused(two, tmp_path):
    folder = copied(two, tmp_path)
    (folder / "state-rank1of2.safetensors").rename(folder / "state-rank1of3.safetensors")
    (folder / DIGESTS).unlink()
    assert "no complete checkpoint in" in refused(tmp_path)
    (folder / "state-rank1of3.safetensors").unlink()
    shutil.copy(folder / "state-rank0of2.safetensors", folder / "state-rank1of2.safetensors")
    assert "it says it is number 0 of 2" in refused(tmp_path)


def test_shards_of_another_run_are_refused(two, tmp_path):
    folder, other = copied(two, tmp_path), tmp_path / "other"
    ranks(2, stepped, other, {**FULL, "seed": 1}, 20)
    strange = checkpoints(other / "run")[-1]
    assert strange.name == folder.name
    shutil.copy(strange / "state-rank1of2.safetensors", folder)
    assert "is damaged, or of another run" in refused(tmp_path)
    (folder / DIGESTS).unlink()
    assert "state-rank1of2.safetensors is no shard of this checkpoint" in refused(tmp_path)
    shutil.copy(strange / "state-rank0of2.safetensors", folder)
    assert "belong to other weights" in refused(tmp_path)


def test_compile_and_shards_do_not_go_together(tmp_path):
    with pytest.raises(UserError, match="--shard full --compile: wanted one of them"):
        train.setup(config(tmp_path, {**FULL, "compile": True}), ONE)
    assert not (tmp_path / "run").exists()


# ---- what is shown ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["full", "grad"])
def test_an_average_is_shown_and_the_weights_stay(two, tmp_path, how):
    copied(two, tmp_path)
    first, own, average, again = ranks(2, shown, tmp_path, how)[0]
    x, t = torch.ones(2, 32, 4, 4), torch.full((2,), 500.0)
    found = []
    for name in ("model", "ema-0.050"):
        with torch.no_grad():
            found.append(float(network(two[0], name)(x, t).double().square().mean()))
    assert abs(found[0] / found[1] - 1) > 1e-3
    assert [own, average, again] == pytest.approx([found[0], found[1], found[0]], rel=1e-5)
    assert first == pytest.approx(held_out_loss(opened(ONE, tmp_path, {}))["loss"], rel=1e-5)


def test_every_rank_is_asked_equally_often_and_no_image_counts_twice():
    held = open_dataset("toyfaces:40", resolution=32).heldout
    calls = []

    def loss(batch):
        calls[-1] += 1
        return type("Loss", (), {"per_sample": batch["eps"].flatten(1).mean(1)})

    def total(world: int, even: bool) -> list[float]:
        sums = torch.zeros(heldout.TIMES, dtype=torch.float64)
        for rank in range(world):
            calls.append(0)
            group = Ranks(rank, world, torch.device("cpu"))
            group.all_reduce = lambda x: x
            row = heldout.loss_of(loss, held, [], (4, 4, 4), 0, group, even=even)
            sums += torch.tensor(row["loss_by_t"], dtype=torch.float64)
        return sums.tolist()

    want, world = total(1, False), 1 + len(held) * heldout.TIMES
    calls.clear()
    assert total(world, True) == pytest.approx(want, rel=1e-9) and calls == [1] * world


def test_the_plan_of_a_rank_is_what_it_holds(tmp_path, monkeypatch):
    cfg, cpu = config(tmp_path, FULL), torch.device("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    net, vae = build(PRESETS["nano"]), pixel(8)
    whole = plan_of(net, vae, (32, 4, 4), cfg, Ranks(0, 1, cpu))
    plan = plan_of(net, vae, (32, 4, 4), cfg, Ranks(0, 4, cpu))  # two hosts of two
    assert plan.moments == whole.moments // 2 and plan.averages == whole.averages // 2
    assert plan.weights > whole.weights // 2 and plan.gradients == whole.gradients // 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="4 ranks, of which 3 are on this host"):
        check_sharding(cfg, Ranks(0, 4, cpu))


def test_bf16_weights_and_shards_do_not_go_together(tmp_path):
    flags = {**FULL, "weights": "bf16", "optim": "adamw8bit", "dtype": "bf16"}
    with pytest.raises(UserError, match="--shard full --weights bf16: wanted one of them"):
        train.setup(config(tmp_path, flags), ONE)
    assert not (tmp_path / "run").exists()


def test_jobs_are_dealt_out_evenly():
    assert evenly([1, 2, 3], 2) == [1, 2, 3, 1] and evenly([1, 2], 5) == [1, 2, 1, 2, 1]
    assert evenly([1, 2], 2) == [1, 2]
    x = torch.arange(6)
    assert local(x) is x and part(x, x) is x
