"""Samples as NumPy archives in guided-diffusion's format: uint8 `arr_0` [N, H, W, C], int64 labels `arr_1` [N].

guided-diffusion's evaluator takes a single file, which can't grow while samples are made. So each chunk is an archive
of its own. When all chunks are there, their content is written again as `samples.npz`, which appears whole or not at
all.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Iterator
from typing import IO, Any, cast

import numpy as np

from pipeline import storage
from pipeline.data.generated import PARTIAL
from pipeline.data.manifest import MANIFEST, SAMPLES
from pipeline.errors import InputError
from pipeline.generation.chunks import Chunk, file_name
from pipeline.redact import one_line
from pipeline.stretches import open_file

ALL, ENTRY = "samples.npz", "one_file"  # ENTRY: key of the entry in the manifest
IMAGES, LABELS = "arr_0", "arr_1"
_COPY_BYTES = 2**22
_COLOURS = 3


class _Digested:
    """A write-only file that counts and hashes its bytes. It can't seek, so an archive has the same bytes on any storage.

    Args:
        file: file to write to; None = only the hash is needed.
    """

    def __init__(self, file: IO[bytes] | None) -> None:
        self._file, self._hash, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        if self._file:
            self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        if self._file:
            self._file.flush()

    def entry(self) -> dict[str, Any]:
        return {"file": ALL, "bytes": self.bytes, "sha256": self._hash.hexdigest()}


def archive(images: np.ndarray, labels: list[int | None]) -> bytes:
    """The archive of a chunk: images uint8 [N, H, W, C], and labels if there are any."""
    buffer = io.BytesIO()
    known = [label for label in labels if label is not None]
    _write(_Digested(buffer), images.shape, [images], [np.array(known, np.int64)] if known else [])
    return buffer.getvalue()


def read_archive(uri: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Reads an archive that `archive` wrote: images uint8 [N, H, W, C], and labels int64 [N] or None.

    Raises:
        InputError: the file is damaged.
    """
    try:
        with np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False) as file:
            return file[IMAGES], file.get(LABELS)
    except Exception as error:  # zipfile and NumPy raise anything on damaged files
        if storage.is_storage_error(error):
            raise
        raise InputError(
            f"{uri} is damaged ({one_line(error, 100)}): run with --verify to list the damaged files, remove them, then "
            "run the same command again"
        ) from None


def write_all(output: str, chunks: Iterable[Chunk], digest: str) -> dict[str, Any]:
    """Writes all samples into one file, unless it is there already, and returns its entry for the manifest.

    Args:
        chunks: all chunks, in order.
        digest: hash of all files of chunks; see `card.totals`.
    """
    there = storage.list_folder(output)
    for name in there:
        if name.startswith(f"{ALL}.") and name.endswith(PARTIAL):  # a killed job left it
            storage.remove(storage.join(output, name))
    before = _entry(output, there)
    if before.get("of") == digest and ALL in there and there[ALL]["size"] == before["bytes"]:
        return before
    with storage.writing(storage.join(output, ALL)) as file:
        return _collect(_Digested(file), output, list(chunks)) | {"of": digest}


def differences(output: str, chunks: Iterable[Chunk], manifest: dict[str, Any]) -> Iterator[str]:
    """Describes what is wrong with samples.npz. The files of the chunks must be intact."""
    if manifest.get(ENTRY) != _collect(_Digested(None), output, list(chunks)) | {"of": manifest["sha256"]}:
        yield f"{ALL} in {MANIFEST} does not match the files in {SAMPLES}"
        return
    stored = hashlib.sha256()
    try:
        with open_file(storage.join(output, ALL), ahead=_COPY_BYTES) as file:
            while piece := file.read(_COPY_BYTES):
                stored.update(piece)
    except FileNotFoundError:
        yield f"{ALL} is lost"
        return
    if stored.hexdigest() != manifest[ENTRY]["sha256"]:
        yield f"{ALL} is damaged"


def _entry(output: str, there: dict[str, Any]) -> dict[str, Any]:
    if MANIFEST not in there:
        return {}
    try:
        found = json.loads(storage.read_bytes(storage.join(output, MANIFEST)))[ENTRY]
        return dict(found) if found.keys() == {"file", "bytes", "sha256", "of"} else {}
    except (ValueError, KeyError, TypeError, AttributeError):  # a damaged manifest is rewritten at the end
        return {}


def _collect(file: _Digested, output: str, chunks: list[Chunk]) -> dict[str, Any]:
    """Writes the samples of all chunks as one archive, one chunk at a time in memory. Returns the manifest's entry."""
    uris = [storage.join(output, SAMPLES, file_name(chunk, "npz")) for chunk in chunks]
    shape, labels = read_archive(uris[0])[0].shape[1:], list[np.ndarray]()
    grey = shape[2] == 1

    def images() -> Iterator[np.ndarray]:
        for uri in uris:
            pixels, here = read_archive(uri)
            labels.extend([] if here is None else [here])
            # The evaluator's network takes colour images only.
            yield pixels.repeat(_COLOURS, axis=3) if grey else pixels

    count = sum(chunk.stop - chunk.start for chunk in chunks)
    _write(file, (count, *shape[:2], _COLOURS if grey else shape[2]), images(), labels)
    return file.entry()


def _write(
    file: _Digested, shape: tuple[int, ...], images: Iterable[np.ndarray], labels: list[np.ndarray]
) -> None:
    """Writes an archive of images that come in pieces. `labels` may still be filled while the images are read."""
    with zipfile.ZipFile(cast(IO[bytes], file), "w") as zipped:
        _member(zipped, IMAGES, shape, np.dtype(np.uint8), images)
        if labels:
            _member(zipped, LABELS, shape[:1], np.dtype(np.int64), labels)


def _member(
    zipped: zipfile.ZipFile, name: str, shape: tuple[int, ...], kind: np.dtype, pieces: Iterable[np.ndarray]
) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    with zipped.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        for piece in pieces:
            member.write(np.ascontiguousarray(piece, kind).tobytes())
