"""All files that a user gave, on any storage: which can be data, and why the others can't."""

import glob
import os
import posixpath
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from pipeline import storage
from pipeline.errors import InputError

# What systems and tools leave beside data.
_LITTER = ("thumbs.db", "desktop.ini")
HIDDEN = "hidden"
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
        root: URI of the folder that they lie in.
        files: by name, which is what follows the root; in order of the names.
        ignored: files and folders that are no data, by name, with the reason.
        bad: files and folders that may be data and can't be read, by name, with the reason.
    """

    root: str
    files: dict[str, File]
    ignored: dict[str, str] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)

    def uri(self, name: str) -> str:
        """Of one of its files."""
        return storage.join(self.root, name)

    def head(self, name: str, count: int = 64) -> bytes:
        """The first bytes of a file; fewer where it is short."""
        if not self.files[name].size:
            return b""
        fs, path = storage.open_fs(self.uri(name))
        data: bytes = fs.cat_file(path, start=0, end=count)
        return data


def printable(name: str) -> str:
    """A name as it can be printed and stored as text: bytes that are no UTF-8, and control characters, are escaped."""
    text = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def open_tree(uri: str) -> Tree:
    """Lists what is given, following links.

    Raises:
        InputError: nothing of that name is there, or the storage can't say.
    """
    fs, path = storage.open_fs(uri)
    if isinstance(fs, LocalFileSystem):
        return _local_tree(path) if os.path.isdir(path) else _local_files(uri, path)  # noqa: PTH112
    found = storage.list_details(uri)
    base = path.rstrip("/")
    root = base if found and all(name.startswith(f"{base}/") for name in found) else _common_folder(found)
    files, ignored = dict[str, File](), dict[str, str]()
    for name, info in sorted(found.items()):
        relative = name[len(root) :].lstrip("/")
        if is_hidden(relative):
            ignored[relative] = HIDDEN
        else:
            files[relative] = File(int(info["size"] or 0), _version(info))
    return Tree(str(fs.unstrip_protocol(root)), files, ignored)


def _common_folder(names: Any) -> str:
    folders = [posixpath.dirname(name) for name in names]
    return posixpath.commonpath(folders) if folders else ""


def _version(info: dict[str, Any]) -> str:
    etag = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("sha256")
    return str(etag or (info["size"], info.get("mtime") or info.get("LastModified")))


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder whose name ends with a /, is none that a user gave as data."""
    *folders, base = name.split("/")
    hidden = any(part.startswith((".", "__")) for part in folders)
    return hidden or base.startswith(".") or base.lower() in _LITTER


def _local_files(uri: str, path: str) -> Tree:
    """One file, or those that a pattern matches, links among them."""
    found = [path] if os.path.lexists(path) else []
    for part in re.finditer("[^/]+", path):
        # What is there as it is, is no pattern.
        if glob.has_magic(part[0]) and not os.path.lexists(path[: part.end()]):
            pattern = glob.escape(path[: part.start()]) + path[part.start() :]
            found = glob.glob(pattern, recursive=True, include_hidden=True)  # noqa: PTH207
            break
    tree = Tree(_common_folder(found), {})
    for name in sorted(set(found)):
        _sort_in(tree, posixpath.relpath(name, tree.root), name)
    if not (tree.files or tree.ignored or tree.bad):
        raise InputError(f"{uri}: no such file or folder")
    return tree


def _local_tree(root: str) -> Tree:
    tree = Tree(root, {})
    # By folder: the folders above it, so that a link to one of those is not followed for ever.
    outside = [Path(root).resolve(), *Path(root).resolve().parents]
    waiting = [("", tuple(_identity(folder.stat()) for folder in outside))]
    while waiting:
        folder, above = waiting.pop()
        path = posixpath.join(root, folder) if folder else root
        try:
            found = sorted(os.listdir(path))  # noqa: PTH208
        except OSError as error:
            if not folder:
                raise InputError(f"{root}: can't be read: {error.strerror}") from None
            target = tree.ignored if is_hidden(f"{folder}/") else tree.bad
            target[folder] = f"the folder can't be read: {error.strerror}"
            continue
        for base in found:
            name = posixpath.join(folder, base)
            if (inside := _sort_in(tree, name, posixpath.join(path, base))) in above:
                tree.ignored[name] = "a link to a folder that it lies in"
            elif inside is not None:
                waiting.append((name, (*above, inside)))
    return Tree(root, dict(sorted(tree.files.items())), tree.ignored, tree.bad)


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
