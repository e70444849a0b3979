"""Writes images as a Parquet file in exactly the Hugging Face convention."""

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

IMAGE = pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


class ShardWriter:
    """Collects rows into the bytes of a Parquet file, row group by row group."""

    def __init__(self, schema: pa.Schema, rows_per_group: int) -> None:
        self._schema = schema
        self._buffer = io.BytesIO()
        self._writer = pq.ParquetWriter(
            self._buffer, self._schema, compression="none", write_statistics=False
        )
        self._rows: list[dict[str, Any]] = []
        self._limit = rows_per_group
        self.row_groups: list[int] = []

    @property
    def rows(self) -> int:
        return sum(self.row_groups) + len(self._rows)

    def add(self, data: bytes, path: str, **columns: int | str | bytes | None) -> None:
        self._rows.append({"image": {"bytes": data, "path": path}, **columns})
        if len(self._rows) == self._limit:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(
                pa.Table.from_pylist(self._rows, self._schema), row_group_size=self._limit
            )
            self.row_groups.append(len(self._rows))
            self._rows = []

    def close(self) -> bytes:
        self._flush()
        self._writer.close()
        return self._buffer.getvalue()


def huggingface_schema(
    classes: tuple[str, ...], first: pa.Field = IMAGE, more: dict[str, pa.DataType] | None = None
) -> pa.Schema:
    """The columns image {bytes, path} and label, with the metadata by which `datasets` gives PIL images and class names.

    Args:
        classes: names of the labels; empty = the labels are plain numbers.
        first: column in place of `image`.
        more: types of further columns, by name.
    """
    integer, more = {"dtype": "int64", "_type": "Value"}, more or {}
    features: dict[str, Any] = {
        first.name: {"_type": "Image"} if first is IMAGE else {"dtype": str(first.type), "_type": "Value"},
        "label": {"names": list(classes), "_type": "ClassLabel"} if classes else integer,
        **{name: {"dtype": str(kind), "_type": "Value"} for name, kind in more.items()},
    }
    fields = [first, *(pa.field(name, kind) for name, kind in ({"label": pa.int64()} | more).items())]
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def shard_schema(classes: tuple[str, ...]) -> pa.Schema:
    """As `huggingface_schema`, with `source_sha256`, the hash of each encoded image as given."""
    schema = huggingface_schema(classes)
    features = json.loads(schema.metadata[b"huggingface"])
    features["info"]["features"]["source_sha256"] = {"dtype": "binary", "_type": "Value"}
    return schema.append(pa.field("source_sha256", pa.binary())).with_metadata(
        {"huggingface": json.dumps(features)}
    )
