"""A tree of image files, whose folders are the classes."""

import hashlib
import posixpath
from collections.abc import Iterator

from pipeline import storage
from pipeline.data.sources.parts import IMAGE_SUFFIXES, Item, Part, SourceListing
from pipeline.errors import InputError

# What `datasets` calls an ImageFolder's table of other columns: the images are files.
IMAGE_FOLDER_TABLE = "metadata.parquet"


def list_folder(uri: str, images_per_part: int) -> SourceListing:
    files = storage.list_files(uri, IMAGE_SUFFIXES)
    if not files:
        raise InputError(f"--input {uri}: no images in it ({', '.join(IMAGE_SUFFIXES)})")
    parents = {file: posixpath.relpath(posixpath.dirname(file), _root(uri)) for file in files}
    classes = sorted({parent for parent in parents.values() if parent != "."})
    # A tree lists one class after the other: mixed by a hash of the name, so that every shard has them all.
    files.sort(key=lambda file: hashlib.sha256(posixpath.relpath(file, _root(uri)).encode()).digest())
    parts = [
        Part("folder", tuple(files[i : i + images_per_part]), classes=(_root(uri),))
        for i in range(0, len(files), images_per_part)
    ]
    return SourceListing(tuple(parts), classes=tuple(classes))


def _root(uri: str) -> str:
    fs, path = storage.open_fs(uri)
    return path if storage.absolute(uri) == path else str(fs.unstrip_protocol(path))


def read_folder(part: Part) -> Iterator[Item]:
    (root,) = part.classes
    for uri in part.uris:
        name = posixpath.relpath(uri, root)
        parent = posixpath.dirname(name)
        try:
            data = storage.read_bytes(uri)
        except (FileNotFoundError, PermissionError):  # any other error is the storage's: not an image's fault
            data = b""
        yield Item(name, data, parent or None)
