"""From one frozen dataclass to a command line, from a user's mistake to one line on stderr, where to run, and what runs.

    @dataclass(frozen=True)
    class Config:
        lr: float = 2e-4              # peak learning rate          <- this comment is the --help text
        ema: tuple[float, ...] = ()   # comma separated on the command line

    cfg, dry_run = parse(Config, __doc__)      # --lr 1e-4 --ema 0.05,0.1
"""

import dataclasses
import difflib
import hashlib
import inspect
import os
import platform
import re
import subprocess
import sys
import traceback
import types
import typing
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, ContextManager

import torch


class UserError(ValueError):
    """Something the user can mend. The message is one line: what, got, wanted, do."""


def cli(main: Callable[[], None], crash: int = 1) -> None:
    """Run a script's main(): what the user can mend becomes one line on stderr and exit code 2; a bug exits with `crash`."""
    try:
        main()
    except (UserError, OSError, MemoryError) as error:
        message = str(error) or "out of memory"
        if isinstance(error, OSError):
            message = f"{error.filename}: " * bool(error.filename) + f"{error.strerror or error}."
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" [rank {rank}]"
        print(f"error{where}: " + " ".join(message.split("\n")), file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception:
        if crash == 1:                                                          # as Python itself
            raise
        traceback.print_exc()
        sys.exit(crash)


def closest(word: str, options: typing.Iterable[str], n: int = 3) -> str:
    """' Closest: …' for an error message; empty when nothing is near."""
    near = difflib.get_close_matches(word, list(options), n=n, cutoff=0.5)
    return f"  Closest: {', '.join(near)}." if near else ""


def parse(cls: type, doc: str | None = "", argv: list[str] | None = None) -> tuple[Any, bool]:
    """Read `--field value`, `--field=value`, `--flag`, `--no-flag` into cls(...); returns (config, dry_run).

    Types come from the annotations: int, float, str, bool, Literal[…] (choices), tuple[T, ...] (comma separated) and `X | Y`: the
    first that fits, where None means not given. `--help` prints one screen and exits; `--dry-run` is reported, for the script to act on.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    flags = [n.replace("_", "-") for n in fields] + ["help", "dry-run"]
    args, given, dry_run = list(sys.argv[1:] if argv is None else argv), {}, False
    while args:
        word = args.pop(0)
        if word in ("-h", "--help"):
            print(usage(cls, doc))
            sys.exit(0)
        key, eq, value = word[2:].partition("=")
        name = key.replace("-", "_")
        if word == "--dry-run":
            dry_run = True
        elif not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}: every option is written --name value (see --help).")
        elif name in fields and hints[name] is bool and not eq:
            given[name] = True
        elif name.startswith("no_") and hints.get(name[3:]) is bool and not eq:
            given[name[3:]] = False
        elif name not in fields:
            raise UserError(f"unknown flag --{key}.{closest(key, flags)}  See --help.")
        elif not eq and (not args or args[0].startswith("--")):
            raise UserError(f"--{key} needs a value.")
        else:
            given[name] = convert(key, value if eq else args.pop(0), hints[name])
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in given]
    if missing:
        raise UserError(f"--{missing[0].replace('_', '-')} is required (see --help).")
    return cls(**given), dry_run


def convert(key: str, text: str, kind: Any) -> Any:
    """One command-line string to the annotated type, or a UserError that names the flag."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):                               # float | None, float | Literal["auto"]: None cannot be typed
        words = [word for part in inner for word in typing.get_args(part)]
        try:
            return text if text in words else convert(key, text, inner[0])
        except UserError:
            raise UserError(f"--{key} takes {' or '.join([inner[0].__name__, *words])}, got {text!r}.") from None
    if origin is typing.Literal:
        if text not in inner:
            raise UserError(f"--{key} {text!r} is not one of {', '.join(filter(None, inner))}.{closest(text, inner)}")
        return text
    if origin is tuple:
        return tuple(convert(key, part.strip(), inner[0]) for part in text.split(",") if part.strip())
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"--{key} takes true or false, got {text!r}.")
        return text.lower() == "true"
    try:
        if kind is int and re.fullmatch(r"\d+e\d+", text):                       # 2e7 reads well; int() takes 20_000_000
            return int(float(text))
        return kind(text)
    except (ValueError, OverflowError):
        raise UserError(f"--{key} takes {kind.__name__}, got {text!r}.") from None


def usage(cls: type, doc: str | None) -> str:
    """The --help screen: the script's first docstring paragraph, then a line a flag with default and comment. A comment
    `# ---- name` between the fields becomes a heading."""
    source = "".join(inspect.getsource(base) for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base))   # its own comment wins
    comments = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", source, re.M))
    headings = {field: name for name, field in re.findall(r"^    # -{4} (.*)\n    (\w+):", source, re.M)}
    hints, lines = typing.get_type_hints(cls), [(doc or "").strip().split("\n\n")[0], ""]
    for field in dataclasses.fields(cls):
        value = "" if field.default is None else field.default
        lines += [f"{headings[field.name]}:"] if field.name in headings else []
        if isinstance(value, tuple):
            value = ",".join(map(str, value))
        shown = "required" if value is dataclasses.MISSING else value
        text, kind = comments.get(field.name, ""), hints[field.name]
        choices = " | ".join(c for c in typing.get_args(kind) if c) if typing.get_origin(kind) is typing.Literal else ""
        lines.append(f"  --{field.name.replace('_', '-'):<15} {shown!s:<10} {f'{choices}: ' * bool(choices) * ('|' not in text)}{text}".removesuffix(": "))
    lines.append(f"  --{'dry-run':<15} {'':<10} print the resolved config and stop")
    return "\n".join(lines)


def pick_device(name: str) -> torch.device:
    """"auto" = this process's GPU if there is one, else the CPU; anything else as torch names it. A GPU becomes current."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)                                       # Triton launches on the current one
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name!r} is not usable here: {str(error).splitlines()[0]}") from None
    return device


def autocast(device: torch.device, dtype: str) -> ContextManager:
    """The network's precision: "bf16" by autocast, "fp32", or "auto" = bf16 on GPUs that have it in hardware."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision(device, dtype) == "bf16")


def precision(device: torch.device, dtype: str) -> str:
    """What "auto" means on a device."""
    bf16 = dtype == "bf16" or (dtype == "auto" and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))
    return "bf16" if bf16 else "fp32"


@lru_cache
def versions(*packages: str) -> dict[str, Any]:
    """Python, torch and the commit of this code, with a hash of uncommitted changes ("" = clean, None = no git). Results of
    measurements are not code. Packages that are not installed are None."""
    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-c", "safe.directory=*", "-C", str(Path(__file__).parent), *args], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout

    def installed(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None
    commit, diff = git("rev-parse", "HEAD"), git("diff", "HEAD", "--", ".", ":!benchmarks/results")
    return {"commit": commit and commit.strip(), "dirty": hashlib.sha256(diff.encode()).hexdigest()[:12] if diff else diff and "",
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         **{package: installed(package) for package in ("numpy", "triton", *packages)}}}
