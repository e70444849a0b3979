"""Finds the arrays in an .npz file, their types and places. Arrays of objects, which need pickle, are refused."""

import struct
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from pipeline import storage
from pipeline.data.labels import class_text
from pipeline.data.sources.fetch import fault_of_file, refusing
from pipeline.data.sources.records import Records
from pipeline.errors import InputError
from pipeline.redact import one_line
from pipeline.stretches import open_file

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_MEMBER = struct.Struct("<26xHH")  # lengths of a member's name and extra field
_CHANNELS = (1, 3, 4)
_HEADER_BYTES, _LABEL_BYTES = 2**14, 2**20  # bytes to fetch at once
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class Array(NamedTuple):
    """One array.

    Attributes:
        key: name of the array.
        fortran: True if the array is stored column by column.
        offset: byte offset of its values, in the file if `packed` is "", else in the unpacked member.
        packed: name of the compressed member that holds it; "" if it is stored uncompressed.
    """

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    offset: int
    packed: str

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]"


def list_arrays(uri: str) -> dict[str, Array] | str:
    """The arrays by name, or the reason why the file can't be read.

    Raises:
        OSError: the storage fails.
    """
    found = dict[str, Array]()
    try:
        with open_file(uri, ahead=_HEADER_BYTES) as file, zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                key = info.filename.removesuffix(".npy")
                if key == info.filename:
                    continue
                if info.flag_bits & 1 or info.compress_type not in _PACKED:
                    return f"{key} is encrypted, or compressed in a way that NumPy does not use"
                with archive.open(info) as member:
                    version = np.lib.format.read_magic(member)
                    if version not in _HEADERS:
                        return f"{key} is not an .npy array of version 1 or 2"
                    shape, fortran, dtype = _HEADERS[version](member)
                    offset = member.tell()
                size = offset + int(np.prod(shape, dtype=object)) * dtype.itemsize
                if not dtype.hasobject and info.file_size != size:
                    return f"damaged: {key} has {info.file_size} bytes, {size} expected"
                packed = info.filename
                if info.compress_type == zipfile.ZIP_STORED:
                    file.seek(info.header_offset)
                    name, extra = _MEMBER.unpack(file.read(_MEMBER.size))
                    offset, packed = offset + info.header_offset + _MEMBER.size + name + extra, ""
                found[key] = Array(key, tuple(shape), dtype, fortran, offset, packed)
    except zipfile.BadZipFile as error:
        return f"damaged or cut short: {one_line(error)}"
    except OSError as error:
        return fault_of_file(error, uri)
    except Exception as error:  # zipfile and NumPy raise anything on damaged headers
        if storage.is_storage_error(error):
            raise
        return f"damaged: {one_line(error)}"
    return found


def as_images(array: Array, uri: str, version: str) -> tuple[Records, tuple[int, int, int], bool]:
    """The layout of the images in an array.

    Returns:
        their place in the file, the shape of each, and True if the shape is [C, H, W] and not [H, W, C].

    Raises:
        InputError: the array does not hold uint8 images.
    """
    if array.dtype != np.uint8:
        if array.dtype.kind == "f":
            words = "nothing says in which range (0 to 1, -1 to 1, 0 to 255)"
        else:
            words = "images are uint8 here"
        raise InputError(f"{uri}: {array.key} is {array}, and {words}: save it as uint8 from 0 to 255")
    if array.fortran:
        raise InputError(
            f"{uri}: {array.key} is stored column by column: save numpy.ascontiguousarray(it) instead"
        )
    shape = array.shape[1:]
    planes = len(shape) == 3 and shape[0] in _CHANNELS and shape[2] not in _CHANNELS
    if len(shape) == 2:
        fits, shape = shape[1] not in _CHANNELS, (*shape, 1)
    else:
        fits = len(shape) == 3 and (planes or shape[2] in _CHANNELS)
    if not fits or 0 in shape:
        raise InputError(
            f"{uri}: {array.key} is {array}; images are [N, H, W], [N, H, W, C] or [N, C, H, W] with 1, 3 or 4 channels"
        )
    records = Records(array.offset, int(np.prod(shape)), array.shape[0], array.packed, version)
    return records, (shape[0], shape[1], shape[2]), planes


def read_labels(array: Array, uri: str, count: int) -> list[tuple[str | None, str]]:
    """Reads labels given as numbers, text or one-hot rows. Returns the text of each, and why it can't be a class or "".

    Raises:
        InputError: the labels are something else, or their number differs from that of the images.
    """
    if array.dtype.kind not in "biufSU" or array.dtype.hasobject:
        raise InputError(
            f"{uri}: {array.key} is {array}, not plain data: save the labels as numbers or as text (dtype U)"
        )
    try:
        with (
            refusing(uri),
            open_file(uri, ahead=_LABEL_BYTES) as file,
            zipfile.ZipFile(file) as archive,
            archive.open(f"{array.key}.npy") as member,
        ):
            values = np.lib.format.read_array(member, allow_pickle=False)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise InputError(f"{uri}: {array.key} is damaged, download it again: {one_line(error)}") from None
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    elif values.ndim == 2 and values.dtype.kind in "biuf" and _is_one_hot(values):
        values = values.argmax(1)
    if values.ndim != 1:
        raise InputError(
            f"{uri}: {array.key} is {array}, not one class an image (--label-column none = no labels)"
        )
    if len(values) != count:
        raise InputError(f"{uri}: {array.key} holds {len(values)} labels for {count} images")
    known = {value: class_text(value) for value in dict.fromkeys(values.tolist())}
    return [known[value] if value == value else (None, "") for value in values.tolist()]


def _is_one_hot(values: np.ndarray) -> bool:
    return bool(((values == 0) | (values == 1)).all() and (values.sum(1) == 1).all())
