"""A disk that takes no more bytes: whoever writes, the one line says which file it was for, and
what was there stays."""

import contextlib
import errno
import os
import re
import resource
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch

import data.cache as cache_py
import data.reuse as reuse
import harness.files as files
from ckpt import save_unet
from ckpt.convert import convert
from ckpt.posteriors import save_posterior
from conftest import ROOT
from data.stamps import Stamp, Stamps, write_stamps
from data.uncertainty import Estimator
from diffusion.laplace import Posterior
from distillation.assessor import Assessor, AssessorConfig
from experiments import report
from harness import record
from harness.cli import UserError, cli
from harness.pictures import save_grid, save_npz
from harness.rows import set_aside
from harness.run import Log, append, lock
from harness.ranks import Ranks
from metrics import features
from metrics.distances import Statistics, save_statistics
from model import UNet, UNetConfig
from text import TextConfig, TextEncoder, save_encoder
from training.checkpoints import keep_batches, write_shard
from vae import pixel, save_vae

ONE = Ranks(0, 1, torch.device("cpu"))
CFG = UNetConfig(4, 4, 32, (1,), num_res_blocks=1, attention=(1,), num_heads=2)
PICTURES = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
POSTERIOR = Posterior(torch.eye(2).double(), 1.0, torch.ones(2).double(), 9, (1, 1), (0, 0))
ESTIMATOR = Estimator(
    SimpleNamespace(uncertainty=2, tangent=False),
    SimpleNamespace(meta={"fingerprint": "ab" * 32}, solver={"method": "heun"}),
    torch.nn.Conv2d(1, 1, 1),
    POSTERIOR,
)
ESTIMATOR.found.append(torch.ones(2, 3, 3))
LATENTS = torch.zeros(3, 1, 4, 2, 2, dtype=torch.float16)


@contextlib.contextmanager
def full_disk():
    """The kernel refuses every byte that this process would write to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def figure(path: Path) -> None:
    drawing = plt.figure()
    with files.atomic(path) as temporary:
        drawing.savefig(temporary, format="png")
    plt.close(drawing)


def run_of(path: Path):
    """What keep_batches() needs of a trainer."""
    return SimpleNamespace(run=path.parent, seen=80, ranks=ONE)


# What write_shard() needs of a trainer.
SHARED = SimpleNamespace(net=torch.nn.Linear(1, 1), seen=80)
# (path) -> something is written there; the name, if it is not free to be chosen.
WRITERS = {
    "text": lambda path: files.write_text(path, "x"),
    "tensors": lambda path: files.write_tensors(path, {"a": torch.ones(9)}, {}),
    "digests": lambda path: files.write_digests(path.parent, []),
    "a network": lambda path: save_unet(path, UNet(CFG), {"objective": "fm"}),
    "an autoencoder": lambda path: save_vae(path, pixel(8)),
    "a text encoder": lambda path: save_encoder(path, TextEncoder(TextConfig(8, 1, 1, "gelu"))),
    "an assessor": lambda path: Assessor(AssessorConfig({"mid": 32}, bins=4)).save(path, {}),
    "a posterior": lambda path: save_posterior(path, POSTERIOR, "ab" * 32),
    "how sure a network is": lambda path: ESTIMATOR.save(PICTURES, path.with_name("s"), 0, False),
    "a grid": lambda path: save_grid(PICTURES, path),
    "npz": lambda path: save_npz(PICTURES, path),
    "statistics": lambda path: save_statistics(path, Statistics.of(torch.randn(9, 3)), {}),
    "a figure": figure,
    "a page's picture": lambda path: report.write_bytes(path, b"x"),
    "a result": lambda path: record.save(path, {"a": 1}),
    "a bad batch": lambda path: keep_batches(run_of(path), [{"a": torch.ones(9)}]),
    "a line of the log": lambda path: append(path.parent, {"a": 1}),
    "what is no line of a log": lambda path: set_aside(path.with_name("log.jsonl"), [b"x"]),
    "a shard of a state": lambda path: write_shard(path.parent, SHARED, {"a": torch.ones(9)}, {}),
    "a shard": lambda path: cache_py.save_shard(path.parent, {}, 0, LATENTS, torch.ones(3, 4)),
    "hashes of images": lambda path: reuse.write_contents(
        path.parent, SimpleNamespace(contents=["00" * 32])
    ),
    "stamps": lambda path: write_stamps(path.parent, Stamps(path, {"a": Stamp(1, 2)})),
    "features": lambda path: features.write_chunk(
        path.with_name("000-001.safetensors"), torch.ones(1, 3), {}, {}
    ),
    "of what features are": lambda path: features.describe_folder(path.parent, {}),
}
NAMES = {
    "how sure a network is": "s-uncertainty.json",
    "digests": "digests.safetensors",
    "a bad batch": "bad-batch-000000000080-rank0.pt",
    "a line of the log": "log.jsonl",
    "what is no line of a log": "log.damaged",
    "a shard of a state": "state.safetensors",
    "a shard": "shard-00000.safetensors",
    "hashes of images": "contents.safetensors",
    "stamps": ".source.safetensors",
    "features": "000-001.safetensors",
    "of what features are": "what.json",
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_writer_names_its_file(tmp_path, capsys, kind):
    path = tmp_path / NAMES.get(kind, "file.png")
    path.write_text("before")

    def main():
        with full_disk():
            WRITERS[kind](path)

    with pytest.raises(SystemExit) as stop:
        cli(main)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    assert str(path) in lines[0] and "File too large" in lines[0]
    assert path.read_text() == "before" and os.listdir(tmp_path) == [path.name]
    WRITERS[kind](path)  # there is room again
    assert path.read_bytes() != b"before"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("kind", ["text", "tensors", "a grid", "npz", "a bad batch"])
def test_whatever_the_disk_says_is_said_of_the_file(tmp_path, monkeypatch, capsys, kind, number):
    """Network file systems refuse when a file is synced."""
    path = tmp_path / NAMES.get(kind, "file.png")

    def refused(place):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "fsync", refused)
    with pytest.raises(SystemExit) as stop:
        cli(lambda: WRITERS[kind](path))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    assert str(path) in lines[0] and os.strerror(number) in lines[0]
    assert not any(tmp_path.iterdir())


def test_a_log_that_is_taken_up_a_lock_and_a_conversion_name_theirs_too(tmp_path, capsys):
    append(tmp_path, {"event": "train", "images": 8})
    before = (tmp_path / "log.jsonl").read_text()
    with full_disk(), pytest.raises(OSError) as error:
        Log(tmp_path, (), ONE, 8, {})
    assert error.value.filename == str(tmp_path / "log.jsonl")
    assert (tmp_path / "log.jsonl").read_text() == before
    with full_disk():
        lock(tmp_path).close()  # it is empty
    source = tmp_path / "a.safetensors"
    save_unet(source, UNet(CFG), {"objective": "fm"})
    with full_disk(), pytest.raises(UserError, match="b.safetensors: File too large"):
        convert(source, tmp_path / "b.safetensors", "native")
    assert sorted(os.listdir(tmp_path)) == [".lock", "a.safetensors", "log.jsonl"]


def test_every_writer_of_the_house_is_in_the_table():
    """Files are written in few places, all of them atomic or named. A new one belongs in the table
    above, and here."""
    pattern = r"torch\.save\(|\.write_text\(|\.write_bytes\(|np\.savez|\.savefig\(|"
    pattern += r"\.save\((?:temporary|path)|open\([^)\n]*\"(?:a|w|wb|ab|x)\"|save_file\("
    known = {
        "harness/files.py": 2,  # write_text, stream_tensors
        "harness/pictures.py": 3,  # a picture, npz with its file
        "harness/plot.py": 1,
        "harness/rows.py": 1,
        "harness/run.py": 3,  # lock, append, the log that is taken up
        "experiments/prompts.py": 1,  # prompts, in a folder that goes again
        "experiments/report.py": 2,  # savefig into memory; a picture
        "experiments/verdict.py": 1,
        "kernels/proof.py": 1,  # a memory that may be lost: measured again
        "metrics/distances.py": 2,  # npz with its file
        "metrics/inception.py": 1,  # what was fetched
        "training/checkpoints.py": 2,  # bytes of torch.save
    }
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if name.startswith((".", "tests/", "benchmarks/", "runs", "venv")):
            continue
        count = len(re.findall(pattern, path.read_text()))
        if count:
            found[name] = count
    assert found == known
