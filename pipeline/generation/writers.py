"""Samples as the bytes of a file: the same bytes for the same samples."""

import io
import json
import re
import tarfile
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIX = {"parquet": "parquet", "webdataset": "tar", "png": "png"}


@dataclass(frozen=True)
class Row:
    """One sample: PNG bytes, class (or None), index and seed."""

    png: bytes
    label: int | None
    index: int
    seed: int


def parquet(rows: list[Row], classes: tuple[str, ...]) -> bytes:
    """A Parquet file in the Hugging Face image convention, with the columns index and seed beside it."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("image", image), ("label", pa.int64()), ("index", pa.int64()), ("seed", pa.int64())],
        metadata=_huggingface({"image": {"_type": "Image"}}, classes),
    )
    images = pa.StructArray.from_arrays(
        [
            pa.array([row.png for row in rows], pa.binary()),
            pa.array([f"{row.index:012d}.png" for row in rows], pa.string()),
        ],
        fields=list(image),
    )
    columns = [pa.array([getattr(row, name) for row in rows], pa.int64()) for name in schema.names[1:]]
    buffer = io.BytesIO()
    table = pa.Table.from_arrays([images, *columns], schema=schema)
    pq.write_table(table, buffer, compression="none", write_statistics=False)
    return buffer.getvalue()


def webdataset(rows: list[Row]) -> bytes:
    """A WebDataset tar: INDEX.png, INDEX.cls (where there are classes) and INDEX.json for every sample."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            name = f"{row.index:012d}"
            _add(tar, f"{name}.png", row.png)
            if row.label is not None:
                _add(tar, f"{name}.cls", str(row.label).encode())
            about = {"index": row.index, "label": row.label, "seed": row.seed}
            _add(tar, f"{name}.json", json.dumps(about).encode())
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def png_name(index: int) -> str:
    """The name of a single PNG in its class's folder."""
    return f"{index:012d}.png"


def class_folders(classes: tuple[str, ...]) -> list[str]:
    """A folder name for each class that is safe, not hidden, and its own: the class's name where that is."""
    names = [re.sub(r"[^\w. -]", "_", name).strip(". ") for name in classes]
    if len(set(names)) == len(names) and all(names):
        return names
    return [f"{number}_{name}".rstrip("_") for number, name in enumerate(names)]


def png_place(index: int, label: int | None, folders: list[str]) -> str:
    """Where a single PNG goes in the data folder: into its class's folder."""
    return f"{'images' if label is None else folders[label]}/{png_name(index)}"


def png_metadata(
    indices: list[int], labels: list[int | None], seed: int, classes: tuple[str, ...]
) -> pa.Table:
    """Rows of the metadata.parquet that `datasets` joins to a folder of images."""
    folders, pairs = class_folders(classes), zip(indices, labels, strict=True)
    table = pa.table(
        {
            "file_name": pa.array([png_place(*pair, folders) for pair in pairs], pa.string()),
            "label": pa.array(labels, pa.int64()),
            "index": pa.array(indices, pa.int64()),
            "seed": pa.array([seed] * len(indices), pa.int64()),
        }
    )
    name = {"file_name": {"dtype": "string", "_type": "Value"}}
    return table.replace_schema_metadata(_huggingface(name, classes))


def _huggingface(first: dict[str, Any], classes: tuple[str, ...]) -> dict[str, str]:
    """The metadata by which `datasets` gives images and class names: of a column, then label, index and seed."""
    integer = {"dtype": "int64", "_type": "Value"}
    label = {"names": list(classes), "_type": "ClassLabel"} if classes else integer
    features = {**first, "label": label, "index": integer, "seed": integer}
    return {"huggingface": json.dumps({"info": {"features": features}})}
