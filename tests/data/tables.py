"""Parquet and Arrow files as other programs write them, with the same few images."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.sources.arrow import is_arrow, list_arrow
from pipeline.data.sources.parquet import is_parquet, list_parquet
from pipeline.data.sources.parts import Item, Request, SourceListing
from pipeline.data.sources.tree import open_tree
from tests.data.common import encoded

IMAGES = [*encoded(6), *encoded(6, 8, 8, "JPEG"), *encoded(4, 9, 9, "WEBP")]
COUNT = len(IMAGES)
NUMBERS = [i % 2 for i in range(COUNT)]
WORDS = ["cat" if i % 2 else "dog" for i in range(COUNT)]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def features(**columns: object) -> dict[bytes, bytes]:
    """Return schema metadata that declares the features as `datasets` writes it."""
    return {b"huggingface": json.dumps({"info": {"features": columns}}).encode()}


def class_label(*names: str) -> dict[str, object]:
    return {"_type": "ClassLabel", "names": list(names)}


IMAGE = {"_type": "Image"}


def structs(kind: pa.DataType = STRUCT, images: Sequence[bytes | None] = IMAGES) -> pa.Array:
    return pa.array([{"bytes": data, "path": f"{i}.img"} for i, data in enumerate(images)], kind)


def binary(kind: pa.DataType | None = None) -> pa.Array:
    return pa.array(IMAGES, kind or pa.binary())


def listed(kind: Callable[[pa.DataType], pa.DataType], inner: pa.DataType = STRUCT) -> pa.Array:
    cells = structs().to_pylist() if pa.types.is_struct(inner) else IMAGES
    return pa.array([[cell] for cell in cells], kind(inner))


def listing(
    root: Path, images_per_part: int = 5, image_column: str = "", label_column: str = ""
) -> SourceListing:
    """List a folder of Parquet files."""
    tree = open_tree(str(root))
    assert is_parquet(tree)
    return list_parquet(tree, Request(images_per_part, image_column, label_column))


def items(found: SourceListing) -> list[Item]:
    return [item for part in found.parts for item in part.read()]


def write(
    path: Path, columns: dict[str, Any], metadata: dict[bytes, bytes] | None = None, **options: Any
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, **options)


def both(
    path: Path, columns: dict[str, Any], metadata: dict[bytes, bytes] | None = None
) -> list[SourceListing]:
    """Write one table as a Parquet and as an Arrow file, and return the listing of each."""
    table = pa.table(columns).replace_schema_metadata(metadata)
    views = "view" in str(table.schema)  # pyarrow writes views in a single row group
    write(path / "parquet" / "a.parquet", columns, metadata, row_group_size=COUNT if views else 7)
    (path / "arrow").mkdir()
    with pa.ipc.new_stream(path / "arrow" / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    tree = open_tree(str(path / "arrow"))
    assert is_arrow(tree) and not is_parquet(tree)
    return [listing(path / "parquet"), list_arrow(tree, Request(5))]


class Planted:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)
