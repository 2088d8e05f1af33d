"""Every command with damaged, forged and misplaced inputs, and with flags that cannot be.

    python tests/fuzz.py [--seed 0] [--n 3000] [--seconds S] [--only KIND] [--jobs N]
    python tests/fuzz.py --case 123            # one of them alone: its command, and what it says

Every case is a function of the seed and its number. Its command runs in a process of its own,
forked from one that has imported everything. A case fails if the command
- ends in a traceback, with an exit code that it does not document, or in more than one error;
- takes over 20 seconds, or over 2 GB of memory;
- loses or changes a file that it was given;
- takes a damaged file of ours, which has a checksum, and comes to another result.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: the networks are tiny
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch._dynamo  # noqa: F401  imported by the first optimizer; here once for all forks
from PIL import Image
from safetensors.torch import load_file

import ckpt.__main__
import data.__main__
import data.encode
import distill
import eval_fid
import experiments.ablate
import experiments.protocol
import experiments.stages
import harness.plot
import metrics.inception
import samplers
import train
import vae
from distillation.pretrain import Pretrain
from harness.cli import UserError, cli, dashed, flag, parse
from mutations import forge, harm
from specimens import DISTILL, DRAW, ENCODE, EVAL, PRETRAIN, TRAIN, make_all

from training.previews import draw_samples

PATIENCE = 20  # seconds
MEMORY = 2_000_000_000  # bytes

# ---- what is run --------------------------------------------------------------------------------

MAINS = {
    "train.py": train.main,
    "samplers.py": samplers.main,
    "distill.py": distill.main,
    "eval_fid.py": eval_fid.main,
    "vae.py": vae.main,
    "ckpt": ckpt.__main__.main,
    "data": data.__main__.main,
    "data.encode": data.encode.main,
    "metrics.inception": metrics.inception.main,
    "harness.plot": harness.plot.main,
    "experiments/ablate.py": experiments.ablate.main,
    "experiments/protocol.py": experiments.protocol.main,
    "experiments/stages.py": experiments.stages.main,
}
# Exit codes beside 0 and 2: "no" of those that answer, and networks that give no numbers.
ALSO = {"ckpt verify": 1, "data.encode": 1, "samplers.py": 1, "eval_fid.py": 1, "train.py": 1}

OUT = "--out out"
RESUME = f"train.py --data toyfaces:24 --name half --seed 1 --keep 9 {TRAIN}"
FROM_CACHE = f"train.py --data latents --name new {OUT} {TRAIN}"
ENCODED = f"data.encode {ENCODE}"
OF_PICTURES = f"eval_fid.py --fake pics/csv --ref pics/jsonl {EVAL} --out out/card.json"
OF_SAMPLES = f"eval_fid.py --ckpt runs/done {EVAL} {DRAW} --out out/card.json"
SAMPLE = "samplers.py --ckpt {} --n 2 --steps 1 --out out/s"
PAINT = "samplers.py --ckpt ours.safetensors --n 2 --steps 2 --out out/s"
OF_FILE = f"eval_fid.py --ckpt {{}} {EVAL} {DRAW} --out out/card.json"
BY_DISTILL = f"distill.py --teacher {{}} --name new {OUT} {DISTILL}"
PRETRAINED = f"distill.py pretrain-assessor --teacher {{}} --out out/a.safetensors {PRETRAIN}"
INIT = f"train.py --data toyfaces:24 --vae pixel:1 --init {{}} --name new {OUT} {TRAIN}"
INIT += " --resolution 16"
ABLATE = "experiments/ablate.py --teacher runs/done --assessor-file {} --arms D --seeds 0 --out out"
ABLATE += f" --fd-images 0 {DISTILL}"
CKPT = ("ckpt inspect {}", "ckpt verify {} {}", "ckpt convert {} out/x.safetensors --layout native")
CKPT += ("ckpt convert {} out/d --layout diffusers", "ckpt verify {} ours.safetensors")
NETWORK = (*CKPT, SAMPLE, OF_FILE, BY_DISTILL, PRETRAINED, INIT)
IMAGES = (
    "data --data {} --resolution 32 --out out/sheet.png",
    "data.encode --data {} --resolution 32 --out out/latents",
    f"train.py --data {{}} --name new {OUT} {TRAIN}",
    f"eval_fid.py --fake {{}} --ref pics/csv {EVAL} --resolution 32 --out out/card.json",
)
# What is damaged, and the commands that open it as {}.
READERS = {
    "ours.safetensors": NETWORK,
    "adm.safetensors": NETWORK,
    "adm.pt": NETWORK,
    "legacy.pt": CKPT,
    "sd.safetensors": CKPT,
    "sd.ckpt": CKPT,
    "script.pt": ("metrics.inception --weights {}", "ckpt inspect {}"),
    "pipe": (*NETWORK, "ckpt inspect {}/unet"),
    "vae.safetensors": (
        "data.encode --data toyfaces:4 --resolution 32 --out out/l --vae {}",
        f"train.py --data toyfaces:24 --vae {{}} --name new {OUT} {TRAIN}",
        SAMPLE.format("runs/done") + " --vae {}",
    ),
    "runs/half": (RESUME, RESUME, RESUME, *NETWORK, "harness.plot {} --out out/p.png"),
    "runs/done": ("harness.plot {} runs/half --out out/p.png", SAMPLE, OF_FILE, BY_DISTILL),
    "latents": (FROM_CACHE, FROM_CACHE, ENCODED, "data.encode --out latents --verify"),
    "features": (OF_PICTURES, OF_SAMPLES),
    "card.json": ("eval_fid.py compare {} other.json", "eval_fid.py compare other.json {}"),
    "stats.npz": (
        f"eval_fid.py --fake pics/csv --ref {{}} {EVAL} --out out/card.json",
        f"eval_fid.py --fake {{}} --ref pics/jsonl {EVAL} --out out/card.json",
    ),
    "batch.npz": (f"eval_fid.py --fake {{}} --ref pics/csv {EVAL} --out out/card.json",),
    "batch.npy": (f"eval_fid.py --fake {{}} --ref pics/csv {EVAL} --out out/card.json",),
    "assessor.safetensors": (
        f"distill.py --teacher runs/done --assessor david --assessor-file {{}} {OUT} {DISTILL}",
        ABLATE,
        "distill.py pretrain-assessor --teacher runs/done --out {} " + PRETRAIN,
    ),
    "pics/jsonl": IMAGES,
    "pics/csv": IMAGES,
    "pics/captions": IMAGES,
    "set.parquet": IMAGES,
    "start.png": (PAINT + " --init {}", PAINT + " --init start.png --mask {}"),
}
# Of ours, with checksums: what is damaged here is found, or does no harm.
SEALED = ("ours.safetensors", "runs/half", "latents", "features", "assessor.safetensors")
# Where a command's result lies: what it drew, made and trained.
RESULTS = ("out", "runs/half/ckpt/000000000024")

# Commands that work, and the flags they have.
FLAGS = {
    f"train.py --data toyfaces:24 --name new {OUT} {TRAIN}": train.Config,
    RESUME: train.Config,
    SAMPLE.format("runs/done"): samplers.Config,
    SAMPLE.format("ours.safetensors"): samplers.Config,
    OF_SAMPLES: eval_fid.Config,
    OF_PICTURES: eval_fid.Config,
    BY_DISTILL.format("runs/done"): distill.Config,
    PRETRAINED.format("runs/done"): Pretrain,
    CKPT[0].format("adm.pt"): ckpt.__main__.Options,
    CKPT[2].format("ours.safetensors"): ckpt.__main__.Options,
    IMAGES[0].format("pics/csv"): data.__main__.Config,
    IMAGES[1].format("pics/csv"): data.encode.Encode,
    "metrics.inception --weights script.pt": metrics.inception.Config,
    "harness.plot runs/done --out out/p.png": harness.plot.Config,
    ABLATE.format("assessor.safetensors"): experiments.ablate.Config,
    f"experiments/protocol.py --dry-run --runs runs/done,runs/half {EVAL}":
        experiments.protocol.Config,
    "experiments/stages.py --dry-run --out out": experiments.stages.Config,
    "eval_fid.py compare card.json other.json": eval_fid.Config,
    "vae.py": samplers.Config,
}  # fmt: skip
WORDS = [
    "0", "-1", "1", "1e30", "-1e30", "1e12", "nan", "inf", "-inf", "1e400", "1e-400", "9" * 400,
    "²", "١", "1_0", "0x10", "", " ", ",", ",,", "1,", "1,nan", "-", "--", "x", "a" * 5000,
    "\udcff", "é", "\u202e", "None", "True", "auto", "none", "meta", "cuda:99", "hpu", "runs/half",
    "runs", "card.json", "pics/csv", "start.png", "ours.safetensors", "latents", "nowhere",
    "nowhere/x", ".", "out", "out/x.txt", "out/x", "a/" * 300, "n" * 300, "(a & b", "* hair", "!",
    "{}", "%s", "pca:x", "toyfaces:0", "toyfaces:x", "toyfaces:1e30", "robohash:99999999",
    "pixel:0", "pixel:x", "hf:", "hf:x", "hf:x/y@z", "random:x", "sdxl:nowhere", "2" * 19,
]  # fmt: skip
NUMBERS = [
    "0", "-1", "1", "2", "3", "1e30", "-1e30", "1e12", "1000000007", "9" * 19, "1e400", "1e-400",
    "nan", "inf", "-inf", "²", "0.5", "-0.5", "1e-30", "1,2", "1,nan", "65537", "7,",
]  # fmt: skip
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TWINPATH_CACHE", "FID_INCEPTION", "HF_HOME")


class Case(NamedTuple):
    kind: str
    command: list[str]  # the script and its words
    how: str  # what is wrong with it
    variables: dict[str, str]
    sealed: bool  # is a result other than that of undamaged files a failure?


def target_file(place: Path, r: random.Random) -> Path:
    """The file itself, or one of a folder's: any ending alike, then any file of that ending."""
    if not place.is_dir():
        return place
    paths = sorted(path for path in place.rglob("*") if path.is_file())
    if r.random() < 0.9:
        paths = [path for path in paths if path.stat().st_size]
    ending = r.choice(sorted({path.suffix for path in paths}))
    return r.choice([path for path in paths if path.suffix == ending])


def exchange(path: Path, r: random.Random) -> str:
    """A file of a run in the place of another one that has its ending."""
    others = sorted(Path("runs").rglob(f"*{path.suffix}"))
    other = r.choice([each for each in others if each != path])
    data = other.read_bytes()
    path.unlink()
    path.write_bytes(data)
    return f"{other} in its place"


def file_case(kind: str, r: random.Random) -> Case:
    """One file under the current folder is changed."""
    line = r.choice(READERS[kind])
    path = target_file(Path(kind), r)
    swapped = kind.startswith("runs") and r.random() < 0.1
    harmed = swapped or r.random() < 0.5
    way = exchange if swapped else (harm if harmed else forge)
    how = f"{path}: {way(path, r)}"
    sealed = harmed and kind in SEALED and "--verify" not in line
    return Case(kind, line.replace("{}", kind).split(), how, {}, sealed)


def flag_case(r: random.Random) -> Case:
    """Some flags have odd values, or words stand where none belong."""
    line = r.choice(list(FLAGS))
    words = line.split()
    names = [dashed(field.name) for field in fields(FLAGS[line])]
    numeric = [
        dashed(name)
        for name, kind in get_type_hints(FLAGS[line]).items()
        if "int" in str(kind) or "float" in str(kind)
    ]
    for _ in range(r.choice([1, 1, 1, 2, 3])):
        name, value = r.choice([*names, "--x"]), r.choice(WORDS)
        if numeric and r.random() < 0.5:
            name, value = r.choice(numeric), r.choice(NUMBERS)
        way = r.choice(["flag", "flag", "flag", "flag", "flag", "joined", "alone", "word"])
        added = {"flag": [name, value], "joined": [f"{name}={value}"], "alone": [name]}
        words += added.get(way, [value])
    return Case("flags", words, "flags", {}, False)


def variable_case(r: random.Random) -> Case:
    """Variables of the environment say what they cannot."""
    words = r.choice([line for line in FLAGS if "dry-run" not in line]).split()
    value = r.choice([word.replace("\0", "") for word in WORDS if word not in ("0", "1")])
    if r.random() < 0.2:
        value = "/dev/null"
    variables = {r.choice(VARIABLES): value}
    return Case("environment", words, f"{variables}", variables, False)


# Those of which more is believed come more often.
KINDS = [*READERS, *["flags"] * 4, "environment", "latents", "latents", "runs/half"]
KINDS += ["card.json", "card.json", "assessor.safetensors", "ours.safetensors", "features"]


def make_case(only: str, number: int, r: random.Random) -> Case:
    """Input `number`, of one kind if only one is wanted."""
    kind = only or KINDS[number % len(KINDS)]
    if kind == "flags":
        return flag_case(r)
    return variable_case(r) if kind == "environment" else file_case(kind, r)


def draw_few(trainer: Any, net: Any, seeds: Any, **how: Any) -> Any:
    """The last pictures of a run, of which most of a short run's time would go into."""
    return draw_samples(trainer, net, seeds[:2], method="ddim", steps=1)


train.draw_samples = draw_few


# ---- running one --------------------------------------------------------------------------------


class Ended(NamedTuple):
    """What a command did."""

    code: int | None  # None: it was killed after PATIENCE
    out: str
    err: str
    memory: int  # bytes at its peak
    seconds: float


def be_the_command(command: list[str], variables: dict[str, str], box: Path) -> None:
    """The forked process, until it ends."""
    os.setsid()
    os.chdir(box)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(box.parent / name, os.O_WRONLY | os.O_CREAT), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resource.setrlimit(resource.RLIMIT_DATA, (2 * MEMORY, 2 * MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MEMORY, MEMORY))
    script, *words = command
    os.environ.update({"HOME": str(box), "TWINPATH_CACHE": str(box / "home"), **variables})
    os.environ.update({"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(box / "home")})
    sys.argv = [script, *words]
    code = 1
    try:
        cli(MAINS[script], crash=1)
        code = 0
    except SystemExit as stop:
        code = 1 if isinstance(stop.code, str) else stop.code or 0
    except Exception:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def queued(process: int) -> float:
    """Seconds that a process has waited for a core, while others used it."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def run(command: list[str], variables: dict[str, str], box: Path) -> Ended:
    """A command in a folder, in a process of its own."""
    start = time.monotonic()
    process = os.fork()
    if not process:
        be_the_command(command, variables, box)
    code = None
    while True:
        ended, status, used = os.wait4(process, os.WNOHANG)
        late = time.monotonic() - start > PATIENCE + queued(process)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            break
        if late:
            os.kill(process, signal.SIGKILL)
            _, _, used = os.wait4(process, 0)
            break
        time.sleep(0.004)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # what it left behind
    texts = [(box.parent / name).read_text(errors="replace") for name in ("out", "err")]
    return Ended(code, *texts, used.ru_maxrss * 1024, time.monotonic() - start)


@contextlib.contextmanager
def fresh_box(world: Path) -> Iterator[Path]:
    """A copy of all valid files, which becomes the current folder. Tensors are links."""
    folder = Path(tempfile.mkdtemp(prefix="case-", dir=world.parent))
    box = folder / "a" / "box"

    def copy(source: str, target: str) -> None:
        if source.endswith((".safetensors", ".ckpt", ".pt")):
            os.link(source, target)
        else:
            shutil.copy(source, target)

    shutil.copytree(world, box, copy_function=copy)
    before = os.getcwd()
    os.chdir(box)
    try:
        yield box
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


# ---- judging it ---------------------------------------------------------------------------------


HASHES: dict[tuple[int, int, int], str] = {}


def content(path: Path) -> str:
    """A hash of a file. Links to one file are read once."""
    now = path.stat()
    key = now.st_ino, now.st_size, now.st_mtime_ns
    if key not in HASHES:
        HASHES[key] = hashlib.sha256(path.read_bytes()).hexdigest()
    return HASHES[key]


def contents(box: Path) -> dict[str, str]:
    """What every file under a folder holds. A link to a file elsewhere is what it points to."""
    found = {}
    for path in sorted(box.rglob("*")):
        name = str(path.relative_to(box))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = content(path)
    return found


def result_of(box: Path, code: int | None) -> str:
    """A hash of what a command came to: tensors, pictures, metrics; not of times and commits."""
    digest = hashlib.sha256(str(code).encode())
    for place in RESULTS:
        for path in sorted((box / place).rglob("*")):
            if path.suffix == ".safetensors":
                for name, tensor in sorted(load_file(path).items()):
                    digest.update(f"{path.name} {name} {tensor.dtype}".encode())
                    digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
            elif path.suffix == ".png":
                digest.update(np.asarray(Image.open(path)).tobytes())
            elif path.suffix == ".json":
                value = json.loads(path.read_text())
                digest.update(json.dumps(value.get("metrics")).encode())
    return digest.hexdigest()


@cache
def expected(world: Path, line: str) -> str:
    """The result of a command whose files are whole."""
    with fresh_box(world) as box:
        ended = run(line.split(), {}, box)
        assert ended.code == 0, f"{line}: {ended.err}"
        return result_of(box, ended.code)


def written_to(command: list[str]) -> set[str]:
    """What a command may replace, for its words say so: --out FILE."""
    outputs = ("--out", "--npz", "--save-stats", "--cache")
    named = [word.partition("=") for word in command]
    values = [value for name, _, value in named if name in outputs and value]
    values += [value for name, value in zip(command, command[1:]) if name in outputs]
    return {os.path.normpath(value.rstrip("/")) for value in values}


def lost(command: list[str], before: dict[str, Any], after: dict[str, Any], code: Any) -> list[str]:
    """Files that are gone or have changed, and that the command was not told to write."""
    own = written_to(command)
    if code == 0 and command[:1] == ["train.py"]:
        own |= {f"runs/half/{name}" for name in ("log.jsonl", "samples", "config.json")}
    if command[:1] == ["data.encode"]:
        own |= {"latents"}
    changed = [name for name, value in before.items() if after.get(name) != value]
    parents = {name: {str(p) for p in (Path(name), *Path(name).parents)} for name in changed}
    return [name for name in changed if not parents[name] & own and not name.endswith(".lock")]


def faults(case: Case, ended: Ended, before: dict[str, Any], box: Path, world: Path) -> list[str]:
    """What is wrong with how a command ended."""
    found = []
    script = " ".join(case.command[: 2 if case.command[0] == "ckpt" else 1])
    errors = [line for line in ended.err.splitlines() if line.startswith("error")]
    if "Traceback" in ended.err:
        found.append("traceback")
    elif ended.code is None:
        found.append("hang")
    elif ended.code not in (0, 2, ALSO.get(script)):
        found.append(f"exit code {ended.code}")
    elif ended.code == 2 and len(errors) != 1 or len(errors) > 1:
        found.append(f"{len(errors)} errors")
    if ended.memory > MEMORY or "out of memory" in ended.err:
        found.append("memory")
    if lost(case.command, before, contents(box), ended.code):
        found.append("lost")
    accepted = not found and case.sealed and ended.code == 0
    if accepted and result_of(box, 0) != expected(world, " ".join(case.command)):
        found.append("damage accepted")
    return found


class Outcome(NamedTuple):
    number: int
    case: Case
    faults: list[str]
    ended: Ended


Make = Callable[[int, random.Random], Case]  # changes files under the current folder


def try_case(world: Path, make: Make, seed: int, number: int, talk: bool = False) -> Outcome:
    """Make a case, run it, judge it."""
    with fresh_box(world) as box:
        case = make(number, random.Random(f"{seed} {number}"))
        before = contents(box)
        ended = run(case.command, case.variables, box)
        outcome = Outcome(number, case, faults(case, ended, before, box, world), ended)
        if talk:
            print(f"exit code {ended.code} after {ended.seconds:.1f} s, {ended.memory:,} bytes")
            print(ended.out, ended.err, sep="\n", end="")
            print("gone or changed:", lost(case.command, before, contents(box), ended.code))
        return outcome


# ---- the command --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trials:
    seed: int = flag(0, "of all choices")
    n: int = flag(3000, "inputs", low=1)
    seconds: float = flag(1200.0, "after which no more are begun", above=0)
    jobs: int = flag(os.cpu_count() or 1, "at a time", low=1)
    case: int = flag(-1, "only the input of this number, and all that is said of it")


@dataclass(frozen=True)
class Config(Trials):
    only: str = flag("", f"a kind: {' | '.join(dict.fromkeys(KINDS))}")


def make_world(folder: Path) -> Path:
    """The valid files, made in a process of their own: autograd's threads survive no fork."""
    world = folder / "world"
    world.mkdir()
    process = os.fork()
    if not process:
        os.chdir(world)
        with open(folder / "made", "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            code = 1
            try:
                make_all()
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)
    if os.waitpid(process, 0)[1]:
        raise RuntimeError((folder / "made").read_text())
    return world


def outcomes(cfg: Trials, make: Make, world: Path) -> Iterator[Outcome]:
    """The outcomes of all cases, in no order, until the time is over."""
    start = time.monotonic()
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(cfg.jobs, mp_context=fork) as pool:
        numbers = range(cfg.n)
        waiting = [pool.submit(try_case, world, make, cfg.seed, number) for number in numbers]
        for done in as_completed(waiting):
            yield done.result()
            if time.monotonic() - start > cfg.seconds:
                pool.shutdown(wait=True, cancel_futures=True)
                return


def show(outcome: Outcome, again: str) -> None:
    """A case that failed, with the command that repeats it alone."""
    print(f"{again} --case {outcome.number}")
    words = " ".join(word[:60] for word in outcome.case.command)
    print(f"    {', '.join(outcome.faults)}: {outcome.case.how}")
    print(f"    {words}".encode("utf-8", "replace").decode())
    last = (outcome.ended.err.splitlines() or [""])[-1]
    print(f"    {last[:300]}", flush=True)


def try_all(cfg: Trials, make: Make, again: str) -> None:
    """Try all cases, or one, and say which failed; the exit code is 1 if any did."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    tried, failed = Counter(), Counter()
    try:
        world = make_world(folder)
        start = time.monotonic()
        if cfg.case >= 0:
            show(try_case(world, make, cfg.seed, cfg.case, talk=True), again)
            return
        for outcome in outcomes(cfg, make, world):
            tried[outcome.case.kind] += 1
            failed.update((outcome.case.kind, fault) for fault in outcome.faults)
            if outcome.faults:
                show(outcome, again)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for (kind, fault), count in sorted(failed.items()):
        print(f"{kind}: {count} of {tried[kind]}: {fault}")
    seconds = time.monotonic() - start
    print(f"{tried.total():,} inputs in {seconds:.0f} s: {failed.total()} failures")
    sys.exit(1 if failed else 0)


def main() -> None:
    cfg, _ = parse(Config, __doc__)
    if cfg.only and cfg.only not in KINDS:
        raise UserError(f"--only {cfg.only} is no kind", do="See --help.")
    only = f" --only {cfg.only}" if cfg.only else ""
    try_all(cfg, partial(make_case, cfg.only), f"python tests/fuzz.py --seed {cfg.seed}{only}")


if __name__ == "__main__":
    cli(main)
