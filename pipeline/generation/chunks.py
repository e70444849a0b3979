"""Decides which samples go into which file, by arithmetic alone.

A chunk is the samples in one file. Chunks end at multiples of `rows_per_file` and at the count. If the count is
raised later, the samples up to the next multiple become a file of their own, so no existing file is rewritten.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_NAME = re.compile(r"train-(\d{12})-(\d{12})\.(parquet|tar|png|npz)")


class Chunk(NamedTuple):
    """The samples [start, stop), which are in one file."""

    start: int
    stop: int


def file_name(chunk: Chunk, suffix: str) -> str:
    """The name of a chunk's file, which contains the chunk's range."""
    return f"train-{chunk.start:012d}-{chunk.stop:012d}.{suffix}"


def parse_name(name: str) -> Chunk | None:
    """The inverse of `file_name`; None for a foreign name."""
    match = _NAME.fullmatch(name)
    return Chunk(int(match[1]), int(match[2])) if match and int(match[1]) < int(match[2]) else None


def gaps(count: int, finished: Iterable[Chunk]) -> Iterator[Chunk]:
    """The ranges of the first `count` samples that are in no finished chunk, in order."""
    position = 0
    for chunk in [*sorted(finished), Chunk(count, count)]:
        if position < (stop := min(chunk.start, count)):
            yield Chunk(position, stop)
        position = max(position, chunk.stop)


def cut_into_chunks(span: Chunk, rows_per_file: int) -> Iterator[Chunk]:
    """Cuts a span of samples into chunks at multiples of `rows_per_file`."""
    position = span.start
    while position < span.stop:
        stop = min((position // rows_per_file + 1) * rows_per_file, span.stop)
        yield Chunk(position, stop)
        position = stop


def tasks(spans: list[Chunk], rows_per_file: int, most: int) -> list[Chunk]:
    """Cuts spans into tasks of one or more whole files: about `most` tasks, however many files there are."""
    files = sum(-(-(span.stop - span.start) // rows_per_file) for span in spans)
    return [
        task for span in spans for task in cut_into_chunks(span, rows_per_file * max(1, -(-files // most)))
    ]


def batches(chunk: Chunk, batch_size: int) -> Iterator[tuple[range, slice]]:
    """The full batches that cover a chunk, and which of their samples belong to the chunk.

    Batches are always full and begin at multiples of `batch_size`. So a sample is always computed beside the same
    neighbours, and its bytes do not depend on the count.
    """
    for start in range(chunk.start // batch_size * batch_size, chunk.stop, batch_size):
        first, last = max(chunk.start, start), min(chunk.stop, start + batch_size)
        yield range(start, start + batch_size), slice(first - start, last - start)
