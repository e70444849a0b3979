"""All files that a user gave, on any storage: which can be data, and why the others can't."""

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

# What systems and tools leave beside data.
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
        version: differs whenever the content does: an ETag, or size and time of the last change.
    """

    size: int
    version: str


@dataclass(frozen=True)
class Tree:
    """The files below a folder, or one file, or those that a pattern matches.

    Attributes:
        root: URI of the folder that they lie in; of a pattern, the one before its first name with *, ? or [].
        files: by name, which is what follows the root; in order of the names.
        ignored: files and folders that are no data, by name, with the reason.
        bad: files and folders that may be data and can't be read, by name, with the reason.
        whole: whether all that lies in the root was given.
    """

    root: str
    files: dict[str, File]
    ignored: dict[str, str] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    whole: bool = True

    def uri(self, name: str) -> str:
        """Of one of its files."""
        return storage.join(self.root, name)

    def head(self, name: str, count: int = 64) -> bytes:
        """The first bytes of a file; fewer where it is short."""
        if not self.files[name].size:
            return b""
        return read_stretch(self.uri(name), 0, count)


def open_tree(uri: str) -> Tree:
    """Lists what is given, following links: a file, all below a folder, or all of that for each match of a pattern.

    Names begin where a pattern does: they and the labels in them do not depend on what else it matches.

    Raises:
        InputError: nothing of that name is there, or the storage can't say.
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
        _sort_in_remote(tree, name[len(root) :].lstrip("/"), info)
    return tree


def _sort_in_remote(tree: Tree, name: str, info: dict[str, Any]) -> None:
    if is_hidden(name):
        tree.ignored[name] = HIDDEN
    else:
        tree.files[name] = File(int(info["size"] or 0), version_of(info))


def with_beside(tree: Tree, wanted: Callable[[str], bool]) -> Tree:
    """A tree with files that lie beside those that were given, where these are not a whole folder.

    Args:
        wanted: says of a name whether that file is to be added.

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
    """Whether a file, or a folder whose name ends with a /, is none that a user gave as data."""
    *folders, base = name.split("/")
    hidden = any(part.startswith((".", "__")) for part in folders)
    return hidden or base.startswith(".") or base.lower() in _LITTER


def _local_tree(root: str, given: Iterable[str]) -> Tree:
    """The files among some names below a folder, "." for the folder itself, and all files below the others."""
    given = sorted(given)
    tree = Tree(root, {}, whole=given == ["."])
    # Of each folder that is walked, those that it lies in: a link to one of these is not followed for ever.
    outside = tuple(_identity(folder.stat()) for folder in Path(root).resolve().parents)
    identity = lru_cache(lambda folder: _identity(os.stat(posixpath.join(root, folder))))  # noqa: PTH116
    walked, waiting = set[str](), list[tuple[str, tuple[tuple[int, int], ...]]]()

    def sort_in(name: str, above: tuple[tuple[int, int], ...]) -> None:
        if (inside := _sort_in(tree, name, tree.uri(name) if name else root)) in above:
            tree.ignored[name] = "a link to a folder that it lies in"
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
    """What matches a pattern with ** in it, or lies in a folder that does. Not by glob, which goes round in links."""
    matches = storage.matcher(pattern)
    files = {name: file for name, file in tree.files.items() if matches(name)}
    ignored = {name: reason for name, reason in tree.ignored.items() if matches(name)}
    # What a closed folder holds may match.
    bad = {name: why for name, why in tree.bad.items() if matches(name) or why.startswith(_CLOSED)}
    if not (files or ignored or bad):
        raise InputError(f"{uri}: no such file or folder")
    return Tree(tree.root, files, ignored, bad, whole=False)


def _sort_in(tree: Tree, name: str, path: str) -> tuple[int, int] | None:
    """Adds what is no folder to a tree; returns which folder it is otherwise."""
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
        kind = next((words for is_it, words in _UNREADABLE_KINDS if is_it(info.st_mode)), "no file")
        tree.ignored[name] = kind
    return None


def _identity(info: os.stat_result) -> tuple[int, int]:
    return info.st_dev, info.st_ino
