"""Read thousands of mutated files. `python -m tests.data.fuzz KINDS COUNT SEED` exits with 0 if every check held.

It is a process of its own, so that a decoder that crashes or hangs fails one test and doesn't end all tests.
"""

import io
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.images import DecodeError, decode
from pipeline.data.shard_writer import huggingface_schema
from pipeline.data.sources.parts import Item, Request
from pipeline.data.sources.registry import open_source
from pipeline.errors import InputError
from tests.data.common import CLASSES, encode, encoded, label_of, picture, tar_bytes


def mutate(data: bytes, rng: np.random.Generator) -> tuple[bytes, list[tuple[int, int]]]:
    """Return damaged data, and the ranges of bytes that the damage touches."""
    kind = rng.integers(5)
    if kind == 0:  # cut short
        at = int(rng.integers(len(data)))
        return data[:at], [(at, len(data))]
    broken, touched = bytearray(data), []
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(len(data)))
        size = 1 if kind < 3 else int(rng.integers(1, 64))
        stop = min(at + size, len(data))
        broken[at:stop] = bytes(stop - at) if kind == 3 else rng.bytes(stop - at)
        touched.append((at, stop))
    return bytes(broken), touched


def hit(begin: int, end: int, touched: list[tuple[int, int]]) -> bool:
    return any(a < end and begin < b for a, b in touched)


def images(kind: str, count: int, rng: np.random.Generator) -> int:
    """Check that each mutated image is decoded to the right shape or refused. Return the number of refusals."""
    originals = [encode(picture(i, 24, 16, mode), kind) for i in range(4) for mode in ("RGB", "L")]
    refused = 0
    for i in range(count):
        data, _ = mutate(originals[i % len(originals)], rng)
        try:
            pixels = decode(data, 8, 3)
        except DecodeError:
            refused += 1
        else:
            assert pixels.shape == (8, 8, 3)
            assert pixels.dtype == np.uint8
    return refused


def read_all(source: str, uri: Path) -> list[Item]:
    parts = open_source(source, str(uri), Request(10)).listing.parts  # type: ignore[arg-type]
    return [item for part in parts for item in part.read()]


def tars(count: int, rng: np.random.Generator, folder: Path) -> int:
    """Check that damage costs no image whose header, bytes and label are intact. Return the number of lost images."""
    originals, lost = encoded(12), 0
    whole = tar_bytes(originals)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        members = [m for m in tar if m.name.endswith(".png")]
    # An image needs its label too, so its stretch reaches to the next image.
    ends = [*(m.offset for m in members[1:]), len(whole)]
    path = folder / "a.tar"
    for _ in range(count):
        data, touched = mutate(whole, rng)
        path.write_bytes(data)
        try:
            found = {item.data for item in read_all("webdataset", path)}
        except InputError:  # nothing in it can be read
            found = set()
        for member, end, image in zip(members, ends, originals, strict=True):
            if not hit(member.offset, end, touched):
                assert image in found, (member.name, touched)
            lost += image not in found
    return lost


def parquets(count: int, rng: np.random.Generator, folder: Path) -> int:
    """Check that intact row groups are read whole and damage raises an error. Return the number of errors."""
    originals, lost = encoded(30), 0
    path, schema = folder / "a.parquet", huggingface_schema(CLASSES)
    rows = [
        {"image": {"bytes": d, "path": f"{i}.png"}, "label": label_of(i)} for i, d in enumerate(originals)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=10)
    whole, metadata = path.read_bytes(), pq.ParquetFile(path).metadata
    spans = []
    for g in range(metadata.num_row_groups):
        columns = [metadata.row_group(g).column(c) for c in range(metadata.num_columns)]
        begin = min(c.dictionary_page_offset or c.data_page_offset for c in columns)
        spans.append((begin, begin + sum(c.total_compressed_size for c in columns)))
    footer = (spans[-1][1], len(whole))
    for _ in range(count):
        data, touched = mutate(whole, rng)
        path.write_bytes(data)
        try:
            parts = open_source("huggingface", str(path), Request(10)).listing.parts
        except InputError:
            assert hit(*footer, touched) or hit(0, 4, touched), touched
            lost += 1
            continue
        for part in parts:
            try:
                found = {item.data for item in part.read()}
            except InputError as error:
                assert "a.parquet" in str(error)
                lost += 1
                found = set()
            mine = [g for g in range(3) if f"start={g}" in repr(part)]
            for g in mine:
                if not hit(*spans[g], touched) and not hit(*footer, touched):
                    assert set(originals[g * 10 : g * 10 + 10]) <= found, touched
    return lost


def main(kind: str, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        if kind == "tar":
            damaged = tars(count, rng, Path(folder))
        elif kind == "parquet":
            damaged = parquets(count, rng, Path(folder))
        else:
            damaged = min(images(name, count, rng) for name in kind.split(","))
    print(damaged)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
