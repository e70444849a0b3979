"""Reading back a few images of a generated dataset."""

import posixpath
import tarfile
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import ImageConfig
from pipeline.data import storage
from pipeline.data.images import DecodeError, decode
from pipeline.errors import InputError
from pipeline.generation import ledger
from pipeline.generation.plan import Piece


def first_images(
    output: str, form: str, pieces: list[Piece], count: int, image: ImageConfig
) -> list[np.ndarray]:
    """The first samples of a dataset, at most `count`: uint8 [H, W, C] each.

    Args:
        pieces: its files, in order.

    Raises:
        InputError: a file is damaged, though its length is right.
    """
    try:
        encoded = islice(_images(output, form, pieces, count), count)
        return [decode(data, image.size, image.channels) for data in encoded]
    except (DecodeError, pa.ArrowInvalid, tarfile.TarError) as error:
        raise InputError(
            f"--output {output}: a file is damaged ({' '.join(str(error).split())[:100]}): run the same command with "
            "--verify, then as before"
        ) from None


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
