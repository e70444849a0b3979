"""Parquet files from outside, opened so that nothing in them is run."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError


def open_parquet(file: Any, name: str) -> pq.ParquetFile:
    """Opens a file whose columns are plain data.

    A file may ask for a type that Python classes read. One of Ray's holds pickles: whoever looks at a value runs
    what the file's author wrote.

    Raises:
        InputError: a column of such a type.
    """
    parquet = pq.ParquetFile(file)
    for column in parquet.schema_arrow:
        if _has_python_type(column.type):
            raise InputError(f"{name}: column {column.name} is {column.type}, not plain data: refused")
    return parquet


def _has_python_type(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.ExtensionType):
        return True
    return any(_has_python_type(kind.field(i).type) for i in range(kind.num_fields))
