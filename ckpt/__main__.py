"""Checkpoints: look into any network's file, turn it into another layout, compare two.

    python -m ckpt inspect FILE             # what it is, and what is missing for sampling
    python -m ckpt convert SRC DST --layout diffusers --dtype fp16
                                            # DST: a file.safetensors, or a new folder
    python -m ckpt verify A B               # the same weights? exit code 0 yes, 1 no, 2 cannot tell

A name may be a file, a run's folder, a diffusers folder, or hf:org/name[/file][@revision].
"""

import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # also where the file itself is run
    sys.path[0] = str(Path(__file__).parent.parent)
    import harness.interrupt  # noqa: F401

from ckpt.convert import convert, inspect, verify
from ckpt.meaning import said_table
from harness.cli import UserError, cli, closest, dashed, flag, parse


@dataclass(frozen=True)
class Options:
    layout: Literal["", "native", "diffusers"] = flag("", head="convert")
    dtype: Literal["", "fp32", "fp16", "bf16"] = flag("")
    ema: bool = flag(False, "where a file holds both: the EMA, not the raw weights", head="all")
    part: str = flag("", "of a file with several networks: what stands before its names")
    num_heads: int = flag(0, "where the file cannot say: attention heads …", low=0, high=1e4)
    num_head_channels: int = flag(0, "… or channels a head,", low=0, high=1e4)
    attention_order: Literal["", "legacy", "new"] = flag("", "… and for ADM how qkv rows are")
    objective: Literal["", "fm", "eps", "v", "x0"] = flag(
        "", "what it was trained to output; convert writes it", head="inspect and convert"
    )
    table: Literal["", "linear", "cosine", "scaled_linear"] = flag(
        "", "noise schedule of eps, v, x0; LDM's yaml calls scaled_linear linear"
    )
    betas: str = flag("", "… or START,END,SCHEDULE: any betas, as 0.0015,0.0195,scaled_linear")
    zero_snr: bool = flag(False, "the schedule ends in pure noise (zero terminal SNR)")


COMMANDS = {"inspect": ("FILE",), "convert": ("SRC", "DST"), "verify": ("A", "B")}
BOOLEAN = [f.name for f in fields(Options) if f.type is bool]
SWITCHES = {"--help", "-h", "--dry-run"} | {dashed(name) for name in BOOLEAN}
SWITCHES |= {dashed(f"no_{name}") for name in BOOLEAN}


def positional(argv: list[str]) -> tuple[list[str], list[str]]:
    """Words and flags, in whatever order they come; after -- all are words."""
    words, flags, rest, seen = [], [], list(argv), set()
    while rest:
        word = rest.pop(0)
        if word == "--":
            return words + rest, flags
        if not word.startswith("-"):
            words.append(word)
            continue
        flags.append(word)
        name, equals, _ = word.partition("=")
        if name.startswith("--") and name in seen:
            raise UserError(f"{name} is given twice", do="Give it once.")
        seen.add(name)
        if not equals and word not in SWITCHES and rest and not rest[0].startswith("--"):
            flags.append(rest.pop(0))
    return words, flags


def check_command(words: list[str], options: Options) -> tuple[str, list[str]]:
    """(command, names), if the options belong to it."""
    command, names = (words[0], words[1:]) if words else ("", [])
    if command not in COMMANDS:
        near = closest(command, COMMANDS)
        what = f"command {command!r} is not one of {', '.join(COMMANDS)}"
        raise UserError(what, do=f"{near}  See --help.")
    if len(names) != len(COMMANDS[command]):
        wanted = " ".join(COMMANDS[command])
        raise UserError(f"{command} takes {wanted}, got {len(names)} names", do="See --help.")
    if command == "convert" and not options.layout:
        raise UserError(
            "convert needs --layout native or --layout diffusers", do="Add one of them."
        )
    if command != "convert" and (options.layout or options.dtype):
        raise UserError(
            f"--layout and --dtype are convert's, not {command}'s", do="Leave them out."
        )
    meaning = (options.objective, options.table, options.betas, options.zero_snr)
    if command == "verify" and any(meaning):
        raise UserError(
            "verify takes no --objective, --table, --betas and --zero-snr", do="Leave them out."
        )
    return command, names


def main() -> None:
    words, flags = positional(sys.argv[1:])
    options, dry_run = parse(Options, __doc__.replace("\n\n", "\n", 1), flags)
    command, names = check_command(words, options)
    table = {"table": said_table(options.table, options.betas, options.zero_snr)}
    apart = ("layout", "dtype", "betas")
    known = {k: v for k, v in {**asdict(options), **table}.items() if v and k not in apart}
    if dry_run:
        print(json.dumps({"command": command, "names": names, **asdict(options)}, indent=1))
    elif command == "inspect":
        print("\n".join(inspect(*names, **known)))
    elif command == "convert":
        digest = convert(*names, options.layout, options.dtype or None, **known)
        print(f"{names[1]}: {options.layout}, read back bit for bit, fingerprint {digest}")
    else:
        same, lines = verify(*names, **known)
        print("\n".join(lines))
        sys.exit(0 if same else 1)


if __name__ == "__main__":
    cli(main, crash=3)  # 1 is verify's "no"
