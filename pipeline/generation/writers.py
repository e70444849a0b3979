"""Encodes samples as files. Equal samples give equal bytes."""

import io
import json
import re
import tarfile
from dataclasses import dataclass

import pyarrow as pa

from pipeline.data.shard_writer import ShardWriter, huggingface_schema

SUFFIX = {"parquet": "parquet", "webdataset": "tar", "png": "png", "npz": "npz"}


@dataclass(frozen=True)
class Row:
    """One sample: PNG bytes, class number (or None), index and seed."""

    png: bytes
    label: int | None
    index: int
    seed: int


def columns_beside(seed: int) -> dict[str, pa.DataType]:
    """The types of the columns beside image and label. A seed beyond int64 is text, because some readers lack uint64."""
    return {"index": pa.int64(), "seed": pa.int64() if seed < 2**63 else pa.string()}


def _written(seed: int) -> int | str:
    return seed if seed < 2**63 else str(seed)


def parquet(rows: list[Row], classes: tuple[str, ...]) -> bytes:
    """A Parquet file in the Hugging Face image convention, with the further columns index and seed."""
    seed = rows[0].seed if rows else 0
    writer = ShardWriter(huggingface_schema(classes, more=columns_beside(seed)), max(1, len(rows)))
    for row in rows:
        writer.add(row.png, png_name(row.index), label=row.label, index=row.index, seed=_written(row.seed))
    return writer.close()


def webdataset(rows: list[Row]) -> bytes:
    """A WebDataset tar: INDEX.png, INDEX.cls (if there are classes) and INDEX.json for every sample."""
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
    """The file name of a single PNG."""
    return f"{index:012d}.png"


def class_folders(classes: tuple[str, ...]) -> list[str]:
    """A safe, visible and unique folder name for each class: the class's own name if possible."""
    names = [re.sub(r"[^\w. -]", "_", name).strip(". ") for name in classes]
    if len(set(names)) == len(names) and all(names):
        return names
    return [f"{number}_{name}".rstrip("_") for number, name in enumerate(names)]


def png_place(index: int, label: int | None, folders: list[str]) -> str:
    """The path of a single PNG in the data folder: in the folder of its class."""
    return f"{'images' if label is None else folders[label]}/{png_name(index)}"


def png_metadata(
    indices: list[int], labels: list[int | None], seed: int, classes: tuple[str, ...]
) -> pa.Table:
    """Rows of the metadata.parquet that `datasets` joins to a folder of images."""
    folders, pairs = class_folders(classes), zip(indices, labels, strict=True)
    columns = {
        "file_name": [png_place(*pair, folders) for pair in pairs],
        "label": labels,
        "index": indices,
        "seed": [_written(seed)] * len(indices),
    }
    return pa.table(
        columns, huggingface_schema(classes, pa.field("file_name", pa.string()), columns_beside(seed))
    )
