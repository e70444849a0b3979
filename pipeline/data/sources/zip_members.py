"""Finds and reads the files in a zip archive. Nothing is ever written to disk."""

import contextlib
import io
import stat
import struct
import zipfile
from typing import NamedTuple

from pipeline import storage
from pipeline.data.images import sniff
from pipeline.data.sources.fetch import MOST_BYTES, fault_of_file, in_order
from pipeline.data.sources.loose import is_image_name
from pipeline.data.sources.sidecar import is_sidecar
from pipeline.data.sources.tree import HIDDEN, is_hidden
from pipeline.redact import one_line
from pipeline.stretches import open_file, read_stretch

_HEAD_BYTES = 64
_DIRECTORY_BYTES = 2**16  # bytes of an archive's directory to fetch at once
_HEADER = struct.Struct("<4s22xHH")  # member header: signature, lengths of name and extra field
_SLACK = 512  # bytes that this header may be longer than in the archive's directory
_ENCRYPTED, _UTF_8 = 0x1, 0x800  # flags of a member
_DOS, _UNIX = 0, 3


class Member(NamedTuple):
    """The place of a file in an archive.

    Attributes:
        offset: byte offset of its header in the archive.
        packed: length of its compressed content, in bytes.
        size, crc: length in bytes and checksum of its content.
        method: number of the compression method.
        reason: why it can't be read; "" if it can.
    """

    name: str
    offset: int
    packed: int
    size: int
    crc: int
    method: int
    reason: str = ""


def read_member(uri: str, member: Member, most: int = MOST_BYTES) -> tuple[bytes, str]:
    """Reads a member: its content and "", or nothing and the reason.

    Args:
        most: most bytes to read; a longer member is read up to here and its checksum is not verified.

    Raises:
        OSError: the storage fails.
    """
    if member.reason:
        return b"", member.reason
    begun = most < member.size
    wanted = min(member.packed, 2 * most + 4096) if begun else member.packed
    header = _HEADER.size + len(member.name.encode(errors="surrogateescape")) + _SLACK
    try:
        stored = read_stretch(uri, member.offset, member.offset + header + wanted)
        if len(stored) < _HEADER.size:
            return b"", "damaged: cut short"
        signature, name, extra = _HEADER.unpack_from(stored)
        begins = _HEADER.size + name + extra
        if signature != b"PK\3\4":
            return b"", "damaged: no member at the place in the archive's directory"
        if len(stored) < begins + wanted:
            stored = read_stretch(uri, member.offset, member.offset + begins + wanted)
    except OSError as error:
        return b"", fault_of_file(error, uri)
    if len(stored) < begins + wanted:
        return b"", "damaged: cut short"
    info = zipfile.ZipInfo()
    info.compress_type, info.compress_size = member.method, member.packed
    info.file_size, info.CRC = member.size, member.crc
    try:
        with zipfile.ZipExtFile(io.BytesIO(stored[begins : begins + wanted]), "r", info) as file:
            data: bytes = file.read(min(most, member.size))
    except NotImplementedError:
        return b"", f"compression method {member.method} is not supported"
    except Exception as error:  # each compression method raises its own errors; storage is not involved here
        known = {zipfile.BadZipFile: "its checksum is wrong", EOFError: "cut short"}
        return b"", f"damaged: {known.get(type(error)) or one_line(error)}"
    return (data, "") if begun or len(data) == member.size else (b"", "damaged: cut short")


class Archive(NamedTuple):
    """The content of an archive.

    Attributes:
        members: files that may be data, by name.
        images: names of the members that are images.
        ignored: reason by name, for members that are not data.
    """

    members: dict[str, Member]
    images: list[str]
    ignored: dict[str, str]


def open_archive(uri: str) -> Archive | str:
    """Reads the directory of an archive, or returns the reason why it can't be read.

    Raises:
        OSError: the storage fails.
    """
    try:
        with open_file(uri, ahead=_DIRECTORY_BYTES) as file, zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except zipfile.BadZipFile as error:
        return f"damaged or cut short: {one_line(error)}"
    except OSError as error:
        return fault_of_file(error, uri)
    except Exception as error:  # zipfile raises anything on a damaged directory
        if storage.is_storage_error(error):
            raise
        return f"damaged: {one_line(error)}"
    members, ignored, others = dict[str, Member](), dict[str, str](), list[str]()
    for info in reversed(infos):  # the last of several equal names wins, as in unpacking
        place = name = _place(info)
        while name in members:
            name = f"{place} ({int(name[len(place) + 2 : -1] or 1) + 1})"
        if info.is_dir():
            if info.file_size:
                ignored[f"{name}/"] = "a folder"
        elif is_hidden(place):
            ignored[name] = HIDDEN
        else:
            members[name] = _member(name, info)
            if not is_image_name(place):
                others.append(name)
    found = in_order(lambda name: _is_image(uri, members[name]), others, uri)
    kinds = dict(zip(others, found, strict=True))
    return Archive(members, [name for name in sorted(members) if kinds.get(name, True)], ignored)


def _place(info: zipfile.ZipInfo) -> str:
    """A member's name with / as separator and without "..". It is only a label; nothing is written there."""
    name = info.filename
    if not info.flag_bits & _UTF_8:
        with contextlib.suppress(UnicodeError):  # macOS writes UTF-8 names without setting the flag
            name = name.encode("cp437").decode("utf-8")
    name = name.replace("\\", "/") if info.create_system == _DOS else name
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _member(name: str, info: zipfile.ZipInfo) -> Member:
    reason = ""
    if info.flag_bits & _ENCRYPTED:
        reason = "encrypted: unpack the archive first"
    elif info.create_system == _UNIX and stat.S_ISLNK(info.external_attr >> 16):
        reason = "a link"
    elif info.file_size > MOST_BYTES:
        reason = f"{info.file_size} bytes, too large for an image"
    return Member(
        name, info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type, reason
    )


def _is_image(uri: str, member: Member) -> bool:
    if is_sidecar(member.name):
        return False
    data, reason = read_member(uri, member, _HEAD_BYTES)
    return bool(reason) or sniff(data) is not None  # an unreadable one may be an image
