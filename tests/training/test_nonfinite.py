"""Non-finite steps, of which a GPU's host learns a step late: all as if it had known at once."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import model
import train
from data.dataset import Stream
from harness.cli import UserError
from harness.run import checkpoints
from objectives import Objective
from train import Config, Ranks, resolve
from training.checkpoints import save
from training.nonfinite import reads_late, conclude
from training.optimizer import make_optimizer

ALONE = Ranks(0, 1, torch.device("cpu"))
SMALL = dict(model="nano", data="toyfaces:48", resolution=32, batch=8, preview_every=0)
# Some steps have a line of the log, a checkpoint or an evaluation, others none.
OFTEN = dict(images=104, log_every=24, save_every=40, eval_every=32, keep=9, ema=(0.05, 0.1))


@pytest.fixture(autouse=True)
def no_last_picture(monkeypatch):
    monkeypatch.setattr(train, "draw_samples", lambda *a, **k: torch.zeros(32, 3, 8, 8).byte())


@pytest.fixture
def trouble(monkeypatch):
    """Steps 2, 3, 7 and 13 with a NaN in their noise, and step 5 with a finite loss of infinite
    slope; of step 9 a gradient is too large for its square."""
    sample, loss = Stream.__getitem__, Objective.loss

    def poisoned(self, position):
        found = sample(self, position)
        if position in (11, 16, 55, 99):
            found["eps"] = found["eps"] * math.nan
        return found

    def steep(self, net, x0, **given):
        out = loss(self, net, x0, **given)
        first = int(given["position"][0]) if given.get("position") is not None else -1
        if 32 <= first < 40:
            return out._replace(loss=out.loss + (out.loss - out.loss.detach()).abs().sqrt())
        if 64 <= first < 72:
            return out._replace(loss=out.loss * 1e25)
        return out

    monkeypatch.setattr(Stream, "__getitem__", poisoned)
    monkeypatch.setattr(Objective, "loss", steep)


def make_late(monkeypatch):
    monkeypatch.setattr(train, "reads_late", lambda tr: True)


def go(out, **fields):
    """(tensors of the newest checkpoint, lines of the log) of a run, or of its rest."""
    cfg = resolve(Config(**{**SMALL, **OFTEN, "out": str(out), **fields}))
    train.train(cfg, ALONE)
    run = out / cfg.name
    tensors = {}
    for file in checkpoints(run)[-1].glob("*.safetensors"):
        tensors |= {f"{file.stem}:{key}": x for key, x in load_file(file).items()}
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    changing = ("time", "images_per_s", "command", "config")
    return tensors, [{k: v for k, v in line.items() if k not in changing} for line in lines]


def same(a, b):
    assert a.keys() == b.keys() and len(a) > 300
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


@pytest.mark.parametrize(
    "optim, accum", [("adamw", 1), ("adamw", 2), ("adamw8bit", 1), ("adamw32bit", 1)]
)
def test_late_or_at_once_is_the_same_run(tmp_path, monkeypatch, trouble, capsys, optim, accum):
    at_once, lines = go(tmp_path / "now", optim=optim, accum=accum)
    told = capsys.readouterr().out.replace("/now/", "/")
    make_late(monkeypatch)
    late, later = go(tmp_path / "late", optim=optim, accum=accum)
    same(at_once, late)
    assert lines == later
    words = [text.split("images  loss")[0] for text in told.splitlines()]
    again = capsys.readouterr().out.replace("/late/", "/").splitlines()
    assert words == [text.split("images  loss")[0] for text in again]
    bad = {line["images"]: line for line in lines if line["event"] == "non-finite"}
    assert list(bad) == [16, 24, 40, 56, 72, 104]
    assert [line["in_a_row"] for line in bad.values()] == [1, 2, 1, 1, 1, 1]
    if accum == 1:
        assert all("layer input_blocks.0.0, t = " in bad[n]["where"] for n in (16, 24, 56, 104))
    assert "gradient of out.2.bias (forward is finite)" in bad[40]["where"]
    assert "gradient of " in bad[72]["where"]
    assert [line for line in lines if line["event"] == "train"][-1]["skipped"] == 6


def test_an_interrupted_run_that_reads_late_ends_the_same(tmp_path, monkeypatch, trouble):
    make_late(monkeypatch)
    whole, lines = go(tmp_path)
    run = next(tmp_path.iterdir())
    for folder in checkpoints(run)[1:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert [folder.name for folder in checkpoints(run)] == [f"{40:012d}"]
    again, after = go(tmp_path)
    same(whole, again)
    assert [line for line in after if line["event"] != "start"] == lines[1:]


def test_ten_in_a_row_stop_where_they_would_have_stopped_at_once(tmp_path, monkeypatch):
    def sick(cfg, ranks):
        tr = train.setup(cfg, ranks)
        tr.net.middle_block[0].in_layers[2].bias.data[0] = math.inf
        return tr

    ends = {}
    for name in ("now", "late"):
        if name == "late":
            make_late(monkeypatch)
        cfg = resolve(Config(**{**SMALL, **OFTEN, "out": str(tmp_path / name), "images": 400}))
        with pytest.raises(UserError, match="10 non-finite steps in a row") as error:
            train.train(cfg, ALONE, setup=sick)
        run = tmp_path / name / cfg.name
        files = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
        ends[name] = str(error.value).replace(f"/{name}/", "/"), files
    assert ends["now"] == ends["late"]
    assert "bad-batch-000000000080-rank0.pt" in ends["late"][1]
    assert f"ckpt/{80:012d}/model.safetensors" in ends["late"][1]


# ---- one step -----------------------------------------------------------------------------------


def trainer(tmp_path, **fields):
    """A run before its first step, which reads late, and its batches."""
    cfg = resolve(Config(**{**SMALL, **OFTEN, "out": str(tmp_path), **fields}))
    tr = train.setup(cfg, ALONE)
    tr.late = True
    return tr, train.load(tr)


def everything(tr):
    """Copies of weights, averages and the optimizer's tensors."""
    found = {f"weights {name}": p for name, p in tr.params.items()}
    for width, weights in tr.ema.weights.items():
        found |= {f"{width} {name}": x for name, x in weights.items()}
    for name, p in tr.params.items():
        found |= {f"{key} {name}": x for key, x in tr.optimizer.state[p].items()}
    return {key: x.detach().clone() for key, x in found.items()}


@pytest.mark.parametrize("optim", ["adamw", "adamw8bit"])
def test_the_optimizer_itself_leaves_out_a_step_that_is_not_finite(tmp_path, optim):
    tr, loader = trainer(tmp_path, optim=optim)
    train.step(tr, loader)
    conclude(tr)
    before = everything(tr)
    batch = next(loader)
    train.step(tr, iter([{**batch, "eps": batch["eps"] * math.inf}]))
    same(before, everything(tr))
    assert tr.skipped == 0
    conclude(tr)
    same(before, everything(tr))
    assert tr.skipped == tr.bad == 1
    train.step(tr, loader)
    conclude(tr)
    after = everything(tr)
    assert not torch.equal(after["weights out.2.weight"], before["weights out.2.weight"])
    assert not torch.equal(after["0.050 out.2.weight"], before["0.050 out.2.weight"])
    assert tr.bad == 0 and tr.skipped == 1


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: numbers read out of tensors, sizes that hang on them."""

    ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.ASKS:
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def waits_of(tr, loader, monkeypatch) -> list[str]:
    """What two steps wait for."""
    train.step(tr, loader)
    with Waits() as counter, monkeypatch.context() as patch:
        for name in ("tolist", "cpu"):
            real = getattr(torch.Tensor, name)

            def asked(self, *args, name=name, real=real):
                counter.seen.append(name)
                return real(self, *args)

            patch.setattr(torch.Tensor, name, asked)
        train.step(tr, loader)
        train.step(tr, loader)
    return counter.seen


@pytest.mark.parametrize("objective", ["fm", "ddpm"])
def test_nothing_in_a_step_waits_for_the_device(tmp_path, monkeypatch, objective):
    tr, loader = trainer(tmp_path, objective=objective, dtype="bf16", classes=("* hair",))
    # These look at tensors of the CPU only, wherever the batch is.
    ends = tr.objective.t_min, tr.objective.t_max
    monkeypatch.setattr(model, "check_labels", lambda *_: None)
    monkeypatch.setattr(Objective, "t_min", ends[0])
    monkeypatch.setattr(Objective, "t_max", ends[1])
    assert waits_of(tr, loader, monkeypatch) == []
    tr.late = False
    assert waits_of(tr, loader, monkeypatch) == 2 * ["_local_scalar_dense"]


def test_an_open_step_is_not_saved(tmp_path, monkeypatch):
    make_late(monkeypatch)
    tr = train.setup(resolve(Config(**{**SMALL, **OFTEN, "out": str(tmp_path)})), ALONE)
    train.step(tr, train.load(tr))
    with pytest.raises(RuntimeError, match="conclude"):
        save(tr)
    conclude(tr)
    save(tr)
    assert checkpoints(tr.run)


@pytest.mark.parametrize(
    "device, optimizer, own, late",
    [
        ("cuda", "adamw", {}, True),
        ("cuda", "adamw8bit", {}, True),
        ("cpu", "adamw", {}, False),
        # Parts of the loss that step after the optimizer, as distill.py's local heads do.
        ("cuda", "adamw", {"heads/0": torch.zeros(1)}, False),
        # It knows no found_inf.
        ("cuda", "sgd", {}, False),
    ],
)
def test_who_can_be_asked_late(device, optimizer, own, late):
    net = torch.nn.Linear(2, 2)
    how = SimpleNamespace(optim=optimizer, lr=0.1, weight_decay=0.0, weights="fp32")
    made = torch.optim.SGD(net.parameters(), 0.1)
    if optimizer != "sgd":
        made = make_optimizer(net, how)
    ranks = SimpleNamespace(device=torch.device(device))
    loss = SimpleNamespace(state_dict=lambda: own)
    assert reads_late(SimpleNamespace(net=net, optimizer=made, ranks=ranks, loss=loss)) is late
