"""Parses the files that hold labels of images: tables in CSV, JSON lines or Parquet, and EDM's dataset.json."""

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from pipeline.data.sources.cells import check_plain
from pipeline.data.sources.parts import IMAGE_FOLDER_TABLE
from pipeline.errors import InputError
from pipeline.redact import one_line

TABLES = ("metadata.csv", "metadata.jsonl", IMAGE_FOLDER_TABLE)
EDM = "dataset.json"
FILE_NAME = "file_name"
_NOTHING = ("", "nan", "NaN", "null", "NULL")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_WHOLE = re.compile(r"[+-]?\d{1,4000}")  # Python converts no longer text to an int
_EDM_BEGINS = re.compile(rb'\s*\{\s*"labels"\s*:\s*(\[\s*\[|null)')


_Wanted = Callable[[list[str]], list[str]]


class NoMetadata(Exception):
    """The file has the name of a file with labels but is something else; the message says why, if users should know."""


@dataclass(frozen=True)
class Table:
    """The columns of file names and of labels, as text, numbers or None.

    Attributes:
        values: cells by column.
        classes: names of numeric labels, if the file has them.
    """

    values: dict[str, list[Any]]
    classes: tuple[str, ...] = ()


def read_table(base: str, data: bytes, image: str, label: str, where: str) -> Table:
    """Reads a metadata file.

    Args:
        base: its name without folders.
        data: its content.
        image: a further column of file names, besides `file_name` and `*_file_name`; "" for none.
        label: the column of labels.
        where: its full name, for errors.

    Raises:
        NoMetadata: the file has no column of file names.
        InputError: the file is damaged.
    """

    def wanted(columns: list[str]) -> list[str]:
        # pandas writes its index as a column without a name.
        files = [c for c in columns if c and (c in (FILE_NAME, image) or c.endswith(f"_{FILE_NAME}"))]
        if not files:
            raise NoMetadata(f"has no column {FILE_NAME}; it has {', '.join(columns[:20]) or 'none'}")
        return list(dict.fromkeys(files + [label] * (label in columns)))

    read: Callable[[bytes, _Wanted, str, str], Table] = {
        ".csv": _csv,
        ".jsonl": _json_lines,
        ".parquet": _parquet,
    }[base.removeprefix("metadata")]
    try:
        table = read(data, wanted, label, where)
    except (pa.ArrowException, csv.Error, OSError, UnicodeError) as error:
        raise InputError(
            f"{where}: can't be read: {one_line(error)}: correct it, or move it out of the folder"
        ) from None
    for column, values in table.values.items():
        if column != label and not all(isinstance(value, (str, type(None))) for value in values):
            raise InputError(f"{where}: column {column} holds values that are not file names")
    return table


def _csv(data: bytes, wanted_of: _Wanted, label: str, where: str) -> Table:
    text = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", "surrogateescape", newline="")
    columns = next(csv.reader(text), [])
    wanted = wanted_of(columns)
    # Every cell is read as text, because 0001 may be the name of a file.
    options = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(columns, pa.binary()), include_columns=wanted, check_utf8=False
    )
    table = pa.csv.read_csv(
        io.BytesIO(data),
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=options,
    )
    values = {
        column: [cell.decode(errors="surrogateescape") for cell in table[column].to_pylist()]
        for column in wanted
    }
    if label in values:
        values[label] = _typed(values[label])
    return Table(values)


def _typed(cells: list[str]) -> list[Any]:
    """Cells as numbers if all non-empty cells are numbers, else as text; None for empty cells."""
    found = [cell.strip() for cell in cells]
    full = [cell for cell in found if cell not in _NOTHING]
    numeric = all(map(_NUMBER.fullmatch, full))

    def value(cell: str) -> Any:
        if cell in _NOTHING:
            return None
        if not numeric:
            return cell
        return int(cell) if _WHOLE.fullmatch(cell) else float(cell)

    return list(map(value, found))


def _json_lines(data: bytes, wanted_of: _Wanted, label: str, where: str) -> Table:
    rows = list[dict[str, Any]]()
    for number, line in enumerate(data.split(b"\n"), 1):
        if not (text := line.decode("utf-8-sig", "surrogateescape").strip()):
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise InputError(
                f"{where}: line {number} is not a JSON object: correct it, or move the file out of the folder"
            )
        rows.append(row)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return Table({column: [row.get(column) for row in rows] for column in wanted_of(columns)})


def _parquet(data: bytes, wanted_of: _Wanted, label: str, where: str) -> Table:
    file = pq.ParquetFile(pa.BufferReader(data))
    schema = file.schema_arrow
    wanted = wanted_of(schema.names)
    for column in wanted:
        check_plain(where, schema, column)
    table = file.read(columns=wanted)
    try:  # class names as `datasets` stores them
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError):
        names = ()
    return Table({column: table[column].to_pylist() for column in wanted}, tuple(map(str, names)))


def read_edm(data: bytes, where: str) -> list[tuple[str, Any]] | None:
    """Reads a dataset.json: {"labels": [["00000/img00000000.png", 3], …]}.

    Returns:
        names and labels; None if the images have no labels.

    Raises:
        NoMetadata: the file is something else.
        InputError: the file is damaged, or its labels are not classes.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        if _EDM_BEGINS.match(data):
            raise InputError(f"{where}: damaged: it is not JSON: correct it, or download it again") from None
        raise NoMetadata from None
    if not isinstance(content, dict) or "labels" not in content:
        raise NoMetadata
    if (labels := content["labels"]) is None:
        return None
    pairs = list(labels.items()) if isinstance(labels, dict) else labels
    if not isinstance(pairs, list) or not pairs or not _is_pair(pairs[0]):
        raise NoMetadata
    if not all(map(_is_pair, pairs)):
        raise InputError(f"{where}: its labels are not all pairs of a file and a label")
    return [(name, _class_number(label, where)) for name, label in pairs]


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str)


def _class_number(label: Any, where: str) -> Any:
    if not isinstance(label, list) or len(label) == 1:
        return label
    if sorted(label, key=bool) == [0] * (len(label) - 1) + [1]:  # one-hot
        return label.index(1)
    raise InputError(
        f"{where}: its labels are vectors, not classes: set `labels` to null to train without labels"
    )
