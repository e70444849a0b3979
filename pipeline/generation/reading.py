"""Reading back a few images of a generated dataset."""

import posixpath
import tarfile
from collections.abc import Iterator
from itertools import islice

import pyarrow.parquet as pq

from pipeline.data import storage
from pipeline.generation import ledger
from pipeline.generation.plan import Piece


def first_images(output: str, form: str, pieces: list[Piece], count: int) -> list[bytes]:
    """The encoded images of the first samples of a dataset, at most `count`.

    Args:
        pieces: its files, in order.
    """
    return list(islice(_images(output, form, pieces, count), count))


def _images(output: str, form: str, pieces: list[Piece], count: int) -> Iterator[bytes]:
    if form == "png":
        uris = sorted(storage.sizes(storage.join(output, ledger.DATA)), key=posixpath.basename)
        yield from (storage.read_bytes(uri) for uri in uris if uri.endswith(".png"))
        return
    for piece in pieces:
        fs, path = storage.open_fs(ledger.data_uri(output, piece, form))
        with fs.open(path, "rb") as file:
            if form == "parquet":
                for batch in pq.ParquetFile(file).iter_batches(count, columns=["image"]):
                    yield from (image["bytes"] for image in batch["image"].to_pylist())
            else:
                with tarfile.open(fileobj=file, mode="r|") as tar:
                    yield from (
                        member_file.read()
                        for member in tar
                        if member.name.endswith(".png") and (member_file := tar.extractfile(member))
                    )
