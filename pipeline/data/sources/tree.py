"""Lists all files that a user gave, on any storage: those that can be data, and the reason for each that can't."""

import glob
import os
import posixpath
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from pipeline import storage
from pipeline.errors import InputError
from pipeline.stretches import read_stretch, version_of

# Files that operating systems leave beside data.
_LITTER = ("thumbs.db", "desktop.ini")
HIDDEN = "hidden"
_CLOSED = "the folder can't be read"
_UNREADABLE_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@dataclass(frozen=True)
class File:
    """A file that can be read.

    Attributes:
        size: size in bytes.
        version: text that changes with the content: an ETag, or size and time of the last change.
    """

    size: int
    version: str


@dataclass(frozen=True)
class Tree:
    """The files below a folder, or one file, or the files that a pattern matches.

    Attributes:
        root: URI of their folder; for a pattern, the folder before the first component with *, ? or [].
        files: files by name, the path below the root, sorted by name.
        ignored: reason by name, for files and folders that are not data.
        bad: reason by name, for files and folders that may be data but can't be read.
        whole: True if everything in the root was given.
    """

    root: str
    files: dict[str, File]
    ignored: dict[str, str] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    whole: bool = True

    def uri(self, name: str) -> str:
        """URI of one of its files."""
        return storage.join(self.root, name)

    def head(self, name: str, count: int = 64) -> bytes:
        """The first `count` bytes of a file; fewer if it is shorter."""
        if not self.files[name].size:
            return b""
        return read_stretch(self.uri(name), 0, count)


def open_tree(uri: str) -> Tree:
    """Lists a file, everything below a folder, or both for each match of a pattern. Links are followed.

    Names are relative to the folder in which a pattern begins. So names, and labels taken from them, do not depend on
    what else the pattern matches.

    Raises:
        InputError: nothing of that name exists, or the storage can't tell.
    """
    fs, path = storage.open_fs(uri)
    pattern = storage.pattern_of(uri)
    if isinstance(fs, LocalFileSystem):
        if pattern and "**" in pattern[1].split("/"):
            return _matching(_local_tree(pattern[0], ["."]), pattern[1], uri)
        if pattern:
            whole = posixpath.join(glob.escape(pattern[0]), pattern[1])
            root, found = pattern[0], glob.glob(whole, include_hidden=True)  # noqa: PTH207
        else:
            root = path if os.path.isdir(path) else posixpath.dirname(path)  # noqa: PTH112
            found = [path] if os.path.lexists(path) else []
        if not found:
            raise InputError(f"{uri}: no such file or folder")
        return _local_tree(root, [posixpath.relpath(name, root) for name in found])
    details = storage.list_details(uri)
    root = pattern[0] if pattern else posixpath.dirname(path) if path in details else path.rstrip("/")
    tree = Tree(str(fs.unstrip_protocol(root)), {}, whole=not pattern and path not in details)
    for name, info in sorted(details.items()):
        _sort_in_remote(tree, name[len(root) :].removeprefix("/"), info)
    return tree


def _sort_in_remote(tree: Tree, name: str, info: dict[str, Any]) -> None:
    if (not name or name.endswith("/")) and not info["size"]:
        return  # stores have no folders; some programs mark one by an empty object
    if is_hidden(name):
        tree.ignored[name] = HIDDEN
    elif name.startswith("/"):
        tree.bad[name] = "its key has // behind the folder that was given: copy it to a key without"
    else:
        tree.files[name] = File(int(info["size"] or 0), version_of(info))


def with_beside(tree: Tree, wanted: Callable[[str], bool]) -> Tree:
    """The tree, with files added that lie beside the given ones, if those are not a whole folder.

    Args:
        wanted: returns True for the name of a file to add.

    Raises:
        InputError: the folder can't be read.
    """
    if tree.whole:
        return tree
    more = Tree(tree.root, dict(tree.files), dict(tree.ignored), dict(tree.bad), whole=False)
    for folder in {posixpath.dirname(name) for name in tree.files}:
        for base, info in sorted(storage.list_folder(tree.uri(folder)).items()):
            name = posixpath.join(folder, base)
            if not wanted(name) or name in tree.files or name in tree.ignored or name in tree.bad:
                continue
            if storage.is_local(tree.root):
                _sort_in(more, name, tree.uri(name))
            else:
                _sort_in_remote(more, name, info)
    return more


def is_hidden(name: str) -> bool:
    """True if a file, or a folder whose name ends in /, is hidden or left by the system, so that it is not data."""
    *folders, base = name.split("/")
    hidden = any(part.startswith((".", "__")) for part in folders)
    return hidden or base.startswith(".") or base.lower() in _LITTER


def _local_tree(root: str, given: Iterable[str]) -> Tree:
    """The given files below a folder, and all files below the given folders ("." for the folder itself)."""
    given = sorted(given)
    tree = Tree(root, {}, whole=given == ["."])
    # For each folder, its parent folders. A link to one of these is not followed, since that would never end.
    outside = tuple(_identity(folder.stat()) for folder in Path(root).resolve().parents)
    identity = lru_cache(lambda folder: _identity(os.stat(posixpath.join(root, folder))))  # noqa: PTH116
    walked, waiting = set[str](), list[tuple[str, tuple[tuple[int, int], ...]]]()

    def sort_in(name: str, above: tuple[tuple[int, int], ...]) -> None:
        if (inside := _sort_in(tree, name, tree.uri(name) if name else root)) in above:
            tree.ignored[name] = "a link to one of its own parent folders"
        elif inside is not None:
            walked.add(name)
            waiting.append((name, (*above, inside)))

    for match in given:
        name = posixpath.normpath(match) if match != "." else ""
        folders = _folders_above(name)
        if any(folder in walked or folder in tree.ignored for folder in folders):
            continue
        sort_in(name, (*outside, *map(identity, folders)))
    while waiting:
        folder, above = waiting.pop()
        try:
            found = sorted(os.listdir(posixpath.join(root, folder)))  # noqa: PTH208
        except OSError as error:
            if not folder:
                raise InputError(f"{root}: can't be read: {error.strerror}") from None
            target = tree.ignored if is_hidden(f"{folder}/") else tree.bad
            target[folder] = f"{_CLOSED}: {error.strerror}"
            continue
        for base in found:
            sort_in(posixpath.join(folder, base), above)
    return replace(tree, files=dict(sorted(tree.files.items())))


def _folders_above(name: str) -> list[str]:
    """The folders that a name lies in, from the root ("") down."""
    return ["", *(name[: cut.start()] for cut in re.finditer("/", name))] if name else []


def _matching(tree: Tree, pattern: str, uri: str) -> Tree:
    """The files that match a pattern with **, or lie in a folder that does. `glob` would loop on circular links."""
    matches = storage.matcher(pattern)
    files = {name: file for name, file in tree.files.items() if matches(name)}
    ignored = {name: reason for name, reason in tree.ignored.items() if matches(name)}
    # Files in a folder that can't be read might match.
    bad = {name: why for name, why in tree.bad.items() if matches(name) or why.startswith(_CLOSED)}
    if not (files or ignored or bad):
        raise InputError(f"{uri}: no such file or folder")
    return Tree(tree.root, files, ignored, bad, whole=False)


def _sort_in(tree: Tree, name: str, path: str) -> tuple[int, int] | None:
    """Adds a file to the tree. For a folder, returns its identity (device, inode) instead."""
    try:
        info = os.stat(path)  # noqa: PTH116
    except OSError as error:
        target = tree.ignored if is_hidden(name) else tree.bad
        dangling = os.path.islink(path) and isinstance(error, FileNotFoundError)  # noqa: PTH114
        target[name] = "a link to nothing" if dangling else f"can't be read: {error.strerror}"
        return None
    if stat.S_ISDIR(info.st_mode):
        return _identity(info)
    if is_hidden(name):
        tree.ignored[name] = HIDDEN
    elif stat.S_ISREG(info.st_mode):
        tree.files[name] = File(info.st_size, f"{info.st_size}-{info.st_mtime_ns}")
    else:
        kind = next(
            (words for is_it, words in _UNREADABLE_KINDS if is_it(info.st_mode)), "not a regular file"
        )
        tree.ignored[name] = kind
    return None


def _identity(info: os.stat_result) -> tuple[int, int]:
    return info.st_dev, info.st_ino
