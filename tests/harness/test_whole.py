"""What was written is what is read: a run's files that are damaged, swapped or another run's are
named before a byte is written, and an older checkpoint that is whole is named, not taken."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval_fid
import samplers
import train
from ckpt import __main__ as ckpt
from ckpt import load_unet, read_tensors
from harness.files import DIGESTS, write_tensors
from harness.run import checkpoints
from vae import load_vae, save_vae

OLD, NEW = "ckpt/000000000004", "ckpt/000000000008"


def flags(out, **more):
    fields = {"model": "nano", "data": "toyfaces:6", "resolution": 32, "batch": 4, "images": 12}
    fields |= {"save_every": 4, "keep": 3, "eval_every": 0, "preview_every": 0, "name": "run"}
    fields |= {"holdout": 0, **more, "out": out}
    return [w for k, v in fields.items() for w in (f"--{k.replace('_', '-')}", str(v))]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Drawing takes long, and is not the subject."""
    black = torch.zeros(32, 3, 32, 32, dtype=torch.uint8)
    monkeypatch.setattr(train, "draw_samples", lambda *how, **more: black)


def contents(run: Path):
    """Every tensor of the checkpoint at the end."""
    files = sorted((run / "ckpt/000000000012").iterdir())
    return {f"{file.name} {key}": x for file in files for key, x in load_file(file).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(a run with checkpoints at 4 and 8 of 12 images, what it has at 12, another seed's run)."""
    out = tmp_path_factory.mktemp("whole")
    for name, seed in (("run", 0), ("other", 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                train, "draw_samples", lambda *how, **more: torch.zeros(32, 3, 8, 8).byte()
            )
            patch.setattr("sys.argv", ["train.py", *flags(out, name=name, seed=seed)])
            train.main()
    end = contents(out / "run")
    shutil.rmtree(out / "run/ckpt/000000000012")
    (out / "run/samples/final.png").unlink()
    return out / "run", end, out / "other"


@pytest.fixture
def run(begun, tmp_path):
    return Path(shutil.copytree(begun[0], tmp_path / "run"))


def flip(path, share):
    data = bytearray(path.read_bytes())
    data[int(share * (len(data) - 1))] ^= 4
    path.write_bytes(data)


def swap(run):
    a, b = run / NEW / "ema-0.050.safetensors", run / NEW / "ema-0.100.safetensors"
    a.rename(run / "x")
    b.rename(a)
    (run / "x").rename(b)


def drop_moments(run, names=("exp_avg/",)):
    path = run / NEW / "state.safetensors"
    tensors, meta = read_tensors(path)
    write_tensors(path, {k: v for k, v in tensors.items() if not k.startswith(names)}, meta)


def take(name, source=OLD):
    def copy(run):
        shutil.copy(run / source / name, run / NEW / name)

    return copy


def rename(run):
    (run / NEW).rename(run / "ckpt/000000000010")


# name: (what happens to a run, what the error names)
DAMAGE = {
    "a bit of the moments": (lambda run: flip(run / NEW / "state.safetensors", 0.7), "state"),
    "a bit of the counters": (lambda run: flip(run / NEW / "state.safetensors", 0), "state"),
    "a bit of the last byte": (lambda run: flip(run / NEW / "state.safetensors", 1), "state"),
    "a bit of the weights": (lambda run: flip(run / NEW / "model.safetensors", 0.5), "model"),
    "a bit of an EMA": (lambda run: flip(run / NEW / "ema-0.100.safetensors", 0.9), "ema-0"),
    "swapped EMAs": (swap, "ema-0"),
    "missing moments": (drop_moments, "state"),
    "missing EMA": (lambda run: (run / NEW / "ema-0.050.safetensors").unlink(), "ema-0"),
    "missing state": (lambda run: (run / NEW / "state.safetensors").unlink(), "state"),
    "weights of another step": (take("model.safetensors"), "model"),
    "moments of another step": (take("state.safetensors"), "state"),
    "list of another step": (take(DIGESTS), "000000000008"),
    "a bit of the list": (lambda run: flip(run / NEW / DIGESTS, 0.6), DIGESTS),
    "another step's number": (rename, "000000000010 holds a checkpoint of another step"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_checkpoint_that_is_not_as_it_was_written_stops_the_run_in_one_line(run, user, how):
    damage, name = DAMAGE[how]
    damage(run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    code, out, err = user(train.main, *flags(run.parent))
    assert code == 2 and len(err) == 1 and name in err[0], err
    newest = checkpoints(run)[-1]
    assert f"{run / OLD} is whole: name that one, or move {newest} away to go on from it." in err[0]
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_an_older_checkpoint_is_taken_only_when_told_and_ends_where_the_run_would_have(
    begun, run, user
):
    flip(run / NEW / "state.safetensors", 0.7)
    (run / NEW).rename(run / "aside")
    code, out, err = user(train.main, *flags(run.parent))
    assert code == 0 and f"resuming {run} at 4 of 12 images" in out, err
    assert same(contents(run), begun[1])


def test_without_an_older_one_that_is_whole_this_is_said(run, user):
    for folder in (OLD, NEW):
        flip(run / folder / "state.safetensors", 0.7)
    _, _, err = user(train.main, *flags(run.parent))
    assert "state.safetensors" in err[0] and "no older one of its run that is whole" in err[0]
    (run / OLD / DIGESTS).unlink()
    _, _, err = user(train.main, *flags(run.parent))
    assert f"Use {run / OLD}, which has no {DIGESTS} to check it by" in err[0]


COMMANDS = {
    "samplers.py": (samplers.main, ["--ckpt"]),
    "inspect": (ckpt.main, ["inspect"]),
    "verify": (ckpt.main, ["verify", "A"]),
    "convert": (ckpt.main, ["convert", "--layout", "native", "A"]),
    "--init": (train.main, [*flags("elsewhere"), "--init"]),
    "eval_fid.py": (eval_fid.main, ["--n", "8", "--features", "pca", "--ckpt"]),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("how", ["swapped EMAs", "missing EMA", "a bit of an EMA"])
def test_whoever_reads_a_file_of_a_checkpoint_checks_it(run, user, monkeypatch, command, how):
    monkeypatch.chdir(run.parent)
    DAMAGE[how][0](run)
    main, words = COMMANDS[command]
    name = "ema-0.100" if how == "a bit of an EMA" else "ema-0.050"
    file = run / NEW / f"{name}.safetensors" if how != "missing EMA" else run
    words = [str(run / NEW / "model.safetensors") if word == "A" else word for word in words]
    words = [*words, str(file)]
    if command == "convert":
        words = [*words[:3], str(file), "out.safetensors"]
    code, _, err = user(main, *words)
    assert code == 2 and len(err) == 1 and f"{name}.safetensors is" in err[0], err
    assert f"{run / OLD} is whole" in err[0]
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_a_file_that_was_copied_alone_counts_by_its_own_fingerprint(run, tmp_path):
    lone = tmp_path / "lone.safetensors"
    shutil.copy(run / NEW / "ema-0.100.safetensors", lone)
    assert load_unet(lone)[1]["ema"] == 0.1


# ---- a run without lists, and what lies beside its checkpoints ----------------------------------


def forget(run):
    for folder in (OLD, NEW):
        (run / folder / DIGESTS).unlink()


def test_a_run_of_before_there_were_lists_goes_on_and_a_lost_list_is_said(begun, run, user):
    forget(run)
    code, out, err = user(train.main, *flags(run.parent))
    assert code == 0 and err == [
        f"warning: {run / NEW} has lost its {DIGESTS}: only the weights can be checked."
    ]
    assert same(contents(run), begun[1])


def test_without_a_list_missing_moments_are_still_noticed(run, user):
    forget(run)
    drop_moments(run, ("exp_avg/out.2.", "exp_avg_sq/out.2.", "step/out.2."))
    code, _, err = user(train.main, *flags(run.parent))
    assert code == 2 and "is not the state of this network's optimizer: 2 of" in err[-1]
    assert "out.2.bias, out.2.weight" in err[-1]


@pytest.mark.parametrize("listed", [True, False])
def test_the_autoencoder_of_another_run_is_refused(begun, run, user, listed):
    if not listed:
        forget(run)
    vae = load_vae(run / "vae.safetensors")
    vae.mean[0] += 1
    save_vae(run / "vae.safetensors", vae)
    code, _, err = user(train.main, *flags(run.parent))
    assert code == 2 and "vae.safetensors is not the autoencoder that" in err[-1], err
    flip(run / "vae.safetensors", 0.8)
    code, _, err = user(train.main, *flags(run.parent))
    assert code == 2 and "do not match their own fingerprint" in err[-1], err
    (run / "vae.safetensors").unlink()
    code, _, err = user(train.main, *flags(run.parent))
    assert code == 0 and same(contents(run), begun[1])


def test_until_there_is_a_checkpoint_an_autoencoder_is_made_anew(begun, run, user):
    """It has trained nothing yet, and no checkpoint says whose it is."""
    shutil.rmtree(run / "ckpt")
    vae = load_vae(run / "vae.safetensors")
    vae.mean[0] += 1
    save_vae(run / "vae.safetensors", vae)
    code, _, err = user(train.main, *flags(run.parent))
    assert code == 0 and same(contents(run), begun[1])


def test_a_checkpoint_of_another_run_is_refused_by_its_config(begun, run, user):
    shutil.rmtree(run / NEW)
    shutil.copytree(begun[2] / NEW, run / NEW)
    code, _, err = user(train.main, *flags(run.parent))
    assert code == 2 and f"{run / NEW} was made with another config: seed 1 -> 0" in err[-1]


def test_a_finished_run_with_another_runs_checkpoint_is_not_finished(begun, run, user):
    end = "ckpt/000000000012"
    shutil.copytree(begun[2] / end, run / end)
    shutil.copy(begun[2] / "samples/final.png", run / "samples/final.png")
    code, _, err = user(train.main, *flags(run.parent))
    assert code == 2 and f"{run / end} was made with another config: seed 1 -> 0" in err[-1]


def test_a_checkpoint_that_began_with_other_weights_is_refused_and_a_move_is_not(
    tmp_path, begun, user
):
    """Two runs with the same flags up to --init: the weights decide, wherever they lie."""
    for name, init in (("one", begun[0]), ("two", begun[2])):
        assert user(train.main, *flags(tmp_path, name=name, init=init, images=8))[0] == 0
        (tmp_path / name / "samples/final.png").unlink()
    moved = shutil.copytree(begun[0], tmp_path / "moved")
    for init in (begun[0], moved):
        shutil.copytree(tmp_path / "one", tmp_path / "copy")
        code, *_ = user(train.main, *flags(tmp_path, name="copy", init=init, images=8))
        assert code == 0
        shutil.rmtree(tmp_path / "copy")
    shutil.rmtree(tmp_path / "one" / NEW)
    shutil.copytree(tmp_path / "two" / NEW, tmp_path / "one" / NEW)
    for init in (begun[0], moved):
        code, _, err = user(train.main, *flags(tmp_path, name="one", init=init, images=8))
        assert code == 2 and "was made with another config: init " in err[-1], err
