"""SIGKILL at seeded moments of training, encoding, evaluating and ablating: nothing is lost, and
what the same command then makes is bitwise what it makes when left alone.

    python tests/kills.py [KILLS] [SEED] [CASE …]      # 100 0 train encode eval ablate

A command runs in a fork of this process, which has imported everything and computed nothing. The
fork kills itself at the n-th time that it opens a file for writing, renames or removes one; or a
few milliseconds later, in the middle of what comes next.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import itertools
import json
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import data.encode as encode
import eval_fid
import experiments.ablate as ablate
import train
from ckpt import save_unet
from conftest import randomize
from harness.cli import cli
from harness.files import digest
from harness.run import checkpoints
from harness.whole import broken
from model import PRESETS, UNet
from objectives import make_objective
from vae import pixel

SMALL = "--resolution 32 --batch 4 --images 16 --eval-every 0 --preview-every 0 --holdout 0"
MINE = "the user's own"


@dataclass(frozen=True)
class Case:
    """A command, run in a folder of its own, and what it makes there."""

    main: Callable[[], None]
    words: str
    place: str  # where it writes; a file of the user's lies there too
    result: Callable[[Path], Any]


# ---- what a command made ------------------------------------------------------------------------


def tensors(run: Path) -> dict[str, bytes]:
    """Every tensor of the newest checkpoint, as bytes."""
    found = {}
    for file in sorted(checkpoints(run)[-1].iterdir()):
        for key, x in load_file(file).items():
            found[f"{file.name} {key}"] = (
                x.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
    return found


def rows(run: Path) -> list[Any]:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    keys = ("images", "loss", "loss_by_t", "grad_norm", "lr")
    return [[line[key] for key in keys] for line in lines if line["event"] == "train"]


def trained(place: Path) -> Any:
    run = place / "out/r"
    assert (run / "samples/final.png").exists()
    return tensors(run), rows(run), [path.name for path in checkpoints(run)]


def encoded(place: Path) -> Any:
    files = [path for path in (place / "out").rglob("*") if path.is_file()]
    # Hidden ones hold the times of the pictures' files, and the lock.
    return {path.name: digest(path) for path in files if not path.name.startswith(".")}


def measured(place: Path) -> Any:
    card = json.loads((place / "out/card.json").read_text())
    features = sorted((place / "cache").rglob("*.safetensors"))
    return card["metrics"], [digest(path) for path in features]


def ablated(place: Path) -> Any:
    cards = json.loads((place / "out/ablation.json").read_text())["cards"]
    facts = [{key: card[key] for key in ("arm", "seed", "fd", "held_out")} for card in cards]
    return facts, [tensors(place / "out" / name) for name in ("A-0", "B-0")]


CASES = {
    "train": Case(
        train.main,
        f"{SMALL} --model nano --data images --save-every 4 --keep 2 --log-every 4 --out out "
        "--name r",
        "out/r",
        trained,
    ),
    "encode": Case(encode.main, "--out out --data images --resolution 32", "kept", encoded),
    "eval": Case(
        eval_fid.main,
        "--ckpt teacher.safetensors --ref images --n 12 --features pca --method euler --steps 1 "
        "--out out/card.json",
        "out",
        measured,
    ),
    "ablate": Case(
        ablate.main,
        "--teacher teacher.safetensors --data images --arms A,B --seeds 0 --images 8 --batch 4 "
        "--save-every 4 --log-every 4 --preview-every 0 --holdout 0.2 --ema 0.05 --fd-images 4 "
        "--fd-steps 1 --out out",
        "out",
        ablated,
    ),
}


# ---- a command, and its end ---------------------------------------------------------------------


def prepare(place: Path, case: Case) -> None:
    """A folder with pictures, a network, and a file of the user's where the command will write."""
    (place / "images").mkdir(parents=True)
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(place / f"images/{i}.png")
    net = randomize(UNet(replace(PRESETS["nano"], in_channels=192, out_channels=192)), 1)
    objective = asdict(make_objective("ddpm", table="scaled_linear"))
    meta = {"objective": objective, "vae": pixel(8).meta(), "resolution": 32, "classes": []}
    save_unet(place / "teacher.safetensors", net, meta)
    (place / case.place).mkdir(parents=True)
    (place / case.place / "mine.txt").write_text(MINE)


def writes(event: str, args: tuple) -> bool:
    """Is this an event of sys.audit before something on the disk changes?"""
    if event == "open":
        return isinstance(args[2], int) and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


def die(after: float) -> None:
    def now() -> None:
        time.sleep(after)
        os.kill(os.getpid(), signal.SIGKILL)

    if after:
        threading.Thread(target=now, daemon=True).start()
    else:
        os.kill(os.getpid(), signal.SIGKILL)


def run(case: Case, place: Path, moment: int = 0, after: float = 0.0) -> tuple[int, int]:
    """Run a command in a fork: (its exit code, -9 = killed; how often it wrote). moment: at which
    write it is killed, 0 = never; after: so many seconds later."""
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        count = place / "writes"
        return status, int(count.read_text()) if status == 0 else 0
    output = os.open(place / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(place)
    os.environ["TWINPATH_CACHE"] = str(place / "cache")
    sys.argv = ["script.py", *case.words.split()]
    black = torch.zeros(32, 3, 32, 32, dtype=torch.uint8)
    train.draw_samples = lambda *how, **more: black
    counter = itertools.count(1)

    def watch(event: str, args: tuple) -> None:
        if writes(event, args) and next(counter) == moment:
            die(after)

    sys.addaudithook(watch)
    code = 1
    try:
        cli(case.main)
        code = 0
        (place / "writes").write_text(str(next(counter)))
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def check_kept(place: Path, case: Case, before: int) -> int:
    """After a kill: what was whole is whole, and there is no less of it."""
    assert (place / case.place / "mine.txt").read_text() == MINE
    runs = [path.parent for path in (place / "out").rglob("config.json")]
    images = [int(path.name) for run in runs for path in checkpoints(run)[-1:]]
    for folder in (path for run in runs for path in checkpoints(run)):
        assert broken(folder) == "", broken(folder)
    assert sum(images) >= before
    return sum(images)


def attack(name: str, kills: int, moments: random.Random, scratch: Path) -> int:
    """Kill a command so many times, and see each time that it then ends as it would have."""
    case, done = CASES[name], 0
    prepare(scratch / "whole", case)
    code, total = run(case, scratch / "whole")
    assert code == 0, (scratch / "whole/output.txt").read_text()
    wanted = case.result(scratch / "whole")
    for round in itertools.count():
        place = scratch / f"round-{round}"
        prepare(place, case)
        there, series = 0, min(moments.randint(1, 6), kills - done)
        for _ in range(series):
            after = moments.choice((0.0, moments.random() * 0.05))
            code, _ = run(case, place, moments.randint(1, total), after)
            if code == 0:  # it was done before that moment
                break
            assert code == -signal.SIGKILL, (place / "output.txt").read_text()
            done += 1
            there = check_kept(place, case, there)
        for path in place.rglob("*.tmp"):
            # Features are shared without a lock: what is half written is swept an hour later.
            os.utime(path, (1, 1))
        code, _ = run(case, place)
        assert code == 0, (place / "output.txt").read_text()
        assert case.result(place) == wanted, f"{name}, round {round}: another result"
        half = list(place.rglob("*.tmp"))
        assert not half, half
        assert (place / case.place / "mine.txt").read_text() == MINE
        shutil.rmtree(place)
        if done >= kills:
            return done


def main(kills: int, seed: int, names: list[str]) -> None:
    moments = random.Random(seed)
    shares = [kills // len(names) + (i < kills % len(names)) for i in range(len(names))]
    for name, share in zip(names, shares):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            done = attack(name, share, moments, Path(scratch)) if share else 0
        seconds = time.perf_counter() - start
        print(
            f"{name}: killed {done} times, nothing lost, the same end ({seconds:.0f} s)", flush=True
        )


if __name__ == "__main__":
    words = sys.argv[1:]
    numbers = [int(word) for word in words if word.isdigit()]
    kills, seed = (numbers + [100, 0][len(numbers) :])[:2]
    main(kills, seed, [word for word in words if not word.isdigit()] or list(CASES))
