"""Blocks of images that the processes of a stream hand to each other, and the decoding of encoded blocks.

This module imports neither torch nor Ray.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline import memory
from pipeline.config import ImageConfig
from pipeline.data.images import DecodeError, decode
from pipeline.data.order import crop_place

# Ray takes some 30 ms of CPU time for each block, whatever its size, so blocks are large.
BLOCK_BYTES = 32 * 2**20
ROWS_PER_BLOCK, BATCHES_PER_BLOCK = (512, 4096), 32
# Enough to keep training while storage stalls for a few steps. More would be decoded during a run's first steps.
BATCHES_AHEAD = 8
CENTRE = (0.5, 0.5)
_KEPT_BYTES = 2**30


class Decode:
    """Decodes the blocks that `reads.Read` yields.

    Args:
        image: size and channels to decode to.
        seed: seed of the plan; it decides the random crops.
        random_crop: crop the square at a random place along the longer side, not at the centre.
    """

    def __init__(self, image: ImageConfig, seed: int, random_crop: bool) -> None:
        self._image, self._seed, self._random_crop = image, seed, random_crop
        memory.keep_up_to(_KEPT_BYTES)

    def __call__(self, blocks: pa.Table) -> Iterator[pa.Table]:
        yield from (as_row(self.decoded(table)) for table in tables_of(blocks))

    def decoded(self, table: pa.Table) -> pa.Table:
        """The table with `bytes` replaced by `pixels`, and `bad`: why the image could not be decoded, null if it was.

        Args:
            table: columns bytes, label, id, epoch and path, one row an image.

        Returns:
            columns label, id, epoch, path, pixels (fixed-size binary, H*W*C bytes; zeros for a bad image) and bad.
        """
        image, count = self._image, table.num_rows
        pixels = np.empty((count, image.size, image.size, image.channels), np.uint8)
        bad: list[str | None] = [None] * count
        ids, epochs = table["id"].to_pylist(), table["epoch"].to_pylist()
        for i, data in enumerate(table["bytes"].to_pylist()):
            crop = crop_place(self._seed, epochs[i], ids[i]) if self._random_crop else CENTRE
            try:
                pixels[i] = decode(data, image.size, image.channels, crop=crop)
            except DecodeError as error:
                pixels[i], bad[i] = 0, str(error)
        kind = pa.binary(pixel_bytes(image))
        packed = pa.FixedSizeBinaryArray.from_buffers(kind, count, [None, pa.py_buffer(pixels)])
        return (
            table.select(["label", "id", "epoch", "path"])
            .append_column("pixels", packed)
            .append_column("bad", pa.array(bad, pa.string()))
        )


def as_row(table: pa.Table) -> pa.Table:
    """A table as one row of lists, without a copy. Ray Data splits and merges tables by size but keeps a row whole."""
    ends = pa.array([0, table.num_rows], pa.int64())
    wholes = [c.chunk(0) if c.num_chunks == 1 else c.combine_chunks() for c in table.columns]
    return pa.table([pa.LargeListArray.from_arrays(ends, whole) for whole in wholes], table.column_names)


def tables_of(rows: pa.Table) -> Iterator[pa.Table]:
    """The tables back from rows that `as_row` made."""
    for row in range(rows.num_rows):
        yield pa.table({name: rows[name][row].values for name in rows.column_names})


def pixel_bytes(image: ImageConfig) -> int:
    return image.size * image.size * image.channels


def pixels_of(table: pa.Table, image: ImageConfig) -> np.ndarray:
    """The images of a table that `Decode` made: uint8 [N, H, W, C]. A table of one chunk is not copied."""
    size = pixel_bytes(image)
    parts = [
        np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * size, chunk.offset * size)
        for chunk in table["pixels"].chunks
    ]
    pixels = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return pixels.reshape(-1, image.size, image.size, image.channels)


def block_rows(image: ImageConfig, image_bytes: int, local_batch: int) -> int:
    """Most rows to read and decode together: some batches, and at most about `BLOCK_BYTES`.

    Args:
        image_bytes: mean size of an encoded image, in bytes.
        local_batch: rows of one rank in one batch.
    """
    least, most = ROWS_PER_BLOCK
    rows = min(most, max(least, BATCHES_PER_BLOCK * local_batch))
    return max(1, min(rows, BLOCK_BYTES // max(pixel_bytes(image), image_bytes)))
