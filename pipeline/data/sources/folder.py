"""A tree of image files, whose folders are the classes."""

import hashlib
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline import storage
from pipeline.data.sources.parts import IMAGE_SUFFIXES, Item, Part, SourceListing
from pipeline.errors import InputError

# What `datasets` calls an ImageFolder's table of other columns: the images are files.
IMAGE_FOLDER_TABLE = "metadata.parquet"


@dataclass(frozen=True)
class FolderPart(Part):
    """Some files of a tree.

    Attributes:
        names: what follows the tree's URI in theirs.
    """

    names: tuple[str, ...]

    def read(self) -> Iterator[Item]:
        for name in self.names:
            try:
                data = storage.read_bytes(self.uri + name)
            # Any other error is the storage's, not an image's fault.
            except (FileNotFoundError, PermissionError):
                data = b""
            yield Item(_place(name), data, posixpath.dirname(_place(name)) or None)


def list_folder(uri: str, files: list[str], images_per_part: int) -> SourceListing:
    files = storage.with_suffix(files, *IMAGE_SUFFIXES)
    if not files:
        raise InputError(f"--input {uri}: no images in it ({', '.join(IMAGE_SUFFIXES)})")
    root = _root(uri, files)
    names = [file.removeprefix(root) for file in files]
    classes = sorted({folder for name in names if (folder := posixpath.dirname(_place(name)))})
    # A tree lists one class after the other: mixed by a hash of the name, so that every shard has them all.
    names.sort(key=lambda name: hashlib.sha256(_place(name).encode()).digest())
    parts = [
        FolderPart(root, tuple(names[i : i + images_per_part])) for i in range(0, len(names), images_per_part)
    ]
    return SourceListing(tuple(parts), classes=tuple(classes))


def _root(uri: str, files: list[str]) -> str:
    """The folder that was given, or above the file or the pattern that was given, as it stands in the files' URIs."""
    fs, path = storage.open_fs(uri)
    root = path if storage.is_local(uri) else str(fs.unstrip_protocol(path))
    while not all(file.startswith(f"{root.rstrip('/')}/") for file in files):
        root = posixpath.dirname(root)
    return root.rstrip("/")


def _place(name: str) -> str:
    return posixpath.normpath(name.lstrip("/"))
