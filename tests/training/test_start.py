"""What a run starts from: rows of a class embedding go by the names of the classes."""

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import randomize
from safetensors.torch import load_file

import distill
import samplers
import train
from ckpt import load_unet, save_unet
from ckpt.convert import inspect
from ckpt.native import Source
from harness.cli import UserError
from harness.files import Container, Entry
from model import PRESETS, build, network_name
from objectives import make_objective
from test_train import ALONE, FAST, go
from train import Config, resolve
from training.start import ROWS, same_init, take_weights
from vae import pixel

NANO = replace(PRESETS["nano"], in_channels=3, out_channels=3)
SIT = replace(PRESETS["sit-nano"], in_channels=3, out_channels=3, pos_max=32)


def network(classes, seed, cfg=NANO):
    return randomize(build(replace(cfg, num_classes=classes)), seed).eval()


def opened(net, meta):
    """A network as if its file were open."""
    table = {
        name: Entry(x.dtype, tuple(x.shape), x.clone) for name, x in net.state_dict().items()
    }
    return Source(net.cfg, Container("f", "safetensors", table, {}), meta, "native", {})


@pytest.mark.parametrize("cfg", [NANO, SIT], ids=["unet", "transformer"])
@pytest.mark.parametrize(
    "theirs, ours, taken, new, dropped",
    [
        (["a", "b", "c"], ["a", "b", "c"], "a, b, c", "none", "none"),
        (["a", "b", "c"], ["c", "a", "b"], "c, a, b", "none", "none"),
        (["a", "b", "c"], ["d", "b"], "b", "d", "a, c"),
        (["a"], ["b", "a", "c"], "a", "b, c", "none"),
        (["é"], ["e\N{COMBINING ACUTE ACCENT}"], "e\N{COMBINING ACUTE ACCENT}", "none", "none"),
        ([], ["a", "b"], "none", "a, b", "none"),
        (["a", "b"], [], "none", "none", "a, b"),
        (["a"], ["b"], "none", "b", "a"),
    ],
)
def test_each_class_takes_its_own_row_by_name(theirs, ours, taken, new, dropped, cfg):
    other, net = network(len(theirs), 0, cfg), network(len(ours), 1, cfg)
    rows, _ = ROWS[network_name(cfg)]
    begun = net.state_dict().get(rows, torch.zeros(0)).clone()

    def equal(a, b):
        # A transformer's "no class" becomes a bias where there are none: a sum in another order.
        return torch.allclose(a, b, rtol=0, atol=0 if cfg is NANO else 1e-5)

    meta = {"classes": theirs} if theirs else {}
    line = take_weights(net, opened(other, meta), ours, "--init f")
    assert line == f"classes of --init f: taken {taken}; new {new}; dropped {dropped}"
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(1, 3, 32, 32, generator=g), torch.full((1,), 500.0)
    assert equal(net(x, t), other(x, t))
    before = {"é": 0} if theirs == ["é"] else {name: i for i, name in enumerate(theirs)}
    for row, name in enumerate(ours):
        at = 0 if before.keys() == {"é"} else before.get(name)
        if at is None:
            assert torch.equal(net.state_dict()[rows][row], begun[row])
            continue
        assert torch.equal(net.state_dict()[rows][row], other.state_dict()[rows][at])
        one, two = torch.tensor([row]), torch.tensor([at])
        assert equal(net(x, t, y=one), other(x, t, y=two))


@pytest.mark.parametrize(
    "rows, meta, ours, message",
    [
        (3, {}, ["a", "b"], "has 3 classes without names, and --classes has 2.  Give 3 --classes"),
        (3, {"classes": ["a", "b"]}, ["a"], "has 3 rows for classes and names 2"),
        (2, {"classes": ["a", "a"]}, ["a"], "of which 1 are names of their own"),
        (2, {"classes": ["a", 7]}, ["a"], "of which 1 are names of their own"),
        (0, {"classes": ["a"]}, ["a"], "has 0 rows for classes and names 1"),
    ],
)
def test_names_that_do_not_fit_are_refused(rows, meta, ours, message):
    with pytest.raises(UserError, match=message):
        take_weights(network(len(ours), 1), opened(network(rows, 0), meta), ours, "--init f")


def test_a_file_without_names_goes_by_number_where_the_counts_agree():
    other, net = network(2, 0), network(2, 1)
    line = take_weights(net, opened(other, {}), ["a", "b"], "f")
    assert line == "classes of f (by number: it names none): taken a, b; new none; dropped none"
    rows, _ = ROWS["UNet"]
    assert torch.equal(net.state_dict()[rows], other.state_dict()[rows])
    line = take_weights(network(0, 1), opened(other, {}), [], "f")
    assert line.endswith("taken none; new none; dropped number 0, number 1")
    assert take_weights(network(0, 1), opened(network(0, 0), {}), [], "f") == ""


def test_training_begins_with_the_rows_of_the_names(tmp_path, capsys):
    path = tmp_path / "init.safetensors"
    names = ["smile", "glasses", "double bun"]
    first = pixel(1)
    meta = {"objective": "fm", "classes": names, "vae": first.meta()}
    other = network(3, 0)
    save_unet(path, other, meta)
    cfg = Config(
        **{**FAST, "out": str(tmp_path / "runs"), "vae": "pixel", "init": str(path),
           "classes": ("glasses", "bow", "smile")}
    )  # fmt: skip
    tr = train.setup(resolve(cfg), ALONE)
    assert "taken glasses, smile; new bow; dropped double bun" in capsys.readouterr().out
    rows, _ = ROWS["UNet"]
    got, had = tr.net.state_dict()[rows], other.state_dict()[rows]
    assert torch.equal(got[0], had[1]) and torch.equal(got[2], had[0])
    assert tr.classes == ["glasses", "bow", "smile"]


def test_a_start_is_read_in_fp32_known_again_and_compared_with_its_fingerprint(tmp_path, user):
    path, first = tmp_path / "init.safetensors", pixel(1).meta()
    save_unet(path, network(0, 0).bfloat16(), {"objective": "fm", "vae": first})
    flags = {**FAST, "out": str(tmp_path / "runs"), "vae": "pixel", "init": str(path)}
    cfg = resolve(Config(**flags, name="a"))
    tr = train.setup(cfg, ALONE)
    for name, x in load_file(path).items():
        own = tr.net.state_dict()[name]
        assert x.dtype == torch.bfloat16 and own.dtype == torch.float32
        assert torch.equal(own, x.float()), name
    # Wherever it lies now; another network is another.
    saved = tr.run / "ckpt" / f"{8:012d}" / "model.safetensors"
    saved.parent.mkdir(parents=True)
    save_unet(saved, network(0, 2), {"init": tr.init})
    shutil.move(path, tmp_path / "moved.safetensors")
    assert same_init(replace(cfg, init=str(tmp_path / "moved.safetensors")), tr.run)
    save_unet(path, network(0, 1), {"objective": "fm", "vae": first})
    assert not same_init(cfg, tr.run)
    damaged = bytearray(path.read_bytes())
    damaged[-9] ^= 1
    path.write_bytes(damaged)
    words = [word for key, value in flags.items() for word in (f"--{key.replace('_', '-')}", value)]
    code, _, err = user(train.main, *words, "--name", "b")
    assert code == 2 and len(err) == 1 and "do not match their own fingerprint" in err[0], err
    assert not (tmp_path / "runs/b").exists()


# ---- a noise schedule of the user's ------------------------------------------------------------


def test_training_with_betas_is_recorded_and_resumes_exactly(tmp_path, user):
    """Also from a command that spells them in another way."""
    how = dict(objective="v", zero_snr=True, images=24, save_every=16)
    run = go(tmp_path, **how, betas="0.0015,0.0195,scaled_linear")
    last = run / "ckpt/000000000024"
    once = load_file(last / "state.safetensors") | load_file(last / "model.safetensors")
    meta = load_unet(run)[1]
    # Killed after 16 images.
    shutil.rmtree(last)
    (run / "samples/final.png").unlink()
    assert go(tmp_path, **how, betas="1.5e-3, 0.0195, sqrt") == run
    twice = load_file(last / "state.safetensors") | load_file(last / "model.safetensors")
    assert once.keys() == twice.keys() and all(torch.equal(once[k], twice[k]) for k in once)
    wanted = make_objective("v", table="0.0015,0.0195,scaled_linear", zero_snr=True)
    assert meta["objective"]["table"] == wanted.table and meta["objective"]["zero_snr"]
    assert meta["config"]["table"] == wanted.table
    shown = "\n".join(inspect(str(run)))
    assert "betas        0.0015 to 0.0195, scaled_linear" in shown
    assert "objective and noise schedule by its own metadata" in shown
    with pytest.raises(UserError, match="table"):
        go(tmp_path, **how, betas="0.0015,0.0196,scaled_linear")


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(betas="0.0015,0.0195,linear"), "--table 0.0015,0.0195,linear is a noise schedule of"),
        (dict(objective="ddpm", betas="0.5,0.9,linear"), "--betas: table 0.5,0.9,linear: its"),
        (dict(objective="ddpm", betas="0.02"), "--betas: betas '0.02': wanted START,END,SCHEDULE"),
        (dict(objective="v", betas="0.001,0.02,linear", table="cosine"), "is not --table cosine"),
        (dict(objective="ddpm", betas="0.001,0.1,linear", zero_snr=True), "with target eps"),
        (dict(objective="ddpm", betas="0.01,0.1,linear"), "or betas as large"),
    ],
)  # fmt: skip
def test_betas_that_cannot_be_trained_are_refused(fields, message):
    with pytest.raises(UserError) as error:
        resolve(Config(**{**FAST, **fields}))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "init, message",
    [
        (None, "init is missing"),
        ({"path": None}, "init.fingerprint is missing"),
        ("scratch", "init is 'scratch'"),
    ],
)
def test_a_run_whose_network_does_not_say_what_it_began_with_is_one_line(tmp_path, init, message):
    """For a student's teacher and for --init that moved: it says what they are compared with."""
    file = tmp_path / "ckpt" / f"{8:012d}" / "model.safetensors"
    file.parent.mkdir(parents=True)
    save_unet(file, network(0, 0), {"init": init} if init else {})
    for ask in (
        lambda: distill.check_contents(distill.Config(), tmp_path),
        lambda: same_init(Config(init="f"), tmp_path),
    ):
        with pytest.raises(UserError, match=message) as error:
            ask()
        assert str(file) in str(error.value)


def test_a_transformer_knows_a_place_for_every_token_and_no_more(tmp_path, user):
    run = go(tmp_path, model="sit-nano")
    net, _ = load_unet(run)
    assert net.cfg.pos_max == 4  # 32 px are 4×4 latents
    words = ["--ckpt", run, "--n", "1", "--out", tmp_path / "s", "--device", "cpu"]
    code, _, err = user(samplers.main, *words, "--resolution", "40")
    assert code == 2 and len(err) == 1
    assert all(word in err[0] for word in ("--resolution 40", "at most 32", "Try --resolution 32"))
    assert user(samplers.main, *words, "--steps", "1", "--resolution", "16")[0] == 0
    words = ["--model", "sit-nano", "--data", "toyfaces:24", "--resolution", "64", "--init", run]
    code, _, err = user(train.main, *words, "--name", "larger", "--out", tmp_path)
    assert code == 2 and "places for 4×4 tokens, and this --resolution makes 8×8" in err[-1]
    assert not (tmp_path / "larger").exists()
    sizes = ["--model", "sit-s", "--data", "toyfaces:24", "--resolution", "40", "--out", tmp_path]
    code, _, err = user(train.main, *sizes)
    assert code == 2 and "5×5 latents; sit-s needs a side that is divisible by 2" in err[-1]
