"""Groups of rows, the unit of shuffling, packed into arrays of a few bytes a group."""

import pickle
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import pyarrow as pa

from pipeline.data.sources.parquet import ParquetPart
from pipeline.data.sources.parts import Part

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that are read together: a row group of Parquet, or a few images of another source.

    Attributes:
        part: the part of the source that the rows are in.
        rows: number of rows.
        kept: numbers of these rows in the part, int [rows]; None = all rows of the part.
        labels: class numbers of these rows, -1 for none, int [rows]; None = the labels in the file.
    """

    part: Part
    rows: int
    kept: Array | None = None
    labels: Array | None = None


class Groups(Sequence[Group]):
    """The groups of a split. A `Group` is made only when it is indexed.

    Attributes:
        first: sample id of each group's first row, and the end: int64 [groups + 1].
    """

    first: Array

    def __len__(self) -> int:
        return len(self.first) - 1

    @overload
    def __getitem__(self, number: int) -> Group: ...
    @overload
    def __getitem__(self, number: slice) -> list[Group]: ...
    def __getitem__(self, number: int | slice) -> Group | list[Group]:
        if isinstance(number, slice):
            return [self._group(n) for n in range(*number.indices(len(self)))]
        return self._group(range(len(self))[number])

    @abstractmethod
    def _group(self, number: int) -> Group: ...


@dataclass(frozen=True, eq=False)
class RowGroups(Groups):
    """All row groups of files that jobs/prepare.py or jobs/generate.py wrote.

    Attributes:
        files: URIs of the files.
        ends: row groups in each file and all files before it, int64 [files].
    """

    files: tuple[str, ...]
    ends: Array
    first: Array

    def _group(self, number: int) -> Group:
        file = int(np.searchsorted(self.ends, number, side="right"))
        start = number - (int(self.ends[file - 1]) if file else 0)
        return row_group(self.files[file], start, int(self.first[number + 1] - self.first[number]))


@dataclass(frozen=True, eq=False)
class PackedGroups(Groups):
    """Groups of any parts. Each part is pickled, because as objects they would take kilobytes each.

    Attributes:
        parts: the pickled parts one after the other, uint8 [bytes].
        ends: end of each part in `parts`, int64 [parts].
        part: number of each group's part, int32 [groups].
        first: see `Groups`.
        kept, labels: see `Group`, concatenated over all groups: int32 [rows]; int64 for labels that need it.
    """

    parts: Array
    ends: Array
    part: Array
    first: Array
    kept: Array
    labels: Array

    def _group(self, number: int) -> Group:
        part, begin, end = self.part[number], self.first[number], self.first[number + 1]
        packed = self.parts[self.ends[part - 1] if part else 0 : self.ends[part]]
        return Group(
            pickle.loads(packed.tobytes()), int(end - begin), self.kept[begin:end], self.labels[begin:end]
        )


def row_group(uri: str, number: int, rows: int) -> Group:
    """One whole row group of a file that jobs/prepare.py or jobs/generate.py wrote.

    Args:
        number: number of the row group in the file.
        rows: rows in it.
    """
    folder, _, name = uri.rpartition("/")
    return Group(ParquetPart(folder, (name,), start=number, count=1, prepared=True), rows)


def row_groups(files: Iterable[tuple[str, Sequence[int]]]) -> RowGroups:
    """All row groups of some files, given the URI of each file and the row counts of its row groups."""
    pairs = list(files)
    ends = np.cumsum([len(rows) for _, rows in pairs], dtype=np.int64)
    first = np.cumsum([0, *(n for _, rows in pairs for n in rows)], dtype=np.int64)
    return RowGroups(tuple(uri for uri, _ in pairs), ends, first)


def pack(groups: Sequence[Group]) -> PackedGroups:
    """Packs groups that have `kept` and `labels`. Groups of the same part must be adjacent."""
    parts, part, last = list[bytes](), list[int](), None
    for group in groups:
        if group.part is not last:
            last = group.part
            parts.append(pickle.dumps(last))
        part.append(len(parts) - 1)
    labels = np.concatenate([np.asarray(group.labels, np.int64) for group in groups])
    return PackedGroups(
        parts=np.frombuffer(b"".join(parts), np.uint8),
        ends=np.cumsum([len(data) for data in parts], dtype=np.int64),
        part=np.array(part, np.int32),
        first=np.cumsum([0, *(group.rows for group in groups)], dtype=np.int64),
        kept=np.concatenate([np.asarray(group.kept, np.int32) for group in groups]),
        labels=labels.astype(np.int32) if np.abs(labels).max(initial=0) < 2**31 else labels,
    )


def read_rows(group: Group, rows: Array) -> pa.Table:
    """Rows of one group, still encoded.

    Args:
        rows: int [N], positions in the group, in any order.

    Returns:
        columns bytes (large_binary), label (int64, -1 for none) and path (string), in the order of `rows`.
    """
    table = group.part.table(rows if group.kept is None else group.kept[rows].astype(np.int64))
    if group.labels is not None:
        table = table.set_column(1, "label", pa.array(group.labels[rows].astype(np.int64)))
    return table
