"""Opens Parquet files and reads their row groups, large ones in pieces. No code in a file is run."""

import contextlib
import threading
import zlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.labels import stored_numbers
from pipeline.data.sources.cells import Columns, Form, check_names, form_of, is_text, present, texts
from pipeline.data.sources.fetch import local_stamp
from pipeline.errors import InputError
from pipeline.redact import one_line
from pipeline.stretches import RemoteFile, open_file

OPEN_FILES = 64  # each thread opens its own
PARSED_FOOTERS, REMOTE_FILES = 128, 4096
_MARK = b"PAR1"  # the last bytes of a file
_FOOTER = 2**16  # bytes to fetch before the footer's length is known
# A row group of more than BIG_GROUP bytes is never held whole, but read in pieces of about PIECE bytes.
BIG_GROUP, PIECE = 256 * 2**20, 64 * 2**20
_BUFFER = 2**20
PREPARED = Columns()
_asking = tuple(threading.Lock() for _ in range(1024))  # many locks, so that files rarely share one


def open_parquet(uri: str, piecewise: bool = False) -> pq.ParquetFile:
    """Opens a file from an untrusted source. `cells.present` says which of its columns may be looked at.

    Args:
        piecewise: read parts of a large row group without the rest.

    Raises:
        InputError: the file is not a Parquet file.
    """
    options = {"buffer_size": _BUFFER} if piecewise else {}
    try:
        file = pq.ParquetFile(
            _source(uri),
            metadata=_metadata(uri, local_stamp(uri)),
            # With pre_buffer, one request fetches everything needed of a row group.
            pre_buffer=not piecewise,
            binary_type=pa.large_binary(),
            list_type=pa.LargeListType,
            page_checksum_verification=True,
            **options,
        )
        check_names(file.schema_arrow)
        return file
    except Exception as error:  # pyarrow raises anything on a damaged footer
        if storage.is_storage_error(error):
            raise
        raise InputError(f"{uri}: not a Parquet file: {one_line(error)}") from None


def _source(uri: str) -> Any:
    # pyarrow reads local files itself. Reading through Python would cost a tenth of the time to decode small images.
    return pa.OSFile(storage.open_fs(uri)[1]) if storage.is_local(uri) else _asked_once(uri)[0].again()


@lru_cache(maxsize=PARSED_FOOTERS)
def _metadata(uri: str, stamp: Any) -> pq.FileMetaData:
    """A file's parsed footer, shared by all threads; it takes some kilobytes a row group."""
    if storage.is_local(uri):
        return pq.read_metadata(_source(uri))
    return pq.read_metadata(pa.BufferReader(zlib.decompress(_asked_once(uri)[1])))


def _asked_once(uri: str) -> tuple[RemoteFile, bytes]:
    with _asking[hash(uri) % len(_asking)]:  # several threads may read parts of one file
        return _remote(uri)


@lru_cache(maxsize=REMOTE_FILES)
def _remote(uri: str) -> tuple[RemoteFile, bytes]:
    """A remote file and its compressed footer, some 50 bytes a row group, so that footers of many files can be kept."""
    file: Any = open_file(uri)
    file.seek(max(0, file.size - _FOOTER))
    end = file.read()
    said = int.from_bytes(end[-8:-4], "little") if end.endswith(_MARK) else 0
    needed = min(said + 8, file.size)
    if needed > len(end):
        file.seek(file.size - needed)
        end = file.read(needed - len(end)) + end
    return file, zlib.compress(end[-needed:], 1)


def forget_files() -> None:
    """Closes all files, so that they are opened anew. Files on a remote store may have changed."""
    for cache in (_kept_open, _metadata, _remote):
        cache.cache_clear()


class Opened(NamedTuple):
    """An open file, the checked names of the columns to read, and the form of its images."""

    file: pq.ParquetFile
    names: list[str]
    form: Form


def opened(uri: str, columns: Columns, piecewise: bool = False) -> Opened:
    """Opens a file and keeps it open for the calling thread. Raises InputError as `open_parquet` and `cells.present`."""
    return _kept_open(uri, columns.image, columns.label, piecewise, local_stamp(uri), threading.get_ident())


@lru_cache(maxsize=OPEN_FILES)
def _kept_open(uri: str, image: str, label: str, piecewise: bool, stamp: Any, thread: int) -> Opened:
    """Opens a file once for each thread, because two threads must not read through one open file."""
    file = open_parquet(uri, piecewise)
    schema = file.schema_arrow
    return Opened(file, present(uri, schema, Columns(image, label)), form_of(schema.field(image).type))


@contextlib.contextmanager
def reading(where: str, group: int) -> Iterator[None]:
    """Turns the reader's errors on damaged bytes into InputError; errors of the storage pass through."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if storage.is_storage_error(error):
            raise
        raise InputError(f"{where}: row group {group} can't be read: {one_line(error)}") from None


def iterate(
    file: pq.ParquetFile, where: str, group: int, names: list[str], step: int
) -> Iterator[pa.RecordBatch]:
    """Columns of a row group, about `step` rows at a time.

    Args:
        where: name of the file, for errors.

    Raises:
        InputError: the row group can't be read.
    """
    done = 0
    for rows in (step, 1):
        at, batches = 0, file.iter_batches(batch_size=rows, row_groups=[group], columns=names)
        while True:
            with reading(where, group):
                try:
                    batch = next(batches, None)
                except pa.ArrowNotImplementedError:
                    if rows == 1:
                        raise
                    break  # `step` rows take more than 2 GiB: read them one by one
            if batch is None:
                _check_rows(file, where, group, at)
                return
            at += batch.num_rows
            if at > done:
                yield batch
                done = at


def _check_rows(file: pq.ParquetFile, where: str, group: int, rows: int) -> None:
    if rows != (said := file.metadata.row_group(group).num_rows):
        raise InputError(
            f"{where}: row group {group} can't be read: it holds {rows} rows, its footer says {said}"
        )


def batches(uri: str, group: int, columns: Columns) -> Iterator[pa.RecordBatch]:
    """The images and labels of a row group, in pieces that fit into memory."""
    found = opened(uri, columns)
    about = found.file.metadata.row_group(group)
    if about.total_byte_size > BIG_GROUP:
        found = opened(uri, columns, piecewise=True)
    step = max(1, min(about.num_rows, PIECE * about.num_rows // max(1, about.total_byte_size)))
    yield from iterate(found.file, uri, group, found.names, step)


def read_row_group(uri: str, number: int, columns: Columns = PREPARED) -> pa.Table:
    """The images of one row group, still encoded.

    Returns:
        columns bytes (large_binary, null for an image in a file of its own), label (int64, -1 for none) and path
        (string, the image's own name, null if it has none).

    Raises:
        InputError: the row group can't be read, or a column has an extension type.
    """
    file, names, _ = opened(uri, columns)
    with reading(uri, number):
        if file.metadata.row_group(number).total_byte_size > BIG_GROUP:
            table = pa.Table.from_batches(batches(uri, number, columns))
        else:
            table = file.read_row_group(number, columns=names)
            _check_rows(file, uri, number, table.num_rows)
        return _plain(table, columns)


def some_rows(uri: str, group: int, rows: np.ndarray, columns: Columns) -> pa.Table:
    """As `read_row_group`, but only the given rows, in any order."""
    if opened(uri, columns).file.metadata.row_group(group).total_byte_size <= BIG_GROUP:
        return read_row_group(uri, group, columns).take(rows)
    wanted, pieces, at = np.unique(rows), list[pa.Table](), 0
    for batch in batches(uri, group, columns):
        here = wanted[(wanted >= at) & (wanted < at + batch.num_rows)] - at
        if len(here):
            with reading(uri, group):
                pieces.append(_plain(pa.Table.from_batches([batch]), columns).take(here))
        at += batch.num_rows
    return pa.concat_tables(pieces).take(np.searchsorted(wanted, rows))


def _plain(table: pa.Table, columns: Columns) -> pa.Table:
    image, count = table[columns.image], table.num_rows
    if pa.types.is_dictionary(image.type):
        image = image.cast(image.type.value_type)
    own: Any = pa.nulls(count, pa.string())
    if pa.types.is_struct(image.type):
        kind, fields = image.type, image.flatten()  # flatten() also applies the rows' own nulls
        image, path = fields[kind.get_field_index("bytes")], kind.get_field_index("path")
        own = _names(fields[path]) if path >= 0 and is_text(fields[path].type) else own
    label = table[columns.label] if columns.label in table.column_names else None
    return pa.table(
        {
            "bytes": image.cast(pa.large_binary()),
            "label": np.full(count, -1, np.int64) if label is None else stored_numbers(label),
            "path": own,
        }
    )


def _names(own: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """The images' own names, with replacement characters for invalid UTF-8."""
    with contextlib.suppress(pa.ArrowInvalid):
        plain = own.cast(pa.string())
        plain.validate(full=True)
        return plain
    return pa.array([name for chunk in own.chunks for name in texts(chunk)], pa.string())
