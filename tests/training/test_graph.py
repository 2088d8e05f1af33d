"""Steps whose passes are recorded once and replayed: refusals, and the same bits as without.

A recording here is a function that is called again and writes where it wrote first, as a CUDA graph
does. tests/gpu has the graph itself.
"""

import math
from types import SimpleNamespace

import pytest
import torch

import train
from conftest import randomize
from model import PRESETS, UNet
from train import Config, Ranks, resolve
from training import graph
from training.nonfinite import conclude

ALONE = Ranks(0, 1, torch.device("cpu"))
SMALL = dict(model="nano", data="toyfaces:48", resolution=32, batch=8, preview_every=0, graph=False)


class Recorder:
    """record() of training/graph.py without a GPU; `wrong` spoils what a replay writes."""

    def __init__(self, wrong=None):
        self.wrong, self.recorded, self.replays = wrong, 0, 0

    def __call__(self, run):
        self.recorded += 1
        outcome = run()

        def replay():
            self.replays += 1
            for place, value in zip(outcome, run(), strict=True):
                if place is not None:
                    place.copy_(value)
            if self.wrong:
                self.wrong(outcome)

        return replay, outcome


@pytest.fixture
def recorder(monkeypatch):
    """A run on a CPU may record, and does with this."""
    made = Recorder()
    monkeypatch.setattr(graph, "record", made)
    monkeypatch.setattr(graph, "obstacle", lambda tr: "")
    return made


def begin(out, **fields):
    cfg = resolve(Config(**{**SMALL, "images": 400, "out": str(out), **fields}))
    tr = train.setup(cfg, ALONE)
    return tr, train.load(tr)


def steps(out, n=8, poison=(), **fields):
    """(norm of each step, weights, meter) of a run's first steps."""
    tr, loader = begin(out, **fields)
    norms = []
    for i in range(n):
        batch = next(loader)
        if i in poison:
            batch = {**batch, "eps": batch["eps"] * math.nan}
        norms.append(train.step(tr, iter([batch])))
    conclude(tr)
    weights = {name: p.detach().clone() for name, p in tr.params.items()}
    return torch.stack(norms), weights, tr.meter.sums, tr.skipped


def same(a, b):
    """Do two runs agree to the bit?"""
    for x, y in zip((a[0], a[2], *a[1].values()), (b[0], b[2], *b[1].values()), strict=True):
        assert torch.equal(x.nan_to_num(-1.0), y.nan_to_num(-1.0))
    assert a[3] == b[3]


@pytest.mark.parametrize("dtype, optim", [("fp32", "adamw"), ("bf16", "adamw8bit")])
def test_replayed_steps_are_the_same_to_the_bit(tmp_path, recorder, capsys, dtype, optim):
    how = dict(dtype=dtype, optim=optim, classes=("* hair",), ema=(0.1,))
    plain = steps(tmp_path / "plain", **how)
    assert recorder.recorded == 0
    same(plain, steps(tmp_path / "graph", graph=True, **how))
    # Three as they are, one replay to compare, and five steps.
    assert recorder.recorded == 1 and recorder.replays == 6
    assert capsys.readouterr().out.count("run as one CUDA graph") == 1
    assert len({float(norm) for norm in plain[0]}) == 8


def test_what_reads_a_batch_late_gets_the_one_it_was_given(tmp_path, recorder):
    """A NaN in a replayed step, and in the very step that would begin to replay."""
    for poison in ((6,), (3,)):
        plain = steps(tmp_path / f"plain {poison}", poison=poison)
        same(plain, steps(tmp_path / f"graph {poison}", poison=poison, graph=True))
        assert plain[3] == 1
    # The second could not be compared with a batch of NaN, and was recorded again.
    assert recorder.recorded == 3


def spoil(outcome):
    """One gradient of a replay, a little."""
    gradient = next(x for x in reversed(outcome) if x is not None and x.norm() > 0)
    gradient.view(-1)[0] += 1e-6 * gradient.norm()


def forget(outcome):
    outcome[0].zero_()


@pytest.mark.parametrize("wrong", [spoil, forget])
def test_a_replay_that_is_not_exact_is_not_used(tmp_path, recorder, capsys, wrong):
    recorder.wrong = wrong
    same(steps(tmp_path / "plain"), steps(tmp_path / "graph", graph=True))
    assert recorder.replays == 1
    assert "each kernel is launched by itself: a replay is off by" in capsys.readouterr().out


def test_a_graph_that_does_not_read_the_batch_is_found_out(tmp_path, monkeypatch, recorder, capsys):
    """It would be right on the batch that it was recorded with."""

    def frozen(run):
        outcome = run()
        return lambda: None, outcome

    monkeypatch.setattr(graph, "record", frozen)
    same(steps(tmp_path / "plain"), steps(tmp_path / "graph", graph=True))
    assert "a replay is off by" in capsys.readouterr().out


def test_what_cannot_be_recorded_goes_on_without(tmp_path, monkeypatch, recorder, capsys):
    def refuse(run):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setattr(graph, "record", refuse)
    same(steps(tmp_path / "plain"), steps(tmp_path / "graph", graph=True))
    said = [line for line in capsys.readouterr().out.splitlines() if "--graph" in line]
    assert said == [
        "--graph: no CUDA graph, each kernel is launched by itself: operation not permitted when "
        "stream is capturing"
    ]


def test_passes_that_differ_by_themselves_may_differ_as_much(recorder):
    """As with cuDNN's atomics: no replay is exact then, and none has to be."""
    net = randomize(UNet(PRESETS["nano"]))
    params, shaken = list(net.parameters()), torch.Generator().manual_seed(0)

    def pass_(batch):
        for p in params:
            noise = 1e-6 * torch.randn(p.shape, generator=shaken)
            p.grad = (batch["x"].mean() + p.detach()) * (1 + noise)
        return batch["x"], batch["x"] + 1

    run = graph.Graph(params, torch.device("cpu"))
    for _ in range(6):
        run(pass_, {"x": torch.randn(4)})
    assert recorder.recorded == 1 and recorder.replays == 4
    # A batch of another shape is not for the graph.
    t, losses = run(pass_, {"x": torch.ones(3)})
    assert recorder.replays == 4 and t.tolist() == [1, 1, 1] and losses.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "device, fields, own, reason",
    [
        ("cpu", {}, {}, "the network is on a cpu"),
        ("cuda", {"world": 2}, {}, "several ranks share a step"),
        ("cuda", {"accum": 2}, {}, "--accum"),
        ("cuda", {"compile": True}, {}, "--compile"),
        ("cuda", {"checkpointing": True}, {}, "--checkpointing"),
        ("cuda", {"dropout": 0.1}, {}, "dropout"),
        ("cuda", {"coupling": "ot"}, {}, "--coupling ot"),
        ("cuda", {"frames": "buckets"}, {}, "--buckets"),
        ("cuda", {}, {"tally/x": 1}, "its loss keeps a record"),
        ("cuda", {}, {}, ""),
    ],
)
def test_what_stands_against_a_graph(device, fields, own, reason):
    given = {"world": 1, "accum": 1, "compile": False, "dropout": 0.0, "coupling": "none"}
    given |= {"frames": None, "checkpointing": False}
    given = SimpleNamespace(**(given | fields))
    tr = SimpleNamespace(
        ranks=SimpleNamespace(device=torch.device(device), world=given.world),
        cfg=given,
        ds=given,
        net=SimpleNamespace(cfg=given),
        objective=given,
        loss=SimpleNamespace(state_dict=lambda: own),
    )
    found = graph.obstacle(tr)
    assert found.startswith(reason) and bool(found) == bool(reason)


def test_on_a_gpu_it_is_said_what_stands_against_it(monkeypatch, capsys):
    monkeypatch.setattr(graph, "obstacle", lambda tr: "a reason")
    for device, rank, lines in (("cuda", 0, 1), ("cuda", 1, 0), ("cpu", 0, 0)):
        ranks = SimpleNamespace(device=torch.device(device), rank=rank)
        tr = SimpleNamespace(cfg=SimpleNamespace(graph=True), ranks=ranks)
        assert graph.repeater(tr) is graph.at_once
        assert capsys.readouterr().out.count("a reason") == lines


@pytest.mark.parametrize("free, used", [(19, False), (20, True)])
def test_a_graph_leaves_memory_to_the_rest(tmp_path, monkeypatch, recorder, capsys, free, used):
    """At least 20 of 80 GB."""
    plain = steps(tmp_path / "plain")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    left = graph.crowded(torch.device("cuda"))
    monkeypatch.setattr(graph, "crowded", lambda device: left)
    same(plain, steps(tmp_path / "graph", graph=True))
    said = capsys.readouterr().out
    assert ("run as one CUDA graph" in said) == used
    assert ("less than a quarter of the GPU's memory" in said) != used


def test_on_a_cpu_it_is_the_same_run_without_a_word(tmp_path, capsys):
    plain = steps(tmp_path / "plain", 2)
    capsys.readouterr()
    same(plain, steps(tmp_path / "graph", 2, graph=True))
    said = [line for line in capsys.readouterr().out.splitlines() if "--graph" in line]
    assert not said
