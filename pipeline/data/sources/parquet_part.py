"""The part of a Parquet file that one task reads: some of its row groups."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import pyarrow as pa

from pipeline.data.sources.cells import Columns, items_of, named, read_beside
from pipeline.data.sources.parquet_files import PREPARED, batches, opened, reading, some_rows
from pipeline.data.sources.parts import Item, Part, image_table, pick


@dataclass(frozen=True)
class ParquetPart(Part):
    """Consecutive row groups of one file. `names` are the file and the images beside it that its rows name.

    Attributes:
        start, count: number of the first row group, and number of row groups.
        columns: the columns of images and labels.
        prepared: True if the images' own names are whole paths, as jobs/prepare.py and jobs/generate.py write them.
    """

    whole: ClassVar[bool] = True

    start: int = 0
    count: int = 1
    columns: Columns = PREPARED
    prepared: bool = False

    def read(self, rows: Sequence[int] | None = None) -> Iterator[Item]:
        if rows is not None and opened(self.uri, self.columns).form == "list":
            # A row may hold several images, so all rows before must be read to count them.
            yield from pick(self.read(), rows)
            return
        if rows is None:
            for group in range(self.start, self.start + self.count):
                yield from (item for _, item in self._items(group, None))
            return
        found = dict[int, Item]()
        for group, first, here in self._by_group(np.asarray(rows, np.int64)):
            wanted = np.unique(np.asarray(rows)[here] - first)
            found |= {first + row: item for row, item in self._items(group, wanted)}
        yield from (found[row] for row in rows)

    def _items(self, group: int, wanted: np.ndarray | None) -> Iterator[tuple[int, Item]]:
        beside = partial(read_beside, self.root, self.names[0])
        at = 0
        for batch in batches(self.uri, group, self.columns):
            count = batch.num_rows
            some = [0] if wanted is None else wanted[(wanted >= at) & (wanted < at + count)] - at
            for row in some:
                piece = batch if wanted is None else batch.slice(row, 1)
                labels = (
                    piece.column(self.columns.label) if self.columns.label in piece.schema.names else None
                )
                places = self._places(group, range(at + row, at + row + piece.num_rows))
                read = items_of(
                    piece.column(self.columns.image), labels, self.columns.classes, places, beside
                )
                with reading(self.uri, group):
                    yield from ((at + row + i, item) for i, items in enumerate(read) for item in items)
            at += count

    def _places(self, group: int, rows: Iterable[int]) -> list[str]:
        return [f"{self.names[0]}/{group}/{row:06d}" for row in rows]

    def _some_rows(self, group: int, rows: np.ndarray) -> pa.Table:
        table = some_rows(self.uri, group, rows, self.columns)
        if self.prepared and not table["path"].null_count:
            return table
        pairs = zip(self._places(group, rows.tolist()), table["path"].to_pylist(), strict=True)
        paths = [own or place if self.prepared else named(place, own) for place, own in pairs]
        return table.set_column(2, "path", pa.array(paths, pa.string()))

    def _by_group(self, rows: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """For each row group that holds some of the rows: its number, its first row in this part, indices into `rows`."""
        metadata = opened(self.uri, self.columns).file.metadata
        counts = [metadata.row_group(g).num_rows for g in range(self.start, self.start + self.count)]
        ends = np.cumsum(counts)
        owners = np.searchsorted(ends, rows, side="right")
        for n in np.unique(owners).tolist():
            yield self.start + n, int(ends[n]) - counts[n], np.flatnonzero(owners == n)

    def table(self, rows: np.ndarray) -> pa.Table:
        if not len(rows) or opened(self.uri, self.columns).form in ("list", "text"):
            return super().table(rows) if len(rows) else image_table([])
        if self.count == 1:
            table = self._some_rows(self.start, rows)
        else:
            pieces, places = list[pa.Table](), list[np.ndarray]()
            for group, first, here in self._by_group(rows):
                pieces.append(self._some_rows(group, rows[here] - first))
                places.append(here)
            table = pa.concat_tables(pieces).take(np.argsort(np.concatenate(places)))
        if table["bytes"].null_count:  # these images lie in files of their own
            data = pa.array([item.data for item in self.read(rows.tolist())], pa.large_binary())
            table = table.set_column(0, "bytes", data)
        return table
