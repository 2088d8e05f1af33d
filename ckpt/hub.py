"""The Hub: what hf:org/name names, fetched once, with its commit and sha256 recorded.

    resolve("hf:org/name/file@revision")     # the only words that reach the network
    origin(path)                 # {"source": "hf:org/name/file@commit", "sha256": …}

The user says what is fetched; a file does not. A name that stands in somebody's metadata goes
through from_file() or data_from_file(), and is then looked for in the local cache only.
"""

import contextlib
import hashlib
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ckpt.containers import INDEX, USUAL, WEIGHTS, read_index
from ckpt.patience import GivenUp, watched
from harness.cli import UserError
from harness.files import listed
from harness.reading import open_file

SCHEDULER = "scheduler/scheduler_config.json"  # of a pipeline: see ckpt/meaning.py
HUB = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@(.+))?")
# Repositories of weights that the user of this process named; and repositories of data that only a
# file named, with what else would allow each.
ASKED: set[str] = set()
ONLY_CACHED: dict[str, str] = {}


def ask(spec: str) -> None:
    """Note that the user named this, so that what a file says of the same repository is fetched."""
    if match := HUB.fullmatch(spec):
        ASKED.add(match[1])


def from_file(name: str, flag: str) -> str:
    """A name of weights that stands in a file, as one that can be loaded without asking the Hub: a
    local path. `flag` is what would say the same on the command line."""
    if not name.startswith("hf:"):
        return str(Path(name).absolute())
    match = HUB.fullmatch(name)
    if match and match[1] in ASKED:
        return name
    with contextlib.suppress(ImportError, ValueError):
        import huggingface_hub as hub

        repo, file, revision = match.groups() if match else ("", None, None)
        found = hub.try_to_load_from_cache(repo, file, revision=revision) if file else None
        if isinstance(found, str):
            return found
    raise UserError(
        f"{quoted(name)} is named by a file and not by you, so the Hub is not asked for it, and "
        "the local cache does not have it",
        do=f"If you trust it, add: {flag} {quoted(name)}",
    )


def data_from_file(spec: str, flag: str = "") -> str:
    """The same for a data set, DATA or DATA:tags: from here on it comes from the local cache."""
    if match := re.match(r"hf:([\w.-]+/[\w.-]+)", spec):
        ONLY_CACHED[match[1]] = f", or add: {flag} {quoted(spec)}" if flag else ""
    return spec


def quoted(name: str) -> str:
    """A stranger's word as one that can be pasted into a shell, and that no terminal obeys."""
    return shlex.quote(name if name.isprintable() else ascii(name))


def hub_spelling(name: str) -> str:
    """What a web address of the Hub, or org/name, would be here; "" if it is neither."""
    url = r"https?://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)"
    url += r"(?:/(?:blob|resolve|tree)/([^/?]+)(?:/([^?]+))?)?/?(?:\?.*)?"
    if match := re.fullmatch(url, name):
        repo, revision, file = match.groups()
        at = f"@{revision}" if revision not in (None, "main") else ""
        return f"hf:{repo}" + (f"/{file}" if file else "") + at
    local = name.startswith("runs/") or name.endswith(WEIGHTS)
    plain = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not local
    return f"hf:{name}" if plain else ""


def resolve(spec: Path | str, usual: Sequence[str] = USUAL) -> Path:
    """A local path as it is; hf:org/name[/file or folder][@revision] as the path of the file in
    huggingface_hub's cache.

    usual: where a repository keeps what is wanted, a U-Net if nothing is said.
    """
    if not str(spec).startswith("hf:"):
        return Path(spec)
    match = HUB.fullmatch(str(spec))
    if not match:
        raise UserError(
            f"{spec!r} is not a name on the Hub",
            do="Wanted hf:org/name, hf:org/name/file or hf:org/name/file@revision.",
        )
    repo, file, revision = match.groups()
    ask(str(spec))
    try:
        import huggingface_hub as hub
        import huggingface_hub.errors
    except ImportError:
        what = f"{spec} needs a package that is not installed"
        raise UserError(what, do="pip install huggingface_hub") from None

    def get(name: str) -> Path:
        return Path(watched(hub.hf_hub_download, repo, name, revision=revision))

    # What `hf download` would be given.
    words = f" {file}" if file else ""
    words += f" --revision {revision}" if revision else ""
    with explained(str(spec), repo, words):
        # A file that is named needs no listing.
        names = []
        if not file or "." not in Path(file).name:
            # A repository, or a folder in it.
            inside = f"{file.rstrip('/')}/" if file else ""
            names = hub_files(hub, repo, revision, [inside + name for name in usual])
            if file not in names:
                there = [name[len(inside) :] for name in names if name.startswith(inside)]
                file = inside + pick_file(str(spec), there, usual)
        path = get(file)
        folder = file.rpartition("/")[0]
        usually = Path(file).name.startswith("diffusion_pytorch_model")
        besides = [f"{folder}/config.json".lstrip("/")]
        if folder.startswith(("unet", "transformer")):
            besides.append(SCHEDULER)
        for beside in besides:
            if beside in names or (usually and not names):
                # If it is missed, that is said where it is read.
                with contextlib.suppress(hub.errors.EntryNotFoundError):
                    get(beside)
        if INDEX.search(file):
            for shard in sorted(set(read_index(path).values())):
                get(f"{folder}/{shard}".lstrip("/"))
    return path


def hub_files(hub: Any, repo: str, revision: str | None, usual: Sequence[str]) -> list[str]:
    """The files of a repository; where the Hub cannot be reached, those of the usual ones that are
    in the cache."""
    try:
        return watched(hub.HfApi().list_repo_files, repo, revision=revision)
    except hub.errors.HfHubHTTPError:  # it was reached, and said no
        raise
    except Exception as error:  # offline by choice or not
        folders = dict.fromkeys(name.rpartition("/")[0] for name in usual)
        configs = [f"{folder}/config.json".lstrip("/") for folder in folders]
        known = [*usual, *configs, SCHEDULER]
        cached = {n: hub.try_to_load_from_cache(repo, n, revision=revision) for n in known}
        names = [name for name, path in cached.items() if isinstance(path, str)]
        if not names and not isinstance(error, hub.errors.OfflineModeIsEnabled):
            raise
        return names


def pick_file(spec: str, names: list[str], wanted: Sequence[str]) -> str:
    """The file that is wanted of a repository, if the names leave no doubt."""
    usual = [n for n in wanted if n in names]
    if len(usual) > 1 and {Path(n).parent for n in usual} == {Path(usual[0]).parent}:
        usual = usual[:1]  # the same weights in several containers
    others = usual or [n for n in names if n.endswith(WEIGHTS)]
    if len(others) != 1:
        choice = "it has no weights under a usual name"
        if others:
            choice = f"one of {listed(others, 8)}"
        raise UserError(f"{spec}: which file?", do=f"Write hf:org/name/FILE ({choice}).")
    return others[0]


@contextlib.contextmanager
def explained(spec: str, repo: str, wanted: str = "") -> Iterator[None]:
    """Whatever fails on the way to the Hub, in one line with what to do.

    wanted: the file and revision, as `hf download` takes them.
    """
    from huggingface_hub import errors
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its retries are announced one by one
    try:
        yield
    except UserError:
        raise
    except GivenUp as error:
        raise UserError(f"{spec}: {error}", do="Try again later, or give a local file.") from None
    except errors.GatedRepoError:
        raise UserError(
            f"{spec} is gated",
            do=f"Accept its terms at https://huggingface.co/{repo}, then run: hf auth login",
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"{spec}: the repository has no such revision",
            do="Give a branch, a tag or a commit after @.",
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{spec}: no such repository, or it is private",
            do=f"Check https://huggingface.co/{repo}, or run: hf auth login",
        ) from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        raise UserError(
            f"{spec} is not in the local cache, and the Hub cannot be reached (offline, or "
            "HF_HUB_OFFLINE is set)",
            do=f"Fetch it first where there is a network: hf download {repo}{wanted}",
        ) from None
    except errors.EntryNotFoundError:
        raise UserError(
            f"{spec}: the repository has no such file",
            do=f"Its files: https://huggingface.co/{repo}/tree/main",
        ) from None
    except Exception as error:  # the HTTP library's own, which changes with hub versions
        text = " ".join(str(error).split())[:160]
        raise UserError(
            f"{spec}: {type(error).__name__}: {text}", do="Check the network, or give a local file."
        ) from None
    finally:
        logging.set_verbosity(verbosity)


def origin(path: Path) -> dict[str, str]:
    """Where weights came from, to be recorded: a path, or for the Hub's the commit too, and the
    sha256 of the file.

    The cache names a large file by its sha256, so a damaged download is found here.
    """
    parts = path.parts
    if "snapshots" not in parts or not parts[parts.index("snapshots") - 1].startswith("models--"):
        return {"source": str(path.absolute())}
    i = parts.index("snapshots")
    with open_file(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    blob = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", blob) and blob != digest:
        raise UserError(
            f"{path} is damaged: its sha256 is {digest}, wanted {blob}",
            do="Delete it, so that it is fetched again.",
        )
    repo = parts[i - 1].removeprefix("models--").replace("--", "/", 1)
    return {"source": f"hf:{repo}/{'/'.join(parts[i + 2 :])}@{parts[i + 1]}", "sha256": digest}
