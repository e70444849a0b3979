"""Which samples go in which file: arithmetic, whatever the number of samples.

A chunk is what is in one file. Chunks are cut at the multiples of `rows_per_file`, and where the count ends: if it
is raised later, the rest up to the next multiple becomes a file of its own, so nothing that exists is rewritten.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_NAME = re.compile(r"train-(\d{12})-(\d{12})\.(parquet|tar|png|npz)")


class Chunk(NamedTuple):
    """Samples [start, stop) of one file."""

    start: int
    stop: int


def file_name(chunk: Chunk, suffix: str) -> str:
    """The name says which samples are in it."""
    return f"train-{chunk.start:012d}-{chunk.stop:012d}.{suffix}"


def parse_name(name: str) -> Chunk | None:
    """The inverse of `file_name`; None for a foreign name."""
    match = _NAME.fullmatch(name)
    return Chunk(int(match[1]), int(match[2])) if match and int(match[1]) < int(match[2]) else None


def gaps(count: int, finished: Iterable[Chunk]) -> Iterator[Chunk]:
    """What of the first `count` samples is in no finished chunk, in order."""
    position = 0
    for chunk in [*sorted(finished), Chunk(count, count)]:
        if position < (stop := min(chunk.start, count)):
            yield Chunk(position, stop)
        position = max(position, chunk.stop)


def cut_into_chunks(span: Chunk, rows_per_file: int) -> Iterator[Chunk]:
    """The files that a span of samples is written as: cut at the multiples of `rows_per_file`."""
    position = span.start
    while position < span.stop:
        stop = min((position // rows_per_file + 1) * rows_per_file, span.stop)
        yield Chunk(position, stop)
        position = stop


def tasks(spans: list[Chunk], rows_per_file: int, most: int) -> list[Chunk]:
    """Spans cut into runs of whole files, one run a task: about `most` of them, whatever the number of files."""
    files = sum(-(-(span.stop - span.start) // rows_per_file) for span in spans)
    return [
        task for span in spans for task in cut_into_chunks(span, rows_per_file * max(1, -(-files // most)))
    ]


def batches(chunk: Chunk, batch_size: int) -> Iterator[tuple[range, slice]]:
    """The whole batches that cover a chunk, and which of their samples belong to it.

    Batches are always full and begin at multiples of `batch_size`: a sample is computed beside the same
    neighbours whatever the count, so its bytes never depend on them.
    """
    for start in range(chunk.start // batch_size * batch_size, chunk.stop, batch_size):
        first, last = max(chunk.start, start), min(chunk.stop, start + batch_size)
        yield range(start, start + batch_size), slice(first - start, last - start)
