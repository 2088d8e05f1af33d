"""What lies below a folder: images, their tags and captions, and what is none of these.

    found = find_files(root)       # names are relative to root
    unused(found, {})              # a line for each kind of file that is not used
"""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from data.captions import ENDING
from data.images import EXTENSIONS, OTHERS, sniff
from data.tags import TABLES, Spellings, printable

# Folders that systems, cameras and network drives make for themselves; what begins with a dot is
# of that kind too.
GENERATED = {"__MACOSX", "@eaDir", "#recycle", "#snapshot", "$RECYCLE.BIN", "lost+found"}
GENERATED |= {"System Volume Information", "@tmp", "@Recycle", "@Recently-Snapshot", "__pycache__"}
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".7z", ".rar")


@dataclass
class Found:
    """The files below a folder; names are relative to it."""

    names: list[str] = field(default_factory=list)  # images
    tables: list[Path] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)  # names of .txt files
    captions: set[str] = field(default_factory=set)  # names of .caption files
    parquet: list[Path] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)  # files, and folders that are not entered
    unusable: dict[str, str] = field(default_factory=dict)  # name -> why
    more: bool = False  # there are files that were not looked at

    def add(self, path: Path, name: str) -> None:
        """Put a file where it belongs: by its ending, or without one by its first bytes."""
        end = path.suffix.lower()
        if end in EXTENSIONS:
            if path.is_file():
                self.names.append(name)
            else:  # a pipe would be waited for
                self.unusable[name] = "a link to nothing" if path.is_symlink() else "not a file"
        elif end in OTHERS:
            self.unusable[name] = f"{end} files are not read"
        elif path.name in TABLES:
            self.tables.append(path)
        elif end == ".txt":
            self.texts.add(name)
        elif end == ENDING:
            self.captions.add(name)
        elif end == ".parquet":
            self.parquet.append(path)
        elif path.name.lower().endswith(ARCHIVES):
            self.archives.append(name)
        else:
            kind = sniff(path) if not end and path.is_file() else ""
            if kind == "image":
                self.names.append(name)
            elif kind:
                self.unusable[name] = kind
            else:
                self.others.append(name)


def find_files(root: Path, most: int = sys.maxsize) -> Found:
    """Everything below a folder but what is hidden; after `most` files, no other folder is entered.
    Links are followed; a folder that is reached twice, or contains itself, is read once."""
    found, visited, count = Found(), {os.path.realpath(root)}, 0

    def locked(error: OSError) -> None:
        found.unusable[os.path.relpath(error.filename, root)] = f"a folder: {error.strerror}"

    for folder, folders, files in os.walk(root, followlinks=True, onerror=locked):
        hidden = {name for name in folders if name[0] == "." or name in GENERATED}
        hidden_files = {name for name in files if name[0] == "."}
        found.hidden += [
            os.path.relpath(os.path.join(folder, name), root) for name in hidden | hidden_files
        ]
        folders[:] = sorted(set(folders) - hidden)
        files = [name for name in files if name not in hidden_files]
        count += len(files)
        if count > most:
            found.more = True
            break
        real = {name: os.path.realpath(os.path.join(folder, name)) for name in folders}
        folders[:] = [name for name in folders if real[name] not in visited]
        visited.update(real.values())
        for file in files:
            path = Path(folder, file)
            found.add(path, str(path.relative_to(root)))
    found.names.sort()
    found.parquet.sort()
    return found


def unused(found: Found, more: dict[str, Iterable[str]]) -> list[str]:
    """A line for each kind of file that is not used, and no image."""
    kinds = {
        "archives, not opened: unpack them": found.archives,
        "hidden files and folders, or generated ones, not read": found.hidden,
        "other files, no images by name or, without an ending, by content": found.others,
        **more,
    }
    return [
        f"{len(files):,} {what} (first: {printable(min(files))})"
        for what, files in kinds.items()
        if files
    ]


def of_no_image(found: Found) -> dict[str, list[str]]:
    """{what they are: names} of the files of tags and captions that lie beside no image."""
    images = [*found.names, *found.unusable]

    def strays(files: set[str], ending: str) -> list[str]:
        beside = Spellings(str(Path(name).with_suffix(ending)) for name in images)
        return [name for name in files if not beside.find(name)]

    return {
        "text files of no image's name (the tags of a.png lie in a.txt)": strays(
            found.texts, ".txt"
        ),
        f"caption files of no image's name (that of a.png is a{ENDING})": strays(
            found.captions, ENDING
        ),
    }
