"""The rows of a log, read from a file that a kill or a power cut may have spoiled."""

import json
import sys
from pathlib import Path
from typing import Any

from harness.files import atomic
from harness.reading import open_file


def read_log(path: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], list[bytes]]:
    """((line, entry) of each entry of a log; the lines that are none, such as a power cut leaves).

    A last line that a kill cut short, or that is still being written, is neither.
    """
    good, bad = [], []
    with open_file(path) as file:
        *lines, last = file.read().split(b"\n")
    cut_short = last.startswith(b"{") and b"\0" not in last and entry_of(last) is None
    for line in lines if cut_short else [*lines, last]:
        row = entry_of(line)
        if row is not None:
            good.append((line, row))
        elif line:
            bad.append(line)
    return good, bad


def entry_of(line: bytes) -> dict[str, Any] | None:
    """The entry of a log that a line is, if it is one."""
    try:
        row = {"images": 0, **json.loads(line.decode())}
    except (ValueError, TypeError, RecursionError):
        return None
    return row if is_number(row["images"]) else None


def is_number(value: Any) -> bool:
    """A number that can be drawn: NaN, infinity and integers beyond floats fail the comparison."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) < 1e300


def set_aside(path: Path, lines: list[bytes]) -> None:
    """Keep lines of a log that are no entries in a file beside it, and say so."""
    aside = path.with_name("log.damaged")
    before = aside.read_bytes() if aside.exists() else b""
    with atomic(aside) as temporary:
        temporary.write_bytes(before + b"".join(line + b"\n" for line in lines))
    words = f"{len(lines)} lines of {path} are no entries of a log, such as a power cut leaves"
    print(f"warning: {words}; they are now in {aside}.", file=sys.stderr)
