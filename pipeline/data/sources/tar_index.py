"""Indexes a tar: which members are images, where their bytes lie, and their labels."""

import posixpath
import tarfile
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

from pipeline.data.images import sniff
from pipeline.data.sources import tar_labels
from pipeline.data.sources.fetch import MOST_BYTES
from pipeline.data.sources.loose import is_image_name
from pipeline.data.sources.tar_labels import Label, Labels, parse_label, stem_and_suffix
from pipeline.data.sources.tar_members import CONTINUED, WITHOUT_CONTENT, Damage, Member, walk
from pipeline.data.sources.tree import is_hidden
from pipeline.redact import printable

_HEAD_BYTES = 512
_TGA = ".tga"  # images that can't be recognised by their first bytes
# Members with these suffixes are never images.
_TEXT_SUFFIXES = (".txt", ".text", ".caption", ".csv", ".tsv", ".md", ".html", ".xml", ".yaml", ".yml")
_LINKS = (tarfile.SYMTYPE, tarfile.LNKTYPE)
_UNREADABLE = {
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    CONTINUED: "the rest of a file that begins in another tar",
}


class TarImage(NamedTuple):
    """An image in a tar, or a damaged place where one may have been.

    Attributes:
        name: the part of the image's path after the name of the tar.
        offset, size: byte offset in the tar, and size of the file in bytes.
        label: its label, or None.
        reason: why it can't be used; "" if it can.
        pieces: for a sparse file, (offset in the file, size) of each stored stretch.
    """

    name: str
    offset: int = 0
    size: int = 0
    label: str | None = None
    reason: str = ""
    pieces: tuple[tuple[int, int], ...] = ()

    @property
    def stored(self) -> int:
        """Bytes stored in the tar; 0 for an image that can't be used."""
        if self.reason:
            return 0
        return sum(size for _, size in self.pieces) if self.pieces else self.size

    def content(self, stored: bytes) -> bytes:
        """The file's content, made from the bytes stored in the tar."""
        if not self.pieces or self.reason:
            return stored
        whole, at = bytearray(self.size), 0
        for place, size in self.pieces:
            whole[place : place + size] = stored[at : at + size].ljust(size, b"\0")
            at += size
        return bytes(whole)


def stored_bytes(file: IO[bytes], image: TarImage) -> bytes:
    """The bytes of an image that are stored in the tar."""
    file.seek(image.offset)
    return file.read(image.stored)


def index_tar(file: IO[bytes], size: int, labelled: bool = True) -> list[TarImage]:
    """All images of a tar in order, with the damage between them.

    Reads the headers, the labels, and the first bytes of members whose names don't tell what they are. Names are made
    unique.

    Args:
        file: open for reading and seeking.
        size: size of the tar in bytes.
        labelled: read labels.
    """
    found = list(walk(file, size))
    resolve = _resolver(found)
    labels, images = Labels(), list[tuple[TarImage, str, int]]()
    for place, member in enumerate(found):
        if isinstance(member, Damage):
            images.append((TarImage(f": damaged at byte {member.begins}", reason=member.reason), "", 0))
            continue
        name, at_once = _plain(member.name), member.missing or _hidden(member.name)
        target, reason = (member, _fault(member)) if at_once else resolve(place, member)
        if target is None or (at_once and not member.missing):
            continue
        suffix = stem_and_suffix(name)[1]
        image = TarImage(_path(member.name), target.offset, target.size, None, reason, target.pieces)
        if labelled and suffix in tar_labels.SUFFIXES:
            labels.add(name, _label(file, image, suffix))
        if member.missing or member.kind in _UNREADABLE or _is_image(file, image, suffix):
            images.append((_checked(image), name, labels.images[name]))
            labels.images[name] += 1
    find = labels.finder()
    return list(_named_once(_labelled(image, find(name, which)) for image, name, which in images))


def _resolver(found: list[Member | Damage]) -> Callable[[int, Member], tuple[Member | None, str]]:
    """Returns a function that follows links: from a member and its index to the member with its data, and a fault or "".

    The first is None for folders and for links to folders, which have no data.
    """
    places, folders = defaultdict[str, list[tuple[int, Member]]](list), {".", "/"}
    for place, member in enumerate(found):
        if isinstance(member, Member):
            name = _plain(member.name)
            places[name].append((place, member))
            while (name := posixpath.dirname(name)) and name not in folders:
                folders.add(name)

    def resolve(place: int, member: Member) -> tuple[Member | None, str]:
        first, seen = member, set[int]()
        while member.kind in _LINKS:
            seen.add(place)
            hard = member.kind == tarfile.LNKTYPE
            folder = "" if hard else posixpath.dirname(member.name)
            name = _plain(posixpath.join(folder, member.link))
            if not (some := places.get(name)):
                known = name in folders
                return (
                    None if known else first,
                    f"a link to {printable(member.link)}, which is not in the tar",
                )
            # As in unpacking, a hard link leads to the last member before it, a symbolic link to the last of all.
            which = max(0, bisect_left(some, place, key=lambda one: one[0]) - 1) if hard else -1
            place, member = some[which]
            if place in seen:
                return first, "a link that leads to itself"
        return None if member.kind in WITHOUT_CONTENT else member, _fault(member)

    return resolve


def _fault(member: Member) -> str:
    """The reason why the data of a member can't be read, or ""."""
    if member.missing:
        return f"cut short: the last {member.missing} bytes are missing from the tar"
    return _UNREADABLE.get(member.kind, "")


def _plain(name: str) -> str:
    """A normalised name, for example without ./ in front."""
    return posixpath.normpath(name)


def _hidden(name: str) -> bool:
    return is_hidden("/".join(part for part in name.split("/") if part not in ("", ".", "..")))


def _path(name: str) -> str:
    """A name made safe as the end of a path: printable, and without ".." in it."""
    return "/" + "/".join("_" if part == ".." else part for part in printable(name).lstrip("/").split("/"))


def _is_image(file: IO[bytes], image: TarImage, suffix: str) -> bool:
    if suffix == _TGA or is_image_name(image.name):
        return True
    if suffix in tar_labels.SUFFIXES or suffix in _TEXT_SUFFIXES:
        return False
    return bool(image.reason) or sniff(_head(file, image)) is not None  # an unreadable one may be an image


def _head(file: IO[bytes], image: TarImage) -> bytes:
    if not image.pieces:
        return stored_bytes(file, image._replace(size=min(image.size, _HEAD_BYTES)))
    return image.content(stored_bytes(file, image))[:_HEAD_BYTES] if image.size <= MOST_BYTES else b""


def _label(file: IO[bytes], image: TarImage, suffix: str) -> Label:
    if image.reason:
        return Label(problem=image.reason)
    if image.size > tar_labels.MOST_BYTES:
        return Label(problem=f"{image.size} bytes, too large for a label")
    return parse_label(suffix, image.content(stored_bytes(file, image)))


def _checked(image: TarImage) -> TarImage:
    if image.reason:
        return image
    if not image.size:
        return image._replace(reason="empty")
    if image.size > MOST_BYTES:
        return image._replace(reason=f"{image.size} bytes, too large for an image")
    return image


def _labelled(image: TarImage, label: Label) -> TarImage:
    return image._replace(label=label.text, reason=image.reason or label.problem)


def _named_once(images: Iterator[TarImage]) -> Iterator[TarImage]:
    """Makes names unique by appending a number to repeated ones."""
    given, counts = set[str](), defaultdict[str, int](int)
    for image in images:
        name = image.name
        while name in given:
            counts[image.name] += 1
            name = f"{image.name} ({counts[image.name] + 1})"
        given.add(name)
        yield image if name == image.name else image._replace(name=name)
