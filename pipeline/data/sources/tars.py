"""WebDataset tars, read without unpacking anything to disk, and past any damage."""

import contextlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from pipeline import storage
from pipeline.data.labels import label_text
from pipeline.data.sources.parts import IMAGE_SUFFIXES, Item, Part, SourceListing
from pipeline.errors import InputError


@dataclass(frozen=True)
class TarPart(Part):
    """A whole tar, or some of its samples.

    Attributes:
        start, size: which of its bytes; a size of 0 is all.
    """

    start: int = 0
    size: int = 0

    def read(self) -> Iterator[Item]:
        fs, path = storage.open_fs(self.uri)
        size = self.size or int(fs.size(path))
        content = fs.cat_file(path, start=self.start, end=self.start + size) if self.size else None
        with fs.open(path, "rb") if content is None else io.BytesIO(content) as file:
            for _, item in _tar_samples(storage.name(self.uri), file, size):
                yield item

    def split(self, images: int) -> Iterator[Part]:
        if self.size:
            yield self
            return
        fs, path = storage.open_fs(self.uri)
        size, start, held = int(fs.size(path)), 0, 0
        with fs.open(path, "rb") as file:
            for offset, _ in _tar_samples(storage.name(self.uri), file, size):
                if held >= images and start < offset < size:
                    yield TarPart(self.uri, start, offset - start)
                    start, held = offset, 0
                held += 1
        if held:
            yield TarPart(self.uri, start, size - start)


def list_tars(uri: str, files: list[str], images_per_part: int) -> SourceListing:
    parts = tuple(TarPart(file) for file in storage.with_suffix(files, ".tar"))
    if not parts:
        raise InputError(f"--input {uri}: no .tar files in it")
    return SourceListing(parts, classes=None)


def _tar_samples(tar_name: str, file: IO[bytes], size: int) -> Iterator[tuple[int, Item]]:
    """Groups members by key, the name up to the first dot, as WebDataset does. Nothing is unpacked to disk.

    Returns:
        images, each with the byte at which the first member of its group begins; for damage, an item without bytes.
    """
    key, found, first = "", dict[str, bytes](), 0
    for begins, name, content in _tar_members(file, size):
        folder, _, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        its_key = f"{folder}/{stem}" if folder else stem
        if its_key != key:
            yield from ((first, item) for item in _tar_item(tar_name, key, found))
            key, found, first = its_key, {}, begins
        if content is None:
            yield begins, Item(f"{tar_name}: damaged at byte {begins}", b"", None)
        else:
            found[suffix.lower()] = content
    yield from ((first, item) for item in _tar_item(tar_name, key, found))


def _tar_members(file: IO[bytes], size: int) -> Iterator[tuple[int, str, bytes | None]]:
    """First byte, name and content of every file in a tar; no name and no content where bytes make no sense.

    tarfile ends without a word at the first damaged header: here it looks for the next good one.
    """
    here = 0
    while here < size:
        file.seek(here)
        try:
            with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep a note of every member
                    if _any_bytes(file, here, member.offset):
                        yield here, "", None
                    begins = member.offset
                    here = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    if member.isfile():
                        if member.offset_data + member.size > size:
                            raise tarfile.ReadError("cut short")
                        content = tar.extractfile(member)
                        yield begins, member.name, content.read() if content is not None else b""
                if _any_bytes(file, here, size):
                    yield here, "", None
                return
        except Exception as error:  # tarfile raises anything on damaged headers
            if storage.is_storage_error(error):
                raise
            yield here, "", None
            here += tarfile.BLOCKSIZE


def _any_bytes(file: IO[bytes], start: int, stop: int) -> bool:
    """Whether there is anything but padding."""
    if start >= stop:
        return False
    place = file.tell()
    file.seek(start)
    found = any(file.read(min(2**20, stop - at)).strip(b"\0") for at in range(start, stop, 2**20))
    file.seek(place)
    return found


def _tar_item(tar_name: str, key: str, found: dict[str, bytes]) -> Iterator[Item]:
    for suffix, data in found.items():
        if f".{suffix}" in IMAGE_SUFFIXES:
            label = label_text(found.get("cls", b""))
            if label is None and "json" in found:
                with contextlib.suppress(ValueError, AttributeError):  # other things may lie beside an image
                    label = label_text(json.loads(found["json"]).get("label"))
            # The name is kept as text only; a member's path leads nowhere.
            yield Item(f"{tar_name}/{key.lstrip('/').replace('..', '_')}.{suffix}", data, label)
            return
