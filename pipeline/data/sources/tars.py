"""Reads tars of images in the WebDataset convention, without unpacking them to disk and past any damage."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from fsspec.implementations.local import LocalFileSystem

from pipeline import storage
from pipeline.data.sources.fetch import THREADS, fault_of_file
from pipeline.data.sources.label_columns import NO_LABELS
from pipeline.data.sources.loose import outweigh_images
from pipeline.data.sources.parts import Item, Part, Request, SourceListing
from pipeline.data.sources.splits import splits_of_files
from pipeline.data.sources.tar_index import TarImage, index_tar, stored_bytes
from pipeline.data.sources.tar_members import BLOCK, is_header
from pipeline.data.sources.tree import Tree
from pipeline.redact import printable
from pipeline.stretches import read_stretch, read_stretches, steadily

_PIECE_BYTES = 32 * 2**20
_GAP_BYTES = 2**16  # largest gap between two images that one request fetches
_COMPRESSED = "a tar compressed with {}: decompress it with `{}`"
_SUFFIXES = {
    (".tar.gz", ".tgz"): _COMPRESSED.format("gzip", "gunzip"),
    (".tar.bz2", ".tbz2", ".tbz"): _COMPRESSED.format("bzip2", "bunzip2"),
    (".tar.xz", ".txz"): _COMPRESSED.format("xz", "unxz"),
    (".tar.zst", ".tzst"): _COMPRESSED.format("zstd", "unzstd"),
    (".tar.lz4", ".tlz4"): _COMPRESSED.format("lz4", "unlz4"),
}
# Other formats that are sometimes named .tar, by their first bytes.
_HEADS = {
    b"\x1f\x8b": _COMPRESSED.format("gzip", "gunzip"),
    b"BZh": _COMPRESSED.format("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": _COMPRESSED.format("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": _COMPRESSED.format("zstd", "unzstd"),
    b"\x04\x22\x4d\x18": _COMPRESSED.format("lz4", "unlz4"),
    b"PK\3\4": "not a tar file but a zip file: rename it to .zip",
    b"version https://git-lfs": "not a tar file but a Git LFS pointer: run `git lfs pull`",
}
# Local copies of remote tars while they are being cut, by URI. Parts that are read meanwhile use the copy.
_copies: dict[str, IO[bytes]] = {}
_copies_lock = threading.Lock()


class _FileFault(Exception):
    """This tar alone can't be read; the message says why."""


@dataclass(frozen=True)
class TarPart(Part):
    """A tar, or some of its images.

    Attributes:
        members: the images; empty = all images in the tar, which must be indexed first.
        labelled: read labels.
    """

    members: tuple[TarImage, ...] = ()
    labelled: bool = True

    def read(self, rows: Sequence[int] | None = None) -> Iterator[Item]:
        try:
            if not self.members:
                with _on_disk(self.uri) as (file, size):
                    found = _some(index_tar(file, size, self.labelled), rows)
                    for image in found:
                        yield self._item(image, stored_bytes(file, image))
                return
            some = _some(self.members, rows)
            contents = _contents(self.uri, some)
        except _FileFault as fault:
            if not self.members:
                yield Item(printable(self.names[0]), b"", None, str(fault))
                return
            some, contents = [image._replace(reason=str(fault)) for image in some], (b"" for _ in some)
        yield from map(self._item, some, contents)

    def cut(self, images: int) -> Iterator[Part]:
        with contextlib.ExitStack() as stack:
            members = self.members
            if not members:
                try:
                    file, size = stack.enter_context(_on_disk(self.uri))
                except _FileFault:
                    yield self
                    return
                members = tuple(index_tar(file, size, self.labelled))
                stack.enter_context(_lent(self.uri, file))
            for first in range(0, len(members), images):
                yield replace(self, members=members[first : first + images])

    def _item(self, image: TarImage, stored: bytes) -> Item:
        path = printable(self.names[0]) + image.name
        reason = image.reason
        if len(stored) < image.stored and not reason:
            reason = "its bytes are no longer in the tar"
        return Item(path, b"" if reason else image.content(stored), image.label, reason)


def is_tars(tree: Tree) -> bool:
    """True if there are files named .tar, no smaller than the image files beside them."""
    return outweigh_images(tree, list(filter(_is_tar, tree.files)))


def list_tars(tree: Tree, request: Request) -> SourceListing:
    """All tars, each as one part, because only reading tells how many images a tar holds.

    Reads the first bytes of each. Compressed tars, and files named .tar that are no tars, are `bad`. A damaged tar is
    read as far as possible.
    """
    bad = {name: reason for name in tree.files if (reason := _compressed(name))}
    ignored = {name: "empty" for name in tree.files if _is_tar(name) and not tree.files[name].size}
    tars = [name for name in tree.files if _is_tar(name) and name not in ignored]
    with ThreadPoolExecutor(THREADS) as pool:
        faults = pool.map(lambda name: _no_tar(tree, name), tars)
        bad |= {name: reason for name, reason in zip(tars, faults, strict=True) if reason}
    used = [name for name in tars if name not in bad]
    splits = splits_of_files(used)
    labelled = request.label_column != NO_LABELS
    parts = tuple(TarPart(tree.root, (name,), labelled=labelled, split=splits[name]) for name in used)
    return SourceListing(parts, frozenset(used), classes=None, ignored=ignored, bad=bad)


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


def _compressed(name: str) -> str:
    """The reason why a file with this name, such as a compressed tar, isn't read; "" for other names."""
    return next((reason for suffixes, reason in _SUFFIXES.items() if name.lower().endswith(suffixes)), "")


def _no_tar(tree: Tree, name: str) -> str:
    """The reason why a file named .tar is no tar; "" if it may be one."""
    try:
        with _faults_of(tree.uri(name)):
            head = tree.head(name, BLOCK)
    except _FileFault as fault:
        return str(fault)
    if is_header(head):
        return ""
    found = next((reason for magic, reason in _HEADS.items() if head.startswith(magic)), "")
    return found or ("not a tar file: too short" if len(head) < BLOCK else "")


def _some(images: Sequence[TarImage], rows: Sequence[int] | None) -> list[TarImage]:
    return list(images) if rows is None else [images[row] for row in rows]


@contextlib.contextmanager
def _faults_of(uri: str) -> Iterator[None]:
    """Raises _FileFault for an error of this one file; errors of the storage pass through."""
    try:
        yield
    except OSError as error:
        raise _FileFault(fault_of_file(error, uri)) from None


@contextlib.contextmanager
def _on_disk(uri: str) -> Iterator[tuple[IO[bytes], int]]:
    """Opens a file for random reading and yields it with its size. A remote file is copied to disk, then deleted."""
    fs, path = storage.open_fs(uri)
    if isinstance(fs, LocalFileSystem):
        with contextlib.ExitStack() as stack:
            with _faults_of(uri):
                file = stack.enter_context(Path(path).open("rb"))
            yield file, os.fstat(file.fileno()).st_size
        return
    with _faults_of(uri):
        size = steadily(lambda: int(fs.info(path)["size"]), uri)
    with tempfile.TemporaryFile() as copy:
        for start in range(0, size, _PIECE_BYTES):
            with _faults_of(uri):
                piece = read_stretch(uri, start, min(start + _PIECE_BYTES, size))
            copy.write(piece)
        yield copy, copy.tell()


@contextlib.contextmanager
def _lent(uri: str, file: IO[bytes]) -> Iterator[None]:
    """Lets other threads of this process read images of a remote tar from its local copy meanwhile."""
    if storage.is_local(uri):
        yield
        return
    with _copies_lock:
        _copies[uri] = file
    try:
        yield
    finally:
        with _copies_lock:
            if _copies.get(uri) is file:
                del _copies[uri]


def _contents(uri: str, images: list[TarImage]) -> Iterable[bytes]:
    """The stored bytes of each image."""
    if storage.is_local(uri):
        with _on_disk(uri) as (file, _):
            return [stored_bytes(file, image) for image in images]
    with _copies_lock:
        if (copy := _copies.get(uri)) is not None:
            return [stored_bytes(copy, image) for image in images]
    spans = list[tuple[int, int]]()
    for image in sorted(images, key=lambda image: image.offset):
        if image.stored:
            begin, end = image.offset, image.offset + image.stored
            if spans and begin <= spans[-1][1] + _GAP_BYTES:
                begin, end = spans[-1][0], max(end, spans.pop()[1])
            spans.append((begin, end))
    with _faults_of(uri):
        contents = read_stretches(uri, spans)
    fetched = [(begin, data) for (begin, _), data in zip(spans, contents, strict=True)]
    return [_cut_out(fetched, image) for image in images]


def _cut_out(fetched: list[tuple[int, bytes]], image: TarImage) -> bytes:
    if not image.stored:
        return b""
    begin, data = next(span for span in reversed(fetched) if span[0] <= image.offset)
    return data[image.offset - begin : image.offset - begin + image.stored]
