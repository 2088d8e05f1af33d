"""Opening a file to read it: a file and nothing that looks like one, and no more than was meant."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from harness.cli import UserError

TEXT_LIMIT = 64 << 20  # bytes of a file that is read whole: JSON, a table of tags
KINDS = {
    stat.S_ISDIR: "folder",
    stat.S_ISFIFO: "named pipe",
    stat.S_ISSOCK: "socket",
    stat.S_ISCHR: "device",
    stat.S_ISBLK: "device",
}


def open_file(path: Path | str) -> BinaryIO:
    """A file, open for reading. What only looks like one is a UserError: a pipe may never end."""
    # Before it is opened, which a device can notice; and after, for it may have changed.
    check_kind(path, os.stat(path).st_mode)
    file = open(path, "rb", opener=at_once)
    try:
        check_kind(path, os.fstat(file.fileno()).st_mode)
    except UserError:
        file.close()
        raise
    return file


def at_once(path: str, flags: int) -> int:
    """Opening a pipe waits for who writes to it, without this flag."""
    return os.open(path, flags | os.O_NONBLOCK)


def check_kind(path: Path | str, mode: int) -> None:
    """Refuse what is no file by its mode, as os.stat has it."""
    for test, kind in KINDS.items():
        if test(mode):
            raise UserError(
                f"{path} is a {kind}, wanted a file", do="Name a file, or copy it to one."
            )


def read_file(path: Path | str, limit: int = TEXT_LIMIT) -> bytes:
    """All of a small file; a UserError above a limit of bytes."""
    with open_file(path) as file:
        data = file.read(limit + 1)
        size = os.fstat(file.fileno()).st_size
    if len(data) > limit:
        raise UserError(
            f"{path} has {max(size, len(data)):,} bytes, wanted at most {limit:,}",
            do="Is it the right file?",
        )
    return data
