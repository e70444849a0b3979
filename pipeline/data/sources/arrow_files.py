"""Opens Arrow IPC files in stream and file format. Local files are memory-mapped; no code in a file is run."""

import os
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.data.sources.cells import Columns, check_names, present
from pipeline.data.sources.fetch import local_stamp
from pipeline.errors import InputError
from pipeline.redact import one_line
from pipeline.stretches import open_file, read_stretch

OPEN_FILES = 64
_SCHEMAS = 1024  # schemas of remote files to keep
_FILE, _OLD = b"ARROW1", b"FEA1"
_MESSAGES = 8  # byte of the file format at which the same messages begin as in the stream format
_HEAD, _SOME, _BLOCK = 2**14, 2**20, 8 * 2**20  # bytes of a remote file in one request
_fetching = threading.Lock()


def walk(uri: str, where: str, columns: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    """The record batches of a file, one after the other, without holding the whole file.

    Args:
        where: name of the file, for errors.
        columns: columns to read.

    Raises:
        InputError: the file is not an Arrow file, or a record batch can't be read.
    """
    source = _source(uri, _SOME)
    schema, whole = _schema(source, where)
    number = 0
    try:
        reader = _open(source, schema, whole, columns)
        count = reader.num_record_batches if whole else None
        while number != count:
            batch = reader.get_batch(number) if whole else reader.read_next_batch()
            for column in batch.columns:
                _check(column)
            yield batch
            number += 1
    except StopIteration:
        return
    except Exception as error:
        raise _unreadable(error, where, number) from None


class Stored(NamedTuple):
    """Place of a record batch in a file.

    Attributes:
        first, rows: number of its first row, and number of rows.
        begins, ends: byte offsets of its begin and end.
    """

    first: int
    rows: int
    begins: int
    ends: int


def stored_batches(uri: str, where: str, column: str) -> list[Stored]:
    """Places of the record batches of a remote file, so that readers fetch only what they need.

    Returns an empty list if a column is dictionary-encoded, because its dictionary lies elsewhere in the file.

    Args:
        where: name of the file, for errors.
        column: column to check for damage.

    Raises:
        InputError: as `walk`.
    """
    source = _source(uri)
    schema, whole = _schema(source, where)
    if any(map(_is_encoded, schema.types)):
        return []
    found, rows = list[Stored](), 0
    try:
        count = pa.ipc.open_file(source).num_record_batches if whole else None
        source.seek(_MESSAGES if whole else 0)
        messages = pa.ipc.MessageReader.open_stream(source)
        while len(found) != count:
            begins, message = source.tell(), messages.read_next_message()
            if message.type == "record batch":
                batch = pa.ipc.read_record_batch(message, schema)
                _check(batch.column(column))
                found.append(Stored(rows, batch.num_rows, begins, source.tell()))
                rows += batch.num_rows
    except StopIteration:
        pass
    except Exception as error:
        raise _unreadable(error, where, len(found)) from None
    return found


def _is_encoded(kind: pa.DataType) -> bool:
    """True if values of this type are dictionary-encoded, at any depth."""
    inner = (kind.field(i).type for i in range(kind.num_fields))
    return pa.types.is_dictionary(kind) or any(map(_is_encoded, inner))


def schema_of(uri: str) -> pa.Schema:
    """The schema of a file from an untrusted source.

    Raises:
        InputError: the file is not an Arrow file.
    """
    return _schema(_source(uri, _HEAD), uri)[0]


def _schema(source: pa.NativeFile, where: str) -> tuple[pa.Schema, bool]:
    """The schema, and True if the file has the file format rather than the stream format."""
    head = source.read(len(_FILE))
    source.seek(0)
    if head.startswith(_OLD):
        raise InputError(
            f"{where}: a Feather file of version 1: write it again with pyarrow.feather.write_feather"
        )
    try:
        if not head:
            raise InputError("it is empty")
        schema = (pa.ipc.open_file if head == _FILE else pa.ipc.open_stream)(source).schema
        check_names(schema)
    except Exception as error:  # pyarrow raises anything on damaged bytes
        if storage.is_storage_error(error):
            raise
        raise InputError(f"{where}: not an Arrow file: {one_line(error)}") from None
    return schema, head == _FILE


def _open(source: pa.NativeFile, schema: pa.Schema, whole: bool, columns: tuple[str, ...]) -> Any:
    source.seek(0)
    options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name) for name in columns])
    return (pa.ipc.open_file if whole else pa.ipc.open_stream)(source, options=options)


def _source(uri: str, ahead: int = _BLOCK) -> pa.NativeFile:
    path = storage.open_fs(uri)[1]
    if not storage.is_local(uri):
        return pa.PythonFile(open_file(uri, ahead), "r")
    # An empty file can't be mapped.
    return pa.memory_map(path) if os.stat(path).st_size else pa.BufferReader(b"")  # noqa: PTH116


def _check(column: pa.Array) -> None:
    """Raises ArrowInvalid if offsets in a damaged file point outside its memory."""
    column.validate()
    for part in column.flatten() if pa.types.is_struct(column.type) else [column]:
        try:
            part.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):  # invalid text is read with replacement characters
                raise


def _unreadable(error: Exception, where: str, number: int) -> Exception:
    if isinstance(error, InputError) or storage.is_storage_error(error):
        return error
    return InputError(f"{where}: record batch {number} can't be read: {one_line(error)}")


class Opened(NamedTuple):
    """An open file whose columns were checked.

    Attributes:
        names: names of the columns to read.
        starts: number of each record batch's first row, and the number of all rows: int [batches + 1].
        batches: all batches for the stream format, the reader for the file format, or their places in a remote file.
    """

    names: list[str]
    schema: pa.Schema
    starts: np.ndarray
    batches: Any

    def slices(self, where: str, first: int, count: int) -> Iterator[pa.RecordBatch]:
        """The rows [first, first + count). Raises InputError as `walk`."""
        stop, here = first + count, int(np.searchsorted(self.starts, first, side="right")) - 1
        while first < stop:
            begin, end = int(self.starts[here]), min(int(self.starts[here + 1]), stop)
            try:
                if isinstance(self.batches, tuple):
                    whole = _fetched_batch(where, self.batches[here], self.schema)
                else:
                    some = self.batches
                    whole = some[here] if isinstance(some, list) else some.get_batch(here)
                rows = whole.slice(first - begin, end - first)
                for column in rows.columns:
                    _check(column)
            except Exception as error:
                raise _unreadable(error, where, here) from None
            if rows.num_rows:
                yield rows
            first, here = max(first, end), here + 1


def opened(uri: str, columns: Columns, stored: tuple[Stored, ...] = ()) -> Opened:
    """Opens a file and keeps it open for the calling thread.

    Args:
        stored: places of the only record batches to read, in a remote file.

    Raises:
        InputError: as `walk` and `cells.present`.
    """
    if stored:
        schema = _remote_schema(uri)
        starts = np.array([*(batch.first for batch in stored), stored[-1].first + stored[-1].rows])
        return Opened(present(uri, schema, columns), schema, starts, stored)
    return _kept_open(uri, columns.image, columns.label, local_stamp(uri), threading.get_ident())


@lru_cache(maxsize=OPEN_FILES)
def _kept_open(uri: str, image: str, label: str, stamp: Any, thread: int) -> Opened:
    source = _source(uri) if storage.is_local(uri) else pa.BufferReader(_fetched_once(uri))
    schema, whole = _schema(source, uri)
    names = present(uri, schema, Columns(image, label))
    rows, batches = list[int](), list[pa.RecordBatch]()
    try:
        reader = _open(source, schema, whole, tuple(names))
        if whole:
            rows = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
        else:
            for batch in reader:
                batches.append(batch)
                rows.append(batch.num_rows)
    except Exception as error:
        raise _unreadable(error, uri, len(rows)) from None
    starts = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
    return Opened(names, schema, starts, reader if whole else batches)


@lru_cache(maxsize=_SCHEMAS)
def _remote_schema(uri: str) -> pa.Schema:
    source = _source(uri, _HEAD)
    source.seek(_MESSAGES if source.read(len(_FILE)) == _FILE else 0)
    return pa.ipc.open_stream(source).schema


@lru_cache(maxsize=4)
def _fetched_batch(uri: str, stored: Stored, schema: pa.Schema) -> pa.RecordBatch:
    data = read_stretch(uri, stored.begins, stored.ends)
    return pa.ipc.read_record_batch(pa.ipc.read_message(pa.BufferReader(data)), schema)


def _fetched_once(uri: str) -> bytes:
    with _fetching:  # several threads may read parts of one file
        return _fetched(uri)


@lru_cache(maxsize=2)
def _fetched(uri: str) -> bytes:
    return storage.read_bytes(uri)


def forget_open_files() -> None:
    """Closes all files, so that they are opened anew. Files on a remote store may have changed."""
    _kept_open.cache_clear()
    for cache in (_fetched, _fetched_batch, _remote_schema):
        cache.cache_clear()
