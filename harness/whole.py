"""Is a checkpoint of ours as it was written? Its files are compared with the list beside them.

A checkpoint of a run has a list, digests.safetensors: the sha256 of its other files, and the run
and step that they are of. Whoever reads one of the files compares that one; a run that goes on, all
of them. What was written before there were lists, and a file that was copied without its list, is
checked by its own fingerprint alone.
"""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness.cli import UserError
from harness.files import DIGESTS, fault, listed, open_safetensors, read_digests, read_meta
from harness.run import checkpoints

# In the metadata of a training state: its checkpoint has a list.
LISTED = "listed"
# The training state of one of several shards; the group says of how many.
SHARD = re.compile(r"state-rank\d{1,6}of([1-9]\d{0,5})\.safetensors")


def check_file(path: Path) -> Path:
    """The same path, if it is not another file than the one that the list beside it names."""
    if what := described(path):
        raise UserError(what, do=instead(path.parent))
    return path


def check_checkpoint(folder: Path) -> None:
    """Refuse a run's checkpoint that is not as it was written. One without a list passes; where it
    has lost its list, this is said."""
    if what := broken(folder):
        raise UserError(what, do=instead(folder))
    if read_digests(folder).files:
        return
    if read_meta(open_safetensors(state_files(folder)[0])).get(LISTED):
        print(
            f"warning: {folder} has lost its {DIGESTS}: only the weights can be checked.",
            file=sys.stderr,
        )


def state_name(shard: int = 0, shards: int = 1) -> str:
    """The file of a training state, or of one of its shards (training/states.py)."""
    return "state.safetensors" if shards == 1 else f"state-rank{shard}of{shards}.safetensors"


def state_files(folder: Path) -> list[Path]:
    """A checkpoint's training state: one file, or one a shard, in order. Refuse it where one of
    them is missing."""
    names = set(read_digests(folder).files) or {path.name for path in folder.iterdir()}
    if state_name() in names:
        return [folder / state_name()]
    found = [match for name in names if (match := SHARD.fullmatch(name))]
    if not found:
        return [folder / state_name()]
    shards = int(found[0][1])
    wanted = [state_name(shard, shards) for shard in range(shards)]
    missing = [name for name in wanted if name not in names]
    if missing or len(found) > shards:
        what = f"{len(missing)} are missing: {listed(missing)}" if missing else "others are there"
        raise UserError(
            f"{folder} is no complete checkpoint in {shards} shards: {what}",
            do="Restore the folder as it was written.",
        )
    return [folder / name for name in wanted]


def broken(folder: Path) -> str:
    """What is wrong with a checkpoint of a run by its list; "" = nothing, or it has no list."""
    if what := described(folder / DIGESTS):
        return what
    digests = read_digests(folder)
    if not digests.files:
        return ""
    images = digests.of.get("images")
    if images != int(folder.name):
        return f"{folder} holds a checkpoint of another step, by its {DIGESTS}: at {images} images"
    with ThreadPoolExecutor() as pool:  # hashing lets go of the GIL
        faults = list(pool.map(fault, [folder / name for name in digests.files]))
    return next(filter(None, faults), "")


def described(path: Path) -> str:
    """What is wrong with a file by the list beside it, or with the list; "" = nothing."""
    try:
        return fault(path)
    except UserError as error:
        return str(error)


def instead(folder: Path) -> str:
    """What to do about a damaged checkpoint: the newest older one of the run that is whole is
    named. It is never taken unasked."""
    older = [path for path in checkpoints(folder.parent.parent) if path.name < folder.name]
    for path in reversed(older):
        if broken(path):
            continue
        if read_digests(path).files:
            return f"{path} is whole: name that one, or move {folder} away to go on from it."
        return f"Use {path}, which has no {DIGESTS} to check it by, or an undamaged copy."
    return "Copy it again: there is no older one of its run that is whole."
