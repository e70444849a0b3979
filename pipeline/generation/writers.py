"""Samples as the bytes of a file: the same bytes for the same samples."""

import io
import json
import tarfile
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIX = {"parquet": "parquet", "webdataset": "tar", "png": "tar"}


@dataclass(frozen=True)
class Row:
    """One sample: PNG bytes, class (or None), index and seed."""

    png: bytes
    label: int | None
    index: int
    seed: int


def parquet(rows: list[Row], classes: tuple[str, ...]) -> bytes:
    """A Parquet file in the Hugging Face image convention, with the columns index and seed beside it."""
    label = (
        {"names": list(classes), "_type": "ClassLabel"} if classes else {"dtype": "int64", "_type": "Value"}
    )
    integer = {"dtype": "int64", "_type": "Value"}
    features = {"image": {"_type": "Image"}, "label": label, "index": integer, "seed": integer}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("image", image), ("label", pa.int64()), ("index", pa.int64()), ("seed", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    table = pa.Table.from_pylist(
        [
            {
                "image": {"bytes": row.png, "path": f"{row.index:012d}.png"},
                "label": row.label,
                "index": row.index,
                "seed": row.seed,
            }
            for row in rows
        ],
        schema,
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="none", write_statistics=False)
    return buffer.getvalue()


def webdataset(rows: list[Row], classes: tuple[str, ...]) -> bytes:
    """A WebDataset tar: INDEX.png, INDEX.cls (where there are classes) and INDEX.json for every sample."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            name = f"{row.index:012d}"
            _add(tar, f"{name}.png", row.png)
            if row.label is not None:
                _add(tar, f"{name}.cls", str(row.label).encode())
            _add(
                tar,
                f"{name}.json",
                json.dumps({"index": row.index, "label": row.label, "seed": row.seed}).encode(),
            )
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def png_path(row: Row, classes: tuple[str, ...]) -> str:
    """Where a single PNG goes: a folder for each class."""
    folder = "images" if row.label is None else classes[row.label].replace("/", "_")
    return f"{folder}/{row.index:012d}.png"
