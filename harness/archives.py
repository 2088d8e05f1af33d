"""Zip archives of strangers: whether their members may be read, and the arrays of an npz."""

import math
import os
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from harness.cli import UserError
from harness.reading import open_file

METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
# What grows more than so many times when it is unpacked, and is larger than this, is a bomb.
RATIO, SMALL = 100, 64 << 20
BAD_HEADER = (ValueError, TypeError, LookupError, SyntaxError, MemoryError, RecursionError)
BAD_HEADER += (tokenize.TokenError,)


def check_members(archive: zipfile.ZipFile, data: IO[bytes]) -> None:
    """Raise BadZipFile for members that are not what the directory says, or that nobody should
    unpack: encrypted, oddly compressed, twice there, over each other, a bomb."""
    members = archive.infolist()
    names = archive.namelist()
    if len(set(names)) < len(names):
        raise zipfile.BadZipFile("a member stands in it twice")
    data.seek(0, os.SEEK_END)
    if sum(member.compress_size for member in members) > data.tell():
        raise zipfile.BadZipFile("its members lie over each other")
    for member in members:
        if member.flag_bits & 1:
            raise zipfile.BadZipFile(f"{member.filename} is encrypted")
        if member.compress_type not in METHODS:
            kind = zipfile.compressor_names.get(member.compress_type, "an unknown method")
            raise zipfile.BadZipFile(f"{member.filename} is compressed by {kind}")
        if member.file_size > max(RATIO * member.compress_size, SMALL):
            raise zipfile.BadZipFile(
                f"{member.filename} would unpack from {member.compress_size:,} bytes to "
                f"{member.file_size:,}"
            )
        archive.open(member).close()  # its name in the body, which no checksum covers
    data.seek(-22, os.SEEK_END)
    end = data.read(22)
    count = int.from_bytes(end[10:12], "little")
    if end.startswith(b"PK\5\6") and count != min(len(names), 0xFFFF):
        raise zipfile.BadZipFile(f"its directory is of {count} members, and names others")


def read_npz(path: Path, wanted: Sequence[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    """(names of all arrays, those that are wanted) of an npz: numbers, in this machine's byte
    order. What cannot be read is a UserError."""
    try:
        with open_file(path) as data:
            if data.read(6) == b"\x93NUMPY":
                raise UserError(
                    f"{path} holds one array, as npy does; wanted an npz",
                    do="Save it with numpy.savez.",
                )
            with zipfile.ZipFile(data) as archive:
                check_members(archive, data)
                members = {name.removesuffix(".npy"): name for name in archive.namelist()}
                arrays = {
                    name: read_array(archive, archive.getinfo(members[name]))
                    for name in wanted
                    if name in members
                }
                return list(members), arrays
    except UserError:
        raise
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        # RuntimeError: of zips that are made in a way that zipfile does not know.
        raise UserError(f"{path} cannot be read as npz ({error})", do="Make it anew.") from None


def read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """One array. Memory is taken once the member has as many bytes as its header asks for."""
    name = member.filename
    with archive.open(member) as file:
        try:
            version = np.lib.format.read_magic(file)
            headers = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            shape, fortran, dtype = headers[version](file)
        except BAD_HEADER as error:
            reason = " ".join(str(error).split())[:80]
            raise ValueError(f"the header of {name} does not parse: {reason}") from None
        if dtype.kind not in "biuf":
            raise ValueError(f"{name} holds {str(dtype)[:40]}, wanted numbers; nothing was run")
        size = dtype.itemsize * math.prod(shape)
        if min(shape, default=0) < 0 or size != member.file_size - file.tell():
            raise ValueError(f"{name} has not the bytes of {dtype} {shape}")
        flat = np.empty(math.prod(shape), dtype)
        view, done = memoryview(flat.view(np.uint8)), 0
        while done < size and (n := file.readinto(view[done : done + (1 << 24)])):
            done += n
        if done < size or file.read(1):  # the read at the end compares the checksum
            raise ValueError(f"{name} is cut short")
    array = flat.reshape(shape, order="F" if fortran else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)
