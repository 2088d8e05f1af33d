"""From one frozen dataclass to a command line, and from a user's mistake to one line on stderr.

    @dataclass(frozen=True)
    class Config:
        lr: float = flag(2e-4, "peak learning rate", low=0, high=1e3)
        weight: Literal["uniform", "min_snr"] = flag("uniform", "per sample")
        gamma: float = flag(5.0, "caps the SNR", above=0, of="--weight min_snr")
        ema: tuple[float, ...] = flag((), "widths, comma separated")

    cfg, dry_run = parse(Config, __doc__)      # --lr 1e-4 --ema 0.05,0.1

A flag is declared once: default, help, range, what it writes, and with what other flags it has an
effect.
"""

import dataclasses
import difflib
import io
import math
import os
import re
import signal
import stat
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


# Numbers that a flag takes, at most: a command line has room for 10,000 and more.
MOST = 1_000
# Bytes of a file's name, at most; what is written beside it has names of its own.
NAME_BYTES = 240


class UserError(ValueError):
    """Something the user can mend, as one line: what it is, what it got, what it wanted, what to
    do about it.

    UserError("--batch 250", wanted="a multiple of 32", do="Try --batch 256.")
    -> --batch 250: wanted a multiple of 32.  Try --batch 256.
    """

    def __init__(self, what: str, *, got: str = "", wanted: str = "", do: str = ""):
        message = what
        if got:
            message += f": got {got}"
        if wanted:
            message += f", wanted {wanted}" if got else f": wanted {wanted}"
        if not message.endswith((".", "?", "!")):
            message += "."
        if do:
            message += f"  {do.strip()}"
        super().__init__(message)


def cli(main: Callable[[], None], crash: int = 1) -> None:
    """Run a script's main(). What the user can mend becomes one line on stderr and exit code 2;
    a bug keeps its traceback and exits with `crash`."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):  # it may not have every letter of a file's words
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        check_words(sys.argv[1:])
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if is_for_user(error):
            rank = os.environ.get("RANK", "0")
            where = "" if rank == "0" else f" [rank {rank}]"
            message = printable(" ".join(explain(error).split("\n")))
            print(f"error{where}: {message}", file=sys.stderr, flush=True)
            sys.exit(getattr(error, "exit_code", 2))
        if crash == 1:  # as Python itself does it
            raise
        traceback.print_exc()
        sys.exit(crash)


def check_words(words: Iterable[str]) -> None:
    """Refuse bytes that are no text: they could be printed nowhere, and kept in no JSON."""
    for word in words:
        if "\0" in word or any("\ud800" <= letter <= "\udfff" for letter in word):
            raise UserError(
                f"{ascii(clipped(word))}", wanted="UTF-8 text", do="Rename that file or folder."
            )


def is_for_user(error: Exception) -> bool:
    """Can the user mend it? Rooms that know nothing of UserError mark theirs with `for_user`."""
    return isinstance(error, (UserError, OSError, MemoryError)) or getattr(error, "for_user", False)


def explain(error: Exception) -> str:
    """The line that a user sees of an error (see is_for_user)."""
    if isinstance(error, OSError):
        place = str(error.filename or "")
        if len(place) > 300:
            place = clipped(place)
        return f"{place and place + ': '}{error.strerror or error}."
    return str(error) or "out of memory"


def closest(word: str, options: Iterable[str], n: int = 3) -> str:
    """The sentence "  Closest: a, b.", to be an error's `do`; "" when nothing is near."""
    near = difflib.get_close_matches(word, list(options), n=n, cutoff=0.5)
    return f"  Closest: {', '.join(near)}." if near else ""


# ---- flags --------------------------------------------------------------------------------------


def flag(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    of: str | tuple[str, ...] = (),
    off: Any = None,
    writes: str = "",
    head: str = "",
    beside: bool = False,
) -> Any:
    """A field of a Config. Without a default it is required.

    low, high: the range of its numbers, ends included; above: what they have to exceed.
    of: the flags with which it has an effect, all of them: "--init" (that flag is on),
        "not --invert" (it is off), "--weight min_snr | soft_min_snr" (it has one of these values),
        "--this or --that" (one of these conditions holds).
    off: the one value that switches this flag off, instead of 0, false or empty.
    writes: it names what is written: "folder", "file", or a file's ending, ".png".
    head: a heading before it in --help; beside: it stands there in the line of the flag before.
    """
    of = (of,) if isinstance(of, str) else of
    metadata = {"help": help, "low": low, "high": high, "above": above, "of": of, "off": off}
    metadata |= {"writes": writes, "head": head, "beside": beside}
    return dataclasses.field(default=default, metadata=metadata)


def flag_like(cls: type, name: str, default: Any, help: str | None = None) -> Any:
    """The flag `name` of another Config with a default, and perhaps a help text, of its own."""
    metadata = dict(field_of(cls, name).metadata)
    if help is not None:
        metadata["help"] = help
    return dataclasses.field(default=default, metadata=metadata)


def field_of(cls: type, name: str) -> dataclasses.Field:
    return next(field for field in dataclasses.fields(cls) if field.name == name)


def dashed(name: str) -> str:
    """A field's name as it is typed: lr_decay -> --lr-decay."""
    return f"--{name.replace('_', '-')}"


def shown(value: Any) -> str:
    """A flag's value as it is typed."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def printable(text: str) -> str:
    """A text with a stranger's words in it, as one that no terminal obeys."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def clipped(text: str) -> str:
    """The beginning of what may be very long, for a message."""
    return text if len(text) <= 80 else f"{text[:60]}…"


def parse(cls: type, doc: str | None = "", argv: list[str] | None = None) -> tuple[Any, bool]:
    """Read `--field value`, `--field=value`, `--flag`, `--no-flag` into cls(...).

    Returns (config, whether --dry-run was given). Types come from the annotations: int, float, str,
    bool, Literal[…] (choices), tuple[T, ...] (comma separated) and `X | Y`: the first that fits,
    where None means not given. `--help` prints one screen and exits.
    """
    given, dry_run = read_flags([cls], doc, argv)
    return made(cls, given), dry_run


def made(cls: type, given: dict[str, Any]) -> Any:
    """A Config of the flags that were given, checked."""
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.name not in given:
            raise UserError(f"{dashed(field.name)} is required", do="See --help.")
    cfg = cls(**given)
    check_flags(cfg)
    return cfg


def read_flags(
    classes: list[type], doc: str | None = "", argv: list[str] | None = None
) -> tuple[dict[str, Any], bool]:
    """({name: value} of the flags that were given, of any of the Configs; whether --dry-run was).

    Where two Configs have a flag of one name, it is the first one's.
    """
    hints = {}
    for cls in reversed(classes):
        hints |= typing.get_type_hints(cls)
    fields = {field.name for cls in classes for field in dataclasses.fields(cls)}
    known = [dashed(name)[2:] for name in fields] + ["help", "dry-run"]
    words = list(sys.argv[1:] if argv is None else argv)
    given, dry_run = {}, False
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            print(usage(classes, doc))
            sys.exit(0)
        key, equals, value = word[2:].partition("=")
        name = key.replace("-", "_")
        if word == "--dry-run":
            dry_run = True
        elif not word.startswith("--"):
            raise UserError(
                f"unexpected argument {word!r}: every option is written --name value",
                do="See --help.",
            )
        elif name in fields and hints[name] is bool and not equals:
            given[name] = True
        elif name.startswith("no_") and hints.get(name[3:]) is bool and not equals:
            given[name[3:]] = False
        elif name not in fields:
            raise UserError(f"unknown flag --{key}", do=f"{closest(key, known)}  See --help.")
        elif not equals and (not words or words[0].startswith("--")):
            raise UserError(f"--{key} needs a value", do=f"Write --{key} VALUE, or see --help.")
        else:
            given[name] = convert(key, value if equals else words.pop(0), hints[name])
    return given, dry_run


def convert(key: str, text: str, kind: Any) -> Any:
    """One command-line string to the annotated type, or a UserError that names the flag."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # float | None, float | Literal["auto"]
        words = [word for part in inner for word in typing.get_args(part)]
        if text in words:
            return text
        try:
            return convert(key, text, inner[0])
        except UserError:
            wanted = " or ".join([inner[0].__name__, *words])
            raise wrong_value(key, text, wanted) from None
    if origin is typing.Literal:
        if text not in inner:
            choices = ", ".join(filter(None, inner))
            raise UserError(
                f"--{key} {clipped(text)!r} is not one of {choices}",
                do=closest(text, inner) or "Choose one of them.",
            )
        return text
    if origin is tuple:
        parts = [part.strip() for part in text.split(",")]
        return tuple(convert(key, part, inner[0]) for part in parts if part)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise wrong_value(key, text, "true or false")
        return text.lower() == "true"
    try:
        if kind is int and re.fullmatch(r"\d+e\d+", text):  # 2e7 reads well; int() takes 20_000_000
            return int(float(text))
        return kind(text)
    except (ValueError, OverflowError):
        raise wrong_value(key, text, kind.__name__) from None


def wrong_value(key: str, text: str, wanted: str) -> UserError:
    return UserError(
        f"--{key} takes {wanted}, got {clipped(text)!r}", do=f"Write --{key} VALUE; see --help."
    )


# ---- what the declarations say ------------------------------------------------------------------


def check_flags(cfg: Any) -> None:
    """Refuse numbers out of range, places that cannot be written, and flags that would change
    nothing."""
    check_values(cfg)
    for name, condition in idle_flags(cfg).items():
        but = condition.removeprefix("not ")
        where = f"here: it is of {condition}" if but == condition else f"with {but}"
        raise UserError(f"{dashed(name)} changes nothing {where}", do="Leave it out.")


def check_values(cfg: Any) -> None:
    """Of check_flags(), what can be said of each flag alone."""
    for field in dataclasses.fields(cfg):
        value, writes = getattr(cfg, field.name), field.metadata.get("writes")
        check_range(field, value)
        # An empty name is the one that a script makes up, where that is the default.
        if writes and (value or field.default != ""):
            check_place(dashed(field.name), value, writes)


def idle_flags(cfg: Any) -> dict[str, str]:
    """{name: the condition that does not hold} of the flags that are not at their default, but
    would change nothing."""
    found = {}
    for field in dataclasses.fields(cfg):
        if getattr(cfg, field.name) == field.default:
            continue
        for condition in field.metadata.get("of", ()):
            if not holds(cfg, condition):
                found.setdefault(field.name, condition)
    return found


def check_range(field: dataclasses.Field, value: Any) -> None:
    """Refuse a number, or one of a list, that is outside a flag's range."""
    low, high, above = (field.metadata.get(key) for key in ("low", "high", "above"))
    numbers = value if isinstance(value, tuple) else (value,)
    numbers = [n for n in numbers if isinstance(n, (int, float)) and not isinstance(n, bool)]
    if (low, high, above) == (None, None, None):
        return
    if len(numbers) > MOST:
        raise UserError(
            dashed(field.name),
            got=f"{len(numbers):,} numbers",
            wanted=f"{MOST:,} at most",
            do="Give fewer.",
        )
    inside = all(
        (low is None or n >= low)  # NaN fails every comparison
        and (high is None or n <= high)
        and (above is None or n > above)
        and abs(n) < math.inf
        for n in numbers
    )
    if not inside:
        wanted = range_text(low, high, above)
        got = clipped(shown(value))
        raise UserError(f"{dashed(field.name)} {got}", wanted=wanted, do="See --help.")


def check_place(what: str, name: str, kind: str) -> None:
    """Refuse, before hours of work, a name at which nothing can be written.

    kind: "folder", which may be there or not; "file", in place of an old one; or its ending.
    """
    path = Path(name)
    at = f"{what} {clipped(name)}" if name else f"{what} ''"
    if any(len(os.fsencode(part)) > NAME_BYTES for part in path.parts):
        raise UserError(
            at, wanted=f"names of {NAME_BYTES} bytes at most", do="Give it a shorter name."
        )
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = 0
    except OSError as error:
        raise UserError(f"{at}: {error.strerror}", do="Choose another place.") from None
    if kind == "folder":
        if not name or mode and not stat.S_ISDIR(mode):
            raise UserError(at, wanted="a folder", do="Name another place.")
        return
    if stat.S_ISDIR(mode) or name.endswith("/") or not path.name or path.name == "..":
        example = path / f"NAME{kind if kind != 'file' else ''}"
        raise UserError(f"{at} is a folder", wanted="a file", do=f"Try {what} {example}.")
    if mode and not stat.S_ISREG(mode):
        raise UserError(f"{at} is no regular file", do="Name a file, or a new one.")
    if kind != "file" and path.suffix.lower() != kind:
        example = path.with_name(path.name.rstrip(".")[:60] or "NAME").with_suffix(kind)
        raise UserError(at, wanted=f"a file that ends in {kind}", do=f"Try {what} {example}.")
    near = next(folder for folder in path.absolute().parents if folder.exists())
    if not near.is_dir() or not os.access(near, os.W_OK):
        raise UserError(f"{at}: cannot write to {near}", do="Give a writable folder.")


def range_text(low: float | None, high: float | None, above: float | None) -> str:
    """ "1 to 8", "at least 1", "more than 0", "more than 0, up to 1"."""
    if low is not None and high is not None:
        return f"{limit(low)} to {limit(high)}"
    if low is not None:
        return f"at least {limit(low)}"
    if above is not None and high is not None:
        return f"more than {limit(above)}, up to {limit(high)}"
    return f"more than {limit(above)}" if above is not None else f"at most {limit(high)}"


def limit(number: float) -> str:
    """A number of a range as it is read: 0.001, 1000, 1,000,000."""
    large = abs(number) >= 10_000 and number == int(number)
    return f"{int(number):,}" if large else f"{number:g}"


def holds(cfg: Any, condition: str) -> bool:
    """Is a condition of flag(of=…) true of a config?"""
    if " or " in condition:
        return any(holds(cfg, part) for part in condition.split(" or "))
    negated, words = condition.startswith("not "), condition.removeprefix("not ")
    name, _, values = words.removeprefix("--").partition(" ")
    name = name.replace("-", "_")
    value, off = getattr(cfg, name), field_of(type(cfg), name).metadata.get("off")
    if values:
        true = str(value) in values.split(" | ")
    else:
        true = bool(value) if off is None else value != off
    return true != negated


def usage(classes: list[type], doc: str | None) -> str:
    """The --help screen: the first paragraph of the script's docstring, then a line for each flag
    with its default, its choices and its help."""
    hints, fields = {}, {}
    for cls in reversed(classes):
        hints |= typing.get_type_hints(cls)
    for cls in classes:
        for field in dataclasses.fields(cls):
            fields.setdefault(field.name, field)
    lines = [(doc or "").strip().split("\n\n")[0]]
    width = max(map(len, [*map(dashed, fields), "--dry-run"]))
    for field in fields.values():
        if head := field.metadata.get("head"):
            lines.append(f"{head}:")
        text, kind = field.metadata.get("help", ""), hints[field.name]
        if typing.get_origin(kind) is typing.Literal and "|" not in text:
            choices = " | ".join(choice for choice in typing.get_args(kind) if choice)
            text = f"{choices}: {text}".removesuffix(": ")
        if field.metadata.get("beside"):
            lines[-1] += f"; {dashed(field.name)}: {text}"
            continue
        default = "" if field.default is None else shown(field.default)
        if field.default is dataclasses.MISSING:
            default = "required"
        lines.append(f"  {dashed(field.name):<{width}} {default:<10} {text}".rstrip())
    lines.append(f"  {'--dry-run':<{width}} {'':<10} print the resolved config and stop")
    return "\n".join(lines)
